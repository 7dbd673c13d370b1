"""Mechanisms keep their promise, the account adds up, and the audit catches what is broken."""

import math

import pytest
import torch

from miniature.theory.privacy import Account, audit, gaussian, laplace, noisy_max

N = 200_000


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def test_noise_has_its_law():
    from scipy import stats

    zero = torch.zeros(N, dtype=torch.float64)
    z = gaussian(zero, 3.0, 0.5, rng())
    assert stats.kstest(z, stats.norm(0, 3.0).cdf).pvalue > 1e-3
    z = laplace(zero, 3.0, 0.5, rng())
    assert stats.kstest(z, stats.laplace(0, 6.0).cdf).pvalue > 1e-3
    for f in (gaussian, laplace):
        with pytest.raises(ValueError, match="must be positive, not 0"):
            f(zero, 0, 1.0, rng())


def test_noisy_max_is_the_exponential_mechanism():
    scores = torch.tensor([0.0, 1.0, 3.0], dtype=torch.float64)
    shares = noisy_max(scores.expand(N, 3), 2.0, 1.5, rng()).bincount(minlength=3) / N
    expected = torch.softmax(1.5 * scores / (2 * 2.0), 0)
    torch.testing.assert_close(shares.double(), expected, atol=4 * 0.5 / math.sqrt(N), rtol=0)


def test_the_account():
    account = Account().zcdp(0.1, 3).pure(0.2).exponential(0.4, 2)
    assert account.rho == pytest.approx(0.3 + 0.02 + 0.04, abs=1e-15)
    assert Account().epsilon(1e-6) == 0
    rho, delta = 0.5, 1e-6
    epsilon = Account().zcdp(rho).epsilon(delta)
    simple = rho + 2 * math.sqrt(rho * math.log(1 / delta))  # Bun and Steinke, Proposition 1.3
    assert 0.8 * simple < epsilon < simple
    # The exact privacy of the Gaussian mechanism (Balle and Wang 2018) may not be worse.
    from scipy.stats import norm

    mu = math.sqrt(2 * rho)
    exact = norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * norm.cdf(-mu / 2 - epsilon / mu)
    assert exact < delta < 10 * exact
    with pytest.raises(ValueError, match="delta"):
        Account().epsilon(0)


@pytest.mark.parametrize("epsilon", [0.5, 1.0, 2.0])
def test_an_audit_does_not_contradict_a_true_guarantee(epsilon):
    zero, one = torch.zeros(N, dtype=torch.float64), torch.ones(N, dtype=torch.float64)
    found = audit(laplace(zero, 1.0, epsilon, rng(1)), laplace(one, 1.0, epsilon, rng(2)))
    assert 0.9 * epsilon < found <= epsilon
    # one score rises, all others fall: of 20 candidates nearly the worst case
    level, moved = torch.zeros(N // 4, 20).double(), -torch.ones(N // 4, 20).double()
    moved[:, 7] = 1
    picked = [noisy_max(v, 1.0, epsilon, rng(i)) == 7 for i, v in enumerate((level, moved))]
    assert 0.6 * epsilon < audit(*(p.double() for p in picked)) <= epsilon


def test_an_audit_errs_at_most_at_its_level():
    wrong = 0
    for seed in range(200):
        x = laplace(torch.zeros(2000, dtype=torch.float64), 1.0, 1.0, rng(2 * seed))
        y = laplace(torch.ones(2000, dtype=torch.float64), 1.0, 1.0, rng(2 * seed + 1))
        wrong += audit(x, y) > 1.0
    assert wrong <= 10


def test_an_audit_with_delta():
    rho, delta = 0.5, 0.01
    x = gaussian(torch.zeros(N, dtype=torch.float64), 1.0, rho, rng(1))
    y = gaussian(torch.ones(N, dtype=torch.float64), 1.0, rho, rng(2))
    found, claimed = audit(x, y, delta), Account().zcdp(rho).epsilon(delta)
    assert 0.7 * claimed < found <= claimed


BROKEN = {  # mechanism, and the statistic that gives it away
    "half the sensitivity": (lambda v, g: laplace(v, 0.5, 1.0, g), lambda out: out),
    "one-sided noise": (lambda v, g: laplace(v, 1.0, 1.0, g).clamp(min=v), lambda out: out),
    "now and then no noise": (
        lambda v, g: torch.where(torch.rand(len(v), generator=g) < 0.02, v, laplace(v, 1, 1, g)),
        lambda out: (out == 0).double(),
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_an_audit_catches_a_broken_mechanism(name):
    mechanism, statistic = BROKEN[name]
    on = [mechanism(torch.full((N,), v, dtype=torch.float64), rng(i)) for i, v in enumerate((0, 1))]
    assert audit(*map(statistic, on)) > 1.1  # of a claimed epsilon of 1


def test_forgetting_that_a_record_moves_every_coordinate():
    d, rho, delta = 16, 0.1, 1e-3
    shift = torch.ones(d, dtype=torch.float64) / math.sqrt(d)  # the direction of the difference
    zero = torch.zeros(N, d, dtype=torch.float64)
    claimed = Account().zcdp(rho).epsilon(delta)
    for sensitivity, holds in ((math.sqrt(d), True), (1.0, False)):
        x, y = (gaussian(zero + i, sensitivity, rho, rng(i)) @ shift for i in (0, 1))
        assert (audit(x, y, delta) <= claimed) == holds


def test_bad_audits_are_refused():
    with pytest.raises(ValueError, match="n >= 100"):
        audit(torch.zeros(10), torch.zeros(10))


def test_no_difference_no_epsilon():
    x = torch.zeros(1000)
    assert audit(x, x) == 0
