"""A stack against what one would write instead: a loop over ordinary modules."""

import pytest
import torch
import torch.nn.functional as F
from timing import median_seconds

from miniature.models import MLP
from miniature.stack import Stack, class_loss

COPIES, BATCH = 100, 16


def cross_entropy(model, x, y):
    return F.cross_entropy(model(x), y)


def build():
    return MLP([64, 64, 10])


@pytest.fixture
def batch():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(COPIES, BATCH, 64, generator=g)
    return x, torch.randint(10, (COPIES, BATCH), generator=g)


def loop(modules, optimizers, x, y):
    for module, optimizer, xi, yi in zip(modules, optimizers, x, y):
        optimizer.zero_grad()
        cross_entropy(module, xi, yi).backward()
        optimizer.step()


def test_one_training_step_of_100_copies(benchmark, batch, capsys):
    """100 copies of a 64-64-10 MLP, batch 16, SGD: the same work, both in this run."""
    stack = Stack.init(build, range(COPIES))
    optimizer = stack.optimizer(torch.optim.SGD, lr=0.1)
    modules = [stack.module(i) for i in range(COPIES)]
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in modules]

    loop(modules, optimizers, *batch)
    stack.step(optimizer, class_loss, *batch)
    theirs = torch.stack([torch.nn.utils.parameters_to_vector(m.parameters()) for m in modules])
    torch.testing.assert_close(stack.theta, theirs.detach(), atol=1e-5, rtol=0)

    benchmark(stack.step, optimizer, class_loss, *batch)
    if benchmark.enabled:
        plain = median_seconds(lambda: loop(modules, optimizers, *batch), rounds=15)
        ratio = plain / benchmark.stats.stats.median
        benchmark.extra_info["times faster than the loop over copies"] = ratio
        with capsys.disabled():
            print(
                f"\n{COPIES} copies: loop {plain * 1e3:.1f} ms, stack "
                f"{benchmark.stats.stats.median * 1e3:.2f} ms a step: {ratio:.1f} times faster"
            )
