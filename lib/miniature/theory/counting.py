"""Operation counts: what complexity claims are judged by, since a clock is noisy.

Counts are kept in a `collections.Counter`, one entry for each kind of work, so that an algorithm
says what it spends where: ``ops["fft"] += fft_ops(n)``. An addition counts as one, a multiplication
as one; so does a comparison or a table look-up where an algorithm consists of little else.
"""

import math

import numpy as np


def fft_ops(length, real=False):
    """Operations of one FFT of the given length: 5 L log2 L, half of that for real input."""
    return (2.5 if real else 5.0) * length * math.log2(max(length, 2))


def wht_ops(length):
    """Additions of one fast Walsh-Hadamard transform of the given length: L log2 L."""
    return length * math.log2(max(length, 2))


def qr_ops(rows, columns):
    """Operations of a Householder QR of a matrix [rows, columns], without forming Q."""
    return 2 * columns**2 * (rows - columns / 3)


def solve_ops(n):
    """Operations of one Cholesky factorization and solve of an n x n system."""
    return n**3 / 3 + 2 * n**2


class Counted:
    """An oracle that counts how often it is asked.

    Parameters
    ----------
    f : callable
        Answers one query, or many at once along the first axis of its first argument.

    Attributes
    ----------
    queries : int
        Answers given so far: the length of the result, 1 for a scalar.
    """

    def __init__(self, f):
        self.f, self.queries = f, 0

    def __call__(self, *args):
        out = self.f(*args)
        self.queries += int(np.shape(out)[0]) if np.ndim(out) else 1
        return out
