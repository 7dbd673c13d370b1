"""Algorithms over a stream of arms: one contract, plain loops, and a regret in closed form."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import binom, ks_2samp

from miniature.theory.bandits import Stream
from miniature.theory.streaming_bandits import (
    ALGORITHMS,
    arms,
    epsilon,
    keep_the_best,
    n_levels,
    play_stream,
    tower,
)

SEEDS = list(range(6))
TOWERS = ["log_memory", "loglog_memory", "logstar_memory"]
every_algorithm = pytest.mark.parametrize("name", list(ALGORITHMS))


class Counted(Stream):
    """A stream that counts pulls, also those of each phase."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.pulls = torch.zeros_like(self.left)

    def pull(self, slot, times):
        rewards, n = super().pull(slot, times)
        assert (rewards >= 0).all() and (rewards <= n).all()
        self.pulls += n
        return rewards, n


class OneByOne(Stream):
    """A stream that simulates every single pull."""

    def pull(self, slot, times):
        times = torch.as_tensor(times).to(self.left).expand(len(self.left)).floor()
        rewards, n = torch.zeros_like(self.left), torch.zeros_like(self.left)
        for i in range(int(times.max())):
            r, k = super().pull(slot, (times > i).to(times))
            rewards, n = rewards + r, n + k
        return rewards, n


def wobble(arm, before):
    """An error of the mean of an arm that has been pulled `before` times: no two are the same."""
    return 0.15 * np.sin(37.0 * arm + 0.7 * before)


class Replayed(Stream):
    """A stream without chance: the mean of n pulls depends on the arm and its pulls before."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.before = np.zeros(self._means.shape)

    def pull(self, slot, times):
        runs = np.arange(len(self.left))
        arm = self._slot[runs, torch.as_tensor(slot).expand(len(runs))].numpy()
        _, n = super().pull(slot, times)
        mean = self._means.numpy()[runs, arm] + wobble(arm, self.before[runs, arm])
        self.before[runs, arm] += n.numpy()
        return n * torch.as_tensor(mean), n


class Exact(Stream):
    """A stream without chance: every arm earns its `pay` [K] in every pull, whatever its mean."""

    pay = None

    def pull(self, slot, times):
        runs = torch.arange(len(self.left))
        arm = self._slot[runs, torch.as_tensor(slot).expand(len(runs))]
        _, n = super().pull(slot, times)
        if isinstance(slot, int) and slot == 0:
            self.offers = [*getattr(self, "offers", []), n.max().item()]
        return n * self.pay[arm.clamp(min=0)], n


class Plain:
    """What `Replayed` is, for one run and with arms by number: no memory is enforced."""

    def __init__(self, means, horizon):
        self.means, self.left, self.horizon = means, float(horizon), float(horizon)
        self.before, self.regret = np.zeros(len(means)), 0.0

    def pull(self, arm, times):
        n = min(math.floor(times), self.left)
        mean = self.means[arm] + wobble(arm, self.before[arm]) if n else 0.0
        self.before[arm] += n
        self.left -= n
        self.regret += n * (self.means.max() - self.means[arm])
        return mean, n

    def commit(self, arm):
        explored = self.horizon - self.left
        self.pull(arm, self.left)
        return self.regret, explored, self.means.max() - self.means[arm]


def plain_tower(env, batch, cap):
    """Levels as dicts, arms as numbers."""
    kings, spent = [None] * len(batch), [0] * len(batch)
    for arm in range(len(env.means)):
        level = 0
        while True:
            mean, n = env.pull(arm, batch[level])
            spent[level] += n
            if kings[level] is None or mean > kings[level][1]:
                kings[level] = (arm, mean)
            if spent[level] <= cap[level]:
                break
            arm = kings[level][0]
            kings[level], spent[level] = None, 0
            level += 1
    best = (-1.0, None)
    for level in range(len(batch) - 1, -1, -1):
        if kings[level]:
            mean, _ = env.pull(kings[level][0], batch[0])
            if mean > best[0]:
                best = (mean, kings[level][0])
    return env.commit(best[1])


def plain_parameters(name, K, T):
    unit = (K / T) ** (-2 / 3)
    if name == "log_memory":
        batch = [math.ceil(1.2**i * unit) for i in range(math.floor(math.log(K)))]
        cap = [6 * b for b in batch]
    elif name == "loglog_memory":
        L = math.floor(math.log(math.log(K))) + 1
        batch = [math.ceil(1.2**i * unit) for i in range(L - 1)] + [math.log(K) * unit]
        cap = [10 * b for b in batch]
    else:
        r = [2, 4, 16]
        batch = [math.ceil(b * unit) for b in (1, 4, 16, 65536)]
        cap = [4 * batch[0]] + [2 ** (r[i] - r[i - 1]) * batch[i] for i in (1, 2)] + [math.inf]
    return batch, [*cap[:-1], math.inf]


def plain_game(env, eps, coins, gap, limit):
    K = len(env.means)
    unit = eps**-2
    estimate, cost = env.pull(0, 1.2 * unit)
    best, _ = env.pull(0, math.log(K) * unit)
    king = winner = 0
    budget = 1.2 * unit
    for arm in range(1, K):
        if cost <= limit * K * unit:
            budget += unit
            level = 0
            while True:
                if budget < 2**level * unit:
                    mean, n = env.pull(arm, 1.2 * unit)
                    king, estimate = arm, min(1.0, max(mean, estimate + gap))
                    budget, cost = 1.2 * unit, cost + n
                    break
                budget -= 2**level * unit
                mean, n = env.pull(arm, 2**level * unit)
                cost += n
                if mean <= estimate - eps / 5:
                    break
                level += 1
        if coins[arm - 1] < 1.5 / math.log(K):
            mean, _ = env.pull(arm, math.log(K) * unit)
            if mean > best:
                winner, best = arm, mean
    return env.commit(king if cost <= limit * K * unit else winner)


@every_algorithm
def test_same_seed_same_run(name):
    means = arms("mix-in", 30, SEEDS)
    a, b, c = (play_stream(name, means, 50_000, seed) for seed in (1, 1, 2))
    assert torch.equal(a.regret, b.regret) and torch.equal(a.gap, b.gap)
    assert not torch.equal(a.regret, c.regret) or name in ("uniform", "naive")


@every_algorithm
def test_equal_arms_leave_nothing_to_regret(name):
    out = play_stream(name, torch.full((4, 25), 0.4).double(), 10_000)
    assert (out.regret == 0).all() and (out.gap == 0).all()


@every_algorithm
@pytest.mark.parametrize("horizon", [1, 7, 40, 3_000, 10**9, 10**12])
def test_every_pull_of_the_horizon_is_spent_and_no_more(name, horizon):
    K = 40
    stream = Counted(arms("mix-in", K, SEEDS), n_levels(name, K), horizon)
    out = ALGORITHMS[name](stream)
    assert (stream.pulls == horizon).all() and (stream.left == 0).all()
    assert (out.explored <= horizon).all() and (out.regret <= horizon).all()
    assert (out.regret >= 0).all() and stream.arrived == K


@every_algorithm
@pytest.mark.parametrize("K", [3, 20, 60, 300])
def test_memory_stays_within_the_levels(name, K):
    for order in ("shuffled", "ascending"):
        means = arms("mix-in", K, SEEDS, order)
        spare = play_stream(name, means, 10**8, memory=K)
        assert (spare.peak <= n_levels(name, K)).all() and (spare.peak >= 1).all()
        tight = play_stream(name, means, 10**8)  # the stream itself refuses more
        assert torch.equal(tight.regret, spare.regret)


@every_algorithm
def test_one_pull_at_a_time_gives_the_same_distribution(name):
    means = arms("hidden", 12, list(range(700)), gap=0.3)
    memory = n_levels(name, 12)
    fast = ALGORITHMS[name](Stream(means, memory, 500, seed=1))
    slow = ALGORITHMS[name](OneByOne(means, memory, 500, seed=2))
    for what in ("regret", "explored", "gap"):
        a, b = (getattr(out, what).numpy().round(6) for out in (fast, slow))
        assert ks_2samp(a, b).pvalue > 1e-3


@every_algorithm
def test_the_better_arm_is_found_with_pulls_enough(name):
    means = arms("clear-cut", 60, list(range(40)))
    out = play_stream(name, means, 10**8)
    eps = (60 / 10**8) ** (1 / 3)
    assert (out.gap <= eps).double().mean() >= 0.95
    assert (out.explored < 10**8).all()


@every_algorithm
def test_factor_multiplies_epsilon(name):
    means = arms("mix-in", 60, SEEDS)
    one, half = (play_stream(name, means, 10**9, factor=f).explored for f in (1.0, 0.5))
    torch.testing.assert_close(half, 4 * one, rtol=0.1, atol=0)


def test_pulls_of_the_rivals_are_those_of_their_formulas():
    K, T = 70, 10**7
    means = arms("mix-in", K, SEEDS)
    s = math.floor((T / K) ** (2 / 3) * math.log(T) ** (1 / 3))
    assert (play_stream("uniform", means, T).explored == K * s).all()
    s = math.floor(math.log(K) * (T / K) ** (2 / 3))
    assert (play_stream("naive", means, T).explored == K * s).all()


def test_regret_of_uniform_exploration_in_closed_form():
    """One arm of 0.5 + gap at place p among 0.5's; the first of equal means stays."""
    K, T, gap, p, runs = 8, 400, 0.2, 3, 20_000
    means = torch.full((runs, K), 0.5).double()
    means[:, p] += gap
    s = 10
    x = np.arange(s + 1)
    below, upto = binom.cdf(x - 1, s, 0.5), binom.cdf(x, s, 0.5)
    found = (binom.pmf(x, s, 0.5 + gap) * below**p * upto ** (K - 1 - p)).sum()
    expected = s * (K - 1) * gap + (T - K * s) * gap * (1 - found)
    out = keep_the_best(Stream(means, 1, T, seed=3), torch.tensor(float(s)))
    error = float(out.regret.std()) / math.sqrt(runs)
    assert float(out.regret.mean()) == pytest.approx(expected, abs=4 * error)
    assert 0.2 < found < 0.8 and error < 0.01 * expected


@pytest.mark.parametrize("name", TOWERS)
@pytest.mark.parametrize("K", [20, 130, 900])
def test_towers_against_a_plain_loop(name, K):
    means = arms("mix-in", K, SEEDS)
    horizons = torch.tensor([3.0, 1e3, 2e4, 1e6, 1e8, 1e9]).double() * K
    out = ALGORITHMS[name](Replayed(means, n_levels(name, K), horizons))
    for s, T in enumerate(horizons.tolist()):
        batch, cap = plain_parameters(name, K, T)
        if name == "logstar_memory":
            assert n_levels(name, K) == 4
        regret, explored, gap = plain_tower(Plain(means[s].numpy(), T), batch, cap)
        assert float(out.explored[s]) == explored
        assert float(out.gap[s]) == pytest.approx(gap, abs=1e-12)
        assert float(out.regret[s]) == pytest.approx(regret, rel=1e-9)


@pytest.mark.parametrize("gap, cap", [(0.0, 10.0), (0.03, 10.0), (0.0, 0.4)])
@pytest.mark.parametrize("K", [20, 300])
@pytest.mark.parametrize("order", ["shuffled", "ascending", "descending"])
def test_the_game_against_a_plain_loop(K, order, gap, cap):
    """With the smaller cap the sub-stream takes over."""
    means = arms("mix-in", K, SEEDS, order)
    horizons = torch.tensor([3.0, 1e3, 2e4, 1e6, 1e8, 1e9]).double() * K
    stream = Replayed(means, 2, horizons)
    out = ALGORITHMS["game_of_arms"](stream, gap=gap, cap=cap, seed=4)
    g = torch.Generator().manual_seed(4)
    coins = torch.stack([torch.rand(len(SEEDS), generator=g) for _ in range(K - 1)]).numpy()
    for s, T in enumerate(horizons.tolist()):
        env = Plain(means[s].numpy(), T)
        regret, explored, found = plain_game(env, (K / T) ** (1 / 3), coins[:, s], gap, cap)
        assert float(out.explored[s]) == explored
        assert float(out.gap[s]) == pytest.approx(found, abs=1e-12)
        assert float(out.regret[s]) == pytest.approx(regret, rel=1e-9)


@every_algorithm
def test_who_only_draws_level_does_not_take_the_throne(name):
    """All arms pay the same: the first one stays, in every level, and a tie goes up."""
    K, T = 60, 64.0 * 60
    means = torch.linspace(0.9, 0.1, K).double().expand(2, K)
    stream = Exact(means, n_levels(name, K), T)
    stream.pay = torch.full((K,), 0.5).double()
    options = {"cap": 0.0} if name == "game_of_arms" else {}  # 0: the winner of the sub-stream
    assert (ALGORITHMS[name](stream, **options).gap == 0).all()


@pytest.mark.parametrize("above, falls", [(0.0, False), (1e-4, True)])
def test_the_margin_of_a_challenger_is_a_fifth_of_epsilon(above, falls):
    """At epsilon = 1/4 a king of 0.5 falls to more than 0.45 exactly; level 1 is never played."""
    K = 40
    stream = Exact(torch.linspace(0.9, 0.1, K).double().expand(2, K), 2, 64.0 * K)
    stream.pay = (0.5 - epsilon(stream)[0] / 5 + above).repeat(K)
    stream.pay[0] = 0.5
    out = ALGORITHMS["game_of_arms"](stream)
    assert (out.gap > 0).all() == falls
    assert set(stream.offers) == {16.0}  # eps^-2: level 0


@every_algorithm
def test_exploration_costs_order_k_over_epsilon_squared(name):
    for K, T in ((60, 1e7), (60, 1e11), (1000, 1e11)):
        out = play_stream(name, arms("mix-in", K, SEEDS), T)
        pulls = out.explored * (K / T) ** (2 / 3) / K
        exact = {"uniform": math.log(T) ** (1 / 3), "naive": math.log(K)}.get(name)
        if exact:
            torch.testing.assert_close(pulls, torch.full_like(pulls, exact), rtol=1e-3, atol=0)
        else:
            assert (pulls < 3.5).all() and (pulls > 1).all()


def test_levels():
    at = {n: [n_levels(n, K) for K in (50, 500, 1600, 1700, 5000)] for n in TOWERS}
    assert at["log_memory"] == [3, 6, 7, 7, 8]
    assert at["loglog_memory"] == [2, 2, 2, 3, 3]
    assert at["logstar_memory"] == [4, 4, 4, 4, 4]
    assert n_levels("logstar_memory", 10**8) == 5
    assert [n_levels(n, 500) for n in ("uniform", "naive", "game_of_arms")] == [1, 1, 2]


def test_a_run_has_its_own_horizon():
    means = torch.rand(3, 9).double()
    stream = Stream(means, 1, torch.tensor([9.0, 72.0, 9000.0]))
    torch.testing.assert_close(epsilon(stream), torch.tensor([1.0, 0.5, 0.1]).double())
    torch.testing.assert_close(epsilon(stream, 2.0), torch.tensor([2.0, 1.0, 0.2]).double())
    stream.arrive()
    assert stream.pull(0, 100)[1].tolist() == [9, 72, 100]
    assert stream.left.tolist() == [0, 0, 8900] and stream.horizon.tolist() == [9, 72, 9000]


def test_streams_of_the_experiments():
    clear = arms("clear-cut", 4000, [0, 1, 2])
    best = clear.argmax(1)
    assert (clear.max(1).values == 0.82).all() and len(set(best.tolist())) == 3
    rest = clear[clear < 0.81]
    assert rest.max() <= 0.8 and rest.min() >= 0 and len(rest) == 3 * 3999
    assert float(rest.mean()) == pytest.approx(0.5, abs=0.005)
    assert float(rest.std()) == pytest.approx(0.1, abs=0.005)
    mixed = arms("mix-in", 4000, [0, 1, 2])
    assert float(mixed.mean()) == pytest.approx(0.5, abs=0.02) and mixed.max() > 0.99
    hidden = arms("hidden", 5, [0, 1, 2], gap=[0.1, 0.2, 0.3])
    torch.testing.assert_close(hidden.max(1).values, torch.tensor([0.6, 0.7, 0.8]).double())
    assert ((hidden == 0.5).sum(1) == 4).all()
    assert (arms("mix-in", 50, [3], "ascending").diff() >= 0).all()
    assert (arms("mix-in", 50, [3], "descending").diff() <= 0).all()
    assert torch.equal(arms("clear-cut", 50, [5, 3])[1:], arms("clear-cut", 50, [3]))
    places = arms("hidden", 10, list(range(2000))).argmax(1).bincount(minlength=10)
    assert (places - 200).abs().max() < 70


def test_bad_input_is_refused():
    means = torch.rand(2, 5).double()
    with pytest.raises(ValueError, match="horizons of at least 1, got 1 and 0"):
        play_stream("uniform", means, torch.tensor([10.0, 0.0]))
    with pytest.raises(ValueError, match="at least 3 arms, got 2"):
        play_stream("log_memory", means[:, :2], 100)
    with pytest.raises(ValueError, match="'greedy' is none of uniform, naive"):
        play_stream("greedy", means, 100)
    with pytest.raises(ValueError, match="'normal'"):
        arms("normal", 5, [0])
    with pytest.raises(ValueError, match="'sorted'"):
        arms("mix-in", 5, [0], "sorted")
    stream = Stream(torch.rand(2, 30).double(), 1, 10_000)
    unit = torch.full((2, 2), 10.0).double()
    with pytest.raises(ValueError, match=r"slots 1..1, not in 2"):
        tower(stream, unit, unit)  # two levels need two slots


@pytest.mark.gpu
@every_algorithm
def test_the_gpu_plays_the_same_game(name):
    means = arms("mix-in", 40, list(range(200)))
    cpu, gpu = (play_stream(name, m, 10**7) for m in (means, means.cuda()))
    assert gpu.regret.device.type == "cuda"
    assert ks_2samp(cpu.regret, gpu.regret.cpu()).pvalue > 1e-3
    assert (gpu.peak <= n_levels(name, 40)).all()
