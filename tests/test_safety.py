"""What a user can be handed runs no code, names stay in their folder, pages and telemetry stay on this machine."""

import ast
import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.groups import build
from pipeline.params import load_params
from pipeline.prepare import prepare
from pipeline.studies.definition import load_study
from pipeline.trial import load_state
from pudnet.baselines import load_method
from pudnet.data.groups import open_groups
from pudnet.data.sources import open_source
from pudnet.data.store import open_store
from pudnet.errors import UserError
from pudnet.network import PredictedNetwork
from pudnet.predictor import Predictor

ROOT = Path(__file__).parent.parent
CODE = [path for folder in ("pudnet", "pipeline") for path in sorted((ROOT / folder).rglob("*.py"))]


class Trap:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


def trapped_npy(path, mark):
    np.save(path, np.array([Trap(mark)], dtype=object), allow_pickle=True)


@pytest.mark.parametrize(
    "read",
    [Predictor.load, PredictedNetwork.load, lambda path: load_method(path, torch.device("cpu"))],
    ids=["hypernetwork", "network", "baseline"],
)
def test_a_pickle_in_place_of_a_model_is_refused_unread(read, tmp_path):
    mark, path = tmp_path / "mark", tmp_path / "model.safetensors"
    path.write_bytes(pickle.dumps(Trap(mark)))
    with pytest.raises(UserError):
        read(path)
    torch.save({"model": Trap(mark)}, path)
    with pytest.raises(UserError):
        read(path)
    assert not mark.exists()


def test_a_pickle_in_a_checkpoint_is_refused_unread(tmp_path):
    mark = tmp_path / "mark"
    torch.save({"model": Trap(mark)}, tmp_path / "state.pt")
    with pytest.raises(pickle.UnpicklingError, match="weights_only"):
        load_state(tmp_path)
    assert not mark.exists()


def test_pickled_arrays_in_data_are_refused_unread(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    mark = tmp_path / "mark"
    np.savez(tmp_path / "set.npz", images=np.array([Trap(mark)], dtype=object), labels=np.arange(1))
    with pytest.raises(UserError, match="set.npz cannot be read as an .npz of plain arrays"):
        open_source("npz:set.npz", tmp_path, 8, 1)
    prepare(load_params())
    build(load_params())
    store, groups = tmp_path / "data/prepared/train", tmp_path / "data/groups/split-0"
    for folder, read in ((store, lambda folder: open_store(folder, verify=False)), (groups, open_groups)):
        for path in folder.glob("*.npy"):
            trapped_npy(path, mark)
        with pytest.raises(UserError, match="damaged|cannot be read"):
            read(folder)
    assert not mark.exists()


def test_yaml_that_asks_for_code_is_refused_unread(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = f"!!python/object/apply:pathlib.Path.touch [{tmp_path / 'mark'}]\n"
    (tmp_path / "params.yaml").write_text(f"setting: {code}")
    (tmp_path / "studies").mkdir()
    (tmp_path / "studies" / "trap.yaml").write_text(f"title: {code}")
    for read in (load_params, lambda: load_study("trap")):
        with pytest.raises(UserError, match="not YAML"):
            read()
    assert not (tmp_path / "mark").exists()


def test_no_line_of_the_project_unpickles():
    """Arrays without pickles, tensors without code, YAML by safe loaders; `pickle` and its kin are not imported."""
    wanted = {"torch.load": ("weights_only", True), "np.load": ("allow_pickle", False)}
    calls = 0
    for path in CODE:
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                assert not {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"} & set(names), path
            if isinstance(node, ast.Call) and (name := ast.unparse(node.func)) in wanted:
                key, value = wanted[name]
                given = {
                    keyword.arg: ast.literal_eval(keyword.value) for keyword in node.keywords if keyword.arg == key
                }
                assert given == {key: value}, f"{path}: {ast.unparse(node)}"
                calls += 1
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("yaml.load", "yaml.unsafe_load"):
                assert ast.unparse(node).endswith("Loader=Loader)"), path  # a SafeLoader
    assert calls >= 4


def test_class_names_that_look_like_paths_stay_names(tmp_path, monkeypatch):
    project = tmp_path / "project"
    project.mkdir()
    monkeypatch.chdir(project)
    text = (ROOT / "params.yaml").read_text()
    Path("params.yaml").write_text(text.replace("source: null # sklearn", "source: npz:set.npz # sklearn"))
    names = ["../../up", "/tmp/root", "a/b", "..", "~", "C:\\x", "con", "$(touch x)", "`touch y`", "<b>"]
    labels = np.repeat(np.arange(10), 60)
    images = np.random.default_rng(0).integers(0, 255, (600, 8, 8), dtype=np.uint8)
    np.savez("set.npz", images=images, labels=labels, class_names=np.array(names))
    prepare(load_params())
    build(load_params())
    assert open_store(Path("data/prepared/train"), verify=True).class_names == tuple(names)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["project"]
    assert sorted(path.name for path in project.iterdir()) == ["data", "params.yaml", "set.npz"]
    split = json.loads(Path("data/groups/split-0/split.json").read_text())
    assert {*split["train_class_names"], *split["test_class_names"]} == set(names)


@pytest.mark.parametrize("name", ["../params", "results/../../params", "/etc/passwd", "dvc"])
def test_a_study_is_called_by_a_name_not_a_path(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "studies" / "results").mkdir(parents=True)
    (tmp_path / "studies" / "dvc.yaml").write_text("stages: {}")
    (tmp_path / "params.yaml").write_text("title: no study")
    with pytest.raises(UserError, match="study: unknown name"):
        load_study(name)


def test_the_pages_are_for_this_machine_alone():
    shown = subprocess.run(["make", "-n", "ui"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert re.search(r"mlflow ui --host 127\.0\.0\.1 ", shown)


def test_nothing_is_told_to_anyone_unless_the_user_asks(tmp_path):
    """DVC by its committed configuration; MLflow and Ray by what our modules set, where the user has set nothing."""
    config = (ROOT / ".dvc" / "config").read_text()
    assert "analytics = false" in config and "check_update = false" in config
    script = "import pipeline.cluster, pipeline.tracking, os; print(os.environ['RAY_USAGE_STATS_ENABLED'], "
    script += "os.environ['MLFLOW_DISABLE_TELEMETRY'])"
    clean = {key: value for key, value in os.environ.items() if key != "RAY_USAGE_STATS_ENABLED"}
    chosen = clean | {"MLFLOW_DISABLE_TELEMETRY": "false"}  # what a user has set stays
    done = subprocess.run([sys.executable, "-c", script], env=chosen, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "false"]
