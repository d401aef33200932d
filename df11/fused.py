"""mode=fused: products that read compressed weights and never write them to memory.

`fuse_` turns the linear layers and embeddings of a model, compressed or not, into the tiled layout where they are. For few rows of
activations a product is one to three kernels; for more the layer decompresses its weights and calls the same product as ever,
whichever was measured to be faster (df11/dispatch.py). The weights keep every bit; sums are made in another order than cuBLAS's, so
logits may differ in their last bits from those of mode=exact.
"""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from collections.abc import Sequence
from typing import Any, TypeGuard

import torch
from torch import nn

from df11 import dispatch
from df11.runtime import CompressedModelError, attach
from df11.tensors import dense
from df11.tiled_ops import ARRAYS, TiledWeight

_TURN = threading.RLock()  # held by the thread in whose embedding the weights are
UNUSED = 1 << 30  # bytes that torch may keep while weights are turned
_Pools = dict[torch.device, torch.cuda.MemPool]
MERGED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # layers of one input, in the order in which they are called


class Stored(nn.Module):
    """A matrix's arrays as buffers, which move with the module."""

    def __init__(self, weight: TiledWeight) -> None:
        super().__init__()
        self.shape, self.uppers = weight.shape, weight.uppers
        self._weight: TiledWeight | None = None
        self._addresses: list[int] = []  # of the arrays that it was made of
        for name in ARRAYS:
            self.register_buffer(name, getattr(weight, name), persistent=False)

    def _save_to_state_dict(self, *given: Any, **named: Any) -> None:
        raise CompressedModelError("the tiled layout is not stored: save the model of mode=exact, before fuse_")

    def _apply(self, *given: Any, **named: Any) -> nn.Module:
        self._weight = None  # or what the module leaves behind would stay in memory
        moved: nn.Module = super()._apply(*given, **named)  # type: ignore[no-untyped-call]
        return moved

    def __getstate__(self) -> dict[str, Any]:
        """With arrays of their own: torch.save refuses tensors of several dtypes in one allocation."""
        return self.__dict__ | {"_weight": None, "_buffers": {name: array.clone() for name, array in self._arrays().items()}}

    def _arrays(self) -> dict[str, torch.Tensor]:
        return {name: self._buffers[name] for name in ARRAYS}  # type: ignore[misc]  # none is None

    def get(self) -> TiledWeight:
        arrays = self._arrays()
        if torch.compiler.is_compiling():
            return TiledWeight(self.shape, **arrays, uppers=self.uppers)
        addresses = [array.data_ptr() for array in arrays.values()]
        if self._weight is None or addresses != self._addresses:
            self._weight = TiledWeight(self.shape, **arrays, uppers=self.uppers)
            self._addresses = addresses
        return self._weight


class FusedLinear(nn.Module):
    """A linear layer, or the first of several with the same input, which it computes as one product."""

    def __init__(self, stored: Stored, bias: torch.Tensor | None, sizes: Sequence[int]) -> None:
        super().__init__()
        self.stored = stored
        self.bias: torch.Tensor | None
        self.register_buffer("bias", bias, persistent=False)
        self.sizes = list(sizes)
        self.in_features, self.out_features = stored.shape[1], self.sizes[0]
        self.kept: tuple[torch.Tensor, list[torch.Tensor]] | None = None  # the input, and the others' outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        own, *others = self.parts(x)
        if others:
            self.kept = x, others
        return own

    def parts(self, x: torch.Tensor) -> list[torch.Tensor]:
        """The outputs of all layers that it stands for."""
        self._check(x)
        weight = self.stored.get()
        # Of a model on several GPUs accelerate's hooks brought inputs here; they went with the layer that this one replaces.
        x = x.to(weight.low.device, torch.bfloat16)  # another dtype is autocast's
        y = dispatch.linear(weight, x, self.bias)
        return list(y.split(self.sizes, -1)) if len(self.sizes) > 1 else [y]  # type: ignore[no-untyped-call]

    def _check(self, x: torch.Tensor) -> None:
        if self.training:
            raise CompressedModelError("fused products are for inference: call model.eval(), or train the model in mode=exact")
        if x.dtype != torch.bfloat16 and not (x.is_floating_point() and torch.is_autocast_enabled(x.device.type)):
            raise CompressedModelError(f"the compressed weights are bf16, the input is {x.dtype}: keep the model in torch.bfloat16")
        if x.requires_grad and torch.is_grad_enabled():
            raise CompressedModelError(
                "fused products have no gradients: call the model under torch.no_grad(), or take mode='exact'"
            )

    @property
    def weight(self) -> torch.Tensor:
        """Its own weights, decompressed anew each time: for code that asks for their dtype or reads them once."""
        return self.stored.get().decompress()[: self.out_features]


class FollowingLinear(nn.Module):
    """A linear layer that a FusedLinear before it has computed, if it had the same input (in cross-attention it has not)."""

    def __init__(self, leader: FusedLinear, index: int) -> None:
        super().__init__()
        self._leader = (leader,)  # in a tuple it is no child: its weights are its own
        self.index = index
        self.in_features, self.out_features = leader.in_features, leader.sizes[index]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = self.leader.kept
        if kept is None or kept[0] is not x:
            return self.leader.parts(x)[self.index]
        if self.index == len(self.leader.sizes) - 1:
            self.leader.kept = None
        return kept[1][self.index - 1]

    @property
    def leader(self) -> FusedLinear:
        return self._leader[0]

    @property
    def weight(self) -> torch.Tensor:
        """As FusedLinear.weight."""
        start = sum(self.leader.sizes[: self.index])
        return self.leader.stored.get().decompress()[start : start + self.out_features]


def fuse_(model: nn.Module, merge: bool = True) -> int:
    """Turn a model's linear layers and embeddings into the tiled layout, in place, where they are. Returns how many.

    merge: compute q, k and v, and gate and up, by one product where a module has all of them. What has another class, or would
    not get smaller, stays as it is: what of it is compressed in the published layout runs as `attach(model)` has it. Raises
    CompressedModelError where weights are offloaded.
    """
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if tensor.is_meta:
            raise CompressedModelError(
                f"{name} is offloaded, but mode=fused needs all weights in place: take mode='exact', "
                "or a device_map without 'cpu' and 'disk'"
            )
    if any(module.__dict__.get("_df11_pool") for module in model.modules()):
        raise CompressedModelError("blocks are offloaded, but mode=fused needs all weights in place: fuse_ before offload_")
    pools: _Pools = {}
    count = (_fuse_merged(model, pools) if merge else 0) + _fuse_each(model, pools)
    attach(model)
    if pools:
        torch.cuda.empty_cache()
    if hasattr(model, "tie_weights"):
        model.__dict__["tie_weights"] = _tied_already  # transformers' looks for parameters
    for device in {buffer.device for buffer in model.buffers() if buffer.is_cuda}:
        torch.cuda.synchronize(device)  # the kernels begin before what comes before them has ended: the arrays must be there
    return count


def _store(weight: TiledWeight, pools: _Pools) -> Stored:
    """On a GPU apart from all other memory: between what takes the places of larger weights 4 to 6 % of its bytes would be lost."""
    device = weight.low.device
    if device.type != "cuda":
        return Stored(weight)
    with torch.cuda.device(device):
        if torch.cuda.memory_reserved() - torch.cuda.memory_allocated() > UNUSED:
            torch.cuda.empty_cache()
        if device not in pools:
            pools[device] = torch.cuda.MemPool()
        with torch.cuda.use_mem_pool(pools[device]):
            return Stored(weight.joined())


def _fuse_merged(model: nn.Module, pools: _Pools) -> int:
    uses = Counter(id(child) for parent in model.modules() for child in parent._modules.values())
    count = 0
    for parent, names in itertools.product(list(model.modules()), MERGED):
        found = [getattr(parent, name, None) for name in names]
        layers = [layer for layer in found if _is_linear(layer) and uses[id(layer)] == 1]
        if len(layers) != len(names):
            continue
        weights = [dense(layer.weight.detach()) for layer in layers]
        if len({(w.shape[1], w.device, layer.bias is None) for w, layer in zip(weights, layers, strict=True)}) != 1:
            continue
        if (weight := TiledWeight.encode(torch.cat(weights))) is None:
            continue
        biases = [layer.bias.detach() for layer in layers if layer.bias is not None]
        leader = FusedLinear(_store(weight, pools), torch.cat(biases) if biases else None, [layer.out_features for layer in layers])
        for layer in layers:
            del layer._parameters["weight"]
        setattr(parent, names[0], leader.eval())
        for index, name in enumerate(names[1:], 1):
            setattr(parent, name, FollowingLinear(leader, index).eval())
        count += len(layers)
    return count


def _fuse_each(model: nn.Module, pools: _Pools) -> int:
    stored: dict[int, Stored] = {}  # by the parameter: tied ones are stored once
    fused: dict[int, tuple[nn.Module, nn.Module]] = {}  # a layer, kept so that its id stays its own, and what it becomes
    for parent in list(model.modules()):
        for name, layer in list(parent._modules.items()):
            if id(layer) not in fused:
                if not (_is_linear(layer) or (isinstance(layer, nn.Embedding) and _is_bf16(layer))):
                    continue
                key = id(layer.weight)
                if key not in stored:
                    if (weight := TiledWeight.encode(dense(layer.weight.detach()))) is None:
                        continue
                    stored[key] = _store(weight, pools)
                became = (
                    _fuse_embedding(layer, stored[key]) if isinstance(layer, nn.Embedding) else _fuse_linear(layer, stored[key])
                )
                fused[id(layer)] = layer, became
            setattr(parent, name, fused[id(layer)][1])
    return len(fused)


def _tied_already(*arguments: object, **named: object) -> None:
    """Tied layers share what is stored; nothing else is to be done."""


def weights_of(layer: nn.Module) -> torch.Tensor | None:
    """The weights of a fused layer or embedding, decompressed, bf16; None of another module."""
    if isinstance(layer, FollowingLinear | FusedLinear):
        return layer.weight
    stored = layer._modules.get("stored")
    return stored.get().decompress() if isinstance(stored, Stored) else None


def is_fused(model: nn.Module) -> bool:
    return any(isinstance(module, Stored) for module in model.modules())


def _is_linear(layer: object) -> TypeGuard[nn.Linear]:
    """Only the class itself: others have forwards of their own."""
    return type(layer) is nn.Linear and _is_bf16(layer)


def _is_bf16(layer: nn.Module) -> bool:
    parameter = layer._parameters.get("weight")
    return parameter is not None and parameter.dtype == torch.bfloat16


def _fuse_linear(layer: nn.Linear, stored: Stored) -> FusedLinear:
    bias = None if layer.bias is None else layer.bias.detach()
    del layer._parameters["weight"]  # hooks and the layer refer to each other: it would stay until Python looks for cycles
    return FusedLinear(stored, bias, [layer.out_features]).eval()


def _fuse_embedding(layer: nn.Embedding, stored: Stored) -> nn.Embedding:
    """The class and its forward stay, so a scaled embedding stays one: for a call it gets the rows that it needs as its weights,
    or, where its forward is no look-up of its first argument, all of them."""
    del layer._parameters["weight"]
    layer.add_module("stored", stored)
    layer.padding_idx = None  # matters for gradients only, and has no place among the rows of a call
    layer.__dict__["_df11_by_rows"] = type(layer).forward is nn.Embedding.forward or _looks_up(layer)
    layer.register_forward_pre_hook(_enter_embedding)
    layer.register_forward_hook(_leave_embedding, always_call=True)
    return layer


def _stored(layer: nn.Module) -> Stored:
    found = layer.get_submodule("stored")
    assert isinstance(found, Stored)
    return found


@torch.no_grad()
def _looks_up(layer: nn.Embedding) -> bool:
    """Whether rows and ids that count up from 0 give a subclass's forward what all rows and the ids themselves do."""
    weight = _stored(layer).get()
    ids = torch.tensor([[weight.shape[0] - 1, 0, weight.shape[0] // 2]], device=weight.low.device)
    found = []
    try:
        for weights, asked in (
            (weight.decompress(), ids),
            (weight.rows(ids.reshape(-1)), torch.arange(3, device=ids.device).view(1, 3)),
        ):
            layer.__dict__["weight"] = weights
            found.append(layer.forward(asked))
    except (RuntimeError, TypeError, ValueError, IndexError):
        return False
    finally:
        layer.__dict__.pop("weight", None)
    return torch.equal(*found)


def _enter_embedding(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    if not torch.compiler.is_compiling():
        _TURN.acquire()
        module.__dict__["_df11_turn"] = True
    weight = _stored(module).get()
    # Ids given by name, or so many that they need most tiles, which have sixteen rows.
    if not module.__dict__["_df11_by_rows"] or not arguments or arguments[0].numel() * 16 >= weight.shape[0]:
        module.__dict__["weight"] = weight.decompress()
        return arguments
    ids, *others = arguments
    module.__dict__["weight"] = weight.rows(ids.reshape(-1).to(weight.low.device, torch.int64))
    return (torch.arange(ids.numel(), device=ids.device).view(ids.shape), *others)


def _leave_embedding(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
    if "weight" in module.__dict__:
        delattr(module, "weight")  # torch 2.11 cannot compile `pop`
    if not torch.compiler.is_compiling() and module.__dict__.pop("_df11_turn", False):
        _TURN.release()
