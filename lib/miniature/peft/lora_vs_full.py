r"""LoRA vs Full Fine-tuning: directions that the pretrained weight does not have.

Shuttleworth, Andreas, Torralba and Sharma, "LoRA vs Full Fine-tuning: An Illusion of Equivalence",
arXiv:2410.21228. Closed forms: Benaych-Georges and Nadakuditi, "The singular values and vectors of
low rank perturbations of large rectangular random matrices", J. Multivariate Anal. 2012.

Take the singular value decompositions of a weight before and after fine-tuning,

    W0 = X diag(s) V',    W = W0 + dW = Y diag(sigma) Z',    sigma_1 >= sigma_2 >= ...

An *intruder dimension* is an index j among the first k with

    max_i |<y_j, x_i>| < epsilon,    i over ALL pretrained vectors (k = 10, epsilon = 0.5):

a direction that matters in the tuned weight and resembles nothing in the pretrained one.

The one idea: two updates of equal accuracy can differ in kind. B A adds few directions of large
size, which come out as intruders; full fine-tuning changes many directions a little. That
intruders do something is tested by changing their size alone, I being the set of intruders:

    W + (lambda - 1) sum_{j in I} sigma_j y_j z_j'.

Why one large piece makes an intruder: for W = W0 + c u v' with a = X'u, b = V'v,

    y_1 = c sum_i (sigma_1 <v, z_1> a_i + s_i <u, y_1> b_i) / (sigma_1^2 - s_i^2) x_i,

spread over all x_i once sigma_1 stands clear of every s_i. For random W0 that happens at a
threshold (`outlier`).

The arms are `LoRA` (alpha = 2 r, alpha fixed, rsLoRA by ``stable=``) and `Full` of the engine.
`gradients` is the backward pass of LoRA in perceptrons without the gradients of whole weights,
which halves the time of a small step. The functions of weights take a batch of matrices
[..., m, n], one a seed, rank or layer.
"""

import math

import torch

from .engine import positive

SIDES = ("left", "right")


def similarity(W0, W, side="left"):
    """Return |Y' X|: cosines of the singular vectors of W (rows) and of W0 (columns).

    Parameters
    ----------
    W0, W : torch.Tensor, shape [..., m, n]
        Weights before and after fine-tuning.
    side : {"left", "right"}
        Which singular vectors.

    Returns
    -------
    torch.Tensor, shape [..., k, k], k = min(m, n)
        Ordered by singular value, the largest first.
    """
    if side not in SIDES:
        raise ValueError(f"side must be 'left' or 'right', not {side!r}")
    if W0.shape[-2:] != W.shape[-2:]:
        raise ValueError(f"W0 is {list(W0.shape[-2:])} and W {list(W.shape[-2:])}: not one weight")
    (X, _, Vh), (Y, _, Zh) = (torch.linalg.svd(M, full_matrices=False) for M in (W0, W))
    return (Y.mT @ X).abs() if side == "left" else (Zh @ Vh.mT).abs()


def intruders(similar, epsilon=0.5, top=10):
    """Return which of the singular vectors of W are intruders.

    Parameters
    ----------
    similar : torch.Tensor, shape [..., k, k]
        From `similarity`.
    epsilon : float
    top : int
        Only the first so many can be intruders.

    Returns
    -------
    torch.Tensor of bool, shape [..., k]
    """
    if not 0 <= epsilon <= 1:
        raise ValueError(f"epsilon is a cosine, from 0 to 1, not {epsilon}")
    if top < 1:
        raise ValueError(f"top must be a positive number of vectors, not {top}")
    found = similar.amax(-1) < epsilon
    found[..., top:] = False
    return found


def others(found):
    """Return as many of the first vectors that are not in `found`, a mask of the same shape."""
    rank = (~found).cumsum(-1)  # the place of a vector among those that are not found
    return ~found & (rank <= found.sum(-1, keepdim=True))


def rescale(W, chosen, factor):
    """Return W + (factor - 1) sum_j sigma_j y_j z_j' over the chosen j.

    Parameters
    ----------
    W : torch.Tensor, shape [..., m, n]
    chosen : torch.Tensor of bool, shape [..., k]
    factor : float
        The lambda of the paper: below 1 shrinks these directions, 1 changes nothing.
    """
    Y, sigma, Zh = torch.linalg.svd(W, full_matrices=False)
    return W + (Y * ((factor - 1) * sigma * chosen)[..., None, :]) @ Zh


def factors(W0, W, rank):
    """Return B [..., m, r] and A [..., r, n] with W0 + B A the closest to W, sizes shared equally.

    A rescaled weight differs from W0 by more than rank r; this makes an adapter of it again.
    """
    positive(rank=rank)
    U, S, Vh = torch.linalg.svd(W - W0, full_matrices=False)
    root = S[..., :rank].sqrt()
    return U[..., :rank] * root[..., None, :], root[..., None] * Vh[..., :rank, :]


def noise(W0, W, seeds):
    """Return W0 + G with G Gaussian and as large as W - W0 in the Frobenius norm: the null.

    Parameters
    ----------
    W0, W : torch.Tensor, shape [S, ..., m, n]
    seeds : sequence of int, length S
    """
    G = _normal(W.shape[1:], seeds).to(W)
    size = torch.linalg.matrix_norm(W - W0) / torch.linalg.matrix_norm(G)
    return W0 + size[..., None, None] * G


def spiked(m, n, seeds):
    """Return W0 [S, m, n] with entries N(0, 1/n), and u [S, m], v [S, n] random of norm one."""
    u, v = (
        torch.nn.functional.normalize(_normal((k,), seeds, 1 + i), dim=-1)
        for i, k in enumerate((m, n))
    )
    return _normal((m, n), seeds) / math.sqrt(n), u, v


def outlier(c, ratio=1.0):
    r"""Return what a spike does to a large random matrix: the limit of W0 + c u v', m = ratio n.

    Parameters
    ----------
    c : float or torch.Tensor
        Size of the spike; W0 [m, n] has entries of variance 1 / n.
    ratio : float
        m / n.

    Returns
    -------
    sigma : torch.Tensor
        The largest singular value: sqrt((1 + c^2)(ratio + c^2)) / c above the threshold
        c = ratio^(1/4), the edge 1 + sqrt(ratio) below it. Square: c + 1/c and 2.
    left, right : torch.Tensor
        Squared overlap of its left vector with u and of its right one with v; zero below.
        Square: both 1 - c^(-2).
    """
    c, b = torch.as_tensor(c, dtype=torch.float64), float(ratio)
    if b <= 0 or (c < 0).any():
        raise ValueError(f"needs c >= 0 and ratio > 0, got {c.tolist()} and {ratio}")
    above, q = c > b**0.25, c.clamp(min=b**0.25) ** 2
    sigma = ((1 + q) * (b + q) / q).sqrt()
    left = 1 - b * (1 + q) / (q * (q + b))
    right = 1 - (b + q) / (q * (q + 1))
    return sigma, left * above, right * above


def gradients(layers, factors, scale, x, y):
    """Return the gradients of LoRA's factors in ReLU perceptrons, every copy's own.

    With the error e = d loss / d z of a layer z = (W + s B A) h + b, summed over a batch,

        dB = s e (A h)',    dA = s (B' e) h':

    the gradient of each factor scales with the other one, and none is as large as W.

    Parameters
    ----------
    layers : dict of str to (torch.Tensor, torch.Tensor)
        Frozen weights [N, m, n] and biases [N, m], in order; all layers but the last are followed
        by a ReLU and adapted.
    factors : dict of str to (torch.Tensor, torch.Tensor)
        B [N, m, r] and A [N, r, n] of every layer but the last.
    scale : float
        s, which multiplies B A.
    x : torch.Tensor, shape [N, batch, n]
    y : torch.Tensor of int64, shape [N, batch]
        Classes. The loss is the mean cross-entropy of a copy's batch.

    Returns
    -------
    dict of str to (torch.Tensor, torch.Tensor)
        Gradients of B and A.
    """
    *hidden, last = layers
    if set(factors) != set(hidden):
        raise ValueError(f"factors of {list(factors)}, but the layers to adapt are {hidden}")
    h, inputs = x.mT, []  # samples last
    for k in hidden:
        (W, b), (B, A) = layers[k], factors[k]
        inputs.append((h, A @ h))
        h = torch.baddbmm(b[..., None], W, h).baddbmm_(B, inputs[-1][1], alpha=scale).relu_()
    W, b = layers[last]
    e, y = torch.baddbmm(b[..., None], W, h).softmax(1), y[:, None]
    e = e.scatter_add_(1, y, e.new_full((), -1.0).expand(y.shape)) / y.shape[-1]
    grads, above = {}, W.mT @ e
    for k in reversed(hidden):
        (W, _), (B, A), (inner, low) = layers[k], factors[k], inputs.pop()
        e = above.mul_(h > 0)
        back = scale * (B.mT @ e)
        grads[k] = scale * (e @ low.mT), back @ inner.mT
        if inputs:
            above, h = (W.mT @ e).baddbmm_(A.mT, back), inner
    return grads


def _normal(shape, seeds, purpose=0):
    """Standard normal numbers [S, *shape] on the CPU, in float64: equal seeds, equal rows."""
    rows = []
    for s in seeds:
        rng = torch.Generator().manual_seed(10 * s + purpose)
        rows.append(torch.randn(*shape, generator=rng, dtype=torch.float64))
    return torch.stack(rows)
