"""`compare=<experiment>`: a user's own finished runs beside the committed table. Measures nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.harness import sinks
from experiments.harness.api import NOT_APPLICABLE
from experiments.harness.store import ResultError, read_csv, write_atomically

NO_KEY = ("run_id", "value", "repeat", "gpus")  # of two GPUs, gpu says `2 x NAME`

Record = dict[str, Any]  # a provenance.json


def compare(results: Path, committed: Path, experiment: str, csv: Path | None = None) -> int:
    """Print own runs, below `results`, beside the table in `committed`, and write that to `csv`; the number of its lines.

    Raises ResultError where a side is missing.
    """
    table, folder = committed / f"{experiment}.csv", results / "runs" / experiment
    if not table.exists():
        raise ResultError(
            f"there is no committed table {table}: `git restore {table}` brings back a deleted one, "
            f"`python run.py experiment={experiment} promote=true` makes one"
        )
    if not (runs := _finished(folder)):
        where = "" if results.resolve() == committed.resolve() else f" results_dir={results}"
        raise ResultError(f"there is no finished run in {folder}: measure first, `python run.py experiment={experiment}{where}`")
    tables = [read_csv(table), *(read_csv(run / "rows.csv") for run in runs)]
    key = [c for c in dict.fromkeys(c for rows in tables for c in rows[0]) if c not in NO_KEY]
    theirs, own = _reduced(tables[:1], key), _reduced(tables[1:], key)
    lines = _matched(theirs, own, key)
    pairs = {
        (there, here): (
            _record(committed / "provenance" / f"{experiment}-{there}.json"),
            _record(folder / here / "provenance.json"),
        )
        for there, here in dict.fromkeys(zip(lines["run_id_committed"], lines["run_id_own"], strict=True))
    }
    for difference in differences(list(pairs.values())):
        print(difference)
    if same := sorted({here for (there, here), (a, b) in pairs.items() if there == here and a == b}):
        print(f"compared with itself, because promote=true copied it to {table}: {', '.join(same)}")
    if lines.empty:
        print("; ".join(["no row in common", *_disjoint(theirs, own, key)]))
    else:
        _show(lines, key, experiment)
    lacking = [len(side) - lines[row].nunique() for side, row in ((theirs, "row_committed"), (own, "row_own"))]
    print(f"without a counterpart, repeats counted once: {lacking[0]} committed rows, {lacking[1]} of your own")
    if csv:
        columns = [c for c in lines if not c.startswith("row_")]
        write_atomically(csv, lines[columns].to_csv(index=False, float_format="%.10g", na_rep=NOT_APPLICABLE))
    return len(lines)


def differences(pairs: Sequence[tuple[Record, Record]]) -> list[str]:
    """A line for each fact in which the records of a committed and an own run differ."""
    facts = [(_facts(theirs), _facts(own)) for theirs, own in pairs]
    out = []
    for name in _facts({}):
        differing = [(a[name], b[name]) for a, b in facts if a[name] != b[name]]
        if differing:
            theirs, own = (", ".join(sorted(set(side))) for side in zip(*differing, strict=True))
            out.append(f"{name}: committed {theirs}; your own {own}")
    return out


def _facts(record: Record) -> dict[str, str]:
    machine, source = record.get("machine", {}), record.get("source", {})
    versions = machine.get("versions", {})
    gpu = record.get("gpu", "not recorded")
    unknown = "none" if gpu == NOT_APPLICABLE else "not recorded"
    return {
        "GPU": unknown if gpu == NOT_APPLICABLE else gpu,
        "driver": record.get("gpu_before", "").split(",")[0] or unknown,
        "torch": versions.get("torch", "not recorded"),
        "CUDA": record.get("cuda") or unknown,
        "transformers": versions.get("transformers", "not recorded"),
        "commit": (source.get("sha", "")[:12] or "not recorded") + (" with changes" if source.get("dirty") else ""),
        "python": machine.get("python", "not recorded"),
    }


def _record(path: Path) -> Record:
    record: Record = json.loads(path.read_text()) if path.exists() else {}
    return record


def _finished(folder: Path) -> list[Path]:
    """Finished runs, newest first."""
    runs = [done.parent for done in folder.glob("*/DONE") if done.with_name("rows.csv").exists()]
    return sorted(runs, key=lambda run: ((run / "DONE").read_text(), (run / "DONE").stat().st_mtime_ns), reverse=True)


def _reduced(runs: Sequence[list[dict[str, Any]]], key: list[str]) -> pd.DataFrame:
    """One row a key: the median of its repeats in the first run that has it."""
    frame = pd.DataFrame([dict.fromkeys(key, NOT_APPLICABLE) | row | {"run": n} for n, rows in enumerate(runs) for row in rows])
    one = frame["gpus"].isin(["0", "1", NOT_APPLICABLE])
    frame["gpu"] = frame["gpu"].where(one, frame["gpus"] + " x " + frame["gpu"])
    frame = frame[frame["run"] == frame.groupby(key)["run"].transform("min")]
    out = frame.groupby(key, sort=False, as_index=False).agg(value=("value", "median"), run_id=("run_id", "first"))
    return out.assign(row=range(len(out)))


def _matched(theirs: pd.DataFrame, own: pd.DataFrame, key: list[str]) -> pd.DataFrame:
    """Pairs of rows with the same key. An own row that has none on the same GPU is paired with those of all GPUs."""
    shared = [c for c in key if c != "gpu"]
    lines = theirs.merge(own, on=shared, suffixes=("_committed", "_own"))
    # In the order of the committed table, but the GPUs of a key one under another.
    first = lines.groupby(shared)["row_committed"].transform("min")
    lines = lines.assign(first=first).sort_values(["first", "row_committed", "row_own"], ignore_index=True)
    same = lines["gpu_committed"] == lines["gpu_own"]
    lines = lines[same | ~lines["row_own"].isin(set(lines.loc[same, "row_own"]))].reset_index(drop=True)
    # A multiple of 0 says nothing.
    lines["ratio"] = lines["value_own"] / lines["value_committed"].where(lines["value_committed"] != 0)
    sides = [f"{name}_{side}" for name in ("gpu", "value", "run_id", "row") for side in ("committed", "own")]
    return lines[[*shared, *sides, "ratio"]]


def _show(lines: pd.DataFrame, key: list[str], experiment: str) -> None:
    """What varies as columns; what is the same in all lines in the title."""
    names = [c for c in key if c not in ("experiment", "gpu", "metric", "unit")]
    varying = [c for c in names if lines[c].nunique() > 1]
    fixed = [f"{c} {lines[c].iloc[0]}" for c in names if c not in varying and lines[c].iloc[0] != NOT_APPLICABLE]
    gpus = [c for c in ("gpu_committed", "gpu_own") if lines[c].nunique() > 1]
    shown = lines[[*varying, *gpus, "metric", "unit", "value_committed", "value_own", "ratio"]]
    labels = {"gpu_committed": "committed gpu", "gpu_own": "own gpu", "value_committed": "committed", "value_own": "own"}
    title = f"{experiment}, committed and own" + (f" ({', '.join(fixed)})" if fixed else "")
    sinks.show(shown.rename(columns=labels | {"ratio": "own/committed"}), title)


def _disjoint(theirs: pd.DataFrame, own: pd.DataFrame, key: list[str]) -> list[str]:
    """The columns of the key, GPU aside, that have no value on both sides."""
    values = {c: (sorted(set(theirs[c])), sorted(set(own[c]))) for c in key if c != "gpu"}
    return [f"{c}: committed {', '.join(a)}, your own {', '.join(b)}" for c, (a, b) in values.items() if not set(a) & set(b)]
