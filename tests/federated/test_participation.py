"""Who takes part, and when late clients return."""

import numpy as np
import pytest

from miniature.federated.participation import Bernoulli, Cyclic, Markov, Sample, Trace, clock


def draw(who, n, rounds, seeds=(0, 1, 2)):
    generators = [np.random.default_rng(s) for s in seeds]
    return np.stack([who(generators, n, t) for t in range(rounds)], axis=1)  # [S, T, n]


def test_a_sample_has_its_size_and_is_uniform():
    present = draw(Sample(3), 10, 2000)
    assert (present.sum(-1) == 3).all()
    np.testing.assert_allclose(present.mean((0, 1)), 0.3, atol=0.03)
    assert draw(Sample(10), 10, 5).all()


def test_bernoulli_rates():
    p = np.linspace(0.1, 1.0, 10)
    np.testing.assert_allclose(draw(Bernoulli(p), 10, 3000).mean((0, 1)), p, atol=0.03)


def test_markov_has_the_stationary_rate_and_long_absences():
    p = np.array([0.1, 0.3, 0.5, 0.8])
    present = draw(Markov(p, change=0.2), 4, 20_000)
    np.testing.assert_allclose(present.mean((0, 1)), p, atol=0.03)
    switches = (present[:, 1:] != present[:, :-1]).mean((0, 1))
    assert (switches < 2 * p * (1 - p)).all()  # fewer than independent rounds would have


def test_cyclic_groups_take_turns():
    present = draw(Cyclic(3), 7, 6)
    assert (present.sum(1) == 2).all()
    assert present[0, 1].tolist() == [False, True, False, False, True, False, False]


def test_a_trace_repeats():
    trace = Trace([[True, False], [False, True]])
    assert draw(trace, 2, 3)[0].tolist() == [[True, False], [False, True], [True, False]]
    with pytest.raises(ValueError, match="2 clients, not 3"):
        draw(trace, 3, 1)


def test_runs_with_equal_seeds_agree_whatever_else_is_stacked():
    alone, together = draw(Sample(3), 9, 20, seeds=[5]), draw(Sample(3), 9, 20, seeds=[1, 5])
    assert (alone[0] == together[1]).all()


def test_the_clock_synchronous_waits_for_the_slowest():
    trace = clock([1.0, 2.0, 5.0], 4)
    assert trace.present.all() and trace.times.tolist() == [5, 10, 15, 20] and trace.stale


def test_the_clock_asynchronous_steps_at_every_arrival():
    trace = clock([1.0, 2.5], 6, arrivals=1)
    assert trace.times.tolist() == [1, 2, 2.5, 3, 4, 5]
    assert trace.present.argmax(1).tolist() == [0, 0, 1, 0, 0, 0]


def test_the_clock_with_a_buffer_counts_arrivals():
    trace = clock([1.0, 1.1, 10.0], 3, arrivals=2)
    assert (trace.present.sum(1) == 2).all()
    assert trace.times[0] == 1.1


def test_the_clock_with_a_window_takes_what_has_come():
    # Times that are multiples of the window are on time; a client restarts at the window's end.
    trace = clock([0.5, 0.7, 1.5], 6, window=0.5)
    assert trace.present[:, 0].all()
    assert trace.present[:, 1].tolist() == [False, True] * 3
    assert trace.present[:, 2].tolist() == [False, False, True] * 2
    np.testing.assert_allclose(trace.times, 0.5 * np.arange(1, 7))


def test_the_clock_takes_durations_that_vary():
    def durations(client, k):
        return [1.0, 3.0][k % 2]

    durations.n_clients = 1
    assert clock(durations, 4, arrivals=1).times.tolist() == [1, 4, 5, 8]


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: draw(Sample(5), 3, 1), "between 1 and the 3 clients, got 5"),
        (lambda: Bernoulli([0.0, 1.0]), r"\(0, 1\]"),
        (lambda: Markov([1.0]), r"\(0, 1\)"),
        (lambda: Cyclic(0), "at least 1"),
        (lambda: clock([1.0], 1, arrivals=1, window=1.0), "not both"),
        (lambda: clock([1.0], 1, arrivals=2), "1..1"),
        (lambda: clock([1.0], 1, window=0.0), "positive"),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
