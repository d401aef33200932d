"""Compress a directory of safetensors, verify it, restore it.

A compressed checkpoint mirrors the original: the same files, in which a compressed tensor `x.weight` is `x.weight` (the code
stream, uint8 in one dimension), `x.weight_sign_mantissa`, `_luts`, `_gaps` and `_output_positions`; other tensors are as they were.
config.json names no file of weights, so that code which does not know the format stops (`GUARD`). `df11.json` holds the checksums
of all original and stored bytes. docs/format.md has the details.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import xxhash

from df11 import __version__, bits
from df11.checkpoint_files import (
    MANIFEST,
    VERSION,
    CheckpointError,
    Progress,
    StoredFile,
    checksum_of,
    config_to_compress,
    header_of,
    open_files,
    read_config,
    read_manifest,
    write,
)
from df11.formats import FormatError
from df11.formats.dfloat11 import PARTS, DFloat11, DFloat11Unit
from df11.huffman import entropy
from df11.ops import encode
from df11.runtime import GRANULARITIES, MODES
from df11.sources.files import INDEX, SafetensorsSource, described, read_header
from df11.sources.model import SPELLING, SourceError, TensorInfo, check_patterns, is_matrix, is_selected
from df11.tensors import CompressedTensor, dense

__all__ = [
    "GUARD",
    "MANIFEST",
    "QUANT_METHOD",
    "REMOTE",
    "VERSION",
    "CheckpointError",
    "Progress",
    "compress",
    "exponent_bits",
    "restore",
    "save",
    "shortfall",
    "summary",
    "verify",
]

BEGUN = ".df11-begun.json"  # options of an unfinished run
QUANT_METHOD = "df11"
# What config.json names as the file of weights. transformers takes no other ending, so without df11 it stops and prints this;
# df11/hf_io.py takes it away. Whatever from_pretrained is asked to ignore, it never gets to read codes as weights.
GUARD = "the weights are compressed: pip install df11, then `import df11` before from_pretrained"
REMOTE = "df11_remote"  # module of the remote code
REMOTE_CODE = '''"""Lets from_pretrained(..., trust_remote_code=True) load these compressed weights without an import of df11."""

import df11  # noqa: F401  registers the format
import transformers
'''
REMOTE_CLASS = """

class {name}(transformers.{name}):
    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        # The library's own class: of one that is not, transformers would choose other kernels and not rename or merge weights.
        return transformers.{name}.from_pretrained(*args, **kwargs)
"""
AHEAD = 4  # tensors in work at a time

T = TypeVar("T")
R = TypeVar("R")
Wanted = Callable[[TensorInfo], bool]
Arrays = dict[str, tuple[str, list[int], memoryview]]  # what is stored of a tensor: dtype, shape and bytes by key
# Why a bf16 matrix stays as it is.
EXCLUDED, NO_CODE, NO_GAIN = "excluded", "no code", "no gain"
REASONS = {
    EXCLUDED: "left out by --include or --exclude",
    NO_CODE: "with Inf, NaN or 2^113 and more, which have no code, or of 2^32 weights and more",
    NO_GAIN: "not smaller when compressed",
}


def compress(
    source: Path,
    target: Path,
    include: tuple[str, ...] = (),
    exclude: tuple[str, ...] = (),
    threads: int = 0,
    progress: Progress = lambda name, size: None,
    auto_classes: Callable[[Path], Mapping[str, str]] | None = None,
    mode: str = "exact",
    granularity: str = "layer",
) -> dict[str, Any]:
    """Compress the safetensors directory `source` to the new directory `target`. Returns the manifest.

    Works file by file, tensor by tensor, in a folder beside the target that is renamed at the end: an interrupted call goes on
    with the first unfinished file, and the result is the same bytes. include, exclude: shell patterns of names as they are in the
    files. Of bf16 matrices and stacks of them stays what would not get smaller (`shortfall`). auto_classes: gives the model's
    classes by Auto class; remote code is added that lets these `from_pretrained(target, trust_remote_code=True)` import df11
    themselves. mode, granularity: how transformers runs it, where `DF11Config` says nothing else.
    """
    for name, value, known in (("mode", mode, MODES), ("granularity", granularity, GRANULARITIES)):
        if value not in known:
            raise ValueError(f"{name}={value!r}: choose one of {', '.join(known)}")
    if target.exists():
        raise CheckpointError(f"{target} exists already: remove it or choose another directory")
    config = config_to_compress(source)
    files = _weight_files(source)
    try:
        check_patterns((info.name for file in files.values() for info in SafetensorsSource(file).tensors()), include, exclude)
    except ValueError as unmatched:
        raise CheckpointError(f"{source}: {unmatched}") from unmatched
    how: dict[str, Any] = {"mode": mode} if mode != MODES[0] else {}
    how |= {"granularity": granularity} if granularity != GRANULARITIES[0] else {}
    auto_map, added = _remote_code(source, config, auto_classes) if auto_classes else ({}, {})
    options: dict[str, Any] = {"include": list(include), "exclude": list(exclude), "how": how}
    options |= {"added": added, "source": _fingerprint(files)}
    partial = target.with_name(f".{target.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    begun = partial / BEGUN
    if begun.exists() and begun.read_text() != json.dumps(options):
        raise CheckpointError(f"{partial} was begun with other options or another source: remove it and run again")
    write(begun, json.dumps(options).encode())
    codec = DFloat11(threads=threads)

    def wanted(info: TensorInfo) -> bool:
        return is_selected(info.name, include, exclude)

    for name, file in files.items():
        if not (partial / name).exists():
            _compress_file(file, partial / name, codec, wanted, progress)
    changes = auto_map | {"quantization_config": {"quant_method": QUANT_METHOD, "version": VERSION} | how}
    manifest = _finish(source, partial, files, added, changes)
    partial.rename(target)
    (target / BEGUN).unlink()
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


def _remote_code(
    source: Path, config: dict[str, Any], auto_classes: Callable[[Path], Mapping[str, str]]
) -> tuple[dict[str, Any], dict[str, str]]:
    """What config.json needs for it, and text by file name. Raises CheckpointError where the model has code of its own."""
    if "auto_map" in config or (source / f"{REMOTE}.py").exists():
        raise CheckpointError(f"{source} has remote code of its own: import df11 before from_pretrained instead of adding more")
    classes = auto_classes(source)
    text = REMOTE_CODE + "".join(REMOTE_CLASS.format(name=name) for name in sorted(set(classes.values())))
    return {"auto_map": {auto: f"{REMOTE}.{name}" for auto, name in classes.items()}}, {f"{REMOTE}.py": text}


def _weight_files(directory: Path) -> dict[str, Path]:
    """Safetensors files by name. Raises SourceError where they are incomplete or damaged."""
    if not directory.is_dir():
        raise SourceError(f"{directory} is not a directory: name one with safetensors files")
    files = SafetensorsSource(directory).files
    found = {file.name: file for file in files}
    if len(found) < len(files):
        raise SourceError(f"{directory} has files of the same name in several folders: put all into one, under names of their own")
    return found


def _fingerprint(files: dict[str, Path]) -> dict[str, list[int]]:
    stats = {name: path.stat() for name, path in files.items()}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}


def _compress_file(source: Path, target: Path, codec: DFloat11, wanted: Wanted, progress: Progress) -> None:
    """One file, streamed."""
    reader = SafetensorsSource(source)
    original, _ = read_header(source)

    def stored(info: TensorInfo) -> tuple[Arrays, dict[str, Any]]:
        unit, why = None, ""
        if is_matrix(info.dtype, info.shape) and not wanted(info):
            why = EXCLUDED
        elif is_matrix(info.dtype, info.shape):
            unit = codec.encode(lambda: reader.chunks(info.name), [info.shape])
        return _stored(info, unit, why, lambda: _bytes_of(reader.read(info.name)))

    made = in_order(stored, reader.tensors(), min(AHEAD, codec.threads))
    _write_file(target, original.decode(), reader.tensors(), made, progress)


def save(tensors: Mapping[str, torch.Tensor], target: Path, wanted: Callable[[str], bool]) -> None:
    """Write tensors to a file as `compress` does: compressed ones as they are stored, and of others the bf16 matrices that are
    wanted by name. Its original is what safetensors would have written of the same tensors."""
    original: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    infos, at = [], 0
    for name, tensor in sorted(tensors.items()):
        info = TensorInfo(name, tuple(tensor.shape), SPELLING[tensor.dtype])
        original[name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [at, at + info.nbytes]}
        at += info.nbytes
        infos.append(info)

    def stored(info: TensorInfo) -> tuple[Arrays, dict[str, Any]]:
        tensor = tensors[info.name]
        weights = dense(tensor).contiguous()
        unit = None
        if isinstance(tensor, CompressedTensor) or (is_matrix(info.dtype, info.shape) and wanted(info.name)):
            units = tensor.units() if isinstance(tensor, CompressedTensor) and tensor.is_contiguous() else []
            whole = len(units) == 1 and units[0].numel == tensor.numel()
            data = _bytes_of(weights)
            unit = replace((units[0] if whole else encode([weights])).to_unit(), checksum=xxhash.xxh3_128_hexdigest(data))
        return _stored(info, unit, "", lambda: _bytes_of(weights))

    _write_file(target, json.dumps(original, separators=(",", ":")), infos, map(stored, infos))


def _write_file(
    target: Path,
    original_header: str,
    infos: list[TensorInfo],
    made: Iterable[tuple[Arrays, dict[str, Any]]],
    progress: Progress = lambda name, size: None,
) -> None:
    """One file of what is made of each tensor. Sizes are known only at the end, so the header goes into room left free before."""
    about: dict[str, Any] = {"original_header": original_header, "tensors": {}, "stored": {}}
    entries: dict[str, Any] = {}
    # An entry takes the name three times (with a suffix), its checksums and some 150 characters; a compressed tensor has five.
    names = {info.name for info in infos}
    room = 4096 + _escaped(original_header) + sum(5 * (3 * _escaped(name) + 320) for name in names)
    temporary = target.with_name(f".{target.name}.tmp")
    with temporary.open("wb") as out:
        out.seek(8 + room)
        at = 0
        for info, (stored, record) in zip(infos, made, strict=True):
            about["tensors"][info.name] = record
            for key, (dtype, shape, data) in stored.items():
                if key != info.name and key in names:
                    raise CheckpointError(f"{target} has a tensor {key}, a name that {info.name} needs: --exclude '{info.name}'")
                entries[key] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(data)]}
                about["stored"][key] = xxhash.xxh3_128_hexdigest(data)
                out.write(data)
                at += len(data)
            progress(info.name, info.nbytes)
        header = json.dumps({"__metadata__": {"format": "pt", "df11": json.dumps(about)}, **entries}).encode()
        if len(header) > room:
            raise CheckpointError(f"the header of {target} needs {len(header)} bytes, {room} were left for it")
        out.seek(0)
        out.write(room.to_bytes(8, "little") + header.ljust(room))
        out.flush()
        os.fsync(out.fileno())
    temporary.rename(target)


def _escaped(text: str) -> int:
    """Bytes of a text in JSON in JSON."""
    return len(json.dumps(json.dumps(text)))


def _stored(info: TensorInfo, unit: DFloat11Unit | None, why: str, data: Callable[[], memoryview]) -> tuple[Arrays, dict[str, Any]]:
    """The arrays that a tensor is stored as, and what is recorded of it: those of its unit where they are smaller, else its own
    bytes, and why."""
    if unit is not None and (unit.raw is not None or unit.output_positions.dtype != np.uint32):
        why = NO_CODE
    elif unit is not None:
        arrays = {info.name: unit.encoded_exponent} | {f"{info.name}_{part}": getattr(unit, part) for part in PARTS}
        if sum(array.nbytes for array in arrays.values()) < info.nbytes:
            stored = {key: ("U32" if a.dtype == np.uint32 else "U8", list(a.shape), _bytes(a)) for key, a in arrays.items()}
            return stored, {"compressed": True, "shape": info.shape, "xxh3": unit.checksum}
        why = NO_GAIN
    own = data()
    record = {"compressed": False, "shape": info.shape, "xxh3": xxhash.xxh3_128_hexdigest(own)} | ({"why": why} if why else {})
    return {info.name: (info.dtype, list(info.shape), own)}, record


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return _bytes(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def _bytes(array: np.ndarray) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _finish(source: Path, partial: Path, files: dict[str, Path], added: dict[str, str], changes: dict[str, Any]) -> dict[str, Any]:
    """Index, config, the other files, those added, and the manifest."""
    weight_map: dict[str, str] = {}
    tensors: dict[str, Any] = {}
    headers = {}
    total = 0
    for name in files:
        text, header = header_of(partial / name)
        headers[name] = xxhash.xxh3_128_hexdigest(text)
        about = json.loads(header.pop("__metadata__")["df11"])
        tensors |= {key: record | {"file": name} for key, record in about["tensors"].items()}
        weight_map |= dict.fromkeys(header, name)
        total += max(entry["data_offsets"][1] for entry in header.values()) if header else 0
    originals: dict[str, str] = {}
    if (source / INDEX).exists():
        originals[INDEX] = (source / INDEX).read_bytes().decode()  # line ends as they are
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write(partial / INDEX, (json.dumps(index, indent=1) + "\n").encode())
    if (source / "config.json").exists():
        originals["config.json"] = (source / "config.json").read_bytes().decode()
        config = {"transformers_weights": GUARD} | read_config(source) | changes
        write(partial / "config.json", (json.dumps(config, indent=2) + "\n").encode())
    for path in sorted(source.iterdir()):
        if path.is_file() and path.name not in {*files, *originals} and path.suffix != ".safetensors":
            shutil.copyfile(path, partial / path.name)
    for name, code in added.items():
        write(partial / name, code.encode())
    others = sorted(p for p in partial.iterdir() if p.is_file() and p.name not in {*files, BEGUN, MANIFEST})
    manifest: dict[str, Any] = {
        "version": VERSION,
        "df11": __version__,
        "tensors": tensors,
        "headers": headers,
        "originals": originals,
        "added": sorted(added),
        "files": {path.name: xxhash.xxh3_128_hexdigest(path.read_bytes()) for path in others},
    }
    manifest["checksum"] = checksum_of(manifest)
    write(partial / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())
    return manifest


def verify(directory: Path, original: Path | None = None, progress: Progress = lambda name, size: None) -> int:
    """Decode every tensor and compare it with the stored checksums of the original bits, or with `original` itself, bit for bit.

    Of an original, tensors must have the same names, dtypes and shapes too, in whichever of its files they are. Returns the number
    of tensors. Raises CheckpointError or FormatError that names the first file or tensor that is wrong.
    """
    manifest = read_manifest(directory)
    for name, checksum in manifest["files"].items():
        if not (directory / name).exists() or xxhash.xxh3_128_hexdigest((directory / name).read_bytes()) != checksum:
            raise CheckpointError(f"{directory / name} was changed or removed: restore it from a copy")
    files = open_files(directory)
    readers = _readers(original, files) if original else {}
    codec = DFloat11()

    def check(tensor: tuple[StoredFile, str]) -> int:
        file, name = tensor
        expected = readers[name].read(name).reshape(-1).view(torch.uint8).numpy() if readers else None
        at = 0
        for piece in file.original(name, codec):
            if expected is not None and not np.array_equal(piece, expected[at : at + piece.size]):
                raise FormatError(f"{name} in {file.path} is not what {original} holds")
            at += piece.size
        return at

    tensors = [(file, name) for file in files for name in file.about["tensors"]]
    for (_, name), size in zip(tensors, in_order(check, tensors, min(AHEAD, codec.threads)), strict=True):
        progress(name, size)
    return len(tensors)


def _readers(original: Path, files: list[StoredFile]) -> dict[str, SafetensorsSource]:
    """What reads each tensor of an original, by name. Raises CheckpointError where its tensors are not those that `files` store."""
    # One for each file, as a file may hold tensors that the index does not name, and they are compressed too.
    each = [SafetensorsSource(file) for file in SafetensorsSource(original).files]
    readers = {info.name: (reader, info) for reader in each for info in reader.tensors()}
    stored = {info.name: (file, info) for file in files for info in described(json.loads(file.about["original_header"]))}
    for name, (file, info) in stored.items():
        if name not in readers:
            raise CheckpointError(f"{name} in {file.path} is not in {original}: is that its original?")
        if (other := readers[name][1]) != info:
            was, holds = (f"{tensor.dtype} {list(tensor.shape)}" for tensor in (info, other))
            raise CheckpointError(f"{name} in {file.path} was {was}, {original} holds {holds}: is that its original?")
    for name, (reader, _) in readers.items():
        if name not in stored:
            raise CheckpointError(f"{name} in {reader.files[0]} is not in the compressed checkpoint: is that its original?")
    return {name: reader for name, (reader, _) in readers.items()}


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
        write(partial / name, text.encode())
    partial.rename(target)


def summary(directory: Path) -> list[dict[str, Any]]:
    """A row a tensor: name, shape, dtype, whether it is compressed, why not (a key of REASONS, of a bf16 matrix), original and
    stored bytes."""
    rows = []
    for file in open_files(directory):
        original = json.loads(file.about["original_header"])
        for name, record in file.about["tensors"].items():
            keys = [name, *(f"{name}_{part}" for part in PARTS)] if record["compressed"] else [name]
            stored = sum(file.entries[key]["data_offsets"][1] - file.entries[key]["data_offsets"][0] for key in keys)
            start, end = original[name]["data_offsets"]
            row = {"name": name, "dtype": original[name]["dtype"], "why": record.get("why", "")}
            rows.append(row | {k: record[k] for k in ("shape", "compressed")} | {"original": end - start, "stored": stored})
    return rows


def shortfall(rows: list[dict[str, Any]]) -> str:
    """Of a `summary`: why less than half of the bytes of bf16 matrices is compressed. Empty where more is."""
    matrices = [row for row in rows if is_matrix(row["dtype"], row["shape"])]
    whole = sum(row["original"] for row in matrices)
    if not whole:
        sizes: Counter[str] = Counter()
        for row in rows:
            sizes[row["dtype"]] += row["original"]
        held = f"; most of it is {sizes.most_common(1)[0][0]}" if rows else ""
        return f"nothing is compressed: the checkpoint holds no bf16 matrix{held}"
    done = sum(row["original"] for row in matrices if row["compressed"])
    if 2 * done >= whole:
        return ""
    left = Counter({why: sum(row["original"] for row in matrices if row["why"] == why) for why in REASONS})
    reasons = ", ".join(f"{100 * size / whole:.0f} % {REASONS[why]}" for why, size in left.most_common() if size)
    return f"only {100 * done / whole:.0f} % of the bytes of bf16 matrices are compressed: {reasons}"


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
