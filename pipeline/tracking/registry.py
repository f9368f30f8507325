"""The trained hypernetwork in MLflow: logs and registers it as a model that can be served, and downloads it again."""

from __future__ import annotations

import io
import os
from importlib import metadata
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
from mlflow.artifacts import download_artifacts
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, Schema
from mlflow.types.schema import AnyType
from PIL import Image

from pipeline.tracking.runs import Tracking, follow_move, quiet, tracking_uri
from pudnet.card import Card, read_tensors
from pudnet.config import ModelConfig, passed
from pudnet.errors import UserError

SERVING = Path(__file__).with_name("serving.py")
CODE = [str(Path(__file__).resolve().parents[2] / "pudnet")]
# The packages that serving.py and pudnet/ import. The model requires the versions that are installed here.
REQUIREMENTS = ("mlflow", "numpy", "pandas", "pillow", "pydantic", "pyyaml", "rich", "safetensors", "scikit-learn")
REQUIREMENTS += ("scipy", "torch", "torchvision")

SIGNATURE = ModelSignature(
    Schema([ColSpec("binary", "image"), ColSpec(AnyType(), "label", required=False)]),  # a string, number, or null
    Schema([ColSpec(AnyType(), "label"), ColSpec("double", "probability")]),
)


def register(tracking: Tracking, run_id: str, path: Path, name: str) -> str:
    """Log a trained model to a run and register it, unless the run has done so before. Returns its version."""
    _, card = read_tensors(path)
    client = tracking.client
    found = client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'")
    version = int(found[0].version) if found else _log(tracking, run_id, path, name, card)
    newest = max(int(other.version) for other in client.search_model_versions(f"name = '{name}'"))
    client.update_model_version(name, str(version), _description(card))
    if version == newest:
        client.set_registered_model_alias(name, "newest", str(version))
    return str(version)


def _log(tracking: Tracking, run_id: str, path: Path, name: str, card: Card) -> int:
    """Log and register a model. Returns its version."""
    mlflow.set_tracking_uri(tracking.uri)
    with quiet(), mlflow.start_run(run_id=run_id):
        logged = mlflow.pyfunc.log_model(
            name="model",
            python_model=str(SERVING),
            artifacts={"pudnet": str(path)},
            code_paths=CODE,
            pip_requirements=[f"{package}=={metadata.version(package)}" for package in REQUIREMENTS],
            signature=SIGNATURE,
            input_example=example_group(card),
            registered_model_name=name,
        )
    return int(logged.registered_model_version)


def hypernetwork(card: Card) -> str:
    """A hypernetwork's architecture in a few words."""
    model = ModelConfig(**card.model)
    parts = [f"extractor {model.extractor}, eta {model.eta}, GRU depth {model.depth}"] if model.change else []
    parts += ["class filters"] if model.class_filters else []
    return ", ".join(parts + (["a classifier by ridge regression"] if model.classifier == "ridge" else []))


def _description(card: Card) -> str:
    """The description of a version in MLflow's UI."""
    made = card.provenance
    return (
        f"PudNet ({made['variant']}) for {card.target}, {card.image_size}x{card.image_size} px, {card.channels} "
        f"channel(s). Trained on {made['train_groups']:,} task groups of {made['setting']}, "
        f"{passed(made.get('passes', 1))}, class split {made['split_seed']}, {hypernetwork(card)}.\n\n"
        "A request is one task group: rows of `image` (an image file) with a `label` to predict a network from, and "
        "rows without a label to classify by it."
    )


def example_group(card: Card) -> pd.DataFrame:
    """An example request: two labelled images of each of two shades, and two queries, as PNG files."""
    rng = np.random.default_rng(0)
    colours, labels = (60, 180), ("dark", "bright", "dark", "bright", None, None)
    shape = (card.image_size, card.image_size, 3)
    images = [np.clip(rng.normal(colours[row % 2], 20, shape), 0, 255).astype(np.uint8) for row, _ in enumerate(labels)]
    return pd.DataFrame({"image": [png(image) for image in images], "label": labels})


def png(image: np.ndarray) -> bytes:
    """A uint8 image (H, W) or (H, W, 3) as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def download(uri: str) -> Path:
    """Download a model's .safetensors file from `models:/NAME/VERSION`, `models:/NAME@ALIAS` or `runs:/...`.

    It comes from the server at MLFLOW_TRACKING_URI, or from the project's database in the current folder. Raises
    `UserError` if there is no such server, database or model.
    """
    database = Path("mlflow.db")
    if "MLFLOW_TRACKING_URI" not in os.environ and not database.is_file():
        raise UserError(f"{uri}: no {database} here; go to the project's folder or set MLFLOW_TRACKING_URI")
    follow_move(tracking_uri())
    mlflow.set_tracking_uri(tracking_uri())
    try:
        with quiet():
            found = Path(download_artifacts(artifact_uri=uri))
    except (MlflowException, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{uri}: cannot be downloaded from {tracking_uri()} ({reason})") from None
    files = [found] if found.is_file() else sorted(found.rglob("*.safetensors"))
    if len(files) != 1:
        raise UserError(f"{uri}: holds {len(files)} .safetensors files, not one")
    return files[0]
