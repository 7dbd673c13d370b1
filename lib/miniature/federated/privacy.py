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

    def epsilon(self, rounds, rate, delta, vectors=1):
        """Return epsilon of (epsilon, delta)-privacy for one client, by Renyi accounting.

        Parameters
        ----------
        rounds : int
            Server steps.
        rate : float
            Probability that a client takes part in a round (Poisson sampling).
        delta : float
        vectors : int
            Vectors that a method sends a round, each clipped and noised.

        Raises
        ------
        ModuleNotFoundError
            If Opacus, which keeps the account, is not installed: ``pip install opacus``.
        """
        try:
            from opacus.accountants import RDPAccountant
        except ModuleNotFoundError as e:
            raise ModuleNotFoundError(
                "the privacy account needs Opacus: pip install opacus", name=e.name
            ) from None
        if not 0 < rate <= 1 or not 0 < delta < 1:
            raise ValueError(f"rate and delta must lie in (0, 1], got {rate} and {delta}")
        if self.noise == 0:
            return float("inf")
        account = RDPAccountant()
        account.history = [(self.noise, rate, rounds * vectors)]
        return account.get_epsilon(delta=delta)
