"""The Planetoid citation graphs: Cora, CiteSeer, PubMed (Yang, Cohen and Salakhutdinov, 2016)."""

from dataclasses import dataclass, replace

import numpy as np
import torch

from .bundled import DataError
from .fetch import Remote, fetch, unpickle

_URL = "https://github.com/kimiyoung/planetoid/raw/master/data/"
_FILES = ("x", "y", "tx", "ty", "allx", "ally", "graph", "test.index")
_SHA256 = {
    "cora": (
        "23cfa55d91c6f624233f5eb7b6e3f141f1bd2b2ae39608a63cf5d084bb27baab",
        "94465c14eb53e04ca262198dcbb2521ee8af60fb3f3d546cd6ca24a511b0e7d1",
        "b9afbaa4a400df991f6f02ef677e1e44da55ffc04801fd02f9e673987829226a",
        "41f5ac76596a1699cc33f53084a2419e92961c42bb75f36fc38e616d348532ad",
        "9419ba2f26f5c35243db64aba110e0f35a04851609e0dc5433450676ca6b8543",
        "2b998f5cc7fedc86e7f97ca2498f47a1ffc1462c29e2d578b23bf3f62b6e7d71",
        "58f13302f39dde8852dad6fe6d15b89b077b6d7f837626bce671ef80344b383d",
        "297ce89af2b51a6a194181c7dbe1796c6a1cf9cd9349a88383b1b1e227867875",
    ),
    "citeseer": (
        "d20de19150741e555de0ed037195630fc194114ebc7fd72ced62810148aa22f6",
        "8ba87e515d8e3ee3cf52f6d2c5b86aa73f11ecad825a808455209ec26cd54924",
        "539a8906a2da97628d212f2fdd668c109a8b3f0d36574b59e5d3fd5b5303da21",
        "55e5bd1ba1e733a04598753ad1a8d57957f4b8f89e74519f41f4f4938767e4ce",
        "2ac30345d95c9ec933a817ee0bdd6a5f077f8c184a20e696910192d534414668",
        "f704b2d986dde6c2669934de1f3ae5696a6cf9455c0f6b2646a2d135ea0a1c95",
        "d79a4ef9d3e7169aee8946145f6b7306e35bc79bffad26346cfb94e10e9912a7",
        "2af990671580b6b2df5d158d1038f8292e30c9cd821b5453f399659b25b723d4",
    ),
    "pubmed": (
        "fbe9cb5c47200d1b7769a26e579be3b7130b556831f9d850e77c4c74f2599b33",
        "e6c807633307a07ed659249006536a147c7999c797f11a2560752990181b41b3",
        "4eb5f5d0f30f26497eb0ac6ac9719d09c67e284f1ed0385c93f3ef27a671da3d",
        "ee2e0d4819d9fbcc403689c3bf2e49face401b605932f093bc58ab6461130fdd",
        None,  # no checksum known: the shape is checked instead, see _FACTS
        "0c37bbe3b5014ec365e9d393cf4791925e5ed94fb194305d74f064a8d7b50f0e",
        "5b89f0036ca22909471f1e6558eb42fa06e0c730a577bde5b058b40638f81dc9",
        "b101d421688bbaecbd82e8a18f1e282378d6830f3a37666f28ebc47f844341b5",
    ),
}
# nodes, features, classes, undirected edges
_FACTS = {
    "cora": (2708, 1433, 7, 5278),
    "citeseer": (3327, 3703, 6, 4552),
    "pubmed": (19717, 500, 3, 44324),
}


@dataclass(frozen=True)
class Graph:
    """A graph with features and labels on its nodes.

    Attributes
    ----------
    x : torch.Tensor
        Features [n, d], float32, as published (not normalized).
    y : torch.Tensor
        Classes [n], int64; -1 for the 15 nodes of CiteSeer that come without label and features.
        They are outside the masks.
    edge_index : torch.Tensor
        int64 [2, 2E]: every undirected edge in both directions, no self-loop, none twice, sorted.
    train_mask, val_mask, test_mask : torch.Tensor
        bool [n]; the standard split: 20 nodes a class, 500, 1000.
    """

    x: torch.Tensor
    y: torch.Tensor
    edge_index: torch.Tensor
    train_mask: torch.Tensor
    val_mask: torch.Tensor
    test_mask: torch.Tensor

    @property
    def n_nodes(self):
        """Number of nodes."""
        return len(self.x)

    @property
    def n_edges(self):
        """Number of undirected edges."""
        return self.edge_index.shape[1] // 2

    @property
    def n_classes(self):
        """Number of classes."""
        return int(self.y.max()) + 1

    def to(self, device=None, dtype=None):
        """Move everything to `device`; the features become `dtype`."""
        moved = {k: v.to(device=device) for k, v in vars(self).items()}
        return replace(self, **(moved | {"x": self.x.to(device=device, dtype=dtype)}))


def planetoid(name):
    """Load a citation graph with its standard split. Fetched, 1 MB (PubMed: 10 MB).

    Parameters
    ----------
    name : {"cora", "citeseer", "pubmed"}

    Returns
    -------
    Graph

    Raises
    ------
    ValueError
        If the name is none of these.
    DataError
        If the files are damaged, or do not have the known numbers of nodes, features, classes and
        edges.
    """
    if name not in _FACTS:
        raise ValueError(f"no graph {name!r}: there are {', '.join(map(repr, _FACTS))}")
    files = {}
    for part, digest in zip(_FILES, _SHA256[name], strict=True):
        file = f"ind.{name}.{part}"
        files[part] = fetch(
            Remote(f"planetoid/{file}", (_URL + file,), f"sha256:{digest}" if digest else None)
        )
    graph = read_planetoid(files)
    found = (graph.n_nodes, graph.x.shape[1], graph.n_classes, graph.n_edges)
    if found != _FACTS[name]:
        raise DataError(
            f"{files['x'].parent} holds a {name} of (nodes, features, classes, edges) = {found}, "
            f"expected {_FACTS[name]}: delete the ind.{name}.* files there to fetch them again"
        )
    return graph


def read_planetoid(files):
    """Read the eight raw files of a graph.

    ``allx`` holds the features of every node outside the test set, its first rows those of ``x``,
    the training set; ``tx`` those of the test nodes, in the order of ``test.index``. A node missing
    from both (CiteSeer has 15, each with an edge or two) gets zero features and no label.

    Parameters
    ----------
    files : dict of str to pathlib.Path
        Keys x, y, tx, ty, allx, ally, graph, test.index.

    Returns
    -------
    Graph
    """
    part = {}
    for key in _FILES[:-1]:
        with open(files[key], "rb") as file:
            part[key] = unpickle(file, str(files[key]))
    test = np.loadtxt(files["test.index"], dtype=np.int64)
    n_train, n_known = part["x"].shape[0], part["allx"].shape[0]
    n = max(n_known, int(test.max()) + 1)
    x = np.zeros((n, part["allx"].shape[1]), dtype=np.float32)
    x[:n_known] = part["allx"].toarray()
    x[test] = part["tx"].toarray()
    one_hot = np.zeros((n, part["ally"].shape[1]))
    one_hot[:n_known] = part["ally"]
    one_hot[test] = part["ty"]
    y = np.where(one_hot.any(1), one_hot.argmax(1), -1)

    ends = np.array([(a, b) for a, row in part["graph"].items() for b in row], dtype=np.int64)
    ends = ends[ends[:, 0] != ends[:, 1]]
    edges = np.unique(np.concatenate([ends, ends[:, ::-1]]), axis=0)

    masks = np.zeros((3, n), dtype=bool)
    masks[0, :n_train] = True
    masks[1, n_train : n_train + 500] = True
    masks[2, test] = True
    return Graph(
        torch.from_numpy(x),
        torch.from_numpy(y),
        torch.from_numpy(np.ascontiguousarray(edges.T)),
        *map(torch.from_numpy, masks),
    )
