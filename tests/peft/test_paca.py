"""PaCA: gradients against those of the whole weight, plain loops, closed forms, what is kept."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from miniature.models import MLP
from miniature.peft import LoRA, adapted, attach, detach, finetune, merge, saved_bytes, trainable
from miniature.peft.paca import NF4, Kernels, PaCA, PartialLinear, Rows, nf4
from miniature.peft.tasks import Regression
from miniature.stack import Stack, class_loss, cross_entropy

F64 = torch.float64


def mlp(seed=0, sizes=(6, 12, 5)):
    torch.manual_seed(seed)
    return MLP(sizes).double()


def whole_gradients(model, x, y):
    """Gradients of all weights, from a plain copy with the adapters merged."""
    plain = detach(merge(copy.deepcopy(model))).requires_grad_(True)
    x = x.clone().requires_grad_(True)
    cross_entropy(plain(x), y).backward()
    return {k: p.grad for k, p in plain.named_parameters()}, x.grad


def move(model, by=0.3):
    """Take the columns away from where they start."""
    with torch.no_grad():
        for p in trainable(model).values():
            p += by * torch.randn_like(p)
    return model


@pytest.mark.parametrize("alpha", [None, 1.0])
@pytest.mark.parametrize("in_place", [False, True])
def test_the_gradient_is_that_of_the_columns_of_the_whole_weight(alpha, in_place):
    model = move(attach(mlp(), PaCA(3, alpha, in_place=in_place)))
    x, y = torch.randn(7, 6, dtype=F64, requires_grad=True), torch.arange(7) % 5
    cross_entropy(model(x), y).backward()
    whole, to_x = whole_gradients(model, x.detach(), y)
    s = 1.0 if alpha is None else alpha / 3
    for path, a in adapted(model).items():
        expected = s * whole[f"{path}.weight"][:, a.idx]
        torch.testing.assert_close(a.P.grad, expected, atol=1e-12, rtol=0)
        assert a.P.shape == (a.m, 3) and len(a.idx.unique()) == 3
    torch.testing.assert_close(x.grad, to_x, atol=1e-12, rtol=0)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("shape", [(6,), (4, 6), (2, 4, 6)])
def test_inputs_of_any_shape(shape, in_place):
    torch.manual_seed(0)
    model = move(attach(nn.Sequential(nn.Linear(6, 5).double()), PaCA(2, in_place=in_place)))
    x = torch.randn(shape, dtype=F64)
    W, a = merge(copy.deepcopy(model))[0].base.weight, model[0]
    y = model(x)
    torch.testing.assert_close(y, x @ W.T + a.base.bias)
    g = torch.randn_like(y)
    (grad,) = torch.autograd.grad(y, a.P, g)
    expected = sum(
        torch.outer(u, v[a.idx]) for u, v in zip(g.reshape(-1, 5), x.reshape(-1, 6), strict=True)
    )
    torch.testing.assert_close(grad, expected)


def test_gradients_in_a_stack_whose_copies_have_other_columns():
    base = mlp()
    stack = Stack.init(lambda: move(attach(copy.deepcopy(base), PaCA(3, alpha=2.0))), [1, 2, 3])
    assert stack._stacked["0.idx"].shape == (3, 3) and "0.base.weight" in stack._shared
    x, y = torch.randn(3, 7, 6, dtype=F64), torch.randint(5, (3, 7))
    grads = stack.params(stack.grad(class_loss, x, y)[0])
    for i in range(3):
        model = stack.module(i)
        whole, _ = whole_gradients(model, x[i], y[i])
        for path, a in adapted(model).items():
            expected = 2 / 3 * whole[f"{path}.weight"][:, a.idx]
            torch.testing.assert_close(grads[f"{path}.P"][i], expected, atol=1e-12, rtol=0)


def test_the_own_backward_pass_under_vmap():
    """Of copies with columns, weights and inputs of their own, against one at a time."""
    torch.manual_seed(0)
    x, W = torch.randn(3, 7, 6, dtype=F64), torch.randn(3, 5, 6, dtype=F64)
    b, g = torch.randn(5, dtype=F64), torch.randn(3, 7, 5, dtype=F64)
    idx = torch.stack([torch.randperm(6)[:2] for _ in range(3)])
    C = torch.stack([w[:, i] for w, i in zip(W, idx)])

    def product(x, C, W, idx, g):
        return (PartialLinear.apply(x, W, C, idx, b) * g).sum()

    outside = [t.clone().requires_grad_(True) for t in (x, C)]
    many = torch.func.vmap(product)(*outside, W, idx, g)
    within = torch.func.vmap(torch.func.grad(product, argnums=(0, 1)))(x, C, W, idx, g)
    for found in (torch.autograd.grad(many.sum(), outside), within):
        for i in range(3):
            torch.testing.assert_close(many[i], ((x[i] @ W[i].T + b) * g[i]).sum())
            torch.testing.assert_close(found[0][i], g[i] @ W[i])
            torch.testing.assert_close(found[1][i], (g[i].T @ x[i])[:, idx[i]])


@pytest.mark.parametrize("alpha", [None, 0.5])
def test_training_is_a_plain_loop_over_masked_columns(alpha):
    """Of the quadratic loss |W x - y|^2, in numpy: W[:, I] -= lr s^2 g x_I'."""
    task = Regression([3], 5, 6, "gaussian", dtype=F64)
    model = attach(task.model(0), PaCA(2, alpha))
    idx, s = model[0].idx.numpy(), model[0].method.s
    stack, batches = Stack([model]), list(task.batches(8, 20))
    finetune(stack, model[0].method, task.loss, batches, stack.optimizer(torch.optim.SGD, 0.02))
    W = task.W0[0].numpy().copy()
    for x, y in batches:
        x, y = x[0].numpy(), y[0].numpy()
        g = 2 * (x @ W.T - y) / len(x)
        for j in idx:
            W[:, j] -= 0.02 * s**2 * (g * x[:, [j]]).sum(0)
    end = stack.module(0)
    np.testing.assert_allclose(merge(end)[0].base.weight, W, atol=1e-12)
    still = np.setdiff1d(np.arange(6), idx)
    assert torch.equal(end[0].base.weight[:, still], task.W0[0][:, still])  # bit by bit


def test_the_change_has_r_columns_and_their_rank():
    base = mlp()
    model = move(attach(copy.deepcopy(base), PaCA(3)))
    for path, a in adapted(merge(model)).items():
        change = a.base.weight - base.get_submodule(path).weight
        columns = change.abs().amax(0).nonzero()[:, 0]
        assert torch.equal(columns, a.idx.sort().values)
        assert torch.linalg.matrix_rank(change) == 3


def test_in_place_trains_as_the_other_form():
    base, x = mlp(), torch.randn(40, 7, 6, dtype=F64)
    y = torch.randint(5, (40, 7))
    ends = []
    for in_place in (False, True):
        torch.manual_seed(5)
        model = attach(copy.deepcopy(base), PaCA(3, 1.5, in_place=in_place))
        optimizer = torch.optim.AdamW(trainable(model).values(), 0.01)
        for inputs, labels in zip(x, y):
            optimizer.zero_grad()
            cross_entropy(model(inputs), labels).backward()
            optimizer.step()
        ends.append(model)
    plain, live = ends
    torch.testing.assert_close(plain(x[0]), live(x[0]), atol=1e-12, rtol=0)
    for path, a in adapted(live).items():
        assert torch.equal(a.frozen[:, a.idx], (a.s * a.P).detach())
        assert torch.equal(a.base.weight, base.get_submodule(path).weight)
    torch.testing.assert_close(merge(plain)(x[0]), merge(live)(x[0]), atol=1e-12, rtol=0)


def test_in_place_refuses_a_second_forward_pass_before_the_backward_pass():
    model = attach(mlp(), PaCA(3, in_place=True))
    x = torch.randn(2, 7, 6, dtype=F64)
    first, second = model(x[0]).sum(), model(x[1]).sum()
    second.backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        first.backward()


def test_only_the_chosen_channels_are_kept():
    torch.manual_seed(0)
    for r in (1, 3, 8):
        model = attach(nn.Sequential(nn.Linear(16, 12)), PaCA(r, in_place=True))
        x = torch.randn(10, 16, requires_grad=True)
        with saved_bytes(model) as saved:
            model(x)
        assert [shape for shape, _, _ in saved.tensors] == [(10, r)] and saved.total == 40 * r
    model = attach(nn.Sequential(nn.Linear(16, 12)), LoRA(3))
    with saved_bytes(model) as saved:
        model(x)
    assert saved.total == 40 * (16 + 3)  # x for A and x A' for B
    model = attach(nn.Sequential(nn.Linear(16, 12)), Rows(3))
    with saved_bytes(model) as saved:
        model(x)
    assert (10, 16) in [shape for shape, _, _ in saved.tensors]


def test_one_product_against_three():
    torch.manual_seed(0)
    counts = []
    for method in (PaCA(3, in_place=True), LoRA(3)):
        model = attach(nn.Sequential(nn.Linear(16, 12)), method)
        with Kernels() as kernels:
            model(torch.randn(10, 16))
        counts.append(kernels.products())
        starts = [start for _, start, _ in kernels.calls]
        assert starts == sorted(starts) and all(a < b for _, a, b in kernels.calls)
        assert not {"t", "view", "expand"} & {name for name, _, _ in kernels.calls}
    assert counts == [1, 3]


def test_the_optimum_of_a_linear_model_is_known():
    """For white inputs the error that stays is that of the columns that are not trained."""
    task = Regression([0, 1], 5, 8, "gaussian", dtype=F64)
    method = PaCA(3)
    stack = Stack([attach(task.model(i), method) for i in range(2)])
    x = (8**0.5 * torch.eye(8, dtype=F64)).expand(2, 8, 8)
    batch = (x, x @ (task.W0 + task.shift).mT)
    finetune(stack, method, task.loss, [batch] * 200, stack.optimizer(torch.optim.SGD, 0.3))
    for i in range(2):
        a = stack.module(i)[0]
        W = merge(stack.module(i))[0].base.weight
        others = np.setdiff1d(np.arange(8), a.idx)
        floor = task.shift[i][:, others].square().sum()
        error = (W - task.W0[i] - task.shift[i]).square().sum()
        torch.testing.assert_close(error, floor, atol=1e-12, rtol=0)


def test_alpha_scales_the_rate_of_adam():
    base, x = mlp(), torch.randn(1, 7, 6, dtype=F64)
    y = torch.arange(7)[None] % 5
    ends = []
    for alpha, lr in ((3.0, 0.01), (1.5, 0.02), (12.0, 0.0025)):
        method = PaCA(3, alpha)
        torch.manual_seed(4)
        stack = Stack([attach(copy.deepcopy(base), method)])
        optimizer = stack.optimizer(torch.optim.AdamW, lr, weight_decay=0.0, eps=1e-30)
        finetune(stack, method, class_loss, [(x, y)] * 30, optimizer)
        ends.append(stack(x))
    torch.testing.assert_close(ends[1], ends[0], atol=1e-9, rtol=0)
    torch.testing.assert_close(ends[2], ends[0], atol=1e-9, rtol=0)
    assert not torch.allclose(ends[0][0], base(x[0]), atol=1e-2)


def test_a_small_step_lowers_the_loss_by_the_gradients_norm():
    model = attach(mlp(), PaCA(3, 1.5))
    x, y = torch.randn(7, 6, dtype=F64), torch.arange(7) % 5
    before = cross_entropy(model(x), y)
    own = list(trainable(model).values())
    grads = torch.autograd.grad(before, own)
    eta = 1e-4
    with torch.no_grad():
        for p, g in zip(own, grads):
            p -= eta * g
        fall = (before - cross_entropy(model(x), y)) / eta
    assert abs(fall / sum(g.square().sum() for g in grads) - 1) < 1e-3


def test_selection():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(9, 5, bias=False).double())
    norms = base[0].weight.detach().square().sum(0)
    order = norms.argsort()
    picked = {}
    for select in ("random", "largest", "smallest", lambda layer: torch.arange(layer.n)):
        picked[select] = attach(copy.deepcopy(base), PaCA(4, select=select))[0].idx
    assert torch.equal(picked["smallest"], order[:4])
    assert torch.equal(picked["largest"], order.flip(0)[:4])
    assert list(picked.values())[3].tolist() == [0, 1, 2, 3]
    draws = [attach(copy.deepcopy(base), PaCA(4))[0].idx for _ in range(300)]
    counts = torch.bincount(torch.cat(draws), minlength=9)
    assert all(len(d.unique()) == 4 for d in draws)
    assert (counts - 300 * 4 / 9).abs().max() < 4 * (300 * 4 / 9 * 5 / 9) ** 0.5  # uniform
    small = attach(copy.deepcopy(base), PaCA(20))[0]
    assert small.P.shape == (5, 9)  # no more columns than there are


def test_rows_against_the_whole_gradient():
    model = move(attach(mlp(), Rows(3)))
    x, y = torch.randn(7, 6, dtype=F64), torch.arange(7) % 5
    cross_entropy(model(x), y).backward()
    whole, _ = whole_gradients(model, x, y)
    for path, a in adapted(model).items():
        torch.testing.assert_close(a.P.grad, whole[f"{path}.weight"][a.idx], atol=1e-12, rtol=0)
        change = merge(model).get_submodule(path).base.weight - a.set_aside[0]
        assert torch.equal(change.abs().amax(1).nonzero()[:, 0], a.idx.sort().values)
    base = nn.Sequential(nn.Linear(5, 9))
    draws = torch.cat([attach(copy.deepcopy(base), Rows(4))[0].idx for _ in range(300)])
    counts = torch.bincount(draws, minlength=9)
    assert (counts - 300 * 4 / 9).abs().max() < 4 * (300 * 4 / 9 * 5 / 9) ** 0.5  # uniform


def test_four_bits():
    assert len(NF4) == 16 and list(NF4) == sorted(NF4)
    torch.manual_seed(0)
    W = torch.randn(7, 30, dtype=F64)
    rounded = nf4(W)
    flat, expected = W.flatten().numpy(), []
    for a in range(0, len(flat), 64):  # the nearest level, number by number
        scale = np.abs(flat[a : a + 64]).max()
        expected += [scale * min(NF4, key=lambda c: abs(v / scale - c)) for v in flat[a : a + 64]]
    np.testing.assert_allclose(rounded.flatten(), expected, atol=1e-12)
    torch.testing.assert_close(nf4(rounded), rounded)
    assert torch.equal(nf4(torch.zeros(2, 3)), torch.zeros(2, 3))


def test_qpaca_keeps_its_columns_exact():
    base = mlp()
    model = attach(copy.deepcopy(base), PaCA(3, store=nf4))
    W0, a = base[0].weight.detach(), model[0]
    merged = a.merged_weight()[0]
    others = np.setdiff1d(np.arange(6), a.idx)
    torch.testing.assert_close(merged[:, a.idx], W0[:, a.idx])
    assert torch.equal(merged[:, others], nf4(W0)[:, others])
    assert PaCA().starts_at_base and not PaCA(store=nf4).starts_at_base  # rounding moves the rest
    x = torch.randn(4, 6, dtype=F64)
    torch.testing.assert_close(merge(copy.deepcopy(model))(x), model(x))


def test_bad_input_is_refused():
    for kind in (PaCA, Rows):
        with pytest.raises(ValueError, match="rank must be positive, not 0"):
            kind(0)
    with pytest.raises(ValueError, match="not 'best'"):
        PaCA(4, select="best")
    with pytest.raises(ValueError, match="alpha must be positive, not 0"):
        PaCA(4, alpha=0)
    with pytest.raises(ValueError, match=r"6 input channels of layer '0'.*\[0, 0, 0\]"):
        attach(mlp(), PaCA(3, select=lambda layer: torch.zeros(layer.n, dtype=torch.long)))


@pytest.mark.gpu
def test_in_place_on_the_gpu():
    model = move(attach(mlp(), PaCA(3, in_place=True)))
    x = torch.randn(7, 6, dtype=F64)
    there = copy.deepcopy(model).cuda()
    model(x).square().sum().backward()
    there(x.cuda()).square().sum().backward()
    for a, b in zip(adapted(model).values(), adapted(there).values()):
        torch.testing.assert_close(b.P.grad.cpu(), a.P.grad, atol=1e-9, rtol=1e-9)
