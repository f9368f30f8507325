"""Does the dataset matter? What of a group reaches the sketch, and how far the weights follow it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import KFold, cross_val_predict
from sklearn.multiclass import OneVsRestClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MultiLabelBinarizer, StandardScaler
from torch import Tensor

FOLDS = 5


def movement(predictions: Sequence[Mapping[str, ArrayLike]]) -> dict[str, np.ndarray]:
    r"""How far the weights predicted for G groups are from their mean, for each layer a value a group (G,).

    :math:`\|w_g - \bar w\| / \|\bar w\|`: 0 where every group has the same.
    """
    relative = {}
    for name in predictions[0]:
        weights = np.stack([np.asarray(weights[name]).ravel() for weights in predictions])  # (G, P)
        mean = weights.mean(axis=0)
        relative[name] = np.linalg.norm(weights - mean, axis=1) / np.linalg.norm(mean)
    return relative


def probe(sketches: Sequence[Tensor], classes: Sequence[Sequence[int]]) -> float:
    """How well a linear probe reads from a sketch which classes its group has, on groups that it was not fit on.

    The area under the ROC curve in percent, mean over classes: 50 is chance, 100 perfect. Sketches have one shape;
    `classes` are each group's. A class that a fold lacks, or has in every group, is left out of the mean.
    """
    values = torch.stack([sketch.flatten() for sketch in sketches]).float().cpu().numpy()
    truth = MultiLabelBinarizer().fit_transform(classes)
    truth = truth[:, (truth.sum(0) >= FOLDS) & (truth.sum(0) <= len(truth) - FOLDS)]
    if truth.shape[1] == 0:
        return float("nan")
    linear = make_pipeline(StandardScaler(), OneVsRestClassifier(LogisticRegression(C=0.01, max_iter=300)))
    folds = KFold(FOLDS, shuffle=True, random_state=0)
    scores = cross_val_predict(linear, values, truth, cv=folds, method="decision_function")
    return 100 * float(roc_auc_score(truth, scores))
