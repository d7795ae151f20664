"""All weights of a task, compressed."""
