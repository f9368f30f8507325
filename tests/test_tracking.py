"""What MLflow is told stays with the project, wherever that lies, and what it does not take is said."""

import contextlib
import json
import shutil
import sqlite3
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from mlflow import MlflowClient

from pipeline.params import load_params
from pipeline.runs.parents import closed_if_failed
from pipeline.tracking import database
from pipeline.tracking.database import tracking_uri
from pipeline.tracking.datasets import dataset
from pipeline.tracking.runs import NOTE, Tracking, _open, open_tracking
from pudnet.data.groups import build_groups, split_classes, write_groups
from pudnet.data.sources import open_source
from pudnet.data.store import open_store, write_store
from pudnet.errors import RunFailed, UserError
from tests.conftest import SIZES
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


@pytest.mark.parametrize("name", ["plain", "My%20Repo a?b=c #d, 100% ü&;"])
def test_any_folder_holds_its_own_database(name, project):
    folder = project(name)
    log(open_tracking(load_params(), "search"), "first", folder)
    assert (folder / "mlflow.db").is_file() and len(list(folder.glob("mlartifacts/**/note.txt"))) == 1
    assert sorted(path.name for path in folder.parent.iterdir()) == [name]  # and nothing lies beside it


def test_the_parent_of_trials_that_failed_is_failed_until_they_run_well(project):
    project("plain")
    tracking, experiment = open_tracking(load_params(), "search"), SimpleNamespace(key="search-split0")
    parent = tracking.find_or_create(experiment.key, "search")
    with pytest.raises(RunFailed), closed_if_failed(tracking, experiment, "search"):
        raise RunFailed("no trial ended well")
    assert tracking.client.get_run(parent).info.status == "FAILED"
    with closed_if_failed(tracking, experiment, "search"):
        assert tracking.find_or_create(experiment.key, "search") == parent
    assert tracking.client.get_run(parent).info.status == "RUNNING"


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


def test_a_moved_project_whose_database_is_held_says_so(project, tmp_path, monkeypatch):
    log(open_tracking(load_params(), "search"), "first", project("old"))
    shutil.move(tmp_path / "old", tmp_path / "new")
    project("new")
    with contextlib.closing(sqlite3.connect("mlflow.db")) as other:
        other.execute("BEGIN EXCLUSIVE")
        monkeypatch.setattr(database.sqlite3, "connect", partial(sqlite3.connect, timeout=0.1))  # else 5 s
        with pytest.raises(UserError, match=r"mlflow\.db: another process holds it"):
            open_tracking(load_params(), "search")


@pytest.fixture
def groups(tmp_path):
    """Prepared digits and their group tables: two folders."""
    write_store(open_source("sklearn:digits", tmp_path, image_size=8, channels=1), tmp_path / "store")
    store, split = open_store(tmp_path / "store", verify=False), split_classes(10, 6, 2, seed=3)
    tables = build_groups(split, SIZES, store)
    write_groups(tmp_path / "groups", split, tables, store.class_names, store.class_names)
    return tmp_path / "store", tmp_path / "groups"


def test_a_run_has_its_datasets_and_description_once_and_what_was_written_by_hand_stays(project, groups, monkeypatch):
    project("plain")
    monkeypatch.setenv("DVC_STAGE", "search")
    tracking = open_tracking(load_params(), "search")
    run_id = tracking.find_or_create("key", "trial")
    used = [dataset(*groups, "search_train"), dataset(*groups, "validation", 1)]
    tracking.describe(run_id, "A trial.", {"eta": 0.2}, used)
    first = tracking.client.get_run(run_id)
    tracking.client.set_tag(run_id, NOTE, "The one for the talk.")
    tracking.describe(run_id, "A trial.", {"eta": 0.2}, used)
    again = tracking.client.get_run(run_id)
    assert first.data.tags[NOTE].startswith("A trial.") and again.data.tags[NOTE] == "The one for the talk."
    assert (again.data.tags["stage"], again.data.tags["mlflow.source.name"]) == ("search", "dvc repro search")
    found = {each.dataset.name: each for each in again.inputs.dataset_inputs}
    assert len(again.inputs.dataset_inputs) == 2
    assert {name: each.tags[0].value for name, each in found.items()} == {
        "digits-split3-search": "training",
        "digits-split3-validation": "validation",
    }
    profile = json.loads(found["digits-split3-search"].dataset.profile)
    assert (profile["groups"], profile["classes"], profile["images_per_group"]) == (2, 4, 40)
    assert json.loads(found["digits-split3-validation"].dataset.profile)["groups"] == 1


def test_a_dataset_has_another_digest_where_its_groups_or_images_differ(groups):
    store, tables = groups
    digests = {dataset(store, tables, name, count).dataset.digest for name in ("train", "test") for count in (1, 2)}
    assert len(digests) == 4
    before = dataset(store, tables, "train").dataset.digest
    (store / "meta.json").write_text((store / "meta.json").read_text().replace('"images.npy": "', '"images.npy": "0'))
    dataset.cache_clear()
    assert dataset(store, tables, "train").dataset.digest != before


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
