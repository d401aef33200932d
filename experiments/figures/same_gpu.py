"""Fig. 10: BF16 against DF11 where both fit: decoding and prompt over batch sizes and DF11's ablation, a row a GPU, and what was
published."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

from experiments.figures.index import measured_on
from experiments.figures.style import BLUE, GREEN, GREY, ORANGE, PURPLE, VERMILLION, load, powers_of_two, published

LAUNCHES = {"graph": "-", "eager": "--"}
COLOURS = {"bf16": GREY, "dfloat11": BLUE, "tiled": PURPLE}
LABELS = {"bf16": "BF16", "dfloat11": "DFloat11", "tiled": "tiled, fused"}
KERNELS = {"fast": BLUE, "cpu": BLUE, "paper": GREEN, "released": ORANGE}


def draw(results: Path) -> Figure:
    rows = load(results, "same_gpu")
    (model,), gpus = rows["model"].unique(), rows["gpu"].unique()
    figure, axes = plt.subplots(len(gpus) + 1, 3, figsize=(9.6, 3.2 * (len(gpus) + 1)))
    for (decoding, prompts, bars), gpu in zip(axes, gpus, strict=False):
        own = rows[rows["gpu"] == gpu]
        where = gpu if gpu != "-" else "CPU"
        curves(decoding, own, "decode", f"Decoding, {model}\n{where}")
        curves(prompts, own, "prefill", f"Prompts, {model}\n{where}")
        ablation(bars, own, where)
    paper = published(results, "same_gpu")
    for codec, column in (("bf16", "bf16_tokens_per_s"), ("dfloat11", "df11_tokens_per_s")):
        axes[-1, 0].plot(paper["batch_size"], paper[column], color=COLOURS[codec], marker=".", label=LABELS[codec])
    finish(axes[-1, 0], f"Published, {paper['model'].iloc[0]}\n{paper['gpus'].iloc[0]}")
    for axis in axes[-1, 1:]:
        axis.set_visible(False)
    figure.suptitle(measured_on(results, "same_gpu"), fontsize=7, x=0, ha="left")
    return figure


def curves(axis: Axes, rows: pd.DataFrame, phase: str, title: str) -> None:
    """Median tokens a second; of several BF16 variants, or ways of DF11, the fastest at each batch size. None is a compiled one:
    these were measured at some sizes only."""
    own = rows[(rows["phase"] == phase) & (rows["metric"] == "tokens_per_s") & ~rows["variant"].str.contains("compiled")].astype(
        {"batch_size": int}
    )
    median = own.groupby(["codec", "launch", "batch_size", "variant", "kernel", "granularity"])["value"].median()
    fastest = median.groupby(["codec", "launch", "batch_size"]).max()
    for codec, colour in COLOURS.items():
        for launch, line in LAUNCHES.items():
            if (codec, launch) in fastest.index.droplevel("batch_size"):
                curve = fastest[codec, launch]
                name = f"{LABELS[codec]}, {'CUDA graph' if launch == 'graph' else 'eager'}"
                axis.plot(curve.index, curve, line, color=colour, marker=".", label=name)
    finish(axis, title)


def ablation(axis: Axes, rows: pd.DataFrame, where: str) -> None:
    """Milliseconds a step at the smallest batch, and decompression alone."""
    steps = rows[rows["metric"] == "ms_per_step"].astype({"batch_size": int})
    steps = steps[steps["batch_size"] == steps["batch_size"].min()]
    launch = "graph" if (steps["launch"] == "graph").any() else "eager"
    bars = []
    for (codec, variant, kernel, granularity), own in steps[steps["launch"] == launch].groupby(
        ["codec", "variant", "kernel", "granularity"], sort=False
    ):
        fused = LABELS["tiled"] if variant == "-" else f"{LABELS['tiled']}, {variant}"
        name = {"bf16": f"BF16, {variant}", "dfloat11": f"{kernel}, by {granularity}", "tiled": fused}[codec]
        bars.append((name, own["value"].median(), GREY if codec == "bf16" else PURPLE if codec == "tiled" else KERNELS[kernel]))
    alone = rows[rows["metric"] == "decompression_ms_per_step"].groupby("kernel", sort=False)["value"].median()
    bars += [(f"{kernel}, decompression alone", value, VERMILLION) for kernel, value in alone.items()]
    names, values, colours = zip(*bars, strict=True)
    axis.barh(names, values, color=colours, height=0.7)
    for y, value in enumerate(values):
        axis.text(value, y, f" {value:.1f}", va="center", fontsize=6)
    axis.invert_yaxis()
    axis.tick_params(labelsize=7)
    axis.tick_params(axis="y", length=0, labelsize=6)
    axis.set_xlim(0, 1.15 * max(values))
    axis.set_xlabel("ms a step")
    smallest, how = steps["batch_size"].min(), "CUDA graph" if launch == "graph" else "eager"
    axis.set_title(f"Batch {smallest}, {how}\n{where}", fontsize=7)


def finish(axis: Axes, title: str) -> None:
    powers_of_two(axis.xaxis)
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.tick_params(labelsize=7)
    axis.set(xlabel="batch size", ylabel="tokens/s")
    axis.set_title(title, fontsize=7)
    axis.legend(fontsize=6, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, handlelength=3)
