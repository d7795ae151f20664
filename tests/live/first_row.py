"""First row of a split of a dataset, read without the rest: `first_row.py DATASET CONFIG SPLIT`."""

from __future__ import annotations

import json
import sys
from typing import Any


def first_row(dataset: str, config: str | None, split: str) -> dict[str, Any]:
    """Types of the columns, names of the classes by column, and the numbers in the first row."""
    import datasets

    rows = datasets.load_dataset(dataset, name=config, split=split, streaming=True)
    row = next(iter(rows))
    features = rows.features or {}
    return {
        "columns": {name: type(feature).__name__ for name, feature in features.items()},
        "classes": {n: f.names for n, f in features.items() if hasattr(f, "names")},
        "numbers": {name: int(value) for name, value in row.items() if isinstance(value, int)},
    }


if __name__ == "__main__":
    print(json.dumps(first_row(sys.argv[1], sys.argv[2] or None, sys.argv[3])))
