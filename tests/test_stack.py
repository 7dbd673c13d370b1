"""A stack is N separate models, to rounding."""

import subprocess
import sys
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from miniature.models import MLP
from miniature.stack import Stack, class_loss, clip, seeded
from miniature.stack import cross_entropy as fast_cross_entropy

N, STEPS, BATCH = 4, 12, 8
OPTIMIZERS = {
    "sgd": (torch.optim.SGD, {"lr": 0.1}),
    "momentum": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-2}),
    "nesterov": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True}),
    "adamw": (torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 0.1}),
}


def mlp():
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))


def cross_entropy(model, x, y):
    return F.cross_entropy(model(x), y)


def data(dtype):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(STEPS, N, BATCH, 6, generator=g, dtype=torch.float64).to(dtype)
    return x, torch.randint(3, (STEPS, N, BATCH), generator=g)


def separate(kind, rates, options, dtype, build=mlp):
    """The oracle: N ordinary training loops."""
    x, y = data(dtype)
    modules = []
    for i in range(N):
        torch.manual_seed(i)
        module = build().to(dtype)
        optimizer = kind(module.parameters(), lr=rates[i], **options)
        for t in range(STEPS):
            optimizer.zero_grad()
            cross_entropy(module, x[t, i], y[t, i]).backward()
            optimizer.step()
        modules.append(module)
    return torch.stack([nn.utils.parameters_to_vector(m.parameters()) for m in modules]).detach()


@pytest.mark.parametrize("chunk", [None, 3])
@pytest.mark.parametrize("per_copy", [False, True])
@pytest.mark.parametrize("dtype, tol", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_trajectory_equals_separate_loops(name, dtype, tol, per_copy, chunk):
    kind, options = OPTIMIZERS[name]
    options = dict(options)
    lr = options.pop("lr")
    rates = [lr * (1 + 0.3 * i) for i in range(N)] if per_copy else [lr] * N
    stack = Stack.init(mlp, range(N), dtype=dtype, chunk=chunk)
    optimizer = stack.optimizer(kind, lr=rates if per_copy else lr, **options)
    losses = stack.train(cross_entropy, zip(*data(dtype)), optimizer)
    assert losses.shape == (STEPS, N)
    torch.testing.assert_close(stack.theta, separate(kind, rates, options, dtype), atol=tol, rtol=0)


def test_copies_are_built_as_if_alone_and_the_global_generator_is_untouched():
    state = torch.get_rng_state()
    stack = Stack.init(mlp, [3, 7])
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(7)
    alone = mlp()
    for name, p in alone.named_parameters():
        assert torch.equal(stack.params()[name][1], p)
        assert torch.equal(dict(stack.module(1).named_parameters())[name], p)


def test_a_copy_taken_out_is_independent():
    stack = Stack.init(mlp, range(2))
    x = torch.randn(5, 6)
    module, before = stack.module(1), stack.theta.clone()
    torch.testing.assert_close(module(x), stack(x, shared=True)[1])
    with torch.no_grad():
        module[0].weight.add_(1)
    assert torch.equal(stack.theta, before)


def test_params_are_views_and_flat_undoes_them():
    stack = Stack.init(mlp, range(2))
    stack.params()["0.weight"][1, 2, 3] = 42.0
    assert 42.0 in stack.theta[1]
    assert torch.equal(stack.flat(stack.params()), stack.theta)


def test_chunking_changes_nothing_and_bounds_the_batch_seen_by_the_module():
    x, y = (t[0] for t in data(torch.float64))
    whole, parts = (Stack.init(mlp, range(N), dtype=torch.float64, chunk=c) for c in (None, 1))
    for a, b in zip(whole.grad(cross_entropy, x, y), parts.grad(cross_entropy, x, y)):
        torch.testing.assert_close(a, b, atol=1e-14, rtol=1e-12)
    torch.testing.assert_close(whole(x), parts(x))
    outputs = parts.map(lambda m, x: {"out": m(x)}, x)
    torch.testing.assert_close(outputs["out"], whole(x))


def test_more_rows_than_copies_share_the_architecture():
    stack = Stack.init(mlp, range(2))
    theta = stack.theta.repeat_interleave(3, 0)
    x = torch.randn(6, 5, 6)
    assert stack(x, theta=theta).shape == (6, 5, 3)


def test_frozen_parameters_and_buffers_stay_out_of_theta():
    class Frozen(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mask", torch.arange(3))
            self.backbone = nn.Linear(6, 3).requires_grad_(False)
            self.head = nn.Linear(3, 3)

        def forward(self, x):
            return self.head(self.backbone(x)) * self.mask

    stack = Stack.init(Frozen, range(2))
    assert set(stack.params()) == {"head.weight", "head.bias"}
    x = torch.randn(4, 6)
    torch.manual_seed(1)
    torch.testing.assert_close(stack(x, shared=True)[1], Frozen()(x))
    torch.testing.assert_close(stack.module(1)(x), stack(x, shared=True)[1])


def test_tied_weights_are_one_parameter_in_both_places():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.encode, self.decode = nn.Linear(4, 4), nn.Linear(4, 4)
            self.decode.weight = self.encode.weight

        def forward(self, x):
            return self.decode(torch.tanh(self.encode(x)))

    def loss(model, x):
        return model(x).square().sum()

    stack, x = Stack.init(Tied, range(2), dtype=torch.float64), torch.randn(2, 5, 4).double()
    grad, _ = stack.grad(loss, x)
    assert "decode.weight" not in stack.params()
    for i in range(2):
        alone = stack.module(i)
        loss(alone, x[i]).backward()
        expected = torch.cat([p.grad.flatten() for p in alone.parameters()])
        torch.testing.assert_close(grad[i], expected, atol=1e-12, rtol=1e-10)


def test_buffers_that_layers_share_stay_shared_in_another_type():
    class Shares(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
            scale = torch.randn(4)
            for layer in self.layers:
                layer.register_buffer("scale", scale)

        def forward(self, x):
            for layer in self.layers:
                x = layer(x) * layer.scale
            return x

    modules = [Shares(), Shares()]
    stack, x = Stack(modules, dtype=torch.float64), torch.randn(2, 5, 4).double()
    for i, out in enumerate(stack(x)):
        torch.testing.assert_close(out, modules[i].double()(x[i]), atol=1e-6, rtol=0)
        torch.testing.assert_close(out, stack.module(i)(x[i]), atol=1e-12, rtol=0)


def test_an_error_inside_a_copy_leaves_the_module_as_it_was():
    stack = Stack.init(mlp, range(2))
    before = dict(stack.base.named_parameters())

    def fails(model, x):
        model(x)
        return model(x[:, :2])

    with pytest.raises(RuntimeError):
        stack.grad(fails, torch.randn(2, 5, 6))
    assert all(p is before[k] for k, p in stack.base.named_parameters())


def test_dropout_differs_between_copies_and_is_off_in_evaluation():
    stack = Stack.init(lambda: nn.Sequential(nn.Linear(6, 50), nn.Dropout(0.5)), [0, 0])
    x = torch.ones(2, 1, 6)
    outputs = []
    stack.grad(lambda m, x: outputs.append(m(x)) or m(x).sum(), x)
    grad, _ = stack.grad(lambda m, x: m(x).sum(), x)
    assert not torch.equal(grad[0], grad[1])
    assert torch.equal(*stack(x))


def test_the_fast_cross_entropy_is_pytorchs():
    g = torch.Generator().manual_seed(0)
    logits = 50 * torch.randn(7, 5, 4, generator=g, dtype=torch.float64)
    y = torch.randint(4, (7, 5), generator=g)
    theirs = F.cross_entropy(logits.flatten(0, 1), y.flatten())
    torch.testing.assert_close(fast_cross_entropy(logits, y), theirs, atol=1e-13, rtol=1e-13)
    stack = Stack.init(mlp, range(N), dtype=torch.float64)
    x, y = (t[0] for t in data(torch.float64))
    for a, b in zip(
        stack.grad(cross_entropy, x, y),
        stack.grad(lambda m, x, y: fast_cross_entropy(m(x), y), x, y),
    ):
        torch.testing.assert_close(a, b, atol=1e-14, rtol=1e-12)


@pytest.mark.parametrize(
    "build",
    [
        lambda: MLP([5, 3]),
        lambda: MLP([5, 7, 3]),
        lambda: MLP([5, 7, 6, 3]),
        lambda: nn.Sequential(nn.Linear(5, 4, bias=False), nn.ReLU(), nn.Linear(4, 3)),
        lambda: nn.Sequential(nn.Linear(5, 3, bias=False)),
        lambda: nn.Sequential(OrderedDict(a=nn.Linear(5, 4), b=nn.ReLU(), c=nn.Linear(4, 3))),
    ],
)
@pytest.mark.parametrize("chunk", [None, 2])
def test_the_gradient_written_out_for_perceptrons_is_autograds(build, chunk):
    stack = Stack.init(build, range(3), dtype=torch.float64, chunk=chunk)
    assert stack._layers
    g = torch.Generator().manual_seed(0)
    x = torch.randn(3, 11, 5, generator=g, dtype=torch.float64) * 30  # far from linear
    y = torch.randint(0, 3, (3, 11), generator=g)
    theta = torch.randn(3, stack.size, generator=g, dtype=torch.float64)
    kept = x.clone(), y.clone(), theta.clone()
    found = stack.grad(class_loss, x, y, theta=theta)
    expected = stack.grad(lambda model, a, b: F.cross_entropy(model(a), b), x, y, theta=theta)
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert all(torch.equal(a, b) for a, b in zip(kept, (x, y, theta)))  # nothing is overwritten
    if type(stack.base) is MLP:
        with pytest.raises(ValueError, match="this MLP reads"):
            stack.grad(class_loss, x[..., 1:], y)


@pytest.mark.parametrize(
    "module",
    [
        MLP([5, 4, 3], activation=nn.Tanh),
        nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3), nn.Softplus()),
        nn.Sequential(nn.LayerNorm(5), nn.ReLU(), nn.Linear(5, 3)),
        nn.Sequential(nn.Linear(5, 3), nn.ReLU()),
        nn.Sequential(nn.Linear(5, 4).requires_grad_(False), nn.ReLU(), nn.Linear(4, 3)),
    ],
)
def test_other_modules_go_through_autograd(module):
    stack = Stack([module])
    assert not stack._layers
    x, y = torch.randn(1, 6, 5), torch.randint(0, 3, (1, 6))
    found, _ = stack.grad(class_loss, x, y)
    own = [p for p in module.parameters() if p.requires_grad]
    parts = torch.autograd.grad(F.cross_entropy(module(x[0]), y[0]), own)
    torch.testing.assert_close(found[0], torch.cat([p.flatten() for p in parts]))


def test_clipping_is_per_copy():
    stack = Stack.init(mlp, range(N), dtype=torch.float64)
    x, y = (t[0] for t in data(torch.float64))
    modules = [stack.module(i) for i in range(N)]
    stack.step(stack.optimizer(torch.optim.SGD, lr=1.0), cross_entropy, x, y, max_norm=0.1)
    for i, module in enumerate(modules):
        cross_entropy(module, x[i], y[i]).backward()
        nn.utils.clip_grad_norm_(module.parameters(), 0.1)
        torch.optim.SGD(module.parameters(), lr=1.0).step()
        alone = nn.utils.parameters_to_vector(module.parameters())
        torch.testing.assert_close(stack.theta[i], alone.detach(), atol=1e-12, rtol=0)


def test_accuracy_and_clip():
    stack = Stack.init(mlp, range(3))
    x, y = torch.randn(10, 6), torch.randint(3, (10,))
    for i, a in enumerate(stack.accuracy(x, y)):
        assert a == (stack.module(i)(x).argmax(-1) == y).float().mean()
    g = torch.tensor([[3.0, 4.0], [0.3, 0.4]])
    torch.testing.assert_close(clip(g, 1.0), torch.tensor([[0.6, 0.8], [0.3, 0.4]]))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Stack([]), "at least one"),
        (lambda: Stack([nn.BatchNorm1d(3)]), "running statistics"),
        (lambda: Stack([mlp(), nn.Linear(6, 3)]), "module 1 has another architecture"),
        (lambda: Stack([nn.ReLU()]), "no trainable"),
        (lambda: Stack([mlp()], chunk=0), "chunk"),
        (lambda: Stack([mlp()]).optimizer(torch.optim.LBFGS, lr=1), "not elementwise"),
        (lambda: Stack([mlp()]).optimizer(torch.optim.SGD, lr=[1, 2]), "lr must be"),
        (lambda: Stack([mlp()]).optimizer(torch.optim.Rprop, lr=[1.0]), "per copy"),
        (lambda: Stack([mlp()])(torch.randn(2, 4, 6)), "first axis must be the 1 copies"),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_batch_norm_without_running_statistics_is_admitted():
    stack = Stack([nn.BatchNorm1d(3, track_running_stats=False)])
    assert stack(torch.randn(1, 8, 3)).shape == (1, 8, 3)


@pytest.mark.gpu
def test_the_gpu_agrees_with_the_cpu():
    x, y = (t[0] for t in data(torch.float64))
    cpu, gpu = (Stack.init(mlp, range(N), dtype=torch.float64, device=d) for d in ("cpu", "cuda"))
    g, _ = gpu.grad(cross_entropy, x.cuda(), y.cuda())
    torch.testing.assert_close(g.cpu(), cpu.grad(cross_entropy, x, y)[0], atol=1e-12, rtol=1e-9)


def test_an_optimizer_does_not_import_the_compiler():
    """It would cost every notebook a second."""
    program = """
import sys
import torch
from miniature.models import MLP
from miniature.stack import Stack, class_loss
stack = Stack.init(lambda: MLP([4, 3]), [0, 1])
optimizer = stack.optimizer(torch.optim.AdamW, 1e-3)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
stack.step(optimizer, class_loss, torch.zeros(2, 5, 4), torch.zeros(2, 5, dtype=torch.long))
schedule.step()
assert optimizer.param_groups[0]["lr"] < 1e-3
sys.exit("torch._dynamo" in sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_seeded_draws_as_manual_seed_does_and_leaves_the_generator_alone():
    torch.manual_seed(3)
    expected = torch.rand(4)
    state = torch.get_rng_state()
    with pytest.raises(KeyError), seeded(3):
        assert torch.equal(torch.rand(4), expected)
        raise KeyError
    assert torch.equal(torch.get_rng_state(), state)
