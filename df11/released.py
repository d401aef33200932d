"""The encoder of the released package `dfloat11`, where it is installed: judge of compatibility and baseline of Table 5.

The package itself cannot be imported without a GPU and CuPy, so its encoder module is loaded by its path.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from df11.formats.dfloat11 import BLOCK_CHUNKS, CHUNK_BYTES, DFloat11Unit
from df11.huffman import Code

VERSION = "0.5.0"


def is_installed() -> bool:
    return importlib.util.find_spec("dfloat11") is not None


def _encoder() -> ModuleType:
    package = importlib.util.find_spec("dfloat11")
    if package is None or not package.submodule_search_locations:
        raise ModuleNotFoundError(f"the released package is not installed: pip install dfloat11=={VERSION}")
    path = Path(package.submodule_search_locations[0]) / "dfloat11_utils.py"
    spec = importlib.util.spec_from_file_location("dfloat11_utils", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def encode(tensors: Sequence[torch.Tensor]) -> tuple[DFloat11Unit, Code]:
    """What the released package makes of bf16 tensors as one unit, and its code with the end-of-file symbol as padding."""
    encoder = _encoder()
    flat = [t.flatten() for t in tensors]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # it prints its tables
        _, counter = encoder.get_codec(torch.cat(flat))
        codec, _, table = encoder.get_32bit_codec(counter)
        luts = encoder.get_luts(table)
        encoded, sign_mantissa, positions, gaps, _ = encoder.encode_weights(flat, codec, CHUNK_BYTES, BLOCK_CHUNKS)
    unit = DFloat11Unit(
        shapes=tuple(tuple(t.shape) for t in tensors),
        encoded_exponent=encoded.numpy(),
        sign_mantissa=sign_mantissa.numpy(),
        luts=luts.numpy(),
        gaps=gaps.numpy(),
        output_positions=positions.numpy(),
    )
    lengths, codes, padding = np.zeros(256, np.uint8), np.zeros(256, np.uint32), (0, 0)
    for symbol, (length, word) in table.items():
        if isinstance(symbol, int):
            lengths[symbol], codes[symbol] = length, word
        else:
            padding = (length, word)
    return unit, Code(lengths, codes, padding)
