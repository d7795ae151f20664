"""The forms a checkpoint or task is stored in, one file each."""
