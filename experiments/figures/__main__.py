"""`python -m experiments.figures [results]`: redraw every figure from the committed tables, and the index's commits."""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib.pyplot as plt

from experiments.figures import (
    capacity,
    compression_ratio,
    compression_time,
    decompression,
    exponent_entropy,
    generation_length,
    index,
    latency_breakdown,
    linear,
    losslessness,
    offload,
    same_gpu,
    style,
)

FIGURES = {
    "compression_ratio": compression_ratio.draw,
    "losslessness": losslessness.draw,
    "exponent_entropy": exponent_entropy.draw,
    "compression_time": compression_time.draw,
    "decompression": decompression.draw,
    "offload": offload.draw,
    "generation_length": generation_length.draw,
    "latency_breakdown": latency_breakdown.draw,
    "same_gpu": same_gpu.draw,
    "capacity": capacity.draw,
    "linear": linear.draw,
}


def main(results: Path) -> None:
    style.use()
    for name, draw in FIGURES.items():
        figure = draw(results)
        style.save(figure, results / "figures" / name)
        plt.close(figure)
        print(f"{results / 'figures' / name}.pdf, .png")
    index.stamp(results)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "results"))
