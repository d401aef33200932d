"""Checkpoints as the released package `dfloat11` writes and reads them: `DFloat11/...-DF11` on the hub.

A unit is the module that a pattern of config.json's `dfloat11_config.pattern_dict` matches: an embedding or a linear layer (empty
list), or a block with the paths of its linear layers, whose weights are one stream in that order. Its arrays lie under the
module's name, one file a unit or all in one; `output_positions` as the bytes of uint32. Shapes are the model's, not stored.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from df11.checkpoint import CheckpointError, Progress
from df11.formats import FormatError
from df11.formats.dfloat11 import BLOCK_CHUNKS, CHUNK_BYTES, DFloat11, DFloat11Unit
from df11.sources import SafetensorsSource, TensorInfo, Unit, split_units
from df11.sources.files import INDEX

VERSION = "0.5.0"  # of the package that wrote the layout read here
ARRAYS = ("encoded_exponent", "sign_mantissa", "luts", "gaps", "output_positions", "split_positions")

Shapes = Mapping[str, tuple[int, ...]]  # of the model's parameters, by name


def is_released(directory: Path) -> bool:
    """Whether a directory is a checkpoint of the released package."""
    config = directory / "config.json"
    return config.exists() and "dfloat11_config" in json.loads(config.read_text())


def read(directory: Path, shapes: Shapes) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """Each file's name and its tensors as they were: compressed ones decoded and cut by the model's shapes.

    Raises CheckpointError or FormatError that names the file and the module.
    """
    patterns: dict[str, list[str]] = json.loads((directory / "config.json").read_text())["dfloat11_config"]["pattern_dict"]
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{directory} holds no safetensors files: download it again")
    for file in files:
        try:
            with safe_open(file, "pt") as opened:
                stored = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        except SafetensorError as broken:
            raise CheckpointError(f"{file} is damaged or cut short ({broken}): download it again") from broken
        tensors = {key: tensor for key, tensor in stored.items() if key.rpartition(".")[2] not in ARRAYS}
        for module in [key.removesuffix(".encoded_exponent") for key in stored if key.endswith(".encoded_exponent")]:
            names = _weights(module, patterns, file)
            if unknown := [name for name in names if name not in shapes]:
                raise CheckpointError(
                    f"{module} in {file} holds {unknown[0]}, which the model does not have: is config.json its own?"
                )
            try:
                unit = _unit(stored, module, tuple(shapes[name] for name in names))
                tensors |= dict(zip(names, DFloat11().decode(unit), strict=True))
            except (FormatError, KeyError, ValueError) as broken:
                raise FormatError(f"{module} in {file}: {broken}; download it again") from broken
        yield file.name, tensors


def _weights(module: str, patterns: Mapping[str, list[str]], file: Path) -> list[str]:
    for pattern, paths in patterns.items():
        if re.fullmatch(pattern, module):
            return [f"{module}.{path}.weight" for path in paths] or [f"{module}.weight"]
    raise CheckpointError(f"no pattern of config.json matches {module}, which {file} holds compressed: is config.json its own?")


def _unit(stored: Mapping[str, torch.Tensor], module: str, shapes: tuple[tuple[int, ...], ...]) -> DFloat11Unit:
    arrays = {name: stored[f"{module}.{name}"].numpy() for name in ARRAYS}
    unit = DFloat11Unit(
        shapes=shapes,
        encoded_exponent=arrays["encoded_exponent"],
        sign_mantissa=arrays["sign_mantissa"],
        luts=arrays["luts"],
        gaps=arrays["gaps"],
        output_positions=arrays["output_positions"].view(np.uint32),
    )
    if not np.array_equal(arrays["split_positions"], unit.split_positions):
        raise FormatError(f"split_positions {arrays['split_positions'].tolist()} do not cut shapes {list(shapes)}")
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
    config = json.loads((directory / "config.json").read_text())
    del config["dfloat11_config"]
    (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    _copy_others(directory, partial)
    partial.rename(target)


def write(source: Path, target: Path, threads: int = 0, progress: Progress = lambda name, size: None) -> None:
    """Compress a bf16 checkpoint to the released layout, one file a unit. Raises UnsupportedBits where a unit has Inf, NaN or
    2^113: the layout has no code for them."""
    if target.exists():
        raise CheckpointError(f"{target} exists already: remove it or choose another directory")
    reader = SafetensorsSource(source)
    units, rest = split_units([info for info in reader.tensors() if len(info.shape) != 3])
    rest += [info for info in reader.tensors() if len(info.shape) == 3]
    # The released loader takes the `weight` of modules only.
    loose = [t for unit in units for t in unit.tensors if not t.name.endswith(".weight")]
    codec = DFloat11(threads=threads, strict=True)
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    patterns: dict[str, list[str]] = {}
    for unit in units:
        held = [t for t in unit.tensors if t.name.endswith(".weight")]
        if held:
            pattern, paths = _pattern(unit, held)
            if patterns.setdefault(pattern, paths) != paths:
                pattern = re.escape(unit.name)
                patterns = {pattern: paths} | patterns  # the first match counts
            _save(codec, reader, unit.name, held, partial / f"{unit.name.replace('.', '_')}.safetensors")
            progress(unit.name, sum(t.nbytes for t in held))
    others = {info.name: reader.read(info.name) for info in [*rest, *loose]}
    save_file(others, partial / "model.safetensors", {"format": "pt"})
    config: dict[str, Any] = json.loads((source / "config.json").read_text()) if (source / "config.json").exists() else {}
    config["dfloat11_config"] = {
        "version": VERSION,
        "threads_per_block": [BLOCK_CHUNKS],
        "bytes_per_thread": CHUNK_BYTES,
        "pattern_dict": patterns,
    }
    (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    _copy_others(source, partial)
    partial.rename(target)


def _pattern(unit: Unit, held: list[TensorInfo]) -> tuple[str, list[str]]:
    if unit.kind != "block":
        return re.escape(unit.name), []
    prefix, _, _ = unit.name.rpartition(".")
    return re.escape(prefix) + r"\.\d+", [t.name.removeprefix(f"{unit.name}.").removesuffix(".weight") for t in held]


def _save(codec: DFloat11, reader: SafetensorsSource, name: str, held: list[TensorInfo], file: Path) -> None:
    chunks: Callable[[], Iterator[torch.Tensor]] = lambda: (piece for t in held for piece in reader.chunks(t.name))  # noqa: E731
    unit = codec.encode(chunks, [t.shape for t in held])
    arrays = unit.arrays | {"output_positions": unit.output_positions.view(np.uint8)}
    save_file({f"{name}.{key}": torch.from_numpy(array) for key, array in arrays.items()}, file, {"format": "pt"})


def _copy_others(source: Path, target: Path) -> None:
    for path in sorted(source.iterdir()):
        if path.is_file() and path.suffix != ".safetensors" and path.name not in ("config.json", INDEX):
            shutil.copyfile(path, target / path.name)
