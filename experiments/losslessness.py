"""Table 2, stricter: BF16 against DF11 of the same model, counted in bits that differ.

Every weight bit; every logits bit of a prefill and of each decoding step; every generated id, greedy and sampled by a seed. Weights
from files are compressed to a checkpoint and loaded back as a user would; synthetic ones are compressed where they are.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from df11 import checkpoint, hf, modules
from df11.sources import SafetensorsSource, open_source
from experiments import needs
from experiments.config import Config
from experiments.harness.api import Need, Point

AXES = ("phase", "granularity", "batch_size")
NEW_TOKENS = 16
PROMPTS = {1: 33, 4: 21}  # batch size: tokens of each prompt

Results = dict[tuple[str, str, int], torch.Tensor]  # launch, phase, batch size


def preflight(cfg: Config) -> Iterable[Need]:
    need = needs.compression(cfg.model)
    size = need.memory  # three times the largest unit: the model itself comes on top where it is known
    if cfg.model.geometry:
        size = sum(t.nbytes for t in hf.tensor_shapes(cfg.model.geometry))
    on_gpu = cfg.device.name == "cuda"
    return [need, Need("the model, twice", memory=2 * size, gpu_memory=2 * size if on_gpu else 0, minutes=size / 5e9)]


def run(cfg: Config, done: Mapping[str, list[dict[str, Any]]]) -> Iterator[Point]:
    if "all" in done:
        return
    with tempfile.TemporaryDirectory() as scratch:
        model, weights, about, compress = load(cfg, Path(scratch))
        names = {name for name, p in model.named_parameters() if p.dim() > 1}
        bits = {name: p.detach().cpu() for name, p in model.named_parameters() if name in names}
        expected = outputs(model, cfg)
        model = compress(model)
        identity = {
            "weights": weights,
            "codec": "dfloat11",
            "kernel": "fast" if cfg.device.name == "cuda" else "cpu",
            "mode": "exact",
        }
        rows = [identity | row for row in weight_rows(model, bits)]
        del bits
        for granularity in modules.GRANULARITIES:
            modules.attach(model, granularity)
            for (launch, phase, batch_size), got in outputs(model, cfg).items():
                wanted = expected[launch, phase, batch_size]
                metric = "id_mismatches" if wanted.dtype == torch.int64 else "logit_mismatches"
                axes = {"launch": launch, "phase": phase, "granularity": granularity, "batch_size": batch_size}
                for name, value in ((metric, differing(got, wanted)), ("compared", wanted.numel())):
                    rows.append(identity | axes | {"metric": name, "value": value, "unit": "elements"})
    yield Point("all", rows, about)


def load(cfg: Config, scratch: Path) -> tuple[torch.nn.Module, str, dict[str, Any], Callable[[torch.nn.Module], torch.nn.Module]]:
    """The uncompressed model, what its weights are and where from, and what makes the compressed one of it."""
    device = cfg.device.name
    if cfg.model.source == "synthetic":
        if cfg.model.distribution != "normal":
            raise ValueError(f"model.distribution={cfg.model.distribution}: this experiment draws from the normal one only")

        def in_place(model: torch.nn.Module) -> torch.nn.Module:
            modules.compress_(model)
            return model

        about = {"source": "synthetic", "distribution": "transformers' initialisation", "seed": cfg.seed}
        return hf.build(cfg.model.geometry, cfg.seed, device), "synthetic-normal", about, in_place
    source = open_source(cfg.model, cfg.seed, cfg.cache)
    assert isinstance(source, SafetensorsSource)

    def by_checkpoint(model: torch.nn.Module) -> torch.nn.Module:
        del model
        checkpoint.compress(source.directory, scratch / "compressed", loadable=hf.parameter_names)
        checkpoint.verify(scratch / "compressed", source.directory)
        return hf.load(scratch / "compressed", device)

    return hf.load(source.directory, device), source.weights, source.provenance, by_checkpoint


@torch.inference_mode()
def weight_rows(model: torch.nn.Module, bits: dict[str, torch.Tensor]) -> Iterator[dict[str, Any]]:
    """Every compressed weight against the original's."""
    mismatches, compared, compressed = 0, 0, 0
    for prefix, module in model.named_modules():
        for name, parameter in modules.compressed_parameters(module).items():
            if f"{prefix}.{name}" in bits:  # tied ones have one name there
                unit = parameter.unit()
                out = torch.empty(unit.numel, dtype=torch.bfloat16, device=unit.encoded_exponent.device)
                mismatches += differing(unit.decompress(out).cpu(), bits[f"{prefix}.{name}"].reshape(-1))
                compared += unit.numel
                compressed += unit.nbytes - unit.table.nbytes
    if not compared:
        raise ValueError("nothing of this model is compressed: there is nothing to compare")
    values = {"weight_mismatches": mismatches, "compared": compared}
    yield from ({"phase": "weights", "metric": name, "value": value, "unit": "elements"} for name, value in values.items())
    yield {"phase": "weights", "metric": "ratio_percent", "value": 100 * compressed / (2 * compared), "unit": "%"}


@torch.inference_mode()
def outputs(model: torch.nn.Module, cfg: Config) -> Results:
    """Logits (bf16) and ids (int64) of all phases, on the CPU. The same settings for whatever model."""
    results: Results = {}
    for batch_size, length in PROMPTS.items():
        generator = torch.Generator().manual_seed(cfg.seed)
        ids = torch.randint(5, model.config.vocab_size, (batch_size, length), generator=generator).to(cfg.device.name)
        results["eager", "prefill", batch_size] = model(ids).logits.cpu()
        settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
        settings |= {"pad_token_id": 0, "return_dict_in_generate": True, "output_logits": True}
        greedy = model.generate(ids, do_sample=False, **settings)
        results["eager", "greedy", batch_size] = greedy.sequences.cpu()
        results["eager", "decode", batch_size] = torch.stack(greedy.logits).to(torch.bfloat16).cpu()
        torch.manual_seed(cfg.seed)
        results["eager", "sampled", batch_size] = model.generate(ids, do_sample=True, **settings).sequences.cpu()
        if cfg.device.name == "cuda":
            results["graph", "prefill", batch_size] = graphed(lambda ids=ids: model(ids, use_cache=False).logits)  # type: ignore[misc]
    return results


def graphed(forward: Callable[[], torch.Tensor]) -> torch.Tensor:
    """The result of a forward replayed from a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        forward()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        out = forward()
    out.zero_()
    graph.replay()
    torch.cuda.synchronize()
    return out.cpu()


def differing(a: torch.Tensor, b: torch.Tensor) -> int:
    """Elements that differ in a bit; all of them where shapes do."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return max(a.numel(), b.numel())
    if a.dtype == torch.bfloat16:
        a, b = a.contiguous().view(torch.int16), b.contiguous().view(torch.int16)
    return int((a != b).sum())


def table(rows: pd.DataFrame, cfg: Config) -> pd.DataFrame:
    """What was compared and how much of it differs."""
    index = ["launch", "phase", "granularity", "batch_size"]
    compared = rows[rows["metric"] == "compared"].set_index(index)["value"].rename("compared")
    differ = rows[rows["metric"].str.endswith("mismatches")].set_index(index)["value"].rename("differ")
    return pd.concat([compared, differ], axis=1).reset_index()
