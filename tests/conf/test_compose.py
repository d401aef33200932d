"""Every config composes and fits its types; Hydra's known traps end in an error."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from experiments.config import Config
from experiments.harness import runner
from run import EXPERIMENTS

ROOT = Path(__file__).parents[2]
CONF = ROOT / "conf"
GROUPS = [(path.parent.name, path.stem) for path in sorted(CONF.glob("*/*.yaml"))]


@pytest.mark.parametrize(("group", "name"), GROUPS)
def test_every_file_composes_to_the_typed_config(config: Callable[..., DictConfig], group: str, name: str) -> None:
    extra = ["model.path=org/some-Model"] if name == "path" else []
    cfg = runner.typed(config(f"{group}={name}", *extra), Config)
    if group == "experiment":
        assert cfg.experiment in EXPERIMENTS
    elif group == "model":
        assert cfg.model.name == ("some_model" if name == "path" else name)
    else:
        assert group in ("bench", "eval") or getattr(cfg, group).name


def test_every_experiment_has_a_file_and_opens_with_its_command() -> None:
    for path in (CONF / "experiment").glob("*.yaml"):
        assert f"# python run.py experiment={path.stem}" in path.read_text().splitlines()[:2]
    assert set(EXPERIMENTS) <= {path.stem for path in (CONF / "experiment").glob("*.yaml")}


BESIDE = {"gemma3_12b_conditional_synthetic", "qwen3_30b_a3b_synthetic", "qwen3_30b_a3b_half_synthetic"}  # of load_time


def test_the_sweep_over_all_geometries_names_each_of_them() -> None:
    swept = OmegaConf.load(CONF / "experiment" / "compression_ratio_all.yaml").hydra.sweeper.params.model
    names = {name.strip() for name in swept.split(",")}
    known = {path.stem for path in (CONF / "model").glob("*_synthetic.yaml")}
    assert names == {"smollm2_135m"} | known - BESIDE


def hydra_settings(params: dict[str, str], task: list[str]) -> DictConfig:
    overrides = {"task": task}
    return OmegaConf.create(
        {"sweeper": {"params": params}, "overrides": overrides, "runtime": {"choices": {"experiment": "compression_ratio_all"}}}
    )


def test_a_sweep_that_hydra_dropped_is_an_error() -> None:
    runner.refuse_dropped_sweep(hydra_settings({"model": "a,b"}, ["experiment=x", "model=a"]))
    runner.refuse_dropped_sweep(hydra_settings({}, ["experiment=x"]))
    with pytest.raises(runner.UsageError, match="on its own"):
        runner.refuse_dropped_sweep(hydra_settings({"model": "a,b"}, ["experiment=x"]))


def launch(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "run.py", *arguments, f"results_dir={tmp_path}"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_a_sweep_goes_on_after_a_failure_and_exits_1(tmp_path: Path) -> None:
    done = launch(tmp_path, "-m", "experiment=compression_ratio", "model=tiny", "codec.options.max_code_length=7,32")
    assert done.returncode == 1
    assert "layout takes 8 to 32" in done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith(("ok:", "failed:"))]
    assert [line.split(":")[0] for line in lines] == ["failed", "ok"]


@pytest.mark.slow
def test_several_experiments_with_sweeps_of_their_own_are_refused(tmp_path: Path) -> None:
    done = launch(tmp_path, "-m", "experiment=compression_ratio_all,exponent_entropy", "preflight=true")
    assert done.returncode == 1 and "run `python run.py experiment=compression_ratio_all` on its own" in done.stderr


@pytest.mark.slow
def test_a_sweep_in_a_file_runs_every_model(tmp_path: Path) -> None:
    done = launch(tmp_path, "experiment=compression_ratio_all", "preflight=true")
    ended = [line.split()[:3] for line in done.stdout.splitlines() if line.startswith(("checked:", "failed:"))]
    assert len(ended) == len(list((CONF / "model").glob("*_synthetic.yaml"))) - len(BESIDE) + 1
    # The largest may lack memory here; which did is what the exit status says.
    assert done.returncode == any(state == "failed:" for state, *_ in ended)


def test_no_experiment_lists_them(tmp_path: Path) -> None:
    done = launch(tmp_path)
    assert done.returncode == 1 and "python run.py experiment=exponent_entropy" in done.stderr
