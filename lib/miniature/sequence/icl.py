"""In-context linear regression: prompts, classical estimators, and a softmax transformer.

A *prompt* is a sequence of labeled examples (x_1, y_1), ..., (x_M, y_M) of one task w, followed by
an unlabeled query x_q. Tensors are ``x [..., M, d]``, ``y [..., M]``, ``w [..., d]``; every leading
axis (seeds, prompts) is a batch axis. Estimators that read a prompt through its moments

    S = (1/M) sum_i x_i x_iᵀ,        z = (1/M) sum_i y_i x_i

take ``S [..., d, d]`` and ``z [..., d]`` and return the weight vector they predict with; for these
the risk over the query is exact and never sampled.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Link(NamedTuple):
    """A label function y = f(w·x) and its best linear predictor for Gaussian x.

    With s² = wᵀΛw, the best linear predictor of f(w·x) is ``slope(s) * w`` (Stein's lemma: the
    slope is E f'(w·x)), and it leaves the mean squared error ``residual(s)``.
    """

    f: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]
    residual: Callable[[Tensor], Tensor]


LINKS = {
    "linear": Link(lambda t: t, torch.ones_like, torch.zeros_like),
    "relu": Link(torch.relu, lambda s: torch.full_like(s, 0.5), lambda s: s**2 / 4),
    "sign": Link(
        torch.sign,
        lambda s: math.sqrt(2 / math.pi) / s,
        lambda s: torch.full_like(s, 1 - 2 / math.pi),
    ),
}


def _link(name: str) -> Link:
    if name not in LINKS:
        raise ValueError(f"link must be one of {', '.join(LINKS)}, got {name!r}")
    return LINKS[name]


def covariance(d: int, ratio: float, *, device=None, dtype=torch.float64) -> Tensor:
    """Diagonal covariance [d, d] with eigenvalues falling geometrically from 1 to ``1 / ratio``.

    Raises
    ------
    ValueError
        If ``d < 1`` or ``ratio < 1``.
    """
    if d < 1 or ratio < 1:
        raise ValueError(f"covariance needs d >= 1 and ratio >= 1, got d={d}, ratio={ratio}")
    return torch.diag(torch.logspace(0, -math.log10(ratio), d, device=device, dtype=dtype))


def exponential_covariances(n: int, d: int, generator: torch.Generator, dtype=torch.float64):
    """``n`` random diagonal covariances [n, d, d] with independent Exponential(1) eigenvalues."""
    eigenvalues = torch.empty(n, d, device=generator.device, dtype=dtype)
    return torch.diag_embed(eigenvalues.exponential_(generator=generator))


def tasks(n: int, d: int, generator: torch.Generator, dtype=torch.float64) -> Tensor:
    """``n`` task vectors w ~ N(0, I_d), [n, d]."""
    return torch.randn(n, d, generator=generator, device=generator.device, dtype=dtype)


def prompts(
    w: Tensor,
    cov: Tensor,
    length: int,
    generator: torch.Generator,
    *,
    noise: float = 0.0,
    link: str = "linear",
) -> tuple[Tensor, Tensor]:
    """Sample one prompt per task: x_i ~ N(0, cov), y_i = link(w·x_i) + noise * N(0, 1).

    Parameters
    ----------
    w : Tensor [n, d]
        Tasks; dtype and device of the result.
    cov : Tensor [d, d] or [n, d, d]
        Covariance of the inputs, shared or one per prompt.
    length : int
        Number M of examples. To sample queries too, ask for more and split them off.
    noise : float
        Standard deviation of the label noise.
    link : {"linear", "relu", "sign"}

    Returns
    -------
    x : Tensor [n, length, d]
    y : Tensor [n, length]

    Raises
    ------
    ValueError
        If the shapes do not fit, ``length < 1``, ``noise < 0`` or the link is unknown.
    """
    n, d = w.shape
    if cov.shape not in ((d, d), (n, d, d)):
        raise ValueError(
            f"cov must be [{d}, {d}] or [{n}, {d}, {d}] for w {list(w.shape)}, "
            f"got {list(cov.shape)}"
        )
    if length < 1 or noise < 0:
        raise ValueError(f"prompts need length >= 1 and noise >= 0, got {length} and {noise}")
    label = _link(link).f
    like = dict(generator=generator, device=w.device, dtype=w.dtype)
    x = torch.randn(n, length, d, **like) @ torch.linalg.cholesky(cov).mT
    y = label((x @ w[:, :, None]).squeeze(-1))
    if noise:
        y = y + noise * torch.randn(n, length, **like)
    return x, y


def moments(w: Tensor, cov: Tensor, lengths, generator: torch.Generator, **labels):
    """Moments S and z of the prefixes of one long prompt per task, without keeping the prompt.

    Parameters
    ----------
    w, cov, generator
        As in `prompts`; ``labels`` are its ``noise`` and ``link``.
    lengths : increasing sequence of int
        Prefix lengths M at which the moments are returned.

    Returns
    -------
    S : Tensor [len(lengths), n, d, d]
        (1/M) sum_i x_i x_iᵀ.
    z : Tensor [len(lengths), n, d]
        (1/M) sum_i y_i x_i.

    Raises
    ------
    ValueError
        If ``lengths`` does not increase from at least 1.
    """
    if not lengths or any(b <= a for a, b in zip([0, *lengths], lengths)):
        raise ValueError(f"lengths must be increasing positive integers, got {list(lengths)}")
    second = first = 0.0
    S, z = [], []
    for start, stop in zip([0, *lengths], lengths):
        x, y = prompts(w, cov, stop - start, generator, **labels)
        second = second + x.mT @ x
        first = first + (x.mT @ y[..., None]).squeeze(-1)
        S.append(second / stop)
        z.append(first / stop)
    return torch.stack(S), torch.stack(z)


def embed(x: Tensor, y: Tensor, x_query: Tensor) -> Tensor:
    """The prompt matrix E = [[x_1 ... x_M, x_q], [y_1 ... y_M, 0]].

    Parameters
    ----------
    x : Tensor [..., M, d]
    y : Tensor [..., M]
    x_query : Tensor [..., d]

    Returns
    -------
    Tensor [..., d + 1, M + 1]

    Raises
    ------
    ValueError
        If the three shapes do not belong to one batch of prompts.
    """
    if y.shape != x.shape[:-1] or x_query.shape != (*x.shape[:-2], x.shape[-1]):
        raise ValueError(
            "embed needs x [..., M, d], y [..., M], x_query [..., d], got "
            f"{list(x.shape)}, {list(y.shape)}, {list(x_query.shape)}"
        )
    inputs = torch.cat([x, x_query.unsqueeze(-2)], -2)
    labels = torch.cat([y, torch.zeros_like(y[..., :1])], -1)
    return torch.cat([inputs, labels.unsqueeze(-1)], -1).mT


def ols(S: Tensor, z: Tensor) -> Tensor:
    """Least squares from prompt moments (minimum norm when the prompt is shorter than d)."""
    return (torch.linalg.pinv(S, rtol=1e-10, hermitian=True) @ z[..., None]).squeeze(-1)


def ridge(S: Tensor, z: Tensor, alpha: float | Tensor) -> Tensor:
    """Ridge regression argmin (1/M) sum_i (w·x_i - y_i)² + alpha |w|², from prompt moments."""
    eye = torch.eye(S.shape[-1], dtype=S.dtype, device=S.device)
    return torch.linalg.solve(S + alpha * eye, z)


def linear_readout(A: Tensor, z: Tensor) -> Tensor:
    """Weights Aᵀz: one step of gradient descent from zero, preconditioned by A [..., d, d]."""
    return (A.mT @ z[..., None]).squeeze(-1)


def best_linear(w: Tensor, cov: Tensor, link: str = "linear") -> tuple[Tensor, Tensor]:
    """Best linear predictor of the labels of `prompts`, and the error it leaves (without noise).

    Returns
    -------
    a : Tensor [..., d]
        argmin_a E (a·x - f(w·x))².
    residual : Tensor [...]
        The minimum.
    """
    s = torch.einsum("...i,...ij,...j->...", w, cov, w).sqrt()
    _, slope, residual = _link(link)
    return slope(s)[..., None] * w, residual(s)


def excess_risk(w_hat: Tensor, a: Tensor, cov: Tensor) -> Tensor:
    """(ŵ - a)ᵀ cov (ŵ - a): error of ŵ over queries x ~ N(0, cov), above that of a."""
    gap = w_hat - a
    return torch.einsum("...i,...ij,...j->...", gap, cov, gap)


class _Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, t: Tensor, mask: Tensor) -> Tensor:
        B, T, width = t.shape
        qkv = self.qkv(self.norm1(t)).view(B, T, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        weights = (q @ k.mT / math.sqrt(width // self.heads) + mask).softmax(-1)
        t = t + self.proj((weights @ v).transpose(1, 2).reshape(B, T, width))
        return t + self.down(nn.functional.gelu(self.up(self.norm2(t))))


class RegressionTransformer(nn.Module):
    """A pre-norm softmax transformer that predicts each label of a prompt from the examples before.

    Tokens are the columns of the prompt matrix: (x_i, y_i) for an example, (x_j, 0) for a query,
    with one more coordinate that marks queries. The prompt is laid out as n examples followed by n
    queries, and query j attends to itself and to the examples before j, so one pass trains on all
    lengths 0..n-1. There is no positional embedding: the examples of a prompt have no order.

    Parameters
    ----------
    d : int
        Input dimension.
    width, layers, heads : int
        Model size; the MLP is twice as wide as the model.

    Raises
    ------
    ValueError
        If ``width`` is not a multiple of ``heads``.
    """

    def __init__(self, d: int, width: int = 32, layers: int = 2, heads: int = 2):
        super().__init__()
        if width % heads:
            raise ValueError(f"width must be a multiple of heads, got {width} and {heads}")
        self.read = nn.Linear(d + 2, width)
        self.blocks = nn.ModuleList(_Block(width, heads) for _ in range(layers))
        self.norm, self.write = nn.LayerNorm(width), nn.Linear(width, 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Predictions [B, n] of y [B, n] at x [B, n, d]; prediction j sees y_0..y_{j-1} only."""
        n = x.shape[1]
        zero, one = torch.zeros_like(y), torch.ones_like(y)
        examples = torch.cat([x, torch.stack([y, zero], -1)], -1)
        queries = torch.cat([x, torch.stack([zero, one], -1)], -1)
        causal = torch.ones(n, n, dtype=torch.bool, device=x.device).tril()
        own = torch.eye(n, dtype=torch.bool, device=x.device)
        seen = torch.cat(
            [torch.cat([causal, causal & False], 1), torch.cat([causal & ~own, own], 1)]
        )
        mask = torch.where(seen, 0.0, -1e9).to(x.dtype)
        t = self.read(torch.cat([examples, queries], 1))
        for block in self.blocks:
            t = block(t, mask)
        return self.write(self.norm(t[:, n:])).squeeze(-1)
