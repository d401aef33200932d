"""How fast encoders compress one transformer block (paper Table 5): seconds and MB/s of bf16, ours and the released one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import pandas as pd
import torch

from df11 import ops, released
from df11.formats import chunks_of, get_format
from df11.sources import open_source, split_units
from experiments import needs
from experiments.config import Config
from experiments.harness import timing
from experiments.harness.api import Need, Point

AXES = ("module", "threads")


def inputs(cfg: Config) -> object:
    return needs.inputs(cfg.model)


def preflight(cfg: Config) -> Iterable[Need]:
    return [needs.compression(cfg)]


def run(cfg: Config, done: Mapping[str, list[dict[str, Any]]]) -> Iterator[Point]:
    source = open_source(cfg.model, cfg.seed, cfg.cache)
    units, _ = split_units(source.tensors(), cfg.model.sample_blocks)
    block = next((unit for unit in units if unit.kind == "block"), None)
    if block is None or cfg.codec.name != "dfloat11":
        raise ValueError(f"{cfg.model.name}, codec={cfg.codec.name}: a model with transformer blocks and codec=dfloat11 are needed")
    tensors = [source.read(tensor.name) for tensor in block.tensors]
    size = sum(tensor.nbytes for tensor in tensors)
    identity = {"weights": source.weights, "codec": cfg.codec.name, "module": block.name}

    def encode(threads: int) -> Callable[[], object]:
        codec = get_format(cfg.codec.name, **cfg.codec.options | {"threads": threads})
        return lambda: codec.encode(chunks_of(tensors), [tuple(t.shape) for t in tensors])

    for threads in dict.fromkeys(n or len(os.sched_getaffinity(0)) for n in cfg.bench.threads):
        key = f"ours, {threads} threads"
        if key not in done:
            seconds = timing.wall_clock(encode(threads), cfg.bench.warmup, cfg.bench.repeats)
            yield Point(key, [identity | {"kernel": "cpu", "threads": threads} | r for r in rows(seconds, size)], source.provenance)
    if cfg.device.name == "cuda" and "gpu" not in done:
        on_gpu = [tensor.cuda() for tensor in tensors]
        expected, made = encode(0)(), ops.encode(on_gpu).to_unit()
        if any((array != made.arrays[name]).any() for name, array in expected.arrays.items()):
            raise ValueError(f"{block.name}: the GPU encoder's bytes are not the CPU encoder's")

        def encode_on_gpu() -> None:
            ops.encode(on_gpu)
            torch.cuda.synchronize()

        seconds = timing.wall_clock(encode_on_gpu, cfg.bench.warmup, cfg.bench.repeats)
        yield Point("gpu", [identity | {"kernel": "gpu"} | r for r in rows(seconds, size)], source.provenance)
    # Pure Python, minutes for a large block: timed once, and its result is the same each time.
    if "released" not in done and released.is_installed():
        seconds = timing.wall_clock(lambda: released.encode(tensors), warmup=0, repeats=1)
        yield Point(
            "released", [identity | {"kernel": "released", "threads": 1} | r for r in rows(seconds, size)], source.provenance
        )


def rows(seconds: list[float], size: int) -> Iterator[dict[str, Any]]:
    for repeat, value in enumerate(seconds):
        yield {"metric": "seconds_per_block", "value": value, "unit": "s", "repeat": repeat}
        yield {"metric": "mb_per_s_bf16", "value": size / 1e6 / value, "unit": "MB/s", "repeat": repeat}
    yield {"metric": "block_bytes", "value": size, "unit": "bytes"}


def table(rows: pd.DataFrame, cfg: Config) -> pd.DataFrame:
    """Medians an encoder, and how many times the released encoder's speed."""
    wide = rows.pivot_table(index=["module", "kernel", "threads"], columns="metric", values="value", aggfunc="median").reset_index()
    baseline = wide.loc[wide["kernel"] == "released", "mb_per_s_bf16"]
    out = wide.rename(columns={"seconds_per_block": "s/block", "mb_per_s_bf16": "MB/s", "block_bytes": "bytes"})
    if len(baseline):
        out["x released"] = out["MB/s"] / baseline.iloc[0]
    return out
