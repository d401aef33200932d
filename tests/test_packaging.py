"""environment.yml and pyproject.toml ask for the same versions."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
CONDA_NAMES = {"torch": "pytorch-gpu", "xxhash": "python-xxhash", "matplotlib": "matplotlib-base"}


def bounds() -> dict[str, str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    names = ("harness", "models", "evaluation", "tracking", "launchers", "gpu")
    wanted = project["dependencies"] + [r for name in names for r in extras[name]]
    wanted += [r for r in extras["dev"] if r.startswith(("nbclient", "ipykernel"))]
    return dict(re.fullmatch(r"([\w-]+)(.*)", r).groups() for r in wanted)  # type: ignore[union-attr, misc]


def conda() -> dict[str, str]:
    listed = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    pip = next(item["pip"] for item in listed if isinstance(item, dict))
    names = [item for item in [*listed, *pip] if isinstance(item, str) and not item.startswith("-e")]
    return dict(re.fullmatch(r"([\w-]+)(.*)", name).groups() for name in names)  # type: ignore[union-attr, misc]


@pytest.mark.parametrize("name", sorted(bounds()))
def test_environment_has_the_bounds_of_pyproject(name: str) -> None:
    assert conda().get(CONDA_NAMES.get(name, name)) == bounds()[name]


def test_every_pin_of_environment_says_why() -> None:
    lines = (ROOT / "environment.yml").read_text().splitlines()
    project = set(bounds()) | set(CONDA_NAMES.values())
    for line in lines[lines.index("dependencies:") + 1 :]:
        name = re.match(r"\s*- ([\w-]+)(?=[<>=])", line)
        assert not name or "#" in line or name[1] in project, f"{line}: no reason given"


def test_the_cpu_constraint_is_within_the_bounds() -> None:
    pinned = re.search(r"^torch==(\d+)\.(\d+)", (ROOT / "constraints-cpu.txt").read_text(), re.M)
    assert pinned and (2, 11) <= (int(pinned[1]), int(pinned[2])) < (3, 0)
