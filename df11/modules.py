"""Compressed weights inside ordinary torch modules: how they are stored. How they run: df11/runtime.py.

A compressed parameter `weight` of a module becomes buffers: `weight` (the code stream, uint8), `weight_sign_mantissa`,
`weight_luts`, `weight_gaps`, `weight_output_positions`. The module's class and forward stay as they are, so any module can have
them (Linear, Embedding with a scale, experts with three dimensions). `offload_` keeps what is stored of some blocks in host memory.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from df11 import memory
from df11.ops import CompressedUnit, encode
from df11.sources import is_matrix, is_selected

PARTS = ("sign_mantissa", "luts", "gaps", "output_positions")


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
        if self._unit is None or not (stream is self._unit.encoded_exponent or stream is self._unit.raw):
            self._unit = self.unit_of(self.arrays)
        return self._unit

    def unit_of(self, arrays: dict[str, torch.Tensor]) -> CompressedUnit:
        """A unit of these arrays, none of them copied."""
        stream = arrays[""]
        if stream.dtype == torch.bfloat16:
            return CompressedUnit.make((self.shape,), {"raw": stream}, stream.device)
        parts = arrays | {"encoded_exponent": stream, "output_positions": arrays["output_positions"].view(torch.int32)}
        return CompressedUnit.make((self.shape,), parts, stream.device)


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

    Weights that have no code (Inf, NaN, 2^113 and more) stay as they are. Tied parameters are compressed once. Raises ValueError
    where a matrix is on the meta device, as what accelerate offloads is; the model is then as it was.
    """
    for prefix, module in model.named_modules():
        _chosen(module, prefix, include, exclude)
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
    names = []
    for name, full, parameter in _chosen(module, prefix, include, exclude):
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


def _chosen(
    module: nn.Module, prefix: str, include: tuple[str, ...], exclude: tuple[str, ...]
) -> list[tuple[str, str, nn.Parameter]]:
    """A module's own matrices to compress, with their names in the module and in the model. Raises ValueError where one has no
    bits to compress, as it is on the meta device."""
    chosen = []
    for name, parameter in module._parameters.items():
        full = f"{prefix}.{name}" if prefix else name
        if parameter is not None and is_matrix(parameter.dtype, parameter.shape) and is_selected(full, include, exclude):
            if parameter.is_meta:
                raise ValueError(
                    f"{full} is offloaded (device_map with cpu or disk): compress it in host memory first (df11 compress),"
                    " or use a device_map without them"
                )
            chosen.append((name, full, parameter))
    return chosen


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
        pool = block.__dict__["_df11_pool"] = Pool([parameter for _, _, parameter in inside(block)], place)
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


class Pool:
    """The arrays of one block's parameters in one piece of host memory, pinned where there is a GPU. Their buffers become views."""

    def __init__(self, parameters: list[CompressedParameter], device: torch.device) -> None:
        self.device = device
        self.parameters = parameters
        *self._places, self.nbytes = memory.places(array for parameter in parameters for array in parameter.arrays.values())
        self.memory = _pinned(self.nbytes) if device.type == "cuda" else torch.empty(self.nbytes, dtype=torch.uint8)
        for parameter, views in zip(parameters, self.views(self.memory), strict=True):
            for part, array in parameter.arrays.items():
                parameter.module._buffers[parameter.array_name(part)] = views[part].copy_(array)

    def views(self, piece: torch.Tensor) -> list[dict[str, torch.Tensor]]:
        """Each parameter's arrays in the pool's memory, or in a copy of it."""
        places = iter(self._places)
        every = (parameter.arrays for parameter in self.parameters)
        return [{part: memory.view(piece, next(places), array) for part, array in arrays.items()} for arrays in every]


def _pinned(size: int) -> torch.Tensor:
    """Page-locked host memory of just this size (torch's own allocator rounds up to a power of two)."""
    piece = torch.empty(size, dtype=torch.uint8)
    torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(piece.data_ptr(), size, 0))
    weakref.finalize(piece.untyped_storage(), torch.cuda.cudart().cudaHostUnregister, piece.data_ptr())
    return piece


def _blocks(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Transformer blocks and their names: the elements of the outermost ModuleLists."""
    for name, child in module.named_children():
        full = f"{prefix}.{name}" if prefix else name
        if isinstance(module, nn.ModuleList):
            yield full, child
        else:
            yield from _blocks(child, full)


def inside(module: nn.Module) -> list[tuple[nn.Module, str, CompressedParameter]]:
    """Compressed parameters of a module and of all within it, with the module and the name under which each is used."""
    return [(part, name, parameter) for part in module.modules() for name, parameter in compressed_parameters(part).items()]
