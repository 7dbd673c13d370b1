"""Rounds of federated learning over stacked clients.

Two leading axes carry everything: S independent runs (seeds, or seeds x hyperparameters) and the
clients of a round. All local steps of all clients of all runs are one computation on a tensor x of
shape [S, A, P]: A clients that take part, P parameters. A method is its difference from this loop:
what a client remembers, its local step, what it sends, and what the server makes of it.

Who takes part and when (`participation`), what the wire does (`compression`), who lies and how the
server defends itself (`robust`), and noise for privacy (`privacy`) are arguments of `federate`.
"""

from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch

from .compression import Identity
from .participation import Sample
from .robust import mean


class Method:
    """FedAvg, and the base of every other method (McMahan et al. 2017, Algorithm 1).

    Tensors carry the runs on their first axis: ``x`` [S, A, P] on clients, ``theta`` [S, P] on the
    server. Hyperparameters are numbers, or sequences of S numbers, one a run.

    The context ``c`` of a round holds

    - ``x0`` [S, A, P], the model that each client started from; ``age`` [S, A], how many server
      steps old it is (zero unless clients are slow);
    - ``client`` and ``server``, the state by name (assign to change it);
    - ``lr``, this round's local rate; ``K``, the number of local steps (an int, or [S, A, 1]);
      ``k``, the current one; ``t``, the round, from 0; ``seeds``, those of the runs, for what a
      method draws by itself;
    - ``active`` [S, A], the clients' indices, and ``present`` [S, A], false where a row is padding;
      ``n_clients``;
    - ``send(v)``, what the receiver gets when clients send v [S, A, P];
    - ``mean(v)``, the server's aggregate [S, P] of what was sent, and ``sum(v)``, the plain sum;
    - ``full_grad(x)``, the gradients of the clients' whole losses, where the objective has them.

    Parameters
    ----------
    lr : float or sequence of S floats
        Local learning rate.
    eta : float or sequence of S floats
        Server rate: the step along the mean of what the clients sent.
    """

    # Vectors besides theta that clients download each round, by their name in the server state.
    downloads = ()
    # Whether one client with one local step is plain gradient descent.
    is_sgd = True

    def __init__(self, lr, eta=1.0):
        self.lr, self.eta = lr, eta

    def client_state(self, zeros):
        """Return what every client remembers: name -> tensor; `zeros` is [S, clients, P].

        `zeros` takes no memory; do not write into it.
        """
        return {}

    def server_state(self, zeros):
        """Return what the server remembers besides theta: name -> tensor; `zeros` is [S, P]."""
        return {}

    def local_step(self, x, grad, c):
        """Return x after one local step; ``grad(z)`` is the gradient at z on this step's batch."""
        return x - c.lr * grad(x)

    def message(self, x, c):
        """Return what the clients send after K steps: name -> ``c.send(...)``."""
        return {"delta": c.send(x - c.x0)}

    def server_step(self, theta, message, c):
        """Return the next global model [S, P]."""
        return theta + per_run(self.eta, theta) * c.mean(message["delta"])


class History(NamedTuple):
    """What `federate` returns; T recorded rounds.

    Attributes
    ----------
    theta : torch.Tensor, shape [S, P]
        The final global models.
    metric : torch.Tensor, shape [S, T] or [S, T, ...]
        ``metric(theta)`` after the rounds listed in `rounds`.
    rounds : torch.Tensor, shape [T]
        Number of server steps at each point.
    time : torch.Tensor, shape [T]
        Wall clock of the participation's event simulation, else `rounds`.
    drift : torch.Tensor, shape [S, T]
        Mean over present clients of ||x_{i,K} - x_{i,0}||^2 in that round.
    up, down : torch.Tensor, shape [S, T]
        Bytes sent so far by all clients together, and to them.
    upload : int
        Bytes that one client sends in a round it takes part in.
    client, server : dict
        Final state, by name.
    """

    theta: torch.Tensor
    metric: torch.Tensor
    rounds: torch.Tensor
    time: torch.Tensor
    drift: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor
    upload: int
    client: dict
    server: dict


def federate(
    method,
    objective,
    theta,
    *,
    rounds,
    steps,
    seeds,
    active=None,
    decay=1.0,
    compress=None,
    compress_down=None,
    attack=None,
    aggregate=mean,
    privacy=None,
    metric=None,
    every=1,
    progress=False,
):
    """Run a federated method on S runs at once.

    Parameters
    ----------
    method : Method
    objective : Quadratics, Classification or alike
        Has ``n_clients``, ``batches(active, steps, seeds, t)`` and ``grad(x, active, batch)``;
        may have ``loss(x, active, batch)`` and ``full_grad(x, active)``.
    theta : torch.Tensor, shape [S, P]
        Initial models. Left unchanged.
    rounds : int
        Server steps T.
    steps : int or array_like of int, shape [clients] or [S, clients]
        Local steps K, the same for all or one per client.
    seeds : sequence of S ints
        Draw clients, batches and noise; runs with equal seeds see the same ones, whatever the
        method and whatever else is in the stack.
    active : int or participation, optional
        How many clients are sampled each round, or who takes part (see
        `miniature.federated.participation`). Default: all.
    decay : float
        Factor on the local learning rate after each round.
    compress, compress_down : compressor, optional
        Applied to what clients send; to the change of the model that the server broadcasts.
    attack : miniature.federated.robust.Attack, optional
    aggregate : callable
        The rule behind ``c.mean``: maps ([S, A, P], present [S, A]) to [S, P].
    privacy : miniature.federated.privacy.Gaussian, optional
        Clips what clients send and adds noise to ``c.mean``.
    metric : callable, optional
        Maps theta [S, P] to a tensor [S, ...]; recorded every `every` rounds and after the last.
    progress : bool
        Show a progress bar.

    Returns
    -------
    History

    Raises
    ------
    ValueError
        If the number of active clients, of seeds or of steps does not fit, or if a message holds
        a tensor that did not go through ``c.send``.
    """
    n = objective.n_clients
    if len(seeds) != len(theta):
        raise ValueError(f"{len(seeds)} seeds for {len(theta)} runs")
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    who = Sample(n if active is None else active) if not callable(active) else active
    stale = getattr(who, "stale", False)
    if stale and compress_down is not None:
        raise ValueError("compress_down needs clients that start from the current model")
    wire = _Wire(seeds, theta, compress or Identity(), attack, privacy)
    theta = theta.clone()
    S = len(theta)
    runs = torch.arange(S, device=theta.device)[:, None]
    K = torch.as_tensor(steps, device=theta.device)
    if (K.ndim and K.shape[-1] != n) or (K < 1).any():
        raise ValueError(f"steps must be positive, one number or one for each of {n} clients")
    zeros = theta.new_zeros(()).expand(S, n, theta.shape[1])  # takes no memory until copied
    store = {k: v.clone() for k, v in method.client_state(zeros).items()}
    c = SimpleNamespace(
        server=method.server_state(torch.zeros_like(theta)),
        n_clients=n,
        seeds=seeds,
        send=wire.send,
    )
    held = theta[:, None].repeat(1, n, 1) if stale else None  # the model that each client has
    since = torch.zeros(S, n, dtype=torch.long, device=theta.device)
    public = theta.clone()  # the model as clients know it, when the downlink is compressed
    generators = [np.random.default_rng([seed, 0]) for seed in seeds]
    down = theta.new_zeros(S, dtype=torch.float64)
    extra_down = len(method.downloads) * Identity().nbytes(theta)
    each_down = Identity().nbytes(theta) + extra_down
    recorded = {k: [] for k in ("metric", "rounds", "time", "drift", "up", "down")}
    for t in _bar(rounds, progress):
        present = who(generators, n, t)
        c.t, c.active, c.present = t, *_rows(present, theta.device)
        wire.open(c)
        if compress_down is not None and t > 0:
            change = theta - public
            public = public + compress_down(change[:, None], wire.draw_once)[:, 0]
            each_down = compress_down.nbytes(change) + len(method.downloads) * Identity().nbytes(
                theta
            )
        else:
            public = theta
        down += c.present.sum(1) * each_down
        c.client = {k: v[runs, c.active] for k, v in store.items()}
        before = dict(c.client)
        c.lr = per_run(method.lr, zeros) * decay**t
        c.x0 = held[runs, c.active] if stale else public[:, None].expand(-1, c.active.shape[1], -1)
        c.age = t - since[runs, c.active] if stale else torch.zeros_like(c.active)
        c.K = int(K) if K.ndim == 0 else K.expand(S, n)[runs, c.active][..., None].to(theta)
        c.mean = lambda v: wire.aggregate(v, aggregate)
        c.sum = lambda v: (v * c.present[..., None]).sum(1)
        c.full_grad = lambda x: objective.full_grad(x, c.active)

        x = local_round(method, objective, c, int(K.max()), seeds)
        message = method.message(x, c)
        wire.check(message)
        theta = method.server_step(theta, message, c)

        for k, v in store.items():
            if c.client[k] is not before[k]:
                shape = c.present.shape + (1,) * (v.ndim - 2)
                v[runs, c.active] = torch.where(c.present.view(shape), c.client[k], before[k])
        if stale:
            new = torch.where(c.present[..., None], theta[:, None], c.x0)
            held[runs, c.active] = new
            since[runs, c.active] = torch.where(c.present, t + 1, since[runs, c.active])
        if (t + 1) % every == 0 or t + 1 == rounds:
            here = c.present.sum(1).clamp(min=1)
            drift = ((x - c.x0).square().sum(-1) * c.present).sum(1) / here
            times = getattr(who, "times", None)
            for name, value in {
                "metric": metric(theta) if metric else drift,
                "rounds": torch.tensor(t + 1),
                "time": torch.tensor(t + 1.0 if times is None else times[t], dtype=torch.float64),
                "drift": drift,
                "up": wire.bytes,
                "down": down,
            }.items():
                recorded[name].append(value.clone())
    stacked = {k: torch.stack(v, dim=0 if v[0].ndim == 0 else 1) for k, v in recorded.items()}
    return History(theta=theta, client=store, server=c.server, upload=wire.each, **stacked)


def local_round(method, objective, c, steps, seeds):
    """Run the local steps of one round and return x [S, A, P]; `c` is the round's context."""
    x = c.x0
    for k, batch in enumerate(objective.batches(c.active, steps, seeds, c.t)):
        c.k = k
        x = _masked(method, x, _Batch(objective, c.active, batch), c)
    return x


def per_run(value, like):
    """Turn a number, or one number per run, into something that multiplies `like`, [S, ...]."""
    value = torch.as_tensor(value, dtype=like.dtype, device=like.device)
    return value if value.ndim == 0 else value.view(-1, *[1] * (like.ndim - 1))


class _Batch:
    """One local step's batch: called for its gradient, asked for its loss."""

    def __init__(self, objective, active, batch):
        self._objective, self._active, self.batch = objective, active, batch

    def __call__(self, x):
        return self._objective.grad(x, self._active, self.batch)

    def loss(self, x):
        """Return the losses [S, A] at x on the same batch."""
        return self._objective.loss(x, self._active, self.batch)


class _Wire:
    """Everything between clients and server: compression, attacks, clipping, noise, byte counts."""

    def __init__(self, seeds, theta, compressor, attack, privacy):
        self._compressor, self._attack, self._privacy = compressor, attack, privacy
        self._generators = [torch.Generator().manual_seed(seed * 1_000_003 + 1) for seed in seeds]
        self.bytes = theta.new_zeros(len(theta), dtype=torch.float64)

    def open(self, c):
        """Start a round."""
        self._c, self._sent, self.each = c, [], 0
        counts = c.present.sum(1).tolist()
        self.draw = _Draw(self._generators, counts)
        self.draw_once = _Draw(self._generators, [1] * len(counts))

    def send(self, v, compressor=None):
        """Return what the server receives when clients send v [S, A, P]; padding rows are zero."""
        compressor = compressor or self._compressor
        if self._privacy:
            v = self._privacy.clip(v)
        if self._attack:
            v = self._attack(v, self._c.active, self.draw)
        v = compressor(v, self.draw) * self._c.present[..., None]
        self.each += compressor.nbytes(v)
        self.bytes += self._c.present.sum(1) * compressor.nbytes(v)
        self._sent.append(v)
        return v

    def aggregate(self, v, rule):
        total = rule(v, self._c.present)
        if self._privacy:
            total = self._privacy.add_noise(total, self._c.present.sum(1), self.draw_once)
        return total

    def check(self, message):
        for name, v in message.items():
            if not any(v is s for s in self._sent):
                raise ValueError(f"message {name!r} did not go through c.send")


class _Draw:
    """Random numbers for [S, A, P] tensors, each run from a generator of its own."""

    def __init__(self, generators, counts):
        self._generators, self._counts = generators, counts

    def uniform(self, like):
        """Return uniform numbers in [0, 1) of the shape of `like`."""
        return self._fill(like, torch.rand)

    def normal(self, like):
        """Return standard normal numbers of the shape of `like`."""
        return self._fill(like, torch.randn)

    def _fill(self, like, kind):
        out = torch.zeros(like.shape, dtype=like.dtype)
        for row, generator, n in zip(out, self._generators, self._counts):
            row[:n] = kind(n, *like.shape[2:], generator=generator, dtype=like.dtype)
        return out.to(like.device)


def _rows(present, device):
    """Turn who is present [S, clients] into indices and a mask [S, A], present ones first."""
    width = max(1, int(present.sum(1).max()))
    order = np.argsort(~present, axis=1, kind="stable")[:, :width]
    mask = np.take_along_axis(present, order, axis=1)
    return torch.from_numpy(order).to(device), torch.from_numpy(mask).to(device)


def _masked(method, x, grad, c):
    """Take a local step, only for the clients that have steps left."""
    if isinstance(c.K, int):
        return method.local_step(x, grad, c)
    state = dict(c.client)
    new = method.local_step(x, grad, c)
    going = c.k < c.K  # [S, A, 1]
    for k, v in state.items():
        if c.client[k] is not v:
            c.client[k] = torch.where(
                going.view(going.shape[:2] + (1,) * (v.ndim - 2)), c.client[k], v
            )
    return torch.where(going, new, x)


def _bar(rounds, progress):
    if not progress:
        return range(rounds)
    from tqdm.auto import trange

    return trange(rounds, desc="rounds", unit="round")
