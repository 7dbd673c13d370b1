r"""LoRA-SB: freeze the frames of the first step of full fine-tuning, train what lies between them.

Ponkshe, Singhal, Gorbunov, Tumanov, Horváth and Vepakomma, "Initialization using Update
Approximation is a Silver Bullet for Extremely Efficient Low-Rank Fine-Tuning", arXiv:2411.19557;
details from the authors' code. As in LoRA-XS only R [r, r] is trained:

    W' = W0 + s B R A,   B [m, r] and A [r, n] frozen.

The one idea: B, A and R(0) are the best rank-r copy of the first step that full fine-tuning would
take. With a few samples x_1 .. x_k and the learning rate eta that training will use,

    dW = -eta sgn(sum_i grad_W L(W0; x_i))   (Adam's first step; for SGD: without the sign),
    dW = U S V',   B = U_r,   A = V_r',   R(0) = S_r / s.

W0 is not corrected: the model starts a (projected) step ahead of it.

Why these frames: if R moves by -grad_R = -s B' G A', where G = grad_W L, then W' moves by
-s^2 B B' G A' A. The move of R whose effect on W' is closest to G is

    g* = (1 / s^2) (B'B)^-1 grad_R (A A')^-1,

and for orthonormal frames and s = 1 that is grad_R itself: nothing is left to be scaled.

Rivals: LoRA-XS (frames of W0) and others in `baselines`; random frames are `LoRASB` without data.
"""

import torch

from ..stack import class_loss
from .baselines import LoRAXS, svd


class LoRASB(LoRAXS):
    """Train R between the singular frames of the first step.

    Parameters
    ----------
    rank : int
        r; no more than min(m, n) of a layer are used.
    lr : float
        eta: the learning rate of the first step of training. It sets R(0), not the frames.
    data : tuple of torch.Tensor, optional
        A small sample of the training data, as `loss` takes it. Default: none. Nothing is known
        about the task then: the frames are random orthonormal ones and R(0) = 0, which is the
        ablation that LoRA-SB is compared with, not LoRA-SB.
    loss : callable
        ``loss(model, *data)``, a mean over samples.
    sign : bool
        Whether dW is Adam's first step (the sign of the gradient) or that of SGD.
    alpha : float, optional
        s = alpha / r. Default: r, so that s = 1.
    room : int, optional
        Allocate so many directions, of which those beyond `rank` are zero and, having zero
        gradients, stay so: copies of different rank then fit into one stack.
    targets : sequence of str, optional

    Raises
    ------
    ValueError
        If rank, lr or alpha is not positive, rank exceeds the room, data is no tuple, or (at
        `attach`) a layer gets no gradient.
    """

    def __init__(
        self,
        rank=8,
        lr=1e-3,
        data=None,
        loss=class_loss,
        sign=True,
        alpha=None,
        room=None,
        targets=None,
    ):
        super().__init__(rank, alpha, room=room, targets=targets)
        for name, value in (("lr", lr), ("alpha", alpha)):
            if value is not None and value <= 0:
                raise ValueError(f"{name} must be positive, not {value}")
        if data is not None and not isinstance(data, tuple):
            raise ValueError(f"data must be a tuple such as (x, y), not {type(data).__name__}")
        self.lr, self.data, self.loss, self.sign = lr, data, loss, sign
        self.starts_at_base = data is None

    def prepare(self, model, layers):
        """Take one backward pass in training mode; each gradient goes as soon as it is used."""
        self.frames = {}
        if self.data is None:
            return layers
        kept = {k: b.clone() for k, b in model.named_buffers()}  # batch norm updates its own
        modes = {module: module.training for module in model.modules()}
        weights = {path: layer.weight.requires_grad_(True) for path, layer in layers.items()}

        def use(weight):
            found = self.first_step(weight.grad.flatten(1))
            self.frames.update({path: found for path, w in weights.items() if w is weight})
            weight.grad = None

        own = set(weights.values())  # a weight may serve two layers
        hooks = [weight.register_post_accumulate_grad_hook(use) for weight in own]
        try:
            with torch.enable_grad():
                self.loss(model.train(), *self.data).backward(inputs=list(own))
        finally:
            for hook in hooks:
                hook.remove()
            for weight in own:
                weight.requires_grad_(False)
            for module, mode in modes.items():
                module.training = mode
            for k, b in model.named_buffers():
                b.copy_(kept[k])
        for path in layers:
            if path not in self.frames or not self.frames[path][1].any():
                raise ValueError(f"the loss gives no gradient to layer {path!r}")
        return layers

    def first_step(self, G):
        """Return U_r [m, r], S_r [r] and V_r' [r, n] of dW = -eta sgn(G) for a gradient [m, n]."""
        U, S, Vh = svd(-self.lr * (G.sign() if self.sign else G))
        return U[:, : self.rank], S[: self.rank], Vh[: self.rank]

    def init(self, layer):
        if self.data is None:
            r = min(self.rank, layer.m, layer.n)
            U, V = (torch.randn(k, r, dtype=torch.float64) for k in (layer.m, layer.n))
            U, V = torch.linalg.qr(U)[0], torch.linalg.qr(V)[0]
            S, Vh = torch.zeros(r), V.T
        else:
            U, S, Vh = self.frames.pop(layer.name)
        self.put(layer, U, torch.diag(S / self.s), Vh)


def closest(grad, B, A, s=1.0):
    """Return g* [..., r, r]: the move of R whose effect s B g* A on W is closest to G.

    Parameters
    ----------
    grad : torch.Tensor, shape [..., r, r]
        The gradient in R, s B' G A'.
    B, A : torch.Tensor, shape [..., m, r] and [..., r, n]
        Any frames of full rank.
    s : float
    """
    left = torch.linalg.solve(B.mT @ B, grad)
    return torch.linalg.solve(A @ A.mT, left, left=False) / s**2


def capture(G, B, A):
    """Return the share of |G|^2 that R can follow, [...]: that of g~ = B g* A.

    Parameters
    ----------
    G : torch.Tensor, shape [..., m, n]
    B, A : torch.Tensor, shape [..., m, r] and [..., r, n]
        Any frames of full rank: what counts is what they span.
    """
    move = B @ closest(B.mT @ G @ A.mT, B, A) @ A
    return move.square().sum((-2, -1)) / G.square().sum((-2, -1))
