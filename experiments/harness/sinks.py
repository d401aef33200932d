"""Where results are shown besides the store: the console, and W&B as a mirror."""

from __future__ import annotations

import sys
from pathlib import Path
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


def mirror_to_wandb(
    logger: Any, folder: Path, group: str, config: dict[str, Any], rows: list[dict[str, Any]], table: pd.DataFrame
) -> None:
    """One W&B run per run_id: scalars, the whole table, the short table. Offline unless asked; results never depend on it."""
    try:
        import wandb
    except ModuleNotFoundError:
        print(
            "logger=wandb: wandb is not installed (pip install 'df11[tracking]'); the results are stored without it",
            file=sys.stderr,
        )
        return
    # An unreachable server must not hold a result up: after the timeout the run is kept offline.
    settings = wandb.Settings(init_timeout=logger.timeout_s, silent=True, console="off")
    arguments: dict[str, Any] = {
        "project": logger.project,
        "group": group,
        "dir": str(folder),
        "config": config,
        "name": folder.name,
    }
    try:
        run = wandb.init(mode=logger.mode, settings=settings, **arguments)
    except (wandb.errors.Error, TimeoutError) as error:
        print(f"logger=wandb: {error}; this run is kept offline, `wandb sync` sends it later", file=sys.stderr)
        run = wandb.init(mode="offline", settings=settings, **arguments)
    try:
        for row in rows:
            labels = [str(row[c]) for c in row if c not in ("experiment", "run_id", "model", "value", "unit", "repeat")]
            run.summary["/".join(label for label in labels if label != "-")] = row["value"]
        run.log({"rows": wandb.Table(dataframe=pd.DataFrame(rows).astype(str)), "table": wandb.Table(dataframe=table.astype(str))})
    finally:
        run.finish()
