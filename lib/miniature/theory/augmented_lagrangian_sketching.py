r"""Inexact Newton for equality constraints: random row actions, one smooth merit function.

Hong, Na, Mahoney and Kolar, "Constrained Optimization via Exact Augmented Lagrangian and Randomized
Iterative Sketching", ICML 2023, arXiv:2305.18379.

For min f(x) subject to c(x) = 0, x in R^n, c in R^m, let L = f + lambda' c, G [m, n] the Jacobian
of c, and DL = (D_x L, c) the gradient of L in (x, lambda), the KKT residual. A Newton step solves

    K z = -DL,   K = [[B, G'], [G, 0]],   B = D_xx L (+ (xi_B + |D_xx L|) I if the reduced Hessian
                                              Z' D_xx L Z, Z the null space of G, is not > 1e-6).

AdaSketch-Newton solves it loosely, by sketch-and-project (r = K z + DL):

    z <- z - K' S (S' K K' S)^+ S' r      S one Gaussian vector (GV) or one unit vector (RK: a
                                          Kaczmarz step, which touches one row of K)

until |K| Psi |r| <= theta delta |DL|, where |K| Psi |r| bounds the error |z - z*|. The one idea:
the exact augmented Lagrangian, smooth in (x, lambda) jointly,

    L_eta = L + eta_1/2 |c|^2 + eta_2/2 |D_x L|^2,

decides everything: if DL_eta' z > -eta_2/2 |DL|^2, then eta_1 <- nu^2 eta_1, eta_2 <- eta_2 / nu,
delta <- delta / nu^4, and the *same* solve continues; then Armijo's rule on L_eta gives the step.

Rivals: the same with an exact solve; the classical augmented Lagrangian; SQP with GMRES on the
merit function f + mu |c|_1, with a plain and with an adaptive rule for the accuracy.

Runs (seeds, hyperparameters) are a leading axis of torch tensors. The linear solvers are compiled
by numba, on the CPU: a row action is some ten operations that need the ones before; as tensor
operations on batches of such small systems each would cost a thousand times what it computes.
"""

import math
from collections import namedtuple
from dataclasses import dataclass

import numpy as np
import torch
from numba import njit

# kkt [S, T + 1] |DL|, its last value kept once a run has ended; alpha, steps, slope [S, T] step
# length, steps of the linear solver, DL_eta' z / |DL|^2 (all NaN once ended); eta2 [S, T] when the
# step was accepted; evals [S] evaluations of f, c, grad f and G, each one; x [S, n]; lam [S, m];
# solved [S].
Trace = namedtuple("Trace", "kkt alpha steps slope eta2 evals x lam solved")
SOLVERS = {"exact": 0, "RK": 1, "GV": 2}


@dataclass(frozen=True)
class Problem:
    """min f subject to c = 0.

    Attributes
    ----------
    name : str
    F : callable
        Coordinates x [n, S] -> (f, c_1, ..., c_m), each [S].
    x0 : list of float, length n
        Where to start.
    best : float
        The known optimal value; NaN if there is none.
    """

    name: str
    F: callable
    x0: list
    best: float = math.nan

    def first(self, x):
        """x [S, n] -> values F = (f, c) [S, 1 + m] and their gradients J [S, 1 + m, n]."""
        x = x.detach().requires_grad_()
        F = self.F(x.T)
        J = [torch.autograd.grad(v.sum(), x, retain_graph=True)[0] for v in F]
        return torch.stack(list(F), 1).detach(), torch.stack(J, 1)

    def hessian(self, x, lam):
        """x [S, n], lam [S, m] -> D_xx L [S, n, n]."""
        x = x.detach().requires_grad_()
        f, *c = self.F(x.T)
        L = f + sum(a * b for a, b in zip(lam.T, c))
        (g,) = torch.autograd.grad(L.sum(), x, create_graph=True)
        g = g + 0 * x  # a gradient that is constant has no graph
        rows = [torch.autograd.grad(v.sum(), x, retain_graph=True)[0] for v in g.T]
        return torch.stack(rows, 1)


# The method


def kkt(F, J, lam):
    """DL = (D_x L, c) [S, n + m]."""
    return torch.cat([J[:, 0] + torch.einsum("sm,smn->sn", lam, J[:, 1:]), F[:, 1:]], 1)


def spectral_norm(A):
    """|A| [S] of symmetric A [S, N, N]."""
    return torch.linalg.eigvalsh(A).abs().amax(1)


def merit(F, J, lam, eta1, eta2):
    """The exact augmented Lagrangian L_eta [S]."""
    c, DL = F[:, 1:], kkt(F, J, lam)
    g = DL[:, : J.shape[2]]
    return F[:, 0] + (lam * c).sum(1) + eta1 / 2 * (c * c).sum(1) + eta2 / 2 * (g * g).sum(1)


def merit_gradient(DL, H, G):
    """DL_eta = p_0 + eta_1 p_1 + eta_2 p_2, with H = D_xx L: p [S, 3, n + m]."""
    g, c = DL[:, : H.shape[1], None], DL[:, H.shape[1] :, None]
    rows = [(g, c), (G.mT @ c, 0 * c), (H @ g, G @ g)]
    return torch.stack([torch.cat(pair, 1)[..., 0] for pair in rows], 1)


def kkt_matrix(H, G, xi_B=0.1, floor=1e-6):
    """B [S, n, n], shifted where its reduced part is not above floor, and K [S, n + m, n + m]."""
    S, m, n = G.shape
    B = H
    if m < n:
        Z = torch.linalg.qr(G.mT, mode="complete").Q[..., m:]
        low = torch.linalg.eigvalsh(Z.mT @ H @ Z)[:, 0]
        shift = (xi_B + spectral_norm(H)) * (low < floor)
        B = H + shift[:, None, None] * torch.eye(n, dtype=H.dtype)
    return B, torch.cat([torch.cat([B, G.mT], 2), torch.cat([G, G.new_zeros(S, m, m)], 2)], 1)


@njit(cache=True)
def sketch_and_project(K, b, z, tol, cap, solver, law, rng):
    """Move z in place until |K z - b| <= tol; returns the steps taken.

    `law` [N] is the distribution function of the rows that RK draws. The residual is looked at
    every N steps, so that a step costs RK O(N) and GV O(N^2), both with the look.
    """
    N, t = len(b), 0
    d, rows = np.empty(N), (K * K).sum(1)
    if solver == 0:
        z[:] = np.linalg.solve(K, b)
        return t
    while np.linalg.norm(K @ z - b) > tol and t < cap:
        for _ in range(N):
            if solver == 1:
                i, u = 0, rng.random()
                while law[i] <= u and i < N - 1:
                    i += 1
                d, r, size = K[i], -b[i], rows[i]  # d = K' S, r = S' (K z - b), begun
            else:
                d, r, size = np.zeros(N), 0.0, 0.0
                for i in range(N):
                    s = rng.standard_normal()
                    r -= s * b[i]
                    for j in range(N):
                        d[j] += s * K[i, j]
                for j in range(N):
                    size += d[j] * d[j]
            for j in range(N):
                r += d[j] * z[j]
            for j in range(N):
                z[j] -= r / size * d[j]
        t += N
    return t


@njit(cache=True)
def direction(K, DL, p, eta, scale, room, theta, nu, cap, solver, law, rng):
    """Steps 4 and 5: solve until z is a direction of descent of L_eta. Changes eta in place.

    eta [3] = (eta_1, eta_2, delta); p [3, N] from `merit_gradient`; scale = |K| Psi; room bounds
    delta: delta <= room eta_2 / (1 + eta_1 + eta_2), but not below 1e-6.
    """
    size, z, steps = np.linalg.norm(DL), np.zeros(len(DL)), 0
    eta[2] = max(min(eta[2], room * eta[1] / (1 + eta[0] + eta[1])), 1e-6)
    while True:
        tol = theta * eta[2] * size / scale
        steps += sketch_and_project(K, -DL, z, tol, cap, solver, law, rng)
        slope = (p[0] + eta[0] * p[1] + eta[1] * p[2]) @ z
        if slope <= -eta[1] / 2 * size**2 or eta[0] > 1e8 or eta[1] < 1e-8:
            return z, slope, steps
        eta[0] *= nu**2
        eta[1] /= nu
        bound = room * eta[1] / (1 + eta[0] + eta[1])
        eta[2] = max(min(eta[2] / nu**4, bound), 1e-6)


def gather(found):
    """[(z, slope, steps) of each run] -> z [R, n + m], slope [R], steps [R]."""
    z, slope, steps = (np.array(v) for v in zip(*found))
    return torch.tensor(z), torch.tensor(slope), steps


class Method:
    """What `minimize` asks of a method; `direction` and `merit` have no default.

    `rows` are the runs that F, J, H, lam belong to. `direction` returns z [R, n + m], the slope of
    the merit function along it [R] and the steps of its linear solver [R].
    """

    trial_cost, step_cost, beta = 2, 2, 0.1  # a trial needs f and c, a new point also gradients

    def prepare(self, rows, F, J, lam, tol):
        """The multipliers [S, m] to go on with."""
        return lam

    def weights(self, rows, F, lam):
        """The multipliers of the Hessian that `direction` gets."""
        return lam

    def eta2(self, rows):
        """For the record; NaN where there is no such penalty."""
        return np.full(len(rows), np.nan)


class AdaSketchNewton(Method):
    """Exact augmented Lagrangian, sketched Newton direction.

    Parameters
    ----------
    solver : {"RK", "GV", "exact"}
    seeds : sequence of int, length S
        Of the sketches.
    penalty : float or array [S]
        eta_1 at the start.
    theta : float or callable
        Accuracy; callable: of the outer iteration k and |DL|.
    psi : float
        The factor in Psi, 20 in the authors' code.
    nu, eta2, delta, xi_B, beta : float
        The paper's constants (eta_2 and delta at the start).
    floor : float
        B is shifted where the reduced Hessian is not above it.
    cap : int
        Row actions of one solve, at most.
    """

    trial_cost, step_cost = 4, 0  # L_eta asks for f, c, grad f and G, so that a step costs no more

    def __init__(
        self, solver, seeds, penalty=1.0, theta=1.0, psi=20.0, nu=1.5, eta2=0.1, delta=0.1,
        xi_B=0.1, beta=0.1, floor=1e-6, cap=10**5,
    ):  # fmt: skip
        if solver not in SOLVERS:
            raise ValueError(f"solver must be one of {list(SOLVERS)}, got {solver!r}")
        if not 0 < beta < 0.5:
            raise ValueError(f"beta must lie between 0 and 1/2, got {beta}")
        if nu <= 1 or np.min(penalty) <= 0:
            raise ValueError(f"needs penalty > 0 and nu > 1, got {penalty} and {nu}")
        self.eta = np.empty((len(seeds), 3))
        self.eta[:, 0], self.eta[:, 1:] = penalty, (eta2, delta)
        self.rng = [np.random.default_rng([s, 3]) for s in seeds]
        self.theta = theta if callable(theta) else lambda k, size: theta
        self.solver, self.psi, self.nu, self.xi_B = SOLVERS[solver], psi, nu, xi_B
        self.beta, self.floor, self.cap = beta, floor, cap

    def direction(self, k, rows, F, J, H, lam):
        DL, G = kkt(F, J, lam), J[:, 1:]
        B, K = kkt_matrix(H, G, self.xi_B, self.floor)
        squares = torch.linalg.eigvalsh(G @ G.mT)  # of the singular values of G
        xi = squares[:, 0].clamp(1e-12, 1) * min(self.xi_B, 1)
        psi = self.psi * spectral_norm(B).clamp(min=1) ** 2 / xi
        upsilon = torch.maximum(squares[:, -1] ** 0.5, spectral_norm(H)).clamp(min=1)
        room = (0.5 - self.beta) / (upsilon * psi) ** 2
        scale, p = spectral_norm(K) * psi, merit_gradient(DL, H, G)
        law = np.arange(1, K.shape[1] + 1) / K.shape[1]  # uniform, as in the authors' code
        found = [
            direction(
                K[i].numpy(), DL[i].numpy(), p[i].numpy(), self.eta[s], scale[i].item(),
                room[i].item(), self.theta(k, DL[i].norm().item()), self.nu, self.cap, self.solver,
                law, self.rng[s],
            )
            for i, s in enumerate(rows)
        ]  # fmt: skip
        return gather(found)

    def merit(self, rows, F, J, lam):
        return merit(F, J, lam, *torch.tensor(self.eta[rows, :2]).T)

    def eta2(self, rows):
        return self.eta[rows, 1]


def minimize(problem, method, x, lam=None, tol=1e-4, outer=200):
    """Steps of a method with Armijo's rule on its merit function, until |DL| <= tol.

    Parameters
    ----------
    problem : Problem
    method : Method
        Made anew for each call: it holds the penalties of the runs.
    x : torch.Tensor of float64, shape [S, n]
        A start for each run.
    lam : torch.Tensor, shape [S, m], optional
        Zero by default.

    Returns
    -------
    Trace
    """
    if x.ndim != 2 or x.shape[1] != len(problem.x0) or x.dtype != torch.float64:
        raise ValueError(f"x must be float64 [S, {len(problem.x0)}], got {x.dtype} {list(x.shape)}")
    F, J = problem.first(x)
    x, lam = x.clone(), torch.zeros_like(F[:, 1:]) if lam is None else lam.clone()
    evals, log, sizes = np.full(len(x), 4), [], []
    for k in range(outer + 1):
        lam = method.prepare(np.arange(len(x)), F, J, lam, tol)
        sizes.append(kkt(F, J, lam).norm(dim=1))
        # a run whose residual has exploded is given up
        rows = ((sizes[-1] > tol) & (sizes[-1] < 1e12)).nonzero()[:, 0].numpy()
        if not len(rows) or k == outer:
            break
        H = problem.hessian(x[rows], method.weights(rows, F[rows], lam[rows]))
        z, slope, steps = method.direction(k, rows, F[rows], J[rows], H, lam[rows])
        n, alpha = x.shape[1], x.new_ones(len(rows))
        now, todo = method.merit(rows, F[rows], J[rows], lam[rows]), np.arange(len(rows))
        base_x, base_lam = x[rows], lam[rows]
        while len(todo):
            s, step = rows[todo], alpha[todo, None] * z[todo]
            x[s], lam[s] = base_x[todo] + step[:, :n], base_lam[todo] + step[:, n:]
            if method.trial_cost == 4:
                F[s], J[s] = problem.first(x[s])
            else:
                F[s] = torch.stack(list(problem.F(x[s].T)), 1)
            evals[s] += method.trial_cost
            there, was = method.merit(s, F[s], J[s], lam[s]), now[todo]
            rounding = 1e-14 * (1 + was.abs())  # below it the two cannot be told apart
            good = there <= was + method.beta * alpha[todo] * slope[todo] + rounding
            todo = todo[~(good | (alpha[todo] < 1e-12)).numpy()]
            alpha[todo] /= 2
        if method.step_cost:
            F[rows], J[rows] = problem.first(x[rows])
            evals[rows] += method.step_cost
        entry = np.full((4, len(x)), np.nan)
        square = sizes[-1][rows].numpy() ** 2
        entry[:, rows] = alpha, steps, slope.numpy() / square, method.eta2(rows)
        log.append(entry)
    alpha, steps, slope, eta2 = np.stack(log, 2) if log else np.empty((4, len(x), 0))
    size = torch.stack(sizes, 1).numpy()
    return Trace(size, alpha, steps, slope, eta2, evals, x, lam, size[:, -1] <= tol)


@torch.no_grad()
def sketch_step(K, b, z, S):
    """The general step, for a batch of systems at once, on any device.

    K [..., N, N], b and z [..., N], S [..., N, q] -> z [..., N].
    """
    A = K.mT @ S
    r = (K @ z[..., None]) - b[..., None]
    return z - (A @ (torch.linalg.pinv(A.mT @ A) @ (S.mT @ r)))[..., 0]


# Rivals


class AugmentedLagrangian(Method):
    """min over x of f + lambda' c + mu/2 |c|^2 to accuracy tau; lambda += mu c; mu *= nu.

    The inner steps are Newton's, with the Hessian's spectrum lifted where it is not positive.
    """

    def __init__(self, S, penalty=1.0, nu=1.5):
        self.mu, self.nu = torch.tensor(np.broadcast_to(penalty, S).astype(float)), nu
        self.tau = torch.full((S,), 0.1, dtype=torch.float64)

    def weights(self, rows, F, lam):
        return lam + self.mu[rows, None] * F[:, 1:]

    def gradient(self, rows, F, J, lam):
        return kkt(F, J, self.weights(rows, F, lam))[:, : J.shape[2]]

    def prepare(self, rows, F, J, lam, tol):
        lam = lam.clone()
        while True:
            small = self.gradient(rows, F, J, lam).norm(dim=1) <= self.tau
            s = (small & (kkt(F, J, lam).norm(dim=1) > tol)).nonzero()[:, 0]
            if not len(s):
                return lam
            lam[s] = self.weights(s, F[s], lam[s])
            self.mu[s] *= self.nu
            self.tau[s] *= 0.1

    def direction(self, k, rows, F, J, H, lam):
        g, G = self.gradient(rows, F, J, lam), J[:, 1:]
        A = H + self.mu[rows, None, None] * (G.mT @ G)
        low = torch.linalg.eigvalsh(A)[:, 0]
        lift = torch.where(low < 1e-6, 0.1 - low, 0.0)
        z = -torch.linalg.solve(A + lift[:, None, None] * torch.eye(A.shape[1], dtype=A.dtype), g)
        return torch.cat([z, torch.zeros_like(lam)], 1), (g * z).sum(1), np.zeros(len(rows))

    def merit(self, rows, F, J, lam):
        c = F[:, 1:]
        return F[:, 0] + (lam * c).sum(1) + self.mu[rows] / 2 * (c * c).sum(1)


@njit(cache=True)
def gmres(K, b, tol):
    """K z = b by GMRES without restarts, until |K z - b| <= tol; returns z and the steps."""
    N = len(b)
    V, R = np.zeros((N + 1, N)), np.zeros((N + 1, N))  # basis, rotated Hessenberg matrix
    turn, g = np.zeros((N, 2)), np.zeros(N + 1)
    g[0] = np.linalg.norm(b)
    if g[0] <= tol:
        return np.zeros(N), 0
    V[0] = b / g[0]
    steps = 0
    for j in range(N):
        w = K @ V[j]
        for i in range(j + 1):
            R[i, j] = w @ V[i]
            w -= R[i, j] * V[i]
        size = np.linalg.norm(w)
        if size > 0:
            V[j + 1] = w / size
        for i in range(j):
            a, c = R[i, j], R[i + 1, j]
            R[i, j] = turn[i, 0] * a + turn[i, 1] * c
            R[i + 1, j] = turn[i, 0] * c - turn[i, 1] * a
        r = math.hypot(R[j, j], size)
        turn[j, 0], turn[j, 1] = R[j, j] / r, size / r
        R[j, j] = r
        g[j], g[j + 1] = turn[j, 0] * g[j], -turn[j, 1] * g[j]
        steps += 1
        if abs(g[j + 1]) <= tol:
            break
    return V[:steps].T @ np.linalg.solve(R[:steps, :steps], g[:steps]), steps


class GmresSQP(Method):
    """SQP on f + mu |c|_1, directions by GMRES (Byrd, Curtis and Nocedal 2008).

    With r = (r_x, r_c) the residual of the KKT system, a direction is good if the model of the
    merit function is reduced enough and |r| <= kappa |DL|. If not, the solve continues:

    - adaptive: mu *= nu, kappa /= nu^2, for good;
    - plain: with a tenth of the accuracy, for this direction only. It is good, too, without a
      reduction if |r_x| <= |c| / 10 and |r_c| <= b |c|; then mu is raised as far as needed.
    """

    def __init__(self, S, penalty=1.0, adaptive=True, nu=1.5, floor=1e-6):
        self.mu = np.broadcast_to(penalty, S).astype(float)
        self.kappa, self.b = np.full(S, 0.1), np.ones(S)
        self.adaptive, self.nu, self.beta, self.floor = adaptive, nu, 1e-8, floor

    def direction(self, k, rows, F, J, H, lam):
        B, K = (v.numpy() for v in kkt_matrix(H, J[:, 1:], floor=self.floor))
        DL, g, G, c = (v.numpy() for v in (kkt(F, J, lam), J[:, 0], J[:, 1:], F[:, 1:]))
        return gather([self.solve(k, s, *v) for s, *v in zip(rows, K, B, DL, g, G, c)])

    def solve(self, k, s, K, B, DL, g, G, c):
        """z, the slope of the merit function along it and the steps of run s."""
        n, z, steps, kappa = len(g), np.zeros(len(DL)), 0, self.kappa[s]
        was, size = np.abs(c).sum(), np.linalg.norm(DL)
        if k == 0:
            self.b[s] = max(np.abs(DL[:n]).sum() / (was + 1), 1)
        while True:
            more, t = gmres(K, -DL - K @ z, kappa * size)
            z, steps = z + more, steps + t
            d = z[:n]
            to = np.abs(c + G @ d).sum()
            cost = g @ d + max(d @ B @ d / 2, 0)
            least = 0.09 * self.mu[s] * max(was, to - was)
            reduced = self.mu[s] * (was - to) - cost >= least
            if self.adaptive:
                if reduced or self.mu[s] > 1e8:
                    break
                self.mu[s] *= self.nu
                self.kappa[s] = kappa = kappa / self.nu**2
                continue
            r_x, r_c = (np.linalg.norm(v) for v in np.split(K @ z + DL, [n]))
            allowed = self.b[s] * np.linalg.norm(c)
            feasible = r_x <= 0.1 * np.linalg.norm(c) and r_c <= allowed
            reduced = reduced and r_c <= max(0.1 * np.linalg.norm(DL[:n]), allowed)
            if reduced or feasible or kappa < 1e-12:
                break
            kappa /= 10
        if not self.adaptive and not reduced and to < was:
            self.mu[s] = max(self.mu[s], cost / (0.9 * (was - to))) + 1e-4
        return z, g @ d - self.mu[s] * (was - to), steps

    def merit(self, rows, F, J, lam):
        return F[:, 0] + torch.tensor(self.mu[rows]) * F[:, 1:].abs().sum(1)


# Problems


def hock_schittkowski():
    """Ten problems of Hock and Schittkowski (1981), with their starts and optimal values."""
    two = 2**0.5
    # fmt: off
    table = [
        ("HS6", [-1.2, 1], 0, lambda a, b: ((1 - a)**2, 10 * (b - a**2))),
        ("HS7", [2, 2], -(3**0.5),
         lambda a, b: (torch.log(1 + a**2) - b, (1 + a**2)**2 + b**2 - 4)),
        ("HS26", [-2.6, 2, 2], 0,
         lambda a, b, c: ((a - b)**2 + (b - c)**4, (1 + b**2) * a + c**4 - 3)),
        ("HS27", [2, 2, 2], 0.04,
         lambda a, b, c: (0.01 * (a - 1)**2 + (b - a**2)**2, a + c**2 + 1)),
        ("HS28", [-4, 1, 1], 0,
         lambda a, b, c: ((a + b)**2 + (b + c)**2, a + 2 * b + 3 * c - 1)),
        ("HS39", [2] * 4, -1,
         lambda a, b, c, d: (-a, b - a**3 - c**2, a**2 - b - d**2)),
        ("HS40", [0.8] * 4, -0.25,
         lambda a, b, c, d: (-a * b * c * d, a**3 + b**2 - 1, a**2 * d - c, d**2 - b)),
        ("HS42", [1] * 4, 28 - 10 * two,
         lambda a, b, c, d: ((a - 1)**2 + (b - 2)**2 + (c - 3)**2 + (d - 4)**2,
                             a - 2, c**2 + d**2 - 2)),
        ("HS77", [2] * 5, 0.24150513,
         lambda a, b, c, d, e: ((a - 1)**2 + (a - b)**2 + (c - 1)**2 + (d - 1)**4 + (e - 1)**6,
                                a**2 * d + torch.sin(d - e) - 2 * two,
                                b + c**4 * d**2 - 8 - two)),
        ("HS79", [2] * 5, 0.0787768209,
         lambda a, b, c, d, e: ((a - 1)**2 + (a - b)**2 + (b - c)**2 + (c - d)**4 + (d - e)**4,
                                a + b**2 + c**3 - 2 - 3 * two,
                                b - c**2 + d + 2 - 2 * two, a * e - 2)),
    ]
    # fmt: on
    return [Problem(name, lambda x, f=f: f(*x), x0, best) for name, x0, best, f in table]


def logistic(X, y, m=5, seed=0):
    """Mean logistic loss subject to A x = A u and |x|^2 = 1, u a random unit vector.

    X [N, n] features, y [N] labels in {-1, 1}; A has m Gaussian rows of expected length 1.
    """
    X, y = torch.as_tensor(X, dtype=torch.float64), torch.as_tensor(y, dtype=torch.float64)
    if X.ndim != 2 or y.shape != X.shape[:1] or not set(y.tolist()) <= {-1.0, 1.0}:
        raise ValueError(
            f"needs X [N, n] and labels -1 or 1 [N], got {list(X.shape)}, {list(y.shape)}"
        )
    n, gen = X.shape[1], torch.Generator().manual_seed(seed)
    A = torch.randn(m, n, generator=gen, dtype=torch.float64) / n**0.5
    u = torch.nn.functional.normalize(torch.randn(n, generator=gen, dtype=torch.float64), dim=0)

    def F(x):
        f = torch.nn.functional.softplus(-y[:, None] * (X @ x)).mean(0)
        return f, *(A @ (x - u[:, None])), (x * x).sum(0) - 1

    return Problem("logistic", F, [1.0] * n)


def control(N=40, alpha=0.1, scaled=True):
    """Steer the state w of -w'' = u on (0, 1), w(0) = w(1) = 0, towards a target.

    min (|w - target|^2 + alpha |u|^2) / 2 on a grid of N inner points, x = (w, u). The equation is
    D w = u with the second difference D, or w = D^-1 u if `scaled`: the same constraint, but rows
    of like size.
    """
    t = torch.arange(1, N + 1, dtype=torch.float64) / (N + 1)
    target = torch.sin(math.pi * t) + torch.cos(2 * t)
    e = torch.ones(N - 1, dtype=torch.float64)
    D = (2 * torch.eye(N, dtype=torch.float64) - torch.diag(e, 1) - torch.diag(e, -1)) * (
        N + 1
    ) ** 2
    inverse = torch.linalg.inv(D)

    def F(x):
        w, u = x[:N], x[N:]
        f = (((w - target[:, None]) ** 2).sum(0) + alpha * (u * u).sum(0)) / 2
        return f, *(w - inverse @ u if scaled else D @ w - u)

    return Problem("control", F, [1.0] * (2 * N))
