r"""The price of differential privacy under continual observation.

Jain, Raskhodnikova, Sivakumar and Smith, "The Price of Differential Privacy under Continual
Observation", ICML 2023, arXiv:2112.00828.

A stream x_1..x_T in {0,1}^d; after every step t the mechanism publishes, of the running counts
S_j(t) = sum_{s<=t} x_{s,j}, the largest (MaxSum) or its index (SumSelect). Streams are neighbors if
they differ in one record x_s; the whole sequence of answers must be rho-zCDP. The error is the
largest additive gap over t.

The one idea is a reduction that turns any such mechanism into one for all d marginals of a table
y [n, d]: feed the n rows; for j = 1..d feed n copies of e_j, after which j leads,

    max_k S_k = S_j(n) + j n,

so the answer gives S_j(n) away; then n copies of 1 - e_j, which level the field again. It takes
T = n + 2 n d steps. d private marginals cost an error of order sqrt(d / rho), so with
n ~ sqrt(d / rho) a continual maximum costs order T^(1/3), a continual *count* only polylog T.

Mechanisms, all of them private also if x_{t+1} is chosen after the answers up to t were seen (every
release is a Gaussian or exponential mechanism of the past, and these compose adaptively):

1. anew at every step: checkpoints with r = 1, error O(sqrt(T / rho));
2. checkpoints: a batch answer every r steps with rho r / T each, held in between. The error is at
   most r + O(sqrt(T / (r rho)) log), the least at r ~ (T / rho)^(1/3): order T^(1/3) / rho^(1/3);
3. the binary tree (Dwork, Naor, Pitassi and Rothblum 2010; Chan, Shi and Song 2010) for each of the
   d counts: N(0, d (log2 T + 1) / (2 rho)) on the sum of every dyadic interval, since a record
   touches log2 T + 1 of them, each in up to d coordinates; a prefix is a sum of at most log2 T of
   them (and of the root alone at t = T). The error is of order sqrt(d / rho) polylog T.

A rival to 3 is the square root of the matrix of prefix sums (Fichtenberger, Henzinger and
Upadhyay 2023).

Everything takes leading batch axes (seeds); a mechanism returns its answers and the `Account` of
what they cost.
"""

import math

import torch

from .privacy import Account, gaussian, noisy_max


def block(T, rho):
    """Return the block length r = (T / rho)^(1/3), rounded, between 1 and T."""
    return min(max(round((T / rho) ** (1 / 3)), 1), T)


def hold(answers, T, r):
    """Hold each answer until the next checkpoint.

    Parameters
    ----------
    answers : torch.Tensor, shape [..., T // r]
        Released after steps r, 2r, ...

    Returns
    -------
    torch.Tensor, shape [..., T]
        What stands published after steps 1..T; before the first checkpoint, zero.
    """
    last = torch.arange(1, T + 1, device=answers.device) // r
    return torch.cat([torch.zeros_like(answers[..., :1]), answers], -1)[..., last]


def checkpoint_max(top, r, rho, generator):
    """Publish the largest count by checkpoints: Gaussian noise with rho r / T at each.

    Parameters
    ----------
    top : torch.Tensor, shape [..., T]
        max_j S_j(t): a record moves it by at most 1.
    r : int
        Block length. r = 1 recomputes at every step; r = T is one batch release.
    rho : float
        What all answers together may spend.
    generator : torch.Generator
        On the device of `top`.

    Returns
    -------
    answers : torch.Tensor, shape [..., T]
    account : Account
    """
    T = top.shape[-1]
    each = rho / _blocks(T, r)
    released = gaussian(top[..., r - 1 :: r], 1.0, each, generator)
    return hold(released, T, r), Account().zcdp(each, T // r)


def checkpoint_select(S, r, rho, generator):
    """Publish the index of the largest count by checkpoints: report noisy max.

    Gumbel noise of scale 2 / epsilon_0 with epsilon_0 = sqrt(8 rho r / T).

    Parameters
    ----------
    S : torch.Tensor, shape [..., T, d]
        Running counts.
    r, rho, generator
        As in `checkpoint_max`.

    Returns
    -------
    answers : torch.Tensor of int64, shape [..., T]
        Before the first checkpoint, index 0.
    account : Account
    """
    T = S.shape[-2]
    epsilon = math.sqrt(8 * rho / _blocks(T, r))
    released = noisy_max(S[..., r - 1 :: r, :], 1.0, epsilon, generator)
    return hold(released, T, r), Account().exponential(epsilon, T // r)


def _blocks(T, r):
    if not 1 <= r <= T or r != int(r):
        raise ValueError(f"the block length r must be a whole number from 1 to T = {T}, not {r}")
    return T // r  # if r does not divide T, no checkpoint lies in the rest


def nodes(x):
    """Sum over every dyadic interval.

    Parameters
    ----------
    x : torch.Tensor, shape [..., T, d]
        T a power of two.

    Returns
    -------
    list of torch.Tensor, shapes [..., T / 2^k, d]
        Level k = 0..log2 T: a record lies in one interval of each, log2 T + 1 in all.
    """
    T = x.shape[-2]
    if T < 1 or T & (T - 1):
        raise ValueError(f"the tree needs T to be a power of two, not {T}: pad the stream with 0")
    levels = [x]
    while levels[-1].shape[-2] > 1:
        levels.append(levels[-1][..., 0::2, :] + levels[-1][..., 1::2, :])
    return levels


def prefixes(levels):
    """Add up, for every t, the intervals of the set bits of t: S(t) if `levels` are exact.

    From the root down: with P_k(m) the sum of the first m intervals of level k,
    P_k(2m) = P_{k+1}(m) and P_k(2m + 1) = P_{k+1}(m) + interval 2m of level k.

    Parameters
    ----------
    levels : list of torch.Tensor, shapes [..., T / 2^k, d]

    Returns
    -------
    torch.Tensor, shape [..., T, d]
    """
    P = levels[-1]
    for level in reversed(levels[:-1]):
        finer = torch.empty_like(level)
        finer[..., 1::2, :] = P
        finer[..., 0::2, :] = level[..., 0::2, :]
        finer[..., 2::2, :] += P[..., :-1, :]
        P = finer
    return P


def tree(x, rho, generator):
    """Publish all d running counts by the binary tree; a maximum or its index follows for free.

    Parameters
    ----------
    x : torch.Tensor, shape [..., T, d]
        The stream.
    rho, generator
        As in `checkpoint_max`.

    Returns
    -------
    counts : torch.Tensor, shape [..., T, d]
    account : Account
    """
    levels = nodes(x)
    each = rho / len(levels)  # a record is in one interval of every level, ...
    across = math.sqrt(x.shape[-1])  # ... where it moves up to d sums by 1
    noisy = [gaussian(level, across, each, generator) for level in levels]
    return prefixes(noisy), Account().zcdp(each, len(levels))


def root_coefficients(T):
    """Return f_k = binom(2k, k) / 4^k, k < T: (sum_k f_k z^k)^2 = sum_k z^k.

    The Toeplitz matrix F of f is the square root of that of prefix sums.
    """
    k = torch.arange(1, T, dtype=torch.float64)
    return torch.cat([torch.ones(1, dtype=torch.float64), ((2 * k - 1) / (2 * k)).cumprod(0)])


def factorization(x, rho, generator):
    """Publish all d running counts as F (F x + noise) = S + F noise, F the square root above.

    A record moves F x by a column of F in up to d coordinates: sensitivity sqrt(d) |f|.
    Arguments and results as for `tree`; T need not be a power of two.
    """
    T, d = x.shape[-2:]
    f = root_coefficients(T).to(x)
    noise = gaussian(torch.zeros_like(x), math.sqrt(d) * float(f.norm()), rho, generator)
    spectrum = torch.fft.rfft(f, 2 * T)[:, None]
    colored = torch.fft.irfft(torch.fft.rfft(noise, 2 * T, -2) * spectrum, 2 * T, -2)
    return x.cumsum(-2) + colored[..., :T, :], Account().zcdp(rho)


def reduction_stream(y, T):
    """Turn a table into the stream of the lower bound.

    Parameters
    ----------
    y : torch.Tensor, shape [..., n, d]
        The rows, of zeros and ones.
    T : int
        Length of the stream, at least n + 2 n d; the rest is filled with zeros.

    Returns
    -------
    torch.Tensor, shape [..., T, d]
    """
    n, d = _fits(y, T)
    e = torch.eye(d, dtype=y.dtype, device=y.device)
    phases = torch.stack([e, 1 - e], 1).repeat_interleave(n, 1).flatten(0, 1)  # [2 n d, d]
    x = y.new_zeros(*y.shape[:-2], T, d)
    x[..., :n, :] = y
    x[..., n : n + 2 * n * d, :] = phases
    return x


def reduction_max(y, T):
    """Return max_j S_j(t) of `reduction_stream` without its T d entries.

    With M = max_j S_j(n), before phase j = 0..d-1 all counts have grown by j n; during n copies of
    e_j the maximum is the larger of j n + M and j n + S_j(n) + i, during n copies of 1 - e_j that
    of (j + 1) n + S_j(n) and j n + M + i, i = 1..n.

    Returns
    -------
    torch.Tensor, shape [..., T]
    """
    n, d = _fits(y, T)
    running = y.cumsum(-2)
    S = running[..., -1, :, None]  # [..., d, 1]
    M = S.amax(-2, keepdim=True)
    j, i = (torch.arange(v, device=y.device, dtype=y.dtype) for v in (d, n))
    j, i = n * j[:, None], i + 1
    up = torch.maximum(j + M, j + S + i)
    level = torch.maximum(j + n + S, j + M + i)
    top = torch.cat([running.amax(-1), torch.cat([up, level], -1).flatten(-2)], -1)
    return torch.nn.functional.pad(top, (0, T - top.shape[-1]), value=0).cummax(-1).values


def _fits(y, T):
    n, d = y.shape[-2:]
    if not 1 <= n + 2 * n * d <= T:
        raise ValueError(f"{n} rows of {d} bits take {n + 2 * n * d} steps, not from 1 to T = {T}")
    return n, d


def marginals(answers, n, d):
    """Read the column sums of the table off the published maxima.

    Parameters
    ----------
    answers : torch.Tensor, shape [..., T]
        Published on `reduction_stream`.

    Returns
    -------
    torch.Tensor, shape [..., d]
        S_j(n) = max - j n right after the n copies of e_j, j = 1..d.
    """
    j = torch.arange(1, d + 1, device=answers.device)
    return answers[..., 2 * n * j - 1] - n * j  # after n + 2 n (j - 1) + n = 2 n j steps


def bursts(T, d, length):
    """Return a stream [T, d] whose counts surge in turn: `length` copies of e_0, of e_1, ..."""
    j = torch.arange(T) // length % d
    return torch.nn.functional.one_hot(j, d).float()


def checkpoint_bound(T, r, rho):
    """Return r + sigma sqrt(2 ln(T / r)), sigma^2 = T / (2 rho r): the error of checkpoints."""
    return r + math.sqrt(T / (2 * rho * r)) * math.sqrt(2 * math.log(max(T / r, 2)))


def tree_bound(T, d, rho):
    """Return sqrt(2 ln(d T)) sigma sqrt(log2 T), sigma^2 = d (log2 T + 1) / (2 rho): the tree's."""
    L = math.log2(T)
    return math.sqrt(d * (L + 1) * L / (2 * rho)) * math.sqrt(2 * math.log(d * T))


def crossing(T, rho):
    """Return the d at which `tree_bound` meets `checkpoint_bound` with r = (T / rho)^(1/3).

    Of order T^(2/3) rho^(1/3) up to logarithms; by bisection, since d stands inside one, too.
    """
    target = checkpoint_bound(T, (T / rho) ** (1 / 3), rho)
    lo, hi = 2 / T, float(T)
    for _ in range(100):
        mid = math.sqrt(lo * hi)
        lo, hi = (mid, hi) if tree_bound(T, mid, rho) < target else (lo, mid)
    return lo
