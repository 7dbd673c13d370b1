"""One contract over all learners, environments that cannot be fooled, and streams."""

import math

import numpy as np
import pytest
import torch
from kinds import kinds

import miniature.theory
from miniature.theory.bandits import (
    EXP3,
    UCB1,
    Arms,
    Fixed,
    Learner,
    Stream,
    Table,
    one_hot,
    play,
    sample,
    uniforms,
)

SEEDS, K, T = [3, 5, 8], 4, 60
LEARNERS = [k for k in kinds(miniature.theory, Learner) if k is not Fixed]


def means(seeds=SEEDS, k=K):
    return uniforms(seeds, 9, (k,), torch.zeros(1, dtype=torch.float64))


def environments(seeds=SEEDS, device="cpu"):
    """A stochastic one, and an adversarial one with a context in [-1, 1]."""
    like = torch.zeros(1, dtype=torch.float64, device=device)
    losses = uniforms(seeds, 8, (T, K), like)
    contexts = 2 * uniforms(seeds, 7, (T,), like) - 1
    return {
        "arms": Arms(means(seeds).to(device), T, seeds),
        "table": Table(losses, seeds, contexts),
        "rounds": Table(losses, seeds, contexts, best="round"),
    }


def played(kind, name, seeds=SEEDS, device="cpu"):
    env = environments(seeds, device)[name]
    if name == "arms" and getattr(kind, "needs_context", False):
        pytest.skip("the learner needs a context")
    return env, play(kind(), env)


@pytest.mark.parametrize("name", ["arms", "table"])
@pytest.mark.parametrize("kind", LEARNERS)
def test_contract(kind, name):
    """Probabilities; same seed, same run; a run does not depend on its neighbors."""

    class Watched(kind):
        def probabilities(self, t, context):
            p = super().probabilities(t, context)
            assert p.shape == (len(SEEDS), K) and (p >= 0).all()
            torch.testing.assert_close(p.sum(1), torch.ones_like(p[:, 0]), atol=1e-8, rtol=0)
            return p

        def update(self, t, arms, losses, p, context):
            assert (p.gather(1, arms[:, None]) > 0).all()
            super().update(t, arms, losses, p, context)

    _, first = played(kind, name)
    env, again = played(Watched, name)
    assert torch.equal(first.arms, again.arms) and torch.equal(first.regret, again.regret)
    _, alone = played(kind, name, SEEDS[1:2])
    assert torch.equal(alone.arms[0], first.arms[1])
    assert first.regret.shape == (len(SEEDS), T) and first.regret.isfinite().all()
    torch.testing.assert_close(first.regret[:, -1], env.gaps(first.arms).sum(1))
    one = Table(torch.rand(1, T, 1, dtype=torch.float64), [0], torch.zeros(1, T).double())
    assert (play(kind(), one).regret == 0).all()  # with one arm there is nothing to regret


@pytest.mark.parametrize("kind", LEARNERS)
def test_the_loss_of_an_arm_not_played_does_not_matter(kind):
    env, first = played(kind, "table")
    hidden = torch.rand(env.losses.shape, dtype=torch.float64)
    seen = one_hot(first.arms.flatten(), env.losses.flatten(0, 1)).view_as(hidden) > 0
    other = Table(torch.where(seen, env.losses, hidden), SEEDS, env.contexts)
    assert torch.equal(play(kind(), other).arms, first.arms)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", LEARNERS)
def test_the_gpu_agrees_with_the_cpu(kind):
    _, cpu = played(kind, "table")
    _, gpu = played(kind, "table", device="cuda")
    assert gpu.regret.device.type == "cuda"
    torch.testing.assert_close(gpu.regret.cpu(), cpu.regret)


@pytest.mark.parametrize("name", ["arms", "table", "rounds"])
def test_the_comparator_has_no_regret(name):
    env = environments()[name]
    assert (play(Fixed(env.comparator()), env).regret == 0).all()
    worse = play(Fixed((env.comparator() + 1) % K), env).regret[:, -1]
    assert (worse > 0).all()


def test_regret_is_measured_against_the_best_arm():
    env = environments()["table"]
    run = play(Fixed(torch.full((3, 1), 2)), env)
    best = env.losses.sum(1).min(1).values
    torch.testing.assert_close(run.regret[:, -1], env.losses[:, :, 2].sum(1) - best)
    torch.testing.assert_close(run.losses, env.losses[:, :, 2])


def test_bernoulli_losses_have_their_means():
    env = Arms(torch.tensor([[0.2, 0.7]]).double(), 20_000, [0])
    for arm, mean in ((0, 0.2), (1, 0.7)):
        losses = play(Fixed(torch.tensor([[arm]])), env).losses
        assert float(losses.mean()) == pytest.approx(mean, abs=4 * math.sqrt(0.25 / 20_000))


def test_ucb1_against_a_plain_loop():
    env = environments()["table"]
    run = play(UCB1(0.3), env)
    for s in range(len(SEEDS)):
        n, total = np.zeros(K), np.zeros(K)
        for t in range(T):
            if t < K:
                arm = t
            else:
                arm = np.argmin(total / n - 0.3 * np.sqrt(2 * np.log(t + 1) / n))
            assert run.arms[s, t] == arm
            n[arm] += 1
            total[arm] += env.losses[s, t, arm]


def test_exp3_against_a_plain_loop():
    env = environments()["table"]
    run = play(EXP3(2.0), env)
    u = uniforms(SEEDS, 1, (T,), env.losses).numpy()
    for s in range(len(SEEDS)):
        total = np.zeros(K)
        for t in range(T):
            w = np.exp(-2 * np.sqrt(np.log(K) / (K * (t + 1))) * (total - total.min()))
            p = w / w.sum()
            arm = np.searchsorted(p.cumsum(), u[s, t], side="right")
            assert run.arms[s, t] == arm
            total[arm] += float(env.losses[s, t, arm]) / p[arm]


def test_learning_pays():
    seeds = list(range(30))
    env = Arms(torch.tensor([[0.5, 0.3, 0.5, 0.5]]).double().expand(30, 4), 2000, seeds)
    for kind in (UCB1, EXP3):
        run = play(kind(), env)
        assert run.regret[:, -1].mean() < 0.5 * 2000 * 0.15  # half of playing at random
        assert run.regret[:, -1].mean() < 2 * run.regret[:, 999].mean()


def test_sampling_follows_the_probabilities():
    p = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]]).double().expand(4000, 5)
    arms = sample(p, torch.arange(4000).double() / 4000)
    assert torch.equal(arms.bincount(minlength=5), torch.tensor([0, 2000, 0, 2000, 0]))
    assert int(sample(torch.tensor([[0.5, 0.5 - 1e-9]]), torch.tensor([1.0 - 1e-9]))) == 1


def test_bad_environments_are_refused():
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        Arms(torch.tensor([[0.5, 1.5]]), 10, [0])
    with pytest.raises(ValueError, match=r"shape \[2, K\]"):
        Arms(torch.rand(3, 4), 10, [0, 1])
    with pytest.raises(ValueError, match=r"\[2, T, K\], not \[3, 4, 5\]"):
        Table(torch.rand(3, 4, 5), [0, 1])
    with pytest.raises(ValueError, match="'arm'"):
        Table(torch.rand(1, 4, 5), [0], best="arm")


def stream(memory=2, horizon=1000, seed=0):
    return Stream(torch.tensor([[0.1, 0.9, 0.5], [0.8, 0.2, 0.3]]).double(), memory, horizon, seed)


def test_a_dropped_arm_is_gone():
    s = stream()
    with pytest.raises(ValueError, match="slot 0 holds no arm"):
        s.pull(0, 1)
    assert s.arrive()
    s.move(0, 1, torch.tensor([True, False]))
    assert s.occupied().tolist() == [[False, True, False], [True, False, False]]
    assert s.arrive()  # run 1 kept nothing: its first arm is lost
    with pytest.raises(ValueError, match="slot 1 holds no arm"):
        s.pull(1, 1)
    s.pull(1, torch.tensor([5, 0]))
    assert s.arrive() and not s.arrive()
    with pytest.raises(ValueError, match="slot 0 holds no arm"):
        s.pull(0, 1)


def test_memory_is_counted_and_bounded():
    s = stream()
    s.arrive()
    for bad in (0, 3):
        with pytest.raises(ValueError, match=f"slots 1..2, not in {bad}"):
            s.move(0, bad)
    s.move(0, 1)
    s.arrive()
    s.move(0, 2, torch.tensor([False, True]))
    assert s.peak.tolist() == [1, 2]
    s.drop(1)
    s.drop(2)
    assert s.peak.tolist() == [1, 2] and not s.occupied()[:, 1:].any()
    s.arrive()
    s.move(0, 1)
    s.move(1, 2)  # moving is not copying
    assert s.peak.tolist() == [1, 2] and s.occupied()[:, 1:].tolist() == [[False, True]] * 2


def test_pulls_are_charged():
    s = stream(horizon=30)
    s.arrive()
    rewards, n = s.pull(0, torch.tensor([10, 20]))
    assert n.tolist() == [10, 20] and (rewards <= n).all()
    torch.testing.assert_close(s.regret, torch.tensor([10 * 0.8, 0.0]).double())
    assert s.pull(0, 15)[1].tolist() == [15, 10] and s.left.tolist() == [5, 0]
    torch.testing.assert_close(s.gap(0), torch.tensor([0.8, 0.0]).double())


def test_many_pulls_are_one_binomial():
    """In distribution as one by one, and for horizons no loop could walk."""
    n, runs = 12, 4000
    s = Stream(torch.full((runs, 1), 0.3).double(), 1, 10**12, seed=1)
    s.arrive()
    at_once, _ = s.pull(0, n)
    one_by_one = sum(s.pull(0, 1)[0] for _ in range(n))
    from scipy.stats import ks_2samp

    assert ks_2samp(at_once, one_by_one).pvalue > 1e-3
    far, pulled = s.pull(0, 10**11)
    assert (pulled == 10**11).all()
    z = (far / 1e11 - 0.3) / math.sqrt(0.21 / 1e11)
    assert abs(float(z.mean())) < 4 / math.sqrt(runs) and 0.9 < float(z.std()) < 1.1


def test_the_same_seed_gives_the_same_stream():
    rewards = []
    for seed in (0, 0, 1):
        s = stream(seed=seed)
        s.arrive()
        rewards.append(s.pull(0, 100)[0])
    assert torch.equal(rewards[0], rewards[1]) and not torch.equal(rewards[0], rewards[2])


def test_bad_streams_are_refused():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        stream(memory=0)
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        Stream(torch.tensor([[1.2]]), 1, 10)
