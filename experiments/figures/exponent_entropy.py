"""Fig. 1, 8 and 9: entropy of sign, exponent and mantissa; exponents by rank. Trained and synthetic weights apart."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from experiments.figures.style import BLUE, GREY, ORANGE, load, one

WIDTHS = {"sign": 1, "exponent": 8, "mantissa": 7}


def draw(results: Path) -> Figure:
    rows = one(load(results, "exponent_entropy"), scope="block")
    groups = [g for g in (rows[~is_synthetic(rows)], rows[is_synthetic(rows)]) if len(g)]
    figure, axes = plt.subplots(len(groups), 2, figsize=(7.2, 2.5 * len(groups)), squeeze=False)
    for (left, right), group in zip(axes, groups, strict=True):
        kind = "synthetic" if is_synthetic(group).all() else "trained"
        sets = group.groupby(["model", "weights"], sort=False)
        colours = [plt.get_cmap("cividis")(v) for v in np.linspace(0, 0.85, len(sets))]
        if len(sets) == 1:
            colours = [BLUE if kind == "trained" else ORANGE]
        for i, (((model, weights), own), colour) in enumerate(zip(sets, colours, strict=True)):
            entropy = own[own["metric"] == "entropy_bits"].set_index("field")["value"]
            at = np.arange(3) + (i - (len(sets) - 1) / 2) * 0.8 / len(sets)
            left.bar(at, [entropy[name] for name in WIDTHS], 0.8 / len(sets), color=colour)
            for x, name in zip(at, WIDTHS, strict=True):
                left.text(x, entropy[name] + 0.15, f"{entropy[name]:.2f}", ha="center", fontsize=7)
            ranks = own[own["metric"] == "relative_frequency"].astype({"rank": int}).sort_values("rank")
            label = f"{model} ({weights})"
            right.semilogy(ranks["rank"], ranks["value"], ".-", color=colour, linewidth=0.8, markersize=3, label=label)
        left.bar(range(3), list(WIDTHS.values()), 0.9, fill=False, edgecolor=GREY, linestyle=":", label="stored in BF16")
        left.set_xticks(range(3), list(WIDTHS))
        left.set(ylabel="bits a weight", title=f"Entropy, {kind} weights")
        right.set(xlabel="rank of exponent value", ylabel="relative frequency", title=f"Exponents by rank, {kind} weights")
        right.legend(fontsize=6)
        left.legend(handles=left.get_legend_handles_labels()[0][-1:], fontsize=6, loc="upper left")
    return figure


def is_synthetic(rows):  # type: ignore[no-untyped-def]
    return rows["weights"].str.startswith("synthetic")
