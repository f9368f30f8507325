"""The two floors of a training step: operations over the measured peak, bytes over the measured bandwidth.

What has to be done is counted layer by layer, for a perfect implementation of each:

- a convolution or linear layer multiplies once forward, and once for each gradient backward; taps of a kernel
  that meet only padding are not counted;
- every layer but ReLU and additions reads its input and writes its output forward, and backward reads its input
  and its output's gradient and writes its input's gradient;
- a parameter is read forward, its gradient written and read (the norm), and Adam reads four numbers for each
  and writes three, all in fp32.

A layer takes at least the longer of its two times; the floor is their sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from pudnet.cpu import useful_taps
from pudnet.device import clock

COUNTED = (nn.Conv2d, nn.Linear, nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.MaxPool2d)
PARAMETER_BYTES = 4 * (1 + 2 + 7)


def seconds(work: Callable[[], object], device: torch.device, repeats: int = 10) -> float:
    """The shortest of several runs of `work`, after warm-up: what the machine can do undisturbed."""
    times = []
    for _ in range(2 + repeats):
        start = clock(device)
        work()
        times.append(clock(device) - start)
    return min(times[2:]) / 1000


@dataclass(frozen=True)
class Machine:
    """What this machine can do at a precision: a square product of 2,048, a copy of 64 MiB.

    On a GPU of 8,192, and of 1 GiB: the smaller ones take it less time than to begin.
    """

    device: str
    threads: int
    dtype: str
    flops: float  # a second
    bandwidth: float  # bytes a second, read and written
    itemsize: int

    def as_row(self) -> dict[str, object]:
        """In the units people use."""
        row = asdict(self) | {"tflops": self.flops / 1e12, "gigabytes_per_second": self.bandwidth / 1e9}
        return {key: row[key] for key in ("device", "threads", "dtype", "tflops", "gigabytes_per_second")}


def measure_machine(device: torch.device, dtype: torch.dtype) -> Machine:
    """Measure the peak and the bandwidth that floors are computed from."""
    side, size = (2048, 2**26) if device.type == "cpu" else (8192, 2**30)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    copy = torch.empty_like(source)
    return Machine(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        threads=torch.get_num_threads(),
        dtype=str(dtype).removeprefix("torch."),
        flops=2 * side**3 / seconds(lambda: a @ b, device),
        bandwidth=2 * source.numel() / seconds(lambda: copy.copy_(source), device),
        itemsize=dtype.itemsize,
    )


@dataclass(frozen=True)
class Floor:
    """Milliseconds that a step takes at least."""

    operations_ms: float
    bytes_ms: float
    floor_ms: float  # the longer of the two for each layer


class Counter:
    """Counts the layers that a forward pass goes through, and what a step of training has to do for each."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.layers: list[tuple[float, float]] = []  # seconds of operations, of bytes

    def watch(self, model: nn.Module) -> list[torch.utils.hooks.RemovableHandle]:
        """Count every forward call of the model's layers from now on, until the handles are removed."""
        return [m.register_forward_hook(self._count) for m in model.modules() if isinstance(m, COUNTED)]

    def product(self, operations: float, moved: float) -> None:
        """Count a product that is no layer, by its multiplications and additions and its numbers in fp32."""
        self.layers.append((operations / self.machine.flops, 4 * moved / self.machine.bandwidth))

    def floor(self, parameters: int) -> Floor:
        """The floor of a step of training, the optimizer's part included."""
        self.product(0, parameters * PARAMETER_BYTES / 4)
        operations, moved = (1000 * sum(column) for column in zip(*self.layers, strict=True))
        return Floor(operations, moved, 1000 * sum(max(layer) for layer in self.layers))

    def _count(self, layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        (images,) = inputs
        first = not images.requires_grad  # no gradient is asked of the images themselves
        moved = (2 if first else 3) * images.numel() + 2 * output.numel()
        operations = (2 if first else 3) * 2 * output.numel() * _taps(layer, images)
        self.layers.append((operations / self.machine.flops, moved * self.machine.itemsize / self.machine.bandwidth))


def _taps(layer: nn.Module, images: Tensor) -> float:
    """Multiplications for each output value."""
    if isinstance(layer, nn.Linear):
        return layer.in_features
    if not isinstance(layer, nn.Conv2d):
        return 0
    sizes = zip(images.shape[2:], layer.kernel_size, layer.stride, layer.padding, strict=True)
    kernel = [taps.stop - taps.start for taps in (useful_taps(*size) for size in sizes)]
    return layer.in_channels / layer.groups * math.prod(kernel)
