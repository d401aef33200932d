"""Weights in safetensors files: headers first, then piece by piece, never a whole file in memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from df11 import bits
from df11.sources.model import SourceError, TensorInfo

INDEX = "model.safetensors.index.json"


class SafetensorsSource:
    """A directory (one file, or shards with their index) or one file. Tied tensors are there once, as they are stored."""

    def __init__(self, path: Path, weights: str = "real", provenance: dict[str, Any] | None = None) -> None:
        self.directory = path if path.is_dir() else path.parent
        self.weights = weights
        self.provenance = provenance or {"source": "path", "path": str(path)}
        self._tensors: dict[str, tuple[TensorInfo, Path, int]] = {}  # with its file and where its bytes begin there
        for file, expected in _shards(path).items():
            found = _located(file)
            if missing := sorted(expected - found.keys()):
                raise SourceError(f"{file} lacks the tensor {missing[0]!r} that {INDEX} places in it: download both again")
            self._tensors |= {name: found[name] for name in found if not expected or name in expected}

    @property
    def files(self) -> list[Path]:
        """Those that hold the tensors, in the order of their names."""
        return sorted({file for _, file, _ in self._tensors.values()})

    def tensors(self) -> list[TensorInfo]:
        return [info for info, _, _ in self._tensors.values()]

    def chunks(self, name: str, max_elements: int = 1 << 24) -> Iterator[torch.Tensor]:
        info, file, begin = self._find(name)
        if info.dtype != "BF16":
            raise TypeError(f"{name} in {file} is {info.dtype}: only BF16 tensors are read in chunks, others with read()")
        for start in range(0, info.numel, max_elements):
            n = min(max_elements, info.numel - start)
            # Plain reads: the pages of a memory map would count as this process's memory.
            pattern = np.fromfile(file, "<u2", n, offset=begin + 2 * start)
            if pattern.size != n:
                raise SourceError(f"{file} ends inside of {name}: it changed while it was read, download it again")
            yield bits.from_bits(pattern, (n,))

    def read(self, name: str) -> torch.Tensor:
        _, file, _ = self._find(name)
        with safe_open(file, "pt") as opened:
            tensor: torch.Tensor = opened.get_tensor(name)
        return tensor

    def _find(self, name: str) -> tuple[TensorInfo, Path, int]:
        if name not in self._tensors:
            raise KeyError(f"{self.directory} has no tensor {name!r}")
        return self._tensors[name]


def _shards(path: Path) -> dict[Path, set[str]]:
    """Each safetensors file with the tensors the index places in it (none given without an index: all it holds)."""
    if not path.exists():
        raise SourceError(f"{path} does not exist: name a directory with safetensors files, or a hub id (organisation/name)")
    if path.is_file():
        return {path: set()}
    if not (path / INDEX).exists():
        files = [path / "model.safetensors"] if (path / "model.safetensors").exists() else sorted(path.glob("*.safetensors"))
        if len(files) != 1:
            raise SourceError(
                f"{path} holds {len(files)} safetensors files and no {INDEX}: one file, or shards with their index, are needed"
                " (other formats: load with transformers and save_pretrained)"
            )
        return {files[0]: set()}
    try:
        places: dict[str, str] = json.loads((path / INDEX).read_text())["weight_map"]
        if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
            raise ValueError("weight_map does not name files")
    except (ValueError, KeyError, TypeError) as broken:
        raise SourceError(f"{path / INDEX} is not an index of shards ({broken!r}): download it again") from broken
    shards: dict[Path, set[str]] = {}
    for name, file in places.items():
        shards.setdefault(path / file, set()).add(name)
    return shards


def read_header(file: Path) -> tuple[bytes, dict[str, Any]]:
    """A safetensors file's header, as its bytes and as JSON. Raises SourceError where there is none."""
    try:
        with file.open("rb") as opened:
            text = opened.read(int.from_bytes(opened.read(8), "little"))
        header = json.loads(text)
        if not isinstance(header, dict):
            raise ValueError("it is no JSON object")
    except (OSError, ValueError, OverflowError, MemoryError) as broken:
        raise SourceError(
            f"{file} has no readable header ({broken}): it is damaged, download it again or restore it from a copy"
        ) from broken
    return text, header


def described(header: dict[str, Any]) -> list[TensorInfo]:
    """The tensors of a safetensors header, in the order of their bytes."""
    entries = [(name, entry) for name, entry in header.items() if name != "__metadata__"]
    entries.sort(key=lambda entry: entry[1]["data_offsets"])
    return [TensorInfo(name, tuple(entry["shape"]), entry["dtype"]) for name, entry in entries]


def _located(file: Path) -> dict[str, tuple[TensorInfo, Path, int]]:
    if not file.exists():
        raise SourceError(f"the shard {file} is missing: download it again, or take it out of {INDEX}")
    try:
        with safe_open(file, "pt"):  # checks that offsets fit shapes, do not overlap and fill the file
            pass
    except (SafetensorError, OSError) as broken:
        raise SourceError(f"{file} is damaged or cut short ({broken}): download it again") from broken
    text, header = read_header(file)
    begin = 8 + len(text)
    return {info.name: (info, file, begin + header[info.name]["data_offsets"][0]) for info in described(header)}
