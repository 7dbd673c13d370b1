"""A decoder-only transformer, with a cache of keys and values for decoding.

Radford et al., "Language Models are Unsupervised Multitask Learners", 2019 (GPT-2: pre-norm blocks,
learned positions, initialization); Su et al., "RoFormer: Enhanced Transformer with Rotary Position
Embedding", Neurocomputing 2024, arXiv:2104.09864 (RoPE).
"""

import math

import torch
from torch import nn


class GPT(nn.Module):
    """A pre-norm decoder: ``h += attention(norm(h)); h += mlp(norm(h))`` in every block.

    Matrices and embeddings start as N(0, 0.02²), those that write into the residual stream as
    N(0, 0.02² / (2 layers)), biases at 0, normalizations at scale 1. The number of parameters, with
    V = vocab and d = dim, is ``V d + layers (12 d² + 13 d) + 2 d``, and ``context d`` more with
    learned positions and ``V d`` more without tied weights.

    Parameters
    ----------
    vocab : int
        Number of tokens V.
    dim, layers, heads : int
        Width of the residual stream, number of blocks, attention heads in each.
    context : int
        Largest number of positions, those in a cache counted in.
    positions : {"rope", "learned"}
        Rotated queries and keys, or a learned vector added to the embedding.
    tied : bool
        Whether the output matrix is the embedding, one parameter in two places.

    Raises
    ------
    ValueError
        If `dim` is not a multiple of `heads`, `positions` is neither of the two, or RoPE meets an
        odd number of dimensions a head.
    """

    def __init__(self, vocab, dim, layers, heads, context, positions="rope", tied=True):
        super().__init__()
        if dim % heads:
            raise ValueError(f"dim={dim} is not a multiple of heads={heads}")
        if positions not in ("rope", "learned"):
            raise ValueError(f'positions={positions!r}: use "rope" or "learned"')
        if positions == "rope" and (dim // heads) % 2:
            raise ValueError(
                f"dim={dim} with heads={heads} gives {dim // heads} dimensions a head; "
                "RoPE turns them in pairs and needs an even number"
            )
        self.context, self.heads = context, heads
        self.embed = nn.Embedding(vocab, dim)
        self.position = nn.Embedding(context, dim) if positions == "learned" else None
        self.blocks = nn.ModuleList(
            Block(dim, heads, rotate=positions == "rope") for _ in range(layers)
        )
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, vocab, bias=False)
        for name, p in self.named_parameters():
            if p.ndim == 2:
                residual = name.endswith(("attention.out.weight", "mlp.2.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * layers) if residual else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids, cache=None):
        """Return the logits of the token that follows each position.

        Parameters
        ----------
        ids : torch.Tensor, shape [B, T]
            Token numbers; with a cache, those that follow what it already holds.
        cache : KVCache, optional
            From `cache`; gets the keys and values of these T positions. For decoding, under
            `torch.no_grad`: it is written in place, so gradients cannot pass through it.

        Returns
        -------
        torch.Tensor, shape [B, T, V]

        Raises
        ------
        ValueError
            If `ids` is not [B, T] with T at least 1, the positions exceed the context, or the cache
            is for another batch size.
        """
        if ids.ndim != 2 or ids.shape[1] < 1:
            raise ValueError(f"ids of shape {list(ids.shape)}: this model reads [B, T], T >= 1")
        past, new = (0 if cache is None else cache.length), ids.shape[1]
        if past + new > self.context:
            raise ValueError(
                f"{past} cached + {new} new tokens exceed the context of {self.context}: "
                f"give at most {self.context - past}"
            )
        if cache is not None and cache.keys.shape[1] != len(ids):
            raise ValueError(
                f"{len(ids)} sequences meet a cache of {cache.keys.shape[1]}: make one with "
                f"model.cache({len(ids)})"
            )
        h = self.embed(ids)
        if self.position is not None:
            h = h + self.position.weight[past : past + new]
        for i, block in enumerate(self.blocks):
            h = block(h, past, None if cache is None else (cache.keys[i], cache.values[i]))
        if cache is not None:
            cache.length += new
        return self.head(self.norm(h))

    def cache(self, batch):
        """Return an empty `KVCache` for `batch` sequences, of the model's type and device."""
        dim = self.embed.embedding_dim
        shape = (len(self.blocks), batch, self.heads, self.context, dim // self.heads)
        zeros = self.embed.weight.new_zeros
        return KVCache(zeros(shape), zeros(shape))

    @torch.no_grad()
    def generate(self, ids, n, temperature=1.0, top_k=None, generator=None):
        """Continue sequences by `n` sampled tokens each.

        Every token costs one position, thanks to the cache. When the context is full, its last half
        is read again from position 0 and decoding goes on: the text can be of any length.

        Parameters
        ----------
        ids : torch.Tensor, shape [B, T]
            Beginnings; T must be from 1 to the context.
        n : int
        temperature : float
            Divides the logits; 0 takes the most probable token.
        top_k : int, optional
            Sample among the k most probable tokens only.
        generator : torch.Generator, optional
            On the device of the model.

        Returns
        -------
        torch.Tensor, shape [B, T + n]
            The beginnings and what follows them.

        Raises
        ------
        ValueError
            If an argument is out of its range.
        """
        if n < 0 or temperature < 0:
            raise ValueError(f"n={n} and temperature={temperature} must not be negative")
        if top_k is not None and not 1 <= top_k <= self.embed.num_embeddings:
            raise ValueError(f"top_k={top_k} must lie in 1..{self.embed.num_embeddings}")
        cache, new = self.cache(len(ids)), ids
        for _ in range(n):
            if cache.length + new.shape[1] > self.context and cache.length:
                cache.length, new = 0, ids[:, -max(1, self.context // 2) :]
            logits = self(new, cache)[:, -1]
            if temperature == 0:
                new = logits.argmax(-1, keepdim=True)
            else:
                if top_k is not None:
                    least = logits.topk(top_k).values[:, -1:]
                    logits = logits.masked_fill(logits < least, -torch.inf)
                p = (logits.float() / temperature).softmax(-1)
                new = torch.multinomial(p, 1, generator=generator)
            ids = torch.cat([ids, new], dim=1)
        return ids


class KVCache:
    """Keys and values of the positions read so far, in memory set aside beforehand.

    Attributes
    ----------
    keys, values : torch.Tensor, shape [layers, B, heads, context, dim // heads]
        Keys are stored rotated where the model uses RoPE.
    length : int
        Positions filled; set it back to forget the last ones.
    """

    def __init__(self, keys, values):
        self.keys, self.values, self.length = keys, values, 0


class Block(nn.Module):
    """One pre-norm block: attention, then a GELU perceptron of four times the width."""

    def __init__(self, dim, heads, rotate, causal=True):
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(dim), Attention(dim, heads, rotate, causal)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, h, past=0, cache=None):
        h = h + self.attention(self.norm1(h), past, cache)
        return h + self.mlp(self.norm2(h))


class Attention(nn.Module):
    """Self-attention: ``softmax(Q K^T / sqrt(d)) V`` in every head of d dimensions.

    Query, key, value and output are linear layers of their own (`q`, `k`, `v`, `out`), so that an
    adapter can take one of them. With `causal`, nothing attends to what comes after it.
    """

    def __init__(self, dim, heads, rotate, causal=True):
        super().__init__()
        self.heads, self.rotate, self.causal = heads, rotate, causal
        self.q, self.k, self.v, self.out = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x, past=0, cache=None, prefix=None):
        """Map x [B, T, dim] at positions past, ..., past + T - 1 to [B, T, dim].

        `cache` holds the keys and the values of one layer, two tensors [B, heads, context, d]: the
        first `past` positions are attended to, and the T new ones written behind them. `prefix`
        holds keys and values without a position, two tensors [heads, p, d], which all attend to.
        """
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )  # [B, heads, T, d]
        end = past + x.shape[1]
        positions = torch.arange(end, device=x.device)
        if self.rotate:
            q, k = rope(q, positions[past:]), rope(k, positions[past:])
        if cache is not None:
            keys, values = cache
            keys[:, :, past:end], values[:, :, past:end] = k, v
            k, v = keys[:, :, :end], values[:, :, :end]
        scores = (q / math.sqrt(q.shape[-1])) @ k.transpose(-1, -2)
        if self.causal:
            future = positions > positions[past:, None]
            scores = scores.masked_fill(future, -torch.inf)
        if prefix is not None:
            keys, values = prefix
            scores = torch.cat([(q / math.sqrt(q.shape[-1])) @ keys.transpose(-1, -2), scores], -1)
            v = torch.cat([values.expand(len(v), -1, -1, -1), v], 2)
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


def rope(x, positions):
    """Turn each pair of dimensions by an angle that grows with the position (RoFormer, eq. 34).

    Dimensions j and j + d/2 form pair j, turned by ``position * 10000^(-2j/d)``: the inner product
    of a query and a key then depends on the difference of their positions only.

    Parameters
    ----------
    x : torch.Tensor, shape [..., T, d]
        Queries or keys; d even.
    positions : torch.Tensor, shape [T]

    Returns
    -------
    torch.Tensor, shape [..., T, d]
    """
    half = x.shape[-1] // 2
    exact = torch.promote_types(x.dtype, torch.float32)  # angles are too coarse in half precision
    j = torch.arange(half, dtype=exact, device=x.device)
    angle = positions.to(exact)[:, None] * 10_000.0 ** (-j / half)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)
