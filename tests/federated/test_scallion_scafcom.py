"""SCALLION and SCAFCOM: SCAFFOLD and EF21-SGDM as loops, states in step, fixed points."""

import numpy as np
import pytest
import torch

from miniature.federated.baselines import FedAvg, Scaffold
from miniature.federated.compression import Dither, Identity, RandK, TopK
from miniature.federated.engine import federate
from miniature.federated.objectives import Quadratics
from miniature.federated.participation import Bernoulli, Trace
from miniature.federated.scallion_scafcom import FedCOMGATE, FedEF, FedPAQ, Scafcom, Scallion

LR, K, N, ACTIVE = 0.03, 5, 6, 3
SEEDS = [0, 1]


def quadratics(noise=0.0):
    return Quadratics.random(SEEDS, N, 5, noise=noise)


def solve(method, q, rounds=8, steps=K, **options):
    start = torch.zeros_like(q.b[:, 0])
    return federate(method, q, start, rounds=rounds, steps=steps, seeds=SEEDS, **options)


def loop(A, b, seed, rounds, alpha, beta, eta, compress):
    """The paper's algorithms on one problem, a client at a time; beta = None is SCALLION."""
    n, d = b.shape
    draw = np.random.default_rng([seed, 0])
    x, c = np.zeros(d), np.zeros(d)
    ci, vi = np.zeros((n, d)), np.zeros((n, d))
    for _ in range(rounds):
        sampled = draw.permutation(n)[:ACTIVE]
        sent = []
        for i in sampled:
            y, seen = x.copy(), []
            for _ in range(K):
                g = A[i] @ y - b[i]
                step = g if beta is None else (1 - beta) * vi[i] + beta * g
                y = y - LR * (step - ci[i] + c)
                seen.append(g)
            if beta is None:
                delta = alpha * (np.mean(seen, axis=0) - ci[i])
            else:
                vi[i] = (1 - beta) * vi[i] + beta * np.mean(seen, axis=0)
                delta = vi[i] - ci[i]
            sent.append(compress(delta))
            ci[i] = ci[i] + sent[-1]
        x = x - eta * LR * K * (c + np.mean(sent, axis=0))
        c = c + np.sum(sent, axis=0) / n
    return x, c, ci, vi


def top(share):
    def compress(v):
        out, at = np.zeros_like(v), np.argsort(-np.abs(v))[: TopK(share).k(len(v))]
        out[at] = v[at]
        return out

    return compress


@pytest.mark.parametrize("eta", [1.0, 0.6])
@pytest.mark.parametrize("share", [0.4, 1.0])
@pytest.mark.parametrize("beta", [None, 0.3])
def test_engine_equals_a_loop_over_clients(beta, share, eta):
    q = quadratics()
    method = Scallion(LR, 0.5, eta) if beta is None else Scafcom(LR, beta, eta)
    h = solve(method, q, compress=TopK(share), active=ACTIVE)
    for i, seed in enumerate(SEEDS):
        x, c, ci, vi = loop(q.A[i].numpy(), q.b[i].numpy(), seed, 8, 0.5, beta, eta, top(share))
        np.testing.assert_allclose(h.theta[i], x, atol=1e-11, rtol=0)
        np.testing.assert_allclose(h.server["c"][i], c, atol=1e-11, rtol=0)
        np.testing.assert_allclose(h.client["c"][i], ci, atol=1e-11, rtol=0)
        if beta:
            np.testing.assert_allclose(h.client["v"][i], vi, atol=1e-11, rtol=0)


@pytest.mark.parametrize("active", [N, ACTIVE])
@pytest.mark.parametrize(
    "method", [Scallion(LR, 1.0), Scafcom(LR, 1.0)], ids=["SCALLION", "SCAFCOM"]
)
def test_uncompressed_it_is_scaffold_with_half_the_upload(method, active):
    q = quadratics(noise=0.5)
    one, two = (solve(m, q, rounds=20, active=active) for m in (method, Scaffold(LR)))
    torch.testing.assert_close(one.theta, two.theta, atol=1e-12, rtol=0)
    torch.testing.assert_close(one.client["c"], two.client["c"], atol=1e-10, rtol=0)
    assert 2 * one.upload == two.upload and (2 * one.up == two.up).all()
    assert (one.down == two.down).all()


def test_scafcom_with_one_step_and_everybody_is_ef21_sgdm():
    q, beta, compressor = quadratics(), 0.2, TopK(0.4)
    x, v, g = torch.zeros_like(q.b[:, 0]), torch.zeros_like(q.b), torch.zeros_like(q.b)
    for _ in range(60):
        v = (1 - beta) * v + beta * ((q.A @ x[:, None, :, None])[..., 0] - q.b)
        g = g + compressor(v - g, None)
        x = x - LR * g.mean(1)
    h = solve(Scafcom(LR, beta), q, rounds=60, steps=1, compress=compressor)
    torch.testing.assert_close(h.theta, x, atol=1e-12, rtol=0)
    torch.testing.assert_close(h.client["c"], g, atol=1e-12, rtol=0)
    torch.testing.assert_close(h.client["v"], v, atol=1e-12, rtol=0)


@pytest.mark.parametrize("who", [ACTIVE, Bernoulli([0.3] * N)], ids=["sampled", "random number"])
@pytest.mark.parametrize("compressor", [RandK(0.4), Dither(3), TopK(0.4)])
@pytest.mark.parametrize("method", [Scallion(LR), Scafcom(LR)], ids=["SCALLION", "SCAFCOM"])
def test_server_and_clients_stay_in_step(method, compressor, who):
    h = solve(method, quadratics(), rounds=30, active=who, compress=compressor)
    torch.testing.assert_close(h.server["c"], h.client["c"].mean(1), atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    "method, compressor",
    [
        (Scallion(LR, 0.3), RandK(0.4)),
        (Scallion(LR, 0.3), Dither(3)),
        (Scafcom(LR, 0.3), TopK(0.4)),
    ],
)
def test_there_is_no_floor(method, compressor):
    q = quadratics()
    h = solve(method, q, rounds=800, active=ACTIVE, compress=compressor)
    assert (h.theta - q.optimum()).norm(dim=1).max() < 1e-7
    gradients = (q.A @ q.optimum()[:, None, :, None])[..., 0] - q.b
    torch.testing.assert_close(h.client["c"], gradients, atol=1e-6, rtol=0)


@pytest.mark.parametrize("method, compressor", [(FedPAQ(LR), RandK(0.4)), (FedEF(LR), TopK(0.4))])
def test_rivals_have_a_floor(method, compressor):
    q = quadratics()
    distance = lambda x: (x - q.optimum()).norm(dim=1)  # noqa: E731
    h = solve(method, q, rounds=800, active=ACTIVE, compress=compressor, metric=distance)
    assert h.metric[:, -100:].mean() > 0.05


def test_rand_k_without_damping_diverges():
    q = quadratics()
    wild, tame = (
        solve(Scallion(LR, alpha), q, rounds=150, active=ACTIVE, compress=RandK(0.2)).theta
        for alpha in (1.0, 0.2)
    )
    assert (wild.norm(dim=1) > 1e3).all() and (tame.norm(dim=1) < 10).all()


@pytest.mark.parametrize("compressor", [RandK(0.2), Dither(2), Dither(4)])
def test_compressors_are_unbiased_with_a_bounded_error(compressor):
    generator = torch.Generator().manual_seed(0)

    class Draw:
        def uniform(self, like):
            return torch.rand(like.shape, generator=generator, dtype=like.dtype)

    v = torch.randn(1, 1, 50, generator=generator, dtype=torch.float64)
    many = compressor(v.expand(1, 20_000, 50).contiguous(), Draw())
    mean, spread = many.mean(1), many.std(1) / 20_000**0.5
    assert ((mean - v[0]).abs() / spread).max() < 4.5
    if isinstance(compressor, RandK):
        omega = 1 / compressor.share - 1
    else:
        omega = 50**0.5 / (2 ** (compressor.bits_per_entry - 1) - 1)  # QSGD's Lemma 3.1
    error = (many - v).square().sum(-1).mean() / v.square().sum()
    assert error < 1.02 * omega


@pytest.mark.parametrize("kind", [FedPAQ, FedEF])
def test_uncompressed_rivals_are_fedavg(kind):
    q = quadratics()
    a, b = (solve(m, q, active=ACTIVE).theta for m in (kind(LR), FedAvg(LR)))
    torch.testing.assert_close(a, b, atol=1e-13, rtol=0)


def test_error_feedback_loses_nothing():
    # What was sent so far and what is still held back is all that clients wanted to send.
    wanted, got = [], []

    class Tape(FedEF):
        def message(self, x, c):
            wanted.append(x - c.x0)
            message = super().message(x, c)
            got.append(message["delta"])
            return message

    h = solve(Tape(LR), quadratics(), compress=TopK(0.2))
    torch.testing.assert_close(h.client["e"], sum(wanted) - sum(got), atol=1e-12, rtol=0)


def test_fedcomgate_equals_a_loop_over_clients():
    q, compress = quadratics(), top(0.4)
    h = solve(FedCOMGATE(LR, 0.6), q, compress=TopK(0.4), active=ACTIVE)
    for run, seed in enumerate(SEEDS):
        A, b, draw = q.A[run].numpy(), q.b[run].numpy(), np.random.default_rng([seed, 0])
        x, d = np.zeros(5), np.zeros((N, 5))
        for _ in range(8):
            sampled = draw.permutation(N)[:ACTIVE]
            sent = []
            for i in sampled:
                y = x.copy()
                for _ in range(K):
                    y = y - LR * (A[i] @ y - b[i] - d[i])
                sent.append(compress((x - y) / LR))
            d[sampled] += (np.array(sent) - np.mean(sent, axis=0)) / K
            x = x - 0.6 * LR * np.mean(sent, axis=0)
        np.testing.assert_allclose(h.theta[run], x, atol=1e-12, rtol=0)
        np.testing.assert_allclose(h.client["d"][run], d, atol=1e-12, rtol=0)


def test_fedcomgate_reaches_the_optimum_while_compression_is_mild():
    q = quadratics()
    for compressor in (Identity(), Dither(8)):
        h = solve(FedCOMGATE(LR), q, rounds=600, compress=compressor)
        assert (h.theta - q.optimum()).norm(dim=1).max() < 1e-7
    assert h.client["d"].mean(1).abs().max() < 1e-9


def test_unequal_steps_count_by_their_mean_over_those_present():
    # One round from x = c = 0: x = -lr * (mean K) * (mean over clients of their mean gradients).
    q, steps = quadratics(), range(1, N + 1)
    present = np.array([[[1, 0, 1, 0, 0, 0]], [[0, 1, 1, 0, 1, 1]]], dtype=bool)
    h = solve(Scallion(LR, 1.0), q, rounds=1, steps=list(steps), active=Trace(present))
    for run, here in enumerate(present[:, 0]):
        gradients = []
        for i in np.flatnonzero(here):
            y = np.zeros(5)
            for _ in range(steps[i]):
                y = y - LR * (q.A[run, i].numpy() @ y - q.b[run, i].numpy())
            gradients.append(-y / (LR * steps[i]))
        move = -LR * np.mean([steps[i] for i in np.flatnonzero(here)]) * np.mean(gradients, axis=0)
        np.testing.assert_allclose(h.theta[run], move, atol=1e-13, rtol=0)


@pytest.mark.parametrize("kind", [Scallion, Scafcom])
def test_hyperparameters_may_differ_between_runs(kind):
    q = quadratics()
    together = solve(kind([0.03, 0.01], [0.5, 0.1], [1.0, 0.5]), q, active=ACTIVE).theta
    for i, values in enumerate([(0.03, 0.5, 1.0), (0.01, 0.1, 0.5)]):
        alone = solve(kind(*values), q, active=ACTIVE).theta
        torch.testing.assert_close(together[i], alone[i], atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind, name", [(Scallion, "alpha"), (Scafcom, "beta")])
@pytest.mark.parametrize("value", [0.0, 1.5, [0.5, -0.1]])
def test_weights_are_checked(kind, name, value):
    with pytest.raises(ValueError, match=rf"{name} must lie in \(0, 1\]"):
        kind(LR, value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_type_and_device_are_kept(dtype, device):
    q = Quadratics.random(SEEDS, N, 5, device=device, dtype=dtype)
    for method, compressor in ((Scallion(LR, 0.3), RandK(0.4)), (Scafcom(LR), TopK(0.4))):
        h = solve(method, q, rounds=20, active=ACTIVE, compress=compressor)
        assert h.theta.dtype == dtype and h.theta.device.type == device
        assert h.client["c"].dtype == dtype and h.theta.isfinite().all()
