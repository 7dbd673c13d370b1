"""Train the tiny models in data/checkpoints and record what they reach on held-out data.

On one CPU thread cnn_mnist takes half a minute and gpt_moby about seven minutes. Seeds are fixed;
the last digits of the result still depend on the processor and the version of torch.
"""

import argparse
import math
import platform
import time

import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from miniature import data
from miniature.models import CNN, GPT, checkpoints

SEED = 0


def fit(model, draw, steps, lr, weight_decay, name):
    """Train with AdamW in bfloat16 mixed precision; return the seconds it took.

    The learning rate rises over the first 5 % of the steps and falls to zero along a cosine.
    `draw` returns one batch of inputs [B, ...] and of labels, one for each row of the logits.
    """
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=weight_decay, betas=(0.9, 0.99))
    rising = math.ceil(0.05 * steps)
    device = next(model.parameters()).device
    start, average = time.perf_counter(), None
    with tqdm(range(steps), desc=name, mininterval=1.0) as progress:
        for step in progress:
            share = min(1, (step + 1) / rising) * (1 + math.cos(math.pi * step / steps)) / 2
            optimizer.param_groups[0]["lr"] = lr * share
            x, y = (t.to(device) for t in draw())
            with torch.autocast(device.type, torch.bfloat16):
                logits = model(x)
            loss = cross_entropy(logits.flatten(0, -2).float(), y.flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            average = loss.item() if average is None else 0.98 * average + 0.02 * loss.item()
            progress.set_postfix(loss=f"{average:.4f}", refresh=False)
    return time.perf_counter() - start


def recipe(steps, batch, lr, weight_decay, seconds, device):
    return {
        "optimizer": "AdamW, betas 0.9 and 0.99, linear rise over 5 % of the steps, then cosine",
        "steps": steps,
        "batch": batch,
        "lr": lr,
        "weight_decay": weight_decay,
        "precision": "bfloat16 mixed",
        "seed": SEED,
        "seconds": round(seconds),
        "device": f"{device}, {torch.get_num_threads()} thread(s), {platform.machine()}",
        "torch": torch.__version__.split("+")[0],
        "script": "scripts/train_checkpoints.py",
    }


def gpt_moby(steps, device, batch=8, lr=2e-3, weight_decay=0.1, quick=64):
    """Train a character model on the first 90 % of Moby-Dick; its loss on the last 10 %."""
    ids, vocab = data.chars(data.moby_dick())
    cut = int(0.9 * len(ids))
    train, held = ids[:cut], ids[cut:]
    context = 128
    arguments = dict(
        vocab=len(vocab), dim=128, layers=4, heads=4, context=context, positions="rope", tied=True
    )
    torch.manual_seed(SEED)
    model = GPT(**arguments).to(device)
    generator = torch.Generator().manual_seed(SEED)

    def draw():
        first = torch.randint(cut - context, (batch, 1), generator=generator)
        window = train[first + torch.arange(context + 1)]
        return window[:, :-1], window[:, 1:]

    seconds = fit(model, draw, steps, lr, weight_decay, "gpt_moby")
    model.half()
    stored = GPT(**arguments).to(device)
    stored.load_state_dict(model.state_dict())  # the recorded loss is that of the rounded weights
    windows = (len(held) - 1) // context
    x, y = (held[i : i + windows * context].view(windows, context).to(device) for i in (0, 1))
    with torch.no_grad():
        losses = torch.cat(
            [
                cross_entropy(stored(a).transpose(1, 2), b, reduction="none")
                for a, b in zip(x.split(64), y.split(64))
            ]
        ).double()
    record = {
        "what": "character model of Moby-Dick",
        "data": "moby_dick",
        "vocabulary": vocab.symbols,
        "held_out": {
            "split": f"characters {cut} to {len(ids) - 1}, the last 10 % of the text, read in "
            f"{windows} consecutive windows of {context} characters, each predicting the next one",
            "start": cut,
            "windows": windows,
            "loss": losses.mean().item(),
            "quick_windows": quick,
            "quick_loss": losses[:quick].mean().item(),
            "unit": "nats per character",
        },
        "recipe": recipe(steps, batch, lr, weight_decay, seconds, device),
    }
    checkpoints.save("gpt_moby", model, arguments, record)
    return f"{losses.mean():.4f} nats per character"


def cnn_mnist(steps, device, batch=64, lr=3e-3, weight_decay=0.01):
    """Train on 8,000 digits of 14x14 pixels; its accuracy on 2,000 others."""
    split = data.mnist10k(pool=2, flat=False)
    arguments = dict(shape=[1, 14, 14], classes=10, channels=[32, 64])
    torch.manual_seed(SEED)
    model = CNN(**arguments).to(device)
    order = iter(data.batches(len(split.x_train), batch, steps, [SEED])[0])

    def draw():
        rows = next(order)
        return split.x_train[rows], split.y_train[rows]

    seconds = fit(model, draw, steps, lr, weight_decay, "cnn_mnist")
    with torch.no_grad():
        right = model(split.x_test.to(device)).argmax(1).cpu() == split.y_test
    record = {
        "what": "classifier of MNIST digits pooled to 14x14 pixels",
        "data": "mnist10k(pool=2, flat=False)",
        "held_out": {
            "split": "the last 2,000 of the 10,000 digits",
            "accuracy": right.double().mean().item(),
        },
        "recipe": recipe(steps, batch, lr, weight_decay, seconds, device),
    }
    checkpoints.save("cnn_mnist", model, arguments, record)
    return f"{right.double().mean():.2%} right"


CHECKPOINTS = {"cnn_mnist": (cnn_mnist, 1600), "gpt_moby": (gpt_moby, 5000)}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"{', '.join(CHECKPOINTS)} (default: all)"
    )
    parser.add_argument(
        "--steps",
        type=int,
        help="optimizer steps (default: "
        + ", ".join(f"{steps} for {name}" for name, (_, steps) in CHECKPOINTS.items())
        + ")",
    )
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, ...")
    options = parser.parse_args()
    for name in options.names:
        if name not in CHECKPOINTS:
            parser.error(f"no checkpoint {name!r}: choose from {', '.join(CHECKPOINTS)}")
    if options.steps is not None and options.steps < 1:
        parser.error(f"--steps must be at least 1, got {options.steps}")
    try:
        device = torch.empty(0, device=options.device).device
    except (RuntimeError, AssertionError) as e:
        parser.error(f"--device {options.device}: {str(e).splitlines()[0]}")
    for name in options.names or CHECKPOINTS:
        train, steps = CHECKPOINTS[name]
        reached = train(options.steps or steps, device)
        print(f"{name}: {reached}; written to {checkpoints.folder() / name}.safetensors")


if __name__ == "__main__":
    main()
