"""Alternating minimization with approximate half-steps, against plain loops and closed forms."""

import math

import numpy as np
import pytest
import torch
from scipy.linalg import subspace_angles

from miniature.theory import matrix_completion_altmin as mc
from miniature.theory.matrix_completion_altmin import Exact, Perturbed, Sketched

SEEDS = [3, 4]


def setting(m=40, n=30, k=3, p=0.6, seeds=SEEDS, **options):
    problem = mc.low_rank(seeds, m, n, k, **options)
    mask = mc.sample(problem, p, seeds)
    mu = torch.maximum(mc.incoherence(problem.U), mc.incoherence(problem.V))
    return problem, mask, mc.initialize(problem.M, mask, k, mu)


def least_squares(M, mask, U, sketches=None):
    """V [n, k] of one matrix, column by column; sketches [n, s, L]: of the sketched problems."""
    V = []
    for j in range(M.shape[1]):
        A, y = U[mask[:, j]], M[mask[:, j], j]
        S = np.eye(len(y)) if sketches is None else sketches[j, :, : len(y)]
        V.append(np.linalg.lstsq(S @ A, S @ y, rcond=None)[0])
    return np.stack(V)


def tall(L=64, k=4, B=2, kappa=1.0, seed=0):
    """A [B, L, k] of condition number kappa, and y [B, L, 1]."""
    g = torch.Generator().manual_seed(seed)
    Q, W = (
        torch.linalg.qr(torch.randn(B, r, k, generator=g, dtype=torch.float64))[0] for r in (L, k)
    )
    sigma = torch.logspace(0, -math.log10(kappa), k, dtype=torch.float64)
    return Q * sigma @ W.mT, torch.randn(B, L, 1, generator=g, dtype=torch.float64)


# The problem


def test_low_rank_has_the_factors_spectrum_and_size_it_says():
    p = mc.low_rank(SEEDS, 20, 30, 4, kappa=10.0)
    assert torch.allclose(p.M, p.U * p.sigma @ p.V.mT)
    s = torch.linalg.svdvals(p.M)
    assert torch.allclose(s[:, 0] / s[:, 3], torch.tensor(10.0).double())
    assert (s[:, 4:] < 1e-10).all()
    assert torch.allclose(p.M.square().mean((1, 2)), torch.ones(2).double())
    noisy = mc.low_rank(SEEDS, 200, 300, 4, kappa=10.0, noise=0.5)
    rest = noisy.M - noisy.U * noisy.sigma @ noisy.V.mT
    assert torch.allclose(rest.std((1, 2)), torch.tensor(0.5).double(), rtol=0.02)


def test_spike_makes_one_row_coherent():
    plain, spiky = (mc.low_rank([0], 50, 50, 2, spiky=s) for s in (False, True))
    assert mc.incoherence(plain.U) < 3 and mc.incoherence(spiky.V) < 3
    assert mc.incoherence(spiky.U) == pytest.approx(5.0)  # sqrt(m/k): norm 1
    assert spiky.U[0, 0].norm() == pytest.approx(1.0) and not spiky.U[0, 1:, 0].any()


def test_incoherence_is_the_longest_row():
    U = torch.linalg.qr(torch.randn(1, 12, 3, dtype=torch.float64))[0]
    longest = max(float(U[0, i].norm()) for i in range(12))
    assert float(mc.incoherence(U)) == pytest.approx(longest / math.sqrt(3 / 12))


def test_sample_has_its_probability_and_split_is_a_partition():
    problem = mc.low_rank([0], 200, 200, 2)
    mask = mc.sample(problem, 0.3, [0])
    assert float(mask.double().mean()) == pytest.approx(0.3, abs=0.01)
    parts = mc.split(mask, 5, [0])
    assert len(parts) == 5 and torch.equal(torch.stack(parts).sum(0), mask.long())
    for part in parts:
        assert float(part.sum() / mask.sum()) == pytest.approx(0.2, abs=0.02)


def test_side_lists_every_observed_entry_once_and_pads_with_weight_0():
    problem, mask, _ = setting()
    for M, Omega in ((problem.M, mask), (problem.M.mT, mask.mT)):
        side = mc.Side(M, Omega)
        index, weight, y = side.lists
        assert index.shape[2] == side.seen.max()
        for s in range(2):
            for j in range(M.shape[2]):
                rows = Omega[s, :, j].nonzero()[:, 0]
                n = len(rows)
                assert side.seen[s, j] == n and side.entries[s] == Omega[s].sum()
                assert torch.equal(index[s, j, :n], rows)
                assert torch.equal(y[s, j, :n], M[s, rows, j])
                assert weight[s, j].tolist() == [1.0] * n + [0.0] * (y.shape[2] - n)
                assert not y[s, j, n:].any()


def test_dist_is_the_sine_of_the_largest_principal_angle():
    g = torch.Generator().manual_seed(0)
    A, B = (
        torch.linalg.qr(torch.randn(3, 9, 2, generator=g, dtype=torch.float64))[0] for _ in range(2)
    )
    expected = [np.sin(subspace_angles(a, b).max()) for a, b in zip(A.numpy(), B.numpy())]
    assert mc.dist(A, B).tolist() == pytest.approx(expected)
    near = torch.linalg.qr(A + 1e-9 * B)[0]  # where 1 - cos^2 would cancel
    expected = [np.sin(subspace_angles(a, b).max()) for a, b in zip(A.numpy(), near.numpy())]
    assert mc.dist(A, near).tolist() == pytest.approx(expected, rel=1e-5)


def test_initialize_is_the_clipped_singular_space():
    problem, mask, _ = setting(m=30)
    mu = torch.tensor([0.6, 0.6]).double()  # clips several rows
    U = mc.initialize(problem.M, mask, 3, mu)
    for s in range(2):
        left = np.linalg.svd((problem.M[s] * mask[s] / 0.6).numpy())[0][:, :3]
        long = np.linalg.norm(left, axis=1) > 2 * 0.6 * math.sqrt(3 / 30)
        assert 0 < long.sum() < 20
        left[long] = 0
        assert float(mc.dist(U[s : s + 1], torch.tensor(np.linalg.qr(left)[0])[None])) < 1e-7
        assert torch.equal(U[s].norm(dim=1) < 1e-12, torch.tensor(long))
    assert torch.allclose(U.mT @ U, torch.eye(3).double().expand(2, 3, 3))


# Half-steps


@pytest.mark.parametrize(
    "half_step",
    [
        Exact(),
        Sketched(SEEDS, 12, 3),  # conjugate gradients end in k = 3 steps
        Sketched(SEEDS, 12, 3, sketch="gaussian"),
        Sketched(SEEDS, 16, 3, sketch="countsketch"),
    ],
)
def test_half_steps_are_least_squares_column_by_column(half_step):
    problem, mask, _ = setting(noise=0.3)
    U = torch.linalg.qr(problem.U + 0.1)[0]
    V = half_step(mc.Side(problem.M, mask), U)
    V_rows = half_step(mc.Side(problem.M.mT, mask.mT), V)
    for s in range(2):
        M, Omega = problem.M[s].numpy(), mask[s].numpy()
        assert np.allclose(V[s], least_squares(M, Omega, U[s].numpy()), rtol=0, atol=1e-8)
        again = least_squares(M.T, Omega.T, V[s].numpy())
        assert np.allclose(V_rows[s], again, rtol=0, atol=1e-8)


def test_perturbed_adds_an_error_of_the_stated_size_to_every_row():
    problem, mask, _ = setting()
    side = mc.Side(problem.M, mask)
    V = Exact()(side, problem.U)
    half_step = Perturbed(0.1, SEEDS)
    first, second = (half_step(side, problem.U) - V for _ in range(2))
    for s in range(2):
        assert float(first[s].norm() / V[s].norm()) == pytest.approx(0.1)
        assert torch.allclose(first[s].norm(dim=1), first[s, 0].norm())
    assert not torch.allclose(first, second) and not torch.allclose(first[0], first[1])


def test_a_seed_gives_the_same_alone_as_in_a_stack():
    problem, mask, U = setting(p=1.0)
    for sketch in mc.SKETCHES:
        together = mc.altmin(problem, mask, U, Sketched(SEEDS, 8, 1, sketch=sketch), 2)
        one = mc.Problem(problem.M[1:], problem.U[1:], problem.V[1:], problem.sigma)
        alone = mc.altmin(one, mask[1:], U[1:], Sketched([4], 8, 1, sketch=sketch), 2)
        assert torch.allclose(together.error[1:], alone.error)
    fresh = Sketched(SEEDS, 8, 0)
    side = mc.Side(problem.M, mask)
    assert not torch.allclose(fresh(side, problem.U + 1), fresh(side, problem.U + 1))


def test_columns_without_enough_entries_stay_finite():
    problem, mask, _ = setting(p=0.05)
    side = mc.Side(problem.M, mask)
    assert side.seen.min() == 0
    for half_step in (Exact(), Sketched(SEEDS, 8, 3)):
        assert half_step(side, problem.U).isfinite().all()


# Sketches


def test_wht_is_the_hadamard_transform():
    for L in (1, 2, 8, 32):
        x = torch.randn(3, L, 2, dtype=torch.float64)
        H = torch.tensor([[(-1.0) ** (i & j).bit_count() for i in range(L)] for j in range(L)])
        assert torch.allclose(mc.wht(x), H.double() @ x)


@pytest.mark.parametrize("kind", mc.SKETCHES)
def test_sketches_keep_lengths_on_average_and_are_independent(kind):
    x = torch.randn(1, 11, 1, dtype=torch.float64).expand(4000, 11, 1)
    Sx = mc.sketched(x, 6, kind, mc.generators([0], 4))
    assert Sx.shape == (4000, 6, 1)
    assert float(Sx.square().sum((1, 2)).mean() / x[0].square().sum()) == pytest.approx(1, abs=0.04)
    assert abs(float(Sx.mean())) < 0.05
    assert len(Sx[:, 0, 0].unique()) > 30


def test_srht_of_all_rows_is_an_isometry():
    A = torch.randn(2, 13, 3, dtype=torch.float64)
    SA = mc.sketched(A, 16, "srht", mc.generators([0], 4))
    assert torch.allclose(SA.mT @ SA, A.mT @ A)


def test_countsketch_puts_every_row_into_one_bucket():
    S = mc.sketched(torch.eye(20).double()[None], 5, "countsketch", mc.generators([0], 4))[0]
    assert torch.equal(S.abs().sum(0), torch.ones(20).double())
    assert set(S.flatten().tolist()) == {-1.0, 0.0, 1.0}


def test_start_solves_the_sketched_problem():
    SA, Sy = tall(20, 4, kappa=1e4)
    R, v = mc.start(SA, Sy)
    assert torch.allclose(R.mT @ R, SA.mT @ SA)
    assert torch.allclose(v, torch.linalg.lstsq(SA, Sy).solution, rtol=1e-8)


@pytest.mark.parametrize("kappa", [1.0, 1e2, 1e4])
@pytest.mark.parametrize("kind", mc.SKETCHES)
def test_the_preconditioned_spectrum_is_that_of_the_sketch_alone(kappa, kind):
    """A = Q W: the singular values of A R^-1 are one over those of S Q, within 1/(1 -+ gamma)."""
    A = tall(256, 4, kappa=kappa)[0]
    Q = torch.linalg.qr(A)[0]
    SA, SQ = (
        mc.sketched(x, 80, kind, mc.generators([5], 4)) for x in (A, Q)
    )  # the same S for both
    R, _ = mc.start(SA, SA[..., :1])
    sigma = torch.linalg.svdvals(torch.linalg.solve_triangular(R, A, upper=True, left=False))
    of_SQ = torch.linalg.svdvals(SQ)
    assert torch.allclose(sigma, 1 / of_SQ.flip(-1), rtol=1e-6)
    gamma = (of_SQ - 1).abs().amax(1)
    assert (sigma[:, 0] / sigma[:, -1] <= (1 + gamma) / (1 - gamma) * (1 + 1e-9)).all()


# The iteration


def test_the_best_step_contracts_as_the_distortion_says():
    """Singular values 1 / (1 +- gamma), R = I: both ends shrink by 2 gamma / (1 + gamma^2)."""
    for gamma in (0.1, 0.3, 0.6):
        omega, contraction = (1 - gamma**2) ** 2 / (1 + gamma**2), 2 * gamma / (1 + gamma**2)
        A = torch.diag(1 / torch.tensor([1 + gamma, 1 - gamma], dtype=torch.float64))[None]
        y, R = torch.ones(1, 2, 1).double(), torch.eye(2).double()[None]
        solution, zero = torch.linalg.solve(A, y), torch.zeros(1, 2, 1).double()
        v, _ = mc.refine(A, y, R, zero, 5, omega=omega)
        left = ((v - solution) / solution).abs().flatten()
        assert left.tolist() == pytest.approx([contraction**5] * 2)


def test_refine_with_a_step_is_the_recursion():
    A, y = tall(kappa=10.0)
    R, v = mc.start(A[:, :20] * 1.7, y[:, :20])
    ours, steps = mc.refine(A, y, R, v, 7, omega=0.4)
    for b in range(2):
        a, P, x = A[b].numpy(), np.linalg.inv(R[b].numpy().T @ R[b].numpy()), v[b].numpy()
        for _ in range(7):
            x = x - 0.4 * P @ a.T @ (a @ x - y[b].numpy())
        assert np.allclose(ours[b], x, rtol=1e-8)
    assert steps.tolist() == [7, 7]


def test_conjugate_gradients_are_optimal_on_their_krylov_space():
    A, y = tall(kappa=5.0, k=6)
    R, v = mc.start(A[:, :20], y[:, :20])
    x, _ = mc.refine(A, y, R, v, 3)
    for b in range(2):
        a, P = A[b].numpy(), np.linalg.inv(R[b].numpy().T @ R[b].numpy())
        r = y[b].numpy() - a @ v[b].numpy()
        basis = [P @ a.T @ r]
        for _ in range(2):
            basis.append(P @ a.T @ a @ basis[-1])
        K = np.hstack(basis)
        best = v[b].numpy() + K @ np.linalg.lstsq(a @ K, r, rcond=None)[0]
        assert np.allclose(x[b], best, rtol=1e-6)


def test_refine_counts_the_steps_of_each_problem_and_stops():
    A, y = tall(200, 12, B=3)
    R = torch.eye(12).double().expand(3, 12, 12)
    stretch = [torch.linspace(1, top, 12) for top in (1, 1.5, 3)]
    A = A * torch.stack(stretch)[:, None]
    for omega in (None, 0.2):
        seen = []
        zero = torch.zeros(3, 12, 1).double()
        v, steps = mc.refine(A, y, R, zero, 200, tol=1e-4, omega=omega, trace=seen.append)
        gradient = [A.mT @ (y - A @ x) for x in seen]
        goal = 1e-4 * (A.mT @ y).norm(dim=1)
        done = [[bool(g[b].norm() <= goal[b]) for g in gradient].index(True) + 1 for b in range(3)]
        assert steps.tolist() == done and len(set(done)) > 1 and len(seen) == max(done)
        for b in range(3):  # what is done stands still
            assert torch.equal(v[b], seen[done[b] - 1][b])
        assert torch.allclose(v, torch.linalg.lstsq(A, y).solution, atol=1e-3)


def test_conjugate_gradients_stay_at_the_solution():
    A, y = tall(40, 3)
    R, v = mc.start(A[:, :12], y[:, :12])
    v, steps = mc.refine(A, y, R, v, 50)
    assert (steps <= 5).all()
    assert torch.allclose(v, torch.linalg.lstsq(A, y).solution, atol=1e-11)
    assert mc.refine(A, y, R, v, 0)[0] is v


# The loop


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("one_shot", [False, True])
def test_altmin_is_the_plain_loop(fresh, one_shot):
    T = 2
    problem, mask, U0 = setting(60, 50, 2, 0.9, noise=0.1)
    parts = [mask] * (2 * T + 1)
    if fresh:
        parts = mc.split(mask, 2 * T + 1, SEEDS)
        mu = torch.tensor([3.0, 3.0]).double()
        U0 = mc.initialize(problem.M, parts[0], 2, mu)
    half_step = Sketched(SEEDS, 6, 0, sketch="gaussian") if one_shot else Exact()
    h = mc.altmin(problem, parts[1:] if fresh else mask, U0, half_step, T)
    for s, g in enumerate(mc.generators(SEEDS, 4)):
        M, Us, Vs = (x[s].numpy() for x in (problem.M, problem.U, problem.V))
        clean = Us * problem.sigma.numpy() @ Vs.T
        U, errors = U0[s].numpy(), [1.0]
        angles = [np.sin(subspace_angles(U, Us).max())]
        for t in range(T):
            first, second = parts[1 + t], parts[T + 1 + t].mT
            # the sketches that the half-step draws: columns of all seeds are padded alike
            S = [
                torch.randn(x.shape[2], 6, int(x.sum(1).max()), generator=g).double().numpy()
                if one_shot
                else None
                for x in (first, second)
            ]
            V = np.linalg.qr(least_squares(M, first[s].numpy(), U, S[0]))[0]
            factor = least_squares(M.T, second[s].numpy(), V, S[1])
            U = np.linalg.qr(factor)[0]
            errors.append(np.linalg.norm(factor @ V.T - clean) / np.linalg.norm(clean))
            angles += [np.sin(subspace_angles(A, B).max()) for A, B in ((V, Vs), (U, Us))]
        assert h.error[s].tolist() == pytest.approx(errors, rel=1e-6)
        assert h.dist[s].tolist() == pytest.approx(angles, rel=1e-6)
        assert np.allclose(h.U[s] @ h.V[s].mT, factor @ V.T)


def test_with_everything_seen_it_is_the_truncated_svd():
    problem, mask, U = setting(p=1.0, noise=0.2)
    for half_step in (Exact(), Sketched(SEEDS, 12, 20)):
        h = mc.altmin(problem, mask, U, half_step, 40)
        left, s, right = torch.linalg.svd(problem.M)
        best = left[..., :3] * s[:, None, :3] @ right[:, :3]
        assert torch.allclose(h.U @ h.V.mT, best, atol=1e-8)


def test_it_recovers_the_matrix_at_a_geometric_rate():
    problem, mask, U = setting(100, 100, 2, 0.4)
    for half_step in (Exact(), Sketched(SEEDS, 16, 2)):
        error = mc.altmin(problem, mask, U, half_step, 12).error
        assert (error[:, -1] < 1e-6).all() and (error[:, 2:] < 0.6 * error[:, 1:-1]).all()


# Flops


def test_exact_counts_gram_matrices_solves_and_orthonormalizations():
    problem, mask, U = setting()
    half_step = Exact()
    h = mc.altmin(problem, mask, U, half_step, 2)
    for s in range(2):
        seen = float(mask[s].sum())
        expected = 4 * (3 * 4 + 2 * 3) * seen + 2 * 70 * (27 / 3 + 2 * 9)  # two rounds of two
        assert half_step.ops["normal equations"][s] == pytest.approx(expected)
        assert half_step.ops["orthonormalize"] == 2 * 4 * 9 * 70
    assert torch.allclose(h.ops[:, -1], half_step.ops.total().double())
    assert torch.allclose(h.ops[:, 1] * 2, h.ops[:, 2]) and not h.ops[:, 0].any()


@pytest.mark.parametrize(
    "sketch, expected",
    [
        ("gaussian", 2 * 12 * 50 * 5),
        ("countsketch", 2 * 50 * 5),
        ("srht", 5 * (50 + 64 * 6 + 12)),
    ],
)
def test_sketched_counts_its_parts(sketch, expected):
    A, y = tall(50, 4)
    solver = Sketched(SEEDS, 12, 3, sketch=sketch)
    solver.solve(A[:, None], y[:, None, :, 0])
    assert set(solver.ops) == {"sketch", "QR of the sketch", "iterations"}
    assert solver.ops["sketch"].tolist() == [expected] * 2
    assert solver.ops["QR of the sketch"] == pytest.approx(2 * 16 * (12 - 4 / 3) + 4 * 12 * 4 + 16)
    per_step = 4 * 50 * 4 + 2 * 16 + 4 * 50 + 24
    assert solver.ops["iterations"].tolist() == [3 * per_step] * 2


def test_sketched_counts_the_steps_of_each_column():
    A, y = tall(50, 4, B=6)
    y[2:4] = A[2:4] @ torch.ones(4, 1).double()  # consistent: the sketch solves it, no step
    solver = Sketched(SEEDS, 12, 2, sketch="countsketch")
    solver.solve(A.reshape(2, 3, 50, 4), y.reshape(2, 3, 50))
    per_step = 4 * 50 * 4 + 2 * 16 + 4 * 50 + 24
    assert solver.ops["iterations"].tolist() == [2 * 2 * per_step] * 2


def test_sketched_counts_what_is_seen_not_the_padding():
    problem, mask, _ = setting(p=0.3)
    side = mc.Side(problem.M, mask)
    solver = Sketched(SEEDS, 12, 2, sketch="countsketch")
    solver(side, problem.U + 0.1 * problem.U.flip(1))
    seen = mask.sum((1, 2)).double()
    assert torch.allclose(solver.ops["sketch"], 2 * 4 * seen)
    assert torch.allclose(solver.ops["iterations"], 2 * ((4 * 3 + 4) * seen + 30 * (18 + 18)))
    assert (seen < 30 * side.lists[0].shape[2]).all()


# Rivals


def test_scaled_gd_is_the_plain_loop():
    problem, mask, U = setting(kappa=3.0)
    error, ops = mc.scaled_gd(problem, mask, 0.6, U, 0.5, 3)
    for s in range(2):
        M, Omega = problem.M[s].numpy(), mask[s].numpy()
        L = U[s].numpy()
        R = (M * Omega / 0.6).T @ L
        expected = [1.0]
        for _ in range(3):
            G = Omega * (L @ R.T - M) / 0.6
            L, R = (
                L - 0.5 * G @ R @ np.linalg.inv(R.T @ R),
                R - 0.5 * G.T @ L @ np.linalg.inv(L.T @ L),
            )
            expected.append(np.linalg.norm(L @ R.T - M) / np.linalg.norm(M))
        assert error[s].tolist() == pytest.approx(expected)
    assert ops.shape == error.shape and (ops.diff(dim=1) > 0).all()


def test_soft_impute_is_the_plain_loop_when_it_keeps_all_singular_values():
    problem, mask, _ = setting()
    error, _ = mc.soft_impute(problem, mask, 0.05, 4, rank=30)
    for s in range(2):
        M, Omega = problem.M[s].numpy(), mask[s].numpy()
        shrink, Z, expected = 0.05 * np.linalg.norm(M * Omega, 2), np.zeros_like(M), [1.0]
        for _ in range(4):
            left, d, right = np.linalg.svd(M * Omega + ~Omega * Z, full_matrices=False)
            Z = left * np.maximum(d - shrink, 0) @ right
            expected.append(np.linalg.norm(Z - M) / np.linalg.norm(M))
        assert error[s].tolist() == pytest.approx(expected)


# Input


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: mc.low_rank([0], 5, 4, 5), r"k must lie in 1\.\.4.*not 5"),
        (lambda: mc.low_rank([0], 5, 4, 2, kappa=0.5), r"at least 1, not 0\.5"),
        (lambda: mc.sample(mc.low_rank([0], 5, 4, 2), 1.5, [0]), r"\(0, 1\], not 1\.5"),
        (lambda: Sketched([0], sketch="fft"), "gaussian, srht, countsketch, not 'fft'"),
        (lambda: Sketched([0], iterations=-1), "negative, not -1"),
        (lambda: Sketched([0], 3).solve(*(x[:1, None] for x in tall())), "3 rows.*rows >= 4"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_bad_input_of_altmin():
    problem, mask, U = setting()
    with pytest.raises(ValueError, match="at least 1, not 0"):
        mc.altmin(problem, mask, U, Exact(), 0)
    with pytest.raises(ValueError, match=r"shape of M, \[2, 40, 30\], not \[2, 30, 40\]"):
        mc.altmin(problem, mask.mT, U, Exact(), 1)
    with pytest.raises(ValueError, match="2 rounds need 4 masks, or one, not 3"):
        mc.altmin(problem, mc.split(mask, 3, SEEDS), U, Exact(), 2)


@pytest.mark.gpu
def test_the_gpu_gives_the_same():
    problem, mask, U = setting()
    there = mc.Problem(*(x.cuda() for x in problem))
    for make in (Exact, lambda: Sketched(SEEDS, 12, 2), lambda: Perturbed(1e-3, SEEDS)):
        a = mc.altmin(problem, mask, U, make(), 3)
        b = mc.altmin(there, mask.cuda(), U.cuda(), make(), 3)
        assert b.U.is_cuda and torch.allclose(a.error, b.error.cpu(), rtol=1e-6)
        assert torch.allclose(a.ops, b.ops)
