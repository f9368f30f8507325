"""Several at once: searches on one experiment, on one database, processes on a fresh one, `dvc repro` twice."""

import sys

import pandas as pd
import yaml

from tests.faults.harness import Run, runs_of, shorten
from tests.test_pipeline import copy_project, run

STEPS = [2, 4, 6, 8, 10, 12]
STUDY = {
    "over": {"groups.train_groups": 4, "groups.test_groups": 4},
    "columns": {"digits": {"setting": "digits"}},
    "rows": {"static trunk": {"method": "static_trunk"}},
    "measure": "losses",
}
LOGGERS = """
import multiprocessing, sys
from pipeline.params import load_params
from pipeline.tracking.runs import open_tracking

def log(number):
    tracking = open_tracking(load_params(), "search")
    run_id = tracking.find_or_create(f"key{number}", f"run{number}")
    for step in range(20):
        tracking.log_metrics(run_id, {"groups_per_second": number}, step)
    tracking.finish(run_id)
    assert not tracking.is_down

processes = [multiprocessing.get_context("fork").Process(target=log, args=(number,)) for number in range(10)]
for process in processes:
    process.start()
for process in processes:
    process.join()
sys.exit(max(process.exitcode for process in processes))
"""


def test_a_second_search_on_one_experiment_is_refused(undisturbed, start, same, tmp_path):
    project = undisturbed.before("search", tmp_path / "twice")
    first = start(project, "search").until("group     2")
    assert "search: is already running as process" in start(project, "search").badly(2)
    first.well()
    same(project, "search", "results/search.csv", "results/best.yaml")


def test_two_studies_at_once_wait_for_each_others_data(undisturbed, start, tmp_path):
    pages = []
    for names in (("one", "two"), ("alone",)):  # which nobody else needs
        project = tmp_path / names[-1]
        (project / "studies").mkdir(parents=True)
        (project / "params.yaml").write_text((undisturbed.run("groups") / "params.yaml").read_text())
        for name in names:
            (project / "studies" / f"{name}.yaml").write_text(yaml.safe_dump(STUDY | {"title": "Both"}))
        for study in [start(project, "study", name) for name in names]:
            study.well()
        pages += [pd.read_csv(project / "studies/results" / f"{name}.csv").drop(columns="study") for name in names]
        assert len([*(project / ".pud/studies").glob("*/data/prepared/train/images.npy")]) == 1
    pd.testing.assert_frame_equal(pages[0], pages[1])
    pd.testing.assert_frame_equal(pages[0], pages[2])


def test_two_searches_of_clones_on_one_fresh_database_do_not_mix(undisturbed, start, same, tmp_path):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    projects = [undisturbed.before("search", tmp_path / name) for name in ("one", "two")]
    runs = [start(project, "search", MLFLOW_TRACKING_URI=uri) for project in projects]
    for search, project in zip(runs, projects, strict=True):
        assert "tracking:" not in search.well()
        same(project, "search", "results/search.csv", "results/best.yaml")
    found = runs_of(tmp_path, uri, by_project=True)
    assert len(found) == 2
    for own in found.values():
        assert own == {
            "search-split0": ("FINISHED", []),
            "split0-eta0.0-depth1": ("FINISHED", STEPS),
            "split0-eta0.2-depth1": ("FINISHED", STEPS),
        }


def test_ten_processes_log_to_a_fresh_database_at_once(undisturbed, tmp_path):
    project = undisturbed.before("search", tmp_path / "ten")
    Run(project, sys.executable, "-c", LOGGERS).well()
    assert runs_of(project) == {f"run{number}": ("FINISHED", [*range(20)]) for number in range(10)}


def test_a_second_dvc_repro_is_refused_while_one_runs(tmp_path):
    project = copy_project(tmp_path / "project")
    shorten(project / "params.yaml")
    first = Run(project, "dvc", "repro", "groups").until("Running stage")
    try:
        second = run(project, "dvc", "repro", "groups")
        assert second.returncode != 0 and "busy" in (second.stdout + second.stderr).lower()
        first.well()
    finally:
        first.clear()
    assert (project / "data/groups/split-0").is_dir()
