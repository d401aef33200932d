from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from experiments.config import Config
from experiments.harness import provenance, runner
from experiments.harness.outcomes import Outcome
from tests.experiments.toy import CLEAN, TOY


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """Runs the toy from a clean tree."""
    monkeypatch.setattr(provenance, "source", lambda: CLEAN)

    def run(**changes: Any) -> Outcome:
        base = {"experiment": "toy", "model": {"name": "m"}, "bench": {"repeats": 3}, "results_dir": str(tmp_path)}
        return runner.run(OmegaConf.merge(base, changes), Config, TOY)

    return run
