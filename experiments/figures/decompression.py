"""Fig. 7: decompression speed by matrix size. Measured curves, a panel a GPU; the published A100 and A5000 curves apart."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.figures.style import BLUE, GREEN, GREY, ORANGE, PURPLE, VERMILLION, load, powers_of_two, published

CURVES = {  # codec, kernel: label, colour, line
    ("bf16", "copy"): ("device copy", GREY, ":"),
    ("dfloat11", "fast"): ("DFloat11, fast kernel", BLUE, "-"),
    ("dfloat11", "paper"): ("DFloat11, the paper's algorithm", GREEN, "-"),
    ("dfloat11", "released"): ("DFloat11, released kernel", ORANGE, "-"),
    ("tiled", "tiled"): ("tiled layout", BLUE, "--"),
    ("nvcomp_ans_exponents", "nvcomp"): ("nvCOMP ANS, exponents only, not merged", PURPLE, "--"),
    ("nvcomp_ans", "nvcomp"): ("nvCOMP ANS, half-precision mode", PURPLE, "-"),
    ("nvcomp_ans_bytes", "nvcomp"): ("nvCOMP ANS, bytes", PURPLE, ":"),
    ("bf16", "cpu_to_gpu_pinned"): ("from CPU, pinned", VERMILLION, "-"),
    ("bf16", "cpu_to_gpu_pageable"): ("from CPU, pageable", VERMILLION, "--"),
}
PUBLISHED = {
    "df11": ("DFloat11", GREEN, "-"),
    "nvcomp_ans": ("nvCOMP ANS", PURPLE, "-"),
    "cpu_to_gpu": ("from CPU", VERMILLION, "-"),
}


def draw(results: Path) -> Figure:
    rows = load(results, "decompression").query("metric == 'gb_per_s_bf16_output' and columns == 4096 and gpu != '-'")
    rows = rows[rows["unit_kind"] == "matrix"]
    median = rows.groupby(["gpu", "codec", "kernel", "rows"])["value"].median()
    paper = published(results, "decompression")
    gpus, published_gpus = list(dict.fromkeys(rows["gpu"])), list(dict.fromkeys(paper["gpu"]))
    count = len(gpus) + len(published_gpus)
    figure, axes = plt.subplots(1, count, figsize=(2.9 * count, 4.0), sharey=True, squeeze=False)
    for axis, gpu in zip(axes[0], gpus, strict=False):
        for (codec, kernel), (label, colour, line) in CURVES.items():
            if (gpu, codec, kernel) in median.index.droplevel("rows"):
                curve = median[gpu, codec, kernel]
                axis.plot(curve.index, curve, line, color=colour, marker=".", label=label)
        finish(axis, f"Measured, {gpu}, synthetic weights")
    for axis, gpu in zip(axes[0][len(gpus) :], published_gpus, strict=True):
        for method, (label, colour, line) in PUBLISHED.items():
            curve = paper[(paper["gpu"] == gpu) & (paper["method"] == method)]
            if len(curve):
                axis.plot(curve["out_features"], curve["gb_per_s"], line, color=colour, marker=".", label=label)
        finish(axis, f"Published, {gpu}")
    axes[0][0].set_ylabel("GB/s of BF16 output")
    return figure


def finish(axis: Axes, title: str) -> None:
    powers_of_two(axis.xaxis)
    axis.tick_params(axis="x", labelsize=6)
    axis.set_yscale("log")
    axis.set_xlabel("rows of a matrix of 4096 columns")
    axis.set_title(title, fontsize=8)
    axis.legend(fontsize=6, loc="upper center", bbox_to_anchor=(0.5, -0.18), handlelength=3)
