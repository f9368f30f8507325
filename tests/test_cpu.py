"""The CPU's layers are torch's: the same values and gradients, arranged otherwise."""

import copy
import shutil

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from pudnet.cpu import FusedBlock, accelerate, compiling_pays, useful_taps
from pudnet.hypernet.sketch import Normalize
from pudnet.targets import Block, SharedTarget, build_target
from tests.test_targets import make_target, other_weights

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")


def noise(*shape, seed=0):
    """Channels_last, as images come."""
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return values.contiguous(memory_format=torch.channels_last)


def own_statistics(module):
    """BatchNorm as it is in a `SharedTarget`, with affine parameters of both signs."""
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.track_running_stats, norm.running_mean, norm.running_var = False, None, None
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
    return module


def both_ways(module, images, compiled=False):
    """Output and gradients of a module as it is, and of the same one accelerated."""
    results = []
    for accelerated in (False, True):
        network = copy.deepcopy(module)
        if accelerated:
            accelerate(network, compiled)
        inputs = images.clone().requires_grad_()
        output = network(inputs)
        output.backward(noise(*output.shape, seed=1) if output.ndim == 4 else torch.ones_like(output))
        results.append([output, inputs.grad, *(p.grad for p in network.parameters())])
    return results


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(6, 8, 3, padding=1, bias=False),
        nn.Conv2d(6, 8, 3, padding=1, stride=2),
        nn.Conv2d(6, 8, 7, padding=3, stride=2, bias=False),
        nn.Conv2d(6, 8, (3, 5), padding=(1, 2)),
        nn.Conv2d(6, 8, 1, stride=2),
        nn.Conv2d(6, 8, 3, padding=1, groups=2),
        nn.Conv2d(6, 8, 3, padding=2, dilation=2),
        nn.Conv2d(6, 8, 3, padding="same"),
        nn.Conv2d(6, 8, 3, padding=1, padding_mode="reflect"),
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [1, 2, 3, 9, 12])
def test_convolution_has_torchs_values_and_gradients(conv, size):
    if conv.padding_mode == "reflect" and size < 2:
        pytest.skip("nothing to reflect")
    expected, found = both_ways(conv, noise(5, 6, size, size))
    assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "padding", "taps"),
    [
        (1, 3, 1, 1, (1, 2)),  # ResNets' last block on 32 px images: the centre
        (2, 3, 2, 1, (1, 3)),
        (2, 3, 1, 1, (0, 3)),
        (32, 7, 2, 3, (0, 7)),
        (2, 5, 2, 2, (2, 4)),
        (1, 1, 2, 0, (0, 1)),
        (1, 3, 2, 1, (1, 2)),
        (2, 6, 3, 3, (3, 5)),
        (1, 1, 2, 1, (0, 1)),  # none sees anything
    ],
)
def test_taps_that_meet_only_padding_are_left_out(size, kernel, stride, padding, taps):
    assert useful_taps(size, kernel, stride, padding) == slice(*taps)


@needs_compiler
@pytest.mark.parametrize("size", [8, 9])
def test_compiled_block_has_torchs_values_and_gradients(size):
    torch.manual_seed(0)
    block = own_statistics(Block(3, 16))
    expected, found = both_ways(block, noise(6, 3, size, size), compiled=True)
    assert_close(found, expected, rtol=1e-4, atol=1e-4)


@needs_compiler
def test_compiled_block_takes_a_mean_far_from_zero():
    torch.manual_seed(0)
    block = own_statistics(Block(3, 16))
    expected, found = both_ways(block, noise(6, 3, 8, 8) + 100, compiled=True)
    assert_close(found[0], expected[0], rtol=1e-3, atol=1e-3)


@needs_compiler
def test_compiled_normalisation_has_torchs_values_and_gradients():
    expected, found = both_ways(Normalize("group", 16), noise(6, 16, 8, 8), compiled=True)
    assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [8, 9])
@pytest.mark.parametrize("changes", [{}, {"dilation": 2}, {"ceil_mode": True}, {"padding": 1}, {"stride": 1}], ids=str)
def test_pooling_without_a_gradient_has_torchs_values(changes, size):
    pool, maps = nn.Sequential(nn.MaxPool2d(2, **changes)), noise(3, 4, size, size)
    expected = pool(maps)
    accelerate(pool)
    with torch.no_grad():
        assert torch.equal(pool(maps), expected)


@pytest.mark.parametrize("name", ["convnet3", "resnet18", "tests.nets:Depthwise"])
def test_accelerated_target_gives_the_same_features_and_keeps_its_parameters(name):
    target, weights, images = make_target(name), other_weights(name), noise(8, 3, 16, 16)
    shared = SharedTarget(target)
    expected, names = shared(images, weights), set(shared.state_dict())
    accelerate(shared)
    assert_close(shared(images, weights), expected, rtol=1e-4, atol=1e-4)
    assert set(shared.state_dict()) == names


def test_compiled_kernels_are_for_blocks_and_only_where_asked_for():
    network = build_target("convnet3", 3, 16).network
    accelerate(network)
    assert not any(isinstance(module, FusedBlock) for module in network)
    accelerate(network, compiled=True)
    assert sum(isinstance(module, FusedBlock) for module in network) == 3


@needs_compiler
def test_compiling_pays_in_a_long_run_only():
    assert compiling_pays(2_000, 500, 32) and not compiling_pays(100, 500, 32) and not compiling_pays(400, 300, 8)
