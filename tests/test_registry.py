"""What the registry says of a model; that it serves is in test_pipeline.py."""

from dataclasses import asdict

import pytest

from pipeline.registry import hypernetwork
from pudnet.card import Card
from pudnet.config import ModelConfig, TrainConfig, apply_variant


@pytest.mark.parametrize(
    ("variant", "said"),
    [
        ("pudnet", "extractor 1conv-1linear, eta 0.2, GRU depth 2"),
        ("pudnet_plus", "class filters, a classifier by ridge regression"),
    ],
)
def test_what_makes_the_weights_is_said_whatever_was_searched(variant, said):
    model, _ = apply_variant(variant, ModelConfig(), TrainConfig())
    assert hypernetwork(Card("pudnet", "convnet3", 1, 8, (0.5,), (0.5,), 10.0, 10, asdict(model))) == said
