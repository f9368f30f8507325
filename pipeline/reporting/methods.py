"""The names of the methods, and what each is, as pages show them."""

from __future__ import annotations

TARGETS = {
    "convnet3": "ConvNet-3",
    "convnet3_multilevel": "multilevel ConvNet-3",
    "resnet18": "ResNet-18",
    "resnet34": "ResNet-34",
}
# Method -> its name, and what it is. A method that is not listed keeps its own name.
METHODS = {
    "pudnet": ("PudNet", "weights predicted from the group’s images, in one forward pass"),
    "pudnet_plus": (
        "PudNet+",
        "one learned set of weights; filters of the last convolution and the classifier are solved for the group",
    ),
    "pretrained_ridge": (
        "Pretrained, R2-D2’s classifier",
        "one trunk, trained to tell all training classes apart; only the classifier is solved for the group",
    ),
    "static_trunk": (
        "Static trunk",
        "trained on the same groups with PudNet’s losses; one set of convolution weights, the same for every group",
    ),
    "constant_sketch": ("Constant sketch", "the trained PudNet, given the mean sketch of the training groups"),
    "shuffled_sketch": ("Shuffled sketch", "the trained PudNet, given the sketch of another test group"),
    "random_weights": ("Random weights", "untrained weights, He-initialised"),
    "without_context": (
        "Without context",
        "ablation: no recurrent unit; every weight generator gets the sketch itself",
    ),
    "random_hidden": ("Random hidden state", "ablation: the recurrent unit starts from noise, not the sketch"),
    "without_initial_residual": ("Without initial residual", "ablation: η = 0"),
    "metric_only": ("Metric loss only", "ablation: without the full-classification and KL losses"),
    "without_kl": ("Without KL", "ablation: without the KL loss"),
    "pretrained": (
        "Pretrained",
        "one trunk, trained with a linear head on all training classes; classifies by cosines to class centroids",
    ),
    "matchnet": ("MatchNet", "one trunk, trained on groups; attention over the support images"),
    "protonet": ("ProtoNet", "one trunk, trained on groups; squared distances to class means"),
    "meta_baseline": ("Meta-Baseline", "Pretrained, then trained on groups; cosines to class centroids"),
    "meta_deepbdc": ("Meta-DeepBDC", "the same two stages on Brownian distance covariances of a feature map"),
    "musml": ("MUSML", "weights from one of a few learned subspaces, found by gradient steps on the support images"),
    "r2d2": ("R2-D2", "one trunk, trained on groups; a classifier by ridge regression on the support images"),
    "scratch_adam": ("Adam from scratch", ""),
    "scratch_gc": ("GC from scratch", ""),
}
SCRATCH = {"adam": "Adam", "gc": "GC"}


def label(method: str) -> str:
    """A method's name on the page. `scratch_adam_30` (`adam_30` in the paper's tables) is training for 30 epochs."""
    if method in METHODS:
        return METHODS[method][0]
    name, _, epochs = method.removeprefix("scratch_").rpartition("_")
    if name in SCRATCH and epochs.isdigit():
        return f"{SCRATCH[name]}, {epochs} epoch{'s' if epochs != '1' else ''}"
    return method.replace("_", " ").capitalize()


def target_name(target: str) -> str:
    """A target network's name on the page; a user's own network keeps its import path."""
    return TARGETS.get(target, target)
