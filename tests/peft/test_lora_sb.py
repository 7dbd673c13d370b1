"""LoRA-SB: its frames, first step and closest move by independent solvers; bad input."""

import copy
import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from miniature.models import MLP
from miniature.peft import LoRAXS, adapted, attach, detach, finetune, merge
from miniature.peft.lora_sb import LoRASB, capture, closest
from miniature.peft.tasks import Regression
from miniature.stack import Stack, class_loss

F64 = torch.float64


def problem(seed=0, n=20):
    torch.manual_seed(seed)
    return MLP([9, 12, 5]).double(), torch.randn(n, 9, dtype=F64), torch.randint(5, (n,))


def gradients(model, x, y):
    """Gradients of the weights of a plain perceptron, by autograd on a copy."""
    model = copy.deepcopy(model).requires_grad_(True)
    F.cross_entropy(model(x), y).backward()
    return {k.removesuffix(".weight"): p.grad for k, p in model.named_parameters() if p.ndim == 2}


@pytest.mark.parametrize("sign", [True, False])
@pytest.mark.parametrize("alpha", [None, 1.5])
def test_it_starts_at_the_best_copy_of_the_first_step(sign, alpha):
    base, x, y = problem()
    model = attach(copy.deepcopy(base), LoRASB(3, 0.01, (x, y), sign=sign, alpha=alpha))
    for path, G in gradients(base, x, y).items():
        step = -0.01 * (G.sign() if sign else G)
        layer = adapted(model)[path]
        start = layer.method.delta(layer).detach()
        left = torch.linalg.svdvals(step)[3:].square().sum()
        torch.testing.assert_close((start - step).square().sum(), left, atol=1e-12, rtol=1e-9)
        for frame in (layer.B.T @ layer.B, layer.A @ layer.A.T):
            torch.testing.assert_close(frame, torch.eye(3, dtype=F64), atol=1e-12, rtol=0)
        assert torch.equal(layer.W, dict(base.named_modules())[path].weight)  # not corrected
        R = layer.R.detach() * (1.0 if alpha is None else 0.5)
        torch.testing.assert_close(R, R.diagonal().diag())
        torch.testing.assert_close(R.diagonal(), torch.linalg.svdvals(step)[:3])


def test_the_first_step_is_that_of_adam():
    """With all directions the start is one step of Adam from the base, for both optimizers."""
    base, x, y = problem()
    for optimizer, sign in ((torch.optim.Adam, True), (torch.optim.SGD, False)):
        full = copy.deepcopy(base)
        step = optimizer([full[i].weight for i in (0, 2)], lr=0.01)
        F.cross_entropy(full(x), y).backward()
        step.step()
        model = detach(merge(attach(copy.deepcopy(base), LoRASB(9, 0.01, (x, y), sign=sign))))
        for i in (0, 2):
            torch.testing.assert_close(model[i].weight, full[i].weight, atol=1e-6, rtol=0)


def test_a_gradient_step_on_R_projects_the_full_gradient():
    base, x, y = problem()
    model = attach(copy.deepcopy(base), LoRASB(3, 0.01, (x, y), alpha=6.0))
    F.cross_entropy(model(x), y).backward()
    full = gradients(detach(merge(copy.deepcopy(model))), x, y)
    for path, layer in adapted(model).items():
        G, s = full[path], 2.0
        torch.testing.assert_close(layer.R.grad, s * layer.B.T @ G @ layer.A.T)
        U, _, Vh = torch.linalg.svd(gradients(base, x, y)[path].sign(), full_matrices=False)
        onto = U[:, :3] @ U[:, :3].T @ G @ Vh[:3].T @ Vh[:3]
        move = s * layer.B @ closest(layer.R.grad, layer.B, layer.A, s) @ layer.A
        torch.testing.assert_close(move, onto)
        torch.testing.assert_close((move * G).sum(), move.square().sum())
        share = onto.square().sum() / G.square().sum()
        torch.testing.assert_close(capture(G, layer.B, layer.A), share)
        assert 0 < share < 1


@pytest.mark.parametrize("s", [1.0, 0.3, 4.0])
def test_the_closest_move_solves_least_squares(s):
    """By lstsq on the Kronecker system, for frames that are not orthonormal; stacked."""
    torch.manual_seed(1)
    G, B, A = (torch.randn(2, *k, dtype=F64) for k in ((7, 6), (7, 3), (3, 6)))
    found = closest(s * B.mT @ G @ A.mT, B, A, s)
    for i in range(2):
        system = s * torch.kron(B[i], A[i].T.contiguous())  # rows of s B g A as one vector
        best = torch.linalg.lstsq(system, G[i].flatten()[:, None]).solution.view(3, 3)
        torch.testing.assert_close(found[i], best, atol=1e-10, rtol=1e-9)
        move = s * B[i] @ best @ A[i]
        torch.testing.assert_close(
            capture(G, B, A)[i], move.square().sum() / G[i].square().sum(), atol=1e-10, rtol=0
        )


def test_training_finds_the_optimum_of_least_squares():
    task = Regression([0, 1], 6, 5, "gaussian", dtype=F64)
    x, y = next(task.batches(40, 1))
    methods = [LoRASB(2, 0.01, (x[i], y[i]), loss=task.loss) for i in range(2)]
    stack = Stack([attach(task.model(i), m) for i, m in enumerate(methods)])
    sgd = stack.optimizer(torch.optim.SGD, 0.1)
    finetune(stack, methods[0], task.loss, [(x, y)] * 2000, sgd)
    for i in range(2):
        a = adapted(stack.module(i))["0"]
        design = [
            (x[i] @ torch.outer(a.B[:, j], a.A[k]).T).flatten()
            for j, k in itertools.product(range(2), range(2))
        ]
        target = (y[i] - x[i] @ a.W.T).flatten()[:, None]
        best = torch.linalg.lstsq(torch.stack(design, 1), target).solution.view(2, 2)
        torch.testing.assert_close(a.R.detach(), best, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("sign", [True, False])
def test_a_run_follows_a_plain_loop(sign):
    """The whole method in NumPy: first step, frames, and Adam on R, with s = 2."""
    task = Regression([3], 6, 5, "gaussian", dtype=F64)
    batches = list(task.batches(12, 20))
    x, y = (v[0] for v in batches[0])
    method = LoRASB(3, 0.05, (x, y), task.loss, sign=sign, alpha=6.0)
    stack = Stack([attach(task.model(0), method)])
    a, found = adapted(stack.module(0))["0"], []

    def watch(t, stack):
        found.append(a.W + 2 * a.B @ stack.params()["0.R"][0] @ a.A)

    adam = stack.optimizer(torch.optim.AdamW, 0.02, weight_decay=0.0)
    finetune(stack, method, task.loss, batches, adam, callback=watch)

    W0 = task.W0[0].numpy()

    def gradient(W, x, y):
        return 2 * (x @ W.T - y).T @ x / len(x)

    G = gradient(W0, x.numpy(), y.numpy())
    U, S, Vh = np.linalg.svd(-0.05 * (np.sign(G) if sign else G))
    B, A, R = U[:, :3], Vh[:3], np.diag(S[:3]) / 2
    first = second = 0
    for t in range(21):
        np.testing.assert_allclose(found[t], W0 + 2 * B @ R @ A, atol=1e-10, rtol=0)
        if t < 20:
            g = 2 * B.T @ gradient(W0 + 2 * B @ R @ A, *(v[0].numpy() for v in batches[t])) @ A.T
            first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g**2
            scale = np.sqrt(second / (1 - 0.999 ** (t + 1))) + 1e-8
            R = R - 0.02 * first / (1 - 0.9 ** (t + 1)) / scale


def test_runs_do_not_depend_on_s():
    base, x, y = problem()
    runs = []
    for s in (1.0, 0.25, 3.0):
        method = LoRASB(3, 0.01, (x, y), alpha=3 * s)
        stack = Stack([attach(copy.deepcopy(base), method)])
        sgd = stack.optimizer(torch.optim.SGD, 0.2 / s**2)
        finetune(stack, method, class_loss, [(x[None], y[None])] * 20, sgd)
        runs.append(detach(merge(stack.module(0)))[0].weight)
    for other in runs[1:]:
        torch.testing.assert_close(other, runs[0], atol=1e-10, rtol=0)


def test_the_model_is_as_before_but_for_its_adapters():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 6), nn.Linear(6, 3)
    ).eval()
    seen = []
    model[2].register_forward_hook(lambda module, *_: seen.append(module.training))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    x, y = torch.randn(8, 6), torch.randint(3, (8,))
    attach(model, LoRASB(2, 0.01, (x, y), targets=["0", "3"]), train=["4"])
    assert seen == [True] and not any(m.training for m in model.modules())
    for k, v in detach(model).state_dict().items():
        assert torch.equal(v, before[k]), k
    assert all(p.grad is None for p in model.parameters())
    assert [k for k, p in model.named_parameters() if p.requires_grad] == ["4.weight", "4.bias"]


def test_a_weight_that_two_layers_share_counts_both():
    model, x, y = problem()
    model = nn.Sequential(nn.Linear(9, 9), nn.Tanh(), nn.Linear(9, 9)).double()
    model[2].weight = model[0].weight
    G = torch.autograd.grad(F.cross_entropy(model(x), y), model[0].weight)[0]
    attach(model, LoRASB(9, 0.01, (x, y)))
    for layer in adapted(model).values():
        torch.testing.assert_close(layer.method.delta(layer), -0.01 * G.sign(), atol=1e-12, rtol=0)


def test_without_data_the_frames_are_random_and_orthonormal():
    base, x, _ = problem()
    torch.manual_seed(1)
    model = attach(copy.deepcopy(base), LoRASB(3))
    torch.testing.assert_close(model(x), base(x))
    a = adapted(model)["0"]
    for frame in (a.B.T @ a.B, a.A @ a.A.T):
        torch.testing.assert_close(frame, torch.eye(3, dtype=F64), atol=1e-12, rtol=0)
    torch.manual_seed(2)
    assert not torch.allclose(adapted(attach(copy.deepcopy(base), LoRASB(3)))["0"].B, a.B)


@pytest.mark.parametrize("method", [LoRASB(16), LoRAXS(16)])
def test_no_more_directions_than_a_layer_has(method):
    base, x, _ = problem()
    model = attach(base, method)
    assert [tuple(a.R.shape) for a in adapted(model).values()] == [(9, 9), (5, 5)]
    assert model(x).shape == (20, 5)


@pytest.mark.parametrize("kind", [LoRASB, LoRAXS])
def test_room_changes_nothing(kind):
    base, x, y = problem()
    plain, roomy = [], []
    for room, weights in ((None, plain), (7, roomy)):
        method = kind(3, data=(x, y), room=room) if kind is LoRASB else kind(3, room=room)
        torch.manual_seed(1)
        stack = Stack([attach(copy.deepcopy(base), method)])
        adam = stack.optimizer(torch.optim.AdamW, 0.01, weight_decay=0.0)
        finetune(stack, method, class_loss, [(x[None], y[None])] * 5, adam)
        model = stack.module(0)
        assert [len(a.R) for a in adapted(model).values()] == ([3, 3] if room is None else [7, 5])
        weights += [p for p in detach(merge(model)).parameters()]
    for p, q in zip(plain, roomy):
        torch.testing.assert_close(p, q, atol=1e-10, rtol=0)


def test_bad_input_is_refused():
    base, x, y = problem()
    for name in ("lr", "alpha"):
        with pytest.raises(ValueError, match=f"{name} must be positive, not 0"):
            LoRASB(**{name: 0})
    with pytest.raises(ValueError, match="rank 4 and room 3"):
        LoRASB(4, room=3)
    with pytest.raises(ValueError, match=r"tuple such as \(x, y\), not Tensor"):
        LoRASB(3, data=x)
    with pytest.raises(ValueError, match="no gradient to layer '2'"):
        attach(base, LoRASB(3, data=(x, y), loss=lambda model, x, y: model[0](x).square().mean()))
    with pytest.raises(ValueError, match="no gradient to layer '0'"):
        attach(base, LoRASB(3, data=(0 * x, y)))


@pytest.mark.gpu
def test_the_gpu_agrees_with_the_cpu():
    base, x, y = problem()
    there = attach(copy.deepcopy(base).cuda(), LoRASB(3, 0.01, (x.cuda(), y.cuda())))
    here = attach(copy.deepcopy(base), LoRASB(3, 0.01, (x, y)))
    torch.testing.assert_close(there(x.cuda()).cpu(), here(x), atol=1e-9, rtol=1e-9)
