r"""RandLoRA: a full-rank update with as many trained numbers as LoRA.

Albert, Zhang, Saratchandran, Rodriguez-Opazo, van den Hengel and Abbasnejad, "RandLoRA: Full-rank
parameter-efficient fine-tuning of large models", ICLR 2025, arXiv:2502.00987; details from the
authors' code.

For a weight W0 [m, n] let D = max(m, n), d = min(m, n) and N = ceil(d / r). Where m >= n

    W' = W0 + (alpha / r) sum_{j=1..N} B_j Lambda_j A Gamma_j,
    B_j [D, r], A [r, d] frozen and random,  Lambda_j = diag(lambda_j), lambda_j [r] trained from 0,
    Gamma_j = diag(gamma_j), gamma_j [d] trained from 1 / max(N, d),

and the sum is transposed where m < n. One A and one list of B_j serve all terms and all layers,
drawn at the largest size and cut to each layer, with entries of standard deviation 1.

The one idea: LoRA trains its factors, so that every number that it trains buys rank. Random
factors cost nothing to store (a seed gives them), so enough of them to fill every dimension can be
summed, and only their diagonals are trained: N (r + d) numbers, about d + d^2 / r, for rank d. A
larger r makes *fewer* terms and fewer numbers.

Rivals: LoRA, whose rank is r; VeRA, a single term whose second diagonal is on the large side.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

from .engine import LowRank, positive

ENTRIES = ("dense", "sparse", "very sparse")


def terms(A, lam, gamma):
    """Return the stack of Lambda_j A Gamma_j, [N, r, d], for A [r, d], lambda [N, r], gamma [N, d].

    The diagonals are multiplied first: for the backward pass autograd then keeps them and A, which
    is there anyway, and no stack.
    """
    return lam[:, :, None] * gamma[:, None, :] * A


def pullback(A, lam, gamma, G):
    """Return the gradients of lambda and gamma for that of the stack, G [N, r, d].

    The backward pass that the paper writes by hand, to keep no stack.
    """
    GA = G * A
    return torch.einsum("jkv,jv->jk", GA, gamma), torch.einsum("jkv,jk->jv", GA, lam)


class RandLoRA(LowRank):
    """Trained diagonals on both sides of A, summed over N random B_j.

    Parameters
    ----------
    rank : int
        r, of each term.
    alpha : float, optional
        The scale is alpha / r. Default: 20 r.
    terms : int, optional
        Sum this many terms, n, in place of N (no layer has more than its N): the rank is n r at
        most.
    room : bool
        Allocate all N terms, of which those beyond `terms` are zero and, having zero gradients,
        stay so: copies with different `terms` then fit into one stack.
    entries : {"dense", "sparse", "very sparse"}
        Of A and B_j: uniform; or -1 and 1 with probability 1 / (2 s) each and 0 otherwise, with
        s = 3, or s = sqrt(d) of the largest layer. All are divided by their standard deviation.
    targets : sequence of str, optional

    Raises
    ------
    ValueError
        If rank or terms are not positive, or the entries have another name.
    """

    def __init__(self, rank=32, alpha=None, terms=None, room=False, entries="dense", targets=None):
        super().__init__(targets)
        positive(rank=rank)
        if terms is not None:
            positive(terms=terms)
        if entries not in ENTRIES:
            raise ValueError(f"entries must be one of {', '.join(ENTRIES)}, not {entries!r}")
        self.rank, self.s = rank, 20.0 if alpha is None else alpha / rank
        self.terms, self.room, self.entries = terms, room, entries

    def prepare(self, model, layers):
        sizes = [layer.weight.flatten(1).shape for layer in layers.values()]
        most = [max(column) for column in zip(*sizes)]
        D, d = max(most), min(most)
        N = math.ceil(d / self.rank)
        like = next(iter(layers.values())).weight
        self.A = self.draw((self.rank, d), d).to(like)
        self.B = self.draw((D, N * self.rank), d).to(like)  # column j r + k is column k of B_j
        return layers

    def draw(self, shape, d):
        """Return frozen entries of standard deviation 1, float64."""
        X = torch.empty(shape, dtype=torch.float64)
        if self.entries == "dense":
            nn.init.kaiming_uniform_(X, a=math.sqrt(5))
        else:
            s = 3.0 if self.entries == "sparse" else math.sqrt(d)
            X = torch.rand(shape, dtype=torch.float64)
            X = (X > 1 - 1 / (2 * s)).double() - (X < 1 / (2 * s)).double()
        return X / X.std()

    def init(self, layer):
        d = min(layer.m, layer.n)
        N = math.ceil(d / self.rank)
        n = min(N, self.terms or N)
        gamma = torch.full((n, d), 1 / max(N, d), dtype=torch.float64)
        layer.register_buffer("shared_A", self.A)
        layer.register_buffer("shared_B", self.B)
        layer.parameter("lam", torch.zeros(N if self.room else n, self.rank))
        layer.parameter("gamma", F.pad(gamma, (0, 0, 0, N - n)) if self.room else gamma)
        layer.buffer("s", float(self.s))

    def factors(self, layer):
        """Return [m, N r] and [N r, n] whose product is the sum of the terms."""
        d, D = sorted((layer.m, layer.n))
        stack = terms(layer.shared_A[:, :d], layer.lam, layer.gamma).flatten(0, 1)
        B = layer.shared_B[:D, : len(stack)]
        return (B, stack) if layer.m >= layer.n else (stack.T, B.T)
