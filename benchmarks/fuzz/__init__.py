"""Coverage-guided fuzzing of everything that reads what others wrote; not part of the tests.

`python -m benchmarks.fuzz header --seconds 300` needs the extra `fuzz` (atheris), and lets it try
inputs until one raises what is no [`HfTsvError`], takes more than 10 seconds, or too much memory.
What it found before, and a small seed of each kind, lies in `corpus/`; the tests run those.
"""
