r"""MoS: low-rank factors put together from shards that all layers share.

Wang, Chen, Chen, Dong, Xue, Jiang, Kong and Wu, "MoS: Unleashing Parameter Efficiency of Low-Rank
Adaptation with Mixture of Shards", ICLR 2025, arXiv:2410.00938; details from the authors' code.

N layers of one kind (the same matrix in N blocks) have the budget of LoRA of rank e: two pools P_A,
P_B of e N l shards, of length n / l and m / l, so that l shards make one vector. Layer k builds

    A^k = rows [ P_A[I^k_i1] || ... || P_A[I^k_il] ],  i = 1..r,   A^k [r, n],   r > e,
    B^k = likewise, columns, from P_B and J^k,                      B^k [m, r],
    dW^k = (alpha / r) B^k A^k,

with frozen index matrices I^k, J^k [r, l]: of the r vectors the last p are private, made of shards
that belong to layer k alone (p <= e), and the others are drawn from the (e - p) N l public shards,
without replacement within a layer. P_A starts as LoRA's A, P_B at zero.

The one idea: sharing buys rank, but pure sharing makes the updates of all layers equal. What keeps
them apart costs nothing: a random subset for each layer (*subset selection*), I independent of J
(*pair dissociation*), l > 1 (*vector sharding*), p > 0 (*shard privatization*).

With p = e and l = 1 this is LoRA of rank e. Rivals: LoRA; `Sharing`, without any of the four,
and scaled at random; `TiedLoRA`, whose scales are trained; `PRoLoRA`, which shares within a layer.
"""

import math

import torch
from torch import nn

from .engine import LowRank


def vectors(pool, index):
    """Return vectors put together from shards.

    Parameters
    ----------
    pool : torch.Tensor, shape [V, n]
        V l shards, l in a row.
    index : torch.Tensor of int, shape [..., r, l]

    Returns
    -------
    torch.Tensor, shape [..., r, n]
    """
    shards = pool.reshape(-1, pool.shape[-1] // index.shape[-1])
    return shards.index_select(0, index.flatten()).view(*index.shape[:-1], -1)


class MoS(LowRank):
    """Mixture of shards: the equations above.

    Layers whose paths differ in numbers only, and whose weights have one shape, share two pools.

    Parameters
    ----------
    budget : int
        e: the pools hold as many numbers as LoRA of this rank trains.
    rank : int, optional
        r of every layer; at most p + (e - p) N, which is also the default: then nothing is left
        to select.
    shards : int
        l; where l divides not both m and n, their greatest common divisor with l.
    private : int
        p, of the e vectors that the budget gives a layer.
    dissociate : bool
        False draws A and B in pairs, J = I.
    alpha : float, optional
        The scale is alpha / r. Default: r, so that it is 1.
    targets : sequence of str, optional
    """

    def __init__(
        self,
        budget=2,
        rank=8,
        shards=2,
        private=1,
        dissociate=True,
        alpha=None,
        targets=None,
    ):
        super().__init__(targets)
        if budget < 1 or shards < 1:
            raise ValueError(f"budget and shards must be positive, not {budget} and {shards}")
        if not 0 <= private <= budget:
            raise ValueError(f"private must lie in 0..{budget} (the budget), not {private}")
        if rank is not None and rank < max(1, private):
            raise ValueError(f"rank must be at least {max(1, private)}, not {rank}")
        if private == budget and rank not in (None, budget):
            raise ValueError(
                f"with all {budget} vectors private the rank is {budget}, not {rank}: lower private"
            )
        self.budget, self.rank, self.shards, self.private = budget, rank, shards, private
        self.dissociate, self.alpha = dissociate, alpha

    def prepare(self, model, layers):
        self.kind, self.places, self.first = {}, {}, {}
        for path, layer in layers.items():
            words = [word for word in path.split(".") if not word.isdigit()]
            kind = (*words, *layer.weight.flatten(1).shape)
            self.kind[path] = kind
            self.places.setdefault(kind, []).append(path)
        return layers

    def route(self, k, N, l):
        """Return the indices [r, l] of layer k of N into one pool, drawn anew."""
        e, p = self.budget, self.private
        public = (e - p) * N
        r = p + public if self.rank is None else min(self.rank, p + public)
        drawn = torch.randperm(public * l)[: (r - p) * l]
        own = (public + k * p) * l + torch.arange(p * l)
        return torch.cat([drawn, own]).view(r, l)

    def init(self, layer):
        kind = self.kind[layer.name]
        places = self.places[kind]
        k, N = places.index(layer.name), len(places)
        if k == 0:
            A = torch.empty(self.budget * N, layer.n)
            nn.init.kaiming_uniform_(A, a=math.sqrt(5))
            layer.parameter("pool_A", A)
            layer.parameter("pool_B", torch.zeros(self.budget * N, layer.m))
            self.first[kind] = layer
        else:  # the same two parameters, not copies
            layer.register_parameter("pool_A", self.first[kind].pool_A)
            layer.register_parameter("pool_B", self.first[kind].pool_B)
        if k == N - 1:
            del self.first[kind]
        l = math.gcd(self.shards, layer.m, layer.n)
        I = self.route(k, N, l)
        J = self.route(k, N, l) if self.dissociate else I
        layer.buffer("I", I)
        layer.buffer("J", J)
        s = 1.0 if self.alpha is None else self.alpha / len(I)
        layer.buffer("s", s)

    def factors(self, layer):
        return vectors(layer.pool_B, layer.J).mT, vectors(layer.pool_A, layer.I)


class Sharing(MoS):
    """Pure sharing: every layer has the whole pool, e N pairs; perhaps scaled at random.

    Parameters
    ----------
    budget : int
    spread : float
        Every layer multiplies its pairs by frozen normal numbers of mean 1 and this standard
        deviation (the paper's random scaling). 0: all updates are equal.
    alpha : float, optional
    targets : sequence of str, optional
    """

    def __init__(self, budget=2, spread=0.0, alpha=None, targets=None):
        super().__init__(budget, None, 1, 0, False, alpha, targets)
        if spread < 0:
            raise ValueError(f"spread must not be negative, got {spread}")
        self.spread = spread

    def init(self, layer):
        super().init(layer)
        layer.buffer("scale", 1 + self.spread * torch.randn(len(layer.I)))

    def factors(self, layer):
        B, A = super().factors(layer)
        return B, layer.scale, A


class TiedLoRA(Sharing):
    """Tied-LoRA: diag(v) B diag(u) A, with A, B shared and u [r], v [m] trained in every layer.

    Renduchintala, Konuk and Kuchaiev, NAACL 2024. u and v start at one.
    """

    def __init__(self, budget=2, alpha=None, targets=None):
        super().__init__(budget, 0.0, alpha, targets)

    def init(self, layer):
        super().init(layer)
        layer.parameter("u", torch.ones(len(layer.I)))
        layer.parameter("v", torch.ones(layer.m))

    def factors(self, layer):
        B, _, A = super().factors(layer)
        return layer.v, B, layer.u, A


class PRoLoRA(LowRank):
    """Sharing within a layer: A = [A0 | rot A0 | ... | rot^(c-1) A0], with rows rotated; B alike.

    Wang et al., ACL 2024 (without its unshared ranks): r (m + n) / c numbers for rank r.

    Parameters
    ----------
    rank, chunks : int
        r and c; where c divides not both m and n, their greatest common divisor with c.
    targets : sequence of str, optional
    """

    def __init__(self, rank=8, chunks=4, targets=None):
        super().__init__(targets)
        if rank < 1 or chunks < 1:
            raise ValueError(f"rank and chunks must be positive, not {rank} and {chunks}")
        self.rank, self.chunks = rank, chunks

    def init(self, layer):
        c = math.gcd(self.chunks, layer.m, layer.n)
        bound = 1 / math.sqrt(layer.n)  # as in LoRA, whose vectors have length n
        layer.parameter("A0", torch.empty(self.rank, layer.n // c).uniform_(-bound, bound))
        layer.parameter("B0", torch.zeros(self.rank, layer.m // c))

    def factors(self, layer):
        c = layer.n // layer.A0.shape[-1]
        A, B = (torch.cat([v.roll(-j, 0) for j in range(c)], 1) for v in (layer.A0, layer.B0))
        return B.mT, A
