"""FedHyper: Baydin's descent, derivatives by autograd, loops over clients, clipping."""

import numpy as np
import pytest
import torch

from miniature.federated.baselines import FedAvg
from miniature.federated.engine import federate
from miniature.federated.fedhyper import (
    Decay,
    FedExp,
    FedHyperCL,
    FedHyperG,
    FedHyperGM,
    FedHyperSL,
    inner,
)
from miniature.federated.objectives import Quadratics

LR, K, N, ACTIVE, T = 0.02, 4, 6, 3, 8
SEEDS = [0, 1]
WIDE = (1e-9, 1e9)


def quadratics(noise=0.0, n_clients=N):
    return Quadratics.random(SEEDS, n_clients, 5, noise=noise)


def solve(method, q, rounds=T, steps=K, **options):
    start = 0.1 * torch.ones_like(q.b[:, 0])
    return federate(method, q, start, rounds=rounds, steps=steps, seeds=SEEDS, **options)


class Logistic:
    """One client with a logistic regression and full batches; gradients by autograd."""

    n_clients = 1

    def __init__(self, seed, n=40, d=6):
        g = torch.Generator().manual_seed(seed)
        self.x = torch.randn(n, d, generator=g, dtype=torch.float64)
        self.y = (torch.rand(n, generator=g) < 0.5).to(torch.float64)

    def batches(self, active, steps, seeds, t):
        return [None] * steps

    def value(self, w):
        margin = self.x @ w
        return (torch.nn.functional.softplus(margin) - self.y * margin).mean()

    def grad(self, x, active, batch):
        w = x[0, 0].detach().requires_grad_()
        return torch.autograd.grad(self.value(w), w)[0].expand_as(x)


def alphas(method, objective, start, rounds, seeds, **options):
    """Return alpha after every round, [rounds, S], and the final model."""
    trace, step = [], method.server_step

    def server_step(theta, message, c):
        new = step(theta, message, c)
        trace.append(c.server["alpha"][:, 0])
        return new

    method.server_step = server_step
    h = federate(method, objective, start, rounds=rounds, steps=1, seeds=seeds, **options)
    return torch.stack(trace), h.theta


@pytest.mark.parametrize("kappa", [1.0, 5.0])
def test_g_with_one_full_step_is_hypergradient_descent(kappa):
    # Baydin et al. (ICLR 2018): rate <- rate + k <g_t, g_{t-1}>; here rate = lr alpha.
    problem, lr = Logistic(0), 0.4
    start = torch.ones(1, 6, dtype=torch.float64)
    alpha, theta = alphas(FedHyperG(lr, kappa, WIDE), problem, start, 30, [0])
    w, rate, last, expected = start[0].clone(), lr, torch.zeros(6, dtype=torch.float64), []
    for _ in range(30):
        v = w.clone().requires_grad_()
        g = torch.autograd.grad(problem.value(v), v)[0]
        rate = rate + kappa * lr**3 * float(g @ last)
        w, last = w - rate * g, g
        expected.append(rate / lr)
    np.testing.assert_allclose(alpha[:, 0], expected, atol=1e-10, rtol=0)
    torch.testing.assert_close(theta[0], w, atol=1e-10, rtol=0)
    assert max(expected) > 1.05


def test_the_product_is_the_derivative_by_alpha():
    # dF(w + alpha Delta) / d alpha by autograd, through one server step.
    problem, lr = Logistic(1), 0.4
    w = torch.ones(6, dtype=torch.float64)
    move = lambda w: -lr * problem.grad(w[None, None], None, None)[0, 0]  # noqa: E731
    delta = move(w)
    alpha = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    derivative = torch.autograd.grad(problem.value(w + alpha * delta), alpha)[0]
    following = move((w + alpha * delta).detach())
    torch.testing.assert_close(derivative, -(following @ delta) / lr, atol=1e-12, rtol=0)


@pytest.mark.parametrize("r", [0.5, 0.9, 0.999, 1.001, 1.1, 1.8])
def test_on_an_eigenvector_alpha_rises_until_one_over_the_curvature(r):
    values = torch.tensor([10.0, 1.0, 0.1], dtype=torch.float64)
    q = Quadratics(torch.diag(values)[None, None], torch.zeros(1, 1, 3, dtype=torch.float64))
    start = torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64)
    h = federate(FedHyperG(r / 10, 1.0, WIDE), q, start, rounds=2, steps=1, seeds=[0])
    assert torch.sign(h.server["alpha"] - 1).item() == np.sign(1 - r)


def g_loop(A, b, draw, kappa, low, high, mu=None):
    """The paper's server, a client at a time; with mu it is the variant GM."""
    w, alpha, last = np.full(5, 0.1), 1.0, np.zeros(5)
    for _ in range(T):
        moves = []
        for i in draw.permutation(N)[:ACTIVE]:
            y = w.copy()
            for _ in range(K):
                y = y - LR * (A[i] @ y - b[i])
            moves.append(y - w)
        delta = np.mean(moves, axis=0)
        alpha = min(max(alpha + kappa * last @ delta, low), high)
        if mu is None:
            w, last = w + alpha * delta, delta
        else:
            w = w + delta + (alpha - 1) * (delta + mu * last)
            last = delta + mu * last
    return w, alpha


def sl_loop(A, b, draw, kappa, low, high):
    w, total, last = np.full(5, 0.1), 0.0, np.zeros(5)
    for _ in range(T):
        beta, moves = min(max(LR * (1 + total), low), high), []
        for i in draw.permutation(N)[:ACTIVE]:
            y = w.copy()
            for _ in range(K):
                y = y - beta * (A[i] @ y - b[i])
            moves.append(y - w)
        delta = np.mean(moves, axis=0)
        w, total, last = w + delta, total + kappa * last @ delta, delta
    return w, total


def cl_loop(A, b, draw, kappa, low, high):
    w, overall = np.full(5, 0.1), np.zeros(5)
    for _ in range(T):
        moves = []
        for i in draw.permutation(N)[:ACTIVE]:
            y, times, last = w.copy(), 1.0, overall
            for _ in range(K):
                step = -LR * times * (A[i] @ y - b[i])
                u = kappa * (step @ last + 0.1 / ACTIVE * step @ overall)
                times = min(max(times * min(1 + u, 1.1), low), high)
                y, last = y + step, step
            moves.append(y - w)
        overall = np.mean(moves, axis=0)
        w = w + overall
    return w, times


CASES = {
    "G": (lambda: FedHyperG(LR, 20.0), "alpha", lambda *a: g_loop(*a, 20.0, 0.2, 5.0)),
    "GM": (lambda: FedHyperGM(LR, 20.0), "alpha", lambda *a: g_loop(*a, 20.0, 0.8, 5.0, 0.9)),
    "SL": (lambda: FedHyperSL(LR, 20.0), "A", lambda *a: sl_loop(*a, 20.0, 1e-3, 1e-1)),
    "CL": (lambda: FedHyperCL(LR, 50.0), None, lambda *a: cl_loop(*a, 50.0, 0.1, 10.0)),
}


@pytest.mark.parametrize("name", CASES)
def test_engine_equals_a_loop_over_clients(name):
    make, state, loop = CASES[name]
    q = quadratics()
    h = solve(make(), q, active=ACTIVE)
    plain = solve(FedAvg(LR), q, active=ACTIVE)
    for i, seed in enumerate(SEEDS):
        x, own = loop(q.A[i].numpy(), q.b[i].numpy(), np.random.default_rng([seed, 0]))
        np.testing.assert_allclose(h.theta[i], x, atol=1e-11, rtol=0)
        if state:
            np.testing.assert_allclose(h.server[state][i, 0], own, atol=1e-11, rtol=0)
    assert (h.theta - plain.theta).norm(dim=1).min() > 1e-3  # the schedule did something


@pytest.mark.parametrize("kind", [FedHyperG, FedHyperGM, FedHyperSL, FedHyperCL])
def test_without_a_hyper_step_it_is_fedavg(kind):
    q = quadratics(noise=0.3)
    a, b = (solve(m, q, active=ACTIVE).theta for m in (kind(LR, 0.0), FedAvg(LR)))
    torch.testing.assert_close(a, b, atol=1e-13, rtol=0)


def test_the_first_round_uses_alpha_one():
    q = quadratics()
    h = solve(FedHyperG(LR, 1e6), q, rounds=1)
    assert (h.server["alpha"] == 1).all()
    torch.testing.assert_close(h.theta, solve(FedAvg(LR), q, rounds=1).theta, atol=0, rtol=0)


def test_rates_stay_within_their_bounds():
    q, seen = quadratics(noise=1.0), []

    class Tape(FedHyperCL):
        def local_step(self, x, grad, c):
            x = super().local_step(x, grad, c)
            seen.append(c.client["beta"])
            return x

    for kappa in (1e3, 1e6):
        trace, _ = alphas(FedHyperG(LR, kappa), q, torch.ones_like(q.b[:, 0]), 20, SEEDS, active=1)
        assert trace.min() == 0.2 and trace.max() == 5
        solve(Tape(LR, kappa), q, rounds=20, active=1)
    seen = torch.stack(seen)
    assert seen.min() == 0.1 and 1 < seen.max() <= 10


def test_sl_clips_the_rate_and_not_the_sum():
    q = quadratics()
    method = FedHyperSL(LR, 1e4)
    h = solve(method, q, rounds=3)
    assert (LR * (1 + h.server["A"].abs()) > 0.1).all()

    class Context:
        lr, server = LR, h.server

    assert method.rate(Context).shape == (2, 1, 1)
    assert ((method.rate(Context) - 0.1).abs().minimum(method.rate(Context) - 1e-3) < 1e-12).all()


def test_products_grow_with_the_square_of_the_scale():
    # With z = 10 w the same descent needs a rate 100 times as large; FedAvg does not notice.
    q = quadratics()
    scaled = Quadratics(q.A / 100, q.b / 10)
    start = 0.1 * torch.ones_like(q.b[:, 0])
    run = lambda method, q, x: federate(method, q, x, rounds=T, steps=K, seeds=SEEDS)  # noqa: E731
    plain, large = (
        run(FedAvg(r), p, x) for r, p, x in ((LR, q, start), (100 * LR, scaled, 10 * start))
    )
    torch.testing.assert_close(large.theta, 10 * plain.theta, atol=1e-11, rtol=0)
    one = run(FedHyperG(LR, 1.0), q, start)
    same = run(FedHyperG(100 * LR, 0.01), scaled, 10 * start)
    other = run(FedHyperG(100 * LR, 1.0), scaled, 10 * start)
    torch.testing.assert_close(same.server["alpha"], one.server["alpha"], atol=1e-11, rtol=0)
    assert (other.server["alpha"] - one.server["alpha"]).abs().min() > 0.1


def test_cl_downloads_the_last_move_and_g_nothing_more():
    q = quadratics()
    down = [solve(m, q).down for m in (FedAvg(LR), FedHyperG(LR), FedHyperSL(LR), FedHyperCL(LR))]
    assert (down[1] == down[0]).all() and (down[2] == down[0]).all()
    assert (down[3] == 2 * down[0]).all()


def test_fedexp_extrapolates_where_clients_disagree():
    q = quadratics()
    h = solve(FedExp(LR, 0.0), q, rounds=1)
    moves = []
    for A, b in zip(q.A.numpy(), q.b.numpy()):
        own = []
        for Ai, bi in zip(A, b):
            y = np.full(5, 0.1)
            for _ in range(K):
                y = y - LR * (Ai @ y - bi)
            own.append(y - 0.1)
        mean = np.mean(own, axis=0)
        alpha = max(1, sum(v @ v for v in own) / (2 * N * mean @ mean))
        assert alpha > 1
        moves.append(0.1 + alpha * mean)
    np.testing.assert_allclose(h.theta, np.stack(moves), atol=1e-13, rtol=0)
    alone = quadratics(n_clients=1)
    same = [solve(m, alone).theta for m in (FedExp(LR, 0.0), FedAvg(LR))]
    torch.testing.assert_close(*same, atol=1e-13, rtol=0)


def test_decay_is_a_geometric_server_rate():
    q = quadratics()
    h = solve(Decay(LR, [1.0, 0.5], [1.0, 2.0]), q, rounds=3)
    plain = solve(FedAvg(LR), q, rounds=3).theta
    torch.testing.assert_close(h.theta[0], plain[0], atol=1e-13, rtol=0)
    x = 0.1 * torch.ones(5, dtype=torch.float64)
    for rate in (2.0, 1.0, 0.5):
        one = Quadratics(q.A[1:], q.b[1:])
        moved = federate(FedAvg(LR), one, x[None], rounds=1, steps=K, seeds=[1]).theta[0]
        x = x + rate * (moved - x)
    torch.testing.assert_close(h.theta[1], x, atol=1e-13, rtol=0)


@pytest.mark.parametrize("kind", [FedHyperG, FedHyperGM, FedHyperSL, FedHyperCL])
def test_hyperparameters_may_differ_between_runs(kind):
    q = quadratics()
    together = solve(kind([0.02, 0.01], [5.0, 50.0]), q, active=ACTIVE).theta
    for i, values in enumerate([(0.02, 5.0), (0.01, 50.0)]):
        alone = solve(kind(*values), q, active=ACTIVE).theta
        torch.testing.assert_close(together[i], alone[i], atol=1e-12, rtol=0)


def test_bounds_may_differ_between_runs():
    q = quadratics()
    bounds = [0.01, 0.3], [0.02, 0.5]
    for kind, pair in ((FedHyperG, ([0.5, 0.2], [1.0, 3.0])), (FedHyperSL, bounds)):
        together = solve(kind(LR, 1e4, pair), q, active=ACTIVE).theta
        for i, alone in enumerate(zip(*pair)):
            theta = solve(kind(LR, 1e4, alone), q, active=ACTIVE).theta
            torch.testing.assert_close(together[i], theta[i], atol=1e-12, rtol=0)


def test_cl_with_unequal_steps_counts_only_steps_taken():
    q = quadratics()
    same = solve(FedHyperCL(LR, 50.0), q, steps=[K] * N, active=ACTIVE)
    plain = solve(FedHyperCL(LR, 50.0), q, active=ACTIVE)
    torch.testing.assert_close(same.theta, plain.theta, atol=1e-13, rtol=0)
    short = solve(FedHyperCL(LR, 1e6), q, rounds=1, steps=[1] * (N - 1) + [9])
    # Products with the empty first move are zero, and those clients stop before the second step.
    assert (short.client["beta"][:, :-1] == 1).all() and (short.client["beta"][:, -1] != 1).all()


@pytest.mark.parametrize("kind", [FedHyperG, FedHyperGM, FedHyperSL, FedHyperCL])
def test_bad_values_are_named(kind):
    with pytest.raises(ValueError, match=r"kappa must not be negative, got -1"):
        kind(LR, -1.0)
    with pytest.raises(ValueError, match=r"bounds must be positive.*got \(0\.5, 0\.2\)"):
        kind(LR, 1.0, bounds=(0.5, 0.2))


def test_inner_keeps_the_axis():
    a = torch.arange(6.0).view(2, 3)
    assert torch.equal(inner(a, a), torch.tensor([[5.0], [50.0]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_type_and_device_are_kept(dtype, device):
    q = Quadratics.random(SEEDS, N, 5, device=device, dtype=dtype)
    for method in (FedHyperG(LR), FedHyperGM(LR), FedHyperSL(LR), FedHyperCL(LR), FedExp(LR)):
        h = solve(method, q, rounds=20, active=ACTIVE)
        assert h.theta.dtype == dtype and h.theta.device.type == device
        assert h.theta.isfinite().all()
