"""Target networks: the functional forward under predicted weights, and BatchNorm's calibration."""

import copy
from collections import defaultdict
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close
from torchvision.models import resnet18

from pudnet.errors import UserError
from pudnet.targets import (
    Calibrator,
    ConvNet3,
    MultilevelConvNet3,
    SharedTarget,
    all_blocks,
    build_target,
    calibrate,
    check_together,
    last_block_alone,
    norms,
    target_code,
    together,
)
from pudnet.targets.build import TARGETS
from tests.nets import REFUSED, Branching, features_of

pytestmark = pytest.mark.numeric

NAMES = ["convnet3", "convnet3_multilevel", "resnet18", "tests.nets:Depthwise", "tests.nets:Viewing"]
SIZE = 16


def make_target(name="convnet3", channels=3, seed=0):
    """A target whose shared parameters are not at their start, so that it shows where they go."""
    torch.manual_seed(seed)
    target = build_target(name, channels, SIZE)
    for norm in norms(target.network):
        nn.init.normal_(norm.weight, mean=1, std=0.3)
        nn.init.normal_(norm.bias, std=0.3)
    return target


def make_images(count=40, channels=3, seed=0):
    return torch.randn(count, channels, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


def other_weights(name="convnet3", seed=1):
    target = make_target(name, seed=seed)
    tensors = target.network.state_dict()
    return {conv.name: tensors[conv.name].clone() for conv in target.convs}


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


@pytest.mark.parametrize("size", [8, 28, 32])
def test_multilevel_features_are_those_of_convnet3_then_normalised_averages_of_its_earlier_blocks(size):
    torch.manual_seed(0)
    network, images = MultilevelConvNet3(1, width=4).train(), torch.randn(3, 1, size, size)
    plain = ConvNet3(1, width=4).train()
    plain.load_state_dict(network.state_dict(), strict=False)
    first = plain.block1(images)
    expected = [plain(images)]
    for maps, step in ((plain.block2(first), 2), (first, 4)):
        rows = maps.unfold(2, step, step).unfold(3, step, step).mean((-2, -1))
        mean, variance = rows.mean((0, 2, 3), keepdim=True), rows.var((0, 2, 3), keepdim=True, unbiased=False)
        expected.append(((rows - mean) / (variance + 1e-5).sqrt()).flatten(1))
    assert network(images).shape == (3, 3 * 4 * (size // 8) ** 2)
    assert_close(network(images), torch.cat(expected, 1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "convolutions", "weights"), [("resnet18", 20, 11_166_912), ("resnet34", 36, 21_267_648)]
)
def test_resnets_are_torchvisions_with_every_convolution_predicted(name, convolutions, weights):
    target = build_target(name, 3, 32)
    assert (len(target.convs), target.predicted) == (convolutions, weights)
    assert {conv.shape[2:] for conv in target.convs} == {(7, 7), (3, 3), (1, 1)}
    assert features_of(target.network, torch.zeros(2, 3, 32, 32)).shape == (2, 512)
    assert build_target(name, 1, 32).convs[0].shape == (64, 1, 7, 7)


def test_convolutions_stand_in_the_order_of_the_forward_pass():
    target = make_target("tests.nets:Depthwise")
    assert [conv.name for conv in target.convs] == ["stem.weight", "depth.weight", "point.weight", "grouped.weight"]
    assert [conv.shape for conv in target.convs] == [(8, 3, 3, 5), (8, 1, 3, 3), (24, 8, 1, 1), (24, 6, 3, 3)]


def test_plain_target_starts_with_he_initialisation():
    target = make_target("resnet18")
    for conv in target.convs:
        assert target.network.state_dict()[conv.name].std().item() == pytest.approx(conv.he_std, rel=0.1)
    assert target.convs[0].he_std == pytest.approx((2 / (3 * 49)) ** 0.5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mode", [True, False])
def test_shared_target_with_weights_is_the_plain_network_in_train_mode(name, mode):
    target, images, weights = make_target(name), make_images(), other_weights(name)
    shared = SharedTarget(target).train(mode)
    shared(make_images(seed=5), weights)  # nothing of another group is left behind
    target.network.load_state_dict(weights, strict=False)
    assert_close(shared(images, weights), features_of(target.network.train(), images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_several_groups_at_once_are_the_same_as_one_by_one(name):
    shared = SharedTarget(make_target(name))
    weights = [other_weights(name, seed) for seed in range(3)]
    images = torch.stack([make_images(seed=seed) for seed in range(3)])
    stacked = {key: torch.stack([one[key] for one in weights]) for key in weights[0]}
    with torch.no_grad():
        expected = torch.stack([shared(group, own) for group, own in zip(images, weights, strict=True)])
        for found in (shared(images, stacked), together(shared, images, stacked)):
            assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_shared_target_holds_what_is_not_predicted_and_nothing_else():
    shared = SharedTarget(make_target("tests.nets:Depthwise")).state_dict()
    own = {f"body.norms.{i}.{part}" for i in range(3) for part in ("weight", "bias")}
    assert set(shared) == own | {"body.point.bias", "body.head.weight", "body.head.bias", "body.mask"}


@pytest.mark.parametrize("name", NAMES)
def test_calibrated_network_gives_the_groups_own_features_in_eval_mode(name):
    target, images, weights = make_target(name), make_images(), other_weights(name)
    shared = SharedTarget(target)
    with torch.no_grad():
        nn.init.normal_(norms(shared.body)[0].weight)  # learned since the target was built
        expected = shared(images, weights)
    before = copy.deepcopy(target.network.state_dict())
    network, features = Calibrator(target, shared)(weights, images)
    assert not any(module.training for module in network.modules())
    assert_close(features, expected, rtol=1e-4, atol=1e-4)
    assert_close(features_of(network, images), expected, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(before[key], tensor) for key, tensor in target.network.state_dict().items())


def test_calibrated_network_has_what_is_shared_as_it_is_now():
    target, images = make_target(), make_images()
    shared = SharedTarget(target)
    calibrate = Calibrator(target, shared)
    with torch.no_grad():
        norms(shared.body)[2].bias.fill_(7)  # learned, or loaded, since
    network, _ = calibrate(other_weights(), images)
    assert (norms(network)[2].bias == 7).all() and norms(network)[2].bias is not norms(shared.body)[2].bias


def test_calibrated_network_judges_each_image_alone():
    target = make_target()
    network, _ = Calibrator(target, SharedTarget(target))(other_weights(), make_images())
    queries = make_images(seed=9)
    together = features_of(network, queries)
    assert_close(features_of(network, queries.flip(0)).flip(0), together, rtol=1e-4, atol=1e-5)
    assert_close(torch.cat([features_of(network, query[None]) for query in queries]), together, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_calibrated_network_is_a_plain_target_with_the_predicted_weights(name):
    target, weights, images = make_target(name), other_weights(name), make_images()
    network, _ = Calibrator(target, SharedTarget(target))(weights, images)
    fresh = build_target(name, 3, SIZE).network
    fresh.load_state_dict(network.state_dict(), strict=True)
    assert_close(features_of(fresh.eval(), images), features_of(network, images))
    assert all(torch.equal(fresh.state_dict()[key], weights[key]) for key in weights)


def test_predicted_resnet_loads_into_torchvisions_class_less_fc():
    target, images = make_target("resnet18"), make_images()
    network, _ = Calibrator(target, SharedTarget(target))(other_weights("resnet18"), images)
    plain = resnet18()
    plain.fc = nn.Identity()
    plain.load_state_dict(network.state_dict(), strict=True)
    assert_close(features_of(plain.eval(), images), features_of(network, images), rtol=1e-4, atol=1e-4)


def test_module_of_the_users_own_is_copied_and_left_as_it_is():
    own = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
    before = copy.deepcopy(own.state_dict())
    target = build_target(own, 3, SIZE)
    assert [conv.shape for conv in target.convs] == [(4, 3, 3, 3)]
    assert target.network is not own and all(torch.equal(before[k], v) for k, v in own.state_dict().items())


@pytest.mark.parametrize("reason", REFUSED)
def test_what_cannot_be_predicted_is_refused_by_name(reason):
    with pytest.raises(UserError, match=reason):
        build_target(REFUSED[reason], 3, SIZE)


def test_what_takes_one_group_at_a_time_is_found_out_before_training():
    for name in NAMES:
        check_together(build_target(name, 3, SIZE))
    with pytest.raises(UserError, match="train.groups_per_step: must be 1 for this target on a GPU"):
        check_together(build_target(Branching(), 3, SIZE))


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("convnet3", 7, "7 px.* needs 8"),
        ("vgg", 32, "'vgg'.*convnet3"),
        ("tests.nets:Missing", 32, "tests.nets:Missing: cannot be built .*Missing"),
        ("no_such_package:Net", 32, "cannot be built .*no_such_package"),
        ("tests.nets:broken", 32, "cannot be built .*no such luck"),
        ("tests.nets:number", 32, "gives a int"),
        (":", 32, "cannot be built"),
    ],
)
def test_impossible_target_is_refused(name, size, message):
    with pytest.raises(UserError, match=message):
        build_target(name, 3, size)


def test_network_that_holds_anything_is_copied_as_deepcopy_copies_it():
    own = nn.Sequential(nn.Conv2d(3, 4, 3))
    own.meta = defaultdict(list)
    target = build_target(own, 3, SIZE)
    network, _ = Calibrator(target, SharedTarget(target))({"0.weight": torch.ones(4, 3, 3, 3)}, make_images())
    assert network.meta["a"] == [] and not own.meta


@pytest.mark.parametrize("target", [nn.Conv2d, 3, None])
def test_what_is_neither_a_name_nor_a_module_is_refused(target):
    with pytest.raises(UserError, match="must be a name or a torch.nn.Module"):
        build_target(target, 3, SIZE)


def test_code_of_a_users_network_is_all_of_its_package():
    assert {path.name for path in target_code("tests.nets:Depthwise")} > {"nets.py", "smallest.py"}
    assert [path.name for path in target_code("textwrap:TextWrapper")] == ["textwrap.py"]
    assert target_code("tests.nets:narrow") == target_code("tests.nets:Depthwise")  # a partial, which has no file
    assert Path(nn.__file__).parent / "modules" / "conv.py" in target_code("tests.nets:partial_of_another_file")


def test_one_image_is_too_few_where_a_layer_has_one_value_of_it():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    assert calibrate(network, torch.randn(2, 3, 3, 3)).shape == (2, 4)
    with pytest.raises(UserError, match="^one image is too few for this network's BatchNorm; give more"):
        calibrate(network, torch.randn(1, 3, 3, 3))


def test_hooks_on_one_network_are_not_on_the_next():
    target = make_target()
    calibrate = Calibrator(target, SharedTarget(target))
    first, _ = calibrate(other_weights(), make_images())
    seen = []
    first.register_forward_hook(lambda *_: seen.append("first"))
    second, _ = calibrate(other_weights(), make_images())
    features_of(second, make_images())
    assert not seen
    features_of(first, make_images())
    assert seen == ["first"]


def test_a_convnet3_with_all_blocks_takes_no_random_numbers_and_back_it_is_the_same():
    torch.manual_seed(0)
    target = build_target("convnet3", 3, 16)
    state = torch.get_rng_state()
    wide = all_blocks(target)
    assert torch.equal(torch.get_rng_state(), state) and wide.features == 3 * target.features
    wide.network.load_state_dict(target.network.state_dict(), strict=False)
    images = torch.randn(2, 3, 16, 16)
    alone = last_block_alone(wide.network.eval())
    assert not alone.training
    assert_close(alone(images), target.network.eval()(images))


@pytest.mark.parametrize("name", TARGETS)
def test_our_own_targets_pass_the_checks_of_a_users_network(name):
    """Which `build_target` leaves out for them, to save time."""
    ours = TARGETS[name](3)
    assert build_target(ours, 3, 32).predicted == build_target(name, 3, 32).predicted
