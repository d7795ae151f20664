"""Coverage-guided fuzzing of everything that reads untrusted files; not part of the tests.

`python -m benchmarks.fuzz header --seconds 300` needs the extra `fuzz` (atheris). It tries inputs
until one raises anything but an [`HfTsvError`], takes more than 10 seconds, or too much memory.
Earlier findings and a small seed of each kind are in `corpus/`; the tests run those.
"""
