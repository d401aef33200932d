"""nvCOMP's batched ANS (package nvidia-libnvcomp-cu13), the entropy coder the paper compares with, through its C interface."""

from __future__ import annotations

import ctypes
import importlib.util
from ctypes import POINTER, Structure, byref, c_char, c_int, c_size_t, c_uint8, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import torch

PACKAGE = "nvidia-libnvcomp-cu13"
ALIGNMENT = 16  # of every chunk, compressed or not (nvcompANSRequiredCompressionAlignment)
DATA_TYPES = {1: 1, 2: 10}  # bytes of an element: NVCOMP_TYPE_UCHAR, NVCOMP_TYPE_FLOAT16 (any half-precision format)
CHUNK_BYTES = 1 << 16
MOST_CHUNK_BYTES = 1 << 24  # nvcompANSCompressionMaxAllowedChunkSize
STATUSES = {0: "success", 10: "invalid value", 11: "not supported", 12: "cannot decompress", 15: "output buffer too small"}
STATUSES |= {17: "alignment", 18: "chunk size too large", 19: "cannot compress", 20: "wrong input length", 1000: "CUDA error"}


class _CompressOptions(Structure):
    _fields_ = (("type", c_int), ("data_type", c_int), ("tuning", c_uint8 * 3), ("reserved", c_char * 53))


class _DecompressOptions(Structure):
    _fields_ = (("backend", c_int), ("data_type", c_int), ("tuning", c_uint8 * 3), ("reserved", c_char * 53))


def is_installed() -> bool:
    return _path() is not None


def _path() -> Path | None:
    try:
        package = importlib.util.find_spec("nvidia.libnvcomp")
    except ModuleNotFoundError:
        return None
    folders = package.submodule_search_locations if package else None
    found = [path for folder in folders or () for path in Path(folder).glob("lib64/libnvcomp.so.*")]
    return found[0] if found else None


@cache
def _library() -> Any:
    path = _path()
    if path is None:
        raise ModuleNotFoundError(f"nvCOMP is not installed: pip install {PACKAGE}")
    library = ctypes.CDLL(str(path))
    pointer, size = c_void_p, c_size_t
    signatures = {
        "CompressGetTempSize": (size, size, _CompressOptions, POINTER(size), size, pointer),
        "CompressGetMaxOutputChunkSize": (size, _CompressOptions, POINTER(size)),
        "CompressAsync": (pointer, pointer, size, size, pointer, size, pointer, pointer, _CompressOptions, pointer, pointer),
        "DecompressGetTempSize": (size, size, _DecompressOptions, POINTER(size), size, pointer),
        "DecompressAsync": (
            *(pointer, pointer, pointer, pointer, size, pointer, size),
            *(pointer, _DecompressOptions, pointer, pointer),
        ),
    }
    for name, arguments in signatures.items():
        function = getattr(library, f"nvcompBatchedANS{name}")
        function.argtypes, function.restype = arguments, c_int
    return library


def _call(device: torch.device, name: str, *arguments: Any) -> None:
    function = getattr(_library(), f"nvcompBatchedANS{name}")
    with torch.cuda.device(device):  # the stream's
        status = function(*arguments)
    if status:
        raise RuntimeError(f"nvcompBatchedANS{name}: {STATUSES.get(status, 'error')} ({status})")


def _stream(tensor: torch.Tensor) -> int:
    return torch.cuda.current_stream(tensor.device).cuda_stream


def _addresses(base: torch.Tensor, step: int, count: int) -> torch.Tensor:
    return torch.arange(count, device=base.device) * step + base.data_ptr()


class AnsBatch:
    """A tensor compressed in chunks, ready to decompress: everything that takes is allocated once."""

    def __init__(self, compressed: torch.Tensor, offsets: torch.Tensor, sizes: torch.Tensor, numbers: tuple[int, int, int]) -> None:
        self._compressed, self._compressed_sizes = compressed, sizes
        self._pointers = offsets + compressed.data_ptr()
        self._total, self._chunk, data_type = numbers
        count = len(sizes)
        device = compressed.device
        self._sizes = torch.full((count,), self._chunk, dtype=torch.int64, device=device)
        self._sizes[-1] = self._total - (count - 1) * self._chunk
        self._actual = torch.zeros(count, dtype=torch.int64, device=device)
        self._statuses = torch.full((count,), -1, dtype=torch.int32, device=device)
        self._options = _DecompressOptions(data_type=data_type)
        needed = c_size_t()
        _call(device, "DecompressGetTempSize", count, self._chunk, self._options, byref(needed), self._total, _stream(compressed))
        self._temporary = torch.empty(max(needed.value, 1), dtype=torch.uint8, device=device)
        self._out: tuple[int, torch.Tensor] = (0, self._pointers)

    @classmethod
    def compress(cls, data: torch.Tensor, chunk_bytes: int = CHUNK_BYTES) -> AnsBatch:
        """Compress a contiguous CUDA tensor of one- or two-byte elements in chunks of `chunk_bytes`."""
        _check("data", data)
        if data.element_size() not in DATA_TYPES:
            raise ValueError(f"data: elements of {data.element_size()} bytes; nvCOMP's ANS is used for 1 and 2")
        if chunk_bytes % ALIGNMENT or not 0 < chunk_bytes <= MOST_CHUNK_BYTES:
            raise ValueError(f"chunk_bytes={chunk_bytes}: a multiple of {ALIGNMENT} up to {MOST_CHUNK_BYTES} is needed")
        options = _CompressOptions(data_type=DATA_TYPES[data.element_size()])
        count = -(-data.nbytes // chunk_bytes)
        sizes = torch.full((count,), chunk_bytes, dtype=torch.int64, device=data.device)
        sizes[-1] = data.nbytes - (count - 1) * chunk_bytes
        most, needed = c_size_t(), c_size_t()
        _call(data.device, "CompressGetMaxOutputChunkSize", chunk_bytes, options, byref(most))
        _call(data.device, "CompressGetTempSize", count, chunk_bytes, options, byref(needed), data.nbytes, _stream(data))
        step = -(-most.value // ALIGNMENT) * ALIGNMENT
        loose = torch.empty(count * step, dtype=torch.uint8, device=data.device)
        temporary = torch.empty(max(needed.value, 1), dtype=torch.uint8, device=data.device)
        got = torch.zeros(count, dtype=torch.int64, device=data.device)
        statuses = torch.full((count,), -1, dtype=torch.int32, device=data.device)
        inputs, outputs = _addresses(data, chunk_bytes, count), _addresses(loose, step, count)
        _call(
            data.device,
            "CompressAsync",
            *(inputs.data_ptr(), sizes.data_ptr(), chunk_bytes, count, temporary.data_ptr(), temporary.nbytes),
            *(outputs.data_ptr(), got.data_ptr(), options, statuses.data_ptr(), _stream(data)),
        )
        _report(statuses)
        padded = (got + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
        ends = padded.cumsum(0)
        packed = torch.empty(int(ends[-1]), dtype=torch.uint8, device=data.device)
        at = 0
        for chunk, size in enumerate(padded.tolist()):
            packed[at : at + size] = loose[chunk * step : chunk * step + size]
            at += size
        return cls(packed, ends - padded, got, (data.nbytes, chunk_bytes, options.data_type))

    @property
    def nbytes(self) -> int:
        """Compressed bytes, with 8 a chunk for its place."""
        return int(self._compressed.nbytes) + 8 * len(self._sizes)

    def decompress(self, out: torch.Tensor) -> None:
        """Into a contiguous tensor of the original size, on torch's current stream; nothing is allocated, nobody waits."""
        _check("out", out)
        if out.nbytes != self._total:
            raise ValueError(f"out: {out.nbytes} bytes where {self._total} are needed")
        if self._out[0] != out.data_ptr():
            self._out = (out.data_ptr(), _addresses(out, self._chunk, len(self._sizes)))
        _call(
            out.device,
            "DecompressAsync",
            *(self._pointers.data_ptr(), self._compressed_sizes.data_ptr(), self._sizes.data_ptr(), self._actual.data_ptr()),
            *(len(self._sizes), self._temporary.data_ptr(), self._temporary.nbytes),
            *(self._out[1].data_ptr(), self._options, self._statuses.data_ptr(), _stream(out)),
        )

    def check(self) -> None:
        """Raise RuntimeError where a chunk of the last decompression failed. Waits for it."""
        _report(self._statuses)
        if not torch.equal(self._actual, self._sizes):
            raise RuntimeError(f"nvCOMP: chunk {int((self._actual != self._sizes).int().argmax())} came back in another size")


def _check(name: str, tensor: torch.Tensor) -> None:
    if not tensor.is_cuda or not tensor.is_contiguous() or tensor.data_ptr() % ALIGNMENT or not tensor.numel():
        raise ValueError(f"{name} must be a contiguous CUDA tensor, not empty, that starts at a multiple of {ALIGNMENT} bytes")


def _report(statuses: torch.Tensor) -> None:
    bad = statuses.nonzero()
    if len(bad):
        status = int(statuses[bad[0, 0]])
        raise RuntimeError(f"nvCOMP: chunk {int(bad[0, 0])} of {len(statuses)}: {STATUSES.get(status, 'error')} ({status})")
