"""Fig. 4: tokens/s and seconds a step by batch size under a memory budget: a panel a measured model, published ones apart."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.figures.style import BLUE, GREY, ORANGE, PURPLE, VERMILLION, load, powers_of_two, published

CURVES = {  # codec, placement: label, colour, line
    ("bf16", "accelerate"): ("BF16, CPU offload by accelerate", VERMILLION, "-"),
    ("bf16", "offload"): ("BF16, blocks prefetched from pinned memory", ORANGE, "-"),
    ("dfloat11", "offload"): ("DFloat11, blocks prefetched from pinned memory", BLUE, "--"),
    ("dfloat11", "resident"): ("DFloat11, all on the GPU", BLUE, "-"),
    ("tiled", "resident"): ("tiled, fused, all on the GPU", PURPLE, "-"),
}
METRICS = {"tokens_per_s": "tokens a second", "s_per_step": "seconds a step"}


def draw(results: Path) -> Figure:
    rows = load(results, "offload").query("metric in @METRICS and granularity != 'layer'")
    rows = rows.astype({"batch_size": int, "tokens": int})
    key = ["model", "weights", "gpu", "memory_mib", "codec", "placement", "metric", "tokens", "batch_size"]
    median = rows.groupby(key)["value"].median()
    paper, short = published(results, "offload"), rows["tokens"].min()
    panels = list(dict.fromkeys(zip(*(rows[c] for c in key[:4]), strict=True)))
    papers = list(dict.fromkeys(zip(paper["model"], paper["gpu"], strict=True)))
    across = max(len(panels), len(papers))
    figure, axes = plt.subplots(4, across, figsize=(2.6 * across, 10), sharex=True, sharey="row", squeeze=False)
    named: dict[str, Artist] = {}
    for line, metric in enumerate(METRICS):
        for axis, panel in zip(axes[line], panels, strict=False):
            for (codec, placement), (label, colour, style) in CURVES.items():
                if (*panel, codec, placement) not in median.index.droplevel(["metric", "tokens", "batch_size"]):
                    continue
                curves = median[(*panel, codec, placement, metric)]
                for tokens, curve in curves.groupby(level="tokens"):
                    curve = curve.droplevel("tokens")
                    if tokens == short:
                        (named[label],) = axis.plot(curve.index, curve, style, color=colour, marker=".")
                    else:
                        (named[f"{label}, {tokens} tokens"],) = axis.plot(curve.index, curve, "x", color=colour)
            model, weights, gpu, memory = panel
            finish(
                axis, f"Measured, {model}" + ("" if model.endswith("_synthetic") else f" ({weights})") + f"\n{gpu}, {memory} MiB"
            )
        for axis, (model, gpu) in zip(axes[2 + line], papers, strict=False):
            own = paper[(paper["model"] == model) & (paper["gpu"] == gpu)]
            for name, label, colour in (("bf16_offload", "BF16, CPU offload", GREY), ("df11", "DFloat11", BLUE)):
                x, y = own["batch_size"], own[f"{name}_{metric}"]
                (named[f"published: {label}"],) = axis.plot(x, y, color=colour, marker=".")
            finish(axis, f"Published, {model}\n{gpu}")
        for row in (line, 2 + line):
            axes[row][0].set_ylabel(METRICS[metric])
    for row, used in ((1, panels), (3, papers)):
        for axis in axes[row][: len(used)]:
            axis.set_xlabel("batch size")
            axis.tick_params(labelbottom=True)
    for row, used in enumerate((panels, panels, papers, papers)):
        for axis in axes[row][len(used) :]:
            axis.set_axis_off()
    figure.legend(list(named.values()), list(named), fontsize=7, ncols=2, handlelength=3.5, loc="outside lower center")
    return figure


def finish(axis: Axes, title: str) -> None:
    powers_of_two(axis.xaxis)
    axis.set_yscale("log")
    axis.set_title(title, fontsize=7)
