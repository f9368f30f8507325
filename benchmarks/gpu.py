"""One command that shows PudNet on a GPU: `python -m benchmarks.gpu`, or `make gpu`.

Four parts, each in a process of its own with a time limit of its own, so that one that fails ends no other:

- correct: the tests that mean something on a GPU (`pytest -m gpu`);
- fast: training steps and predictions, their share of the card's peak, and what a profile shows first;
- scale: five methods for ConvNet-3 at as many of the paper's 100,000 groups as `--minutes` give;
- ray: `dvc repro evaluate` at its smallest, two trials of its search on one card.

Each prints a table and writes PART.json into `--out`, row by row, so that what was measured before a time limit stays.
`--device cpu --smallest` runs all of it in about a minute on two free cores, to see that it works; `ray` ends after the
search then.

On a GPU none of this was run yet.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.data import positive_number
from benchmarks.gpu_report import Report, Run
from pudnet.errors import RunFailed, UserError, exit_code

PARTS = {"correct": 120, "fast": 240, "scale": 420, "ray": 240}  # seconds that each may take, 17 minutes in all
MINUTES = 6.0  # of `scale`'s limit, those that its methods have together: the default of `--minutes`
TO_END = 15  # seconds that a part has, asked to, before it is killed


@dataclass(frozen=True)
class Ended:
    """How a part ended."""

    part: str
    how: str  # "done", or what went wrong
    seconds: float


def run_part(part: str, arguments: list[str], device: str, limit: float) -> Ended:
    """Run one part in a process of its own, which ends with all that it started when its time is over."""
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
    command = [sys.executable, "-m", "benchmarks.gpu", "--part", part, *arguments]
    start = time.perf_counter()
    process = subprocess.Popen(command, env=os.environ | hidden, start_new_session=True)
    try:
        code = process.wait(limit)
        how = "done" if code == 0 else f"failed (exit code {code})"
    except subprocess.TimeoutExpired:
        how = f"did not end within its {limit:.0f} s"
    finally:
        _end(process)
    return Ended(part, how, time.perf_counter() - start)


def _end(process: subprocess.Popen) -> None:
    """End a process, if it has not ended, and what it started: asked to first."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(TO_END)
    with contextlib.suppress(ProcessLookupError):  # none is left
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def work_of(part: str) -> Callable[[Run, Report], None]:
    """What a part does. Imported here, so that what one part lacks is no other's trouble."""
    return importlib.import_module(f"benchmarks.gpu_{part}").measure


def main() -> None:
    """Run the parts that were asked for.

    Raises `UserError` without a GPU, `RunFailed` where a part did not end well.
    """
    parser = argparse.ArgumentParser("python -m benchmarks.gpu", description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--smallest", action="store_true", help="every part as small as it gets, to see that it works")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--data", help="for `scale`: npz:FILE of CIFAR-100; noise, and no accuracy, without")
    parser.add_argument(
        "--minutes", type=positive_number, default=MINUTES, help="for `scale`: what its five methods have together"
    )
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks/gpu"))
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("no GPU here that torch can use; `--device cpu --smallest` tries every part without one")
    if options.part:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # its time is over: as Ctrl-C, which pytest knows
        run = Run(torch.device(options.device), options.smallest, options.data, options.minutes)
        report = Report(options.out / f"{options.part}.json", run)
        work_of(options.part)(run, report)
        return
    arguments = ["--device", options.device, "--out", str(options.out), "--minutes", str(options.minutes)]
    arguments += ["--smallest"] * options.smallest + (["--data", options.data] if options.data else [])
    more = 60 * max(0.0, options.minutes - MINUTES)  # than the limit of `scale` is for
    ended = []
    for part in options.parts:
        print(f"\n{part}", flush=True)
        ended.append(run_part(part, arguments, options.device, PARTS[part] + (more if part == "scale" else 0)))
        print(f"{part}: {ended[-1].how}, {ended[-1].seconds:.0f} s; {options.out / part}.json", flush=True)
    if bad := [each for each in ended if each.how != "done"]:
        raise RunFailed(f"gpu: {'; '.join(f'{each.part} {each.how}' for each in bad)}; the other parts are as written")


if __name__ == "__main__":
    sys.exit(exit_code(main))
