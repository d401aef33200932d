"""Checkpoints as the released package `dfloat11` writes and reads them: `DFloat11/...-DF11` on the hub.

A unit is the module that a pattern of config.json's `dfloat11_config.pattern_dict` matches: an embedding or a linear layer (empty
list), or a block with the paths of its linear layers, whose weights are one stream in that order. Its arrays lie under the
module's name, one file a unit or all in one; `output_positions` as the bytes of uint32. Shapes are the model's, not stored.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from df11.checkpoint_files import CheckpointError, Progress, config_to_compress, read_config
from df11.formats import FormatError
from df11.formats.dfloat11 import BLOCK_CHUNKS, CHUNK_BYTES, DFloat11, DFloat11Unit
from df11.released import VERSION
from df11.sources.files import INDEX, SafetensorsSource
from df11.sources.model import TensorInfo, Unit, split_units

ARRAYS = ("encoded_exponent", "sign_mantissa", "luts", "gaps", "output_positions", "split_positions")

Shapes = Mapping[str, tuple[int, ...]]  # of the model's parameters, by name


def is_released(directory: Path) -> bool:
    """Whether a directory is a checkpoint of the released package."""
    return "dfloat11_config" in read_config(directory)


@dataclass(frozen=True)
class StoredUnit:
    """A compressed module of a file, and the names of the weights that are its stream, in order."""

    file: Path
    module: str
    names: tuple[str, ...]

    def decode(self, shapes: Shapes) -> dict[str, torch.Tensor]:
        """The weights by name, cut by the model's shapes. Raises FormatError that names file and module."""
        try:
            with _opened(self.file) as opened:
                stored = {name: opened.get_tensor(f"{self.module}.{name}").numpy() for name in ARRAYS}
            unit = _unit(stored, tuple(shapes[name] for name in self.names))
            return dict(zip(self.names, DFloat11().decode(unit), strict=True))
        except (FormatError, SafetensorError, TypeError, ValueError) as broken:
            raise FormatError(f"{self.module} in {self.file}: {broken}; download it again") from broken


def weight_files(directory: Path) -> list[Path]:
    if files := sorted(directory.glob("*.safetensors")):
        return files
    raise CheckpointError(f"{directory} holds no safetensors files: download it again")


def patterns(directory: Path) -> dict[str, list[str]]:
    """Of module names, each with the paths of the linear layers inside; none for an embedding or a linear layer."""
    config = read_config(directory)["dfloat11_config"]
    try:
        found: dict[str, list[str]] = config["pattern_dict"]
        for pattern in found:
            re.compile(pattern)
    except (KeyError, TypeError, re.error) as broken:
        raise CheckpointError(
            f"dfloat11_config in {directory / 'config.json'} has no sound pattern_dict ({broken!r}): download it again"
        ) from broken
    return found


def units(directory: Path, shapes: Shapes) -> list[StoredUnit]:
    """All compressed modules of a directory; their files' headers are read. Raises CheckpointError that names file and module."""
    known, found = patterns(directory), []
    for file in weight_files(directory):
        with _opened(file) as opened:
            modules = [key.removesuffix(".encoded_exponent") for key in opened.keys() if key.endswith(".encoded_exponent")]  # noqa: SIM118
        for module in modules:
            names = _weights(module, known, file)
            if unknown := [name for name in names if name not in shapes]:
                raise CheckpointError(
                    f"{module} in {file} holds {unknown[0]}, which the model does not have: is config.json its own?"
                )
            found.append(StoredUnit(file, module, names))
    return found


def read(directory: Path, shapes: Shapes) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """Each file's name and its tensors as they were: compressed ones decoded and cut by the model's shapes.

    Raises CheckpointError or FormatError that names the file and the module.
    """
    held = units(directory, shapes)
    for file in weight_files(directory):
        with _opened(file) as opened:
            plain = [key for key in opened.keys() if key.rpartition(".")[2] not in ARRAYS]  # noqa: SIM118
            tensors = {key: opened.get_tensor(key) for key in plain}
        for unit in held:
            if unit.file == file:
                tensors |= unit.decode(shapes)
        yield file.name, tensors


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, "pt")
    except SafetensorError as broken:
        raise CheckpointError(f"{file} is damaged or cut short ({broken}): download it again") from broken


def _weights(module: str, known: Mapping[str, list[str]], file: Path) -> tuple[str, ...]:
    for pattern, paths in known.items():
        if re.fullmatch(pattern, module):
            return tuple(f"{module}.{path}.weight" for path in paths) or (f"{module}.weight",)
    raise CheckpointError(f"no pattern of config.json matches {module}, which {file} holds compressed: is config.json its own?")


def _unit(stored: Mapping[str, np.ndarray], shapes: tuple[tuple[int, ...], ...]) -> DFloat11Unit:
    unit = DFloat11Unit(
        shapes=shapes,
        encoded_exponent=stored["encoded_exponent"],
        sign_mantissa=stored["sign_mantissa"],
        luts=stored["luts"],
        gaps=stored["gaps"],
        output_positions=stored["output_positions"].view(np.uint32),
    )
    if not np.array_equal(stored["split_positions"], unit.split_positions):
        raise FormatError(f"split_positions {stored['split_positions'].tolist()} do not cut shapes {list(shapes)}")
    return unit


def restore(directory: Path, target: Path, shapes: Shapes, progress: Progress = lambda name, size: None) -> None:
    """The bf16 checkpoint: safetensors files with an index, and config.json without `dfloat11_config`."""
    if target.exists():
        raise CheckpointError(f"{target} exists already: remove it or choose another directory")
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    places: dict[str, str] = {}
    for name, tensors in read(directory, shapes):
        if tensors:
            save_file(tensors, partial / name, {"format": "pt"})
            places |= dict.fromkeys(tensors, name)
            progress(name, sum(tensor.nbytes for tensor in tensors.values()))
    (partial / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}, indent=1) + "\n")
    config = read_config(directory)
    del config["dfloat11_config"]
    (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    _copy_others(directory, partial)
    partial.rename(target)


def write(
    source: Path,
    target: Path,
    threads: int = 0,
    progress: Progress = lambda name, size: None,
    parameters: Callable[[Path], Sequence[set[str]]] = lambda source: (),
) -> None:
    """Compress a bf16 checkpoint to the released layout, one file a unit. Raises UnsupportedBits where a unit has Inf, NaN or
    2^113: the layout has no code for them.

    parameters: gives the names of each of the model's parameters. The layout is read by them, nothing is renamed or merged:
    CheckpointError where the files have other names.
    """
    if target.exists():
        raise CheckpointError(f"{target} exists already: remove it or choose another directory")
    config = config_to_compress(source)
    reader = SafetensorsSource(source)
    # The released loader takes the `weight` of linear layers and embeddings only.
    parts, rest = split_units(reader.tensors(), wanted=lambda t: len(t.shape) == 2 and t.name.endswith(".weight"))
    loose = {info.name: info for info in rest}
    compressed = {tensor.name for unit in parts for tensor in unit.tensors}
    _check_names(source, {info.name for info in reader.tensors()}, compressed, parameters(source))
    codec = DFloat11(threads=threads, strict=True)
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    known: dict[str, list[str]] = {}
    for unit in parts:
        pattern, paths = _pattern(unit)
        if known.setdefault(pattern, paths) != paths:
            pattern = re.escape(unit.name)
            known = {pattern: paths} | known  # the first match counts
        others = [loose.pop(name) for name in list(loose) if name.startswith(f"{unit.name}.")]
        _save(codec, reader, unit, others, partial / f"{unit.name.replace('.', '_')}.safetensors")
        progress(unit.name, sum(t.nbytes for t in unit.tensors))
    save_file({name: reader.read(name) for name in loose}, partial / "model.safetensors", {"format": "pt"})
    config["dfloat11_config"] = {
        "version": VERSION,
        "threads_per_block": [BLOCK_CHUNKS],
        "bytes_per_thread": CHUNK_BYTES,
        "pattern_dict": known,
    }
    (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    _copy_others(source, partial)
    partial.rename(target)


def _check_names(source: Path, there: set[str], compressed: set[str], parameters: Sequence[set[str]]) -> None:
    if not parameters:
        return
    unknown = sorted(compressed - set().union(*parameters))
    missing = sorted(min(names) for names in parameters if not names & there)
    if unknown or missing:
        what = f"holds {unknown[0]}, which" if unknown else f"has no {missing[0]}, which"
        does = "is no parameter of its model" if unknown else "its model needs"
        raise CheckpointError(
            f"{source} {what} {does}: transformers renames or merges its weights on loading, the released layout is read without"
            " that and could not be loaded again; compress without --released"
        )


def _pattern(unit: Unit) -> tuple[str, list[str]]:
    if unit.kind != "block":
        return re.escape(unit.name), []
    prefix, _, _ = unit.name.rpartition(".")
    return re.escape(prefix) + r"\.\d+", [t.name.removeprefix(f"{unit.name}.").removesuffix(".weight") for t in unit.tensors]


def _save(codec: DFloat11, reader: SafetensorsSource, unit: Unit, others: list[TensorInfo], file: Path) -> None:
    chunks: Callable[[], Iterator[torch.Tensor]] = lambda: (piece for t in unit.tensors for piece in reader.chunks(t.name))  # noqa: E731
    coded = codec.encode(chunks, [t.shape for t in unit.tensors])
    arrays = coded.arrays | {"output_positions": coded.output_positions.view(np.uint8)}
    tensors = {f"{unit.name}.{key}": torch.from_numpy(array) for key, array in arrays.items()}
    save_file(tensors | {info.name: reader.read(info.name) for info in others}, file, {"format": "pt"})


def _copy_others(source: Path, target: Path) -> None:
    for path in sorted(source.iterdir()):
        if path.is_file() and path.suffix != ".safetensors" and path.name not in ("config.json", INDEX):
            shutil.copyfile(path, target / path.name)
