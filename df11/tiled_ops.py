"""torch operators over one matrix in the tiled layout, and the matrix as tensors on one device.

    torch.ops.df11.tiled_linear(x, arrays, uppers, rows, columns, bias, wgmma=True) -> y
    torch.ops.df11.linear(x, arrays, uppers, rows, columns, bias) -> y, the fastest way
    torch.ops.df11.tiled_decode(arrays, uppers, rows, columns, after=None) -> W
    torch.ops.df11.tiled_rows(ids, arrays, uppers, rows, columns) -> W[ids]

The arrays are ARRAYS of docs/format.md, uint32 as int32; `uppers` are the eight bytes as one integer, the first lowest. On a GPU by
the kernels (df11/tiled_gpu.py), on the CPU by the format's decoder. `after` orders tiled_decode behind a tensor in a traced graph.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch

from df11 import memory, tiled_gpu
from df11.formats.tiled import Tiled, TiledMatrix, TiledUnit
from df11.formats.tiled_code import TiledCode, make_code
from df11.formats.tiled_encoder import encode, histogram

ARRAYS = tuple(tiled_gpu.RULES)
TILE_ROWS = tiled_gpu.TILE_ROWS
_MATRIX = "Tensor[] arrays, int uppers"
_LINEAR = f"(Tensor x, {_MATRIX}, int rows, int columns, Tensor? bias=None%s) -> Tensor"

torch.library.define("df11::tiled_linear", _LINEAR % ", bool wgmma=True")
torch.library.define("df11::linear", _LINEAR % "")  # computed by df11/dispatch.py
torch.library.define("df11::tiled_decode", f"({_MATRIX}, int rows, int columns, Tensor? after=None) -> Tensor")
torch.library.define("df11::tiled_rows", f"(Tensor ids, {_MATRIX}, int rows, int columns) -> Tensor")
torch.library.impl("df11::tiled_linear", "CUDA")(tiled_gpu.linear)


@torch.library.register_fake("df11::linear")
@torch.library.register_fake("df11::tiled_linear")
def _linear_fake(
    x: torch.Tensor,
    arrays: Sequence[torch.Tensor],
    uppers: int,
    rows: int,
    columns: int,
    bias: torch.Tensor | None = None,
    wgmma: bool = True,
) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], rows)


@torch.library.register_fake("df11::tiled_decode")
def _decode_fake(
    arrays: Sequence[torch.Tensor], uppers: int, rows: int, columns: int, after: torch.Tensor | None = None
) -> torch.Tensor:
    return arrays[0].new_empty(rows, columns, dtype=torch.bfloat16)


@torch.library.register_fake("df11::tiled_rows")
def _rows_fake(ids: torch.Tensor, arrays: Sequence[torch.Tensor], uppers: int, rows: int, columns: int) -> torch.Tensor:
    return ids.new_empty(*ids.shape, columns, dtype=torch.bfloat16)


@torch.library.impl("df11::tiled_linear", "CPU")
def _linear_cpu(
    x: torch.Tensor,
    arrays: Sequence[torch.Tensor],
    uppers: int,
    rows: int,
    columns: int,
    bias: torch.Tensor | None = None,
    wgmma: bool = True,
) -> torch.Tensor:
    weights = _decoded(TiledWeight.of(arrays, uppers, rows, columns)).float()
    return torch.nn.functional.linear(x.float(), weights, None if bias is None else bias.float()).to(torch.bfloat16)


@torch.library.impl("df11::tiled_decode", "CompositeExplicitAutograd")
def _decode(
    arrays: Sequence[torch.Tensor], uppers: int, rows: int, columns: int, after: torch.Tensor | None = None
) -> torch.Tensor:
    return TiledWeight.of(arrays, uppers, rows, columns).decompress()


@torch.library.impl("df11::tiled_rows", "CompositeExplicitAutograd")
def _rows(ids: torch.Tensor, arrays: Sequence[torch.Tensor], uppers: int, rows: int, columns: int) -> torch.Tensor:
    return TiledWeight.of(arrays, uppers, rows, columns).rows(ids)


def _decoded(weight: TiledWeight) -> torch.Tensor:
    (weights,) = Tiled(threads=1).decode(weight.to_unit())
    return weights


@dataclass(frozen=True)
class TiledWeight:
    """A matrix [rows, columns] in the tiled layout as tensors on one device. Shapes: docs/format.md; int32 are bits of uint32.

    Its arrays stay where they are: a product is launched with addresses that were read once.
    """

    shape: tuple[int, int]
    low: torch.Tensor
    sign: torch.Tensor
    stream: torch.Tensor
    tiles: torch.Tensor
    patches: torch.Tensor
    table: torch.Tensor
    uppers: int

    @classmethod
    def of(cls, arrays: Sequence[torch.Tensor], uppers: int, rows: int, columns: int) -> TiledWeight:
        """As the operators take it."""
        return cls((rows, columns), **dict(zip(ARRAYS, arrays, strict=True)), uppers=uppers)

    @classmethod
    def encode(cls, weights: torch.Tensor) -> TiledWeight | None:
        """Compress a bf16 matrix where it is, with a code of its own. None where it would not get smaller, the table included.

        ValueError where it is no bf16 matrix.
        """
        if weights.dtype != torch.bfloat16 or weights.dim() != 2:
            raise ValueError(f"weights: {weights.dtype}{list(weights.shape)}, needed torch.bfloat16 [rows, columns]")
        code = make_code(histogram(weights))
        arrays = encode(weights, code)
        if arrays is None:
            return None
        table = torch.from_numpy(code.table.view(np.int32)).to(weights.device)
        rows, columns = weights.shape
        weight = cls((rows, columns), **arrays, table=table, uppers=int(code.uppers.view(np.int64)[0]))
        return weight if weight.nbytes < weights.nbytes else None

    def __getstate__(self) -> dict[str, Any]:
        """Without `packed`: copies have other addresses. With arrays of their own, as torch.save wants several dtypes."""
        kept = {field.name: getattr(self, field.name) for field in fields(self)}
        return kept | {name: kept[name].clone() for name in ARRAYS}

    @property
    def arrays(self) -> list[torch.Tensor]:
        return [getattr(self, name) for name in ARRAYS]

    @functools.cached_property
    def packed(self) -> tiled_gpu.Packed:
        """As it goes with each launch. ValueError where the arrays do not fit together."""
        return tiled_gpu.pack(self.low.get_device(), self.arrays, self.uppers, *self.shape)

    def joined(self) -> TiledWeight:
        """The same in one allocation."""
        *places, size = memory.places(self.arrays)
        piece = torch.empty(size, dtype=torch.uint8, device=self.low.device)
        moved = [memory.view(piece, at, array).copy_(array) for at, array in zip(places, self.arrays, strict=True)]
        return TiledWeight(self.shape, **dict(zip(ARRAYS, moved, strict=True)), uppers=self.uppers)

    @functools.cached_property
    def index(self) -> int:
        """Of the GPU, -1 on the CPU."""
        return self.low.get_device()

    @property
    def fragments(self) -> int:
        """Of 16 columns in a tile."""
        return 2 * self.low.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes on the device, the table included; the eight bytes of `uppers` go with each launch."""
        return sum(array.nbytes for array in self.arrays)

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None = None, wgmma: bool = True) -> torch.Tensor:
        """x W^T + bias of up to `tiled_gpu.most_rows` rows, bf16 [..., columns], W never in memory; sums in float32.

        wgmma: more than 8 rows by wgmma where the GPU has it, otherwise by mma.sync.
        """
        if x.is_cuda:  # a call of an operator takes the host as long as all the rest
            return tiled_gpu.product(x, self.packed, bias, wgmma)
        y: torch.Tensor = torch.ops.df11.tiled_linear(x, self.arrays, self.uppers, *self.shape, bias, wgmma)
        return y

    def decompress(self, out: torch.Tensor | None = None) -> torch.Tensor:
        """The weights, bf16 [rows, columns], into `out` where given."""
        if out is None:
            out = torch.empty(self.shape, dtype=torch.bfloat16, device=self.low.device)
        if out.is_cuda:
            tiled_gpu.decompress(self.packed, out)
        else:
            out.copy_(_decoded(self))
        return out

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """W[ids], bf16 [..., columns]. ids: int64 on the device."""
        return tiled_gpu.gather(ids, self.packed) if ids.is_cuda else _decoded(self)[ids]

    def part(self, start: int, stop: int) -> TiledWeight:
        """Rows [start, stop) of the same arrays. start: a multiple of 16; stop: another, or the end."""
        across = self.low.shape[0] // -(-self.shape[0] // TILE_ROWS)
        first, last = start // TILE_ROWS * across, -(-stop // TILE_ROWS) * across
        shape, tiles = (stop - start, self.shape[1]), self.tiles[first : last + 1]
        return replace(self, shape=shape, low=self.low[first:last], sign=self.sign[first:last], tiles=tiles)

    def to_unit(self) -> TiledUnit:
        """The matrix in host memory."""

        def host(array: torch.Tensor) -> np.ndarray:
            found: np.ndarray = array.cpu().numpy()
            return found.view(np.uint32) if array.dtype == torch.int32 else found

        code = TiledCode(host(self.table), np.array([self.uppers], np.int64).view(np.uint8))
        arrays = {name: host(getattr(self, name)) for name in ARRAYS if name != "table"}
        (byte, patch), (last_byte, last_patch) = arrays["tiles"][[0, -1]].tolist()  # of a part not from the first on
        arrays["stream"], arrays["patches"] = arrays["stream"][byte:last_byte], arrays["patches"][patch:last_patch]
        arrays["tiles"] = arrays["tiles"] - arrays["tiles"][0]
        return TiledUnit(code, (TiledMatrix(self.shape, self.fragments, **arrays),))
