"""The main numbers of docs/scaling.md are what the committed rows give."""

from pathlib import Path
from statistics import median
from typing import Any

import pandas as pd
import pytest

from experiments.footprint import Footprint

ROOT = Path(__file__).parents[1]
MODEL = "llama3_1_405b_synthetic"
CARDS: dict[str, Any] = {"model": MODEL, "card": "H100 80 GB", "cards": 8}
MEMORY, RESERVE = 81559 << 20, 2_000_000_000
TILED_BITS = 10.94
TEXT = " ".join((ROOT / "docs" / "scaling.md").read_text().split())


def value(table: str, **identity: Any) -> float:
    """The median of the rows with this identity."""
    rows = pd.read_csv(ROOT / "results" / f"{table}.csv", dtype=str)
    for column, wanted in identity.items():
        rows = rows[rows[column] == str(wanted)]
    return float(median(rows["value"].astype(float)))


def tiled(buffer: int) -> Footprint:
    coded = {
        unit: value("compression_ratio", model=MODEL, scope="unit", module=unit, metric="coded_weights") * TILED_BITS / 8
        for unit in ("model.layers.0", "model.embed_tokens", "lm_head")
    }
    rest = value("compression_ratio", model=MODEL, scope="model", metric="uncompressed_bytes")
    token = value("capacity", **CARDS, granularity="block", context_tokens=4096, metric="cache_bytes") / 4096
    block, first, last = coded.values()
    return Footprint(126, block, round(first), round(last + rest), buffer, RESERVE, lambda tokens: int(token * tokens))


def test_sizes_of_405b() -> None:
    published = value("capacity", **CARDS, granularity="block", metric="weights_bytes")
    buffers = value("capacity", **CARDS, granularity="block", metric="decode_buffer_bytes")
    original = value("capacity", **CARDS, codec="bf16", metric="weights_bytes")
    room = 8 * (MEMORY - RESERVE)
    assert f"| BF16 | {original / 1e9:.1f} |" in TEXT
    assert f"| published layout | {published / 1e9:.1f} |" in TEXT
    assert f"| tiled layout | {tiled(0).weights / 1e9:.1f} *est.* |" in TEXT
    exact = int(value("capacity", **CARDS, granularity="block", metric="longest_context"))
    left = (room - published - buffers) / 1e9
    assert f"by block | {buffers / 1e9:.1f} (`capacity`) | {left:.1f} *est.* | {exact:,} (`capacity`) |" in TEXT


def test_bits_of_the_tiled_layout() -> None:
    rows = pd.read_csv(ROOT / "results" / "linear.csv", dtype=str)
    rows = rows[(rows["metric"] == "bits_per_weight") & (rows["columns"].astype(int) >= 5120)]
    bits = rows["value"].astype(float)
    assert f"{bits.min():.3f} to {bits.max():.3f} in every shape" in TEXT
    assert {round(b, 2) for b in bits} == {TILED_BITS}


@pytest.mark.parametrize("buffer", [0, 2 * 128256 * 16384])
def test_contexts_of_mode_fused(buffer: int) -> None:
    model = tiled(buffer)
    left = (8 * (MEMORY - RESERVE - buffer) - model.weights) / 1e9
    assert f"{left:.1f} *est.* | {model.longest(MEMORY, 8):,} *est.* |" in TEXT


def test_loading_and_verifying() -> None:
    size = {codec: value("load_time", codec=codec, metric="file_bytes") for codec in ("bf16", "dfloat11")}
    files = value("capacity", **CARDS, granularity="block", metric="weights_bytes")
    original = value("capacity", **CARDS, codec="bf16", metric="weights_bytes")
    read = value("load_time", codec="dfloat11", metric="read_s") / size["dfloat11"]
    cold, warm = (value("load_time", codec="dfloat11", metric="load_s", cache=c) / size["dfloat11"] for c in ("cold", "warm"))
    assert f"read in {files * read:.0f} s and loaded in {files * cold:.0f} s cold, {files * warm:.0f} s warm" in TEXT
    verify = value("load_time", metric="verify_s") / size["bf16"]
    assert f"405B {original * verify / 60:.0f} minutes" in TEXT
