"""Baselines against Hugging Face PEFT (same weights in, same outputs and gradients out) and
against their definitions."""

import copy
import math

import pytest
import torch
from torch import nn

from miniature.models import GPT
from miniature.peft import (
    BitFit,
    DoRA,
    Full,
    Houlsby,
    LoRA,
    LoRAXS,
    PiSSA,
    Prefix,
    Prompt,
    VeRA,
    adapted,
    attach,
    trainable,
)

F64 = torch.float64


class Net(nn.Module):
    """A bit of everything."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 12)
        self.conv = nn.Conv2d(1, 4, 3, padding=1, stride=2)
        self.one, self.two = nn.Linear(24, 10), nn.Linear(10, 7)

    def forward(self, ids):
        h = self.embed(ids)[:, None]  # [B, 1, 6, 12]
        h = torch.tanh(self.conv(h)).mean((2,)).flatten(1)  # [B, 24]
        return self.two(torch.tanh(self.one(h)))


def net():
    torch.manual_seed(0)
    return Net().double()


def inputs():
    return torch.randint(9, (5, 6), generator=torch.Generator().manual_seed(1))


def agree(ours, theirs, pairs, atol=1e-12):
    """Copy our parameters into theirs, then compare outputs and gradients.

    `pairs` maps our path to theirs, and may say how to turn one tensor into the other.
    """
    own, other = dict(ours.named_parameters()), dict(theirs.named_parameters())
    assert {k for k, p in other.items() if p.requires_grad} == {v[0] for v in pairs.values()}
    assert set(trainable(ours)) == set(pairs)
    with torch.no_grad():
        for mine, (path, turn) in pairs.items():
            assert turn(own[mine]).shape == other[path].shape, path
            own[mine].normal_(generator=torch.Generator().manual_seed(len(mine)))
            other[path].copy_(turn(own[mine]))
    a, b = ours(inputs()), theirs(inputs())
    torch.testing.assert_close(a, b, atol=atol, rtol=atol)
    a.square().sum().backward()
    b.square().sum().backward()
    for mine, (path, turn) in pairs.items():
        torch.testing.assert_close(turn(own[mine].grad), other[path].grad, atol=1e-10, rtol=1e-10)


def same(p):
    return p


LORA = {"one": "linear", "two": "linear", "conv": "conv", "embed": "embedding"}


@pytest.mark.parametrize(
    "ours, options",
    [
        (LoRA(3, alpha=5.0), {}),
        (LoRA(3, alpha=5.0, stable=True), {"use_rslora": True}),
        (DoRA(3, alpha=5.0), {"use_dora": True}),
    ],
    ids=["LoRA", "rsLoRA", "DoRA"],
)
@pytest.mark.parametrize("layers", [["one", "two"], ["conv"], ["embed"]])
def test_lora_and_its_kin_against_peft(ours, options, layers):
    peft = pytest.importorskip("peft", reason="the oracle peft is not installed")
    config = peft.LoraConfig(r=3, lora_alpha=5.0, target_modules=layers, **options)
    theirs = peft.get_peft_model(net(), config).double()
    ours = copy.copy(ours)
    ours.targets = layers
    model = attach(net(), ours)
    pairs = {}
    for name in layers:
        path = f"base_model.model.{name}"
        if name == "embed":  # theirs are transposed: A [r, vocabulary], B [dim, r]
            pairs[f"{name}.B"] = (f"{path}.lora_embedding_A.default", torch.t)
            pairs[f"{name}.A"] = (f"{path}.lora_embedding_B.default", torch.t)
        elif name == "conv":
            pairs[f"{name}.A"] = (f"{path}.lora_A.default.weight", lambda p: p.view(3, 1, 3, 3))
            pairs[f"{name}.B"] = (f"{path}.lora_B.default.weight", lambda p: p[..., None, None])
        else:
            pairs[f"{name}.A"] = (f"{path}.lora_A.default.weight", same)
            pairs[f"{name}.B"] = (f"{path}.lora_B.default.weight", same)
        if "use_dora" in options:
            turn = {"conv": lambda p: p.view(1, -1, 1, 1)}.get(name, same)
            pairs[f"{name}.g"] = (f"{path}.lora_magnitude_vector.default.weight", turn)
    if options.get("use_dora") and layers == ["embed"]:
        pytest.skip("peft normalizes the columns of an embedding, this module its rows")
    agree(model, theirs, pairs)


def test_pissa_against_peft():
    peft = pytest.importorskip("peft", reason="the oracle peft is not installed")
    config = peft.LoraConfig(
        r=3, lora_alpha=5.0, target_modules=["one", "two"], init_lora_weights="pissa"
    )
    theirs = peft.get_peft_model(net().float(), config)  # it decomposes in float32 only
    model = attach(net(), PiSSA(3, alpha=5.0, targets=["one", "two"]))
    for name, layer in adapted(model).items():
        other = theirs.base_model.model.get_submodule(name)
        A, B = other.lora_A.default.weight.double(), other.lora_B.default.weight.double()
        torch.testing.assert_close(layer.B @ layer.A, B @ A, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(layer.A.norm(dim=1), A.norm(dim=1), atol=1e-5, rtol=1e-4)
        residual = other.get_base_layer().weight.double()
        torch.testing.assert_close(layer.W, residual, atol=1e-5, rtol=1e-4)


def test_vera_against_peft():
    peft = pytest.importorskip("peft", reason="the oracle peft is not installed")
    config = peft.VeraConfig(r=5, target_modules=["one", "two"], d_initial=0.1)
    theirs = peft.get_peft_model(net(), config).double()
    model = attach(net(), VeRA(5, targets=["one", "two"]))
    layers = adapted(model)
    root = theirs.base_model
    with torch.no_grad():
        for name, layer in layers.items():
            assert (layer.d == 0.1).all() and (layer.b == 0).all()
            other = root.model.get_submodule(name)
            other.vera_A["default"][:, : layer.n] = layer.shared_A[:, : layer.n]
            other.vera_B["default"][: layer.m] = layer.shared_B[: layer.m]
    pairs = {
        f"{name}.{ours}": (f"base_model.model.{name}.vera_lambda_{ours}.default", same)
        for name in layers
        for ours in "bd"
    }
    agree(model, theirs, pairs)
    one, two = layers.values()
    assert one.shared_A.data_ptr() == two.shared_A.data_ptr()  # drawn once, kept once


def test_lora_by_its_definition():
    torch.manual_seed(0)
    layer = nn.Linear(6, 4).double()
    model = attach(nn.Sequential(copy.deepcopy(layer)), LoRA(2, alpha=3.0))
    a = adapted(model)["0"]
    assert (a.B == 0).all() and a.A.shape == (2, 6)
    assert float(a.A.detach().abs().max()) <= 1 / math.sqrt(6)
    nn.init.normal_(a.B)
    x = torch.randn(5, 6, dtype=F64)
    W = layer.weight + 1.5 * a.B @ a.A
    torch.testing.assert_close(model(x), x @ W.T + layer.bias)
    assert LoRA(4, alpha=8.0, stable=True).s == 4.0 and LoRA(4, alpha=8.0).s == 2.0
    assert LoRA(4).s == 1.0


def test_full_takes_the_steps_of_training_the_weights():
    torch.manual_seed(0)
    base = net()
    model = attach(copy.deepcopy(base), Full(targets=["one", "two", "conv", "embed"]))
    optimizers = [
        torch.optim.Adam(m, lr=0.01) for m in (base.parameters(), trainable(model).values())
    ]
    for _ in range(3):
        for m, opt in zip((base, model), optimizers):
            opt.zero_grad()
            m(inputs()).square().sum().backward()
            opt.step()
    torch.testing.assert_close(model(inputs()), base(inputs()), atol=1e-12, rtol=1e-12)


def test_bitfit_trains_the_biases_and_nothing_else():
    model = attach(net(), BitFit())
    assert set(trainable(model)) == {"conv.d", "one.d", "two.d"}
    torch.testing.assert_close(model(inputs()), net()(inputs()))
    with torch.no_grad():
        adapted(model)["conv"].d += 0.5
    other = net()
    with torch.no_grad():
        other.conv.bias += 0.5
    torch.testing.assert_close(model(inputs()), other(inputs()))


def test_pissa_starts_from_the_largest_directions():
    model = attach(net(), PiSSA(3, alpha=6.0, targets=["one"]))
    layer = adapted(model)["one"]
    S = torch.linalg.svdvals(layer.base.weight)
    torch.testing.assert_close(torch.linalg.svdvals(layer.W)[:7], S[3:])
    torch.testing.assert_close(2.0 * layer.B @ layer.A + layer.W, layer.base.weight)


def test_dora_keeps_the_norms_it_is_given():
    model = attach(net(), DoRA(3, targets=["one"]))
    layer = adapted(model)["one"]
    nn.init.normal_(layer.B)
    W = layer.W + layer.method.delta(layer)
    torch.testing.assert_close(W.norm(dim=1), layer.g)
    V = layer.W + layer.B @ layer.A
    torch.testing.assert_close(nn.functional.cosine_similarity(W, V), torch.ones(10, dtype=F64))


def test_lora_xs_trains_r_times_r():
    model = attach(net(), LoRAXS(3, targets=["one"]))
    layer = adapted(model)["one"]
    assert {k: p.shape for k, p in trainable(model).items()} == {"one.R": (3, 3)}
    S = torch.linalg.svdvals(layer.W)
    torch.testing.assert_close(layer.B.norm(dim=0), S[:3])
    torch.testing.assert_close(layer.A @ layer.A.T, torch.eye(3, dtype=F64))
    assert 0 < float(layer.R.detach().abs().max()) < 1e-4


def gpt():
    torch.manual_seed(0)
    return GPT(vocab=11, dim=8, layers=2, heads=2, context=16).double()


def test_a_prompt_is_text_that_was_not_typed():
    model, base = attach(gpt(), Prompt(3)), gpt()
    rows = adapted(model)["embed"].P
    tokens = [int((base.embed.weight == row).all(1).nonzero()[0]) for row in rows]
    ids = torch.randint(11, (2, 6))
    typed = torch.cat([torch.tensor(tokens).expand(2, 3), ids], 1)
    torch.testing.assert_close(model(ids), base(typed)[:, 3:])


def test_a_prefix_adds_keys_and_values():
    """Attention over prefix and text is their mixture, weighted by the masses of the softmax."""
    model, base = attach(gpt(), Prefix(3, std=1.0)), gpt()
    seen = {}
    layer, plain = model.blocks[0].attention, base.blocks[0].attention
    x = torch.randn(2, 5, 8, dtype=F64)
    out = layer(x)
    heads = {k: getattr(plain, k)(x).unflatten(-1, (2, 4)).transpose(1, 2) for k in "qkv"}
    from miniature.models import rope

    q, k = (rope(heads[n], torch.arange(5)) for n in "qk")
    seen = torch.zeros(2, 2, 5, 4, dtype=F64)
    for b in range(2):
        for h in range(2):
            for t in range(5):
                keys = torch.cat([layer.K[h], k[b, h, : t + 1]])
                values = torch.cat([layer.V[h], heads["v"][b, h, : t + 1]])
                weights = torch.softmax(keys @ q[b, h, t] / 2.0, 0)
                seen[b, h, t] = weights @ values
    torch.testing.assert_close(out, plain.out(seen.transpose(1, 2).flatten(2)))


def test_an_adapter_is_a_bottleneck_after_the_layer():
    model, base = attach(gpt(), Houlsby(3, targets=["mlp.2"])), gpt()
    a = adapted(model)["blocks.0.mlp.2"]
    for p in (a.U, a.D, a.d):
        nn.init.normal_(p)
    x = torch.randn(4, 32, dtype=F64)
    h = base.blocks[0].mlp[2](x)
    expected = h + nn.functional.gelu(h @ a.D.T + a.d) @ a.U.T
    torch.testing.assert_close(a(x), expected)
