"""Baselines: the methods that PudNet is compared with.

Learned methods are trained on task groups and adapt to a new group by its support set. Training from scratch uses
nothing but the new group. All are measured in the same way as PudNet: `adapt`, then `logits`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from pudnet.baselines.heads import HEADS
from pudnet.baselines.matchnet import MatchNet
from pudnet.baselines.meta_baseline import MetaBaseline
from pudnet.baselines.meta_deepbdc import MetaDeepBDC
from pudnet.baselines.method import Adapter, Method
from pudnet.baselines.musml import MUSML
from pudnet.baselines.pretrained import Pretrained
from pudnet.baselines.protonet import ProtoNet
from pudnet.baselines.r2d2 import R2D2
from pudnet.card import card_target, loaded, read_tensors
from pudnet.config import parse
from pudnet.errors import UserError
from pudnet.scratch import Scratch, ScratchConfig
from pudnet.targets import Target, build_target

__all__ = ["HEADS", "LEARNED", "SCRATCH", "Adapter", "Method", "Scratch", "ScratchConfig", "config_type"]
__all__ += ["load_method", "make_method"]

LEARNED: dict[str, type[Method]] = {
    "pretrained": Pretrained,
    "matchnet": MatchNet,
    "protonet": ProtoNet,
    "meta_baseline": MetaBaseline,
    "meta_deepbdc": MetaDeepBDC,
    "musml": MUSML,
    "r2d2": R2D2,
}
SCRATCH = ("scratch_adam", "scratch_gc")


def config_type(name: str) -> type:
    """The configuration class of a baseline."""
    return ScratchConfig if name in SCRATCH else LEARNED[name].Config


def check_method(name: str, config: dict[str, Any], plain: Target) -> Any:
    """A learned baseline's configuration. Raises `UserError` for a wrong key or value, or if the target forbids it."""
    kind = LEARNED[name]
    own = parse(kind.Config, config, name)
    kind.check(own, plain)
    return own


def make_method(name: str, config: dict[str, Any], plain: Target) -> tuple[Method, Target]:
    """Build an untrained learned baseline, and its target: the plain one, or one to which the method adds a module.

    Raises `UserError` as `check_method` does.
    """
    kind, own = LEARNED[name], check_method(name, config, plain)
    network = kind.network(own, plain)
    target = plain if network is plain.network else build_target(network, plain.channels, plain.image_size)
    return kind(own, target), target


def load_method(path: Path, device: torch.device, target: str | None = None) -> Adapter:
    """Read a trained baseline; `UserError` for any other file. `target` is as in `Predictor.load`."""
    tensors, card = read_tensors(path)
    if card.kind not in LEARNED:
        raise UserError(f"{path}: holds {card.holds}, not a trained baseline")
    with torch.random.fork_rng(devices=[]):
        plain = card_target(card, target)
        method, own = make_method(card.kind, card.model or {}, plain)
    return Adapter(loaded(method, tensors, path).to(device), card, own)
