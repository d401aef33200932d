"""Fig. 5: GPU memory by generated tokens, up to a budget: a panel a measured model, with the prediction; published counts apart."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments.figures.style import BLUE, GREY, PURPLE, VERMILLION, load, one, published

CODECS = {"bf16": ("BF16", VERMILLION), "dfloat11": ("DFloat11", BLUE), "tiled": ("tiled, fused", PURPLE)}
PUBLISHED = {"bf16": "bf16_tokens", "dfloat11": "df11_tokens"}


def draw(results: Path) -> Figure:
    rows = load(results, "generation_length").query("memory_mib != '-'")
    paper = published(results, "generation_length")
    panels = list(dict.fromkeys(zip(*(rows[c] for c in ("model", "weights", "gpu", "memory_mib")), strict=True)))
    figure, axes = plt.subplots(1, len(panels) + 1, figsize=(3.1 * (len(panels) + 1), 3.0), squeeze=False)
    for axis, (model, weights, gpu, memory) in zip(axes[0], panels, strict=False):
        own = one(rows, model=model, weights=weights, gpu=gpu, memory_mib=memory)
        most = {}
        for codec, (label, colour) in CODECS.items():
            if codec not in set(own["codec"]):
                continue
            value = own[(own["codec"] == codec) & (own["tokens"] == "-")].set_index("metric")["value"]
            peak = one(own, codec=codec, metric="process_peak_bytes").astype({"tokens": int}).sort_values("tokens")
            context = one(own, codec=codec, metric="context_bytes")["value"].max()
            most[codec] = value["max_tokens"]
            axis.plot(peak["tokens"], peak["value"] / 1e9, ".-", color=colour, label=f"{label}: {most[codec]:,.0f} tokens")
            start = context + value[["weight_bytes", "buffer_bytes", "activation_bytes"]].sum()
            at = np.array([0, value["predicted_tokens"]])
            axis.plot(at, (start + at * value["kv_bytes_per_token"]) / 1e9, ":", color=colour)
        axis.axhline(int(memory) * 2**20 / 1e9, color=GREY, linewidth=0.8)
        what = model if model.endswith("_synthetic") else f"{model} ({weights})"
        more = f": {most['dfloat11'] / most['bf16']:.1f} times as many" if {"dfloat11", "bf16"} <= most.keys() else ""
        axis.set_title(f"Measured, {what}\n{gpu}, {memory} MiB{more}", fontsize=7)
        axis.set(xlabel="tokens (dotted: predicted)", ylabel="GB of GPU memory")
        axis.xaxis.set_major_locator(MaxNLocator(4))
        axis.legend(fontsize=6, loc="lower right")
    axis = axes[0][-1]
    at = np.arange(len(paper))
    for shift, (codec, column) in zip((-0.2, 0.2), PUBLISHED.items(), strict=True):
        (label, colour), counts = CODECS[codec], paper[column]
        axis.barh(at + shift, counts, 0.38, color=colour, label=label)
        for y, count in zip(at + shift, counts, strict=True):
            axis.text(count, y, f" {count:,}", va="center", fontsize=6)
    axis.set_yticks(at, [f"{m}\n{g}" for m, g in zip(paper["model"], paper["gpus"], strict=True)], fontsize=6)
    axis.set_xlim(0, 1.2 * paper["df11_tokens"].max())
    axis.invert_yaxis()
    axis.set(xlabel="tokens")
    axis.xaxis.set_major_locator(MaxNLocator(4))
    axis.set_title("Published", fontsize=7)
    axis.legend(fontsize=6, loc="upper right")
    return figure
