"""AFA-CD and AFA-CS: plain loops, fixed points in closed form, equality where nobody is late."""

import numpy as np
import pytest
import torch

from miniature.federated.anarchic_fl import AFACD, AFACS, AnarchicFedAvg, fixed_point, returns
from miniature.federated.baselines import FedAvg
from miniature.federated.compression import RandK
from miniature.federated.engine import federate
from miniature.federated.objectives import Quadratics
from miniature.federated.participation import Bernoulli, Trace

LR, ETA, K, N, WAIT = 0.02, 0.2, 4, 6, 2
SEEDS = [0, 1]
RATES = np.array([4.0, 4.0, 4.0, 1.0, 1.0, 1.0])


def quadratics(heterogeneity=1.0, noise=0.0, seeds=SEEDS, n=N):
    return Quadratics.random(seeds, n, 5, heterogeneity, noise=noise)


def solve(method, q, rounds=30, steps=K, seeds=SEEDS, **options):
    start = torch.zeros_like(q.b[:, 0])
    return federate(method, q, start, rounds=rounds, steps=steps, seeds=seeds, **options)


def draw_effort(rounds=30, most=K, n=N):
    return np.stack([np.random.default_rng(s).integers(1, most + 1, (rounds, n)) for s in SEEDS])


def loop(A, b, present, effort, kind):
    """The server and the workers of the paper, a return at a time."""
    n, d = b.shape
    x, pulled, memory = np.zeros(d), np.zeros((n, d)), np.zeros((n, d))
    for came, K_t in zip(present, effort):
        returned = np.flatnonzero(came)
        for i in returned:
            y, total = pulled[i].copy(), np.zeros(d)
            for _ in range(K_t[i]):
                g = A[i] @ y - b[i]
                total += g
                y -= LR * g
            memory[i] = total / K_t[i] if kind != "FedAvg" else -LR * total
        if kind == "FedAvg":
            x = x + ETA * memory[returned].mean(0)
        elif kind == "AFA-CD":
            x = x - ETA * memory[returned].mean(0)
        else:
            x = x - ETA * memory.sum(0) / n
        pulled[returned] = x
    return x, memory


@pytest.mark.parametrize("free", [True, False], ids=["random K", "constant K"])
@pytest.mark.parametrize(
    "kind, name", [(AnarchicFedAvg, "FedAvg"), (AFACD, "AFA-CD"), (AFACS, "AFA-CS")]
)
def test_engine_equals_a_loop_over_returns(kind, name, free):
    q, arrivals = quadratics(), returns(RATES, WAIT, 30, SEEDS)
    effort = draw_effort() if free else np.full((2, 30, N), K)
    h = solve(kind(LR, ETA, effort if free else None), q, active=arrivals)
    for i in range(2):
        x, memory = loop(q.A[i].numpy(), q.b[i].numpy(), arrivals.present[i], effort[i], name)
        np.testing.assert_allclose(h.theta[i], x, atol=1e-12, rtol=0)
        if name == "AFA-CS":
            np.testing.assert_allclose(h.client["G"][i], memory, atol=1e-12, rtol=0)


def test_without_delay_both_are_one_and_with_one_step_distributed_sgd():
    q = quadratics()
    one, two = (solve(kind(LR, ETA), q).theta for kind in (AFACD, AFACS))
    torch.testing.assert_close(one, two, atol=1e-13, rtol=0)
    x = torch.zeros_like(q.b[:, 0])
    for _ in range(30):
        x = x - ETA * ((q.A.mean(1) @ x[..., None])[..., 0] - q.b.mean(1))
    for kind in (AFACD, AFACS):
        h = solve(kind(LR, ETA), q, steps=1)
        torch.testing.assert_close(h.theta, x, atol=1e-13, rtol=0)


def test_constant_work_makes_afa_cd_fedavg_with_another_rate():
    q, arrivals = quadratics(noise=0.3), returns(RATES, WAIT, 30, SEEDS)
    one = solve(AFACD(LR, ETA), q, active=arrivals).theta
    two = solve(AnarchicFedAvg(LR, ETA / (LR * K)), q, active=arrivals).theta
    torch.testing.assert_close(one, two, atol=1e-12, rtol=0)
    two = solve(FedAvg(LR, ETA / (LR * K)), q, active=arrivals).theta
    torch.testing.assert_close(one, two, atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", [AFACD, AFACS])
def test_one_step_sends_the_gradient_whatever_the_local_rate(kind):
    q = quadratics(noise=0.3)
    one, two = (solve(kind(lr, ETA), q, steps=1, active=WAIT).theta for lr in (1e-3, 0.7))
    torch.testing.assert_close(one, two, atol=1e-10, rtol=0)


def test_fixed_points_and_what_the_number_of_steps_weighs():
    q, work = quadratics(), np.array([10, 10, 10, 1, 1, 1])
    even = torch.ones(N, dtype=torch.float64)
    by_work = torch.as_tensor(work, dtype=torch.float64)
    for lr in (1e-3, 0.02):
        for method, weights in (
            (AFACD(lr, 0.3), even),
            (AFACS(lr, 0.3), even),
            (AnarchicFedAvg(lr, 0.3 / (5.5 * lr)), by_work),
        ):
            x = solve(method, q, rounds=150, steps=work).theta
            expected = fixed_point(q, lr, work, weights)
            torch.testing.assert_close(x, expected, atol=1e-9, rtol=0)
    fair, unfair = q.optimum(), q.optimum(by_work)
    gap = (fair - unfair).norm(dim=1)
    assert ((fixed_point(q, 1e-3, work, even) - fair).norm(dim=1) < 0.03 * gap).all()
    assert ((fixed_point(q, 1e-3, work, by_work) - unfair).norm(dim=1) < 0.03 * gap).all()


def test_fixed_point_equals_sums_over_steps_and_is_the_optimum_for_one_step():
    q, work, shares = quadratics(), [1, 2, 3, 4, 5, 6], torch.arange(1.0, 7).double()
    x = fixed_point(q, [0.05, 0.1], work, shares)
    for i, lr in enumerate((0.05, 0.1)):
        left, right = np.zeros((5, 5)), np.zeros(5)
        for A, b, k, share in zip(q.A[i].numpy(), q.b[i].numpy(), work, shares.numpy()):
            M = np.eye(5) - lr * A
            P = sum(np.linalg.matrix_power(M, j) for j in range(k)) / k
            left, right = left + share * P @ A, right + share * P @ b
        np.testing.assert_allclose(x[i], np.linalg.solve(left, right), atol=1e-11, rtol=0)
    one = fixed_point(q, 0.1, 1, shares)
    torch.testing.assert_close(one, q.optimum(shares), atol=1e-11, rtol=0)


def test_the_dependence_on_work_is_of_first_order_in_the_local_rate():
    q, even = quadratics(), torch.ones(N, dtype=torch.float64)
    small, large = (
        (fixed_point(q, lr, [9, 9, 9, 1, 1, 1], even) - q.optimum()).norm(dim=1)
        for lr in (1e-5, 1e-4)
    )
    torch.testing.assert_close(large / small, torch.full((2,), 10.0).double(), rtol=0.01, atol=0)


def test_skewed_arrivals_move_afa_cd_to_their_optimum_and_not_afa_cs():
    q, arrivals = quadratics(), returns(RATES, WAIT, 1500, SEEDS)
    q_i = torch.as_tensor(arrivals.present[:, 500:].mean(1))
    best, theirs = q.optimum(), q.optimum(q_i)
    gap = (best - theirs).norm(dim=1)
    h = solve(AFACD(1e-4, 0.05), q, 1500, 1, active=arrivals, metric=lambda x: x)
    mean = h.metric[:, 500:].mean(1)
    assert ((mean - theirs).norm(dim=1) < 0.05 * gap).all()
    assert ((mean - best).norm(dim=1) > 0.9 * gap).all()
    h = solve(AFACS(1e-4, 0.05), q, 1500, 1, active=arrivals)
    torch.testing.assert_close(h.theta, best, atol=1e-6, rtol=0)


def test_the_memory_averages_over_all_workers_from_the_start():
    q = quadratics()
    first = np.zeros((1, N), dtype=bool)
    first[0, :2] = True
    h = solve(AFACS(LR, ETA), q, rounds=1, steps=1, active=Trace(first, stale=True))
    torch.testing.assert_close(h.theta, ETA * q.b[:, :2].sum(1) / N, atol=1e-13, rtol=0)


@pytest.mark.parametrize("who", [2, Bernoulli([0.3] * N), returns(RATES, WAIT, 30, SEEDS)])
@pytest.mark.parametrize("compressor", [None, RandK(0.4)])
def test_the_running_mean_is_the_mean_of_the_memory(who, compressor):
    h = solve(AFACS(LR, ETA), quadratics(), active=who, compress=compressor)
    torch.testing.assert_close(h.server["mean_G"], h.client["G"].mean(1), atol=1e-12, rtol=0)


def test_the_law_of_the_work_does_not_change_where_afa_cd_goes():
    # Work that is random, with the same law for all, has no effect to zeroth order in eta_L.
    q, effort = quadratics(), draw_effort(400, 9)
    x = solve(AFACD(1e-5, 0.2, effort), q, 400, 9).theta
    torch.testing.assert_close(x, q.optimum(), atol=1e-3, rtol=0)


def test_arrivals_are_reproducible_and_have_m_returns_a_round():
    one, two = (returns(RATES, [2, 3], 50, [4, 5]) for _ in range(2))
    assert (one.present == two.present).all() and one.stale
    assert (one.present[0].sum(1) == 2).all() and (one.present[1].sum(1) == 3).all()
    alone = returns(RATES, 3, 50, [5])
    assert (alone.present[0] == one.present[1]).all()


def test_arrivals_equal_an_event_queue():
    rounds = 40
    work = np.random.default_rng([7, 3]).exponential(size=(rounds + 1, N)) / RATES
    queue, came = sorted((due, i) for i, due in enumerate(work[0])), np.zeros((rounds, N), bool)
    for t in range(rounds):
        back, waiting = queue[:WAIT], queue[WAIT:]
        now = back[-1][0]  # all that returned begin again, from the new model
        queue = sorted(waiting + [(now + work[t + 1, i], i) for _, i in back])
        came[t, [i for _, i in back]] = True
    assert (returns(RATES, WAIT, rounds, [7]).present[0] == came).all()


def test_fast_workers_return_more_often_and_silent_ones_never():
    rates = np.array([10.0, 10.0, 1.0, 1.0, 0.0])
    came = returns(rates, 1, 4000, [0]).present[0].mean(0)
    assert came[4] == 0
    # With m = 1 nobody waits, and arrivals are in proportion to the rates.
    np.testing.assert_allclose(came[:4], rates[:4] / 22, atol=0.02)


@pytest.mark.parametrize("kind", [AnarchicFedAvg, AFACD, AFACS])
def test_hyperparameters_may_differ_between_runs(kind):
    q, effort = quadratics(), draw_effort()
    together = solve(kind([0.03, 0.01], [0.3, 0.1], effort), q, active=WAIT).theta
    for i, values in enumerate([(0.03, 0.3), (0.01, 0.1)]):
        alone = solve(kind(*values, effort), q, active=WAIT).theta
        torch.testing.assert_close(together[i], alone[i], atol=1e-12, rtol=0)


def test_one_table_of_work_serves_all_runs():
    q, effort = quadratics(), draw_effort()[0]
    one = solve(AFACD(LR, ETA, effort), q, active=WAIT).theta
    two = solve(AFACD(LR, ETA, np.stack([effort] * 2)), q, active=WAIT).theta
    assert torch.equal(one, two)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="at least 1 step, got 0"):
        AFACD(LR, ETA, [[1, 0]])
    with pytest.raises(ValueError, match="up to 5 steps"):
        solve(AFACD(LR, ETA, np.full((1, N), 5)), quadratics())
    with pytest.raises(ValueError, match="lowest: -1"):
        returns([1.0, -1.0], 1, 5, [0])
    with pytest.raises(ValueError, match=r"m = \[3\]"):
        returns([1.0, 1.0, 0.0], 3, 5, [0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_type_and_device_are_kept(dtype, device):
    q = Quadratics.random(SEEDS, N, 5, device=device, dtype=dtype)
    arrivals = returns(RATES, WAIT, 20, SEEDS)
    for kind in (AnarchicFedAvg, AFACD, AFACS):
        h = solve(kind(LR, ETA, draw_effort()), q, rounds=20, active=arrivals)
        assert h.theta.dtype == dtype and h.theta.device.type == device
        assert h.theta.isfinite().all()
    x = fixed_point(q, LR, K, torch.ones(N, dtype=dtype, device=device))
    assert x.dtype == dtype and x.device.type == device
