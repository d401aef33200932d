"""Table 2: what was compared and what of it differs, scores of lm-eval on both sides, and the published scores."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from experiments.figures.style import load, published

KINDS = {
    "weights": ["weights"],
    "logits": ["prefill", "decode"],
    "ids, greedy and sampled": ["greedy", "sampled"],
    "lm-eval samples": ["lm_eval"],
}
SCORES = ("acc", "word_perplexity")
STORED = {"bf16": "BF16", "dfloat11": "DFloat11, mode=exact", "tiled": "tiled, mode=fused"}


def draw(results: Path) -> Figure:
    rows = load(results, "losslessness")
    counts, scores, paper = counted(rows), scored(rows), published(results, "losslessness")
    paper = paper.drop(columns=["version", "source"]).set_index(["model", "type"]).map(lambda v: f"{v:.2f}")
    paper.columns = [str(name).replace("_", " ") for name in paper.columns]
    paper.index = [", ".join(key) for key in paper.index]
    tables = {
        "Differ, of so many compared": counts,
        "Scores on small local fixtures (they say nothing about a model; that a GPU's are equal does)": scores,
        "Published, trained weights": paper,
    }
    tables = {title: table for title, table in tables.items() if len(table)}
    heights = [len(table) + 2.5 for table in tables.values()]
    figure, axes = plt.subplots(len(tables), 1, figsize=(9.6, 0.24 * sum(heights)), height_ratios=heights, squeeze=False)
    for axis, (title, table) in zip(axes.flat, tables.items(), strict=True):
        show(axis, title, table)
    return figure


def counted(rows: pd.DataFrame) -> pd.DataFrame:
    """A line for each mode, model and GPU; sums over prompts, launches and granularities."""
    differing = rows["metric"].str.endswith("_mismatches")
    rows = rows[differing | (rows["metric"] == "compared")].assign(differing=differing)
    lines = {}
    for (mode, model, weights, gpu), own in rows.groupby(["mode", "model", "weights", "gpu"], sort=False):
        cells = {}
        for kind, phases in KINDS.items():
            of = own[own["phase"].isin(phases)].groupby("differing")["value"].sum()
            cells[kind] = f"{of[True]:,.0f} of {of[False]:,.0f}" if len(of) else ""
        lines[f"{mode}: {model} ({weights}), {gpu if gpu != '-' else 'CPU'}"] = cells
    return pd.DataFrame.from_dict(lines, orient="index")


def scored(rows: pd.DataFrame) -> pd.DataFrame:
    own = rows[rows["metric"].isin(SCORES) & (rows["phase"] == "lm_eval")]
    own = own.assign(task=own["task"].str.removesuffix("_fixture").str.replace("_", "\n"))
    wide = own.pivot_table(index=["model", "gpu", "codec"], columns="task", values="value", sort=False)
    wide.index = [f"{model}, {STORED[codec]}, {gpu if gpu != '-' else 'CPU'}" for model, gpu, codec in wide.index]
    return wide.map(lambda v: f"{v:.4g}")


def show(axis: Axes, title: str, table: pd.DataFrame) -> None:
    axis.set_axis_off()
    axis.set_title(title, fontsize=8)
    lines = max(str(name).count("\n") + 1 for name in table.columns)
    cell = 1 / (len(table) + lines)
    place, edges = Bbox.from_bounds(0.32, 0, 0.68, 1), "horizontal"
    texts, left, top = table.to_numpy().tolist(), list(table.index), list(table.columns)
    drawn = axis.table(texts, rowLabels=left, colLabels=top, bbox=place, edges=edges)
    drawn.auto_set_font_size(False)
    drawn.set_fontsize(6)
    for (row, _), one in drawn.get_celld().items():
        one.set_height(cell * (lines if row == 0 else 1))
        one.set_linewidth(0.3)
