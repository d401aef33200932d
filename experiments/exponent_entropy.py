"""How much information sign, exponent and mantissa carry (paper Fig. 1), and how rare exponents are (Fig. 8 and 9).

Entropies are over all linear projections of the blocks together, as in the paper, and apart for embedding and lm_head.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd

from df11 import bits, huffman
from df11.sources import open_source, sampled_blocks, split_units
from experiments import needs
from experiments.config import Config
from experiments.harness.api import Need, Point
from experiments.harness.progress import track

AXES = ("scope", "field", "rank", "exponent", "blocks")
FIELDS = ("sign", "exponent", "mantissa")


def inputs(cfg: Config) -> object:
    return needs.inputs(cfg.model)


def preflight(cfg: Config) -> Iterable[Need]:
    return [needs.compression(cfg)]


def run(cfg: Config, done: Mapping[str, list[dict[str, Any]]]) -> Iterator[Point]:
    source = open_source(cfg.model, cfg.seed, cfg.cache)
    units, _ = split_units(source.tensors(), cfg.model.sample_blocks)
    for kind in sorted({u.kind for u in units}):
        if kind in done:
            continue
        counts = {name: np.zeros(n, np.int64) for name, n in zip(FIELDS, (2, bits.EXPONENTS, 128), strict=True)}
        for unit in track([u for u in units if u.kind == kind], description=f"{kind}s of {cfg.model.name}"):
            for tensor in unit.tensors:
                for chunk in source.chunks(tensor.name):
                    for name, histogram in bits.field_histograms(bits.to_bits(chunk)).items():
                        counts[name] += unit.repeats * histogram
        identity = {"weights": source.weights, "codec": "bf16", "kernel": "cpu", "scope": kind, "blocks": sampled_blocks(units)}
        yield Point(kind, [identity | r for r in rows(counts)], source.provenance)


def rows(counts: Mapping[str, np.ndarray]) -> Iterator[dict[str, Any]]:
    for name, histogram in counts.items():
        yield {"field": name, "metric": "entropy_bits", "value": huffman.entropy(histogram), "unit": "bits/weight"}
        yield {"field": name, "metric": "values_used", "value": int((histogram > 0).sum()), "unit": "values"}
    exponents = counts["exponent"]
    ranked = np.argsort(-exponents, kind="stable")[: (exponents > 0).sum()]
    for rank, exponent in enumerate(ranked.tolist(), 1):
        frequency = float(exponents[exponent] / exponents.sum())
        yield {
            "field": "exponent",
            "rank": rank,
            "exponent": exponent,
            "metric": "relative_frequency",
            "value": frequency,
            "unit": "1",
        }


def table(rows: pd.DataFrame, cfg: Config) -> pd.DataFrame:
    """Entropies a field and the number of exponents that occur."""
    entropies = rows[rows["metric"] == "entropy_bits"].pivot_table(index=["model", "scope"], columns="field", values="value")
    used = rows[(rows["metric"] == "values_used") & (rows["field"] == "exponent")].set_index(["model", "scope"])["value"]
    out = entropies[list(FIELDS)].rename(columns=lambda name: f"{name} bits")
    return out.assign(**{"exponents used": used.astype(int)}).reset_index()
