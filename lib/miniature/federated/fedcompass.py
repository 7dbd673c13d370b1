r"""FedCompass: give each client so many steps that a group of them arrives together.

Li et al., *FedCompass: Efficient Cross-Silo Federated Learning on Heterogeneous Client Devices
Using a Computing Power-Aware Scheduler*, ICLR 2024.

The server keeps an estimate $s_i$ of the seconds that client i needs for a local step, updated at
each arrival, $s_i \leftarrow 0.1 s_i + 0.9\,(\text{elapsed} / \text{steps})$, and a list of
arrival groups g with an expected time $T_g$ and a deadline $T_g^{late}$. Clients start with
$Q_{max}$ steps; a first arrival is an update of its own. A client that is free at time t is
assigned

- to the group where it can do most: $q = \lfloor (T_g - t) / s_i \rfloor$, if
  $Q_{min} \le q \le Q_{max}$ for some g;
- else to a new group that will meet a group g when its fastest member has come back once more:
  $q = \lfloor (T_g^{late} + Q_{max} \min_{j \in g} s_j - t) / s_i \rfloor$, the largest that is
  at most $Q_{max}$, raised to $Q_{min}$; $Q_{max}$ if there is none. Then $T = t + q s_i$ and
  $T^{late} = t + \lambda q s_i$.

When all members have arrived, or at the deadline, the server uses their differences $\Delta_i$
(trained model minus the model started from) with those of latecomers of other groups,

$$w \leftarrow w + \sum_i \frac{\alpha}{N} (1 + \tau_i)^{-a} \Delta_i,$$

where $\tau_i$ is the number of server steps since client i downloaded, and assigns the members
again, fastest first. A latecomer is assigned at once.

The one idea: the steps, not the waiting, make clients arrive together. So there is neither
synchronous waiting nor an update for every single arrival.

When clients come and go depends on their speeds alone. So an event simulation first writes down a
`Schedule` (`compass`, and for the rivals `synchronous` and `asynchronous`), and `replay` then
learns along many schedules at once. Rivals that only this paper needs: FedAsync (Xie et al.,
*Asynchronous Federated Optimization*, 2019); normalized averaging (Wang et al., FedNova, NeurIPS
2020) in `FedCompassN`.
"""

import heapq
import math
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch

from .engine import Method, per_run
from .robust import mean


class Job(NamedTuple):
    """One local training: `version` is the number of server steps when the client downloaded."""

    client: int
    version: int
    steps: int
    start: float
    arrival: float


@dataclass(eq=False)
class Group:
    """An arrival group: job numbers, the expected time and the deadline; `closed` when used."""

    born: float
    due: float
    deadline: float
    jobs: list = field(default_factory=list)
    arrived: list = field(default_factory=list)
    closed: float | None = None


class Schedule:
    """Who trains when and how long, and which results enter which server step.

    Parameters
    ----------
    step_times : array_like, shape [clients] or [clients, k]
        Seconds a local step; with two axes, in a client's k-th job (columns repeat).

    Attributes
    ----------
    jobs : list of Job
        In the order in which they start.
    updates : list of (float, list of int)
        Server steps: the time, and the numbers of the jobs whose results are used.
    groups : list of Group
    general : list of int
        Jobs of latecomers that no server step has used yet.

    Raises
    ------
    ValueError
        If a step time is not positive.
    """

    def __init__(self, step_times):
        times = np.asarray(step_times, dtype=float)
        if times.ndim not in (1, 2) or not (times > 0).all():
            raise ValueError(f"step times must be positive, [clients] or [clients, k]; got {times}")
        self.step_times = times.reshape(len(times), -1)
        self.n_clients = len(times)
        self.jobs, self.updates, self.groups, self.general = [], [], [], []
        self._count = [0] * self.n_clients
        self._queue = []  # (time, kind, number): arrivals of jobs before deadlines of groups

    def launch(self, now, client, steps):
        """Start a job from the current model; return its number."""
        seconds = self.step_times[client, self._count[client] % self.step_times.shape[1]]
        self._count[client] += 1
        job = Job(client, len(self.updates), steps, now, now + steps * seconds)
        self.jobs.append(job)
        heapq.heappush(self._queue, (job.arrival, 0, len(self.jobs) - 1))
        return len(self.jobs) - 1

    def launch_all(self, now, steps):
        """Start a job of every client from the current model."""
        for client in range(self.n_clients):
            self.launch(now, client, steps)

    def events(self, horizon):
        """Yield (time, kind, number) until the horizon."""
        while self._queue[0][0] <= horizon:
            yield heapq.heappop(self._queue)

    def ages(self, after=0.0):
        """Return the staleness of every result used after a time, in server steps."""
        return np.array(
            [
                version - self.jobs[j].version
                for version, (time, used) in enumerate(self.updates)
                for j in used
                if time > after
            ]
        )

    def steps_done(self, after, until):
        """Return how many local steps all clients together do between two times."""
        overlap = (min(j.arrival, until) - max(j.start, after) for j in self.jobs)
        return sum(
            max(0.0, o) / (j.arrival - j.start) * j.steps for o, j in zip(overlap, self.jobs)
        )

    def busy(self, after, until):
        """Return the share of the clients' time between two times in which they compute."""
        overlap = (min(j.arrival, until) - max(j.start, after) for j in self.jobs)
        return sum(max(0.0, o) for o in overlap) / (self.n_clients * (until - after))

    def open_groups(self, times):
        """Return the number of groups under way at each time."""
        lives = [(g.born, g.closed or g.deadline) for g in self.groups]
        born, gone = np.array(lives).reshape(-1, 2).T[..., None]
        return ((born <= times) & (times < gone)).sum(0)


def synchronous(step_times, horizon, steps=100):
    """Schedule FedAvg: all clients take the same steps, and all wait for the slowest."""
    s = Schedule(step_times)
    s.launch_all(0.0, steps)
    arrived = []
    for now, _, job in s.events(horizon):
        arrived.append(job)
        if len(arrived) == s.n_clients:
            s.updates.append((now, arrived))
            arrived = []
            s.launch_all(now, steps)
    return s


def asynchronous(step_times, horizon, steps=100, buffer=1):
    """Schedule FedAsync (buffer 1) or FedBuff: nobody waits; every `buffer` arrivals are used."""
    if buffer < 1:
        raise ValueError(f"the buffer must be at least 1, got {buffer}")
    s = Schedule(step_times)
    s.launch_all(0.0, steps)
    arrived = []
    for now, _, job in s.events(horizon):
        arrived.append(job)
        if len(arrived) == buffer:
            s.updates.append((now, arrived))
            arrived = []
        s.launch(now, s.jobs[job].client, steps)
    return s


def compass(step_times, horizon, q_min=20, q_max=100, late=1.2, momentum=0.9):
    """Schedule FedCompass (Algorithms 1 and 2 of the paper).

    Parameters
    ----------
    step_times : array_like, shape [clients] or [clients, k]
        As in `Schedule`.
    horizon : float
        Seconds.
    q_min, q_max : int
        Fewest and most local steps, Q_min and Q_max.
    late : float
        The factor lambda of the deadlines, at least 1.
    momentum : float
        Weight of the new measurement in the speed estimates, in (0, 1].

    Returns
    -------
    Schedule

    Raises
    ------
    ValueError
        If a parameter is out of its range.
    """
    if not 1 <= q_min <= q_max:
        raise ValueError(f"steps need 1 <= q_min <= q_max, got {q_min} and {q_max}")
    if late < 1 or not 0 < momentum <= 1:
        raise ValueError(f"late must be at least 1, momentum in (0, 1]; got {late}, {momentum}")
    s, speed, group_of, alive = Schedule(step_times), {}, {}, []

    def fit(seconds, i):
        return math.floor(seconds / speed[i] + 1e-9)  # 100 steps must not become 99 by rounding

    def assign(i, now):
        open_to = [(q, g) for g in alive if q_min <= (q := fit(g.due - now, i)) <= q_max]
        if open_to:
            q, group = max(reversed(open_to), key=lambda v: v[0])  # of equals the newest
        else:
            q = create_steps(i, now)
            group = Group(now, now + q * speed[i], now + late * q * speed[i])
            s.groups.append(group)
            alive.append(group)
            deadline = group.deadline + 1e-9 * horizon  # who arrives at the deadline is in time
            heapq.heappush(s._queue, (deadline, 1, len(s.groups) - 1))
        group.jobs.append(s.launch(now, i, q))
        group_of[i] = group

    def create_steps(i, now):
        best = -1
        for g in alive:
            fastest = min(speed[s.jobs[j].client] for j in g.jobs)
            q = fit(g.deadline + fastest * q_max - now, i)
            best = max(best, q) if q <= q_max else best
        return q_max if best < 0 else max(best, q_min)

    def aggregate(group, now):
        s.updates.append((now, s.general + group.arrived))
        s.general, group.closed = [], now
        alive.remove(group)
        for i in sorted((s.jobs[j].client for j in group.arrived), key=speed.get):
            assign(i, now)

    s.launch_all(0.0, q_max)
    for now, kind, number in s.events(horizon):
        if kind == 1:
            group = s.groups[number]
            if group in alive:
                aggregate(group, now) if group.arrived else alive.remove(group)
            continue
        job = s.jobs[number]
        i, measured = job.client, (now - job.start) / job.steps
        speed[i] = measured if i not in speed else (1 - momentum) * speed[i] + momentum * measured
        group = group_of.get(i)
        if group is None:
            s.updates.append((now, [number]))
            assign(i, now)
        elif group not in alive:
            s.general.append(number)
            assign(i, now)
        else:
            group.arrived.append(number)
            if len(group.arrived) == len(group.jobs):
                aggregate(group, now)
    return s


class FedCompass(Method):
    """FedCompass's server step, with momentum if wanted (FedCompass+M).

    m <- momentum m + sum_i alpha / N (1 + age_i)^-a delta_i, w <- w + m. With equal speeds this is
    FedAvg with server rate alpha. The schedule is `compass`'s.

    Parameters
    ----------
    lr, alpha : float or sequence of S floats
        Local rate; server rate.
    a : float or sequence of S floats
        Exponent of the staleness weight. (With a negative one, late results count more.)
    momentum : float or sequence of S floats

    Raises
    ------
    ValueError
        If the server rate is not positive, or the momentum is outside [0, 1).
    """

    is_sgd = False

    def __init__(self, lr, alpha=0.9, a=0.5, momentum=0.0):
        super().__init__(lr)
        m = torch.as_tensor(momentum)
        if not (torch.as_tensor(alpha) > 0).all() or not ((m >= 0) & (m < 1)).all():
            raise ValueError(f"need alpha > 0 and momentum in [0, 1), got {alpha} and {momentum}")
        self.alpha, self.a, self.momentum = alpha, a, momentum

    def server_state(self, zeros):
        return {"m": zeros}

    def server_step(self, theta, message, c):
        delta = self.scaled(message["delta"], c)
        weight = (1 + c.age[..., None].to(theta)) ** -per_run(self.a, delta)
        step = c.sum(weight * delta) * per_run(self.alpha, theta) / c.n_clients
        c.server["m"] = per_run(self.momentum, theta) * c.server["m"] + step
        return theta + c.server["m"]

    def scaled(self, delta, c):
        """Return the differences as they enter the sum."""
        return delta


class FedCompassN(FedCompass):
    """FedCompass+N: each difference per local step, times the mean steps of those present."""

    def scaled(self, delta, c):
        steps = torch.as_tensor(c.K).to(delta).expand(*delta.shape[:2], 1)
        return delta / steps * mean(steps, c.present)[:, None]


class FedAsync(Method):
    """FedAsync: w <- (1 - alpha_tau) w + alpha_tau w_i with alpha_tau = alpha (1 + age)^-a.

    Parameters
    ----------
    lr, alpha : float or sequence of S floats
        Local rate; weight of a fresh model.
    a : float
        Exponent of the staleness weight.
    """

    is_sgd = False

    def __init__(self, lr, alpha=0.6, a=0.5):
        super().__init__(lr)
        self.alpha, self.a = alpha, a

    def server_step(self, theta, message, c):
        weight = (1 + c.age[..., None].to(theta)) ** -self.a
        to_client = c.x0 + message["delta"] - theta[:, None]
        return theta + per_run(self.alpha, theta) * c.mean(weight * to_client)


def replay(runs, objective, theta, problem, times, seed):
    """Learn along schedules, with plain SGD as the local step, many runs at once.

    Parameters
    ----------
    runs : list of S (Method, Schedule)
        Methods with plain numbers as hyperparameters.
    objective : Quadratics, Classification or alike
        One run of it, whose clients are those of all problems, one problem after the other.
    theta : torch.Tensor, shape [S, P]
        Initial models.
    problem : sequence of S ints
        Which problem each run works on.
    times : array_like, shape [T]
        When to look, ascending.
    seed : int
        Draws the batches.

    Returns
    -------
    torch.Tensor, shape [S, T, P]
        The global models at those times.

    Raises
    ------
    ValueError
        If the number of runs differs between arguments.
    """
    if not len(runs) == len(theta) == len(problem):
        raise ValueError(f"{len(runs)} runs, {len(theta)} models and {len(problem)} problems")
    path = theta[:, None].repeat(1, len(times), 1)
    servers = [_Server(*run, x[None]) for run, x in zip(runs, theta)]
    ready, wave = [], 0
    while True:
        for r, server in enumerate(servers):
            ready += [(r, *job) for job in server.new_jobs()]
            while server.can_step():
                after = np.searchsorted(times, server.step())
                path[r, after:] = server.theta[0]
                ready += [(r, *job) for job in server.new_jobs()]
        if not ready:
            return path
        # All jobs that can be computed now, of all runs: one tensor [1, R, P], long ones first.
        ready.sort(key=lambda v: -v[2].steps)
        place = [problem[r] * runs[r][1].n_clients + job.client for r, _, job, _ in ready]
        active = torch.tensor([place], device=theta.device)
        lr = theta.new_tensor([runs[r][0].lr for r, *_ in ready])[:, None]
        x, steps = torch.stack([x0 for *_, x0 in ready], 1), np.array([v[2].steps for v in ready])
        going = (steps[:, None] > np.arange(steps[0])).sum(0).tolist()
        for live, batch in zip(going, objective.batches(active, int(steps[0]), [seed], wave)):
            if live < len(ready):  # a batch's tensors are [1, R, ...] or [R, ...]
                batch = [v[:, :live] if v.shape[0] == 1 else v[:live] for v in batch]
            g = objective.grad(x[:, :live], active[:, :live], batch)
            x[0, :live].addcmul_(g[0], lr[:live], value=-1)
        for (r, number, _, x0), row in zip(ready, x[0]):
            servers[r].results[number] = x0[0], row
        ready, wave = [], wave + 1


class _Server:
    """One run: its global model [1, P], the number of server steps, and results not yet used."""

    def __init__(self, method, schedule, theta):
        self.method, self.schedule, self.theta = method, schedule, theta
        self.state = method.server_state(torch.zeros_like(theta))
        self.version, self.begun, self.results = 0, 0, {}
        self.used = {j for _, numbers in schedule.updates for j in numbers}

    def new_jobs(self):
        """Return the jobs that start from the current model and whose results are used."""
        first, jobs = self.begun, self.schedule.jobs
        while self.begun < len(jobs) and jobs[self.begun].version == self.version:
            self.begun += 1
        return [(j, jobs[j], self.theta) for j in range(first, self.begun) if j in self.used]

    def can_step(self):
        """Return whether all results that the next server step uses are there."""
        updates = self.schedule.updates
        return self.version < len(updates) and all(
            j in self.results for j in updates[self.version][1]
        )

    def step(self):
        """Take a server step and return its time."""
        time, numbers = self.schedule.updates[self.version]
        jobs = [self.schedule.jobs[j] for j in numbers]
        x0, x = (torch.stack(v)[None] for v in zip(*(self.results.pop(j) for j in numbers)))
        c = SimpleNamespace(x0=x0, server=self.state, n_clients=self.schedule.n_clients)
        c.present = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        c.age = torch.tensor([[self.version - job.version for job in jobs]], device=x.device)
        c.K = torch.tensor([[[job.steps] for job in jobs]], device=x.device)
        c.send, c.sum, c.mean = (lambda v: v), (lambda v: v.sum(1)), (lambda v: v.mean(1))
        self.theta = self.method.server_step(self.theta, self.method.message(x, c), c)
        self.version += 1
        return time
