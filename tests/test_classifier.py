"""The classifier that is solved for: leaving images out in closed form, and the choice of its penalty."""

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from pudnet.baselines import Adapter, make_method
from pudnet.baselines.finetuned import FineTunedPrediction
from pudnet.card import Card
from pudnet.classifier import CentroidClassifier, LinearClassifier, Regression, ridge_layer
from pudnet.errors import UserError
from pudnet.network import PredictedNetwork
from pudnet.predictor import Predictor
from pudnet.ridge import left_out, one_hot, ridge_weights
from pudnet.scratch import ScratchConfig
from pudnet.targets import ConvNet3, MultilevelConvNet3, build_target
from pudnet.targets.build import EARLIER_BLOCKS
from pudnet.targets.checks import OF_CLASSIFIERS
from tests.test_class_filters import labelled, noise, plus

LABELS = torch.arange(60) % 3


class Own(ConvNet3):
    """A network of one's own."""


def separable(spread: float, common: float = 0.0) -> torch.Tensor:
    """Features (60, 40) of three classes, along one direction each, with noise.

    `spread` is the noise of each value, `common` that of all values of an image together, which makes features large
    where they say nothing, so that a large penalty hurts.
    """
    return one_hot(LABELS, 3) @ torch.eye(3, 40) + spread * noise(60, 40) + common * noise(60, 1, seed=2)


@pytest.mark.parametrize("size", [9, 40])  # fewer values than rows, and more
def test_a_row_left_out_is_predicted_as_by_a_fit_to_the_others(size):
    x, y, ridge = noise(20, size).double(), noise(20, 2, seed=1).double(), 0.7
    found = left_out(x, y, ridge)
    centred = left_out(x - x.mean(0), y - y.mean(0), torch.tensor([[[ridge]], [[2.0]]]), 1 / 20)[0] + y.mean(0)
    for i in range(20):
        others = torch.arange(20) != i
        assert_close(found[i], x[i] @ ridge_weights(x[others], y[others], ridge).T)
        mean, level = x[others].mean(0), y[others].mean(0)
        weights = ridge_weights(x[others] - mean, y[others] - level, ridge)
        assert_close(centred[i], (x[i] - mean) @ weights.T + level)


def test_the_names_that_a_target_may_not_use_are_those_of_the_classifiers_tensors():
    point = torch.ones(1, 2)
    both = CentroidClassifier(point, 1.0).state_dict() | LinearClassifier(point, torch.ones(1)).state_dict()
    assert set(both) == set(OF_CLASSIFIERS)


def penalty_for(features: torch.Tensor, labels: torch.Tensor = LABELS) -> float:
    """The penalty that is chosen for features (N, d) of three classes, where 2 was learned."""
    with torch.no_grad():
        chosen, penalty = Regression(2.0, 5.0, "leave_one_out").choose([features], labels, 3)
    assert chosen == 0
    return penalty.item()


def test_the_penalty_is_smaller_only_if_that_is_clearly_better():
    assert penalty_for(separable(1.0)) == pytest.approx(2.0)
    assert penalty_for(100 * separable(0.1, common=1.0)) == pytest.approx(0.25)  # how large features are is all one


def test_one_image_a_class_equal_images_and_nan_keep_the_learned_penalty():
    for features in (noise(3, 9), torch.ones(3, 9), torch.full((3, 9), torch.nan)):
        assert penalty_for(features, torch.arange(3)) == pytest.approx(2.0)


def test_training_takes_the_learned_penalty_and_a_prediction_the_chosen_one():
    regression, features = Regression(2.0, 5.0, "leave_one_out"), separable(0.1, common=1.0)
    weight, bias = ridge_layer(features, LABELS, 3, 2.0, 5.0)
    for training in (True, False):
        assert_close(regression.train(training)(features, features, LABELS, 3), features @ weight.T + bias)
    assert penalty_for(features) == pytest.approx(0.25)


def test_a_predicted_network_has_the_chosen_penalty():
    model, target, _ = plus(sketch_images=12, penalty="leave_one_out")
    card = Card("pudnet", "convnet3", 1, 8, (0.5,), (0.5,), 10.0, 2, vars(model.config))
    images, labels = labelled(n=6)
    network = Predictor(model, card, target).adapt(images, labels, (0, 1, 2))
    seen = torch.cat([torch.arange(4) + 6 * c for c in range(3)])
    with torch.no_grad():
        support, queries = (network.body(part).flatten(1) for part in (images[seen], images))
        _, penalty = model.regression.choose([support], labels[seen], 3)
        weight, bias = ridge_layer(support, labels[seen], 3, penalty, model.regression.log_scale.exp())
    assert network.card.ridge == pytest.approx(penalty.item())
    assert_close(network.logits(images), queries @ weight.T + bias, rtol=1e-3, atol=1e-3)


def test_a_penalty_is_chosen_for_no_other_classifier():
    with pytest.raises(UserError, match="model.penalty: leave_one_out needs classifier: ridge"):
        plus(classifier="centroids", penalty="leave_one_out")


@torch.no_grad()
def test_more_features_are_chosen_only_if_they_are_clearly_better():
    regression, useless, useful = Regression(2.0, 5.0, "leave_one_out"), noise(60, 40), separable(0.1)
    for candidates, expected in (([useful, useless], 0), ([useful, useful], 0), ([useless, useful], 1)):
        candidate, ridge = regression.choose(candidates, LABELS, 3)
        assert candidate == expected
        assert ridge.item() == pytest.approx(penalty_for(useful))
    candidate, ridge = Regression(2.0, 5.0).choose([useless, useful], LABELS, 3)
    assert (candidate, ridge.item()) == (1, pytest.approx(2.0))


@torch.no_grad()
def test_r2d2_may_choose_its_blocks_as_well():
    """It is then the regression on the features that were chosen; what the others are does not matter."""
    method, _ = make_method("r2d2", {"ridge": 2.0, "blocks": "leave_one_out"}, build_target("convnet3", 1, 8))
    last, earlier = method.features, 2 * method.features
    useful, useless = F.pad(separable(0.1), (0, last - 40)), noise(60, earlier)
    rule = method.eval().rule(torch.cat([useful, useless], 1), LABELS, 3)
    queries = torch.cat([separable(0.1), torch.zeros(60, last - 40), noise(60, earlier)], 1)
    assert_close(rule(queries), method.logits(queries[:, :last], useful, LABELS, 3))
    everything = torch.cat([noise(60, last), F.pad(separable(0.1), (0, earlier - 40))], 1)
    assert_close(method.rule(everything, LABELS, 3)(queries), method.logits(queries, everything, LABELS, 3))


def test_r2d2_sees_all_blocks_of_a_group_and_has_no_other_head_then():
    config = {"blocks": "leave_one_out"}
    card = Card("r2d2", "convnet3", 1, 8, (0.5,), (0.5,), 10.0, 4, config)
    method, target = make_method("r2d2", config, build_target("convnet3", 1, 8))
    images, labels = labelled(n=6)
    network = Adapter(method, card, target).adapt(images, labels, (0, 1, 2))
    assert isinstance(network.body, MultilevelConvNet3) and network.logits(images).shape == (18, 3)
    with pytest.raises(UserError, match="head: ridge replaces the classifier"):
        Adapter(method, card, target, "ridge")
    with pytest.raises(UserError, match="r2d2.blocks: leave_one_out needs target: convnet3"):
        make_method("r2d2", config, build_target("convnet3_multilevel", 1, 8))


def predicted(choice: int | None, monkeypatch) -> PredictedNetwork:
    """For one group; `choice` is what leaving images out is to choose, None: without the choice."""
    model, target, _ = plus(sketch_images=12, blocks="last" if choice is None else "leave_one_out")
    card = Card("pudnet", "convnet3", 1, 8, (0.5,), (0.5,), 10.0, 2, vars(model.config))

    def choose(self, candidates, labels, classes):
        assert [each.shape[1] // target.features for each in candidates] == [1, 3]  # the last block, and all three
        assert labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4 and classes == 3
        return choice, self.log_ridge.exp()

    with monkeypatch.context() as patched:
        if choice is not None:
            patched.setattr(Regression, "choose", choose)
        return Predictor(model, card, target).adapt(*labelled(n=6), (0, 1, 2))


def test_a_predicted_network_has_the_chosen_blocks(monkeypatch, tmp_path):
    """With the last alone it is that without the choice. With all, earlier features have the size they are to have."""
    images, _ = labelled(n=6)
    plain, last, wide = (predicted(choice, monkeypatch) for choice in (None, 0, 1))
    assert_close(last.target_state_dict(), plain.target_state_dict())
    assert_close(last.logits(images), plain.logits(images))
    assert (last.card.target, wide.card.target) == ("convnet3", "convnet3_multilevel")
    features, size = wide.body(images[:4]).flatten(1), plain.body(images).flatten(1).shape[1]
    assert_close(features[:, :size], plain.body(images[:4]).flatten(1))
    seen = torch.cat([images[6 * c : 6 * c + 4] for c in range(3)])  # the images that it was predicted from
    assert_close(wide.body(seen)[:, size:].square().mean().sqrt(), torch.tensor(EARLIER_BLOCKS), rtol=1e-2, atol=0)
    wide.save(tmp_path / "network.safetensors")
    assert_close(PredictedNetwork.load(tmp_path / "network.safetensors").logits(images), wide.logits(images))


def test_all_blocks_are_chosen_where_the_last_one_sees_nothing():
    model, target, _ = plus(sketch_images=12, penalty="leave_one_out", blocks="leave_one_out")
    with torch.no_grad():
        model.base[-1].zero_()
        model.filters.strength.zero_()
        model.base[0].copy_(model.base[0].abs())  # brighter classes stay brighter
    card = Card("pudnet", "convnet3", 1, 8, (0.5,), (0.5,), 10.0, 2, vars(model.config))
    images, labels = labelled(n=6)
    predictor, bright = Predictor(model, card, target), images + 3 * labels.view(-1, 1, 1, 1)
    assert predictor.adapt(bright, labels, (0, 1, 2)).card.target == "convnet3_multilevel"
    tuned = FineTunedPrediction(predictor, ScratchConfig(epochs=1), bf16=False).adapt(bright, labels, (0, 1, 2))
    assert isinstance(tuned.body, MultilevelConvNet3) and tuned.logits(bright).shape == (18, 3)


@pytest.mark.parametrize(
    ("target", "classifier"),
    [("convnet3", "centroids"), ("convnet3_multilevel", "ridge"), (ConvNet3(1, 32), "ridge"), (Own(1), "ridge")],
)
def test_blocks_are_chosen_for_no_other_network_or_classifier(target, classifier):
    with pytest.raises(UserError, match="model.blocks: leave_one_out needs target: convnet3"):
        plus(target, classifier=classifier, blocks="leave_one_out")
