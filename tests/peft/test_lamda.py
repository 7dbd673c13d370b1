"""LaMDA: its gradients, what it keeps, what it freezes, what it can reach; ranks; bad input."""

import copy
import itertools

import pytest
import torch
from torch import nn

from miniature.models import MLP
from miniature.peft import LoRA, adapted, attach, finetune, merge, saved_bytes, trainable
from miniature.peft.lamda import LaMDA, LaMDAPlus, LoRAFA, Path, allocate, best, captured
from miniature.peft.tasks import Regression
from miniature.stack import Stack

F64 = torch.float64
INF = float("inf")


def layer(m, n, method, seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(n, m).double())
    return adapted(attach(model, method))["0"]


def tensors(*shapes, seed=0):
    torch.manual_seed(seed)
    return [torch.randn(s, dtype=F64) for s in shapes]


@pytest.mark.parametrize("alpha", [None, 2.0])
@pytest.mark.parametrize("m, n", [(6, 9), (9, 6)])
def test_frames_are_singular_vectors_and_all_starts_are_the_base(m, n, alpha):
    for start in ("residual", "zero", "lora"):
        a = layer(m, n, LaMDA(4, alpha, start=start))
        W = a.base.weight.detach()
        s = 1.0 if alpha is None else alpha / 4
        assert float(a.s) == s
        torch.testing.assert_close(a.W + a.method.delta(a), W, atol=1e-12, rtol=0)
        x = torch.randn(5, n, dtype=F64)
        torch.testing.assert_close(a(x), a.base(x), atol=1e-12, rtol=0)
        if start == "lora":
            assert (a.B == 0).all() and (a.S.abs() <= 0.5).all()
            assert (a.S < 0).any() and (a.S > 0).any()
            assert torch.equal(a.S.detach().bfloat16().double(), a.S.detach())
            continue
        U, sigma, Vh = torch.linalg.svd(W, full_matrices=False)
        torch.testing.assert_close((a.A @ Vh[:4].T).abs(), torch.eye(4, dtype=F64))
        torch.testing.assert_close((a.B.T @ U[:, :4]).abs(), torch.eye(4, dtype=F64))
        if start == "residual":
            torch.testing.assert_close(a.S.detach(), torch.diag(sigma[:4] / s))
            torch.testing.assert_close(torch.linalg.svdvals(a.W)[: min(m, n) - 4], sigma[4:])
        else:
            assert (a.S == 0).all() and torch.equal(a.W, W)


def test_the_update_is_s_B_S_A():
    a = layer(4, 5, LaMDA(3, alpha=6.0, start="zero"))
    S, B = tensors((3, 3), (4, 3))
    with torch.no_grad():
        a.S.copy_(S)
        a.B.copy_(B)
    plain = torch.zeros(4, 5, dtype=F64)
    for i, j, k, l in itertools.product(range(4), range(3), range(3), range(5)):
        plain[i, l] += 2.0 * B[i, j] * S[j, k] * a.A[k, l]
    torch.testing.assert_close(a.method.delta(a), plain)
    x = torch.randn(2, 7, 5, dtype=F64)
    torch.testing.assert_close(a(x), a.base(x) + x @ plain.T)


@pytest.mark.parametrize("shape", [(11,), (3, 7)])
def test_the_written_out_backward_pass_is_that_of_autograd(shape):
    x, A, S, B, g = tensors((*shape, 6), (3, 6), (3, 3), (5, 3), (*shape, 5))
    inputs = [t.requires_grad_(True) for t in (x, S, B)]
    plain = torch.autograd.grad(x @ A.T @ S.T @ B.T, inputs, g)
    ours = torch.autograd.grad(Path.apply(x, A, S, B)[0], inputs, g)
    for a, b in zip(ours, plain):
        torch.testing.assert_close(a, b, atol=1e-13, rtol=1e-13)
    assert torch.autograd.gradcheck(lambda *v: Path.apply(v[0], A, *v[1:])[0], inputs)


def test_a_token_by_token_sum_gives_the_same_gradients():
    """The equations of the paper, in columns, one token after another."""
    a = layer(5, 6, LaMDA(3, alpha=6.0))
    x, g = tensors((4, 6), (4, 5), seed=1)
    x.requires_grad_(True)
    by_x, by_S, by_B = torch.autograd.grad(a(x), [x, a.S, a.B], g)
    S, B = a.S.detach(), a.B.detach()
    for t in range(4):
        z = a.A @ x[t].detach()
        by_S -= 2.0 * torch.outer(B.T @ g[t], z)
        by_B -= 2.0 * torch.outer(g[t], S @ z)
        by_x[t] -= a.W.T @ g[t] + 2.0 * a.A.T @ S.T @ B.T @ g[t]
    for rest in (by_x, by_S, by_B):
        assert rest.abs().max() < 1e-12


@pytest.mark.parametrize("m, n", [(32, 32), (32, 256), (256, 32)])
def test_it_keeps_r_numbers_a_token_twice_and_once_when_B_is_frozen(m, n):
    tokens, r = 50, 4
    x = torch.randn(tokens, n, dtype=F64, requires_grad=True)

    def kept(method):
        model = nn.Sequential(layer(m, n, method))
        with saved_bytes(model) as saved:
            model(x)
        return saved.total

    assert kept(LaMDA(r)) == 2 * tokens * r * 8
    assert kept(LaMDA(r, eta=0.0)) == tokens * r * 8
    assert kept(LoRAFA(r)) == tokens * r * 8
    assert kept(LoRA(r)) == tokens * (n + r) * 8
    A, S, B = tensors((r, n), (r, r), (m, r))
    held = nn.ParameterList([A, S, B])  # their own storage is not counted
    with saved_bytes(held) as saved:
        Path.apply(x, held[0].detach(), held[1], held[2])
    assert saved.total == 2 * tokens * r * 8


def run(method, steps, optimizer=torch.optim.AdamW, n=2, record=True, **options):
    """Train copies of a small problem; return the stack and theta after every step."""
    task = Regression(range(n), 7, 6, "gaussian", dtype=F64)
    stack = Stack([attach(task.model(i), method) for i in range(n)])
    options = {"lr": 0.05, "weight_decay": 0.1} | options
    seen = []
    finetune(
        stack,
        method,
        task.loss,
        task.batches(8, steps),
        stack.optimizer(optimizer, **options),
        callback=lambda t, stack: seen.append(stack.theta.clone()),
    )
    return stack, [stack.params(theta) for theta in seen]


@pytest.mark.parametrize("eta, T", [(0.3, 20), (0.5, 9), (1.0, 10), (0.04, 50)])
def test_columns_freeze_one_after_another_exactly(eta, T):
    """By a plain loop over steps and columns; momentum and decay must not move a frozen one."""
    r, m = 4, 7
    method = LaMDA(r, eta=eta, steps=T)
    _, seen = run(method, T)
    for t in range(1, T + 1):
        count = 0
        while count < r and (count + 1) * eta * T <= r * (t - 1) + 1e-6:
            count += 1
        assert int(method.frozen(r, t)) == count
        before, after = seen[t - 1], seen[t]
        moved = (before["0.B"] != after["0.B"]).all(1)
        assert (moved == (torch.arange(r) >= count)).all(), t
        assert (before["0.S"] != after["0.S"]).all()
        changed = sum(int((before[k] != after[k])[0].sum()) for k in before)
        assert int(method.entries(m, r, t)) == changed == r * r + m * (r - count)
    assert int(method.frozen(r, 1)) == 0 and int(method.frozen(r, T + 1)) == r


def test_the_released_schedule_forgets_r():
    method = LaMDA(8, eta=0.3, steps=100, schedule="released")
    steps = {t: int(method.frozen(8, t)) for t in (1, 30, 31, 60, 61, 90, 91, 100)}
    assert steps == {1: 0, 30: 0, 31: 1, 60: 1, 61: 2, 90: 2, 91: 3, 100: 3}


def test_eta_of_nothing_and_of_infinity():
    assert [k for k in trainable(attach(MLP([6, 5]), LaMDA(3, eta=0.0)))] == ["0.S"]
    assert int(LaMDA(3, eta=0.0).frozen(3, 1)) == 3 and int(LaMDA(3, eta=0.0).entries(9, 3, 1)) == 9
    _, seen = run(LaMDA(4, eta=INF, steps=5), 12)
    assert all((a["0.B"] != b["0.B"]).all() for a, b in itertools.pairwise(seen))


def test_copies_of_different_eta_train_as_each_alone():
    etas = [0.3, 1.0, INF]
    together, _ = run(LaMDA(4, eta=etas, steps=20), 20, n=3)
    for i, eta in enumerate(etas):
        alone, _ = run(LaMDA(4, eta=eta, steps=20), 20, n=3)
        torch.testing.assert_close(together.theta[i], alone.theta[i], atol=1e-12, rtol=0)


def test_a_run_is_not_held_to_the_columns_of_the_run_before():
    method = LaMDA(4, steps=20)
    first, _ = run(method, 20)
    run(method, 20, n=3)
    again, _ = run(method, 20)
    assert torch.equal(first.theta, again.theta)


def test_after_freezing_the_update_stays_between_the_frames():
    T = 30
    stack, seen = run(LaMDA(3, steps=T), T)
    a = adapted(stack.module(0))["0"]
    frozen = int(0.3 * T) + 1  # the last step that moved a column is step 9
    A = a.A
    Q = torch.linalg.qr(seen[-1]["0.B"][0])[0]

    def update(p):
        return p["0.B"][0] @ p["0.S"][0] @ A

    for p in seen[frozen:]:
        change = update(p) - update(seen[frozen])
        assert (change - Q @ (Q.T @ change @ A.T) @ A).norm() <= 1e-12
    early = update(seen[frozen]) - update(seen[0])
    assert (early - Q @ (Q.T @ early @ A.T) @ A).norm() > 1e-3


def test_training_S_finds_the_closed_form():
    """By `best`, and that by least squares over a design of outer products."""
    task = Regression([0], 6, 5, "gaussian", dtype=F64)
    method = LaMDA(3, alpha=6.0, eta=0.0)
    stack = Stack([attach(task.model(0), method)])
    x = 5**0.5 * torch.eye(5, dtype=F64)[None]  # white: the mean of x x' is the identity
    y = x @ (task.W0 + task.shift).mT
    optimizer = stack.optimizer(torch.optim.SGD, 0.1)
    losses = finetune(stack, method, task.loss, [(x, y)] * 300, optimizer)
    a = adapted(stack.module(0))["0"]
    D = task.W0[0] + task.shift[0] - a.W
    S, left = best(D / 2.0, a.B, a.A)
    torch.testing.assert_close(a.S.detach(), S, atol=1e-8, rtol=0)
    torch.testing.assert_close(losses[-1, 0], 4.0 * left, atol=1e-8, rtol=0)
    B, A, D = tensors((2, 6, 3), (2, 3, 5), (2, 6, 5))  # frames that are not orthonormal
    S, left = best(D, B, A)
    for i in range(2):
        design = torch.stack(
            [torch.outer(B[i, :, j], A[i, k]).flatten() for j in range(3) for k in range(3)], 1
        )
        solved = torch.linalg.lstsq(design, D[i].flatten()[:, None]).solution[:, 0]
        torch.testing.assert_close(S[i].flatten(), solved)
        torch.testing.assert_close(left[i], (design @ solved - D[i].flatten()).square().sum())


def test_without_B_nothing_ever_moves():
    """B = 0 and eta = 0: the gradient of S is zero, and so the loss stays, exactly."""
    task = Regression([0], 6, 5, "gaussian", dtype=F64)
    method = LaMDA(3, eta=0.0, start="lora")
    stack = Stack([attach(task.model(0), method)])
    x, y = next(task.batches(8, 1))
    losses = finetune(
        stack, method, task.loss, [(x, y)] * 20, stack.optimizer(torch.optim.Adam, 0.1)
    )
    assert (losses == losses[0]).all()


def test_what_A_does_not_see_is_out_of_reach():
    """The floor |D (I - A'A)|^2 by gradient descent, B never frozen."""
    task = Regression([0], 6, 5, "gaussian", dtype=F64)
    method = LaMDA(2, eta=INF)
    stack = Stack([attach(task.model(0), method)])
    x = 5**0.5 * torch.eye(5, dtype=F64)[None]
    y = x @ (task.W0 + task.shift).mT
    losses = finetune(
        stack, method, task.loss, [(x, y)] * 3000, stack.optimizer(torch.optim.SGD, 0.05)
    )
    A = adapted(stack.module(0))["0"].A
    left = task.shift[0] - task.shift[0] @ A.T @ A
    torch.testing.assert_close(losses[-1, 0], left.square().sum(), atol=1e-6, rtol=0)


def test_ranks_follow_the_flatness_of_the_spectrum():
    flat, middle, steep = torch.ones(8), 0.7 ** torch.arange(8), 0.1 ** torch.arange(8)
    assert allocate([steep, flat, middle], 4, 2).tolist() == [2, 6, 4]
    assert allocate([3 * steep, 0.1 * flat, middle], 4, 2).tolist() == [2, 6, 4]  # scale-free
    assert allocate([flat, steep], 4, 1).tolist() == [5, 3]
    assert allocate([flat], 4, 2).tolist() == [4]
    torch.testing.assert_close(captured(torch.tensor([2.0, 1.0, 1.0]), 1), torch.tensor(4 / 6))
    for L in range(1, 14):
        spectra = [torch.rand(5, 8).sort(-1, descending=True).values for _ in range(L)]
        ranks = allocate(spectra, 4, 2)
        assert ranks.shape == (5, L) and (ranks.sum(-1) == 4 * L).all()
        score = torch.stack([captured(s, 2) + captured(s, 6) for s in spectra], -1)
        for row, by in zip(ranks, score):
            assert all(row[i] >= row[j] for i in range(L) for j in range(L) if by[i] < by[j])


def test_lamda_plus_gives_layers_their_ranks():
    torch.manual_seed(0)
    model = MLP([20, 20, 20, 20])
    with torch.no_grad():
        U, _, Vh = torch.linalg.svd(model[2].weight)
        model[2].weight.copy_((U * 0.1 ** torch.arange(20)) @ Vh)
        model[4].weight.copy_(U)
    attach(model, LaMDAPlus(4))
    assert [len(model[i].S) for i in (0, 2, 4)] == [4, 2, 6]
    again = attach(copy.deepcopy(MLP([20, 3, 20])), LaMDAPlus(4, spread=2))
    assert {len(again[i].S) for i in (0, 2)} <= {2, 3}  # no more than the matrix has


def test_lora_fa_is_lora_with_A_frozen():
    models = []
    for kind in (LoRA, LoRAFA):
        torch.manual_seed(1)
        models.append(attach(nn.Sequential(nn.Linear(6, 5)), kind(3)))
    assert torch.equal(models[0][0].A, models[1][0].A)
    assert [*trainable(models[1])] == ["0.B"]


def test_merging_keeps_what_was_learned():
    stack, _ = run(LaMDA(3, alpha=6.0, steps=10), 10)
    model = stack.module(1)
    x = torch.randn(4, 6, dtype=F64)
    with torch.no_grad():
        torch.testing.assert_close(merge(copy.deepcopy(model))(x), model(x))


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="rank must be positive, not 0"):
        LaMDA(0)
    with pytest.raises(ValueError, match="steps must be a positive number, not 0"):
        LaMDA(steps=0)
    with pytest.raises(ValueError, match=r"start must be one of residual.*not 'svd'"):
        LaMDA(start="svd")
    with pytest.raises(ValueError, match=r"schedule must be one of columns.*not 'code'"):
        LaMDA(schedule="code")
    for eta in (-0.1, [0.3, 0.0]):
        with pytest.raises(ValueError, match="eta must be 0 or more"):
            LaMDA(eta=eta)
    with pytest.raises(ValueError, match=r"spread must lie in 0\.\.3, not 4"):
        LaMDAPlus(4, spread=4)


@pytest.mark.gpu
def test_on_a_gpu():
    task = Regression([0, 1], 7, 6, "gaussian", device="cuda")
    for method in (LaMDA(3, eta=[0.3, 1.0], steps=10), LaMDAPlus(3, steps=10), LoRAFA(3)):
        stack = Stack([attach(task.model(i), method) for i in range(2)])
        losses = finetune(
            stack, method, task.loss, task.batches(8, 10), stack.optimizer(torch.optim.Adam, 0.02)
        )
        assert losses.isfinite().all() and stack.theta.is_cuda
