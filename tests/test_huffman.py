import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from df11 import huffman, reference

counts = st.lists(st.one_of(st.integers(0, 5), st.integers(0, 10**9)), min_size=2, max_size=40).filter(any)


@given(counts, st.integers(6, 32))
@settings(max_examples=200, deadline=None)
def test_lengths_cost_what_the_reference_costs(counts: list[int], limit: int) -> None:
    fast = huffman.code_lengths(np.array(counts), limit)
    slow = reference.limited_lengths(counts, limit)
    assert fast.max() <= limit
    assert np.array_equal(fast > 0, np.array(counts) > 0)
    assert int(fast.astype(int) @ np.array(counts)) == sum(a * b for a, b in zip(slow, counts, strict=True))
    used = fast[fast > 0].astype(float)
    assert (2.0**-used).sum() == (1 if len(used) > 1 else 0.5)


@given(counts)
@settings(max_examples=100, deadline=None)
def test_a_wide_limit_gives_huffman(counts: list[int]) -> None:
    lengths = huffman.code_lengths(np.array(counts), 40)
    assert int(lengths.astype(int) @ np.array(counts)) == reference.huffman_cost(counts)


def fibonacci(n: int) -> np.ndarray:
    """The histogram with the longest Huffman code: one bit more a symbol."""
    out = [1, 1]
    while len(out) < n:
        out.append(out[-1] + out[-2])
    return np.array(out)


@pytest.mark.parametrize("limit", [6, 8, 12, 16, 32])
def test_the_limit_binds_on_fibonacci_counts(limit: int) -> None:
    assert huffman.code_lengths(fibonacci(50), limit).max() == limit


def test_edge_cases() -> None:
    assert huffman.code_lengths(np.zeros(5, int)).tolist() == [0] * 5
    assert huffman.code_lengths(np.array([0, 7, 0])).tolist() == [0, 1, 0]
    assert huffman.entropy(np.array([0, 7, 0])) == 0
    assert huffman.entropy(np.zeros(4)) == 0
    with pytest.raises(ValueError, match="raise the limit"):
        huffman.code_lengths(np.ones(9), 3)


def test_canonical_codes_are_ordered_by_length_and_symbol() -> None:
    lengths = np.array([2, 0, 1, 3, 3], np.uint8)
    assert huffman.canonical_codes(lengths).tolist() == [0b10, 0, 0b0, 0b110, 0b111]


def test_overlapping_codes_are_refused() -> None:
    with pytest.raises(ValueError, match="overlap"):
        huffman.Code(np.array([1, 2], np.uint8), np.array([0, 1], np.uint32))
    with pytest.raises(ValueError, match="33 bits"):
        huffman.Code(np.array([33], np.uint8), np.array([0], np.uint32))


def test_decode_table_covers_each_code() -> None:
    code = huffman.Code.from_histogram(fibonacci(20))
    symbols, lengths = code.decode_table(12)
    for symbol, (length, word) in enumerate(zip(code.lengths.tolist(), code.codes.tolist(), strict=True)):
        if length <= 12:
            at = word << (12 - length)
            assert (symbols[at], lengths[at]) == (symbol, length)
        else:
            assert lengths[word >> (length - 12)] == 0


def test_statistics() -> None:
    histogram = np.array([4, 2, 1, 1])
    stats = huffman.statistics(huffman.Code.from_histogram(histogram), histogram)
    assert math.isclose(stats.entropy_bits, 1.75) and math.isclose(stats.mean_bits, 1.75)
    assert (stats.kraft, stats.longest, stats.symbols, stats.redundancy_bits) == (1, 3, 4, 0)


def test_a_symbol_without_a_code_is_named() -> None:
    with pytest.raises(ValueError, match="symbol 1"):
        huffman.Code.from_histogram(np.array([1, 0])).bits(np.array([1, 2]))
