"""The kernels of the tiled layout on a GPU against the CPU format. They are launched from here: nothing in df11 does so yet."""

import struct
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from df11 import gpu
from df11.formats.tiled import Tiled

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not gpu.is_available(), reason="needs a GPU, pycuda and nvcc")]
MATRIX = struct.Struct("PPPPPPQiiii")  # tiled::Matrix: six pointers, uppers, rows, columns, fragments, and its padding
ARRAYS = ("low", "sign", "stream", "tiles", "patches")


@dataclass
class OnGpu:
    arrays: dict[str, torch.Tensor]  # kept, for the addresses in `packed`
    packed: bytes
    shape: tuple[int, ...]

    @classmethod
    def encode(cls, weights: torch.Tensor) -> "OnGpu":
        unit = Tiled().encode_tensors([weights.cpu()])
        (matrix,) = unit.matrices
        assert matrix.raw is None
        given = {**matrix.arrays, "table": unit.code.table}
        arrays = {n: torch.from_numpy(a.view(np.int32) if a.dtype == np.uint32 else a).cuda() for n, a in given.items()}
        pointers = [arrays[name].data_ptr() for name in (*ARRAYS, "table")]
        packed = MATRIX.pack(*pointers, int(unit.code.uppers.view(np.uint64)[0]), *matrix.size, matrix.fragments, 0)
        return cls(arrays, packed, matrix.size)

    def decompress(self) -> torch.Tensor:
        device = gpu.device(0)
        out = torch.full(self.shape, float("nan"), dtype=torch.bfloat16, device="cuda")
        kernel = device.kernel("tiled", "tiled_decompress", f"{MATRIX.size}sP")
        device.launch(kernel, device.processors, self.packed, out.data_ptr())
        return out

    def product(self, x: torch.Tensor) -> torch.Tensor:
        device = gpu.device(0)
        y = torch.full(self.shape[:1], float("nan"), dtype=torch.bfloat16, device="cuda")
        kernel = device.kernel("tiled", "tiled_product", f"{MATRIX.size}sPPP")
        device.launch(kernel, device.processors, self.packed, x.data_ptr(), 0, y.data_ptr())
        return y


SHAPES = [(16, 128), (60, 300), (100, 2304), (333, 576), (4096, 576), (50, 1600), (1000, 5376), (64, 8192), (4096, 4096)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bits_and_products(shape: tuple[int, int]) -> None:
    """With escapes: whole columns, a row of tiny weights, an Inf and a NaN."""
    generator = torch.Generator("cuda").manual_seed(shape[1])
    weights = (torch.randn(shape, device="cuda", generator=generator) * 0.02).bfloat16()
    weights[shape[0] // 2, ::37] = 7.0
    weights[3, 5], weights[5, 7], weights[9] = float("inf"), float("nan"), 1e-30
    matrix = OnGpu.encode(weights)
    assert torch.equal(matrix.decompress().view(torch.int16), weights.view(torch.int16))
    x = torch.randn(1, shape[1], device="cuda", generator=generator).bfloat16()
    y, again = matrix.product(x), matrix.product(x)
    assert torch.equal(y.view(torch.int16), again.view(torch.int16))
    exact = (x.double() @ weights.double().T)[0]
    finite = torch.isfinite(weights.float()).all(1)
    cublas = torch.nn.functional.linear(x, weights)[0].double()
    assert (y.double() - exact)[finite].norm() <= 1.05 * (cublas - exact)[finite].norm()
    assert torch.equal(torch.isnan(y[~finite]), torch.isnan(exact[~finite]))


def test_all_patterns() -> None:
    everything = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).view(256, 256)
    weights = torch.cat([(torch.randn(2048, 256) * 0.02).bfloat16(), everything]).cuda()
    assert torch.equal(OnGpu.encode(weights).decompress().view(torch.int16), weights.view(torch.int16))
