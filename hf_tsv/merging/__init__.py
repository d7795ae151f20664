"""All weights of a merge."""
