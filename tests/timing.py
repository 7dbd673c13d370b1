"""What benchmarks time their rivals with."""

import time


def median_seconds(f, rounds):
    """Return the median wall time of `rounds` calls of f."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        f()
        times.append(time.perf_counter() - start)
    return sorted(times)[rounds // 2]
