"""Ladder side-tuning: the side network by a plain loop, memory in closed form, pruning, stacks."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from miniature.models import GPT, ViT
from miniature.models.gpt import Block
from miniature.peft import (
    LoRA,
    adapter_state,
    attach,
    count,
    finetune,
    load,
    load_adapter_state,
    save,
    saved_bytes,
    trainable,
)
from miniature.peft.ladder_side_tuning import (
    INITS,
    RESIDUAL,
    TRANSFORMER,
    Ladder,
    MeanHead,
    Perceptron,
    Residual,
    Side,
    fisher,
    ladder,
    prune,
    states,
)
from miniature.stack import Stack, class_loss, cross_entropy

F64 = torch.float64
D, L, B = 16, 3, 5


def thin_block(width):
    return Block(width, 2, rotate=False, causal=False)


def thin_decoder(width):
    return Block(width, 2, rotate=True)


def residual(dtype=F64, seed=0):
    torch.manual_seed(seed)
    return Residual(6, 4, D, L).to(dtype), torch.randn(B, 6, dtype=dtype)


def vit(dtype=F64, seed=0):
    torch.manual_seed(seed)
    return ViT((1, 4, 4), 4, patch=2, dim=D, layers=L).to(dtype), torch.rand(
        B, 1, 4, 4, dtype=dtype
    )


def gpt(dtype=F64, seed=0):
    torch.manual_seed(seed)
    return GPT(11, D, L, 4, 8).to(dtype), torch.randint(11, (B, 6))


KINDS = {  # backbone and input, thin blocks, chain, head
    residual: (Perceptron, RESIDUAL, lambda: nn.Linear(D, 4).to(F64)),
    vit: (thin_block, TRANSFORMER, lambda: MeanHead(D, 4).to(F64)),
    gpt: (thin_decoder, TRANSFORMER, lambda: None),  # the frozen head
}
EVERY = pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.__name__)


def build(kind, r=4, dtype=F64, seed=0, init="magnitude", **options):
    """A backbone, a ladder beside a copy of it, and an input."""
    backbone, x = kind(dtype)
    thin, chain, head = KINDS[kind]
    own = copy.deepcopy(backbone)
    torch.manual_seed(seed)
    return backbone, ladder(own, r, thin, head(), chain, init=init, **options), x


def loss(model, x, y):
    return cross_entropy(model(x).flatten(0, -2), y.flatten())


def labels(model, x):
    with torch.no_grad():
        return torch.randint(4, model(x).shape[:-1])


def plain(backbone, side, x, T=0.1):
    """The equations for a `Residual`, without modules or hooks."""
    p, h = dict(side.named_parameters()), F.linear(x, backbone.embed.weight, backbone.embed.bias)

    def block(q, prefix, h):
        z = F.layer_norm(h, h.shape[-1:], q[f"{prefix}norm.weight"], q[f"{prefix}norm.bias"])
        z = F.gelu(z @ q[f"{prefix}mlp.0.weight"].T + q[f"{prefix}mlp.0.bias"])
        return h + z @ q[f"{prefix}mlp.2.weight"].T + q[f"{prefix}mlp.2.bias"]

    g, own = h @ p["first.weight"].T + p["first.bias"], dict(backbone.named_parameters())
    for l in range(1, L + 1):
        h = block(own, f"blocks.{l - 1}.", h)
        if l in side.keep:
            i = side.keep.index(l)
            u = h @ p[f"down.{i}.weight"].T + p[f"down.{i}.bias"]
            mu = 1 / (1 + torch.exp(-p["alpha"][i] / T))
            g = block(p, f"blocks.{i}.", mu * u + (1 - mu) * g)
    g = F.layer_norm(g, g.shape[-1:], p["norm.weight"], p["norm.bias"])
    g = g @ p["up.weight"].T + p["up.bias"]
    return g @ p["head.weight"].T + p["head.bias"]


@pytest.mark.parametrize("keep", [None, [2], [1, 3]])
@pytest.mark.parametrize("T", [0.1, 0.7])
def test_the_side_network_computes_its_equations(keep, T):
    _, model, x = build(residual, keep=keep, T=T)
    model.backbone.requires_grad_(False)
    with torch.no_grad():
        model.side.alpha += torch.linspace(-0.2, 0.3, len(model.side.alpha))
    torch.testing.assert_close(
        model(x), plain(model.backbone, model.side, x, T), atol=1e-12, rtol=0
    )
    y = torch.randint(4, (B,))
    ours = torch.autograd.grad(loss(model, x, y), model.side.parameters())
    theirs = torch.autograd.grad(
        cross_entropy(plain(model.backbone, model.side, x, T), y), model.side.parameters()
    )
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


@EVERY
def test_states_are_what_the_blocks_read_and_write(kind):
    backbone, model, x = build(kind)
    hs = states(model.backbone, x)
    assert len(hs) == L + 1
    h = hs[0]
    for block, after in zip(backbone.blocks, hs[1:]):
        h = block(h)
        assert torch.equal(h, after)
    h = backbone.norm(h)
    torch.testing.assert_close(backbone.head(h.mean(-2) if kind is vit else h), backbone(x))
    assert all(not s.requires_grad for s in hs)
    assert not any(b._forward_hooks or b._forward_pre_hooks for b in model.backbone.blocks)


@EVERY
def test_no_gradient_reaches_the_backbone_and_training_leaves_its_bits(kind):
    backbone, model, x = build(kind)
    y = labels(model, x)
    frozen = {id(p) for p in model.backbone.parameters()}
    loss(model, x, y).backward()
    for path, p in model.named_parameters():
        assert (p.grad is None) == (id(p) in frozen), path
        assert p.requires_grad == (id(p) not in frozen), path
        if p.requires_grad and not path.endswith("k.bias"):  # softmax does not see a shift of keys
            assert (p.grad != 0).any(), path
    stack = Stack([model])
    before = model(x)
    optimizer = stack.optimizer(torch.optim.AdamW, 0.03)
    finetune(stack, None, loss, [(x[None], y[None])] * 5, optimizer)
    after = stack.module(0)
    for path, p in backbone.named_parameters():
        assert torch.equal(after.backbone.get_parameter(path), p), path
    assert torch.equal(after.backbone(x), backbone(x))
    assert not torch.allclose(after(x), before, atol=1e-4)


@EVERY
def test_a_graph_through_the_backbone_is_cut(kind):
    """Even where the backbone's inputs and parameters ask for gradients."""
    _, model, x = build(kind)
    model.backbone.requires_grad_(True)
    if x.is_floating_point():
        x.requires_grad_(True)
    y = labels(model, x)
    loss(model, x, y).backward()
    assert x.grad is None
    head = {id(p) for p in model.backbone.head.parameters()} if kind is gpt else set()
    assert all(p.grad is None for p in model.backbone.parameters() if id(p) not in head)


@EVERY
def test_the_state_is_that_of_the_side_alone(kind, tmp_path):
    _, model, x = build(kind, init="random", seed=1)
    save(model, tmp_path / "side.safetensors")
    assert not any(name.startswith("backbone.") for name in adapter_state(model))
    _, other, _ = build(kind, init="random", seed=2)
    assert not torch.equal(other(x), model(x))
    load(other, tmp_path / "side.safetensors")
    assert torch.equal(other(x), model(x))
    state = adapter_state(model)
    state.pop(next(iter(state)))
    with pytest.raises(ValueError, match="another method"):
        load_adapter_state(other, state)
    assert count(model)["trained"] == sum(p.numel() for p in trainable(model).values())


@EVERY
@pytest.mark.parametrize("same", [True, False])
def test_a_stack_trains_as_one_by_one(kind, same):
    seeds, models, inputs = [1, 2, 3], [], []
    thin, chain, head = KINDS[kind]
    for s in seeds:
        backbone, x = kind(seed=0 if same else s)
        torch.manual_seed(s)
        models.append(ladder(backbone, 4, thin, head(), chain, init="random"))
        inputs.append(x)
    x = torch.stack(inputs)
    y = torch.stack([labels(m, v) for m, v in zip(models, x)])

    def run(i):
        stack = Stack(models[i])
        opt = stack.optimizer(torch.optim.SGD, 0.1)
        finetune(stack, None, loss, [(x[i], y[i])] * 3, opt)
        return stack

    together = run(slice(0, 3))
    assert together.size == count(models[0])["trained"]
    out = together(x)
    for i in range(3):
        alone = run(slice(i, i + 1))
        torch.testing.assert_close(together.theta[i], alone.theta[0], atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(together.module(i)(x[i]), out[i], atol=1e-9, rtol=1e-9)


def test_states_may_be_computed_once():
    """Training the side on stored states [L + 1, B, d] is training the whole."""
    _, model, x = build(residual)
    y = torch.randint(4, (1, B))
    whole, part = Stack([model]), Stack([model.side])
    hs = torch.stack(states(model.backbone, x))
    for stack, inputs in ((whole, x), (part, hs)):
        opt = stack.optimizer(torch.optim.AdamW, 0.01)
        finetune(stack, None, class_loss, [(inputs[None], y)] * 4, opt)
    torch.testing.assert_close(whole.theta, part.theta, atol=1e-12, rtol=0)


# Memory


def kept(model, x):
    with saved_bytes(model, [x]) as saved:
        model(x)
    return saved.total


@pytest.mark.parametrize("r", [1, 2, 4, 8])
@pytest.mark.parametrize("keep", [[1, 2, 3], [2], [1, 3]])
def test_saved_bytes_in_closed_form(r, keep):
    _, model, x = build(residual, r=r, keep=keep)
    w, k = D // r, len(keep)
    rows = D * (k + 1)  # the ladders' inputs, and h_0^f
    # a gate keeps u_l and h_{l-1}^g; a block the input, mean and deviation of its norm, the norm's
    # output, and the perceptron before and after its GELU
    rows += k * (2 * w + w + 2 + w + 2 * w + 2 * w)
    rows += w + 2 + w + D  # h_L^g, the norm's output, the head's input
    gates = 4 * k * 8  # of k numbers: mu, the open gate's factor, 1 - mu
    own = kept(model, x)
    assert 0 <= own - 8 * B * rows <= gates, (own - 8 * B * rows, gates)


def test_the_backbones_depth_costs_no_activations():
    costs = []
    for layers in (2, 4, 8):
        torch.manual_seed(0)
        backbone = Residual(6, 4, D, layers)
        model = ladder(backbone, 4, Perceptron, nn.Linear(D, 4), RESIDUAL, None, "random", [1, 2])
        costs.append(kept(model, torch.randn(B, 6)))
    assert costs[0] == costs[1] == costs[2]


@EVERY
def test_it_keeps_less_than_lora(kind):
    backbone, model, x = build(kind, r=8)
    lora = attach(backbone, LoRA(1, targets=["mlp.0", "mlp.2"]))
    assert kept(model, x) < 0.6 * kept(lora, x)


# Pruning


@pytest.mark.parametrize("init", ["fisher", "magnitude"])
def test_pruning_follows_the_rows_from_layer_to_layer(init):
    """By an independent loop over names and plain lists, for a transformer."""
    backbone, x = vit()
    y = torch.randint(4, (B,))
    score = (
        fisher(backbone, x, y)
        if init == "fisher"
        else {k: p.detach().abs() for k, p in backbone.named_parameters()}
    )
    model = ladder(backbone, 4, thin_block, MeanHead(D, 4), TRANSFORMER, score, init)
    theirs = {k: v.tolist() for k, v in score.items()}

    def best(table, n):
        sums = [sum(row) for row in table]
        return sorted(sorted(range(len(sums)), key=lambda i: -sums[i])[:n])

    kept = best(theirs["embed.weight"], D // 4)
    for i in range(L):
        a, b = backbone.blocks[i], model.side.blocks[i]
        assert torch.equal(b.norm1.weight, a.norm1.weight[kept])
        product = [
            [
                theirs[f"blocks.{i}.attention.q.weight"][o][c]
                * theirs[f"blocks.{i}.attention.k.weight"][o][c]
                * theirs[f"blocks.{i}.attention.v.weight"][o][c]
                for c in kept
            ]
            for o in range(D)
        ]
        rows = best(product, D // 4)
        for name in "qkv":
            W, small = getattr(a.attention, name), getattr(b.attention, name)
            assert torch.equal(small.weight, W.weight[rows][:, kept])
            assert torch.equal(small.bias, W.bias[rows])
        kept = rows
        for name, n in (
            ("attention.out", D // 4),
            ("norm2", None),
            ("mlp.0", D),
            ("mlp.2", D // 4),
        ):
            layer, small = a.get_submodule(name), b.get_submodule(name)
            if n is None:
                assert torch.equal(small.bias, layer.bias[kept])
                continue
            table = theirs[f"blocks.{i}.{name}.weight"]
            rows = best([[row[c] for c in kept] for row in table], n)
            assert torch.equal(small.weight, layer.weight[rows][:, kept])
            assert torch.equal(small.bias, layer.bias[rows])
            kept = rows


def test_at_r_one_pruning_copies_the_block():
    _, model, x = build(residual, r=1)
    hs = states(model.backbone, x)
    for i, block in enumerate(model.side.blocks):
        torch.testing.assert_close(block(hs[i]), hs[i + 1], atol=0, rtol=0)


def test_what_is_not_in_the_chain_is_copied():
    class Gated(Perceptron):
        def __init__(self, dim):
            super().__init__(dim)
            self.gain = nn.Parameter(torch.ones(3))

    torch.manual_seed(0)
    backbone = Residual(6, 4, D, 1)
    backbone.blocks[0] = Gated(D)
    with torch.no_grad():
        backbone.blocks[0].gain += 0.5
    model = ladder(backbone, 4, Gated, nn.Linear(D, 4), RESIDUAL, init="magnitude")
    assert torch.equal(model.side.blocks[0].gain, backbone.blocks[0].gain)
    assert model.side.blocks[0].gain is not backbone.blocks[0].gain


def test_fisher_is_the_mean_of_squared_gradients():
    backbone, x = residual()
    y = torch.randint(4, (B,))
    expected = {k: torch.zeros_like(p) for k, p in backbone.named_parameters()}
    for i in range(B):
        backbone.zero_grad()
        F.cross_entropy(backbone(x[i : i + 1]), y[i : i + 1]).backward()
        for k, p in backbone.named_parameters():
            expected[k] += p.grad**2 / B
    for k, v in fisher(backbone, x, y).items():
        torch.testing.assert_close(v, expected[k], atol=1e-14, rtol=1e-10)


# Sides without ladders, layer dropping, gates


def test_closed_gates_read_the_first_state_only():
    _, model, x = build(residual, open=False)
    hs = states(model.backbone, x)
    out = model.side(hs)
    assert torch.equal(out, model.side([hs[0], *(torch.randn_like(s) for s in hs[1:])]))
    assert not torch.allclose(out, model.side([hs[1], *hs[1:]]))
    assert not torch.equal(model.side.mu, build(residual)[1].side.mu)


def test_gates_start_at_a_half_and_are_sharp():
    _, model, _ = build(residual)
    assert torch.equal(model.side.mu, torch.full((L,), 0.5, dtype=F64))
    with torch.no_grad():
        model.side.alpha += 0.1
    torch.testing.assert_close(model.side.mu, torch.full((L,), 1.0, dtype=F64).sigmoid())


def test_dropped_blocks_leave_no_parameters_and_keep_their_own_weights():
    _, whole, x = build(residual)
    _, part, _ = build(residual, keep=[1, 3])
    assert len(part.side.blocks) == len(part.side.down) == len(part.side.alpha) == 2
    for own, block in zip(part.side.blocks, (whole.side.blocks[0], whole.side.blocks[2])):
        assert torch.equal(own.mlp[0].weight, block.mlp[0].weight)
    hs = states(part.backbone, x)
    assert torch.equal(part.side(hs), part.side([*hs[:2], torch.zeros_like(hs[2]), hs[3]]))


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_it_takes_the_backbones_dtype(kind, dtype):
    _, model, x = build(kind, dtype=dtype)
    assert all(p.dtype == dtype for p in model.parameters())
    assert model(x).dtype == dtype


@pytest.mark.gpu
@EVERY
def test_the_gpu_agrees_with_the_cpu(kind):
    _, model, x = build(kind)
    on_gpu = copy.deepcopy(model).cuda()
    torch.testing.assert_close(on_gpu(x.cuda()).cpu(), model(x), atol=1e-9, rtol=1e-9)
    backbone, _ = kind()
    thin, chain, head = KINDS[kind]
    backbone = backbone.cuda()
    own = ladder(backbone, 4, thin, head(), chain, init="magnitude")
    assert all(p.is_cuda for p in own.parameters())
    assert own.side.open.is_cuda


def test_bad_input():
    backbone, _ = residual()
    head = nn.Linear(D, 4)
    for r in (0, -1, 3):
        with pytest.raises(ValueError, match=f"divide the width {D}, not {r}"):
            ladder(backbone, r, Perceptron, head, RESIDUAL, init="random")
    with pytest.raises(ValueError, match=f"{', '.join(INITS)}, not 'svd'"):
        ladder(backbone, 4, Perceptron, head, RESIDUAL, init="svd")
    with pytest.raises(ValueError, match="needs importance=fisher"):
        ladder(backbone, 4, Perceptron, head, RESIDUAL)
    for keep in ([1, L + 1], [L + 2]):
        with pytest.raises(ValueError, match=f"exceeds the {L} blocks"):
            ladder(backbone, 4, Perceptron, head, RESIDUAL, init="random", keep=keep)
    for keep in ([], [0, 1], [2, 1], [1, 1]):
        with pytest.raises(ValueError, match="rising"):
            Side([Perceptron(4)] * max(1, len(keep)), D, 4, head, keep)
    with pytest.raises(ValueError, match="exceeds"):
        Ladder(backbone, Side([Perceptron(4)], D, 4, head, [L + 1]))
    with pytest.raises(ValueError, match=r"lacks 'embed\.weight'"):
        prune(backbone, [Perceptron(4)] * L, {}, RESIDUAL)
