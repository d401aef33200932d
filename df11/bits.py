"""The bits of bf16 in numpy. The inner loops (numba and torch in formats/, CUDA in kernels/) repeat the shifts and masks.

A weight is 16 bits, `s eeeeeeee mmmmmmm`. DFloat11 codes the exponent byte and keeps sign and mantissa as one raw byte
`s mmmmmmm` (paper section 2.2). All functions work on bit patterns (uint16), never on values: NaN payloads and -0 survive.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit

EXPONENTS = 256


def to_bits(tensor: torch.Tensor) -> np.ndarray:
    """bf16 tensor of any shape on the CPU -> its bit patterns, uint16[numel], without a copy where it is contiguous."""
    if tensor.dtype != torch.bfloat16:
        raise TypeError(f"expected a bfloat16 tensor, got {tensor.dtype}: only bf16 weights are compressed")
    if tensor.device.type != "cpu":
        raise ValueError(f"expected a tensor on the CPU, got one on {tensor.device}: move it with .cpu()")
    return tensor.detach().reshape(-1).view(torch.int16).numpy().view(np.uint16)


def from_bits(bits: np.ndarray, shape: tuple[int, ...]) -> torch.Tensor:
    """Bit patterns, uint16[n] -> bf16 tensor of the shape, sharing memory."""
    return torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16).reshape(shape)


def split(bits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """uint16[n] -> exponent uint8[n], sign and mantissa uint8[n] (sign in bit 7)."""
    return ((bits >> 7) & 0xFF).astype(np.uint8), ((bits >> 8) & 0x80 | bits & 0x7F).astype(np.uint8)


def merge(exponent: np.ndarray, sign_mantissa: np.ndarray) -> np.ndarray:
    """Inverse of `split`."""
    high, low = sign_mantissa.astype(np.uint16), exponent.astype(np.uint16)
    return (high & 0x80) << 8 | low << 7 | high & 0x7F


@njit(cache=True, nogil=True)
def histogram(bits: np.ndarray) -> np.ndarray:
    """Exponent counts of uint16[n], int64[256]. Releases the GIL."""
    # Four tables: equal neighbours would otherwise wait for each other's store.
    counts = np.zeros((4, EXPONENTS), np.int64)
    whole = bits.size & ~3
    for i in range(0, whole, 4):
        counts[0, (bits[i] >> 7) & 0xFF] += 1
        counts[1, (bits[i + 1] >> 7) & 0xFF] += 1
        counts[2, (bits[i + 2] >> 7) & 0xFF] += 1
        counts[3, (bits[i + 3] >> 7) & 0xFF] += 1
    for i in range(whole, bits.size):
        counts[0, (bits[i] >> 7) & 0xFF] += 1
    total: np.ndarray = counts.sum(axis=0)
    return total


def field_histograms(bits: np.ndarray) -> dict[str, np.ndarray]:
    """Counts of each value of sign, exponent and mantissa of uint16[n]: int64[2], int64[256], int64[128] (paper Fig. 1)."""
    patterns = np.bincount(bits, minlength=1 << 16).reshape(2, EXPONENTS, 128)
    return {"sign": patterns.sum((1, 2)), "exponent": patterns.sum((0, 2)), "mantissa": patterns.sum((0, 1))}
