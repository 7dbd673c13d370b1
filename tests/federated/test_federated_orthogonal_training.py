"""FOT: a loop over clients with numpy's SVD, exact old outputs, sketches that add up, rivals."""

import numpy as np
import pytest
import torch
from scipy.linalg import subspace_angles

from miniature import data
from miniature.federated.baselines import FedAvg
from miniature.federated.engine import federate
from miniature.federated.federated_orthogonal_training import (
    FOT,
    GPM,
    FedEWC,
    end_of_task,
    expand,
    fisher,
    layer,
    layer_inputs,
    pooled,
    rank,
    sketches,
)
from miniature.federated.objectives import Classification, Quadratics
from miniature.models import MLP
from miniature.stack import Stack

SEEDS, LAYERS, SIZES, C, M = [0, 1], ["0", "2", "4"], [64, 20, 20, 10], 3, 4
RATE = 0.1


def setting(device="cpu", dtype=torch.float64):
    """Models, and for two tasks the samples, client after client [S, n, d], and objectives."""
    stack = Stack.init(lambda: MLP(SIZES), SEEDS, device=device, dtype=dtype)
    digits = data.digits()
    x = digits.x_train[: len(SEEDS) * C * M].to(device, dtype)
    y = digits.y_train[: len(SEEDS) * C * M].to(device)
    parts = [[torch.arange(M) + M * (i + C * r) for i in range(C)] for r in range(len(SEEDS))]
    xs = (x, x.flip(1))
    tasks = [Classification(stack, v, y, parts, batch_size=M) for v in xs]
    sizes = torch.full((len(SEEDS), C), M)
    return stack, [v.view(len(SEEDS), C * M, -1) for v in xs], sizes, tasks


def train(method, task, theta, rounds=12, steps=4, **options):
    return federate(method, task, theta, rounds=rounds, steps=steps, seeds=SEEDS, **options).theta


def after_one_task(epsilon=1.0, **options):
    stack, xs, sizes, tasks = setting(**options)
    theta = train(FedAvg(RATE), tasks[0], stack.theta)
    basis = end_of_task(stack, theta, xs[0], sizes, {}, layers=LAYERS, epsilon=epsilon, seeds=SEEDS)
    return stack, xs, sizes, tasks, theta, basis


def subspace(seed, S, d, r):
    """A basis as FOT keeps it: r orthonormal columns, then zero ones."""
    g = torch.Generator().manual_seed(seed)
    Q, _ = torch.linalg.qr(torch.randn(S, d, d, generator=g, dtype=torch.float64))
    Q[..., r:] = 0
    return Q


def test_two_tasks_equal_a_loop_over_clients():
    epsilon, s = 0.9, 30
    stack, xs, sizes, tasks, theta, _ = after_one_task()
    basis = end_of_task(
        stack, theta, xs[0], sizes, {}, layers=LAYERS, epsilon=epsilon, seeds=SEEDS, s=s
    )
    ours = train(FOT(RATE, 0.7, stack, basis), tasks[1], theta, rounds=4)
    second = end_of_task(
        stack, ours, xs[1], sizes, basis, layers=LAYERS, epsilon=0.95, seeds=SEEDS, s=s, t=1
    )

    def inputs(module, x):
        """The layers' inputs, one a column, with a row of ones."""
        found = []
        for part in module:
            if isinstance(part, torch.nn.Linear):
                found.append(torch.cat([x, torch.ones_like(x[:, :1])], 1).T.detach().numpy())
            x = part(x)
        return found

    def extra_round(module, x, old, eps, run, t):
        new, columns = [], inputs(module, x)
        for i, (X, O) in enumerate(zip(columns, old)):
            draw = np.random.default_rng([SEEDS[run], 3, 3 * t + i])
            gamma, Y, ratios = draw.standard_normal((C * M, s), dtype=np.float32), 0, []
            for c in range(C):
                own = slice(c * M, (c + 1) * M)
                R = X[:, own] - O @ O.T @ X[:, own]
                Y = Y + R @ gamma[own]
                ratios.append((np.linalg.norm(R) / np.linalg.norm(X[:, own])) ** 2)
            r = np.mean(ratios)
            U, S, _ = np.linalg.svd(Y)
            k = 0
            while (S[:k] ** 2).sum() / (S**2).sum() <= (r - (1 - eps)) / r:
                k += 1
            new.append(np.concatenate([O, U[:, :k]], 1))
        return new

    for run in range(len(SEEDS)):
        module = stack.module(run, theta)
        empty = [np.zeros((d + 1, 0)) for d in SIZES[:-1]]
        bases = extra_round(module, xs[0][run], empty, epsilon, run, 0)
        vector = theta[run].clone()
        for t in range(4):  # rounds
            arrived = []
            batches = tasks[1].batches(torch.tensor([[*range(C)]] * 2), 4, SEEDS, t)
            for c in range(C):
                v = vector.clone()
                for x, y in batches:
                    g, _ = stack.grad(
                        lambda m, a, b: torch.nn.functional.cross_entropy(m(a), b),
                        x[run * C + c][None],
                        y[run * C + c][None],
                        theta=v[None],
                    )
                    v = v - RATE * g[0]
                arrived.append(v)
            G = 0.7 * (vector - torch.stack(arrived).mean(0))
            params = {k: p[0].numpy() for k, p in stack.params(G[None]).items()}
            for name, O in zip(LAYERS, bases):
                W = np.column_stack([params[f"{name}.weight"], params[f"{name}.bias"]])
                W = W - W @ O @ O.T
                params[f"{name}.weight"], params[f"{name}.bias"] = W[:, :-1], W[:, -1]
            flat = np.concatenate([params[k].ravel() for k in stack.shapes])
            vector = vector - torch.from_numpy(flat)
        torch.testing.assert_close(ours[run], vector, atol=1e-12, rtol=0)
        bases = extra_round(stack.module(run, ours), xs[1][run], bases, 0.95, run, 1)
        for name, O in zip(LAYERS, bases):
            mine = second[name][run]
            assert rank(mine[None])[0] == O.shape[1]
            np.testing.assert_allclose(mine @ mine.T, O @ O.T, atol=1e-10)


def test_old_outputs_do_not_change_at_epsilon_one():
    stack, xs, sizes, tasks, theta, basis = after_one_task()
    new = train(FOT(RATE, stack=stack, basis=basis), tasks[1], theta)
    X = layer_inputs(stack, theta, xs[0], LAYERS)
    for name in LAYERS:
        W, W_new = (layer(stack.params(v), name) for v in (theta, new))
        assert (W_new - W).abs().max() > 1e-3
        torch.testing.assert_close(X[name] @ W_new.mT, X[name] @ W.mT, atol=1e-12, rtol=0)
    torch.testing.assert_close(
        stack(xs[0], theta=new), stack(xs[0], theta=theta), atol=1e-12, rtol=0
    )
    forgetful = train(FedAvg(RATE), tasks[1], theta)
    assert (stack(xs[0], theta=forgetful) - stack(xs[0], theta=theta)).abs().max() > 0.1
    # The next task's basis contains the last one's.
    both = end_of_task(
        stack, new, xs[1], sizes, basis, layers=LAYERS, epsilon=1.0, seeds=SEEDS, t=1
    )
    for name, O in both.items():
        torch.testing.assert_close(O @ (O.mT @ basis[name]), basis[name], atol=1e-12, rtol=0)
        assert (rank(O) >= rank(basis[name])).all()


def test_below_one_the_change_is_bounded_by_what_was_left_out():
    stack, xs, _, tasks, theta, basis = after_one_task(0.9)
    new = train(FOT(RATE, stack=stack, basis=basis), tasks[1], theta)
    for name, X in layer_inputs(stack, theta, xs[0], LAYERS).items():
        dW = layer(stack.params(new), name) - layer(stack.params(theta), name)
        R = X - (X @ basis[name]) @ basis[name].mT
        change = (X @ dW.mT).norm(dim=(1, 2))
        assert (change > 0).all()
        assert (change <= torch.linalg.matrix_norm(dW, 2) * R.norm(dim=(1, 2)) + 1e-12).all()


def test_the_projection_is_one_and_leaves_other_layers_alone():
    stack, *_ = setting()
    method = FOT(RATE, stack=stack, basis={"2": subspace(0, 2, 21, 5)})
    G = torch.randn(2, stack.size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    once = method.project(G)
    torch.testing.assert_close(method.project(once), once, atol=1e-12, rtol=0)
    for name in stack.shapes:
        same = torch.equal(stack.params(once)[name], stack.params(G)[name])
        assert same == (not name.startswith("2."))
    assert (layer(stack.params(once), "2") @ subspace(0, 2, 21, 5)).abs().max() < 1e-12
    torch.testing.assert_close(G, torch.randn(
        2, stack.size, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    ), atol=0, rtol=0)  # fmt: skip


def test_a_basis_without_the_constant_leaves_biases_free():
    stack, *_ = setting()
    method = FOT(RATE, stack=stack, basis={"0": subspace(0, 2, 64, 7)})
    G = torch.ones(2, stack.size, dtype=torch.float64)
    once = stack.params(method.project(G))
    assert torch.equal(once["0.bias"], stack.params(G)["0.bias"])
    assert (once["0.weight"] @ subspace(0, 2, 64, 7)).abs().max() < 1e-12


def test_without_a_basis_it_is_fedavg():
    stack, _, _, tasks = setting()
    a, b = (train(m, tasks[0], stack.theta, active=2) for m in (FOT(RATE, 0.5), FedAvg(RATE, 0.5)))
    assert torch.equal(a, b)


def test_sketches_add_up_to_that_of_the_concatenation():
    stack, xs, _, _, theta, basis = after_one_task(0.9)
    for name, X in layer_inputs(stack, theta, xs[1], LAYERS).items():
        sizes = torch.tensor([[5, 1, 6], [2, 8, 2]])
        Y, ratio = sketches(X, basis[name], sizes, 9, SEEDS, stream=4)
        whole, share = sketches(X, basis[name], sizes.sum(1, keepdim=True), 9, SEEDS, stream=4)
        torch.testing.assert_close(Y.sum(1), whole[:, 0], atol=1e-12, rtol=0)
        # With weights ||X_i||^2 instead of n_i the ratio would be that of the pooled inputs.
        energy = torch.stack(
            [torch.stack([p.square().sum() for p in v.split(n)]) for v, n in zip(X, sizes.tolist())]
        )
        weighted = (energy * ratio).sum(1) / energy.sum(1)
        torch.testing.assert_close(weighted, share[:, 0], atol=1e-12, rtol=0)


def test_sketches_use_other_numbers_for_other_runs_tasks_and_clients():
    X, sizes = torch.ones(2, 6, 4, dtype=torch.float64), torch.tensor([[3, 3]] * 2)
    zero = torch.zeros(2, 4, 4, dtype=torch.float64)
    Y, _ = sketches(X, zero, sizes, 5, [0, 1])
    again, other = (sketches(X, zero, sizes, 5, [0, 1], stream=t)[0] for t in (0, 1))
    assert torch.equal(Y, again)
    for a, b in ((Y, other), (Y[0], Y[1]), (Y[:, 0], Y[:, 1])):
        assert (a - b).abs().max() > 0.1


def test_rows_beyond_the_clients_sizes_are_padding():
    X = torch.randn(1, 8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    zero, sizes = torch.zeros(1, 5, 5, dtype=torch.float64), torch.tensor([[2, 4]])
    Y, ratio = sketches(X, zero, sizes, 3, [0])
    X[:, 6:] = 1e9
    assert torch.equal(sketches(X, zero, sizes, 3, [0])[0], Y)
    torch.testing.assert_close(ratio, torch.ones_like(ratio))


def test_wide_sketches_of_exact_rank_find_the_span():
    stack, xs, _, _, theta, basis = after_one_task()
    for name, X in layer_inputs(stack, theta, xs[0], LAYERS).items():
        for run in range(len(SEEDS)):
            k = torch.linalg.matrix_rank(X[run])
            O = basis[name][run]
            assert rank(O[None])[0] == k < O.shape[0]
            U = np.linalg.svd(X[run].T.numpy())[0][:, :k]
            assert subspace_angles(O[:, :k].numpy(), U).max() < 1e-5


def test_the_pooled_basis_is_that_of_numpys_svd_and_wider_sketches_come_closer():
    stack, xs, sizes, _, theta, _ = after_one_task()
    true = pooled(stack, theta, xs[0], {}, layers=LAYERS, epsilon=0.9)
    angles = {s: [] for s in (8, 64, 512)}
    for name, X in layer_inputs(stack, theta, xs[0], LAYERS).items():
        for run in range(len(SEEDS)):
            U, S, _ = np.linalg.svd(X[run].T.numpy())
            kept = (S**2).cumsum() / (S**2).sum()
            k = int((kept <= 0.9).sum()) + 1
            assert rank(true[name])[run] == k
            mine = true[name][run, :, :k].numpy()
            assert subspace_angles(mine, U[:, :k]).max() < 1e-7
            for s, found in angles.items():
                Y = sketches(X, torch.zeros_like(true[name]), sizes, s, SEEDS)[0].sum(1)
                V = np.linalg.svd(Y[run].numpy())[0][:, :k]
                found.append(subspace_angles(V, mine).mean())
    assert np.mean(angles[8]) > 1.5 * np.mean(angles[64]) > 2 * np.mean(angles[512])


@pytest.mark.parametrize("epsilon", [0.5, 0.9, [0.5, 0.99]])
@pytest.mark.parametrize("r", [0, 4])
def test_expand_adds_the_fewest_directions_that_suffice(epsilon, r):
    g = torch.Generator().manual_seed(3)
    O = subspace(1, 2, 12, r)
    X = torch.randn(2, 30, 12, generator=g, dtype=torch.float64) @ torch.diag(
        torch.linspace(3, 0.1, 12, dtype=torch.float64)
    )
    R = X - (X @ O) @ O.mT
    share = R.square().sum((1, 2)) / X.square().sum((1, 2))
    new = expand(O, R.mT, share, epsilon)
    wanted = torch.as_tensor(epsilon).expand(2)
    for run in range(2):
        k = int(rank(new)[run])
        Q = new[run, :, :k]
        torch.testing.assert_close(Q.T @ Q, torch.eye(k, dtype=Q.dtype), atol=1e-12, rtol=0)
        assert not new[run, :, k:].any()
        torch.testing.assert_close(Q @ (Q.T @ O[run]), O[run], atol=1e-12, rtol=0)
        lost = (X[run] - X[run] @ Q @ Q.T).square().sum() / X[run].square().sum()
        assert lost <= 1 - wanted[run] + 1e-12
        if k > r:  # one direction fewer would not do
            S = torch.linalg.svdvals(R[run])
            assert S[k - r - 1 :].square().sum() / X[run].square().sum() >= 1 - wanted[run]


def test_clients_count_by_their_number_of_samples():
    stack, xs, _, _, theta, basis = after_one_task(0.9)
    sizes, grid = torch.tensor([[1, 1, 10], [9, 2, 1]]), (0.91, 0.93, 0.95, 0.96, 0.97, 0.98, 0.99)
    ranks = [
        rank(
            end_of_task(
                stack, theta, xs[1], sizes, basis, layers=["0"], epsilon=e, seeds=SEEDS, s=40
            )["0"]
        )
        for e in grid
    ]
    for run, own in enumerate(sizes.tolist()):
        O = basis["0"][run].numpy()
        X = torch.cat([xs[1][run], torch.ones(C * M, 1)], 1).numpy()
        R, start, r = X - X @ O @ O.T, 0, 0.0
        for n in own:
            mine = slice(start, start + n)
            r += n / (C * M) * (np.linalg.norm(R[mine]) / np.linalg.norm(X[mine])) ** 2
            start += n
        draw = np.random.default_rng([SEEDS[run], 3, 0])
        S = np.linalg.svd(R.T @ draw.standard_normal((C * M, 40), dtype=np.float32))[1] ** 2
        for e, found in zip(grid, ranks):
            enough = (r - (1 - e)) / r
            k = next(k for k in range(len(S)) if S[:k].sum() / S.sum() > enough)
            assert found[run] == rank(basis["0"])[run] + k


def test_expand_adds_nothing_where_nothing_is_missing():
    O = subspace(2, 1, 6, 3)
    Y = torch.randn(1, 6, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert rank(expand(O, Y, torch.tensor([0.05]).double(), 0.9)) == 3
    assert rank(expand(O, O @ O.mT @ Y * 1e-16, torch.tensor([1e-32]).double(), 1.0)) == 3
    Y[0, 0, 0] = torch.nan  # a run that diverged
    torch.testing.assert_close(expand(O, Y, torch.tensor([0.5]).double(), 0.9).abs(), O.abs())


def test_a_run_does_not_depend_on_what_else_is_stacked():
    stack, xs, sizes, _, theta, basis = after_one_task(0.9)
    method = FOT(RATE, stack=stack, basis=basis)
    together = method.project(theta)
    for i in range(len(SEEDS)):
        alone = FOT(RATE, stack=stack, basis={k: O[i : i + 1] for k, O in basis.items()})
        torch.testing.assert_close(
            alone.project(theta[i : i + 1])[0], together[i], rtol=0, atol=1e-14
        )
        single = end_of_task(
            stack, theta[i : i + 1], xs[0][i : i + 1], sizes[i : i + 1], {},
            layers=LAYERS, epsilon=0.9, seeds=SEEDS[i : i + 1],
        )  # fmt: skip
        for name, O in single.items():
            torch.testing.assert_close(O[0] @ O[0].T, basis[name][i] @ basis[name][i].T)


def test_gpm_projects_every_gradient_and_equals_fot_for_one_step():
    stack, _, _, tasks, theta, basis = after_one_task(0.9)
    parts = [[torch.arange(C * M) + C * M * r] for r in range(len(SEEDS))]
    one = Classification(stack, tasks[1].x, tasks[1].y, parts, batch_size=C * M)
    a, b = (train(m(RATE, stack=stack, basis=basis), one, theta, steps=1) for m in (FOT, GPM))
    torch.testing.assert_close(a, b, atol=1e-13, rtol=0)
    seen = []

    class Tape(GPM):
        def local_step(self, x, grad, c):
            new = super().local_step(x, grad, c)
            seen.append((new - x)[:, 0])
            return new

    train(Tape(RATE, stack=stack, basis=basis), one, theta, rounds=2)
    for step in seen:
        for name, O in basis.items():
            assert (layer(stack.params(step), name) @ O).abs().max() < 1e-13
    with pytest.raises(ValueError, match="needs one client, not 3"):
        train(GPM(RATE, stack=stack, basis=basis), tasks[1], theta, rounds=1)


def test_ewc_is_a_step_and_an_implicit_pull_to_the_anchor():
    q, g = Quadratics.random(SEEDS, 4, 5), torch.Generator().manual_seed(0)
    anchor, F = (torch.rand(2, 5, generator=g, dtype=torch.float64) for _ in range(2))
    ours = federate(FedEWC(0.05, 8.0, anchor, F), q, anchor, rounds=5, steps=3, seeds=SEEDS).theta
    x = anchor.clone()
    for _ in range(5):
        y = x[:, None].repeat(1, 4, 1)
        for _ in range(3):
            z = y - 0.05 * ((q.A @ y[..., None])[..., 0] - q.b)
            # y minimizes |y - z|^2 / (2 lr) + lam/2 sum F (y - a)^2: its gradient vanishes.
            y = (z / 0.05 + 8.0 * F[:, None] * anchor[:, None]) / (1 / 0.05 + 8.0 * F[:, None])
        x = y.mean(1)
    torch.testing.assert_close(ours, x, atol=1e-12, rtol=0)
    # A small weight is the plain gradient of the penalty, a huge one holds the anchor.
    plain, none, held = (
        federate(FedEWC(0.05, lam, anchor, F), q, 0 * anchor, rounds=1, steps=1, seeds=SEEDS).theta
        for lam in (1e-3, 0.0, 1e12)
    )
    torch.testing.assert_close(plain - none, 0.05e-3 * F * (anchor - none), atol=1e-8, rtol=0)
    torch.testing.assert_close(held, anchor, atol=1e-8, rtol=0)
    assert torch.equal(
        none, federate(FedAvg(0.05), q, 0 * anchor, rounds=1, steps=1, seeds=SEEDS).theta
    )


def test_fisher_is_the_mean_squared_gradient_of_single_samples():
    stack, xs, _, tasks = setting()
    y = tasks[0].y.view(len(SEEDS), C * M)
    F = fisher(stack, stack.theta, xs[0], y)
    for run in range(len(SEEDS)):
        module, total = stack.module(run), 0
        for x, label in zip(xs[0][run], y[run]):
            module.zero_grad()
            torch.nn.functional.cross_entropy(module(x[None]), label[None]).backward()
            total = total + torch.cat([p.grad.flatten() for p in module.parameters()]) ** 2
        torch.testing.assert_close(F[run], total / (C * M), atol=1e-14, rtol=1e-10)


def test_bad_input():
    stack, xs, sizes, *_ = setting()
    zero = torch.zeros(2, 65, 65, dtype=torch.float64)
    with pytest.raises(ValueError, match="needs a stack"):
        FOT(RATE, basis={"0": zero})
    with pytest.raises(ValueError, match=r"layer '0': basis of \[2, 5, 5\]"):
        FOT(RATE, stack=stack, basis={"0": zero[:, :5, :5]})
    with pytest.raises(ValueError, match="no linear layer '1': it is ReLU"):
        layer_inputs(stack, stack.theta, xs[0], ["1"])
    with pytest.raises(ValueError, match="no linear layer 'head'"):
        FOT(RATE, stack=stack, basis={"head": zero})
    X = layer_inputs(stack, stack.theta, xs[0], ["0"])["0"]
    with pytest.raises(ValueError, match="s must be positive, got 0"):
        sketches(X, zero, sizes, 0, SEEDS)
    with pytest.raises(ValueError, match="1 seeds for 2 runs"):
        sketches(X, zero, sizes, 3, SEEDS[:1])
    with pytest.raises(ValueError, match="clients hold 24 rows, X only 12"):
        sketches(X, zero, 2 * sizes, 3, SEEDS)
    for epsilon in (0.0, 1.2, [0.9, -1.0]):
        with pytest.raises(ValueError, match=r"epsilon must lie in \(0, 1\]"):
            expand(zero, X.mT, torch.ones(2).double(), epsilon)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_type_and_device_are_kept(dtype, device):
    stack, _, _, tasks, theta, basis = after_one_task(1.0, device=device, dtype=dtype)
    new = train(FOT(RATE, stack=stack, basis=basis), tasks[1], theta)
    for v in (new, *basis.values()):
        assert v.dtype == dtype and v.device.type == device and v.isfinite().all()
