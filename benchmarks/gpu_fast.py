"""Part `fast`: training steps and predictions, on noise of CIFAR-100's shape."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

from benchmarks.data import IMAGES, make_groups, make_images
from benchmarks.floors import Machine, measure_machine
from benchmarks.gpu_report import Report, Run
from benchmarks.memory import peak_so_far
from benchmarks.prediction import on_device
from benchmarks.training import count_layers, make_model, make_trainer, step_floor, step_of
from pudnet.config import TrainConfig
from pudnet.data.images import StoreImages
from pudnet.device import clock, wants_bf16
from pudnet.errors import is_out_of_memory
from pudnet.evaluation import timed_adaptation
from pudnet.gpu import MODES

TOP = 10  # operators or kernels of a profile


class Contiguous(StoreImages):
    """The same images, each channel by itself in memory."""

    def __call__(self, indices: Any) -> Tensor:
        """As `StoreImages`, contiguous."""
        return super().__call__(indices).contiguous()


def measure(run: Run, report: Report) -> None:
    """What matters most first: a time limit may cut off the rest. A row that does not fit in memory says so."""
    bf16 = wants_bf16("auto", run.device)
    machine = measure_machine(run.device, torch.bfloat16 if bf16 else torch.float32)
    report.put("machine", machine.as_row())
    images = make_images(run.device)
    targets = ("convnet3",) if run.smallest else ("convnet3", "resnet18")
    for target in targets:
        for groups in (1, 2) if run.smallest else (1, 4, 16, 64):
            report.add("steps", step(run, target, images, machine, groups, "as trained"))
    report.show("steps")
    for target in ("convnet3",) if run.smallest else ("convnet3", "resnet18", "resnet34"):
        report.add("predictions", prediction(target, images, 2 if run.smallest else 50, bf16))
    report.show("predictions")
    several = 1 if run.smallest else 16
    for target in targets:
        for row in profiled(run, target, images, machine, several):
            report.add("profile", row)
    report.show("profile")
    others = ["contiguous"] if run.device.type == "cpu" else ["contiguous", *MODES]
    for target in targets:  # the compiled last: to compile takes longest
        for how in others:
            report.add("variants", step(run, target, images, machine, several, how))
    report.show("variants")


def step(run: Run, target: str, images: StoreImages, machine: Machine, groups: int, how: str) -> dict[str, Any]:
    """One row: a step on so many groups, as it is trained, or with another layout, or compiled."""
    row = {"target": target, "groups_a_step": groups, "how": how}
    try:
        torch.compiler.reset()
        if run.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        milliseconds = _milliseconds(_step(run, target, images, groups, how), run)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return row | {"failed": "out of memory"}
    floor = step_floor(target, images, machine)
    return row | {
        "ms_a_step": milliseconds,
        "ms_a_group": milliseconds / groups,
        "images_a_second": 1000 * groups * IMAGES / milliseconds,
        "percent_of_peak": 100 * floor.operations_ms * groups / milliseconds,
        "times_the_floor": milliseconds / groups / floor.floor_ms,
        "peak_memory_mb": peak_so_far(run.device),
    }


def _step(run: Run, target: str, images: StoreImages, groups: int, how: str = "as trained") -> Callable[[], None]:
    """A training's step, of a table that is long enough for what is measured, and too short for a CPU to compile."""
    config = TrainConfig(groups_per_step=groups, compile=how if how in MODES else "none")
    length = groups * (10 if run.smallest else 200)
    if how != "contiguous":
        return step_of(make_trainer(target, images, config, length))
    trainer = make_trainer(target, make_images(run.device, Contiguous), config, length)
    trainer.learner.to(memory_format=torch.contiguous_format)
    return step_of(trainer)


def _milliseconds(work: Callable[[], None], run: Run) -> float:
    """A step: median of rounds, the device waited for at the end of each, as a training does at its reports."""
    warm_up, rounds, steps = (1, 2, 1) if run.smallest else (5, 5, 10)
    for _ in range(warm_up):
        work()
    times = []
    for _ in range(rounds):
        start = clock(run.device)
        for _ in range(steps):
            work()
        times.append((clock(run.device) - start) / steps)
    return median(times)


def prediction(target: str, images: StoreImages, repeats: int, bf16: bool) -> dict[str, Any]:
    """One row: from 500 images to a network in eval mode, median, the device waited for each time.

    `adapted`: from images on the device; `predict`: the one call, from the same images and labels in memory.
    """
    predictor, groups = on_device(target, images.device, "pudnet"), make_groups(3 + repeats)
    adapted = [timed_adaptation(predictor, images, group, bf16)[1] for group in groups][3:]
    called = []
    for group in groups:
        pixels, labels = images.raw(group).cpu().numpy(), images.labels[group]
        start = clock(images.device)
        predictor.predict(pixels, labels)
        called.append(clock(images.device) - start)
    return {
        "target": target,
        "adapted_ms": median(adapted),
        "predict_ms": median(called[3:]),
        "weights": predictor.target.predicted,
        "repeats": repeats,
    }


def profiled(run: Run, target: str, images: StoreImages, machine: Machine, groups: int) -> list[dict[str, Any]]:
    """The kernels (on a CPU: operators) that a step spends most in, and the convolutions' share of the peak."""
    cuda, steps = run.device.type == "cuda", 1 if run.smallest else 3
    work = _step(run, target, images, groups)
    for _ in range(1 if run.smallest else 5):
        work()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    with profile(activities=activities) as seen:
        for _ in range(steps):
            work()
        clock(run.device)
    events = seen.key_averages()
    own, whole = ("self_device_time_total", "device_time_total") if cuda else ("self_cpu_time_total", "cpu_time_total")
    shown = [event for event in events if (event.device_type == DeviceType.CUDA) == cuda]
    shown.sort(key=lambda event: -getattr(event, own))
    rows = [
        {"target": target, "what": each.key[:60], "ms_a_step": getattr(each, own) / 1000 / steps, "calls": each.count}
        for each in shown[:TOP]
    ]
    names = ("aten::convolution", "aten::convolution_backward")
    spent = sum(getattr(event, whole) for event in outermost(seen.events(), names)) / 1000 / steps
    counted = count_layers(make_model(target)[0].to(run.device), images, machine)
    wanted = 1000 * groups * sum(operations for operations, _ in counted.layers)
    share = 100 * wanted / spent if spent else None
    return [*rows, {"target": target, "what": "all convolutions", "ms_a_step": spent, "percent_of_peak": share}]


def outermost(events: Iterable[FunctionEvent], names: Collection[str]) -> list[FunctionEvent]:
    """The events of these names whose parent has another name: under vmap an operator calls itself."""
    return [
        each for each in events if each.name in names and not (each.cpu_parent and each.cpu_parent.name == each.name)
    ]
