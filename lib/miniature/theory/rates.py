"""Rates: an algorithm over a geometric grid of sizes, and its exponent beside the theorem's.

`sweep` runs the sizes, all seeds of a size at once; `draw` shows the curves on log-log axes with
the fitted slope and the slope of the theorem; `miniature.claims.slope` judges it. A size may be a
horizon, a number of samples, a dimension, 1/epsilon, or a length; what is measured may be a regret,
an error, or a count of operations (`miniature.theory.counting`).
"""

import math

import numpy as np
from tqdm.auto import tqdm

from .. import show
from ..claims import _array, exponent


def geometric(start, stop, n):
    """Return n whole sizes from start to stop with (nearly) equal ratios, as a list of int.

    Raises
    ------
    ValueError
        If 0 < start < stop does not hold, n < 3, or the sizes are not distinct.
    """
    if not 0 < start < stop or n < 3:
        raise ValueError(f"needs 0 < start < stop and n >= 3, got {start}, {stop} and {n}")
    sizes = [round(v) for v in np.geomspace(start, stop, n)]
    if len(set(sizes)) < n:
        raise ValueError(f"no {n} distinct whole sizes lie between {start} and {stop}")
    return sizes


def sweep(run, sizes, seeds, label="sizes"):
    """Run an algorithm at every size.

    Parameters
    ----------
    run : callable
        ``run(size, seeds)`` returns one value per seed, shape [S], or several, shape [S, ...]: a
        tensor, an array or a list. It runs the seeds together; a dict of such values measures
        several things at once.
    sizes : sequence of number
    seeds : sequence of int
    label : str
        For the progress bar, which shows on a terminal or in JupyterLab for long sweeps only.

    Returns
    -------
    numpy.ndarray of float64, shape [S, T, ...], or a dict of them
    """
    rows = [run(size, seeds) for size in tqdm(sizes, label, delay=10, leave=False)]
    if isinstance(rows[0], dict):
        return {key: _join([row[key] for row in rows], seeds, key) for key in rows[0]}
    return _join(rows, seeds, "run")


def _join(rows, seeds, name):
    rows = [_array(row) for row in rows]
    for row in rows:
        if row.shape[:1] != (len(seeds),):
            raise ValueError(
                f"{name} must give one value per seed, shape [{len(seeds)}], not {list(row.shape)}"
            )
    return np.stack(rows, 1)


def draw(ax, sizes, values, label, theorem=None, average=False, **options):
    """Draw a curve over sizes on log-log axes, with its slope and the theorem's.

    Parameters
    ----------
    ax : matplotlib.axes.Axes
    sizes : sequence of number, length T
    values : array_like, shape [S, T]
    label : str
        The fitted slope and its interval are added to it.
    theorem : float, optional
        An exponent: a dashed line of that slope through the middle of the curve.
    average : bool
        As in `miniature.claims.exponent`; use what the claim uses.
    **options
        Passed to `miniature.show.band`.

    Returns
    -------
    slope, lo, hi : float
    """
    x, y = _array(sizes), _array(values)
    ax.set(xscale="log", yscale="log")
    slope, lo, hi = exponent(x, y, average=average)
    color, marker = show.color(label), show.marker(label)
    text = f"{label}: {slope:.2f} [{lo:.2f}, {hi:.2f}]"
    show.band(ax, x, y, text, **{"color": color, "marker": marker, "markevery": 1, **options})
    if theorem is not None:
        middle = math.exp(np.log(x).mean())
        height = math.exp(np.log(y.mean(0)).mean())
        ax.plot(x, height * (x / middle) ** theorem, "--", color=color, lw=1, alpha=0.7)
    return slope, lo, hi
