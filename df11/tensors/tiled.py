"""`TiledTensor`: bf16 weights in the tiled layout, whose products read them compressed (mode=fused).

Where a linear layer asks for x W^T the kernels multiply without ever writing W to memory, where an embedding asks for rows they
decode those. Every other operator gets the decompressed weights, as of any `CompressedTensor`.
"""

from __future__ import annotations

import copy
import itertools
import secrets
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch.autograd import forward_ad
from torch.nn import functional

from df11 import dispatch, tiled_ops
from df11.formats.tiled import ROWS
from df11.ops import CompressedUnit, encode
from df11.tensors.compressed import CompressedTensor
from df11.tensors.stored import Stored
from df11.tiled_ops import TiledWeight

aten = torch.ops.aten
_modes, _is_autocast, _transformation = (
    torch._C._len_torch_dispatch_stack,
    torch._C._is_any_autocast_enabled,
    torch._C._functorch.peek_interpreter_stack,
)


class Tiles(Stored):
    """A matrix [rows, columns] in the tiled layout. Arrays: those of `TiledWeight`; `numbers`: its `uppers`, and, where it is that
    of several layers, a number by which compilers know it again, else 0. Raw is what would not get smaller."""

    def __init__(
        self, arrays: dict[str, torch.Tensor], numbers: Sequence[int], shape: Sequence[int], merged: Merged | None = None
    ) -> None:
        super().__init__(arrays, numbers, shape)
        self.merged = merged
        self._weight: TiledWeight | None = None

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"merged": self.merged}

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        copied = super().__deepcopy__(memo)
        copied.merged = copy.deepcopy(self.merged, memo)
        return copied

    @classmethod
    def of(cls, weight: TiledWeight, merged: Merged | None = None) -> Self:
        number = secrets.randbits(62) | 1 if merged else 0
        return cls(dict(zip(tiled_ops.ARRAYS, weight.arrays, strict=True)), (weight.uppers, number), weight.shape, merged)

    @classmethod
    def encode(cls, weights: torch.Tensor, shape: Sequence[int]) -> Self:
        weight = TiledWeight.encode(weights.view(shape)) if len(shape) == 2 and weights.numel() else None
        return cls.of(weight) if weight is not None else cls({"raw": weights}, (), shape)

    def assign(self, other: Self) -> None:
        super().assign(other)
        self._weight = None

    def weight_of(self, arrays: dict[str, torch.Tensor]) -> TiledWeight:
        """As arrays that hold the same somewhere else have it."""
        rows, columns = self.shape
        return TiledWeight((rows, columns), **arrays, uppers=self.numbers[0])

    def weight(self, device: torch.device | None = None) -> TiledWeight:
        """The matrix, which must not be raw; on a device that is not the arrays' it is lent, or a copy."""
        if self.held is not None and self.held.is_for_caller():
            lent: TiledWeight = self.held.weights
            return lent
        if device is not None and device != self.device:
            return self.to(device).weight()
        if self._weight is None:
            self._weight = self.weight_of(self.arrays)
        return self._weight

    def decode(self, start: int, stop: int, device: torch.device, after: torch.Tensor | None = None) -> tuple[torch.Tensor, int]:
        if self.raw is not None:
            return self.raw.to(device), 0
        columns = self.shape[1]
        first, last = start // columns // ROWS * ROWS, min(-(-stop // columns // ROWS) * ROWS, self.shape[0])
        weight = self.weight(device)
        if last - first < self.shape[0]:
            weight = weight.part(first, last)
        if self.is_traced:
            weights = torch.ops.df11.tiled_decode(weight.arrays, weight.uppers, *weight.shape, after)
        else:
            weights = weight.decompress()
        return weights.view(-1), first * columns

    def cut(self, first: int, last: int) -> Self:
        """Rows from `first`, a multiple of 16, to before `last`, another or the end. Nothing but places is copied."""
        weight = self.weight().part(first, last)
        (byte, patch), (last_byte, last_patch) = (weight.tiles[[0, -1]].long() & 0xFFFFFFFF).tolist()
        arrays = dict(zip(tiled_ops.ARRAYS, weight.arrays, strict=True))
        arrays |= {"stream": weight.stream[byte:last_byte], "patches": weight.patches[patch:last_patch]}
        return type(self)(arrays | {"tiles": weight.tiles - weight.tiles[0]}, (weight.uppers, 0), weight.shape)


class Merged:
    """Of several linear layers with the same input whose weights are stored one below the other: the first computes the product for
    all. Nothing depends on it: a layer whose input is another's computes its own."""

    def __init__(self, sizes: Sequence[int], biases: Sequence[torch.Tensor] = (), bias: torch.Tensor | None = None) -> None:
        """sizes: rows of each. biases: the layers', which are parts of `bias`."""
        ends = list(itertools.accumulate(sizes))
        self.sizes, self.biases, self.bias = list(sizes), list(biases), bias
        self.ranges = [(end - size, end) for end, size in zip(ends, sizes, strict=True)]
        # Of the last input: the outputs that were not asked for yet.
        self._kept: tuple[tuple[Any, ...], dict[int, torch.Tensor]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": None}

    def linear(self, x: torch.Tensor, index: int, whole: TiledWeight) -> torch.Tensor:
        """x W^T + bias of one of the layers. whole: the weights of all."""
        # What must be the same for outputs that were kept: writes are seen where torch counts them.
        stream = torch._C._cuda_getCurrentRawStream(whole.index) if whole.index >= 0 else 0
        state = x.data_ptr(), x.shape, stream, _writes(x), [_writes(bias) for bias in self.biases]
        kept = self._kept
        if kept is not None and index:
            (of, weights, *known), outputs = kept
            if of is x and weights is whole and tuple(known) == state and index in outputs:
                y = outputs.pop(index)  # each is given out once: it may be written to
                if not outputs:
                    self._kept = None
                return y
        parts = dispatch.linear(whole, x, self.bias).split_with_sizes(self.sizes, -1)
        self._kept = (x, whole, *state), {i: part for i, part in enumerate(parts) if i > index}
        if index + 1 == len(self.sizes):
            self._kept = None
        return parts[index]

    def has(self, bias: torch.Tensor | None, index: int) -> bool:
        """Whether a layer's bias is the part that is merged: in copies, or after `.data =`, it need not be."""
        if bias is None or self.bias is None:
            return bias is None and self.bias is None
        return bias.data_ptr() == self.bias.data_ptr() + 2 * self.ranges[index][0]


class TiledTensor(CompressedTensor):
    """A `CompressedTensor` in the tiled layout. `F.linear` with it is `df11.ops.linear`: it sums in another order than cuBLAS, so
    its results may differ in their last bits. `TiledTensor(weights)` compresses a bf16 matrix [out, in] where it is."""

    _layout = Tiles
    _arrays = tiled_ops.ARRAYS
    # Arrays, their rows that are this tensor's, which of the merged layers' these are, and the weights of all of those.
    _known: tuple[object, TiledWeight | None, int, TiledWeight | None] = (None, None, -1, None)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is functional.linear and not kwargs:
            x, weight, bias = args if len(args) == 3 else (*args, None)
            if type(weight) is cls and not _needs_gradients(x, weight, bias):
                # The host's time counts here. What torch keeps of a tensor (its shape, device) takes this very way: 2 us each.
                stored, known = weight._stored, weight._known
                if type(x) is torch.Tensor:
                    if known[0] is not stored.arrays or stored.held is not None:
                        known = weight._look()
                    _, own, index, whole = known
                    if own is not None and _is_hot(x, own, bias):
                        if index >= 0 and (merged := stored.merged).has(bias, index):
                            return merged.linear(x, index, whole)
                        return dispatch.linear(own, x, bias)
                if bias is None and stored.is_traced and weight._is_merged_for(x):
                    return weight._traced_linear(x)
        elif func is functional.embedding and len(args) > 1 and (found := _embedding(*args, **(kwargs or {}))) is not None:
            return found
        return super().__torch_function__(func, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if (own := _OWN.get(func)) and (found := own(*args, **(kwargs or {}))) is not None:
                return found
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _is_merged_for(self, x: torch.Tensor) -> bool:
        """Whether a compiler that traces a product with x may compute one for several layers."""
        stored = self._stored
        merged = "raw" not in stored.arrays and stored.numbers[1] and self._range() and not torch.compiler.is_exporting()
        fits = type(x) is not torch.Tensor and x.dtype == torch.bfloat16 and x.shape[-1:] == stored.shape[1:]
        return bool(merged and fits and not torch._C._is_any_autocast_enabled())

    def _traced_linear(self, x: torch.Tensor) -> torch.Tensor:
        """x W^T where a compiler traces: one product for all layers that have this input, of which compilers know no more."""
        stored, done = self._stored, x.__dict__.setdefault("_df11_products", {})
        key = *stored.numbers, _writes(x)
        if key not in done:
            whole = stored.weight()
            done[key] = torch.ops.df11.linear(x, whole.arrays, whole.uppers, *whole.shape)
        first, last = self._range() or (0, 0)
        y: torch.Tensor = done[key][..., first:last]
        return y

    def _rows(self, turned: bool = False) -> TiledWeight | None:
        """The matrix that this tensor is, or its transpose, where that is rows of whole tiles; None where it is not."""
        stored, where = self._stored, self._range(turned)
        if where is None or "raw" in stored.arrays:
            return None
        whole: TiledWeight = stored.weight(self.device)
        return whole if where == (0, stored.shape[0]) else whole.part(*where)

    def _look(self) -> tuple[object, TiledWeight | None, int, TiledWeight | None]:
        """As `_known`, which it is until other arrays are stored; not while some are lent, or come from elsewhere."""
        stored, own = self._stored, self._rows()
        ranges = stored.merged.ranges if stored.merged is not None and own is not None else ()
        where = self._range()
        index = ranges.index(where) if where in ranges else -1
        known = stored.arrays, own, index, stored.weight(self.device) if index >= 0 else None
        if stored.held is None and stored.device == self.device:
            self._known = known
        return known

    def _range(self, turned: bool = False) -> tuple[int, int] | None:
        """Which rows of what is stored this tensor is, or its transpose: first, and behind the last; None where it is none."""
        stored = self._stored
        if self.dim() != 2 or self.dtype != torch.bfloat16 or len(stored.shape) != 2 or not self.numel():
            return None
        size, stride = tuple(map(int, self.size())), tuple(map(int, self.stride()))
        (rows, columns), stride = (size, stride) if not turned else (size[::-1], stride[::-1])
        first, beside = divmod(int(self.storage_offset()), stored.shape[1])
        whole = columns == stored.shape[1] and stride == (columns, 1) and not beside
        tiles = first % ROWS == 0 and ((first + rows) % ROWS == 0 or first + rows == stored.shape[0])
        return (first, first + rows) if whole and tiles else None

    def _decompressed(self, after: torch.Tensor | None = None) -> torch.Tensor:
        return self._decompressed_anew(after)  # what is lent is compressed too

    def _alone(self) -> Stored | None:
        if (alone := super()._alone()) is not None or "raw" in self._stored.arrays:
            return alone
        turned = self.dim() == 2 and not self.is_contiguous()
        where = self._range(turned)
        return None if where is None else self._stored.cut(*where)  # type: ignore[no-any-return]

    def units(self) -> list[CompressedUnit]:
        """Compressed anew, as units of the published layout."""
        return [encode([self.decompress().contiguous().view(-1)])]


torch.serialization.add_safe_globals([TiledTensor, Tiles, Merged])


def _needs_gradients(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    if not torch.is_grad_enabled():
        return False
    return x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)


def _writes(x: torch.Tensor) -> int:
    """How often a tensor was written to, where torch counts that."""
    return 0 if x.is_inference() else x._version


def _is_hot(x: torch.Tensor, weight: TiledWeight, bias: torch.Tensor | None) -> bool:
    """Whether a product may skip torch's dispatcher: it is one, and no mode and no transformation looks at it."""
    if _modes() or _is_autocast() or _transformation() is not None or forward_ad._current_level >= 0:
        return False
    if torch._C._get_tracing_state() or (bias is not None and bias.dtype != torch.bfloat16):
        return False
    return _fits(x, weight)


def _fits(x: torch.Tensor, weight: TiledWeight) -> bool:
    if x.dtype != torch.bfloat16 or x.get_device() != weight.index:
        return False
    return x.dim() > 0 and x.size(-1) == weight.shape[1] and x.numel() > 0


def _embedding(
    ids: torch.Tensor, weight: torch.Tensor, padding_idx: int | None = None, max_norm: float | None = None, *more: Any, **named: Any
) -> torch.Tensor | None:
    """Rows of the weights; None where that is not all that is asked for, or so many are that they need most tiles."""
    plain = type(ids) is torch.Tensor and type(weight) is TiledTensor and max_norm is None
    return _looked_up(weight, ids) if plain and not torch._C._len_torch_dispatch_stack() else None  # type: ignore[arg-type]


def _looked_up(weight: TiledTensor, ids: torch.Tensor, *others: Any) -> torch.Tensor | None:
    if weight.requires_grad or ids.device != weight.device or not ids.numel() or ids.numel() * ROWS >= weight.shape[0]:
        return None
    if ids.dtype not in (torch.int64, torch.int32) or (own := weight._rows()) is None:
        return None
    if weight._stored.is_traced:
        found: torch.Tensor = torch.ops.df11.tiled_rows(ids.long(), own.arrays, own.uppers, *own.shape)
        return found
    return own.rows(ids.long())


def _mm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor | None:
    """x W^T + bias, where `weight` is the transpose of a TiledTensor."""
    if not isinstance(weight, TiledTensor) or isinstance(x, CompressedTensor):
        return None
    if bias is not None and (bias.dtype != torch.bfloat16 or bias.shape != weight.shape[1:]):
        return None
    if (own := weight._rows(turned=True)) is None or not _fits(x, own):
        return None
    if weight._stored.is_traced:
        y: torch.Tensor = torch.ops.df11.linear(x, own.arrays, own.uppers, *own.shape, bias)
        return y
    return dispatch.linear(own, x, bias) if type(x) is torch.Tensor else None


def _addmm(bias: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, *, beta: float = 1, alpha: float = 1) -> torch.Tensor | None:
    return _mm(x, weight, bias) if beta == alpha == 1 else None


def _matrix_product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor | None:
    return _mm(x, weight.t(), bias) if weight.dim() == 2 else None


_OWN: dict[Any, Callable[..., torch.Tensor | None]] = {
    aten.mm.default: _mm,
    aten.addmm.default: _addmm,
    aten.linear.default: _matrix_product,  # comes here in inference mode only
    aten.embedding.default: _looked_up,
}
