"""Ray: a session on this machine or a cluster, and a trial's share of its cores and GPUs."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
import torch
from ray.exceptions import RayError, RayTaskError

from pipeline.params import Params, ResourcesParams
from pipeline.runs.keys import CODE
from pudnet.errors import RunFailed, UserError

PATIENCE = 60  # seconds without news before it is said what is waited for
AGAIN = 5  # seconds until an interruption is repeated
LONGEST_FOLDER = 40  # bytes of TMPDIR, since Ray's sockets are below it and their paths may have at most 107
OBJECT_STORE_BYTES = 200_000_000  # enough, since trials memory-map their arrays
DRIVER = Path("/proc/driver/nvidia")  # is there if NVIDIA's driver is
# Patterns as in .gitignore, with a leading slash, since `data` would leave out pudnet/data too.
NOT_SENT = ["/data", "/mlartifacts", "/.pud", "/.dvc", "/.venv", "/models", "/mlflow.db"]


@contextlib.contextmanager
def session(seconds: float | None = None) -> Iterator[None]:
    """Start our own Ray, or connect to the cluster at RAY_ADDRESS and send it this project's code.

    After `seconds`, the block is interrupted as by Ctrl-C.
    """
    logging.getLogger("ray").setLevel(logging.CRITICAL)  # a failed trial's traceback is in its error.txt
    with _interruptible() as interruptions:
        try:
            with interruptions.held():
                _connect(os.environ.get("RAY_ADDRESS"))
                signal.signal(signal.SIGTERM, interruptions)  # replaces Ray's, which ends the process with a dump
            signal.setitimer(signal.ITIMER_REAL, seconds or 0)
            yield
        finally:
            with interruptions.held():
                ray.shutdown()


def _connect(address: str | None) -> None:
    if address:
        _reach(address)
    if len(os.fsencode(tempfile.gettempdir())) > LONGEST_FOLDER:
        os.environ.setdefault("RAY_TMPDIR", "/tmp")
    try:
        if address:
            environment = {"working_dir": str(CODE), "excludes": NOT_SENT}
            ray.init(runtime_env=environment, log_to_driver=False, logging_level=logging.CRITICAL)
        else:
            ray.init(
                address="local",
                num_gpus=_usable_gpus(),
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                logging_level=logging.CRITICAL,
                log_to_driver=False,  # our callback prints what matters
            )
    except Exception as error:  # Ray raises a plain Exception if a busy machine does not start it in time
        hint = "" if not address or "RAY_AUTH_MODE" in os.environ else "; if it wants a token, set RAY_AUTH_MODE=token"
        raise RunFailed(f"Ray at {address or 'this machine'} does not answer ({reason(error)}){hint}") from None


def _usable_gpus() -> int | None:
    """None, so that Ray counts this machine's GPUs; 0 if PyTorch can use none (another maker's, an old driver)."""
    if torch.cuda.is_available():
        return None
    if DRIVER.exists() and os.environ.get("CUDA_VISIBLE_DEVICES", "all") not in ("", "-1"):
        why = "python -c 'import torch; torch.zeros(1).cuda()'"
        print(f"  PyTorch cannot use this machine's GPU, so everything runs on the CPU; `{why}` says why", flush=True)
    return 0


class _Interruptions:
    """A signal handler that raises `KeyboardInterrupt`; while Ray starts or ends, it waits until that is done."""

    def __init__(self) -> None:
        self.holding, self.pending = False, False

    def __call__(self, number: int, frame: object) -> None:
        if not self.holding:
            signal.setitimer(signal.ITIMER_REAL, AGAIN)
            raise KeyboardInterrupt
        if self.pending and number == signal.SIGINT:  # a second Ctrl-C: the user does not want to wait
            print("error: interrupted while Ray was starting or ending", file=sys.stderr, flush=True)
            os._exit(130)
        self.pending = True

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Delay interruptions until the end of the block.

        An interruption inside `ray.init` or `ray.shutdown` would get lost in Ray's C++ part and leave it half
        initialised, and the process would crash when it exits.
        """
        self.holding = True
        signal.setitimer(signal.ITIMER_REAL, 0)
        try:
            yield
        finally:
            self.holding = False
        if self.pending:
            self.pending = False
            raise KeyboardInterrupt


@contextlib.contextmanager
def _interruptible() -> Iterator[_Interruptions]:
    """Turn Ctrl-C and SIGTERM into `KeyboardInterrupt`.

    It is raised again after `AGAIN` seconds, since code that cannot raise may have lost the first.
    """
    interruptions = _Interruptions()
    numbers = [signal.SIGTERM, signal.SIGALRM]
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as it is for a background job of a shell
        numbers.append(signal.SIGINT)
    before, said = {number: signal.signal(number, interruptions) for number in numbers}, sys.unraisablehook
    sys.unraisablehook = lambda lost: None if lost.exc_type is KeyboardInterrupt else said(lost)
    try:
        yield interruptions
    finally:
        sys.unraisablehook = said
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def _reach(address: str) -> None:
    """Raise `RunFailed` at once if nothing listens at the address, where Ray would try for minutes."""
    host, _, port = address.rpartition("/")[2].rpartition(":")
    if port.isdigit():
        try:
            socket.create_connection((host, int(port)), 10).close()
        except (OSError, OverflowError) as error:
            raise RunFailed(f"RAY_ADDRESS: nothing answers at {address} ({error})") from None


def is_lost() -> bool:
    """Whether the Ray that we started ourselves has died. (A cluster may get new nodes.)"""
    return not os.environ.get("RAY_ADDRESS") and not any(node["Alive"] for node in ray.nodes())


def first_of(tasks: Sequence[ray.ObjectRef], params: Params) -> ray.ObjectRef:
    """Wait until one of some tasks has ended, and return it. Prints once if no node has room for them.

    Raises `RunFailed` if this machine's own Ray has died.
    """
    said = False
    while True:
        ended, _ = ray.wait(list(tasks), timeout=PATIENCE)
        if ended:
            return ended[0]
        check_alive()
        if not said and not has_room(params, 1):
            print(f"  no node has room for a measurement; waiting for one with {wanted_in_words(params)}", flush=True)
            said = True


def check_alive() -> None:
    """Raise `RunFailed` if this machine's own Ray has died."""
    if is_lost():
        raise RunFailed("the Ray of this machine is gone (out of memory?); the same command continues")


def largest_node(params: Params) -> int:
    """The CPU cores of the largest node that has the GPUs of a trial. Raises `UserError` as `share` does."""
    nodes = _nodes()
    return int(_most_cpus(nodes, _gpus(nodes, params.resources)))


def _nodes() -> list[dict[str, float]]:
    """The resources of each node that is alive."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]] or [{}]


def _most_cpus(nodes: Sequence[Mapping[str, float]], gpu: float) -> float:
    return max(node.get("CPU", 0) for node in nodes if node.get("GPU", 0) >= gpu)


def _gpus(nodes: Sequence[Mapping[str, float]], wanted: ResourcesParams) -> float:
    """The GPUs of a trial. None are requested if there is none: Ray would wait for ever."""
    gpus = max(node.get("GPU", 0) for node in nodes)
    if gpus and (wanted.gpus > gpus or (wanted.gpus > 1 and wanted.gpus % 1)):
        raise UserError(
            f"resources.gpus: {wanted.gpus:g} for a trial; give a fraction, or a whole number up to {gpus:.0f}"
        )
    return wanted.gpus if gpus else 0


def has_room(params: Params, workers: int) -> bool:
    """Whether the present nodes together have the resources of this many workers."""
    try:
        share(params, workers)
    except UserError:
        return False
    return True


def share(params: Params, workers: int = 1) -> dict[str, float]:
    """The resources of a trial, or of each worker.

    Raises `UserError` if no node has the resources of a trial, or all nodes together lack those of its workers.
    """
    nodes, wanted = _nodes(), params.resources
    gpu = _gpus(nodes, wanted)
    cpus = _most_cpus(nodes, gpu)
    if wanted.cpus > cpus:
        of_what = f"node with {gpu:g} GPU(s)" if gpu else "node"
        raise UserError(f"resources.cpus: {wanted.cpus} for a trial, but the largest {of_what} has {cpus:.0f}")
    room = sum(
        min(node.get("CPU", 0) // wanted.cpus, int(node.get("GPU", 0) / gpu + 1e-6) if gpu else math.inf)
        for node in nodes
    )
    own = {"cpu": wanted.cpus, "gpu": gpu}
    if workers > room:
        raise UserError(f"resources.workers: {workers} with {in_words(own)} each, but there is room for {room:.0f}")
    return own


def in_words(resources: Mapping[str, float]) -> str:
    """A trial's share, as it is printed."""
    return f"{resources['cpu']} CPU(s) and {resources['gpu']:g} GPU(s)"


def wanted_in_words(params: Params) -> str:
    """The share that a trial is to have where there is room for it."""
    return in_words({"cpu": params.resources.cpus, "gpu": params.resources.gpus})


def result(ended: ray.ObjectRef) -> Any:
    """A task's result. Raises the task's own error if `exit_code` may print it, and `RunFailed` for a lost task."""
    try:
        return ray.get(ended)
    except RayTaskError as error:
        if isinstance(error.cause, UserError | RunFailed | OSError | MemoryError | RuntimeError):
            raise error.cause from None
        raise
    except RayError as error:
        raise RunFailed(f"a task was lost: {reason(error)}; the same command continues") from None


def reason(error: object) -> str:
    """The most useful line of an error: the error's own in a traceback, or Ray's first about a lost process."""
    last = re.split(r"^Failure # \d+ .*$", str(error), flags=re.MULTILINE)[-1]  # if a process was lost at its start
    lines = [line for line in last.splitlines() if line.strip()] or [type(error).__name__]
    line = lines[0]
    if frames := [number for number, line in enumerate(lines) if line.lstrip().startswith('File "')]:
        below = lines[frames[-1] + 1 :]  # the frame's code, with a margin; the error; more about it, as CUDA has
        line = next((line for line in below if not line.startswith(" ")), lines[-1])
    elif isinstance(error, RayTaskError):
        line = lines[-1]
    return line.strip().removeprefix("pudnet.errors.RunFailed: ")
