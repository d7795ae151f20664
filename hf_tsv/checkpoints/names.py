"""Every file name that is read or written, in one table."""

from __future__ import annotations

from typing import Literal

SINGLE_FILE = "model.safetensors"
PICKLED_FILE = "pytorch_model.bin"
CONFIG_FILE = "config.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILE = "adapter_model.safetensors"
FACTORS_CONFIG = "tsv_config.json"
FACTORS_FILE = "task_factors.safetensors"

Format = Literal["transformers", "open_clip"]
"""Library whose names, shapes and config the files of a checkpoint have."""

CONFIGS = ("config.json", "tsv_config.json", "open_clip_config.json", "adapter_config.json",
           "hf_tsv_mask.json", "hf_tsv_routing.json")  # fmt: skip

STEMS = ("model", "task_factors", "open_clip_model")
WEIGHT_FILES = tuple(f"{stem}.safetensors{end}" for stem in STEMS for end in ("", ".index.json"))
MARKERS = ("hf_tsv_recipe.yaml", "tsv_config.json", "hf_tsv_reconstruction.json")
"""Files of which every output of hf-tsv contains one."""

OLD_WEIGHTS = (
    *WEIGHT_FILES,
    *(f"{stem}-?????-of-?????.safetensors" for stem in STEMS),
    *MARKERS,
    "heads/*.safetensors", "masks/*/mask.safetensors", "masks/*/hf_tsv_mask.json",
    "hf_tsv_routing.json", "hf_tsv_classes.safetensors",
    "tasks/*/tsv_config.json", "tasks/*/config.json", "tasks/*/task_factors*.safetensors*",
    "adapter_model.safetensors", "adapter_config.json",
    "interference.json", "interference.png", "compression.png", ".eval_results/hf-tsv-*.yaml",
)  # fmt: skip
"""Patterns of an earlier upload's files that a new one replaces; all other files stay."""

REPORT_FILE = "interference.json"
REPORT_PAGE = "interference.html"
COMPRESSION = "compression.png"
RECIPE_FILE = "hf_tsv_recipe.yaml"
RECONSTRUCTION_FILE = "hf_tsv_reconstruction.json"  # says what a checkpoint was made of
ROUTING_FILE = "hf_tsv_routing.json"  # makes a merge one that chooses among its tasks
CLASSES_FILE = "hf_tsv_classes.safetensors"  # embeddings of the tasks' class names, beside it
TASKS_FOLDER = "tasks"  # beside that file, with the factors of each task
