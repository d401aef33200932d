"""The W&B mirror, read back from disk by W&B's own reader."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from experiments.harness import tracking
from experiments.harness.outcomes import Outcome

ROOT = Path(__file__).parents[2]


@pytest.fixture
def nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user without an account, and a server that does not answer."""
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "settings"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")


def recorded(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The records of the one run kept offline in a result's folder, by their type."""
    (kept,) = folder.glob("wandb/offline-run-*")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(kept)]
    records: dict[str, list[dict[str, Any]]] = {}
    for line in subprocess.check_output(command, text=True, cwd=folder).splitlines():
        record = json.loads(line)
        records.setdefault(record["type"], []).append(record[record["type"]])
    return records


def updates(records: list[dict[str, Any]]) -> dict[str, Any]:
    return {name: value for record in records for name, value in record.get("update", {}).items()}


@pytest.mark.slow
@pytest.mark.usefixtures("nobody")
def test_a_sweep_over_batch_size_is_one_group_with_all_of_each_point(tmp_path: Path) -> None:
    settings = ["experiment=same_gpu", "model=tiny", "device=cpu", "bench.granularities=[block]", "bench.launches=[eager]"]
    short = ["bench.variants=[plain]", "bench.modes=[exact]", "bench.kernels=[fast]", "bench.tokens=2", "bench.repeats=2"]
    ours = ["bench.batch_size=1,2", "logger=wandb", "logger.system_metrics_s=0.2", f"results_dir={tmp_path}"]
    subprocess.run([sys.executable, "run.py", "-m", *settings, *short, *ours], cwd=ROOT, check=True, capture_output=True)
    groups, sizes, names = set(), set(), []
    for folder in (done.parent for done in tmp_path.glob("runs/same_gpu/*/DONE")):
        rows = pd.read_csv(folder / "rows.csv")
        records = recorded(folder)
        groups.add(records["run"][0]["run_group"])
        sizes.add(updates(records["config"])["rows"]["batch_size"])
        values = updates(records["summary"])
        steps = rows[(rows["codec"] == "dfloat11") & (rows["metric"] == "ms_per_step")]["value"]
        assert values["dfloat11/decode/ms_per_step"] == pytest.approx(steps.median())
        names.append({name for name in values if "/" in name})
        assert any("memory" in name for record in records["stats"] for name in record["item"])
        (picture,) = folder.glob("wandb/offline-run-*/files/media/images/*.png")
        (table,) = folder.glob("wandb/offline-run-*/files/media/table/rows_*.json")
        assert picture.stat().st_size > 1000 and len(json.loads(table.read_text())["data"]) == len(rows)
        assert records["exit"][0]["exit_code"] == 0
    assert len(groups) == 1 and sizes == {1, 2} and names[0] == names[1]


@pytest.mark.slow
@pytest.mark.usefixtures("nobody")
@pytest.mark.parametrize(("key", "reason"), [("", "no account is known"), ("0" * 40, "")])
def test_online_without_account_or_network_is_kept_offline_soon(
    toy: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], key: str, reason: str
) -> None:
    if key:
        monkeypatch.setenv("WANDB_API_KEY", key)
    start = time.monotonic()
    outcome = toy(logger={"name": "wandb", "mode": "online", "timeout_s": 5})
    assert outcome.state == "ok" and time.monotonic() - start < 60
    assert "kept offline, `wandb sync` sends it later" in (told := capsys.readouterr().err) and reason in told
    assert updates(recorded(Path(outcome.folder))["summary"])["2/whole"] == 2


@pytest.mark.slow
@pytest.mark.usefixtures("nobody")
def test_a_failed_run_is_one_in_wandb_too(toy: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOY_FAILS_AT", "1")
    outcome = toy(logger={"name": "wandb"})
    assert outcome.state == "failed" and recorded(Path(outcome.folder))["exit"][0]["exit_code"] == 1


def test_an_error_of_wandb_loses_no_results(
    toy: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wandb = pytest.importorskip("wandb")

    def broken(**arguments: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(wandb, "init", broken)
    outcome = toy(logger={"name": "wandb"})
    assert outcome.state == "ok" and (Path(outcome.folder) / "rows.csv").exists()
    assert "no space left on device; the results are kept without it" in capsys.readouterr().err


def test_scalars_are_named_by_what_differs() -> None:
    common = {"experiment": "e", "run_id": "r", "model": "m", "batch_size": "8", "unit": "s"}
    rows = pd.DataFrame(
        [
            *(common | {"launch": "eager", "metric": "s", "value": value, "repeat": n} for n, value in enumerate((1, 2, 9))),
            common | {"launch": "graph", "metric": "s", "value": 3, "repeat": 0},
            common | {"launch": "-", "batch_size": "-", "metric": "bytes", "value": 4, "repeat": 0},
        ]
    )
    alike, values = tracking.scalars(rows)
    assert alike == {"batch_size": 8}
    assert values.to_dict() == {"eager/s": 2, "graph/s": 3, "bytes": 4}
    rows.loc[4, ["launch", "metric"]] = ["graph", "s"]  # told from another row by the missing batch size alone
    assert set(tracking.scalars(rows)[1].index) == {"8/eager/s", "8/graph/s", "graph/s"}
