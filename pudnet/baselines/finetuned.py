"""Fine-tuning on the bench: a prediction for the group, trained further on all of the group's labelled images."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from pudnet.device import flushing_denormals
from pudnet.finetune import trainable
from pudnet.network import Classifier
from pudnet.predictor import Predictor
from pudnet.scratch import ScratchConfig, train
from pudnet.targets import calibrate


class FineTuned:
    """Predicts a network, then trains its weights and classifier as `Scratch` trains random ones."""

    def __init__(self, predictor: Predictor, config: ScratchConfig, bf16: bool, compiled: bool = False) -> None:
        self.predictor, self.config, self.bf16, self.compiled = predictor, config, bf16, compiled

    def rows(self, labels: Tensor) -> Tensor:
        """All rows, for labels (N,): training looks at every image."""
        return torch.arange(len(labels), device=labels.device)

    def adapt(self, images: Tensor, labels: Tensor, classes: tuple) -> Classifier:
        """Normalised images (N, C, H, W) and labels (N,) in 0..k-1 -> a classifier of the classes."""
        rows = self.predictor.rows(labels)
        predicted = self.predictor.adapt(images[rows], labels[rows], classes)
        network, body = trainable(predicted, self.compiled), copy.deepcopy(predicted.body)
        with flushing_denormals(images.device):
            train(network, images, labels, self.config, self.bf16)
        body.load_state_dict(network.body.state_dict())  # compiled layers keep no running statistics
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16):
            calibrate(body, images)
        return Classifier(body, network.head)
