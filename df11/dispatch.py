"""Which way a linear layer in the tiled layout is computed: fused, or decompressed and then by cuBLAS, by a table measured once.

The table of a GPU is a readable JSON file in the cache, `<GPU>-<hash of the kernels>.json`: "rows x columns, rows of x" to the
seconds of each way. $DF11_DISPATCH names another file: its entries count as they are, and what it lacks is added to it.
"""

from __future__ import annotations

import functools
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
NOT_MEASURED = 0.0  # seconds of the only way; not kept in the file
Table = dict[str, dict[str, float]]
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
        if not tiled_gpu.fits(*weight.shape, weight.fragments, batch, x.device.index):
            table[key] = {"decompress": NOT_MEASURED}
        elif torch.cuda.is_current_stream_capturing():
            return "fused" if bucket <= min(tiled_gpu.PRODUCTS) else "decompress"
        else:
            try:
                table[key] = {name: _seconds(way, x.device) for name, way in ways.items()}
            except torch.OutOfMemoryError:  # to measure takes room for the weights decompressed
                table[key] = {"fused": NOT_MEASURED}
        _save(path(x.device.index))
    return min(table[key], key=table[key].__getitem__)


def path(index: int) -> Path:
    """Where the table of a GPU is."""
    named = os.environ.get("DF11_DISPATCH")
    return Path(named) if named else _default_path(index)


@functools.cache
def _default_path(index: int) -> Path:
    properties = torch.cuda.get_device_properties(index)
    version = gpu.digest("tiled", f"sm_{properties.major}{properties.minor}")
    return default_cache() / "dispatch" / f"{properties.name.replace(' ', '-')}-{version}.json"


@functools.cache
def _table(file: Path) -> Table:
    return _read(file)


def _read(file: Path) -> Table:
    try:
        found: Table = json.loads(file.read_text()) if file.exists() else {}
    except ValueError as damaged:
        raise ValueError(f"{file} is no table of times ({damaged}): remove it, and what it held is measured again") from damaged
    return found


def _save(file: Path) -> None:
    """Add what was measured to the file, which other processes may have written to."""
    measured = {key: times for key, times in _table(file).items() if NOT_MEASURED not in times.values()}
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    partial.write_text(json.dumps(_read(file) | measured, indent=1) + "\n")
    partial.replace(file)


def _seconds(way: Callable[[], torch.Tensor], device: torch.device) -> float:
    """GPU time with a cold L2 cache.

    The cache is flushed several times: so the GPU is busy until the host has enqueued the rest, whose time would count otherwise.
    """
    flush = torch.empty(4 * torch.cuda.get_device_properties(device).L2_cache_size, dtype=torch.uint8, device=device)
    way()
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
