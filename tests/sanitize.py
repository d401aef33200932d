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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--overlap", action="store_true")
    tiled_gpu._kernels(0).overlap &= parser.parse_args().overlap
    wrong = []
    for shape in ((400, 128), (400, 4096), (333, 576)):
        weights = normal(*shape, device="cuda")
        weights[shape[0] // 2, ::37], weights[9] = 7.0, 1e-30  # escaped
        weight = TiledWeight.encode(weights)
        assert weight is not None
        ids = torch.tensor([3, 9, shape[0] // 2], device="cuda")
        found = {"decompress": same_bits(weight.decompress(), weights), "rows": same_bits(weight.rows(ids), weights[ids])}
        bias = normal(shape[0], device="cuda")
        for batch in (1, 8, 16, 32, 128, 64):
            for wgmma in (wgmma for wgmma in (True, False) if batch <= tiled_gpu.most_rows(0, wgmma)):
                x = normal(batch, shape[1], seed=batch, device="cuda")
                y, expected = weight.linear(x, bias, wgmma).float(), x.float() @ weights.float().T + bias.float()
                found[f"{batch} rows, wgmma={wgmma}"] = bool((y - expected).norm() < 0.01 * expected.norm())
                x[0, 5] = float("inf")
                y, expected = weight.linear(x, bias, wgmma).float(), x.float() @ weights.float().T + bias.float()
                found[f"{batch} rows with an infinity, wgmma={wgmma}"] = torch.equal(y[0], expected[0])
        # As of many rows: two fours of rows of tiles a thread block, one of all, by columns, in a round with others or of its own.
        for batch, warps in ((64, 8), (64, 12), (128, 8), (128, 12)) if tiled_gpu._kernels(0).wide else ():
            x, pieces = normal(batch, shape[1], seed=batch, device="cuda"), min(3, -(-shape[1] // (16 * weight.fragments)))
            shared = tiled_gpu.WIDE[batch].shared(batch, warps, weight.fragments)
            with patch.object(tiled_gpu, "plan_wide", return_value=tiled_gpu.WidePlan(batch, 3, warps, 1, 2, pieces, shared)):
                for name, value in {"": 1.0, " with an infinity": float("inf")}.items():
                    x[0, 5] = value
                    y, expected = weight.linear(x, bias).float(), x.float() @ weights.float().T + bias.float()
                    what = f"{batch} rows by {warps} warps in pieces{name}"
                    found[what] = bool((y[1:] - expected[1:]).norm() < 0.01 * expected[1:].norm())
            found[what] &= torch.equal(y[0], expected[0])
        torch.cuda.synchronize()
        wrong += [f"{shape}: {name}" for name, right in found.items() if not right]
    print("\n".join(wrong) or "all as expected")
    return len(wrong)


if __name__ == "__main__":
    sys.exit(main())
