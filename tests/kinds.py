"""What contract tests are about: all classes of one kind in a package."""

import importlib
import pkgutil


def kinds(package, base):
    """Return every class of a package that derives from `base`, in the order of their names.

    Classes that tests define do not count, though they derive from it too.
    """
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    found, todo = set(), [base]
    while todo:
        below = todo.pop().__subclasses__()
        todo += below
        found |= {kind for kind in below if kind.__module__.startswith(f"{package.__name__}.")}
    return sorted(found, key=lambda kind: (kind.__qualname__, kind.__module__))
