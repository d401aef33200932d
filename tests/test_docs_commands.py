"""Every command that the documentation shows is one that its program takes, and every name that it shows is there."""

import importlib.util
import pkgutil
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser

from df11.cli import _parser
from experiments import needs, paper
from experiments.config import Config, register
from experiments.harness import runner
from run import EXPERIMENTS

ROOT = Path(__file__).parents[1]
FILES = [ROOT / "README.md", ROOT / "results" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXT = "\n".join(file.read_text() for file in FILES)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
BLOCKS = FENCE.findall(TEXT)
LINES = [line.split(" #")[0].rstrip() for language, block in BLOCKS if language == "sh" for line in block.splitlines() if line]
SPANS = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", FENCE.sub("", TEXT))]
# `key=value ...` without a program are a config's overrides, unless their values are Python's.
OVERRIDES = [span for span in SPANS if re.fullmatch(r"(-m )?([a-z_./]+=(?!True|False)[^\s()\"]+ ?)+", span)]


def commands(program: str) -> list[str]:
    return sorted({line for line in [*LINES, *SPANS] if line.startswith(f"{program} ")})


RUNS = {*commands("python run.py"), *(f"python run.py {listed}" for listed in (*paper.CPU, *paper.GPU)), *OVERRIDES}


def test_no_command_is_overlooked() -> None:
    """Blocks say what they hold, but for architecture.md, which has trees of files."""
    for file in FILES:
        assert file.name == "architecture.md" or {language for language, _ in FENCE.findall(file.read_text())} <= {"sh", "python"}
    assert {line.split()[0] for line in LINES} <= {"python", "make", "df11", "wandb"}
    assert TEXT.count("python run.py ") == sum(line.startswith("python run.py ") for line in [*LINES, *SPANS])


@pytest.mark.parametrize("command", sorted(RUNS))
def test_configs_compose(command: str) -> None:
    """Each job of it, to the typed config; the experiment, asked what it needs, knows the names in it."""
    register()
    words = shlex.split(command.removeprefix("python run.py"))
    jobs = [overrides := [word for word in words if word != "-m"]]
    if "-m" in words:
        (jobs,) = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(overrides), None)
        assert len(jobs) > 1
    for job in jobs:
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            cfg = runner.typed(compose("config", job), Config)
        if cfg.experiment:
            assert list(runner.find(cfg.experiment, EXPERIMENTS).preflight(cfg))
        assert cfg.compare in (None, *EXPERIMENTS) and (cfg.experiment or cfg.compare or command in OVERRIDES)


@pytest.mark.slow
def test_commands_of_seconds_run(tmp_path: Path) -> None:
    """Those that the documentation says take two cores some seconds, then what compares their results."""
    quick = re.findall(r"`([^`]+)` \| 2 cores, seconds", TEXT)
    assert len(quick) >= 2
    for command in [*quick, "python run.py compare=compression_ratio"]:
        done = subprocess.run(
            [sys.executable, *shlex.split(command)[1:], f"results_dir={tmp_path}"], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0 and done.stdout, f"{command}\n{done.stderr}"


@pytest.mark.parametrize("command", commands("python -m"))
def test_modules_are_there(command: str) -> None:
    assert importlib.util.find_spec(shlex.split(command)[2])


@pytest.mark.parametrize("command", [*commands("conda"), *commands("git")])
def test_files_are_there(command: str) -> None:
    assert (ROOT / command.split()[-1]).exists()


@pytest.mark.parametrize("command", commands("make"))
def test_targets_are_there(command: str) -> None:
    assert set(shlex.split(command)[1:]) <= set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))


@pytest.mark.parametrize("command", commands("df11"))
def test_the_command_line_takes_them(command: str) -> None:
    words = shlex.split(command)[1:]
    for directories in [[]] if command in LINES else ([], ["A"], ["A", "B"]):  # in a sentence they may be left out
        try:
            _parser().parse_args([*words, *directories])
            return
        except SystemExit:
            pass
    pytest.fail(command)


@pytest.mark.parametrize("command", commands("wandb"))
def test_wandb_has_them(command: str) -> None:
    from wandb.cli.cli import cli

    assert command.split()[1] in cli.commands


@pytest.mark.parametrize("command", commands("pip install"))
def test_packages_are_those_measured_with(command: str) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for requirement in shlex.split(command)[2:]:
        own = re.fullmatch(r"df11\[(\w+)\]", requirement)
        assert own[1] in extras if own else requirement in extras["dev"] or requirement.split("==")[0] in runner.PEERS


def test_names_are_there() -> None:
    code = "\n".join([*SPANS, *(block for language, block in BLOCKS if language == "python")])
    names = set(re.findall(r"(?<![\w/.])(?:df11|transformers|huggingface_hub)(?:\.[A-Za-z_]\w*)+(?!\w)", code)) - {"df11.json"}
    assert len(names) > 4
    for name in names:
        assert pkgutil.resolve_name(name)


def test_the_size_of_the_default_model() -> None:
    assert f"a 135M model ({needs.PACKAGE_DOWNLOAD / 1e6:.0f} MB)" in TEXT
    room = re.search(r"NEEDED_GB := (\d+)", (ROOT / "Makefile").read_text())
    assert room and f"{room[1]} GB of disk" in TEXT
