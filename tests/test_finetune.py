"""Predicted weights as an initialisation: what is trained, what is held out, what the curve says."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from pudnet import Predictor
from pudnet.errors import UserError
from pudnet.finetune import finetune


@pytest.fixture(scope="module")
def digits():
    digits = load_digits(n_class=4)
    return np.rint(digits.images * (255 / 16)).astype(np.uint8), digits.target


@pytest.fixture(scope="module")
def predictor():
    return Predictor.untrained("convnet3", channels=1, image_size=8)


@pytest.fixture(scope="module")
def tuned(predictor, digits):
    images, labels = digits
    network = predictor.predict(images[:200], labels[:200])
    return network, predictor.finetune(network, images[:200], labels[:200], epochs=4)


def test_finetuned_network_is_better_on_new_images(tuned, digits):
    network, found = tuned
    images, labels = digits

    def accuracy(network):
        return np.mean(np.array(network.classify(images[200:])) == labels[200:])

    assert accuracy(found.network) > max(0.9, accuracy(network))
    assert not found.network.training and not any(p.requires_grad for p in found.network.parameters())


def test_curve_starts_before_training_and_has_both_starts(tuned):
    _, found = tuned
    assert (found.trained_on, found.held_out) == (160, 40)
    for start in ("predicted", "random"):
        points = [point for point in found.curve if point.start == start]
        assert [point.epoch for point in points] == list(range(5)) and points[0].seconds == 0
        assert all(a.seconds < b.seconds for a, b in zip(points, points[1:], strict=False))
        assert points[-1].loss < points[1].loss and points[-1].accuracy > 90


def test_network_that_is_trained_on_is_left_as_it_was(predictor, digits):
    images, labels = digits
    network = predictor.predict(images, labels)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    finetune(network, images, labels, epochs=1)
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_same_seed_gives_the_same_weights(predictor, digits):
    images, labels = digits
    network = predictor.predict(images[:80], labels[:80])
    first, second = (finetune(network, images[:80], labels[:80], epochs=1).network.state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "epochs: must be an integer of at least 1, got 0"),
        ({"held_out": 1.0}, "held_out: must lie between 0 and 1"),
        ({"learning_rate": 0.0}, "learning_rate: must be positive"),
        ({"labels": ["cat", "dog"] * 40}, "labels: the network does not know 'cat'; it knows 0, 1, 2, 3"),
        ({"labels": [0] * 79 + [1]}, r"labels: class 1 has 1 image\(s\), too few"),
    ],
)
def test_unfit_input_is_refused(change, message, predictor, digits):
    images, labels = digits
    network = predictor.predict(images[:80], labels[:80])
    with pytest.raises(UserError, match=message):
        finetune(network, images[:80], **{"labels": labels[:80], **change})
