"""Timing: wall clock for work on the CPU, events for work on a GPU. Raw samples: what to make of them is for the reader."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TypeVar

T = TypeVar("T")

FLUSH_BYTES = 512 << 20  # more than eight times the L2 cache of an H200: 0.2 ms, in which the host enqueues what is timed


def wall_clock(work: Callable[[], object], warmup: int, repeats: int) -> list[float]:
    """Seconds of each of `repeats` calls after `warmup` uncounted ones."""
    for _ in range(warmup):
        work()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return seconds


def cuda_events(works: Mapping[str, Callable[[], object]], warmup: int, repeats: int) -> dict[str, list[float]]:
    """Seconds on torch's current stream of each of `repeats` calls of each work, taken in turns (A B A B).

    Before each call FLUSH_BYTES are overwritten, which empties the L2 cache and keeps the GPU busy while the host enqueues the
    call, so that launch latency is not counted.
    """
    import torch

    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in works}
    for turn in range(-warmup, repeats):
        for name, work in works.items():
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            flush.fill_(turn & 127)
            start.record()
            work()
            stop.record()
            if turn >= 0:
                events[name].append((start, stop))
        torch.cuda.synchronize()
    return {name: [start.elapsed_time(stop) * 1e-3 for start, stop in pairs] for name, pairs in events.items()}


def synchronize(device: str) -> None:
    """Wait until all that was enqueued on a GPU is done; on the CPU nothing is enqueued."""
    if device != "cpu":
        import torch

        torch.cuda.synchronize()


def graph(work: Callable[[], T]) -> Callable[[], T]:
    """The replay of a CUDA graph of what `work` enqueues; it returns what `work` did, written anew.

    `work` is called once before, so that what it loads lazily is there.
    """
    import torch

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured, stream=stream):
        kept = work()

    def replay() -> T:
        captured.replay()
        return kept

    return replay
