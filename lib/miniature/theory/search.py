"""Nearest-neighbor search: the exact answer, recall, and classical indexes that count distances.

Cost is counted in distance evaluations, one per (query, element) pair, so that it does not depend
on the machine. All points are rows of a tensor, all distances Euclidean.

Sources: kd-tree, Friedman, Bentley and Finkel 1977, searched best bin first within a budget, Beis
and Lowe 1997; hashing by the signs of random projections, Charikar 2002, with the buckets probed in
the order of Lv et al. 2007 (query-directed multi-probe).
"""

import numpy as np
import torch


def distances(x, q):
    """Distances [Q, N] of queries q [Q, d] to x [N, d], without the cancellation of a product."""
    return torch.cdist(q, x, compute_mode="donot_use_mm_for_euclid_dist")


def brute_force(x, q, k):
    """Ids [Q, k] of the k points of x nearest to each query, nearest first: N evaluations each."""
    x, q = x.double(), q.double()  # wide enough for distances from a matrix product
    found = [torch.cdist(part, x).topk(k, largest=False).indices for part in q.split(256)]
    return torch.cat(found)


def recall(found, truth):
    """Share of the true neighbors that were found: [Q], for ids found [Q, k] and truth [Q, k]."""
    found, truth = torch.as_tensor(found), torch.as_tensor(truth).cpu()
    if found.shape != truth.shape:
        raise ValueError(f"found {list(found.shape)} and truth {list(truth.shape)} differ in shape")
    hits = (found.cpu()[:, :, None] == truth[:, None, :]).any(1)
    return hits.double().mean(1)


def evaluations_at(level, recalls, evaluations):
    """Evaluations [S] at which recall reaches a level, linear between the points of a curve.

    Parameters
    ----------
    level : float
        Recall asked for.
    recalls, evaluations : arrays [S, T]
        A curve per seed, along increasing effort.

    Returns
    -------
    float64 [S]
        At the first crossing; `inf` for a curve that never gets there, its first point for one that
        starts above.
    """
    out = []
    for r, e in zip(np.asarray(recalls, float), np.asarray(evaluations, float), strict=True):
        above = np.flatnonzero(r >= level)
        if len(above) == 0:
            out.append(np.inf)
            continue
        t = above[0]
        if t == 0:
            out.append(e[0])
            continue
        share = (level - r[t - 1]) / (r[t] - r[t - 1])
        out.append(e[t - 1] + share * (e[t] - e[t - 1]))
    return np.array(out)


def probe(x, q, k, score, checks):
    """Evaluate the points of lowest score, as many as each budget in `checks` allows.

    Parameters
    ----------
    x : Tensor [N, d]
    q : Tensor [Q, d]
    k : int
    score : Tensor [Q, N]
        The order in which a query looks at the points.
    checks : sequence of int
        Budgets T, each at least k.

    Returns
    -------
    ids, dist : Tensor [T, Q, k]
        The k nearest of the points looked at, nearest first, and how far they are.
    """
    if min(checks) < k or max(checks) > len(x):
        raise ValueError(f"every budget must lie in k..N = {k}..{len(x)}, not {list(checks)}")
    order = score.argsort(1)[:, : max(checks)]
    d = distances(x, q).gather(1, order)
    best = [d[:, :c].topk(k, largest=False) for c in checks]
    ids = torch.stack([order.gather(1, b.indices) for b in best])
    return ids, torch.stack([b.values for b in best])


class KDTree:
    """kd-tree: median splits along the widest coordinate, down to leaves of at most `leaf` points.

    Parameters
    ----------
    x : Tensor [N, d]
    leaf : int
    """

    def __init__(self, x, leaf=8):
        if leaf < 1:
            raise ValueError(f"a leaf must hold at least 1 point, not {leaf}")
        self.x = x
        points = x.cpu().numpy()
        inf = np.full(x.shape[1], np.inf, points.dtype)
        cells = [(np.arange(len(x)), -inf, inf)]  # points, lower and upper corner of the cell
        self.levels = []  # per level of the tree: axis, cut and the cell's extent along that axis
        while max(len(part) for part, _, _ in cells) > leaf:
            level, halves = [], []
            for part, low, high in cells:
                axis = np.ptp(points[part], 0).argmax()
                half = len(part) // 2
                order = part[points[part, axis].argpartition(half)]
                cut = points[order[half], axis]
                level.append((axis, cut, low[axis], high[axis]))
                left, right = high.copy(), low.copy()
                left[axis] = right[axis] = cut
                halves += [(order[:half], low, left), (order[half:], right, high)]
            axis, *rest = (torch.as_tensor(np.array(v)).to(x.device) for v in zip(*level))
            self.levels.append((axis, *rest))
            cells = halves
        self.leaf_of = torch.empty(len(x), dtype=torch.long, device=x.device)
        for i, (part, _, _) in enumerate(cells):
            self.leaf_of[part] = i

    def bounds(self, q):
        """Distances [Q, N] from queries q [Q, d] to the cells of the points.

        From a cell to its halves only the extent along one axis changes (Arya and Mount 1993), so a
        node costs one coordinate, not a distance.
        """

        def outside(low, z, high):
            return torch.maximum(low - z, z - high).clamp(min=0) ** 2

        squared = q.new_zeros(len(q), 1)
        for axis, cut, low, high in self.levels:
            z = q[:, axis]
            rest = squared - outside(low, z, high)
            halves = rest + outside(low, z, cut), rest + outside(cut, z, high)
            squared = torch.stack(halves, -1).flatten(1)
        return squared.clamp(min=0).sqrt()[:, self.leaf_of]

    def search(self, q, k, checks):
        """Best-first search within each budget; exact where the budget exceeds what it needs.

        A search that always opens the nearest leaf opens the leaves by increasing distance, and
        stops at the first that is not nearer than its k-th best point. So it evaluates the points
        in leaves nearer than the k-th best of its answer, or the budget if that is less, and all
        queries can be answered at once by sorting.

        Returns
        -------
        ids : Tensor [T, Q, k]
        evaluations : Tensor [T, Q]
        """
        bound = self.bounds(q)
        ids, dist = probe(self.x, q, k, bound, checks)
        needed = (bound < dist[:, :, -1:]).sum(-1)
        return ids, needed.minimum(torch.as_tensor(checks).to(needed)[:, None])


class LSH:
    """Locality-sensitive hashing by the signs of random projections, in several tables.

    Parameters
    ----------
    x : Tensor [N, d]
    tables, bits : int
        Every table cuts space by `bits` random hyperplanes, each through the middle of the data.
    seed : int
    """

    def __init__(self, x, tables=8, bits=8, seed=0):
        self.x = x
        rng = torch.Generator().manual_seed(seed)
        self.normal = torch.randn(tables, x.shape[1], bits, generator=rng, dtype=x.dtype).to(x)
        self.middle = (x @ self.normal).median(1, keepdim=True).values
        self.side = (x @ self.normal >= self.middle).to(x) * 2 - 1  # [tables, N, bits], +-1

    def search(self, q, k, checks):
        """Look through the buckets of all tables, most promising first, within each budget.

        The score of a bucket is the sum over the hyperplanes that part it from the query of the
        squared distance of the query to that hyperplane; a point is met in its best bucket. A
        projection on one of the tables x bits normals costs what a distance does, d products, and
        is counted as one.

        Returns
        -------
        ids : Tensor [T, Q, k]
        evaluations : Tensor [T, Q]
        """
        score = torch.full((len(q), len(self.x)), torch.inf, dtype=q.dtype, device=q.device)
        for normal, middle, side in zip(self.normal, self.middle, self.side, strict=True):
            margin = (q @ normal - middle) / normal.norm(dim=0)  # signed distance to the hyperplane
            apart = (margin**2).sum(1, keepdim=True) - (margin * margin.abs()) @ side.T
            score = score.minimum(apart / 2)
        ids, _ = probe(self.x, q, k, score, checks)
        projections = self.normal.shape[0] * self.normal.shape[2]
        cost = torch.as_tensor(checks, device=ids.device) + projections
        return ids, cost[:, None].expand(-1, len(q))
