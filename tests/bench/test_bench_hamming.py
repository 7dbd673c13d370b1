"""Exact Hamming distances of a pattern to all windows of a text, against what one would write.

One thread each, float64 transforms. The rivals are NumPy's comparison of whole arrays, one for
each position of the pattern, on the smallest integers that hold the letters; and SciPy's
correlation of indicators by overlap-add, one for each letter.
"""

import numpy as np
import pytest
import torch
from scipy.signal import oaconvolve
from timing import median_seconds

from miniature.theory.pattern_hamming_distances import distances

N = 2**16


def compare_all(text, pattern):
    shifts = len(text) - len(pattern) + 1
    out = np.zeros(shifts, np.uint16)
    for j, c in enumerate(pattern):
        out += text[j : j + shifts] != c
    return out


def correlate_letters(text, pattern):
    matches = np.zeros(len(text) - len(pattern) + 1)
    for c in np.intersect1d(text, pattern):
        indicator = (pattern == c)[::-1].astype(float)
        matches += oaconvolve((text == c).astype(float), indicator, "valid")
    return len(pattern) - matches.round().astype(np.int64)


@pytest.mark.parametrize("m", [256, 4096])
@pytest.mark.parametrize("sigma", [2, 4, 26, 256, 4096])
def test_all_distances(benchmark, capsys, sigma, m):
    """The rule of the instance: lists for rare letters, transforms for frequent ones."""
    rng = np.random.default_rng(0)
    text, pattern = (rng.integers(sigma, size=v) for v in (N, m))
    T, P = torch.as_tensor(text)[None], torch.as_tensor(pattern)[None]
    small = [v.astype(np.uint8 if sigma <= 256 else np.uint16) for v in (text, pattern)]

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        D = distances(T, P)  # warms up
        assert (D[0].numpy() == compare_all(*small)).all()
        assert (D[0].numpy() == correlate_letters(*small)).all()
        benchmark.pedantic(distances, (T, P), rounds=7)
        if benchmark.enabled:
            ours = benchmark.stats.stats.median
            naive = median_seconds(lambda: compare_all(*small), rounds=3)
            letters = median_seconds(lambda: correlate_letters(*small), rounds=1)
            packed = median_seconds(lambda: distances(T, P, "packed"), rounds=5)
            benchmark.extra_info["times as fast as comparing"] = naive / ours
            benchmark.extra_info["times as fast as an FFT for each letter"] = letters / ours
            benchmark.extra_info["time of shared words relative to this"] = packed / ours
            with capsys.disabled():
                print(
                    f"\nn = {N}, m = {m}, {sigma} letters: {ours * 1e3:.1f} ms, "
                    f"{naive / ours:.2f} times as fast as comparing, {letters / ours:.1f} times "
                    f"as fast as an FFT for each letter; shared words take {packed / ours:.2f}"
                )
    finally:
        torch.set_num_threads(threads)
