"""Optimal length-limited prefix codes: histogram -> code lengths (package-merge) -> canonical codes -> decode table."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

MAX_CODE_LENGTH = 32


def entropy(histogram: np.ndarray) -> float:
    """Shannon entropy of a histogram, bits a symbol; 0 where it is empty."""
    p = histogram[histogram > 0] / max(histogram.sum(), 1)
    return float(-(p * np.log2(p)).sum()) + 0.0  # + 0.0: a single symbol gives 0, not -0


def code_lengths(histogram: np.ndarray, limit: int = MAX_CODE_LENGTH) -> np.ndarray:
    """Lengths of an optimal prefix code with no code longer than `limit` bits; 0 where the count is 0. uint8[symbols].

    Package-merge (Larmore and Hirschberg 1990). A lone symbol gets one bit.
    """
    symbols = np.flatnonzero(histogram)
    lengths = np.zeros(len(histogram), np.uint8)
    if len(symbols) > 1 << limit:
        raise ValueError(f"{len(symbols)} symbols do not fit codes of at most {limit} bits: raise the limit")
    if len(symbols) < 2:
        lengths[symbols] = 1
        return lengths
    symbols = symbols[np.argsort(histogram[symbols], kind="stable")]
    leaves = histogram[symbols]
    merged, levels = leaves, [np.ones(len(leaves), bool)]
    for _ in range(limit - 1):
        pairs = len(merged) // 2
        packages = merged[0 : 2 * pairs : 2] + merged[1 : 2 * pairs : 2]
        candidates = np.concatenate([leaves, packages])
        order = np.argsort(candidates, kind="stable")
        merged = candidates[order]
        levels.append(order < len(leaves))
    # The first 2n-2 items of the last level are the code: a leaf taken at a level adds one bit to its symbol, and leaves
    # are always taken from the rarest on, so counting them is enough.
    take = 2 * len(leaves) - 2
    for is_leaf in reversed(levels):
        taken = int(is_leaf[:take].sum())
        lengths[symbols[:taken]] += 1
        take = 2 * (take - taken)
    return lengths


def canonical_codes(lengths: np.ndarray) -> np.ndarray:
    """Codes in order of (length, symbol), each in the low bits of a uint32. uint32[symbols]."""
    codes = np.zeros(len(lengths), np.uint32)
    code = previous = 0
    for symbol in sorted(np.flatnonzero(lengths), key=lambda s: (lengths[s], s)):
        code <<= int(lengths[symbol]) - previous
        previous = int(lengths[symbol])
        codes[symbol] = code
        code += 1
    return codes


@dataclass(frozen=True)
class Code:
    """A prefix code over the symbols 0 .. n-1. Length 0: the symbol has no code.

    `padding` (length, code) fills the last byte of a stream: an end-of-file symbol, as the released encoder has one.
    """

    lengths: np.ndarray  # uint8[n]
    codes: np.ndarray  # uint32[n], in the low bits
    padding: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        used = np.flatnonzero(self.lengths)
        if self.lengths.max(initial=0) > MAX_CODE_LENGTH:
            raise ValueError(f"a code of {self.lengths.max()} bits: at most {MAX_CODE_LENGTH} are allowed")
        # Left-aligned, the codes of a prefix code are disjoint intervals.
        width = np.uint64(1) << (np.uint64(32) - self.lengths[used].astype(np.uint64))
        start = self.codes[used].astype(np.uint64) * width
        order = np.argsort(start)
        end = (start + width)[order]
        if np.any(end[:-1] > start[order][1:]) or np.any(end > 1 << 32):
            raise ValueError("not a prefix code: two codes overlap")

    @classmethod
    def from_histogram(cls, histogram: np.ndarray, limit: int = MAX_CODE_LENGTH) -> Code:
        lengths = code_lengths(histogram, limit)
        return cls(lengths, canonical_codes(lengths))

    def bits(self, histogram: np.ndarray) -> int:
        """Total length in bits of a text with this histogram."""
        missing = np.flatnonzero((self.lengths == 0) & (histogram > 0))
        if len(missing):
            raise ValueError(f"the code has no entry for symbol {missing[0]}, which occurs {histogram[missing[0]]} times")
        return int((histogram.astype(np.int64) * self.lengths).sum())

    def decode_table(self, window: int) -> tuple[np.ndarray, np.ndarray]:
        """Symbol (int32) and code length (uint8) by the next `window` bits; length 0 where the code is longer."""
        symbols, lengths = np.zeros(1 << window, np.int32), np.zeros(1 << window, np.uint8)
        for symbol in np.flatnonzero((self.lengths > 0) & (self.lengths <= window)):
            free = window - int(self.lengths[symbol])
            at = int(self.codes[symbol]) << free
            symbols[at : at + (1 << free)], lengths[at : at + (1 << free)] = symbol, self.lengths[symbol]
        return symbols, lengths


@dataclass(frozen=True)
class CodeStatistics:
    """What a code costs on a histogram, bits a symbol."""

    entropy_bits: float
    mean_bits: float
    longest: int
    kraft: float  # 1 where no code space is wasted
    symbols: int

    @property
    def redundancy_bits(self) -> float:
        return self.mean_bits - self.entropy_bits


def statistics(code: Code, histogram: np.ndarray) -> CodeStatistics:
    used = code.lengths[code.lengths > 0].astype(float)
    return CodeStatistics(
        entropy_bits=entropy(histogram),
        mean_bits=code.bits(histogram) / max(int(histogram.sum()), 1),
        longest=int(code.lengths.max(initial=0)),
        kraft=float((2.0**-used).sum()),
        symbols=int((histogram > 0).sum()),
    )
