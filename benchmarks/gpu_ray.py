"""Part `ray`: `dvc repro evaluate` at its smallest, two trials of its search on one card."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import yaml

from benchmarks.gpu_report import Report, Run
from pudnet.errors import RunFailed
from tests.smallest import shrink

ROOT = Path(__file__).resolve().parent.parent
NEEDED = ("ray", "mlflow", "dvc")
MADE = {".git", ".venv", ".venv-docs", "site", ".pud", "data", "results", "mlartifacts", "mlflow.db", "dvc.lock"}
NOT_COPIED = {ROOT: MADE, ROOT / ".dvc": {"cache", "tmp"}}
ELSEWHERE = {"RAY_ADDRESS", "MLFLOW_TRACKING_URI", "DVC_ROOT"}  # a run of its own, whatever the shell has set


def measure(run: Run, report: Report) -> None:
    """Run a copy of the project, or say what is missing. With `smallest` up to the search alone: a real one, by Ray."""
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        report.put("missing", missing)
        print(f"ray: not run, as {' and '.join(missing)} are not installed; `make repro` installs them")
        return
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        project = copy_project(Path(folder) / "pudnet")
        command = ["dvc", "repro", "search" if run.smallest else "evaluate"]
        start = time.perf_counter()
        environment = {key: value for key, value in os.environ.items() if key not in ELSEWHERE}
        report.put("command", " ".join(command))
        try:
            ended = subprocess.run(command, cwd=project, env=environment | {"PYTHONPATH": str(project)}, check=False)
        finally:  # also if the part's time is over
            report.put("seconds", time.perf_counter() - start)
            write_results(project / "results", report)
        if ended.returncode:
            raise RunFailed(f"ray: `{' '.join(command)}` ended with exit code {ended.returncode}")
    report.show("trials")


def write_results(results: Path, report: Report) -> None:
    """Report what there is: the search's trials, and the accuracy of its best."""
    if (trials := results / "search.csv").is_file():
        with trials.open() as rows:
            for row in csv.DictReader(rows):
                report.add("trials", row)
    if (metrics := results / "metrics.json").is_file():
        report.put("metrics", json.loads(metrics.read_text()))


def copy_project(project: Path) -> Path:
    """The project without what it has made, set to its smallest and to two trials side by side on one card."""
    shutil.copytree(ROOT, project, ignore=lambda folder, names: NOT_COPIED.get(Path(folder), set()) & set(names))
    subprocess.run(["git", "init", "--quiet"], cwd=project, check=True)  # DVC wants one
    path = project / "params.yaml"
    shrink(path)
    params = yaml.safe_load(path.read_text())
    params["resources"] |= {"gpus": 0.5, "cpus": max(1, (os.cpu_count() or 1) // 2)}
    path.write_text(yaml.safe_dump(params, sort_keys=False))
    return project
