"""A final training by several workers, as Ray Train runs it: gloo on CPUs, as NCCL would on GPUs."""

import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml

from pudnet import Predictor

ROOT = Path(__file__).parent.parent


def run(folder, stage):
    command = [sys.executable, "-m", f"pipeline.{stage}"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """Data and groups, and a choice of eta and depth as a search would have left it."""
    folder = tmp_path_factory.mktemp("parallel")
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["groups"] |= {"train_groups": 15, "search_groups": 4, "validation_groups": 4, "test_groups": 4}
    params["train"] |= {"groups_per_step": 2, "report_every": 6}
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    (folder / "results").mkdir()
    (folder / "results" / "best.yaml").write_text("splits: {0: {eta: 0.2, depth: 1, accuracy: 50.0}}")
    for stage in ("prepare", "groups"):
        run(folder, stage)
    return folder


def trained(project, folder, workers):
    shutil.copytree(project, folder)
    params = yaml.safe_load((folder / "params.yaml").read_text())
    params["resources"]["workers"] = workers
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    run(folder, "train")
    model = Predictor.load(folder / "models" / "pudnet.safetensors").model
    return pd.read_csv(folder / "results" / "train_curves.csv"), model.state_dict()


def test_two_workers_train_as_one_does_with_all_groups_of_a_step(project, tmp_path):
    """15 groups two at a step, reports at 6, 12 and 15: at the last step of each part a worker has none."""
    (one, expected), (two, found) = (trained(project, tmp_path / str(n), n) for n in (1, 2))
    assert "1 of 1 trials are finished already" in run(tmp_path / "2", "train")
    assert two.groups.tolist() == [6, 12, 15]
    for curve in ("loss", "metric_loss", "full_loss", "kl_loss", "train_accuracy"):
        assert two[curve].tolist() == pytest.approx(one[curve].tolist(), rel=1e-3)
    for name, weight in expected.items():
        assert (found[name] - weight).abs().max() <= 0.05 * weight.abs().max() + 1e-4, name
