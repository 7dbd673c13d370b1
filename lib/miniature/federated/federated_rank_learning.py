r"""FRL: clients rank the edges of a fixed random network, and the server counts votes.

Mozaffari, Shejwalkar and Houmansadr, *Every Vote Counts: Ranking-Based Training of Federated
Learning to Resist Poisoning Attacks*, USENIX Security 2023.

The weights $\theta^w$ are drawn once and never trained. An edge has a score s, and only the edges
with the k % largest scores of their layer are in the network (a supermask, trained by edge-popup):

$$y = (\theta^w \odot m(s))\, x, \qquad m(s) = 1\{s \text{ in the top } k\,\%\}, \qquad
\frac{\partial L}{\partial s} := \frac{\partial L}{\partial m}
= \theta^w \odot \frac{\partial L}{\partial(\theta^w \odot m)}.$$

A layer has n edges; $s^0_{(1)} \le \dots \le s^0_{(n)}$ are its initial scores in order, kept for
ever. In a round client u trains the scores and uploads its ranking $R_u = \mathrm{argsort}(s)$,
from the least important edge to the most important. The server turns rankings into positions, adds
them up, and gives the edge at position j of the sum the j-th of the initial scores:

$$P_u = \mathrm{argsort}(R_u), \qquad V = \sum_u P_u, \qquad R_g = \mathrm{argsort}(V), \qquad
s_{R_g(j)} \leftarrow s^0_{(j)}.$$

The one idea: a message is a permutation, so the most that one client can do to an edge is to move
its total by n - 1. There is no magnitude to inflate, and a ranking takes $\log_2 n!$ bits. In
Sparse-FRL clients send the top edges only, and the others get position 0.

Rivals send floats: the mean, or a rule of `miniature.federated.robust`. Attacks are here: on votes
the reversed ranking (released code), on floats the min-max attack (Shejwalkar and Houmansadr,
*Manipulating the Byzantine*, NDSS 2021).
"""

import math

import numpy as np
import torch

from .engine import Method
from .objectives import Classification


class Supermask(Classification):
    """Cross-entropy of the subnetwork that scores choose; what is trained are the scores.

    Parameters
    ----------
    stack, x, y, parts, batch_size
        As in `Classification`; the architecture should have no biases.
    seeds : sequence of S ints
        Draw the fixed weights: +-sqrt(2 / fan_in) with random signs, the paper's signed constants.
    k : float
        Share of the edges of every layer that is kept, in (0, 1].
    weight_decay : float
        Adds ``weight_decay * scores`` to gradients.
    magnitude : bool
        Keep the largest \\|s\\| instead of the largest s, as the released code does.

    Attributes
    ----------
    layers : list of int
        Numbers of edges of the layers; P is their sum.
    weights : torch.Tensor, shape [S, P]

    Raises
    ------
    ValueError
        If k is outside (0, 1], or keeps no edge of some layer.
    """

    def __init__(
        self, stack, x, y, parts, batch_size, seeds, k=0.5, weight_decay=0.0, magnitude=False
    ):
        super().__init__(stack, x, y, parts, batch_size)
        shapes = list(stack.shapes.values())
        self.layers = [shape.numel() for shape in shapes]
        self.kept = [n - int((1 - k) * n) for n in self.layers]
        if not 0 < k <= 1 or not min(self.kept):
            raise ValueError(f"k must lie in (0, 1] and keep an edge of every layer, got {k}")
        self.decay, self.magnitude = weight_decay, magnitude
        size = np.concatenate([np.full(s.numel(), math.sqrt(2 * s[0] / s.numel())) for s in shapes])
        # A stream of its own: signs must not be correlated with scores drawn from the same seed.
        signs = [np.random.default_rng([seed, 3]).choice((-1.0, 1.0), len(size)) for seed in seeds]
        self.weights = torch.from_numpy(size * np.stack(signs)).to(stack.theta)

    def mask(self, scores):
        """Return m(s), true for the edges in the network: [..., P]."""
        scores = scores.abs() if self.magnitude else scores
        masks = []
        for part, kept in zip(scores.split(self.layers, -1), self.kept):
            least = part.topk(kept, dim=-1, sorted=False).values.amin(-1, keepdim=True)
            masks.append(part >= least)  # edges tied at the border all stay
        return torch.cat(masks, -1)

    def subnet(self, scores):
        """Return the weights of the network, theta_w * m(s): [S, ..., P]."""
        if scores.ndim == 3 and scores.stride(1) == 0:
            # A round begins: all clients of a run have the same scores, and one mask is enough.
            return self.subnet(scores[:, 0])[:, None].expand(-1, scores.shape[1], -1)
        return self._weights(scores) * self.mask(scores)

    def grad(self, x, active, batch):
        """Return the straight-through gradients for the scores x: [S, A, P]."""
        return self._through(super().grad(self.subnet(x), active, batch), x)

    def loss(self, x, active, batch):
        """Return the mini-batch losses at scores x: [S, A]."""
        return super().loss(self.subnet(x), active, batch)

    def full_grad(self, x, active):
        """Return the straight-through gradients of the clients' whole losses: [S, A, P]."""
        return self._through(super().full_grad(self.subnet(x), active), x)

    def _through(self, g, x):
        """Turn gradients for the weights of the network into those for the scores x."""
        g = g.mul_(self._weights(x))
        if self.magnitude:
            g.mul_(x.sign())  # the derivative of |s|
        return g.add_(x, alpha=self.decay)

    def _weights(self, scores):
        return self.weights.view(len(scores), *[1] * (scores.ndim - 2), -1)


class LocalMomentum(Method):
    """FedAvg with the released code's local optimizer: momentum, and a cosine within the round.

    v <- momentum v + g from v = 0, and x <- x - lr (1 + cos(pi k / K)) / 2 v in step k of K.

    Parameters
    ----------
    lr : float or sequence of S floats
    momentum : float
    """

    def __init__(self, lr, momentum=0.9):
        super().__init__(lr)
        self.momentum = momentum

    def local_step(self, x, grad, c):
        g = grad(x)
        c.v = g if c.k == 0 else g.add_(c.v, alpha=self.momentum)
        K = torch.as_tensor(c.K, dtype=x.dtype, device=x.device)
        return torch.addcmul(x, c.v, -c.lr * (1 + torch.cos(math.pi * c.k / K)) / 2)


class FRL(LocalMomentum):
    """Federated rank learning: clients send rankings of the scores, the server counts votes.

    Parameters
    ----------
    lr : float or sequence of S floats
        Rate of the local steps on the scores.
    scores : torch.Tensor, shape [S, P], optional
        The initial scores: what the server hands out by rank. Default: evenly spaced from -1 to 1.
    layers : sequence of int, optional
        Numbers of edges of the layers, each ranked by itself. Default: one layer.
    momentum : float
    share : float
        Share of every layer that clients rank, in (0, 1]; below 1 it is Sparse-FRL.

    Raises
    ------
    ValueError
        If the layers do not add up to P, or the share is outside (0, 1].
    """

    is_sgd = False

    def __init__(self, lr, scores=None, layers=None, momentum=0.9, share=1.0):
        super().__init__(lr, momentum)
        self.scores, self.layers, self.ballot = scores, layers, Ballot(layers, share)

    def server_state(self, zeros):
        even = torch.linspace(-1, 1, zeros.shape[1]).to(zeros).expand_as(zeros)
        return {"ladder": ordered(even if self.scores is None else self.scores, self.layers)}

    def message(self, x, c):
        """Send P_u, the position of each edge; it is the inverse of R_u and takes the same bits."""
        return {"positions": c.send(ranks(x, self.layers), self.ballot)}

    def server_step(self, theta, message, c):
        ranking = ranks(c.sum(message["positions"]), self.layers)  # of V, which is P of R_g
        ladders = split(c.server["ladder"], self.layers)
        new = [s.gather(-1, r) for s, r in zip(ladders, split(ranking, self.layers))]
        # Where nobody voted there is nothing to count.
        return torch.where(c.present.any(1, keepdim=True), torch.cat(new, -1), theta)


class Ballot:
    """The compressor of rankings: the top share of every layer, in order; the rest at position 0.

    A ballot with m of n edges is one of n! / (n - m)! and takes the logarithm of that in bits.

    Parameters
    ----------
    layers : sequence of int, optional
    share : float
        In (0, 1].
    """

    def __init__(self, layers=None, share=1.0):
        if not 0 < share <= 1:
            raise ValueError(f"share must lie in (0, 1], got {share}")
        self.layers, self.share = layers, share

    def __call__(self, v, draw):
        if self.share == 1:
            return v
        parts = [p * (p >= p.shape[-1] - self._listed(p.shape[-1])) for p in split(v, self.layers)]
        return torch.cat(parts, -1)

    def nbytes(self, v):
        """Bytes for one ballot (the last axis of `v`)."""
        return math.ceil(sum(self.bits(p.shape[-1]) for p in split(v, self.layers)) / 8)

    def bits(self, n):
        """Bits for one layer of n edges."""
        return (math.lgamma(n + 1) - math.lgamma(n - self._listed(n) + 1)) / math.log(2)

    def _listed(self, n):
        return max(1, math.ceil(self.share * n))


class ReversedRank:
    """Malicious clients sum honest positions and all vote for the reversed order.

    Parameters
    ----------
    malicious : int
        The first ones of every run.
    layers : sequence of int, optional
    omniscient : bool
        They know the votes of the honest clients too. Otherwise they sum what they would have
        voted themselves, as in the released code.
    """

    def __init__(self, malicious, layers=None, omniscient=False):
        self.malicious, self.layers, self.omniscient = malicious, layers, omniscient

    def __call__(self, v, active, draw):
        bad = (active < self.malicious)[..., None]
        known = v if self.omniscient else v * bad
        against = ranks(-known.sum(1, keepdim=True), self.layers).to(v)
        return torch.where(bad, against, v)


class MinMax:
    """Mean minus gamma times the deviation, as far out as the honest ones are from one another.

    The largest gamma with max_i ||mean - gamma d - v_i|| <= max_ij ||v_i - v_j|| over honest
    i and j, in closed form. The attackers know all honest vectors.

    Parameters
    ----------
    malicious : int
        The first ones of every run.
    direction : {"std", "unit", "sign"}
        d: coordinate-wise standard deviation, the unit vector along the mean, or its signs.
    """

    DIRECTIONS = ("std", "unit", "sign")

    def __init__(self, malicious, direction="std"):
        if direction not in self.DIRECTIONS:
            raise ValueError(
                f"unknown direction {direction!r}: use one of {', '.join(self.DIRECTIONS)}"
            )
        self.malicious, self.direction = malicious, direction

    def __call__(self, v, active, draw):
        bad = (active < self.malicious)[..., None]
        good = ~bad
        count = good.sum(1, keepdim=True)
        mean = (v * good).sum(1, keepdim=True) / count
        if self.direction == "std":
            d = (((v - mean) * good).square().sum(1, keepdim=True) / (count - 1)).sqrt()
        elif self.direction == "unit":
            d = mean / torch.linalg.vector_norm(mean, dim=-1, keepdim=True)
        else:
            d = mean.sign()
        both = good & good.transpose(1, 2)
        widest = (torch.cdist(v, v) * both).flatten(1).max(1).values[:, None, None]
        # ||(mean - v_i) - gamma d||^2 = widest^2 is quadratic in gamma; the first client to be
        # that far away decides.
        a = d.square().sum(-1, keepdim=True)
        b = ((mean - v) * d).sum(-1, keepdim=True)
        gap = widest.square() - (mean - v).square().sum(-1, keepdim=True)
        gamma = (b + (b.square() + a * gap.clamp(min=0)).sqrt()) / a.clamp(min=1e-30)
        gamma = gamma.masked_fill(bad, torch.inf).min(1, keepdim=True).values
        return torch.where(bad, mean - gamma * d, v)


def split(v, layers):
    """Cut the last axis of `v` into layers (one if `layers` is None).

    Raises
    ------
    ValueError
        If the layers do not add up to the length of the axis.
    """
    if layers is None:
        return (v,)
    if sum(layers) != v.shape[-1]:
        raise ValueError(f"layers of {sum(layers)} edges in all, but {v.shape[-1]} scores")
    return v.split(list(layers), -1)


def ordered(v, layers=None):
    """Sort every layer."""
    return torch.cat([part.sort(-1).values for part in split(v, layers)], -1)


def ranks(v, layers=None):
    """Return each entry's position in its layer, 0 the smallest, ties by index: int64 [..., P]."""
    out = []
    for part in split(v, layers):
        order = argsort(part)  # R, the list of ids
        at = torch.arange(part.shape[-1], device=v.device).expand_as(order)
        out.append(torch.empty_like(order).scatter_(-1, order, at))  # P = argsort(R)
    return torch.cat(out, -1)


def argsort(v):
    """Return the ids of the entries, from the smallest to the largest, ties by id."""
    single = v.float()
    if v.device.type != "cpu" or not torch.equal(single.to(v), v):
        return v.argsort(dim=-1, stable=True)
    # Most of a round is spent here. The bits of a float as an integer (for negative ones, all but
    # the sign flipped) are in the order of the floats; sorting them with the id as their lower
    # half is stable, and three times as fast on a CPU.
    bits = (single + 0.0).numpy().view(np.int32)  # -0.0 becomes 0.0
    keys = (bits ^ (bits >> 31 & 0x7FFFFFFF)).astype(np.int64)
    keys <<= 32
    keys |= np.arange(v.shape[-1])
    keys.sort(-1)
    keys &= 0xFFFFFFFF
    return torch.from_numpy(keys)
