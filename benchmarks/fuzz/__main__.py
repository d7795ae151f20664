"""Run one target, or write the seeds: see `benchmarks.fuzz`."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path

WORK = Path(".fuzz")
MEMORY_MB = 1500
"""Memory limit of the process, in MB; libraries take 600, and more than the limit is a finding."""

LONGEST_INPUT = 20_000
MARKS = (b"[", b"]", b"{", b"}", b":", b",", b'"', b"null", b"true", b"-1", b"NaN", b"---\n", b"- ")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fuzz", description=__doc__)
    parser.add_argument("target", help="name of a target, or `seeds` to write the corpus anew")
    parser.add_argument("--seconds", type=int, default=300)
    chosen = parser.parse_args()
    if chosen.target == "seeds":
        write_seeds()
        return
    try:
        import atheris
    except ImportError:
        sys.exit("Fuzzing needs atheris: pip install -e '.[fuzz]'.")
    with atheris.instrument_imports(include=["hf_tsv", "yaml", "pickletools", "zipfile"]):
        from benchmarks.fuzz import targets
    if chosen.target not in targets.TARGETS:
        sys.exit(f"There is no target {chosen.target!r}; choose one of {[*targets.TARGETS]}.")
    logging.disable()
    work = WORK / chosen.target
    work.mkdir(parents=True, exist_ok=True)
    words = WORK / f"{chosen.target}.dict"
    words.write_text(dictionary(targets.CORPUS / chosen.target))
    options = [
        f"-max_total_time={chosen.seconds}", f"-rss_limit_mb={MEMORY_MB}", "-malloc_limit_mb=500",
        f"-max_len={LONGEST_INPUT}", "-timeout=10", "-print_final_stats=1", f"-dict={words}",
        f"-artifact_prefix={work}/found-", str(work), str(targets.CORPUS / chosen.target),
    ]  # fmt: skip
    atheris.Setup([sys.argv[0], *options], lambda raw: targets.run(chosen.target, raw))
    atheris.Fuzz()


def write_seeds() -> None:
    """Write a file in `corpus/` for each seed."""
    from benchmarks.fuzz import targets

    for name, contents in targets.seeds().items():
        folder = targets.CORPUS / name
        folder.mkdir(parents=True, exist_ok=True)
        for i, content in enumerate(contents):
            raw = content if isinstance(content, bytes) else json.dumps(content).encode()
            (folder / f"seed-{i}").write_bytes(raw)


def dictionary(corpus: Path) -> str:
    """Dictionary of the seeds' words for the fuzzer."""
    found = {*MARKS, b"1e999", b"18446744073709551616", b"\\ud800", b"\xe2\x80\xae"}
    for file in sorted(corpus.glob("seed-*")):
        raw = file.read_bytes()
        for part in raw.replace(b"'", b'"').replace(b"\n", b'"').replace(b" ", b'"').split(b'"'):
            if 2 < len(part) < 60:
                found.add(part)
    quoted = ("".join(f"\\x{byte:02x}" for byte in word) for word in sorted(found))
    return "".join(f'"{word}"\n' for word in quoted)


if __name__ == "__main__":
    main()
