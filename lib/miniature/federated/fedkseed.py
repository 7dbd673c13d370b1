r"""FedKSeed: a model that is K scalars away from its start.

Qin, Chen, Qian, Ding, Li and Deng, *Federated Full-Parameter Tuning of Billion-Sized Language
Models with Communication Cost under 18 Kilobytes*, ICML 2024.

A pool of K seeds $s_1, \dots, s_K$ is drawn once. Each stands for a direction
$z_k = z(s_k) \sim N(0, I_d)$ in the space of all d parameters, generated again wherever it is
needed. A local step draws k from the pool with probabilities P and a batch b, and measures the
slope along $z_k$ from two forward passes on that batch:

$$\hat g = \frac{L(w + \epsilon z_k; b) - L(w - \epsilon z_k; b)}{2 \epsilon}, \qquad
w \leftarrow w - \eta\, \hat g\, z_k, \qquad a^{loc}_k \leftarrow a^{loc}_k + \hat g .$$

The client uploads $a^{loc}$, K scalars; the server adds up, with $p_j$ one over the number of
clients in the round (the released code weights by data size unless told otherwise):

$$a \leftarrow a + \sum_j p_j\, a^{loc}_j, \qquad w = w_0 - \eta \sum_{k=1}^K a_k z_k .$$

The one idea: because the directions come from a *finite* pool, everything ever learned is the
vector a. Whoever has $w_0$ and the pool rebuilds w from K scalars, after any number of rounds.

FedKSeed-Pro draws directions with large slopes more often: with $G_k$ the mean of all
$\min(|\hat g_k|, 1000)$ so far (a history that starts with one 0, as in the released code),
$P = \mathrm{softmax}(\mathrm{minmax}(G))$, so that no direction is more than e times as likely as
another.

Rivals: FedMeZO (Malladi et al., NeurIPS 2023, in rounds) draws a new direction for each step, the
limit of large K. `LoRA` (Hu et al., ICLR 2022) and `Prompt` are adapters for FedAvg, which
back-propagates and sends a small part of the parameters.
"""

import numpy as np
import torch
from torch import nn

from .engine import Method, per_run


class FedKSeed(Method):
    """FedKSeed with uniform probabilities.

    The rate must be constant (``decay=1``): a slope is worth the same in every round.

    Parameters
    ----------
    lr : float or sequence of S floats
        Rate eta of the local steps and of the sum over directions.
    pool : int or sequence of S ints
        Number K of seeds. A message has as many entries as the largest pool.
    eps : float
        Half the distance between the two points.
    seed : int or sequence of S ints
        Draws each run's pool and what its clients pick from it. Runs with equal seeds share it.

    Raises
    ------
    ValueError
        If the pool is empty or eps is not positive; when run, if there is not one seed a run, or
        the rate decays.
    """

    is_sgd = False

    def __init__(self, lr, pool=64, eps=5e-4, seed=0):
        super().__init__(lr)
        if np.min(pool) < 1:
            raise ValueError(f"pool must be at least 1, got {pool}")
        if eps <= 0:
            raise ValueError(f"eps must be positive, got {eps}")
        self.pool, self.eps, self.seed = pool, eps, seed

    def server_state(self, zeros):
        seeds, which = np.unique(seeds_of(self.seed, zeros), return_inverse=True)
        K = int(np.max(self.pool))
        used = (torch.arange(K) < torch.as_tensor(self.pool).view(-1, 1)).to(zeros)
        draws = (np.random.default_rng([seed, 4]) for seed in seeds)  # of the seeds s_k
        z = torch.stack([normal(zeros[0], g) for g in draws for _ in range(K)])
        return {
            "a": zeros.new_zeros(len(zeros), K),
            "P": (used / used.sum(1, keepdim=True)).expand(len(zeros), -1),
            "Z": z.view(len(seeds), K, -1).to(zeros.device),  # [pools, K, P]
            "which": torch.from_numpy(which).to(zeros.device),
        }

    def local_step(self, x, grad, c):
        if c.k == 0:
            c.drawn, c.steps = self.draw(c), []
        k = c.drawn[..., min(c.k, c.drawn.shape[-1] - 1)]  # later steps are of absent clients
        Z = c.server["Z"]
        row = (c.server["which"][:, None] * Z.shape[1] + k).flatten()
        z = Z.flatten(0, 1).index_select(0, row).view(x.shape)  # faster than Z[which, k]
        g = two_sided(grad.loss, x, z, self.eps)
        c.steps.append((k[..., None], g))
        return x.addcmul(c.lr * g, z, value=-1)

    def draw(self, c):
        """Return the entries of the pool that clients use in this round: [S, A, steps]."""
        steps = int(torch.as_tensor(c.K).max())
        u = [
            np.random.default_rng([s, 3, c.t]).random((steps, c.n_clients))[:, row].T
            for s, row in zip(seeds_of(self.seed, c.x0), c.active.cpu().numpy())
        ]
        bins = c.server["P"].cpu().double().cumsum(-1)
        k = torch.searchsorted(bins / bins[:, -1:], torch.from_numpy(np.stack(u)).flatten(1))
        k = k.clamp(max=bins.shape[1] - 1)  # where a run has diverged
        return k.view(*c.active.shape, steps).to(c.x0.device)

    def message(self, x, c):
        return {"a": c.send(self.accumulate(lambda g: g, c))}

    def accumulate(self, f, c):
        """Return the sums of f(g) over the steps of this round along each direction: [S, A, K]."""
        k, g = (torch.cat(v, -1) for v in zip(*c.steps))  # [S, A, steps]
        sums = g.new_zeros(*g.shape[:2], c.server["a"].shape[-1])
        return sums.scatter_add(-1, k, f(g) * taken(g, c))

    def server_step(self, theta, message, c):
        if not torch.equal(c.lr, per_run(self.lr, c.x0)):
            raise ValueError("a pool of seeds needs a constant learning rate, got decay != 1")
        a = c.mean(message["a"])
        c.server["a"] = c.server["a"] + a
        return self.rebuild(theta, a, c.server)

    def rebuild(self, theta, a, server):
        """Return theta - eta sum_k a_k z_k: [S, P] from theta [S, P] and a [S, K]."""
        moves = torch.stack([row @ server["Z"][i] for row, i in zip(a, server["which"])])
        return theta - per_run(self.lr, theta) * moves


class FedKSeedPro(FedKSeed):
    """FedKSeed-Pro: directions with large slopes are drawn more often.

    A client sends two more vectors of K numbers: sums of the sizes of its slopes, and counts.
    (Pairs of index and slope, one for each step, would tell the server all three.)

    Parameters
    ----------
    lr, pool, eps, seed
        As in `FedKSeed`.
    clip : float
        Slopes count as at most this large in the probabilities.
    """

    def __init__(self, lr, pool=64, eps=5e-4, seed=0, clip=1000.0):
        super().__init__(lr, pool, eps, seed)
        self.clip = clip

    def server_state(self, zeros):
        state = super().server_state(zeros)
        return state | {"size": state["a"], "count": state["a"] + 1}  # a first entry of 0

    def message(self, x, c):
        size = self.accumulate(lambda g: g.abs().clamp(max=self.clip), c)
        count = self.accumulate(torch.ones_like, c)
        return super().message(x, c) | {"size": c.send(size), "count": c.send(count)}

    def server_step(self, theta, message, c):
        theta = super().server_step(theta, message, c)
        for name in ("size", "count"):
            c.server[name] = c.server[name] + c.sum(message[name])
        mean = c.server["size"] / c.server["count"]
        used = c.server["P"] > 0
        low = torch.where(used, mean, torch.inf).amin(-1, keepdim=True)
        scaled = (mean - low) / (mean.amax(-1, keepdim=True) - low + 1e-10)
        c.server["P"] = torch.where(used, scaled, -torch.inf).softmax(-1)
        return theta


class FedMeZO(Method):
    """Zeroth-order steps along a new direction each: FedKSeed with an unlimited pool.

    A client sends the slope of each of its steps, from which the server generates its directions
    again. Clients with fewer steps than others send zeros for those that they do not take.

    Parameters
    ----------
    lr, eps, seed
        As in `FedKSeed`.
    """

    is_sgd = False

    def __init__(self, lr, eps=5e-4, seed=0):
        super().__init__(lr)
        self.eps, self.seed = eps, seed

    def local_step(self, x, grad, c):
        if c.k == 0:
            runs = zip(seeds_of(self.seed, x), c.active.tolist())
            c.who = [(s, i) for s, row in runs for i in row]
            c.streams = {(s, i): np.random.default_rng([s, 3, c.t, i]) for s, i in c.who}
            c.steps = []
        z = {who: normal(x[0, 0], g) for who, g in c.streams.items()}
        z = torch.stack([z[who] for who in c.who]).view(x.shape).to(x.device)
        g = two_sided(grad.loss, x, z, self.eps)
        c.steps.append((g, z))
        return x.addcmul(c.lr * g, z, value=-1)

    def message(self, x, c):
        g = torch.cat([g for g, _ in c.steps], -1)
        return {"slopes": c.send(g * taken(g, c))}

    def server_step(self, theta, message, c):
        slopes = message["slopes"].unbind(-1)
        moves = sum(g[..., None] * z for g, (_, z) in zip(slopes, c.steps))
        return theta - c.lr.view(-1, 1) * c.mean(moves)


def two_sided(loss, x, z, eps):
    """Return the slopes (L(x + eps z) - L(x - eps z)) / (2 eps): [S, A, 1] for x, z [S, A, P]."""
    up, down = loss(x.add(z, alpha=eps)), loss(x.sub(z, alpha=eps))
    return ((up - down) / (2 * eps))[..., None]


def seeds_of(seed, like):
    """Return one seed for each run of `like`, [S, ...]."""
    seeds = [seed] * len(like) if isinstance(seed, int) else [int(s) for s in seed]
    if len(seeds) != len(like):
        raise ValueError(f"{len(seeds)} pool seeds for {len(like)} runs")
    return seeds


def taken(g, c):
    """Return which of the steps of g [S, A, steps] clients with fewer steps than others took."""
    return torch.arange(g.shape[-1], device=g.device) < torch.as_tensor(c.K, device=g.device)


def normal(like, g):
    """Return z(s), standard normal numbers shaped like `like`, for a seed s that g draws."""
    generator = torch.Generator().manual_seed(int(g.integers(2**62)))  # the same on every device
    return torch.randn(like.shape, dtype=like.dtype, generator=generator)


class LoRA(nn.Module):
    """A frozen MLP with a trainable correction B A of low rank on each weight; B starts at 0.

    Inputs are [copies, batch, features]; A and B may have the leading axis of copies, too.

    Parameters
    ----------
    base : miniature.models.MLP
    rank : int
    """

    def __init__(self, base, rank):
        super().__init__()
        self.base = base.requires_grad_(False)
        shapes = [layer.weight.shape for layer in base if isinstance(layer, nn.Linear)]
        self.A = nn.ParameterList(torch.randn(rank, n) / n**0.5 for _, n in shapes)
        self.B = nn.ParameterList(torch.zeros(m, rank) for m, _ in shapes)

    def forward(self, x):
        corrections, x = iter(zip(self.A, self.B)), x.mT  # samples last: rows are longer
        for layer in self.base:
            if isinstance(layer, nn.Linear):
                A, B = next(corrections)
                W, B = (v.expand(len(x), -1, -1) for v in (layer.weight, B))
                x = torch.baddbmm(layer.bias[:, None], W, x).baddbmm_(B, A @ x)
            else:
                x = layer(x)
        return x.mT


class Prompt(nn.Module):
    """A frozen MLP with a trainable offset of its input: what a prompt is to a network of tokens.

    The offset may have a leading axis of copies, as in `LoRA`.

    Parameters
    ----------
    base : miniature.models.MLP
    """

    def __init__(self, base):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.offset = nn.Parameter(torch.zeros(base[0].in_features))

    def forward(self, x):
        return self.base(x + self.offset[..., None, :])
