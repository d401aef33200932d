"""Tables on the console."""

from __future__ import annotations

import sys
from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Table


def show(table: pd.DataFrame, title: str) -> None:
    """A table a person can read."""
    out = Table(title=title, title_justify="left", header_style="bold")
    for column in table.columns:
        number = pd.api.types.is_numeric_dtype(table[column])
        out.add_column(str(column), justify="right" if number else "left", no_wrap=number, overflow="fold")
    for row in table.itertuples(index=False):
        out.add_row(*[_cell(value) for value in row])
    # Piped output keeps whole lines; a terminal may fold them, but no number.
    whole = Console(width=10_000).measure(out).maximum
    Console(width=None if sys.stdout.isatty() else max(160, whole)).print(out)


def _cell(value: Any) -> str:
    if pd.isna(value):
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}" if abs(value) < 1 else f"{value:.3f}"
    return str(value)
