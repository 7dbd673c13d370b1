"""Train the tiny models in data/checkpoints and record what they reach on held-out data.

On one CPU thread gpt_moby takes about seven minutes, each of the others less than two. Seeds are
fixed; the last digits of the result still depend on the processor and the version of torch.
"""

import argparse
import math
import platform
import time

import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from miniature import data
from miniature.models import CNN, GPT, MLP, ViT, checkpoints

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


def language(name, steps, device, batch=8, lr=2e-3, weight_decay=0.1, quick=64, **sizes):
    """Train a character model on the first 90 % of Moby-Dick; its loss on the last 10 %."""
    ids, vocab = data.chars(data.moby_dick())
    cut = int(0.9 * len(ids))
    train, held = ids[:cut], ids[cut:]
    arguments = dict(vocab=len(vocab), **sizes, positions="rope", tied=True)
    context = sizes["context"]
    torch.manual_seed(SEED)
    model = GPT(**arguments).to(device)
    generator = torch.Generator().manual_seed(SEED)

    def draw():
        first = torch.randint(cut - context, (batch, 1), generator=generator)
        window = train[first + torch.arange(context + 1)]
        return window[:, :-1], window[:, 1:]

    seconds = fit(model, draw, steps, lr, weight_decay, name)
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
    checkpoints.save(name, model, arguments, record)
    return f"{losses.mean():.4f} nats per character"


def classifier(name, load, build, arguments, steps, device, batch=64, lr=3e-3, weight_decay=0.01):
    """Train a classifier of digits; its accuracy on held-out ones."""
    what, how, split = load
    torch.manual_seed(SEED)
    model = build(**arguments).to(device)
    order = iter(data.batches(len(split.x_train), batch, steps, [SEED])[0])

    def draw():
        rows = next(order)
        return split.x_train[rows], split.y_train[rows]

    seconds = fit(model, draw, steps, lr, weight_decay, name)
    with torch.no_grad():
        right = model(split.x_test.to(device)).argmax(1).cpu() == split.y_test
    n, total = len(split.x_test), len(split.x_train) + len(split.x_test)
    record = {
        "what": f"classifier of {what}",
        "data": how,
        "held_out": {
            "split": f"the last {n:,} of the {total:,} digits",
            "accuracy": right.double().mean().item(),
        },
        "recipe": recipe(steps, batch, lr, weight_decay, seconds, device),
    }
    checkpoints.save(name, model, arguments, record)
    return f"{right.double().mean():.2%} right"


def cnn_mnist(steps, device):
    load = data.mnist10k(pool=2, flat=False)
    load = "MNIST digits pooled to 14x14 pixels", "mnist10k(pool=2, flat=False)", load
    arguments = dict(shape=[1, 14, 14], classes=10, channels=[32, 64])
    return classifier("cnn_mnist", load, CNN, arguments, steps, device)


def mlp_digits(steps, device):
    load = "8x8 digits", "digits()", data.digits()
    return classifier("mlp_digits", load, MLP, dict(sizes=[64, 128, 128, 10]), steps, device)


def vit_digits(steps, device):
    load = "8x8 digits", "digits(flat=False)", data.digits(flat=False)
    arguments = dict(shape=[1, 8, 8], classes=10, patch=2, dim=32, layers=2, heads=4)
    return classifier("vit_digits", load, ViT, arguments, steps, device)


def gpt_moby(steps, device):
    return language("gpt_moby", steps, device, dim=128, layers=4, heads=4, context=128)


def gpt_moby_small(steps, device):
    return language("gpt_moby_small", steps, device, dim=64, layers=2, heads=4, context=64)


CHECKPOINTS = {
    "cnn_mnist": (cnn_mnist, 1600),
    "gpt_moby": (gpt_moby, 5000),
    "gpt_moby_small": (gpt_moby_small, 5000),
    "mlp_digits": (mlp_digits, 600),
    "vit_digits": (vit_digits, 1500),
}


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
