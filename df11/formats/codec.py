"""What encoders and decoders of the compressed layouts share: threads, and checks of a stream against what it should hold."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import xxhash

from df11.formats import FormatError

T = TypeVar("T")
R = TypeVar("R")


class Codec:
    """Work is spread over `threads` threads (0: all cores)."""

    def __init__(self, threads: int = 0) -> None:
        if threads < 0:
            raise ValueError(f"threads={threads}: give a number of threads, or 0 for all cores")
        self.threads = threads or len(os.sched_getaffinity(0))
        self._pool = ThreadPoolExecutor(self.threads) if self.threads > 1 else None

    def _map(self, function: Callable[[T], R], items: Sequence[T]) -> list[R]:
        # The numba kernels release the GIL. One thread means this one.
        if self._pool is None or len(items) < 2:
            return [function(item) for item in items]
        return list(self._pool.map(function, items))


def check_count(n: int, shapes: Sequence[tuple[int, ...]]) -> None:
    """Raise ValueError unless a stream to encode holds as many weights as tensors of these shapes."""
    expected = sum(math.prod(shape) for shape in shapes)
    if n != expected:
        raise ValueError(f"the stream holds {n} weights where the shapes ask for {expected}")


def checked(pieces: Iterable[np.ndarray], checksum: str) -> Iterator[np.ndarray]:
    """The pieces of a decoded stream, uint16. Raises FormatError after the last where they do not match the checksum, if any."""
    digest = xxhash.xxh3_128()
    for piece in pieces:
        digest.update(piece.data)
        yield piece
    if checksum and digest.hexdigest() != checksum:
        raise FormatError("the decoded weights do not match the stored checksum: the data was altered")
