"""The whole config, typed: Hydra composes it from conf/, the runner checks it against this."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from df11.sources import ModelSpec
from df11.sources.cache import default_cache


@dataclass
class CodecConfig:
    name: str = "dfloat11"  # a format of df11.formats
    options: dict[str, Any] = field(default_factory=dict)  # its constructor's


@dataclass
class CardConfig:
    """GPUs that a model may fit on."""

    name: str = MISSING
    mib: int = MISSING  # memory of each, as nvidia-smi says
    count: int = 1


@dataclass
class BenchConfig:
    """How speed is measured."""

    warmup: int = 1
    repeats: int = 5
    threads: list[int] = field(default_factory=lambda: [1])
    shapes: list[list[int]] = field(default_factory=list)  # rows, columns of weight matrices [out, in]
    variants: list[str] = field(default_factory=list)  # of an experiment that compares some
    memory_mib: int = 0  # GPU memory to stay within, of an experiment that limits it
    tokens: int = 20  # decoded in each repeat; `warmup` of them before
    lengths: list[int] = field(default_factory=list)  # of a sequence, tokens
    batch_size: Any = 1  # a number, or a list of them: one job, a row each
    prompt_tokens: int = 32  # of a sequence
    kernels: list[str] = field(default_factory=lambda: ["fast"])  # that decompress: fast, paper, released
    launches: list[str] = field(default_factory=lambda: ["eager"])  # eager, graph
    modes: list[str] = field(default_factory=lambda: ["exact"])  # exact, fused
    granularities: list[str] = field(default_factory=lambda: ["block"])  # of decompression, as experiments/decoding.py names them
    cards: list[CardConfig] = field(default_factory=list)
    reserve_bytes: int = 0  # on each card, for the CUDA context, activations and fragments

    @property
    def batch_sizes(self) -> list[int]:
        return [int(size) for size in (self.batch_size if isinstance(self.batch_size, list) else [self.batch_size])]


@dataclass
class EvalConfig:
    """What lm-eval asks."""

    tasks: list[str] = field(default_factory=list)
    fixtures: bool = True  # the shipped task definitions over small local data; false: over the hub's
    batch_size: int = 8


@dataclass
class DeviceConfig:
    name: str = "cpu"  # cpu | cuda


@dataclass
class LoggerConfig:
    name: str = "console"  # console | wandb
    project: str = "df11"
    mode: str = "offline"  # offline | online
    timeout_s: int = 20  # to wait for the server, online; after that the run is kept offline
    system_metrics_s: float = 5  # between samples of the system's metrics


@dataclass
class Config:
    experiment: str | None = None
    model: ModelSpec = field(default_factory=ModelSpec)
    codec: CodecConfig = field(default_factory=CodecConfig)
    bench: BenchConfig = field(default_factory=BenchConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    device: DeviceConfig = field(default_factory=DeviceConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    seed: int = 0
    force: bool = False  # run again what is done
    preflight: bool = False  # say what would be needed; run nothing
    promote: bool = False  # copy the rows to results/<experiment>.csv
    promote_anyway: bool = False  # also from a changed tree, also across GPUs
    compare: str | None = None  # an experiment: lay its finished runs beside the committed rows; measure nothing
    compare_csv: str | None = None  # write that comparison to this file too
    one_gpu: bool = False  # each process takes a GPU of the machine for itself
    results_dir: str = "results"
    cache_dir: str | None = None  # models; null: $DF11_CACHE or the user's cache

    @property
    def cache(self) -> Path:
        return Path(self.cache_dir) if self.cache_dir else default_cache()


def register() -> None:
    """Make the types known to Hydra, so that an override of a key that no file sets is accepted and a wrong one refused."""
    ConfigStore.instance().store(name="schema", node=Config)
