"""The CPU's layers are torch's: the same values and gradients, arranged otherwise."""

import copy
import itertools
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from pudnet.cpu import FusedBlock, _Kernel, accelerate, compiling_pays, useful_taps
from pudnet.targets import Block, SharedTarget, build_target
from tests.test_targets import make_target, other_weights

pytestmark = pytest.mark.numeric

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


def closed_form(images, weight, gradient, stride, padding):
    """A convolution's output, and the gradients of images and weight under the output's, in float64, tap by tap."""
    images, weight, gradient = images.double(), weight.double(), gradient.double()
    padded = F.pad(images, (padding[1], padding[1], padding[0], padding[0]))
    rows, columns = ((n - k) // s + 1 for n, k, s in zip(padded.shape[2:], weight.shape[2:], stride, strict=True))
    taps = list(itertools.product(range(weight.shape[2]), range(weight.shape[3])))

    def seen(maps, tap):
        (a, b), (down, across) = tap, stride
        return maps[:, :, a : a + down * (rows - 1) + 1 : down, b : b + across * (columns - 1) + 1 : across]

    output = sum(torch.einsum("nchw,oc->nohw", seen(padded, tap), weight[:, :, *tap]) for tap in taps)
    of_weight, of_padded = torch.zeros_like(weight), torch.zeros_like(padded)
    for tap in taps:
        of_weight[:, :, *tap] = torch.einsum("nchw,nohw->oc", seen(padded, tap), gradient)
        seen(of_padded, tap).add_(torch.einsum("nohw,oc->nchw", gradient, weight[:, :, *tap]))
    height, width = images.shape[2:]
    return output, of_padded[:, :, padding[0] :, padding[1] :][:, :, :height, :width], of_weight


def test_a_network_that_leaves_the_cpu_has_torchs_own_convolutions():
    layers = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1))
    accelerate(layers)
    images = torch.rand(2, 3, 8, 8)
    own, elsewhere = layers(images), layers.to("meta")(images.to("meta"))
    assert own.shape == elsewhere.shape
    assert type(elsewhere.grad_fn).__name__ == "ConvolutionBackward0" != type(own.grad_fn).__name__


@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (3, 3), (2, 1)], ids=str)
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (7, 7), (3, 5)], ids=str)
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
def test_convolution_has_the_values_and_gradients_of_its_closed_form(layout, kernel, stride):
    """oneDNN has kernels of their own for few channels, and one of them, for less than 8, is wrong (pudnet/cpu.py)."""
    padding = (kernel[0] // 2, kernel[1] // 2)
    for size, channels in itertools.product((1, 2, 3, 9, 12), (1, 2, 3, 4, 7, 8, 16, 17)):
        conv = nn.Conv2d(channels, 8, kernel, stride, padding, bias=False).to(memory_format=layout)
        accelerate(conv)
        images = noise(5, channels, size, size, seed=channels).contiguous(memory_format=layout).requires_grad_()
        output = conv(images)
        gradient = noise(*output.shape, seed=1).contiguous(memory_format=layout)
        output.backward(gradient)
        expected = closed_form(images.detach(), conv.weight.detach(), gradient, stride, padding)
        for found, right in zip((output, images.grad, conv.weight.grad), expected, strict=True):
            error = (found.double() - right).abs().max() / (right.abs().max() + 0.1)
            assert found.shape == right.shape and error < 1e-4, f"{size} px, {channels} channel(s)"


class OfAUser(nn.Conv2d):
    """A layer of a class that is not torch's, as weight-standardised convolutions are."""

    def forward(self, images):
        return F.conv2d(images, 2 * self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


@pytest.mark.parametrize("kind", ["bias", "valid", "circular", "dilated", "grouped", "padded", "one image", "user's"])
@pytest.mark.parametrize("channels", [3, 6, 16])
def test_strided_pointwise_layers_of_every_kind_are_right(kind, channels):
    """None reaches the kernel of oneDNN that is wrong for them."""
    changes = {
        "valid": {"padding": "valid"},
        "circular": {"padding_mode": "circular"},
        "dilated": {"dilation": 2},
        "grouped": {"groups": channels},
        "padded": {"padding": 1},
    }
    layer = OfAUser if kind == "user's" else nn.Conv2d
    conv = layer(channels, 2 * channels, 1, 2, bias=kind == "bias", **changes.get(kind, {}))
    conv = conv.to(memory_format=torch.channels_last)
    images = noise(5, channels, 12, 12).requires_grad_()
    accelerate(conv)
    accelerate(conv)  # a second time changes nothing
    output = torch.stack([conv(image) for image in images]) if kind == "one image" else conv(images)
    output.backward(gradient := noise(*output.shape, seed=1))

    padding = (1, 1) if kind == "padded" else (0, 0)
    weight = conv.weight.detach() * (2 if kind == "user's" else 1)
    if kind == "grouped":  # each channel is alone
        parts = zip(images.detach().split(1, 1), weight.split(2), gradient.split(2, 1), strict=True)
        alone = zip(*(closed_form(*part, (2, 2), padding) for part in parts), strict=True)
        values, of_images, of_weight = (torch.cat(each, axis) for each, axis in zip(alone, (1, 1, 0), strict=True))
    else:
        values, of_images, of_weight = closed_form(images.detach(), weight, gradient, (2, 2), padding)
    of_weight = of_weight * (2 if kind == "user's" else 1)
    bias = 0 if conv.bias is None else conv.bias.detach().double()[:, None, None]
    assert_close(output.double(), values + bias, rtol=1e-4, atol=1e-5)
    assert_close(images.grad.double(), of_images, rtol=1e-4, atol=1e-5)
    assert_close(conv.weight.grad.double(), of_weight, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(6, 8, 3, padding=1, groups=2),
        nn.Conv2d(6, 8, 3, padding=2, dilation=2),
        nn.Conv2d(6, 8, 3, padding="same"),
        nn.Conv2d(6, 8, 3, padding=1, padding_mode="reflect"),
    ],
    ids=str,
)
def test_unusual_convolutions_are_left_to_torch(conv):
    accelerate(conv)
    assert type(conv) is nn.Conv2d


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


@pytest.mark.parametrize("size", [8, 9])
@pytest.mark.parametrize("changes", [{}, {"dilation": 2}, {"ceil_mode": True}, {"padding": 1}, {"stride": 1}], ids=str)
def test_pooling_without_a_gradient_has_torchs_values(changes, size):
    pool, maps = nn.Sequential(nn.MaxPool2d(2, **changes)), noise(3, 4, size, size)
    expected = pool(maps)
    accelerate(pool)
    with torch.no_grad():
        assert torch.equal(pool(maps), expected)
        assert torch.equal(pool(maps[0]), expected[0])  # one image


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
def test_compiling_pays_in_a_long_run_of_convnet3_only():
    convnet, resnet = (build_target(name, 3, 32).network for name in ("convnet3", "resnet18"))
    assert compiling_pays(convnet, 2_000, 500, 32) and not compiling_pays(convnet, 100, 500, 32)
    assert not compiling_pays(convnet, 400, 300, 8)
    assert not compiling_pays(resnet, 2_000, 500, 32)  # it has no layer that is compiled


def test_what_torch_fails_to_compile_runs_as_it_is(caplog):
    """`make faults` has the real thing: a file of torch's cache that was cut short."""

    def fails(x: torch.Tensor) -> torch.Tensor:
        raise ImportError("moments.so: file too short")

    kernel = _Kernel(lambda x: x + 1)
    kernel.run = fails
    for _ in range(2):
        assert_close(kernel(torch.ones(3)), torch.full((3,), 2.0))
    assert not kernel.compiled
    assert caplog.text.count("file too short") == 1 and "delete its cache" in caplog.text
