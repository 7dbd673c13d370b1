"""Small reference architectures, and tiny trained checkpoints.

No model keeps running statistics, so `miniature.stack.Stack` can stack them all.
"""

from .checkpoints import load, meta, names
from .cnn import CNN
from .gpt import GPT, KVCache, rope
from .mlp import MLP
from .resnet import ResNet, resnet18_gn
from .vit import ViT

__all__ = [
    "CNN",
    "GPT",
    "MLP",
    "KVCache",
    "ResNet",
    "ViT",
    "load",
    "meta",
    "names",
    "resnet18_gn",
    "rope",
]
