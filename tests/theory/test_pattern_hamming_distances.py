from collections import Counter

import numpy as np
import pytest
import torch
from scipy.signal import fftconvolve

from miniature.theory import pattern_hamming_distances as phd
from miniature.theory.counting import fft_ops
from miniature.theory.pattern_hamming_distances import BITS, correlate, distances, operations

RULES = ["lists", "fft", "best", "packed", 0, 3, 10.5]


def instance(S, n, m, sigma, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(sigma, (S, n), generator=g), torch.randint(sigma, (S, m), generator=g)


def plain(text, pattern):
    """The definition, a double loop."""
    n, m = len(text), len(pattern)
    return [sum(text[i + j] != pattern[j] for j in range(m)) for i in range(n - m + 1)]


# Exact distances


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "S, n, m, sigma",
    [(30, 40, 7, 3), (9, 33, 33, 4), (5, 20, 1, 2), (3, 150, 64, 90), (4, 97, 40, 1)],
)
def test_distances_are_those_of_a_double_loop(rule, S, n, m, sigma):
    T, P = instance(S, n, m, sigma)
    D = distances(T, P, rule)
    assert D.shape == (S, n - m + 1) and D.dtype == torch.int64
    assert D.tolist() == [plain(t, p) for t, p in zip(T.tolist(), P.tolist())]
    assert (phd.naive(T, P) == D).all()


@pytest.mark.parametrize("rule", RULES)
def test_a_long_pattern_against_scipy(rule):
    T, P = instance(2, 5000, 1024, 5)
    for t, p, D in zip(T.numpy(), P.numpy(), distances(T, P, rule).numpy()):
        matches = sum(fftconvolve(t == c, (p == c)[::-1].astype(float), "valid") for c in range(5))
        assert (D == 1024 - matches.round()).all()


def test_any_integers_are_letters():
    T, P = instance(4, 60, 10, 6)
    names = torch.tensor([-7, 10**12, 0, 3, -(10**15), 8])
    assert (distances(names[T], names[P]) == distances(T, P)).all()


def test_letters_of_the_text_alone_or_the_pattern_alone_never_match():
    T, P = torch.zeros(1, 20, dtype=torch.int64), torch.ones(1, 5, dtype=torch.int64)
    for rule in RULES:
        ops = Counter()
        assert (distances(T, P, rule, ops) == 5).all() and sum(ops.values()) == 0


def test_every_match_is_counted_by_exactly_one_of_the_two_ways():
    T, P = instance(3, 200, 30, 4)
    T, P, _, occ_P = phd.occurrences(T, P)
    light = torch.tensor([[True, False, True, False]]).expand(3, -1)
    both = phd.by_lists(T, P, occ_P, light) + phd.by_correlation(T, P, (~light).long(), 1)
    assert (both == 30 - phd.naive(T, P)).all()
    only = phd.by_lists(T, P, occ_P, light)
    expected = [
        [sum(a == b and a % 2 == 0 for a, b in zip(t[i:], p)) for i in range(171)]
        for t, p in zip(T.tolist(), P.tolist())
    ]
    assert only.tolist() == expected


def test_occurrences():
    T, P = torch.tensor([[5, 5, 9, 2], [2, 2, 2, 2]]), torch.tensor([[9, 5], [7, 2]])
    T, P, occ_T, occ_P = phd.occurrences(T, P)
    assert T.tolist() == [[1, 1, 3, 0], [0, 0, 0, 0]] and P.tolist() == [[3, 1], [2, 0]]
    assert occ_T.tolist() == [[1, 2, 0, 1], [4, 0, 0, 0]]
    assert occ_P.tolist() == [[0, 1, 0, 1], [1, 0, 1, 0]]


# Correlations and packed words


@pytest.mark.parametrize("n, m", [(50, 7), (64, 64), (1000, 90), (30, 1), (517, 128)])
def test_correlation_of_any_numbers(n, m):
    g = torch.Generator().manual_seed(1)
    x, y = (torch.randn(3, v, generator=g, dtype=torch.float64) for v in (n, m))
    z, exact = correlate(x, y)
    expected = np.stack([np.correlate(a, b, "valid") for a, b in zip(x.numpy(), y.numpy())])
    assert z.shape == (3, n - m + 1) and exact.all()
    np.testing.assert_allclose(z.numpy(), expected, atol=1e-11)


@pytest.mark.parametrize("k", [2, 3, 4, 5])
@pytest.mark.parametrize("n, m", [(50, 7), (64, 64), (1000, 90), (30, 1), (517, 128), (3000, 1025)])
def test_packed_words_hold_the_same_correlation(k, n, m):
    g = torch.Generator().manual_seed(2)
    x, y = ((torch.rand(3, v, generator=g) < 0.1).double() for v in (n, m))
    z, exact = correlate(x, y, k)
    expected = np.stack([np.correlate(a, b, "valid") for a, b in zip(x.numpy(), y.numpy())])
    assert exact.all() and (z.numpy() == expected).all()


@pytest.mark.parametrize("k", [2, 3, 4, 5])
def test_the_certificate_is_given_up_to_the_last_count_a_digit_holds(k):
    """All ones: every sum over a full window is m, which fits into b bits up to 2^b - 1."""
    most = 2 ** BITS[k] - 1 if k > 2 else 5000
    for m in {most, most + 1}:
        x, y = torch.ones(1, 3 * m, dtype=torch.float64), torch.ones(1, m, dtype=torch.float64)
        z, exact = correlate(x, y, k)
        fits = k == 2 or m == most
        assert exact.item() == fits and (not fits or (z == m).all())


def test_a_certificate_is_never_wrong():
    wrong = 0
    g = torch.Generator().manual_seed(3)
    for share in (0.2, 0.45, 0.6, 0.9):
        x, y = ((torch.rand(40, v, generator=g) < share).double() for v in (300, 64))
        truth = correlate(x, y)[0].round()
        for k in (3, 4, 5):
            z, exact = correlate(x, y, k)
            right = (z == truth).all(1)
            assert right[exact].all()
            wrong += int((~right).sum())
    assert wrong > 0, "no digit ever overflowed: the test shows nothing"


def test_overflowing_digits_cost_a_repetition_and_not_the_answer():
    """A periodic text: all matches of a letter fall on few shifts, far above their mean."""
    P = (torch.arange(600) % 30 == 0).long() + 2 * (torch.arange(600) % 30 == 1).long()
    T = P.repeat(4)[None]
    T, P, occ_T, _ = phd.occurrences(T, P[None])
    k = torch.full_like(occ_T, 5)
    ops = Counter()
    found = phd.by_correlation(T, P, k, 5, ops)
    assert (found == 600 - phd.naive(T, P)).all()
    assert ops["5 a word"] == 3 * phd.correlation_ops(2400, 600, 5) and ops["4 a word"] > 0
    assert "1 a word" not in ops


# Plans and counts


def test_plans():
    occ_T, occ_P = torch.tensor([[4000, 900, 96, 4, 0]]), torch.tensor([[487, 40, 2, 0, 3]])
    plans = {rule: phd.plan(occ_T, occ_P, 5000, 545, rule) for rule in RULES}
    assert plans["lists"].tolist() == [[0, 0, 0, 0, 0]]
    assert plans["fft"].tolist() == plans[0].tolist() == [[1, 1, 1, 0, 0]]
    assert plans[3].tolist() == plans[10.5].tolist() == [[1, 1, 0, 0, 0]]
    assert phd.plan(occ_T, occ_P, 5000, 545, 40).tolist() == [[1, 0, 0, 0, 0]]  # more than theta
    assert plans["best"].tolist() == [[1, 0, 0, 0, 0]]  # 36,000 pairs cost less than an FFT
    assert plans["packed"].tolist() == [[3, 0, 0, 0, 0]]  # mean 390: below 2^9 ...
    occ_P[0, 0] = 489
    assert phd.plan(occ_T, occ_P, 5000, 545, "packed")[0, 0] == 2  # ... but not with six sigmas


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("n, m, sigma", [(4096, 512, 3), (2000, 300, 7)])
def test_operations_are_those_of_a_run(rule, n, m, sigma):
    T, P = instance(3, n, m, sigma)
    _, _, occ_T, occ_P = phd.occurrences(T, P)
    ops = Counter()
    distances(T, P, rule, ops)
    assert operations(occ_T, occ_P, n, m, rule).sum() == pytest.approx(sum(ops.values()), rel=1e-12)


def test_lists_cost_one_for_each_pair_of_equal_letters():
    T, P = instance(1, 80, 20, 5)
    ops = Counter()
    distances(T, P, "lists", ops)
    assert ops["lists"] == sum(a == b for a in T[0].tolist() for b in P[0].tolist())


def test_a_correlation_costs_its_transforms():
    words, count, valid = phd.blocks(2**14 + 2**10 - 1, 2**10)
    assert (count, valid) == (16, words - 2**10) and 2**11 <= words < 2.1 * 2**11
    transforms = 33 * fft_ops(words, real=True)
    assert transforms < phd.correlation_ops(2**14 + 2**10 - 1, 2**10) < 1.15 * transforms
    assert transforms == pytest.approx(10 * 2**14 * 11, rel=0.1)
    # three digits: packing and rounding, 5 shifts, masks and sums, 2 joins
    words, count, _ = phd.blocks(5000, 600, 3)
    rest = 6 * count * (words // 2 + 1) + count * words * (4 + 15 + 2) + 4401
    transforms = (2 * count + 1) * fft_ops(words, real=True)
    assert phd.correlation_ops(5000, 600, 3) == pytest.approx(transforms + rest)


def test_the_rule_of_the_instance_never_costs_more_than_a_threshold():
    g = torch.Generator().manual_seed(0)
    weight = 1 / torch.arange(1.0, 65)
    for m in (64, 512, 2048):
        T = torch.multinomial(weight, 8 * 4096, True, generator=g).view(8, -1)
        P = torch.multinomial(weight, 8 * m, True, generator=g).view(8, -1)
        _, _, occ_T, occ_P = phd.occurrences(T, P)
        cost = {
            r: operations(occ_T, occ_P, 4096, m, r) for r in ("best", "packed", *range(0, m, 9))
        }
        assert (cost["packed"] <= cost["best"]).all()
        assert all(
            (cost["best"] <= c + 1e-6).all() for c in cost.values() if c is not cost["packed"]
        )


# Distances up to k


@pytest.mark.parametrize("k", [0, 1, 4, 100])
def test_kangaroos_jump_over_mismatches(k):
    for S, n, m, sigma in [(20, 60, 13, 2), (4, 300, 64, 2), (3, 20, 20, 9), (2, 9, 1, 2)]:
        T, P = instance(S, n, m, sigma)
        T[:, : n // 2] = P.repeat(1, n // 2)[:, : n // 2]  # long extensions
        assert (phd.bounded(T, P, k) == phd.naive(T, P).clamp(max=k + 1)).all()


# Approximate distances


def test_kopelowitz_porat_never_overestimates_and_only_improves():
    T, P = instance(6, 400, 64, 100)
    D = phd.naive(T, P)
    est = phd.kopelowitz_porat(T, P, 0.2, 9, torch.Generator().manual_seed(0))
    assert est.shape == (9, 6, 337) and (est <= D).all() and (est.diff(dim=0) >= 0).all()
    assert (est[0] < D).any() and (est[-1] >= 0.8 * D).all()
    lists = phd.kopelowitz_porat(T, P, 0.2, 9, torch.Generator().manual_seed(0), "lists")
    assert (lists == est).all()


def test_a_mismatch_is_lost_with_probability_one_over_the_number_of_letters():
    """ceil(2 / 0.6) = 4 letters: 1/4, which is at most 0.6 / 2."""
    T, P = torch.tensor([[0]]), torch.tensor([[1]])
    draws = torch.cat(
        [
            phd.kopelowitz_porat(
                T.repeat(500, 1), P.repeat(500, 1), 0.6, 1, torch.Generator().manual_seed(s)
            )
            for s in range(20)
        ]
    )
    assert abs(1 - draws.double().mean() - 0.25) < 4 * (0.25 * 0.75 / 10_000) ** 0.5


def test_karloff_is_unbiased_and_its_first_answer_is_that_of_the_signs():
    T, P = instance(1, 60, 10, 5)
    D = phd.naive(T, P).double()
    est = phd.karloff(T, P, 4000, torch.Generator().manual_seed(0))
    assert est.shape == (4000, 1, 51)
    single = torch.cat(
        [
            est[:1],
            est[1:] * torch.arange(2, 4001)[:, None, None]
            - est[:-1] * torch.arange(1, 4000)[:, None, None],
        ]
    )
    assert ((single - 2 * (single / 2).round()).abs() < 1e-6).all()  # twice a whole number
    error = single.mean(0) - D
    assert (error.abs() < 5 * single.std(0) / 4000**0.5 + 1e-9).all()
    equal = phd.karloff(P, P, 5, torch.Generator().manual_seed(0))
    assert (equal == 0).all()


# The equivalence with 3SUM


@pytest.mark.parametrize("rule", ["best", "lists", "fft"])
@pytest.mark.parametrize("N, R, spread", [(40, 16, 100), (25, 64, 1000), (60, 5, 60), (1, 1, 2)])
def test_counting_3sum_through_hamming_distances(N, R, spread, rule):
    g = torch.Generator().manual_seed(N)
    A = torch.randint(-spread, spread, (N,), generator=g)
    B = torch.randint(-spread, spread, (N + 3,), generator=g)
    expected = [sum(a - b == c for a in A.tolist() for b in B.tolist()) for c in range(R)]
    assert phd.three_sum(A, B, R, rule).tolist() == expected


def test_hamming_distances_through_counting_3sum():
    for seed in range(20):
        T, P = (v[0] for v in instance(1, 50, 12, 4, seed))
        A, B, R = phd.as_three_sum(T, P)
        difference = (A[:, None] - B).flatten()
        counts = torch.bincount(difference[(difference >= 0) & (difference < R)], minlength=R)
        assert (12 - counts).tolist() == plain(T.tolist(), P.tolist())
        assert (phd.three_sum(A, B, R) == counts).all()


def test_no_two_of_a_layer_share_their_low_part():
    values = torch.randint(-50, 50, (80,), generator=torch.Generator().manual_seed(0))
    parts = phd.layers(values, 16)
    assert all(len(l.unique()) == len(l) for _, l in parts)
    assert torch.equal(torch.cat([h * 16 + l for h, l in parts]).sort()[0], values.sort()[0])


# Devices and bad input


@pytest.mark.gpu
def test_on_a_gpu():
    T, P = instance(4, 5000, 512, 6)
    D = phd.naive(T, P)
    gT, gP = T.cuda(), P.cuda()
    for rule in RULES:
        assert (distances(gT, gP, rule).cpu() == D).all()
    assert (phd.bounded(gT, gP, 5).cpu() == D.clamp(max=6)).all()
    generator = torch.Generator().manual_seed(0)
    assert (phd.kopelowitz_porat(gT, gP, 0.2, 3, generator).cpu() <= D).all()
    assert phd.karloff(gT, gP, 3, generator).shape == (3, 4, 4489)
    A = torch.randint(1000, (40,))
    assert torch.equal(phd.three_sum(A.cuda(), A.cuda(), 32).cpu(), phd.three_sum(A, A, 32))


def test_errors_name_the_value():
    T, P = instance(2, 20, 5, 3)
    with pytest.raises(ValueError, match=r"\[S, n\] and \[S, m\], not \[20\] and \[2, 5\]"):
        distances(T[0], P)
    with pytest.raises(ValueError, match=r"not \[1, 20\] and \[2, 5\]"):
        distances(T[:1], P)
    with pytest.raises(ValueError, match=r"m = 20 must lie in 1\.\.n = 5"):
        distances(P, T)
    with pytest.raises(ValueError, match=r"integers, not torch\.float32"):
        distances(T.float(), P)
    for rule in ("heavy", -1):
        with pytest.raises(ValueError, match=f"threshold >= 0, not {rule!r}"):
            distances(T, P, rule)
    for eps in (0, 1.5):
        with pytest.raises(ValueError, match=rf"eps must lie in \(0, 1\], not {eps}"):
            phd.kopelowitz_porat(T, P, eps, 1, torch.Generator())
    with pytest.raises(ValueError, match="R = 0"):
        phd.three_sum(T[0], P[0], 0)
