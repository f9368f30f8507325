"""Does the dataset matter? Measures what a sketch says about its group, and how much weights differ between groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

FOLDS = 5


def movement(predictions: Sequence[Mapping[str, ArrayLike]]) -> dict[str, np.ndarray]:
    r"""How far the weights predicted for G groups are from their mean: for each layer, one value for each group (G,).

    :math:`\|w_g - \bar w\| / \|\bar w\|`: 0 if all groups have the same weights.
    """
    relative = {}
    for name in predictions[0]:
        weights = np.stack([torch.as_tensor(weights[name]).cpu().numpy().ravel() for weights in predictions])  # (G, P)
        mean = weights.mean(axis=0)
        relative[name] = np.linalg.norm(weights - mean, axis=1) / np.linalg.norm(mean)
    return relative


def probe(sketches: Sequence[Tensor], classes: Sequence[Sequence[int]]) -> float:
    """How well a linear probe tells from a sketch which classes its group has, on groups that it was not fitted to.

    Returns the area under the ROC curve in percent, averaged over classes: 50 is chance, 100 is perfect. All sketches
    have the same shape; `classes` lists each group's. Classes of almost no groups or almost all are left out; NaN if
    fewer than two are left.
    """
    # Here: slow to import, and a study needs no probe unless it diagnoses.
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import KFold, cross_val_predict
    from sklearn.multiclass import OneVsRestClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import MultiLabelBinarizer, StandardScaler

    values = torch.stack([sketch.flatten() for sketch in sketches]).float().cpu().numpy()
    truth = MultiLabelBinarizer().fit_transform(classes)
    truth = truth[:, (truth.sum(0) >= FOLDS) & (truth.sum(0) <= len(truth) - FOLDS)]
    if truth.shape[1] < 2:
        return float("nan")
    linear = make_pipeline(StandardScaler(), OneVsRestClassifier(LogisticRegression(C=0.01, max_iter=300)))
    folds = KFold(FOLDS, shuffle=True, random_state=0)
    scores = cross_val_predict(linear, values, truth, cv=folds, method="decision_function")
    return 100 * float(roc_auc_score(truth, scores))
