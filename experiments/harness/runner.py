"""One point of a sweep, from config to stored rows: skip what is done, resume what was interrupted, keep what failed."""

from __future__ import annotations

import ast
import fcntl
import hashlib
import importlib
import json
import random
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments.harness import gpus, preflight, provenance, sinks, tracking
from experiments.harness.api import NOT_APPLICABLE, SCHEMA, did_you_mean
from experiments.harness.compare import compare
from experiments.harness.outcomes import Outcome
from experiments.harness.store import Journal, ResultError, complete, promote, read_csv, to_csv, write_atomically

CODE = ("df11", "kernels", "experiments/harness/timing.py", "experiments/harness/memory.py")  # what every experiment measures with
VERSIONS = ("torch", "transformers", "numpy", "numba")  # of packages that decide speed, initialisation or random draws
# Measured too where they are installed.
PEERS = ("dfloat11", "nvidia-libnvcomp-cu13", "lm-eval", "glyd", "neural-weight-compression")
COMMITTED = provenance.ROOT / "results"  # what compare=... compares with, wherever results_dir is
SEMANTIC = ("experiment", "model", "codec", "bench", "eval", "device", "seed")  # the part of a config that decides a result


class UsageError(Exception):
    """A command that asks for something that is not there. Shown without a traceback."""


def typed(config: Any, schema: type) -> Any:
    """A Hydra config as the dataclasses of `schema`; a key that they do not have raises UsageError with the nearest one."""
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), config))
    except OmegaConfBaseException as error:
        known = [str(key) for key in _keys(OmegaConf.structured(schema))]
        unknown = str(getattr(error, "full_key", None) or getattr(error, "key", ""))
        hint = did_you_mean(unknown, known) if unknown not in known else ""
        raise UsageError(f"config key {unknown!r}: {str(error).splitlines()[0]}{hint}") from error
    except ValueError as error:
        raise UsageError(str(error)) from error


def _keys(node: Any, prefix: str = "") -> Iterator[str]:
    for key, value in node.items_ex(resolve=False):
        yield f"{prefix}{key}"
        if OmegaConf.is_dict(value):
            yield from _keys(value, f"{prefix}{key}.")


def find(name: str | None, experiments: Mapping[str, str]) -> ModuleType:
    """The experiment's module, imported now and not before."""
    if name is None:
        listed = "\n".join(f"  python run.py experiment={known}" for known in experiments)
        raise UsageError(f"choose an experiment:\n{listed}")
    return importlib.import_module(_known(name, experiments))


def _known(name: str, experiments: Mapping[str, str]) -> str:
    """The path of the experiment's module."""
    if name not in experiments:
        raise UsageError(f"no experiment {name!r}{did_you_mean(name, experiments)}")
    return experiments[name]


def run_id(config: Any, module: ModuleType, gpu: str) -> str:
    """Hash of all that decides a result: config, code, GPU, input files, versions of packages. A changed kernel is a new run.

    Files beside the experiment that no import of its tells, it names itself, in FILES.
    """
    semantic = {name: value for name, value in asdict(config).items() if name in SEMANTIC}
    own = Path(str(module.__file__)).resolve()
    named = [own.parent / name for name in getattr(module, "FILES", ())]
    code = provenance.hash_files([*(path for name in CODE for path in provenance.files(name)), *imported(own), *named])
    inputs = module.inputs(config) if hasattr(module, "inputs") else None
    versions = [provenance.version(name) for name in (*VERSIONS, *PEERS)]
    text = json.dumps([SCHEMA, semantic, code, gpu, inputs, versions], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def imported(path: Path) -> set[Path]:
    """A module's file and those beside it that it imports, directly or not: what experiments share decides results too."""
    found, waiting = {path}, [path]
    while waiting:
        for node in ast.walk(ast.parse(waiting.pop().read_text())):
            if isinstance(node, ast.ImportFrom):
                names = [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
            else:
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            beside = {path.with_name(f"{name.rpartition('.')[2]}.py") for name in names if name.split(".")[0] == path.parent.name}
            new = {file for file in beside if file.exists()} - found
            found |= new
            waiting += new
    return found


def run(config: Any, schema: type, experiments: Mapping[str, str], group: str = "") -> Outcome:
    """Run one config. Errors of the experiment end in ERROR.txt and a failed Outcome; errors of use raise UsageError."""
    cfg = typed(config, schema)
    if cfg.compare is not None:
        return _compare(cfg, experiments)
    module = find(cfg.experiment, experiments)
    results = Path(cfg.results_dir)
    if cfg.preflight:
        good = preflight.check(module.preflight(cfg), results, cfg.device.name)
        return Outcome(cfg.experiment, cfg.model.name, "checked" if good else "failed", detail="" if good else "not enough")
    try:
        if cfg.one_gpu and cfg.device.name != "cpu":
            gpus.claim()
        gpu, count = provenance.gpu_name(cfg.device.name)
    except (gpus.NoGpuFree, provenance.ProvenanceError) as error:
        raise UsageError(str(error)) from error
    fixed = {
        "experiment": cfg.experiment,
        "run_id": run_id(cfg, module, gpu),
        "model": cfg.model.name,
        "gpu": gpu,
        "gpus": count,
    }
    folder = results / "runs" / cfg.experiment / fixed["run_id"]
    with _locked(folder):
        source = _source()
        if cfg.promote and source["dirty"] and not cfg.promote_anyway:
            raise UsageError("promote=true, but the tree has uncommitted changes: commit first, or promote_anyway=true")
        with tracking.mirror(cfg.logger, folder, group or cfg.experiment, asdict(cfg)) as log:
            if (folder / "DONE").exists() and not cfg.force:
                outcome = Outcome(cfg.experiment, cfg.model.name, "skipped", str(folder), "done before; force=true runs it again")
            else:
                outcome = _measure(cfg, module, fixed, folder, source)
            if outcome.state in ("ok", "skipped"):
                log(*_present(cfg, module, results, folder))
    return outcome


def _compare(cfg: Any, experiments: Mapping[str, str]) -> Outcome:
    _known(cfg.compare, experiments)
    results, csv = Path(cfg.results_dir), Path(cfg.compare_csv) if cfg.compare_csv else None
    try:
        lines = compare(results, COMMITTED, cfg.compare, csv)
    except ResultError as error:
        raise UsageError(str(error)) from error
    return Outcome(cfg.compare, NOT_APPLICABLE, "compared", str(csv or results / "runs" / cfg.compare), f"{lines} lines")


def _source() -> dict[str, Any]:
    try:
        return provenance.source()
    except provenance.ProvenanceError as error:
        raise UsageError(str(error)) from error


def _measure(cfg: Any, module: ModuleType, fixed: dict[str, Any], folder: Path, source: dict[str, Any]) -> Outcome:
    for name in ("DONE", "ERROR.txt", *(["points.jsonl"] if cfg.force else [])):
        (folder / name).unlink(missing_ok=True)
    journal = Journal(folder)
    resumed = len(journal.points)
    if resumed:
        print(f"{folder}: goes on after {resumed} finished points", file=sys.stderr)
    random.seed(cfg.seed)
    np.random.seed(cfg.seed % 2**32)
    record = {
        "source": source,
        "command": provenance.command(),
        "config": {name: value for name, value in asdict(cfg).items() if name in SEMANTIC},
        "machine": provenance.machine(),
        "gpu": fixed["gpu"],
        "cuda": provenance.cuda_version(cfg.device.name),
        "gpu_before": provenance.gpu_state(cfg.device.name),
        "resumed_after_points": resumed,
        "start": provenance.now(),
    }
    try:
        for point in module.run(cfg, dict(journal.points)):
            for row in point.rows:
                complete(row, fixed, module.AXES)
            journal.append(point)
        if not journal.rows:
            raise ResultError("the experiment gave no rows")
    except Exception:  # whatever an experiment raises is kept, and a sweep goes on
        write_atomically(folder / "ERROR.txt", traceback.format_exc())
        traceback.print_exc()
        return Outcome(fixed["experiment"], fixed["model"], "failed", str(folder), str(sys.exc_info()[1]))
    record |= {"end": provenance.now(), "gpu_after": provenance.gpu_state(cfg.device.name)}
    record["about"] = journal.about
    rows = [complete(row, fixed, module.AXES) for row in journal.rows]
    write_atomically(folder / "rows.csv", to_csv(rows, list(rows[0])))
    write_atomically(folder / "provenance.json", json.dumps(record, indent=2, default=str) + "\n")
    write_atomically(folder / "DONE", record["end"] + "\n")
    return Outcome(fixed["experiment"], fixed["model"], "ok", str(folder))


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Two processes never write the same run. The lock goes with the process, however it ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"{folder} is being written by another process: wait for it") from None
        yield


def _present(cfg: Any, module: ModuleType, results: Path, folder: Path) -> tuple[list[dict[str, Any]], pd.DataFrame]:
    """Show a finished run and promote it if asked; its rows and its short table."""
    rows = read_csv(folder / "rows.csv")
    table = module.table(pd.DataFrame(rows), cfg)
    sinks.show(table, f"{cfg.experiment}, {cfg.model.name} ({rows[0]['weights']} weights)")
    if cfg.promote:
        try:
            changes = promote(results, cfg.experiment, folder, cfg.promote_anyway)
        except ResultError as error:
            raise UsageError(str(error)) from error
        for change in changes:
            print(f"replaced: {change}")
        print(f"promoted to {results / cfg.experiment}.csv")
    return rows, table


def refuse_dropped_sweep(hydra: Any) -> None:
    """Raise UsageError where Hydra 1.3 composed a job of `-m experiment=a,b` without the sweep that the file declares.

    Hydra reads `hydra.sweeper.params` before it knows which experiment a job is, so such a sweep is silently lost.
    """
    declared = set((hydra.sweeper.get("params") or {}).keys())
    given = {override.split("=", 1)[0].lstrip("+") for override in hydra.overrides.task}
    if declared - given:
        choice = hydra.runtime.choices.experiment
        raise UsageError(
            f"experiment={choice} sweeps {', '.join(sorted(declared))} itself, and -m with several experiments drops that: "
            f"run `python run.py experiment={choice}` on its own"
        )
