"""Parameter-efficient fine-tuning: methods that adapt a frozen model with few parameters.

`attach(model, LoRA(rank=4))` freezes a model and wraps its layers; `merge`, `unmerge` and `detach`
do what their names say; `finetune` trains a `miniature.stack.Stack` of adapted models. A method of
a paper is one file beside the engine.
"""

from .baselines import (
    BitFit,
    DoRA,
    Full,
    Houlsby,
    LoRA,
    LoRAXS,
    PiSSA,
    Prefix,
    Prompt,
    VeRA,
)
from .engine import (
    Adapted,
    LowRank,
    Method,
    adapted,
    adapter_state,
    attach,
    count,
    detach,
    finetune,
    load,
    load_adapter_state,
    merge,
    save,
    saved_bytes,
    trainable,
    unmerge,
)
from .plane import plane

__all__ = [
    "Adapted",
    "BitFit",
    "DoRA",
    "Full",
    "Houlsby",
    "LoRA",
    "LoRAXS",
    "LowRank",
    "Method",
    "PiSSA",
    "Prefix",
    "Prompt",
    "VeRA",
    "adapted",
    "adapter_state",
    "attach",
    "count",
    "detach",
    "finetune",
    "load",
    "load_adapter_state",
    "merge",
    "plane",
    "save",
    "saved_bytes",
    "trainable",
    "unmerge",
]
