"""In-context regression: prompts, estimators, and the softmax transformer."""

import math

import numpy as np
import pytest
import torch

from miniature.sequence import icl


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def test_covariance_spans_the_ratio():
    values = icl.covariance(5, 10).diagonal()
    assert values[0] == 1 and values[-1] == pytest.approx(0.1)
    assert torch.allclose(values[1:] / values[:-1], values[1] / values[0])


def test_prompts_have_the_covariance_and_the_labels():
    cov = torch.tensor([[1.0, 0.3], [0.3, 0.5]], dtype=torch.float64)
    w = icl.tasks(4, 2, gen())
    x, y = icl.prompts(w, cov, 50_000, gen(1))
    assert torch.allclose(torch.cov(x[0].T), cov, atol=0.02)
    assert torch.allclose(y, (x * w[:, None]).sum(-1))
    noisy = icl.prompts(w, cov, 50_000, gen(1), noise=0.5)[1]
    assert (noisy - y).std().item() == pytest.approx(0.5, rel=0.02)
    per_prompt = torch.stack([cov, 4 * cov, 9 * cov, 16 * cov])
    x4, _ = icl.prompts(w, per_prompt, 100, gen(1))
    assert torch.allclose(x4[3], 4 * icl.prompts(w, cov, 100, gen(1))[0][3])


def test_prompts_depend_on_the_generator_only():
    w, cov = icl.tasks(3, 2, gen()), icl.covariance(2, 4)
    assert torch.equal(icl.prompts(w, cov, 5, gen(7))[0], icl.prompts(w, cov, 5, gen(7))[0])


def test_moments_are_those_of_one_growing_prompt():
    w, cov = icl.tasks(3, 4, gen()), icl.covariance(4, 10)
    S, z = icl.moments(w, cov, [6], gen(1), noise=0.1, link="relu")
    x, y = icl.prompts(w, cov, 6, gen(1), noise=0.1, link="relu")
    assert torch.allclose(S[0], x.mT @ x / 6) and torch.allclose(z[0], (x * y[..., None]).mean(1))
    S, z = icl.moments(w, cov, [6, 500_000], gen(1))
    assert torch.allclose(S[-1], cov.expand(3, 4, 4), atol=0.01)
    assert torch.allclose(z[-1], w @ cov, atol=0.03)


def test_embedding_is_the_papers_matrix():
    x, y, q = torch.randn(2, 3, 4), torch.randn(2, 3), torch.randn(2, 4)
    E = icl.embed(x, y, q)
    assert E.shape == (2, 5, 4)
    assert torch.equal(E[0, :4, 1], x[0, 1]) and E[0, 4, 1] == y[0, 1]
    assert torch.equal(E[1, :4, 3], q[1]) and E[1, 4, 3] == 0


@pytest.mark.parametrize("length", [3, 5, 40])
def test_ols_is_numpy_lstsq(length):
    w, cov = icl.tasks(6, 5, gen()), icl.covariance(5, 10)
    x, y = icl.prompts(w, cov, length, gen(2), noise=0.3)
    got = icl.ols(x.mT @ x / length, (x * y[..., None]).mean(1))
    for i in range(6):
        expected = np.linalg.lstsq(x[i].numpy(), y[i].numpy(), rcond=None)[0]
        np.testing.assert_allclose(got[i].numpy(), expected, rtol=1e-6, atol=1e-8)


def test_ridge_solves_its_normal_equations_and_tends_to_ols():
    w, cov = icl.tasks(6, 3, gen()), icl.covariance(3, 10)
    S, z = (t[0] for t in icl.moments(w, cov, [20], gen(2), noise=0.3))
    r = icl.ridge(S, z, 0.2)
    assert torch.allclose((S @ r[..., None]).squeeze(-1) + 0.2 * r, z)
    assert torch.allclose(icl.ridge(S, z, 1e-12), icl.ols(S, z))


@pytest.mark.parametrize("link", sorted(icl.LINKS))
def test_best_linear_predictor_and_its_residual(link):
    cov = icl.covariance(3, 5)
    w = icl.tasks(2, 3, gen())
    x, y = icl.prompts(w, cov, 400_000, gen(3), link=link)
    a, residual = icl.best_linear(w, cov, link)
    measured = icl.ols(x.mT @ x, (x.mT @ y[..., None]).squeeze(-1))
    if link == "relu":  # its mean is not zero, and neither predictor has an intercept
        assert torch.allclose(a, w / 2)
    assert torch.allclose(measured, a, atol=0.02)
    assert torch.allclose(
        ((x @ a[..., None]).squeeze(-1) - y).square().mean(1), residual, atol=0.02
    )


def test_excess_risk_is_the_query_average():
    cov = icl.covariance(3, 5)
    w_hat, a = icl.tasks(2, 3, gen()), icl.tasks(2, 3, gen(1))
    x, _ = icl.prompts(a, cov, 400_000, gen(2))
    sampled = (x @ (w_hat - a)[..., None]).square().mean((1, 2))
    assert torch.allclose(icl.excess_risk(w_hat, a, cov), sampled, rtol=0.02)


def test_transformer_is_causal_and_ignores_the_order_of_examples():
    torch.manual_seed(0)
    model = icl.RegressionTransformer(3, width=8, layers=2, heads=2).double()
    x = torch.randn(2, 6, 3, dtype=torch.float64)
    y = torch.randn(2, 6, dtype=torch.float64)
    base = model(x, y)
    changed = y.clone()
    changed[:, 3:] += 1.0
    after = model(x, changed)
    assert torch.allclose(after[:, :4], base[:, :4], atol=1e-12)  # prediction 3 sees y_0..y_2
    assert (after[:, 4:] - base[:, 4:]).abs().min() > 1e-6
    # the last prediction depends on the set of examples; one layer suffices to see it exactly
    one = icl.RegressionTransformer(3, width=8, layers=1, heads=2).double()
    swap = torch.tensor([4, 0, 3, 1, 2, 5])
    assert torch.allclose(one(x, y)[:, -1], one(x[:, swap], y[:, swap])[:, -1], atol=1e-12)


def test_transformer_learns_from_its_context():
    torch.manual_seed(0)
    model, g = icl.RegressionTransformer(1, width=16, layers=1, heads=1), gen()
    opt = torch.optim.AdamW(model.parameters(), lr=0.01)
    cov = torch.ones(1, 1)
    for _ in range(300):
        x, y = icl.prompts(icl.tasks(64, 1, g, torch.float32), cov, 8, g)
        loss = (model(x, y) - y).square().mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
    error = (model(x, y) - y).square().mean(0).detach()
    assert error[-1] < 0.3 * error[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_is_kept(dtype):
    w = icl.tasks(2, 3, gen(), dtype)
    cov = icl.covariance(3, 4, dtype=dtype)
    S, z = icl.moments(w, cov, [4, 8], gen())
    for t in (
        S,
        icl.ols(S, z),
        icl.ridge(S, z, 0.1),
        icl.exponential_covariances(2, 3, gen(), dtype),
    ):
        assert t.dtype == dtype
    assert icl.covariance(2, 2, device="meta").device.type == "meta"


def test_exponential_covariances_have_unit_mean():
    covs = icl.exponential_covariances(100_000, 2, gen())
    assert torch.allclose(covs.mean(0), torch.eye(2, dtype=covs.dtype), atol=0.02)
    assert (covs.diagonal(dim1=1, dim2=2) ** 2).mean().item() == pytest.approx(2, rel=0.03)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: icl.covariance(0, 10), "d >= 1"),
        (lambda: icl.covariance(3, 0.5), "ratio >= 1"),
        (lambda: icl.prompts(torch.ones(2, 3), torch.eye(4), 5, gen()), r"\[3, 3\]"),
        (lambda: icl.prompts(torch.ones(2, 3), torch.eye(3), 0, gen()), "length >= 1"),
        (lambda: icl.prompts(torch.ones(2, 3), torch.eye(3), 5, gen(), noise=-1), "noise >= 0"),
        (lambda: icl.prompts(torch.ones(2, 3), torch.eye(3), 5, gen(), link="cube"), "'cube'"),
        (lambda: icl.moments(torch.ones(2, 3), torch.eye(3), [5, 5], gen()), "increasing"),
        (lambda: icl.moments(torch.ones(2, 3), torch.eye(3), [], gen()), "increasing"),
        (lambda: icl.embed(torch.ones(2, 3, 4), torch.ones(2, 3), torch.ones(2, 3)), "x_query"),
        (lambda: icl.RegressionTransformer(2, width=10, heads=4), "multiple of heads"),
    ],
)
def test_errors_name_the_value(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_sign_slope_matches_stein():
    w = torch.tensor([[2.0, 0.0]], dtype=torch.float64)
    a, residual = icl.best_linear(w, torch.eye(2, dtype=torch.float64), "sign")
    assert a[0, 0].item() == pytest.approx(math.sqrt(2 / math.pi))
    assert residual.item() == pytest.approx(1 - 2 / math.pi)
