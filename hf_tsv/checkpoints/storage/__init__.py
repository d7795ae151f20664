"""Bytes on disk and on the Hub: headers, tensors, shards."""
