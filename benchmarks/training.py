"""How fast a training step is, against the floor and against the straightforward way: `python -m benchmarks.training`.

Compared versions take turns in one process, so that their ratio holds on a noisy machine.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import itertools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Column, Table
from torch import nn

from benchmarks.data import CHANNELS, CLASSES, CLASSES_PER_GROUP, SIZE, make_groups, make_images, positive_number
from benchmarks.floors import Counter, Floor, Machine, measure_machine
from benchmarks.memory import peak_of, peak_so_far
from pipeline.project import write_json
from pipeline.runs.trial import pick_device
from pudnet import cpu
from pudnet.config import ModelConfig, TrainConfig, default_extractor
from pudnet.data.images import StoreImages
from pudnet.device import clock, wants_bf16
from pudnet.errors import exit_code
from pudnet.files import check_writable
from pudnet.hypernet import PudNet
from pudnet.learner import MetaLearner
from pudnet.objective import Objective
from pudnet.targets import Target, build_target
from pudnet.training import Trainer

TARGETS = ("convnet3", "resnet18")
LONG_RUN = 10_000  # groups: long enough for torch.compile, where it is ever used


def make_model(target: str) -> tuple[PudNet, Target]:
    """An untrained PudNet for a target, the same at every call."""
    torch.manual_seed(0)
    config, plain = ModelConfig(extractor=default_extractor(target)), build_target(target, CHANNELS, SIZE)
    return PudNet(config, plain), plain


def make_trainer(target: str, images: StoreImages, config: TrainConfig, groups: int = LONG_RUN) -> Trainer:
    """A training of so many groups."""
    table, classes = make_groups(groups), tuple(range(CLASSES))
    model, plain = make_model(target)
    return Trainer(MetaLearner(model, plain, config, CLASSES, CLASSES_PER_GROUP), images, table, classes, config)


def step_of(trainer: Trainer) -> Callable[[], None]:
    """A step as the pipeline makes it: `Trainer`'s own. After the table's end it begins anew."""
    size = trainer.config.groups_per_step

    def step() -> None:
        if trainer.groups + size > trainer.size:
            trainer.groups = 0
        trainer._step(trainer.table[trainer.groups : trainer.groups + size])

    return step


def as_trained(target: str, images: StoreImages, groups_per_step: int = 1) -> Callable[[], None]:
    """A step of a long training."""
    return step_of(make_trainer(target, images, TrainConfig(groups_per_step=groups_per_step)))


def straightforward(target: str, images: StoreImages) -> Callable[[], None]:
    """The same step without any care: one group, fp32, contiguous, torch's own layers and defaults."""
    model, plain = make_model(target)
    model.to(images.device)
    table, turn = make_groups(LONG_RUN), itertools.cycle(range(LONG_RUN))
    objective = Objective(TrainConfig(), plain.features, CLASSES).to(images.device)
    parameters = [*model.parameters(), *objective.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=1e-3)

    def step() -> None:
        group = table[next(turn)]
        batch = images(group).contiguous()
        features = model.shared(batch, model.generate(model.sketch(batch)))
        columns = torch.from_numpy(images.block_classes(group)).to(images.device)
        optimizer.zero_grad()
        objective(features, columns).total.backward()
        nn.utils.clip_grad_norm_(parameters, 10.0)
        optimizer.step()

    return step


def give_back_freed_memory() -> None:
    """Undo `keep_freed_memory`: glibc's defaults, for the straightforward version."""
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(cpu.M_MMAP_MAX, 65536)
        libc.mallopt(cpu.M_TRIM_THRESHOLD, 128 * 1024)
        libc.malloc_trim(0)
    except (OSError, AttributeError):
        return


def times_in_turns(
    versions: dict[str, Callable[[], None]], device: torch.device, budget_s: float
) -> dict[str, list[float]]:
    """Milliseconds of each version's steps, in turns of two steps after warm-up, until the budget is spent."""
    times: dict[str, list[float]] = {name: [] for name in versions}
    begin = time.perf_counter()
    while time.perf_counter() - begin < budget_s or min(map(len, times.values())) < 3:
        for name, step in versions.items():
            (give_back_freed_memory if name == "straightforward" else cpu.keep_freed_memory)()
            step()  # warms caches (and the allocator) up again after the other's turn
            for _ in range(2):
                start = clock(device)
                step()
                times[name].append(clock(device) - start)
    return times


def count_layers(model: PudNet, images: StoreImages, machine: Machine) -> Counter:
    """What one step on one group has to do in the layers of extractor and target."""
    counter = Counter(machine)
    handles = [*counter.watch(model.extractor), *counter.watch(model.shared)]
    batch = images(make_groups(1)[0])
    model.shared(batch, model.generate(model.sketch(batch)))
    for handle in handles:
        handle.remove()
    return counter


def step_floor(target: str, images: StoreImages, machine: Machine) -> Floor:
    """What one step on one group has to do: extractor, target, generators, optimizer."""
    model = make_model(target)[0].to(images.device)
    counter = count_layers(model, images, machine)
    for generator in model.generators:
        rows, columns = generator.expand.shape
        counter.product(3 * 2 * rows * columns * generator.positions, 3 * rows * generator.positions)
    return counter.floor(sum(parameter.numel() for parameter in model.parameters()))


def _measure_memory(target: str) -> None:
    """Print the peak memory (MB) of this process after three steps."""
    device = pick_device()
    step = as_trained(target, make_images(device))
    for _ in range(3):
        step()
    print(peak_so_far(device))


def measure(target: str, images: StoreImages, machine: Machine, batch: int, budget_s: float) -> dict[str, object]:
    """One target's row."""
    torch.compiler.reset()  # kernels are compiled for each size: another target, other sizes
    versions = {
        "straightforward": straightforward(target, images),
        "as trained": as_trained(target, images),
        f"{batch} groups a step": as_trained(target, images, batch),
    }
    times = times_in_turns(versions, images.device, budget_s)
    milliseconds = {name: median(values) for name, values in times.items()}
    milliseconds[f"{batch} groups a step"] /= batch
    floor = step_floor(target, images, machine)
    return {
        "target": target,
        "parameters": sum(p.numel() for p in make_model(target)[0].parameters()),
        "milliseconds_a_group": milliseconds,
        "floor": dataclasses.asdict(floor),
        "ratio_to_floor": milliseconds["as trained"] / floor.floor_ms,
        "speedup": milliseconds["straightforward"] / milliseconds["as trained"],
        "peak_memory_mb": peak_of("benchmarks.training", target),
    }


def show(machine: Machine, rows: list[dict]) -> None:
    """Print the table, a column a target."""
    about = machine.as_row()
    print(
        f"{about['device']}, {about['threads']} threads, {about['dtype']}: peak {about['tflops']:.2f} TFLOP/s, "
        f"{about['gigabytes_per_second']:.0f} GB/s\nOne training step on a CIFAR-shaped group of 500 images"
    )
    table = Table("", *(Column(row["target"], justify="right") for row in rows))
    for name in rows[0]["milliseconds_a_group"]:
        milliseconds = [row["milliseconds_a_group"][name] for row in rows]
        table.add_row(f"{name}, ms a group", *(f"{ms:.0f}" for ms in milliseconds))
        table.add_row("  groups a second", *(f"{1000 / ms:.2f}" for ms in milliseconds))
    lines = {
        "floor: operations, ms": [f"{row['floor']['operations_ms']:.0f}" for row in rows],
        "floor: bytes, ms": [f"{row['floor']['bytes_ms']:.0f}" for row in rows],
        "floor: the longer, layer by layer, ms": [f"{row['floor']['floor_ms']:.0f}" for row in rows],
        "as trained / floor": [f"{row['ratio_to_floor']:.1f} x" for row in rows],
        "straightforward / as trained": [f"{row['speedup']:.1f} x" for row in rows],
        "hypernetwork parameters": [f"{row['parameters']:,}" for row in rows],
        "peak memory of a process, MB": [f"{row['peak_memory_mb']:,.0f}" for row in rows],
    }
    for name, cells in lines.items():
        table.add_row(name, *cells)
    Console().print(table)


def main() -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser("python -m benchmarks.training", description=__doc__)
    parser.add_argument("--targets", nargs="+", default=TARGETS, choices=TARGETS + ("resnet34",))
    parser.add_argument(
        "--batch",
        type=int,
        default=4,
        choices=range(1, 65),
        metavar="1..64",
        help="groups a step in the batched version",
    )
    parser.add_argument("--seconds", type=positive_number, default=30, help="of measuring, a target")
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks/training.json"))
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory:
        _measure_memory(options.memory)
        return
    check_writable(options.out)
    device = pick_device()
    cpu.keep_freed_memory()
    machine = measure_machine(device, torch.bfloat16 if wants_bf16("auto", device) else torch.float32)
    images = make_images(device)
    rows = [measure(target, images, machine, options.batch, options.seconds) for target in options.targets]
    show(machine, rows)
    write_json(options.out, {"machine": machine.as_row(), "rows": rows})
    print(f"written: {options.out}")


if __name__ == "__main__":
    sys.exit(exit_code(main))
