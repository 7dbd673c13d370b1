r"""FOT: average as usual, then remove from the update what old tasks would notice.

Bakman, Yaldiz, Ezzeldin and Avestimehr, *Federated Orthogonal Training: Mitigating Global
Catastrophic Forgetting in Continual Federated Learning*, ICLR 2024.

A linear layer maps its inputs, the columns of $X \in R^{d \times n}$, to $WX$. Where an update has
$\Delta W\, X = 0$, the layer treats them as before. The server keeps for every layer an
orthonormal basis $O \in R^{d \times r}$ of the inputs of old tasks, empty at the first one.

Training: clients run plain local SGD. With $\bar W$ the mean of their models, the server projects

$$G = W - \bar W, \qquad G \leftarrow G - G\,OO^T, \qquad W \leftarrow W - G.$$

End of a task, one extra round: client i computes the inputs $X_i$ of the layer under the final
model and sends a sketch of what is new in them, with its own random $\Gamma_i$, and a ratio:

$$R_i = X_i - OO^T X_i, \qquad Y_i = R_i \Gamma_i,\ \Gamma_i \in R^{n_i \times s},\qquad
r_i = \|R_i\|^2 / \|X_i\|^2.$$

The server needs only sums: $Y = \sum_i Y_i = U S V^T$ and $r = \sum_i n_i r_i / \sum_i n_i$. It
adds the first k columns of U, k the smallest number that leaves at most a share $1 - \epsilon$ of
the inputs' energy:

$$\|S_{1:k}\|^2 / \|Y\|^2 > \epsilon' = (r - (1 - \epsilon)) / r, \qquad
O \leftarrow \mathrm{qr}([O, U_{:k}]).$$

Biases are a column of W: every input gets a last entry 1, so that they are protected too.

The one idea: sketches of disjoint data add up to a sketch of all the data, and a projection of the
mean holds whatever clients sent. So GPM (Saha, Garg and Roy, ICLR 2021), which needs all layer
inputs in one place, becomes federated, at no work for clients but the extra round.

Rivals: GPM itself, centralized; federated EWC (Kirkpatrick et al., PNAS 2017), a quadratic penalty
on moving weights that mattered.
"""

import numpy as np
import torch
from torch import nn

from ..stack import class_loss
from .engine import Method, per_run


class FOT(Method):
    """Federated orthogonal training of one task.

    Parameters
    ----------
    lr, eta : float or sequence of S floats
        Local and server rates.
    stack : miniature.stack.Stack, optional
        Knows where the layers stand in theta. Needed with a basis.
    basis : dict of str to torch.Tensor, optional
        For every protected layer, by its module's name, an orthonormal basis of what old tasks
        use: [S, d, d], where the columns beyond a run's rank are zero. Where d is the number of
        the layer's inputs without the constant, its bias is not protected. Default: none, as
        during the first task, where FOT is FedAvg.

    Raises
    ------
    ValueError
        If a basis is given without a stack, or does not fit its layer.
    """

    def __init__(self, lr, eta=1.0, stack=None, basis=None):
        super().__init__(lr, eta)
        self.stack, self.basis = stack, basis or {}
        if self.basis and stack is None:
            raise ValueError("a basis needs a stack, to find the layers in theta")
        for name, O in self.basis.items():
            module = linear(stack, name)
            d = module.in_features
            fits = (d, d + 1) if module.bias is not None else (d,)
            if O.shape[-1] != O.shape[-2] or O.shape[-1] not in fits:
                raise ValueError(f"layer {name!r}: basis of {list(O.shape)}, d must be in {fits}")

    def server_step(self, theta, message, c):
        G = -per_run(self.eta, theta) * c.mean(message["delta"])
        return theta - self.project(G)

    def project(self, G):
        """Return G - G O O^T in every protected layer of G [S, P]; the rest stays as it is."""
        if not self.basis:
            return G
        params = self.stack.params(G)
        for name, O in self.basis.items():
            inputs = params[f"{name}.weight"].shape[-1]
            W = layer(params, name)[..., : O.shape[-1]]
            W = W - (W @ O) @ O.mT
            params[f"{name}.weight"] = W[..., :inputs]
            if W.shape[-1] > inputs:
                params[f"{name}.bias"] = W[..., inputs]
        return self.stack.flat(params)


def layer(params, name):
    """Return a layer's weights and, as a last column, its biases: [S, outputs, d]."""
    weight, bias = params[f"{name}.weight"], params.get(f"{name}.bias")
    return weight if bias is None else torch.cat([weight, bias[..., None]], -1)


def linear(stack, name):
    """Return a linear module by its name.

    Raises
    ------
    ValueError
        If the stack has no linear module of that name.
    """
    module = dict(stack.base.named_modules()).get(name)
    if not isinstance(module, nn.Linear):
        raise ValueError(f"no linear layer {name!r}: it is {type(module).__name__}")
    return module


def layer_inputs(stack, theta, x, layers):
    """Run the models and return what goes into their layers.

    Parameters
    ----------
    stack : miniature.stack.Stack
    theta : torch.Tensor, shape [S, P]
    x : torch.Tensor, shape [S, n, ...]
    layers : sequence of str
        Names of linear modules.

    Returns
    -------
    dict of str to torch.Tensor, shape [S, n, d]
        One input a row, with a last entry 1 where the layer has a bias.
    """
    seen, modules = {}, {name: linear(stack, name) for name in layers}

    def inputs(model, x):
        model(x)
        return dict(seen)

    hooks = [
        module.register_forward_pre_hook(lambda _, h, name=name: seen.__setitem__(name, h[0]))
        for name, module in modules.items()
    ]
    try:
        found = stack.map(inputs, x, theta=theta)
    finally:
        for hook in hooks:
            hook.remove()
    return {
        name: h if modules[name].bias is None else torch.cat([h, torch.ones_like(h[..., :1])], -1)
        for name, h in found.items()
    }


def sketches(X, O, sizes, s, seeds, stream=0):
    """Return what each client sends about one layer: Y_i = R_i Gamma_i and r_i.

    Parameters
    ----------
    X : torch.Tensor, shape [S, n, d]
        Inputs of the layer, one a row, client after client.
    O : torch.Tensor, shape [S, d, d]
        Orthonormal or zero columns.
    sizes : torch.Tensor of int, shape [S, clients]
        Number of rows of each client; rows beyond their sum are padding.
    s : int
        Width of the sketch.
    seeds : sequence of S ints
        Draw Gamma, standard normal. Runs with equal seeds share it.
    stream : int
        Another one gives independent draws.

    Returns
    -------
    Y : torch.Tensor, shape [S, clients, d, s]
    ratio : torch.Tensor, shape [S, clients]
        r_i = ||R_i||^2 / ||X_i||^2.

    Raises
    ------
    ValueError
        If the width is not positive, there are not S seeds, or clients have more rows than X.
    """
    if s < 1 or len(seeds) != len(X):
        raise ValueError(f"s must be positive, got {s}; {len(seeds)} seeds for {len(X)} runs")
    if sizes.sum(1).max() > X.shape[1]:
        raise ValueError(f"clients hold {int(sizes.sum(1).max())} rows, X only {X.shape[1]}")
    R = X - (X @ O) @ O.mT
    Y, ratio = X.new_empty(*sizes.shape, X.shape[2], s), X.new_empty(sizes.shape)
    draws = {seed: np.random.default_rng([seed, 3, stream]) for seed in seeds}
    gammas = {
        seed: torch.from_numpy(draw.standard_normal((X.shape[1], s), dtype=np.float32)).to(X)
        for seed, draw in draws.items()
    }
    for run, (seed, own) in enumerate(zip(seeds, sizes.tolist())):
        start = 0
        for i, n in enumerate(own):
            mine = slice(start, start + n)
            torch.mm(R[run, mine].T, gammas[seed][mine], out=Y[run, i])
            ratio[run, i] = R[run, mine].square().sum() / X[run, mine].square().sum()
            start += n
    return Y, ratio


def expand(O, Y, ratio, epsilon):
    """Return the basis with the main directions of Y added to it.

    Parameters
    ----------
    O : torch.Tensor, shape [S, d, d]
        Orthonormal columns, as many as the run's rank, then zero ones.
    Y : torch.Tensor, shape [S, d, s]
        The sum of the clients' sketches (or the pooled residual itself, as in GPM).
    ratio : torch.Tensor, shape [S]
        r, the share of the inputs' energy that O leaves.
    epsilon : float or sequence of S floats
        Share of the energy to keep, in (0, 1]. At 1, all of Y's span.

    Returns
    -------
    torch.Tensor, shape [S, d, d]

    Raises
    ------
    ValueError
        If epsilon is outside (0, 1].
    """
    keep = torch.as_tensor(epsilon, dtype=Y.dtype, device=Y.device).expand(len(Y))
    if not ((keep > 0) & (keep <= 1)).all():
        raise ValueError(f"epsilon must lie in (0, 1], got {epsilon}")
    d = O.shape[1]
    # A run that diverged adds nothing, and does not stop the others of its stack.
    Y = torch.where(Y.isfinite().all(-1).all(-1)[:, None, None], Y, 0)
    U, S, _ = torch.linalg.svd(Y, full_matrices=False)
    energy = S.square()
    # What is left beyond the first 0, 1, 2, ... directions, as a share of all of the inputs. So
    # the test reads left < 1 - epsilon: the same as the share kept > epsilon', but exact at 1.
    left = energy.flip(1).cumsum(1).flip(1) / energy.sum(1, keepdim=True) * ratio[:, None]
    noise = (100 * torch.finfo(Y.dtype).eps) ** 2
    new = left >= (1 - keep).clamp(min=noise)[:, None]
    columns = torch.cat([O, U * new[:, None]], -1)
    filled = columns.square().sum(1) > 0.5
    first = filled.int().argsort(dim=1, descending=True, stable=True)[:, :d]
    Q, _ = torch.linalg.qr(columns.gather(2, first[:, None].expand(-1, d, -1)))
    return Q * filled.gather(1, first)[:, None]


def rank(O):
    """Return the number of directions in each basis [S, d, d]: shape [S]."""
    return (O.square().sum(-2) > 0.5).sum(-1)


def end_of_task(stack, theta, x, sizes, basis, *, layers, epsilon, seeds, s=None, t=0):
    """Run the extra round of a task: sketches from all clients, and the larger basis.

    Parameters
    ----------
    stack : miniature.stack.Stack
    theta : torch.Tensor, shape [S, P]
        The final models of the task.
    x : torch.Tensor, shape [S, n, ...]
        The task's samples, client after client.
    sizes : torch.Tensor of int, shape [S, clients]
        Number of samples of each client.
    basis : dict of str to torch.Tensor
        As in `FOT`; empty after the first task.
    layers : sequence of str
        Names of the linear modules to protect.
    epsilon : float or sequence of S floats
        As in `expand`.
    seeds : sequence of S ints
    s : int, optional
        Width of the sketches. Default: each layer's d.
    t : int
        Number of the task; another one draws other sketches.

    Returns
    -------
    dict of str to torch.Tensor, shape [S, d, d]
    """
    out, share = {}, sizes.to(theta) / sizes.to(theta).sum(1, keepdim=True)  # n_i / n
    for i, (name, X) in enumerate(layer_inputs(stack, theta, x, layers).items()):
        d = X.shape[-1]
        O = basis.get(name, X.new_zeros(len(X), d, d))
        Y, ratio = sketches(X, O, sizes, s or d, seeds, stream=t * len(layers) + i)
        out[name] = expand(O, Y.sum(1), (share * ratio).sum(1), epsilon)
    return out


class GPM(FOT):
    """Gradient projection memory: each local step follows the projected gradient.

    With one client that holds all data, and the basis of `pooled`, this is the centralized method.
    (FOT's server then projects once more, which changes nothing.)
    """

    def local_step(self, x, grad, c):
        g = grad(x)
        if self.basis:
            if g.shape[1] > 1:
                raise ValueError(f"GPM is centralized: it needs one client, not {g.shape[1]}")
            g = self.project(g[:, 0])[:, None]
        return x - c.lr * g


def pooled(stack, theta, x, basis, *, layers, epsilon):
    """Return the larger basis from the inputs themselves, as GPM: no sketch, no client.

    Parameters and the result are those of `end_of_task`.
    """
    out = {}
    for name, X in layer_inputs(stack, theta, x, layers).items():
        O = basis.get(name, X.new_zeros(len(X), X.shape[-1], X.shape[-1]))
        R = X - (X @ O) @ O.mT
        ratio = R.square().sum((1, 2)) / X.square().sum((1, 2))
        out[name] = expand(O, R.mT, ratio, epsilon)
    return out


class FedEWC(Method):
    """FedAvg on f_i(x) + lam/2 sum_j F_j (x_j - a_j)^2.

    The step on the penalty is implicit, x <- (x + lr lam F a) / (1 + lr lam F), so that it is
    stable for every lam.

    Parameters
    ----------
    lr, lam : float or sequence of S floats
    anchor, fisher : torch.Tensor, shape [S, P], optional
        The model after the last task, a, and the summed `fisher` of all old tasks, F. Default:
        none, as during the first task, where this is FedAvg.
    """

    def __init__(self, lr, lam=1.0, anchor=None, fisher=None):
        super().__init__(lr)
        self.lam, self.anchor, self.fisher = lam, anchor, fisher

    def local_step(self, x, grad, c):
        x = x - c.lr * grad(x)
        if self.fisher is None:
            return x
        pull = c.lr * per_run(self.lam, x) * self.fisher[:, None]
        return (x + pull * self.anchor[:, None]) / (1 + pull)


def fisher(stack, theta, x, y):
    """Return the mean squared gradient of single samples, the diagonal of the empirical Fisher.

    Parameters
    ----------
    stack : miniature.stack.Stack
    theta : torch.Tensor, shape [S, P]
    x, y : torch.Tensor, shapes [S, n, ...] and [S, n]

    Returns
    -------
    torch.Tensor, shape [S, P]
    """
    n = x.shape[1]
    rows = theta.repeat_interleave(n, 0)
    g, _ = stack.grad(class_loss, x.flatten(0, 1)[:, None], y.flatten()[:, None], theta=rows)
    return g.square_().unflatten(0, (-1, n)).mean(1)
