"""The model card of a model that ships with the project."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.params import Params
from pipeline.tracking.registry import hypernetwork
from pudnet.card import Card

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
| trained on | {train_groups:,} task groups of {source}, one update each; L1{losses} |
| hypernetwork | {hypernetwork} |
| class split | seed {split_seed} |
| training classes | {train_classes} |
| test classes, never trained on | {test_classes} |
| time of a prediction | {total_ms:.0f} ms on {threads} thread(s) of a {device}, from {timing_images} images |

**Data.** {licence} No image of it is in this repository.

**Limits.** A small training budget: the paper uses up to 100,000 groups. Other images are cropped to their centre
square and resized to {size} px, where fine detail is lost; the further they are from {setting}'s, the worse. What else
does as well from the same images, and what training on them takes, is in docs/results. It tells apart the classes it
is given examples of, a class with far fewer images than the others worse, and knows no "none of these"; its softmax is
not calibrated. Not for decisions about people.
"""


def model_card(name: str, params: Params, card: Card, split: Mapping[str, Any], timing: Mapping[str, Any]) -> str:
    """The card as Markdown. `split` and `timing` are what `evaluate` wrote of the model's split and its times."""
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
