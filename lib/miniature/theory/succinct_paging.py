r"""Paging with one predicted bit for each request.

Antoniadis, Boyar, Eliáš, Favrholdt, Hoeksma, Larsen, Polak and Simon, "Paging with Succinct
Predictions", ICML 2023, arXiv:2210.02775.

A cache holds k pages and starts empty; a request for a page outside is a fault and costs 1. OPT is
Belady's rule (evict the page whose next request is furthest away). The one idea: a predictor need
not say *when* a page returns. One bit with each request is enough, and a page carries the bit of
its latest request:

- a *discard* bit says whether OPT evicts the page before its next request (1: safe to discard);
- a *phase* bit says whether the page stays away for the next phase (1: it does). A phase is a
  maximal run of requests for k distinct pages.

With eta_0 zeros and eta_1 ones that are wrong (said 0 where 1 is right, and the reverse) and
H_k = 1 + 1/2 + ... + 1/k, costs are at most

    FollowBits         OPT + eta_1              if eta_0 = 0, else no bound
    FlushWhenAll0      OPT + (k - 1) eta_0 + eta_1
    Mark0              OPT + 2 H_k eta_0 + eta_1          in expectation
    Mark&Predict     2 OPT + H_k eta_0 + eta_1            in expectation

What makes a wrong 0 affordable: when all k cached pages carry 0, at least one 0 is wrong, and an
algorithm may forget them all (Flush) or fall back on marking (Mark0). `combine` runs any of them
beside Marker and follows the cheaper one (Blum and Burch 2000): robust, at a factor 1 + epsilon.
Rivals: LRU; Marker (Fiat et al. 1991); with predicted arrival times, BlindOracle and
PredictiveMarker (Lykouris and Vassilvitskii 2018).

CPU only, compiled by numba: each decision depends on the cache that the one before left, so that a
run is a chain of small dependent steps. Every algorithm is one function of the trace [T], k, and,
as far as it uses them, the predictions [T] and one uniform number [T] a request, drawn beforehand:
the same numbers give the same run, and settings are compared on common random numbers.
`faults` maps them over leading axes.
"""

import math
from collections import namedtuple

import numpy as np
from numba import njit

# slot [k] the page in each place, -1 where empty; since [k] when it came; where [pages] the place
# of a page, -1 outside; fault [T] whether a request cost something; until [T] when the page that it
# brought in was evicted, T if never.
Cache = namedtuple("Cache", "slot since where fault until")
# index [T] the phase of each request; bit [T] the right phase bits; counts [T] whether a bit is
# the one that counts (the page's last in its phase, and another phase follows); clean [phases] how
# many pages of a phase were not requested in the one before.
Phases = namedtuple("Phases", "index bit counts clean")


# The cache. It has k places: no algorithm can hold more, and none can skip a request.


@njit(cache=True)
def new_cache(trace, k):
    """An empty cache of k places for the pages of a trace."""
    T, slot, where = len(trace), np.full(k, -1), np.full(trace.max() + 1, -1)
    return Cache(slot, np.full(k, -1), where, np.zeros(T, np.bool_), np.full(T, T))


@njit(cache=True)
def full(c):
    return (c.slot >= 0).all()


@njit(cache=True)
def drop(c, t, i):
    """Evict the page in place i at time t."""
    c.until[c.since[i]] = t
    c.where[c.slot[i]] = -1
    c.slot[i] = -1


@njit(cache=True)
def load(c, t, page):
    """Serve a fault at time t: the page goes to an empty place."""
    c.fault[t] = True
    for i in range(len(c.slot)):
        if c.slot[i] < 0:
            c.slot[i], c.since[i], c.where[page] = page, t, i
            return
    raise RuntimeError("the cache is full: an algorithm must evict a page first")


@njit(cache=True)
def served(c, page):
    """Close a request: the page must be there."""
    if c.where[page] < 0:
        raise RuntimeError("an algorithm did not load the requested page")


@njit(cache=True)
def pick(good, u):
    """One of the places where `good` [k] holds, uniformly by u in [0, 1); -1 if there is none."""
    left = int(u * good.sum())
    for i in range(len(good)):
        if good[i]:
            if left == 0:
                return i
            left -= 1
    return -1


@njit(cache=True)
def first(c, good, key):
    """Of the places where `good` [k] holds, the one whose page has the smallest key [pages]."""
    best = -1
    for i in range(len(good)):
        if good[i] and (best < 0 or key[c.slot[i]] < key[c.slot[best]]):
            best = i
    return best


# Algorithms with discard bits. "Evict a 1-page" leaves open which: the deterministic ones take the
# first place that holds one, which says nothing about time; Mark0 a random one.


@njit(cache=True)
def follow_bits(trace, k, bit, flush=False):
    """FollowBits: evict a 1-page, else any page. With `flush`: else empty the whole cache."""
    c = new_cache(trace, k)
    discard = np.zeros(len(c.where), np.bool_)
    for t, page in enumerate(trace):
        if c.where[page] < 0:
            if full(c):
                ones = discard[c.slot]
                if ones.any():
                    drop(c, t, pick(ones, 0.0))
                else:  # one of these zeros is wrong, and nobody knows which
                    for i in range(k if flush else 1):
                        drop(c, t, i)
            load(c, t, page)
        discard[page] = bit[t]
        served(c, page)
    return c


@njit(cache=True)
def flush_when_all_0(trace, k, bit):
    """FlushWhenAll0: evict a 1-page; if all pages carry 0, empty the whole cache."""
    return follow_bits(trace, k, bit, True)


@njit(cache=True)
def mark0(trace, k, bit, u):
    """Mark0: evict a 1-page; if all pages carry 0, mark: evict a random unmarked page."""
    c = new_cache(trace, k)
    discard, marked = np.zeros(len(c.where), np.bool_), np.zeros(len(c.where), np.bool_)
    for t, page in enumerate(trace):
        if c.where[page] < 0:
            if full(c):
                ones = discard[c.slot]
                if ones.any():
                    drop(c, t, pick(ones, u[t]))
                else:
                    if marked[c.slot].all():
                        marked[c.slot] = False
                    drop(c, t, pick(~marked[c.slot], u[t]))
            load(c, t, page)
        discard[page], marked[page] = bit[t], True
        served(c, page)
    return c


@njit(cache=True)
def mark0_eager(trace, k, bit, u):
    """Mark0 that gives up a 1-page at once, so that the cache is ever full of zeros only.

    A phase begins on a fault when no unmarked page of `old`, the cache at its beginning, is left.
    A page of it that was evicted and returns pushes out a random unmarked one, full or not.
    """
    c = new_cache(trace, k)
    old, marked = np.zeros(len(c.where), np.bool_), np.zeros(len(c.where), np.bool_)
    for t, page in enumerate(trace):
        if c.where[page] < 0:
            stale = (c.slot >= 0) & old[c.slot] & ~marked[c.slot]
            if full(c) and not stale.any():
                old[:], marked[:] = False, False
                old[c.slot] = True
                stale[:] = True
            if full(c) or (old[page] and not marked[page] and stale.any()):
                drop(c, t, pick(stale, u[t]))
            load(c, t, page)
        marked[page] = True
        served(c, page)
        if bit[t]:
            drop(c, t, c.where[page])
    return c


# Algorithms that mark: with phase bits, without predictions, with arrival times.


@njit(cache=True)
def mark_and_predict(trace, k, bit, u):
    """Mark&Predict: evict a random unmarked 1-page; if there is none, a random unmarked page."""
    c = new_cache(trace, k)
    away, marked = np.zeros(len(c.where), np.bool_), np.zeros(len(c.where), np.bool_)
    for t, page in enumerate(trace):
        if c.where[page] < 0:
            if full(c):
                if marked[c.slot].all():
                    marked[c.slot] = False  # a new phase
                unmarked = ~marked[c.slot]
                ones = unmarked & away[c.slot]
                drop(c, t, pick(ones if ones.any() else unmarked, u[t]))
            load(c, t, page)
        away[page], marked[page] = bit[t], True
        served(c, page)
    return c


@njit(cache=True)
def marker(trace, k, u):
    """Marker: Mark&Predict whose bits say nothing."""
    return mark_and_predict(trace, k, np.zeros(len(trace), np.bool_), u)


@njit(cache=True)
def predictive_marker(trace, k, arrival, u):
    """PredictiveMarker: evict the unmarked page predicted last, at most H_k times along a chain.

    A clean page starts a chain of evictions; a page evicted in this phase that returns continues
    the chain of its own eviction; beyond H_k the victims are random.
    """
    c = new_cache(trace, k)
    soon, length = np.zeros(len(c.where)), np.zeros(len(c.where), np.int64)
    marked, longest = np.zeros(len(c.where), np.bool_), (1 / np.arange(1, k + 1)).sum()
    for t, page in enumerate(trace):
        if c.where[page] < 0:
            if full(c):
                if marked[c.slot].all():
                    marked[c.slot] = False
                    length[:] = 0
                link, unmarked = length[page] + 1, ~marked[c.slot]
                i = first(c, unmarked, soon) if link <= longest else pick(unmarked, u[t])
                length[c.slot[i]] = link
                drop(c, t, i)
            load(c, t, page)
        soon[page], marked[page] = -arrival[t], True
        served(c, page)
    return c


@njit(cache=True)
def blind_oracle(trace, k, arrival):
    """Evict the page with the furthest (predicted) arrival time. With the true ones: Belady."""
    c = new_cache(trace, k)
    soon = np.zeros(len(c.where))
    for t, page in enumerate(trace):
        if c.where[page] < 0:
            if full(c):
                drop(c, t, first(c, np.ones(k, np.bool_), soon))
            load(c, t, page)
        soon[page] = -arrival[t]
        served(c, page)
    return c


@njit(cache=True)
def lru(trace, k):
    """Evict the least recently used page: BlindOracle that takes the past for the future."""
    return blind_oracle(trace, k, -np.arange(len(trace)).astype(np.float64))


# Robustness.


@njit(cache=True)
def combine(trace, k, one, two, u, epsilon):
    """Follow one of two algorithms, at most (1 + epsilon) times as dear as either, and O(k).

    Blum and Burch: p holds the weights of the two, which a fault multiplies by 1 - delta; the
    algorithm that is followed is left with just the probability that keeps it distributed as p.
    A switch costs at most k faults, as pages are loaded only when they are requested:

        E cost <= (1 + delta k) ((1 + delta) min cost + ln 2 / delta),  delta = ln(1 + eps)/(k + 1)

    Parameters
    ----------
    trace : int [T]
    k : int
    one, two : Cache
        The two algorithms' own runs. Only what they did up to now is used.
    u : float [T]
        Uniform numbers that the two algorithms have not used.
    epsilon : float

    Returns
    -------
    Cache
    """
    if epsilon <= 0:
        raise ValueError("epsilon must be positive: it is the price of robustness")
    c, runs, p, on = new_cache(trace, k), (one, two), np.full(2, 0.5), int(2 * u[0])
    gone = np.zeros((2, len(c.where)), np.int64)  # when each algorithm evicts a page it has or had
    delta = math.log(1 + epsilon) / (k + 1)
    for t, page in enumerate(trace):
        before = p[on]
        for i in range(2):
            if runs[i].fault[t]:
                p[i] *= 1 - delta
                gone[i, page] = runs[i].until[t]
        p /= p.sum()
        if p[on] < before and u[t] >= p[on] / before:
            on = 1 - on
        if c.where[page] < 0:
            if full(c):  # one of its k pages is not among those of the algorithm that is followed
                drop(c, t, pick(gone[on][c.slot] <= t, 0.0))
            load(c, t, page)
        served(c, page)
    return c


# The truth that predictors are asked for.


@njit(cache=True)
def next_arrivals(trace):
    """Time of the next request for the same page [T]; T, a time never reached, if none follows."""
    out, seen = np.empty(len(trace)), np.full(trace.max() + 1, len(trace))
    for t in range(len(trace) - 1, -1, -1):
        out[t], seen[trace[t]] = seen[trace[t]], t
    return out


@njit(cache=True)
def discard_bits(trace, k):
    """OPT's faults, and the right discard bits [T].

    A bit is 1 if Belady evicts the page before its next request, or if no request follows.
    """
    arrival = next_arrivals(trace)
    c = blind_oracle(trace, k, arrival)
    bit = np.empty(len(trace), np.bool_)
    for t in range(len(trace)):
        after = int(arrival[t])
        bit[t] = after == len(trace) or c.fault[after]
    return c.fault.sum(), bit


@njit(cache=True)
def phases(trace, k):
    """The phases of a trace and the right phase bits: see `Phases`.

    The phases are those of every marking algorithm that starts with an empty cache.
    """
    T, n = len(trace), trace.max() + 1
    index, met = np.empty(T, np.int64), np.full(n, -1)
    phase = distinct = 0
    for t, page in enumerate(trace):
        if met[page] != phase:
            if distinct == k:
                phase, distinct = phase + 1, 0
            met[page], distinct = phase, distinct + 1
        index[t] = phase
    bit, counts = np.empty(T, np.bool_), np.zeros(T, np.bool_)
    clean, pages = np.zeros(phase + 1, np.int64), np.zeros(phase + 1, np.int64)
    nearest, later = np.full(n, -1), np.full(n, -1)  # phases to come that request a page
    for t in range(T - 1, -1, -1):
        page, now = trace[t], index[t]
        if nearest[page] != now:  # the page's last request in this phase
            later[page], nearest[page] = nearest[page], now
            counts[t] = now < phase
            pages[now] += 1
            if later[page] == now + 1:
                clean[now + 1] -= 1
        bit[t] = later[page] != now + 1
    return Phases(index, bit, counts, clean + pages)


# What a study of the algorithms needs.


def faults(algorithm, trace, k, *inputs):
    """Cost of an algorithm, for a whole stack of runs.

    Parameters
    ----------
    algorithm : function of this module
        Called as ``algorithm(trace, k, *inputs)``.
    trace : int array [..., T]
        Pages are numbered from 0.
    k : int
    *inputs : arrays [..., T]
        Its bits or arrival times and its uniform numbers; leading axes broadcast with the trace's.

    Returns
    -------
    numpy.ndarray of int [...]

    Raises
    ------
    ValueError
        If a page is not a number from 0, k is not positive, a bit is neither 0 nor 1, or the
        shapes do not fit.
    """
    trace = _checked(trace, k)
    for x in inputs:
        if np.asarray(x).dtype.kind in "iu" and not np.isin(x, (0, 1)).all():
            raise ValueError(f"bits must be 0 or 1, not {np.setdiff1d(x, (0, 1))[0]}")
        if np.shape(x)[-1:] != trace.shape[-1:]:
            raise ValueError(f"one value a request: {trace.shape[-1]}, not shape {np.shape(x)}")
    inputs = [np.asarray(x, float if np.asarray(x).dtype.kind == "f" else bool) for x in inputs]
    shape = np.broadcast_shapes(trace.shape, *(x.shape for x in inputs))
    trace, *inputs = (np.broadcast_to(x, shape) for x in (trace, *inputs))
    costs = np.empty(shape[:-1], np.int64)
    for i in np.ndindex(costs.shape):
        run = algorithm(np.array(trace[i]), k, *(np.array(x[i]) for x in inputs))
        costs[i] = run.fault.sum()
    return costs


def flip(right, u, p01, p10):
    """Predictions [..., T]: each right 0 said as 1 with probability p01, each 1 as 0 with p10.

    Parameters
    ----------
    right : bool array [..., T]
    u : float array [..., T]
        Uniform: the same numbers make errors at a higher rate contain those at a lower one.
    p01, p10 : float or array
        From 0 to 1, broadcast against `right`.
    """
    for name, p in (("p01", p01), ("p10", p10)):
        if not ((np.asarray(p) >= 0) & (np.asarray(p) <= 1)).all():
            raise ValueError(f"{name} is a probability, from 0 to 1, not {p}")
    return right ^ (u < np.where(right, p10, p01))


def wrong(said, right, counts=True):
    """Numbers (eta_0, eta_1) [...] of zeros and of ones that are wrong, where `counts` holds."""
    return ((~said & right & counts).sum(-1), (said & ~right & counts).sum(-1))


def harmonic(k):
    """H_k = 1 + 1/2 + ... + 1/k."""
    return sum(1 / i for i in range(1, k + 1))


# Traces, each int [T].


def zipf(T, pages, exponent, seed):
    """Independent requests, page i with probability proportional to 1 / (i + 1)^exponent."""
    p = np.arange(1, pages + 1.0) ** -exponent
    return np.random.default_rng(seed).choice(pages, T, p=p / p.sum())


def cycle(T, pages, seed):
    """One page after the other, from a random one on: with k + 1 pages, LRU always faults."""
    return (np.arange(T) + np.random.default_rng(seed).integers(pages)) % pages


def working_sets(T, size, drift, leak, pages, seed):
    """Uniform requests to a working set of `size` pages that drifts.

    With probability `drift` a request first replaces the set's oldest page by one from outside;
    with probability `leak` it goes to any page at all.
    """
    rng = np.random.default_rng(seed)
    # Replacements walk round a random order of the pages: a page returns after pages / drift.
    order, moved = rng.permutation(pages), np.cumsum(rng.random(T) < drift)
    inside = order[(moved + rng.integers(size, size=T)) % pages]
    return np.where(rng.random(T) < leak, rng.integers(pages, size=T), inside)


def words(text, T, seed):
    """T consecutive words of a text from a random place on, each word a page."""
    split = text.lower().split()
    if len(split) < T:
        raise ValueError(f"the text has {len(split)} words, fewer than T = {T}")
    start = np.random.default_rng(seed).integers(len(split) - T + 1)
    return np.unique(split[start : start + T], return_inverse=True)[1]


def _checked(trace, k):
    trace = np.asarray(trace)
    if trace.dtype.kind not in "iu" or trace.size == 0 or trace.min() < 0:
        raise ValueError(f"a trace holds page numbers from 0, not {trace.dtype} {trace!r:.60}")
    if k < 1:
        raise ValueError(f"a cache has k >= 1 places, not {k}")
    return trace.astype(np.int64)
