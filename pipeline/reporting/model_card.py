"""The model card of a model that ships with the project."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.params import Params
from pipeline.reporting.numbers import plus_minus
from pipeline.tracking.registry import hypernetwork
from pudnet.card import Card
from pudnet.config import TrainConfig, passed
from pudnet.settings import get_setting

LICENCES = {
    "fashion": "Fashion-MNIST (Xiao, Rasul and Vollgraf 2017, Zalando SE) is MIT-licensed.",
    "cifar100": "CIFAR-100 (Krizhevsky 2009) is published for research, without a licence of its own.",
}
AUGMENTED = {
    "none": "",
    "shift": "; images shifted at random",
    "shift_mirror": "; images shifted and mirrored at random",
}
TEXT = """# {name}

A model (variant `{variant}`) that predicts a {target} from labelled images of {size}x{size} px with {channels}
channel(s). Trained by the code of commit {commit},
with the params that `models/pretrained/make.sh` sets.

    pudnet predict --model {name} --data photos/ --out mine.safetensors

[Which model to take](../../docs/use/index.md#which-model).

| | |
|---|---|
| accuracy on unseen classes | {accuracy:.2f} ± {ci95:.2f} % (95% interval over {test_groups} test groups; 1 split), \
from {images} images |
| a group | {k} classes, {group_images} images; predicted from one, accuracy on its twin (no image in common) |
| trained on | {train_groups:,} task groups of {source}, {passed}, {updates}; {losses} |
| model | {hypernetwork} |
| class split | seed {split_seed} |
| training classes | {train_classes} |
| test classes, never trained on | {test_classes} |

A prediction uses {most}. Accuracy and time, by how many it is given, on {threads} thread(s) of a {device}:

{table}

**Data.** {licence} No image of it is in this repository.

**Limits.** {budget}Other images are cropped to their centre square and resized to {size} px, where fine detail is
lost; the further they are from {setting}'s, the worse. [What was found](../../docs/results/index.md) says what else
does as well from the same images, and what training on them takes. It only tells apart the classes that it is given
examples of: it has no answer "none of these". A class with far fewer images than the others is recognised less well.
Its softmax is not calibrated. Not for decisions about people.
"""


def model_card(
    name: str,
    params: Params,
    card: Card,
    split: Mapping[str, Any],
    group_images: int,
    measured: Sequence[Mapping[str, Any]],
) -> str:
    """The card as Markdown.

    `split` is what `evaluate` wrote of the model's split, `group_images` how many images a group has, and `measured`
    has accuracy and time by number of images looked at.
    """
    made = card.provenance
    _, train = params.configured({key: made[key] for key in params.search.space if key in made})
    return TEXT.format(
        name=name,
        variant=made["variant"],
        target=card.target,
        size=card.image_size,
        channels=card.channels,
        commit=made["git_commit"].removesuffix("-dirty"),
        k=params.groups.classes_per_group,
        group_images=group_images,
        train_groups=made["train_groups"],
        passed=passed(made.get("passes", 1)),
        updates="one update for each" if train.groups_per_step == 1 else f"{train.groups_per_step} in each update",
        source=params.setting,
        losses=losses(train) + AUGMENTED[train.augment],
        hypernetwork=hypernetwork(card),
        split_seed=made["split_seed"],
        train_classes=", ".join(split["train_classes"]),
        test_classes=", ".join(split["test_classes"]),
        most=f"up to {card.sketch_images:,} images",
        threads=measured[0]["threads"],
        device=measured[0]["device"].upper() if measured[0]["device"] == "cpu" else measured[0]["device"],
        table=_table(measured),
        budget=_budget(params.setting, made["train_groups"]),
        licence=LICENCES.get(params.setting, f"As its source ({made['source']}) says."),
        setting=params.setting,
        **made["test"],
    )


def _budget(setting: str, groups: int) -> str:
    """That a model had fewer training groups than the paper's, if the paper has this setting."""
    own = get_setting(setting)
    fewer = not own.ours and groups < own.train_groups
    return f"Trained on {groups:,} groups; the paper has {own.train_groups:,}. " if fewer else ""


def losses(train: TrainConfig) -> str:
    """The losses that a model was trained with."""
    share = train.pretraining_share or 0.0
    if share == 1:
        return "their images are mixed, and it learned to tell all training classes apart"
    weights = {"L2": train.full_weight, "L3": train.kl_weight}
    added = "".join(f" + {weight:g} {name}" for name, weight in weights.items() if weight)
    first = f"; on the images of the first {share:.0%} of them, mixed, L2" if share else ""
    return f"the paper's loss L1{added or ' alone'}{first}"


def _table(measured: Sequence[Mapping[str, Any]]) -> str:
    """Accuracy and time by the number of images looked at, as Markdown."""
    rows = [
        f"| {row['images']} | {plus_minus(row['accuracy'], row['ci95'])} % | {row['total_ms']:.0f} ms |"
        for row in measured
    ]
    return "\n".join(["| images looked at | accuracy | time |", "|---|---|---|", *rows])
