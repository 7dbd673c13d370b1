r"""SPRIGHT: the sparse Walsh-Hadamard transform from noisy samples.

Li, Bradley, Pawar and Ramchandran, "SPRIGHT: A Fast and Robust Framework for Sparse Walsh-Hadamard
Transform", arXiv:1508.06336; a shorter version at ISIT 2014. Of a signal of length N = 2^n,

    x[m] = 1/sqrt(N) sum_k X[k] (-1)^<k, m> + w[m],    w[m] ~ N(0, sigma^2),

only K coefficients X[k] are not zero. Indices are bit vectors: integers whose sum is XOR (^) and
whose inner product is the parity of the bits that two share.

**The one idea**: hash the coefficients into B = eta K bins by looking at few samples, and let the
bins that hold a single coefficient give it away (a sparse-graph code). Group c = 1..C has a matrix
M_c in F_2^{n x b}, B = 2^b, and P offsets d_p. A B-point transform of x[M_c l + d_p] aliases:

    U_cp[j] = 1/sqrt(B) sum_l sqrt(N/B) x[M_c l + d_p] (-1)^<l, j>
            = sum_{k: M_c^T k = j} X[k] (-1)^<d_p, k> + W,    W ~ N(0, nu^2),  nu^2 = sigma^2 N / B.

A bin is a *zero-ton* if ||U||^2 / P <= (1 + gamma) nu^2. Otherwise a search proposes k, and it is a
*single-ton* if with s_k = ((-1)^<d_p, k>)_p and X = s_k^T U / P

    ||U - X s_k||^2 / P <= (1 + gamma) nu^2    and    M_c^T k = j,

else a multi-ton. Single-tons are subtracted from their bins in all groups, which makes new ones
("peeling"). Peeling succeeds w.h.p. above B/K = 0.4073 (C = 3), see `threshold`.

What robustness costs is decided by the offsets and the search:

- SparseFHT (Scheibler, Haghighatshoar and Vetterli 2015), noiseless: offsets 0, e_1, .., e_n; bit q
  of k is set iff U_q and U_0 differ in sign. P = n + 1.
- NSO-SPRIGHT (near sample optimal): P_1 random base offsets d_p, each with all d_p + e_q; a
  majority of the P_1 sign comparisons decides bit q. P = P_1 (n + 1): K log^2 N samples.
- SO-SPRIGHT (sample optimal): P = O(n) random offsets; maximum likelihood, the largest |s_k^T U|,
  over the N/B candidates of the bin: K log N samples, for more time. (The paper has a variant with
  offsets from a linear code, whose decoder finds k in time O(n). It is not here.)

The theory has X[k] = +-rho with rho known, then X is rho times the sign of s_k^T U.

Rivals: the fast transform of all N samples (`fwht`, `top_k`), and orthogonal matching pursuit on
random samples (`omp`).

Axes: S seeds, T signals a seed, then C groups, B bins, P offsets. All signals and bins of a round
of peeling are decided together.
"""

import math
from collections import Counter, namedtuple

import torch

from .counting import wht_ops

# k [F] and value [F] of the coefficients found in signal number run [F], counted over all S T.
Found = namedtuple("Found", "run k value ops")


def parity(v):
    """Parity of the bits of each entry of v (int64, not negative); of `k & m` it is <k, m>."""
    bits = int(v.max()).bit_length() if v.numel() else 0
    for shift in (32, 16, 8, 4):
        if bits > shift:
            v = v ^ (v >> shift)
    return (0x6996 >> (v & 15)) & 1


def sign(k, m, dtype=torch.float32):
    """(-1)^<k, m>, for int64 tensors that broadcast."""
    return 1 - 2 * parity(k & m).to(dtype)


def span(columns, coefficients):
    """XOR of those columns [b] whose bit is set: the product M l over F_2, for l of any shape."""
    out = torch.zeros_like(coefficients)
    for i, column in enumerate(columns.tolist()):
        out ^= ((coefficients >> i) & 1) * column
    return out


def bin_of(M, k):
    """M^T k: the bin [...] of coefficients k [...] in the group with columns M [b]."""
    out = torch.zeros_like(k)
    for i, column in enumerate(M.tolist()):
        out |= parity(k & column) << i
    return out


def fwht(x):
    """Fast Walsh-Hadamard transform sum_m x[m] (-1)^<k, m> of the last axis, in L log2 L additions.

    Raises
    ------
    ValueError
        If the length is no power of two.
    """
    length = x.shape[-1]
    if length & (length - 1) or not length:
        raise ValueError(f"the length must be a power of two, not {length}")
    shape, h = x.shape, 1
    while h < length:
        x = x.reshape(*shape[:-1], length // (2 * h), 2, h)
        a, b = x[..., 0, :], x[..., 1, :]
        x, h = torch.stack((a + b, a - b), -2), 2 * h
    return x.reshape(shape)


class SparseSignal:
    """Signals given by their sparse spectra, of which any sample can be asked.

    The noise of a sample is a hash of its index, so that a sample asked twice is the same.

    Parameters
    ----------
    n : int
        log2 of the length N, at most 40.
    k : tensor of int64, shape [S, T, K]
        Support of each spectrum, distinct along the last axis.
    X : tensor, shape [S, T, K]
        Its values.
    sigma : float
        Standard deviation of the noise of a sample.
    key : tensor of int64, shape [S, T]
        Chooses the noise of each signal.
    """

    def __init__(self, n, k, X, sigma=0.0, key=None):
        if not 1 <= n <= 40:
            raise ValueError(f"n = log2 N must lie in 1..40, not {n}")
        if k.shape != X.shape or k.ndim != 3:
            raise ValueError(f"k and X need one shape [S, T, K], got {k.shape} and {X.shape}")
        if (k < 0).any() or (k >= 2**n).any():
            raise ValueError(f"the support must lie in 0..{2**n - 1}")
        self.n, self.k, self.X, self.sigma = n, k, X, sigma
        self.key = torch.zeros_like(k[..., 0]) if key is None else key

    @classmethod
    def random(cls, n, K, trials, seeds, snr_db=math.inf, *, device="cpu", dtype=torch.float32):
        """Uniform supports and values +-1, `trials` signals a seed.

        `snr_db` is ||x||^2 / (N sigma^2) in decibels, that is K / (N sigma^2).
        """
        if not 1 <= K <= 2**n:
            raise ValueError(f"K must lie in 1..N = {2**n}, not {K}")
        rows = []
        for seed in seeds:
            g = torch.Generator().manual_seed(seed)
            if n <= 12:
                k = torch.rand(trials, 2**n, generator=g).topk(K).indices
            else:  # until all are distinct
                k = torch.randint(2**n, (trials, K), generator=g)
                while (again := (k.sort(-1).values.diff(dim=-1) == 0).any(-1)).any():
                    k[again] = torch.randint(2**n, (int(again.sum()), K), generator=g)
            X = 2.0 * torch.randint(2, (trials, K), generator=g) - 1
            rows.append((k, X, torch.randint(2**62, (trials,), generator=g)))
        k, X, key = (torch.stack(v).to(device) for v in zip(*rows))
        return cls(n, k, X.to(dtype), math.sqrt(K / 2**n * 10 ** (-snr_db / 10)), key)

    def __call__(self, a, d):
        """Samples x[a + d] (the sum is XOR), for a [Q] and d [S, P]: a tensor [S, T, P, Q].

        The sum over k factors, (-1)^<a + d, k> = (-1)^<a, k> (-1)^<d, k>: one matrix product.
        """
        dtype, k = self.X.dtype, self.k
        left = sign(d[:, None, :, None], k[:, :, None], dtype) * self.X[:, :, None]  # [S, T, P, K]
        right = sign(k[..., None], a, dtype)  # [S, T, K, Q]
        x = left @ right / 2 ** (self.n / 2)
        if self.sigma:
            m = (a ^ d[..., None])[:, None]  # [S, 1, P, Q]
            x += self.sigma * normal(m, self.key[..., None, None]).to(dtype)
        return x


def normal(m, key):
    """A standard normal number for each pair of index and key: splitmix64, then Box and Muller."""
    z = key + m * -7046029254386353131
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        z ^= (z >> shift).bitwise_and_(2 ** (64 - shift) - 1)
        z *= factor
    z ^= (z >> 31).bitwise_and_(2**33 - 1)
    u = (z & (2**31 - 1)).float().add_(0.5).mul_(2.0**-31)
    v = z.bitwise_right_shift_(32).bitwise_and_(2**31 - 1).float().mul_(2 * math.pi / 2**31)
    return u.log_().mul_(-2).sqrt_().mul_(v.cos_())


class FrontEnd:
    """Where to sample, and how samples become bins.

    Parameters
    ----------
    n : int
        log2 N.
    M : tensor of int64, shape [C, b]
        The columns of each M_c, as bit masks: linearly independent. See `picks` and `dense`.
    d : tensor of int64, shape [S, P]
        Offsets. See `noiseless_offsets`, `nso_offsets`, `so_offsets`.
    """

    def __init__(self, n, M, d):
        self.n, self.M, self.d = n, M, d
        self.C, self.b = M.shape
        self.B, self.P = 2**self.b, d.shape[1]
        for name, v in (("M", M), ("d", d)):
            if (v < 0).any() or (v >= 2**n).any():
                raise ValueError(f"{name} must hold bit masks in 0..{2**n - 1}")
        l = torch.arange(self.B, device=M.device)
        self.lines = torch.stack([span(columns, l) for columns in M])  # M_c l, shape [C, B]

    def observe(self, x):
        """Bins U [S, T, C, B, P] of a signal x(a, d): see `SparseSignal.__call__`."""
        u = x(self.lines.flatten(), self.d)  # [S, T, P, C B]
        u = u.reshape(*u.shape[:3], self.C, self.B)
        U = fwht(u) * (2 ** (self.n / 2) / self.B)  # sqrt(N/B) / sqrt(B)
        return U.permute(0, 1, 3, 4, 2).contiguous()

    def samples(self):
        """Distinct samples of each seed: a list of int. Offsets in the span of M_c ask twice."""
        m = self.lines.flatten() ^ self.d[..., None]
        return [len(row.unique()) for row in m.flatten(1)]

    def first(self, P):
        """The same front end with the first P offsets only."""
        return FrontEnd(self.n, self.M, self.d[:, :P])


def picks(n, b, C):
    """M_c that pick b of the n bits, other bits in each group: [C, b]. Needs C b <= n."""
    if C * b > n:
        raise ValueError(f"{C} groups of {b} bits need n >= {C * b}, not {n}: use dense matrices")
    return (1 << torch.arange(C * b)).reshape(C, b)


def dense(n, b, C, seed):
    """M_c of b random linearly independent columns: [C, b]."""
    if b > n:
        raise ValueError(f"b must be at most n = {n}, not {b}")
    g = torch.Generator().manual_seed(seed)
    M = []
    while len(M) < C:
        columns = torch.randint(1, 2**n, (b,), generator=g)
        if eliminate(columns) is not None:
            M.append(columns)
    return torch.stack(M)


def noiseless_offsets(n, seeds):
    """0, e_1, .., e_n for each seed: [S, n + 1]."""
    return torch.cat([torch.zeros(1, dtype=torch.int64), 1 << torch.arange(n)]).repeat(
        len(seeds), 1
    )


def so_offsets(n, P, seeds):
    """P random offsets for each seed: [S, P]."""
    draws = [torch.randint(2**n, (P,), generator=torch.Generator().manual_seed(s)) for s in seeds]
    return torch.stack(draws)


def nso_offsets(n, P_1, seeds):
    """P_1 random base offsets, each followed by its n neighbors d_p + e_q: [S, P_1 (n + 1)]."""
    base = so_offsets(n, P_1, seeds)
    return (base[..., None] ^ noiseless_offsets(n, seeds)[:, None]).flatten(1)


def eliminate(columns):
    """Solve M^T k = j over F_2 once for all j.

    Parameters
    ----------
    columns : tensor of int64, shape [b]
        The columns of M.

    Returns
    -------
    right : list of int, length b, and rows : list of (mask, pivot)
        ``span(right, j)`` is one solution; the reduced rows give the others (`null_space`). None if
        the columns are linearly dependent.
    """
    rows = []  # reduced mask, which columns it sums, pivot bit
    for i, mask in enumerate(columns.tolist()):
        combination = 1 << i
        for m, c, p in rows:
            if mask >> p & 1:
                mask, combination = mask ^ m, combination ^ c
        if not mask:
            return None
        pivot = mask.bit_length() - 1
        rows = [(m ^ mask, c ^ combination, p) if m >> pivot & 1 else (m, c, p) for m, c, p in rows]
        rows.append((mask, combination, pivot))
    b = len(rows)
    right = [sum(1 << p for _, c, p in rows if c >> i & 1) for i in range(b)]
    return right, [(m, p) for m, _, p in rows]


def null_space(n, rows):
    """Basis of {z: M^T z = 0}, a list of n - b int, from the reduced rows of `eliminate`."""
    pivots = {p for _, p in rows}
    free = [f for f in range(n) if f not in pivots]
    return [1 << f | sum(1 << p for m, p in rows if m >> f & 1) for f in free]


def by_majority(front, V, seed, group, j):
    """Proposals k [F] for bins V [F, P]: bit q is the majority vote over the P_1 base offsets.

    With P_1 = 1 it is the sign ratio test of SparseFHT.
    """
    negative = (V < 0).reshape(len(V), -1, front.n + 1)  # [F, P_1, 1 + n]
    votes = (negative[..., :1] ^ negative[..., 1:]).sum(1)  # [F, n]
    bits = 2 * votes > negative.shape[1]
    return (bits.long() << torch.arange(front.n, device=V.device)).sum(-1), 2 * V[0].numel()


def by_likelihood(front, V, seed, group, j, block=9):
    """Proposals k [F] for bins V [F, P]: the k of the bin with the largest |s_k^T U|.

    The candidates are k_j + z with M_c^T k_j = j and z in the null space of M_c^T, whose elements
    are split in 2^block low ones, a matrix product, and the high ones, a loop.
    """
    S, device = len(front.d), V.device
    k = torch.empty_like(j)
    for c in range(front.C):
        right, rows = eliminate(front.M[c])
        basis = torch.tensor(null_space(front.n, rows), device=device)
        low, high = basis[:block], basis[block:]
        code = V.new_ones(S, front.P, 1)
        for z in low:  # s_z for the low z, in the order of `span`: [S, P, 2^block]
            code = torch.cat([code, code * sign(front.d, z, V.dtype)[..., None]], -1)
        at = (group == c).nonzero()[:, 0]
        if not len(at):
            continue
        s = seed[at]  # in ascending order: bins of a seed side by side, filled up to the longest
        start = torch.searchsorted(s, torch.arange(S, device=device))
        place = torch.arange(len(at), device=device) - start[s]
        k_j = span(torch.tensor(right, device=device), j[at])
        W = V.new_zeros(S, int(place.max()) + 1, front.P)
        W[s, place] = V[at] * sign(k_j[:, None], front.d[s], V.dtype)
        best = W.new_full(W.shape[:2], -1.0)
        best_z = torch.zeros_like(best, dtype=torch.int64)
        score = W.new_empty(*W.shape[:2], code.shape[-1])
        for h in span(high, torch.arange(2 ** len(high), device=device)).tolist():
            torch.bmm(W * sign(front.d, h, V.dtype)[:, None], code, out=score)
            top = score.abs_().amax(-1)
            better = top > best
            best = torch.where(better, top, best)
            best_z[better] = span(low, score[better].argmax(-1)) ^ h  # for few: it is slower
        k[at] = k_j ^ best_z[s, place]
    return k, 2 * front.P * 2 ** (front.n - front.b)


def peel(front, U, search, *, nu2=0.0, gamma=0.0, rho=None, tol=1e-9, rounds=100):
    """Detect single-tons and subtract them until none is left: the back end.

    Parameters
    ----------
    front : FrontEnd
    U : tensor, shape [S, T, C, B, P]
        From ``front.observe``.
    search : callable
        `by_majority` or `by_likelihood`.
    nu2, gamma : float
        Noise of a bin, sigma^2 N / B, and the slack of both tests.
    rho : float, optional
        Known magnitude of the values. Default: they are estimated, X = s_k^T U / P.
    tol : float
        Added to both thresholds, for rounding where there is no noise.
    rounds : int
        Cap on the rounds of peeling.

    Returns
    -------
    Found
        With `ops`, a Counter of the operations spent on all signals together.
    """
    if gamma < 0 or nu2 < 0:
        raise ValueError(f"gamma and nu2 must not be negative, not {gamma} and {nu2}")
    S, T, C, B, P = U.shape
    if (C, B, P) != (front.C, front.B, front.P):
        raise ValueError(f"bins of shape {(C, B, P)} for {(front.C, front.B, front.P)}")
    bins, threshold = U.reshape(-1, P).clone(), (1 + gamma) * nu2 + tol
    ops = Counter(transform=S * T * C * P * int(wht_ops(B)))
    key, value = torch.empty(0, dtype=torch.int64, device=U.device), U.new_empty(0)
    changed = torch.arange(len(bins), device=U.device)
    for _ in range(rounds):
        V = bins[changed]
        ops["zero-ton test"] += 2 * V.numel()
        changed = changed[V.square().mean(-1) > threshold]
        if not len(changed):
            break
        V = bins[changed]
        run, j = changed // (C * B), changed % B
        seed, group = run // T, changed // B % C
        k, work = search(front, V, seed, group, j)
        s = sign(k[:, None], front.d[seed], V.dtype)
        X = (s * V).mean(-1)
        if rho is not None:
            X = rho * (2 * (X > 0).to(X.dtype) - 1)
        residual = (V - X[:, None] * s).square().mean(-1)
        ops["search"] += work * len(V)
        ops["single-ton test"] += 5 * V.numel()
        home = torch.stack([bin_of(M, k) for M in front.M])  # M_c^T k, shape [C, F]
        good = (residual <= threshold) & (home.gather(0, group[None])[0] == j)
        # the same k may come from several groups: take the first; one recorded before stays
        new = torch.where(good, run << front.n | k, -1)
        good &= ~torch.isin(new, key) & first_of(new)
        if not good.any():
            break
        key, value = torch.cat([key, new[good]]), torch.cat([value, X[good]])
        target = (run[good] * C + torch.arange(C, device=U.device)[:, None]) * B + home[:, good]
        peeled = (X[good][:, None] * s[good]).repeat(C, 1)
        bins.index_put_((target.flatten(),), -peeled, accumulate=True)
        ops["peeling"] += 2 * peeled.numel()
        changed = target.unique()
    return Found(key >> front.n, key & (2**front.n - 1), value, ops)


def first_of(v):
    """Whether each entry of v [F] is the first of its value."""
    _, inverse = v.unique(return_inverse=True)
    at = torch.arange(len(v), device=v.device)
    first = torch.full_like(at, len(v)).scatter_reduce(0, inverse, at, "amin")
    return first[inverse] == at


def recovered(signal, found, tol=math.inf):
    """Whether each signal was recovered: bool [S, T].

    The support must be exact, all signs right, and all values within `tol`.
    """
    S, T, K = signal.k.shape
    run = torch.arange(S * T, device=signal.k.device)[:, None]
    true, order = (run << signal.n | signal.k.reshape(S * T, K)).flatten().sort()
    X = signal.X.flatten()[order]
    key = found.run << signal.n | found.k
    at = torch.searchsorted(true, key).clamp(max=len(true) - 1)
    hit = (true[at] == key) & (found.value * X[at] > 0) & ((found.value - X[at]).abs() <= tol)
    n_hit = torch.bincount(found.run[hit], minlength=S * T)
    n_all = torch.bincount(found.run, minlength=S * T)
    return ((n_hit == K) & (n_all == K)).reshape(S, T)


# The bipartite graph alone


def graph_survivors(K, B, C, trials, seeds, device="cpu"):
    """Share of K balls that peeling leaves: [S, T].

    Each ball is in one random bin of each of C groups of B. It goes as soon as it is alone in one.
    """
    bins = []
    for seed in seeds:
        g = torch.Generator().manual_seed(seed)
        bins.append(torch.randint(B, (trials, C, K), generator=g))
    bins = torch.stack(bins).flatten(0, 1).to(device)  # [R, C, K]
    left = torch.ones(len(bins), K, dtype=torch.bool, device=device)
    todo = torch.arange(len(bins), device=device)
    while len(todo):
        h, alive = bins[todo], left[todo]
        weight = alive[:, None].to(torch.int16).expand_as(h)
        count = torch.zeros(len(todo), C, B, dtype=torch.int16, device=device)
        count.scatter_add_(2, h, weight)
        stays = alive & ~(count.gather(2, h) == 1).any(1)
        left[todo] = stays
        todo = todo[(stays != alive).any(1) & stays.any(1)]
    return left.double().mean(1).reshape(len(seeds), trials)


def density_evolution(eta, C, rounds=2000):
    """Share of edges that stay in the limit K -> infinity, p <- (1 - exp(-p / eta))^(C - 1)."""
    p = 1.0
    for _ in range(rounds):
        p = (1 - math.exp(-p / eta)) ** (C - 1)
    return p


def threshold(C):
    """Smallest eta = B / K at which density evolution goes to zero, by bisection."""
    low, high = 0.01, 2.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if density_evolution(middle, C) < 1e-6 else (middle, high)
    return high


# Rivals


def top_k(x, K):
    """The K largest coefficients of the transform of all samples x [..., N]: indices and values."""
    X = fwht(x) / math.sqrt(x.shape[-1])
    k = X.abs().topk(K, -1).indices
    return k, X.gather(-1, k)


def omp(x, m, n, K):
    """Orthogonal matching pursuit: K coefficients from samples x [R, Q] at indices m [R, Q].

    The correlations with all N columns are a fast transform of the residual put in its places.
    """
    R, N = len(x), 2**n
    residual, k = x, m.new_empty(R, 0)
    for _ in range(K):
        scattered = x.new_zeros(R, N).scatter_add_(1, m, residual)
        score = fwht(scattered).abs().scatter_(1, k, -1.0)
        k = torch.cat([k, score.argmax(1, keepdim=True)], 1)
        A = sign(m[..., None], k[:, None], x.dtype) / math.sqrt(N)  # [R, Q, size of the support]
        X = torch.linalg.lstsq(A, x[..., None]).solution
        residual = x - (A @ X)[..., 0]
    return k, X[..., 0]
