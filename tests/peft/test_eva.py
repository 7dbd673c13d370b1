"""EVA: incremental SVD against libraries, ranks against brute force, bad input."""

import copy
import warnings
from itertools import pairwise

import numpy as np
import pytest
import torch
from sklearn.decomposition import IncrementalPCA
from torch import nn

from miniature.models import GPT, MLP
from miniature.peft import LoRA, PiSSA, adapted, attach
from miniature.peft.eva import (
    EVA,
    IncrementalSVD,
    OLoRA,
    Orthonormal,
    UnitLoRA,
    UnitOLoRA,
    UnitPiSSA,
    redistribute,
)
from miniature.stack import Stack

F64 = torch.float64


def rows(seed, *shape):
    """Rows with a falling spectrum and a mean."""
    g = torch.Generator().manual_seed(seed)
    n = shape[-1]
    scale = 1.5 ** -torch.arange(n, dtype=F64)
    mix = torch.linalg.qr(torch.randn(n, n, generator=g, dtype=F64))[0]
    shift = torch.rand(n, generator=g, dtype=F64)
    return torch.randn(*shape, generator=g, dtype=F64) * scale @ mix + shift


def aligned(V, like):
    """Rows of V with the signs of those of `like`."""
    return V * np.sign((V * like).sum(-1, keepdims=True))


def layers(model, method):
    return adapted(attach(copy.deepcopy(model), method))


@pytest.mark.parametrize("sizes", [[12, 12, 12, 12], [20, 5, 9]])
def test_it_is_sklearns_incremental_pca(sizes):
    X = rows(0, sum(sizes), 8)
    svd, pca = IncrementalSVD(4), IncrementalPCA(n_components=4)
    for batch in X.split(sizes):
        before = getattr(pca, "components_", None)
        svd.update(batch)
        pca.partial_fit(batch.numpy())
        np.testing.assert_allclose(svd.S, pca.singular_values_, rtol=1e-10)
        np.testing.assert_allclose(svd.ratio, pca.explained_variance_ratio_, rtol=1e-10)
        np.testing.assert_allclose(svd.mean[0], pca.mean_, rtol=1e-10)
        V = svd.V.numpy()
        np.testing.assert_allclose(aligned(pca.components_, V), V, atol=1e-9)
        assert (V[np.arange(4), np.abs(V).argmax(1)] > 0).all()
        if before is not None:
            want = (aligned(before, V) * V).sum(1)
            np.testing.assert_allclose(svd.cosine.abs(), want, atol=1e-9)
    assert (svd.seen, svd.batches) == (sum(sizes), len(sizes))


@pytest.mark.parametrize("center", [True, False])
def test_with_all_components_it_is_the_batch_svd(center):
    X = rows(1, 60, 7)
    svd = IncrementalSVD(7, center)
    for batch in X.split([25, 10, 15, 10]):
        svd.update(batch)
    Y = X - X.mean(0) if center else X
    _, S, V = np.linalg.svd(Y.numpy(), full_matrices=False)
    np.testing.assert_allclose(svd.S, S, rtol=1e-9)
    np.testing.assert_allclose(svd.V, aligned(V, svd.V.numpy()), atol=1e-8)
    np.testing.assert_allclose(svd.ratio, S**2 / (S**2).sum(), rtol=1e-9)


def test_streams_side_by_side_are_streams_alone():
    X = torch.stack([rows(s, 30, 6) for s in range(3)])
    together, alone = IncrementalSVD(3), [IncrementalSVD(3) for _ in range(3)]
    for batch in X.split(10, 1):
        together.update(batch)
        for i in range(3):
            alone[i].update(batch[i])
    for i in range(3):
        for name in ("V", "S", "ratio", "cosine"):
            torch.testing.assert_close(getattr(together, name)[i], getattr(alone[i], name))
    assert (IncrementalSVD(3).seen, together.seen) == (0, 30)


def test_the_first_batch_has_converged_nowhere():
    svd = IncrementalSVD(2)
    svd.update(rows(0, 9, 4))
    assert (svd.cosine == 0).all()
    svd.update(rows(0, 9, 4))  # the same rows again: nothing turns
    torch.testing.assert_close(svd.cosine, torch.ones(2, dtype=F64))


def test_ky_fan():
    """One batch: tr A S A' is the sum of the largest eigenvalues, and no orthonormal A has more."""
    X = rows(2, 50, 8)
    Sigma = torch.cov(X.T)
    model = nn.Sequential(nn.Linear(8, 3).double())
    A = layers(model, EVA(3, [X], rho=1))["0"].A.detach()
    best = torch.trace(A @ Sigma @ A.T)
    torch.testing.assert_close(best, torch.linalg.eigvalsh(Sigma)[-3:].sum())
    torch.testing.assert_close(A @ A.T, torch.eye(3, dtype=F64))
    torch.manual_seed(0)
    other = [layers(model, Orthonormal(3))["0"].A.detach() for _ in range(200)]
    energy = torch.stack([torch.trace(R @ Sigma @ R.T) for R in other])
    assert (energy < best).all()
    expected = 3 / 8 * torch.trace(Sigma)
    assert abs(energy.mean() - expected) < 4 * energy.std() / 200**0.5
    M = X.T @ X  # not centered: the largest sum of squares of A x
    A = layers(model, EVA(3, [X], rho=1, center=False))["0"].A.detach()
    torch.testing.assert_close(torch.trace(A @ M @ A.T), torch.linalg.eigvalsh(M)[-3:].sum())


def test_the_first_gradient_of_B_is_G_X_A():
    X, G = rows(3, 20, 6), torch.randn(20, 4, dtype=F64)
    model = nn.Sequential(nn.Linear(6, 4).double())
    for adjust in (True, False):
        method = EVA(3, [X], rho=1, alpha=5.0, adjust=adjust)
        model_ = attach(copy.deepcopy(model), method)
        (model_(X) * G).sum().backward()
        a = adapted(model_)["0"]
        torch.testing.assert_close(a.B.grad, 5 / 3 * G.T @ X @ a.A.detach().T)
        assert (a.A.grad == 0).all()


@pytest.mark.parametrize("seed", range(5))
def test_ranks_are_those_of_a_plain_loop(seed):
    g = torch.Generator().manual_seed(seed)
    ratios = [torch.rand(k, generator=g).sort(descending=True).values for k in (5, 2, 6, 1)]
    for budget in range(15):
        left, ranks = [xi.tolist() for xi in ratios], [0] * 4
        for _ in range(budget):
            best = max((i for i in range(4) if left[i]), key=lambda i: left[i][0])
            left[best].pop(0)
            ranks[best] += 1
        assert redistribute(ratios, budget) == ranks and sum(ranks) == budget
    ties = [torch.tensor([0.5, 0.1]), torch.tensor([0.5, 0.1])]
    assert redistribute(ties, 1) == [1, 0] and redistribute(ties, 3) == [2, 1]


def network(seed=0):
    torch.manual_seed(seed)
    return MLP([8, 12, 10, 5]).double()


def batches(seed, sizes=(20,) * 12):
    return list(rows(seed, sum(sizes), 8).split(sizes))


def inputs(model, x):
    """Inputs of the three linear layers."""
    found = {}
    for path, layer in model.named_children():
        found[path] = x.detach()
        x = layer(x)
    return found


@pytest.mark.parametrize("rho, rank", [(1, 2), (2, 2), (1.5, 4), (3, 1)])
def test_the_budget_is_met(rho, rank):
    model, method = network(), EVA(rank, batches(0), rho=rho)
    found = layers(model, method)
    assert sum(method.ranks.values()) == 3 * rank
    assert max(method.ranks.values()) <= round(rho * rank)
    assert set(found) == {path for path, r in method.ranks.items() if r}
    for path, a in found.items():
        assert a.A.shape == (method.ranks[path], a.n) and a.B.shape == (a.m, len(a.A))
        assert (a.B == 0).all() and float(a.s) == 1.0
        torch.testing.assert_close(a.A.detach(), method.svds[path].V[: len(a.A)])
    assert rho > 1 or set(method.ranks.values()) == {rank}


def plain_loop(model, data, r, rho, tau):
    """The whole pass with sklearn, layer by layer: ranks, batches of each layer, components."""
    k = round(rho * r)
    pca = {path: IncrementalPCA(k) for path in ("0", "2", "4")}
    cosine = {path: np.zeros(k) for path in pca}
    used, ranks, t = dict.fromkeys(pca, 0), dict.fromkeys(pca, k), 0
    while True:
        turning = [p for p in pca if used[p] < 1 or (cosine[p][: ranks[p]] < tau).any()]
        if not turning:
            return ranks, used, {p: c.components_ for p, c in pca.items()}, t
        x = inputs(model, data[t % len(data)])
        for p in turning:
            before = getattr(pca[p], "components_", None)
            pca[p].partial_fit(x[p].numpy())
            used[p] += 1
            if before is not None:
                cosine[p] = (before * pca[p].components_).sum(1)
        pool = [(-xi, p) for p in pca for xi in pca[p].explained_variance_ratio_]
        chosen = [p for _, p in sorted(pool)[: 3 * r]]
        ranks, t = {p: chosen.count(p) for p in pca}, t + 1


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("tau", [0.9, 0.99, 0.9999])
def test_layers_stop_and_resume_as_in_a_plain_loop(seed, tau):
    model, data = network(seed), batches(seed)
    method = EVA(2, data, tau=tau)
    found = layers(model, method)
    ranks, used, V, t = plain_loop(model, data, 2, 2, tau)
    assert method.ranks == ranks and method.passes == t + 1
    assert {p: s.batches for p, s in method.svds.items()} == used
    for p, a in found.items():
        want = aligned(V[p][: ranks[p]], a.A.detach().numpy())
        np.testing.assert_allclose(a.A.detach(), want, atol=1e-7)
    stricter = EVA(2, data, tau=0.99999)
    attach(model, stricter)
    assert stricter.passes > method.passes


def test_some_layers_resume():
    """Redistribution gives a layer that had stopped more ranks than have converged."""
    gaps = 0
    for seed in range(20):
        seen = []

        class Watched(EVA):
            def _turning(self, leader, seen=seen):
                seen.append(set(super()._turning(leader)))
                return sorted(seen[-1])

        attach(network(seed), Watched(2, batches(seed), tau=0.999))
        gaps += any(later - earlier for earlier, later in pairwise(seen))
    assert gaps > 0


def test_hugging_face_agrees():
    """Their decomposition is a randomized one in float32; on few components it is the same."""
    from peft import LoraConfig
    from peft.tuners.lora.config import EvaConfig
    from peft.tuners.lora.eva import get_eva_state_dict

    model, data = network(1), batches(1, (64,) * 10)
    for rho, whiten in ((2, False), (1, True)):
        method = EVA(2, data, rho=rho, whiten=whiten, tau=0.99)
        found = layers(model, method)
        config = LoraConfig(
            r=2,
            target_modules=["0", "2", "4"],
            init_lora_weights="eva",
            eva_config=EvaConfig(rho=rho, tau=0.99, whiten=whiten),
        )
        theirs = get_eva_state_dict(
            copy.deepcopy(model),
            data,
            config,
            forward_fn=lambda m, x: m(x),
            prepare_model_inputs_fn=None,
            prepare_layer_inputs_fn=None,
            show_progress_bar=False,
        )
        assert {k: len(v) for k, v in theirs.items()} == method.ranks
        for path, a in found.items():
            A = a.A.detach().numpy()
            np.testing.assert_allclose(aligned(theirs[path].numpy(), A), A, atol=2e-3)


def test_equal_inputs_share_one_decomposition():
    torch.manual_seed(0)
    model = GPT(vocab=11, dim=8, layers=2, heads=2, context=16).double()
    ids = [torch.randint(11, (6, 9)) for _ in range(8)]
    method = EVA(2, ids)
    attach(model, method)
    q = [p for p in method.ranks if p.endswith("attention.q")]
    assert len(q) == 2 and method.svds[q[0]] is not method.svds[q[1]]
    for path in q:
        for other in ("k", "v"):
            assert method.svds[path[:-1] + other] is method.svds[path]
    assert len({id(s) for s in method.svds.values()}) == len(method.svds) - 4
    assert sum(method.ranks.values()) == 2 * len(method.ranks)


def test_a_shared_decomposition_serves_the_largest_rank():
    method = EVA(2)
    method.svds = {"q": IncrementalSVD(2)}
    method.svds["q"].batches, method.svds["q"].cosine = 2, torch.tensor([1.0, 0.5])
    for q, k, turning in ((2, 1, ["q"]), (1, 2, ["q"]), (1, 1, [])):
        method.ranks = {"q": q, "k": k}
        assert method._turning({"q": "q", "k": "q"}) == turning


def test_masked_tokens_are_left_out():
    torch.manual_seed(0)
    model = GPT(vocab=11, dim=8, layers=1, heads=2, context=16).double()
    ids, keep = torch.randint(11, (6, 9)), torch.ones(6, 9, dtype=torch.bool)
    keep[:, 6:] = False  # attention is causal: what comes later changes nothing before
    other = torch.where(keep, ids, (ids + 1) % 11)
    found = [EVA(2, [(x, keep)]) for x in (ids, other)] + [EVA(2, [ids[:, :6]]), EVA(2, [ids])]
    for method in found:
        attach(copy.deepcopy(model), method)
    first, second, cut, whole = ({p: s.S for p, s in m.svds.items()} for m in found)
    for path in first:
        torch.testing.assert_close(first[path], second[path])
        torch.testing.assert_close(first[path], cut[path])
    assert not torch.allclose(first["head"], whole["head"])


def test_small_batches_are_skipped():
    data = batches(0)
    mixed = [data[0], data[1][:3], *data[1:]]
    a, b = EVA(2, data), EVA(2, mixed)
    for method in (a, b):
        attach(network(), method)
    for path in a.svds:
        torch.testing.assert_close(a.svds[path].V, b.svds[path].V)
    assert a.ranks == b.ranks and b.passes == a.passes + 1


def test_whitened_and_scaled():
    model, data = network(), batches(0)
    plain, white = layers(model, EVA(2, data)), layers(model, EVA(2, data, whiten=True))
    own = EVA(2, data, alpha=6.0, adjust=False)
    for path, a in layers(model, own).items():
        S = own.svds[path].S[: own.ranks[path]]
        torch.testing.assert_close(white[path].A * S.sqrt()[:, None], plain[path].A)
        torch.testing.assert_close(a.s, torch.tensor(6.0 / own.ranks[path], dtype=F64))


def test_room_makes_copies_of_other_ranks_fit():
    methods = [EVA(2, batches(s), room=4) for s in range(4)]
    models = [attach(network(s), m) for s, m in enumerate(methods)]
    assert len({tuple(m.ranks.values()) for m in methods}) > 1
    stack = Stack(models)
    x = rows(9, 4, 7, 8)
    for _ in range(3):
        stack.step(stack.optimizer(torch.optim.Adam, 0.1), lambda m, x: m(x).square().mean(), x)
    for i, method in enumerate(methods):
        for path, a in adapted(stack.module(i)).items():
            r = method.ranks[path]
            assert a.A.shape[0] == 4 and (a.A[r:] == 0).all() and (a.B[:, r:] == 0).all()
            assert r == 0 or (a.B[:, :r] != 0).any()


def test_layers_without_ranks_are_left_alone():
    """Two inputs as large as all others of one layer, many equal ones of the other."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 40, bias=False), nn.Linear(40, 3)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.linalg.qr(torch.randn(40, 4, dtype=F64))[0])
        model[0].weight[:, 2:] *= 1e-3
    X = torch.randn(200, 4, dtype=F64)
    method = EVA(1, [X], rho=2)
    model = attach(model, method)
    assert method.ranks == {"0": 0, "1": 2} and set(adapted(model)) == {"1"}
    assert type(model[0]) is nn.Linear
    method = EVA(1, [X], rho=2, room=2)
    a = adapted(attach(nn.Sequential(model[0], model[1].base), method))
    assert set(a) == {"0", "1"} and (a["0"].A == 0).all() and float(a["0"].s) == 1.0
    assert float(a["1"].s) == 1.0
    method = EVA(1, [X], rho=2, adjust=False, alpha=3.0)
    assert float(adapted(attach(nn.Sequential(model[0], model[1].base), method))["1"].s) == 1.5


def test_the_model_is_left_as_it_was():
    model = network()
    model.insert(1, nn.Dropout(0.5))
    state = copy.deepcopy(model.state_dict())
    model.train()
    attach(model, EVA(2, batches(0)))
    assert model.training and model[1].training
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items() if k in state)
    again = EVA(2, batches(0))  # without dropout, the same twice
    model = network()
    model.insert(1, nn.Dropout(0.5))
    attach(model, again)
    plain = EVA(2, batches(0))
    attach(network(), plain)
    assert list(again.ranks.values()) == list(plain.ranks.values())


def test_without_data_it_is_lora_and_says_so():
    with pytest.warns(UserWarning, match="EVA got no data"):
        torch.manual_seed(3)
        a = layers(network(), EVA(3))
    torch.manual_seed(3)
    b = layers(network(), LoRA(3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layers(network(), EVA(3, batches(0)))
    for path in b:
        assert torch.equal(a[path].A, b[path].A)


def test_rivals_of_unit_rows():
    model = network(2)
    torch.manual_seed(5)
    lora = layers(model, UnitLoRA(3, alpha=6.0))
    torch.manual_seed(5)
    plain = layers(model, LoRA(3))
    pissa, unit = layers(model, PiSSA(3, 6.0)), layers(model, UnitPiSSA(3, 6.0))
    for path in plain:
        for a in (lora, unit, layers(model, UnitOLoRA(3)), layers(model, Orthonormal(3))):
            torch.testing.assert_close(a[path].A.norm(dim=1), torch.ones(3, dtype=F64))
        A = plain[path].A
        torch.testing.assert_close(lora[path].A, A / A.norm(dim=1, keepdim=True))
        torch.testing.assert_close(unit[path].W, pissa[path].W)
        torch.testing.assert_close(unit[path].B @ unit[path].A, pissa[path].B @ pissa[path].A)
        A = layers(model, Orthonormal(3))[path].A
        torch.testing.assert_close(A @ A.T, torch.eye(3, dtype=F64))


@pytest.mark.parametrize("alpha", [3, 6])
def test_hugging_faces_olora_agrees(alpha):
    from peft import LoraConfig, get_peft_model

    model = network(4).float()
    config = LoraConfig(
        r=3, lora_alpha=alpha, target_modules=["0", "2", "4"], init_lora_weights="olora"
    )
    theirs = get_peft_model(copy.deepcopy(model), config).base_model.model
    ours = layers(model, OLoRA(3, alpha))
    for path, a in ours.items():
        other = theirs.get_submodule(path)
        BA = other.lora_B["default"].weight @ other.lora_A["default"].weight
        torch.testing.assert_close(a.B @ a.A, BA, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(a.W, other.base_layer.weight, atol=1e-5, rtol=1e-4)
        A = other.lora_A["default"].weight.detach().numpy()
        np.testing.assert_allclose(aligned(a.A.detach().numpy(), A), A, atol=1e-5)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match=r"rho must be at least 1, not 0\.5"):
        EVA(2, rho=0.5)
    for tau in (-0.1, 1.0):
        with pytest.raises(ValueError, match=rf"tau must lie in \[0, 1\), not {tau}"):
            EVA(2, tau=tau)
    with pytest.raises(ValueError, match="rho r = 6 ranks, more than the room 5"):
        EVA(3, room=5)
    with pytest.raises(ValueError, match="rank 9 exceeds the 8 inputs of layer '0'"):
        attach(network(), EVA(9, batches(0)))
    with pytest.raises(ValueError, match="fewer than 4 rows"):
        attach(network(), EVA(2, batches(0, (3, 3))))
    with pytest.raises(ValueError, match=r"0\.\.3, not 4"):
        redistribute([torch.ones(2), torch.ones(1)], 4)
    with pytest.raises(ValueError, match=r"5 components .*\[9, 4\]"):
        IncrementalSVD(5).update(rows(0, 9, 4))
    with pytest.raises(ValueError, match=r"4 components .*\[3, 6\]"):
        IncrementalSVD(4).update(rows(0, 3, 6))
    g = torch.Generator().manual_seed(0)
    jumpy = list(
        torch.linalg.qr(torch.randn(8, 8, generator=g))[0] * 10.0 ** torch.arange(8)[:, None]
    )
    model = nn.Sequential(nn.Linear(8, 2))
    steep = [torch.stack([v, -v]) for v in jumpy[:6]]  # every batch outweighs all before it
    with pytest.raises(ValueError, match="no convergence in 3 batches: 0"):
        import miniature.peft.eva as module

        limit, module.LIMIT = module.LIMIT, 3
        try:
            attach(model, EVA(1, steep, rho=1))
        finally:
            module.LIMIT = limit


@pytest.mark.gpu
def test_the_gpu_finds_the_same():
    data = batches(0)
    cpu, gpu = EVA(2, data), EVA(2, data)
    a, b = layers(network(), cpu), layers(network().cuda(), gpu)
    assert cpu.ranks == gpu.ranks and cpu.passes == gpu.passes
    for path in a:
        torch.testing.assert_close(a[path].A, b[path].A.cpu(), atol=1e-8, rtol=0)
