"""Encoder and GPU decoder of the released package `dfloat11`, where it is installed: judge of compatibility, baseline of speed.

The package itself cannot be imported without a GPU and CuPy, so its encoder module and its PTX are loaded by their paths.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from df11.formats.dfloat11 import BLOCK_BYTES, BLOCK_CHUNKS, CHUNK_BYTES, DFloat11Unit
from df11.gpu import device
from df11.huffman import Code
from df11.ops import CompressedUnit

VERSION = "0.5.0"  # of the package whose layout is read and written here and in released_checkpoint.py


def is_installed() -> bool:
    return importlib.util.find_spec("dfloat11") is not None


def _folder() -> Path:
    package = importlib.util.find_spec("dfloat11")
    if package is None or not package.submodule_search_locations:
        raise ModuleNotFoundError(f"the released package is not installed: pip install dfloat11=={VERSION}")
    return Path(package.submodule_search_locations[0])


def _encoder() -> ModuleType:
    spec = importlib.util.spec_from_file_location("dfloat11_utils", _folder() / "dfloat11_utils.py")
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


def decoder(unit: CompressedUnit) -> Callable[[torch.Tensor], None]:
    """What launches the released kernel to decode a unit on a GPU into a bf16[numel], on torch's current stream."""
    assert unit.raw is None and unit.luts.is_cuda
    gpu = device(unit.luts.device.index)
    most = int(unit.output_positions.diff().max())
    shared = 4 * BLOCK_CHUNKS + 4 + 2 * most  # as the package computes it
    kernel = gpu.foreign_kernel(_folder() / "decode.ptx", "decode", "PPPPPPiii", BLOCK_CHUNKS, shared)
    gaps = torch.cat([unit.gaps, unit.gaps.new_zeros(1)])  # it reads one byte past the end
    arrays = (unit.luts, unit.encoded_exponent, unit.sign_mantissa, unit.output_positions, gaps)
    size = unit.encoded_exponent.numel()
    blocks = -(-size // BLOCK_BYTES)

    def decode(out: torch.Tensor) -> None:
        addresses = [array.data_ptr() for array in (*arrays, out)]
        gpu.launch(kernel, blocks, *addresses, unit.luts.shape[0], size, out.numel())

    return decode
