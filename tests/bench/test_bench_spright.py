"""SPRIGHT against the fast Walsh-Hadamard transform of everything, as the length grows."""

import math

import pytest
import torch
from timing import median_seconds

from miniature.theory.spright import (
    FrontEnd,
    SparseSignal,
    by_likelihood,
    by_majority,
    dense,
    fwht,
    noiseless_offsets,
    nso_offsets,
    peel,
    recovered,
    so_offsets,
)

K, GROUPS, BITS, SNR_DB = 8, 3, 5, 10.0
SIZES = (8, 10, 12, 14, 16, 18, 20)  # log2 N
WIDEST = {"NSO": 20, "SparseFHT": 20, "SO": 16}  # SO looks at N/B candidates a bin


def setting(name, n):
    """One signal, the front end, and what is known of the noise."""
    offsets = {
        "NSO": lambda: nso_offsets(n, 3, [0]),
        "SO": lambda: so_offsets(n, 32, [0]),
        "SparseFHT": lambda: noiseless_offsets(n, [0]),
    }[name]()
    signal = SparseSignal.random(n, K, 1, [1], math.inf if name == "SparseFHT" else SNR_DB)
    return signal, FrontEnd(n, dense(n, BITS, GROUPS, 0), offsets)


@pytest.mark.parametrize("name", WIDEST)
def test_sparse_against_full_transform(benchmark, capsys, name):
    """From samples that lie in memory, one thread, both in this run; K fixed."""
    search = by_likelihood if name == "SO" else by_majority
    sizes = [n for n in SIZES if n <= WIDEST[name]]

    def sparse(x, signal, front):
        nu2 = signal.sigma**2 * 2**front.n / front.B
        U = front.observe(lambda a, d: x[a ^ d[..., None]][:, None])
        return peel(front, U, search, nu2=nu2, gamma=0.8, rho=1.0)

    threads, ratios = torch.get_num_threads(), {}
    torch.set_num_threads(1)
    try:
        for n in sizes:
            signal, front = setting(name, n)
            everywhere = torch.zeros(1, 1, dtype=torch.int64)
            x = signal(torch.arange(2**n), everywhere)[0, 0, 0]
            assert recovered(signal, sparse(x, signal, front)).all(), "compares nothing"
            full = fwht(x) / 2 ** (n / 2)
            assert set(full.abs().topk(K).indices.tolist()) == set(signal.k[0, 0].tolist())
            if not benchmark.enabled:
                continue
            rounds = 7
            ours = median_seconds(lambda x=x, s=signal, f=front: sparse(x, s, f), rounds)
            ratios[n] = ours / median_seconds(lambda x=x: fwht(x), rounds)
        benchmark.pedantic(sparse, (x, signal, front), rounds=3)  # the largest N, for the table
    finally:
        torch.set_num_threads(threads)
    if benchmark.enabled:
        benchmark.extra_info["time relative to the full transform"] = ratios
        faster = [n for n in ratios if all(ratios[m] < 1 for m in ratios if m >= n)]
        where = f"faster from N = 2^{faster[0]} on" if faster else "not faster at any of them"
        with capsys.disabled():
            row = ", ".join(f"2^{n} {ratio:.2f}" for n, ratio in ratios.items())
            print(f"\n{name}, K = {K}: time relative to a full transform at N = {row}: {where}")
