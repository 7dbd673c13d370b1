"""Residual networks for 32x32 images, with group normalization.

He et al., "Deep Residual Learning for Image Recognition", CVPR 2016 (basic blocks, Section 4.2's
3x3 stem for small images); Wu & He, "Group Normalization", ECCV 2018. Batch normalization keeps
running statistics, which neither a stack of models nor federated averaging can treat as parameters.
"""

from torch import nn


class ResNet(nn.Module):
    """Stages of basic blocks; each stage after the first halves the image, doubles the channels.

    Convolutions and the linear layer start as torch draws them, uniform in ``±1/sqrt(fan_in)``;
    normalizations start at scale 1, shift 0.

    Parameters
    ----------
    blocks : sequence of int
        Basic blocks in each stage: ``[2, 2, 2, 2]`` is ResNet-18.
    classes : int
    width : int
        Channels of the first stage: a power of two or a multiple of 16, since normalization takes
        16 channels a group, or all where there are fewer.

    Raises
    ------
    ValueError
        When called, if an input is not [B, 3, 32, 32].
    """

    def __init__(self, blocks, classes, width=64):
        super().__init__()
        stages, fan_in = [], width
        for i, count in enumerate(blocks):
            fan_out = width * 2**i
            for j in range(count):
                stages.append(Block(fan_in, fan_out, stride=2 if i and j == 0 else 1))
                fan_in = fan_out
        self.stem = nn.Sequential(conv(3, width), norm(width), nn.ReLU())
        self.blocks = nn.Sequential(*stages)
        self.head = nn.Linear(fan_in, classes)

    def forward(self, x):
        """Map images x [B, 3, 32, 32] to logits [B, classes]."""
        if x.ndim != 4 or tuple(x.shape[1:]) != (3, 32, 32):
            raise ValueError(f"input of shape {list(x.shape)}: a ResNet reads [B, 3, 32, 32]")
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class Block(nn.Module):
    """A basic block: ``relu(x + F(x))``, F two normalized 3x3 convolutions."""

    def __init__(self, fan_in, fan_out, stride):
        super().__init__()
        self.residual = nn.Sequential(
            conv(fan_in, fan_out, stride=stride),
            norm(fan_out),
            nn.ReLU(),
            conv(fan_out, fan_out),
            norm(fan_out),
        )
        self.skip = nn.Identity()
        if stride != 1 or fan_in != fan_out:
            self.skip = nn.Sequential(
                nn.Conv2d(fan_in, fan_out, 1, stride=stride, bias=False), norm(fan_out)
            )

    def forward(self, x):
        return (self.skip(x) + self.residual(x)).relu()


def conv(fan_in, fan_out, stride=1):
    return nn.Conv2d(fan_in, fan_out, 3, stride=stride, padding=1, bias=False)


def norm(channels):
    return nn.GroupNorm(max(1, channels // 16), channels)


def resnet18_gn(classes, width=64):
    """Return a ResNet-18 with group normalization for 32x32 color images: see `ResNet`.

    11.2 million parameters at the paper's width of 64.
    """
    return ResNet([2, 2, 2, 2], classes, width)
