"""Rounds of federated learning over stacked clients.

Two leading axes carry everything: S independent runs (seeds, or seeds x hyperparameters) and the
clients of a round. All local steps of all sampled clients of all runs are one computation on a
tensor x of shape [S, A, P]: A active clients, P parameters. A method is its difference from this
loop: what a client remembers, its local step, what it sends, and what the server makes of it.
"""

from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch

from .. import data
from ..stack import cross_entropy


class Method:
    """FedAvg, and the base of every other method (McMahan et al. 2017, Algorithm 1).

    Tensors carry the runs on their first axis: ``x`` [S, A, P] on clients, ``theta`` [S, P] on the
    server. Hyperparameters are numbers, or sequences of S numbers, one a run.

    The context ``c`` of a round holds ``x0`` [S, A, P] (the model that clients received),
    ``client`` and ``server`` (the state, by name; assign to change it), ``lr`` (this round's local
    rate), ``K`` (local steps), ``t`` (round, from 0), ``active`` [S, A] and ``n_clients``.

    Parameters
    ----------
    lr : float or sequence of S floats
        Local learning rate.
    """

    def __init__(self, lr):
        self.lr = lr

    def client_state(self, zeros):
        """Return what every client remembers: name -> tensor; `zeros` is [S, clients, P]."""
        return {}

    def server_state(self, zeros):
        """Return what the server remembers besides theta: name -> tensor; `zeros` is [S, P]."""
        return {}

    def local_step(self, x, grad, c):
        """Return x after one local step; ``grad(z)`` is the gradient at z on this step's batch."""
        return x - c.lr * grad(x)

    def message(self, x, c):
        """Return what the clients send after K steps: name -> tensor [S, A, ...]."""
        return {"x": x}

    def server_step(self, theta, message, c):
        """Return the next global model [S, P]."""
        return message["x"].mean(1)


class History(NamedTuple):
    """What `federate` returns.

    Attributes
    ----------
    theta : torch.Tensor, shape [S, P]
        The final global models.
    metric : torch.Tensor, shape [S, T]
        ``metric(theta)`` after the rounds listed in `rounds`.
    rounds : torch.Tensor, shape [T]
        Number of communication rounds at each point.
    drift : torch.Tensor, shape [S, T]
        Mean over active clients of ||x_{i,K} - x^t||^2 in that round.
    client, server : dict
        Final state, by name.
    upload : int
        Bytes that a client sends per round it takes part in.
    """

    theta: torch.Tensor
    metric: torch.Tensor
    rounds: torch.Tensor
    drift: torch.Tensor
    client: dict
    server: dict
    upload: int


def federate(
    method, objective, theta, *, rounds, steps, seeds, active=None, decay=1.0, metric=None, every=1
):
    """Run a federated method on S runs at once.

    Parameters
    ----------
    method : Method
    objective : Quadratics, Classification or alike
        Has ``n_clients``, ``batches(active, steps, seeds, t)`` and ``grad(x, active, batch)``.
    theta : torch.Tensor, shape [S, P]
        Initial models. Left unchanged.
    rounds, steps : int
        Communication rounds T and local steps K.
    seeds : sequence of S ints
        Draw clients and batches; runs with equal seeds see the same ones, whatever the method.
    active : int, optional
        Clients sampled uniformly without replacement each round. Default: all.
    decay : float
        Factor on the local learning rate after each round.
    metric : callable, optional
        Maps theta [S, P] to a tensor [S]; recorded every `every` rounds and after the last.

    Returns
    -------
    History

    Raises
    ------
    ValueError
        If `active` is not between 1 and the number of clients, or lengths do not agree.
    """
    n = objective.n_clients
    active = n if active is None else active
    if not 1 <= active <= n:
        raise ValueError(f"active must be between 1 and the {n} clients, got {active}")
    if len(seeds) != len(theta):
        raise ValueError(f"{len(seeds)} seeds for {len(theta)} runs")
    theta = theta.clone()
    S, P = theta.shape
    runs = torch.arange(S, device=theta.device)[:, None]
    store = method.client_state(theta.new_zeros(S, n, P))
    c = SimpleNamespace(server=method.server_state(torch.zeros_like(theta)), K=steps, n_clients=n)
    generators = [np.random.default_rng([seed, 0]) for seed in seeds]
    metrics, drifts, at, upload = [], [], [], 0
    for c.t in range(rounds):
        if active < n:
            chosen = np.stack([g.permutation(n)[:active] for g in generators])
            c.active = torch.from_numpy(chosen).to(theta.device)
        else:
            c.active = torch.arange(n, device=theta.device).expand(S, n)
        c.client = {k: v[runs, c.active] for k, v in store.items()}
        c.lr = per_run(method.lr, theta) * decay**c.t
        c.x0 = theta[:, None].expand(S, active, P)
        x = c.x0
        for batch in objective.batches(c.active, steps, seeds, c.t):
            x = method.local_step(x, lambda z, b=batch: objective.grad(z, c.active, b), c)
        drift = (x - c.x0).square().sum(-1).mean(1)
        message = method.message(x, c)
        theta = method.server_step(theta, message, c)
        for k, v in store.items():
            v[runs, c.active] = c.client[k]
        if (c.t + 1) % every == 0 or c.t + 1 == rounds:
            at.append(c.t + 1)
            drifts.append(drift)
            metrics.append(metric(theta) if metric else drift)
        upload = sum(m[0, 0].numel() * m.element_size() for m in message.values())
    return History(
        theta, torch.stack(metrics, 1), torch.tensor(at), torch.stack(drifts, 1), store, c.server,
        upload,
    )  # fmt: skip


def per_run(value, like):
    """Turn a number, or one number per run, into something that multiplies [S, A, P] tensors."""
    value = torch.as_tensor(value, dtype=like.dtype, device=like.device)
    return value if value.ndim == 0 else value[:, None, None]


class Quadratics:
    """Client losses f_i(x) = x'A_i x / 2 - b_i'x with exact gradients and a known optimum.

    Parameters
    ----------
    A : torch.Tensor, shape [S, clients, d, d]
        Symmetric positive definite.
    b : torch.Tensor, shape [S, clients, d]
    """

    def __init__(self, A, b):
        self.A, self.b = A, b
        self.n_clients = A.shape[1]
        self._runs = torch.arange(len(A), device=A.device)[:, None]

    @classmethod
    def random(cls, seeds, n_clients, d, heterogeneity=1.0, device="cpu", dtype=torch.float64):
        """Draw problems whose clients differ in curvature and in optimum.

        Parameters
        ----------
        seeds : sequence of int
            One problem a seed.
        n_clients, d : int
        heterogeneity : float
            Scales each client's own optimum; at 0 all optima are zero.
        """
        problems = []
        for seed in seeds:
            g = np.random.default_rng(seed)
            root = g.normal(size=(n_clients, d, d)) / np.sqrt(d)
            A = root @ root.transpose(0, 2, 1) + 0.5 * np.eye(d)
            own = heterogeneity * g.normal(size=(n_clients, d, 1))
            problems.append((A, (A @ own)[..., 0]))
        A, b = (torch.from_numpy(np.stack(v)).to(device, dtype) for v in zip(*problems))
        return cls(A, b)

    def optimum(self):
        """Return the minimizer of the mean loss, shape [S, d], by a linear solve."""
        return torch.linalg.solve(self.A.mean(1), self.b.mean(1))

    def loss(self, theta):
        """Return the mean client loss at theta [S, d], minus its minimum: shape [S]."""
        e = theta - self.optimum()
        return 0.5 * torch.einsum("sd,sde,se->s", e, self.A.mean(1), e)

    def batches(self, active, steps, seeds, t):
        """Return one (empty) batch a step, with the active clients' matrices at hand."""
        return [(self.A[self._runs, active], self.b[self._runs, active])] * steps

    def grad(self, x, active, batch):
        """Return A_i x - b_i for the active clients: [S, A, d]."""
        A, b = batch
        return (x[..., None, :] @ A)[..., 0, :] - b  # A is symmetric; rows multiply faster


class Classification:
    """Softmax regression losses of any stackable model on partitioned data.

    Parameters
    ----------
    stack : miniature.stack.Stack
        Gives the architecture; its rows are the usual start of `federate`.
    x, y : torch.Tensor, shapes [B, ...] and [B]
        The training data, once, on the stack's device.
    parts : list (runs) of list (clients) of torch.Tensor
        Index sets of each client in each run, as the partitions of `miniature.data` return them.
    batch_size : int
    weight_decay : float
        Adds ``weight_decay * theta`` to gradients.
    """

    def __init__(self, stack, x, y, parts, batch_size, weight_decay=0.0):
        self.stack, self.x, self.y = stack, x, y
        self.batch_size, self.weight_decay = batch_size, weight_decay
        self.n_clients = len(parts[0])
        if any(len(run) != self.n_clients for run in parts):
            raise ValueError("every run must have the same number of clients")
        self._sizes = torch.tensor([[len(p) for p in run] for run in parts])
        self._index = torch.zeros(len(parts), self.n_clients, int(self._sizes.max()), dtype=int)
        for r, run in enumerate(parts):
            for i, part in enumerate(run):
                self._index[r, i, : len(part)] = part
        self._runs = torch.arange(len(parts))[:, None]

    def batches(self, active, steps, seeds, t):
        """Draw the mini-batches of one round: a list of `steps` pairs (x, y), first axis S * A."""
        active = active.cpu()
        # A stream of its own for every run seed, client and round.
        streams = [
            (seed * 1_000_003 + int(i)) * 1_000_003 + t + 1
            for seed, row in zip(seeds, active)
            for i in row
        ]
        sizes = self._sizes[self._runs, active].flatten()
        at = data.batches(sizes, self.batch_size, steps, streams)  # [S * A, K, B]
        own = self._index[self._runs, active].flatten(0, 1)  # [S * A, largest client]
        index = own.gather(1, at.flatten(1)).view(at.shape).transpose(0, 1).to(self.x.device)
        return [(self.x[i], self.y[i]) for i in index]

    def grad(self, x, active, batch):
        """Return the mini-batch gradients of the active clients: [S, A, P]."""
        theta = x.reshape(-1, x.shape[-1])
        g, _ = self.stack.grad(_loss, *batch, theta=theta)
        if self.weight_decay:
            g.add_(theta, alpha=self.weight_decay)
        return g.view(x.shape)


def _loss(model, x, y):
    return cross_entropy(model(x), y)
