"""Makes training fast on a CPU: the same arithmetic, arranged for groups of a few hundred small images.

At these sizes a step is limited by memory traffic and by three operators that are slow in torch's CPU back end:
BatchNorm and max-pooling of large maps, the weight gradient of convolutions on small maps, and convolutions
whose kernel mostly meets padding. `accelerate` swaps such layers in place; parameters and their names stay.
benchmarks/README.md says how much each saves.

This file also avoids a bug in oneDNN. On processors without AVX-512, the weight gradient of a strided 1x1 convolution
in channels_last with fewer than 8 input channels writes outside its memory (uxlfoundation/oneDNN#6035, in the
oneDNN 3.13.3 of torch 2.15.0). Therefore every 1x1 convolution runs with stride 1 on the pixels that its stride
would have picked.
"""

from __future__ import annotations

import ctypes
import logging
import os
import shutil
from collections.abc import Callable
from functools import cache, cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from pudnet.errors import words
from pudnet.targets import WIDTH, Block

logger = logging.getLogger(__name__)

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's malloc.h
SMALL_MAP = 16  # up to this many output positions, a weight gradient is faster as one matrix product
COMPILE_SECONDS = 12.0  # to compile everything, if torch's cache is empty
SECONDS_SAVED = 2e-9  # by compiled kernels, in each step, for each activation of the first layer


def keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next step, since paging it in again for every large tensor is slow.

    The peak of memory use does not grow, but the process stays at it. Does nothing with other C libraries.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def compiling_pays(model: nn.Module, groups: int, images: int, image_size: int) -> bool:
    """Whether a run is long enough for torch.compile to save time, and there is a C++ compiler that works.

    The run passes so many groups of so many images, of `image_size` pixels, through the model. What `accelerate`
    compiles is ConvNet-3's blocks.
    """
    saved = groups * images * image_size**2 * WIDTH * SECONDS_SAVED
    has_blocks = any(type(module) is Block for module in model.modules())
    return has_blocks and saved > 2 * COMPILE_SECONDS and _can_compile()


@cache
def _can_compile() -> bool:
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        return False
    kernel = _kernel(_moments)
    kernel(torch.ones(1, 1, 1, 8), torch.ones(8))
    return kernel.compiled


def accelerate(model: nn.Module, compiled: bool = False) -> None:
    """Replace a model's slow layers by those of this file, in place. `compiled`: also by those that need a compiler."""
    for module in model.modules():
        if type(module) is nn.Conv2d and _is_usual(module):
            module.__class__ = Conv2d
        elif isinstance(module, nn.Conv2d) and not isinstance(module, Conv2d):
            _pick_pixels_first(module)
        if type(module) is nn.MaxPool2d and (module.kernel_size, module.stride, module.dilation) == (2, 2, 1):
            module.__class__ = MaxPool2x2
        if compiled and type(module) is Block:
            module.__class__ = FusedBlock


def plain_layers(model: nn.Module) -> None:
    """Undo `accelerate`, in place, except in layers that only pick their pixels first (`_pick_pixels_first`)."""
    for module in model.modules():
        for fast in (Conv2d, MaxPool2x2, FusedBlock):
            if type(module) is fast:
                module.__class__ = fast.__base__


def _is_usual(conv: nn.Conv2d) -> bool:
    zeros = conv.padding_mode == "zeros" and not isinstance(conv.padding, str)
    return zeros and conv.groups == 1 and conv.dilation == (1, 1)


def _pick_pixels_first(conv: nn.Conv2d) -> None:
    """Make a strided 1x1 layer that `Conv2d` cannot replace run with stride 1, on the pixels that it sees."""
    unpadded = conv.padding in ((0, 0), "valid")
    if conv.kernel_size == (1, 1) and unpadded and conv.stride != (1, 1):
        conv.register_forward_pre_hook(partial(_picked, stride=conv.stride))
        conv.stride = (1, 1)


def _picked(conv: nn.Module, args: tuple[Tensor], stride: tuple[int, int]) -> tuple[Tensor]:
    return (args[0][..., :: stride[0], :: stride[1]],)


class Conv2d(nn.Conv2d):
    """A faster `nn.Conv2d`: it skips taps that only meet padding, and has its own weight gradient for small maps.

    For instance, ResNets turn 32 px images into 1x1 maps, where only one tap of a 3x3 kernel sees a pixel. It replaces
    layers without groups or dilation that are padded with zeros.
    """

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, d_in, H, W) -> (N, d_out, H', W'); one image (d_in, H, W) -> (d_out, H', W')."""
        if images.device.type != "cpu":  # the network was moved
            return super().forward(images)
        if images.ndim == 3:
            return self(images.unsqueeze(0)).squeeze(0)
        if torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
            images, weight = images.to(dtype), self.weight.to(dtype)
        else:
            weight = self.weight
        sizes = zip(images.shape[2:], self.kernel_size, self.stride, self.padding, strict=True)
        rows, columns = (useful_taps(*size) for size in sizes)
        weight = weight[:, :, rows, columns]
        padding = (self.padding[0] - rows.start, self.padding[1] - columns.start)
        if torch.is_grad_enabled():
            output = _Convolution.apply(images, weight, self.stride, padding)
        else:
            output = _convolution(images, weight, self.stride, padding)
        return output if self.bias is None else output + self.bias.to(output.dtype)[:, None, None]


@cache
def useful_taps(size: int, kernel: int, stride: int, padding: int) -> slice:
    """The taps of a kernel that meet pixels and not only padding, along one axis of `size` pixels.

    All taps, if skipping some would need different padding on the two sides.
    """
    outputs = (size + 2 * padding - kernel) // stride + 1
    seen = [t for t in range(kernel) if any(0 <= o * stride - padding + t < size for o in range(outputs))]
    if not seen:
        return slice(0, kernel)
    first, last = seen[0], seen[-1] + 1
    rest = padding - first
    same = rest >= 0 and (size + 2 * rest - (last - first)) // stride + 1 == outputs
    return slice(first, last) if same else slice(0, kernel)


def patches(images: Tensor, kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int]) -> Tensor:
    """Images (N, d, H, W), channels_last -> the patches a convolution sees (N * H' * W', kh * kw * d)."""
    vertical, horizontal = padding
    padded = F.pad(images.permute(0, 2, 3, 1), (0, 0, horizontal, horizontal, vertical, vertical))
    windows = padded.unfold(1, kernel[0], stride[0]).unfold(2, kernel[1], stride[1])  # (N, H', W', d, kh, kw)
    return windows.permute(0, 1, 2, 4, 5, 3).flatten(3).flatten(0, 2)


def _step(weight: Tensor, stride: tuple[int, int], padding: tuple[int, int]) -> tuple[int, int]:
    """The spacing of the pixels that a kernel (d_out, d_in, kh, kw) reads: its stride if it is 1x1, else (1, 1)."""
    return stride if weight.shape[2:] == (1, 1) and padding == (0, 0) else (1, 1)


def _convolution(images: Tensor, weight: Tensor, stride: tuple[int, int], padding: tuple[int, int]) -> Tensor:
    """`F.conv2d` without a bias; a 1x1 kernel runs with stride 1 on the pixels that it sees."""
    down, across = _step(weight, stride, padding)
    unit = (stride[0] // down, stride[1] // across)
    return F.conv2d(images[:, :, ::down, ::across], weight, None, unit, padding)


class _Convolution(torch.autograd.Function):
    """A convolution whose weight gradient on small maps is one product, of patches with the output's gradient."""

    @staticmethod
    def forward(images: Tensor, weight: Tensor, stride: tuple, padding: tuple) -> Tensor:
        return _convolution(images, weight, stride, padding)

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple, output: Tensor) -> None:
        images, weight, ctx.stride, ctx.padding = inputs
        ctx.save_for_backward(images, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, Tensor, None, None]:
        images, weight = ctx.saved_tensors
        small = gradient.shape[2] * gradient.shape[3] <= SMALL_MAP
        needed = [ctx.needs_input_grad[0], ctx.needs_input_grad[1] and not small, False]
        of_images = of_weight = None
        if any(needed):
            down, across = _step(weight, ctx.stride, ctx.padding)
            unit = (ctx.stride[0] // down, ctx.stride[1] // across)
            picked = images[:, :, ::down, ::across]
            of_images, of_weight, _ = torch.ops.aten.convolution_backward(
                gradient, picked, weight, None, unit, ctx.padding, (1, 1), False, (0, 0), 1, needed
            )
            if needed[0] and picked.shape != images.shape:  # the skipped pixels have a gradient of zero
                of_picked, of_images = of_images, torch.zeros_like(images)
                of_images[:, :, ::down, ::across] = of_picked
        if small:
            seen = patches(images, weight.shape[2:], ctx.stride, ctx.padding)
            flat = gradient.permute(0, 2, 3, 1).flatten(0, 2)  # (N * H' * W', d_out)
            of_weight = (flat.T @ seen).view(len(weight), *weight.shape[2:], -1).permute(0, 3, 1, 2)
        return of_images, of_weight, None, None


class MaxPool2x2(nn.MaxPool2d):
    """2x2 max-pooling as three elementwise maxima, if no gradient is needed."""

    def forward(self, maps: Tensor) -> Tensor:
        """Maps (N, C, H, W) -> (N, C, H // 2, W // 2); one image's (C, H, W) likewise."""
        if torch.is_grad_enabled() or maps.shape[-2] % 2 or maps.shape[-1] % 2 or self.padding or self.return_indices:
            return super().forward(maps)
        rows = torch.maximum(maps[..., ::2, :], maps[..., 1::2, :])
        return torch.maximum(rows[..., ::2], rows[..., 1::2])


class FusedBlock(Block):
    """ConvNet-3's block with BatchNorm, pooling and ReLU as compiled kernels, on the images' own statistics."""

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, d_in, H, W) -> (N, d_out, H // 2, W // 2)."""
        maps = self.conv(images)
        if maps.shape[2] % 2 or maps.shape[3] % 2:  # the kernels need complete windows; odd maps are small anyway
            return self.relu(self.pool(self.norm(maps)))
        rows = maps.permute(0, 2, 3, 1).contiguous()
        return _NormPoolReLU.apply(rows, self.norm.weight, self.norm.bias, self.norm.eps).permute(0, 3, 1, 2)


class _NormPoolReLU(torch.autograd.Function):
    r"""BatchNorm on the batch's statistics, 2x2 max-pooling and ReLU, forward and backward in two passes each.

    Forward: :math:`y = a x + b` with :math:`a = \gamma / \sigma`, :math:`b = \beta - a \mu`. Each window outputs its
    largest y, or 0 if that is negative; `place` says which of the four won (4: none). Backward:
    :math:`dx = a (g - (\sum g + \hat x \sum g \hat x) / P)`, with g the gradient at winners and 0 elsewhere, and P the
    number of values in a channel.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        mean, deviation = _statistics(x, eps)
        a = weight / deviation
        pooled, winner, place = _kernel(_pool)(_windows(x), a, bias - a * mean)
        ctx.save_for_backward(x, winner, place, a, mean, deviation)
        return pooled

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, winner, place, a, mean, deviation = ctx.saved_tensors
        gradient = gradient.contiguous()
        total, product = (each.sum(0) for each in _kernel(_sums)(gradient, winner, place, mean))
        product = product / deviation
        count = x.numel() / x.shape[-1]
        slope = -a * product / deviation / count
        dx = _kernel(_spread)(_windows(x), gradient, place, a, -a * total / count - slope * mean, slope)
        return dx.view(x.shape), product, total, None


def _windows(x: Tensor) -> Tensor:
    """View maps (N, H, W, C) as windows (N, H / 2, 2, W / 2, 2, C)."""
    n, height, width, channels = x.shape
    return x.view(n, height // 2, 2, width // 2, 2, channels)


def _statistics(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (C,) of maps (N, H, W, C).

    Computed after subtracting one pixel's values, to keep precision if the mean is large.
    """
    shift, count = x[0, 0, 0].float(), x.numel() / x.shape[-1]
    total, squares = (each.sum(0) / count for each in _kernel(_moments)(x, shift))
    return total + shift, ((squares - total * total).clamp_min(0) + eps).sqrt()


def _moments(x: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """For each image, the sum (N, C) of its maps (N, H, W, C) less `shift`, and the sum of their squares."""
    values = x.flatten(1, 2).float() - shift
    return values.sum(1), (values * values).sum(1)


def _pool(windows: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For each window (N, h, w, C): the largest `a * x + b`, or 0; the x that gives it; its place 0..3, 4 for none."""
    x = [windows[:, :, i, :, j].float() for i in (0, 1) for j in (0, 1)]
    y = [corner * a + b for corner in x]
    top, bottom = torch.maximum(y[0], y[1]), torch.maximum(y[2], y[3])
    left, right = y[0] >= y[1], y[2] >= y[3]
    upper, largest = top >= bottom, torch.maximum(top, bottom)
    winner = torch.where(upper, torch.where(left, x[0], x[1]), torch.where(right, x[2], x[3]))
    place = torch.where(upper, torch.where(left, 0.0, 1.0), torch.where(right, 2.0, 3.0))
    place = torch.where(largest > 0, place, 4.0)
    return largest.relu().to(windows.dtype), winner.to(windows.dtype), place.to(torch.uint8)


def _sums(gradient: Tensor, winner: Tensor, place: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """For each image, the sum (N, C) of the winners' gradients g, and of g times the winner's distance to the mean."""
    g = torch.where(place.float() < 4, gradient.float(), 0.0)
    return g.flatten(1, 2).sum(1), (g * (winner.float() - mean)).flatten(1, 2).sum(1)


def _spread(windows: Tensor, gradient: Tensor, place: Tensor, a: Tensor, level: Tensor, slope: Tensor) -> Tensor:
    """The gradient (N, h, 2, w, 2, C) of the maps: `level + slope * x`, plus `a * g` at winners."""
    corner = torch.arange(4, dtype=torch.float32).view(2, 1, 2, 1)
    here = place[:, :, None, :, None].float() == corner
    g = torch.where(here, gradient[:, :, None, :, None].float() * a, 0.0)
    return (g + level + slope * windows.float()).to(windows.dtype)


class _Kernel:
    """A function of this file, compiled; the plain one, which is slower, once torch fails to compile it.

    A compiler that fails, or a file of torch's cache that was cut short when a training was killed, can raise any type
    of error. Code for all sizes of maps at once would be slower, so that each size is compiled.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.compiled = function, True

    @cached_property
    def run(self) -> Callable[..., Any]:
        """The compiled function. Made at the first call, so that an error of torch.compile itself is caught, too."""
        return torch.compile(self.function, dynamic=False)

    def __call__(self, *inputs: Any) -> Any:
        if not self.compiled:
            return self.function(*inputs)
        try:
            return self.run(*inputs)
        except Exception as error:
            why = words(error, 200)
            logger.warning("torch.compile failed, so steps are slower; it may help to delete its cache (%s)", why)
            self.compiled = False
            return self.function(*inputs)


_kernel = cache(_Kernel)  # so that each function is compiled once in a process
