r"""FedSpeed: a prox-term whose bias is corrected, with a perturbed gradient.

Sun, Shen, Huang, Ding and Tao, *FedSpeed: Larger Local Interval, Less Communication Round, and
Higher Generalization Accuracy*, ICLR 2023, Algorithm 1.

With $x_{i,0} = x^t$, every active client takes K steps

$$g_1 = \nabla f_i(x_{i,k}), \qquad g_2 = \nabla f_i(x_{i,k} + \rho g_1), \qquad
\tilde g = (1-\alpha) g_1 + \alpha g_2,$$
$$x_{i,k+1} = x_{i,k} - \eta_l \big(\tilde g - \hat g_i + \tfrac1\lambda (x_{i,k} - x^t)\big),$$

then updates its prox-correction and uploads one vector,

$$\hat g_i \leftarrow \hat g_i - \tfrac1\lambda (x_{i,K} - x^t), \qquad
\hat x_i = x_{i,K} - \lambda \hat g_i, \qquad x^{t+1} = \tfrac1{|S|} \sum_{i \in S} \hat x_i.$$

The one idea: a prox-term alone keeps clients near $x^t$ but moves the fixed point; the dual
$\hat g_i$, an exponential average of the client's own past gradients, cancels that pull.
"""

from .baselines import ascend
from .engine import Method, per_run


class FedSpeed(Method):
    """FedSpeed as the paper states it.

    Parameters
    ----------
    lr : float or sequence of S floats
        Local rate eta_l.
    lam : float or sequence of S floats
        Prox parameter lambda (the weight of the prox-term is 1/lambda), > lr for stability.
    rho : float or sequence of S floats
        Length of the ascent step; 0 saves the second gradient.
    alpha : float
        Weight of the perturbed gradient in the quasi-gradient.
    normalize : bool
        Ascend by rho g_1 / ||g_1|| (as the released code does) instead of rho g_1.

    Raises
    ------
    ValueError
        If alpha is outside [0, 1].
    """

    is_sgd = False

    def __init__(self, lr, lam=10.0, rho=0.1, alpha=1.0, normalize=False):
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha must be between 0 and 1, got {alpha}")
        super().__init__(lr)
        self.lam, self.rho, self.alpha, self.normalize = lam, rho, alpha, normalize

    def client_state(self, zeros):
        return {"g_hat": zeros}

    def quasi_gradient(self, x, grad):
        """Return (1 - alpha) g_1 + alpha g_2, both on the same batch: [S, A, P]."""
        g1 = grad(x)
        rho = per_run(self.rho, x)
        if self.alpha == 0 or (rho == 0).all():
            return g1
        g2 = grad(ascend(x, g1, rho) if self.normalize else x + rho * g1)
        return (1 - self.alpha) * g1 + self.alpha * g2

    def local_step(self, x, grad, c):
        g = self.quasi_gradient(x, grad)
        return x - c.lr * (g - c.client["g_hat"] + (x - c.x0) / per_run(self.lam, x))

    def update_dual(self, x, c):
        """Set g_hat_i <- g_hat_i - (x_{i,K} - x^t) / lambda."""
        c.client["g_hat"] = c.client["g_hat"] - (x - c.x0) / per_run(self.lam, x)

    def message(self, x, c):
        self.update_dual(x, c)
        return {"delta": c.send(x - per_run(self.lam, x) * c.client["g_hat"] - c.x0)}


class FedSpeedReleased(FedSpeed):
    """The server of the released code: mean of the active x_{i,K} plus the mean of ALL clients'
    h_i = -lambda g_hat_i. Under full participation it equals `FedSpeed`."""

    def server_state(self, zeros):
        return {"h": zeros}

    def message(self, x, c):
        self.update_dual(x, c)
        return {"delta": c.send(x - c.x0)}

    def server_step(self, theta, message, c):
        # h_i grows by x_{i,K} - x^t, which the server can tell from what it received.
        c.server["h"] = c.server["h"] + c.sum(message["delta"]) / c.n_clients
        return theta + c.mean(message["delta"]) + c.server["h"]
