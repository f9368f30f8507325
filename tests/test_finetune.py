"""Predicted weights as an initialisation: what is trained, what is held out, what the curve says."""

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from pudnet import Predictor
from pudnet.data.user_images import checksums
from pudnet.errors import RunFailed, UserError
from pudnet.finetune import _random, finetune
from pudnet.scratch import ScratchConfig, train

pytestmark = pytest.mark.numeric


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


def test_the_images_that_were_trained_on_are_known_as_seen(tuned, digits):
    network, found = tuned
    of_all = set(checksums(digits[0][:200][..., None]))
    seen = set(found.network.card.looked_at)
    assert set(network.card.looked_at) < seen <= of_all and len(seen) >= found.trained_on


def plus(variant="pudnet_plus"):
    """PudNet+, or another variant that reads labels, which looks at 10 images."""
    predictor = Predictor.untrained("convnet3", channels=1, image_size=8, variant=variant)
    predictor.sketch_images, predictor.support_per_class = 10, 1
    return predictor


@pytest.mark.parametrize("variant", ["pudnet", "pudnet_plus", "pretrained_ridge"])
def test_nothing_of_the_held_out_images_is_known_at_the_start(variant, predictor):
    """Random labels: neither start does better than chance, though the network was predicted from those very images."""
    predictor = predictor if variant == "pudnet" else plus(variant)
    accuracies = {"predicted": [], "random": []}
    for seed in range(8):
        rng = np.random.default_rng(seed)
        images, labels = rng.integers(0, 256, (25, 8, 8), dtype=np.uint8), np.arange(25) % 5
        found = finetune(predictor.predict(images, labels), images, labels, epochs=1, held_out=0.4, seed=seed)
        for point in found.curve[::2]:
            accuracies[point.start].append(point.accuracy)
    for values in accuracies.values():  # of 80 images: chance is 20 %, four standard errors are 18
        assert abs(np.mean(values) - 20) < 18


def test_too_few_images_beside_those_whose_labels_made_the_weights_are_refused():
    predictor, labels = plus(), [0, 1] * 4
    images = np.random.default_rng(0).integers(0, 256, (8, 8, 8), dtype=np.uint8)
    with pytest.raises(
        UserError, match="class 0 has 4 image.*4 of which the network was predicted from.*, too few to hold 1 out"
    ) as error:
        finetune(predictor.predict(images, labels), images, labels)
    assert "(--sketch 6 --support 3; in Python sketch_images, support_per_class)" in str(error.value)
    predictor.sketch_images, predictor.support_per_class = 6, 3
    finetune(predictor.predict(images, labels), images, labels, epochs=1)
    labels = [0] * 5 + [1] * 3  # classes of other sizes: the smallest decides how few
    with pytest.raises(UserError, match=r"--sketch 4 --support 2; "):
        finetune(plus().predict(images, labels), images, labels)
    predictor.sketch_images, predictor.support_per_class = 4, 2
    finetune(predictor.predict(images, labels), images, labels, epochs=1)


@pytest.fixture(scope="module")
def drawn():
    """70 images of noise, of two classes in turns."""
    return np.random.default_rng(0).integers(0, 256, (70, 8, 8), dtype=np.uint8), np.arange(70) % 2


def held_out_of(found, images):
    """The images, by their rows, that a fine-tuning held out: all that it has not trained on."""
    return [row for row, own in enumerate(checksums(images[..., None])) if own not in found.network.card.labelled]


def test_images_whose_labels_made_the_weights_are_known_whatever_their_order(drawn):
    images, labels = drawn
    network = plus().predict(images[:10], labels[:10])
    assert set(network.card.labelled) == set(checksums(images[:10, ..., None]))
    for order in (np.arange(70), np.arange(70)[::-1]):
        found = finetune(network, images[order], labels[order], epochs=1, held_out=0.4)
        tested = order[held_out_of(found, images[order])]
        assert len(tested) == found.held_out == 28 and tested.min() >= 10
    assert finetune(network, images[10:30], labels[10:30], epochs=1).held_out == 4  # none of these was looked at


def test_what_a_first_finetuning_trained_on_a_second_does_not_hold_out(drawn, predictor):
    images, labels = drawn
    first = finetune(predictor.predict(images, labels), images, labels, epochs=1, held_out=0.4)
    second = finetune(first.network, images, labels, epochs=1, held_out=0.2, seed=1)
    assert set(held_out_of(second, images)) < set(held_out_of(first, images)) and second.held_out == 14
    assert second.network.card.provenance["finetuned_epochs"] == 2
    with pytest.raises(UserError, match="21 of which the network was predicted from or trained on"):
        finetune(first.network, images, labels, epochs=1, held_out=0.5)


def test_both_starts_see_the_same_batches(predictor, digits):
    """From the very same start, the two curves are one."""
    images, labels = digits
    network = predictor.predict(images[:80], labels[:80])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pudnet.finetune._random", lambda network: network)
        found = finetune(network, images[:80], labels[:80], epochs=2)
    first, second = found.curve[:3], found.curve[3:]
    assert [point.accuracy for point in first] == [point.accuracy for point in second]
    assert [point.loss for point in first[1:]] == [point.loss for point in second[1:]]


def test_random_start_has_nothing_of_the_predicted_one(predictor, digits):
    network = predictor.predict(*digits)
    fresh = _random(network).target_state_dict()
    for name, tensor in network.target_state_dict().items():
        same = "bias" in name or "norm.weight" in name  # zeros and ones, as they begin
        assert same or "num_batches" in name or not torch.allclose(fresh[name], tensor)


def test_no_batch_is_of_one_image():
    """BatchNorm cannot be trained on one value a channel: 51 images are batches of 26 and 25, not of 50 and 1."""
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2))
    for images, batch in ((51, 50), (3, 2), (4, 1)):
        config = ScratchConfig(epochs=1, batch=batch)
        train(network, torch.randn(images, 1, 2, 2), torch.arange(images) % 2, config, bf16=False)


def test_folders_labels_are_strings_and_are_matched(predictor, digits, tmp_path):
    images, labels = digits
    for row in range(40):
        (tmp_path / str(labels[row])).mkdir(exist_ok=True)
        Image.fromarray(images[row]).save(tmp_path / str(labels[row]) / f"{row}.png")
    found = finetune(predictor.predict(images[:40], labels[:40]), tmp_path, epochs=1)
    assert found.network.classes == (0, 1, 2, 3) and found.trained_on + found.held_out == 40


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


def test_a_loss_that_does_not_stay_finite_ends_it(predictor, digits):
    images, labels = (part[:80] for part in digits)
    with pytest.raises(RunFailed, match="fine-tuning: the loss did not stay finite; lower the learning rate"):
        finetune(predictor.predict(images, labels), images, labels, epochs=1, learning_rate=1e30)


def test_inference_mode_does_not_matter(predictor, digits):
    images, labels = (part[:80] for part in digits)
    with torch.inference_mode():
        network = predictor.predict(images, labels)
        assert finetune(network, torch.from_numpy(images), labels, epochs=1).curve[-1].accuracy > 25


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "epochs: must be an integer of at least 1, got 0"),
        ({"held_out": 1.0}, "held_out: must lie between 0 and 1"),
        ({"learning_rate": 0.0}, "learning_rate: must be positive"),
        ({"labels": ["cat", "dog"] * 40}, "labels: the network does not know 'cat'; it knows 0, 1, 2, 3"),
        ({"labels": [0, 1, 2] * 26 + [3, 0]}, r"labels: class 3 has 1 image\(s\), too few"),
        ({"labels": [0, 1, 2, 1] * 20}, "labels: no images of class '3', which the network knows"),
        ({"epochs": True}, "epochs: must be an integer"),
        ({"augment": "mirror"}, "augment: must be one of none, shift, shift_mirror, got 'mirror'"),
        ({"held_out": "x"}, "held_out: must lie between 0 and 1, got 'x'"),
    ],
)
def test_unfit_input_is_refused(change, message, predictor, digits):
    images, labels = digits
    network = predictor.predict(images[:80], labels[:80])
    with pytest.raises(UserError, match=message):
        finetune(network, images[:80], **{"labels": labels[:80], **change})
