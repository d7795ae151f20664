"""The weight file of a checkpoint among its files, and what a folder is that holds none."""

from __future__ import annotations

import re
from collections.abc import Iterable

from hf_tsv.checkpoints.formats import open_clip
from hf_tsv.checkpoints.names import ADAPTER_CONFIG, CONFIG_FILE, CONFIGS, PICKLED_FILE, SINGLE_FILE
from hf_tsv.checkpoints.storage.files import AGAIN, Files
from hf_tsv.checkpoints.storage.headers import VARIANT, index_of
from hf_tsv.hub import WEIGHT_SUFFIXES
from hf_tsv.system.errors import CheckpointError
from hf_tsv.system.text import counted

WEIGHTS = (SINGLE_FILE, open_clip.SINGLE_FILE, PICKLED_FILE, open_clip.PICKLED_FILE)
"""Names of weight files, in order of preference."""

VARIANT_INDEX = re.compile(r"model\.safetensors\.index\.([A-Za-z0-9_]+)\.json")
SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}(\.safetensors|\.bin)")
BESIDE = re.compile(
    r"(optimizer|scheduler|scaler|training_args|rng_state.*|random_states.*|adapter_model"
    r"|sampler.*|.*_optim_states|consolidated_optim.*)\.\w+"
)
"""Weight suffixes of what trainers save beside the weights."""

CACHED = re.compile(r"models--(.+?)--(.+)")
SHOWN = 5  # names that an error lists

LORA_NAMES = (
    (re.compile(r"lora_(te\d?|unet)_.+"), "kohya's scripts"),
    (re.compile(r"(text_encoder(_2)?|unet|transformer)\..+\.lora(_A|_B|\.up|\.down)?\b.*"),
     "diffusers"),
    (re.compile(r".+\.lora_(up|down)\.weight"), "kohya's scripts"),
)  # fmt: skip
"""Names of tensors in LoRA files that other programs than PEFT write."""

UNFINISHED = (".incomplete", ".part", ".crdownload", ".aria2", ".tmp")
OTHER_LIBRARIES = {
    ".h5": "TensorFlow", ".msgpack": "Flax", ".onnx": "ONNX", ".gguf": "llama.cpp",
    ".mlmodel": "Core ML", ".tflite": "TensorFlow Lite", ".npz": "JAX",
}  # fmt: skip


def weight_file(files: Files, owner: str) -> str:
    """Name of the file that holds the weights, or that its shards' index replaces.

    It is the first known name, else the only variant of one, else the only weight file at all.

    Raises:
        [`CheckpointError`]: there is none, or several that may be meant.
    """
    known = (name for name in WEIGHTS if _is_there(files, name))
    if name := next(known, None) or _only_variant(files, owner):
        return name
    others = [n for n in files.names() if n.endswith(WEIGHT_SUFFIXES) and "/" not in n]
    others = [name for name in others if not BESIDE.fullmatch(name)]
    if shard := next(filter(None, map(SHARD.fullmatch, others)), None):  # one alone is not all
        problem = f"{owner} has shards of its weights, and has no {shard[1]}{shard[2]}.index.json."
        raise CheckpointError(problem, AGAIN)
    safe = [name for name in others if name.endswith(".safetensors")]
    for found in (safe, others):
        if len(found) == 1:
            return found[0]
    if others:
        raise CheckpointError(
            f"{owner} has {counted(len(others), 'weight file')}: {_some(others)}.",
            "Put the one you mean into a folder of its own, with its config.json.",
        )
    raise nothing_in(files, owner)


def _is_there(files: Files, name: str) -> bool:
    return any(files.size(other) is not None for other in (name, index_of(name)))


def _only_variant(files: Files, owner: str) -> str | None:
    """Name of the only weights saved by `save_pretrained(variant=…)`, or None."""
    patterns = (VARIANT, VARIANT_INDEX)
    matches = (pattern.fullmatch(name) for name in files.names() for pattern in patterns)
    found = {match[1] for match in matches if match}
    if len(found) > 1:
        raise CheckpointError(
            f"{owner} has only variants of its weights, and several: {', '.join(sorted(found))}.",
            "Load the one you mean with transformers (variant=…) and save it.",
        )
    return f"model.{found.pop()}.safetensors" if found else None


def nothing_in(files: Files, owner: str) -> CheckpointError:
    """The error for files among which are no weights: it says what they are instead."""
    names, inside = files.names(), files.folders()
    suffixes = {suffix: name for suffix, name in OTHER_LIBRARIES.items()
                if any(own.endswith(suffix) for own in names)}  # fmt: skip
    runs = sorted((n for n in inside if re.fullmatch(r"checkpoint-\d+", n)), key=_number)
    cached = CACHED.fullmatch(files.folder.resolve().name) if files.folder else None
    if cached and "snapshots" in inside:
        repo = f"{cached[1]}/{cached[2]}"
        return CheckpointError(
            f"{owner} is the Hub client's cache of {repo}.", f"Name the repository: {repo}."
        )
    if any(re.match(r"(mp_rank|zero_pp_rank|bf16_zero|zero_to_fp32)", n) for n in names) or any(
        re.match(r"(global_step\d|pytorch_model_fsdp)", n) for n in inside
    ):
        return CheckpointError(
            f"{owner} is the state of a sharded training (DeepSpeed or FSDP), not a model.",
            "Gather the weights with `accelerate merge-weights` or DeepSpeed's zero_to_fp32.py.",
        )
    if runs:
        return CheckpointError(
            f"{owner} is the output of a training run and has no model itself, only {_some(runs)}.",
            f"Name one of them: {owner}/{runs[-1]}",
        )
    if candidates := sorted(n for n in inside if _holds_model(files.within(n))):
        return CheckpointError(
            f"{owner} has no model itself, but its folders have: {_some(candidates)}.",
            f"Name one of them: {owner}/{candidates[0]}",
        )
    if alone := [name for name in names if name.startswith("adapter_model.")]:
        return CheckpointError(
            f"{owner} has the weights of an adapter, {alone[0]}, and no {ADAPTER_CONFIG}.",
            "Save it again with PEFT's save_pretrained, which writes both.",
        )
    if unfinished := [name for name in names if name.endswith(UNFINISHED)]:
        return CheckpointError(
            f"{owner} is not downloaded completely: {unfinished[0]}.",
            "Run the download again; it resumes.",
        )
    if suffixes:
        library = next(iter(suffixes.values()))
        return CheckpointError(
            f"{owner} has weights for {library} only.",
            "Load it with PyTorch where that library allows it, and save it as safetensors.",
        )
    if files.size(CONFIG_FILE) is None and files.size(open_clip.CONFIG_FILE) is None:
        hint = "A checkpoint saved by transformers' save_pretrained has both."
        return CheckpointError(f"{owner} has no {CONFIG_FILE} and no weights.", hint)
    problem = f"{owner} has no {SINGLE_FILE} and no {index_of(SINGLE_FILE)}."
    return CheckpointError(problem, "Name a repository or folder with the weights of a model.")


def _holds_model(files: Files) -> bool:
    """Tell whether the files can be a checkpoint's, an adapter's, or task factors."""
    names = [n for n in files.names() if "/" not in n]
    weights = any(n.endswith(WEIGHT_SUFFIXES) and not BESIDE.fullmatch(n) for n in names)
    described = any(files.size(name) is not None for name in CONFIGS if name != CONFIG_FILE)
    return weights or described or any(_is_there(files, name) for name in WEIGHTS)


def _number(name: str) -> int:
    return int(name.rpartition("-")[2])


def _some(names: list[str]) -> str:
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def refuse_loose_lora(names: Iterable[str], owner: str) -> None:
    """Refuse the tensors of a LoRA that another program than PEFT wrote."""
    for name in names:
        for pattern, program in LORA_NAMES:
            if pattern.fullmatch(name):
                raise CheckpointError(
                    f"{owner} is a LoRA in the format of {program}, which is not read ({name}).",
                    "Convert it to PEFT: load it with diffusers, and save the text encoder with"
                    " text_encoder.save_pretrained(…).",
                )
