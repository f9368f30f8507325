"""Ridge regression in closed form: differentiable, and for several groups at once."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def ridge_weights(x: Tensor, y: Tensor, ridge: Tensor | float) -> Tensor:
    r"""Least squares from x (..., N, p) to y (..., N, k) with penalty lambda: weights (..., k, p).

    :math:`R = Y^T (X X^T + \lambda I)^{-1} X` solves an N x N system. If N > p, the smaller p x p system is solved,
    which gives the same weights.
    """
    if x.shape[-2] <= x.shape[-1]:
        return _solve(x @ x.mT, ridge, y).mT @ x
    return _solve(x.mT @ x, ridge, x.mT @ y).mT


def left_out(x: Tensor, y: Tensor, ridge: Tensor | float, leverage: Tensor | float = 0.0) -> Tensor:
    """What `ridge_weights` predicts for each row of x (..., N, p), if that row is left out of it: (..., N, k).

    In closed form: the residual of a row that is left out is its residual in the fit to all rows, divided by 1 - h,
    where h is the row's leverage. If a mean was subtracted from x and y before, `leverage` (N, 1) is the mean's part
    of h, which is 1 / N for a plain mean. Without it, each row would be known from all others: they sum to zero.
    Several penalties may be given, as a tensor (M, ..., 1, 1); one decomposition serves them all.
    """
    if x.shape[-2] <= x.shape[-1]:
        values, rows = torch.linalg.eigh(x @ x.mT)
        kept = values.unsqueeze(-2) / (values.unsqueeze(-2) + ridge)
    else:
        values, vectors = torch.linalg.eigh(x.mT @ x)
        rows, kept = x @ vectors, 1 / (values.unsqueeze(-2) + ridge)
    fitted = (rows * kept) @ (rows.mT @ y)
    own = (rows.square() * kept).sum(-1, keepdim=True)
    return y - (y - fitted) / (1 - own - leverage)


def _solve(gram: Tensor, ridge: Tensor | float, right: Tensor) -> Tensor:
    """(gram + ridge I)^-1 right, for systems `gram` (..., n, n) and right sides (..., n, k)."""
    added = ridge * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    factor, failed = torch.linalg.cholesky_ex(gram + added)
    factor = factor.masked_fill(failed.bool()[..., None, None], math.nan)  # the trainer recovers from NaN losses
    return torch.cholesky_solve(right, factor)


def one_hot(labels: Tensor, classes: int) -> Tensor:
    """Labels (N,) in 0..k-1 -> (N, k) in fp32. Unlike `F.one_hot` it checks no values, so it never waits for a GPU."""
    return (labels.unsqueeze(-1) == torch.arange(classes, device=labels.device)).float()


def at_least_fp32(values: Tensor) -> Tensor:
    """Convert bf16 values, which autocast gives, to fp32. Values that the caller chose to have in fp64 stay so."""
    return values if values.dtype == torch.float64 else values.float()


def normalized_rows(x: Tensor) -> Tensor:
    """Subtract from rows (..., N, p) their mean (..., 1, p), divide by their root mean square norm (..., 1, 1)."""
    x = x - x.mean(-2, keepdim=True)
    norm = x.square().sum(-1, keepdim=True).mean(-2, keepdim=True).clamp_min(1e-12).sqrt()
    return x / norm
