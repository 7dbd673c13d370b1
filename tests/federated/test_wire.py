"""Compressors, attacks, robust rules and privacy noise against their definitions."""

import math

import numpy as np
import pytest
import torch

from miniature.federated.compression import Dither, Identity, RandK, Sign, TopK
from miniature.federated.privacy import Gaussian
from miniature.federated.robust import Attack, Krum, TrimmedMean, mean, median

COMPRESSORS = [Identity(), TopK(0.1), RandK(0.1), Sign(), Dither(2), Dither(4)]


class Draw:
    """Random numbers as the engine hands them out."""

    def __init__(self, seed=0):
        self.generator = torch.Generator().manual_seed(seed)

    def uniform(self, like):
        return torch.rand(like.shape, generator=self.generator, dtype=like.dtype)

    def normal(self, like):
        return torch.randn(like.shape, generator=self.generator, dtype=like.dtype)


def vectors(*shape, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)


def packed(codes, bits):
    """Codes as a string of `bits` bits each: what would be sent."""
    grid = (np.asarray(codes)[:, None] >> np.arange(bits)) & 1
    return np.packbits(grid.astype(bool).ravel()).tobytes()


def serialized(compressor, v, out):
    """Bytes of one message, built from what the receiver needs to reconstruct `out`."""
    P = len(v)
    if isinstance(compressor, Identity):
        return out.numpy().tobytes()
    if isinstance(compressor, Sign):
        return packed((out > 0).int().numpy(), 1) + out[:1].abs().numpy().tobytes()
    if isinstance(compressor, Dither):
        s = 2 ** (compressor.bits_per_entry - 1) - 1
        norm = torch.linalg.vector_norm(v)
        level = (out.abs() / norm * s).round().long()
        codes = level * 2 + (out < 0)
        return packed(codes.numpy(), compressor.bits_per_entry) + norm.numpy().tobytes()
    k = compressor.k(P)
    at = out.abs().topk(k).indices
    index = np.asarray(at) >> np.arange(math.ceil(math.log2(P)))[:, None] & 1
    bits = np.concatenate(
        [index.ravel(), np.unpackbits(np.frombuffer(out[at].numpy().tobytes(), dtype=np.uint8))]
    )
    return np.packbits(bits.astype(bool)).tobytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("P", [37, 1000])
@pytest.mark.parametrize("compressor", COMPRESSORS, ids=lambda c: type(c).__name__)
def test_bytes_reported_equal_bytes_serialized(compressor, P, dtype):
    v = vectors(1, 1, P, dtype=dtype)
    out = compressor(v, Draw())
    assert compressor.nbytes(v) == len(serialized(compressor, v[0, 0], out[0, 0]))


@pytest.mark.parametrize("compressor", [RandK(0.25), Dither(3)], ids=["RandK", "Dither"])
def test_unbiased_compressors_are_unbiased(compressor):
    v = vectors(1, 1, 20)
    many = compressor(v.expand(1, 40_000, 20).contiguous(), Draw())
    error = (many.mean(1) - v[0]).abs() / (many.std(1) / 200)
    assert error.max() < 4.5


def test_rand_k_has_its_variance():
    v = vectors(1, 1, 20)
    many = RandK(0.25)(v.expand(1, 20_000, 20).contiguous(), Draw())
    omega = ((many - v).square().sum(-1).mean() / v.square().sum()).item()
    assert omega == pytest.approx(20 / 5 - 1, rel=0.05)


def test_top_k_contracts_and_keeps_the_largest():
    v = vectors(2, 3, 40)
    out = TopK(0.25)(v, Draw())
    assert ((out != 0).sum(-1) == 10).all()
    assert ((out - v).square().sum(-1) <= 0.75 * v.square().sum(-1)).all()
    kept, lost = out.abs(), (v - out).abs()
    smallest = kept.masked_fill(out == 0, torch.inf).amin(-1)
    assert (smallest >= lost.amax(-1)).all()


def test_robust_rules_against_numpy_with_absent_clients():
    v, present = vectors(2, 7, 5), torch.tensor([[True] * 7, [True] * 4 + [False] * 3])
    v[1, 4:] = 1e9  # padding must not count
    for s in range(2):
        here = v[s][present[s]].numpy()
        np.testing.assert_allclose(mean(v, present)[s], here.mean(0), atol=1e-12)
        np.testing.assert_allclose(median(v, present)[s], np.median(here, 0), atol=1e-12)
        trimmed = np.sort(here, 0)[1:-1].mean(0)
        np.testing.assert_allclose(TrimmedMean(1)(v, present)[s], trimmed, atol=1e-12)
        d = ((here[:, None] - here[None]) ** 2).sum(-1)
        score = np.sort(d, 1)[:, 1 : len(here) - 1 - 2 + 1].sum(1)  # n - f - 2 others, f = 1
        best = np.argsort(score)
        np.testing.assert_allclose(Krum(1)(v, present)[s], here[best[0]], atol=1e-12)
        np.testing.assert_allclose(Krum(1, 2)(v, present)[s], here[best[:2]].mean(0), atol=1e-12)


def test_nobody_present_moves_nothing():
    v, nobody = vectors(1, 3, 4), torch.zeros(1, 3, dtype=torch.bool)
    assert (mean(v, nobody) == 0).all() and (median(v, nobody) == 0).all()


def test_robust_rules_withstand_what_breaks_the_mean():
    v = vectors(1, 9, 4)
    v[:, :2] = 1e6
    present = torch.ones(1, 9, dtype=torch.bool)
    assert mean(v, present).abs().max() > 1e5
    for rule in (median, TrimmedMean(2), Krum(2), Krum(2, 3)):
        assert rule(v, present).abs().max() < 5


def test_attacks_touch_the_malicious_only():
    v, active = vectors(2, 4, 3), torch.tensor([[0, 5, 1, 7], [9, 8, 7, 6]])
    for kind, bad in (("sign flip", -2 * v), ("free rider", 0 * v)):
        out = Attack(2, kind, scale=2.0)(v, active, Draw())
        torch.testing.assert_close(out[0, [0, 2]], bad[0, [0, 2]])
        torch.testing.assert_close(out[0, [1, 3]], v[0, [1, 3]])
        torch.testing.assert_close(out[1], v[1])
    noise = Attack(10, "gaussian", scale=3.0)(vectors(1, 10, 5000), torch.arange(10)[None], Draw())
    assert noise.std().item() == pytest.approx(3.0, rel=0.02)


def test_privacy_clips_and_adds_its_noise():
    rule = Gaussian(clip=2.0, noise=1.5)
    v = rule.clip(10 * vectors(1, 4, 50))
    torch.testing.assert_close(v.norm(dim=-1), torch.full((1, 4), 2.0, dtype=v.dtype))
    small = 0.01 * vectors(1, 4, 50)
    assert torch.equal(rule.clip(small), small)
    noisy = rule.add_noise(torch.zeros(1, 20_000, dtype=v.dtype), torch.tensor([4]), Draw())
    assert noisy.std().item() == pytest.approx(1.5 * 2.0 / 4, rel=0.02)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: TopK(0), "share"),
        (lambda: Dither(1), "2 bits"),
        (lambda: TrimmedMean(-1), "negative"),
        (lambda: TrimmedMean(2)(torch.zeros(1, 4, 1), torch.ones(1, 4, dtype=bool)), "nobody"),
        (lambda: Krum(2)(torch.zeros(1, 4, 1), torch.ones(1, 4, dtype=bool)), "undefined"),
        (lambda: Attack(1, "tickle"), "'tickle'"),
        (lambda: Gaussian(0, 1), "clip > 0"),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_epsilon_against_the_closed_form():
    pytest.importorskip("opacus", reason="Opacus is not installed")
    # Without sampling, T Gaussian releases are one with noise z / sqrt(T), whose privacy profile
    # is known (Balle and Wang 2018); Renyi accounting is an upper bound on it, and not far off.
    from scipy.optimize import brentq
    from scipy.stats import norm

    z, rounds, delta = 2.0, 10, 1e-5
    mu = math.sqrt(rounds) / z

    def profile(eps):
        return norm.cdf(mu / 2 - eps / mu) - math.exp(eps) * norm.cdf(-mu / 2 - eps / mu) - delta

    exact = brentq(profile, 0.1, 50)
    assert exact <= Gaussian(1.0, z).epsilon(rounds, rate=1.0, delta=delta) <= 1.15 * exact
    sampled = Gaussian(1.0, z).epsilon(rounds, rate=0.1, delta=delta)
    assert sampled < exact / 4
    assert Gaussian(1.0, z).epsilon(10, 0.1, delta, vectors=2) > sampled
    assert Gaussian(1.0, 0.0).epsilon(10, 0.1, delta) == math.inf
    with pytest.raises(ValueError, match="rate and delta"):
        Gaussian(1.0, z).epsilon(10, 0.0, delta)
