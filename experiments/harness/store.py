"""Results on disk: a journal while a run goes on, a table when it is done, promoted tables for the figures."""

from __future__ import annotations

import csv
import fcntl
import io
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.harness.api import IDENTITY, MEASURE, NOT_APPLICABLE, Point, did_you_mean


class ResultError(Exception):
    """Results that must not be written or mixed as asked."""


def write_atomically(path: Path, text: str) -> None:
    """All of the file or nothing of it, also after a crash."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def complete(row: dict[str, Any], fixed: dict[str, Any], axes: Sequence[str]) -> dict[str, Any]:
    """A row with every column in order. Raises ResultError on a missing, unknown or non-finite entry."""
    columns = (*IDENTITY, *axes, *MEASURE)
    merged = dict.fromkeys(columns, NOT_APPLICABLE) | {"repeat": 0} | fixed | row
    for name in merged:
        if name not in columns:
            raise ResultError(f"a row has the unknown column {name!r}{did_you_mean(name, columns)}")
    for name in ("metric", "value", "unit"):
        if merged[name] == NOT_APPLICABLE:
            raise ResultError(f"a row of metric {merged['metric']!r} has no {name}")
    value = merged["value"]
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value or abs(value) == float("inf"):
        raise ResultError(f"{merged['metric']}: {value!r} is not a finite number; a thing not run has no row")
    return merged


class Journal:
    """points.jsonl: one line a point, on disk before the next point starts. A line cut short by a crash is dropped."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "points.jsonl"
        self.points: dict[str, list[dict[str, Any]]] = {}
        self.about: dict[str, Any] = {}
        if self.path.exists():
            data = self.path.read_bytes()
            whole = data[: data.rfind(b"\n") + 1]
            if whole != data:
                with self.path.open("r+b") as file:
                    file.truncate(len(whole))
            for line in whole.splitlines():
                point = json.loads(line)
                self.points[point["key"]] = point["rows"]
                self.about |= point["about"]

    def append(self, point: Point) -> None:
        if point.key in self.points:
            raise ResultError(f"the point {point.key!r} was yielded twice")
        self.points[point.key] = point.rows
        self.about |= point.about
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps({"key": point.key, "rows": point.rows, "about": point.about}) + "\n")
            file.flush()
            os.fsync(file.fileno())

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [row for rows in self.points.values() for row in rows]


def to_csv(rows: Iterable[dict[str, Any]], columns: Sequence[str]) -> str:
    """Rows as text with a fixed float format, so that a diff shows which numbers moved."""
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, restval=NOT_APPLICABLE, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: f"{v:.10g}" if isinstance(v, float) else v for k, v in row.items()})
    return out.getvalue()


def read_csv(path: Path) -> list[dict[str, Any]]:
    """Rows as `to_csv` wrote them; value is a number, all else text."""
    with path.open(newline="") as file:
        return [row | {"value": _number(row["value"])} for row in csv.DictReader(file)]


def _number(text: str) -> float:
    return int(text) if text.lstrip("-").isdigit() else float(text)


def load_all(results: Path, experiment: str) -> pd.DataFrame:
    """All finished, unpromoted runs of an experiment in one frame."""
    tables = sorted((results / "runs" / experiment).glob("*/DONE"))
    return pd.DataFrame([row for done in tables for row in read_csv(done.with_name("rows.csv"))])


def promote(results: Path, experiment: str, run: Path, anyway: bool = False) -> list[str]:
    """Merge a finished run into results/<experiment>.csv: the new row of a key replaces the old one. Returns what changed.

    Refuses (ResultError) a run from a tree with uncommitted changes and rows of another GPU than those there, unless `anyway`.
    """
    with (run.parent / "promote.lock").open("w") as lock:  # jobs of a sweep may end at the same time
        fcntl.flock(lock, fcntl.LOCK_EX)
        return _merge(results, experiment, run, anyway)


def _merge(results: Path, experiment: str, run: Path, anyway: bool) -> list[str]:
    provenance = json.loads((run / "provenance.json").read_text())
    target = results / f"{experiment}.csv"
    new, old = read_csv(run / "rows.csv"), read_csv(target) if target.exists() else []
    if provenance["source"]["dirty"] and not anyway:
        raise ResultError(f"{run.name} comes from a tree with uncommitted changes: commit and run again, or promote_anyway=true")
    have, more = ({row["gpu"] for row in rows} - {NOT_APPLICABLE} for rows in (old, new))
    if have and more - have and not anyway:
        raise ResultError(f"{target} would mix the GPUs {', '.join(sorted(have | more))}: promote_anyway=true if that is meant")
    columns = list(dict.fromkeys([*(old[0] if old else ()), *new[0]]))
    order = [c for c in columns if c not in MEASURE] + list(MEASURE)

    def key(row: dict[str, Any]) -> tuple[str, ...]:
        return tuple(str(row.get(c, NOT_APPLICABLE)) for c in order if c not in ("run_id", "value"))

    def measured(row: dict[str, Any]) -> tuple[str, ...]:
        return tuple(str(row.get(c, NOT_APPLICABLE)) for c in order if c not in ("run_id", "value", "repeat"))

    # All samples of what was measured again go, also where there are fewer now.
    again = {measured(row) for row in new}
    replaced = {key(row): row for row in old if measured(row) in again}
    kept_rows = {key(row): row for row in old if measured(row) not in again}
    before, after = replaced, {key(row): row for row in new}
    changes = []
    for k in before.keys() & after.keys():
        a, b = before[k]["value"], after[k]["value"]
        if a != b:
            changes.append(f"{after[k]['model']} {after[k]['metric']}: {a:.10g} -> {b:.10g}")
    changes += [f"{row['model']} {row['metric']}: {row['value']:.10g} -> none" for k, row in before.items() if k not in after]
    merged = sorted((kept_rows | after).items(), key=lambda item: [_sortable(part) for part in item[0]])
    write_atomically(target, to_csv([row for _, row in merged], order))
    folder = results / "provenance"
    folder.mkdir(exist_ok=True)
    shutil.copy(run / "provenance.json", folder / f"{experiment}-{run.name}.json")
    kept = {f"{experiment}-{row['run_id']}.json" for _, row in merged}
    for path in folder.glob(f"{experiment}-*.json"):
        if path.name not in kept:
            path.unlink()
    return sorted(changes)


def _sortable(text: str) -> tuple[int, float, str]:
    """Numbers in the order of their values, before words."""
    try:
        return (0, float(text), text)
    except ValueError:
        return (1, 0.0, text)
