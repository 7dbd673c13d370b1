"""MoS: shards by plain loops, one shared pool, LoRA as a special case, what is private."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from miniature.models import MLP
from miniature.peft import LoRA, adapted, adapter_state, attach, count, finetune, trainable
from miniature.peft.mixture_of_shards import MoS, PRoLoRA, Sharing, TiedLoRA, vectors
from miniature.stack import Stack

F64 = torch.float64


class Blocks(nn.Module):
    """N square layers in a row."""

    def __init__(self, N=4, d=8):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(d, d) for _ in range(N))

    def forward(self, x):
        for layer in self.blocks:
            x = x + torch.tanh(layer(x))
        return x


def model(method, N=4, d=8, seed=0, filled=False):
    """An adapted model, and its layers; `filled` makes the pools of B random too."""
    torch.manual_seed(seed)
    net = attach(Blocks(N, d).double(), method)
    layers = list(adapted(net).values())
    if filled:
        with torch.no_grad():
            layers[0].pool_B.normal_()
    return net, layers


def loss(net, x, y):
    return (net(x) - y).square().mean()


@pytest.mark.parametrize("l, p, dissociate", [(1, 0, True), (2, 1, True), (4, 1, False)])
def test_factors_by_plain_loops(l, p, dissociate):
    method = MoS(2, 4, l, p, dissociate, alpha=6.0)
    _, layers = model(method, filled=True)
    A, B = (pool.detach().numpy() for pool in (layers[0].pool_A, layers[0].pool_B))
    w = 8 // l
    for layer in layers:
        rows_A, rows_B = np.zeros((4, 8)), np.zeros((4, 8))
        for pool, index, rows in ((A, layer.I, rows_A), (B, layer.J, rows_B)):
            for i in range(4):
                for j in range(l):
                    v, place = divmod(int(index[i, j]), l)  # shard `place` of vector v
                    rows[i, j * w : (j + 1) * w] = pool[v, place * w : (place + 1) * w]
        expected = 6.0 / 4 * sum(np.outer(rows_B[i], rows_A[i]) for i in range(4))
        np.testing.assert_allclose(method.delta(layer).detach(), expected, atol=1e-14)
        assert np.linalg.matrix_rank(expected) == 4  # more than the budget, 2
        x = torch.randn(5, 8, dtype=F64)
        by_hand = x @ (layer.base.weight.T + torch.tensor(expected).T) + layer.base.bias
        torch.testing.assert_close(layer(x), by_hand)


def test_vectors_take_leading_axes():
    pool, index = torch.randn(6, 4), torch.randint(12, (3, 5, 2))
    many = vectors(pool, index)
    assert many.shape == (3, 5, 4)
    assert torch.equal(many[1, 2], torch.cat([pool.view(12, 2)[i] for i in index[1, 2]]))


@pytest.mark.parametrize("r, l, p", [(4, 1, 0), (5, 2, 1), (4, 4, 1), (3, 2, 1)])
def test_who_may_use_which_shard(r, l, p):
    """Public ones at most once a layer; private ones always, and by their own layer only."""
    e, N = 2, 4
    _, layers = model(MoS(e, r, l, p))
    public = (e - p) * N * l
    users = {}
    for k, layer in enumerate(layers):
        for index in (layer.I, layer.J):
            assert index.shape == (r, l) and len(index.unique()) == r * l
            own = index[r - p :].flatten()
            assert own.tolist() == list(range(public + k * p * l, public + (k + 1) * p * l))
            assert (index[: r - p] < public).all()
            users.setdefault(k, set()).update(own.tolist())
        assert not torch.equal(layer.I[: r - p], layer.J[: r - p])
    assert sum(map(len, users.values())) == N * p * l  # no private shard has two users
    assert public + N * p * l == e * N * l  # and the pool has no others
    assert any(not torch.equal(layers[0].I, other.I) for other in layers[1:])


def test_draws_are_uniform():
    """Every public shard is drawn as often as any other, r - p of (e - p) N."""
    torch.manual_seed(0)
    method = MoS(2, 3, 2, 1)
    drawn = torch.stack([method.route(0, 4, 2)[:2].flatten() for _ in range(4000)])
    share = torch.bincount(drawn.flatten(), minlength=8) / 4000
    torch.testing.assert_close(share, torch.full((8,), 0.5), atol=0.04, rtol=0)


def test_one_pool_for_all_layers():
    net, layers = model(MoS(2, 5, 2, 1))
    assert all(a.pool_A is layers[0].pool_A and a.pool_B is layers[0].pool_B for a in layers)
    assert list(trainable(net)) == ["blocks.0.pool_A", "blocks.0.pool_B"]
    for r, l, p in ((1, 1, 0), (5, 2, 1), (8, 4, 0), (2, 1, 2)):  # e N (m + n), whatever r, l, p
        net, _ = model(MoS(2, r, l, p))
        assert count(net)["trained"] == Stack([net]).size == 2 * 4 * (8 + 8)
        pools = [k for k in adapter_state(net) if "pool" in k]
        assert len(pools) == 2
    twin = copy.deepcopy(net)
    a, b = (list(adapted(n).values()) for n in (net, twin))
    assert b[1].pool_A is b[0].pool_A and b[0].pool_A is not a[0].pool_A


def test_pools_belong_to_one_kind_of_layer():
    net = attach(MLP([8, 8, 8, 4]), MoS(1, 2, 2, 0))
    first, second, last = adapted(net).values()
    assert first.pool_A is second.pool_A and last.pool_A is not first.pool_A
    assert first.pool_A.shape == (2, 8) and last.pool_B.shape == (1, 4)
    names = nn.ModuleDict({"q": nn.Linear(8, 8), "v": nn.Linear(8, 8)})
    q, v = adapted(attach(names, MoS(1, 1, 1, 0))).values()
    assert q.pool_A is not v.pool_A


def test_the_gradient_of_the_pool_sums_over_layers():
    """Against index_add_ of the gradients of the layers' own factors."""
    method = MoS(2, 5, 2, 1, alpha=3.0)
    net, layers = model(method, filled=True)
    x, y = torch.randn(2, 6, 8, dtype=F64)
    loss(net, x, y).backward()
    own = [[t.detach().requires_grad_() for t in method.factors(layer)] for layer in layers]
    h = x
    for layer, (B, A) in zip(layers, own):
        h = h + torch.tanh(F.linear(h, layer.base.weight + 3 / 5 * B @ A, layer.base.bias))
    (h - y).square().mean().backward()
    for pool, index, at in (("pool_A", "I", 1), ("pool_B", "J", 0)):
        total = torch.zeros(16, 4, dtype=F64)
        for layer, factors in zip(layers, own):
            rows = factors[at].grad if at else factors[at].grad.mT
            total.index_add_(0, getattr(layer, index).flatten(), rows.reshape(-1, 4))
        grad = getattr(layers[0], pool).grad
        torch.testing.assert_close(grad, total.view(8, 8), atol=1e-12, rtol=0)


@pytest.mark.parametrize("l", [1, 4])
def test_all_private_is_lora(l):
    """The same losses, step by step, from the same A."""
    mos, layers = model(MoS(2, 2, l, 2))
    lora, others = model(LoRA(2))
    with torch.no_grad():
        for k, layer in enumerate(others):
            layer.A.copy_(layers[0].pool_A[2 * k : 2 * k + 2])
    x, y = torch.randn(2, 1, 20, 8, dtype=F64)
    found = []
    for net in (mos, lora):
        stack = Stack([net])
        adam = stack.optimizer(torch.optim.Adam, 0.05)
        found.append(finetune(stack, None, loss, [(x, y)] * 60, adam))
    torch.testing.assert_close(found[0], found[1], atol=1e-11, rtol=1e-11)
    assert found[0][-1] < 0.9 * found[0][0]


def test_pure_sharing_gives_all_layers_one_update():
    _, layers = model(Sharing(2), filled=True)
    deltas = [a.method.delta(a).detach() for a in layers]
    for other in deltas[1:]:
        torch.testing.assert_close(other, deltas[0])
    expected = layers[0].pool_B.T @ layers[0].pool_A
    torch.testing.assert_close(deltas[0], expected.detach())
    _, layers = model(Sharing(2, spread=0.5), filled=True)
    for a in layers:
        B, A = vectors(a.pool_B, a.J), vectors(a.pool_A, a.I)
        torch.testing.assert_close(a.method.delta(a), (B.T * a.scale) @ A)
    assert len({round(float(a.scale[0]), 9) for a in layers}) == 4
    scales = torch.cat([a.scale for a in model(Sharing(50, spread=0.5))[1]])
    assert abs(scales.mean() - 1) < 0.1 and abs(scales.std() - 0.5) < 0.1


def test_updates_of_gaussian_pools_are_as_alike_as_they_share():
    """Pairs: the expected cosine is the expected overlap r / (e N); the other draws lower it."""
    found = {}
    for name, method in {
        "pairs": MoS(2, 8, 1, 0, dissociate=False),
        "dissociated": MoS(2, 8, 1, 0),
        "sharded": MoS(2, 8, 4, 0),
    }.items():
        values = []
        for seed in range(6):
            _, layers = model(method, N=8, d=64, seed=seed)
            with torch.no_grad():
                layers[0].pool_A.normal_()
                layers[0].pool_B.normal_()
                U = torch.stack([F.normalize(method.delta(a).flatten(), dim=0) for a in layers])
            values.append((U @ U.T).abs()[*torch.triu_indices(8, 8, 1)].mean())
        found[name] = float(torch.stack(values).mean())
    assert abs(found["pairs"] - 0.5) < 0.03
    assert found["sharded"] < 0.03 < found["dissociated"] < 0.1


def test_start_and_scale():
    _, layers = model(MoS(3, 4, 2, 1), N=50, d=16)
    A = layers[0].pool_A.detach()
    assert (layers[0].pool_B == 0).all() and A.abs().max() <= 1 / 4
    assert abs(A.std() - 1 / 4 / 3**0.5) < 0.005  # uniform, the bound that of LoRA's A
    assert float(layers[0].s) == 1.0
    assert float(model(MoS(2, 5, 2, 1, alpha=10))[1][3].s) == 2.0


def test_no_more_than_the_pool_holds():
    _, layers = model(MoS(2, 100, 2, 1))
    assert layers[0].I.shape == (1 + 4, 2)
    _, layers = model(MoS(2, None, 3, 0))
    assert layers[0].I.shape == (8, 1)  # 3 does not divide 8
    _, layers = model(MoS(2, None, 6, 0))
    assert layers[0].I.shape == (8, 2)
    assert layers[0].I.flatten().sort().values.tolist() == list(range(16))


def test_tied_lora():
    _, layers = model(TiedLoRA(1), filled=True)
    a = layers[2]
    with torch.no_grad():
        a.u.normal_()
        a.v.normal_()
    B, A = vectors(a.pool_B, a.J).T, vectors(a.pool_A, a.I)
    expected = torch.diag(a.v) @ B @ torch.diag(a.u) @ A
    torch.testing.assert_close(a.method.delta(a), expected)
    net, _ = model(TiedLoRA(1))
    assert count(net)["trained"] == 4 * 16 + 4 * (4 + 8)


def test_prolora():
    torch.manual_seed(0)
    net = attach(nn.Sequential(nn.Linear(6, 9).double()), PRoLoRA(4, 3))
    a = net[0]
    with torch.no_grad():
        a.B0.normal_()
    B, A = a.method.factors(a)
    assert A.shape == (4, 6) and B.shape == (9, 4)
    for j in range(3):
        for i in range(4):
            assert torch.equal(A[i, 2 * j : 2 * j + 2], a.A0[(i + j) % 4])
            assert torch.equal(B[3 * j : 3 * j + 3, i], a.B0[(i + j) % 4])
    assert count(net)["trained"] == 4 * (6 + 9) // 3 and a.A0.abs().max() <= 6**-0.5


@pytest.mark.gpu
def test_gpu_pools_stay_shared():
    net, _ = model(MoS(2, 5, 2, 1), filled=True)
    x = torch.randn(3, 8, dtype=F64)
    there = copy.deepcopy(net).cuda()
    torch.testing.assert_close(there(x.cuda()).cpu(), net(x), atol=1e-10, rtol=0)
    first, *others = adapted(there).values()
    assert all(a.pool_A is first.pool_A for a in others)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="positive, not 0 and 2"):
        MoS(0)
    with pytest.raises(ValueError, match="positive, not 2 and 0"):
        MoS(2, shards=0)
    with pytest.raises(ValueError, match=r"0\.\.2 \(the budget\), not 3"):
        MoS(2, private=3)
    with pytest.raises(ValueError, match="at least 1, not 0"):
        MoS(2, 0, private=0)
    with pytest.raises(ValueError, match="rank is 2, not 8"):
        MoS(2, 8, private=2)
    with pytest.raises(ValueError, match="got -1"):
        Sharing(2, spread=-1)
    with pytest.raises(ValueError, match="not 4 and 0"):
        PRoLoRA(4, 0)
