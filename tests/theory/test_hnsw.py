"""HNSW: Algorithms 1-5, their invariants, and independent implementations of the same."""

from heapq import heapify, heappop
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from miniature import data
from miniature.theory import hnsw
from miniature.theory.hnsw import HNSW, beam_search, draw_levels
from miniature.theory.search import LSH, KDTree, brute_force, evaluations_at, probe, recall


def points(n, d, seed=0):
    return np.random.default_rng(seed).random((n, d))


def exact(x, q, k):
    return brute_force(torch.as_tensor(x), torch.as_tensor(q), k)


def mean_recall(index, x, q, k, ef):
    return float(recall(index.search(q, k, ef)[0], exact(x, q, k)).mean())


def length(x, i, j):
    return float(((x[i] - x[j]) ** 2).sum())


# Algorithms 3 and 4 once more, from the paper, in plain Python


def select(x, q, candidates, M, heuristic=True, keep_pruned=False, around=None):
    if heuristic and around is not None:  # extendCandidates
        candidates = {e for c in candidates for e in [c, *around(c)]} - {q}
    queue = sorted(candidates, key=lambda e: length(x, e, q))
    if not heuristic:
        return queue[:M]
    accepted, discarded = [], []
    for e in queue:
        if len(accepted) == M:
            break
        nearer = all(length(x, e, q) < length(x, e, r) for r in accepted)
        (accepted if nearer else discarded).append(e)
    return accepted + discarded[: M - len(accepted)] if keep_pruned else accepted


@given(
    seed=st.integers(0, 10**6),
    n=st.integers(3, 25),
    M=st.integers(2, 6),
    heuristic=st.booleans(),
    keep=st.booleans(),
    extend=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_select_neighbors_is_algorithm_3_or_4(seed, n, M, heuristic, keep, extend):
    """With ef_construction >= n the candidates of the last element are all that it can reach."""
    x = points(n, 3, seed)
    options = dict(heuristic=heuristic, keep_pruned=keep, extend=extend, m_L=0, M_max0=n + M)
    index = HNSW(3, M, n, **options).add(x[:-1])
    candidates = index.search(x[-1:], n - 1, n)[0][0]
    candidates = candidates[candidates >= 0].tolist()
    links = {i: index.neighbors(i).tolist() for i in range(n - 1)}
    index.add(x[-1:])
    around = links.get if extend else None
    expected = select(x, n - 1, candidates, M, heuristic, keep, around)
    assert index.neighbors(n - 1).tolist() == expected


# Algorithms 1, 2 and 5 once more, in plain Python, on the levels that the index drew


class Plain:
    """HNSW from the paper's pseudocode: dictionaries of lists, sorted lists for heaps."""

    def __init__(self, x, level, M, ef_construction, heuristic):
        self.x, self.level, self.M, self.heuristic = x, level, M, heuristic
        self.ep, self.links = 0, {(i, lc): [] for i, l in enumerate(level) for lc in range(l + 1)}
        for q in range(1, len(x)):
            self.insert(q, ef_construction)

    def search_layer(self, q, ep, ef, lc):
        self.evaluations += len(ep)
        C = sorted((((self.x[e] - q) ** 2).sum(), e) for e in ep)
        W, v = C[:ef], set(ep)
        while C:
            d, c = C.pop(0)
            if d > W[-1][0]:
                break
            for e in self.links[c, lc]:
                if e not in v:
                    v.add(e)
                    self.evaluations += 1
                    d = ((self.x[e] - q) ** 2).sum()
                    if d < W[-1][0] or len(W) < ef:
                        C, W = sorted([*C, (d, e)]), sorted([*W, (d, e)])[:ef]
        return [e for _, e in W]

    def insert(self, q, ef_construction):
        self.evaluations, ep, l = 0, [self.ep], self.level[q]
        L = self.level[self.ep]
        for lc in range(L, l, -1):
            ep = self.search_layer(self.x[q], ep, 1, lc)
        for lc in range(min(L, l), -1, -1):
            ep = self.search_layer(self.x[q], ep, ef_construction, lc)
            self.links[q, lc] = select(self.x, q, ep, self.M, self.heuristic)
            cap = 2 * self.M if lc == 0 else self.M
            for e in self.links[q, lc]:
                self.links[e, lc] = [*self.links[e, lc], q]
                if len(self.links[e, lc]) > cap:
                    self.links[e, lc] = select(self.x, e, self.links[e, lc], cap, self.heuristic)
        if l > L:
            self.ep = q

    def search(self, q, k, ef):
        self.evaluations, ep = 0, [self.ep]
        for lc in range(self.level[self.ep], 0, -1):
            ep = self.search_layer(q, ep, 1, lc)
        return self.search_layer(q, ep, ef, 0)[:k]


@pytest.mark.parametrize("heuristic", [True, False])
def test_the_index_is_that_of_the_pseudocode_link_by_link(heuristic):
    x, q = points(300, 3), points(30, 3, 1)
    index = HNSW(3, 4, 12, heuristic=heuristic).add(x)
    plain = Plain(x, index.graph.level.tolist(), 4, 12, heuristic)
    assert index.graph.level.max() >= 2 and index.graph.degree.max() == 8  # layers, full lists
    assert index.graph.state[hnsw.ENTRY] == plain.ep
    for (i, layer), links in plain.links.items():
        assert index.neighbors(i, layer).tolist() == links
    ids, _, evaluations = index.search(q, 3, 9)
    for one, found, count in zip(q, ids, evaluations):
        assert plain.search(one, 3, 9) == found.tolist() and plain.evaluations == count


def test_accepted_neighbors_are_relative_neighbors_on_every_layer():
    x, index = points(400, 4), HNSW(4, 5, 40)
    for q in range(len(x)):
        index.add(x[q : q + 1])
        for layer in range(index.graph.level[q] + 1):
            accepted = index.neighbors(q, layer).tolist()
            for j, e in enumerate(accepted):
                assert all(length(x, e, q) < length(x, e, r) for r in accepted[:j])


def test_degree_caps_hold_after_every_insertion_and_links_stay_on_their_layer():
    x, index = points(300, 3), HNSW(3, 4, 30, keep_pruned=True)
    reached_cap = False
    for q in range(len(x)):
        index.add(x[q : q + 1])
        for i in range(q + 1):
            for layer in range(index.graph.level[i] + 1):
                links = index.neighbors(i, layer)
                assert len(links) <= (8 if layer == 0 else 4)
                assert len(set(links.tolist())) == len(links) and i not in links
                assert (index.graph.level[links] >= layer).all()
                reached_cap |= len(links) == 8
    assert reached_cap, "no list was ever full: the test shows nothing"


def test_a_full_list_is_shrunk_from_the_viewpoint_of_its_owner():
    """M = 2, cap 2 on a flat graph: 0 is full with 1 and 2 when 3 arrives."""
    x = np.array([[0.0, 0.0], [1.0, 0.0], [-1.1, 0.0], [0.0, 0.5], [0.0, -9.0]])
    index = HNSW(2, 2, 10, m_L=0, M_max0=2).add(x[:3])
    assert sorted(index.neighbors(0)) == [1, 2]
    index.add(x[3:4])
    # nearest to 0 is 3, then 1 (d = 1 < sqrt(1.25) to 3); 2 is as good as 1, but the list is full
    assert index.neighbors(0).tolist() == select(x, 0, [1, 2, 3], 2) == [3, 1]
    assert 2 not in index.neighbors(0) and 0 in index.neighbors(2)  # links become one-way


def test_levels_follow_the_geometric_law():
    for M in (4, 16):
        levels = draw_levels(200_000, 1 / np.log(M), np.random.default_rng(0))
        counts = np.bincount(np.minimum(levels, 3), minlength=4)
        share = np.array([M**-j - M ** -(j + 1.0) for j in range(3)] + [M**-3.0])
        assert chisquare(counts, share * len(levels)).pvalue > 0.01
    assert (draw_levels(100, 0, np.random.default_rng(0)) == 0).all()


def test_the_entry_point_is_on_the_top_layer():
    index = HNSW(3, 3, 20)
    for part in points(300, 3).reshape(30, 10, 3):
        index.add(part)
        level = index.graph.level
        assert level[index.graph.state[hnsw.ENTRY]] == level.max()


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_wide_searches_are_exact_where_everything_can_be_reached(dtype):
    x, q = points(500, 6), points(50, 6, 1)
    index = HNSW(6, 8, 60, dtype=dtype).add(x)
    assert (index.search(q[:1], 500, 500)[0] >= 0).all(), "layer 0 is not connected"
    ids, dist, evaluations = index.search(q, 10, 500)
    assert (ids == exact(x, q, 10).numpy()).all()
    assert np.allclose(dist, np.linalg.norm(x[ids] - q[:, None], axis=-1), rtol=1e-6)
    assert (evaluations >= 500).all()  # all of layer 0, and the way there


def test_search_is_exact_against_scikit_learn():
    neighbors = pytest.importorskip("sklearn.neighbors", reason="the oracle is not installed")
    x, q = points(400, 5), points(40, 5, 1)
    reference = neighbors.NearestNeighbors(n_neighbors=7, algorithm="brute").fit(x).kneighbors(q)
    ids, dist, _ = HNSW(5, 8, 60).add(x).search(q, 7, 400)
    assert (ids == reference[1]).all() and np.allclose(dist, reference[0])
    assert (exact(x, q, 7).numpy() == reference[1]).all()


def test_every_distance_is_counted_once():
    """A flat graph of fewer than M elements is complete: a search meets each of them once."""
    x, index = points(8, 3), HNSW(3, 8, 20, m_L=0, heuristic=False)
    index.add(x)
    before = index.evaluations
    _, _, evaluations = index.search(points(5, 3, 1), 3, 3)
    assert (evaluations == 8).all() and index.evaluations == before + 40


def test_insertion_is_incremental_and_reproducible():
    x, q = points(600, 4), points(20, 4, 1)
    whole = HNSW(4, 6, 30, seed=3).add(x)
    pieces = HNSW(4, 6, 30, seed=3)
    for part in np.split(x, [1, 2, 250]):
        pieces.add(part)
    assert (whole.graph.level == pieces.graph.level).all()
    for i in range(600):
        assert whole.neighbors(i).tolist() == pieces.neighbors(i).tolist()
    for a, b in zip(whole.search(q, 5, 20), pieces.search(q, 5, 20)):
        assert (a == b).all()


def test_a_search_that_reaches_fewer_than_k_says_so():
    x = np.concatenate([points(40, 2), 100 + points(40, 2, 1)])
    x = x[np.random.default_rng(0).permutation(80)]
    index = HNSW(2, 2, 4, m_L=0, M_max0=2, heuristic=False).add(x)
    ids, dist, _ = index.search(x[:1], 80, 80)
    missing = ids[0] < 0
    assert missing.any() and np.isinf(dist[0, missing]).all() and (np.diff(missing) >= 0).all()


def test_the_heuristic_is_what_keeps_clusters_together():
    c = data.gaussian_clusters(2100, 8, 100, 0.05, 0, dtype=torch.float64).x.numpy()
    x, q = c[100:], c[:100]
    with_it, without = (HNSW(8, 8, 60, heuristic=h).add(x) for h in (True, False))
    assert mean_recall(with_it, x, q, 10, 40) > 0.97
    assert mean_recall(without, x, q, 10, 40) < 0.9


def test_path_goes_down_and_never_away():
    x, q = points(800, 2), points(1, 2, 1)[0]
    index = HNSW(2, 4, 40).add(x)
    steps = index.path(q)
    assert [layer for layer, _ in steps] == list(range(index.graph.level.max(), -1, -1))
    walk = [i for _, ids in steps for i in ids]
    assert (np.diff(((x[walk] - q) ** 2).sum(1)) <= 0).all()
    assert all(a[1][-1] == b[1][0] for a, b in pairwise(steps))


@pytest.mark.parametrize("options", [{}, {"m_L": 0, "heuristic": False, "M_max0": 200}])
def test_beam_search_gives_the_same_answers(options):
    x, q = points(1500, 8), points(60, 8, 1)
    index = HNSW(8, 6, 40, **options).add(x)
    for k, ef in ((1, 1), (10, 10), (10, 60)):
        ids, dist, _ = index.search(q, k, ef)
        beam_ids, beam_dist = beam_search(index, q, k, ef)
        assert (beam_ids.numpy() == ids).mean() > 0.995
        assert np.allclose(np.sort(beam_dist.numpy(), 1), np.sort(dist, 1), rtol=1e-2)


def test_beam_search_pads_what_cannot_be_reached():
    index = HNSW(2, 2, 4).add(points(3, 2))
    ids, dist = beam_search(index, points(2, 2, 1), 3, 5, dtype=torch.float32)
    assert dist.dtype == torch.float32 and ids.shape == (2, 3)
    assert ((ids >= 0) == dist.isfinite()).all()


@pytest.mark.gpu
def test_beam_search_on_a_gpu():
    x, q = points(3000, 8), points(200, 8, 1)
    index = HNSW(8, 8, 60).add(x)
    ids = beam_search(index, q, 10, 60, device="cuda")[0].cpu()
    assert float(recall(ids, exact(x, q, 10)).mean()) > mean_recall(index, x, q, 10, 60) - 0.01


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(M=1), "M must be at least 2"),
        (dict(ef_construction=0), "ef_construction must be at least 1"),
        (dict(m_L=-1.0), "m_L must not be negative"),
        (dict(M=8, M_max0=7), "M_max0 must be at least M = 8, not 7"),
    ],
)
def test_an_index_that_cannot_be(change, message):
    with pytest.raises(ValueError, match=message):
        HNSW(3, **change)


def test_errors_name_the_value():
    index = HNSW(3, 4, 20).add(points(50, 3))
    q = points(2, 3)
    with pytest.raises(ValueError, match="ef = 4 is too narrow to hold k = 5"):
        index.search(q, 5, 4)
    with pytest.raises(ValueError, match="ef = 4"):
        beam_search(index, q, 5, 4)
    with pytest.raises(ValueError, match=r"k must lie in 1\.\.50.*not 51"):
        index.search(q, 51, 60)
    with pytest.raises(ValueError, match="k must lie in"):
        index.search(q, 0, 10)
    with pytest.raises(ValueError, match=r"expected vectors \[n, 3\], got shape \[2, 4\]"):
        index.search(points(2, 4), 1, 1)
    with pytest.raises(ValueError, match="1 coordinates are not finite"):
        index.add([[0.0, np.nan, 1.0]])
    assert len(index) == 50
    with pytest.raises(ValueError, match="k must lie in"):
        HNSW(3).search(q, 1, 1)


# hnswlib, the authors' own implementation


@pytest.mark.parametrize("source", ["uniform", "digits"])
def test_recall_is_that_of_hnswlib(source):
    hnswlib = pytest.importorskip("hnswlib", reason="the oracle hnswlib is not installed")
    if source == "uniform":
        x, q = points(5000, 16), points(300, 16, 1)
    else:
        split = data.digits()
        x, q = split.x_train.double().numpy(), split.x_test.double().numpy()
    M, ef_construction = 8, 60
    theirs = hnswlib.Index(space="l2", dim=x.shape[1])
    theirs.init_index(len(x), ef_construction=ef_construction, M=M, random_seed=1)
    theirs.add_items(x, num_threads=1)
    ours = HNSW(x.shape[1], M, ef_construction, seed=1).add(x)
    truth = exact(x, q, 10)
    for ef in (10, 30, 80):
        theirs.set_ef(ef)
        reference = recall(theirs.knn_query(q, k=10, num_threads=1)[0].astype(np.int64), truth)
        assert abs(mean_recall(ours, x, q, 10, ef) - float(reference.mean())) < 0.02


# The engine: exact and classical search


def test_kd_tree_is_exact_and_reads_little_in_low_dimension():
    x, q = (torch.as_tensor(points(n, 2, n)) for n in (1000, 50))
    tree = KDTree(x, leaf=4)
    ids, evaluations = tree.search(q, 10, [20, 1000])
    assert (ids[1] == exact(x, q, 10)).all()
    assert (evaluations[0] <= 20).all() and (evaluations[1] < 100).all()
    assert recall(ids[0], ids[1]).mean() < 1


def test_kd_tree_bounds_are_distances_to_cells_that_hold_the_points():
    x, q = torch.as_tensor(points(300, 4)), torch.as_tensor(points(20, 4, 1))
    tree = KDTree(x, leaf=8)
    assert torch.bincount(tree.leaf_of).max() <= 8
    bound, true = tree.bounds(q), torch.cdist(q, x)
    assert (bound <= true + 1e-12).all() and (bound > 0).any()
    for one, row in zip(q, tree.bounds(q)):  # a leaf is a box around its points: within the bound
        for leaf in tree.leaf_of.unique():
            part = x[tree.leaf_of == leaf]
            box = torch.maximum(part.min(0).values - one, one - part.max(0).values).clamp(min=0)
            assert row[tree.leaf_of == leaf][0] <= box.norm() + 1e-12


def test_kd_tree_visits_leaves_as_a_search_with_a_queue_would():
    x, q = torch.as_tensor(points(200, 3)), torch.as_tensor(points(10, 3, 1))
    tree = KDTree(x, leaf=4)
    ids, evaluations = tree.search(q, 5, [200])
    for one, bound, found, count in zip(q, tree.bounds(q), ids[0], evaluations[0]):
        queue = [(float(bound[tree.leaf_of == leaf][0]), int(leaf)) for leaf in range(64)]
        heapify(queue)
        best, seen = [], 0
        while queue and (len(best) < 5 or queue[0][0] < best[4][0]):
            members = (tree.leaf_of == heappop(queue)[1]).nonzero().flatten().tolist()
            best = sorted(best + [(float((x[i] - one).norm()), i) for i in members])[:5]
            seen += len(members)
        assert [i for _, i in best] == found.tolist() and seen == count


def test_lsh_finds_more_with_more_checks_and_counts_its_projections():
    x, q = torch.as_tensor(points(1000, 8)), torch.as_tensor(points(50, 8, 1))
    index = LSH(x, tables=4, bits=8, seed=0)
    ids, evaluations = index.search(q, 10, [50, 200, 1000])
    scores = [float(recall(i, exact(x, q, 10)).mean()) for i in ids]
    assert scores == sorted(scores) and scores[0] > 0.1 and scores[2] == 1
    assert evaluations[:, 0].tolist() == [82, 232, 1032]
    # the first bucket of a query is its own: with one table, points on its side of every hyperplane
    one = LSH(x, tables=1, bits=3, seed=0)
    side = (q @ one.normal[0] >= one.middle[0]).double() * 2 - 1
    own = (side[:, None] == one.side[0]).all(-1)
    ids, _ = one.search(q, 1, [int(own.sum(1).min())])
    assert own.gather(1, ids[0]).all()


def test_probe_refuses_budgets_that_make_no_sense():
    x = torch.zeros(10, 2)
    for checks in ([1, 5], [5, 11]):
        with pytest.raises(ValueError, match=r"k\.\.N = 2\.\.10"):
            probe(x, x[:1], 2, torch.zeros(1, 10), checks)
    with pytest.raises(ValueError, match="at least 1 point"):
        KDTree(x, leaf=0)


def test_recall_and_evaluations_at():
    assert recall([[0, 1, -1]], [[1, 0, 2]]).tolist() == [2 / 3]
    with pytest.raises(ValueError, match="differ in shape"):
        recall([[0, 1]], [[1]])
    curve = [[0.5, 0.9, 1.0], [0.97, 0.98, 1.0], [0.1, 0.2, 0.3]]
    assert evaluations_at(0.95, curve, [[10, 20, 40]] * 3).tolist() == [
        pytest.approx(30),
        10,
        np.inf,
    ]
