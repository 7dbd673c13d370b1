"""Architectures stack and decode exactly, and checkpoints reach what their records say."""

import copy
import importlib.util
from itertools import pairwise

import pytest
import torch
from torch.nn.functional import cross_entropy

from miniature import data, models
from miniature.models import CNN, GPT, MLP, ResNet, checkpoints, resnet18_gn, rope
from miniature.stack import Stack

ROOT = checkpoints.root()
MODELS = {
    "mlp": (lambda: MLP([6, 8, 3], torch.nn.Tanh), (6,)),
    "linear": (lambda: MLP([6, 3]), (6,)),
    "cnn 28": (lambda: CNN((1, 28, 28), 3, (2, 3)), (1, 28, 28)),
    "cnn 14": (lambda: CNN((1, 14, 14), 3, (2, 3)), (1, 14, 14)),
    "cnn 8": (lambda: CNN((1, 8, 8), 3, (2, 3, 4)), (1, 8, 8)),
    "resnet18": (lambda: resnet18_gn(3, width=2), (3, 32, 32)),
    "resnet10": (lambda: ResNet([1, 1, 1, 1], 3, width=4), (3, 32, 32)),
    "gpt rope": (lambda: GPT(7, 8, 2, 2, 5), None),
    "gpt learned": (lambda: GPT(7, 8, 2, 2, 5, positions="learned", tied=False), None),
}


def gpt(positions="rope", tied=True, dtype=torch.float32, context=16, seed=0):
    """A decoder with weights large enough that every part of it matters."""
    torch.manual_seed(seed)
    model = GPT(11, 24, 3, 2, context, positions=positions, tied=tied).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model.eval()


@pytest.mark.parametrize("name", MODELS)
def test_every_model_stacks_and_equals_the_single_one(name):
    build, shape = MODELS[name]
    n, batch = 3, 2
    stack = Stack.init(build, range(n), dtype=torch.float64)
    g = torch.Generator().manual_seed(0)
    if shape is None:
        x, y = torch.randint(7, (2, n, batch, 5), generator=g)
    else:
        x = torch.randn(n, batch, *shape, dtype=torch.float64, generator=g)
        y = torch.randint(3, (n, batch), generator=g)

    def loss(model, x, y):
        return cross_entropy(model(x).flatten(0, -2), y.flatten())

    grad, value = stack.grad(loss, x, y)
    outputs = stack(x)
    for i in range(n):
        torch.manual_seed(i)
        model = build().double()
        alone = loss(model, x[i], y[i])
        alone.backward()
        expected = torch.cat([p.grad.flatten() for p in model.parameters()])
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(grad[i], expected, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(value[i], alone.detach(), rtol=1e-12, atol=0)
        torch.testing.assert_close(outputs[i], model(x[i]).detach(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_no_model_has_state_besides_its_parameters(name):
    model = MODELS[name][0]()
    assert not list(model.buffers())
    assert all(p.requires_grad for p in model.parameters())


def test_resnet18_has_the_size_of_the_paper():
    # 3x3 stem, eight blocks of two 3x3 convolutions, three 1x1 shortcuts, a scale and a shift per
    # normalized channel, and the linear layer.
    w = [64, 128, 256, 512]
    convolutions = 27 * 64 + 4 * 9 * 64 * 64
    convolutions += sum(9 * a * b + 3 * 9 * b * b + a * b for a, b in pairwise(w))
    normalized = 64 + 4 * sum(w) + sum(w[1:])
    model = resnet18_gn(10)
    assert sum(p.numel() for p in model.parameters()) == convolutions + 2 * normalized + 5130
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
    assert model.blocks(model.stem(torch.zeros(1, 3, 32, 32))).shape == (1, 512, 4, 4)


def test_images_do_not_see_each_other():
    torch.manual_seed(0)
    model, x = resnet18_gn(4, width=8), torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(model(x)[1:2], model(x[1:2]))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: MLP([5]), r"sizes=\[5\]"),
        (lambda: MLP([5, 0, 2]), r"sizes=\[5, 0, 2\]"),
        (lambda: MLP([5, 2])(torch.zeros(3, 4)), r"\[3, 4\].*reads \[\.\.\., 5\]"),
        (lambda: CNN((1, 8, 8), 10)(torch.zeros(3, 64)), r"\[3, 64\].*reads \[B, 1, 8, 8\]"),
        (lambda: CNN((1, 8, 8), 10)(torch.zeros(3, 3, 8, 8)), r"\[3, 3, 8, 8\]"),
        (lambda: CNN((1, 8, 8), 10, (2, 2, 2, 2)), "8x8 pixels cannot be halved 4 times"),
        (lambda: resnet18_gn(3, 2)(torch.zeros(1, 3, 28, 28)), r"\[B, 3, 32, 32\]"),
        (lambda: GPT(5, 10, 1, 3, 8), "dim=10 is not a multiple of heads=3"),
        (lambda: GPT(5, 9, 1, 3, 8), "3 dimensions a head"),
        (lambda: GPT(5, 8, 1, 2, 8, positions="alibi"), "alibi"),
        (lambda: gpt()(torch.zeros(4, dtype=torch.int64)), r"\[4\].*\[B, T\]"),
        (lambda: gpt()(torch.zeros(1, 0, dtype=torch.int64)), r"\[1, 0\]"),
        (lambda: gpt()(torch.zeros(1, 17, dtype=torch.int64)), "context of 16: give at most 16"),
        (lambda: gpt().generate(torch.zeros(1, 17, dtype=torch.int64), 1), "context of 16"),
        (lambda: gpt().generate(torch.zeros(1, 1, dtype=torch.int64), 1, top_k=12), "1..11"),
        (lambda: gpt().generate(torch.zeros(1, 1, dtype=torch.int64), 1, -1.0), "temperature=-1.0"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("positions", ["rope", "learned"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("cuts", [[1] * 16, [5, 1, 1, 9], [16]], ids=str)
def test_cached_decoding_equals_the_full_forward_pass(positions, dtype, tolerance, cuts):
    model = gpt(positions, dtype=dtype)
    ids = torch.randint(11, (3, 16))
    cache = model.cache(3)
    with torch.no_grad():
        full = model(ids)
        parts = torch.cat([model(part, cache) for part in ids.split(cuts, dim=1)], dim=1)
    assert cache.length == 16 and full.abs().max() > 1
    scale = full.abs().max()
    assert ((parts - full).abs().max() / scale) < tolerance


def test_cache_can_forget_and_names_its_limits():
    model = gpt()
    ids, other = torch.randint(11, (2, 2, 10))
    cache = model.cache(2)
    with torch.no_grad():
        model(ids, cache)
        cache.length = 4
        again = model(other, cache)
        torch.testing.assert_close(again, model(torch.cat([ids[:, :4], other], 1))[:, 4:])
    with pytest.raises(ValueError, match=r"14 cached \+ 3 new tokens.*at most 2"):
        model(ids[:, :3], cache)
    assert cache.length == 14
    with pytest.raises(ValueError, match=r"make one with model.cache\(1\)"):
        model(ids[:1, :1], cache)


@pytest.mark.parametrize("positions", ["rope", "learned"])
def test_the_future_changes_nothing_in_the_past(positions):
    model = gpt(positions, dtype=torch.float64)
    ids = torch.randint(11, (1, 16))
    with torch.no_grad():
        before = model(ids)
        for t in range(16):
            changed = ids.clone()
            changed[:, t] = (ids[:, t] + 1) % 11
            difference = (model(changed) - before).abs().amax(-1)[0]
            assert (difference[:t] == 0).all() and (difference[t:] > 0).all()


def test_attention_is_that_of_torch():
    torch.manual_seed(0)
    layer = GPT(5, 24, 1, 3, 8, positions="learned").double().blocks[0].attention
    x = torch.randn(2, 8, 24, dtype=torch.float64)
    q, k, v = (m(x).view(2, 8, 3, 8).transpose(1, 2) for m in (layer.q, layer.k, layer.v))
    mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(layer(x), layer.out(mixed.transpose(1, 2).reshape(2, 8, 24)))


def test_rope_is_a_rotation_that_depends_on_relative_positions_only():
    g = torch.Generator().manual_seed(0)
    d, q, k = 8, *torch.randn(2, 1, 8, dtype=torch.float64, generator=g)

    def score(m, n):
        return (rope(q, torch.tensor([m])) * rope(k, torch.tensor([n]))).sum()

    for distance in (0, 1, 7, 100):
        scores = torch.stack([score(m + distance, m) for m in (0, 3, 50, 1000)])
        torch.testing.assert_close(scores, scores[:1].expand(4), rtol=0, atol=1e-12)
    assert (score(5, 2) - score(2, 5)).abs() > 1e-3  # the direction matters
    torch.testing.assert_close(rope(q, torch.tensor([0])), q)
    turned = rope(q, torch.arange(20))
    torch.testing.assert_close(turned.norm(dim=-1), q.norm().expand(20))
    # Pair j is one complex number, turned by position * 10000^(-2j/d).
    pairs = torch.complex(q[0, : d // 2], q[0, d // 2 :])
    for j in range(d // 2):
        angle = torch.tensor(13 * 10_000 ** (-2 * j / d), dtype=torch.float64)
        expected = pairs[j] * torch.polar(torch.ones_like(angle), angle)
        torch.testing.assert_close(turned[13, j], expected.real)
        torch.testing.assert_close(turned[13, j + d // 2], expected.imag)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rope_turns_half_precision_by_exact_angles(dtype):
    x = torch.ones(1, 4, dtype=dtype)
    exact = rope(x.double(), torch.tensor([3001]))
    torch.testing.assert_close(rope(x, torch.tensor([3001])).double(), exact, rtol=0, atol=0.02)


def test_attention_with_rope_scores_relative_positions_only():
    layer = gpt(dtype=torch.float64).blocks[0].attention
    x = torch.randn(1, 5, 24, dtype=torch.float64)
    q = layer.q(x).unflatten(-1, (2, -1)).transpose(1, 2)

    def scores(past):
        keys, values = (torch.zeros(1, 2, 16, 12, dtype=torch.float64) for _ in range(2))
        with torch.no_grad():
            layer(x, past, (keys, values))
        assert (keys[:, :, :past] == 0).all() and (keys[:, :, past + 5 :] == 0).all()
        turned = rope(q, torch.arange(past, past + 5))
        return turned @ keys[:, :, past : past + 5].transpose(-1, -2)

    torch.testing.assert_close(scores(0), scores(9))


@pytest.mark.parametrize("positions", ["rope", "learned"])
@pytest.mark.parametrize("tied", [True, False])
def test_number_of_parameters_and_tying(positions, tied):
    V, d, L, C = 11, 24, 3, 16
    model = gpt(positions, tied)
    size = V * d + L * (12 * d**2 + 13 * d) + 2 * d
    size += C * d * (positions == "learned") + V * d * (not tied)
    assert sum(p.numel() for p in model.parameters()) == size
    assert Stack([model, copy.deepcopy(model)]).size == size
    assert (model.head.weight.data_ptr() == model.embed.weight.data_ptr()) == tied
    assert Stack([model]).module(0).head.weight.shape == (V, d)
    if tied:
        single = Stack([model]).module(0)
        assert single.head.weight is single.embed.weight


def test_training_tied_weights_in_a_stack_equals_training_alone():
    models_ = [gpt(seed=i, dtype=torch.float64) for i in range(2)]
    stack = Stack(models_)
    x, y = torch.randint(11, (2, 2, 4, 9))

    def loss(model, x, y):
        return cross_entropy(model(x).flatten(0, 1), y.flatten())

    stack.train(loss, [(x, y)] * 3, stack.optimizer(torch.optim.AdamW, lr=0.01))
    for i, model in enumerate(models_):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        for _ in range(3):
            optimizer.zero_grad()
            loss(model, x[i], y[i]).backward()
            optimizer.step()
        alone = torch.cat([p.detach().flatten() for p in model.parameters()])
        torch.testing.assert_close(stack.theta[i], alone, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("positions", ["rope", "learned"])
def test_half_precision_is_close_and_decodes(dtype, positions):
    torch.manual_seed(0)
    model = GPT(11, 24, 3, 2, 16, positions=positions).eval()
    ids = torch.randint(11, (2, 16))
    with torch.no_grad():
        exact = model(ids)
        half = copy.deepcopy(model).to(dtype)
        rough = half(ids)
        assert rough.dtype == dtype and half.cache(1).keys.dtype == dtype
        assert (rough - exact).abs().max() < 0.03 * exact.abs().max()
        assert half.generate(ids[:, :4], 6).shape == (2, 10)


def test_initialization_is_as_documented():
    torch.manual_seed(0)
    model = GPT(200, 128, 8, 4, 64, positions="learned", tied=False)
    for name, p in model.named_parameters():
        if p.ndim == 1:
            constant = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            assert (p == constant).all(), name
        else:
            residual = name.endswith(("attention.out.weight", "mlp.2.weight"))
            assert p.std().item() == pytest.approx(0.02 / (4 if residual else 1), rel=0.03), name


def test_generation_follows_the_full_forward_pass():
    model = gpt(dtype=torch.float64)
    ids = torch.randint(11, (2, 3))
    greedy = model.generate(ids, 13, temperature=0)
    assert greedy.shape == (2, 16) and torch.equal(greedy[:, :3], ids)
    with torch.no_grad():
        assert torch.equal(model(greedy[:, :-1]).argmax(-1)[:, 2:], greedy[:, 3:])
    assert torch.equal(model.generate(ids, 13, top_k=1), greedy)
    assert torch.equal(model.generate(ids, 0), ids)


@pytest.mark.gpu
@pytest.mark.parametrize("positions", ["rope", "learned"])
def test_generation_on_a_gpu_equals_that_on_a_cpu(positions):
    model = gpt(positions, dtype=torch.float64)
    ids = torch.randint(11, (2, 3))
    expected = model.generate(ids, 30, temperature=0)
    assert torch.equal(model.cuda().generate(ids.cuda(), 30, temperature=0).cpu(), expected)


def test_generation_past_the_context_reads_its_last_half_again():
    model = gpt(dtype=torch.float64)
    ids = torch.randint(11, (2, 5))
    expected, start = ids, 0
    with torch.no_grad():
        for _ in range(40):
            if expected.shape[1] - start > 16:
                start = expected.shape[1] - 8
            new = model(expected[:, start:])[:, -1].argmax(-1, keepdim=True)
            expected = torch.cat([expected, new], dim=1)
    assert torch.equal(model.generate(ids, 40, temperature=0), expected)


def test_sampling_has_the_probabilities_of_the_model():
    model = gpt(dtype=torch.float64)
    ids = torch.randint(11, (1, 4))
    with torch.no_grad():
        logits = model(ids)[0, -1]
    n = 4_000
    for temperature, k in ((1.0, None), (2.0, 4)):
        kept = logits if k is None else logits.masked_fill(logits < logits.topk(k)[0][-1], -1e9)
        p = (kept / temperature).softmax(-1)
        generator = torch.Generator().manual_seed(0)
        new = model.generate(ids.expand(n, -1), 1, temperature, k, generator)[:, -1]
        counts = torch.bincount(new, minlength=11)
        assert (counts[p < 1e-9] == 0).all()
        z = (counts - n * p) / (n * p * (1 - p)).sqrt().clamp(min=1)
        assert z.abs().max() < 4.5
    seeds = [torch.Generator().manual_seed(s) for s in (1, 1, 2)]
    a, b, c = (model.generate(ids, 12, generator=g) for g in seeds)
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_checkpoints_are_listed_small_and_complete():
    assert {"cnn_mnist", "gpt_moby"} <= set(models.names())
    for name in models.names():
        record, path = models.meta(name), checkpoints.folder() / f"{name}.safetensors"
        assert path.stat().st_size == record["bytes"] < 2e6
        assert data.bundled.sha256(path) == record["sha256"]
        assert {"class", "arguments", "data", "held_out", "recipe", "dtype"} <= set(record)
        state = torch.random.get_rng_state()
        model = models.load(name)
        assert torch.equal(torch.random.get_rng_state(), state)
        assert not model.training
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    "name, load, least",
    [
        ("cnn_mnist", lambda: data.mnist10k(pool=2, flat=False), 0.975),
        ("mlp_digits", lambda: data.digits(), 0.96),
        ("vit_digits", lambda: data.digits(flat=False), 0.96),
    ],
)
def test_classifiers_reach_their_recorded_accuracy(name, load, least):
    split, held = load(), models.meta(name)["held_out"]
    with torch.no_grad():
        right = models.load(name)(split.x_test).argmax(1) == split.y_test
    one = 1 / len(split.y_test)  # an image on the border may fall to either side elsewhere
    assert right.double().mean().item() == pytest.approx(held["accuracy"], abs=1.5 * one)
    assert held["accuracy"] >= least


@pytest.mark.parametrize("name, most", [("gpt_moby", 1.6), ("gpt_moby_small", 1.75)])
def test_language_models_reach_their_recorded_loss_and_write_english(name, most):
    record = models.meta(name)
    held, vocab = record["held_out"], data.CharVocab(record["vocabulary"])
    text, context, n = data.moby_dick(), record["arguments"]["context"], held["quick_windows"]
    assert held["start"] == int(0.9 * len(text))
    ids = vocab.encode(text[held["start"] :][: n * context + 1])
    model = models.load(name)
    with torch.no_grad():
        logits = model(ids[:-1].view(n, context))
    loss = cross_entropy(logits.flatten(0, 1), ids[1:]).item()
    assert loss == pytest.approx(held["quick_loss"], abs=1e-3)
    assert held["loss"] == pytest.approx(held["quick_loss"], abs=0.15)
    assert held["loss"] < most
    prompt = vocab.encode("CHAPTER 1. ")[None]
    written = vocab.decode(model.generate(prompt, 400, 0.5, None, torch.Generator().manual_seed(0)))
    known = set(text.split())
    words = written.split()[2:-1]
    assert sum(w in known for w in words) / len(words) > 0.7


def test_unknown_name_is_answered_with_the_nearest():
    for call in (models.load, models.meta):
        with pytest.raises(ValueError, match=r"no checkpoint 'gpt_mobi'; did you mean 'gpt_moby'"):
            call("gpt_mobi")
        with pytest.raises(ValueError, match=r"'xyz'; There are: cnn_mnist, gpt_moby"):
            call("xyz")


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A root with the records of the papers but no checkpoint."""
    (tmp_path / "data").mkdir()
    for name in ("papers.bib", "manifest.json", "mnist10k.npz"):
        (tmp_path / "data" / name).symlink_to(ROOT / "data" / name)
    monkeypatch.setenv("MINIATURE_ROOT", str(tmp_path))
    return tmp_path / "data" / "checkpoints"


def test_damaged_files_are_named(elsewhere):
    model = GPT(5, 8, 1, 2, 4)
    arguments = dict(vocab=5, dim=8, layers=1, heads=2, context=4)
    checkpoints.save("toy", model, arguments, {"data": "none"})
    loaded = models.load("toy")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters()))
    assert loaded.head.weight is loaded.embed.weight
    weights, record = elsewhere / "toy.safetensors", elsewhere / "toy.json"
    good = weights.read_bytes()
    weights.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(data.DataError, match=r"toy.safetensors is damaged: its SHA-256 is"):
        models.load("toy")
    weights.unlink()
    with pytest.raises(data.DataError, match=r"toy.safetensors is missing"):
        models.load("toy")
    record.write_text(record.read_text()[:20])
    with pytest.raises(data.DataError, match=r"toy.json is damaged"):
        models.load("toy")


def test_failed_save_leaves_the_old_files(elsewhere, monkeypatch):
    arguments = dict(vocab=5, dim=8, layers=1, heads=2, context=4)
    checkpoints.save("toy", GPT(**arguments), arguments, {"data": "none"})
    before = {p.name: p.read_bytes() for p in elsewhere.iterdir()}

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        checkpoints.save("toy", GPT(**arguments), arguments, {"data": "none"})
    assert {p.name: p.read_bytes() for p in elsewhere.iterdir()} == before


def test_the_training_script_makes_a_checkpoint_that_loads(elsewhere, monkeypatch, capsys):
    path = ROOT / "scripts" / "train_checkpoints.py"
    spec = importlib.util.spec_from_file_location("train_checkpoints", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["train_checkpoints.py", *arguments])
        script.main()

    run("cnn_mnist", "--steps", "3")
    assert {p.name for p in elsewhere.iterdir()} == {"cnn_mnist.json", "cnn_mnist.safetensors"}
    assert models.meta("cnn_mnist")["recipe"]["steps"] == 3
    assert models.load("cnn_mnist")(torch.zeros(1, 1, 14, 14)).shape == (1, 10)
    for arguments, message in {
        ("cnn_cifar",): "choose from cnn_mnist, gpt_moby",
        ("--steps", "0"): "--steps must be at least 1, got 0",
        ("--device", "toaster"): "--device toaster",
    }.items():
        with pytest.raises(SystemExit):
            run(*arguments)
        assert message in capsys.readouterr().err


def test_a_vit_cuts_patches_and_attends_both_ways():
    torch.manual_seed(0)
    model = models.ViT((1, 8, 8), 10, patch=2, dim=8, layers=1, heads=2).double()
    x = torch.randn(3, 1, 8, 8, dtype=torch.float64)
    kernel = model.embed.weight.view(8, 1, 2, 2)  # a convolution with stride 2 cuts the same
    tokens = torch.nn.functional.conv2d(x, kernel, model.embed.bias, stride=2)
    h = model.blocks[0](tokens.flatten(2).mT + model.position)
    torch.testing.assert_close(model(x), model.head(model.norm(h).mean(1)))
    seen = []
    model.blocks[0].register_forward_hook(lambda module, args, out: seen.append(out))
    changed = x.clone()
    changed[:, :, -1, -1] += 1.0  # the last patch
    model(x), model(changed)
    assert not torch.allclose(seen[0][:, 0], seen[1][:, 0])
    with pytest.raises(ValueError, match=r"reads \[B, 1, 8, 8\]"):
        model(x.flatten(1))
    with pytest.raises(ValueError, match="patches of 3"):
        models.ViT((1, 8, 8), 10, patch=3)
    with pytest.raises(ValueError, match="multiple of heads=3"):
        models.ViT((1, 8, 8), 10, heads=3)
