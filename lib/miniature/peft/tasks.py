"""Fine-tuning problems that mean something in ten seconds.

- `Regression`: a linear map with a planted change of known spectrum. How well any update of rank r
  can do is known in closed form.
- `digits`: a trained classifier of digits, moved to turned, inverted, shuffled, relabeled or paired
  ones.
- `text`: a trained character model of Moby-Dick, moved to the State of the Union addresses.

Each gives the loss on what it is tuned to (the target) and on what it came from (the source), whose
rise is forgetting.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from .. import data, models
from ..stack import cross_entropy

SPECTRA = ("low", "power", "gaussian", "flat")


class Regression:
    """y = (W0 + D*) x + noise: one problem a seed, with a planted change D* of known spectrum.

    Parameters
    ----------
    seeds : sequence of int
        S of them.
    m, n : int
        Outputs and inputs.
    spectrum : {"low", "power", "gaussian", "flat"} or sequence of float
        Singular values of D*: `rank` equal ones; i^(-1); those of a Gaussian matrix; all equal; or
        as given. Scaled so that the Frobenius norm of D* is 1; W0 has independent entries of
        variance 1 / n.
    rank : int
        For "low".
    noise : float
        Standard deviation of the noise of each output.
    covariance : sequence of float, optional
        Variances of the inputs along random orthogonal directions, n of them. Default: white.
    dtype, device
        Of all tensors.

    Attributes
    ----------
    W0, shift : torch.Tensor, shape [S, m, n]
    root : torch.Tensor, shape [S, n, n]
        Square root of the inputs' covariance matrix, symmetric.
    """

    def __init__(
        self,
        seeds,
        m,
        n,
        spectrum="low",
        rank=4,
        noise=0.0,
        covariance=None,
        dtype=torch.float32,
        device="cpu",
    ):
        k = min(m, n)
        if isinstance(spectrum, str) and spectrum not in SPECTRA:
            raise ValueError(f"spectrum must be one of {', '.join(SPECTRA)}, not {spectrum!r}")
        if not 1 <= rank <= k:
            raise ValueError(f"rank must lie in 1..{k}, not {rank}")
        if covariance is not None and len(covariance) != n:
            raise ValueError(f"covariance needs {n} variances, got {len(covariance)}")
        self.seeds, self.m, self.n, self.noise = list(seeds), m, n, noise
        problems = []
        for seed in seeds:
            g = np.random.default_rng(seed)
            W0 = g.normal(size=(m, n)) / math.sqrt(n)
            U, S, Vt = np.linalg.svd(g.normal(size=(m, n)), full_matrices=False)
            if spectrum == "low":
                S = (np.arange(k) < rank).astype(float)
            elif spectrum == "power":
                S = 1.0 / np.arange(1, k + 1)
            elif spectrum == "flat":
                S = np.ones(k)
            elif spectrum != "gaussian":
                S = np.pad(np.asarray(spectrum, float), (0, k - len(spectrum)))
            shift = (U * (S / np.linalg.norm(S))) @ Vt
            axes = np.linalg.qr(g.normal(size=(n, n)))[0]
            deviations = np.ones(n) if covariance is None else np.sqrt(covariance)
            problems.append((W0, shift, (axes * deviations) @ axes.T))
        self.W0, self.shift, self.root = (
            torch.from_numpy(np.stack(v)).to(device, dtype) for v in zip(*problems)
        )

    def model(self, i):
        """Return problem i's base, to be adapted: one linear layer without a bias."""
        layer = nn.Linear(self.n, self.m, bias=False)
        layer.weight = nn.Parameter(self.W0[i].clone())
        return nn.Sequential(layer)

    def batches(self, size, steps, purpose=0):
        """Yield `steps` batches of fresh inputs [S, size, n] and outputs [S, size, m].

        Equal seeds see equal batches; another `purpose` (an int) gives other ones.
        """
        streams = [np.random.default_rng([s, 1, purpose]) for s in self.seeds]
        for _ in range(steps):
            z, e = (
                torch.from_numpy(np.stack([g.normal(size=(size, w)) for g in streams])).to(self.W0)
                for w in (self.n, self.m)
            )
            x = z @ self.root
            yield x, x @ (self.W0 + self.shift).mT + self.noise * e

    def loss(self, model, x, y):
        """Return the squared error of one copy, summed over the outputs."""
        return ((model(x) - y) ** 2).sum(-1).mean()

    def excess(self, W):
        """Return the excess risk of weights W [S, m, n]: the norm of (W - W*) root, squared."""
        return ((W - self.W0 - self.shift) @ self.root).square().sum((1, 2))

    def floor(self, rank):
        """Return the least excess risk of any update of this rank, [S] (Eckart and Young)."""
        return torch.linalg.svdvals(self.shift @ self.root)[:, rank:].square().sum(1)


@dataclass
class Images:
    """A classifier and where it moves: images [B, ...] of the source and of the target."""

    model: nn.Module
    source: data.Split
    target: data.Split


CLASSIFIERS = {"mlp": "mlp_digits", "vit": "vit_digits", "cnn": "cnn_mnist"}


def digits(shift, kind="mlp", seed=0):
    """Return a trained classifier of digits, and data that differ from what it knows.

    Parameters
    ----------
    shift : str or float
        "inverted" (1 - x); "shuffled" (one permutation of the pixels); "relabeled" (one permutation
        of the labels); "paired" (two digits side by side, each half as wide; the label is the
        larger one); or a number: turned counterclockwise by so many degrees.
    kind : {"mlp", "vit", "cnn"}
        Two classifiers of 8x8 digits, and one of MNIST at 14x14 pixels.
    seed : int
        Of the permutation or of the pairs.

    Returns
    -------
    Images
        With a fresh copy of the model, on the CPU.
    """
    if kind not in CLASSIFIERS:
        raise ValueError(f"kind must be one of {', '.join(CLASSIFIERS)}, not {kind!r}")
    source = data.mnist10k(pool=2, flat=False) if kind == "cnn" else data.digits(flat=kind == "mlp")
    g, new = np.random.default_rng(seed), []
    pixels = torch.from_numpy(g.permutation(source.x_train[0].numel()))
    names = torch.from_numpy(g.permutation(10))
    for x, y in ((source.x_train, source.y_train), (source.x_test, source.y_test)):
        if shift == "inverted":
            new += [1 - x, y]
        elif shift == "shuffled":
            new += [x.flatten(1)[:, pixels].view_as(x), y]
        elif shift == "relabeled":
            new += [x, names[y]]
        elif shift == "paired":
            other = torch.from_numpy(g.permutation(len(x)))
            narrow = _images(x).unflatten(-1, (-1, 2)).mean(-1)
            new += [torch.cat([narrow, narrow[other]], -1).view_as(x), y.maximum(y[other])]
        elif isinstance(shift, (int, float)):
            new += [_turn(x, shift), y]
        else:
            raise ValueError(
                "shift must be 'inverted', 'shuffled', 'relabeled', 'paired' or degrees to turn "
                f"by, not {shift!r}"
            )
    return Images(models.load(CLASSIFIERS[kind]), source, data.Split(*new))


def _images(x):
    """Square images of one channel, [B, 1, side, side]."""
    side = math.isqrt(x[0].numel())
    return x.view(len(x), 1, side, side)


def _turn(x, degrees):
    """Turn images counterclockwise about their middle, by bilinear interpolation."""
    a = math.radians(degrees)
    matrix = x.new_tensor([[math.cos(a), -math.sin(a), 0.0], [math.sin(a), math.cos(a), 0.0]])
    images = _images(x)
    grid = nn.functional.affine_grid(
        matrix.expand(len(x), 2, 3), list(images.shape), align_corners=False
    )
    return nn.functional.grid_sample(images, grid, align_corners=False).view_as(x)


@dataclass
class Text:
    """A character model and texts as ids: of what it was trained on, and of what it moves to.

    Attributes
    ----------
    model : nn.Module
    source : torch.Tensor, shape [B, T + 1]
        Windows of the held-out end of Moby-Dick.
    train, test : torch.Tensor
        Ids of the new text, one long row [L] to draw windows from, and held-out windows
        [B, T + 1].
    """

    model: nn.Module
    source: torch.Tensor
    train: torch.Tensor
    test: torch.Tensor

    def batches(self, seeds, size, steps):
        """Yield batches (ids,) [S, size, T + 1] of windows of the new text."""
        width = self.test.shape[1]
        streams = [np.random.default_rng([s, 2]) for s in seeds]
        for _ in range(steps):
            first = np.stack([g.integers(len(self.train) - width, size=size) for g in streams])
            yield (self.train[torch.from_numpy(first)[..., None] + torch.arange(width)],)


def text(name="gpt_moby_small", since=1990, windows=32):
    """Return a character model of Moby-Dick and the State of the Union addresses since a year.

    Parameters
    ----------
    name : str
        A checkpoint of a `GPT`.
    since : int
        First year of the addresses. The last tenth of their text is held out.
    windows : int
        Held-out windows of either text.
    """
    record = models.meta(name)
    vocab, width = data.CharVocab(record["vocabulary"]), record["arguments"]["context"]
    addresses = [r["text"] for r in data.state_of_the_union() if r["year"] >= since]
    if not addresses:
        raise ValueError(f"there is no address since {since}: the last is of 2021")

    def encode(string):  # what the vocabulary lacks, a few accents and brackets, is left out
        return vocab.encode("".join(c for c in string if c in vocab.symbols))

    def held(ids):
        return ids[: windows * width + 1].unfold(0, width + 1, width)

    moby = data.moby_dick()
    new = encode("\n".join(addresses))
    cut = int(0.9 * len(new))
    return Text(
        models.load(name), held(encode(moby[int(0.9 * len(moby)) :])), new[:cut], held(new[cut:])
    )


def next_character(model, ids):
    """Return the loss of one copy, in nats a character, on windows ids [B, T + 1]."""
    return cross_entropy(model(ids[:, :-1]), ids[:, 1:])
