"""Runs models with compressed parameters: what is decompressed when, and where to.

Before a module runs, a hook decompresses its weights into a workspace and puts the bf16 tensors in the buffers' place for as long
as the forward lasts: the same kernels see the same bits as in the original model. `attach` chooses what is decompressed at a time:
one layer, or a whole transformer block, as the paper does (section 2.3.3), and whether the next block is decompressed meanwhile.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from df11 import ops, released
from df11.memory import aligned
from df11.modules import CompressedParameter, Pool, compressed_parameters, inside
from df11.ops import CompressedUnit

GRANULARITIES = ("layer", "block")
KERNELS = ("fast", "paper", "released")


class CompressedModelError(RuntimeError):
    """A compressed model used in a way that it cannot serve. The message says what to do instead."""


Slots = list[tuple[nn.Module, str, CompressedParameter]]


class Workspace:
    """The decode buffers of one model. It belongs to the model that `attach` was called on."""

    def __init__(self) -> None:
        self.turn = threading.RLock()  # held by the thread whose module has its weights in the buffers
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
        self.pool: Pool | None = module.__dict__.get("_df11_pool")
        self.turns = 0  # how often the thread whose turn it is has entered
        self.buffer = 0
        self.start = 0  # in the buffer
        self._workspace = workspace
        self._decode = decode
        coded = [self.pool is None or parameter.unit().raw is None for _, _, parameter in slots]
        sizes = [aligned(2 * parameter.numel) if c else 0 for c, (_, _, parameter) in zip(coded, slots, strict=True)]
        self._offsets = [sum(sizes[:i]) for i in range(len(sizes))]
        self._decoded = sum(sizes)  # bytes
        self.nbytes = self._decoded + (self.pool.nbytes if self.pool else 0)
        self._units: list[CompressedUnit] = []  # as they were when the views were made
        self._views: list[torch.Tensor] = []

    @property
    def device(self) -> torch.device:
        return self.pool.device if self.pool else self.slots[0][2].unit().device

    def fill(self) -> None:
        """Decompress, on the current stream."""
        if self.pool:
            copy = self._workspace.bytes(self.pool.device, self.buffer, self.start + self._decoded, self.pool.nbytes)
            copy.copy_(self.pool.memory, non_blocking=True)
            if not self._units:  # made after the first copy: tables are built from what it brought
                arrays = self.pool.views(copy)
                units = [p.unit_of(a) for (_, _, p), a in zip(self.slots, arrays, strict=True)]
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
            memory = self._workspace.bytes(unit.device, self.buffer, self.start + offset, 2 * parameter.numel)
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
            self._fetch(index + 1)

    def begin(self) -> None:
        """Before a forward: the first owner's, while modules before it run."""
        self.end()
        self._fetch(0)

    def end(self) -> None:
        """After a forward: nothing is kept. In a graph capture that failed nothing was decompressed either."""
        self._held.clear()

    def _fetch(self, index: int) -> None:
        owner = self.owners[index]
        if side := self._side(owner.device):
            # Its buffer is free: who had it before has been launched by now, on this same stream.
            side.wait_stream(torch.cuda.current_stream(owner.device))
            self._busy = side
        with torch.cuda.stream(side):
            owner.fill()
        self._held[owner.buffer] = index

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
    owned = [_Owner(module, slots, workspace, decode) for module, slots in owners(model, granularity)]
    _assign(model, {id(owner.module): owner for owner in owned}, 0)
    ahead = _Ahead(owned) if prefetch else None
    for index, owner in enumerate(owned):
        if prefetch:
            if owner.start:
                raise ValueError(f"{type(owner.module).__name__} runs inside of another module with weights: prefetch=False")
            owner.buffer = index % 2
        workspace.reserve(owner.buffer, owner.start + owner.nbytes)
    handles: list[Any] = []
    for index, owner in enumerate(owned):
        enter, leave = _hooks(owner, index, ahead, workspace.turn)
        handles.append(owner.module.register_forward_pre_hook(enter, prepend=True))
        handles.append(owner.module.register_forward_hook(leave, always_call=True))
    if ahead and owned and not isinstance(owned[0].module, nn.Embedding):  # others run before it
        begin, end = _around(ahead, workspace.turn)
        handles.append(model.register_forward_pre_hook(begin, prepend=True))
        handles.append(model.register_forward_hook(end, always_call=True))
    model.__dict__["_df11_hooks"] = handles
    return workspace


def _around(ahead: _Ahead, turn: threading.RLock) -> tuple[Any, Any]:
    """Hooks of the whole model."""

    def begin(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        if not torch.compiler.is_compiling():
            with turn:
                ahead.begin()

    def end(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        if not torch.compiler.is_compiling():
            with turn:
                ahead.end()

    return begin, end


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


def _slots(module: nn.Module) -> Slots:
    return [(module, name, parameter) for name, parameter in compressed_parameters(module).items()]


def owners(module: nn.Module, granularity: str) -> Iterator[tuple[nn.Module, Slots]]:
    """Modules before which something is decompressed, with what."""
    if own := _slots(module):
        yield module, own
    for child in module.children():
        if granularity == "block" and isinstance(module, nn.ModuleList):
            if slots := inside(child):
                yield child, slots
        else:
            yield from owners(child, granularity)


def _assign(module: nn.Module, owners: dict[int, _Owner], start: int) -> None:
    """Modules may run inside of one another: each owner's weights lie behind those of the owners around it."""
    if owner := owners.get(id(module)):
        owner.start = start
        start += owner.nbytes
    for child in module.children():
        _assign(child, owners, start)


def _hooks(owner: _Owner, index: int, ahead: _Ahead | None, turn: threading.RLock) -> tuple[Any, Any]:
    def enter(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        if not torch.compiler.is_compiling():
            turn.acquire()
            owner.turns += 1
        check_input(module, *arguments[:1])  # the activations; experts get float32 routing weights too
        if ahead:
            ahead.enter(index)
        else:
            owner.fill()
        owner.show()

    def leave(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        owner.hide()
        if not torch.compiler.is_compiling() and owner.turns:
            owner.turns -= 1
            turn.release()

    return enter, leave


def check_input(module: nn.Module, x: Any = None) -> None:
    """Raise CompressedModelError where a module with compressed weights is trained, or would compute in another dtype than bf16."""
    if module.training:
        raise CompressedModelError("compressed weights are for inference: call model.eval(), or train the original model")
    linear = hasattr(module, "in_features")  # others may look something up
    if not isinstance(x, torch.Tensor) or not (x.is_floating_point() or linear):
        return
    if x.dtype != torch.bfloat16 and not (x.is_floating_point() and torch.is_autocast_enabled(x.device.type)):
        raise CompressedModelError(f"the compressed weights are bf16, the input is {x.dtype}: keep the model in torch.bfloat16")
    if x.requires_grad and torch.is_grad_enabled():
        raise CompressedModelError("compressed weights have no gradients: call the model under torch.no_grad()")
