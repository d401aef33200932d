"""mode=fused: products that read compressed weights and never write them to memory.

`fuse_` turns the matrices of a model, compressed or not, into tensors in the tiled layout (df11/tensors/tiled.py) where they are.
For few rows of activations a product is one to three kernels; for more the weights are decompressed and the product is the same as
ever, whichever was measured to be faster (df11/dispatch.py). The weights keep every bit; sums are made in another order than
cuBLAS's, so logits may differ in their last bits from those of mode=exact.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, MutableMapping
from typing import Any

import torch
from torch import nn

from df11.formats.tiled import ROWS
from df11.modules import replacement
from df11.runtime import attach
from df11.sources.model import check_patterns, is_matrix, is_selected
from df11.tensors import Merged, TiledTensor, Tiles, dense
from df11.tiled_ops import TiledWeight

UNUSED = 1 << 30  # bytes that torch may keep while weights are turned
_Pools = dict[torch.device, torch.cuda.MemPool]
MERGED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # layers of one input, in the order in which they are called


def fuse_(model: nn.Module, merge: bool = True, include: tuple[str, ...] = (), exclude: tuple[str, ...] = ()) -> list[str]:
    """Turn a model's bf16 matrices [rows, columns] into the tiled layout, in place, where they are. Returns their names.

    merge: store q, k and v, and gate and up, one below the other where a module has all of them, so that one product computes them.
    include, exclude: shell patterns of names. What has more dimensions or would not get smaller stays as it is: what of it is
    compressed in the published layout runs as `attach(model)` has it. Tied parameters stay one parameter. Where memory runs out the
    model still runs: each parameter is as it was or turned. Raises ValueError after `offload_`, and where a pattern matches no
    parameter.
    """
    if any(module.__dict__.get("_df11_pool") for module in model.modules()):
        raise ValueError("blocks are in host memory already: fuse_ the model first, then offload_ blocks")
    check_patterns((name for name, _ in model.named_parameters(remove_duplicate=False)), include, exclude)
    chosen = {
        id(parameter): f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and _is_fusible(parameter) and is_selected(f"{prefix}.{name}".lstrip("."), include, exclude)
    }
    pools: _Pools = {}
    names = (_fuse_merged(model, chosen, pools) if merge else []) + _fuse_each(model, chosen, pools)
    names += _fuse_offloaded(model, include, exclude)
    attach(model)
    if pools:
        torch.cuda.empty_cache()
    for device in {parameter.device for parameter in model.parameters() if parameter.is_cuda}:
        torch.cuda.synchronize(device)  # the kernels begin before what comes before them has ended: the arrays must be there
    return names


def is_fused(model: nn.Module) -> bool:
    return any(isinstance(parameter, TiledTensor) for parameter in model.parameters())


def _is_fusible(parameter: torch.Tensor) -> bool:
    fits = is_matrix(parameter.dtype, parameter.shape) and parameter.dim() == 2 and parameter.is_contiguous()
    return fits and not parameter.is_meta and not isinstance(parameter, TiledTensor)


def _fuse_merged(model: nn.Module, chosen: dict[int, str], pools: _Pools) -> list[str]:
    uses = Counter(id(p) for module in model.modules() for p in module._parameters.values())
    groups: dict[tuple[int, ...], list[list[nn.Linear]]] = {}  # by their weights: tied ones are of several modules
    for parent, names in itertools.product(model.modules(), MERGED):
        layers = [layer for name in names if type(layer := getattr(parent, name, None)) is nn.Linear]
        if len(layers) == len(names):
            groups.setdefault(tuple(id(layer.weight) for layer in layers), []).append(layers)
    done = []
    for key, tied in groups.items():
        layers = tied[0]
        if all(id_ in chosen and uses[id_] == len(tied) for id_ in key) and _fit_together(layers):
            weight = TiledWeight.encode(torch.cat([dense(layer.weight.detach()) for layer in layers]))
            if weight is None:
                continue
            sizes, biases = [layer.out_features for layer in layers], [layer.bias for layer in layers if layer.bias is not None]
            joined = torch.cat([bias.detach() for bias in biases]) if biases else None
            whole = TiledTensor.make(_store(weight, pools, Merged(sizes, biases, joined)), weight.shape)
            for bias, first in zip(biases, itertools.accumulate(sizes, initial=0), strict=False):
                bias.data = joined[first : first + bias.numel()]  # type: ignore[index]
            for index, part in enumerate(torch.split(whole, sizes)):
                made = replacement(layers[index].weight, part)
                for each in tied:
                    each[index]._parameters["weight"] = made
            done += [chosen.pop(id_) for id_ in key]
    return done


def _fit_together(layers: list[nn.Linear]) -> bool:
    """Whether they are different, each begins with a tile, and biases are of all of them, and bf16, or of none."""
    weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers if layer.bias is not None]
    if len({*map(id, weights), *map(id, biases)}) < len(weights) + len(biases):
        return False
    alike = len({(w.shape[1], w.device) for w in weights}) == 1 and not any(w.shape[0] % ROWS for w in weights[:-1])
    return alike and len(biases) in (0, len(layers)) and all(b.dtype == torch.bfloat16 for b in biases)


def _fuse_each(model: nn.Module, chosen: dict[int, str], pools: _Pools) -> list[str]:
    became: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}  # a parameter, kept so that its id stays its own: tied ones stay one
    done = []
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or id(parameter) not in chosen:
                continue
            if id(parameter) not in became:
                weight = TiledWeight.encode(dense(parameter.detach()))
                if weight is None:
                    continue
                stored = _store(weight, pools)
                became[id(parameter)] = parameter, replacement(parameter, TiledTensor.make(stored, stored.shape))
                done.append(chosen[id(parameter)])
            module._parameters[name] = became[id(parameter)][1]
    return done


def _fuse_offloaded(model: nn.Module, include: tuple[str, ...], exclude: tuple[str, ...]) -> list[str]:
    """What accelerate keeps in host memory and brings to the GPU for each forward: turned there, one at a time."""
    became: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    done = []
    for prefix, module in model.named_modules():
        for weights, key, name, device in _offloaded(module):
            parameter, full = weights[key], f"{prefix}.{name}".lstrip(".")
            if not _is_fusible(parameter) or not is_selected(full, include, exclude):
                continue
            if id(parameter) not in became:
                weight = TiledWeight.encode(dense(parameter.detach()).to(device))
                if weight is None:
                    continue
                tensor = TiledTensor.make(Tiles.of(weight).to(parameter.device), parameter.shape)
                became[id(parameter)] = parameter, replacement(parameter, tensor)
                done.append(full)
            weights[key] = became[id(parameter)][1]
    return done


def _offloaded(module: nn.Module) -> Iterator[tuple[MutableMapping[str, torch.Tensor], str, str, torch.device]]:
    """Of a module's parameters on the meta device: where accelerate's hook has the weights, under which key; the parameter's name;
    and the device where they are used."""
    hook: Any = module.__dict__.get("_hf_hook")
    for one in getattr(hook, "hooks", (hook,)):
        kept = getattr(one, "weights_map", None)
        weights = getattr(kept, "dataset", kept)
        weights = getattr(weights, "state_dict", weights)
        for name, parameter in module._parameters.items():
            key = f"{getattr(kept, 'prefix', '')}{name}"
            if parameter is not None and parameter.is_meta and isinstance(weights, MutableMapping) and key in weights:
                yield weights, key, name, torch.device(one.execution_device)


def _store(weight: TiledWeight, pools: _Pools, merged: Merged | None = None) -> Tiles:
    """On a GPU apart from all other memory: between what takes the places of larger weights 4 to 6 % of its bytes would be lost."""
    device = weight.low.device
    if device.type != "cuda":
        return Tiles.of(weight, merged)
    with torch.cuda.device(device):
        if torch.cuda.memory_reserved() - torch.cuda.memory_allocated() > UNUSED:
            torch.cuda.empty_cache()
        if device not in pools:
            pools[device] = torch.cuda.MemPool()
        with torch.cuda.use_mem_pool(pools[device]):
            return Tiles.of(weight.joined(), merged)
