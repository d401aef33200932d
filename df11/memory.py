"""Several arrays in one piece of memory."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch

ALIGNMENT = 256  # bytes; as torch's allocator does at least, so that cuBLAS chooses as for a tensor of its own


def aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def places(arrays: Iterable[torch.Tensor]) -> list[int]:
    """Where each begins, in bytes, and where the last one ends."""
    found = [0]
    for array in arrays:
        found.append(found[-1] + aligned(array.nbytes))
    return found


STAGE = 64 << 20  # bytes of page-locked memory that a thread reads through
_staging = threading.local()


def read_to_gpu(file: Path, ranges: Sequence[tuple[int, int]], device: torch.device) -> list[torch.Tensor]:
    """Bytes of a file, each range from its begin to its end, as uint8 tensors that lie in one piece on a GPU.

    One call of the system reads many ranges, each to its aligned place in page-locked memory, from where one transfer takes all.
    Raises OSError where the file ends before.
    """
    starts = [0]
    for begin, end in ranges:
        starts.append(starts[-1] + aligned(end - begin))
    piece = torch.empty(starts[-1], dtype=torch.uint8, device=device)
    if not hasattr(_staging, "buffer"):
        _staging.buffer = torch.empty(STAGE, dtype=torch.uint8, pin_memory=True)
    buffer: torch.Tensor = _staging.buffer
    host = memoryview(buffer.numpy().data)
    segments = []  # place in the file, place in the piece, bytes; none across a multiple of STAGE in the piece
    for (begin, end), start in zip(ranges, starts, strict=False):
        while begin < end:
            size = min(end - begin, STAGE - start % STAGE)
            segments.append((begin, start, size))
            begin, start = begin + size, start + size
    with file.open("rb", buffering=0) as opened:
        for window, inside in itertools.groupby(segments, lambda segment: segment[1] // STAGE):
            some = list(inside)
            for run in _runs(some):
                _read(opened.fileno(), run[0][0], [host[at % STAGE : at % STAGE + size] for _, at, size in run])
            first, last = some[0][1] % STAGE, some[-1][1] % STAGE + some[-1][2]
            piece[window * STAGE + first : window * STAGE + last].copy_(buffer[first:last], non_blocking=True)
            torch.cuda.current_stream(device).synchronize()  # before others are written there
    return [piece[start : start + end - begin] for (begin, end), start in zip(ranges, starts, strict=False)]


def _runs(segments: list[tuple[int, int, int]]) -> Iterator[list[tuple[int, int, int]]]:
    """Segments that follow one another in the file, as many as one call takes."""
    run: list[tuple[int, int, int]] = []
    for segment in segments:
        if run and (run[-1][0] + run[-1][2] != segment[0] or len(run) == 512):
            yield run
            run = []
        run.append(segment)
    if run:
        yield run


def _read(descriptor: int, at: int, places: list[memoryview]) -> None:
    while places:
        done = os.preadv(descriptor, places, at)
        if not done:
            raise OSError(f"the file ends at {at}")
        at += done
        while places and done >= len(places[0]):
            done -= len(places.pop(0))
        if done:
            places[0] = places[0][done:]


def view(memory: torch.Tensor, at: int, like: torch.Tensor) -> torch.Tensor:
    """The part of `memory`, uint8, that holds an array of the same dtype and shape."""
    return memory[at : at + like.nbytes].view(like.dtype).view(like.shape)
