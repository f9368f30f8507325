"""Ray: a session of this machine's cores and GPUs, or of a cluster's, and a trial's share of it."""

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
from collections.abc import Iterator
from typing import Any

from pipeline.params import Params
from pipeline.runs.keys import CODE
from pudnet.errors import RunFailed, UserError

os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # nobody reads Ray's own files of reports
# Tune's own handler of Ctrl-C ends the search as if it were finished; without it the stage is interrupted.
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # its boxes say less than the callback
os.environ.setdefault("RAY_task_oom_retries", "2")  # for ever, else: a measurement that no memory can hold
os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")  # a trial that diverged has no accuracy for ASHA

import ray
from ray.exceptions import RayError, RayTaskError

AGAIN = 5  # seconds
LONGEST_FOLDER = 40  # bytes of TMPDIR: Ray puts sockets below it, whose paths may have 107
OBJECT_STORE_BYTES = 200_000_000  # trials memory-map their arrays; little goes through the object store
# Patterns of .gitignore: anchored, since `data` alone would leave out pudnet/data too.
NOT_SENT = ["/data", "/mlartifacts", "/.pud", "/.dvc", "/.venv", "/models", "/mlflow.db"]


@contextlib.contextmanager
def session() -> Iterator[None]:
    """A Ray of our own, or the cluster that RAY_ADDRESS names (with this project's code sent along)."""
    logging.getLogger("ray").setLevel(logging.CRITICAL)  # a failed trial's traceback is in its error.txt
    with _interruptible() as interruptions:
        try:
            with interruptions.held():
                _connect(os.environ.get("RAY_ADDRESS"))
                signal.signal(signal.SIGTERM, interruptions)  # Ray has set its own, which ends the process with a dump
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
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                logging_level=logging.CRITICAL,
                log_to_driver=False,  # the callback says what there is to say
            )
    except Exception as error:  # on a machine too busy to start in time Ray raises a plain one
        hint = (
            "" if not address or "RAY_AUTH_MODE" in os.environ else "; where it wants a token, set RAY_AUTH_MODE=token"
        )
        raise RunFailed(f"Ray at {address or 'this machine'} does not answer ({reason(error)}){hint}") from None


class _Interruptions:
    """A handler of signals that raises `KeyboardInterrupt`, or keeps it until Ray has started or ended."""

    def __init__(self) -> None:
        self.holding, self.pending = False, False

    def __call__(self, number: int, frame: object) -> None:
        if not self.holding:
            signal.setitimer(signal.ITIMER_REAL, AGAIN)
            raise KeyboardInterrupt
        if self.pending and number == signal.SIGINT:  # whoever presses Ctrl-C twice does not want to wait
            print("error: interrupted while Ray was starting or ending", file=sys.stderr, flush=True)
            os._exit(130)
        self.pending = True

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Raise what comes meanwhile at the end of the block.

        An interruption inside `ray.init` or `ray.shutdown` leaves Ray's C++ half made or half gone: it is lost
        there, and the process crashes as it exits.
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
    """Ctrl-C and SIGTERM interrupt what runs; again after a while, where the first is lost in what cannot raise."""
    interruptions = _Interruptions()
    numbers = [signal.SIGTERM, signal.SIGALRM]
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as it is in a shell's background
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
    """Raise `RunFailed` soon where nothing listens: Ray asks for minutes."""
    host, _, port = address.rpartition("/")[2].rpartition(":")
    if port.isdigit():
        try:
            socket.create_connection((host, int(port)), 10).close()
        except (OSError, OverflowError) as error:
            raise RunFailed(f"RAY_ADDRESS: nothing answers at {address} ({error})") from None


def is_lost() -> bool:
    """Whether the Ray that a session started of its own is gone: no node joins it."""
    return not os.environ.get("RAY_ADDRESS") and not any(node["Alive"] for node in ray.nodes())


def has_room(params: Params, workers: int) -> bool:
    """Whether the nodes that there are now have together what workers are to get."""
    try:
        share(params, workers)
    except UserError:
        return False
    return True


def share(params: Params, workers: int = 1) -> dict[str, float]:
    """A trial's resources, or each worker's. A GPU is asked for only where there is one: Ray would wait for ever.

    Raises `UserError` when no node has what a trial is to get, or all together not what its workers are.
    """
    nodes, wanted = [node["Resources"] for node in ray.nodes() if node["Alive"]] or [{}], params.resources
    gpus = max(node.get("GPU", 0) for node in nodes)
    if gpus and (wanted.gpus > gpus or (wanted.gpus > 1 and wanted.gpus % 1)):
        raise UserError(f"resources.gpus: {wanted.gpus} a trial; give a fraction, or a whole number up to {gpus:.0f}")
    gpu = wanted.gpus if gpus else 0
    cpus = max(node.get("CPU", 0) for node in nodes if node.get("GPU", 0) >= gpu)
    if wanted.cpus > cpus:
        of_what = f"node with {gpu:g} GPU(s)" if gpu else "node"
        raise UserError(f"resources.cpus: {wanted.cpus} a trial, but the largest {of_what} has {cpus:.0f}")
    room = sum(
        min(node.get("CPU", 0) // wanted.cpus, int(node.get("GPU", 0) / gpu + 1e-6) if gpu else math.inf)
        for node in nodes
    )
    if workers > room:
        each = f"{wanted.cpus} CPU(s) and {gpu:g} GPU(s)"
        raise UserError(f"resources.workers: {workers} of {each} each, but there is room for {room:.0f}")
    return {"cpu": wanted.cpus, "gpu": gpu}


def result(ended: ray.ObjectRef) -> Any:
    """What a task gave. Raises its own error where there may be a line for it, `RunFailed` if the task was lost."""
    try:
        return ray.get(ended)
    except RayTaskError as error:
        if isinstance(error.cause, UserError | RunFailed | OSError | MemoryError | RuntimeError):
            raise error.cause from None
        raise
    except RayError as error:
        raise RunFailed(f"a task was lost: {reason(error)}; the same command continues") from None


def reason(error: object) -> str:
    """The line of an error that says most: of a traceback the last, of what Ray says of a lost process the first."""
    last = re.split(r"^Failure # \d+ .*$", str(error), flags=re.MULTILINE)[-1]  # of a process lost as it began
    lines = [line.strip() for line in last.splitlines() if line.strip()] or [type(error).__name__]
    line = lines[-1] if isinstance(error, RayTaskError) or '  File "' in last else lines[0]
    return line.removeprefix("pudnet.errors.RunFailed: ")
