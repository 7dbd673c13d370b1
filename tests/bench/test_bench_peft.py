"""Step time and saved activations of adapted models, against Hugging Face PEFT."""

import copy
import time

import pytest
import torch

from miniature.models import GPT
from miniature.peft import DoRA, LoRA, PiSSA, VeRA, adapted, attach, saved_bytes, trainable
from miniature.stack import cross_entropy

TARGETS = ["q", "k", "v", "out"]
OURS = {
    "LoRA": LoRA(8, targets=TARGETS),
    "DoRA": DoRA(8, targets=TARGETS),
    "PiSSA": PiSSA(8, targets=TARGETS),
    "VeRA": VeRA(64, targets=TARGETS),
}


def theirs(peft, name):
    if name == "VeRA":
        return peft.VeraConfig(r=64, target_modules=TARGETS)
    options = {"DoRA": {"use_dora": True}, "PiSSA": {"init_lora_weights": "pissa"}}.get(name, {})
    return peft.LoraConfig(r=8, lora_alpha=8, target_modules=TARGETS, **options)


def step(model, params, ids):
    """Forward, backward and an AdamW step, as anybody would write them."""
    optimizer = torch.optim.AdamW(params, lr=1e-3)

    def run():
        optimizer.zero_grad()
        cross_entropy(model(ids[:, :-1]), ids[:, 1:]).backward()
        optimizer.step()

    return run


@pytest.mark.parametrize("name", OURS)
def test_step_time_and_saved_bytes(benchmark, capsys, name):
    """One thread, the same character model and batch, alternating; medians are compared."""
    peft = pytest.importorskip("peft", reason="the oracle peft is not installed")
    torch.manual_seed(0)
    base = GPT(vocab=81, dim=128, layers=4, heads=4, context=128)
    ids = torch.randint(81, (8, 65))
    mine = attach(copy.deepcopy(base), OURS[name])
    rival = peft.get_peft_model(copy.deepcopy(base), theirs(peft, name))
    assert len(adapted(mine)) == 16
    own, other = trainable(mine).values(), [p for p in rival.parameters() if p.requires_grad]
    assert sum(p.numel() for p in own) == sum(p.numel() for p in other)

    def kept(model):
        with saved_bytes(model) as saved:
            cross_entropy(model(ids[:, :-1]), ids[:, 1:])
        return saved.total

    a, b = kept(mine), kept(rival.base_model.model)
    assert a <= b * 1.001
    ours, peers = step(mine, own, ids), step(rival.base_model.model, other, ids)
    times = []

    def peer():  # runs before every round of ours
        start = time.perf_counter()
        peers()
        times.append(time.perf_counter() - start)

    peer(), ours()
    times.clear()
    benchmark.pedantic(ours, setup=peer, rounds=40 if benchmark.enabled else 1)
    if benchmark.enabled:
        ratio = benchmark.stats.stats.median / sorted(times)[len(times) // 2]
        benchmark.extra_info["time relative to peft"] = ratio
        benchmark.extra_info["saved bytes relative to peft"] = a / b
        with capsys.disabled():
            print(f"\n{name}: {ratio:.2f} times the step time of peft, {a / b:.2f} of its bytes")
