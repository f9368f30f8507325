"""Logs runs to MLflow. Only the driver process does so; a continued stage finds its runs again by their keys.

No stage fails because of MLflow: the results are kept elsewhere, and logged later if something is missing.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import sqlite3
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, cached_property
from typing import Any

# By default, MLflow tries for many minutes to reach a server that does not answer, and all trials would wait.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")

from mlflow import MlflowClient
from mlflow.entities import DatasetInput, LifecycleStage, Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_ALREADY_EXISTS, ErrorCode
from mlflow.tracking.registry import UnsupportedModelRegistryStoreURIException

from pipeline.params import Params
from pipeline.project import locked, root, write
from pipeline.tracking.database import database_locked, follow_move, tracking_uri
from pipeline.tracking.provenance import provenance
from pudnet.errors import RunFailed, UserError

KEY, PROJECT = "pudnet.key", "pudnet.project"
NOTE = "mlflow.note.content"  # the description in the UI, in Markdown
REST = 10  # wait this many times as long as a failed call took, before trying the server again
EXPERIMENT_TAGS = {
    "mlflow.experimentKind": "custom_model_development",  # else the UI opens its pages for language models
    NOTE: """Networks predicted from labelled images: the search, trainings and tests of one setting and one network.

- `search-split...`: a search; its children are its trials: mark them and press *Compare*
- `train-...`: a final training; PudNet's also registers the model (*Models*, alias `best`)
- `evaluate-...`: the test of PudNet; among its artifacts is `report.html`, the page of all stages
- `tune-baselines`, `baseline-...`: tuning and test of what PudNet is compared with

The tag `stage` says which stage made a run, its description what it is.""",
}


class Tracking:
    """One experiment of the tracking server, which has the runs of one setting and target."""

    def __init__(self, uri: str, experiment: str, artifacts: str | None, tags: Mapping[str, str]) -> None:
        self.uri, self.name, self.artifacts, self.tags = uri, experiment, artifacts, dict(tags)
        self.project = project_id()
        self.is_down, self.asked_again = False, 0.0
        self.said: set[str] = set()  # reasons for failures that were printed since logging last worked
        self.left_out = False  # whether the server refused something, which the stage's next run logs
        self.waiting: list[Callable[[], object]] = []  # calls that still have to be made, in order

    @cached_property
    def client(self) -> MlflowClient:
        """The client of the server or database. A missing database is made."""
        with database_locked(self.uri) as database:
            if database:
                sqlite3.connect(
                    database
                ).close()  # fails at once if it cannot be opened, where MLflow tries for minutes
            return MlflowClient(self.uri)

    @cached_property
    def experiment(self) -> str:
        """The experiment's id."""
        found = self.client.get_experiment_by_name(self.name)
        if found and found.lifecycle_stage == LifecycleStage.DELETED:
            remedy = f"`mlflow experiments restore --experiment-id {found.experiment_id}` brings it back"
            raise MlflowException(f"experiment {self.name} was deleted; {remedy}")
        try:
            return (
                found.experiment_id
                if found
                else self.client.create_experiment(self.name, self.artifacts, tags=EXPERIMENT_TAGS)
            )
        except MlflowException as error:
            if error.error_code != ErrorCode.Name(RESOURCE_ALREADY_EXISTS):
                raise
            return self.client.get_experiment_by_name(self.name).experiment_id  # another process has just made it

    def submit(self, log: Callable[[], object]) -> None:
        """Call `log` now, or when the server answers again. A failure neither ends the stage nor holds it up for long.

        If a server answers but refuses something (an artifact on a full disk, a run of a deleted experiment), the
        cause is printed once, and the stage's next run tries again.
        """
        self.waiting.append(log)
        handled = sys.exception()  # the trial's error, if Ray's callback reports its end
        start = time.monotonic()
        if start < self.asked_again:
            return
        try:
            with quiet():
                while self.waiting:
                    self.waiting[0]()
                    del self.waiting[0]
        except (UserError, RunFailed):
            del self.waiting[0]
            raise
        except Exception as error:  # MLflow's layers (HTTP, SQL, files) raise many types of error
            why, refused = _reason(error, handled), self._answers()
            if refused:
                del self.waiting[0]
                self.left_out = True
            self.asked_again = time.monotonic() + REST * (time.monotonic() - start)
            self.__dict__.pop("experiment", None)
            if why not in self.said:
                self._say(f"cannot be written ({why}); the run goes on; the stage, run again, logs the rest")
            self.said.add(why)
            self.is_down = not refused
        else:
            if self.is_down:
                self._say("is written again")
                self.said.clear()
            self.is_down = False

    def finish_waiting(self) -> None:
        """At the end of the process, try once more to log what is waiting, and print if something is still missing."""
        if self.waiting:
            self.asked_again = 0.0
            self.submit(lambda: None)
            while self.waiting and self._answers():  # what it refuses must not keep the rest waiting
                self.asked_again = 0.0
                self.submit(lambda: None)
        if self.waiting or self.left_out:
            self._say("misses some logs; `python -m pipeline.STAGE` writes them")

    def _answers(self) -> bool:
        try:
            with quiet():
                return self.client.get_experiment_by_name(self.name) is not None
        except Exception:  # many types of error, as in `submit`
            return False

    def _say(self, what: str) -> None:
        print(f"tracking: {self.uri} {what}", flush=True)

    def find(self, key: str) -> Run | None:
        """This project's run with this key, if there is one."""
        own = f"tags.`{KEY}` = '{key}' and tags.`{PROJECT}` = '{self.project}'"
        return next(iter(self.client.search_runs([self.experiment], own, max_results=1)), None)

    def find_or_create(self, key: str, name: str, parent: str | None = None) -> str:
        """Set the run with this key to RUNNING, or create one. Returns its id."""
        if found := self.find(key):
            self.client.update_run(found.info.run_id, status="RUNNING")
            return found.info.run_id
        tags = {**self.tags, KEY: key, PROJECT: self.project, **({"mlflow.parentRunId": parent} if parent else {})}
        return self.client.create_run(self.experiment, run_name=name, tags=tags).info.run_id

    def supersede(self, key: str) -> None:
        """Take the key away from its run, so that the next `find_or_create` creates a new one."""
        if found := self.find(key):
            self.client.set_tag(found.info.run_id, KEY, f"superseded/{int(time.time())}/{key}")

    def last_step(self, run_id: str, metric: str) -> int:
        """The last step at which a metric was logged; -1 if there is none."""
        return max((m.step for m in self.client.get_metric_history(run_id, metric)), default=-1)

    def describe(
        self, run_id: str, note: str, params: Mapping[str, Any], datasets: Sequence[DatasetInput] = ()
    ) -> None:
        """Log what a run is: a description, parameters and datasets, except what it has already.

        So a description that was changed by hand stays.
        """
        run = self.client.get_run(run_id)
        new = [Param(key, str(value)) for key, value in params.items() if key not in run.data.params]
        tags = [] if NOTE in run.data.tags else [RunTag(NOTE, f"{note}\n\nIts report: `{self.tags['report']}`")]
        self.client.log_batch(run_id, params=new, tags=tags)
        known = {(each.dataset.name, each.dataset.digest) for each in run.inputs.dataset_inputs}
        if missing := [each for each in datasets if (each.dataset.name, each.dataset.digest) not in known]:
            self.client.log_inputs(run_id, missing)

    def log_metrics(
        self, run_id: str, metrics: Mapping[str, float], step: int = 0, seconds: float | None = None
    ) -> None:
        """Log metrics at one step. `seconds` is the time when they were measured, if not now."""
        at = int(1000 * (seconds or time.time()))
        self.client.log_batch(run_id, metrics=[Metric(k, float(v), at, step) for k, v in metrics.items()])

    def log_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Set tags on a run."""
        self.client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])

    def finish(self, run_id: str, status: str = "FINISHED") -> None:
        """Close a run."""
        self.client.set_terminated(run_id, status)


def open_tracking(params: Params, stage: str, report: str = "results/report.html") -> Tracking:
    """Open the experiment `pudnet-SETTING-TARGET` at `tracking_uri`, for the runs of a stage that this report shows.

    If the server does not answer, that is printed at once. Raises `UserError` for an address that MLflow cannot use.
    """
    uri = tracking_uri()
    name = f"pudnet-{params.setting}-{params.target}"
    artifacts = None if uri.startswith("http") else (root() / "mlartifacts" / name).as_uri()
    follow_move(uri)
    return _open(uri, name, artifacts, tuple(provenance(params, stage, report).items()))


@cache  # so that a process prints only once that a server does not answer
def _open(uri: str, name: str, artifacts: str | None, tags: tuple[tuple[str, str], ...]) -> Tracking:
    tracking = Tracking(uri, name, artifacts, dict(tags))

    def contact() -> None:
        try:
            tracking.experiment  # noqa: B018
        except UnsupportedModelRegistryStoreURIException:
            raise UserError(f"MLFLOW_TRACKING_URI: {uri} is no address that MLflow knows") from None

    tracking.submit(contact)
    atexit.register(tracking.finish_waiting)
    return tracking


def project_id() -> str:
    """The id that tells this project's runs from those of its clones on the same server. It is stored in .pud/."""
    path = root() / ".pud" / "project"
    with locked(path.with_suffix(".lock"), wait=True):
        if not path.is_file():
            write(path, f"{uuid.uuid4().hex[:12]}\n")
    return path.read_text().strip()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence MLflow's notes on logging and downloads, and its tracebacks of errors that it also raises."""
    logger = logging.getLogger("mlflow")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    try:
        yield
    finally:
        logger.setLevel(before)


def _reason(error: BaseException, handled: BaseException | None) -> str:
    """An error's first cause, as one short line; `handled`, an error that was being handled before, is no cause."""
    while (cause := error.__cause__ or error.__context__) not in (None, handled):
        error = cause
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]
