r"""Ladder side-tuning: train a thin network beside a frozen one, fed through ladders from it.

Sung, Cho and Bansal, "LST: Ladder Side-Tuning for Parameter and Memory Efficient Transfer
Learning", NeurIPS 2022, arXiv:2206.06522; details of the pruning from the authors' code.

The backbone f, with blocks h_l^f = f_l(h_{l-1}^f), l = 1..L, is frozen. Beside it runs a copy g of
width d / r. With sg the stop-gradient, W_l [d / r, d] and sigma the logistic function,

    h_0^g = W_0 sg(h_0^f),    u_l = W_l sg(h_l^f),    mu_l = sigma(alpha_l / T),
    h_l^g = g_l(mu_l u_l + (1 - mu_l) h_{l-1}^g),     logits = head(W_up norm(h_L^g)).

Trained are all g_l, W, alpha (from zero, hence mu = 1/2) and the norm.

The one idea: gradients run through g alone. Adapters and LoRA train few numbers too, but sit inside
f: backpropagation passes through all of it, and keeps its activations.

The blocks of g start as pruned blocks of f. A row of a weight counts as much as the Fisher
information (1/n) sum_i (d log p(y_i | x_i) / d theta)^2 sums to along it; the d / r best rows stay,
and their indices are the columns that the next layer keeps (`prune`).

Rivals: LoRA and adapters in all blocks or in the top ones; a side network without ladders, as in
Side-Tuning (Zhang et al., ECCV 2020), which closed gates give (`Side`).
"""

import torch
from torch import nn
from torch.func import functional_call, vmap

from ..stack import cross_entropy

# Layers of a block in the order in which rows of one are columns of the next; those that read the
# same input stand together.
TRANSFORMER = (
    ("norm1",),
    ("attention.q", "attention.k", "attention.v"),
    ("attention.out",),
    ("norm2",),
    ("mlp.0",),
    ("mlp.2",),
)
RESIDUAL = (("norm",), ("mlp.0",), ("mlp.2",))
INITS = ("fisher", "magnitude", "random")


class Perceptron(nn.Module):
    """A transformer's second half of a block alone: h + W_2 gelu(W_1 norm(h))."""

    def __init__(self, dim, expand=2):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(
            nn.Linear(dim, expand * dim), nn.GELU(), nn.Linear(expand * dim, dim)
        )

    def forward(self, h):
        return h + self.mlp(self.norm(h))


class Residual(nn.Module):
    """A residual network with the skeleton of `ViT` (embed, blocks, norm, head), one token wide.

    Parameters
    ----------
    inputs, classes, dim, layers : int
        Numbers a sample, labels, width d, number of blocks L.
    """

    def __init__(self, inputs, classes, dim=64, layers=4):
        super().__init__()
        self.embed = nn.Linear(inputs, dim)
        self.blocks = nn.ModuleList(Perceptron(dim) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, classes)

    def forward(self, x):
        h = self.embed(x)
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h))


class MeanHead(nn.Linear):
    """The head of `ViT`: mean over the tokens, then a linear layer, [B, tokens, d] to logits."""

    def forward(self, h):
        return super().forward(h.mean(-2))


class Side(nn.Module):
    """The side network g: it reads the states of a backbone and returns logits.

    Parameters
    ----------
    blocks : sequence of nn.Module
        The thin blocks g_l, mapping [..., d / r] to the same shape.
    dim, width : int
        d and d / r.
    head : nn.Module or None
        From [..., d] to logits, trained. None: the backbone's own follows, frozen.
    keep : sequence of int
        The l in 1..L that have a side block and a ladder, rising; one for each of `blocks`.
    T : float
        Temperature of the gates.
    open : bool
        False closes all gates, mu_l = 0: no ladders, only states[0] is read.

    Raises
    ------
    ValueError
        If `keep` does not rise from at least 1, or does not fit the blocks.
    """

    def __init__(self, blocks, dim, width, head, keep, T=0.1, open=True):
        super().__init__()
        if len(keep) != len(blocks) or sorted(set(keep)) != list(keep) or min(keep, default=0) < 1:
            raise ValueError(
                f"keep must name a backbone block 1..L for each of {len(blocks)} side blocks, "
                f"rising; got {list(keep)}"
            )
        self.keep, self.T = list(keep), T
        self.first = nn.Linear(dim, width)
        self.down = nn.ModuleList(nn.Linear(dim, width) for _ in keep)
        self.alpha = nn.Parameter(torch.zeros(len(self.keep)))
        self.blocks = nn.ModuleList(blocks)
        self.norm, self.up, self.head = nn.LayerNorm(width), nn.Linear(width, dim), head
        self.register_buffer("open", torch.tensor(float(open)))

    @property
    def mu(self):
        """The gates mu_l, [kept]."""
        return self.open * torch.sigmoid(self.alpha / self.T)

    def forward(self, states):
        """Return the logits (or, without a head, what it would read).

        Parameters
        ----------
        states : sequence of torch.Tensor, each [B, ..., d], or a tensor [L + 1, B, ..., d]
            h_0^f, ..., h_L^f.
        """
        h = self.first(states[0])
        for l, mu, down, block in zip(self.keep, self.mu, self.down, self.blocks):
            u = down(states[l])
            h = block(mu * u + (1 - mu) * h)
        h = self.up(self.norm(h))
        return h if self.head is None else self.head(h)


@torch.no_grad()
def states(backbone, x):
    """Return sg(h_0^f), ..., sg(h_L^f), without a graph: none of f is kept for backward.

    Parameters
    ----------
    backbone : nn.Module
        With a list of blocks `blocks`, called one after the other.
    x : torch.Tensor
        Its input.
    """
    found, blocks = [], backbone.blocks
    hooks = [blocks[0].register_forward_pre_hook(lambda block, args: found.append(args[0]))]
    hooks += [
        block.register_forward_hook(lambda block, args, h: found.append(h)) for block in blocks
    ]
    try:
        backbone(x)
    finally:
        for hook in hooks:
            hook.remove()
    return found


class Ladder(nn.Module):
    """A frozen backbone with a side network: what `attach` is for adapters.

    Trained are the parameters of the side alone, so that `trainable`, `count`, `adapter_state`,
    `save`, `saved_bytes` and `Stack` take it as it is.

    Parameters
    ----------
    backbone : nn.Module
        With a list of blocks `blocks`, called one after the other: `Residual`, `ViT`, `GPT`.
        Frozen in place.
    side : Side
    """

    def __init__(self, backbone, side):
        super().__init__()
        if max(side.keep) > len(backbone.blocks):
            raise ValueError(f"keep {side.keep} exceeds the {len(backbone.blocks)} blocks")
        self.backbone, self.side = backbone.requires_grad_(False), side

    def forward(self, x):
        out = self.side(states(self.backbone, x))
        return self.backbone.head(out) if self.side.head is None else out


def ladder(
    backbone, r, thin, head, chain, importance=None, init="fisher", keep=None, T=0.1, open=True
):
    """Put a side network beside a backbone.

    Parameters
    ----------
    backbone : nn.Module
        As for `Ladder`, with a linear layer or an embedding `embed`.
    r : int
        Reduction; divides the width d.
    thin : callable
        Takes a width and returns a block of the backbone's kind, such as `Perceptron`.
    head : nn.Module or None
        As in `Side`.
    chain : sequence of sequence of str
        Order of a block's layers for `prune`: `TRANSFORMER`, `RESIDUAL`.
    importance : dict of str to torch.Tensor, optional
        Fisher information of the backbone's parameters (`fisher`), for ``init="fisher"``.
    init : {"fisher", "magnitude", "random"}
        Of the side's blocks: pruned blocks of the backbone, or as `thin` makes them.
    keep : sequence of int, optional
        Blocks 1..L that get a side block and a ladder. Default: all.
    T, open
        As in `Side`.

    Returns
    -------
    Ladder
    """
    like, blocks = backbone.embed.weight, backbone.blocks
    dim = _rows(backbone.embed, like).shape[0]
    if r < 1 or dim % r:
        raise ValueError(f"r must be positive and divide the width {dim}, not {r}")
    if init not in INITS:
        raise ValueError(f"init must be one of {', '.join(INITS)}, not {init!r}")
    if init == "fisher" and importance is None:
        raise ValueError("init='fisher' needs importance=fisher(backbone, x, y)")
    keep = list(range(1, len(blocks) + 1)) if keep is None else list(keep)
    if max(keep, default=0) > len(blocks):
        raise ValueError(f"keep {keep} exceeds the {len(blocks)} blocks")
    own = [thin(dim // r).to(like) for _ in blocks]
    if init != "random":
        score = dict(backbone.named_parameters()) if init == "magnitude" else importance
        prune(backbone, own, {k: v.detach().abs() for k, v in score.items()}, chain)
    side = Side([own[l - 1] for l in keep], dim, dim // r, head, keep, T, open)
    return Ladder(backbone, side.to(like))


@torch.no_grad()
def prune(backbone, thin, importance, chain):
    """Fill thin blocks with the rows of a backbone's blocks that count most, in place.

    The first indices are the d / r outputs of the embedding that count most. Then, layer by layer:
    the columns are the rows that the layer before kept, and the rows are those of the largest
    score along these columns. Layers that read the same input (queries, keys and values) keep the
    same rows, by the product of their scores. What is not in the chain is copied.

    Parameters
    ----------
    backbone : nn.Module
    thin : sequence of nn.Module
        A block of less width for each of the backbone's.
    importance : dict of str to torch.Tensor
        Scores, at least 0, of the backbone's parameters, by name.
    chain : sequence of sequence of str

    Raises
    ------
    ValueError
        If a score is missing.
    """
    weights = [f"blocks.{i}.{n}.weight" for i in range(len(thin)) for ns in chain for n in ns]
    for name in ("embed.weight", *weights):
        if name not in importance:
            raise ValueError(f"importance lacks {name!r}: give fisher(backbone, x, y)")
    width = thin[0].get_submodule(chain[0][0]).weight.shape[0]
    kept = _best(_rows(backbone.embed, importance["embed.weight"]), width)
    for i, (block, small) in enumerate(zip(backbone.blocks, thin)):
        for names in chain:
            layers = [block.get_submodule(name) for name in names]
            own = [small.get_submodule(name) for name in names]
            if isinstance(layers[0], nn.LayerNorm):
                own[0].weight.copy_(layers[0].weight[kept])
                own[0].bias.copy_(layers[0].bias[kept])
                continue
            score = 1.0
            for name in names:
                score = score * importance[f"blocks.{i}.{name}.weight"][:, kept]
            rows = _best(score, len(own[0].weight))
            for layer, target in zip(layers, own):
                target.weight.copy_(layer.weight[rows][:, kept])
                if target.bias is not None:
                    target.bias.copy_(layer.bias[rows])
            kept = rows
        for path, p in small.named_parameters():
            if not any(path.startswith(f"{name}.") for names in chain for name in names):
                p.copy_(block.get_parameter(path))


def _rows(embed, value):
    """A tensor shaped as the weight of an embedding or of a linear layer, with a row a channel."""
    return value.T if isinstance(embed, nn.Embedding) else value


def _best(score, n):
    """Indices, rising, of the n rows of the largest sum."""
    return score.sum(1).topk(n).indices.sort().values


def fisher(model, x, y):
    """Return the diagonal of the empirical Fisher information, name -> tensor.

    Parameters
    ----------
    model : nn.Module
        A classifier.
    x : torch.Tensor, shape [n, ...]
    y : torch.Tensor, shape [n]
        Class indices.
    """
    # A copy of the parameters a sample, so that the gradient of the sum is every sample's own.
    params = {
        k: p.detach().expand(len(x), *p.shape).requires_grad_() for k, p in model.named_parameters()
    }

    def log_p(params, x, y):
        return -cross_entropy(functional_call(model, params, (x[None],)), y[None])

    each = torch.autograd.grad(vmap(log_p)(params, x, y).sum(), list(params.values()))
    return {k: g.square().mean(0) for k, g in zip(params, each)}
