"""Sweeps whose jobs run in other processes: their outcomes come back, and each process gets a GPU of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.harness import gpus
from experiments.harness.outcomes import Outcome, record, recorded

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "plugin"), [("joblib_gpus", "hydra_joblib_launcher"), ("submitit_here", "submitit")])
def test_a_failure_in_another_process_is_told_and_the_sweep_goes_on(tmp_path: Path, launcher: str, plugin: str) -> None:
    pytest.importorskip(f"hydra_plugins.{plugin}" if "hydra" in plugin else plugin)
    sweep = ["experiment=compression_ratio", "model=tiny", "codec.options.max_code_length=7,32", f"results_dir={tmp_path}"]
    command = [sys.executable, "run.py", "-m", f"hydra/launcher={launcher}", *sweep]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    ended = [line.split(":")[0] for line in done.stdout.splitlines() if line.startswith(("ok:", "failed:"))]
    assert (done.returncode, ended) == (1, ["failed", "ok"]), done.stderr
    assert len(list(tmp_path.glob("runs/compression_ratio/*/DONE"))) == 1


def test_the_latest_outcome_of_a_job_counts(tmp_path: Path) -> None:
    record(Outcome("e", "second", "skipped"), tmp_path, 10)
    record(Outcome("e", "first", "failed", detail="it did not end"), tmp_path, 9)
    record(Outcome("e", "first", "ok"), tmp_path, 9)
    assert [(o.model, o.state) for o in recorded(tmp_path)] == [("first", "ok"), ("second", "skipped")]


def test_each_process_claims_a_gpu_of_its_own(tmp_path: Path) -> None:
    code = "import sys, pathlib; from experiments.harness import gpus; f = pathlib.Path(sys.argv[1])\n"
    code += "print(gpus.claim(f), gpus.claim(f), flush=True); input()"
    command = [sys.executable, "-c", code, str(tmp_path)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "5,2"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    first, second = (subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **pipes) for _ in range(2))  # type: ignore[call-overload]
    claimed = [process.stdout.readline().split() for process in (first, second)]
    assert sorted(claimed) == [["2", "2"], ["5", "5"]]
    third = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert "2 GPUs are in sight and all are taken" in third.stderr
    first.communicate("\n")
    fourth = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, input="\n")
    assert fourth.stdout.split() == claimed[0]
    second.communicate("\n")


def test_without_a_gpu_there_is_none_to_claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(gpus.NoGpuFree, match="0 GPUs"):
        gpus.claim(tmp_path)


@pytest.mark.slow
def test_jobs_of_joblib_claim_gpus(tmp_path: Path) -> None:
    """With no GPU in sight, asking for one is what fails."""
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    command = [sys.executable, "run.py", "-m", "hydra/launcher=joblib_gpus", "experiment=compression_ratio", "model=tiny"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    arguments = ["device=cuda", "seed=1,2", f"results_dir={tmp_path}"]
    done = subprocess.run([*command, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout.count("(one_gpu=true: 0 GPUs are in sight") == 2, done.stdout + done.stderr
