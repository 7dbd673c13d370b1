r"""EVA: start LoRA from the directions in which a layer's inputs vary, and rank layers by them.

Paischer, Hauzenberger, Schmied, Alkin, Deisenroth and Hochreiter, "One Initialization to Rule them
All: Fine-tuning via Explained Variance Adaptation", arXiv:2410.07170; details from the authors'
code (`peft.tuners.lora.eva`).

Before training, mini-batches of the new data go through the frozen model. Every layer follows the
singular value decomposition of its inputs X, one row x in R^n a token, from batch to batch (Ross et
al., 2008): with singular values S and right-singular vectors V [k, n] of the N rows seen, their
mean mu, and a batch of b rows with mean nu, V and S become those of the rows

    diag(S) V,    X - nu,    sqrt(N b / (N + b)) (mu - nu)

cut to k = rho r components. Component i has converged when cos(V_i before, V_i after) >= tau. The
explained-variance ratios of all layers l,

    xi_{l,i} = S_{l,i}^2 / (squared distances of all rows seen from their mean),

are pooled, and the budget, r a layer, goes to the largest: r_l = #{i : xi_{l,i} among the top}.

The one idea: A_l = V_{l,1:r_l}, B_l = 0. At B = 0 the gradient of B is s G' X A', with G the
gradients of the outputs; and of all orthonormal A this one keeps most of the variance of the inputs
(Ky Fan: tr A Sigma A' is at most the sum of the r largest eigenvalues of Sigma).

Rivals: `OLoRA`, which takes both factors from a QR decomposition of the weight; LoRA and PiSSA.
Steps of an optimizer such as Adam are comparable between factorizations only if their A are equally
long: `UnitRows` scales the rows of any A to norm 1, which EVA's have.
"""

import itertools
import math
import warnings

import torch
from torch import nn

from .baselines import LoRA, PiSSA

LIMIT = 1000  # batches after which components that still turn are taken to turn for ever


class IncrementalSVD:
    """The first k right-singular vectors of rows that come in batches, of many streams at once.

    Parameters
    ----------
    k : int
        Components.
    center : bool
        Whether to take off the mean of the rows seen: principal components (as the authors' code
        does), or the singular vectors of the rows as they are.

    Attributes
    ----------
    V : torch.Tensor, shape [..., k, n]
        Right-singular vectors as rows, the largest entry of each positive.
    S : torch.Tensor, shape [..., k]
    ratio : torch.Tensor, shape [..., k]
        Explained-variance ratios xi.
    cosine : torch.Tensor, shape [..., k]
        Of each vector before and after the last batch; 0 after the first one.
    batches, seen : int
        Batches and rows so far.
    """

    def __init__(self, k, center=True):
        self.k, self.center, self.batches, self.seen = k, center, 0, 0

    def update(self, X):
        """Take in a batch of rows [..., b, n]."""
        b, n = X.shape[-2:]
        if self.k > n or b + self.seen < self.k:
            raise ValueError(f"{self.k} components need as many inputs and rows, not {[b, n]}")
        N, X = self.seen, X.double()
        nu = X.mean(-2, keepdim=True) if self.center else torch.zeros_like(X[..., :1, :])
        X = X - nu
        if N == 0:
            self.mean, self.total, self.V, self.S = nu, 0.0, X[..., :0, :], X[..., :0, 0]
        drift = math.sqrt(N * b / (N + b)) * (self.mean - nu)
        self.total = self.total + X.square().sum((-2, -1)) + drift.square().sum((-2, -1))
        rows = torch.cat([self.S[..., None] * self.V, X, drift], -2)
        _, S, V = torch.linalg.svd(rows, full_matrices=False)
        S, V = S[..., : self.k], V[..., : self.k, :]
        V = V * V.gather(-1, V.abs().argmax(-1, keepdim=True)).sign()
        self.cosine = (V * self.V).sum(-1) if N > 0 else torch.zeros_like(S)
        self.mean = (N * self.mean + b * nu) / (N + b)
        self.seen, self.batches, self.S, self.V = N + b, self.batches + 1, S, V
        self.ratio = S.square() / self.total[..., None]


def redistribute(ratios, budget):
    """Return the ranks r_l [L] of layers: how many of the `budget` largest ratios are theirs.

    Parameters
    ----------
    ratios : sequence of torch.Tensor
        Explained-variance ratios of every layer, falling. Of equal ones the earlier layer's count
        first.
    budget : int
    """
    sizes = torch.tensor([len(xi) for xi in ratios])
    if not 0 <= budget <= sizes.sum():
        raise ValueError(f"the budget must lie in 0..{sizes.sum()}, not {budget}")
    owner = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
    top = torch.cat(list(ratios)).argsort(descending=True, stable=True)[:budget]
    return torch.bincount(owner[top.cpu()], minlength=len(sizes)).tolist()


class EVA(LoRA):
    """LoRA whose A are the main directions of the layers' inputs, with ranks to match.

    After `attach` the object tells what it found: `ranks` {layer: r_l}, `svds` {layer:
    IncrementalSVD} and `passes`, the number of forward passes that it took.

    Parameters
    ----------
    rank : int
        r, the mean rank; the budget is r times the number of layers.
    data : sequence of torch.Tensor or of (torch.Tensor, torch.Tensor)
        Batches of the model's inputs, read again and again until the components have converged.
        With a second tensor, of type bool and of the shape of a layer's inputs without their last
        axis, only its true tokens count (padding, tokens without a loss). Empty: no activations
        are seen, and A and ranks are LoRA's, with a warning.
    rho : float
        At least 1; no layer gets more than rho r ranks. 1: r everywhere.
    tau : float
        Least cosine between a component before and after a batch for it to have converged.
    whiten : bool
        Divide component i by the square root of its singular value.
    center : bool
        As in `IncrementalSVD`.
    adjust : bool
        s = alpha / r in all layers; otherwise alpha / r_l.
    alpha : float, optional
        Default: r.
    room : int, optional
        Ranks to allocate in every layer, those beyond r_l zero, as in `LoRA`; layers of rank 0 are
        adapted then too, for copies of other ranks to fit into one stack. By default they are not.
    targets : sequence of str, optional
    """

    kinds = default = (nn.Linear,)

    def __init__(
        self,
        rank=8,
        data=(),
        rho=2.0,
        tau=0.99,
        whiten=False,
        center=True,
        adjust=True,
        alpha=None,
        room=None,
        targets=None,
    ):
        super().__init__(rank, alpha, room=room, targets=targets)
        if not rho >= 1:
            raise ValueError(f"rho must be at least 1, not {rho}")
        if not 0 <= tau < 1:
            raise ValueError(f"tau must lie in [0, 1), not {tau}")
        most = round(rho * rank)
        if room is not None and room < most:
            raise ValueError(f"a layer may get rho r = {most} ranks, more than the room {room}")
        self.data, self.rho, self.tau = data, rho, tau
        self.whiten, self.center, self.adjust = whiten, center, adjust

    def prepare(self, model, layers):
        if not len(self.data):
            warnings.warn("EVA got no data: A and ranks are those of LoRA", stacklevel=3)
            self.ranks, self.svds, self.passes = {}, {}, 0
            return layers
        for path, layer in layers.items():
            if self.rank > layer.in_features:
                raise ValueError(
                    f"rank {self.rank} exceeds the {layer.in_features} inputs of layer {path!r}"
                )
        training = model.training
        model.eval()
        first = self._look(model, layers, self.data[0], {})
        leader = {}  # layers with the same inputs (q, k, v) share one decomposition
        for path, x in first.items():
            same = [q for q in leader.values() if torch.equal(first[q], x)]
            leader[path] = same[0] if same else path
        most = round(self.rho * self.rank)
        self.svds = {
            path: IncrementalSVD(min(most, layers[path].in_features), self.center)
            for path in dict.fromkeys(leader.values())
        }
        self.ranks = {path: self.svds[leader[path]].k for path in layers}
        for passes, batch in enumerate(itertools.cycle(self.data), 1):
            turning = {path: layers[path] for path in self._turning(leader)}
            if not turning:
                break
            if passes > LIMIT:
                raise ValueError(f"no convergence in {LIMIT} batches: {', '.join(turning)}")
            self._look(model, turning, batch, self.svds)
            if not all(svd.batches for svd in self.svds.values()):
                if passes == len(self.data):
                    raise ValueError(f"all batches have fewer than {most} rows, rho r components")
                continue
            ratios = [self.svds[leader[path]].ratio for path in layers]
            found = redistribute(ratios, self.rank * len(layers))
            self.ranks = dict(zip(layers, found))
        model.train(training)
        self.passes = passes  # with the first one, which compared inputs
        self.svds = {path: self.svds[leader[path]] for path in layers}
        return {path: m for path, m in layers.items() if self.ranks[path] or self.room}

    def _turning(self, leader):
        """Layers that have a component which they need, or one that shares it, and that turns."""
        need = dict.fromkeys(self.svds, 0)
        for path, rank in self.ranks.items():
            need[leader[path]] = max(need[leader[path]], rank)
        return [
            path
            for path, svd in self.svds.items()
            if not svd.batches or not (svd.cosine[: need[path]] >= self.tau).all()
        ]

    def _look(self, model, layers, batch, svds):
        """Pass one batch through the model; update `svds`, or return the layers' inputs."""
        x, mask = batch if isinstance(batch, (tuple, list)) else (batch, None)
        device = next(model.parameters()).device
        seen = {}

        def hook(path):
            def look(module, args):
                rows = args[0].flatten(0, -2) if mask is None else args[0][mask.to(device)]
                if path not in svds:
                    seen[path] = rows
                elif len(rows) >= svds[path].k:  # smaller batches are skipped
                    svds[path].update(rows)

            return look

        handles = [m.register_forward_pre_hook(hook(path)) for path, m in layers.items()]
        try:
            with torch.no_grad():
                model(x.to(device))
        finally:
            for handle in handles:
                handle.remove()
        return seen

    def initial(self, layer):
        if layer.name not in self.svds:
            return super().initial(layer)
        svd, r = self.svds[layer.name], self.ranks[layer.name]
        A = svd.V[:r] / svd.S[:r, None].sqrt() if self.whiten else svd.V[:r]
        return A.new_zeros(layer.m, r), A

    def init(self, layer):
        super().init(layer)
        if not self.adjust:
            layer.s.mul_(self.rank / max(self.ranks.get(layer.name, self.rank), 1))


class Orthonormal(LoRA):
    """LoRA from a random A with orthonormal rows: EVA but for the data. Needs r <= n."""

    def initial(self, layer):
        Q = torch.linalg.qr(torch.randn(layer.n, self.rank, dtype=torch.float64))[0]
        return Q.new_zeros(layer.m, self.rank), Q.T


class OLoRA(PiSSA):
    """LoRA that starts from W0 = Q R (Büyükakyüz 2024): B = Q_r, A = R_r, W0 - s B A frozen."""

    def initial(self, layer):
        Q, R = torch.linalg.qr(layer.W.detach().double())
        return Q[:, : self.rank], R[: self.rank]


class UnitRows:
    """Mixed into a kind of LoRA: rows of A scaled to norm 1, columns of B inversely."""

    kinds = default = (nn.Linear, nn.Conv2d)

    def initial(self, layer):
        B, A = super().initial(layer)
        norm = A.norm(dim=1)
        return B * norm, A / norm[:, None]


class UnitLoRA(UnitRows, LoRA):
    """LoRA from a random A with rows of norm 1; by themselves they come at about 1/sqrt(3)."""


class UnitPiSSA(UnitRows, PiSSA):
    """PiSSA with its product split so that the rows of A have norm 1."""


class UnitOLoRA(UnitRows, OLoRA):
    """OLoRA with its product split so that the rows of A have norm 1."""
