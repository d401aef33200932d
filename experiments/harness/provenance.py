"""Where a number came from: source, command, machine, versions, seeds. `python -m experiments.harness.provenance` writes
SOURCE.json for a tree that will be copied to a machine without its git history."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = (
    *("torch", "numpy", "numba", "transformers", "safetensors", "hydra-core", "lm-eval", "pycuda"),
    *("dfloat11", "nvidia-libnvcomp-cu13", "glyd", "neural-weight-compression"),  # compared with
)
HASHED = ("run.py", "pyproject.toml", "conf", "df11", "kernels", "experiments")


class ProvenanceError(Exception):
    """The source of a run cannot be told."""


def source() -> dict[str, Any]:
    """sha, dirty flag and tree hash, from git or from a SOURCE.json that fits the tree."""
    tree = tree_hash()
    path = ROOT / "SOURCE.json"
    written: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    if written.get("tree") == tree:
        return written
    if sha := _git("rev-parse", "HEAD"):
        # Results are what runs write: they do not make the code another.
        return {"sha": sha, "dirty": bool(_git("status", "--porcelain", "--", ".", ":!results")), "tree": tree}
    raise ProvenanceError(
        f"{path.name} was written for another tree: write it again before copying"
        if written
        else f"neither git nor {path.name} here: run `python -m experiments.harness.provenance` before copying"
    )


def tree_hash() -> str:
    """Hash over all files that can change a result."""
    return hash_files(path for name in HASHED for path in files(name))


def hash_files(paths: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def files(name: str) -> list[Path]:
    """The source files below a path of the repository, none where it does not exist."""
    path = ROOT / name
    if path.is_file():
        return [path]
    return [p for p in path.rglob("*") if p.is_file() and "__pycache__" not in p.parts]


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip()


def gpu_name(device: str) -> tuple[str, int]:
    """Name and number of the GPUs in sight, ('-', 0) on the CPU. Raises ProvenanceError where CUDA is asked for and missing."""
    if device == "cpu":
        return "-", 0
    import torch

    if not torch.cuda.is_available():
        raise ProvenanceError("device=cuda, but torch sees no GPU: use device=cpu, or install torch with CUDA and a driver")
    return torch.cuda.get_device_name(), torch.cuda.device_count()


def cuda_version(device: str) -> str:
    """The CUDA that torch was built with."""
    if device == "cpu":
        return ""
    import torch

    return torch.version.cuda or ""


def gpu_state(device: str) -> str:
    """Driver, clocks, temperature and power as nvidia-smi has them now."""
    if device == "cpu":
        return ""
    query = "driver_version,clocks.sm,clocks.mem,temperature.gpu,power.draw"
    done = subprocess.run(["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"], capture_output=True, text=True)
    return done.stdout.strip()


def machine() -> dict[str, Any]:
    """CPU, cores, memory, operating system and versions. No host name."""
    versions = {name: v for name in PACKAGES if (v := version(name))}
    cpu = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.M) if Path("/proc/cpuinfo").exists() else None
    return {
        "cpu": cpu[1] if cpu else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": versions,
    }


def version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def command() -> str:
    return " ".join(["python", Path(sys.argv[0]).name, *sys.argv[1:]])


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


if __name__ == "__main__":
    (ROOT / "SOURCE.json").unlink(missing_ok=True)
    (ROOT / "SOURCE.json").write_text(json.dumps(source(), indent=2) + "\n")
    print((ROOT / "SOURCE.json").read_text(), end="")
