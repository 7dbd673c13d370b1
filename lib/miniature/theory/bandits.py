"""Bandits and online learning: environments and learners that play many runs at once.

Everything has a leading axis of S runs (seeds, or seeds x hyperparameters). A learner says with
what probabilities it plays each arm; `play` draws the arm, shows the learner the loss of that arm
and of no other, and keeps the regret against the environment's comparator. Randomness comes from
one stream of uniforms for each seed, so that a run does not depend on the runs beside it, and
learners that are compared meet the same losses.

A `Stream` is another game: arms arrive one at a time and only a few can be kept. Arms have no
names there, only slots, so that an arm which was dropped cannot be pulled: the environment, not the
learner's word, bounds the memory.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch


def uniforms(seeds, purpose, shape, like):
    """Return uniforms [S, *shape] in [0, 1), of a stream for each seed and purpose (an int)."""
    draws = {s: np.random.default_rng([s, purpose]).random(shape) for s in set(seeds)}
    return torch.from_numpy(np.stack([draws[s] for s in seeds])).to(like)


class Arms:
    """Stochastic bandit with Bernoulli losses. Its comparator is the arm of smallest mean loss.

    Parameters
    ----------
    means : torch.Tensor, shape [S, K]
        Mean loss of each arm, in [0, 1].
    horizon : int
    seeds : sequence of int, length S
    """

    def __init__(self, means, horizon, seeds):
        if means.ndim != 2 or len(means) != len(seeds):
            raise ValueError(f"means must have shape [{len(seeds)}, K], not {list(means.shape)}")
        if not ((means >= 0) & (means <= 1)).all():
            raise ValueError("mean losses must lie in [0, 1]")
        self.means, self.horizon, self.seeds = means, horizon, list(seeds)
        self.like = torch.zeros_like(means)
        self._u = uniforms(seeds, 0, (horizon,), means)

    def context(self, t):
        """Return what learners may see before round t: nothing."""
        return None

    def loss(self, t, arms):
        """Return the losses [S] of the arms [S] played in round t."""
        return (self._u[:, t] < _at(self.means, arms)).to(self.means)

    def comparator(self):
        """Return the best arm of every round, shape [S, 1] (the same in all)."""
        return self.means.argmin(1, keepdim=True)

    def gaps(self, arms):
        """Return mean loss minus the comparator's for arms [S, T]: shape [S, T]."""
        return self.means.gather(1, arms) - self.means.min(1, keepdim=True).values


class Table:
    """Losses fixed beforehand, by an adversary or an experiment.

    Parameters
    ----------
    losses : torch.Tensor, shape [S, T, K]
    seeds : sequence of int, length S
    contexts : torch.Tensor, shape [S, T, ...], optional
        Seen before the round is played.
    best : {"fixed", "round"}
        The comparator: the best single arm in hindsight, or the best arm of every round.
    """

    def __init__(self, losses, seeds, contexts=None, best="fixed"):
        if losses.ndim != 3 or len(losses) != len(seeds):
            raise ValueError(
                f"losses must have shape [{len(seeds)}, T, K], not {list(losses.shape)}"
            )
        if best not in ("fixed", "round"):
            raise ValueError(f"best must be 'fixed' or 'round', not {best!r}")
        self.losses, self.seeds, self.contexts, self.best = losses, list(seeds), contexts, best
        self.horizon, self.like = losses.shape[1], torch.zeros_like(losses[:, 0])

    def context(self, t):
        """Return what learners may see before round t: [S, ...], or nothing."""
        return None if self.contexts is None else self.contexts[:, t]

    def loss(self, t, arms):
        """Return the losses [S] of the arms [S] played in round t."""
        return _at(self.losses[:, t], arms)

    def comparator(self):
        """Return the comparator's arms, shape [S, 1] (the same in all rounds) or [S, T]."""
        if self.best == "round":
            return self.losses.argmin(2)
        return self.losses.sum(1).argmin(1, keepdim=True)

    def gaps(self, arms):
        """Return loss minus the comparator's for arms [S, T]: shape [S, T]."""
        best = self.comparator().expand_as(arms)
        played, least = (self.losses.gather(2, a[..., None])[..., 0] for a in (arms, best))
        return played - least


class Learner:
    """What plays. A subclass gives `probabilities` and, if it learns, `start` and `update`.

    State lives in tensors with a leading axis of runs, made in `start`. Hyperparameters may be
    numbers or tensors [S, 1], one for each run.
    """

    def start(self, like, horizon):
        """Begin S runs: `like` is a tensor [S, K] of the dtype and device to use."""

    def probabilities(self, t, context):
        """Return the probabilities [S, K] of each arm in round t = 0, 1, ..."""
        raise NotImplementedError

    def update(self, t, arms, losses, p, context):
        """See the losses [S] of the arms [S] that were drawn from p [S, K]."""


@dataclass
class Play:
    """What happened: arms and losses [S, T], regret [S, T] up to and with each round."""

    arms: torch.Tensor
    losses: torch.Tensor
    regret: torch.Tensor


def play(learner, env):
    """Let a learner play an environment to its horizon.

    Parameters
    ----------
    learner : Learner
    env : Arms, Table, or any object with their methods
        And with `horizon`, `seeds` and `like`, a tensor [S, K] of the dtype and device to use.

    Returns
    -------
    Play
    """
    learner.start(env.like, env.horizon)
    u = uniforms(env.seeds, 1, (env.horizon,), env.like)
    arms, losses = [], []
    for t in range(env.horizon):
        context = env.context(t)
        p = learner.probabilities(t, context)
        arm = sample(p, u[:, t])
        loss = env.loss(t, arm)
        learner.update(t, arm, loss, p, context)
        arms.append(arm)
        losses.append(loss)
    arms = torch.stack(arms, 1)
    return Play(arms, torch.stack(losses, 1), env.gaps(arms).cumsum(1))


def sample(p, u):
    """Draw arms [S] from probabilities p [S, K] by uniforms u [S]; one of probability 0 never."""
    edge = p.cumsum(1)
    arms = (edge <= u[:, None] * edge[:, -1:]).sum(1)
    return arms.clamp(max=p.shape[1] - 1)


def one_hot(arms, like):
    """Probabilities [S, K] that are 1 at arms [S]."""
    return torch.zeros_like(like).scatter_(1, arms[:, None], 1.0)


def _at(values, arms):
    return values.gather(1, arms[:, None])[:, 0]


class Fixed(Learner):
    """Play what was decided beforehand: one arm, or the comparator, whose regret is zero.

    Parameters
    ----------
    arms : torch.Tensor of int, shape [S, 1] (always the same) or [S, T]
    """

    def __init__(self, arms):
        self.arms = arms

    def start(self, like, horizon):
        self.like, self.plan = like, self.arms.expand(len(like), horizon)

    def probabilities(self, t, context):
        return one_hot(self.plan[:, t], self.like)


class UCB1(Learner):
    """Optimism: the arm of least mean loss minus its confidence width (Auer et al. 2002, UCB1).

    Parameters
    ----------
    width : float or torch.Tensor [S, 1]
        Factor of the width sqrt(2 ln t / n); 1 is UCB1, for losses in [0, 1].
    """

    def __init__(self, width=1.0):
        self.width = width

    def start(self, like, horizon):
        self.n, self.total = torch.zeros_like(like), torch.zeros_like(like)

    def probabilities(self, t, context):
        bonus = self.width * (2 * math.log(t + 1) / self.n.clamp(min=1)).sqrt()
        score = self.total / self.n.clamp(min=1) - bonus
        return one_hot(score.masked_fill(self.n == 0, -math.inf).argmin(1), self.n)

    def update(self, t, arms, losses, p, context):
        self.n.scatter_add_(1, arms[:, None], torch.ones_like(losses)[:, None])
        self.total.scatter_add_(1, arms[:, None], losses[:, None])


class EXP3(Learner):
    """Exponential weights on importance-weighted losses (Auer et al. 2002), at any time.

    Parameters
    ----------
    rate : float or torch.Tensor [S, 1]
        Factor of the learning rate sqrt(ln K / (K (t + 1))), for losses in [0, 1].
    """

    def __init__(self, rate=1.0):
        self.rate = rate

    def start(self, like, horizon):
        self.total = torch.zeros_like(like)  # of importance-weighted losses

    def probabilities(self, t, context):
        K = self.total.shape[1]
        eta = self.rate * math.sqrt(math.log(K) / (K * (t + 1)))
        return torch.softmax(-eta * self.total, 1)

    def update(self, t, arms, losses, p, context):
        self.total.scatter_add_(1, arms[:, None], (losses / _at(p, arms))[:, None])


class Stream:
    """K arms that arrive one at a time, of which `memory` can be kept (single pass).

    Slot 0 holds the arm that has just arrived; slots 1..memory hold what was kept. S runs move in
    step: all see their next arm together, and whatever differs between them is masked. Rewards are
    Bernoulli, drawn as one binomial for many pulls, so that a horizon of 10^11 costs nothing.

    Parameters
    ----------
    means : torch.Tensor of float64, shape [S, K]
        Mean rewards, in the order of arrival.
    memory : int
        Arms that can be kept beside the one that has just arrived.
    horizon : number or torch.Tensor, shape [S]
        Pulls in total, of all runs or of each; no run can pull more.
    seed : int

    Attributes
    ----------
    horizon : torch.Tensor, shape [S]
    arrived : int
        Arms seen so far.
    left : torch.Tensor, shape [S]
        Pulls left.
    regret : torch.Tensor, shape [S]
        Sum over all pulls of the best mean minus the mean of the arm pulled.
    peak : torch.Tensor of int, shape [S]
        Most slots from 1 on that were ever occupied at once.
    """

    def __init__(self, means, memory, horizon, seed=0):
        horizon = torch.as_tensor(horizon, device=means.device).to(means)
        if memory < 1 or horizon.min() < 1:
            raise ValueError(
                f"needs memory and horizons of at least 1, got {memory} and {horizon.min():g}"
            )
        if means.ndim != 2 or not ((means >= 0) & (means <= 1)).all():
            raise ValueError("means must have shape [S, K] and lie in [0, 1]")
        self._means, self._best = means, means.max(1).values
        S, self.n_arms = means.shape
        self._slot = torch.full((S, memory + 1), -1, device=means.device)  # which arm; -1: none
        self._rng = torch.Generator(means.device).manual_seed(seed)
        self._runs = torch.arange(S, device=means.device)
        self.memory, self.arrived = memory, 0
        self.horizon = horizon.expand(S).clone()
        self.left = self.horizon.clone()
        self.regret = torch.zeros_like(self._best)
        self.peak = torch.zeros_like(self._slot[:, 0])

    def arrive(self):
        """Put the next arm into slot 0 (what was there is gone); False once there is none."""
        if self.arrived == self.n_arms:
            self._slot[:, 0] = -1
            return False
        self._slot[:, 0] = self.arrived
        self.arrived += 1
        return True

    def occupied(self):
        """Return which slots hold an arm: bool [S, memory + 1]."""
        return self._slot >= 0

    def pull(self, slot, times):
        """Pull the arms in slot [S] (or an int) `times` [S] (or a number) each.

        Returns
        -------
        rewards, pulls : torch.Tensor, shape [S]
            Sum of rewards, and how many pulls were still possible.

        Raises
        ------
        ValueError
            If a run pulls a slot that holds no arm, with times > 0.
        """
        if not torch.is_tensor(times):
            times = torch.full_like(self.left, times)
        n = times.to(self.left).floor().clamp(min=0).minimum(self.left)
        arm = self._slot[self._runs, slot]
        empty = (arm < 0) & (times > 0)
        if empty.any():
            bad = slot[empty][0].item() if torch.is_tensor(slot) else slot
            raise ValueError(f"slot {bad} holds no arm to pull")
        mean = _at(self._means, arm.clamp(min=0))
        self.left = self.left - n
        self.regret = self.regret + n * (self._best - mean)
        return torch.binomial(n, mean, generator=self._rng), n

    def move(self, source, target, where=True):
        """Move the arm in slot `source` to slot `target`, which loses what it held.

        Parameters
        ----------
        source, target : int or torch.Tensor of int, shape [S]
        where : bool or torch.Tensor of bool, shape [S]
            Runs that move; the others stay as they are.

        Raises
        ------
        ValueError
            If a target is not one of the slots 1..memory.
        """
        runs = self._runs if where is True else where.nonzero()[:, 0]
        if len(runs) == 0:
            return
        source, target = (v[runs] if torch.is_tensor(v) else v for v in (source, target))
        ends = (target.min(), target.max()) if torch.is_tensor(target) else (target, target)
        for end in ends:
            if not 1 <= end <= self.memory:
                raise ValueError(f"arms can be kept in slots 1..{self.memory}, not in {int(end)}")
        arm = self._slot[runs, source]
        self._slot[runs, source] = -1
        self._slot[runs, target] = arm
        self.peak = self.peak.maximum((self._slot[:, 1:] >= 0).sum(1))

    def drop(self, slot, where=True):
        """Forget the arm in a slot, in the runs where `where` [S] holds."""
        runs = self._runs if where is True else where.nonzero()[:, 0]
        self._slot[runs, slot[runs] if torch.is_tensor(slot) else slot] = -1

    def gap(self, slot):
        """Return by how much the arm in slot [S] is worse than the best: for the record only."""
        return self._best - _at(self._means, self._slot[self._runs, slot].clamp(min=0))
