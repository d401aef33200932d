"""One compressed unit as the bytes of a safetensors file, with version, shapes and checksums in its metadata."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
import xxhash

from df11.formats import FormatError, expect
from df11.formats.dfloat11 import ARRAYS, DFloat11, DFloat11Unit, raw_unit

VERSION = 1


def pack(unit: DFloat11Unit) -> bytes:
    """The same unit always gives the same bytes."""
    # split_positions is an index for the released loader; the shapes say the same.
    arrays = {k: v for k, v in unit.arrays.items() if k != "split_positions"}
    header = {"format": "dfloat11", "version": VERSION, "shapes": unit.shapes, "checksum": unit.checksum}
    header["stored"] = _checksum(arrays, header)
    # One key: safetensors writes several in no fixed order.
    return safetensors.numpy.save(arrays, {"df11": json.dumps(header)})


def unpack(data: bytes) -> DFloat11Unit:
    """Inverse of `pack`. Any altered or missing byte raises FormatError."""
    try:
        length = int.from_bytes(data[:8], "little")
        header = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["df11"])
        arrays = safetensors.numpy.load(data)
        shapes = tuple(tuple(shape) for shape in header["shapes"])
        stored, checksum = header.pop("stored"), header["checksum"]
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FormatError(f"not a packed DFloat11 unit: {error}") from error
    sizes = [d for shape in shapes for d in shape]
    expect(all(type(d) is int and 0 <= d < 1 << 63 for d in sizes), "shapes: a size is not a number from 0 to 2^63")
    expect(all(len(shape) <= 8 and math.prod(d for d in shape if d) < 1 << 63 for shape in shapes), "shapes: too large")
    expect(isinstance(checksum, str), "checksum: not a text")
    expect(header.get("format") == "dfloat11", f"format {header.get('format')!r} is not dfloat11")
    expect(header.get("version") == VERSION, f"container version {header.get('version')!r} is not known")
    expect(stored == _checksum(arrays, header), "the stored checksum does not match: the container was altered")
    names = {"raw"} if "raw" in arrays else set(ARRAYS)
    expect(set(arrays) == names, f"expected the arrays {sorted(names)}, found {sorted(arrays)}")
    if "raw" in arrays:
        unit = raw_unit(shapes, arrays["raw"], checksum)
    else:
        unit = DFloat11Unit(shapes=shapes, checksum=checksum, **arrays)
    DFloat11(threads=1).check(unit)
    return unit


def _checksum(arrays: dict[str, np.ndarray], header: dict[str, Any]) -> str:
    digest = xxhash.xxh3_128(json.dumps(header, sort_keys=True).encode())
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode())
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()
