r"""Greedy block coordinate descent: which block, and what to do with it.

Nutini, Laradji and Schmidt, "Let's Make Block Coordinate Descent Converge Faster: Faster Greedy
Rules, Message-Passing, Active-Set Complexity, and Superlinear Convergence", JMLR 2022,
arXiv:1712.08859.

One iteration picks a block b of tau coordinates and moves them only, x_b <- x_b + d. With
H_b >= the Hessian's block bb everywhere, and L_b its largest eigenvalue,

    f(x + U_b d) <= f(x) + g_b' d + d' H_b d / 2,    g_b the gradient's entries in b,

which the *update* minimizes, exactly or with a coarser bound:

    gradient  d = -g_b / L_b            matrix   d = -H_b^-1 g_b
    diagonal  d = -g_b / D_b            Newton   d = -alpha (Hessian_bb)^-1 g_b, Armijo for alpha

The one idea: *select* the block for which that guaranteed decrease is largest, not the gradient:

    GS  |g_b|^2      GSL  |g_b|^2 / L_b      GSD  sum_i g_i^2 / D_bi      GSQ  g_b' H_b^-1 g_b

with D_bi = tau L_i. Blocks are *fixed* (FB, a partition: score every part) or *variable* (VB, any
tau coordinates): GS and GSD then take the tau largest scores; GSQ is combinatorial and is
approximated, by GSD, by a greedy that adds one variable at a time, or by iterated hard thresholding
(IHT, of the paper's experiments). Rivals: random, cyclic, and Lipschitz-weighted random blocks.

If the graph of A's non-zeros has no cycle within b, the matrix update costs O(|b|): *message
passing*, an elimination from the leaves to the roots. A block may then hold half of all variables,
or a spanning forest of nearly all.

For F = f + lambda |x|_1 the greedy proximal updates find the zeros of the solution after finitely
many iterations (`radius`). A *two-metric projection* update, Newton on what is not bound to
zero, then terminates as soon as a block holds the whole support.

Everything but message passing runs in torch for S problems at once, on any device. Growing a forest
and eliminating along it is one short dependent step a node: compiled by numba, on the CPU; there S
problems are one matrix with S diagonal blocks.
"""

from collections import namedtuple

import numpy as np
import torch
from numba import njit

# b [S, tau] coordinates; H [S, tau, tau] a bound on the Hessian there; L [S] its largest eigenvalue
# or None, computed when needed.
Block = namedtuple("Block", "b H L")

# f [S, T + 1] values; x [S, n] the last point; if kept: bound [S, T] the decreases that
# `guaranteed` promises, xs [S, T + 1, n] all points.
Trace = namedtuple("Trace", "f x bound xs")


def entries(v, b):
    """v [S, n], b [S, tau] -> v_b [S, tau]."""
    return v.gather(1, b)


def submatrix(H, b):
    """H [S, n, n], b [S, tau] -> H_bb [S, tau, tau]."""
    s = torch.arange(len(H), device=H.device)
    return H[s[:, None, None], b[:, :, None], b[:, None, :]]


def quadratic_form(H, v):
    """v' H v: H [..., k, k], v [..., k] -> [...]."""
    return (v * (H @ v[..., None])[..., 0]).sum(-1)


# Problems. Each has H [S, n, n], an upper bound on the Hessian, and L [S, n], bounds on its
# diagonal. `at(x)` makes the state of an iterate; `move(state, b, d)` takes a step.


class State:
    """An iterate: x [S, n], value f [S], gradient g [S, n], and what the problem tracks, z."""

    def __init__(self, x):
        self.x, self.f, self.g, self.z = x.clone(), None, None, None


class Quadratic:
    """f(x) = x'Ax/2 - b'x + c; the bound is exact, H = A.

    Parameters
    ----------
    A : torch.Tensor, shape [S, n, n]
        Symmetric and positive semidefinite.
    b : torch.Tensor, shape [S, n]
    c : torch.Tensor, shape [S], optional
    """

    def __init__(self, A, b, c=None):
        if A.ndim != 3 or A.shape[1] != A.shape[2] or b.shape != A.shape[:2]:
            raise ValueError(
                f"A must have shape [S, n, n] and b [S, n], got {list(A.shape)}, {list(b.shape)}"
            )
        self.H, self.b, self.c = A, b, torch.zeros_like(b[:, 0]) if c is None else c
        self.L = A.diagonal(dim1=1, dim2=2).clone()

    @classmethod
    def least_squares(cls, X, y):
        """|Xx - y|^2 / 2 with X [S, m, n], y [S, m]."""
        return cls(X.mT @ X, (X.mT @ y[..., None])[..., 0], (y**2).sum(1) / 2)

    def at(self, x):
        state = State(x)
        state.g = (self.H @ x[..., None])[..., 0] - self.b
        state.f = (x * (state.g - self.b)).sum(1) / 2 + self.c
        return state

    def move(self, state, b, d):
        """Step, with the gradient tracked in O(n tau): g <- g + A_b' d."""
        rows = self.H[torch.arange(len(b), device=b.device)[:, None], b]  # [S, tau, n]
        change = (d[:, None] @ rows)[:, 0]
        state.f = state.f + (d * (entries(state.g, b) + entries(change, b) / 2)).sum(1)
        state.g = state.g + change
        state.x.scatter_add_(1, b, d)

    def hessian(self, state, b):
        return submatrix(self.H, b)

    def change(self, state, b, d):
        """f(x + U_b d) - f(x), shape [S]."""
        return (entries(state.g, b) * d).sum(1) + quadratic_form(submatrix(self.H, b), d) / 2


class Regression:
    """f(x) = sum_j l_j(X_j x) + ridge |x|^2 / 2, with the products z = Xx tracked, [S, C, m].

    Coordinate (feature i, class c) stands at i C + c. A loss gives H and L, ``fit(z)``: its sum [S]
    and its derivatives [S, C, m], and ``curvature(z, columns, c)``: a block of its Hessian.
    """

    def __init__(self, X, ridge, C):
        self.X, self.ridge, self.C = X, ridge, C
        self.XT = X.mT.contiguous()  # rows of XT are columns of X: a block of them is contiguous

    def at(self, x):
        state = State(x)
        state.z = x.view(len(x), -1, self.C).mT @ self.XT
        return self.refresh(state)

    def refresh(self, state):
        fit, r = self.fit(state.z)
        state.f = fit + self.ridge / 2 * (state.x**2).sum(1)
        state.g = (r @ self.X).mT.flatten(1) + self.ridge * state.x
        return state

    def columns(self, b):
        """Columns of X, [S, tau, m], and classes, [S, tau]."""
        return self.XT[torch.arange(len(b), device=b.device)[:, None], b // self.C], b % self.C

    def shifted(self, state, b, d):
        columns, c = self.columns(b)
        move = columns * d[..., None]
        return state.z.scatter_add(1, c[..., None].expand_as(move), move)

    def move(self, state, b, d):
        state.z = self.shifted(state, b, d)
        state.x.scatter_add_(1, b, d)
        self.refresh(state)

    def change(self, state, b, d):
        x = state.x.scatter_add(1, b, d)
        return self.fit(self.shifted(state, b, d))[0] + self.ridge / 2 * (x**2).sum(1) - state.f

    def hessian(self, state, b):
        eye = torch.eye(b.shape[1], dtype=state.x.dtype, device=b.device)
        return self.curvature(state.z, *self.columns(b)) + self.ridge * eye


class Logistic(Regression):
    """l_j(z) = log(1 + exp(-y_j z)), C = 1; H = X'X/4 + ridge I.

    Parameters
    ----------
    X : torch.Tensor, shape [S, m, n]
    y : torch.Tensor, shape [S, m]
        Entries -1 and 1.
    ridge : float
    """

    def __init__(self, X, y, ridge):
        if not ((y == 1) | (y == -1)).all():
            raise ValueError(f"labels must be -1 or 1, got {y.unique().tolist()[:5]}")
        super().__init__(X, ridge, 1)
        self.y = y[:, None]
        self.H = self.XT @ X / 4
        self.H.diagonal(dim1=1, dim2=2).add_(ridge)
        self.L = self.H.diagonal(dim1=1, dim2=2).clone()

    def fit(self, z):
        margin = self.y * z
        return -torch.nn.functional.logsigmoid(margin).sum((1, 2)), -self.y * torch.sigmoid(-margin)

    def curvature(self, z, columns, c):
        p = torch.sigmoid(z)  # [S, 1, m]
        return (columns * (p * (1 - p))) @ columns.mT


class Softmax(Regression):
    """l_j(z) = log sum_c exp(z_c) - z_{y_j}.

    The bound is Boehning's, H = X'X kron (I - 11'/C)/2 + ridge I; a single coordinate has
    L_i = |X_i|^2 / 4 + ridge.

    Parameters
    ----------
    X : torch.Tensor, shape [S, m, p]
    y : torch.LongTensor, shape [S, m]
    classes : int
    ridge : float
    """

    def __init__(self, X, y, classes, ridge):
        super().__init__(X, ridge, classes)
        self.Y = torch.nn.functional.one_hot(y, classes).to(X.dtype).mT.contiguous()  # [S, C, m]
        eye = torch.eye(classes, dtype=X.dtype, device=X.device)
        n = X.shape[2] * classes
        G = self.XT @ X
        self.H = torch.einsum("sij,cd->sicjd", G, (eye - 1 / classes) / 2).reshape(len(X), n, n)
        self.H.diagonal(dim1=1, dim2=2).add_(ridge)
        self.L = (G.diagonal(dim1=1, dim2=2) / 4 + ridge).repeat_interleave(classes, 1)

    def fit(self, z):
        top = z.amax(1, keepdim=True)
        p = (z - top).exp()
        total = p.sum(1, keepdim=True)
        log_sum = top + total.log()
        return log_sum.sum((1, 2)) - (z * self.Y).sum((1, 2)), p / total - self.Y

    def curvature(self, z, columns, c):
        p = torch.softmax(z, 1)[torch.arange(len(c), device=c.device)[:, None], c]
        weighted = columns * p  # [S, tau, m]
        same = (c[:, :, None] == c[:, None, :]).to(p.dtype)
        return same * (weighted @ columns.mT) - weighted @ weighted.mT


# Selection, fixed blocks


def partition(problem, tau, order="natural", generator=None):
    """Cut the coordinates into n / tau parts, [S, n / tau, tau].

    Parameters
    ----------
    order : {"natural", "random", "sorted"}
        How coordinates are lined up before the cut; sorted is by L_i.

    Raises
    ------
    ValueError
        If tau does not divide n, or the order is unknown.
    """
    S, n = problem.L.shape
    if not 1 <= tau <= n or n % tau:
        raise ValueError(f"tau must divide the number of coordinates, {n}; got {tau}")
    if order == "natural":
        line = torch.arange(n).expand(S, n)
    elif order == "random":
        line = torch.rand(S, n, generator=generator).argsort(1)
    elif order == "sorted":
        line = problem.L.argsort(1)
    else:
        raise ValueError(f"order must be natural, random or sorted, got {order!r}")
    return line.to(problem.L.device).reshape(S, n // tau, tau)


class Fixed:
    """Fixed blocks: a partition, with every part's curvature computed once.

    Parameters
    ----------
    problem
        With H [S, n, n] and L [S, n].
    parts : torch.LongTensor, shape [S, B, tau]
    rule : {"cyclic", "random", "lipschitz", "GS", "GSL", "GSD", "GSQ"}
    generator : torch.Generator, optional
        On the CPU; for the random rules.
    """

    RULES = ("cyclic", "random", "lipschitz", "GS", "GSL", "GSD", "GSQ")

    def __init__(self, problem, parts, rule, generator=None):
        if rule not in self.RULES:
            raise ValueError(f"rule must be one of {', '.join(self.RULES)}, got {rule!r}")
        self.rule, self.parts, self.generator = rule, parts, generator
        S, _, tau = parts.shape
        self.s = torch.arange(S, device=parts.device)
        rows = parts[..., :, None], parts[..., None, :]
        self.H = problem.H[self.s[:, None, None, None], *rows]  # [S, B, tau, tau]
        self.L = torch.linalg.eigvalsh(self.H)[..., -1]  # [S, B]
        self.D = tau * problem.L[self.s[:, None, None], parts]  # [S, B, tau]
        if rule == "GSQ":
            self.inverse = torch.linalg.inv(self.H)

    def scores(self, g):
        """The greedy rules: twice the guaranteed decrease of their update, [S, B]."""
        g_b = g.gather(1, self.parts.flatten(1)).view(self.parts.shape)  # [S, B, tau]
        if self.rule == "GS":
            return g_b.norm(dim=2)
        if self.rule == "GSL":
            return (g_b**2).sum(2) / self.L
        if self.rule == "GSD":
            return (g_b**2 / self.D).sum(2)
        return quadratic_form(self.inverse, g_b)  # GSQ

    def __call__(self, state, t):
        S, B, _ = self.parts.shape
        if self.rule == "cyclic":
            k = torch.full_like(self.s, t % B)
        elif self.rule == "random":
            k = torch.randint(B, (S,), generator=self.generator).to(self.s.device)
        elif self.rule == "lipschitz":
            k = torch.multinomial(self.L.cpu(), 1, generator=self.generator)[:, 0].to(self.s.device)
        else:
            k = self.scores(state.g).argmax(1)
        return Block(self.parts[self.s, k], self.H[self.s, k], self.L[self.s, k])


# Selection, variable blocks


def forward_greedy(H, g, tau):
    """Add one variable at a time, the one that raises g_b' H_b^-1 g_b most, [S, tau].

    A Cholesky factorization of H whose pivots are chosen on the way. With b eliminated, `rest` is
    what is left of the gradient and `pivot` of the diagonal: adding i gains rest_i^2 / pivot_i.
    """
    S, n = g.shape
    s = torch.arange(S, device=g.device)
    rest, pivot = g.clone(), H.diagonal(dim1=1, dim2=2).clone()
    floor = 1e-10 * pivot  # numerically dependent on b: nothing to gain
    C = g.new_zeros(S, tau, n)  # columns of the factor, as rows
    b = torch.empty(S, tau, dtype=torch.long, device=g.device)
    free = torch.ones_like(g, dtype=torch.bool)
    for k in range(tau):
        gain = torch.where(pivot > floor, rest**2 / pivot.clamp(min=1e-300), 0.0)
        j = gain.masked_fill(~free, -1.0).argmax(1)
        b[:, k] = j
        free[s, j] = False
        if k == tau - 1:
            break
        root = pivot[s, j].clamp(min=1e-300).sqrt()[:, None]
        c = (H[s, j] - (C[s, :k, j][:, None] @ C[:, :k])[:, 0]) / root
        c = torch.where((pivot[s, j] > floor[s, j])[:, None], c, 0.0)
        rest = rest - c * (rest[s, j][:, None] / root)
        pivot = pivot - c**2
        C[:, k] = c
    return b


def hard_thresholding(H, g, tau, mu, d, steps=10):
    """IHT from d [S, n]: steps mu [S] on g'd + d'Hd/2; the tau largest entries stay, [S, tau]."""
    mu = mu[:, None]
    for _ in range(steps):
        d = d - mu * (g + (H @ d[..., None])[..., 0])
        b = d.abs().topk(tau, 1).indices
        d = torch.zeros_like(d).scatter(1, b, d.gather(1, b))
    return b


class Variable:
    """Variable blocks: any tau coordinates.

    Parameters
    ----------
    problem
        With H [S, n, n] and L [S, n].
    tau : int
    rule : {"random", "GS", "GSD", "greedy", "IHT"}
        The last two, and GSD itself, approximate GSQ.
    generator : torch.Generator, optional
    """

    RULES = ("random", "GS", "GSD", "greedy", "IHT")

    def __init__(self, problem, tau, rule, generator=None):
        if rule not in self.RULES:
            raise ValueError(f"rule must be one of {', '.join(self.RULES)}, got {rule!r}")
        if not 1 <= tau <= problem.L.shape[1]:
            raise ValueError(f"tau must be between 1 and {problem.L.shape[1]}, got {tau}")
        self.problem, self.tau, self.rule, self.generator = problem, tau, rule, generator
        if rule == "IHT":
            self.mu = 1 / torch.linalg.eigvalsh(problem.H)[:, -1]

    def __call__(self, state, t):
        p, g = self.problem, state.g
        if self.rule == "greedy":
            b = forward_greedy(p.H, g, self.tau)
        elif self.rule == "IHT":
            b = hard_thresholding(p.H, g, self.tau, self.mu, -g / p.L)
        else:
            if self.rule == "GS":
                score = g.abs()
            elif self.rule == "GSD":
                score = g**2 / p.L  # the factor tau of D does not change the order
            else:
                score = torch.rand(g.shape, generator=self.generator).to(g)
            b = score.topk(self.tau, 1).indices
        return Block(b, submatrix(p.H, b), None)


# Updates: (problem, state, block) -> d [S, tau]


def largest(block):
    """L_b [S]: the largest eigenvalue of H_b."""
    return torch.linalg.eigvalsh(block.H)[:, -1] if block.L is None else block.L


def gradient(problem, state, block):
    """d = -g_b / L_b."""
    return -entries(state.g, block.b) / largest(block)[:, None]


def diagonal(problem, state, block):
    """d_i = -g_i / D_bi, D_bi = tau L_i."""
    return -entries(state.g, block.b) / (block.b.shape[1] * entries(problem.L, block.b))


def solve(H, g):
    """H^-1 g for symmetric positive definite H [S, tau, tau], g [S, tau]."""
    return torch.cholesky_solve(g[..., None], torch.linalg.cholesky(H))[..., 0]


def matrix(problem, state, block):
    """d = -H_b^-1 g_b."""
    return -solve(block.H, entries(state.g, block.b))


def armijo(problem, state, b, v, step, c=1e-4):
    """d = step(alpha) [S, tau] for the first alpha of 1, 1/2, ... with a fall of at least -c v'd.

    A change below the rounding of f passes: halving would not end.
    """
    alpha, rounding = torch.ones_like(state.f)[:, None], torch.finfo(v.dtype).eps * state.f.abs()
    for _ in range(40):
        d = step(alpha)
        fails = problem.change(state, b, d) > c * (v * d).sum(1) + rounding
        if not fails.any():
            break
        alpha = torch.where(fails[:, None], alpha / 2, alpha)
    return d


def newton(problem, state, block):
    """d = -alpha (Hessian_bb)^-1 g_b, Armijo for alpha."""
    g = entries(state.g, block.b)
    direction = -solve(problem.hessian(state, block.b), g)
    return armijo(problem, state, block.b, g, lambda alpha: alpha * direction)


def guaranteed(problem, state, block, update):
    """What the bound promises for an update, [S]: g_b' H_b^-1 g_b / 2 for the matrix update."""
    g = entries(state.g, block.b)
    if update is gradient:
        return (g**2).sum(1) / largest(block) / 2
    if update is diagonal:
        return (g**2 / entries(problem.L, block.b)).sum(1) / block.b.shape[1] / 2
    if update is matrix:
        return (g * solve(block.H, g)).sum(1) / 2
    return torch.zeros_like(state.f)  # Armijo promises a fall, not how far


def descend(problem, x0, select, update, steps, target=None, keep=False):
    """Block coordinate descent.

    Parameters
    ----------
    problem : Quadratic, Logistic, Softmax or Lasso
    x0 : torch.Tensor, shape [S, n]
    select : callable
        ``select(state, t)`` gives a `Block`: `Fixed`, `Variable` or `ProximalGreedy`.
    update : callable
        ``update(problem, state, block)`` gives d [S, tau]: gradient, diagonal, matrix, newton;
        prox_gradient, two_metric.
    steps : int
    target : torch.Tensor, shape [S], optional
        Stop as soon as no f is above it.
    keep : bool
        Also return the guaranteed decreases and all points.

    Returns
    -------
    Trace
    """
    state = problem.at(x0)
    f, bound, xs = [state.f], [], [state.x.clone()]
    for t in range(steps):
        block = select(state, t)
        if keep:
            bound.append(guaranteed(problem, state, block, update))
        problem.move(state, block.b, update(problem, state, block))
        f.append(state.f)
        if keep:
            xs.append(state.x.clone())
        if target is not None and (state.f <= target).all():
            break
    kept = (torch.stack(bound, 1), torch.stack(xs, 1)) if keep else (None, None)
    return Trace(torch.stack(f, 1), state.x, *kept)


def pl_constant(A, parts):
    """mu of random fixed blocks on a quadratic: E f - f* shrinks by 1 - mu a step at least, [S].

    |v|_B^2 is the mean over the blocks of v_b' H_b^-1 v_b; mu is the largest number with
    |g|_B^2 / 2 >= mu (f - f*) for all x. Greedy GSQ has the maximum over the blocks instead, never
    smaller, so that its factor is at most this one.

    Parameters
    ----------
    A : torch.Tensor, shape [S, n, n]
        Positive semidefinite: the smallest eigenvalue that is not zero counts.
    parts : torch.LongTensor, shape [S, B, tau]
    """
    S, B, _ = parts.shape
    mean = torch.zeros_like(A)
    s = torch.arange(S, device=A.device)[:, None, None]
    for k in range(B):
        b = parts[:, k]
        mean[s, b[:, :, None], b[:, None, :]] = torch.linalg.inv(submatrix(A, b)) / B
    values, vectors = torch.linalg.eigh(A)
    root = (vectors * values.clamp(min=0).sqrt()[:, None]) @ vectors.mT
    mu = torch.linalg.eigvalsh(root @ mean @ root)
    return mu.masked_fill(mu < 1e-12, torch.inf).min(1).values


def iteration_ops(m, n, tau, greedy):
    """Operations of an iteration on sum_j l(X_j x) with dense X [m, n], the products Xx kept.

    A block's gradient and the new products take 2 m tau each, the derivatives of l about 4 m. A
    greedy rule needs the whole gradient, 2 m n, and its scores.
    """
    ops = 4 * m * tau + 4 * m
    return ops + 2 * m * (n - tau) + 2 * n if greedy else ops


# Message passing. A is a scipy.sparse CSR matrix; S problems of n variables each are its S diagonal
# blocks, and their forests one forest.


@njit(cache=True)
def _grow(indptr, indices, order, tree):
    """Go through `order`; keep a node unless it would join two kept neighbors of one tree."""
    chosen = np.zeros(len(tree), np.bool_)
    roots = np.empty(len(tree), np.int64)
    for i in order:
        count, closes = 0, False
        for j in indices[indptr[i] : indptr[i + 1]]:
            if j == i or not chosen[j]:
                continue
            r = j
            while tree[r] != r:  # union-find, halving the path
                tree[r] = tree[tree[r]]
                r = tree[r]
            for q in roots[:count]:
                closes = closes or q == r
            roots[count] = r
            count += 1
        if not closes:
            chosen[i] = True
            for q in roots[:count]:
                tree[q] = i
    return chosen


def grow_forest(A, order):
    """Greedy variable forest: visit nodes in an order, add each that closes no cycle.

    Parameters
    ----------
    A : scipy.sparse.csr_array, shape [N, N]
        Symmetric.
    order : numpy.ndarray, shape [N]
        The greedy one is by decreasing |g_i| / sqrt(L_i).

    Returns
    -------
    numpy.ndarray of bool, shape [N]
    """
    return _grow(A.indptr, A.indices, order, np.arange(A.shape[0]))


@njit(cache=True)
def _eliminate(indptr, indices, data, block, r):
    n, ops = len(block), 0
    parent, link = np.full(n, -2), np.zeros(n)  # -2: not seen; link: A between node and parent
    pivot, rest, d = np.zeros(n), r.copy(), np.zeros(n)
    order = np.empty(n, np.int64)
    end = 0
    for root in np.flatnonzero(block):
        if parent[root] != -2:
            continue
        parent[root] = -1
        order[end] = root
        at, end = end, end + 1
        while at < end:  # breadth first, roots to leaves
            i = order[at]
            at += 1
            for e in range(indptr[i], indptr[i + 1]):
                j = indices[e]
                ops += 1
                if j == i:
                    pivot[i] = data[e]
                elif block[j] and data[e] != 0 and j != parent[i]:
                    if parent[j] != -2:
                        return d, -1  # a cycle
                    parent[j], link[j] = i, data[e]
                    order[end] = j
                    end += 1
    for i in order[:end][::-1]:  # leaves to roots: each node sends its parent two numbers
        p = parent[i]
        if p >= 0:
            w = link[i] / pivot[i]
            pivot[p] -= w * link[i]
            rest[p] -= w * rest[i]
            ops += 5
    for i in order[:end]:  # roots to leaves
        p = parent[i]
        d[i] = rest[i] / pivot[i] if p < 0 else (rest[i] - link[i] * d[p]) / pivot[i]
        ops += 1 if p < 0 else 3
    return d, ops


def message_passing(A, block, r):
    """Solve A_bb d = r_b exactly in O(|b|), for a block whose graph is a forest.

    Parameters
    ----------
    A : scipy.sparse.csr_array, shape [N, N]
        Symmetric, positive definite on the block.
    block : numpy.ndarray of bool, shape [N]
    r : numpy.ndarray, shape [N]

    Returns
    -------
    d : numpy.ndarray, shape [N]
        Zero outside the block.
    ops : int
        Arithmetic operations, and looks at entries of A.

    Raises
    ------
    ValueError
        If the block has a cycle.
    """
    d, ops = _eliminate(A.indptr, A.indices, A.data, block, r)
    if ops < 0:
        raise ValueError(
            f"the graph of A within the block of {int(block.sum())} variables has a cycle: message "
            "passing needs a forest, such as grow_forest gives"
        )
    return d, ops


def red_black(side):
    """The two colors of a side x side lattice, as masks [2, side^2]: A_bb is diagonal."""
    row, column = np.divmod(np.arange(side * side), side)
    red = (row + column) % 2 == 0
    return np.stack([red, ~red])


def combs(side):
    """Two trees that share a side x side lattice: interleaved combs of rows, [2, side^2]."""
    row, column = np.divmod(np.arange(side * side), side)
    one = (column == 0) | ((row % 2 == 0) & (column < side - 1))
    return np.stack([one, ~one])


def descend_forest(A, b, S, select, steps):
    """Block descent on x'Ax/2 - b'x by exact solves on forests, from x = 0.

    Parameters
    ----------
    A : scipy.sparse.csr_array, shape [S n, S n]
        S diagonal blocks.
    b : numpy.ndarray, shape [S n]
    S : int
    select : callable
        ``select(g, t)`` gives the block as a mask [S n].
    steps : int

    Returns
    -------
    numpy.ndarray, shape [S, steps + 1]
        The values f.
    """
    x, g, f = np.zeros_like(b), -b, [np.zeros(S)]
    for t in range(steps):
        d, _ = message_passing(A, select(g, t), -g)
        x, g = x + d, g + A @ d
        f.append((x * (g - b)).reshape(S, -1).sum(1) / 2)
    return np.stack(f, 1)


# Active sets: F(x) = f(x) + lambda |x|_1


def soft(x, t):
    """The proximal step of t |x|_1."""
    return x.sign() * (x.abs() - t).clamp(min=0)


class Lasso(Quadratic):
    """F(x) = x'Ax/2 - b'x + c + lam |x|_1; state.f is F, state.g the gradient of the smooth part.

    Parameters
    ----------
    lam : torch.Tensor, shape [S]
    """

    def __init__(self, A, b, lam, c=None):
        super().__init__(A, b, c)
        self.lam = lam[:, None]

    def at(self, x):
        state = super().at(x)
        state.f = state.f + (self.lam * x.abs()).sum(1)
        return state

    def penalty(self, state, b, d):
        x = entries(state.x, b)
        return (self.lam * ((x + d).abs() - x.abs())).sum(1)

    def move(self, state, b, d):
        penalty = self.penalty(state, b, d)
        super().move(state, b, d)
        state.f = state.f + penalty

    def change(self, state, b, d):
        return super().change(state, b, d) + self.penalty(state, b, d)


class ProximalGreedy:
    """GS-q: the tau coordinates whose own proximal step lowers the model most.

    Not |g_i|: at a zero coordinate that may be as large as lambda and mean nothing. Zeros that stay
    gain nothing, nor do coordinates just solved for: among these, non-zero ones come first, or a
    block of tau >= the support would not hold the support.
    """

    def __init__(self, problem, tau):
        self.problem, self.tau = problem, tau

    def __call__(self, state, t):
        p, x, g = self.problem, state.x, state.g
        d = soft(x - g / p.L, p.lam / p.L) - x
        gain = -(g * d + p.L * d**2 / 2 + p.lam * ((x + d).abs() - x.abs()))
        b = torch.where(x == 0, gain, gain.clamp(min=1e-300)).topk(self.tau, 1).indices
        return Block(b, submatrix(p.H, b), None)


def prox_gradient(problem, state, block):
    """d = prox(x_b - g_b / L_b) - x_b."""
    x, g, L = entries(state.x, block.b), entries(state.g, block.b), largest(block)[:, None]
    return soft(x - g / L, problem.lam / L) - x


def two_metric(problem, state, block, eps=1e-4):
    """Newton on the variables that do not bind, a gradient step on those that do, both projected.

    F is smooth in the orthant of x, with gradient v. A variable binds if it is zero, or within eps
    of it, and descent pushes it to zero. Those outside the orthant after the step become zero.
    """
    x, g = entries(state.x, block.b), entries(state.g, block.b)
    orthant = torch.where(x == 0, -g.sign(), x.sign())
    v = g + problem.lam * orthant
    binds = (x.abs() <= eps) & (orthant * v >= 0)
    free = (~binds).to(x.dtype)
    H = problem.hessian(state, block.b) * free[:, :, None] * free[:, None, :]
    H = H + torch.diag_embed((1 - free) * largest(block)[:, None])
    direction = -solve(H, v)

    def step(alpha):
        new = x + alpha * direction
        return torch.where(new * orthant > 0, new, 0.0) - x

    return armijo(problem, state, block.b, v, step)


def identification_radius(problem, x_star):
    """delta and delta / 2L, [S] each: within that distance every zero that is updated stays zero.

    delta is the smallest lambda - |g_i(x*)| over the zeros of the solution x* [S, n], L the largest
    eigenvalue of the Hessian.
    """
    slack = problem.lam - problem.at(x_star).g.abs()
    delta = slack.masked_fill(x_star != 0, torch.inf).min(1).values
    return delta, delta / (2 * torch.linalg.eigvalsh(problem.H)[:, -1])
