r"""Lower confidence bounds for offline learning: bandits, contextual bandits, MDPs.

Rashidinejad, Zhu, Ma, Jiao, Russell, "Bridging Offline Reinforcement Learning and Imitation
Learning: A Tale of Pessimism", NeurIPS 2021, arXiv:2103.12021, Algorithms 1-3.

N samples (s, a, r[, s']) with (s, a) ~ mu are all there is. How well they cover the target policy
alone, with (discounted) occupancy d*, is the single-policy concentrability

    C* = max_{s,a} d*(s, a) / mu(s, a) >= 1          (1: expert data; larger: more mixed).

With N(s, a) samples of a pair, mean reward r^(s, a) and a confidence width b(s, a):

    bandits:     pi^(s) = argmax_a r^(s, a) - b(s, a),     b = sqrt(L / N(s, a)),
                 L = log(2 S |A| / delta) / 2 by Hoeffding; unseen: r^ = 0, b at its largest
    MDP, VI-LCB: data split into T + 1 folds, T = log N / (1 - gamma); V_max = 1 / (1 - gamma);
                 V_0 = 0, pi_0(s) = argmax_a m_0(s, a); for t = 1 .. T, with fold t only:
                 b_t   = V_max sqrt(L / max(m_t(s, a), 1))
                 Q_t   = r_t - b_t + gamma P_t V_{t-1}
                 V_mid = max_a Q_t
                 V_t   = max(V_{t-1}, V_mid);  pi_t = pi_{t-1} where V_mid < V_{t-1},
                                               else argmax_a Q_t.

The one idea is a sign: *subtract* the width. An action that the data hardly show cannot win by
luck, so that errors matter only where d* > 0: V* - V^pi <= 2 / (1 - gamma) E_{d*}[b].

Rivals: the most played action (imitation), the empirically best one, value iteration on the
estimated model (`value_iteration` with L = 0), and LCB with an empirical Bernstein width.

Policies are [..., S, A] with rows that sum to 1: actions that tie share a state equally, so that no
order of the actions helps anyone. A bandit is the case S = 1.
"""

import math
from dataclasses import dataclass

import torch

from .mdp import MDP, multinomial, offline

# --- the method --------------------------------------------------------------------------------


def hoeffding(S, A, delta, folds=1):
    """Return L = log(2 folds S A / delta) / 2: widths sqrt(L / N) hold everywhere at once, with
    probability 1 - delta (Algorithm 1 for S = folds = 1; the paper's proofs have 2000 for 1/2)."""
    if not 0 < delta < 1:
        raise ValueError(f"delta must lie in (0, 1), not {delta}")
    return math.log(2 * folds * S * A / delta) / 2


def argmax(values):
    """Return the policy [..., S, A] that is greedy in values [..., S, A]; ties share."""
    best = (values == values.amax(-1, keepdim=True)).to(values)
    return best / best.sum(-1, keepdim=True)


def mean(counts, rewards):
    """Return r^ = rewards / N, 0 where nothing was seen."""
    if counts.shape != rewards.shape:
        raise ValueError(
            f"counts {list(counts.shape)} and rewards {list(rewards.shape)} must have one shape, "
            "[..., S, A]"
        )
    return rewards / counts.clamp(min=1)


def width(counts, L):
    """Return b = sqrt(L / N); unseen: 1 (Algorithm 1), but no less than for one sample."""
    if L < 0:
        raise ValueError(f"the penalty L must not be negative, not {L}")
    return torch.where(counts > 0, (L / counts.clamp(min=1)).sqrt(), max(1.0, math.sqrt(L)))


def lcb(counts, rewards, L):
    """Algorithms 1 and 2: argmax_a r^ - b.

    Parameters
    ----------
    counts, rewards : torch.Tensor, shape [..., S, A]
        N(s, a) and the sum of the rewards in [0, 1] seen there.
    L : float

    Returns
    -------
    torch.Tensor, shape [..., S, A]
    """
    return argmax(mean(counts, rewards) - width(counts, L))


@dataclass
class Pessimist:
    """What VI-LCB found: the policy pi_T [..., S, A], the values V_0 .. V_T [..., T + 1, S] and the
    widths b_1 .. b_T [..., T, S, A]."""

    policy: torch.Tensor
    V: torch.Tensor
    b: torch.Tensor


def vi_lcb(counts, rewards, gamma, L):
    """Algorithm 3, VI-LCB.

    Parameters
    ----------
    counts : torch.Tensor, shape [..., T + 1, S, A, S]
        Transitions seen in each of the folds (`folds`).
    rewards : torch.Tensor, shape [..., T + 1, S, A]
    gamma, L : float

    Returns
    -------
    Pessimist
        A pair that a fold lacks has r_t = P_t = 0 there.
    """
    if counts.ndim < 4 or counts.shape[:-1] != rewards.shape or counts.shape[-4] < 2:
        raise ValueError(
            f"needs counts [..., T + 1, S, A, S] and rewards [..., T + 1, S, A] with T >= 1, got "
            f"{list(counts.shape)} and {list(rewards.shape)}"
        )
    m = counts.sum(-1)
    b = (L / m.clamp(min=1)).sqrt() / (1 - gamma)
    r = rewards / m.clamp(min=1)
    policy = argmax(m[..., 0, :, :])
    V = [torch.zeros_like(m[..., 0, :, 0])]
    for t in range(1, m.shape[-3]):
        P = counts[..., t, :, :, :] / m[..., t, :, :, None].clamp(min=1)
        PV = (P @ V[-1][..., None, :, None])[..., 0]
        Q = r[..., t, :, :] - b[..., t, :, :] + gamma * PV
        mid = Q.amax(-1)
        policy = torch.where((mid < V[-1])[..., None], policy, argmax(Q))
        V.append(torch.maximum(V[-1], mid))
    return Pessimist(policy, torch.stack(V, -2), b[..., 1:, :, :])


def steps(n, gamma):
    """Return T = log N / (1 - gamma), rounded up; VI-LCB wants T + 1 folds."""
    return math.ceil(math.log(n) / (1 - gamma))


def widths_hold(mdp, counts, rewards, found):
    """Return whether every width of a `Pessimist` covers the error of its Bellman backup [...]:

    |r_t + gamma P_t V_{t-1} - (r + gamma P V_{t-1})| <= b_t for all t, s, a; inputs as `vi_lcb`.
    """
    n = counts[..., 1:, :, :, :].sum(-1).clamp(min=1)
    V = found.V[..., :-1, None, :, None]
    estimate = rewards[..., 1:, :, :] / n
    estimate = estimate + mdp.gamma * (counts[..., 1:, :, :, :] / n[..., None] @ V)[..., 0]
    truth = mdp.r.unsqueeze(-3) + mdp.gamma * (mdp.P.unsqueeze(-4) @ V)[..., 0]
    return ((estimate - truth).abs() <= found.b).flatten(-3).all(-1)


def certificate(mdp, best, b):
    """Return what VI-LCB may lose at most, by its widths on the path of the optimal policy.

    Where the widths hold, V*(rho) - V^{pi_T}(rho) is at most

        gamma^T V_max + 2 sum_{i=1}^{T} gamma^{T-i} E_{s ~ rho (P*)^{T-i}}[b_i(s, pi*(s))],

    which is 2 / (1 - gamma) E_{d*}[b] for equal folds and T -> infinity.

    Parameters
    ----------
    mdp : MDP
    best : torch.Tensor, shape [..., S]
        An optimal policy.
    b : torch.Tensor, shape [..., T, S, A]

    Returns
    -------
    torch.Tensor, shape [...]
    """
    T, gamma = b.shape[-3], mdp.gamma
    P, _, policy = mdp.under(best)
    paid = (b * policy[..., None, :, :]).sum(-1)
    total, at = gamma**T / (1 - gamma), mdp.start
    for k in range(T):
        total = total + 2 * gamma**k * (at * paid[..., T - 1 - k, :]).sum(-1)
        at = (at[..., None, :] @ P)[..., 0, :]
    return total


# --- rivals ------------------------------------------------------------------------------------


def most_played(counts, rewards=None):
    """Imitation: the action seen most often; rewards are not looked at."""
    return argmax(counts)


def empirical_best(counts, rewards):
    """No penalty: argmax_a r^, where an action never seen counts as 0."""
    return argmax(mean(counts, rewards))


def bernstein_lcb(counts, rewards, L):
    """LCB with the width of Maurer and Pontil (2009) for rewards 0 or 1, at the same confidence.

    sqrt(4 L v / N) + 14 L / (3 (N - 1)), v the sample variance; 1 + 14 L / 3 where N < 2.
    """
    r, n = mean(counts, rewards), counts.clamp(min=2)
    v = r * (1 - r) * n / (n - 1)
    b = (4 * L * v / n).sqrt() + 14 * L / (3 * (n - 1))
    return argmax(r - torch.where(counts > 1, b, 1.0 + 14 * L / 3))


def value_iteration(counts, rewards, gamma, T, L=0.0):
    """T steps of value iteration on the model that all the data give, without folds or maximum.

    L = 0 trusts the model; L > 0 subtracts V_max sqrt(L / max(N, 1)), which is not Algorithm 3.

    Parameters
    ----------
    counts : torch.Tensor, shape [..., S, A, S]
    rewards : torch.Tensor, shape [..., S, A]

    Returns
    -------
    policy : torch.Tensor, shape [..., S, A]
    V : torch.Tensor, shape [..., S]
    """
    n = counts.sum(-1).clamp(min=1)
    r, P = rewards / n - (L / n).sqrt() / (1 - gamma), counts / n[..., None]
    V = torch.zeros_like(r[..., 0])
    for _ in range(T):
        Q = r + gamma * (P @ V[..., None, :, None])[..., 0]
        V = Q.amax(-1).clamp(min=0.0)  # values are never negative
    return argmax(Q), V


# --- data, what they cover, and the hard instances of the theorems -------------------------------


def concentrability(d, mu):
    """Return C* [...] = max d / mu over pairs [..., S, A] with d > 0; infinite where mu misses."""
    ratio = torch.where(d > 0, d / mu, 0.0)
    return ratio.flatten(-2).amax(-1)


def sample(mu, r, n, generator):
    """Draw n samples of a contextual bandit: N(s, a) and sums of Bernoulli rewards [..., S, A]."""
    counts = multinomial(mu.flatten(-2), n, generator).unflatten(-1, mu.shape[-2:])
    return counts, torch.binomial(counts, r.expand_as(counts).contiguous(), generator=generator)


def folds(mdp, mu, n, T, generator):
    """Draw n transitions in T + 1 folds of n // (T + 1): inputs of `vi_lcb`.

    The leading axes of mu [..., S, A] are those of the MDP, or size 1 ones of it expanded.
    """
    if n < T + 1:
        raise ValueError(f"{n} samples do not fill T + 1 = {T + 1} folds")
    each = MDP(mdp.P.unsqueeze(-4), mdp.r.unsqueeze(-3), mdp.gamma, mdp.start.unsqueeze(-2))
    S, A = mu.shape[-2:]
    mu = mu.unsqueeze(-3).expand(*mu.shape[:-2], T + 1, S, A)
    return offline(each, mu, n // (T + 1), generator)


def suboptimality(policy, r, rho):
    """Return sum_s rho(s) (max_a r(s, a) - r(s, pi(s))) [...] of a contextual bandit, exactly."""
    return (rho * (r.amax(-1) - (policy * r).sum(-1))).sum(-1)


def _mixed(rho, C):
    """Two actions: the good one, last, with mass rho / C*, the other one with the rest."""
    if C < 1:
        raise ValueError(f"C* is at least 1, not {C}")
    return torch.stack([rho * (1 - 1 / C), rho / C], -1)


def symmetric(S, C, gap):
    """Two actions with means (1 -+ gap) / 2 in S equal contexts, the better one with mass 1 / C*.

    Returns mu [S, 2], r [..., S, 2] for gap [...] and rho [S].
    """
    rho = torch.full((S,), 1 / S, dtype=gap.dtype, device=gap.device)
    r = torch.stack([(1 - gap) / 2, (1 + gap) / 2], -1)[..., None, :]
    return _mixed(rho, C), r.expand(*gap.shape, S, 2), rho


def rare_states(S, n, gap):
    """Expert data (C* = 1) whose S - 1 rare contexts have mass 1 / n each: as `symmetric`."""
    if not 2 <= S <= n:
        raise ValueError(f"S must lie in 2..n = 2..{n}, not {S}")
    _, r, rho = symmetric(S, 1.0, gap)
    rho = torch.full_like(rho, 1 / n)
    rho[0] = 1 - (S - 1) / n
    return _mixed(rho, 1.0), r, rho


def rare_arms(A, C, n, gap):
    """A bandit: the best arm, last, has mean 1/2 + gap and mass 1 / C*, A - 2 rare ones have mass
    2 / n each, arm 0 has the rest; all of these have mean 1/2.

    Returns mu [1, A], r [..., 1, A] and rho [1].
    """
    mu = torch.full((1, A), 2 / n, dtype=gap.dtype, device=gap.device)
    mu[0, -1], mu[0, 0] = 1 / C, 1 - 1 / C - (A - 2) * 2 / n
    if mu[0, 0] < 0:
        raise ValueError(f"C* = {C} leaves no mass for {A - 2} rare arms at n = {n}")
    r = torch.full((*gap.shape, 1, A), 0.5).to(gap)
    r[..., 0, -1] += gap
    return mu, r, torch.ones(1).to(gap)


def fork(S, C, gap, gamma, rare=None):
    """An MDP that decides once: S - 2 forks, then a state that pays 1 for ever, or one that pays 0.

    At a fork the better action, 1, leads to pay with probability (1 + gap) / 2, the other one with
    (1 - gap) / 2. Episodes start at the forks: uniformly, or with mass `rare` at all but the first.

    Returns
    -------
    mdp : MDP, leading axes those of gap
    mu : torch.Tensor, shape [..., S, A]
        The occupancy of the best policy, of which a share 1 - 1 / C* at the forks goes to the
        other action.
    best : torch.Tensor, shape [S]
    """
    F, kw = S - 2, {"dtype": gap.dtype, "device": gap.device}
    P = torch.zeros(*gap.shape, S, 2, S, **kw)
    for a, p in enumerate([(1 - gap) / 2, (1 + gap) / 2]):
        P[..., :F, a, F] = p[..., None]
        P[..., :F, a, F + 1] = 1 - p[..., None]
    P[..., F, :, F] = P[..., F + 1, :, F + 1] = 1
    r = torch.zeros(*gap.shape, S, 2, **kw)
    r[..., F, :] = 1
    start = torch.zeros(*gap.shape, S, **kw)
    start[..., :F] = 1 / F if rare is None else rare
    if rare is not None:
        start[..., 0] = 1 - (F - 1) * rare
    mdp = MDP(P, r, gamma, start)
    best = torch.tensor([1] * F + [0, 0], device=gap.device)
    mu = mdp.occupancy(best)
    mu[..., :F, :] = _mixed(mu[..., :F, 1].clone(), C)
    return mdp, mu, best
