"""Fig. 5: how many tokens fit into a GPU memory budget beside the weights, BF16 against DF11 and tiled (mode=fused), batch 1.

A length is tried with a cache of just that many tokens, filled with random keys and values but for the last STEPS, which are really
decoded. `bench.lengths` are tried in turn until the memory is exhausted, then the largest length that fits is found by bisection in
steps of CHUNK tokens. BF16 and DF11 must decode the same ids and logits from the same cache; fused products round otherwise.

Predicted: the limit (budget less CUDA context) less weights, decode buffers and activations (all other memory that a step of the
shortest length takes: cuBLAS, logits), over the bytes of keys and values of a token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
import transformers
from transformers.cache_utils import DynamicLayer

from df11 import modules, runtime
from experiments import budget
from experiments.budget import MIB, Sizes
from experiments.config import Config
from experiments.decoding import CODECS, Decoder, check_modes
from experiments.footprint import last_true
from experiments.harness.api import Need, Point

AXES = ("memory_mib", "granularity", "cache", "tokens")
STEPS = 2  # decoded at each length
CHUNK = 64  # tokens; how exactly the largest length is found
GRANULARITY = "block"


def preflight(cfg: Config) -> Iterable[Need]:
    check(cfg)
    size = Sizes.of(cfg.model).model
    on_gpu = cfg.device.name == "cuda"
    most = int(1.1 * max(size, cfg.bench.memory_mib * MIB)) if on_gpu else 0
    minutes = 0.5 * (1 + len(cfg.bench.modes)) if on_gpu else 0.1
    return [Need("the model, made on the device", memory=0 if on_gpu else 2 * size, gpu_memory=most, minutes=minutes)]


def check(cfg: Config) -> None:
    """ValueError where the config asks for what cannot be measured."""
    budget.weights(cfg.model)
    check_modes(cfg.bench.modes)
    if cfg.model.geometry.get("sliding_window"):
        raise ValueError(f"model={cfg.model.name} keeps a sliding window of its tokens: their number has no limit")
    if cfg.device.name == "cuda" and cfg.bench.memory_mib <= 0:
        raise ValueError("bench.memory_mib is the budget to measure under: set it, as in bench.memory_mib=24564")
    if not cfg.bench.lengths or min(cfg.bench.lengths) <= STEPS or sorted(set(cfg.bench.lengths)) != list(cfg.bench.lengths):
        raise ValueError(f"bench.lengths={cfg.bench.lengths}: give lengths above {STEPS}, ascending")
    if cfg.bench.batch_sizes != [1]:
        raise ValueError("bench.batch_size: one sequence is decoded here")


def run(cfg: Config, done: Mapping[str, list[dict[str, Any]]]) -> Iterator[Point]:
    check(cfg)
    agreed: dict[tuple[int, str], float] = {}
    for mode, codec, kernel in (("exact", "bf16", "-"), *((mode, *CODECS[mode]) for mode in cfg.bench.modes)):
        rows = done[codec] if codec in done else list(measure(cfg, mode, codec, kernel))
        for row in rows:
            if row["metric"] in ("ids_crc32", "logits_crc32") and row["mode"] == "exact":
                expected = agreed.setdefault((row["tokens"], row["metric"]), row["value"])
                if row["value"] != expected:
                    raise ValueError(f"{row['metric'].removesuffix('_crc32')} differ between codecs after {row['tokens']} tokens")
        if codec not in done:
            yield Point(codec, rows, budget.about(cfg))


def measure(cfg: Config, mode: str, codec: str, kernel: str) -> Iterator[dict[str, Any]]:
    """Memory at each length, the largest length, and the terms of the predicted one."""
    on_gpu = cfg.device.name == "cuda"
    sizes = Sizes.of(cfg.model)
    model = budget.build(cfg, codec)
    buffers = runtime.attach(model, GRANULARITY) if codec == "dfloat11" else None
    identity = {"weights": budget.weights(cfg.model), "codec": codec, "mode": mode, "launch": "eager"}
    identity |= {"kernel": kernel if on_gpu or codec == "bf16" else "cpu", "granularity": GRANULARITY if buffers else "-"}
    identity |= {"memory_mib": cfg.bench.memory_mib if on_gpu else "-"}
    found: dict[int, Decoded] = {}
    largest = 0
    if on_gpu:  # no limit yet: load kernels
        for tokens in cfg.bench.lengths[:3]:
            decode(model, cfg, tokens)
        budget.release()
    with budget.enforce(cfg.bench.memory_mib) if on_gpu else nullcontext() as limits:

        def fits(tokens: int) -> bool:
            if limits:
                budget.release()  # what the length before had, also where it ran out of memory
            try:
                found[tokens] = decode(model, cfg, tokens, limits)
            except (torch.cuda.OutOfMemoryError, MemoryError):
                return False
            return True

        for tokens in cfg.bench.lengths:
            if not fits(tokens):
                largest = last_that_fits(fits, largest, tokens, CHUNK)
                break
            largest = tokens
        else:
            if limits:
                raise ValueError(f"bench.lengths: {largest} tokens still fit into {cfg.bench.memory_mib} MiB, add longer ones")
    if not largest:
        raise ValueError(f"not even {CHUNK} tokens fit into {cfg.bench.memory_mib} MiB")
    for tokens in sorted({*found} & {*cfg.bench.lengths, largest}):
        at = identity | {"cache": "filled", "tokens": tokens}
        for metric, value in {"cache_bytes": tokens * sizes.kv_per_token, **found[tokens].memory}.items():
            yield at | {"metric": metric, "value": value, "unit": "bytes"}
        for metric, value in found[tokens].digests.items():
            yield at | {"metric": metric, "value": value, "unit": "checksum"}
    terms = {"weight_bytes": sum(modules.stored_bytes(model).values()), "buffer_bytes": buffers.nbytes if buffers else 0}
    if limits:
        shortest = min(found)
        peak = found[shortest].memory["peak_allocated_bytes"]
        terms["activation_bytes"] = peak - sum(terms.values()) - shortest * sizes.kv_per_token
        room = limits.limit - sum(terms.values())
        lengths = {"max_tokens": largest, "predicted_tokens": max(0, room) // sizes.kv_per_token}
        yield from (identity | {"metric": metric, "value": value, "unit": "tokens"} for metric, value in lengths.items())
    terms["kv_bytes_per_token"] = sizes.kv_per_token
    yield from (identity | {"metric": metric, "value": value, "unit": "bytes"} for metric, value in terms.items())


@dataclass(frozen=True)
class Decoded:
    memory: dict[str, int]  # bytes by metric
    digests: dict[str, int]


def decode(model: transformers.PreTrainedModel, cfg: Config, tokens: int, limits: budget.Budget | None = None) -> Decoded:
    """Decode the last of so many tokens. torch.cuda.OutOfMemoryError where they do not fit."""
    if limits:
        torch.cuda.reset_peak_memory_stats()
    decoder = Decoder(model, 1, tokens)
    decoder.cache = filled(cfg, decoder.device, tokens)
    decoder.ids.fill_(1)
    ids = []
    for _ in range(STEPS):
        decoder.step()
        ids.append(decoder.ids.clone())
    digests = {"ids_crc32": budget.crc32(torch.cat(ids)), "logits_crc32": budget.crc32(decoder.logits)}
    return Decoded(limits.peaks() if limits else {}, digests)


class _Layer(DynamicLayer):  # type: ignore[misc]
    """Keys and values [1, heads, tokens, size], written in place into memory taken before: growing by concatenation, as
    DynamicLayer does, needs a layer twice; a static layer's mask makes attention repeat its keys for each query head."""

    def __init__(self, memory: torch.Tensor, length: int) -> None:
        super().__init__()
        self.memory = memory  # [2, 1, heads, tokens, size]
        self.length = length
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        begin, self.length = self.length, self.length + key_states.shape[-2]
        self.memory[0, :, :, begin : self.length] = key_states
        self.memory[1, :, :, begin : self.length] = value_states
        return self.memory[0, :, :, : self.length], self.memory[1, :, :, : self.length]

    def get_seq_length(self) -> int:
        return self.length


def filled(cfg: Config, device: torch.device, tokens: int) -> transformers.Cache:
    """Room for `tokens`, in one piece, all but the last STEPS of them drawn by seed."""
    geometry = cfg.model.geometry
    size = geometry.get("head_dim") or geometry["hidden_size"] // geometry["num_attention_heads"]
    shape = (geometry["num_hidden_layers"], 2, 1, geometry["num_key_value_heads"], tokens, size)
    memory = torch.empty(shape, dtype=torch.bfloat16, device=device)
    memory.normal_(generator=torch.Generator(device).manual_seed(cfg.seed))
    return transformers.Cache(layers=[_Layer(layer, tokens - STEPS) for layer in memory])


def last_that_fits(fits: Callable[[int], bool], low: int, high: int, step: int) -> int:
    """The largest low + k step below high that fits; low is known to fit (or is 0), high is known not to."""
    return low + step * last_true(lambda k: fits(low + k * step), 0, (high - low - 1) // step + 1, 1)


def table(rows: pd.DataFrame, cfg: Config) -> pd.DataFrame:
    """Largest length measured and predicted; without a budget, the lengths decoded."""
    wanted = rows[rows["metric"].isin(["max_tokens", "predicted_tokens", "weight_bytes", "buffer_bytes", "activation_bytes"])]
    wide = wanted.pivot_table(index="codec", columns="metric", values="value", sort=False).reset_index()
    if "max_tokens" in wide:
        wide["times_bf16"] = wide["max_tokens"] / wide.set_index("codec")["max_tokens"]["bf16"]
    return wide.rename_axis(columns=None)
