r"""LoLDU: train the pivots of a weight's own triangular factors.

Shi, Wei, Wu, Ran, Sun, He and Yang, "LoLDU: Low-Rank Adaptation via Lower-Diag-Upper Decomposition
for Parameter-Efficient Fine-Tuning", arXiv:2410.13618; details from the authors' code.

Elimination with partial pivoting gives W0 = P L U; with the diagonal pulled out of U,

    W0 = P L diag(z0) U~,   L [m, k] unit lower, U~ [k, n] unit upper triangular, k = min(m, n).

The one idea: keep the first r pieces as frames and train nothing but their pivots, r numbers a
matrix. With s = alpha / r,

    W_res = W0 - s P L_r diag(z0) U~_r   (frozen),   W' = W_res + s P L_r diag(z) U~_r,   z(0) = z0.

For s = 1 the residual is a Schur complement: r steps of elimination have been taken out of it, so
that the first r rows and columns of P' W_res are zero.

Rival: the same with singular vectors in place of triangular ones, `SVDDiagonal`.
"""

import torch

from .baselines import svd
from .engine import LowRank, positive

STARTS = ("lu", "normal", "uniform", "constant", "ones", "zeros")


class LoLDU(LowRank):
    """Train the first r pivots z of every weight.

    Parameters
    ----------
    rank : int
        r; at most min(m, n) pieces of a layer are used. The first r steps of the elimination, which
        are not its r largest directions.
    alpha : float, optional
        s = alpha / r. Default: r, so that s = 1.
    start : {"lu", "normal", "uniform", "constant", "ones", "zeros"}
        z(0): the pivots; normal with their mean and standard deviation; uniform within half their
        mean; their mean; 1; 0. The residual is computed with the pivots, so that only the first
        starts at W0.
    targets : sequence of str, optional
    """

    def __init__(self, rank=8, alpha=None, start="lu", targets=None):
        super().__init__(targets)
        positive(rank=rank)
        if start not in STARTS:
            raise ValueError(f"start must be one of {', '.join(STARTS)}, not {start!r}")
        self.rank, self.s, self.start = rank, (rank if alpha is None else alpha) / rank, start
        self.starts_at_base = start == "lu"

    def pieces(self, W):
        """Return P L_r [m, r], z0 [r] and U~_r [r, n] of a weight [m, n]."""
        P, L, U = torch.linalg.lu(W.detach().double())
        pivots = U.diagonal()
        kept = (pivots.abs() > 1e-6).nonzero()[: self.rank, 0]  # a tiny pivot would be divided by
        return P @ L[:, kept], pivots[kept], U[kept] / pivots[kept, None]

    def init(self, layer):
        L, z0, U = self.pieces(layer.base.weight.flatten(1))

        def draws(kind):  # on the CPU, so that all devices start alike
            return kind(len(z0), dtype=z0.dtype).to(z0.device)

        z = {
            "lu": lambda: z0,
            "normal": lambda: z0.mean() + z0.std(correction=0) * draws(torch.randn),
            "uniform": lambda: z0.mean() * (draws(torch.rand) - 0.5),
            "constant": lambda: z0.mean().expand(len(z0)),
            "ones": lambda: torch.ones_like(z0),
            "zeros": lambda: torch.zeros_like(z0),
        }[self.start]()
        layer.buffer("L", L)
        layer.buffer("U", U)
        layer.parameter("z", z)
        layer.buffer("s", self.s)
        layer.freeze(layer.base.weight.flatten(1).double() - self.s * (L * z0) @ U)

    def factors(self, layer):
        return layer.L, layer.z, layer.U


class SVDDiagonal(LoLDU):
    """Train the first r singular values: pieces that are orthogonal, and the largest ones."""

    def pieces(self, W):
        U, S, Vh = svd(W)
        return U[:, : self.rank], S[: self.rank], Vh[: self.rank]
