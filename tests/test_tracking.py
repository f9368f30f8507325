"""What MLflow is told stays with the project, wherever that lies, and what it does not take is said."""

import contextlib
import shutil
import sqlite3
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient

from pipeline.params import load_params
from pipeline.tracking.runs import Tracking, _open, open_tracking, tracking_uri
from pudnet.errors import UserError
from tests.smallest import shrink
from tests.test_pipeline import ROOT


@pytest.fixture
def project(tmp_path, monkeypatch):
    """Go to a project's folder, as a stage's process finds it."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("DVC_ROOT", raising=False)

    def enter(name):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        if not (folder / "params.yaml").exists():
            shutil.copy(ROOT / "params.yaml", folder)
            shrink(folder / "params.yaml")
        monkeypatch.chdir(folder)
        _open.cache_clear()
        return folder

    return enter


def log(tracking: Tracking, key: str, folder) -> None:
    """A run with one artifact."""
    (folder / "note.txt").write_text(key)
    run = tracking.find_or_create(key, key)
    tracking.client.log_artifact(run, str(folder / "note.txt"))
    tracking.finish(run)


@pytest.mark.parametrize("name", ["plain", "My%20Repo", "a?b=c", "c#d", "with space", "100%", "ü&;"])
def test_any_folder_holds_its_own_database(name, project):
    folder = project(name)
    log(open_tracking(load_params(), "search"), "first", folder)
    assert (folder / "mlflow.db").is_file() and len(list(folder.glob("mlartifacts/**/note.txt"))) == 1
    assert sorted(path.name for path in folder.parent.iterdir()) == [name]  # and nothing lies beside it


@pytest.mark.parametrize("way", ["moved", "copied"])
def test_a_project_that_was_moved_or_copied_logs_to_where_it_is(way, project, tmp_path):
    old = project("old")
    log(open_tracking(load_params(), "search"), "first", old)
    first = open_tracking(load_params(), "search").find("first").info.run_id
    before = sorted(path for path in old.rglob("*.txt"))
    new = tmp_path / "new"
    (shutil.move if way == "moved" else shutil.copytree)(old, new)
    project("new")
    log(open_tracking(load_params(), "search"), "second", new)
    assert len(list(new.glob("mlartifacts/**/note.txt"))) == 2
    client = MlflowClient(tracking_uri())
    assert client.get_run(first).info.artifact_uri.startswith(new.as_uri())
    assert Path(client.download_artifacts(first, "note.txt")).read_text() == "first"
    assert sorted(old.rglob("*.txt")) == (before if way == "copied" else [])


def test_a_moved_project_whose_database_is_held_says_so(project, tmp_path):
    log(open_tracking(load_params(), "search"), "first", project("old"))
    shutil.move(tmp_path / "old", tmp_path / "new")
    project("new")
    with contextlib.closing(sqlite3.connect("mlflow.db")) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(UserError, match=r"mlflow\.db: another process holds it"):
            open_tracking(load_params(), "search")


def test_a_database_that_cannot_be_opened_is_said_at_once(project, capsys):
    folder = project("plain")
    (folder / "mlflow.db").mkdir()
    begun = time.monotonic()
    open_tracking(load_params(), "search")
    assert "cannot be written (unable to open database file)" in capsys.readouterr().out
    assert time.monotonic() - begun < 20


def test_what_the_server_refuses_for_good_is_never_called_written(project, capsys):
    folder = project("plain")
    tracking = open_tracking(load_params(), "search")
    log(tracking, "first", folder)
    tracking.client.delete_experiment(tracking.experiment)
    _open.cache_clear()
    again = open_tracking(load_params(), "search")
    for key in ("second", "third"):
        again.asked_again = 0.0
        again.submit(lambda key=key: log(again, key, folder))
    again.submit(lambda: None)
    again.finish_waiting()
    said = capsys.readouterr().out
    assert said.count("was deleted; `mlflow experiments restore --experiment-id 1` brings it back") == 1
    assert "is written again" not in said and said.count("misses some logs") == 1
    with sqlite3.connect(folder / "mlflow.db") as database:
        assert database.execute("SELECT count(*) FROM runs").fetchone() == (1,)
