"""Data sets, client partitions, mini-batches and synthetic problems.

Bundled with the checkout, no network needed: `digits`, `mnist10k`, `moby_dick`,
`state_of_the_union`, `cmudict`. Fetched on first use, checked and kept in a cache: `mnist`,
`fashion_mnist`, `cifar10`, `planetoid`, `tiny_shakespeare`.
"""

from .bundled import (
    CharVocab,
    DataError,
    Split,
    chars,
    cmudict,
    digits,
    manifest,
    mnist10k,
    moby_dick,
    state_of_the_union,
)
from .fetch import (
    DataUnavailable,
    cache_dir,
    cifar10,
    fashion_mnist,
    mnist,
    tiny_shakespeare,
)
from .graphs import Graph, planetoid
from .partition import Clients, batches, dirichlet, iid, natural, shards, stack_clients
from .synthetic import Clusters, Regression, gaussian_clusters, linear_regression

__all__ = [
    "CharVocab",
    "Clients",
    "Clusters",
    "DataError",
    "DataUnavailable",
    "Graph",
    "Regression",
    "Split",
    "batches",
    "cache_dir",
    "chars",
    "cifar10",
    "cmudict",
    "digits",
    "dirichlet",
    "fashion_mnist",
    "gaussian_clusters",
    "iid",
    "linear_regression",
    "manifest",
    "mnist",
    "mnist10k",
    "moby_dick",
    "natural",
    "planetoid",
    "shards",
    "stack_clients",
    "state_of_the_union",
    "tiny_shakespeare",
]
