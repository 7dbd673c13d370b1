"""Greedy block coordinate descent: rules, updates, message passing and active sets."""

from itertools import combinations

import networkx as nx
import numpy as np
import pytest
import scipy.sparse as sp
import torch
from sklearn.linear_model import Lasso as SklearnLasso
from sklearn.linear_model import LogisticRegression

from miniature.theory import greedy_block_coordinate as G
from miniature.theory.greedy_block_coordinate import (
    Block,
    Fixed,
    Lasso,
    Logistic,
    ProximalGreedy,
    Quadratic,
    Softmax,
    Variable,
    descend,
    diagonal,
    gradient,
    matrix,
    newton,
    partition,
    prox_gradient,
    two_metric,
)

S, N = 3, 12


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def spd(n=N, seed=0):
    """Badly scaled positive definite matrices, [S, n, n]."""
    X = normal(S, 2 * n, n, seed=seed) * normal(S, 1, n, seed=seed + 1).exp()
    return X.mT @ X


def problems():
    X = normal(S, 30, 6, seed=3) * torch.arange(1.0, 7.0).double()
    y = torch.randint(3, (S, 30), generator=generator(4))
    return {
        "quadratic": Quadratic(spd(), normal(S, N, seed=2)),
        "logistic": Logistic(X, (y > 0) * 2.0 - 1.0, 0.3),
        "softmax": Softmax(X, y, 3, 0.3),
    }


def value(problem, s, x):
    """f of problem s once more, from the definition, for autograd."""
    if isinstance(problem, Quadratic):
        return x @ problem.H[s] @ x / 2 - problem.b[s] @ x
    if isinstance(problem, Logistic):
        z = problem.X[s] @ x
        return torch.log1p(torch.exp(-problem.y[s, 0] * z)).sum() + problem.ridge / 2 * x @ x
    z = problem.X[s] @ x.view(-1, problem.C)
    return -(z.log_softmax(1) * problem.Y[s].T).sum() + problem.ridge / 2 * x @ x


@pytest.mark.parametrize("name", ["quadratic", "logistic", "softmax"])
def test_states_hold_value_gradient_and_hessian_after_a_step(name):
    problem = problems()[name]
    n = problem.L.shape[1]
    x0, b, d = normal(S, n, seed=5) / 3, torch.tensor([[4, 0, 3], [1, 2, 5], [5, 4, 0]]), 0.2
    d = d * normal(S, 3, seed=6)
    state = problem.at(x0)
    before, change = state.f, problem.change(state, b, d)
    problem.move(state, b, d)
    moved = x0.scatter_add(1, b, d)
    assert torch.equal(state.x, moved)
    assert (state.f - before - change).abs().max() < 1e-10 * before.abs().max()
    fresh = problem.at(moved)
    for s in range(S):
        f = value(problem, s, moved[s])
        g = torch.autograd.functional.jacobian(lambda x, s=s: value(problem, s, x), moved[s])
        H = torch.autograd.functional.hessian(lambda x, s=s: value(problem, s, x), moved[s])
        for at in (state, fresh):
            assert abs(at.f[s] - f) < 1e-9 * (1 + abs(f))
            torch.testing.assert_close(at.g[s], g, rtol=1e-9, atol=1e-9)
        part = H[b[s]][:, b[s]]
        torch.testing.assert_close(problem.hessian(state, b)[s], part, rtol=1e-9, atol=1e-9)
        # the bounds: on the whole Hessian, and on its diagonal
        assert torch.linalg.eigvalsh(problem.H[s] - H)[0] > -1e-9 * H.abs().max()
        assert (H.diagonal() <= problem.L[s] * (1 + 1e-12)).all()


def test_softmax_bounds_are_tight_where_the_classes_are_even():
    """At p = (1/2, 1/2, 0, ...) a coordinate has curvature |X_i|^2 / 4: L cannot be smaller."""
    X = normal(1, 20, 4)
    problem = Softmax(X, torch.zeros(1, 20, dtype=torch.long), 2, 0.1)
    H = problem.hessian(problem.at(torch.zeros(1, 8).double()), torch.arange(8)[None])
    torch.testing.assert_close(H, problem.H)
    torch.testing.assert_close(H.diagonal(dim1=1, dim2=2), problem.L)


def test_partitions():
    problem = problems()["quadratic"]
    for order in ("natural", "random", "sorted"):
        parts = partition(problem, 3, order, generator())
        assert parts.shape == (S, 4, 3)
        assert torch.equal(parts.flatten(1).sort(1).values, torch.arange(N).expand(S, N))
    L = problem.L.gather(1, partition(problem, 3, "sorted").flatten(1))
    assert (L.diff(dim=1) >= 0).all()


@pytest.mark.parametrize("rule", ["GS", "GSL", "GSD", "GSQ"])
def test_fixed_rules_are_their_formulas(rule):
    problem = problems()["quadratic"]
    parts = partition(problem, 3, "random", generator())
    for k in range(8):
        state = problem.at(normal(S, N, seed=10 + k))
        block = Fixed(problem, parts, rule)(state, 0)
        for s in range(S):
            scores = []
            for part in parts[s].tolist():
                g, H = state.g[s, part].numpy(), problem.H[s][part][:, part].numpy()
                scores.append(
                    {
                        "GS": np.linalg.norm(g),
                        "GSL": g @ g / np.linalg.eigvalsh(H)[-1],
                        "GSD": sum(g**2 / (3 * np.diag(H))),
                        "GSQ": g @ np.linalg.solve(H, g),
                    }[rule]
                )
            best = parts[s, int(np.argmax(scores))]
            assert torch.equal(block.b[s], best)
            torch.testing.assert_close(block.H[s], problem.H[s][best][:, best])
            assert abs(block.L[s] - torch.linalg.eigvalsh(block.H[s])[-1]) < 1e-9 * block.L[s]


def test_rules_without_gradient():
    problem = problems()["quadratic"]
    parts, state = partition(problem, 3), problem.at(normal(S, N))
    cyclic = Fixed(problem, parts, "cyclic")
    assert [int(cyclic(state, t).b[0, 0]) for t in range(5)] == [0, 3, 6, 9, 0]
    for rule, weight in (("random", torch.ones(S, 4)), ("lipschitz", None)):
        fixed = Fixed(problem, parts, rule, generator(1))
        drawn = torch.stack([fixed(state, t).b[:, 0] // 3 for t in range(3000)])
        share = torch.stack([(drawn == k).double().mean(0) for k in range(4)], 1)
        weight = fixed.L if weight is None else weight.double()
        assert (share - weight / weight.sum(1, keepdim=True)).abs().max() < 0.04
    variable = Variable(problem, 5, "random", generator())
    drawn = torch.stack([variable(state, t).b for t in range(2000)])  # [2000, S, 5]
    share = torch.stack([(drawn == i).any(2).double().mean(0) for i in range(N)])
    assert (share - 5 / N).abs().max() < 0.05
    assert all(len(set(row)) == 5 for row in drawn[0].tolist())


def test_variable_gs_and_gsd_take_the_largest_scores():
    problem = problems()["logistic"]
    state = problem.at(normal(S, 6) / 3)
    for rule, score in (("GS", state.g.abs()), ("GSD", state.g.abs() / problem.L.sqrt())):
        b = Variable(problem, 2, rule)(state, 0).b
        expected = score.argsort(1, descending=True)[:, :2]
        assert torch.equal(b.sort(1).values, expected.sort(1).values)


def gain(H, g, b):
    b = list(b)
    return float(g[b] @ np.linalg.solve(H[np.ix_(b, b)], g[b]))


def test_forward_greedy_adds_the_best_variable_each_time():
    H, g = spd(seed=20), normal(S, N, seed=21)
    b = G.forward_greedy(H, g, 5).tolist()
    for s in range(S):
        Hs, gs, taken = H[s].numpy(), g[s].numpy(), []
        for _ in range(5):
            rest = [i for i in range(N) if i not in taken]
            taken.append(max(rest, key=lambda i: gain(Hs, gs, [*taken, i])))
        assert b[s] == taken


def test_forward_greedy_skips_what_depends_on_the_block():
    """Two copies of a column: the second adds nothing, and the block has to be solvable."""
    X = normal(1, 10, 6)
    X[:, :, 1] = X[:, :, 0]
    H, g = X.mT @ X, torch.tensor([[9.0, 9.0, 0.1, 0.1, 0.1, 0.1]]).double()
    b = G.forward_greedy(H, g, 4)[0].tolist()
    assert len({0, 1} & set(b)) == 1


def test_approximations_of_gsq_against_all_blocks():
    """Over the 220 blocks of 3 out of 12: the true VB-GSQ is a bound, the greedy comes close."""
    ratios = {rule: [] for rule in ("GS", "GSD", "greedy", "IHT")}
    for seed in range(8):
        problem = Quadratic(spd(seed=100 + seed), normal(S, N, seed=200 + seed))
        state = problem.at(torch.zeros(S, N).double())
        for rule in ratios:
            b = Variable(problem, 3, rule)(state, 0).b.tolist()
            for s in range(S):
                H, g = problem.H[s].numpy(), state.g[s].numpy()
                assert len(set(b[s])) == 3
                best = max(gain(H, g, c) for c in combinations(range(N), 3))
                ratios[rule].append(gain(H, g, b[s]) / best)
    assert all(max(r) <= 1 + 1e-9 for r in ratios.values())
    mean = {rule: np.mean(r) for rule, r in ratios.items()}
    assert mean["greedy"] > 0.97
    assert mean["greedy"] > mean["GSD"] > mean["GS"]


def test_hard_thresholding_is_its_loop():
    H, g = spd(seed=30), normal(S, N, seed=31)
    L, mu = H.diagonal(dim1=1, dim2=2), 1 / torch.linalg.eigvalsh(H)[:, -1]
    b = G.hard_thresholding(H, g, 4, mu, -g / L, steps=10)
    for s in range(S):
        d = -(g[s] / L[s]).numpy()
        for _ in range(10):
            d = d - float(mu[s]) * (g[s].numpy() + H[s].numpy() @ d)
            keep = np.argsort(-np.abs(d))[:4]
            d = np.where(np.isin(np.arange(N), keep), d, 0)
        assert set(b[s].tolist()) == set(keep.tolist())


@pytest.mark.parametrize("name", ["quadratic", "logistic", "softmax"])
@pytest.mark.parametrize("update", [gradient, diagonal, matrix])
def test_every_step_falls_by_what_is_guaranteed(name, update):
    problem = problems()[name]
    x0 = normal(S, problem.L.shape[1], seed=7)
    for select in (
        Fixed(problem, partition(problem, 3, "random", generator()), "random", generator()),
        Variable(problem, 3, "GSD"),
    ):
        trace = descend(problem, x0, select, update, 25, keep=True)
        slack = -trace.f.diff(dim=1) - trace.bound
        assert slack.min() > -1e-9 * trace.f[:, 0].abs().max()
        if name == "quadratic" and update is matrix:
            assert slack.abs().max() < 1e-9 * trace.bound.max()
        else:
            assert slack[:, 0].max() > 1e-6  # a bound, not an identity


def test_updates_are_their_formulas_and_matrix_promises_most():
    problem = problems()["quadratic"]
    state, b = problem.at(normal(S, N, seed=8)), torch.tensor([[0, 5], [3, 2], [11, 1]])
    block = Block(b, G.submatrix(problem.H, b), None)
    for s in range(S):
        H, g = problem.H[s][b[s]][:, b[s]].numpy(), state.g[s, b[s]].numpy()
        expected = {
            gradient: -g / np.linalg.eigvalsh(H)[-1],
            diagonal: -g / (2 * np.diag(H)),
            matrix: -np.linalg.solve(H, g),
            newton: -np.linalg.solve(H, g),
        }
        for update, d in expected.items():
            np.testing.assert_allclose(update(problem, state, block)[s], d, rtol=1e-9)
    promised = {u: G.guaranteed(problem, state, block, u) for u in (gradient, diagonal, matrix)}
    assert (promised[matrix] >= promised[gradient]).all()
    assert (promised[matrix] >= promised[diagonal]).all()


def one_iteration(A, c, x, blocks, rule, update, t):
    """The next point, from the definitions; the gradient is computed anew."""
    g = A @ x - c

    def worth(b):
        return {
            "GS": np.sqrt(sum(g[b] ** 2)),
            "GSL": sum(g[b] ** 2) / np.linalg.norm(A[np.ix_(b, b)], 2),
            "GSD": sum(g[b] ** 2 / (3 * A[b, b])),
            "GSQ": gain(A, g, b),
        }[rule]

    b = blocks[t % 4] if rule == "cyclic" else max(blocks, key=worth)
    if update is gradient:
        d = -g[b] / np.linalg.norm(A[np.ix_(b, b)], 2)
    elif update is diagonal:
        d = -g[b] / (3 * A[b, b])
    else:
        d = -np.linalg.solve(A[np.ix_(b, b)], g[b])
    x = x.copy()
    x[b] += d
    return x


@pytest.mark.parametrize("update", [gradient, diagonal, matrix])
@pytest.mark.parametrize("rule", ["cyclic", "GS", "GSL", "GSD", "GSQ"])
def test_descent_is_the_loop_of_the_paper(rule, update):
    problem, x0 = problems()["quadratic"], normal(S, N, seed=6)
    parts = partition(problem, 3, "random", generator(5))
    trace = descend(problem, x0, Fixed(problem, parts, rule), update, 40, keep=True)
    for s in range(S):
        A, c, x = problem.H[s].numpy(), problem.b[s].numpy(), x0[s].numpy()
        for t in range(40):
            x = one_iteration(A, c, x, parts[s].numpy(), rule, update, t)
            np.testing.assert_allclose(trace.xs[s, t + 1], x, rtol=1e-8, atol=1e-8)
            assert abs(trace.f[s, t + 1] - (x @ A @ x / 2 - c @ x)) < 1e-8


def test_newton_backtracks_where_the_full_step_goes_up():
    """log(1 + e^x) + log(1 + e^-x) far from 0: the full step overshoots."""
    X, y = torch.ones(1, 2, 1).double(), torch.tensor([[1.0, -1.0]]).double()
    problem = Logistic(X, y, 1e-6)
    x0 = torch.full((1, 1), 8.0).double()
    state = problem.at(x0)
    full = -state.g / problem.hessian(state, torch.zeros(1, 1, dtype=torch.long))[0]
    assert problem.at(x0 + full).f > state.f
    every = Variable(problem, 1, "GS")
    trace = descend(problem, x0, every, newton, 12)
    assert (trace.f.diff(dim=1) <= 1e-12).all()
    assert abs(trace.x) < 1e-6


def test_logistic_reaches_the_optimum_of_sklearn():
    problem = problems()["logistic"]
    trace = descend(problem, torch.zeros(S, 6).double(), Variable(problem, 3, "greedy"), newton, 60)
    for s in range(S):
        oracle = LogisticRegression(
            C=1 / problem.ridge, fit_intercept=False, tol=1e-10, max_iter=10000
        ).fit(problem.X[s].numpy(), problem.y[s, 0].numpy())
        np.testing.assert_allclose(trace.x[s], oracle.coef_[0], atol=1e-5)


def test_all_variables_in_the_block_solve_a_quadratic_at_once():
    problem = problems()["quadratic"]
    x = torch.linalg.solve(problem.H, problem.b)
    for rule in Variable.RULES:
        trace = descend(problem, normal(S, N), Variable(problem, N, rule, generator()), matrix, 1)
        torch.testing.assert_close(trace.x, x, rtol=1e-7, atol=1e-7)


def test_descend_stops_at_its_target():
    problem = problems()["quadratic"]
    x0 = torch.zeros(S, N).double()
    target = descend(problem, x0, Variable(problem, 3, "GSD"), matrix, 30).f[:, -1]
    trace = descend(problem, x0, Variable(problem, 3, "GSD"), matrix, 500, target=target + 1e-12)
    assert trace.f.shape[1] <= 31
    assert (trace.f[:, -1] <= target + 1e-12).all()
    assert (trace.f[:, -2] > target + 1e-12).any()


def test_pl_constant_bounds_the_expected_decrease_and_is_attained():
    problem = problems()["quadratic"]
    parts = partition(problem, 3, "random", generator())
    mu = G.pl_constant(problem.H, parts)
    best = problem.at(torch.linalg.solve(problem.H, problem.b)).f
    ratios = []
    for seed in range(40):
        state = problem.at(normal(S, N, seed=300 + seed))
        g = state.g[torch.arange(S)[:, None, None], parts]
        inverse = Fixed(problem, parts, "GSQ").inverse
        fall = G.quadratic_form(inverse, g) / 2  # of each block
        assert (fall.mean(1) >= mu * (state.f - best) * (1 - 1e-9)).all()
        assert (fall.max(1).values >= fall.mean(1)).all()
        ratios.append(fall.mean(1) / (state.f - best))
    # Attained: along the worst direction, by power iteration on x - x*.
    x = normal(S, N, seed=1)
    for _ in range(20000):
        g = (problem.H @ x[..., None])[..., 0]
        step = (inverse @ g[torch.arange(S)[:, None, None], parts][..., None])[..., 0] / 4
        x = x - torch.zeros_like(x).scatter_add(1, parts.flatten(1), step.flatten(1))
        x = x / x.norm(dim=1, keepdim=True)
    g = (problem.H @ x[..., None])[..., 0]
    fall = G.quadratic_form(inverse, g[torch.arange(S)[:, None, None], parts]).mean(1)
    torch.testing.assert_close(fall / G.quadratic_form(problem.H, x), mu, rtol=1e-6, atol=0)


def test_pl_constant_of_independent_variables():
    """A = I in blocks of 3 out of 12: a random block removes a quarter."""
    problem = Quadratic(torch.eye(N).double().expand(S, N, N), torch.zeros(S, N).double())
    mu = G.pl_constant(problem.H.clone(), partition(problem, 3))
    torch.testing.assert_close(mu, torch.full((S,), 0.25).double())


def test_iteration_ops():
    assert G.iteration_ops(100, 50, 5, greedy=False) == 4 * 100 * 5 + 400
    assert G.iteration_ops(100, 50, 5, greedy=True) == 4 * 500 + 400 + 2 * 100 * 45 + 100
    assert G.iteration_ops(10, 7, 7, greedy=True) - G.iteration_ops(10, 7, 7, greedy=False) == 14


# Message passing


def random_graph(n, p, seed, forest=False):
    """A positive definite matrix on a random graph, as CSR with shuffled nodes."""
    rng = np.random.default_rng(seed)
    if forest:
        edges = [(i, int(rng.integers(i))) for i in range(1, n) if rng.random() < 0.8]
    else:
        edges = [(i, j) for i in range(n) for j in range(i) if rng.random() < p]
    A, at = np.zeros((n, n)), rng.permutation(n)
    for i, j in edges:
        A[at[i], at[j]] = A[at[j], at[i]] = rng.standard_normal()
    A += np.diag(np.abs(A).sum(1) + rng.random(n) + 0.1)
    return sp.csr_array(A), rng


@pytest.mark.parametrize("seed", range(6))
def test_message_passing_is_the_dense_solve(seed):
    A, rng = random_graph(60, 0, seed, forest=True)
    block, r = rng.random(60) < 0.8, rng.standard_normal(60)
    d, ops = G.message_passing(A, block, r)
    dense = np.linalg.solve(A.toarray()[np.ix_(block, block)], r[block])
    np.testing.assert_allclose(d[block], dense, rtol=1e-10, atol=1e-10)
    assert (d[~block] == 0).all()
    inside = A.toarray()[np.ix_(block, block)] != 0
    edges = (inside.sum() - block.sum()) // 2
    looks = (A.toarray()[block] != 0).sum()
    assert ops == looks + 8 * edges + (block.sum() - edges)  # 5 up and 3 down an edge, 1 a root


def test_message_passing_refuses_a_cycle():
    A = sp.csr_array(3 * np.eye(4) - np.roll(np.eye(4), 1, 0) - np.roll(np.eye(4), -1, 0))
    everything = np.ones(4, bool)
    with pytest.raises(ValueError, match=r"block of 4 variables has a cycle.*grow_forest"):
        G.message_passing(A, everything, np.ones(4))
    everything[2] = False
    assert G.message_passing(A, everything, np.ones(4))[1] > 0


@pytest.mark.parametrize("seed", range(6))
def test_grow_forest_is_the_greedy_forest(seed):
    A, rng = random_graph(40, 0.12, seed)
    graph = nx.from_scipy_sparse_array(A)
    graph.remove_edges_from(nx.selfloop_edges(graph))
    order, taken = rng.permutation(40), []
    for i in order.tolist():
        if nx.is_forest(graph.subgraph([*taken, i])):
            taken.append(i)
    assert np.flatnonzero(G.grow_forest(A, order)).tolist() == sorted(taken)
    assert len(taken) < 40


@pytest.mark.parametrize("side", [2, 5, 6])
def test_lattice_blocks(side):
    lattice = nx.convert_node_labels_to_integers(nx.grid_2d_graph(side, side))
    red, black = G.red_black(side)
    assert (red ^ black).all()
    for mask in (red, black):
        assert lattice.subgraph(np.flatnonzero(mask).tolist()).number_of_edges() == 0
    one, two = G.combs(side)
    assert (one ^ two).all()
    for mask in (one, two):
        assert nx.is_forest(lattice.subgraph(np.flatnonzero(mask).tolist()))
    # all of one comb hangs together
    assert nx.is_connected(lattice.subgraph(np.flatnonzero(one).tolist()))


def test_descend_forest_is_block_descent_with_dense_solves():
    A, rng = random_graph(20, 0.2, 1)
    B, _ = random_graph(20, 0.2, 2)
    both, b = sp.csr_array(sp.block_diag([A, B])), rng.standard_normal(40)
    orders, seen = [rng.permutation(40) for _ in range(15)], []

    def select(g, t):
        seen.append(g)
        return G.grow_forest(both, orders[t])

    f = G.descend_forest(both, b, 2, select, 15)
    x = np.zeros(40)
    for t in range(15):
        g = both @ x - b
        np.testing.assert_allclose(seen[t], g, atol=1e-10)
        block = np.flatnonzero(G.grow_forest(both, orders[t]))
        x[block] -= np.linalg.solve(both.toarray()[np.ix_(block, block)], g[block])
        for s, part in enumerate((slice(0, 20), slice(20, 40))):
            direct = x[part] @ (both.toarray()[part, part] @ x[part]) / 2 - b[part] @ x[part]
            assert abs(f[s, t + 1] - direct) < 1e-10


# Active sets


def lasso(seed=0, m=40, n=20, lam=6.0):
    X = normal(S, m, n, seed=seed)
    w = normal(S, n, seed=seed + 1) * (torch.arange(n) < 5)
    y = (X @ w[..., None])[..., 0] + 0.1 * normal(S, m, seed=seed + 2)
    b = (X.mT @ y[..., None])[..., 0]
    lam = torch.full((S,), lam).double()
    return X, y, Lasso(X.mT @ X, b, lam, (y**2).sum(1) / 2)


@pytest.mark.parametrize("update", [prox_gradient, two_metric])
@pytest.mark.parametrize("tau", [1, 4, 20])
def test_lasso_is_that_of_sklearn(update, tau):
    X, y, problem = lasso()
    trace = descend(problem, normal(S, 20), ProximalGreedy(problem, tau), update, 400)
    for s in range(S):
        oracle = SklearnLasso(6.0 / 40, fit_intercept=False, tol=1e-14, max_iter=100000)
        w = oracle.fit(X[s].numpy(), y[s].numpy()).coef_
        np.testing.assert_allclose(trace.x[s], w, atol=1e-7)
        assert ((trace.x[s] == 0).numpy() == (w == 0)).all()
        F = ((y[s].numpy() - X[s].numpy() @ w) ** 2).sum() / 2 + 6.0 * np.abs(w).sum()
        assert abs(trace.f[s, -1] - F) < 1e-9 * F
    assert (trace.f.diff(dim=1) <= 1e-9).all()


def test_proximal_greedy_scores_by_the_coordinates_own_step():
    _, _, problem = lasso(seed=3)
    state = problem.at(normal(S, 20, seed=9) * (torch.arange(20) % 2))
    b = ProximalGreedy(problem, 3)(state, 0).b
    for s in range(S):
        gains = []
        for i in range(20):
            x, g, L = float(state.x[s, i]), float(state.g[s, i]), float(problem.L[s, i])
            u = x - g / L
            d = np.sign(u) * max(abs(u) - 6.0 / L, 0) - x
            gains.append(-(g * d + L * d**2 / 2 + 6.0 * (abs(x + d) - abs(x))))
        assert set(b[s].tolist()) == set(np.argsort(gains)[-3:].tolist())


def test_proximal_greedy_holds_the_support_before_idle_zeros():
    """At a solution on a part of the support nothing gains there: those still go before zeros."""
    _, _, problem = lasso()
    x = descend(problem, normal(S, 20), ProximalGreedy(problem, 20), two_metric, 60).x
    for s in range(S):
        on = x[s].nonzero()[:, 0]
        sides = Lasso(problem.H[s : s + 1], problem.b[s : s + 1], problem.lam[s], None)
        b = ProximalGreedy(sides, len(on))(sides.at(x[s : s + 1]), 0).b
        assert set(b[0].tolist()) == set(on.tolist())


def test_line_search_does_not_halve_over_rounding():
    """At the optimum any sign of a change below the rounding of f is noise."""
    _, _, problem = lasso()
    x = descend(problem, normal(S, 20), ProximalGreedy(problem, 20), two_metric, 60).x
    calls, change = [], problem.change
    problem.change = lambda *args: calls.append(0) or change(*args)
    descend(problem, x, ProximalGreedy(problem, 20), two_metric, 10)
    assert len(calls) == 10


def test_prox_gradient_falls_and_vanishes_at_the_solution():
    _, _, problem = lasso()
    x = descend(problem, normal(S, 20), ProximalGreedy(problem, 20), two_metric, 60).x
    state, b = problem.at(x), torch.arange(20).expand(S, 20)
    for update in (prox_gradient, two_metric):
        assert update(problem, state, Block(b, problem.H, None)).abs().max() < 1e-9


def test_two_metric_ends_in_one_step_on_the_right_support():
    _, _, problem = lasso()
    x = descend(problem, normal(S, 20), ProximalGreedy(problem, 20), two_metric, 60).x
    near = x + 1e-3 * (x != 0) * normal(S, 20, seed=4)
    state, b = problem.at(near), torch.arange(20).expand(S, 20)
    d = two_metric(problem, state, Block(b, problem.H, None))
    torch.testing.assert_close(near + d, x, rtol=0, atol=1e-10)
    d = prox_gradient(problem, state, Block(b, problem.H, None))
    assert (near + d - x).abs().max() > 1e-5


def test_two_metric_handles_binding_variables_apart():
    """A zero that wants to stay must neither move nor bend the Newton step of the others."""
    H = torch.tensor([[[2.0, 0.9], [0.9, 1.0]]]).double()
    problem = Lasso(H, torch.tensor([[3.0, 1.3]]).double(), torch.ones(1).double())
    state = problem.at(torch.tensor([[0.5, 0.0]]).double())  # g = (-2, -0.85): x_2 binds
    d = two_metric(problem, state, Block(torch.tensor([[0, 1]]), H, None))
    torch.testing.assert_close(d, torch.tensor([[0.5, 0.0]]).double())
    # a step through zero ends at zero
    problem = Lasso(H, torch.tensor([[-3.0, 0.0]]).double(), torch.ones(1).double())
    state = problem.at(torch.tensor([[0.5, 0.0]]).double())
    d = two_metric(problem, state, Block(torch.tensor([[0, 1]]), H, None))
    assert float(state.x[0, 0] + d[0, 0]) == 0.0


def test_identification_within_the_radius():
    _, _, problem = lasso()
    x = descend(problem, normal(S, 20), ProximalGreedy(problem, 20), two_metric, 60).x
    delta, radius = G.identification_radius(problem, x)
    g = (problem.H @ x[..., None])[..., 0] - problem.b
    for s in range(S):
        slack = min(6.0 - abs(float(g[s, i])) for i in range(20) if x[s, i] == 0)
        assert abs(float(delta[s]) - slack) < 1e-9
        L = float(torch.linalg.eigvalsh(problem.H[s])[-1])
        assert abs(float(radius[s]) - slack / (2 * L)) < 1e-12
    for seed in range(20):  # any point at that distance, any block: zeros become zero
        away = normal(S, 20, seed=50 + seed)
        away = x + 0.999 * radius[:, None] * away / away.norm(dim=1, keepdim=True)
        state, b = problem.at(away), torch.arange(20).expand(S, 20)
        d = prox_gradient(problem, state, Block(b, problem.H, None))
        assert ((away + d)[x == 0] == 0).all()


def test_bad_input_is_named():
    problem = problems()["quadratic"]
    with pytest.raises(ValueError, match="tau must divide the number of coordinates, 12; got 5"):
        partition(problem, 5)
    with pytest.raises(ValueError, match="natural, random or sorted, got 'size'"):
        partition(problem, 3, "size")
    with pytest.raises(ValueError, match="GSQ, got 'best'"):
        Fixed(problem, partition(problem, 3), "best")
    with pytest.raises(ValueError, match="IHT, got 'GSL'"):
        Variable(problem, 3, "GSL")
    with pytest.raises(ValueError, match="between 1 and 12, got 13"):
        Variable(problem, 13, "GS")
    with pytest.raises(ValueError, match=r"\[S, n, n\] and b \[S, n\], got \[3, 12, 12\]"):
        Quadratic(spd(), normal(S, 3))
    with pytest.raises(ValueError, match="labels must be -1 or 1, got"):
        Logistic(normal(S, 4, 2), torch.zeros(S, 4), 1.0)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["quadratic", "logistic", "softmax"])
def test_gpu_gives_the_same(name):
    here = problems()[name]
    there = problems()[name]
    for key, v in vars(there).items():
        if torch.is_tensor(v):
            setattr(there, key, v.cuda())
    n = here.L.shape[1]
    for make, update in (
        (lambda p: Fixed(p, partition(p, 3, "random", generator()), "random", generator()), matrix),
        (lambda p: Variable(p, 3, "greedy"), newton),
    ):
        cpu = descend(here, normal(S, n), make(here), update, 20)
        gpu = descend(there, normal(S, n).cuda(), make(there), update, 20)
        torch.testing.assert_close(gpu.f.cpu(), cpu.f, rtol=1e-9, atol=1e-9)
