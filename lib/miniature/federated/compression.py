"""What goes over the wire: compressors with exact byte counts.

A compressor maps vectors [S, A, P] to what the receiver reconstructs, same shape, and knows how
many bytes one vector takes. Random ones draw from ``draw.uniform(v)``, which the engine provides:
every run has a stream of its own.
"""

import math

import torch


class Identity:
    """Every number as it is."""

    def __call__(self, v, draw):
        return v

    def nbytes(self, v):
        """Bytes for one vector (the last axis of `v`)."""
        return v.shape[-1] * v.element_size()


class _Sparse:
    """k of P entries: their values and ceil(log2 P) bits for each index."""

    def __init__(self, share):
        if not 0 < share <= 1:
            raise ValueError(f"share must lie in (0, 1], got {share}")
        self.share = share

    def k(self, P):
        return max(1, math.ceil(self.share * P))

    def nbytes(self, v):
        """Bytes for one vector (the last axis of `v`)."""
        index = math.ceil(math.log2(v.shape[-1])) if v.shape[-1] > 1 else 1
        return _bytes(self.k(v.shape[-1]) * (v.element_size() * 8 + index))


class TopK(_Sparse):
    """The entries of largest magnitude: biased, ||C(v) - v||^2 <= (1 - k/P) ||v||^2.

    Parameters
    ----------
    share : float
        k / P.
    """

    def __call__(self, v, draw):
        at = v.abs().topk(self.k(v.shape[-1]), dim=-1).indices
        return torch.zeros_like(v).scatter(-1, at, v.gather(-1, at))


class RandK(_Sparse):
    """k entries chosen at random, scaled by P / k: unbiased, variance (P/k - 1) ||v||^2.

    Parameters
    ----------
    share : float
        k / P.
    """

    def __call__(self, v, draw):
        P = v.shape[-1]
        score = draw.uniform(v)
        at = score.topk(self.k(P), dim=-1).indices
        return torch.zeros_like(v).scatter(-1, at, v.gather(-1, at) * (P / self.k(P)))


class Sign:
    """One bit an entry and one scale a vector: ||v||_1 / P sign(v)."""

    def __call__(self, v, draw):
        scale = v.abs().mean(-1, keepdim=True)
        return torch.where(v >= 0, scale, -scale)

    def nbytes(self, v):
        """Bytes for one vector (the last axis of `v`)."""
        return _bytes(v.shape[-1] + v.element_size() * 8)


class Dither:
    """Random dithering (QSGD, Alistarh et al. 2017): |v_j| / ||v|| rounded at random to s levels.

    Unbiased. A sign and a level an entry, one norm a vector.

    Parameters
    ----------
    bits_per_entry : int
        At least 2: one for the sign, the rest for s = 2^(bits - 1) - 1 levels above zero.
    """

    def __init__(self, bits_per_entry):
        if bits_per_entry < 2:
            raise ValueError(f"dithering needs at least 2 bits an entry, got {bits_per_entry}")
        self.bits_per_entry = bits_per_entry

    def __call__(self, v, draw):
        s = 2 ** (self.bits_per_entry - 1) - 1
        norm = torch.linalg.vector_norm(v, dim=-1, keepdim=True)
        level = s * v.abs() / norm.clamp(min=torch.finfo(v.dtype).tiny)
        u = draw.uniform(v)
        return norm * v.sign() * (level + u).floor() / s

    def nbytes(self, v):
        """Bytes for one vector (the last axis of `v`)."""
        return _bytes(v.shape[-1] * self.bits_per_entry + v.element_size() * 8)


def _bytes(bits):
    return math.ceil(bits / 8)
