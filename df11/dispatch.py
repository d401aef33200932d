"""Which way a linear layer in the tiled layout is computed, by a table measured once: fused, for 9 to 16 rows of x by wgmma or by
mma.sync, or decompressed and then by cuBLAS, all at once or in slices that stay in the L2 cache.

The table of a GPU is a readable JSON file in the cache, `<GPU>-<hash>.json` (of the kernels, of what decides how they are launched,
and of torch's and CUDA's versions): "rows x columns, rows of x" to the seconds of each way. $DF11_DISPATCH names another file: its
entries count as they are, and what it lacks is added to it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch.nn.functional import linear as dense_linear

from df11 import gpu, tiled_gpu
from df11.sources.cache import default_cache
from df11.tiled_gpu import MOST_ROWS
from df11.tiled_ops import ARRAYS, TiledWeight

REPEATS = 5
FLUSHES, MOST_FLUSHES = 20, 640  # some 1.6 and 50 ms
MOST_COPIES = 8
MOST_PRODUCTS = 2  # each of so many rows of x as one takes
MOST_SLICED = 128  # rows of x; with more the products of slices were up to a third slower than those of all weights
# Rows of x that are timed, more are as the last. Beyond those of a product it matters how many are left for the second.
BUCKETS = (1, *tiled_gpu.PRODUCTS, *(MOST_ROWS + size for size in tiled_gpu.PRODUCTS), 144, 160, 192, 256, 512, 2048)
NOT_MEASURED = 0.0  # seconds of the only way; not kept in the file
Table = dict[str, dict[str, float]]
Ways = dict[str, Callable[[TiledWeight], torch.Tensor]]


def linear(weight: TiledWeight, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x W^T + bias, bf16 [..., rows], the fastest way.

    Numbers of rows of x up to the same of BUCKETS share an entry of the table. One that it lacks is timed here, but not while a
    CUDA graph is captured: then as many as a product takes are taken to be faster fused, and more decompressed at once.
    """
    rows, columns = weight.shape
    if x.dtype != torch.bfloat16 or x.size(-1) != columns:
        raise ValueError(f"x: {x.dtype}{list(x.shape)}, needed torch.bfloat16 [..., {columns}]")
    index = x.get_device()
    if index != weight.index:
        raise ValueError(f"x: on {x.device}, the weights are on {weight.low.device}")
    batch = x.numel() // columns
    key = rows, columns, batch if batch < BUCKETS[-1] else BUCKETS[-1], index
    product = _fused.get(key)
    if product is not None:
        return product.linear(x, weight.packed.matrix, bias)
    return WAYS[_chosen.get(key) or _choose(key, weight, x, bias)](weight, x, bias)


@torch.library.impl("df11::linear", "CompositeExplicitAutograd")
def _linear(
    x: torch.Tensor, arrays: Sequence[torch.Tensor], uppers: int, rows: int, columns: int, bias: torch.Tensor | None = None
) -> torch.Tensor:
    return linear(TiledWeight.of(arrays, uppers, rows, columns), x, bias)


WAYS: dict[str, Callable[..., torch.Tensor]] = {  # of a weight, x and a bias or None
    "fused": lambda weight, x, bias: fused(weight, x, bias),
    "mma": lambda weight, x, bias: weight.linear(x, bias, wgmma=False),
    "decompress": lambda weight, x, bias: dense_linear(x, weight.decompress(), bias),
    "sliced": lambda weight, x, bias: sliced(weight, x, bias, slice_rows(weight, x.device)),
}
# What was chosen, by rows, columns, rows of x and GPU, and the launches of those that are fused: the host's time counts.
_chosen: dict[tuple[int, int, int, int], str] = {}
_fused: dict[tuple[int, int, int, int], tiled_gpu.Product] = {}


def _choose(key: tuple[int, int, int, int], weight: TiledWeight, x: torch.Tensor, bias: torch.Tensor | None) -> str:
    way = choose(weight, x, {name: functools.partial(way, x=x, bias=bias) for name, way in WAYS.items()})
    if x.is_cuda and not torch.cuda.is_current_stream_capturing():
        rows, columns, batch, index = key
        _chosen[key] = way
        if way in ("fused", "mma") and batch <= most_rows(x.device):
            _fused[key] = tiled_gpu.prepared(index, rows, columns, weight.fragments, batch, way == "fused")
    return way


def fused(weight: TiledWeight, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x W^T + bias, W never in memory; more rows of x than a product takes in parts, each of which reads the compressed weights."""
    most = most_rows(x.device)
    if x.numel() <= most * weight.shape[1]:
        return weight.linear(x, bias)
    parts = x.reshape(-1, weight.shape[1]).split(most)
    return torch.cat([weight.linear(part, bias) for part in parts]).view(*x.shape[:-1], weight.shape[0])


def most_rows(device: torch.device) -> int:
    """Of x that a product takes there."""
    return tiled_gpu.most_rows(device.index) if device.type == "cuda" else MOST_ROWS


def sliced(weight: TiledWeight, x: torch.Tensor, bias: torch.Tensor | None, rows: int) -> torch.Tensor:
    """x W^T + bias by so many rows of W at a time, decompressed into one buffer, which so stays in the L2 cache."""
    flat = x.reshape(-1, weight.shape[1])
    y = torch.empty(flat.shape[0], weight.shape[0], dtype=x.dtype, device=x.device)
    buffer = torch.empty(rows, weight.shape[1], dtype=torch.bfloat16, device=x.device)
    for start in range(0, weight.shape[0], rows):
        stop = min(start + rows, weight.shape[0])
        part = weight.part(start, stop).decompress(buffer[: stop - start]).T
        to = y[:, start:stop]
        if bias is None:
            torch.mm(flat, part, out=to)
        else:
            torch.addmm(bias[start:stop], flat, part, out=to)
    return y.view(*x.shape[:-1], weight.shape[0])


def slice_rows(weight: TiledWeight, device: torch.device) -> int:
    """Rows whose weights take half of the L2 cache (on a CPU 2 MB), in whole tiles."""
    half = torch.cuda.get_device_properties(device).L2_cache_size // 2 if device.type == "cuda" else 2 << 20
    return max(1, half // (2 * weight.shape[1] * tiled_gpu.TILE_ROWS)) * tiled_gpu.TILE_ROWS


def choose(weight: TiledWeight, x: torch.Tensor, ways: Ways) -> str:
    """A name of `ways`: `fused`, `mma`, `decompress` or `sliced`."""
    batch = x.numel() // weight.shape[1]
    if not x.is_cuda or batch == 0:
        return "fused" if batch == 1 else "decompress"
    file = _file(x.device.index)
    table, key = _table(file), _key(weight.shape, batch)
    if key not in table:
        in_fours = batch == 1 or weight.shape[1] % 4 == 0
        shape, index = (*weight.shape, weight.fragments), x.device.index
        most = most_rows(x.device)
        parts = (batch,) if batch <= most else (most, 1)  # of others in the bucket too
        fuses = batch <= MOST_PRODUCTS * most and in_fours and all(tiled_gpu.fits(*shape, rows, index) for rows in parts)
        if torch.cuda.is_current_stream_capturing():
            return "fused" if fuses and batch <= most else "decompress"
        mma = in_fours and tiled_gpu.has_both(batch, index) and tiled_gpu.fits(*shape, batch, index, wgmma=False)
        allowed = {"fused": fuses, "mma": mma, "sliced": batch <= MOST_SLICED}
        possible = {name: way for name, way in ways.items() if allowed.get(name, True)}
        try:
            table[key] = {name: _seconds(way, weight, x.device) for name, way in possible.items()}
        except torch.OutOfMemoryError:  # to measure takes room for all weights decompressed
            table[key] = {"fused" if fuses else "sliced": NOT_MEASURED}
        _save(file)
    return min(table[key], key=table[key].__getitem__)


def times(shape: tuple[int, int], batch: int, index: int) -> dict[str, float]:
    """Seconds of each way for so many rows of x, as the table of a GPU has them; empty where it lacks them."""
    return dict(_table(_file(index)).get(_key(shape, batch), {}))


@functools.lru_cache(1024)
def _key(shape: tuple[int, int], batch: int) -> str:
    bucket = min((size for size in BUCKETS if size >= batch), default=BUCKETS[-1])
    return f"{shape[0]} x {shape[1]}, {bucket}"


def _file(index: int) -> str:
    """Where the table of a GPU is: text, as it is looked up at every call."""
    return os.environ.get("DF11_DISPATCH") or _default_file(index)


@functools.cache
def _default_file(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    version = hashlib.sha256(gpu.digest("tiled", f"sm_{properties.major}{properties.minor}").encode())
    version.update(f"{torch.__version__} {torch.version.cuda}".encode())  # cuBLAS's too
    for module in (__file__, tiled_gpu.__file__):
        version.update(Path(module).read_bytes())
    return str(default_cache() / "dispatch" / f"{properties.name.replace(' ', '-')}-{version.hexdigest()[:16]}.json")


@functools.cache
def _table(file: str) -> Table:
    return _read(Path(file))


def _read(file: Path) -> Table:
    try:
        found: Table = json.loads(file.read_text()) if file.exists() else {}
    except ValueError as damaged:
        raise ValueError(f"{file} is no table of times ({damaged}): remove it, and what it held is measured again") from damaged
    return found


def _save(name: str) -> None:
    """Add what was measured to the file, which other processes may have written to."""
    measured, file = {key: times for key, times in _table(name).items() if NOT_MEASURED not in times.values()}, Path(name)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    partial.write_text(json.dumps(_read(file) | measured, indent=1) + "\n")
    partial.replace(file)


def _seconds(way: Callable[[TiledWeight], torch.Tensor], weight: TiledWeight, device: torch.device) -> float:
    """GPU time of one of several products in a row, each of weights that are not in the L2 cache: kernels overlap as in a model.

    The cache is flushed several times, so that the GPU is busy until the host has enqueued the rest. Where the host was slower, its
    time would count, and the sample does not, unless the host stays slower.
    """
    flush = torch.empty(4 * torch.cuda.get_device_properties(device).L2_cache_size, dtype=torch.uint8, device=device)
    copies = [weight, weight]
    if weight.nbytes < flush.nbytes:
        count = min(-(-flush.nbytes // weight.nbytes), MOST_COPIES)
        copies[1:] = [replace(weight, **{name: getattr(weight, name).clone() for name in ARRAYS}) for _ in range(count - 1)]
    way(weight)
    samples: list[float] = []
    flushes = FLUSHES
    stream = torch.cuda.current_stream(device)  # of a GPU that need not be the current one
    while len(samples) < REPEATS:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(flushes):
            flush.zero_()
        start.record(stream)
        for copy in copies:
            way(copy)
        end.record(stream)
        late = start.query()
        end.synchronize()
        if late and flushes < MOST_FLUSHES:
            flushes *= 2
        else:
            samples.append(start.elapsed_time(end) / 1e3 / len(copies))
    return min(samples)
