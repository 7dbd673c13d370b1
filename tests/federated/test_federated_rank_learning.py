"""FRL: the vote as a Borda count, bounded influence by brute force, invariants, bits, attacks."""

import math
from itertools import permutations

import numpy as np
import pytest
import torch
from torch import nn

from miniature import data
from miniature.federated.engine import federate
from miniature.federated.federated_rank_learning import (
    FRL,
    Ballot,
    LocalMomentum,
    MinMax,
    ReversedRank,
    Supermask,
    ranks,
)
from miniature.federated.objectives import Quadratics
from miniature.federated.participation import Trace
from miniature.stack import Stack, class_loss

SEEDS = [0, 1]


def network():
    return nn.Sequential(nn.Linear(64, 12, bias=False), nn.ReLU(), nn.Linear(12, 10, bias=False))


def supermask(dtype=torch.float64, device="cpu", **options):
    d = data.digits()
    stack = Stack.init(network, SEEDS, dtype=dtype, device=device)
    parts = [data.dirichlet(d.y_train, 6, 1.0, s) for s in SEEDS]
    # Sums of signed constants times grey levels are often zero, at the kink of the ReLU.
    noise = 0.01 * torch.randn(d.x_train.shape, generator=torch.Generator().manual_seed(0))
    x, y = (d.x_train + noise).to(device, dtype), d.y_train.to(device)
    objective = Supermask(stack, x, y, parts, 8, SEEDS, **options)
    return stack.theta, objective


def borda(ballots, initial):
    """One layer's vote, plainly: lists of ids from worst to best in, new scores out."""
    n = len(initial)
    points = [0] * n
    for ballot in ballots:
        for place, edge in enumerate(ballot):
            points[edge] += place
    scores = np.empty(n)
    for place, edge in enumerate(sorted(range(n), key=lambda e: (points[e], e))):
        scores[edge] = sorted(initial)[place]
    return scores


def test_ranks_are_the_inverse_of_argsort_layer_by_layer():
    v = torch.randn(3, 4, 9, generator=torch.Generator().manual_seed(0))
    out = ranks(v, [5, 4])
    for part, got in zip(v.split([5, 4], -1), out.split([5, 4], -1)):
        assert torch.equal(got, part.argsort(-1).argsort(-1))
    ties = torch.tensor([2.0, -1.0, 2.0, 0.0, -1.0, -0.0, -1.0, 1e-30, -3.0])
    for dtype in (torch.float32, torch.float64):
        assert ranks(ties.to(dtype)).tolist() == [7, 1, 8, 4, 2, 5, 3, 6, 0]  # ties by index


def test_engine_equals_a_borda_count_over_plain_local_loops():
    rounds, K, lr, mu, layers = 5, 3, 0.3, 0.9, [3, 4]
    q = Quadratics.random(SEEDS, 6, 7)
    start = torch.randn(2, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    method = FRL(lr, start, layers, mu)
    h = federate(method, q, start, rounds=rounds, steps=K, seeds=SEEDS, active=4)
    for run, seed in enumerate(SEEDS):
        s, draw = start[run].numpy().copy(), np.random.default_rng([seed, 0])
        initial = np.split(s.copy(), [3])
        for _ in range(rounds):
            ballots = []
            for i in draw.permutation(6)[:4]:
                x, v = s.copy(), np.zeros(7)
                for k in range(K):
                    v = mu * v + q.A[run, i].numpy() @ x - q.b[run, i].numpy()
                    x = x - lr * (1 + math.cos(math.pi * k / K)) / 2 * v
                ballots.append([np.argsort(p).tolist() for p in np.split(x, [3])])
            s = np.concatenate([borda(b, s0) for b, s0 in zip(zip(*ballots), initial)])
        np.testing.assert_allclose(h.theta[run], s, atol=1e-12, rtol=0)


def test_digits_against_plain_numpy():
    start, objective = supermask(weight_decay=0.01)
    rounds, K, lr, mu, layers = 3, 3, 5.0, 0.9, objective.layers
    method = FRL(lr, start, layers, mu)
    h = federate(method, objective, start, rounds=rounds, steps=K, seeds=SEEDS, active=4, decay=0.8)
    for run, seed in enumerate(SEEDS):
        draw = np.random.default_rng([seed, 0])
        s, cut = start[run].numpy().copy(), layers[0]
        initial, w = np.split(s.copy(), [cut]), objective.weights[run].numpy()
        for t in range(rounds):
            ballots = []
            for i in sorted(draw.permutation(6)[:4]):
                active = torch.tensor([[i], [i]])
                x, v = s.copy(), 0.0
                for k, (images, y) in enumerate(objective.batches(active, K, SEEDS, t)):
                    images, y = images[run].numpy(), y[run].numpy()
                    m = np.concatenate(
                        [p > np.sort(p)[len(p) // 2 - 1] for p in np.split(x, [cut])]
                    )
                    w1, w2 = (w * m)[:cut].reshape(12, 64), (w * m)[cut:].reshape(10, 12)
                    hidden = np.maximum(images @ w1.T, 0)
                    p = np.exp(hidden @ w2.T)
                    p = (p / p.sum(1, keepdims=True) - np.eye(10)[y]) / len(y)
                    back = (p @ w2) * (hidden > 0)
                    g = w * np.concatenate([(back.T @ images).ravel(), (p.T @ hidden).ravel()])
                    v = mu * v + g + 0.01 * x
                    x = x - lr * 0.8**t * (1 + math.cos(math.pi * k / K)) / 2 * v
                ballots.append([np.argsort(p).tolist() for p in np.split(x, [cut])])
            s = np.concatenate([borda(b, s0) for b, s0 in zip(zip(*ballots), initial)])
        assert (s != start[run].numpy()).mean() > 0.5
        np.testing.assert_allclose(h.theta[run], s, atol=1e-12, rtol=0)


@pytest.mark.parametrize("n", [3, 4, 5, 6])
def test_one_ballot_moves_an_edge_by_at_most_n_minus_1_and_a_gap_by_twice_that(n):
    ballots = ranks(torch.tensor(list(permutations(range(n)))).double())
    change = ballots[:, None] - ballots[None]  # one honest ballot replaced by another one
    assert change.abs().max() == n - 1
    gap = change[..., :, None] - change[..., None, :]
    assert gap.abs().max() == 2 * (n - 1)


def test_f_ballots_reverse_a_pair_only_if_its_gap_is_at_most_2f_times_n_minus_1():
    n, honest, f = 4, 5, 2
    everything = torch.tensor(list(permutations(range(n)))).double()
    draw = torch.Generator().manual_seed(0)
    reversed_somewhere = False
    for _ in range(40):
        votes = everything[torch.randint(len(everything), (honest,), generator=draw)]
        V = votes.sum(0)
        pairs = torch.cartesian_prod(torch.arange(len(everything)), torch.arange(len(everything)))
        W = votes[f:].sum(0) + everything[pairs].sum(1)
        gap = V[:, None] - V[None, :]
        turned = ((W[:, :, None] - W[:, None, :]) * gap < 0).any(0)
        reversed_somewhere |= bool(turned.any())
        assert (gap[turned].abs() <= 2 * f * (n - 1)).all()
    assert reversed_somewhere


def test_the_multiset_of_scores_never_changes():
    start, objective = supermask()
    method = FRL(5.0, start, objective.layers)
    attack = ReversedRank(2, objective.layers)
    h = federate(method, objective, start, rounds=6, steps=3, seeds=SEEDS, active=4, attack=attack)
    assert not torch.equal(h.theta, start)
    pairs = zip(h.theta.split(objective.layers, 1), start.split(objective.layers, 1))
    assert all(torch.equal(a.sort(-1).values, b.sort(-1).values) for a, b in pairs)


def test_a_ballot_is_the_same_for_any_increasing_transform_of_the_scores():
    class Transformed(FRL):
        def message(self, x, c):
            each = torch.logspace(-3, 3, x.shape[1]).to(x)[:, None]
            return super().message(each * torch.sinh(3 * x) + each, c)

    start, objective = supermask()
    one, two = (
        federate(
            kind(5.0, start, objective.layers),
            objective,
            start,
            rounds=4,
            steps=3,
            seeds=SEEDS,
        ).theta
        for kind in (FRL, Transformed)
    )
    assert torch.equal(one, two)


def test_nobody_there_changes_nothing():
    present = np.ones((2, 3, 6), dtype=bool)
    present[0, 1:] = False
    q = Quadratics.random(SEEDS, 6, 7)
    start = torch.randn(2, 7, dtype=torch.float64)
    theta = [
        federate(FRL(0.3), q, start, rounds=t, steps=2, seeds=SEEDS, active=Trace(present)).theta
        for t in (1, 3)
    ]
    assert torch.equal(theta[0][0], theta[1][0])


@pytest.mark.parametrize("k", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("magnitude", [False, True])
def test_the_mask_is_that_of_a_full_sort(k, magnitude):
    start, objective = supermask(k=k, magnitude=magnitude)
    mask = objective.mask(start)
    for s, m in zip(start.split(objective.layers, 1), mask.split(objective.layers, 1)):
        n = s.shape[1]
        order = (s.abs() if magnitude else s).argsort(dim=1)
        want = torch.ones_like(s).scatter_(1, order[:, : int((1 - k) * n)], 0.0)
        assert torch.equal(m.to(s), want)


@pytest.mark.parametrize("magnitude", [False, True])
def test_straight_through_gradients_against_autograd(magnitude):
    start, objective = supermask(weight_decay=0.01, magnitude=magnitude)
    active = torch.tensor([[0, 3], [1, 2]])
    x = start[:, None].expand(-1, 2, -1)
    (batch,) = objective.batches(active, 1, SEEDS, 0)
    g = objective.grad(x, active, batch)
    a = objective.layers[0]
    for run in range(2):
        for i in range(2):
            s = x[run, i].clone().requires_grad_()
            m = objective.mask(x)[run, i].double()
            kept = s.abs() if magnitude else s
            w = objective.weights[run] * (m + kept - kept.detach())
            xs, ys = (v.view(2, 2, *v.shape[1:])[run, i] for v in batch)
            out = (xs @ w[:a].view(12, 64).T).relu() @ w[a:].view(10, 12).T
            (want,) = torch.autograd.grad(nn.functional.cross_entropy(out, ys), s)
            want = want + 0.01 * s.detach()
            torch.testing.assert_close(g[run, i], want, atol=1e-12, rtol=0)


def test_weights_are_signed_constants_independent_of_the_scores():
    start, objective = supermask()
    for w, fan_in in zip(objective.weights.split(objective.layers, 1), (64, 12)):
        want = torch.full_like(w, math.sqrt(2 / fan_in))
        torch.testing.assert_close(w.abs(), want, atol=1e-7, rtol=0)
    agree = (objective.weights * start > 0).double().mean(1)
    assert ((agree - 0.5).abs() < 4 * 0.5 / start.shape[1] ** 0.5).all()


def test_loss_and_whole_gradient():
    start, objective = supermask()
    active = torch.arange(6).expand(2, -1)
    x = start[:, None].expand(-1, 6, -1)
    one, two = objective.full_grad(x, active), torch.zeros_like(x)
    assert (objective.loss(x, active, objective.batches(active, 1, SEEDS, 0)[0]) > 0).all()
    for i in range(2):
        for client in range(6):
            rows = objective._index[i, client, : objective._sizes[i, client]]
            batch = objective.x[rows][None], objective.y[rows][None]
            g, _ = objective.stack.grad(class_loss, *batch, theta=objective.subnet(start)[[i]])
            two[i, client] = g[0] * objective.weights[i]
    torch.testing.assert_close(one, two, atol=1e-12, rtol=0)


def test_bits_count_the_possible_ballots():
    assert Ballot().bits(6) == pytest.approx(math.log2(math.factorial(6)))
    assert Ballot(share=0.5).bits(6) == pytest.approx(math.log2(6 * 5 * 4))
    v = torch.zeros(1, 1, 2006)
    exact = math.log2(math.factorial(2000)) + math.log2(math.factorial(6))
    assert Ballot([2000, 6]).nbytes(v) == math.ceil(exact / 8)
    assert Ballot(share=0.1).nbytes(v) < Ballot(share=0.5).nbytes(v) < Ballot().nbytes(v)
    assert Ballot().nbytes(v) < 4 * 2006


def test_a_sparse_ballot_keeps_the_top():
    v = torch.tensor([[[3.0, 0.0, 1.0, 2.0, 1.0, 0.0]]])
    assert Ballot([4, 2], 0.5)(v, None).tolist() == [[[3.0, 0.0, 0.0, 2.0, 1.0, 0.0]]]
    assert torch.equal(Ballot([4, 2], 1.0)(v, None), v)


@pytest.mark.parametrize("omniscient", [False, True])
def test_colluders_reverse_the_sum_of_what_they_know(omniscient):
    votes = ranks(torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(3))).double()
    active = torch.tensor([[0, 1, 4, 5, 6], [1, 3, 4, 5, 6]])
    sent = ReversedRank(2, None, omniscient)(votes, active, None)
    for run, bad in enumerate((2, 1)):
        total = votes[run].sum(0) if omniscient else votes[run, :bad].sum(0)
        for i in range(bad):
            best_first = np.argsort(-total.numpy(), kind="stable")
            assert np.argsort(sent[run, i].numpy()).tolist() == best_first.tolist()
        assert torch.equal(sent[run, bad:], votes[run, bad:])


@pytest.mark.parametrize("direction", MinMax.DIRECTIONS)
def test_min_max_touches_the_largest_honest_distance(direction):
    v = torch.randn(
        2, 6, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(5)
    ) + torch.linspace(0, 1, 9)
    active = torch.tensor([[0, 1, 4, 5, 6, 7], [1, 3, 4, 5, 6, 7]])
    sent = MinMax(2, direction)(v, active, None)
    for run, bad in enumerate((2, 1)):
        good = v[run, bad:]
        distance = torch.cdist(sent[run, :1], good).max()
        torch.testing.assert_close(distance, torch.cdist(good, good).max(), atol=1e-9, rtol=0)
        away = good.mean(0) - sent[run, 0]
        toward = {"std": good.std(0), "unit": good.mean(0), "sign": good.mean(0).sign()}[direction]
        assert torch.cosine_similarity(away, toward, dim=0) == pytest.approx(1, abs=1e-9)
        assert torch.equal(sent[run, bad:], good)


def test_the_rival_is_sgd_with_momentum_and_a_cosine():
    q = Quadratics.random(SEEDS, 1, 5)
    h = federate(
        LocalMomentum(0.05, 0.8), q, torch.zeros_like(q.b[:, 0]), rounds=1, steps=4, seeds=SEEDS
    )
    x = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    sgd = torch.optim.SGD([x], lr=0.05, momentum=0.8)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, T_max=4)
    for _ in range(4):
        x.grad = q.A[0, 0] @ x.detach() - q.b[0, 0]
        sgd.step()
        schedule.step()
    torch.testing.assert_close(h.theta[0], x.detach(), atol=1e-12, rtol=0)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="share must lie in"):
        FRL(0.1, share=0)
    with pytest.raises(ValueError, match="keep an edge of every layer, got 1"):
        supermask(k=1.5)
    with pytest.raises(ValueError, match="layers of 5 edges in all, but 6 scores"):
        ranks(torch.zeros(6), [2, 3])
    with pytest.raises(ValueError, match="unknown direction 'up'"):
        MinMax(1, "up")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_type_and_device_are_kept(dtype, device):
    start, objective = supermask(dtype, device)
    method = FRL(5.0, start, objective.layers, share=0.5)
    h = federate(
        method,
        objective,
        start,
        rounds=2,
        steps=2,
        seeds=SEEDS,
        attack=ReversedRank(1, objective.layers),
    )
    assert h.theta.dtype == dtype and h.theta.device.type == device and h.theta.isfinite().all()
