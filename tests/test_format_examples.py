"""The worked examples of docs/format.md are what the encoders give, and its text is enough to decode the tiled layout."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from df11 import bits
from df11.formats.dfloat11 import DFloat11
from df11.formats.tiled import Tiled, TiledUnit

TEXT = " ".join((Path(__file__).parents[1] / "docs" / "format.md").read_text().split())
PUBLISHED, TILED = TEXT.split("**Worked example.**")[1:]


def hexadecimal(values: np.ndarray) -> str:
    return " ".join(f"{value:02X}" for value in values.tolist())


def encoded(patterns: np.ndarray) -> TiledUnit:
    return Tiled(threads=1).encode_tensors([bits.from_bits(patterns.reshape(-1), patterns.shape)])


def by_the_text(unit: TiledUnit) -> np.ndarray:
    """Decode the unit's only matrix as docs/format.md says, one weight after another."""
    (m,) = unit.matrices
    rows, columns = math.prod(m.shape[:-1]), m.shape[-1]
    f_count = 2 * m.low.shape[1]
    across = -(-columns // (16 * f_count))
    out = np.zeros((rows, columns), np.uint16)
    for tile, ((first, patch), (end, last)) in enumerate(zip(m.tiles[:-1].tolist(), m.tiles[1:].tolist(), strict=True)):
        top, left, n = tile // across * 16, tile % across * 16 * f_count, end - first
        stream, words, over = m.stream[first:end].tobytes(), n // 4, n % 4
        for lane in range(32):
            own = b"".join(stream[4 * (32 * j + lane) :][:4] for j in range(words)) + stream[128 * words + over * lane :][:over]
            code = int.from_bytes(own, "little")
            for f in range(f_count):
                for group in range(2):
                    entry = int(unit.code.table[code & 4095])
                    code >>= entry >> 18
                    for i in range(4):
                        row, column = top + lane // 4 + 8 * group, left + 16 * f + 4 * (lane % 4) + i
                        if row < rows and column < columns:
                            upper = int(unit.code.uppers[entry >> 4 * i & 15])
                            sign = int(m.sign[tile, f // 4, lane]) >> 8 * i + 7 - (2 * (f % 4) + group) & 1
                            low = int(m.low[tile, f // 2, lane, 8 * (f % 2) + 4 * group + i])
                            out[row, column] = sign << 15 | upper << 8 | low
        for p in m.patches[patch:last].tolist():
            out[top + (p >> 28), left + (p >> 16 & 0xFFF)] = p & 0xFFFF
    return out


def test_the_published_layout() -> None:
    unit = DFloat11(threads=1).encode_tensors([torch.tensor([1.0, -0.5, 1.0, 0.0], dtype=torch.bfloat16)])
    (stream,) = unit.encoded_exponent.tolist()
    code = {127: "0", 0: "10", 126: "11"}
    said = [
        "The weights 1.0, -0.5, 1.0, 0.0 have the exponents 127, 126, 127, 0.",
        f"The code is {', '.join(f'{exponent}: `{word}`' for exponent, word in code.items())}.",
        f"The stream is `{' '.join(code[exponent] for exponent in (127, 126, 127, 0))}` and two bits of padding:",
        f"`{stream:08b}` = 0x{stream:02X}. `sign_mantissa` is {hexadecimal(unit.sign_mantissa)}, the gap of chunk 0 is 0,",
        f"so `gaps` is {unit.gaps.size} zero bytes, and `output_positions` is {', '.join(map(str, unit.output_positions))}.",
    ]
    assert [text for text in said if text not in PUBLISHED] == []
    assert not unit.gaps.any()
    for exponent, word in code.items():
        assert (unit.luts[0, int(word, 2) << 8 - len(word)], unit.luts[-1, exponent]) == (exponent, len(word))


def test_the_tiled_layout() -> None:
    weights = np.full((16, 128), 0x3F80, np.uint16)
    for k in range(1, 8):
        weights[0, 16 * k] = 0x3F80 + 0x100 * k
    weights[9, 50] = 0xBF00
    unit = encoded(weights)
    (m,), table = unit.matrices, unit.code.table
    codes = ["0", "0", *(code for k in range(1, 8) for code in (f"{k + 51:06b}", "0"))]
    patch, (tile, part, lane) = int(m.patches[0]), np.argwhere(m.sign)[0].tolist()
    said = [
        "16 x 128 weights 1.0 (0x3F80: upper exponent 3F, low byte 80); but in row 0 column 16 k is 4^k (0x3F80 + 0x100 k) for"
        " k = 1 to 7, and in row 9 column 50 is -0.5 (0xBF00).",
        f"F is {m.fragments}, there is {['no', 'one'][len(m.low)]} tile. `uppers` is {hexadecimal(unit.code.uppers)}:"
        f" 4^k has rank k, and 4^7, whose upper exponent is {weights[0, 112] >> 8:X}, is the escape.",
        f"(0, 0, 0, 0) has the code `{codes[0]}`, so `table` is 0x{table[0]:08X} where the index is even.",
        f"(k, 0, 0, 0) has k + 51 in six bits, `{codes[2]}` for k = 1, so the entries at 11 (001011) + 64 i are 0x{table[11]:08X}.",
        f"`{' '.join(codes)}`, {len(''.join(codes))} bits: {hexadecimal(m.stream.reshape(-1)[[0, 1, 2, 3, 128, 129, 130]])}.",
        f"`stream` is {list(m.stream.shape)} bytes of zeros but for {hexadecimal(m.stream[0, :4])} at the beginning and"
        f" {hexadecimal(m.stream[4, :3])} from byte 128 on",
        f"fragment {50 // 16}, lane {lane} (g = {9 % 8}, t = {50 % 16 // 4}), group {9 // 8}, i = {50 % 4}.",
        f"`low` is 80, but 00 at {', and at '.join(str(at) for at in np.argwhere(m.low == 0).tolist())}, the escape.",
        f"`sign` is 0, but 0x{m.sign.max():08X} at {[tile, part, lane]}: bit 16 + 7 - (6 + 1).",
        f"`tiles` is {' and '.join(' '.join(map(str, row)) for row in m.tiles.tolist())}.",
        f"`patches` is 0x{patch:08X}: row {patch >> 28}, column {patch >> 16 & 0xFFF}, 0x{patch & 0xFFFF:X}.",
    ]
    assert [text for text in said if text not in TILED] == []
    # What is not said of the arrays is zeros, or one value.
    assert set(table[::2]) == {table[0]} and set(table[11::64]) == {table[11]}
    assert [table[int(f"{k + 51:06b}"[::-1], 2)] for k in range(1, 8)] == [6 << 18 | k for k in range(1, 8)]
    assert np.count_nonzero(m.stream) == 7 and np.count_nonzero(m.sign) == len(m.patches) == 1 and set(m.low.flat) == {0, 0x80}
    assert np.array_equal(by_the_text(unit), weights)


@pytest.mark.parametrize("shape", [(47, 1100), (3, 15, 508)])
def test_the_text_is_enough(shape: tuple[int, ...]) -> None:
    """Padding, several tiles, left over bytes, escapes alone and of whole tuples."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(shape, generator=generator) * 0.02
    normal[..., ::90] = torch.randn(shape, generator=generator)[..., ::90] * 1e4
    weights = bits.to_bits(normal.bfloat16().reshape(-1)).reshape(shape)
    unit = encoded(weights)
    (m,) = unit.matrices
    assert m.raw is None and len(m.tiles) > 3 and len(m.patches)
    assert np.array_equal(by_the_text(unit), weights.reshape(-1, shape[-1]))
