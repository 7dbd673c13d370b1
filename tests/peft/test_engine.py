"""Attaching, counting, saving: what the engine promises and what it refuses."""

import copy

import pytest
import torch
from torch import nn

from miniature.models import CNN, GPT, MLP
from miniature.peft import (
    BitFit,
    Full,
    Houlsby,
    LoRA,
    LowRank,
    Method,
    PiSSA,
    Prompt,
    adapted,
    adapter_state,
    attach,
    count,
    detach,
    finetune,
    load,
    merge,
    save,
    saved_bytes,
    trainable,
    unmerge,
)
from miniature.stack import Stack, class_loss

F64 = torch.float64


def gpt(**options):
    torch.manual_seed(0)
    return GPT(vocab=11, dim=8, layers=2, heads=2, context=16, **options)


def test_targets_are_the_last_parts_of_a_path():
    model = attach(gpt(), LoRA(2, targets=["attention.q", "mlp.0"]))
    expected = {f"blocks.{i}.{part}" for i in (0, 1) for part in ("attention.q", "mlp.0")}
    assert set(adapted(model)) == expected
    assert set(adapted(attach(gpt(), LoRA(2, targets=["q"])))) == {
        "blocks.0.attention.q",
        "blocks.1.attention.q",
    }
    with pytest.raises(ValueError, match=r"no layer 'attention.w'; it can adapt: embed, blocks"):
        attach(gpt(), LoRA(2, targets=["q", "attention.w"]))
    with pytest.raises(ValueError, match=r"a list of names, such as \['q'\]"):
        LoRA(2, targets="q")


class Chain(LowRank):
    """s diag(b) diag(c) B diag(d) S A: every kind of factor."""

    def init(self, layer):
        shapes = {"b": (layer.m,), "c": (layer.m,), "B": (layer.m, 3), "d": (3,)}
        for name, shape in (shapes | {"S": (3, 2), "A": (2, layer.n)}).items():
            layer.parameter(name, torch.randn(shape))
        layer.buffer("s", 0.5)

    def factors(self, layer):
        return layer.b, layer.c, layer.B, layer.d, layer.S, layer.A


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Linear(5, 4), torch.randn(7, 3, 5, dtype=F64)),
        (nn.Conv2d(2, 4, 3, stride=2, padding=1), torch.randn(7, 2, 6, 6, dtype=F64)),
        (nn.Conv2d(4, 4, 3, groups=2), torch.randn(7, 4, 6, 6, dtype=F64)),
        (nn.Embedding(6, 4), torch.randint(6, (7, 3))),
    ],
)
def test_factors_are_a_product_of_matrices_and_diagonals(layer, x):
    """Against the dense product: attached and merged."""
    net = attach(nn.Sequential(layer.to(F64)), Chain(targets=["0"]))
    a, base = net[0], layer.weight.clone()
    delta = 0.5 * a.b.diag() @ a.c.diag() @ a.B @ a.d.diag() @ a.S @ a.A
    torch.testing.assert_close(a.method.delta(a), delta, atol=1e-12, rtol=1e-12)
    out = net(x)
    torch.testing.assert_close(merge(net)(x), out, atol=1e-10, rtol=0)
    torch.testing.assert_close(layer.weight, base + delta.view_as(base), atol=1e-12, rtol=0)


def test_bad_use_is_refused():
    model = attach(MLP([4, 4]), LoRA(2))
    with pytest.raises(ValueError, match="adapted already"):
        attach(model, LoRA(2))
    with pytest.raises(ValueError, match="wrap the Linear"):
        attach(nn.Linear(3, 3), LoRA(2))
    with pytest.raises(ValueError, match="finds no layer"):
        attach(nn.Sequential(nn.ReLU()), LoRA(2))
    with pytest.raises(ValueError, match="'heads' names no parameter"):
        attach(gpt(), LoRA(2), train=["heads"])
    with pytest.raises(ValueError, match="rank 0"):
        LoRA(0)
    with pytest.raises(ValueError, match="room 2"):
        LoRA(4, room=2)
    with pytest.raises(ValueError, match="width must be positive, not 0"):
        Houlsby(0)
    with pytest.raises(ValueError, match="positions='rope'"):
        attach(gpt(positions="learned"), Prompt())
    with pytest.raises(ValueError, match="no layer with a bias"):
        attach(nn.Sequential(nn.Linear(3, 3, bias=False)), BitFit())


def test_the_base_is_frozen_but_for_what_train_names():
    model = attach(MLP([4, 6, 3]), LoRA(2), train=["2"])
    assert set(adapted(model)) == {"0"}
    assert set(trainable(model)) == {"0.A", "0.B", "2.weight", "2.bias"}
    assert set(adapter_state(model)) == {"0.A", "0.B", "0.s", "2.weight", "2.bias"}
    only = attach(MLP([4, 6, 3]), LoRA(2, targets=["0"]), train=["2.bias"])
    assert set(trainable(only)) == {"0.A", "0.B", "2.bias"}


def test_counts():
    model = attach(MLP([4, 6, 3]).double(), LoRA(2))
    assert count(model) == {
        "trained": 2 * (4 + 6) + 2 * (6 + 3),
        "trained bytes": 8 * 38,
        "base": 24 + 6 + 18 + 3,
        "base bytes": 8 * 51,
    }


def test_a_shared_weight_is_adapted_where_it_was_named():
    """`embed` and `head` are one tensor: merging one must not change the other."""
    model = attach(gpt().double(), Full(targets=["head"]))
    x = torch.randint(11, (2, 5))
    with torch.no_grad():
        adapted(model)["head"].D += 0.1
    before, embedded = model(x), model.embed.weight.clone()
    merge(model)
    torch.testing.assert_close(model(x), before)
    assert torch.equal(model.embed.weight, embedded)
    assert detach(unmerge(model)).head.weight is model.embed.weight


def test_a_merged_model_can_be_used_without_the_adapters():
    model = attach(MLP([4, 6, 3]).double(), LoRA(2))
    for layer in adapted(model).values():
        nn.init.normal_(layer.B)
    x = torch.randn(5, 4, dtype=F64)
    out = model(x)
    plain = detach(merge(model))
    assert all(type(m) in (MLP, nn.Linear, nn.ReLU) for m in plain.modules())
    torch.testing.assert_close(plain(x), out)


def test_the_state_file_is_whole_or_not_there(tmp_path, monkeypatch):
    model = attach(MLP([4, 6, 3]), LoRA(2))
    path = tmp_path / "a.safetensors"
    save(model, path)
    good = path.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("miniature.peft.engine.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save(model, path)
    assert path.read_bytes() == good and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(ValueError, match="another method, rank or model"):
        load(attach(MLP([4, 6, 3]), LoRA(3)), path)


def test_ranks_together():
    """Copies of different rank and scale in one stack train as they would alone."""
    torch.manual_seed(0)
    base = MLP([6, 8, 4]).double()
    x, y = torch.randn(3, 9, 6, dtype=F64), torch.randint(4, (3, 9))
    batches = [(x, y)] * 4
    ranks = [1, 2, 4]

    def one(rank, room):
        torch.manual_seed(rank)
        return attach(copy.deepcopy(base), LoRA(rank, alpha=3.0, room=room))

    for kind in (torch.optim.SGD, torch.optim.AdamW):
        stack = Stack([one(r, 4) for r in ranks])
        finetune(stack, LoRA(4), class_loss, batches, stack.optimizer(kind, 0.1))
        for i, r in enumerate(ranks):
            alone = Stack([one(r, r)])
            row = [(a[i : i + 1], b[i : i + 1]) for a, b in batches]
            finetune(alone, LoRA(r), class_loss, row, alone.optimizer(kind, 0.1))
            torch.testing.assert_close(stack.module(i)(x[i]), alone.module(0)(x[i]))
            A = adapted(stack.module(i))["0"].A
            assert (A[r:] == 0).all() and (A[:r] != 0).all()


def test_penalty_and_update_are_called_with_each_copy_s_own_tensors():
    seen = []

    class Shrunk(LoRA):
        def penalty(self, params):
            return sum((p["A"] ** 2).sum() for p in params.values())

        def update(self, params, grads, t):
            seen.append((t, params["0"]["A"].shape, grads["0"]["A"].clone()))
            params["0"]["B"][:] = 7.0

    torch.manual_seed(0)
    base, method = MLP([4, 3]).double(), Shrunk(2)
    stack = Stack.init(lambda: attach(copy.deepcopy(base), method), [0, 1])
    A = stack.params()["0.A"].clone()
    x, y = torch.zeros(2, 5, 4, dtype=F64), torch.zeros(2, 5, dtype=torch.long)
    losses = finetune(stack, method, class_loss, [(x, y)], stack.optimizer(torch.optim.SGD, 0.0))
    torch.testing.assert_close(seen[0][2], 2 * A)  # zero inputs: only the penalty has a gradient
    assert seen[0][:2] == (1, (2, 2, 4)) and (stack.params()["0.B"] == 7).all()
    plain = class_loss(base, x[0], y[0]).detach()
    torch.testing.assert_close(losses[0], plain + (A**2).sum((1, 2)))


def test_saved_bytes_are_exact():
    """LoRA on a linear layer keeps its input x [B, n], for A, and A x [B, r], for B; no weight."""
    B, n, m, r = 16, 32, 24, 4
    x = torch.randn(B, n)
    model = attach(nn.Sequential(nn.Linear(n, m)), LoRA(r))
    with saved_bytes(model) as saved:
        model(x).sum()
    assert sorted(shape for shape, _, _ in saved.tensors) == [(B, r), (B, n)]
    assert saved.total == 4 * B * (n + r)
    with saved_bytes(model, but=[x]) as without:
        model(x).sum()
    assert saved.total - without.total == 4 * B * n
    frozen = nn.Sequential(nn.Linear(n, m)).requires_grad_(False)
    with saved_bytes(frozen) as nothing:
        frozen(x).sum()
    assert nothing.total == 0
    full = attach(nn.Sequential(nn.Linear(n, m, bias=False)), Full())
    with saved_bytes(full, but=[x]) as saved:
        full(x).sum()
    assert saved.total <= 4 * n * m  # W + D at most


def test_a_tensor_kept_twice_counts_once():
    model = nn.Sequential(nn.Linear(3, 3))
    x = torch.randn(5, 3, requires_grad=True)
    with saved_bytes(model) as saved:
        y = x.exp()
        (y * y + y.t()[0, 0] * y).sum()
    assert saved.total == 4 * 15


def test_a_method_is_its_difference():
    """The guide's smallest method: a trained scale of every output row."""

    class Scale(Method):
        def init(self, layer):
            layer.parameter("g", torch.zeros(layer.m))

        def delta(self, layer):
            return layer.g[:, None] * layer.W

    torch.manual_seed(0)
    base = CNN((1, 8, 8), 3, channels=(2, 3)).double()
    model, x = attach(copy.deepcopy(base), Scale()), torch.randn(2, 1, 8, 8, dtype=F64)
    torch.testing.assert_close(model(x), base(x))
    with torch.no_grad():
        adapted(model)["0"].g += 1.0
        base[0].weight *= 2
    torch.testing.assert_close(model(x), base(x))
    torch.testing.assert_close(merge(model)(x), base(x))


def test_a_frozen_stand_in_leaves_the_base_alone():
    base = MLP([6, 4]).double()
    model = attach(copy.deepcopy(base), PiSSA(2))
    layer = adapted(model)["0"]
    assert not torch.allclose(layer.W, layer.base.weight) and "0.frozen" in adapter_state(model)
    assert torch.equal(detach(model)[0].weight, base[0].weight)
