"""The protocol of the HNSW recall study, against closed forms and independent libraries."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import gamma
from sklearn.metrics import ndcg_score

from miniature.theory import hnsw_recall as hr
from miniature.theory.search import brute_force, recall

N, D = 600, 24


def plain_lid(x, i, k):
    """The formula of the card, as a loop over distinct other points."""
    r = sorted({math.dist(x[i], y) for y in x} - {0.0})[:k]
    return -1 / (sum(math.log(v / r[-1]) for v in r) / k)


# Intrinsic dimension


def test_lid_is_the_plain_formula():
    x = torch.randn(60, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    r = hr.neighbor_distances(x, 12)
    measured = hr.lid(r)
    for i in (0, 7, 59):
        assert measured[i].item() == pytest.approx(plain_lid(x.tolist(), i, 12), rel=1e-12)
    torch.testing.assert_close(hr.lid(r, 10), measured * 10 / 12)


def test_duplicates_count_once():
    x = torch.randn(40, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    doubled = torch.cat([x, x[:15], x[:3]])
    once = hr.neighbor_distances(x, 8)
    twice = hr.neighbor_distances(doubled, 8)
    torch.testing.assert_close(twice[:40], once)
    torch.testing.assert_close(twice[40:55], once[:15])
    torch.testing.assert_close(hr.neighbor_distances(x, 8, at=x[5:9]), once[5:9])
    assert (twice > 0).all() and (twice.diff(dim=1) >= 0).all()


def test_distances_keep_their_digits_next_to_far_points():
    x = torch.tensor([[1.0, 0.0], [1.0, 1e-9], [1.0, 3e-9], [-1e3, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(
        hr.neighbor_distances(x, 2)[0], torch.tensor([1e-9, 3e-9], dtype=torch.float64)
    )


@pytest.mark.parametrize("m", [1, 5, 20])
def test_bias_of_the_estimate_is_that_of_the_gamma_law(m):
    k, n = 20, 200_000
    u = torch.rand(n, k, dtype=torch.float64, generator=torch.Generator().manual_seed(m))
    r = (u ** (1 / m)).sort(1).values  # k uniform points of a ball in m dimensions
    closed = gamma.expect(lambda g: m / g, args=(k - 1,))  # E[1 / sum], the last term being zero
    assert closed == pytest.approx(m / (k - 2), rel=1e-6)
    assert hr.lid(r).mean().item() == pytest.approx(k * closed, rel=0.005)
    assert hr.lid(r, k - 1).mean().item() == pytest.approx((k - 1) * closed, rel=0.005)
    assert hr.lid(r, k - 2).mean().item() == pytest.approx(m, rel=0.005)


def test_lid_of_subspaces_is_near_the_known_dimension():
    ids = []
    for m in (2, 4, 8, 16):
        x = hr.subspace(2000, m, 64, [3])[0]
        ids.append(hr.lid(hr.neighbor_distances(x, 50)).mean().item())
        if m <= 8:
            assert ids[-1] == pytest.approx(m - 1, rel=0.15)
    assert ids == sorted(ids) and ids[-1] < 15


@pytest.mark.parametrize("k", [1, 40])
def test_too_few_neighbors(k):
    with pytest.raises(ValueError, match=rf"k must lie in 2..39.*not {k}"):
        hr.neighbor_distances(torch.randn(40, 3), k)


def test_zero_distances_are_refused():
    with pytest.raises(ValueError, match="1 distances are not positive: remove duplicates"):
        hr.lid(torch.tensor([[0.0, 1.0, 2.0]]))


# Data


def test_subspaces_have_unit_vectors_of_the_right_rank():
    x = hr.subspace(50, 3, D, [0, 1])
    torch.testing.assert_close(x.norm(dim=-1), torch.ones(2, 50, dtype=torch.float64))
    assert torch.linalg.matrix_rank(x).tolist() == [3, 3]
    assert torch.linalg.matrix_rank(torch.cat(list(x))) == 6  # another subspace for another seed
    torch.testing.assert_close(hr.subspace(50, 3, D, [1])[0], x[1])  # each seed by itself
    spread = (torch.linalg.svdvals(hr.subspace(20_000, 3, D, [0])[0]) ** 2)[:3] / 20_000
    torch.testing.assert_close(spread, torch.full_like(spread, 1 / 3), atol=0.01, rtol=0)


@pytest.mark.parametrize("m", [0, D + 1])
def test_subspace_too_large(m):
    with pytest.raises(ValueError, match=rf"dimension in 1..{D}, not {m}"):
        hr.subspace(10, m, D, [0])


def test_union_has_equal_shares_in_subspaces_of_their_own():
    x, label = hr.union(300, [2, 4, 8], D, [0, 5])
    for y, c in zip(x, label):
        assert c.bincount().tolist() == [100, 100, 100]
        assert c[:3].tolist() != [0, 1, 2] or c[3:6].tolist() != [0, 1, 2]
        assert [int(torch.linalg.matrix_rank(y[c == i])) for i in range(3)] == [2, 4, 8]
        assert torch.linalg.matrix_rank(y) == 14
        assert len(torch.unique(y, dim=0)) == 300


def test_clusters_have_unequal_spread_within_bounds():
    x, label = hr.clusters(4000, 20, 400, (0.1, 3.0), [0])
    x, label = x[0], label[0]
    assert label.bincount().tolist() == [200] * 20
    # a cluster's mean is center / sqrt(1 + sigma^2), up to noise
    length = torch.stack([x[label == i].mean(0).norm() for i in range(20)])
    sigma = (1 / length**2 - 1).clamp(min=0).sqrt()
    assert sigma.min() < 0.3 and sigma.max() > 1.5
    assert sigma.min() > 0.08 and sigma.max() < 3.6


def test_retrieval_puts_documents_and_query_around_their_topic():
    documents, queries = hr.retrieval(30, 4, 2, 8, 0.0, D, [2])
    assert documents.shape == (1, 120, D) and queries.shape == (1, 2, 30, D)
    torch.testing.assert_close(documents[0], queries[0].flatten(0, 1).repeat(2, 1))
    relevance = torch.arange(120) % 30 == torch.arange(30)[:, None]
    quality = []
    for noise in (0.3, 0.8, 3.0):
        x, q = (v[0] for v in hr.retrieval(30, 4, 2, 8, noise, D, [2]))
        assert (q[0] - q[1]).norm(dim=-1).min() > 0.01
        q = q[1]
        assert torch.linalg.matrix_rank(torch.cat([x, q])) == 8
        quality.append(hr.ndcg(brute_force(x, q, 10), relevance).mean().item())
    assert quality[0] > 0.9 > quality[1] > quality[2]


# Orders


def test_orders():
    lids = torch.tensor([3.0, 1.5, 2.0, 9.0, 5.0, 4.0])
    label = torch.tensor([0, 1, 2, 0, 1, 2])
    assert hr.insertion_order("descending LID", lids, label, 0).tolist() == [3, 4, 5, 0, 2, 1]
    assert hr.insertion_order("ascending LID", lids, label, 0).tolist() == [1, 2, 0, 5, 4, 3]
    drawn = [hr.insertion_order("random", lids, label, s).tolist() for s in range(20)]
    assert all(sorted(o) == list(range(6)) for o in drawn) and len({*map(tuple, drawn)}) > 15
    pieces, within = set(), set()
    for s in range(40):
        o = hr.insertion_order("by class", lids, label, s)
        c = label[o].tolist()
        assert sorted(o.tolist()) == list(range(6))
        assert c[0] == c[1] and c[2] == c[3] and c[4] == c[5]
        pieces.add(tuple(c))
        within.add(tuple(o[:2].tolist()))
    assert len(pieces) == 6 and len(within) == 6  # classes and members in any order
    drawn = [hr.insertion_order("rising class", lids, label, s) for s in range(20)]
    assert all(label[o].tolist() == [2, 2, 1, 1, 0, 0] for o in drawn)
    assert len({tuple(o[:2].tolist()) for o in drawn}) == 2  # shuffled within


def test_unknown_order():
    with pytest.raises(ValueError, match="unknown order 'sorted': use one of descending LID"):
        hr.insertion_order("sorted", torch.ones(3), torch.zeros(3).long(), 0)


# The index


@pytest.fixture(scope="module")
def problem():
    x, label = hr.union(N + 100, [2, 6, 12], D, [4])
    q, x, label = x[0, :100], x[0, 100:], label[0, 100:]
    return x, q, label, hr.lid(hr.neighbor_distances(x, 20)), brute_force(x, q, 10)


def test_an_exhaustive_search_finds_the_truth_in_any_order(problem):
    x, q, label, lids, truth = problem
    for kind in hr.ORDERS:
        index = hr.Ordered(x, hr.insertion_order(kind, lids, label, 1), 1, 16, 200)
        assert index.reachable().all()
        assert float(recall(index.search(q, 10, N), truth).mean()) > 0.999


def test_degrees_and_reachability_are_those_of_a_plain_walk(problem):
    x, _, label, lids, _ = problem
    order = hr.insertion_order("ascending LID", lids, label, 1)
    index = hr.Ordered(x, order, 1, 2, 4)  # so few links that some elements are lost
    links = {
        int(order[i]): [int(order[j]) for j in index.index.neighbors(i)] for i in range(len(x))
    }
    start, end = index.links()
    assert sorted(zip(start.tolist(), end.tolist())) == sorted(
        (i, j) for i, row in links.items() for j in row
    )
    degree = np.zeros(N, int)
    for row in links.values():
        for j in row:
            degree[j] += 1
    assert index.in_degree().tolist() == degree.tolist()
    g = index.index.graph
    todo = [int(order[i]) for i in range(N) if g.level[i] > 0] + [int(order[g.state[0]])]
    met = set(todo)
    while todo:
        more = [j for j in links[todo.pop()] if j not in met]
        met.update(more)
        todo += more
    assert set(np.flatnonzero(index.reachable()).tolist()) == met and len(met) < N


def test_levels_belong_to_the_place_and_ids_to_the_element(problem):
    x, _, label, lids, _ = problem
    a, b = (
        hr.Ordered(x, hr.insertion_order(kind, lids, label, 1), 7)
        for kind in ("descending LID", "random")
    )
    assert a.index.graph.level.tolist() == b.index.graph.level.tolist()
    for index in (a, b):
        found = index.search(x[:50], 1, 64)[:, 0]
        assert (found == torch.arange(50)).double().mean() > 0.9


def test_order_must_be_a_permutation():
    with pytest.raises(ValueError, match=r"each id 0\.\.3 once"):
        hr.Ordered(torch.randn(4, 2), torch.tensor([0, 1, 1, 3]), 0)


@pytest.mark.parametrize("kind", ["descending LID", "ascending LID", "random"])
def test_recall_is_that_of_hnswlib(kind):
    hnswlib = pytest.importorskip("hnswlib")
    ours, theirs = [], []
    data, labels = hr.union(1700, [2, 8, 32], 64, range(5))
    for seed, (x, label) in enumerate(zip(data, labels)):
        q, x, label = x[:200], x[200:], label[200:]
        truth = brute_force(x, q, 10)
        order = hr.insertion_order(kind, hr.lid(hr.neighbor_distances(x, 30)), label, seed)
        ours.append(float(recall(hr.Ordered(x, order, seed).search(q, 10, 16), truth).mean()))
        other = hnswlib.Index("cosine", 64)
        other.init_index(len(x), M=8, ef_construction=32, random_seed=seed)
        other.add_items(x[order].numpy(), order.numpy(), num_threads=1)
        other.set_ef(16)
        found = other.knn_query(q.numpy(), 10, num_threads=1)[0].astype(np.int64)
        theirs.append(float(recall(found, truth).mean()))
    assert np.mean(ours) == pytest.approx(np.mean(theirs), abs=0.035)


def test_ascending_loses_recall_and_in_degree_in_the_subspace_inserted_last():
    gap, degree = [], []
    data, labels = hr.union(1700, [2, 8, 32], 64, range(3))
    for seed, (x, label) in enumerate(zip(data, labels)):
        q, x, label = x[:200], x[200:], label[200:]
        truth, lids = brute_force(x, q, 10), hr.lid(hr.neighbor_distances(x, 30))
        by = [
            hr.Ordered(x, hr.insertion_order(f"{w} LID", lids, label, seed), seed)
            for w in ("descending", "ascending")
        ]
        a, b = (float(recall(i.search(q, 10, 16), truth).mean()) for i in by)
        c, d = (i.in_degree()[label == 2].mean() for i in by)
        gap.append(a - b)
        degree.append(c - d)
    assert min(gap) > 0 and np.mean(gap) > 0.03 and min(degree) > 0.5, (gap, degree)


# Rankings


def test_ndcg_is_that_of_scikit_learn():
    rng = np.random.default_rng(0)
    relevance = rng.integers(0, 3, (6, 30)).astype(float)
    relevance[:, 0] = 1
    score = rng.random((6, 30))
    found = torch.as_tensor(np.argsort(-score, 1)[:, :10].copy())
    ours = hr.ndcg(found, torch.as_tensor(relevance))
    both = torch.stack([found, found.flip(1)])  # a leading batch axis
    assert torch.equal(hr.ndcg(both, torch.as_tensor(relevance))[0], ours)
    for i in range(6):
        theirs = ndcg_score(relevance[i : i + 1], score[i : i + 1], k=10)
        assert ours[i].item() == pytest.approx(theirs, rel=1e-12)


def test_ndcg_by_hand():
    relevance = torch.tensor([[0.0, 2.0, 1.0, 0.0]])
    ideal = 2 + 1 / math.log2(3)
    for found, gain in (
        ([1, 2, 0], ideal),
        ([2, 1, 3], 1 + 2 / math.log2(3)),
        ([0, 3, 1], 2 / 2),
        ([2, -1, -1], 1),  # not reached: no gain, not that of the last element
        ([-1, -1, -1], 0),
    ):
        assert hr.ndcg(torch.tensor([found]), relevance).item() == pytest.approx(gain / ideal)
    with pytest.raises(ValueError, match="1 queries have nothing relevant"):
        hr.ndcg(torch.tensor([[0, 1]]), torch.zeros(1, 4))


def test_positions_and_swaps():
    exact = torch.tensor([[0.9, 0.8, 0.7, 0.6], [0.1, 0.2, 0.3, 0.4]])
    other = torch.tensor([[0.6, 0.8, 0.7, 0.9], [0.1, 0.2, 0.4, 0.3]])
    assert hr.positions(exact).tolist() == [[0, 1, 2, 3], [3, 2, 1, 0]]
    assert hr.positions(other).tolist() == [[3, 1, 2, 0], [3, 2, 0, 1]]
    assert hr.swaps(exact, other).tolist() == [5, 1]
    assert hr.swaps(exact, exact).tolist() == [0, 0]
    assert hr.swaps(exact, -exact).tolist() == [6, 6]


@pytest.mark.gpu
def test_distances_and_truth_on_a_gpu():
    x = hr.subspace(500, 6, D, [0])[0]
    torch.testing.assert_close(
        hr.neighbor_distances(x.cuda(), 20).cpu(), hr.neighbor_distances(x, 20)
    )
