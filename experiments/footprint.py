"""What a model takes on one GPU or several that share its blocks, and the longest context that is left room for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Footprint:
    """Bytes of a model as it is stored, and what running it takes besides."""

    blocks: int  # how many
    block: float  # bytes of one, the mean
    first: int  # what comes before the blocks: the embedding
    last: int  # and after them: norms, and lm_head where it is not the embedding, with which it stays on one card
    buffer: int  # decompressed at a time
    reserve: int  # on each card
    cache: Callable[[int], int]  # tokens -> bytes of keys and values in all blocks

    @property
    def weights(self) -> int:
        return round(self.blocks * self.block) + self.first + self.last

    def needed(self, tokens: int, cards: int = 1) -> int:
        """Bytes on all cards together."""
        return self.weights + self.cache(tokens) + cards * (self.buffer + self.reserve)

    def fits(self, tokens: int, memory: int, cards: int = 1) -> bool:
        """Whether cards of so many bytes hold it, each with whole blocks, their caches and a buffer of its own."""
        room = [memory - self.reserve - self.buffer] * cards
        room[0] -= self.first
        room[-1] -= self.last
        one = self.block + self.cache(tokens) / self.blocks
        return min(room) >= 0 and sum(int(r / one) for r in room) >= self.blocks

    def longest(self, memory: int, cards: int = 1) -> int:
        """Tokens of the longest context that fits, 0 where not even the weights do."""
        return last_true(lambda tokens: self.fits(tokens, memory, cards), 0, 1 << 30, 1)


def last_true(holds: Callable[[int], bool], low: int, high: int, resolution: int) -> int:
    """The largest n in [low, high) found to hold, to the resolution; `low` is believed to. What holds for n holds for less."""
    while high - low > resolution:
        middle = (low + high) // 2
        if holds(middle):
            low = middle
        else:
            high = middle
    return low
