"""The tiled layout: fixed numbers of weights for each lane of a warp, in the order in which tensor cores take them.

A weight is `s uuuuuuu llllllll`: sign, the upper seven exponent bits, and a low byte. Sign and low byte are stored as they are;
the upper exponents are coded, four weights by one code of at most 12 bits: each has a rank 0 to 6 among the commonest values of the
unit, or is an escape (7), which a list of patches restores. docs/format.md has the layout to the byte.

A unit is a list of matrices with one code. A matrix [rows, columns] is cut into tiles of 16 rows and 16 F columns (F fragments of
mma.m16n8k16, F = 8, 12 ... 36: the one with the least padding). What does not get smaller, or is no matrix, is stored as it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import xxhash
from numba import njit

from df11 import bits
from df11.formats import Chunks, chunks_of, expect
from df11.formats.codec import Codec, check_count, checked
from df11.formats.tiled_code import ESCAPE, WINDOW, TiledCode, encoder_tables, make_code

FRAGMENTS = (28, 32, 36, 24, 20, 16, 12, 8)  # of a tile, by preference
LANES = 32
ROWS = 16  # of a tile
TILES_A_TASK = 512
MATRIX_ARRAYS = ("low", "sign", "stream", "tiles", "patches")


@dataclass(frozen=True)
class TiledMatrix:
    """One matrix: either the arrays of the layout, T tiles in order of rows, then columns, or `raw`."""

    shape: tuple[int, ...]
    fragments: int  # F; 0 where raw
    low: np.ndarray  # uint8[T, F / 2, 32, 16]
    sign: np.ndarray  # uint32[T, F / 4, 32]
    stream: np.ndarray  # uint8[B, 32]: a byte of each lane; within a tile four and four are a row of words
    tiles: np.ndarray  # uint32[T + 1, 2]: where each tile's part of the stream begins, and its first patch
    patches: np.ndarray  # uint32[patches]: row << 28 | column of the tile << 16 | bf16 pattern
    raw: np.ndarray | None = None  # uint16[n]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def size(self) -> tuple[int, int]:
        """Rows, and columns, which are the last dimension."""
        return math.prod(self.shape[:-1]), self.shape[-1] if self.shape else 1

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """What is stored, by name."""
        if self.raw is not None:
            return {"raw": self.raw}
        return {name: getattr(self, name) for name in MATRIX_ARRAYS}


@dataclass(frozen=True)
class TiledUnit:
    code: TiledCode
    matrices: tuple[TiledMatrix, ...]
    checksum: str = ""  # XXH3-128 of the original little-endian bf16 bytes, "" where the maker stored none

    @property
    def numel(self) -> int:
        return sum(matrix.numel for matrix in self.matrices)


def tile_fragments(columns: int) -> int:
    """F for a matrix of so many columns: the least padding, then the first of FRAGMENTS."""
    return min(FRAGMENTS, key=lambda f: -(-columns // (16 * f)) * f)


def tile_grid(rows: int, columns: int, fragments: int = 0) -> tuple[int, int, int]:
    """Fragments of a tile, as `tile_fragments` says unless given; tiles across; tiles down."""
    fragments = fragments or tile_fragments(columns)
    return fragments, -(-columns // (16 * fragments)), -(-rows // ROWS)


def fixed_bytes(tiles: int, fragments: int) -> int:
    """Of low, sign and tiles, which do not depend on the weights."""
    return tiles * fragments * (256 + 32) + 8 * tiles


class Tiled(Codec):
    """Encoder and decoder. Work is spread over `threads` threads (0: all cores)."""

    name = "tiled"

    def encode(self, chunks: Chunks, shapes: Sequence[tuple[int, ...]]) -> TiledUnit:
        """Compress a bf16 stream that holds tensors of these shapes, read twice. Memory: the result and the largest tensor.

        Raises ValueError where the stream does not match the shapes.
        """
        digest, histogram, n = xxhash.xxh3_128(), np.zeros(256, np.int64), 0
        for chunk in chunks():
            flat = bits.to_bits(chunk)
            digest.update(flat.data)
            histogram += bits.histogram(flat)
            n += flat.size
        check_count(n, shapes)
        code = make_code(histogram)
        matrices = tuple(self._encode(flat, shape, code) for flat, shape in _tensors(chunks, shapes))
        return TiledUnit(code, matrices, digest.hexdigest())

    def encode_tensors(self, tensors: Sequence[torch.Tensor]) -> TiledUnit:
        """Compress tensors in memory as one unit."""
        return self.encode(chunks_of(tensors), [tuple(t.shape) for t in tensors])

    def decode(self, unit: TiledUnit) -> list[torch.Tensor]:
        """The original tensors. Raises FormatError where anything does not fit."""
        # zip asks the stream for one more, and so for its checksum.
        return [flat.view(matrix.shape) for flat, matrix in zip(self.stream(unit), unit.matrices, strict=True)]

    def stream(self, unit: TiledUnit) -> Iterator[torch.Tensor]:
        """The decoded tensors, flat. A wrong checksum raises FormatError after the last."""
        self.check(unit)
        for flat in checked((self._decode(unit.code, matrix) for matrix in unit.matrices), unit.checksum):
            yield bits.from_bits(flat, (flat.size,))

    def nbytes(self, unit: TiledUnit) -> dict[str, int]:
        sizes = {"code": unit.code.nbytes}
        for matrix in unit.matrices:
            for name, array in matrix.arrays.items():
                sizes[name] = sizes.get(name, 0) + array.nbytes
        return sizes

    def check(self, unit: TiledUnit) -> None:
        """Raise FormatError unless sizes, table and indices fit each other. The streams are checked while decoding."""
        table, uppers = unit.code.table, unit.code.uppers
        _expect_array("table", table, np.uint32, (1 << WINDOW,))
        lengths = table >> 18
        expect(bool((lengths >= 1).all() and (lengths <= WINDOW).all()), "table: a code is not 1 to 12 bits long")
        expect(not (table & 0x38888).any(), "table: a rank is not 0 to 7")
        _expect_array("uppers", uppers, np.uint8, (8,))
        different = len(set(uppers[:ESCAPE].tolist())) == ESCAPE
        good = different and bool((uppers < 128).all()) and uppers[ESCAPE] == 0
        expect(good, "uppers: not seven different exponents below 128 and a zero")
        for matrix in unit.matrices:
            _check(matrix)

    def _encode(self, flat: np.ndarray, shape: tuple[int, ...], code: TiledCode) -> TiledMatrix:
        rows, columns = math.prod(shape[:-1]), shape[-1] if shape else 1
        if len(shape) < 2 or not flat.size:
            return raw_matrix(shape, flat)
        fragments, across, down = tile_grid(rows, columns)
        count = across * down
        fixed = fixed_bytes(count, fragments)
        if fixed >= 2 * flat.size:
            return raw_matrix(shape, flat)
        ranks, lengths, values = encoder_tables(code)
        tiles = np.zeros((count + 1, 2), np.int64)
        size = (rows, columns, fragments, across)

        def measure(first: int) -> None:
            last = min(first + TILES_A_TASK, count)
            _measure(flat, *size, ranks, lengths, first, last, tiles)

        self._map(measure, range(0, count, TILES_A_TASK))
        np.cumsum(tiles, 0, out=tiles)
        if tiles.max() >= 1 << 32 or fixed + 32 * tiles[-1, 0] + 4 * tiles[-1, 1] >= 2 * flat.size:
            return raw_matrix(shape, flat)
        low = np.empty((count, fragments // 2, LANES, 16), np.uint8)
        sign = np.empty((count, fragments // 4, LANES), np.uint32)
        stream, patches = np.zeros((int(tiles[-1, 0]), LANES), np.uint8), np.empty(int(tiles[-1, 1]), np.uint32)

        def write(first: int) -> None:
            last = min(first + TILES_A_TASK, count)
            _write(flat, *size, ranks, lengths, values, first, last, tiles, low, sign, stream, patches)

        self._map(write, range(0, count, TILES_A_TASK))
        return TiledMatrix(shape, fragments, low, sign, stream, tiles.astype(np.uint32), patches)

    def _decode(self, code: TiledCode, matrix: TiledMatrix) -> np.ndarray:
        if matrix.raw is not None:
            return matrix.raw
        rows, columns = matrix.size
        _, across, _ = tile_grid(rows, columns, matrix.fragments)
        out = np.empty(matrix.numel, np.uint16)
        tiles = matrix.tiles.astype(np.int64)

        def read(first: int) -> int:
            last = min(first + TILES_A_TASK, len(matrix.low))
            arrays = (matrix.low, matrix.sign, matrix.stream, tiles, matrix.patches)
            return int(_read(code.table, code.uppers, *arrays, rows, columns, matrix.fragments, across, first, last, out))

        for bad in self._map(read, range(0, len(matrix.low), TILES_A_TASK)):
            expect(bad < 0, f"tile {bad} of a matrix {list(matrix.shape)} does not decode as its header says")
        return out


def raw_matrix(shape: tuple[int, ...], flat: np.ndarray) -> TiledMatrix:
    none = np.empty(0, np.uint32)
    return TiledMatrix(shape, 0, none.astype(np.uint8), none, none.astype(np.uint8), none, none, flat.copy())


def _tensors(chunks: Chunks, shapes: Sequence[tuple[int, ...]]) -> Iterator[tuple[np.ndarray, tuple[int, ...]]]:
    """The stream cut into tensors, uint16[n] each."""
    pieces = (bits.to_bits(chunk) for chunk in chunks())
    rest = np.empty(0, np.uint16)
    for shape in shapes:
        n = math.prod(shape)
        if not rest.size and n:
            rest = next(pieces)
        if rest.size >= n:
            flat, rest = rest[:n], rest[n:]
        else:
            flat, at = np.empty(n, np.uint16), 0
            while at < n:
                if not rest.size:
                    rest = next(pieces)
                taken = rest[: n - at]
                flat[at : at + taken.size] = taken
                at, rest = at + taken.size, rest[taken.size :]
        yield flat, shape


def _expect_array(name: str, array: object, dtype: type, shape: tuple[int, ...]) -> None:
    found = f"{array.dtype}{list(array.shape)}" if isinstance(array, np.ndarray) else type(array).__name__
    good = isinstance(array, np.ndarray) and array.dtype == dtype and array.shape == shape
    expect(good, f"{name}: {found}, expected {np.dtype(dtype)}{list(shape)}")


def _check(matrix: TiledMatrix) -> None:
    expect(all(type(d) is int and d >= 0 for d in matrix.shape), f"shape: {matrix.shape} has what is no size")
    if matrix.raw is not None:
        _expect_array("raw", matrix.raw, np.uint16, (matrix.numel,))
        return
    f = matrix.fragments
    expect(f in FRAGMENTS and len(matrix.shape) > 1, f"a matrix of shape {list(matrix.shape)} has tiles of {f} fragments")
    _, across, down = tile_grid(*matrix.size, f)
    count = across * down
    shapes: dict[str, tuple[type, tuple[int, ...]]] = {
        "low": (np.uint8, (count, f // 2, LANES, 16)),
        "sign": (np.uint32, (count, f // 4, LANES)),
        "stream": (np.uint8, (np.size(matrix.stream) // LANES, LANES)),
        "tiles": (np.uint32, (count + 1, 2)),
        "patches": (np.uint32, (np.size(matrix.patches),)),
    }
    for name, (dtype, shape) in shapes.items():
        _expect_array(name, getattr(matrix, name), dtype, shape)
    tiles = matrix.tiles.astype(np.int64)
    expect(not tiles[0].any() and bool((np.diff(tiles, axis=0) >= 0).all()), "tiles: not rising from 0")
    expect(tiles[-1, 0] == len(matrix.stream) and tiles[-1, 1] == matrix.patches.size, "tiles: do not end where the data do")


@njit(cache=True, nogil=True)
def _tuple(flat, rows, columns, row, column, ranks):  # type: ignore[no-untyped-def]
    """The tuple of four weights. Outside of the matrix all have rank 0."""
    found = 0
    for i in range(4):
        rank = 0
        if row < rows and column + i < columns:
            rank = ranks[flat[row * columns + column + i] >> 8 & 0x7F]
        found = found << 3 | rank
    return found


@njit(cache=True, nogil=True)
def _place(first, last, byte, lane):  # type: ignore[no-untyped-def]
    """Where in the flat stream a byte of a lane is. first, last: the tile's, of each lane. Whole words are interleaved; the one to
    three bytes that are left lie together, lane by lane."""
    words = (last - first) & ~3
    if byte < words:
        return 32 * first + 32 * (byte & ~3) + 4 * lane + (byte & 3)
    return 32 * (first + words) + (last - first - words) * lane + byte - words


@njit(cache=True, nogil=True)
def _measure(flat, rows, columns, fragments, across, ranks, lengths, first, last, tiles):  # type: ignore[no-untyped-def]
    """Into tiles[t + 1]: bytes a lane of tile t's stream, and its patches."""
    for tile in range(first, last):
        top, left = tile // across * 16, tile % across * fragments * 16
        most, patches = 0, 0
        for lane in range(32):
            used = 0
            for group in range(2 * fragments):
                row, column = top + (lane >> 2) + 8 * (group & 1), left + (group >> 1) * 16 + 4 * (lane & 3)
                found = _tuple(flat, rows, columns, row, column, ranks)
                whole = lengths[found] == 0
                used += lengths[4095] if whole else lengths[found]
                for i in range(4):
                    if (whole or found >> 9 - 3 * i & 7 == 7) and row < rows and column + i < columns:
                        patches += 1
            most = max(most, (used + 7) >> 3)
        tiles[tile + 1, 0], tiles[tile + 1, 1] = most, patches


@njit(cache=True, nogil=True)
def _write(  # type: ignore[no-untyped-def]
    flat, rows, columns, fragments, across, ranks, lengths, values, first, last, tiles, low, sign, stream, patches
):
    for tile in range(first, last):
        top, left = tile // across * 16, tile % across * fragments * 16
        flat_stream = stream.reshape(-1)
        patch = tiles[tile, 1]
        for lane in range(32):
            at = 0  # bit of the lane's codes
            for group in range(2 * fragments):
                fragment, half = group >> 1, group & 1
                row, column = top + (lane >> 2) + 8 * half, left + fragment * 16 + 4 * (lane & 3)
                found = _tuple(flat, rows, columns, row, column, ranks)
                whole = lengths[found] == 0
                code = 4095 if whole else found
                value = values[code] << (at & 7)
                for i in range((lengths[code] + (at & 7) + 7) >> 3):
                    place = _place(tiles[tile, 0], tiles[tile + 1, 0], (at >> 3) + i, lane)
                    flat_stream[place] |= np.uint8(value >> 8 * i & 0xFF)
                at += lengths[code]
                if half == 0 and fragment & 3 == 0:
                    sign[tile, fragment >> 2, lane] = 0
                for i in range(4):
                    pattern = np.int64(0)
                    inside = row < rows and column + i < columns
                    if inside:
                        pattern = np.int64(flat[row * columns + column + i])
                    if inside and (whole or found >> 9 - 3 * i & 7 == 7):
                        patches[patch] = (row - top) << 28 | (column + i - left) << 16 | pattern
                        patch += 1
                        pattern = np.int64(0)
                    low[tile, fragment >> 1, lane, 8 * (fragment & 1) + 4 * half + i] = pattern & 0xFF
                    bit = 8 * i + 7 - (2 * (fragment & 3) + half)
                    sign[tile, fragment >> 2, lane] |= np.uint32((pattern >> 15) << bit)
        mine = patches[tiles[tile, 1] : patch]
        mine.sort()


@njit(cache=True, nogil=True)
def _read(  # type: ignore[no-untyped-def]
    table, uppers, low, sign, stream, tiles, patches, rows, columns, fragments, across, first, last, out
):
    """Decode tiles first .. last - 1. Returns -1, or the tile whose stream or patches do not fit."""
    width = 16 * fragments
    escaped = np.zeros(16 * width, np.bool_)  # of a tile; false again where a patch is
    for tile in range(first, last):
        top, left = tile // across * 16, tile % across * width
        begin, end = tiles[tile, 0], tiles[tile + 1, 0]
        flat_stream = stream.reshape(-1)
        most, escapes = 0, 0
        for lane in range(32):
            bit = 0
            for group in range(2 * fragments):
                fragment, half = group >> 1, group & 1
                row, column = top + (lane >> 2) + 8 * half, left + fragment * 16 + 4 * (lane & 3)
                window = np.int64(0)
                for i in range(3):
                    if (bit >> 3) + i < end - begin:
                        window |= np.int64(flat_stream[_place(begin, end, (bit >> 3) + i, lane)]) << 8 * i
                entry = np.int64(table[window >> (bit & 7) & 0xFFF])
                bit += int(entry >> 18)
                for i in range(4):
                    if row < rows and column + i < columns:
                        pattern = np.int64(uppers[entry >> 4 * i & 7]) << 8
                        pattern |= np.int64(low[tile, fragment >> 1, lane, 8 * (fragment & 1) + 4 * half + i])
                        place = 8 * i + 7 - (2 * (fragment & 3) + half)
                        pattern |= np.int64(sign[tile, fragment >> 2, lane] >> np.uint32(place) & np.uint32(1)) << 15
                        out[row * columns + column + i] = pattern
                        if entry >> 4 * i & 7 == 7:
                            escaped[(row - top) * width + column - left + i] = True
                            escapes += 1
            most = max(most, (bit + 7) >> 3)
        if most != end - begin or escapes != tiles[tile + 1, 1] - tiles[tile, 1]:
            return tile
        before = np.int64(-1)
        for k in range(tiles[tile, 1], tiles[tile + 1, 1]):
            at = np.int64(patches[k] >> np.uint32(16))
            row, column = at >> 12, at & 0xFFF
            if at <= before or column >= width or not escaped[row * width + column]:
                return tile
            escaped[row * width + column] = False
            out[(top + row) * columns + left + column] = patches[k] & np.uint32(0xFFFF)
            before = at
    return -1
