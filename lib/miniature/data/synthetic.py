"""Small data sets drawn from a known distribution."""

from typing import NamedTuple

import torch


class Clusters(NamedTuple):
    """Points around centers: x [n, d], y int64 [n] (which center), centers [clusters, d]."""

    x: torch.Tensor
    y: torch.Tensor
    centers: torch.Tensor


class Regression(NamedTuple):
    """A linear model's data: x [n, d], y [n], and the true weights w [d]."""

    x: torch.Tensor
    y: torch.Tensor
    w: torch.Tensor


def gaussian_clusters(n, d, clusters, spread, seed, dtype=torch.float32):
    """Draw points around random centers: x = center[y] + spread * N(0, I).

    Parameters
    ----------
    n, d, clusters : int
        Points, dimensions, centers. The centers are drawn from N(0, I), the points are shared
        evenly among them, up to one, in random order.
    spread : float
        Standard deviation around a center, >= 0.
    seed : int
    dtype : torch.dtype

    Returns
    -------
    Clusters
    """
    if not 1 <= clusters <= n or d < 1:
        raise ValueError(f"n={n}, d={d}, clusters={clusters}: need d >= 1 and n >= clusters >= 1")
    if spread < 0:
        raise ValueError(f"spread={spread}: a standard deviation must be >= 0")
    g = torch.Generator().manual_seed(seed)
    centers = torch.randn(clusters, d, generator=g, dtype=dtype)
    y = torch.arange(n)[torch.randperm(n, generator=g)] % clusters
    x = centers[y] + spread * torch.randn(n, d, generator=g, dtype=dtype)
    return Clusters(x, y, centers)


def linear_regression(n, d, noise, seed, condition=1.0, dtype=torch.float32):
    """Draw y = x w + noise * N(0, 1) with Gaussian inputs of a chosen condition number.

    Parameters
    ----------
    n, d : int
        Samples, dimensions.
    noise : float
        Standard deviation of the noise, >= 0.
    seed : int
    condition : float
        Largest over smallest eigenvalue of the covariance of x, >= 1. The covariance is diagonal,
        its eigenvalues equally spaced on a log scale from 1 down to 1 / condition.
    dtype : torch.dtype

    Returns
    -------
    Regression
        With w ~ N(0, I).
    """
    if n < 1 or d < 1 or noise < 0 or condition < 1:
        raise ValueError(
            f"n={n}, d={d}, noise={noise}, condition={condition}: need n, d, condition >= 1 "
            "and noise >= 0"
        )
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(d, generator=g, dtype=dtype)
    scale = torch.tensor(float(condition), dtype=dtype) ** (-torch.linspace(0, 0.5, d, dtype=dtype))
    x = torch.randn(n, d, generator=g, dtype=dtype) * scale
    y = x @ w + noise * torch.randn(n, generator=g, dtype=dtype)
    return Regression(x, y, w)
