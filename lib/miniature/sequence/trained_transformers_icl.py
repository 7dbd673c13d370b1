r"""Trained Transformers Learn Linear Models In-Context (Zhang, Frei, Bartlett, JMLR 2024).

arXiv 2306.09927. A linear self-attention layer reads the prompt matrix E of N examples (x_i, y_i)
and a query (x_q, 0),

    f(E) = E + W^PV E (Eᵀ W^KQ E) / N,        prediction  ŷ = f(E)_{d+1, N+1},

and W^PV, W^KQ follow gradient flow on the population loss  L = ½ E (ŷ - w·x_q)²,  where
x ~ N(0, Λ), w ~ N(0, I), y = w·x. From the start of `initialize` the layer stays of the form

    ŷ = u x_qᵀ Uᵀ (1/N) Σ y_i x_i,        u = W^PV_{d+1,d+1},  U = W^KQ_{1:d,1:d},

and u U converges to Γ⁻¹ with  Γ = (1 + 1/N) Λ + tr(Λ)/N I : one gradient step from zero with a
fixed preconditioner, learned from the training covariance.

All expectations are closed forms (Gaussian moments), so the loss and its gradient are exact.
Matrices may carry leading axes: many seeds, or many training lengths N, run as one.
"""

import torch
from torch import Tensor


def gamma(cov: Tensor, N) -> Tensor:
    """Γ = (1 + 1/N) Λ + tr(Λ)/N I  (Theorem 4.1), for cov [..., d, d] and N a number or [...]."""
    N = torch.as_tensor(N, dtype=cov.dtype, device=cov.device)[..., None, None]
    trace = cov.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    return (1 + 1 / N) * cov + trace / N * torch.eye(
        cov.shape[-1], dtype=cov.dtype, device=cov.device
    )


def sandwich(cov: Tensor, M: Tensor, N) -> Tensor:
    """E[S M S] = ΛMΛ + (ΛMᵀΛ + tr(MΛ)Λ)/N for S = (1/N) Σ x_i x_iᵀ, x_i ~ N(0, Λ) (Isserlis)."""
    trace = (M @ cov).diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    return cov @ M @ cov + (cov @ M.mT @ cov + trace * cov) / N


def predict(E: Tensor, PV: Tensor, KQ: Tensor) -> Tensor:
    """The layer's prediction f(E)_{d+1, M+1}, with M, the length of this prompt, as the divisor.

    Parameters
    ----------
    E : Tensor [..., B, d + 1, M + 1]
        Prompt matrices (`icl.embed`).
    PV, KQ : Tensor [..., d + 1, d + 1]
        W^PV and W^KQ.

    Returns
    -------
    Tensor [..., B]

    Raises
    ------
    ValueError
        If the matrices are not (d + 1) x (d + 1).
    """
    k = E.shape[-2]
    if PV.shape[-2:] != (k, k) or KQ.shape[-2:] != (k, k):
        raise ValueError(
            f"E {list(E.shape)} has d + 1 = {k} rows, so PV and KQ must be [..., {k}, {k}], "
            f"got {list(PV.shape)} and {list(KQ.shape)}"
        )
    query = E[..., -1:]
    scores = E.mT @ (KQ.unsqueeze(-3) @ query) / (E.shape[-1] - 1)
    return (query + PV.unsqueeze(-3) @ (E @ scores))[..., -1, 0]


def initialize(theta: Tensor, cov: Tensor, N, scale: float = 0.5) -> tuple[Tensor, Tensor]:
    """W^PV(0), W^KQ(0) of Assumption 3.3: σ in the corner, σ ΘΘᵀ / |ΘΘᵀ|_F in the d x d block.

    Parameters
    ----------
    theta : Tensor [..., d, d]
        Θ, with Θ Λ != 0.
    scale : float in (0, 1)
        σ² as a fraction of the bound 2 / (|Γ| sqrt(d)) of Theorem 4.1.

    Raises
    ------
    ValueError
        If ``scale`` is outside (0, 1), where the theorem does not apply.
    """
    if not 0 < scale < 1:
        raise ValueError(f"scale must lie in (0, 1): Theorem 4.1 needs σ²|Γ|√d < 2, got {scale}")
    d = cov.shape[-1]
    norm = torch.linalg.matrix_norm(gamma(cov, N), ord=2)
    sigma = (2 * scale / (norm * d**0.5)).sqrt()[..., None, None]
    outer = theta @ theta.mT
    outer = outer / torch.linalg.matrix_norm(outer)[..., None, None]
    PV = outer.new_zeros(*outer.shape[:-2], d + 1, d + 1)
    KQ = PV.clone()
    PV[..., -1:, -1:] = sigma
    KQ[..., :d, :d] = sigma * outer
    return PV, KQ


def population_loss(PV: Tensor, KQ: Tensor, cov: Tensor, N) -> Tensor:
    """Exact L(W^PV, W^KQ) [...] of the full layer: no block is assumed to be zero.

    Only the last row (p, r) of W^PV and the first d columns (Q; qᵀ) of W^KQ reach the prediction,
    a part odd in w (it can match w·x_q) plus a part even in w (pure error), with no cross term.
    """
    p, r = PV[..., -1, :-1, None], PV[..., -1:, -1:]
    Q, q = KQ[..., :-1, :-1], KQ[..., -1, :-1, None]
    eye = torch.eye(cov.shape[-1], dtype=cov.dtype, device=cov.device)

    def dot(X, Y):  # tr(Xᵀ Y)
        return (X * Y).sum((-2, -1), keepdim=True)

    # odd: wᵀ (S A - I) x_q with A = p qᵀ + r Q, averaged over w, x_q and the prompt's S
    A = p @ q.mT + r * Q
    t, cov2 = dot(eye, cov), cov @ cov
    odd = dot(sandwich(cov, eye, N) @ A @ cov, A) - 2 * dot(cov2, A) + t

    # even: b·x_q + c with b = QᵀS p + r (wᵀS w) q, and c = (p·x_q)(x_qᵀQ x_q)/N, which comes from
    # the query's own column of E
    t2 = dot(cov, cov)
    wSw = t**2 + 2 * t2 / N + 2 * (t2 + (t2 + t**2) / N)  # E (wᵀS w)²
    cp, cq = cov @ p, cov @ q
    pcp, Qcp, trQ = dot(p, cp), Q.mT @ cp, dot(Q, cov)
    bb = (1 + 1 / N) * dot(Qcp, cov @ Qcp) + dot(cov @ Q, Q @ cov) * pcp / N
    bb = bb + r**2 * wSw * dot(q, cq) + 2 * r * dot(Q @ cq, t * cp + 2 * (cov @ cp) / N)
    sym = (Q + Q.mT) / 2
    scp, scov = sym @ cp, sym @ cov
    bc = dot(Qcp + r * t * q, trQ * cp + 2 * (cov @ scp)) / N
    cc = pcp * (trQ**2 + 2 * dot(scov.mT, scov)) + 4 * trQ * dot(cp, scp)
    cc = (cc + 8 * dot(scp, cov @ scp)) / N**2
    return (odd + bb + 2 * bc + cc).squeeze((-2, -1)) / 2


def quadratic(covs: Tensor, N) -> tuple[Tensor, Tensor]:
    """H and m of the reduced loss  L(u, U) = ½ u² <U, H U> - u <m, U> + ½ tr E[Λ].

    Parameters
    ----------
    covs : Tensor [..., T, d, d]
        The training covariances Λ_1..Λ_T, equally likely; T = 1 is the fixed-covariance setting.
    N : number or Tensor [...]
        Training prompt length.

    Returns
    -------
    H : Tensor [..., d², d²]
        E[Γ_τ Λ_τ ⊗ Λ_τ], acting on the row-major vec of U as  U -> E[Γ_τ Λ_τ U Λ_τ].
    m : Tensor [..., d, d]
        E[Λ_τ²].
    """
    d = covs.shape[-1]
    N = torch.as_tensor(N, dtype=covs.dtype, device=covs.device)[..., None]
    H = torch.einsum("...tij,...tkl->...ikjl", gamma(covs, N) @ covs, covs) / covs.shape[-3]
    return H.reshape(*H.shape[:-4], d * d, d * d), (covs @ covs).mean(-3)


def reduced_gradient(u: Tensor, U: Tensor, H: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient of the reduced loss in u [...] and U [..., d, d]: all that moves in the flow."""
    HU = (H @ U.flatten(-2)[..., None]).reshape(U.shape)
    du = u * (U * HU).sum((-2, -1)) - (m * U).sum((-2, -1))
    u = u[..., None, None]
    return du, u**2 * HU - u * m


def minimum(H: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
    """The balanced global minimum (u⋆, U⋆): u⋆U⋆ = H⁻¹m  (= Γ⁻¹ for one Λ), with u⋆² = |U⋆|_F²."""
    A = torch.linalg.solve(H, m.flatten(-2)).reshape(m.shape)
    u = torch.linalg.matrix_norm(A).sqrt()
    return u, A / u[..., None, None]


def sharpness(H: Tensor, m: Tensor) -> Tensor:
    """Largest curvature [...] of the reduced loss at its minimum: the scale of a stable step.

    There the Hessian is Jᵀ H J with J = (vec U⋆, u⋆ I), so its nonzero spectrum is that of (JJᵀ) H.
    """
    u, U = minimum(H, m)
    v = U.flatten(-2)
    eye = torch.eye(v.shape[-1], dtype=m.dtype, device=m.device)
    JJ = u[..., None, None] ** 2 * eye + v[..., :, None] * v[..., None, :]
    return torch.linalg.eigvals(JJ @ H).real.amax(-1)


def best_rate(H: Tensor, m: Tensor) -> Tensor:
    """The scalar η [...] that minimizes the same loss over u U = η I: plain descent at its best."""
    eye = torch.eye(m.shape[-1], dtype=m.dtype, device=m.device).flatten()
    return m.diagonal(dim1=-2, dim2=-1).sum(-1) / (H @ eye @ eye)


def gradient_flow(gradient, start: tuple[Tensor, ...], step: float, steps: int, every: int = 1):
    """Integrate dθ/dt = -gradient(*θ) with the classical fourth-order Runge-Kutta method.

    Returns the trajectory: one tensor [1 + steps // every, ...] per entry of ``start``.
    """
    theta, path = start, [start]

    def slope(h, k):
        return gradient(*[a - h * b for a, b in zip(theta, k)])

    for i in range(1, steps + 1):
        k1 = gradient(*theta)
        k2 = slope(step / 2, k1)
        k3 = slope(step / 2, k2)
        k4 = slope(step, k3)
        theta = tuple(
            a - step / 6 * (b + 2 * c + 2 * d + e) for a, b, c, d, e in zip(theta, k1, k2, k3, k4)
        )
        if i % every == 0:
            path.append(theta)
    return tuple(torch.stack(p) for p in zip(*path))


def excess_risk(cov: Tensor, a: Tensor, Sigma: Tensor, N, M) -> Tensor:
    """Theorem 4.2: risk of the trained layer at prompt length M, above the best linear predictor's.

    tr(Σ Γ⁻² Λ)/M + (|a|²_{Γ⁻²Λ³} + 2 tr(Λ) |a|²_{Γ⁻²Λ²} + tr(Λ)² |a|²_{Γ⁻²Λ})/N²,  an equality.

    Parameters
    ----------
    cov : Tensor [d, d]
        Λ, of training and test inputs alike.
    a : Tensor [..., d]
        Best linear predictor Λ⁻¹ E[x y] of the test labels.
    Sigma : Tensor [..., d, d]
        Covariance of x y under the test distribution.
    """
    G2 = torch.linalg.matrix_power(gamma(cov, N), -2)
    t = cov.diagonal().sum()
    bias = G2 @ (cov @ cov @ cov + 2 * t * cov @ cov + t**2 * cov)
    variance = (Sigma @ G2 @ cov).diagonal(dim1=-2, dim2=-1).sum(-1)
    return variance / M + torch.einsum("...i,ij,...j->...", a, bias, a) / N**2
