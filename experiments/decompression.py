"""Fig. 7: decompression speed against matrix size, for every kernel, nvCOMP ANS, transfer from the CPU, and the copy as ceiling.

Weights are N(0, 0.02^2), made where they are used. Every decoder's bits are compared with the weights before it is timed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import pandas as pd
import torch

from df11 import gpu, hf, nvcomp, ops, released
from df11.sources import split_units
from df11.tiled_ops import TiledWeight
from experiments.config import Config
from experiments.harness import timing
from experiments.harness.api import Need, Point

AXES = ("unit_kind", "rows", "columns")
STD = 0.02
CALLS = 200  # of the operator, to time its host side

Variant = tuple[str, str]  # codec, kernel


def preflight(cfg: Config) -> Iterable[Need]:
    shapes = units(cfg)
    largest = max((rows * columns for _, rows, columns in shapes), default=0)
    held = 9 * largest + timing.FLUSH_BYTES  # the weights twice, twice compressed, and the flush
    gpu_memory = held if cfg.device.name == "cuda" else 0
    return [Need(f"{len(shapes)} matrices", memory=4 * largest, gpu_memory=gpu_memory, minutes=0.1 * len(shapes))]


def units(cfg: Config) -> list[tuple[str, int, int]]:
    """What, rows, columns: the configured matrices, and all linear weights of one of the model's blocks as one unit."""
    found = [("matrix", rows, columns) for rows, columns in cfg.bench.shapes]
    if cfg.model.geometry:
        parts, _ = split_units(hf.tensor_shapes(cfg.model.geometry), 1)
        for block in [unit for unit in parts if unit.kind == "block"][:1]:
            columns = block.tensors[0].shape[-1]
            found.append(("block", sum(t.numel for t in block.tensors) // columns, columns))
    return found


def run(cfg: Config, done: Mapping[str, list[dict[str, Any]]]) -> Iterator[Point]:
    about = {"distribution": f"N(0, {STD}^2), torch generator seed {cfg.seed}"}
    for unit, rows, columns in units(cfg):
        key = f"{unit} {rows} x {columns}"
        if key not in done:
            identity = {"weights": "synthetic-normal", "unit_kind": unit, "rows": rows, "columns": columns}
            measured = on_gpu(cfg, rows, columns) if cfg.device.name == "cuda" else on_cpu(cfg, rows, columns)
            yield Point(key, [identity | row for row in measured], about)


def on_gpu(cfg: Config, rows: int, columns: int) -> Iterator[dict[str, Any]]:
    generator = torch.Generator("cuda").manual_seed(cfg.seed)
    weights = (torch.randn(rows, columns, device="cuda", generator=generator) * STD).bfloat16()
    torch.cuda.empty_cache()  # the float32 draw
    out = torch.full_like(weights, 1)
    unit = ops.encode([weights])
    host, pinned = weights.cpu(), weights.cpu().pin_memory()
    works: dict[Variant, Callable[[], object]] = {
        ("bf16", "copy"): lambda: out.copy_(weights),
        ("bf16", "cpu_to_gpu_pinned"): lambda: out.copy_(pinned, non_blocking=True),
        ("bf16", "cpu_to_gpu_pageable"): lambda: out.copy_(host),
    }
    size = {"bf16": weights.nbytes, "dfloat11": unit.nbytes}
    for kernel in gpu.DECODERS:
        works["dfloat11", kernel] = lambda kernel=kernel: unit.decompress(out.view(-1), kernel)  # type: ignore[misc]
    if tiled := TiledWeight.encode(weights):
        works["tiled", "tiled"] = lambda: tiled.decompress(out)
        size["tiled"] = tiled.nbytes
    if released.is_installed():
        decode = released.decoder(unit)
        works["dfloat11", "released"] = lambda: decode(out)
    exponents = (weights.view(torch.int16) >> 7).to(torch.uint8)
    if nvcomp.is_installed():
        whole, part = nvcomp.AnsBatch.compress(weights), nvcomp.AnsBatch.compress(exponents)
        as_bytes = nvcomp.AnsBatch.compress(weights.view(torch.uint8))
        works["nvcomp_ans_bytes", "nvcomp"] = lambda: as_bytes.decompress(out)  # without its mode for half precision
        # Its exponents are not merged with sign and mantissa: what that would take comes on top.
        works["nvcomp_ans", "nvcomp"] = lambda: whole.decompress(out)
        bytes_out = torch.empty_like(exponents)
        works["nvcomp_ans_exponents", "nvcomp"] = lambda: part.decompress(bytes_out)
        size |= {
            "nvcomp_ans": whole.nbytes,
            "nvcomp_ans_bytes": as_bytes.nbytes,
            "nvcomp_ans_exponents": part.nbytes + weights.numel(),
        }
    for (codec, kernel), work in works.items():
        out.fill_(1)
        work()
        torch.cuda.synchronize()
        expected, got = (exponents, bytes_out) if codec == "nvcomp_ans_exponents" else (weights, out)
        if not torch.equal(expected.view(torch.uint8), got.view(torch.uint8)):
            raise ValueError(f"{codec}, {kernel}: the {rows} x {columns} weights do not come back bit for bit")
    # Transfers apart: while one runs the GPU idles and lowers its clocks, which would slow down what comes next.
    seconds = {}
    for transfers in (False, True):
        group = {" ".join(v): w for v, w in works.items() if v[1].startswith("cpu_to_gpu") == transfers}
        seconds |= timing.cuda_events(group, cfg.bench.warmup, cfg.bench.repeats)
    copied_per_s = 2 * weights.nbytes / pd.Series(seconds["bf16 copy"]).median()
    for codec, kernel in works:
        samples = seconds[f"{codec} {kernel}"]
        yield from speed(codec, kernel, samples, weights.nbytes)
        if not kernel.startswith("cpu_to_gpu"):
            least = (weights.nbytes + size[codec]) / copied_per_s
            share = 100 * least / pd.Series(samples).median()
            yield {"codec": codec, "kernel": kernel, "metric": "share_of_ceiling", "value": share, "unit": "%"}
    for codec, compressed in size.items():
        yield {"codec": codec, "metric": "ratio_percent", "value": 100 * compressed / weights.nbytes, "unit": "%"}
    yield {"codec": "dfloat11", "kernel": "fast", "metric": "call_us", "value": call_us(unit, out), "unit": "us"}


def call_us(unit: ops.CompressedUnit, out: torch.Tensor) -> float:
    """Host time of one call of the operator, with the GPU far behind, so that no call waits for it."""
    out = out.view(-1)
    best = math.inf
    for _ in range(3):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(CALLS):
            unit.decompress(out)
        best = min(best, time.perf_counter() - start)
    torch.cuda.synchronize()
    return 1e6 * best / CALLS


def on_cpu(cfg: Config, rows: int, columns: int) -> Iterator[dict[str, Any]]:
    weights = (torch.randn(rows, columns, generator=torch.Generator().manual_seed(cfg.seed)) * STD).bfloat16()
    unit, out = ops.encode([weights]), torch.empty_like(weights)
    unit.decompress(out.view(-1))
    if not torch.equal(weights.view(torch.int16), out.view(torch.int16)):
        raise ValueError(f"the {rows} x {columns} weights do not come back bit for bit")
    works: dict[Variant, Callable[[], object]] = {
        ("bf16", "copy"): lambda: out.copy_(weights),
        ("dfloat11", "cpu"): lambda: unit.decompress(out.view(-1)),
    }
    for (codec, kernel), work in works.items():
        yield from speed(codec, kernel, timing.wall_clock(work, cfg.bench.warmup, cfg.bench.repeats), weights.nbytes)
    yield {"codec": "dfloat11", "metric": "ratio_percent", "value": 100 * unit.nbytes / weights.nbytes, "unit": "%"}


def speed(codec: str, kernel: str, seconds: list[float], size: int) -> Iterator[dict[str, Any]]:
    for repeat, value in enumerate(seconds):
        identity = {"codec": codec, "kernel": kernel, "repeat": repeat}
        yield identity | {"metric": "us", "value": value * 1e6, "unit": "us"}
        yield identity | {"metric": "gb_per_s_bf16_output", "value": size / value / 1e9, "unit": "GB/s"}


def table(rows: pd.DataFrame, cfg: Config) -> pd.DataFrame:
    """Median GB/s of bf16 output, a column a kernel."""
    fast = rows[rows["metric"] == "gb_per_s_bf16_output"]
    names = fast["codec"].where(fast["kernel"] == "nvcomp", fast["kernel"])
    wide = fast.assign(name=names).pivot_table(
        index=["unit_kind", "rows", "columns"], columns="name", values="value", aggfunc="median", sort=False
    )
    return wide.round(1).reset_index().rename_axis(columns=None)
