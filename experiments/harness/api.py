"""What an experiment and the harness say to each other."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SCHEMA = 1  # of a row; part of every run_id
IDENTITY = ("experiment", "run_id", "model", "weights", "codec", "kernel", "mode", "launch", "gpu", "gpus")
MEASURE = ("metric", "value", "unit", "repeat")
NOT_APPLICABLE = "-"


@dataclass(frozen=True)
class Point:
    """Rows that are saved together at once. A resumed run is told which keys it has. `about` goes to the provenance."""

    key: str
    rows: list[dict[str, Any]]
    about: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Need:
    """Something a run needs before it can start, for `preflight=true`. Sizes in bytes, 0 where none."""

    what: str
    disk: int = 0
    folder: Path | None = None  # where on the disk; None: with the results
    setting: str = "results_dir"  # moves that folder
    download: int = 0
    memory: int = 0
    gpu_memory: int = 0
    minutes: float = 0.0
    token: bool = False  # a gated hub repository


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """' (did you mean x?)' where an option is close, and all options otherwise."""
    options = sorted(options)
    close = difflib.get_close_matches(name, options, n=1)
    return f" (did you mean {close[0]!r}?)" if close else f": there are {', '.join(options)}"
