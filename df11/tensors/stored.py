"""What is stored of a tensor: the arrays that it shares with its views, as storages are shared."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import Any

import torch

from df11 import ops
from df11.gpu import build_table
from df11.ops import CompressedUnit

SMALLEST_SIDE = 16  # of a matrix in a stack: what is smaller, such as a convolution's kernels, is no matrix of its own


class Held:
    """Decompressed weights that somebody lends, bf16 of the stored shape: to one thread and, on a GPU, one stream."""

    __slots__ = ("_index", "_stream", "_thread", "weights")

    def __init__(self, weights: torch.Tensor) -> None:
        """Lent to the current thread on its current stream."""
        self.weights = weights
        self._thread, self._index = threading.get_ident(), weights.get_device()
        self._stream = self._current()

    def is_for_caller(self) -> bool:
        return self._thread == threading.get_ident() and (self._index < 0 or self._stream == self._current())

    def _current(self) -> int:
        found: int = torch._C._cuda_getCurrentRawStream(self._index) if self._index >= 0 else 0
        return found


class Stored:
    """The weights of one tensor in the published layout, or, where they have no code (Inf, NaN, 2^113 and more) or are only kept
    elsewhere, as they are.

    `arrays`: ARRAYS of `ops` on one device (without a table, one is made), or {"raw": bf16[numel]}. `shape`: the tensor's, as it
    lies in memory. Experts, or whatever else is a stack of matrices, are units of their own with one code: `sizes` are the bytes of
    each one's stream, () of raw weights. A write replaces the arrays.
    """

    def __init__(self, arrays: dict[str, torch.Tensor], sizes: Sequence[int], shape: Sequence[int]) -> None:
        self.arrays = arrays if {"raw", "table"} & arrays.keys() else _with_table(arrays)
        self.sizes, self.shape = tuple(sizes), tuple(shape)
        self.numel = math.prod(shape)
        self.held: Held | None = None
        self._units: list[CompressedUnit] = []

    @classmethod
    def of(cls, units: Sequence[CompressedUnit], shape: Sequence[int]) -> Stored:
        """Of units with one code and as many weights each; they are not copied where there is one."""
        if units[0].raw is not None:
            return cls({"raw": units[0].raw}, (), shape)
        return cls(ops.join(units), [unit.encoded_exponent.numel() for unit in units], shape)

    @classmethod
    def encode(cls, weights: torch.Tensor, shape: Sequence[int]) -> Stored:
        """Compress bf16[numel] where it is; a stack (`is_stack`) as a unit a matrix."""
        if not weights.numel():
            return cls({"raw": weights}, (), shape)
        return cls.of(ops.encode_each(weights.chunk(shape[0] if is_stack(shape) else 1)), shape)

    def __getstate__(self) -> dict[str, Any]:
        """For pickles: without what is derived or lent, and with arrays of their own."""
        arrays = {
            name: array.clone() if array.untyped_storage().nbytes() > array.nbytes else array
            for name, array in self.arrays.items()
            if name != "table"
        }
        return {"arrays": arrays, "sizes": self.sizes, "shape": self.shape}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["arrays"], state["sizes"], state["shape"])  # type: ignore[misc]

    def __deepcopy__(self, memo: dict[int, Any]) -> Stored:
        copied = memo[id(self)] = self.mapped(torch.clone)
        return copied

    @property
    def raw(self) -> torch.Tensor | None:
        return self.arrays.get("raw")

    @property
    def device(self) -> torch.device:
        """Where the arrays are."""
        return next(iter(self.arrays.values())).device

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays, the decode table included."""
        return sum(array.nbytes for array in self.arrays.values())

    @property
    def is_traced(self) -> bool:
        """Whether a compiler looks at the arrays, which then hold no bits."""
        return type(next(iter(self.arrays.values()))) is not torch.Tensor

    def mapped(self, work: Any) -> Stored:
        """The same of arrays that `work` makes of each of these."""
        return Stored({name: work(array) for name, array in self.arrays.items()}, self.sizes, self.shape)

    def to(self, device: torch.device, non_blocking: bool = False) -> Stored:
        """A copy on a device."""
        moved = ((name, array) for name, array in self.arrays.items() if name != "table")
        arrays = {name: array.to(device, non_blocking=non_blocking, copy=True) for name, array in moved}
        return Stored(arrays, self.sizes, self.shape)

    def units(self) -> list[CompressedUnit]:
        """As units, none of them copied."""
        if not self._units:
            self._units = self.units_of(self.arrays)
        return self._units

    def units_of(self, arrays: dict[str, torch.Tensor]) -> list[CompressedUnit]:
        """As units of arrays that hold the same somewhere else."""
        if "raw" in arrays:
            return [CompressedUnit.make(((self.numel,),), {"raw": arrays["raw"]}, arrays["raw"].device)]
        arrays = arrays if "table" in arrays else _with_table(arrays)
        weights = self.numel // len(self.sizes)
        each = ops.split([arrays[name] for name in ops.ARRAYS], self.sizes, weights)
        return [CompressedUnit(((weights,),), **dict(zip(ops.ARRAYS, own, strict=True))) for own in each]  # type: ignore[arg-type]

    def decode(self, start: int, stop: int, device: torch.device, after: torch.Tensor | None = None) -> tuple[torch.Tensor, int]:
        """The weights of the units that have those from `start` to before `stop`, in memory of their own unless they are stored
        raw; and how many weights lie before them.

        after: orders this behind the tensor in a traced graph.
        """
        if self.device != device:
            return self.to(device).decode(start, stop, device)
        if (raw := self.raw) is not None:
            return raw, 0
        weights = self.numel // len(self.sizes)
        first, last = start // weights, -(-stop // weights)
        if self.is_traced or torch._C._get_tracing_state():
            arrays = [self.arrays[name] for name in ops.ARRAYS]
            return torch.ops.df11.decode(*arrays, self.sizes, weights, first, last, after), first * weights
        out = torch.empty((last - first) * weights, dtype=torch.bfloat16, device=device)
        self.decode_into(out, first, last)
        return out, first * weights

    def decode_into(self, out: torch.Tensor, first: int = 0, last: int | None = None, kernel: str = "fast") -> None:
        """The weights of some units into bf16[that many]."""
        some = self.units()[first:last]
        ops.decompress(some, out.chunk(len(some)), kernel)

    def write(self, weights: torch.Tensor) -> None:
        """Store other weights, bf16[numel], where the arrays are."""
        self.assign(Stored.encode(weights.to(self.device), self.shape))

    def assign(self, other: Stored) -> None:
        """Store what another does. Its arrays are taken, not copied."""
        self.arrays, self.sizes, self._units, self.held = other.arrays, other.sizes, [], None


def is_stack(shape: Sequence[int]) -> bool:
    """Whether a tensor is a stack of matrices, `[experts, out, in]`, each of which can be decompressed by itself."""
    return len(shape) == 3 and shape[0] > 1 and min(shape[1:]) >= SMALLEST_SIDE and shape[1] * shape[2] % 8 == 0


def _with_table(arrays: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    luts = arrays["luts"]
    table = build_table(luts) if luts.is_cuda else torch.empty(0, dtype=torch.int32, device=luts.device)
    return {**arrays, "table": table}
