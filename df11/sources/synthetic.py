"""Seeded weights at the geometry of a published model: made chunk by chunk, any chunk alone, never stored.

They stand in for checkpoints that cannot be had, so that sizes and kernels can be measured at 8B or 405B. Rows made from
them say `synthetic`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.resources import files
from typing import Any

import numpy as np
import torch
import xxhash
from numba import njit

from df11 import bits
from df11.sources.model import ModelSpec, TensorInfo

CHUNK = 1 << 18  # weights of one seed; fixed, so that the bits do not depend on how they are asked for. float32: 1 MiB of cache


class SyntheticSource:
    """Matrices from `spec.distribution`; norms are ones, biases zeros. The same (seed, spec) gives the same bits."""

    def __init__(self, spec: ModelSpec, tensors: list[TensorInfo], seed: int, threads: int = 0) -> None:
        self.weights = f"synthetic-{spec.distribution}"
        self.provenance: dict[str, Any] = {
            "source": "synthetic",
            "seed": seed,
            "distribution": spec.distribution,
            "generator": f"numpy {np.__version__} SFC64, {CHUNK} weights a seed",
        }
        if spec.distribution == "normal":
            self.provenance["std"] = spec.std
        self._infos = {info.name: info for info in tensors}
        self._std = np.float32(spec.std)
        self._alias = alias_table(smollm2_exponents()) if spec.distribution == "smollm2" else None
        self._seed, self._threads = seed, threads or os.cpu_count() or 1

    def tensors(self) -> list[TensorInfo]:
        return list(self._infos.values())

    def chunks(self, name: str, max_elements: int = 1 << 24) -> Iterator[torch.Tensor]:
        numel, step = self._find(name).numel, max(CHUNK, max_elements // CHUNK * CHUNK)
        with ThreadPoolExecutor(self._threads) as pool:
            ahead = self._start(pool, name, 0, min(step, numel))
            for start in range(0, numel, step):
                piece, pending = ahead
                following = min(start + step, numel)
                ahead = self._start(pool, name, following, min(step, numel - following))
                for future in pending:
                    future.result()
                yield from torch.split(piece, max_elements)

    def read(self, name: str) -> torch.Tensor:
        info = self._find(name)
        with ThreadPoolExecutor(self._threads) as pool:
            tensor, pending = self._start(pool, name, 0, info.numel)
            for future in pending:
                future.result()
        return tensor.reshape(info.shape)

    def _find(self, name: str) -> TensorInfo:
        if name not in self._infos:
            raise KeyError(f"the geometry has no tensor {name!r}")
        return self._infos[name]

    def _start(self, pool: ThreadPoolExecutor, name: str, start: int, n: int) -> tuple[torch.Tensor, list[Future[None]]]:
        """n weights from `start`, a multiple of CHUNK: the tensor, and what must be done before it is read."""
        tensor = torch.empty(n, dtype=torch.bfloat16)
        parts = range(0, n, CHUNK)
        return tensor, [pool.submit(self._fill, tensor[p : p + CHUNK], name, (start + p) // CHUNK) for p in parts]

    def _fill(self, out: torch.Tensor, name: str, chunk: int) -> None:
        if len(self._infos[name].shape) < 2:
            out.fill_(0.0 if name.endswith("bias") else 1.0)
            return
        # A chunk is always drawn whole, so that the last one of a tensor is no special case.
        rng = np.random.Generator(np.random.SFC64([self._seed, xxhash.xxh3_64_intdigest(name.encode()), chunk]))
        if self._alias is None:
            values = rng.standard_normal(CHUNK, np.float32)
            values *= self._std
            out.copy_(torch.from_numpy(values[: len(out)]))  # rounds to nearest even
        else:
            _draw(rng.integers(0, 1 << 32, CHUNK, np.uint32), *self._alias, bits.to_bits(out))


def smollm2_exponents() -> np.ndarray:
    """Exponent counts of the linear weights of SmolLM2-135M's blocks, int64[256]."""
    return np.array(json.loads((files("df11") / "data" / "smollm2_exponents.json").read_text())["counts"], np.int64)


def alias_table(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Walker's alias method: exponent counts int64[256] -> bf16 patterns and their aliases uint16[256], thresholds uint32[256].

    Draw a slot i uniformly: the exponent is i with probability threshold[i] / 2^16, else its alias.
    """
    share = counts * (bits.EXPONENTS / counts.sum())
    alias = np.arange(bits.EXPONENTS)
    poor, rich = [i for i in alias if share[i] < 1], [i for i in alias if share[i] >= 1]
    threshold = np.ones(bits.EXPONENTS)
    while poor and rich:
        i, j = poor.pop(), rich[-1]
        threshold[i], alias[i] = share[i], j
        share[j] -= 1 - share[i]
        if share[j] < 1:
            poor.append(rich.pop())
    pattern = bits.merge(np.arange(bits.EXPONENTS, dtype=np.uint8), np.zeros(bits.EXPONENTS, np.uint8))
    return pattern, pattern[alias], np.rint(threshold * (1 << 16)).astype(np.uint32)


_SIGN_MANTISSA = bits.merge(np.zeros(256, np.uint8), np.arange(256, dtype=np.uint8))


@njit(cache=True, nogil=True)
def _draw(random: np.ndarray, pattern: np.ndarray, alias: np.ndarray, threshold: np.ndarray, out: np.ndarray) -> None:
    """uint32 randoms -> bf16 patterns: 8 bits choose the slot, 16 decide between it and its alias, 8 are sign and mantissa."""
    for i in range(out.size):
        r = random[i]
        slot = r >> 24
        kept = (r >> 8) & 0xFFFF < threshold[slot]
        out[i] = (pattern[slot] if kept else alias[slot]) | _SIGN_MANTISSA[r & 0xFF]
