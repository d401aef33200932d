"""Wall-clock timing of work on the CPU."""

from __future__ import annotations

import time
from collections.abc import Callable


def wall_clock(work: Callable[[], object], warmup: int, repeats: int) -> list[float]:
    """Seconds of each of `repeats` calls after `warmup` uncounted ones. Raw samples: what to make of them is for the reader."""
    for _ in range(warmup):
        work()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return seconds
