"""RandLoRA: its sum as a plain loop, its gradient by hand, Hugging Face's layer, bad input."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from miniature.models import MLP
from miniature.peft import adapted, attach, count, finetune, saved_bytes, trainable
from miniature.peft.randlora import RandLoRA, pullback, terms
from miniature.peft.tasks import Regression
from miniature.stack import Stack

F64 = torch.float64


def layer(m, n, method, seed=0, filled=True):
    """One adapted layer, m outputs and n inputs, with diagonals away from where they start."""
    torch.manual_seed(seed)
    a = adapted(attach(nn.Sequential(nn.Linear(n, m).double()), method))["0"]
    if filled:
        with torch.no_grad():
            a.lam.normal_()
            a.gamma.normal_()
    return a


def plain_sum(a, m, n, r, s):
    """The update by loops over the equation's indices."""
    D, d = max(m, n), min(m, n)
    A, B = a.shared_A.numpy(), a.shared_B.numpy()
    lam, gamma = a.lam.detach().numpy(), a.gamma.detach().numpy()
    total = np.zeros((D, d))
    for j in range(len(lam)):
        B_j = B[:D, j * r : (j + 1) * r]
        total += B_j @ np.diag(lam[j]) @ A[:, :d] @ np.diag(gamma[j])
    return s * (total if m >= n else total.T)


@pytest.mark.parametrize("m, n", [(9, 6), (6, 9), (7, 7)])
@pytest.mark.parametrize("r", [1, 4, 6, 8])
@pytest.mark.parametrize("alpha", [None, 5.0])
def test_the_update_is_the_sum_of_the_equation(m, n, r, alpha):
    a = layer(m, n, RandLoRA(r, alpha))
    N = math.ceil(min(m, n) / r)
    assert a.lam.shape == (N, r) and a.gamma.shape == (N, min(m, n))
    expected = plain_sum(a, m, n, r, 20 if alpha is None else alpha / r)
    np.testing.assert_allclose(a.method.delta(a).detach(), expected, atol=1e-11)
    x = torch.randn(5, n, dtype=F64)
    by_hand = x @ (a.W + torch.from_numpy(expected)).T + a.base.bias
    torch.testing.assert_close(a(x), by_hand, atol=1e-11, rtol=1e-11)


def test_where_it_starts():
    for m, n, r in ((9, 6, 1), (3, 40, 1), (5, 5, 2)):
        a = layer(m, n, RandLoRA(r), filled=False)
        d = min(m, n)
        N = math.ceil(d / r)
        assert (a.lam == 0).all()
        assert (a.gamma == 1 / max(N, d)).all()
        a(torch.randn(4, n, dtype=F64)).square().sum().backward()
        assert (a.gamma.grad == 0).all() and (a.lam.grad != 0).all()


@pytest.mark.parametrize("m, n, r", [(9, 6, 4), (6, 9, 4), (8, 8, 3)])
def test_a_run_of_adam_is_the_plain_loops(m, n, r):
    """Fifty steps from the start, with NumPy's gradients of the equation, entry by entry."""
    a = layer(m, n, RandLoRA(r), filled=False)
    D, d = max(m, n), min(m, n)
    N = math.ceil(d / r)
    A = a.shared_A.numpy()
    B = [a.shared_B.numpy()[:D, j * r : (j + 1) * r] for j in range(N)]
    lam, gamma = np.zeros((N, r)), np.full((N, d), 1 / max(N, d))
    moments = [(np.zeros_like(p), np.zeros_like(p)) for p in (lam, gamma)]
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(20, n)), rng.normal(size=(20, m))
    W, bias = a.W.numpy(), a.base.bias.numpy()
    optimizer = torch.optim.Adam([a.lam, a.gamma], lr=0.02)
    for t in range(1, 51):
        update = 20 * sum(B[j] @ np.diag(lam[j]) @ A @ np.diag(gamma[j]) for j in range(N))
        error = x @ (W + (update if m >= n else update.T)).T + bias - y
        G = error.T @ x if m >= n else x.T @ error
        H = [20 * (B[j].T @ G) * A for j in range(N)]
        grads = (
            np.array([H[j] @ gamma[j] for j in range(N)]),
            np.array([lam[j] @ H[j] for j in range(N)]),
        )
        for p, g, (first, second) in zip((lam, gamma), grads, moments):
            first += 0.1 * (g - first)
            second += 0.001 * (g**2 - second)
            p -= 0.02 * first / (1 - 0.9**t) / (np.sqrt(second / (1 - 0.999**t)) + 1e-8)
        optimizer.zero_grad()
        loss = (a(torch.from_numpy(x)) - torch.from_numpy(y)).square().sum() / 2
        loss.backward()
        optimizer.step()
        np.testing.assert_allclose(loss.item(), np.square(error).sum() / 2, rtol=1e-9)
    np.testing.assert_allclose(a.lam.detach(), lam, atol=1e-9)
    np.testing.assert_allclose(a.gamma.detach(), gamma, atol=1e-9)


def test_layers_share_one_A_and_one_list_of_B():
    """Cut from the largest sizes; entries of standard deviation 1."""
    torch.manual_seed(0)
    model = attach(MLP([64, 128, 128, 10]).double(), RandLoRA(10))
    layers = list(adapted(model).values())
    assert layers[0].shared_A.shape == (10, 128) and layers[0].shared_B.shape == (128, 130)
    for a in layers:
        assert a.shared_A.data_ptr() == layers[0].shared_A.data_ptr()
        assert a.shared_B.data_ptr() == layers[0].shared_B.data_ptr()
        left, right = a.method.factors(a)
        assert left.shape == (a.m, a.lam.numel()) and right.shape == (a.lam.numel(), a.n)
        assert abs(float(a.shared_A.std()) - 1) < 1e-6 and abs(float(a.shared_B.std()) - 1) < 1e-6
        assert float(a.shared_B.abs().max()) < 1.05 * math.sqrt(3)  # uniform
        nn.init.normal_(a.lam)
        expected = plain_sum(a, a.m, a.n, 10, 20)
        np.testing.assert_allclose(a.method.delta(a).detach(), expected, atol=1e-9)
    # N (r + d) numbers a layer: 7 (10 + 64) + 13 (10 + 128) + 1 (10 + 10)
    assert count(model)["trained"] == 518 + 1794 + 20
    assert count(attach(MLP([64, 128, 128, 10]), RandLoRA(64)))["trained"] == 586  # larger r: fewer


@pytest.mark.parametrize("entries, s", [("sparse", 3.0), ("very sparse", 10.0)])
def test_sparse_entries(entries, s):
    torch.manual_seed(0)
    a = layer(140, 100, RandLoRA(20, entries=entries))
    for X in (a.shared_A, a.shared_B):
        values = X.unique()
        assert len(values) == 3 and values[1] == 0 and values[0] == -values[2]
        share, sd = 1 / (2 * s), math.sqrt(1 / (2 * s) / X.numel())
        for value in values[[0, 2]]:
            assert abs(float((X == value).double().mean()) - share) < 4 * sd
        assert abs(float(X.std()) - 1) < 1e-12
    assert len(layer(9, 6, RandLoRA(2)).shared_B.unique()) == 9 * 6  # dense: no value twice


@pytest.mark.parametrize("N, r, d", [(3, 4, 10), (1, 5, 5), (6, 2, 11)])
def test_the_gradient_is_autograds(N, r, d):
    torch.manual_seed(0)
    A, lam, gamma = (torch.randn(shape, dtype=F64) for shape in ((r, d), (N, r), (N, d)))
    lam.requires_grad_(), gamma.requires_grad_()
    G = torch.randn(N, r, d, dtype=F64)
    mine = pullback(A, lam, gamma, G)
    torch.testing.assert_close(terms(A, lam, gamma), torch.einsum("jk,kv,jv->jkv", lam, A, gamma))
    torch.testing.assert_close(mine, torch.autograd.grad(terms(A, lam, gamma), (lam, gamma), G))
    plain = torch.autograd.grad(lam[:, :, None] * A * gamma[:, None], (lam, gamma), G)
    torch.testing.assert_close(mine, plain, atol=1e-12, rtol=1e-12)
    by_hand = [
        torch.einsum("jkv,kv,jv->jk", G, A, gamma),
        torch.einsum("jkv,kv,jk->jv", G, A, lam),
    ]
    torch.testing.assert_close(list(mine), by_hand, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("dims", [(None, 0, 0), (0, 0, 0), (1, 0, 2), (None, 0, None)])
def test_copies_together_are_the_copies_alone(dims):
    """Outputs and gradients under `vmap`, with what the copies share and along any axis."""
    torch.manual_seed(0)
    shapes = (4, 6), (3, 4), (3, 6)
    inputs = []
    for shape, dim in zip(shapes, dims):
        shape = shape if dim is None else (*shape[:dim], 5, *shape[dim:])
        inputs.append(torch.randn(shape, dtype=F64, requires_grad=bool(inputs)))
    together = torch.vmap(terms, in_dims=dims)(*inputs)
    rows = [
        [t if dim is None else t.select(dim, i) for t, dim in zip(inputs, dims)] for i in range(5)
    ]
    alone = torch.stack([lam[:, :, None] * A * gamma[:, None] for A, lam, gamma in rows])
    torch.testing.assert_close(together, alone)
    G = torch.randn_like(alone)
    torch.testing.assert_close(
        torch.autograd.grad(together, inputs[1:], G), torch.autograd.grad(alone, inputs[1:], G)
    )


def test_the_backward_pass_keeps_the_diagonals_only():
    lam, gamma = torch.randn(8, 4, requires_grad=True), torch.randn(8, 30, requires_grad=True)
    A = torch.randn(4, 30)
    kept = []
    for build in (terms, lambda A, lam, gamma: lam[:, :, None] * A * gamma[:, None]):
        model = nn.Module()
        model.lam, model.gamma = nn.Parameter(lam.detach()), nn.Parameter(gamma.detach())
        with saved_bytes(model, but=[A]) as saved:
            build(A, model.lam, model.gamma)
        kept.append(saved.total)
    assert kept == [0, 4 * 8 * 4 * 30]  # nothing new, against one stack


@pytest.mark.parametrize("m, n, r", [(12, 12, 5), (15, 12, 3), (12, 15, 3), (20, 7, 2)])
def test_it_agrees_with_hugging_faces_layer(m, n, r):
    """The same A, B, lambda, gamma give the same update and outputs.

    Theirs stacks the rows of A with the index of the term fastest, and the columns of B with the
    index of the rank fastest, so that column j r + k here is column k N + j there.
    """
    peft = pytest.importorskip("peft")
    a = layer(m, n, RandLoRA(r, alpha=7.0))
    N, D = len(a.lam), max(m, n)
    base = nn.Sequential(nn.Linear(n, m).double())
    base[0].load_state_dict(a.base.state_dict())
    config = peft.RandLoraConfig(r=r, randlora_alpha=7, target_modules=["0"], randlora_dropout=0.0)
    theirs = peft.get_peft_model(base, config).base_model.model[0]
    with torch.no_grad():
        B = a.shared_B.reshape(D, N, r).transpose(1, 2)  # [D, r, N], flat: k N + j
        theirs.randlora_A["default"] = a.shared_A[:, None].clone()
        theirs.randlora_B["default"] = B.reshape(D, N, r).clone()
        theirs.randlora_lambda["default"].data = a.lam.T.clone()
        theirs.randlora_gamma["default"].data = a.gamma.clone()
    update = theirs.get_delta_weight("default").detach()
    torch.testing.assert_close(a.method.delta(a).detach(), update, atol=1e-10, rtol=0)
    x = torch.randn(4, n, dtype=F64)
    torch.testing.assert_close(a(x), theirs(x), atol=1e-10, rtol=0)
    a(x).square().sum().backward()
    theirs(x).square().sum().backward()
    for mine, other in (
        (a.lam.grad, theirs.randlora_lambda["default"].grad.T),
        (a.gamma.grad, theirs.randlora_gamma["default"].grad),
    ):
        torch.testing.assert_close(mine, other, atol=1e-8, rtol=1e-8)
    fresh = peft.get_peft_model(nn.Sequential(nn.Linear(n, m)), config).base_model.model[0]
    start = layer(m, n, RandLoRA(r), filled=False)
    assert (fresh.randlora_lambda["default"] == 0).all()
    torch.testing.assert_close(
        fresh.randlora_gamma["default"].detach().double(), start.gamma.detach()
    )
    assert abs(float(fresh.randlora_B["default"].float().std()) - 1) < 0.02


@pytest.mark.parametrize("m, n", [(12, 12), (20, 12), (12, 20)])
@pytest.mark.parametrize("r", [5, 3])
def test_the_rank_is_that_of_its_terms(m, n, r):
    """min(n r, d); and r where all gamma_j are equal, as they are at the start."""
    d, N = 12, math.ceil(12 / r)
    for n_terms in range(1, N + 1):
        a = layer(m, n, RandLoRA(r, terms=n_terms))
        assert torch.linalg.matrix_rank(a.method.delta(a), rtol=1e-9) == min(n_terms * r, d)
        assert a.lam.shape == (n_terms, r)
    with torch.no_grad():
        a.gamma.fill_(0.3)
    assert torch.linalg.matrix_rank(a.method.delta(a), rtol=1e-9) == r


def test_a_column_of_A_without_entries_is_out_of_reach():
    a = layer(30, 25, RandLoRA(4, entries="very sparse"))
    empty = (a.shared_A == 0).all(0)
    assert empty.any() and not empty.all()
    assert (a.method.delta(a)[:, empty] == 0).all()
    rank = torch.linalg.matrix_rank(a.method.delta(a), rtol=1e-9)
    assert rank <= int((~empty).sum())


def test_terms_beyond_the_number_stay_zero():
    """And the others learn what they learn without that room."""
    task = Regression([0, 1], 9, 8, "flat", dtype=F64)
    x, y = next(task.batches(30, 1))
    found = []
    for room in (True, False):
        method = RandLoRA(3, terms=2, room=room)
        models = []
        for i in range(2):
            torch.manual_seed(i)
            models.append(attach(task.model(i), method))
        stack = Stack(models)
        optimizer = stack.optimizer(torch.optim.Adam, 0.02)
        finetune(stack, method, task.loss, [(x, y)] * 20, optimizer)
        found.append(adapted(stack.module(1))["0"])
    with_room, without = found
    assert with_room.lam.shape == (3, 3) and without.lam.shape == (2, 3)
    assert (with_room.lam[2] == 0).all() and (with_room.gamma[2] == 0).all()
    torch.testing.assert_close(with_room.gamma[:2], without.gamma, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(with_room.lam[:2], without.lam, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("m, n", [(8, 6), (6, 8)])
def test_lambda_alone_is_a_problem_of_least_squares(m, n):
    """With gamma fixed, the solution in closed form has no gradient and the least loss."""
    task = Regression([0], m, n, "gaussian", dtype=F64)
    torch.manual_seed(0)
    method = RandLoRA(2, alpha=2.0)
    model = attach(task.model(0), method)
    a = adapted(model)["0"]
    with torch.no_grad():
        a.gamma.normal_()
    x, y = (t[0] for t in next(task.batches(40, 1)))
    columns = []
    for j in range(3):
        for k in range(2):
            piece = torch.outer(a.shared_B[:, 2 * j + k], a.shared_A[k] * a.gamma[j].detach())
            columns.append((x @ (piece if m >= n else piece.T).T).flatten())
    design, target = torch.stack(columns, 1), (y - x @ a.W.T).flatten()
    best = torch.linalg.lstsq(design, target[:, None]).solution[:, 0]
    with torch.no_grad():
        a.lam.copy_(best.view(3, 2))
    loss = task.loss(model, x, y)
    rest = (target - design @ best).square().sum() / len(x)
    torch.testing.assert_close(loss.detach(), rest, atol=1e-12, rtol=1e-12)
    loss.backward()
    assert a.lam.grad.abs().max() < 1e-10 < a.gamma.grad.abs().max()


@pytest.mark.gpu
def test_a_stack_trains_on_the_gpu_as_on_the_cpu():
    found = []
    for device in ("cpu", "cuda"):
        task = Regression([0, 1], 9, 8, "flat", dtype=F64, device=device)
        method = RandLoRA(3)
        models = []
        for i in range(2):
            torch.manual_seed(i)
            models.append(attach(task.model(i), method))
        stack = Stack(models)
        batches = task.batches(30, 10)
        finetune(stack, method, task.loss, batches, stack.optimizer(torch.optim.Adam, 0.02))
        found.append(stack.theta.cpu())
    torch.testing.assert_close(*found, atol=1e-8, rtol=1e-8)


def test_it_trains_the_two_diagonals():
    model = attach(MLP([8, 12, 5]), RandLoRA(3))
    assert {k: tuple(p.shape) for k, p in trainable(model).items()} == {
        "0.lam": (3, 3),
        "0.gamma": (3, 8),
        "2.lam": (2, 3),
        "2.gamma": (2, 5),
    }


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="rank must be positive, not 0"):
        RandLoRA(0)
    with pytest.raises(ValueError, match="terms must be positive, not 0"):
        RandLoRA(4, terms=0)
    with pytest.raises(ValueError, match="one of dense, sparse, very sparse, not 'ternary'"):
        RandLoRA(4, entries="ternary")
