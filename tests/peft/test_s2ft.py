"""S2FT: permutations by brute force, slices against the whole gradient, masked loops, adapters."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from miniature.models import GPT, MLP, ViT
from miniature.models.gpt import rope
from miniature.peft import adapted, attach, detach, finetune, merge, saved_bytes, trainable
from miniature.peft.s2ft import (
    COLUMNS,
    ROWS,
    RULES,
    S2FT,
    Couple,
    GatedMLP,
    Unstructured,
    co_permute,
    couples,
    draw,
    expand,
    fuse,
    importance,
    permutation,
    scattered,
    split,
    switch,
)
from miniature.stack import Stack, class_loss, cross_entropy

F64 = torch.float64


def gated(seed=0, hidden=10):
    torch.manual_seed(seed)
    return GatedMLP(6, 4, hidden, 2, 5).double()


def batch(n=7, inputs=6):
    g = torch.Generator().manual_seed(9)
    return torch.randn(n, inputs, dtype=F64, generator=g), torch.arange(n) % 5


def both(rows=(1, 6), columns=(6, 3)):
    """Units of each of two couples, for rows and for columns."""
    return [(list(rows), sorted(columns)), ([], [2])]


class GroupedAttention(nn.Module):
    """Causal attention with rotary positions: 4 heads of queries, 2 groups of keys and values."""

    def __init__(self, dim=8, heads=4, groups=2):
        super().__init__()
        self.heads, self.groups, self.d = heads, groups, dim // heads
        self.q, self.out = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.k, self.v = (nn.Linear(dim, groups * self.d) for _ in range(2))

    def forward(self, x):
        q, k, v = (
            f(x).unflatten(-1, (-1, self.d)).transpose(-2, -3) for f in (self.q, self.k, self.v)
        )
        k, v = (t.repeat_interleave(self.heads // self.groups, -3) for t in (k, v))
        at = torch.arange(x.shape[-2])
        scores = rope(q, at) @ rope(k, at).transpose(-1, -2) / math.sqrt(self.d)
        scores = scores.masked_fill(at > at[:, None], -torch.inf)
        return self.out((scores.softmax(-1) @ v).transpose(-2, -3).flatten(-2))


def test_the_gated_block_is_that_of_its_equations():
    model, (x, _) = gated(), batch()
    h = x @ model.embed.weight.T + model.embed.bias
    for b in model.blocks:
        u = h / (h**2).mean(1, keepdim=True).sqrt()
        g = u @ b.gate.weight.T + b.gate.bias
        z = g * torch.sigmoid(g) * (u @ b.up.weight.T + b.up.bias)
        h = h + z @ b.down.weight.T + b.down.bias
    expected = h @ model.head.weight.T + model.head.bias
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("rows, columns", itertools.product([(), (4, 1), (0, 2)], repeat=2))
def test_the_order_puts_both_choices_in_one_piece(rows, columns):
    order, (a, b), (c, d) = permutation(6, sorted(rows), sorted(columns))
    assert sorted(order) == list(range(6))
    assert sorted(order[a:b]) == sorted(rows) and sorted(order[c:d]) == sorted(columns)
    middle = set(rows) & set(columns)
    assert order[c:b] == sorted(middle) or not middle
    assert order[max(b, d) :] == sorted(order[max(b, d) :])


MODELS = {
    "gated": (lambda: gated(), lambda: batch()[0]),
    "mlp": (lambda: MLP([6, 8, 7, 5]).double(), lambda: batch()[0]),
    "gpt": (
        lambda: GPT(vocab=11, dim=16, layers=2, heads=4, context=9).double(),
        lambda: torch.randint(11, (3, 9)),
    ),
    "vit": (
        lambda: ViT((1, 4, 4), 5, dim=16, layers=2, heads=4).double(),
        lambda: torch.randn(3, 1, 4, 4, dtype=F64),
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_co_permutation_leaves_the_function(name):
    torch.manual_seed(0)
    model, x = MODELS[name][0](), MODELS[name][1]()
    with torch.no_grad():
        for p in model.parameters():  # biases too: GPT starts them at zero
            p += 0.3 * torch.randn_like(p)
    pairs, before = couples(model), model(x)
    was = copy.deepcopy(model)
    chosen = draw(pairs, columns=0.5)
    slices = co_permute(model, pairs, chosen)
    torch.testing.assert_close(model(x), before, atol=1e-10, rtol=0)
    for c, (_, columns) in zip(pairs, chosen):
        W, W0 = model.get_submodule(c.reader).weight, was.get_submodule(c.reader).weight
        if columns:
            dim, idx = slices[c.reader]
            assert dim == COLUMNS and idx.tolist() == list(range(len(columns) * c.block))
            expected = W0[
                :, expand(columns, c.block)
            ]  # the rows of an MLP move with the next couple
            assert torch.equal(W[:, idx].sort(0).values, expected.sort(0).values)
    assert any(not torch.equal(p, q) for p, q in zip(model.parameters(), was.parameters()))


@pytest.mark.parametrize("order", itertools.permutations(range(4)))
def test_any_order_of_heads_and_of_units_by_brute_force(order):
    torch.manual_seed(0)
    model = GPT(vocab=11, dim=16, layers=1, heads=4, context=9).double()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.3 * torch.randn_like(p)
    ids = torch.randint(11, (2, 9))
    other, a, at = copy.deepcopy(model), model.blocks[0].attention, list(order)
    with torch.no_grad():
        b = other.blocks[0].attention
        for k in "qkv":  # heads as an axis of their own
            W = getattr(a, k).weight.view(4, 4, 16)[at].reshape(16, 16)
            getattr(b, k).weight.copy_(W)
            getattr(b, k).bias.copy_(getattr(a, k).bias.view(4, 4)[at].flatten())
        b.out.weight.copy_(a.out.weight.view(16, 4, 4)[:, at].reshape(16, 16))
    torch.testing.assert_close(other(ids), model(ids), atol=1e-10, rtol=0)
    # and it is what `co_permute` does for heads that are chosen in this order
    mine = copy.deepcopy(model)
    pairs = couples(mine)
    attention = next(i for i, c in enumerate(pairs) if c.reader.endswith("out"))
    chosen = [([], [])] * len(pairs)
    chosen[attention] = ([], at[:2])
    co_permute(mine, pairs, chosen)
    rest = sorted(at[2:])
    expected = a.out.weight.view(16, 4, 4)[:, at[:2] + rest].reshape(16, 16)
    assert torch.equal(mine.blocks[0].attention.out.weight, expected)


def test_groups_of_queries_move_with_their_keys_and_values():
    torch.manual_seed(0)
    model = GroupedAttention().double()
    x = torch.randn(2, 5, 8, dtype=F64)
    before, W = model(x), model.out.weight.detach().clone()
    group = Couple({"q": 4, "k": 2, "v": 2}, "out", 4, 2)
    slices = co_permute(model, [group], [([1], [1])])
    torch.testing.assert_close(model(x), before, atol=1e-12, rtol=0)
    assert slices["v"][1].tolist() == [0, 1] and slices["out"][1].tolist() == [0, 1, 2, 3]
    assert torch.equal(model.out.weight, W[:, [4, 5, 6, 7, 0, 1, 2, 3]])
    # queries permuted without their group, or channels in a head, compute something else
    torch.manual_seed(0)
    wrong = GroupedAttention().double()
    co_permute(wrong, [Couple({"q": 2}, "out", 2, 4)], [([], [2])])
    assert (wrong(x) - before).abs().max() > 1e-3
    torch.manual_seed(0)
    wrong = GroupedAttention().double()
    with torch.no_grad():  # two channels of each head change places, in queries and keys alike
        for layer in (wrong.q, wrong.k):
            layer.weight.copy_(layer.weight.unflatten(0, (-1, 2)).flip(1).flatten(0, 1))
            layer.bias.copy_(layer.bias.unflatten(0, (-1, 2)).flip(1).flatten())
    assert (wrong(x) - before).abs().max() > 1e-3


def test_all_orders_of_a_gated_block():
    model, (x, _) = gated(hidden=4), batch()
    before = model(x)
    for order in itertools.permutations(range(4)):
        other = copy.deepcopy(model)
        with torch.no_grad():
            for a, b in zip(model.blocks, other.blocks):
                for k in ("gate", "up"):
                    getattr(b, k).weight.copy_(getattr(a, k).weight[list(order)])
                    getattr(b, k).bias.copy_(getattr(a, k).bias[list(order)])
                b.down.weight.copy_(a.down.weight[:, list(order)])
        torch.testing.assert_close(other(x), before, atol=1e-12, rtol=0)


def move(model, by=0.3):
    torch.manual_seed(4)
    with torch.no_grad():
        for p in trainable(model).values():
            p += by * torch.randn_like(p)
    return model


@pytest.mark.parametrize("partial", [False, True])
def test_slice_gradients_are_the_slice_of_the_whole_gradient(partial):
    model, (x, y) = gated(), batch()
    slices = co_permute(model, couples(model), both())
    attach(model, S2FT(slices, partial=partial))
    assert set(adapted(model)) == {"blocks.0.up", "blocks.0.down", "blocks.1.down"}
    move(model)
    x.requires_grad_(True)
    cross_entropy(model(x), y).backward()
    plain = detach(merge(copy.deepcopy(model))).requires_grad_(True)
    twin = x.detach().clone().requires_grad_(True)
    cross_entropy(plain(twin), y).backward()
    for path, layer in adapted(model).items():
        whole = plain.get_submodule(path).weight.grad
        dim, idx = slices[path]
        torch.testing.assert_close(layer.S.grad, whole.index_select(dim, idx), atol=1e-12, rtol=0)
    torch.testing.assert_close(x.grad, twin.grad, atol=1e-12, rtol=0)
    assert slices["blocks.0.up"][1].tolist() == [0, 1]  # 1 for rows only, then 6 for both
    assert slices["blocks.0.down"][1].tolist() == [1, 2]  # 6, then 3


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("partial", [False, True])
def test_training_equals_masked_full_fine_tuning_step_by_step(optimizer, partial):
    base, (x, y) = gated(), batch()
    pairs, options = couples(base), {"lr": 0.05}
    if optimizer is torch.optim.AdamW:
        options["weight_decay"] = 0.0
    masked = copy.deepcopy(base)  # the model as it is, its gradients masked entry by entry
    masks = {k: torch.zeros_like(p) for k, p in masked.named_parameters()}
    masks["blocks.0.up.weight"][[1, 6]] = 1
    masks["blocks.0.down.weight"][:, [3, 6]] = 1
    masks["blocks.1.down.weight"][:, [2]] = 1
    model = copy.deepcopy(base)
    attach(model, S2FT(co_permute(model, pairs, both()), partial=partial))
    opt = optimizer(trainable(model).values(), **options)
    whole = optimizer(masked.parameters(), **options)
    for _ in range(12):
        for net, o in ((model, opt), (masked, whole)):
            o.zero_grad()
            cross_entropy(net(x), y).backward()
        for k, p in masked.named_parameters():
            p.grad *= masks[k]
        opt.step()
        whole.step()
        torch.testing.assert_close(model(x), masked(x), atol=1e-6, rtol=0)
    order = permutation(10, [1, 6], [3, 6])[0]
    after = detach(merge(model))
    for k in ("up", "gate"):
        ours, theirs = (getattr(m.blocks[0], k).weight for m in (after, masked))
        torch.testing.assert_close(ours, theirs[order], atol=1e-9, rtol=0)
    ours, theirs = (m.blocks[0].down.weight for m in (after, masked))
    torch.testing.assert_close(ours, theirs[:, order], atol=1e-9, rtol=0)


def test_scattered_indices_train_the_same_function():
    base, (x, y) = gated(), batch()
    pairs, ends = couples(base), []
    for layout in (co_permute, lambda _, pairs, chosen: scattered(pairs, chosen)):
        model = copy.deepcopy(base)
        method = S2FT(layout(model, pairs, both()))
        stack = Stack([attach(model, method)])
        optimizer = stack.optimizer(torch.optim.AdamW, 0.05, weight_decay=0.0)
        finetune(stack, method, class_loss, [(x[None], y[None])] * 15, optimizer)
        ends.append(stack(x[None]))
    torch.testing.assert_close(ends[0], ends[1], atol=1e-9, rtol=0)
    assert not torch.allclose(ends[0][0], base(x), atol=1e-2)


def test_nothing_outside_the_slice_changes_a_bit():
    model, (x, y) = gated(), batch()
    slices = co_permute(model, couples(model), both())
    was = copy.deepcopy(model)
    stack = Stack([attach(model, S2FT(slices, room=5))])
    optimizer = stack.optimizer(torch.optim.AdamW, 0.05)
    finetune(stack, None, class_loss, [(x[None], y[None])] * 5, optimizer)
    after = detach(merge(stack.module(0)))
    for path, p in was.named_parameters():
        q, (layer, _, kind) = after.get_parameter(path), path.rpartition(".")
        dim, idx = slices.get(layer, (COLUMNS, torch.arange(0)))
        if kind == "weight" and len(idx):
            inside = torch.zeros_like(p, dtype=torch.bool).index_fill(dim, idx, True)
            assert torch.equal(q[~inside], p[~inside]) and (q[inside] != p[inside]).all()
            assert torch.linalg.matrix_rank(q - p) <= len(idx)
        else:
            assert torch.equal(q, p)


def test_room_holds_what_is_beyond_the_slice_at_zero():
    base, (x, y) = gated(), batch()
    pairs, ends = couples(base), []
    choices = [[([], [1, 2]), ([], [])], [([], [4]), ([], [3])]]
    models = [copy.deepcopy(base) for _ in choices]
    slices = [co_permute(m, pairs, c) for m, c in zip(models, choices)]
    alone = [Stack([attach(copy.deepcopy(m), S2FT(s))]) for m, s in zip(models, slices)]
    together = Stack([attach(m, S2FT(s, room=2)) for m, s in zip(models, slices)])
    assert set(adapted(together.base)) == {"blocks.0.down", "blocks.1.down"}
    assert set(adapted(alone[0].base)) == {"blocks.0.down"}  # the other layer has no columns
    for stack in (*alone, together):
        n = stack.n
        optimizer = stack.optimizer(torch.optim.AdamW, 0.05, weight_decay=0.0)
        data = [(x.expand(n, 7, 6), y.expand(n, 7))] * 10
        finetune(stack, None, class_loss, data, optimizer)
        ends.append(stack(x, shared=True))
    torch.testing.assert_close(torch.cat(ends[:2]), ends[2], atol=1e-9, rtol=0)


def test_a_share_of_all_units_is_drawn_over_all_layers_together():
    pairs = couples(gated())
    torch.manual_seed(0)
    counts, sizes = np.zeros((2, 10)), set()
    for _ in range(400):
        chosen = draw(pairs, columns=0.25)
        assert sum(len(c) for _, c in chosen) == 5 and all(not r for r, _ in chosen)
        sizes.add(len(chosen[0][1]))
        for i, (_, c) in enumerate(chosen):
            assert c == sorted(set(c))
            counts[i, c] += 1
    assert len(sizes) > 3  # layers have different numbers
    assert np.abs(counts - 100).max() < 4.5 * (400 * 0.25 * 0.75) ** 0.5
    both_kinds = draw(pairs, rows=0.5, columns=0.5)
    assert sum(len(r) for r, _ in both_kinds) == sum(len(c) for _, c in both_kinds) == 10
    first = draw(pairs, columns=0.4)
    second = draw(pairs, columns=0.6, others=first)
    for (_, a), (_, b), c in zip(first, second, pairs):
        assert not set(a) & set(b) and set(a) | set(b) == set(range(c.units))


def test_selection_by_scores():
    model, (x, y) = gated(), batch()
    pairs = couples(model)
    reader = model.blocks[1].down
    heard = {}
    hook = reader.register_forward_hook(lambda m, args, out: heard.update(x=args[0], y=out))
    value = cross_entropy(model(x), y)
    (g,) = torch.autograd.grad(value, heard["y"])
    hook.remove()
    a = heard["x"].detach()
    expected = {
        "weight": [float(reader.weight.detach()[:, u].norm()) for u in range(10)],
        "activation": [math.sqrt(sum(float(v[u]) ** 2 for v in a) / len(a)) for u in range(10)],
        "gradient": [float((g.T @ a)[:, u].norm()) for u in range(10)],
    }
    expected["product"] = [w * v for w, v in zip(expected["weight"], expected["activation"])]
    model.requires_grad_(False)
    for rule in RULES:
        scores = importance(model, pairs, lambda m: cross_entropy(m(x), y), rule)
        np.testing.assert_allclose(scores[1], expected[rule], rtol=1e-9)
        order = np.argsort(expected[rule])
        up = draw(pairs, columns=0.3, scores=scores)[1][1]
        down = draw(pairs, columns=0.3, scores=scores, largest=False)[1][1]
        assert up == sorted(order[-3:]) and down == sorted(order[:3])
        second = draw(pairs, columns=0.3, scores=scores, others=[([], []), ([], up)])
        assert second[1][1] == sorted(order[-6:-3])
    assert not any(p.requires_grad for p in model.parameters())  # as it was


def test_scores_of_heads_sum_over_their_channels():
    torch.manual_seed(0)
    model = GPT(vocab=11, dim=16, layers=1, heads=4, context=9).double()
    pairs = [c for c in couples(model) if c.reader.endswith("out")]
    ids = torch.randint(11, (2, 9))
    (found,) = importance(model, pairs, lambda m: m(ids).square().mean(), "weight")
    W = model.blocks[0].attention.out.weight.detach()
    np.testing.assert_allclose(found, [W[:, 4 * h : 4 * h + 4].norm() for h in range(4)])


def test_a_column_slice_keeps_its_own_inputs_only():
    torch.manual_seed(0)
    x = torch.randn(10, 16, requires_grad=True)
    for k in (1, 3, 8):
        kept = {}
        for dim in (COLUMNS, ROWS):
            layer = nn.Sequential(nn.Linear(16, 12))
            method = S2FT({"0": (dim, torch.arange(2, 2 + k))}, partial=True)
            model = attach(layer, method)
            with saved_bytes(model) as saved:
                model(x)
            kept[dim] = [shape for shape, _, _ in saved.tensors]
            if dim == COLUMNS:
                assert saved.total == 4 * 10 * k
        assert kept[COLUMNS] == [(10, k)] and (10, 16) in kept[ROWS]


def test_a_slice_view_keeps_the_whole_input():
    """What the released training form saves: a view of x, hence all of its storage."""
    x, S = torch.randn(10, 16), torch.zeros(12, 3, requires_grad=True)
    with saved_bytes(nn.Linear(16, 12)) as saved:
        F.linear(x[:, 2:5], S)
    assert saved.total == 4 * 10 * 16


def adapters(seed, kind=COLUMNS):
    """A weight and adapters: two on disjoint slices, a third that overlaps the first."""
    torch.manual_seed(seed)
    W = torch.randn(8, 9, dtype=F64)
    parts = []
    for idx in ([0, 1, 2], [5, 6], [2, 3]):
        shape = (8, len(idx)) if kind == COLUMNS else (len(idx), 9)
        parts.append((kind, torch.tensor(idx), torch.randn(shape, dtype=F64)))
    return W, *parts


@pytest.mark.parametrize("kind", [COLUMNS, ROWS])
def test_adapters_on_disjoint_slices_add_and_commute(kind):
    W, a, b, c = adapters(0, kind)
    fused = fuse(W, a, b)
    assert torch.equal(fused, fuse(W, b, a)) and torch.equal(fused, fuse(fuse(W, a), b))
    expected = W.clone()
    for _, idx, S in (a, b):
        for j, k in enumerate(idx.tolist()):
            if kind == COLUMNS:
                expected[:, k] += S[:, j]
            else:
                expected[k] += S[j]
    assert torch.equal(fused, expected)
    assert torch.linalg.matrix_rank(fused - W) <= 5
    live = switch(fuse(W, a), W, a, b)
    assert torch.equal(live, fuse(W, b))
    assert torch.equal(switch(live, W, b, c), fuse(W, c))
    torch.testing.assert_close(fuse(W, a, c), fuse(W, c, a))  # sums, also where they overlap


def test_an_update_is_split_off_and_fused_again():
    model, (x, y) = gated(), batch()
    slices = co_permute(model, couples(model), both())
    was = copy.deepcopy(model)
    stack = Stack([attach(model, S2FT(slices, room=4))])
    finetune(
        stack, None, class_loss, [(x[None], y[None])] * 5, stack.optimizer(torch.optim.SGD, 0.3)
    )
    trained = stack.module(0)
    for path, layer in adapted(trained).items():
        dim, idx, S = split(layer)
        assert dim == slices[path][0] and torch.equal(idx, slices[path][1])
        assert S.shape[dim] == len(idx)
        again = fuse(was.get_submodule(path).weight, (dim, idx, S))
        assert torch.equal(again, layer.merged_weight()[0])
    torch.testing.assert_close(merge(trained)(x), stack(x[None])[0])


def test_batched_serving_is_a_gather():
    """Each sample with an adapter of its own: one shared product and a gathered small one."""
    W, a, b, _ = adapters(1)
    b = (COLUMNS, torch.tensor([4, 5, 6]), torch.randn(8, 3, dtype=F64))
    x, which = torch.randn(6, 9, dtype=F64), torch.tensor([0, 1, 1, 0, 1, 0])
    idx, S = torch.stack([a[1], b[1]]), torch.stack([a[2], b[2]])
    y = x @ W.T + torch.einsum("bmk,bk->bm", S[which], x.gather(1, idx[which]))
    for i, w in enumerate(which.tolist()):
        torch.testing.assert_close(y[i], fuse(W, (a, b)[w]) @ x[i])


def test_the_optimum_of_two_linear_layers_is_known():
    """Rows S of the first layer: what stays of a shift is its part outside the span of W2[:, S]."""
    torch.manual_seed(0)
    net = MLP([6, 7, 5], activation=nn.Identity).double()
    pairs, S = couples(net), [1, 4]
    W1, W2 = net[0].weight.detach().clone(), net[2].weight.detach().clone()
    shift = torch.randn(5, 6, dtype=F64)
    x = 6**0.5 * torch.eye(6, dtype=F64)  # inputs of covariance one
    target = x @ (W2 @ W1 + shift).T + net[0].bias @ W2.T + net[2].bias
    slices = co_permute(net, pairs, [(S, [])])
    stack = Stack([attach(net, S2FT(slices))])
    finetune(
        stack,
        None,
        lambda m, x, y: (m(x) - y).square().sum(-1).mean(),
        [(x[None], target.detach()[None])] * 4000,
        stack.optimizer(torch.optim.SGD, 0.2),
    )
    left = (stack(x[None])[0] - target).square().sum(-1).mean()
    Q = torch.linalg.qr(W2[:, S]).Q
    floor = (shift - Q @ Q.T @ shift).square().sum()
    torch.testing.assert_close(left, floor, atol=1e-8, rtol=1e-8)
    moved = (stack(x[None])[0] - x @ (W2 @ W1).T - (target - x @ (W2 @ W1 + shift).T)).square()
    assert abs(moved.sum(-1).mean() + left - shift.square().sum()) < 1e-6  # learned = forgotten


def test_unstructured_trains_the_entries_that_were_drawn():
    torch.manual_seed(0)
    model = move(attach(MLP([6, 12, 5]).double(), Unstructured(9)))
    x, y = batch()
    cross_entropy(model(x), y).backward()
    plain = detach(merge(copy.deepcopy(model))).requires_grad_(True)
    cross_entropy(plain(x), y).backward()
    for path, layer in adapted(model).items():
        whole = plain.get_submodule(path).weight.grad.flatten()
        torch.testing.assert_close(layer.s.grad, whole[layer.idx], atol=1e-12, rtol=0)
        change = (plain.get_submodule(path).weight - layer.base.weight).flatten()
        assert torch.equal(change.nonzero()[:, 0], layer.idx.sort().values)
        assert len(layer.idx.unique()) == 9


@pytest.mark.parametrize("method, size", [(S2FT(ratio=0.25), 12), (Unstructured(15), 60)])
def test_columns_and_entries_are_drawn_evenly(method, size):
    counts = torch.zeros(size)
    for seed in range(200):
        torch.manual_seed(seed)
        model = attach(nn.Sequential(nn.Linear(12, 5)), method)
        counts[adapted(model)["0"].idx] += 1
    assert (counts - 50).abs().max() < 4.5 * (200 * 0.25 * 0.75) ** 0.5


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match=r"ratio must lie in \(0, 1\], not 0"):
        S2FT(ratio=0)
    with pytest.raises(ValueError, match=r"columns=1\.5 are shares"):
        draw(couples(gated()), columns=1.5)
    with pytest.raises(ValueError, match="12 units are wanted, but 8 are left"):
        first = draw(couples(gated()), columns=0.6)
        draw(couples(gated()), columns=0.6, others=first)
    with pytest.raises(ValueError, match="Linear has no structure"):
        couples(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="not 'best'"):
        importance(gated(), couples(gated()), lambda m: None, "best")
    with pytest.raises(ValueError, match="'0' has 6 indices, not \\[5, 6\\]"):
        attach(nn.Sequential(nn.Linear(6, 5)), S2FT({"0": (COLUMNS, torch.tensor([5, 6]))}))
    with pytest.raises(ValueError, match="distinct indices and room"):
        attach(nn.Sequential(nn.Linear(6, 5)), S2FT({"0": (COLUMNS, torch.tensor([2, 2]))}))
    with pytest.raises(ValueError, match=r"distinct indices and room.*in 1"):
        attach(nn.Sequential(nn.Linear(6, 5)), S2FT({"0": (COLUMNS, torch.arange(2))}, room=1))
    with pytest.raises(ValueError, match="'2' would train rows and columns"):
        net = MLP([6, 8, 7, 5])
        scattered(couples(net), [([], [1]), ([2], [])])
    with pytest.raises(ValueError, match="rank must be positive, not 0"):
        Unstructured(0)


@pytest.mark.gpu
def test_partial_back_propagation_on_the_gpu():
    model, (x, y) = gated(), batch()
    attach(model, S2FT(co_permute(model, couples(model), both()), partial=True))
    there = copy.deepcopy(move(model)).cuda()
    cross_entropy(model(x), y).backward()
    cross_entropy(there(x.cuda()), y.cuda()).backward()
    for a, b in zip(adapted(model).values(), adapted(there).values()):
        torch.testing.assert_close(b.S.grad.cpu(), a.S.grad, atol=1e-9, rtol=1e-9)
    plain = gated().cuda()
    slices = co_permute(plain, couples(plain), both())
    torch.testing.assert_close(plain(x.cuda()).cpu(), gated()(x), atol=1e-9, rtol=1e-9)
    assert attach(plain, S2FT(slices)).blocks[0].down.S.is_cuda
