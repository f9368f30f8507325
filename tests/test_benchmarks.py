"""The floors that speed is compared with are counted right, and the benchmarks run."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import finetuning, gpu, gpu_scale, prediction
from benchmarks.floors import Counter, Machine
from benchmarks.gpu_fast import outermost
from benchmarks.gpu_scale import METHODS
from pudnet.data.sources import open_source
from pudnet.errors import UserError, exit_code
from pudnet.predictor import Predictor

MACHINE = Machine("cpu", 1, "float32", flops=1000.0, bandwidth=100.0, itemsize=4)


def count(network, images):
    counter = Counter(MACHINE)
    counter.watch(network)
    network(images)
    return counter


def test_operations_are_those_that_torch_counts_forward_and_backward():
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 5, stride=2), nn.Flatten(), nn.Linear(200, 7)
    )
    images = torch.randn(4, 3, 16, 16)
    with FlopCounterMode(display=False) as torchs:
        network(images).sum().backward()
    operations = sum(seconds for seconds, _ in count(network, images).layers) * MACHINE.flops
    assert operations == torchs.get_total_flops()


def test_taps_that_meet_only_padding_are_not_counted():
    padded, centre = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
    images = torch.randn(2, 4, 1, 1)
    assert count(padded, images).layers == count(centre, images).layers


def test_floor_is_the_longer_time_of_each_layer_and_the_parameters_traffic():
    images = torch.randn(1, 2, 4, 4, requires_grad=True)  # 32 numbers
    counter = count(nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)), images)
    floor = counter.floor(parameters=5)
    operations, moved = 3 * 2 * 32 * 2 / 1000, 5 * 32 * 4 / 100  # of each layer
    assert floor.operations_ms == pytest.approx(1000 * operations)
    assert floor.bytes_ms == pytest.approx(1000 * (2 * moved + 5 * 40 / 100))
    assert floor.floor_ms == pytest.approx(1000 * (2 * max(moved, operations) + 2))


def test_the_prediction_benchmark_prints_a_table_and_writes_json(tmp_path, monkeypatch, capsys):
    out = tmp_path / "new" / "prediction.json"
    monkeypatch.setattr("sys.argv", ["prediction", "--targets", "convnet3", "--repeats", "1", "--out", str(out)])
    monkeypatch.setattr(prediction, "PUDNET", tmp_path / "missing")  # whatever has been trained in this folder
    assert exit_code(prediction.main) == 0
    printed = capsys.readouterr().out
    assert "calibration" in printed and f"no trained model at {tmp_path}" in printed
    (row,) = json.loads(out.read_text())["rows"]
    assert row["weights"] == 75_456 and 0 < row["parts"]["generation_ms"] < row["parts"]["total_ms"]


def test_the_finetuning_benchmark_is_on_classes_that_the_model_never_saw(tmp_path, monkeypatch, capsys):
    model, out = tmp_path / "model.safetensors", tmp_path / "finetuning.json"
    predictor = Predictor.untrained("convnet3", channels=1, image_size=8, variant="pudnet_plus")
    predictor.card.provenance["train_classes"] = list("01234")
    predictor.save(model)
    arguments = ["--model", str(model), "--source", "sklearn:digits", "--images", "40", "--new", "50", "--epochs", "12"]
    arguments += ["--augment", "none", "--fives", "1"]
    monkeypatch.setattr("sys.argv", ["finetuning", *arguments, "--out", str(out)])
    finetuning.main()
    (five,) = json.loads(out.read_text())["fives"]  # of the five digits that are left
    assert 40 < five["predicted"] < five["finetuned"] <= 100 and five["held_out_random_12"] <= 100
    assert "as predicted from all 200" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["finetuning", *arguments[:4], "--images", "170", "--out", str(out)])
    with pytest.raises(UserError, match="--images 170 and --new 400: a class has 174 images"):
        finetuning.main()
    predictor.card.provenance["train_classes"] = list("0123")
    digits = open_source("sklearn:digits", tmp_path, 8, 1)
    drawn = [finetuning.unseen_classes(predictor, digits, 9, np.random.default_rng(seed)) for seed in (0, 0, 1)]
    sets = [[tuple(five) for five in fives] for fives in drawn]
    assert sets[0] == sets[1] != sets[2] and set().union(*sets[0]) == set(range(4, 10))
    predictor.card.provenance["train_classes"] = list("012345")
    predictor.save(model)
    with pytest.raises(UserError, match="sklearn:digits: 4 classes that the model was not trained on; it takes 5"):
        finetuning.main()


def test_the_gpu_benchmark_runs_every_part_without_a_gpu(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--smallest", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(f"{part}: done" in done.stdout for part in gpu.PARTS)
    parts = {part: json.loads((tmp_path / f"{part}.json").read_text()) for part in gpu.PARTS}
    assert all(content["about"]["device"] == "cpu" and content["about"]["smallest"] for content in parts.values())
    assert {row["outcome"] for row in parts["correct"]["tests"]} == {"passed", "skipped"}
    assert [row["groups_a_step"] for row in parts["fast"]["steps"]] == [1, 2]
    assert {row["what"] for row in parts["fast"]["profile"]} > {"all convolutions"}
    assert {row["method"]: row["groups"] for row in parts["scale"]["methods"]} == dict.fromkeys(METHODS, 8)
    assert all(60 < row["accuracy"] <= 100 for row in parts["scale"]["methods"])  # by chance: 50
    assert sorted(row["eta"] for row in parts["ray"]["trials"]) == ["0", "0.2"]


def test_a_part_that_takes_too_long_ends_and_says_so(tmp_path):
    ended = gpu.run_part("scale", ["--device", "cpu", "--smallest", "--out", str(tmp_path)], "cpu", limit=1)
    assert ended.how == "did not end within its 1 s"


def test_nothing_that_a_part_started_is_left():
    """Here a process that does not end when it is asked to, though its parent does."""
    stubborn = "trap '' TERM; echo started; while true; do sleep 1; done"
    process = subprocess.Popen(
        ["bash", "-c", f"({stubborn}) & wait"], stdout=subprocess.PIPE, start_new_session=True, text=True
    )
    assert process.stdout.readline() == "started\n"
    gpu._end(process)
    assert process.communicate(timeout=10)[0] == ""  # whoever could write to it has ended


def test_a_long_training_has_a_row_at_each_milestone_that_a_step_passes(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_scale, "MILESTONES", (1, 3, 100))
    scale = replace(gpu_scale.smallest(None), report_every=2)
    bench, rows = gpu_scale.make_bench(scale, torch.device("cpu"), tmp_path), []
    gpu_scale.train(bench, "static trunk", METHODS["static trunk"], 8, rows.append)
    assert [row["groups"] for row in rows] == [2, 4, 8]  # not at its report at 6


def test_an_operator_that_calls_itself_is_counted_once():
    images, kernels = torch.randn(2, 3, 1, 8, 8), torch.randn(2, 4, 1, 3, 3)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        torch.vmap(nn.functional.conv2d)(images, kernels)
    events = [event for event in seen.events() if event.name == "aten::convolution"]
    (only,) = outermost(seen.events(), {"aten::convolution"})
    assert len(events) > 1 and only.cpu_time_total == max(event.cpu_time_total for event in events)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_gpu_benchmark_says_in_a_line_that_there_is_no_gpu(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["gpu", "--out", str(tmp_path)])
    assert exit_code(gpu.main) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not list(tmp_path.iterdir())
