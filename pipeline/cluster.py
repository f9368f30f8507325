"""Ray: a session of this machine's cores and GPUs, or of a cluster's, and a trial's share of it."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator

from pipeline.params import Params
from pipeline.stage import root
from pudnet.errors import RunFailed, UserError

# A snapshot of the experiment every 5 s bounds what a kill -9 of the driver costs.
os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "5")
os.environ.setdefault("TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S", "0")
# Tune's own handler of Ctrl-C ends the search as if it were finished; without it the stage is interrupted.
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # its boxes say less than the callback

import ray

OBJECT_STORE_BYTES = 200_000_000  # trials memory-map their arrays; little goes through the object store
# Patterns of .gitignore: anchored, since `data` alone would leave out pudnet/data too.
NOT_SENT = ["/data", "/mlartifacts", "/.pud", "/.dvc", "/.venv", "/models", "/mlflow.db"]


@contextlib.contextmanager
def session() -> Iterator[None]:
    """A Ray of our own, or the cluster that RAY_ADDRESS names (with this project's code sent along)."""
    logging.getLogger("ray").setLevel(logging.CRITICAL)  # a failed trial's traceback is in its error.txt
    address = os.environ.get("RAY_ADDRESS")
    try:
        if address:
            environment = {"working_dir": str(root()), "excludes": NOT_SENT}
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
        raise RunFailed(f"Ray at {address or 'this machine'} does not answer ({str(error).splitlines()[0]})") from None
    try:
        yield
    finally:
        ray.shutdown()


def share(params: Params) -> dict[str, float]:
    """A trial's resources. A GPU is asked for only where there is one: Ray would wait for it for ever.

    Raises `UserError` when no node has what a trial is to get.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cpus, gpus = (max(node.get(kind, 0) for node in nodes) for kind in ("CPU", "GPU"))
    wanted = params.resources
    if wanted.cpus > cpus:
        raise UserError(f"resources.cpus: {wanted.cpus} a trial, but the largest node has {cpus:.0f}")
    if gpus and (wanted.gpus > gpus or (wanted.gpus > 1 and wanted.gpus % 1)):
        raise UserError(f"resources.gpus: {wanted.gpus} a trial; give a fraction, or a whole number up to {gpus:.0f}")
    return {"cpu": wanted.cpus, "gpu": wanted.gpus if gpus else 0}
