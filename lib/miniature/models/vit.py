"""A small vision transformer."""

import torch
from torch import nn

from .gpt import Block


class ViT(nn.Module):
    """Patches as tokens, pre-norm blocks with attention in both directions, mean pooling.

    Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021, with the mean of all tokens in
    place of a class token (their Appendix D.3). The blocks are those of `GPT`: layers
    ``attention.q``, ``k``, ``v``, ``out`` and ``mlp.0``, ``mlp.2``.

    Parameters
    ----------
    shape : (int, int, int)
        Of one image: channels, height, width.
    classes : int
    patch : int
        Side of a patch, in pixels; divides height and width.
    dim, layers, heads : int
        Width, number of blocks, attention heads; `heads` divides `dim`.

    Raises
    ------
    ValueError
        If sizes do not divide; when called, if an input has another shape.
    """

    def __init__(self, shape, classes, patch=2, dim=32, layers=2, heads=4):
        super().__init__()
        channels, height, width = self.shape = tuple(shape)
        if height % patch or width % patch:
            raise ValueError(f"patches of {patch} pixels do not tile images of {height}x{width}")
        if dim % heads:
            raise ValueError(f"dim={dim} is not a multiple of heads={heads}")
        self.patch = patch
        self.embed = nn.Linear(channels * patch**2, dim)
        self.position = nn.Parameter(0.02 * torch.randn(height * width // patch**2, dim))
        self.blocks = nn.ModuleList(
            Block(dim, heads, rotate=False, causal=False) for _ in range(layers)
        )
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, classes)

    def forward(self, x):
        """Map images x [B, channels, height, width] to logits [B, classes]."""
        if x.ndim != 4 or tuple(x.shape[1:]) != self.shape:
            raise ValueError(
                f"input of shape {list(x.shape)}: this ViT reads {['B', *self.shape]}"
                " (load images with flat=False, or x.view(-1, *model.shape))".replace("'", "")
            )
        B, channels, height, width = x.shape
        p = self.patch
        tiles = x.reshape(B, channels, height // p, p, width // p, p)
        tokens = tiles.permute(0, 2, 4, 1, 3, 5).reshape(B, -1, channels * p * p)
        h = self.embed(tokens) + self.position
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h).mean(-2))
