"""What every method scores on tiny CLIPs that were really trained."""
