"""What a model is made of: which tensors are compressed, in which units; its specification."""

import pytest
import torch

from df11.sources import ModelSpec, TensorInfo, is_matrix, is_selected, sampled_blocks, split_units
from tests.sources.common import info


def test_what_is_compressed() -> None:
    assert all(
        is_matrix(dtype, shape)
        for dtype in ("BF16", torch.bfloat16)
        for shape in ((2, 3), (2, 3, 4), (2, 3, 4, 5), torch.Size((1, 1)))
    )
    assert not any(is_matrix("BF16", shape) for shape in ((), (6,), (0, 3), (2, 0, 3), (0, 3, 4, 5)))
    assert not any(is_matrix(dtype, (2, 3)) for dtype in ("F16", "F32", torch.float16, torch.float32))
    assert is_selected("a.b", (), ()) and is_selected("a.b", ("x", "a.*"), ("b",)) and not is_selected("a.b", ("x",), ())
    assert (
        not is_selected("a.b", (), ("*.b",)) and not is_selected("a.b", ("a.*",), ("*.b",)) and not is_selected("A.b", ("a.*",), ())
    )


def test_matrices_that_are_not_wanted_stay() -> None:
    tensors = [info("layers.0.a.weight", 2, 2), info("layers.0.b", 2, 2), info("c.weight", 2), info("d.weight", 2, 2, 2)]
    units, rest = split_units(tensors, wanted=lambda tensor: tensor.name.endswith(".weight"))
    assert [unit.tensors for unit in units] == [(tensors[0],), (tensors[3],)] and rest == [tensors[1], tensors[2]]


def llama_block(i: int, wide: int = 8) -> list[TensorInfo]:
    return [info(f"model.layers.{i}.{n}.weight", wide, 4) for n in ("self_attn.q_proj", "mlp.up_proj")] + [
        info(f"model.layers.{i}.input_layernorm.weight", 4)
    ]


def names_and_kinds(tensors: list[TensorInfo]) -> list[tuple[str, str]]:
    return [(u.name, u.kind) for u in split_units(tensors)[0]]


def test_units_of_common_names() -> None:
    llama = [info("model.embed_tokens.weight", 9, 4), *llama_block(0), *llama_block(1), info("lm_head.weight", 9, 4)]
    blocks = [("model.layers.0", "block"), ("model.layers.1", "block")]
    assert names_and_kinds(llama) == [("model.embed_tokens", "embedding"), *blocks, ("lm_head", "lm_head")]
    gpt2 = [
        info("transformer.wte.weight", 9, 4),
        info("transformer.wpe.weight", 9, 4),
        info("transformer.h.0.mlp.c_fc.weight", 4, 8),
    ]
    assert [kind for _, kind in names_and_kinds(gpt2)] == ["embedding", "embedding", "block"]
    vision = [
        info("visual.blocks.3.attn.qkv.weight", 4, 4),
        info("visual.patch.weight", 4, 3, 2, 2),
        info("merger.mlp.weight", 4, 4),
    ]
    assert names_and_kinds(vision) == [("visual.blocks.3", "block"), ("visual.patch", "linear"), ("merger.mlp", "linear")]
    assert names_and_kinds([info("gpt_neox.embed_in.weight", 4, 4), info("embed_out.weight", 4, 4)]) == [
        ("gpt_neox.embed_in", "embedding"),
        ("embed_out", "lm_head"),
    ]


def test_what_is_not_compressed_is_listed_once() -> None:
    kept = [info("model.norm.weight", 4), info("a.bias", 4), info("f.weight", 4, 4, dtype="F32"), info("none.weight", 0, 4)]
    units, rest = split_units([*llama_block(0), *kept, info("model.layers.0.experts.gate_up_proj", 3, 4, 8)])
    assert [t.name for t in units[0].tensors][-1] == "model.layers.0.experts.gate_up_proj"
    assert [t.name for t in rest] == ["model.layers.0.input_layernorm.weight", *(t.name for t in kept)]


def test_a_sample_stands_only_for_blocks_of_its_shapes() -> None:
    dense, experts = llama_block(0), [t for i in range(1, 6) for t in llama_block(i, wide=16)]
    vision = [info(f"vision.layers.{i}.{n}.weight", 8, 4) for i in range(3) for n in ("self_attn.q_proj", "mlp.up_proj")]
    tensors = [*dense, *experts, *vision, info("lm_head.weight", 9, 4)]
    units, rest = split_units(tensors, sample_blocks=2)
    assert {u.name: u.repeats for u in units} == {
        "model.layers.0": 1,
        "model.layers.1": 3,
        "model.layers.2": 2,
        "vision.layers.0": 2,
        "vision.layers.1": 1,
        "lm_head": 1,
    }
    assert sum(u.repeats * sum(t.numel for t in u.tensors) for u in units) + sum(t.numel for t in rest) == sum(
        t.numel for t in tensors
    )
    assert sampled_blocks(units) == "5 of 9" and sampled_blocks(split_units(tensors)[0]) == "all"


def test_specification() -> None:
    assert ModelSpec(path="Org/Some-Model-1.5B").name == "some_model_1_5b"
    assert ModelSpec(path="/data/My Model/").name == "my_model"
    for wrong in (
        {"source": "hub"},
        {"distribution": "uniform"},
        {"sample_blocks": 1},
        {"name": "a", "source": "synthetic"},
        {"name": "a_synthetic"},
    ):
        with pytest.raises(ValueError, match=r"model\."):
            ModelSpec(**wrong)
