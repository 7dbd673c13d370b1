"""FedFix: schedules simulated a second way, one plain loop for all, weights, fixed points."""

import numpy as np
import pytest
import torch

from miniature.federated.baselines import FedAvg
from miniature.federated.engine import federate
from miniature.federated.fedfix import (
    StochasticWeights,
    asynchronous,
    by_share,
    fedavg,
    fedbuff,
    fedfix,
    mean_weights,
)
from miniature.federated.objectives import Quadratics
from miniature.federated.participation import Cyclic, Sample, clock

SEEDS = [0, 1]
TIMES = np.array([1.0, 0.83, 0.61, 0.44, 0.31, 0.2])
N, LR, K = len(TIMES), 0.02, 4
P = np.arange(1.0, N + 1) / 21
SCHEDULES = {
    "FedAvg": lambda t, horizon, **o: fedavg(t, horizon, **o),
    "async": lambda t, horizon, **o: asynchronous(t, horizon, **o),
    "FedBuff-2": lambda t, horizon, **o: fedbuff(t, horizon, 2, weighted=True, **o),
    "FedFix-0.3": lambda t, horizon, **o: fedfix(t, horizon, 0.3, **o),
}


def quadratics(noise=0.0, **options):
    return Quadratics.random(SEEDS, N, 5, noise=noise, **options)


def solve(schedule, q, lr=LR, steps=K, average=None, **options):
    """The last model, or the mean over the last `average` server steps: [S, d]."""
    trace, d = schedule
    h = federate(
        StochasticWeights(lr, d, **options),
        q,
        torch.zeros_like(q.b[:, 0]),
        rounds=len(trace.times),
        steps=steps,
        seeds=SEEDS,
        active=trace,
        metric=lambda theta: theta,
    )
    return h.theta if average is None else h.metric[:, -average:].mean(1)


def returns(horizon, size=None, wait=None):
    """Who returns when, from a vector of return times: a list of (time, clients)."""
    due, now, steps = TIMES.copy(), 0.0, []
    while True:
        if wait is None:
            back = np.sort(np.argsort(due, kind="stable")[:size])
            now = due[back].max()
        else:
            now += wait
            back = np.flatnonzero(due <= now + 1e-9)
        if now > horizon + 1e-9:
            return steps
        due[back] = now + TIMES[back]
        steps.append((now, back))


HOW = {
    "FedAvg": dict(size=N),
    "async": dict(size=1),
    "FedBuff-2": dict(size=2),
    "FedFix-0.3": dict(wait=0.3),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_equal_a_second_simulation(name):
    trace, _ = SCHEDULES[name](TIMES, 12.0)
    steps = returns(12.0, **HOW[name])
    np.testing.assert_allclose(trace.times, [now for now, _ in steps], atol=1e-9)
    assert [list(np.flatnonzero(row)) for row in trace.present] == [list(b) for _, b in steps]


@pytest.mark.parametrize("momentum, eta", [(0.0, 1.0), (0.9, 0.7)])
@pytest.mark.parametrize("name", SCHEDULES)
def test_engine_equals_a_loop_over_arrivals(name, momentum, eta):
    q = quadratics()
    schedule = SCHEDULES[name](TIMES, 8.0, p=P)
    theta = solve(schedule, q, momentum=momentum, eta=eta)
    for s in range(2):
        A, b = q.A[s].numpy(), q.b[s].numpy()
        server, held = np.zeros(5), np.zeros((N, 5))
        for _, back in returns(8.0, **HOW[name]):
            step = np.zeros(5)
            for i in back:
                x, v = held[i].copy(), np.zeros(5)
                for _ in range(K):
                    v = momentum * v + A[i] @ x - b[i]
                    x = x - LR * v
                step += schedule[1][i] * (x - held[i])
            server = server + eta * step
            held[back] = server
        np.testing.assert_allclose(theta[s], server, atol=1e-12, rtol=0)


def test_local_steps_are_sgd_with_momentum_made_anew_at_each_download():
    q = quadratics()
    theta = solve(fedavg(TIMES, 3.0), q, momentum=0.9)
    for s in range(2):
        x = torch.zeros(5, dtype=torch.float64)
        for _ in range(3):
            ends = []
            for i in range(N):
                w = x.clone().requires_grad_()
                optimizer = torch.optim.SGD([w], lr=LR, momentum=0.9)
                for _ in range(K):
                    optimizer.zero_grad()
                    (0.5 * w @ q.A[s, i] @ w - q.b[s, i] @ w).backward()
                    optimizer.step()
                ends.append(w.detach())
            x = torch.stack(ends).mean(0)
        torch.testing.assert_close(theta[s], x, atol=1e-12, rtol=0)


def test_waiting_for_the_slowest_is_fedavg_bit_for_bit():
    q = quadratics(noise=0.3)
    sync = solve(fedavg(TIMES, 40.0), q)
    assert torch.equal(solve(fedfix(TIMES, 40.0, TIMES.max()), q), sync)
    start = torch.zeros_like(q.b[:, 0])
    plain = federate(FedAvg(LR), q, start, rounds=40, steps=K, seeds=SEEDS).theta
    torch.testing.assert_close(sync, plain, atol=1e-12, rtol=0)


def test_equal_hardware_and_half_the_wait_is_fedavg_with_twice_the_server_rate():
    q, same = quadratics(), np.ones(N)
    half = solve(fedfix(same, 20.0, 0.5), q)
    torch.testing.assert_close(half, solve(fedavg(same, 20.0), q, eta=2.0), atol=1e-12, rtol=0)


def test_sampling_is_a_case_of_the_same_update():
    q = quadratics(noise=0.3)
    start = torch.zeros_like(q.b[:, 0])
    options = dict(rounds=15, steps=K, seeds=SEEDS, active=Sample(2))
    ours = federate(StochasticWeights(LR, np.full(N, 1 / N / (2 / N))), q, start, **options)
    torch.testing.assert_close(ours.theta, federate(FedAvg(LR), q, start, **options).theta)


@pytest.mark.parametrize("wait", [0.1, 0.2, 0.3, 0.5, 0.8, 1.0])
def test_fedfix_weights_are_exact_over_a_period(wait):
    trace, d = fedfix(TIMES, 2520 * wait, wait, P)  # 2520: divisible by 1 to 10
    np.testing.assert_allclose(mean_weights(trace, d), P, rtol=1e-12)
    periods = np.array([len(np.arange(0, t - 1e-9, wait)) for t in TIMES])
    np.testing.assert_allclose(d, P * periods)
    np.testing.assert_allclose(trace.present.mean(0), 1 / periods)
    trace, d = fedfix(TIMES, 2520 * wait, wait, P, weighted=False)
    np.testing.assert_allclose(mean_weights(trace, d), P / periods, rtol=1e-12)


def test_a_time_that_is_a_multiple_of_the_wait_is_not_rounded_up():
    times = np.array([1.0, 0.1 * 6])  # 0.6000000000000001
    trace, d = fedfix(times, 15 * 0.2, 0.2)
    np.testing.assert_array_equal(d, [2.5, 1.5])
    np.testing.assert_allclose(mean_weights(trace, d), 0.5)


def test_the_default_weights_are_one_over_the_clients_whoever_comes():
    q = quadratics()
    start = torch.zeros_like(q.b[:, 0])
    options = dict(rounds=9, steps=K, seeds=SEEDS, active=Sample(2))
    default, given = (
        federate(StochasticWeights(LR, d), q, start, **options).theta
        for d in (None, np.full(N, 1 / N))
    )
    torch.testing.assert_close(default, given)


def test_asynchronous_weights_follow_renewal_theory():
    trace, d = asynchronous(TIMES, 5000.0, P)
    np.testing.assert_allclose(trace.present.sum(0), np.floor(5000.0 / TIMES), atol=2)
    np.testing.assert_allclose(mean_weights(trace, d), P, rtol=1e-3)
    assert d.min() > 0 and np.isclose(mean_weights(trace, d).sum(), 1, atol=1e-3)


def test_fedbuff_weights_hold_on_another_stretch_of_the_schedule():
    trace, _ = fedbuff(TIMES, 3000.0, 2)
    half = len(trace.times) // 2
    early, late = (type(trace)(p) for p in (trace.present[:half], trace.present[half:]))
    np.testing.assert_allclose(mean_weights(late, by_share(early, P)), P, rtol=0.03)
    np.testing.assert_array_equal(fedbuff(TIMES, 10.0, 2)[1], 0.5)


def test_random_times_are_weighted_by_the_share_of_steps():
    # A client whose time is 0.2 or 0.9 with equal chance comes every (1 + 3) / 2 windows of 0.3.
    g = np.random.default_rng(0)

    def durations(client, k):
        return g.choice([0.2, 0.9])

    durations.n_clients = 3
    trace = clock(durations, 30_000, window=0.3)
    np.testing.assert_allclose(trace.present.mean(0), 0.5, rtol=0.02)
    np.testing.assert_allclose(by_share(trace), 2 / 3, rtol=0.02)


@pytest.mark.parametrize(
    "name, horizon", [("async", 90.0), ("FedBuff-2", 200.0), ("FedFix-0.3", 400.0)]
)
def test_weighted_schedules_rest_at_the_optimum(name, horizon):
    q = quadratics()
    best = q.optimum(torch.from_numpy(P))
    limit = solve(SCHEDULES[name](TIMES, horizon, p=P), q, 2e-3, average=600)
    assert ((limit - best).norm(dim=1) / best.norm(dim=1)).max() < 0.02


@pytest.mark.parametrize(
    "schedule, weight",
    [
        (asynchronous(TIMES, 90.0, weighted=False), 1 / TIMES),
        (fedfix(TIMES, 600.0, 0.2, weighted=False), 1 / np.ceil(TIMES / 0.2 - 1e-9)),
    ],
    ids=["async", "FedFix"],
)
def test_equal_weights_rest_at_the_optimum_of_a_speed_weighted_loss(schedule, weight):
    q = quadratics()
    limit = solve(schedule, q, 2e-3, average=600)
    biased, best = q.optimum(torch.from_numpy(weight)), q.optimum()
    assert ((limit - biased).norm(dim=1) / best.norm(dim=1)).max() < 0.02
    assert ((limit - best).norm(dim=1) / best.norm(dim=1)).min() > 0.1


def test_weights_may_differ_between_runs():
    q = quadratics()
    (trace, a), (_, b) = (asynchronous(TIMES, 3.0, weighted=w) for w in (True, False))
    together = solve((trace, np.stack([a, b])), q, [0.02, 0.01])
    for i, (d, lr) in enumerate(((a, 0.02), (b, 0.01))):
        torch.testing.assert_close(together[i], solve((trace, d), q, lr)[i])


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: StochasticWeights(LR, [0.5, -0.1]), "positive, got -0.1"),
        (lambda: solve((clock(TIMES, 2), np.ones(4)), quadratics()), "4 aggregation weights for 6"),
        (lambda: fedavg([1.0, 0.0], 5.0), "times must be positive, got 0.0"),
        (lambda: fedavg(TIMES, 0.5), "no server step up to time 0.5"),
        (lambda: fedfix(TIMES, 5.0, 0.0), "wait must be positive, got 0.0"),
        (lambda: fedbuff(TIMES, 5.0, 7), "1..6"),
        (lambda: asynchronous(TIMES, 5.0, p=[0.5, 0.5]), "6 positive numbers of sum 1"),
        (lambda: fedavg([1.0, 1.0], 5.0, p=[0.5, 0.6]), "2 positive numbers of sum 1"),
        (lambda: fedbuff(TIMES, 0.4, 1, weighted=True), "client 0 never returns"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_type_and_device_are_kept(dtype, device):
    q = quadratics(device=device, dtype=dtype)
    theta = solve(fedfix(TIMES, 6.0, 0.3), q, momentum=0.9)
    assert theta.dtype == dtype and theta.device.type == device and theta.isfinite().all()
    start = torch.zeros_like(q.b[:, 0])
    h = federate(StochasticWeights(LR), q, start, rounds=4, steps=2, seeds=SEEDS, active=Cyclic(2))
    assert h.theta.dtype == dtype
