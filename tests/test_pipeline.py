"""The stages as their users run them: `dvc repro` in a clone, interruptions, mistakes."""

import base64
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from mlflow import MlflowClient
from sklearn.datasets import load_digits
from torch.testing import assert_close

from pipeline.baselines import baselines
from pipeline.check import check
from pipeline.evaluate import evaluate
from pipeline.groups import groups
from pipeline.params import load_params
from pipeline.prepare import prepare
from pipeline.publish import publish
from pipeline.runs import cluster
from pipeline.runs.trial import MetaTraining, make_spec
from pipeline.search import search
from pipeline.stage import run_stage
from pipeline.tracking.registry import download, png
from pipeline.train import train
from pudnet import PredictedNetwork, Predictor
from pudnet.baselines import LEARNED
from pudnet.errors import UserError
from pudnet.targets import build_target
from tests.smallest import shrink

ROOT = Path(__file__).parent.parent
SCRATCH = {f"scratch_{name}_{epochs}" for name in ("adam", "gc") for epochs in (1, 2)}
METHODS = {*LEARNED, "pudnet_plus", "static_trunk", "constant_sketch", "shuffled_sketch", "random_weights"}


def environment(project: Path) -> dict[str, str]:
    """This interpreter's commands, importing the copy of the project; no server or cluster of the developer's."""
    own = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(project)}
    dropped = ("MLFLOW_TRACKING_URI", "RAY_ADDRESS", "DVC_ROOT", "DVC_EXP_NAME")
    return {**{k: v for k, v in os.environ.items() if k not in dropped}, **own}


def run(project: Path, *command: str) -> subprocess.CompletedProcess:
    return subprocess.run(command, cwd=project, env=environment(project), capture_output=True, text=True, check=False)


def copy_project(destination: Path) -> Path:
    """What git tracks, and what it would, in a repository of its own."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in listed.stdout.splitlines():
        if not name.startswith(("results/", "dvc.lock")) and (ROOT / name).is_file():
            (destination / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, destination / name)
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "copy"]):
        git = ["git", "-c", "user.name=test", "-c", "user.email=test@example.invalid", *command]
        subprocess.run(git, cwd=destination, check=True)
    return destination


@pytest.fixture(scope="module")
def repro(tmp_path_factory) -> Path:
    """A clone in which `dvc repro` ran at its smallest."""
    project = copy_project(tmp_path_factory.mktemp("clone"))
    shrink(project / "params.yaml")
    done = run(project, "dvc", "repro")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.findall("Running stage '(.*)'", done.stdout)[:2] == ["check", "prepare"]
    return project


def test_repro_leaves_every_result_and_has_nothing_to_do_afterwards(repro):
    metrics = json.loads((repro / "results/metrics.json").read_text())
    assert 50 < metrics["accuracy"] <= 100
    assert metrics["ci95"] > 0
    frame = pd.read_csv(repro / "results/accuracies.csv")
    assert set(frame.method) == METHODS | SCRATCH | {"pudnet"}
    sizes = frame.groupby("method").size()
    assert (sizes[[*METHODS]] == metrics["test_groups"]).all() and (sizes[[*SCRATCH]] == 2).all()
    compared = json.loads((repro / "results/baselines.json").read_text())["methods"]
    paired = frame.pivot(index="group", columns="method", values="accuracy")
    for method in METHODS | SCRATCH:
        assert compared[method]["accuracy"] == pytest.approx(paired[method].mean(), abs=1e-3)
        assert compared[method]["difference"] == pytest.approx((paired[method] - paired.pudnet).mean(), abs=1e-3)
    times = json.loads((repro / "results/adaptation.json").read_text())["milliseconds"]
    assert set(times) == METHODS - {"constant_sketch", "shuffled_sketch"} | SCRATCH | {"pudnet"}
    assert frame[frame.method == "pudnet"].accuracy.mean() == pytest.approx(metrics["accuracy"], abs=1e-3)
    assert "PudNet" in (repro / "results/report.html").read_text()
    again = run(repro, "dvc", "repro")
    assert "Data and pipelines are up to date" in again.stdout


def test_the_search_picks_its_best_row(repro):
    rows = pd.read_csv(repro / "results/search.csv")
    best = yaml.safe_load((repro / "results/best.yaml").read_text())["splits"][0]
    assert len(rows) == 2
    assert best["eta"] == rows.loc[rows.accuracy.idxmax(), "eta"]


def test_predicted_weights_load_into_the_plain_target(repro):
    Predictor.load(repro / "models/pudnet.safetensors")
    files = sorted((repro / "results/weights/split-0").glob("*.safetensors"))
    assert len(files) == 2
    for file in files:
        network = PredictedNetwork.load(file)
        build_target("convnet3", 1, 8).network.load_state_dict(network.target_state_dict(), strict=True)
        assert len(network.classes) == 2


def test_mlflow_has_one_finished_run_a_search_trial_training_and_evaluation(repro):
    client = MlflowClient(f"sqlite:///{repro}/mlflow.db")
    experiment = client.get_experiment_by_name("pudnet-digits-convnet3")
    runs = client.search_runs([experiment.experiment_id])
    assert {run.info.status for run in runs} == {"FINISHED"}
    children = {run.info.run_name: run.data.tags.get("mlflow.parentRunId") for run in runs}
    parents = {run.info.run_name: run.info.run_id for run in runs if run.info.run_id in children.values()}
    assert set(parents) == {"search-split0", "tune-baselines"}
    trials = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parents["search-split0"]]
    assert {run.info.run_name for run in trials} == {"split0-eta0.0-depth1", "split0-eta0.2-depth1"}
    tuned = {
        run.data.params["method"]
        for run in runs
        if run.data.tags.get("mlflow.parentRunId") == parents["tune-baselines"]
    }
    assert tuned == {"protonet", "scratch_gc"}  # the others' grids have one cell
    trained = {f"train-{method}-split0" for method in ("pudnet", "pudnet_plus", "static_trunk", *LEARNED)}
    measured = {f"baseline-{method}" for method in (*METHODS, "scratch_adam", "scratch_gc")}
    assert {name for name, parent in children.items() if parent is None} == {
        *parents,
        *trained,
        *measured,
        "evaluate-pudnet",
    }
    variants = {run.info.run_name: run.data.tags["variant"] for run in runs}
    assert (variants["train-pudnet_plus-split0"], variants["train-pudnet-split0"]) == ("pudnet_plus", "pudnet")
    curve = next(run for run in runs if run.info.run_name == "baseline-scratch_adam")
    assert [m.step for m in client.get_metric_history(curve.info.run_id, "test_accuracy")] == [1, 2]
    for trial in trials:
        steps = [m.step for m in client.get_metric_history(trial.info.run_id, "validation_accuracy")]
        assert steps == [4, 8, 10]
        assert {"eta", "depth", "seed"} <= set(trial.data.params)
    assert client.get_model_version_by_alias("pudnet-digits-convnet3", "newest").version == 1
    assert client.get_model_version_by_alias("pudnet-digits-convnet3", "best").version == 1
    assert "Test groups play no part" in client.get_registered_model("pudnet-digits-convnet3").description
    assert {run.info.run_name for run in runs if not run.inputs.dataset_inputs} == {"tune-baselines"}
    assert all(run.data.tags["mlflow.note.content"] and run.data.tags["stage"] for run in runs)
    assert all(run.data.metrics["system/cpu_cores_used"] > 0 for run in trials)
    evaluation = next(run for run in runs if run.info.run_name == "evaluate-pudnet")
    kept = client.list_artifacts(evaluation.info.run_id, "weights/split-0")
    assert len(kept) == 2
    pictures = {Path(file.path).name for file in client.list_artifacts(evaluation.info.run_id, "plots")}
    assert {"distribution.png", "race.png", "search.png", "filters.png"} <= pictures


def test_registered_model_is_loaded_by_its_uri(repro, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{repro}/mlflow.db")
    expected = Predictor.load(repro / "models/pudnet.safetensors")
    for version in ("/1", "@newest", "@best"):
        found = Predictor.load(f"models:/pudnet-digits-convnet3{version}")
        assert found.card == expected.card
        assert_close(found.model.state_dict(), expected.model.state_dict(), rtol=0, atol=0)
    with pytest.raises(UserError, match="models:/pudnet-digits-convnet3/9: cannot be downloaded from sqlite:"):
        Predictor.load("models:/pudnet-digits-convnet3/9")


def test_a_copied_project_has_its_registered_model_in_its_own_folder(repro, tmp_path, monkeypatch):
    shutil.copy(repro / "mlflow.db", tmp_path)
    shutil.copytree(repro / "mlartifacts", tmp_path / "mlartifacts")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert download("models:/pudnet-digits-convnet3@newest").is_relative_to(tmp_path)


def test_publish_puts_the_model_and_its_card_among_those_that_ship(repro, tmp_path, monkeypatch, capsys):
    project = tmp_path / "published"
    left_out = {".pud", "mlflow.db", "mlartifacts"}
    shutil.copytree(repro, project, ignore=lambda folder, names: left_out & set(names) if folder == str(repro) else ())
    done = run(project, sys.executable, "-m", "pipeline.publish")
    assert done.returncode == 0, done.stdout + done.stderr
    published = Predictor.load(project / "models/pretrained/digits-convnet3.safetensors")
    trained = Predictor.load(repro / "models/pudnet.safetensors")
    assert_close(published.model.state_dict(), trained.model.state_dict(), rtol=0, atol=0)
    split = json.loads((repro / "results/metrics.json").read_text())["splits"]["0"]
    assert published.card.provenance["test"]["accuracy"] == split["accuracy"]
    page = (project / "models/pretrained/digits-convnet3.md").read_text()
    assert f"{split['accuracy']:.2f} ± {split['ci95']:.2f} % " in page
    assert "the paper has" not in page  # it has no setting `digits`
    (project / "models/pudnet.safetensors").unlink()
    assert "models/pudnet.safetensors: no such file" in refusal(publish, project, monkeypatch, capsys)


def test_a_variant_that_is_only_pretrained_trains_predicts_and_is_not_published_as_another(
    repro, tmp_path, monkeypatch
):
    monkeypatch.chdir(repro)
    params = replace(load_params(), variant="pretrained_ridge")
    trial = MetaTraining(make_spec(params, "trunk", "pudnet", 0, {}, "search_train", 4), torch.device("cpu"))
    *_, last = trial.run()
    assert last["validation_accuracy"] > 60  # by chance: 50
    trial.adapter().save(tmp_path / "trunk.safetensors")
    digits = load_digits()
    network = Predictor.load(tmp_path / "trunk.safetensors").predict(digits.images[:60] / 16, digits.target[:60])
    assert network.card.ridge and network.card.labels_per_class == np.bincount(digits.target[:60]).max()
    with pytest.raises(UserError, match="setting, variant, target or split is not params.yaml's"):
        publish(params)


@pytest.fixture(scope="module")
def server(repro):
    """The registered model behind MLflow's server: the address to post to."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["mlflow", "models", "serve", "-m", "models:/pudnet-digits-convnet3/1", "--env-manager", "local"]
    own = environment(repro) | {"MLFLOW_TRACKING_URI": f"sqlite:///{repro}/mlflow.db", "PYTHONPATH": ""}
    with (repro / "server.log").open("w") as log:
        served = subprocess.Popen(
            [*command, "-p", str(port)], cwd=repro, env=own, stdout=log, stderr=log, start_new_session=True
        )
        try:
            for _ in range(120):
                time.sleep(0.5)
                assert served.poll() is None, (repro / "server.log").read_text()
                with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/ping"):
                    break
            else:
                pytest.fail((repro / "server.log").read_text())
            yield f"http://127.0.0.1:{port}/invocations"
        finally:
            with contextlib.suppress(ProcessLookupError):  # it has ended by itself
                os.killpg(served.pid, signal.SIGTERM)


def post(address, rows):
    """Send one group; the answer, or the status and text of a refusal."""
    body = json.dumps({"dataframe_records": rows}).encode()
    request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)["predictions"]
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_the_registered_model_is_served_over_http(server):
    digits = load_digits(n_class=2)
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    rows = [{"image": base64.b64encode(png(image)).decode(), "label": None} for image in images[:60]]
    for row in range(40):
        rows[row]["label"] = str(digits.target[row])
    found = post(server, rows)
    assert [set(row) for row in found] == [{"label", "probability"}] * 20
    assert np.mean([row["label"] == str(truth) for row, truth in zip(found, digits.target[40:60], strict=True)]) > 0.7
    assert all(0.5 <= row["probability"] <= 1 for row in found)
    for unfit, message in [
        (rows[:40], "40 with a label and 0 without"),
        ([{"image": base64.b64encode(b"no image").decode(), "label": "0"}, *rows], "row 0: 'image' is no image file"),
    ]:
        status, text = post(server, unfit)
        assert status == 400 and message in text


def test_baselines_run_again_do_only_what_is_missing(repro, tmp_path):
    """With another grid, and without a method: what both runs ask for is not done again, and is logged anew."""
    project = tmp_path / "again"
    shutil.copytree(repro, project, ignore=shutil.ignore_patterns("mlflow.db", "mlartifacts"))
    params = yaml.safe_load((project / "params.yaml").read_text())
    params["baselines"]["space"]["protonet"]["scale"] = [1.0, 0.5]
    params["baselines"]["methods"].remove("matchnet")
    (project / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    done = run(project, sys.executable, "-u", "-m", "pipeline.baselines")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tracking:" not in done.stdout  # a new database gets what is kept, too
    runs = MlflowClient(f"sqlite:///{project}/mlflow.db").search_runs(["1"], "attributes.run_name LIKE 'scratch_gc-%'")
    assert {run.info.status for run in runs} == {"FINISHED"}
    finished = {line.split(":")[0].strip() for line in done.stdout.splitlines() if ": finished" in line}
    assert {"protonet-split0-scale0.5"} <= finished <= {"protonet-split0-scale0.5", "train-protonet-split0"}
    kept, jobs = map(int, re.search(r"(\d+) of (\d+) measurements are done already", done.stdout).groups())
    assert kept == (jobs - 1 if "train-protonet-split0" in finished else jobs)
    frame, old = (pd.read_csv(folder / "results/accuracies.csv") for folder in (project, repro))
    same = ~old.method.isin(["protonet", "matchnet"])
    assert frame[frame.method != "protonet"].reset_index(drop=True).equals(old[same].reset_index(drop=True))


def test_ray_starts_whatever_folder_is_for_temporary_files(tmp_path):
    """Ray puts sockets there, whose paths may have 107 characters."""
    folder = tmp_path / ("a" * 60)
    folder.mkdir()
    ends = "import ray; from pipeline.runs.cluster import session\nwith session(): print(ray.get(ray.put('answered')))"
    env = environment(ROOT) | {"TMPDIR": str(folder)}
    done = subprocess.run([sys.executable, "-c", ends], env=env, capture_output=True, text=True, check=False)
    assert done.stdout == "answered\n", done.stderr


def refusal(stage, folder: Path, monkeypatch, capsys) -> str:
    """Run a stage as its command does, in a folder where it ends with exit code 2 and one line: that line."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.argv", [stage.__name__])
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        run_stage(stage)
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1, said
    return said


def test_a_changed_store_is_refused_by_name(repro, tmp_path, monkeypatch, capsys):
    shutil.copytree(repro / "data", tmp_path / "data")
    shutil.copy(repro / "params.yaml", tmp_path)
    images = tmp_path / "data/prepared/train/images.npy"
    content = bytearray(images.read_bytes())
    content[-1] ^= 1
    images.write_bytes(content)
    assert "images.npy" in refusal(groups, tmp_path, monkeypatch, capsys)


def changed_params(repro: Path, folder: Path, change: dict) -> None:
    """Write the clone's params.yaml into a folder, with some values changed."""
    params = yaml.safe_load((repro / "params.yaml").read_text())
    for key, value in change.items():
        params[key] = {**params[key], **value} if isinstance(value, dict) else value
    (folder / "params.yaml").write_text(yaml.safe_dump(params))


@pytest.mark.parametrize("stage", [search, train, evaluate, baselines])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"setting": "fashion"}, "data/prepared: was made for prepare.source: ['sklearn:digits'], not ['torchvision:"),
        ({"groups": {"train_groups": 20}}, "data/groups: was made for groups.train_groups: 19, not 20; run `dvc "),
        ({}, "data/groups: was made of other images; run `dvc repro`, or `python -m pipeline.groups` first"),
    ],
)
def test_a_stage_by_itself_refuses_what_was_made_for_other_parameters(
    repro, tmp_path, monkeypatch, capsys, stage, change, said
):
    changed_params(repro, tmp_path, change)
    shutil.copytree(repro / "data", tmp_path / "data")
    if not change:
        meta = tmp_path / "data/prepared/train/meta.json"
        meta.write_text(meta.read_text().replace('"images.npy": "', '"images.npy": "0'))
    assert said in refusal(stage, tmp_path, monkeypatch, capsys)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"resources": {"workers": 64}, "train": {"groups_per_step": 64}},
            "resources.workers: 64 with 1 CPU(s) and 0 GPU(s) each, but there is room for 2",
        ),
        ({"splits": 2}, "nothing was chosen for split 1; run the search again"),
    ],
)
def test_a_training_that_cannot_be_as_asked_is_refused(repro, tmp_path, monkeypatch, capsys, change, said):
    """On a machine of two cores, as Ray would tell."""
    project = tmp_path / "refused"
    shutil.copytree(repro, project, ignore=shutil.ignore_patterns("mlflow.db", "mlartifacts"))
    changed_params(repro, project, {**change, "resources": {"cpus": 1, **change.get("resources", {})}})
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(cluster, "session", contextlib.nullcontext)
    monkeypatch.setattr(cluster.ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 2.0}}])
    assert said in refusal(train, project, monkeypatch, capsys)


@pytest.mark.parametrize(
    ("stage", "change", "named"),
    [
        (groups, {"groups": {"classes_per_group": 5}}, "5"),
        (prepare, {"prepare": {"source": "folder:nowhere"}}, "nowhere"),
    ],
)
def test_a_mistake_in_params_stops_the_stage_with_one_line(repro, tmp_path, monkeypatch, capsys, stage, change, named):
    """`test_bad_input` shows the same of whole processes."""
    changed_params(repro, tmp_path, change)
    shutil.copytree(repro / "data/prepared", tmp_path / "data/prepared")
    before = sorted(tmp_path.rglob("*"))
    assert named in refusal(stage, tmp_path, monkeypatch, capsys).replace(str(tmp_path), "")
    assert [path for path in sorted(tmp_path.rglob("*")) if ".pud" not in path.parts] == before


def test_a_stage_refuses_an_argument_that_it_does_not_take(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["check", "--fresh"])
    with pytest.raises(SystemExit) as ended:
        run_stage(check)
    assert ended.value.code == 2 and "unrecognized arguments: --fresh" in capsys.readouterr().err
