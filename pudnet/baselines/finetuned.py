"""Fine-tuning on the bench: a prediction for the group, trained further on all of the group's labelled images."""

from __future__ import annotations

from torch import Tensor, nn

from pudnet.finetune import trainable
from pudnet.predictor import Predictor
from pudnet.scratch import Scratch, ScratchConfig


class FineTunedPrediction(Scratch):
    """Trains as `Scratch` does, but begins with a predicted network and its classifier."""

    def __init__(self, predictor: Predictor, config: ScratchConfig, bf16: bool, compiled: bool = False) -> None:
        super().__init__(config, predictor.target, predictor.device, bf16, gc=False, compiled=compiled)
        self.predictor = predictor

    def start(self, images: Tensor, labels: Tensor, classes: tuple) -> nn.Sequential:
        """The predicted network (`body`, `flat`, `head`) with all of its weights trainable."""
        rows = self.predictor.rows(labels)
        return trainable(self.predictor.adapt(images[rows], labels[rows], classes), self.compiled)
