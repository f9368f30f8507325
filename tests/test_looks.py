"""Looks of images by closed forms, and sets and looks in groups, from the sources to normalised images."""

import json
import shutil

import numpy as np
import pytest
import torch
import yaml

from pipeline.groups import groups as make_groups
from pipeline.params import resolve
from pipeline.prepare import prepare
from pipeline.project import STORE, group_folder
from pipeline.runs.trial import make_spec, open_trial
from pipeline.tracking.datasets import dataset
from pudnet.data.groups import build_groups, open_groups, split_sets
from pudnet.data.images import StoreImages
from pudnet.data.looks import CONTRAST, DARKER, LOOKS, NOISE, with_looks
from pudnet.data.sources import open_sources
from pudnet.data.store import open_store
from pudnet.errors import UserError
from pudnet.settings import SETTINGS
from tests.test_params import ROOT


@pytest.fixture
def images():
    return torch.rand(6, 3, 32, 32, generator=torch.manual_seed(0))


def twice(name, images):
    return LOOKS[name](LOOKS[name](images))


def test_looks_are_their_closed_forms(images):
    assert LOOKS["plain"](images) is images
    for name in ("inverted", "exchanged", "turned_180"):
        assert torch.allclose(twice(name, images), images) and not torch.allclose(LOOKS[name](images), images)
    assert torch.equal(twice("turned_90", images), LOOKS["turned_180"](images))
    assert torch.equal(LOOKS["turned_270"](LOOKS["turned_90"](images)), images)
    assert torch.allclose(LOOKS["grey"](images)[:, 2], images.mean(1))
    assert torch.allclose(LOOKS["blurred"](images)[:, :, 2, 2], images[:, :, :5, :5].mean((2, 3)), atol=1e-6)
    assert torch.allclose(LOOKS["low_contrast"](images), 0.5 + CONTRAST * (images - 0.5))
    assert torch.allclose(LOOKS["dark"](images), images**DARKER)
    assert torch.allclose(LOOKS["small"](images)[:, :, 8:24, 8:24].mean((2, 3)), images.mean((2, 3)), atol=1e-6)
    assert torch.allclose(LOOKS["coarse"](images)[:, :, 3, 0], images[:, :, :4, :4].mean((2, 3)), atol=1e-6)
    assert torch.equal(LOOKS["barred"](images)[..., :6], images[..., :6])
    assert LOOKS["solarized"](torch.tensor([0.0, 0.25, 0.5, 1.0])).tolist() == [0.0, 0.5, 1.0, 0.0]


@pytest.mark.parametrize("level", [0.0, 0.3, 1.0])
def test_a_flat_image_has_no_edges_and_blurs_to_itself(level):
    flat = torch.full((2, 3, 16, 16), level)
    assert torch.allclose(LOOKS["blurred"](flat), flat) and torch.allclose(LOOKS["coarse"](flat), flat)
    assert not LOOKS["edges"](flat).any() and (LOOKS["embossed"](flat) == 0.5).all()


def test_a_colour_is_behind_what_is_dark():
    black, white = torch.zeros(1, 3, 8, 8), torch.ones(1, 3, 8, 8)
    assert LOOKS["on_red"](black)[0, :, 0, 0].tolist() == pytest.approx([0.8, 0.2, 0.1])
    assert torch.equal(LOOKS["on_red"](white), white)


def test_noise_is_an_images_own_whatever_the_batch(images):
    noise = LOOKS["noisy"](images) - images
    assert noise.std().item() == pytest.approx(NOISE, rel=0.05) and abs(noise.mean().item()) < 0.01
    assert not torch.allclose(noise[0], noise[1])
    assert torch.equal(LOOKS["noisy"](images.flip(0)).flip(0), LOOKS["noisy"](images))


@pytest.mark.parametrize("name", LOOKS)
@pytest.mark.parametrize("shape", [(8, 8, 1), (30, 30, 3)])
def test_a_look_keeps_form_and_range_and_leaves_what_it_is_given(name, shape):
    images = torch.randint(0, 256, (2, 3, *shape), dtype=torch.uint8, generator=torch.manual_seed(0))
    before, number = images.clone(), list(LOOKS).index(name)
    looks = torch.tensor([[0, number, number], [number, 0, 0]])
    changed = with_looks(images, looks)
    assert changed.shape == images.shape and changed.dtype == torch.uint8
    assert torch.equal(images, before) and torch.equal(changed[looks == 0], images[looks == 0])
    floats = LOOKS[name](images[looks == number].movedim(-1, 1) / 255).clamp(0, 1).movedim(1, -1)
    assert torch.allclose(changed[looks == number] / 255, floats, atol=0.51 / 255)


# From two sources to groups


TRAIN_LOOKS, TEST_LOOKS = ["plain", "inverted"], ["turned_180", "edges"]


@pytest.fixture
def params(tmp_path, monkeypatch):
    """The digits beside a set of 8 classes, each of one colour; few groups, of two looks."""
    monkeypatch.chdir(tmp_path)
    colours = np.arange(8)[:, None] * np.array([30, 20, 10])
    images = np.broadcast_to(np.repeat(colours, 50, 0)[:, None, None], (400, 8, 8, 3)).astype(np.uint8)
    np.savez("colours.npz", images=images, labels=np.repeat(np.arange(8), 50))
    raw = yaml.safe_load((ROOT / "params.yaml").read_text())
    raw["prepare"] |= {"source": ["sklearn:digits", "npz:colours.npz"], "channels": 3}
    raw["groups"] |= {"train_classes": [6, 5], "images_per_group": 40, "looks": TRAIN_LOOKS, "test_looks": TEST_LOOKS}
    raw["groups"] |= {"train_groups": 40, "search_groups": 40, "validation_groups": 40, "test_groups": 40}
    return resolve(raw)


def test_a_group_is_of_one_set_and_has_one_look_as_its_twin_does(params):
    prepare(params)
    make_groups(params)
    store = open_store(STORE, verify=True)
    assert store.class_names[9:11] == ("digits 9", "colours 0") and store.images.shape == (1797 + 400, 8, 8, 3)
    assert dict(store.sets) == {"digits": 10, "colours": 8} and (store.images[-1, 0, 0] == [210, 140, 70]).all()
    split, tables = open_groups(group_folder(0))
    for role, seen in (("train", TRAIN_LOOKS), ("validation", TRAIN_LOOKS), ("test", TEST_LOOKS)):
        looks, rows = np.divmod(tables[role].reshape(40, -1), len(store.labels))
        of_group = {tuple(np.unique(one)) for one in looks}
        assert of_group == {(list(LOOKS).index(name),) for name in seen}
        is_colour = store.labels[rows] >= 10
        assert (is_colour == is_colour[:, :1]).all() and 0 < is_colour[:, 0].sum() < 40
        assert set(store.labels[rows].ravel()) <= set(getattr(split, f"{role}_classes"))
        assert all(len(set(one)) == rows.shape[1] for one in rows)
    parts = (split.search_classes, split.validation_classes, split.test_classes)
    assert [[sum(c in own for c in part) for own in store.set_classes.values()] for part in parts] == [
        [4, 3],
        [2, 2],
        [4, 3],
    ]
    assert sorted(sum(parts, ())) == list(range(18))


def test_images_come_with_their_looks_and_labels_without(params):
    prepare(params)
    store = open_store(STORE, verify=False)
    images, rows = StoreImages(store, torch.device("cpu")), np.array([5, 1797, 2196])
    inverted = rows + list(LOOKS).index("inverted") * len(store.labels)
    assert torch.equal(images.raw(rows), torch.from_numpy(store.images[rows]))
    assert torch.equal(images.raw(inverted), 255 - images.raw(rows))
    assert torch.equal(images.raw(np.stack([rows, inverted])), torch.stack([images.raw(rows), images.raw(inverted)]))
    assert images.block_classes(inverted).tolist() == images.block_classes(rows).tolist() == [5, 10, 17]


def test_other_looks_and_sets_leave_the_rest_as_it_is(params):
    prepare(params)
    store, sizes = open_store(STORE, verify=False), params.sizes
    split = split_sets(store, [6, 5], 2, 0)
    one, other = (build_groups(split, sizes, store, None, ("plain",), looks) for looks in (None, TEST_LOOKS))
    assert all((one[role] == other[role]).all() for role in ("search_train", "validation", "train"))
    assert (one["test"] == other["test"] % len(store.labels)).all()  # the same images, seen otherwise
    fewer = split_sets(store, [6, 6], 2, 0)
    assert fewer.train_classes[:6] == split.train_classes[:6] and fewer.test_classes[:4] == split.test_classes[:4]


@pytest.mark.parametrize("method", ["pudnet", "pretrained"])  # which mixes images, and so looks, across groups
def test_methods_train_and_are_measured_on_groups_with_looks(params, method):
    prepare(params)
    make_groups(params)
    spec = make_spec(params, method, method, 0, {}, "train", 2)
    *_, report = open_trial(spec, torch.device("cpu")).run()
    assert np.isfinite(report["loss"]) and report["validation_accuracy"] > 0
    logged = dataset(STORE.resolve(), group_folder(0).resolve(), "test").dataset
    assert logged.name == "digits+colours-split0-test"
    assert json.loads(logged.profile)["classes_per_group"] == 2


def test_a_set_with_too_few_classes_is_named(params):
    prepare(params)
    store = open_store(STORE, verify=False)
    with pytest.raises(UserError, match="^colours: a group has 3 classes, but 2 are left for test"):
        split_sets(store, [6, 6], 3, 0)
    with pytest.raises(UserError, match="^colours: train_classes is 9, but the training set has 8"):
        split_sets(store, [6, 9], 2, 0)


def test_two_sets_of_one_name_are_refused(params, tmp_path):
    (tmp_path / "other").mkdir()
    shutil.copy("colours.npz", "other")
    with pytest.raises(UserError, match="two have the same name, colours, colours; rename"):
        open_sources(["npz:colours.npz", "npz:other/colours.npz"], tmp_path, 8, 3)


def test_the_setting_domains_leaves_looks_to_test_on():
    setting = SETTINGS["domains"]
    unseen = set(LOOKS) - set(setting.looks)
    assert set(setting.looks) < set(LOOKS) and len(unseen) >= 6
