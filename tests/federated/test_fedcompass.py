"""FedCompass: a schedule by hand, learning as a plain loop, equality with FedAvg, conservation."""

import itertools

import numpy as np
import pytest
import torch

from miniature import data
from miniature.federated.baselines import FedAvg, FedBuff
from miniature.federated.engine import federate
from miniature.federated.fedcompass import (
    FedAsync,
    FedCompass,
    FedCompassN,
    Schedule,
    asynchronous,
    compass,
    replay,
    synchronous,
)
from miniature.federated.objectives import Classification, Quadratics
from miniature.federated.participation import clock
from miniature.models import MLP
from miniature.stack import Stack

LR = 0.03


def erratic(seed, n=6, sd=0.6):
    """Step times that differ between clients and from job to job."""
    g = np.random.default_rng(seed)
    return g.uniform(0.2, 1, (n, 1)) * np.exp(sd * g.normal(size=(n, 50)))


def problems(seeds=(0, 1), n=6, d=4, **options):
    """Several problems, and all their clients in one row, as `replay` wants them."""
    q = Quadratics.random(list(seeds), n, d, **options)
    return q, Quadratics(q.A.flatten(0, 1)[None], q.b.flatten(0, 1)[None])


def used(schedule):
    return [j for _, jobs in schedule.updates for j in jobs]


def test_a_schedule_by_hand():
    s = compass([1, 2], 42, q_min=2, q_max=10, late=1.2)
    jobs = [(j.client, j.version, j.steps, j.start, j.arrival) for j in s.jobs]
    assert jobs[:8] == [
        (0, 0, 10, 0, 10),
        (1, 0, 10, 0, 20),
        (0, 1, 10, 10, 20),  # nobody to join: a group with Q_max
        (1, 2, 6, 20, 32),  # meets client 0, back at 22 + 10: 12 / 2 steps
        (0, 3, 10, 20, 30),  # 12 steps would be needed to join client 1: more than Q_max
        (0, 4, 2, 30, 32),  # joins client 1 with Q_min
        (0, 5, 10, 32, 42),  # the fastest is assigned first
        (1, 5, 5, 32, 42),
    ]
    assert s.updates == [(10, [0]), (20, [1]), (20, [2]), (30, [4]), (32, [3, 5]), (42, [6, 7])]
    assert [(g.born, g.due, g.deadline) for g in s.groups[:4]] == [
        (10, 20, 22),
        (20, 32, pytest.approx(34.4)),
        (20, 30, 32),
        (32, 42, 44),
    ]


def test_a_latecomer_by_hand():
    # Client 1 needs 1 second a step, but 3 in its second job: due at 20, in time until 22.
    s = compass([[1, 1, 1], [1, 3, 1]], 60, q_min=2, q_max=10, late=1.2, momentum=0.5)
    assert s.updates[:2] == [(10, [0]), (10, [1])]
    first = s.groups[0]
    assert first.jobs == [2, 3] and first.arrived == [2]
    assert s.updates[2] == (pytest.approx(22), [2])  # the deadline fires without client 1
    late = s.jobs[3]
    assert late.arrival == 40 and late.version == 2
    step = next(k for k, (_, jobs) in enumerate(s.updates) if 3 in jobs)
    assert len(s.updates[step][1]) > 1  # used together with a group
    # It restarts at once, from the current model, at the speed 0.5 * 1 + 0.5 * 3.
    again = next(j for j in s.jobs if j.client == 1 and j.start == 40)
    assert again.version == sum(time <= 40 for time, _ in s.updates)
    group = next(g for g in s.groups if s.jobs.index(again) in g.jobs)
    assert abs(group.due - 40 - 2 * again.steps) < 2


def plain_compass(speed, horizon, q_min, q_max, late):
    """FedCompass's schedule with a list of events and a dictionary per client and group."""
    n, events, groups, general, steps, count = len(speed), [], {}, [], [], [0] * len(speed)
    names = itertools.count()
    clients = [{"s": None, "steps": q_max, "version": 0, "group": None} for _ in range(n)]

    def launch(i, now):
        seconds = speed[i, count[i] % speed.shape[1]] * clients[i]["steps"]
        clients[i] |= {"start": now, "version": len(steps)}
        count[i] += 1
        events.append((now + seconds, 0, i))

    def assign(i, now):
        me, best, chosen = clients[i], -1, None
        for name, g in groups.items():
            q = int(np.floor((g["T"] - now) / me["s"] + 1e-9))
            if q_min <= q <= q_max and q >= best:
                best, chosen = q, name
        if chosen is None:
            for g in groups.values():
                fastest = min(clients[j]["s"] for j in g["waiting"] + g["arrived"])
                q = int(np.floor((g["late"] + q_max * fastest - now) / me["s"] + 1e-9))
                best = max(best, q) if q <= q_max else best
            best = q_max if best < 0 else max(best, q_min)
            chosen = next(names)
            seconds = best * me["s"]
            groups[chosen] = {"T": now + seconds, "late": now + late * seconds}
            groups[chosen] |= {"waiting": [], "arrived": [], "buffer": []}
            events.append((now + late * seconds + 1e-9 * horizon, 1, chosen))
        me |= {"steps": best, "group": chosen}
        groups[chosen]["waiting"].append(i)
        launch(i, now)

    def aggregate(name, now):
        g = groups.pop(name)
        steps.append((now, sorted(general + g["buffer"])))
        general.clear()
        for i in sorted(g["arrived"], key=lambda i: clients[i]["s"]):
            assign(i, now)

    for i in range(n):
        launch(i, 0.0)
    while min(events)[0] <= horizon:
        now, deadline, i = events.pop(events.index(min(events)))
        if deadline:
            if i in groups:
                aggregate(i, now) if groups[i]["buffer"] else groups.pop(i)
            continue
        me = clients[i]
        new = (now - me["start"]) / me["steps"]
        me["s"] = new if me["s"] is None else 0.1 * me["s"] + 0.9 * new
        result, g = (i, me["version"], me["steps"]), groups.get(me["group"])
        if me["group"] is None:
            steps.append((now, [result]))
            assign(i, now)
        elif g is None:
            general.append(result)
            assign(i, now)
        else:
            g["waiting"].remove(i)
            g["arrived"].append(i)
            g["buffer"].append(result)
            if not g["waiting"]:
                aggregate(me["group"], now)
    return steps


# In the last three a client finds two equally good groups that were created at the same moment.
@pytest.mark.parametrize("seed", [*range(12), 25, 145, 240])
def test_schedules_equal_a_plain_scheduler(seed):
    g = np.random.default_rng(seed)
    n, sd = int(g.integers(2, 9)), (0, 0.1, 0.6, 1.0)[seed % 4]
    times = g.uniform(0.2, 2, (n, 1)) * np.exp(sd * g.normal(size=(n, 60)))
    q_min = int(g.integers(2, 20))
    options = {"q_min": q_min, "q_max": int(g.integers(q_min, 60)), "late": (1, 1.2, 1.5)[seed % 3]}
    s, plain = compass(times, 300, **options), plain_compass(times, 300, **options)
    updates = [(t, sorted(s.jobs[j][:3] for j in numbers)) for t, numbers in s.updates]
    assert [v for _, v in updates] == [v for _, v in plain]
    np.testing.assert_allclose([t for t, _ in updates], [t for t, _ in plain], atol=1e-5)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    "make", [compass, synchronous, lambda t, h: asynchronous(t, h, buffer=3)], ids=range(3)
)
def test_every_result_is_used_exactly_once_or_still_waits(make, seed):
    horizon = 800
    s = make(erratic(seed), horizon)
    in_steps = used(s)
    assert len(in_steps) == len(set(in_steps))
    arrived = {j for j, job in enumerate(s.jobs) if job.arrival <= horizon}
    waiting = set(s.general) | {j for g in s.groups if g.closed is None for j in g.arrived}
    assert set(in_steps) | waiting <= arrived and not waiting & set(in_steps)
    lost = arrived - set(in_steps) - waiting
    assert not lost or (make is not compass and len(lost) < s.n_clients)
    for version, (time, jobs) in enumerate(s.updates):
        for j in jobs:
            assert s.jobs[j].arrival <= time + 1e-9 and s.jobs[j].version <= version
            assert s.jobs[j].version == sum(
                t < s.jobs[j].start or (t == s.jobs[j].start and k < s.jobs[j].version)
                for k, (t, _) in enumerate(s.updates)
            )


@pytest.mark.parametrize("seed", range(5))
def test_a_client_trains_one_job_at_a_time_within_its_limits(seed):
    s = compass(erratic(seed), 800)
    for client in range(6):
        own = [j for j in s.jobs if j.client == client]
        assert all(a.arrival <= b.start for a, b in itertools.pairwise(own))
        assert all(20 <= j.steps <= 100 for j in own)


@pytest.mark.parametrize("seed", range(5))
def test_members_arrive_within_a_step_of_each_other(seed):
    times = np.random.default_rng(seed).uniform(0.1, 1, 8)
    s = compass(times, 1000)
    for group in s.groups:
        arrivals = [s.jobs[j].arrival for j in group.jobs]
        slowest = max(times[s.jobs[j].client] for j in group.jobs)
        assert max(arrivals) - min(arrivals) <= slowest * (1 + 1e-9)
        assert max(arrivals) <= group.due + 1e-9
    assert s.busy(300, 1000) > 0.95
    ideal = 700 * (1 / times).sum()
    assert 0.95 * ideal < s.steps_done(300, 1000) <= ideal * (1 + 1e-9)


def test_slow_clients_cannot_join_when_the_range_of_steps_is_narrow():
    times = np.geomspace(0.1, 0.97, 6)  # no common multiples: nobody comes by chance with another
    wide, narrow, none = (compass(times, 1000, q_min=q) for q in (5, 60, 100))
    groups = [s.open_groups(np.linspace(300, 900, 50)).mean() for s in (wide, narrow, none)]
    assert groups[0] == 1 < groups[1] < groups[2] and groups[2] > 5
    # With Q_min = Q_max one joins only by chance: nearly FedAsync.
    single = asynchronous(times, 1000)
    assert np.mean([len(jobs) for _, jobs in none.updates]) < 1.2
    assert none.ages(300).mean() > 0.9 * single.ages(300).mean() > 4 * narrow.ages(300).mean() / 3


def test_equal_speeds_give_one_group_and_fedavg():
    n, q_max = 6, 7
    s = compass(np.ones(n), 20 * q_max, q_min=2, q_max=q_max)
    rounds = s.updates[n:]
    assert [len(jobs) for _, jobs in rounds] == [n] * 19
    assert {s.jobs[j].steps for j in used(s)} == {q_max} and len(s.groups) == 20
    q, row = problems()
    at = [t for t, _ in rounds]
    start = torch.zeros_like(q.b[:, 0])
    path = replay([(FedCompass(LR), s)] * 2, row, start, [0, 1], at, 0)
    for k in range(len(at) - 1):
        one = federate(FedAvg(LR, 0.9), q, path[:, k], rounds=1, steps=q_max, seeds=[0, 1])
        torch.testing.assert_close(path[:, k + 1], one.theta, atol=1e-12, rtol=0)


def loop(rule, s, A, b):
    """Learning along one schedule, a job at a time; `rule` is the server's."""
    models, m = [np.zeros(b.shape[1])], np.zeros(b.shape[1])
    for version, (_, jobs) in enumerate(s.updates):
        results = []
        for j in jobs:
            i, x0 = s.jobs[j].client, models[s.jobs[j].version]
            x = x0.copy()
            for _ in range(s.jobs[j].steps):
                x = x - LR * (A[i] @ x - b[i])
            results.append((x0, x, version - s.jobs[j].version, s.jobs[j].steps))
        new, m = rule(models[-1], m, results, len(b))
        models.append(new)
    return models


def compass_rule(normalized, momentum):
    def rule(w, m, results, n):
        effective = np.mean([q for *_, q in results])
        m = momentum * m
        for x0, x, age, q in results:
            m = m + 0.7 / n * (1 + age) ** -0.4 * (x - x0) * (effective / q if normalized else 1)
        return w + m, m

    return rule


def async_rule(w, m, results, n):
    ((_, x, age, _),) = results
    alpha = 0.7 * (1 + age) ** -0.4
    return (1 - alpha) * w + alpha * x, m


def buffer_rule(w, m, results, n):
    return w + 0.7 * np.mean([(x - x0) / (1 + age) ** 0.5 for x0, x, age, _ in results], 0), m


@pytest.mark.parametrize(
    "method, rule, make",
    [
        (FedCompass(LR, 0.7, 0.4), compass_rule(False, 0), lambda t, h: compass(t, h, 2, 10)),
        (FedCompassN(LR, 0.7, 0.4), compass_rule(True, 0), lambda t, h: compass(t, h, 2, 10)),
        (
            FedCompass(LR, 0.7, 0.4, 0.5),
            compass_rule(False, 0.5),
            lambda t, h: compass(t, h, 2, 10),
        ),
        (FedAsync(LR, 0.7, 0.4), async_rule, lambda t, h: asynchronous(t, h, 8)),
        (FedBuff(LR, 0.7), buffer_rule, lambda t, h: asynchronous(t, h, 8, 3)),
    ],
    ids=["FedCompass", "+N", "+M", "FedAsync", "FedBuff"],
)
def test_replay_equals_a_loop_over_jobs(method, rule, make):
    q, row = problems()
    schedules = [make(erratic(seed), 60) for seed in (3, 4)]
    times = np.linspace(0, 60, 25)
    path = replay(
        [(method, s) for s in schedules], row, torch.zeros_like(q.b[:, 0]), [0, 1], times, 0
    )
    for r, s in enumerate(schedules):
        models = loop(rule, s, q.A[r].numpy(), q.b[r].numpy())
        at = [sum(t <= time for t, _ in s.updates) for time in times]
        np.testing.assert_allclose(path[r], np.stack(models)[at], atol=1e-12, rtol=0)
    if method.__class__ is FedCompass:  # what `participation.Trace` cannot express did happen
        twice = [{s.jobs[j].client for j in jobs} for s in schedules for _, jobs in s.updates]
        assert [len(c) for c in twice] != [len(jobs) for s in schedules for _, jobs in s.updates]


def test_rivals_agree_with_the_engine_and_its_clock():
    q, row = problems()
    times, start = np.geomspace(1, 3.7, 6), torch.zeros_like(q.b[:, 0])
    for method, make, arrivals in (
        (FedAvg(LR, 0.8), synchronous, None),
        (FedBuff(LR, 0.8), asynchronous, 1),
        (FedAsync(LR, 0.8), asynchronous, 1),
    ):
        s = make(times, 60, 4)
        trace = clock(4 * times, len(s.updates), arrivals=arrivals)
        np.testing.assert_allclose(trace.times, [t for t, _ in s.updates])
        h = federate(
            method,
            q,
            start,
            rounds=len(s.updates),
            steps=4,
            seeds=[0, 1],
            active=trace,
            metric=lambda theta: theta,
        )
        path = replay([(method, s)] * 2, row, start, [0, 1], trace.times + 1e-9, 0)
        torch.testing.assert_close(path, h.metric, atol=1e-12, rtol=0)


def learn(runs, problem, device="cpu"):
    """Models on two problems of four clients each."""
    d, seeds = data.digits().to(device), (0, 1)
    stack = Stack.init(lambda: MLP([64, 16, 10]), seeds, device=device)
    parts = [[p for s in seeds for p in data.dirichlet(d.y_train.cpu(), 4, 0.5, s)]]
    clients = Classification(stack, d.x_train, d.y_train, parts, 8)
    return replay(runs, clients, stack.theta[problem], problem, [20, 40, 60], 5)


def test_runs_do_not_depend_on_what_else_is_stacked():
    a, b = (compass(erratic(seed, 4), 60, 2, 8) for seed in (0, 1))
    runs = [
        (FedCompass(0.1, momentum=0.5), a),
        (FedCompass(0.3), b),
        (FedAsync(0.2), asynchronous(erratic(2, 4), 60, 6)),
    ]
    problem = [0, 1, 1]
    for row, together in enumerate(learn(runs, problem)):
        (alone,) = learn(runs[row : row + 1], problem[row : row + 1])
        torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: compass([1.0, 2.0], 10, q_min=5, q_max=4), "got 5 and 4"),
        (lambda: compass([1.0, 2.0], 10, q_min=0), "got 0 and 100"),
        (lambda: compass([1.0, 2.0], 10, late=0.9), "got 0.9"),
        (lambda: compass([1.0, 2.0], 10, momentum=1.5), "1.5"),
        (lambda: Schedule([1.0, 0.0]), "must be positive"),
        (lambda: asynchronous([1.0], 10, buffer=0), "buffer must be at least 1, got 0"),
        (lambda: FedCompass(LR, alpha=0.0), "got 0.0"),
        (lambda: FedCompass(LR, momentum=[0.5, 1.0]), "1.0"),
        (
            lambda: replay([], None, torch.zeros(2, 3), [0, 1], [1], 0),
            "0 runs, 2 models",
        ),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_type_and_device_are_kept(device):
    s = compass(erratic(0), 60, 2, 8)
    for dtype in (torch.float32, torch.float64):
        q, row = problems(device=device, dtype=dtype)
        start = torch.zeros_like(q.b[:, 0])
        path = replay([(FedCompassN(LR), s)] * 2, row, start, [0, 1], [30, 60], 0)
        assert path.dtype == dtype and path.device.type == device and path.isfinite().all()


@pytest.mark.gpu
def test_the_gpu_learns_the_same():
    s = compass(erratic(0, 4), 60, 2, 8)
    cpu, gpu = (learn([(FedCompass(0.1), s)], [0], device) for device in ("cpu", "cuda"))
    torch.testing.assert_close(gpu.cpu(), cpu, atol=1e-3, rtol=1e-3)
