"""SOR and its costs, Young's formula, the surrogate, and the learners, against plain copies."""

import math

import numpy as np
import pytest
import torch
from scipy.linalg import solve_triangular
from scipy.optimize import brentq, lsq_linear
from scipy.stats import chi2

from miniature.theory import learning_to_relax as lr
from miniature.theory.bandits import Table, play, uniforms

OMEGAS = np.linspace(1, 1.95, 20)


def matrix(side, shift=0.0):
    n = side**2
    A = np.zeros((n, n))
    for i in range(side):
        for j in range(side):
            A[i * side + j, i * side + j] = 4 + shift
            for k, m in ((i + 1, j), (i - 1, j), (i, j + 1), (i, j - 1)):
                if 0 <= k < side and 0 <= m < side:
                    A[i * side + j, k * side + m] = -1
    return A


def sor(A, b, omega, eps=lr.EPSILON, cap=lr.CAP):
    """The solver as written: x is kept, M is solved with, the residual is recomputed."""
    M = np.diag(np.diag(A)) / omega + np.tril(A, -1)
    x, first = np.zeros(len(b)), np.linalg.norm(b)
    for k in range(1, cap + 1):
        x = x + solve_triangular(M, b - A @ x, lower=True)
        if np.linalg.norm(b - A @ x) / first < eps:
            return k
    return cap


def test_right_sides_are_gaussian_within_the_ball():
    square = (lr.right_sides(4000, 4, 1) ** 2).sum(1)
    assert square.shape == (4000,) and square.max() <= 4
    assert square.mean() == pytest.approx(4 * chi2.cdf(4, 6) / chi2.cdf(4, 4), abs=0.06)
    assert not np.allclose(lr.right_sides(2, 4, 1), lr.right_sides(2, 4, 2))


def test_the_matrix_and_its_extreme_eigenvalues():
    for side, shift in ((2, 0.0), (5, 0.3), (10, -0.15)):
        A = matrix(side, shift)
        np.testing.assert_array_equal(lr.laplacian(side, shift).numpy(), A)
        assert np.linalg.eigvalsh(A)[0] == pytest.approx(lr.least_eigenvalue(side) + shift)
        jacobi = np.eye(side**2) - A / np.diag(A)[:, None]
        beta = np.abs(np.linalg.eigvals(jacobi)).max()
        assert lr.jacobi_radius(shift, side) == pytest.approx(beta, abs=1e-12)


@pytest.mark.parametrize("side", [1, 3, 6])
def test_iterations_against_a_plain_solver(side):
    shifts, omegas = [0.0, 0.37], np.array([0.7, 1.0, 1.3, 1.9])
    rhs = lr.right_sides(3, side**2, 4)
    costs = lr.iterations(shifts, omegas, rhs, side)
    assert costs.shape == (2, 4, 3)
    for c, w, b in np.ndindex(costs.shape):
        assert costs[c, w, b] == sor(matrix(side, shifts[c]), rhs[b], omegas[w])


def test_iterations_take_an_omega_for_each_shift_a_tolerance_and_a_cap():
    rhs = lr.right_sides(2, 16, 1)
    each = lr.iterations([0.0, 0.5], [[1.2], [1.6]], rhs, 4, eps=1e-3)
    for c, w, row in ((0.0, 1.2, each[0]), (0.5, 1.6, each[1])):
        assert row[0].tolist() == [sor(matrix(4, c), b, w, 1e-3) for b in rhs]
    own = lr.iterations([0.0, 0.5], [1.2], rhs[:, None], 4)[:, 0, 0]  # and a right side for each
    assert own.tolist() == [sor(matrix(4, c), b, 1.2) for c, b in zip((0.0, 0.5), rhs)]
    full = lr.iterations([0.0], [1.0], rhs, 4)[0, 0]
    assert (full > 5).all()
    assert lr.iterations([0.0], [1.0], rhs, 4, cap=5).tolist() == [[[5, 5]]]
    assert lr.iterations([0.0], [1.0], rhs, 4, cap=int(full.max()))[0, 0].tolist() == full.tolist()


def test_right_sides_are_truncated_gaussians():
    b = lr.right_sides(500, 30, 0)
    assert b.shape == (500, 30) and (np.linalg.norm(b, axis=1) <= math.sqrt(30)).all()
    assert abs(b.mean()) < 0.03 and 0.75 < b.var() < 1  # cut above, so below 1
    assert (b != lr.right_sides(500, 30, 1)).all()
    np.testing.assert_array_equal(b[:7], lr.right_sides(500, 30, 0)[:7])


@pytest.mark.parametrize("shift", [-0.1, 0.0, 0.2])
def test_young(shift):
    """The radius, and the relation between every eigenvalue of C and those of Jacobi's matrix."""
    A = lr.laplacian(6, shift)
    C = lr.residual_map(A, torch.from_numpy(OMEGAS)).numpy()
    beta = lr.jacobi_radius(shift, 6)
    jacobi = np.linalg.eigvalsh(np.eye(36) - A.numpy() / (4 + shift))
    for omega, c in zip(OMEGAS, C):
        M = np.diag(np.diag(A)) / omega + np.tril(A, -1)
        np.testing.assert_allclose(c, np.eye(36) - A.numpy() @ np.linalg.inv(M), atol=1e-12)
        radius = np.abs(np.linalg.eigvals(c)).max()
        assert float(lr.young_radius(omega, beta)) == pytest.approx(radius, abs=1e-6)
        roots = np.concatenate([np.roots([1, -omega * m, omega - 1]) ** 2 for m in jacobi])
        product = np.prod(0.3 - roots)  # every pair +-mu gives its roots twice
        assert product == pytest.approx(np.linalg.det(0.3 * np.eye(36) - c) ** 2, rel=1e-6)


def test_the_residual_follows_C():
    A, b = matrix(4, 0.1), lr.right_sides(1, 16, 0)[0]
    M = np.diag(np.diag(A)) / 1.4 + np.tril(A, -1)
    x = np.linalg.solve(M, b)
    C = lr.residual_map(torch.from_numpy(A), torch.tensor(1.4, dtype=torch.float64)).numpy()
    np.testing.assert_allclose(C @ b, b - A @ x, atol=1e-12)


def test_the_best_omega_has_the_least_radius():
    fine = np.linspace(1, 1.999, 40_000)
    for beta in (0.0, 0.5, 0.9595, 0.997):
        assert float(lr.best_omega(beta)) == pytest.approx(
            fine[lr.young_radius(fine, beta).argmin()], abs=3e-5
        )
    assert float(lr.young_radius(1.0, 0.9)) == pytest.approx(0.81)  # Gauss-Seidel: Jacobi twice


@pytest.mark.parametrize("shift", [0.0, 0.2])
def test_the_surrogate_bounds_the_cost(shift):
    rhs = lr.right_sides(4, 100, 3)
    cost = lr.iterations([shift], OMEGAS, rhs, 10)[0].max(1)
    rho = lr.young_radius(OMEGAS, lr.jacobi_radius(shift, 10))
    C = lr.residual_map(lr.laplacian(10, shift), torch.from_numpy(OMEGAS))
    each = lr.asymptocity(C, rho, cost)
    for i in (0, 9, 19):
        norm = np.linalg.norm(np.linalg.matrix_power(C[i].numpy(), int(cost[i]) - 1), 2)
        rate = rho[i] + each[i] * (1 - rho[i])
        assert rate ** (cost[i] - 1) == pytest.approx(norm, rel=1e-6)
    tau = each.max()
    assert 0 < tau < 1 / math.e**2 + 0.1
    U = lr.surrogate(rho, tau)
    assert (cost <= U).all() and (U < 3 * cost).all()
    assert (cost > lr.surrogate(rho, 0)).any()  # the radius alone is no bound
    assert float(lr.surrogate(np.array(0.5), 0.2, 1e-4)) == pytest.approx(
        1 + math.log(1e-4) / math.log(0.6)
    )


def test_the_energy_bound():
    A = matrix(5, 0.1)
    values, vectors = np.linalg.eigh(A)
    half = vectors * np.sqrt(values) @ vectors.T
    omegas = np.array([0.8, 1.0, 1.5, 1.9])
    bound = lr.energy_bound(torch.from_numpy(A), omegas, 1e-6)
    change = math.log(1e-6 / (2 * math.sqrt(values[-1] / values[0])))
    for omega, b in zip(omegas, bound):
        M = np.diag(np.diag(A)) / omega + np.tril(A, -1)
        norm = np.linalg.norm(half @ (np.eye(25) - np.linalg.inv(M) @ A) @ np.linalg.inv(half), 2)
        assert norm <= math.exp(change / b) + 1e-12 < 1
    rhs = lr.right_sides(3, 25, 0)
    assert (lr.iterations([0.1], omegas, rhs, 5, 1e-6)[0].max(1) <= bound).all()


def root(losses, eta):
    """x with sum 4 / (eta (losses - x))^2 = 1, by bisection."""
    top, d = losses.min(), len(losses)
    f = lambda x: (4 / (eta * (losses - x)) ** 2).sum() - 1  # noqa: E731
    return brentq(f, top - 2.1 * math.sqrt(d) / eta, top - 1.9 / eta, xtol=1e-13)


@pytest.mark.parametrize("d", [1, 2, 20, 200])
def test_tsallis_weights(d):
    rng = np.random.default_rng(d)
    losses = rng.exponential(size=(40, d)) * 10 ** rng.uniform(-3, 5, (40, 1))
    losses[0] = 7.0
    eta = 2 / np.sqrt(rng.integers(1, 10**5, (40, 1)))
    p = lr.tsallis(torch.from_numpy(losses), torch.from_numpy(eta)).numpy()
    np.testing.assert_allclose(p.sum(1), 1, atol=1e-8)
    for row, loss, e in zip(p, losses, eta[:, 0]):
        np.testing.assert_allclose(row, 4 / (e * (loss - root(loss, e))) ** 2, rtol=1e-5)


def test_the_released_rule_is_newton_and_leaves_the_solution():
    losses = torch.tensor([[0.3, 0.0, 0.9]]).double()
    eta = torch.tensor([[2.0]]).double()
    close = lr.tsallis_released(losses, eta)  # few rounds: x = -1 is on the safe side
    torch.testing.assert_close(close, lr.tsallis(losses, eta))
    second = lr.tsallis_released(losses, eta, steps=2).numpy()
    p = 4 * (2 * (losses.numpy() + 1)) ** -2.0
    x = -1 - (p.sum() - 1) / (2 * (p**1.5).sum())
    np.testing.assert_allclose(second, 4 * (2 * (losses.numpy() - x)) ** -2.0)
    far = lr.tsallis_released(1000 + 100 * losses, 2 / torch.tensor([[1000.0]]).double().sqrt())
    assert abs(float(far.sum()) - 1) > 0.01


def game(seeds, T=80, d=6, context=True):
    like = torch.zeros(1, dtype=torch.float64)
    losses = 40 * uniforms(seeds, 8, (T, d), like) * torch.arange(1.0, d + 1).double()
    return Table(losses, seeds, 2 * uniforms(seeds, 7, (T,), like) - 1 if context else None)


def test_tsallis_inf_against_a_plain_loop():
    seeds, T, d = [3, 5], 80, 6
    env = game(seeds, T, d, context=False)
    run = play(lr.TsallisINF(), env)
    u = uniforms(seeds, 1, (T,), env.losses).numpy()
    for s in range(2):
        k, seen = np.zeros(d), []
        for t in range(1, T + 1):
            eta, scale = 2 / math.sqrt(t), np.mean(seen) if seen else 1.0
            p = 4 / (eta * (k / scale - root(k / scale, eta))) ** 2
            arm = int(run.arms[s, t - 1])
            assert arm == np.searchsorted(p.cumsum() / p.sum(), u[s, t - 1], side="right")
            seen.append(float(env.losses[s, t - 1, arm]))
            k[arm] += seen[-1] / p[arm]


def test_weights_that_do_not_sum_to_1_divide_the_losses_as_they_are():
    """As in the released code: arms are drawn in proportion."""
    w = torch.tensor([[0.2, 0.1, 0.1]]).double()
    learner = lr.TsallisINF(weights=lambda losses, eta: w)
    learner.start(torch.zeros_like(w), 2)
    p = learner.probabilities(0, None)
    torch.testing.assert_close(p, w / 0.4)
    learner.update(0, torch.tensor([0]), torch.tensor([3.0]).double(), p, None)
    torch.testing.assert_close(learner.k, torch.tensor([[15.0, 0, 0]]).double())


def test_the_unit_of_the_losses_does_not_matter():
    env = game([3, 5])
    for kind in (lr.TsallisINF, lr.TsallisINFCB, lr.ChebCB):
        other = Table(1000 * env.losses, env.seeds, env.contexts)
        assert torch.equal(play(kind(), env).arms, play(kind(), other).arms)


def test_each_bin_is_a_learner_of_its_own():
    seeds, T = [3, 5], 80
    env = game(seeds, T)
    whole, parts = lr.TsallisINFCB(4), [lr.TsallisINF() for _ in range(4)]
    for learner in (whole, *parts):
        learner.start(env.like[:1], T)
    for t in range(T):
        z = env.contexts[:1, t]
        b = int(np.clip(np.searchsorted([-0.5, 0, 0.5], float(z), side="right"), 0, 3))
        p = whole.probabilities(t, z)
        torch.testing.assert_close(p, parts[b].probabilities(t, None))
        arm = torch.tensor([t % 6])
        whole.update(t, arm, env.loss(t, arm.expand(2))[:1], p, z)
        parts[b].update(t, arm, env.loss(t, arm.expand(2))[:1], p, None)
    edge = torch.tensor([-1.0, 1.0]).double()
    whole.start(env.like, T)
    assert whole.bin(edge).tolist() == [0, 3]


def test_bins_may_differ_between_runs():
    env = game([3, 3, 3])
    run = play(lr.TsallisINF(torch.tensor([1, 5, 2])), env)
    for row, bins in enumerate((1, 5, 2)):
        alone = play(lr.TsallisINF(bins), game([3]))
        assert torch.equal(run.arms[row], alone.arms[0])


def test_box_least_squares():
    """Against SciPy, from any active set, well and badly conditioned, with few data too."""
    rng, kept = np.random.default_rng(0), 0
    for trial in range(120):
        n, low = rng.integers(1, 30), -0.5 if trial % 2 else 1
        X = np.polynomial.chebyshev.chebvander(rng.uniform(-1, low, n), 5)
        y, bound = 3 * rng.normal(size=n), np.r_[2, 3 / np.arange(1, 6)]
        G, h = X.T @ X + 1e-6 * np.eye(6), X.T @ y
        active, a = rng.integers(-1, 2, 6).astype(float), np.empty(6)
        lr.box_least_squares(G, h, bound, active, a, patience=trial % 4)
        whole = np.vstack([X, 1e-3 * np.eye(6)]), np.r_[y, np.zeros(6)]
        best = lsq_linear(*whole, (-bound, bound), method="bvls", tol=1e-14).x
        value = lambda v: v @ G @ v / 2 - h @ v  # noqa: E731, B023
        assert (abs(a) <= bound).all() and value(a) <= value(best) + 1e-10
        np.testing.assert_array_equal(active != 0, np.isclose(abs(a), bound, rtol=1e-12))
        kept += (active != 0).any()
    assert 30 < kept


def test_cheb_cb_against_a_plain_loop():
    """Every round: all fits from all data by SciPy, bounds and gamma from the paper's formulas."""
    seeds, T, d, m = [3], 60, 4, 3
    env = game(seeds, T, d)
    run, learner = play(lr.ChebCB(m), env), lr.ChebCB(m)
    learner.start(env.like, T)
    data, squares = [], 0.0
    for t in range(T):
        z = float(env.contexts[0, t])
        phi = np.polynomial.chebyshev.chebvander([z], m - 1)[0]
        y, gamma = np.zeros(d), 0.0
        if data:
            seen = np.array([loss for *_, loss in data])
            low, high = seen.min(), seen.max()
            bound = np.r_[high, 2 * (high - low) / np.arange(1, m)] + 1e-12
            for i in range(d):
                X = np.array([f for f, arm, _ in data if arm == i] + list(1e-3 * np.eye(m)))
                out = np.r_[[loss for _, arm, loss in data if arm == i], np.zeros(m)]
                y[i] = lsq_linear(X, out, (-bound, bound), method="bvls", tol=1e-15).x @ phi
            alpha = (math.pi + 2 / math.pi * math.log(2 * m + 1)) / (2 * (m + 1)) * (high - low)
            gamma = 2 * t * math.sqrt(d * t / (squares + 2 * alpha**2 * t))
        p = 1 / (d + gamma * (y - y.min()))
        p[y.argmin()] += 1 - p.sum()
        got = learner.probabilities(t, env.contexts[:, t])
        np.testing.assert_allclose(got[0].numpy(), p, atol=1e-7)
        arm = run.arms[:, t]
        loss = env.loss(t, arm)
        squares += (y[arm] - float(loss)) ** 2
        learner.update(t, arm, loss, got, env.contexts[:, t])
        data.append((phi, int(arm), float(loss)))


def test_context_pays():
    """The best arm depends on the context: ChebCB finds it, and so do bins; one learner cannot."""
    T, seeds = 1500, list(range(8))
    z = 2 * uniforms(seeds, 7, (T,), torch.zeros(1).double()) - 1
    losses = torch.stack([100 + 50 * z, 100 - 50 * z, torch.full_like(z, 110)], 2)
    env = Table(losses, seeds, z)
    cost = {k: play(k(), env).losses.mean() for k in (lr.TsallisINF, lr.TsallisINFCB, lr.ChebCB)}
    best = float(losses.min(2).values.mean())
    assert cost[lr.TsallisINF] > 99
    assert cost[lr.TsallisINFCB] < best + 0.4 * (100 - best)
    assert cost[lr.ChebCB] < best + 0.2 * (100 - best)


def test_instances_are_the_table_that_they_index():
    rng, S, T = np.random.default_rng(0), 3, 40
    cost = torch.from_numpy(rng.integers(1, 99, (5, 2, 4))).double()
    shift, rhs = lr.draw_shifts(0.5, 1.5, (5, 2), T, range(S))
    z = torch.linspace(-1, 1, 5).double()
    env = lr.Instances(cost, shift, rhs, z, range(S))
    full = Table(cost[shift, rhs] - 1, range(S), z[shift])
    a, b = play(lr.TsallisINFCB(2), env), play(lr.TsallisINFCB(2), full)
    assert torch.equal(a.arms, b.arms) and torch.equal(a.losses, b.losses)
    torch.testing.assert_close(a.regret, b.regret)
    torch.testing.assert_close(env.totals(7), full.losses[:, :7].sum(1))


def test_shifts_follow_the_beta_distribution():
    from scipy.stats import beta, kstest

    grid = lr.shift_grid(400)
    assert grid[0] > -0.15 and grid[-1] < 0.45 and (np.diff(grid) > 0).all()
    for a, b in ((0.5, 1.5), (2, 6)):
        shift, rhs = lr.draw_shifts(a, b, (400, 8), 4000, [5])
        x = (grid[shift[0]] + 0.15) / 0.6
        assert kstest(x, beta(a, b).cdf).statistic < 0.04
        assert set(rhs[0].tolist()) == set(range(8))


def test_bad_input_is_refused():
    rhs = lr.right_sides(2, 9, 0)
    with pytest.raises(ValueError, match=r"omega in \(0, 2\) only, got 2.0"):
        lr.iterations([0.0], [1.0, 2.0], rhs, 3)
    with pytest.raises(ValueError, match=r"must exceed -1.172.*got -1.3"):
        lr.iterations([0.0, -1.3], [1.0], rhs, 3)
    with pytest.raises(ValueError, match=r"\[B, 16\], not \[2, 9\]"):
        lr.iterations([0.0], [1.0], rhs, 4)
    with pytest.raises(ValueError, match=r"beta must lie in .0, 1., not 1.2"):
        lr.best_omega(1.2)
    with pytest.raises(ValueError, match="at least one bin, not 0"):
        lr.TsallisINF(0)
    with pytest.raises(ValueError, match="m must be at least 1, the constant polynomial, not 0"):
        lr.ChebCB(0)
    index = torch.zeros(2, 5, dtype=torch.long)
    with pytest.raises(ValueError, match=r"\[3, T\], not \[2, 5\] and \[2, 5\]"):
        lr.Instances(torch.ones(1, 1, 2), index, index, torch.zeros(1), range(3))


@pytest.mark.gpu
def test_the_map_and_the_game_on_the_gpu():
    A = lr.laplacian(6, 0.1, device="cuda")
    omega = torch.tensor([1.0, 1.6], dtype=torch.float64)
    torch.testing.assert_close(
        lr.residual_map(A, omega.cuda()).cpu(), lr.residual_map(A.cpu(), omega)
    )
    cost = torch.arange(1.0, 41).double().view(5, 2, 4)
    shift, rhs = lr.draw_shifts(2, 6, (5, 2), 30, [1, 2])
    z = torch.linspace(-1, 1, 5).double()
    cpu = play(lr.ChebCB(), lr.Instances(cost, shift, rhs, z, [1, 2]))
    moved = (v.cuda() for v in (cost, shift, rhs, z))
    gpu = play(lr.ChebCB(), lr.Instances(*moved, [1, 2]))
    torch.testing.assert_close(gpu.regret.cpu(), cpu.regret)
