"""Set functions against their definition, counts, greedy against brute force."""

import math

import pytest
import torch

from miniature.theory.submodular import Coverage, FacilityLocation, brute_force, greedy


def coverage(seed=0, n=9, m=12):
    g = torch.Generator().manual_seed(seed)
    sets = (torch.rand(n, m, generator=g) < 0.3).double()
    return Coverage(sets, torch.rand(m, generator=g).double())


def facility(seed=0, n=9, m=12):
    return FacilityLocation(
        torch.rand(n, m, generator=torch.Generator().manual_seed(seed)).double()
    )


def test_values_by_definition():
    f, chosen = coverage(), [1, 4, 7]
    items = {i for e in chosen for i in range(12) if f.rows[e, i]}
    assert f.value(f.state(chosen)) == pytest.approx(sum(float(f.weights[i]) for i in items))
    f = facility()
    expected = sum(max(float(f.rows[e, i]) for e in chosen) for i in range(12))
    assert f.value(f.state(chosen)) == pytest.approx(expected)
    assert f.value(f.empty()) == 0 == f.value(f.state([]))


@pytest.mark.parametrize("make", [coverage, facility])
def test_gains_and_their_count(make):
    f = make()
    state = f.add(f.add(f.empty(), 2), 5)
    torch.testing.assert_close(state, f.state([2, 5]))
    gains = f.gains(state, torch.arange(9))
    assert f.queries == 9
    for e in range(9):
        difference = f.value(f.state([2, 5, e])) - f.value(state)
        assert float(gains[e]) == pytest.approx(difference, abs=1e-12)
        assert float(gains[e]) <= float(f.gains(f.state([2]), torch.tensor([e]))) + 1e-12
    assert f.queries == 9 + 3 * 9
    assert (gains >= 0).all()


@pytest.mark.parametrize("make", [coverage, facility])
def test_greedy_and_brute_force(make):
    for seed in range(20):
        f = make(seed)
        chosen, value = greedy(f, torch.arange(9), 3)
        best = brute_force(f, torch.arange(9), 3)
        assert value == pytest.approx(f.value(f.state(chosen)))
        assert (1 - 1 / math.e) * best <= value <= best + 1e-12
    assert brute_force(f, torch.tensor([4]), 3) == pytest.approx(f.value(f.state([4])))
    with pytest.raises(ValueError, match="21 elements"):
        brute_force(coverage(n=21), torch.arange(21), 2)


def test_greedy_stops_when_nothing_gains():
    f = Coverage(torch.ones(4, 3))
    assert greedy(f, torch.arange(4), 3) == ([0], 3.0)
    with pytest.raises(ValueError, match="non-negative"):
        FacilityLocation(-torch.ones(2, 2))
