r"""The impacts of data, ordering, and intrinsic dimensionality on recall in HNSW.

Elliott and Clark, "The Impacts of Data, Ordering, and Intrinsic Dimensionality on Recall in
Hierarchical Navigable Small Worlds", ICTIR 2024, arXiv:2405.17813. A measurement study: this file
holds its protocol, `miniature.theory.hnsw` the index.

The one idea: keep the parameters of the index (M, efConstruction, ef) where a vector database has
its defaults, and vary what nobody tunes: the data and the order in which they are inserted. Vectors
have unit length, so that cosine, inner product and Euclidean distance give the same neighbors.

Local intrinsic dimension at x by maximum likelihood, from the distances r_1 <= ... <= r_k of its
exact nearest neighbors (Levina and Bickel 2004, Amsaleg et al. 2015):

    LID(x) = - ( 1/k sum_{i=1..k} ln(r_i / r_k) )^-1.

If the number of neighbors within r grows like r^m, the k-1 terms that are not zero are exponential
with mean 1/m. Their sum is then a Gamma(k-1) variable over m, and E LID = m k / (k-2): with the
numerator k-1 it is the maximum of the likelihood, with k-2 it has no bias.

Data of known dimension: m orthonormal vectors B [m, D] by Gram-Schmidt, coefficients z ~ N(0, I_m),

    x = z B / |z B|,

which lie on a sphere of dimension m-1. A mixture of such subspaces has a LID that differs from
point to point; orders are descending or ascending in it, random, or class by class.

The rivals of an order are the other orders; that of the index is the exact search.
"""

import numpy as np
import torch

from .hnsw import HNSW
from .search import brute_force


def _each(draw, seeds):
    """Stack draw(generator) over seeds: what is drawn for a seed depends on that seed alone."""
    drawn = [draw(torch.Generator().manual_seed(seed)) for seed in seeds]
    if isinstance(drawn[0], tuple):
        return tuple(torch.stack(part) for part in zip(*drawn))
    return torch.stack(drawn)


def _normal(*shape, generator):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def unit(x):
    """Scale the vectors x [..., D] to length 1."""
    return x / x.norm(dim=-1, keepdim=True)


def _subspace(n, m, D, generator):
    if not 1 <= m <= D:
        raise ValueError(f"a subspace of R^{D} has a dimension in 1..{D}, not {m}")
    B = torch.linalg.qr(_normal(D, m, generator=generator)).Q.T  # Gram-Schmidt
    return unit(_normal(n, m, generator=generator) @ B)  # z B


def subspace(n, m, D, seeds):
    """Draw unit vectors of a random m-dimensional subspace of R^D: float64 [S, n, D]."""
    return _each(lambda g: _subspace(n, m, D, g), seeds)


def union(n, dims, D, seeds):
    """Draw unit vectors of several random subspaces in equal shares, mixed.

    Returns
    -------
    x : float64 [S, n, D]
    label : int64 [S, n]
        Number of the subspace.
    """

    def draw(g):
        label = torch.arange(n)[torch.randperm(n, generator=g)] % len(dims)
        each = torch.stack([_subspace(n, m, D, g) for m in dims])
        return each[label, torch.arange(n)], label

    return _each(draw, seeds)


def clusters(n, count, D, spread, seeds):
    """Draw Gaussian clusters in equal shares, of unequal spread, on the unit sphere.

    The spread of a cluster is log-uniform in the interval `spread`, relative to centers that are
    standard normal. Returns x [S, n, D] and the number of the cluster [S, n].
    """
    low, high = (float(np.log(v)) for v in spread)

    def draw(g):
        label = torch.arange(n)[torch.randperm(n, generator=g)] % count
        sigma = (low + (high - low) * torch.rand(count, generator=g, dtype=torch.float64)).exp()
        center = _normal(count, D, generator=g)
        return unit(center[label] + sigma[label, None] * _normal(n, D, generator=g)), label

    return _each(draw, seeds)


def retrieval(topics, per_topic, asked, m, noise, D, seeds):
    """Embed a retrieval benchmark by a synthetic model of dimension m.

    A topic is a point z ~ N(0, I_m); each of its documents and queries is that point plus
    noise * N(0, I_m), rotated into R^D and scaled to length 1. The more noise, the worse the model.

    Returns
    -------
    documents : float64 [S, topics * per_topic, D]
        Document i belongs to topic i % topics.
    queries : float64 [S, asked, topics, D]
        As many sets of queries as `asked`, one query for each topic.
    """

    def draw(g):
        B = torch.linalg.qr(_normal(D, m, generator=g)).Q.T
        z = _normal(topics, m, generator=g).repeat(asked + per_topic, 1)
        x = unit((z + noise * _normal(len(z), m, generator=g)) @ B)
        return x[asked * topics :], x[: asked * topics].unflatten(0, (asked, topics))

    return _each(draw, seeds)


def neighbor_distances(x, k, at=None):
    """Exact distances [n, k] from points of x [N, D] to their k nearest others, nearest first.

    Duplicates count once, so that no distance is zero.

    Parameters
    ----------
    x : Tensor [N, D]
    k : int
    at : Tensor [n, D], optional
        Some of the points; all of them if not given.

    Raises
    ------
    ValueError
        If there are not more than k distinct points.
    """
    x = x.double()
    distinct = torch.unique(x, dim=0)
    if not 2 <= k < len(distinct):
        raise ValueError(f"k must lie in 2..{len(distinct) - 1}, the distinct others, not {k}")
    rows = []
    for part in (x if at is None else at.double()).split(256):
        near = distinct[brute_force(distinct, part, k + 1)]
        # again as differences: a distance from a matrix product has no digits where it is small
        again = torch.cdist(part[:, None], near, compute_mode="donot_use_mm_for_euclid_dist")
        rows.append(again[:, 0].sort(1).values[:, 1:])
    return torch.cat(rows)


def lid(r, numerator=None):
    """Local intrinsic dimension [...] by maximum likelihood from distances r [..., k], sorted.

    Parameters
    ----------
    r : Tensor [..., k]
    numerator : float, optional
        k if not given, as in the formula of this module; k - 2 has no bias.

    Raises
    ------
    ValueError
        If a distance is not positive.
    """
    if not (r > 0).all():
        raise ValueError(f"{int((~(r > 0)).sum())} distances are not positive: remove duplicates")
    numerator = r.shape[-1] if numerator is None else numerator
    return -numerator / torch.log(r / r[..., -1:]).sum(-1)


ORDERS = ("descending LID", "ascending LID", "random", "by class", "rising class")


def insertion_order(kind, lids, label, seed):
    """Order of insertion [N] of elements with LID lids [N] and class label [N]: ids, first to last.

    Class by class every class comes in one piece, itself shuffled; the classes come at random, or
    by rising mean LID.

    Raises
    ------
    ValueError
        If kind is not one of `ORDERS`.
    """
    if kind not in ORDERS:
        raise ValueError(f"unknown order {kind!r}: use one of {', '.join(ORDERS)}")
    if kind == "descending LID":
        return lids.argsort(descending=True)
    if kind == "ascending LID":
        return lids.argsort()
    g = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(lids), generator=g)
    if kind == "random":
        return shuffled
    classes = int(label.max()) + 1
    if kind == "by class":
        key = torch.randperm(classes, generator=g)
    else:
        key = torch.stack([lids[label == c].mean() for c in range(classes)])
    return shuffled[key[label][shuffled].argsort(stable=True)]


class Ordered:
    """An HNSW index whose elements were inserted in a given order but keep their numbers.

    Levels belong to the place in the order: the i-th insertion gets the same level whatever the
    order, so that two orders build the same layers.

    Parameters
    ----------
    x : Tensor [N, D]
    order : Tensor [N]
        Ids, first to last.
    seed : int
        Of the levels.
    M, ef_construction : int
    """

    def __init__(self, x, order, seed, M=8, ef_construction=32):
        if not torch.equal(order.sort().values, torch.arange(len(x))):
            raise ValueError(f"order must hold each id 0..{len(x) - 1} once")
        self.order = order.numpy()
        self.index = HNSW(x.shape[1], M, ef_construction, seed=seed, dtype=np.float32)
        self.index.add(x.cpu()[order])

    def search(self, q, k, ef):
        """Ids int64 [Q, k] of the elements found, nearest first; -1 where none was reached."""
        place = self.index.search(q.cpu(), k, ef)[0]
        return torch.as_tensor(np.where(place < 0, -1, self.order[place]))

    def links(self):
        """All links of layer 0: ids (from, to), each int64 [number of links]."""
        g = self.index.graph
        used = np.arange(g.links.shape[1]) < g.degree[g.row][:, None]
        return np.repeat(self.order, used.sum(1)), self.order[g.links[g.row][used]]

    def in_degree(self):
        """Number of links that lead to each element on layer 0: int64 [N]."""
        return np.bincount(self.links()[1], minlength=len(self.order))

    def reachable(self):
        """Whether links of layer 0 lead to each element from one on layer 1 or the entry point.

        A search comes down to layer 0 at one of these; what no link leads to from any of them
        cannot be found, at any ef. bool [N].
        """
        g, (start, end) = self.index.graph, self.links()
        met = np.zeros(len(self.order), bool)
        met[self.order[g.level > 0]] = True
        met[self.order[g.state[0]]] = True
        while True:
            more = end[met[start] & ~met[end]]
            if len(more) == 0:
                return met
            met[more] = True


def ndcg(found, relevance):
    """Normalized discounted cumulative gain at k: [..., Q].

    DCG = sum_i relevance(i-th result) / log2(i + 1), over that of the best ranking.

    Parameters
    ----------
    found : int64 [..., Q, k]
        Ids, best first; -1 for no result, which gains nothing.
    relevance : Tensor [Q, N]
        Not negative; each query has something relevant.
    """
    relevance, k = relevance.double(), found.shape[-1]
    if not (relevance.amax(1) > 0).all():
        raise ValueError(f"{int((relevance.amax(1) <= 0).sum())} queries have nothing relevant")
    discount = torch.log2(torch.arange(k, dtype=torch.float64) + 2)
    gain = relevance[torch.arange(len(relevance))[:, None], found.clamp(min=0)] * (found >= 0)
    ideal = relevance.topk(k, dim=1).values
    return (gain / discount).sum(-1) / (ideal / discount).sum(-1)


def positions(scores):
    """Place of each model on a leaderboard, 0 the best: int64, like scores [..., models]."""
    return torch.as_tensor(scores).argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)


def swaps(a, b):
    """Number of pairs of models that scores a and b [..., models] order differently: [...]."""
    a, b = torch.as_tensor(a), torch.as_tensor(b)
    side_a, side_b = ((v[..., :, None] - v[..., None, :]).sign() for v in (a, b))
    return (side_a * side_b < 0).sum((-1, -2)) // 2
