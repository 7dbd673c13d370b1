"""One contract for every federated method: whatever is a `Method` in the package is held to it."""

import pytest
import torch
from kinds import kinds

import miniature.federated
from miniature import data
from miniature.federated.compression import Dither, RandK, TopK
from miniature.federated.engine import Method, federate
from miniature.federated.objectives import Classification, Quadratics
from miniature.federated.participation import Bernoulli, clock
from miniature.models import MLP
from miniature.stack import Stack

LR, SEEDS = 0.05, [0, 1, 2]


@pytest.fixture(params=[Method, *kinds(miniature.federated, Method)], ids=lambda k: k.__name__)
def kind(request):
    return request.param


def quadratics(seeds=SEEDS, n_clients=6, **options):
    return Quadratics.random(seeds, n_clients, 5, **options)


def solve(method, q, seeds=SEEDS, rounds=6, steps=3, **options):
    start = 0.1 * torch.ones_like(q.b[:, 0])
    return federate(method, q, start, rounds=rounds, steps=steps, seeds=seeds, **options)


def test_it_is_built_from_a_learning_rate_alone(kind):
    assert kind(LR).lr == LR


def test_the_same_seed_gives_the_same_result(kind):
    first, second = (solve(kind(LR), quadratics(), active=3) for _ in range(2))
    assert torch.equal(first.theta, second.theta)


def test_it_moves_and_stays_finite(kind):
    start = 0.1 * torch.ones(3, 5, dtype=torch.float64)
    theta = solve(kind(LR), quadratics(), active=3).theta
    assert theta.isfinite().all() and not torch.equal(theta, start)


def test_runs_do_not_depend_on_what_else_is_stacked(kind):
    together = solve(kind(LR), quadratics(), active=3).theta
    for i, seed in enumerate(SEEDS):
        alone = solve(kind(LR), quadratics([seed]), [seed], active=3).theta
        torch.testing.assert_close(together[i], alone[0], atol=1e-12, rtol=1e-9)


def test_absent_clients_change_nothing_but_their_own_clock(kind):
    # Padding rows of runs with fewer participants must not leak into results.
    rare = Bernoulli([0.3] * 6)
    together = solve(kind(LR), quadratics(), active=rare).theta
    for i, seed in enumerate(SEEDS):
        alone = solve(kind(LR), quadratics([seed]), [seed], active=rare).theta
        torch.testing.assert_close(together[i], alone[0], atol=1e-12, rtol=1e-9)


def test_one_client_with_one_step_is_gradient_descent_where_the_method_says_so(kind):
    if not kind.is_sgd:
        assert kind.__doc__
        return
    q = quadratics(n_clients=1)
    x = 0.1 * torch.ones(3, 5, dtype=torch.float64)
    for _ in range(6):
        x = x - LR * ((q.A[:, 0] @ x[..., None])[..., 0] - q.b[:, 0])
    torch.testing.assert_close(solve(kind(LR), q, steps=1).theta, x, atol=1e-12, rtol=0)


def test_bytes_are_counted_for_every_client(kind):
    h = solve(kind(LR), quadratics(), rounds=4, active=3)
    assert h.upload > 0 and (h.up[:, -1] == h.upload * 4 * 3).all()
    assert (h.down[:, -1] == (1 + len(kind.downloads)) * 5 * 8 * 4 * 3).all()


@pytest.mark.parametrize("compressor", [TopK(0.5), RandK(0.5), Dither(4)])
def test_it_runs_compressed(kind, compressor):
    h = solve(kind(LR), quadratics(), compress=compressor)
    assert h.theta.isfinite().all()


def test_it_runs_with_late_clients_and_unequal_steps(kind):
    trace = clock([1.0, 1.3, 2.0, 2.2, 3.0, 5.0], 8, arrivals=2)
    h = solve(kind(LR), quadratics(), rounds=8, active=trace, steps=[1, 2, 3, 4, 5, 6])
    assert h.theta.isfinite().all()
    assert h.time[-1] == trace.times[-1]


@pytest.fixture(scope="module")
def digits():
    return data.digits()


def classify(method, digits, chunk=None, device="cpu"):
    stack = Stack.init(lambda: MLP([64, 16, 10]), [0, 1], chunk=chunk, device=device)
    parts = [data.dirichlet(digits.y_train, 8, 0.5, s) for s in (0, 1)]
    x, y = digits.x_train.to(device), digits.y_train.to(device)
    objective = Classification(stack, x, y, parts, batch_size=8)
    return federate(method, objective, stack.theta, rounds=3, steps=4, seeds=[0, 1], active=3)


def test_chunking_changes_nothing(kind, digits):
    whole, parts = classify(kind(LR), digits), classify(kind(LR), digits, chunk=2)
    torch.testing.assert_close(whole.theta, parts.theta, atol=1e-5, rtol=1e-5)


@pytest.mark.gpu
def test_the_gpu_agrees_with_the_cpu(kind, digits):
    cpu, gpu = classify(kind(LR), digits), classify(kind(LR), digits, device="cuda")
    torch.testing.assert_close(gpu.theta.cpu(), cpu.theta, atol=1e-3, rtol=1e-3)
