"""torch operators over compressed units, and the unit as tensors on one device.

    torch.ops.df11.decompress(encoded_exponent, sign_mantissa, luts, gaps, output_positions, table, out, decoder="fast")
    torch.ops.df11.decode(encoded_exponent, sign_mantissa, luts, gaps, output_positions, table, sizes, weights, first, last) -> bf16

`decompress` takes lists, an element a unit of the published layout, and writes the bf16 weights of each to its `out`; on a GPU by
the kernels (df11/gpu.py, where dtypes, shapes and alignments stand), on the CPU by the format's decoder, which needs no table.
Nothing is allocated on the device: `out` and the tables come from the caller. `decode` returns a new tensor, as compilers want it;
its arrays hold several units one after another (`split`), of which it decodes those from `first` to before `last`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from df11 import bits, gpu
from df11.dispatch import linear as linear  # the product with a matrix in the tiled layout
from df11.formats import dfloat11
from df11.formats.dfloat11 import DFloat11, DFloat11Unit, raw_unit
from df11.formats.luts import FIRST_POINTER, choose_code
from df11.gpu import STREAM_ALIGNMENT
from df11.huffman import Code

torch.library.define(
    "df11::decompress",
    "(Tensor[] encoded_exponent, Tensor[] sign_mantissa, Tensor[] luts, Tensor[] gaps, Tensor[] output_positions, Tensor[] table,"
    ' Tensor(a!)[] out, str decoder="fast") -> ()',
)
# The CUDA implementation is in df11/gpu.py with its arguments in the same order.
torch.library.impl("df11::decompress", "CUDA")(gpu.decompress)


@torch.library.register_fake("df11::decompress")
def _decompress_fake(*given: object) -> None:
    return None


@torch.library.impl("df11::decompress", "CPU")
def _decompress_cpu(
    encoded_exponent: Sequence[torch.Tensor],
    sign_mantissa: Sequence[torch.Tensor],
    luts: Sequence[torch.Tensor],
    gaps: Sequence[torch.Tensor],
    output_positions: Sequence[torch.Tensor],
    table: Sequence[torch.Tensor],
    out: Sequence[torch.Tensor],
    decoder: str = "fast",
) -> None:
    given = (encoded_exponent, sign_mantissa, luts, gaps, output_positions, table)
    for *arrays, to in zip(*given, out, strict=True):
        if to.dtype != torch.bfloat16 or not to.is_contiguous():
            raise ValueError(f"out must be contiguous bfloat16, it is {to.dtype} with strides {to.stride()}")
        unit = CompressedUnit((tuple(to.shape),), *arrays).to_unit()
        flat, at = to.view(-1), 0
        for piece in DFloat11().stream(unit):
            flat[at : at + piece.numel()] = piece
            at += piece.numel()


ARRAYS = (*dfloat11.ARRAYS, "table")  # as the operators take them

torch.library.define(
    "df11::decode",
    "(Tensor encoded_exponent, Tensor sign_mantissa, Tensor luts, Tensor gaps, Tensor output_positions, Tensor table,"
    " SymInt[] sizes, SymInt weights, SymInt first, SymInt last, Tensor? after=None) -> Tensor",
)


def split(arrays: Sequence[torch.Tensor], sizes: Sequence[int], weights: int) -> list[tuple[torch.Tensor, ...]]:
    """The arrays (ARRAYS) of each of several units that lie one after another, as views. They share luts and table.

    sizes: bytes of each one's stream, which begins at the next multiple of 16; weights: how many each has, a multiple of 8 where
    there are several.
    """
    stream, sign_mantissa, luts, gaps, positions, table = arrays
    if len(sizes) == 1:
        return [tuple(arrays)]
    found: list[tuple[torch.Tensor, ...]] = []
    at, block = 0, 0
    for i, size in enumerate(sizes):
        blocks = -(-size // dfloat11.BLOCK_BYTES)
        own = sign_mantissa[i * weights : (i + 1) * weights]
        own_gaps = gaps[block * dfloat11.GAP_BYTES : (block + blocks) * dfloat11.GAP_BYTES]
        own_positions = positions[block + i : block + blocks + i + 1]
        found.append((stream[at : at + size], own, luts, own_gaps, own_positions, table))
        at, block = at + -(-size // STREAM_ALIGNMENT) * STREAM_ALIGNMENT, block + blocks
    return found


def _decode(
    encoded_exponent: torch.Tensor,
    sign_mantissa: torch.Tensor,
    luts: torch.Tensor,
    gaps: torch.Tensor,
    output_positions: torch.Tensor,
    table: torch.Tensor,
    sizes: Sequence[int],
    weights: int,
    first: int,
    last: int,
    after: torch.Tensor | None = None,
) -> torch.Tensor:
    arrays = (encoded_exponent, sign_mantissa, luts, gaps, output_positions, table)
    out = encoded_exponent.new_empty((last - first) * weights, dtype=torch.bfloat16)
    some = split(arrays, sizes, weights)[first:last]
    if some:
        outs = [out[i * weights : (i + 1) * weights] for i in range(len(some))]
        torch.ops.df11.decompress(*(list(each) for each in zip(*some, strict=True)), outs)
    return out


torch.library.impl("df11::decode", "CPU")(_decode)
torch.library.impl("df11::decode", "CUDA")(_decode)


@torch.library.register_fake("df11::decode")
def _decode_fake(encoded_exponent: torch.Tensor, *arrays: object) -> torch.Tensor:
    weights, first, last = arrays[6:9]
    return encoded_exponent.new_empty((last - first) * weights, dtype=torch.bfloat16)  # type: ignore[operator]


@dataclass(frozen=True)
class CompressedUnit:
    """A unit of the published layout as tensors on one device, ready to decompress. Raw units have `raw` and nothing else."""

    shapes: tuple[tuple[int, ...], ...]
    encoded_exponent: torch.Tensor
    sign_mantissa: torch.Tensor
    luts: torch.Tensor
    gaps: torch.Tensor
    output_positions: torch.Tensor  # int32, the bits of uint32
    table: torch.Tensor  # of gpu.build_table; empty on the CPU
    raw: torch.Tensor | None = None  # bf16[n]
    checksum: str = ""

    @classmethod
    def make(
        cls, shapes: tuple[tuple[int, ...], ...], arrays: dict[str, torch.Tensor], device: torch.device | str, checksum: str = ""
    ) -> CompressedUnit:
        """From the layout's arrays by name, moved to the device."""
        empty = torch.empty(0, dtype=torch.uint8, device=device)
        if "raw" in arrays:
            raw = arrays["raw"].to(device)
            return cls(shapes, empty, empty, empty, empty, empty.int(), empty.int(), raw, checksum)
        moved = {name: arrays[name].to(device) for name in dfloat11.ARRAYS}
        table = gpu.build_table(moved["luts"]) if moved["luts"].is_cuda else empty.int()
        return cls(shapes, **moved, table=table, checksum=checksum)

    @classmethod
    def from_unit(cls, unit: DFloat11Unit, device: torch.device | str) -> CompressedUnit:
        """A checked unit, moved to a device. Raises FormatError, or ValueError where it holds 2^32 weights or more."""
        DFloat11(threads=1).check(unit)
        if unit.raw is not None:
            return cls.make(unit.shapes, {"raw": bits.from_bits(unit.raw, (unit.raw.size,))}, device, unit.checksum)
        if unit.output_positions.dtype != "uint32":
            raise ValueError(f"{unit.numel} weights in one unit: the operators take fewer than 2^32; split the unit")
        arrays = {name: torch.from_numpy(array) for name, array in unit.arrays.items() if name != "output_positions"}
        arrays["output_positions"] = torch.from_numpy(unit.output_positions.view("int32"))
        return cls.make(unit.shapes, arrays, device, unit.checksum)

    def to_unit(self) -> DFloat11Unit:
        """The unit in host memory."""
        if self.raw is not None:
            return raw_unit(self.shapes, bits.to_bits(self.raw.cpu()), self.checksum)
        arrays = {name: getattr(self, name).cpu().numpy() for name in dfloat11.ARRAYS}
        arrays["output_positions"] = arrays["output_positions"].view("uint32")
        return DFloat11Unit(self.shapes, **arrays, checksum=self.checksum)

    @property
    def numel(self) -> int:
        return sum(torch.Size(s).numel() for s in self.shapes)

    @property
    def device(self) -> torch.device:
        return (self.encoded_exponent if self.raw is None else self.raw).device

    @property
    def nbytes(self) -> int:
        """Bytes on the device that storing the unit takes: the table, which `fast` needs, included."""
        arrays: list[torch.Tensor] = [getattr(self, name) for name in ARRAYS]
        return sum(array.nbytes for array in arrays) + (self.raw.nbytes if self.raw is not None else 0)

    def decompress(self, out: torch.Tensor, kernel: str = "fast") -> torch.Tensor:
        """All weights into `out`, bf16[numel], as `decompress` does. Returns `out`."""
        decompress([self], [out], kernel)
        return out


def decompress(units: Sequence[CompressedUnit], out: Sequence[torch.Tensor], kernel: str = "fast") -> None:
    """All weights of units of one device into bf16[numel] each, on torch's current stream; nothing is allocated."""
    coded = []
    for unit, to in zip(units, out, strict=True):
        if unit.raw is None:
            coded.append((unit, to))
        else:
            to.copy_(unit.raw.view(to.shape))
    if coded:
        given = ([getattr(unit, name) for unit, _ in coded] for name in ARRAYS)
        torch.ops.df11.decompress(*given, [to for _, to in coded], kernel)


def encode(tensors: Sequence[torch.Tensor], code: Code | None = None) -> CompressedUnit:
    """Compress bf16 tensors of one device as one unit, where they are; byte for byte the same on CPU and GPU.

    `code` overrides the optimal one.
    """
    shapes = tuple(tuple(t.shape) for t in tensors)
    device = tensors[0].device if tensors else torch.device("cpu")
    if device.type != "cuda" or not sum(t.numel() for t in tensors):
        return CompressedUnit.from_unit(DFloat11().encode_tensors([t.cpu() for t in tensors], code), device)
    flat = tensors[0].reshape(-1) if len(tensors) == 1 else torch.cat([t.reshape(-1) for t in tensors])
    return CompressedUnit.make(shapes, gpu.encode(flat, code)[0], device)


def encode_parts(weights: torch.Tensor, parts: int) -> tuple[dict[str, torch.Tensor], list[int]]:
    """Compress bf16[n] where it is, as several units of as many weights each, all with one code. Returns arrays as `split` takes
    them apart, without the table, and the bytes of each stream; {"raw": weights} where a weight has no code."""
    if weights.is_cuda:
        return gpu.encode(weights, parts=parts)
    patterns = [bits.to_bits(part) for part in weights.chunk(parts)]
    histogram = np.sum([bits.histogram(part) for part in patterns], 0)
    if histogram[FIRST_POINTER:].any():
        return {"raw": weights}, []
    code = choose_code(histogram)
    units = [CompressedUnit.from_unit(DFloat11().encode_tensors([part], code), "cpu") for part in weights.chunk(parts)]
    sizes = [unit.encoded_exponent.numel() for unit in units]
    streams = [unit.encoded_exponent for unit in units]
    if parts > 1:
        streams = [torch.nn.functional.pad(stream, (0, -stream.numel() % STREAM_ALIGNMENT)) for stream in streams]
    joined = {name: torch.cat([getattr(unit, name) for unit in units]) for name in ("sign_mantissa", "gaps", "output_positions")}
    return {"encoded_exponent": torch.cat(streams), **joined, "luts": units[0].luts}, sizes
