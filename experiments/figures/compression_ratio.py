"""Table 1 as a figure: compressed size by model, real and synthetic weights and the published numbers in panels of their own."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.figures.style import BLUE, GREY, ORANGE, load, one, published


def draw(results: Path) -> Figure:
    rows = one(load(results, "compression_ratio"), scope="model", codec="dfloat11")
    rows = rows[rows["metric"].isin(["original_bytes", "ratio_percent", "bits_per_weight"])]
    wide = rows.pivot(index=["model", "weights"], columns="metric", values="value").reset_index()
    synthetic = wide["weights"].str.startswith("synthetic")
    paper = published(results, "compression").query("version == 'v3'")
    paper = paper[~paper["model"].str.contains("FLUX|Stable")]
    panels = [
        (wide[~synthetic].sort_values("original_bytes"), "Measured, trained weights", BLUE),
        (wide[synthetic].sort_values("original_bytes"), "Measured, synthetic weights at published geometries", ORANGE),
        (
            pd.DataFrame(
                {
                    "model": paper["model"],
                    "weights": "",
                    "ratio_percent": paper["ratio_percent"],
                    "bits_per_weight": paper["bits_per_weight"],
                    "original_bytes": paper["original_gb"] * 1e9,
                }
            ).sort_values("original_bytes"),
            "Published (arXiv 2504.11651v3, Table 1)",
            GREY,
        ),
    ]
    panels = [panel for panel in panels if len(panel[0])]
    heights = [len(panel[0]) + 1.2 for panel in panels]
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(6.4, 0.24 * sum(heights) + 0.4), sharex=True, height_ratios=heights, squeeze=False
    )
    for axis, (data, title, colour) in zip(axes[:, 0], panels, strict=True):
        bars(axis, data, title, colour)
    axes[-1, 0].set_xlabel("size after compression, % of BF16")
    return figure


def bars(axis: Axes, data: pd.DataFrame, title: str, colour: str) -> None:
    # A synthetic model's name says so already.
    shown = [w if w and not m.endswith("_synthetic") else "" for m, w in zip(data["model"], data["weights"], strict=True)]
    labels = [f"{model} ({weights})" if weights else model for model, weights in zip(data["model"], shown, strict=True)]
    axis.barh(labels, data["ratio_percent"], color=colour, height=0.7)
    for y, (ratio, bits) in enumerate(zip(data["ratio_percent"], data["bits_per_weight"], strict=True)):
        axis.text(ratio + 0.6, y, f"{ratio:.2f} %, {bits:.2f} bits a weight", va="center", fontsize=7)
    axis.set_ylim(len(data) - 0.5, -0.5)
    axis.set_xlim(0, 100)
    axis.set_title(title)
    axis.tick_params(axis="y", length=0, labelsize=7)
