"""The tiled layout on the CPU: every bit back, from any shape and any pattern, and nothing but FormatError from damaged arrays."""

import json
from dataclasses import replace

import numpy as np
import pytest
import safetensors.numpy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from df11.formats import FormatError, container
from df11.formats.tiled import Tiled, TiledUnit, tile_fragments, tile_grid
from df11.formats.tiled_code import ESCAPE, NONE, WINDOW, make_code, selector
from df11.tiled_ops import TiledWeight
from tests.helpers import normal, patterns

FORMAT = Tiled(threads=2)


def check(*tensors: torch.Tensor) -> TiledUnit:
    unit = FORMAT.encode_tensors(tensors)
    data = container.pack(unit)
    unpacked = container.unpack(data)
    assert isinstance(unpacked, TiledUnit) and container.pack(unpacked) == data
    for back in (FORMAT.decode(unit), list(FORMAT.stream(unit)), FORMAT.decode(unpacked)):
        assert len(back) == len(tensors)
        for a, b in zip(back, tensors, strict=True):
            assert torch.equal(a.reshape(-1).view(torch.int16), b.reshape(-1).view(torch.int16))
    assert [t.shape for t in FORMAT.decode(unit)] == [t.shape for t in tensors]
    return unit


SHAPES = [(16, 128), (16, 256), (17, 257), (1, 4096), (4096, 1), (48, 576), (33, 2304), (100, 300), (3, 20, 192), (2, 3, 4, 130)]


@pytest.mark.parametrize("shape", [*SHAPES, (), (0,), (1,), (5000,), (0, 300), (300, 0)])
def test_shapes(shape: tuple[int, ...]) -> None:
    check(normal(*shape))


def test_a_large_matrix_is_smaller() -> None:
    unit = check(normal(512, 2048))
    sizes = FORMAT.nbytes(unit)
    arrays = sum(size for name, size in sizes.items() if name != "code")
    assert 8 * arrays / unit.numel < 10.97 and sizes["code"] < 16400


def test_several_matrices_share_a_code() -> None:
    unit = check(normal(32, 256), normal(7), normal(64, 576, std=0.1), torch.zeros(0, 5).bfloat16(), normal(16, 1024))
    assert [m.fragments for m in unit.matrices] == [16, 0, 36, 0, 32]
    assert unit.matrices[1].raw is not None


def test_tiles_of_another_width_than_the_columns_ask_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """As files made when FRAGMENTS had another order have them: the arrays say how wide their tiles are."""
    monkeypatch.setattr("df11.formats.tiled.FRAGMENTS", (32, 28))
    weights = normal(48, 3584)
    unit = FORMAT.encode_tensors([weights])
    on_device = TiledWeight.encode(weights)
    monkeypatch.undo()
    assert on_device and on_device.fragments == unit.matrices[0].fragments == 32 != tile_fragments(3584)
    assert all(torch.equal(w.view(torch.int16), weights.view(torch.int16)) for w in (*FORMAT.decode(unit), on_device.decompress()))


def test_all_patterns() -> None:
    """Alone they are not smaller than as they are; among ordinary weights they are patches."""
    everything = patterns(np.arange(1 << 16), (256, 256))
    assert FORMAT.nbytes(check(everything))["raw"] == 2 << 16
    unit = check(torch.cat([normal(2048, 256), everything]))
    assert unit.matrices[0].raw is None and len(unit.matrices[0].patches) > 50_000


@pytest.mark.parametrize("value", [0.0, -0.0, 1.5, float("inf"), float("nan"), 1e-40])
def test_one_symbol(value: float) -> None:
    unit = check(torch.full((64, 512), value, dtype=torch.bfloat16))
    assert unit.matrices[0].raw is None and not len(unit.matrices[0].patches)


@pytest.mark.parametrize("symbols", [2, 7, 8, 9, 60, 128])
def test_distributions(symbols: int) -> None:
    generator = np.random.default_rng(symbols)
    uppers = generator.choice(128, symbols, replace=False)
    for concentration in (0.05, 0.5, 50):
        p = generator.dirichlet(np.full(symbols, concentration))
        values = generator.choice(uppers, 80 * 512, p=p) << 8 | generator.integers(0, 256, 80 * 512)
        check(patterns(values | generator.integers(0, 2, values.size) << 15, (80, 512)))


def test_neighbours_that_are_not_independent() -> None:
    """The code is made as if they were; where that is far off, patches or the raw form take over."""
    rare = np.full((64, 512), 0x3C80)
    rare[:, 256:] = np.arange(64)[:, None] << 8
    check(patterns(rare.reshape(-1), (64, 512)))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 70), st.integers(1, 700), st.floats(1e-30, 1e30), st.integers(0, 1 << 30))
def test_any_size_and_scale(rows: int, columns: int, std: float, seed: int) -> None:
    check(normal(rows, columns, std=std, seed=seed))


@pytest.mark.parametrize(
    "columns, fragments",
    [(4096, 32), (14336, 28), (2304, 36), (3584, 28), (3840, 24), (5376, 28), (576, 36), (100, 8), (1, 8), (1600, 20)],
)
def test_the_tile_size_follows_from_the_columns(columns: int, fragments: int) -> None:
    assert tile_fragments(columns) == fragments


def test_the_grid_of_tiles_covers_the_matrix() -> None:
    assert tile_grid(33, 2304) == (36, 4, 3)
    assert tile_grid(1, 1) == (8, 1, 1)
    assert tile_grid(48, 4096, 8) == (8, 32, 3)


def test_codes_decode_what_they_encode() -> None:
    for seed in range(5):
        histogram = np.random.default_rng(seed).zipf(1.5, 256)
        code = make_code(histogram)
        lengths = code.table >> 18
        assert lengths.min() >= 1 and lengths.max() <= WINDOW
        assert sum(1 << WINDOW - int(n) for n in lengths[np.unique(code.table, return_index=True)[1]]) == (1 << WINDOW)
        assert (code.table & 0xFFFF == selector(NONE)).any()
        assert code.uppers[ESCAPE] == 0


def test_threads_and_pieces_do_not_matter() -> None:
    tensors = [normal(600, 576), normal(40, 1024)]
    flat = torch.cat([t.reshape(-1) for t in tensors])
    expected = FORMAT.encode_tensors(tensors)
    unit = Tiled(threads=1).encode(lambda: flat.split(77_777), [tuple(t.shape) for t in tensors])
    for a, b in zip(unit.matrices, expected.matrices, strict=True):
        assert all(np.array_equal(array, b.arrays[name]) for name, array in a.arrays.items())
    assert unit.checksum == expected.checksum
    with pytest.raises(ValueError, match="the stream holds"):
        FORMAT.encode(lambda: [flat[1:]], [tuple(t.shape) for t in tensors])
    with pytest.raises(ValueError, match="threads=-1"):
        Tiled(threads=-1)


@pytest.fixture(scope="module")
def sample() -> TiledUnit:
    weights = normal(64, 576)
    weights[3, 5] = float("nan")
    return FORMAT.encode_tensors([weights])


def refused(unit: TiledUnit) -> bool:
    try:
        FORMAT.decode(unit)
    except FormatError:
        return True
    return False


def test_damaged_arrays_are_refused(sample: TiledUnit) -> None:
    """A changed bit ends in FormatError, from the checks or at last from the checksum, unless it is one of those between the end of
    a lane's codes and its next word."""
    generator = np.random.default_rng(0)
    (matrix,) = sample.matrices
    for name in ("low", "sign", "stream", "tiles", "patches"):
        for _ in range(40):
            array = getattr(matrix, name).copy()
            view = array.reshape(-1).view(np.uint8)
            view[generator.integers(view.size)] ^= 1 << generator.integers(8)
            damaged = replace(sample, matrices=(replace(matrix, **{name: array}),))
            if name == "stream" and not refused(damaged):
                assert torch.equal(FORMAT.decode(damaged)[0].view(torch.int16), FORMAT.decode(sample)[0].view(torch.int16))
            else:
                assert refused(damaged)
        short = getattr(matrix, name)[:-1]
        with pytest.raises(FormatError):
            FORMAT.decode(replace(sample, matrices=(replace(matrix, **{name: short}),)))
    for name, at in (("table", slice(None)), ("uppers", slice(7))):
        array = getattr(sample.code, name).copy()
        array[at] = array[at][::-1]
        with pytest.raises(FormatError):
            FORMAT.decode(replace(sample, code=replace(sample.code, **{name: array})))


def test_the_tile_that_does_not_fit_is_named() -> None:
    weights = normal(32, 1140)  # two tiles across, of 576 columns
    weights[0, 0] = weights[-1, -1] = float("nan")
    unit = FORMAT.encode_tensors([weights])
    (matrix,) = unit.matrices
    later, another, padding = matrix.tiles.copy(), matrix.patches.copy(), matrix.patches.copy()
    later[2, 0] += 1
    another[0] = 600 << 16  # a column of the tile at its side
    padding[-1] = 570 << 16  # the last tile's are 0 to 563
    for changed, tile in (({"tiles": later}, 1), ({"patches": another}, 0), ({"patches": padding}, 3)):
        damaged = replace(unit, checksum="", matrices=(replace(matrix, **changed),))
        with pytest.raises(FormatError, match=rf"tile {tile} of a matrix \[32, 1140\] does not decode"):
            FORMAT.decode(damaged)


def test_what_no_encoder_writes_is_refused(sample: TiledUnit) -> None:
    """Each would give wrong weights, and without a checksum nothing else would tell."""
    weights = normal(16, 576)
    weights[0, 3], weights[2, 8] = float("nan"), float("inf")
    unit = replace(FORMAT.encode_tensors([weights]), checksum="")
    (matrix,), code = unit.matrices, unit.code
    patches = matrix.patches
    assert not refused(unit) and len(patches) > 1
    swapped, twin, moved = patches.copy(), patches.copy(), patches.copy()
    swapped[:2], twin[1], moved[0] = patches[1::-1], patches[0], patches[0] + (1 << 16)
    for changed in (swapped, twin, moved):
        with pytest.raises(FormatError, match="tile 0"):
            FORMAT.decode(replace(unit, matrices=(replace(matrix, patches=changed),)))
    fewer = matrix.tiles - np.array([[0, 0], [0, 1]], np.uint32)
    assert refused(replace(unit, matrices=(replace(matrix, tiles=fewer, patches=patches[:-1]),)))
    twice = code.uppers.copy()
    twice[1] = twice[0]
    assert refused(replace(unit, code=replace(code, uppers=twice)))
    for what in (
        {"low": None},
        {"stream": [0]},
        {"patches": 3},
        {"shape": (16.0, 576)},
        {"shape": (-16, 576)},
        {"fragments": None},
    ):
        assert refused(replace(unit, matrices=(replace(matrix, **what),))), what
    assert refused(replace(unit, code=replace(code, table=None)))


def test_every_altered_or_truncated_container_is_named(sample: TiledUnit) -> None:
    unit = replace(sample, matrices=(*sample.matrices, FORMAT.encode_tensors([normal(7)]).matrices[0]))
    good = container.pack(replace(unit, checksum=""))
    generator = np.random.default_rng(2)
    header = 8 + int.from_bytes(good[:8], "little")
    for at in [*range(header), *generator.integers(header, len(good), 300).tolist()]:
        bad = bytearray(good)
        bad[at] ^= 1 << int(generator.integers(8))
        with pytest.raises(FormatError):
            container.unpack(bytes(bad))
    for size in [0, 7, 8, header, *generator.integers(0, len(good), 50).tolist()]:
        with pytest.raises(FormatError):
            container.unpack(good[:size])


@pytest.mark.parametrize("fragments", [None, [36], [36, 0, 0], [0, 0], [36, True], [32, 0], "36"])
def test_a_container_with_other_tiles_than_its_arrays_is_refused(sample: TiledUnit, fragments: object) -> None:
    """With right checksums, as somebody who knows the format could make them."""
    arrays = {f"0.{name}": array for name, array in sample.matrices[0].arrays.items()}
    arrays |= {"1.raw": np.zeros(7, np.uint16), "table": sample.code.table, "uppers": sample.code.uppers}
    for tried, right in ((fragments, False), ([36, 0], True)):
        header = {"format": "tiled", "version": container.VERSION, "shapes": [[64, 576], [7]], "checksum": "", "fragments": tried}
        header["stored"] = container._checksum(arrays, header)
        data = safetensors.numpy.save(arrays, {"df11": json.dumps(header)})
        if right:
            assert container.unpack(data)
        else:
            with pytest.raises(FormatError):
                container.unpack(data)


@pytest.mark.parametrize("weights", [torch.zeros(2, 16, 128).bfloat16(), torch.zeros(512).bfloat16(), torch.zeros(16, 128)])
def test_what_is_no_matrix_is_refused(weights: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"weights: .*needed torch\.bfloat16 \[rows, columns\]"):
        TiledWeight.encode(weights)


def test_noise_is_refused_without_a_checksum(sample: TiledUnit) -> None:
    """Arrays of the right sizes full of random bytes: no crash, no read or write out of bounds."""
    generator = np.random.default_rng(1)
    (matrix,) = sample.matrices
    for _ in range(20):
        noise = {n: generator.integers(0, 256, a.nbytes, np.uint8).view(a.dtype).reshape(a.shape) for n, a in matrix.arrays.items()}
        for chosen in (noise, {"stream": noise["stream"], "tiles": noise["tiles"]}, {"patches": noise["patches"]}):
            with pytest.raises(FormatError):
                FORMAT.decode(replace(sample, checksum="", matrices=(replace(matrix, **chosen),)))
