"""Many small models as one: N copies of a module, trained together.

The parameters of all copies lie in one tensor ``theta`` of shape [N, P], a row a copy. Everything
elementwise (an optimizer, a proximal term, a compressor, a server average) is then one operation
on one tensor; `torch.func.vmap` runs the forward passes of all copies at once, and one backward
pass through their sum gives each copy its own gradient. For `class_loss` of a ReLU perceptron the
backward pass is written out, which is two to four times as fast.
Five seeds cost little more than one, on a CPU and far less on a GPU.
"""

import contextlib
import copy
import functools
import inspect

import torch
from torch.func import vmap

from .models.mlp import MLP

# Optimizers whose update of one number depends on its neighbors in the tensor: on theta they
# would mix parameters, and copies.
_NOT_ELEMENTWISE = ("LBFGS", "Adafactor", "Muon", "SparseAdam")
# Optimizers whose update is not proportional to the learning rate.
_NOT_LINEAR_IN_LR = ("Rprop", "ASGD")
# Optimizers that torch can run as one kernel, on any device: up to a third of a small step.
_FUSED = ("Adam", "AdamW")


class Stack:
    """N copies of one architecture as a single tensor of parameters.

    Parameters
    ----------
    modules : sequence of torch.nn.Module
        The copies: same architecture, any values. Parameters with ``requires_grad=False`` and
        buffers are not part of ``theta``; they are stored once where all copies agree.
    device : str or torch.device, optional
        Where to compute. Default: where the first module is.
    dtype : torch.dtype, optional
        Floating-point type of parameters and buffers. Default: that of the modules.
    chunk : int, optional
        How many copies are evaluated at once. Bounds memory; changes no result.

    Attributes
    ----------
    theta : torch.Tensor, shape [N, P]
        All trainable parameters; row i is copy i, in the order of ``named_parameters()``.
    n, size : int
        Number of copies N and of parameters per copy P.

    Raises
    ------
    ValueError
        If there is no module, the architectures differ, a layer keeps running statistics
        (batch norm: its state is not a parameter), or nothing is trainable.
    """

    def __init__(self, modules, device=None, dtype=None, chunk=None):
        modules = list(modules)
        if not modules:
            raise ValueError("a stack needs at least one module")
        if chunk is not None and chunk < 1:
            raise ValueError(f"chunk must be a positive number of copies, got {chunk}")
        for name, layer in modules[0].named_modules():
            if getattr(layer, "track_running_stats", False):
                raise ValueError(
                    f"layer {name or type(layer).__name__!r} ({type(layer).__name__}) keeps running"
                    " statistics, which a stack cannot train: use GroupNorm or LayerNorm, or "
                    "track_running_stats=False"
                )
        trainable = [{k: p for k, p in m.named_parameters() if p.requires_grad} for m in modules]
        fixed = [
            {k: p for k, p in m.named_parameters() if not p.requires_grad} | dict(m.named_buffers())
            for m in modules
        ]
        self.shapes = {k: p.shape for k, p in trainable[0].items()}
        if not self.shapes:
            raise ValueError("the module has no trainable parameter")
        for i, (own, rest) in enumerate(zip(trainable, fixed)):
            if {k: p.shape for k, p in own.items()} != self.shapes or rest.keys() != fixed[
                0
            ].keys():
                raise ValueError(f"module {i} has another architecture than module 0")
        dtypes = {p.dtype for p in trainable[0].values()}
        if dtype is None and len(dtypes) > 1:
            raise ValueError(f"parameters of mixed type {dtypes}: pass dtype=")
        first = next(iter(trainable[0].values()))
        self.device = torch.device(device) if device is not None else first.device
        self.dtype = dtype or first.dtype
        self.chunk = chunk
        self.n = len(modules)
        self.size = sum(s.numel() for s in self.shapes.values())
        self.theta = torch.stack(
            [torch.cat([p.detach().reshape(-1) for p in own.values()]) for own in trainable]
        ).to(self.device, self.dtype)
        # Buffers and frozen parameters: one tensor where the copies agree, stacked where not.
        self._shared, self._stacked = {}, {}
        for k, b in fixed[0].items():
            kind = self.dtype if b.is_floating_point() else b.dtype
            if all(torch.equal(b, rest[k]) for rest in fixed[1:]):
                self._shared[k] = b.detach().clone().to(self.device, kind)
            else:
                values = torch.stack([rest[k].detach() for rest in fixed])
                self._stacked[k] = values.to(self.device, kind)
        self.base = copy.deepcopy(modules[0]).train()
        self._places = _places(self.base)
        self.base.to(self.device, self.dtype)
        tied = {}
        for holder, key, name in self._places:  # `to` copies a buffer of two layers twice
            holder[key] = tied.setdefault(name, holder[key])
        self._layers = _perceptron(self.base)
        self._inputs = next(iter(self.shapes.values()))[1:]  # of a perceptron's first layer

    @classmethod
    def init(cls, build, seeds, **options):
        """Build one copy per seed, each exactly as it would be alone.

        Parameters
        ----------
        build : callable
            Takes nothing and returns a module, e.g. ``lambda: MLP([64, 64, 10])``.
        seeds : sequence of int
            Copy i equals ``torch.manual_seed(seeds[i]); build()``. The global generator is left
            as it was.
        **options
            Passed to `Stack`: device, dtype, chunk.
        """
        modules = []
        for seed in seeds:
            with seeded(seed):
                modules.append(build())
        return cls(modules, **options)

    def params(self, theta=None):
        """Return the parameters by name, as views of `theta`: name -> [N, *shape]."""
        theta = self.theta if theta is None else theta
        parts = theta.split([s.numel() for s in self.shapes.values()], dim=1)
        return {k: p.unflatten(1, s) for (k, s), p in zip(self.shapes.items(), parts)}

    def flat(self, params):
        """Put parameters by name (each [N, *shape]) into one tensor [N, P]: undoes `params`."""
        return torch.cat([params[k].flatten(1) for k in self.shapes], dim=1)

    def grad(self, loss, *batch, theta=None, out=None):
        """Return the gradient of every copy's own loss.

        Parameters
        ----------
        loss : callable
            ``loss(model, *batch)`` for ONE copy, as one would write it for an ordinary module;
            returns a scalar tensor.
        *batch : torch.Tensor, shape [N, ...]
            Copy i gets row i of each. Use ``x.expand(N, *x.shape)`` for data that all share.
        theta : torch.Tensor, shape [N, P], optional
            Where to differentiate. Default: the stack's own parameters.
        out : torch.Tensor, shape [N, P], optional
            Filled with the gradient and returned, which saves an allocation.

        Returns
        -------
        grad : torch.Tensor, shape [N, P]
        loss : torch.Tensor, shape [N]
        """
        theta = self.theta if theta is None else theta
        out = torch.empty_like(theta) if out is None else out
        if loss is class_loss and self._layers and batch[0].shape[2:] == self._inputs:
            rows = self._chunks(theta, batch)
            return out, torch.cat([self._grad_by_hand(*batch, theta, out, r) for r in rows])
        self._mode(True)
        one = vmap(
            lambda p, rest, *b: loss(_Model(self, p, rest), *b),
            randomness="different",
        )
        losses = []
        for rows in self._chunks(theta, batch):
            params = {k: v.detach().requires_grad_() for k, v in self.params(theta[rows]).items()}
            with torch.enable_grad():
                value = one(params, self._rest(rows), *(b[rows] for b in batch))
                # Copies share nothing: the gradient of the sum is that of each copy's own loss.
                parts = torch.autograd.grad(
                    value.sum(), list(params.values()), allow_unused=True, materialize_grads=True
                )
            for view, part in zip(self.params(out[rows]).values(), parts):
                view.copy_(part)
            losses.append(value.detach())
        return out, torch.cat(losses)

    @torch.no_grad()
    def map(self, f, *batch, theta=None):
        """Evaluate ``f(model, *batch)`` for every copy, in evaluation mode, without gradients.

        Parameters
        ----------
        f : callable
            For one copy; returns a tensor (or a tuple or dict of tensors).
        *batch : torch.Tensor, shape [N, ...]
            As in `grad`.

        Returns
        -------
        torch.Tensor, shape [N, ...] (or a tuple or dict of such)
        """
        theta = self.theta if theta is None else theta
        self._mode(False)
        one = vmap(lambda p, rest, *b: f(_Model(self, p, rest), *b), randomness="different")
        parts = [
            one(self.params(theta[rows]), self._rest(rows), *(b[rows] for b in batch))
            for rows in self._chunks(theta, batch)
        ]
        return parts[0] if len(parts) == 1 else _concatenate(parts)

    def __call__(self, x, shared=False, theta=None):
        """Return the outputs of all copies, in evaluation mode, without gradients.

        Parameters
        ----------
        x : torch.Tensor, shape [N, B, ...], or [B, ...] with ``shared=True``
            Inputs of each copy, or one set of inputs for all.

        Returns
        -------
        torch.Tensor, shape [N, B, ...]
        """
        theta = self.theta if theta is None else theta
        if shared:
            return self.map(lambda model: model(x), theta=theta)
        return self.map(lambda model, x: model(x), x, theta=theta)

    def accuracy(self, x, y, theta=None):
        """Return every copy's share of right labels on one data set, shape [N].

        Parameters
        ----------
        x : torch.Tensor, shape [B, ...]
        y : torch.Tensor, shape [B]
            Class indices.
        """
        return self.map(lambda model: (model(x).argmax(-1) == y).to(self.dtype).mean(), theta=theta)

    def optimizer(self, kind, lr, **options):
        """Make a `torch.optim` optimizer of ``theta``.

        Parameters
        ----------
        kind : type
            An elementwise optimizer class: SGD, Adam, AdamW, RMSprop, Adagrad, ...
        lr : float or sequence of N floats
            One learning rate for all copies, or one per copy. With one per copy the optimizer
            itself runs at rate 1 and each copy takes its fraction of the step, which is the same
            for every optimizer whose update is proportional to its rate; schedulers multiply it.
        **options
            Passed to `kind`.

        Raises
        ------
        ValueError
            If the optimizer is not elementwise, or has an update that is not proportional to the
            rate while `lr` has one value per copy, or `lr` has a length other than N.
        """
        if kind.__name__ in _NOT_ELEMENTWISE:
            raise ValueError(
                f"{kind.__name__} is not elementwise: on stacked parameters it would mix copies. "
                "Use SGD, Adam, AdamW, RMSprop or Adagrad, or train the copies one by one"
            )
        if kind.__name__ in _FUSED and not {"fused", "foreach", "differentiable"} & options.keys():
            options["fused"] = True
        kind = light(kind)
        rate = torch.as_tensor(lr, dtype=self.dtype, device=self.device)
        if rate.ndim == 0:
            return kind([self.theta], lr=float(lr), **options)
        if rate.shape != (self.n,):
            raise ValueError(f"lr must be one number or {self.n} of them, got {list(rate.shape)}")
        if kind.__name__ in _NOT_LINEAR_IN_LR:
            raise ValueError(f"{kind.__name__} has no learning rate per copy: pass one number")
        optimizer = kind([self.theta], lr=1.0, **options)
        before = torch.empty_like(self.theta)

        def remember(*_):
            before.copy_(self.theta)

        def take_fraction(*_):
            torch.lerp(before, self.theta, rate[:, None], out=self.theta)

        optimizer.register_step_pre_hook(remember)
        optimizer.register_step_post_hook(take_fraction)
        return optimizer

    def step(self, optimizer, loss, *batch, max_norm=None):
        """Take one optimizer step on all copies and return their losses, shape [N].

        With `max_norm`, every copy's gradient is clipped to that norm first.
        """
        self.theta.grad, value = self.grad(loss, *batch, out=self.theta.grad)
        if max_norm is not None:
            clip(self.theta.grad, max_norm)
        optimizer.step()
        return value

    def train(self, loss, batches, optimizer, max_norm=None):
        """Take one step per batch.

        Parameters
        ----------
        loss : callable
            As in `grad`.
        batches : iterable of tuples of torch.Tensor
            Each tensor of shape [N, ...].
        optimizer : torch.optim.Optimizer
            From `optimizer`.
        max_norm : float, optional
            Clip every copy's gradient to this norm.

        Returns
        -------
        torch.Tensor, shape [T, N]
            The losses before each step.
        """
        return torch.stack(
            [self.step(optimizer, loss, *batch, max_norm=max_norm) for batch in batches]
        )

    def module(self, i, theta=None):
        """Return copy i as an ordinary module of its own."""
        module = copy.deepcopy(self.base)
        own = {k: v[i] for k, v in (self.params(theta) | self._stacked).items()}
        with torch.no_grad():
            for k, v in [*module.named_parameters(), *module.named_buffers()]:
                if k in own:
                    v.copy_(own[k])
        return module

    def _chunks(self, theta, batch):
        n = len(theta)
        for i, b in enumerate(batch):
            if b.ndim == 0 or len(b) != n:
                raise ValueError(
                    f"batch tensor {i} has shape {list(b.shape)}; its first axis must be the "
                    f"{n} copies (use .expand({n}, ...) for shared data)"
                )
        if self._stacked and n != self.n:
            raise ValueError(f"copies differ in their buffers: theta must have {self.n} rows")
        width = self.chunk or n
        return [slice(a, min(a + width, n)) for a in range(0, n, width)]

    @torch.no_grad()
    def _grad_by_hand(self, x, y, theta, out, rows):
        """Fill rows of `out` with the gradients of `class_loss` of perceptrons; return losses."""
        x, y, params = x[rows], y[rows, None], self.params(theta[rows])
        hidden = [x.mT]  # inputs of every layer, [N, width, B]: samples last, where rows are longer
        for w, b in self._layers:
            if len(hidden) > 1:
                hidden[-1].relu_()
            inputs = params[w], hidden[-1]
            hidden.append(torch.baddbmm(params[b][..., None], *inputs) if b else torch.bmm(*inputs))
        logits = hidden.pop()
        logits -= logits.amax(1, keepdim=True)
        chosen = logits.gather(1, y)
        error = logits.exp_()
        total = error.sum(1, keepdim=True)
        error /= total
        error.scatter_add_(1, y, error.new_full((), -1.0).expand(y.shape))
        error /= y.shape[-1]
        grads = self.params(out[rows])
        for (w, b), inputs in zip(reversed(self._layers), reversed(hidden)):
            grads[w].copy_(error @ inputs.mT)
            if b:
                grads[b].copy_(error.sum(2))
            if inputs is not hidden[0]:
                error = (params[w].mT @ error).mul_(inputs > 0)
        return (total.log() - chosen).mean((1, 2))

    def _rest(self, rows):
        return {k: v[rows] for k, v in self._stacked.items()}

    def _mode(self, training):
        if self.base.training != training:  # in every step, asking every layer would be slow
            self.base.train(training)


class _Model:
    """One copy inside `vmap`: called like the module that it stands for; `params` are by name."""

    def __init__(self, stack, params, rest):
        self._base, self._places, self.params = stack.base, stack._places, params
        self._tensors = params | rest | stack._shared

    def __call__(self, *args, **kwargs):
        # What `torch.func.functional_call` does, but it looks every tensor up by name in every
        # call: with the question of `_mode`, about a tenth of a small step.
        own = [holder[key] for holder, key, _ in self._places]
        try:
            for holder, key, name in self._places:
                holder[key] = self._tensors[name]
            return self._base(*args, **kwargs)
        finally:
            for (holder, key, _), tensor in zip(self._places, own):
                holder[key] = tensor


def _places(module):
    """Where a module holds its tensors: (dict, key, name), several for a tensor that is shared."""
    names = {id(t): k for k, t in [*module.named_buffers(), *module.named_parameters()]}
    return [
        (holder, key, names[id(t)])
        for part in module.modules()
        for holder in (part._parameters, part._buffers)
        for key, t in holder.items()
        if t is not None
    ]


def _concatenate(parts):
    if isinstance(parts[0], dict):
        return {k: torch.cat([p[k] for p in parts]) for k in parts[0]}
    if isinstance(parts[0], tuple):
        return tuple(torch.cat(column) for column in zip(*parts))
    return torch.cat(parts)


def cross_entropy(logits, target):
    """Return the mean cross-entropy of class indices: ``F.cross_entropy``, but fast under `vmap`.

    PyTorch's own kernel falls apart into many small operations when it is vectorized over copies,
    and then costs as much as the rest of a small model's step.

    Parameters
    ----------
    logits : torch.Tensor, shape [..., classes]
    target : torch.Tensor, shape [...]
        Class indices.

    Returns
    -------
    torch.Tensor, scalar
    """
    chosen = logits.gather(-1, target.unsqueeze(-1)).squeeze(-1)
    return (logits.logsumexp(-1) - chosen).mean()


def class_loss(model, x, y):
    """Return the mean cross-entropy of ``model(x)``, [B, classes], for class indices y [B].

    The usual loss of a classifier, for `Stack.grad` and what builds on it: a function known by
    name, because its gradient is written out for perceptrons.
    """
    return cross_entropy(model(x), y)


@contextlib.contextmanager
def seeded(seed):
    """Draw on the CPU as after ``torch.manual_seed(seed)``; then all is as it was before.

    `torch.manual_seed` also seeds devices that are not in use, and notes a stack trace for each:
    a millisecond a call in a notebook.

    Parameters
    ----------
    seed : int
    """
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)


@functools.cache
def light(kind):
    """Return a `torch.optim` class that does the same without importing torch's compiler.

    The import takes a second, for two decorators that matter only to compiled code.

    Parameters
    ----------
    kind : type
        Such as ``torch.optim.Adam``.
    """

    class Light(kind):
        def add_param_group(self, group):
            self.param_groups.append({**self.defaults, **group, "params": list(group["params"])})

        @torch.no_grad()
        def step(self):
            return inspect.unwrap(kind.step)(self)

    Light.__name__ = Light.__qualname__ = kind.__name__
    return Light


def _perceptron(module):
    """Return the names (weight, bias or None) of a ReLU perceptron's layers; [] for others."""
    layers = dict(module.named_children())
    linear, between = list(layers.values())[::2], list(layers.values())[1::2]
    plain = (
        type(module) in (torch.nn.Sequential, MLP)
        and len(layers) % 2 == 1
        and all(type(m) is torch.nn.Linear for m in linear)
        and all(type(m) is torch.nn.ReLU for m in between)
        and all(p.requires_grad for p in module.parameters())
    )
    if not plain:
        return []
    return [
        (f"{name}.weight", None if m.bias is None else f"{name}.bias")
        for name, m in zip(list(layers)[::2], linear)
    ]


def clip(grad, max_norm):
    """Scale every copy's gradient to a norm of at most `max_norm`, in place.

    Parameters
    ----------
    grad : torch.Tensor, shape [..., P]
        The norm is taken over the last axis: copies do not share one.
    max_norm : float
    """
    norm = torch.linalg.vector_norm(grad, dim=-1, keepdim=True)
    return grad.mul_((max_norm / (norm + 1e-6)).clamp_(max=1.0))


__all__ = ["Stack", "class_loss", "clip", "cross_entropy", "light", "seeded"]
