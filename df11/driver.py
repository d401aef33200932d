"""Launches that PyCUDA cannot make: on a stream of torch's, and beginning while the kernel before ends.

PyCUDA gives no handles of its modules and functions, so these kernels are loaded here, through the driver's own interface.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import struct
from pathlib import Path

MAX_DYNAMIC_SHARED_BYTES = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
PROGRAMMATIC_STREAM_SERIALIZATION = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION


class DriverError(RuntimeError):
    """A call of the CUDA driver that failed."""


class _Attribute(ctypes.Structure):  # CUlaunchAttribute
    _fields_ = (("id", ctypes.c_int), ("padding", ctypes.c_int), ("value", ctypes.c_int), ("rest", ctypes.c_char * 60))


class _Config(ctypes.Structure):  # CUlaunchConfig
    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    )


_OVERLAP = _Attribute(PROGRAMMATIC_STREAM_SERIALIZATION, 0, 1)


@functools.cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _call(name: str, *arguments: object) -> None:
    if code := getattr(_library(), name)(*arguments):
        text = ctypes.c_char_p()
        _library().cuGetErrorString(code, ctypes.byref(text))
        raise DriverError(f"{name}: {(text.value or b'unknown error').decode()} ({code})")


class Module:
    """A cubin in the current context."""

    def __init__(self, path: Path) -> None:
        self._handle = ctypes.c_void_p()
        _call("cuModuleLoad", ctypes.byref(self._handle), str(path).encode())

    def function(self, name: str, shared: int) -> ctypes.c_void_p:
        """A kernel that may take so many bytes of dynamic shared memory."""
        function = ctypes.c_void_p()
        _call("cuModuleGetFunction", ctypes.byref(function), self._handle, name.encode())
        _call("cuFuncSetAttribute", function, MAX_DYNAMIC_SHARED_BYTES, shared)
        return function

    def constant(self, name: str) -> int:
        """The value of an int of the module."""
        address, size, value = ctypes.c_uint64(), ctypes.c_size_t(), ctypes.c_int()
        _call("cuModuleGetGlobal_v2", ctypes.byref(address), ctypes.byref(size), self._handle, name.encode())
        _call("cuMemcpyDtoH_v2", ctypes.byref(value), address, ctypes.c_size_t(4))
        return value.value


def launch(
    function: ctypes.c_void_p,
    blocks: int,
    threads: int,
    shared: int,
    stream: int,
    arguments: tuple[int | bytes, ...],
    overlap: bool,
) -> None:
    """Launch on a stream of the current context. arguments: pointers, and structures as bytes.

    overlap: the kernel may begin when the one before it on the stream lets it, or ends (programmatic dependent launch). It must
    wait by griddepcontrol before it touches what that one reads or writes.
    """
    layout, buffer, pointers, places = _layout(tuple([len(a) if isinstance(a, bytes) else 0 for a in arguments]))
    values = buffer.from_buffer_copy(layout.pack(*arguments))
    start = ctypes.addressof(values)
    config = _config(blocks, threads, shared, stream, overlap)
    _call("cuLaunchKernelEx", config, function, pointers(*[start + place for place in places]), None)


@functools.cache
def _layout(sizes: tuple[int, ...]) -> tuple[struct.Struct, type[ctypes.Array], type[ctypes.Array], list[int]]:
    """Of arguments one after the other, of so many bytes, 0 for a pointer: layout, buffer, pointers to them, and their places."""
    padded = [-(-(size or 8) // 16) * 16 for size in sizes]  # as the strictest type of an argument is aligned
    layout = struct.Struct("=" + "".join(f"{size}s{-size % 16}x" if size else "Q8x" for size in sizes))
    places = itertools.accumulate(padded[:-1], initial=0)
    return layout, ctypes.c_char * layout.size, ctypes.c_void_p * len(sizes), list(places)


@functools.lru_cache(4096)
def _config(blocks: int, threads: int, shared: int, stream: int, overlap: bool) -> ctypes._Pointer[_Config]:
    return ctypes.pointer(_Config((blocks, 1, 1), (threads, 1, 1), shared, stream, ctypes.pointer(_OVERLAP), int(overlap)))
