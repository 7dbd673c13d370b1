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
    assert (values["uniform"].abs() <= z0.mean().abs() / 2).all()
    torch.manual_seed(2)
    torch.testing.assert_close(values["normal"], z0.mean() + z0.std() * torch.randn(4, dtype=F64))


def test_tiny_pivots_are_skipped():
    model = nn.Sequential(nn.Linear(4, 4, bias=False).double())
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(4))
        model[0].weight[1] = 0.0  # of rank 3
    a = adapted(attach(model, LoLDU(4)))["0"]
    assert a.z.shape == (3,) and a.L.isfinite().all() and a.U.isfinite().all()
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
