"""Sizes, sweeps and operation counts."""

import numpy as np
import pytest
import torch

from miniature import show
from miniature.theory import counting, rates


def test_geometric_sizes():
    assert rates.geometric(10, 1000, 3) == [10, 100, 1000]
    with pytest.raises(ValueError, match="distinct"):
        rates.geometric(2, 4, 9)
    with pytest.raises(ValueError, match="start < stop"):
        rates.geometric(8, 4, 3)


def test_a_sweep_stacks_seeds_first():
    def run(n, seeds):
        return {"error": torch.tensor([n * s for s in seeds]), "pair": np.ones((len(seeds), 2))}

    out = rates.sweep(run, [1, 2, 4, 8], [3, 5])
    np.testing.assert_array_equal(out["error"], [[3, 6, 12, 24], [5, 10, 20, 40]])
    assert out["pair"].shape == (2, 4, 2)
    assert rates.sweep(lambda n, seeds: [n] * len(seeds), [1, 2], [0]).tolist() == [[1, 2]]
    with pytest.raises(ValueError, match=r"shape \[2\], not \[1\]"):
        rates.sweep(lambda n, seeds: [n], [1, 2], [3, 5])


def test_draw_puts_the_slope_in_the_legend():
    fig, ax = show.subplots()
    x = np.array([10, 100, 1000])
    y = np.stack([x**0.5, 2 * x**0.5, 3 * x**0.5])
    slope, _, _ = rates.draw(ax, x, y, "method", theorem=0.5)
    assert slope == pytest.approx(0.5)
    assert ax.get_legend_handles_labels()[1] == ["method: 0.50 [0.50, 0.50]"]
    assert len(ax.lines) == 2 and ax.get_xscale() == ax.get_yscale() == "log"
    show.png(fig)


def test_counts():
    assert counting.fft_ops(1024) == 5 * 1024 * 10 == 2 * counting.fft_ops(1024, real=True)
    assert counting.wht_ops(8) == 24
    f = counting.Counted(lambda x: x**2)
    f(3.0), f(np.arange(4)), f(torch.arange(5))
    assert f.queries == 10


@pytest.mark.parametrize("n", [4, 9])
def test_dense_counts_are_those_of_the_algorithms(n):
    """Against loops that count: a Cholesky solve to lower order, a QR by its leading term."""
    cholesky = sum((2 * j + 1) + (n - j - 1) * (2 * j + 1) for j in range(n)) + 2 * n**2
    assert counting.solve_ops(n) == pytest.approx(cholesky, abs=2 * n**2)
    m = 50 * n
    qr = sum(4 * (m - j) * (n - j) for j in range(n))
    assert counting.qr_ops(m, n) == pytest.approx(qr, rel=0.3)
