"""How the jobs of a sweep ended. A launcher may run them in other processes or on other machines, so they leave files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from experiments.harness.store import write_atomically


@dataclass(frozen=True)
class Outcome:
    """How one job of a sweep ended."""

    experiment: str
    model: str
    state: str  # ok | skipped | failed | checked | compared
    folder: str = ""
    detail: str = ""


def record(outcome: Outcome, folder: Path, job: int) -> None:
    """Leave a job's outcome in a folder that all jobs of the sweep share; a second one replaces the first."""
    write_atomically(folder / f"{job:06}.json", json.dumps(asdict(outcome)))


def recorded(folder: Path) -> list[Outcome]:
    """Outcomes in the order of the jobs."""
    return [Outcome(**json.loads(path.read_text())) for path in sorted(folder.glob("*.json"))]


def report(outcomes: Sequence[Outcome]) -> int:
    """Print how each job ended; the exit status, 1 if any failed. A single failure has been told already."""
    for o in outcomes if len(outcomes) > 1 else [o for o in outcomes if o.state != "failed"]:
        print(f"{o.state}: {o.experiment} {o.model} {o.folder}" + (f" ({o.detail})" if o.detail else ""))
    return int(any(o.state == "failed" for o in outcomes))
