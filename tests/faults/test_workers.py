"""One training by two workers of a node's or a trial's half each: its driver, a worker, a worker's node is killed."""

from pathlib import Path

import pytest

from tests.faults.harness import Run, change, checkpoints, python, truncate

RESULTS = ("models/pudnet.safetensors", "results/train_curves.csv")


def by_two(undisturbed, folder: Path) -> Path:
    """A project before a training by two workers."""
    project = undisturbed.before("train", folder)
    change(project, "train", groups_per_step=2)
    change(project, "resources", workers=2, cpus=1)
    return project


@pytest.fixture(scope="module")
def whole(undisturbed, tmp_path_factory):
    """What such a training ends with where nothing goes wrong."""
    project = by_two(undisturbed, tmp_path_factory.mktemp("workers") / "whole")
    Run(project, *python("train")).well()
    return [(project / name).read_bytes() for name in RESULTS]


def ends_as(whole, project: Path) -> bool:
    return [(project / name).read_bytes() for name in RESULTS] == whole


def test_workers_whose_driver_is_killed_go_on_also_from_a_truncated_checkpoint(undisturbed, start, whole, tmp_path):
    project = by_two(undisturbed, tmp_path / "driver")
    start(project, "train").until("train-pudnet-split0: group     8").hit().clear()
    truncate(checkpoints(project)[-1])
    said = start(project, "train").well()
    assert said.count("is damaged; its trial goes on from what was before") == 1
    assert "train-pudnet-split0: group     2" not in said  # what they had done by then stays done
    assert ends_as(whole, project)


def test_a_worker_that_is_killed_is_replaced(undisturbed, start, whole, tmp_path):
    project = by_two(undisturbed, tmp_path / "worker")
    run = start(project, "train").until("train-pudnet-split0: group     4")
    first, _ = run.workers("RayTrainWorker")
    first.kill()
    said = run.well()
    assert said.count("train-pudnet-split0: group     2") == 1
    assert ends_as(whole, project)


def test_a_worker_whose_node_is_lost_is_replaced_at_one_that_joins(undisturbed, start, whole, cluster, tmp_path):
    project = by_two(undisturbed, tmp_path / "node")
    cluster.cpus = 1
    nodes = [cluster.add() for _ in range(3)]
    run = start(project, "train", **cluster.joining).until("train-pudnet-split0: group     4")
    working = [node for node in nodes if node.workers("RayTrainWorker")]
    assert len(working) == 2
    spare = next(node for node in nodes if node not in working)
    spare.clear()
    working[-1].clear()
    run.until("no trial is at work; waiting for a node with 1 CPU(s) and 0 GPU(s) free for each of 2 workers")
    cluster.add()
    said = run.well()
    assert said.count("train-pudnet-split0: group     2") == 1
    assert ends_as(whole, project)
