r"""FedAMD: of the clients of a round, some renew the compass and the others walk by it.

Wu et al., *Anchor Sampling for Federated Learning with Partial Client Participation*, ICML 2023.

The server keeps, for each of N clients, its latest large-batch gradient $v_i$ (its "bullseye") and
their mean over ALL clients, $g_t = \frac1N \sum_{i=1}^N v_i$. In round t, A clients are sampled;
each is, by itself, an anchor with probability $p_t$ and otherwise a miner.

- An anchor takes no local step and sends $v_i \leftarrow \nabla f_i(x_t)$.
- A miner starts from $x_{i,0} = x_{i,-1} = x_t$ and $d_{i,-1} = g_t$, takes K steps

$$d_{i,k} = d_{i,k-1} - \nabla f_i(x_{i,k-1}; B_{i,k}) + \nabla f_i(x_{i,k}; B_{i,k}), \qquad
x_{i,k+1} = x_{i,k} - \eta_l d_{i,k}$$

with a small batch $B_{i,k}$, the same in both gradients, and sends $\Delta_i = x_t - x_{i,K}$.

The server moves by the miners, $x_{t+1} = x_t - \eta_s \,\mathrm{mean}_{miners}\, \Delta_i$ (no
miner: it stays), and puts the anchors' new $v_i$ into the cache. The cache is filled at x_0 by
all clients. $p_t$ is a constant p, or 1 in every tau-th round and 0 in the others.

The one idea: $d_{i,-1} = g_t$. Every miner's first step follows the gradient of the whole
objective (as old as the cache), whatever its own data, and only what it sees change is its own.

Rival: FedPAGE (Zhao, Li and Richtarik, 2021), for which all clients must come in some rounds.
"""

import numpy as np
import torch

from .engine import Method, per_run
from .objectives import per_seed
from .participation import Sample


class FedAMD(Method):
    """FedAMD. In round 0 whoever comes fills the cache: let it be everyone (see `Census`).

    Parameters
    ----------
    lr : float or sequence of S floats
        Local rate eta_l.
    p : float, sequence of S floats, or callable
        Probability of being an anchor, in [0, 1]; a callable maps the round t to it.
    eta : float or sequence of S floats
        Server rate eta_s.

    Raises
    ------
    ValueError
        If a probability is outside [0, 1].
    """

    is_sgd = False
    downloads = ("g",)

    def __init__(self, lr, p=0.2, eta=1.0):
        super().__init__(lr, eta)
        self.p = p if callable(p) else _probability(p)

    def client_state(self, zeros):
        return {"v": zeros}  # lies at the server, a row per client

    def server_state(self, zeros):
        return {"g": zeros}

    def anchors(self, c):
        """Return who of the round's clients is an anchor: bool, [S, A]."""
        if c.t == 0:
            return torch.ones_like(c.present)
        p = _probability(self.p(c.t)) if callable(self.p) else self.p
        u = per_seed(c.seeds, lambda s: np.random.default_rng([s, 5, c.t]).random(c.n_clients))
        u = u.to(c.active.device)
        return u.gather(1, c.active) < per_run(p, u)

    def local_step(self, x, grad, c):
        if c.k == 0:
            c.anchor = self.anchors(c)
            c.d = c.server["g"][:, None].expand_as(x)  # d_{i,-1}, and x_{i,0} = x_{i,-1}
        elif not c.anchor.all():
            c.d = c.d - grad(c.before) + grad(x)
        c.before = x
        return torch.where(c.anchor[..., None], x, x - c.lr * c.d)

    def message(self, x, c):
        sent = c.x0 - x
        if c.anchor.any():
            sent = torch.where(c.anchor[..., None], c.full_grad(c.x0), sent)
        return {"sent": c.send(sent)}

    def server_step(self, theta, message, c):
        sent, anchor = message["sent"], c.anchor[..., None]
        news = torch.where(anchor, sent - c.client["v"], 0)
        c.client["v"] = c.client["v"] + news
        c.server["g"] = c.server["g"] + c.sum(news) / c.n_clients
        miners = (c.present & ~c.anchor).sum(1, keepdim=True).clamp(min=1)
        return theta - per_run(self.eta, theta) * c.sum(torch.where(anchor, 0, sent)) / miners


class FedPAGE(Method):
    """FedPAGE: in a round where everyone comes, full gradients; otherwise a recursion over rounds.

    With all clients, and in round 0, g_t is the mean of grad f_i(x_t). In other rounds a client
    walks K steps from d_{i,0} = g_{t-1} + grad f_i(x_t) - grad f_i(x_{t-1}), on its whole data,
    by FedAMD's recursion, and g_t is the mean of (x_t - x_{i,K}) / (eta_l K). The server moves by
    x_{t+1} = x_t - eta eta_l g_t.

    Parameters
    ----------
    lr : float or sequence of S floats
        Local rate eta_l.
    eta : float or sequence of S floats
        Server rate over eta_l: with eta = K the server goes as far as the clients.
    """

    downloads = ("g",)  # and x_{t-1}, which a client can tell from x_t and g_{t-1}

    def server_state(self, zeros):
        return {"g": zeros, "last": zeros}

    def local_step(self, x, grad, c):
        if c.k == 0:
            everyone = (c.present.sum(1) == c.n_clients) | (c.t == 0)
            c.full = everyone[:, None, None]
            c.own = c.full_grad(x)
            if everyone.all():
                return x
            last = c.server["last"][:, None].expand_as(x)
            c.d = c.server["g"][:, None] + c.own - c.full_grad(last)
        elif c.full.all():
            return x
        else:
            c.d = c.d - grad(c.before) + grad(x)
        c.before = x
        return x - c.lr * c.d

    def message(self, x, c):
        return {"sent": c.send(torch.where(c.full, c.own, (c.x0 - x) / (c.lr * c.K)))}

    def server_step(self, theta, message, c):
        c.server["g"], c.server["last"] = c.mean(message["sent"]), theta
        return theta - (per_run(self.eta, c.x0) * c.lr).view(-1, 1) * c.server["g"]


class Census(Sample):
    """Everyone in round 0, and again with some probability; otherwise a sample.

    Parameters
    ----------
    active : int or sequence of S ints
        How many clients are sampled.
    chance : float
        Probability of a round with everyone. The draw is the same in all runs.
    seed : int
        For that draw.
    """

    def __init__(self, active, chance=0.0, seed=0):
        super().__init__(active)
        self.chance, self.seed = _probability(chance), seed

    def __call__(self, generators, n_clients, t):
        if t == 0 or np.random.default_rng([self.seed, 6, t]).random() < self.chance:
            return np.ones((len(generators), n_clients), dtype=bool)
        active = np.broadcast_to(self.active, len(generators)).tolist()
        samples = [Sample(a)([g], n_clients, t) for a, g in zip(active, generators)]
        return np.concatenate(samples)


class Regression:
    """Linear models on clients' own samples: an objective with small batches and exact gradients.

    The loss of a sample (a, y) is log(1 + exp(-y a'x)) with y = -1 or 1, to which
    mu sum_d x_d^2 / (1 + x_d^2) is added (not convex); or, for ``squares``, (a'x - y)^2 / 2.

    Parameters
    ----------
    a : torch.Tensor, shape [S, clients, n, d]
        Inputs.
    y : torch.Tensor, shape [S, clients, n]
        Targets.
    batch_size : int
        Drawn with replacement; ``batch_size=n`` is all samples, once.
    squares : bool
    mu : float
        Weight of the regularizer.
    """

    def __init__(self, a, y, batch_size, squares=False, mu=0.0):
        self.a, self.y, self.batch_size, self.squares, self.mu = a, y, batch_size, squares, mu
        self.n_clients = a.shape[1]
        self._runs = torch.arange(len(a), device=a.device)[:, None]

    @classmethod
    def random(cls, seeds, n_clients, n, d, batch_size, heterogeneity=1.0, device="cpu", **options):
        """Draw problems, one a seed, whose clients differ in inputs and in the weights behind them.

        Parameters
        ----------
        seeds : sequence of int
        n_clients, n, d, batch_size : int
            n samples a client, in d dimensions.
        heterogeneity : float
            Standard deviation of a client's own weights, and half that of its mean input.
        **options
            Passed to `Regression`.
        """
        problems = []
        for seed in seeds:
            g = np.random.default_rng([seed, 7])
            weights = g.normal(size=d) + heterogeneity * g.normal(size=(n_clients, d))
            center = 0.5 * heterogeneity * g.normal(size=(n_clients, 1, d))
            a = (center + g.normal(size=(n_clients, n, d))) / np.sqrt(d)
            y = (a @ weights[..., None])[..., 0] + 0.3 * g.normal(size=(n_clients, n))
            problems.append((a, y if options.get("squares") else np.where(y > 0, 1.0, -1.0)))
        a, y = (torch.from_numpy(np.stack(v)).to(device) for v in zip(*problems))
        return cls(a, y, batch_size, **options)

    def batches(self, active, steps, seeds, t):
        """Draw the mini-batches of one round: a list of `steps` pairs ([S, A, B, d], [S, A, B])."""
        n, size = self.y.shape[-1], self.batch_size
        if size == n:
            return [self._data(active)] * steps
        shape = (steps, self.n_clients, size)
        at = per_seed(seeds, lambda s: np.random.default_rng([s, 2, t]).integers(n, size=shape))
        at = at.transpose(0, 1).to(self.y.device)
        runs, rows = self._runs[..., None], active[..., None]
        at = at[:, self._runs, active]  # [K, S, A, B]
        return [(self.a[runs, rows, i], self.y[runs, rows, i]) for i in at]

    def grad(self, x, active, batch):
        """Return the mini-batch gradients: [S, A, d]."""
        a, y = batch
        z = (a @ x[..., None])[..., 0]
        slope = z - y if self.squares else -y * torch.sigmoid(-y * z)
        g = (slope[..., None, :] @ a)[..., 0, :] / y.shape[-1]
        return g + 2 * self.mu * x / (1 + x * x).square()

    def full_grad(self, x, active):
        """Return the gradients of the clients' whole losses: [S, A, d]."""
        return self.grad(x, active, self._data(active))

    def loss(self, x, active, batch):
        """Return the mini-batch losses: [S, A]."""
        a, y = batch
        z = (a @ x[..., None])[..., 0]
        fit = (z - y).square() / 2 if self.squares else torch.nn.functional.softplus(-y * z)
        return fit.mean(-1) + self.mu * (x * x / (1 + x * x)).sum(-1)

    def _data(self, active):
        return self.a[self._runs, active], self.y[self._runs, active]


def gradient(objective, theta):
    """Return the exact gradient of the mean client loss at theta [S, P]."""
    clients = torch.arange(objective.n_clients, device=theta.device).expand(len(theta), -1)
    return objective.full_grad(theta[:, None].expand(-1, objective.n_clients, -1), clients).mean(1)


def _probability(p):
    if not ((w := torch.as_tensor(p, dtype=torch.float64)) >= 0).all() or (w > 1).any():
        raise ValueError(f"a probability must lie in [0, 1], got {p}")
    return p
