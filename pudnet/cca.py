"""Canonical correlation analysis: how much two descriptions of the same data sets share (Fig. 1)."""

from __future__ import annotations

import numpy as np

from pudnet.errors import UserError


def canonical_correlations(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    r"""Canonical correlations of n paired points, x (n, p) and y (n, q): (min(p, q),), falling, in 0..1.

    The singular values of :math:`S_{xx}^{-1/2} S_{xy} S_{yy}^{-1/2}`, by orthonormal bases of the centred columns.
    In n points of p + q >= n - 1 independent columns there are always perfect correlations.

    Raises:
        UserError: when there are too few points to tell, points do not pair, or columns depend on each other.
    """
    _check(x, y)
    (x_basis, _), (y_basis, _) = _basis("x", x), _basis("y", y)
    return np.clip(np.linalg.svd(x_basis.T @ y_basis, compute_uv=False), 0, 1)


def held_out_correlation(x: np.ndarray, y: np.ndarray, components: int) -> float:
    """The first canonical correlation of n paired points, x (n, p) and y (n, q), on points it was not fit to: -1..1.

    Each half of the points is fit in turn, both sides reduced to so many principal components of that half, and the
    first pair of canonical variates is correlated on the other half; the mean of the two. Around 0 where x tells
    nothing of y. Raises `UserError` as `canonical_correlations` does.
    """
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
    if len(x) != len(y):
        raise UserError(f"cca: {len(x)} points cannot be paired with {len(y)}")
    if x.shape[1] + y.shape[1] >= len(x) - 1:
        raise UserError(
            f"cca: {len(x)} points are too few for {x.shape[1]} + {y.shape[1]} columns, whose correlations would be "
            "perfect whatever they hold; reduce the columns (by PCA) or take more points"
        )


def _basis(name: str, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """An orthonormal basis (n, p) of centred columns, and what makes it of them (p, p)."""
    basis, values, directions = np.linalg.svd(points - points.mean(0), full_matrices=False)
    if values[-1] <= 1e-10 * values[0]:
        raise UserError(f"cca: the columns of {name} depend on each other; reduce them (by PCA)")
    return basis, directions.T / values


def _principal(fit: np.ndarray, test: np.ndarray, components: int) -> tuple[np.ndarray, np.ndarray]:
    """Points to fit and points to test as their scores on the first principal components of those to fit."""
    mean = fit.mean(0)
    directions = np.linalg.svd(fit - mean, full_matrices=False)[2][:components].T
    return (fit - mean) @ directions, (test - mean) @ directions
