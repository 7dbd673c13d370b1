"""A multilayer perceptron."""

from itertools import pairwise

from torch import nn


class MLP(nn.Sequential):
    """Linear layers with an activation between them, none after the last.

    Weights and biases start as `torch.nn.Linear` draws them: uniform in ``±1/sqrt(fan_in)``.

    Parameters
    ----------
    sizes : sequence of int
        Widths of the input, of every hidden layer and of the output: ``[64, 64, 10]`` has one
        hidden layer.
    activation : type
        Class of the activation module, such as `torch.nn.ReLU` or `torch.nn.Tanh`.

    Raises
    ------
    ValueError
        If there are fewer than two sizes or one is not positive; when called, if the last axis of
        the input is not ``sizes[0]``.
    """

    def __init__(self, sizes, activation=nn.ReLU):
        sizes = list(sizes)
        if len(sizes) < 2 or min(sizes) < 1:
            raise ValueError(
                f"sizes={sizes}: an MLP needs an input and an output width, all at least 1"
            )
        layers = []
        for fan_in, fan_out in pairwise(sizes):
            layers += [nn.Linear(fan_in, fan_out), activation()]
        super().__init__(*layers[:-1])

    def forward(self, x):
        """Map x [..., sizes[0]] to [..., sizes[-1]]."""
        if x.ndim == 0 or x.shape[-1] != self[0].in_features:
            raise ValueError(
                f"input of shape {list(x.shape)}: this MLP reads [..., {self[0].in_features}]; "
                "flatten images first, x.flatten(1)"
            )
        return super().forward(x)
