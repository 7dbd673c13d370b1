"""The linear self-attention layer: closed forms against sampling, the flow against its minimum."""

import pytest
import torch

from miniature.sequence import icl
from miniature.sequence import trained_transformers_icl as lsa


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=gen(seed), dtype=torch.float64)


@pytest.fixture
def cov():
    """A covariance that is not diagonal, with condition number 5."""
    basis, _ = torch.linalg.qr(randn(3, 3, seed=9))
    return basis @ icl.covariance(3, 5) @ basis.T


def sampled_loss(PV, KQ, cov, N, n, seed=0):
    g = gen(seed)
    w = icl.tasks(n, cov.shape[0], g)
    x, y = icl.prompts(w, cov, N + 1, g)
    E = icl.embed(x[:, :N], y[:, :N], x[:, N])
    return (lsa.predict(E, PV, KQ) - y[:, N]).square() / 2


def test_predict_is_the_attention_formula():
    E, PV, KQ = randn(2, 7, 4, 6), randn(2, 4, 4, seed=1), randn(2, 4, 4, seed=2)
    got = lsa.predict(E, PV, KQ)
    for s in range(2):
        for b in range(7):
            e = E[s, b]
            f = e + PV[s] @ e @ (e.T @ KQ[s] @ e) / 5
            assert torch.allclose(got[s, b], f[-1, -1])


def test_predictor_is_one_preconditioned_gradient_step(cov):
    """From w = 0, w - P ∇ (1/2M) Σ (w·x_i - y_i)² is P z: the layer with u Uᵀ = P."""
    u, U = torch.tensor(1.7, dtype=torch.float64), randn(3, 3, seed=1)
    PV, KQ = torch.zeros(2, 4, 4, dtype=torch.float64)
    PV[3, 3], KQ[:3, :3] = u, U
    w = icl.tasks(5, 3, gen())
    x, y = icl.prompts(w, cov, 9, gen(1))
    w0 = torch.zeros(5, 3, dtype=torch.float64, requires_grad=True)
    loss = ((x[:, :8] @ w0[..., None]).squeeze(-1) - y[:, :8]).square().mean(1).sum() / 2
    (grad,) = torch.autograd.grad(loss, w0)
    step = -grad @ (u * U)
    got = lsa.predict(icl.embed(x[:, :8], y[:, :8], x[:, 8]), PV, KQ)
    assert torch.allclose(got, (step * x[:, 8]).sum(1))
    z = (x[:, :8] * y[:, :8, None]).mean(1)
    assert torch.allclose(icl.linear_readout(u * U, z), step)


def test_isserlis_moments_by_monte_carlo(cov):
    N, x = 4, randn(400_000, 4, 3) @ torch.linalg.cholesky(cov).T
    S = x.mT @ x / N
    for M in (cov, torch.eye(3, dtype=torch.float64), randn(3, 3, seed=3)):
        exact = lsa.sandwich(cov, M, N)
        assert torch.allclose((S @ M @ S).mean(0), exact, atol=0.02 * exact.abs().max().item())
    assert torch.allclose(
        lsa.sandwich(cov, torch.eye(3, dtype=torch.float64), N), lsa.gamma(cov, N) @ cov
    )


@pytest.mark.parametrize("seed", range(3))
def test_population_loss_of_dense_matrices_by_monte_carlo(cov, seed):
    PV, KQ = 0.4 * randn(4, 4, seed=seed), 0.4 * randn(4, 4, seed=seed + 50)
    samples = sampled_loss(PV, KQ, cov, 4, 400_000)
    error = samples.std() / 400_000**0.5
    assert (samples.mean() - lsa.population_loss(PV, KQ, cov, 4)).abs() < 4 * error
    assert error < 0.02 * samples.mean()


def test_population_loss_stacks():
    PV, KQ, cov = randn(5, 4, 4), randn(5, 4, 4, seed=1), icl.covariance(3, 5)
    stacked = lsa.population_loss(PV, KQ, cov, 6)
    one = [lsa.population_loss(PV[i], KQ[i], cov, 6) for i in range(5)]
    assert stacked.shape == (5,) and torch.allclose(stacked, torch.stack(one))


def test_reduced_loss_is_the_full_loss_on_the_invariant_blocks(cov):
    H, m = lsa.quadratic(cov[None], 6)
    PV, KQ = lsa.initialize(randn(3, 3), cov, 6)
    PV.requires_grad_(), KQ.requires_grad_()
    g_PV, g_KQ = torch.autograd.grad(lsa.population_loss(PV, KQ, cov, 6), (PV, KQ))
    du, dU = lsa.reduced_gradient(PV[3, 3], KQ[:3, :3], H, m)
    assert torch.allclose(g_PV[3, 3], du) and torch.allclose(g_KQ[:3, :3], dU)
    u, U = PV[3, 3].detach(), KQ[:3, :3].detach()
    quad = u**2 * U.flatten() @ H @ U.flatten() / 2 - u * (m * U).sum() + cov.trace() / 2
    assert torch.allclose(quad, lsa.population_loss(PV, KQ, cov, 6))


def test_zero_blocks_have_exactly_zero_gradient(cov):
    PV, KQ = lsa.initialize(randn(3, 3), cov, 6)
    PV.requires_grad_(), KQ.requires_grad_()
    g_PV, g_KQ = torch.autograd.grad(lsa.population_loss(PV, KQ, cov, 6), (PV, KQ))
    assert g_PV[:-1].abs().max() == 0 and g_PV[-1, :-1].abs().max() == 0
    assert g_KQ[-1].abs().max() == 0 and g_KQ[:, -1].abs().max() == 0
    assert g_PV[-1, -1] != 0 and g_KQ[:3, :3].abs().min() > 0


def test_zero_blocks_have_zero_gradient_on_prompts_paired_with_minus_w(cov):
    """The reason, without the closed form: that gradient is odd in w, whatever the inputs."""
    PV, KQ = lsa.initialize(randn(3, 3), cov, 6)
    PV.requires_grad_(), KQ.requires_grad_()
    w = icl.tasks(50, 3, gen())
    x, y = icl.prompts(w, cov, 7, gen(1))
    x, y = torch.cat([x, x]), torch.cat([y, -y])
    out = lsa.predict(icl.embed(x[:, :6], y[:, :6], x[:, 6]), PV, KQ)
    g_PV, g_KQ = torch.autograd.grad((out - y[:, 6]).square().mean(), (PV, KQ))
    assert g_PV[-1, :-1].abs().max() < 1e-14 and g_KQ[-1, :3].abs().max() < 1e-14


def test_closed_form_minimum_is_stationary_for_the_full_loss(cov):
    H, m = lsa.quadratic(cov[None], 6)
    u, U = lsa.minimum(H, m)
    inverse = torch.linalg.inv(lsa.gamma(cov, 6))
    assert torch.allclose(u * U, inverse)
    # Theorem 4.1's own scaling
    assert torch.allclose(u, (inverse @ inverse).trace() ** 0.25)
    assert torch.allclose(U, inverse * (inverse @ inverse).trace() ** -0.25)
    PV, KQ = torch.zeros(2, 4, 4, dtype=torch.float64)
    PV[3, 3], KQ[:3, :3] = u, U
    PV.requires_grad_(), KQ.requires_grad_()
    loss = lsa.population_loss(PV, KQ, cov, 6)
    grads = torch.autograd.grad(loss, (PV, KQ))
    assert max(g.abs().max() for g in grads) < 1e-10
    # global: no dense matrices do better
    other = lsa.population_loss(randn(200, 4, 4, seed=3), randn(200, 4, 4, seed=4), cov, 6)
    assert (other > loss).all()


def test_gradient_flow_reaches_the_minimum_and_conserves_the_balance(cov):
    H, m = lsa.quadratic(cov[None], 6)
    PV, KQ = lsa.initialize(randn(4, 3, 3), cov, 6)
    PV, KQ = PV[..., 3, 3], KQ[..., :3, :3]

    def gradient(u, U):
        return lsa.reduced_gradient(u, U, H, m)

    u, U = lsa.gradient_flow(gradient, (PV, KQ), 0.2, 2000, every=100)
    assert u.shape == (21, 4) and U.shape == (21, 4, 3, 3)
    u_star, U_star = lsa.minimum(H, m)
    assert (u[-1] - u_star).abs().max() < 1e-5 and (U[-1] - U_star).abs().max() < 1e-5
    balance = u**2 - U.square().sum((-2, -1))
    assert (balance - balance[0]).abs().max() < 1e-3
    # Euler steps of the same size do not conserve it, so the check can fail
    a, b = PV, KQ
    for _ in range(200):
        da, db = gradient(a, b)
        a, b = a - 0.2 * da, b - 0.2 * db
    assert (a**2 - b.square().sum((-2, -1))).abs().max() > 1e-3


def test_sharpness_is_the_largest_hessian_eigenvalue(cov):
    H, m = lsa.quadratic(cov[None], 6)
    u, U = lsa.minimum(H, m)

    def loss(v):
        A = v[0] * v[1:]
        return A @ H @ A / 2 - A @ m.flatten()

    hessian = torch.autograd.functional.hessian(loss, torch.cat([u[None], U.flatten()]))
    assert torch.allclose(lsa.sharpness(H, m), torch.linalg.eigvalsh(hessian)[-1])


def test_runge_kutta_is_fourth_order():
    start = (torch.tensor(1.0, dtype=torch.float64),)
    exact = torch.exp(torch.tensor(-1.0, dtype=torch.float64))
    errors = [
        (lsa.gradient_flow(lambda a: (a,), start, 1 / n, n)[0][-1] - exact).abs() for n in (10, 20)
    ]
    assert 14 < errors[0] / errors[1] < 18


def test_quadratic_stacks_prompt_lengths_and_averages_covariances(cov):
    H, _ = lsa.quadratic(cov[None], torch.tensor([5.0, 50.0], dtype=torch.float64))
    for i, N in enumerate((5.0, 50.0)):
        assert torch.allclose(H[i], lsa.quadratic(cov[None], N)[0])
    two = torch.stack([cov, 2 * cov])
    H2, m2 = lsa.quadratic(two, 5.0)
    separately = [lsa.quadratic(c[None], 5.0) for c in two]
    assert torch.allclose(H2, (separately[0][0] + separately[1][0]) / 2)
    assert torch.allclose(m2, (separately[0][1] + separately[1][1]) / 2)


def test_random_covariance_minimum_is_the_papers():
    """Diagonal Λ_τ: u U = E[Γ_τ Λ_τ²]⁻¹ E[Λ_τ²]."""
    covs = icl.exponential_covariances(50, 3, gen())
    u, U = lsa.minimum(*lsa.quadratic(covs, 7))
    paper = torch.linalg.inv((lsa.gamma(covs, 7) @ covs @ covs).mean(0)) @ (covs @ covs).mean(0)
    assert torch.allclose(u * U, paper)


def test_best_rate_minimizes_the_loss_over_multiples_of_the_identity(cov):
    H, m = lsa.quadratic(cov[None], 6)
    rate = lsa.best_rate(H, m).requires_grad_()
    U = torch.eye(3, dtype=torch.float64)
    loss = rate**2 * U.flatten() @ H @ U.flatten() / 2 - rate * (m * U).sum()
    assert torch.autograd.grad(loss, rate)[0].abs() < 1e-12


@pytest.mark.parametrize("link, noise", [("linear", 0.0), ("linear", 0.5), ("relu", 0.0)])
def test_risk_formula_by_monte_carlo(cov, link, noise):
    N, M, n = 6, 12, 200_000
    w = randn(1, 3, seed=5).expand(n, 3)
    A = torch.linalg.inv(lsa.gamma(cov, N))
    _, z = icl.moments(w, cov, [M], gen(), noise=noise, link=link)
    a, _ = icl.best_linear(w[:1], cov, link)
    measured = icl.excess_risk(icl.linear_readout(A, z[0]), a, cov).mean()
    x, y = icl.prompts(w[:1], cov, 1_000_000, gen(1), noise=noise, link=link)
    Sigma = torch.cov((x * y[..., None])[0].T)
    theory = lsa.excess_risk(cov, a[0], Sigma, N, M)
    assert measured.item() == pytest.approx(theory.item(), rel=0.02)


def test_float32_and_shapes():
    cov = icl.covariance(3, 5, dtype=torch.float32)
    PV, KQ = lsa.initialize(randn(2, 3, 3).float(), cov, 6)
    assert PV.dtype == KQ.dtype == torch.float32 and PV.shape == (2, 4, 4)
    assert lsa.population_loss(PV, KQ, cov, 6).dtype == torch.float32
    assert lsa.minimum(*lsa.quadratic(cov[None], 6))[1].dtype == torch.float32
    assert lsa.population_loss(*(t.to("meta") for t in (PV, KQ, cov)), 6).device.type == "meta"


def test_errors_name_the_value(cov):
    with pytest.raises(ValueError, match=r"\[\.\.\., 4, 4\]"):
        lsa.predict(randn(2, 4, 6), randn(3, 3), randn(4, 4))
    with pytest.raises(ValueError, match=r"got 1\.5"):
        lsa.initialize(randn(3, 3), cov, 6, scale=1.5)
