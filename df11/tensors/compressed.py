"""`CompressedTensor`: bf16 weights that are stored compressed and are an ordinary tensor to whoever uses them.

Every operator gets the decompressed weights, so it gives the original's bits. What would only look at the weights in another way
(`t`, `select`, `split`, `view`, `detach` and all other views) stays compressed and shares what is stored: so autograd keeps the
compressed tensor for backward, and one expert of a stack is decompressed alone. What writes weights compresses them anew.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map

from df11 import ops
from df11.tensors.stored import Stored, Units

aten = torch.ops.aten
# Hot, and what they return shares no memory with the weights: they may skip torch's dispatcher where no gradient is needed.
_READERS = (functional.linear, functional.embedding)
_ATTRIBUTES = ("_stored", "_whole", "_known")  # of its own; others may attach what they like
_STORED = "stored_"  # before the arrays' names where torch asks for them: `sign` is a method


class CompressedTensor(torch.Tensor):
    """A tensor whose weights are stored compressed: shape, strides, dtype and device are the original's.

    `CompressedTensor(weights)` compresses a bf16 tensor where it is (DFloat11, arXiv 2504.11651, section 2.3); of three dimensions
    [experts, out, in] each matrix is a unit of its own, all with one code. It is frozen until `requires_grad_`. Of another dtype,
    or on the meta device, it becomes an `nn.Parameter`, as accelerate's hooks ask for one.
    """

    _layout: type[Stored] = Units
    _arrays: tuple[str, ...] = ops.ARRAYS
    _stored: Any  # what it and its views share, of _layout
    _whole: tuple[int, ...] | None  # the shape, where it is all of what is stored as that lies in memory

    def __new__(cls, data: torch.Tensor, *, requires_grad: bool = False) -> Any:
        if isinstance(data, CompressedTensor):
            return nn.Parameter(data, requires_grad=requires_grad)
        if data.dtype != torch.bfloat16 or data.is_meta:
            return nn.Parameter(data, requires_grad=requires_grad)
        data = data.detach()
        if not _is_dense(data):
            data = data.contiguous()
        flat, shape = in_memory_order(data)
        return cls.make(cls._layout.encode(flat, shape), data.shape, data.stride(), requires_grad=requires_grad)

    @classmethod
    def make(
        cls,
        stored: Stored,
        size: Sequence[int],
        stride: Sequence[int] | None = None,
        offset: int | torch.SymInt = 0,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | None = None,
        requires_grad: bool = False,
    ) -> Self:
        """A view of what is stored, as `torch.as_strided` of the weights viewed as `dtype`. Nothing is copied.

        device: where it computes, which may be another than the arrays' (weights that wait in host memory).
        """
        if device is not None and device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        made: Self = torch.Tensor._make_wrapper_subclass(
            cls,
            torch.Size(size),
            strides=stride or _rows_first(size),
            storage_offset=offset,
            dtype=dtype,
            device=device or stored.device,
            requires_grad=requires_grad,
        )
        torch._C._set_throw_on_mutable_data_ptr(made)  # instead of reading where there is nothing
        made._stored = stored
        whole = dtype == torch.bfloat16 and not offset and tuple(size) == stored.shape
        made._whole = stored.shape if whole and stored.numel and (stride is None or list(stride) == _rows_first(size)) else None
        return made

    # What torch asks of a subclass that compilers may take apart.

    def __tensor_flatten__(self) -> tuple[list[str], tuple[Any, ...]]:
        stored = self._stored
        return [f"{_STORED}{name}" for name in stored.arrays], (
            tuple(stored.arrays),
            stored.numbers,
            stored.shape,
            self.storage_offset(),
            self.dtype,
            self.device,
        )

    @classmethod
    def __tensor_unflatten__(
        cls, arrays: dict[str, torch.Tensor], context: tuple[Any, ...], size: Sequence[int], stride: Sequence[int]
    ) -> Self:
        names, numbers, shape, offset, dtype, device = context
        stored = cls._layout({name: arrays[f"{_STORED}{name}"] for name in names}, numbers, shape)
        if stored.device.type == "meta" or device == stored.device:
            device = None
        return cls.make(stored, size, stride, offset, dtype, device)

    def _stable_hash_for_caching(self) -> str:
        arrays = [(array.dtype, array.shape, array.stride()) for array in self._stored.arrays.values()]
        return repr((self.__tensor_flatten__()[1], self.size(), self.stride(), self.requires_grad, arrays))

    def __getattr__(self, name: str) -> torch.Tensor:
        array = name.removeprefix(_STORED)
        if array in (*self._arrays, "raw") and array in self._stored.arrays:
            found: torch.Tensor = self._stored.arrays[array]
            return found
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if (
                cls is CompressedTensor
                and func in _READERS
                and not torch.compiler.is_compiling()
                and not _needs_autograd(args, kwargs)
            ):
                args = tuple([a._decompressed() if type(a) is cls else a for a in args])
                if kwargs:
                    kwargs = {name: a._decompressed() if type(a) is cls else a for name, a in kwargs.items()}
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if own := _OWN.get(func):
                return own(func, *args, **kwargs)
            # What torch composes of others (`to`, `reshape`) comes here in inference mode only.
            if (composed := func.decompose(*args, **kwargs)) is not NotImplemented:
                return composed
            if func.is_view and args and isinstance(args[0], CompressedTensor):
                return _viewed(func, *args, **kwargs)
            if func._schema.is_mutable:
                return _written(func, args, kwargs)
            plain = (a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor) and not isinstance(a, CompressedTensor))
            after = next(plain, None)
            args, kwargs = tree_map(lambda a: a._decompressed(after) if isinstance(a, CompressedTensor) else a, (args, kwargs))
            return func(*args, **kwargs)

    def _decompressed(self, after: torch.Tensor | None = None) -> torch.Tensor:
        """For an operator whose results share no memory with it: it may be lent (`Held`).

        after: a tensor that the operator reads too. In a traced graph the weights are then decompressed behind it: in a backward
        anew, where a compiler would otherwise keep them from the forward.
        """
        held = self._stored.held
        if held is not None and held.is_for_caller():
            return held.weights if self._whole is not None else self._seen_in(held.weights.view(-1), 0)
        return self._decompressed_anew(after)

    def _decompressed_anew(self, after: torch.Tensor | None = None) -> torch.Tensor:
        if self._whole is not None:  # as most are: the host's time counts
            stored = self._stored
            weights: torch.Tensor = stored.decode(0, stored.numel, self.device, after)[0].view(self._whole)
            return weights
        if not self.numel():
            return torch.empty_strided(self.size(), self.stride(), dtype=self.dtype, device=self.device)
        last = self.storage_offset() + sum((n - 1) * step for n, step in zip(self.size(), self.stride(), strict=True)) + 1
        width = self.dtype.itemsize
        start, stop = self.storage_offset() * width // 2, -(-last * width // 2)
        weights, before = self._stored.decode(start, stop, self.device, after)
        return self._seen_in(weights, before)

    def _seen_in(self, weights: torch.Tensor, before: int) -> torch.Tensor:
        """This tensor in decompressed weights, of which `before` are missing at the front."""
        if self._whole is not None:
            return weights.view(self._whole)
        width = self.dtype.itemsize
        if self.dtype != torch.bfloat16:
            weights = weights.view(self.dtype)
        start = weights.storage_offset() + self.storage_offset() - before * 2 // width
        return weights.as_strided(self.size(), self.stride(), start)

    def _alone(self) -> Stored | None:
        """What is stored, where it has every weight of it once."""
        whole = self.dtype == torch.bfloat16 and self.numel() == self._stored.numel and _is_dense(self)
        return self._stored if whole else None

    def decompress(self) -> torch.Tensor:
        """The same weights as an ordinary tensor with memory of its own."""
        with torch.no_grad():
            found = self._decompressed_anew()
            return found.clone() if self._stored.raw is not None else found

    def units(self) -> list[ops.CompressedUnit]:
        """What is stored, as units of the published layout: one, or one a matrix of a stack, or one raw."""
        units: list[ops.CompressedUnit] = self._stored.units()
        return units

    @property
    def is_compressed(self) -> bool:
        """False of weights stored as they are: those that have no code, and what only waits in host memory."""
        return "raw" not in self._stored.arrays

    @property
    def stored_bytes(self) -> int:
        """Bytes that storing it takes, the decode table included. Views share them."""
        size: int = self._stored.nbytes
        return size

    # What torch's own methods cannot do without a storage.

    def data_ptr(self) -> int:
        """No address, but a number of the place in what is stored, which tied weights share: nothing can read there."""
        return -1 - (id(self._stored) << 40) - int(self.storage_offset())

    def numpy(self, *, force: bool = False) -> Any:
        """A copy, which cannot be written to: it would not be the weights that are written."""
        found = self.decompress().numpy(force=force)
        found.flags.writeable = False
        return found

    def __dlpack__(self, **asked: Any) -> Any:
        return self.decompress().__dlpack__(**asked)

    def tolist(self) -> Any:
        return self.decompress().tolist()

    def share_memory_(self) -> CompressedTensor:
        for array in self._stored.arrays.values():
            array.share_memory_()
        return self

    def is_shared(self) -> bool:
        return all(array.is_shared() for array in self._stored.arrays.values())

    @property
    def data(self) -> torch.Tensor:
        return self.detach()

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        """Become another tensor: of any shape, dtype and device, compressed or not."""
        if isinstance(value, CompressedTensor) and value._stored is self._stored and _place(value) == _place(self):
            return
        other = value.detach()
        if isinstance(self, nn.Parameter):
            other = nn.Parameter(other, requires_grad=self.requires_grad)
        try:
            torch.utils.swap_tensors(self, other)
        except RuntimeError as kept:
            raise RuntimeError(
                f"`.data` of a compressed weight cannot be set while its views are kept ({kept}): use copy_, or set the parameter"
            ) from kept

    def __repr__(self, *, tensor_contents: object = None) -> str:  # type: ignore[override]
        if self._stored.raw is not None or self._stored.is_traced:
            what = "bf16" if self._stored.raw is not None else "traced"
        else:
            what = f"{self._stored.nbytes} bytes stored"
        return f"{type(self).__name__}({list(self.shape)}, {self.dtype}, {self.device}, {what})"

    def __deepcopy__(self, memo: dict[int, Any]) -> CompressedTensor:
        if id(self) not in memo:
            memo[id(self)] = _alike(self, copy.deepcopy(self._stored, memo), copy.deepcopy(attached(self), memo))
        copied: CompressedTensor = memo[id(self)]
        return copied

    def __reduce_ex__(self, protocol: object) -> tuple[Any, ...]:
        geometry = (tuple(self.size()), self.stride(), self.storage_offset(), self.dtype)
        return _rebuild, (type(self), self._stored, *geometry, self.requires_grad, attached(self))


def dense(tensor: torch.Tensor) -> torch.Tensor:
    """A compressed tensor decompressed; another as it is."""
    return tensor.decompress() if isinstance(tensor, CompressedTensor) else tensor


def in_memory_order(tensor: torch.Tensor) -> tuple[torch.Tensor, tuple[int, ...]]:
    """The elements of a tensor without gaps as they lie in memory, in one dimension, and the shape that they have there."""
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    ordered = tensor.permute(order)
    ordered = ordered if ordered.is_contiguous() else tensor.contiguous()
    return ordered.view(-1), tuple(ordered.shape)


def _rows_first(size: Sequence[int]) -> list[int]:
    """Strides of a contiguous tensor."""
    return [math.prod(size[i + 1 :]) for i in range(len(size))]


def _is_dense(tensor: torch.Tensor) -> bool:
    """Without gaps, and no element twice."""
    expected = 1
    for step, n in sorted((step, n) for step, n in zip(tensor.stride(), tensor.size(), strict=True) if n != 1):
        if step != expected:
            return False
        expected *= n
    return True


def attached(tensor: torch.Tensor) -> dict[str, Any]:
    """What others have attached to a tensor, as torch's `_is_param`."""
    return {name: value for name, value in tensor.__dict__.items() if name not in _ATTRIBUTES}


def _alike(tensor: CompressedTensor, stored: Stored, state: dict[str, Any]) -> CompressedTensor:
    """The same view of something else that is stored."""
    elsewhere = tensor.device if tensor.device != tensor._stored.device else None
    place = (tensor.size(), tensor.stride(), tensor.storage_offset())
    grad = tensor.requires_grad and tensor.is_leaf
    made = type(tensor).make(stored, *place, dtype=tensor.dtype, device=elsewhere, requires_grad=grad)
    made.__dict__.update(state)
    return made


def _rebuild(
    cls: type[CompressedTensor],
    stored: Stored,
    size: tuple[int, ...],
    stride: tuple[int, ...],
    offset: int,
    dtype: torch.dtype,
    requires_grad: bool,
    state: dict[str, Any],
) -> CompressedTensor:
    made = cls.make(stored, size, stride, offset, dtype, requires_grad=requires_grad)
    made.__dict__.update(state)
    return made


torch.serialization.add_safe_globals([CompressedTensor, Units, _rebuild])


def _needs_autograd(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether autograd would keep an argument or derive forward; and embeddings that renormalise, and `out`, are written to."""
    if kwargs.get("max_norm") is not None or (len(args) > 3 and args[3] is not None) or "out" in kwargs:
        return True
    if torch.autograd.forward_ad._current_level >= 0:
        return True
    if not torch.is_grad_enabled():
        return False
    return any(isinstance(a, torch.Tensor) and a.requires_grad for a in (*args, *kwargs.values()))


def _view(
    tensor: CompressedTensor,
    size: Sequence[int],
    stride: Sequence[int],
    offset: int | torch.SymInt,
    dtype: torch.dtype | None = None,
) -> CompressedTensor:
    made = (tensor._stored, size, stride, offset, dtype or tensor.dtype, tensor.device)
    if torch.is_inference_mode_enabled() and not tensor.is_inference():  # as torch has it, so is the view none
        with torch.inference_mode(False):
            return type(tensor).make(*made)
    return type(tensor).make(*made)


def _place(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype


def _itself(func: Any, tensor: CompressedTensor) -> CompressedTensor:
    return _view(tensor, tensor.size(), tensor.stride(), tensor.storage_offset())


def _transposed(func: Any, tensor: CompressedTensor, first: int = 0, second: int = 1) -> CompressedTensor:
    size, stride = list(tensor.size()), list(tensor.stride())
    if tensor.dim() > 1:
        size[first], size[second] = size[second], size[first]
        stride[first], stride[second] = stride[second], stride[first]
    return _view(tensor, size, stride, tensor.storage_offset())


def _viewed(func: Any, tensor: CompressedTensor, *args: Any, **kwargs: Any) -> Any:
    """Any other view: the operator itself says on a tensor without memory where in the weights it lies."""
    with _disable_current_modes():
        whole = torch.empty(tensor._stored.numel, dtype=torch.bfloat16, device="meta").view(tensor.dtype)
        found = func(whole.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset()), *args, **kwargs)
    return tree_map(
        lambda t: _view(tensor, t.size(), t.stride(), t.storage_offset(), t.dtype) if isinstance(t, torch.Tensor) else t, found
    )


def _cloned(func: Any, tensor: CompressedTensor, memory_format: torch.memory_format | None = None) -> torch.Tensor:
    """A part of the weights is cloned as an ordinary tensor, and so is what shall lie differently in memory."""
    same = memory_format in (None, torch.preserve_format) or (memory_format == torch.contiguous_format and tensor.is_contiguous())
    alone = tensor._alone() if same else None
    if alone is None:
        return func(tensor._decompressed(), memory_format=memory_format)  # type: ignore[no-any-return]
    return type(tensor).make(alone.mapped(torch.clone), tensor.size(), tensor.stride(), device=tensor.device)


def _copied_to(
    func: Any,
    tensor: CompressedTensor,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    pin_memory: bool | None = None,
    non_blocking: bool = False,
    memory_format: torch.memory_format | None = None,
    **others: Any,
) -> torch.Tensor:
    """To another device; to another dtype it becomes an ordinary tensor."""
    device = torch.device(device) if device is not None else tensor.device
    if device.type == "meta":
        return torch.empty_strided(tensor.size(), tensor.stride(), dtype=dtype or tensor.dtype, device=device)
    same = dtype in (None, tensor.dtype) and memory_format in (None, torch.preserve_format)
    alone = tensor._alone() if same else None
    if alone is None:
        asked = {"dtype": dtype, "device": device, "pin_memory": pin_memory, "non_blocking": non_blocking} | others
        return func(tensor._decompressed(), memory_format=memory_format, **asked)  # type: ignore[no-any-return]
    stored = alone.to(device, non_blocking)
    if pin_memory:
        stored = stored.mapped(torch.Tensor.pin_memory)
    return type(tensor).make(stored, tensor.size(), tensor.stride())


def _pinned(func: Any, tensor: CompressedTensor, device: torch.device | None = None) -> CompressedTensor:
    return _alike(tensor, tensor._stored.mapped(lambda array: array.pin_memory() if array.numel() else array), {})


def _is_pinned(func: Any, tensor: CompressedTensor, device: torch.device | None = None) -> bool:
    return any(array.is_pinned() for array in tensor._stored.arrays.values())


def _recorded(func: Any, tensor: CompressedTensor, stream: Any) -> None:
    for array in tensor._stored.arrays.values():
        func(array, stream)


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An operator that writes: into decompressed weights, which are then compressed in the place of what was stored."""
    names = [argument.name for argument in func._schema.arguments]
    given = dict(zip(names, args, strict=False)) | kwargs
    writes = {a.name: a.alias_info for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write}
    weights: dict[int, tuple[CompressedTensor, torch.Tensor]] = {}  # all of what is stored, by its identity
    written = {id(t._stored) for name in writes for t in _tensors(given.get(name)) if isinstance(t, CompressedTensor)}

    def writable(tensor: Any) -> Any:
        if not isinstance(tensor, CompressedTensor):
            return tensor
        if tensor._stored.is_traced:
            raise RuntimeError("compressed weights cannot be written inside of torch.compile: write them before")
        if id(tensor._stored) not in weights:
            weights[id(tensor._stored)] = tensor, tensor._stored.decode(0, tensor._stored.numel, tensor.device)[0].clone()
        return tensor._seen_in(weights[id(tensor._stored)][1], 0)

    def readable(tensor: Any) -> Any:  # what is read and written is one memory
        if isinstance(tensor, CompressedTensor):
            return writable(tensor) if id(tensor._stored) in written else tensor._decompressed()
        return tensor

    mine = [t for name in writes for t in _tensors(given.get(name)) if isinstance(t, CompressedTensor)]
    if mine and (torch.Tag.inplace_view in func.tags or func._schema.name in ("aten::set_", "aten::resize_")):
        raise RuntimeError(f"{func} would change the shape of a compressed weight: set the parameter to another tensor instead")
    plain = {name: tree_map(writable if name in writes else readable, value) for name, value in given.items()}
    before = [_place(t) for name in writes for t, g in _pairs(plain, given, name) if isinstance(g, CompressedTensor)]
    result = func(**plain)
    if [_place(t) for name in writes for t, g in _pairs(plain, given, name) if isinstance(g, CompressedTensor)] != before:
        raise RuntimeError(f"{func} would change the shape of a compressed weight: set the parameter to another tensor instead")
    for tensor, changed in weights.values():
        tensor._stored.write(changed)
    returned = {a for r in func._schema.returns if r.alias_info is not None for a in r.alias_info.before_set}
    originals = [given[name] for name, alias in writes.items() if alias.before_set & returned and name in given]
    if not originals:
        return result
    return originals[0] if len(func._schema.returns) == 1 else tuple(originals)


def _pairs(plain: dict[str, Any], given: dict[str, Any], name: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return list(zip(_tensors(plain.get(name)), _tensors(given.get(name)), strict=True))


def _tensors(value: Any) -> list[torch.Tensor]:
    return [value] if isinstance(value, torch.Tensor) else list(value or ())


_OWN: dict[Any, Callable[..., Any]] = {
    aten.detach.default: _itself,
    aten.alias.default: _itself,
    aten.t.default: _transposed,
    aten.transpose.int: _transposed,
    # Views by what they do, though their schemas do not say so.
    aten._unsafe_view.default: _viewed,
    aten.unsafe_split.Tensor: _viewed,
    aten.unsafe_split_with_sizes.default: _viewed,
    aten.unsafe_chunk.default: _viewed,
    aten.lift.default: _itself,
    aten.clone.default: _cloned,
    aten._to_copy.default: _copied_to,
    aten._pin_memory.default: _pinned,
    aten.is_pinned.default: _is_pinned,
    aten.record_stream.default: _recorded,
}
