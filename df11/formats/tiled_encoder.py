"""The encoder of the tiled layout in torch operators, for weights on a GPU: the same bytes as df11/formats/tiled.py.

Integers only, in chunks of whole rows of tiles, so that memory beside input and result does not grow with the matrix.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch.nn.functional import pad

from df11.formats.tiled import LANES, ROWS, fixed_bytes, tile_grid
from df11.formats.tiled_code import ESCAPE, TUPLES, TiledCode, encoder_tables

CHUNK = 1 << 24  # weights at a time; some 70 bytes of memory each
COUNTED = 1 << 27  # the same for the histogram, 16 bytes each


def histogram(weights: torch.Tensor) -> np.ndarray:
    """How often each exponent byte occurs in a bf16 tensor, int64[256]."""
    counts = torch.zeros(256, dtype=torch.int64, device=weights.device)
    for piece in weights.reshape(-1).view(torch.int16).split(COUNTED):
        counts += torch.bincount(piece >> 7 & 0xFF, minlength=256)
    found: np.ndarray = counts.cpu().numpy()
    return found


def encode(weights: torch.Tensor, code: TiledCode) -> dict[str, torch.Tensor] | None:
    """Compress a contiguous bf16 matrix [..., columns] where it is.

    Returns low (uint8), sign (int32), stream (uint8), tiles (int32) and patches (int32) of the shapes of TiledMatrix, int32 with
    the bits of uint32; None where the layout would not be smaller, or the tensor is no matrix.
    """
    if weights.dim() < 2 or not weights.numel():
        return None
    rows, columns = math.prod(weights.shape[:-1]), weights.shape[-1]
    f, across, down = tile_grid(rows, columns)
    count = across * down
    fixed = fixed_bytes(count, f)
    if fixed >= 2 * weights.numel():
        return None
    device = weights.device
    ranks, codes = _tables(code, device)
    low = torch.empty(count, f // 2, LANES, 16, dtype=torch.uint8, device=device)
    sign = torch.empty(count, f // 4, LANES, dtype=torch.int32, device=device)
    streams, patches, sizes = [], [], []
    flat = weights.view(torch.int16).view(rows, columns)
    step = max(1, CHUNK // (ROWS * 16 * f * across))
    for start in range(0, down, step):
        stop = min(start + step, down)
        groups, inside = _groups(flat[start * ROWS : stop * ROWS], stop - start, across, f)
        rank = ranks[groups.int() >> 8 & 0x7F]
        if inside is not None:
            rank *= inside
        entry = codes[((rank[..., 0] * 8 + rank[..., 1]) * 8 + rank[..., 2]) * 8 + rank[..., 3]]
        escaped = (rank == ESCAPE) | (entry >> 16 != 0)[..., None]
        if inside is not None:
            escaped &= inside
        del rank
        stream, lengths = _stream(entry.view(-1, 2 * f, LANES))
        streams.append(stream)
        patches.append(_patches(escaped, groups))
        sizes.append(torch.stack([lengths, escaped.flatten(1).sum(1)], 1))
        at = slice(start * across, stop * across)
        _low_and_sign(groups.masked_fill_(escaped, 0), low[at], sign[at])
    tiles = pad(torch.cat(sizes).cumsum(0), (0, 0, 1, 0))
    total, patched = tiles[-1].tolist()
    if max(total, patched) >= 1 << 32 or fixed + 32 * total + 4 * patched >= 2 * weights.numel():
        return None
    found = {"low": low, "sign": sign, "stream": torch.cat(streams).view(-1, LANES)}
    return found | {"tiles": _as_int32(tiles), "patches": torch.cat(patches)}


def _tables(code: TiledCode, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """int32: the rank of each upper exponent; for each tuple its code, length << 12, and 1 << 16 where it has none of its own."""
    ranks, lengths, values = encoder_tables(code)
    last = TUPLES - 1
    codes = np.where(lengths == 0, values[last] | lengths[last] << 12 | 1 << 16, values | lengths << 12)
    return torch.from_numpy(ranks.astype(np.int32)).to(device), torch.from_numpy(codes.astype(np.int32)).to(device)


def _groups(flat: torch.Tensor, down: int, across: int, f: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Rows of tiles in the order of the layout, int16 [tiles, F, 2, 32, 4], and which lie inside of the matrix (None: all)."""
    rows, columns = flat.shape
    missing = down * ROWS - rows, across * 16 * f - columns
    if any(missing):
        flat = pad(flat, (0, missing[1], 0, missing[0]))
    groups = flat.view(down, 2, 8, across, f, 4, 4).permute(0, 3, 4, 1, 2, 5, 6).contiguous().view(-1, f, 2, LANES, 4)
    if not any(missing):
        return groups, None
    row = torch.arange(down * ROWS, device=flat.device).view(down, 1, 1, 2, 8, 1, 1)
    column = torch.arange(across * 16 * f, device=flat.device).view(1, across, f, 1, 1, 4, 4)
    return groups, ((row < rows) & (column < columns)).reshape(groups.shape)


def _stream(entry: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The codes of [tiles, groups, 32] one after another in each lane: uint8[bytes] of all tiles, and each tile's bytes a lane."""
    tiles, groups, lanes = entry.shape
    length = entry >> 12 & 0xF
    end = length.cumsum(1, dtype=torch.int32)
    begin, value = end - length, entry & 0xFFF
    words = -(-12 * groups // 32) + 1
    out = torch.zeros(tiles, words, lanes, dtype=torch.int32, device=entry.device)
    index, shift = (begin >> 5).long(), begin & 31
    out.scatter_add_(1, index, value << shift)  # the bits of different codes are disjoint: no carry, and any order
    out.scatter_add_(1, index.add_(1), (value >> 1) >> (31 - shift))
    size = (end[:, -1].amax(1) + 7) >> 3
    # Of a word a lane keeps the bytes that the tile has: what is left after whole words then lies lane by lane.
    row = torch.arange(words, dtype=torch.int32, device=entry.device).view(1, -1, 1, 1)
    byte = torch.arange(4, dtype=torch.int32, device=entry.device)
    kept = 4 * row + byte < size.view(-1, 1, 1, 1)
    return out.view(torch.uint8).view(tiles, words, lanes, 4).masked_select(kept), size


def _patches(escaped: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """row << 28 | column << 16 | pattern of the escaped weights of each tile, in rising order, int32."""
    tile, fragment, half, lane, i = escaped.nonzero(as_tuple=True)
    pattern = groups[tile, fragment, half, lane, i].long() & 0xFFFF
    word = (8 * half + (lane >> 2)) << 28 | (16 * fragment + 4 * (lane & 3) + i) << 16 | pattern
    return _as_int32((tile << 32 | word).sort().values & 0xFFFFFFFF)


def _low_and_sign(groups: torch.Tensor, low: torch.Tensor, sign: torch.Tensor) -> None:
    """Into uint8 [tiles, F / 2, 32, 16] and int32 [tiles, F / 4, 32]."""
    tiles, f = groups.shape[:2]
    low.view(tiles, f // 2, LANES, 2, 2, 4).copy_((groups & 0xFF).view(tiles, f // 2, 2, 2, LANES, 4).permute(0, 1, 4, 2, 3, 5))
    four = torch.arange(4, dtype=torch.int32, device=groups.device)
    place = 8 * four + 7 - 2 * four.view(4, 1, 1, 1) - four[:2].view(2, 1, 1)
    bits = (groups.view(tiles, f // 4, 4, 2, LANES, 4) < 0).int() << place
    sign.copy_(bits.sum((2, 3, 5), dtype=torch.int32))


def _as_int32(words: torch.Tensor) -> torch.Tensor:
    """int64 below 2^32 as int32 of the same bits."""
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()
