"""Data sets fetched from their public homes on first use, checked, and kept in a cache.

The cache is the folder ``MINIATURE_DATA`` names, else the user's cache folder of the platform. A
file that is already there is used without a network.
"""

import functools
import gzip
import hashlib
import math
import os
import pickle
import sys
import tarfile
import tempfile
import urllib.error
import urllib.request
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch

from .bundled import DataError, Split


class DataUnavailable(DataError):
    """A data set is not in the cache and could not be fetched."""


@dataclass(frozen=True)
class Remote:
    """A file on the network.

    Attributes
    ----------
    path : str
        Where it goes, relative to the cache folder.
    urls : tuple of str
        Tried in this order.
    checksum : str or None
        ``"<algorithm>:<hexadecimal digest>"``, an algorithm of `hashlib`. None where no checksum
        is published: the caller checks the contents instead.
    """

    path: str
    urls: tuple
    checksum: str | None


def cache_dir():
    """Return the cache folder (it need not exist yet)."""
    if folder := os.environ.get("MINIATURE_DATA"):
        return Path(folder).expanduser().absolute()
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "miniature"


def fetch(remote):
    """Return the local path of a file, downloaded if it is not in the cache.

    Parameters
    ----------
    remote : Remote

    Returns
    -------
    pathlib.Path

    Raises
    ------
    DataUnavailable
        If it is not in the cache and no address answers.
    DataError
        If its checksum is not the expected one.
    """
    target = cache_dir() / remote.path
    if target.is_file():
        _check_once(target, target.stat().st_mtime_ns, remote.checksum)
        return target
    failures = []
    for url in remote.urls:
        try:
            _download(url, target, remote.checksum)
            return target
        except (OSError, HTTPException) as error:
            failures.append(f"{url} ({getattr(error, 'reason', None) or error})")
    raise DataUnavailable(
        f"{target.name} is not in the cache and could not be downloaded from "
        f"{' or '.join(failures)}. Without a network, download it elsewhere and put it at {target} "
        "(MINIATURE_DATA sets another cache folder)"
    )


def _download(url, target, checksum):
    """Download to a temporary file beside the target, check it, and move it into place."""
    from tqdm.auto import tqdm

    target.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=target.name, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file, urllib.request.urlopen(url, timeout=30) as answer:
            size = int(answer.headers.get("Content-Length") or 0)
            with tqdm(total=size or None, unit="B", unit_scale=True, desc=target.name) as bar:
                while chunk := answer.read(1 << 16):
                    file.write(chunk)
                    bar.update(len(chunk))
        received = os.path.getsize(temporary)
        if size and received != size:
            raise OSError(f"connection closed after {received} of {size} bytes")
        _check(temporary, checksum, f"{target.name}, downloaded from {url},", "nothing was kept")
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise


@functools.cache
def _check_once(path, mtime, checksum):
    _check(path, checksum, str(path), "delete it to have it downloaded again")


def _check(path, checksum, name, remedy):
    if checksum is None:
        return
    algorithm, expected = checksum.split(":")
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, algorithm).hexdigest()
    if found != expected:
        raise DataError(f"{name} has {algorithm} {found}, expected {expected}: {remedy}")


class _Unpickler(pickle.Unpickler):
    """Unpickles arrays, sparse matrices and plain containers: nothing else can be constructed.

    The public files are Python 2 pickles; the names they use map to today's classes.
    """

    def find_class(self, module, name):
        import collections

        from scipy.sparse import csr_matrix

        allowed = {
            ("collections", "defaultdict"): collections.defaultdict,
            ("__builtin__", "list"): list,
            ("builtins", "list"): list,
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): np.dtype,
            ("scipy.sparse.csr", "csr_matrix"): csr_matrix,
            ("scipy.sparse._csr", "csr_matrix"): csr_matrix,
        }
        for numpy_core in ("numpy.core.multiarray", "numpy._core.multiarray"):
            # NumPy 2 renamed this private module: ask an array how it is pickled.
            allowed[numpy_core, "_reconstruct"] = np.zeros(0).__reduce__()[0]
        try:
            return allowed[module, name]
        except KeyError:
            raise DataError(
                f"it asks for {module}.{name}, which no data needs, and was not loaded"
            ) from None


def unpickle(file, name):
    """Read a pickle that may hold arrays, sparse matrices, lists and dictionaries only.

    Parameters
    ----------
    file : binary file object
    name : str
        What to call the file in an error.

    Raises
    ------
    DataError
        If it asks for anything else, or is no pickle.
    """
    try:
        return _Unpickler(file, encoding="latin1").load()
    except DataError as error:
        raise DataError(f"{name} is not the file it should be: {error}") from None
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise DataError(
            f"{name} is not a readable pickle: {type(error).__name__}: {error}"
        ) from error


def read_idx(path):
    """Read a gzipped IDX file of unsigned bytes, the format of MNIST.

    Format: two zero bytes, the type (8 for unsigned bytes), the number of axes, then the length of
    each axis as a big-endian 32-bit integer, then the values in row-major order.

    Returns
    -------
    torch.Tensor
        uint8.

    Raises
    ------
    DataError
        If the header or the length is wrong.
    """
    try:
        with gzip.open(path, "rb") as file:
            raw = file.read()
    except (OSError, EOFError) as error:
        raise DataError(f"{path} is not a readable gzip file: {error}") from error
    if len(raw) < 4 or raw[:3] != b"\x00\x00\x08":
        raise DataError(f"{path} is no IDX file of unsigned bytes: it starts with {raw[:4]!r}")
    start = 4 + 4 * raw[3]
    shape = np.frombuffer(raw[4:start], dtype=">i4").tolist() if len(raw) >= start else []
    if len(raw) < start or len(raw) - start != math.prod(shape):
        raise DataError(f"{path} has {len(raw)} bytes, not those of shape {shape} and its header")
    return torch.frombuffer(bytearray(raw[start:]), dtype=torch.uint8).reshape(shape)


_IDX_FILES = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)
_MNIST_URLS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)
_MNIST_MD5 = (
    "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "d53e105ee54ea40749a09fcbcd1e9432",
    "9fb629c4189551a2d022fa330f9573f3",
    "ec29112dd5afa0611ce80d1b7f02629c",
)
_FASHION_URLS = ("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",)
_FASHION_MD5 = (
    "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "25c81989df183df01b3e8a0aad5dffbe",
    "bef4ecab320f06d8554ea6380940ec79",
    "bb300cfdad3c16e7a12a480ee83cd310",
)
_CIFAR10 = Remote(
    "cifar-10-python.tar.gz",
    ("https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",),
    "md5:c58f30108f718f92721af3b95e74349a",
)
_TINY_SHAKESPEARE = Remote(
    "tinyshakespeare.txt",
    ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",),
    "sha256:86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
)


def mnist(flat=True):
    """MNIST: 60,000 digits for training, 10,000 for testing, 28x28 pixels. Fetched, 11 MB.

    Parameters
    ----------
    flat : bool
        Images as rows of 784 pixels; else shaped [1, 28, 28].

    Returns
    -------
    Split
        Pixels lie in [0, 1].
    """
    return _idx_split("mnist", _MNIST_URLS, _MNIST_MD5, flat)


def fashion_mnist(flat=True):
    """Fashion-MNIST: 60,000 pictures of clothes for training, 10,000 for testing. Fetched, 30 MB.

    Parameters
    ----------
    flat : bool
        Images as rows of 784 pixels; else shaped [1, 28, 28].

    Returns
    -------
    Split
        Pixels lie in [0, 1].
    """
    return _idx_split("fashion_mnist", _FASHION_URLS, _FASHION_MD5, flat)


def _idx_split(name, bases, digests, flat):
    loaded = []
    for file, md5 in zip(_IDX_FILES, digests, strict=True):
        remote = Remote(f"{name}/{file}", tuple(base + file for base in bases), f"md5:{md5}")
        loaded.append(read_idx(fetch(remote)))
    x_train, y_train, x_test, y_test = loaded
    return Split(_pixels(x_train, flat), y_train.long(), _pixels(x_test, flat), y_test.long())


def _pixels(images, flat):
    x = images.to(torch.float32).div_(255)
    return x.flatten(1) if flat else x.unsqueeze(1)


def cifar10():
    """CIFAR-10: 50,000 color images for training, 10,000 for testing. Fetched, 170 MB.

    Returns
    -------
    Split
        Images shaped [3, 32, 32], values in [0, 1].
    """
    return read_cifar10(fetch(_CIFAR10))


def read_cifar10(path):
    """Read the CIFAR-10 archive (its Python version) without unpacking it to disk.

    Raises
    ------
    DataError
        If it is no such archive, a batch is missing, or one holds anything but arrays.
    """
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    found = {}
    try:
        with tarfile.open(path, "r:gz") as archive:
            for member in archive:
                name = member.name.rpartition("/")[2]
                if name in names and member.isfile():
                    found[name] = unpickle(archive.extractfile(member), f"{path}:{member.name}")
    except (tarfile.TarError, EOFError, gzip.BadGzipFile) as error:
        raise DataError(f"{path} is not a readable tar.gz archive: {error}") from error
    if missing := [n for n in names if n not in found]:
        raise DataError(f"{path} lacks {', '.join(missing)}")
    x = [torch.from_numpy(np.asarray(found[n]["data"])).view(-1, 3, 32, 32) for n in names]
    y = [torch.tensor(found[n]["labels"], dtype=torch.int64) for n in names]
    return Split(
        torch.cat(x[:5]).to(torch.float32).div_(255),
        torch.cat(y[:5]),
        x[5].to(torch.float32).div_(255),
        y[5],
    )


def tiny_shakespeare():
    """Return 40,000 lines of Shakespeare, 1.1 million characters, 65 different. Fetched, 1 MB."""
    return fetch(_TINY_SHAKESPEARE).read_text(encoding="utf-8")
