"""The commands, each in a folder of its own.

In arguments `%NAME` is a folder of inputs, `@NAME` the folder of an earlier command, and a last
`+` stands for `-o out`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

BASE = "--base-model %base"
PAIR = f"%vision %full {BASE}"
IMAGES = "--task pets=%pets --task blocks=%blocks"
REFERENCES = "--reference pets=%vision --reference blocks=%full"
OUTPUT = r"(?<![\w/])@"
"""What stands before the name of an earlier command, but not before a revision."""

WIDE = "%wide-1 %wide-2 --base-model %wide-base"


@dataclass(frozen=True)
class Command:
    """What is run, and what is known of its end.

    Args:
        name: of its folder.
        words: arguments of hf-tsv, or `-c` and a program.
        code: exit code that it must have.
        processes: of torchrun; 0: none.
        kill_after: finished weights after which it is killed, and run again; 0: it is not.
        like: an earlier command whose `out` must have the same bytes, cards aside.
    """

    name: str
    words: tuple[str, ...]
    code: int = 0
    processes: int = 0
    kill_after: int = 0
    like: str = ""

    @property
    def needs(self) -> set[str]:
        """Earlier commands whose output this one reads or is compared with."""
        return {*re.findall(rf"{OUTPUT}([\w-]+)", " ".join(self.words)), self.like} - {""}


def selected(commands: Sequence[Command], chosen: set[str]) -> list[Command]:
    """The commands of these names and those that they need, in order."""
    for command in reversed(commands):
        if command.name in chosen:
            chosen = chosen | command.needs
    return [command for command in commands if command.name in chosen]


def cli(name: str, line: str, **more: int | str) -> Command:
    """A command line, in words without spaces."""
    line = re.sub(r"\+$", "-o out", line)
    return Command(name, tuple(line.split()), **more)  # type: ignore[arg-type]


def all_commands() -> list[Command]:
    """Everything that is run, in an order in which what is needed comes first."""
    return [*merges(), *inputs(), *compressions(), *reports(), *runs(), *hub(), *refusals(), *api()]


def merges() -> Iterator[Command]:
    """Methods and options."""
    for method in (
        "tsv", "low-rank", "orthogonal", "task-arithmetic", "average", "ties", "consensus",
        "iso-c", "iso-cts", "tall-mask",
    ):  # fmt: skip
        yield cli(f"merge-{method}", f"merge {PAIR} --method {method} --json +")
    ada = "--method ada --steps 3 --learning-rate 0.02 --batch-size 4 --seed 3"
    yield cli("merge-ada", f"tune {PAIR} {ada} {IMAGES} --json +")
    yield cli("merge-ada-again", "merge --recipe @merge-ada/out/hf_tsv_recipe.yaml --json +",
              like="merge-ada")  # fmt: skip
    yield cli("merge-again", "merge --recipe @merge-tsv/out/hf_tsv_recipe.yaml +", like="merge-tsv")
    for name, options in {
        "text": "--quiet", "fused": "--qkv fused", "exact": "--precision exact",
        "whitening": "--precision exact --orthogonalizer whitening", "weights": "--weights 0.5,2",
        "alpha": "--alpha 0.7", "bfloat16": "--dtype bfloat16", "float16": "--dtype float16",
        "shards": "--max-shard-size 40KB", "report": "--report", "rank": "--rank 3",
        "fraction": "--rank-fraction 0.2", "exclude": "--exclude *.fc1.weight --exclude visual*",
        "memory": "--max-memory 2GB --timings",
    }.items():  # fmt: skip
        yield cli(f"merge-{name}", f"merge {PAIR} {options} --json +")
    tune = f"--alphas 0.25:1:0.25 --split validation {IMAGES} --template {{}}"
    yield cli("merge-tuned", f"tune {PAIR} {tune} --json +")
    yield cli("merge-plan", f"merge {PAIR} --dry-run")
    yield cli("merge-plan-json", f"merge {PAIR} --dry-run --json +")
    yield cli("merge-replaced", f"merge {PAIR} --alpha 0.5 --force +")
    yield cli("merge-many", f"merge %vision %twin %flat %flat2 %full2 {BASE} --report --json +")
    yield cli("merge-wide", f"merge {WIDE} --rank 4 --json +")
    yield cli("merge-wide-exact", f"merge {WIDE} --rank 4 --precision exact --json +")


def inputs() -> Iterator[Command]:
    """What checkpoints may be."""
    for name, refs in {
        "flat": "%flat %flat2", "projection": "%projection %vision", "towers": "%text %vision",
        "half": "%half %full", "brain": "%brain %half", "adapters": "%lora %dora",
        "adapter-mixed": "%lora %full2", "mask": "@merge-tall-mask/out/masks/vision %full2",
    }.items():  # fmt: skip
        yield cli(f"input-{name}", f"merge {refs} {BASE} --json +")
    yield cli("input-generic", "merge %vit-1 %vit-2 --base-model %vit-base --json +")
    yield cli("input-subfolder", f"merge %many --subfolder vision {BASE} --json +")
    yield cli("input-variant", f"merge %variant %vision {BASE} --json +")
    yield cli("input-half-base", "merge %vision %full --base-model %half --json +")
    whole = f"merge %full %full2 {BASE} +"
    yield cli("input-whole", whole)
    for kind in ("bin", "sharded"):
        yield cli(f"input-{kind}", whole.replace("%full ", f"%{kind} "))
    yield cli("heads", f"merge %heads-a %heads-b {BASE} --keep-heads --json +")
    yield cli("heads-left", f"merge %heads-a %heads-b {BASE} --json +")
    clip = "%oc-1 %oc-2 --base-model %oc-base"
    yield cli("open-clip", f"merge {clip} --json +")
    yield cli("open-clip-bin", "merge %oc-bin %oc-2 --base-model %oc-base --json +")
    yield cli("open-clip-split", f"merge {clip} --qkv split --out-format transformers --json +")
    yield cli("open-clip-made", f"merge {PAIR} --out-format open_clip --json +")
    yield cli("open-clip-mixed", "merge %oc-1 %full2 --base-model %base --json +")


def compressions() -> Iterator[Command]:
    """Factors and adapters, and what is made of them."""
    for name, options in {
        "": "", "rank": "--rank 3", "fraction": "--rank-fraction 0.3", "energy": "--energy 0.9",
        "budget": "--budget 40%", "bytes": "--budget 150KB --compress-conv",
        "brain": "--dtype bfloat16 --compress-conv --report",
        "shards": "--max-shard-size 20KB", "peft": "--out-format peft",
        "no-dense": "--out-format peft --no-dense --rank 4",
    }.items():  # fmt: skip
        label = f"compress-{name}".rstrip("-")
        yield cli(label, f"compress %full {BASE} {options} --json -o full-tsv")
    yield cli("compress-plan", f"compress %full {BASE} --dry-run --json")
    yield cli("compress-vision", f"compress %vision {BASE} -o vision-tsv")
    yield cli("compress-lora", f"compress %lora {BASE} --energy 0.99 --json -o lora-tsv")
    yield cli("compress-heads", f"compress %heads-a {BASE} --json -o heads-tsv")
    yield cli("compress-dora", f"compress %dora {BASE} --rank 6 --json -o dora-tsv")
    yield cli("compress-half", f"compress %half {BASE} --json -o half-tsv")
    yield cli("compress-mask", f"compress @merge-tall-mask/out/masks/full {BASE} -o mask-tsv")
    yield cli("compress-wide", "compress %wide-1 --base-model %wide-base --rank 4 --json -o w-tsv")
    yield cli("compress-open-clip", "compress %oc-1 --base-model %oc-base --json -o oc-tsv")
    factors = "@compress/full-tsv"
    both = f"{factors} @compress-vision/vision-tsv"
    yield cli("merge-peft", f"merge @compress-peft/full-tsv %full2 {BASE} --json +")
    yield cli("merge-factors", f"merge {both} --json +")
    yield cli("merge-factors-mixed", f"merge {factors} %vision {BASE} --report --json +")
    yield cli("reconstruct", f"reconstruct {factors} --json +")
    yield cli("reconstruct-brain", "reconstruct @compress-brain/full-tsv --dtype float16 +")
    yield cli("reconstruct-heads", "reconstruct @compress-heads/heads-tsv --json +")
    yield cli("route", f"route {factors} %vision {BASE} --json +")
    yield cli("route-plan", f"route {factors} %vision {BASE} --layer *.mlp.fc1 --dry-run --json")
    yield cli("route-evaluate", f"evaluate @route/out {IMAGES} --json")
    yield cli("reconstruct-plan", f"reconstruct {factors} --dry-run --json")
    yield cli("reconstruct-open-clip", "reconstruct @compress-open-clip/oc-tsv +")


def reports() -> Iterator[Command]:
    """What is measured and told."""
    yield cli("interference", f"interference %vision %full %flat {BASE} --json +")
    yield cli("interference-text", f"interference %lora %twin {BASE} --rank 3 --qkv fused +")
    yield cli("interference-factors", "interference @compress/full-tsv %vision --json +")
    for name, ref in {
        "base": "%base", "vision": "%vision", "adapter": "%lora", "merge": "@merge-tsv/out",
        "factors": "@compress/full-tsv", "peft": "@compress-peft/full-tsv",
        "masks": "@merge-tall-mask/out", "mask": "@merge-tall-mask/out/masks/vision",
        "heads": "@heads/out", "open-clip": "%oc-1", "bin": "%bin", "sharded": "%sharded",
    }.items():  # fmt: skip
        yield cli(f"inspect-{name}", f"inspect {ref} --json")
    yield cli("inspect-text", "inspect @merge-tsv/out")
    yield cli("inspect-text-factors", "inspect @compress/full-tsv")
    judged = f"evaluate @merge-tsv/out {IMAGES} {REFERENCES} {BASE}"
    yield cli("evaluate", f"{judged} --json +")
    yield cli("evaluate-text", f"{judged} --limit 7 --template {{}}. --template {{}}")
    yield cli("evaluate-factors", f"evaluate @compress/full-tsv {IMAGES} --json")
    yield cli("evaluate-card", f"evaluate @merge-alpha/out {IMAGES} --card --json")
    yield cli("sweep", f"sweep {IMAGES} {REFERENCES} {BASE} --rank-fraction 0.5,0.1 --json +")


def runs() -> Iterator[Command]:
    """Several processes, and runs that are killed."""
    report = f"merge {PAIR} --report"
    yield cli("processes", f"merge {PAIR} +", processes=2, like="merge-tsv")
    yield cli("processes-report", f"{report} --json +", processes=2, like="merge-report")
    yield cli("processes-masks", f"merge {PAIR} --method tall-mask +", processes=2,
              like="merge-tall-mask")  # fmt: skip
    evaluate = f"evaluate @merge-tsv/out {IMAGES} {REFERENCES} {BASE} --json +"
    yield cli("processes-evaluate", evaluate, processes=2)
    routed = f"route @compress/full-tsv %vision {BASE} --json +"
    yield cli("processes-route", routed, processes=2, like="route")
    yield cli("processes-route-evaluate", f"evaluate @route/out {IMAGES} --json", processes=2)
    yield cli("killed-route", routed, kill_after=8, like="route")
    yield cli("killed-merge", f"merge {PAIR} --json +", kill_after=8, like="merge-tsv")
    yield cli("killed-report", f"{report} --json +", kill_after=20, like="merge-report")
    whole = f"compress %full {BASE} --json -o"
    yield cli("compress-out", f"{whole} out")
    yield cli("killed-compress", f"{whole} out", kill_after=8, like="compress-out")
    yield cli("killed-reconstruct", "reconstruct @compress/full-tsv --json +", kill_after=8,
              like="reconstruct")  # fmt: skip


def hub() -> Iterator[Command]:
    """From a Hub and to it."""
    both = "merge org/vision org/full"
    yield cli("hub-merge", f"{both} --json +")
    yield cli("hub-stream", f"{both} --stream --json +", like="hub-merge")
    yield cli("hub-compress", f"compress org/full --stream {BASE} --json +")
    yield cli("hub-push", f"{both} --push-to me/merged --commit-message Merged")
    yield cli("hub-push-factors", f"compress org/full {BASE} --push-to me/full-tsv --private")
    yield cli("hub-push-plan", "push @merge-tsv/out me/later --dry-run --json")
    yield cli("hub-push-later", "push @merge-tsv/out me/later --revision next --json")
    yield cli("hub-push-request", "push @merge-fused/out me/merged --create-pr --json")
    yield cli("hub-reconstruct", f"reconstruct me/full-tsv {BASE} --json +")
    yield cli("hub-inspect", "inspect me/merged@main --json")
    yield cli("hub-evaluate", "evaluate me/merged --task pets=org/data --json +")
    yield cli("hub-evaluate-card", "evaluate me/merged --task pets=org/data --card --create-pr")


def refusals() -> Iterator[Command]:
    """Errors: one line and a hint."""
    for name, line in {
        "absent": "merge org/absent %full +", "base": "merge %vision %full +",
        "shapes": f"merge %wide-1 %full {BASE} +", "rank": f"merge {PAIR} --rank 0 +",
        "mask": f"merge {PAIR} --method tall-mask --rank 2 +", "factors": "reconstruct %full +",
        "foreign": "push %vision me/x", "images": f"tune {PAIR} --method ada +",
        "inspect": "inspect %absent", "alone": f"interference %vision {BASE}",
        "budget": f"compress %full {BASE} --budget 1% +",
    }.items():  # fmt: skip
        usage = name in ("rank", "mask", "images", "inspect", "alone")
        yield cli(f"refused-{name}", line, code=2 if usage else 1)
    yield cli("usage", "merge --nothing", code=2)


API = {
    "load": """
show("factors", hf_tsv.load_model("@compress/full-tsv"))
show("vision", hf_tsv.load_model("%vision", base_model="%base", kind="image-feature-extraction"))
show("head", hf_tsv.load_model("@heads/out", kind="image-classification", head="heads-a"))
""",
    "switch": """
refs = ["@compress/full-tsv", "@compress-vision/vision-tsv"]
for keep in ("memory", "disk"):
    tasks = hf_tsv.TaskSwitcher.from_pretrained(refs, keep=keep)
    show("base", tasks.model)
    for name in tasks.names:
        tasks.activate(name)
        show(name, tasks.model)
    tasks.deactivate()
    show("base", tasks.model)
""",
    "pipeline": """
import PIL.Image
image = PIL.Image.open("%pets/test/cat/0.png")
classify = hf_tsv.pipeline("zero-shot-image-classification", "@merge-tsv/out")
print(classify(image, candidate_labels=["cat", "dog"]))
classify = hf_tsv.pipeline("image-classification", "@heads/out", head="heads-b")
print(classify(image))
""",
    "verbs": """
print(hf_tsv.__version__, hf_tsv.__all__)
merged = hf_tsv.merge(["%vision", "%full"], base_model="%base", output="merged", progress=False)
print(merged.to_dict())
print(hf_tsv.inspect("merged").to_dict())
print(hf_tsv.evaluate("merged", {"pets": "%pets"}, progress=False).to_dict())
factors = hf_tsv.compress("%full", base_model="%base", rank=3, progress=False)
factors.save_pretrained("full-tsv")
print(factors.report.to_dict())
hf_tsv.export_peft("%full", base_model="%base", output="peft", progress=False)
print(hf_tsv.interference(["%vision", "%full"], base_model="%base", progress=False).to_dict())
print(hf_tsv.Recipe.from_dict(merged.recipe.to_dict()) if hasattr(merged, "recipe") else "")
""",
}
"""Programs that use the public names."""

PREAMBLE = """
import hashlib, hf_tsv, torch
def show(name, model):
    torch.manual_seed(0)
    pixels = torch.randn(2, 3, 32, 32)
    image = getattr(model, "get_image_features", model)
    digest = hashlib.sha256()
    with torch.inference_mode():
        found = image(pixel_values=pixels)
    found = found if isinstance(found, torch.Tensor) else tuple(found.values())[0]
    for tensor in (found, *model.state_dict().values()):
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    print(name, type(model).__name__, digest.hexdigest())
"""


def api() -> Iterator[Command]:
    """The library, without its command line."""
    for name, program in API.items():
        yield Command(f"api-{name}", ("-c", PREAMBLE + program))
