"""Size before and after compression (paper Table 1): per unit, over all compressed tensors, and over the whole checkpoint.

Every unit is really encoded, decoded and compared bit by bit. Sizes count everything that is stored: codes, sign and
mantissa, tables, gaps, positions, and in scope `model` the tensors that stay as they are (norms, biases).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from df11 import bits, huffman
from df11.formats import Format, get_format
from df11.sources import Unit, WeightSource, open_source, sampled_blocks, split_units
from experiments import needs
from experiments.config import Config
from experiments.harness import memory
from experiments.harness.api import Need, Point
from experiments.harness.progress import track

AXES = ("scope", "module", "blocks")
PUBLISHED = Path(__file__).parents[1] / "results" / "paper" / "compression.csv"  # Table 1


@dataclass
class Tally:
    """What one unit, or a sum of them, holds before and after."""

    weights: int = 0
    original_bytes: int = 0
    information_bits: float = 0.0  # exponents at their entropy, all else raw: no code of single exponents can be shorter
    exponent_bits: float = 0.0  # the share of the exponents in it
    coded_weights: int = 0
    mismatches: int = 0
    stored: Counter[str] = field(default_factory=Counter)  # bytes by part

    def add(self, other: Tally, times: int = 1) -> None:
        for name in ("weights", "original_bytes", "information_bits", "exponent_bits", "coded_weights", "mismatches"):
            setattr(self, name, getattr(self, name) + times * getattr(other, name))
        self.stored.update({part: times * size for part, size in other.stored.items()})

    def rows(self) -> Iterator[dict[str, Any]]:
        n = max(self.weights, 1)
        compressed = sum(self.stored.values())
        bits_per_weight, bound = 8 * compressed / n, self.information_bits / n
        yield row("weights", self.weights, "weights")
        yield row("coded_weights", self.coded_weights, "weights")
        yield row("original_bytes", self.original_bytes, "bytes")
        yield row("compressed_bytes", compressed, "bytes")
        for part, size in self.stored.items():
            yield row(f"{part}_bytes", size, "bytes")
        yield row("ratio_percent", 100 * compressed / max(self.original_bytes, 1), "%")
        yield row("bits_per_weight", bits_per_weight, "bits/weight")
        yield row("exponent_entropy_bits", self.exponent_bits / max(self.coded_weights, 1), "bits/weight")
        yield row("entropy_bound_bits", bound, "bits/weight")
        yield row("overhead_bits", bits_per_weight - bound, "bits/weight")
        yield row("weight_mismatches", self.mismatches, "weights")

    @classmethod
    def from_rows(cls, rows: Iterable[Mapping[str, Any]]) -> Tally:
        """Inverse of `rows`, for units that an interrupted run had finished."""
        values = {r["metric"]: r["value"] for r in rows}
        named = ("original_bytes", "compressed_bytes", "peak_memory_bytes")
        parts = {m.removesuffix("_bytes"): int(v) for m, v in values.items() if m.endswith("_bytes") and m not in named}
        return cls(
            weights=int(values["weights"]),
            original_bytes=int(values["original_bytes"]),
            information_bits=values["entropy_bound_bits"] * values["weights"],
            exponent_bits=values["exponent_entropy_bits"] * values["coded_weights"],
            coded_weights=int(values["coded_weights"]),
            mismatches=int(values["weight_mismatches"]),
            stored=Counter(parts),
        )


def row(metric: str, value: float, unit: str) -> dict[str, Any]:
    return {"metric": metric, "value": value, "unit": unit}


def inputs(cfg: Config) -> object:
    return needs.inputs(cfg.model)


def preflight(cfg: Config) -> Iterable[Need]:
    return [needs.compression(cfg)]


def run(cfg: Config, done: Mapping[str, list[dict[str, Any]]]) -> Iterator[Point]:
    source = open_source(cfg.model, cfg.seed, cfg.cache)
    codec = get_format(cfg.codec.name, **cfg.codec.options)
    units, rest = split_units(source.tensors(), cfg.model.sample_blocks)
    identity = {"weights": source.weights, "codec": codec.name, "kernel": "cpu", "blocks": sampled_blocks(units)}
    compressed, peaks = Tally(), [0.0]
    for unit in track(units, description=f"compress {cfg.model.name}"):
        if unit.name in done:
            tally = Tally.from_rows(done[unit.name])
            peaks += [r["value"] for r in done[unit.name] if r["metric"] == "peak_memory_bytes"]
        else:
            memory.reset_peak()
            tally = compress(codec, source, unit)
            peaks.append(memory.peak())
            rows = [*tally.rows(), row("repeats", unit.repeats, "units"), row("peak_memory_bytes", peaks[-1], "bytes")]
            yield Point(unit.name, [identity | {"scope": "unit", "module": unit.name} | r for r in rows], source.provenance)
        compressed.add(tally, unit.repeats)
    model, uncompressed = Tally(), sum(t.nbytes for t in rest)
    model.add(compressed)
    model.add(
        Tally(
            weights=sum(t.numel for t in rest),
            original_bytes=uncompressed,
            information_bits=8 * uncompressed,
            stored=Counter(uncompressed=uncompressed),
        )
    )
    largest = max((2 * sum(t.numel for t in unit.tensors) for unit in units), default=0)
    extra = [row("peak_memory_bytes", max(peaks), "bytes"), row("largest_unit_bytes", largest, "bytes")]
    for scope, tally, more in (("compressed", compressed, []), ("model", model, extra)):
        if scope not in done:
            yield Point(scope, [identity | {"scope": scope, "module": "all"} | r for r in [*tally.rows(), *more]])


def compress(codec: Format, source: WeightSource, unit: Unit) -> Tally:
    """Encode one unit, decode it, compare all bits, count all bytes."""

    def chunks() -> Iterator[torch.Tensor]:
        for tensor in unit.tensors:
            yield from source.chunks(tensor.name)

    encoded = codec.encode(chunks, [t.shape for t in unit.tensors])
    histogram, mismatches = compare(chunks(), codec.stream(encoded))
    n = int(histogram.sum())
    exponent_bits = huffman.entropy(histogram) * n
    return Tally(n, 2 * n, exponent_bits + 8 * n, exponent_bits, n, mismatches, Counter(codec.nbytes(encoded)))


def compare(original: Iterator[torch.Tensor], decoded: Iterator[torch.Tensor]) -> tuple[np.ndarray, int]:
    """Exponent histogram of the original, and how many weights of the decoded stream differ in any bit."""
    histogram, mismatches = np.zeros(bits.EXPONENTS, np.int64), 0
    ours = np.empty(0, np.uint16)
    for chunk in original:
        theirs = bits.to_bits(chunk)
        histogram += bits.histogram(theirs)
        while ours.size < theirs.size:
            ours = np.concatenate([ours, bits.to_bits(next(decoded))])
        mismatches += int(np.count_nonzero(ours[: theirs.size] != theirs))
        ours = ours[theirs.size :]
    # Running the decoder to its end makes it check its checksum.
    return histogram, mismatches + ours.size + sum(piece.numel() for piece in decoded)


def table(rows: pd.DataFrame, cfg: Config) -> pd.DataFrame:
    """The blocks together, each other unit, the sums, and what the paper reports for the trained model of this geometry."""
    wide = rows.pivot_table(index=["scope", "module"], columns="metric", values="value", sort=False).reset_index()
    wide["line"] = wide["scope"].map({"compressed": "all units", "model": "checkpoint"}).fillna(wide["module"])
    blocks = wide[(wide["scope"] == "unit") & wide["module"].str.contains(r"\.\d+$")]
    if len(blocks) > 1:
        wide.loc[blocks.index, "line"] = f"{len(blocks)} blocks"
    elif rows["blocks"].iloc[0] != "all":
        wide.loc[blocks.index, "line"] += f" ({rows['blocks'].iloc[0]} blocks)"
    lines = wide.groupby("line", sort=False)
    sums = lines[["original_bytes", "compressed_bytes", "weights", "weight_mismatches"]].sum()
    out = pd.DataFrame(
        {
            "unit": sums.index,
            "GB": sums["original_bytes"] / 1e9,
            "GB after": sums["compressed_bytes"] / 1e9,
            "%": 100 * sums["compressed_bytes"] / sums["original_bytes"],
            "bits/weight": 8 * sums["compressed_bytes"] / sums["weights"],
            "entropy bound": lines["entropy_bound_bits"].mean(),
            "weights that differ": sums["weight_mismatches"].astype("Int64"),
        }
    )
    paper = pd.read_csv(PUBLISHED).query("version == 'v3'").set_index("model")
    if cfg.model.title in paper.index:
        theirs = paper.loc[cfg.model.title]
        values = [theirs[column] for column in ("original_gb", "df11_gb", "ratio_percent", "bits_per_weight")]
        out.loc["published"] = ["published (trained weights)", *values, None, None]
    return out
