"""The files of a compressed checkpoint: `df11.json`, and safetensors files that hold compressed tensors (docs/format.md)."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from df11 import bits
from df11.formats import FormatError
from df11.formats.dfloat11 import PARTS, DFloat11, DFloat11Unit
from df11.sources.files import read_header
from df11.sources.model import SourceError

MANIFEST = "df11.json"
VERSION = 1
DTYPES = {"U8": np.uint8, "U32": np.uint32}

Progress = Callable[[str, int], None]  # tensor, original bytes done with it


class CheckpointError(Exception):
    """A checkpoint that cannot be compressed, verified or restored. The message names file or tensor, and the remedy."""


def read_config(directory: Path) -> dict[str, Any]:
    """What config.json says, {} where there is none. Raises CheckpointError where it is not a JSON object."""
    path = directory / "config.json"
    if not path.exists():
        return {}
    try:
        config = json.loads(path.read_text())
        if not isinstance(config, dict):
            raise ValueError("it is no JSON object")
    except ValueError as broken:
        raise CheckpointError(f"{path} is damaged ({broken}): download it again or restore it from a copy") from broken
    return config


def config_to_compress(source: Path) -> dict[str, Any]:
    """As `read_config`, of a directory that is to be compressed. Raises CheckpointError where it is compressed or quantised."""
    if (source / MANIFEST).exists():
        raise CheckpointError(f"{source} is compressed already: `df11 info {source}` describes it")
    config = read_config(source)
    if "dfloat11_config" in config:
        raise CheckpointError(f"{source} is compressed by the released package: `df11 restore` it first")
    if config.get("quantization_config"):
        raise CheckpointError(f"{source} is quantised, and what says how would be lost: compress the model before quantisation")
    return config


def header_of(file: Path) -> tuple[bytes, dict[str, Any]]:
    """As `read_header`; raises CheckpointError."""
    try:
        return read_header(file)
    except SourceError as broken:
        raise CheckpointError(str(broken)) from broken


def checksum_of(manifest: dict[str, Any]) -> str:
    """XXH3-128 over a manifest without its own `checksum`."""
    return xxhash.xxh3_128_hexdigest(json.dumps({k: v for k, v in manifest.items() if k != "checksum"}, sort_keys=True).encode())


def write(path: Path, data: bytes) -> None:
    """A whole file or none: it is put in place when all of it is on the disk."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as out:
        out.write(data)
        out.flush()
        os.fsync(out.fileno())
    temporary.rename(path)


def read_manifest(directory: Path) -> dict[str, Any]:
    """The checked manifest of a compressed checkpoint."""
    path = directory / MANIFEST
    if not path.exists():
        raise CheckpointError(f"{directory} has no {MANIFEST}: it is not a compressed checkpoint (df11 compress makes one)")
    try:
        manifest: dict[str, Any] = json.loads(path.read_text())
        version, checksum = manifest["version"], manifest["checksum"]
    except (ValueError, KeyError, TypeError) as broken:
        raise CheckpointError(f"{path} is damaged ({broken!r}): restore it from a copy") from broken
    if version != VERSION:
        raise CheckpointError(f"{path} has version {version}, this df11 reads {VERSION}: update df11")
    if checksum != checksum_of(manifest):
        raise CheckpointError(f"{path} was changed after it was written: restore it from a copy")
    for name in (*manifest["headers"], *manifest["files"], *manifest["originals"]):
        if Path(name).name != name:
            raise CheckpointError(f"{path} names the file {name!r} outside of its directory: do not trust this checkpoint")
    return manifest


@dataclass(frozen=True)
class StoredFile:
    """One safetensors file of a compressed checkpoint, its header checked."""

    path: Path
    begin: int
    entries: dict[str, Any]
    about: dict[str, Any]

    @classmethod
    def open(cls, path: Path, header_checksum: str) -> StoredFile:
        if not path.exists():
            raise CheckpointError(f"{path} is missing: restore it from a copy")
        text, header = header_of(path)
        if xxhash.xxh3_128_hexdigest(text) != header_checksum:
            raise CheckpointError(f"the header of {path} was changed: restore the file from a copy")
        about = json.loads(header.pop("__metadata__")["df11"])
        end = 8 + len(text) + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if path.stat().st_size != end:
            raise CheckpointError(f"{path} is {path.stat().st_size} bytes long where its header says {end}: restore it from a copy")
        return cls(path, 8 + len(text), header, about)

    def array(self, key: str) -> np.ndarray:
        """A stored array, its checksum checked."""
        entry = self.entries[key]
        start, end = entry["data_offsets"]
        data = np.fromfile(self.path, np.uint8, end - start, offset=self.begin + start)
        if xxhash.xxh3_128_hexdigest(data.data) != self.about["stored"][key]:
            raise FormatError(f"{key} in {self.path} was changed: its bytes do not match their checksum; restore it from a copy")
        return data.view(DTYPES.get(entry["dtype"], np.uint8)).reshape(entry["shape"] if entry["dtype"] in DTYPES else -1)

    def original(self, name: str, codec: DFloat11) -> Iterator[np.ndarray]:
        """The original bytes of a tensor in pieces, their checksum checked at the end."""
        record = self.about["tensors"][name]
        digest = xxhash.xxh3_128()
        for piece in self._pieces(name, record, codec):
            digest.update(piece.data)
            yield piece
        if digest.hexdigest() != record["xxh3"]:
            raise FormatError(f"{name} in {self.path} does not decode to the original bits: restore it from a copy")

    def _pieces(self, name: str, record: dict[str, Any], codec: DFloat11) -> Iterator[np.ndarray]:
        if not record["compressed"]:
            yield self.array(name).view(np.uint8).reshape(-1)
            return
        try:
            for piece in codec.stream(self.unit(name)):
                yield bits.to_bits(piece).view(np.uint8)
        except FormatError as broken:
            raise FormatError(f"{name} in {self.path}: {broken}; restore it from a copy") from broken

    def unit(self, name: str) -> DFloat11Unit:
        """A compressed tensor as a unit."""
        shape = tuple(self.about["tensors"][name]["shape"])
        parts = {part: self.array(f"{name}_{part}") for part in PARTS}
        return DFloat11Unit((shape,), self.array(name), checksum="", **parts)


def open_files(directory: Path) -> list[StoredFile]:
    """Those that the manifest names, their headers read and checked."""
    manifest = read_manifest(directory)
    return [StoredFile.open(directory / name, checksum) for name, checksum in manifest["headers"].items()]
