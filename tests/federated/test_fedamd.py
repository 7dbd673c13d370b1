"""FedAMD: its rounds as loops over clients, SPIDER, exact compasses, ages, autograd's gradients."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from miniature import data
from miniature.federated.engine import federate
from miniature.federated.fedamd import Census, FedAMD, FedPAGE, Regression, gradient
from miniature.federated.objectives import Classification, Quadratics
from miniature.federated.participation import Bernoulli, clock
from miniature.models import MLP
from miniature.stack import Stack

LR, K, N, ACTIVE, SAMPLES, D = 0.2, 4, 6, 3, 8, 5
SEEDS = [0, 1]


def problem(batch_size=2, **options):
    return Regression.random(SEEDS, N, SAMPLES, D, batch_size, mu=0.05, **options)


def solve(method, q, rounds=12, steps=K, active=None, **options):
    start = torch.full((len(SEEDS), D), 0.1, dtype=torch.float64)
    active = Census(ACTIVE) if active is None else active
    return federate(
        method, q, start, rounds=rounds, steps=steps, seeds=SEEDS, active=active, **options
    )


class Client:
    """One client of one run, alone."""

    def __init__(self, q, run, i):
        self.a, self.y, self.mu = q.a[run, i].numpy(), q.y[run, i].numpy(), q.mu
        self.size, self.i = q.batch_size, i

    def grad(self, x, rows=slice(None)):
        a, y = self.a[rows], self.y[rows]
        slopes = [-b / (1 + np.exp(b * (row @ x))) for row, b in zip(a, y)]
        g = np.mean([s * row for s, row in zip(slopes, a)], axis=0)
        return g + self.mu * 2 * x / (1 + x**2) ** 2

    def rows(self, seed, t, k):
        if self.size == len(self.y):
            return slice(None)
        draw = np.random.default_rng([seed, 2, t])
        return draw.integers(SAMPLES, size=(K, N, self.size))[k, self.i]

    def walk(self, x, d, seed, t, d0_is_first=False):
        """K steps of the SARAH recursion from d, and where they end."""
        before = x
        for k in range(K):
            rows = self.rows(seed, t, k)
            if k or not d0_is_first:
                d = d - self.grad(before, rows) + self.grad(x, rows)
            before, x = x, x - LR * d
        return x


def sampled(draw, t):
    return range(N) if t == 0 else draw.permutation(N)[:ACTIVE]


def fedamd_loop(q, run, seed, rounds, p, eta):
    """The paper's algorithm on one run, a client at a time."""
    clients, draw = [Client(q, run, i) for i in range(N)], np.random.default_rng([seed, 0])
    x = np.full(D, 0.1)
    v = [c.grad(x) for c in clients]  # the cache, filled at x_0
    for t in range(rounds):
        here, g, news, deltas = sampled(draw, t), np.mean(v, axis=0), {}, []
        if t == 0:
            continue
        coins = np.random.default_rng([seed, 5, t]).random(N)
        for i in here:
            if coins[i] < p(t):
                news[i] = clients[i].grad(x)
            else:
                deltas.append(x - clients[i].walk(x, g, seed, t))
        for i, new in news.items():
            v[i] = new
        if deltas:
            x = x - eta * np.mean(deltas, axis=0)
    return x, np.array(v)


@pytest.mark.parametrize("eta", [1.0, 0.5])
@pytest.mark.parametrize("batch_size", [2, SAMPLES])
@pytest.mark.parametrize("p", [0.4, lambda t: float(t % 3 == 0)], ids=["constant", "{0,1}"])
def test_engine_equals_a_loop_over_clients(p, batch_size, eta):
    q = problem(batch_size)
    h = solve(FedAMD(LR, p, eta), q)
    for run, seed in enumerate(SEEDS):
        x, v = fedamd_loop(q, run, seed, 12, p if callable(p) else lambda t: p, eta)
        np.testing.assert_allclose(h.theta[run], x, atol=1e-12, rtol=0)
        np.testing.assert_allclose(h.client["v"][run], v, atol=1e-12, rtol=0)
        np.testing.assert_allclose(h.server["g"][run], v.mean(0), atol=1e-12, rtol=0)


def test_everybody_with_a_schedule_is_distributed_spider():
    # Every fourth round a full gradient, in between the recursion from it: no cache, no sampling.
    q, tau, rounds = problem(), 4, 11
    h = solve(FedAMD(LR, lambda t: float(t % tau == 0)), q, rounds, active=N)
    for run, seed in enumerate(SEEDS):
        clients, x = [Client(q, run, i) for i in range(N)], np.full(D, 0.1)
        for t in range(rounds):
            if t % tau == 0:
                g = np.mean([c.grad(x) for c in clients], axis=0)
            else:
                x = np.mean([c.walk(x, g, seed, t) for c in clients], axis=0)
        np.testing.assert_allclose(h.theta[run], x, atol=1e-12, rtol=0)


def test_fedpage_equals_a_loop_over_clients():
    q, rounds, chance = problem(), 15, 0.3
    h = solve(FedPAGE(LR, K), q, rounds, active=Census(ACTIVE, chance))
    coins = [np.random.default_rng([0, 6, t]).random() for t in range(rounds)]
    assert 2 <= sum(coin < chance for coin in coins) < rounds - 2
    for run, seed in enumerate(SEEDS):
        clients, draw = [Client(q, run, i) for i in range(N)], np.random.default_rng([seed, 0])
        x = last = np.full(D, 0.1)
        for t in range(rounds):
            if t == 0 or coins[t] < chance:
                g = np.mean([c.grad(x) for c in clients], axis=0)
            else:
                own = []
                for i in sampled(draw, t):
                    d = g + clients[i].grad(x) - clients[i].grad(last)
                    end = clients[i].walk(x, d, seed, t, d0_is_first=True)
                    own.append((x - end) / (LR * K))
                g = np.mean(own, axis=0)
            last, x = x, x - LR * K * g
        np.testing.assert_allclose(h.theta[run], x, atol=1e-12, rtol=0)


def test_fedpage_with_everybody_is_gradient_descent():
    q = problem()
    x = torch.full((2, D), 0.1, dtype=torch.float64)
    for _ in range(9):
        x = x - LR * gradient(q, x)
    h = solve(FedPAGE(LR), q, 9, active=N)
    torch.testing.assert_close(h.theta, x, atol=1e-13, rtol=0)


class Watch(FedAMD):
    """Remembers each round's model, compass and steps."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.models, self.compasses, self.steps = [], [], []

    def local_step(self, x, grad, c):
        if c.k == 0:
            self.models.append(c.x0[:, 0].clone())
            self.compasses.append(c.server["g"])
        new = super().local_step(x, grad, c)
        if c.t:
            own = c.full_grad(x) - c.full_grad(c.x0)
            error = c.d - c.server["g"][:, None] - own
            self.steps.append(error.abs()[~c.anchor].max() if (~c.anchor).any() else 0)
        return new


def test_a_fresh_compass_is_the_gradient_of_the_whole_objective():
    q, tau = problem(), 4
    watch = Watch(LR, lambda t: float(t % tau == 0))
    solve(watch, q, 14, active=N)
    for t in range(1, 14, tau):
        torch.testing.assert_close(watch.models[t], watch.models[t - 1], atol=0, rtol=0)
        exact = gradient(q, watch.models[t])
        torch.testing.assert_close(watch.compasses[t], exact, atol=1e-14, rtol=0)
    assert (watch.compasses[3] - gradient(q, watch.models[3])).norm() > 1e-3


def test_with_full_batches_the_recursion_telescopes():
    full, small = Watch(LR, 0.3), Watch(LR, 0.3)
    solve(full, problem(SAMPLES), 30)
    solve(small, problem(), 30)
    assert max(full.steps) < 1e-13 < 1e-3 < max(small.steps)


@pytest.mark.parametrize("who", [ACTIVE, Bernoulli([0.4] * N), Census(ACTIVE, 0.2)])
def test_the_compass_is_the_mean_of_the_cache(who):
    h = solve(FedAMD(LR, 0.5), problem(), 40, active=who)
    torch.testing.assert_close(h.server["g"], h.client["v"].mean(1), atol=1e-13, rtol=0)


def test_the_compass_is_the_mean_of_the_cache_with_late_clients_and_unequal_steps():
    trace = clock([1.0, 1.3, 2.0, 2.2, 3.0, 5.0], 20, arrivals=2)
    h = solve(FedAMD(LR, 0.5), problem(), 20, steps=[1, 2, 3, 4, 4, 4], active=trace)
    torch.testing.assert_close(h.server["g"], h.client["v"].mean(1), atol=1e-13, rtol=0)
    assert h.theta.isfinite().all()


def test_anchors_do_not_walk_and_without_miners_the_model_stays():
    h = solve(FedAMD(LR, 1.0), problem(), 5)
    assert (h.drift == 0).all() and (h.theta == 0.1).all()
    h = solve(FedAMD(LR, 0.0), problem(), 5)
    assert (h.drift[:, 0] == 0).all() and (h.drift[:, 1:] > 0).all()


def test_an_entry_is_as_old_as_a_geometric_law_says():
    # Renewed with probability q = p A / N a round: 1/q rounds old on average when it is used.
    who, method = Census(20), FedAMD(LR, [0.25, 0.5, 0.9])
    generators = [np.random.default_rng([seed, 0]) for seed in (3, 4, 5)]
    born, ages = np.zeros((3, 40)), []
    for t in range(4000):
        present = who(generators, 40, t)
        ages.append(t - born.mean(1))
        everyone = torch.arange(40).expand(3, -1)
        here = torch.from_numpy(present)
        c = SimpleNamespace(t=t, n_clients=40, active=everyone, present=here, seeds=(3, 4, 5))
        born = np.where(present & method.anchors(c).numpy(), t, born)
    expected = 40 / (np.array([0.25, 0.5, 0.9]) * 20)
    np.testing.assert_allclose(np.mean(ages[200:], axis=0), expected, rtol=0.03)


def test_it_has_no_floor_where_small_batches_leave_one_to_fedavg():
    q = Regression.random(SEEDS, N, SAMPLES, D, 2, squares=True)
    ends = {}
    for p in (0.5, 0.0):  # with p = 0 the compass stays that of x_0
        h = solve(FedAMD(0.1, p), q, 400)
        ends[p] = gradient(q, h.theta).norm(dim=1)
    assert (ends[0.5] < 1e-6).all() and (ends[0.0] > 1e-2).all()


@pytest.mark.parametrize("squares", [False, True])
def test_gradients_are_those_of_autograd(squares):
    q = problem(squares=squares)
    active = torch.tensor([[0, 2], [5, 3]])
    x = torch.randn(2, 2, D, dtype=torch.float64, requires_grad=True)
    for batch in q.batches(active, 2, SEEDS, 3):
        (expected,) = torch.autograd.grad(q.loss(x, active, batch).sum(), x)
        torch.testing.assert_close(q.grad(x.detach(), active, batch), expected, atol=1e-13, rtol=0)
    theta = torch.randn(2, D, dtype=torch.float64, requires_grad=True)
    everyone = torch.arange(N).expand(2, -1)
    whole = q.loss(theta[:, None].expand(-1, N, -1), everyone, (q.a, q.y)).mean(1)
    (expected,) = torch.autograd.grad(whole.sum(), theta)
    torch.testing.assert_close(gradient(q, theta.detach()), expected, atol=1e-13, rtol=0)


def test_batches_are_the_clients_own_samples_and_depend_on_nothing_else():
    q, wide = problem(3), torch.arange(N).expand(2, -1)
    (a, y), _ = q.batches(wide, 2, SEEDS, 7)
    (b, _), _ = q.batches(wide[:, [4, 1]], 2, SEEDS, 7)
    assert torch.equal(a[:, [4, 1]], b)
    assert (a[:, :, :, None] == q.a[:, :, None]).all(-1).any(-1).all()
    assert not torch.equal(a[0], a[1]) and set(y.unique().tolist()) <= {-1.0, 1.0}


def test_the_cache_of_a_network_holds_autograds_gradients():
    digits = data.digits()
    stack = Stack.init(lambda: MLP([64, 8, 10]), SEEDS, dtype=torch.float64)
    parts = [data.shards(digits.y_train, 10, 2, s) for s in SEEDS]
    q = Classification(stack, digits.x_train.double(), digits.y_train, parts, batch_size=8)
    h = federate(FedAMD(LR), q, stack.theta, rounds=1, steps=1, seeds=SEEDS)
    for run in range(2):
        model = stack.module(run)
        losses = [
            torch.nn.functional.cross_entropy(model(q.x[part]), q.y[part]) for part in parts[run]
        ]
        grads = torch.autograd.grad(torch.stack(losses).mean(), list(model.parameters()))
        expected = torch.cat([g.flatten() for g in grads])
        torch.testing.assert_close(h.server["g"][run], expected, atol=1e-13, rtol=0)
    torch.testing.assert_close(h.server["g"], gradient(q, stack.theta), atol=1e-13, rtol=0)


def test_census_takes_everyone_first_and_a_sample_for_each_run_later():
    who = Census([2, 5], chance=0.2, seed=1)
    generators = [np.random.default_rng(i) for i in range(2)]
    counts = np.array([who(generators, N, t).sum(1) for t in range(200)])
    full = (counts == N).all(1)
    assert full[0] and 0.1 < full.mean() < 0.3 and (counts[~full] == [2, 5]).all()
    with pytest.raises(ValueError, match="between 1 and the 6 clients, got 9"):
        Census(9)(generators, N, 1)


@pytest.mark.parametrize("value", [-0.1, 1.5, [0.5, 2.0]])
def test_probabilities_are_checked(value):
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\], got"):
        FedAMD(LR, value)
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\], got 1.5"):
        Census(ACTIVE, 1.5)


def test_a_schedule_is_checked_when_it_is_used():
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\], got 1.2"):
        solve(FedAMD(LR, lambda t: 0.4 * t), problem(), 5)


def test_hyperparameters_may_differ_between_runs():
    q = problem()
    together = solve(FedAMD([0.2, 0.1], [0.5, 0.2], [1.0, 0.5]), q).theta
    for i, values in enumerate([(0.2, 0.5, 1.0), (0.1, 0.2, 0.5)]):
        alone = solve(FedAMD(*values), q).theta
        torch.testing.assert_close(together[i], alone[i], atol=1e-13, rtol=0)


def test_anchors_depend_on_the_seed_of_a_run_and_on_nothing_else():
    method, present = FedAMD(LR, 0.5), torch.ones(3, 30, dtype=torch.bool)
    c = SimpleNamespace(t=4, n_clients=30, active=torch.arange(30).expand(3, -1), present=present)
    c.seeds = [7, 8, 7]
    first, second, third = method.anchors(c)
    assert torch.equal(first, third) and not torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_type_and_device_are_kept(dtype, device):
    q = Quadratics.random(SEEDS, N, D, device=device, dtype=dtype)
    start = torch.zeros_like(q.b[:, 0])
    for method in (FedAMD(0.03, [0.3, 0.5]), FedPAGE(0.03)):
        h = federate(method, q, start, rounds=20, steps=K, seeds=SEEDS, active=Census(ACTIVE, 0.2))
        assert h.theta.dtype == dtype and h.theta.device.type == device
        assert h.server["g"].dtype == dtype and h.theta.isfinite().all()


@pytest.mark.gpu
def test_the_gpu_agrees_with_the_cpu_on_regressions():
    one, two = (
        federate(
            FedAMD(LR, 0.4),
            Regression.random(SEEDS, N, SAMPLES, D, 2, device=device),
            torch.zeros(2, D, dtype=torch.float64, device=device),
            rounds=20,
            steps=K,
            seeds=SEEDS,
            active=Census(ACTIVE),
        ).theta
        for device in ("cpu", "cuda")
    )
    torch.testing.assert_close(two.cpu(), one, atol=1e-10, rtol=0)
