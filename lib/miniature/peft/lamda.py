r"""LaMDA: a small square matrix between two frozen projections.

Azizi, Kundu and Pedram, "LaMDA: Large Model Fine-Tuning via Spectrally Decomposed Low-Dimensional
Adaptation", Findings of EMNLP 2024, arXiv:2406.12832; details from the authors' code.

    y = W0 x + s B S A x,   A [r, n] frozen, S [r, r] trained, B [m, r] trained for a while.

With W0 = U Sigma V', A = V_r' and B = U_r. With g = dL/dy and z = A x the backward pass is

    dL/dS = s (B'g) z',    dL/dB = s g (S z)',    dL/dx = W0'g + s A'S'B'g.

The one idea: as A is frozen, nothing of the width of the layer is kept for the adapter, only z and
S z, r numbers a token each; and once B is frozen too, only r^2 numbers a matrix are trained.

B freezes column by column, in the order of the singular values, over a fraction eta of the T steps:
at step t + 1 the first floor(r t / (eta T)) columns stay what they are.

LaMDA++ gives layers different ranks without a training signal. With the normalized energy

    e_l(k) = sum_{i <= k} sigma_i^2 / sum_i sigma_i^2

of every pretrained weight, layers of which k directions capture little (a flat spectrum) get more.

What the paper leaves open is marked: the start of S (`start=`), and the score and the ranks of
LaMDA++ (`allocate`). Rivals: LoRA-FA, A frozen and B trained (`LoRAFA`); LoRA-XS, which is eta = 0
but for the singular values: it puts them into B.
"""

import torch

from .baselines import LoRA, svd
from .engine import LowRank, positive

STARTS = ("residual", "zero", "lora")
SCHEDULES = ("columns", "released")


class Path(torch.autograd.Function):
    """B S A x with its backward pass written out; also returns what it keeps, A x and S A x."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, A, S, B):
        z = x @ A.mT
        Sz = z @ S.mT
        return Sz @ B.mT, z, Sz

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, A, S, B = inputs
        _, z, Sz = output
        ctx.mark_non_differentiable(z, Sz)
        ctx.save_for_backward(A, S, B, z, Sz if ctx.needs_input_grad[3] else None)

    @staticmethod
    def backward(ctx, g, *_):
        A, S, B, z, Sz = ctx.saved_tensors
        Bg = g @ B  # rows are tokens, so that g B is B'g
        by_x = Bg @ S @ A if ctx.needs_input_grad[0] else None
        by_S = Bg.flatten(0, -2).mT @ z.flatten(0, -2)
        by_B = None if Sz is None else g.flatten(0, -2).mT @ Sz.flatten(0, -2)
        return by_x, None, by_S, by_B


class LaMDA(LowRank):
    """Train S [r, r] between frozen frames, and the left frame B for a while.

    Parameters
    ----------
    rank : int
        r, at most min(m, n) in each layer.
    alpha : float, optional
        s = alpha / r. Default: r, so that s = 1.
    eta : float or sequence of float
        Share of the steps after which B is frozen; 0 never trains B, infinity never freezes it.
        One for all, or one (not 0) per copy of a stack.
    steps : int
        T.
    start : {"residual", "zero", "lora"}
        Singular vectors, with S = Sigma_r / s and W0 - U_r Sigma_r V_r' for W0 (the default), or
        with S = 0; the paper leaves S open. Or as in the authors' code, which wraps LoRA: A random,
        B zero, S uniform within 1 / sqrt(r), in bfloat16. All start at W0.
    schedule : {"columns", "released"}
        r t / (eta T) columns are frozen after t steps, or t / (eta T) as in the authors' code,
        which forgets r: no column before eta T steps, and 1 / eta of them at the end.
    targets : sequence of str, optional
    """

    def __init__(
        self,
        rank=8,
        alpha=None,
        eta=0.3,
        steps=1000,
        start="residual",
        schedule="columns",
        targets=None,
    ):
        super().__init__(targets)
        positive(rank=rank)
        if steps < 1:
            raise ValueError(f"steps must be a positive number, not {steps}")
        if start not in STARTS:
            raise ValueError(f"start must be one of {', '.join(STARTS)}, not {start!r}")
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, not {schedule!r}")
        self.eta = torch.as_tensor(eta, dtype=torch.float64)
        if (self.eta < 0).any() or (self.eta.ndim and (self.eta == 0).any()):
            raise ValueError(f"eta must be 0 or more, and above 0 where copies differ; got {eta}")
        self.rank, self.alpha, self.steps = rank, alpha, steps
        self.start, self.schedule = start, schedule

    def rank_of(self, layer):
        """Return r of a layer."""
        return min(self.rank, layer.m, layer.n)

    def init(self, layer):
        r, W = self.rank_of(layer), layer.base.weight.flatten(1)
        s = (r if self.alpha is None else self.alpha) / r
        if self.start == "lora":
            B, A = LoRA(r).initial(layer)
            S = torch.empty(r, r).uniform_(-(r**-0.5), r**-0.5).bfloat16()
        else:
            U, sigma, Vh = svd(W)
            B, A = U[:, :r], Vh[:r]
            S = torch.diag(sigma[:r] / s) if self.start == "residual" else U.new_zeros(r, r)
        layer.buffer("A", A)
        layer.parameter("S", S)
        if self.eta.ndim == 0 and self.eta == 0:
            layer.buffer("B", B)
        else:
            layer.parameter("B", B)
        layer.buffer("s", s)
        if self.start == "residual":
            layer.freeze(W.double() - s * B @ S @ A)

    def factors(self, layer):
        return layer.B, layer.S, layer.A

    def frozen(self, r, t):
        """Return how many of the r columns of B step t = 1, 2, ... leaves alone, [] or [N]."""
        share = (t - 1) / (self.eta * self.steps) if t > 1 else torch.zeros_like(self.eta)
        columns = r * share if self.schedule == "columns" else share
        return (columns + 1e-9).floor().clamp(max=r).where(self.eta > 0, r).long()

    def entries(self, m, r, t):
        """Return how many numbers of a layer step t trains, [] or [N]."""
        return r * r + m * (r - self.frozen(r, t))

    def update(self, params, grads, t):
        """Put the frozen columns of B back: momentum and decay move them without a gradient."""
        if t == 1:
            self.held = {}
        for layer, p in params.items():
            if "B" not in p:
                continue
            B = p["B"]
            if layer in self.held:
                column = torch.arange(B.shape[-1])
                stays = column < self.frozen(len(column), t)[..., None]  # [r] or [N, r]
                B.copy_(self.held[layer].where(stays[..., None, :].to(B.device), B))
            self.held[layer] = B.clone()


class LaMDAPlus(LaMDA):
    """LaMDA++: the rank of every layer from the spectrum of its pretrained weight.

    Parameters
    ----------
    rank, spread : int
        Layers get r + spread, r or r - spread, a third of them each, r on average.
    **options
        Of `LaMDA`.
    """

    def __init__(self, rank=8, spread=None, **options):
        super().__init__(rank, **options)
        self.spread = rank // 2 if spread is None else spread
        if not 0 <= self.spread < rank:
            raise ValueError(f"spread must lie in 0..{rank - 1}, not {self.spread}")

    def prepare(self, model, layers):
        spectra = [svd(layer.weight.flatten(1))[1] for layer in layers.values()]
        ranks = allocate(spectra, self.rank, self.spread)
        self.ranks = dict(zip(layers, ranks.tolist()))
        return layers

    def rank_of(self, layer):
        return min(self.ranks[layer.name], layer.m, layer.n)


class LoRAFA(LoRA):
    """LoRA with A frozen at its random start: B alone is trained (Zhang et al. 2023)."""

    def init(self, layer):
        super().init(layer)
        A = layer.A.detach()
        del layer.A
        layer.buffer("A", A)


def captured(sigma, k):
    """Return the normalized energy e(k) of singular values sigma [..., min(m, n)], [...]."""
    energy = sigma.square()
    return energy[..., :k].sum(-1) / energy.sum(-1)


def allocate(spectra, rank, spread):
    """Return the ranks of LaMDA++: r + spread for the flattest third of the layers, and so on.

    The score of a layer, e(r - spread) + e(r + spread), is what the two extreme ranks capture of
    it; the paper's own score is not known in more detail.

    Parameters
    ----------
    spectra : sequence of L torch.Tensor, shape [..., min(m, n)]
        Singular values of every layer, the largest first.
    rank, spread : int

    Returns
    -------
    torch.Tensor of int, shape [..., L]
        Their mean over the layers is `rank`.
    """
    low, high = rank - spread, rank + spread
    score = torch.stack([captured(s, low) + captured(s, high) for s in spectra], -1)
    place = score.argsort(dim=-1, stable=True).argsort(-1)  # 0 for the flattest
    third = (2 * place + 1) * 3 // (2 * len(spectra))  # an odd count: the mean comes out exactly
    return high - spread * third


def best(D, B, A):
    """Return the S that brings B S A closest to D, and the squared distance that remains.

    The least-squares solution, S = B^+ D A^+, is all that training S can reach: the exact floor
    of a linear layer with white inputs.

    Parameters
    ----------
    D, B, A : torch.Tensor, shapes [..., m, n], [..., m, r], [..., r, n]

    Returns
    -------
    S : torch.Tensor, shape [..., r, r]
    left : torch.Tensor, shape [...]
    """
    S = torch.linalg.pinv(B) @ D @ torch.linalg.pinv(A)
    return S, (D - B @ S @ A).square().sum((-2, -1))
