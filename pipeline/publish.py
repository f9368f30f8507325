"""Adds the trained model, with a model card, to those that ship with the project: `python -m pipeline.publish`.

It is no DVC stage: run it by hand after `dvc repro evaluate`, as `models/pretrained/make.sh` does.
"""

from __future__ import annotations

import dataclasses
import json

from pipeline.params import Params
from pipeline.project import PUDNET, RESULTS, write
from pipeline.reporting.model_card import model_card
from pipeline.stage import run_stage
from pudnet.card import read_tensors, write_tensors
from pudnet.errors import UserError
from pudnet.locations import SHIPPED


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
    write(SHIPPED / f"{name}.md", model_card(name, params, card, split, timing))
    print(f"publish: {SHIPPED / name}.safetensors, {sum(t.numel() for t in tensors.values()) * 4 / 1e6:.1f} MB")


def _read(name: str) -> dict:
    path = RESULTS / f"{name}.json"
    if not path.is_file():
        raise UserError(f"{path}: no such file; run `dvc repro evaluate` first")
    return json.loads(path.read_text())


if __name__ == "__main__":
    run_stage(publish)
