"""The code of the tiled layout: four upper exponents of seven bits by one code of at most 12 bits.

Of seven upper exponents each has a rank, all others are escapes; docs/format.md has it to the bit.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np

from df11.huffman import canonical_codes, code_lengths

WINDOW = 12  # bits of the longest code
RANKS = 7  # upper exponents with a rank of their own
ESCAPE = 7
TUPLES = 8**4
NONE = TUPLES - 1  # the tuple of four escapes stands for all that have no code
KEPT = (1, 7, 50, 150, 300, 500, 700, 900, 1200, 1600, 2400)  # how many tuples to give a code: the cheapest of these
ESCAPES = np.array([ranks.count(ESCAPE) for ranks in itertools.product(range(8), repeat=4)])  # of each tuple
PATCH_BITS = 32


@dataclass(frozen=True)
class TiledCode:
    """What the upper exponents of a unit are coded by."""

    table: np.ndarray  # uint32[4096] by the next 12 bits, first bit lowest: ranks of the four weights, 4 bits each; length << 18
    uppers: np.ndarray  # uint8[8] of each rank; 0 for escapes

    @property
    def nbytes(self) -> int:
        return self.table.nbytes + self.uppers.nbytes


def make_code(histogram: np.ndarray) -> TiledCode:
    """The code of a unit from its exponent histogram, int64[256], as if neighbouring weights were independent."""
    upper = histogram.reshape(128, 2).sum(1)
    total = max(int(upper.sum()), 1)
    ranked = np.argsort(-upper, kind="stable")[:RANKS]
    p = upper[ranked] / total
    p = np.append(p, max(1 - p.sum(), 0.0))
    tuples = np.einsum("a,b,c,d->abcd", p, p, p, p).reshape(-1)
    order = np.argsort(-tuples, kind="stable")
    order = order[order != NONE]
    best = (math.inf, np.zeros(0, np.uint8))
    for kept in KEPT:
        chosen = order[:kept][tuples[order[:kept]] > 0]
        weights = np.zeros(TUPLES)
        weights[chosen] = tuples[chosen]
        weights[NONE] = rest = max(1 - weights.sum(), 0.0)
        # At least one, so that every chosen tuple has a code, and so has the one that stands for all others.
        counts = np.where(weights > 0, np.maximum((weights * 2**40).astype(np.int64), 1), 0)
        counts[NONE] = max(counts[NONE], 1)
        lengths = code_lengths(counts, WINDOW)
        cost = (weights * lengths).sum() + PATCH_BITS * ((weights * ESCAPES)[:NONE].sum() + 4 * rest)
        best = min(best, (float(cost), lengths), key=lambda b: b[0])
    lengths = best[1]
    table = np.zeros(1 << WINDOW, np.uint32)
    codes = canonical_codes(lengths)
    for tuple_ in np.flatnonzero(lengths):
        length = int(lengths[tuple_])
        table[reverse(int(codes[tuple_]), length) :: 1 << length] = selector(int(tuple_)) | length << 18
    table[table == 0] = selector(NONE) | 1 << 18  # a lone code of one bit leaves half of the table
    uppers = np.zeros(8, np.uint8)
    uppers[: len(ranked)] = ranked
    return TiledCode(table, uppers)


def reverse(code: int, length: int) -> int:
    """First bit lowest."""
    return int(f"{code:0{length}b}"[::-1], 2)


def selector(tuple_: int) -> int:
    """Four ranks, the first in the highest three bits, as nibbles, the first lowest."""
    return sum((tuple_ >> 9 - 3 * i & 7) << 4 * i for i in range(4))


def encoder_tables(code: TiledCode) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rank of each upper exponent; length and bits of each tuple's code, 0 where it has none."""
    ranks = np.full(128, ESCAPE, np.int64)
    ranks[code.uppers[RANKS - 1 :: -1]] = np.arange(RANKS - 1, -1, -1)  # the first of equal ones counts
    lengths, values = np.zeros(TUPLES, np.int64), np.zeros(TUPLES, np.int64)
    selected = code.table & 0xFFFF
    tuples = sum((selected >> 4 * i & 7) << 9 - 3 * i for i in range(4))
    lengths[tuples] = code.table >> 18
    at = np.arange(len(code.table))
    values[tuples] = at & ((1 << lengths[tuples]) - 1)
    return ranks, lengths, values
