r"""Hierarchical navigable small worlds.

Malkov and Yashunin, "Efficient and robust approximate nearest neighbor search using Hierarchical
Navigable Small World graphs", TPAMI 2018, arXiv:1603.09320, Algorithms 1-5.

The one idea: a skip list whose layers are proximity graphs. Element q is drawn a top layer

    l = floor(-ln(U(0, 1)) m_L),   m_L = 1 / ln M,   so   P(l >= j) = M^-j,

and is linked, on every layer up to l, to at most M of its neighbors. A search walks greedily
through the sparse layers, whose links are long, and spends its effort (ef) on layer 0 only. What
keeps the graph navigable when the data are clustered is how the links are chosen: e becomes a
neighbor of q only if it is nearer to q than to every neighbor accepted before it, so a bridge to
another cluster is worth more than one more link into the own cluster.

`m_L=0` leaves layer 0 alone; with `heuristic=False` that is the paper's predecessor NSW.

CPU only, compiled by numba: an insertion is a chain of some hundred dependent pointer reads, each
followed by one short distance, which neither vectorizes nor runs on a GPU. A *built* graph can be
searched for many queries at once on any device: `beam_search`.
"""

from collections import namedtuple
from heapq import heappop, heappush, heappushpop

import numpy as np
import torch
from numba import njit
from torch.nn.functional import pad

# x [N, d] vectors; level [N] top layer of each element; links [R, M_max0] and degree [R] hold one
# row for each (element, layer): row[i] + layer; seen [N] the number of the last search that met i;
# state: entry point, number of searches, number of distance evaluations.
Graph = namedtuple("Graph", "x level row links degree seen state")
Rule = namedtuple("Rule", "M M_max M_max0 ef_construction heuristic extend keep_pruned")
ENTRY, SEARCHES, EVALUATIONS = 0, 1, 2

# Functions that only compiled code calls: without entry points for others they compile faster.
INNER = {"cache": True, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}


@njit(**INNER, fastmath={"reassoc", "contract"})  # lets the sum be vectorized, no more
def distance(g, i, q):
    """Squared Euclidean distance of element i and vector q; the only place that computes one."""
    g.state[EVALUATIONS] += 1
    total = 0.0
    for j in range(q.shape[0]):
        total += (g.x[i, j] - q[j]) ** 2
    return total


@njit(**INNER)
def search_layer(g, q, ep, ef, layer):
    """Algorithm 2, SEARCH-LAYER: the ef elements nearest to q that a best-first walk from ep finds.

    Returns their distances and ids, nearest first.
    """
    g.state[SEARCHES] += 1
    v = g.state[SEARCHES]  # g.seen[e] == v: e is in the visited set of this search
    C = [(0.0, 0) for _ in range(0)]  # candidates, nearest on top
    W = [(0.0, 0) for _ in range(0)]  # found so far, negated distance: furthest on top
    for e in ep:
        g.seen[e] = v
        d = distance(g, e, q)
        heappush(C, (d, e))
        heappush(W, (-d, e))
    while len(W) > ef:
        heappop(W)
    while len(C) > 0:
        d_c, c = heappop(C)
        if d_c > -W[0][0]:
            break  # everything in W is evaluated
        row = g.row[c] + layer
        for e in g.links[row, : g.degree[row]]:
            if g.seen[e] == v:
                continue
            g.seen[e] = v
            d = distance(g, e, q)
            if len(W) < ef or d < -W[0][0]:
                heappush(C, (d, e))
                if len(W) < ef:
                    heappush(W, (-d, e))
                else:
                    heappushpop(W, (-d, e))  # drops the worst
    dist, ids = np.empty(len(W)), np.empty(len(W), np.int64)
    for j in range(len(W) - 1, -1, -1):
        d, ids[j] = heappop(W)
        dist[j] = -d
    return dist, ids


@njit(**INNER)
def select_neighbors(g, q, dist, ids, M, layer, rule):
    """Algorithms 3 and 4, SELECT-NEIGHBORS: the neighbors of q, at most M of the candidates ids."""
    W = [(0.0, 0) for _ in range(0)]
    for j in range(len(ids)):
        heappush(W, (dist[j], ids[j]))
    if rule.heuristic and rule.extend:
        g.state[SEARCHES] += 1
        v = g.state[SEARCHES]
        g.seen[q] = v
        for c in ids:
            g.seen[c] = v
        for c in ids:
            row = g.row[c] + layer
            for e in g.links[row, : g.degree[row]]:
                if g.seen[e] != v:
                    g.seen[e] = v
                    heappush(W, (distance(g, e, g.x[q]), e))
    R = np.empty(M, np.int64)
    discarded = np.empty(len(W), np.int64)
    n, n_discarded = 0, 0
    while len(W) > 0 and n < M:
        d, e = heappop(W)
        good = True
        if rule.heuristic:
            for r in R[:n]:
                if distance(g, e, g.x[r]) <= d:  # e is nearer to an accepted r than to q
                    good = False
                    break
        if good:
            R[n] = e
            n += 1
        else:
            discarded[n_discarded] = e
            n_discarded += 1
    if rule.keep_pruned:
        for e in discarded[: min(n_discarded, M - n)]:
            R[n] = e
            n += 1
    return R[:n]


@njit(**INNER)
def set_links(g, row, neighbors):
    """Replace a link list. Element by element, as a slice assignment doubles the compile time."""
    g.degree[row] = len(neighbors)
    for j in range(len(neighbors)):
        g.links[row, j] = neighbors[j]


@njit(cache=True)
def insert(g, elements, rule):
    """Algorithm 1, INSERT, for each of the elements in turn."""
    for q in elements:
        l = g.level[q]
        ep = np.array([g.state[ENTRY]])
        L = g.level[ep[0]]
        for lc in range(L, -1, -1):
            dist, ep = search_layer(g, g.x[q], ep, 1 if lc > l else rule.ef_construction, lc)
            if lc > l:
                continue  # only on the way down
            neighbors = select_neighbors(g, q, dist, ep, rule.M, lc, rule)
            row = g.row[q] + lc
            set_links(g, row, neighbors)
            cap = rule.M_max0 if lc == 0 else rule.M_max
            for e in neighbors:
                row = g.row[e] + lc
                n = g.degree[row]
                if n < cap:
                    g.links[row, n] = q
                    g.degree[row] += 1
                    continue
                # one link too many: e chooses again, by the distances from e, among all of them
                conn, e_dist = np.empty(n + 1, np.int64), np.empty(n + 1)
                for j in range(n + 1):
                    conn[j] = g.links[row, j] if j < n else q
                    e_dist[j] = distance(g, conn[j], g.x[e])
                set_links(g, row, select_neighbors(g, e, e_dist, conn, cap, lc, rule))
        if l > L:
            g.state[ENTRY] = q


@njit(cache=True)
def knn_search(g, queries, ef, ids, dist, evaluations):
    """Algorithm 5, K-NN-SEARCH, for each query; fills ids, dist [Q, k] and evaluations [Q]."""
    for j in range(len(queries)):
        before = g.state[EVALUATIONS]
        ep = np.array([g.state[ENTRY]])
        for lc in range(g.level[ep[0]], -1, -1):
            W, ep = search_layer(g, queries[j], ep, 1 if lc > 0 else ef, lc)
        for r in range(min(ids.shape[1], len(ep))):
            ids[j, r], dist[j, r] = ep[r], np.sqrt(W[r])
        evaluations[j] = g.state[EVALUATIONS] - before


def draw_levels(n, m_L, rng):
    """Draw top layers, floor(-ln(U(0, 1)) m_L): an int64 array [n] (Algorithm 1, line 4)."""
    return np.floor(-np.log(1.0 - rng.random(n)) * m_L).astype(np.int64)


class HNSW:
    """An HNSW index under the Euclidean distance.

    Parameters
    ----------
    dim : int
        Dimension d of the vectors.
    M : int
        Links of a new element on each layer, and the cap `M_max` on the layers above 0.
    ef_construction : int
        Width of the search that finds the candidates for these links.
    m_L : float, optional
        Scale of the level distribution, 1 / ln M if not given; 0 builds layer 0 only.
    M_max0 : int, optional
        Cap on the links of an element on layer 0, 2 M if not given.
    heuristic : bool
        Choose neighbors by Algorithm 4; otherwise by Algorithm 3, the M nearest.
    extend, keep_pruned : bool
        The two options of Algorithm 4.
    seed : int
        Seed of the level draws.
    dtype : numpy dtype
        float64 or float32, of the vectors and of the distances.

    Raises
    ------
    ValueError
        If M < 2, ef_construction < 1, m_L < 0, or M_max0 < M.
    """

    def __init__(
        self,
        dim,
        M=16,
        ef_construction=200,
        *,
        m_L=None,
        M_max0=None,
        heuristic=True,
        extend=False,
        keep_pruned=False,
        seed=0,
        dtype=np.float64,
    ):
        if M < 2:
            raise ValueError(f"M must be at least 2 (m_L = 1 / ln M), not {M}")
        if ef_construction < 1:
            raise ValueError(f"ef_construction must be at least 1, not {ef_construction}")
        M_max0 = 2 * M if M_max0 is None else M_max0
        if M_max0 < M:
            raise ValueError(f"M_max0 must be at least M = {M}, not {M_max0}")
        self.m_L = 1 / np.log(M) if m_L is None else m_L
        if self.m_L < 0:
            raise ValueError(f"m_L must not be negative, not {m_L}")
        self.rule = Rule(M, M, M_max0, ef_construction, heuristic, extend, keep_pruned)
        self.rng = np.random.default_rng(seed)
        none = np.empty(0, np.int64)
        self.graph = Graph(
            x=np.empty((0, dim), dtype),
            level=none,
            row=none,
            links=np.empty((0, M_max0), np.int64),
            degree=none,
            seen=none,
            state=np.zeros(3, np.int64),
        )

    def __len__(self):
        return len(self.graph.x)

    def _vectors(self, x):
        g = self.graph
        x = np.ascontiguousarray(x, g.x.dtype)
        if x.ndim != 2 or x.shape[1] != g.x.shape[1]:
            raise ValueError(f"expected vectors [n, {g.x.shape[1]}], got shape {list(x.shape)}")
        if not np.isfinite(x).all():
            raise ValueError(f"{(~np.isfinite(x)).sum()} coordinates are not finite")
        return x

    def add(self, x):
        """Insert the rows of x [n, d] in order; splitting them over several calls changes nothing.

        Raises
        ------
        ValueError
            If x is not [n, d] or not finite.
        """
        x, g = self._vectors(x), self.graph
        n, first = len(x), len(self)
        level = draw_levels(n, self.m_L, self.rng)
        # not concatenate: it would copy, and so touch, the memory of links that are not there yet
        links = np.empty((len(g.links) + (level + 1).sum(), g.links.shape[1]), np.int64)
        links[: len(g.links)] = g.links
        self.graph = Graph(
            x=np.concatenate([g.x, x]),
            level=np.concatenate([g.level, level]),
            row=np.concatenate([g.row, len(g.links) + np.cumsum(level + 1) - level - 1]),
            links=links,
            degree=np.concatenate([g.degree, np.zeros(len(links) - len(g.links), np.int64)]),
            seen=np.concatenate([g.seen, np.zeros(n, np.int64)]),
            state=g.state,
        )
        # the very first element is the entry point already and has nothing to link to
        insert(self.graph, np.arange(max(first, 1), first + n), self.rule)
        return self

    def search(self, queries, k, ef):
        """The k nearest elements that a search of width ef finds (Algorithm 5).

        Returns
        -------
        ids : int64 [Q, k]
            Nearest first; -1 where fewer than k elements can be reached.
        distances : float64 [Q, k]
        evaluations : int64 [Q]
            How many distances each query computed.

        Raises
        ------
        ValueError
            If queries is not [Q, d] or not finite, k is not in 1..N, or ef < k.
        """
        queries = self._vectors(queries)
        self._check(k, ef)
        n = len(queries)
        ids, dist, evaluations = np.full((n, k), -1), np.full((n, k), np.inf), np.zeros(n, np.int64)
        knn_search(self.graph, queries, ef, ids, dist, evaluations)
        return ids, dist, evaluations

    def _check(self, k, ef):
        if not 1 <= k <= len(self):
            raise ValueError(f"k must lie in 1..{len(self)}, the number of elements, not {k}")
        if ef < k:
            raise ValueError(f"ef = {ef} is too narrow to hold k = {k} results")

    def neighbors(self, i, layer=0):
        """Ids of the elements that element i links to on a layer."""
        row = self.graph.row[i] + layer
        return self.graph.links[row, : self.graph.degree[row]]

    def path(self, query):
        """The greedy walk of a query [d] at ef = 1: (layer, ids it stood on), top first."""
        g = self.graph
        query = self._vectors(np.asarray(query)[None])[0]
        here, steps = int(g.state[ENTRY]), []
        for lc in range(g.level[here], -1, -1):
            walk = [here]
            while True:
                around = np.append(self.neighbors(here, lc), here)
                here = int(around[((g.x[around] - query) ** 2).sum(1).argmin()])
                if here == walk[-1]:
                    break
                walk.append(here)
            steps.append((lc, walk))
        return steps

    @property
    def evaluations(self):
        """Distances computed so far, by insertions and searches together."""
        return int(self.graph.state[EVALUATIONS])


def beam_search(index, queries, k, ef, device="cpu", dtype=torch.float64):
    """`index.search` for all queries in lockstep on any device: K-NN-SEARCH on tensors.

    One beam of ef elements takes the place of both heaps of Algorithm 2: a candidate that has
    dropped out of W is further than the worst of W, so it would only have ended the search. An
    element that comes up again after it dropped out of the beam is computed again and drops out
    again, so no set of visited elements is needed; the answers are those of `index.search`, up to
    ties.

    Parameters
    ----------
    index : HNSW
    queries : array or Tensor [Q, d]
    k, ef : int
    device : torch.device or str
    dtype : torch.dtype
        Precision of the distances.

    Returns
    -------
    ids : Tensor [Q, k], int64
        Nearest first; -1 where fewer than k elements can be reached.
    distances : Tensor [Q, k]

    Raises
    ------
    ValueError
        As `HNSW.search`.
    """
    index._check(k, ef)
    g, N = index.graph, len(index)
    q = torch.as_tensor(index._vectors(queries)).to(device, dtype)
    x = torch.as_tensor(g.x).to(device, dtype)
    x = torch.cat([x, torch.full_like(x[:1], torch.inf)])  # element N: no element, infinitely far
    row = torch.as_tensor(g.row).to(device)
    links, degree = torch.as_tensor(g.links).to(device), torch.as_tensor(g.degree).to(device)
    links = links.where(torch.arange(links.shape[1], device=device) < degree[:, None], N)

    def distance_to(ids):
        return ((x[ids] - q[:, None]) ** 2).sum(-1)

    W = torch.full((len(q), 1), int(g.state[ENTRY]), device=device)
    dist = distance_to(W)
    for lc in range(int(g.level[g.state[ENTRY]]), -1, -1):
        unexpanded = dist.isfinite()
        while unexpanded.any():
            best = dist.masked_fill(~unexpanded, torch.inf).argmin(1, keepdim=True)
            e = links[row[W.gather(1, best)] + lc][:, 0]
            e = e.where(unexpanded.gather(1, best), N)  # queries that are done stand still
            e = e.where(~(e[:, :, None] == W[:, None]).any(-1), N)
            unexpanded.scatter_(1, best, False)
            d_e = distance_to(e)
            width = min(ef if lc == 0 else 1, W.shape[1] + e.shape[1])
            dist, keep = torch.cat([dist, d_e], 1).topk(width, largest=False)
            W = torch.cat([W, e], 1).gather(1, keep)
            unexpanded = torch.cat([unexpanded, d_e.isfinite()], 1).gather(1, keep)
    W, dist = pad(W, (0, k), value=N)[:, :k], pad(dist, (0, k), value=torch.inf)[:, :k]
    return W.where(W < N, -1), dist.sqrt()
