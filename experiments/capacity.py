"""Which model fits which GPU, and with how long a context (v1 Table 1): weights, decode buffer, keys and values, and a reserve.

Compressed sizes are those of really encoded tensors, each a unit of its own as a loaded model has them. Nothing is run here:
`capacity_check` does that on one GPU.
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
TABLE_BYTES = 4 * gpu.TABLE_WORDS  # of the fast kernel, for each unit


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
    stored: dict[str, int] = {}
    for unit in track(units, description=f"compress {cfg.model.name}"):
        if unit.name in done:
            stored[unit.name] = int(done[unit.name][0]["value"])
            continue
        stored[unit.name] = compressed_bytes(source, unit)
        row = {"codec": "dfloat11", "module": unit.name, "metric": "stored_bytes", "value": stored[unit.name], "unit": "bytes"}
        yield Point(unit.name, [identity | row], source.provenance)
    original = {unit.name: sum(t.nbytes for t in unit.tensors) for unit in units}
    layer = max(t.nbytes for unit in units for t in unit.tensors)
    footprints = {("bf16", "-"): footprint(cfg, units, original, sum(t.nbytes for t in rest), 0)}
    for granularity, buffer in (("layer", layer), ("block", max(original.values()))):
        footprints["dfloat11", granularity] = footprint(cfg, units, stored, sum(t.nbytes for t in rest), buffer)
    for card in cfg.bench.cards:
        key = f"{card.count} x {card.name}"
        if key not in done:
            fixed = identity | {"module": "all", "card": card.name, "cards": card.count, "card_mib": card.mib}
            rows = []
            for (codec, granularity), model in footprints.items():
                named = {"codec": codec, "kernel": "-" if codec == "bf16" else "fast", "granularity": granularity}
                rows += [fixed | named | row for row in verdicts(cfg, model, card.mib << 20, card.count)]
            yield Point(key, rows)


def compressed_bytes(source: WeightSource, unit: Unit) -> int:
    """Bytes on a GPU of all matrices of a unit."""
    codec = get_format("dfloat11")
    size = 0
    for tensor in unit.tensors:
        encoded = codec.encode(partial(source.chunks, tensor.name), [tensor.shape])
        size += sum(codec.nbytes(encoded).values()) + TABLE_BYTES
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
    found["name"] = found["codec"].where(found["codec"] == "bf16", found["granularity"])
    found["value"] = found["value"].where(found["metric"] == "fits", found["value"] / 1e9)
    found["metric"] = found["metric"].replace({"needed_bytes": "GB"})
    wide = found.pivot_table(index=["cards", "card", "context_tokens"], columns=["name", "metric"], values="value", sort=False)
    wide.columns = [f"{name} {metric}" for name, metric in wide.columns]
    return wide.reset_index()
