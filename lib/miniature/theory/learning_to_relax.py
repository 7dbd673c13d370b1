r"""Learning to relax: the parameter of SOR, learned from iteration counts over many linear systems.

M. Khodak, E. Chow, M.-F. Balcan, A. Talwalkar, "Learning to Relax: Setting Solver Parameters Across
a Sequence of Linear System Instances", ICLR 2024 (arXiv 2310.02246).

Successive over-relaxation solves A x = b, A = D + L + L^T, by

    x <- x + d,   M_omega d = r,   M_omega = D / omega + L,   r = b - A x

so that the residual obeys r <- C_omega r, C_omega = I - A M_omega^-1 = (M_omega - A) M_omega^-1.
The cost is the number of iterations until |r_k| < eps |r_0|. The best omega depends on beta, the
spectral radius of the Jacobi matrix I - D^-1 A (Young's formula, for consistently ordered A):

    omega* = 1 + (beta / (1 + sqrt(1 - beta^2)))^2
    rho(C_omega) = (omega beta + sqrt(omega^2 beta^2 - 4 (omega - 1)))^2 / 4   if omega < omega*
                   omega - 1                                                   otherwise

**The one idea**: the cost is bounded by a surrogate that is regular enough in omega for a bandit on
a grid of d values to compete with the best omega. With tau such that
|C^k|^(1/k) <= rho + tau (1 - rho) when the solver is about to stop,

    cost(omega) <= U(omega) = 1 + log(eps) / log(rho(C_omega) + tau (1 - rho(C_omega)))

Learners see the iterations beyond the first (cost - 1) of the value that they chose, and no more.

- `TsallisINF`: follow the regularized leader with the 1/2-Tsallis entropy; k_i is the sum of
  importance-weighted losses, s the mean loss so far, eta = 2 / sqrt(t):
  p_i = 4 / (eta (k_i / s - x))^2 with x such that sum p_i = 1.
- `TsallisINFCB`: one of these for each bin of a context in [-1, 1].
- `ChebCB`: for each arm a regression of the loss on the Chebyshev polynomials of the context with
  coefficients |a_0| <= K, |a_j| <= 2 (max - min) / j, and inverse gap weighting of the predictions:
  p_i = 1 / (d + gamma (y_i - y_*)), the rest on the arm of least prediction y_*.

Rivals (UCB1, EXP3, fixed values) are those of `miniature.theory.bandits`.

Forward substitution makes each unknown wait for the ones before it, for thousands of iterations, so
that `iterations` is compiled (numba) and has the right sides on its innermost axis; the learners
are stacked over runs in torch.
"""

import math

import numpy as np
import torch
from numba import njit

from .bandits import Learner, one_hot

EPSILON, CAP = 1e-8, 10_000  # when SOR stops


# The solver


def laplacian(side, shift=0.0, dtype=torch.float64, device=None):
    """5-point Laplacian on a grid of side x side points plus shift I, [side^2, side^2]."""
    one = torch.eye(side, dtype=dtype, device=device)
    beside = torch.ones(side - 1, dtype=dtype, device=device)
    chain = 2 * one - torch.diag(beside, 1) - torch.diag(beside, -1)
    return torch.kron(chain, one) + torch.kron(one, chain) + shift * torch.kron(one, one)


@njit(cache=True)
def _count(side, shift, omega, rhs, goal, cap, cost):
    """Fill `cost` [B] with the iterations for the right sides rhs [side^2, B] of one matrix.

    goal [B] is the squared norm of the residual that ends the solve.
    """
    B, wide = rhs.shape[1], side + 1
    r, d = rhs.copy(), np.zeros((wide * wide + wide + 1, B))
    step, stay, left, norm = omega / (4 + shift), (1 / omega - 1) * (4 + shift), B, np.zeros(B)
    cost[:] = cap
    for k in range(1, cap + 1):
        # M d = r, downward; d has a row and a column of zeros around the grid
        for i in range(side):
            for j in range(side):
                at, to = i * side + j, (i + 1) * wide + j + 1
                for q in range(B):
                    d[to, q] = (r[at, q] + d[to - 1, q] + d[to - wide, q]) * step
        # r - A d = (M - A) d, as M d = r: the diagonal part, and minus the upper triangle
        norm[:] = 0
        for i in range(side):
            for j in range(side):
                at, to = i * side + j, (i + 1) * wide + j + 1
                for q in range(B):
                    r[at, q] = stay * d[to, q] + d[to + 1, q] + d[to + wide, q]
                    norm[q] += r[at, q] ** 2
        for q in range(B):
            if cost[q] == cap and norm[q] < goal[q]:
                cost[q], left = k, left - 1
        if left == 0 or k == cap:
            break


def iterations(shifts, omegas, rhs, side, eps=EPSILON, cap=CAP):
    """Cost of SOR from x = 0 for the Laplacian plus shift I: the first k with |r_k| < eps |r_0|.

    Parameters
    ----------
    shifts : array [C]
        Greater than minus the smallest eigenvalue of the Laplacian.
    omegas : array [W] or [C, W]
        In (0, 2).
    rhs : array [B, side^2] or [C, B, side^2]
    side : int
        Points along one side of the grid.
    eps, cap : float and int
        Tolerance; iterations after which the solver gives up.

    Returns
    -------
    numpy.ndarray of int [C, W, B]

    Raises
    ------
    ValueError
        If an omega or a shift has no convergent SOR, or the shape of rhs does not fit.
    """
    shifts, omegas = np.asarray(shifts, float), np.asarray(omegas, float)
    rhs = np.asarray(rhs, float)
    if not ((omegas > 0) & (omegas < 2)).all():
        raise ValueError(f"SOR converges for omega in (0, 2) only, got {_first(omegas, 0, 2)}")
    least = -least_eigenvalue(side)
    if not (shifts > least).all():
        raise ValueError(
            f"a shift must exceed {least:.4g}, else A is not positive definite, "
            f"got {_first(shifts, least, math.inf)}"
        )
    if rhs.ndim < 2 or rhs.shape[-1] != side**2:
        raise ValueError(f"rhs must have shape [B, {side**2}], not {list(rhs.shape)}")
    omegas = np.broadcast_to(omegas, (len(shifts), omegas.shape[-1]))
    rhs = np.broadcast_to(rhs, (len(shifts), *rhs.shape[-2:]))
    costs = np.empty((*omegas.shape, rhs.shape[1]), np.int64)
    for i, b in enumerate(rhs):
        b = np.array(b.T, order="C")
        for w, omega in enumerate(omegas[i]):
            _count(side, shifts[i], omega, b, eps**2 * (b**2).sum(0), cap, costs[i, w])
    return costs


def _first(values, low, high):
    return values[~((values > low) & (values < high))].flat[0]


def right_sides(n, dim, seed):
    """Gaussian vectors [n, dim] of at most the norm sqrt(dim): the others are drawn again."""
    rng, kept = np.random.default_rng([seed, 20]), np.empty((0, dim))
    while len(kept) < n:
        draws = rng.standard_normal((2 * n, dim))
        kept = np.concatenate([kept, draws[(draws**2).sum(1) <= dim]])
    return kept[:n]


# What is known about its speed


def least_eigenvalue(side):
    """Smallest eigenvalue of the 5-point Laplacian."""
    return 4 - 4 * math.cos(math.pi / (side + 1))


def jacobi_radius(shifts, side):
    """beta, the spectral radius of I - D^-1 A: cos(pi / (side + 1)) 4 / (4 + c)."""
    return 4 * math.cos(math.pi / (side + 1)) / (4 + np.asarray(shifts, float))


def best_omega(beta):
    """omega*, at which the spectral radius of C_omega is least."""
    beta = np.asarray(beta, float)
    if not ((beta >= 0) & (beta < 1)).all():
        raise ValueError(f"beta must lie in [0, 1), not {beta}")
    return 1 + (beta / (1 + np.sqrt(1 - beta**2))) ** 2


def young_radius(omega, beta):
    """rho(C_omega) by Young's formula."""
    omega = np.asarray(omega, float)
    root = np.sqrt(np.maximum(omega**2 * beta**2 - 4 * (omega - 1), 0))
    return np.where(omega < best_omega(beta), (omega * beta + root) ** 2 / 4, omega - 1)


def residual_map(A, omega):
    """C_omega = I - A M_omega^-1.

    Parameters
    ----------
    A : torch.Tensor, shape [..., n, n]
    omega : torch.Tensor, shape [...]
    """
    M = A.tril(-1) + torch.diag_embed(A.diagonal(dim1=-2, dim2=-1) / omega[..., None])
    eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    return eye - torch.linalg.solve_triangular(M, A.expand_as(M), upper=False, left=False)


def asymptocity(C, rho, cost):
    """The least tau with |C^k|^(1/k) <= rho + tau (1 - rho) at k = cost - 1, for C [W, n, n]."""
    pairs = zip(C, cost)
    norm = [torch.linalg.matrix_norm(torch.linalg.matrix_power(c, int(k) - 1), 2) for c, k in pairs]
    rate = torch.stack(norm).cpu().numpy() ** (1 / (np.asarray(cost) - 1))
    return (rate - rho) / (1 - rho)


def surrogate(rho, tau, eps=EPSILON):
    """U, the near-asymptotic bound on the cost."""
    return 1 + math.log(eps) / np.log(rho + tau * (1 - rho))


def energy_bound(A, omega, eps=EPSILON):
    """Bound on the cost by the norm of SOR in the energy |x|_A (Hackbusch 2016, Corollary 3.45).

    A : torch.Tensor [n, n]; omega : array [W]. The change of norms costs a factor 2 sqrt(cond A).
    The radius of D^-1 L D^-1 L^T counts only above 1/4: a negative difference, which the released
    code admits, would have to be divided by another constant, and is no bound for large omega.
    """
    omega = np.asarray(omega, float)
    over = (2 - omega) / (2 * omega)
    lower, upper = (part / A.diagonal()[:, None] for part in (A.tril(-1), A.triu(1)))
    gamma = 1 - float(torch.linalg.eigvals(lower + upper).abs().max())
    both = max(float(torch.linalg.eigvals(lower @ upper).abs().max()), 0.25)
    norm = np.sqrt(1 - 2 * over * gamma / (over**2 + gamma / omega + both - 0.25))
    return math.log(eps / (2 * math.sqrt(float(torch.linalg.cond(A))))) / np.log(norm)


# The game


class Instances:
    """An environment for `bandits.play`: each round a system of a table of costs.

    Parameters
    ----------
    cost : torch.Tensor, shape [C, B, d]
        Iterations for every shift, right side and omega. The loss is what goes beyond the first.
    shift, rhs : torch.Tensor of int, shape [S, T]
        Which of them each round has.
    context : torch.Tensor, shape [C]
        What is seen of each shift.
    seeds : sequence of int, length S
    """

    def __init__(self, cost, shift, rhs, context, seeds):
        if shift.shape != rhs.shape or len(shift) != len(seeds):
            raise ValueError(
                f"shift and rhs must have shape [{len(seeds)}, T], not {list(shift.shape)} and "
                f"{list(rhs.shape)}"
            )
        self._losses, self._system = cost.flatten(0, 1) - 1, shift * cost.shape[1] + rhs
        self._shift, self._context, self.seeds = shift, context, list(seeds)
        self.horizon, self.like = shift.shape[1], cost.new_zeros(len(seeds), cost.shape[2])

    def context(self, t):
        """Return the contexts [S] of round t."""
        return self._context[self._shift[:, t]]

    def loss(self, t, arms):
        """Return the losses [S] of the arms [S] played in round t."""
        return self._losses[self._system[:, t], arms]

    def totals(self, t):
        """Return the losses of every arm, summed over the first t rounds: [S, d]."""
        n = len(self._losses)
        count = torch.stack([row.bincount(minlength=n) for row in self._system[:, :t]])
        return count.to(self.like) @ self._losses

    def comparator(self):
        """Return the best fixed arm, shape [S, 1]."""
        return self.totals(self.horizon).argmin(1, keepdim=True)

    def gaps(self, arms):
        """Return loss minus the comparator's for arms [S, T]: shape [S, T]."""
        return self._losses[self._system, arms] - self._losses[self._system, self.comparator()]


def draw_shifts(a, b, table, horizon, seeds):
    """Rounds of c = -0.15 + 0.6 Beta(a, b) and of a right side, each of a seed: int [S, T] twice.

    table is (C, B). Shift i of the table stands for Beta variables from (i / C)^2 to
    ((i + 1) / C)^2: see `shift_grid`.
    """
    shift, rhs = [], []
    for seed in seeds:
        rng = np.random.default_rng([seed, 21])
        shift.append((table[0] * np.sqrt(rng.beta(a, b, horizon))).astype(int))
        rhs.append(rng.integers(table[1], size=horizon))
    return torch.from_numpy(np.stack(shift)).clamp(max=table[0] - 1), torch.from_numpy(
        np.stack(rhs)
    )


def shift_grid(n):
    """n shifts from -0.15 to 0.45, dense where the cost depends on them most: near -0.15."""
    return -0.15 + 0.6 * ((np.arange(n) + 0.5) / n) ** 2


# Learners


def tsallis(losses, eta, steps=20):
    """Weights p_i = 4 / (eta (losses_i - x))^2 with the x for which they sum to 1.

    Newton for (sum p)^(-1/2) = 1, which is concave in x, and linear where one loss matters or all
    are equal. From x = min losses - 2 / eta, where the sum is at least 1, it comes down to the
    solution without ever crossing it.

    Parameters
    ----------
    losses : torch.Tensor, shape [S, d]
        Sums of importance-weighted losses, scaled.
    eta : torch.Tensor, shape [S, 1]
    steps : int
        At most.

    Returns
    -------
    torch.Tensor, shape [S, d]
    """
    step, dot = 2 / eta, torch.linalg.vecdot
    x = losses.min(1, keepdim=True).values - step
    for _ in range(steps):
        root = step / (losses - x)
        p = root * root
        total = dot(root, root)[:, None]
        if (total - 1).abs().max() < 1e-12:
            break
        x = x - step * total * (total.sqrt() - 1) / dot(p, root)[:, None]
    return p


def tsallis_released(losses, eta, steps=20):
    """The same weights by the rule of the released code: Newton for sum p = 1, from x = -1.

    The sum is convex in x: once x = -1 is far below the solution, the first step jumps over
    min losses, beyond which the formula still gives positive weights but no solution is near.
    """
    x, dot = -torch.ones_like(eta), torch.linalg.vecdot
    for _ in range(steps):
        root = (2 / eta / (losses - x)).abs()
        p = root * root  # 4 (eta (losses - x))^-2
        x = x - (dot(root, root) - 1)[:, None] / (eta * dot(p, root)[:, None])  # p^(3/2)
    return p


class TsallisINF(Learner):
    """Tsallis-INF with the mean loss as its scale; with bins, one copy for each bin of the context.

    Parameters
    ----------
    bins : int or torch.Tensor of int [S]
        Bins of equal width in [-1, 1]; with 1 the context does not matter.
    weights : callable
        `tsallis`, or `tsallis_released`, whose weights need not sum to 1: arms are drawn in
        proportion, losses are divided by the weights themselves.
    """

    def __init__(self, bins=1, weights=tsallis):
        if not (torch.as_tensor(bins) >= 1).all():
            raise ValueError(f"there must be at least one bin, not {bins}")
        self.bins, self.weights = bins, weights

    def start(self, like, horizon):
        self.rows = torch.arange(len(like), device=like.device)
        self.number = torch.as_tensor(self.bins, device=like.device).expand(len(like))
        state = like[:, None].expand(-1, int(self.number.max()), -1)
        self.k = torch.zeros_like(state)  # sums of importance-weighted losses [S, bins, d]
        self.played, self.total = torch.zeros_like(self.k[..., 0]), torch.zeros_like(self.k[..., 0])

    def bin(self, context):
        if context is None or self.k.shape[1] == 1:
            return torch.zeros_like(self.rows)
        return ((context + 1) / 2 * self.number).long().clamp(min=0).minimum(self.number - 1)

    def probabilities(self, t, context):
        at = self.at = self.rows, self.bin(context)
        n = self.played[at][:, None]
        scale = (self.total[at][:, None] / n).masked_fill(n == 0, 1).clamp(min=1e-12)
        self.p = self.weights(self.k[at] / scale, 2 / (n + 1).sqrt())  # eta = 2 / sqrt(t)
        return self.p / self.p.sum(1, keepdim=True)

    def update(self, t, arms, losses, p, context):
        self.k[*self.at, arms] += losses / self.p[self.rows, arms]
        self.played[self.at] += 1
        self.total[self.at] += losses


class TsallisINFCB(TsallisINF):
    """Tsallis-INF for each of five bins of the context."""

    needs_context = True

    def __init__(self, bins=5):
        super().__init__(bins)


@njit(cache=True)
def _solve(system, a):
    """Solve system x = a by elimination, in place; the systems are positive definite."""
    m = len(a)
    for j in range(m):
        for i in range(j + 1, m):
            factor = system[i, j] / system[j, j]
            for k in range(j, m):
                system[i, k] -= factor * system[j, k]
            a[i] -= factor * a[j]
    for j in range(m - 1, -1, -1):
        for k in range(j + 1, m):
            a[j] -= system[j, k] * a[k]
        a[j] /= system[j, j]


@njit(cache=True)
def _box(G, h, bound, active, patience, a):
    """Solve the problems of `box_least_squares` one after the other; fills a, changes active."""
    N, m = h.shape
    system = np.empty((m, m))
    for n in range(N):
        on, slack = active[n], 0.0
        for j in range(m):
            slack = max(slack, 1e-9 * bound[n, j])
        for step in range(4**m):
            for i in range(m):  # what is held moves to the right side and drops out
                a[n, i] = on[i] * bound[n, i] if on[i] != 0 else h[n, i]
                for j in range(m):
                    system[i, j] = 1.0 if i == j else 0.0
                    if on[i] == 0 and on[j] == 0:
                        system[i, j] = G[n, i, j]
                    elif on[i] == 0:
                        a[n, i] -= G[n, i, j] * on[j] * bound[n, j]
            _solve(system, a[n])
            wrong, last, value = 0, 0, 0.0
            for j in range(m):
                new = 0.0
                if on[j] != 0:
                    force = h[n, j]
                    for i in range(m):
                        force -= G[n, j, i] * a[n, i]
                    if on[j] * force >= 0:
                        new = on[j]
                elif abs(a[n, j]) > bound[n, j] + slack:
                    new = 1.0 if a[n, j] > 0 else -1.0
                if new != on[j]:
                    wrong, last, value = wrong + 1, j, new
                    if step < patience:
                        on[j] = new
            if wrong == 0:
                break
            if step >= patience:
                on[last] = value


def box_least_squares(G, h, bound, active, patience=3):
    """Minimize a^T G a / 2 - h^T a subject to |a_j| <= bound_j, for a stack of problems.

    Block principal pivoting (Judice and Pires 1994): coefficients of the active set stand at their
    bound and leave the set if they are pulled inside; free ones beyond their bound join it. As
    changing all at once may cycle, after `patience` steps only the last one that is wrong changes,
    which ends (Murty's rule).

    Parameters
    ----------
    G : torch.Tensor, shape [N, m, m]
        Positive definite.
    h, bound : torch.Tensor, shape [N, m]
    active : torch.Tensor, shape [N, m]
        Where to begin: -1 and 1 at the lower and upper bound, 0 free.
    patience : int

    Returns
    -------
    a, active : torch.Tensor, shape [N, m]
    """
    data = [np.ascontiguousarray(v.cpu().numpy()) for v in (G, h, bound, active)]
    a, data[3] = np.empty_like(data[1]), data[3].copy()
    _box(*data, patience, a)
    return torch.from_numpy(a).to(h).clamp(-bound, bound), torch.from_numpy(data[3]).to(h)


class ChebCB(Learner):
    """SquareCB with Chebyshev regression of the loss on a context in [-1, 1].

    Everything is in the unit of the losses: the scale that the theory divides by cancels in
    gamma (y_i - y_*), with gamma = 2 t sqrt(d t / (R + 2 alpha^2 t)), where R is the sum of squared
    prediction errors and alpha bounds what m polynomials cannot express of a Lipschitz loss.

    Parameters
    ----------
    m : int
        Chebyshev polynomials T_0 ... T_{m-1}.
    """

    needs_context = True

    def __init__(self, m=6):
        if m < 1:
            raise ValueError(f"m must be at least 1, the constant polynomial, not {m}")
        self.m = m

    def start(self, like, horizon):
        (S, d), m = like.shape, self.m
        self.rows, self.degree = torch.arange(S, device=like.device), torch.arange(m).to(like)
        ridge = 1e-6 * torch.eye(m).to(like)  # so that too few data have a solution: the smallest
        self.G = ridge.expand(S, d, m, m).clone()
        self.h, self.a, self.active = (like.new_zeros(S, d, m) for _ in range(3))
        self.low, self.high = like.new_full((S,), math.inf), like.new_zeros(S)
        self.error, self.gamma = like.new_zeros(S), like.new_zeros(S, 1)

    def probabilities(self, t, context):
        self.phi = torch.cos(
            self.degree * context.clamp(-1, 1).arccos()[:, None]
        )  # T_j = cos j acos
        self.y = (self.a @ self.phi[..., None])[..., 0]
        least, star = self.y.min(1)
        p = 1 / (self.y.shape[1] + self.gamma * (self.y - least[:, None]))
        return p + one_hot(star, p) * (1 - p.sum(1, keepdim=True))

    def update(self, t, arms, losses, p, context):
        self.error += (self.y[self.rows, arms] - losses) ** 2
        low, high = self.low.minimum(losses), self.high.maximum(losses)
        moved = (low < self.low) | (high > self.high)
        self.low, self.high = low, high
        self.G[self.rows, arms] += self.phi[:, :, None] * self.phi[:, None]
        self.h[self.rows, arms] += losses[:, None] * self.phi
        # The arm that was played is fitted again, and all arms where the bounds have moved.
        i, arm = self.rows, arms
        if moved.any():
            i, arm = (one_hot(arms, p).bool() | moved[:, None]).nonzero(as_tuple=True)
        bound = 2 * (high - low)[:, None] / self.degree.clamp(min=1)
        bound[:, 0] = high
        self.a[i, arm], self.active[i, arm] = box_least_squares(
            self.G[i, arm], self.h[i, arm], bound[i], self.active[i, arm]
        )
        m, d, t = self.m, p.shape[1], t + 1
        alpha = (math.pi + 2 / math.pi * math.log(2 * m + 1)) / (2 * (m + 1)) * (high - low)
        spread = (self.error + 2 * alpha**2 * t).clamp(min=1e-12)
        self.gamma = (2 * t * (d * t / spread).sqrt())[:, None]
