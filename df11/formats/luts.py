"""The decode tables of the published layout: one code prefix a table, one byte a step (paper section 2.3.1)."""

from __future__ import annotations

import numpy as np

from df11.formats import UnsupportedBits, expect
from df11.huffman import MAX_CODE_LENGTH, Code

FIRST_POINTER = 240  # a table value from here on points to table 256 - value
MAX_TABLES = 1 + 256 - FIRST_POINTER
WINDOW = 13  # bits of the CPU decoder's own table: 16 KB, in L1


def choose_code(histogram: np.ndarray, limit: int = MAX_CODE_LENGTH) -> Code:
    """The optimal code that the layout's tables can express: 17 at most, so a flat histogram may need a shorter limit.

    At 8 bits one table holds everything, so this ends.
    """
    while True:
        code = Code.from_histogram(histogram, limit)
        if len(_prefixes(code)) <= MAX_TABLES:
            return code
        limit -= 1


def _prefixes(code: Code) -> list[tuple[int, int]]:
    """(bytes, value) of every code prefix that needs a table, shortest first."""
    found = {(0, 0)}
    for symbol in np.flatnonzero(code.lengths):
        length, word = int(code.lengths[symbol]), int(code.codes[symbol])
        found |= {(depth, word >> (length - 8 * depth)) for depth in range(1, (length - 1) // 8 + 1)}
    return sorted(found)


def build_luts(code: Code) -> np.ndarray:
    """Decode tables and code lengths, uint8[k + 1, 256]. Raises ValueError where the layout has too few pointers."""
    prefixes = _prefixes(code)
    if len(prefixes) > MAX_TABLES:
        raise ValueError(f"the code needs {len(prefixes)} tables, the layout has {MAX_TABLES}: use a shorter limit")
    if code.lengths[FIRST_POINTER:].any():
        raise UnsupportedBits(f"the code has a symbol of {FIRST_POINTER} or more, which the layout reads as a pointer")
    index = {prefix: i for i, prefix in enumerate(prefixes)}
    luts = np.zeros((len(prefixes) + 1, 256), np.uint8)
    known = np.zeros((len(prefixes), 256), bool)
    for symbol in np.flatnonzero(code.lengths):
        length, word = int(code.lengths[symbol]), int(code.codes[symbol])
        depth = (length - 1) // 8
        free = 8 * (depth + 1) - length
        start = (word << free) & 0xFF
        table = index[depth, word >> (length - 8 * depth)]
        luts[table, start : start + (1 << free)] = symbol
        known[table, start : start + (1 << free)] = True
    for (depth, value), i in index.items():
        if depth:
            parent = index[depth - 1, value >> 8]
            luts[parent, value & 0xFF] = 256 - i
            known[parent, value & 0xFF] = True
    # Bytes that no code starts with (a lone symbol, the end-of-file code): any symbol will do, the neighbour's is what the
    # released tables hold.
    for table, row in zip(luts[:-1], known, strict=True):
        if row.any():
            filled = np.maximum.accumulate(np.where(row, np.arange(256), -1))
            table[:] = table[np.where(filled < 0, np.flatnonzero(row)[0], filled)]
    luts[-1, : len(code.lengths)] = code.lengths
    return luts


def check_luts(luts: np.ndarray) -> None:
    """Raise FormatError where a walk through the tables could leave them.

    Entries that no code reaches may hold anything that passes (the released encoder leaves a neighbour's value there), so
    what a walk finds is judged while decoding.
    """
    expect(luts.dtype == np.uint8 and luts.ndim == 2 and luts.shape[1] == 256, "luts: expected uint8[tables + 1, 256]")
    tables = len(luts) - 1
    expect(1 <= tables <= MAX_TABLES, f"luts: {tables} tables, the layout has 1 to {MAX_TABLES}")
    entries = luts[:-1].astype(int)
    expect(256 - entries[entries >= FIRST_POINTER].min(initial=256) < tables, f"luts: a pointer leads past table {tables - 1}")
    longest = int(luts[-1].max())
    expect(longest <= MAX_CODE_LENGTH, f"luts: a code of {longest} bits, at most {MAX_CODE_LENGTH} are allowed")


def window_table(luts: np.ndarray) -> np.ndarray:
    """uint16[2^window]: code length << 8 | exponent; 0 where the code is longer than the window."""
    table = np.zeros(1 << WINDOW, np.uint16)
    windows = np.arange(1 << WINDOW)
    first = luts[0, windows >> (WINDOW - 8)].astype(np.int64)
    deeper = first >= FIRST_POINTER
    second = luts[np.where(deeper, 256 - first, 0)]  # a row of its table for each window
    low = (windows << (16 - WINDOW)) & 0xFF
    high = low + (1 << (16 - WINDOW)) - 1
    symbol = np.where(deeper, second[windows, low], first)
    length = luts[-1, symbol].astype(np.int64)
    # Decided if all completions of the window agree. They may not where a code is longer, or where no code starts: an entry
    # there may hold anything, also a symbol whose length does not end in this byte.
    agree = ~deeper | (second[windows, low] == second[windows, high])
    fits = (length > 8 * deeper) & (length <= np.where(deeper, WINDOW, 8))
    decided = agree & fits & (symbol < FIRST_POINTER)
    table[decided] = length[decided] << 8 | symbol[decided]
    return table
