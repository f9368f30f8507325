"""The wheel by itself: `pip install .` gives a working `pudnet`, with the shipped models and without the pipeline."""

import os
import subprocess
import sys
import venv
from importlib.metadata import distribution, distributions
from pathlib import Path
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement

from tests.test_cli import write_digits

ROOT = Path(__file__).parent.parent
EVERY_MODULE = """
import importlib, pkgutil, pudnet
for module in pkgutil.walk_packages(pudnet.__path__, "pudnet."):
    importlib.import_module(module.name)
"""


def files_that_come_with(requirements):
    """Top-level files and folders of what these requirements install, and of what that requires in turn."""
    waiting, seen, found = [Requirement(text) for text in requirements], set(), set()
    while waiting:
        wanted = waiting.pop()
        if wanted.name in seen or (wanted.marker and not wanted.marker.evaluate({"extra": ""})):
            continue
        seen.add(wanted.name)
        installed = distribution(wanted.name)
        found |= {Path(installed.locate_file(f.parts[0])) for f in installed.files if f.parts[0] != ".."}
        waiting += map(Requirement, installed.requires or [])
    return {path for path in found if path.name not in ("__pycache__", "bin")}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    subprocess.run([*build, str(ROOT)], check=True)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def bare(wheel, tmp_path_factory):
    """Runs a command where nothing but the wheel and what it declares is installed, and far from the repository."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder / "venv", symlinks=True)
    python = folder / "venv/bin/python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-index", "--no-deps"]
    subprocess.run([*install, str(wheel)], check=True)
    site = next((folder / "venv/lib").glob("python*/site-packages"))
    (own,) = distributions(name="pudnet", path=[str(site)])
    for path in files_that_come_with(own.requires):  # linked, not downloaded anew: torch has gigabytes
        (site / path.name).symlink_to(path)
    write_digits(folder / "photos", (0, 1, 4), 10)
    write_digits(folder / "new", (0, 1, 4), 20, start=10)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    def run(program, *words):
        return subprocess.run(
            [python.with_name(program), *words],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )

    return run


def test_the_wheel_holds_the_method_and_the_shipped_models_alone(wheel):
    names = [Path(name) for name in ZipFile(wheel).namelist()]
    assert {name.parts[0].split("-")[0] for name in names} == {"pudnet"}
    assert {name.suffix for name in names if name.parts[0] == "pudnet"} == {".py", ".md", ".safetensors"}
    models = sorted(name.name for name in names if name.suffix == ".safetensors")
    names = [f"{name}-convnet3{own}" for name in ("cifar100", "fashion") for own in ("-pretrained-ridge", "")]
    assert models == [f"{name}.safetensors" for name in names]
    assert wheel.stat().st_size < 2e6


def test_every_module_needs_only_what_is_declared(bare):
    done = bare("python", "-c", EVERY_MODULE)
    assert done.returncode == 0, done.stderr


def test_predict_and_classify_work_from_anywhere(bare):
    """With a model of the wheel; `test_cli` has the accuracies of all."""
    done = bare("pudnet", "predict", "--model", "fashion-convnet3", "--data", "photos", "--out", "f.safetensors")
    assert done.returncode == 0, done.stderr
    done = bare("pudnet", "classify", "--weights", "f.safetensors", "--data", "new")
    assert float(done.stdout.split("accuracy ")[1].split()[0]) > 80


def test_an_mlflow_uri_is_refused_in_one_line_where_only_the_wheel_is(bare):
    done = bare("pudnet", "predict", "--model", "models:/x/1", "--data", "photos", "--out", "w")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "models:/x/1: nothing is installed that reads models:/" in done.stderr


def test_onnx_says_what_it_needs(bare):
    assert bare("pudnet", "predict", "--data", "photos", "--out", "w.safetensors").returncode == 0
    done = bare("pudnet", "export", "--weights", "w.safetensors", "--out", "w.onnx")
    said = "error: w.onnx: first run `pip install onnx onnxscript onnxruntime`, or export as .pt2\n"
    assert (done.returncode, done.stderr) == (2, said)
