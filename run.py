"""`python run.py experiment=NAME`: measure one table or figure. `python run.py` lists them."""

from __future__ import annotations

import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

if not sys.stderr.isatty():
    os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported: no progress bars in logs

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from experiments.config import Config, register
from experiments.harness import runner
from experiments.harness.outcomes import Outcome, record, recorded, report

NAMES = (
    *("compression_ratio", "exponent_entropy", "compression_time", "decompression", "losslessness", "load_time"),
    *("linear", "offload", "generation_length", "latency_breakdown", "same_gpu", "capacity", "capacity_check"),
)
EXPERIMENTS = {name: f"experiments.{name}" for name in NAMES}


def main() -> int:
    register()
    here = Path(__file__).resolve().parent / "results"
    # Not in memory: a launcher may run the jobs in other processes or, with this folder shared, on other machines.
    with tempfile.TemporaryDirectory(prefix=".ended-", dir=here) as ended:

        @hydra.main(version_base="1.3", config_path="conf", config_name="config")
        def job(cfg: DictConfig) -> None:
            settings = HydraConfig.get()
            several = settings.mode == RunMode.MULTIRUN
            number, sweep = (settings.job.num, Path(settings.sweep.dir).name) if several else (0, "")
            name = str(cfg.compare or cfg.experiment)
            record(lost := Outcome(name, str(cfg.model.name), "failed", detail="it did not end"), Path(ended), number)
            try:
                runner.refuse_dropped_sweep(settings)
                outcome = runner.run(cfg, Config, EXPERIMENTS, sweep)
            except runner.UsageError as error:
                print(f"run.py: {error}", file=sys.stderr)
                outcome = replace(lost, detail=str(error))
            record(outcome, Path(ended), number)

        try:
            job()
        finally:  # also where Hydra exits, because a job's process died
            status = report(recorded(Path(ended)))
    return status


if __name__ == "__main__":
    sys.exit(main())
