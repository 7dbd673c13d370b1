r"""AdaLoRA: one budget of ranks for all matrices, spent where the loss is sensitive.

Zhang, Chen, Bukharin, Karampatziakis, He, Cheng, Chen and Zhao, "AdaLoRA: Adaptive Budget
Allocation for Parameter-Efficient Fine-Tuning", ICLR 2023, arXiv:2303.10512.

Every matrix k gets an update in the form of a singular value decomposition,

    W_k = W_k0 + P_k Lambda_k Q_k,   P [m, r], Lambda = diag(lambda), Q [r, n],

with P, Q Gaussian (0.02) and lambda = 0 at first; what is minimized is

    loss + gamma sum_k (|P'P - I|_F^2 + |QQ' - I|_F^2).

Every entry w has a sensitivity, its running mean and its running uncertainty,

    I(t) = |w dL/dw|,   Ibar(t) = beta1 Ibar(t-1) + (1 - beta1) I(t),
    Ubar(t) = beta2 Ubar(t-1) + (1 - beta2) |I(t) - Ibar(t)|,   s = Ibar Ubar,

and triplet i of matrix k the score

    S_ki = s(lambda_ki) + mean_j s(P_k,ji) + mean_j s(Q_k,ij).

The one idea: after an optimizer step, keep lambda_ki only where S_ki is among the top b(t) over all
matrices, and set the others to zero. P and Q stay, so that a triplet can come back. The budget b
falls from b0, all triplets, to bT along a cubic (`budget_at`).

As in the authors' code, I(t) takes the gradient at t and the entry after the step; the paper writes
both at t. Rivals: `Doublets`, the same on LoRA's B A without orthogonality; `score=`, other scores;
`best_ranks`, what is best possible for a sum of squared errors.
"""

import torch

from .baselines import LoRA
from .engine import LowRank, positive

SCORES = ("product", "smoothed", "sensitivity", "magnitude")


def budget_at(t, b0, bT, steps, first, last):
    """Return the budget b(t), rounded down: b0, then a cubic, then bT.

    Parameters
    ----------
    t : int
        Optimizer step, 1 ... `steps`.
    b0 : int
    bT : torch.Tensor or int
    steps, first, last : int
        T, t_i and t_f: the budget falls between steps t_i and T - t_f.

    Returns
    -------
    torch.Tensor of int
    """
    bT = torch.as_tensor(bT, dtype=torch.float64)
    if t <= first:
        return torch.full_like(bT, b0).long()
    if t >= steps - last:
        return bT.long()
    left = 1 - (t - first) / (steps - last - first)
    return ((b0 - bT) * left**3 + bT).long()


def best_ranks(spectra, budget):
    """Return the best ranks under a total budget, and the energy that they leave.

    By Eckart and Young a matrix loses least when it keeps its largest singular values, so for a sum
    of squared errors the largest ones over all matrices are kept.

    Parameters
    ----------
    spectra : torch.Tensor, shape [..., K, k]
        Singular values of K matrices.
    budget : int

    Returns
    -------
    ranks : torch.Tensor of int, shape [..., K]
    floor : torch.Tensor, shape [...]
        The sum of the squares of the others.
    """
    kept = top(spectra.flatten(-2), torch.as_tensor(budget)).view_as(spectra)
    return kept.sum(-1), (spectra.square() * ~kept).sum((-2, -1))


def top(scores, budget):
    """Mark the `budget` [...] largest of scores [..., R]; of equal ones the earlier."""
    place = scores.argsort(dim=-1, descending=True, stable=True).argsort(-1)
    return place < budget.to(scores.device)[..., None]


class AdaLoRA(LowRank):
    """Triplets P, lambda, Q for every matrix, and a falling budget for all of them.

    Parameters
    ----------
    rank : int
        r of every matrix at first, at most min(m, n).
    budget : int or sequence of int, optional
        bT: triplets of all matrices together at the end; one number, or one per copy of a stack.
        Default: two thirds of those at first.
    steps, first, last, every : int
        T, t_i, t_f and Delta T: steps in all, before the first masking, after the last choice, and
        between two maskings. In the last t_f steps the choice stays.
    gamma : float
        Weight of the penalty.
    betas : (float, float)
        beta1 and beta2.
    score : {"product", "smoothed", "sensitivity", "magnitude"} or sequence of these
        s = Ibar Ubar; Ibar; I; or S = |lambda|. One for all, or one per copy of a stack.
    targets : sequence of str, optional
    """

    def __init__(
        self,
        rank=12,
        budget=None,
        steps=1000,
        first=0,
        last=0,
        every=1,
        gamma=0.1,
        betas=(0.85, 0.85),
        score="product",
        targets=None,
    ):
        super().__init__(targets)
        positive(rank=rank)
        if min(first, last) < 0 or first + last + 2 > steps:
            raise ValueError(
                f"the budget needs steps to fall in: first = {first}, last = {last} leave too "
                f"few of steps = {steps}"
            )
        if every < 1:
            raise ValueError(f"every must be a positive number of steps, not {every}")
        if gamma < 0 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"needs gamma >= 0 and betas in [0, 1), got {gamma} and {betas}")
        for name in [score] if isinstance(score, str) else score:
            if name not in SCORES:
                raise ValueError(f"score must be one of {', '.join(SCORES)}, not {name!r}")
        self.rank, self.budget = rank, budget
        self.steps, self.first, self.last, self.every = steps, first, last, every
        self.gamma, self.betas, self.score = gamma, betas, score

    def prepare(self, model, layers):
        shapes = [layer.weight.flatten(1).shape for layer in layers.values()]
        b0 = sum(min(self.rank, *shape) for shape in shapes)
        budget = torch.as_tensor(self.target(b0))
        if budget.min() < 1 or budget.max() > b0:
            raise ValueError(
                f"the budget must lie in 1..{b0}, the triplets at first; got {budget.tolist()}"
            )
        return layers

    def target(self, b0):
        """Return bT."""
        return 2 * b0 // 3 if self.budget is None else self.budget

    def init(self, layer):
        r = min(self.rank, layer.m, layer.n)
        layer.parameter("P", 0.02 * torch.randn(layer.m, r))
        layer.parameter("lam", torch.zeros(r))
        layer.parameter("Q", 0.02 * torch.randn(r, layer.n))

    def factors(self, layer):
        return layer.P, layer.lam, layer.Q

    def penalty(self, params):
        """Return gamma sum_k R(P_k, Q_k), R = |P'P - I|_F^2 + |QQ' - I|_F^2."""
        if self.gamma == 0:
            return None
        total = 0.0
        for p in params.values():
            for frame in (p["P"].mT, p["Q"]):  # rows that should be orthonormal
                eye = torch.eye(len(frame), dtype=frame.dtype, device=frame.device)
                total = total + (frame @ frame.mT - eye).square().sum()
        return self.gamma * total

    def update(self, params, grads, t):
        """Score all triplets; at a masking step set lambda to zero but for the top b(t)."""
        end = self.steps - self.last
        if t == 1:
            self.I, self.mean, self.spread = {}, {}, {}
        if t < end:
            self.observe(params, grads)
        if t <= self.first or (t < end and t % self.every):
            return
        if t <= end:  # later on the last choice stays
            self.kept = self.choose([self.triplets(layer, p) for layer, p in params.items()], t)
        for p, kept in zip(params.values(), self.kept):
            self.mask(p, kept)

    def choose(self, scores, t):
        """Mark the top b(t) of the scores of all layers, [N, r] each."""
        widths = [S.shape[-1] for S in scores]
        b0 = sum(widths)
        b = budget_at(t, b0, self.target(b0), self.steps, self.first, self.last)
        return top(torch.cat(scores, -1), b).split(widths, -1)

    def observe(self, params, grads):
        """Bring I, Ibar and Ubar of every entry up to date."""
        beta1, beta2 = self.betas
        for layer, p in params.items():
            for name, w in p.items():
                key = layer, name
                I = self.I[key] = (w * grads[layer][name]).abs_()
                if key not in self.mean:
                    self.mean[key], self.spread[key] = torch.zeros_like(I), torch.zeros_like(I)
                # a.lerp_(b, c) is a = (1 - c) a + c b
                mean = self.mean[key].lerp_(I, 1 - beta1)
                self.spread[key].lerp_((I - mean).abs_(), 1 - beta2)

    def entries(self, score, layer, name):
        """Return the score s of every entry of a parameter."""
        key = layer, name
        if score == "product":
            return self.mean[key] * self.spread[key]
        return self.mean[key] if score == "smoothed" else self.I[key]

    def triplets(self, layer, p):
        """Return the scores S [N, r] of a layer's triplets."""
        if isinstance(self.score, str):
            return self.ranked_by(self.score, layer, p)
        S = {score: self.ranked_by(score, layer, p) for score in set(self.score)}
        return torch.stack([S[score][i] for i, score in enumerate(self.score)])

    def ranked_by(self, score, layer, p):
        """Return S [N, r] by one of the scores."""
        if score == "magnitude":
            return p["lam"].abs()
        s = {name: self.entries(score, layer, name) for name in p}
        return s["lam"] + s["P"].mean(-2) + s["Q"].mean(-1)

    def mask(self, p, kept):
        """Set lambda to zero where a triplet is not kept [N, r]."""
        p["lam"].mul_(kept)


class Doublets(AdaLoRA):
    """LoRA's B A pruned in the same way: column i of B and row i of A become zero together.

    There is no lambda to score and to set to zero, and no penalty. The gradients of a doublet of
    zeros are zero: nothing but an optimizer's momentum brings it back.
    """

    def init(self, layer):
        r = min(self.rank, layer.m, layer.n)
        B, A = LoRA(r).initial(layer)
        layer.parameter("B", B)
        layer.parameter("A", A)

    def factors(self, layer):
        return layer.B, layer.A

    def penalty(self, params):
        return None

    def ranked_by(self, score, layer, p):
        if score == "magnitude":
            return p["B"].norm(dim=-2) * p["A"].norm(dim=-1)
        return self.entries(score, layer, "B").mean(-2) + self.entries(score, layer, "A").mean(-1)

    def mask(self, p, kept):
        p["B"].mul_(kept[..., None, :])
        p["A"].mul_(kept[..., None])
