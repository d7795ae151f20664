"""Checkpoints as transformers models and pipelines."""
