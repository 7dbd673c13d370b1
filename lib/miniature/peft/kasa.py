r"""KaSA: cut the weakest singular directions of a weight, then learn an update in SVD form.

Wang, Jiang, Park, Kim and Tang, "KaSA: Knowledge-Aware Singular-Value Adaptation of Large Language
Models", ICLR 2025, arXiv:2412.06071; details from the authors' code.

With W0 = U S V' [m, n] and k = min(m, n), the frozen weight loses its r smallest components:

    W_world = sum_{i <= k - r} S_i u_i v_i',    W' = W_world + s B diag(sigma) A,    s = alpha / r,

B [m, r] zero, A [r, n] random and sigma [r] ~ N(0, 1) at the start, all trained. So the update
starts at zero, but the model at W_world and not at W0. The loss gains, with n_blk adapted layers,

    (1 / n_blk) (beta sum_l |sigma_l|^2 + gamma sum_l (|B_l' B_l - I|_F + |A_l A_l' - I|_F)).

The one idea: what the pretrained weight holds in its weakest directions is taken for noise and
removed, and the task decides by sigma which new directions are switched on.

The norms are not squared: their gradient keeps its size up to the minimum, so that a gamma which
is large enough makes the factors orthonormal exactly. The released code takes the Gram matrices the
other way round, |B B' - I_m|_F and |A' A - I_n|_F. For X [d, r]

    |X X' - I_d|_F^2 = |X' X - I_r|_F^2 + d - r,

which has the same minimum, but a smooth one: its pull fades as the factors become orthonormal. It
also keeps the first n - r components, whatever m is: a layer with n >= m + r loses nothing.

Rivals: `MiLoRA`, which trains the weakest components instead of cutting them, and `Triplet`, which
is AdaLoRA without its pruning. (PiSSA, LoRA and full fine-tuning are in `baselines`.)
"""

import math

import torch
from torch import nn

from .baselines import PiSSA, svd
from .engine import LowRank, positive


class KaSA(LowRank):
    """Truncated weight, update in SVD form, and penalties on its singular values and factors.

    Parameters
    ----------
    rank : int
        r, both of the cut and of the update; smaller than both sides of every adapted weight.
    alpha : float, optional
        s = alpha / r. Default: r, so that s = 1.
    beta, gamma : float
        Weights of the singular values and of the orthogonality in the loss.
    truncate : bool
        False: the frozen weight stays W0.
    diagonal : bool
        False: sigma = 1, not trained.
    released : bool
        Cut and penalize as the authors' code does (see above).
    targets : sequence of str, optional

    Raises
    ------
    ValueError
        If the rank is not positive, or a penalty is negative; by `attach`, if the rank is not
        smaller than min(m, n) of a layer.
    """

    kinds = (nn.Linear, nn.Conv2d)
    default = (nn.Linear,)
    starts_at_base = False

    def __init__(
        self,
        rank=8,
        alpha=None,
        beta=1e-4,
        gamma=1e-3,
        truncate=True,
        diagonal=True,
        released=False,
        targets=None,
    ):
        super().__init__(targets)
        positive(rank=rank)
        for name, value in (("beta", beta), ("gamma", gamma)):
            if value < 0:
                raise ValueError(f"{name} must be zero or positive, not {value}")
        self.rank, self.s = rank, (rank if alpha is None else alpha) / rank
        self.beta, self.gamma = beta, gamma
        self.truncate, self.diagonal, self.released = truncate, diagonal, released
        self.starts_at_base = not truncate

    def world(self, W):
        """Return W_world [m, n] in float64 for a weight W [m, n]."""
        U, S, Vh = svd(W)
        keep = (W.shape[1] if self.released else len(S)) - self.rank
        return (U[:, :keep] * S[:keep]) @ Vh[:keep]

    def initial(self, layer):
        """Return B [m, r], sigma [r] and A [r, n] to start from."""
        A = torch.empty(self.rank, layer.n)
        nn.init.kaiming_uniform_(A, a=math.sqrt(5))
        sigma = torch.randn(self.rank) if self.diagonal else torch.ones(self.rank)
        return torch.zeros(layer.m, self.rank), sigma, A

    def init(self, layer):
        if self.rank >= min(layer.m, layer.n):
            raise ValueError(
                f"rank must be smaller than both sides of the weight [{layer.m}, {layer.n}] of "
                f"layer {layer.name!r}, not {self.rank}: nothing would be left of it"
            )
        if self.truncate:
            layer.freeze(self.world(layer.base.weight.flatten(1)))
        B, sigma, A = self.initial(layer)
        layer.parameter("A", A)
        layer.parameter("B", B)
        (layer.parameter if self.diagonal else layer.buffer)("sigma", sigma)
        layer.buffer("s", self.s)

    def factors(self, layer):
        return layer.B, layer.sigma, layer.A

    def penalty(self, params, beta=None, gamma=None):
        """Return what is added to the loss.

        Parameters
        ----------
        params : dict of dict of torch.Tensor
            By layer and name, of one model.
        beta, gamma : scalar torch.Tensor or float, optional
            In place of the method's own: copies in a stack may then differ in them.
        """
        beta = self.beta if beta is None else beta
        gamma = self.gamma if gamma is None else gamma
        blocks = [p for p in params.values() if {"A", "B"} <= p.keys()]
        size = sum(p["sigma"].square().sum() for p in blocks) if self.diagonal else 0.0
        skew = sum(self.skew(p["B"]) + self.skew(p["A"].mT) for p in blocks)
        return (beta * size + gamma * skew) / len(blocks)

    def skew(self, X):
        """Return |X'X - I_r|_F of a factor X [d, r], or |XX' - I_d|_F as released."""
        d, r = X.shape
        gap = X.mT @ X - torch.eye(r, dtype=X.dtype, device=X.device)
        if self.released:
            return (gap.square().sum() + (d - r)).sqrt()
        return torch.linalg.vector_norm(gap)


class Triplet(KaSA):
    """AdaLoRA without pruning (Zhang et al., ICLR 2023): W0 + s P diag(lambda) Q.

    P and Q start as noise of standard deviation 0.02, lambda at zero; the penalty is gamma on the
    orthogonality of P and Q alone. Named B, sigma and A here, as in KaSA.
    """

    starts_at_base = True

    def __init__(self, rank=8, alpha=None, gamma=1e-3, targets=None):
        super().__init__(rank, alpha, 0.0, gamma, truncate=False, targets=targets)

    def initial(self, layer):
        P, Q = 0.02 * torch.randn(layer.m, self.rank), 0.02 * torch.randn(self.rank, layer.n)
        return P, torch.zeros(self.rank), Q


class MiLoRA(PiSSA):
    """LoRA that starts from the smallest r singular directions (Wang et al., arXiv:2406.09044).

    As PiSSA, with the other end of the spectrum: nothing changes at the start, and what the update
    overwrites is the weakest part of the weight.
    """

    def initial(self, layer):
        U, S, Vh = svd(layer.W)
        root = (S[-self.rank :] / self.s).sqrt()
        return U[:, -self.rank :] * root, root[:, None] * Vh[-self.rank :]
