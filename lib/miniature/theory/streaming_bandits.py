r"""Regret of bandits whose arms arrive in a stream and of which only a few can be kept.

Wang, "Tight Regret Bounds for Single-pass Streaming Multi-armed Bandits", ICML 2023,
arXiv:2306.02208; constants from the authors' code.

K arms arrive once each; an arm that is dropped is gone. With T pulls in all, no algorithm that
keeps o(K) arms has a regret below Omega(K^(1/3) T^(2/3)). All algorithms here explore while the
stream runs and then *commit* to one arm; exploring must spend pulls on every arm before it is
known what they are good for. The classical benchmark, uniform exploration, pulls each arm

    s = (T / K)^(2/3) (ln T)^(1/3)

times and keeps the best. Its logarithm pays for a union bound: the estimates of *all* arms must be
right to within eps = (K / T)^(1/3), up to constants. The one idea: only the few survivors need
estimates that good. An algorithm that finds an eps-best arm with O(K / eps^2) pulls and commits has

    regret <= K / eps^2 + eps T = O(K^(1/3) T^(2/3)),   the lower bound.

Towers (`log_memory`, `loglog_memory`, `logstar_memory`): level l holds one king. An arm offered to
it is pulled b_l times and replaces the king if its mean is better; once the level has spent more
than its cap c_l, the king is offered to level l + 1 and the level is emptied. Batches b_l grow
slower than the number of arms shrinks, so the pulls of all levels sum to O(K / eps^2).

`game_of_arms` (Assadi and Wang 2020) keeps one king with a budget of pulls that grows with every
arrival. Who challenges it is pulled 1, 2, 4, ... times eps^-2, until it proves worse or the budget
cannot pay. With the constants of the authors' code it can never pay the second round: 1.2 / eps^2
is left after the first, so who passes the first is king.

Rivals: `uniform`, and `naive` (ln K / eps^2 pulls each: an eps-best arm with a union bound).

Every algorithm plays S runs in step, masked, over a `Stream` that enforces the memory.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

import torch

from .bandits import Stream


def epsilon(stream, factor=1.0):
    """Return the accuracy factor * (K / T)^(1/3) of each run, shape [S].

    Raises
    ------
    ValueError
        If the stream has fewer than 3 arms, for which ln ln K is not defined.
    """
    if stream.n_arms < 3:
        raise ValueError(f"a stream needs at least 3 arms, got {stream.n_arms}")
    return factor * (stream.n_arms / stream.horizon) ** (1 / 3)


@dataclass
class Outcome:
    """What S runs came to, each shape [S].

    Attributes
    ----------
    regret : torch.Tensor
    explored : torch.Tensor
        Pulls before the commitment.
    gap : torch.Tensor
        Best mean minus the mean of the arm that was committed to.
    peak : torch.Tensor of int
        Most arms ever kept at once.
    """

    regret: torch.Tensor
    explored: torch.Tensor
    gap: torch.Tensor
    peak: torch.Tensor


def commit(stream, slot):
    """Spend all pulls that are left on the arm in slot [S] (or an int)."""
    explored, gap = stream.horizon - stream.left, stream.gap(slot)
    stream.pull(slot, stream.left)
    return Outcome(stream.regret, explored, gap, stream.peak)


def pulled_mean(stream, slot, times):
    """Pull and return the mean reward [S], 0 where no pull was left, and the pulls made [S]."""
    rewards, n = stream.pull(slot, times)
    return rewards / n.clamp(min=1), n


def keep_the_best(stream, times):
    """Pull every arm `times` [S] times, keep the one of the best mean, commit to it."""
    best = torch.full_like(stream.left, -math.inf)
    while stream.arrive():
        mean, _ = pulled_mean(stream, 0, times)
        better = mean > best
        if better.any():  # soon in few runs, then in none: moving nobody would cost as much
            stream.move(0, 1, better)
            best = torch.where(better, mean, best)
    return commit(stream, 1)


def uniform(stream, factor=1.0):
    """Uniform exploration: s = (T / K)^(2/3) (ln T)^(1/3) pulls of every arm.

    Parameters
    ----------
    stream : Stream
    factor : float or torch.Tensor [S]
        Pulls are divided by its square, as if eps were multiplied by it.
    """
    return keep_the_best(stream, epsilon(stream, factor) ** -2 * stream.horizon.log() ** (1 / 3))


def naive(stream, factor=1.0):
    """(a) An eps-best arm by a union bound over all arms: ln K / eps^2 pulls of every arm."""
    return keep_the_best(stream, math.log(stream.n_arms) * epsilon(stream, factor) ** -2)


def tower(stream, batch, cap):
    """Levels of kings: offer an arm to level 0; who is sent up is offered to the next level.

    Level l has its king in slot l + 1, so that what is offered to it lies in slot l.

    Parameters
    ----------
    stream : Stream
    batch, cap : torch.Tensor, shape [S, L]
        b_l, and the pulls that level l may exceed once before it sends its king up; inf: never.
    """
    batch, cap = batch.unbind(1), cap.unbind(1)
    king = [torch.full_like(stream.left, -math.inf) for _ in batch]  # its mean when it was crowned
    spent = [torch.zeros_like(stream.left) for _ in batch]
    while stream.arrive():
        offered = torch.ones_like(stream.left, dtype=torch.bool)
        for level in range(len(batch)):
            mean, n = pulled_mean(stream, level, batch[level] * offered)
            better = offered & (mean > king[level])
            stream.move(level, level + 1, better)
            if level:
                stream.drop(level, offered & ~better)
            king[level] = torch.where(better, mean, king[level])
            spent[level] = spent[level] + n
            offered = offered & (spent[level] > cap[level])
            if not offered.any():
                break
            king[level] = king[level].masked_fill(offered, -math.inf)
            spent[level] = spent[level].masked_fill(offered, 0.0)
    best, slot = torch.full_like(stream.left, -1.0), torch.ones_like(stream.peak)
    for level in reversed(range(len(batch))):  # b_0 more pulls of each king; ties go up
        there = stream.occupied()[:, level + 1]
        mean, _ = pulled_mean(stream, level + 1, batch[0] * there)
        better = there & (mean > best)
        best, slot = torch.where(better, mean, best), torch.where(better, level + 1, slot)
    return commit(stream, slot)


def log_memory(stream, factor=1.0):
    """(b) floor(ln K) levels: b_l = ceil(1.2^l / eps^2), c_l = 6 b_l."""
    levels = n_levels("log_memory", stream.n_arms)
    unit = epsilon(stream, factor)[:, None] ** -2
    batch = (1.2 ** torch.arange(levels).to(unit) * unit).ceil()
    return tower(stream, batch, _no_cap_at_the_top(6 * batch))


def loglog_memory(stream, factor=1.0):
    """(c) floor(ln ln K) + 1 levels: b_l as in (b), c_l = 10 b_l; ln K / eps^2 pulls at the top."""
    levels = n_levels("loglog_memory", stream.n_arms)
    unit = epsilon(stream, factor)[:, None] ** -2
    batch = (1.2 ** torch.arange(levels).to(unit) * unit).ceil()
    batch[:, -1] = math.log(stream.n_arms) * unit[:, 0]
    return tower(stream, batch, _no_cap_at_the_top(10 * batch))


def logstar_memory(stream, factor=1.0):
    """(d) O(log* K) levels: r_0 = 2, r_(l+1) = 2^r_l, b_0 = 1 / eps^2, b_l = r_l / eps^2.

    Caps c_0 = 4 b_0, c_l = 2^(r_l - r_(l-1)) b_l: both grow like a tower of powers.
    """
    levels = n_levels("logstar_memory", stream.n_arms)
    unit = epsilon(stream, factor)[:, None] ** -2
    r = [2.0]
    while len(r) < levels:
        r.append(2 ** min(r[-1], 60.0))  # more than any stream can fill
    times = torch.tensor([1.0, *r[1:]]).to(unit)
    rises = [4.0, *(2 ** min(b - a, 60.0) for a, b in pairwise(r))]
    batch = (times * unit).ceil()
    return tower(stream, batch, _no_cap_at_the_top(torch.tensor(rises).to(unit) * batch))


def _no_cap_at_the_top(cap):
    cap[:, -1] = math.inf
    return cap


def game_of_arms(stream, factor=1.0, gap=0.0, cap=10.0, seed=0):
    """(e) One king and its budget, and a random sub-stream in case the game costs too much.

    The first king is pulled 1.2 / eps^2 times like those after it. The released code never pulls it
    for the game and sets its estimate to eps / 2.

    Parameters
    ----------
    stream : Stream
    factor : float or torch.Tensor [S]
        Multiplies eps.
    gap : float or torch.Tensor [S]
        A new king's estimate is at least the old one's plus this. The released code adds half the
        true gap between the two best arms, which no algorithm can know.
    cap : float
        The winner of the sub-stream is used if the game costs more than cap * K / eps^2. First
        rounds sum to K / eps^2 and coronations to at most 1.2 of it: 10 is out of reach.
    seed : int
        Of the sub-stream.
    """
    eps = epsilon(stream, factor)
    unit, log_k = eps**-2, math.log(stream.n_arms)
    coins = torch.Generator().manual_seed(seed)
    king, winner = torch.ones_like(stream.peak), torch.ones_like(stream.peak)  # their slots: 1 or 2
    stream.arrive()
    stream.move(0, 1)
    estimate, cost = pulled_mean(stream, 1, 1.2 * unit)  # of the king, and pulls of the game
    best, _ = pulled_mean(stream, 1, log_k * unit)  # mean of the sub-stream's winner
    budget, cap = 1.2 * unit, cap * stream.n_arms * unit
    while stream.arrive():
        playing = cost <= cap
        budget = budget + unit
        crowned, level = torch.zeros_like(playing), 0
        while True:
            price = 2**level * unit
            can_pay = budget >= price
            crowned = crowned | (playing & ~can_pay)  # the king falls
            playing = playing & can_pay
            if not playing.any():
                break
            price = price * playing
            mean, n = pulled_mean(stream, 0, price)
            budget, cost = budget - price, cost + n
            playing, level = playing & (mean > estimate - eps / 5), level + 1
        if crowned.any():
            free = torch.where(king == winner, 3 - king, king)  # a slot may hold king and winner
            stream.move(0, free, crowned)
            king = torch.where(crowned, free, king)
            mean, n = pulled_mean(stream, king, 1.2 * unit * crowned)
            raised = torch.maximum(mean, estimate + gap).clamp(max=1.0)
            estimate = torch.where(crowned, raised, estimate)
            budget, cost = torch.where(crowned, 1.2 * unit, budget), cost + n
        # The sub-stream: each arm with probability 1.5 / ln K, solved naively.
        chosen = (torch.rand(len(eps), generator=coins) < 1.5 / log_k).to(eps.device)
        slot = torch.where(crowned, king, 0)  # where the arm that has just come is now
        mean, _ = pulled_mean(stream, slot, log_k * unit * chosen)
        better = chosen & (mean > best)
        if better.any():
            best = torch.where(better, mean, best)
            free = torch.where(crowned, king, torch.where(king == winner, 3 - king, winner))
            stream.move(0, free, better & ~crowned)
            winner = torch.where(better, free, winner)
    return commit(stream, torch.where(cost <= cap, king, winner))


ALGORITHMS = {
    f.__name__: f for f in (uniform, naive, log_memory, loglog_memory, logstar_memory, game_of_arms)
}


def n_levels(name, n_arms):
    """Return how many arms an algorithm keeps, for a stream of `n_arms` >= 3 arms.

    `game_of_arms` keeps its king and the winner of its sub-stream.
    """
    log = math.log(n_arms)
    if name == "log_memory":
        return int(log)
    if name == "loglog_memory":
        return int(math.log(log)) + 1
    if name == "logstar_memory":
        levels, x = 1, n_arms
        while x >= 1:
            levels, x = levels + 1, math.log(x)
        return levels
    return {"uniform": 1, "naive": 1, "game_of_arms": 2}[name]


@torch.inference_mode()  # a fifth faster: many operations on small tensors
def play_stream(name, means, horizon, seed=0, memory=None, **options):
    """Play S streams to their horizons.

    Parameters
    ----------
    name : str
        One of `ALGORITHMS`.
    means : torch.Tensor of float64, shape [S, K]
    horizon : number or torch.Tensor [S]
    seed : int
    memory : int, optional
        Arms that the stream lets be kept. Default: what the algorithm needs.
    **options
        Of the algorithm.

    Returns
    -------
    Outcome
    """
    if name not in ALGORITHMS:
        raise ValueError(f"algorithm {name!r} is none of {', '.join(ALGORITHMS)}")
    memory = memory or n_levels(name, max(means.shape[1], 3))
    return ALGORITHMS[name](Stream(means, memory, horizon, seed), **options)


def arms(kind, n_arms, seeds, order="shuffled", gap=0.2):
    """Draw the mean rewards of a stream for each seed.

    Parameters
    ----------
    kind : {"clear-cut", "mix-in", "hidden"}
        K - 1 means from N(0.5, 0.1) truncated to [0, 0.8] and one arm of 0.82; all means uniform
        on [0, 1]; one arm of 0.5 + `gap` among arms of 0.5.
    n_arms : int
    seeds : sequence of int, length S
    order : {"shuffled", "ascending", "descending"}
        Ascending: the best arm comes last.
    gap : float or sequence of float, length S
        Of the hidden arm.

    Returns
    -------
    torch.Tensor of float64, shape [S, n_arms]
    """
    from scipy.special import ndtr, ndtri

    from .bandits import uniforms

    like = torch.zeros(1, dtype=torch.float64)
    u = uniforms(seeds, 20, (n_arms,), like)
    if kind == "clear-cut":
        low, high = ndtr(-5.0), ndtr(3.0)
        means = 0.5 + 0.1 * torch.as_tensor(ndtri(low + (high - low) * u.numpy()))
        means[:, 0] = 0.82
    elif kind == "mix-in":
        means = u
    elif kind == "hidden":
        means = torch.full_like(u, 0.5)
        means[:, 0] += torch.as_tensor(gap, dtype=torch.float64)
    else:
        raise ValueError(f"kind must be 'clear-cut', 'mix-in' or 'hidden', not {kind!r}")
    if order not in ("shuffled", "ascending", "descending"):
        raise ValueError(f"order must be 'shuffled', 'ascending' or 'descending', not {order!r}")
    if order != "shuffled":
        return means.sort(1, descending=order == "descending").values
    return means.gather(1, uniforms(seeds, 21, (n_arms,), like).argsort(1))
