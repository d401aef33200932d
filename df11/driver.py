"""Launches that PyCUDA cannot make: on a stream of torch's, and beginning while the kernel before ends.

PyCUDA gives no handles of its modules and functions, so these kernels are loaded here, through the driver's own interface.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import struct
from collections.abc import Sequence
from pathlib import Path

MAX_DYNAMIC_SHARED_BYTES = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
PROGRAMMATIC_STREAM_SERIALIZATION = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION

NO_CONTEXT, OTHER_CONTEXT = 201, 400  # CUDA_ERROR_INVALID_CONTEXT, CUDA_ERROR_INVALID_HANDLE


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
    _check(name, getattr(_library(), name)(*arguments))


def _check(name: str, code: int) -> None:
    if code:
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


class Launch:
    """A kernel and how it is launched, prepared once: a call writes its arguments and hands them to the driver.

    arguments: each one's layout in struct's letters. overlap: the kernel may begin when the one before it on the stream lets it,
    or ends (programmatic dependent launch); it must wait by griddepcontrol before it touches what that one reads or writes.
    One call at a time: the arguments lie in one place.
    """

    def __init__(
        self, function: ctypes.c_void_p, blocks: int, threads: int, shared: int, arguments: Sequence[str], overlap: bool
    ) -> None:
        sizes = [struct.calcsize(f"={layout}") for layout in arguments]
        padded = [-(-size // 16) * 16 for size in sizes]  # as the strictest type of an argument is aligned
        gaps = (f"{layout}{room - size}x" for layout, room, size in zip(arguments, padded, sizes, strict=True))
        self._write = struct.Struct("=" + "".join(gaps)).pack_into
        self._values = ctypes.create_string_buffer(sum(padded))
        places = itertools.accumulate(padded[:-1], initial=ctypes.addressof(self._values))
        pointers = (ctypes.c_void_p * len(sizes))(*places)
        self._config = _Config((blocks, 1, 1), (threads, 1, 1), shared, None, ctypes.pointer(_OVERLAP), int(overlap))
        self._stream = 0
        self._call = _library().cuLaunchKernelEx
        self._arguments = (ctypes.pointer(self._config), function, pointers, None)

    def __call__(self, stream: int, *values: int | bytes) -> int:
        """Launch on a stream of the current context. Returns the driver's code, 0 for success."""
        self._write(self._values, 0, *values)
        if stream != self._stream:
            self._config.stream = self._stream = stream
        code: int = self._call(*self._arguments)
        return code


def check(code: int) -> None:
    """Raise DriverError for what a launch returned."""
    _check("cuLaunchKernelEx", code)
