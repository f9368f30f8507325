"""What a user can be handed runs no code, names stay in their folder, pages and telemetry stay on this machine."""

import ast
import json
import os
import pickle
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from pipeline.groups import groups as make_groups
from pipeline.params import load_params
from pipeline.prepare import prepare
from pipeline.runs.trial import load_state
from pipeline.studies.definition import load_study
from pudnet.baselines import load_method
from pudnet.card import Card, write_tensors
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


READERS = {  # and the kind of file that each reads
    "hypernetwork": (Predictor.load, "pudnet"),
    "network": (PredictedNetwork.load, "network"),
    "baseline": (lambda path: load_method(path, torch.device("cpu")), "r2d2"),
}


@pytest.mark.parametrize("read", [read for read, _ in READERS.values()], ids=READERS)
def test_a_pickle_in_place_of_a_model_is_refused_unread(read, tmp_path):
    mark, path = tmp_path / "mark", tmp_path / "model.safetensors"
    path.write_bytes(pickle.dumps(Trap(mark)))
    with pytest.raises(UserError):
        read(path)
    torch.save({"model": Trap(mark)}, path)
    with pytest.raises(UserError):
        read(path)
    assert not mark.exists()


@pytest.mark.parametrize(("read", "kind"), [*READERS.values()], ids=READERS)
def test_a_file_does_not_decide_what_is_imported(read, kind, tmp_path, monkeypatch):
    (tmp_path / "trap_nets.py").write_text("raise AssertionError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    card = Card(kind, "trap_nets:Net", 1, 8, (0.5,), (0.5,), 10.0, 1, classes=("a", "b"))
    write_tensors(tmp_path / "m.safetensors", {"w": torch.zeros(1)}, card)
    with pytest.raises(UserError, match="this file is for trap_nets:Net; give that network as `target`"):
        read(tmp_path / "m.safetensors")


def test_a_pickle_in_a_checkpoint_is_refused_unread(tmp_path):
    mark = tmp_path / "mark"
    torch.save({"model": Trap(mark)}, tmp_path / "state.pt")
    with pytest.raises(pickle.UnpicklingError, match="weights_only"):
        load_state(tmp_path)
    assert not mark.exists()


def test_a_checkpoint_with_a_page_of_zeros_is_refused(tmp_path):
    """As a power cut leaves it: torch reads it without a word."""
    path = tmp_path / "state.pt"
    torch.save({"model": torch.ones(10_000)}, path)
    content = path.read_bytes()
    path.write_bytes(content[:8192] + bytes(4096) + content[12288:])
    assert not torch.load(path, weights_only=True)["model"].all()
    with pytest.raises(zipfile.BadZipFile, match="is damaged"):
        load_state(tmp_path)


def test_pickled_arrays_in_data_are_refused_unread(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    mark = tmp_path / "mark"
    np.savez(tmp_path / "set.npz", images=np.array([Trap(mark)], dtype=object), labels=np.arange(1))
    with pytest.raises(UserError, match="set.npz cannot be read as an .npz of plain arrays"):
        open_source("npz:set.npz", tmp_path, 8, 1)
    prepare(load_params())
    make_groups(load_params())
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
    make_groups(load_params())
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


STRANGER = """
import sys
from ray._raylet import GcsClient
print(len(GcsClient(address=sys.argv[1]).get_all_node_info()))
"""
SESSION = f"""
import os, subprocess, sys
from pipeline.runs import cluster
import ray
with cluster.session():
    address = ray.get_runtime_context().gcs_address
    print("dashboard:", repr(ray._private.worker._global_node.webui_url))
    for token in (True, False):
        own = {{k: v for k, v in os.environ.items() if token or not k.startswith("RAY_AUTH")}} | {{"HOME": sys.argv[1]}}
        done = subprocess.run([sys.executable, "-c", {STRANGER!r}, address], env=own, capture_output=True, text=True)
        print("let in:", done.stdout.strip() == "1")
"""


def test_ray_has_no_dashboard_and_lets_nobody_else_in(tmp_path):
    """Its ports are open to the network whatever one does: a process without the session's token gets nothing."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    command = [sys.executable, "-c", SESSION, str(tmp_path)]
    said = subprocess.run(command, env=clean, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert said.splitlines() == ["dashboard: ''", "let in: True", "let in: False"]


SILENT = """
import pipeline.tracking.registry
from mlflow.telemetry.utils import is_telemetry_disabled
from ray._common.usage.usage_lib import usage_stats_enabled
print(not is_telemetry_disabled(), usage_stats_enabled())
"""


@pytest.mark.parametrize("chosen", [{}, {"MLFLOW_DISABLE_TELEMETRY": "false", "RAY_USAGE_STATS_ENABLED": "1"}])
def test_nothing_is_told_to_anyone_unless_the_user_asks(chosen):
    """MLflow and Ray as they see it themselves, from the one module that imports MLflow before any other of ours."""
    silencing = ("MLFLOW_DISABLE_TELEMETRY", "RAY_USAGE_STATS_ENABLED", "DO_NOT_TRACK", "CI", "PYTEST_CURRENT_TEST")
    clean = {key: value for key, value in os.environ.items() if key not in silencing}
    done = subprocess.run(
        [sys.executable, "-c", SILENT], env=clean | chosen, cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ([str(bool(chosen))] * 2)


def test_what_the_pages_have_users_start_tells_nothing_either():
    config = (ROOT / ".dvc" / "config").read_text()
    assert "analytics = false" in config and "check_update = false" in config
    starts, serves = 0, 0
    for name in (ROOT / "README.md", ROOT / "cluster.yaml", ROOT / "Makefile", *(ROOT / "docs").rglob("*.md")):
        blocks = re.split(r"\n\s*\n", name.read_text())
        for block in blocks:
            if "ray start --head" in block:
                starts += 1
                assert "--disable-usage-stats" in block, name
            if re.search(r"^(\s.*|\S*/|)mlflow (server|ui|models serve) ", block, re.MULTILINE):
                serves += 1
                assert "MLFLOW_DISABLE_TELEMETRY=true" in block, name
    assert starts and serves


def test_ray_takes_the_cluster_file():
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(yaml.safe_load((ROOT / "cluster.yaml").read_text()))
    validate_config(config)
    (kind,) = config["available_node_types"].values()
    assert kind["min_workers"] == kind["max_workers"] == len(config["provider"]["worker_ips"])  # all are started
