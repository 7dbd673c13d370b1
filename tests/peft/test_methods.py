"""One contract over every method of the field.

A method is found by being a `Method`; it must be constructible without arguments, or have an entry
in `ARGUMENTS`. `MODELS` says on which small models it is tried.
"""

import copy

import pytest
import torch
from kinds import kinds
from torch import nn

import miniature.peft
from miniature.models import CNN, GPT, MLP
from miniature.peft import (
    LowRank,
    Method,
    Prefix,
    Prompt,
    adapted,
    adapter_state,
    attach,
    count,
    detach,
    finetune,
    load,
    load_adapter_state,
    merge,
    save,
    trainable,
    unmerge,
)
from miniature.stack import Stack, cross_entropy

F64 = torch.float64


def mlp():
    return MLP([6, 12, 5])


def cnn():
    return CNN((1, 8, 8), 5, channels=(3, 4))


def gpt():
    return GPT(vocab=11, dim=8, layers=2, heads=2, context=16)


INPUTS = {
    mlp: lambda: torch.randn(7, 6, dtype=F64),
    cnn: lambda: torch.randn(3, 1, 8, 8, dtype=F64),
    gpt: lambda: torch.randint(11, (3, 9)),
}
ARGUMENTS = {"rank": 3, "width": 3, "length": 3}  # small ones, where a method has them


def make(kind):
    """A small instance of a method."""
    names = kind.__init__.__code__.co_varnames[: kind.__init__.__code__.co_argcount]
    return kind(**{k: v for k, v in ARGUMENTS.items() if k in names})


def models(kind):
    """The small models that have a layer for the method."""
    if issubclass(kind, (Prefix, Prompt)):
        return [gpt]
    found = []
    for build in (mlp, cnn, gpt):
        if any(isinstance(m, kind.default) for m in build().modules()):
            found.append(build)
    return found


METHODS = [kind for kind in kinds(miniature.peft, Method) if kind is not LowRank]
CASES = [(kind, build) for kind in METHODS for build in models(kind)]
EVERY = pytest.mark.parametrize(
    "kind, build", CASES, ids=[f"{k.__name__}-{b.__name__}" for k, b in CASES]
)


def base_and_adapted(kind, build, seed=0, dtype=F64):
    torch.manual_seed(seed)
    base = build().to(dtype)
    method = make(kind)
    torch.manual_seed(seed + 1)
    return base, attach(copy.deepcopy(base), method), method


def loss(model, x, y):
    return cross_entropy(model(x).flatten(0, -2), y.flatten())


def labels(base, x):
    with torch.no_grad():
        return torch.randint(base(x).shape[-1], base(x).shape[:-1])


def trained(kind, build, steps=3, seed=0):
    """A model after a few steps of Adam: (base, adapted model, input)."""
    base, model, method = base_and_adapted(kind, build, seed)
    x = INPUTS[build]()
    y = labels(base, x)
    stack = Stack([model])
    finetune(
        stack, method, loss, [(x[None], y[None])] * steps, stack.optimizer(torch.optim.Adam, 0.02)
    )
    return base, stack.module(0), x


@EVERY
def test_it_starts_at_the_base(kind, build):
    base, model, method = base_and_adapted(kind, build)
    x = INPUTS[build]()
    same = torch.allclose(model(x), base(x), atol=1e-10, rtol=0)
    assert same == method.starts_at_base
    assert adapted(model) and all(isinstance(m.base, method.kinds) for m in adapted(model).values())


@EVERY
def test_training_changes_the_adapters_only(kind, build):
    base, model, x = trained(kind, build)
    after = dict(detach(copy.deepcopy(model)).named_parameters())
    for path, p in base.named_parameters():
        assert torch.equal(after[path], p), path
    assert not torch.allclose(model(x), base(x), atol=1e-6)
    assert torch.equal(detach(model)(x), base(x))


@EVERY
def test_gradients_reach_exactly_the_trained_tensors(kind, build):
    _, model, _ = trained(kind, build)
    x = INPUTS[build]()
    loss(model, x, labels(model, x)).backward()
    for path, p in model.named_parameters():
        assert (p.grad is not None) == p.requires_grad, path
        if p.requires_grad:
            assert path.rpartition(".")[2] in dict(
                model.get_submodule(path.rpartition(".")[0])._parameters
            )
            assert (p.grad != 0).any(), path
    assert trainable(model) and count(model)["trained"] == sum(
        p.numel() for p in trainable(model).values()
    )


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_merged_equals_attached(kind, build, dtype):
    base, model, x = trained(kind, build)
    model, x = model.to(dtype), x.to(dtype) if x.is_floating_point() else x
    method = next(iter(adapted(model).values())).method
    if not method.mergeable:
        with pytest.raises(ValueError, match="cannot be merged"):
            merge(model)
        return
    before = model(x)
    state = {k: v.clone() for k, v in adapter_state(model).items()}
    tol = 1e-10 if dtype == F64 else 1e-5
    torch.testing.assert_close(merge(model)(x), before, atol=tol, rtol=tol)
    assert torch.equal(merge(model)(x), model(x))  # merging twice is merging once
    plain = detach(copy.deepcopy(model))
    assert not adapted(plain) and torch.equal(plain(x), model(x))
    assert torch.equal(unmerge(model)(x), before)
    for k, v in adapter_state(model).items():
        assert torch.equal(v, state[k])
    for path, p in detach(model).named_parameters():
        assert torch.equal(p, base.to(dtype).get_parameter(path))


@EVERY
def test_the_state_is_that_of_the_adapters_alone(kind, build, tmp_path):
    base, model, x = trained(kind, build)
    path = tmp_path / "adapter.safetensors"
    save(model, path)
    assert [p.name for p in tmp_path.iterdir()] == ["adapter.safetensors"]
    frozen = {k for k, p in model.named_parameters() if not p.requires_grad}
    assert not frozen & adapter_state(model).keys()
    other = attach(copy.deepcopy(base), make(kind))  # drawn otherwise
    load(other, path)
    assert torch.equal(other(x), model(x))
    state = adapter_state(model)
    state.pop(next(iter(state)))
    with pytest.raises(ValueError, match="another method"):
        load_adapter_state(other, state)
    assert torch.equal(other(x), model(x))


@EVERY
def test_a_stack_trains_as_one_by_one(kind, build):
    torch.manual_seed(0)
    base = build().to(F64)
    seeds, x = [1, 2, 3], torch.stack([INPUTS[build]() for _ in range(3)])
    y = torch.stack([labels(base, v) for v in x])
    method = make(kind)

    def run(seeds, x, y):
        stack = Stack.init(lambda: attach(copy.deepcopy(base), make(kind)), seeds)
        opt = stack.optimizer(torch.optim.SGD, 0.1)
        finetune(stack, method, loss, [(x, y)] * 3, opt)
        return stack

    together = run(seeds, x, y)
    for i in range(3):
        alone = run(seeds[i : i + 1], x[i : i + 1], y[i : i + 1])
        torch.testing.assert_close(together.theta[i], alone.theta[0], atol=1e-9, rtol=1e-9)
    out = together(x)
    for i in range(3):
        torch.testing.assert_close(together.module(i)(x[i]), out[i], atol=1e-9, rtol=1e-9)
    assert together.size == count(together.module(0))["trained"]


@pytest.mark.gpu
@EVERY
def test_the_gpu_agrees_with_the_cpu(kind, build):
    base, model, _ = base_and_adapted(kind, build)
    x = INPUTS[build]()
    gpu = copy.deepcopy(model).cuda()
    torch.testing.assert_close(gpu(x.cuda()).cpu(), model(x), atol=1e-9, rtol=1e-9)
    on_gpu = attach(copy.deepcopy(base).cuda(), make(kind))
    assert all(t.is_cuda for t in adapter_state(on_gpu).values())


def test_every_method_is_tried():
    assert {k for k, _ in CASES} == set(METHODS)
    assert not any(isinstance(k, nn.Module) for k in METHODS)
