"""Differential privacy: mechanisms, their account, and an audit that can catch a broken one.

The account is kept in zero-concentrated privacy (zCDP, Bun and Steinke 2016): a mechanism is
rho-zCDP if the Renyi divergence of order a between its outputs on neighboring inputs is at most
rho a, for all a > 1. Rhos add up under (adaptive) composition.
"""

import math

import torch


def gaussian(value, sensitivity, rho, generator):
    """Add N(0, sensitivity^2 / (2 rho)) to every entry: rho-zCDP for this l2 sensitivity."""
    _positive(sensitivity=sensitivity, rho=rho)
    noise = torch.randn(value.shape, generator=generator, dtype=value.dtype, device=value.device)
    return value + noise * (sensitivity / math.sqrt(2 * rho))


def laplace(value, sensitivity, epsilon, generator):
    """Add Laplace noise of scale sensitivity / epsilon: epsilon-DP for this l1 sensitivity."""
    _positive(sensitivity=sensitivity, epsilon=epsilon)
    u = torch.rand(value.shape, generator=generator, dtype=value.dtype, device=value.device) - 0.5
    # 1 - 2 |u| is 0 once in 2^53 draws, and its logarithm infinite
    log = torch.log((1 - 2 * u.abs()).clamp(min=torch.finfo(u.dtype).tiny))
    return value - (sensitivity / epsilon) * u.sign() * log


def noisy_max(scores, sensitivity, epsilon, generator):
    """Return the index [...] of the largest of scores [..., d] plus Gumbel noise of scale
    2 sensitivity / epsilon.

    That is the exponential mechanism, P(j) proportional to exp(epsilon score_j / (2 sensitivity)):
    epsilon-DP, and epsilon^2 / 8-zCDP (Cesar and Rogers 2021), if one record moves every score by
    at most `sensitivity`.
    """
    _positive(sensitivity=sensitivity, epsilon=epsilon)
    e = torch.empty_like(scores).exponential_(generator=generator)
    return (scores - (2 * sensitivity / epsilon) * torch.log(e)).argmax(-1)


def _positive(**values):
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name} must be positive, not {value}")


class Account:
    """The zCDP that a composition of mechanisms has spent.

    Attributes
    ----------
    rho : float
    """

    def __init__(self):
        self.rho = 0.0

    def zcdp(self, rho, times=1):
        """Spend rho, `times` times over."""
        self.rho += rho * times
        return self

    def pure(self, epsilon, times=1):
        """Spend an epsilon-DP mechanism, epsilon^2 / 2-zCDP (Bun and Steinke, Proposition 1.4)."""
        return self.zcdp(epsilon**2 / 2, times)

    def exponential(self, epsilon, times=1):
        """Spend an exponential mechanism of epsilon, epsilon^2 / 8-zCDP."""
        return self.zcdp(epsilon**2 / 8, times)

    def epsilon(self, delta):
        """Return epsilon of (epsilon, delta)-DP: Canonne, Kamath and Steinke 2020, Corollary 13.

        The least over orders a > 1 of
        rho a + ln(1 / (a delta)) / (a - 1) + ln(1 - 1 / a).
        """
        if not 0 < delta < 1:
            raise ValueError(f"delta must lie in (0, 1), not {delta}")
        if self.rho == 0:
            return 0.0
        a = 1 + torch.logspace(-4, 6, 20_001, dtype=torch.float64)
        eps = self.rho * a - (torch.log(a) + math.log(delta)) / (a - 1) + torch.log1p(-1 / a)
        return max(float(eps.min()), 0.0)


def audit(on_x, on_y, delta=0.0, level=0.95):
    """Bound epsilon from below by what a test tells apart: the audit of a claimed guarantee.

    (epsilon, delta)-DP means P(M(x) in E) <= exp(epsilon) P(M(y) in E) + delta for every event E,
    so the outputs on neighboring inputs bound epsilon by ln((P(M(x) in E) - delta) / P(M(y) in E)).
    The event, a threshold on the statistic, is chosen on the first half of the runs; the second
    half gives Clopper-Pearson bounds of both probabilities, so that a true guarantee is refuted
    with probability at most 1 - level. The sharpest statistic is the log-likelihood ratio (Neyman
    and Pearson); for Gaussian noise it is the projection of the output on the difference of means.

    Parameters
    ----------
    on_x, on_y : torch.Tensor, shape [n]
        A statistic of the output on either of two neighboring inputs, over n runs.
    delta : float
    level : float
        Confidence of the bound.

    Returns
    -------
    float
        A lower bound of epsilon, at least 0. A claimed epsilon below it is refuted.

    Raises
    ------
    ValueError
        If the runs are not paired in number or fewer than 100.
    """
    from scipy.special import betaincinv

    if on_x.ndim != 1 or on_x.shape != on_y.shape or len(on_x) < 100:
        raise ValueError(
            f"needs the same n >= 100 runs on both inputs, got {list(on_x.shape)} and "
            f"{list(on_y.shape)}"
        )
    n = len(on_x) // 2
    miss = (1 - level) / 2  # one half for each of the two probabilities

    def bound(k, m):
        """ln((p - delta) / q) with p and q at the near ends of their intervals."""
        k, m = k.double().cpu().numpy(), m.double().cpu().numpy()
        p = betaincinv(k.clip(1e-9), n - k + 1, miss) * (k > 0)
        q = betaincinv(m + 1, (n - m).clip(1e-9), 1 - miss) * (m < n) + (m >= n)
        ratio = (p - delta).clip(0) / q
        return torch.from_numpy(ratio).log()

    best, chosen = -math.inf, None
    train = torch.cat([on_x[:n], on_y[:n]]).unique()
    cuts = train[torch.linspace(0, len(train) - 1, 400).long()].unique()
    for above in (True, False):
        for first, second in ((on_x, on_y), (on_y, on_x)):
            k, m = (_count(v[:n], cuts, above) for v in (first, second))
            value, at = bound(k, m).max(0)
            if value > best:
                best, chosen = float(value), (first, second, cuts[at][None], above)
    if chosen is None:
        return 0.0
    first, second, cut, above = chosen
    k, m = (_count(v[n : 2 * n], cut, above) for v in (first, second))
    return max(float(bound(k, m)), 0.0)


def _count(values, cuts, above):
    """How many values are at least (or at most) each cut."""
    values = values.sort().values
    if above:
        return len(values) - torch.searchsorted(values, cuts)
    return torch.searchsorted(values, cuts, right=True)
