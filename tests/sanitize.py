"""Each kernel of the tiled layout once, on small matrices, for compute-sanitizer: `make gpu-test` runs it.

One after the other; --overlap: each may begin while the one before it ends, as they are used.
"""

import argparse
import sys
from unittest.mock import patch

import torch

from df11 import tiled_gpu
from df11.tiled_ops import TiledWeight
from tests.helpers import normal, same_bits

SHAPES = ((400, 128), (400, 4096), (333, 576))
PIECES = ((16, 16), (32, 12), (64, 8), (64, 12), (128, 8), (128, 12))  # rows of x, warps


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--overlap", action="store_true")
    tiled_gpu._kernels(0).overlap &= parser.parse_args().overlap
    wrong = []
    for shape in SHAPES:
        weights = normal(*shape, device="cuda")
        weights[shape[0] // 2, ::37], weights[9] = 7.0, 1e-30  # escaped
        weight = TiledWeight.encode(weights)
        assert weight is not None
        ids = torch.tensor([3, 9, shape[0] // 2], device="cuda")
        found = {"decompress": same_bits(weight.decompress(), weights), "rows": same_bits(weight.rows(ids), weights[ids])}
        for batch in (1, 8, 16, 32, 128, 64):
            for wgmma in (wgmma for wgmma in (True, False) if batch <= tiled_gpu.most_rows(0, wgmma)):
                found |= products(f"{batch} rows, wgmma={wgmma}", weight, weights, batch, wgmma)
        # As of larger matrices: several tiles in a row; two fours of rows of tiles a thread block, and one of all, by columns, in a
        # round with others or in one of its own.
        pieces = min(3, -(-shape[1] // (16 * weight.fragments)))
        for batch, warps in PIECES if tiled_gpu._kernels(0).wide else ():
            shared = tiled_gpu.WIDE[batch].shared(batch, warps, weight.fragments)
            with patch.object(tiled_gpu, "plan_wide", return_value=tiled_gpu.WidePlan(batch, 3, warps, 1, 2, pieces, shared)):
                tiled_gpu.prepared.cache_clear()
                found |= products(f"{batch} rows by {warps} warps in pieces", weight, weights, batch)
        tiled_gpu.prepared.cache_clear()
        torch.cuda.synchronize()
        wrong += [f"{shape}: {name}" for name, right in found.items() if not right]
    print("\n".join(wrong) or "all as expected")
    return len(wrong)


def products(what: str, weight: TiledWeight, weights: torch.Tensor, batch: int, wgmma: bool = True) -> dict[str, bool]:
    """Which are as expected, of finite activations and with an infinity: then the kernel goes on one by one, which takes long."""
    x, bias = normal(batch, weights.shape[1], seed=batch, device="cuda"), normal(weights.shape[0], device="cuda")
    y, expected = weight.linear(x, bias, wgmma).float(), x.float() @ weights.float().T + bias.float()
    found = {what: bool((y - expected).norm() < 0.01 * expected.norm())}
    x[0, 5] = float("inf")
    y, expected = weight.linear(x, bias, wgmma).float(), x.float() @ weights.float().T + bias.float()
    found[f"{what}, an infinity"] = torch.equal(y[0], expected[0])
    found[f"{what}, the others"] = bool((y[1:] - expected[1:]).norm() <= 0.01 * expected[1:].norm())
    return found


if __name__ == "__main__":
    sys.exit(main())
