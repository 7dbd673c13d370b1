"""Differential privacy for what clients send: clipping, Gaussian noise, and the account of it."""

import torch


class Gaussian:
    """Client-level privacy: each sent vector is clipped, the mean gets Gaussian noise.

    McMahan et al., *Learning Differentially Private Recurrent Language Models*, ICLR 2018.

    Parameters
    ----------
    clip : float
        Largest norm C of a sent vector.
    noise : float
        Noise multiplier z: the sum of what n clients sent gets noise of standard deviation z C,
        so their mean gets z C / n.

    Raises
    ------
    ValueError
        If clip is not positive or noise is negative.
    """

    def __init__(self, clip, noise):
        if clip <= 0 or noise < 0:
            raise ValueError(f"needs clip > 0 and noise >= 0, got {clip} and {noise}")
        self.clip_norm, self.noise = clip, noise

    def clip(self, v):
        """Return v [..., P] scaled to a norm of at most `clip`."""
        norm = torch.linalg.vector_norm(v, dim=-1, keepdim=True)
        return v * (self.clip_norm / norm.clamp(min=1e-30)).clamp(max=1.0)

    def add_noise(self, mean, n, draw):
        """Return the mean [S, P] of n [S] clients with its noise."""
        z = draw.normal(mean[:, None])[:, 0]
        return mean + z * (self.noise * self.clip_norm) / n.clamp(min=1)[:, None]
