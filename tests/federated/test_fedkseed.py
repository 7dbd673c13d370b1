"""FedKSeed: a loop over clients, the replay from K scalars, the floor, the estimator."""

import math

import numpy as np
import pytest
import torch

from miniature.federated.engine import federate
from miniature.federated.fedkseed import FedKSeed, FedKSeedPro, FedMeZO, LoRA, Prompt, two_sided
from miniature.federated.objectives import Quadratics
from miniature.federated.participation import Bernoulli
from miniature.models import MLP

LR, K, N, ACTIVE, D, T, EPS = 0.01, 7, 6, 3, 5, 4, 0.3
SEEDS = [0, 1]


def quadratics(**options):
    return Quadratics.random(SEEDS, N, D, **options)


def solve(method, q, rounds=8, steps=T, **options):
    start = 0.1 * torch.ones_like(q.b[:, 0])
    return federate(method, q, start, rounds=rounds, steps=steps, seeds=SEEDS, **options)


def normal(shape, g):
    generator = torch.Generator().manual_seed(int(g.integers(2**62)))
    return torch.randn(shape, generator=generator, dtype=torch.float64).numpy()


def loop(A, b, seed, rounds, pool, clip=None, steps=(T,) * N):
    """The paper on one problem, a client and a step at a time; `clip` is for FedKSeed-Pro.

    With pool = None every step has a direction of its own.
    """
    draw = np.random.default_rng([seed, 0])
    w = 0.1 * np.ones(D)
    if pool:
        seeds = np.random.default_rng([seed, 4])
        Z = [normal(D, seeds) for _ in range(pool)]
        a, P, history = np.zeros(pool), np.ones(pool) / pool, [[0.0] for _ in range(pool)]
    for t in range(rounds):
        sampled = draw.permutation(N)[:ACTIVE]
        moved, change = [], []
        table = np.random.default_rng([seed, 3, t]).random((max(steps), N))
        for i in sampled:
            x, own, stream = w.copy(), np.zeros(pool or 0), np.random.default_rng([seed, 3, t, i])
            for step in range(steps[i]):
                if pool:
                    k = np.searchsorted(np.cumsum(P) / np.cumsum(P)[-1], table[step, i])
                    z = Z[k]
                else:
                    z = normal(D, stream)
                up, down = ((v @ A[i] @ v / 2 - b[i] @ v) for v in (x + EPS * z, x - EPS * z))
                g = (up - down) / (2 * EPS)
                x = x - LR * g * z
                if pool:
                    own[k] += g
                    history[k].append(min(abs(g), clip or np.inf))
            moved.append(x)
            change.append(own)
        w = np.mean(moved, axis=0)
        if pool:
            a = a + np.mean(change, axis=0)
        if clip:
            G = np.array([np.mean(h) for h in history])
            P = np.exp((G - G.min()) / (G.max() - G.min() + 1e-10))
            P = P / P.sum()
    return (w, a, P) if pool else w


UNEQUAL = pytest.mark.parametrize("steps", [[T] * N, [1, 2, 3, 4, 5, 6]])


@UNEQUAL
@pytest.mark.parametrize("clip", [None, 1000.0, 0.5])
def test_engine_equals_a_loop_over_clients(clip, steps):
    q = quadratics()
    kind = FedKSeed(LR, K, EPS, SEEDS) if clip is None else FedKSeedPro(LR, K, EPS, SEEDS, clip)
    h = solve(kind, q, active=ACTIVE, steps=steps)
    for i, seed in enumerate(SEEDS):
        w, a, P = loop(q.A[i].numpy(), q.b[i].numpy(), seed, 8, K, clip, steps)
        np.testing.assert_allclose(h.theta[i], w, atol=1e-11, rtol=0)
        np.testing.assert_allclose(h.server["a"][i], a, atol=1e-10, rtol=0)
        np.testing.assert_allclose(h.server["P"][i], P, atol=1e-10, rtol=0)


@UNEQUAL
def test_an_unlimited_pool_equals_a_loop_over_clients(steps):
    q = quadratics()
    h = solve(FedMeZO(LR, EPS, SEEDS), q, active=ACTIVE, steps=steps)
    for i, seed in enumerate(SEEDS):
        w = loop(q.A[i].numpy(), q.b[i].numpy(), seed, 8, None, steps=steps)
        np.testing.assert_allclose(h.theta[i], w, atol=1e-11, rtol=0)


class Watched(FedKSeed):
    """Remembers the clients' average model after each round, and the accumulator."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.averages, self.accumulators = [], []

    def message(self, x, c):
        here = c.present[..., None].to(x.dtype)
        average = (x * here).sum(1) / here.sum(1).clamp(min=1)
        self.averages.append(torch.where(here.sum(1) > 0, average, c.x0[:, 0]))
        return super().message(x, c)

    def server_step(self, theta, message, c):
        theta = super().server_step(theta, message, c)
        self.accumulators.append(c.server["a"])
        return theta


@pytest.mark.parametrize("dtype, tol", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("who", [None, ACTIVE, Bernoulli([0.3] * N)])
@UNEQUAL
def test_the_average_of_the_clients_is_rebuilt_from_k_scalars(who, steps, dtype, tol):
    q = quadratics(dtype=dtype)
    method = Watched(LR, K, seed=SEEDS)
    h = solve(method, q, rounds=30, steps=steps, active=who)
    start = 0.1 * torch.ones(2, D, dtype=dtype)
    # A newcomer has the seeds and w_0: it makes the directions itself.
    directions = FedKSeed(LR, K, seed=SEEDS).server_state(torch.zeros_like(start))
    for average, a in zip(method.averages, method.accumulators):
        rebuilt = method.rebuild(start, a, directions)
        torch.testing.assert_close(rebuilt, average, atol=tol, rtol=0)
    torch.testing.assert_close(h.theta, average, atol=tol, rtol=0)


def test_the_model_stays_in_the_span_of_the_pool():
    h = solve(FedKSeed(LR, 2, seed=SEEDS), quadratics(), rounds=30)
    moved = h.theta - 0.1
    for z, v in zip(h.server["Z"], moved):
        residual = v - z.T @ torch.linalg.lstsq(z.T, v[:, None]).solution[:, 0]
        assert residual.norm() < 1e-12 < v.norm()


def test_the_floor_is_the_best_point_of_that_span():
    q = quadratics()
    same = Quadratics(q.A[:, :1].expand(-1, N, -1, -1), q.b[:, :1].expand(-1, N, -1))
    h = solve(FedKSeed(0.05, 3, seed=SEEDS), same, rounds=600)
    for i, z in enumerate(h.server["Z"]):
        root = torch.linalg.cholesky(q.A[i, 0]).T
        gap = root @ (torch.linalg.solve(q.A[i, 0], q.b[i, 0]) - 0.1)
        best = torch.linalg.lstsq(root @ z.T, gap[:, None]).solution[:, 0]
        floor = (gap - root @ z.T @ best).square().sum() / 2
        torch.testing.assert_close(same.excess(h.theta)[i], floor, rtol=1e-6, atol=0)


@pytest.mark.parametrize("eps", [1e-3, 1.0, 100.0])
def test_the_difference_is_exact_on_quadratics_for_any_eps(eps):
    q = quadratics()
    everyone = torch.arange(N).expand(2, N)
    (batch,) = q.batches(everyone, 1, SEEDS, 0)
    x, z = torch.randn(2, 2, N, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    g = two_sided(lambda v: q.loss(v, everyone, batch), x, z, eps)
    slope = (q.grad(x, everyone, batch) * z).sum(-1, keepdim=True)
    torch.testing.assert_close(g, slope, atol=1e-9 * max(1, eps), rtol=0)


def test_the_difference_tends_to_the_derivative_as_eps_squared():
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(1, 1, 40, generator=generator, dtype=torch.float64, requires_grad=True)
    z, x = torch.randn(2, 1, 1, 40, generator=generator, dtype=torch.float64)

    def loss(v):
        return torch.log1p((v * x).sum(-1).exp())

    (gradient,) = torch.autograd.grad(loss(w).sum(), w)
    exact = (gradient * z).sum()
    errors = [(two_sided(loss, w.detach(), z, eps) - exact).abs().item() for eps in (0.02, 0.01)]
    assert errors[1] < 1e-3 and errors[0] / errors[1] == pytest.approx(4, rel=0.05)


def test_the_estimator_is_unbiased_with_the_known_error():
    d, n = 20, 4000
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(d, generator=generator, dtype=torch.float64)
    z = torch.randn(50, n, d, generator=generator, dtype=torch.float64)
    mean = ((z @ gradient)[..., None] * z).mean(1)
    error = (mean - gradient).square().sum(-1).mean() / gradient.square().sum()
    assert error.item() == pytest.approx((d + 1) / n, rel=0.15)


def test_a_message_has_k_numbers_whatever_the_model():
    for d in (5, 50):
        q = Quadratics.random(SEEDS, N, d)
        assert solve(FedKSeed(LR, 3, seed=SEEDS), q).upload == 3 * 8
        assert solve(FedKSeedPro(LR, 3, seed=SEEDS), q).upload == 3 * 3 * 8
        assert solve(FedMeZO(LR, seed=SEEDS), q).upload == T * 8
    q = Quadratics.random(SEEDS, N, D, dtype=torch.float32)
    assert solve(FedKSeed(LR, 4096, seed=SEEDS), q).upload == 16_384 < 18_000


@pytest.mark.parametrize("kind", [FedKSeed, FedKSeedPro])
def test_pools_of_different_sizes_run_together(kind):
    together = solve(kind([0.01, 0.02], [3, K], seed=SEEDS), quadratics(), active=ACTIVE)
    assert (together.server["a"][0, 3:] == 0).all() and (together.server["P"][0, 3:] == 0).all()
    for i, (lr, pool) in enumerate([(0.01, 3), (0.02, K)]):
        # A shorter pool is the start of a longer one: the same seeds, fewer of them.
        alone = solve(kind(lr, pool, seed=SEEDS), quadratics(), active=ACTIVE)
        torch.testing.assert_close(together.theta[i], alone.theta[i], atol=1e-12, rtol=0)
        torch.testing.assert_close(together.server["P"][i, :pool], alone.server["P"][i])


def test_runs_with_equal_seeds_share_a_pool():
    one, two = (FedKSeed(LR, K, seed=s).server_state(torch.zeros(3, D)) for s in (5, [5, 6, 5]))
    assert len(one["Z"]) == 1 and len(two["Z"]) == 2 and two["which"].tolist() == [0, 1, 0]
    assert torch.equal(one["Z"][0], two["Z"][0]) and not torch.equal(two["Z"][0], two["Z"][1])


def test_pro_prefers_large_slopes_by_a_factor_of_at_most_e():
    start = FedKSeedPro(LR, K, seed=SEEDS).server_state(torch.zeros(2, D))
    assert (start["P"] == 1 / K).all()
    server = solve(FedKSeedPro(LR, K, seed=SEEDS), quadratics(), rounds=20).server
    P, G = server["P"], server["size"] / server["count"]
    torch.testing.assert_close(P.sum(1), torch.ones(2, dtype=P.dtype))
    assert (P.argsort(1) == G.argsort(1)).all()
    torch.testing.assert_close(P.amax(1) / P.amin(1), torch.full((2,), math.e, dtype=P.dtype))


@pytest.mark.parametrize("kind", [FedKSeed, FedKSeedPro, FedMeZO])
def test_a_run_that_diverges_leaves_the_others_alone(kind):
    both = solve(kind([1e200, LR], seed=SEEDS), quadratics(), active=ACTIVE)
    alone = solve(kind(LR, seed=SEEDS), quadratics(), active=ACTIVE)
    assert not both.theta[0].isfinite().all()
    torch.testing.assert_close(both.theta[1], alone.theta[1], atol=1e-12, rtol=0)


def test_adapters_start_as_the_network_and_count_their_numbers():
    torch.manual_seed(0)
    base, x = MLP([6, 4, 3]), torch.randn(2, 10, 6)
    for wrapped, size in ((LoRA(base, 2), 2 * (6 + 4) + 2 * (4 + 3)), (Prompt(base), 6)):
        torch.testing.assert_close(wrapped(x), base(x))
        assert sum(p.numel() for p in wrapped.parameters() if p.requires_grad) == size
    lora = LoRA(base, 2)
    assert LoRA(MLP([100, 3]), 100).A[0].std().item() == pytest.approx(0.1, rel=0.05)
    torch.nn.init.normal_(lora.B[0])
    merged = MLP([6, 4, 3])
    merged.load_state_dict(base.state_dict())
    with torch.no_grad():
        merged[0].weight += lora.B[0] @ lora.A[0]
    torch.testing.assert_close(lora(x), merged(x))


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(pool=0), "pool must be at least 1, got 0"),
        (dict(pool=[3, 0]), "pool must be at least 1"),
        (dict(eps=0.0), "eps must be positive, got 0.0"),
    ],
)
@pytest.mark.parametrize("kind", [FedKSeed, FedKSeedPro])
def test_settings_are_checked(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(LR, **options)


def test_one_seed_a_run_and_a_constant_rate():
    with pytest.raises(ValueError, match="3 pool seeds for 2 runs"):
        solve(FedKSeed(LR, K, seed=[1, 2, 3]), quadratics())
    with pytest.raises(ValueError, match="constant learning rate"):
        solve(FedKSeed(LR, K), quadratics(), decay=0.9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_type_and_device_are_kept(dtype, device):
    q = Quadratics.random(SEEDS, N, D, device=device, dtype=dtype)
    for method in (FedKSeed(LR, K, seed=SEEDS), FedKSeedPro(LR, K), FedMeZO(LR, seed=SEEDS)):
        h = solve(method, q, rounds=20, active=ACTIVE)
        assert h.theta.dtype == dtype and h.theta.device.type == device
        assert h.theta.isfinite().all()
        for v in (v for name, v in h.server.items() if name != "which"):
            assert v.dtype == dtype and v.device.type == device
