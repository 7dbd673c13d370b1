r"""Submodular maximization while elements come and go.

Banihashem, Biabani, Goudarzi, Hajiaghayi, Jabbarzade and Monemizadeh, "Dynamic Constrained
Submodular Optimization with Polylogarithmic Update Time", ICML 2023, arXiv:2305.15192; the version
with one element a level is from the same authors' "Dynamic Algorithms for Matroid Submodular
Maximization", arXiv:2306.00959.

f is monotone and submodular, f(e | G) = f(G + e) - f(G), and V is the set of live elements. After
every insertion and deletion a set G of at most k elements is wanted with f(G) near OPT, for few
queries of f. For a guess OPT_g the threshold is tau = OPT_g / (2k), and a *copy* keeps levels

    R_1 = {e in V : f(e) >= tau},  G_0 = {},        S_i drawn at random from R_i,
    G_i = G_{i-1} + S_i,           R_{i+1} = {e in R_i : f(e | G_i) >= tau},

until |G| = k or R is empty. If |G| = k then f(G) >= k tau = OPT_g / 2; else nothing live gains tau
any more and OPT <= f(G) + k tau: for a guess within (1 + eps) below OPT either is (1/2 - eps) OPT.
Copies for OPT_g = (1 + eps)^j are kept side by side, the best one answers. An element with
f(e) > OPT_g shows that a guess is too small and is left out of that copy.

The one idea: who is in S_i is *uniformly random*, whatever has happened. A stream that was fixed
before the coins were tossed deletes an element of S_i with probability |S_i| / |R_i| only, and then
the levels from i on are built again, for about |R_i| queries a level. Uniformity survives
an insertion of v if at every level that v enters, lowest first, a coin of 1 / |R_i| (v counted)
says whether v would have been drawn; at the first success level i is built again around v.

- `trials=0`, the reference: |S_i| = 1. At most k levels, so that queries grow with k.
- `trials>0`: the paper's batches. R_i is split into bands of gain [tau (1 + eps)^b, tau (1 +
  eps)^(b+1)); S_i is a uniform sample of the largest band B_i, and its size m_i the largest (by
  binary search, each size tested with `trials` samples) for which a new element of B_i still gains
  at least its band's lower edge after m_i - 1 others with probability 1 - eps. Insertions are lazy:
  level i is built again when R_i has grown by half.

Rivals: greedy again at every update (`miniature.theory.submodular.greedy`); `Sieve`, one pass over
the stream (Badanidiyuru et al. 2014) and another one whenever a chosen element is deleted.

CPU only, compiled by numba: an update is a chain of dependent short steps (a coin decides whether
the next level is looked at, a rebuild draws from what the level before left).
"""

import math
from collections import namedtuple
from types import SimpleNamespace

import numpy as np
from numba import njit, types
from numba.extending import intrinsic

# f(S) = number of columns of ones with a one in the rows of S + sum over the columns of real of the
# largest entry in the rows of S. ones [n, w] uint64, 64 columns a word; real [n, m] float64; either
# may have no columns, so that all functions are of one type and everything is compiled once.
Rows = namedtuple("Rows", "ones real")

# Axes: C copies, levels 0..k+1 (level 0: only G_0), n elements.
# tau, cap [C]; R [C, k+2, n] the survivors and pos [C, k+2, n] where an element stands in R, -1
# outside; gain [C, k+2, n] f(e | G_{i-1}) of those in R_i; size, built [C, k+2] |R_i| now and when
# level i was built; picks [C, k] G in order, S_i = picks[start_i : start_{i+1}], start [C, k+2];
# top [C] the number of levels T; ones [C, k+2, w] and real [C, k+2, m] the rows of G_i joined,
# value [C, k+2] f(G_i); count [1]: queries.
Levels = namedtuple(
    "Levels",
    "f tau cap R pos gain size built picks start top ones real value count live rng k eps trials",
)
# The order of a sum is free, so that it can be vectorized; no C entry point, to compile faster.
OUTER = {"cache": True, "fastmath": {"reassoc", "contract"}, "no_cfunc_wrapper": True}
INNER = OUTER | {"no_cpython_wrapper": True}  # only compiled code calls it
ADAPTIVE = 0  # delete the solution's first element; +(v + 1) inserts, -(v + 1) deletes


# The set function.


@intrinsic
def _popcount(typing, x):
    """Number of ones of a uint64."""
    return types.uint64(types.uint64), lambda ctx, builder, sig, args: builder.ctpop(args[0])


@njit(inline="always")  # a call would cost more than the sum
def _gain(f, v, ones, real):
    """f(v | G) from the joined rows of G: ones [w], real [m]."""
    count, total = np.uint64(0), 0.0
    for j in range(len(ones)):
        count += _popcount(f.ones[v, j] & ~ones[j])
    for j in range(len(real)):
        total += max(f.real[v, j] - real[j], 0.0)
    return count + total


@njit(**INNER)
def _join(f, v, ones, real):
    """Add element v to the joined rows, in place."""
    for j in range(len(ones)):
        ones[j] |= f.ones[v, j]
    for j in range(len(real)):
        real[j] = max(real[j], f.real[v, j])


def pack(f):
    """Rows of a `Coverage` or `FacilityLocation` as compiled code wants them.

    Returns
    -------
    Rows
        Bits only, where every entry is 0 or 1 and every weight 1; else real numbers only.
    """
    rows, weights = f.rows.double().cpu().numpy(), f.weights.double().cpu().numpy()
    if not (((rows == 0) | (rows == 1)).all() and (weights == 1).all()):
        return Rows(np.zeros((f.n, 0), np.uint64), np.ascontiguousarray(rows * weights))
    bits = np.packbits(rows.astype(bool), axis=1)
    ones = np.pad(bits, ((0, 0), (0, -bits.shape[1] % 8))).view(np.uint64)
    return Rows(ones, np.zeros((f.n, 0)))


# One copy.


@njit(**INNER)
def query(s, c, i, v):
    """f(v | G_i), charged."""
    s.count[0] += 1
    return _gain(s.f, v, s.ones[c, i], s.real[c, i])


@njit(**INNER)
def enter(s, c, i, v, gain):
    """Add v to R_i."""
    s.pos[c, i, v], s.gain[c, i, v] = s.size[c, i], gain
    s.R[c, i, s.size[c, i]] = v
    s.size[c, i] += 1


@njit(**INNER)
def leave(s, c, i, v):
    """Take v out of R_i; the last one takes its place."""
    s.size[c, i] -= 1
    u, p = s.R[c, i, s.size[c, i]], s.pos[c, i, v]
    s.R[c, i, p], s.pos[c, i, u] = u, p
    s.pos[c, i, v] = -1


@njit(**INNER)
def clear(s, c, i):
    """Make R_i empty."""
    for v in s.R[c, i, : s.size[c, i]]:
        s.pos[c, i, v] = -1
    s.size[c, i] = s.built[c, i] = 0


@njit(**INNER)
def begin(s, c, i):
    """G_i = G_{i-1}: copy the joined rows (in loops: assigned slices take seconds to compile)."""
    for j in range(s.ones.shape[2]):
        s.ones[c, i, j] = s.ones[c, i - 1, j]
    for j in range(s.real.shape[2]):
        s.real[c, i, j] = s.real[c, i - 1, j]


@njit(**INNER)
def draw(s, B, m):
    """Move a uniform sample of size m to the front of B."""
    for j in range(m):
        r = j + int(s.rng.random() * (len(B) - j))
        B[j], B[r] = B[r], B[j]


@njit(**INNER)
def largest_band(s, c, i):
    """B_i [|B_i|], the largest band of gains in R_i, and its lower edge."""
    R, step = s.R[c, i, : s.size[c, i]], math.log(1 + s.eps)
    band = np.empty(len(R), np.int64)
    for j, v in enumerate(R):
        band[j] = int(math.log(s.gain[c, i, v] / s.tau[c]) / step)
    b = np.argmax(np.bincount(band))
    return R[band == b], s.tau[c] * (1 + s.eps) ** b


@njit(**INNER)
def sample_size(s, c, i, B, edge):
    """m_i: the most draws of which the last keeps a gain >= edge with probability 1 - eps."""
    low, high = 1, min(s.k - s.start[c, i], len(B))
    while low < high:
        m, kept = (low + high + 1) // 2, 0
        for _ in range(s.trials):
            draw(s, B, m)
            begin(s, c, i)
            for v in B[: m - 1]:
                _join(s.f, v, s.ones[c, i], s.real[c, i])
            kept += query(s, c, i, B[m - 1]) >= edge
        if kept >= (1 - s.eps) * s.trials:
            low = m
        else:
            high = m - 1
    return low


@njit(**INNER)
def construct(s, c, i, first):
    """Build level i and all above it anew, given R_i; `first` (or -1) is to be S_i."""
    while s.start[c, i] < s.k and s.size[c, i] > 0:
        s.built[c, i] = s.size[c, i]
        if s.trials > 0:
            B, edge = largest_band(s, c, i)
            m = sample_size(s, c, i, B, edge)
            draw(s, B, m)
        else:
            B, m = s.R[c, i, :1].copy(), 1
            B[0] = first if first >= 0 else s.R[c, i, int(s.rng.random() * s.size[c, i])]
            first = -1
        a = s.start[c, i]
        begin(s, c, i)
        s.value[c, i] = s.value[c, i - 1]
        for j in range(m):  # G_i = G_{i-1} + S_i
            s.picks[c, a + j] = B[j]
            s.value[c, i] += _gain(s.f, B[j], s.ones[c, i], s.real[c, i])
            _join(s.f, B[j], s.ones[c, i], s.real[c, i])
        s.count[0] += m > 1  # f(G_i); for a single element f(e | G_{i-1}) is known
        s.start[c, i + 1] = a + m
        clear(s, c, i + 1)
        if a + m < s.k:
            s.count[0] += s.size[c, i]
            ones, real = s.ones[c, i], s.real[c, i]
            for v in s.R[c, i, : s.size[c, i]]:  # R_{i+1} = {e in R_i : f(e | G_i) >= tau}
                gain = _gain(s.f, v, ones, real)
                if gain >= s.tau[c]:
                    enter(s, c, i + 1, v, gain)
        i += 1
    s.top[c] = i - 1
    for j in range(i, s.k + 2):
        clear(s, c, j)


@njit(**INNER)
def insert(s, c, v, gain):
    """Let v enter level by level; gain = f(v).

    Returns the level to be built again (0: none) and who is to be drawn there (-1: anyone).
    """
    i = 1
    while gain >= s.tau[c] and gain <= s.cap[c] and s.start[c, i] < s.k:
        enter(s, c, i, v, gain)
        if s.trials > 0:
            if s.size[c, i] >= 1.5 * s.built[c, i]:  # lazy: half as many again
                return i, -1
        elif s.rng.random() * s.size[c, i] < 1:  # v would have been drawn
            return i, v
        gain = query(s, c, i, v)
        i += 1
    return 0, -1


@njit(**INNER)
def delete(s, c, v):
    """Take v out of all levels.

    Returns the level whose S_i had it, to be built again (0: none); the sum of m_i / |R_i| over
    the levels with v; over all levels.
    """
    hit, chance, total = 0, 0.0, 0.0
    for i in range(1, s.top[c] + 1):
        S = s.picks[c, s.start[c, i] : s.start[c, i + 1]]
        total += len(S) / s.size[c, i]
        if s.pos[c, i, v] >= 0:
            chance += len(S) / s.size[c, i]
            leave(s, c, i, v)
            for u in S:
                if u == v:
                    hit = i
    return hit, chance, total


# All copies, over a stream.


@njit(**INNER)
def best_copy(s):
    best = 0
    for c in range(1, len(s.tau)):
        if s.value[c, s.top[c]] > s.value[best, s.top[best]]:
            best = c
    return best


@njit(**OUTER)
def _play(s, stream, value, queries, element, hit, chance, total):
    for t in range(len(stream)):
        before, op, gain = s.count[0], stream[t], 0.0
        if op == ADAPTIVE:
            op = -s.picks[best_copy(s), 0] - 1
        v = abs(op) - 1
        element[t], s.live[v] = v, op > 0
        if op > 0:
            gain = query(s, 0, 0, v)  # f(v), once for all copies
        for c in range(len(s.tau)):
            if op > 0:
                level, first = insert(s, c, v, gain)
            else:
                (level, chance[t, c], total[t, c]), first = delete(s, c, v), -1
                hit[t, c] = level > 0
            if level > 0:
                construct(s, c, level, first)
        best = best_copy(s)
        value[t], queries[t] = s.value[best, s.top[best]], s.count[0] - before


class Dynamic:
    """A k-subset kept near the best while elements of f are inserted and deleted.

    Parameters
    ----------
    f : Coverage or FacilityLocation
        On elements 0..n-1, none of them live at first. Its `queries` counts on.
    k : int
    eps : float
        Ratio of the guesses, and of the bands.
    guesses : sequence of float, optional
        OPT_g of every copy. Default: all powers of 1 + eps from the smallest positive f(e) to k
        times the largest (a copy that no element enters costs nothing).
    trials : int
        0: one element a level. Else the paper's batches, each size tested with so many samples.
    seed : int
    """

    def __init__(self, f, k, eps=0.2, guesses=None, trials=0, seed=0):
        if not 1 <= k <= f.n:
            raise ValueError(f"k = {k}: choose 1 to n = {f.n}")
        if not 0 < eps < 1:
            raise ValueError(f"eps = {eps}: must lie between 0 and 1, e.g. 0.2")
        if trials < 0:
            raise ValueError(f"trials = {trials}: must be 0 (single elements) or positive")
        rows = pack(f)
        if guesses is None:
            guesses = all_guesses(f, k, eps)
        guess = np.asarray(guesses, float)
        if guess.ndim != 1 or not len(guess) or not (guess > 0).all():
            raise ValueError(f"guesses of OPT must be a list of positive numbers, got {guesses}")
        C, n = len(guess), f.n
        per_level, per_element = (C, k + 2), (C, k + 2, n)
        self.f, self.guess, self.elements = f, guess, n
        self.levels = Levels(
            rows, guess / (2 * k), guess, np.zeros(per_element, np.int64),
            np.full(per_element, -1, np.int32), np.zeros(per_element),
            np.zeros(per_level, np.int64), np.zeros(per_level, np.int64),
            np.zeros((C, k), np.int64), np.zeros(per_level, np.int64), np.zeros(C, np.int64),
            np.zeros((C, k + 2, rows.ones.shape[1]), np.uint64),
            np.zeros((C, k + 2, rows.real.shape[1])), np.zeros(per_level), np.zeros(1, np.int64),
            np.zeros(n, np.bool_), np.random.default_rng([seed, 51]), k, eps, trials,
        )  # fmt: skip

    def play(self, stream):
        """Run a stream of updates; can be called again to go on.

        Parameters
        ----------
        stream : array_like of int, shape [U]
            +(v + 1) inserts element v, -(v + 1) deletes it, 0 (ADAPTIVE) deletes the first element
            of the current solution.

        Returns
        -------
        SimpleNamespace
            value [U] f of the solution after each update; queries [U]; element [U] the one
            inserted or deleted. Of deletions, for each copy: hit [U, C] whether it forced a
            rebuild; chance [U, C] the sum of |S_i| / |R_i| over the levels that held the element;
            total [U, C] the same over all levels.
        """
        stream = _checked(stream, self.levels.live)
        U, C = len(stream), len(self.guess)
        out = SimpleNamespace(
            value=np.zeros(U), queries=np.zeros(U, np.int64), element=np.zeros(U, np.int64),
            hit=np.zeros((U, C), np.bool_), chance=np.zeros((U, C)), total=np.zeros((U, C)),
        )  # fmt: skip
        _play(self.levels, stream, *vars(out).values())
        self.f.queries += int(out.queries.sum())
        return out

    def solution(self, copy=None):
        """Return G of a copy (default: of the best) as a list, in the order of its levels."""
        s = self.levels
        c = np.argmax(s.value[np.arange(len(s.top)), s.top]) if copy is None else copy
        return s.picks[c, : s.start[c, s.top[c] + 1]].tolist()

    def survivors(self, copy=0):
        """Return |R_1|, ..., |R_k| of a copy as an array [k]."""
        return self.levels.size[copy, 1 : self.levels.k + 1].copy()


def all_guesses(f, k, eps):
    """Return the powers of 1 + eps from just below the smallest positive f(e) to k max f(e)."""
    single = (f.rows * f.weights).sum(1)
    low, high = float(single[single > 0].min()), k * float(single.max())
    j = range(math.floor(math.log(low, 1 + eps)), math.ceil(math.log(high, 1 + eps)) + 1)
    return np.array([(1 + eps) ** i for i in j])


def _checked(stream, live):
    """The stream [U] as int64; each operation must be possible when its turn comes."""
    stream = np.asarray(stream)
    if stream.ndim != 1 or stream.dtype.kind != "i":
        raise ValueError("a stream is a list of whole numbers: +(v + 1), -(v + 1) or 0")
    if len(stream) and np.abs(stream).max() > len(live):
        raise ValueError(f"element {np.abs(stream).max() - 1}: f has 0 to {len(live) - 1}")
    if len(stream) and (stream != ADAPTIVE).all():
        turn = np.argsort(np.abs(stream), kind="stable")  # by element, then by time
        v, comes = np.abs(stream[turn]) - 1, stream[turn] > 0
        first = np.append(True, v[1:] != v[:-1])
        there = np.where(first, live[v], np.append(False, comes[:-1]))
        if (there == comes).any():
            t = turn[there == comes].min()
            does, state = ("inserts", "already") if stream[t] > 0 else ("deletes", "not")
            raise ValueError(
                f"update {t} {does} element {abs(stream[t]) - 1}, which is {state} there"
            )
    return stream.astype(np.int64)


# The rival.


@njit(**OUTER)
def _sieve(f, tau, cap, k, stream, value, queries, element, hit):
    C, n = len(tau), len(f.ones)
    order, known = np.empty(n, np.int64), 0  # live elements by arrival
    single = np.zeros(n)
    picks, size = np.zeros((C, k), np.int64), np.zeros(C, np.int64)
    ones, real = np.zeros((C + 1, f.ones.shape[1]), np.uint64), np.zeros((C + 1, f.real.shape[1]))
    total = np.zeros(C)  # ones[C], real[C]: of the empty set
    for t in range(len(stream)):
        v = abs(stream[t]) - 1
        element[t] = v
        if stream[t] > 0:
            single[v], order[known] = _gain(f, v, ones[C], real[C]), v
            queries[t] += 1
            known += 1
        else:
            kept = 0
            for u in order[:known]:
                if u != v:
                    order[kept] = u
                    kept += 1
            known = kept
        for c in range(C):
            begin = known - 1 if stream[t] > 0 else known
            if stream[t] < 0 and (picks[c, : size[c]] == v).any():
                hit[t, c], begin = True, 0  # one more pass over all that is live
                size[c], total[c] = 0, 0.0
                ones[c], real[c] = 0, 0
            for u in order[begin:known]:
                if size[c] == k:
                    break
                if tau[c] <= single[u] <= cap[c]:
                    queries[t] += size[c] > 0
                    gain = _gain(f, u, ones[c], real[c])
                    if gain >= tau[c]:
                        picks[c, size[c]] = u
                        size[c] += 1
                        total[c] += gain
                        _join(f, u, ones[c], real[c])
        value[t] = total.max()


class Sieve:
    """One pass with thresholds; when a chosen element is deleted, another pass in order of arrival.

    Keeps for each guess what gains at least tau = OPT_g / (2k) when it comes, up to k elements. The
    same guarantee as `Dynamic`, but who is chosen follows from the stream: an adversary knows it.

    Parameters
    ----------
    f, k, eps, guesses
        As of `Dynamic`.
    """

    def __init__(self, f, k, eps=0.2, guesses=None):
        self.f, self.k, self.rows = f, k, pack(f)
        self.guess = all_guesses(f, k, eps) if guesses is None else np.asarray(guesses, float)

    def play(self, stream):
        """Run a whole stream, from nothing; returns what `Dynamic.play` does up to hit."""
        stream = _checked(stream, np.zeros(self.f.n, np.bool_))
        if (stream == ADAPTIVE).any():
            raise ValueError("the sieve takes streams without ADAPTIVE (0) only")
        U = len(stream)
        out = SimpleNamespace(
            value=np.zeros(U), queries=np.zeros(U, np.int64), element=np.zeros(U, np.int64),
            hit=np.zeros((U, len(self.guess)), np.bool_),
        )  # fmt: skip
        _sieve(
            self.rows, self.guess / (2 * self.k), self.guess, self.k, stream, *vars(out).values()
        )
        self.f.queries += int(out.queries.sum())
        return out


# Streams.


def grow_and_shrink(n, seed):
    """Insert 0..n-1 in random order, then delete all in another random order: [2n]."""
    r = np.random.default_rng([seed, 52])
    return np.concatenate([r.permutation(n) + 1, -(r.permutation(n) + 1)])


def sliding_window(n, width, seed):
    """Insert 0..n-1 in random order; before each beyond the first `width`, delete the oldest."""
    order = np.random.default_rng([seed, 53]).permutation(n)
    late = np.stack([-(order[: n - width] + 1), order[width:] + 1], 1)
    return np.concatenate([order[:width] + 1, late.ravel()])


def churn(n, updates, rate, seed):
    """`updates` random ones: a deletion of a random live element with probability `rate`.

    When all n elements are live, or none is, the other kind of update takes place.
    """
    r = np.random.default_rng([seed, 54])
    live, dead, out = [], list(r.permutation(n)), []
    for u in r.random(updates):
        source, target = (live, dead) if (u < rate and live) or not dead else (dead, live)
        at = r.integers(len(source))
        source[at], source[-1] = source[-1], source[at]
        v = source.pop()
        target.append(v)
        out.append(v + 1 if target is live else -(v + 1))
    return np.array(out)
