"""Values, occupancies and offline data against iteration, simulation and enumeration."""

from itertools import product

import numpy as np
import pytest
import torch

from miniature.theory.mdp import MDP, garnet, multinomial, offline

SEEDS = [0, 1, 2]


@pytest.fixture(scope="module")
def mdp():
    return garnet(SEEDS, 4, 2, 2, 0.9)


def test_garnets(mdp):
    assert ((mdp.P > 0).sum(-1) == 2).all()
    torch.testing.assert_close(garnet([1], 4, 2, 2, 0.9).P[0], mdp.P[1])
    assert ((garnet([0], 3, 2, 1, 0.5).P == 1).sum(-1) == 1).all()
    with pytest.raises(ValueError, match=r"1..3, not 4"):
        garnet([0], 3, 2, 4, 0.5)


def test_values_solve_the_bellman_equation(mdp):
    policy = torch.rand(3, 4, 2, dtype=torch.float64).softmax(-1)
    V = torch.zeros(3, 4, dtype=torch.float64)
    for _ in range(400):
        V = (policy * mdp.q(V)).sum(-1)
    torch.testing.assert_close(mdp.evaluate(policy), V, atol=1e-12, rtol=0)


def test_the_optimum_by_trying_all_policies(mdp):
    policy, V = mdp.optimal()
    values = [mdp.evaluate(torch.tensor(p).expand(3, 4)) for p in product([0, 1], repeat=4)]
    torch.testing.assert_close(V, torch.stack(values).amax(0), atol=1e-12, rtol=0)
    torch.testing.assert_close(mdp.evaluate(policy), V)


def test_equal_actions_do_not_cycle():
    P = torch.full((2, 2, 2), 0.5, dtype=torch.float64)
    flat = MDP(
        P, torch.full((2, 2), 1 / 3, dtype=torch.float64), 0.99, torch.tensor([1.0, 0.0]).double()
    )
    torch.testing.assert_close(flat.optimal()[1], torch.full((2,), 100 / 3, dtype=torch.float64))


def test_occupancy(mdp):
    policy = mdp.optimal()[0]
    d = mdp.occupancy(policy)
    torch.testing.assert_close(d.sum((-1, -2)), torch.ones(3, dtype=torch.float64))
    # the two ways to write a value
    torch.testing.assert_close((d * mdp.r).sum((-1, -2)) / 0.1, mdp.value(policy))
    p, flow = mdp.start, torch.zeros_like(mdp.start)
    for t in range(400):
        flow = flow + 0.1 * 0.9**t * p
        p = torch.einsum("cs,cst->ct", p, mdp.under(policy)[0])
    torch.testing.assert_close(d.sum(-1), flow, atol=1e-12, rtol=0)


def test_counts_of_a_multinomial():
    p = torch.tensor([[0.2, 0.0, 0.5, 0.3], [0.0, 0.0, 0.0, 1.0]], dtype=torch.float64)
    rng = torch.Generator().manual_seed(0)
    counts = multinomial(p.expand(20_000, 2, 4), 10, rng)
    assert (counts.sum(-1) == 10).all() and (counts >= 0).all()
    assert (counts[..., 1] == 0).all() and (counts[:, 1, 3] == 10).all()
    mean, cov = counts[:, 0].mean(0), torch.cov(counts[:, 0].T)
    torch.testing.assert_close(mean, 10 * p[0], atol=0.06, rtol=0)
    expected = 10 * (torch.diag(p[0]) - torch.outer(p[0], p[0]))
    torch.testing.assert_close(cov, expected, atol=0.1, rtol=0)


def test_offline_data(mdp):
    mu = 0.5 + torch.rand(3, 4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mu = mu / mu.sum((-1, -2), keepdim=True)
    n = 100_000
    counts, rewards = offline(mdp, mu, n, torch.Generator().manual_seed(0))
    assert (counts.sum((-1, -2, -3)) == n).all() and (counts[mdp.P == 0] == 0).all()
    pairs = counts.sum(-1)
    torch.testing.assert_close(pairs / n, mu, atol=0.01, rtol=0)
    torch.testing.assert_close(counts / pairs[..., None], mdp.P, atol=0.03, rtol=0)
    torch.testing.assert_close(rewards / pairs, mdp.r, atol=0.03, rtol=0)
    many = offline(mdp, mu.expand(5, 3, 4, 2), 50, torch.Generator().manual_seed(0))[0]
    assert many.shape == (5, 3, 4, 2, 4)
    with pytest.raises(ValueError, match=r"4, 2\], not"):
        offline(mdp, mu[..., 0], n, torch.Generator())


def test_bad_mdps_are_refused(mdp):
    with pytest.raises(ValueError, match="gamma"):
        MDP(mdp.P, mdp.r, 1.0, mdp.start)
    with pytest.raises(ValueError, match="P must be probabilities"):
        MDP(mdp.P * 1.1, mdp.r, 0.9, mdp.start)
    with pytest.raises(ValueError, match="must be"):
        MDP(mdp.P, mdp.r[..., :1], 0.9, mdp.start)


@pytest.mark.gpu
def test_the_gpu_agrees_with_the_cpu(mdp):
    gpu = garnet(SEEDS, 4, 2, 2, 0.9, device="cuda")
    np.testing.assert_allclose(gpu.optimal()[1].cpu(), mdp.optimal()[1], atol=1e-10)
