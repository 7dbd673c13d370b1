"""Tiny trained models in ``data/checkpoints``, by name.

A checkpoint is two files: ``NAME.safetensors`` holds the parameters, ``NAME.json`` what they are:
class and arguments, how they were trained, what they reach, and the SHA-256 of the first file.
``scripts/train_checkpoints.py`` makes them.
"""

import difflib
import hashlib
import json
import os
import tempfile

import torch

from ..data import DataError
from ..papers import root
from ..scale import write_json
from .cnn import CNN
from .gpt import GPT
from .mlp import MLP
from .vit import ViT

_CLASSES = {"CNN": CNN, "GPT": GPT, "MLP": MLP, "ViT": ViT}


def folder():
    """Return the folder of the checkpoints."""
    return root() / "data" / "checkpoints"


def names():
    """Return the names that `load` and `meta` know, in alphabetical order."""
    return sorted(p.stem for p in folder().glob("*.json"))


def meta(name):
    """Return the record of a checkpoint.

    Parameters
    ----------
    name : str

    Returns
    -------
    dict
        ``class`` and ``arguments`` (of the architecture), ``data``, ``held_out`` (split, and loss
        in nats or accuracy as a share), ``recipe``, ``dtype`` (as stored), ``bytes``, ``sha256``;
        ``vocabulary`` for a language model: character number i is its i-th.

    Raises
    ------
    ValueError
        If there is no such checkpoint.
    DataError
        If the record is not valid JSON.
    """
    known = names()
    if name not in known:
        near = difflib.get_close_matches(str(name), known, n=2, cutoff=0.4)
        hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
        raise ValueError(f"no checkpoint {name!r}; {hint}There are: {', '.join(known) or 'none'}")
    path = folder() / f"{name}.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise DataError(f"{path} is damaged ({e}); {_remedy(name)}") from e


def load(name):
    """Return a trained model in evaluation mode, on the CPU, in float32.

    Parameters
    ----------
    name : str
        Such as ``"gpt_moby"`` or ``"cnn_mnist"``.

    Returns
    -------
    torch.nn.Module

    Raises
    ------
    ValueError
        If there is no such checkpoint.
    DataError
        If a file of it is missing or damaged.
    """
    from safetensors.torch import load as parse

    record = meta(name)
    path = folder() / f"{name}.safetensors"
    if not path.is_file():
        raise DataError(f"{path} is missing: {_remedy(name)}")
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != record["sha256"]:
        raise DataError(
            f"{path} is damaged: its SHA-256 is {found}, expected {record['sha256']}; "
            f"{_remedy(name)}"
        )
    with torch.random.fork_rng(devices=[]):  # loading draws no random numbers of the caller's
        model = _CLASSES[record["class"]](**record["arguments"])
    stored = parse(content)
    with torch.no_grad():
        for key, p in model.named_parameters():
            p.copy_(stored[key])
    return model.eval()


def save(name, model, arguments, record):
    """Write a checkpoint: the parameters first, then the record with their SHA-256.

    Either file is whole or not there. Tied parameters are written once.

    Parameters
    ----------
    name : str
    model : torch.nn.Module
        Of a class that `load` knows; its parameters are stored in the type that they have.
    arguments : dict
        What its class was called with.
    record : dict
        The rest of what `meta` is to return.
    """
    from safetensors.torch import save as serialize

    tensors = {k: p.detach().cpu().contiguous() for k, p in model.named_parameters()}
    content = serialize(tensors)
    folder().mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=folder(), prefix=name, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(temporary, 0o644)
        os.replace(temporary, folder() / f"{name}.safetensors")
    except BaseException:
        os.unlink(temporary)
        raise
    (dtype,) = {str(t.dtype).removeprefix("torch.") for t in tensors.values()}
    about = {"class": type(model).__name__, "arguments": arguments, **record, "dtype": dtype}
    about |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    write_json(folder() / f"{name}.json", about)


def _remedy(name):
    return (
        f"restore it with `git checkout -- data/checkpoints/{name}.*`, "
        f"or train it again with `python scripts/train_checkpoints.py {name}`"
    )
