"""FedSpeed: Algorithm 1 as a loop, its identities, its fixed points."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from miniature.federated.baselines import FedDyn, FedSAM
from miniature.federated.engine import federate
from miniature.federated.fedspeed import FedSpeed, FedSpeedReleased
from miniature.federated.objectives import Quadratics

LR, LAM, K = 0.1, 0.8, 10
SEEDS = [0, 1]


def quadratics(n_clients=6, d=5):
    return Quadratics.random(SEEDS, n_clients, d)


def solve(method, q, rounds=200, steps=K, **options):
    start = torch.zeros_like(q.b[:, 0])
    return federate(method, q, start, rounds=rounds, steps=steps, seeds=SEEDS, **options)


class Tape:
    """An objective that remembers its answers."""

    def __init__(self, q):
        self.q, self.n_clients, self.batches, self.gradients = q, q.n_clients, q.batches, []

    def grad(self, x, active, batch):
        g = self.q.grad(x, active, batch)
        self.gradients.append(g)
        return g


def algorithm_1(A, b, seed, rounds, active, lam, rho, alpha, normalize, released):
    """The paper's Algorithm 1 (or the released code's server) on one problem, in numpy."""
    n, d = b.shape
    draw = np.random.default_rng([seed, 0])
    x, g_hat, h = np.zeros(d), np.zeros((n, d)), np.zeros((n, d))
    for _ in range(rounds):
        S = draw.permutation(n)[:active] if active < n else range(n)
        uploads, ends = [], []
        for i in S:
            w = x.copy()
            for _ in range(K):
                g1 = A[i] @ w - b[i]
                up = rho * g1 / np.linalg.norm(g1) if normalize else rho * g1
                g2 = A[i] @ (w + up) - b[i]
                quasi = (1 - alpha) * g1 + alpha * g2
                w = w - LR * (quasi - g_hat[i] + (w - x) / lam)
            g_hat[i] = g_hat[i] - (w - x) / lam
            h[i] = -lam * g_hat[i]
            uploads.append(w - lam * g_hat[i])
            ends.append(w)
        x = np.mean(ends, axis=0) + h.mean(axis=0) if released else np.mean(uploads, axis=0)
    return x, g_hat


@pytest.mark.parametrize("active", [6, 2])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("kind", [FedSpeed, FedSpeedReleased])
def test_engine_equals_algorithm_1(kind, normalize, active):
    q = quadratics()
    h = solve(kind(LR, LAM, 0.05, 0.7, normalize), q, rounds=5, active=active)
    for i, seed in enumerate(SEEDS):
        x, g_hat = algorithm_1(
            q.A[i].numpy(), q.b[i].numpy(), seed, 5, active, LAM, 0.05, 0.7, normalize,
            kind is FedSpeedReleased,
        )  # fmt: skip
        np.testing.assert_allclose(h.theta[i], x, atol=1e-11, rtol=0)
        np.testing.assert_allclose(h.client["g_hat"][i], g_hat, atol=1e-11, rtol=0)


def test_dual_is_an_exponential_average_of_quasi_gradients():
    q, rounds, alpha = quadratics(), 7, 0.6
    tape = Tape(q)
    h = solve(FedSpeed(LR, LAM, 0.1, alpha), tape_start(tape, q), rounds=rounds)
    g = torch.stack(tape.gradients).unflatten(0, (rounds, K, 2))
    quasi = (1 - alpha) * g[:, :, 0] + alpha * g[:, :, 1]
    weights = LR / LAM * (1 - LR / LAM) ** torch.arange(K - 1, -1, -1, dtype=torch.float64)
    assert weights.sum().item() == pytest.approx(1 - (1 - LR / LAM) ** K, abs=1e-14)
    average = torch.zeros_like(q.b)
    for t in range(rounds):
        average = (1 - weights.sum()) * average + torch.einsum("k,ksid->sid", weights, quasi[t])
    torch.testing.assert_close(h.client["g_hat"], average, atol=1e-12, rtol=0)


def tape_start(tape, q):
    """Let `solve` read the shape of its start from a tape."""
    tape.b = q.b
    return tape


@pytest.mark.parametrize("steps", [10, 40])
@pytest.mark.parametrize("kind, active", [(FedSpeed, None), (FedSpeedReleased, 3)])
def test_without_ascent_the_optimum_is_reached(kind, active, steps):
    q = quadratics()
    h = solve(kind(LR, LAM, rho=0.0), q, rounds=400, steps=steps, active=active)
    assert (h.theta - q.optimum()).norm(dim=1).max() < 1e-8
    gradients = (q.A @ q.optimum()[:, None, :, None])[..., 0] - q.b
    torch.testing.assert_close(h.client["g_hat"], gradients, atol=1e-7, rtol=0)


def test_the_papers_server_does_not_settle_with_few_clients():
    q = quadratics()
    distance = lambda x: (x - q.optimum()).norm(dim=1)  # noqa: E731
    h = solve(FedSpeed(LR, LAM, rho=0.0), q, rounds=600, active=3, metric=distance)
    assert h.metric[:, -100:].mean() > 0.1


def test_ascent_moves_the_fixed_point_in_proportion():
    q, distances = quadratics(), []
    eye = torch.eye(5, dtype=torch.float64)
    for rho in (0.01, 0.02, 0.04):
        B = eye + rho * q.A
        rest = torch.linalg.solve((B @ q.A).sum(1), (B @ q.b[..., None]).sum(1)[..., 0])
        found = solve(FedSpeed(LR, LAM, rho), q).theta
        torch.testing.assert_close(found, rest, atol=1e-9, rtol=0)
        distances.append((found - q.optimum()).norm(dim=1))
    for a, b in pairwise(distances):
        assert ((b / a) > 1.8).all() and ((b / a) < 2.05).all()


def test_identical_clients_lose_nothing_to_the_ascent():
    q = quadratics()
    q = Quadratics(q.A[:, :1].expand(-1, 4, -1, -1), q.b[:, :1].expand(-1, 4, -1))
    theta = solve(FedSpeed(LR, LAM, rho=0.1), q).theta
    assert (theta - q.optimum()).norm(dim=1).max() < 1e-10


def test_both_servers_agree_when_all_take_part():
    q = quadratics()
    a = solve(FedSpeed(LR, LAM, 0.1), q, rounds=20)
    b = solve(FedSpeedReleased(LR, LAM, 0.1), q, rounds=20)
    torch.testing.assert_close(a.theta, b.theta, atol=1e-12, rtol=0)
    few = [solve(k(LR, LAM, 0.1), q, rounds=20, active=2) for k in (FedSpeed, FedSpeedReleased)]
    assert (few[0].theta - few[1].theta).abs().max() > 1e-3


@pytest.mark.parametrize("options", [dict(alpha=0.0), dict(rho=0.0)])
def test_without_perturbation_it_is_feddyn(options):
    q = quadratics()
    dyn = solve(FedDyn(LR, 1 / LAM), q, rounds=20)
    for kind in (FedSpeed, FedSpeedReleased):
        speed = solve(kind(LR, LAM, **options), q, rounds=20)
        torch.testing.assert_close(speed.theta, dyn.theta, atol=1e-12, rtol=0)
        torch.testing.assert_close(speed.client["g_hat"], dyn.client["g"], atol=1e-12, rtol=0)
    few = solve(FedSpeedReleased(LR, LAM, **options), q, rounds=20, active=2)
    dyn = solve(FedDyn(LR, 1 / LAM), q, rounds=20, active=2)
    torch.testing.assert_close(few.theta, dyn.theta, atol=1e-12, rtol=0)


def test_with_one_step_its_memory_is_all_that_sets_it_apart_from_fedsam():
    class Forgetful(FedSpeed):
        def message(self, x, c):
            return {"delta": c.send(x - c.x0)}

    q = quadratics()
    sam = solve(FedSAM(LR, 0.1), q, rounds=20, steps=1).theta
    theta = solve(Forgetful(LR, LAM, 0.1, normalize=True), q, rounds=20, steps=1).theta
    torch.testing.assert_close(theta, sam, atol=1e-12, rtol=0)
    theta = solve(FedSpeed(LR, LAM, 0.1, normalize=True), q, rounds=20, steps=1).theta
    assert (theta - sam).abs().max() > 1e-3


def test_with_one_step_the_server_has_momentum():
    q, beta = quadratics(), 1 - LR / LAM
    x, v = torch.zeros_like(q.optimum()), torch.zeros_like(q.optimum())
    for _ in range(20):
        g = torch.einsum("sde,se->sd", q.A.mean(1), x) - q.b.mean(1)
        new = beta * v + LR * g
        x, v = x - new - (new - v), new
    theta = solve(FedSpeed(LR, LAM, rho=0.0), q, rounds=20, steps=1).theta
    torch.testing.assert_close(theta, x, atol=1e-12, rtol=0)


def test_the_second_gradient_is_taken_only_where_it_counts():
    q = quadratics()
    for method, calls in ((FedSpeed(LR, LAM, 0.0), 1), (FedSpeed(LR, LAM, 0.1, alpha=0.0), 1),
                          (FedSpeed(LR, LAM, 0.1), 2)):  # fmt: skip
        tape = tape_start(Tape(q), q)
        solve(method, tape, rounds=1, steps=3)
        assert len(tape.gradients) == 3 * calls


def test_both_gradients_use_the_same_batch():
    seen = []

    class Watch(Quadratics):
        def grad(self, x, active, batch):
            seen.append(id(batch))
            return super().grad(x, active, batch)

        def batches(self, active, steps, seeds, t):
            self.kept = [tuple(b) for b in map(list, super().batches(active, steps, seeds, t))]
            return self.kept

    q = quadratics()
    solve(FedSpeed(LR, LAM, 0.1), Watch(q.A, q.b), rounds=1, steps=3)
    assert seen[::2] == seen[1::2] and len(set(seen)) == 3


def test_hyperparameters_may_differ_between_runs():
    q = quadratics()
    together = solve(FedSpeed([0.1, 0.05], [0.8, 2.0], [0.1, 0.02]), q, rounds=10).theta
    for i, (lr, lam, rho) in enumerate([(0.1, 0.8, 0.1), (0.05, 2.0, 0.02)]):
        alone = solve(FedSpeed(lr, lam, rho), q, rounds=10).theta
        torch.testing.assert_close(together[i], alone[i], atol=1e-12, rtol=0)


def test_one_vector_is_sent():
    q = quadratics()
    for kind in (FedSpeed, FedSpeedReleased):
        assert solve(kind(LR, LAM), q, rounds=1).upload == 5 * 8


@pytest.mark.parametrize("alpha", [-0.1, 1.5])
def test_alpha_is_checked(alpha):
    with pytest.raises(ValueError, match=f"between 0 and 1, got {alpha}"):
        FedSpeed(LR, LAM, alpha=alpha)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_type_and_device_are_kept(dtype, device):
    q = Quadratics.random(SEEDS, 6, 5, device=device, dtype=dtype)
    for kind in (FedSpeed, FedSpeedReleased):
        h = solve(kind(LR, LAM, [0.0, 0.1]), q, rounds=200, active=None)
        assert h.theta.dtype == dtype and h.theta.device.type == device
        assert h.client["g_hat"].dtype == dtype
        assert (h.theta - q.optimum())[0].norm() < (1e-4 if dtype == torch.float32 else 1e-10)
