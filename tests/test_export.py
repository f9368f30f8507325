"""What a predicted network is written to for others: read back by the others' own means, it gives the same logits."""

import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close
from torchvision.models import mnasnet0_5, resnet18

from pudnet import PredictedNetwork, Predictor
from pudnet.errors import RunFailed, UserError

LABELS = ["red", "green", "blue"] * 8


def predicted(target, channels, size):
    images = np.random.default_rng(0).integers(0, 256, (24, size, size, channels), dtype=np.uint8)
    return Predictor.untrained(target, channels, size).predict(images, LABELS)


def queries(network):
    card = network.card
    return torch.rand(5, card.channels, card.image_size, card.image_size, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def network():
    return predicted("convnet3", channels=1, size=8)


@pytest.fixture(scope="module")
def images(network):
    return queries(network)


@pytest.fixture(scope="module")
def resnet():
    return predicted("resnet18", channels=3, size=32)


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


def test_exported_program_gives_the_same_logits(resnet, tmp_path):
    resnet.export(tmp_path / "n.pt2")
    extra, images = {"pudnet.json": ""}, queries(resnet)
    program = torch.export.load(tmp_path / "n.pt2", extra_files=extra).module()
    for count in (1, 5):
        assert_close(program(images[:count]), resnet(images[:count]), rtol=1e-4, atol=1e-3)
    assert json.loads(extra["pudnet.json"])["target"] == "resnet18"


def test_state_dict_loads_strictly_into_torchvisions_network(resnet, tmp_path):
    resnet.export(tmp_path / "state.safetensors")
    plain, images = resnet18(), queries(resnet)
    plain.fc = torch.nn.Identity()
    plain.load_state_dict(load_file(tmp_path / "state.safetensors"), strict=True)
    assert_close(plain.eval()(resnet.normalize(images)), resnet.features(images), rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match="holds a state dict, not a predicted network"):
        PredictedNetwork.load(tmp_path / "state.safetensors")


def test_state_dict_of_layers_that_look_at_their_versions_is_exported(tmp_path):
    mnasnet = mnasnet0_5()
    mnasnet.classifier = torch.nn.Identity()
    predicted(mnasnet, channels=3, size=32).export(tmp_path / "n.safetensors")
    assert load_file(tmp_path / "n.safetensors").keys() == mnasnet.state_dict().keys()


def test_exporting_leaves_the_network_as_it_is(network, images, tmp_path):
    kinds, before = [type(module) for module in network.modules()], network(images)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    for suffix in ("pt2", "safetensors"):
        network.export(tmp_path / f"n.{suffix}")
    assert torch.equal(torch.rand(3), expected)
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
