"""Tabular Markov decision processes, exact: values and occupancies by linear solves, batched.

Every tensor may have leading axes (seeds, instances): P [..., S, A, S], r [..., S, A]. Rewards lie
in [0, 1] and are Bernoulli when sampled; values are discounted by gamma and lie in
[0, 1 / (1 - gamma)].
"""

from dataclasses import dataclass

import numpy as np
import torch


@dataclass
class MDP:
    """A tabular MDP (or a stack of them).

    Parameters
    ----------
    P : torch.Tensor, shape [..., S, A, S]
        P[s, a, s'] is the probability of s' after a in s.
    r : torch.Tensor, shape [..., S, A]
        Mean reward, in [0, 1].
    gamma : float
        Discount factor in [0, 1).
    start : torch.Tensor, shape [..., S]
        Distribution of the first state.

    Raises
    ------
    ValueError
        If shapes do not fit, a row of P or `start` does not sum to 1, or gamma is out of range.
    """

    P: torch.Tensor
    r: torch.Tensor
    gamma: float
    start: torch.Tensor

    def __post_init__(self):
        S = self.P.shape[-1]
        if self.P.shape[:-1] != self.r.shape or self.start.shape != (*self.r.shape[:-2], S):
            raise ValueError(
                f"P {list(self.P.shape)}, r {list(self.r.shape)} and start "
                f"{list(self.start.shape)} must be [..., S, A, S], [..., S, A] and [..., S]"
            )
        if not 0 <= self.gamma < 1:
            raise ValueError(f"gamma must lie in [0, 1), not {self.gamma}")
        for name, law in (("P", self.P), ("start", self.start)):
            if (law < 0).any() or not torch.allclose(law.sum(-1), torch.ones_like(law[..., 0])):
                raise ValueError(f"{name} must be probabilities that sum to 1")

    def under(self, policy):
        """Return P [..., S, S] and r [..., S] under a policy [..., S] of int or [..., S, A]."""
        if not policy.is_floating_point():
            policy = torch.nn.functional.one_hot(policy, self.r.shape[-1]).to(self.r)
        P = torch.einsum("...sa,...sat->...st", policy, self.P)
        return P, (policy * self.r).sum(-1), policy

    def evaluate(self, policy):
        """Return V [..., S], the solution of V = r + gamma P V, by a linear solve."""
        P, r, _ = self.under(policy)
        eye = torch.eye(P.shape[-1]).to(P)
        return torch.linalg.solve(eye - self.gamma * P, r[..., None])[..., 0]

    def q(self, V):
        """Return Q [..., S, A] = r + gamma P V."""
        return self.r + self.gamma * torch.einsum("...sat,...t->...sa", self.P, V)

    def optimal(self):
        """Return an optimal policy [..., S] and its value [..., S], by policy iteration."""
        policy = self.r.argmax(-1)
        while True:
            V = self.evaluate(policy)
            Q = self.q(V)
            # change only what is better by more than rounding, or ties would alternate
            better = Q.max(-1).values > Q.gather(-1, policy[..., None])[..., 0] + 1e-9
            if not better.any():
                return policy, V
            policy = torch.where(better, Q.argmax(-1), policy)

    def value(self, policy):
        """Return the expected value [...] of a policy from the start distribution."""
        return (self.start * self.evaluate(policy)).sum(-1)

    def occupancy(self, policy):
        """Return d [..., S, A], the discounted share of visits; sums to 1."""
        P, _, policy = self.under(policy)
        eye = torch.eye(P.shape[-1]).to(P)
        flow = (eye - self.gamma * P).transpose(-1, -2)
        visits = torch.linalg.solve(flow, self.start[..., None])[..., 0]
        return (1 - self.gamma) * visits[..., None] * policy


def garnet(seeds, S, A, branches, gamma, dtype=torch.float64, device="cpu"):
    """Draw random MDPs (Bhatnagar et al. 2009): each (s, a) leads to a few states.

    Parameters
    ----------
    seeds : sequence of int
        One MDP a seed, on the leading axis.
    S, A : int
    branches : int
        States that can follow a pair, with uniformly drawn probabilities.
    gamma : float

    Returns
    -------
    MDP
        With uniform rewards and the uniform start.
    """
    if not 1 <= branches <= S:
        raise ValueError(f"branches must lie in 1..S = 1..{S}, not {branches}")
    P, r = np.zeros((len(seeds), S, A, S)), np.empty((len(seeds), S, A))
    for i, seed in enumerate(seeds):
        g = np.random.default_rng(seed)
        to = g.random((S, A, S)).argsort(-1)[..., :branches]
        cuts = np.sort(g.random((S, A, branches - 1)), -1)
        np.put_along_axis(P[i], to, np.diff(cuts, prepend=0.0, append=1.0), -1)
        r[i] = g.random((S, A))
    P, r = (torch.from_numpy(v).to(device, dtype) for v in (P, r))
    return MDP(P, r, gamma, torch.full_like(r[..., 0], 1 / S))


def multinomial(p, n, generator):
    """Draw counts of n samples from laws p [..., K] (float64), as a chain of binomials: [..., K].

    Parameters
    ----------
    p : torch.Tensor, shape [..., K]
    n : torch.Tensor, shape [...], or int
    generator : torch.Generator
        On the device of p.
    """
    left = torch.as_tensor(n, device=p.device).to(p).expand(p.shape[:-1]).clone()
    rest, counts = p.sum(-1), []
    for k in range(p.shape[-1] - 1):
        share = (p[..., k] / rest.clamp(min=1e-300)).clamp(0, 1)
        counts.append(torch.binomial(left, share, generator=generator))
        left, rest = left - counts[-1], rest - p[..., k]
    return torch.stack([*counts, left], -1)


def offline(mdp, mu, n, generator):
    """Draw an offline data set of n transitions (s, a, r, s') with (s, a) from mu, as counts.

    Parameters
    ----------
    mdp : MDP
    mu : torch.Tensor, shape [..., S, A]
        Law of (s, a); sums to 1. Leading axes are those of the MDP, or in front of them.
    n : int
    generator : torch.Generator
        On the device of mu.

    Returns
    -------
    counts : torch.Tensor, shape [..., S, A, S]
        Transitions seen.
    rewards : torch.Tensor, shape [..., S, A]
        Sum of the Bernoulli rewards seen.
    """
    S, A = mdp.r.shape[-2:]
    if mu.shape[-2:] != (S, A):
        raise ValueError(f"mu must have shape [..., {S}, {A}], not {list(mu.shape)}")
    pairs = multinomial(mu.flatten(-2), n, generator).unflatten(-1, (S, A))
    counts = multinomial(mdp.P.expand(*pairs.shape, S), pairs, generator)
    return counts, torch.binomial(pairs, mdp.r.expand_as(pairs), generator=generator)
