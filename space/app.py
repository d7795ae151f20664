"""The page of `hf-tsv ui`, as a Space."""

from hf_tsv.ui.serving import serve_space

serve_space()
