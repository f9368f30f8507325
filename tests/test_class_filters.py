"""Class filters against what they are by definition, and the variant that is made with them."""

from dataclasses import replace

import pytest
import torch
from sklearn.linear_model import Ridge
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from pudnet.baselines.method import Adapter
from pudnet.baselines.r2d2 import R2D2, R2D2Config
from pudnet.card import Card
from pudnet.config import ModelConfig, TrainConfig, apply_variant
from pudnet.finetune import finetune
from pudnet.hypernet import PudNet
from pudnet.hypernet.class_filters import ClassFilters, class_filters, mean_patches, regions
from pudnet.learner import MetaLearner
from pudnet.network import PredictedNetwork
from pudnet.objective import Objective
from pudnet.predictor import Predictor
from pudnet.targets import ConvShape, build_target, own_weights

pytestmark = pytest.mark.numeric


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def plus(target="convnet3", channels=1, size=8, **changes):
    config, train = apply_variant("pudnet_plus", ModelConfig(hidden=16, generator_hidden=4), TrainConfig())
    torch.manual_seed(0)
    target = build_target(target, channels, size)
    return PudNet(ModelConfig(**{**vars(config), **changes}), target), target, train


def labelled(k=3, n=4, seed=0):
    """Images (k n, 1, 8, 8), a class brighter than the next, and their labels."""
    labels = torch.arange(k).repeat_interleave(n)
    return noise(k * n, 1, 8, 8, seed=seed) + labels.view(-1, 1, 1, 1), labels


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(3, 5, 3, padding=1),
        nn.Conv2d(3, 5, 3, stride=2),
        nn.Conv2d(3, 5, (3, 1), padding=(2, 0), dilation=2),
        nn.Conv2d(3, 5, 4, padding="same"),
        nn.Conv2d(3, 5, 1, padding="valid"),
        nn.Conv2d(3, 5, 3, padding=(1, 2), padding_mode="reflect"),
        nn.Conv2d(3, 5, 3, padding="same", padding_mode="circular"),
    ],
    ids=str,
)
def test_mean_patches_answer_a_filter_with_its_mean_response(conv):
    maps = noise(2, 3, 7, 8)
    with torch.no_grad():
        expected = (conv(maps) - conv.bias[:, None, None]).mean((2, 3))
        assert_close(mean_patches(maps, conv)[:, 0] @ conv.weight.flatten(1).T, expected)


def test_regions_are_the_whole_map_and_windows_of_half_its_sides():
    conv = nn.Conv2d(3, 5, 3, padding=1, bias=False)
    maps = noise(2, 3, 8, 4)
    with torch.no_grad():
        response = conv(maps)
        corners = [response[:, :, i : i + 4, j : j + 2] for i in (0, 4) for j in (0, 2)]
        expected = torch.stack([part.mean((2, 3)) for part in (response, *corners)], 1)
        assert_close(mean_patches(maps, conv, 2) @ conv.weight.flatten(1).T, expected)
    assert [len(regions(side, side, grid)) for side, grid in ((8, 3), (3, 2), (8, 1))] == [10, 1, 1]


def test_large_maps_take_little_and_training_may_follow_inference():
    conv, maps = nn.Conv2d(2, 3, 3, padding=1), noise(1, 2, 160, 160)  # a weight for each pair of pixels: 24 GB
    with torch.inference_mode():
        expected = mean_patches(maps, conv, 2).clone()
    maps.requires_grad_(True)
    found = mean_patches(maps, conv, 2)
    found.sum().backward()
    assert_close(found.detach(), expected)
    assert maps.grad.isfinite().all()


@pytest.mark.parametrize("size", [5, 40])  # fewer values than images, and more
def test_class_filters_are_ridge_regression_of_the_classes(size):
    labels = torch.tensor([0, 1, 2, 1, 0, 2, 2, 2, 1, 0, 0])
    patches = 3 + noise(len(labels), size)
    centred = patches - patches.mean(0)
    scaled = (centred / centred.square().sum(1).mean().sqrt()).numpy()
    coefficients = Ridge(alpha=0.3).fit(scaled, F.one_hot(labels).float().numpy()).coef_
    expected = F.normalize(torch.from_numpy(coefficients), dim=1)
    assert_close(class_filters(patches, labels, 3, 0.3), expected, rtol=1e-3, atol=1e-4)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    assert_close(class_filters(patches[order], labels[order], 3, 0.3), expected, rtol=1e-3, atol=1e-4)


def test_one_image_a_class_and_equal_images_are_no_trouble():
    for patches in (noise(2, 9), torch.ones(2, 9)):
        assert class_filters(patches, torch.tensor([0, 1]), 2, 0.3).isfinite().all()


def test_channels_get_the_filters_of_the_classes_in_turn():
    layer = ClassFilters(ConvShape("conv.weight", (7, 2, 3, 3)), 1)
    filters = F.normalize(noise(3, 18), dim=1)
    added = layer(filters).flatten(1)
    norm = 2**0.5 / 2  # half of He's: sqrt(2 / fan_in) sqrt(fan_in)
    assert_close(added, norm * filters[[0, 1, 2, 0, 1, 2, 0]])
    assert_close(layer(torch.stack([filters, -filters])), torch.stack([layer(filters), -layer(filters)]))


def test_with_more_classes_than_channels_each_class_has_a_share():
    layer = ClassFilters(ConvShape("conv.weight", (4, 2, 1, 1)), 1)
    orthogonal = torch.eye(10)[:, :2]
    added = layer(orthogonal).flatten(1).detach() / (2**0.5 / 2)
    assert_close(added[:2], torch.eye(2) / torch.tensor([[3.0], [3.0]]).sqrt())  # classes 0, 4, 8 and 1, 5, 9
    assert not added[2:].any()


def test_weights_follow_the_classes_and_not_the_order_of_the_images():
    model, *_ = plus()
    images, labels = labelled()
    own = model.generate(model.sketch(images, labels))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))
    again = model.generate(model.sketch(images[order], labels[order]))
    other = model.generate(model.sketch(images, labels[order]))
    assert_close(again["block3.conv.weight"], own["block3.conv.weight"], rtol=1e-3, atol=1e-3)
    assert not torch.allclose(other["block3.conv.weight"], own["block3.conv.weight"], atol=0.1)
    assert all(torch.equal(other[f"block{b}.conv.weight"], own[f"block{b}.conv.weight"]) for b in (1, 2))


@pytest.mark.parametrize("change", [False, True])
def test_several_groups_have_the_weights_that_each_has_alone(change):
    model, *_ = plus(change=change)
    groups = [labelled(seed=seed) for seed in range(2)]
    together = model.generate(model.sketch(torch.stack([images for images, _ in groups]), groups[0][1]))
    for g, group in enumerate(groups):
        for name, weight in model.generate(model.sketch(*group)).items():
            assert_close(own_weights(together, g)[name], weight)


def test_a_predicted_change_starts_at_zero():
    model, target, _ = plus(change=True, class_filters=False, classifier="centroids")
    weights = model.generate(model.sketch(noise(5, 1, 8, 8)))
    assert all(torch.equal(weights[conv.name], target.network.get_parameter(conv.name)) for conv in target.convs)


def test_only_convolutions_that_see_all_channels_get_filters():
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=4), nn.ReLU(), nn.Flatten())
    model, *_ = plus(network)
    assert model.filters.conv.name == "0.weight"


def test_an_image_whose_label_made_the_weights_is_no_query():
    model, target, train = plus(sketch_images=6)
    learner = MetaLearner(model, target, train, 5, k=2)
    images = noise(1, 40, 1, 8, 8)
    found = learner.losses(images, torch.tensor([[1] * 20 + [3] * 20]), 0.0)
    blocks = images[0].unflatten(0, (2, 20))
    sketch = model.sketch(blocks[:, :3].flatten(0, 1), torch.tensor([0, 0, 0, 1, 1, 1]))
    features = model.shared(images[0], model.generate(sketch))
    objective = Objective(train, target.features, 5)
    expected = objective(features, torch.tensor([1, 3]), 3, model.regression)  # support: 10 of a class, 3 seen
    assert_close(found.total[0], expected.total)
    seen = MetaLearner(*plus(sketch_images=1000)[:2], train, 5, k=2)._sketch(images)[1]
    assert seen == 10


@pytest.mark.parametrize("filters", [True, False])
def test_one_pass_predicts_what_sketch_generation_and_calibration_do(filters):
    model, target, _ = plus(sketch_images=12, class_filters=filters)
    card = Card("pudnet", "convnet3", 1, 8, (0.5,), (0.5,), 10.0, 3, vars(model.config))
    predictor = Predictor(model, card, target)
    images, labels = labelled(n=6)
    passes: list[int] = []
    first = predictor.calibrate.empty.get_submodule("block1.conv")
    first.register_forward_hook(lambda conv, inputs, output: passes.append(len(output)))
    passing = predictor.adapt(images, labels, (0, 1, 2))
    assert passes == [12]
    stepwise = predictor.adapt(images, labels, (0, 1, 2), predictor.sketch(images, labels))
    for name, expected in stepwise.state_dict().items():
        assert_close(passing.state_dict()[name], expected, rtol=1e-3, atol=1e-4)
    (together,) = predictor.predict_many([(images.sigmoid(), labels)])
    assert together.classes == (0, 1, 2)


def test_without_filters_a_group_has_nothing_of_its_own_but_its_classifier():
    model, target, train = plus(sketch_images=12, class_filters=False)
    own, other = (model.generate(model.sketch(*labelled(seed=seed))) for seed in range(2))
    for conv in target.convs:
        assert torch.equal(own[conv.name], other[conv.name])
        assert torch.equal(own[conv.name], target.network.get_parameter(conv.name))
    method = R2D2(R2D2Config(), target)
    method.trunk.shared.load_state_dict(model.shared.state_dict())
    card = Card("pudnet", "convnet3", 1, 8, (0.5,), (0.5,), 10.0, 4, vars(model.config))
    images, labels = labelled(n=4)
    predicted = Predictor(model, card, target).adapt(images, labels, (0, 1, 2))
    adapter = Adapter(method, replace(card, kind="r2d2", model=vars(method.config)), target)
    adapter.predictor.calibration_images = 12
    assert_close(predicted.logits(images), adapter.adapt(images, labels, (0, 1, 2)).logits(images))
    images, labels = labelled(n=20)  # in training, four images of each class are labelled; ten are, as support set
    found = MetaLearner(model, target, train, 3, k=3).losses(images[None], labels[None], 0.0)
    features = model.shared(images, model.base_weights()).unflatten(0, (3, 20))
    support, queries = (part.flatten(0, 1) for part in (features[:, :10], features[:, 10:]))
    half = torch.arange(3).repeat_interleave(10)
    assert_close(found.total[0], F.cross_entropy(model.regression(queries, support, half, 3), half))


def test_more_classes_than_are_looked_at(tmp_path):
    model, target, _ = plus(sketch_images=4)
    card = Card("pudnet", "convnet3", 1, 8, (0.5,), (0.5,), 10.0, 1, vars(model.config))
    Predictor(model, card, target).save(tmp_path / "plus.safetensors")
    network = Predictor.load(tmp_path / "plus.safetensors").predict(noise(7, 1, 8, 8).sigmoid(), list("abcdefg"))
    assert network.classes == tuple("abcdefg") and network(noise(3, 1, 8, 8).sigmoid()).isfinite().all()


def test_a_classifier_that_is_solved_for_is_of_all_images_that_are_looked_at(tmp_path):
    model, target, _ = plus(sketch_images=12, ridge=0.3, ridge_scale=10.0)
    card = Card("pudnet", "convnet3", 1, 8, (0.5,), (0.5,), 10.0, 2, vars(model.config))
    images, labels = labelled(n=6)
    network = Predictor(model, card, target).adapt(images, labels, (0, 1, 2))
    seen = torch.cat([torch.arange(4) + 6 * c for c in range(3)])  # 12 images of three classes
    with torch.no_grad():
        support, queries = (network.body(part).flatten(1) for part in (images[seen], images))
        assert_close(network.logits(images), model.regression(queries, support, labels[seen], 3), rtol=1e-3, atol=1e-3)
    assert network.card.ridge == pytest.approx(0.3) and network.card.support_per_class == 4
    more = Predictor(model, card, target)
    more.sketch_images = 18
    looked_at = more.adapt(images, labels, (0, 1, 2)).card
    assert looked_at.support_per_class == 6 and looked_at.provenance["calibration_images"] == 18
    more.sketch_images, more.support_per_class = 6, 5  # more labels for the classifier than for the filters
    for penalty, used in (("learned", 2), ("leave_one_out", 5)):  # may be held out in fine-tuning, unless they chose
        more.regression.penalty = penalty
        card = more.adapt(images, labels, (0, 1, 2)).card
        assert (card.support_per_class, card.labels_per_class) == (5, used)
    model.regression.penalty = "learned"
    network.save(tmp_path / "a.safetensors")
    again = PredictedNetwork.load(tmp_path / "a.safetensors")
    assert torch.equal(again.logits(images), network.logits(images))
    for name in ("a.onnx", "a.pt2"):  # each is read again and compared
        network.export(tmp_path / name)
    tuned = finetune(network, images.sigmoid(), labels, epochs=2, held_out=0.2).network
    assert not torch.equal(tuned.classifier.head_weight, network.classifier.head_weight)
    assert (tuned.logits(images).argmax(1) == labels).float().mean() > 0.5
