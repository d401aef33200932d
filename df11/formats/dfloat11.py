"""The published DFloat11 layout (paper section 2.3), byte-compatible with the released package.

A unit is a stream of bf16 weights with one Huffman code for its exponents. Arrays, as the released checkpoints name them:

    encoded_exponent  uint8[bytes]        codes, most significant bit first
    sign_mantissa     uint8[n]            sign in bit 7
    luts              uint8[k + 1, 256]   k decode tables by byte; a value of 240 or more points to table 256 - value.
                                          Last row: code length by exponent
    gaps              5 bits a thread     bit at which the first code of its 64-bit chunk starts, packed most significant first
    output_positions  uint32[blocks + 1]  weights before each block of 512 chunks, then n
    split_positions   int64[tensors - 1]  where the stream is cut into tensors

A table value of 240 or more cannot be an exponent, so a unit with an exponent >= 240 (|w| >= 2^113, Inf, NaN) is stored raw,
marked as such; `strict=True` refuses it. docs/format.md has the layout to the byte.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import xxhash
from numba import njit

from df11 import bits
from df11.formats import Chunks, FormatError, UnsupportedBits, chunks_of, expect
from df11.formats.codec import Codec, check_count, checked
from df11.formats.luts import FIRST_POINTER, WINDOW, build_luts, check_luts, choose_code, window_table
from df11.huffman import MAX_CODE_LENGTH, Code

CHUNK_BYTES = 8  # of the stream a thread
BLOCK_CHUNKS = 512  # threads a block
BLOCK_BYTES = CHUNK_BYTES * BLOCK_CHUNKS
SEGMENT = 1 << 18  # weights encoded by one thread at a time
ARRAYS = ("encoded_exponent", "sign_mantissa", "luts", "gaps", "output_positions")  # split_positions follow from the shapes
PARTS = ARRAYS[1:]  # suffixes in a checkpoint, where the stream has the weight's own name
GAP_BYTES = BLOCK_CHUNKS * 5 // 8  # a block


@dataclass(frozen=True)
class DFloat11Unit:
    """One compressed unit. Either the arrays of the layout, or `raw`. Arrays without a comment are as above."""

    shapes: tuple[tuple[int, ...], ...]
    encoded_exponent: np.ndarray
    sign_mantissa: np.ndarray
    luts: np.ndarray
    gaps: np.ndarray  # uint8, packed
    output_positions: np.ndarray  # uint32; uint64 in a unit of 2^32 weights or more, which the published layout cannot hold
    raw: np.ndarray | None = None  # uint16[n], bf16 patterns
    checksum: str = ""  # XXH3-128 of the original little-endian bf16 bytes; "" where the maker stored none

    @property
    def numel(self) -> int:
        return sum(math.prod(s) for s in self.shapes)

    @property
    def split_positions(self) -> np.ndarray:
        return np.cumsum([math.prod(s) for s in self.shapes], dtype=np.int64)[:-1]

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """What is stored, by name."""
        if self.raw is not None:
            return {"raw": self.raw}
        return {name: getattr(self, name) for name in (*ARRAYS, "split_positions")}


class DFloat11(Codec):
    """Encoder and decoder. Work is spread over `threads` threads (0: all cores)."""

    name = "dfloat11"

    def __init__(self, max_code_length: int = MAX_CODE_LENGTH, threads: int = 0, strict: bool = False) -> None:
        if not 8 <= max_code_length <= MAX_CODE_LENGTH:
            raise ValueError(f"max_code_length={max_code_length}: the layout takes 8 to {MAX_CODE_LENGTH}")
        super().__init__(threads)
        self.max_code_length = max_code_length
        self.strict = strict

    def encode(self, chunks: Chunks, shapes: Sequence[tuple[int, ...]], code: Code | None = None) -> DFloat11Unit:
        """Compress a bf16 stream, read twice: for its histogram, then for its codes. Memory: the result and a few chunks.

        `code` overrides the optimal one. Raises UnsupportedBits (strict only), ValueError where the stream does not match
        the shapes or changes between the two passes.
        """
        digest = xxhash.xxh3_128()
        histograms: list[np.ndarray] = []
        for segments in self._segments(chunks):
            histograms += self._map(bits.histogram, segments)
            for s in segments:
                digest.update(s.data)
        counts = np.array(histograms, np.int64).reshape(-1, bits.EXPONENTS)
        histogram = counts.sum(0)
        n = int(histogram.sum())
        check_count(n, shapes)
        if histogram[FIRST_POINTER:].any():
            if self.strict:
                raise UnsupportedBits(
                    f"{histogram[FIRST_POINTER:].sum()} weights have an exponent of {FIRST_POINTER} or more (2^113, Inf, NaN), "
                    "which the published layout cannot hold: leave this unit uncompressed or pass strict=False"
                )
            return self._encode_raw(chunks, tuple(shapes), n, digest.hexdigest())
        if self.strict and n > np.iinfo(np.uint32).max:
            raise UnsupportedBits(f"{n} weights in one unit: the published layout holds fewer than 2^32; split the unit")
        code = code or choose_code(histogram, self.max_code_length)
        return self._encode_stream(chunks, tuple(shapes), code, counts, digest.hexdigest())

    def encode_tensors(self, tensors: Sequence[torch.Tensor], code: Code | None = None) -> DFloat11Unit:
        """Compress tensors in memory as one unit."""
        return self.encode(chunks_of(tensors), [tuple(t.shape) for t in tensors], code)

    def decode(self, unit: DFloat11Unit) -> list[torch.Tensor]:
        """The original tensors. Raises FormatError where tables, indices or checksum do not fit."""
        self.check(unit)  # before memory is asked for by a size that may be wrong
        out = np.empty(unit.numel, np.uint16)
        at = 0
        for piece in self._pieces(unit):
            out[at : at + piece.size] = piece
            at += piece.size
        expect(at == out.size, f"{at} weights were decoded where {out.size} are stored")
        parts = np.split(out, unit.split_positions) if unit.shapes else []
        return [bits.from_bits(part, shape) for part, shape in zip(parts, unit.shapes, strict=True)]

    def stream(self, unit: DFloat11Unit) -> Iterator[torch.Tensor]:
        """The decoded stream in flat pieces of some 3 million weights. A wrong checksum raises FormatError after the last."""
        for piece in self._pieces(unit):
            yield bits.from_bits(piece, (piece.size,))

    def nbytes(self, unit: DFloat11Unit) -> dict[str, int]:
        return {name: array.nbytes for name, array in unit.arrays.items()}

    def check(self, unit: DFloat11Unit) -> None:
        """Raise FormatError unless sizes, tables and positions fit each other. The stream itself is checked while decoding."""
        n = unit.numel
        if unit.raw is not None:
            expect(unit.raw.dtype == np.uint16 and unit.raw.shape == (n,), f"raw: expected uint16[{n}]")
            return
        stream, luts, positions = unit.encoded_exponent, unit.luts, unit.output_positions
        blocks = -(-stream.size // BLOCK_BYTES)
        for name in ("encoded_exponent", "sign_mantissa", "gaps"):
            array = getattr(unit, name)
            expect(array.dtype == np.uint8 and array.ndim == 1, f"{name}: expected uint8 in one dimension")
        expect(unit.sign_mantissa.size == n, f"sign_mantissa: {unit.sign_mantissa.size} bytes for {n} weights")
        expect(stream.size * 8 >= n and stream.size <= 4 * n, f"encoded_exponent: {stream.size} bytes for {n} weights")
        expect(unit.gaps.size == blocks * BLOCK_CHUNKS * 5 // 8, f"gaps: {unit.gaps.size} bytes for {blocks} blocks")
        expect(positions.dtype in (np.uint32, np.uint64), f"output_positions: dtype {positions.dtype}")
        expect(positions.shape == (blocks + 1,), f"output_positions: {positions.size} entries for {blocks} blocks")
        if blocks:
            wide = positions.astype(np.int64)
            expect(wide[0] == 0 and wide[-1] == n and bool((np.diff(wide) >= 0).all()), "output_positions: not rising from 0 to n")
        check_luts(luts)

    def _segments(self, chunks: Chunks) -> Iterator[list[np.ndarray]]:
        for chunk in chunks():
            flat = bits.to_bits(chunk)
            yield [flat[i : i + SEGMENT] for i in range(0, flat.size, SEGMENT)]

    def _encode_raw(self, chunks: Chunks, shapes: tuple[tuple[int, ...], ...], n: int, checksum: str) -> DFloat11Unit:
        raw = np.empty(n, np.uint16)
        at = 0
        for chunk in chunks():
            raw[at : at + chunk.numel()] = bits.to_bits(chunk)
            at += chunk.numel()
        return raw_unit(shapes, raw, checksum)

    def _encode_stream(
        self, chunks: Chunks, shapes: tuple[tuple[int, ...], ...], code: Code, counts: np.ndarray, checksum: str
    ) -> DFloat11Unit:
        n, total_bits = int(counts.sum()), code.bits(counts.sum(0))
        n_bytes = -(-total_bits // 8)
        blocks = -(-n_bytes // BLOCK_BYTES)
        words = np.zeros(total_bits // 64 + 1, np.uint64)
        gaps = np.zeros(max(blocks * BLOCK_CHUNKS, len(words)), np.uint8)
        positions = np.zeros(total_bits // (BLOCK_BYTES * 8) + 1, np.int64)
        sign_mantissa = np.empty(n, np.uint8)
        # Where each segment starts follows from its histogram, so segments are encoded independently of each other.
        bit_at = np.concatenate([[0], np.cumsum(counts @ code.lengths.astype(np.int64))])
        weight_at = np.concatenate([[0], np.cumsum(counts.sum(1))])
        lengths, codes = code.lengths.astype(np.int64), code.codes.astype(np.uint64)
        edges = np.zeros((len(counts), 2), np.uint64)

        def encode_segment(item: tuple[int, np.ndarray]) -> None:
            i, segment = item
            if weight_at[i + 1] - weight_at[i] != segment.size:
                raise ValueError("the stream is not the same in the second pass")
            # Where codes go was computed from the first pass: other weights would be written out of bounds.
            if not np.array_equal(bits.histogram(segment), counts[i]):
                raise ValueError("the stream is not the same in the second pass")
            sm = sign_mantissa[weight_at[i] : weight_at[i + 1]]
            _encode_segment(segment, lengths, codes, bit_at[i], weight_at[i], words, gaps, positions, sm, edges[i])

        done = 0
        for segments in self._segments(chunks):
            self._map(encode_segment, list(enumerate(segments, done)))
            done += len(segments)
        if done != len(counts):
            raise ValueError("the stream is not the same in the second pass")
        for (first, last), start, end in zip(edges, bit_at[:-1], bit_at[1:], strict=True):
            words[start >> 6] |= first
            words[end >> 6] |= last
        _pad_last_byte(words, total_bits, code.padding)
        # As the released encoder: a chunk in which the stream ends on a whole byte and no code starts has gap 0.
        if total_bits % 8 == 0 and gaps[total_bits // 64] == total_bits % 64:
            gaps[total_bits // 64] = 0
        output_positions = np.append(positions, n)[: blocks + 1]
        output_positions[blocks:] = n
        return DFloat11Unit(
            shapes=shapes,
            encoded_exponent=words.byteswap(inplace=True).view(np.uint8)[:n_bytes],
            sign_mantissa=sign_mantissa,
            luts=build_luts(code),
            gaps=pack_gaps(gaps[: blocks * BLOCK_CHUNKS]),
            output_positions=output_positions.astype(np.uint32 if n < 1 << 32 else np.uint64),
            checksum=checksum,
        )

    def _pieces(self, unit: DFloat11Unit) -> Iterator[np.ndarray]:
        self.check(unit)
        yield from checked(self._decoded(unit) if unit.raw is None else [unit.raw], unit.checksum)

    def _decoded(self, unit: DFloat11Unit) -> Iterator[np.ndarray]:
        positions = unit.output_positions.astype(np.int64)
        blocks, step = len(positions) - 1, 256  # some 3 million weights a task
        table = _table(unit.luts.tobytes())
        gaps = unpack_gaps(unit.gaps)

        def decode_blocks(first: int) -> tuple[int, np.ndarray]:
            last = min(first + step, blocks)
            out = np.empty(positions[last] - positions[first], np.uint16)
            sm = unit.sign_mantissa[positions[first] : positions[last]]
            return _decode_blocks(unit.encoded_exponent, table, unit.luts, gaps, positions, first, last, sm, out), out

        for group in range(0, blocks, step * self.threads):
            for bad, out in self._map(decode_blocks, range(group, min(group + step * self.threads, blocks), step)):
                if bad >= 0:
                    raise FormatError(f"encoded_exponent: block {bad} of {blocks} does not decode as its gaps and position say")
                yield out


@functools.lru_cache(maxsize=256)
def _table(luts: bytes) -> np.ndarray:
    """Of tables that are asked for again each time a model reads a weight; to be read only."""
    return window_table(np.frombuffer(luts, np.uint8).reshape(-1, 256))


def raw_unit(shapes: tuple[tuple[int, ...], ...], raw: np.ndarray, checksum: str) -> DFloat11Unit:
    empty = np.empty(0, np.uint8)
    return DFloat11Unit(shapes, empty, empty, empty.reshape(0, 256), empty, empty.astype(np.uint32), raw, checksum)


def pack_gaps(gaps: np.ndarray) -> np.ndarray:
    """uint8[8 m] of values below 32 -> 5 bits each, uint8[5 m]."""
    return np.packbits(np.unpackbits(gaps[:, None], axis=1)[:, 3:])


def unpack_gaps(packed: np.ndarray) -> np.ndarray:
    """Inverse of `pack_gaps`."""
    if not packed.size:
        return np.empty(0, np.uint8)
    return np.packbits(np.unpackbits(packed).reshape(-1, 5), axis=1)[:, 0] >> 3


def _pad_last_byte(words: np.ndarray, total_bits: int, padding: tuple[int, int]) -> None:
    length, code = padding
    free = -total_bits % 8
    if free and length:
        fill = code >> (length - free) if length >= free else code << (free - length)
        words[total_bits // 64] |= np.uint64(fill) << np.uint64(64 - total_bits % 64 - free)


@njit(cache=True, nogil=True)
def _encode_segment(weights, lengths, codes, bit, weight, words, gaps, positions, sign_mantissa, edges):  # type: ignore[no-untyped-def]
    """Encode uint16 weights from bit `bit` on. The first and last word may be shared with a neighbour: they go to `edges`."""
    word = bit >> 6
    first = word
    free = 64 - (bit & 63)
    acc = np.uint64(0)
    for i in range(weights.size):
        w = weights[i]
        exponent = (w >> 7) & 0xFF
        sign_mantissa[i] = ((w >> 8) & 0x80) | (w & 0x7F)
        code = codes[exponent]
        free -= lengths[exponent]
        if free > 0:
            acc |= code << np.uint64(free)
        else:
            acc |= code >> np.uint64(-free)
            if word == first:
                edges[0] = acc
            else:
                words[word] = acc
            word += 1
            # What spills over is where the first code of the next chunk starts.
            gaps[word] = -free
            if word & (BLOCK_CHUNKS - 1) == 0:
                positions[word >> 9] = weight + i + 1
            acc = code << np.uint64(64 + free) if free < 0 else np.uint64(0)
            free += 64
    edges[1] = acc


@njit(cache=True, nogil=True)
def _decode_blocks(stream, table, luts, gaps, positions, first, last, sign_mantissa, out):  # type: ignore[no-untyped-def]
    """Decode blocks first .. last-1. Returns -1, or the block whose codes, gaps and positions disagree."""
    at = 0
    end_bit = stream.size * 8
    for block in range(first, last):
        count = positions[block + 1] - positions[block]
        block_end = min((block + 1) * BLOCK_BYTES * 8, end_bit)
        chunk = block * BLOCK_CHUNKS
        bit = chunk * 64 + np.int64(gaps[chunk])
        for _ in range(count):
            if bit >= block_end:
                return block
            if bit >> 6 != chunk:
                chunk += 1
                # A code is at most 32 bits long, so each chunk has a first code; its gap must say where.
                if bit != chunk * 64 + np.int64(gaps[chunk]):
                    return block
            byte = bit >> 3
            window = np.uint64(0)
            if byte + 5 <= stream.size:
                for j in range(5):
                    window = window << np.uint64(8) | np.uint64(stream[byte + j])
            else:
                for j in range(5):
                    window = window << np.uint64(8) | np.uint64(stream[byte + j] if byte + j < stream.size else 0)
            window = (window << np.uint64(24 + (bit & 7))) >> np.uint64(32)
            entry = table[window >> np.uint64(32 - WINDOW)]
            if entry:
                exponent = np.int64(entry & 0xFF)
                bit += entry >> 8
            else:
                exponent = np.int64(luts[0, window >> np.uint64(24)])
                shift = 24
                while exponent >= FIRST_POINTER and shift:
                    shift -= 8
                    exponent = np.int64(luts[256 - exponent, (window >> np.uint64(shift)) & np.uint64(0xFF)])
                length = np.int64(luts[luts.shape[0] - 1, exponent])
                if exponent >= FIRST_POINTER or length == 0:
                    return block
                bit += length
            sm = np.uint16(sign_mantissa[at])
            out[at] = (sm & 0x80) << 8 | np.uint16(exponent) << 7 | sm & 0x7F
            at += 1
        if positions[block + 1] < positions[positions.size - 1]:
            if bit != (block + 1) * BLOCK_BYTES * 8 + np.int64(gaps[(block + 1) * BLOCK_CHUNKS]):
                return block
        elif count and (bit + 7) >> 3 != stream.size:
            return block
    return -1
