"""What clients minimize: quadratics with a known optimum, and any model on partitioned data."""

import numpy as np
import torch

from .. import data
from ..stack import class_loss


class Quadratics:
    """Client losses f_i(x) = x'A_i x / 2 - b_i'x with exact (or noisy) gradients.

    Parameters
    ----------
    A : torch.Tensor, shape [S, clients, d, d]
        Symmetric positive definite.
    b : torch.Tensor, shape [S, clients, d]
    noise : float
        Standard deviation of Gaussian gradient noise, per coordinate.
    """

    def __init__(self, A, b, noise=0.0):
        self.A, self.b, self.noise = A, b, noise
        self.n_clients = A.shape[1]
        self._runs = torch.arange(len(A), device=A.device)[:, None]

    @classmethod
    def random(
        cls, seeds, n_clients, d, heterogeneity=1.0, noise=0.0, device="cpu", dtype=torch.float64
    ):
        """Draw problems whose clients differ in curvature and in optimum.

        Parameters
        ----------
        seeds : sequence of int
            One problem a seed.
        n_clients, d : int
        heterogeneity : float
            Scales each client's own optimum; at 0 all optima are zero.
        noise : float
        """
        problems = []
        for seed in seeds:
            g = np.random.default_rng(seed)
            root = g.normal(size=(n_clients, d, d)) / np.sqrt(d)
            A = root @ root.transpose(0, 2, 1) + 0.5 * np.eye(d)
            own = heterogeneity * g.normal(size=(n_clients, d, 1))
            problems.append((A, (A @ own)[..., 0]))
        A, b = (torch.from_numpy(np.stack(v)).to(device, dtype) for v in zip(*problems))
        return cls(A, b, noise)

    def optimum(self, weights=None):
        """Return the minimizer of the (weighted) mean loss, shape [S, d], by a linear solve.

        Parameters
        ----------
        weights : torch.Tensor, shape [clients] or [S, clients], optional
            Weight of each client's loss. Default: equal.
        """
        if weights is None:
            return torch.linalg.solve(self.A.mean(1), self.b.mean(1))
        w = weights.expand(self.A.shape[:2])
        return torch.linalg.solve(
            torch.einsum("sc,scde->sde", w, self.A), torch.einsum("sc,scd->sd", w, self.b)
        )

    def excess(self, theta):
        """Return the mean client loss at theta [S, d] minus its minimum: shape [S]."""
        e = theta - self.optimum()
        return 0.5 * torch.einsum("sd,sde,se->s", e, self.A.mean(1), e)

    def batches(self, active, steps, seeds, t):
        """Return one batch a step: the active clients' matrices, and noise where there is any."""
        A, b = self.A[self._runs, active], self.b[self._runs, active]
        if not self.noise:
            return [(A, b)] * steps
        shape = (steps, *b.shape[1:])
        noise = per_seed(seeds, lambda s: np.random.default_rng([s, 2, t]).normal(size=shape))
        noise = noise.transpose(0, 1).to(b) * self.noise
        return [(A, b + z) for z in noise]

    def grad(self, x, active, batch):
        """Return A_i x - b_i for the active clients: [S, A, d]."""
        A, b = batch
        return (x[..., None, :] @ A)[..., 0, :] - b  # A is symmetric; rows multiply faster

    def full_grad(self, x, active):
        """Return the gradients of the whole (noiseless) client losses: [S, A, d]."""
        return self.grad(x, active, (self.A[self._runs, active], self.b[self._runs, active]))

    def loss(self, x, active, batch):
        """Return the client losses: [S, A]."""
        A, b = batch
        return ((0.5 * (x[..., None, :] @ A)[..., 0, :] - b) * x).sum(-1)


class Classification:
    """Cross-entropy of any stackable model on partitioned data.

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
    relabel : tuple (int, torch.Tensor), optional
        Label flipping: the first clients, as many as the int says, see label ``table[y]``.
    replace : bool
        Draw batches with replacement, for all clients of a run at once, instead of going through
        the data in shuffled epochs. For small models drawing the epochs takes half of the time.

    Raises
    ------
    ValueError
        If the runs have different numbers of clients, or a client has no data.
    """

    def __init__(
        self, stack, x, y, parts, batch_size, weight_decay=0.0, relabel=None, replace=False
    ):
        self.stack, self.x, self.y, self.relabel, self.replace = stack, x, y, relabel, replace
        self.batch_size, self.weight_decay = batch_size, weight_decay
        self.n_clients = len(parts[0])
        if any(len(run) != self.n_clients for run in parts):
            raise ValueError("every run must have the same number of clients")
        self._sizes = torch.tensor([[len(p) for p in run] for run in parts])
        if (self._sizes == 0).any():
            raise ValueError("a client has no data")
        self._index = torch.zeros(len(parts), self.n_clients, int(self._sizes.max()), dtype=int)
        for r, run in enumerate(parts):
            for i, part in enumerate(run):
                self._index[r, i, : len(part)] = part
        self._runs = torch.arange(len(parts))[:, None]

    def batches(self, active, steps, seeds, t):
        """Draw the mini-batches of one round: a list of `steps` pairs (x, y), first axis S * A."""
        active = active.cpu()
        draw = self._with_replacement if self.replace else self._in_epochs
        own = self._index[self._runs, active].flatten(0, 1)  # [S * A, largest client]
        at = draw(active, steps, seeds, t)  # [S * A, K, B]
        index = own.gather(1, at.flatten(1)).view(at.shape).transpose(0, 1).to(self.x.device)
        return [(_rows(self.x, i), self._labels(i, active)) for i in index]

    def _in_epochs(self, active, steps, seeds, t):
        # A stream of its own for every run seed, client and round; runs with equal seeds share it.
        streams = [
            (seed * 1_000_003 + i) * 1_000_003 + t + 1
            for seed, row in zip(seeds, active.tolist())
            for i in row
        ]
        rows = list(zip(self._sizes[self._runs, active].flatten().tolist(), streams))
        place = {row: k for k, row in enumerate(dict.fromkeys(rows))}
        sizes, streams = zip(*place)
        return data.batches(sizes, self.batch_size, steps, streams)[[place[row] for row in rows]]

    def _with_replacement(self, active, steps, seeds, t):
        # A stream for every run seed and round. Steps come first: fewer see the same batches.
        shape = (steps, self.n_clients, self.batch_size)
        u = per_seed(seeds, lambda s: np.random.default_rng([s, 5, t]).random(shape, np.float32))
        u = u[self._runs, :, active]  # [S, A, K, B]
        return (u * self._sizes[self._runs, active][..., None, None]).long().flatten(0, 1)

    def _labels(self, index, active):
        y = self.y[index]
        if self.relabel is None:
            return y
        malicious, table = self.relabel
        lies = (active.flatten() < malicious).to(y.device)
        return torch.where(lies[:, None], table.to(y.device)[y], y)

    def grad(self, x, active, batch):
        """Return the mini-batch gradients of the active clients: [S, A, P]."""
        theta = x.reshape(-1, x.shape[-1])
        g, _ = self.stack.grad(class_loss, *batch, theta=theta)
        if self.weight_decay:
            g.add_(theta, alpha=self.weight_decay)
        return g.view(x.shape)

    def loss(self, x, active, batch):
        """Return the mini-batch losses of the active clients: [S, A]."""
        losses = self.stack.map(class_loss, *batch, theta=x.reshape(-1, x.shape[-1]))
        return losses.view(x.shape[:2])

    def full_grad(self, x, active):
        """Return the gradients of the clients' whole losses: [S, A, P]."""
        rows = active.cpu()
        index = self._index[self._runs, rows].flatten(0, 1).to(self.x.device)
        sizes = self._sizes[self._runs, rows].flatten().to(self.x.device)
        real = torch.arange(index.shape[1], device=self.x.device) < sizes[:, None]
        weight = real.to(x.dtype) / sizes[:, None]
        theta = x.reshape(-1, x.shape[-1])
        g, _ = self.stack.grad(
            _weighted_loss, _rows(self.x, index), self._labels(index, rows), weight, theta=theta
        )
        if self.weight_decay:
            g.add_(theta, alpha=self.weight_decay)
        return g.view(x.shape)


def per_seed(seeds, draw):
    """Return what every run draws, ``draw(seed)``, stacked; runs with equal seeds share it."""
    drawn = {s: draw(s) for s in set(seeds)}
    return torch.from_numpy(np.stack([drawn[s] for s in seeds]))


def _rows(x, index):
    """Return x[index], in a fifth of the time."""
    return x.index_select(0, index.flatten()).unflatten(0, index.shape)


def _weighted_loss(model, x, y, weight):
    logits = model(x)
    chosen = logits.gather(-1, y[:, None])[:, 0]
    return ((logits.logsumexp(-1) - chosen) * weight).sum()
