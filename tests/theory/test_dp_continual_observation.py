"""Continual maxima: the mechanisms against plain loops, their privacy, and the reduction."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from miniature.theory.dp_continual_observation import (
    block,
    bursts,
    checkpoint_bound,
    checkpoint_max,
    checkpoint_select,
    crossing,
    factorization,
    hold,
    marginals,
    nodes,
    prefixes,
    reduction_max,
    reduction_stream,
    root_coefficients,
    tree,
    tree_bound,
)
from miniature.theory.privacy import Account, audit

N = 100_000  # runs of an audit
QUIET = 1e300  # a budget that leaves noise below the last bit


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def bits(*shape, seed=0):
    return (torch.rand(shape, generator=rng(seed)) < 0.5).double()


def intervals(t):
    """The dyadic intervals (first, last) that make up 1..t, largest first: the set bits of t."""
    parts, first = [], 1
    for k in range(t.bit_length() - 1, -1, -1):
        if t >> k & 1:
            parts.append((first, first + 2**k - 1))
            first += 2**k
    return parts


def shared(T):
    """How many intervals the prefixes of s and t have in common, [T, T]."""
    sets = [set(intervals(t)) for t in range(1, T + 1)]
    return torch.tensor([[len(a & b) for b in sets] for a in sets], dtype=torch.float64)


def root(T):
    """The lower triangular Toeplitz F with F F = prefix sums, coefficient by coefficient."""
    f = [1.0]
    for k in range(1, T):  # (f * f)_k = 1
        f.append((1 - sum(f[i] * f[k - i] for i in range(1, k))) / 2)
    F = [[f[i - j] if i >= j else 0.0 for j in range(T)] for i in range(T)]
    return torch.tensor(F, dtype=torch.float64)


# The tree


@pytest.mark.parametrize("T", [1, 2, 4, 32, 256])
def test_without_noise_the_tree_is_exact_at_every_step(T):
    x = bits(3, T, 5, seed=T)
    torch.testing.assert_close(prefixes(nodes(x)), x.cumsum(-2), atol=0, rtol=0)
    torch.testing.assert_close(tree(x, QUIET, rng())[0], x.cumsum(-2), atol=1e-12, rtol=0)


@pytest.mark.parametrize("T", [1, 8, 64])
def test_a_record_is_in_one_interval_of_every_level(T):
    levels = nodes(torch.eye(T, dtype=torch.float64)[..., None])  # stream s holds record s alone
    assert len(levels) == math.log2(T) + 1
    for k, level in enumerate(levels):
        assert level.shape == (T, T >> k, 1)
        assert torch.equal(level.squeeze(-1).argmax(-1), torch.arange(T) >> k)
        assert torch.equal((level != 0).sum((-2, -1)), torch.ones(T, dtype=torch.int64))


@pytest.mark.parametrize(("T", "d"), [(1, 2), (16, 1), (32, 3)])
def test_the_tree_is_the_streaming_counter(T, d):
    """Chan, Shi and Song: step t closes one interval, at the lowest set bit of t."""
    x = bits(T, d, seed=T)
    noise = [torch.randn(T >> k, d, generator=rng(k)).double() for k in range(T.bit_length())]
    answers = prefixes([level + z for level, z in zip(nodes(x), noise)])
    exact = [torch.zeros(d).double() for _ in noise]  # of the open interval of every level
    noisy = list(exact)
    for t in range(1, T + 1):
        k = (t & -t).bit_length() - 1
        exact[k] = sum(exact[:k], x[t - 1])
        noisy[k] = exact[k] + noise[k][t // 2**k - 1]
        for lower in range(k):
            exact[lower] = noisy[lower] = torch.zeros(d).double()
        torch.testing.assert_close(answers[t - 1], sum(noisy), atol=1e-12, rtol=0)


def test_the_noise_of_the_tree_is_that_of_its_intervals():
    T, d, rho = 16, 3, 0.7
    counts, _ = tree(torch.zeros(60_000, T, d, dtype=torch.float64), rho, rng(1))
    sigma2 = d * (math.log2(T) + 1) / (2 * rho)
    for j in range(d):
        cov = counts[..., j].T.cov() / sigma2
        torch.testing.assert_close(cov, shared(T), atol=0.08, rtol=0)
    t = torch.arange(1, T + 1)
    ones = sum(t >> k & 1 for k in range(5)).double()  # set bits of t
    torch.testing.assert_close(counts.var(0).mean(-1) / sigma2, ones, rtol=0.02, atol=0)
    assert abs(float((counts[..., 0] * counts[..., 1]).mean())) < 0.05 * sigma2


# The square root


def test_the_square_root_of_prefix_sums():
    T, d, rho = 13, 2, 0.4
    F = root(T)
    torch.testing.assert_close(F @ F, torch.ones(T, T, dtype=torch.float64).tril())
    torch.testing.assert_close(root_coefficients(T), F[:, 0], atol=1e-14, rtol=0)
    x = bits(4, T, d)
    torch.testing.assert_close(factorization(x, QUIET, rng())[0], x.cumsum(-2), atol=1e-12, rtol=0)
    noisy, account = factorization(x.new_zeros(60_000, T, d), rho, rng(1))
    expected = F @ F.T * d * float((F**2).sum(0).max()) / (2 * rho)
    scale = float(expected.max())
    for j in range(d):
        torch.testing.assert_close(noisy[..., j].T.cov(), expected, atol=0.02 * scale, rtol=0)
    assert abs(float((noisy[..., -1, 0] * noisy[..., -1, 1]).mean())) < 0.02 * scale
    assert account.rho == rho


# Checkpoints


@pytest.mark.parametrize(("T", "r"), [(12, 1), (12, 4), (12, 12), (13, 4), (7, 5)])
def test_between_checkpoints_the_answer_stands(T, r):
    top = bits(3, T).cumsum(-1)
    answers, _ = checkpoint_max(top, r, QUIET, rng())
    S = bits(3, T, 4, seed=1).cumsum(-2) + torch.arange(4) / 10  # no ties
    chosen, _ = checkpoint_select(S, r, QUIET, rng())
    assert chosen.dtype == torch.int64
    for i in range(3):
        value, index = 0.0, 0
        for t in range(1, T + 1):
            if t % r == 0:
                value, index = float(top[i, t - 1]), int(S[i, t - 1].argmax())
            assert float(answers[i, t - 1]) == pytest.approx(value, abs=1e-12)
            assert int(chosen[i, t - 1]) == index
    assert torch.equal(hold(torch.ones(T // r), T, r), (torch.arange(1, T + 1) >= r).float())


@pytest.mark.parametrize("r", [1, 5, 10, 40])
def test_the_noise_of_a_checkpoint(r):
    T, rho = 40, 0.3
    answers, _ = checkpoint_max(torch.zeros(4000, T, dtype=torch.float64), r, rho, rng(r))
    released = answers[:, r - 1 :: r]
    sigma = math.sqrt(T / (2 * rho * r))
    assert stats.kstest(released.flatten(), stats.norm(0, sigma).cdf).pvalue > 1e-3
    if r < T:
        assert abs(float((released[:, 0] * released[:, 1]).mean())) < 0.1 * sigma**2


def test_hold_over_is_part_of_the_error():
    top = torch.arange(1.0, 101.0, dtype=torch.float64)  # a record of ones at every step
    answers, _ = checkpoint_max(top, 10, QUIET, rng())
    assert float((answers - top).abs().max()) == pytest.approx(9, abs=1e-12)


def test_selection_is_the_exponential_mechanism():
    T, r, rho = 30, 10, 0.5
    S = torch.tensor([0.0, 2.0, 5.0], dtype=torch.float64).expand(T, 3)
    chosen, _ = checkpoint_select(S.expand(30_000, T, 3), r, rho, rng())
    epsilon = math.sqrt(8 * rho * r / T)
    expected = torch.softmax(epsilon * S[0] / 2, 0)
    for b in range(3):
        shares = chosen[:, r * (b + 1) - 1].bincount(minlength=3) / 30_000
        torch.testing.assert_close(shares.double(), expected, atol=0.012, rtol=0)


def test_the_block_length():
    assert block(2**15, 0.5) == 40 and block(1000, 1.0) == 10
    assert block(10, 1e-9) == 10 and block(10, 1e9) == 1


# Privacy


@pytest.mark.parametrize("rho", [0.01, 0.5, 7.0])
def test_every_mechanism_spends_rho(rho):
    x = bits(64, 5)
    S = x.cumsum(-2)
    accounts = [tree(x, rho, rng())[1], factorization(x, rho, rng())[1]]
    for r in (1, 7, 8, 64):  # 7 does not divide 64
        accounts += [checkpoint_max(S.amax(-1), r, rho, rng())[1]]
        accounts += [checkpoint_select(S, r, rho, rng())[1]]
    for account in accounts:
        assert account.rho == pytest.approx(rho, rel=1e-12)


def test_answers_do_not_look_ahead():
    x = bits(16, 3)
    later = x.clone()
    later[9:] = 1 - later[9:]
    S, S_later = x.cumsum(-2), later.cumsum(-2)
    runs = [
        (tree(x, 0.5, rng())[0], tree(later, 0.5, rng())[0]),
        (factorization(x, 0.5, rng())[0], factorization(later, 0.5, rng())[0]),
        tuple(checkpoint_max(v.amax(-1), 3, 0.5, rng())[0] for v in (S, S_later)),
        tuple(checkpoint_select(v, 3, 0.5, rng())[0] for v in (S, S_later)),
    ]
    for a, b in runs:
        assert torch.equal(a[:9], b[:9])
    assert not torch.equal(runs[0][0][9:], runs[0][1][9:])


def test_no_record_moves_more_than_is_charged():
    """All streams of 4 records of 2 bits, any record replaced by any other."""
    T, d = 4, 2
    x = torch.cartesian_prod(*[torch.tensor([0.0, 1.0]).double()] * (T * d)).view(-1, T, d)
    F = root(T)
    records = torch.cartesian_prod(*[torch.tensor([0.0, 1.0]).double()] * d)
    top, score, node, column = [], [], [], []
    for s in range(T):
        for record in records:
            y = x.clone()
            y[:, s] = record
            S, S_y = x.cumsum(-2), y.cumsum(-2)
            top.append((S.amax(-1) - S_y.amax(-1)).abs().max())
            score.append((S - S_y).abs().max())
            # all intervals of a level together, since every level is charged once
            node += [(a - b).norm(dim=(-2, -1)).max() for a, b in zip(nodes(x), nodes(y))]
            column.append((F @ (x - y)).norm(dim=(-2, -1)).max())
    assert max(top) == max(score) == 1
    assert float(max(node)) == pytest.approx(math.sqrt(d))
    assert float(max(column)) == pytest.approx(math.sqrt(d) * float(root_coefficients(T).norm()))


T_AUDIT, D_AUDIT, RHO, DELTA = 8, 4, 0.25, 1e-3


def neighbors(first=0.0):
    """Two streams that differ in their first record: all `first`, against all ones."""
    x = bits(T_AUDIT, D_AUDIT, seed=3)
    y = x.clone()
    x[0], y[0] = first, 1.0
    return x, y


def gaussian_evidence(release, covariance, x, y):
    """Neyman-Pearson for N(S(x), C) against N(S(y), C) in each of d coordinates: shift C^-1 out."""
    weights = torch.linalg.solve(covariance, (y - x).cumsum(-2))
    return [
        torch.cat(
            [
                (release(v.expand(N // 4, *v.shape), rng(4 * i + part))[0] * weights).sum((-2, -1))
                for part in range(4)
            ]
        )
        for i, v in enumerate((x, y))
    ]


def max_evidence(r, rho):
    x, y = (v.cumsum(-2).amax(-1) for v in neighbors())
    weights = (y - x)[r - 1 :: r]
    return [
        checkpoint_max(v.expand(N, -1), r, rho, rng(i))[0][:, r - 1 :: r] @ weights
        for i, v in enumerate((x, y))
    ]


def select_evidence(r, rho):
    """One score falls, all others rise: nearly the worst case. Odds by the closed-form softmax."""
    x, y = (v.clone() for v in neighbors())
    x[0], y[0] = torch.tensor([1.0, 0, 0, 0]), torch.tensor([0.0, 1, 1, 1])
    x[1:] = 0
    x[1 : T_AUDIT // 2, 0] = 1
    y[1:] = x[1:]
    S = [v.cumsum(-2) for v in (x, y)]
    epsilon = math.sqrt(8 * rho / (T_AUDIT // r))
    odds = [torch.log_softmax(epsilon * s[r - 1 :: r] / 2, -1) for s in S]
    odds = odds[1] - odds[0]  # [checkpoints, d]
    out = []
    for i, s in enumerate(S):
        chosen = checkpoint_select(s.expand(N, -1, -1), r, rho, rng(i))[0][:, r - 1 :: r]
        out.append(odds.gather(1, chosen.T).sum(0))
    return out


def tree_evidence(rho):
    return gaussian_evidence(lambda v, g: tree(v, rho, g), shared(T_AUDIT), *neighbors())


def root_evidence(rho):
    F = root(T_AUDIT)
    return gaussian_evidence(lambda v, g: factorization(v, rho, g), F @ F.T, *neighbors())


CLAIMED = Account().zcdp(RHO).epsilon(DELTA)
SOUND = {
    "tree": lambda: tree_evidence(RHO),
    "square root": lambda: root_evidence(RHO),
    "checkpoint max": lambda: max_evidence(2, RHO),
    "per-step max": lambda: max_evidence(1, RHO),
    "checkpoint select": lambda: select_evidence(2, RHO),
    "per-step select": lambda: select_evidence(1, RHO),
}
BROKEN = {  # the budget that each error amounts to
    "tree, sensitivity of one coordinate": lambda: tree_evidence(RHO * D_AUDIT),
    "tree, one level of many": lambda: tree_evidence(RHO * (math.log2(T_AUDIT) + 1)),
    "square root, sensitivity of one coordinate": lambda: root_evidence(RHO * D_AUDIT),
    "max, rho at every checkpoint": lambda: max_evidence(2, RHO * T_AUDIT / 2),
    "select, rho at every step": lambda: select_evidence(1, RHO * T_AUDIT),
}


@pytest.mark.parametrize("name", SOUND)
def test_an_audit_does_not_contradict_the_claimed_privacy(name):
    on_x, on_y = SOUND[name]()
    found = audit(on_x, on_y, DELTA)
    assert 0.5 * CLAIMED < found <= CLAIMED
    if "select" not in name:  # nothing is wasted: N(0, 1) against N(sqrt(2 rho), 1)
        apart = float((on_y.mean() - on_x.mean()) / on_x.std())
        assert apart == pytest.approx(math.sqrt(2 * RHO), abs=0.02)


@pytest.mark.parametrize("name", BROKEN)
def test_an_audit_catches_a_broken_mechanism(name):
    assert audit(*BROKEN[name](), DELTA) > 1.1 * CLAIMED


@pytest.mark.parametrize(("rho", "holds"), [(RHO, True), (RHO * T_AUDIT / 2, False)])
def test_privacy_against_a_stream_that_reacts(rho, holds):
    """The adversary sends a record of ones after an answer above t / 2, else one of zeros.

    Answers do not look ahead, so running again with the same noise on the longer stream continues
    the same run.
    """
    r, sides = 2, []
    for i in (0, 1):
        x = torch.zeros(N, T_AUDIT, dtype=torch.float64)  # all coordinates alike
        x[:, 0] = i
        for t in range(r, T_AUDIT):
            answers, _ = checkpoint_max(x.cumsum(-1), r, rho, rng(i))
            x[:, t] = (answers[:, t - 1] > t / 2).double()
        answers, _ = checkpoint_max(x.cumsum(-1), r, rho, rng(i))
        chosen = (x.cumsum(-1) - i)[:, r - 1 :: r]  # what the adversary knows
        sides.append((answers[:, r - 1 :: r] - chosen).sum(-1))
    assert (audit(*sides, DELTA) <= CLAIMED) == holds


# The reduction

SHAPES = {"n": st.integers(1, 6), "d": st.integers(1, 5), "extra": st.integers(0, 9)}


@given(seed=st.integers(0, 10**6), **SHAPES)
@settings(max_examples=60, deadline=None)
def test_the_reduction_stream(seed, n, d, extra):
    y = bits(2, n, d, seed=seed)
    T = n + 2 * n * d + extra
    x = reduction_stream(y, T)
    for i in range(2):
        rows = y[i].tolist()
        for j in range(d):
            rows += [[float(k == j) for k in range(d)]] * n
            rows += [[float(k != j) for k in range(d)]] * n
        rows += [[0.0] * d] * extra
        assert x[i].tolist() == rows
    S = x.cumsum(-2)
    torch.testing.assert_close(reduction_max(y, T), S.amax(-1), atol=0, rtol=0)
    start = y.sum(-2)
    for j in range(1, d + 1):
        lead = S[:, n + 2 * n * (j - 1) + n - 1]
        assert torch.equal(lead[:, j - 1], lead.amax(-1))  # j leads
        assert torch.equal(S[:, n + 2 * n * j - 1], start + n * j)  # and the field is level again
    torch.testing.assert_close(marginals(S.amax(-1), n, d), start, atol=0, rtol=0)


@pytest.mark.parametrize("d", [1, 3, 8])
def test_recovered_marginals_are_as_good_as_the_maxima(d):
    T, n = 128, 128 // (2 * d + 1)
    y = bits(40, n, d, seed=d)
    x, top = reduction_stream(y, T), reduction_max(y, T)
    for answers in (
        checkpoint_max(top, 6, 0.5, rng(1))[0],
        checkpoint_max(top, 1, 0.5, rng(2))[0],
        tree(x, 0.5, rng(3))[0].amax(-1),
        factorization(x, 0.5, rng(4))[0].amax(-1),
    ):
        alpha = (answers - top).abs().amax(-1, keepdim=True)
        error = (marginals(answers, n, d) - y.sum(-2)).abs()
        assert (error <= alpha + 1e-9).all()
        assert (error > 0.05 * alpha).any()  # not for free


def test_bursts():
    x = bursts(10, 3, 2)
    assert x.argmax(-1).tolist() == [0, 0, 1, 1, 2, 2, 0, 0, 1, 1]
    assert torch.equal(x.sum(-1), torch.ones(10))


# Bounds


def test_the_bounds():
    sigma = math.sqrt(1000 / (2 * 0.5 * 10))
    assert checkpoint_bound(1000, 10, 0.5) == pytest.approx(
        10 + sigma * math.sqrt(2 * math.log(100)), rel=1e-12
    )
    # a single release has noise, too
    assert checkpoint_bound(8, 8, 0.5) == pytest.approx(8 + math.sqrt(2 * math.log(2)), rel=1e-12)
    sigma = math.sqrt(4 * 11 / (2 * 0.5))
    assert tree_bound(1024, 4, 0.5) == pytest.approx(
        sigma * math.sqrt(10) * math.sqrt(2 * math.log(4096)), rel=1e-12
    )
    for T in (2**5, 2**8, 2**20):
        d = crossing(T, 0.5)
        r = (T / 0.5) ** (1 / 3)
        assert tree_bound(T, d, 0.5) == pytest.approx(checkpoint_bound(T, r, 0.5), rel=1e-9)


def test_errors_stay_near_their_bounds():
    T, rho, d = 1024, 0.5, 8
    y = bits(100, T // (2 * d + 1), d)
    top, r = reduction_max(y, T), block(T, rho)
    error = (checkpoint_max(top, r, rho, rng(1))[0] - top).abs().amax(-1)
    assert 0.5 * checkpoint_bound(T, r, rho) < error.mean() < checkpoint_bound(T, r, rho)
    error = (tree(reduction_stream(y, T), rho, rng(1))[0].amax(-1) - top).abs().amax(-1)
    assert 0.3 * tree_bound(T, d, rho) < error.mean() < tree_bound(T, d, rho)


# What is refused


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="power of two, not 12: pad"):
        tree(bits(12, 2), 1.0, rng())
    for r in (0, 9, 2.5):
        with pytest.raises(ValueError, match=f"from 1 to T = 8, not {r}"):
            checkpoint_max(torch.zeros(8), r, 1.0, rng())
        with pytest.raises(ValueError, match=f"from 1 to T = 8, not {r}"):
            checkpoint_select(torch.zeros(8, 2), r, 1.0, rng())
    for f in (reduction_stream, reduction_max):
        for n, steps in ((3, 15), (0, 0)):
            with pytest.raises(
                ValueError, match=f"{n} rows of 2 bits take {steps} steps, not from 1 to T = 14"
            ):
                f(bits(n, 2), 14)
    with pytest.raises(ValueError, match="rho must be positive, not 0"):
        tree(bits(4, 2), 0.0, rng())


@pytest.mark.gpu
def test_the_same_laws_on_a_gpu():
    g = torch.Generator("cuda").manual_seed(0)
    y = bits(200, 30, 8).float()
    T, rho = 1024, 0.5
    x, top = reduction_stream(y.cuda(), T), reduction_max(y.cuda(), T)
    assert torch.equal(top.cpu(), reduction_max(y, T))
    pairs = [
        (tree(x, rho, g)[0], tree(x.cpu(), rho, rng())[0]),
        (factorization(x, rho, g)[0], factorization(x.cpu(), rho, rng())[0]),
        (checkpoint_max(top, 13, rho, g)[0], checkpoint_max(top.cpu(), 13, rho, rng())[0]),
    ]
    for there, here in pairs:
        assert there.device.type == "cuda"
        truth = x.cumsum(-2) if there.ndim == 3 else top
        ratio = (there - truth).std().item() / (here - truth.cpu()).std().item()
        assert ratio == pytest.approx(1, abs=0.05)
    chosen = checkpoint_select(x.cumsum(-2), 13, QUIET, g)[0]
    torch.testing.assert_close(
        chosen.cpu(), checkpoint_select(x.cpu().cumsum(-2), 13, QUIET, rng())[0]
    )
