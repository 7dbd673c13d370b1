r"""S2FT: select hidden units sparsely, permute them into a dense block, train the block.

Yang, Leng, Guo, Zhao, Nakada, Zhang, Yao and Chen, "S2FT: Efficient, Scalable and Generalizable LLM
Fine-tuning by Structured Sparsity", NeurIPS 2024, arXiv:2412.06289; details from the authors' code.

Attention heads and the channels of a feed-forward layer are hidden units: some layers write them as
rows (up, gate; q, k, v), another reads them as columns (down; out). Any order pi of them will do,

    up -> up[pi], gate -> gate[pi], down -> down[:, pi]          computes the same function,

and biases of the writing layers follow their rows. In grouped-query attention the unit is the group
of queries that share keys and values. Rotary positions pair the channels of a head, so that heads
can be permuted but not the channels in them.

1. Select: of the units of all layers together, a share is drawn for the rows of up (or v), and a
   share for the columns of down (or out). The released runs take 3 % of down, and none elsewhere.
2. Permute: [rows only] + [both] + [columns only] + the rest, so that either choice is a slice a:b.
3. Compute: train S, zero at first, on the slice only,

       y = W x + S x_{a:b}    dL/dS = g x_{a:b}'    (columns),
       y_{a:b} += S x         dL/dS = g_{a:b} x'    (rows),       g = dL/dy.

   A column slice needs b - a numbers of x a token, a row slice all of them.
4. Fuse: W[:, a:b] += S. As (slice, S) the update can be taken off again; updates on disjoint slices
   add up exactly and in any order.

The one idea: permute coupled structures so that a sparse choice is a dense block.

Rivals: columns of every layer by themselves (`paca.PaCA`, whose backward pass this one shares);
entries drawn without structure (`Unstructured`); LoRA.
"""

import copy
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from ..models.gpt import Attention, Block
from ..models.mlp import MLP
from .engine import Method, positive
from .paca import PartialLinear

COLUMNS, ROWS = 1, 0
RULES = ("weight", "activation", "product", "gradient")


class GatedBlock(nn.Module):
    """h + down(silu(gate(h / |h|)) * up(h / |h|)), |h| the root mean square of h [..., dim]."""

    def __init__(self, dim, hidden):
        super().__init__()
        self.gate, self.up = nn.Linear(dim, hidden), nn.Linear(dim, hidden)
        self.down = nn.Linear(hidden, dim)

    def forward(self, h):
        u = h * (h.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        return h + self.down(F.silu(self.gate(u)) * self.up(u))


class GatedMLP(nn.Module):
    """The feed-forward half of a Llama: embed, residual gated blocks, head.

    Parameters
    ----------
    inputs, dim, hidden, layers, classes : int
        Inputs, width of the residual stream, units a block, blocks, outputs.
    """

    def __init__(self, inputs, dim, hidden, layers, classes):
        super().__init__()
        self.embed, self.head = nn.Linear(inputs, dim), nn.Linear(dim, classes)
        self.blocks = nn.ModuleList(GatedBlock(dim, hidden) for _ in range(layers))

    def forward(self, x):
        """Map x [..., inputs] to logits [..., classes]."""
        h = self.embed(x)
        for block in self.blocks:
            h = block(h)
        return self.head(h)


@dataclass(frozen=True)
class Couple:
    """Hidden units that some layers write as rows and another reads as columns.

    Attributes
    ----------
    writers : dict of str to int
        Path of each writing layer -> its rows a unit. The last one is that whose rows may be
        trained (up, v).
    reader : str
        Path of the reading layer, whose columns may be trained (down, out).
    block : int
        Columns of the reader a unit.
    units : int
    """

    writers: dict
    reader: str
    block: int
    units: int


def couples(model):
    """Return the coupled structures of a perceptron or of a model made of gated or GPT blocks.

    Raises
    ------
    ValueError
        If the model has none that are known: a `Couple` can be written down for any other.
    """
    found = []
    for path, m in model.named_modules():
        at = f"{path}." if path else ""
        if isinstance(m, GatedBlock):
            units = m.up.out_features
            found.append(Couple({f"{at}gate": 1, f"{at}up": 1}, f"{at}down", 1, units))
        elif isinstance(m, Attention):
            d = m.out.in_features // m.heads
            writers = {f"{at}{k}": d for k in "qkv"}
            found.append(Couple(writers, f"{at}out", d, m.heads))
        elif isinstance(m, Block):
            found.append(Couple({f"{at}mlp.0": 1}, f"{at}mlp.2", 1, m.mlp[0].out_features))
        elif isinstance(m, MLP):
            for i in range(0, len(m) - 2, 2):
                found.append(Couple({f"{at}{i}": 1}, f"{at}{i + 2}", 1, m[i].out_features))
    if not found:
        raise ValueError(f"{type(model).__name__} has no structure that `couples` knows")
    return found


def draw(pairs, rows=0.0, columns=0.05, scores=None, largest=True, others=None):
    """Select units for the rows of their writer and for the columns of their reader.

    Parameters
    ----------
    pairs : list of Couple
    rows, columns : float
        Shares of all units, in [0, 1]; drawn one after the other, so that they may meet.
    scores : list of torch.Tensor, each of shape [units], optional
        From `importance`: take the largest (or smallest) of each layer, in equal shares, in place
        of a draw over all layers.
    largest : bool
    others : list of (sequence of int, sequence of int), optional
        A choice to stay clear of, from an earlier call.

    Returns
    -------
    list of (list of int, list of int)
        For each couple its units for rows and for columns, ascending.

    Raises
    ------
    ValueError
        If a share lies outside [0, 1] or more units are wanted than are left.
    """
    if not (0 <= rows <= 1 and 0 <= columns <= 1):
        raise ValueError(f"rows={rows} and columns={columns} are shares: from 0 to 1")
    taken = [set() if others is None else {*others[i][0], *others[i][1]} for i in range(len(pairs))]
    total, sides = sum(c.units for c in pairs), []
    for share in (rows, columns):
        if scores is None:
            free = [
                (i, u) for i, c in enumerate(pairs) for u in range(c.units) if u not in taken[i]
            ]
            count = int(share * total)
            chosen = [free[j] for j in torch.randperm(len(free))[:count].tolist()]
        else:
            chosen = []
            for i, (c, s) in enumerate(zip(pairs, scores)):
                order = s.argsort(descending=largest, stable=True).tolist()
                order = [u for u in order if u not in taken[i]]
                chosen += [(i, u) for u in order[: int(share * c.units)]]
            count = sum(int(share * c.units) for c in pairs)
        if len(chosen) < count:
            raise ValueError(f"{count} units are wanted, but {len(chosen)} are left")
        sides.append([sorted(u for i, u in chosen if i == j) for j in range(len(pairs))])
    return list(zip(*sides))


def importance(model, pairs, loss, rule):
    """Score every unit by what its reader does with it.

    Parameters
    ----------
    model : nn.Module
        Not adapted.
    pairs : list of Couple
    loss : callable
        ``loss(model)``, a scalar, on data to calibrate with.
    rule : {"weight", "activation", "product", "gradient"}
        The norm of the unit's columns W_u; of its activations x_u (root mean square); their
        product; the norm of the gradient of W_u.

    Returns
    -------
    list of torch.Tensor, each of shape [units]
    """
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}, not {rule!r}")
    model = copy.deepcopy(model).requires_grad_(True)  # flags and hooks of the original stay
    readers, heard, found = [model.get_submodule(c.reader) for c in pairs], {}, []
    for reader in readers:
        reader.register_forward_pre_hook(lambda m, args: heard.update({m: args[0]}))
    grads = torch.autograd.grad(loss(model), [reader.weight for reader in readers])
    for c, reader, g in zip(pairs, readers, grads):
        by_column = {
            "weight": reader.weight.detach().square().sum(0),
            "activation": heard[reader].detach().flatten(0, -2).square().mean(0),
            "gradient": g.square().sum(0),
        }
        per_unit = {k: v.view(c.units, c.block).sum(1).sqrt() for k, v in by_column.items()}
        per_unit["product"] = per_unit["weight"] * per_unit["activation"]
        found.append(per_unit[rule])
    return found


def permutation(units, rows, columns):
    """Return the order [rows only] + [both] + [columns only] + the rest, and the two slices."""
    both = [u for u in rows if u in set(columns)]
    only_rows = [u for u in rows if u not in set(columns)]
    only_columns = [u for u in columns if u not in set(rows)]
    order = only_rows + both + only_columns
    order += sorted(set(range(units)) - set(order))
    start = len(only_rows)
    return order, (0, len(rows)), (start, start + len(columns))


@torch.no_grad()
def co_permute(model, pairs, chosen):
    """Reorder hidden units in place, so that the chosen ones stand together: the same function.

    Parameters
    ----------
    model : nn.Module
        Not adapted.
    pairs : list of Couple
    chosen : list of (list of int, list of int)
        From `draw`.

    Returns
    -------
    dict of str to (int, torch.Tensor)
        For `S2FT`: path -> (ROWS or COLUMNS, the consecutive indices start..end-1 of the slice).
    """
    now = []
    for c, (rows, columns) in zip(pairs, chosen):
        order, for_rows, for_columns = permutation(c.units, rows, columns)
        for path, block in c.writers.items():
            writer = model.get_submodule(path)
            at = expand(order, block).to(writer.weight.device)
            writer.weight.copy_(writer.weight[at])
            if writer.bias is not None:
                writer.bias.copy_(writer.bias[at])
        reader = model.get_submodule(c.reader)
        at = expand(order, c.block).to(reader.weight.device)
        reader.weight.copy_(reader.weight[:, at])
        now.append((range(*for_rows), range(*for_columns)))
    return scattered(pairs, now)


def scattered(pairs, chosen):
    """Return what `co_permute` does, for the model as it is: indices that lie apart.

    Raises
    ------
    ValueError
        If a layer writes some chosen units and reads others: it is cut one way only.
    """
    slices = {}
    for c, (rows, columns) in zip(pairs, chosen):
        writer, block = list(c.writers.items())[-1]
        parts = {writer: (ROWS, expand(rows, block)), c.reader: (COLUMNS, expand(columns, c.block))}
        for path, (dim, idx) in parts.items():
            if len(idx) and len(slices.get(path, (0, ()))[1]):
                raise ValueError(f"layer {path!r} would train rows and columns: choose one kind")
            if len(idx) or path not in slices:
                slices[path] = dim, idx
    kinds = {dim for dim, idx in slices.values() if len(idx)}  # rows in no layer: leave them out
    return {path: part for path, part in slices.items() if part[0] in kinds}


def expand(units, block):
    """Return the rows (or columns) of units: block u .. block u + block - 1 for each u."""
    units = torch.tensor(list(units), dtype=torch.long)
    return (units[:, None] * block + torch.arange(block)).flatten()


class S2FT(Method):
    """Train a slice of rows or columns of each weight, as a change S that starts at zero.

    Parameters
    ----------
    slices : dict of str to (int, torch.Tensor), optional
        From `co_permute` (or `scattered`): which rows or columns of which layer. Default: a share
        of the columns of every targeted layer, drawn at random.
    ratio : float
        That share.
    room : int, optional
        Allocate so many rows or columns in every layer of `slices`, of which those beyond the
        slice are held at zero: copies whose slices differ in size then fit into one stack.
        Default: as many as there are; a layer without any is not adapted.
    partial : bool
        Partial back-propagation: write W + S into one live weight and keep only x_{a:b} of a
        column slice. For a model by itself: copies in a `Stack` share their weights. The default
        leaves all to autograd.
    targets : sequence of str, optional

    Raises
    ------
    ValueError
        If the ratio is not a share, indices are not those of distinct rows or columns, or the
        room is too small.
    """

    kinds = default = (nn.Linear,)

    def __init__(self, slices=None, ratio=0.05, room=None, partial=False, targets=None):
        super().__init__(targets if slices is None else list(slices))
        if not 0 < ratio <= 1:
            raise ValueError(f"ratio must lie in (0, 1], not {ratio}")
        self.slices, self.ratio, self.room, self.partial = slices, ratio, room, partial

    def prepare(self, model, layers):
        if self.slices is None:
            return layers
        wanted = {k for k, (_, idx) in self.slices.items() if len(idx) or self.room is not None}
        return {path: layer for path, layer in layers.items() if path in wanted}

    def init(self, layer):
        if self.slices is None:
            idx = torch.randperm(layer.n)[: max(1, int(self.ratio * layer.n))]
            dim, idx = COLUMNS, idx.sort().values
        else:
            dim, idx = self.slices[layer.name]
        size = (layer.m, layer.n)[dim]
        width = len(idx) if self.room is None else min(self.room, size)
        if len(idx) and not 0 <= int(idx.min()) <= int(idx.max()) < size:
            raise ValueError(f"layer {layer.name!r} has {size} indices, not {idx.tolist()}")
        if len(idx.unique()) < len(idx) or width < max(1, len(idx)):
            raise ValueError(
                f"layer {layer.name!r} needs distinct indices and room for them: "
                f"{idx.tolist()} in {width}"
            )
        rest = torch.ones(size, dtype=torch.bool).index_fill(0, idx.cpu(), False).nonzero()[:, 0]
        live = torch.arange(width) < len(idx)
        layer.dim = dim
        layer.buffer("idx", torch.cat([idx.cpu(), rest])[:width].to(layer.W.device))
        layer.buffer("live", live.double())
        layer.parameter("S", torch.zeros((width, layer.n) if dim == ROWS else (layer.m, width)))
        if self.partial and dim == COLUMNS:
            layer.buffer("whole", layer.W.clone())

    def change(self, layer):
        """Return S, with what is beyond the slice held at zero."""
        return layer.S * (layer.live[:, None] if layer.dim == ROWS else layer.live)

    def delta(self, layer):
        S = self.change(layer)
        at = layer.idx[:, None] if layer.dim == ROWS else layer.idx
        return torch.zeros_like(layer.W).scatter(layer.dim, at.expand(S.shape), S)

    def forward(self, layer, x):
        if layer.dim == ROWS:  # y_{a:b} += S x
            y = layer.apply(x)
            return y.index_add(-1, layer.idx, F.linear(x, self.change(layer)))
        if not self.partial:  # y = W x + S x_{a:b}
            return layer.apply(x) + F.linear(x.index_select(-1, layer.idx), self.change(layer))
        S = self.change(layer)
        with torch.no_grad():  # the slice is written where it stands
            layer.whole.index_copy_(1, layer.idx, layer.W[:, layer.idx] + S)
        return PartialLinear.apply(x, layer.whole, S, layer.idx, layer.base.bias)


class Unstructured(Method):
    """Train entries of every weight that are drawn one by one: a mask without structure.

    Parameters
    ----------
    rank : int
        Entries a layer; one with fewer is trained as a whole.
    targets : sequence of str, optional
    """

    kinds = default = (nn.Linear,)

    def __init__(self, rank=8, targets=None):
        super().__init__(targets)
        positive(rank=rank)
        self.rank = rank

    def init(self, layer):
        idx = torch.randperm(layer.m * layer.n)[: self.rank].to(layer.W.device)
        layer.buffer("idx", idx)
        layer.parameter("s", torch.zeros(len(idx)))

    def delta(self, layer):
        flat = torch.zeros_like(layer.W).flatten().scatter(0, layer.idx, layer.s)
        return flat.view_as(layer.W)


def split(layer):
    """Return the update of an adapted layer as an adapter: ROWS or COLUMNS, indices, and S."""
    live = layer.live > 0
    S = layer.S.detach()
    return layer.dim, layer.idx[live], S[live] if layer.dim == ROWS else S[:, live]


@torch.no_grad()
def fuse(W, *adapters):
    """Return a weight [m, n] with adapters (dim, indices, S) added on their slices."""
    W = W.clone()
    for dim, idx, S in adapters:
        W.index_add_(dim, idx, S.to(W))
    return W


@torch.no_grad()
def switch(W, W0, old, new):
    """Write one adapter over another, in place: slices only, with W0 the weight under both.

    Parameters
    ----------
    W, W0 : torch.Tensor, shape [m, n]
    old, new : (int, torch.Tensor, torch.Tensor)
        As in `fuse`; W = W0 with `old` fused.
    """
    dim, idx, _ = old
    W.index_copy_(dim, idx, W0.index_select(dim, idx))
    dim, idx, S = new
    return W.index_copy_(dim, idx, W0.index_select(dim, idx) + S)
