"""Measures of whether the dataset matters, on cases with a known answer."""

import numpy as np
import pytest
import torch

from pudnet.diagnosis import movement, probe


def test_weights_that_are_the_same_for_all_groups_do_not_move():
    weight = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    moved = movement([{"same": weight, "other": share * weight} for share in (1.1, 0.9)])
    assert moved["same"] == pytest.approx([0, 0]) and moved["other"] == pytest.approx([0.1, 0.1])


@pytest.mark.parametrize("told", [True, False])
def test_a_probe_finds_the_classes_in_a_sketch_that_tells_them_and_in_no_other(told):
    rng = np.random.default_rng(0)
    classes = [rng.choice(6, 2, replace=False).tolist() for _ in range(120)]
    sketches = [torch.from_numpy(rng.normal(size=(2, 8))) for _ in classes]
    if told:
        directions = torch.from_numpy(rng.normal(size=(6, 2, 8)))
        sketches = [sketch + 2 * directions[own].sum(0) for sketch, own in zip(sketches, classes, strict=True)]
    assert probe(sketches, classes) > 90 if told else 35 < probe(sketches, classes) < 65


def test_without_two_sets_of_classes_there_is_nothing_to_read():
    assert np.isnan(probe([torch.randn(2, 8) for _ in range(20)], [[0, 1]] * 20))
    assert np.isnan(probe([torch.randn(2, 8) for _ in range(20)], [[0, 1]] * 10 + [[0]] * 10))
