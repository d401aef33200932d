import dataclasses
import json
from collections.abc import Callable

import numpy as np
import pytest
import safetensors.numpy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from df11 import bits, reference
from df11.formats import FormatError, UnsupportedBits, container, dfloat11, luts
from df11.formats.dfloat11 import DFloat11, DFloat11Unit
from df11.huffman import Code, canonical_codes
from tests.helpers import normal, same_bits


def round_trip(tensors: list[torch.Tensor], **options: object) -> DFloat11Unit:
    layout = DFloat11(**options)  # type: ignore[arg-type]
    unit = container.unpack(container.pack(layout.encode_tensors(tensors)))
    back = layout.decode(unit)
    assert len(back) == len(tensors) and all(map(same_bits, back, tensors))
    return unit


def adversarial(limit: int) -> torch.Tensor:
    """Exponents with Fibonacci counts: code lengths 1, 2, 3 ... up to `limit`."""
    counts = [1, 1]
    while len(counts) < min(limit + 1, 24):
        counts.append(counts[-1] + counts[-2])
    exponents = np.repeat(np.arange(len(counts), dtype=np.uint16) + 100, counts)
    np.random.default_rng(0).shuffle(exponents)
    return bits.from_bits(exponents << 7 | 5, (len(exponents),))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shapes", [[(1,)], [(0,)], [], [(3, 5)], [(7, 11), (0, 4), (), (1, 1, 13)], [(1031, 997), (64, 64)]])
def test_round_trip_of_shapes(shapes: list[tuple[int, ...]], threads: int) -> None:
    round_trip([normal(int(np.prod(s)), seed=i).reshape(s) for i, s in enumerate(shapes)], threads=threads)


@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, 2.0**-133])
@pytest.mark.parametrize("n", [1, 64, 32768, 32769, 70000])
def test_one_symbol(value: float, n: int) -> None:
    unit = round_trip([torch.full((n,), value, dtype=torch.bfloat16)])
    assert unit.encoded_exponent.size == -(-n // 8)


@given(hnp.arrays(np.uint16, st.integers(0, 3000), elements=st.integers(0, (luts.FIRST_POINTER << 7) - 1)))
@settings(max_examples=60, deadline=None)
def test_any_pattern_below_the_pointers_is_coded(patterns: np.ndarray) -> None:
    assert round_trip([bits.from_bits(patterns & 0x7FFF, (patterns.size,))], strict=True).raw is None


@given(hnp.arrays(np.uint16, st.integers(0, 2000)), st.sampled_from([8, 9, 16, 32]))
@settings(max_examples=60, deadline=None)
def test_any_pattern_at_all(patterns: np.ndarray, limit: int) -> None:
    round_trip([bits.from_bits(patterns, (patterns.size,))], max_code_length=limit)


def test_all_patterns() -> None:
    every = np.arange(1 << 16, dtype=np.uint16)
    coded = every[(every >> 7 & 0xFF) < luts.FIRST_POINTER]
    assert round_trip([bits.from_bits(coded, (coded.size,))], strict=True).raw is None
    assert round_trip([bits.from_bits(every, (256, 256))]).raw is not None


@pytest.mark.parametrize("pattern", [0x7F80, 0xFF80, 0x7FC1, 0xFFFF, luts.FIRST_POINTER << 7])
def test_large_exponents_are_raw_or_refused(pattern: int) -> None:
    tensor = normal(1000)
    tensor.view(torch.int16)[7] = np.uint16(pattern).astype(np.int16).item()
    assert round_trip([tensor]).raw is not None
    with pytest.raises(UnsupportedBits, match="exponent of 240"):
        DFloat11(strict=True).encode_tensors([tensor])


@pytest.mark.parametrize("limit", [8, 12, 23, 32])
def test_adversarial_code_lengths(limit: int) -> None:
    unit = round_trip([adversarial(32)], max_code_length=limit)
    assert unit.luts[-1].max() == min(limit, 23)


def test_codes_of_32_bits_from_a_given_codebook() -> None:
    lengths = np.zeros(256, np.uint8)
    lengths[100:133] = [*range(1, 33), 32]
    code = Code(lengths, canonical_codes(lengths))
    exponents = np.random.default_rng(1).integers(100, 133, 20_000).astype(np.uint16)
    exponents[-3:] = 132
    tensor = bits.from_bits(exponents << 7, (exponents.size,))
    unit = DFloat11().encode_tensors([tensor], code)
    assert same_bits(DFloat11().decode(unit)[0], tensor)


def test_flat_histograms_fit_the_tables() -> None:
    exponents = np.arange(240).repeat(np.linspace(1, 400, 240).astype(int)).astype(np.uint16)
    unit = round_trip([bits.from_bits(exponents << 7, (exponents.size,))], strict=True)
    assert len(unit.luts) - 1 <= luts.MAX_TABLES


def test_codes_that_the_tables_cannot_hold_are_refused() -> None:
    counts = np.zeros(256, np.int64)
    counts[:240] = np.linspace(1, 400, 240)
    with pytest.raises(ValueError, match=r"needs \d+ tables, the layout has 17: use a shorter limit"):
        DFloat11().encode_tensors([normal(100)], Code.from_histogram(counts))
    counts[:] = 1
    with pytest.raises(UnsupportedBits, match="a symbol of 240 or more"):
        DFloat11().encode_tensors([normal(100)], Code.from_histogram(counts))
    with pytest.raises(ValueError, match=r"no entry for symbol \d+, which occurs"):
        DFloat11().encode_tensors([normal(100)], Code.from_histogram(np.eye(256, dtype=np.int64)[7]))


@given(st.integers(1, 40_000), st.sampled_from([0.0, 1e-30, 0.02, 1e4]), st.integers(0, 5))
@settings(max_examples=25, deadline=None)
def test_arrays_equal_the_reference(n: int, std: float, seed: int) -> None:
    tensor = normal(n, seed=seed, std=std)
    unit = DFloat11().encode_tensors([tensor])
    exponent, sign_mantissa = bits.split(bits.to_bits(tensor))
    code = luts.choose_code(np.bincount(exponent, minlength=256))
    words = {s: f"{code.codes[s]:0{code.lengths[s]}b}" for s in np.flatnonzero(code.lengths).tolist()}
    expected = reference.encode(exponent.tolist(), words)
    assert unit.encoded_exponent.tolist() == expected["bytes"]
    assert dfloat11.unpack_gaps(unit.gaps).tolist() == expected["gaps"]
    assert unit.output_positions.tolist() == expected["output_positions"]
    assert np.array_equal(unit.sign_mantissa, sign_mantissa)
    assert reference.decode(unit.encoded_exponent.tobytes(), words, min(n, 500)) == exponent[:500].tolist()


def test_the_stream_does_not_depend_on_its_pieces_or_threads() -> None:
    tensor = normal(1_500_000)
    whole = container.pack(DFloat11(threads=1).encode_tensors([tensor]))
    for size in (999, 700_001):
        pieces = DFloat11(threads=3).encode(lambda size=size: iter(tensor.split(size)), [tuple(tensor.shape)])  # type: ignore[misc]
        assert container.pack(pieces) == whole


def test_streaming_decode_equals_decode() -> None:
    tensor = normal(5_000_000)
    layout = DFloat11(threads=2)
    pieces = list(layout.stream(layout.encode_tensors([tensor])))
    assert len(pieces) > 1 and same_bits(torch.cat(pieces), tensor)


def test_positions_of_64_bits_decode_too() -> None:
    unit = DFloat11().encode_tensors([normal(100_000)])
    wide = dataclasses.replace(unit, output_positions=unit.output_positions.astype(np.uint64))
    assert same_bits(DFloat11().decode(wide)[0], normal(100_000))


def test_other_weights_in_the_second_pass_are_refused_before_they_are_written() -> None:
    passes = iter([np.where(np.arange(1 << 18) < 9, 100, 120) << 7, np.full(1 << 18, 100) << 7])
    with pytest.raises(ValueError, match="second pass"):
        DFloat11(threads=1).encode(lambda: [bits.from_bits(next(passes).astype(np.uint16), (1 << 18,))], [(1 << 18,)])


def test_a_negative_number_of_threads_is_refused() -> None:
    with pytest.raises(ValueError, match="threads=-1"):
        DFloat11(threads=-1)


@pytest.mark.parametrize("shapes", ["[[Infinity]]", "[[1e3]]", "[[10, true]]", f"[[{2**70}, 0]]", f"[[{2**40}, {2**40}]]", "[7]"])
def test_hostile_shapes_with_a_right_checksum_are_named(shapes: str) -> None:
    header = {"format": "dfloat11", "version": container.VERSION, "shapes": json.loads(shapes), "checksum": ""}
    arrays = {"raw": np.zeros(0, np.uint16)}
    header["stored"] = container._checksum(arrays, header)
    with pytest.raises(FormatError):
        container.unpack(safetensors.numpy.save(arrays, {"df11": json.dumps(header)}))
    del header["checksum"]
    with pytest.raises(FormatError):
        container.unpack(safetensors.numpy.save(arrays, {"df11": json.dumps(header)}))


def test_a_stream_that_changes_or_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="holds 10 weights"):
        DFloat11().encode(lambda: [normal(10)], [(3, 3)])
    for second in ([normal(4), normal(6)], [normal(9)], []):
        passes = iter([[normal(10)], second])
        with pytest.raises(ValueError, match="not the same in the second pass"):
            DFloat11().encode(lambda passes=passes: next(passes), [(10,)])  # type: ignore[misc]


def test_sizes_are_counted_by_part() -> None:
    unit = DFloat11().encode_tensors([normal(1 << 20), normal(1 << 20, seed=1)])
    sizes = DFloat11().nbytes(unit)
    assert sizes["sign_mantissa"] == 2 << 20 and sizes["split_positions"] == 8
    assert 10.75 < 8 * sum(sizes.values()) / (2 << 20) < 10.90


def test_gap_packing() -> None:
    gaps = np.random.default_rng(0).integers(0, 32, 512, dtype=np.uint8)
    assert np.array_equal(dfloat11.unpack_gaps(dfloat11.pack_gaps(gaps)), gaps)
    packed = dfloat11.pack_gaps(np.array([0b10001, 0b01110, 0, 0, 0, 0, 0, 31], np.uint8))
    assert packed.tolist() == [0b10001011, 0b10000000, 0, 0, 31]


# Hostile input.


def packed() -> bytes:
    return container.pack(DFloat11().encode_tensors([normal(40_000).reshape(200, 200)]))


def test_every_altered_or_truncated_container_is_named() -> None:
    good = packed()
    rng = np.random.default_rng(0)
    header = 8 + int.from_bytes(good[:8], "little")
    # All of the header's bytes, then places all over.
    for at in [*range(header), *rng.integers(header, len(good), 1200).tolist()]:
        bad = bytearray(good)
        bad[at] ^= 1 << int(rng.integers(8))
        with pytest.raises(FormatError):
            container.unpack(bytes(bad))
    for size in [0, 1, 7, 8, 9, header, *rng.integers(0, len(good), 100).tolist()]:
        with pytest.raises(FormatError):
            container.unpack(good[:size])
    with pytest.raises(FormatError):
        container.unpack(good + b"\0")


def test_altered_arrays_never_give_wrong_bits_silently() -> None:
    """As from a checkpoint without a container: only the checksum of the weights protects them. 1,500 alterations."""
    tensor = normal(40_000)
    layout = DFloat11(threads=1)
    good = layout.encode_tensors([tensor])
    rng = np.random.default_rng(1)
    for name in ("encoded_exponent", "sign_mantissa", "luts", "gaps", "output_positions"):
        for _ in range(300):
            array = getattr(good, name).copy()
            flat = array.reshape(-1).view(np.uint8)
            flat[rng.integers(flat.size)] ^= 1 << int(rng.integers(8))
            try:
                back = layout.decode(dataclasses.replace(good, **{name: array}))
            except FormatError:
                continue
            assert same_bits(back[0], tensor)  # a bit that nothing reads: padding, an unused table entry


@pytest.mark.parametrize("name", ["encoded_exponent", "sign_mantissa", "luts", "gaps", "output_positions"])
def test_random_arrays_end_in_a_named_error(name: str) -> None:
    layout = DFloat11(threads=1)
    good = layout.encode_tensors([normal(40_000)])
    rng = np.random.default_rng(2)
    for size in (0, 1, getattr(good, name).shape[0]):
        shape = (size, *getattr(good, name).shape[1:])
        noise = rng.integers(0, np.iinfo(getattr(good, name).dtype).max, shape, getattr(good, name).dtype, endpoint=True)
        with pytest.raises(FormatError):
            layout.decode(dataclasses.replace(good, **{name: noise}))


@pytest.mark.parametrize(
    ("changed", "block"),
    [
        (lambda unit: {"encoded_exponent": unit.encoded_exponent[:-2]}, 3),
        (lambda unit: {"encoded_exponent": np.append(unit.encoded_exponent, np.zeros(1, np.uint8))}, 3),
        (lambda unit: {"output_positions": unit.output_positions + np.array([0, 1, 0, 0, 0], np.uint32)}, 0),
        (lambda unit: {"output_positions": unit.output_positions - np.array([0, 0, 1, 0, 0], np.uint32)}, 1),
        (lambda unit: {"gaps": unit.gaps ^ (np.arange(unit.gaps.size) == 700).astype(np.uint8)}, 2),
        (lambda unit: {"luts": np.vstack([unit.luts[:-1], unit.luts[-1:] * 0])}, 0),
    ],
    ids=["too short", "too long", "one too many", "one too few", "gap", "no lengths"],
)
def test_the_first_block_that_disagrees_is_named(changed: Callable[[DFloat11Unit], dict[str, np.ndarray]], block: int) -> None:
    unit = dataclasses.replace(DFloat11().encode_tensors([normal(40_000)]), checksum="")
    with pytest.raises(FormatError, match=f"block {block} of 4 does not decode"):
        DFloat11(threads=1).decode(dataclasses.replace(unit, **changed(unit)))


def test_looping_and_empty_tables_end() -> None:
    good = DFloat11().encode_tensors([normal(40_000)])
    for fill, tables in ((255, 2), (0, 2), (239, 2), (240, 17), (255, 0)):
        hostile = np.full((tables + 1, 256), fill, np.uint8)
        hostile[-1] = 0
        with pytest.raises(FormatError):
            DFloat11().decode(dataclasses.replace(good, luts=hostile))


def test_a_huge_claimed_shape_is_refused_before_memory_is_asked_for() -> None:
    good = DFloat11().encode_tensors([normal(100)])
    with pytest.raises(FormatError, match="sign_mantissa"):
        DFloat11().decode(dataclasses.replace(good, shapes=((1 << 50,),)))
