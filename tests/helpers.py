"""What tests of several files make and compare."""

import numpy as np
import torch

from df11 import bits


def normal(*shape: int, std: float = 0.02, seed: int = 0, device: str = "cpu") -> torch.Tensor:
    """bf16 weights of N(0, std^2)."""
    return (torch.randn(shape, device=device, generator=torch.Generator(device).manual_seed(seed)) * std).bfloat16()


def patterns(values: np.ndarray, shape: tuple[int, ...] | None = None) -> torch.Tensor:
    """The bf16 weights with these bits; flat unless a shape is given."""
    return bits.from_bits(values.astype(np.uint16), shape or (values.size,))


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """NaNs and zeros of either sign too."""
    return torch.equal(a.view(torch.int16), b.view(torch.int16))
