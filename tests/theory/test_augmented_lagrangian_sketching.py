"""AdaSketch-Newton: formulas against autograd, solvers against loops and numpy, solutions."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize as scipy_minimize

from miniature.theory import augmented_lagrangian_sketching as al
from miniature.theory.augmented_lagrangian_sketching import AdaSketchNewton, minimize

DOUBLE = torch.float64


def problems():
    r = np.random.default_rng(0)
    X, y = r.standard_normal((40, 8)), r.choice([-1.0, 1.0], 40)
    return [*al.hock_schittkowski(), al.logistic(X, y, m=2), al.control(5)]


ALL = {p.name: p for p in problems()}


def points(p, S=3, seed=0):
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(S, len(p.x0), generator=gen, dtype=DOUBLE) * 0.3
    x = x + torch.tensor(p.x0, dtype=DOUBLE)
    m = len(p.F(x.T)) - 1
    return x, torch.randn(S, m, generator=gen, dtype=DOUBLE)


def system(N=7, seed=0):
    """A symmetric system K z = b whose rows have different lengths."""
    r = np.random.default_rng(seed)
    K = r.standard_normal((N, N))
    K = (K + K.T) * np.sqrt(np.outer(np.arange(1, N + 1), np.arange(1, N + 1)))
    return K, r.standard_normal(N)


def uniform(N):
    return np.arange(1, N + 1) / N


@pytest.mark.parametrize("name", ALL)
def test_derivatives_are_those_of_torch_func(name):
    p = ALL[name]
    x, lam = points(p)
    F, J = p.first(x)
    H = p.hessian(x, lam)

    def values(v):
        return torch.stack([u[0] for u in p.F(v[:, None])])

    for s in range(len(x)):
        assert torch.allclose(F[s], values(x[s]), atol=1e-12)
        assert torch.allclose(J[s], torch.func.jacrev(values)(x[s]), atol=1e-10)
        want = torch.func.hessian(lambda v, s=s: values(v)[0] + lam[s] @ values(v)[1:])(x[s])
        assert torch.allclose(H[s], want, atol=1e-9)


@pytest.mark.parametrize("name", ALL)
def test_the_merit_gradient_is_autograds(name):
    p = ALL[name]
    x, lam = points(p)
    eta1, eta2 = 0.7, 0.3
    n = x.shape[1]

    def plain(v, mu):  # L_eta once more, from its definition
        f, *c = [u[0] for u in p.F(v[:, None])]
        c = torch.stack(c)

        def lagrangian(w):
            f, *c = [u[0] for u in p.F(w[:, None])]
            return f + mu @ torch.stack(c)

        g = torch.func.grad(lagrangian)(v)
        return f + mu @ c + eta1 / 2 * c @ c + eta2 / 2 * g @ g

    F, J = p.first(x)
    parts = al.merit_gradient(al.kkt(F, J, lam), p.hessian(x, lam), J[:, 1:])
    got = parts[:, 0] + eta1 * parts[:, 1] + eta2 * parts[:, 2]
    value = al.merit(F, J, lam, eta1, eta2)
    for s in range(len(x)):
        dx, dlam = torch.func.grad(plain, argnums=(0, 1))(x[s], lam[s])
        scale = max(float(dx.abs().max()), 1.0)
        assert torch.allclose(value[s], plain(x[s], lam[s]), rtol=1e-12)
        assert torch.allclose(got[s, :n], dx, atol=1e-10 * scale)
        assert torch.allclose(got[s, n:], dlam, atol=1e-10 * scale)


def test_the_kkt_matrix_is_shifted_just_where_the_reduced_hessian_is_low():
    G = torch.tensor([[[1.0, 0.0, 0.0]]] * 2, dtype=DOUBLE)  # null space: the last two coordinates
    H = torch.diag_embed(torch.tensor([[-5.0, 2.0, 1.0], [9.0, 2.0, -1.0]], dtype=DOUBLE))
    B, K = al.kkt_matrix(H, G, xi_B=0.25)
    assert torch.equal(B[0], H[0])  # the negative curvature lies outside the null space
    assert torch.allclose(B[1], H[1] + 9.25 * torch.eye(3, dtype=DOUBLE))  # xi_B + |H|
    assert torch.equal(K[1, :3, :3], B[1]) and torch.equal(K[1, 3:, :3], G[1])
    assert torch.equal(K[1, :3, 3:], G[1].T) and float(K[1, 3, 3]) == 0
    B, _ = al.kkt_matrix(H[:1], G[:1], floor=1.5)
    assert not torch.equal(B[0], H[0])
    square = torch.eye(3, dtype=DOUBLE)[None]  # m = n: no null space
    assert torch.equal(al.kkt_matrix(H[1:], square)[0], H[1:])


@pytest.mark.parametrize("solver", ["RK", "GV"])
def test_row_actions_are_the_formula_drawn_by_drawn(solver):
    K, b = system()
    N, z, want = 7, np.zeros(7), np.zeros(7)
    law = np.cumsum((K**2).sum(1)) / (K**2).sum()
    al.sketch_and_project(K, b, z, 0.0, 3 * N, al.SOLVERS[solver], law, np.random.default_rng(5))
    r = np.random.default_rng(5)
    for _ in range(3 * N):
        S = np.zeros((N, 1))
        if solver == "RK":
            S[(law < r.random()).sum(), 0] = 1  # the first row whose cumulated law exceeds u
        else:
            S[:, 0] = [r.standard_normal() for _ in range(N)]
        A = K.T @ S
        want = want - (A @ np.linalg.pinv(S.T @ K @ K.T @ S) @ S.T @ (K @ want - b)[:, None])[:, 0]
        assert not np.allclose(want, 0)
    assert np.allclose(z, want, atol=1e-10)


def test_row_actions_stop_at_the_tolerance_or_the_cap_and_go_on_from_where_they_were():
    K, b = system(5)
    rng, z = np.random.default_rng(0), np.zeros(5)
    steps = al.sketch_and_project(K, b, z, 1e-6, 10**7, 1, uniform(5), rng)
    assert np.linalg.norm(K @ z - b) <= 1e-6 and steps % 5 == 0 and steps > 5
    assert al.sketch_and_project(K, b, z, 1e-6, 10**7, 1, uniform(5), rng) == 0
    assert al.sketch_and_project(K, b, np.zeros(5), 1e-6, 20, 2, uniform(5), rng) == 20
    z = np.zeros(5)
    assert al.sketch_and_project(K, b, z, 1e-6, 20, 0, uniform(5), rng) == 0
    assert np.allclose(z, np.linalg.solve(K, b), atol=1e-10)


def test_the_general_sketch_projects_onto_the_sketched_system():
    K, b = (torch.tensor(v)[None] for v in system(6))
    gen = torch.Generator().manual_seed(0)
    z = torch.randn(1, 6, generator=gen, dtype=DOUBLE)
    S = torch.randn(1, 6, 3, generator=gen, dtype=DOUBLE)
    new = al.sketch_step(K, b, z, S)
    assert float((S.mT @ (K @ new[..., None] - b[..., None])).abs().max()) < 1e-9
    rows = torch.linalg.lstsq(K.mT @ S, (new - z)[..., None])
    assert torch.allclose(K.mT @ S @ rows.solution, (new - z)[..., None], atol=1e-9)
    whole = al.sketch_step(K, b, z, torch.eye(6, dtype=DOUBLE)[None])
    assert torch.allclose(whole, torch.linalg.solve(K, b), atol=1e-7)


@pytest.mark.gpu
def test_the_general_sketch_on_a_gpu():
    K, b = (torch.tensor(v)[None] for v in system(6))
    S = torch.randn(1, 6, 3, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    here = al.sketch_step(K, b, torch.zeros_like(b), S)
    there = al.sketch_step(K.cuda(), b.cuda(), torch.zeros_like(b).cuda(), S.cuda())
    assert torch.allclose(here, there.cpu(), atol=1e-8)


def test_kaczmarz_contracts_in_expectation_exactly_along_the_smallest_singular_vector():
    K, _ = system(6, seed=3)
    squares = (K**2).sum(1)
    _, sigma, V = np.linalg.svd(K)
    z_star = V[-1]
    after = [
        np.sum((z_star - (K[i] @ z_star) / squares[i] * K[i]) ** 2) for i in range(6)
    ]  # one step from z = 0, every row
    mean = np.average(after, weights=squares)
    assert mean == pytest.approx(1 - sigma[-1] ** 2 / squares.sum(), abs=1e-12)


def penalties(p, want, eta=(1.0, 0.1, 0.1), room=1e9):
    """`direction` with an exact solve; p [3, N] chosen by the test."""
    eta = np.array(eta)
    out = al.direction(
        np.eye(2), np.array([1.0, 0.0]), np.array(p), eta, 1.0, room, 1.0, 2.0, 10, 0, uniform(2),
        np.random.default_rng(0),
    )  # fmt: skip
    assert np.allclose(eta, want)
    return out


def test_penalties_move_until_the_direction_descends():
    # K = I, so that z = -DL = (-1, 0); slope = -(p0 + eta1 p1 + eta2 p2)[0], wanted <= -eta2 / 2
    z, slope, _ = penalties([[1.0, 0], [0, 0], [0, 0]], (1.0, 0.1, 0.1))  # descends: nothing moves
    assert np.allclose(z, [-1, 0]) and slope == -1
    # -(-2 + eta1) <= -eta2 / 2 from eta1 = 2 + eta2 / 2 on: one move, with nu = 2, gives eta1 = 4
    _, slope, _ = penalties([[-2.0, 0], [1.0, 0], [0, 0]], (4.0, 0.05, 0.1 / 16))
    assert slope == pytest.approx(-2)
    # at the edge: slope = -eta2 / 2 is good enough
    penalties([[0.05, 0], [0, 0], [0, 0]], (1.0, 0.1, 0.1))
    penalties([[0.03, 0], [0, 0], [0, 0]], (4.0, 0.05, 0.1 / 16))
    # the bound on delta: room eta2 / (1 + eta1 + eta2), before and after a move, floored
    penalties([[1.0, 0], [0, 0], [0, 0]], (1.0, 0.1, 0.01 * 0.1 / 2.1), room=0.01)
    penalties([[-2.0, 0], [1.0, 0], [0, 0]], (4.0, 0.05, 0.1 * 0.1 / 2.1 / 16), room=0.1)
    penalties([[1.0, 0], [0, 0], [0, 0]], (1.0, 0.1, 1e-6), room=1e-9)


def test_the_solve_continues_from_the_same_z():
    K, DL = np.diag([1.0, 2.0]), np.array([3.0, -1.0])
    p = np.array([[-1.0, 0.0], [0.5, 0.0], [0.0, 0.0]])
    eta = np.array([1.0, 0.1, 0.1])
    rng = np.random.default_rng(1)
    z, slope, steps = al.direction(K, DL, p, eta, 1.0, 1e9, 1.0, 1.5, 100, 1, uniform(2), rng)
    assert slope <= -eta[1] / 2 * (DL @ DL)
    assert np.linalg.norm(K @ z + DL) <= eta[2] * np.linalg.norm(DL)
    assert steps <= 40  # each accuracy once from where the last one ended


def stopping(p, theta, psi):
    """The residual that the first direction may leave, and the one that it leaves."""
    x = torch.tensor([p.x0], dtype=DOUBLE)
    F, J = p.first(x)
    lam = torch.zeros_like(F[:, 1:])
    method = AdaSketchNewton("RK", [0], theta=theta, psi=psi)
    H = p.hessian(x, lam)
    z, _, _ = method.direction(0, np.array([0]), F, J, H, lam)
    DL, (B, K), G = al.kkt(F, J, lam)[0], al.kkt_matrix(H, J[:, 1:]), J[0, 1:]
    norms = [float(torch.linalg.matrix_norm(v, 2)) for v in (K[0], B[0], G, H[0])]
    xi = min(float(torch.linalg.eigvalsh(G @ G.T)[0]), 1)
    Psi = psi * max(norms[1] ** 2, 1) / (xi * 0.1)
    room = 0.4 / (max(norms[2], norms[3], 1) * Psi) ** 2
    delta = min(
        method.eta[0, 2], max(room * method.eta[0, 1] / (1 + method.eta[0, :2].sum()), 1e-6)
    )
    left = float((K[0] @ z[0] + DL).norm())
    return left, theta * delta * float(DL.norm()) / norms[0] / Psi, method.eta[0, 2] - delta


@pytest.mark.parametrize("theta", [1.0, 0.01])
@pytest.mark.parametrize("psi", [1e-3, 1.0])
def test_a_direction_is_as_accurate_as_the_papers_bound_asks(theta, psi):
    left, allowed, excess = stopping(ALL["HS42"], theta, psi)
    assert left <= allowed and left > allowed * 1e-4 and excess <= 1e-15


@pytest.mark.parametrize("p", al.hock_schittkowski(), ids=lambda p: p.name)
def test_solutions_are_scipys_and_hock_and_schittkowskis(p):
    x = torch.tensor([p.x0] * 2, dtype=DOUBLE)
    tol = 1e-4 if p.name == "HS26" else 1e-6  # K of HS26 is singular at the solution
    r = minimize(p, AdaSketchNewton("RK", [0, 1], cap=20_000), x, tol=tol)
    assert r.solved.all()
    value = p.first(r.x)[0]
    assert torch.allclose(value[:, 0], torch.full((2,), p.best, dtype=DOUBLE), atol=1e-5)

    def numpy_of(i):
        return lambda v: np.array([u[0] for u in p.F(torch.tensor(v)[:, None])])[i]

    near = r.x[0].numpy() + 0.01
    slsqp = scipy_minimize(
        numpy_of(0), near, constraints={"type": "eq", "fun": numpy_of(slice(1, None))},
        options={"ftol": 1e-12, "maxiter": 500},
    )  # fmt: skip
    assert slsqp.fun == pytest.approx(p.best, abs=1e-5)


@pytest.mark.parametrize("name", ["HS7", "HS39", "HS77"])
def test_whole_runs_are_the_papers_loop(name):
    """Exact solves; everything else of steps 1 to 6 by autograd and numpy."""
    p = ALL[name]
    x = torch.tensor(p.x0, dtype=DOUBLE)
    n, m = len(x), len(p.F(x[:, None])) - 1
    v, eta1, eta2, sizes = torch.cat([x, torch.zeros(m, dtype=DOUBLE)]), 1.0, 0.1, []

    def values(x):
        return torch.stack([u[0] for u in p.F(x[:, None])])

    def lagrangian(v):
        F = values(v[:n])
        return F[0] + v[n:] @ F[1:]

    def merit(v):
        DL = torch.func.grad(lagrangian)(v)
        return lagrangian(v) + eta1 / 2 * DL[n:] @ DL[n:] + eta2 / 2 * DL[:n] @ DL[:n]

    for _ in range(100):
        DL, K = torch.func.grad(lagrangian)(v), torch.func.hessian(lagrangian)(v)
        sizes.append(float(DL.norm()))
        if sizes[-1] <= 1e-4:
            break
        H, G = K[:n, :n].clone(), K[n:, :n]
        K[n:, n:] = 0
        Z = torch.linalg.svd(G)[2][m:].T
        if float(torch.linalg.eigvalsh(Z.T @ H @ Z).min()) < 1e-6:
            K[:n, :n] += (0.1 + torch.linalg.matrix_norm(H, 2)) * torch.eye(n, dtype=DOUBLE)
        z = -torch.linalg.solve(K, DL)
        while (slope := float(torch.func.grad(merit)(v) @ z)) > -eta2 / 2 * sizes[-1] ** 2:
            eta1, eta2 = eta1 * 1.5**2, eta2 / 1.5
        alpha = 1.0
        while float(merit(v + alpha * z)) > float(merit(v)) + 0.1 * alpha * slope:
            alpha /= 2
        v = v + alpha * z
    r = minimize(p, AdaSketchNewton("exact", [0]), torch.tensor([p.x0], dtype=DOUBLE))
    assert np.allclose(r.kkt[0], sizes, rtol=1e-6, atol=1e-8)


def test_every_step_descends_and_satisfies_armijo():
    p = ALL["HS77"]
    x = torch.tensor([p.x0], dtype=DOUBLE)
    method = AdaSketchNewton("GV", [3], cap=20_000)
    values = []
    real = method.merit
    method.merit = lambda *a: values.append(real(*a)) or values[-1]
    r = minimize(p, method, x)
    slope = r.slope[0] * r.kkt[0, :-1] ** 2
    assert r.solved.all() and (r.slope + r.eta2 / 2 <= 0).all()
    at = 0
    for alpha, s in zip(r.alpha[0], slope):
        trials = round(np.log2(1 / alpha)) + 1
        now, *tried = [float(v[0]) for v in values[at : at + trials + 1]]
        for i, value in enumerate(tried):
            good = value <= now + 0.1 * 0.5**i * s + 1e-12
            assert good == (i == trials - 1)
        at += trials + 1
    assert at == len(values)
    assert r.evals[0] == 4 + 4 * (at - r.alpha.shape[1])
    F, J = p.first(r.x)
    assert float(al.kkt(F, J, r.lam).norm()) == pytest.approx(r.kkt[0, -1], rel=1e-12)


def test_runs_do_not_touch_each_other():
    p = ALL["HS39"]
    x = points(p, 3)[0]
    both = minimize(p, AdaSketchNewton("RK", [0, 1, 2], [1, 10, 0.1], cap=5000), x)
    for s, penalty in enumerate([1, 10, 0.1]):
        one = minimize(p, AdaSketchNewton("RK", [s], penalty, cap=5000), x[s : s + 1])
        assert np.allclose(one.x, both.x[s], atol=1e-6) and one.evals[0] == both.evals[s]


@pytest.mark.parametrize("name", ["HS7", "HS39", "HS42", "HS79", "logistic", "control"])
def test_rivals_reach_the_same_solution(name):
    p = ALL[name]
    x = torch.tensor([p.x0] * 2, dtype=DOUBLE)
    ours = minimize(p, AdaSketchNewton("exact", [0, 1], floor=1e-2), x)
    rivals = [
        al.AugmentedLagrangian(2, penalty=10.0),
        al.GmresSQP(2, floor=1e-2),
        al.GmresSQP(2, adaptive=False, floor=1e-2),
    ]
    for method in rivals:
        r = minimize(p, method, x)
        assert ours.solved.all() and r.solved.all()
        best, value = float(p.first(ours.x)[0][0, 0]), p.first(r.x)[0]
        assert float((value[:, 0] - best).abs().max()) < 1e-3
        assert float(value[:, 1:].abs().max()) < 1e-4


@pytest.mark.parametrize("penalty", [0.001, 10.0])
@pytest.mark.parametrize("adaptive", [True, False])
def test_a_gmres_direction_is_good_by_its_rule_and_descends(adaptive, penalty):
    p = ALL["HS77"]
    x, lam = points(p)
    F, J = p.first(x)
    method = al.GmresSQP(3, penalty, adaptive)
    z, slope, _ = method.direction(0, np.arange(3), F, J, p.hessian(x, lam), lam)
    DL, (B, K) = al.kkt(F, J, lam), al.kkt_matrix(p.hessian(x, lam), J[:, 1:])
    g, G, c = J[:, 0], J[:, 1:], F[:, 1:]
    for s in range(3):
        mu, d = method.mu[s], z[s, :5]
        was, to = (float(v.abs().sum()) for v in (c[s], c[s] + G[s] @ d))
        cost = float(g[s] @ d + (d @ B[s] @ d / 2).clamp(min=0))
        moves = round(np.log(mu / penalty) / np.log(1.5))
        if adaptive:
            assert mu == pytest.approx(penalty * 1.5**moves)
            assert method.kappa[s] == pytest.approx(0.1 / 1.5 ** (2 * moves))
        else:
            assert mu >= penalty and method.kappa[s] == 0.1
        accuracy = method.kappa[s] * float(DL[s].norm())
        assert float((K[s] @ z[s] + DL[s]).norm()) <= accuracy * (1 + 1e-9)
        assert mu * (was - to) - cost >= 0.09 * mu * max(was, to - was) * (1 - 1e-9)
        assert float(slope[s]) == pytest.approx(float(g[s] @ d) - mu * (was - to)) and slope[s] < 0
        merit = float(method.merit([s], F[s : s + 1], J, lam))
        assert merit == pytest.approx(float(F[s, 0]) + mu * was)


def test_the_augmented_lagrangian_is_a_plain_loop():
    p = ALL["HS79"]
    x, lam = torch.tensor(p.x0, dtype=DOUBLE), torch.zeros(3, dtype=DOUBLE)
    mu, tau, mine = 10.0, 0.1, []

    def value(v):
        f, *c = [u[0] for u in p.F(v[:, None])]
        c = torch.stack(c)
        return f + lam @ c + mu / 2 * c @ c, c

    evals = 4
    for _ in range(200):
        g = torch.func.jacrev(lambda v: value(v)[0])(x)
        c = value(x)[1]
        while float(g.norm()) <= tau:  # new multipliers: then DL has the gradient just left
            G = torch.func.jacrev(lambda v: value(v)[1])(x)
            grad_f = g - G.T @ (lam + mu * c)
            if float(torch.cat([grad_f + G.T @ lam, c]).norm()) <= 1e-4:
                break
            lam, mu, tau = lam + mu * c, mu * 1.5, tau / 10
            g = torch.func.jacrev(lambda v: value(v)[0])(x)
        G = torch.func.jacrev(lambda v: value(v)[1])(x)
        grad_f = g - G.T @ (lam + mu * c)
        mine.append(float(torch.cat([grad_f + G.T @ lam, c]).norm()))
        if mine[-1] <= 1e-4:
            break
        A = torch.func.hessian(lambda v: value(v)[0])(x)
        low = float(torch.linalg.eigvalsh(A)[0])
        z = -torch.linalg.solve(
            A + (0.1 - low if low < 1e-6 else 0) * torch.eye(5, dtype=DOUBLE), g
        )
        alpha, now = 1.0, float(value(x)[0])
        while float(value(x + alpha * z)[0]) > now + 0.1 * alpha * float(g @ z):
            alpha, evals = alpha / 2, evals + 2
        x, evals = x + alpha * z, evals + 4
    r = minimize(p, al.AugmentedLagrangian(1, 10.0), torch.tensor([p.x0], dtype=DOUBLE))
    assert np.allclose(r.kkt[0], mine, rtol=1e-6, atol=1e-8) and r.evals[0] == evals


def test_gmres_solves_in_n_steps_and_stops_at_the_tolerance():
    K, b = system(9)
    z, steps = al.gmres(K, b, 1e-10)
    assert steps <= 9 and np.linalg.norm(K @ z - b) <= 1e-9
    z, steps = al.gmres(K, b, 0.5 * np.linalg.norm(b))
    best = [
        np.linalg.norm(K @ (Q := np.stack([np.linalg.matrix_power(K, i) @ b for i in range(t)], 1))
                       @ np.linalg.lstsq(K @ Q, b)[0] - b)
        for t in range(1, 9)
    ]  # fmt: skip
    assert steps == 1 + np.argmax(np.array(best) <= 0.5 * np.linalg.norm(b))
    assert np.linalg.norm(K @ z - b) == pytest.approx(best[steps - 1], abs=1e-8)
    assert al.gmres(K, b, 1e9)[1] == 0


def test_the_control_problem_has_one_solution_in_both_scalings():
    one, two = al.control(5), al.control(5, scaled=False)
    x = torch.tensor([one.x0], dtype=DOUBLE)
    a, b = (minimize(p, AdaSketchNewton("exact", [0]), x, tol=1e-8) for p in (one, two))
    assert torch.allclose(a.x, b.x, atol=1e-6)
    w, u = a.x[0, :5], a.x[0, 5:]
    pad = torch.nn.functional.pad(w, (1, 1))
    assert torch.allclose((2 * w - pad[:-2] - pad[2:]) * 36, u, atol=1e-6)


def test_bad_input():
    with pytest.raises(ValueError, match=r"solver must be one of .* got 'LU'"):
        AdaSketchNewton("LU", [0])
    with pytest.raises(ValueError, match=r"between 0 and 1/2, got 0\.5"):
        AdaSketchNewton("RK", [0], beta=0.5)
    with pytest.raises(ValueError, match=r"nu > 1, got 1\.0 and 1"):
        AdaSketchNewton("RK", [0], nu=1)
    with pytest.raises(ValueError, match=r"x must be float64 \[S, 2\], got torch.float32 \[1, 3\]"):
        minimize(ALL["HS6"], AdaSketchNewton("RK", [0]), torch.zeros(1, 3))
    with pytest.raises(ValueError, match=r"labels -1 or 1"):
        al.logistic(np.zeros((3, 2)), [0, 1, 1])
