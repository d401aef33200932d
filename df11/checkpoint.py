"""Compress a directory of safetensors, verify it, restore it.

A compressed checkpoint mirrors the original: the same files, in which a compressed tensor `x.weight` is `x.weight` (the code
stream, uint8 in one dimension), `x.weight_sign_mantissa`, `_luts`, `_gaps` and `_output_positions`; other tensors are as they were.
Code that does not know the format meets a tensor of another shape and refuses it. `df11.json` holds the checksums of all original
and stored bytes. docs/format.md has the details.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import xxhash

from df11 import __version__, bits
from df11.formats import FormatError
from df11.formats.dfloat11 import DFloat11, DFloat11Unit
from df11.huffman import entropy
from df11.modules import PARTS
from df11.sources import SafetensorsSource, SourceError, TensorInfo
from df11.sources.files import INDEX

MANIFEST = "df11.json"
BEGUN = ".df11-begun.json"  # options of an unfinished run
VERSION = 1
QUANT_METHOD = "df11"
MODES = ("exact", "fused")  # how a model runs: df11/runtime.py, df11/fused.py
REMOTE = "df11_remote"  # module of the remote code
REMOTE_CODE = '''"""Lets from_pretrained(..., trust_remote_code=True) load these compressed weights without an import of df11."""

import df11  # noqa: F401  registers the format
import transformers


class {architecture}(transformers.{architecture}):
    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        # The library's own class: of one that is not, transformers would choose other kernels and not rename or merge weights.
        return transformers.{architecture}.from_pretrained(*args, **kwargs)
'''
AHEAD = 4  # tensors in work at a time
DTYPES = {"U8": np.uint8, "U32": np.uint32}

T = TypeVar("T")
R = TypeVar("R")
Progress = Callable[[str, int], None]  # tensor, original bytes done with it


class CheckpointError(Exception):
    """A checkpoint that cannot be compressed, verified or restored. The message names file or tensor, and the remedy."""


def selected(name: str, is_bf16: bool, shape: tuple[int, ...], include: tuple[str, ...], exclude: tuple[str, ...]) -> bool:
    """Whether a tensor is compressed: bf16 matrices (two or three dimensions, not empty), or those of them that `include`
    matches, but none that `exclude` matches (shell patterns over names)."""
    matrix = is_bf16 and len(shape) in (2, 3) and 0 not in shape
    wanted = not include or any(fnmatchcase(name, pattern) for pattern in include)
    return matrix and wanted and not any(fnmatchcase(name, pattern) for pattern in exclude)


def compress(
    source: Path,
    target: Path,
    include: tuple[str, ...] = (),
    exclude: tuple[str, ...] = (),
    threads: int = 0,
    loadable: Callable[[Path], set[str]] | None = None,
    progress: Progress = lambda name, size: None,
    remote_code: bool = False,
    mode: str = "exact",
) -> dict[str, Any]:
    """Compress the safetensors directory `source` to the new directory `target`. Returns the manifest.

    Works file by file, tensor by tensor, in a folder beside the target that is renamed at the end: an interrupted call goes on
    with the first unfinished file, and the result is the same bytes. `loadable` gives the names that the model has as
    parameters; other tensors stay as they are (transformers merges some when it loads). `remote_code` adds what lets
    `AutoModelForCausalLM.from_pretrained(target, trust_remote_code=True)` import df11 itself. `mode`: how transformers runs it.
    """
    if mode not in MODES:
        raise ValueError(f"mode={mode!r}: choose one of {', '.join(MODES)}")
    if target.exists():
        raise CheckpointError(f"{target} exists already: remove it or choose another directory")
    if (source / MANIFEST).exists():
        raise CheckpointError(f"{source} is compressed already: `df11 info {source}` describes it")
    files = _weight_files(source)
    names = loadable(source) if loadable else None
    added = _remote_code(source) if remote_code else {}
    options = {"include": list(include), "exclude": list(exclude), "added": added, "source": _fingerprint(source, files)}
    options["mode"] = mode
    partial = target.with_name(f".{target.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    begun = partial / BEGUN
    if begun.exists() and json.loads(begun.read_text()) != options:
        raise CheckpointError(f"{partial} was begun with other options or another source: remove it and run again")
    _write(begun, json.dumps(options).encode())
    codec = DFloat11(threads=threads)
    for name, file in files.items():
        if not (partial / name).exists():
            _compress_file(file, partial / name, codec, lambda n, b, s: _wanted(n, b, s, names, include, exclude), progress)
    manifest = _finish(source, partial, files, added, mode)
    begun.unlink()
    partial.rename(target)
    return manifest


def in_order(work: Callable[[T], R], items: Iterable[T], ahead: int) -> Iterator[R]:
    """work(item) for each, in their order, at most `ahead` at a time: one is read or written while another is coded."""
    pending: deque[Future[R]] = deque()
    with ThreadPoolExecutor(ahead) as pool:
        for item in items:
            if len(pending) == ahead:
                yield pending.popleft().result()
            pending.append(pool.submit(work, item))
        while pending:
            yield pending.popleft().result()


def _wanted(
    name: str, is_bf16: bool, shape: tuple[int, ...], names: set[str] | None, include: tuple[str, ...], exclude: tuple[str, ...]
) -> bool:
    return selected(name, is_bf16, shape, include, exclude) and (names is None or name in names)


def _remote_code(source: Path) -> dict[str, str]:
    """Text by file name. Raises CheckpointError where the model has code of its own or names no class."""
    config = json.loads((source / "config.json").read_text()) if (source / "config.json").exists() else {}
    architectures = config.get("architectures") or []
    if len(architectures) != 1 or not str(architectures[0]).isidentifier():
        raise CheckpointError(f"{source / 'config.json'} does not name one architecture: remote code has none to load")
    if "auto_map" in config or (source / f"{REMOTE}.py").exists():
        raise CheckpointError(f"{source} has remote code of its own: import df11 before from_pretrained instead of adding more")
    return {f"{REMOTE}.py": REMOTE_CODE.format(architecture=architectures[0])}


def _weight_files(directory: Path) -> dict[str, Path]:
    """Safetensors files by name. Raises SourceError where they are incomplete or damaged."""
    if not directory.is_dir():
        raise SourceError(f"{directory} is not a directory: name one with safetensors files")
    used = {file for _, file, _ in SafetensorsSource(directory)._tensors.values()}
    return {file.name: file for file in sorted(used)}


def _fingerprint(source: Path, files: dict[str, Path]) -> dict[str, list[int]]:
    stats = {name: path.stat() for name, path in files.items()}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}


def _header(file: Path) -> tuple[bytes, dict[str, Any]]:
    """A safetensors file's header, as its bytes and as JSON."""
    try:
        with file.open("rb") as opened:
            text = opened.read(int.from_bytes(opened.read(8), "little"))
        header = json.loads(text)
        assert isinstance(header, dict)
    except (OSError, ValueError, AssertionError, OverflowError, MemoryError) as broken:
        raise CheckpointError(f"{file} has no readable header ({broken}): it is damaged, restore it from a copy") from broken
    return text, header


def _compress_file(
    source: Path, target: Path, codec: DFloat11, wanted: Callable[[str, bool, tuple[int, ...]], bool], progress: Progress
) -> None:
    """One file, streamed: sizes are known only at the end, so the header goes into room left free at the beginning."""
    reader = SafetensorsSource(source)
    original, _ = _header(source)
    about: dict[str, Any] = {"original_header": original.decode(), "tensors": {}, "stored": {}}
    entries: dict[str, Any] = {}
    # An entry takes the name twice (with a suffix), its checksums and some 150 characters; a compressed tensor has five.
    room = 4096 + 3 * len(original) + sum(5 * (3 * len(info.name) + 320) for info in reader.tensors())
    temporary = target.with_name(f".{target.name}.tmp")
    with temporary.open("wb") as out:
        out.seek(8 + room)
        at = 0
        made = in_order(lambda info: _stored(reader, info, codec, wanted), reader.tensors(), min(AHEAD, codec.threads))
        for info, (stored, record) in zip(reader.tensors(), made, strict=True):
            about["tensors"][info.name] = record
            for key, (dtype, shape, data) in stored.items():
                entries[key] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(data)]}
                about["stored"][key] = xxhash.xxh3_128_hexdigest(data)
                out.write(data)
                at += len(data)
            progress(info.name, info.nbytes)
        header = json.dumps({"__metadata__": {"format": "pt", "df11": json.dumps(about)}, **entries}).encode()
        if len(header) > room:
            raise CheckpointError(f"{source}: the header of {target.name} needs {len(header)} bytes, {room} were left for it")
        out.seek(0)
        out.write(room.to_bytes(8, "little") + header.ljust(room))
        out.flush()
        os.fsync(out.fileno())
    temporary.rename(target)


def _stored(
    reader: SafetensorsSource, info: TensorInfo, codec: DFloat11, wanted: Callable[[str, bool, tuple[int, ...]], bool]
) -> tuple[dict[str, tuple[str, list[int], memoryview]], dict[str, Any]]:
    """The arrays that a tensor is stored as, and what is recorded of the original."""
    if wanted(info.name, info.dtype == "BF16", info.shape):
        unit = codec.encode(lambda: reader.chunks(info.name), [info.shape])
        if unit.raw is None:
            arrays = {info.name: unit.encoded_exponent} | {f"{info.name}_{part}": getattr(unit, part) for part in PARTS}
            stored = {key: ("U32" if a.dtype == np.uint32 else "U8", list(a.shape), _bytes(a)) for key, a in arrays.items()}
            return stored, {"compressed": True, "shape": info.shape, "xxh3": unit.checksum}
    data = _bytes(reader.read(info.name).reshape(-1).view(torch.uint8).numpy())
    record = {"compressed": False, "shape": info.shape, "xxh3": xxhash.xxh3_128_hexdigest(data)}
    return {info.name: (info.dtype, list(info.shape), data)}, record


def _bytes(array: np.ndarray) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _finish(source: Path, partial: Path, files: dict[str, Path], added: dict[str, str], mode: str) -> dict[str, Any]:
    """Index, config, the other files, those added, and the manifest."""
    weight_map: dict[str, str] = {}
    tensors: dict[str, Any] = {}
    headers = {}
    total = 0
    for name in files:
        text, header = _header(partial / name)
        headers[name] = xxhash.xxh3_128_hexdigest(text)
        about = json.loads(header.pop("__metadata__")["df11"])
        tensors |= {key: record | {"file": name} for key, record in about["tensors"].items()}
        weight_map |= dict.fromkeys(header, name)
        total += max(entry["data_offsets"][1] for entry in header.values()) if header else 0
    originals: dict[str, str] = {}
    if (source / INDEX).exists():
        originals[INDEX] = (source / INDEX).read_text()
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write(partial / INDEX, (json.dumps(index, indent=1) + "\n").encode())
    if (source / "config.json").exists():
        originals["config.json"] = (source / "config.json").read_text()
        how = {"quant_method": QUANT_METHOD, "version": VERSION} | ({} if mode == "exact" else {"mode": mode})
        config = json.loads(originals["config.json"]) | {"quantization_config": how}
        if added:
            config["auto_map"] = {"AutoModelForCausalLM": f"{REMOTE}.{config['architectures'][0]}"}
        _write(partial / "config.json", (json.dumps(config, indent=2) + "\n").encode())
    for path in sorted(source.iterdir()):
        if path.is_file() and path.name not in {*files, *originals} and path.suffix != ".safetensors":
            shutil.copyfile(path, partial / path.name)
    for name, code in added.items():
        _write(partial / name, code.encode())
    others = sorted(p for p in partial.iterdir() if p.is_file() and p.name not in {*files, BEGUN})
    manifest: dict[str, Any] = {
        "version": VERSION,
        "df11": __version__,
        "tensors": tensors,
        "headers": headers,
        "originals": originals,
        "added": sorted(added),
        "files": {path.name: xxhash.xxh3_128_hexdigest(path.read_bytes()) for path in others},
    }
    manifest["checksum"] = _checksum(manifest)
    _write(partial / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())
    return manifest


def _checksum(manifest: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps({k: v for k, v in manifest.items() if k != "checksum"}, sort_keys=True).encode())


def _write(path: Path, data: bytes) -> None:
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
    if checksum != _checksum(manifest):
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
        text, header = _header(path)
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
    manifest = read_manifest(directory)
    return [StoredFile.open(directory / name, checksum) for name, checksum in manifest["headers"].items()]


def verify(directory: Path, original: Path | None = None, progress: Progress = lambda name, size: None) -> int:
    """Decode every tensor and compare it with the stored checksums of the original bits, or with `original` itself, bit for bit.

    Returns the number of tensors. Raises CheckpointError or FormatError that names the first file or tensor that is wrong.
    """
    manifest = read_manifest(directory)
    for name, checksum in manifest["files"].items():
        if not (directory / name).exists() or xxhash.xxh3_128_hexdigest((directory / name).read_bytes()) != checksum:
            raise CheckpointError(f"{directory / name} was changed or removed: restore it from a copy")
    reader = SafetensorsSource(original) if original else None
    codec = DFloat11()

    def check(tensor: tuple[StoredFile, str]) -> int:
        file, name = tensor
        expected = reader.read(name).reshape(-1).view(torch.uint8).numpy() if reader else None
        at = 0
        for piece in file.original(name, codec):
            if expected is not None and not np.array_equal(piece, expected[at : at + piece.size]):
                raise FormatError(f"{name} in {file.path} is not what {original} holds")
            at += piece.size
        if expected is not None and at != expected.size:
            raise FormatError(f"{name} in {file.path} has another size than in {original}")
        return at

    tensors = [(file, name) for file in open_files(directory) for name in file.about["tensors"]]
    for (_, name), size in zip(tensors, in_order(check, tensors, min(AHEAD, codec.threads)), strict=True):
        progress(name, size)
    return len(tensors)


def restore(directory: Path, target: Path, progress: Progress = lambda name, size: None) -> None:
    """The original checkpoint, file by file the same bytes: its weights, and the other files that lay beside them.

    Subfolders and safetensors files that the index does not name were not compressed and are not restored.
    """
    if target.exists():
        raise CheckpointError(f"{target} exists already: remove it or choose another directory")
    manifest = read_manifest(directory)
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    codec = DFloat11()
    for file in open_files(directory):
        header = file.about["original_header"].encode()
        places = json.loads(header)
        with (partial / file.path.name).open("wb") as out:
            out.write(len(header).to_bytes(8, "little") + header)
            for name in file.about["tensors"]:
                out.seek(8 + len(header) + places[name]["data_offsets"][0])
                size = 0
                for piece in file.original(name, codec):
                    out.write(piece.data)
                    size += piece.size
                progress(name, size)
            out.flush()
            os.fsync(out.fileno())
    for name in manifest["files"]:
        if name not in (*manifest["originals"], *manifest["added"]):
            shutil.copyfile(directory / name, partial / name)
    for name, text in manifest["originals"].items():
        _write(partial / name, text.encode())
    partial.rename(target)


def summary(directory: Path) -> list[dict[str, Any]]:
    """A row a tensor: name, shape, whether it is compressed, original and stored bytes."""
    rows = []
    for file in open_files(directory):
        original = json.loads(file.about["original_header"])
        for name, record in file.about["tensors"].items():
            keys = [name, *(f"{name}_{part}" for part in PARTS)] if record["compressed"] else [name]
            stored = sum(file.entries[key]["data_offsets"][1] - file.entries[key]["data_offsets"][0] for key in keys)
            start, end = original[name]["data_offsets"]
            rows.append(
                {"name": name, **{k: record[k] for k in ("shape", "compressed")}, "original": end - start, "stored": stored}
            )
    return rows


def exponent_bits(directory: Path) -> tuple[float, float]:
    """Of all compressed tensors together: mean entropy of each one's exponents, and what their codes take, in bits a weight."""
    codec = DFloat11()
    information, coded, weights = 0.0, 0, 0
    for file in open_files(directory):
        for name, record in file.about["tensors"].items():
            if record["compressed"]:
                unit = file.unit(name)
                histogram = sum((bits.histogram(bits.to_bits(piece)) for piece in codec.stream(unit)), np.zeros(256, np.int64))
                information += entropy(histogram) * unit.numel
                coded += 8 * unit.encoded_exponent.size
                weights += unit.numel
    return (information / weights, coded / weights) if weights else (0.0, 0.0)
