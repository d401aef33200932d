"""One compressed unit as the bytes of a safetensors file, with version, shapes and checksums in its metadata."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
import xxhash

from df11.formats import FormatError, expect
from df11.formats.dfloat11 import ARRAYS, DFloat11, DFloat11Unit, raw_unit
from df11.formats.tiled import MATRIX_ARRAYS, Tiled, TiledMatrix, TiledUnit, raw_matrix
from df11.formats.tiled_code import TiledCode

VERSION = 1

Unit = DFloat11Unit | TiledUnit
Arrays = dict[str, np.ndarray]


def pack(unit: Unit) -> bytes:
    """The same unit always gives the same bytes."""
    header: dict[str, Any] = {"version": VERSION, "checksum": unit.checksum}
    if isinstance(unit, TiledUnit):
        arrays = {"table": unit.code.table, "uppers": unit.code.uppers}
        arrays |= {f"{i}.{name}": array for i, matrix in enumerate(unit.matrices) for name, array in matrix.arrays.items()}
        fragments = [matrix.fragments for matrix in unit.matrices]
        header |= {"format": "tiled", "shapes": [matrix.shape for matrix in unit.matrices], "fragments": fragments}
    else:
        # split_positions is an index for the released loader; the shapes say the same.
        arrays = {k: v for k, v in unit.arrays.items() if k != "split_positions"}
        header |= {"format": "dfloat11", "shapes": unit.shapes}
    header["stored"] = _checksum(arrays, header)
    # One key: safetensors writes several in no fixed order.
    return safetensors.numpy.save(arrays, {"df11": json.dumps(header)})


def unpack(data: bytes) -> Unit:
    """Inverse of `pack`. Any altered or missing byte raises FormatError."""
    try:
        length = int.from_bytes(data[:8], "little")
        header = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["df11"])
        arrays = safetensors.numpy.load(data)
        shapes = tuple(tuple(shape) for shape in header["shapes"])
        stored, checksum = header.pop("stored"), header["checksum"]
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FormatError(f"not a packed unit: {error}") from error
    sizes = [d for shape in shapes for d in shape]
    expect(all(type(d) is int and 0 <= d < 1 << 63 for d in sizes), "shapes: a size is not a number from 0 to 2^63")
    expect(all(len(shape) <= 8 and math.prod(d for d in shape if d) < 1 << 63 for shape in shapes), "shapes: too large")
    expect(isinstance(checksum, str), "checksum: not a text")
    expect(header.get("format") in FORMATS, f"format {header.get('format')!r} is none of {', '.join(FORMATS)}")
    expect(header.get("version") == VERSION, f"container version {header.get('version')!r} is not known")
    expect(stored == _checksum(arrays, header), "the stored checksum does not match: the container was altered")
    return FORMATS[header["format"]](arrays, shapes, header)


def _dfloat11(arrays: Arrays, shapes: tuple[tuple[int, ...], ...], header: dict[str, Any]) -> DFloat11Unit:
    names = {"raw"} if "raw" in arrays else set(ARRAYS)
    expect(set(arrays) == names, f"expected the arrays {sorted(names)}, found {sorted(arrays)}")
    if "raw" in arrays:
        unit = raw_unit(shapes, arrays["raw"], header["checksum"])
    else:
        unit = DFloat11Unit(shapes=shapes, checksum=header["checksum"], **arrays)
    DFloat11(threads=1).check(unit)
    return unit


def _tiled(arrays: Arrays, shapes: tuple[tuple[int, ...], ...], header: dict[str, Any]) -> TiledUnit:
    fragments: Any = header.get("fragments")
    good = isinstance(fragments, list) and len(fragments) == len(shapes) and all(type(f) is int for f in fragments)
    expect(good, "fragments: not a number for each shape")
    names = {f"{i}.{name}" for i, f in enumerate(fragments) for name in (MATRIX_ARRAYS if f else ("raw",))} | {"table", "uppers"}
    expect(set(arrays) == names, f"expected the arrays {sorted(names)}, found {sorted(arrays)}")
    matrices = []
    for i, (shape, f) in enumerate(zip(shapes, fragments, strict=True)):
        own = {name: arrays[f"{i}.{name}"] for name in MATRIX_ARRAYS} if f else {}
        matrices.append(TiledMatrix(shape, f, **own) if f else raw_matrix(shape, arrays[f"{i}.raw"]))
    unit = TiledUnit(TiledCode(arrays["table"], arrays["uppers"]), tuple(matrices), header["checksum"])
    Tiled(threads=1).check(unit)
    return unit


FORMATS: dict[str, Callable[..., Unit]] = {"dfloat11": _dfloat11, "tiled": _tiled}


def _checksum(arrays: Arrays, header: dict[str, Any]) -> str:
    digest = xxhash.xxh3_128(json.dumps(header, sort_keys=True).encode())
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode())
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()
