"""Compressed weights inside ordinary torch modules.

A compressed parameter `weight` of a module becomes buffers: `weight` (the code stream, uint8), `weight_sign_mantissa`,
`weight_luts`, `weight_gaps`, `weight_output_positions`. The module's class and forward stay as they are: before it runs, a hook
decompresses into a workspace and puts the bf16 tensor in the buffer's place for as long as the forward lasts. So any module works
(Linear, Embedding with a scale, experts with three dimensions), and the same kernels see the same bits as in the original model.

`attach` chooses what is decompressed at a time: one layer, or a whole transformer block, as the paper does, and whether the next
block is decompressed meanwhile. `offload_` keeps the stored form of some blocks in host memory, compressed or not.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from df11 import ops, released
from df11.ops import CompressedUnit, encode

PARTS = ("sign_mantissa", "luts", "gaps", "output_positions")
ALIGNMENT = 256  # bytes; as torch's allocator does at least, so that cuBLAS chooses as for a tensor of its own
GRANULARITIES = ("layer", "block")
KERNELS = ("fast", "paper", "released")


class CompressedModelError(RuntimeError):
    """A compressed model used in a way that it cannot serve. The message says what to do instead."""


@dataclass
class CompressedParameter:
    """Where a parameter's stored arrays are: buffers of `module`, which may be another's (tied weights). They are those of the
    published layout, or, where `offload_` moved it as it was, the bf16 weights."""

    module: nn.Module
    name: str
    shape: tuple[int, ...]
    _unit: CompressedUnit | None = field(default=None, repr=False)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def arrays(self) -> dict[str, torch.Tensor]:
        """The buffers as they are now, by the suffix of their name; "" is the stream."""
        named = ((part, self.module._buffers.get(self.array_name(part))) for part in ("", *PARTS))
        return {part: array for part, array in named if array is not None}

    def array_name(self, part: str) -> str:
        return f"{self.name}_{part}" if part else self.name

    def unit(self) -> CompressedUnit:
        """The arrays as they are now; they move with the module."""
        stream = self.module._buffers[self.name]
        assert stream is not None
        if self._unit is None or _first(self._unit) is not stream:
            self._unit = _unit(self.shape, self.arrays)
        return self._unit


def _first(unit: CompressedUnit) -> torch.Tensor:
    return unit.encoded_exponent if unit.raw is None else unit.raw


def _unit(shape: tuple[int, ...], arrays: dict[str, torch.Tensor]) -> CompressedUnit:
    """A unit of a parameter's arrays, none of them copied."""
    stream = arrays[""]
    if stream.dtype == torch.bfloat16:
        return CompressedUnit.make((shape,), {"raw": stream}, stream.device)
    parts = arrays | {"encoded_exponent": stream, "output_positions": arrays["output_positions"].view(torch.int32)}
    unit = CompressedUnit.make((shape,), parts, stream.device)
    assert unit.encoded_exponent is stream
    return unit


def compressed_parameters(module: nn.Module) -> dict[str, CompressedParameter]:
    """A module's own compressed (or offloaded) parameters by name."""
    found: dict[str, CompressedParameter] = module.__dict__.get("_df11", {})
    return found


def is_compressed(model: nn.Module) -> bool:
    return any(parameter.unit().raw is None for module in model.modules() for parameter in compressed_parameters(module).values())


def prepare(module: nn.Module, name: str, sizes: dict[str, tuple[int, ...]]) -> None:
    """Replace a parameter by empty buffers for its compressed arrays, as a checkpoint's headers give their sizes by part."""
    parameter = module._parameters.pop(name)
    assert parameter is not None
    device = parameter.device
    module.register_buffer(name, torch.empty(sizes["encoded_exponent"], dtype=torch.uint8, device=device))
    for part in PARTS:
        dtype = torch.uint32 if part == "output_positions" else torch.uint8
        module.register_buffer(f"{name}_{part}", torch.empty(sizes[part], dtype=dtype, device=device))
    module.__dict__.setdefault("_df11", {})[name] = CompressedParameter(module, name, tuple(parameter.shape))


def tie(module: nn.Module, name: str, source: CompressedParameter) -> None:
    """Let a module's parameter be another's compressed one; it stores nothing itself."""
    module._parameters.pop(name, None)
    module.__dict__.setdefault("_df11", {})[name] = source


def share(module: nn.Module, name: str, holder: nn.Module, source: str) -> None:
    """Let a module's parameter be the holder's, compressed or not."""
    if compressed := compressed_parameters(holder).get(source):
        tie(module, name, compressed)
    else:
        module._parameters[name] = holder._parameters[source]


def compress_(model: nn.Module, include: tuple[str, ...] = (), exclude: tuple[str, ...] = ()) -> list[str]:
    """Compress a model's bf16 matrices in place, where they are, each as a unit of its own. Returns their names.

    Weights that have no code (Inf, NaN, 2^113 and more) stay as they are. Tied parameters are compressed once.
    """
    done: dict[int, tuple[nn.Module, str]] = {}
    names = []
    for prefix, module in list(model.named_modules()):
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and id(parameter) in done:
                share(module, name, *done[id(parameter)])
        before = dict(module._parameters)
        names += compress_own_(module, prefix, include, exclude)
        done |= {id(before[name]): (module, name) for name in compressed_parameters(module) if name in before}
    return names


def compress_own_(module: nn.Module, prefix: str = "", include: tuple[str, ...] = (), exclude: tuple[str, ...] = ()) -> list[str]:
    """Compress a module's own bf16 matrices as `compress_` does, not its children's."""
    from df11.checkpoint import selected

    names = []
    for name, parameter in list(module._parameters.items()):
        full = f"{prefix}.{name}" if prefix else name
        if parameter is None or not selected(full, parameter.dtype == torch.bfloat16, tuple(parameter.shape), include, exclude):
            continue
        unit = encode([parameter.detach()])
        if unit.raw is not None:
            continue
        prepare(module, name, {part: tuple(getattr(unit, part).shape) for part in ("encoded_exponent", *PARTS)})
        module._buffers[name] = unit.encoded_exponent
        for part in PARTS:
            array = getattr(unit, part)
            module._buffers[f"{name}_{part}"] = array.view(torch.uint32) if part == "output_positions" else array
        names.append(full)
    return names


def to_host_(module: nn.Module) -> None:
    """Move a module's own parameters and buffers to host memory, not its children's."""
    module._apply(lambda tensor: tensor.cpu(), recurse=False)  # type: ignore[no-untyped-call]


def offload_(model: nn.Module, blocks: int, device: torch.device | str | None = None) -> list[str]:
    """Keep the matrices of the last transformer blocks, compressed or not, in pinned host memory; all else moves to `device`.

    `device`: where the model computes, by default where its first parameter is. After `attach(model, "block")` a block's matrices
    are copied there before it runs, in one piece. Returns their names. Raises ValueError where the model has fewer blocks.
    """
    place = torch.device(device) if device is not None else next(model.parameters()).device
    found = list(_blocks(model))
    if not 0 <= blocks <= len(found):
        raise ValueError(f"blocks={blocks}: the model has {len(found)} transformer blocks")
    names, stay = [], set[int]()
    for prefix, block in found[len(found) - blocks :]:
        for name, module in block.named_modules():
            for leaf, parameter in list(module._parameters.items()):
                if parameter is not None and parameter.dtype == torch.bfloat16 and parameter.dim() > 1:
                    del module._parameters[leaf]
                    module.register_buffer(leaf, parameter.detach())
                    module.__dict__.setdefault("_df11", {})[leaf] = CompressedParameter(module, leaf, tuple(parameter.shape))
            names += [".".join(filter(None, (prefix, name, leaf))) for leaf in compressed_parameters(module)]
        pool = block.__dict__["_df11_pool"] = _Pool([parameter for _, _, parameter in _inside(block)], place)
        stay |= {id(array) for parameter in pool.parameters for array in parameter.arrays.values()}
    model._apply(lambda tensor: tensor if id(tensor) in stay else tensor.to(place))  # type: ignore[no-untyped-call]
    return names


def stored_bytes(model: nn.Module) -> dict[str, int]:
    """Bytes of all parameters and buffers, decode tables included, by where they are: `gpu` and `host`."""
    tensors = [*model.parameters(), *model.buffers()]
    tensors += [p.unit().table for m in model.modules() for p in compressed_parameters(m).values() if p.unit().table.numel()]
    sizes = {(tensor.device, tensor.data_ptr()): tensor.nbytes for tensor in tensors}
    on_gpu = sum(size for (device, _), size in sizes.items() if device.type == "cuda")
    return {"gpu": on_gpu, "host": sum(sizes.values()) - on_gpu}


class _Pool:
    """The arrays of one block's parameters in one piece of host memory, pinned where there is a GPU. Their buffers become views."""

    def __init__(self, parameters: list[CompressedParameter], device: torch.device) -> None:
        self.device = device
        self.parameters = parameters
        self._places: list[dict[str, int]] = []
        self.nbytes = 0
        for parameter in parameters:
            self._places.append({})
            for part, array in parameter.arrays.items():
                self._places[-1][part] = self.nbytes
                self.nbytes += _aligned(array.nbytes)
        self.memory = _pinned(self.nbytes) if device.type == "cuda" else torch.empty(self.nbytes, dtype=torch.uint8)
        for parameter, views in zip(parameters, self.views(self.memory), strict=True):
            for part, array in parameter.arrays.items():
                parameter.module._buffers[parameter.array_name(part)] = views[part].copy_(array)

    def views(self, memory: torch.Tensor) -> list[dict[str, torch.Tensor]]:
        """Each parameter's arrays in the pool's memory, or in a copy of it."""
        return [
            {part: _view(memory, places[part], array) for part, array in parameter.arrays.items()}
            for parameter, places in zip(self.parameters, self._places, strict=True)
        ]


def _view(memory: torch.Tensor, at: int, like: torch.Tensor) -> torch.Tensor:
    return memory[at : at + like.nbytes].view(like.dtype).view(like.shape)


def _pinned(size: int) -> torch.Tensor:
    """Page-locked host memory of just this size (torch's own allocator rounds up to a power of two)."""
    memory = torch.empty(size, dtype=torch.uint8)
    torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), size, 0))
    weakref.finalize(memory.untyped_storage(), torch.cuda.cudart().cudaHostUnregister, memory.data_ptr())
    return memory


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


Slots = list[tuple[nn.Module, str, CompressedParameter]]


class Workspace:
    """The decode buffers of one model. It belongs to the model that `attach` was called on."""

    def __init__(self) -> None:
        self._sizes: list[int] = []  # bytes of each buffer
        self._buffers: dict[tuple[torch.device, int], torch.Tensor] = {}

    def reserve(self, buffer: int, size: int) -> None:
        """Let a buffer have at least this many bytes. Memory is taken when it is first used."""
        self._sizes += [0] * (buffer + 1 - len(self._sizes))
        self._sizes[buffer] = max(self._sizes[buffer], size)

    def bytes(self, device: torch.device, buffer: int, start: int, size: int) -> torch.Tensor:
        """uint8[size] of a buffer on a device."""
        if (device, buffer) not in self._buffers:
            self._buffers[device, buffer] = torch.empty(self._sizes[buffer], dtype=torch.uint8, device=device)
        return self._buffers[device, buffer][start : start + size]

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self._buffers.values())


Decode = Callable[[Sequence[CompressedUnit], Sequence[torch.Tensor]], None]


class _Owner:
    """A module before which weights are decompressed, and the part of the workspace that holds them: the decoded ones, then, where
    they come from host memory, the copy of what is stored. Weights stored as they are get used in that copy."""

    def __init__(self, module: nn.Module, slots: Slots, workspace: Workspace, decode: Decode) -> None:
        self.module = module
        self.slots = slots
        self.pool: _Pool | None = module.__dict__.get("_df11_pool")
        self.buffer = 0
        self.start = 0  # in the buffer
        self._workspace = workspace
        self._decode = decode
        coded = [self.pool is None or parameter.unit().raw is None for _, _, parameter in slots]
        sizes = [_aligned(2 * parameter.numel) if c else 0 for c, (_, _, parameter) in zip(coded, slots, strict=True)]
        self._offsets = [sum(sizes[:i]) for i in range(len(sizes))]
        self._decoded = sum(sizes)  # bytes
        self.nbytes = self._decoded + (self.pool.nbytes if self.pool else 0)
        self._units: list[CompressedUnit] = []  # as they were when the views were made
        self._views: list[torch.Tensor] = []

    @property
    def device(self) -> torch.device:
        return self.pool.device if self.pool else _first(self.slots[0][2].unit()).device

    def fill(self) -> None:
        """Decompress, on the current stream."""
        if self.pool:
            copy = self._workspace.bytes(self.pool.device, self.buffer, self.start + self._decoded, self.pool.nbytes)
            copy.copy_(self.pool.memory, non_blocking=True)
            if not self._units:  # made after the first copy: tables are built from what it brought
                arrays = self.pool.views(copy)
                units = [_unit(p.shape, a) for (_, _, p), a in zip(self.slots, arrays, strict=True)]
                self._place(units)
        else:
            units = [parameter.unit() for _, _, parameter in self.slots]
            if len(units) != len(self._units) or any(a is not b for a, b in zip(units, self._units, strict=True)):
                self._place(units)
        coded = [(unit, view) for unit, view in zip(self._units, self._views, strict=True) if view is not unit.raw]
        self._decode([unit for unit, _ in coded], [view.view(-1) for _, view in coded])

    def _place(self, units: list[CompressedUnit]) -> None:
        self._units, self._views = units, []
        for unit, offset, (_, _, parameter) in zip(units, self._offsets, self.slots, strict=True):
            if self.pool and unit.raw is not None:
                self._views.append(unit.raw)
                continue
            memory = self._workspace.bytes(_first(unit).device, self.buffer, self.start + offset, 2 * parameter.numel)
            self._views.append(memory.view(torch.bfloat16).view(parameter.shape))

    def show(self) -> None:
        """Put the weights in place: in the instance's dictionary they hide the buffers of the same names, which stay registered."""
        for (holder, name, _), view in zip(self.slots, self._views, strict=True):
            holder.__dict__[name] = view

    def hide(self) -> None:
        for holder, name, _ in self.slots:
            holder.__dict__.pop(name, None)


class _Ahead:
    """Decompresses the next owner's weights on a second stream while one runs. Owners take two buffers in turns."""

    def __init__(self, owners: list[_Owner]) -> None:
        self.owners = owners
        self._held: dict[int, int] = {}  # buffer: the owner whose weights were decompressed into it ahead
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._busy: torch.cuda.Stream | None = None  # what an enter must wait for; a graph capture may wait for nothing else

    def enter(self, index: int) -> None:
        owner = self.owners[index]
        if self._busy:
            torch.cuda.current_stream(owner.device).wait_stream(self._busy)
            self._busy = None
        if self._held.pop(owner.buffer, None) != index:
            owner.fill()
        if index + 1 < len(self.owners):
            following = self.owners[index + 1]
            if side := self._side(following.device):
                # Its buffer is free: who had it before has been launched by now.
                side.wait_stream(torch.cuda.current_stream(following.device))
                self._busy = side
            with torch.cuda.stream(side):
                following.fill()
            self._held[following.buffer] = index + 1

    def _side(self, device: torch.device) -> torch.cuda.Stream | None:
        if device.type != "cuda":
            return None
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]


def attach(model: nn.Module, granularity: str = "layer", kernel: str = "fast", prefetch: bool = False) -> Workspace:
    """Make a model with compressed parameters run: hooks, and a workspace as large as what is decompressed at a time.

    granularity: `layer`, each module's own weights before it runs; `block`, all of a transformer block's (an element of a
    ModuleList) before the block runs, by one launch. kernel: `fast`, `paper` or `released` (on a GPU). prefetch (blocks only):
    decompress the next block on a second stream while one runs, into a second buffer. A second call replaces the first. The model
    can only infer: gradients are switched off.
    """
    if granularity not in GRANULARITIES:
        raise ValueError(f"granularity={granularity!r}: choose one of {', '.join(GRANULARITIES)}")
    if kernel not in KERNELS:
        raise ValueError(f"kernel={kernel!r}: choose one of {', '.join(KERNELS)}")
    if granularity == "layer" and (prefetch or any("_df11_pool" in module.__dict__ for module in model.modules())):
        raise ValueError("prefetched or offloaded weights go by whole blocks: granularity='block'")
    for handle in model.__dict__.pop("_df11_hooks", []):
        handle.remove()
    model.requires_grad_(False)
    workspace, decode = Workspace(), _decoder(kernel)
    owners = [_Owner(module, slots, workspace, decode) for module, slots in _owners(model, granularity)]
    _assign(model, {id(owner.module): owner for owner in owners}, 0)
    ahead = _Ahead(owners) if prefetch else None
    for index, owner in enumerate(owners):
        if prefetch:
            if owner.start:
                raise ValueError(f"{type(owner.module).__name__} runs inside of another module with weights: prefetch=False")
            owner.buffer = index % 2
        workspace.reserve(owner.buffer, owner.start + owner.nbytes)
    handles: list[Any] = []
    for index, owner in enumerate(owners):
        enter, leave = _hooks(owner, index, ahead)
        handles.append(owner.module.register_forward_pre_hook(enter, prepend=True))
        handles.append(owner.module.register_forward_hook(leave, always_call=True))
    model.__dict__["_df11_hooks"] = handles
    model.__dict__["_df11_workspace"] = workspace
    return workspace


def _decoder(kernel: str) -> Decode:
    if kernel != "released":
        return lambda units, out: ops.decompress(units, out, kernel)
    launches: dict[int, tuple[CompressedUnit, Callable[[torch.Tensor], None]]] = {}

    def decode(units: Sequence[CompressedUnit], out: Sequence[torch.Tensor]) -> None:
        for unit, to in zip(units, out, strict=True):
            if id(unit) not in launches:  # the unit is kept, so that its id stays its own
                launches[id(unit)] = unit, released.decoder(unit)
            launches[id(unit)][1](to)

    return decode


def _blocks(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Transformer blocks and their names: the elements of the outermost ModuleLists."""
    for name, child in module.named_children():
        full = f"{prefix}.{name}" if prefix else name
        if isinstance(module, nn.ModuleList):
            yield full, child
        else:
            yield from _blocks(child, full)


def _slots(module: nn.Module) -> Slots:
    return [(module, name, parameter) for name, parameter in compressed_parameters(module).items()]


def _inside(module: nn.Module) -> Slots:
    return [slot for part in module.modules() for slot in _slots(part)]


def _owners(module: nn.Module, granularity: str) -> Iterator[tuple[nn.Module, Slots]]:
    """Modules before which something is decompressed, with what."""
    if own := _slots(module):
        yield module, own
    for child in module.children():
        if granularity == "block" and isinstance(module, nn.ModuleList):
            if inside := _inside(child):
                yield child, inside
        else:
            yield from _owners(child, granularity)


def _assign(module: nn.Module, owners: dict[int, _Owner], start: int) -> None:
    """Modules may run inside of one another: each owner's weights lie behind those of the owners around it."""
    if owner := owners.get(id(module)):
        owner.start = start
        start += owner.nbytes
    for child in module.children():
        _assign(child, owners, start)


def _hooks(owner: _Owner, index: int, ahead: _Ahead | None) -> tuple[Any, Any]:
    def enter(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        if module.training:
            raise CompressedModelError("compressed weights are for inference: call model.eval(), or train the original model")
        for value in arguments:
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                if value.dtype != torch.bfloat16 and not torch.is_autocast_enabled(value.device.type):
                    raise CompressedModelError(
                        f"the compressed weights are bf16, the input is {value.dtype}: keep the model in torch.bfloat16"
                    )
                if value.requires_grad and torch.is_grad_enabled():
                    raise CompressedModelError("compressed weights have no gradients: call the model under torch.no_grad()")
        if ahead:
            ahead.enter(index)
        else:
            owner.fill()
        owner.show()

    def leave(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        owner.hide()

    return enter, leave
