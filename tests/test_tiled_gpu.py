"""The kernels of the tiled layout on a GPU against the CPU format, float64 products and cuBLAS."""

import time
from functools import partial

import numpy as np
import pytest
import torch
from torch.nn.functional import linear

from df11 import dispatch, gpu, tiled_gpu
from df11.formats.tiled import Tiled
from df11.tiled_ops import ARRAYS, TiledWeight
from tests import helpers
from tests.helpers import same_bits

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not gpu.is_available(), reason="needs a GPU, pycuda and nvcc")]

normal = partial(helpers.normal, device="cuda")
SHAPES = [
    (400, 128),
    (700, 300),
    (100, 2304),
    (333, 576),
    (4096, 576),
    (150, 1600),
    (1000, 5376),
    (64, 8192),
    (130, 3840),
    (4096, 4096),
]
SHAPES += [(200, 14336), (100, 53248)]


def encode(weights: torch.Tensor) -> TiledWeight:
    weight = TiledWeight.encode(weights)
    assert weight is not None
    return weight


def takes(batch: int, wgmma: bool = True) -> None:
    if batch > tiled_gpu.most_rows(0, wgmma):
        pytest.skip(f"a product takes {tiled_gpu.most_rows(0, wgmma)} rows")


def with_escapes(shape: tuple[int, int], finite: bool = False) -> torch.Tensor:
    """Every 37th weight of one row, a row of tiny weights; unless all are to be finite, an Inf and a NaN."""
    weights = normal(*shape, seed=shape[1])
    weights[shape[0] // 2, ::37], weights[9] = 7.0, 1e-30
    if not finite:
        weights[3, 5], weights[5, 7] = float("inf"), float("nan")
    return weights


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_encoder_decoder_and_rows(shape: tuple[int, int]) -> None:
    weights = with_escapes(shape)
    weight = encode(weights)
    unit = Tiled().encode_tensors([weights.cpu()])
    for name in ARRAYS[:-1]:
        assert np.array_equal(getattr(weight, name).cpu().numpy().view(np.uint8), unit.matrices[0].arrays[name].view(np.uint8)), (
            name
        )
    assert same_bits(weight.decompress(), weights)
    ids = torch.tensor([[0, shape[0] - 1, 9], [3, 5, shape[0] // 2]], device="cuda")
    assert same_bits(weight.rows(ids), weights[ids])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products(shape: tuple[int, int]) -> None:
    weights = with_escapes(shape)
    weight, bias = encode(weights), normal(shape[0], seed=1)
    x = normal(1, shape[1], seed=2)
    y = weight.linear(x, bias)
    assert all(same_bits(weight.linear(x, bias), y) for _ in range(3))
    exact = (x.double() @ weights.double().T + bias.double())[0]
    finite = torch.isfinite(weights.float()).all(1)
    cublas = linear(x, weights, bias)[0].double()
    assert (y[0].double() - exact)[finite].norm() <= 1.1 * (cublas - exact)[finite].norm()
    assert torch.equal(torch.isnan(y[0][~finite]), torch.isnan(exact[~finite]))


@pytest.mark.parametrize("finite", [True, False])
@pytest.mark.parametrize("batch", [2, 7, 8, 9, 16, 31, 33, 50, 64, 65, 100, 128])
@pytest.mark.parametrize("shape", [*SHAPES[:1], *SHAPES[2:], (20_000, 4096)], ids=str)
def test_products_of_several_rows(shape: tuple[int, int], batch: int, finite: bool) -> None:
    takes(batch)
    weights = with_escapes(shape, finite)
    weight, bias = encode(weights), normal(shape[0], seed=1)
    x = normal(batch, shape[1], seed=2)
    exact = x.double() @ weights.double().T + bias.double()
    finite = torch.isfinite(weights.float()).all(1)
    cublas = linear(x, weights, bias).double()
    for wgmma in (True, False) if tiled_gpu.has_both(batch, 0) else (True,):
        y = weight.linear(x, bias, wgmma)
        assert same_bits(weight.linear(x, bias, wgmma), y)
        assert (y.double() - exact)[:, finite].norm() <= 1.1 * (cublas - exact)[:, finite].norm()
        assert torch.equal(torch.isnan(y[:, ~finite]), torch.isnan(exact[:, ~finite]))


@pytest.mark.parametrize("shape", [(6144, 4096), (4096, 4096), (4096, 14336)], ids=str)
def test_errors_are_no_larger_than_cublas(shape: tuple[int, int]) -> None:
    weights = normal(*shape)
    weight, own, theirs = encode(weights), 0.0, 0.0
    for seed in range(16):
        x = torch.randn(1, shape[1], device="cuda", generator=torch.Generator("cuda").manual_seed(seed)).bfloat16()
        exact = x.double() @ weights.double().T
        own += float((weight.linear(x).double() - exact).square().sum())
        theirs += float((linear(x, weights).double() - exact).square().sum())
    assert own <= 1.05**2 * theirs


def test_all_patterns() -> None:
    everything = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).view(256, 256).cuda()
    weights = torch.cat([normal(2048, 256), everything])
    weight = encode(weights)
    assert same_bits(weight.decompress(), weights)
    assert same_bits(weight.rows(torch.arange(2048, 2304, device="cuda")), everything)


@pytest.mark.parametrize("wgmma", [True, False])
@pytest.mark.parametrize("batch", [1, 8, 16, 64, 128])
def test_products_of_all_patterns(batch: int, wgmma: bool) -> None:
    """Each row has another pattern, and a row of x takes one column: that column's weights are what comes out."""
    takes(batch, wgmma)
    weights, at = normal(1 << 16, 256), torch.arange(1 << 16, device="cuda")
    weights[at, at % 256] = at.to(torch.int32).to(torch.int16).view(torch.bfloat16)
    weight = encode(weights)
    finite = weights.isfinite().all(1)
    for x in torch.eye(256, device="cuda").bfloat16().split(batch):
        y, expected = weight.linear(x, wgmma=wgmma), linear(x, weights)
        assert torch.equal(
            y[:, finite], (x.float() @ weights[finite].float().T).bfloat16()
        )  # -0 and 0 are equal: sums of both are 0
        assert torch.equal(y.nan_to_num(nan=1e30), expected.nan_to_num(nan=1e30))


@pytest.mark.parametrize("more", [3, 9, 20, 50, 100])
@pytest.mark.parametrize("columns", [300, 4096])
@pytest.mark.parametrize("values", [["inf"], ["-inf", "inf"], ["nan"]])
def test_activations_that_are_not_finite(columns: int, values: list[str], more: int) -> None:
    """What float32 gives: they must not meet the zeros that stand for escaped weights, nor those of the padding."""
    weights = normal(500, columns)
    weights[::3, 5], weights[7] = 1e-30, 0.0
    weights[11, 6] = float("inf")
    x = normal(1, columns, seed=1)
    for place, value in zip((5, 17), values, strict=False):
        x[0, place] = float(value)
    y = encode(weights).linear(x)[0].float()
    expected = (x.float() * weights.float()).sum(1)
    assert torch.equal(torch.isnan(y), torch.isnan(expected))
    whole = ~torch.isnan(expected)
    assert torch.equal(y[whole], expected[whole])  # infinities
    several = torch.cat([normal(2, columns, seed=3), x, normal(more, columns, seed=4)])
    rest = several.float() @ weights.float().T
    others = torch.arange(len(rest)) != 2
    for wgmma in (wgmma for wgmma in (True, False) if len(several) <= tiled_gpu.most_rows(0, wgmma)):
        among = encode(weights).linear(several, wgmma=wgmma).float()
        assert torch.equal(torch.isnan(among[2]), torch.isnan(expected))
        assert torch.equal(among[2][whole], expected[whole])
        assert (among - rest)[others].nan_to_num(0, 0, 0).norm() < 0.01 * rest[others].nan_to_num(0, 0, 0).norm()


@pytest.mark.parametrize("whole", [1, 2, 3])
@pytest.mark.parametrize("batch", [33, 64, 128])
def test_an_infinity_where_fours_are_dealt_in_pieces(batch: int, whole: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One, two and three fours a thread block, and its part of another: in a round with others, or in one of its own."""
    takes(batch)
    kernels = tiled_gpu._kernels(0)
    blocks = kernels.device.processors
    rows = (whole * blocks + 30) * 64 - 17
    weights, x = normal(rows, 1024), normal(batch, 1024, seed=1)
    weights[rows - 20 :, 6] = 1e-30  # in a four that is dealt
    x[3, 5:7] = float("inf")
    weight = encode(weights)
    if kernels.wide:
        size = min(size for size in tiled_gpu.WIDE if size >= batch)
        kernel = tiled_gpu.WIDE[size]
        warps = 4 * (kernel.warpgroups if whole == 1 else whole)
        shared = kernel.shared(size, warps, weight.fragments)
        how = tiled_gpu.WidePlan(size, blocks, warps, 1, whole, 2, shared)
        monkeypatch.setattr(tiled_gpu, "plan_wide", lambda *arguments: how)
        tiled_gpu.prepared.cache_clear()
    y, expected = weight.linear(x).float(), x.float() @ weights.float().T
    tiled_gpu.prepared.cache_clear()
    assert torch.equal(y[3].isnan(), expected[3].isnan()) and torch.equal(y[3].isposinf(), expected[3].isposinf())
    others = torch.arange(batch) != 3
    assert (y - expected)[others].norm() < 0.01 * expected[others].norm()


@pytest.mark.parametrize("rows", [1, 8, 16, 64, 128])
def test_each_product_waits_for_the_one_before(rows: int) -> None:
    """They begin early, so x must not be read too soon nor y written: a chain in a graph against one kernel at a time."""
    takes(rows)
    first, second = encode(normal(4096, 4096)), encode(normal(4096, 4096, seed=1))
    start = torch.randn(rows, 4096, device="cuda").bfloat16()
    x, wanted = start.clone(), start.clone()

    def both(x: torch.Tensor) -> torch.Tensor:
        return second.linear(first.linear(x)).mul(0.5)

    both(x)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for _ in range(8):
            x.copy_(both(x))
    x.copy_(start)
    graph.replay()
    for _ in range(8):
        torch.cuda.synchronize()
        middle = first.linear(wanted)
        torch.cuda.synchronize()
        wanted = second.linear(middle).mul(0.5)
    assert torch.isfinite(wanted).all()
    assert same_bits(x, wanted)


@pytest.mark.parametrize("shape", [(1000, 5376), (333, 576)], ids=str)
def test_products_in_slices(shape: tuple[int, int]) -> None:
    weights = with_escapes(shape)
    weight, bias = encode(weights), normal(shape[0], seed=1)
    assert same_bits(weight.part(160, shape[0]).decompress(), weights[160:])
    weight = encode(weights.nan_to_num(0, 0, 0))
    for batch in (1, 200):
        x = normal(batch, shape[1], seed=2)
        wanted = linear(x, weights.nan_to_num(0, 0, 0), bias).float()
        for rows in (16, 144, 1008):
            assert (dispatch.sliced(weight, x, bias, rows).float() - wanted).norm() < 0.01 * wanted.norm()
    wanted = linear(x, weights.nan_to_num(0, 0, 0), bias)[:100].float()
    assert (dispatch.fused(weight, x[:100], bias).float() - wanted).norm() < 0.01 * wanted.norm()
    assert same_bits(dispatch.linear(weight, x, bias), dispatch.linear(weight, x, bias))


def test_more_than_2_31_weights() -> None:
    weights = normal(64, 4096).repeat((1 << 31) // (64 * 4096) + 1, 1)
    assert weights.numel() > 1 << 31
    weights[-1] = 1.25
    weight = encode(weights)
    assert same_bits(weight.decompress(), weights)
    x = normal(1, 4096, seed=1)
    y = weight.linear(x)[0]
    assert same_bits(y[:64], y[-128:-64])
    assert same_bits(weight.rows(torch.tensor([len(weights) - 1], device="cuda")), weights[-1:])
    y = weight.linear(normal(16, 4096, seed=2))
    assert same_bits(y[:, :64], y[:, -128:-64])


def test_time_of_the_host_does_not_count() -> None:
    weight, x = encode(normal(4096, 4096)), normal(16, 4096)

    def slow(weight: TiledWeight) -> torch.Tensor:
        time.sleep(2e-3)
        return weight.linear(x)

    assert dispatch._seconds(slow, weight, x.device) < 1e-3


def test_what_does_not_fit_is_refused() -> None:
    weight = encode(normal(64, 512))
    with pytest.raises(ValueError, match="float32"):
        weight.linear(torch.zeros(1, 512, device="cuda"))
    most = tiled_gpu.most_rows(0)
    with pytest.raises(ValueError, match=f"1 to {most} rows"):
        weight.linear(torch.zeros(most + 1, 512, device="cuda", dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="mode=exact"):
        tiled_gpu.plan(64, 200_000, 32, 132, 197_000, 35_000)
    with pytest.raises(ValueError, match="not those of a matrix"):
        torch.ops.df11.tiled_rows(torch.tensor([0], device="cuda"), weight.arrays, weight.uppers, 80, 512)
