"""Target networks: the functional forward under predicted weights, and BatchNorm's calibration."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from pudnet.errors import UserError
from pudnet.targets import ConvNet3, SharedTarget, build_target, calibrated_network, predicted_convs

CONVS = ["block1.conv.weight", "block2.conv.weight", "block3.conv.weight"]
NORMS = {f"body.block{i}.norm.{part}" for i in (1, 2, 3) for part in ("weight", "bias")}


def make_plain(channels=3, seed=0):
    """A ConvNet-3 whose affine parameters are not at their start, so that it shows where they go."""
    torch.manual_seed(seed)
    network = build_target("convnet3", channels, 16)
    for name, parameter in network.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, mean=1, std=0.3)
    return network


def make_images(count=40, channels=3, seed=0):
    return torch.randn(count, channels, 16, 16, generator=torch.Generator().manual_seed(seed))


def sorted_images(count=80):
    """Images whose first half is of a dark, flat class and whose second half is of a bright, lively one."""
    images = make_images(count)
    images[: count // 2] = 0.3 * images[: count // 2] - 2
    return images


def other_weights(seed=1):
    return {name: w for name, w in make_plain(seed=seed).state_dict().items() if name in CONVS}


@pytest.mark.parametrize("size", [8, 28, 32, 84])
def test_convnet3_is_three_blocks_of_convolution_norm_relu_pooling(size):
    torch.manual_seed(0)
    network, images = ConvNet3(1, width=4).train(), torch.randn(2, 1, size, size)
    maps = images
    for block in (network.block1, network.block2, network.block3):
        maps = F.conv2d(maps, block.conv.weight, padding=1)
        maps = F.batch_norm(maps, None, None, block.norm.weight, block.norm.bias, training=True)
        maps = F.max_pool2d(F.relu(maps), 2)
    assert network(images).shape == (2, 4 * (size // 8) ** 2)
    assert_close(network(images), maps.flatten(1), rtol=1e-4, atol=1e-5)


def test_predicted_convolutions_stand_in_the_order_of_the_forward_pass():
    assert [conv.name for conv in predicted_convs(make_plain())] == CONVS
    assert [conv.shape for conv in predicted_convs(make_plain())] == [(64, 3, 3, 3), (64, 64, 3, 3), (64, 64, 3, 3)]


def test_plain_target_starts_with_he_initialisation():
    plain = make_plain()
    for conv in predicted_convs(plain):
        assert plain.state_dict()[conv.name].std().item() == pytest.approx(conv.he_std, rel=0.1)
        assert conv.he_std == pytest.approx((2 / (conv.shape[1] * 9)) ** 0.5)


@pytest.mark.parametrize("mode", [True, False])
def test_shared_target_with_weights_is_the_plain_network_in_train_mode(mode):
    plain, images, weights = make_plain(), make_images(), other_weights()
    shared = SharedTarget(plain).train(mode)
    shared(make_images(seed=5), weights)  # nothing of another group is left behind
    plain.load_state_dict(weights, strict=False)
    assert_close(shared(images, weights), plain.train()(images), rtol=1e-5, atol=1e-5)


def test_shared_target_holds_batch_norms_affine_parameters_and_nothing_else():
    assert set(SharedTarget(make_plain()).state_dict()) == NORMS


def test_calibrated_network_gives_the_groups_own_features_in_eval_mode():
    plain, images, weights = make_plain(), make_images(), other_weights()
    shared = SharedTarget(plain)
    with torch.no_grad():
        torch.nn.init.normal_(shared.body.block2.norm.weight)  # learned since `plain` was built
        expected = shared(images, weights)
    before = copy.deepcopy(plain.state_dict())
    network = calibrated_network(plain, shared, weights, images)
    assert not network.training
    # Running variances are unbiased, those of a batch are not: of 40 x 4 x 4 values, 0.2 % apart.
    assert_close(network(images), expected, rtol=0.01, atol=0.01)
    assert all(torch.equal(before[name], tensor) for name, tensor in plain.state_dict().items())


def test_calibrated_network_judges_each_image_alone():
    network = calibrated_network(make_plain(), SharedTarget(make_plain()), other_weights(), make_images())
    queries = make_images(seed=9)
    together = network(queries)
    assert_close(network(queries.flip(0)).flip(0), together, rtol=1e-4, atol=1e-5)
    assert_close(torch.cat([network(query[None]) for query in queries]), together, rtol=1e-4, atol=1e-5)


def test_calibrated_network_is_a_plain_target_with_the_predicted_weights():
    weights, images = other_weights(), make_images()
    network = calibrated_network(make_plain(), SharedTarget(make_plain()), weights, images)
    fresh = build_target("convnet3", 3, 16)
    fresh.load_state_dict(network.state_dict(), strict=True)
    assert_close(fresh.eval()(images), network(images))
    assert all(torch.equal(fresh.state_dict()[name], weights[name]) for name in CONVS)


@pytest.mark.parametrize(
    "batch",
    [
        80,
        40,  # consecutive batches would hold a class each
        79,  # and the last of them one image
    ],
)
def test_calibration_in_several_batches_is_close_to_that_in_one(batch):
    plain, images, weights = make_plain(), sorted_images(), other_weights()
    with torch.no_grad():
        expected = SharedTarget(plain)(images, weights)
        network = calibrated_network(plain, SharedTarget(plain), weights, images, batch)
        found = network(images)
    assert network.block1.norm.num_batches_tracked == (1 if batch == 80 else 2)
    assert (found - expected).norm() / expected.norm() < 0.05


@pytest.mark.parametrize(
    ("name", "size", "message"), [("convnet3", 7, "7 px.* needs 8"), ("vgg", 32, "'vgg'.*convnet3")]
)
def test_impossible_target_is_refused(name, size, message):
    with pytest.raises(UserError, match=message):
        build_target(name, 3, size)
