"""Compressed weights inside ordinary torch modules.

A compressed parameter `weight` of a module becomes buffers: `weight` (the code stream, uint8), `weight_sign_mantissa`,
`weight_luts`, `weight_gaps`, `weight_output_positions`. The module's class and forward stay as they are: before it runs, a hook
decompresses into a workspace and puts the bf16 tensor in the buffer's place for as long as the forward lasts. So any module works
(Linear, Embedding with a scale, experts with three dimensions), and the same kernels see the same bits as in the original model.

`attach` chooses what is decompressed at a time: one layer, or a whole transformer block, as the paper does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from df11.ops import CompressedUnit, encode

PARTS = ("sign_mantissa", "luts", "gaps", "output_positions")
ALIGNMENT = 256  # bytes; as torch's allocator does at least, so that cuBLAS chooses as for a tensor of its own
GRANULARITIES = ("layer", "block")


class CompressedModelError(RuntimeError):
    """A compressed model used in a way that it cannot serve. The message says what to do instead."""


@dataclass
class CompressedParameter:
    """Where a parameter's compressed arrays are: buffers of `module`, which may be another's (tied weights)."""

    module: nn.Module
    name: str
    shape: tuple[int, ...]
    _unit: CompressedUnit | None = field(default=None, repr=False)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def unit(self) -> CompressedUnit:
        """The arrays as they are now; they move with the module."""
        stream = self.module._buffers[self.name]
        assert stream is not None
        if self._unit is None or self._unit.encoded_exponent is not stream:
            arrays = {"encoded_exponent": stream}
            for part in PARTS:
                array = self.module._buffers[f"{self.name}_{part}"]
                assert array is not None
                arrays[part] = array
            arrays["output_positions"] = arrays["output_positions"].view(torch.int32)
            unit = CompressedUnit.make((self.shape,), arrays, stream.device)
            if unit.encoded_exponent.data_ptr() == stream.data_ptr():
                object.__setattr__(unit, "encoded_exponent", stream)
            self._unit = unit
        return self._unit


def compressed_parameters(module: nn.Module) -> dict[str, CompressedParameter]:
    """A module's own compressed parameters by name."""
    found: dict[str, CompressedParameter] = module.__dict__.get("_df11", {})
    return found


def is_compressed(model: nn.Module) -> bool:
    return any(compressed_parameters(module) for module in model.modules())


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


class Workspace:
    """The decode buffers of one model: a stack of bytes a device. It belongs to the model that `attach` was called on."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity  # bytes
        self._buffers: dict[torch.device, torch.Tensor] = {}
        self._top = 0

    def push(self, parameters: list[CompressedParameter]) -> list[torch.Tensor]:
        """Room for these weights, each from a multiple of 256 bytes on."""
        views = []
        for parameter in parameters:
            device = parameter.unit().encoded_exponent.device
            if device not in self._buffers:
                self._buffers[device] = torch.empty(self.capacity, dtype=torch.uint8, device=device)
            end = self._top + 2 * parameter.numel
            views.append(self._buffers[device][self._top : end].view(torch.bfloat16))
            self._top = _aligned(end)
        return views

    def pop(self, parameters: list[CompressedParameter]) -> None:
        self._top -= sum(_aligned(2 * parameter.numel) for parameter in parameters)

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self._buffers.values())


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


Slots = list[tuple[nn.Module, str, CompressedParameter]]


def attach(model: nn.Module, granularity: str = "layer", kernel: str = "fast") -> Workspace:
    """Make a model with compressed parameters run: hooks, and a workspace as large as what is decompressed at a time.

    granularity: `layer`, each module's own weights before it runs; `block`, all of a transformer block's (an element of a
    ModuleList) before the block runs. A second call replaces the first. The model can only infer: gradients are switched off.
    """
    if granularity not in GRANULARITIES:
        raise ValueError(f"granularity={granularity!r}: choose one of {', '.join(GRANULARITIES)}")
    for handle in model.__dict__.pop("_df11_hooks", []):
        handle.remove()
    model.requires_grad_(False)
    owners = list(_owners(model, granularity))
    workspace = Workspace(_deepest(model, {id(owner): slots for owner, slots in owners}))
    handles: list[Any] = []
    for owner, slots in owners:
        enter, leave = _hooks(workspace, slots, kernel)
        handles.append(owner.register_forward_pre_hook(enter, prepend=True))
        handles.append(owner.register_forward_hook(leave, always_call=True))
    model.__dict__["_df11_hooks"] = handles
    model.__dict__["_df11_workspace"] = workspace
    return workspace


def _slots(module: nn.Module) -> Slots:
    return [(module, name, parameter) for name, parameter in compressed_parameters(module).items()]


def _owners(module: nn.Module, granularity: str) -> Iterator[tuple[nn.Module, Slots]]:
    """Modules before which something is decompressed, with what."""
    if own := _slots(module):
        yield module, own
    for child in module.children():
        if granularity == "block" and isinstance(module, nn.ModuleList):
            if inside := [slot for part in child.modules() for slot in _slots(part)]:
                yield child, inside
        else:
            yield from _owners(child, granularity)


def _deepest(module: nn.Module, slots: dict[int, Slots]) -> int:
    """Bytes of workspace in use at once at most: modules may run inside of one another."""
    own = sum(_aligned(2 * parameter.numel) for _, _, parameter in slots.get(id(module), []))
    return own + max((_deepest(child, slots) for child in module.children()), default=0)


def _hooks(workspace: Workspace, slots: Slots, kernel: str) -> tuple[Any, Any]:
    parameters = [parameter for _, _, parameter in slots]

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
        for (holder, name, parameter), view in zip(slots, workspace.push(parameters), strict=True):
            parameter.unit().decompress(view, kernel)
            # In the instance's dictionary it hides the buffer of the same name, which stays registered.
            holder.__dict__[name] = view.view(parameter.shape)

    def leave(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        present = [slot for slot in slots if slot[0].__dict__.pop(slot[1], None) is not None]
        if present:
            workspace.pop(parameters)

    return enter, leave
