"""Adds the trained model, with a model card, to those that ship with the project: `python -m pipeline.publish`.

It is no DVC stage: run it by hand after `dvc repro evaluate`, as `models/pretrained/make.sh` does.
"""

from __future__ import annotations

import dataclasses
import json

from pipeline.params import Params
from pipeline.project import PUDNET, RESULTS, write
from pipeline.stage import run_stage
from pipeline.tracking.registry import hypernetwork
from pudnet.card import Card, read_tensors, write_tensors
from pudnet.config import passed
from pudnet.errors import UserError
from pudnet.locations import SHIPPED

LICENCES = {
    "fashion": "Fashion-MNIST (Xiao, Rasul and Vollgraf 2017, Zalando SE) is MIT-licensed.",
    "cifar100": "CIFAR-100 (Krizhevsky 2009) is published for research, without a licence of its own.",
}
TEXT = """# {name}

A PudNet (variant `{variant}`) that predicts {target} for images of {size}x{size} px with {channels} channel(s). Made by
`models/pretrained/make.sh`, which says with what params, from commit {commit}.

| | |
|---|---|
| accuracy on unseen classes | {accuracy:.2f} ± {ci95:.2f} % (95% interval over {test_groups} test groups; 1 split) |
| a group | {k} classes, {images} images; weights and classifier from one, accuracy on its twin (no image in common) |
| trained on | {train_groups:,} task groups of {source}, {passed}, one update each time; L1{losses} |
| hypernetwork | {hypernetwork} |
| class split | seed {split_seed} |
| training classes | {train_classes} |
| test classes, never trained on | {test_classes} |
| time of a prediction | {total_ms:.0f} ms on {threads} thread(s) of a {device}, from {timing_images} images |

**Data.** {licence} No image of it is in this repository.

**Limits.** A small training budget: the paper uses up to 100,000 groups. Other images are cropped to their centre
square and resized to {size} px, where fine detail is lost; the further they are from {setting}'s, the worse. What else
does as well from the same images, and what training on them takes, is in README.md. It tells apart the classes that it
is given examples of, a class with far fewer images than the others worse, and knows no "none of these"; its softmax is
not calibrated. Not for decisions about people.
"""


def publish(params: Params) -> None:
    """Write models/pretrained/SETTING-TARGET.safetensors and its card."""
    tensors, card = read_tensors(PUDNET)
    metrics, timing = _read("metrics"), _read("timing")
    seed, trained_for = card.provenance.get("split_seed"), card.provenance.get("setting")
    if (trained_for, card.target) != (params.setting, params.target) or str(seed) not in metrics["splits"]:
        raise UserError(f"{PUDNET}: its setting, target or split is not params.yaml's; run `dvc repro evaluate`")
    split = metrics["splits"][str(seed)]
    accuracy = {"accuracy": split["accuracy"], "ci95": split["ci95"], "test_groups": split["test_groups"]}
    card = dataclasses.replace(card, provenance={**card.provenance, "test": accuracy})
    name = f"{params.setting}-{params.target}"
    write_tensors(SHIPPED / f"{name}.safetensors", tensors, card)
    write(SHIPPED / f"{name}.md", _text(name, params, card, split, timing))
    print(f"publish: {SHIPPED / name}.safetensors, {sum(t.numel() for t in tensors.values()) * 4 / 1e6:.1f} MB")


def _read(name: str) -> dict:
    path = RESULTS / f"{name}.json"
    if not path.is_file():
        raise UserError(f"{path}: no such file; run `dvc repro evaluate` first")
    return json.loads(path.read_text())


def _text(name: str, params: Params, card: Card, split: dict, timing: dict) -> str:
    made = card.provenance
    _, train = params.configured({key: made[key] for key in params.search.space if key in made})
    weights = {"L2": train.full_weight, "L3": train.kl_weight}
    share = train.pretraining_share
    first = f"; on the images of the first {share:.0%} of them, mixed, L2" if share else ""
    return TEXT.format(
        name=name,
        variant=made["variant"],
        target=card.target,
        size=card.image_size,
        channels=card.channels,
        commit=made["git_commit"].removesuffix("-dirty"),
        k=params.groups.classes_per_group,
        images=params.groups.images_per_group,
        train_groups=made["train_groups"],
        passed=passed(made.get("passes", 1)),
        source=params.setting,
        losses=("".join(f" + {weight:g} {name}" for name, weight in weights.items() if weight) or " alone") + first,
        hypernetwork=hypernetwork(card),
        split_seed=made["split_seed"],
        train_classes=", ".join(split["train_classes"]),
        test_classes=", ".join(split["test_classes"]),
        total_ms=timing["total_ms"],
        threads=timing["threads"],
        device=timing["device"].upper() if timing["device"] == "cpu" else timing["device"],
        timing_images=timing["images"],
        licence=LICENCES.get(params.setting, f"As its source ({made['source']}) says."),
        setting=params.setting,
        **made["test"],
    )


if __name__ == "__main__":
    run_stage(publish)
