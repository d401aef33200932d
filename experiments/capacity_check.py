"""The largest model on one GPU, really run: built and compressed in place tensor by tensor, decoding at a long context.

BF16's side: the tensors of the uncompressed model are allocated (nothing is computed with them), then a cache until none is left.
DF11's side, then the same in mode=fused: a static cache is filled with random keys and values, tokens are decoded behind them, and
the longest context is searched by trial. On a CPU only the decoding is measured: its memory has no such end.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import pandas as pd
import torch

from df11 import hf, modules, runtime
from experiments import budget
from experiments.config import Config
from experiments.decoding import CODECS, GRANULARITIES, Decoder, check_modes
from experiments.footprint import Footprint, last_true
from experiments.harness import timing
from experiments.harness.api import Need, Point

AXES = ("granularity", "context_tokens")
CHUNK = 256  # tokens, of the cache that BF16 has no room for
RESOLUTION = 100  # of the longest context: this part of it


def preflight(cfg: Config) -> Iterable[Need]:
    size = sum(t.nbytes for t in hf.tensor_shapes(cfg.model.geometry))
    held = int(0.7 * size) + hf.cache_bytes(cfg.model.geometry, max(cfg.bench.lengths)) + cfg.bench.reserve_bytes
    gpu_memory = held if cfg.device.name == "cuda" else 0
    return [Need("the compressed model", memory=held - gpu_memory, gpu_memory=gpu_memory, minutes=1 + 2 * len(cfg.bench.modes))]


def run(cfg: Config, done: Mapping[str, list[dict[str, Any]]]) -> Iterator[Point]:
    bench, weights = cfg.bench, budget.weights(cfg.model)
    unknown = set(bench.granularities) - set(GRANULARITIES)
    if unknown or not bench.lengths:
        raise ValueError(f"bench.granularities={bench.granularities}: choose from {', '.join(GRANULARITIES)}, with bench.lengths")
    check_modes(bench.modes)
    if cfg.device.name == "cuda" and "bf16" not in done:
        yield Point("bf16", [{"weights": weights, "codec": "bf16"} | row for row in until_full(cfg)])
    for mode in bench.modes:
        yield from compressed(cfg, done, mode)


def compressed(cfg: Config, done: Mapping[str, list[dict[str, Any]]], mode: str) -> Iterator[Point]:
    """The compressed model's side in a mode. Its model is let go at the end: there is no room for two."""
    on_gpu, bench = cfg.device.name == "cuda", cfg.bench
    launches = bench.launches if on_gpu else ["eager"]
    granularities = bench.granularities if mode == "exact" else ["-"]
    runs = [(g, launch, tokens) for g in granularities for tokens in bench.lengths for launch in launches]
    runs = [point for point in runs if ", ".join(map(str, point)) not in done]
    searches = [g for g in granularities if on_gpu and f"longest, {g}" not in done]
    if not runs and not searches:
        return
    start = time.perf_counter()
    codec, kernel = CODECS[mode]
    identity = {"weights": budget.weights(cfg.model), "codec": codec, "kernel": kernel if on_gpu else "cpu"}
    if mode == "fused":  # rows of mode=exact have none
        identity["mode"] = mode
    model = budget.build(cfg, codec)
    about = budget.about(cfg) | {"build_seconds": round(time.perf_counter() - start, 1)}
    for granularity, launch, tokens in runs:
        runtime.attach(model, **GRANULARITIES.get(granularity, {}))
        fixed = identity | {"granularity": granularity, "launch": launch, "context_tokens": tokens}
        rows = [fixed | row for row in decoding(model, cfg, launch, tokens)]
        yield Point(f"{granularity}, {launch}, {tokens}", rows, about)
    for granularity in searches:
        workspace = runtime.attach(model, **GRANULARITIES.get(granularity, {}))
        fixed = identity | {"granularity": granularity, "launch": "eager"}
        yield Point(f"longest, {granularity}", [fixed | row for row in longest(model, cfg, workspace)], about)


def until_full(cfg: Config) -> Iterator[dict[str, Any]]:
    """The uncompressed model's tensors, then its cache in chunks of tokens, until the GPU's memory is full."""
    held: list[torch.Tensor] = []
    weights = tokens = 0
    try:
        for info in hf.tensor_shapes(cfg.model.geometry):
            held.append(torch.empty(info.shape, dtype=torch.bfloat16, device="cuda"))
            weights += held[-1].nbytes
        while True:
            held.append(torch.empty(hf.cache_bytes(cfg.model.geometry, CHUNK), dtype=torch.uint8, device="cuda"))
            tokens += CHUNK
    except torch.OutOfMemoryError:
        held.clear()
    budget.release()
    yield {"metric": "weights_allocated_bytes", "value": weights, "unit": "bytes"}
    yield {"metric": "longest_context", "value": tokens, "unit": "tokens"}
    for context in cfg.bench.lengths:
        yield {"context_tokens": context, "metric": "runs_out", "value": int(tokens < context), "unit": "1"}


def decoding(model: Any, cfg: Config, launch: str, tokens: int) -> Iterator[dict[str, Any]]:
    """Speed and memory of decoding behind so many tokens."""
    on_gpu = cfg.device.name == "cuda"
    budget.release()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    decoder = Decoder(model, 1, tokens + cfg.bench.tokens, launch)
    for repeat in range(-cfg.bench.warmup, cfg.bench.repeats):
        fill(decoder, tokens)
        decoder.step()
        timing.synchronize(cfg.device.name)
        start = time.perf_counter()
        for _ in range(cfg.bench.tokens - 1):
            decoder.step()
        timing.synchronize(cfg.device.name)
        seconds = (time.perf_counter() - start) / (cfg.bench.tokens - 1)
        if repeat >= 0:
            yield {"repeat": repeat, "metric": "ms_per_step", "value": 1e3 * seconds, "unit": "ms"}
            yield {"repeat": repeat, "metric": "tokens_per_s", "value": 1 / seconds, "unit": "tokens/s"}
    cache = sum(layer.keys.nbytes + layer.values.nbytes for layer in decoder.cache.layers)
    yield {"metric": "cache_bytes", "value": cache, "unit": "bytes"}
    yield {"metric": "stored_bytes", "value": sum(modules.stored_bytes(model).values()), "unit": "bytes"}
    if on_gpu:
        yield {"metric": "peak_memory_bytes", "value": torch.cuda.max_memory_allocated(), "unit": "bytes"}
        yield {"metric": "peak_reserved_bytes", "value": torch.cuda.max_memory_reserved(), "unit": "bytes"}


@torch.inference_mode()
def fill(decoder: Decoder, tokens: int) -> None:
    """A cache as after so many tokens: keys and values from N(0, 1)."""
    decoder.prefill(torch.zeros(1, 1, dtype=torch.int64, device=decoder.device))
    for layer in decoder.cache.layers:
        if layer.is_sliding:
            raise ValueError("a cache with sliding windows cannot be filled: choose a model with full attention")
        layer.keys.normal_()
        layer.values.normal_()
        layer.cumulative_length.fill_(tokens)


def longest(model: Any, cfg: Config, workspace: runtime.Workspace) -> Iterator[dict[str, Any]]:
    """The longest context at which a token is decoded, by trial and as it follows from sizes and the reserve."""

    def survives(tokens: int) -> bool:
        try:
            decoder = Decoder(model, 1, tokens + 1)
            fill(decoder, tokens)
            decoder.step()
            torch.cuda.synchronize()
            return True
        except torch.OutOfMemoryError:
            return False

    def tried(tokens: int) -> bool:
        good = survives(tokens)
        budget.release()  # only here is the failed attempt's memory no longer referred to
        print(f"{tokens} tokens: {'decoded' if good else 'out of memory'}", flush=True)
        return good

    budget.release()
    start = min(cfg.bench.lengths)
    if not tried(start):
        raise ValueError(f"not even {start} tokens can be decoded: bench.lengths must begin with fewer")
    memory = torch.cuda.mem_get_info()[1]
    stored = sum(modules.stored_bytes(model).values())
    all_in_all = Footprint(
        1, stored, 0, 0, workspace.nbytes, cfg.bench.reserve_bytes, lambda tokens: hf.cache_bytes(cfg.model.geometry, tokens)
    )
    bound = (memory - stored) // hf.cache_bytes(cfg.model.geometry, 1)
    found = last_true(tried, start, bound, max(1, bound // RESOLUTION))
    yield {"metric": "longest_context", "value": found, "unit": "tokens"}
    yield {"metric": "predicted_longest_context", "value": all_in_all.longest(memory), "unit": "tokens"}
    yield {"metric": "decode_buffer_bytes", "value": workspace.nbytes, "unit": "bytes"}
    yield {"metric": "card_bytes", "value": memory, "unit": "bytes"}


def table(rows: pd.DataFrame, cfg: Config) -> pd.DataFrame:
    """Medians, a line a number."""
    index = ["codec", "granularity", "launch", "context_tokens", "metric", "unit"]
    return rows.groupby(index, sort=False)["value"].median().reset_index()
