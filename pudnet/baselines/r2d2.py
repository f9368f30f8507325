"""R2-D2 (Bertinetto et al., 2019, "Meta-learning with differentiable closed-form solvers").

The paper does not compare with it, but it is the control that PudNet+ needs: PudNet+ solves for filters and a
classifier by ridge regression on the group, R2-D2 only for the classifier.
"""

from __future__ import annotations

from collections.abc import Callable

from pydantic.dataclasses import dataclass
from torch import Tensor

from pudnet.baselines.learners import Stages
from pudnet.baselines.method import Method
from pudnet.classifier import LinearClassifier, Regression, ridge_layer
from pudnet.config import STRICT, Blocks, Penalty, PositiveFloat, TrainConfig
from pudnet.errors import UserError
from pudnet.learner import Learner
from pudnet.targets import Target, has_all_blocks


@dataclass(frozen=True, config=STRICT)
class R2D2Config:
    """Where training begins, with the penalty `ridge` and the logits' `scale`, and what a prediction may choose.

    The values are PudNet+'s; R2-D2, too, was better with them on 100 validation groups of CIFAR-100.
    """

    ridge: PositiveFloat = 3.0
    scale: PositiveFloat = 5.0
    penalty: Penalty = "learned"  # leave_one_out: a prediction may choose a smaller one
    blocks: Blocks = "last"  # of ConvNet-3; leave_one_out: a prediction may choose all three


class R2D2(Method):
    """A fixed trunk and `ridge_layer` on the support features."""

    Config = R2D2Config

    def __init__(self, config: R2D2Config, target: Target) -> None:
        super().__init__(config, target)
        self.regression = Regression(config.ridge, config.scale, config.penalty)

    @classmethod
    def check(cls, config: R2D2Config, target: Target) -> None:
        """Raise `UserError` if the classifier may see all blocks of a target that has none."""
        if config.blocks != "last" and not has_all_blocks(target):
            raise UserError("r2d2.blocks: leave_one_out needs target: convnet3")

    def learner(self, train_classes: int, k: int, config: TrainConfig) -> Learner:
        """Episodes, after pretraining if the training asks for it."""
        return Stages(self, train_classes, k, config)

    def logits(self, queries: Tensor, support: Tensor, labels: Tensor, k: int) -> Tensor:
        """The scaled regression of queries (Q, d): logits (Q, k)."""
        return self.regression(queries, support, labels, k)

    def rule(self, support: Tensor, labels: Tensor, k: int) -> Callable[[Tensor], Tensor]:
        """The regression, solved. With `blocks: leave_one_out` features are those of all blocks, the last one first."""
        last = support[:, : self.features]
        candidates = [last] if self.config.blocks == "last" else [last, support]
        choice, ridge = self.regression.choose(candidates, labels, k)
        seen = candidates[choice]
        classifier = LinearClassifier(*ridge_layer(seen, labels, k, ridge, self.regression.log_scale.exp()))
        return lambda queries: classifier(queries[:, : seen.shape[1]])
