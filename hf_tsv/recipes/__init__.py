"""Every choice of a run, checked; to YAML and back."""
