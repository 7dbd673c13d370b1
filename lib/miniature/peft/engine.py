"""Adapters on a frozen model: attach, train, merge, take off, save, and count.

`attach(model, method)` wraps the layers that a method targets. The layer itself stays as it is, and
frozen; a method says only what it adds:

- `Method.init(layer)` makes its parameters (trained) and buffers (frozen);
- `Method.delta(layer)` is the update of the weight as a matrix [m, n];
- a `LowRank` method gives its factors instead, `factors(layer)`, such as B [m, r] and A [r, n];
- `Method.forward(layer, x)` only where there is a cheaper way than applying W + delta.

Shapes follow the papers: m outputs, n inputs, the weight W0 [m, n]. A convolution's weight is read
as the matrix [out, in * height * width], an embedding's as [vocabulary, dim].

Adapted models can be stacked: ``Stack.init(lambda: attach(copy.deepcopy(model), method), seeds)``
trains only the adapters, [N, P], and stores the frozen weights once.
"""

import os
import tempfile

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

LAYERS = (nn.Linear, nn.Conv2d, nn.Embedding)


class Method:
    """A way to adapt a layer. Subclasses give `init` and `delta` (or `forward`).

    One object serves all layers; parameters live in the `Adapted` layers.

    Parameters
    ----------
    targets : sequence of str, optional
        Names of layers: the last parts of their path, such as ``["attention.q", "mlp.0"]``.
        Default: all layers of the types in `default`.

    Attributes
    ----------
    kinds, default : tuple of type
        Layers that the method can adapt, and those that it does where no targets are named.
    starts_at_base : bool
        Whether the adapted model computes at first what the base does.
    mergeable : bool
        Whether the adapted layer is a layer of the same type with another weight and bias.
    """

    kinds = LAYERS
    default = (nn.Linear, nn.Conv2d)
    starts_at_base = True
    mergeable = True

    def __init__(self, targets=None):
        if isinstance(targets, str):
            raise ValueError(f"targets must be a list of names, such as [{targets!r}]")
        self.targets = targets

    def prepare(self, model, layers):
        """Look at the model before it is changed; return the layers to adapt, name -> module."""
        return layers

    def init(self, layer):
        """Give a layer its parameters and buffers."""
        raise NotImplementedError

    def delta(self, layer):
        """Return the update of the weight, [m, n], or None."""
        return None

    def bias(self, layer):
        """Return the update of the bias, [m], or None."""
        return None

    def forward(self, layer, x):
        """Return the adapted layer's output."""
        return layer.apply(x, self.delta(layer), self.bias(layer))

    def penalty(self, params):
        """Return what the method adds to the loss, or None.

        Parameters
        ----------
        params : dict of dict of torch.Tensor
            Parameters by layer and name, of one model (also under `vmap`).
        """
        return None

    def update(self, params, grads, t):
        """Act after optimizer step t = 1, 2, ... on the parameters of all copies, in place.

        Parameters
        ----------
        params, grads : dict of dict of torch.Tensor, each of shape [N, ...]
            By layer and name. The gradients are those of the step just taken.
        t : int
        """


class LowRank(Method):
    """A method whose update is s times a product, such as s B A. Subclasses give `init`, `factors`.

    The scale is the layer's buffer ``s``, so that copies in a stack may have their own; without
    such a buffer it is 1.
    """

    def factors(self, layer):
        """Return the factors in the order of the product: matrices, and vectors for diagonals.

        B [m, r] and A [r, n], say, or P [m, r], lambda [r] and Q [r, n] for P diag(lambda) Q. At
        least two are matrices, the last one among them.
        """
        raise NotImplementedError

    def delta(self, layer):
        return layer.scaled(product(*self.factors(layer)))

    def forward(self, layer, x):
        return layer.apply(x) + layer.scaled(layer.low_rank(x, *self.factors(layer)))


class Adapted(nn.Module):
    """A frozen layer with what a method adds to it. Made by `attach`.

    Attributes
    ----------
    base : nn.Linear, nn.Conv2d, nn.Embedding, or another layer that the method knows
    name : str
        Its path in the model.
    m, n : int
        Rows and columns of the weight as a matrix.
    merged : bool
    """

    def __init__(self, base, method, name):
        super().__init__()
        self.base, self.method, self.name, self.merged = base, method, name, False
        if isinstance(base, LAYERS):
            self.m, self.n = base.weight.flatten(1).shape
        method.init(self)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:  # whoever asks for in_features or stride means the layer's
            return getattr(super().__getattr__("base"), name)

    @property
    def W(self):
        """The frozen weight as a matrix [m, n]: the base's, or what the method put in its place."""
        frozen = self._buffers.get("frozen")
        weight = self.base.weight
        return weight.reshape(len(weight), -1) if frozen is None else frozen

    def parameter(self, name, value):
        """Make a trained parameter, in the dtype and on the device of the base."""
        self.register_parameter(name, nn.Parameter(value.detach().to(self.like)))

    def buffer(self, name, value):
        """Make a frozen tensor, or number, that belongs to the adapter; indices keep their type."""
        exact = torch.float64 if isinstance(value, float) else None
        value = torch.as_tensor(value, dtype=exact).detach()
        like = self.like
        to = {"dtype": like.dtype} if value.is_floating_point() else {}
        self.register_buffer(name, value.to(like.device, **to))

    def freeze(self, W):
        """Let the method's own frozen matrix [m, n] stand in for the base's weight."""
        self.buffer("frozen", W)

    @property
    def like(self):
        """A tensor of the dtype and on the device of the base."""
        return next(self.base.parameters())

    def apply(self, x, delta=None, bias=None):
        """Return the output of the layer with weight W + delta [m, n] and its bias + bias [m]."""
        W = self.W if delta is None else self.W + delta
        own = getattr(self.base, "bias", None)
        b = own if bias is None else bias if own is None else own + bias
        if isinstance(self.base, nn.Linear):
            return F.linear(x, W, b)
        if isinstance(self.base, nn.Conv2d):
            return self.base._conv_forward(x, W.view_as(self.base.weight), b)
        return F.embedding(x, W, self.base.padding_idx)

    def low_rank(self, x, *factors):
        """Return what a product of factors would compute as the weight, without forming it."""
        if isinstance(self.base, nn.Linear):
            for factor in reversed(factors):
                x = x * factor if factor.ndim == 1 else F.linear(x, factor)
            return x
        B, A = product(*factors[:-1]), factors[-1]
        if isinstance(self.base, nn.Conv2d) and self.base.groups == 1:
            z = self.base._conv_forward(x, A.view(-1, *self.base.weight.shape[1:]), None)
            return F.conv2d(z, B[..., None, None])
        if isinstance(self.base, nn.Embedding):
            return F.embedding(x, B, self.base.padding_idx) @ A
        return self.base._conv_forward(x, (B @ A).view_as(self.base.weight), None)

    def scaled(self, y):
        """Return s y, where s is the buffer of that name; y itself if there is none."""
        s = self._buffers.get("s")
        return y if s is None else s * y

    def forward(self, x, *args, **kwargs):
        if self.merged:
            return self.base(x, *args, **kwargs)
        return self.method.forward(self, x, *args, **kwargs)

    @torch.no_grad()
    def merged_weight(self):
        """Return the weight [m, n] and the bias [m] (or None) of the layer with its update."""
        delta, bias = self.method.delta(self), self.method.bias(self)
        W = self.W if delta is None else self.W + delta
        own = getattr(self.base, "bias", None)
        return W, own if bias is None else bias if own is None else own + bias


def product(first, *rest):
    """Return the product of matrices, and of vectors for diagonal matrices, as a matrix."""
    for factor in rest:
        if factor.ndim == 1:
            first = first * factor
        else:
            first = first[:, None] * factor if first.ndim == 1 else first @ factor
    return first


def positive(**sizes):
    """Raise a ValueError that names the first of the sizes, such as a rank, that is below 1."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be positive, not {size}")


def attach(model, method, train=()):
    """Freeze a model and adapt the layers that a method targets, in place.

    Parameters
    ----------
    model : nn.Module
    method : Method
    train : sequence of str
        Names of further parameters or modules (the last parts of their path) to train as they
        are, such as a new ``head``; they are not adapted.

    Returns
    -------
    nn.Module
        The same model.

    Raises
    ------
    ValueError
        If the model is adapted already, or a name fits no layer that the method can adapt.
    """
    if adapted(model):
        raise ValueError("the model is adapted already: detach(model) first")
    if isinstance(model, method.kinds):
        raise ValueError(f"wrap the {type(model).__name__} in a module, such as nn.Sequential")
    model.requires_grad_(False)
    for name in train:
        found = [p for path, p in model.named_parameters() if _fits(path, name)]
        found += [
            p for path, m in model.named_modules() if _fits(path, name) for p in m.parameters()
        ]
        if not found:
            raise ValueError(f"train={name!r} names no parameter and no module of the model")
        for p in found:
            p.requires_grad_(True)
    possible = {
        path: m
        for path, m in model.named_modules()
        if isinstance(m, method.kinds) and not any(p.requires_grad for p in m.parameters())
    }
    if method.targets is None:
        layers = {path: m for path, m in possible.items() if isinstance(m, method.default)}
        missing = [] if layers else ["any layer"]
    else:
        layers = {
            path: m for path, m in possible.items() if any(_fits(path, t) for t in method.targets)
        }
        missing = [t for t in method.targets if not any(_fits(path, t) for path in possible)]
    if missing:
        raise ValueError(
            f"{type(method).__name__} finds no layer {', '.join(map(repr, missing))}; it can "
            f"adapt: {', '.join(possible) or 'none'}"
        )
    for path, layer in method.prepare(model, layers).items():
        wrapped = Adapted(layer, method, path).train(model.training)
        model.set_submodule(path, wrapped, strict=True)
    return model


def _fits(path, name):
    return path == name or path.endswith("." + name)


def adapted(model):
    """Return the adapted layers of a model, path -> Adapted."""
    return {path: m for path, m in model.named_modules() if isinstance(m, Adapted)}


def merge(model):
    """Put the update into the weights: from now on the base layers compute what was learned.

    The base's parameters are set aside, not changed, so `unmerge` brings them back bit by bit and
    a tensor that another layer shares stays what it is there.

    Raises
    ------
    ValueError
        If the method has no merged form (adapters with a nonlinearity, prompts).
    """
    for path, layer in adapted(model).items():
        if not layer.method.mergeable:
            raise ValueError(f"{type(layer.method).__name__} cannot be merged (layer {path!r})")
        if layer.merged:
            continue
        W, b = layer.merged_weight()
        layer.set_aside = (
            layer.base.weight,
            layer.base.bias if hasattr(layer.base, "bias") else None,
        )
        shape = layer.base.weight.shape
        layer.base.weight = nn.Parameter(W.clone().view(shape), requires_grad=False)
        if b is not None:
            layer.base.bias = nn.Parameter(b.clone(), requires_grad=False)
        layer.merged = True
    return model


def unmerge(model):
    """Bring the base's own weights back, exactly."""
    for layer in adapted(model).values():
        if layer.merged:
            layer.base.weight, bias = layer.set_aside
            if hasattr(layer.base, "bias"):
                layer.base.bias = bias
            layer.merged = False
    return model


def detach(model):
    """Take the adapters off, in place: the base as it was, or with the update if merged."""
    for path, layer in adapted(model).items():
        model.set_submodule(path, layer.base, strict=True)
    for hook in model.__dict__.pop("_adapter_hooks", []):
        hook.remove()
    return model


def trainable(model):
    """Return the parameters that are trained, path -> nn.Parameter."""
    return {path: p for path, p in model.named_parameters() if p.requires_grad}


def count(model):
    """Return numbers and bytes of the trained parameters and of all that the base holds."""
    own = trainable(model).values()
    base = [p for path, p in model.named_parameters() if not p.requires_grad]
    return {
        "trained": sum(p.numel() for p in own),
        "trained bytes": sum(p.numel() * p.element_size() for p in own),
        "base": sum(p.numel() for p in base),
        "base bytes": sum(p.numel() * p.element_size() for p in base),
    }


def adapter_state(model):
    """Return all tensors of the adapters alone (and of what `train` named): name -> tensor."""
    state = {path: p.detach() for path, p in trainable(model).items()}
    for path, layer in adapted(model).items():
        state |= {f"{path}.{k}": b for k, b in layer.named_buffers(recurse=False)}
    return state


def load_adapter_state(model, state):
    """Fill the adapters of a model from `adapter_state`.

    Raises
    ------
    ValueError
        If names or shapes are not those of the model's adapters; nothing is changed then.
    """
    own = adapter_state(model)
    wrong = sorted(own.keys() ^ state.keys())
    wrong += [k for k in own.keys() & state.keys() if own[k].shape != state[k].shape]
    if wrong:
        raise ValueError(f"the state is of another method, rank or model: {', '.join(wrong[:5])}")
    with torch.no_grad():
        for k, v in own.items():
            v.copy_(state[k])


def save(model, path):
    """Write the adapters alone to a safetensors file, whole or not at all."""
    folder = os.path.dirname(os.path.abspath(path))
    handle, temporary = tempfile.mkstemp(dir=folder, suffix=".tmp")
    os.close(handle)
    try:
        state = {k: v.contiguous().clone() for k, v in adapter_state(model).items()}
        save_file(state, temporary)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def load(model, path):
    """Read what `save` wrote into the adapters of a model; errors as in `load_adapter_state`."""
    load_adapter_state(model, load_file(path))


class saved_bytes:
    """Count the bytes that autograd keeps for the backward pass, exactly.

    ``with saved_bytes(model) as saved: loss = ...`` and then ``saved.total``. Every storage counts
    once, however many operations keep it; parameters and buffers of the model, which exist
    anyway, do not count.

    Parameters
    ----------
    model : nn.Module
    but : sequence of torch.Tensor
        Tensors not to count either, such as the input batch.

    Attributes
    ----------
    total : int
        Bytes.
    tensors : list of tuple
        Shape, dtype and bytes of what is kept, in the order of the forward pass.
    """

    def __init__(self, model, but=()):
        held = [*model.parameters(), *model.buffers(), *but]
        self._seen = {t.untyped_storage().data_ptr() for t in held}
        self._kept = []  # a storage that was freed could be given out again at the same place
        self.total, self.tensors = 0, []

    def __enter__(self):
        def pack(t):
            storage = t.untyped_storage()
            if storage.data_ptr() not in self._seen:
                self._seen.add(storage.data_ptr())
                self._kept.append(storage)
                self.total += storage.nbytes()
                self.tensors.append((tuple(t.shape), t.dtype, storage.nbytes()))
            return t

        self._hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t)
        self._hooks.__enter__()
        return self

    def __exit__(self, *error):
        self._hooks.__exit__(*error)
        self._kept.clear()


def by_layer(tensors):
    """Sort tensors by name ("blocks.0.q.A") into layer -> name -> tensor."""
    out = {}
    for path, t in tensors.items():
        layer, _, name = path.rpartition(".")
        out.setdefault(layer, {})[name] = t
    return out


def finetune(stack, method, loss, batches, optimizer, schedule=None, max_norm=None, callback=None):
    """Train all copies of an adapted model: optimizer steps with the method's penalty and update.

    Parameters
    ----------
    stack : miniature.stack.Stack
        Of adapted models.
    method : Method or None
        None where nothing but what `attach` was told to `train` is trained.
    loss : callable
        ``loss(model, *batch)`` for one copy.
    batches : iterable of tuples of torch.Tensor, each of shape [N, ...]
    optimizer : torch.optim.Optimizer
        From ``stack.optimizer``.
    schedule : torch.optim.lr_scheduler.LRScheduler, optional
        Stepped after every step.
    max_norm : float, optional
        Clip every copy's gradient to this norm.
    callback : callable, optional
        Called as ``callback(t, stack)`` before the first step, t = 0, and after step t = 1, 2, ...

    Returns
    -------
    torch.Tensor, shape [T, N]
        The losses before each step, penalty included.
    """
    method = method or Method()

    def penalized(model, *batch):
        value, extra = loss(model, *batch), method.penalty(by_layer(model.params))
        return value if extra is None else value + extra

    objective = loss if type(method).penalty is Method.penalty else penalized
    losses = []
    if callback is not None:
        callback(0, stack)
    for t, batch in enumerate(batches, 1):
        losses.append(stack.step(optimizer, objective, *batch, max_norm=max_norm))
        if schedule is not None:
            schedule.step()
        with torch.no_grad():
            method.update(by_layer(stack.params()), by_layer(stack.params(stack.theta.grad)), t)
        if callback is not None:
            callback(t, stack)
    return torch.stack(losses)
