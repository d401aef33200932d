"""What is stored of a tensor: the arrays that it shares with its views, as storages are shared."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import Any, Self

import torch

from df11 import ops
from df11.gpu import build_table
from df11.ops import CompressedUnit

SMALLEST_SIDE = 16  # of a matrix in a stack: what is smaller, such as a convolution's kernels, is no matrix of its own


class Held:
    """What somebody lends in the place of what is stored, to one thread and, on a GPU, one stream: decompressed weights, bf16 of
    the stored shape, or a matrix in the tiled layout where it is used."""

    __slots__ = ("_index", "_stream", "_thread", "weights")

    def __init__(self, weights: Any, device: torch.device) -> None:
        """Lent to the current thread on its current stream."""
        self.weights = weights
        self._thread, self._index = threading.get_ident(), device.index if device.type == "cuda" else -1
        self._stream = self._current()

    def is_for_caller(self) -> bool:
        return self._thread == threading.get_ident() and (self._index < 0 or self._stream == self._current())

    def _current(self) -> int:
        found: int = torch._C._cuda_getCurrentRawStream(self._index) if self._index >= 0 else 0
        return found


class Stored:
    """The weights of one tensor as arrays on one device, by name: in a layout of its own, or {"raw": bf16[numel]} where that
    cannot hold them, or they are only kept elsewhere. A write replaces the arrays.

    `numbers`: integers without which the arrays cannot be read. `shape`: the tensor's, as it lies in memory.
    """

    def __init__(self, arrays: dict[str, torch.Tensor], numbers: Sequence[int], shape: Sequence[int]) -> None:
        self.arrays = arrays
        self.numbers, self.shape = tuple(numbers), tuple(shape)
        self.numel = math.prod(shape)
        self.held: Held | None = None

    @classmethod
    def encode(cls, weights: torch.Tensor, shape: Sequence[int]) -> Self:
        """Compress bf16[numel] where it is."""
        raise NotImplementedError

    def decode(self, start: int, stop: int, device: torch.device, after: torch.Tensor | None = None) -> tuple[torch.Tensor, int]:
        """At least the weights from `start` to before `stop`, in memory of their own unless they are stored raw; and how many
        weights lie before them.

        after: orders this behind the tensor in a traced graph.
        """
        raise NotImplementedError

    def kept(self) -> dict[str, torch.Tensor]:
        """The arrays that cannot be made of the others."""
        return self.arrays

    def __getstate__(self) -> dict[str, Any]:
        """For pickles: without what is derived or lent, and with arrays of their own."""
        arrays = {
            name: array.clone() if array.untyped_storage().nbytes() > array.nbytes else array for name, array in self.kept().items()
        }
        return {"arrays": arrays, "numbers": self.numbers, "shape": self.shape}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
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
        """Bytes of the arrays, tables for decoding included."""
        return sum(array.nbytes for array in self.arrays.values())

    @property
    def is_traced(self) -> bool:
        """Whether a compiler looks at the arrays, which then hold no bits."""
        return type(next(iter(self.arrays.values()))) is not torch.Tensor or torch._C._get_tracing_state() is not None

    def mapped(self, work: Any) -> Self:
        """The same of arrays that `work` makes of each of these."""
        return type(self)({name: work(array) for name, array in self.arrays.items()}, self.numbers, self.shape)

    def to(self, device: torch.device, non_blocking: bool = False) -> Self:
        """A copy on a device."""
        arrays = {name: array.to(device, non_blocking=non_blocking, copy=True) for name, array in self.kept().items()}
        return type(self)(arrays, self.numbers, self.shape)

    def write(self, weights: torch.Tensor) -> None:
        """Store other weights, bf16[numel], where the arrays are."""
        self.assign(type(self).encode(weights.to(self.device), self.shape))

    def assign(self, other: Self) -> None:
        """Store what another does. Its arrays are taken, not copied."""
        self.arrays, self.numbers, self.held = other.arrays, other.numbers, None


class Units(Stored):
    """Weights in the published layout: one unit, or, of experts or whatever else is a stack of matrices, a unit each with one code.

    Arrays: ARRAYS of `ops` (without a table, one is made). `numbers`: bytes of each unit's stream. Raw are weights that have no
    code (Inf, NaN, 2^113 and more).
    """

    def __init__(self, arrays: dict[str, torch.Tensor], numbers: Sequence[int], shape: Sequence[int]) -> None:
        super().__init__(arrays if {"raw", "table"} & arrays.keys() else _with_table(arrays), numbers, shape)
        self._units: list[CompressedUnit] = []

    @classmethod
    def encode(cls, weights: torch.Tensor, shape: Sequence[int]) -> Self:
        if not weights.numel():
            return cls({"raw": weights}, (), shape)
        return cls(*ops.encode_parts(weights, shape[0] if is_stack(shape) else 1), shape)

    def by_matrix(self) -> None:
        """Make a unit each of the matrices of a stack that is one unit, as files have them: one expert is then decoded alone."""
        if is_stack(self.shape) and len(self.numbers) == 1:
            self.write(self.decode(0, self.numel, self.device)[0])

    def kept(self) -> dict[str, torch.Tensor]:
        return {name: array for name, array in self.arrays.items() if name != "table"}

    def assign(self, other: Self) -> None:
        super().assign(other)
        self._units = []

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
        weights = self.numel // len(self.numbers)
        each = ops.split([arrays[name] for name in ops.ARRAYS], self.numbers, weights)
        return [CompressedUnit(((weights,),), **dict(zip(ops.ARRAYS, own, strict=True))) for own in each]  # type: ignore[arg-type]

    def decode(self, start: int, stop: int, device: torch.device, after: torch.Tensor | None = None) -> tuple[torch.Tensor, int]:
        if self.device != device:
            return self.to(device).decode(start, stop, device)
        if (raw := self.raw) is not None:
            return raw, 0
        weights = self.numel // len(self.numbers)
        first, last = start // weights, -(-stop // weights)
        if self.is_traced:
            arrays = [self.arrays[name] for name in ops.ARRAYS]
            return torch.ops.df11.decode(*arrays, self.numbers, weights, first, last, after), first * weights
        out = torch.empty((last - first) * weights, dtype=torch.bfloat16, device=device)
        some = self.units()[first:last]
        ops.decompress(some, out.chunk(len(some)))
        return out, first * weights


def is_stack(shape: Sequence[int]) -> bool:
    """Whether a tensor is a stack of matrices, `[experts, out, in]`, each of which can be decompressed by itself."""
    return len(shape) == 3 and shape[0] > 1 and min(shape[1:]) >= SMALLEST_SIDE and shape[1] * shape[2] % 8 == 0


def _with_table(arrays: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    luts = arrays["luts"]
    table = build_table(luts) if luts.is_cuda else torch.empty(0, dtype=torch.int32, device=luts.device)
    return {**arrays, "table": table}
