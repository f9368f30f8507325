"""What practitioners put on a trained trunk: a linear classifier fitted to the features of the labelled images.

Both heads are scikit-learn's. The penalty is chosen by cross-validation on the group's labelled images, so that no
other group is needed: ridge regression leaves out one image at a time (in closed form), logistic regression a third of
each class.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

PENALTIES = 10.0 ** np.arange(-2, 4)
FOLDS = 3
HEADS = ("ridge", "logistic")


def fit_head(head: str, support: Tensor, labels: Tensor) -> Callable[[Tensor], Tensor]:
    """Fit a head (one of `HEADS`) to support features (S, d), labels (S,) in 0..k-1: queries (Q, d) -> logits (Q, k).

    Features are centred and scaled to a mean square of 1, so that a penalty means the same for every trunk.
    """
    mean = support.mean(0)
    scale = (support - mean).square().mean().clamp_min(1e-12).sqrt()
    classifier = _classifier(head, labels)
    classifier.fit(_plain((support - mean) / scale), labels.cpu().numpy())

    def logits(queries: Tensor) -> Tensor:
        decided = classifier.decision_function(_plain((queries - mean) / scale))
        if decided.ndim == 1:  # with two classes, scikit-learn only gives the second's
            decided = np.stack([-decided, decided], 1)
        return torch.from_numpy(decided).to(queries)

    return logits


def _classifier(head: str, labels: Tensor):  # noqa: ANN202 (its type is imported inside, since that is slow)
    from sklearn.linear_model import LogisticRegression, LogisticRegressionCV, RidgeClassifierCV

    if head == "ridge":
        return RidgeClassifierCV(alphas=PENALTIES * len(labels), class_weight="balanced")
    if labels.bincount().min() < FOLDS:  # a class has too few images for cross-validation
        return LogisticRegression(C=1 / len(labels), class_weight="balanced")
    return LogisticRegressionCV(
        Cs=1 / (PENALTIES * len(labels)),
        cv=FOLDS,
        class_weight="balanced",
        l1_ratios=(0,),
        scoring="neg_log_loss",
        use_legacy_attributes=False,
    )


def _plain(features: Tensor) -> np.ndarray:
    return features.double().cpu().numpy()
