"""Monotone submodular functions whose marginal gains are counted, greedy, and brute force.

A function f over elements 0..n-1 keeps what it needs to know of a set in a *state* tensor, so that
the gains of many elements with respect to one set are one tensor operation. What is charged is an
oracle query for each gain or value, as the papers count.
"""

from itertools import combinations

import torch


class _Function:
    """f(S) = sum over the columns of g(the best of the rows in S), rows [n, m]."""

    def __init__(self, rows, weights=None):
        if rows.ndim != 2 or (rows < 0).any():
            raise ValueError(f"needs a non-negative matrix [n, m], got {list(rows.shape)}")
        self.rows = rows
        self.weights = rows.new_ones(rows.shape[1]) if weights is None else weights
        self.n, self.queries = len(rows), 0

    def empty(self):
        """Return the state [m] of the empty set."""
        return torch.zeros_like(self.weights)

    def add(self, state, e):
        """Return the state of the set with element e (an int) added."""
        return torch.maximum(state, self.rows[e])

    def state(self, elements):
        """Return the state of a set, given as a list of elements."""
        return self.rows[list(elements)].max(0).values if len(elements) else self.empty()

    def value(self, state):
        """Return f of a set as a float: one query."""
        self.queries += 1
        return float(state @ self.weights)


class Coverage(_Function):
    """Weighted coverage: the weight of all items that some chosen set contains.

    Parameters
    ----------
    sets : torch.Tensor, shape [n, m]
        1 where set e contains item i, else 0.
    weights : torch.Tensor, shape [m], optional
        Default: 1 each.
    """

    def gains(self, state, elements):
        """Return f(S + e) - f(S) for elements [q] (a tensor): q queries."""
        self.queries += len(elements)
        return self.rows[elements] @ (self.weights * (1 - state))


class FacilityLocation(_Function):
    """f(S) = sum over customers i of the largest similarity to a chosen element.

    Parameters
    ----------
    similarity : torch.Tensor, shape [n, m]
        Non-negative; of element e and customer i.
    """

    def __init__(self, similarity):
        super().__init__(similarity)

    def gains(self, state, elements):
        """Return f(S + e) - f(S) for elements [q] (a tensor): q queries."""
        self.queries += len(elements)
        return (self.rows[elements] - state).clamp(min=0).sum(1)


def greedy(f, elements, k):
    """Choose k elements, each of largest gain (Nemhauser et al. 1978): within 1 - 1/e of the best.

    Parameters
    ----------
    f : Coverage or FacilityLocation
    elements : torch.Tensor of int, shape [q]
        Those that can be chosen.
    k : int

    Returns
    -------
    chosen : list of int
        At most k; fewer when nothing gains any more.
    value : float
    """
    state, chosen, total = f.empty(), [], 0.0
    for _ in range(min(k, len(elements))):
        gain, at = f.gains(state, elements).max(0)
        if gain <= 0:
            break
        chosen.append(int(elements[at]))
        state, total = f.add(state, chosen[-1]), total + float(gain)
    return chosen, total


def brute_force(f, elements, k):
    """Return the largest f over all subsets of at most k elements, by trying them all.

    Raises
    ------
    ValueError
        If there are more than 20 elements.
    """
    if len(elements) > 20:
        raise ValueError(f"brute force over {len(elements)} elements: use at most 20")
    elements = [int(e) for e in elements]
    size = min(k, len(elements))  # f is monotone
    return max(float(f.state(c) @ f.weights) for c in combinations(elements, size))
