"""Checkpoints as their authors publish them: other names than the model's, ties, merged experts, any class from any of them."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from df11 import checkpoint, cli, fused, hf, hf_io, memory, modules
from df11.tensors import CompressedTensor, dense
from tests.helpers import same_bits

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 300,
}
EXPERTS = {"head_dim": 16, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
TEXT = SMALL | {"head_dim": 16}
VISION = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 56}
IDS = torch.arange(3, 43).view(2, 20)

Tensors = dict[str, torch.Tensor]


def make(where: Path, cls: str, model_type: str, **more: Any) -> Path:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **(SMALL | more))
    getattr(transformers, cls)._from_config(config, dtype=torch.bfloat16).save_pretrained(where)
    return where


def gemma3(where: Path) -> Path:
    parts = {"text_config": TEXT, "vision_config": VISION | {"patch_size": 14}, "mm_tokens_per_image": 16}
    return make(where, "Gemma3ForConditionalGeneration", "gemma3", **parts)


def rewrite(directory: Path, change: Callable[[Tensors], Tensors]) -> Path:
    """Change what the single file of a checkpoint holds."""
    file = directory / "model.safetensors"
    save_file({name: t.contiguous() for name, t in change(load_file(file)).items()}, file, {"format": "pt"})
    return directory


def shortened(prefix: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def compress(original: Path, *options: str) -> Path:
    target = original.with_name(f"{original.name}-df11")
    assert cli.main(["compress", str(original), str(target), *options]) == 0
    return target


def share(directory: Path) -> float:
    """Of the bytes of bf16 matrices of 4096 weights and more: how much is compressed."""
    rows = [r for r in checkpoint.summary(directory) if r["dtype"] == "BF16" and len(r["shape"]) > 1 and r["original"] >= 8192]
    return float(sum(r["original"] for r in rows if r["compressed"]) / sum(r["original"] for r in rows))


def same(one: torch.nn.Module, other: torch.nn.Module) -> None:
    """All parameters that a checkpoint gave have the same bits and ties."""
    own, theirs = (dict(model.named_parameters(remove_duplicate=False)) for model in (one, other))
    assert own.keys() == theirs.keys()
    for name, parameter in own.items():
        assert same_bits(dense(parameter.detach()), dense(theirs[name].detach())), name
    ties = [{name: id(p) for name, p in parameters.items()} for parameters in (own, theirs)]
    firsts = [{name: next(n for n, i in tie.items() if i == tie[name]) for name in tie} for tie in ties]
    assert firsts[0] == firsts[1]


@pytest.mark.parametrize(
    ("cls", "model_type", "prefix", "more"),
    [
        ("LlamaForCausalLM", "llama", "model.", {}),
        ("Qwen3ForCausalLM", "qwen3", "model.", {"tie_word_embeddings": True}),  # as Qwen3-Embedding has them
        ("GPT2LMHeadModel", "gpt2", "transformer.", {"n_embd": 64, "n_layer": 2, "n_head": 4}),
        ("BloomForCausalLM", "bloom", "transformer.", {"n_layer": 2, "n_head": 4}),
    ],
)
def test_names_without_the_prefix(tmp_path: Path, cls: str, model_type: str, prefix: str, more: dict[str, Any]) -> None:
    original = rewrite(make(tmp_path / "o", cls, model_type, **more), shortened(prefix))
    compressed = compress(original)
    assert share(compressed) == 1.0
    for auto in (transformers.AutoModelForCausalLM, transformers.AutoModel):
        model, expected = auto.from_pretrained(compressed), auto.from_pretrained(original)
        assert modules.is_compressed(model)
        same(model, expected)
        assert all(same_bits(a, b) for a, b in zip(model(IDS)[:1], expected(IDS)[:1], strict=True))


def tied_both(tensors: Tensors) -> Tensors:
    return tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}


def tied_different(tensors: Tensors) -> Tensors:
    return tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].flip(0)}


def tied_head_only(tensors: Tensors) -> Tensors:
    both = tied_both(tensors)
    del both["model.embed_tokens.weight"]
    return both


@pytest.mark.filterwarnings("ignore:.*quantization_config")
@pytest.mark.parametrize("mode", ["exact", "fused"])
@pytest.mark.parametrize("change", [dict, tied_both, tied_different, tied_head_only])
@pytest.mark.parametrize("cls", ["LlamaForCausalLM", "Qwen3ForCausalLM"])
def test_weights_are_tied_by_what_the_file_holds(tmp_path: Path, cls: str, change: Callable[[Tensors], Tensors], mode: str) -> None:
    made = make(tmp_path / "o", cls, cls.removesuffix("ForCausalLM").lower(), tie_word_embeddings=True)
    compressed = compress(rewrite(made, change))
    auto = transformers.AutoModelForCausalLM
    expected = auto.from_pretrained(made)
    same(auto.from_pretrained(compressed, quantization_config=hf.DF11Config(mode=mode)), expected)
    same(auto.from_pretrained(made, quantization_config=hf.DF11Config(mode=mode)), expected)
    auto.from_pretrained(compressed).save_pretrained(tmp_path / "again")
    same(auto.from_pretrained(tmp_path / "again"), expected)
    restored = tmp_path / "restored"
    checkpoint.restore(compressed, restored)
    assert (restored / "model.safetensors").read_bytes() == (made / "model.safetensors").read_bytes()


CLASSES = ["AutoModel", "AutoModelForCausalLM", "AutoModelForQuestionAnswering", "AutoModelForSequenceClassification"]


@pytest.mark.filterwarnings("ignore:.*quantization_config")
@pytest.mark.parametrize("base", [False, True])
@pytest.mark.parametrize("auto", CLASSES)
def test_any_class_from_any_checkpoint(tmp_path: Path, auto: str, base: bool) -> None:
    """From the causal model's and from the base model's: what the file has is loaded, what it lacks is drawn as ever."""
    original = make(tmp_path / "o", "LlamaModel" if base else "LlamaForCausalLM", "llama")
    compressed = compress(original)
    cls = getattr(transformers, auto)
    torch.manual_seed(5)
    expected, wanted = cls.from_pretrained(original, output_loading_info=True)
    for mode in ("exact", "fused"):
        torch.manual_seed(5)
        model, found = cls.from_pretrained(
            compressed, quantization_config=hf.DF11Config(mode=mode), output_loading_info=True, dtype=torch.bfloat16
        )
        assert found["missing_keys"] == wanted["missing_keys"]
        assert found["unexpected_keys"] == wanted["unexpected_keys"]
        mine = dict(model.named_parameters())
        held = {name: p for name, p in expected.named_parameters() if name not in wanted["missing_keys"]}
        assert modules.is_compressed(model) == bool(held)  # transformers finds nothing for a head that calls its base otherwise
        assert all(same_bits(dense(mine[name].detach()), p) for name, p in held.items())


def test_what_save_pretrained_writes_has_the_guard_and_dense_models_have_none(tmp_path: Path) -> None:
    original = make(tmp_path / "o", "Qwen3MoeForCausalLM", "qwen3_moe", **EXPERTS)
    in_place = hf.load(original, "cpu")
    modules.compress_(in_place)
    for name, model in (("loaded", hf.load(compress(original), "cpu")), ("in place", in_place)):
        model.save_pretrained(tmp_path / name)
        assert json.loads((tmp_path / name / "config.json").read_text())["transformers_weights"] == checkpoint.GUARD
        same(hf.load(tmp_path / name, "cpu"), hf.load(original, "cpu"))
        model.dequantize()
        model.save_pretrained(tmp_path / f"{name}, dense")
        again = hf.load(tmp_path / f"{name}, dense", "cpu")
        assert not modules.is_compressed(again)
        assert "transformers_weights" not in json.loads((tmp_path / f"{name}, dense" / "config.json").read_text())


def test_fewer_layers_than_the_file_has(tmp_path: Path) -> None:
    original = make(tmp_path / "o", "LlamaForCausalLM", "llama")
    compressed = compress(original)
    for options in ({}, {"quantization_config": hf.DF11Config()}):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            original if options else compressed, num_hidden_layers=1, **options
        )
        assert modules.is_compressed(model)
        same(model, transformers.AutoModelForCausalLM.from_pretrained(original, num_hidden_layers=1))


def test_batches_are_read_ahead_and_few_in_vain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is done for one GPU, with the host's memory in its place: every tensor as it is read alone, the rest untouched."""
    original = make(tmp_path / "o", "Qwen3MoeForCausalLM", "qwen3_moe", **EXPERTS | {"num_hidden_layers": 12})
    compressed = compress(original)
    ranges = []

    def read(file: Path, some: list[tuple[int, int]], device: torch.device) -> list[torch.Tensor]:
        ranges.append(some)
        data = file.read_bytes()
        return [torch.frombuffer(bytearray(data[begin:end]), dtype=torch.uint8) for begin, end in some]

    monkeypatch.setattr(memory, "read_to_gpu", read)
    places = hf_io.stored([str(compressed / "model.safetensors")])
    state = dict(load_file(compressed / "model.safetensors"))
    with hf_io._read_ahead(state, places, torch.device("cpu")) as entries:
        assert entries.keys() == {row["name"] for row in checkpoint.summary(compressed)} and not ranges
        wanted = load_file(original / "model.safetensors")
        few = [name for name in places if ".layers.0." in name]
        assert all(same_bits(dense(entries[name][...]), wanted[name]) for name in few)
        assert 0 < sum(map(len, ranges)) < 5 * len(places) / 2  # not all of twelve layers
        assert all(same_bits(dense(entries[name][...]), wanted[name]) for name in places if name not in few)
    assert sum(map(len, ranges)) == 5 * len(places)
    assert all(len({place.file for place in batch}) == 1 for batch in hf_io._batches(places.values()))


def test_sizes_that_do_not_fit_are_told_or_ignored_as_ever(tmp_path: Path) -> None:
    original = make(tmp_path / "o", "LlamaForSequenceClassification", "llama", num_labels=100, pad_token_id=0)
    compressed = compress(original)
    cls = transformers.LlamaForSequenceClassification
    for options in ({}, {"quantization_config": hf.DF11Config()}):
        source = original if options else compressed
        with pytest.raises(RuntimeError, match="mismatch"):
            cls.from_pretrained(source, num_labels=101, **options)
        model = cls.from_pretrained(source, num_labels=101, ignore_mismatched_sizes=True, **options)
        assert model.score.weight.shape == (101, 64) and modules.is_compressed(model.model)
        same(model.model, transformers.LlamaModel.from_pretrained(original))


@pytest.mark.parametrize("name", ["gemma3", "qwen3_moe", "mixtral", "gpt_oss", "dbrx", "t5"])
def test_published_layouts(tmp_path: Path, name: str) -> None:
    """Renamed, merged, interleaved, transposed: bits equal, experts one stack with one code, saved as published, restored."""
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    ffn = {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2}
    attention = {"kv_n_heads": 4, "rope_theta": 10000.0, "clip_qkv": 8.0}
    dbrx = {"d_model": 64, "n_heads": 4, "n_layers": 2, "ffn_config": ffn, "attn_config": attention}
    t5 = {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4}
    made: dict[str, tuple[str, dict[str, Any]]] = {
        "qwen3_moe": ("Qwen3MoeForCausalLM", EXPERTS),
        "mixtral": ("MixtralForCausalLM", experts),
        "gpt_oss": ("GptOssForCausalLM", {"head_dim": 16, **experts}),
        "dbrx": ("DbrxForCausalLM", dbrx),
        "t5": ("T5ForConditionalGeneration", t5),
    }
    original = gemma3(tmp_path / "o") if name == "gemma3" else make(tmp_path / "o", made[name][0], name, **made[name][1])
    compressed = compress(original)
    assert share(compressed) == 1.0
    published = load_file(original / "model.safetensors").keys()
    expected = hf.load(original, "cpu").requires_grad_(False)  # torch.matmul chooses by it
    for model in (hf.load(compressed, "cpu"), type(expected).from_pretrained(original, quantization_config=hf.DF11Config())):
        same(model, expected)
        stacks = [p for p in model.parameters() if isinstance(p, CompressedTensor) and p.dim() == 3 and "xperts" in repr(model)]
        assert bool(stacks) == (name in ("qwen3_moe", "mixtral", "gpt_oss"))
        assert all(len(stack.units()) == stack._stored.shape[0] for stack in stacks)
        assert all(len({unit.luts.data_ptr() for unit in stack.units()}) == 1 for stack in stacks)
        behind = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
        assert same_bits(model(IDS, **behind).logits, expected(IDS, **behind).logits)
        model.save_pretrained(tmp_path / "again")
        rows = {row["name"]: row["compressed"] for row in checkpoint.summary(compressed)}
        again = hf_io.stored([str(tmp_path / "again" / "model.safetensors")]).keys()
        assert again == {name for name, done in rows.items() if done} and rows.keys() == published
        same(hf.load(tmp_path / "again", "cpu"), expected)
    restored = tmp_path / "restored"
    checkpoint.restore(compressed, restored)
    assert {p.name: p.read_bytes() for p in restored.iterdir()} == {p.name: p.read_bytes() for p in original.iterdir()}


def test_llama4_with_images(tmp_path: Path) -> None:
    """Experts transposed in stacks; its text model runs, as transformers 5.24 stops in the class's own forward."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = sizes | {"intermediate_size_mlp": 128, "num_key_value_heads": 4, "head_dim": 16, "vocab_size": 300}
    text |= {"num_local_experts": 4, "num_experts_per_tok": 1}
    vision = sizes | {"vision_output_dim": 64, "projector_input_dim": 64, "projector_output_dim": 64, "image_size": 56}
    torch.manual_seed(0)
    config = transformers.Llama4Config(text_config=text, vision_config=vision | {"patch_size": 14})
    for part in (config.text_config, config.vision_config):
        part.pad_token_id = None
    transformers.Llama4ForConditionalGeneration._from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "o")
    compressed = compress(tmp_path / "o")
    assert share(compressed) == 1.0
    model, expected = (hf.load(directory, "cpu").requires_grad_(False) for directory in (compressed, tmp_path / "o"))
    same(model, expected)
    stacks = [p for name, p in model.named_parameters() if "experts." in name and p.dim() == 3]
    assert stacks and all(len(stack.units()) == 4 for stack in stacks)
    assert same_bits(model.language_model(IDS).logits, expected.language_model(IDS).logits)
    checkpoint.restore(compressed, tmp_path / "r")
    files = {path.name: path.read_bytes() for path in (tmp_path / "o").iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "r").iterdir()} == files


def test_what_is_left_out_stays_so_in_what_is_merged_of_it(tmp_path: Path) -> None:
    original = make(tmp_path / "o", "Qwen3MoeForCausalLM", "qwen3_moe", **EXPERTS)
    model = hf.load(compress(original, "--exclude", "*.experts.*"), "cpu")
    kinds = {name: isinstance(p, CompressedTensor) for name, p in model.named_parameters() if p.dim() > 1}
    assert all(kind != ("experts" in name) for name, kind in kinds.items() if "gate." not in name)
    same(model, hf.load(original, "cpu"))


@pytest.mark.parametrize("name", ["gemma3", "mixtral", "llama without prefix"])
def test_released_refuses_what_it_could_not_load(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    if name == "gemma3":
        original = gemma3(tmp_path / "o")
    elif name == "mixtral":
        original = make(tmp_path / "o", "MixtralForCausalLM", "mixtral", num_local_experts=4, num_experts_per_tok=2)
    else:
        original = rewrite(make(tmp_path / "o", "LlamaForCausalLM", "llama"), shortened("model."))
    assert cli.main(["compress", str(original), str(tmp_path / "x"), "--released"]) == 1
    assert "could not be loaded again; compress without --released" in capsys.readouterr().err
    assert not list(tmp_path.glob("*x*"))


def test_the_last_line_of_released_is_true(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    original = make(tmp_path / "o", "LlamaForCausalLM", "llama")
    compressed = compress(original, "--released")
    assert "quantization_config=df11.hf.DF11Config()" in capsys.readouterr().out.splitlines()[-1]
    model = transformers.AutoModelForCausalLM.from_pretrained(compressed, quantization_config=hf.DF11Config())
    assert modules.is_compressed(model)
    same(model, transformers.AutoModelForCausalLM.from_pretrained(original))


@pytest.mark.parametrize("change", [tied_both, tied_different])
def test_released_checkpoints_are_tied_by_what_they_hold(tmp_path: Path, change: Callable[[Tensors], Tensors]) -> None:
    original = rewrite(make(tmp_path / "o", "LlamaForCausalLM", "llama", tie_word_embeddings=True), change)
    model = transformers.AutoModelForCausalLM.from_pretrained(compress(original, "--released"), quantization_config=hf.DF11Config())
    same(model, transformers.AutoModelForCausalLM.from_pretrained(original))


REMOTE = """
import json, sys, torch, transformers
torch.manual_seed(5)
for auto in sys.argv[2:]:
    model = getattr(transformers, auto).from_pretrained(sys.argv[1], trust_remote_code=True)
    from df11 import modules
    assert modules.is_compressed(model) and type(model).__module__.startswith("transformers.models."), auto
    print(auto, type(model).__name__)
"""


@pytest.mark.parametrize(
    ("cls", "model_type", "more"),
    [
        ("T5ForConditionalGeneration", "t5", {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4}),
        ("BertForMaskedLM", "bert", {}),
    ],
)
def test_remote_code_serves_every_auto_class(tmp_path: Path, cls: str, model_type: str, more: dict[str, Any]) -> None:
    compressed = compress(make(tmp_path / "o", cls, model_type, **more), "--remote-code")
    auto_map = json.loads((compressed / "config.json").read_text())["auto_map"]
    assert {"AutoModel", "AutoModelForSeq2SeqLM" if model_type == "t5" else "AutoModelForMaskedLM"} <= auto_map.keys()
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-c", REMOTE, str(compressed), *auto_map]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1000:]
    assert len(done.stdout.splitlines()) == len(auto_map)


def test_patterns_that_match_no_parameter(tmp_path: Path) -> None:
    original = make(tmp_path / "o", "LlamaForCausalLM", "llama")
    load = transformers.AutoModelForCausalLM.from_pretrained
    for options in ({"include": ("q_proj",)}, {"exclude": ("lm_head",)}):
        with pytest.raises(ValueError, match=r"matches no name.* for example"):
            load(original, quantization_config=hf.DF11Config(**options))
        model = load(original)
        for work in (modules.compress_, fused.fuse_):
            with pytest.raises(ValueError, match="matches no name"):
                work(model, **options)
        assert not modules.is_compressed(model)
    model = load(original, quantization_config=hf.DF11Config(include=("*.q_proj.weight",)))
    assert {name.split(".")[-2] for name, p in model.named_parameters() if isinstance(p, CompressedTensor)} == {"q_proj"}


def test_images_and_text(tmp_path: Path) -> None:
    """A pipeline's classes from one checkpoint: with images, the text model alone, the vision tower inside."""
    original = gemma3(tmp_path / "o")
    compressed = compress(original)
    for cls in (transformers.AutoModelForImageTextToText, transformers.AutoModel, transformers.AutoModelForCausalLM):
        model, expected = cls.from_pretrained(compressed), cls.from_pretrained(original)
        assert modules.is_compressed(model) and type(model) is type(expected)
        same(model, expected)
    model = transformers.AutoModelForImageTextToText.from_pretrained(compressed)
    expected = transformers.AutoModelForImageTextToText.from_pretrained(original)
    torch.manual_seed(0)
    pixels = torch.randn(1, 3, 56, 56).bfloat16()
    token = model.config.image_token_id
    ids = torch.cat([IDS[:1], torch.full((1, 16), token)], 1) if token < 300 else None
    if ids is not None:
        assert same_bits(model(ids, pixel_values=pixels).logits, expected(ids, pixel_values=pixels).logits)
    assert same_bits(dense(model.model.vision_tower(pixels)[0]), expected.model.vision_tower(pixels)[0])
