"""SPRIGHT against plain loops, dense transforms, scikit-learn's Lasso and known thresholds."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.linalg import hadamard
from scipy.stats import kstest

from miniature.theory.spright import (
    FrontEnd,
    SparseSignal,
    bin_of,
    by_likelihood,
    by_majority,
    dense,
    density_evolution,
    eliminate,
    first_of,
    fwht,
    graph_survivors,
    noiseless_offsets,
    normal,
    nso_offsets,
    null_space,
    omp,
    parity,
    peel,
    picks,
    recovered,
    sign,
    so_offsets,
    span,
    threshold,
    top_k,
)

F64 = torch.float64


def dot(a, b):
    """<a, b> over F_2, from the binary digits."""
    return sum(int(p) & int(q) for p, q in zip(f"{int(a):064b}", f"{int(b):064b}")) % 2


def times(columns, l):
    """M l: the XOR of the columns where l has a one."""
    out = 0
    for i, column in enumerate(columns):
        out ^= int(column) * (int(l) >> i & 1)
    return out


def everything(signal):
    """All N samples, [S, T, N]."""
    a = torch.arange(2**signal.n)
    return signal(a, torch.zeros(len(signal.k), 1, dtype=torch.int64))[:, :, 0]


def general(n, K, trials, seeds, snr_db=math.inf):
    """Signals with values of all magnitudes in float64."""
    s = SparseSignal.random(n, K, trials, seeds, snr_db, dtype=F64)
    g = torch.Generator().manual_seed(99)
    X = s.X * (0.5 + 2 * torch.rand(s.X.shape, generator=g, dtype=F64))
    return SparseSignal(n, s.k, X, s.sigma, s.key)


# Arithmetic over F_2


def test_parity_and_sign_of_every_bit():
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randint(2**62, (200,), generator=g) for _ in range(2))
    expected = [dot(x, y) for x, y in zip(a, b)]
    assert parity(a & b).tolist() == expected
    assert sign(a, b).tolist() == [1 - 2 * v for v in expected]
    assert parity(1 << torch.arange(63)).tolist() == [1] * 63


def test_span_and_bin_of_are_the_products_with_a_matrix():
    M = dense(12, 5, 1, 3)[0]
    l, k = torch.arange(32), torch.arange(0, 4096, 37)
    assert span(M, l).tolist() == [times(M, v) for v in l]
    expected = [sum(dot(column, v) << i for i, column in enumerate(M)) for v in k]
    assert bin_of(M, k).tolist() == expected


@pytest.mark.parametrize("n, b", [(8, 3), (10, 10), (17, 6)])
def test_elimination_solves_and_the_null_space_is_all_of_it(n, b):
    for M in dense(n, b, 5, seed=n):
        right, rows = eliminate(M)
        j = torch.arange(2**b)
        assert (bin_of(M, span(torch.tensor(right), j)) == j).all()
        basis = torch.tensor(null_space(n, rows), dtype=torch.int64)
        assert len(basis) == n - b and (bin_of(M, basis) == 0).all()
        low = basis[:8]
        assert len(span(low, torch.arange(2 ** len(low))).unique()) == 2 ** len(low)
    assert eliminate(torch.tensor([3, 5, 6])) is None  # 3 + 5 = 6


def test_picks_are_distinct_bits():
    M = picks(12, 4, 3)
    assert sorted(M.flatten().tolist()) == [1 << i for i in range(12)]


@pytest.mark.parametrize("n", [0, 1, 5, 10])
def test_fwht_is_the_product_with_the_hadamard_matrix(n):
    x = torch.randn(3, 2, 2**n, dtype=F64, generator=torch.Generator().manual_seed(n))
    torch.testing.assert_close(fwht(x), x @ torch.as_tensor(hadamard(2**n), dtype=F64))


# Signals


def test_samples_are_the_sum_of_the_definition():
    s = general(7, 5, 2, [1, 2])
    x = everything(s)
    for i, t in itertools.product(range(2), range(2)):
        for m in range(0, 128, 5):
            terms = zip(s.k[i, t].tolist(), s.X[i, t].tolist())
            value = sum(X * (-1) ** dot(k, m) for k, X in terms) / math.sqrt(128)
            assert x[i, t, m] == pytest.approx(value)
    d = torch.tensor([[3, 77], [5, 0]])
    a = torch.tensor([0, 9, 64])
    for i, p, q in itertools.product(range(2), range(2), range(3)):
        assert torch.equal(s(a, d)[i, :, p, q], x[i, :, a[q] ^ d[i, p]])


def test_noise_belongs_to_the_sample_and_has_the_stated_strength():
    s = SparseSignal.random(12, 6, 3, [4, 5], 3.0, dtype=F64)
    clean = SparseSignal(12, s.k, s.X)
    w = everything(s) - everything(clean)
    power = everything(clean).square().mean(-1)
    torch.testing.assert_close(power, torch.full_like(power, s.sigma**2 * 10**0.3))
    assert float(w.std()) == pytest.approx(s.sigma, rel=0.02)
    d = torch.tensor([[1000], [1000]])
    again = (s(torch.arange(50), d) - clean(torch.arange(50), d))[:, :, 0]
    torch.testing.assert_close(again, w[..., torch.arange(50) ^ 1000])
    rows = w.flatten(0, 1) / s.sigma
    cross = rows @ rows.T / 4096
    assert (cross - torch.eye(6, dtype=F64)).abs().max() < 0.08  # independent between signals


def test_the_hash_is_normal_and_white():
    z = normal(torch.arange(2**17), torch.tensor(12345)).double()
    assert kstest(z.numpy(), "norm").pvalue > 1e-3
    assert abs(float((z[1:] * z[:-1]).mean())) < 0.01
    assert float(fwht(z).abs().max()) / 2**8.5 < 5.5  # no coefficient stands out


def test_random_supports_are_distinct_and_reproducible():
    s = SparseSignal.random(4, 14, 50, [0, 1])
    assert all(len(row.unique()) == 14 for row in s.k.flatten(0, 1))
    assert torch.equal(SparseSignal.random(4, 14, 50, [1]).k[0], s.k[1])
    assert set(s.X.unique().tolist()) == {-1.0, 1.0}


# Front end


@pytest.mark.parametrize("kind", ["picks", "dense"])
def test_aliasing_identity(kind):
    """U[j] is the signed sum over the coefficients of the bin, by plain loops."""
    n, b, C = 10, 3, 3
    s = general(n, 20, 2, [0, 1])
    M = picks(n, b, C) if kind == "picks" else dense(n, b, C, 1)
    d = so_offsets(n, 6, [10, 11])
    U = FrontEnd(n, M, d).observe(s)
    assert U.shape == (2, 2, C, 8, 6)
    expected = torch.zeros_like(U)
    for i, t, c, p in itertools.product(range(2), range(2), range(C), range(6)):
        for k, X in zip(s.k[i, t].tolist(), s.X[i, t].tolist()):
            j = sum(dot(column, k) << q for q, column in enumerate(M[c]))
            expected[i, t, c, j, p] += X * (-1) ** dot(d[i, p], k)
    assert (U - expected).abs().max() < 1e-10


def test_noise_of_a_bin_has_variance_nu2():
    n, K = 16, 4
    s = SparseSignal.random(n, K, 40, [0, 1], 5.0, dtype=F64)
    f = FrontEnd(n, picks(n, 4, 3), so_offsets(n, 30, [2, 3]))
    W = f.observe(s) - f.observe(SparseSignal(n, s.k, s.X))
    nu2 = s.sigma**2 * 2**n / 16
    assert nu2 == pytest.approx(K / 16 / 10**0.5)  # rho^2 / (eta SNR)
    assert float(W.var()) == pytest.approx(nu2, rel=0.03)


def test_offsets():
    d = nso_offsets(5, 3, [7])[0].reshape(3, 6)
    assert (d[:, 1:] ^ d[:, :1]).tolist() == [[1, 2, 4, 8, 16]] * 3
    assert torch.equal(d[:, 0], so_offsets(5, 3, [7])[0])
    assert noiseless_offsets(3, [0, 1]).tolist() == [[0, 1, 2, 4]] * 2


def test_samples_are_counted_once():
    n = 14
    f = FrontEnd(n, picks(n, 4, 3), noiseless_offsets(n, [0]))
    asked = {int(m ^ d) for m in f.lines.flatten() for d in f.d[0]}
    # a group asks 16 lines at 1 + n offsets, of which 4 lie in its span; 0..0 is in all groups
    assert f.samples() == [len(asked)] and len(asked) < 3 * 16 * 11
    assert f.first(5).P == 5 and f.first(5).samples()[0] < len(asked)


# Back end


def plain_spright(U, M, d, n, limit, search):
    """One signal, bins in turn, a dictionary: U [C, B, P] in float64."""
    U, found, again = U.copy(), {}, True
    while again:
        again = False
        for c, j in itertools.product(range(U.shape[0]), range(U.shape[1])):
            u = U[c, j]
            if (u**2).mean() <= limit:
                continue
            k = search(u, c, j)
            s = np.array([(-1.0) ** dot(k, v) for v in d])
            X = (s * u).mean()
            at = [sum(dot(column, k) << i for i, column in enumerate(m)) for m in M]
            if ((u - X * s) ** 2).mean() <= limit and at[c] == j and k not in found:
                found[k], again = X, True
                for e, where in enumerate(at):
                    U[e, where] -= X * s
    return found


def majority(n, d):
    def search(u, c, j):
        u = u.reshape(-1, n + 1)
        bits = [sum((row[0] < 0) != (row[q + 1] < 0) for row in u) for q in range(n)]
        return sum(1 << q for q, votes in enumerate(bits) if votes > len(u) / 2)

    return search


def exhaustive(n, M, d):
    signs = np.array([[(-1.0) ** dot(k, v) for v in d] for k in range(2**n)])
    home = [[sum(dot(col, k) << i for i, col in enumerate(m)) for k in range(2**n)] for m in M]

    def search(u, c, j):
        inside = np.flatnonzero(np.array(home[c]) == j)
        return int(inside[np.abs(signs[inside] @ u).argmax()])

    return search


@pytest.mark.parametrize("kind", ["picks", "dense"])
@pytest.mark.parametrize("name", ["sparsefht", "nso", "so"])
def test_peeling_finds_what_a_plain_loop_finds(name, kind):
    n, K, b = 9, 6, 3
    M = picks(n, b, 3) if kind == "picks" else dense(n, b, 3, 5)
    seeds = [3, 4]
    snr = math.inf if name == "sparsefht" else 13.0
    s = general(n, K, 4, seeds, snr)
    d = {
        "sparsefht": noiseless_offsets(n, seeds),
        "nso": nso_offsets(n, 3, seeds),
        "so": so_offsets(n, 24, seeds),
    }[name]
    f = FrontEnd(n, M, d)
    U = f.observe(s)
    nu2 = s.sigma**2 * 2**n / f.B
    found = peel(f, U, by_likelihood if name == "so" else by_majority, nu2=nu2, gamma=3.0)
    total = 0
    for i, t in itertools.product(range(2), range(4)):
        search = exhaustive(n, M, d[i]) if name == "so" else majority(n, d[i])
        plain = plain_spright(U[i, t].numpy(), M, d[i], n, 4 * nu2 + 1e-9, search)
        mine = found.run == i * 4 + t
        got = dict(zip(found.k[mine].tolist(), found.value[mine].tolist()))
        assert sorted(got) == sorted(plain)
        for k, X in plain.items():
            assert got[k] == pytest.approx(X, abs=1e-8 if snr == math.inf else 0.6)
        total += len(plain)
    assert total >= 30, "hardly anything was found: the test shows nothing"


@pytest.mark.parametrize("b, M", [(4, picks(12, 4, 3)), (5, dense(12, 5, 3, 0))])
def test_noiseless_recovery_equals_the_full_transform(b, M):
    n, K = 12, 10
    s = general(n, K, 20, [0, 1])
    f = FrontEnd(n, M, noiseless_offsets(n, [0, 1]))
    found = peel(f, f.observe(s), by_majority)
    good = recovered(s, found, tol=1e-10)
    assert float(good.double().mean()) > 0.8
    X = fwht(everything(s)) / 2 ** (n / 2)
    k, value = top_k(everything(s), K)
    for i, t in good.nonzero().tolist():
        mine = found.run == i * 20 + t
        at, order = found.k[mine].sort()
        assert at.tolist() == (X[i, t].abs() > 1e-9).nonzero()[:, 0].tolist()
        assert (found.value[mine][order] - X[i, t, at]).abs().max() < 1e-10
        assert torch.equal(k[i, t].sort().values, at)
        torch.testing.assert_close(value[i, t], X[i, t, k[i, t]])


def test_known_magnitudes_are_signs_times_rho():
    s = SparseSignal.random(12, 6, 10, [0], 12.0)
    s = SparseSignal(12, s.k, 3 * s.X, 3 * s.sigma, s.key)
    f = FrontEnd(12, picks(12, 4, 3), nso_offsets(12, 3, [0]))
    nu2 = s.sigma**2 * 2**12 / 16
    known = peel(f, f.observe(s), by_majority, nu2=nu2, gamma=1.0, rho=3.0)
    mean = peel(f, f.observe(s), by_majority, nu2=nu2, gamma=1.0)
    assert set(known.value.tolist()) == {-3.0, 3.0} and recovered(s, known, 0).float().mean() > 0.8
    assert 0 < float((mean.value.abs() - 3).abs().median()) < 0.3


def test_the_majority_outvotes_a_wrong_sign_and_a_tie_is_no_majority():
    n, k = 6, 0b101101
    f = FrontEnd(n, picks(n, 2, 3), nso_offsets(n, 3, [0]))
    u = sign(torch.tensor(k), f.d) * -2.0  # a single-ton with X = -2
    assert by_majority(f, u, None, None, None)[0].tolist() == [k]
    u[0, 3] *= -1  # one of three votes on bit 2
    assert by_majority(f, u, None, None, None)[0].tolist() == [k]
    u[0, 10] *= -1  # a second one
    assert by_majority(f, u, None, None, None)[0].tolist() == [k ^ 4]
    two = f.first(14)
    u = sign(torch.tensor(k), two.d)
    u[0, 3] *= -1  # one to one on bit 2
    assert by_majority(two, u, None, None, None)[0].tolist() == [k & ~4]


@pytest.mark.parametrize("block", [2, 9])
def test_likelihood_is_that_of_all_candidates(block):
    n, seeds = 10, [0, 1, 2]
    M = dense(n, 3, 3, 2)
    f = FrontEnd(n, M, so_offsets(n, 12, seeds))
    g = torch.Generator().manual_seed(1)
    seed = torch.tensor([0, 0, 0, 1, 2, 2, 2, 2])
    group, j = (torch.randint(v, (8,), generator=g) for v in (3, 8))
    V = torch.randn(8, 12, generator=g, dtype=F64)
    k, work = by_likelihood(f, V, seed, group, j, block=block)
    every = torch.arange(2**n)
    for i in range(8):
        score = (sign(every[:, None], f.d[seed[i]], F64) @ V[i]).abs()
        score[bin_of(M[group[i]], every) != j[i]] = -1
        assert bin_of(M[group[i]], k[i]) == j[i]
        assert float(score[k[i]]) == pytest.approx(float(score.max()))  # two may have one pattern
    assert work == 2 * 12 * 2**7


def test_the_bin_of_the_proposal_is_checked():
    """Two coefficients whose sign pattern is a third one's, which lives in another bin."""
    n = 6
    f = FrontEnd(n, picks(n, 2, 1), noiseless_offsets(n, [0]))
    U = torch.zeros(1, 1, 1, 4, n + 1)
    U[0, 0, 0, 2] = sign(torch.tensor(0b110001), f.d[0])  # belongs to bin 1
    assert len(peel(f, U, by_majority).k) == 0
    U = U.roll(-1, 3)
    assert peel(f, U, by_majority).k.tolist() == [0b110001]


@pytest.mark.parametrize("excess, found", [(0.9, True), (1.1, False)])
def test_the_residual_must_stay_below_the_threshold(excess, found):
    """A single-ton with a disturbance of energy (1 + gamma) nu2 times `excess`."""
    n, k, nu2, gamma = 6, 0b110001, 0.04, 0.5
    f = FrontEnd(n, picks(n, 2, 1), noiseless_offsets(n, [0]))
    U = torch.zeros(1, 1, 1, 4, n + 1)
    U[0, 0, 0, 1] = sign(torch.tensor(k), f.d[0]) + (excess * (1 + gamma) * nu2) ** 0.5
    got = peel(f, U, by_majority, nu2=nu2, gamma=gamma, rho=1.0).k.tolist()
    assert got == ([k] if found else [])


def test_a_stopping_set_stays():
    """Two coefficients that share a bin in every group are never found; a third is."""
    n, M = 12, picks(12, 3, 3)  # bits 9, 10, 11 are picked by no group
    k = torch.tensor([[[5, 5 | 1 << 10, 0b111000]]])
    s = SparseSignal(n, k, torch.ones(1, 1, 3, dtype=F64))
    f = FrontEnd(n, M, noiseless_offsets(n, [0]))
    found = peel(f, f.observe(s), by_majority)
    assert found.k.tolist() == [0b111000] and not recovered(s, found).any()


def test_recovered_wants_support_signs_and_values():
    s = SparseSignal.random(8, 3, 2, [0, 1])
    run = torch.arange(4).repeat_interleave(3)
    k, X = s.k.flatten(), s.X.flatten()
    F = type(peel(f := FrontEnd(8, picks(8, 2, 1), noiseless_offsets(8, [0])),
                  torch.zeros(1, 1, 1, 4, f.P), by_majority))  # fmt: skip

    def ok(run, k, X, **options):
        return recovered(s, F(run, k, X, None), **options).flatten().tolist()

    assert ok(run, k, X) == [True] * 4
    assert ok(run.flip(0), k.flip(0), X.flip(0)) == [True] * 4
    assert ok(run[1:], k[1:], X[1:]) == [False, True, True, True]
    flipped = X.clone()
    flipped[4] *= -1
    assert ok(run, k, flipped) == [True, False, True, True]
    assert ok(run, k, 1.1 * X, tol=0.05) == [False] * 4 and ok(run, k, 1.1 * X, tol=0.2)[0]
    spare = next(v for v in range(256) if v not in s.k[1, 0])
    extra = (torch.cat([run, torch.tensor([2])]), torch.cat([k, torch.tensor([spare])]))
    assert ok(*extra, torch.cat([X, torch.ones(1)])) == [True, True, False, True]


def test_first_of():
    assert first_of(torch.tensor([4, 2, 4, 4, 2, 9])).tolist() == [1, 1, 0, 0, 0, 1]
    assert first_of(torch.tensor([], dtype=torch.int64)).tolist() == []


def test_seeds_and_signals_do_not_touch_each_other():
    n, seeds = 12, [0, 1, 2]
    s = SparseSignal.random(n, 8, 5, seeds, -1.0)

    def run(f, s):
        nu2 = s.sigma**2 * 2**n / f.B
        return recovered(s, peel(f, f.observe(s), by_likelihood, nu2=nu2, gamma=0.7, rho=1.0))

    M = picks(n, 4, 3)
    whole = run(FrontEnd(n, M, so_offsets(n, 30, seeds)), s)
    assert 0 < whole.float().mean() < 1
    for i, seed in enumerate(seeds):
        one = SparseSignal(n, s.k[i : i + 1], s.X[i : i + 1], s.sigma, s.key[i : i + 1])
        assert torch.equal(run(FrontEnd(n, M, so_offsets(n, 30, [seed])), one)[0], whole[i])


def test_operations_are_counted():
    n = 9
    f = FrontEnd(n, picks(n, 3, 3), noiseless_offsets(n, [0]))
    s = SparseSignal(n, torch.tensor([[[0b111000111]]]), torch.ones(1, 1, 1))
    ops = peel(f, f.observe(s), by_majority).ops
    assert ops["transform"] == 3 * 10 * 8 * 3
    # all 24 bins, then the 3 changed ones; 3 single-tons of the same coefficient; 3 subtractions
    assert ops["zero-ton test"] == 2 * 10 * (24 + 3)
    assert ops["single-ton test"] == 5 * 10 * 3 and ops["search"] == 2 * 10 * 3
    assert ops["peeling"] == 2 * 10 * 3


# The graph


def plain_survivors(bins, B):
    """Balls one at a time, from the bins [C, K] of one graph."""
    left, again = set(range(bins.shape[1])), True
    while again:
        again = False
        for c, j in itertools.product(range(len(bins)), range(B)):
            inside = [i for i in left if bins[c, i] == j]
            if len(inside) == 1:
                left.discard(inside[0])
                again = True
    return len(left) / bins.shape[1]


def test_graph_peeling_is_that_of_a_plain_loop():
    K, B, C = 30, 13, 3
    g = torch.Generator().manual_seed(5)
    bins = torch.randint(B, (20, C, K), generator=g)
    expected = [plain_survivors(one.numpy(), B) for one in bins]
    assert 0 < np.mean(expected) < 1
    assert graph_survivors(K, B, C, 20, [5])[0].tolist() == pytest.approx(expected)


def test_thresholds_are_those_of_the_literature():
    for C, value in ((2, 1.0), (3, 0.4073), (4, 0.3237)):
        assert threshold(C) == pytest.approx(
            value, abs=6e-3 if C == 2 else 2e-4
        )  # C = 2: slow at 1


@pytest.mark.parametrize("eta", [0.3, 0.38, 0.5])
def test_density_evolution_predicts_large_graphs(eta):
    """A ball stays if all its C edges stay: p of an edge means p^(C / (C - 1)) of a ball."""
    share = float(graph_survivors(20_000, round(eta * 20_000), 3, 1, [0]).mean())
    assert share == pytest.approx(density_evolution(eta, 3) ** 1.5, abs=0.01)


# Rivals


def test_omp_finds_the_support_and_solves_for_the_values():
    n, K = 8, 4
    s = general(n, K, 5, [0])
    m = torch.stack([torch.randperm(2**n, generator=torch.Generator().manual_seed(i))[:80]
                     for i in range(5)])  # fmt: skip
    x = everything(s)[0].gather(1, m)
    k, X = omp(x, m, n, K)
    for t in range(5):
        got = dict(zip(k[t].tolist(), X[t].tolist()))
        assert got == pytest.approx(dict(zip(s.k[0, t].tolist(), s.X[0, t].tolist())))


def test_support_is_that_of_lasso_on_the_same_samples():
    linear = pytest.importorskip("sklearn.linear_model", reason="the oracle is not installed")
    n, K = 8, 4
    s = general(n, K, 6, [2], 20.0)
    f = FrontEnd(n, picks(n, 2, 3), nso_offsets(n, 3, [2]))
    found = peel(f, f.observe(s), by_majority, nu2=s.sigma**2 * 2**n / f.B, gamma=1.0)
    good = recovered(s, found)[0]
    assert good.sum() >= 3
    m = (f.lines.flatten() ^ f.d[0][:, None]).unique()
    A = hadamard(2**n)[m] / 16
    x = everything(s)[0].numpy()
    for t in good.nonzero()[:, 0]:
        fit = linear.Lasso(alpha=2e-4, fit_intercept=False).fit(A, x[t, m])
        largest = np.sort(np.abs(fit.coef_).argsort()[-K:])
        assert largest.tolist() == found.k[found.run == t].sort().values.tolist()


# Bad input


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: fwht(torch.ones(12)), "power of two, not 12"),
        (lambda: picks(8, 3, 3), "n >= 9, not 8"),
        (lambda: dense(4, 5, 1, 0), "at most n = 4, not 5"),
        (lambda: SparseSignal.random(3, 9, 1, [0]), "1..N = 8, not 9"),
        (lambda: SparseSignal.random(41, 2, 1, [0]), "1..40, not 41"),
        (lambda: SparseSignal(3, torch.tensor([[[8]]]), torch.ones(1, 1, 1)), "0..7"),
        (lambda: SparseSignal(3, torch.tensor([[[1]]]), torch.ones(1, 1)), "one shape"),
        (lambda: FrontEnd(4, picks(4, 1, 3), torch.tensor([[16]])), "d must hold[a-z ]* 0..15"),
        (lambda: FrontEnd(2, picks(6, 2, 3), torch.tensor([[1]])), "M must hold[a-z ]* 0..3"),
    ],
)  # fmt: skip
def test_errors_name_the_value(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_peel_refuses_bins_of_another_front_end():
    f = FrontEnd(6, picks(6, 2, 3), noiseless_offsets(6, [0]))
    with pytest.raises(ValueError, match=r"\(3, 4, 6\) for \(3, 4, 7\)"):
        peel(f, torch.zeros(1, 1, 3, 4, 6), by_majority)
    with pytest.raises(ValueError, match=r"must not be negative, not .* -0\.1|-0\.1 and 0"):
        peel(f, torch.zeros(1, 1, 3, 4, 7), by_majority, gamma=-0.1)


@pytest.mark.gpu
@pytest.mark.parametrize("search", [by_majority, by_likelihood])
def test_on_a_gpu(search):
    n, seeds = 12, [0, 1]
    d = nso_offsets(n, 3, seeds)
    results = []
    for device in ("cpu", "cuda"):
        s = SparseSignal.random(n, 6, 10, seeds, 8.0, device=device, dtype=F64)
        f = FrontEnd(n, picks(n, 4, 3).to(device), d.to(device))
        nu2 = s.sigma**2 * 2**n / f.B
        found = peel(f, f.observe(s), search, nu2=nu2, gamma=1.0, rho=1.0)
        results.append(recovered(s, found).cpu())
    assert torch.equal(*results) and results[0].float().mean() > 0.8
