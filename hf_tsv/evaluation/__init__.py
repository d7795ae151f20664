"""Accuracy of models on labelled images."""
