"""Attacks, and aggregation rules that withstand them.

An aggregation rule maps what clients sent, [S, A, P], and who is present, [S, A], to one vector per
run, [S, P]. An attack maps what honest clients would have sent to what malicious ones send.
"""

import torch


def mean(v, present):
    """Mean over the clients that are present; zero where nobody is.

    Parameters
    ----------
    v : torch.Tensor, shape [S, A, P]
    present : torch.Tensor of bool, shape [S, A]

    Returns
    -------
    torch.Tensor, shape [S, P]
    """
    weight = present.to(v.dtype)
    return torch.einsum("sap,sa->sp", v, weight / weight.sum(1, keepdim=True).clamp(min=1))


def median(v, present):
    """Coordinate-wise median (Yin et al. 2018); the mean of the middle two for an even number."""
    return _between(v, present, lambda n: ((n - 1) // 2, n // 2 + 1))


class TrimmedMean:
    """Coordinate-wise mean without the `trim` largest and smallest values (Yin et al. 2018).

    Parameters
    ----------
    trim : int
        How many values to drop at each end; less than half of the clients.
    """

    def __init__(self, trim):
        if trim < 0:
            raise ValueError(f"trim must not be negative, got {trim}")
        self.trim = trim

    def __call__(self, v, present):
        if (present.sum(1) <= 2 * self.trim).any():
            raise ValueError(
                f"trim = {self.trim} leaves nobody of {int(present.sum(1).min())} clients"
            )
        return _between(v, present, lambda n: (self.trim + 0 * n, n - self.trim))


def _between(v, present, ends):
    """Mean of the sorted values from position `a` up to `b`, per coordinate."""
    n = present.sum(1)
    a, b = ends(n)
    ordered = v.masked_fill(~present[..., None], torch.inf).sort(1).values
    at = torch.arange(v.shape[1], device=v.device)
    kept = (at >= a[:, None]) & (at < b[:, None]) & (at < n[:, None])
    total = torch.where(kept[..., None], ordered, 0).sum(1)
    return total / (b - a).clamp(min=1).to(v.dtype)[:, None]


class Krum:
    """The `m` vectors closest to their neighbors, averaged (Blanchard et al. 2017).

    A vector's score is the sum of squared distances to its n - f - 2 nearest others; m = 1 is
    Krum, m > 1 multi-Krum.

    Parameters
    ----------
    f : int
        How many clients may be malicious; needs n >= f + 3.
    m : int
        How many of the best vectors are averaged.
    """

    def __init__(self, f, m=1):
        if f < 0 or m < 1:
            raise ValueError(f"Krum needs f >= 0 and m >= 1, got f = {f}, m = {m}")
        self.f, self.m = f, m

    def __call__(self, v, present):
        n = present.sum(1)
        if (n < max(self.f + 3, self.m)).any():
            raise ValueError(
                f"Krum with f = {self.f}, m = {self.m} is undefined for {int(n.min())} clients"
            )
        d = torch.cdist(v, v).square()
        absent = ~present
        d = d.masked_fill(absent[:, None, :] | absent[:, :, None], torch.inf)
        d.diagonal(dim1=1, dim2=2).fill_(torch.inf)
        near = d.sort(-1).values
        at = torch.arange(v.shape[1], device=v.device)
        kept = at < (n - self.f - 2)[:, None, None]
        score = torch.where(kept, near, 0).sum(-1).masked_fill(absent, torch.inf)
        best = score.topk(self.m, dim=1, largest=False).indices
        return v.gather(1, best[..., None].expand(-1, -1, v.shape[-1])).mean(1)


class Attack:
    """Malicious clients: the first `malicious` ones of every run.

    Parameters
    ----------
    malicious : int
        Number of malicious clients.
    kind : {"sign flip", "gaussian", "free rider"}
        Send ``-scale`` times the honest vector, noise of standard deviation `scale`, or zeros.
        (Label flipping is a property of the data: see `Classification`.)
    scale : float
    """

    KINDS = ("sign flip", "gaussian", "free rider")

    def __init__(self, malicious, kind, scale=1.0):
        if kind not in self.KINDS:
            raise ValueError(f"unknown attack {kind!r}: use one of {', '.join(self.KINDS)}")
        if malicious < 0:
            raise ValueError(f"malicious must not be negative, got {malicious}")
        self.malicious, self.kind, self.scale = malicious, kind, scale

    def __call__(self, v, active, draw):
        """Return what is sent: `v` [S, A, P] with the malicious rows replaced; `active` [S, A]."""
        if self.kind == "sign flip":
            bad = -self.scale * v
        elif self.kind == "gaussian":
            bad = self.scale * draw.normal(v)
        else:
            bad = torch.zeros_like(v)
        return torch.where((active < self.malicious)[..., None], bad, v)
