"""The kernels on a GPU against the CPU format: `make gpu-test`."""

import itertools
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from df11 import gpu, memory, nvcomp, ops, released
from df11.formats.dfloat11 import BLOCK_BYTES, DFloat11, DFloat11Unit
from df11.huffman import Code, canonical_codes
from tests.helpers import normal, patterns

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not gpu.is_available(), reason="needs a GPU, pycuda and nvcc")]
FORMAT = DFloat11(threads=2)
SENTINEL = 0x5A5A


def decode(unit: ops.CompressedUnit, kernel: str) -> torch.Tensor:
    """Decoded into the middle of a larger buffer; what lies around must stay."""
    buffer = torch.full((unit.numel + 64,), SENTINEL, dtype=torch.int16, device="cuda")
    unit.decompress(buffer[32 : 32 + unit.numel].view(torch.bfloat16), kernel)
    torch.cuda.synchronize()
    assert (buffer[:32] == SENTINEL).all() and (buffer[32 + unit.numel :] == SENTINEL).all()
    return buffer[32 : 32 + unit.numel].cpu()


def check(weights: torch.Tensor, unit: DFloat11Unit) -> None:
    on_gpu = ops.CompressedUnit.from_unit(unit, "cuda")
    for kernel in gpu.DECODERS:
        assert torch.equal(decode(on_gpu, kernel), weights.view(torch.int16)), kernel


@pytest.mark.parametrize("n", [0, 1, 7, 8, 15, 16, 17, 1000, 4095, 4097, 12345, 100_003, 3_000_001])
def test_sizes(n: int) -> None:
    weights = normal(n, seed=n)
    check(weights, FORMAT.encode_tensors([weights]))


@pytest.mark.parametrize("n", [1, 63, 64, 32767, 32768, 32769, 100_000])
@pytest.mark.parametrize("value", [0.0, -1.5])
def test_one_symbol(n: int, value: float) -> None:
    weights = torch.full((n,), value, dtype=torch.bfloat16)
    check(weights, FORMAT.encode_tensors([weights]))


def test_all_patterns() -> None:
    """Those with an exponent of 240 or more make the unit raw."""
    everything = np.arange(1 << 16)
    below = everything[(everything >> 7 & 0xFF) < 240]
    for values in (below, np.repeat(below, 7), everything):
        check(patterns(values), FORMAT.encode_tensors([patterns(values)]))


def test_many_units_in_one_call() -> None:
    """More than a launch takes, of all sizes, empty and raw ones among them, each between words that must stay."""
    sizes = [0, 1, 100, 5000, 33_000, 700_001, *range(1000, 1040), 3]
    weights = [normal(n, seed=n) for n in sizes]
    weights[-1][0] = float("nan")
    units = [ops.CompressedUnit.from_unit(FORMAT.encode_tensors([w]), "cuda") for w in weights]
    for kernel in gpu.DECODERS:
        buffers = [torch.full((n + 64,), SENTINEL, dtype=torch.int16, device="cuda") for n in sizes]
        out = [b[32 : 32 + n].view(torch.bfloat16) for b, n in zip(buffers, sizes, strict=True)]
        ops.decompress(units, out, kernel)
        for w, o, b, n in zip(weights, out, buffers, sizes, strict=True):
            assert torch.equal(o.view(torch.int16).cpu(), w.view(torch.int16))
            assert (b[:32] == SENTINEL).all() and (b[32 + n :] == SENTINEL).all()


def fibonacci_code(longest: int) -> Code:
    """Lengths 1, 2, ... longest, longest."""
    lengths = np.zeros(256, np.uint8)
    lengths[100 : 100 + longest] = np.arange(1, longest + 1)
    lengths[100 + longest] = longest
    return Code(lengths, canonical_codes(lengths))


@pytest.mark.parametrize("longest", [2, 8, 11, 12, 16, 24, 31, 32])
@pytest.mark.parametrize("odds", ["even", "short", "long"])
def test_adversarial_code_lengths(longest: int, odds: str) -> None:
    """All lengths as often, mostly the shortest (many codes a chunk), mostly the longest (two a chunk)."""
    generator = np.random.default_rng(longest)
    chosen = generator.integers(0, longest + 1, 70_001)
    if odds != "even":
        chosen = np.where(generator.random(chosen.size) < 0.97, 0 if odds == "short" else longest, chosen)
    weights = patterns((100 + chosen) << 7 | generator.integers(0, 128, chosen.size) | generator.integers(0, 2, chosen.size) << 15)
    check(weights, FORMAT.encode_tensors([weights], fibonacci_code(longest)))


@pytest.mark.parametrize("std", [1e-30, 1e-3, 1.0, 1e30])
@pytest.mark.parametrize("symbols", [2, 3, 5, 17, 200])
def test_distributions(std: float, symbols: int) -> None:
    generator = np.random.default_rng(symbols)
    exponents = np.sort(generator.choice(240, symbols, replace=False))
    p = generator.dirichlet(np.full(symbols, 0.3))
    n = 50_021
    flat = patterns(generator.choice(exponents, n, p=p) << 7 | generator.integers(0, 128, n))
    for weights in (flat, normal(n, std=std)):
        check(weights, FORMAT.encode_tensors([weights]))


@pytest.mark.parametrize("n", [1, 2, 100, 4095, 4096, 4097, 77_777, 1_234_567])
def test_the_encoder_gives_the_same_bytes(n: int) -> None:
    for weights in (normal(n, seed=n), torch.full((n,), 0.5, dtype=torch.bfloat16), patterns(np.arange(n) * 37 % 30720)):
        on_cpu, on_gpu = FORMAT.encode_tensors([weights]), ops.encode([weights.cuda()]).to_unit()
        for name, array in on_cpu.arrays.items():
            assert np.array_equal(array, on_gpu.arrays[name]), name


def test_the_encoder_takes_unaligned_and_several_tensors() -> None:
    weights = normal(10_007).cuda()
    parts = [weights[1:4000].view(-1, 31), weights[4001:]]
    unit = ops.encode(parts)
    expected = FORMAT.encode_tensors([p.cpu() for p in parts])
    assert unit.shapes == expected.shapes
    assert np.array_equal(unit.encoded_exponent.cpu().numpy(), expected.encoded_exponent)


def test_the_encoder_keeps_what_has_no_code() -> None:
    weights = torch.tensor([1.0, float("nan"), float("-inf"), 2.0**120], dtype=torch.bfloat16)
    unit = ops.encode([weights.cuda()])
    assert unit.raw is not None
    assert torch.equal(decode(unit, "fast"), weights.view(torch.int16))


def test_past_two_to_the_31_weights() -> None:
    n = (1 << 31) + 12_345
    if torch.cuda.mem_get_info()[0] < 12 * n:
        pytest.skip("needs 26 GB of GPU memory")
    weights = torch.empty(n, dtype=torch.bfloat16, device="cuda")
    for part in weights.split(1 << 28):
        part.copy_(torch.randn(part.numel(), device="cuda").mul_(0.02))
    unit = ops.encode([weights])
    for kernel in gpu.DECODERS:
        out = torch.zeros_like(weights)
        unit.decompress(out, kernel)
        assert all(
            torch.equal(a.view(torch.int16), b.view(torch.int16))
            for a, b in zip(out.split(1 << 28), weights.split(1 << 28), strict=True)
        )


def test_unsound_arrays_stay_within_their_bounds() -> None:
    """Random bytes of the right sizes: any weights may come out, but launches succeed and nothing around is written."""
    generator = torch.Generator("cuda").manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randint(0, 256, shape, dtype=torch.uint8, device="cuda", generator=generator)

    for size, n in ((1, 3), (4096, 12_000), (4097, 40_000), (100_000, 200_000)):
        for tables in (1, 4, 17):
            blocks = -(-size // BLOCK_BYTES)
            luts = noise(tables + 1, 256)
            positions = torch.randint(
                -(1 << 31), (1 << 31) - 1, (blocks + 1,), dtype=torch.int32, device="cuda", generator=generator
            )
            for at in (positions, (torch.arange(blocks + 1, device="cuda") * n // blocks).int()):
                arrays = {"encoded_exponent": noise(size), "sign_mantissa": noise(n), "luts": luts, "gaps": noise(320 * blocks)}
                unit = ops.CompressedUnit.make(((n,),), arrays | {"output_positions": at}, "cuda")
                for kernel in gpu.DECODERS:
                    decode(unit, kernel)


@pytest.mark.skipif(not released.is_installed(), reason="needs the released package")
@pytest.mark.parametrize("n", [1000, 100_003])
def test_the_released_kernel_reads_our_streams(n: int) -> None:
    weights = normal(n).cuda()
    unit = ops.encode([weights])
    out = torch.zeros_like(weights)
    released.decoder(unit)(out)
    assert torch.equal(out.view(torch.int16), weights.view(torch.int16))


@pytest.fixture
def sample() -> tuple[torch.Tensor, ops.CompressedUnit]:
    weights = normal(1_000_001).cuda()
    return weights, ops.encode([weights])


def test_streams_wait_for_each_other(sample: tuple[torch.Tensor, ops.CompressedUnit]) -> None:
    weights, unit = sample
    for stream in (torch.cuda.Stream(), torch.cuda.Stream()):
        with torch.cuda.stream(stream):
            big = torch.randn(4000, 4000, device="cuda")
            late = torch.empty_like(weights)
            for _ in range(5):
                big = big @ big.T / 4000  # keeps the stream busy
            late.fill_(float("nan"))
            unit.decompress(late)  # must come after the fill and before the copy
            copy = late.clone()
        stream.synchronize()
        assert torch.equal(copy.view(torch.int16), weights.view(torch.int16))


def test_graph_capture(sample: tuple[torch.Tensor, ops.CompressedUnit]) -> None:
    weights, unit = sample
    out, total = torch.zeros_like(weights), torch.zeros((), device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        unit.decompress(out)  # loads the kernel, sets up the stream
    stream.synchronize()
    out.zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        unit.decompress(out)
        total.copy_(out.float().abs().sum())
    assert not out.any()
    for _ in range(2):
        out.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out.view(torch.int16), weights.view(torch.int16))
        assert total == weights.float().abs().sum()


def test_nothing_is_allocated(sample: tuple[torch.Tensor, ops.CompressedUnit]) -> None:
    weights, unit = sample
    out = torch.empty_like(weights)
    unit.decompress(out)
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    for kernel in gpu.DECODERS:
        unit.decompress(out, kernel)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


def test_opcheck(sample: tuple[torch.Tensor, ops.CompressedUnit]) -> None:
    weights, unit = sample
    torch.library.opcheck(torch.ops.df11.decompress.default, arguments(unit, torch.empty_like(weights)))


def test_torch_compile_keeps_the_operator(sample: tuple[torch.Tensor, ops.CompressedUnit]) -> None:
    weights, unit = sample
    out = torch.zeros_like(weights)
    doubled = torch.compile(lambda: unit.decompress(out) * 2, fullgraph=True)()
    assert torch.equal(doubled, weights * 2)


def arguments(unit: ops.CompressedUnit, out: torch.Tensor) -> list[list[torch.Tensor]]:
    return [*([getattr(unit, name)] for name in ops.ARRAYS), [out]]


WRONG: dict[str, tuple[int, Callable[[torch.Tensor], torch.Tensor]]] = {
    "out: dtype torch.float16": (6, lambda t: t.half()),
    "out must be contiguous": (6, lambda t: torch.empty(2 * t.numel(), dtype=t.dtype, device=t.device)[::2]),
    "out must start at a multiple of 16": (6, lambda t: torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)[1:]),
    "sign_mantissa: 999993 entries": (1, lambda t: t[:-8]),
    "encoded_exponent must start": (0, lambda t: torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)[1:]),
    "gaps is on cpu": (3, lambda t: t.cpu()),
    "gaps: 1 entries": (3, lambda t: t[:1]),
    "luts: shape": (2, lambda t: t.view(-1)),
    "output_positions: dtype": (4, lambda t: t.long()),
    "output_positions: 2 entries": (4, lambda t: t[:2]),
    "table: 5 entries": (5, lambda t: t[:5]),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments_are_named(sample: tuple[torch.Tensor, ops.CompressedUnit], message: str) -> None:
    weights, unit = sample
    given = arguments(unit, torch.empty_like(weights))
    position, change = WRONG[message]
    given[position] = [change(given[position][0])]
    with pytest.raises(ValueError, match=message):
        gpu.decompress(*given)
    with pytest.raises(ValueError, match="no decoder 'slow'"):
        gpu.decompress(*arguments(unit, torch.empty_like(weights)), decoder="slow")


def test_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DF11_CACHE", str(tmp_path))
    arch = gpu.device(0).arch
    first = gpu.build("decode_fast", arch)
    made = first.stat().st_mtime_ns
    assert gpu.build("decode_fast", arch) == first and first.stat().st_mtime_ns == made


@pytest.mark.skipif(not nvcomp.is_installed(), reason="needs nvidia-libnvcomp-cu13")
@pytest.mark.parametrize("n", [1000, 1_000_001])
def test_nvcomp_gives_the_bits_back(n: int) -> None:
    weights = normal(n).cuda()
    for data in (weights, (weights.view(torch.int16) >> 7).to(torch.uint8)):
        batch = nvcomp.AnsBatch.compress(data)
        out = torch.zeros_like(data)
        batch.decompress(out)
        batch.check()
        assert torch.equal(out.view(torch.uint8), data.view(torch.uint8))
        assert n < 10_000 or batch.nbytes < 0.9 * data.nbytes


@pytest.mark.parametrize("parts", [1, 2, 5])
@pytest.mark.parametrize("n", [8, 40, 4096, 50_000])
def test_units_with_one_code_are_those_of_the_cpu(n: int, parts: int) -> None:
    weights = normal(n * parts, std=0.5)
    arrays, sizes = ops.encode_parts(weights.cuda(), parts)
    expected, expected_sizes = ops.encode_parts(weights, parts)
    assert sizes == expected_sizes and arrays.keys() == expected.keys()
    assert all(torch.equal(array.cpu(), expected[name]) for name, array in arrays.items())


@pytest.mark.parametrize("stage", [1 << 10, 1 << 16, memory.STAGE])
def test_ranges_of_a_file_come_to_the_gpu(tmp_path: Path, stage: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Empty ones, ones that do not follow one another, and ones larger than the page-locked memory."""
    monkeypatch.setattr(memory, "STAGE", stage)
    monkeypatch.setattr(memory, "_staging", threading.local())
    data = np.random.default_rng(0).integers(0, 256, 200_000, np.uint8)
    (tmp_path / "file").write_bytes(data.tobytes())
    edges = [0, 3, 3, 1000, 1007, 50_000, 50_300, 199_999]
    ranges = [*itertools.pairwise(edges), (10, 20), (100_000, 200_000), *((i, i + 1) for i in range(600))]
    found = memory.read_to_gpu(tmp_path / "file", ranges, torch.device("cuda"))
    assert all(np.array_equal(array.cpu().numpy(), data[a:b]) for array, (a, b) in zip(found, ranges, strict=True))
    assert all(array.data_ptr() % memory.ALIGNMENT == 0 for array in found if array.numel())
    with pytest.raises(OSError, match="the file ends"):
        memory.read_to_gpu(tmp_path / "file", [(199_000, 201_000)], torch.device("cuda"))
