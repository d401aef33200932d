"""Table 5 as a figure: seconds to encode one transformer block, of synthetic and trained weights, and as published."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from experiments.figures.style import BLUE, GREY, load, published

METRICS = ["seconds_per_block", "mb_per_s_bf16"]


def draw(results: Path) -> Figure:
    # Of a run with a GPU only the GPU's encoder is shown: its host is another machine.
    rows = load(results, "compression_time").query("metric in @METRICS and (gpu == '-' or kernel == 'gpu')")
    key = ["model", "weights", "kernel", "threads", "gpu"]
    median = rows.pivot_table(index=key, columns="metric", values="value", aggfunc="median").reset_index()
    synthetic = median["model"].str.endswith("_synthetic")
    panels = {
        "Measured, synthetic weights": lines(median[synthetic]),
        "Measured, trained weights": lines(median[~synthetic]),
        "Published, trained weights": [
            (f"{model}: released encoder, 1 thread", seconds, f"{seconds} s", GREY)
            for model, seconds in published(results, "compression_time")[["model", "seconds_per_block_one_thread"]].to_numpy()
        ],
    }
    panels = {title: bars for title, bars in panels.items() if bars}
    counts = [len(bars) for bars in panels.values()]
    size = (7.0, 0.3 * sum(counts) + 0.5 * len(counts) + 0.5)
    figure, axes = plt.subplots(len(panels), 1, figsize=size, sharex=True, height_ratios=counts, squeeze=False)
    for axis, (title, bars) in zip(axes[:, 0], panels.items(), strict=True):
        for y, (_, seconds, text, colour) in enumerate(bars):
            axis.barh(y, seconds, color=colour, height=0.7)
            axis.text(seconds * 1.1, y, text, va="center", fontsize=7)
        axis.set_yticks(range(len(bars)), [bar[0] for bar in bars])
        axis.invert_yaxis()
        axis.tick_params(axis="y", length=0, labelsize=7)
        axis.set_title(title)
    axes[-1, 0].set_xscale("log")
    axes[-1, 0].set_xlim(right=30 * max(bar[1] for bars in panels.values() for bar in bars))
    axes[-1, 0].set_xlabel("seconds to encode a transformer block")
    return figure


def lines(rows: pd.DataFrame) -> list[tuple[str, float, str, str]]:
    """Label, seconds, text and colour of each bar."""
    out = []
    for row in rows.itertuples():
        released = row.kernel == "released"
        where = row.gpu if row.kernel == "gpu" else f"{row.threads} {'thread' if int(row.threads) == 1 else 'threads'}"
        weights = "" if row.model.endswith("_synthetic") else f" ({row.weights})"
        label = f"{row.model}{weights}: {'released encoder' if released else 'this project'}, {where}"
        text = f"{row.seconds_per_block:.3g} s, {row.mb_per_s_bf16:,.{0 if row.mb_per_s_bf16 >= 10 else 1}f} MB/s"
        out.append((label, row.seconds_per_block, text, GREY if released else BLUE))
    return out
