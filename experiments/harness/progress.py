"""Progress of long work, on a terminal only."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import TypeVar

from rich.progress import track as rich_track

T = TypeVar("T")


def track(items: Sequence[T], description: str) -> Iterator[T]:
    """Iterate with a progress bar on standard error; without one where that is not a terminal."""
    if sys.stderr.isatty():
        from rich.console import Console

        return iter(rich_track(items, description, console=Console(stderr=True), transient=True))
    return iter(items)
