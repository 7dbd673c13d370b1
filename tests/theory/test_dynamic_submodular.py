"""Dynamic submodular maximization: invariants after every update, laws and counts, plainly."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from miniature.theory import dynamic_submodular as ds
from miniature.theory.submodular import Coverage, FacilityLocation, brute_force, greedy


def coverage(seed=0, n=12, m=70, p=0.2):
    return Coverage(torch.tensor(np.random.default_rng(seed).random((n, m)) < p).double())


def facility(seed=0, n=12, m=9):
    return FacilityLocation(torch.tensor(np.random.default_rng(seed).random((n, m))))


def weighted(seed=0, n=12, m=20):
    r = np.random.default_rng(seed)
    return Coverage(torch.tensor(r.random((n, m)) < 0.3).double(), torch.tensor(r.random(m)))


MAKES = [coverage, facility, weighted]


def value(f, elements):
    """f by its definition, in float64 and uncounted."""
    rows = f.rows.numpy() * f.weights.numpy()
    return rows[list(elements)].max(0).sum() if len(elements) else 0.0


def live_after(stream):
    live = set()
    for op in stream:
        (live.add if op > 0 else live.remove)(abs(op) - 1)
    return live


def snapshot(d, c):
    """R_1, ..., R_{T+1} as sets, and S_1, ..., S_T."""
    s = d.levels
    R = [set(s.R[c, i, : s.size[c, i]].tolist()) for i in range(1, s.k + 2)]
    S = [s.picks[c, s.start[c, i] : s.start[c, i + 1]].tolist() for i in range(1, s.top[c] + 1)]
    return R, S


@pytest.mark.parametrize("make", MAKES)
@pytest.mark.parametrize("trials", [0, 8])
def test_levels_are_what_they_should_be_after_every_update(make, trials):
    """R_{i+1} = {e in R_i : f(e | G_i) >= tau}, by definition and without exception."""
    k = 4
    for seed in range(6):
        f = make(seed)
        d = ds.Dynamic(f, k, trials=trials, seed=seed)
        stream = ds.churn(12, 60, 0.4, seed)
        for t, op in enumerate(stream):
            out = d.play([op])
            live = live_after(stream[: t + 1])
            best = 0.0
            for c, guess in enumerate(d.guess):
                tau, (R, S) = guess / (2 * k), snapshot(d, c)
                G = []
                expected = {e for e in live if tau <= value(f, [e]) <= guess}
                for i, picked in enumerate(S):
                    assert R[i] == expected
                    assert picked and set(picked) <= R[i]
                    if trials == 0:
                        assert len(picked) == 1
                        assert value(f, G + picked) - value(f, G) >= tau  # invariant (a)
                    G += picked
                    expected = {e for e in R[i] if value(f, [*G, e]) - value(f, G) >= tau - 1e-12}
                assert len(G) == k or not expected  # invariant (b)
                if guess >= max((value(f, [e]) for e in live), default=0):
                    assert len(G) == k or all(
                        value(f, [*G, e]) - value(f, G) < tau for e in live - set(G)
                    )
                assert not any(R[len(S) :]) and len(G) == len(set(G)) <= k
                assert d.solution(c) == G
                assert d.levels.value[c, len(S)] == pytest.approx(value(f, G), abs=1e-9)
                assert d.survivors(c).tolist() == [len(r) for r in R[:k]]
                best = max(best, value(f, G))
            assert out.value[0] == pytest.approx(best, abs=1e-9)
            assert value(f, d.solution()) == pytest.approx(best, abs=1e-9)


@pytest.mark.parametrize("make", MAKES)
def test_half_of_the_best_for_the_right_guess(make):
    k, eps = 3, 0.2
    for seed in range(8):
        f = make(seed)
        d, stream = ds.Dynamic(f, k, eps, seed=seed), ds.churn(12, 40, 0.45, seed)
        for t in range(0, 40, 4):
            d.play(stream[t : t + 4])
            live = torch.tensor(sorted(live_after(stream[: t + 4])), dtype=torch.long)
            opt = brute_force(f, live, k) if len(live) else 0.0
            right = np.flatnonzero((d.guess <= opt + 1e-9) & (opt < (1 + eps) * d.guess - 1e-9))
            for c in right:
                single = max(value(f, [e]) for e in live.tolist())
                if d.guess[c] >= single:  # else its optimum is an element that it leaves out
                    assert value(f, d.solution(c)) >= opt / 2 / (1 + eps) - 1e-9
            assert len(right) == (opt > 0)
            assert value(f, d.solution()) >= opt / 2 / (1 + eps) - 1e-9


@pytest.mark.parametrize("make", MAKES)
def test_queries_are_what_the_levels_say(make):
    """Charged: f(v); one for each level that v goes on to; |R_j| for each level filtered anew."""
    k = 4
    for seed in range(6):
        f = make(seed)
        guess = 0.8 * brute_force(f, torch.arange(12), k)
        d = ds.Dynamic(f, k, guesses=[guess], seed=seed)
        tau, charged, hits = guess / (2 * k), 0, 0
        for op in ds.churn(12, 120, 0.45, seed):
            v, (before, S) = abs(op) - 1, snapshot(d, 0)
            out = d.play([op])
            after, S_after = snapshot(d, 0)
            same = next((i for i, (a, b) in enumerate(zip(S, S_after)) if a != b), None)
            if same is None:
                same = min(len(S), len(S_after))
            rebuilt = max(len(S), len(S_after)) > same
            expected = 0
            if op > 0:
                expected, G = 1, []
                for i in range(k):  # levels that v enters, up to where they were built anew
                    if value(f, [*G, v]) - value(f, G) < tau or (rebuilt and i == same):
                        break
                    G += S[i]
                    expected += 1
                assert not out.hit.any() and not out.chance.any()
            else:
                inside = [i for i in range(len(S)) if v in before[i]]
                assert out.hit[0, 0] == any(v in p for p in S)
                assert out.chance[0, 0] == pytest.approx(sum(1 / len(before[i]) for i in inside))
                assert out.total[0, 0] == pytest.approx(
                    sum(1 / len(before[i]) for i in range(len(S)))
                )
                if out.hit[0, 0]:
                    same, rebuilt = [[v] == p for p in S].index(True), True
                    hits += 1
            if rebuilt:
                expected += sum(len(after[i]) for i in range(same, min(len(S_after), k - 1)))
            assert out.queries[0] == expected and out.element[0] == v
            charged += expected
        assert f.queries == charged and hits > 0


def law(f, live, tau, k, G=()):
    """Exact law of the solution (a tuple): at each level uniform over the survivors."""
    R = [e for e in live if value(f, [*G, e]) - value(f, G) >= tau]
    if len(G) == k or not R:
        return {G: 1.0}
    out = {}
    for e in R:
        for g, p in law(f, live, tau, k, (*G, e)).items():
            out[g] = out.get(g, 0) + p / len(R)
    return out


@pytest.mark.parametrize("seed", range(4))
def test_the_law_of_the_solution_forgets_the_history(seed):
    """After insertions and deletions in any order: as if built once from what is live."""
    f, k = coverage(seed, n=7, m=30), 3
    opt = brute_force(f, torch.arange(7), k)
    d = ds.Dynamic(f, k, guesses=[0.9 * opt] * 20_000, seed=seed)  # so many independent copies
    stream = ds.churn(7, 25, 0.4, seed)
    d.play(stream)
    expected = law(f, sorted(live_after(stream)), 0.9 * opt / (2 * k), k)
    found = {g: 0 for g in expected}
    for c in range(20_000):
        found[tuple(d.solution(c))] += 1
    assert len(expected) > 5
    p = chisquare(list(found.values()), 20_000 * np.array(list(expected.values()))).pvalue
    assert p > 1e-3


def test_a_fixed_deletion_hits_as_often_as_predicted():
    n, k = 60, 5
    f = coverage(3, n, 100, 0.15)
    opt = greedy(f, torch.arange(n), k)[1]
    d = ds.Dynamic(f, k, guesses=[opt] * 2000, seed=0)
    order = np.argsort(-f.rows.sum(1).numpy(), kind="stable")  # the largest first: no help
    out = d.play(np.concatenate([np.arange(n) + 1, -(order[:30] + 1)]))
    assert out.hit[n:].mean() == pytest.approx(out.chance[n:].mean(), rel=0.03)
    assert out.chance[n:].mean() < 0.9 * out.total[n:].mean()


def test_batches():
    """Clones: a second one never keeps its gain, so m = 1; disjoint sets: m is all that fits."""
    clones = Coverage(torch.ones(20, 30).double())
    d = ds.Dynamic(clones, 5, guesses=[60.0], trials=20)
    d.play(np.arange(20) + 1)
    assert d.levels.top[0] == 1 and len(d.solution(0)) == 1
    apart = Coverage(torch.eye(40).repeat_interleave(3, 1).double())
    d = ds.Dynamic(apart, 5, guesses=[15.0], trials=20)
    d.play(np.arange(40) + 1)
    assert d.levels.top[0] <= 2 and len(d.solution(0)) == 5
    # The largest band: 30 elements of gain 3 beside 4 of gain 9.
    rows = torch.zeros(34, 30 * 3 + 4 * 9).double()
    for e in range(30):
        rows[e, 3 * e : 3 * e + 3] = 1
    for e in range(4):
        rows[30 + e, 90 + 9 * e : 99 + 9 * e] = 1
    d = ds.Dynamic(Coverage(rows), 4, guesses=[16.0], trials=20, seed=1)
    d.play(np.arange(34) + 1)
    d.play([-(d.solution(0)[0] + 1)])
    assert max(d.solution(0)) < 30


def test_the_size_of_a_batch_and_what_finding_it_costs():
    """Nine pairs of twins: the m-th draw is new with probability 1 - (m - 1) / 17, so m = 4."""
    twins = Coverage(torch.eye(9).repeat_interleave(3, 1).repeat_interleave(2, 0).double())
    d = ds.Dynamic(twins, 10, eps=0.2, guesses=[30.0], trials=4000, seed=3)
    d.play(np.arange(17) + 1)
    d.play([18])  # level 1 was built of 12: with 18 it is built again
    assert d.levels.built[0, 1] == 18 and len(snapshot(d, 0)[1][0]) == 4
    # k = 4: the sizes 3 and 4 are tested, nothing is filtered.
    d = ds.Dynamic(twins, 4, eps=0.2, guesses=[20.0], trials=4000, seed=3)
    d.play(np.arange(17) + 1)
    assert d.play([18]).queries[0] == 1 + 2 * 4000 + 1  # f(v), the tests, f(G)


def test_a_batch_keeps_the_gain_of_its_band():
    """All share three items: only one gains 6, then four at once gain 3 (tau = 1) each."""
    rows = torch.cat([torch.eye(20).repeat_interleave(3, 1), torch.ones(20, 3)], 1).double()
    d = ds.Dynamic(Coverage(rows), 5, guesses=[10.0], trials=20)
    d.play(np.arange(20) + 1)
    R, S = snapshot(d, 0)
    assert [len(p) for p in S] == [1, 4] and len(R[1]) == 19
    # |S_i| / |R_i| at a deletion: of an element in no S_i, then of S_1's.
    out = d.play([-min(R[1] - set(S[1])) - 1, -S[0][0] - 1])
    assert out.hit[:, 0].tolist() == [False, True]
    np.testing.assert_allclose(out.chance[:, 0], [1 / 20 + 4 / 19, 1 / 19])
    np.testing.assert_allclose(out.total[:, 0], [1 / 20 + 4 / 19, 1 / 19 + 4 / 18])


@pytest.mark.parametrize("k", [1, 2])
def test_batches_are_uniform(k):
    """The fifth insertion builds level 1 again: every ordered choice of k of 5 is as likely."""
    apart = Coverage(torch.eye(5).repeat_interleave(3, 1).double())
    d = ds.Dynamic(apart, k, guesses=[3.0 * k] * 20_000, trials=1, seed=4)
    d.play(np.arange(5) + 1)
    found = np.bincount(d.levels.picks @ 5 ** np.arange(k), minlength=5**k)
    found = found[found > 0]
    assert len(found) == (5, 20)[k - 1] and chisquare(found).pvalue > 1e-3


def test_a_draw_is_an_ordered_sample():
    found, s = np.zeros((5, 5)), SimpleNamespace(rng=np.random.default_rng(0))
    for _ in range(4000):
        B = np.arange(5)
        ds.draw.py_func(s, B, 2)
        found[B[0], B[1]] += 1
    assert not found.diagonal().any()
    assert chisquare(found[~np.eye(5, dtype=bool)]).pvalue > 1e-3


def test_lazy_insertions_of_batches():
    """A level of 20 is built again when it has grown to 30, not before."""
    apart = Coverage(torch.eye(60).repeat_interleave(3, 1).double())
    d = ds.Dynamic(apart, 5, guesses=[15.0], trials=10)
    d.play(np.arange(60) + 1)
    built, size = d.levels.built[0, 1], d.levels.size[0, 1]
    assert size == 60 and built <= 60 < 1.5 * built
    sizes = []
    d = ds.Dynamic(apart, 5, guesses=[15.0], trials=10)
    for v in range(30):
        d.play([v + 1])
        sizes.append(int(d.levels.built[0, 1]))
    assert sizes == [1, 2, 3, 3, 5, 5, 5, 8, 8, 8, 8, 12, 12, 12, 12, 12, 12] + [18] * 9 + [27] * 4


def test_adaptive_adversary_deletes_the_first_element():
    f = coverage(1, 40)
    d = ds.Dynamic(f, 3, seed=2)
    d.play(np.arange(40) + 1)
    for _ in range(5):
        first = d.solution()[0]
        out = d.play([ds.ADAPTIVE])
        assert out.element[0] == first and out.hit.any() and first not in d.solution()


def naive_sieve(f, k, guess, stream):
    """Value and queries of every update, by the rule."""
    order, G, out, tau = [], [], [], guess / (2 * k)
    for op in stream:
        v, queries = abs(op) - 1, 0
        todo = []
        if op > 0:
            order.append(v)
            todo, queries = [v], 1
        else:
            order.remove(v)
            if v in G:
                G, todo = [], order
        for e in todo:
            if len(G) < k and tau <= value(f, [e]) <= guess:
                queries += len(G) > 0
                if value(f, [*G, e]) - value(f, G) >= tau:
                    G = [*G, e]
        out.append((value(f, G), queries))
    return np.array(out).T


@pytest.mark.parametrize("make", MAKES)
def test_sieve_against_its_rule(make):
    for seed in range(5):
        f = make(seed)
        guess = brute_force(f, torch.arange(12), 3)
        stream = ds.churn(12, 150, 0.45, seed)
        out = ds.Sieve(f, 3, guesses=[guess]).play(stream)
        values, queries = naive_sieve(f, 3, guess, stream)
        np.testing.assert_allclose(out.value, values, atol=1e-9)
        np.testing.assert_array_equal(out.queries, queries)
        assert f.queries == queries.sum() and out.hit.any()
        # Several guesses: the best value; f(v) is asked once.
        both = ds.Sieve(f, 3, guesses=[guess, 0.5 * guess]).play(stream)
        more, again = naive_sieve(f, 3, 0.5 * guess, stream)
        np.testing.assert_allclose(both.value, np.maximum(values, more), atol=1e-9)
        np.testing.assert_array_equal(both.queries, queries + again - (stream > 0))


@pytest.mark.parametrize("make", MAKES)
def test_pack_keeps_the_function(make):
    f = make(5)
    rows = ds.pack(f)
    bits = make is coverage
    assert (rows.ones.shape[1] > 0) == bits and (rows.real.shape[1] == 0) == bits
    d = ds.Dynamic(f, 12, guesses=[1e-6 * value(f, range(12))], seed=0)
    assert d.play(np.arange(12) + 1).value[-1] == 0  # every element exceeds so small a guess
    d = ds.Dynamic(f, 12, seed=0)
    assert d.play(np.arange(12) + 1).value[-1] <= value(f, range(12)) + 1e-9


def test_guesses_cover_what_opt_can_be():
    for make in MAKES:
        f = make(2)
        g, single = ds.all_guesses(f, 5, 0.1), [value(f, [e]) for e in range(12)]
        assert g[0] <= min(single) and g[-1] >= 5 * max(single)
        np.testing.assert_allclose(g[1:] / g[:-1], 1.1)


def test_streams():
    s = ds.grow_and_shrink(20, 3)
    assert sorted(s[:20]) == list(range(1, 21)) == sorted(-s[20:])
    assert (s[:20] != -s[20:]).any()
    s = ds.sliding_window(20, 8, 3)
    live = []
    for t, op in enumerate(s):
        if op < 0:
            assert -op == live.pop(0) and t >= 8
        else:
            live.append(op)
        assert len(live) <= 8
    assert len(s) == 8 + 2 * 12 and len(live) == 8
    s = ds.churn(30, 3000, 0.5, 1)
    sizes = np.cumsum(np.sign(s))
    assert sizes.min() == 0 and sizes.max() <= 30
    assert (ds.churn(1000, 900, 0.3, 1) < 0).mean() == pytest.approx(0.3, abs=0.05)
    assert (ds.churn(30, 50, 0.5, 1) != ds.churn(30, 50, 0.5, 2)).any()


def test_the_same_seed_gives_the_same_run_and_parts_of_a_stream_join():
    f, s = coverage(1, 40), ds.grow_and_shrink(40, 1)
    whole = ds.Dynamic(f, 4, seed=5).play(s)
    d = ds.Dynamic(f, 4, seed=5)
    parts = [d.play(s[:33]), d.play(s[33:])]
    for name in ("value", "queries", "hit", "chance"):
        joined = np.concatenate([vars(p)[name] for p in parts])
        np.testing.assert_array_equal(joined, vars(whole)[name])
    assert (ds.Dynamic(f, 4, seed=6).play(s).queries != whole.queries).any()


def test_bad_input():
    f = coverage()
    for options, message in (
        (dict(k=0), "k = 0: choose 1 to n = 12"),
        (dict(k=13), "k = 13"),
        (dict(k=3, eps=0.0), "eps = 0.0"),
        (dict(k=3, eps=1.0), "eps = 1.0"),
        (dict(k=3, trials=-1), "trials = -1"),
        (dict(k=3, guesses=[1.0, 0.0]), "positive numbers"),
        (dict(k=3, guesses=[]), "positive numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            ds.Dynamic(f, **options)
    d = ds.Dynamic(f, 3)
    for stream, message in (
        ([13], "element 12: f has 0 to 11"),
        ([1, 1], "update 1 inserts element 0, which is already there"),
        ([-1], "update 0 deletes element 0, which is not there"),
        ([3, 1, -3, 2, -3], "update 4 deletes element 2, which is not there"),
        ([0.5], "whole numbers"),
        ([[1]], "whole numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            d.play(stream)
    d.play([5, 6, -5])
    for stream, message in (
        ([7, 6], "update 1 inserts element 5"),
        ([-5], "element 4, which is not"),
    ):
        with pytest.raises(ValueError, match=message):
            d.play(stream)
    assert d.play(np.array([], int)).value.shape == (0,)
    with pytest.raises(ValueError, match="without ADAPTIVE"):
        ds.Sieve(f, 3).play([1, 0])
