"""RERCE-Fed: plain loops, least squares, Lyapunov and Kronecker equations, conserved sums."""

from itertools import combinations

import numpy as np
import pytest
import torch
from scipy.linalg import block_diag, solve_discrete_lyapunov

from miniature.federated.noise_robust_admm import (
    ContinualRerceFed,
    DualADMM,
    FedGD,
    Problem,
    RerceFed,
    StationaryDual,
    predicted,
    regression,
    simulate,
    transition,
    walk_rate,
)

SEEDS = [0, 1]
EVERY = {
    "dual": DualADMM(),
    "RERCE-Fed": RerceFed(),
    "continual": ContinualRerceFed(),
    "stationary": StationaryDual(),
}


def well_posed(seeds=SEEDS, clients=5, d=3, factor=1.0, **options):
    p = regression(seeds, clients, d, (6, 12), 0.5, **options)
    return p.with_rho(factor * p.curvature())


def run(methods, p, sigma=0.0, iterations=40, seeds=SEEDS, **options):
    return simulate(methods, p, seeds=seeds, sigma=sigma, iterations=iterations, **options)


def draws(seed, iterations, K, d, C):
    """Noise [T, 2, K, d] and schedule [T, K] of one problem's only run, as `simulate` draws."""
    g, noise, order = torch.Generator().manual_seed(2**40 + seed), [], []
    for _ in range(iterations // 32 + 1):
        noise.append(torch.randn(32, 2, K, 1, d, generator=g))
        order.append(torch.rand(32, K, 1, 1, generator=g).argsort(1))
    return torch.cat(noise)[:, :, :, 0].double().numpy(), (torch.cat(order) < C)[..., 0, 0].numpy()


def loop(kind, H, b, rho, sigma, noise, drawn, memory, continual, lr=None):
    """The recursions on one problem, a client at a time; returns the w_k and the server's w."""
    K, d = b.shape
    N = [np.linalg.inv(H[k] + rho * np.eye(d)) for k in range(K)]
    w = np.array([N[k] @ b[k] for k in range(K)])
    z, heard, kept = np.zeros((K, d)), np.zeros((K, d)), np.zeros((K, d))
    server = previous = np.zeros(d)
    for n in range(len(drawn)):
        fresh = [k for k in range(K) if drawn[n][k]]
        if n == 0:
            for k in range(K) if memory else fresh:
                kept[k] = (2 if kind == "continual" else 1) * w[k] + sigma * noise[n][1][k]
            server = kept.mean(0) if memory else kept[fresh].mean(0)
            continue
        sent = 2 * server - previous if kind == "RERCE-Fed" else server
        for k in range(K):
            if drawn[n][k]:
                heard[k] = sent + sigma * noise[n][0][k]
            elif not continual:
                continue
            old = w[k].copy()
            if kind == "dual":
                z[k] = z[k] + rho * (w[k] - heard[k])
                w[k] = N[k] @ (b[k] - z[k] + rho * heard[k])
                upload = w[k] + z[k] / rho
            elif kind == "FedGD":
                w[k] = heard[k] - lr * (H[k] @ heard[k] - b[k])
                upload = w[k]
            else:
                w[k] = (np.eye(d) - rho * N[k]) @ w[k] + rho * N[k] @ heard[k]
                upload = {
                    "RERCE-Fed": w[k],
                    "continual": 2 * w[k] - old,
                    "stationary": w[k] - (H[k] @ old - b[k]) / rho,
                }[kind]
            if drawn[n][k]:
                kept[k] = upload + sigma * noise[n][1][k]
        previous = server
        server = kept.mean(0) if memory else kept[fresh].mean(0)
    return w, server


@pytest.mark.parametrize("memory", [False, True])
@pytest.mark.parametrize("continual", [False, True])
@pytest.mark.parametrize("kind", [*EVERY, "FedGD"])
def test_it_equals_a_loop_over_clients(kind, memory, continual):
    p, T, C = well_posed(), 12, 3
    options = dict(memory=memory, continual=continual)
    method = FedGD(1e-3, **options) if kind == "FedGD" else type(EVERY[kind])(**options)
    h = run({"it": method}, p, 0.1, T, active=C)["it"]
    for i, seed in enumerate(SEEDS):
        noise, drawn = draws(seed, T, *p.b.shape[1:], C)
        problem = (p.H[i].numpy(), p.b[i].numpy(), float(p.rho[i]), 0.1)
        w, server = loop(kind, *problem, noise[: T + 1], drawn[: T + 1], memory, continual, 1e-3)
        np.testing.assert_allclose(h.state["w"][i, :, 0], w, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(h.state["server"][i, 0], server, rtol=1e-9, atol=1e-9)
        best = p.optimum()[i].numpy()
        expected = ((w - best) ** 2).sum(1).mean() / (best**2).sum()
        np.testing.assert_allclose(h.network[i, -1], expected, rtol=1e-7)


def test_everybody_reaches_the_weighted_least_squares_solution():
    rng = np.random.default_rng(0)
    K, d, n = 4, 3, 7
    X, y = rng.standard_normal((K, n, d)), rng.standard_normal((K, n))
    weight = rng.uniform(0.5, 2, (K, n))
    root = np.sqrt(weight)
    best = np.linalg.lstsq(
        (root[..., None] * X).reshape(-1, d), (root * y).reshape(-1), rcond=None
    )[0]
    H = 2 * np.einsum("kni,kn,knj->kij", X, weight, X)
    b = 2 * np.einsum("kni,kn,kn->ki", X, weight, y)
    p = Problem.make(torch.tensor(H)[None], torch.tensor(b)[None], 10.0)
    np.testing.assert_allclose(p.optimum()[0], best, atol=1e-12)
    for name, h in run(EVERY, p, iterations=400, seeds=[0]).items():
        np.testing.assert_allclose(h.state["w"][0, :, 0], np.tile(best, (K, 1)), atol=1e-8), name


@pytest.mark.parametrize("iterations", [1, 2, 5, 30])
def test_without_noise_the_dual_form_is_rerce_fed(iterations):
    h = run(EVERY, well_posed(), iterations=iterations)
    for name in ("RERCE-Fed", "continual"):
        torch.testing.assert_close(
            h[name].state["w"], h["dual"].state["w"], atol=1e-10, rtol=0, msg=name
        )
    server = h["RERCE-Fed"].state["w"].mean(1)  # without noise
    torch.testing.assert_close(h["RERCE-Fed"].state["server"], server, atol=1e-12, rtol=0)


def test_a_client_of_the_dual_form_gets_its_noise_twice_and_then_back():
    p, many = well_posed(), 200
    p = Problem.make(*(v[:1, :1].repeat_interleave(many, 1) for v in (p.H, p.b)), p.rho[0])
    own = slice(0, p.b.shape[2])
    P = p.rho * p.N[0, 0]  # rho N
    for method, now, then in (
        (DualADMM(), 2 * P, P - 2 * P @ P),  # -P where P is a projection
        (RerceFed(), P, P - P @ P),
        (StationaryDual(), P, P - P @ P),
    ):
        F, G = transition(method, p)
        torch.testing.assert_close(G[0, own, own], now)
        # The rest comes back through the server, a share of 1/K.
        torch.testing.assert_close((F[0] @ G[0, :, own])[own], then, atol=0.02, rtol=0)


@pytest.mark.parametrize("C", [2, 5])
def test_rerce_fed_conserves_a_sum_under_any_schedule(C):
    p = well_posed()

    def conserved(s):
        weighted = (s["w"] @ p.H).sum(1)
        return weighted + p.rho.view(-1, 1, 1) * C * (s["server"] - s["previous"])

    early, late = (
        conserved(run({"it": RerceFed()}, p, iterations=T, active=C)["it"].state) for T in (1, 60)
    )
    torch.testing.assert_close(early, late, rtol=1e-10, atol=0)
    if C == 5:  # with everybody from the start, the sum is the one that w* has
        torch.testing.assert_close(late, p.b.sum(1)[:, None], rtol=1e-10, atol=0)


def test_rerce_fed_has_d_unit_eigenvalues_and_the_others_none():
    p = well_posed()
    for method in (RerceFed(), ContinualRerceFed()):
        size = torch.linalg.eigvals(transition(method, p)[0]).abs()
        assert ((size - 1).abs() < 1e-9).sum(1).tolist() == [3, 3] and (size < 1 + 1e-9).all()
    for method in (DualADMM(), StationaryDual()):
        assert (torch.linalg.eigvals(transition(method, p)[0]).abs() < 0.99).all()


def test_transition_is_the_block_matrix_of_the_equations():
    p = well_posed(clients=3)
    _, K, d = p.b.shape
    N = [float(p.rho[0]) * p.N[0, k].numpy() for k in range(K)]
    H = [p.H[0, k].numpy() / float(p.rho[0]) for k in range(K)]
    eye, zero = np.eye(d), np.zeros((d, d))
    keep, hear = block_diag(*(eye - n for n in N)), np.vstack(N)
    mean = np.hstack([eye] * K) / K
    F, _ = transition(RerceFed(), p)
    rerce = np.block(
        [
            [keep, 2 * hear, -hear],
            [mean @ keep, 2 * mean @ hear, -mean @ hear],
            [np.zeros((d, K * d)), eye, zero],
        ]
    )
    np.testing.assert_allclose(F[0], rerce, atol=1e-10)
    F, G = transition(StationaryDual(), p)
    stationary = np.block([[keep, hear], [mean @ (keep - block_diag(*H)), mean @ hear]])
    np.testing.assert_allclose(F[0], stationary, atol=1e-10)
    noise = np.block([[block_diag(*N), np.zeros((K * d, K * d))], [mean @ block_diag(*N), mean]])
    np.testing.assert_allclose(G[0], noise, atol=1e-10)


@pytest.mark.parametrize("method", [DualADMM(), StationaryDual()], ids=["dual", "stationary"])
def test_steady_state_solves_the_lyapunov_equation_and_is_what_a_run_shows(method):
    p, sigma = well_posed(), 0.1
    network, server = predicted(method, p, sigma, 14)
    K, d = p.b.shape[1:]
    for i in range(len(SEEDS)):
        F, G = (v[i].numpy() for v in transition(method, p))
        variance = np.diag(solve_discrete_lyapunov(F, sigma**2 * G @ G.T))
        scale = float((p.optimum()[i] ** 2).sum())
        np.testing.assert_allclose(network[i], variance[: K * d].sum() / K / scale, rtol=1e-6)
        np.testing.assert_allclose(server[i], variance[-d:].sum() / scale, rtol=1e-6)
    h = run({"it": method}, p, sigma, 600, runs=40)["it"]
    torch.testing.assert_close(h.network[:, 60:].mean(1), network, rtol=0.05, atol=0)
    torch.testing.assert_close(h.server[:, 60:].mean(1), server, rtol=0.05, atol=0)


@pytest.mark.parametrize("method", [RerceFed(), ContinualRerceFed()], ids=["RERCE", "continual"])
def test_the_random_walk_has_the_rate_of_the_closed_form(method):
    p, sigma = well_posed(), 0.1
    early, late = (predicted(method, p, sigma, doublings) for doublings in (9, 10))
    for before, after in zip(early, late):  # network and server
        torch.testing.assert_close((after - before) / 512, walk_rate(p, sigma), rtol=1e-3, atol=0)
    h = run({"it": method}, p, sigma, 1024, runs=200, every=1024)["it"]
    torch.testing.assert_close(h.network[:, -1], late[0], rtol=0.2, atol=0)


@pytest.mark.parametrize("name", EVERY)
def test_predictions_sum_what_the_noise_of_each_iteration_has_become(name):
    p, sigma = well_posed(), 0.1
    network, server = predicted(EVERY[name], p, sigma, 2)
    K, d = p.b.shape[1:]
    F, G = (v[0].numpy() for v in transition(EVERY[name], p))
    parts = [np.linalg.matrix_power(F, n) @ G for n in range(4)]
    variance = sigma**2 * sum((part**2).sum(1) for part in parts)
    at = K * d * (2 if name == "dual" else 1)  # the server's follows the w_k and the z_k
    scale = float((p.optimum()[0] ** 2).sum())
    np.testing.assert_allclose(network[0], variance[: K * d].sum() / K / scale, rtol=1e-10)
    np.testing.assert_allclose(server[0], variance[at : at + d].sum() / scale, rtol=1e-10)


def test_problems_are_least_squares_weighted_by_the_labels_precision():
    seeds, d = range(200), 3
    p = regression(seeds, 2, d, (4, 8), 0.5)
    truth = regression(seeds, 2, d, (4, 8), 1e-9).optimum()  # the same draws, no label noise
    np.testing.assert_allclose((truth**2).sum(1), d, rtol=1e-6)
    # With the right weights H / 2 is the inverse covariance of w*: the distance is chi-squared.
    off = (p.optimum() - truth)[..., None]
    distance = (off.mT @ (p.H.sum(1) / 2) @ off).mean()
    assert abs(distance - d) < 3 * (2 * d / 200) ** 0.5


def test_under_random_scheduling_the_second_moment_follows_the_kronecker_equation():
    p, sigma, C, T = well_posed([0], clients=3, d=2), 0.1, 2, 12
    _, K, d = p.b.shape
    D = K * d + 2 * d
    N = [float(p.rho[0]) * p.N[0, k].numpy() for k in range(K)]
    eye = np.eye(d)
    moment = np.zeros((D * D, D * D))
    noise = np.zeros((D, D))
    subsets = list(combinations(range(K), C))
    for chosen in subsets:
        F, G = np.zeros((D, D)), np.zeros((D, 2 * K * d))
        F[-d:, -2 * d : -d] = eye
        for k in range(K):
            row = slice(k * d, k * d + d)
            F[row, row] = eye
            if k in chosen:
                F[row, row], F[row, -2 * d : -d], F[row, -d:] = eye - N[k], 2 * N[k], -N[k]
                G[row, row] = N[k]
                F[-2 * d : -d] += F[row] / C
                G[-2 * d : -d] += G[row] / C
                G[-2 * d : -d, K * d + k * d : K * d + k * d + d] = eye / C
        moment += np.kron(F, F) / len(subsets)
        noise += sigma**2 * G @ G.T / len(subsets)
    # From the state after the first upload, which is random too.
    start = run({"it": RerceFed()}, p, sigma, 0, seeds=[0], runs=20_000, active=C)["it"].state
    best = p.optimum()[0]
    x = torch.cat(
        [
            (start["w"][0] - best).transpose(0, 1).reshape(20_000, -1),
            start["server"][0] - best,
            start["previous"][0] - best,
        ],
        1,
    ).numpy()
    second = (x.T @ x / len(x)).reshape(-1)
    for _ in range(T):
        second = moment @ second + noise.reshape(-1)
    second = np.diag(second.reshape(D, D))
    h = run({"it": RerceFed()}, p, sigma, T, seeds=[0], runs=20_000, active=C)["it"]
    scale = float((best**2).sum())
    np.testing.assert_allclose(h.network[0, -1], second[: K * d].sum() / K / scale, rtol=0.03)
    np.testing.assert_allclose(h.server[0, -1], second[K * d : -d].sum() / scale, rtol=0.03)


def test_continual_updates_and_memory_change_nothing_when_everybody_takes_part():
    p = well_posed()
    for name, method in EVERY.items():
        kind = type(method)
        hold, move = kind(memory=True), kind(memory=True, continual=True)
        both = {"hold": hold, "move": move, "fresh": kind(memory=False)}
        h = run(both, p, 0.1)
        for other in ("move", "fresh"):
            torch.testing.assert_close(
                h["hold"].network, h[other].network, rtol=1e-12, atol=0, msg=name
            )


def test_where_clients_know_less_than_the_penalty_repeating_a_step_does_nothing():
    # With rho far below the curvature, rho N_k is the projection on what the client cannot see.
    p = regression(SEEDS, 6, 8, (3, 5), 0.01)
    P = p.rho.view(-1, 1, 1, 1) * p.N
    torch.testing.assert_close(P @ P, P, atol=1e-3, rtol=0)
    methods = {"hold": ContinualRerceFed(continual=False), "move": ContinualRerceFed()}
    h = run(methods, p, 0.1, active=2)
    torch.testing.assert_close(h["hold"].network, h["move"].network, rtol=0.01, atol=0)


def test_a_problem_does_not_depend_on_what_else_is_stacked_or_run():
    together = run(EVERY, well_posed(), 0.1, runs=2, active=3)
    for i, seed in enumerate(SEEDS):
        alone = run({"it": RerceFed()}, well_posed([seed]), 0.1, seeds=[seed], runs=2, active=3)
        torch.testing.assert_close(
            alone["it"].network[0], together["RERCE-Fed"].network[i], rtol=1e-9, atol=0
        )


def test_measurements_are_at_the_stated_iterations():
    h = run(EVERY, well_posed(), iterations=10, every=4)["dual"]
    assert h.iterations.tolist() == [0, 4, 8, 10] and h.network.shape == (2, 4)


def test_noise_of_the_two_directions_adds_up():
    p = well_posed()
    none, down, up, both = (
        run({"it": RerceFed()}, p, s)["it"].state["w"] for s in (0.0, (0.1, 0.0), (0.0, 0.1), 0.1)
    )
    assert not torch.equal(down, none) and not torch.equal(up, none)
    torch.testing.assert_close(both - none, (down - none) + (up - none), atol=1e-10, rtol=0)


def test_single_precision():
    h = run({"it": RerceFed()}, well_posed(dtype=torch.float32), 0.1)["it"]
    assert h.network.dtype == torch.float32 and h.network.isfinite().all()


@pytest.mark.parametrize(
    "bad, message",
    [
        (lambda: Problem.make(torch.eye(2).expand(1, 3, 2, 2), torch.zeros(1, 3, 3), 1.0), "3, 3"),
        (lambda: well_posed(factor=-1.0), "positive"),
        (lambda: regression(SEEDS, 3, 2, (4, 2), 0.1), r"\(4, 2\)"),
        (lambda: regression(SEEDS, 3, 2, (0, 2), 0.1), r"\(0, 2\)"),
        (lambda: regression([], 3, 2, (2, 4), 0.1), "seeds"),
        (lambda: run(EVERY, well_posed(), active=6), "active=6"),
        (lambda: run(EVERY, well_posed(), active=0), "active=0"),
        (lambda: run(EVERY, well_posed(), seeds=[0]), "1 seeds for 2 problems"),
    ],
)
def test_bad_input_is_named(bad, message):
    with pytest.raises(ValueError, match=message):
        bad()


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu)])
def test_gpu_gives_what_the_cpu_gives(device):
    there = run(EVERY, well_posed(device=device), 0.1, active=3)
    here = run(EVERY, well_posed(), 0.1, active=3)
    for name in EVERY:
        assert there[name].network.device.type == "cuda"
        torch.testing.assert_close(there[name].network.cpu(), here[name].network)
