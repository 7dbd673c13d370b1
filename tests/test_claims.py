"""Checks tell the truth on data whose truth is known."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from miniature import claims
from miniature.claims import MIME, Table, all_of, bound, close, compare, interval, order, slope

RUN = SimpleNamespace(slug="fedspeed", scale="mini", seed=0, device="cpu", control=False)
EXPERIMENTS, SEEDS = 2000, 5
NOISE = {
    "normal": lambda g, shape: g.normal(size=shape),
    "heavy tails": lambda g, shape: g.standard_t(3, size=shape),
    "skewed": lambda g, shape: g.lognormal(0, 0.8, size=shape) - np.exp(0.32),
    "accuracies of 360 images": lambda g, shape: g.binomial(360, 0.9, size=shape) / 360,
    "rounds to a target": lambda g, shape: g.poisson(20, size=shape).astype(float),
}


def rate(check):
    """Share of simulated experiments in which a check says `reproduced`."""
    return np.mean([check(i).verdict == "reproduced" for i in range(EXPERIMENTS)])


@pytest.mark.parametrize("name", NOISE)
def test_a_null_effect_is_rarely_reproduced(name):
    a, b = NOISE[name](np.random.default_rng(0), (2, EXPERIMENTS, SEEDS))
    assert rate(lambda i: compare("C", "", a[i], b[i], paper="")) <= 0.05


@pytest.mark.parametrize("name", ["normal", "heavy tails", "skewed"])
def test_null_of_ratio_order_bound_and_slope(name):
    g = np.random.default_rng(1)
    x = NOISE[name](g, (EXPERIMENTS, 4, SEEDS))
    positive = np.exp(0.1 * x)
    assert rate(lambda i: compare("C", "", *positive[i, :2], ratio=1.0, paper="")) <= 0.05
    assert (
        rate(lambda i: order("C", "", dict(zip("abcd", x[i] + [[0], [0], [9], [18]])), paper=""))
        <= 0.05
    )
    if name == "normal":  # a one-sample t interval keeps its promise for a symmetric law only
        assert rate(lambda i: bound("C", "", x[i, 0], upper=0.0, paper="")) <= 0.05
        steps = np.arange(1, 5)
        assert (
            rate(
                lambda i: slope(
                    "C", "", steps, x[i].T, expected=-1, tol=1.0, paper="", loglog=False
                )
            )
            <= 0.05
        )


def test_a_margin_counts_an_effect_of_just_its_size_as_null():
    g = np.random.default_rng(2)
    a, b = g.normal(size=(2, EXPERIMENTS, SEEDS))
    assert rate(lambda i: compare("C", "", a[i] + 0.7, b[i], margin=0.7, paper="")) <= 0.05


def test_a_true_effect_is_found():
    # Effects of the sizes that papers state: 3 points of accuracy with 0.7 points of noise,
    # a ratio of 0.4 against a bound of 0.6, an exponent of -1 +- 0.1.
    g = np.random.default_rng(3)
    noise = g.normal(size=(3, EXPERIMENTS, SEEDS))
    ours, theirs = 0.85 + 0.007 * noise[0], 0.82 + 0.007 * noise[1]
    assert rate(lambda i: compare("C", "", ours[i], theirs[i], paper="")) > 0.95
    evaluations = np.exp(0.1 * noise)
    assert (
        rate(
            lambda i: compare(
                "C",
                "",
                0.4 * evaluations[0, i],
                evaluations[1, i],
                ratio=0.6,
                larger=False,
                paper="",
            )
        )
        > 0.9
    )
    x = np.geomspace(10, 1000, 6)
    y = x**-1.0 * np.exp(0.03 * g.normal(size=(EXPERIMENTS, SEEDS, 6)))
    assert rate(lambda i: slope("C", "", x, y[i], expected=-1, tol=0.1, paper="")) > 0.95


def test_interval_is_students():
    from scipy import stats

    x = np.random.default_rng(4).normal(size=(7, 3))
    mean, lo, hi = interval(x)
    expected = stats.t.interval(0.95, 6, x.mean(0), stats.sem(x))
    np.testing.assert_allclose([lo, hi], expected)
    np.testing.assert_allclose(mean, x.mean(0))


def test_three_verdicts_and_both_directions():
    base = np.zeros(5)
    up, mixed = np.array([1, 1.1, 0.9, 1, 1.2]), np.array([1, -1, 0.5, -0.6, 0.2])
    assert compare("C", "", up, base, paper="").verdict == "reproduced"
    assert compare("C", "", up, base, paper="", margin=2).verdict == "not reproduced"
    assert compare("C", "", mixed, base, paper="").verdict == "inconclusive"
    assert compare("C", "", up, base, paper="", larger=False).verdict == "not reproduced"
    assert compare("C", "", -up, base, paper="", larger=False).verdict == "reproduced"
    assert compare("C", "", -up, base, paper="", larger=False, margin=2).verdict == "not reproduced"


def test_a_method_compared_with_itself_is_not_reproduced():
    x = np.array([0.9, 0.8, 0.85])
    assert compare("C", "", x, x, paper="").verdict == "not reproduced"
    assert compare("C", "", x, x, ratio=1.0, paper="").verdict == "not reproduced"


def test_divergence():
    good, bad = np.ones(5), np.array([1, 1, np.nan, 1, 1])
    assert compare("C", "", bad, good, paper="").verdict == "not reproduced"
    assert compare("C", "", good, bad, paper="", larger=False).verdict == "inconclusive"
    assert close("C", "", bad, good, tol=1, paper="").verdict == "not reproduced"
    assert bound("C", "", bad, upper=9, paper="").verdict == "not reproduced"
    assert slope("C", "", [1, 2, 3], [1, np.inf, 2], expected=0, tol=9, paper="").verdict == (
        "not reproduced"
    )
    assert order("C", "", {"a": good, "b": bad}, paper="").verdict == "not reproduced"


def test_close_bound_slope_order_and_all_of():
    assert close("C", "", [1.0, 2.0], [1.0, 2.1], tol=0.1001, paper="").verdict == "reproduced"
    assert close("C", "", [100.0], [101.0], tol=0.01, relative=True, paper="").verdict == (
        "reproduced"
    )
    assert bound("C", "", [1, 2, 3], lower=1, every=True, paper="").verdict == "reproduced"
    worst = bound("C", "", [1, 2, 3], upper=2, every=True, paper="")
    assert (worst.verdict, worst.measured) == ("not reproduced", 3)
    x = np.array([1.0, 10, 100])
    exact = slope("C", "", x, 5 * x**-2, expected=-2, tol=0.1, paper="")
    assert exact.verdict == "reproduced" and exact.measured == pytest.approx(-2)
    assert slope("C", "", x, 5 * x**-1, expected=-2, tol=0.1, paper="").verdict == "not reproduced"
    ks = {str(k): np.array([1.0, 1.1, 0.9, 1.0, 1.0]) * k for k in (1, 2, 3)}
    assert order("C", "", ks, paper="").verdict == "reproduced"
    assert order("C", "", ks, paper="", increasing=False).verdict == "not reproduced"
    both = all_of("C", "", order("Ca", "", ks, paper=""), worst, paper="")
    assert both.verdict == "not reproduced" and both.control
    assert not all_of("C", "", worst, paper="").control


def test_table_carries_the_record_and_a_text_without_numbers():
    import torch

    c1 = compare("C1", "beats FedAvg", torch.tensor([0.9, 0.91, 0.92]), [0.8, 0.8, 0.81], paper="p")
    c2 = close("C2", "identity <i>", [np.inf], [0.0], tol=1, paper="q").note("it overflows")
    table = Table(RUN, [c1, c2])
    bundle = table._repr_mimebundle_()
    record = json.loads(json.dumps(bundle[MIME], allow_nan=False))
    assert (record["paper"], record["control"]) == ("fedspeed", False)
    first, second = record["claims"]
    assert first["control"] and first["interval"][0] < first["measured"] < first["interval"][1]
    assert second["measured"] is None and second["note"] == "it overflows"
    assert "identity &lt;i&gt;" in bundle["text/html"]
    for verdict in ("reproduced", "not reproduced"):
        assert f"{claims.SYMBOLS[verdict]} {verdict}" in bundle["text/html"]
    assert table.text() == bundle["text/plain"]
    assert table.text().splitlines()[0] == "C1   reproduced      beats FedAvg"


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: interval([1, 2]), "at least 3 seeds"),
        (lambda: compare("C", "", [1, 2, 3], [1, 2], paper=""), "paired"),
        (lambda: compare("C", "", [1, 2, 0], [1, 2, 3], ratio=1, paper=""), "positive"),
        (lambda: slope("C", "", [1, 2], [1, 2], expected=0, tol=1, paper=""), "T >= 3"),
        (
            lambda: slope("C", "", [1, 2, 3], [1, -2, 3], expected=0, tol=1, paper=""),
            "positive x and y",
        ),
        (lambda: bound("C", "", [1, 2, 3], paper=""), "upper="),
        (lambda: order("C", "", {"a": [1, 2, 3]}, paper=""), "two or more"),
        (lambda: all_of("C9", "", paper=""), "C9 has no parts"),
        (lambda: Table(RUN, [close("C1", "", [0], [0], tol=1, paper="")] * 2), "distinct"),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_slope_of_a_mean_is_bootstrapped():
    g = np.random.default_rng(3)
    n = np.array([10, 30, 100, 300])
    hits = 0
    for _ in range(200):  # Bernoulli losses of mean 1 / n: most curves have zeros
        y = g.poisson(4 * 30 / n, size=(40, 4)) / 30
        _, lo, hi = claims.exponent(n, y, average=True)
        hits += lo <= -1 <= hi
    assert hits >= 180  # of 95 %
    from scipy.stats import bootstrap

    x = np.log(n) - np.log(n).mean()

    def fit(rows, axis=-1):
        return np.log(y[rows].mean(-2)) @ x / (x @ x)

    oracle = bootstrap((np.arange(40),), fit, n_resamples=9999, rng=1).confidence_interval
    np.testing.assert_allclose((lo, hi), oracle, atol=0.02)
    same = claims.exponent(n, np.tile(n**0.5, (20, 1)), average=True)  # no spread
    np.testing.assert_allclose(same, 0.5)


def test_a_region_of_slopes_may_be_one_sided():
    x = np.array([1.0, 2, 4, 8])
    rate = slope("C", "", x, np.stack([x, 1.1 * x, x]), between=(-np.inf, 1.2), paper="")
    assert rate.verdict == "reproduced" and rate.unit == "(at most 1.2)"
    with pytest.raises(ValueError, match="either"):
        slope("C", "", x, x, paper="")
    with pytest.raises(ValueError, match="S >= 20"):
        slope("C", "", x, np.stack([x] * 5), between=(0, 1), average=True, paper="")
