"""The CUDA kernels of kernels/, through PyCUDA: built once, cached by content, launched on torch's current stream.

PyCUDA is imported, and a device set up, at the first launch on it. The context is torch's own (the primary one), so tensors of
torch are passed by their addresses. A launch allocates nothing on the device and does not wait for it.
"""

from __future__ import annotations

import atexit
import hashlib
import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from df11.formats.dfloat11 import ARRAYS, BLOCK_BYTES, BLOCK_CHUNKS, GAP_BYTES
from df11.formats.luts import FIRST_POINTER, MAX_TABLES, build_luts, choose_code
from df11.huffman import Code
from df11.sources.cache import default_cache

SOURCES = Path(__file__).resolve().parents[1] / "kernels"
FLAGS = ("-O3", "-std=c++17", "-cubin")
DECODERS = ("fast", "paper")
NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING, which PyCUDA does not name: the stream does not wait for the default one
TABLE_WORDS = 2 * ((1 << 11) + 1)  # int32 of decode_fast's table, see kernels/decode_fast.cu
RULES = {  # dtype and alignment of what a decoder takes
    "encoded_exponent": (torch.uint8, 16),
    "sign_mantissa": (torch.uint8, 8),
    "luts": (torch.uint8, 1),
    "gaps": (torch.uint8, 1),
    "output_positions": (torch.int32, 4),
    "table": (torch.int32, 16),
    "out": (torch.bfloat16, 16),
}
NAMES = ("luts", *(name for name in ARRAYS if name != "luts"), "out", "table")  # as df11::Unit has them
UNIT = "PPPPPPqqi"  # df11::Unit in struct's letters
PART = struct.Struct(f"{UNIT}4xPii")  # Part of decode_fast.cu
MAX_PARTS = 40  # of a launch
STREAM_ALIGNMENT = 16  # bytes; where a unit's stream may begin
ENCODE_TILE = 4096  # weights a thread block of kernels/encode.cu
ENCODE_THREADS = 256


class GpuError(RuntimeError):
    """A kernel that cannot be built or launched. The message says what to install or to change."""


def _driver() -> ModuleType:
    try:
        import pycuda.driver as driver
    except ModuleNotFoundError as missing:
        raise GpuError("the GPU kernels need PyCUDA: pip install 'df11[gpu]', or conda install -c conda-forge pycuda") from missing
    return driver  # type: ignore[no-any-return]


def find_nvcc() -> Path:
    """The CUDA compiler: $CUDA_HOME, $CUDA_PATH, the search path, /usr/local/cuda."""
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"):
        if home and (nvcc := Path(home) / "bin" / "nvcc").is_file():
            return nvcc
    if on_path := shutil.which("nvcc"):
        return Path(on_path)
    raise GpuError(
        "nvcc was not found: install the CUDA toolkit (conda install -c nvidia cuda-nvcc cuda-cudart-dev), or set CUDA_HOME to it"
    )


def build(source: str, arch: str) -> Path:
    """kernels/<source>.cu as a cubin for `arch` (sm_90), from the cache or by nvcc. The cache is keyed by sources and flags."""
    cubin = default_cache() / "kernels" / f"{source}-{arch}-{digest(source, arch)}.cubin"
    if cubin.exists():
        return cubin
    nvcc = find_nvcc()
    cubin.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cubin.parent) as scratch:
        made = Path(scratch) / "made.cubin"
        command = [str(nvcc), *FLAGS, f"-arch={arch}", "-o", str(made), str(SOURCES / f"{source}.cu")]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise GpuError(f"{' '.join(command)} failed:\n{done.stderr.strip()}")
        made.replace(cubin)
    return cubin


def digest(source: str, arch: str) -> str:
    """Of all that decides what kernels/<source>.cu becomes."""
    if not SOURCES.is_dir():
        raise GpuError(f"{SOURCES} is missing: install df11 from its repository with pip install -e .")
    found = hashlib.sha256(" ".join((*FLAGS, arch)).encode())
    for path in (*sorted(SOURCES.glob("*.cuh")), *sorted(SOURCES.glob(f"{source}*.cu"))):
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


@dataclass(frozen=True)
class Kernel:
    """A loaded function. `shared`: bytes of dynamic shared memory."""

    function: Any
    block: tuple[int, int, int]
    shared: int = 0
    blocks_per_sm: int = 0


class Device:
    """One GPU: torch's primary context, the kernels loaded into it, and a stream to launch from for each foreign stream."""

    def __init__(self, index: int) -> None:
        properties = torch.cuda.get_device_properties(index)
        if properties.major < 8:
            raise GpuError(
                f"cuda:{index} ({properties.name}) has compute capability {properties.major}.{properties.minor}, the kernels need "
                '8.0 or newer: use another GPU, or the CPU with device_map="cpu"'
            )
        self._driver = _driver()
        torch.cuda.init()
        self._driver.init()
        torch.zeros(1, device=f"cuda:{index}")  # makes torch set up the context that is retained here
        self.index = index
        self.context = self._driver.Device(index).retain_primary_context()
        self.arch = f"sm_{properties.major}{properties.minor}"
        self.processors = properties.multi_processor_count
        self._modules: dict[str, Any] = {}
        self._kernels: dict[str, Kernel] = {}
        self._streams: dict[int, tuple[Any, torch.cuda.Stream]] = {}

    def kernel(self, source: str, name: str, arguments: str, threads: int = 0) -> Kernel:
        """A function of kernels/<source>.cu. `arguments` in struct's letters. Threads and shared memory: as its file says, or
        `threads` and none."""
        if name not in self._kernels:
            with self.current():
                if source not in self._modules:
                    self._modules[source] = self._driver.module_from_file(str(build(source, self.arch)))
                module = self._modules[source]
                function = module.get_function(name)
                shape = np.array([threads, 0, 0], np.int32)
                if not threads:
                    pointer, _ = module.get_global(f"{name}_launch")
                    self._driver.memcpy_dtoh(shape, pointer)
                    function.set_attribute(self._driver.function_attribute.MAX_DYNAMIC_SHARED_SIZE_BYTES, int(shape[1]))
                function.prepare(arguments)
                self._kernels[name] = Kernel(function, (int(shape[0]), 1, 1), int(shape[1]), int(shape[2]))
        return self._kernels[name]

    @contextmanager
    def current(self) -> Iterator[None]:
        """Torch's context of this device as the thread's current one."""
        self.context.push()
        try:
            yield
        finally:
            self.context.pop()

    def foreign_kernel(self, path: Path, name: str, arguments: str, threads: int, shared: int) -> Kernel:
        """A function of somebody else's cubin or PTX."""
        with self.current():
            if str(path) not in self._modules:
                self._modules[str(path)] = self._driver.module_from_file(str(path))
            function = self._modules[str(path)].get_function(name)
            function.prepare(arguments)
            return Kernel(function, (threads, 1, 1), shared)

    def launch(self, kernel: Kernel, blocks: int, *arguments: int | bytes) -> None:
        """Launch on torch's current stream of this device.

        PyCUDA cannot take a foreign stream, only the default one: any other is forked to a stream of PyCUDA's and joined again,
        which a graph capture follows.
        """
        current = torch.cuda.current_stream(self.index)
        with self.current():
            if current.cuda_stream == 0:
                kernel.function.prepared_async_call((blocks, 1), kernel.block, None, *arguments, shared_size=kernel.shared)
                return
            if current.cuda_stream not in self._streams:
                own = self._driver.Stream(NON_BLOCKING)
                self._streams[current.cuda_stream] = own, torch.cuda.ExternalStream(own.handle, device=self.index)
            own, wrapped = self._streams[current.cuda_stream]
            wrapped.wait_stream(current)
            kernel.function.prepared_async_call((blocks, 1), kernel.block, own, *arguments, shared_size=kernel.shared)
            current.wait_stream(wrapped)

    def close(self) -> None:
        """Unload, with the context current, and release it."""
        with self.current():
            self._kernels.clear()
            self._modules.clear()
            self._streams.clear()
        self.context.detach()


_devices: dict[int, Device] = {}


def device(index: int) -> Device:
    """The GPU, set up at its first use, released when the process ends."""
    if index not in _devices:
        if not _devices:
            atexit.register(_close)
        _devices[index] = Device(index)
    return _devices[index]


def _close() -> None:
    while _devices:
        _devices.popitem()[1].close()


def is_available() -> bool:
    """Whether kernels can be launched here: a GPU, PyCUDA and nvcc."""
    if not torch.cuda.is_available() or find_spec("pycuda") is None:
        return False
    try:
        find_nvcc()
    except GpuError:
        return False
    return True


def _require(condition: bool, rule: str) -> None:
    if not condition:
        raise ValueError(rule)


def _check(tensors: dict[str, torch.Tensor], index: int) -> None:
    """Raise ValueError where dtypes, places or sizes do not fit, and say which."""
    for name, tensor in tensors.items():
        dtype, alignment = RULES[name]
        # A message is made only where it is needed: this runs at every call.
        if tensor.dtype != dtype:
            raise ValueError(f"{name}: dtype {tensor.dtype}, needed {dtype}")
        if tensor.get_device() != index:
            raise ValueError(f"{name} is on {tensor.device}, out on cuda:{index}: all must be on one GPU")
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous")
        if tensor.data_ptr() % alignment:
            raise ValueError(f"{name} must start at a multiple of {alignment} bytes")
    n, luts = tensors["out"].numel(), tensors["luts"]
    blocks = -(-tensors["encoded_exponent"].numel() // BLOCK_BYTES)
    if n >= 1 << 32:
        raise ValueError(f"{n} weights in one unit: the published layout holds fewer than 2^32; split the unit")
    if luts.dim() != 2 or luts.shape[1] != 256 or not 2 <= luts.shape[0] <= MAX_TABLES + 1:
        raise ValueError(f"luts: shape {tuple(luts.shape)}, needed [tables + 1, 256] with 1 to {MAX_TABLES} tables")
    sizes = {"sign_mantissa": n, "gaps": blocks * GAP_BYTES, "output_positions": blocks + 1, "table": TABLE_WORDS}
    for name, needed in sizes.items():
        if tensors[name].numel() != needed:
            raise ValueError(f"{name}: {tensors[name].numel()} entries where {needed} are needed")


def decompress(
    encoded_exponent: Sequence[torch.Tensor],
    sign_mantissa: Sequence[torch.Tensor],
    luts: Sequence[torch.Tensor],
    gaps: Sequence[torch.Tensor],
    output_positions: Sequence[torch.Tensor],
    table: Sequence[torch.Tensor],
    out: Sequence[torch.Tensor],
    decoder: str = "fast",
) -> None:
    """Decode units of the published layout into `out`, asynchronously; `fast` decodes up to 40 of them by one launch.

    A unit: uint8[bytes], uint8[n], uint8[tables + 1, 256], uint8[320 blocks], int32[blocks + 1] (the bits of uint32),
    int32[TABLE_WORDS] from `build_table`, bf16 of n elements, all contiguous and all units on one GPU; encoded_exponent and out
    start at multiples of 16 bytes, sign_mantissa of 8. The arrays are trusted to fit each other (`DFloat11.check`): unsound ones
    give wrong weights, but nothing is read or written outside of them.
    """
    if decoder not in DECODERS:
        raise ValueError(f"no decoder {decoder!r}: there are {', '.join(DECODERS)}")
    units: list[tuple[int, tuple[int, ...]]] = []  # blocks of the stream, and the fields of df11::Unit and the table
    for given in zip(luts, encoded_exponent, sign_mantissa, gaps, output_positions, out, table, strict=True):
        index = out[0].get_device()
        if index < 0:
            raise ValueError(f"out is on {out[0].device}: a CUDA tensor is needed")
        _check(dict(zip(NAMES, given, strict=True)), index)
        size = given[1].numel()
        if size:
            addresses = [tensor.data_ptr() for tensor in given]
            units.append((-(-size // BLOCK_BYTES), (*addresses[:6], size, given[5].numel(), given[0].shape[0] - 1, addresses[6])))
    if not units:
        return
    gpu = device(index)
    if decoder == "paper":
        loaded = gpu.kernel("decode_paper", "decode_paper", UNIT)
        for blocks, fields in units:
            gpu.launch(loaded, blocks, *fields[:-1])
        return
    loaded = gpu.kernel("decode_fast", "decode_fast", f"{PART.size * MAX_PARTS}s")
    for start in range(0, len(units), MAX_PARTS):
        some = units[start : start + MAX_PARTS]
        counts = share_out([blocks for blocks, _ in some], gpu.processors * loaded.blocks_per_sm)
        packed, first = b"", 0
        for count, (_, fields) in zip(counts, some, strict=True):
            packed += PART.pack(*fields, first, count)
            first += count
        nothing = PART.pack(*(0,) * 10, np.iinfo(np.int32).max, 0)
        gpu.launch(loaded, first, packed + nothing * (MAX_PARTS - len(some)))


def share_out(blocks: Sequence[int], workers: int) -> list[int]:
    """Thread blocks for each unit, as equal in the stream blocks that each has to do as `workers` in all allow; at least one."""
    most = max(1, sum(blocks) // max(1, workers))
    while sum(-(-b // most) for b in blocks) > max(workers, len(blocks)):
        most += 1
    return [-(-b // most) for b in blocks]


def build_table(luts: torch.Tensor) -> torch.Tensor:
    """The workspace of the `fast` kernel for these luts, int32[TABLE_WORDS], made once when a unit is loaded."""
    table = torch.empty(TABLE_WORDS, dtype=torch.int32, device=luts.device)
    gpu = device(luts.device.index)
    gpu.launch(
        gpu.kernel("decode_fast", "build_table", "PiP", threads=256), 8, luts.data_ptr(), luts.shape[0] - 1, table.data_ptr()
    )
    return table


def encode(weights: torch.Tensor, code: Code | None = None, parts: int = 1) -> tuple[dict[str, torch.Tensor], list[int]]:
    """Compress a contiguous bf16 CUDA tensor as one unit, byte for byte as `DFloat11.encode` does; or as several of as many weights
    each, all with one code. `code`: not the optimal one.

    Returns the layout's arrays by name (uint8, and int32 with the bits of uint32 for output_positions) and the bytes of each
    stream; several units lie one after another as `ops.split` takes them. {"raw": weights} where an exponent is 240 or more. One
    host synchronisation, for the histograms. Memory beside the result: some 2 % of the input.
    """
    _require(weights.is_cuda, f"weights are on {weights.device}: a CUDA tensor is needed")
    _require(weights.dtype == torch.bfloat16, f"weights: dtype {weights.dtype}, needed torch.bfloat16")
    _require(weights.is_contiguous(), "weights must be contiguous")
    n = weights.numel() // parts
    _require(0 < n < 1 << 32 and n * parts == weights.numel(), f"{weights.numel()} weights, {parts} units: 1 to 2^32 - 1 fit one")
    gpu = device(weights.device.index)

    def empty(size: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device=weights.device)

    def zeros(size: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
        return torch.zeros(size, dtype=dtype, device=weights.device)

    def run(name: str, arguments: str, blocks: int, *values: int, threads: int = ENCODE_THREADS) -> None:
        gpu.launch(gpu.kernel("encode", name, arguments, threads), blocks, *values)

    counts, sign_mantissa = zeros(parts * 256, torch.int64), empty(parts * n)
    for i in range(parts):
        places = (weights.data_ptr() + 2 * i * n, n, counts.data_ptr() + 2048 * i, sign_mantissa.data_ptr() + i * n)
        run("histogram_split", "PqPP", 4 * gpu.processors, *places)
    histograms = counts.cpu().numpy().reshape(parts, 256)
    if histograms[:, FIRST_POINTER:].any():
        return {"raw": weights.reshape(-1)}, []
    code = code or choose_code(histograms.sum(0))
    bits = [code.bits(histogram) for histogram in histograms]
    sizes = [-(-each // 8) for each in bits]
    blocks = [-(-size // BLOCK_BYTES) for size in sizes]
    tiles = -(-n // ENCODE_TILE)
    lengths = torch.from_numpy(code.lengths.astype(np.uint8)).to(weights.device)
    codes = torch.from_numpy(code.codes.astype(np.uint32).view(np.int32)).to(weights.device)
    steps = sizes if parts == 1 else [-(-size // STREAM_ALIGNMENT) * STREAM_ALIGNMENT for size in sizes]
    tile_at, stream = empty(tiles, torch.int64), zeros(-(-sum(steps) // 4), torch.int32)
    chunks = sum(blocks) * BLOCK_CHUNKS
    gaps, packed, positions = zeros(chunks + parts), empty(chunks * 5 // 8), zeros(sum(blocks) + parts, torch.int32)
    at, block = 0, 0
    for i, (step, own) in enumerate(zip(steps, blocks, strict=True)):
        source = (weights.data_ptr() + 2 * i * n, n, lengths.data_ptr())
        own_gaps, own_positions = gaps.data_ptr() + block * BLOCK_CHUNKS + i, positions.data_ptr() + 4 * (block + i)
        outputs = (tile_at.data_ptr(), stream.data_ptr() + at, own_gaps, own_positions)
        run("tile_bits", "PqPP", tiles, *source, tile_at.data_ptr())
        run("scan", "Pq", 1, tile_at.data_ptr(), tiles, threads=1024)
        run("encode_tiles", "PqPPPPPP", tiles, *source, codes.data_ptr(), *outputs)
        run("finish", "PPPqqiI", 1, *outputs[1:], n, bits[i], *code.padding, threads=1)
        groups = own * BLOCK_CHUNKS // 8
        to = packed.data_ptr() + block * BLOCK_CHUNKS * 5 // 8
        run("pack_gaps", "PqP", -(-groups // 256), own_gaps, groups, to, threads=256)
        at, block = at + step, block + own
    return {
        "encoded_exponent": stream.view(torch.uint8)[: sum(steps)],
        "sign_mantissa": sign_mantissa,
        "luts": torch.from_numpy(build_luts(code)).to(weights.device),
        "gaps": packed,
        "output_positions": positions,
    }, sizes
