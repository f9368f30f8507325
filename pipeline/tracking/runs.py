"""MLflow, written by one process, the driver: each run is found again by a key when a stage is continued.

No stage fails because of it: what is logged is kept elsewhere, and logged again where it is missing.
"""

from __future__ import annotations

import atexit
import contextlib
import getpass
import logging
import os
import sqlite3
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from functools import cache, cached_property
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml

# MLflow's own patience with a server that does not answer is many minutes a call, for which all trials would wait.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")

from mlflow import MlflowClient
from mlflow.entities import LifecycleStage, Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_ALREADY_EXISTS, ErrorCode
from mlflow.tracking.registry import UnsupportedModelRegistryStoreURIException
from sqlalchemy import make_url

from pipeline.params import Params
from pipeline.project import git_commit, locked, root, write
from pudnet.errors import RunFailed, UserError

KEY, PROJECT = "pudnet.key", "pudnet.project"
REST = 10  # times as long as it took to fail, before a server is asked again
PLACES = (  # the columns of MLflow's database that hold where artifacts lie
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)
EXPERIMENT_TAGS = {
    "mlflow.experimentKind": "custom_model_development",  # else the UI opens on its pages for language models
    "mlflow.note.content": "A search is one parent run with a child a trial; mark the children and press Compare. "
    "A final training, an evaluation and the controls are a run each.",
}


class Tracking:
    """One experiment of the tracking server: the runs of a setting and a target."""

    def __init__(self, uri: str, experiment: str, artifacts: str | None, tags: Mapping[str, str]) -> None:
        self.uri, self.name, self.artifacts, self.tags = uri, experiment, artifacts, dict(tags)
        self.project = project_id()
        self.is_down, self.asked_again = False, 0.0
        self.said: set[str] = set()  # why nothing could be logged, since it last could
        self.left_out = False  # something was refused, and is logged by the stage's next run
        self.waiting: list[Callable[[], object]] = []  # what is to be logged, in order

    @cached_property
    def client(self) -> MlflowClient:
        """The server, or the database, which is made where there is none."""
        with _database_locked(self.uri) as database:
            if database:
                sqlite3.connect(database).close()  # raises at once; MLflow tries for minutes
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
            return self.client.get_experiment_by_name(self.name).experiment_id  # made by another process just now

    def submit(self, log: Callable[[], object]) -> None:
        """Log, now or when the server answers again: nothing else ends because of it, or waits long for it.

        What a server that answers does not take (an artifact on a full disk, a run of a deleted experiment) is left
        to the stage's next run, and said once for each cause.
        """
        self.waiting.append(log)
        handled = sys.exception()  # of the trial, where Ray tells of its end
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
        except Exception as error:  # MLflow's layers (HTTP, SQL, files) each raise errors of their own
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
        """At the end of the process: what waits is logged after all, or it is said that it is not."""
        if self.waiting:
            self.asked_again = 0.0
            self.submit(lambda: None)
            while self.waiting and self._answers():  # what it does not take keeps nothing else from being logged
                self.asked_again = 0.0
                self.submit(lambda: None)
        if self.waiting or self.left_out:
            self._say("was not told all of it; `python -m pipeline.STAGE` logs the rest")

    def _answers(self) -> bool:
        try:
            with quiet():
                return self.client.get_experiment_by_name(self.name) is not None
        except Exception:  # as above
            return False

    def _say(self, what: str) -> None:
        print(f"tracking: {self.uri} {what}", flush=True)

    def find(self, key: str) -> Run | None:
        """The run of this project that has this key."""
        own = f"tags.`{KEY}` = '{key}' and tags.`{PROJECT}` = '{self.project}'"
        return next(iter(self.client.search_runs([self.experiment], own, max_results=1)), None)

    def find_or_create(self, key: str, name: str, parent: str | None = None) -> str:
        """The run of this key, RUNNING again, or a new one. Returns its id."""
        if found := self.find(key):
            self.client.update_run(found.info.run_id, status="RUNNING")
            return found.info.run_id
        tags = {**self.tags, KEY: key, PROJECT: self.project, **({"mlflow.parentRunId": parent} if parent else {})}
        return self.client.create_run(self.experiment, run_name=name, tags=tags).info.run_id

    def supersede(self, key: str) -> None:
        """Leave the run of this key to the past: a new run of the key starts anew."""
        if found := self.find(key):
            self.client.set_tag(found.info.run_id, KEY, f"superseded/{int(time.time())}/{key}")

    def last_step(self, run_id: str, metric: str) -> int:
        """The last step that a metric was logged at, -1 for none."""
        return max((m.step for m in self.client.get_metric_history(run_id, metric)), default=-1)

    def log_params(self, run_id: str, params: Mapping[str, Any]) -> None:
        """Log parameters; those that stand already stay as they are."""
        known = self.client.get_run(run_id).data.params
        new = [Param(key, str(value)) for key, value in params.items() if key not in known]
        self.client.log_batch(run_id, params=new)

    def log_metrics(
        self, run_id: str, metrics: Mapping[str, float], step: int = 0, seconds: float | None = None
    ) -> None:
        """Log numbers at one step; `seconds`: when they were had, where that is not now."""
        at = int(1000 * (seconds or time.time()))
        self.client.log_batch(run_id, metrics=[Metric(k, float(v), at, step) for k, v in metrics.items()])

    def log_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Set tags on a run."""
        self.client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])

    def finish(self, run_id: str, status: str = "FINISHED") -> None:
        """Close a run."""
        self.client.set_terminated(run_id, status)


def tracking_uri() -> str:
    """The project's sqlite database, or where MLFLOW_TRACKING_URI says."""
    database = str(root() / "mlflow.db")
    if "%" in database or "?" in database:  # a slash is quoted too: of the quoted path MLflow makes the folders
        database = quote(database, safe="")
    return os.environ.get("MLFLOW_TRACKING_URI", f"sqlite:///{database}")


def open_tracking(params: Params) -> Tracking:
    """The experiment `pudnet-SETTING-TARGET`, in the project's sqlite database or where MLFLOW_TRACKING_URI says.

    Says at once where it does not answer. Raises `UserError` for an address that MLflow does not know.
    """
    uri = tracking_uri()
    name = f"pudnet-{params.setting}-{params.target}"
    artifacts = None if uri.startswith("http") else (root() / "mlartifacts" / name).as_uri()
    follow_move(uri)
    return _open(uri, name, artifacts, tuple(provenance(params).items()))


@cache  # a process says once that a server does not answer
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
    """What tells this project's runs from those of its clones, on one server; lies with the state of its runs."""
    path = root() / ".pud" / "project"
    with locked(path.with_suffix(".lock"), wait=True):
        if not path.is_file():
            write(path, f"{uuid.uuid4().hex[:12]}\n")
    return path.read_text().strip()


def _database(uri: str) -> Path | None:
    """The file of a sqlite database; None for another address."""
    if not uri.startswith("sqlite:///"):
        return None
    return Path(make_url(uri).database or "")


@contextlib.contextmanager
def _database_locked(uri: str) -> Iterator[Path | None]:
    """One process at a time: several that open a fresh sqlite database trip over each other. Gives the database."""
    path = _database(uri)
    if path is None or not path.parent.is_dir():
        yield path
        return
    with locked(path.with_name(f"{path.name}.lock"), wait=True):
        yield path


def follow_move(uri: str) -> None:
    """Let the database of a project that was moved or copied say where its artifacts lie now.

    MLflow keeps absolute places and has no call that changes them (mlflow#3144). Left as they are, a moved project
    would write to where it was, and a copy would write into its original. Another database is left alone.
    """
    project, database = root(), _database(uri)
    if database is None or database.parent.resolve() != project or database.name != "mlflow.db":
        return
    if not database.is_file():
        return
    with locked(database.with_name(f"{database.name}.lock"), wait=True):
        try:
            with contextlib.closing(sqlite3.connect(database)) as connection, connection:
                _put_artifacts_at(connection, project / "mlartifacts")
        except sqlite3.DatabaseError as error:  # a damaged one is said when it is written to
            if "locked" in str(error):
                raise UserError(
                    f"{database}: another process holds it, so that it cannot be told where the project lies now; "
                    "stop that process"
                ) from None


def _put_artifacts_at(connection: sqlite3.Connection, folder: Path) -> None:
    """Let all that lay in another folder of this name lie in `folder`; what was put elsewhere by hand stays there."""
    rows = connection.execute("SELECT artifact_location FROM experiments WHERE name LIKE 'pudnet-%'")
    folders = {place.rpartition("/")[0] for (place,) in rows if place}
    for old in sorted(folders - {folder.as_uri(), str(folder)}):
        if not old.endswith(f"/{folder.name}"):
            continue
        for table, column in PLACES:
            moved = f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE substr({column}, 1, ?) = ?"
            connection.execute(moved, (folder.as_uri(), len(old) + 1, len(old) + 1, f"{old}/"))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without MLflow's notes on how it logs and downloads, and its tracebacks of errors that it raises too."""
    logger = logging.getLogger("mlflow")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    try:
        yield
    finally:
        logger.setLevel(before)


def _reason(error: BaseException, handled: BaseException | None) -> str:
    """The first cause, in one short line; not what was `handled` when it came."""
    while (cause := error.__cause__ or error.__context__) not in (None, handled):
        error = cause
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]


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
    with contextlib.suppress(yaml.YAMLError, KeyError, TypeError, AttributeError):  # after a merge, say; dvc will tell
        stages = (yaml.safe_load(lock.read_text()) or {}).get("stages", {})
        outs = [out for stage in ("prepare", "groups") for out in stages.get(stage, {}).get("outs", [])]
        return {out["path"]: out["md5"] for out in outs if "md5" in out}
    return {}
