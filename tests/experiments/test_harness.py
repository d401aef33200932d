import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from omegaconf import DictConfig

from experiments.config import Config
from experiments.harness import memory, outcomes, preflight, provenance, runner, store, timing
from experiments.harness.api import Need, Point, did_you_mean
from experiments.harness.outcomes import Outcome
from tests.experiments.toy import CLEAN, TOY

ROOT = Path(__file__).parents[2]


# Runs: done, skipped, resumed, failed.


def test_a_run_is_stored_then_skipped_then_forced(toy: Callable[..., Outcome]) -> None:
    first = toy()
    folder = Path(first.folder)
    assert first.state == "ok" and (folder / "DONE").exists()
    rows = pd.read_csv(folder / "rows.csv", dtype={"run_id": str})
    assert len(rows) == 6 and list(rows["value"][:2]) == [0, 0] and set(rows["run_id"]) == {folder.name}
    record = json.loads((folder / "provenance.json").read_text())
    assert record["source"] == CLEAN and record["about"] == {"toy": True} and record["machine"]["versions"]["torch"]
    assert toy().state == "skipped"
    before = (folder / "DONE").stat().st_mtime_ns
    assert toy(force=True).state == "ok" and (folder / "DONE").stat().st_mtime_ns > before


def test_a_failure_keeps_its_rows_and_the_next_run_goes_on(
    toy: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TOY_FAILS_AT", "2")
    failed = toy()
    folder = Path(failed.folder)
    assert failed.state == "failed" and "breaks here" in (folder / "ERROR.txt").read_text()
    assert not (folder / "DONE").exists() and not (folder / "rows.csv").exists()
    assert len(store.Journal(folder).points) == 2
    assert outcomes.report([failed]) == 1
    monkeypatch.delenv("TOY_FAILS_AT")
    assert toy().state == "ok" and not (folder / "ERROR.txt").exists()
    assert "goes on after 2" in capsys.readouterr().err
    assert len(pd.read_csv(folder / "rows.csv")) == 6


def test_a_killed_run_leaves_no_done_and_is_resumed_to_the_same_table(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.experiments.toy"]
    environment = os.environ | {"TOY_SECONDS": "0.02", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([*command, str(tmp_path / "killed")], cwd=ROOT, env=environment)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("killed/runs/toy/*/points.jsonl")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.005)
    time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (folder,) = (tmp_path / "killed" / "runs" / "toy").iterdir()
    assert not (folder / "DONE").exists() and not (folder / "rows.csv").exists()
    assert 0 < len(store.Journal(folder).points) < 30
    # A line cut in the middle, as a crash of the machine would leave it.
    with (folder / "points.jsonl").open("a") as file:
        file.write('{"key": "p29", "rows": [{"n": 29, "met')
    for target in ("killed", "whole"):
        subprocess.run([*command, str(tmp_path / target)], cwd=ROOT, env=environment | {"TOY_SECONDS": "0"}, check=True)
    (whole,) = (tmp_path / "whole" / "runs" / "toy").iterdir()
    assert (folder / "rows.csv").read_text() == (whole / "rows.csv").read_text()


def test_a_run_that_another_process_writes_is_refused(toy: Callable[..., Outcome]) -> None:
    folder = Path(toy().folder)
    with runner._locked(folder), pytest.raises(runner.UsageError, match="another process"):
        toy()


def test_the_run_id_follows_what_decides_a_result(toy: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    first = toy().folder
    assert toy(logger={"name": "console", "timeout_s": 3}, promote=False).folder == first
    assert toy(seed=1).folder != first
    assert toy(bench={"repeats": 2}).folder != first
    cfg, module = runner.typed({"experiment": "toy", "model": {"name": "m"}}, Config), runner.find("toy", TOY)
    here, version = runner.run_id(cfg, module, "-"), provenance.version
    assert runner.run_id(cfg, module, "NVIDIA H200") != here
    for name in (*runner.VERSIONS, *runner.PEERS):
        with monkeypatch.context() as changed:
            changed.setattr(provenance, "version", lambda package, name=name: "new" if package == name else version(package))
            assert runner.run_id(cfg, module, "-") != here
    monkeypatch.setattr(module, "FILES", ("conftest.py",), raising=False)
    assert runner.run_id(cfg, module, "-") != here
    monkeypatch.delattr(module, "FILES")
    monkeypatch.setattr(provenance, "hash_files", lambda paths: "changed source")
    assert runner.run_id(cfg, module, "-") != here


def test_the_run_id_follows_shared_modules_too() -> None:
    """Of an experiment, not of another one and not of the harness."""
    experiments = Path(runner.__file__).parents[1]
    names = {path.stem for path in runner.imported(experiments / "generation_length.py")}
    assert {"generation_length", "budget", "decoding", "footprint", "config"} <= names
    assert not names & {"offload", "same_gpu", "runner", "store"}


def test_the_hash_of_the_source_follows_its_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    (tmp_path / "df11").mkdir()
    (tmp_path / "df11" / "a.py").write_text("1")
    first = provenance.tree_hash()
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "x.csv").write_text("1")
    assert provenance.tree_hash() == first
    (tmp_path / "df11" / "a.py").write_text("2")
    assert provenance.tree_hash() != first


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"metrc": "x"}, "did you mean 'metric'"),
        ({"metric": "x", "unit": "s"}, "has no value"),
        ({"metric": "x", "unit": "s", "value": float("nan")}, "not a finite number"),
        ({"metric": "x", "unit": "s", "value": "3"}, "not a finite number"),
        ({"metric": "x", "value": 3}, "has no unit"),
    ],
)
def test_rows_are_checked(row: dict[str, Any], message: str) -> None:
    with pytest.raises(store.ResultError, match=message):
        store.complete(row, {}, ("n",))


def test_a_point_is_yielded_once(tmp_path: Path) -> None:
    journal = store.Journal(tmp_path)
    journal.append(Point("a", []))
    with pytest.raises(store.ResultError, match="twice"):
        journal.append(Point("a", []))


# Promotion.


def finished(folder: Path, run: str, dirty: bool = False, **row: Any) -> Path:
    path = folder / "runs" / "toy" / run
    path.mkdir(parents=True)
    rows = [store.complete({"metric": "time", "value": 1.5, "unit": "s", "n": 1, "model": "m"} | row, {"run_id": run}, ("n",))]
    (path / "rows.csv").write_text(store.to_csv(rows, list(rows[0])))
    (path / "provenance.json").write_text(json.dumps({"source": CLEAN | {"dirty": dirty}}))
    return path


def test_promotion_keeps_the_newest_row_of_a_key_and_says_what_it_replaced(tmp_path: Path) -> None:
    assert store.promote(tmp_path, "toy", finished(tmp_path, "r1")) == []
    assert store.promote(tmp_path, "toy", finished(tmp_path, "r2", n=10)) == []
    assert store.promote(tmp_path, "toy", finished(tmp_path, "r3", value=2)) == ["m time: 1.5 -> 2"]
    rows = store.read_csv(tmp_path / "toy.csv")
    assert [(row["run_id"], row["n"], row["value"]) for row in rows] == [("r3", "1", 2), ("r2", "10", 1.5)]
    # The provenance of a row that is gone goes too.
    assert sorted(p.name for p in (tmp_path / "provenance").iterdir()) == ["toy-r2.json", "toy-r3.json"]


def test_promotion_refuses_changed_trees_and_mixed_gpus(tmp_path: Path) -> None:
    with pytest.raises(store.ResultError, match="uncommitted"):
        store.promote(tmp_path, "toy", finished(tmp_path, "r1", dirty=True))
    store.promote(tmp_path, "toy", finished(tmp_path, "r2", gpu="H100"))
    other = finished(tmp_path, "r3", gpu="H200")
    with pytest.raises(store.ResultError, match="mix the GPUs H100, H200"):
        store.promote(tmp_path, "toy", other)
    store.promote(tmp_path, "toy", other, anyway=True)
    assert len(store.read_csv(tmp_path / "toy.csv")) == 2
    store.promote(tmp_path, "toy", finished(tmp_path, "r4", gpu="H200", value=2))  # which the table has already


def test_promotion_leaves_no_samples_of_the_run_before(tmp_path: Path) -> None:
    run = finished(tmp_path, "r1")
    rows = store.read_csv(run / "rows.csv")
    (run / "rows.csv").write_text(store.to_csv([rows[0] | {"repeat": n} for n in range(3)], list(rows[0])))
    store.promote(tmp_path, "toy", run)
    assert store.promote(tmp_path, "toy", finished(tmp_path, "r2", value=9)) == ["m time: 1.5 -> 9"] + ["m time: 1.5 -> none"] * 2
    assert [row["value"] for row in store.read_csv(tmp_path / "toy.csv")] == [9]


def test_load_all_reads_finished_runs_only(toy: Callable[..., Outcome], tmp_path: Path) -> None:
    toy()
    (Path(toy(seed=1).folder) / "DONE").unlink()
    assert len(store.load_all(tmp_path, "toy")) == 6


# Provenance.


def test_source_json_stands_in_for_git_and_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    (tmp_path / "run.py").write_text("1")
    with pytest.raises(provenance.ProvenanceError, match="before copying"):
        provenance.source()
    written = {"sha": "b" * 40, "dirty": False, "tree": provenance.tree_hash()}
    (tmp_path / "SOURCE.json").write_text(json.dumps(written))
    assert provenance.source() == written
    (tmp_path / "run.py").write_text("2")
    with pytest.raises(provenance.ProvenanceError, match="another tree"):
        provenance.source()


def test_cuda_without_a_gpu_is_an_error_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(provenance.ProvenanceError, match="device=cpu"):
        provenance.gpu_name("cuda")


# Errors of use.


def test_unknown_names_come_with_the_nearest_known_one() -> None:
    with pytest.raises(runner.UsageError, match="did you mean 'toy'"):
        runner.find("tpy", TOY)
    with pytest.raises(runner.UsageError, match="experiment=toy"):
        runner.find(None, TOY)
    with pytest.raises(runner.UsageError, match=r"bench\.repeat.*did you mean 'bench.repeats'"):
        runner.typed({"bench": {"repeat": 2}}, Config)
    assert did_you_mean("zzz", ["b", "a"]) == ": there are a, b"


def test_preflight_runs_nothing_and_says_what_is_lacking(
    toy: Callable[..., Outcome],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert toy(preflight=True).state == "checked"
    monkeypatch.setenv("TOY_DISK", str(10**18))
    assert toy(preflight=True).state == "failed"
    assert "NOT ENOUGH" in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()


def test_preflight_asks_the_disk_that_is_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (small := tmp_path / "small").mkdir()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=5e9 if path == small else 15e9))
    need = Need("a", 10**10, small / "cache", "cache_dir")
    assert not preflight.check([need], tmp_path, "cpu")
    assert (
        f"disk of {small}/cache: 10.0 GB needed, 5.0 GB there - NOT ENOUGH: free some, or set cache_dir\n"
        in capsys.readouterr().out
    )
    assert preflight.check([replace(need, folder=tmp_path / "cache")], small, "cpu")
    # Two folders of one file system share what is free.
    assert not preflight.check([Need("b", 10**10), replace(need, folder=tmp_path / "cache")], tmp_path, "cpu")
    assert "20.0 GB needed, 15.0 GB there - NOT ENOUGH: free some, or set results_dir or cache_dir\n" in capsys.readouterr().out


def test_typed_config_equals_the_composed_one(config: Callable[..., DictConfig]) -> None:
    assert asdict(runner.typed(config(), Config))["model"]["geometry"]["hidden_size"] == 128


# Instruments.


def test_wall_clock_returns_raw_samples_without_the_warm_up() -> None:
    calls: list[int] = []
    samples = timing.wall_clock(lambda: calls.append(1), warmup=2, repeats=3)
    assert len(calls) == 5 and len(samples) == 3 and min(samples) >= 0


def test_peak_memory_sees_an_allocation_and_its_reset() -> None:
    memory.reset_peak()
    block = bytearray(os.urandom(1 << 20) * 128)
    assert memory.peak() >= memory.resident() >= len(block)
    high = memory.peak()
    del block
    memory.reset_peak()
    assert memory.peak() < high - (64 << 20)
