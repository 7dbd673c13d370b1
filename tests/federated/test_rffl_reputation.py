"""RFFL: the server as a plain loop, its limits, its invariants; adversaries; FoolsGold."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr

from miniature.federated.baselines import FedAvg
from miniature.federated.engine import federate
from miniature.federated.objectives import Quadratics
from miniature.federated.participation import Bernoulli
from miniature.federated.rffl_reputation import (
    RFFL,
    CarryOver,
    FoolsGold,
    Sabotage,
    clip,
    fairness,
    largest,
)

LR, K, N, D = 0.03, 3, 6, 12
LAYERS = [7, 4, 1]
SEEDS = [0, 1]
SIZES = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], dtype=torch.float64)
SHARES = SIZES / SIZES.sum()
START = 2.0


def quadratics(noise=0.0, **options):
    return Quadratics.random(SEEDS, N, D, noise=noise, **options)


def solve(method, q, rounds=20, steps=K, **options):
    start = torch.full_like(q.b[:, 0], START)
    return federate(method, q, start, rounds=rounds, steps=steps, seeds=SEEDS, **options)


class Upside(Sabotage):
    """An adversary without randomness: sends minus three times its update."""

    def __init__(self, malicious):
        super().__init__(malicious, "free rider")

    def __call__(self, v, active, draw):
        return torch.where((active < self.malicious)[..., None], -3 * v, v)


def loop(A, b, rounds, alpha, gamma, kappa, liars, warmup=10):
    """The paper's algorithm on one problem, a participant at a time, with lists and NumPy."""
    short = lambda v: v * min(1.0, gamma / np.linalg.norm(v))  # noqa: E731
    n, d = b.shape
    w, theta = [np.full(d, START) for _ in range(n)], np.full(d, START)
    r, R, removed = np.zeros(n), set(range(n)), {}
    for t in range(rounds):
        sent = []
        for i in range(n):
            x = w[i].copy()
            for _ in range(K):
                x = x - LR * (A[i] @ x - b[i])
            change = x - w[i]
            w[i] = w[i] + short(change)
            sent.append(short(-3 * change if i < liars else change))
        weight = SHARES.numpy() if t == 0 else r
        total = sum(p * v for p, v in zip(weight, sent))
        cos = [v @ total / np.linalg.norm(v) / np.linalg.norm(total) for v in sent]
        r = np.array([alpha * r[i] + (1 - alpha) * cos[i] if i in R else 0.0 for i in range(n)])
        r = r / r.sum()
        if t >= warmup:
            beta = kappa / len(R)
            for i in [i for i in R if r[i] < beta]:
                r[i] = 0
                R.remove(i)
                removed[i] = t
            r = r / r.sum()
        for i in range(n):
            share, at = max(0, r[i] / r.max()), 0
            for size in LAYERS:
                part = total[at : at + size]
                for j in sorted(range(size), key=lambda j: -abs(part[j]))[: _ceil(share * size)]:
                    w[i][at + j] += part[j]
                at += size
        theta = theta + total
    return np.array(w), theta, r, R, removed


def _ceil(v):
    return int(np.ceil(v))


@pytest.mark.parametrize("liars", [0, 2])
@pytest.mark.parametrize("alpha, gamma, kappa", [(0.95, 0.5, 1 / 3), (0.6, 0.1, 0.8)])
def test_engine_equals_a_loop_over_participants(alpha, gamma, kappa, liars):
    q = quadratics()
    method = RFFL(LR, alpha, gamma, kappa, layers=LAYERS, shares=SHARES)
    h = solve(method, q, attack=Upside(liars))
    for s in range(len(SEEDS)):
        w, theta, r, R, removed = loop(
            q.A[s].numpy(), q.b[s].numpy(), 20, alpha, gamma, kappa, liars
        )
        np.testing.assert_allclose(h.client["w"][s], w, atol=1e-11, rtol=0)
        np.testing.assert_allclose(h.theta[s], theta, atol=1e-11, rtol=0)
        np.testing.assert_allclose(h.server["r"][s], r, atol=1e-11, rtol=0)
        assert set(torch.nonzero(h.server["R"][s]).flatten().tolist()) == R
        assert set(range(liars)) <= set(removed)


def test_full_quotas_and_data_weights_are_fedavg_with_carry_over():
    class Full(RFFL):
        """RFFL that judges nobody: r are the data weights, all quotas are 1."""

        def weights(self, delta, c):
            return CarryOver.weights(self, delta, c)

        def reward(self, delta, total, c):
            return largest(total, torch.ones_like(delta[..., 0]), self.layers)

    q = quadratics(noise=0.3)
    ours = solve(Full(LR, gamma=torch.inf, layers=LAYERS, shares=SHARES), q)
    x = torch.full_like(q.b, START)  # local steps, then everybody adds the weighted mean change
    for t in range(20):
        y = x
        for batch in q.batches(torch.arange(N).expand(2, N), K, SEEDS, t):
            y = y - LR * q.grad(y, None, batch)
        x = y + torch.einsum("c,scd->sd", SHARES, y - x)[:, None]
    torch.testing.assert_close(ours.client["w"], x, atol=1e-12, rtol=0)
    theirs = solve(CarryOver(LR, gamma=torch.inf, shares=SHARES), q)
    assert torch.equal(ours.client["w"], theirs.client["w"])


def test_without_rewards_everybody_trains_alone():
    class Alone(CarryOver):
        def reward(self, delta, total, c):
            return torch.zeros_like(delta)

    q = quadratics()
    h = solve(Alone(LR, gamma=torch.inf), q, rounds=800)
    own = torch.linalg.solve(q.A, q.b)
    torch.testing.assert_close(h.client["w"], own, atol=1e-8, rtol=0)


def test_reputations_sum_to_one_on_the_reputable_set_every_round():
    seen = []

    class Watched(RFFL):
        def judge(self, delta, total, c):
            super().judge(delta, total, c)
            seen.append((c.t, c.server["r"], c.server["R"]))

    solve(Watched(LR), quadratics(), attack=Upside(2))
    assert len(seen) == 20
    for t, r, R in seen:
        torch.testing.assert_close(r.sum(1), torch.ones(2, dtype=r.dtype), atol=1e-12, rtol=0)
        assert (r[~R] == 0).all() and (R.all() or t >= 10)
    assert not R[:, :2].any()


def test_the_top_participant_gets_all_and_quotas_count_entries_per_layer():
    seen = []

    class Watched(RFFL):
        def reward(self, delta, total, c):
            reward = super().reward(delta, total, c)
            seen.append((c.server["r"], total, reward))
            return reward

    solve(Watched(LR, layers=LAYERS), quadratics(), attack=Upside(1))
    for r, total, reward in seen:
        q = (r / r.max(1, keepdim=True).values).clamp(min=0)
        for part, size in zip(reward.split(LAYERS, -1), LAYERS):
            assert ((part != 0).sum(-1) == (q * size).ceil()).all()
        best = r.argmax(1)
        assert torch.equal(reward[[0, 1], best], total)


def test_largest_keeps_the_top_of_every_layer():
    v = torch.tensor([[3.0, -5.0, 1.0, 0.5, -0.2, 0.1]])
    share = torch.tensor([[1.0, 0.5, 0.01, 0.0]])
    got = largest(v, share, [3, 3])[0]
    assert torch.equal(got[0], v[0])
    assert got[1].tolist() == pytest.approx([3, -5, 0, 0.5, -0.2, 0])
    assert got[2].tolist() == [0, -5, 0, 0.5, 0, 0]
    assert (got[3] == 0).all()
    assert (largest(torch.ones(1, 9), torch.tensor([[0.5]])) != 0).sum() == 5  # ties: exactly ceil


def test_cosines_are_those_of_the_clipped_uploads():
    # With alpha = 0 and no removal the reputations are the normalized cosines of the round.
    sent = []

    class Watched(RFFL):
        def judge(self, delta, total, c):
            sent.append((delta, total))
            super().judge(delta, total, c)

    h = solve(Watched(LR, alpha=0.0, threshold=0.0, gamma=0.2), quadratics(), rounds=5)
    delta, total = sent[-1]
    assert delta.norm(dim=-1).max() < 0.2 + 1e-12
    phi = torch.nn.functional.cosine_similarity(delta, total[:, None], dim=-1)
    torch.testing.assert_close(h.server["r"], phi / phi.sum(1, keepdim=True), atol=1e-12, rtol=0)


def test_absent_participants_keep_model_and_reputation():
    class Watched(RFFL):
        def judge(self, delta, total, c):
            before = c.server["r"]
            super().judge(delta, total, c)
            absent = torch.ones_like(c.server["R"]).scatter(1, c.active, ~c.present)
            if c.t < self.warmup:  # up to the normalization
                old, new = before * absent, c.server["r"] * absent
                cross = old[:, :, None] * new[:, None] - old[:, None] * new[:, :, None]
                assert cross.abs().max() < 1e-12

    h = solve(Watched(LR), quadratics(), active=Bernoulli([0.5] * N))
    assert h.client["w"].isfinite().all() and h.server["r"].isfinite().all()
    sets = []

    class Strict(RFFL):
        def judge(self, delta, total, c):
            before = c.server["R"]
            super().judge(delta, total, c)
            sets.append(c.server["R"])
            here = torch.zeros_like(before).scatter(1, c.active, c.present)
            assert not (before & ~sets[-1] & ~here).any()  # nobody is removed while away

    solve(Strict(LR, threshold=0.9), quadratics(), rounds=30, active=Bernoulli([0.5] * N))
    assert not sets[-1].all() and sets[-1].any(1).all()
    assert all((new <= old).all() for old, new in pairwise(sets))  # nobody comes back
    h = solve(CarryOver(LR, torch.inf, SHARES), quadratics(), rounds=1, active=2)
    total = h.theta - START
    delta = (h.client["w"] - START - total[:, None]) * ~h.client["new"]
    torch.testing.assert_close(total, torch.einsum("c,scd->sd", SHARES, delta))
    once = solve(RFFL(LR), quadratics(), rounds=1, active=2).client
    assert (once["new"].sum(1) == N - 2).all()
    assert torch.equal(once["new"][..., 0], (once["w"] == 0).all(-1))


def test_a_free_rider_without_weight_has_a_cosine_of_one_over_root_d():
    d = 400
    q = Quadratics.random(SEEDS, N, d)
    phis = []

    class Watched(RFFL):
        def judge(self, delta, total, c):
            if c.t > 10:
                phis.append(torch.cosine_similarity(delta, total[:, None], dim=-1)[:, :3])
            super().judge(delta, total, c)

    h = federate(
        Watched(LR),
        q,
        torch.full_like(q.b[:, 0], START),
        rounds=40,
        steps=K,
        seeds=SEEDS,
        attack=Sabotage(3, "free rider"),
    )
    assert not h.server["R"][:, :3].any() and h.server["R"][:, 3:].all()
    assert torch.stack(phis).std() * d**0.5 == pytest.approx(1, abs=0.2)


def test_adversaries_send_what_they_say():
    g = torch.Generator().manual_seed(0)

    class Draw:
        def uniform(self, like):
            return torch.rand(like.shape, generator=g, dtype=like.dtype)

    v = torch.randn(5, 3, 5000, generator=g, dtype=torch.float64)
    active = torch.tensor([[0, 1, 2]] * 5)
    out = Sabotage(2, Sabotage.KINDS)(v, active, Draw())
    assert torch.equal(out[:, 2], v[:, 2])
    free, sign, scale, value, same = out[:, 0]
    assert torch.equal(out[4, 1], same) and not torch.equal(out[0, 1], free)
    few = Sabotage([2, 1, 0, 3, 2], Sabotage.KINDS)(v, active, Draw())
    assert ((few != v).any(-1).sum(1) == torch.tensor([2, 1, 0, 3, 2])).all()
    assert (
        free.abs().max() <= 1
        and free.mean().abs() < 0.05
        and free.var() == pytest.approx(1 / 3, abs=0.03)
    )
    assert torch.equal(sign.abs(), v[1, 0].abs())
    assert (sign == v[1, 0]).double().mean() == pytest.approx(0.5, abs=0.03)
    ratio = scale / v[2, 0]
    assert ratio.abs().max() <= 100 and ratio.std() == pytest.approx(100 / 3**0.5, rel=0.05)
    inverted = value != v[3, 0]
    assert inverted.double().mean() == pytest.approx(0.5, abs=0.03)
    assert ((value * v[3, 0])[inverted] - 1).abs().max() < 1e-5
    for i, kind in enumerate(Sabotage.KINDS):  # one kind for all runs is that kind in each
        g.manual_seed(1)
        mixed = Sabotage(2, Sabotage.KINDS)(v, active, Draw())[i]
        g.manual_seed(1)
        assert torch.equal(mixed, Sabotage(2, kind)(v, active, Draw())[i])


def test_foolsgold_silences_twins_and_equals_fedavg_on_strangers():
    class Twins:
        def __call__(self, v, active, draw):
            return torch.where((active < 2)[..., None], v[:, :1], v)

    q = quadratics()
    h = solve(FoolsGold(LR), q, rounds=1, attack=Twins())
    x = torch.full_like(q.b, START)
    y = x
    for _ in range(K):
        y = y - LR * ((q.A @ y[..., None])[..., 0] - q.b)
    sent = (y - x).numpy()
    sent[:, 1] = sent[:, 0]
    for s in range(2):
        np.testing.assert_allclose(h.theta[s], START + gold(sent[s]), atol=1e-10, rtol=0)
    # Who resembles one of the twins by 0.6 is pardoned: its weight is 1, not 0.1.
    fixed = torch.eye(N, D, dtype=torch.float64)
    fixed[1], fixed[2, :2] = fixed[0], torch.tensor([0.6, 0.8])
    h = solve(FoolsGold(LR), q, rounds=1, attack=lambda v, active, draw: fixed.expand_as(v))
    for s in range(2):
        np.testing.assert_allclose(h.theta[s], START + gold(fixed.numpy()), atol=1e-10, rtol=0)
    # The second round judges by the sum of both rounds' updates.
    steps = []

    class Watched(FoolsGold):
        def server_step(self, theta, message, c):
            new = super().server_step(theta, message, c)
            steps.append((message["delta"].numpy(), (new - theta).numpy()))
            return new

    lies = iter([5 * fixed, torch.eye(N, D, dtype=torch.float64)])  # twins, then strangers
    attack = lambda v, active, draw: next(lies).expand_as(v)  # noqa: E731
    solve(Watched(LR, eta=0.5), q, rounds=2, attack=attack)
    for s in range(2):
        past, sent = steps[0][0][s], steps[1][0][s]
        np.testing.assert_allclose(steps[1][1][s], 0.5 * gold(sent, past + sent), atol=1e-10)
    # Orthogonal updates resemble nobody's: all weights are equal.
    b = torch.diag_embed(torch.ones(2, 5, dtype=torch.float64))
    flat = Quadratics(torch.zeros(2, 5, 5, 5, dtype=torch.float64), b)
    start = torch.zeros(2, 5, dtype=torch.float64)
    one, two = (
        federate(m, flat, start, rounds=3, steps=1, seeds=SEEDS)
        for m in (FoolsGold(LR), FedAvg(LR))
    )
    torch.testing.assert_close(one.theta, two.theta, atol=1e-12, rtol=0)


def gold(sent, history=None):
    """FoolsGold's step with loops; `sent` [n, d], and the sum of all updates up to now."""
    n, past = len(sent), sent if history is None else history
    cos = lambda a, b: a @ b / np.linalg.norm(a) / np.linalg.norm(b)  # noqa: E731
    s = np.array(
        [[cos(a, b) if i != j else 0 for j, b in enumerate(past)] for i, a in enumerate(past)]
    )
    v = np.maximum(s.max(1), 1e-10)
    for i in range(n):
        for j in range(n):
            if v[j] > v[i]:
                s[i, j] *= v[i] / v[j]
    a = np.clip(1 - np.maximum(s.max(1), 0), 0, 1)
    a = np.clip(a / a.max(), 1e-5, 1 - 1e-5)
    weight = np.clip(np.log(a / (1 - a)) + 0.5, 0, 1)
    return weight @ sent / weight.sum()


def test_fairness_is_pearsons_correlation():
    g = torch.Generator().manual_seed(0)
    a, b = torch.rand(2, 5, 10, generator=g)
    expected = [pearsonr(x, y).statistic for x, y in zip(a.double(), b.double())]
    np.testing.assert_allclose(fairness(a, b), expected, atol=1e-12)
    assert (fairness(a, torch.full_like(b, 0.93)) == 0).all()


def test_clip_shortens_only_what_is_too_long():
    v = torch.tensor([[[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]]])
    assert torch.equal(clip(v, torch.inf), v)
    torch.testing.assert_close(clip(v, 1.0)[0].norm(dim=-1), torch.tensor([1.0, 0.5, 0.0]))
    torch.testing.assert_close(clip(v.repeat(2, 1, 1), [1.0, 9.0])[1], v[0])


def test_hyperparameters_may_differ_between_runs():
    q = quadratics()
    together = solve(RFFL([0.03, 0.01], [0.5, 0.9], [0.1, 0.5], [0.9, 0.2]), q, attack=Upside(1))
    for i, values in enumerate([(0.03, 0.5, 0.1, 0.9), (0.01, 0.9, 0.5, 0.2)]):
        alone = solve(RFFL(*values), q, attack=Upside(1))
        for name in ("r", "R"):
            torch.testing.assert_close(together.server[name][i], alone.server[name][i])
        torch.testing.assert_close(together.client["w"][i], alone.client["w"][i])


@pytest.mark.parametrize("value", [1.0, -0.1, [0.5, 1.5]])
@pytest.mark.parametrize("name", ["alpha", "threshold"])
def test_weights_are_checked(name, value):
    with pytest.raises(ValueError, match=rf"{name} must lie in \[0, 1\)"):
        RFFL(LR, **{name: value})


def test_other_arguments_are_checked():
    with pytest.raises(ValueError, match="gamma must be positive, got 0"):
        RFFL(LR, gamma=0.0)
    with pytest.raises(ValueError, match=r"layers \[3, 3\] do not add up to 12 parameters"):
        solve(RFFL(LR, layers=[3, 3]), quadratics())
    with pytest.raises(ValueError, match="unknown attack 'sleep'"):
        Sabotage(1, ["free rider", "sleep"])
    with pytest.raises(ValueError, match="malicious must not be negative, got -1"):
        Sabotage(-1, "free rider")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_type_and_device_are_kept(dtype, device):
    q = Quadratics.random(SEEDS, N, D, device=device, dtype=dtype)
    for method in (RFFL(LR, layers=LAYERS, shares=SHARES), CarryOver(LR), FoolsGold(LR)):
        h = solve(method, q, attack=Sabotage(2, "value inverting"))
        state = h.client["w" if "w" in h.client else "H"]
        for v in (h.theta, state):
            assert v.dtype == dtype and v.device.type == device and v.isfinite().all()
