"""Fig. 4: greedy decoding of a model that is too large for a GPU: BF16 partly in host memory, against DF11 wholly on the GPU.

Variants: `bf16_accelerate`, what from_pretrained(device_map="auto", max_memory=...) does; `bf16_offload`, as many of the last
blocks as the budget demands in pinned memory, the next one copied while one runs; `dfloat11_resident`; `dfloat11_offload`, as many
blocks as bf16_offload has in host memory, compressed; `tiled_resident`, in mode=fused. All but the last, which rounds in another
order, decode the same ids and logits: no rows before that has been checked.

What the weights may take is the budget less CONTEXT and the needs of the largest batch (`activations`): by rule, so that it is the
same for all variants, whichever runs first.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import pandas as pd
import torch
import transformers

from df11 import modules, runtime
from experiments import budget
from experiments.budget import MIB, Sizes
from experiments.config import Config
from experiments.decoding import Decoder
from experiments.harness import timing
from experiments.harness.api import Need, Point, did_you_mean

AXES = ("memory_mib", "placement", "host_memory", "granularity", "batch_size", "warmup_tokens", "tokens")
VARIANTS = {  # codec, placement, granularity of decompression
    "bf16_accelerate": ("bf16", "accelerate", "-"),
    "bf16_offload": ("bf16", "offload", "-"),
    "bf16_resident": ("bf16", "resident", "-"),
    "dfloat11_resident": ("dfloat11", "resident", "block"),
    "dfloat11_resident_layer": ("dfloat11", "resident", "layer"),
    "dfloat11_offload": ("dfloat11", "offload", "block"),
    "tiled_resident": ("tiled", "resident", "-"),
}
HOST_MEMORY = {"accelerate": "pageable", "offload": "pinned"}
PROMPT = 1  # the one token of each prompt, in place of a tokenizer's BOS
RESERVE = 512 * MIB  # for cuBLAS and what a layer computes
CONTEXT = 832 * MIB  # more than the CUDA context was seen to take, pinned memory and late kernels included
PAGEABLE, PINNED = 7e9, 50e9  # bytes a second from host memory, to plan with
TRANSFER_BYTES = 256 * MIB

Digests = dict[tuple[int, str, int], float]  # batch size, metric, repeat


def preflight(cfg: Config) -> Iterable[Need]:
    check(cfg)
    sizes = Sizes.of(cfg.model)
    on_gpu = cfg.device.name == "cuda"
    host = max(0, sizes.model - spare(cfg)) + 3 * sizes.block if on_gpu else 2 * sizes.model
    moving = [v for v in cfg.bench.variants if "resident" not in v]
    step = sum(host / (PAGEABLE if v == "bf16_accelerate" else PINNED) for v in moving)
    minutes = (length(cfg) * len(cfg.bench.batch_sizes) * step + 20 * len(cfg.bench.variants)) / 60 if on_gpu else 0.1
    return [Need("the model, made on the device", memory=host, gpu_memory=int(1.1 * sizes.model) if on_gpu else 0, minutes=minutes)]


def check(cfg: Config) -> None:
    """ValueError where the config asks for what cannot be measured."""
    budget.weights(cfg.model)
    for name in cfg.bench.variants:
        if name not in VARIANTS:
            raise ValueError(f"bench.variants: no {name!r}{did_you_mean(name, VARIANTS)}")
        if name == "bf16_accelerate" and cfg.device.name == "cpu":
            raise ValueError("bench.variants: bf16_accelerate moves weights to a GPU, it needs device=cuda")
    if cfg.device.name == "cuda" and cfg.bench.memory_mib <= 0:
        raise ValueError("bench.memory_mib is the budget to measure under: set it, as in bench.memory_mib=24564")
    if min(cfg.bench.warmup, cfg.bench.tokens, cfg.bench.repeats, *cfg.bench.batch_sizes) < 1 or not cfg.bench.variants:
        raise ValueError("bench.warmup, tokens, repeats and batch sizes are 1 at least, and there must be variants")


def length(cfg: Config) -> int:
    """Tokens of a sequence at its end, prompt included."""
    return 1 + cfg.bench.warmup + cfg.bench.repeats * cfg.bench.tokens


def run(cfg: Config, done: Mapping[str, list[dict[str, Any]]]) -> Iterator[Point]:
    check(cfg)
    agreed: Digests = {}
    for key, rows in done.items():
        agree(agreed, key, rows)
    for name in cfg.bench.variants:
        missing = [size for size in cfg.bench.batch_sizes if f"{name}, batch {size}" not in done]
        if missing:
            for size, rows in measure(cfg, name, missing):
                key = f"{name}, batch {size}"
                agree(agreed, key, rows)
                yield Point(key, rows, budget.about(cfg))


def agree(agreed: Digests, key: str, rows: list[dict[str, Any]]) -> None:
    """ValueError where ids or logits differ from those of the variants before, at the same batch size and repeat."""
    for row in rows:
        if row["metric"] in ("ids_crc32", "logits_crc32") and row["mode"] == "exact":
            expected = agreed.setdefault((row["batch_size"], row["metric"], row["repeat"]), row["value"])
            if row["value"] != expected:
                what = row["metric"].removesuffix("_crc32")
                raise ValueError(f"{key}: the {what} of repeat {row['repeat']} are not those of the variants before")


def measure(cfg: Config, name: str, batch_sizes: list[int]) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """Rows of a variant at each batch size."""
    codec, placement, granularity = VARIANTS[name]
    on_gpu = cfg.device.name == "cuda"
    model = budget.build(cfg, codec)
    manifest = sum(modules.stored_bytes(model).values())
    buffers = runtime.attach(model, granularity) if codec == "dfloat11" else None
    host_memory = HOST_MEMORY.get(placement, "-")
    mode, kernel = {"bf16": ("exact", "-"), "dfloat11": ("exact", "fast"), "tiled": ("fused", "tiled")}[codec]
    identity = {"weights": budget.weights(cfg.model), "codec": codec, "mode": mode, "launch": "eager"}
    identity |= {"kernel": kernel if on_gpu or codec == "bf16" else "cpu"}
    identity |= {"memory_mib": cfg.bench.memory_mib if on_gpu else "-", "placement": placement, "granularity": granularity}
    identity |= {"host_memory": host_memory, "warmup_tokens": cfg.bench.warmup, "tokens": cfg.bench.tokens}
    rates = transfer(pinned=host_memory == "pinned") if on_gpu and host_memory != "-" else []
    if on_gpu:  # the whole model is on the GPU, no limit yet: load kernels
        for size in batch_sizes:
            start(model, cfg, size).step()
        budget.release()
    stored, blocks = place(model, placement, cfg)  # before the limit: pinned memory adds to the context
    with budget.enforce(cfg.bench.memory_mib) if on_gpu else nullcontext() as limits:
        if placement == "offload":
            buffers = runtime.attach(model, "block", prefetch=True)
        for size in batch_sizes:
            if on_gpu:
                budget.release()
                torch.cuda.reset_peak_memory_stats()
            rows = list(decode(model, cfg, size))
            values = {f"{place}_bytes": value for place, value in stored.items()} | {"manifest_bytes": manifest}
            values["buffer_bytes"] = buffers.nbytes if buffers else 0
            if limits:
                values |= limits.peaks()
                budget.release()
                values["resident_bytes"] = torch.cuda.memory_allocated()
                share = stored["host"] / sum(stored.values())
                rows.append({"metric": "fraction_offloaded", "value": share, "unit": "of stored bytes"})
            rows += [{"metric": metric, "value": value, "unit": "bytes"} for metric, value in values.items()]
            if blocks:
                rows.append({"metric": "blocks_offloaded", "value": blocks, "unit": "blocks"})
            rows += [
                {"metric": "host_to_device_gb_per_s", "value": rate, "unit": "GB/s", "repeat": repeat}
                for repeat, rate in enumerate(rates)
            ]
            yield size, [identity | {"batch_size": size} | row for row in rows]


def start(model: transformers.PreTrainedModel, cfg: Config, batch_size: int) -> Decoder:
    decoder = Decoder(model, batch_size, length(cfg))
    decoder.prefill(torch.full((batch_size, 1), PROMPT, device=decoder.device))
    return decoder


def decode(model: transformers.PreTrainedModel, cfg: Config, batch_size: int) -> Iterator[dict[str, Any]]:
    """Seconds of each repeat's steps, and what was decoded. A repeat goes on where the one before ended."""
    decoder = start(model, cfg, batch_size)
    for _ in range(cfg.bench.warmup - 1):  # the prefill gave the first token
        decoder.step()
    for repeat in range(cfg.bench.repeats):
        found = []
        timing.synchronize(cfg.device.name)
        begin = time.perf_counter()
        for _ in range(cfg.bench.tokens):
            decoder.step()
            found.append(decoder.ids.clone())
        timing.synchronize(cfg.device.name)
        seconds = (time.perf_counter() - begin) / cfg.bench.tokens
        yield {"metric": "s_per_step", "value": seconds, "unit": "s", "repeat": repeat}
        yield {"metric": "tokens_per_s", "value": batch_size / seconds, "unit": "tokens/s", "repeat": repeat}
        yield {"metric": "ids_crc32", "value": budget.crc32(torch.cat(found, 1)), "unit": "checksum", "repeat": repeat}
        yield {"metric": "logits_crc32", "value": budget.crc32(decoder.logits), "unit": "checksum", "repeat": repeat}


def transfer(pinned: bool) -> list[float]:
    """GB/s from host memory to the GPU."""
    host = torch.randint(256, (TRANSFER_BYTES,), dtype=torch.uint8, pin_memory=pinned)
    device = torch.empty(TRANSFER_BYTES, dtype=torch.uint8, device="cuda")
    seconds = timing.cuda_events({"copy": lambda: device.copy_(host, non_blocking=pinned)}, 1, 5)["copy"]
    return [TRANSFER_BYTES / value / 1e9 for value in seconds]


def activations(cfg: Config) -> int:
    """Bytes that the largest batch needs besides weights and their buffers: keys and values, once more those of a layer repeated
    for each query head, logits twice with room to spare, and RESERVE."""
    geometry = cfg.model.geometry
    sizes = Sizes.of(cfg.model)
    repeated = sizes.kv_per_token // sizes.blocks * (geometry["num_attention_heads"] // geometry["num_key_value_heads"])
    sequence = length(cfg) * (sizes.kv_per_token + repeated) + 4 * 2 * geometry["vocab_size"]
    return int(max(cfg.bench.batch_sizes) * sequence) + RESERVE


def spare(cfg: Config) -> int:
    """Bytes of the budget that weights and their buffers may take."""
    return cfg.bench.memory_mib * MIB - CONTEXT - activations(cfg)


def place(model: transformers.PreTrainedModel, placement: str, cfg: Config) -> tuple[dict[str, int], int]:
    """Move to host memory what the placement keeps there. Returns the stored bytes by place, and how many blocks offload_ moved."""
    sizes = Sizes.of(cfg.model)
    blocks, on_gpu = 0, cfg.device.name == "cuda"
    if placement == "offload":
        blocks = blocks_to_offload(sizes, spare(cfg)) if on_gpu else (sizes.blocks + 1) // 2
        modules.offload_(model, blocks)
    if on_gpu:
        budget.release()
    if placement != "accelerate":
        return modules.stored_bytes(model), blocks
    device_map = map_devices(model, spare(cfg), sizes.model)
    stored = dispatch(model, device_map)
    return stored, blocks


def dispatch(model: transformers.PreTrainedModel, device_map: dict[str, Any]) -> dict[str, int]:
    """Let accelerate move modules between host memory and the GPU, where they are. Returns the stored bytes by place."""
    from accelerate import dispatch_model

    for name, device in device_map.items():
        if device == "cpu":
            model.get_submodule(name).to("cpu")
    budget.release()
    stored = modules.stored_bytes(model)
    dispatch_model(model, device_map, skip_keys=model._skip_keys_device_placement)
    return stored


def blocks_to_offload(sizes: Sizes, spare: int) -> int:
    """The fewest blocks whose weights must leave the GPU so that the rest and two blocks' buffers fit into `spare` bytes.

    ValueError where nothing needs to be offloaded, or all blocks are not enough.
    """
    if sizes.model <= spare:
        raise ValueError(
            f"the model has {sizes.model} bytes, {spare} are there for it: nothing would be offloaded, lower bench.memory_mib"
        )
    blocks = math.ceil((sizes.model + 2 * sizes.block - spare) / sizes.block)
    if blocks > sizes.blocks:
        raise ValueError(
            f"{spare} bytes are too few for the model even with all {sizes.blocks} blocks offloaded: raise bench.memory_mib"
        )
    return blocks


def map_devices(model: transformers.PreTrainedModel, gpu: int, host: int) -> dict[str, Any]:
    """Where accelerate puts each module: for one GPU what device_map="auto" gives with max_memory={0: gpu, "cpu": host}, in bytes.

    ValueError where nothing would be offloaded to host memory.
    """
    from accelerate import infer_auto_device_map

    limits: dict[int | str, int | str] = {0: gpu, "cpu": host}
    device_map = dict(infer_auto_device_map(model, limits, no_split_module_classes=list(model._no_split_modules or [])))
    if set(device_map.values()) != {0, "cpu"}:
        places = ", ".join(sorted({str(place) for place in device_map.values()}))
        raise ValueError(f"accelerate would use {places} and not the GPU and host memory: change bench.memory_mib")
    return device_map


def table(rows: pd.DataFrame, cfg: Config) -> pd.DataFrame:
    """Median seconds a step and tokens/s of each variant, and how many times as fast as accelerate's."""
    index = ["codec", "placement", "granularity", "batch_size"]
    wanted = rows[rows["metric"].isin(["s_per_step", "tokens_per_s", "fraction_offloaded", "process_peak_bytes"])]
    wide = wanted.pivot_table(index=index, columns="metric", values="value", aggfunc="median", sort=False).reset_index()
    base = wide[wide["placement"] == "accelerate"].set_index("batch_size")["s_per_step"]
    if len(base):
        wide["times_accelerate"] = wide["batch_size"].map(base) / wide["s_per_step"]
    return wide.rename_axis(columns=None)
