"""The machine and the terminal; knows nothing of tensors' meaning."""
