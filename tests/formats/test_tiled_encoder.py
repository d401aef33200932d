"""The torch encoder of the tiled layout against the numba one."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from df11 import bits
from df11.formats import tiled_encoder
from df11.formats.tiled import Tiled
from tests.helpers import normal, patterns

FORMAT = Tiled()


def check(weights: torch.Tensor) -> bool:
    """Whether it is compressed; the arrays must be the same."""
    unit = FORMAT.encode_tensors([weights])
    (matrix,) = unit.matrices
    counts = tiled_encoder.histogram(weights)
    assert np.array_equal(counts, bits.histogram(bits.to_bits(weights.reshape(-1))))
    found = tiled_encoder.encode(weights, unit.code)
    if matrix.raw is not None:
        assert found is None
        return False
    assert found is not None and found.keys() == matrix.arrays.keys()
    for name, array in matrix.arrays.items():
        assert tuple(found[name].shape) == array.shape, name
        assert np.array_equal(found[name].numpy().view(np.uint8), array.view(np.uint8)), name
    return True


@pytest.mark.parametrize("chunk", [1, 20_000, 1 << 24])
def test_shapes(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(tiled_encoder, "CHUNK", chunk)
    monkeypatch.setattr(tiled_encoder, "COUNTED", max(chunk, 5000))
    for shape in [(16, 128), (48, 576), (33, 2304), (64, 3840), (100, 300), (3, 20, 192), (160, 512)]:
        assert check(normal(*shape)), shape
    for shape in [(1, 4096), (17, 257), (4096, 1), (300, 1), (5000,), (), (0, 300), (300, 0)]:
        assert not check(normal(*shape)), shape


def test_all_patterns() -> None:
    everything = patterns(np.arange(1 << 16), (256, 256))
    assert not check(everything)
    assert check(torch.cat([normal(2048, 256), everything]))


@pytest.mark.parametrize("value", [0.0, -0.0, 1.5, float("inf"), float("nan"), 1e-40])
def test_one_symbol(value: float) -> None:
    assert check(torch.full((64, 500), value, dtype=torch.bfloat16))


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 70), st.integers(1, 700), st.floats(1e-30, 1e30), st.integers(2, 128), st.integers(0, 1 << 30))
def test_any_size_and_distribution(rows: int, columns: int, std: float, symbols: int, seed: int) -> None:
    check(normal(rows, columns, std=std, seed=seed))
    generator = np.random.default_rng(seed)
    uppers = generator.choice(128, symbols, replace=False)
    values = generator.choice(uppers, rows * columns, p=generator.dirichlet(np.full(symbols, 0.3))) << 8
    values |= generator.integers(0, 256, values.size) | generator.integers(0, 2, values.size) << 15
    check(patterns(values, (rows, columns)))
