"""Compressed weights as tensors: `CompressedTensor` is one to torch, and holds the published layout."""

from df11.tensors.compressed import CompressedTensor, dense, in_memory_order
from df11.tensors.stored import Held, Stored, is_stack

__all__ = ["CompressedTensor", "Held", "Stored", "dense", "in_memory_order", "is_stack"]
