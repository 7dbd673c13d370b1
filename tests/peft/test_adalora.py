"""AdaLoRA: step by step beside a plain loop and beside peft's allocator; exact allocation."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from miniature.models import MLP
from miniature.peft import adapted, attach, finetune, merge
from miniature.peft.adalora import (
    SCORES,
    AdaLoRA,
    Doublets,
    best_ranks,
    budget_at,
    top,
)
from miniature.peft.engine import by_layer
from miniature.peft.tasks import Regression
from miniature.stack import Stack, class_loss

F64 = torch.float64
SHAPES = {"a": (5, 4), "b": (3, 6)}  # m, n
R = 3


def random_steps(steps, copies=2, seed=0, names=("P", "lam", "Q")):
    """Parameters and gradients of two layers as they might come, step after step."""
    g = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        pair = []
        for _ in range(2):
            tree = {}
            for layer, (m, n) in SHAPES.items():
                shapes = ((m, R), (R,), (R, n)) if len(names) == 3 else ((m, R), (R, n))
                tree[layer] = {
                    name: torch.randn(copies, *shape, generator=g, dtype=F64)
                    for name, shape in zip(names, shapes)
                }
            pair.append(tree)
        yield pair


def plain_scores(history, beta1, beta2, kind):
    """S by loops over single numbers, for one copy: (layer, i) -> score."""
    mean, spread, last = {}, {}, {}
    for params, grads in history:
        for layer in params:
            for name in params[layer]:
                w, g = params[layer][name].tolist(), grads[layer][name].tolist()
                flat = (
                    [((i,), x, y) for i, (x, y) in enumerate(zip(w, g))]
                    if name == "lam"
                    else [
                        ((i, j), w[i][j], g[i][j]) for i in range(len(w)) for j in range(len(w[0]))
                    ]
                )
                for at, x, y in flat:
                    key = layer, name, *at
                    I = last[key] = abs(x * y)
                    mean[key] = beta1 * mean.get(key, 0.0) + (1 - beta1) * I
                    spread[key] = beta2 * spread.get(key, 0.0) + (1 - beta2) * abs(I - mean[key])
    s = {
        "product": lambda key: mean[key] * spread[key],
        "smoothed": lambda key: mean[key],
        "sensitivity": lambda key: last[key],
    }[kind]
    scores = {}
    for layer, (m, n) in SHAPES.items():
        for i in range(R):
            scores[layer, i] = (
                s((layer, "lam", i))
                + sum(s((layer, "P", j, i)) for j in range(m)) / m
                + sum(s((layer, "Q", i, j)) for j in range(n)) / n
            )
    return scores


@pytest.mark.parametrize("kind", SCORES)
def test_scores_and_masks_are_those_of_a_plain_loop(kind):
    T, first, last, every, bT = 20, 3, 5, 4, 2
    method = AdaLoRA(R, bT, T, first, last, every, betas=(0.7, 0.4), score=kind)
    history, fixed = [[], []], [None, None]
    for t, (params, grads) in enumerate(random_steps(T), 1):
        before = {k: {n: v.clone() for n, v in p.items()} for k, p in params.items()}
        method.update(params, grads, t)
        for copy in range(2):
            here, gradient = (
                {k: {n: v[copy] for n, v in p.items()} for k, p in tree.items()}
                for tree in (before, grads)
            )
            if t < T - last:
                history[copy].append((here, gradient))
            if kind == "magnitude":
                S = {(k, i): float(abs(here[k]["lam"][i])) for k in here for i in range(R)}
            else:
                S = plain_scores(history[copy], 0.7, 0.4, kind)
            if t <= first:
                b = None
            elif t < T - last:
                b = int(bT + (6 - bT) * (1 - (t - first) / (T - first - last)) ** 3)
                b = b if t % every == 0 else None
            else:
                b = bT
            keep = set(S) if b is None else set(sorted(S, key=S.get)[-b:])
            if t == T - last:
                fixed[copy] = keep
            elif t > T - last:
                keep = fixed[copy]
            for k in here:
                for i in range(R):
                    expected = here[k]["lam"][i] if (k, i) in keep else 0.0
                    assert params[k]["lam"][copy, i] == expected, (t, copy, k, i)
                assert torch.equal(params[k]["P"][copy], here[k]["P"])
                assert torch.equal(params[k]["Q"][copy], here[k]["Q"])


def test_it_allocates_as_peft_does_step_by_step():
    """The same weights and gradients through Hugging Face's RankAllocator: scores and masks."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    T, first, last, every = 30, 4, 8, 3
    model = MLP([6, 9, 5]).double()
    config = peft.AdaLoraConfig(
        init_r=4,
        target_r=2,
        tinit=first,
        tfinal=last,
        deltaT=every,
        beta1=0.85,
        beta2=0.7,
        total_step=T,
        target_modules=["0", "2"],
    )
    theirs = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    allocator = theirs.base_model.rankallocator
    method = AdaLoRA(4, 4, T, first, last, every, betas=(0.85, 0.7))
    names = {"P": "lora_B", "lam": "lora_E", "Q": "lora_A"}
    found = dict(theirs.named_parameters())

    def their(layer, name):
        return next(p for k, p in found.items() if f"model.{layer}.{names[name]}.default" in k)

    masked = 0
    for t in range(1, T + 1):
        params, grads = {}, {}
        for layer in ("0", "2"):
            params[layer], grads[layer] = {}, {}
            for name in names:
                p = their(layer, name)
                with torch.no_grad():  # a step of some optimizer
                    p += 0.1 * torch.randn(p.shape, dtype=F64)
                p.grad = torch.randn(p.shape, dtype=F64)
                shape = (1, -1) if name == "lam" else (1, *p.shape)
                params[layer][name] = p.detach().clone().reshape(shape)
                grads[layer][name] = p.grad.clone().reshape(shape)
        theirs.base_model.update_and_allocate(t)
        method.update(params, grads, t)
        for layer in ("0", "2"):
            lam = their(layer, "lam").detach().flatten()
            torch.testing.assert_close(params[layer]["lam"][0], lam, rtol=0, atol=0)
            masked += int((lam == 0).sum())
            if t < T - last:
                for name in names:
                    n = next(k for k in allocator.ipt if f"{layer}.{names[name]}" in k)
                    score = allocator._element_score(n).reshape(params[layer][name].shape)
                    torch.testing.assert_close(
                        method.entries("product", layer, name), score, atol=1e-12, rtol=1e-9
                    )
        b, _ = allocator.budget_schedule(t)
        assert b == int(budget_at(t, 8, 4, T, first, last))
    assert masked > 0 and b == 4


def test_the_layer_and_its_gradients_are_those_of_peft():
    """With its scale alpha / r at one; the penalty apart, which is another norm there."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = MLP([6, 9, 5]).double()
    mine = attach(MLP([6, 9, 5]).double(), AdaLoRA(4))
    for k in ("0", "2"):
        adapted(mine)[k].base.load_state_dict(base.get_submodule(k).state_dict())
    config = peft.AdaLoraConfig(init_r=4, lora_alpha=4, total_step=9, target_modules=["0", "2"])
    theirs = peft.get_peft_model(base, config, autocast_adapter_dtype=False)
    pairs = []
    for k, layer in adapted(mine).items():
        other = theirs.base_model.model.get_submodule(k)
        own = (other.lora_B.default, other.lora_E.default, other.lora_A.default)
        for p, q in zip((layer.P, layer.lam, layer.Q), own):
            with torch.no_grad():
                q.copy_(torch.randn_like(q))
                p.copy_(q.view_as(p))
            pairs.append((p, q))
    x, y = torch.randn(7, 6, dtype=F64), torch.randint(5, (7,))
    torch.testing.assert_close(mine(x), theirs(x), atol=1e-4, rtol=1e-4)  # theirs: r + 1e-5
    class_loss(mine, x, y).backward()
    class_loss(theirs, x, y).backward()
    for p, q in pairs:
        torch.testing.assert_close(p.grad, q.grad.view_as(p), atol=1e-4, rtol=1e-4)


def test_penalty():
    params, _ = next(random_steps(1))
    one = {k: {n: v[0] for n, v in p.items()} for k, p in params.items()}
    expected = 0.0
    for p in one.values():
        for i, j in itertools.product(range(R), repeat=2):
            expected += (float(p["P"][:, i] @ p["P"][:, j]) - (i == j)) ** 2
            expected += (float(p["Q"][i] @ p["Q"][j]) - (i == j)) ** 2
    assert math.isclose(float(AdaLoRA(gamma=0.3).penalty(one)), 0.3 * expected, rel_tol=1e-12)
    assert AdaLoRA(gamma=0).penalty(one) is None


def test_budget_is_a_cubic_between_its_ends():
    values = [int(budget_at(t, 40, 10, 100, 20, 30)) for t in range(1, 101)]
    assert values[:20] == [40] * 20 and values[69:] == [10] * 31
    assert values[44] == int(10 + 30 / 8)  # half of the way: an eighth is left
    assert all(a >= b for a, b in itertools.pairwise(values)) and values[20] < 40
    assert budget_at(45, 40, [10, 20], 100, 20, 30).tolist() == [13, 22]


def train(method, steps, seeds=(0, 1), kind=torch.optim.Adam, watch=None):
    torch.manual_seed(3)
    x = torch.randn(2, 40, 6, dtype=F64)
    y = torch.randint(5, (2, 40))
    stack = Stack.init(lambda: attach(MLP([6, 12, 5]).double(), method), seeds)
    optimizer = stack.optimizer(kind, 0.05)
    finetune(stack, method, class_loss, [(x, y)] * steps, optimizer, callback=watch)
    return stack


def test_the_number_of_live_triplets_is_the_budget_and_triplets_come_back():
    T, first, last, every = 60, 6, 20, 5
    method = AdaLoRA(4, [2, 5], T, first, last, every)
    live, states = {}, {}

    def watch(t, stack):
        lam = torch.cat([p["lam"] for p in by_layer(stack.params()).values()], -1)
        live[t], states[t] = (lam != 0).sum(-1).tolist(), lam != 0

    train(method, T, watch=watch)
    for t in range(first + 1, T + 1):
        if t % every == 0 or t >= T - last:
            assert live[t] == budget_at(t, 8, [2, 5], T, first, last).tolist(), t
    assert live[first] == [8, 8] and live[T] == [2, 5]
    assert all(torch.equal(states[t], states[T - last]) for t in range(T - last, T + 1))
    moments = [states[t] for t in range(10, T - last + 1, every)]
    assert any((b & ~a).any() for a, b in itertools.pairwise(moments)), "none came back"


def test_a_training_run_is_that_of_a_plain_loop():
    """Forward, gradients, penalty, Adam, scores and masks written out for two layers."""
    T, first, last, every, bT, r, gamma, beta1, beta2, lr = 60, 6, 20, 5, 5, 4, 0.3, 0.85, 0.7, 0.05
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(5, 6, bias=False), nn.Tanh(), nn.Linear(6, 4, bias=False))
    W = [base[k].weight.detach().double().numpy().copy() for k in (0, 2)]
    method = AdaLoRA(r, bT, T, first, last, every, gamma, (beta1, beta2))
    stack = Stack([attach(base.double(), method)])
    theta = by_layer(stack.params())
    w = [theta[k][name][0].numpy().copy() for k in ("0", "2") for name in ("P", "lam", "Q")]
    x, y = torch.randn(T, 1, 12, 5, dtype=F64), torch.randn(T, 1, 12, 4, dtype=F64)

    def squares(model, x, y):
        return (model(x) - y).square().mean()

    finetune(stack, method, squares, zip(x, y), stack.optimizer(torch.optim.Adam, lr))
    first_moment, second_moment, mean, spread = ([0 * v for v in w] for _ in range(4))
    eye = np.eye(r)
    for t in range(1, T + 1):
        x_t, y_t = x[t - 1, 0].numpy(), y[t - 1, 0].numpy()
        A, B = (W[k] + w[3 * k] * w[3 * k + 1] @ w[3 * k + 2] for k in (0, 1))
        h = np.tanh(x_t @ A.T)
        error = 2 * (h @ B.T - y_t) / y_t.size
        grads = []
        for k, G in enumerate((((error @ B) * (1 - h * h)).T @ x_t, error.T @ h)):
            P, lam, Q = w[3 * k : 3 * k + 3]
            grads.append(G @ Q.T * lam + 4 * gamma * P @ (P.T @ P - eye))
            grads.append(np.diag(P.T @ G @ Q.T))
            grads.append(lam[:, None] * (P.T @ G) + 4 * gamma * (Q @ Q.T - eye) @ Q)
        for i, g in enumerate(grads):
            first_moment[i] = 0.9 * first_moment[i] + 0.1 * g
            second_moment[i] = 0.999 * second_moment[i] + 0.001 * g * g
            root = np.sqrt(second_moment[i] / (1 - 0.999**t)) + 1e-8
            w[i] = w[i] - lr * first_moment[i] / (1 - 0.9**t) / root
            if t < T - last:
                sensitivity = abs(w[i] * g)
                mean[i] = beta1 * mean[i] + (1 - beta1) * sensitivity
                spread[i] = beta2 * spread[i] + (1 - beta2) * abs(sensitivity - mean[i])
        if first < t <= T - last and (t % every == 0 or t == T - last):
            s = [a * b for a, b in zip(mean, spread)]
            S = np.concatenate([s[i + 1] + s[i].mean(0) + s[i + 2].mean(1) for i in (0, 3)])
            left = max(0.0, 1 - (t - first) / (T - first - last))
            kept = S >= np.sort(S)[-int(bT + (2 * r - bT) * left**3)]
        elif t < T - last:
            continue
        w[1], w[4] = w[1] * kept[:r], w[4] * kept[r:]
    theta = by_layer(stack.params())
    found = [theta[k][name][0].numpy() for k in ("0", "2") for name in ("P", "lam", "Q")]
    for ours, plain in zip(found, w):
        np.testing.assert_allclose(ours, plain, rtol=0, atol=1e-12)
    assert 0 < kept[:r].sum() < r and kept.sum() == bT


def test_every_copy_may_have_its_own_score():
    mixed, seen = AdaLoRA(R, 2, 20, 2, 5, score=("magnitude", "product")), {}
    for kind in ("magnitude", "product"):
        seen[kind] = AdaLoRA(R, 2, 20, 2, 5, score=kind)
    for t, (params, grads) in enumerate(random_steps(20), 1):
        for method in (mixed, *seen.values()):
            method.update({k: {**p, "lam": p["lam"].clone()} for k, p in params.items()}, grads, t)
    for layer, kept in enumerate(mixed.kept):
        for copy, method in enumerate(seen.values()):
            assert torch.equal(kept[copy], method.kept[layer][copy])
    assert not torch.equal(
        torch.cat(seen["product"].kept, -1), torch.cat(seen["magnitude"].kept, -1)
    )


def test_of_equal_scores_the_earlier_is_kept():
    scores = torch.tensor([1.0, 2.0]).repeat(50)
    place = torch.arange(100)
    assert torch.equal(top(scores, torch.tensor(60)), (place % 2 == 1) | (place < 20))


def test_a_method_forgets_the_last_run():
    method = AdaLoRA(4, 3, 20, 2, 5)
    a = train(method, 20)
    train(method, 20, seeds=(7, 8))
    assert torch.equal(train(method, 20).theta, a.theta)


def test_training_makes_a_singular_value_decomposition():
    task = Regression([0, 1], 6, 8, (3.0, 2.0, 1.0), dtype=F64)
    method = AdaLoRA(5, 3, 600, 60, 300, 10, gamma=0.5)
    stack = Stack.init(lambda: attach(task.model(0), method), [0])
    x = torch.randn(1, 60, 8, dtype=F64)
    y = x @ (task.W0 + task.shift)[:1].mT
    optimizer = stack.optimizer(torch.optim.Adam, 0.03)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 600)
    finetune(stack, method, task.loss, [(x, y)] * 600, optimizer, schedule)
    layer = adapted(stack.module(0))["0"]
    eye = torch.eye(5, dtype=F64)
    assert (layer.P.mT @ layer.P - eye).norm() < 0.01
    assert (layer.Q @ layer.Q.mT - eye).norm() < 0.01
    lam = layer.lam.detach().abs().sort(descending=True).values[:3]
    expected = torch.tensor([3.0, 2.0, 1.0], dtype=F64) / math.sqrt(14)
    torch.testing.assert_close(lam, expected, rtol=0.02, atol=0)
    x = torch.randn(5, 8, dtype=F64)
    model = stack.module(0)
    torch.testing.assert_close(model(x), merge(model)(x), atol=1e-10, rtol=0)


def test_best_ranks_by_trying_all():
    torch.manual_seed(0)
    spectra = torch.rand(3, 4, dtype=F64).sort(-1, descending=True).values
    for budget in range(1, 9):
        options = {}
        for ranks in itertools.product(range(5), repeat=3):
            if sum(ranks) == budget:
                options[ranks] = sum(float(s[r:].square().sum()) for s, r in zip(spectra, ranks))
        ranks, floor = best_ranks(spectra, budget)
        assert tuple(ranks.tolist()) == min(options, key=options.get)
        assert math.isclose(float(floor), min(options.values()), rel_tol=1e-12)
    ranks, floor = best_ranks(spectra.expand(2, 3, 4), 5)
    assert ranks.shape == (2, 3) and floor.shape == (2,)


def test_doublets_are_cut_for_good():
    method = Doublets(4, 3, 40, 4, 10, 3)
    sizes = []

    def watch(t, stack):
        pairs = by_layer(stack.params()).values()
        B = torch.cat([p["B"].norm(dim=-2) for p in pairs], -1)
        A = torch.cat([p["A"].norm(dim=-1) for p in pairs], -1)
        if t > 4:
            assert torch.equal(B != 0, A != 0)
            sizes.append((A != 0).sum(-1).tolist())

    train(method, 40, kind=torch.optim.SGD, watch=watch)  # without momentum
    assert sizes[-1] == [3, 3] and all(
        a >= b for x, y in itertools.pairwise(sizes) for a, b in zip(x, y)
    )


def test_doublet_scores():
    names = ("B", "A")
    (first, second) = random_steps(2, names=names)
    method = Doublets(R, 2, 20, 5, 5)
    for t, (params, grads) in enumerate((first, second), 1):
        method.update(params, grads, t)
    for layer in SHAPES:
        I1, I2 = ({n: (p[layer][n] * g[layer][n]).abs() for n in names} for p, g in (first, second))
        s = {}
        for n in names:
            mean1 = 0.15 * I1[n]
            mean2 = 0.85 * mean1 + 0.15 * I2[n]
            spread = 0.85 * 0.15 * (I1[n] - mean1).abs() + 0.15 * (I2[n] - mean2).abs()
            s[n] = mean2 * spread
        torch.testing.assert_close(
            method.triplets(layer, second[0][layer]), s["B"].mean(1) + s["A"].mean(2)
        )


def test_no_more_triplets_than_a_matrix_has():
    model = attach(nn.Sequential(nn.Linear(20, 3)), AdaLoRA(12, 3))
    assert model[0].lam.shape == (3,)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="rank must be positive, not 0"):
        AdaLoRA(0)
    with pytest.raises(ValueError, match="first = 60, last = 40"):
        AdaLoRA(steps=100, first=60, last=40)
    with pytest.raises(ValueError, match="not 0"):
        AdaLoRA(every=0)
    with pytest.raises(ValueError, match="betas"):
        AdaLoRA(betas=(0.85, 1.0))
    with pytest.raises(ValueError, match="gamma >= 0"):
        AdaLoRA(gamma=-1)
    with pytest.raises(ValueError, match="not 'variance'"):
        AdaLoRA(score="variance")
    with pytest.raises(ValueError, match="not 'variance'"):
        AdaLoRA(score=["product", "variance"])
    for budget in (0, [4, 99]):
        with pytest.raises(ValueError, match=r"1\.\.9, the triplets at first"):
            attach(MLP([6, 9, 9, 5]), AdaLoRA(3, budget))


@pytest.mark.gpu
def test_the_gpu_masks_the_same():
    method = AdaLoRA(R, [2, 3], 20, 3, 5, 4)
    kept = {}
    for device in ("cpu", "cuda"):
        for t, pair in enumerate(random_steps(20), 1):
            params, grads = (
                {k: {n: v.to(device) for n, v in p.items()} for k, p in tree.items()}
                for tree in pair
            )
            method.update(params, grads, t)
        kept[device] = torch.cat([k.cpu() for k in method.kept], -1)
    assert torch.equal(kept["cpu"], kept["cuda"])
