"""Seeded weights: their bits, their statistics, and geometries that fit no memory."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from df11 import bits
from df11.sources import ModelSpec, SyntheticSource, open_source, split_units
from df11.sources.synthetic import CHUNK, alias_table, smollm2_exponents
from tests.helpers import same_bits
from tests.sources.common import LLAMA, info


def synthetic(distribution: str = "normal", seed: int = 0, threads: int = 0, **spec: float) -> SyntheticSource:
    tensors = [info("a.weight", 1000, 777), info("b.weight", 1000, 777), info("norm.weight", 5), info("a.bias", 5)]
    return SyntheticSource(
        ModelSpec(name="x_synthetic", source="synthetic", distribution=distribution, **spec), tensors, seed, threads
    )


@pytest.mark.parametrize("distribution", ["normal", "smollm2"])
def test_bits_depend_only_on_seed_and_name(distribution: str) -> None:
    whole = synthetic(distribution).read("a.weight")
    assert whole.shape == (1000, 777) and whole.dtype == torch.bfloat16 and not whole.isnan().any()
    for size, threads in ((1 << 24, 1), (CHUNK, 3), (CHUNK + 1, 2), (100_001, 2)):
        chunks = list(synthetic(distribution, threads=threads).chunks("a.weight", size))
        assert max(chunk.numel() for chunk in chunks) <= size
        assert same_bits(torch.cat(chunks), whole.reshape(-1))
    alone = torch.empty(CHUNK, dtype=torch.bfloat16)
    synthetic(distribution)._fill(alone, "a.weight", 1)
    assert same_bits(alone, whole.reshape(-1)[CHUNK : 2 * CHUNK])
    assert not torch.equal(whole.reshape(-1)[:CHUNK], alone)
    for other in (synthetic(distribution).read("b.weight"), synthetic(distribution, seed=1).read("a.weight")):
        assert (whole == other).float().mean() < 0.1


def test_normal_statistics_and_vectors() -> None:
    source = synthetic(std=0.05)
    weights = source.read("a.weight").float()
    n = weights.numel()
    assert abs(weights.mean()) < 5 * 0.05 / math.sqrt(n)
    assert abs(weights.std() / 0.05 - 1) < 5 / math.sqrt(2 * n)
    assert ((weights.abs() > 0.1).float().mean() - 0.0455).abs() < 0.002
    assert torch.equal(source.read("norm.weight"), torch.ones(5, dtype=torch.bfloat16))
    assert torch.equal(source.read("a.bias"), torch.zeros(5, dtype=torch.bfloat16))
    with pytest.raises(KeyError, match=r"no tensor 'c\.weight'"):
        source.read("c.weight")
    assert source.weights == "synthetic-normal" and source.provenance["std"] == 0.05


def test_smollm2_exponents_sign_and_mantissa() -> None:
    counts = dict.fromkeys(("sign", "exponent", "mantissa"), 0)
    for name in ("a.weight", "b.weight"):
        for chunk in synthetic("smollm2").chunks(name):
            for field, histogram in bits.field_histograms(bits.to_bits(chunk)).items():
                counts[field] = counts[field] + histogram
    expected = smollm2_exponents() / smollm2_exponents().sum()
    n = counts["exponent"].sum()
    assert np.abs(counts["exponent"] / n - expected).max() < 5 * 0.5 / math.sqrt(n)
    assert not counts["exponent"][expected == 0].any()
    for field, values in (("sign", 2), ("mantissa", 128)):
        assert np.abs(counts[field] - n / values).max() < 5 * math.sqrt(n / values)


@given(st.lists(st.integers(0, 10**9), min_size=256, max_size=256).filter(any))
def test_alias_table_keeps_every_share(counts: list[int]) -> None:
    pattern, alias, threshold = alias_table(np.array(counts))
    kept = threshold / (1 << 16)
    drawn = np.zeros(256)
    np.add.at(drawn, bits.split(pattern)[0], kept / 256)
    np.add.at(drawn, bits.split(alias)[0], (1 - kept) / 256)
    assert np.abs(drawn - np.array(counts) / sum(counts)).max() < 256 / (1 << 24)


def test_405b_geometry_costs_no_memory() -> None:
    geometry = LLAMA | {"vocab_size": 128256, "hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126}
    geometry |= {"num_attention_heads": 128, "num_key_value_heads": 8, "tie_word_embeddings": False}
    spec = ModelSpec(name="l_synthetic", source="synthetic", geometry=geometry, sample_blocks=1)
    source = open_source(spec, 0)
    assert sum(t.nbytes for t in source.tensors()) == 811_706_777_600
    units, rest = split_units(source.tensors(), spec.sample_blocks)
    assert [(u.kind, u.repeats) for u in units] == [("embedding", 1), ("block", 126), ("lm_head", 1)]
    assert sum(2 * t.numel * u.repeats for u in units for t in u.tensors) + sum(t.nbytes for t in rest) == 811_706_777_600
    assert next(source.chunks("lm_head.weight", 1000)).numel() == 1000
