"""What all figures share."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import pandas as pd
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

# Okabe and Ito's palette: told apart with any colour vision.
BLUE, ORANGE, GREEN, VERMILLION, PURPLE, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#999999"

RC = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    # Text as text, no dates, fixed ids: the same data gives the same file.
    "pdf.fonttype": 42,
    "svg.hashsalt": "df11",
}


def load(results: Path, experiment: str) -> pd.DataFrame:
    """results/<experiment>.csv. A missing table is an error that says which command makes it."""
    path = results / f"{experiment}.csv"
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: python run.py experiment={experiment} promote=true")
    return pd.read_csv(path, dtype={"model": str, "run_id": str}, keep_default_na=False)


def published(results: Path, name: str) -> pd.DataFrame:
    """A table of the paper's numbers, results/paper/<name>.csv."""
    return pd.read_csv(results / "paper" / f"{name}.csv")


def one(rows: pd.DataFrame, **where: object) -> pd.DataFrame:
    """The rows with these values. No row, or two with the same key, is an error: a figure never guesses."""
    for column, value in where.items():
        rows = rows[rows[column] == value]
    if rows.empty:
        raise ValueError(f"no rows with {where}")
    key = [c for c in rows.columns if c not in ("run_id", "value")]
    doubled = rows[rows.duplicated(key, keep=False)]
    if len(doubled):
        raise ValueError(f"ambiguous rows for {where}: {doubled[key].iloc[0].to_dict()} occurs {len(doubled)} times")
    return rows


def powers_of_two(axis: Axis) -> None:
    """A logarithmic axis with plain numbers."""
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.set_major_locator(LogLocator(2))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))


def save(figure: Figure, path: Path) -> None:
    """PDF and PNG, without dates."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path.with_suffix(".pdf"), metadata={"CreationDate": None})
    figure.savefig(path.with_suffix(".png"), dpi=160, metadata={"Software": None})


def use() -> None:
    matplotlib.use("Agg")
    matplotlib.rcParams.update(RC)
