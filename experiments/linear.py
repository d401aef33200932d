"""The product y = W x of one linear layer: fused with decompression, against cuBLAS, and against decompression before cuBLAS,
whole and in slices.

Weights are N(0, 0.02^2), x is N(0, 1), made where they are used. On a GPU all is timed in CUDA graphs over copies of the weights,
together more than four times the L2 cache, so that each product reads its weights from memory. Before that the weights are compared
bit for bit, two fused products with each other, and their error with cuBLAS's against a product in float64.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

import pandas as pd
import torch
from torch.nn.functional import linear

from df11 import dispatch, tiled_gpu
from df11.tiled_ops import ARRAYS, TiledWeight
from experiments import budget, peers
from experiments.config import Config
from experiments.harness import timing
from experiments.harness.api import Need, Point

AXES = ("rows", "columns", "batch_size")
STD = 0.02
LIBRARIES = ("cublas", "cublaslt")
DRAWS = 16  # of x, for the error
MOST_ERROR = 1.05  # of cuBLAS's; more is said
LEAST_LAUNCHES = 24  # in a graph
ENCODER_BYTES = 2 << 30  # beside input and result
CHUNK = 1 << 25  # weights in float64 at a time
COPY = ("bf16", "copy", "-")
SHOWN = {  # column of the table: metric, codec, mode
    "us_cublas": ("us", "bf16", "-"),
    "us_fused": ("us", "tiled", "fused"),
    "us_exact": ("us", "tiled", "exact"),
    "us_dispatch": ("us", "tiled", "dispatch"),
    "speedup": ("speedup_vs_cublas", "tiled", "fused"),
    "error_vs_cublas": ("rms_error_vs_cublas", "tiled", "fused"),
    "bits_per_weight": ("bits_per_weight", "tiled", "-"),
    "decompression_gb_per_s": ("gb_per_s_bf16_output", "tiled", "-"),
}

Product = Callable[[torch.Tensor], torch.Tensor]
Variant = tuple[str, str, str]  # codec, kernel, mode (`-` of tiled: decompression alone)


def preflight(cfg: Config) -> Iterable[Need]:
    shapes = cfg.bench.shapes
    # The weights, what they are decompressed into, and the copies: dense and compressed.
    held = max((int((2 + 1.7 * copies(cfg, 2 * r * c)) * 2 * r * c) for r, c in shapes), default=0)
    held += timing.FLUSH_BYTES + ENCODER_BYTES
    gpu_memory = held if cfg.device.name == "cuda" else 0
    points = len(shapes) * len(cfg.bench.batch_sizes)
    return [Need(f"{points} products", memory=held - gpu_memory, gpu_memory=gpu_memory, minutes=0.05 * points)]


def run(cfg: Config, done: Mapping[str, list[dict[str, Any]]]) -> Iterator[Point]:
    about = {"distribution": f"W: N(0, {STD}^2), x: N(0, 1), torch generator seed {cfg.seed} and those after it"}
    for rows, columns in cfg.bench.shapes:
        missing = {key: size for size in cfg.bench.batch_sizes if (key := f"{rows} x {columns}, {size}") not in done}
        matrix = Matrix(cfg, rows, columns) if missing else None
        for key, batch_size in missing.items():
            # The shapes are of several models, the config's is none of them.
            identity = {"model": "-", "weights": "synthetic-normal"}
            identity |= {"rows": rows, "columns": columns, "batch_size": batch_size}
            found = [identity | row for row in measure(cfg, matrix, batch_size)]
            on_gpu = cfg.device.name == "cuda"
            times = dispatch.times((rows, columns), batch_size, torch.cuda.current_device()) if on_gpu else {}
            yield Point(key, found, about | ({f"dispatch, seconds: {key}": times} if times else {}))
        del matrix
        budget.release()


class Matrix:
    """The weights of one shape, in BF16 and compressed, and the copies that are walked over.

    Raises ValueError where they do not come back bit for bit.
    """

    def __init__(self, cfg: Config, rows: int, columns: int) -> None:
        self.weights = normal(cfg, 0, rows, columns, STD)
        budget.release()  # the float32 draw
        self.out = torch.full_like(self.weights, 1)
        self.tiled = TiledWeight.encode(self.weights)
        if self.tiled and not same(self.tiled.decompress(self.out), self.weights):
            raise ValueError(f"the {rows} x {columns} weights do not come back bit for bit")
        budget.release()
        self.count = copies(cfg, self.tiled.nbytes if self.tiled else self.weights.nbytes)
        self.dense = self.weights.repeat(self.count, 1, 1)
        self.packed = [self.tiled] if self.tiled else []
        for tiled in self.packed * (self.count - 1):
            self.packed.append(replace(tiled, **{name: getattr(tiled, name).clone() for name in ARRAYS}))
        self.peers = peers.Peers(self.weights, self.count)


def measure(cfg: Config, matrix: Matrix, batch_size: int) -> Iterator[dict[str, Any]]:
    """Rows of one shape and batch size: the error, then the samples of all variants."""
    on_gpu = cfg.device.name == "cuda"
    kernel, launch = ("tiled", "graph") if on_gpu else ("cpu", "eager")
    baselines = libraries() if on_gpu else ["cpu"]
    weights, tiled, dense, packed, count = matrix.weights, matrix.tiled, matrix.dense, matrix.packed, matrix.count
    rows, columns = weights.shape
    x, half = normal(cfg, 1, batch_size, columns), count // 2
    fuses = batch_size <= dispatch.MOST_PRODUCTS * dispatch.most_rows(x.device)
    if tiled:
        bits = 8 * tiled.nbytes / weights.numel()
        yield {"codec": "tiled", "metric": "bits_per_weight", "value": bits, "unit": "bits"}
        if fuses:
            xs = torch.stack([normal(cfg, 1 + draw, batch_size, columns) for draw in range(DRAWS)])
            products: dict[str, Product] = {kernel: lambda x: dispatch.fused(tiled, x)}
            if on_gpu and tiled_gpu.has_both(batch_size, x.get_device()):
                products["mma"] = lambda x: tiled.linear(x, wgmma=False)
            for name, product in products.items():
                error = fused_error(product, weights, xs, baselines[0])
                if error > MOST_ERROR:
                    print(f"{rows} x {columns}: the RMS error of products by {name} is {error:.3f} of cuBLAS's", file=sys.stderr)
                fused = {"codec": "tiled", "kernel": name, "mode": "fused"}
                yield fused | {"metric": "rms_error_vs_cublas", "value": error, "unit": "ratio"}
    alone, vectors = ("tiled", kernel, "-"), x.nbytes + 2 * batch_size * rows
    works: dict[Variant, Callable[[int], object]] = {COPY: lambda i: dense[half : 2 * half].copy_(dense[:half])}
    moved = {COPY: 2 * half * weights.nbytes}  # bytes that have to be read and written
    for library in baselines:
        works["bf16", library, "-"] = lambda i: linear(x, dense[i])
        moved["bf16", library, "-"] = weights.nbytes + vectors
    if tiled:
        works[alone] = lambda i: packed[i].decompress(dense[i])
        works["tiled", kernel, "exact"] = lambda i: linear(x, packed[i].decompress(matrix.out))
        works["tiled", "sliced", "exact"] = lambda i: dispatch.sliced(packed[i], x, None, dispatch.slice_rows(tiled, x.device))
        works["tiled", "dispatch", "fused"] = lambda i: dispatch.linear(packed[i], x)
        dispatch.linear(tiled, x)  # measures where its table lacks the shape
        if fuses:
            works["tiled", kernel, "fused"] = lambda i: dispatch.fused(packed[i], x)
        if on_gpu and tiled_gpu.has_both(batch_size, x.get_device()):
            works["tiled", "mma", "fused"] = lambda i: packed[i].linear(x, wgmma=False)
        moved |= dict.fromkeys(works.keys() - moved.keys(), tiled.nbytes + vectors) | {alone: tiled.nbytes + weights.nbytes}
    for codec, peer in matrix.peers.of(x).items():
        works[codec, codec, "fused"] = partial(peer, x=x)
        moved[codec, codec, "fused"] = peer.nbytes + vectors
        yield {"codec": codec, "metric": "bits_per_weight", "value": 8 * peer.nbytes / weights.numel(), "unit": "bits"}
    seconds = timed(cfg, works, count)
    middle = {variant: median(samples) for variant, samples in seconds.items()}
    fastest = min(middle["bf16", library, "-"] for library in baselines)
    for variant, samples in seconds.items():
        identity = dict(zip(("codec", "kernel", "mode"), variant, strict=True)) | {"launch": launch}
        for repeat, value in enumerate(samples):
            if variant != COPY:
                yield identity | {"metric": "us", "value": 1e6 * value, "unit": "us", "repeat": repeat}
            if variant in (COPY, alone):
                rate = (half if variant == COPY else 1) * weights.nbytes / value / 1e9
                yield identity | {"metric": "gb_per_s_bf16_output", "value": rate, "unit": "GB/s", "repeat": repeat}
        if variant not in (COPY, alone):
            yield identity | {"metric": "speedup_vs_cublas", "value": fastest / middle[variant], "unit": "ratio"}
        if variant != COPY:
            share = 100 * moved[variant] / moved[COPY] * middle[COPY] / middle[variant]
            yield identity | {"metric": "share_of_ceiling", "value": share, "unit": "%"}


def normal(cfg: Config, seed: int, rows: int, columns: int, std: float = 1.0) -> torch.Tensor:
    """bf16 [rows, columns] on the device. seed: counted from the config's."""
    generator = torch.Generator(cfg.device.name).manual_seed(cfg.seed + seed)
    return torch.randn(rows, columns, device=cfg.device.name, generator=generator).mul_(std).bfloat16()


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(torch.int16), b.view(torch.int16))


def copies(cfg: Config, nbytes: int) -> int:
    """How many buffers of so many bytes to walk over: together more than four times the GPU's L2 cache, and two at least."""
    on_gpu = cfg.device.name == "cuda" and torch.cuda.is_available()
    return max(2, 4 * torch.cuda.get_device_properties().L2_cache_size // nbytes + 1) if on_gpu else 2


def libraries() -> list[str]:
    """Those of LIBRARIES that torch can be made to use."""
    found = []
    for name in LIBRARIES:
        try:
            with preferred(name):
                found.append(name)
        except RuntimeError as error:
            print(f"{name}: no rows: {str(error).splitlines()[0]}", file=sys.stderr)
    return found


@contextmanager
def preferred(kernel: str) -> Iterator[None]:
    """Make torch compute products by this library while inside. Any kernel but a library changes nothing."""
    if kernel not in LIBRARIES:
        yield
        return
    before = torch.backends.cuda.preferred_blas_library()
    torch.backends.cuda.preferred_blas_library(kernel)
    try:
        yield
    finally:
        torch.backends.cuda.preferred_blas_library(before)


def fused_error(product: Product, weights: torch.Tensor, xs: torch.Tensor, library: str) -> float:
    """RMS error of fused products of xs [draws, batch, columns], as a part of the library's. ValueError where two runs differ."""
    fused, again = (torch.cat([product(x) for x in xs]) for _ in range(2))
    if not same(fused, again):
        raise ValueError(f"two fused products of a {weights.shape[0]} x {weights.shape[1]} matrix differ")
    with preferred(library):
        products = torch.stack([fused, torch.cat([linear(x, weights) for x in xs])])
    rows = max(1, CHUNK // weights.shape[1])
    squares = torch.zeros(2, dtype=torch.float64, device=weights.device)
    for part, found in zip(weights.split(rows), products.split(rows, -1), strict=True):
        squares += (found.double() - xs.flatten(0, 1).double() @ part.double().T).square().sum((1, 2))
    return float((squares[0] / squares[1]).sqrt())


def timed(cfg: Config, works: Mapping[Variant, Callable[[int], object]], count: int) -> dict[Variant, list[float]]:
    """Seconds of each work on one of `count` buffers, whose number it is given. On a GPU a sample is a graph over all buffers."""
    warmup, repeats = cfg.bench.warmup, cfg.bench.repeats
    if cfg.device.name == "cpu":
        return {v: [s / count for s in timing.wall_clock(partial(walk, w, count), warmup, repeats)] for v, w in works.items()}
    rounds = -(-LEAST_LAUNCHES // count)
    graphs = {}
    for variant, work in works.items():
        with preferred(variant[1]):  # what is captured now is what is replayed
            graphs[" ".join(variant)] = timing.graph(partial(walk, work, count, rounds))
    seconds = timing.cuda_events(graphs, warmup, repeats)
    return {variant: [value / (rounds * count) for value in seconds[" ".join(variant)]] for variant in works}


def walk(work: Callable[[int], object], count: int, rounds: int = 1) -> None:
    for _ in range(rounds):
        for i in range(count):
            work(i)


def table(rows: pd.DataFrame, cfg: Config) -> pd.DataFrame:
    """Medians, a line a shape and batch size; of cuBLAS and cuBLASLt the faster."""
    index, name = ["rows", "columns", "batch_size"], ["metric", "codec", "mode"]
    rows = rows.assign(mode=rows["mode"].where(~rows["kernel"].isin(["dispatch", "mma"]), rows["kernel"]))
    middle = rows[rows["kernel"] != "copy"].groupby([*index, *name, "kernel"], sort=False, as_index=False)["value"].median()
    wide = middle.pivot_table(index=index, columns=name, values="value", aggfunc="min", sort=False)
    return wide.reindex(columns=list(SHOWN.values())).set_axis(list(SHOWN), axis=1).reset_index()
