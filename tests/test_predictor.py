"""The public surface: predict a network for labelled images, use it, save and load it, refuse what is unfit."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close
from torchvision.models import mnasnet0_5

from pudnet.card import FORMAT, METADATA, Card, read_tensors, write_tensors
from pudnet.config import ModelConfig, parse
from pudnet.data.rows import spread_rows
from pudnet.errors import UserError
from pudnet.network import PredictedNetwork
from pudnet.predictor import Predictor
from pudnet.targets import build_target
from tests.nets import Depthwise, Viewing

COLOURS = {"red": (200, 40, 40), "green": (40, 200, 40), "blue": (40, 40, 200)}


def coloured(names, seed=0):
    """Noisy images (N, 16, 16, 3), each of the colour that its label names."""
    rng = np.random.default_rng(seed)
    noise = rng.integers(-40, 40, (len(names), 16, 16, 3))
    return (noise + np.array([COLOURS[name] for name in names])[:, None, None]).astype(np.uint8)


LABELS = ["red", "green", "blue"] * 12
IMAGES, QUERIES = coloured(LABELS), coloured(LABELS, seed=1)


def make_predictor(kind="pudnet", seed=0):
    predictor = Predictor.untrained("convnet3", channels=3, image_size=16, seed=seed)
    if kind == "pudnet":
        return predictor
    card = replace(predictor.card, kind=kind, model=None)
    return Predictor.from_card(card)


@pytest.fixture(scope="module")
def predictor():
    return make_predictor()


@pytest.fixture(scope="module")
def network(predictor):
    return predictor.predict(IMAGES, LABELS)


class Word:
    """A label of a user's own type."""

    def __init__(self, text):
        self.text = text

    def __str__(self):
        return self.text


# Prediction


def test_untrained_predictor_comes_from_its_seed(predictor):
    again, other = make_predictor().model.state_dict(), make_predictor(seed=1).model.state_dict()
    for name, tensor in predictor.model.state_dict().items():
        assert torch.equal(tensor, again[name])
    assert not torch.equal(again["extractor.linear.weight"], other["extractor.linear.weight"])


def test_predicted_network_names_the_classes_of_unseen_images(network):
    logits = network(QUERIES)
    assert network.classes == ("blue", "green", "red") and logits.shape == (36, 3)
    assert [network.classes[column] for column in logits.argmax(1)] == LABELS
    assert network.features(QUERIES).shape == (36, 256) and not network.training
    assert logits.abs().max() <= 10 + 1e-4  # tau times a cosine


def test_weights_depend_on_the_images(predictor, network):
    other = predictor.predict(255 - IMAGES, LABELS).target_state_dict()
    for name, tensor in network.target_state_dict().items():
        assert not name.endswith("conv.weight") or not torch.allclose(tensor, other[name], rtol=1e-3)


def test_bytes_and_floats_are_the_same_images(predictor, network):
    floats = torch.tensor(IMAGES).permute(0, 3, 1, 2) / 255
    kept = floats.clone()
    again = predictor.predict(floats, LABELS)
    assert_close(again(QUERIES), network(QUERIES), rtol=0, atol=1e-5)
    assert_close(network(floats), network(IMAGES), rtol=0, atol=1e-5)
    assert torch.equal(floats, kept)


def test_grey_bytes_need_no_channel_axis():
    grey = Predictor.untrained("convnet3", channels=1, image_size=16)
    first, second = (grey.predict(images, LABELS)(QUERIES[..., :1]) for images in (IMAGES[..., :1], IMAGES[..., 0]))
    assert torch.equal(first, second)


def test_grey_floats_may_be_any_number():
    predictor = Predictor.untrained("convnet3", channels=1, image_size=16)
    images = IMAGES[..., 0].astype(np.float32) / 255
    network = predictor.predict(images, LABELS)
    expected = network(images)
    for count in (3, 4, 5):
        assert_close(network(images[:count]), expected[:count])


def test_view_of_an_array_will_do(predictor, network):
    swapped = IMAGES[..., ::-1].copy()  # BGR, as some readers give it
    assert torch.equal(predictor.predict(swapped[..., ::-1], LABELS)(QUERIES), network(QUERIES))


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_integers_do_for_labels(kind, predictor, network):
    ids = kind([{"blue": -3, "green": 7, "red": 40}[name] for name in LABELS])
    found = predictor.predict(IMAGES, ids)
    assert found.classes == (-3, 7, 40) and all(type(c) is int for c in found.classes)
    assert torch.equal(found(QUERIES), network(QUERIES))


@pytest.mark.parametrize("classes", [2, 5, 20])
def test_any_number_of_classes(classes, predictor):
    labels = np.arange(40) % classes
    images = np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3), dtype=np.uint8)
    assert predictor.predict(images, labels)(QUERIES).shape == (36, classes)


def test_one_image_a_class_is_its_own_centroid(predictor):
    found = predictor.predict(IMAGES[:3], LABELS[:3])
    logits = found(IMAGES[:3])  # of red, green, blue, in columns blue, green, red
    assert_close(logits.flip(1).diagonal(), torch.full((3,), 10.0), rtol=1e-3, atol=0)  # statistics may be bf16
    assert logits.argmax(1).tolist() == [2, 1, 0]


def test_centroids_are_of_the_first_images_of_each_class(network):
    features = network.features(IMAGES)
    for column, name in enumerate(network.classes):
        rows = [row for row, label in enumerate(LABELS) if label == name][:10]
        assert len(rows) == 10
        assert_close(network.classifier.centroids[column], features[rows].mean(0), rtol=0.02, atol=0.03)


@pytest.mark.parametrize("at_a_time", [1, 2 * 75_456])
def test_several_groups_in_one_call_are_the_same_as_one_by_one(at_a_time, predictor, monkeypatch):
    monkeypatch.setattr("pudnet.predictor.WEIGHTS_AT_A_TIME", at_a_time)  # one, two groups
    groups = [(coloured(LABELS[:n], seed=n), LABELS[:n]) for n in (6, 36, 12)]
    for found, (images, labels) in zip(predictor.predict_many(groups), groups, strict=True):
        expected = predictor.predict(images, labels)
        assert found.classes == expected.classes
        assert_close(found(QUERIES), expected(QUERIES), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("variant", ["pudnet", "pudnet_plus", "static_trunk"])
def test_to_change_a_network_changes_neither_its_predictor_nor_another_network(variant):
    plus = variant == "pudnet_plus"
    predictor = Predictor.untrained("convnet3", 3, 16, variant=variant) if plus else make_predictor(variant)
    before = {name: tensor.clone() for name, tensor in predictor.model.state_dict().items()}
    changed, other = predictor.predict_many([(IMAGES, LABELS), (IMAGES, LABELS)])
    assert not any(parameter.requires_grad for parameter in changed.parameters())
    expected = other(QUERIES)
    for tensor in changed.state_dict().values():
        tensor.fill_(0)
    assert_close(predictor.model.state_dict(), before, rtol=0, atol=0)
    assert_close(other(QUERIES), expected, rtol=0, atol=0)
    sizes = [tensor.untyped_storage().nbytes() for tensor in other.target_state_dict().values()]
    assert sum(sizes) == sum(tensor.nbytes for tensor in other.target_state_dict().values())  # no part of a larger one


def test_a_part_of_the_images_is_looked_at_evenly_over_classes():
    few = Predictor.untrained("convnet3", channels=3, image_size=16)
    few.sketch_images, few.calibration_images, few.support_per_class = 4, 7, 2
    labels = torch.tensor([0] * 10 + [1] * 5 + [2] * 2)
    assert few.rows(labels).tolist() == [0, 1, 2, 10, 11, 12, 15, 16]  # a third of 7, rounded up, of each
    images = torch.randn(17, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert_close(few.sketch(images, labels), few.model.sketch(images[[0, 1, 10, 11, 15, 16]]).detach())
    rest = images.clone()
    rest[[3, 4, 5, 6, 7, 8, 9, 13, 14]] = float("nan")  # never looked at
    found, expected = (few.adapt(x, labels, (0, 1, 2)).classifier.centroids for x in (rest, images))
    assert torch.equal(found, expected)


def test_a_support_set_of_more_than_the_images_that_calibrate_calibrates_itself():
    many = Predictor.untrained("convnet3", channels=3, image_size=16)
    many.support_per_class = 40  # of each of two classes: 80, in place of 50
    labels = torch.tensor([0, 1] * 45)
    images = torch.randn(90, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    found = many.adapt(images, labels, (0, 1))
    assert found.card.provenance["calibration_images"] == found.card.provenance["support_images"] == 80
    expected = many.adapt(images[:80], labels[:80], (0, 1))
    assert torch.equal(found.classifier.centroids, expected.classifier.centroids)
    large = Predictor.untrained("convnet3", channels=3, image_size=84)  # of which few pass at once
    large.support_per_class = 45
    assert len(large.uses(labels).calibration) == 90
    large.support_per_class = 101  # of two classes: more than may pass whatever their size
    assert len(large.uses(torch.tensor([0, 1] * 110)).calibration) == 50
    many.calibration_images = 50  # asked for
    assert many.adapt(images, labels, (0, 1)).card.provenance["calibration_images"] == 50


def test_a_card_says_how_many_images_are_looked_at_and_the_caller_has_the_last_word(predictor):
    card = replace(predictor.card, sketch_images=9)
    network = Predictor(predictor.model, card, predictor.target).predict(IMAGES, LABELS)
    assert network.card.provenance["sketch_images"] == 9 and network.card.sketch_images is None
    assert Predictor(predictor.model, card, predictor.target, sketch_images=4).sketch_images == 4
    assert predictor.sketch_images == predictor.model.config.sketch_images


def test_a_sum_is_over_all_images_of_a_group_as_in_training():
    config = ModelConfig(pooling="sum", extractor="2conv", sketch_images=4)
    card = replace(make_predictor().card, model=asdict(config))
    predictor = Predictor.from_card(card)
    pixels = torch.as_tensor(IMAGES).permute(0, 3, 1, 2) / 255
    columns = torch.arange(len(LABELS)) % 3
    assert torch.equal(predictor.rows(columns), torch.arange(len(LABELS)))
    with torch.no_grad():
        assert_close(predictor.sketch(pixels, columns), predictor.model.sketch(pixels))
    assert len(predictor.predict(IMAGES, LABELS).classify(QUERIES)) == len(QUERIES)


def test_numpys_integers_are_counts_too(predictor, tmp_path):
    few, plain = (Predictor(predictor.model, predictor.card, predictor.target) for _ in range(2))
    for name in ("sketch_images", "calibration_images", "support_per_class"):
        setattr(few, name, np.int64(4))
        setattr(plain, name, 4)
    network = few.predict(IMAGES, LABELS)
    network.save(tmp_path / "w.safetensors")
    assert torch.equal(network(QUERIES), plain.predict(IMAGES, LABELS)(QUERIES))


@pytest.mark.parametrize("count", [0, -1, "10", 2.5])
def test_how_many_images_are_looked_at_is_a_count(count, predictor):
    few = Predictor(predictor.model, predictor.card, predictor.target, sketch_images=count)
    with pytest.raises(UserError, match="sketch_images: must be an integer of at least 1"):
        few.predict(IMAGES, LABELS)


def test_loading_leaves_the_callers_random_numbers(predictor, tmp_path):
    predictor.save(tmp_path / "model.safetensors")
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    Predictor.load(tmp_path / "model.safetensors")
    assert torch.equal(torch.rand(3), expected)


def test_many_classes_have_all_their_support_images_in_their_centroids(predictor):
    labels = np.arange(60) % 30  # two a class: more than are calibrated on
    many = predictor.predict(coloured(["red", "blue"] * 30), labels)
    with torch.no_grad():
        features = many.features(coloured(["red", "blue"] * 30))
    assert torch.cosine_similarity(many.classifier.centroids[3], features[[3, 33]].mean(0), 0) > 0.999


def test_with_more_classes_than_images_to_look_at_every_nth_is_looked_at():
    labels = torch.arange(400) % 200
    chosen = spread_rows(labels, 50)
    assert len(chosen) == 50 and labels[chosen].tolist() == list(range(0, 200, 4))


def test_network_of_the_users_own_is_predicted_saved_and_given_again_to_load(tmp_path):
    own = Predictor.untrained(Depthwise(3), channels=3, image_size=16)
    own.save(tmp_path / "own.safetensors")
    with pytest.raises(UserError, match="for tests.nets:Depthwise; give that network"):
        Predictor.load(tmp_path / "own.safetensors")
    with pytest.raises(UserError, match="for tests.nets:Depthwise, not for convnet3"):
        Predictor.load(tmp_path / "own.safetensors", target="convnet3")
    expected = own.predict(IMAGES, LABELS)
    for again in (Depthwise(3), "tests.nets:Depthwise"):
        found = Predictor.load(tmp_path / "own.safetensors", target=again).predict(IMAGES, LABELS)
        assert_close(found(QUERIES), expected(QUERIES), rtol=1e-4, atol=1e-4)
    expected.save(tmp_path / "weights.safetensors")
    reloaded = PredictedNetwork.load(tmp_path / "weights.safetensors", target=Depthwise(3))
    assert_close(reloaded(QUERIES), expected(QUERIES))


def test_normalize_is_what_the_plain_target_is_fed(predictor, network):
    card = replace(predictor.card, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    found = Predictor(predictor.model, card, predictor.target).predict(IMAGES, LABELS).normalize(QUERIES)
    for channel, (mean, std) in enumerate(zip(card.mean, card.std, strict=True)):
        expected = (QUERIES[..., channel] / 255 - mean) / std
        assert_close(found[:, channel].double(), torch.tensor(expected), rtol=0, atol=1e-5)
    plain = build_target("convnet3", 3, 16).network
    plain.load_state_dict(network.target_state_dict(), strict=True)
    assert_close(plain.eval()(network.normalize(QUERIES)), network.features(QUERIES), rtol=1e-4, atol=1e-4)


# Files


@pytest.mark.parametrize("kind", ["pudnet", "static_trunk"])
def test_saved_predictor_predicts_the_same(kind, tmp_path):
    first = make_predictor(kind)
    for name in ("a", "b"):
        first.save(tmp_path / "new" / name)
    assert (tmp_path / "new" / "a").read_bytes() == (tmp_path / "new" / "b").read_bytes()
    loaded = Predictor.load(str(tmp_path / "new" / "a"))
    assert loaded.card == first.card
    assert torch.equal(loaded.predict(IMAGES, LABELS)(QUERIES), first.predict(IMAGES, LABELS)(QUERIES))


@pytest.mark.parametrize("labels", [LABELS, [len(name) for name in LABELS]])
def test_saved_network_classifies_the_same(labels, predictor, tmp_path):
    network = predictor.predict(IMAGES, labels)
    for name in ("a", "b"):
        network.save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    loaded = PredictedNetwork.load(tmp_path / "a")
    assert loaded.card == network.card and loaded.classes == tuple(sorted(set(labels)))
    assert torch.equal(loaded(QUERIES), network(QUERIES))
    assert set(load_file(tmp_path / "a")) == {*network.target_state_dict(), "centroids"}
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b"}


def test_card_says_what_the_file_is_for(predictor, network, tmp_path):
    provenance = {"setting": "digits", "seed": 3}
    card = replace(network.card, provenance=provenance)
    PredictedNetwork(network.body, network.classifier, card).save(tmp_path / "a")
    _, found = read_tensors(tmp_path / "a")
    assert found == card and found.kind == "network" and predictor.card.kind == "pudnet"
    turned = replace(card, provenance=dict(reversed(provenance.items())))
    PredictedNetwork(network.body, network.classifier, turned).save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def foreign(path, predictor, network):
    save_file({"weight": torch.zeros(2)}, path)


def truncated(path, predictor, network):
    predictor.save(path)
    path.write_bytes(path.read_bytes()[:-100])


def text(path, predictor, network):
    path.write_text("no tensors at all, but long enough to have a header")


def later_format(path, predictor, network):
    write_tensors(path, predictor.model.state_dict(), replace(predictor.card, format=FORMAT + 1))


def other_size(path, predictor, network):
    write_tensors(path, predictor.model.state_dict(), replace(predictor.card, image_size=32))


def unknown_key(path, predictor, network):
    write_tensors(path, predictor.model.state_dict(), replace(predictor.card, model={"etta": 0.1}))


def odd_card(path, predictor, network):
    save_file({"weight": torch.zeros(2)}, path, metadata={METADATA: json.dumps([1, 2])})


def no_centroids(path, predictor, network):
    write_tensors(path, network.target_state_dict(), network.card)


def too_few_centroids(path, predictor, network):
    write_tensors(path, {**network.target_state_dict(), "centroids": network.classifier.centroids[:2]}, network.card)


def a_network(path, predictor, network):
    network.save(path)


def a_predictor(path, predictor, network):
    predictor.save(path)


def a_baseline(path, predictor, network):
    write_tensors(path, predictor.model.state_dict(), replace(predictor.card, kind="r2d2", model=None))


def nothing(path, predictor, network):
    pass


@pytest.mark.parametrize(
    ("kind", "write", "message"),
    [
        (Predictor, nothing, "x.safetensors: no such file"),
        (Predictor, text, "x.safetensors: not a PudNet file"),
        (Predictor, truncated, "x.safetensors: not a PudNet file"),
        (Predictor, foreign, "x.safetensors: not a PudNet file"),
        (Predictor, a_network, "x.safetensors: holds a predicted network"),
        (Predictor, a_baseline, "x.safetensors: holds a trained r2d2, not a trained PudNet"),
        (PredictedNetwork, a_predictor, "x.safetensors: holds a trained PudNet"),
        (Predictor, later_format, "x.safetensors: written in format 3"),
        (Predictor, other_size, "x.safetensors: its tensors do not fit its card .*extractor.linear.weight"),
        (Predictor, unknown_key, "model.etta: unknown key"),
        (Predictor, odd_card, "x.safetensors"),
        (PredictedNetwork, no_centroids, "x.safetensors: its tensors do not fit its card .*centroids"),
        (PredictedNetwork, too_few_centroids, "x.safetensors: its tensors do not fit its card .*centroids"),
    ],
)
def test_bad_file_is_named(kind, write, message, predictor, network, tmp_path):
    path = tmp_path / "x.safetensors"
    write(path, predictor, network)
    with pytest.raises(UserError, match=message) as caught:
        kind.load(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"std": (0.5, 0.0, 0.5)}, "card.std.1: input should be greater than 0"),
        ({"mean": (0.5, 0.5)}, "card.*mean and std must have one value for each channel"),
        ({"temperature": float("nan")}, "card.temperature"),
        ({"classes": (1, "1")}, "card.*two classes have the same name"),
    ],
)
def test_card_that_contradicts_itself_is_refused(change, message, network):
    values = {**asdict(network.card), **change}
    with pytest.raises(UserError, match=message):
        parse(Card, values, "card")


@pytest.mark.parametrize("device", ["cuda:7", "gpu"])
def test_device_that_is_not_there_is_named(device, predictor, tmp_path):
    predictor.save(tmp_path / "m.safetensors")
    with pytest.raises(UserError, match=f"device: {device} cannot be used"):
        Predictor.load(tmp_path / "m.safetensors", device)


@pytest.mark.parametrize("place", ["taken", "file/below.safetensors"])
def test_path_that_cannot_be_written_is_named(place, predictor, network, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "file").write_text("in the way")
    for what in (predictor, network):
        with pytest.raises(UserError, match=f"{place}: cannot be written"):
            what.save(tmp_path / place)
    assert {path.name for path in tmp_path.iterdir()} == {"taken", "file"}


def test_files_are_loaded_in_inference_mode_too(predictor, network, tmp_path):
    predictor.save(tmp_path / "model.safetensors")
    network.save(tmp_path / "network.safetensors")
    with torch.inference_mode():
        again = Predictor.load(tmp_path / "model.safetensors").predict(IMAGES, LABELS)
        read = PredictedNetwork.load(tmp_path / "network.safetensors")
        assert again.classify(QUERIES) == read.classify(QUERIES) == network.classify(QUERIES)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_callers_default_dtype_changes_nothing(dtype, predictor, network, tmp_path):
    plus = Predictor.untrained("convnet3", 3, 16, variant="pudnet_plus")
    plus.save(tmp_path / "model.safetensors")
    expected = plus.predict(IMAGES, LABELS)
    expected.save(tmp_path / "network.safetensors")
    network.save(tmp_path / "centroids.safetensors")
    torch.set_default_dtype(dtype)
    try:
        made = [plus, Predictor.load(tmp_path / "model.safetensors")]
        found = [made.predict(IMAGES, LABELS) for made in made]
        found.append(PredictedNetwork.load(tmp_path / "network.safetensors"))
        assert all(torch.equal(own(QUERIES), expected(QUERIES)) for own in found)
        assert torch.equal(PredictedNetwork.load(tmp_path / "centroids.safetensors")(QUERIES), network(QUERIES))
    finally:
        torch.set_default_dtype(torch.float32)


def test_several_threads_may_write_one_file(network, tmp_path):
    path = tmp_path / "network.safetensors"
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: network.save(path), range(20)))
    assert PredictedNetwork.load(path).classify(QUERIES) == network.classify(QUERIES)
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_stays_a_link_and_a_pipe_a_pipe(network, tmp_path):
    (tmp_path / "link.safetensors").symlink_to("real.safetensors")
    network.save(tmp_path / "link.safetensors")
    assert (tmp_path / "link.safetensors").is_symlink() and (tmp_path / "real.safetensors").stat().st_size > 0
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="pipe: cannot be written .it is a device or a pipe"):
        network.save(tmp_path / "pipe")
    assert (tmp_path / "pipe").is_fifo()


def test_a_networks_parts_give_gradients(predictor):
    network = predictor.predict(IMAGES, LABELS)
    network.body.requires_grad_(True)
    logits = network.classifier(network.body(network.normalize(IMAGES)).flatten(1))
    assert_close(logits, network(IMAGES))
    torch.nn.functional.cross_entropy(logits, torch.arange(len(LABELS)) % 3).backward()
    assert all(weight.grad is not None for weight in network.body.parameters())


# Bad input


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (LABELS[:-1], r"labels: 36 images need as many labels, got 35"),
        ([LABELS], r"labels: 36 images need as many labels, got 1"),
        (np.zeros((36, 2), int), r"labels: give one label for each image, got shape \(36, 2\)"),
        (["red"] * 36, r"labels: .*two classes, got 1 \(red\)"),
        ([0.0, float("nan")] * 18, r"labels: image 1 has none \(nan\)"),
        (["red", None] * 18, r"labels: image 1 has none \(None\)"),
        ([["red"], ["red", "blue"]] * 18, "labels: .*collections"),
        ([torch.tensor([1, 0]), torch.tensor([0, 1])] * 18, "labels: .*collections"),
        (None, "labels: give one label for each image"),
        ("red" * 12, "labels: give one label for each image, got a str"),
        (7, "labels: give one label for each image, got a int"),
        (["1", Word("1")] * 18, "labels: two classes have the same name"),
    ],
)
def test_unfit_labels_are_refused(labels, message, predictor):
    with pytest.raises(UserError, match=message):
        predictor.predict(IMAGES, labels)


def floats(value):
    images = np.full((36, 3, 16, 16), 0.5)
    images[7, 1, 2, 3] = value
    return images


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (floats(float("nan")), "images: floats must lie in 0..1"),
        (floats(1.5), "images: floats must lie in 0..1"),
        (floats(-0.1), "images: floats must lie in 0..1"),
        (IMAGES.astype(np.int64), "images: must be uint8 .* got int64"),
        (IMAGES > 3, "images: must be uint8 .* got bool"),
        (IMAGES[:0], r"images: .* got shape \(0, 16, 16, 3\)"),
        (IMAGES[0, 0], r"images: .* got shape \(16, 3\)"),
        (IMAGES[0], r"images: shape \(16, 16, 3\) looks like one image"),
        (np.zeros((36, 16, 16, 5), np.uint8), r"images: .* 1 to 4 channels, got shape \(36, 16, 16, 5\)"),
        (None, "images: must be an array, a list of images, a Dataset or a folder, got a NoneType"),
        ([], "images: there are none"),
        ([*IMAGES[:35], "x.png"], "image 35: must be PIL images, arrays or tensors, got a str"),
        ([*IMAGES[:35], floats(float("nan"))[7]], "image 35: floats must lie in 0..1"),
    ],
)
def test_unfit_images_are_refused_by_predictor_and_network(images, message, predictor, network):
    with pytest.raises(UserError, match=message):
        predictor.predict(images, LABELS)
    for use in (network, network.features, network.normalize):
        with pytest.raises(UserError, match=message):
            use(images)


def test_a_network_whose_layers_look_at_their_versions_is_saved_and_loaded(tmp_path):
    def mnasnet():
        network = mnasnet0_5()
        network.classifier = nn.Identity()
        return network

    images = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), dtype=np.uint8)
    network = Predictor.untrained(mnasnet(), 3, 32).predict(images, [0, 1] * 4)
    network.save(tmp_path / "w.safetensors")
    assert torch.equal(PredictedNetwork.load(tmp_path / "w.safetensors", mnasnet())(images), network(images))
    mnasnet().load_state_dict(network.target_state_dict())


@pytest.mark.parametrize(
    ("variant", "dtype"),
    [
        ("pudnet", torch.half),
        ("pudnet", torch.bfloat16),
        ("pudnet", torch.double),
        ("pudnet_plus", torch.half),
        ("pretrained_ridge", torch.half),
    ],
)
def test_a_network_of_another_precision_is_used_as_the_float_one(variant, dtype, tmp_path):
    predictor = Predictor.untrained("convnet3", 3, 16, variant=variant)
    predictor.sketch_images = 12  # of 36: others can be held out
    network = predictor.predict(IMAGES, LABELS)
    expected = network(QUERIES)
    assert_close(network.to(dtype)(QUERIES).float(), expected, rtol=0.1, atol=0.2)
    assert network.body(network.normalize(QUERIES)).dtype == dtype
    assert network(QUERIES).dtype == torch.promote_types(dtype, torch.float)
    network.export(tmp_path / "n.pt2")
    assert predictor.finetune(network, IMAGES, LABELS, epochs=1, held_out=0.1).network.mean.dtype == torch.float


def test_a_network_that_takes_a_view_of_its_maps_is_predicted_and_tuned():
    """Its images are channels_last, as everywhere, which a view of maps does not allow."""
    predictor = Predictor.untrained(Viewing(), 3, 16)
    network = predictor.predict(IMAGES, LABELS)
    assert network(QUERIES).isfinite().all()
    assert predictor.finetune(network, IMAGES, LABELS, epochs=1).network(QUERIES).isfinite().all()
