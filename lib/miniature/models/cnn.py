"""A small convolutional network for small images."""

from torch import nn


class CNN(nn.Sequential):
    """Blocks of 3x3 convolution, ReLU and 2x2 max-pooling, then one linear layer.

    There is no normalization, so no running state. Weights and biases start as torch draws them:
    uniform in ``±1/sqrt(fan_in)``.

    Parameters
    ----------
    shape : (int, int, int)
        Of one image: channels, height, width; ``(1, 28, 28)``, ``(1, 14, 14)``, ``(1, 8, 8)``, ...
    classes : int
    channels : sequence of int
        Output channels of each block. A block halves height and width, rounding down.

    Raises
    ------
    ValueError
        If the image is too small for that many blocks; when called, if an input has another shape.
    """

    def __init__(self, shape, classes, channels=(16, 32)):
        depth, height, width = shape
        blocks = len(channels)
        if min(height, width) >> blocks < 1:
            raise ValueError(
                f"images of {height}x{width} pixels cannot be halved {blocks} times: "
                f"give fewer than {blocks} channels"
            )
        layers = []
        for fan_in, fan_out in zip([depth, *channels], channels):
            layers += [nn.Conv2d(fan_in, fan_out, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        features = [depth, *channels][-1] * (height >> blocks) * (width >> blocks)
        super().__init__(*layers, nn.Flatten(), nn.Linear(features, classes))
        self.shape = (depth, height, width)

    def forward(self, x):
        """Map images x [B, channels, height, width] to logits [B, classes]."""
        if x.ndim != 4 or tuple(x.shape[1:]) != self.shape:
            raise ValueError(
                f"input of shape {list(x.shape)}: this CNN reads {['B', *self.shape]}"
                " (load images with flat=False, or x.view(-1, *model.shape))".replace("'", "")
            )
        return super().forward(x)
