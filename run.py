"""`python run.py experiment=NAME`: measure one table or figure. `python run.py` lists them."""

from __future__ import annotations

import os
import sys
from pathlib import Path

if not sys.stderr.isatty():
    os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported: no progress bars in logs

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from experiments.config import Config, register
from experiments.harness import runner

EXPERIMENTS = {
    "compression_ratio": "experiments.compression_ratio",
    "exponent_entropy": "experiments.exponent_entropy",
    "compression_time": "experiments.compression_time",
    "decompression": "experiments.decompression",
    "losslessness": "experiments.losslessness",
    "offload": "experiments.offload",
    "generation_length": "experiments.generation_length",
    "load_time": "experiments.load_time",
}


def main() -> int:
    register()
    outcomes: list[runner.Outcome] = []

    @hydra.main(version_base="1.3", config_path="conf", config_name="config")
    def job(cfg: DictConfig) -> None:
        settings = HydraConfig.get()
        try:
            runner.refuse_dropped_sweep(settings)
            sweep = Path(settings.sweep.dir).name if settings.mode == RunMode.MULTIRUN else ""
            outcomes.append(runner.run(cfg, Config, EXPERIMENTS, sweep))
        except runner.UsageError as error:
            print(f"run.py: {error}", file=sys.stderr)
            outcomes.append(runner.Outcome(str(cfg.experiment), str(cfg.model.name), "failed", detail=str(error)))

    job()
    return runner.report(outcomes)


if __name__ == "__main__":
    sys.exit(main())
