"""GPU memory limited to that of a smaller card, and the models of synthetic weights that run in it."""

from __future__ import annotations

import gc
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers

from df11 import fused, hf, modules
from df11.sources import ModelSpec, split_units
from experiments.config import Config

MIB = 1 << 20
# What the process may still take beyond torch's limit: kernels loaded late, and the last of the 20 MiB pages that are mapped whole.
LATE = 32 * MIB


@dataclass(frozen=True)
class Budget:
    """A card of `nbytes`. It has to hold the CUDA context too (`context` bytes: all that the process has on the device outside of
    torch's allocator), so torch's allocator may take `limit`."""

    nbytes: int
    context: int

    @property
    def limit(self) -> int:
        return self.nbytes - self.context - LATE

    def peaks(self) -> dict[str, int]:
        """Bytes at most since torch.cuda.reset_peak_memory_stats(). MemoryError where the process had more than the budget."""
        reserved, context = torch.cuda.max_memory_reserved(), outside_torch()
        if reserved + context > self.nbytes:
            raise MemoryError(f"the process had {reserved + context} bytes on the GPU, {self.nbytes} are its budget")
        peaks = {"peak_allocated_bytes": torch.cuda.max_memory_allocated(), "peak_reserved_bytes": reserved}
        return peaks | {"process_peak_bytes": reserved + context, "context_bytes": context, "limit_bytes": self.limit}


def outside_torch() -> int:
    """Bytes in use on the device that torch's allocator does not have: the context, loaded kernels, and other processes."""
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()


@contextmanager
def enforce(memory_mib: int) -> Iterator[Budget]:
    """Limit torch's allocator while inside. To be entered when most kernels have been loaded: the context grows with them."""
    budget = Budget(memory_mib * MIB, outside_torch())
    total = torch.cuda.get_device_properties().total_memory
    if not 0 < budget.limit < total:
        raise ValueError(
            f"bench.memory_mib={memory_mib}: the device has {total // MIB}, the CUDA context takes {budget.context // MIB}"
        )
    torch.cuda.set_per_process_memory_fraction(budget.limit / total)
    try:
        yield budget
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def release() -> None:
    """Give back what nothing refers to."""
    gc.collect()
    torch.cuda.empty_cache()


def build(cfg: Config, codec: str) -> transformers.PreTrainedModel:
    """The model's geometry with weights made by seed on the device, in bf16, or compressed module by module; `tiled` is fused.

    Torch's allocator takes expandable segments from then on: fragments would eat the budget.
    """
    if cfg.device.name == "cuda":
        torch._C._accelerator_setAllocatorSettings("expandable_segments:True")  # what PYTORCH_ALLOC_CONF sets at start
        release()  # what came before
    finish = {"bf16": lambda module: None, "dfloat11": modules.compress_own_, "tiled": modules.compress_own_}[codec]
    model = hf.build(cfg.model.geometry, cfg.seed, cfg.device.name, finish)
    if codec == "tiled":
        fused.fuse_(model)
    model.requires_grad_(False)
    return model


def crc32(tensor: torch.Tensor) -> int:
    """Checksum of a tensor's bytes, to compare what was decoded without keeping it."""
    return zlib.crc32(tensor.cpu().contiguous().view(torch.uint8).numpy())


def weights(spec: ModelSpec) -> str:
    """What the weights that `build` makes are. ValueError for a model whose own weights it would not load."""
    if spec.source not in ("synthetic", "random"):
        raise ValueError(f"model={spec.name}: the weights are made from a geometry here, take {spec.name}_synthetic or tiny")
    return "random" if spec.source == "random" else "synthetic-normal"


def about(cfg: Config) -> dict[str, Any]:
    """Where weights come from that are made from a geometry by seed, for the provenance."""
    return {"source": "synthetic", "distribution": "transformers' initialisation", "seed": cfg.seed}


@dataclass(frozen=True)
class Sizes:
    """Bytes of the bf16 model, of a block of it, and of one sequence's keys and values at each token."""

    model: int
    block: int
    blocks: int
    kv_per_token: int

    @staticmethod
    def of(spec: ModelSpec) -> Sizes:
        tensors = hf.tensor_shapes(spec.geometry)
        units, _ = split_units(tensors)
        sizes = {unit.kind: sum(t.nbytes for t in unit.tensors) for unit in units}
        blocks = sum(unit.kind == "block" for unit in units)
        return Sizes(sum(t.nbytes for t in tensors), sizes["block"], blocks, hf.cache_bytes(spec.geometry, 1))
