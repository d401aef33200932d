"""How products of the tiled layout would be launched, and which way is chosen: without a GPU."""

import ctypes
import itertools
import json
import math
import re
import shutil
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

from df11 import dispatch, driver, gpu, tiled_gpu
from df11.formats.tiled import tile_fragments
from df11.tiled_ops import TiledWeight
from tests import sanitize

ROOM = {"H100": (132, 196_608), "A100": (108, 131_000), "small": (20, 64_000)}  # multiprocessors, shared memory for codes and x
SHAPES = [
    (28672, 4096),
    (4096, 14336),
    (128256, 4096),
    (1024, 8192),
    (400, 128),
    (333, 576),
    (100, 53248),
    (3840, 15360),
    (7, 5376),
]


@pytest.mark.parametrize("gpu", ROOM)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_plans_fit_and_leave_nothing_out(gpu: str, shape: tuple[int, int]) -> None:
    (rows, columns), (processors, room) = shape, ROOM[gpu]
    f = tile_fragments(columns)
    across, down = -(-columns // (16 * f)), -(-rows // 16)
    for batch in (2, 8, 9, 16, 17, 32, 33, 64, 65, 128):
        kernel_rows = min(size for size in tiled_gpu.WIDE if size >= batch)
        kernel = tiled_gpu.WIDE[kernel_rows]
        wide = tiled_gpu.plan_wide(rows, columns, f, batch, processors, room)
        # Of a warp: low bytes and signs on their way, and codes.
        each = kernel.chunks * 1152 + kernel.buffers * tiled_gpu.code_bytes(f)
        assert (wide is None) == (kernel.slots * 128 * kernel_rows + 4 * each > room)
        if wide:
            assert batch <= wide.kernel_rows and wide.warps in range(4, 4 * kernel.warpgroups + 1, 4) and 1 <= wide.splits <= across
            assert wide.blocks <= processors and wide.kernel_rows == kernel_rows
            shared = wide.shared + wide.warps * tiled_gpu.code_bytes(f)
            assert shared == kernel.slots * 128 * kernel_rows + wide.warps * each <= room
            work = Counter(tile for block in range(wide.blocks) for tile in tiles_of(wide, block, -(-down // 4), across))
            assert work == Counter(itertools.product(range(-(-down // 4)), range(across)))
        if gpu == "small" or batch > tiled_gpu.MOST_ROWS:
            continue
        plan = tiled_gpu.plan_rows(rows, columns, f, batch, processors, room)
        assert batch <= plan.kernel_rows and 1 <= plan.groups <= plan.warps <= tiled_gpu.PRODUCTS[plan.kernel_rows][0]
        assert plan.blocks <= processors and plan.blocks % plan.splits == 0 and plan.blocks // plan.splits <= down
        assert 1 <= plan.splits <= across and 1 <= plan.slice <= across
        x, parts = 32 * f * plan.kernel_rows * plan.slice, 64 * plan.kernel_rows * plan.warps * (plan.groups > 1)
        assert plan.parts_at in (0, x) and max(x, plan.parts_at + parts) <= plan.shared
        assert plan.warps * tiled_gpu.code_bytes(f) + plan.shared <= room


def tiles_of(plan: tiled_gpu.WidePlan, block: int, fours: int, across: int) -> Iterator[tuple[int, int]]:
    """What a thread block of tiled_wide_... has, as the kernel divides it: fours of rows of tiles, columns of tiles."""
    split, block, blocks = block % plan.splits, block // plan.splits, plan.blocks // plan.splits
    left, right = (across * end // plan.splits for end in (split, split + 1))
    if not plan.whole:
        yield from itertools.product(range(fours * block // blocks, fours * (block + 1) // blocks), range(left, right))
        return
    assert plan.splits == 1
    yield from itertools.product(range(plan.whole * block, plan.whole * (block + 1)), range(left, right))
    dealt, piece = plan.whole * blocks + block // plan.pieces, block % plan.pieces
    if dealt < fours:
        yield from itertools.product([dealt], range(across * piece // plan.pieces, across * (piece + 1) // plan.pieces))


def test_constants_of_the_kernels() -> None:
    sources = "".join((gpu.SOURCES / name).read_text() for name in ("tiled.cuh", "tiled.cu", "tiled_wgmma.cu"))
    constants = {name: int(value) for name, value in re.findall(r"\b(k[A-Z]\w+) = (\d+)[;,]", sources)}
    assert "kLow = 2 * kLanes * 16, kSigns = kLanes * 4;" in sources
    low, signs = 2 * constants["kLanes"] * 16, 4 * constants["kLanes"]
    assert low + signs == tiled_gpu.CHUNK_BYTES
    by_rows = {
        name: tuple(map(int, values)) for name, *values in re.findall(r"\b(k\w+) = kRows > (\d+) \? (\d+) : (\d+);", sources)
    }
    for rows, (slots, chunks, buffers, groups, *_) in tiled_gpu.WIDE.items():
        found = {name: many if rows > least else few for name, (least, many, few) in by_rows.items()}
        warps = groups * tiled_gpu.WARPGROUP
        assert found == {"kSlots": slots, "kChunks": chunks, "kBuffers": buffers, "kWideWarps": warps}
        assert slots <= constants["kMostSlots"] and warps <= constants["kMostWideWarps"]
    assert constants["kMostSplits"] == tiled_gpu.MOST_SPLITS and constants["kMostWarps"] == tiled_gpu.MOST_WARPS
    assert constants["kProductWarps"] == tiled_gpu.PRODUCT_WARPS
    assert dispatch.MOST_PRODUCTS * max(tiled_gpu.WIDE) in dispatch.BUCKETS
    for name, sizes in {"PRODUCTS": tiled_gpu.PRODUCTS, "WIDE": tiled_gpu.WIDE}.items():
        assert [int(size) for size in re.findall(rf"^TILED_{name}\((\d+)", sources, re.M)] == list(sizes)


def test_what_sanitizers_run_fits() -> None:
    for f, (rows, warps) in itertools.product([tile_fragments(columns) for _, columns in sanitize.SHAPES], sanitize.PIECES):
        assert tiled_gpu.WIDE[rows].shared(rows, warps, f) + warps * tiled_gpu.code_bytes(f) <= ROOM["H100"][1], (f, rows, warps)


def test_an_entry_of_the_cache_for_each_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(gpu.SOURCES, tmp_path / "kernels")
    monkeypatch.setattr(gpu, "SOURCES", tmp_path / "kernels")
    before = gpu.digest("tiled", "sm_90")
    (tmp_path / "kernels" / "tiled_wgmma.cu").write_text("// another")
    assert gpu.digest("tiled", "sm_90") != before


def test_x_that_fits_nowhere() -> None:
    with pytest.raises(ValueError, match="mode=exact"):
        tiled_gpu.plan(64, 200_000, 32, 132, 197_000, 35_000)
    with pytest.raises(ValueError, match="mode=exact"):
        tiled_gpu.plan_rows(64, 4096, 32, 64, 132, 50_000)


@pytest.mark.parametrize("shape", [*SHAPES, (6144, 4096), (5120, 5120), (8192, 3840), (7168, 5120), (16384, 53248)], ids=str)
@pytest.mark.parametrize(
    ("capability", "processors", "room"), [(80, 108, 164), (86, 84, 100), (89, 128, 100), (90, 132, 228), (120, 170, 100)]
)
def test_plans_of_one_row_fit(shape: tuple[int, int], capability: int, processors: int, room: int) -> None:
    """Of so many KB of shared memory a multiprocessor has, the system keeps one of each thread block."""
    (rows, columns), f, fixed = shape, tile_fragments(shape[1]), 35_328
    x, most = 32 * f * -(-columns // (16 * f)), 1024 * (room - 1)
    try:
        blocks, warps = tiled_gpu.plan(rows, columns, f, processors, most - fixed, fixed)
    except ValueError:
        assert fixed + x + tiled_gpu.code_bytes(f) > most
        return
    block = fixed + x + warps * tiled_gpu.code_bytes(f)
    assert warps >= 1 and block <= most and 1 <= blocks <= min(2 * processors, -(-rows // 16))
    if blocks > processors:
        assert 2 * (block + 1024) <= 1024 * room and 2 * warps <= tiled_gpu.PRODUCT_WARPS


def test_few_warps_where_x_takes_the_room() -> None:
    assert tiled_gpu.plan(28672, 4096, 32, 132, 197_000, 35_000) == (264, tiled_gpu.PRODUCT_WARPS // 2)
    assert tiled_gpu.plan(6144, 4096, 32, 132, 197_000, 35_000) == (132, tiled_gpu.PRODUCT_WARPS)  # one round, not two
    assert tiled_gpu.plan(64, 90_000, 32, 132, 197_000, 35_000) == (4, (197_000 - 2 * 512 * 176) // tiled_gpu.code_bytes(32))


class Launched(NamedTuple):
    step: tiled_gpu.Step
    given: tuple[int | bytes, ...]


class Recorder:
    """Stands for the kernels of a GPU: keeps what would be launched."""

    overlap, wide, room = True, False, 197_000
    device = SimpleNamespace(processors=132, index=-1)
    fixed_shared = 35_000
    lock = threading.Lock()

    def __init__(self) -> None:
        self.launched: list[Launched] = []

    def prepare(self, step: tiled_gpu.Step) -> Callable[..., int]:
        def launch(stream: int, *given: int | bytes) -> int:
            self.launched.append(Launched(step, given))
            struct.pack("=" + "".join(step.arguments), *given)  # they fit
            return 0

        return launch

    over_tiles = tiled_gpu._Kernels.over_tiles

    def run(self, enqueue: Callable[..., int], *arguments: Any) -> None:
        assert enqueue(7, *arguments) == 0


def forget() -> None:
    for prepared in (tiled_gpu.prepared, tiled_gpu._decompression, tiled_gpu._gathering):
        prepared.cache_clear()


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    made = Recorder()
    monkeypatch.setattr(tiled_gpu, "_kernels", lambda index: made)
    forget()
    yield made
    forget()


def test_what_would_be_launched(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = TiledWeight.encode((torch.randn(80, 8192, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16())
    assert weight is not None
    place = weight.arrays, weight.uppers, 80, 8192
    bias = torch.zeros(80).bfloat16()

    def product(batch: int, wgmma: bool = True) -> list[Launched]:
        recorder.launched.clear()
        tiled_gpu.linear(torch.randn(batch, 8192).bfloat16(), *place, bias, wgmma)
        return list(recorder.launched)

    for batch in (1, 16, 64):
        recorder.launched.clear()
        x = torch.randn(1, batch, 8192).bfloat16()
        y = tiled_gpu.linear(x, *place, bias)
        (name, _, threads, shared, _), (matrix, *others) = recorder.launched[0]
        assert name == ("tiled_product" if batch == 1 else f"tiled_products_{batch}")
        assert shared > 35_000 + threads // 32 * tiled_gpu.code_bytes(32) and y.shape == (1, batch, 80)
        pointers = [array.data_ptr() for array in weight.arrays]
        assert tiled_gpu.MATRIX.unpack(matrix) == (*pointers, weight.uppers, 80, 8192, 32)  # type: ignore[arg-type]
        assert others[:3] == [x.data_ptr(), bias.data_ptr(), y.data_ptr()]
        if batch > 1:
            partial, asked, splits, *_ = others[3:]
            assert asked == batch and splits > 1 and recorder.launched[1].step.name == "tiled_add_up"  # type: ignore[operator]
            assert recorder.launched[1].given[:3] == (partial, bias.data_ptr(), y.data_ptr())
    recorder.wide = True  # as on compute capability 9.0
    forget()
    for batch, size in {8: 0, 9: 16, 16: 16, 17: 32, 65: 128, 128: 128, 33: 64, 64: 64}.items():
        wide = [f"tiled_pack_{size}", f"tiled_wide_{size}", "tiled_add_up"]
        assert [step.name for step, _ in product(batch)] == (wide if size else ["tiled_products_8", "tiled_add_up"])
    (packing, (_, packed, turned, *sizes)), (step, (_, _, _, _, *spread)), (_, added) = recorder.launched
    assert packing.blocks * packing.threads >= 64 * 512 and sizes == [64, 8192, 512]
    how = tiled_gpu.plan_wide(80, 8192, 32, 64, 132, recorder.room)
    assert how and step[1:4] == (how.blocks, 32 * how.warps, 35_000 + how.warps * tiled_gpu.code_bytes(32) + how.shared)
    assert [packed, turned] == spread[:2]
    packed, turned, partial, asked, splits, whole, pieces = map(int, spread)
    assert asked == 64 and splits == how.splits > 1 and turned - packed == partial - turned == 64 * 8192 * 2
    assert (whole, pieces) == (0, 0) and added[3:] == (80, 64, splits, 0) and added[0] == partial
    assert tiled_gpu.prepared(-1, 80, 8192, 32, 64, True).memory == partial - packed + 4 * splits * 64 * 80
    with monkeypatch.context() as patched:
        patched.setattr(tiled_gpu, "plan_wide", lambda *arguments: tiled_gpu.WidePlan(64, 1, 16, 1, 1, 4, 1000))
        forget()
        _, (_, wide_given), (step, added) = product(64)  # rows from 64 on are dealt in four pieces
        assert wide_given[-4:] == (64, 1, 1, 4) and added[3:] == (80, 64, 4, 64) and step.blocks * step.threads >= 16 * 64
    forget()
    assert product(16, wgmma=False)[0].step.name == "tiled_products_16"
    with pytest.raises(ValueError, match="1 to 64 rows"):
        product(65, wgmma=False)
    recorder.room = 50_000  # less than the rings of 16 rows take, but enough for a tile of x
    forget()
    assert product(16)[0].step.name == "tiled_products_16"
    with pytest.raises(ValueError, match="65 rows of x do not fit"):
        product(65)
    out = torch.empty(80, 8192).bfloat16()
    tiled_gpu.decompress(weight.packed, out)
    assert recorder.launched[-1].step.name == "tiled_decompress" and recorder.launched[-1].given[-1] == out.data_ptr()
    ids = torch.tensor([[3], [1]])
    assert tiled_gpu.gather(ids, weight.packed).shape == (2, 1, 8192) and recorder.launched[-1].step[:2] == ("tiled_rows", 2)
    count = len(recorder.launched)
    assert tiled_gpu.gather(ids[:0], weight.packed).shape == (0, 1, 8192) and len(recorder.launched) == count


def test_plans_are_made_once(recorder: Recorder) -> None:
    """For a shape and a number of rows of x; another matrix of the shape is launched by the same."""
    first, second = (TiledWeight.encode((torch.randn(80, 512) * 0.02).bfloat16()) for _ in range(2))
    assert first is not None and second is not None
    for weight in (first, second, first):
        weight.packed, tiled_gpu.product(torch.randn(1, 512).bfloat16(), weight.packed)
    assert tiled_gpu.prepared.cache_info().misses == 1
    assert [launched.given[0] for launched in recorder.launched] == [w.packed.matrix for w in (first, second, first)]


def test_launches_where_no_context_is_current(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a new thread there is none: it is set, and the launch tried again; other codes are errors."""
    kernels, codes, entered = tiled_gpu._Kernels.__new__(tiled_gpu._Kernels), [driver.NO_CONTEXT, 0, 0, 7], []

    class Device:
        index = 0

        @contextmanager
        def current(self) -> Iterator[None]:
            entered.append(True)
            yield

    def launch(stream: int, given: int) -> int:
        assert (stream, given) == (7, 1)
        return codes.pop(0)

    kernels.device, kernels.lock = Device(), threading.Lock()  # type: ignore[assignment]
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 7, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)
    monkeypatch.setattr(driver, "_library", SimpleNamespace)
    kernels.run(launch, 1)
    assert len(entered) == 1 and codes == [0, 7]
    kernels.run(launch, 1)
    assert len(entered) == 1
    with pytest.raises(AttributeError, match="cuGetErrorString"):
        kernels.run(launch, 1)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 1)  # another GPU is the current one
    codes[:] = [0]
    kernels.run(launch, 1)
    assert len(entered) == 2 and not kernels.lock.locked()


def test_what_the_driver_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    def take(config: Any, function: ctypes.c_void_p, pointers: Any, more: None) -> int:
        sizes = (80, 8, 8, 12)
        given = [ctypes.string_at(pointer, size) for pointer, size in zip(pointers, sizes, strict=True)]
        shape = (*config[0].grid, *config[0].block, config[0].shared, config[0].stream, config[0].count)
        seen.append((function.value, shape, config[0].attributes[0].id, given))
        return code

    seen: list[tuple[Any, ...]] = []
    monkeypatch.setattr(driver, "_library", lambda: SimpleNamespace(cuLaunchKernelEx=take, cuGetErrorString=lambda *given: 0))
    matrix, sizes, code = bytes(range(80)), bytes(range(12)), 0
    for overlap in (True, False):
        launch = driver.Launch(ctypes.c_void_p(7), 132, 768, 4096, ("80s", "Q", "Q", "12s"), overlap)
        for stream, address in ((2**40, 2**63 + 1), (0, 5), (2**40, 6)):
            assert launch(stream, matrix, address, 0, sizes) == 0
            expected = [matrix, address.to_bytes(8, "little"), bytes(8), sizes]
            assert seen.pop() == (7, (132, 1, 1, 768, 1, 1, 4096, stream or None, int(overlap)), 6, expected)
    code = 1
    with pytest.raises(driver.DriverError, match=r"cuLaunchKernelEx: unknown error \(1\)"):
        driver.check(launch(0, matrix, 1, 0, sizes))


def test_what_does_not_fit_is_not_launched(recorder: Recorder) -> None:
    weight = TiledWeight.encode((torch.randn(80, 1002, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16())
    assert weight is not None
    x, place = torch.zeros(1, 1002).bfloat16(), (weight.arrays, weight.uppers, 80, 1002)
    wrong: dict[str, Callable[[], object]] = {
        "x: torch.float32": lambda: tiled_gpu.linear(x.float(), *place),
        "of 1 to 64 rows": lambda: tiled_gpu.linear(x.expand(65, -1), *place),
        "not in fours": lambda: tiled_gpu.linear(x.expand(2, -1), *place),
        "bias: ": lambda: tiled_gpu.linear(x, *place, torch.zeros(80)),
        "low: torch.int8": lambda: tiled_gpu.linear(x, [weight.low.view(torch.int8), *weight.arrays[1:]], *place[1:]),
        "low must start": lambda: tiled_gpu.linear(x, [shifted(weight.low), *weight.arrays[1:]], *place[1:]),
        "a matrix of 96 x 1002": lambda: tiled_gpu.linear(x, weight.arrays, weight.uppers, 96, 1002),
        "out: torch.float32": lambda: tiled_gpu.decompress(weight.packed, torch.empty(80, 1002)),
        "ids: torch.int32": lambda: tiled_gpu.gather(torch.zeros(1, dtype=torch.int32), weight.packed),
    }
    for message, call in wrong.items():
        with pytest.raises(ValueError, match=message):
            call()
    assert not recorder.launched


def shifted(array: torch.Tensor) -> torch.Tensor:
    """A copy that starts one byte after a multiple of 16."""
    memory = torch.empty(array.nbytes + 32, dtype=torch.uint8)
    start = -memory.data_ptr() % 16 + 1
    return memory[start : start + array.nbytes].view(array.shape).copy_(array)


def test_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = (torch.randn(256, 512, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    weight = TiledWeight.encode(weights)
    assert weight is not None
    for rows in (1, 3, 70):
        x = torch.randn(rows, 512).bfloat16()
        y, expected = dispatch.linear(weight, x), torch.nn.functional.linear(x, weights)
        assert torch.equal(y, expected) if rows > 1 else (y.float() - expected.float()).norm() < 0.01 * expected.float().norm()
    assert dispatch.linear(weight, torch.empty(0, 512).bfloat16()).shape == (0, 256)
    x = torch.randn(2, 65, 512).bfloat16()
    for given in (None, torch.randn(256).bfloat16()):
        parts = [weight.linear(part, given) for part in x.flatten(0, 1).split((64, 64, 2))]
        assert torch.equal(dispatch.fused(weight, x, given).flatten(0, 1), torch.cat(parts))

    # In slices, the last one smaller, of which none begins a tile's bytes at 0.
    bias = torch.randn(200).bfloat16()
    part, x = TiledWeight.encode(weights[:200].contiguous()), torch.randn(2, 3, 512).bfloat16()
    assert part is not None
    for rows in (16, 48, 64):
        for given in (None, bias):
            y = dispatch.sliced(part, x, given, rows)
            assert torch.allclose(y, torch.nn.functional.linear(x, weights[:200], given), atol=0.02)
    assert torch.equal(part.part(48, 200).decompress(), weights[48:200])

    # A table as it would be for a GPU.
    ways: dispatch.Ways = {"fused": lambda weight: torch.zeros(1), "decompress": lambda weight: torch.zeros(2)}
    monkeypatch.setattr(tiled_gpu, "has_both", lambda batch, index: False)
    monkeypatch.setattr(tiled_gpu, "most_rows", lambda index: 64)
    monkeypatch.setenv("DF11_DISPATCH", str(tmp_path / "deep" / "table.json"))
    monkeypatch.setattr(dispatch, "_seconds", lambda way, weight, device: float(way(weight).numel()))
    monkeypatch.setattr(tiled_gpu, "fits", lambda *arguments: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    dispatch._table.cache_clear()
    assert dispatch.choose(weight, OnGpu(9), ways) == "fused"  # type: ignore[arg-type]
    table = json.loads((tmp_path / "deep" / "table.json").read_text())
    assert table == {"256 x 512, 16": {"fused": 1.0, "decompress": 2.0}}
    (tmp_path / "deep" / "table.json").write_text(json.dumps({"256 x 512, 16": {"fused": 3.0, "decompress": 2.0}}))
    dispatch._table.cache_clear()
    assert dispatch.choose(weight, OnGpu(9), ways) == "decompress"  # type: ignore[arg-type]
    (tmp_path / "deep" / "table.json").unlink()
    dispatch._table.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert dispatch.choose(weight, OnGpu(9), ways) == "fused"  # type: ignore[arg-type]
    dispatch._table.cache_clear()


class OnGpu:
    """x, as choose looks at it."""

    is_cuda, device = True, torch.device("cuda", 0)

    def __init__(self, rows: int, columns: int = 512) -> None:
        self.shape = (rows, columns)

    def numel(self) -> int:
        return math.prod(self.shape)


@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize("rows", [1, 8, 9, 16, 17, 64, 65, 128, 129, 150, 256, 257, 600, 5000])
def test_ways_by_rows_of_x(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int, wide: bool) -> None:
    weight, asked, both = SimpleNamespace(shape=(256, 512), fragments=32), [], wide and 9 <= rows <= 16
    most = 128 if wide else 64
    monkeypatch.setenv("DF11_DISPATCH", str(tmp_path / "table.json"))
    monkeypatch.setattr(dispatch, "_seconds", lambda way, weight, device: way(weight))
    monkeypatch.setattr(tiled_gpu, "fits", lambda *arguments, wgmma=True: asked.append((*arguments, wgmma)) or True)
    monkeypatch.setattr(tiled_gpu, "_kernels", lambda index: SimpleNamespace(wide=wide))
    times = {"fused": 1.0, "mma": 0.5, "sliced": 2.0, "decompress": 3.0}
    ways = {name: lambda weight, seconds=seconds: seconds for name, seconds in times.items()}
    for capturing in (True, False):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda now=capturing: now)
        chosen = dispatch.choose(weight, OnGpu(rows), ways)  # type: ignore[arg-type]
        fused = "mma" if both and not capturing else "fused"
        assert chosen == (fused if rows <= most * (1 if capturing else 2) else "decompress")
    products = [(256, 512, 32, size, 0) for size in ((rows,) if rows <= most else (most, 1))]
    fits = [(*product, True) for product in products]
    assert asked == ([*fits, *fits, *[(*products[0], False)] * both] if rows <= 2 * most else [])
    ((key, times),) = json.loads((tmp_path / "table.json").read_text()).items()
    sizes = {9: 16, 17: 32, 65: 72, 129: 144, 150: 160, 257: 512, 600: 2048, 5000: 2048}  # others are their own
    assert key == f"256 x 512, {sizes.get(rows, rows)}"
    assert set(times) == {"decompress", *["fused"] * (rows <= 2 * most), *["mma"] * both, *["sliced"] * (rows <= 128)}
    monkeypatch.setattr(dispatch, "_default_file", lambda index: "not asked")
    assert dispatch.times((256, 512), rows, 0) == times and dispatch.times((512, 256), rows, 0) == {}


def test_a_table_of_several_processes(tmp_path: Path) -> None:
    file = tmp_path / "table.json"
    table = dispatch._table(str(file))
    table |= {"a": {"fused": 1.0}, "too large to measure": {"fused": dispatch.NOT_MEASURED}}
    file.write_text('{"b": {"fused": 2.0}}')  # another process's
    dispatch._save(str(file))
    assert json.loads(file.read_text()) == {"a": {"fused": 1.0}, "b": {"fused": 2.0}}
    (tmp_path / "damaged.json").write_text("{")
    with pytest.raises(ValueError, match=r"damaged\.json.*remove it"):
        dispatch._table(str(tmp_path / "damaged.json"))


def test_more_rows_than_a_product_takes_where_one_has_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """65 rows are 64 and one, whose x has to fit into shared memory whole."""
    weight = SimpleNamespace(shape=(64, 100_000), fragments=32)
    monkeypatch.setenv("DF11_DISPATCH", str(tmp_path / "table.json"))
    monkeypatch.setattr(dispatch, "_seconds", lambda way, weight, device: way(weight))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    recorder = Recorder()
    monkeypatch.setattr(tiled_gpu, "_kernels", lambda index: recorder)
    ways = {"fused": lambda weight: 1.0, "sliced": lambda weight: 2.0, "decompress": lambda weight: 3.0}
    assert dispatch.choose(weight, OnGpu(64, 100_000), ways) == "fused"  # type: ignore[arg-type]
    assert dispatch.choose(weight, OnGpu(65, 100_000), ways) == "sliced"  # type: ignore[arg-type]


@pytest.mark.parametrize("room", ["none for x", "none to measure"])
def test_ways_that_cannot_be_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: str) -> None:
    calls = []

    def full(way: Callable[[TiledWeight], torch.Tensor], weight: TiledWeight, device: torch.device) -> float:
        calls.append(way)
        raise torch.OutOfMemoryError

    weight, x = SimpleNamespace(shape=(256, 512), fragments=32), SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0))
    x.numel = lambda: 512
    monkeypatch.setenv("DF11_DISPATCH", str(tmp_path / "table.json"))
    monkeypatch.setattr(tiled_gpu, "fits", lambda *arguments: room == "none to measure")
    monkeypatch.setattr(tiled_gpu, "most_rows", lambda index: 64)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(dispatch, "_seconds", full)
    ways: dispatch.Ways = {"fused": lambda weight: torch.zeros(1), "decompress": lambda weight: torch.zeros(2)}
    chosen = [dispatch.choose(weight, x, ways) for _ in range(3)]  # type: ignore[arg-type]
    assert set(chosen) == {"fused" if room == "none to measure" else "sliced"}
    assert len(calls) == 1  # not again at every call
    assert json.loads((tmp_path / "table.json").read_text()) == {}


def test_opcheck() -> None:
    weight = TiledWeight.encode((torch.randn(200, 512, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16())
    assert weight is not None
    place = weight.arrays, weight.uppers, 200, 512
    torch.library.opcheck(torch.ops.df11.tiled_linear.default, (torch.randn(2, 512).bfloat16(), *place))
    torch.library.opcheck(torch.ops.df11.tiled_decode.default, place)
    torch.library.opcheck(torch.ops.df11.linear.default, (torch.randn(2, 512).bfloat16(), *place))
    torch.library.opcheck(torch.ops.df11.tiled_rows.default, (torch.tensor([3, 7]), *place))
