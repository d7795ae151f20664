"""Tests of runs that are killed: at every step they take on the disk, and at random times."""
