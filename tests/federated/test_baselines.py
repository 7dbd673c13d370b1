"""The classics: against loops over single clients, and where they come to rest."""

import numpy as np
import pytest
import torch

from miniature.federated.baselines import FedAvg, FedDyn, FedProx, FedSAM, Scaffold, ascend
from miniature.federated.engine import federate
from miniature.federated.objectives import Quadratics

ROUNDS, K, ACTIVE, LR = 6, 4, 3, 0.07


def quadratics(seed=3):
    return Quadratics.random([seed], 5, 4, heterogeneity=1.5)


def run_engine(method, q, rounds=ROUNDS, steps=K, active=ACTIVE):
    """Run on one problem from a start that is not zero; return theta as an array."""
    start = torch.ones(1, q.b.shape[-1], dtype=torch.float64)
    return federate(method, q, start, rounds=rounds, steps=steps, seeds=[0], active=active)


class Loop:
    """One client at a time, in numpy, on the clients that the engine draws."""

    def __init__(self, q):
        self.A, self.b = q.A[0].numpy(), q.b[0].numpy()
        self.n, self.d = self.b.shape
        g = np.random.default_rng([0, 0])
        self.rounds = [g.permutation(self.n)[:ACTIVE] for _ in range(ROUNDS)]

    def grad(self, i, x):
        return self.A[i] @ x - self.b[i]


def fedavg(loop, mu=0.0, rho=0.0):
    x = np.ones(loop.d)
    for clients in loop.rounds:
        ends = []
        for i in clients:
            w = x.copy()
            for _ in range(K):
                g = loop.grad(i, w)
                if rho:
                    g = loop.grad(i, w + rho * g / np.linalg.norm(g))
                w = w - LR * (g + mu * (w - x))
            ends.append(w)
        x = np.mean(ends, axis=0)
    return x


def scaffold(loop):
    x, c, ci = np.ones(loop.d), np.zeros(loop.d), np.zeros((loop.n, loop.d))
    for clients in loop.rounds:
        dx, dc = [], []
        for i in clients:
            w = x.copy()
            for _ in range(K):
                w = w - LR * (loop.grad(i, w) - ci[i] + c)
            new = ci[i] - c + (x - w) / (K * LR)
            dx.append(w - x)
            dc.append(new - ci[i])
            ci[i] = new
        x = x + np.mean(dx, axis=0)
        c = c + len(clients) / loop.n * np.mean(dc, axis=0)
    return x


def feddyn(loop, alpha):
    x, h, g = np.ones(loop.d), np.zeros(loop.d), np.zeros((loop.n, loop.d))
    for clients in loop.rounds:
        ends = []
        for i in clients:
            w = x.copy()
            for _ in range(K):
                w = w - LR * (loop.grad(i, w) - g[i] + alpha * (w - x))
            g[i] = g[i] - alpha * (w - x)
            ends.append(w)
        h = h - alpha / loop.n * sum(w - x for w in ends)
        x = np.mean(ends, axis=0) - h / alpha
    return x


@pytest.mark.parametrize(
    "method, oracle",
    [
        (FedAvg(LR), fedavg),
        (FedProx(LR, 0.8), lambda loop: fedavg(loop, mu=0.8)),
        (FedSAM(LR, 0.05), lambda loop: fedavg(loop, rho=0.05)),
        (Scaffold(LR), scaffold),
        (FedDyn(LR, 0.6), lambda loop: feddyn(loop, 0.6)),
    ],
    ids=["FedAvg", "FedProx", "FedSAM", "Scaffold", "FedDyn"],
)
def test_engine_equals_a_loop_over_clients(method, oracle):
    q = quadratics()
    found = run_engine(method, q).theta[0].numpy()
    np.testing.assert_allclose(found, oracle(Loop(q)), atol=1e-11, rtol=0)


def test_fedprox_without_pull_is_fedavg():
    q = quadratics()
    assert torch.equal(run_engine(FedProx(LR, 0.0), q).theta, run_engine(FedAvg(LR), q).theta)


@pytest.mark.parametrize("method", [Scaffold(0.1), FedDyn(0.1, 1.0)], ids=["Scaffold", "FedDyn"])
@pytest.mark.parametrize("active", [5, 3])
def test_corrected_methods_reach_the_optimum(method, active):
    q = quadratics()
    theta = run_engine(method, q, rounds=500, steps=8, active=active).theta
    assert (theta - q.optimum()).norm() < 1e-7


@pytest.mark.parametrize("method", [FedAvg(0.1), FedProx(0.1, 1.0)], ids=["FedAvg", "FedProx"])
def test_uncorrected_methods_rest_elsewhere(method):
    q = quadratics()
    a = run_engine(method, q, rounds=200, steps=8, active=5).theta
    b = run_engine(method, q, rounds=201, steps=8, active=5).theta
    assert (a - b).norm() < 1e-10 and (a - q.optimum()).norm() > 0.05


def test_fedavg_rests_where_theory_says():
    q = quadratics()
    W = torch.eye(4) - torch.linalg.matrix_power(torch.eye(4) - 0.1 * q.A[0], 8)
    own = torch.linalg.solve(q.A[0], q.b[0])
    rest = torch.linalg.solve(W.sum(0), (W @ own[..., None]).sum(0)[:, 0])
    found = run_engine(FedAvg(0.1), q, rounds=200, steps=8, active=5).theta[0]
    torch.testing.assert_close(found, rest, atol=1e-10, rtol=0)


def test_identical_clients_need_no_correction():
    q = quadratics()
    q = Quadratics(q.A[:, :1].expand(-1, 5, -1, -1), q.b[:, :1].expand(-1, 5, -1))
    theta = run_engine(FedAvg(0.1), q, rounds=300, steps=8, active=5).theta
    assert (theta - q.optimum()).norm() < 1e-8


def test_scaffold_controls_end_at_the_clients_gradients():
    q = quadratics()
    h = run_engine(Scaffold(0.1), q, rounds=500, steps=8, active=5)
    expected = (q.A @ q.optimum()[:, None, :, None])[..., 0] - q.b
    torch.testing.assert_close(h.client["c"], expected, atol=1e-7, rtol=0)
    assert h.server["c"].abs().max() < 1e-7


def test_ascend_takes_a_step_of_length_rho():
    x, g = torch.zeros(2, 3, 4), torch.randn(2, 3, 4)
    y = ascend(x, g, torch.tensor([0.1, 0.5])[:, None, None])
    torch.testing.assert_close(y.norm(dim=-1), torch.tensor([[0.1] * 3, [0.5] * 3]))
    assert torch.equal(ascend(x, torch.zeros_like(x), 0.1), x)
