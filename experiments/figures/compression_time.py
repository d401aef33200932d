"""Table 5 as a figure: encoder speed, with the published one-thread times apart."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from experiments.figures.style import BLUE, GREY, load, published


def draw(results: Path) -> Figure:
    # Of a run with a GPU only the GPU's encoder is shown: its host is another machine.
    rows = load(results, "compression_time").query("metric == 'mb_per_s_bf16' and (gpu == '-' or kernel == 'gpu')")
    median = rows.groupby(["model", "kernel", "threads", "gpu"])["value"].median().sort_index(level=["model", "kernel"])
    figure, axis = plt.subplots(figsize=(6.4, 0.3 * len(median) + 1.1))
    labels = []
    for model, kernel, threads, gpu in median.index:
        encoder = "released encoder" if kernel == "released" else "this project"
        where = gpu if kernel == "gpu" else f"{threads} {'thread' if int(threads) == 1 else 'threads'}"
        labels.append(f"{model}: {encoder}, {where}")
    colours = [GREY if kernel == "released" else BLUE for kernel in median.index.get_level_values("kernel")]
    axis.barh(labels, median, color=colours, height=0.7)
    for y, value in enumerate(median):
        axis.text(value * 1.1, y, f"{value:,.0f}" if value >= 10 else f"{value:.1f}", va="center", fontsize=7)
    axis.set_xscale("log")
    axis.set_xlim(1, median.max() * 3)
    axis.invert_yaxis()
    axis.tick_params(axis="y", length=0, labelsize=7)
    paper = published(results, "compression_time").set_index("model")["seconds_per_block_one_thread"]["Llama 3.1 8B Instruct"]
    axis.set_xlabel("MB of BF16 encoded a second")
    axis.set_title(f"One transformer block (published: {paper} s for Llama 3.1 8B, one thread)", x=-0.6)
    return figure
