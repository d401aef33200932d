"""Who may import whom (docs/architecture.md)."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = ("hydra", "omegaconf", "wandb", "pandas", "matplotlib", "transformers", "huggingface_hub", "pycuda", "lm_eval")


def imports(path: Path, toplevel: bool = False) -> Iterator[str]:
    """Modules that a file imports, anywhere in it or at its top level only."""
    tree = ast.parse(path.read_text())
    yield from imported(tree.body if toplevel else ast.walk(tree))


def imported(nodes: Iterable[ast.AST]) -> Iterator[str]:
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def offenders(folder: str, forbidden: tuple[str, ...], allowed_in: tuple[str, ...] = ()) -> list[str]:
    found = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        if path.name in allowed_in:
            continue
        found += [f"{path.relative_to(ROOT)}: {name}" for name in imports(path) if name.split(".")[0] in forbidden]
    return found


def test_the_library_knows_neither_the_harness_nor_its_packages() -> None:
    assert offenders("df11", ("experiments", "hydra", "omegaconf", "wandb", "pandas", "matplotlib")) == []
    assert offenders("df11", ("transformers",), allowed_in=("hf.py", "hf_io.py")) == []


def test_the_command_line_and_transformers_alone_know_whole_checkpoints() -> None:
    """What is below them takes files (checkpoint_files) and what is compressed (sources) from where these are."""
    knowing = {path.name for path in (ROOT / "df11").rglob("*.py") if "df11.checkpoint" in imports(path)}
    assert knowing == {"cli.py", "hf.py", "hf_io.py"}


def test_the_harness_knows_neither_the_library_nor_an_experiment() -> None:
    assert offenders("experiments/harness", ("df11",)) == []
    for path in (ROOT / "experiments" / "harness").glob("*.py"):
        names = [n for n in imports(path) if n.startswith("experiments.")]
        assert all(n.startswith("experiments.harness") for n in names), path


def test_an_experiment_imports_no_other_and_no_figure() -> None:
    shared = {"__init__", "config", "needs", "evaluation", "decoding", "budget", "footprint", "peers", "projections", "paper"}
    allowed = (*sorted(shared - {"__init__", "paper"}), "harness.api", "harness.memory", "harness.timing", "harness.progress")
    allowed += ("harness",)  # `from experiments.harness import memory` names the package too
    for path in (ROOT / "experiments").glob("*.py"):
        if path.stem not in shared:
            names = {n.removeprefix("experiments.") for n in imports(path) if n.startswith("experiments.")}
            assert all(any(n == a or (n.startswith(f"{a}.") and a != "harness") for a in allowed) for n in names), path


def test_figures_read_tables_only() -> None:
    assert offenders("experiments/figures", ("torch", "df11", "hydra", "numba")) == []
    for path in (ROOT / "experiments" / "figures").glob("*.py"):
        names = [n for n in imports(path) if n.startswith("experiments.")]
        assert all(n.startswith("experiments.figures") for n in names), path


def test_notebooks_need_no_torch() -> None:
    allowed = ("numpy", "pandas", "matplotlib", "IPython", "experiments.figures", "df11.huffman", "df11.reference")
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        for cell in json.loads(path.read_text())["cells"]:
            if cell["cell_type"] == "code":
                source = "".join(line for line in cell["source"] if not line.startswith("%"))
                for name in imported(ast.walk(ast.parse(source))):
                    own = name.split(".")[0] in sys.stdlib_module_names or name == "df11"
                    assert own or any(name == a or name.startswith(f"{a}.") for a in allowed), f"{path}: {name}"


@pytest.mark.parametrize("module", ["df11", "df11.sources", "df11.formats.dfloat11", "experiments.figures.style"])
def test_importing_pulls_in_nothing_heavy(module: str) -> None:
    own = {"experiments.figures.style": ("matplotlib", "pandas")}.get(module, ())
    unwanted = [name for name in HEAVY if name not in own] + (["torch"] if module.startswith("experiments") else [])
    code = f"import sys, {module}; print([n for n in {unwanted!r} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
