"""Merging methods: a rule for one weight, one file each."""
