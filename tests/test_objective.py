"""The meta-objective against plain numpy: centroids, Eq. 6 to 10, and what switches its parts off."""

import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from pudnet.classifier import centroids, metric_logits
from pudnet.config import TrainConfig
from pudnet.objective import Objective, consistency

pytestmark = pytest.mark.numeric

K, COLUMNS, N, SUPPORT, D = 6, [4, 0, 2], 7, 4, 5  # head's width; a group of 3 classes x 7 images


def make_objective(**changes):
    torch.manual_seed(0)
    return Objective(TrainConfig(support_per_class=SUPPORT, **changes), D, K)


def features(seed=0):
    """Three overlapping classes, so that neither loss nor accuracy is at its end."""
    generator = torch.Generator().manual_seed(seed)
    middles = torch.randn(len(COLUMNS), 1, D, generator=generator)
    return (middles + torch.randn(len(COLUMNS), N, D, generator=generator)).flatten(0, 1)


def softmax(logits):
    powers = [math.exp(x) for x in logits]
    return [p / sum(powers) for p in powers]


def cosine(u, v):
    return sum(u * v) / math.sqrt(sum(u * u) * sum(v * v))


def divergence(full, metric, columns):
    """KL(q || p) of one image, p's logits padded with zeros."""
    padded = [0.0] * len(full)
    for column, logit in zip(columns, metric, strict=True):
        padded[column] = logit
    return sum(q * math.log(q / p) for q, p in zip(softmax(full), softmax(padded), strict=True))


def test_centroids_are_the_means_of_the_classes():
    values, labels = features(), torch.tensor([2, 0, 1, 1, 0, 1, 1] * 3)
    found = centroids(values, labels, 3)
    for label in range(3):
        rows = [v for v, y in zip(values.numpy(), labels.tolist(), strict=True) if y == label]
        assert_close(found[label], torch.tensor(sum(rows) / len(rows)))


@pytest.mark.parametrize("temperature", [10.0, torch.tensor(10.0)])
def test_metric_logits_are_tau_times_the_cosine(temperature):
    found = metric_logits(
        torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, -2.0]]), torch.tensor([[2.0, 0.0], [0.0, 3.0]]), temperature
    )
    half = 10 * math.sqrt(0.5)
    assert_close(found, torch.tensor([[10.0, 0.0], [half, half], [0.0, -10.0]]))


def test_consistency_is_kl_of_the_full_head_to_the_padded_metric_logits():
    generator = np.random.default_rng(0)
    full, metric = 3 * generator.normal(size=(8, K)), 10 * generator.uniform(-1, 1, size=(8, 3))
    expected = sum(divergence(q, p, COLUMNS) for q, p in zip(full, metric, strict=True)) / 8
    found = consistency(torch.tensor(full), torch.tensor(metric), torch.tensor(COLUMNS))
    assert found.item() == pytest.approx(expected)
    sure = consistency(1e4 * torch.tensor(full), torch.tensor(metric), torch.tensor(COLUMNS))
    assert sure.isfinite()


@pytest.mark.parametrize("tau", [1.0, 10.0])
def test_losses_are_equations_7_to_10_on_support_and_queries(tau):
    objective = make_objective(temperature=tau, full_weight=0.5, kl_weight=2.0)
    blocks = features().double().numpy().reshape(len(COLUMNS), N, D)
    weight, bias = (p.detach().double().numpy() for p in (objective.head.weight, objective.head.bias))
    middles = [block[:SUPPORT].mean(0) for block in blocks]
    metric, full, kl, right = [], [], [], []
    for label, block in enumerate(blocks):
        for position, feature in enumerate(block):
            q = weight @ feature + bias
            full.append(-math.log(softmax(q)[COLUMNS[label]]))  # of all images
            if position >= SUPPORT:  # of the queries alone
                p = [tau * cosine(feature, middle) for middle in middles]
                metric.append(-math.log(softmax(p)[label]))
                kl.append(divergence(q, p, COLUMNS))
                right.append(int(np.argmax(p)) == label)
    found = objective(features(), torch.tensor(COLUMNS))
    assert len(full) == 21 and len(metric) == 9
    assert found.metric.item() == pytest.approx(np.mean(metric), rel=1e-4)
    assert found.full.item() == pytest.approx(np.mean(full), rel=1e-4)
    assert found.kl.item() == pytest.approx(np.mean(kl), rel=1e-4)
    assert found.total.item() == pytest.approx(np.mean(metric) + 0.5 * np.mean(full) + 2 * np.mean(kl), rel=1e-4)
    assert found.accuracy.item() == pytest.approx(np.mean(right)) and 0 < np.mean(right) < 1


@pytest.mark.parametrize(("full_weight", "kl_weight"), [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0)])
def test_a_weight_of_zero_switches_its_loss_off(full_weight, kl_weight):
    objective = make_objective(full_weight=full_weight, kl_weight=kl_weight)
    losses = objective(features().requires_grad_(), torch.tensor(COLUMNS))
    losses.total.backward()
    assert_close(losses.total.detach(), losses.metric + full_weight * losses.full + kl_weight * losses.kl)
    head = objective.head.weight.grad
    if full_weight == kl_weight == 0:
        assert head is None and losses.full == losses.kl == 0
    else:
        assert head.abs().max() > 0 and losses.full > 0 and losses.kl > 0


def test_temperature_learns_only_when_told_to():
    learning, fixed = make_objective(learn_temperature=True), make_objective()
    learning(features(), torch.tensor(COLUMNS)).total.backward()
    assert learning.temperature.grad.abs() > 0
    assert "temperature" in learning.state_dict() and "temperature" not in fixed.state_dict()


@pytest.mark.parametrize("teaches", ["full", "metric", "both"])
def test_the_consistency_loss_reaches_the_classifier_that_it_teaches(teaches):
    objective = make_objective(full_weight=0.0, kl_weight=1.0, learn_temperature=True, kl_teaches=teaches)
    objective(features(), torch.tensor(COLUMNS)).total.backward()
    alone = make_objective(full_weight=0.0, kl_weight=0.0, learn_temperature=True)
    alone(features(), torch.tensor(COLUMNS)).total.backward()
    gradient = objective.head.weight.grad
    assert (gradient is not None and bool(gradient.abs().sum() > 0)) == (teaches != "metric")
    assert torch.isclose(objective.temperature.grad, alone.temperature.grad) == (teaches == "full")
