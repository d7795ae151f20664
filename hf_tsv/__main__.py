"""`python -m hf_tsv`."""

from __future__ import annotations

from hf_tsv.cli import main

if __name__ == "__main__":
    main()
