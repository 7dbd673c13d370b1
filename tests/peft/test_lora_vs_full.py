"""Intruder dimensions: by plain loops, by Hugging Face's peft, by laws of random matrices."""

import math

import numpy as np
import peft
import pytest
import torch
from peft.tuners.lora.intruders import reduce_intruder_dimension
from torch import nn

from miniature.peft import lora_vs_full
from miniature.peft.lora_vs_full import (
    factors,
    gradients,
    intruders,
    noise,
    others,
    outlier,
    rescale,
    similarity,
    spiked,
)

F64 = torch.float64


def tuned(m, n, r=3, size=2.0, batch=(), seed=0):
    """A random weight and the same with r spikes of the given size."""
    rng = torch.Generator().manual_seed(seed)
    W0 = torch.randn(*batch, m, n, generator=rng, dtype=F64) / math.sqrt(n)
    B = torch.linalg.qr(torch.randn(*batch, m, r, generator=rng, dtype=F64))[0]
    A = torch.linalg.qr(torch.randn(*batch, n, r, generator=rng, dtype=F64))[0].mT
    return W0, W0 + size * B @ A


@pytest.mark.parametrize("m, n", [(12, 9), (9, 12), (10, 10)])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("epsilon, top", [(0.5, 10), (0.7, 4), (0.9, 6)])
def test_intruders_by_a_plain_loop(m, n, side, epsilon, top):
    W0, W = tuned(m, n, batch=(2, 3))
    found = intruders(similarity(W0, W, side), epsilon, top)
    assert found.shape == (2, 3, min(m, n))
    seen = set()
    for a in range(2):
        for b in range(3):
            x, _, v = np.linalg.svd(W0[a, b].numpy())
            y, _, z = np.linalg.svd(W[a, b].numpy())
            k = min(m, n)
            old, new = (x.T[:k], y.T[:k]) if side == "left" else (v[:k], z[:k])
            for j in range(k):
                expected = j < top and max(abs(new[j] @ o) for o in old) < epsilon
                assert bool(found[a, b, j]) == expected
                seen.add(expected)
    assert seen == {True, False} or epsilon == 0.5


def test_similarity_has_the_tuned_vectors_in_its_rows():
    """A permuted diagonal: row j holds the pretrained place of tuned vector j."""
    W0 = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=F64))
    W = torch.diag(torch.tensor([4.0, 3.0, 2.0, 9.0], dtype=F64))  # the last becomes the first
    expected = torch.eye(4, dtype=F64)[[3, 0, 1, 2]]
    torch.testing.assert_close(similarity(W0, W), expected)
    torch.testing.assert_close(similarity(W0, W, "right"), expected)
    assert not intruders(similarity(W0, W)).any()  # it moved up, but it is an old one


def test_one_weight_before_serves_many_after():
    W0, W = tuned(8, 6, batch=(3,))
    many = torch.stack([W, W0, 2 * W])
    together = similarity(W0, many)
    assert together.shape == (3, 3, 6, 6)
    for k in range(3):
        torch.testing.assert_close(together[k], similarity(W0, many[k]))
    torch.testing.assert_close(together[2], together[0])  # a factor turns nothing


def test_nothing_changed_no_intruders_and_a_strong_spike_is_one():
    W0, W = tuned(60, 60, r=1, size=5.0, batch=(4,))
    assert not intruders(similarity(W0, W0), epsilon=0.99).any()
    found = intruders(similarity(W0, W))
    assert found[:, 0].all() and found.sum() == 4


def test_others_are_the_first_that_are_not_intruders():
    found = torch.tensor([[1, 0, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0], [0, 1, 1, 0, 0, 0]]).bool()
    expected = torch.tensor([[0, 1, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0], [1, 0, 0, 1, 0, 0]]).bool()
    assert torch.equal(others(found), expected)


@pytest.mark.parametrize("factor", [1.0, 0.5, 0.0, 2.0])
def test_rescaling_changes_the_chosen_singular_values_alone(factor):
    _, W = tuned(7, 5, batch=(2,))
    chosen = torch.tensor([[0, 1, 0, 1, 0], [1, 0, 0, 0, 0]]).bool()
    for w, c, got in zip(W, chosen, rescale(W, chosen, factor)):
        y, sigma, z = np.linalg.svd(w.numpy())
        expected = w.numpy().copy()
        for j in range(5):
            if c[j]:
                expected += (factor - 1) * sigma[j] * np.outer(y[:, j], z[j])
        np.testing.assert_allclose(got, expected, atol=1e-12)


@pytest.mark.parametrize("m, n", [(14, 11), (11, 14)])
@pytest.mark.parametrize("alpha, stable", [(6, False), (4, True)])
@pytest.mark.parametrize("top_k, epsilon, factor", [(10, 0.5, 0.75), (3, 0.8, 0.4)])
def test_mitigation_is_that_of_peft(m, n, alpha, stable, top_k, epsilon, factor):
    rank = 3
    torch.manual_seed(1)
    base = nn.Sequential(nn.Linear(n, m, bias=False)).double()
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, use_rslora=stable, target_modules=["0"])
    model = peft.get_peft_model(base, config).double()
    layer = model.base_model.model[0]
    with torch.no_grad():
        layer.lora_B["default"].weight.copy_(torch.randn(m, rank))
    W0 = layer.get_base_layer().weight.detach().clone()
    W = W0 + layer.get_delta_weight("default").detach()
    reduce_intruder_dimension(
        model,
        top_k=top_k,
        threshold_epsilon=epsilon,
        mitigation_lambda=factor,
        logging_sink=None,
    )
    found = intruders(similarity(W0, W), epsilon, top_k)
    assert found.any()
    B, A = factors(W0, rescale(W, found, factor), rank)
    theirs = layer.get_delta_weight("intruder_reduced").detach()
    torch.testing.assert_close(B @ A, theirs, atol=1e-9, rtol=1e-9)


def test_factors_are_the_closest_of_their_rank_and_balanced():
    W0, W = tuned(9, 7, r=2, batch=(3,))
    B, A = factors(W0, W, 2)
    torch.testing.assert_close(B @ A, W - W0)  # of rank 2 already
    torch.testing.assert_close(B.mT @ B, A @ A.mT)
    W = W0 + torch.randn(3, 9, 7, dtype=F64)
    B, A = factors(W0, W, 3)
    left = torch.linalg.matrix_norm(W - W0 - B @ A).square()
    torch.testing.assert_close(left, torch.linalg.svdvals(W - W0)[:, 3:].square().sum(1))


def test_noise_is_as_large_as_the_update_and_its_own_for_every_seed():
    W0, W = tuned(30, 40, batch=(3,))
    got = noise(W0, W, [5, 6, 5])
    size = torch.linalg.matrix_norm
    torch.testing.assert_close(size(got - W0), size(W - W0))
    g = got - W0
    torch.testing.assert_close(g[0] / size(g[0]), g[2] / size(g[2]))
    cosine = (g[0] * g[1]).sum() / size(g[0]) / size(g[1])
    assert abs(cosine) < 0.15 and abs(float(g[0].mean() / g[0].std())) < 0.15


def test_spiked_matrices_have_the_stated_moments():
    W0, u, v = spiked(200, 100, [1, 2])
    assert W0.shape == (2, 200, 100) and u.shape == (2, 200) and v.shape == (2, 100)
    torch.testing.assert_close(W0.var((1, 2)), torch.full((2,), 0.01, dtype=F64), rtol=0.05, atol=0)
    torch.testing.assert_close(u.norm(dim=1), torch.ones(2, dtype=F64))
    torch.testing.assert_close(v.norm(dim=1), torch.ones(2, dtype=F64))
    assert torch.equal(spiked(200, 100, [2])[0][0], W0[1])
    square = spiked(50, 50, [1])
    assert abs(float((square[1] * square[2]).sum())) < 0.5  # u and v are not one vector


@pytest.mark.parametrize("m, n", [(400, 400), (200, 400), (400, 200)])
@pytest.mark.parametrize("c", [2.0])
def test_outliers_by_simulation(m, n, c):
    """Value and both overlaps at finite size, mean of six; the shape tells left from right."""
    W0, u, v = spiked(m, n, range(6))
    Y, sigma, Zh = torch.linalg.svd(W0 + c * u[:, :, None] * v[:, None, :], full_matrices=False)
    value, left, right = outlier(c, m / n)
    assert abs(float(sigma[:, 0].mean() - value)) < 0.06
    assert abs(float((Y[:, :, 0] * u).sum(1).square().mean() - left)) < 0.035
    assert abs(float((Zh[:, 0] * v).sum(1).square().mean() - right)) < 0.035


def test_outliers_of_square_matrices_and_the_threshold():
    c = torch.tensor([0.0, 0.5, 1.0, 1.2, 2.0, 3.0], dtype=F64)
    value, left, right = outlier(c)
    above = c > 1
    torch.testing.assert_close(value[above], (c + 1 / c)[above])
    torch.testing.assert_close(left[above], (1 - c**-2)[above])
    torch.testing.assert_close(right, left)
    assert (value[~above] == 2).all() and (left[~above] == 0).all()
    value, left, right = outlier(0.25**0.25 * torch.tensor([0.999, 1.001], dtype=F64), 0.25)
    assert left[0] == right[0] == 0 and 0 < left[1] < 0.01 and 0 < right[1] < 0.01
    torch.testing.assert_close(value, torch.full((2,), 1.5, dtype=F64), atol=1e-5, rtol=0)


def test_the_spiked_vector_in_the_old_basis():
    """The formula of the module's docstring, exact at any size."""
    W0, u, v = (t[0] for t in spiked(20, 20, [3]))
    W = W0 + 2.0 * torch.outer(u, v)
    X, s, Vh = torch.linalg.svd(W0)
    Y, sigma, Zh = torch.linalg.svd(W)
    inner_z, inner_y = v @ Zh[0], u @ Y[:, 0]
    top = sigma[0] * inner_z * (X.T @ u) + s * inner_y * (Vh @ v)
    expected = (2.0 * top / (sigma[0] ** 2 - s**2)).abs()
    torch.testing.assert_close(similarity(W0, W)[0], expected, atol=1e-10, rtol=0)


def test_a_spike_becomes_an_intruder_at_the_threshold():
    """The card's mechanism: below c = 1 the first vector is an old one, above it is not."""
    W0, u, v = spiked(300, 300, range(4))
    cosines = []
    for c in (0.5, 1.5, 3.0):
        similar = similarity(W0, W0 + c * u[:, :, None] * v[:, None, :])
        cosines.append(similar[:, 0].amax(-1).mean())
        assert intruders(similar)[:, 0].all() == (c > 1)
    assert cosines[0] > 0.95 > 0.5 > cosines[1] > cosines[2]


def test_the_count_may_exceed_the_rank():
    """Against the card: rank r moves r values past their neighbors, but turns more vectors."""
    n, r = 100, 3
    W0 = torch.diag(1 + 1e-3 * torch.arange(n, dtype=F64).flip(0))
    u = torch.linalg.qr(spiked(n, n, [0])[0][0])[0][:, :r]
    W = W0 + 0.5 * u @ u.T
    sigma, s = torch.linalg.svdvals(W), W0.diagonal()
    assert (sigma[r:] <= s[:-r] + 1e-12).all()  # interlacing: r values pass, no more
    assert intruders(similarity(W0, W), top=n).sum() > r


def perceptrons(sizes, rank, copies, batch, seed=0):
    """Random perceptrons with factors that are not zero, and a batch for each."""
    rng = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(copies, *shape, generator=rng, dtype=F64)

    pairs = list(zip(sizes[1:], sizes))
    layers = {str(2 * i): (draw(m, n) / n**0.5, draw(m)) for i, (m, n) in enumerate(pairs)}
    low = {k: (draw(b.shape[-1], rank), draw(rank, W.shape[-1])) for k, (W, b) in layers.items()}
    low.popitem()
    y = torch.randint(sizes[-1], (copies, batch), generator=rng)
    return layers, low, draw(batch, sizes[0]), y


@pytest.mark.parametrize("sizes", [(7, 5, 6, 3), (4, 9, 3), (5, 6, 6, 6, 4)])
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_gradients_of_the_factors_are_those_of_autograd(sizes, scale):
    layers, low, x, y = perceptrons(sizes, 2, 3, 11)
    got = gradients(layers, low, scale, x, y)
    assert got.keys() == low.keys()
    for i in range(3):  # one copy at a time
        own = {k: [f[i].clone().requires_grad_() for f in pair] for k, pair in low.items()}
        h = x[i]
        for k, (W, b) in layers.items():
            change = scale * own[k][0] @ own[k][1] if k in own else 0.0
            h = h @ (W[i] + change).T + b[i]
            h = h.relu() if k in own else h
        nn.functional.cross_entropy(h, y[i]).backward()
        for k, pair in own.items():
            for factor, g in zip(pair, got[k]):
                torch.testing.assert_close(g[i], factor.grad, atol=1e-12, rtol=1e-10)


def test_gradients_leave_their_arguments_alone():
    layers, low, x, y = perceptrons((5, 6, 4), 2, 2, 8)
    before = [t.clone() for pair in (*layers.values(), *low.values()) for t in pair] + [x.clone()]
    gradients(layers, low, 2.0, x, y)
    after = [t for pair in (*layers.values(), *low.values()) for t in pair] + [x]
    assert all(torch.equal(a, b) for a, b in zip(before, after))


def test_bad_input_is_refused():
    W0, W = tuned(5, 4)
    with pytest.raises(ValueError, match="'left' or 'right', not 'both'"):
        similarity(W0, W, "both")
    with pytest.raises(ValueError, match=r"W0 is \[5, 4\] and W \[4, 5\]"):
        similarity(W0, W.T)
    similar = similarity(W0, W)
    with pytest.raises(ValueError, match=r"from 0 to 1, not 1\.5"):
        intruders(similar, 1.5)
    with pytest.raises(ValueError, match="positive number of vectors, not 0"):
        intruders(similar, top=0)
    with pytest.raises(ValueError, match="rank must be positive, not 0"):
        factors(W0, W, 0)
    layers, low, x, y = perceptrons((5, 6, 4), 2, 2, 8)
    low["2"] = low["0"]
    with pytest.raises(ValueError, match=r"factors of \['0', '2'\].* are \['0'\]"):
        gradients(layers, low, 1.0, x, y)
    with pytest.raises(ValueError, match="c >= 0 and ratio > 0, got -1"):
        outlier(-1.0)
    with pytest.raises(ValueError, match=r"got 1\.0 and 0"):
        outlier(1.0, 0)


@pytest.mark.gpu
def test_on_a_gpu():
    W0, W = tuned(32, 24, batch=(4,))
    ours = similarity(W0.cuda(), W.cuda())
    torch.testing.assert_close(ours.cpu(), similarity(W0, W), atol=1e-9, rtol=0)
    found = intruders(ours)
    halved = rescale(W.cuda(), found, 0.5)
    torch.testing.assert_close(halved.cpu(), rescale(W, found.cpu(), 0.5), atol=1e-9, rtol=0)
    assert lora_vs_full.noise(W0.cuda(), W.cuda(), range(4)).is_cuda
    layers, low, x, y = perceptrons((7, 5, 6, 3), 2, 3, 11)
    far = [{k: tuple(t.cuda() for t in pair) for k, pair in d.items()} for d in (layers, low)]
    theirs = gradients(*far, 0.3, x.cuda(), y.cuda())
    for k, pair in gradients(layers, low, 0.3, x, y).items():
        for ours, other in zip(pair, theirs[k]):
            torch.testing.assert_close(other.cpu(), ours, atol=1e-9, rtol=0)
