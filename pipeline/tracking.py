"""MLflow, written by one process, the driver: each run is found again by a key when a stage is continued."""

from __future__ import annotations

import getpass
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException

from pipeline.params import Params
from pipeline.stage import git_commit, root
from pudnet.errors import RunFailed

KEY = "pudnet.key"
EXPERIMENT_TAGS = {
    "mlflow.experimentKind": "custom_model_development",  # else the UI opens on its pages for language models
    "mlflow.note.content": "A search is one parent run with a child a trial; mark the children and press Compare. "
    "A final training, an evaluation and the controls are a run each.",
}


class Tracking:
    """One experiment of the tracking server: the runs of a setting and a target."""

    def __init__(self, uri: str, experiment: str, artifacts: str | None, tags: Mapping[str, str]) -> None:
        self.uri, self.tags = uri, dict(tags)
        self.client = MlflowClient(uri)
        found = self.client.get_experiment_by_name(experiment)
        self.experiment = (
            found.experiment_id if found else self.client.create_experiment(experiment, artifacts, tags=EXPERIMENT_TAGS)
        )

    def find_or_create(self, key: str, name: str, parent: str | None = None) -> str:
        """The run of this key, RUNNING again, or a new one. Returns its id."""
        found = self.client.search_runs([self.experiment], f"tags.`{KEY}` = '{key}'", max_results=1)
        if found:
            run_id = found[0].info.run_id
            self.client.update_run(run_id, status="RUNNING")
            return run_id
        tags = {**self.tags, KEY: key, **({"mlflow.parentRunId": parent} if parent else {})}
        return self.client.create_run(self.experiment, run_name=name, tags=tags).info.run_id

    def supersede(self, key: str) -> None:
        """Leave the runs of this key, and those below it, to the past: a new run of the key starts anew."""
        for found in self.client.search_runs([self.experiment], f"tags.`{KEY}` LIKE '{key}%'"):
            old = found.data.tags[KEY]
            self.client.set_tag(found.info.run_id, KEY, f"superseded/{int(time.time())}/{old}")

    def last_step(self, run_id: str, metric: str) -> int:
        """The last step that a metric was logged at, -1 for none."""
        return max((m.step for m in self.client.get_metric_history(run_id, metric)), default=-1)

    def log_params(self, run_id: str, params: Mapping[str, Any]) -> None:
        """Log parameters; those that stand already stay as they are."""
        known = self.client.get_run(run_id).data.params
        new = [Param(key, str(value)) for key, value in params.items() if key not in known]
        self.client.log_batch(run_id, params=new)

    def log_metrics(self, run_id: str, metrics: Mapping[str, float], step: int = 0) -> None:
        """Log numbers at one step."""
        now = int(1000 * time.time())
        self.client.log_batch(run_id, metrics=[Metric(k, float(v), now, step) for k, v in metrics.items()])

    def log_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Set tags on a run."""
        self.client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])

    def finish(self, run_id: str, status: str = "FINISHED") -> None:
        """Close a run."""
        self.client.set_terminated(run_id, status)


def tracking_uri() -> str:
    """The project's sqlite database, or where MLFLOW_TRACKING_URI says."""
    return os.environ.get("MLFLOW_TRACKING_URI", f"sqlite:///{root()}/mlflow.db")


def open_tracking(params: Params) -> Tracking:
    """The experiment `pudnet-SETTING-TARGET`, in the project's sqlite database or where MLFLOW_TRACKING_URI says.

    Opened before any fan-out: several processes that open a fresh database trip over each other.
    """
    uri = tracking_uri()
    name = f"pudnet-{params.setting}-{params.target}"
    artifacts = None if uri.startswith("http") else str(root() / "mlartifacts" / name)
    try:
        return Tracking(uri, name, artifacts, provenance(params))
    except MlflowException as error:
        raise RunFailed(f"MLflow at {uri} does not answer ({str(error).splitlines()[0]})") from None


def provenance(params: Params) -> dict[str, str]:
    """Tags that say what a run was made from."""
    tags = {"mlflow.user": _user(), "mlflow.source.name": "dvc repro", "mlflow.source.type": "LOCAL"}
    tags |= {"setting": params.setting, "target": params.target, "variant": params.variant}
    commit = git_commit()
    if commit:
        tags["mlflow.source.git.commit"] = commit
    if os.environ.get("DVC_EXP_NAME"):
        tags["dvc.experiment"] = os.environ["DVC_EXP_NAME"]
    return tags | {f"dvc.md5.{path}": md5 for path, md5 in _lock_md5s().items()}


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return "unknown"


def _lock_md5s() -> dict[str, str]:
    """Checksums of the prepared data and group tables, as DVC locked them."""
    lock = Path("dvc.lock")
    if not lock.is_file():
        return {}
    stages = (yaml.safe_load(lock.read_text()) or {}).get("stages", {})
    outs = [out for stage in ("prepare", "groups") for out in stages.get(stage, {}).get("outs", [])]
    return {out["path"]: out["md5"] for out in outs if "md5" in out}
