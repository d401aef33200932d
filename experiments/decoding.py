"""Greedy decoding step by step with a static cache, for the experiments that time it: eager, or one CUDA graph replayed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.cache_utils import StaticLayer

from df11 import ops, released, runtime
from df11.memory import aligned
from experiments.harness import timing

LAUNCHES = ("eager", "graph")
# Not cuDNN's, torch's first choice on an H100 or H200: it gives other bits in other runs (docs/footguns.md).
ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
CODECS = {"exact": ("dfloat11", "fast"), "fused": ("tiled", "tiled")}  # of a mode: codec, kernel on a GPU
GRANULARITIES: dict[str, dict[str, Any]] = {  # of decompression, as in the column `granularity`: arguments of runtime.attach
    "layer": {"granularity": "layer"},
    "block": {"granularity": "block"},
    "block, prefetched": {"granularity": "block", "prefetch": True},
}


def check_modes(modes: Sequence[str]) -> None:
    """ValueError where bench.modes has one that there is not."""
    if not set(modes) <= set(CODECS):
        raise ValueError(f"bench.modes={modes}: choose from {', '.join(CODECS)}")


class Decoder:
    """Decodes `batch_size` sequences of at most `length` tokens, prompt included. All memory is taken at construction and at the
    first prefill; a graph is captured at the first step after it."""

    def __init__(self, model: transformers.PreTrainedModel, batch_size: int, length: int, launch: str = "eager") -> None:
        if launch not in LAUNCHES:
            raise ValueError(f"launch={launch!r}: choose one of {', '.join(LAUNCHES)}")
        self.model = model
        self.launch = launch
        self.length = length
        self.cache = transformers.StaticCache(config=model.config, max_cache_len=length)
        self.device = next(model.parameters()).device
        self.ids = torch.zeros(batch_size, 1, dtype=torch.int64, device=self.device)  # the latest token of each sequence
        self.logits = torch.empty(0)  # bf16 [batch_size, vocabulary] of the latest position
        # transformers 5.23 renamed it
        self._keyword = "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"
        window = min((layer.max_cache_len for layer in self.cache.layers), default=length)
        if launch == "graph" and window < length:
            raise ValueError(f"length={length}: a sliding window of {window} tokens can be decoded in a graph up to its end only")
        if launch == "graph":  # sliding layers count in Python, which a graph does not; up to the window's end others do the same
            layers: list[Any] = self.cache.layers
            self.cache.layers = [StaticLayer(length) if layer.is_sliding else layer for layer in layers]
        self._replay: Callable[[], None] | None = None

    @torch.inference_mode()
    def prefill(self, prompt: torch.Tensor) -> None:
        """Start anew with int64 [batch_size, tokens]."""
        self.cache.reset()
        self._forward(prompt)

    @torch.inference_mode()
    def step(self) -> None:
        """One token more for each sequence, asynchronously."""
        if self.launch == "eager":
            self._forward(self.ids)
            return
        if self._replay is None:
            self._replay = self._capture()
        self._replay()

    def tokens(self, prompt: torch.Tensor, count: int) -> torch.Tensor:
        """The next `count` ids of each sequence, int64 [batch_size, count]."""
        self.prefill(prompt)
        found = [self.ids.clone()]
        for _ in range(count - 1):
            self.step()
            found.append(self.ids.clone())
        return torch.cat(found, 1)

    def _forward(self, ids: torch.Tensor) -> None:
        with sdpa_kernel(ATTENTION):
            logits = self.model(ids, logits_to_keep=1, **{self._keyword: self.cache}).logits[:, -1]
        if self.logits.shape == logits.shape:
            self.logits.copy_(logits)  # in place: a graph writes where it was captured
        else:
            self.logits = logits.clone()
        self.ids.copy_(logits.argmax(-1, keepdim=True))

    def _capture(self) -> Callable[[], None]:
        """Capture a step, which runs nothing. The step before it, which loads what is loaded lazily, is taken back."""
        state: list[tuple[torch.Tensor, torch.Tensor]] = [(tensor, tensor.clone()) for tensor in self._state()]
        replay = timing.graph(partial(self._forward, self.ids))
        for tensor, before in state:
            tensor.copy_(before)
        return replay

    def _state(self) -> list[torch.Tensor]:
        """What a step changes besides keys and values behind the end, which nothing reads before they are written again."""
        layers: list[Any] = self.cache.layers
        return [self.ids, *(layer.cumulative_length for layer in layers)]


def decompression(
    groups: Sequence[Sequence[ops.CompressedUnit]], kernel: str
) -> tuple[Callable[[], None], list[list[torch.Tensor]]]:
    """What decompresses units on torch's current stream, a group at a time into one buffer, and where: views bf16[numel].

    Each group is one launch of `fast`, as in a model that decompresses by blocks.
    """
    places = []
    for group in groups:
        starts = [0]
        for unit in group:
            starts.append(starts[-1] + aligned(2 * unit.numel) // 2)
        places.append(starts)
    device = groups[0][0].sign_mantissa.device
    buffer = torch.empty(max(starts[-1] for starts in places), dtype=torch.bfloat16, device=device)
    views, works = [], []
    for group, starts in zip(groups, places, strict=True):
        out = [buffer[start : start + unit.numel] for start, unit in zip(starts, group, strict=False)]
        views.append(out)
        if kernel == "released":
            works += [partial(released.decoder(unit), to) for unit, to in zip(group, out, strict=True)]
        else:
            works.append(partial(ops.decompress, group, out, kernel))

    def decompress() -> None:
        for work in works:
            work()

    return decompress, views


def compressed_groups(model: torch.nn.Module) -> list[list[ops.CompressedUnit]]:
    """A model's compressed units as granularity `block` decompresses them, each once even where weights are tied."""
    seen: set[int] = set()
    groups = []
    for _, tensors in runtime.owners(model, "block"):
        units = {id(unit): unit for tensor in tensors for unit in tensor.units() if id(unit) not in seen}
        seen |= units.keys()
        groups += [list(units.values())] if units else []
    return groups
