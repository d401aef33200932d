"""Fig. 10: what DF11 costs where the uncompressed model fits: tokens a second over batch sizes, prompt and decoding apart.

The BF16 model is measured as it is, with merged projections and compiled: the fastest is the baseline. DF11 is measured by
kernel, by what is decompressed at a time, and with the next block decompressed ahead; the tiled codec in mode=fused. All decode
with the same static cache, eagerly or in a CUDA graph. Before one is timed its ids are compared with those of the BF16 model as it
is; fused products round in another order, so its ids may differ.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch

from df11 import hf, modules, released, runtime
from experiments import budget
from experiments.config import Config
from experiments.decoding import GRANULARITIES, LAUNCHES, Decoder, compressed_groups, decompression
from experiments.harness import timing
from experiments.harness.api import Need, Point
from experiments.projections import merge_projections_

AXES = ("phase", "batch_size", "prompt_tokens", "new_tokens", "granularity", "variant")
VARIANTS = ("plain", "compiled", "merged", "merged_compiled", "merged_tuned")  # in this order: merging is not undone
COMPILE: dict[str, dict[str, Any]] = {  # of the decoding step; its CUDA graph is ours
    "compiled": {},
    "merged_compiled": {},
    "merged_tuned": {"mode": "max-autotune-no-cudagraphs"},
}


@dataclass(frozen=True)
class Setting:
    """One thing to measure."""

    codec: str
    launch: str
    batch_size: int
    variant: str = "-"  # of BF16; of tiled `compiled` or none
    mode: str = "-"  # of tiled
    kernel: str = "-"  # of DF11
    granularity: str = "-"

    @property
    def key(self) -> str:
        return ", ".join([self.codec, self.variant, self.kernel, self.granularity, self.launch, str(self.batch_size)])


def preflight(cfg: Config) -> Iterable[Need]:
    size = sum(t.nbytes for t in hf.tensor_shapes(cfg.model.geometry))
    tokens = max(cfg.bench.batch_sizes) * (cfg.bench.prompt_tokens + cfg.bench.tokens)
    held = int((2.7 + 0.7 * ("fused" in cfg.bench.modes)) * size) + 2 * hf.cache_bytes(cfg.model.geometry, tokens)
    gpu_memory = held if cfg.device.name == "cuda" else 0
    return [Need("both models", memory=held - gpu_memory, gpu_memory=gpu_memory, minutes=len(plan(cfg)) * size / 3e11)]


def plan(cfg: Config) -> list[Setting]:
    """What to measure, the most telling first: BF16 as it is against DF11 over batch sizes, DF11's ablation at the smallest
    batch with the first launch, then the other baselines. Raises ValueError on an unknown name."""
    bench, on_gpu = cfg.bench, cfg.device.name == "cuda"
    for what, names, known in (
        ("variants", bench.variants, VARIANTS),
        ("launches", bench.launches, LAUNCHES),
        ("granularities", bench.granularities, GRANULARITIES),
        ("kernels", bench.kernels, runtime.KERNELS),
        ("modes", bench.modes, runtime.MODES),
    ):
        if not set(names) <= set(known):
            raise ValueError(f"bench.{what}={names}: choose from {', '.join(known)}")
    kernels = [k for k in bench.kernels if k != "released" or released.is_installed()] if on_gpu else ["cpu"] * bool(bench.kernels)
    launches = bench.launches if on_gpu else ["eager"]
    sizes = bench.batch_sizes
    settings = []
    for size in sizes:
        for launch in launches:
            if "plain" in bench.variants:
                settings.append(Setting("bf16", launch, size, variant="plain"))
            if "fused" in bench.modes:
                settings.append(Setting("tiled", launch, size, kernel="tiled" if on_gpu else "cpu", mode="fused"))
            if "exact" in bench.modes:
                settings += [
                    Setting("dfloat11", launch, size, kernel=k, granularity=g) for k in kernels[:1] for g in bench.granularities[:1]
                ]
    settings += [
        Setting("dfloat11", launch, min(sizes), kernel=kernel, granularity=granularity)
        for launch in launches[:1]
        for kernel in kernels
        for granularity in bench.granularities
        if "exact" in bench.modes
    ]
    for variant in [v for v in VARIANTS[1:] if v in bench.variants]:
        settings += [Setting("bf16", launch, size, variant=variant) for size in sizes for launch in launches]
        if variant == "compiled" and "fused" in bench.modes:
            fused = Setting("tiled", "", 0, variant, kernel="tiled" if on_gpu else "cpu", mode="fused")
            settings += [replace(fused, launch=launch, batch_size=size) for size in sizes for launch in launches]
    return list(dict.fromkeys(settings))


def run(cfg: Config, done: Mapping[str, list[dict[str, Any]]]) -> Iterator[Point]:
    settings = [setting for setting in plan(cfg) if setting.key not in done]
    kernels = list(dict.fromkeys(s.kernel for s in plan(cfg) if s.codec == "dfloat11"))
    sums = [kernel for kernel in kernels if f"decompression, {kernel}" not in done]
    if not settings and not sums:
        return
    identity = {"weights": budget.weights(cfg.model), "prompt_tokens": cfg.bench.prompt_tokens, "new_tokens": cfg.bench.tokens}
    about = budget.about(cfg)
    codecs = {setting.codec for setting in settings}
    bf16 = budget.build(cfg, "bf16") if codecs else None
    expected = {size: ids(bf16, cfg, size) for size in dict.fromkeys(setting.batch_size for setting in settings)}
    df11 = budget.build(cfg, "dfloat11") if "dfloat11" in codecs or sums else None
    tiled = budget.build(cfg, "tiled") if "tiled" in codecs else None
    for kernel in sums:
        rows = decompression_rows(df11, cfg, kernel)
        yield Point(f"decompression, {kernel}", [{"weights": identity["weights"]} | row for row in rows], about)
    for setting in settings:
        model = {"bf16": bf16, "dfloat11": df11, "tiled": tiled}[setting.codec]
        if setting.variant.startswith("merged"):
            merge_projections_(model)  # once: a merged model has no more to merge
        compiled = compile_step_(model, **COMPILE[setting.variant]) if setting.variant in COMPILE else None
        # What cannot be compiled, or does not fit, has no row; the others do.
        passable = RuntimeError if compiled else torch.OutOfMemoryError
        try:
            rows = list(measure(model, setting, cfg, expected[setting.batch_size]))
        except passable as error:
            print(f"{setting.key}: no row: {str(error).splitlines()[0]}", file=sys.stderr)
            continue
        finally:
            if compiled:
                compiled()
        fixed = {"codec": setting.codec, "kernel": setting.kernel, "variant": setting.variant}
        fixed |= {"granularity": setting.granularity, "batch_size": setting.batch_size, "mode": setting.mode}
        yield Point(setting.key, [identity | fixed | row for row in rows], about)


def compile_step_(model: Any, **options: Any) -> Callable[[], None]:
    """Compile the forward of single tokens; prompts stay as they are. Returns what takes it back."""
    whole = model.forward
    torch._dynamo.reset()
    step = torch.compile(whole, dynamic=False, **options)
    model.forward = lambda input_ids, **named: (step if input_ids.shape[1] == 1 else whole)(input_ids, **named)

    def undo() -> None:
        del model.forward

    return undo


def prompt(model: Any, cfg: Config, batch_size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(cfg.seed)
    shape = (batch_size, cfg.bench.prompt_tokens)
    return torch.randint(model.config.vocab_size, shape, generator=generator).to(cfg.device.name)


def ids(model: Any, cfg: Config, batch_size: int) -> torch.Tensor:
    decoder = Decoder(model, batch_size, cfg.bench.prompt_tokens + cfg.bench.tokens)
    return decoder.tokens(prompt(model, cfg, batch_size), cfg.bench.tokens)


def measure(model: Any, setting: Setting, cfg: Config, expected: torch.Tensor) -> Iterator[dict[str, Any]]:
    """Rows of one setting: ids that differ, then prompt and decoding `repeats` times in turns, then memory."""
    on_gpu, steps = cfg.device.name == "cuda", cfg.bench.tokens - 1
    if setting.codec == "dfloat11":
        runtime.attach(model, kernel=setting.kernel if on_gpu else "fast", **GRANULARITIES[setting.granularity])
    budget.release()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        others = torch.cuda.memory_allocated() - modules.stored_bytes(model)["gpu"]
    tokens = prompt(model, cfg, setting.batch_size)
    decoder = Decoder(model, setting.batch_size, cfg.bench.prompt_tokens + cfg.bench.tokens, setting.launch)
    got = decoder.tokens(tokens, cfg.bench.tokens)  # warms up, and captures the graph
    decode = {"launch": setting.launch, "phase": "decode"}
    different = int((got != expected).sum())
    yield decode | {"metric": "id_mismatches", "value": different, "unit": "ids"}
    yield decode | {"metric": "compared", "value": expected.numel(), "unit": "ids"}
    if different and setting.codec == "dfloat11":
        print(f"{setting.key}: {different} of {expected.numel()} ids are not those of BF16", file=sys.stderr)

    def all_steps() -> None:
        for _ in range(steps):
            decoder.step()

    for repeat in range(cfg.bench.repeats):
        # The prompt is always computed eagerly: its samples are those of the first launch that is asked for.
        seconds = elapsed(lambda: decoder.prefill(tokens), cfg.device.name)
        if setting.launch == (cfg.bench.launches[0] if on_gpu else "eager"):
            prefill = {"launch": "eager", "phase": "prefill", "repeat": repeat}
            yield prefill | {"metric": "ms", "value": 1e3 * seconds, "unit": "ms"}
            yield prefill | {"metric": "tokens_per_s", "value": tokens.numel() / seconds, "unit": "tokens/s"}
        seconds = elapsed(all_steps, cfg.device.name)
        yield decode | {"repeat": repeat, "metric": "ms_per_step", "value": 1e3 * seconds / steps, "unit": "ms"}
        rate = setting.batch_size * steps / seconds
        yield decode | {"repeat": repeat, "metric": "tokens_per_s", "value": rate, "unit": "tokens/s"}
    if on_gpu:
        yield decode | {"metric": "stored_bytes", "value": modules.stored_bytes(model)["gpu"], "unit": "bytes"}
        peak = torch.cuda.max_memory_allocated() - others
        yield decode | {"metric": "peak_memory_bytes", "value": peak, "unit": "bytes"}


def elapsed(work: Callable[[], object], device: str) -> float:
    """Seconds until all that `work` enqueued is done: with the host's part, as who waits for tokens sees it."""
    timing.synchronize(device)
    start = time.perf_counter()
    work()
    timing.synchronize(device)
    return time.perf_counter() - start


def decompression_rows(model: Any, cfg: Config, kernel: str) -> Iterator[dict[str, Any]]:
    """Decompression alone of all that one step needs, block by block, in one CUDA graph."""
    on_gpu = cfg.device.name == "cuda"
    groups = compressed_groups(model)
    work, _ = decompression(groups, kernel if on_gpu else "fast")
    identity = {"codec": "dfloat11", "kernel": kernel, "launch": "graph" if on_gpu else "eager", "phase": "decompression"}
    identity |= {"granularity": "block"}
    if on_gpu:
        seconds = timing.cuda_events({kernel: timing.graph(work)}, cfg.bench.warmup, cfg.bench.repeats)[kernel]
    else:
        seconds = timing.wall_clock(work, cfg.bench.warmup, cfg.bench.repeats)
    for repeat, value in enumerate(seconds):
        yield identity | {"repeat": repeat, "metric": "decompression_ms_per_step", "value": 1e3 * value, "unit": "ms"}
    size = 2 * sum(unit.numel for group in groups for unit in group)
    yield identity | {"metric": "decompressed_bytes", "value": size, "unit": "bytes"}


def table(rows: pd.DataFrame, cfg: Config) -> pd.DataFrame:
    """Medians: milliseconds a step or prompt, tokens a second, ids that differ, memory."""
    index = ["codec", "variant", "kernel", "granularity", "launch", "phase", "batch_size"]
    renamed = rows.replace({"metric": {"ms_per_step": "ms", "decompression_ms_per_step": "ms"}})
    wide = renamed.pivot_table(index=index, columns="metric", values="value", aggfunc="median", sort=False).reset_index()
    shown = [name for name in ("ms", "tokens_per_s", "id_mismatches", "peak_memory_bytes") if name in wide]
    return wide[[*index, *shown]].rename_axis(columns=None)
