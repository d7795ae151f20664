"""Proof that a refactoring changed no output: the same commands, run by two checkouts.

    python -m benchmarks.same_bytes BEFORE [AFTER]

BEFORE and AFTER are folders of checkouts; AFTER is the one this file lies in unless it is named.
Both sides run the commands of `commands.py`, side by side, on the same tiny inputs (`inputs.py`),
each in one process that has imported its checkout and forks a child a command (`worker.py`);
torchrun and kills are real. Of each command the exit code, stdout, stderr and every file that it
wrote or pushed are compared byte for byte: weights, recipes, configs, cards, companions, pages,
pictures. What may differ is the list `CHANGING` in `compare.py`: durations, and the port of the
Hub. Commands that must agree on one side, such as a merge and the same one killed and gone on
with, are compared there too.

    merge-tsv                       same        12 files,   305,664 bytes
    inspect-factors                 DIFFERENT   stdout: factors.energy: 0.91 / 0.90
    ...
    142 commands, 1 different (154 s): inspect-factors

It exits with 1 if anything differs, or if a command of BEFORE does not end as the list says (that
is BROKEN: a command that fails on both sides proves nothing). `--only GLOB` runs some commands and
those whose output they need, `--list` shows all, `--json FILE` writes the result, `--keep FOLDER`
keeps all outputs there for a look. Only `hf_tsv.cli.main`, `python -m hf_tsv` and `hf_tsv.__all__`
are used, so that modules may move between the two checkouts.
"""
