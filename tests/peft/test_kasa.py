"""KaSA: exact truncation, penalties by plain loops and by peft, bad input."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from miniature.models import MLP
from miniature.peft import LoRA, PiSSA, adapted, attach, finetune, merge, trainable
from miniature.peft.engine import by_layer
from miniature.peft.kasa import KaSA, MiLoRA, Triplet
from miniature.stack import Stack, cross_entropy

F64 = torch.float64


def layer(m, n, method, seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(n, m).double())
    return adapted(attach(model, method))["0"]


def scatter(model, seed=0):
    """Move all trained tensors away from where they start."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in trainable(model).values():
            p.copy_(torch.randn(p.shape, generator=rng, dtype=F64))
    return model


@pytest.mark.parametrize("m, n", [(6, 9), (9, 6), (7, 7)])
def test_the_cut_takes_the_r_smallest_components(m, n):
    """Against numpy, component by component; the norm of what is cut by Pythagoras."""
    a = layer(m, n, KaSA(2))
    W = a.base.weight.detach().numpy()
    U, S, Vt = np.linalg.svd(W)
    world = sum(S[i] * np.outer(U[:, i], Vt[i]) for i in range(min(m, n) - 2))
    np.testing.assert_allclose(a.W, world, atol=1e-12)
    np.testing.assert_allclose(((W - a.W.numpy()) ** 2).sum(), (S[-2:] ** 2).sum(), atol=1e-12)
    assert torch.linalg.matrix_rank(a.W, tol=1e-9) == min(m, n) - 2


@pytest.mark.parametrize("m, n, cut", [(6, 9, 0), (6, 8, 0), (6, 7, 1), (6, 6, 2), (9, 6, 2)])
def test_the_released_cut_counts_inputs(m, n, cut):
    """Keep the first n - r components of min(m, n): wide layers lose fewer than r, or none."""
    a = layer(m, n, KaSA(2, released=True))
    S = torch.linalg.svdvals(a.base.weight.detach())
    lost = (a.base.weight.detach() - a.W).square().sum()
    torch.testing.assert_close(lost, S[len(S) - cut :].square().sum(), atol=1e-12, rtol=0)
    assert torch.linalg.matrix_rank(a.W, tol=1e-9) == min(m, n) - cut


def test_it_starts_at_the_truncated_model():
    base = MLP([6, 9, 5]).double()
    model = attach(copy.deepcopy(base), KaSA(2))
    cut = copy.deepcopy(base)
    with torch.no_grad():
        for path in ("0", "2"):
            U, S, Vh = torch.linalg.svd(cut.get_submodule(path).weight, full_matrices=False)
            S[-2:] = 0
            cut.get_submodule(path).weight.copy_((U * S) @ Vh)
    x = torch.randn(4, 6, dtype=F64)
    torch.testing.assert_close(model(x), cut(x), atol=1e-12, rtol=0)
    assert (model(x) - base(x)).abs().max() > 1e-3
    same = attach(copy.deepcopy(base), KaSA(2, truncate=False))
    torch.testing.assert_close(same(x), base(x), atol=1e-12, rtol=0)
    assert not KaSA(2).starts_at_base and KaSA(2, truncate=False).starts_at_base


@pytest.mark.parametrize("kind", [KaSA, Triplet])
@pytest.mark.parametrize("alpha, s", [(None, 1.0), (6.0, 2.0)])
def test_the_update_by_a_plain_loop(kind, alpha, s):
    a = layer(5, 6, kind(3, alpha))
    scatter(a)
    expected = torch.zeros(5, 6, dtype=F64)
    for i in range(3):
        expected += s * a.sigma[i].detach() * torch.outer(a.B[:, i].detach(), a.A[i].detach())
    torch.testing.assert_close(a.method.delta(a).detach(), expected)
    x = torch.randn(4, 6, dtype=F64)
    want = x @ (a.W + expected).T + a.base.bias
    torch.testing.assert_close(a(x).detach(), want.detach())
    torch.testing.assert_close(merge(nn.Sequential(a))[0](x).detach(), want.detach())


def test_starts():
    torch.manual_seed(3)
    a = layer(200, 300, KaSA(100))
    assert (a.B == 0).all() and a.A.abs().max() <= 1 / math.sqrt(300)
    assert abs(a.sigma.std() - 1) < 0.3 and abs(a.sigma.mean()) < 0.4
    b = layer(200, 300, Triplet(100))
    assert (b.sigma == 0).all() and torch.equal(b.W, b.base.weight)
    assert abs(b.A.std() - 0.02) < 1e-3 and abs(b.B.std() - 0.02) < 1e-3
    c = layer(6, 7, KaSA(2, diagonal=False))
    assert (c.sigma == 1).all() and set(trainable(c)) == {"A", "B"}
    torch.testing.assert_close(c.W, layer(6, 7, KaSA(2)).W)


def test_it_trains_r_times_m_plus_n_plus_one_numbers():
    model = attach(MLP([64, 32, 10]), KaSA(4))
    shapes = {k: tuple(p.shape) for k, p in trainable(model).items()}
    assert shapes == {
        "0.A": (4, 64), "0.B": (32, 4), "0.sigma": (4,),
        "2.A": (4, 32), "2.B": (10, 4), "2.sigma": (4,),
    }  # fmt: skip
    assert sum(p.numel() for p in trainable(model).values()) == 4 * (97 + 43)


def gram_norm(X, released):
    """|X'X - I| by the definition, entry by entry; |XX' - I| as released."""
    G = X @ X.T if released else X.T @ X
    return math.sqrt(
        sum((float(G[i, j]) - (i == j)) ** 2 for i in range(len(G)) for j in range(len(G)))
    )


@pytest.mark.parametrize("released", [False, True])
def test_the_penalty_by_a_plain_loop(released):
    method = KaSA(3, beta=0.3, gamma=0.7, released=released)
    model = scatter(attach(MLP([6, 9, 5]).double(), method))
    total = 0.0
    for a in adapted(model).values():
        total += 0.3 * float(a.sigma.detach().square().sum())
        total += 0.7 * (gram_norm(a.B.detach(), released) + gram_norm(a.A.detach().T, released))
    params = by_layer(trainable(model)) | {"head": {"weight": torch.ones(2)}}
    assert float(method.penalty(params).detach()) == pytest.approx(total / 2, rel=1e-12)
    half = method.penalty(params, beta=0.15, gamma=torch.tensor(0.35, dtype=F64))
    assert float(half.detach()) == pytest.approx(total / 4, rel=1e-12)
    fixed = KaSA(3, gamma=0.7, diagonal=False, released=released)
    without = {k: {n: v for n, v in p.items() if n != "sigma"} for k, p in params.items()}
    sizes = sum(0.3 * float(a.sigma.detach().square().sum()) for a in adapted(model).values())
    assert float(fixed.penalty(without).detach()) == pytest.approx((total - sizes) / 2, rel=1e-12)


@pytest.mark.parametrize("d, r", [(7, 3), (12, 4), (4, 4)])
def test_the_least_released_penalty(d, r):
    """sqrt(d - r), at orthonormal columns, where the r x r norm is zero; larger all around."""
    released, plain = KaSA(r, released=True), KaSA(r)
    Q = torch.linalg.qr(torch.randn(d, r, dtype=F64))[0]
    assert float(released.skew(Q)) == pytest.approx(math.sqrt(d - r), abs=1e-7)
    assert float(plain.skew(Q)) < 1e-12
    for _ in range(20):
        X = Q + 0.1 * torch.randn(d, r, dtype=F64)
        assert released.skew(X) > math.sqrt(d - r) and plain.skew(X) > 0


def test_the_gradient_of_the_penalty():
    """The plain norm pulls as hard near its minimum as far from it; the released one fades."""
    Q = torch.linalg.qr(torch.randn(9, 3, dtype=F64))[0]
    direction = Q / math.sqrt(3)  # (1 + e)^2 - 1 = 2 e: away along the columns themselves
    for method, expected in ((KaSA(3), 2.0), (KaSA(3, released=True), 0.0)):
        X = (Q + 1e-6 * direction).requires_grad_()
        method.skew(X).backward()
        assert float((X.grad * direction).sum()) == pytest.approx(expected, abs=1e-4)
    zero = torch.zeros(9, 3, dtype=F64, requires_grad=True)  # where B starts
    KaSA(3).skew(zero).backward()
    assert (zero.grad == 0).all()


def test_copies_of_a_stack_may_differ_in_their_penalties():
    torch.manual_seed(0)
    base, method = MLP([6, 9, 5]).double(), KaSA(2, beta=0.0, gamma=0.0)
    x, y = torch.randn(2, 8, 6, dtype=F64), torch.randint(5, (2, 8))
    beta, gamma = torch.tensor([0.1, 0.5], dtype=F64), torch.tensor([1.0, 0.2], dtype=F64)

    def loss(model, x, y, b, g):
        return cross_entropy(model(x), y) + method.penalty(by_layer(model.params), b, g)

    def build(beta, gamma):
        return attach(copy.deepcopy(base), KaSA(2, beta=beta, gamma=gamma))

    stack = Stack.init(lambda: build(0, 0), [1, 2])
    batch = (x, y, beta, gamma)
    finetune(stack, None, loss, [batch] * 4, stack.optimizer(torch.optim.SGD, 0.1))
    for i in range(2):
        own = KaSA(2, beta=float(beta[i]), gamma=float(gamma[i]))
        one = Stack.init(lambda own=own: attach(copy.deepcopy(base), own), [1 + i])
        steps = [(x[i : i + 1], y[i : i + 1])] * 4
        finetune(
            one,
            own,
            lambda model, x, y: cross_entropy(model(x), y),
            steps,
            one.optimizer(torch.optim.SGD, 0.1),
        )
        torch.testing.assert_close(stack.theta[i], one.theta[0])


def by_hand(frozen, params, batches, s, beta, gamma, rate, released):
    """Gradient descent on two linear layers, every gradient written out; params is changed."""
    blocks = len(frozen)
    for x, y in batches:
        W = [F + s * p["B"] @ np.diag(p["sigma"]) @ p["A"] for F, p in zip(frozen, params)]
        h = x @ W[0].T
        e = 2 * (h @ W[1].T - y) / len(x)
        for G, p in zip([(e @ W[1]).T @ x, e.T @ h], params):
            A, B, D = p["A"], p["B"], np.diag(p["sigma"])
            if released:
                gap_B, gap_A = B @ B.T - np.eye(len(B)), A.T @ A - np.eye(A.shape[1])
                skew_B, skew_A = gap_B @ B, A @ gap_A
            else:
                gap_B, gap_A = B.T @ B - np.eye(len(D)), A @ A.T - np.eye(len(D))
                skew_B, skew_A = B @ gap_B, gap_A @ A
            p["B"] = B - rate * (
                s * G @ A.T @ D + 2 * gamma / blocks * skew_B / np.linalg.norm(gap_B)
            )
            p["A"] = A - rate * (
                s * D @ B.T @ G + 2 * gamma / blocks * skew_A / np.linalg.norm(gap_A)
            )
            p["sigma"] = p["sigma"] - rate * (
                s * np.diag(B.T @ G @ A.T) + 2 * beta / blocks * p["sigma"]
            )


@pytest.mark.parametrize("released", [False, True])
def test_training_by_a_plain_loop(released):
    """40 steps of gradient descent from the card's equations alone."""
    g, names = np.random.default_rng(0), ("A", "B", "sigma")
    base = nn.Sequential(nn.Linear(9, 7, bias=False), nn.Linear(7, 5, bias=False)).double()
    method = KaSA(3, alpha=6.0, beta=0.2, gamma=0.3, released=released)
    model = scatter(attach(copy.deepcopy(base), method))
    with torch.no_grad():
        for p in trainable(model).values():
            p.mul_(0.5)
    params = [{k: getattr(a, k).detach().numpy().copy() for k in names} for a in model]
    frozen = []
    for layer in base:
        U, S, Vt = np.linalg.svd(layer.weight.detach().numpy(), full_matrices=False)
        S[layer.in_features - 3 if released else -3 :] = 0
        frozen.append(U @ np.diag(S) @ Vt)
    batches = [(g.normal(size=(6, 9)), g.normal(size=(6, 5))) for _ in range(40)]
    by_hand(frozen, params, batches, 2.0, 0.2, 0.3, 1e-3, released)
    stack = Stack([model])
    finetune(
        stack,
        method,
        lambda model, x, y: (model(x) - y).square().sum(-1).mean(),
        [(torch.from_numpy(x)[None], torch.from_numpy(y)[None]) for x, y in batches],
        stack.optimizer(torch.optim.SGD, 1e-3),
    )
    for a, p in zip(stack.module(0), params):
        for k in names:
            assert np.isfinite(p[k]).all()
            np.testing.assert_allclose(getattr(a, k).detach().numpy(), p[k], atol=1e-11)


def test_a_large_gamma_makes_the_factors_orthonormal():
    """And then s |sigma| are the singular values of the update; without gamma they are not."""
    off = {}
    for gamma in (0.0, 5.0):
        method = KaSA(3, alpha=6.0, beta=0.0, gamma=gamma)
        torch.manual_seed(0)
        model = attach(nn.Sequential(nn.Linear(8, 8, bias=False).double()), method)
        target = model[0].W + torch.randn(8, 8, dtype=F64)
        stack = Stack([model])
        opt = stack.optimizer(torch.optim.Adam, 0.02)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 800)
        x = torch.eye(8, dtype=F64)[None]
        finetune(
            stack,
            method,
            lambda model, x, y: (model(x) - y).square().sum(),
            [(x, target.T[None])] * 800,
            opt,
            schedule,
        )
        a = stack.module(0)[0]
        values = torch.linalg.svdvals(method.delta(a).detach())[:3]
        own = (2.0 * a.sigma.detach().abs()).sort(descending=True).values
        off[gamma] = float(((own - values).abs() / values).max())
        if gamma:  # the best update of rank 3: Eckart and Young
            best = torch.linalg.svdvals(target - a.W)[:3]
            torch.testing.assert_close(values, best, atol=0.02, rtol=0.02)
    assert off[5.0] < 0.02 < 0.1 < off[0.0]


def test_peft_agrees():
    """peft's own KaSA, with the same weights: truncation, output, gradients, penalties."""
    peft = pytest.importorskip("peft")
    kasa = pytest.importorskip("peft.tuners.lora.config").KasaConfig
    torch.manual_seed(0)
    base = MLP([6, 9, 5]).double()
    config = peft.LoraConfig(
        r=3, lora_alpha=6, target_modules=["0", "2"], kasa_config=kasa(beta=0.3, gamma=0.7)
    )
    other = peft.get_peft_model(copy.deepcopy(base), config).double()
    method = KaSA(3, alpha=6, beta=0.3, gamma=0.7)
    model = scatter(attach(copy.deepcopy(base), method), seed=1)
    theirs = {"0": None, "2": None}
    for path, a in adapted(model).items():
        t = theirs[path] = other.base_model.model.get_submodule(path)
        torch.testing.assert_close(t.base_layer.weight, a.W, atol=1e-5, rtol=0)  # by a float32 SVD
        with torch.no_grad():
            t.base_layer.weight.copy_(a.W)
            t.lora_A["default"].weight.copy_(a.A)
            t.lora_B["default"].weight.copy_(a.B)
            t.lora_diag["default"].copy_(a.sigma)
    x, y = torch.randn(7, 6, dtype=F64), torch.randint(5, (7,))
    torch.testing.assert_close(model(x), other(x), atol=1e-10, rtol=1e-10)
    # peft sums over the layers, the paper's code takes the mean; peft computes it in float32
    own = method.penalty(by_layer(trainable(model)))
    their = other.base_model._get_kasa_loss() / 2
    torch.testing.assert_close(own.detach(), their.detach().double(), atol=0, rtol=1e-5)
    cross_entropy(model(x), y).backward()
    cross_entropy(other(x), y).backward()
    for path, a in adapted(model).items():
        t = theirs[path]
        for p, q in (
            (a.A, t.lora_A["default"].weight),
            (a.B, t.lora_B["default"].weight),
            (a.sigma, t.lora_diag["default"]),
        ):
            torch.testing.assert_close(p.grad, q.grad, atol=1e-10, rtol=1e-10)


def test_peft_agrees_on_the_triplet():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = MLP([6, 9, 5]).double()
    config = peft.AdaLoraConfig(
        init_r=3, target_r=3, lora_alpha=6, total_step=10, target_modules=["0", "2"]
    )
    other = peft.get_peft_model(copy.deepcopy(base), config).double()
    model = scatter(attach(copy.deepcopy(base), Triplet(3, alpha=6)))
    for path, a in adapted(model).items():
        t = other.base_model.model.get_submodule(path)
        with torch.no_grad():
            t.lora_A["default"].copy_(a.A)
            t.lora_B["default"].copy_(a.B)
            t.lora_E["default"].copy_(a.sigma[:, None])
    x = torch.randn(7, 6, dtype=F64)
    torch.testing.assert_close(model(x), other(x), atol=1e-4, rtol=1e-4)  # they divide by r + 1e-5


@pytest.mark.parametrize("alpha, s", [(None, 1.0), (6.0, 2.0)])
def test_milora_takes_the_other_end_of_the_spectrum(alpha, s):
    a, top = layer(6, 9, MiLoRA(3, alpha)), layer(6, 9, PiSSA(3, alpha))
    W = a.base.weight.detach()
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    small = (U[:, 3:] * S[3:]) @ Vh[3:]
    torch.testing.assert_close(s * (a.B @ a.A).detach(), small)
    torch.testing.assert_close(a.W, W - small)
    torch.testing.assert_close(a.W, layer(6, 9, KaSA(3)).W)  # frozen is what KaSA keeps
    torch.testing.assert_close(top.W, small)


def test_a_convolution_is_a_matrix():
    """Not adapted by default, as in the paper's code; its weight is read as [out, in * 3 * 3]."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Conv2d(2, 5, 3), nn.Flatten(), nn.Linear(5, 4)).double()
    assert list(adapted(attach(copy.deepcopy(base), KaSA(2)))) == ["2"]
    model = scatter(attach(copy.deepcopy(base), KaSA(2, targets=["0"])))
    a = model[0]
    S = torch.linalg.svdvals(base[0].weight.detach().flatten(1))
    torch.testing.assert_close(torch.linalg.svdvals(a.W)[:3], S[:3])
    W = a.W + (a.B * a.sigma) @ a.A
    x = torch.randn(3, 2, 3, 3, dtype=F64)
    want = nn.functional.conv2d(x, W.view(5, 2, 3, 3), base[0].bias)
    torch.testing.assert_close(a(x), want)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="rank must be positive, not 0"):
        KaSA(0)
    with pytest.raises(ValueError, match=r"beta must be zero or positive, not -1"):
        KaSA(4, beta=-1)
    with pytest.raises(ValueError, match=r"gamma must be zero or positive, not -0.5"):
        Triplet(4, gamma=-0.5)
    with pytest.raises(ValueError, match=r"both sides of the weight \[5, 9\] of layer '2', not 5"):
        attach(MLP([6, 9, 5]), KaSA(5))
    attach(MLP([6, 9, 5]), KaSA(4))  # one component is left
    attach(MLP([6, 9, 5]), LoRA(5))


@pytest.mark.gpu
def test_a_gpu_cuts_and_penalizes_the_same():
    torch.manual_seed(0)
    base, method = MLP([6, 9, 5]).double(), KaSA(2, beta=0.3, gamma=0.7)
    here = scatter(attach(copy.deepcopy(base), method))
    there = scatter(attach(copy.deepcopy(base).cuda(), method))
    for path, a in adapted(here).items():
        torch.testing.assert_close(adapted(there)[path].W.cpu(), a.W, atol=1e-12, rtol=0)
    own, other = (method.penalty(by_layer(trainable(m))) for m in (here, there))
    torch.testing.assert_close(own, other.cpu(), atol=1e-12, rtol=1e-12)
