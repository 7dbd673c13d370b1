r"""Matrix completion by alternating minimization with approximate least-squares steps.

Gu, Song, Yin and Zhang, "Low Rank Matrix Completion via Robust Alternating Minimization in Nearly
Linear Time", ICLR 2024, arXiv:2302.11068. The loop is that of Jain, Netrapalli and Sanghavi,
"Low-rank Matrix Completion using Alternating Minimization", STOC 2013, arXiv:1212.0467.

M = U* Sigma V*^T [m, n] has rank k; its entries are seen on Omega, each with probability p. The set
Omega is split into 2T + 1 parts, or used again and again. U_0 is the top-k left singular space of
(1/p) P_Omega_0(M), rows longer than 2 mu sqrt(k/m) set to zero. Then, for t = 0 .. T-1,

    V_{t+1} ~ argmin_V |P_Omega_{t+1}(M - U_t V^T)|_F^2,
    U_{t+1} ~ argmin_U |P_Omega_{T+t+1}(M - U V_{t+1}^T)|_F^2,

with a QR before each use. A half-step falls apart into one problem a column j with observed rows
Omega_j: v_j = argmin |A v - y|, A = U[Omega_j] of shape [|Omega_j|, k]. Exactly, that costs
O(|Omega_j| k^2).

The one idea: *sketch and precondition, and ask for forward error*. A sketch S A of s = O(k log k)
rows gives Q R = S A, a start v_0 = argmin |S (A v - y)|, and a preconditioner: the singular values
of A R^-1 lie in [1/(1 + gamma), 1/(1 - gamma)], whatever those of A. So

    v <- v - omega R^-1 R^-T A^T (A v - y),
    omega = 2 / (sigma_max^2 + sigma_min^2) = (1 - gamma^2)^2 / (1 + gamma^2),

contracts by 2 gamma / (1 + gamma^2) an iteration, at O(|Omega_j| k) each; conjugate gradients take
their own steps. The analysis shows how much error the loop forgives: rows of V off by eps_0 leave
the incoherence of the iterates alone, and

    dist(V_{t+1}, V*) <= 1/4 dist(U_t, U*) + O(eps_0),     dist(A, B) = |A_perp^T B|_2.

Every half-step is a callable ``(side, U) -> V`` on one `Side` of the observations, for all seeds
and columns at once: `Exact` (normal equations), `Perturbed` (exact, plus an error of chosen size),
and `Sketched` (``iterations=0`` is the one-shot sketch). Rivals: `scaled_gd` (Tong, Ma and Chi
2021) and `soft_impute` (Mazumder, Hastie and Tibshirani 2010). All count their flops.
"""

import math
from collections import Counter, namedtuple
from functools import cached_property

import torch
from scipy.linalg import hadamard
from torch.linalg import qr, solve_triangular

from .counting import qr_ops, solve_ops, wht_ops

Problem = namedtuple("Problem", "M U V sigma")  # [S, m, n]; orthonormal [S, m, k], [S, n, k]; [k]
SKETCHES = ("gaussian", "srht", "countsketch")


def generators(seeds, stream):
    """One CPU generator a seed; another stream gives numbers that have nothing to do with these."""
    return [torch.Generator().manual_seed(seed * 101 + stream) for seed in seeds]


def draw(gens, kind, *shape):
    """Random tensors [S, *shape], float64 on the CPU, a generator a seed; kind: 'randn', 'rand'."""
    return torch.stack([getattr(torch, kind)(*shape, generator=g) for g in gens]).double()


def low_rank(seeds, m, n, k, kappa=1.0, spiky=False, noise=0.0, device="cpu", dtype=torch.float64):
    """Random matrices of rank k whose entries have mean square 1.

    Parameters
    ----------
    seeds : sequence of int
        One matrix each.
    m, n, k : int
    kappa : float
        sigma_1 / sigma_k; the singular values between are geometric.
    spiky : bool
        Whether one left singular vector lives in the first row alone, mu = sqrt(m/k); otherwise the
        factors are incoherent.
    noise : float
        Standard deviation of Gaussian noise on every entry of M (U, V and sigma stay those of the
        clean matrix).

    Raises
    ------
    ValueError
        If k is not in 1..min(m, n) or kappa < 1.
    """
    if not 1 <= k <= min(m, n):
        raise ValueError(f"k must lie in 1..{min(m, n)}, the smaller side, not {k}")
    if kappa < 1:
        raise ValueError(f"kappa is a condition number, at least 1, not {kappa}")
    g = generators(seeds, 0)
    left, right = draw(g, "randn", m, k), draw(g, "randn", n, k)
    if spiky:
        left[:, :, 0] = torch.eye(m)[0]
    U, V = qr(left)[0], qr(right)[0]
    sigma = torch.logspace(0, -math.log10(kappa), k, dtype=torch.float64)
    sigma = sigma * math.sqrt(m * n) / sigma.norm()
    M = U * sigma @ V.mT
    if noise:
        M = M + noise * draw(g, "randn", m, n)
    return Problem(*(x.to(device, dtype) for x in (M, U, V, sigma)))


def incoherence(U):
    """mu [S]: the smallest one with |U_i| <= mu sqrt(k/m) for all rows i of an orthonormal U."""
    m, k = U.shape[-2:]
    return U.norm(dim=-1).amax(-1) * math.sqrt(m / k)


def sample(problem, p, seeds):
    """Omega: a mask [S, m, n], each entry seen with probability p."""
    if not 0 < p <= 1:
        raise ValueError(f"p is the probability of seeing an entry, in (0, 1], not {p}")
    return (draw(generators(seeds, 1), "rand", *problem.M.shape[1:]) < p).to(problem.M.device)


def split(mask, parts, seeds):
    """Ω at random into disjoint parts Ω_0 .. Ω_{parts-1}: a list of masks like the one given."""
    label = draw(generators(seeds, 2), "rand", *mask.shape[1:]).mul(parts).long().to(mask.device)
    return [mask & (label == i) for i in range(parts)]


class Side:
    """The observations, column by column; for those of the rows pass ``M.mT, mask.mT``.

    Parameters
    ----------
    M : Tensor [S, m, n]
    mask : Tensor [S, m, n], bool

    Attributes
    ----------
    mask, values : Tensor [S, n, m]
        1 and the entry where it is seen, 0 elsewhere.
    seen : Tensor [S, n]
        Number of entries of each column.
    entries : Tensor [S]
        |Omega|, on the CPU: what flops are counted in.
    """

    def __init__(self, M, mask):
        self.mask = mask.mT.to(M.dtype).contiguous()
        self.values, self.seen = M.mT * self.mask, mask.sum(1)
        self.entries = self.seen.sum(1).double().cpu()

    @cached_property
    def lists(self):
        """The same as lists, padded to the longest column: index, weight and y, each [S, n, L].

        The padding has weight 0.
        """
        L = max(int(self.seen.max()), 1)
        # stable: the seen rows first, in their order
        index = self.mask.to(torch.uint8).sort(dim=-1, descending=True, stable=True)[1][..., :L]
        return index, self.mask.gather(-1, index), self.values.gather(-1, index)


def initialize(M, mask, k, mu):
    """Step 2: the top-k left singular space of P_Omega(M), without rows that are too long.

    The factor 1/p of the paper leaves singular vectors as they are.

    Parameters
    ----------
    M : Tensor [S, m, n]
    mask : Tensor [S, m, n], bool
        Omega_0.
    k : int
    mu : Tensor [S]
        Incoherence.

    Returns
    -------
    Tensor [S, m, k]
        Orthonormal columns.
    """
    A = M * mask
    U = torch.linalg.eigh(A @ A.mT).eigenvectors[..., -k:]
    longest = 2 * mu * math.sqrt(k / M.shape[1])
    return qr(U * (U.norm(dim=-1, keepdim=True) <= longest[:, None, None]))[0]


def dist(A, B):
    """|A_perp^T B|_2 [S], the sine of the largest principal angle; A, B [S, n, k] orthonormal.

    A_perp^T B has the singular values of (I - A A^T) B, which does not cancel at small angles.
    """
    X = B - A @ (A.mT @ B)
    return torch.linalg.eigvalsh(X.mT @ X)[..., -1].clamp_min(0).sqrt()  # largest singular value


def relative_error(problem, L, R):
    """|L R^T - M|_F / |M|_F [S], M without noise; by the triangles of [L, U* Sigma] and [R, V*]."""
    left = qr(torch.cat([L, -problem.U * problem.sigma], 2), mode="r")[1]
    right = qr(torch.cat([R, problem.V], 2), mode="r")[1]
    return torch.linalg.matrix_norm(left @ right.mT) / problem.sigma.norm()


# Half-steps. Each keeps in `ops` the flops it has spent, a number a seed for each kind of work.


def normal_equations(entries, columns, k):
    """Flops of `Exact`: Gram matrices and right sides from the entries, then Cholesky."""
    return (k * (k + 1) + 2 * k) * entries + columns * solve_ops(k)


class Exact:
    """V by normal equations: A^T A v = A^T y for every column."""

    def __init__(self):
        self.ops = Counter()

    def __call__(self, side, U):
        S, _, k = U.shape
        a, b = torch.triu_indices(k, k, device=U.device)
        gram = U.new_empty(S, side.mask.shape[1], k, k)  # sum of u_i u_i^T over the seen rows i
        gram[..., a, b] = gram[..., b, a] = side.mask @ (U[..., a] * U[..., b])
        # nothing where A has rank k; where a column has fewer than k entries it keeps v finite
        ridge = 1e-13 * gram.diagonal(dim1=-2, dim2=-1).mean(-1) + 1e-300
        gram = gram + ridge[..., None, None] * torch.eye(k, dtype=U.dtype, device=U.device)
        V = torch.cholesky_solve((side.values @ U)[..., None], torch.linalg.cholesky(gram))
        self.ops["normal equations"] += normal_equations(side.entries, gram.shape[1], k)
        return V[..., 0]


class Perturbed(Exact):
    """Exact, then an error of chosen size: |V^ - V|_F = eps_0 |V|_F, spread evenly over the rows.

    Parameters
    ----------
    eps : float
        eps_0.
    seeds : sequence of int
    """

    def __init__(self, eps, seeds):
        super().__init__()
        self.eps, self.gens = eps, generators(seeds, 3)

    def __call__(self, side, U):
        V = super().__call__(side, U)
        E = draw(self.gens, "randn", *V.shape[1:]).to(V)
        E = E / E.norm(dim=-1, keepdim=True)  # every row errs by the same length
        return V + self.eps * V.square().sum(-1).mean(-1).sqrt()[:, None, None] * E


class Sketched:
    """V by sketch and precondition, columns independently of each other.

    Parameters
    ----------
    seeds : sequence of int
        Of the sketches; each column of each half-step has a fresh one.
    rows : int, optional
        s, rows of the sketch; 4 k (1 + ln k) if not given.
    iterations : int
        At most that many; 0 is the one-shot sketch, v_0.
    tol : float
        A column is done once its preconditioned gradient is below tol times that at v = 0.
    sketch : {"gaussian", "srht", "countsketch"}

    Raises
    ------
    ValueError
        If the sketch is unknown or has fewer rows than columns, or iterations < 0.
    """

    def __init__(self, seeds, rows=None, iterations=10, tol=0.0, sketch="srht"):
        if sketch not in SKETCHES:
            raise ValueError(f"sketch must be one of {', '.join(SKETCHES)}, not {sketch!r}")
        if iterations < 0:
            raise ValueError(f"iterations must not be negative, not {iterations}")
        self.gens, self.rows, self.iterations = generators(seeds, 4), rows, iterations
        self.tol, self.sketch, self.ops = tol, sketch, Counter()

    def __call__(self, side, U):
        index, weight, y = side.lists
        (S, n, _), k = index.shape, U.shape[-1]
        row = torch.arange(S, device=U.device)[:, None, None] * U.shape[1] + index
        A = U.reshape(-1, k)[row] * weight[..., None]
        return self.solve(A, y, side.entries / n)

    def solve(self, A, y, seen=None):
        """min |A v - y| for A [S, n, L, k] and y [S, n, L]: v [S, n, k].

        `seen` [S] is the mean number of rows that are not padding, for the count of flops.
        """
        S, n, L, k = A.shape
        s = self.rows or sketch_rows(k)
        if s < k:
            raise ValueError(f"a sketch of {s} rows cannot hold {k} columns: rows >= {k}")
        Ay = torch.cat([A, y[..., None]], -1).reshape(S * n, L, k + 1)
        SA, Sy = sketched(Ay, s, self.sketch, self.gens).split([k, 1], -1)
        R, v = start(SA, Sy)
        A, y = A.reshape(S * n, L, k), y.reshape(S * n, L, 1)
        v, steps = refine(A, y, R, v, self.iterations, self.tol)
        seen = torch.full((S,), float(L)) if seen is None else seen
        self.ops["sketch"] += n * sketch_ops(seen, k + 1, s, self.sketch)
        self.ops["QR of the sketch"] += n * (qr_ops(s, k) + 4 * s * k + k**2)
        per_step = 4 * seen * k + 2 * k**2 + 4 * seen + 6 * k  # A, A^T, R, R^T, vector updates
        self.ops["iterations"] += steps.view(S, n).sum(1).cpu() * per_step
        return v.view(S, n, k)


def sketch_rows(k):
    """s = 4 k (1 + ln k), of the order k log k."""
    return int(4 * k * (1 + math.log(k)))


def sketch_ops(length, columns, rows, kind):
    """Flops [S] of one sketch of a matrix [length, columns], for lengths [S]."""
    if kind == "gaussian":
        return 2 * rows * length * columns
    if kind == "countsketch":
        return 2 * length * columns
    padded = 2 ** math.ceil(math.log2(max(float(length.max()), 2)))
    return columns * (length + wht_ops(padded) + rows)  # signs, transform, scale


def sketched(A, rows, kind, gens):
    """S A for A [S * n, L, c], a fresh S [rows, L] for every one of the S * n matrices.

    E |S x|^2 = |x|^2. 'gaussian': entries N(0, 1/rows); 'srht': random signs, a Walsh-Hadamard
    transform, `rows` of its rows at random (with replacement where rows > L); 'countsketch': each
    row of A with a random sign into one random row of S A.
    """
    B, L, c = A.shape
    n = B // len(gens)
    if kind == "gaussian":
        return draw(gens, "randn", n, rows, L).to(A).view(B, rows, L) @ A / math.sqrt(rows)
    sign = (draw(gens, "rand", n, L) < 0.5).to(A).view(B, L, 1) * 2 - 1
    if kind == "countsketch":
        bucket = (draw(gens, "rand", n, L) * rows).long().to(A.device).view(B, L, 1)
        return A.new_zeros(B, rows, c).scatter_add(1, bucket.expand(-1, -1, c), sign * A)
    padded = 2 ** math.ceil(math.log2(max(L, 2)))
    H = wht(torch.nn.functional.pad(sign * A, (0, 0, 0, padded - L)))
    if rows <= padded:
        chosen = draw(gens, "rand", n, padded).view(B, padded).topk(rows).indices
    else:
        chosen = (draw(gens, "rand", n, rows) * padded).long().view(B, rows)
    chosen = chosen.to(A.device)[..., None].expand(-1, -1, c)
    return H.gather(1, chosen) / math.sqrt(rows)


def wht(x):
    """Walsh-Hadamard transform (entries +1, -1) along axis 1, whose length L is a power of 2.

    H_L = H_a (x) H_b: two small dense products, in a batch faster than log2 L passes of additions.
    """
    B, L, c = x.shape
    a = 2 ** ((L.bit_length() - 1) // 2)
    left, right = (torch.as_tensor(hadamard(n)).to(x) for n in (a, L // a))
    return (right @ (left @ x.reshape(B, a, -1)).view(B * a, -1, c)).view(B, L, c)


def start(SA, Sy):
    """Q R = S A, and v_0 = argmin |S A v - S y|: R [B, k, k], v_0 [B, k, 1].

    Q is never formed: the last column of the triangle of [S A, S y] is Q^T S y. Below S A stands a
    multiple of I, 1e-12 of its size: it keeps R invertible where a column has fewer than k entries,
    and is nothing elsewhere.
    """
    k = SA.shape[-1]
    tiny = 1e-12 * torch.linalg.matrix_norm(SA)[:, None, None] + 1e-300
    below = tiny * torch.eye(k, k + 1, dtype=SA.dtype, device=SA.device)
    triangle = qr(torch.cat([torch.cat([SA, Sy], 2), below], 1), mode="r")[1]
    R, Qy = triangle[:, :k].split([k, 1], -1)
    return R, solve_triangular(R, Qy, upper=True)


def refine(A, y, R, v, iterations, tol=0.0, omega=None, trace=None):
    """Iterate on min |A v - y| with the preconditioner R; A is touched once forth and back each.

    Parameters
    ----------
    A, y : Tensor [B, L, k], [B, L, 1]
    R : Tensor [B, k, k]
        Upper triangular; the identity makes it plain gradient descent.
    v : Tensor [B, k, 1]
        Start.
    iterations : int
    tol : float
        Stop when |R^-T A^T (y - A v)| <= tol |R^-T A^T y| for all B.
    omega : float or Tensor [B, 1, 1], optional
        Fixed step; None for conjugate gradients (on A R^-1).
    trace : callable, optional
        Called with v after each iteration.

    Returns
    -------
    v : Tensor [B, k, 1]
    steps : Tensor [B]
        Iterations that each of the B needed.
    """

    def back(r):
        return solve_triangular(R.mT, A.mT @ r, upper=False)

    r = y - A @ v
    g = back(r)
    # beyond rounding conjugate gradients would go astray
    eps = torch.finfo(A.dtype).eps
    goal = tol * back(y).norm(dim=1, keepdim=True) + 100 * eps * y.norm(dim=1, keepdim=True)
    steps = torch.zeros(len(A), dtype=torch.long, device=A.device)
    d, gg = g, g.square().sum(1, keepdim=True)
    for _ in range(iterations):
        active = g.norm(dim=1, keepdim=True) > goal
        if not active.any():
            break
        steps += active[:, 0, 0]
        move = solve_triangular(R, d, upper=True)
        Am = A @ move
        conjugate = gg / Am.square().sum(1, keepdim=True).clamp_min(1e-300)
        step = (conjugate if omega is None else omega) * active  # what is done stands still
        v, r = v + step * move, r - step * Am
        g = back(r)
        last, gg = gg, g.square().sum(1, keepdim=True)
        d = g + gg / last.clamp_min(1e-300) * d if omega is None else g
        if trace is not None:
            trace(v)
    return v, steps


# The loop


History = namedtuple("History", "U V error dist ops")


def altmin(problem, mask, U, half_step, rounds):
    """Alternating minimization, all seeds together.

    Parameters
    ----------
    problem : Problem
        M is seen on `mask` only; all else serves to measure.
    mask : Tensor [S, m, n], bool, or list of 2 T of them
        Omega, which serves every half-step, as in practice; or Omega_1 .. Omega_2T from `split`,
        one a half-step, as in the analysis.
    U : Tensor [S, m, k]
        U_0, from `initialize`.
    half_step : callable
        ``(side, U) -> V``: `Exact`, `Perturbed` or `Sketched`.
    rounds : int
        T.

    Returns
    -------
    History
        U [S, m, k] and orthonormal V [S, n, k] with M ~ U V^T; error [S, T + 1], relative
        Frobenius error of the noiseless matrix after each round (first entry: 1, the zero
        matrix); dist [S, 2T + 1], the distances of U_0, V_1, U_1, V_2, .. from U*, V*;
        ops [S, T + 1], flops until then.

    Raises
    ------
    ValueError
        If rounds < 1, a mask does not fit M, or there are not 2 T of them.
    """
    M, k = problem.M, U.shape[-1]
    parts = mask if isinstance(mask, list) else [mask]
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, not {rounds}")
    if parts[0].shape != M.shape:
        shapes = f"{list(M.shape)}, not {list(parts[0].shape)}"
        raise ValueError(f"the mask must have the shape of M, {shapes}")
    if len(parts) not in (1, 2 * rounds):
        raise ValueError(f"{rounds} rounds need {2 * rounds} masks, or one, not {len(parts)}")
    if len(parts) == 1:
        sides = [(Side(M, mask), Side(M.mT, mask.mT))] * rounds
    else:
        pairs = zip(parts[:rounds], parts[rounds:])
        sides = ((Side(M, a), Side(M.mT, b.mT)) for a, b in pairs)
    zero = torch.zeros(len(M), dtype=torch.float64)
    error, angle, ops = [torch.ones_like(M[:, 0, 0])], [dist(U, problem.U)], [zero]
    for columns, rows in sides:
        V = qr(half_step(columns, U))[0]
        factor = half_step(rows, V)
        U = qr(factor)[0]
        error.append(relative_error(problem, factor, V))
        angle += [dist(V, problem.V), dist(U, problem.U)]
        half_step.ops["orthonormalize"] += 4 * k**2 * sum(M.shape[1:])
        ops.append(half_step.ops.total() + zero)
    return History(factor, V, *(torch.stack(x, 1) for x in (error, angle, ops)))


# Rivals


def scaled_gd(problem, mask, p, U, eta, rounds):
    """Gradient descent on L R^T, preconditioned by the k x k Gram matrix of the other factor.

    L <- L - eta / p P_Omega(L R^T - M) R (R^T R)^-1, and the same for R at the old L (Tong, Ma and
    Chi 2021, equation 3), from U of `initialize`.

    Returns
    -------
    error : Tensor [S, rounds + 1]
    ops : Tensor [S, rounds + 1]
    """
    M, k = problem.M, U.shape[-1]
    L, R = U, (M * mask / p).mT @ U
    error = [torch.ones_like(M[:, 0, 0])]
    for _ in range(rounds):
        G = mask * (L @ R.mT - M) / p
        step_L = torch.linalg.solve(R.mT @ R, (G @ R).mT).mT
        step_R = torch.linalg.solve(L.mT @ L, (G.mT @ L).mT).mT
        L, R = L - eta * step_L, R - eta * step_R
        error.append(relative_error(problem, L, R))
    seen = mask.sum((1, 2)).double().cpu()[:, None]
    each = 6 * k * seen + 2 * (solve_ops(k) + k**2) + 4 * k**2 * sum(M.shape[1:])
    return torch.stack(error, 1), each * torch.arange(rounds + 1.0)


def soft_impute(problem, mask, lam, rounds, rank=None):
    """Z <- D_lambda(P_Omega(M) + P_Omega_perp(Z)): fill in, then shrink the singular values by it.

    Mazumder, Hastie and Tibshirani 2010, Algorithm 1, with at most `rank` singular values (2 k if
    not given), found by one block power step from the last ones. lam: in units of sigma_1 of
    P_Omega(M).

    Returns
    -------
    error : Tensor [S, rounds + 1]
    ops : Tensor [S, rounds + 1]
    """
    M, r = problem.M, rank or 2 * problem.U.shape[-1]
    seen_M = M * mask
    squares, W = torch.linalg.eigh(seen_M.mT @ seen_M)
    W, shrink = W[..., -r:], lam * squares[:, -1:].sqrt()
    Z, error = torch.zeros_like(M), [torch.ones_like(M[:, 0, 0])]
    for _ in range(rounds):
        F = seen_M + ~mask * Z
        Q = qr(F @ W)[0]
        left, s, W = torch.linalg.svd(Q.mT @ F, full_matrices=False)
        left, W = Q @ left * (s - shrink).clamp_min(0)[:, None], W.mT
        Z = left @ W.mT
        error.append(relative_error(problem, left, W))
    seen, sides = mask.sum((1, 2)).double().cpu()[:, None], sum(M.shape[1:])
    # F = P_Omega(M - Z) + Z, sparse plus rank r: its products cost 2 r (seen + r sides) each
    each = 2 * r * seen + 2 * (2 * r * seen + 2 * r**2 * sides) + 8 * r**2 * sides
    return torch.stack(error, 1), each * torch.arange(rounds + 1.0)
