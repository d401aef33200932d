"""Which model fits which GPU, and with how long a context (v1 Table 1): weights, decode buffer, keys and values, and a reserve.

Compressed sizes are those of really encoded tensors, each a unit of its own as a loaded model has them (mode=fused merges some).
Nothing is run here: `capacity_check` does that on one GPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import pandas as pd

from df11 import gpu, hf
from df11.formats import get_format
from df11.sources import Unit, WeightSource, open_source, sampled_blocks, split_units
from experiments import needs
from experiments.config import Config
from experiments.footprint import Footprint
from experiments.harness.api import Need, Point
from experiments.harness.progress import track

AXES = ("module", "blocks", "granularity", "context_tokens", "card", "cards", "card_mib")
TABLE_BYTES = {"dfloat11": 4 * gpu.TABLE_WORDS, "tiled": 0}  # of the fast kernel, for each unit
RUNS = {"bf16": {"kernel": "-"}, "dfloat11": {"kernel": "fast"}, "tiled": {"kernel": "tiled", "mode": "fused"}}  # codec: by what


def inputs(cfg: Config) -> object:
    return needs.inputs(cfg.model)


def preflight(cfg: Config) -> Iterable[Need]:
    return [needs.compression(cfg)]


def run(cfg: Config, done: Mapping[str, list[dict[str, Any]]]) -> Iterator[Point]:
    if not cfg.model.geometry:
        raise ValueError(f"model={cfg.model.name} has no geometry, from which the size of its cache follows")
    source = open_source(cfg.model, cfg.seed, cfg.cache)
    units, rest = split_units(source.tensors(), cfg.model.sample_blocks)
    identity = {"weights": source.weights, "blocks": sampled_blocks(units)}
    stored: dict[str, dict[str, int]] = {codec: {} for codec in TABLE_BYTES}
    for unit in track(units, description=f"compress {cfg.model.name}"):
        for codec, sizes in stored.items():
            key = f"{unit.name}, {codec}"
            if key in done:
                sizes[unit.name] = int(done[key][0]["value"])
                continue
            sizes[unit.name] = compressed_bytes(source, unit, codec)
            row = {"codec": codec, "module": unit.name, "metric": "stored_bytes", "value": sizes[unit.name], "unit": "bytes"}
            yield Point(key, [identity | RUNS[codec] | row], source.provenance)
    original = {unit.name: sum(t.nbytes for t in unit.tensors) for unit in units}
    layer = max(t.nbytes for unit in units for t in unit.tensors)
    others = sum(t.nbytes for t in rest)
    footprints = {("bf16", "-"): footprint(cfg, units, original, others, 0)}
    for granularity, buffer in (("layer", layer), ("block", max(original.values()))):
        footprints["dfloat11", granularity] = footprint(cfg, units, stored["dfloat11"], others, buffer)
    footprints["tiled", "-"] = footprint(cfg, units, stored["tiled"], others, layer)  # long prompts decompress a layer at a time
    for card in cfg.bench.cards:
        key = f"{card.count} x {card.name}"
        if key not in done:
            fixed = identity | {"module": "all", "card": card.name, "cards": card.count, "card_mib": card.mib}
            rows = []
            for (codec, granularity), model in footprints.items():
                named = {"codec": codec, "granularity": granularity}
                rows += [fixed | RUNS[codec] | named | row for row in verdicts(cfg, model, card.mib << 20, card.count)]
            yield Point(key, rows)


def compressed_bytes(source: WeightSource, unit: Unit, name: str) -> int:
    """Bytes on a GPU of all matrices of a unit."""
    codec = get_format(name)
    size = 0
    for tensor in unit.tensors:
        encoded = codec.encode(partial(source.chunks, tensor.name), [tensor.shape])
        size += sum(codec.nbytes(encoded).values()) + TABLE_BYTES[name]
    return size


def footprint(cfg: Config, units: list[Unit], size: dict[str, int], rest: int, buffer: int) -> Footprint:
    blocks = [unit for unit in units if unit.kind == "block"]
    count = sum(unit.repeats for unit in blocks)
    mean = sum(unit.repeats * size[unit.name] for unit in blocks) / count
    ends = {unit.name: size[unit.name] for unit in units if unit.kind != "block"}
    first = sum(value for name, value in ends.items() if "emb" in name)
    last = sum(ends.values()) - first + rest
    return Footprint(count, mean, first, last, buffer, cfg.bench.reserve_bytes, partial(hf.cache_bytes, cfg.model.geometry))


def verdicts(cfg: Config, model: Footprint, memory: int, cards: int) -> Iterator[dict[str, Any]]:
    yield {"metric": "weights_bytes", "value": model.weights, "unit": "bytes"}
    yield {"metric": "decode_buffer_bytes", "value": model.buffer * cards, "unit": "bytes"}
    yield {"metric": "longest_context", "value": model.longest(memory, cards), "unit": "tokens"}
    for tokens in cfg.bench.lengths:
        at = {"context_tokens": tokens}
        yield at | {"metric": "cache_bytes", "value": model.cache(tokens), "unit": "bytes"}
        yield at | {"metric": "needed_bytes", "value": model.needed(tokens, cards), "unit": "bytes"}
        yield at | {"metric": "fits", "value": int(model.fits(tokens, memory, cards)), "unit": "1"}


def table(rows: pd.DataFrame, cfg: Config) -> pd.DataFrame:
    """A line for cards and contexts: what is needed, and whether it fits, in BF16 and compressed."""
    found = rows[rows["metric"].isin(["needed_bytes", "fits"])].copy()
    found["name"] = found["granularity"].where(found["codec"] == "dfloat11", found["codec"])
    found["value"] = found["value"].where(found["metric"] == "fits", found["value"] / 1e9)
    found["metric"] = found["metric"].replace({"needed_bytes": "GB"})
    wide = found.pivot_table(index=["cards", "card", "context_tokens"], columns=["name", "metric"], values="value", sort=False)
    wide.columns = [f"{name} {metric}" for name, metric in wide.columns]
    return wide.reset_index()
