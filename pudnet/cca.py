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
    if len(x) != len(y):
        raise UserError(f"cca: {len(x)} points cannot be paired with {len(y)}")
    if x.shape[1] + y.shape[1] >= len(x) - 1:
        raise UserError(
            f"cca: {len(x)} points are too few for {x.shape[1]} + {y.shape[1]} columns, whose correlations would be "
            "perfect whatever they hold; reduce the columns (by PCA) or take more points"
        )
    bases = []
    for name, points in (("x", x), ("y", y)):
        basis, values, _ = np.linalg.svd(points - points.mean(0), full_matrices=False)
        if values[-1] <= 1e-10 * values[0]:
            raise UserError(f"cca: the columns of {name} depend on each other; reduce them (by PCA)")
        bases.append(basis)
    return np.clip(np.linalg.svd(bases[0].T @ bases[1], compute_uv=False), 0, 1)
