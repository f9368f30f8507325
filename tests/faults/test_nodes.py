"""Nodes of a cluster are lost, join, have a GPU or none: several `ray start` on this machine, each a session."""

from pathlib import Path

import pytest

from tests.faults.harness import Run, change, shorten
from tests.test_pipeline import copy_project

SEARCH = ("results/search.csv", "results/best.yaml")
TRIALS = ("split0-eta0.0-depth1", "split0-eta0.2-depth1")


def test_a_trial_whose_node_is_lost_goes_on_at_another(undisturbed, start, same, cluster, tmp_path):
    project = undisturbed.before("search", tmp_path / "nodes")
    nodes = [cluster.add(), cluster.add()]
    run = start(project, "search", **cluster.joining)
    for trial in TRIALS:  # side by side, one a node
        run.until(f"{trial}: group     4")
    nodes[-1].clear()
    said = run.well()
    assert all(said.count(f"{trial}: group     {step}") == 1 for trial in TRIALS for step in (2, 4))
    same(project, "search", *SEARCH)


def test_a_search_that_no_node_has_room_for_says_so_and_waits(undisturbed, start, same, cluster, tmp_path):
    project = undisturbed.before("search", tmp_path / "waits")
    node = cluster.add()
    run = start(project, "search", **cluster.joining).until(f"{TRIALS[0]}: group     4")
    node.clear()
    waits = f"no trial is at work; waiting for a node with {cluster.cpus} CPU(s) and 0 GPU(s) free"
    run.until(waits)
    cluster.add()
    assert f"{TRIALS[0]}: group     2" not in run.well().partition(waits)[2]
    same(project, "search", *SEARCH)


def test_repro_on_a_cluster_runs_the_code_that_it_is_started_from(undisturbed, same, cluster, tmp_path):
    """All its stages. The nodes find the project's code by no path of their own, but the installed one's."""
    project = copy_project(tmp_path / "project")
    shorten(project / "params.yaml")
    ran = tmp_path / "ran"
    with (project / "pipeline/runs/trial.py").open("a") as code:
        code.write(f"\nwith open({str(ran)!r}, 'a') as file:\n    print(__file__, file=file)\n")
    for _ in range(2):
        cluster.add(PYTHONPATH="")
    run = Run(project, "dvc", "repro", PYTHONPATH=str(project), **cluster.joining)
    parts = ("stage 'train'", "stage 'baselines'", "2 final training(s)", "protonet, split 0", "stage 'report'")
    for part in parts:  # a test is patient with each, since all stages together take long
        run.until(part)
    run.well()
    places = {Path(line).parents[2] for line in ran.read_text().splitlines()}
    assert {place for place in places if "runtime_resources" in place.parts} == places - {project}
    assert len(places) > 1
    same(project, "baselines", "results/metrics.json", "results/accuracies.csv")


def test_a_node_that_joins_gets_the_trial_that_waits(undisturbed, start, same, cluster, tmp_path):
    project = undisturbed.before("search", tmp_path / "joins")
    first = cluster.add()
    run = start(project, "search", **cluster.joining).until(f"{TRIALS[0]}: group     2")
    (worker,) = first.workers()
    worker.suspend()  # the only trial that there was room for stands still
    second = cluster.add()
    run.until(f"{TRIALS[1]}: group    12")
    assert second.workers() and f"{TRIALS[0]}: group    12" not in run.out
    worker.resume()
    run.well()
    same(project, "search", *SEARCH)


@pytest.mark.parametrize("gpus", [1, 0])
def test_trials_run_where_the_gpus_are_or_everywhere_without(undisturbed, start, same, cluster, gpus, tmp_path):
    """Where there is no GPU but in Ray's count, a trial computes on the cores of the node it was given."""
    project = undisturbed.before("search", tmp_path / "mixed")
    change(project, "resources", gpus=gpus)
    nodes, ran = [cluster.add(gpus=1), cluster.add()], set()
    run = start(project, "search", **cluster.joining)

    def last_reported():
        ran.update(number for number, node in enumerate(nodes) if node.workers())
        return f"{TRIALS[1]}: group    12" in run.out

    run.until(last_reported)
    run.well()
    assert ran == ({0} if gpus else {0, 1})
    same(project, "search", *SEARCH)
