from collections.abc import Callable
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from experiments.config import register

ROOT = Path(__file__).parents[1]


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., DictConfig]:
    """Composes the config as run.py does, for the tiny model, with results in a temporary folder."""

    register()

    def build(*overrides: str) -> DictConfig:
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            return compose("config", ["model=tiny", f"results_dir={tmp_path}/results", *overrides])

    return build
