"""LCB and VI-LCB against plain loops, exact binomial probabilities and linear solves."""

import math
from itertools import product

import numpy as np
import pytest
import torch
from scipy.stats import binom

from miniature.theory.mdp import MDP, garnet
from miniature.theory.pessimism_lcb import (
    argmax,
    bernstein_lcb,
    certificate,
    concentrability,
    empirical_best,
    folds,
    fork,
    hoeffding,
    lcb,
    most_played,
    rare_arms,
    rare_states,
    sample,
    steps,
    suboptimality,
    symmetric,
    value_iteration,
    vi_lcb,
    width,
    widths_hold,
)

GAMMA = 0.8


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def some_counts(shape, seed=0, top=6):
    """Small counts, many of them zero, and rewards that fit them."""
    n = torch.randint(0, top, shape, generator=rng(seed)).double()
    return n, torch.binomial(n, torch.full_like(n, 0.6), generator=rng(seed + 1))


# --- bandits -----------------------------------------------------------------------------------


def test_the_penalty_is_that_of_the_theorem():
    assert hoeffding(1, 10, 0.01) == pytest.approx(math.log(2 * 10 / 0.01) / 2)
    assert hoeffding(3, 2, 0.1, folds=7) == pytest.approx(math.log(2 * 3 * 2 * 7 / 0.1) / 2)
    b = width(double(0, 1, 4, 100), 0.25)
    torch.testing.assert_close(b, double(1, 0.5, 0.25, 0.05))  # an action never seen: 1
    torch.testing.assert_close(width(double(0, 1, 4), 4.0), double(2, 2, 1))
    with pytest.raises(ValueError, match="not -1"):
        width(double(1), -1)
    with pytest.raises(ValueError, match=r"\(0, 1\), not 1"):
        hoeffding(2, 2, 1)


@pytest.mark.parametrize("n, p", [(3, 0.5), (40, 0.9), (200, 0.3)])
def test_the_widths_hold_with_the_probability_promised(n, p):
    delta, A = 0.1, 4
    k = np.arange(n + 1)
    miss = np.abs(k / n - p) > float(width(double(n), hoeffding(1, A, delta)))
    assert binom.pmf(k, n, p)[miss].sum() <= delta / A


def test_lcb_by_a_loop():
    counts, rewards = some_counts((50, 3, 4))
    for L in (0.3, 1.0, 3.0):
        policy = lcb(counts, rewards, L)
        for i, s in product(range(50), range(3)):
            value = []
            for n, k in zip(counts[i, s].tolist(), rewards[i, s].tolist()):
                value.append(k / n - math.sqrt(L / n) if n else -max(1, math.sqrt(L)))
            best = [a for a in range(4) if value[a] == max(value)]
            expected = [1 / len(best) if a in best else 0 for a in range(4)]
            assert policy[i, s].tolist() == pytest.approx(expected)


def test_what_was_never_seen_comes_last():
    for L in (0.2, 1.0, 9.0):
        counts, rewards = double([0.0, 3.0, 0.0]), double([0.0, 1.0, 0.0])
        assert lcb(counts, rewards, L).tolist() == [[0, 1, 0]]
    # the empirically best arm is the lucky one, and the most played one does not look
    counts, rewards = double([100.0, 1.0, 0.0]), double([90.0, 1.0, 0.0])
    assert empirical_best(counts, rewards).tolist() == [[0, 1, 0]]
    assert lcb(counts, rewards, 1.0).tolist() == [[1, 0, 0]]
    assert most_played(counts).tolist() == [[1, 0, 0]]
    assert argmax(double([1.0, 1.0, 0.0])).tolist() == [[0.5, 0.5, 0]]


@pytest.mark.parametrize("top", [8, 400])
def test_the_bernstein_width_by_a_loop(top):
    counts, rewards = some_counts((200, 2, 3), top=top)
    L = 0.4
    policy = bernstein_lcb(counts, rewards, L)
    for i, s in product(range(200), range(2)):
        value = []
        for n, k in zip(counts[i, s].tolist(), rewards[i, s].tolist()):
            if n < 2:
                value.append((k / n if n else 0) - 1 - 14 * L / 3)
                continue
            v = np.var([1] * int(k) + [0] * int(n - k), ddof=1)
            log = 2 * L  # log(2 / delta') of Maurer and Pontil
            value.append(k / n - math.sqrt(2 * v * log / n) - 7 * log / (3 * (n - 1)))
        assert policy[i, s, int(np.argmax(value))] > 0


def test_the_expected_loss_by_enumeration():
    """Two arms: all counts and rewards that N = 12 samples can show."""
    N, C, gap, L = 12, 1.6, 0.4, 0.8
    mu, r, rho = symmetric(1, C, double(gap)[0])
    expected = 0.0
    for n in range(N + 1):  # samples of the better arm, which is the last one
        for good, bad in product(range(n + 1), range(N - n + 1)):
            p = binom.pmf(n, N, 1 / C) * binom.pmf(good, n, 0.7) * binom.pmf(bad, N - n, 0.3)
            a = good / n - math.sqrt(L / n) if n else -1
            b = bad / (N - n) - math.sqrt(L / (N - n)) if n < N else -1
            expected += p * gap * (1.0 if b > a else 0.5 if a == b else 0.0)
    counts, rewards = sample(mu.expand(40_000, 1, 2), r, N, rng())
    errors = suboptimality(lcb(counts, rewards, L), r, rho)
    assert errors.mean() == pytest.approx(expected, abs=4 * float(errors.std()) / 200)
    assert 0.005 < expected < 0.1


def test_samples():
    mu, r, rho = symmetric(3, 4.0, double(0.5))
    counts, rewards = sample(mu.expand(2000, 3, 2), r, 60, rng())
    assert (counts.sum((-1, -2)) == 60).all() and (rewards <= counts).all()
    torch.testing.assert_close(counts.mean(0), 60 * mu, atol=0.3, rtol=0)
    torch.testing.assert_close(
        rewards.sum(0) / counts.sum(0), double([0.25, 0.75]).expand(3, 2), atol=0.02, rtol=0
    )
    assert suboptimality(argmax(-r), r, rho).item() == pytest.approx(0.5)


@pytest.mark.parametrize("C", [1.0, 1.5, 4.0])
def test_instances_cover_as_they_say(C):
    d = double([0.0, 1.0]) / 5
    mu, _, rho = symmetric(5, C, double(0.1))
    assert concentrability(d.expand(5, 2), mu) == pytest.approx(C)
    assert mu.sum() == pytest.approx(1) and rho.tolist() == pytest.approx([0.2] * 5)
    mu, r, _ = rare_arms(10, max(C, 1.2), 1000, double(0.3))
    assert mu.sum() == pytest.approx(1) and (mu[0, 1:-1] == 0.002).all()
    assert mu[0, -1] == pytest.approx(1 / max(C, 1.2))
    assert r[0, 0].tolist() == pytest.approx([0.5] * 9 + [0.8])
    mdp, mu, best = fork(6, C, double(0.2, 0.6), 0.9)
    d = mdp.occupancy(best)
    assert concentrability(d, mu).tolist() == pytest.approx([C, C])
    torch.testing.assert_close(mu.sum((-1, -2)), double(1, 1))
    # the better action wins the state that pays 1 for ever with probability (1 + gap) / 2
    torch.testing.assert_close(mdp.value(best), 0.9 / 0.1 * double(0.6, 0.8))
    torch.testing.assert_close(mdp.value(best), mdp.optimal()[1][..., 0])
    assert mdp.r.sum() == 4


def test_expert_data():
    mu, _, rho = rare_states(20, 1000, double(0.5))
    assert concentrability(mu, mu) == 1 and (mu[:, 0] == 0).all()
    assert rho[1:].tolist() == pytest.approx([0.001] * 19) and rho.sum() == pytest.approx(1)
    assert concentrability(double([0.5, 0.5]), double([1.0, 0.0])) == math.inf
    mdp, mu, best = fork(6, 1.0, double(0.2), 0.9, rare=0.01)
    assert mdp.start[0].tolist() == pytest.approx([0.97, 0.01, 0.01, 0.01, 0, 0])
    torch.testing.assert_close(mu, mdp.occupancy(best))


# --- MDPs --------------------------------------------------------------------------------------


def small_folds(n=4000, T=6, seeds=(0, 1, 2), A=2):
    mdp = garnet(list(seeds), 4, A, 2, GAMMA)
    mu = torch.rand(len(seeds), 4, A, dtype=torch.float64, generator=rng()) ** 3
    mu = mu / mu.sum((-1, -2), keepdim=True)
    return mdp, mu, *folds(mdp, mu, n, T, rng(1))


@pytest.mark.parametrize("n, L", [(70, 0.0), (70, 0.01), (4000, 0.02), (4000, 1.0)])
def test_vi_lcb_by_a_loop(n, L):
    _, _, counts, rewards = small_folds(n)
    out = vi_lcb(counts, rewards, GAMMA, L)
    c, w = counts.numpy(), rewards.numpy()
    kept = changed = 0
    for i in range(3):
        V = np.zeros(4)
        policy = np.zeros((4, 2))
        for s in range(4):
            m = c[i, 0, s].sum(-1)
            policy[s] = (m == m.max()) / (m == m.max()).sum()
        for t in range(1, c.shape[1]):
            old = V.copy()
            for s in range(4):
                Q = []
                for a in range(2):
                    m = max(1, c[i, t, s, a].sum())
                    b = math.sqrt(L / m) / (1 - GAMMA)
                    assert out.b[i, t - 1, s, a].item() == pytest.approx(b, abs=1e-14)
                    backup = sum(c[i, t, s, a, z] / m * old[z] for z in range(4))
                    Q.append(w[i, t, s, a] / m - b + GAMMA * backup)
                if max(Q) < old[s] - 1e-12:
                    kept += 1
                else:
                    changed += 1
                    V[s] = max(Q)
                    best = np.abs(np.array(Q) - max(Q)) < 1e-12
                    policy[s] = best / best.sum()
            np.testing.assert_allclose(out.V[i, t], V, atol=1e-12)
        np.testing.assert_allclose(out.policy[i], policy, atol=1e-12)
    assert kept > 0 and (changed > 0 or L == 1.0)


def test_three_steps_by_hand():
    """One state, no penalty: V = 0, 1, 1, 1. A tie with the old value takes the new action."""
    r = double([0.0, 0.0], [1.0, 0.0], [0.0, 0.5], [0.4, 0.0])[:, None, :]
    counts = torch.full((4, 1, 2, 1), 2.0, dtype=torch.float64)
    for T, action in ((1, 0), (2, 1), (3, 1)):  # step 3 finds 0.9 and leaves all as it was
        out = vi_lcb(counts[: T + 1], 2 * r[: T + 1], 0.5, 0.0)
        assert out.V[:, 0].tolist() == [0, 1, 1, 1][: T + 1]
        assert out.policy[0, action] == 1


def test_values_never_fall_and_start_at_zero():
    _, _, counts, rewards = small_folds()
    V = vi_lcb(counts, rewards, GAMMA, 0.02).V
    assert (V[..., 0, :] == 0).all() and (V.diff(dim=-2) >= 0).all() and (V[..., -1, :] > 0).any()


def test_the_first_fold_is_imitated_where_nothing_is_certain():
    """With a penalty beyond V_max no value rises, and pi_T is pi_0, from fold 0 alone."""
    _, _, counts, rewards = small_folds(70)
    out = vi_lcb(counts, rewards, GAMMA, 1e6)
    torch.testing.assert_close(out.policy, argmax(counts[:, 0].sum(-1)))
    assert (out.policy != argmax(counts.sum((1, -1)))).any()
    assert (out.V == 0).all()


def test_pessimism_holds_and_optimism_does_not():
    T, delta = 100, 0.1
    mdp, _, counts, rewards = small_folds(10**7, T, range(40))
    best, V_best = mdp.optimal()
    L = hoeffding(4, 2, delta, T)
    out = vi_lcb(counts, rewards, GAMMA, L)
    V = mdp.evaluate(out.policy)
    assert (out.V[:, -1] <= V + 1e-12).all() and (V <= V_best + 1e-12).all()
    lost = (mdp.start * (V_best - V)).sum(-1)
    bound = certificate(mdp, best, out.b)
    assert (lost <= bound).all() and (bound < 1 / (1 - GAMMA)).any()
    greedy = vi_lcb(counts, rewards, GAMMA, 0.0)
    assert (greedy.V[:, -1] > mdp.evaluate(greedy.policy)).any(-1).double().mean() > 0.9


def test_whether_widths_hold_by_a_loop():
    mdp, _, counts, rewards = small_folds(700, seeds=range(12))
    seen = set()
    for L in (0.0, 0.1, 0.3, 1.0, 3.0):
        out = vi_lcb(counts, rewards, GAMMA, L)
        held = widths_hold(mdp, counts, rewards, out)
        for i in range(12):
            ok = True
            for t, s, a in product(range(1, 7), range(4), range(2)):
                n, V = max(1, float(counts[i, t, s, a].sum())), out.V[i, t - 1]
                error = float(rewards[i, t, s, a]) / n - float(mdp.r[i, s, a])
                error += GAMMA * float((counts[i, t, s, a] / n - mdp.P[i, s, a]) @ V)
                ok = ok and abs(error) <= math.sqrt(L / n) / (1 - GAMMA)
            assert bool(held[i]) == ok
            seen.add(ok)
            if ok:  # the lemma, at any penalty: where widths hold, the values are promises kept
                assert (out.V[i, -1] <= mdp.evaluate(out.policy)[i] + 1e-12).all()
    assert seen == {True, False}


def test_the_certificate_by_powers():
    mdp, _, counts, rewards = small_folds()
    best, _ = mdp.optimal()
    b = vi_lcb(counts, rewards, GAMMA, 0.3).b
    T = b.shape[1]
    for i in range(3):
        P = mdp.P[i, range(4), best[i]]
        expected = GAMMA**T / (1 - GAMMA)
        for t in range(1, T + 1):  # fold t is T - t steps from the end
            at = mdp.start[i] @ torch.linalg.matrix_power(P, T - t)
            expected += 2 * GAMMA ** (T - t) * float((at * b[i, t - 1, range(4), best[i]]).sum())
        assert certificate(mdp, best, b)[i].item() == pytest.approx(expected)
    # equal folds and T large: the short form with the occupancy
    same = b[:, :1].expand(3, 400, 4, 2)
    short = 2 / (1 - GAMMA) * (mdp.occupancy(best) * same[:, 0]).sum((-1, -2))
    torch.testing.assert_close(certificate(mdp, best, same), short)


def test_with_endless_data_all_find_the_optimum():
    mdp = garnet([0, 1, 2], 4, 2, 2, GAMMA)
    best, V = mdp.optimal()
    T, m = 200, 1e14
    counts, rewards = m * mdp.P, m * mdp.r
    policy, V_found = value_iteration(counts, rewards, GAMMA, T)
    torch.testing.assert_close(V_found, V, atol=1e-9, rtol=0)
    assert (policy.argmax(-1) == best).all()
    out = vi_lcb(
        counts[:, None].expand(-1, T, -1, -1, -1), rewards[:, None].expand(-1, T, -1, -1), GAMMA, 1
    )
    torch.testing.assert_close(out.V[:, -1], V, atol=1e-5, rtol=0)
    assert (out.policy.argmax(-1) == best).all()


def test_value_iteration_by_a_loop():
    _, _, counts, rewards = small_folds(60)
    counts, rewards = counts.sum(1), rewards.sum(1)
    policy, V = value_iteration(counts, rewards, GAMMA, 5, L=0.01)
    for i in range(3):
        v = np.zeros(4)
        for _ in range(5):
            Q = np.empty((4, 2))
            for s, a in product(range(4), range(2)):
                n = max(1, float(counts[i, s, a].sum()))
                Q[s, a] = float(rewards[i, s, a]) / n - math.sqrt(0.01 / n) / (1 - GAMMA)
                Q[s, a] += GAMMA * float(counts[i, s, a] @ torch.from_numpy(v)) / n
            v = np.maximum(Q.max(1), 0)
        np.testing.assert_allclose(V[i], v, atol=1e-12)
        assert (policy[i].numpy()[range(4), Q.argmax(1)] > 0).all()


def test_folds():
    mdp, mu, counts, rewards = small_folds(4003, T=6)
    assert counts.shape == (3, 7, 4, 2, 4) and rewards.shape == (3, 7, 4, 2)
    assert (counts.sum((-1, -2, -3)) == 4003 // 7).all()
    torch.testing.assert_close(counts.sum((1, -1)) / 4003, mu, atol=0.04, rtol=0)
    one = MDP(mdp.P[:1], mdp.r[:1], GAMMA, mdp.start[:1])
    assert folds(one, mu[:1].expand(9, 4, 2), 50, 4, rng())[0].shape == (9, 5, 4, 2, 4)
    assert steps(1000, 0.9) == math.ceil(math.log(1000) / 0.1)
    with pytest.raises(ValueError, match=r"3 samples do not fill T \+ 1 = 7"):
        folds(mdp, mu, 3, 6, rng())


def test_bad_input_is_refused():
    n = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"\[2, 3\] and rewards \[3, 2\]"):
        lcb(n, n.T, 1.0)
    with pytest.raises(ValueError, match=r"at least 1, not 0\.5"):
        symmetric(2, 0.5, double(0.1))
    with pytest.raises(ValueError, match=r"2\.\.n = 2\.\.10, not 11"):
        rare_states(11, 10, double(0.1))
    with pytest.raises(ValueError, match=r"no mass for 8 rare arms at n = 20"):
        rare_arms(10, 2.0, 20, double(0.1))
    with pytest.raises(ValueError, match=r"T >= 1, got \[1, 2, 2, 2\]"):
        vi_lcb(torch.ones(1, 2, 2, 2), torch.ones(1, 2, 2), 0.9, 1.0)


@pytest.mark.gpu
def test_the_gpu_agrees_with_the_cpu():
    _, _, counts, rewards = small_folds(4000)
    here = vi_lcb(counts, rewards, GAMMA, 0.02)
    there = vi_lcb(counts.cuda(), rewards.cuda(), GAMMA, 0.02)
    torch.testing.assert_close(there.V.cpu(), here.V, atol=1e-12, rtol=0)
    torch.testing.assert_close(there.policy.cpu(), here.policy)
    counts, rewards = some_counts((30, 3, 4))
    torch.testing.assert_close(
        lcb(counts.cuda(), rewards.cuda(), 1.0).cpu(), lcb(counts, rewards, 1.0)
    )
    mu, r, _ = symmetric(3, 2.0, double(0.5).cuda())
    assert sample(mu.expand(5, 3, 2), r, 60, torch.Generator("cuda"))[0].sum() == 300
