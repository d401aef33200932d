"""Fig. 6: forward and decompression of embedding, transformer block and lm_head over the tokens of a batch, a panel each."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from experiments.figures.style import BLUE, GREEN, GREY, ORANGE, PURPLE, load, one

CURVES = {  # metric, kernel: label, colour
    ("forward_ms", "tiled"): ("forward, fused", PURPLE),
    ("forward_ms", "cpu"): ("forward, fused, CPU", PURPLE),
    ("decompression_ms", "fast"): ("decompression, fast kernel", BLUE),
    ("decompression_ms", "paper"): ("decompression, the paper's algorithm", GREEN),
    ("decompression_ms", "released"): ("decompression, released kernel", ORANGE),
    ("decompression_ms", "cpu"): ("decompression, CPU", BLUE),
}


def draw(results: Path) -> Figure:
    rows = load(results, "latency_breakdown")
    (model,) = rows["model"].unique()
    components = ("embedding", "block", "lm_head")
    figure, axes = plt.subplots(1, len(components), figsize=(2.7 * len(components), 3.2), sharey=True, squeeze=False)
    for axis, component in zip(axes[0], components, strict=True):
        own = one(rows, component=component).astype({"batch_size": int})
        median = own.groupby(["metric", "kernel", "batch_size"])["value"].median()
        forward = median["forward_ms", "-"]
        axis.plot(forward.index, forward, color=GREY, marker=".", label="forward, BF16 weights")
        for which, (label, colour) in CURVES.items():
            if which in median.index.droplevel("batch_size"):
                curve = median[which]
                axis.plot(curve.index, curve, color=colour, marker=".", label=label)
        axis.set(xscale="log", yscale="log", xlabel="tokens", title=component)
    axes[0][0].set_ylabel("ms")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=7)
    (where,) = rows["gpu"].unique()
    figure.suptitle(f"{model}, {where if where != '-' else 'CPU'}, synthetic weights", fontsize=9, x=0, ha="left")
    return figure
