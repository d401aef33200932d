"""Slow, obvious versions of what `huffman` and `formats.dfloat11` do fast. Tests hold the fast code against these."""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def huffman_cost(counts: Sequence[int]) -> int:
    """Total bits of an optimal prefix code without a length limit: the sum of all merged weights."""
    heap = [c for c in counts if c]
    if len(heap) == 1:
        return heap[0]
    heapq.heapify(heap)
    cost = 0
    while len(heap) > 1:
        merged = heapq.heappop(heap) + heapq.heappop(heap)
        cost += merged
        heapq.heappush(heap, merged)
    return cost


def limited_lengths(counts: Sequence[int], limit: int) -> list[int]:
    """Package-merge as the textbook has it: coins are (value, the symbols inside)."""
    leaves = sorted((c, [s]) for s, c in enumerate(counts) if c)
    if len(leaves) == 1:
        return [int(c > 0) for c in counts]
    coins: list[tuple[int, list[int]]] = []
    for _ in range(limit):
        packages = [(a[0] + b[0], a[1] + b[1]) for a, b in zip(coins[::2], coins[1::2], strict=False)]
        coins = sorted(leaves + packages)
    lengths = [0] * len(counts)
    for _, symbols in coins[: 2 * len(leaves) - 2]:
        for s in symbols:
            lengths[s] += 1
    return lengths


def encode(exponents: Sequence[int], code: dict[int, str], chunk: int = 64, block: int = 512) -> dict[str, list[int]]:
    """The published layout from strings of 0 and 1: bytes, gap a chunk, first element a block (paper section 2.3.2)."""
    stream = ""
    gaps: dict[int, int] = {}
    positions: dict[int, int] = {}
    for i, e in enumerate(exponents):
        gaps.setdefault(len(stream) // chunk, len(stream) % chunk)
        positions.setdefault(len(stream) // (chunk * block), i)
        stream += code[e]
    if len(stream) % 8:  # the padding of the last byte counts as a code that starts here
        gaps.setdefault(len(stream) // chunk, len(stream) % chunk)
    n_bytes = -(-len(stream) // 8)
    blocks = -(-n_bytes * 8 // (chunk * block))
    return {
        "bytes": [int(stream[8 * i : 8 * i + 8].ljust(8, "0"), 2) for i in range(n_bytes)],
        "gaps": [gaps.get(c, 0) for c in range(block * blocks)],
        "output_positions": [positions.get(b, len(exponents)) for b in range(blocks)] + [len(exponents)],
    }


def decode(data: bytes, code: dict[int, str], count: int) -> list[int]:
    """The first `count` symbols of a stream, bit by bit."""
    symbol_of = {word: symbol for symbol, word in code.items()}
    stream = "".join(f"{byte:08b}" for byte in data)
    symbols: list[int] = []
    word, at = "", 0
    while len(symbols) < count:
        word += stream[at]
        at += 1
        if word in symbol_of:
            symbols.append(symbol_of[word])
            word = ""
    return symbols
