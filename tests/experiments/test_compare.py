import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from experiments.config import Config
from experiments.harness import compare, runner, store
from experiments.harness.api import Point
from experiments.harness.outcomes import Outcome
from tests.experiments import toy as toy_module

ROOT = Path(__file__).parents[2]
H100, H200, A100 = "NVIDIA H100 80GB HBM3", "NVIDIA H200", "NVIDIA A100"


@pytest.fixture
def toy(toy: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """The folder of its results holds the committed tables too."""
    monkeypatch.setattr(runner, "COMMITTED", tmp_path)
    return toy


def record(gpu: str = "-", **changes: Any) -> dict[str, Any]:
    """A provenance.json."""
    driver = "" if gpu == "-" else "580.1, 345 MHz, 2619 MHz, 31, 69.67 W"
    machine = {"python": "3.12.3", "versions": {"torch": "2.11.0", "transformers": "5.17.0"}}
    return {"source": {"sha": "a" * 40, "dirty": False}, "gpu": gpu, "gpu_before": driver, "machine": machine} | changes


def row(value: float, gpu: str = "-", **changes: Any) -> dict[str, Any]:
    return {"metric": "time", "unit": "s", "model": "m", "n": 1, "value": value, "gpu": gpu, "gpus": int(gpu != "-")} | changes


def finished(results: Path, run: str, rows: Sequence[dict[str, Any]], end: str = "2026-01-01", **changes: Any) -> Path:
    """A finished run, written as the runner does."""
    path = results / "runs" / "toy" / run
    path.mkdir(parents=True)
    whole = [store.complete(one, {"experiment": "toy", "run_id": run}, ("n",)) for one in rows]
    (path / "rows.csv").write_text(store.to_csv(whole, list(whole[0])))
    (path / "provenance.json").write_text(json.dumps(record(rows[0]["gpu"], **changes)))
    (path / "DONE").write_text(f"{end}\n")
    return path


@pytest.fixture
def committed(tmp_path: Path) -> Callable[..., None]:
    """Adds the rows of a run to the table in `committed`."""
    (tmp_path / "committed").mkdir()

    def add(run: str, *rows: dict[str, Any]) -> None:
        store.promote(tmp_path / "committed", "toy", finished(tmp_path / "others", run, rows), anyway=True)

    return add


@pytest.fixture
def compared(tmp_path: Path) -> Callable[[], pd.DataFrame]:
    """Compares the toy's runs in `own` with the table in `committed`; the lines."""

    def call() -> pd.DataFrame:
        csv = tmp_path / "out.csv"
        lines = compare.compare(tmp_path / "own", tmp_path / "committed", "toy", csv)
        frame = pd.read_csv(csv, dtype={"run_id_own": str})
        assert len(frame) == lines
        return frame

    return call


# Through the runner.


def test_a_run_is_compared_with_what_was_promoted_before_it(
    toy: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    toy(promote=True)

    def twice(cfg: Config, done: Any) -> Any:
        for n in range(cfg.bench.repeats):
            yield Point(f"p{n}", [{"n": n, "metric": m, "value": 2 * n * f, "unit": "1"} for m, f in (("whole", 1), ("half", 0.5))])

    original = toy_module.run
    monkeypatch.setattr(toy_module, "run", twice)
    assert toy(force=True).state == "ok"
    monkeypatch.setattr(toy_module, "run", original)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    capsys.readouterr()
    csv = tmp_path / "out.csv"
    outcome = toy(experiment=None, compare="toy", compare_csv=str(csv))
    assert (outcome.state, outcome.detail) == ("compared", "6 lines")
    out = capsys.readouterr().out
    assert "toy, committed and own (model m)" in out and "own/committed" in out and "2.000" in out
    assert "0 committed rows, 0 of your own" in out and "itself" not in out
    lines = pd.read_csv(csv, na_values="-")
    assert list(lines["n"]) == [0, 0, 1, 1, 2, 2]
    assert list(lines["ratio"].dropna()) == [2, 2, 2, 2]  # none of 0
    csv.unlink()
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path in before} == before


def test_a_promoted_run_is_named_as_compared_with_itself(toy: Callable[..., Outcome], capsys: pytest.CaptureFixture[str]) -> None:
    folder = toy(promote=True).folder
    assert toy(compare="toy").state == "compared"
    assert f"promote=true copied it to {Path(folder).parents[2] / 'toy.csv'}: {Path(folder).name}" in capsys.readouterr().out


def test_what_is_missing_is_said_with_a_command(
    toy: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(runner.UsageError, match="did you mean 'toy'"):
        toy(compare="tyo")
    with pytest.raises(runner.UsageError, match=r"no committed table .*toy\.csv.*experiment=toy promote=true"):
        toy(compare="toy")
    done = Path(toy(promote=True).folder) / "DONE"
    done.unlink()
    with pytest.raises(runner.UsageError, match=r"no finished run .*`python run.py experiment=toy`"):
        toy(compare="toy")
    with pytest.raises(runner.UsageError, match=r"`python run.py experiment=toy results_dir=\S+/elsewhere`"):
        toy(compare="toy", results_dir=str(tmp_path / "elsewhere"))


def test_the_command_compares_with_the_table_of_the_repository(tmp_path: Path) -> None:
    """With a run made of its own rows, as if another had measured them."""
    rows = store.read_csv(ROOT / "results" / "capacity_check.csv")
    run = tmp_path / "runs" / "capacity_check" / "0123456789ab"
    run.mkdir(parents=True)
    own = [one | {"run_id": run.name, "gpu": A100} for one in rows]
    (run / "rows.csv").write_text(store.to_csv(own, list(own[0])))
    (run / "provenance.json").write_text(json.dumps(record(A100, cuda="13.0")))
    (run / "DONE").touch()
    command = [sys.executable, "run.py", "compare=capacity_check", f"results_dir={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"GPU: committed {H200}; your own {A100}\n" in done.stdout
    assert "CUDA: committed not recorded; your own 13.0\n" in done.stdout
    assert "…" not in done.stdout and "llama3_3_70b_synthetic" in done.stdout
    assert "0 committed rows, 0 of your own" in done.stdout and "compared: capacity_check" in done.stdout
    assert [path.name for path in (tmp_path / "runs").iterdir() if path.name != ".hydra"] == ["capacity_check"]
    missing = subprocess.run([*command[:2], "compare=linear", command[3]], cwd=ROOT, capture_output=True, text=True)
    assert missing.returncode == 1 and f"`python run.py experiment=linear results_dir={tmp_path}`" in missing.stderr


# Which rows are compared.


def test_repeats_become_their_median_on_both_sides(
    tmp_path: Path, committed: Callable[..., None], compared: Callable[[], pd.DataFrame]
) -> None:
    committed("r1", *(row(value, repeat=n) for n, value in enumerate([1, 2, 90])))
    finished(tmp_path / "own", "r2", [row(value, repeat=n) for n, value in enumerate([3, 5])])
    lines = compared()
    assert lines[["value_committed", "value_own", "ratio"]].values.tolist() == [[2, 4, 2]]


def test_another_gpu_is_compared_with_every_committed_one(
    tmp_path: Path,
    committed: Callable[..., None],
    compared: Callable[[], pd.DataFrame],
    capsys: pytest.CaptureFixture[str],
) -> None:
    committed("r1", row(1, H100), row(2, H100, n=2))
    committed("r2", row(10, H200), row(20, H200, n=2), row(30, H200, n=3))
    finished(tmp_path / "own", "r3", [row(4, A100), row(8, A100, n=2), row(5, A100, n=4)])
    lines = compared()
    assert lines[["n", "gpu_committed", "ratio"]].values.tolist() == [[1, H100, 4], [1, H200, 0.4], [2, H100, 4], [2, H200, 0.4]]
    out = capsys.readouterr().out
    assert "committed gpu" in out and "own gpu" not in out
    assert f"GPU: committed {H100}, {H200}; your own {A100}\n" in out
    assert "1 committed rows, 1 of your own" in out


def test_a_row_of_the_same_gpu_is_preferred_row_by_row(
    tmp_path: Path, committed: Callable[..., None], compared: Callable[[], pd.DataFrame]
) -> None:
    committed("r1", row(1, H100), row(2, H100, n=2))
    committed("r2", row(10, H200))
    finished(tmp_path / "own", "r3", [row(10, H200), row(8, H200, n=2)])
    assert compared()[["n", "gpu_committed", "ratio"]].values.tolist() == [[1, H200, 1], [2, H100, 4]]


def test_the_number_of_gpus_tells_machines_apart(
    tmp_path: Path, committed: Callable[..., None], compared: Callable[[], pd.DataFrame]
) -> None:
    committed("r1", row(1, H100), row(2, H100, gpus=8))
    finished(tmp_path / "own", "r2", [row(3, H100, gpus=2), row(4, H100, gpus=8)])
    found = compared()[["gpu_committed", "gpu_own", "ratio"]].values.tolist()
    assert found == [[H100, f"2 x {H100}", 3], [f"8 x {H100}", f"2 x {H100}", 1.5], [f"8 x {H100}", f"8 x {H100}", 2]]


def test_the_newest_of_several_own_runs_counts(
    tmp_path: Path, committed: Callable[..., None], compared: Callable[[], pd.DataFrame]
) -> None:
    committed("r1", row(1), row(1, n=2))
    finished(tmp_path / "own", "new", [row(3)], end="2026-02-02")
    finished(tmp_path / "own", "old", [row(2, repeat=0), row(2, repeat=1), row(2, n=2)], end="2026-01-01")
    assert compared()[["n", "run_id_own", "value_own"]].values.tolist() == [[1, "new", 3], [2, "old", 2]]


def test_a_column_that_one_side_lacks_does_not_apply_there(
    tmp_path: Path, committed: Callable[..., None], compared: Callable[[], pd.DataFrame]
) -> None:
    committed("r1", row(1, n="-"), row(1, n=2))
    run = finished(tmp_path / "own", "r2", [row(3)])
    rows = [{name: value for name, value in one.items() if name != "n"} for one in store.read_csv(run / "rows.csv")]
    (run / "rows.csv").write_text(store.to_csv(rows, list(rows[0])))
    assert compared()[["n", "ratio"]].values.tolist() == [["-", 3]]


def test_nothing_in_common_says_what_differs(
    tmp_path: Path,
    committed: Callable[..., None],
    compared: Callable[[], pd.DataFrame],
    capsys: pytest.CaptureFixture[str],
) -> None:
    committed("r1", row(1, H100), row(1, H100, n=2))
    finished(tmp_path / "own", "r2", [row(3, model="tiny")])
    assert compared().empty
    out = capsys.readouterr().out
    assert "no row in common; model: committed m, your own tiny\n" in out and "2 committed rows, 1 of your own" in out


# Provenance.


def test_differences_are_those_of_runs_that_are_compared() -> None:
    same = record(H100)
    assert compare.differences([(same, same), (record(), record())]) == []
    other = record(A100, cuda="13.0", source={"sha": "b" * 40, "dirty": True})
    assert compare.differences([(same, other), (record(H200), other), (record(), record())]) == [
        f"GPU: committed {H100}, {H200}; your own {A100}",
        "CUDA: committed not recorded; your own 13.0",
        f"commit: committed {'a' * 12}; your own {'b' * 12} with changes",
    ]
    assert compare.differences([(record(), same)])[:2] == [
        f"GPU: committed none; your own {H100}",
        "driver: committed none; your own 580.1",
    ]
    assert "python: committed not recorded; your own 3.12.3" in compare.differences([({}, same)])
