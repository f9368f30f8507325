"""Accuracy on twins, its interval, the sketches of the controls, and the parts of a prediction's time."""

import copy
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from torch.testing import assert_close

from pudnet.card import Card
from pudnet.evaluation import (
    group_sketches,
    mean_half_width,
    mean_interval,
    shuffled,
    stratified_interval,
    time_prediction,
    twin_accuracies,
    wilson_interval,
)
from pudnet.predictor import Predictor

pytestmark = pytest.mark.numeric


@pytest.fixture(scope="module")
def predictor(digits):
    """Random, but with the statistics of the store, as a trained one has them."""
    untrained = Predictor.untrained("convnet3", channels=1, image_size=8)
    card = replace(untrained.card, mean=digits.store.mean, std=digits.store.std)
    return Predictor(untrained.model, card, untrained.target)


@pytest.mark.parametrize(
    ("values", "t"), [([90.0, 92.0, 97.0], 4.302653), ([50.0, 60.0, 70.0, 80.0, 65.0, 62.0], 2.570582)]
)
def test_interval_is_students(values, t):
    mean = sum(values) / len(values)
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
    assert mean_interval(values) == pytest.approx((mean, t * deviation / math.sqrt(len(values))))


def test_one_value_has_no_interval():
    mean, half = mean_interval([80.0])
    assert mean == 80 and math.isnan(half)


def test_strata_are_held_fixed():
    easy, hard = np.array([97.0, 98.0, 99.0, 98.0]), np.array([60.0, 70.0, 80.0])
    halves = [mean_interval(values)[1] for values in (easy, hard)]
    assert stratified_interval([easy, hard]) == pytest.approx((84.0, math.hypot(*halves) / 2))
    whole = [np.array([value]) for value in (50.0, 54.0, 58.0)]  # a set a split: nothing to tell but over splits
    assert stratified_interval(whole) == pytest.approx(mean_interval([50.0, 54.0, 58.0]))
    assert stratified_interval([easy, hard - 50])[1] == pytest.approx(stratified_interval([easy, hard])[1])


def test_shuffled_sketch_is_the_next_groups_of_other_classes():
    sketches = [torch.tensor(i) for i in range(4)]
    found = shuffled(sketches, [(1, 2), (2, 1), (3, 1), (1, 2)])
    assert [sketch.item() for sketch in found] == [2, 2, 3, 2]
    assert [sketch.item() for sketch in shuffled(sketches[:2], [(1, 2), (2, 1)])] == [1, 0]


def test_accuracy_is_what_a_user_finds_on_the_twin(digits, predictor):
    progress = []
    found = twin_accuracies(predictor, digits.images, digits.test, bf16=False, progress=progress.append)
    expected = []
    for group, twin in digits.test:
        network = predictor.predict(digits.store.images[group], digits.store.labels[group])
        predicted = np.array(network.classes)[network(digits.store.images[twin]).argmax(1).numpy()]
        expected.append(100 * np.mean(predicted == digits.store.labels[twin]))
    assert found == pytest.approx(np.array(expected)) and progress == [*range(1, 13)]
    mean, half = mean_interval(found)
    assert mean - half > 55  # random convolutions are enough to be above chance


def test_labels_at_random_give_chance(digits, predictor):
    rng, accuracies = np.random.default_rng(0), []
    for pair in digits.test:
        images = copy.copy(digits.images)
        images.labels = digits.images.labels.copy()
        images.labels[pair[0]] = rng.permutation(images.labels[pair[0]])
        accuracies.extend(twin_accuracies(predictor, images, pair[None], bf16=False))
    mean, half = mean_interval(accuracies)
    assert abs(mean - 50) < half


def test_given_sketches_take_the_place_of_the_groups_own(digits, predictor):
    own = group_sketches(predictor, digits.images, digits.test[:, 0], bf16=False)
    assert_close(own[3], predictor.model.sketch(digits.images(digits.test[3, 0])).detach())
    expected = twin_accuracies(predictor, digits.images, digits.test, bf16=False)
    assert (twin_accuracies(predictor, digits.images, digits.test, bf16=False, sketches=own) == expected).all()
    other = shuffled(own, [tuple(digits.store.labels[group]) for group in digits.test[:, 0]])
    assert (twin_accuracies(predictor, digits.images, digits.test, bf16=False, sketches=other) != expected).any()


def test_one_sketch_for_all_groups_is_the_constant_control(digits, predictor):
    constant = torch.randn(2, 128, generator=torch.Generator().manual_seed(0))
    card = replace(predictor.card, model={**predictor.card.model, "sketch": "constant"})
    control = Predictor.from_card(card)
    shared = {name: t for name, t in predictor.model.state_dict().items() if not name.startswith("extractor")}
    control.model.load_state_dict({**shared, "constant": constant})
    expected = twin_accuracies(control, digits.images, digits.test, bf16=False)
    found = twin_accuracies(predictor, digits.images, digits.test, bf16=False, sketches=[constant] * 12)
    assert (found == expected).all()


@pytest.mark.parametrize("kind", ["pudnet", "static_trunk"])
def test_bf16_changes_accuracy_little(kind, digits, predictor):
    card = Card(**{**asdict(predictor.card), "kind": kind})
    measured = Predictor.from_card(card)
    full, half = (twin_accuracies(measured, digits.images, digits.test, bf16) for bf16 in (False, True))
    assert abs(full.mean() - half.mean()) < 2 and np.abs(full - half).max() < 10


def test_cosines_are_fp32_whatever_the_features_are(digits, predictor):
    group, twin = (digits.images(indices) for indices in digits.test[0])
    labels = torch.arange(2).repeat_interleave(20)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        network = predictor.adapt(group, labels, (0, 1))
        found, features = network.logits(twin), network.body(twin).float()
        support = network.body(group.view(2, 20, 1, 8, 8)[:, :10].flatten(0, 1)).float()
    assert_close(network.classifier.centroids, support.view(2, 10, -1).mean(1))
    cosines = torch.stack([torch.cosine_similarity(features, centroid) for centroid in network.classifier.centroids], 1)
    assert_close(found, 10 * cosines)


@pytest.mark.parametrize("warm_up", [1, 2])
def test_time_of_a_prediction_is_that_of_its_parts(warm_up, digits, predictor):
    timing = time_prediction(predictor, digits.images, digits.test[:1, 0], bf16=False, warm_up=warm_up)
    parts = [timing.sketch_ms, timing.generation_ms, timing.calibration_ms]
    assert all(math.isfinite(part) and part > 0 for part in [*parts, timing.epoch_ms])
    assert timing.total_ms == pytest.approx(sum(parts))  # one group: medians add up
    assert timing.epoch_ratio == pytest.approx(timing.epoch_ms / timing.total_ms)
    assert (timing.images, timing.device) == (40, "cpu")


def test_an_accuracy_over_images_has_wilsons_interval():
    known = binomtest(180, 200).proportion_ci(method="wilson")
    assert wilson_interval(90.0, 200) == pytest.approx((100 * known.low, 100 * known.high), abs=1e-4)
    assert wilson_interval(100.0, 24) == pytest.approx((86.2, 100.0), abs=0.01)
    assert str(wilson_interval(0.0, 24)[0]) == "0.0"
    assert mean_half_width([(90.0, 200)]) == pytest.approx(50 * (known.high - known.low), abs=1e-4)
    assert mean_half_width([(90.0, 200)] * 4) == pytest.approx(mean_half_width([(90.0, 200)]) / 2)
    assert mean_half_width([(100.0, 200)]) > 0.9
