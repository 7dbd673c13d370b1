import gzip
import hashlib
import io
import math
import os
import pickle
import shutil
import tarfile
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from miniature import data
from miniature.data import bundled
from miniature.data import fetch as fetching
from miniature.data.graphs import read_planetoid

ROOT = Path(__file__).resolve().parents[1]
REAL = ROOT.parent / "shared" / "data"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder, and no network: only file:// addresses may be opened."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("MINIATURE_DATA", str(folder))
    opened = fetching.urllib.request.urlopen

    def only_files(url, **options):
        if not url.startswith("file:"):
            raise OSError("no network in tests")
        return opened(url, **options)

    monkeypatch.setattr(fetching.urllib.request, "urlopen", only_files)
    return folder


def digest(raw, algorithm="sha256"):
    return f"{algorithm}:{hashlib.new(algorithm, raw).hexdigest()}"


# ---------------------------------------------------------------- bundled


def test_manifest_lists_what_is_there():
    manifest = data.manifest()
    assert set(manifest) == {"digits", "mnist10k", "moby_dick", "state_of_the_union", "cmudict"}
    for entry in manifest.values():
        path = ROOT / "data" / entry["file"]
        assert path.stat().st_size == entry["bytes"]
        assert bundled.sha256(path) == entry["sha256"]
        assert entry["license"] and entry["source"] and entry["what"] and entry["shape"]


def test_digits():
    s = data.digits()
    assert s.x_train.shape == (1437, 64) and s.x_test.shape == (360, 64)
    assert s.x_train.dtype == torch.float32 and s.y_train.dtype == torch.int64
    assert s.x_train.min() == 0 and s.x_train.max() == 1
    assert s.y_test.bincount().tolist() == [36, 36, 35, 37, 36, 37, 36, 36, 35, 36]  # stratified
    images = data.digits(flat=False)
    assert images.x_train.shape == (1437, 1, 8, 8)
    assert torch.equal(images.x_train.flatten(1), s.x_train)


def test_digits_are_those_of_scikit_learn():
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    s = data.digits()
    ours = torch.cat(
        [torch.cat([s.x_train, s.x_test]) * 16, torch.cat([s.y_train, s.y_test])[:, None]], 1
    )
    theirs = np.concatenate([images, labels[:, None]], 1)
    assert sorted(map(tuple, ours.tolist())) == sorted(map(tuple, theirs.tolist()))


@pytest.mark.parametrize("pool", [1, 2, 4])
def test_mnist10k(pool):
    side = 28 // pool
    s = data.mnist10k(pool=pool, flat=False)
    assert s.x_train.shape == (8000, 1, side, side) and s.x_test.shape == (2000, 1, side, side)
    assert 0 <= s.x_train.min() and s.x_train.max() <= 1
    assert s.y_train.unique().tolist() == list(range(10))
    with np.load(ROOT / "data" / "mnist10k.npz") as raw:
        block = raw["images"][8003, 4 * pool : 5 * pool, 3 * pool : 4 * pool]
        assert s.x_test[3, 0, 4, 3].item() == pytest.approx(block.mean() / 255, abs=1e-6)
        assert s.y_test[3] == raw["labels"][8003]
    assert torch.equal(data.mnist10k(pool=pool).x_test, s.x_test.flatten(1))


def test_mnist10k_refuses_other_pools():
    with pytest.raises(ValueError, match=r"pool=3: use 1, 2 or 4"):
        data.mnist10k(pool=3)


def test_split_moves_and_converts():
    s = data.digits().to(dtype=torch.float64, device="cpu")
    assert s.x_test.dtype == torch.float64 and s.y_test.dtype == torch.int64
    x_train, y_train, x_test, y_test = s
    assert len(x_train) == len(y_train) and len(x_test) == len(y_test)


def test_a_loaded_set_is_the_callers_own():
    data.digits().x_train.fill_(7)
    assert data.digits().x_train.max() == 1


def test_texts():
    text = data.moby_dick()
    assert text.startswith("CHAPTER 1. Loomings.") and "Call me Ishmael." in text[:200]
    assert text.count("\nCHAPTER ") == 134
    addresses = data.state_of_the_union()
    assert len(addresses) == 233
    assert (addresses[0]["name"], addresses[0]["year"]) == ("George Washington", 1790)
    assert [a["year"] for a in addresses] == sorted(a["year"] for a in addresses)
    assert all(a["text"] and a["party"] for a in addresses)
    presidents = data.natural([a["name"] for a in addresses])
    assert sum(map(len, presidents)) == 233 and 40 < len(presidents) < 46


def test_cmudict():
    entries = data.cmudict()
    words = [w for w, _ in entries]
    assert len(entries) == 116506 and len(set(words)) == len(words)
    lookup = dict(entries)
    assert lookup["CAT"] == ("K", "AE1", "T")
    assert lookup["HELLO"] == ("HH", "AH0", "L", "OW1")
    assert len({s for _, sounds in entries for s in sounds}) == 69


def test_chars_round_trip():
    text = "naïve — déjà vu 🐋, naïve"
    ids, vocab = data.chars(text)
    assert ids.dtype == torch.int64 and len(ids) == len(text)
    assert vocab.decode(ids) == text
    assert len(vocab) == len(set(text)) == int(ids.max()) + 1
    assert list(vocab.symbols) == sorted(vocab.symbols)
    assert vocab.decode(vocab.encode("vu")) == "vu"
    assert vocab.encode("").tolist() == []


@pytest.mark.parametrize("wrong", ["z", "\x00", "🐋"])
def test_chars_refuses_unknown_characters(wrong):
    _, vocab = data.chars("abc")
    with pytest.raises(ValueError, match="at position 1 is not one of the 3"):
        vocab.encode("a" + wrong)


def test_chars_needs_a_text():
    with pytest.raises(ValueError, match="at least one character"):
        data.chars("")


@pytest.fixture
def own_checkout(tmp_path, monkeypatch):
    """A copy of the smallest bundled set in a checkout that a test may damage."""
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("papers.bib", "manifest.json", "digits.npz"):
        shutil.copy(ROOT / "data" / name, folder)
    monkeypatch.setenv("MINIATURE_ROOT", str(tmp_path))
    return folder


def test_a_damaged_bundled_file_is_named(own_checkout):
    path = own_checkout / "digits.npz"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(
        data.DataError, match=r"digits\.npz is damaged.*git checkout -- data/digits"
    ):
        data.digits()


def test_a_missing_bundled_file_is_named(own_checkout):
    (own_checkout / "digits.npz").unlink()
    with pytest.raises(
        data.DataError, match=r"digits\.npz is missing.*git checkout -- data/digits"
    ):
        data.digits()


def test_bundled_files_are_checked_once(own_checkout, monkeypatch):
    calls = []
    original = bundled.sha256
    monkeypatch.setattr(bundled, "sha256", lambda path: calls.append(path) or original(path))
    data.digits()
    data.digits()
    assert len(calls) == 1


# ---------------------------------------------------------------- fetched


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("MINIATURE_DATA", "~/somewhere")
    assert data.cache_dir() == Path.home() / "somewhere"
    monkeypatch.delenv("MINIATURE_DATA")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(fetching.sys, "platform", "linux")
    assert data.cache_dir() == tmp_path / "miniature"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert data.cache_dir() == Path.home() / ".cache" / "miniature"
    monkeypatch.setattr(fetching.sys, "platform", "darwin")
    assert data.cache_dir() == Path.home() / "Library" / "Caches" / "miniature"
    monkeypatch.setattr(fetching.sys, "platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    assert data.cache_dir() == tmp_path / "local" / "miniature"


def test_download_is_atomic_and_cached(cache, tmp_path):
    source = tmp_path / "source.bin"
    source.write_bytes(b"x" * 100_000)
    remote = fetching.Remote("sub/file.bin", (source.as_uri(),), digest(source.read_bytes(), "md5"))
    path = fetching.fetch(remote)
    assert path == cache / "sub" / "file.bin" and path.read_bytes() == source.read_bytes()
    assert os.listdir(path.parent) == ["file.bin"]  # no temporary file left
    source.unlink()
    assert fetching.fetch(remote) == path  # from the cache


def test_a_wrong_download_is_not_kept(cache, tmp_path):
    source = tmp_path / "source.bin"
    source.write_bytes(b"something else")
    remote = fetching.Remote("file.bin", (source.as_uri(),), digest(b"expected"))
    with pytest.raises(data.DataError) as caught:
        fetching.fetch(remote)
    message = str(caught.value)
    assert not isinstance(caught.value, data.DataUnavailable)
    assert "file.bin" in message and source.as_uri() in message
    assert digest(b"expected")[7:] in message and digest(b"something else")[7:] in message
    assert os.listdir(cache) == []


def test_a_damaged_cached_file_is_named(cache):
    cache.mkdir()
    (cache / "file.bin").write_bytes(b"damaged")
    remote = fetching.Remote("file.bin", (), digest(b"expected"))
    with pytest.raises(data.DataError, match="delete it to have it downloaded again") as caught:
        fetching.fetch(remote)
    assert str(cache / "file.bin") in str(caught.value)
    assert digest(b"expected")[7:] in str(caught.value)
    (cache / "file.bin").write_bytes(b"expected")  # replaced by hand, in the same process
    assert fetching.fetch(remote).read_bytes() == b"expected"


def test_the_next_address_is_tried(cache, tmp_path):
    source = tmp_path / "source.bin"
    source.write_bytes(b"content")
    urls = ("https://example.org/gone", source.as_uri())
    assert fetching.fetch(fetching.Remote("f", urls, digest(b"content"))).read_bytes() == b"content"


def test_a_download_cut_short_is_not_kept(cache, monkeypatch):
    class Answer(io.BytesIO):
        headers = {"Content-Length": "10"}  # noqa: RUF012

    monkeypatch.setattr(fetching.urllib.request, "urlopen", lambda url, **_: Answer(b"12345"))
    with pytest.raises(data.DataUnavailable, match="closed after 5 of 10 bytes"):
        fetching.fetch(fetching.Remote("f", ("https://example.org/f",), None))
    assert os.listdir(cache) == []


@pytest.mark.parametrize(
    ("load", "url", "place"),
    [
        (data.mnist, "mnist/train-images-idx3-ubyte.gz", "mnist/train-images-idx3-ubyte.gz"),
        (
            data.fashion_mnist,
            "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/train-images-idx3-ubyte.gz",
            "fashion_mnist/train-images-idx3-ubyte.gz",
        ),
        (
            data.cifar10,
            "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
            "cifar-10-python.tar.gz",
        ),
        (data.tiny_shakespeare, "tinyshakespeare/input.txt", "tinyshakespeare.txt"),
        (
            lambda: data.planetoid("pubmed"),
            "https://github.com/kimiyoung/planetoid/raw/master/data/ind.pubmed.x",
            "planetoid/ind.pubmed.x",
        ),
    ],
    ids=["mnist", "fashion_mnist", "cifar10", "tiny_shakespeare", "pubmed"],
)
def test_offline_says_what_to_do(cache, load, url, place):
    with pytest.raises(data.DataUnavailable) as caught:
        load()
    message = str(caught.value)
    assert url in message and "no network in tests" in message
    assert f"put it at {cache / place}" in message and "MINIATURE_DATA" in message


def idx(array):
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
    return gzip.compress(header + array.astype(np.uint8).tobytes())


def test_idx_format(tmp_path):
    images = np.arange(2 * 3 * 4).reshape(2, 3, 4)
    path = tmp_path / "images.gz"
    path.write_bytes(idx(images))
    assert np.array_equal(fetching.read_idx(path).numpy(), images)


@pytest.mark.parametrize(
    "raw",
    [
        b"not gzip",
        gzip.compress(b""),
        gzip.compress(b"\x00\x00\x0d\x01\x00\x00\x00\x01a"),
        gzip.compress(b"\x00\x00\x08\x02\x00\x00\x00\x01"),
        gzip.compress(b"\x00\x00\x08\x01\x00\x00\x00\x05abc"),
        idx(np.zeros((5, 5)))[:-9],
    ],
    ids=["no gzip", "empty", "floats", "header cut", "values cut", "gzip cut"],
)
def test_a_wrong_idx_file_is_refused(tmp_path, raw):
    path = tmp_path / "images.gz"
    path.write_bytes(raw)
    with pytest.raises(data.DataError, match=r"images\.gz"):
        fetching.read_idx(path)


def test_mnist_is_put_together_from_its_files(cache, monkeypatch):
    rng = np.random.default_rng(0)
    arrays = [
        rng.integers(0, 256, (6, 28, 28)),
        rng.integers(0, 10, 6),
        rng.integers(0, 256, (2, 28, 28)),
        rng.integers(0, 10, 2),
    ]
    (cache / "mnist").mkdir(parents=True)
    sums = []
    for name, array in zip(fetching._IDX_FILES, arrays, strict=True):
        (cache / "mnist" / name).write_bytes(idx(array))
        sums.append(digest(idx(array), "md5")[4:])
    monkeypatch.setattr(fetching, "_MNIST_MD5", tuple(sums))
    s = data.mnist()
    assert s.x_train.shape == (6, 784) and s.y_test.dtype == torch.int64
    assert np.allclose(s.x_train.numpy() * 255, arrays[0].reshape(6, 784), atol=1e-4)
    assert s.y_test.tolist() == arrays[3].tolist()
    assert data.mnist(flat=False).x_test.shape == (2, 1, 28, 28)


def cifar_archive(path, batches):
    with tarfile.open(path, "w:gz") as archive:
        for name, content in batches.items():
            raw = content if isinstance(content, bytes) else pickle.dumps(content, protocol=2)
            info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            info.size = len(raw)
            archive.addfile(info, io.BytesIO(raw))


CIFAR_NAMES = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]


def test_cifar10_archive(tmp_path):
    rng = np.random.default_rng(0)
    batches = {
        name: {"data": rng.integers(0, 256, (3, 3072)).tolist(), "labels": [i, 1, 2]}
        for i, name in enumerate(CIFAR_NAMES)
    }
    for batch in batches.values():
        batch["data"] = np.array(batch["data"], dtype=np.uint8)
    path = tmp_path / "cifar.tar.gz"
    # Python 3 writes protocol-2 arrays by way of _codecs.encode, Python 2 as plain strings.
    cifar_archive(path, {n: python2_pickle(b) for n, b in batches.items()})
    s = fetching.read_cifar10(path)
    assert s.x_train.shape == (15, 3, 32, 32) and s.x_test.shape == (3, 3, 32, 32)
    assert s.y_train[::3].tolist() == [0, 1, 2, 3, 4] and s.y_test.tolist() == [5, 1, 2]
    first = batches["data_batch_2"]["data"][1].reshape(3, 32, 32) / 255
    assert np.allclose(s.x_train[4].numpy(), first, atol=1e-6)


def python2_pickle(batch):
    """Pickle a CIFAR batch as Python 2 did: text and array contents are byte strings."""
    array = batch["data"]

    def string(raw):
        return b"T" + len(raw).to_bytes(4, "little") + raw  # BINSTRING

    def number(i):
        return b"J" + int(i).to_bytes(4, "little", signed=True)  # BININT

    shape = b"(" + number(array.shape[0]) + number(array.shape[1]) + b"t"
    dtype = b"cnumpy\ndtype\n(" + string(b"u1") + number(0) + number(1) + b"tR("
    dtype += number(3) + string(b"|") + b"NNN" + number(-1) + number(-1) + number(0) + b"tb"
    values = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(" + number(0) + b"t"
    values += string(b"b") + b"tR(" + number(1) + shape + dtype + b"I00\n"
    values += string(array.tobytes()) + b"tb"
    labels = b"](" + b"".join(number(i) for i in batch["labels"]) + b"e"
    return b"\x80\x02}(" + string(b"data") + values + string(b"labels") + labels + b"u."


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ({"data_batch_1": b"junk"}, "data_batch_1 is not a readable pickle"),
        ({}, "lacks data_batch_1, .*test_batch"),
        ({"test_batch": b"cos\nsystem\n(S'true'\ntR."}, "asks for os.system"),
    ],
    ids=["junk", "missing", "hostile"],
)
def test_a_wrong_cifar_archive_is_refused(tmp_path, batches, message):
    path = tmp_path / "cifar.tar.gz"
    cifar_archive(path, batches)
    with pytest.raises(data.DataError, match=message):
        fetching.read_cifar10(path)


def test_a_file_that_is_no_archive_is_refused(tmp_path):
    path = tmp_path / "cifar.tar.gz"
    path.write_bytes(b"not an archive")
    with pytest.raises(data.DataError, match=r"cifar\.tar\.gz is not a readable tar\.gz"):
        fetching.read_cifar10(path)


class Hostile:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    "hostile",
    [
        Hostile(os.mkdir, "pwned"),
        Hostile(eval, "__import__('os').mkdir('pwned')"),
        Hostile(getattr, "", "join"),
        [np.zeros(2), {"a": Hostile(exec, "import os; os.mkdir('pwned')")}],
    ],
    ids=["os", "eval", "getattr", "nested"],
)
def test_pickles_cannot_run_code(tmp_path, monkeypatch, hostile, protocol):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(data.DataError, match="asks for"):
        fetching.unpickle(io.BytesIO(pickle.dumps(hostile, protocol)), "some file")
    assert os.listdir(tmp_path) == []


def test_pickles_of_data_are_read():
    value = {"m": sp.csr_matrix(np.eye(3)), "l": [1, 2], "d": defaultdict(list, {0: [1]})}
    read = fetching.unpickle(io.BytesIO(pickle.dumps(value)), "some file")
    assert read["l"] == [1, 2] and read["d"][0] == [1]
    assert np.array_equal(read["m"].toarray(), np.eye(3))


# ---------------------------------------------------------------- graphs


def test_planetoid_files_with_a_missing_test_node(tmp_path):
    """Nodes 0-1 train, 2-3 other; test nodes 4, 5, 7 in the order 7, 4, 5; node 6 is missing."""
    features = np.arange(1, 9)[:, None] * np.ones((8, 2), dtype=np.float32)
    labels = np.eye(2, dtype=np.int32)[[0, 1, 1, 0, 1, 1, 0, 0]]
    test = [7, 4, 5]
    graph = defaultdict(list, {0: [1, 1, 0], 1: [0], 2: [3], 4: [7, 0], 7: [4]})
    contents = {
        "x": sp.csr_matrix(features[:2]),
        "y": labels[:2],
        "tx": sp.csr_matrix(features[test]),
        "ty": labels[test],
        "allx": sp.csr_matrix(features[:4]),
        "ally": labels[:4],
        "graph": graph,
    }
    files = {name: tmp_path / name for name in [*contents, "test.index"]}
    for name, value in contents.items():
        files[name].write_bytes(pickle.dumps(value))
    files["test.index"].write_text("".join(f"{i}\n" for i in test))
    g = read_planetoid(files)
    assert g.x[:, 0].tolist() == [1, 2, 3, 4, 5, 6, 0, 8]
    assert g.y.tolist() == [0, 1, 1, 0, 1, 1, -1, 0]
    assert g.edge_index.T.tolist() == [
        [0, 1], [0, 4], [1, 0], [2, 3], [3, 2], [4, 0], [4, 7], [7, 4],
    ]  # fmt: skip
    assert (g.n_nodes, g.n_edges, g.n_classes) == (8, 4, 2)
    assert g.train_mask.nonzero().flatten().tolist() == [0, 1]
    assert g.test_mask.nonzero().flatten().tolist() == [4, 5, 7]
    moved = g.to(dtype=torch.float64)
    assert moved.x.dtype == torch.float64 and moved.y.dtype == torch.int64


def test_planetoid_knows_three_graphs():
    with pytest.raises(ValueError, match="no graph 'Cora': there are 'cora', 'citeseer', 'pubmed'"):
        data.planetoid("Cora")


@pytest.fixture
def real_cache(tmp_path, monkeypatch):
    if not (REAL / "planetoid").is_dir():
        pytest.skip(f"no real data at {REAL}")
    shutil.copytree(REAL / "planetoid", tmp_path / "planetoid")
    shutil.copy(REAL / "tinyshakespeare.txt", tmp_path)
    monkeypatch.setenv("MINIATURE_DATA", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("name", "nodes", "features", "classes", "edges", "without_label"),
    [("cora", 2708, 1433, 7, 5278, 0), ("citeseer", 3327, 3703, 6, 4552, 15)],
)
def test_real_planetoid(real_cache, name, nodes, features, classes, edges, without_label):
    g = data.planetoid(name)
    assert g.x.shape == (nodes, features) and g.y.shape == (nodes,)
    assert (g.n_nodes, g.n_classes, g.n_edges) == (nodes, classes, edges)
    a, b = g.edge_index
    assert (a != b).all()
    assert len({*zip(a.tolist(), b.tolist(), strict=True)}) == 2 * edges
    assert torch.equal(torch.unique(g.edge_index.flip(0), dim=1), g.edge_index)  # both directions
    masks = torch.stack([g.train_mask, g.val_mask, g.test_mask])
    assert masks.sum(1).tolist() == [20 * classes, 500, 1000]
    assert masks.sum(0).max() == 1
    assert g.y[g.train_mask].bincount().tolist() == [20] * classes
    assert (g.y < 0).sum() == without_label
    assert (g.y[masks.any(0)] >= 0).all()
    assert (g.y[a] == g.y[b]).float().mean() > 0.7  # neighbors mostly agree: nothing is shuffled
    assert g.x[g.y < 0].sum() == 0


def test_a_damaged_planetoid_file_is_named(real_cache):
    path = real_cache / "planetoid" / "ind.cora.ty"
    path.write_bytes(path.read_bytes() + b"!")
    with pytest.raises(data.DataError, match=r"ind\.cora\.ty has sha256"):
        data.planetoid("cora")


def test_real_tiny_shakespeare(real_cache):
    text = data.tiny_shakespeare()
    assert text.startswith("First Citizen:")
    ids, vocab = data.chars(text)
    assert len(ids) == 1115394 and len(vocab) == 65


# ---------------------------------------------------------------- partitions


def is_partition(parts, n):
    assert all(p.dtype == torch.int64 and p.ndim == 1 for p in parts)
    return torch.equal(torch.cat(parts).sort().values, torch.arange(n))


@settings(max_examples=50, deadline=None)
@given(n=st.integers(1, 200), n_clients=st.integers(1, 20), seed=st.integers(0, 2**40))
def test_iid_partitions(n, n_clients, seed):
    if n_clients > n:
        with pytest.raises(ValueError, match=f"{n} samples are too few for {n_clients} clients"):
            data.iid(n, n_clients, seed)
        return
    parts = data.iid(n, n_clients, seed)
    assert len(parts) == n_clients and is_partition(parts, n)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


LABELS = st.lists(st.integers(-2, 6), min_size=1, max_size=150)


@settings(max_examples=100, deadline=None)
@given(
    labels=LABELS,
    n_clients=st.integers(1, 8),
    alpha=st.floats(0.05, 100) | st.just(math.inf),
    min_size=st.integers(0, 3),
    seed=st.integers(0, 2**40),
)
def test_dirichlet_partitions(labels, n_clients, alpha, min_size, seed):
    try:
        parts = data.dirichlet(labels, n_clients, alpha, seed, min_size=min_size)
    except ValueError as error:
        assert "too few" in str(error) or "draws with alpha" in str(error)
        return
    assert len(parts) == n_clients and is_partition(parts, len(labels))
    assert min(map(len, parts)) >= min_size
    again = data.dirichlet(torch.tensor(labels), n_clients, alpha, seed, min_size=min_size)
    assert all(torch.equal(p, q) for p, q in zip(parts, again, strict=True))


@settings(max_examples=100, deadline=None)
@given(
    labels=LABELS,
    n_clients=st.integers(1, 12),
    per_client=st.integers(1, 5),
    seed=st.integers(0, 2**40),
)
def test_shards_partitions(labels, n_clients, per_client, seed):
    try:
        parts = data.shards(labels, n_clients, per_client, seed)
    except ValueError as error:
        assert "too few" in str(error) or "clients" in str(error) or "there are" in str(error)
        return
    assert len(parts) == n_clients and is_partition(parts, len(labels))
    labels = torch.tensor(labels)
    held = [set(labels[p].tolist()) for p in parts]
    assert all(len(h) == per_client for h in held)
    holders = [sum(c in h for h in held) for c in labels.unique().tolist()]
    assert max(holders) - min(holders) <= 1


@given(groups=st.lists(st.sampled_from("abcde"), min_size=1, max_size=50))
def test_natural_partitions(groups):
    parts = data.natural(groups)
    assert is_partition(parts, len(groups))
    assert [groups[p[0]] for p in parts] == list(dict.fromkeys(groups))
    assert all(len({groups[i] for i in p}) == 1 for p in parts)


def test_natural_takes_tensors():
    parts = data.natural(torch.tensor([5, 3, 5]))
    assert [p.tolist() for p in parts] == [[0, 2], [1]]


def test_seeds_matter():
    labels = torch.arange(300) % 5
    for make in (
        lambda s: data.iid(300, 4, s),
        lambda s: data.dirichlet(labels, 4, 0.5, s),
        lambda s: data.shards(labels, 4, 2, s),
    ):
        assert not all(torch.equal(p, q) for p, q in zip(make(0), make(1), strict=False))


def test_dirichlet_has_the_right_distribution():
    """Shares of one class are Dirichlet: mean 1/K, variance (1/K)(1 - 1/K) / (K alpha + 1)."""
    k, alpha, n = 4, 0.5, 2000
    labels = torch.zeros(n, dtype=torch.int64)
    shares = torch.tensor(
        [
            [len(p) / n for p in data.dirichlet(labels, k, alpha, s, min_size=0)]
            for s in range(1500)
        ],
        dtype=torch.float64,
    )
    variance = (1 / k) * (1 - 1 / k) / (k * alpha + 1)
    assert shares.mean(0).sub(1 / k).abs().max() < 5 * math.sqrt(variance / 1500)
    assert shares.var(0).div(variance).sub(1).abs().max() < 0.15


def test_dirichlet_skew_follows_alpha():
    labels = data.digits().y_train

    def classes_held(alpha):
        return np.mean([len(labels[p].unique()) for p in data.dirichlet(labels, 10, alpha, 0)])

    assert classes_held(0.05) < 5 < classes_held(1.0) <= classes_held(100.0) == 10
    sizes = [len(p) for p in data.dirichlet(labels, 10, math.inf, 0)]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("alpha", [0, -1.0, math.nan])
def test_dirichlet_needs_a_positive_alpha(alpha):
    with pytest.raises(ValueError, match=r"alpha=.*must be > 0"):
        data.dirichlet([0, 1], 2, alpha, 0)


def test_dirichlet_gives_up_with_advice():
    with pytest.raises(ValueError, match=r"1000 draws with alpha=0\.001.*raise alpha"):
        data.dirichlet(torch.arange(100) % 2, 50, 0.001, 0)


def test_partitions_refuse_wrong_input():
    with pytest.raises(ValueError, match="n_clients=0"):
        data.iid(5, 0, 0)
    with pytest.raises(ValueError, match="one axis"):
        data.dirichlet(torch.zeros(3, 2), 2, 1.0, 0)
    with pytest.raises(ValueError, match="there are 2 classes"):
        data.shards([0, 1, 0, 1], 2, 3, 0)
    with pytest.raises(ValueError, match="cannot hold all 4 classes"):
        data.shards([0, 1, 2, 3], 2, 1, 0)
    with pytest.raises(ValueError, match="class 1 has 1 samples for 2 clients"):
        data.shards([0, 0, 0, 1], 2, 2, 0)
    with pytest.raises(ValueError, match="at least one sample"):
        data.natural([])


def test_stack_clients():
    x = torch.arange(12, dtype=torch.float64).view(6, 2) + 1
    y = torch.arange(6) + 1
    parts = [torch.tensor([4]), torch.tensor([0, 2, 5]), torch.tensor([1, 3])]
    stacked = data.stack_clients(x, y, parts)
    assert stacked.x.shape == (3, 3, 2) and stacked.x.dtype == torch.float64
    assert stacked.sizes.tolist() == [1, 3, 2]
    for c, part in enumerate(parts):
        assert torch.equal(stacked.x[c, : len(part)], x[part])
        assert torch.equal(stacked.y[c, : len(part)], y[part])
        assert (stacked.x[c, len(part) :] == 0).all() and (stacked.y[c, len(part) :] == 0).all()
    with pytest.raises(ValueError, match="x has 6 samples and y has 5"):
        data.stack_clients(x, y[:5], parts)
    with pytest.raises(ValueError, match="at least one client"):
        data.stack_clients(x, y, [])


# ---------------------------------------------------------------- batches


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=5),
    batch_size=st.integers(1, 40),
    steps=st.integers(1, 8),
    seed=st.integers(0, 2**40),
)
def test_batches_are_shuffled_epochs(sizes, batch_size, steps, seed):
    seeds = [seed + i for i in range(len(sizes))]
    out = data.batches(sizes, batch_size, steps, seeds)
    assert out.shape == (len(sizes), steps, batch_size) and out.dtype == torch.int64
    for row, n in zip(out.flatten(1), sizes, strict=True):
        for epoch in row.split(n):
            assert 0 <= epoch.min() and epoch.max() < n
            assert len(epoch.unique()) == len(epoch)  # each sample once an epoch
    for i in range(len(sizes)):  # a row depends on its own seed and size only
        alone = data.batches(sizes[i], batch_size, steps, [seeds[i]])
        assert torch.equal(alone[0], out[i])
    longer = data.batches(sizes, batch_size, steps + 3, seeds)
    assert torch.equal(longer[:, :steps], out)


def test_batches_accept_every_form_of_n():
    expected = data.batches(7, 3, 4, [1, 2])
    for n in (torch.tensor(7), torch.tensor([7, 7]), np.array([7, 7]), (7, 7)):
        assert torch.equal(data.batches(n, 3, 4, torch.tensor([1, 2])), expected)
    assert data.batches(7, 3, 4, [1], device="cpu").device.type == "cpu"
    assert data.batches(7, 3, 4, []).shape == (0, 4, 3)


def test_batches_are_uniform():
    """The first index drawn is uniform over the samples (chi-squared, 9 degrees of freedom)."""
    first = data.batches(10, 1, 1, range(5000)).flatten()
    counts = first.bincount(minlength=10).double()
    assert ((counts - 500) ** 2 / 500).sum() < 33.7  # exceeded once in 10,000


def test_batches_of_different_seeds_differ():
    out = data.batches(50, 16, 5, range(20)).flatten(1)
    assert len({tuple(row.tolist()) for row in out}) == 20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 2, 2, [0]), "smallest n=0"),
        ((5, 0, 2, [0]), "batch_size=0"),
        ((5, 2, 0, [0]), "steps=0"),
        (([5, 5], 2, 2, [0]), "2 sizes for 1 seeds"),
    ],
)
def test_batches_refuse_wrong_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        data.batches(*arguments)


# ---------------------------------------------------------------- synthetic


def test_gaussian_clusters():
    c = data.gaussian_clusters(1003, 20, 5, 0.3, seed=1, dtype=torch.float64)
    assert c.x.shape == (1003, 20) and c.x.dtype == torch.float64 and c.centers.shape == (5, 20)
    assert c.y.bincount().tolist() == [201, 201, 201, 200, 200]
    assert (c.x - c.centers[c.y]).std().item() == pytest.approx(0.3, rel=0.03)
    again = data.gaussian_clusters(1003, 20, 5, 0.3, seed=1, dtype=torch.float64)
    assert torch.equal(c.x, again.x)
    assert not torch.equal(c.x, data.gaussian_clusters(1003, 20, 5, 0.3, 2, torch.float64).x)
    with pytest.raises(ValueError, match="clusters=5"):
        data.gaussian_clusters(3, 2, 5, 0.1, 0)
    with pytest.raises(ValueError, match="spread=-1"):
        data.gaussian_clusters(9, 2, 5, -1, 0)


def test_linear_regression():
    x, y, w = data.linear_regression(20000, 6, 0.5, seed=0, condition=100.0, dtype=torch.float64)
    assert (y - x @ w).std().item() == pytest.approx(0.5, rel=0.03)
    eigenvalues = x.var(0)
    assert (eigenvalues[0] / eigenvalues[-1]).item() == pytest.approx(100, rel=0.1)
    assert torch.linalg.lstsq(x, y[:, None]).solution[:, 0].sub(w).abs().max() < 0.2
    with pytest.raises(ValueError, match=r"condition=0\.5"):
        data.linear_regression(9, 2, 0.1, 0, condition=0.5)
