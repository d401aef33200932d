"""Operators and units on the CPU, and what the GPU module says where something is missing."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from df11 import gpu, nvcomp, ops, released
from df11.formats import FormatError
from df11.formats.dfloat11 import DFloat11
from df11.tiled_ops import TiledWeight
from tests.helpers import normal, same_bits

FORMAT = DFloat11(threads=1)


def arguments(unit: ops.CompressedUnit, out: torch.Tensor) -> list[list[torch.Tensor]]:
    return [*([getattr(unit, name)] for name in ops.ARRAYS), [out]]


@pytest.mark.parametrize("shapes", [[(3, 5)], [(0,)], [(100, 70), (7,), (0, 4)]])
def test_encode_and_decompress(shapes: list[tuple[int, ...]]) -> None:
    tensors = [torch.randn(*s).bfloat16() for s in shapes]
    unit = ops.encode(tensors)
    out = unit.decompress(torch.empty(unit.numel, dtype=torch.bfloat16))
    assert torch.equal(out.view(torch.int16), torch.cat([t.reshape(-1) for t in tensors]).view(torch.int16))
    assert unit.shapes == tuple(shapes)


def test_a_raw_unit() -> None:
    weights = torch.tensor([float("nan"), -0.0, 1.0], dtype=torch.bfloat16)
    unit = ops.encode([weights])
    assert unit.nbytes == 6
    out = unit.decompress(torch.empty(3, dtype=torch.bfloat16))
    assert torch.equal(out.view(torch.int16), weights.view(torch.int16))


def test_there_and_back() -> None:
    for weights in (torch.randn(5000).bfloat16(), torch.tensor([float("inf")]).bfloat16()):
        unit = FORMAT.encode_tensors([weights])
        back = ops.CompressedUnit.from_unit(unit, "cpu").to_unit()
        assert back.shapes == unit.shapes and back.checksum == unit.checksum
        assert all(np.array_equal(array, back.arrays[name]) for name, array in unit.arrays.items())


def test_opcheck() -> None:
    unit = ops.encode([torch.randn(500).bfloat16()])
    torch.library.opcheck(torch.ops.df11.decompress.default, arguments(unit, torch.empty(500, dtype=torch.bfloat16)))


@pytest.mark.slow
def test_the_product_of_the_tiled_layout_is_here_too() -> None:
    weights, x = normal(64, 512), normal(3, 512, seed=1)
    weight = TiledWeight.encode(weights)
    assert weight is not None
    assert same_bits(ops.linear(weight, x), torch.nn.functional.linear(x, weights))


def test_torch_compile_keeps_the_operator() -> None:
    weights = torch.randn(500).bfloat16()
    unit, out = ops.encode([weights]), torch.zeros_like(weights)
    doubled = torch.compile(lambda: unit.decompress(out) * 2, fullgraph=True)()
    assert torch.equal(doubled, weights * 2)


def test_unsound_arrays_and_outputs_are_named() -> None:
    unit = ops.encode([torch.randn(500).bfloat16()])
    with pytest.raises(FormatError, match="sign_mantissa"):
        torch.ops.df11.decompress(*arguments(unit, torch.empty(499, dtype=torch.bfloat16)))
    with pytest.raises(ValueError, match="contiguous bfloat16"):
        torch.ops.df11.decompress(*arguments(unit, torch.empty(500)))
    with pytest.raises(ValueError, match="a CUDA tensor is needed"):
        gpu.decompress(*arguments(unit, torch.empty(500, dtype=torch.bfloat16)))


def test_units_of_2_32_weights_are_refused() -> None:
    """Told by their positions, which need 64 bits."""
    unit = FORMAT.encode_tensors([torch.randn(500).bfloat16()])
    wide = replace(unit, output_positions=unit.output_positions.astype(np.uint64))
    with pytest.raises(ValueError, match=r"fewer than 2\^32; split the unit"):
        ops.CompressedUnit.from_unit(wide, "cpu")


@pytest.mark.parametrize("blocks", [[1], [17000, 17000, 4000, 4000], [5] * 40, [1] * 600, [1_000_000, 1], [3, 529]])
def test_a_launch_is_shared_out_fairly(blocks: list[int]) -> None:
    counts = gpu.share_out(blocks, 528)
    assert all(1 <= count <= b for count, b in zip(counts, blocks, strict=True))
    assert sum(counts) <= max(528, len(blocks))
    turns = max(-(-b // count) for count, b in zip(counts, blocks, strict=True))
    assert turns <= 2 + sum(blocks) * 1.05 / 528


def test_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Path, "is_file", lambda self: False)
    monkeypatch.setattr(gpu.shutil, "which", lambda name: None)
    monkeypatch.setenv("DF11_CACHE", str(tmp_path))
    with pytest.raises(gpu.GpuError, match="CUDA_HOME"):
        gpu.build("decode_fast", "sm_90")


def fake_nvcc(home: Path, body: str) -> None:
    nvcc = home / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True, exist_ok=True)
    nvcc.write_text(f"#!/bin/sh\n{body}\n")
    nvcc.chmod(0o755)


def test_builds_are_cached_and_failures_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("DF11_CACHE", str(tmp_path / "cache"))
    fake_nvcc(tmp_path, "echo 'error: no such thing' >&2; exit 2")
    with pytest.raises(gpu.GpuError, match="no such thing"):
        gpu.build("decode_fast", "sm_90")
    fake_nvcc(tmp_path, 'while [ "$1" != -o ]; do shift; done; echo made >> "$2"')
    cubin = gpu.build("decode_fast", "sm_90")
    assert cubin == gpu.build("decode_fast", "sm_90") and cubin.read_text() == "made\n"
    assert cubin != gpu.build("decode_fast", "sm_80")
    assert list((tmp_path / "cache" / "kernels").glob("tmp*")) == []


def test_an_old_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    found = SimpleNamespace(name="Tesla T4", major=7, minor=5)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: found)
    with pytest.raises(gpu.GpuError, match=r'Tesla T4.* 7\.5.* 8\.0 or newer.*device_map="cpu"'):
        gpu.Device(0)


def test_pycuda_waits_for_the_first_launch() -> None:
    code = "import sys, df11.ops, df11.released; print('pycuda' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_without_the_released_package_its_name_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert not released.is_installed()
    with pytest.raises(ModuleNotFoundError, match=r"pip install dfloat11==0\.5\.0"):
        released.encode([torch.randn(8).bfloat16()])


def test_nvcomp_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvcomp, "_path", lambda: None)
    assert not nvcomp.is_installed()
    with pytest.raises(ModuleNotFoundError, match="pip install nvidia-libnvcomp-cu13"):
        nvcomp._library.__wrapped__()
    with pytest.raises(ValueError, match="contiguous CUDA tensor"):
        nvcomp.AnsBatch.compress(torch.zeros(4))
