r"""PaCA: train some columns of the weight itself.

Woo, Namkung, Lee, Jeong, Kim and Jeon, "PaCA: Partial Connection Adaptation for Efficient
Fine-Tuning", ICLR 2025, arXiv:2503.01905; details from the authors' code.

Of the n input channels of a weight W0 [m, n], r are drawn once, the index set I. With
s = alpha / r,

    P = W0[:, I] / s  [m, r]   (trained),    W[:, I] = s P,    the other columns stay,
    y = W x,    dL/dx = W' g,    dL/dP = s g x_I',    g = dL/dy.

The one idea: the columns stand in the weight, so there is one product and no adapter beside it; and
their gradient needs only x_I, r numbers a token, where LoRA's A needs all of x. At the start
s P = W0[:, I]: nothing changes. A step of gradient descent lowers the loss as any step along a part
of the gradient does, L(t+1) <= L(t) - eta |dL/dP|^2 + O(eta^2), whatever I is.

AdamW moves P by about its rate, so the columns by s times that: alpha scales the rate.

QPaCA: the frozen rest is kept in four bits (`nf4`), the columns are not.

Rivals: rows in place of columns (`Rows`), which need all of x again; S2FT, which picks hidden
channels only, so that rows and columns can be permuted together: ``PaCA(targets=...)``.
"""

import time

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from .engine import Method, positive

ORDERS = {
    "random": lambda layer: torch.randperm(layer.n),
    "largest": lambda layer: layer.W.norm(dim=0).argsort(descending=True, stable=True),
    "smallest": lambda layer: layer.W.norm(dim=0).argsort(stable=True),
}


class PartialLinear(torch.autograd.Function):
    """y = W x + b, where the columns I of W are C = s P; keeps x_I for the backward pass, not x."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, W, C, idx, b):
        return F.linear(x, W, b)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, W, _, idx, _ = inputs
        ctx.save_for_backward(x.index_select(-1, idx), W)

    @staticmethod
    def backward(ctx, g):
        x_I, W = ctx.saved_tensors
        by_x = g @ W if ctx.needs_input_grad[0] else None
        by_C = g.reshape(-1, g.shape[-1]).T @ x_I.reshape(-1, x_I.shape[-1])
        return by_x, None, by_C, None, None


class PaCA(Method):
    """Train r columns of every weight.

    Parameters
    ----------
    rank : int
        r; a layer with fewer inputs is trained as a whole.
    alpha : float, optional
        s = alpha / r. Default: r, so that s = 1.
    select : {"random", "largest", "smallest"} or callable
        Which columns: at random, or by their norm; or the first r of ``select(layer)``, an order
        of the input channels.
    in_place : bool
        Write s P into one live weight before each forward pass and keep only x_I, as the paper
        does; the default makes the weight anew and leaves all to autograd. For a model by itself:
        copies in a `Stack` share their weights. A second forward pass before the backward pass is
        an error.
    store : callable, optional
        What the frozen rest is rounded to, such as `nf4`. Default: nothing is rounded.
    targets : sequence of str, optional
    """

    kinds = default = (nn.Linear,)

    def __init__(
        self, rank=8, alpha=None, select="random", in_place=False, store=None, targets=None
    ):
        super().__init__(targets)
        positive(rank=rank)
        if not callable(select) and select not in ORDERS:
            raise ValueError(f"select must be one of {', '.join(ORDERS)}, not {select!r}")
        self.rank, self.s = rank, (rank if alpha is None else alpha) / rank
        if self.s <= 0:
            raise ValueError(f"alpha must be positive, not {alpha}")
        self.select = select if callable(select) else ORDERS[select]
        self.in_place, self.store = in_place, store
        self.starts_at_base = store is None

    def init(self, layer):
        W = layer.W.detach()
        idx = self.select(layer)[: self.rank].to(W.device)
        if len(idx.unique()) < min(self.rank, layer.n):
            raise ValueError(
                f"select must give an order of the {layer.n} input channels of layer "
                f"{layer.name!r}; its first ones are {idx.tolist()}"
            )
        layer.buffer("idx", idx)
        layer.buffer("s", self.s)
        layer.parameter("P", W[:, idx] / self.s)
        if self.store or self.in_place:
            layer.freeze((self.store or torch.clone)(W))

    def delta(self, layer):
        W = layer.W
        change = layer.s * layer.P - W[:, layer.idx]
        return torch.zeros_like(W).scatter(1, layer.idx.expand(change.shape), change)

    def forward(self, layer, x):
        C, bias = layer.s * layer.P, layer.base.bias
        if not self.in_place:  # autograd finds the gradient of all columns, and takes those of I
            return F.linear(x, layer.W.scatter(1, layer.idx.expand(C.shape), C), bias)
        with torch.no_grad():
            layer.frozen.index_copy_(1, layer.idx, C)
        return PartialLinear.apply(x, layer.frozen, C, layer.idx, bias)


class Rows(Method):
    """Train r rows of every weight: r output channels, whose gradient needs all of x.

    Parameters
    ----------
    rank : int
        r; a layer with fewer outputs is trained as a whole.
    targets : sequence of str, optional
    """

    kinds = default = (nn.Linear,)

    def __init__(self, rank=8, targets=None):
        super().__init__(targets)
        positive(rank=rank)
        self.rank = rank

    def init(self, layer):
        idx = torch.randperm(layer.m)[: self.rank].to(layer.W.device)
        layer.buffer("idx", idx)
        layer.parameter("P", layer.W[idx])

    def delta(self, layer):
        W = layer.W
        change = layer.P - W[layer.idx]
        return torch.zeros_like(W).scatter(0, layer.idx[:, None].expand(change.shape), change)


# Levels of NormalFloat in four bits: quantiles of the normal law, scaled to [-1, 1], with a zero
# (Dettmers et al., QLoRA, NeurIPS 2023, Appendix E).
NF4 = (
    *(-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0),
    *(0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0),
)


def nf4(W, block=64):
    """Round a weight to sixteen levels, scaled in blocks by their largest entry.

    Parameters
    ----------
    W : torch.Tensor, shape [m, n]
    block : int
        Numbers a block, in rows; the last one may be shorter.

    Returns
    -------
    torch.Tensor, shape [m, n]
        The rounded weight, in the type of W.
    """
    flat = W.flatten()
    blocks = F.pad(flat, (0, -len(flat) % block)).view(-1, block)
    scale = blocks.abs().amax(1, keepdim=True).clamp(min=torch.finfo(W.dtype).tiny)
    levels = torch.tensor(NF4, dtype=W.dtype, device=W.device)
    middle = (levels[1:] + levels[:-1]) / 2
    rounded = levels[torch.bucketize(blocks / scale, middle)] * scale
    return rounded.flatten()[: len(flat)].view_as(W)


class Kernels(TorchDispatchMode):
    """Record the operations that are run, but for those that only look at memory otherwise.

    Attributes
    ----------
    calls : list of tuple (str, float, float)
        Name, start and end of each, in seconds; on a GPU, when it was launched.
    """

    def __init__(self):
        super().__init__()
        self.calls = []

    @classmethod
    def _should_skip_dynamo(cls):
        return False  # else torch imports its compiler, which takes more than a second

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        start = time.perf_counter()
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not func.is_view and name not in ("_unsafe_view", "detach"):
            self.calls.append((name, start, time.perf_counter()))
        return out

    def products(self):
        """Return the number of matrix products."""
        return sum(name in ("mm", "addmm", "bmm", "baddbmm") for name, _, _ in self.calls)
