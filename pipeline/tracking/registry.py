"""The trained hypernetwork in MLflow: logs and registers it as a model that can be served, and downloads it again."""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, Schema
from mlflow.types.schema import AnyType
from PIL import Image

from pipeline.tracking.database import follow_move, tracking_uri
from pipeline.tracking.runs import Tracking, quiet
from pudnet.card import Card, read_tensors
from pudnet.config import ModelConfig, passed
from pudnet.errors import UserError, words

SERVING = Path(__file__).with_name("serving.py")
CODE = [str(Path(__file__).resolve().parents[2] / "pudnet")]
# The packages that serving.py and pudnet/ import. The model requires the versions that are installed here.
REQUIREMENTS = ("mlflow", "numpy", "pandas", "pillow", "pydantic", "pyyaml", "rich", "safetensors", "scikit-learn")
REQUIREMENTS += ("scipy", "torch", "torchvision")

DESCRIPTION = """Looks at labelled images that it has not seen before, and predicts a {target} that classifies others \
like them. Trained on {setting}.

A request is one task group: rows of `image` (an image file) with a `label` to predict a network from, and rows \
without a label to classify by it.

- `@best`: of the versions that were judged on the same validation groups as the newest, the one whose values (`eta`, \
`depth`, ...) had the highest accuracy there in the search; among equals, the newest. Test groups play no part.
- `@newest`: the version of the newest training.
"""
SIGNATURE = ModelSignature(
    Schema([ColSpec("binary", "image"), ColSpec(AnyType(), "label", required=False)]),  # a string, number, or null
    Schema([ColSpec(AnyType(), "label"), ColSpec("double", "probability")]),
)


@dataclass(frozen=True)
class Validation:
    """How well the search judged the values that a model was trained with, and the groups that it judged them on."""

    accuracy: float  # percent
    groups: str  # digest of the validation groups


def register(tracking: Tracking, run_id: str, path: Path, name: str, validation: Validation) -> str:
    """Log a trained model to a run and register it, unless the run has done so before. Returns its version.

    The aliases `newest` and `best` then point to what `DESCRIPTION` says.
    """
    _, card = read_tensors(path)
    client = tracking.client
    found = client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'")
    version = found[0].version if found else _log(tracking, run_id, path, name, card)
    described = {"validation_accuracy": f"{validation.accuracy:.4f}", "validation_groups": validation.groups}
    described |= {"variant": card.provenance["variant"], "split_seed": str(card.provenance["split_seed"])}
    for key, value in described.items():
        client.set_model_version_tag(name, str(version), key, value)
    client.update_model_version(name, str(version), _description(card, validation))
    if not client.get_registered_model(name).description:  # else somebody has changed it
        client.update_registered_model(name, DESCRIPTION.format(**card.provenance, target=card.target))
    point_aliases(client, name)
    return str(version)


def point_aliases(client: MlflowClient, name: str) -> None:
    """Let `newest` and `best` point to their versions."""
    versions = client.search_model_versions(f"name = '{name}'")
    newest = max(versions, key=lambda version: int(version.version))
    judged_alike = [v for v in versions if v.tags.get("validation_groups") == newest.tags.get("validation_groups")]
    best = max(judged_alike, key=lambda v: (float(v.tags.get("validation_accuracy", 0)), int(v.version)))
    wanted = {"newest": newest.version, "best": best.version}
    known = client.get_registered_model(name).aliases
    for alias, version in wanted.items():
        if str(known.get(alias)) != str(version):
            client.set_registered_model_alias(name, alias, str(version))


def _log(tracking: Tracking, run_id: str, path: Path, name: str, card: Card) -> str:
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
    return str(logged.registered_model_version)


def hypernetwork(card: Card) -> str:
    """A hypernetwork's architecture in a few words."""
    model = ModelConfig(**card.model)
    parts = [f"extractor {model.extractor}, eta {model.eta}, GRU depth {model.depth}"] if model.change else []
    parts += ["class filters"] if model.class_filters else []
    parts += [] if model.makes_weights else ["one network for all groups"]
    parts += ["a classifier by ridge regression"] if model.classifier == "ridge" else []
    chosen = [key for key in ("penalty", "blocks") if getattr(model, key) == "leave_one_out"]
    parts += [f"whose {' and '.join(chosen)} a prediction chooses"] if chosen else []
    return ", ".join(parts)


def _description(card: Card, validation: Validation) -> str:
    """The description of a version in MLflow's UI."""
    made = card.provenance
    return (
        f"PudNet ({made['variant']}) for {card.target}, {card.image_size}x{card.image_size} px, {card.channels} "
        f"channel(s). Trained on {made['train_groups']:,} task groups of {made['setting']}, "
        f"{passed(made.get('passes', 1))}, class split {made['split_seed']}, {hypernetwork(card)}.\n\n"
        f"With these values the search had {validation.accuracy:.2f} % on validation groups."
    )


def example_group(card: Card) -> pd.DataFrame:
    """An example request: two labelled images of each of two shades, and two queries, as PNG files.

    Images have the model's own size and channels, since it warns of others.
    """
    rng = np.random.default_rng(0)
    colours, labels = (60, 180), ("dark", "bright", "dark", "bright", None, None)
    shape = (card.image_size, card.image_size, *([card.channels] if card.channels > 1 else []))
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
        reason = words(error, 200)
        raise UserError(f"{uri}: cannot be downloaded from {tracking_uri()} ({reason})") from None
    files = [found] if found.is_file() else sorted(found.rglob("*.safetensors"))
    if len(files) != 1:
        raise UserError(f"{uri}: holds {len(files)} .safetensors files, not one")
    return files[0]
