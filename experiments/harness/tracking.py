"""W&B as a mirror of a run: results never depend on it, and never wait long for it."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd

from experiments.harness.api import MEASURE, NOT_APPLICABLE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAMED = ("experiment", "run_id", "model", *MEASURE)  # columns that no scalar's name repeats
PANELS, BARS = 9, 24  # of the figure, at most

Log = Callable[[list[dict[str, Any]], pd.DataFrame], None]


@contextmanager
def mirror(logger: Any, folder: Path, group: str, config: dict[str, Any]) -> Iterator[Log]:
    """A W&B run for as long as the work inside takes, so that it has the system's metrics. Where nothing is logged it failed.

    Yields what to call with the rows and the short table. With another logger, and where W&B fails, that does nothing.
    """
    run = _start(logger, folder, group, config) if logger.name == "wandb" else None
    logged = False

    def log(rows: list[dict[str, Any]], table: pd.DataFrame) -> None:
        nonlocal logged
        logged = True
        if run:
            _guarded(lambda: _log(run, rows, table))

    try:
        yield log
    finally:
        if run:
            _guarded(lambda: _finish(run, 0 if logged else 1), "`wandb sync` sends what is missing")


def _start(logger: Any, folder: Path, group: str, config: dict[str, Any]) -> Any:
    try:
        import wandb
    except ModuleNotFoundError:
        print("logger=wandb: W&B is not installed (pip install 'df11[tracking]'); the results are kept without it", file=sys.stderr)
        return None

    def start(mode: Literal["online", "offline"]) -> Any:
        if mode == "online" and not wandb.login(prompt=False, verify=False):
            raise RuntimeError("no account is known, `wandb login` asks for one")
        settings = wandb.Settings(
            init_timeout=logger.timeout_s,  # by default W&B waits for minutes, at the end for ever
            finish_timeout=logger.timeout_s,
            finish_timeout_raises=True,
            x_stats_sampling_interval=logger.system_metrics_s,
            silent=True,
            console="off",
        )
        return wandb.init(
            project=logger.project, group=group, name=folder.name, dir=str(folder), config=config, mode=mode, settings=settings
        )

    if logger.mode == "online" and (run := _guarded(lambda: start("online"), "kept offline, `wandb sync` sends it later")):
        return run
    return _guarded(lambda: start("offline"), "the results are kept without it")


def _guarded(work: Callable[[], Any], remedy: str = "the results are not affected") -> Any:
    """What `work` returns, or None and a line that says why not: no error of W&B's ends a run."""
    try:
        return work()
    except Exception as error:
        print(f"logger=wandb: {str(error).strip()}; {remedy}", file=sys.stderr)
        return None


def _log(run: Any, rows: list[dict[str, Any]], table: pd.DataFrame) -> None:
    import wandb
    from PIL import Image

    frame = pd.DataFrame(rows)
    figure(frame).savefig(picture := io.BytesIO(), dpi=120)
    alike, values = scalars(frame)
    run.config.update({"rows": alike})
    run.summary.update(values.to_dict())
    texts = {"rows": frame.astype(str), "table": table.astype(str)}
    run.log({name: wandb.Table(dataframe=text) for name, text in texts.items()} | {"figure": wandb.Image(Image.open(picture))})


def _finish(run: Any, exit_code: int) -> None:
    import wandb

    try:
        run.finish(exit_code)
    finally:
        wandb.teardown()  # only then is all on disk: finish() does not wait for the file to be closed


def scalars(rows: pd.DataFrame) -> tuple[dict[str, Any], pd.Series]:
    """What all rows of a run have in common, and medians of the repeats, named by what differs: `decode/graph/tokens_per_s`.

    So the points of a sweep over batch size have scalars of the same names, and `rows.batch_size` to draw them against.
    """
    columns = [c for c in rows if c not in NAMED]
    values = {c: [v for v in rows[c].unique() if v != NOT_APPLICABLE] for c in columns}
    differing = columns.copy()
    for c in columns:
        rest = [d for d in differing if d != c]
        if len(values[c]) < 2 and rows.groupby([*rest, "metric"]).ngroups == rows.groupby([*differing, "metric"]).ngroups:
            differing = rest
    alike = {c: _number(values[c][0]) for c in columns if c not in differing and values[c]}
    names = rows[[*differing, "metric"]].astype(str).apply(lambda row: "/".join(v for v in row if v != NOT_APPLICABLE), axis=1)
    return alike, rows.groupby(names, sort=False)["value"].median()


def _number(text: Any) -> Any:
    return int(text) if str(text).isdigit() else text


def figure(rows: pd.DataFrame) -> Figure:
    """The scalars as bars, a panel for each metric and unit."""
    from matplotlib.figure import Figure

    metrics = list(rows.groupby(["metric", "unit"], sort=False))
    picture = Figure(figsize=(4 * min(len(metrics), 3), 2.6 * -(-min(len(metrics), PANELS) // 3)), layout="constrained")
    axes = picture.subplots(-(-min(len(metrics), PANELS) // 3), min(len(metrics), 3), squeeze=False)
    for axis in axes.flat[len(metrics) :]:
        axis.set_visible(False)
    for axis, ((metric, unit), own) in zip(axes.flat, metrics, strict=False):
        _, values = scalars(own)
        names = [str(name).removesuffix(metric).rstrip("/") for name in values.index]
        axis.barh(range(len(values[:BARS])), values[:BARS])
        axis.set_yticks(range(len(values[:BARS])), names[:BARS], fontsize=6)
        axis.invert_yaxis()
        more = f", {BARS} of {len(values)}" if len(values) > BARS else ""
        axis.set_title(f"{metric}, {unit}{more}", fontsize=8)
        axis.tick_params(axis="x", labelsize=6)
        axis.xaxis.get_offset_text().set_fontsize(6)
    return picture
