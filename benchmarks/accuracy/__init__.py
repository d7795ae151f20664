"""Accuracy of every method on tiny CLIPs trained here."""
