"""What the papers compare with: full fine-tuning, BitFit, LoRA and its kin, adapters, prompts."""

import math

import torch
from torch import nn
from torch.nn import functional as F

from ..models.gpt import GPT, Attention
from .engine import LowRank, Method, positive


class Full(Method):
    """Full fine-tuning of the targeted layers: W0 + D, b0 + d, with D and d trained from zero."""

    def init(self, layer):
        layer.parameter("D", torch.zeros_like(layer.W))
        if getattr(layer.base, "bias", None) is not None:
            layer.parameter("d", torch.zeros_like(layer.base.bias))

    def delta(self, layer):
        return layer.D

    def bias(self, layer):
        return layer._parameters.get("d")


class BitFit(Method):
    """Train the biases only (Ben Zaken, Goldberg and Ravfogel, ACL 2022)."""

    kinds = default = (nn.Linear, nn.Conv2d, nn.LayerNorm, nn.GroupNorm)

    def prepare(self, model, layers):
        layers = {path: layer for path, layer in layers.items() if layer.bias is not None}
        if not layers:
            raise ValueError("BitFit finds no layer with a bias")
        return layers

    def init(self, layer):
        layer.parameter("d", torch.zeros_like(layer.base.bias))

    def bias(self, layer):
        return layer.d

    def forward(self, layer, x):
        y = layer.base(x)
        channels_first = isinstance(layer.base, (nn.Conv2d, nn.GroupNorm))
        return y + (layer.d.view(-1, *[1] * (y.ndim - 2)) if channels_first else layer.d)


class LoRA(LowRank):
    r"""Low-rank adaptation: W0 + s B A with A [r, n] random, B [m, r] zero.

    Hu et al., *LoRA*, ICLR 2022; the scale alpha / sqrt(r) is that of rsLoRA (Kalajdzievski 2023).

    Parameters
    ----------
    rank : int
        r.
    alpha : float, optional
        s = alpha / r. Default: r, so that s = 1.
    stable : bool
        rsLoRA: s = alpha / sqrt(r).
    room : int, optional
        Allocate so many ranks, of which those beyond `rank` are zero and, having zero gradients,
        stay so: copies of different rank then fit into one stack.
    targets : sequence of str, optional

    Raises
    ------
    ValueError
        If rank is not positive, or exceeds the room.
    """

    def __init__(self, rank=8, alpha=None, stable=False, room=None, targets=None):
        super().__init__(targets)
        if rank < 1 or (room or rank) < rank:
            raise ValueError(f"needs 1 <= rank <= room, got rank {rank} and room {room}")
        self.rank, self.room = rank, room
        self.alpha = rank if alpha is None else alpha
        self.s = self.alpha / (math.sqrt(rank) if stable else rank)

    def initial(self, layer):
        """Return B [m, r] and A [r, n] to start from."""
        A = torch.empty(self.rank, layer.n)
        nn.init.kaiming_uniform_(A, a=math.sqrt(5))
        if isinstance(layer.base, nn.Embedding):
            # rows of B are looked up: there the random factor must be
            return torch.randn(layer.m, self.rank), torch.zeros(self.rank, layer.n)
        return torch.zeros(layer.m, self.rank), A

    def init(self, layer):
        B, A = self.initial(layer)
        more = 0 if self.room is None else self.room - len(A)
        layer.parameter("A", F.pad(A, (0, 0, 0, more)))
        layer.parameter("B", F.pad(B, (0, more)))
        layer.buffer("s", float(self.s))

    def factors(self, layer):
        return layer.B, layer.A


class PiSSA(LoRA):
    """LoRA that starts from the largest r singular directions (Meng, Wang and Zhang 2024).

    With W0 = U S V': B = U_r sqrt(S_r / s), A = sqrt(S_r / s) V_r', and the frozen weight is the
    residual W0 - s B A, so that nothing changes at the start.
    """

    def initial(self, layer):
        U, S, Vh = svd(layer.W)
        root = (S[: self.rank] / self.s).sqrt()
        return U[:, : self.rank] * root, root[:, None] * Vh[: self.rank]

    def init(self, layer):
        W = layer.base.weight.flatten(1)
        super().init(layer)
        layer.freeze(W - self.delta(layer).detach())


class DoRA(LoRA):
    """LoRA on the direction of the weight, and a trained magnitude (Liu et al., ICML 2024).

    W' = g * V / ||V|| row by row with V = W0 + s B A and g starting at the norms of the rows of W0.
    The norm is a constant for the gradient (their Section 4.3).
    """

    def init(self, layer):
        super().init(layer)
        layer.parameter("g", layer.W.norm(dim=1))

    def delta(self, layer):
        V = layer.W + super().delta(layer)
        return (layer.g / V.norm(dim=1).detach())[:, None] * V - layer.W

    def forward(self, layer, x):
        return layer.apply(x, self.delta(layer))


class LoRAXS(LoRA):
    """A trained r x r matrix between frozen frames: W0 + s B R A (Bałazy et al. 2024).

    B = U_r S_r and A = V_r' come from the singular value decomposition of W0; R starts as noise of
    standard deviation 1e-5.
    """

    starts_at_base = False  # but for a noise of 1e-5

    def init(self, layer):
        U, S, Vh = svd(layer.W)
        r = min(self.rank, len(S))
        self.put(layer, U[:, :r] * S[:r], 1e-5 * torch.randn(r, r), Vh[:r])

    def put(self, layer, B, R, A):
        """Give a layer its frozen frames B [m, r] and A [r, n] and the trained R [r, r]."""
        more = 0 if self.room is None else min(self.room, layer.m, layer.n) - len(R)
        layer.buffer("B", F.pad(B, (0, more)))
        layer.buffer("A", F.pad(A, (0, 0, 0, more)))
        layer.parameter("R", F.pad(R, (0, more, 0, more)))
        layer.buffer("s", float(self.s))

    def factors(self, layer):
        return layer.B, layer.R, layer.A


class VeRA(LowRank):
    """Trained scales of random matrices that all layers share (Kopiczko, Blankevoort, Asano 2024).

    W0 + diag(b) B diag(d) A with A [r, n], B [m, r] drawn once at the largest size and cut to each
    layer; b [m] starts at zero, d [r] at `d0`.

    Parameters
    ----------
    rank : int
    d0 : float
    targets : sequence of str, optional
    """

    def __init__(self, rank=64, d0=0.1, targets=None):
        super().__init__(targets)
        positive(rank=rank)
        self.rank, self.d0 = rank, d0

    def prepare(self, model, layers):
        sizes = [layer.weight.flatten(1).shape for layer in layers.values()]
        m, n = (max(column) for column in zip(*sizes))
        like = next(iter(layers.values())).weight
        self.B, self.A = like.new_empty(m, self.rank), like.new_empty(self.rank, n)
        for shared in (self.B, self.A):
            nn.init.kaiming_uniform_(shared)
        return layers

    def init(self, layer):
        layer.register_buffer("shared_A", self.A)
        layer.register_buffer("shared_B", self.B)
        layer.parameter("b", torch.zeros(layer.m))
        layer.parameter("d", torch.full((self.rank,), self.d0, dtype=torch.float64))

    def factors(self, layer):
        return layer.b, layer.shared_B[: layer.m], layer.d, layer.shared_A[:, : layer.n]


class Houlsby(Method):
    """A bottleneck after the layer: h + U gelu(D h) (Houlsby et al., ICML 2019).

    Parameters
    ----------
    width : int
        Of the bottleneck.
    targets : sequence of str, optional
        Their places are after the two outputs of a transformer block: ``["attention.out",
        "mlp.2"]``.
    """

    kinds = default = (nn.Linear,)
    mergeable = False

    def __init__(self, width=8, targets=None):
        super().__init__(targets)
        positive(width=width)
        self.width = width

    def init(self, layer):
        D = torch.empty(self.width, layer.m)
        nn.init.kaiming_uniform_(D, a=math.sqrt(5))
        layer.parameter("D", D)
        layer.parameter("d", torch.zeros(self.width))
        layer.parameter("U", torch.zeros(layer.m, self.width))

    def forward(self, layer, x):
        h = layer.apply(x)
        return h + F.linear(F.gelu(F.linear(h, layer.D, layer.d)), layer.U)


class Prefix(Method):
    """Trained keys and values in front of every attention layer (Li and Liang, ACL 2021).

    Parameters
    ----------
    length : int
        Of the prefix, p.
    std : float
        Of the normal law that keys and values start from. (The paper computes them from a
        perceptron, which it drops after training.)
    targets : sequence of str, optional
    """

    kinds = default = (Attention,)
    starts_at_base = mergeable = False

    def __init__(self, length=8, std=0.02, targets=None):
        super().__init__(targets)
        positive(length=length)
        self.length, self.std = length, std

    def init(self, layer):
        shape = (layer.heads, self.length, layer.base.q.out_features // layer.heads)
        layer.parameter("K", self.std * torch.randn(shape))
        layer.parameter("V", self.std * torch.randn(shape))

    def forward(self, layer, x, *args):
        return layer.base(x, *args, prefix=(layer.K, layer.V))


class Prompt(Method):
    """Trained embeddings in front of the text (Lester, Al-Rfou and Constant, EMNLP 2021).

    For `GPT` with rotary positions. They start as embeddings of tokens drawn at random.

    Parameters
    ----------
    length : int
        Number of soft tokens, p; the context must have room for them.
    """

    kinds = default = (nn.Embedding,)
    starts_at_base = mergeable = False

    def __init__(self, length=8):
        super().__init__(["embed"])
        positive(length=length)
        self.length = length

    def prepare(self, model, layers):
        if not isinstance(model, GPT) or model.position is not None:
            raise ValueError("prompt tuning needs a GPT with positions='rope'")
        cut = model.register_forward_hook(lambda module, args, out: out[:, self.length :])
        model._adapter_hooks = [cut]
        return layers

    def init(self, layer):
        rows = torch.randint(layer.m, (self.length,))
        layer.parameter("P", layer.W[rows.to(layer.W.device)])

    def forward(self, layer, ids):
        text = layer.apply(ids)
        return torch.cat([layer.P.expand(len(text), -1, -1), text], 1)


def svd(W):
    """Return U [m, k], S [k], V' [k, n] of a frozen matrix, in float64, signs fixed.

    The largest entry of every column of U is positive, so that machines agree.
    """
    U, S, Vh = torch.linalg.svd(W.detach().double(), full_matrices=False)
    sign = U.gather(0, U.abs().argmax(0, keepdim=True)).sign()
    return U * sign, S, Vh * sign.T
