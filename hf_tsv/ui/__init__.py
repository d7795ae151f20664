"""A page in the browser that finds, merges, tries and pushes: `hf-tsv ui`, and a Space."""
