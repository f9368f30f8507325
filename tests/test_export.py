"""What a predicted network is written to for others: read back by the others' own means, it gives the same logits."""

import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close
from torchvision.models import resnet18

from pudnet import PredictedNetwork, Predictor
from pudnet.errors import RunFailed, UserError

LABELS = ["red", "green", "blue"] * 8


@pytest.fixture(scope="module", params=[("convnet3", 1, 8), ("resnet18", 3, 32)], ids=lambda p: p[0])
def network(request):
    target, channels, size = request.param
    images = np.random.default_rng(0).integers(0, 256, (24, size, size, channels), dtype=np.uint8)
    return Predictor.untrained(target, channels, size).predict(images, LABELS)


@pytest.fixture(scope="module")
def images(network):
    card = network.card
    return torch.rand(5, card.channels, card.image_size, card.image_size, generator=torch.Generator().manual_seed(1))


def test_onnx_gives_the_same_logits_for_any_number_of_images(network, images, tmp_path):
    network.export(tmp_path / "n.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "n.onnx")
    for count in (1, 5):
        found = session.run(["logits"], {"images": images[:count].numpy()})[0]
        assert_close(torch.from_numpy(found), network(images[:count]), rtol=1e-4, atol=1e-3)
    model = onnx.load(tmp_path / "n.onnx")
    (card,) = [entry.value for entry in model.metadata_props if entry.key == "pudnet"]
    assert json.loads(card)["classes"] == ["blue", "green", "red"]
    assert "MaxPool" in {node.op_type for node in model.graph.node}  # a runtime's own kernels
    assert [path.name for path in tmp_path.iterdir()] == ["n.onnx"]


def test_exported_program_gives_the_same_logits(network, images, tmp_path):
    network.export(tmp_path / "n.pt2")
    extra = {"pudnet.json": ""}
    program = torch.export.load(tmp_path / "n.pt2", extra_files=extra).module()
    for count in (1, 5):
        assert_close(program(images[:count]), network(images[:count]), rtol=1e-4, atol=1e-3)
    assert json.loads(extra["pudnet.json"])["target"] == network.card.target


def test_state_dict_loads_strictly_into_the_plain_target(network, images, tmp_path):
    network.export(tmp_path / "state.safetensors")
    state = load_file(tmp_path / "state.safetensors")
    assert "centroids" not in state
    if network.card.target == "resnet18":
        plain = resnet18()
        plain.fc = torch.nn.Identity()
        plain.load_state_dict(state, strict=True)
        found = plain.eval()(network.normalize(images))
        assert_close(found, network.features(images), rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match="holds a state_dict, not a predicted network"):
        PredictedNetwork.load(tmp_path / "state.safetensors")


def test_exporting_leaves_the_network_as_it_is(network, images, tmp_path):
    kinds, before = [type(module) for module in network.modules()], network(images)
    for suffix in ("pt2", "safetensors"):
        network.export(tmp_path / f"n.{suffix}")
    assert [type(module) for module in network.modules()] == kinds and torch.equal(network(images), before)


def test_what_differs_is_not_written(network, tmp_path, monkeypatch):
    monkeypatch.setattr("pudnet.export.LARGEST_DIFFERENCE", -1.0)
    with pytest.raises(RunFailed, match="logits differ by .*nothing was written"):
        network.export(tmp_path / "n.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "message"), [("n.h5", r"exports end in \.onnx"), ("f/n.pt2", "cannot be written")])
def test_unfit_paths_are_refused(name, message, network, tmp_path):
    (tmp_path / "f").write_text("in the way")
    with pytest.raises(UserError, match=message):
        network.export(tmp_path / name)
