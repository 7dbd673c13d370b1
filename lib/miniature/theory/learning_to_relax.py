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
that `iterations` is compiled (numba) and has the right sides on its innermost axis. The learners
are stacked over runs in torch; what takes another number of steps in each run, Newton and the
regression within bounds, is compiled too.
"""

import math

import numpy as np
import torch
from numba import njit

from .bandits import Learner

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
                    d[to, q] = (r[at, q] + d[to - wide, q] + d[to - 1, q]) * step
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
        self.horizon, self.like = shift.shape[1], cost.new_zeros(len(seeds), cost.shape[2])
        self.seeds = list(seeds)
        # One row a round: its contexts, and where its losses begin in the flat table.
        self._context = context[shift].T.contiguous()
        self._start = (self._system * cost.shape[2]).T.contiguous()

    def context(self, t):
        """Return the contexts [S] of round t."""
        return self._context[t]

    def loss(self, t, arms):
        """Return the losses [S] of the arms [S] played in round t."""
        return self._losses.take(self._start[t] + arms)

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


@njit(cache=True, error_model="numpy")
def _tsallis(losses, step, steps, p):
    """Fill p [S, d] for `tsallis`; step [S, 1] is 2 / eta."""
    for s in range(len(losses)):
        x = losses[s].min() - step[s, 0]
        for _ in range(steps):
            total, cubes = 0.0, 0.0
            for i in range(losses.shape[1]):
                root = step[s, 0] / (losses[s, i] - x)
                p[s, i] = root**2
                total += p[s, i]
                cubes += p[s, i] * root
            if abs(total - 1) < 1e-12:
                break
            x -= step[s, 0] * total * (math.sqrt(total) - 1) / cubes


@njit(cache=True, error_model="numpy")
def _tsallis_released(losses, step, steps, p):
    """Fill p [S, d] for `tsallis_released`."""
    for s in range(len(losses)):
        x = -1.0
        for _ in range(steps):
            total, cubes = 0.0, 0.0
            for i in range(losses.shape[1]):
                root = abs(step[s, 0] / (losses[s, i] - x))
                p[s, i] = root**2  # 4 (eta (losses - x))^-2
                total += p[s, i]
                cubes += p[s, i] * root  # p^(3/2)
            x -= step[s, 0] / 2 * (total - 1) / cubes


def tsallis(losses, eta, steps=20, solve=_tsallis):
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
    solve : callable
        Takes losses, 2 / eta and steps, and fills the weights, as `_tsallis` does.

    Returns
    -------
    torch.Tensor, shape [S, d]
    """
    data = [v.cpu().numpy() for v in (losses, 2 / eta)]
    p = np.empty_like(data[0])
    solve(*data, steps, p)
    return torch.from_numpy(p).to(losses)


def tsallis_released(losses, eta, steps=20):
    """The same weights by the rule of the released code: Newton for sum p = 1, from x = -1.

    The sum is convex in x: once x = -1 is far below the solution, the first step jumps over
    min losses, beyond which the formula still gives positive weights but no solution is near.
    """
    return tsallis(losses, eta, steps, _tsallis_released)


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
        S, d = like.shape
        self.number = torch.as_tensor(self.bins, device=like.device).expand(S)
        self.most = int(self.number.max())
        self.first = self.most * torch.arange(S, device=like.device)  # where a run's bins begin
        self.k = like.new_zeros(S * self.most, d)  # sums of importance-weighted losses
        self.played, self.total = like.new_zeros(2, S * self.most, 1)

    def bin(self, context):
        if context is None or self.most == 1:
            return torch.zeros_like(self.first)
        return ((context + 1) / 2 * self.number).long().clamp(min=0).minimum(self.number - 1)

    def probabilities(self, t, context):
        at = self.at = self.first + self.bin(context)
        n, total = self.played[at], self.total[at]
        scale = (total / n.clamp(min=1)).clamp(min=1e-12)  # if none was played, k is zero as well
        self.p = self.weights(self.k[at] / scale, 2 / (n + 1).sqrt())  # eta = 2 / sqrt(t)
        return self.p / self.p.sum(1, keepdim=True)

    def update(self, t, arms, losses, p, context):
        weighted = losses / self.p.gather(1, arms[:, None])[:, 0]
        self.k.view(-1).index_add_(0, self.at * p.shape[1] + arms, weighted)
        self.played.index_add_(0, self.at, torch.ones_like(losses)[:, None])
        self.total.index_add_(0, self.at, losses[:, None])


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
def box_least_squares(G, h, bound, active, a, patience=3):
    """Fill `a` with the minimizer of a^T G a / 2 - h^T a subject to |a_j| <= bound_j.

    Block principal pivoting (Judice and Pires 1994): coefficients of the active set stand at their
    bound and leave the set if they are pulled inside; free ones beyond their bound join it. As
    changing all at once may cycle, after `patience` steps only the last one that is wrong changes,
    which ends (Murty's rule).

    Parameters
    ----------
    G : array [m, m]
        Positive definite.
    h, bound, a : array [m]
    active : array [m]
        Where to begin, and on return where it ended: -1 and 1 at the lower and upper bound, 0 free.
    patience : int
    """
    m = len(h)
    system, slack = np.empty((m, m)), 1e-9 * bound.max()
    for step in range(4**m):
        for i in range(m):  # what is held moves to the right side and drops out
            a[i] = active[i] * bound[i] if active[i] != 0 else h[i]
            for j in range(m):
                system[i, j] = 1.0 if i == j else 0.0
                if active[i] == 0 and active[j] == 0:
                    system[i, j] = G[i, j]
                elif active[i] == 0:
                    a[i] -= G[i, j] * active[j] * bound[j]
        _solve(system, a)
        wrong, last, value = 0, 0, 0.0
        for j in range(m):
            new = 0.0
            if active[j] != 0:
                force = h[j]
                for i in range(m):
                    force -= G[j, i] * a[i]
                if active[j] * force >= 0:
                    new = active[j]
            elif abs(a[j]) > bound[j] + slack:
                new = 1.0 if a[j] > 0 else -1.0
            if new != active[j]:
                wrong, last, value = wrong + 1, j, new
                if step < patience:
                    active[j] = new
        if wrong == 0:
            break
        if step >= patience:
            active[last] = value
    for j in range(m):
        a[j] = min(max(a[j], -bound[j]), bound[j])


@njit(cache=True)
def _learn(t, arms, losses, phi, y, low, high, error, gamma, G, h, active, a):
    """Let ChebCB see the losses [S] of round t = 1, 2, ..., given phi [S, m] and y [S, d]."""
    S, d, m = h.shape
    rest = (math.pi + 2 / math.pi * math.log(2 * m + 1)) / (2 * (m + 1))
    bound = np.empty(m)
    for s in range(S):
        arm, loss = arms[s], losses[s]
        error[s] += (y[s, arm] - loss) ** 2
        for j in range(m):
            h[s, arm, j] += loss * phi[s, j]
            for i in range(m):
                G[s, arm, j, i] += phi[s, j] * phi[s, i]
        moved = loss < low[s] or loss > high[s]
        low[s], high[s] = min(low[s], loss), max(high[s], loss)
        bound[0] = high[s]
        for j in range(1, m):
            bound[j] = 2 * (high[s] - low[s]) / j
        # The arm that was played is fitted again, and all arms where the bounds have moved.
        for i in range(d):
            if moved or i == arm:
                box_least_squares(G[s, i], h[s, i], bound, active[s, i], a[s, i])
        alpha = rest * (high[s] - low[s])
        gamma[s, 0] = 2 * t * math.sqrt(d * t / max(error[s] + 2 * alpha**2 * t, 1e-12))


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
        zeros = like.cpu().new_zeros
        self.degree = torch.arange(m).to(like)
        self.gamma, self.a = zeros(S, 1), zeros(S, d, m)
        low, high, error, active = zeros(S) + math.inf, zeros(S), zeros(S), zeros(S, d, m)
        G = zeros(S, d, m, m) + 1e-6 * torch.eye(m)  # so that too few data have a solution
        state = low, high, error, self.gamma, G, zeros(S, d, m), active, self.a
        self.state = [v.numpy() for v in state]  # the same memory

    def probabilities(self, t, context):
        # T_j = cos j acos
        self.phi = torch.cos(self.degree * context.clamp(-1, 1).arccos()[:, None])
        self.y = (self.a.to(context) @ self.phi[:, :, None])[:, :, 0]
        least, star = self.y.min(1, keepdim=True)
        p = 1 / (self.y.shape[1] + self.gamma.to(context) * (self.y - least))
        return p.scatter_add_(1, star, 1 - p.sum(1, keepdim=True))

    def update(self, t, arms, losses, p, context):
        seen = (v.cpu().numpy() for v in (arms, losses, self.phi, self.y))
        _learn(t + 1, *seen, *self.state)
