"""A trial's share of a cluster whose nodes differ. Ray is asked which nodes there are; here it is told."""

import pytest
import yaml

from pipeline.params import resolve
from pipeline.runs import cluster
from pudnet.errors import UserError
from tests.test_study import ROOT


@pytest.fixture
def params(monkeypatch):
    """Parameters for a cluster of a large node without GPUs and two smaller ones with one each."""
    nodes = [{"CPU": 64.0}, {"CPU": 8.0, "GPU": 1.0}, {"CPU": 4.0, "GPU": 1.0}]
    told = [{"Alive": True, "Resources": own} for own in nodes] + [{"Alive": False, "Resources": {"CPU": 99.0}}]
    monkeypatch.setattr(cluster.ray, "nodes", lambda: told)

    def given(**resources):
        raw = yaml.safe_load((ROOT / "params.yaml").read_text())
        raw["resources"] |= resources
        return resolve(raw)

    return given


def test_the_largest_node_is_one_that_has_a_trials_gpus(params):
    assert cluster.largest_node(params(gpus=1)) == cluster.largest_node(params(gpus=0.5)) == 8
    assert cluster.largest_node(params(gpus=0)) == 64
    assert cluster.share(params(gpus=1, cpus=8)) == {"cpu": 8, "gpu": 1}
    with pytest.raises(UserError, match=r"resources.cpus: 9 for a trial, but the largest node with 1 GPU\(s\) has 8"):
        cluster.share(params(gpus=1, cpus=9))
    with pytest.raises(UserError, match="resources.gpus: 2 for a trial; give a fraction, or a whole number up to 1"):
        cluster.largest_node(params(gpus=2))


def test_workers_have_room_on_all_nodes_together(params):
    assert cluster.has_room(params(gpus=0.5, cpus=1), 4) and not cluster.has_room(params(gpus=0.5, cpus=1), 5)
    assert cluster.has_room(params(gpus=0, cpus=4), 19) and not cluster.has_room(params(gpus=0, cpus=4), 20)
