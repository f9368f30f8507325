"""Builds the model that a card describes: a hypernetwork, or the trunk of a control or baseline."""

from __future__ import annotations

from torch import nn

from pudnet.card import Card, card_target
from pudnet.config import ModelConfig, parse
from pudnet.controls import StaticTrunk
from pudnet.hypernet import PudNet
from pudnet.targets import Target


def build_model(card: Card, target: str | nn.Module | None = None) -> tuple[PudNet | StaticTrunk, Target]:
    """Build the untrained model that a card describes, and its target network.

    Raises `UserError` if the card describes no model, or if its target is a user's own network and `target` is missing.
    """
    built = card_target(card, target)
    if card.kind == "static_trunk":
        return StaticTrunk(built), built
    return PudNet(parse(ModelConfig, card.model or {}, "model"), built).float(), built
