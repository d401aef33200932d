"""Compressed weights as tensors: `CompressedTensor` in the published layout, `TiledTensor` in the one whose products are fused."""

from df11.tensors.compressed import CompressedTensor, attached, dense, in_memory_order
from df11.tensors.stored import Held, Stored, Units, is_stack
from df11.tensors.tiled import Merged, TiledTensor, Tiles

__all__ = [
    "CompressedTensor",
    "Held",
    "Merged",
    "Stored",
    "TiledTensor",
    "Tiles",
    "Units",
    "attached",
    "dense",
    "in_memory_order",
    "is_stack",
]
