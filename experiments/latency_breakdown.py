"""Fig. 6: where the time goes: embedding, one transformer block and lm_head, each forward and each decompression apart.

Only these three are built. A batch is one sequence of so many tokens, without a cache. On a GPU both are CUDA graphs, so that
launching from Python is not counted. In mode=fused decompression is part of the forward: codec tiled, its own `forward_ms`. The
decompressed bits are compared with the weights before anything is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import pandas as pd
import torch

from df11 import fused, hf, modules, released
from df11.tensors import dense
from experiments import budget
from experiments.config import Config
from experiments.decoding import check_modes, decompression
from experiments.harness import timing
from experiments.harness.api import Need, Point

AXES = ("component", "batch_size")

Key = tuple[str, str, str]  # component, codec (`dfloat11`: decompression alone, the others: the forward), kernel
Works = dict[Key, Callable[[], object]]


def preflight(cfg: Config) -> Iterable[Need]:
    shapes = hf.tensor_shapes(one_block(cfg))
    logits = 2 * max(cfg.bench.batch_sizes) * max(t.shape[0] for t in shapes)
    models = 1 + len(cfg.bench.modes)
    held = int(1.5 * models * sum(t.nbytes for t in shapes)) + models * logits + timing.FLUSH_BYTES
    gpu_memory = held if cfg.device.name == "cuda" else 0
    return [Need("embedding, one block, lm_head", memory=2 * held - gpu_memory, gpu_memory=gpu_memory, minutes=1)]


def one_block(cfg: Config) -> dict[str, Any]:
    if not cfg.model.geometry:
        raise ValueError(f"model={cfg.model.name} has no geometry: choose a synthetic model")
    return cfg.model.geometry | {"num_hidden_layers": 1}


def run(cfg: Config, done: Mapping[str, list[dict[str, Any]]]) -> Iterator[Point]:
    missing = {f"{tokens} tokens": tokens for tokens in cfg.bench.batch_sizes if f"{tokens} tokens" not in done}
    if not missing:
        return
    weights, on_gpu, modes = budget.weights(cfg.model), cfg.device.name == "cuda", cfg.bench.modes
    check_modes(modes)
    model = hf.build(one_block(cfg), cfg.seed, cfg.device.name)
    models = {("bf16", "-"): model}
    decoders: Works = {}
    if "exact" in modes:
        compressed = hf.build(one_block(cfg), cfg.seed, cfg.device.name, modules.compress_own_)
        decoders = decompressors(cfg, components(model), components(compressed))
    if "fused" in modes:
        models["tiled", "tiled" if on_gpu else "cpu"] = fused_like(model, cfg)
    for key, tokens in missing.items():
        ids = torch.randint(model.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(cfg.seed))
        ids = ids.to(cfg.device.name)
        works: Works = {(name, *how): call for how, one in models.items() for name, call in forwards(one, ids).items()}
        rows = []
        for (component, codec, kernel), samples in measure(cfg, works | decoders).items():
            identity = {"weights": weights, "launch": "graph" if on_gpu else "eager", "batch_size": tokens}
            identity |= {"component": component, "codec": codec, "kernel": kernel, "mode": "fused" if codec == "tiled" else "-"}
            metric = "decompression_ms" if codec == "dfloat11" else "forward_ms"
            rows += [
                identity | {"metric": metric, "value": 1e3 * value, "unit": "ms", "repeat": repeat}
                for repeat, value in enumerate(samples)
            ]
        yield Point(key, rows, budget.about(cfg))


def components(model: Any) -> dict[str, torch.nn.Module]:
    return {"embedding": model.get_input_embeddings(), "block": model.model.layers[0], "lm_head": model.get_output_embeddings()}


def decompressors(cfg: Config, parts: dict[str, torch.nn.Module], compressed: dict[str, torch.nn.Module]) -> Works:
    """What decompresses each component by each kernel. Raises ValueError where a bit is not the original's."""
    kernels = [k for k in cfg.bench.kernels if k != "released" or released.is_installed()] if cfg.device.name == "cuda" else ["cpu"]
    works: Works = {}
    for component, part in compressed.items():
        found = [
            (unit, weights)
            for module, original in zip(part.modules(), parts[component].modules(), strict=True)
            for name, tensor in modules.compressed_parameters(module).items()
            for unit, weights in zip(tensor.units(), original.get_parameter(name).chunk(len(tensor.units())), strict=True)
        ]
        for kernel in kernels:
            work, ((*views,),) = decompression([[unit for unit, _ in found]], "fast" if kernel == "cpu" else kernel)
            work()
            for view, (_, original) in zip(views, found, strict=True):
                if not torch.equal(view.view(torch.int16), original.detach().view(-1).view(torch.int16)):
                    raise ValueError(f"{component}, {kernel}: the weights do not come back bit for bit")
            works[component, "dfloat11", kernel] = work
    return works


def fused_like(model: Any, cfg: Config) -> Any:
    """The same model in mode=fused. Raises ValueError where a bit is not the original's."""
    made = hf.build(one_block(cfg), cfg.seed, cfg.device.name)
    fused.fuse_(made)
    for name, parameter in made.named_parameters():
        weights, original = dense(parameter.detach()), dense(model.get_parameter(name).detach())
        if not torch.equal(weights.view(torch.int16), original.view(torch.int16)):
            raise ValueError(f"{name}, tiled: the weights do not come back bit for bit")
    return made


@torch.inference_mode()
def forwards(model: Any, ids: torch.Tensor) -> dict[str, Callable[[], object]]:
    """Each component's forward on what it gets in the model's forward of int64 [1, tokens]."""
    calls: dict[str, Callable[[], object]] = {}

    def remember(name: str) -> Any:
        def hook(module: torch.nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            calls[name] = torch.inference_mode()(lambda: module(*arguments, **named))

        return hook

    parts = components(model).items()
    handles = [part.register_forward_pre_hook(remember(name), with_kwargs=True) for name, part in parts]
    model(ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return calls


def measure(cfg: Config, works: Works) -> dict[Key, list[float]]:
    warmup, repeats = cfg.bench.warmup, cfg.bench.repeats
    if cfg.device.name == "cpu":
        return {name: timing.wall_clock(work, warmup, repeats) for name, work in works.items()}
    seconds = timing.cuda_events({" ".join(name): timing.graph(work) for name, work in works.items()}, warmup, repeats)
    return {name: seconds[" ".join(name)] for name in works}


def table(rows: pd.DataFrame, cfg: Config) -> pd.DataFrame:
    """Median milliseconds, a line a component and batch, a column the forward, the fused one and each kernel."""
    names = rows["kernel"].where(rows["metric"] == "decompression_ms", "forward").mask(rows["mode"] == "fused", "forward, fused")
    wide = rows.assign(name=names).pivot_table(
        index=["component", "batch_size"], columns="name", values="value", aggfunc="median", sort=False
    )
    return wide.reset_index().rename_axis(columns=None)
