"""From the start of loading to the first token: a BF16 checkpoint against the same model's compressed one (not in the paper).

The compressed one is loaded as it is, and in mode=fused: transcoded on the device (codec tiled; its `file_bytes` and `read_s` are
those of the compressed files). Only there the first token may be another. Each measurement is a fresh process
(experiments/first_token.py), all of them in turns; kernels are built before. `cache` is the system's page cache: `warm`, the files
were read just before; `cold`, they were written back and dropped from it (fsync, then POSIX_FADV_DONTNEED). What a disk or a
hypervisor caches itself stays: `read_s`, a plain read of the cold files, says how fast.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from df11 import checkpoint, hf, ops
from df11.sources import SafetensorsSource, open_source
from experiments import budget, needs
from experiments.config import Config
from experiments.decoding import CODECS, check_modes
from experiments.harness.api import Need, Point

AXES = ("cache",)
FILES = ("first_token.py",)
ROOT = Path(__file__).parents[1]
SHARD = "5GB"
TIMES = ("import_s", "load_s", "first_token_s")

Loaded = tuple[Path, str]  # directory, mode


def inputs(cfg: Config) -> object:
    return needs.inputs(cfg.model)


def preflight(cfg: Config) -> Iterable[Need]:
    size = sum(t.nbytes for t in needs.tensors_of(cfg.model))
    disk = int(0.7 * size) + (size if cfg.model.source == "synthetic" else 0)
    gpu_memory = int(1.1 * size) if cfg.device.name == "cuda" else 0
    loads = 2 * (1 + len(cfg.bench.modes)) * cfg.bench.repeats
    minutes = (2 + loads) * size / 1e9 / 60 + loads / 4
    both = Need("both checkpoints", disk, cfg.cache, "cache_dir", memory=size, gpu_memory=gpu_memory, minutes=minutes)
    return [needs.compression(cfg), both]


def run(cfg: Config, done: Mapping[str, list[dict[str, Any]]]) -> Iterator[Point]:
    on_gpu, modes = cfg.device.name == "cuda", cfg.bench.modes
    check_modes(modes)
    if on_gpu:
        unit = ops.encode([torch.zeros(8, 8, dtype=torch.bfloat16, device="cuda")])
        unit.decompress(torch.empty(64, dtype=torch.bfloat16, device="cuda"))  # builds the kernels
    with needs.scratch(cfg) as scratch:
        original, weights, about = bf16(cfg, Path(scratch) / "bf16")
        compressed = Path(scratch) / "dfloat11"
        codecs = {(original, "exact"): ("bf16", "-")} | {(compressed, mode): CODECS[mode] for mode in modes}
        identities = {
            one: {"weights": weights, "codec": codec, "kernel": kernel if on_gpu or codec == "bf16" else "cpu", "mode": one[1]}
            for one, (codec, kernel) in codecs.items()
        }
        made = list(compress(original, compressed))
        if "files" not in done:
            rows = [{"weights": weights, "codec": "dfloat11", "kernel": "cpu", "mode": "exact"} | row for row in made]
            rows += [
                fixed | {"metric": "file_bytes", "value": size(path), "unit": "bytes"} for (path, _), fixed in identities.items()
            ]
            yield Point("files", rows, about)
        if on_gpu and "fused" in modes:
            measure(compressed, "cuda", "fused")  # builds kernels, and times which way layers are computed: kept for the others
        for repeat in range(cfg.bench.repeats):
            if f"turn {repeat}" not in done:
                measured = turn(list(identities), cfg.device.name)
                yield Point(f"turn {repeat}", [identities[one] | {"repeat": repeat} | row for one, row in measured], about)


def bf16(cfg: Config, directory: Path) -> tuple[Path, str, dict[str, Any]]:
    """The uncompressed checkpoint's directory, what its weights are and where from. Synthetic ones are made and saved there."""
    if cfg.model.source == "synthetic":
        if cfg.model.distribution != "normal":
            raise ValueError(f"model.distribution={cfg.model.distribution}: this experiment draws from the normal one only")
        hf.build(cfg.model.geometry, cfg.seed, cfg.device.name).save_pretrained(directory, max_shard_size=SHARD)
        torch.cuda.empty_cache()
        return directory, "synthetic-normal", budget.about(cfg)
    source = open_source(cfg.model, cfg.seed, cfg.cache)
    assert isinstance(source, SafetensorsSource)
    return source.directory, source.weights, source.provenance


def compress(original: Path, compressed: Path) -> Iterator[dict[str, Any]]:
    """Compress and verify, the original's files in the page cache as far as they were."""
    start = time.perf_counter()
    checkpoint.compress(original, compressed)
    if short := checkpoint.shortfall(checkpoint.summary(compressed)):
        raise ValueError(f"{original}: {short}; loading it would be no measure of compressed weights")
    seconds = time.perf_counter() - start
    yield {"metric": "compress_s", "value": seconds, "unit": "s"}
    yield {"metric": "compress_gb_per_s", "value": size(original) / 1e9 / seconds, "unit": "GB/s"}
    start = time.perf_counter()
    checkpoint.verify(compressed)
    yield {"metric": "verify_s", "value": time.perf_counter() - start, "unit": "s"}


def turn(loaded: list[Loaded], device: str) -> list[tuple[Loaded, dict[str, Any]]]:
    """Each once warm and once cold. Raises ValueError where first tokens of mode=exact differ."""
    rows, tokens = [], set()
    for directory, mode in loaded:
        one = directory, mode
        drop(directory)
        seconds = read(directory)
        rows.append((one, {"cache": "cold", "metric": "read_s", "value": seconds, "unit": "s"}))
        for cache in ("warm", "cold"):
            if cache == "cold":
                drop(directory)
            measured = measure(directory, device, mode)
            if mode == "exact":
                tokens.add(measured["token"])
            times = {name: measured[name] for name in TIMES} | {"total_s": measured["load_s"] + measured["first_token_s"]}
            axes = {"cache": cache, "launch": "eager", "unit": "s"}
            rows += [(one, axes | {"metric": name, "value": value}) for name, value in times.items()]
            if peak := measured.get("peak_memory_bytes"):
                rows.append((one, axes | {"metric": "peak_memory_bytes", "value": peak, "unit": "bytes"}))
    if len(tokens) > 1:
        raise ValueError(f"the first token is not the same from each checkpoint: {sorted(tokens)}")
    return rows


def measure(directory: Path, device: str, mode: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "experiments.first_token", str(directory.resolve()), device, mode]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def drop(directory: Path) -> None:
    """Write the files back and drop them from the page cache."""
    for path in files(directory):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def read(directory: Path) -> float:
    """Seconds of reading the files from beginning to end."""
    buffer = memoryview(bytearray(16 << 20))
    start = time.perf_counter()
    for path in files(directory):
        with path.open("rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass
    return time.perf_counter() - start


def files(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.safetensors"))


def size(directory: Path) -> int:
    return sum(path.stat().st_size for path in files(directory))


def table(rows: pd.DataFrame, cfg: Config) -> pd.DataFrame:
    """Medians, and the whole against BF16's."""
    timed = rows[rows["metric"].isin([*TIMES, "total_s", "read_s"])]
    wide = timed.pivot_table(index=["cache", "codec"], columns="metric", values="value", aggfunc="median").reset_index()
    sizes = rows[rows["metric"] == "file_bytes"].set_index("codec")["value"] / 1e9
    wide.insert(2, "GB", wide["codec"].map(sizes))
    base = wide[wide["codec"] == "bf16"].set_index("cache")["total_s"]
    wide["x bf16"] = wide["total_s"] / wide["cache"].map(base)
    return wide.rename_axis(columns=None)
