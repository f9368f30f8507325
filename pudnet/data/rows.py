"""Picks some of a group's images: the first of each class, or some spread evenly over the classes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

CALIBRATION_IMAGES = 50  # benchmarks/README.md shows that so few are enough


def first_rows(labels: Tensor, per_class: int) -> Tensor:
    """The rows of the first `per_class` images of each class, in rising order, for labels (N,) in 0..k-1."""
    order = labels.argsort(stable=True)
    counts = labels.bincount()
    starts = (counts.cumsum(0) - counts).repeat_interleave(counts)  # where each image's class begins in `order`
    ranks = torch.empty_like(order)
    ranks[order] = torch.arange(len(labels), device=labels.device) - starts
    return torch.nonzero(ranks < per_class).squeeze(1)


def spread_rows(labels: Tensor, count: int) -> Tensor:
    """The rows of about `count` images, spread evenly over the classes, for labels (N,) in 0..k-1.

    They are the first few of each class. If there are more classes than `count`, they are the first image of each of
    `count` classes at even distances.
    """
    classes = int(labels.max()) + 1
    rows = first_rows(labels, math.ceil(count / classes))
    if classes <= count:
        return rows
    chosen = torch.arange(count, device=labels.device) * classes // count
    return rows[torch.isin(labels[rows], chosen)]
