"""v1 Table 1: which model fits which GPUs in BF16 and compressed, with the longest context; below, what was really run."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from experiments.figures.style import BLUE, GREY, ORANGE, load, one

GRANULARITY = "block"
COLOURS = {"BF16 and DFloat11 fit": BLUE, "only DFloat11 fits": ORANGE, "neither fits": GREY}


def draw(results: Path) -> Figure:
    rows = one(load(results, "capacity"), module="all")
    rows = rows[(rows["granularity"] == GRANULARITY) | (rows["codec"] != "dfloat11")]
    rows = rows.assign(where=rows["cards"].astype(str) + " x " + rows["card"])
    weights = rows[(rows["metric"] == "weights_bytes") & (rows["codec"] == "bf16")].groupby("model")["value"].first()
    models = list(weights.sort_values().index)
    fitting = rows[rows["metric"] == "fits"].astype({"context_tokens": int})
    tokens = fitting["context_tokens"].min()
    fitting = fitting[fitting["context_tokens"] == tokens].set_index(["model", "where", "codec"])["value"]
    longest = rows[rows["metric"] == "longest_context"].set_index(["model", "where", "codec"])["value"]
    cards = rows.astype({"card_mib": int, "cards": int}).assign(total=lambda r: r["card_mib"] * r["cards"])
    where = list(cards.groupby("where")["total"].first().sort_values().index)
    measured = checks(results)
    figure, axis = plt.subplots(figsize=(1.6 + 1.1 * len(where), 0.9 + 0.24 * len(models) + 0.16 * len(measured)))
    names = list(COLOURS)
    picture = np.zeros((len(models), len(where), 4))
    for y, model in enumerate(models):
        for x, place in enumerate(where):
            verdict = names[2 - int(fitting[model, place, "bf16"]) - int(fitting[model, place, "dfloat11"])]
            picture[y, x] = to_rgba(COLOURS[verdict], 0.55)
            contexts = [shorten(longest[model, place, codec]) for codec in ("bf16", "dfloat11", "tiled")]
            axis.text(x, y, " / ".join(contexts), ha="center", va="center", fontsize=5.5)
    axis.imshow(picture, aspect="auto")
    axis.set_xticks(range(len(where)), where, fontsize=6)
    axis.set_yticks(range(len(models)), [f"{m} ({weights[m] / 1e9:.0f} GB)" for m in models], fontsize=6)
    axis.tick_params(length=0)
    axis.set_title(
        f"Fits with {tokens} tokens; longest context in tokens, BF16 / DFloat11 / mode=fused (synthetic weights)", fontsize=8
    )
    handles = [Patch(color=to_rgba(colour, 0.55), label=name) for name, colour in COLOURS.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=7)
    axis.set_xlabel("\n".join(measured), fontsize=6)
    return figure


def checks(results: Path) -> list[str]:
    """Lines on the real runs of `capacity_check`, none where it was not run."""
    if not (results / "capacity_check.csv").exists():
        return []
    rows = load(results, "capacity_check")
    lines = []
    for (model, gpu, codec, granularity), own in rows.groupby(["model", "gpu", "codec", "granularity"], sort=False):
        values = own.groupby("metric")["value"].median()
        if "longest_context" in values:
            by = "" if granularity == "-" else f" by {granularity}"
            if "predicted_longest_context" in values:
                by += f", predicted {shorten(values['predicted_longest_context'])}"
            lines.append(f"tried on {gpu}: {model}, {codec}{by}: {shorten(values['longest_context'])} tokens at most")
    return lines


def shorten(tokens: float) -> str:
    return (
        "-"
        if tokens == 0
        else f"{tokens / 1e6:.1f}M"
        if tokens >= 1e6
        else f"{tokens / 1e3:.0f}k"
        if tokens >= 1e3
        else f"{tokens:.0f}"
    )
