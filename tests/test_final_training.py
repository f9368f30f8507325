"""The search with `train.patience`, and the final training by several workers."""

import json
import re
import shutil
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml

from pipeline.params import load_params
from pipeline.runs.final_training import read_best
from pipeline.runs.trial import MetaTraining, make_spec
from pudnet import Predictor
from tests.smallest import shrink
from tests.test_pipeline import copy_project, run


@pytest.fixture(scope="module")
def patient(tmp_path_factory) -> Path:
    """The default pipeline at its smallest, with patience, up to the search."""
    project = copy_project(tmp_path_factory.mktemp("searched") / "project")
    shrink(project / "params.yaml")
    params = yaml.safe_load((project / "params.yaml").read_text())
    params["train"] |= {"passes": 3, "patience": 1}
    params["baselines"] |= {"methods": ["r2d2", "pudnet_plus", "static_trunk"], "scratch_search_groups": 2}
    (project / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    stages(project, "prepare", "groups", "search")
    return project


STAGES = """
import importlib, sys
from pipeline.params import load_params

for name in sys.argv[1:]:
    getattr(importlib.import_module(f"pipeline.{name}"), name)(load_params())
"""


def stages(project: Path, *names: str) -> str:
    """Run some stages in one process, since each command takes seconds to start. Returns what they print."""
    done = run(project, sys.executable, "-u", "-c", STAGES, *names)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_with_patience_the_final_training_passes_its_groups_as_often_as_the_searchs_best_report(patient, tmp_path):
    """Of the bench, too, with nothing else to tune. A trial that ended early trains no further, noted or not."""
    project = tmp_path / "patient"
    shutil.copytree(patient, project, ignore=shutil.ignore_patterns("mlflow.db", "mlartifacts"))
    best = yaml.safe_load((project / "results/best.yaml").read_text())["splits"][0]
    ended = (project / ".pud/trials").glob("pudnet-split0-*/ended.json")
    first = min(ended, key=lambda file: json.loads(file.read_text())["groups"])
    first.unlink()  # as after a loss of power between a trial's last checkpoint and its end
    again = stages(project, "search")
    assert "1 of 2 trials are finished already" in again and not re.search(r"group +\d+ of 30", again)
    assert yaml.safe_load((project / "results/best.yaml").read_text())["splits"][0] == best
    stages(project, "train", "evaluate", "baselines")
    reports = "".join(log.read_text() for log in sorted((project / ".pud/log").iterdir()))
    search = pd.read_csv(project / "results/search.csv")
    assert best["passes"] == search.groups[search.accuracy.idxmax()] / 10
    assert best["accuracy"] == pytest.approx(search.accuracy.max(), abs=1e-3)
    for trial in ("split0-eta0.0-depth1", "split0-eta0.2-depth1", "r2d2-split0", "static_trunk-split0"):
        told = re.findall(rf" {trial}: group +(\d+) of 30, .* validation +([\d.]+)", reports)
        groups, accuracies = zip(*((int(groups), float(accuracy)) for groups, accuracy in told), strict=True)
        rises = [later > max(accuracies[:at]) for at, later in enumerate(accuracies) if at]
        assert all(rises[:-1]) and (not rises[-1] or groups[-1] == 30)  # one report without a rise, or the end
    tuned = pd.read_csv(project / "results/tuning.csv").set_index("method").groups
    curves = pd.read_csv(project / "results/loss_curves.csv").groupby("method")["groups"].max()
    assert "pudnet_plus" not in tuned
    assert curves.to_dict() == {
        "pudnet": round(best["passes"] * 19),
        "static_trunk": round(tuned.static_trunk / 10 * 19),
        "r2d2": round(tuned.r2d2 / 10 * 19),
        "pudnet_plus": 3 * 19,  # all passes, since its rate falls to 0 by their end
    }


def test_two_workers_train_as_one_does_with_all_groups_of_a_step(patient, tmp_path, monkeypatch):
    """By Ray Train, gloo between CPUs as NCCL between GPUs. 19 groups, two a step: at the last a worker has none.

    One pass, in fp32 on any processor: in bf16 a group's rounding depends on how many share its step.
    """
    project = tmp_path / "two"
    shutil.copytree(patient, project, ignore=shutil.ignore_patterns(".pud", "mlflow.db", "mlartifacts"))
    params = yaml.safe_load((project / "params.yaml").read_text())
    params["resources"] |= {"workers": 2, "cpus": 1}
    params["train"] |= {"precision": "fp32", "augment": "shift", "passes": 1, "patience": None}
    (project / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    best = yaml.safe_load((project / "results/best.yaml").read_text())
    del best["splits"][0]["passes"]
    (project / "results/best.yaml").write_text(yaml.safe_dump(best, sort_keys=False))
    stages(project, "train")
    two = pd.read_csv(project / "results/train_curves.csv")
    assert "1 of 1 trials are finished already" in stages(project, "train")
    monkeypatch.chdir(project)
    changed = load_params()
    spec = make_spec(changed, "one", "pudnet", 0, read_best(changed)[0].cell, "train", 0)
    alone = MetaTraining(spec, torch.device("cpu"))
    one = pd.DataFrame(alone.run())
    assert two.groups.tolist() == one.groups.tolist() == [10, 19]
    for curve in ("loss", "metric_loss", "full_loss", "kl_loss"):
        assert two[curve].tolist() == pytest.approx(one[curve].tolist(), rel=1e-3)
    # On some processors rounding decides about one image of the 700 or so between two reports.
    assert two.train_accuracy.tolist() == pytest.approx(one.train_accuracy.tolist(), abs=0.3)
    found = Predictor.load(project / "models/pudnet.safetensors").model.state_dict()
    for name, weight in alone.state_dict()["model"].items():
        assert (found[name] - weight).abs().max() <= 0.05 * weight.abs().max() + 1e-4, name
