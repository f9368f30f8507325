"""What the pages say was measured is what the committed results say."""

import runpy
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from pipeline.groups import groups
from pipeline.params import load_params
from pipeline.prepare import prepare
from pudnet import Predictor
from pudnet.targets import build_target
from reference import ingredients, long_training, recipes, shipped
from tests.smallest import shrink

ROOT = Path(__file__).parent.parent


def test_the_tables_of_the_pages_are_those_of_the_results():
    made = runpy.run_path(str(ROOT / "reference" / "readme.py"))
    for page in made["PAGES"]:
        assert made["written"](page) == (ROOT / page).read_text(), page


def test_the_page_of_measured_runs_is_that_of_their_files():
    page = runpy.run_path(str(ROOT / "reference" / "table.py"))["page"]()
    assert (ROOT / "reference" / "README.md").read_text() == page


@pytest.mark.parametrize("name", ingredients.TRIED)
def test_the_plain_network_of_each_ingredient_has_the_features_that_were_trained(name):
    torch.manual_seed(0)
    target, labels = build_target("convnet3", 3, 16), torch.arange(3).repeat_interleave(4)
    model = ingredients.Adapted(target, ingredients.TRIED[name])
    for parameter in model.parameters():  # what starts as no change is a change
        parameter.data += 0.1 * torch.randn_like(parameter)
    images = torch.randn(12, 3, 16, 16)
    with torch.no_grad():
        trained, _ = model.features(images, torch.arange(12), labels, 3)
    network, features = ingredients.made_for(model, target, images, labels, 3)
    torch.testing.assert_close(features, trained, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(network(images).flatten(1), trained, rtol=1e-4, atol=1e-4)


def test_what_is_measured_of_a_shipped_model_has_no_image_twice_and_what_was_not_trained_on():
    predictor = Predictor.load("cifar100-convnet3")
    drawn = list(shipped.groups(shipped.Kind("sklearn:digits", 3, 6, 4, groups=2), predictor))
    assert [(len(group.images), len(group.others)) for group in drawn] == [(18, 12)] * 2
    for group in drawn:
        assert torch.cat([group.images, group.others]).flatten(1).unique(dim=0).shape[0] == 30
        assert group.labels.bincount().tolist() == [6] * 3 and group.truth.bincount().tolist() == [4] * 3
    names = ("whale", predictor.card.provenance["train_classes"][0], "worlds")
    assert shipped.not_trained_on("torchvision:CIFAR100", names, predictor.card) == [0, 2]
    assert shipped.not_trained_on("torchvision:FashionMNIST", names, predictor.card) == [0, 1, 2]
    models = shipped.Models.load("cifar100-convnet3")
    made = shipped.classifiers(models, drawn[0])
    kernels = [made[name].body.block3.conv.weight for name in list(made)[2:4]]
    assert not torch.equal(*kernels) and torch.equal(kernels[1], predictor.model.base_weights()["block3.conv.weight"])
    assert models.alone.all_blocks is None and predictor.all_blocks is not None
    trunk = models.other.model.base_weights()["block3.conv.weight"]
    for name in list(made)[5:]:  # heads on the pretrained trunk
        assert torch.equal(made[name].body.block3.conv.weight, trunk)
        assert shipped.percent_right(made[name], drawn[0]) > 60  # by chance: 33


def test_long_training_stands_beside_the_predictions_on_the_same_groups(monkeypatch):
    kind = shipped.Kind("sklearn:digits", 3, 10, 40, groups=2)
    for name, value in (("KIND", kind), ("AUGMENT", "shift"), ("EPOCHS", (1, 8)), ("MORE_EPOCHS", 1)):
        monkeypatch.setattr(long_training, name, value)
    first, second = (long_training.part(worker) for worker in (0, 1))
    assert (len(first), len(second)) == (1, 1) and first != second
    predicted, _, _, short, long = pd.DataFrame(first + second).to_numpy().T
    assert (predicted > 80).all() and (long > short).all()  # by chance: 33
    page = long_training.page(first + second)
    lines = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("|")]
    assert [line[0] for line in lines[2:]] == list(first[0])
    assert lines[2][1].startswith(f"{predicted.mean():.2f} ± ") and "(" not in lines[2][1]
    assert f"({(long - predicted).mean():+.2f} ± " in lines[-1][1]


def test_each_method_is_trained_with_each_recipe_and_measured_on_validation_groups(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    shrink(tmp_path / "params.yaml")
    params = load_params()
    prepare(params)
    groups(params)
    measured = {
        (row, recipe, images): own
        for method, recipe, changes in recipes.QUESTIONS["rates"].trainings()
        for (row, images), own in recipes.measured(params, method, changes, (90,)).items()
    }
    assert len(measured) == 16
    assert all(own.shape == (4,) and own.mean() > 60 for own in measured.values())  # by chance: 50
    assert recipes.spec_of(params, "r2d2", {}).table == "search_train"  # without the validation classes
    assert (measured["R2-D2", "rate 0.0015", 90] != measured["R2-D2", "rate 0.012", 90]).any()
    ridge, logistic = (
        [measured[f"Pretrained, {head}", recipe, 90] for recipe in recipes.QUESTIONS["rates"].recipes]
        for head in ("ridge", "logistic regression")
    )
    assert not np.array_equal(ridge, logistic)
    lines = recipes.page("rates", measured, "digits", 10).splitlines()
    assert lines[-4].startswith("| PudNet+ | ") and lines[-4].count("(") == 3 and "on 10 groups" in " ".join(lines)


def test_rows_of_several_numbers_of_images_are_compared_with_pudnet_plus_from_as_many():
    counts = recipes.QUESTIONS["pretraining"].images
    accuracies = {
        (row, recipe, images): images / 10 + np.array([0.0, 2.0]) + (recipe != "usual") + 3 * (method == "r2d2")
        for method, recipe, _ in recipes.QUESTIONS["pretraining"].trainings()
        for row in recipes.METHODS[method]
        for images in counts
    }
    lines = recipes.page("pretraining", accuracies, "cifar100", 10).splitlines()
    table = [line.strip("| ").split(" | ") for line in lines if line.startswith("|")]
    assert table[0][-3:] == ["90 images", "250 images", "500 images"]
    assert table[2][0] == "PudNet+, usual" and table[2][1].startswith("10.00 ± ") and "(" not in table[2][1]
    assert table[-1][0].startswith("R2-D2, ") and all("(+4.00 ± 0.00)" in cell for cell in table[-1][1:])


def test_a_scale_is_tried_for_the_methods_that_have_one():
    trainings = [*recipes.QUESTIONS["schedules"].trainings()]
    scaled = [(method, changes) for method, recipe, changes in trainings if recipe == "scale 10"]
    assert scaled == [
        ("pudnet", {"learning_rate": 0.003, "ridge_scale": 10.0}),
        ("r2d2", {"learning_rate": 0.003, "scale": 10.0}),
    ]
    accuracies = {
        (row, recipe, 90): np.array([80.0, 90.0]) for method, recipe, _ in trainings for row in recipes.METHODS[method]
    }
    lines = recipes.page("schedules", accuracies, "domains", 10).splitlines()
    assert "|  |  | +0.00" in lines[-1] and lines[-4].count("85.00") == 6
