"""Research papers in miniature: methods, engines and checks behind one notebook per paper.

Submodules load when they are first used, so that ``import miniature`` costs nothing:
torch is imported only by the modules that compute with it.
"""

import importlib

__version__ = "0.1.0"

_SUBMODULES = (
    "catalog",
    "claims",
    "cli",
    "data",
    "models",
    "papers",
    "report",
    "run",
    "scale",
    "show",
    "stack",
    "federated",
    "distributed",
    "peft",
    "training",
    "theory",
    "continual",
    "merging",
    "sequence",
    "generative",
    "science",
)


def __getattr__(name):
    if name in _SUBMODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *_SUBMODULES])
