"""The kernels of kernels/tiled*.cu on a GPU: product, decompression and single rows of a matrix in the tiled layout.

Arguments as the operators of df11/tiled_ops.py take them. The weights' arrays are trusted to fit each other (`Tiled.check`), and
must not be written by the last other kernel on the same stream: these kernels begin while those before them end.
"""

from __future__ import annotations

import functools
import itertools
import struct
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from df11 import driver, gpu

MATRIX = struct.Struct("PPPPPPQiii4x")  # tiled::Matrix
LANES, TILE_ROWS = 32, 16
MOST_WARPS, PRODUCT_WARPS = 28, 24  # tiled::kMostWarps, kProductWarps
MOST_X_TWICE = 12 * 1024  # bytes: to bring more to each of two thread blocks a multiprocessor costs more than they gain
RESERVED = 1024  # bytes of each thread block's shared memory, which the system keeps
# tiled_products_...: the most rows of x, the warps that registers allow, and those that keep memory busy.
PRODUCTS = {8: (28, 20), 16: (24, 20), 32: (16, 16), 64: (16, 16)}
MOST_ROWS = max(PRODUCTS)  # of x by mma.sync
MOST_SPLITS = 8
# What plan_rows assumes, in tiles or bytes a tile (of the 0.4 us in which every multiprocessor of an H200 reads one).
STAGE, STAGE_BYTES = 1.5, 44_000
GROUP = 1.5  # for each warp of several that share a row of tiles
ADD_UP, ADD_UP_BYTES = 2.0, 1_800_000
ADD_UP_THREADS = 256


class WideKernel(NamedTuple):
    """tiled_wide_... of compute capability 9.0: kSlots, kChunks, kBuffers, kWideWarps / 4 of the kernel for so many rows of x, and
    what plan_wide assumes of the time of a tile, in us on an H100: so much, and so much more for each warpgroup."""

    slots: int
    chunks: int
    buffers: int
    warpgroups: int
    once: float
    more: float

    def shared(self, rows: int, warps: int, fragments: int) -> int:
        """Bytes for x, for low bytes on their way, and for codes beyond those of a tile for each warp."""
        return 128 * rows * self.slots + warps * (CHUNK_BYTES * self.chunks + (self.buffers - 1) * code_bytes(fragments))


WIDE = {
    16: WideKernel(8, 3, 2, 4, 3.0, 0.7),
    32: WideKernel(8, 3, 2, 4, 1.7, 0.9),
    64: WideKernel(4, 3, 2, 4, 2.8, 1.5),
    128: WideKernel(4, 4, 1, 3, 3.8, 1.2),
}
WARPGROUP = 4  # warps
CHUNK_BYTES = 9 * 4 * LANES  # kLow + kSigns
WIDE_ADD_UP, WIDE_ADD_UP_BYTES = 3.0, 3_000_000  # us, bytes a us
PACK_THREADS = 256
WIDE_SPREAD, SPREAD = "QQQiiii", "Qiiiii4x"  # tiled::Wide, tiled::Spread
RULES = {  # of the arrays in their order: dtype, dimensions, alignment
    "low": (torch.uint8, 4, 16),
    "sign": (torch.int32, 3, 4),
    "stream": (torch.uint8, 2, 16),
    "tiles": (torch.int32, 2, 8),
    "patches": (torch.int32, 1, 4),
    "table": (torch.int32, 1, 16),
}


class Step(NamedTuple):
    """One kernel of an operation."""

    name: str
    blocks: int
    threads: int  # of a block
    shared: int  # bytes
    arguments: tuple[str, ...]  # each one's layout in struct's letters


Launch = Callable[..., int]  # of a stream and the arguments; returns the driver's code


class _Kernels:
    """The functions of kernels/tiled*.cu on one device."""

    def __init__(self, index: int) -> None:
        self.device = gpu.device(index)
        properties = torch.cuda.get_device_properties(index)
        self.most_shared = int(properties.shared_memory_per_block_optin)  # type: ignore[attr-defined]
        self.overlap = properties.major >= 9
        self.lock = threading.Lock()  # of launches, which are prepared
        with self.device.current():
            module = driver.Module(gpu.build("tiled", self.device.arch))
            names = ("tiled_product", *(f"tiled_products_{rows}" for rows in PRODUCTS), "tiled_add_up")
            names = (*names, "tiled_decompress", "tiled_rows")
            self.functions = {name: module.function(name, self.most_shared) for name in names}
            self.wide = (properties.major, properties.minor) == (9, 0)  # no other has wgmma
            if self.wide:
                wgmma = driver.Module(gpu.build("tiled_wgmma", f"{self.device.arch}a"))
                names = tuple(f"tiled_{kind}_{rows}" for kind in ("pack", "wide") for rows in WIDE)
                self.functions |= {name: wgmma.function(name, self.most_shared) for name in names}
            self.fixed_shared = module.constant("tiled_shared")
        self.room = self.most_shared - self.fixed_shared

    def prepare(self, step: Step) -> Launch:
        return driver.Launch(self.functions[step.name], *step[1:], self.overlap)

    def over_tiles(self, name: str, blocks: int, warps: int, fragments: int, more_shared: int, *arguments: str) -> Step:
        """Of warps that have a tile's codes in shared memory, each."""
        return Step(name, blocks, LANES * warps, self.fixed_shared + warps * code_bytes(fragments) + more_shared, arguments)

    def run(self, enqueue: Callable[..., int], *arguments: Any) -> None:
        """Call what launches on a stream, which is torch's current one, with the arguments, and returns the driver's code."""
        index = self.device.index
        with self.lock:
            stream = torch._C._cuda_getCurrentRawStream(index)
            here = torch._C._cuda_getDevice() == index
            code = enqueue(stream, *arguments) if here else driver.OTHER_CONTEXT
            if code in (driver.NO_CONTEXT, driver.OTHER_CONTEXT):  # a new thread has none, and others may have set their own
                with self.device.current():
                    code = enqueue(stream, *arguments)
        if code:
            driver.check(code)


@functools.cache
def _kernels(index: int) -> _Kernels:
    return _Kernels(index)


def code_bytes(fragments: int) -> int:
    """Shared memory of a warp: rows of 128 bytes for 2 F codes of 12 bits, and one that is read and not used."""
    return 128 * (-(-24 * fragments // 32) + 1)


@functools.cache
def plan(rows: int, columns: int, fragments: int, processors: int, room: int, fixed: int) -> tuple[int, int]:
    """Thread blocks and warps of a product of one row: two blocks a multiprocessor, or one where a warp then does fewer tiles.

    room: bytes of shared memory for codes and x; fixed: what else a block takes. ValueError where x does not fit.
    """
    across, down = -(-columns // (16 * fragments)), -(-rows // TILE_ROWS)
    x = 32 * fragments * across  # bytes
    best: tuple[int, int, int] | None = None
    for share in (2, 1) if x <= MOST_X_TWICE else (1,):
        space = (room + fixed + RESERVED) // share - fixed - RESERVED
        blocks, warps = min(share * processors, down), min(PRODUCT_WARPS // share, (space - x) // code_bytes(fragments))
        if warps > 0:
            rounds = -(-across * -(-down // blocks) // warps)
            if best is None or rounds < best[0]:
                best = rounds, blocks, warps
    if best is None:
        raise ValueError(f"{columns} columns: x does not fit into the GPU's shared memory; use mode=exact")
    return best[1], best[2]


@dataclass(frozen=True)
class Plan:
    """How a product of several rows of x is launched. splits, groups, slice, parts_at: tiled::Spread."""

    kernel_rows: int
    blocks: int
    warps: int
    splits: int
    groups: int
    slice: int
    parts_at: int
    shared: int  # bytes for x and for the sums of groups


@functools.cache
def plan_rows(rows: int, columns: int, fragments: int, batch: int, processors: int, room: int) -> Plan:
    """The least estimated time of all ways to spread a product. Raises ValueError where there is none.

    In units of a tile's share of memory traffic: warps do a tile each at a time, some number of them at full speed; to bring x to
    shared memory takes as long as some tiles, and so does adding up what several thread blocks have found.
    """
    across, down = -(-columns // (16 * fragments)), -(-rows // TILE_ROWS)
    kernel_rows = min(size for size in PRODUCTS if size >= batch)
    most_warps, few_warps = PRODUCTS[kernel_rows]
    x_tile = 32 * fragments * kernel_rows  # bytes of x in shared memory
    best: tuple[float, int, Plan] | None = None
    for splits, warps in itertools.product(range(1, min(MOST_SPLITS, across) + 1), range(8, most_warps + 1)):
        row_blocks = min(processors // splits, down)
        tall, wide = -(-down // row_blocks), -(-across // splits)  # tiles of a thread block
        space = room - warps * code_bytes(fragments)
        fitting = min(wide, space // x_tile)
        if fitting < 1:
            continue
        phases = -(-wide // fitting)
        size = -(-wide // phases)
        adding = (splits > 1) * (ADD_UP + 8 * splits * rows * batch / ADD_UP_BYTES)
        for groups in range(1, min(warps, size) + 1):
            parts = 64 * kernel_rows * warps if groups > 1 else 0
            if parts > space:
                continue
            apart = size * x_tile + parts <= space and groups > 1
            rounds = -(-tall // (warps // groups))
            steps = rounds * ((phases - 1) * -(-size // groups) + -(-(wide - (phases - 1) * size) // groups))
            stagings = 1 if phases == 1 and (groups == 1 or apart) else rounds * phases
            cost = steps * max(warps, few_warps) + stagings * (STAGE + size * x_tile / STAGE_BYTES)
            cost += adding + (groups > 1) * GROUP * groups * rounds
            at = size * x_tile if apart else 0
            shared = at + parts if apart else max(size * x_tile, parts)
            found = Plan(kernel_rows, row_blocks * splits, warps, splits, groups, size, at, shared)
            if best is None or (cost, -warps) < best[:2]:
                best = cost, -warps, found
    if best is None:
        raise ValueError(f"{columns} columns: x does not fit into the GPU's shared memory; use mode=exact")
    return best[2]


@dataclass(frozen=True)
class WidePlan:
    """How a product of more than 8 rows of x is launched on compute capability 9.0."""

    kernel_rows: int
    blocks: int
    warps: int
    splits: int
    whole: int  # tiled::Wide
    pieces: int
    shared: int  # bytes beyond those for a tile's codes of each warp


@functools.cache
def plan_wide(rows: int, columns: int, fragments: int, batch: int, processors: int, room: int) -> WidePlan | None:
    """The least estimated time of all ways to spread a product; None where shared memory is too small. A warpgroup has four rows of
    tiles, all of a thread block the same columns of x at a time."""
    across, fours = -(-columns // (16 * fragments)), -(-rows // (WARPGROUP * TILE_ROWS))
    kernel_rows = min(size for size in WIDE if size >= batch)
    kernel = WIDE[kernel_rows]
    once, more = kernel.once, kernel.more
    best: tuple[float, WidePlan] | None = None
    for splits, abreast in itertools.product(range(1, min(MOST_SPLITS, across) + 1), range(1, kernel.warpgroups + 1)):
        warps = WARPGROUP * abreast
        shared = kernel.shared(kernel_rows, warps, fragments)
        if shared + warps * code_bytes(fragments) > room:
            continue
        row_blocks = min(processors // splits, fours)
        whole, left = divmod(fours, row_blocks)
        # Few rows of x wait for memory, which fours dealt by columns do not make faster.
        pieces = min(row_blocks // left, across, MOST_SPLITS) if kernel_rows >= 64 and left and splits == 1 else 0
        rounds, rest = divmod(whole + (left > 0), abreast)
        step = rounds * (once + more * abreast) + (once + more * rest if rest else 0)
        if pieces:  # a piece is of a part of the columns
            step -= (more if (whole + 1) % abreast != 1 % abreast else once + more) * (1 - 1 / pieces)
        cost = step * -(-across // splits) * fragments / 32
        if splits > 1 or pieces > 1:
            sums = splits * rows if splits > 1 else pieces * (rows - whole * row_blocks * WARPGROUP * TILE_ROWS)
            cost += WIDE_ADD_UP + 8 * sums * batch / WIDE_ADD_UP_BYTES
        if best is None or cost < best[0]:
            best = cost, WidePlan(kernel_rows, row_blocks * splits, warps, splits, whole if pieces else 0, pieces, shared)
    return best[1] if best else None


def fits(rows: int, columns: int, fragments: int, batch: int, index: int, wgmma: bool = True) -> bool:
    """Whether a product of so many rows of x has room for x in the shared memory of a GPU. wgmma: as for `linear`."""
    kernels = _kernels(index)
    place = kernels.device.processors, kernels.room
    try:
        if batch == 1:
            plan(rows, columns, fragments, *place, kernels.fixed_shared)
        else:
            _plan_several(kernels, rows, columns, fragments, batch, wgmma)
    except ValueError:
        return False
    return True


def most_rows(index: int, wgmma: bool = True) -> int:
    """Of x that a product takes."""
    return max(WIDE) if wgmma and _kernels(index).wide else MOST_ROWS


def has_both(batch: int, index: int) -> bool:
    """Whether a product may be by wgmma or by mma.sync, each of which is faster for some shapes."""
    return min(PRODUCTS) < batch <= min(WIDE) and _kernels(index).wide


def _plan_several(kernels: _Kernels, rows: int, columns: int, fragments: int, batch: int, wgmma: bool) -> Plan | WidePlan:
    shape, place = (rows, columns, fragments, batch), (kernels.device.processors, kernels.room)
    wide = plan_wide(*shape, *place) if wgmma and kernels.wide and batch > min(PRODUCTS) else None
    if wide is None and batch > MOST_ROWS:
        raise ValueError(f"{columns} columns: {batch} rows of x do not fit into the GPU's shared memory; use mode=exact")
    return wide or plan_rows(*shape, *place)


@dataclass(frozen=True)
class Packed:
    """A matrix as it goes with each launch."""

    matrix: bytes  # tiled::Matrix
    rows: int
    columns: int
    fragments: int
    index: int  # of the GPU


def pack(index: int, arrays: Sequence[torch.Tensor], uppers: int, rows: int, columns: int) -> Packed:
    """Raises ValueError where dtypes, places or sizes of the arrays do not fit."""
    given = dict(zip(RULES, arrays, strict=True))
    for name, tensor in given.items():
        dtype, dimensions, alignment = RULES[name]
        if tensor.dtype != dtype or tensor.dim() != dimensions or tensor.get_device() != index or not tensor.is_contiguous():
            have = f"{tensor.dtype}{list(tensor.shape)} on {tensor.device}"
            raise ValueError(f"{name}: {have}, needed contiguous {dtype} with {dimensions} dimensions on cuda:{index}")
        if tensor.data_ptr() % alignment:
            raise ValueError(f"{name} must start at a multiple of {alignment} bytes")
    low, sign, tiles = given["low"], given["sign"], given["tiles"]
    fragments = 2 * low.shape[1]
    count = -(-rows // TILE_ROWS) * -(-columns // (16 * fragments)) if fragments else -1
    if low.shape[0] != count or tiles.shape != (count + 1, 2) or sign.shape != (count, fragments // 4, LANES):
        raise ValueError(f"the arrays are not those of a matrix of {rows} x {columns}")
    addresses = [tensor.data_ptr() for tensor in arrays]
    return Packed(MATRIX.pack(*addresses, uppers, rows, columns, fragments), rows, columns, fragments, index)


class Product:
    """x W^T + bias for so many rows of x and a W of so many rows and columns, ready to launch on one GPU."""

    def __init__(self, index: int, rows: int, columns: int, fragments: int, batch: int, wgmma: bool) -> None:
        kernels = self.kernels = _kernels(index)
        self.index, self.rows = index, rows
        tile_columns = fragments * -(-columns // (16 * fragments))  # in sixteens
        product = ("72s", "Q", "Q", "Q")  # W, x, bias, y
        self.memory = self._copy = 0  # bytes beside x and y; of those, of x in an order of its own
        self._pack = self._add_up = None
        self._sizes: tuple[int, ...] = ()  # what the kernels are given beside addresses: for packing, the product and adding up
        self._numbers: tuple[int, ...] = ()
        self._sums: tuple[int, ...] = ()
        if batch == 1:
            blocks, warps = plan(rows, columns, fragments, kernels.device.processors, kernels.room, kernels.fixed_shared)
            self._product = kernels.prepare(
                kernels.over_tiles("tiled_product", blocks, warps, fragments, 32 * tile_columns, *product)
            )
            return
        how = _plan_several(kernels, rows, columns, fragments, batch, wgmma)
        parts, first = how.splits, 0
        if isinstance(how, WidePlan):
            if how.pieces > 1:
                parts, first = how.pieces, how.whole * how.blocks * WARPGROUP * TILE_ROWS
            spread, name, self._numbers = WIDE_SPREAD, "wide", (batch, how.splits, how.whole, how.pieces)
            self._copy = 32 * tile_columns * how.kernel_rows
            blocks, self._sizes = -(-tile_columns * how.kernel_rows // PACK_THREADS), (batch, columns, tile_columns)
            self._pack = kernels.prepare(Step(f"tiled_pack_{how.kernel_rows}", blocks, PACK_THREADS, 0, ("Q", "Q", "Q", "iii")))
        else:
            spread, name, self._numbers = SPREAD, "products", (batch, how.splits, how.groups, how.slice, how.parts_at)
        step = kernels.over_tiles(f"tiled_{name}_{how.kernel_rows}", how.blocks, how.warps, fragments, how.shared, *product, spread)
        self._product = kernels.prepare(step)
        if parts > 1:
            blocks, self._sums = -(-batch * (rows - first) // ADD_UP_THREADS), (rows, batch, parts, first)
            self._add_up = kernels.prepare(Step("tiled_add_up", blocks, ADD_UP_THREADS, 0, ("Q", "Q", "Q", "iiii")))
        self.memory = 2 * self._copy + (4 * parts * batch * (rows - first) if parts > 1 else 0)

    def linear(self, x: torch.Tensor, matrix: bytes, bias: torch.Tensor | None = None) -> torch.Tensor:
        """On torch's current stream. x: bf16 [..., columns], which must fit; matrix: tiled::Matrix."""
        bias_at = 0
        if bias is not None:
            if bias.dtype != torch.bfloat16 or bias.shape != (self.rows,) or bias.get_device() != self.index:
                have = f"{bias.dtype}{list(bias.shape)} on {bias.device}"
                raise ValueError(f"bias: {have}, needed torch.bfloat16[{self.rows}] on {x.device}")
            bias = bias.contiguous()
            bias_at = bias.data_ptr()
        if not x.is_contiguous():
            x = x.contiguous()
        x_at = x.data_ptr()
        if x_at % 8:
            x = x.clone()
            x_at = x.data_ptr()
        y = x.new_empty((*x.shape[:-1], self.rows))
        if not self._numbers:
            self.kernels.run(self._product, matrix, x_at, bias_at, y.data_ptr())
            return y
        # Not kept from call to call: torch may be filling the pool of a graph, in which nothing may stay.
        memory = x.new_empty(self.memory // 2) if self.memory else None
        self.kernels.run(self._several, matrix, x_at, bias_at, y.data_ptr(), memory.data_ptr() if memory is not None else 0)
        return y

    def _several(self, stream: int, matrix: bytes, x: int, bias: int, y: int, memory: int) -> int:
        partial = memory + 2 * self._copy
        if self._pack:
            turned = memory + self._copy
            code = self._pack(stream, x, memory, turned, *self._sizes) or self._product(
                stream, matrix, x, bias, y, memory, turned, partial, *self._numbers
            )
        else:
            code = self._product(stream, matrix, x, bias, y, partial, *self._numbers)
        return code or (self._add_up(stream, partial, bias, y, *self._sums) if self._add_up else 0)


prepared = functools.lru_cache(4096)(Product)


def linear(
    x: torch.Tensor,
    arrays: Sequence[torch.Tensor],
    uppers: int,
    rows: int,
    columns: int,
    bias: torch.Tensor | None = None,
    wgmma: bool = True,
) -> torch.Tensor:
    """As `product`."""
    return product(x, pack(x.get_device(), arrays, uppers, rows, columns), bias, wgmma)


def product(x: torch.Tensor, weight: Packed, bias: torch.Tensor | None = None, wgmma: bool = True) -> torch.Tensor:
    """x W^T + bias of 1 to `most_rows` rows of bf16 x, summed in float32: the same bits in every run.

    More than one row need columns in fours. wgmma: more than 8 rows by wgmma where the GPU has it, otherwise by mma.sync.
    """
    rows, columns, index = weight.rows, weight.columns, weight.index
    batch = x.numel() // columns
    most = MOST_ROWS if batch <= MOST_ROWS else most_rows(index, wgmma)
    if x.dtype != torch.bfloat16 or x.shape[-1:] != (columns,) or not 1 <= batch <= most:
        raise ValueError(f"x: {x.dtype}{list(x.shape)}, needed torch.bfloat16 [..., {columns}] of 1 to {most} rows")
    if columns % 4 and batch > 1:
        raise ValueError(f"x: {batch} rows of {columns} columns: only single rows may have columns that are not in fours")
    if x.get_device() != index:
        raise ValueError(f"x: on {x.device}, the weights are on {'the CPU' if index < 0 else f'cuda:{index}'}")
    return prepared(index, rows, columns, weight.fragments, batch, wgmma).linear(x, weight.matrix, bias)


@functools.cache
def _decompression(index: int, fragments: int) -> Launch:
    kernels = _kernels(index)
    warps = min(MOST_WARPS, kernels.room // code_bytes(fragments))
    step = kernels.over_tiles("tiled_decompress", kernels.device.processors, warps, fragments, 0, "72s", "Q")
    return kernels.prepare(step)


def decompress(weight: Packed, out: torch.Tensor) -> None:
    """All weights into `out`, bf16 [rows, columns]."""
    shape = (weight.rows, weight.columns)
    if out.dtype != torch.bfloat16 or out.shape != shape or not out.is_contiguous() or out.data_ptr() % 8:
        needed = f"contiguous torch.bfloat16{list(shape)} at a multiple of 8 bytes"
        raise ValueError(f"out: {out.dtype}{list(out.shape)}, needed {needed}")
    if out.get_device() != weight.index:
        raise ValueError(f"out: on {out.device}, the weights are on cuda:{weight.index}")
    _kernels(weight.index).run(_decompression(weight.index, weight.fragments), weight.matrix, out.data_ptr())


@functools.lru_cache(1024)
def _gathering(index: int, columns: int, fragments: int, count: int) -> Launch:
    kernels, across = _kernels(index), -(-columns // (16 * fragments))
    warps = min(across, 16, kernels.room // code_bytes(fragments))
    return kernels.prepare(kernels.over_tiles("tiled_rows", count, warps, fragments, 0, "72s", "Q", "Q"))


def gather(ids: torch.Tensor, weight: Packed) -> torch.Tensor:
    """W[ids], bf16 [..., columns]. ids: int64. An id outside of the matrix stops the kernel, as it does torch's."""
    if ids.dtype != torch.int64 or ids.get_device() != weight.index:
        raise ValueError(f"ids: {ids.dtype} on {ids.device}, needed torch.int64 on cuda:{weight.index}")
    out = torch.empty(*ids.shape, weight.columns, dtype=torch.bfloat16, device=ids.device)
    if count := ids.numel():
        ids = ids.contiguous()
        launch = _gathering(weight.index, weight.columns, weight.fragments, count)
        _kernels(weight.index).run(launch, weight.matrix, ids.data_ptr(), out.data_ptr())
    return out
