"""HNSW against hnswlib, its authors' C++, and against the same algorithms in plain Python."""

import heapq
import time

import numpy as np
import pytest
import torch

from miniature.theory.hnsw import HNSW
from miniature.theory.search import brute_force, recall

N, D, M, EF_CONSTRUCTION, EF, K = 10_000, 16, 8, 40, 50, 10
SMALL = 1000


def points(n, seed):
    return np.random.default_rng(seed).random((n, D))


def seconds(f, rounds=3):
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        f()
        times.append(time.perf_counter() - start)
    return min(times)


def build_and_search(x, q):
    return HNSW(D, M, EF_CONSTRUCTION).add(x).search(q, K, EF)[0]


def build_and_search_plainly(x, q):
    """A flat graph with the heuristic: NumPy for the distances of a hop, lists and heaps else."""
    links = [[]]

    def search(v, ef):
        d = float(((x[0] - v) ** 2).sum())
        seen, candidates, found = {0}, [(d, 0)], [(-d, 0)]
        while candidates:
            d, c = heapq.heappop(candidates)
            if d > -found[0][0]:
                break
            new = [e for e in links[c] if e not in seen]
            seen.update(new)
            for d, e in zip(((x[new] - v) ** 2).sum(1).tolist(), new):
                if len(found) < ef or d < -found[0][0]:
                    heapq.heappush(candidates, (d, e))
                    heapq.heappush(found, (-d, e))
                    if len(found) > ef:
                        heapq.heappop(found)
        return sorted((-d, e) for d, e in found)

    def select(pairs, m):
        kept = []
        for d, e in pairs:
            if len(kept) == m:
                break
            if not kept or (((x[kept] - x[e]) ** 2).sum(1) > d).all():
                kept.append(e)
        return kept

    for i in range(1, len(x)):
        links.append(select(search(x[i], EF_CONSTRUCTION), M))
        for e in links[i]:
            links[e].append(i)
            if len(links[e]) > 2 * M:
                around = ((x[links[e]] - x[e]) ** 2).sum(1).tolist()
                links[e] = select(sorted(zip(around, links[e])), 2 * M)
    return np.array([[e for _, e in search(v, EF)[:K]] for v in q])


def test_build_and_search_of_10000_points(benchmark, capsys):
    """One thread each: what the readable version costs against C++."""
    hnswlib = pytest.importorskip("hnswlib", reason="the oracle hnswlib is not installed")
    x, q = points(N, 0), points(1000, 1)
    build_and_search(x[:10], q[:1])  # compile

    def theirs():
        index = hnswlib.Index(space="l2", dim=D)
        index.init_index(N, ef_construction=EF_CONSTRUCTION, M=M)
        index.add_items(x, num_threads=1)
        index.set_ef(EF)
        return index.knn_query(q, k=K, num_threads=1)[0].astype(np.int64)

    ids = benchmark.pedantic(build_and_search, (x, q), rounds=3)
    truth = brute_force(torch.as_tensor(x), torch.as_tensor(q), K)
    gap = float(recall(ids, truth).mean() - recall(theirs(), truth).mean())
    assert abs(gap) < 0.02, "a time for another recall compares nothing"
    if benchmark.enabled:
        ratio = benchmark.stats.stats.min / seconds(theirs)
        benchmark.extra_info["time relative to hnswlib"] = ratio
        with capsys.disabled():
            print(f"\nbuild {N}, search 1000: {ratio:.2f} times the time of hnswlib")


def test_build_and_search_against_plain_python(benchmark, capsys):
    x, q = points(SMALL, 0), points(100, 1)
    build_and_search(x[:10], q[:1])
    ids = benchmark.pedantic(build_and_search, (x, q), rounds=5)
    truth = brute_force(torch.as_tensor(x), torch.as_tensor(q), K)
    start = time.perf_counter()
    plain = build_and_search_plainly(x, q)
    took = time.perf_counter() - start
    assert abs(float(recall(ids, truth).mean() - recall(plain, truth).mean())) < 0.03
    if benchmark.enabled:
        ratio = took / benchmark.stats.stats.median
        benchmark.extra_info["times faster than plain Python"] = ratio
        with capsys.disabled():
            print(f"\nbuild {SMALL}, search 100: {ratio:.0f} times faster than plain Python")
