"""The classics that papers compare with, each as its difference from the engine's FedAvg.

- FedAvg: McMahan et al., *Communication-Efficient Learning of Deep Networks from Decentralized
  Data*, AISTATS 2017.
- FedProx: Li et al., *Federated Optimization in Heterogeneous Networks*, MLSys 2020.
- SCAFFOLD: Karimireddy et al., *SCAFFOLD: Stochastic Controlled Averaging for Federated Learning*,
  ICML 2020, Algorithm 1 with option II.
- FedDyn: Acar et al., *Federated Learning Based on Dynamic Regularization*, ICLR 2021, Algorithm 1.
- FedSAM: Qu et al., *Generalized Federated Learning via Sharpness Aware Minimization*, ICML 2022.
"""

import torch

from .engine import Method, per_run

FedAvg = Method


class FedProx(Method):
    """FedAvg with a pull back to the received model: f_i(x) + mu/2 ||x - x^t||^2.

    Parameters
    ----------
    lr, mu : float or sequence of S floats
    """

    def __init__(self, lr, mu):
        super().__init__(lr)
        self.mu = mu

    def local_step(self, x, grad, c):
        return x - c.lr * (grad(x) + per_run(self.mu, x) * (x - c.x0))


class Scaffold(Method):
    """Control variates: local steps follow g - c_i + c.

    The server moves by the mean of the local changes, and c by the sum of the control changes over
    all clients. A client sends two vectors.

    Parameters
    ----------
    lr : float or sequence of S floats
    """

    def client_state(self, zeros):
        return {"c": zeros}

    def server_state(self, zeros):
        return {"c": zeros}

    def local_step(self, x, grad, c):
        return x - c.lr * (grad(x) - c.client["c"] + c.server["c"][:, None])

    def message(self, x, c):
        c_new = c.client["c"] - c.server["c"][:, None] + (c.x0 - x) / (c.K * c.lr)
        change = c_new - c.client["c"]
        c.client["c"] = c_new
        return {"x": x - c.x0, "c": change}

    def server_step(self, theta, message, c):
        c.server["c"] = c.server["c"] + message["c"].sum(1) / c.n_clients
        return theta + message["x"].mean(1)


class FedDyn(Method):
    """Dynamic regularization: f_i(x) - <g_i, x> + alpha/2 ||x - x^t||^2.

    After the round g_i <- g_i - alpha (x_i - x^t); the server keeps h, the sum of these changes
    over all clients, and sets x^{t+1} = mean of the active x_i - h / alpha.

    Parameters
    ----------
    lr, alpha : float or sequence of S floats
    """

    def __init__(self, lr, alpha):
        super().__init__(lr)
        self.alpha = alpha

    def client_state(self, zeros):
        return {"g": zeros}

    def server_state(self, zeros):
        return {"h": zeros}

    def local_step(self, x, grad, c):
        return x - c.lr * (grad(x) - c.client["g"] + per_run(self.alpha, x) * (x - c.x0))

    def message(self, x, c):
        c.client["g"] = c.client["g"] - per_run(self.alpha, x) * (x - c.x0)
        return {"x": x}

    def server_step(self, theta, message, c):
        moved = (message["x"] - theta[:, None]).sum(1, keepdim=True) / c.n_clients
        alpha = per_run(self.alpha, theta)
        c.server["h"] = c.server["h"] - (alpha * moved)[:, 0]
        return message["x"].mean(1) - (c.server["h"][:, None] / alpha)[:, 0]


class FedSAM(Method):
    """Local sharpness-aware steps: the gradient is taken at x + rho g / ||g||, on the same batch.

    Parameters
    ----------
    lr, rho : float or sequence of S floats
    """

    def __init__(self, lr, rho):
        super().__init__(lr)
        self.rho = rho

    def local_step(self, x, grad, c):
        return x - c.lr * grad(ascend(x, grad(x), per_run(self.rho, x)))


def ascend(x, g, rho):
    """Return x + rho g / ||g||, the point of highest loss within rho to first order."""
    return x + rho * g / (torch.linalg.vector_norm(g, dim=-1, keepdim=True) + 1e-12)
