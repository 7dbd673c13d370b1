"""The round loop: against gradient descent, against single runs, and its accounting."""

import pytest
import torch

from miniature import data
from miniature.federated.baselines import FedAvg, FedProx, Scaffold
from miniature.federated.engine import Method, federate, per_run
from miniature.federated.objectives import Classification, Quadratics
from miniature.models import MLP
from miniature.stack import Stack

DOUBLE = torch.float64


def problem(seeds, sizes=(7, 3, 12), batch_size=4, dtype=DOUBLE, device="cpu", weight_decay=0.0):
    """Three clients of unequal sizes, the same data in every run, models by seed."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(sum(sizes), 5, generator=g, dtype=dtype).to(device)
    y = torch.randint(0, 3, (sum(sizes),), generator=g).to(device)
    parts = list(torch.arange(sum(sizes)).split(sizes))
    stack = Stack.init(lambda: MLP([5, 6, 3]), seeds, dtype=dtype, device=device)
    return stack, Classification(stack, x, y, [parts] * len(seeds), batch_size, weight_decay)


class Tape:
    """An objective that remembers what it was asked."""

    def __init__(self, objective):
        self.objective, self.n_clients = objective, objective.n_clients
        self.active, self.batch = [], []

    def batches(self, active, steps, seeds, t):
        return self.objective.batches(active, steps, seeds, t)

    def grad(self, x, active, batch):
        self.active.append(active)
        self.batch.append(batch)
        return self.objective.grad(x, active, batch)


def test_fedavg_with_one_full_batch_step_is_gradient_descent():
    sizes = (6, 6, 6)
    stack, clients = problem([0, 1], sizes, batch_size=6)
    found = federate(FedAvg(0.3), clients, stack.theta, rounds=8, steps=1, seeds=[0, 1]).theta
    for i in range(2):
        model = stack.module(i)
        for _ in range(8):
            loss = torch.nn.functional.cross_entropy(model(clients.x), clients.y)
            for p, g in zip(model.parameters(), torch.autograd.grad(loss, model.parameters())):
                p.data -= 0.3 * g
        flat = torch.cat([p.detach().flatten() for p in model.parameters()])
        torch.testing.assert_close(found[i], flat, atol=1e-12, rtol=0)


def test_same_seed_same_result_and_the_start_is_left_alone():
    stack, clients = problem([0, 1])
    before = stack.theta.clone()
    options = dict(rounds=3, steps=4, active=2)
    a = federate(FedAvg(0.1), clients, stack.theta, seeds=[5, 6], **options)
    b = federate(FedAvg(0.1), clients, stack.theta, seeds=[5, 6], **options)
    c = federate(FedAvg(0.1), clients, stack.theta, seeds=[5, 7], **options)
    assert torch.equal(a.theta, b.theta) and torch.equal(a.theta[0], c.theta[0])
    assert not torch.equal(a.theta[1], c.theta[1])
    assert torch.equal(stack.theta, before)


def test_every_method_sees_the_same_clients_and_batches():
    seen = []
    for method in (FedAvg(0.1), FedProx(0.1, 0.5), Scaffold(0.2)):
        stack, clients = problem([0, 1])
        tape = Tape(clients)
        federate(method, tape, stack.theta, rounds=3, steps=2, seeds=[3, 4], active=2)
        seen.append(tape)
    for other in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0].active, other.active))
        for (x, y), (u, v) in zip(seen[0].batch, other.batch):
            assert torch.equal(x, u) and torch.equal(y, v)


def test_clients_are_sampled_without_replacement_and_all_get_their_turn():
    q = Quadratics.random([0, 1], 5, 2)
    tape = Tape(q)
    federate(FedAvg(0.1), tape, torch.zeros(2, 2, dtype=DOUBLE), rounds=40, steps=1, seeds=[0, 1],
             active=3)  # fmt: skip
    active = torch.stack(tape.active)  # [round, run, active]
    assert all(len(row.unique()) == 3 for row in active.flatten(0, 1))
    assert not torch.equal(active[:, 0], active[:, 1])
    counts = active[:, 0].flatten().bincount(minlength=5)
    assert counts.min() > 10


def test_batches_hold_the_clients_own_samples():
    _, clients = problem([0])
    owner = torch.repeat_interleave(torch.arange(3), torch.tensor([7, 3, 12]))
    lookup = {tuple(row.tolist()): int(o) for row, o in zip(clients.x, owner)}
    active = torch.tensor([[2, 0, 1]])
    for x, _ in clients.batches(active, 5, [9], 0):
        assert x.shape == (3, 4, 5)
        for expected, rows in zip([2, 0, 1], x):
            assert {lookup[tuple(row.tolist())] for row in rows} == {expected}


def test_unequal_clients_weigh_the_same():
    # One full-batch step per client: the server's change is the plain mean of client gradients.
    sizes = (7, 3)
    stack, _ = problem([0], sizes)
    model = stack.module(0)
    changes = []
    for i in range(2):
        _, alone = problem([0], sizes, batch_size=sizes[i])
        x, y = alone.batches(torch.tensor([[i]]), 1, [0], 0)[0]
        loss = torch.nn.functional.cross_entropy(model(x[0]), y[0])
        grads = torch.autograd.grad(loss, model.parameters())
        changes.append(-0.5 * torch.cat([g.flatten() for g in grads]))

    class FullBatch(Classification):
        def grad(self, x, active, batch):
            out = []
            for i in active[0].tolist():
                rows = slice(0, 7) if i == 0 else slice(7, 10)
                g, _ = self.stack.grad(
                    lambda m, a, b: torch.nn.functional.cross_entropy(m(a), b),
                    self.x[None, rows], self.y[None, rows], theta=x[:, i],
                )  # fmt: skip
                out.append(g)
            return torch.stack(out, 1)

    _, base = problem([0], sizes)
    full = FullBatch(base.stack, base.x, base.y, [list(torch.arange(10).split(sizes))], 4)
    moved = federate(FedAvg(0.5), full, stack.theta, rounds=1, steps=1, seeds=[0]).theta
    torch.testing.assert_close(moved - stack.theta, torch.stack(changes).mean(0, keepdim=True))


@pytest.mark.parametrize("active", [None, 2])
def test_stacked_runs_equal_single_runs(active):
    seeds, lrs = [0, 1, 1], [0.1, 0.1, 0.4]
    stack, clients = problem(seeds)
    options = dict(rounds=3, steps=5, active=active, decay=0.9)
    together = federate(FedProx(lrs, [0.0, 0.5, 1.0]), clients, stack.theta, seeds=seeds, **options)
    for i, (seed, lr, mu) in enumerate(zip(seeds, lrs, [0.0, 0.5, 1.0])):
        stack, clients = problem([seed])
        alone = federate(FedProx(lr, mu), clients, stack.theta, seeds=[seed], **options)
        torch.testing.assert_close(together.theta[i], alone.theta[0], atol=1e-12, rtol=0)
        torch.testing.assert_close(together.drift[i], alone.drift[0], atol=1e-12, rtol=0)


def test_decay_multiplies_the_local_rate():
    rates = []

    class Watch(Method):
        def local_step(self, x, grad, c):
            rates.append(float(c.lr))
            return super().local_step(x, grad, c)

    q = Quadratics.random([0], 2, 2)
    start = torch.zeros(1, 2, dtype=DOUBLE)
    federate(Watch(0.2), q, start, rounds=3, steps=1, seeds=[0], decay=0.5)
    assert rates == pytest.approx([0.2, 0.1, 0.05])


def test_history_records_when_asked_and_at_the_end():
    q = Quadratics.random([0, 1], 3, 2)
    start = torch.zeros(2, 2, dtype=DOUBLE)
    h = federate(FedAvg(0.1), q, start, rounds=7, steps=2, seeds=[0, 1], metric=q.excess, every=3)
    assert h.rounds.tolist() == [3, 6, 7]
    assert h.metric.shape == h.drift.shape == (2, 3)
    torch.testing.assert_close(h.metric[:, -1], q.excess(h.theta))
    one = federate(FedAvg(0.1), q, start, rounds=1, steps=1, seeds=[0, 1])
    expected = (0.1 * q.b).square().sum(-1).mean(1)  # from 0 the gradient is -b_i
    torch.testing.assert_close(one.drift[:, 0], expected)


@pytest.mark.parametrize("dtype, itemsize", [(torch.float32, 4), (DOUBLE, 8)])
def test_upload_counts_the_bytes_of_a_client(dtype, itemsize):
    stack, clients = problem([0, 1], dtype=dtype)
    P = stack.size
    assert P == 5 * 6 + 6 + 6 * 3 + 3
    for method, vectors in ((FedAvg(0.1), 1), (Scaffold(0.1), 2)):
        h = federate(method, clients, stack.theta, rounds=1, steps=1, seeds=[0, 1], active=2)
        assert h.upload == P * itemsize * vectors
        assert h.theta.dtype == dtype


def test_weight_decay_adds_theta():
    stack, clients = problem([0])
    _, decayed = problem([0], weight_decay=0.1)
    active = torch.arange(3)[None]
    x = stack.theta[:, None].expand(1, 3, -1)
    batch = clients.batches(active, 1, [0], 0)[0]
    difference = decayed.grad(x, active, batch) - clients.grad(x, active, batch)
    torch.testing.assert_close(difference, 0.1 * x)


def test_quadratics_know_their_optimum():
    q = Quadratics.random([0, 1, 2], 4, 6, heterogeneity=2.0)
    best = q.optimum()
    active = torch.arange(4).expand(3, 4)
    g = q.grad(best[:, None].expand(3, 4, 6), active, q.batches(active, 1, [0, 1, 2], 0)[0])
    assert g.mean(1).abs().max() < 1e-12 and g.abs().max() > 0.1
    assert q.excess(best).abs().max() < 1e-12
    x = best + 0.1 * torch.randn(3, 6, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
    f = 0.5 * torch.einsum("sd,scde,se->sc", x, q.A, x) - torch.einsum("scd,sd->sc", q.b, x)
    at = 0.5 * torch.einsum("sd,scde,se->sc", best, q.A, best)
    at = at - torch.einsum("scd,sd->sc", q.b, best)
    torch.testing.assert_close(q.excess(x), (f - at).mean(1))
    assert Quadratics.random([1], 4, 6, heterogeneity=0.0).optimum().abs().max() < 1e-12


def test_per_run_values_broadcast():
    like = torch.zeros(2, 3, 4, dtype=DOUBLE)
    assert per_run(0.5, like).shape == () and per_run([1, 2], like).shape == (2, 1, 1)
    assert per_run([1, 2], like).dtype == DOUBLE


def test_errors_name_the_value():
    q = Quadratics.random([0, 1], 3, 2)
    start = torch.zeros(2, 2, dtype=DOUBLE)
    for active in (0, 4):
        with pytest.raises(ValueError, match=f"between 1 and the 3 clients, got {active}"):
            federate(FedAvg(0.1), q, start, rounds=1, steps=1, seeds=[0, 1], active=active)
    with pytest.raises(ValueError, match="1 seeds for 2 runs"):
        federate(FedAvg(0.1), q, start, rounds=1, steps=1, seeds=[0])
    stack, clients = problem([0, 1])
    parts = list(torch.arange(22).split((7, 3, 12)))
    with pytest.raises(ValueError, match="same number of clients"):
        Classification(stack, clients.x, clients.y, [parts, parts[:2]], 4)


def test_digits_are_learned():
    train_x, train_y, test_x, test_y = data.digits()
    stack = Stack.init(lambda: MLP([64, 32, 10]), [0, 1])
    parts = [data.dirichlet(train_y, 10, 1.0, s) for s in (0, 1)]
    clients = Classification(stack, train_x, train_y, parts, 16)
    h = federate(FedAvg(0.3), clients, stack.theta, rounds=10, steps=15, seeds=[0, 1], active=4,
                 metric=lambda theta: stack.accuracy(test_x, test_y, theta=theta))  # fmt: skip
    assert h.metric[:, 0].max() < h.metric[:, -1].min() and h.metric[:, -1].min() > 0.8


@pytest.mark.gpu
def test_runs_on_a_gpu():
    stack, clients = problem([0, 1], device="cuda")
    h = federate(Scaffold(0.1), clients, stack.theta, rounds=2, steps=3, seeds=[0, 1], active=2)
    stack, clients = problem([0, 1])
    g = federate(Scaffold(0.1), clients, stack.theta, rounds=2, steps=3, seeds=[0, 1], active=2)
    assert h.theta.is_cuda
    torch.testing.assert_close(h.theta.cpu(), g.theta, atol=1e-10, rtol=0)


def test_batches_with_replacement_come_from_the_own_data_and_do_not_depend_on_the_stack():
    g = torch.Generator().manual_seed(1)
    x, y = torch.arange(20.0)[:, None], torch.randint(0, 3, (20,), generator=g)
    parts = list(torch.arange(20).split([6, 14]))
    active = torch.tensor([[0, 1], [1, 0], [1, 0]])

    def draw(runs, steps, seeds):
        stack = Stack.init(lambda: MLP([1, 3]), range(len(runs)))
        clients = Classification(stack, x, y, [parts] * len(runs), 50, replace=True)
        batches = clients.batches(active[runs], steps, seeds, t=2)
        return torch.stack([b[0] for b in batches]).view(steps, len(runs), 2, 50)

    drawn = draw([0, 1, 2], 3, [7, 7, 8])
    assert drawn[:, 0, 0].unique().tolist() == list(range(6))
    assert drawn[:, 0, 1].unique().tolist() == list(range(6, 20))
    assert torch.equal(drawn[:, 0], drawn[:, 1].flip(1))  # the same seed: the same batches
    assert not torch.equal(drawn[:, 1], drawn[:, 2])
    assert torch.equal(drawn[:1, 2], draw([2], 1, [8])[:, 0])
