"""Several arrays in one piece of memory."""

from __future__ import annotations

from collections.abc import Iterable

import torch

ALIGNMENT = 256  # bytes; as torch's allocator does at least, so that cuBLAS chooses as for a tensor of its own


def aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def places(arrays: Iterable[torch.Tensor]) -> list[int]:
    """Where each begins, in bytes, and where the last one ends."""
    found = [0]
    for array in arrays:
        found.append(found[-1] + aligned(array.nbytes))
    return found


def view(memory: torch.Tensor, at: int, like: torch.Tensor) -> torch.Tensor:
    """The part of `memory`, uint8, that holds an array of the same dtype and shape."""
    return memory[at : at + like.nbytes].view(like.dtype).view(like.shape)
