"""LoLDU: exact algebra of its factors, a convex problem with a known optimum, bad input."""

import copy

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import nn

from miniature.models import MLP
from miniature.peft import adapted, attach, finetune, merge, trainable
from miniature.peft.loldu import STARTS, LoLDU, SVDDiagonal
from miniature.peft.tasks import Regression
from miniature.stack import Stack

F64 = torch.float64


def layer(m, n, method, seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(n, m).double())
    return adapted(attach(model, method))["0"]


@pytest.mark.parametrize("m, n", [(6, 9), (9, 6), (7, 7)])
@pytest.mark.parametrize("alpha", [None, 5.0])
def test_factors_are_those_of_elimination(m, n, alpha):
    """By scipy's LU and by a plain elimination without a library."""
    a = layer(m, n, LoLDU(3, alpha))
    W = a.base.weight.detach().numpy()
    P, L, U = scipy.linalg.lu(W)
    d = np.diag(U)[:3]
    np.testing.assert_allclose(a.L, (P @ L)[:, :3], atol=1e-12)
    np.testing.assert_allclose(a.z.detach(), d, atol=1e-12)
    np.testing.assert_allclose(a.U, U[:3] / d[:, None], atol=1e-12)
    rest = W.copy()
    for i in range(3):  # take out the piece with the largest entry of column i as its pivot
        row = np.abs(rest[:, i]).argmax()
        piece = np.outer(rest[:, i], rest[row]) / rest[row, i]
        np.testing.assert_allclose((a.L[:, i : i + 1] * d[i]) @ a.U[i : i + 1], piece, atol=1e-12)
        rest -= piece
    s = 1.0 if alpha is None else alpha / 3
    np.testing.assert_allclose(a.W, W - s * (W - rest), atol=1e-12)


@pytest.mark.parametrize("m, n", [(6, 9), (9, 6)])
def test_the_residual_is_a_schur_complement(m, n):
    a = layer(m, n, LoLDU(4))
    P = torch.linalg.lu(a.base.weight.detach())[0]
    rest = P.T @ a.W
    assert rest[:4].abs().max() < 1e-12 and rest[:, :4].abs().max() < 1e-12
    assert torch.linalg.matrix_rank(a.W, tol=1e-9) == min(m, n) - 4
    A = P.T @ a.base.weight.detach()
    schur = A[4:, 4:] - A[4:, :4] @ torch.linalg.solve(A[:4, :4], A[:4, 4:])
    torch.testing.assert_close(rest[4:, 4:], schur, atol=1e-10, rtol=0)


@pytest.mark.parametrize("kind", [LoLDU, SVDDiagonal])
def test_the_update_is_linear_in_the_pivots(kind):
    a = layer(6, 9, kind(4, alpha=2.0))
    W = a.base.weight.detach()

    def at(z):
        with torch.no_grad():
            a.z.copy_(z)
            return a.W + a.method.delta(a) - W

    z0 = a.z.detach().clone()
    assert at(z0).abs().max() < 1e-12
    u, v = torch.randn(2, 4, dtype=F64)
    torch.testing.assert_close(at(z0 + u + 2 * v), at(z0 + u) + 2 * at(z0 + v))
    changed = torch.tensor([0.0, 1.0, 0.0, -1.0], dtype=F64)
    assert torch.linalg.matrix_rank(at(z0 + changed), tol=1e-9) == 2
    expected = 0.5 * sum(c * torch.outer(a.L[:, i], a.U[i]) for i, c in enumerate(changed))
    torch.testing.assert_close(at(z0 + changed), expected)


@pytest.mark.parametrize("kind", [LoLDU, SVDDiagonal])
def test_training_finds_the_optimum_of_least_squares(kind):
    task = Regression([0, 1], 5, 6, "gaussian", dtype=F64)
    method = kind(3)
    stack = Stack([attach(task.model(i), method) for i in range(2)])
    x, y = next(task.batches(40, 1))
    finetune(stack, method, task.loss, [(x, y)] * 3000, stack.optimizer(torch.optim.SGD, 0.05))
    for i in range(2):
        a = adapted(stack.module(i))["0"]
        design = torch.stack(
            [(x[i] @ torch.outer(a.L[:, j], a.U[j]).T).flatten() for j in range(3)], 1
        )
        target = (y[i] - x[i] @ a.W.T).flatten()
        best = torch.linalg.lstsq(design, target[:, None]).solution[:, 0]
        torch.testing.assert_close(a.z.detach(), best, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("start", ["lu", "ones"])
def test_descent_follows_a_loop_by_hand(start):
    """Two layers with biases and a ReLU, s = 2: the gradient of the pivots written out in NumPy."""
    torch.manual_seed(0)
    base, rate, steps = MLP([6, 7, 4]).double(), 5e-4, 20
    x, y = torch.randn(1, 9, 6, dtype=F64), torch.randn(1, 9, 4, dtype=F64)
    method = LoLDU(3, alpha=6.0, start=start)
    stack = Stack([attach(copy.deepcopy(base), method)])
    optimizer = stack.optimizer(torch.optim.SGD, rate)
    loss = finetune(
        stack, method, lambda f, x, y: (f(x) - y).square().sum(), [(x, y)] * steps, optimizer
    )

    frames, z, biases = [], [], []
    for linear in (base[0], base[2]):
        W = linear.weight.detach().numpy()
        rest, L, U, pivots = W.copy(), [], [], []
        for i in range(3):
            row = np.abs(rest[:, i]).argmax()
            pivots.append(rest[row, i])
            L.append(rest[:, i] / rest[row, i])
            U.append(rest[row] / rest[row, i])
            rest = rest - pivots[-1] * np.outer(L[-1], U[-1])
        L, U, pivots = np.stack(L, 1), np.stack(U), np.array(pivots)
        frames.append((L, U, W - 2.0 * (L * pivots) @ U))
        z.append(pivots if start == "lu" else np.ones(3))
        biases.append(linear.bias.detach().numpy())
    X, Y, losses = x[0].numpy(), y[0].numpy(), []
    for _ in range(steps):
        W1, W2 = (W_res + 2.0 * L @ np.diag(v) @ U for (L, U, W_res), v in zip(frames, z))
        before = X @ W1.T + biases[0]
        H = np.maximum(before, 0)
        error = H @ W2.T + biases[1] - Y
        losses.append((error**2).sum())
        G2 = 2 * error.T @ H
        G1 = (2 * error @ W2 * (before > 0)).T @ X
        for i, G in enumerate((G1, G2)):
            L, U, _ = frames[i]
            z[i] = z[i] - rate * 2.0 * np.diag(L.T @ G @ U.T)
    np.testing.assert_allclose(loss[:, 0], losses, rtol=1e-8)
    assert losses[-1] < losses[0]
    for a, v in zip(adapted(stack.module(0)).values(), z):
        np.testing.assert_allclose(a.z.detach(), v, rtol=1e-7, atol=1e-9)


def test_starts():
    values = {}
    for start in STARTS:
        torch.manual_seed(1)
        base = MLP([6, 5]).double()
        torch.manual_seed(2)
        model = attach(copy.deepcopy(base), LoLDU(4, start=start))
        values[start] = adapted(model)["0"].z.detach()
        x = torch.randn(3, 6, dtype=F64)
        assert torch.allclose(model(x), base(x)) == (start == "lu")
    z0 = values["lu"]
    assert (values["ones"] == 1).all() and (values["zeros"] == 0).all()
    torch.testing.assert_close(values["constant"], z0.mean().expand(4))
    torch.manual_seed(2)
    torch.testing.assert_close(values["uniform"], z0.mean() * (torch.rand(4, dtype=F64) - 0.5))
    torch.manual_seed(2)
    spread = (z0 - z0.mean()).square().mean().sqrt()
    torch.testing.assert_close(values["normal"], z0.mean() + spread * torch.randn(4, dtype=F64))


@pytest.mark.parametrize("start", STARTS)
def test_one_pivot_is_enough(start):
    a = layer(5, 6, LoLDU(1, start=start))
    assert a.z.shape == (1,) and a.z.isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("start", STARTS)
def test_a_gpu_starts_where_a_cpu_does(start):
    torch.manual_seed(0)
    base, x = MLP([6, 5]).double(), torch.randn(3, 6, dtype=F64)
    outputs = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(1)
        model = attach(copy.deepcopy(base).to(device), LoLDU(4, start=start))
        outputs.append(model(x.to(device)).detach().cpu())
    torch.testing.assert_close(*outputs)


def test_tiny_pivots_are_skipped():
    """Those of 1e-8 and 0, not that of 0.005; the pieces that follow keep their own frames."""
    model = nn.Sequential(nn.Linear(5, 5, bias=False).double())
    with torch.no_grad():
        model[0].weight.copy_(torch.diag(torch.tensor([3.0, 1e-8, 0.0, 0.005, 2.0])))
    a = adapted(attach(model, LoLDU(3)))["0"]
    torch.testing.assert_close(a.z.detach(), torch.tensor([3.0, 0.005, 2.0], dtype=F64))
    frames = torch.eye(5, dtype=F64)[[0, 3, 4]]
    torch.testing.assert_close(a.L, frames.T)
    torch.testing.assert_close(a.U, frames)
    torch.testing.assert_close(merge(model)[0].weight, model[0].set_aside[0])


def test_it_trains_r_numbers_a_matrix():
    model = attach(MLP([64, 128, 10]), LoLDU(8))
    assert {k: tuple(p.shape) for k, p in trainable(model).items()} == {"0.z": (8,), "2.z": (8,)}
    few = attach(MLP([64, 128, 10]), LoLDU(32))
    assert few[2].z.shape == (10,)  # no more than the matrix has


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="rank must be positive, not 0"):
        LoLDU(0)
    with pytest.raises(ValueError, match="not 'svd'"):
        LoLDU(4, start="svd")
