"""HNSW against hnswlib, its authors' C++, and against the same algorithms in plain Python."""

import heapq
import time

import numpy as np
import pytest
import torch

from miniature import data
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


def vectors(name, n):
    """n vectors and 1000 queries beside them, float32."""
    if name == "Gaussian, d = 32":
        x = np.random.default_rng(0).standard_normal((n + 1000, 32), dtype=np.float32)
    else:
        split = data.mnist10k(pool=1)
        x = torch.cat([split.x_train, split.x_test]).flatten(1).numpy()[: n + 1000]
    return x[1000:], x[:1000]


def exact(x, q):
    """What NumPy users write: one matrix product, then the K smallest of each row."""
    d = (x**2).sum(1) - 2 * q @ x.T
    near = np.argpartition(d, K, 1)[:, :K]
    return np.take_along_axis(near, np.take_along_axis(d, near, 1).argsort(1), 1)


def at_recall(level, search, truth):
    """Double ef, then halve the step, until recall reaches the level; return the ef."""
    ef = K
    while recall(search(ef), truth).mean() < level:
        ef *= 2
    step = ef // 4
    while step >= 1 and ef > K:
        if recall(search(ef - step), truth).mean() >= level:
            ef -= step
        step //= 2
    return ef


@pytest.mark.parametrize("name, n", [("MNIST, d = 784", 9000), ("Gaussian, d = 32", 100_000)])
def test_queries_at_recall_95(benchmark, capsys, name, n):
    """Queries a second at recall@10 = 0.95, against hnswlib and against exact search."""
    hnswlib = pytest.importorskip("hnswlib", reason="the oracle hnswlib is not installed")
    x, q = vectors(name, n if benchmark.enabled else 1000)
    truth = exact(x.astype(np.float64), q.astype(np.float64))
    ours = HNSW(x.shape[1], 16, 100, dtype=np.float32).add(x)
    theirs = hnswlib.Index(space="l2", dim=x.shape[1])
    theirs.init_index(len(x), ef_construction=100, M=16)
    theirs.add_items(x, num_threads=1)

    def search(ef):
        return ours.search(q, K, ef)[0]

    def search_theirs(ef):
        theirs.set_ef(ef)
        return theirs.knn_query(q, k=K, num_threads=1)[0].astype(np.int64)

    ef, ef_theirs = (at_recall(0.95, f, truth) for f in (search, search_theirs))
    benchmark.pedantic(search, (ef,), rounds=7)
    if benchmark.enabled:
        mine = benchmark.stats.stats.min
        rival, brute = seconds(lambda: search_theirs(ef_theirs), 7), seconds(lambda: exact(x, q))
        benchmark.extra_info["time relative to hnswlib"] = mine / rival
        benchmark.extra_info["times faster than exact search"] = brute / mine
        with capsys.disabled():
            print(
                f"\n{len(x)} of {name}, recall@10 = 0.95: {len(q) / mine:,.0f} queries a second "
                f"(ef = {ef}), hnswlib {len(q) / rival:,.0f} (ef = {ef_theirs}), exact "
                f"{len(q) / brute:,.0f}: {mine / rival:.2f} times the time of hnswlib, "
                f"{brute / mine:.1f} times faster than exact"
            )


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
