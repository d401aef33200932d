"""Which way a linear layer in the tiled layout is computed: fused, or decompressed and then by cuBLAS, by a table measured once.

The table of a GPU is a readable JSON file in the cache, `<GPU>-<hash of the kernels>.json`: "rows x columns, rows of x" to the
seconds of each way. $DF11_DISPATCH names another file: its entries count as they are, and what it lacks is added to it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.functional import linear as dense_linear

from df11 import gpu, tiled_gpu
from df11.sources.cache import default_cache
from df11.tiled_ops import MOST_ROWS, TiledWeight

REPEATS = 5
FLUSHES = 10  # some 0.8 ms
Ways = dict[str, Callable[[], torch.Tensor]]


def linear(weight: TiledWeight, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x W^T + bias, bf16 [..., rows], the faster way.

    Rows of x that share a kernel share an entry of the table. A shape that it lacks is timed here, but not while a CUDA graph is
    captured: then few rows are taken to be faster fused.
    """
    ways: Ways = {
        "fused": lambda: weight.linear(x, bias),
        "decompress": lambda: dense_linear(x, weight.decompress(), bias),
    }
    return ways[choose(weight, x, ways)]()


def choose(weight: TiledWeight, x: torch.Tensor, ways: Ways) -> str:
    """`fused` or `decompress`."""
    batch = x.numel() // weight.shape[1]
    if not 1 <= batch <= MOST_ROWS or (batch > 1 and weight.shape[1] % 4):
        return "decompress"
    if not x.is_cuda:
        return "fused" if batch == 1 else "decompress"
    bucket = 1 if batch == 1 else min(size for size in tiled_gpu.PRODUCTS if size >= batch)
    table, key = _table(path(x.device.index)), f"{weight.shape[0]} x {weight.shape[1]}, {bucket}"
    if key not in table:
        if torch.cuda.is_current_stream_capturing():
            return "fused" if bucket <= min(tiled_gpu.PRODUCTS) else "decompress"
        try:
            found = {name: seconds for name, way in ways.items() if (seconds := _seconds(way, x.device))}
        except torch.OutOfMemoryError:  # to measure takes room for the weights decompressed
            return "fused"
        table[key] = found
        _save(path(x.device.index))
    return min(table[key], key=table[key].__getitem__)


def path(index: int) -> Path:
    """Where the table of a GPU is."""
    named = os.environ.get("DF11_DISPATCH")
    return Path(named) if named else _default_path(index)


@functools.cache
def _default_path(index: int) -> Path:
    version = hashlib.sha256((gpu.SOURCES / "tiled.cu").read_bytes()).hexdigest()[:12]
    name = torch.cuda.get_device_properties(index).name.replace(" ", "-")
    return default_cache() / "dispatch" / f"{name}-{version}.json"


@functools.cache
def _table(file: Path) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = json.loads(file.read_text()) if file.exists() else {}
    return found


def _save(file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    partial.write_text(json.dumps(_table(file), indent=1) + "\n")
    partial.replace(file)


def _seconds(way: Callable[[], torch.Tensor], device: torch.device) -> float | None:
    """GPU time with a cold L2 cache, None where x does not fit.

    The cache is flushed several times: so the GPU is busy until the host has enqueued the rest, whose time would count otherwise.
    """
    flush = torch.empty(4 * torch.cuda.get_device_properties(device).L2_cache_size, dtype=torch.uint8, device=device)
    try:
        way()
    except ValueError:
        return None
    samples = []
    stream = torch.cuda.current_stream(device)  # of a GPU that need not be the current one
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(FLUSHES):
            flush.zero_()
        start.record(stream)
        way()
        end.record(stream)
        end.synchronize()
        samples.append(start.elapsed_time(end) / 1e3)
    return float(statistics.median(samples))
