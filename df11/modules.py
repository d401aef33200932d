"""Models whose weights are compressed tensors: how they become so, where they are kept, what they take."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from df11 import memory, ops
from df11.sources.model import check_patterns, is_matrix, is_selected
from df11.tensors import CompressedTensor, Stored, Units, attached, in_memory_order


def compressed_parameters(module: nn.Module) -> dict[str, CompressedTensor]:
    """A module's own compressed (or offloaded) parameters by name."""
    found: dict[str, Any] = {name: p for name, p in module._parameters.items() if isinstance(p, CompressedTensor)}
    return found


def is_compressed(model: nn.Module) -> bool:
    return any(p.is_compressed for module in model.modules() for p in compressed_parameters(module).values())


def compress_(model: nn.Module, include: tuple[str, ...] = (), exclude: tuple[str, ...] = ()) -> list[str]:
    """Compress a model's bf16 matrices in place, where they are, each as a unit of its own. Returns their names.

    include, exclude: shell patterns of names. Weights that have no code (Inf, NaN, 2^113 and more) stay as they are. Tied
    parameters stay one parameter. Raises ValueError where a pattern matches no parameter, or a matrix is on the meta device, as
    what accelerate offloads is; the model is then as it was.
    """
    check_patterns((name for name, _ in model.named_parameters(remove_duplicate=False)), include, exclude)
    for prefix, module in model.named_modules():
        _chosen(module, prefix, include, exclude)
    done: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}  # a parameter, kept so that its id stays its own, and what it becomes
    names = []
    for prefix, module in list(model.named_modules()):
        for name, parameter in list(module._parameters.items()):
            if id(parameter) in done:
                module._parameters[name] = done[id(parameter)][1]
        before = dict(module._parameters)
        names += compress_own_(module, prefix, include, exclude)
        for name, parameter in before.items():
            after = module._parameters[name]
            if parameter is not None and after is not None and after is not parameter:
                done[id(parameter)] = parameter, after
    return names


def compress_own_(module: nn.Module, prefix: str = "", include: tuple[str, ...] = (), exclude: tuple[str, ...] = ()) -> list[str]:
    """Compress a module's own bf16 matrices as `compress_` does, not its children's."""
    names = []
    for name, full, parameter in _chosen(module, prefix, include, exclude):
        tensor = compressed(parameter)
        if tensor is not parameter:
            module._parameters[name] = replacement(parameter, tensor)
            names.append(full)
    return names


def compressed(tensor: torch.Tensor) -> torch.Tensor:
    """A bf16 matrix compressed where it is; as it was, where it is none or has a weight without a code."""
    if not is_matrix(tensor.dtype, tensor.shape) or tensor.is_meta:
        return tensor
    if isinstance(tensor, CompressedTensor):
        if tensor._alone() is not None:
            return tensor
        tensor = tensor.decompress()  # a part of another
    made = CompressedTensor(tensor)
    return made if made.is_compressed else tensor


def decompress_(model: nn.Module) -> list[str]:
    """Turn compressed parameters into ordinary ones, the same bits, tied ones into one. Returns their names."""
    done: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
    names = []
    for prefix, module in model.named_modules():
        for name, tensor in compressed_parameters(module).items():
            if id(tensor) not in done:
                done[id(tensor)] = tensor, replacement(tensor, tensor.decompress())  # type: ignore[assignment]
                names.append(f"{prefix}.{name}" if prefix else name)
            module._parameters[name] = done[id(tensor)][1]
    return names


def replacement(parameter: torch.Tensor, tensor: torch.Tensor) -> nn.Parameter:
    """A frozen parameter in the place of another, with what others have attached to that one."""
    made = nn.Parameter(tensor, requires_grad=False)
    made.__dict__.update(attached(parameter))
    return made


def decompressed(tensors: Sequence[CompressedTensor]) -> list[torch.Tensor]:
    """Whole compressed tensors of one device, decompressed by one launch."""
    weights = torch.empty(sum(tensor.numel() for tensor in tensors), dtype=torch.bfloat16, device=tensors[0].device)
    units = [unit for tensor in tensors for unit in tensor.units()]
    ops.decompress(units, weights.split([unit.numel for unit in units]))
    each = zip(weights.split([tensor.numel() for tensor in tensors]), tensors, strict=True)
    return [part.as_strided(tensor.size(), tensor.stride(), part.storage_offset()) for part, tensor in each]


def _chosen(
    module: nn.Module, prefix: str, include: tuple[str, ...], exclude: tuple[str, ...]
) -> list[tuple[str, str, nn.Parameter]]:
    """A module's own matrices to compress, with their names in the module and in the model. Raises ValueError where one has no
    bits to compress, as it is on the meta device."""
    chosen = []
    for name, parameter in module._parameters.items():
        full = f"{prefix}.{name}" if prefix else name
        if parameter is None or isinstance(parameter, CompressedTensor):
            continue
        if is_matrix(parameter.dtype, parameter.shape) and is_selected(full, include, exclude):
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
    are copied there before it runs, in one piece; without, each for itself when it is read. Returns their names. Raises ValueError
    where the model has fewer blocks.
    """
    place = torch.device(device) if device is not None else next(model.parameters()).device
    found = list(_blocks(model))
    if not 0 <= blocks <= len(found):
        raise ValueError(f"blocks={blocks}: the model has {len(found)} transformer blocks")
    names = []
    replaced: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
    for prefix, block in found[len(found) - blocks :]:
        for name, module in block.named_modules():
            for leaf, parameter in module._parameters.items():
                if parameter is None or not is_matrix(parameter.dtype, parameter.shape):
                    continue
                if id(parameter) not in replaced:
                    replaced[id(parameter)] = parameter, _elsewhere(parameter, place)
                names.append(".".join(filter(None, (prefix, name, leaf))))
        for module in model.modules():
            for leaf, parameter in module._parameters.items():
                if id(parameter) in replaced:
                    module._parameters[leaf] = replaced[id(parameter)][1]
        block.__dict__["_df11_pool"] = Pool([tensor._stored for tensor in inside(block)], place)
    model._apply(lambda tensor: tensor.to(place))  # type: ignore[no-untyped-call]
    return names


def _elsewhere(parameter: nn.Parameter, device: torch.device) -> nn.Parameter:
    """A parameter that computes on a device, wherever its weights are stored."""
    size, stride = parameter.shape, parameter.stride()
    if not isinstance(parameter, CompressedTensor):
        weights, shape = in_memory_order(parameter.detach())
        return replacement(parameter, CompressedTensor.make(Units({"raw": weights}, (), shape), size, stride, device=device))
    return replacement(parameter, type(parameter).make(parameter._stored, size, stride, parameter.storage_offset(), device=device))


def stored_bytes(model: nn.Module) -> dict[str, int]:
    """Bytes of all parameters and buffers, decode tables included, by where they are: `gpu` and `host`."""
    tensors: list[torch.Tensor] = []
    for tensor in (*model.parameters(), *model.buffers()):
        tensors += tensor._stored.arrays.values() if isinstance(tensor, CompressedTensor) else [tensor]
    sizes = {(tensor.device, tensor.data_ptr()): tensor.nbytes for tensor in tensors if tensor.numel()}
    on_gpu = sum(size for (device, _), size in sizes.items() if device.type == "cuda")
    return {"gpu": on_gpu, "host": sum(sizes.values()) - on_gpu}


class Pool:
    """The arrays of one block's tensors in one piece of host memory, pinned where there is a GPU. They become views of it."""

    def __init__(self, stored: list[Stored], device: torch.device) -> None:
        self.device = device
        self._arrays = [one.kept() for one in stored]  # as they lie here, whatever is written to the weights later
        *self._places, self.nbytes = memory.places(array for arrays in self._arrays for array in arrays.values())
        self.memory = _pinned(self.nbytes) if device.type == "cuda" else torch.empty(self.nbytes, dtype=torch.uint8)
        self._arrays = self.views(self.memory)
        for one, views in zip(stored, self._arrays, strict=True):
            for name, array in one.kept().items():
                views[name].copy_(array)
            one.assign(type(one)(views, one.numbers, one.shape))

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles have arrays of their own: no pool."""
        return type(None), ()

    def views(self, piece: torch.Tensor) -> list[dict[str, torch.Tensor]]:
        """Each one's arrays in the pool's memory, or in a copy of it."""
        places = iter(self._places)
        return [{name: memory.view(piece, next(places), array) for name, array in arrays.items()} for arrays in self._arrays]


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


def inside(module: nn.Module) -> list[CompressedTensor]:
    """Compressed parameters of a module and of all within it, tied ones once."""
    found = (tensor for part in module.modules() for tensor in compressed_parameters(part).values())
    return list({id(tensor._stored): tensor for tensor in found}.values())
