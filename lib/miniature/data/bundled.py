"""The data sets that come with the checkout, listed in ``data/manifest.json``."""

import functools
import gzip
import hashlib
import json
import re
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from ..papers import root


class DataError(RuntimeError):
    """A data file is missing, damaged, or not what it should be."""


class Split(NamedTuple):
    """A data set cut into a training and a test part; unpacks in this order.

    Attributes
    ----------
    x_train, x_test : torch.Tensor
        Inputs, one sample a row; float32.
    y_train, y_test : torch.Tensor
        Labels, int64, one a row of the inputs.
    """

    x_train: torch.Tensor
    y_train: torch.Tensor
    x_test: torch.Tensor
    y_test: torch.Tensor

    def to(self, device=None, dtype=None):
        """Move everything to `device`; the inputs, never the labels, become `dtype`."""
        return Split(
            self.x_train.to(device=device, dtype=dtype),
            self.y_train.to(device=device),
            self.x_test.to(device=device, dtype=dtype),
            self.y_test.to(device=device),
        )


def manifest():
    """Return the bundled data sets: {name: file, source, licence, sha256, bytes, what, split}."""
    path = root() / "data" / "manifest.json"
    return {e["name"]: e for e in json.loads(path.read_text(encoding="utf-8"))}


def digits(flat=True):
    """Handwritten digits, 8x8 pixels: 1437 for training, 360 for testing, stratified by class.

    The data of scikit-learn's ``load_digits``; bundled because importing that takes a second.

    Parameters
    ----------
    flat : bool
        Images as rows of 64 pixels; else shaped [1, 8, 8].

    Returns
    -------
    Split
        Pixels lie in [0, 1].
    """
    x, y = _images("digits", 16)
    return _split(x, y, 1437, flat)


def mnist10k(pool=1, flat=True):
    """The bundled 10,000 MNIST digits: the first 8,000 for training, the last 2,000 for testing.

    Parameters
    ----------
    pool : {1, 2, 4}
        Side of the squares of pixels averaged into one: images of 28, 14 or 7 pixels a side.
    flat : bool
        Images as rows of pixels; else shaped [1, side, side].

    Returns
    -------
    Split
        Pixels lie in [0, 1].
    """
    if pool not in (1, 2, 4):
        raise ValueError(f"pool={pool!r}: use 1, 2 or 4 (images of 28, 14 or 7 pixels a side)")
    x, y = _images("mnist10k", 255)
    return _split(torch.nn.functional.avg_pool2d(x, pool), y, 8000, flat)


def _images(name, white):
    """Images [n, 1, side, side] scaled to [0, 1], and labels [n], of a bundled npz file."""
    with np.load(_verified(name)) as file:
        x = torch.from_numpy(file["images"]).to(torch.float32).div_(white)
        return x.unsqueeze(1), torch.from_numpy(file["labels"]).to(torch.int64)


def _split(x, y, n_train, flat):
    x = x.flatten(1) if flat else x
    return Split(x[:n_train], y[:n_train], x[n_train:], y[n_train:])


def moby_dick():
    """Return the 135 chapters of Moby-Dick as one string of 1.2 million characters."""
    return _verified("moby_dick").read_text(encoding="utf-8")


def state_of_the_union():
    """Return the 233 addresses from 1790 to 2021, oldest first.

    Returns
    -------
    list of dict
        ``year`` (int), ``name`` of the president, ``party`` and ``text``. One president, one
        client makes a natural federation: see `natural`.
    """
    lines = gzip.decompress(_verified("state_of_the_union").read_bytes()).splitlines()
    records = [json.loads(line) for line in lines]
    for r in records:
        r["year"] = int(r["year"])
    return sorted(records, key=lambda r: r["year"])


def cmudict():
    """Return the pronouncing dictionary: words of letters, each with its first pronunciation.

    Entries with punctuation in them (abbreviations, possessives, the names of the symbols
    themselves) and alternative pronunciations are left out, so that spelling -> phonemes is a
    function.

    Returns
    -------
    list of (str, tuple of str)
        In alphabetical order, such as ``("CAT", ("K", "AE1", "T"))``.
    """
    text = gzip.decompress(_verified("cmudict").read_bytes()).decode()
    pairs = re.findall("^([A-Z]+)  (.+)$", text, re.MULTILINE)
    return [(word, tuple(sounds.split())) for word, sounds in pairs]


@dataclass(frozen=True)
class CharVocab:
    """The characters of a text, numbered in the order of their code points.

    Attributes
    ----------
    symbols : str
        Character number i is ``symbols[i]``.
    """

    symbols: str

    def __len__(self):
        return len(self.symbols)

    def encode(self, text):
        """Return the numbers of the characters of `text`, an int64 tensor.

        Raises
        ------
        ValueError
            If a character is not in the vocabulary.
        """
        codes = _code_points(text)
        known = _code_points(self.symbols)
        ids = np.searchsorted(known, codes).clip(max=len(known) - 1)
        if len(codes) and not (wrong := known[ids] != codes).sum() == 0:
            position = int(wrong.argmax())
            raise ValueError(
                f"character {text[position]!r} at position {position} is not one of the "
                f"{len(self)} of this vocabulary"
            )
        return torch.from_numpy(ids.astype(np.int64))

    def decode(self, ids):
        """Return the text that these numbers stand for."""
        return "".join(self.symbols[i] for i in torch.as_tensor(ids).flatten().tolist())


def chars(text):
    """Number the characters of a text.

    Parameters
    ----------
    text : str

    Returns
    -------
    ids : torch.Tensor
        int64 [len(text)].
    vocab : CharVocab
        Made of the characters that occur; encodes and decodes other text.
    """
    if not text:
        raise ValueError("chars() needs a text of at least one character")
    vocab = CharVocab("".join(sorted(set(text))))
    return vocab.encode(text), vocab


def _code_points(text):
    return np.frombuffer(text.encode("utf-32-le"), dtype="<u4").astype(np.int64)


def sha256(path):
    """Return the SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _verified(name):
    """Path of a bundled file, its checksum compared once per process."""
    return _check(root() / "data", name)


@functools.cache
def _check(folder, name):
    entry = manifest()[name]
    path = folder / entry["file"]
    remedy = f"restore it with `git checkout -- data/{entry['file']}`"
    if not path.is_file():
        raise DataError(f"bundled data file {path} is missing: {remedy}")
    found = sha256(path)
    if found != entry["sha256"]:
        raise DataError(
            f"bundled data file {path} is damaged: its SHA-256 is {found}, "
            f"expected {entry['sha256']}; {remedy}"
        )
    return path
