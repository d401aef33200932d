"""Runs models with compressed weights faster: what is decompressed together, when, and where to.

A compressed weight decompresses itself wherever it is read, so nothing here need be done. `attach` decompresses all of a
transformer block's by one launch before the block runs, as the paper does (section 2.3.3), and the next block's meanwhile; or
takes another kernel. What was decompressed is lent to the block's tensors (`Held`) for as long as its forward lasts.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from df11 import ops, released
from df11.memory import aligned
from df11.modules import Pool, compressed_parameters, inside
from df11.ops import CompressedUnit
from df11.tensors import CompressedTensor, Held, Stored, Tiles, Units
from df11.tiled_ops import TiledWeight

MODES = ("exact", "fused")  # how a model runs: as here, or by df11/fused.py
GRANULARITIES = ("layer", "block")  # what is decompressed at a time in exact mode
KERNELS = ("fast", "paper", "released")


class Workspace:
    """The decode buffers of one model. It belongs to the model that `attach` was called on."""

    def __init__(self) -> None:
        self.turn = threading.RLock()  # held by the thread whose module has its weights in the buffers
        self._sizes: list[int] = []  # bytes of each buffer
        self._buffers: dict[tuple[torch.device, int], torch.Tensor] = {}
        self.largest = 0  # bytes of the largest weight, where each is decompressed by itself into memory that torch gives it
        self.active: list[_Owner] = []  # whose forward is running, the innermost last
        self._users: dict[tuple[torch.device, int], torch.cuda.Stream] = {}  # who used a buffer last

    def reserve(self, buffer: int, size: int) -> None:
        """Let a buffer have at least this many bytes. Memory is taken when it is first used."""
        self._sizes += [0] * (buffer + 1 - len(self._sizes))
        self._sizes[buffer] = max(self._sizes[buffer], size)

    def bytes(self, device: torch.device, buffer: int, start: int, size: int) -> torch.Tensor:
        """uint8[size] of a buffer on a device, for the current stream.

        While a CUDA graph is captured it is memory of the graph's own instead: its replays may run beside an eager call.
        """
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return torch.empty(size, dtype=torch.uint8, device=device)
        key = device, buffer
        if key not in self._buffers:
            self._buffers[key] = torch.empty(self._sizes[buffer], dtype=torch.uint8, device=device)
        return self._buffers[key][start : start + size]

    def take(self, device: torch.device, buffer: int) -> None:
        """Let the current stream, which will use a buffer, wait for another that did. A graph's own memory has no other user."""
        if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
            return
        stream = torch.cuda.current_stream(device)
        last = self._users.get((device, buffer))
        if last is not None and last != stream:
            stream.wait_stream(last)
        self._users[device, buffer] = stream

    @property
    def nbytes(self) -> int:
        """Bytes of what is decompressed at a time."""
        return self.largest or sum(buffer.nbytes for buffer in self._buffers.values())


Decode = Callable[[Sequence[CompressedUnit], Sequence[torch.Tensor]], None]


class _Owner:
    """A module before which weights are decompressed, and the part of the workspace that holds them: the decoded ones, then, where
    they come from host memory, the copy of what is stored. Weights stored as they are get used in that copy."""

    def __init__(self, module: nn.Module, tensors: list[CompressedTensor], workspace: Workspace, decode: Decode) -> None:
        self.module = module
        self.tensors = tensors
        self._attached = [(tensor._stored.arrays, tensor.numel()) for tensor in tensors]
        self._coded = [tensor.is_compressed for tensor in tensors]
        self.device = tensors[0].device  # where they are used
        self.pool: Pool | None = module.__dict__.get("_df11_pool")
        self.buffer = 0
        self.start = 0  # in the buffer
        self._workspace = workspace
        self._decode = decode
        sizes = [aligned(2 * t.numel()) if t.is_compressed and isinstance(t._stored, Units) else 0 for t in tensors]
        self._offsets = [sum(sizes[:i]) for i in range(len(sizes))]
        self._decoded = sum(sizes)  # bytes
        self.nbytes = self._decoded + (self.pool.nbytes if self.pool else 0)
        self._memory: torch.Tensor | None = None  # as it was when the views were made
        self._arrays: list[object] = []  # and what was stored then
        self._lent: list[tuple[Stored, torch.Tensor | TiledWeight]] = []
        self._coded_units: list[CompressedUnit] = []
        self._views: list[torch.Tensor] = []  # of each of these

    def fill(self) -> None:
        """Decompress, on the current stream."""
        for other in self._workspace.active:  # a block that calls this one loses what it was lent
            if other.buffer == self.buffer and other.start < self.start + self.nbytes and self.start < other.start + other.nbytes:
                other.hide()
        memory = self._workspace.bytes(self.device, self.buffer, self.start, self.nbytes)
        self._workspace.take(self.device, self.buffer)
        if self.pool:
            memory[self._decoded :].copy_(self.pool.memory, non_blocking=True)
        arrays = [_arrays(tensor) for tensor in self.tensors]
        here = self._memory is not None and self._memory.data_ptr() == memory.data_ptr()
        if not here or any(a is not b for a, b in zip(arrays, self._arrays, strict=True)):
            self._place(memory)  # after the copy: tables are built from what it brought
            self._arrays = arrays  # type: ignore[assignment]
        self._decode(self._coded_units, self._views)

    def is_stale(self) -> bool:
        """Whether weights were written since they were decompressed."""
        return any(_arrays(tensor) is not known for tensor, known in zip(self.tensors, self._arrays, strict=True))

    def _fits(self, index: int) -> bool:
        """Whether a weight can still be decompressed to its place: not if a write changed how it is stored, or it moved."""
        (arrays, numel), tensor = self._attached[index], self.tensors[index]
        if _arrays(tensor) is None:
            return False
        stored = tensor._stored
        if stored.arrays is arrays:
            return True
        return (
            self.pool is None
            and stored.numel == numel
            and (stored.raw is None) == self._coded[index]
            and stored.device == self.device
            and isinstance(stored, Units)
        )

    def take(self) -> None:
        """Before weights are used that were decompressed on another stream."""
        self._workspace.take(self.device, self.buffer)

    def _place(self, memory: torch.Tensor) -> None:
        self._memory, self._lent, self._coded_units, self._views = memory, [], [], []
        copies = self.pool.views(memory[self._decoded :]) if self.pool else []
        for i, (tensor, offset) in enumerate(zip(self.tensors, self._offsets, strict=True)):
            if not self._fits(i):
                continue
            stored = tensor._stored
            if isinstance(stored, Tiles):
                if stored.raw is None:
                    self._lent.append((stored, stored.weight_of(copies[i])))
                continue
            units = stored.units_of(copies[i]) if self.pool else stored.units()
            view = units[0].raw
            if view is None:
                view = memory[offset : offset + 2 * stored.numel].view(torch.bfloat16)
                self._coded_units += units
                self._views += view.chunk(len(units))
            self._lent.append((stored, view.view(stored.shape)))

    def show(self) -> None:
        """Lend the weights to their tensors, on the current stream."""
        self._workspace.active.append(self)
        for stored, weights in self._lent:
            stored.held = Held(weights, self.device)

    def leave(self) -> None:
        self._workspace.active.remove(self)
        self.hide()

    def hide(self) -> None:
        """Lend nothing any more: the tensors decompress themselves."""
        for stored, _ in self._lent:
            stored.held = None
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            self._memory, self._lent, self._views = None, [], []  # the next block takes the same place of the graph's memory


def _arrays(tensor: torch.Tensor) -> object:
    """What is stored of it; None where `.data =` or a cast has made it an ordinary tensor."""
    return tensor._stored.arrays if isinstance(tensor, CompressedTensor) else None


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
        if self._held.pop(owner.buffer, None) != index or owner.is_stale():
            owner.fill()
        owner.take()
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
    """Choose how a model's compressed weights are decompressed. It computes the same bits without this, and with any choice.

    granularity: `layer`, each weight where it is read; `block`, all of a transformer block's (an element of a ModuleList) before
    the block runs, by one launch into a workspace. kernel: `fast`, `paper` or `released` (on a GPU). prefetch (blocks only):
    decompress the next block on a second stream while one runs, into a second buffer. A second call replaces the first. What
    computes gradients, and code that torch.compile traces, decompresses each weight where it is read.
    """
    if granularity not in GRANULARITIES:
        raise ValueError(f"granularity={granularity!r}: choose one of {', '.join(GRANULARITIES)}")
    if kernel not in KERNELS:
        raise ValueError(f"kernel={kernel!r}: choose one of {', '.join(KERNELS)}")
    if granularity == "layer" and (prefetch or any(module.__dict__.get("_df11_pool") for module in model.modules())):
        raise ValueError("prefetched or offloaded weights go by whole blocks: granularity='block'")
    detach(model)
    workspace, decode = Workspace(), _decoder(kernel)
    chosen: Iterable[tuple[nn.Module, list[CompressedTensor]]] = ()
    if granularity == "block" or kernel != "fast":
        chosen = owners(model, granularity)
    else:
        workspace.largest = max((aligned(2 * tensor.numel()) for tensor in inside(model)), default=0)
    owned = [_Owner(module, tensors, workspace, decode) for module, tensors in chosen]
    _assign(model, {id(owner.module): owner for owner in owned}, 0)
    if prefetch:  # what runs inside of another would take the buffer of the next
        owned = [owner for owner in owned if not owner.start]
    ahead = _Ahead(owned) if prefetch else None
    for index, owner in enumerate(owned):
        if prefetch:
            owner.buffer = index % 2
        workspace.reserve(owner.buffer, owner.start + owner.nbytes)
    handles: list[Any] = []
    for index, owner in enumerate(owned):
        enter, leave = _hooks(owner, index, ahead, workspace)
        handles.append(owner.module.register_forward_pre_hook(enter, prepend=True, with_kwargs=True))
        handles.append(owner.module.register_forward_hook(leave, always_call=True))
    if ahead and owned and not isinstance(owned[0].module, nn.Embedding):  # others run before it
        begin, end = _around(ahead, workspace.turn)
        handles.append(model.register_forward_pre_hook(begin, prepend=True))
        handles.append(model.register_forward_hook(end, always_call=True))
    model.__dict__["_df11_hooks"] = handles
    return workspace


def detach(model: nn.Module) -> None:
    """Undo `attach`."""
    for handle in model.__dict__.pop("_df11_hooks", []):
        handle.remove()


def _around(ahead: _Ahead, turn: threading.RLock) -> tuple[_Hook, _Hook]:
    """Hooks of the whole model."""

    def begin(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        if not _needs_gradients(module, arguments):
            with turn:
                ahead.begin()

    def end(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        with turn:
            ahead.end()

    return _Hook(begin), _Hook(end)


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


def owners(module: nn.Module, granularity: str) -> Iterator[tuple[nn.Module, list[CompressedTensor]]]:
    """Modules before which something is decompressed, with what: tied weights once, and weights in host memory by a pool only."""
    if own := _here(module, compressed_parameters(module).values()):
        yield module, own
    for child in module.children():
        if granularity == "block" and isinstance(module, nn.ModuleList):
            if tensors := _here(child, inside(child)):
                yield child, tensors
        else:
            yield from owners(child, granularity)


def _here(module: nn.Module, tensors: Iterable[CompressedTensor]) -> list[CompressedTensor]:
    pooled = module.__dict__.get("_df11_pool") is not None
    """Those that are decompressed ahead. What is in the tiled layout is not, it only comes from host memory."""
    found = (t for t in tensors if pooled or (isinstance(t._stored, Units) and t._stored.device == t.device))
    return list({id(tensor._stored): tensor for tensor in found}.values())


def _assign(module: nn.Module, owners: dict[int, _Owner], start: int) -> None:
    """Modules may run inside of one another: each owner's weights lie behind those of the owners around it."""
    if owner := owners.get(id(module)):
        owner.start = max(owner.start, start)  # of a module with two parents
        start = owner.start + owner.nbytes
    for child in module.children():
        _assign(child, owners, start)


class _Hook:
    """A forward hook that copies and pickles of its model do without: their weights decompress themselves."""

    def __init__(self, work: Callable[..., None]) -> None:
        self.work = work

    def __call__(self, *arguments: Any) -> None:
        if not torch.compiler.is_compiling():
            self.work(*arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return _no_hook, ()


def _no_hook() -> Callable[..., None]:
    return _ignore


def _ignore(*arguments: object) -> None:
    return None


def _hooks(owner: _Owner, index: int, ahead: _Ahead | None, workspace: Workspace) -> tuple[_Hook, _Hook]:
    """What decompresses before a module's forward, for the thread whose turn it is, and what takes it back afterwards."""
    turn = workspace.turn
    mine = threading.local()  # mine.entered: whether each forward that this thread is in has decompressed something

    def enter(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        if not hasattr(mine, "entered"):
            mine.entered = []
        mine.entered.append(False)
        if _needs_gradients(module, (*arguments, *named.values())):
            return
        turn.acquire()
        mine.entered[-1] = True
        if ahead:
            ahead.enter(index)
        else:
            owner.fill()
        owner.show()

    def leave(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        if mine.entered.pop():
            if owner in workspace.active:
                owner.leave()
            turn.release()

    return _Hook(enter), _Hook(leave)


def _needs_gradients(module: nn.Module, arguments: tuple[Any, ...]) -> bool:
    """Whether autograd will look at what the module computes."""
    if not torch.is_grad_enabled():
        return False
    tensors = (*arguments, *module.parameters())
    return any(tensor.requires_grad for tensor in tensors if isinstance(tensor, torch.Tensor))
