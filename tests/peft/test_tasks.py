"""Fine-tuning problems: their optima are known, their shifts are what they say."""

import pytest
import torch

from miniature import data
from miniature.peft import LoRA, attach, finetune
from miniature.peft.tasks import Regression, digits, next_character, text
from miniature.stack import Stack, class_loss

F64 = torch.float64


@pytest.mark.parametrize("spectrum", ["low", "power", "gaussian", "flat", [3.0, 1.0]])
def test_planted_changes_have_their_spectrum(spectrum):
    task = Regression([0, 1], 6, 8, spectrum, rank=2, dtype=F64)
    S = torch.linalg.svdvals(task.shift)
    torch.testing.assert_close(S.norm(dim=1), torch.ones(2, dtype=F64))
    ratios = {"low": S[:, 1] / S[:, 0], "power": 2 * S[:, 1] / S[:, 0], "flat": S[:, -1] / S[:, 0]}
    if isinstance(spectrum, str) and spectrum in ratios:
        torch.testing.assert_close(ratios[spectrum], torch.ones(2, dtype=F64))
    if spectrum == "low":
        assert (S[:, 2:] < 1e-12).all() and (task.floor(2) < 1e-20).all()
    if isinstance(spectrum, list):
        torch.testing.assert_close(S[:, 0] / S[:, 1], torch.full((2,), 3.0, dtype=F64))
    assert not torch.equal(task.shift[0], task.shift[1])
    torch.testing.assert_close(Regression([1], 6, 8, spectrum, rank=2, dtype=F64).W0[0], task.W0[1])


def test_the_floor_is_the_best_update_of_its_rank():
    """Reached by the truncated SVD in the inputs' metric, and by no update that was drawn."""
    variances = [1 / i for i in range(1, 9)]
    task = Regression([3], 6, 8, "gaussian", covariance=variances, dtype=F64)
    root = task.root[0]
    torch.testing.assert_close(
        torch.linalg.eigvalsh(root @ root).flip(0), torch.tensor(variances, dtype=F64)
    )
    U, S, Vt = torch.linalg.svd(task.shift[0] @ root, full_matrices=False)
    best = (U[:, :2] * S[:2]) @ Vt[:2] @ torch.linalg.inv(root)
    torch.testing.assert_close(task.excess(task.W0 + best), task.floor(2))
    for i in range(50):
        g = torch.Generator().manual_seed(i)
        left, right = (torch.randn(k, 2, generator=g, dtype=F64) for k in (6, 8))
        near = (U[:, :2] + 0.1 * left) @ (S[:2, None] * Vt[:2] + 0.1 * right.T)
        assert task.excess(task.W0 + near @ torch.linalg.inv(root)) > task.floor(2)
    assert task.floor(6) < 1e-24 and task.excess(task.W0 + task.shift) < 1e-24


def test_lora_reaches_the_floor():
    task = Regression([0, 1, 2], 6, 8, "power", dtype=F64)
    method = LoRA(2)
    stack = Stack([attach(task.model(i), method) for i in range(3)])
    opt = stack.optimizer(torch.optim.Adam, 0.03)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 600)
    finetune(stack, method, task.loss, task.batches(64, 600), opt, schedule)
    p = stack.params()
    excess = task.excess(task.W0 + p["0.B"] @ p["0.A"])
    torch.testing.assert_close(excess, task.floor(2), rtol=0.02, atol=0)


def test_batches_are_those_of_the_seed():
    one, two = Regression([4, 5], 3, 4, noise=0.5, rank=2), Regression([5], 3, 4, noise=0.5, rank=2)
    (x, y), (u, v) = next(one.batches(7, 1)), next(two.batches(7, 1))
    assert torch.equal(x[1], u[0]) and torch.equal(y[1], v[0])
    assert not torch.equal(x, next(one.batches(7, 1, purpose=1))[0])
    big = Regression([0], 3, 4, noise=0.5, rank=2, dtype=F64)
    x, y = next(big.batches(20_000, 1))
    W = big.W0 + big.shift
    assert float((y - x @ W.mT).std()) == pytest.approx(0.5, rel=0.02)


def test_bad_regressions_are_refused():
    with pytest.raises(ValueError, match="low, power, gaussian, flat, not 'steep'"):
        Regression([0], 3, 4, "steep")
    with pytest.raises(ValueError, match=r"1..3, not 4"):
        Regression([0], 3, 4, rank=4)
    with pytest.raises(ValueError, match="needs 4 variances, got 2"):
        Regression([0], 3, 4, rank=1, covariance=[1, 2])


@pytest.mark.parametrize("kind", ["mlp", "vit", "cnn"])
@pytest.mark.parametrize("shift", ["inverted", "shuffled", "relabeled", "paired", 90])
def test_shifts_of_digits_hurt_the_classifier(kind, shift):
    task = digits(shift, kind)
    with torch.no_grad():
        known, new = (
            (task.model(s.x_test).argmax(1) == s.y_test).double().mean()
            for s in (task.source, task.target)
        )
    assert known > 0.96 and new < 0.65
    assert task.target.x_train.shape == task.source.x_train.shape
    again = digits(shift, kind, seed=1).target
    drawn = shift in ("shuffled", "relabeled", "paired")
    same = torch.equal(again.x_test, task.target.x_test) and torch.equal(
        again.y_test, task.target.y_test
    )
    assert same != drawn


def test_shifts_are_what_they_say():
    source = data.digits(flat=False)
    x, turned = source.x_test, digits(90, "vit").target.x_test
    torch.testing.assert_close(turned, x.rot90(1, (2, 3)), atol=1e-5, rtol=0)
    torch.testing.assert_close(digits("inverted", "vit").target.x_test, 1 - x)
    shuffled = digits("shuffled", "vit").target
    torch.testing.assert_close(
        shuffled.x_test.flatten(1).sort(1).values, x.flatten(1).sort(1).values
    )
    pairs = digits("paired", "vit").target
    torch.testing.assert_close(pairs.x_test[..., :4], (x[..., ::2] + x[..., 1::2]) / 2)
    assert (pairs.y_test >= source.y_test).all() and (pairs.y_test > source.y_test).any()
    names = digits("relabeled", "vit").target.y_test
    assert len({*zip(names.tolist(), source.y_test.tolist())}) == 10
    with pytest.raises(ValueError, match="not 'mirrored'"):
        digits("mirrored")
    with pytest.raises(ValueError, match="mlp, vit, cnn, not 'gpt'"):
        digits(90, "gpt")


def test_a_classifier_learns_its_new_digits():
    task = digits(90)
    method = LoRA(8)
    stack = Stack.init(lambda: attach(digits(90).model, method), [0, 1])
    order = data.batches(len(task.target.y_train), 32, 100, [0, 1])
    steps = [(task.target.x_train[i], task.target.y_train[i]) for i in order.transpose(0, 1)]
    finetune(stack, method, class_loss, steps, stack.optimizer(torch.optim.AdamW, 0.01))
    assert (stack.accuracy(task.target.x_test, task.target.y_test) > 0.7).all()


def test_text():
    task = text(windows=4)
    assert task.source.shape == task.test.shape == (4, 65)
    assert torch.equal(task.test[0, -1:], task.test[1, :1])  # windows follow each other
    with torch.no_grad():
        old, new = (float(next_character(task.model, ids)) for ids in (task.source, task.test))
    assert old + 0.05 < new < 2.0
    (ids,) = next(task.batches([0, 1, 0], 5, 1))
    assert ids.shape == (3, 5, 65) and torch.equal(ids[0], ids[2]) and not torch.equal(*ids[:2])
    with pytest.raises(ValueError, match="since 2030"):
        text(since=2030)
