"""Models that are made or converted once: each a safetensors directory with a manifest, put in place by one rename."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import xxhash

from df11.sources.files import SafetensorsSource
from df11.sources.model import SourceError

MANIFEST = "manifest.json"


def default_cache() -> Path:
    """$DF11_CACHE, else df11 in the user's cache directory."""
    if chosen := os.environ.get("DF11_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "df11"


def cached(directory: Path, needed_bytes: int, build: Callable[[Path], dict[str, Any]], expected: str = "") -> dict[str, Any]:
    """The manifest of `directory`. If it is not there yet, `build` fills a folder and says where the weights came from.

    The folder that `build` is given lies alone in a scratch folder, which is removed at the end: room for downloads.

    All bits are hashed when it is built, and compared with `expected` where that is given; later only the sizes of the files
    and the manifest's own hashes are checked.
    """
    if not directory.exists():
        with explain_full_disk(directory.parent, "DF11_CACHE"):
            _make(directory, needed_bytes, build)
    remedy = f"remove {directory} and run again"
    try:
        manifest: dict[str, Any] = json.loads((directory / MANIFEST).read_text())
        for name, size in manifest["files"].items():
            if (directory / name).stat().st_size != size:
                raise SourceError(f"{directory / name} is not {size} bytes long as when it was made: {remedy}")
    except (ValueError, KeyError, FileNotFoundError) as broken:
        raise SourceError(f"the cached model {directory} is incomplete ({broken!r}): {remedy}") from broken
    if manifest["tensors_xxh3"] != tensors_hash(manifest["tensors"]):
        raise SourceError(f"{directory / MANIFEST} was changed: {remedy}")
    if expected and manifest["tensors_xxh3"] != expected:
        raise SourceError(
            f"the weights in {directory} hash to {manifest['tensors_xxh3']}, not to {expected} as the model's configuration"
            f" demands: they were converted by another version of transformers or gguf, or damaged; update them and {remedy}"
        )
    return manifest


def tensors_hash(tensors: dict[str, str]) -> str:
    """XXH3-128 over all tensors' names and hashes, in the order of their names."""
    lines = (f"{name} {digest}" for name, digest in sorted(tensors.items()))
    return xxhash.xxh3_128_hexdigest("\n".join(lines).encode())


def tensor_hashes(source: SafetensorsSource) -> dict[str, str]:
    """XXH3-128 of each tensor's dtype, shape and bits."""
    hashes = {}
    for info in source.tensors():
        digest = xxhash.xxh3_128(f"{info.dtype} {info.shape} ".encode())
        digest.update(source.read(info.name).reshape(-1).view(torch.uint8).numpy().data)
        hashes[info.name] = digest.hexdigest()
    return hashes


@contextmanager
def explain_full_disk(directory: Path, variable: str) -> Iterator[None]:
    try:
        yield
    except OSError as failed:
        if failed.errno != errno.ENOSPC:
            raise
        raise SourceError(f"no space is left for {directory}: free some, or move it with {variable}") from failed


def _make(directory: Path, needed_bytes: int, build: Callable[[Path], dict[str, Any]]) -> None:
    directory.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(directory.parent).free
    if free < needed_bytes:
        raise SourceError(
            f"{directory.parent} has {free / 1e9:.2f} GB free, {needed_bytes / 1e9:.2f} GB are needed: free some, or move it"
            " with DF11_CACHE"
        )
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}.") as scratch:
        made = Path(scratch) / "model"
        made.mkdir()
        provenance = build(made)
        hashes = tensor_hashes(SafetensorsSource(made))
        manifest = {
            "provenance": provenance,
            "tensors_xxh3": tensors_hash(hashes),
            "files": {file.name: file.stat().st_size for file in sorted(made.iterdir())},
            "tensors": hashes,
        }
        (made / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
        for file in made.iterdir():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
        try:
            made.rename(directory)
        except OSError:
            if not (directory / MANIFEST).exists():  # else another process was faster, and its bits pass the same checks
                raise
