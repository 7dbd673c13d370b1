r"""Text-to-pattern Hamming distances: exact by heavy and light letters, approximate by hashing.

Chan, Jin, Vassilevska Williams and Xu, "Faster Algorithms for Text-to-Pattern Hamming Distances",
FOCS 2023, arXiv:2310.13174. For a text T of length n and a pattern P of length m the problem is

    D_i = |{j : T_{i+j} != P_j}| = m - sum_c ([T = c] * [P = c])_i,   i = 0 .. n - m,

a sum over letters c of correlations of indicators. A letter is handled in one of two ways:

- lists ("light"): visit the occ_T(c) occ_P(c) pairs of its positions;
- transforms ("heavy"): one correlation by FFT, the text cut into blocks of 2m, O(n log m).

Abrahamson (1987) calls c heavy if occ_P(c) > theta; theta = sqrt(m log m) gives
O(n sqrt(m log m)). The paper reaches O(n sqrt(m)), and O(n + n k / sqrt(m)) for distances up to
k; deterministically a factor (log m log log m)^(1/4) more. The one idea: letters of frequency
sqrt(m) 2^l have indicators so sparse that their correlations are small numbers, mean 4^l, and
small numbers share machine words. Here k neighboring positions x = kX + t become the digits of a
word, sum_t [T_x = c] 2^(bt); one FFT of length L / k multiplies the words and each product holds
2k - 1 digits of b bits. A digit that overflows carries, and every carry lowers the sum of all
digits, which has to be occ_T occ_P: a certificate without error, so that a wrong guess of b costs
a repetition and never a wrong answer (Las Vegas). The paper's construction (random primes, packed
FFT, recursion on sumsets) is asymptotic; this one has its tools at the size of a float64's word.

Rivals: `naive`, an FFT for each letter (``rule="fft"``), Abrahamson (``rule=theta``), Karloff
(1993) and Kopelowitz and Porat (SOSA 2018) for (1 + eps)-approximation, kangaroo jumps for
distances up to k. `three_sum` and `as_three_sum` are the two directions of the equivalence with a
counting 3SUM whose sums are restricted to a range.

Operations: one for each pair of a list, `fft_ops` for a transform, all arithmetic on words
else. Comparing and sorting letters is common to all and not counted.
"""

import math

import torch
from scipy.fft import next_fast_len
from torch.nn.functional import pad

from .counting import fft_ops

# Bits b of a digit when k digits share a word: (2k - 1) b <= 45, and the largest entry of a
# product, 2^((2k - 2) b) times a count, leaves bits of a float64 for the rounding of an FFT.
BITS = {1: 40, 2: 15, 3: 9, 4: 6, 5: 5}


def occurrences(text, pattern):
    """Relabel the letters 0 .. sigma - 1 and count them.

    Parameters
    ----------
    text, pattern : torch.Tensor of int, shapes [S, n] and [S, m], m <= n

    Returns
    -------
    text, pattern : torch.Tensor of int64, shapes [S, n] and [S, m]
    occ_T, occ_P : torch.Tensor of int64, shape [S, sigma]

    Raises
    ------
    ValueError
        If the shapes do not fit or the letters are not integers.
    """
    if text.ndim != 2 or pattern.ndim != 2 or len(text) != len(pattern):
        raise ValueError(
            f"text and pattern must have shapes [S, n] and [S, m], not {list(text.shape)} and "
            f"{list(pattern.shape)}"
        )
    n, m = text.shape[1], pattern.shape[1]
    if not 1 <= m <= n:
        raise ValueError(f"the pattern's length m = {m} must lie in 1..n = {n}")
    if text.is_floating_point() or pattern.is_floating_point():
        raise ValueError(f"letters must be integers, not {text.dtype} and {pattern.dtype}")
    codes = torch.cat([text, pattern], 1)
    low = codes.min()
    if int(codes.max()) - int(low) < codes.numel():  # a table is faster than sorting
        codes = codes.long() - low
        present = torch.bincount(codes.flatten()) > 0
        codes = (present.cumsum(0) - 1)[codes]
    else:
        codes = torch.unique(codes, return_inverse=True)[1]
    text, pattern = codes[:, :n], codes[:, n:]
    sigma = int(codes.max()) + 1
    zero = torch.zeros(len(text), sigma, dtype=torch.int64, device=text.device)
    occ_T = zero.scatter_add(1, text, torch.ones_like(text))
    occ_P = zero.scatter_add(1, pattern, torch.ones_like(pattern))
    return text, pattern, occ_T, occ_P


# Correlations


def blocks(n, m, k=1):
    """Words of a block, number of blocks, shifts that each answers: about m, from 2m positions."""
    count = max(1, round((n - m + 1) / m))
    words = math.ceil(m / k) + math.ceil((n - m + 1) / count / k)
    words = next_fast_len(words, real=True)
    return words, count, k * (words - math.ceil(m / k))


def correlation_ops(n, m, k=1):
    """Operations of `correlate` for one letter: nearly 10 n log2(2m) / k.

    The text and the product of each block are transformed, the pattern only once.
    """
    words, count, _ = blocks(n, m, k)
    ops = (2 * count + 1) * fft_ops(words, real=True) + 6 * count * (words // 2 + 1)
    if k > 1:  # pack; round; shift, mask and sum the digits; join the halves
        ops += count * words * (k + 1 + 3 * (2 * k - 1) + k - 1)
    return ops + n - m + 1  # added to the matches


def correlate(x, y, k=1):
    """Correlate, z_i = sum_j x_{i+j} y_j, by FFTs of blocks with k positions to a word.

    Parameters
    ----------
    x, y : torch.Tensor of float64, shapes [R, n] and [R, m]
        For k > 1 of zeros and ones. (float32 will do for signs and k = 1.)
    k : int
        Positions that share a word.

    Returns
    -------
    z : torch.Tensor of float64, shape [R, n - m + 1]
    exact : torch.Tensor of bool, shape [R]
        Whether no digit overflowed: then z is exact.
    """
    n, m, b = x.shape[1], y.shape[1], BITS[k]
    words, count, valid = blocks(n, m, k)
    head = k * math.ceil(m / k)  # outputs of a block that wrap around
    left = head - m + 1
    x = pad(x, (left, count * valid + head - n - left)).unfold(1, k * words, valid)
    y = pad(y.flip(1), (0, head - m))
    X, Y = x, y
    if k > 1:  # word X of a block: sum_t x_{kX+t} 2^(bt)
        digit = 2.0 ** (b * torch.arange(k, dtype=x.dtype, device=x.device))
        X, Y = x.unflatten(-1, (words, k)) @ digit, y.unflatten(-1, (-1, k)) @ digit
    W = torch.fft.rfft(X) * torch.fft.rfft(Y, n=words)[:, None]
    W = torch.fft.irfft(W, n=words)  # [R, blocks, words]
    if k == 1:
        return W[..., head:].flatten(1)[:, : n - m + 1], torch.ones_like(W[:, 0, 0], dtype=bool)
    whole = W.round()
    shifts = b * torch.arange(2 * k - 1, device=x.device)
    d = (whole.to(torch.int64)[..., None] >> shifts) & (2**b - 1)  # [R, blocks, words, 2k - 1]
    z = d[..., :k].clone()
    z[..., 1:, : k - 1] += d[..., :-1, k:]  # digit k + v of word J - 1 is position v of word J
    total = x.sum(-1) * y.sum(-1)[:, None]  # of all digits, if none has carried
    exact = (d.sum((-1, -2)) == total) & ((W - whole).abs().amax(-1) < 0.25)
    return z.flatten(2)[..., head:].flatten(1)[:, : n - m + 1].to(x.dtype), exact.all(1)


# Exact distances


def plan(occ_T, occ_P, n, m, rule):
    """Decide for each letter between its lists (0) and a correlation with k digits a word (k).

    Parameters
    ----------
    occ_T, occ_P : torch.Tensor, shape [S, sigma]
    n, m : int
    rule : str or float
        ``"lists"``; ``"fft"``: a correlation for each letter; a number: Abrahamson's theta;
        ``"best"``: whichever costs less on this instance, occ_T occ_P or a correlation;
        ``"packed"``: the same with k = 1 .. 5, as far as the digits should hold the counts.

    Returns
    -------
    torch.Tensor of int64, shape [S, sigma]
    """
    pairs = (occ_T * occ_P).double()
    if rule == "lists":
        return torch.zeros_like(occ_T)
    if rule == "fft":
        return (pairs > 0).long()
    if rule == "best":
        return (pairs > correlation_ops(n, m)).long()
    if rule == "packed":
        mean = pairs / n  # of the correlation: 4^l for a letter of frequency 2^l sqrt(m)
        k, least = torch.zeros_like(occ_T), pairs
        for digits, bits in BITS.items():
            cost = correlation_ops(n, m, digits)
            better = (mean + 6 * mean.sqrt() + 3 < 2**bits) & (cost < least)
            k, least = torch.where(better, digits, k), torch.where(better, cost, least)
        return k
    if isinstance(rule, str) or not rule >= 0:
        raise ValueError(
            f"rule must be 'lists', 'fft', 'best', 'packed' or a threshold >= 0, not {rule!r}"
        )
    return ((occ_P > rule) & (pairs > 0)).long()


def operations(occ_T, occ_P, n, m, rule):
    """Return the operations, shape [S], that `distances` takes if no digit overflows."""
    k = plan(occ_T, occ_P, n, m, rule)
    price = torch.tensor([0.0] + [correlation_ops(n, m, d) for d in BITS], dtype=torch.float64)
    return torch.where(k == 0, (occ_T * occ_P).double(), price.to(k.device)[k]).sum(1)


def by_lists(T, P, occ_P, light):
    """Count the matches of the light letters: for each text position, its pattern positions.

    Parameters
    ----------
    T, P : torch.Tensor of int64, shapes [S, n] and [S, m]
        Relabeled.
    occ_P, light : torch.Tensor, shape [S, sigma]

    Returns
    -------
    torch.Tensor of int64, shape [S, n - m + 1]
    """
    (S, n), m = T.shape, P.shape[1]
    where = P.argsort(dim=1).flatten()  # positions in P, grouped by letter
    first = occ_P.cumsum(1) - occ_P + m * torch.arange(S, device=T.device)[:, None]
    times = torch.where(light, occ_P, 0).gather(1, T).flatten()
    times, order = times.sort(descending=True)
    width = n + m - 1  # shifts i = -(m - 1) .. n - 1, of which the middle is kept
    origin = (order // n) * width + order % n + m - 1
    first = first.gather(1, T).flatten()[order]
    matches = torch.zeros(S * width, dtype=torch.int64, device=T.device)
    one = torch.ones_like(origin)
    active = len(times) - torch.searchsorted(times.flip(0), torch.arange(m, device=T.device) + 1)
    for r, a in enumerate(active.tolist()):  # the r-th occurrence in P of each text letter
        if a == 0:
            break
        j = where.index_select(0, first[:a] + r)  # eight times as fast as where[...]
        matches.scatter_add_(0, origin[:a] - j, one[:a])
    return matches.view(S, width)[:, m - 1 : n]


def by_correlation(T, P, k, digits, ops=None, chunk=2**22):
    """Add up the correlations of all letters that are planned with `digits` digits a word.

    Parameters
    ----------
    T, P : torch.Tensor of int64, shapes [S, n] and [S, m]
    k : torch.Tensor, shape [S, sigma]
        The plan.
    digits : int
    ops : collections.Counter, optional
    chunk : int
        Text positions in memory at a time.

    Returns
    -------
    torch.Tensor of int64, shape [S, n - m + 1]
    """
    (S, n), m = T.shape, P.shape[1]
    out = torch.zeros(S, n - m + 1, dtype=torch.float64, device=T.device)
    for rows in (k == digits).nonzero().split(max(1, chunk // n)):
        (s, c), d = rows.T, digits
        while len(s):
            x, y = (T[s] == c[:, None]).double(), (P[s] == c[:, None]).double()
            z, exact = correlate(x, y, d)
            if ops is not None:
                ops[f"{d} a word"] += len(s) * correlation_ops(n, m, d)
            out.index_add_(0, s[exact], z[exact])
            s, c, d = s[~exact], c[~exact], d - 1  # fewer, wider digits; with one, all is exact
    return out.round().long()


def distances(text, pattern, rule="best", ops=None):
    """Compute all Hamming distances exactly.

    Parameters
    ----------
    text, pattern : torch.Tensor of int, shapes [S, n] and [S, m]
        S instances, a text and a pattern each.
    rule : str or float
        See `plan`.
    ops : collections.Counter, optional
        Counts operations under "lists" and "k a word".

    Returns
    -------
    torch.Tensor of int64, shape [S, n - m + 1]
    """
    T, P, occ_T, occ_P = occurrences(text, pattern)
    n, m = T.shape[1], P.shape[1]
    k = plan(occ_T, occ_P, n, m, rule)
    matches = by_lists(T, P, occ_P, k == 0)
    if ops is not None:
        ops["lists"] += int((occ_T * occ_P)[k == 0].sum())
    for digits in k[k > 0].unique().tolist():
        matches = matches + by_correlation(T, P, k, digits, ops)
    return m - matches


def naive(text, pattern):
    """Compute all distances from the definition, n m comparisons: shape [S, n - m + 1]."""
    n, m = text.shape[1], pattern.shape[1]
    D = torch.zeros(len(text), n - m + 1, dtype=torch.int64, device=text.device)
    for j in range(m):
        D += text[:, j : j + n - m + 1] != pattern[:, j, None]
    return D


def bounded(text, pattern, k):
    """Compute min(D_i, k + 1) by kangaroo jumps: k + 1 longest common extensions a shift.

    Substrings of length 2^t get ranks by doubling, so that equal ranks mean equal substrings; an
    extension is then found by a binary descent over t.

    Parameters
    ----------
    text, pattern : torch.Tensor of int, shapes [S, n] and [S, m]
    k : int

    Returns
    -------
    torch.Tensor of int64, shape [S, n - m + 1]
    """
    T, P, _, _ = occurrences(text, pattern)
    (S, n), m = T.shape, P.shape[1]
    rank, t = [torch.cat([T, P], 1)], 0
    while 2 ** (t + 1) <= m:  # past its end a string has rank -1, which a jump never compares
        shifted = pad(rank[t][:, 2**t :], (0, 2**t), value=-1)
        pair = rank[t] * (rank[t].max() + 2) + shifted + 1
        rank.append(torch.unique(pair, return_inverse=True)[1])
        t += 1
    i = torch.arange(n - m + 1, device=T.device).expand(S, -1)
    j = torch.zeros_like(i)  # P[:j] is dealt with
    D = torch.zeros_like(i)
    for _ in range(k + 1):
        for t in reversed(range(len(rank))):
            fits = j + 2**t <= m
            a = rank[t].gather(1, torch.where(fits, i + j, 0))
            b = rank[t].gather(1, torch.where(fits, n + j, 0))
            j = j + torch.where(fits & (a == b), 2**t, 0)
        D += j < m
        j = (j + 1).clamp(max=m)  # jump over the mismatch
    return D


# Approximate distances


def kopelowitz_porat(text, pattern, eps, reps, generator, rule="fft"):
    """Estimate from below: the largest distance of strings hashed to ceil(2 / eps) letters.

    Parameters
    ----------
    text, pattern : torch.Tensor of int, shapes [S, n] and [S, m]
    eps : float
        A mismatch gets lost with probability at most eps / 2 in each repetition.
    reps : int
    generator : torch.Generator
        On the CPU.
    rule : str or float
        How the distances of the hashed strings are computed; the estimate is the same.

    Returns
    -------
    torch.Tensor of int64, shape [reps, S, n - m + 1]
        The estimate after 1, 2, ..., reps repetitions.
    """
    if not 0 < eps <= 1:
        raise ValueError(f"eps must lie in (0, 1], not {eps}")
    T, P, occ_T, _ = occurrences(text, pattern)
    S, sigma = occ_T.shape
    h = torch.randint(math.ceil(2 / eps), (S, reps, sigma), generator=generator).to(T.device)
    hashed_T, hashed_P = (h.gather(2, v[:, None].expand(-1, reps, -1)) for v in (T, P))
    D = distances(hashed_T.flatten(0, 1), hashed_P.flatten(0, 1), rule)
    return D.view(S, reps, -1).transpose(0, 1).cummax(0).values


def karloff(text, pattern, reps, generator, dtype=torch.float64):
    """Estimate by random maps of the letters to {0, 1}, which keep half of the mismatches.

    Parameters
    ----------
    text, pattern : torch.Tensor of int, shapes [S, n] and [S, m]
    reps : int
    generator : torch.Generator
        On the CPU.
    dtype : torch.dtype
        Of the transforms; their results are whole numbers, which float32 gets right up to
        m of about 10^5.

    Returns
    -------
    torch.Tensor of float64, shape [reps, S, n - m + 1]
        Twice the mean number of mismatches after 1, 2, ..., reps repetitions; one repetition
        takes one correlation, as with signs (m - sum sigma(T) sigma(P)) / 2 letters differ.
    """
    T, P, occ_T, _ = occurrences(text, pattern)
    S, sigma = occ_T.shape
    sign = 2 * torch.randint(2, (S, reps, sigma), generator=generator).to(T.device, dtype) - 1
    x, y = (sign.gather(2, v[:, None].expand(-1, reps, -1)) for v in (T, P))
    z, _ = correlate(x.flatten(0, 1), y.flatten(0, 1))
    half = (P.shape[1] - z.round().double().view(S, reps, -1).transpose(0, 1)) / 2
    count = torch.arange(1, reps + 1, dtype=torch.float64, device=T.device)
    return 2 * half.cumsum(0) / count[:, None, None]


# The equivalence with 3SUM


def layers(values, R):
    """Split integers so that no two of a layer share their low part: a list of [h, l] tensors."""
    h, l = torch.div(values, R, rounding_mode="floor"), values % R
    l, order = l.sort(stable=True)
    first = torch.searchsorted(l, l)  # the first with the same low part
    nth = torch.arange(len(l), device=l.device) - first
    return [(h[order][nth == r], l[nth == r]) for r in range(int(nth.max()) + 1)]


def three_sum(A, B, R, rule="best"):
    """Count the pairs a - b = c for each c in 0 .. R - 1, through Hamming distances.

    With a = h R + l and b = h' R + l' that means h = h' and l - l' = c, or h = h' + 1 and
    l - l' + R = c. So the high part becomes the letter and the low part the position: the pattern
    has h' at l', the text h at l and h - 1 at l + R, and unlike blanks elsewhere. Integers that
    share their low part go to different texts (or patterns).

    Parameters
    ----------
    A, B : torch.Tensor of int64, shapes [N] and [N']
        Negate B for sums.
    R : int
        The range of the sums.
    rule : str or float

    Returns
    -------
    torch.Tensor of int64, shape [R]
    """
    if R < 1 or len(A) < 1 or len(B) < 1:
        raise ValueError(f"needs R >= 1 and integers, got R = {R}, |A| = {len(A)}, |B| = {len(B)}")
    low = min(int(A.min()), int(B.min())) // R - 1  # letters from 2 on: 0 and 1 are the blanks
    texts, patterns = [], []
    for h, l in layers(A, R):
        text = torch.zeros(2 * R, dtype=torch.int64, device=A.device)
        text[l], text[l + R] = h - low + 2, h - 1 - low + 2
        texts.append(text[:-1])
    for h, l in layers(B, R):
        pattern = torch.ones(R, dtype=torch.int64, device=A.device)
        pattern[l] = h - low + 2
        patterns.append(pattern)
    text = torch.stack(texts).repeat_interleave(len(patterns), 0)
    pattern = torch.stack(patterns).repeat(len(texts), 1)
    return (R - distances(text, pattern, rule)).sum(0)


def as_three_sum(text, pattern):
    """Turn one instance, shapes [n] and [m], into integers A, B and a range.

    The matches at shift i are the pairs a - b = i of A = T_k M + k and B = P_j M + j, M = n + m,
    for i = 0 .. n - m; a difference of letters puts a - b out of that range.
    """
    n, m = len(text), len(pattern)
    M = n + m
    k, j = (torch.arange(v, device=text.device) for v in (n, m))
    return text * M + k, pattern * M + j, n - m + 1
