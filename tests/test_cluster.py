"""A trial's share of a cluster whose nodes differ, and what is said of errors.

Ray is asked which nodes there are; here it is told.
"""

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


CUDA = """Traceback (most recent call last):
  File "trial.py", line 1, in _train
    trial.step()
torch.AcceleratorError: CUDA error: no kernel image is available for execution on the device
Search for `cudaErrorNoKernelImageForDevice' in the documentation for more information.
For debugging consider passing CUDA_LAUNCH_BLOCKING=1
Compile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.
"""


def test_the_line_of_an_error_is_the_one_that_names_it():
    assert cluster.reason(CUDA).startswith("torch.AcceleratorError: CUDA error: no kernel image")
    ours = CUDA.partition("torch.")[0] + "pudnet.errors.RunFailed: the loss is not finite\n"
    assert (
        cluster.reason(f"{CUDA}\nDuring handling of it, another exception occurred:\n\n{ours}")
        == "the loss is not finite"
    )
    image = ours.replace("pudnet.errors.RunFailed: the loss is not finite", "zipfile.BadZipFile: damaged")
    assert (
        cluster.reason(f"{CUDA}\nThe above exception was the direct cause:\n\n{image}") == "zipfile.BadZipFile: damaged"
    )
    assert cluster.reason("The actor died.\nA long story: Error: of it.") == "The actor died."


@pytest.mark.parametrize(
    ("usable", "hidden", "lines"), [(False, "", 0), (False, "-1", 0), (False, "0", 1), (True, "0", 0)]
)
def test_a_gpu_that_torch_cannot_use_is_left_to_others(usable, hidden, lines, tmp_path, monkeypatch, capsys):
    """Else trials on the CPU would wait for each other's share of it. Unless it is hidden, a line says so."""
    monkeypatch.setattr(cluster, "DRIVER", tmp_path)
    monkeypatch.setattr(cluster.torch.cuda, "is_available", lambda: usable)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert cluster._usable_gpus() == (None if usable else 0)
    assert capsys.readouterr().out.count("PyTorch cannot use this machine's GPU") == lines
