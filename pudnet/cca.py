"""Canonical correlation analysis: how closely two descriptions of the same datasets are related (Fig. 1)."""

from __future__ import annotations

import numpy as np

from pudnet.errors import UserError


def held_out_correlation(x: np.ndarray, y: np.ndarray, components: int) -> float:
    """The first canonical correlation of n paired points, x (n, p) and y (n, q), on points it was not fitted to: -1..1.

    One half of the points gives the principal components (`components` for each side) and the first pair of canonical
    variates, whose correlation is measured on the other half; then the halves change places, and the result is the mean
    of the two. It is about 0 if x and y are unrelated.

    Raises:
        UserError: if a half has so few points that some correlations would be 1 whatever they are, if the points cannot
            be paired, or if columns are linearly dependent.
    """
    if len(x) != len(y):
        raise UserError(f"cca: {len(x)} points cannot be paired with {len(y)}")
    half = len(x) // 2
    found = []
    for fit, test in ((slice(None, half), slice(half, None)), (slice(half, None), slice(None, half))):
        sides = [_principal(points[fit], points[test], components) for points in (x, y)]
        _check(sides[0][0], sides[1][0])
        (x_basis, x_whiten), (y_basis, y_whiten) = (
            _basis(name, side[0]) for name, side in zip("xy", sides, strict=True)
        )
        left, _, right = np.linalg.svd(x_basis.T @ y_basis)
        x_variate = sides[0][1] @ x_whiten @ left[:, 0]
        y_variate = sides[1][1] @ y_whiten @ right[0]
        found.append(np.corrcoef(x_variate, y_variate)[0, 1])
    return float(np.mean(found))


def _check(x: np.ndarray, y: np.ndarray) -> None:
    if x.shape[1] + y.shape[1] >= len(x) - 1:
        raise UserError(
            f"cca: {len(x)} points are too few for {x.shape[1]} + {y.shape[1]} columns: every correlation would "
            "be 1; reduce the columns (by PCA) or take more points"
        )


def _basis(name: str, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """An orthonormal basis (n, p) of the centred columns, and the matrix (p, p) that maps the columns to it."""
    basis, values, directions = np.linalg.svd(points - points.mean(0), full_matrices=False)
    if values[-1] <= 1e-10 * values[0]:
        raise UserError(f"cca: the columns of {name} depend on each other; reduce them (by PCA)")
    return basis, directions.T / values


def _principal(fit: np.ndarray, test: np.ndarray, components: int) -> tuple[np.ndarray, np.ndarray]:
    """Project the points to fit and the points to test on the first principal components of the points to fit."""
    mean = fit.mean(0)
    directions = np.linalg.svd(fit - mean, full_matrices=False)[2][:components].T
    return (fit - mean) @ directions, (test - mean) @ directions
