"""An experiment for the harness's tests: `bench.repeats` points, slow or failing on demand. As a script: to be killed."""

import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import pandas as pd

from experiments.config import Config
from experiments.harness.api import Need, Point

TOY = {"toy": "tests.experiments.toy"}
CLEAN = {"sha": "a" * 40, "dirty": False, "tree": "t"}  # a provenance.source()
AXES = ("n",)


def preflight(cfg: Config) -> Iterable[Need]:
    return [Need("toy", disk=int(os.environ.get("TOY_DISK", "0")))]


def run(cfg: Config, done: Mapping[str, list[dict[str, Any]]]) -> Iterator[Point]:
    for n in range(cfg.bench.repeats):
        if f"p{n}" in done:
            continue
        if n == int(os.environ.get("TOY_FAILS_AT", "-1")):
            raise ArithmeticError("the toy breaks here")
        time.sleep(float(os.environ.get("TOY_SECONDS", "0")))
        rows = [{"n": n, "metric": m, "value": n * f, "unit": "1"} for m, f in (("whole", 1), ("half", 0.5))]
        yield Point(f"p{n}", rows, {"toy": True})


def table(rows: pd.DataFrame, cfg: Config) -> pd.DataFrame:
    return rows[["n", "metric", "value"]]


if __name__ == "__main__":
    from omegaconf import OmegaConf

    from experiments.harness import outcomes, runner

    cfg = OmegaConf.create({"experiment": "toy", "model": {"name": "m"}, "bench": {"repeats": 30}, "results_dir": sys.argv[1]})
    sys.exit(outcomes.report([runner.run(cfg, Config, TOY)]))
