"""What the registry says of a model; that it serves is in test_pipeline.py."""

from dataclasses import asdict
from decimal import Decimal

import mlflow
import pandas as pd
import pytest

from pipeline.reporting.model_card import losses
from pipeline.tracking.registry import example_group, hypernetwork, point_aliases
from pipeline.tracking.serving import PudNetModel
from pudnet import Predictor
from pudnet.card import Card
from pudnet.config import ModelConfig, TrainConfig, apply_variant


@pytest.mark.parametrize(
    ("variant", "said"),
    [
        ("pudnet", "extractor 1conv-1linear, eta 0.2, GRU depth 2"),
        ("pudnet_plus", "class filters, a classifier by ridge regression"),
        ("pretrained_ridge", "one network for all groups, a classifier by ridge regression"),
    ],
)
def test_what_makes_the_weights_is_said_whatever_was_searched(variant, said):
    model, _ = apply_variant(variant, ModelConfig(), TrainConfig())
    assert hypernetwork(Card("pudnet", "convnet3", 1, 8, (0.5,), (0.5,), 10.0, 10, asdict(model))) == said


def test_best_is_chosen_on_the_validation_groups_of_the_newest_version(tmp_path):
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    client.create_registered_model("model")
    pointed = []
    for accuracy, groups in [(90, "a"), (80, "a"), (90, "a"), (9, "a"), (70, "b")]:
        tags = {"validation_accuracy": str(accuracy), "validation_groups": groups}
        client.create_model_version("model", tmp_path.as_uri(), tags=tags)
        point_aliases(client, "model")
        found = client.get_registered_model("model").aliases
        pointed.append((int(found["newest"]), int(found["best"])))
    assert pointed == [(1, 1), (2, 1), (3, 3), (4, 3), (5, 5)]


@pytest.fixture(scope="module")
def served():
    model = PudNetModel()
    model.predictor = Predictor.untrained("convnet3", 3, 16)
    return model


def request(served, labels):
    """A request of as many images as labels."""
    images = list(example_group(served.predictor.card).image) * 2
    return served.predict(None, pd.DataFrame({"image": images[: len(labels)], "label": labels}))


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (["a", "b", "a", "b", None, float("nan")], {"a", "b"}),
        (["a", "", "a", "", None, pd.NA], {"a", ""}),  # the empty string is a label, as in Predictor.predict
        ([1, 2, 1, 2, None, None], {1, 2}),
        ([True, False, True, False, None, None], {True, False}),
        ([0.5, 1.5, 0.5, 1.5, None, None], {0.5, 1.5}),
        (pd.Series([1, 2, 1, 2, None, None], dtype="Int64"), {1, 2}),
        (pd.Series(["a", "b", "a", "b", None, None], dtype="category"), {"a", "b"}),
        ([Decimal("1"), Decimal("2"), Decimal("1"), Decimal("2"), None, None], {"1", "2"}),  # as in Predictor.predict
    ],
)
def test_a_query_is_a_row_without_a_label_and_nothing_else(labels, classes, served):
    found = request(served, labels).label.tolist()
    assert len(found) == 2 and set(found) <= classes
    assert {type(label) for label in found} <= {type(label) for label in classes}


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["a", "a", "a", "b", "b", 7, None, None], "row 5: the label 7 is a number, those before it are strings"),
        (["a", "b", False, None], "row 2: the label False is a truth value, those before it are strings"),
        (["a", ["b"], None], "row 1: the label is a list; it has to be a string or a number"),
        ([2**53 + 1, 2**53, 1, None], "row 0: the label 9007199254740992 is too large to be exact"),
        (["a", "b"], "rows: 2 with a label and 0 without"),
    ],
)
def test_labels_that_are_not_of_one_kind_are_refused_by_their_row(labels, message, served):
    with pytest.raises(mlflow.MlflowException, match=message):
        request(served, labels)


@pytest.mark.parametrize(
    ("train", "said"),
    [
        (TrainConfig(full_weight=0.0, kl_weight=0.0), "the paper's loss L1 alone"),
        (
            TrainConfig(kl_weight=0.5, pretraining_share=0.8),
            "the paper's loss L1 + 1 L2 + 0.5 L3; on the images of the first 80% of them",
        ),
        (
            TrainConfig(pretraining_share=1.0),
            "their images are mixed, and it learned to tell all training classes apart",
        ),
    ],
)
def test_a_card_tells_what_a_model_was_trained_with(train, said):
    assert losses(train).startswith(said)
