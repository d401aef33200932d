"""Products of one linear layer: speedup over cuBLAS by shape at batch 1, and over batch sizes where several were measured."""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.figures.index import measured_on
from experiments.figures.style import BLUE, GREEN, GREY, ORANGE, PURPLE, load, one, powers_of_two

BARS = {  # codec, mode: label, colour
    ("tiled", "fused"): ("tiled, fused", PURPLE),
    ("glyd_mma12", "fused"): ("glyd mma12, 12 bits", ORANGE),
    ("nwc", "fused"): ("neural-weight-compression", GREEN),
    ("tiled", "exact"): ("tiled, decompressed, then cuBLAS", BLUE),
}
CURVES = {("tiled", "dispatch"): "-", ("tiled", "exact"): "--"}  # codec, mode (dispatch: the way that is chosen): line


def draw(results: Path) -> Figure:
    """A row a GPU."""
    rows = load(results, "linear").astype({"rows": int, "columns": int, "batch_size": int})
    rows = rows[(rows["codec"] != "bf16") & ~rows["kernel"].isin(["mma", "sliced"])]
    rows["mode"] = rows["mode"].where(rows["kernel"] != "dispatch", "dispatch")
    several, gpus = rows["batch_size"].nunique() > 1, rows["gpu"].unique()
    tallest = max(len(own[["rows", "columns"]].drop_duplicates()) for _, own in rows.groupby("gpu"))
    size = 6.0 + 4.0 * several, max(3.0, 1.3 + 0.3 * tallest) * len(gpus)
    figure, axes = plt.subplots(len(gpus), 1 + several, figsize=size, sharex="col", squeeze=False)
    key = ["rows", "columns", "batch_size"]
    for (left, *right), gpu in zip(axes, gpus, strict=True):
        own = rows[rows["gpu"] == gpu]
        speedup = one(own, metric="speedup_vs_cublas").set_index(["codec", "mode", *key])["value"].sort_index()
        bits = one(own, metric="bits_per_weight", codec="tiled").set_index(key)["value"]
        shapes = sorted({(r, c) for r, c, _ in bits.index}, key=math.prod)
        bars(left, speedup, bits, shapes)
        left.set_title(f"{gpu if gpu != '-' else 'CPU'}\nBatch 1, numbers: bits a weight", fontsize=8)
        for axis in right:
            curves(axis, speedup, shapes)
        for axis in (left, *right):
            axis.tick_params(labelbottom=True)
    if several:
        for axis in axes[:, 1]:
            axis.set_ylim(min(a.get_ylim()[0] for a in axes[:, 1]), max(a.get_ylim()[1] for a in axes[:, 1]))
    commits = measured_on(results, "linear")
    figure.suptitle(f"Linear layers with compressed weights, synthetic\n{commits}", fontsize=9, x=0, ha="left")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower left", ncols=4, fontsize=7)
    return figure


def bars(axis: Axes, speedup: pd.Series, bits: pd.Series, shapes: list[tuple[int, int]]) -> None:
    """The smallest matrix first."""
    measured = speedup.index.droplevel(["rows", "columns", "batch_size"])
    present = {which: look for which, look in BARS.items() if which in measured}
    thick = 0.76 / max(len(present), 1)
    for line, (which, (label, colour)) in enumerate(present.items()):
        values = [speedup.get((*which, *shape, 1), 0.0) for shape in shapes]
        axis.barh([y + thick * line for y in range(len(shapes))], values, height=0.95 * thick, color=colour, label=label)
    for y, shape in enumerate(shapes):
        longest = speedup.get(("tiled", "fused", *shape, 1), 0.0)
        if longest:
            axis.text(max(longest, 1.0), y, f" {bits[(*shape, 1)]:.2f}", va="center", fontsize=6)
    axis.axvline(1.0, color=GREY, linewidth=1)
    axis.set_yticks([y + 0.38 - thick / 2 for y in range(len(shapes))], [f"{r} x {c}" for r, c in shapes])
    axis.tick_params(axis="y", length=0, labelsize=7)
    axis.invert_yaxis()
    axis.margins(x=0.12, y=0.02)
    axis.set_xlabel("speed, cuBLAS = 1")


def curves(axis: Axes, speedup: pd.Series, shapes: list[tuple[int, int]]) -> None:
    colours = plt.get_cmap("viridis")([i / max(len(shapes) - 1, 1) for i in range(len(shapes))])
    for which, line in CURVES.items():
        for shape, colour in zip(shapes, colours, strict=True):
            if (*which, *shape) in speedup.index.droplevel("batch_size") and len(speedup[(*which, *shape)]) > 1:
                curve = speedup[(*which, *shape)]
                label = f"{shape[0]} x {shape[1]}" if which == ("tiled", "exact") else None
                axis.plot(curve.index, curve, line, color=colour, marker=".", linewidth=1, label=label)
    axis.axhline(1.0, color=GREY, linewidth=1)
    powers_of_two(axis.xaxis)
    axis.set(xlabel="batch size", ylabel="speed, cuBLAS = 1")
    axis.set_title("By batch size: the fastest way solid, decompressed first dashed", fontsize=8)
    axis.legend(fontsize=6, loc="center left", bbox_to_anchor=(1.0, 0.5))
