"""What the benchmarks have in common: groups of CIFAR-100's shape, of noise, and numbers on their command lines.

Speed does not depend on what an image shows.
"""

from __future__ import annotations

import argparse
import math

import numpy as np
import torch

from pudnet.data.images import StoreImages
from pudnet.data.store import Store

CLASSES, PER_CLASS, SIZE, CHANNELS = 80, 100, 32, 3
CLASSES_PER_GROUP, IMAGES = 5, 500


def make_images(device: torch.device, kind: type[StoreImages] = StoreImages) -> StoreImages:
    """8,000 colour images of 32 px, of 80 classes, on a device."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (CLASSES * PER_CLASS, SIZE, SIZE, CHANNELS), dtype=np.uint8)
    labels = np.repeat(np.arange(CLASSES), PER_CLASS)
    names = tuple(map(str, range(CLASSES)))
    return kind(Store(images, labels, names, (0.5,) * CHANNELS, (0.29,) * CHANNELS, "noise"), device)


def make_groups(count: int) -> np.ndarray:
    """A table (count, 500) of groups of 5 classes x 100 images, in blocks."""
    rng = np.random.default_rng(1)
    blocks = np.arange(CLASSES * PER_CLASS).reshape(CLASSES, PER_CLASS)
    return np.stack([blocks[rng.permutation(CLASSES)[:CLASSES_PER_GROUP]].ravel() for _ in range(count)])


def positive(text: str) -> int:
    """A count on the command line."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def positive_number(text: str) -> float:
    """A time on the command line."""
    if not 0 < (value := float(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"must be above 0, got {value}")
    return value
