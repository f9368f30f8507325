"""Which of a group's images are looked at: the first of each class, or some spread evenly over the classes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

CALIBRATION_IMAGES = 50  # how few are enough: benchmarks/README.md


def first_rows(labels: Tensor, per_class: int) -> Tensor:
    """Rows of the first `per_class` images of each class, in order, for labels (N,) in 0..k-1."""
    order = labels.argsort(stable=True)
    counts = labels.bincount()
    starts = (counts.cumsum(0) - counts).repeat_interleave(counts)  # of each image's class, in `order`
    ranks = torch.empty_like(order)
    ranks[order] = torch.arange(len(labels), device=labels.device) - starts
    return torch.nonzero(ranks < per_class).squeeze(1)


def spread_rows(labels: Tensor, count: int) -> Tensor:
    """Rows of about `count` images, spread evenly over the classes of labels (N,) in 0..k-1.

    The first few of each class. With more classes than `count`, one image from each of `count` evenly spaced classes.
    """
    classes = int(labels.max()) + 1
    rows = first_rows(labels, math.ceil(count / classes))
    if classes <= count:
        return rows
    chosen = torch.arange(count, device=labels.device) * classes // count
    return rows[torch.isin(labels[rows], chosen)]
