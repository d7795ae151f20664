"""TSV-Merge by fusion_bench, as a process in an environment of its own, see `peers`.

`python -m benchmarks.speed.peer --base DIR --out DIR TASK...` loads transformers' models, merges
them by fusion_bench's own algorithm, and saves the result. Prints its seconds as JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path


def main() -> None:
    """Merge the checkpoints that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("tasks", type=Path, nargs="+")
    chosen = parser.parse_args()
    started = time.perf_counter()
    from fusion_bench.method.task_singular_vector import TSVM, TaskSingularVectorMerging  # type: ignore[import-not-found]
    from fusion_bench.modelpool import BaseModelPool  # type: ignore[import-not-found]
    from transformers import CLIPVisionModel

    paths = {"_pretrained_": chosen.base, **{f"t{i}": path for i, path in enumerate(chosen.tasks)}}
    models = {name: CLIPVisionModel.from_pretrained(path) for name, path in paths.items()}
    loaded = time.perf_counter()
    compute, spent = TSVM.TSVM_utils.compute_and_sum_svd_mem_reduction, []

    def timed(*args: object, **options: object) -> object:
        began = time.perf_counter()
        found = compute(*args, **options)
        spent.append(time.perf_counter() - began)
        return found

    TSVM.TSVM_utils.compute_and_sum_svd_mem_reduction = timed
    merged = TaskSingularVectorMerging().run(BaseModelPool(models))
    done = time.perf_counter()
    merged.save_pretrained(chosen.out)
    print(json.dumps({
        "reading": loaded - started, "computing": sum(spent),
        "writing": time.perf_counter() - done,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
