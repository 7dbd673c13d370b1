r"""Anarchic federated learning: AFA-CD and AFA-CS.

Haibo Yang, Xin Zhang, Prashant Khanduri, Jia Liu. *Anarchic Federated Learning*. ICML 2022,
arXiv:2108.09875.

The server controls nothing. Worker i pulls the current model $x_\mu$ when it likes, chooses any
number of local steps $K_{t,i}$, runs $x^{k+1} = x^k - \eta_L g_i(x^k)$ from $x^0 = x_\mu$ with
stochastic gradients $g_i$, and returns the normalized sum

$$G_i(x_\mu) = \frac{1}{K_{t,i}} \sum_{k=0}^{K_{t,i}-1} g_i(x^k)
= \frac{x_\mu - x^{K_{t,i}}}{\eta_L K_{t,i}}.$$

The server waits for the first m returns, from the workers $M_t$; by then the model that worker i
began with is $\tau_{t,i}$ steps old. With a rate $\eta$ of its own it steps to

$$x_{t+1} = x_t - \eta \frac1m \sum_{i \in M_t} G_i(x_{t-\tau_{t,i}}) \quad\text{(AFA-CD)},
\qquad x_{t+1} = x_t - \eta \frac1M \sum_{j=1}^{M} G_j \quad\text{(AFA-CS)},$$

where AFA-CS, for M known workers, stores the latest $G_j$ of each, and replaces those that
returned. Entries of workers that have not come yet are zero.

The one idea: whatever workers choose must not become a weight. Dividing by $K_{t,i}$ takes away
the weight of those who work much, and the memory that of those who come often.

The rival is FedAvg under the same anarchy: it adds the mean of $x^{K_{t,i}} - x_\mu$.
"""

import numpy as np
import torch

from .engine import Method, per_run
from .participation import Trace


class AnarchicFedAvg(Method):
    """FedAvg whose workers choose their number of local steps anew each time.

    Parameters
    ----------
    lr : float or sequence of S floats
        Local rate eta_L.
    eta : float or sequence of S floats
        Server rate.
    effort : array_like of int, shape [T, clients] or [S, T, clients], optional
        K_{t,i}: the local steps behind what client i returns in round t; at most ``steps`` of
        `federate`. Rounds beyond T repeat from the start. Default: ``steps``.

    Raises
    ------
    ValueError
        If a number of steps is below 1, or (in `federate`) above ``steps``.
    """

    def __init__(self, lr, eta=1.0, effort=None):
        super().__init__(lr, eta)
        self.effort = None if effort is None else torch.as_tensor(effort)
        if effort is not None and (self.effort < 1).any():
            raise ValueError(f"effort must be at least 1 step, got {int(self.effort.min())}")

    def chosen(self, c):
        """Return K_{t,i} of those present: an int, or [S, A, 1]."""
        if self.effort is None:
            return c.K
        now = self.effort[..., c.t % self.effort.shape[-2], :].to(c.active.device)
        now = now.expand(len(c.active), -1).gather(1, c.active)[..., None]
        if (now > c.K).any():
            raise ValueError(f"effort is up to {int(now.max())} steps, more than steps= allows")
        return now

    def local_step(self, x, grad, c):
        going = self.effort is None or c.k < self.chosen(c)
        return x - c.lr * going * grad(x)


class AFACD(AnarchicFedAvg):
    """AFA-CD, for many devices: a step along the mean of the m normalized sums that returned.

    Parameters
    ----------
    lr : float or sequence of S floats
        Local rate eta_L.
    eta : float or sequence of S floats
        Server rate: the step along a mean gradient, whatever eta_L and K are.
    effort : array_like of int, optional
        See `AnarchicFedAvg`.
    """

    is_sgd = False  # the step is eta, not eta_L

    def __init__(self, lr, eta=0.1, effort=None):
        super().__init__(lr, eta, effort)

    def message(self, x, c):
        return {"G": c.send((c.x0 - x) / (c.lr * self.chosen(c)))}

    def server_step(self, theta, message, c):
        return theta - per_run(self.eta, theta) * c.mean(message["G"])


class AFACS(AFACD):
    """AFA-CS, for M known silos: a step along the mean of all workers' latest normalized sums.

    Parameters
    ----------
    lr, eta, effort
        See `AFACD`.
    """

    def client_state(self, zeros):
        # G_j lies at the server, but a row per client: the engine replaces those that returned.
        return {"G": zeros}

    def server_state(self, zeros):
        return {"mean_G": zeros}

    def message(self, x, c):
        c.before = c.client["G"]
        message = super().message(x, c)
        c.client["G"] = message["G"]
        return message

    def server_step(self, theta, message, c):
        news = c.sum(message["G"] - c.before) / c.n_clients
        c.server["mean_G"] = c.server["mean_G"] + news
        return theta - per_run(self.eta, theta) * c.server["mean_G"]


def returns(rates, m, rounds, seeds):
    """Simulate workers with exponential computing times, a server step every m returns.

    Parameters
    ----------
    rates : array_like, shape [clients] or [S, clients]
        Computations a unit of time; 0 for a worker that never returns.
    m : int or sequence of S ints
        Returns that the server waits for.
    rounds : int
        Server steps.
    seeds : sequence of S ints
        Runs with equal seeds, rates and m see the same arrivals.

    Returns
    -------
    Trace
        ``present`` [S, rounds, clients], with late clients. A worker starts again, from the new
        model, as soon as what it returned has been used.

    Raises
    ------
    ValueError
        If a rate is negative, or fewer than m workers have a positive one.
    """
    S = len(seeds)
    rates = np.broadcast_to(np.asarray(rates, dtype=float), (S, np.shape(rates)[-1]))
    m = np.broadcast_to(m, S)
    if (rates < 0).any() or ((rates > 0).sum(1) < m).any() or (m < 1).any():
        raise ValueError(
            f"rates must not be negative (lowest: {rates.min():g}), and m = {m.tolist()} must lie "
            f"between 1 and the number of workers that return, {(rates > 0).sum(1).tolist()}"
        )
    shape = (rounds + 1, rates.shape[1])
    draws = np.stack([np.random.default_rng([seed, 3]).exponential(size=shape) for seed in seeds])
    with np.errstate(divide="ignore"):
        work = draws / rates[:, None]  # [S, rounds + 1, clients]: time for a visit begun in a round
    due = work[:, 0]
    present = np.zeros((S, rounds, shape[1]), dtype=bool)
    for t in range(rounds):
        now = np.take_along_axis(np.sort(due, axis=1), m[:, None] - 1, axis=1)  # the m-th return
        present[:, t] = due <= now
        due = np.where(present[:, t], now + work[:, t + 1], due)
    return Trace(present, stale=True)


def fixed_point(q, lr, steps, shares):
    r"""Return where the mean direction vanishes on quadratics, [S, d], in closed form.

    With noiseless gradients $G_i(x) = P_i (A_i x - b_i)$ where
    $P_i = \frac{1}{K_i} \sum_k (I - \eta_L A_i)^k$, so that x solves
    $\sum_i q_i P_i (A_i x - b_i) = 0$. To first order $P_i = I - \eta_L (K_i - 1) A_i / 2$.

    Parameters
    ----------
    q : Quadratics
    lr : float or sequence of S floats
        Local rate eta_L.
    steps : int or array_like, shape [clients]
        Local steps K_i.
    shares : torch.Tensor, shape [clients] or [S, clients]
        q_i: how often each worker returns (AFA-CD), equal (AFA-CS), or times K_i (FedAvg).
    """
    curvature, basis = torch.linalg.eigh(q.A)
    K = torch.as_tensor(steps, dtype=q.A.dtype, device=q.A.device)[..., None]
    rate = per_run(lr, curvature)
    shrink = (1 - (1 - rate * curvature) ** K) / (rate * K * curvature)  # eigenvalues of P_i
    P = (basis * shrink[..., None, :]) @ basis.mT
    moved = type(q)(P @ q.A, (P @ q.b[..., None])[..., 0])
    return moved.optimum(shares)
