"""The trained hypernetwork as an MLflow model: MLflow runs this file (models from code), so nothing is unpickled.

One request is one task group, with one row for each image. A network is predicted from the rows with a label, and
classifies the rows without one.
"""

from __future__ import annotations

import io
from collections.abc import Hashable
from typing import Any

import numpy as np
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.pyfunc import PythonModel, PythonModelContext
from PIL import Image

from pudnet import Predictor
from pudnet.data.user_images import is_missing, plain_labels
from pudnet.errors import UserError, words

KINDS = ((bool, "truth value"), (int | float, "number"), (str, "string"))
EXACT = 2**53  # pandas turns integers beside a null into floats, which from here on are not exact


class PudNetModel(PythonModel):
    """Takes labelled images and queries, and returns a class and its probability for each query."""

    def load_context(self, context: PythonModelContext) -> None:
        """Read the trained model that lies beside this file."""
        self.predictor = Predictor.load(context.artifacts["pudnet"])

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """Rows of `image` (an encoded image file) and `label` -> one row for each query.

        A query's label is null, NaN or missing. All other labels must be of one kind: strings (also empty ones),
        numbers or truth values.

        Raises `MlflowException`, which a server answers with status 400, if the input cannot be used.
        """
        try:
            return self._predict(model_input)
        except UserError as error:
            raise MlflowException(str(error), INVALID_PARAMETER_VALUE) from None

    def _predict(self, rows: pd.DataFrame) -> pd.DataFrame:
        images = [_decoded(content, row) for row, content in enumerate(rows["image"])]
        labels = _labels(rows)
        known = [row for row, label in enumerate(labels) if not is_missing(label)]
        queries = [row for row, label in enumerate(labels) if is_missing(label)]
        if not known or not queries:
            raise UserError(
                f"rows: {len(known)} with a label and {len(queries)} without; a group needs labelled images and queries"
            )
        network = self.predictor.predict([images[row] for row in known], [labels[row] for row in known])
        odds = network([images[row] for row in queries]).softmax(1).cpu().numpy()
        found = [network.classes[column] for column in odds.argmax(1)]
        return pd.DataFrame({"label": found, "probability": odds.max(1).astype(np.float64)})


def _labels(rows: pd.DataFrame) -> list:
    """The label of each row; `UserError` names the first row whose label is of a wrong or different kind."""
    if "label" not in rows:
        return [None] * len(rows)
    labels, before = plain_labels(rows["label"]), None
    for row, label in enumerate(labels):
        if is_missing(label):
            continue
        kind = next((name for kind, name in KINDS if isinstance(label, kind)), type(label).__name__)
        if not isinstance(label, Hashable):
            raise UserError(f"row {row}: the label is a {kind}; it has to be a string or a number")
        if isinstance(label, float) and abs(label) >= EXACT:
            raise UserError(f"row {row}: the label {label:.0f} is too large to be exact; use strings")
        if kind != (before := before or kind):
            raise UserError(f"row {row}: the label {label!r} is a {kind}, those before it are {before}s")
    if all(is_missing(label) or isinstance(label, float) and label.is_integer() for label in labels):
        return [
            None if is_missing(label) else int(label) for label in labels
        ]  # pandas made them floats because of a NaN
    return labels


def _decoded(content: bytes, row: int) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(content))
        image.load()
    except Exception as error:  # Pillow's decoders raise nearly every type for a damaged file
        raise UserError(f"row {row}: 'image' is no image file ({words(error, 100)})") from None
    return image


set_model(PudNetModel())
