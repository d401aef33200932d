"""Models of every kind compute and do with compressed weights what they do with their own: architectures, operations, adapters."""

from __future__ import annotations

import copy
import functools
import json
import multiprocessing
import pickle
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

from df11 import checkpoint, hf, modules, runtime
from df11.fused import is_fused
from df11.tensors import CompressedTensor, dense

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
IDS = torch.arange(3, 43).view(2, 20)
MASK = torch.ones_like(IDS)
LINEAR = {
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
JAMBA = {
    "num_hidden_layers": 4,
    "attn_layer_period": 4,
    "attn_layer_offset": 2,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "mamba_d_state": 8,
}
ENCODER_DECODER = {
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "max_position_embeddings": 64,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
}
T5 = {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
VISION = {"image_size": 32, "patch_size": 8, "num_channels": 3}
DETR = ENCODER_DECODER | {
    "use_timm_backbone": False,
    "use_pretrained_backbone": False,
    "backbone": None,
    "backbone_config": {
        "model_type": "resnet",
        "embedding_size": 16,
        "hidden_sizes": [16, 16, 32, 32],
        "depths": [1, 1, 1, 1],
        "out_features": ["stage4"],
    },
    "num_queries": 10,
}
# What the zoo's language models do not have (tests/test_zoo.py), and those of them that were hard, in place too. name: (class,
# model_type, what else its config gets); the name is of a test and has no other meaning.
ARCHITECTURES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "qwen3.5": ("Qwen3_5ForCausalLM", "qwen3_5_text", LINEAR),
    "zamba2": (
        "Zamba2ForCausalLM",
        "zamba2",
        {
            "num_hidden_layers": 4,
            "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
            "mamba_d_state": 16,
            "n_mamba_heads": 8,
            "chunk_size": 8,
            "adapter_rank": 16,
        },
    ),
    "jamba": ("JambaForCausalLM", "jamba", JAMBA),
    "dbrx": (
        "DbrxForCausalLM",
        "dbrx",
        {
            "d_model": 64,
            "n_heads": 4,
            "n_layers": 2,
            "max_seq_len": 64,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
            "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64},
        },
    ),
    "recurrent-gemma": (
        "RecurrentGemmaForCausalLM",
        "recurrent_gemma",
        {"num_hidden_layers": 3, "lru_width": 64, "head_dim": 16, "block_types": ["recurrent", "recurrent", "attention"]},
    ),
    "mt5": ("MT5ForConditionalGeneration", "mt5", T5),
    "t5": ("T5ForConditionalGeneration", "t5", T5),
    "detr": ("DetrForObjectDetection", "detr", DETR),
    "conditional-detr": ("ConditionalDetrForObjectDetection", "conditional_detr", DETR),
    "vit": ("ViTForImageClassification", "vit", VISION),
    "segformer": (
        "SegformerForSemanticSegmentation",
        "segformer",
        {"hidden_sizes": [16, 32, 32, 64], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 2, 4], "decoder_hidden_size": 32},
    ),
    "deberta-v2": (
        "DebertaV2ForMaskedLM",
        "deberta-v2",
        {
            "relative_attention": True,
            "pos_att_type": ["c2p", "p2c"],
            "position_buckets": 16,
            "max_position_embeddings": 64,
            "share_att_key": False,
        },
    ),
    "whisper": (
        "WhisperForConditionalGeneration",
        "whisper",
        ENCODER_DECODER
        | {
            "num_mel_bins": 8,
            "max_source_positions": 10,
            "max_target_positions": 64,
            "begin_suppress_tokens": None,
            "suppress_tokens": None,
        },
    ),
    "speech-to-text": (
        "Speech2TextForConditionalGeneration",
        "speech_to_text",
        ENCODER_DECODER
        | {
            "input_feat_per_channel": 8,
            "input_channels": 1,
            "conv_channels": 32,
            "max_source_positions": 64,
            "max_target_positions": 64,
        },
    ),
    "wav2vec2": (
        "Wav2Vec2ForCTC",
        "wav2vec2",
        {
            "conv_dim": [16, 16],
            "conv_stride": [5, 2],
            "conv_kernel": [10, 3],
            "num_feat_extract_layers": 2,
            "num_conv_pos_embeddings": 16,
            "num_conv_pos_embedding_groups": 2,
        },
    ),
    "modernbert": ("ModernBertForMaskedLM", "modernbert", {"cls_token_id": 1, "sep_token_id": 2, "max_position_embeddings": 64}),
    "rwkv": ("RwkvForCausalLM", "rwkv", {"attention_hidden_size": 64}),
    "olmo": ("OlmoForCausalLM", "olmo", {}),
    "opt": ("OPTForCausalLM", "opt", {"ffn_dim": 96, "word_embed_proj_dim": 64, "max_position_embeddings": 64}),
    "clip": (
        "CLIPModel",
        "clip",
        {"projection_dim": 32, "text_config": SMALL | {"max_position_embeddings": 64}, "vision_config": SMALL | VISION},
    ),
}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Products as small as these take several times longer on two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make(directory: Path, cls: str, model_type: str, **more: Any) -> Path:
    """A tiny random model as `save_pretrained` leaves it."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **(SMALL | more))
    getattr(transformers, cls)._from_config(config, dtype=torch.bfloat16).save_pretrained(directory)
    return directory


def tensors(found: Any) -> Iterator[torch.Tensor]:
    """All tensors of a model's output, those of its caches too."""
    if isinstance(found, torch.Tensor):
        yield found
    elif isinstance(found, Mapping):
        for value in found.values():
            yield from tensors(value)
    elif isinstance(found, (list, tuple)):
        for value in found:
            yield from tensors(value)
    elif hasattr(found, "__dict__"):
        yield from tensors(vars(found))


def same(found: Any, expected: Any) -> bool:
    """As bits, whatever the tensors stand in; false where there are none."""
    a, b = list(tensors(found)), list(tensors(expected))
    alike = len(a) == len(b) > 0 and all(x.dtype == y.dtype and x.shape == y.shape for x, y in zip(a, b, strict=True))
    return alike and all(torch.equal(bits(x), bits(y)) for x, y in zip(a, b, strict=True))


def bits(tensor: torch.Tensor) -> torch.Tensor:
    found = dense(tensor.detach())
    return found.contiguous().view(torch.int16) if found.dtype == torch.bfloat16 else found


def inputs(model: transformers.PreTrainedModel) -> dict[str, torch.Tensor]:
    """What a model of any kind gets."""
    random = torch.Generator().manual_seed(1)
    kind, given = model.config.model_type, model.main_input_name
    shapes = {"pixel_values": (2, 3, 32, 32), "input_values": (2, 400), "input_features": (2, 8, 20)}
    if kind == "speech_to_text":
        shapes["input_features"] = (2, 20, 8)
    found = {given: torch.randn(shapes[given], generator=random).bfloat16() if given in shapes else IDS}
    if given == "input_ids":
        found["attention_mask"] = MASK
    if kind == "clip":
        found["pixel_values"] = torch.randn(2, 3, 32, 32, generator=random).bfloat16()
    return found


@torch.no_grad()
def results(model: transformers.PreTrainedModel) -> list[Any]:
    """What a model computes: its outputs, and what it generates with the logits of each token."""
    given = inputs(model)
    decoder = {"decoder_input_ids": IDS[:, :5]} if model.config.is_encoder_decoder and model.can_generate() else {}
    found: list[Any] = [model(**given, **decoder, output_hidden_states=True)]
    if model.can_generate():
        greedy = {"do_sample": False, "max_new_tokens": 2, "min_new_tokens": 2}
        found.append(model.generate(**given, **greedy, return_dict_in_generate=True, output_logits=True))
    return found


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[type, Path, list[Any], int]]:
    """A model by its name: its class, where it is, what it computes and its number of parameters."""

    @functools.cache
    def find(name: str) -> tuple[type, Path, list[Any], int]:
        cls, model_type, more = ARCHITECTURES[name]
        directory = make(tmp_path_factory.mktemp("model") / "original", cls, model_type, **more)
        model = getattr(transformers, cls).from_pretrained(directory)
        model.requires_grad_(False)  # as compressed ones are: torch.matmul of Mamba's chooses by it, with other bits on some CPUs
        return type(model), directory, results(model), model.num_parameters()

    return find


def in_place(cls: Any, directory: Path, tmp_path: Path) -> Iterator[transformers.PreTrainedModel]:
    model = cls.from_pretrained(directory)
    assert modules.compress_(model)
    yield model
    for prefetch in (False, True):
        runtime.attach(model, "block", prefetch=prefetch)
        yield model


def in_flight(cls: Any, directory: Path, tmp_path: Path) -> Iterator[transformers.PreTrainedModel]:
    for granularity in runtime.GRANULARITIES:
        yield cls.from_pretrained(directory, quantization_config=hf.DF11Config(granularity=granularity))


def from_checkpoint(cls: Any, directory: Path, tmp_path: Path) -> Iterator[transformers.PreTrainedModel]:
    checkpoint.compress(directory, tmp_path / "compressed")
    yield cls.from_pretrained(tmp_path / "compressed")


def saved_again(cls: Any, directory: Path, tmp_path: Path) -> Iterator[transformers.PreTrainedModel]:
    cls.from_pretrained(directory, quantization_config=hf.DF11Config()).save_pretrained(tmp_path / "saved")
    yield cls.from_pretrained(tmp_path / "saved")


@pytest.mark.parametrize("way", [in_place, in_flight, from_checkpoint, saved_again])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures(name: str, way: Callable[..., Iterator[Any]], original: Callable[[str], Any], tmp_path: Path) -> None:
    cls, directory, expected, parameters = original(name)
    for model in way(cls, directory, tmp_path):
        assert modules.is_compressed(model)
        assert model.num_parameters() == parameters
        alike = same(results(model), expected)  # what a failed assert compares is printed, and this is much
        assert alike


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv1d(16, 8, 3), (2, 16, 9)),
        (nn.Conv2d(16, 8, 3), (2, 16, 9, 9)),
        (nn.Conv3d(4, 8, 3), (2, 4, 5, 5, 5)),
        (nn.ConvTranspose2d(16, 8, 3), (2, 16, 9, 9)),
        (nn.Bilinear(16, 16, 24), (2, 16)),
        (nn.LSTM(16, 24), (5, 2, 16)),
        (nn.GRU(16, 24), (5, 2, 16)),
        (nn.MultiheadAttention(16, 2), (5, 2, 16)),
        (nn.utils.parametrizations.weight_norm(nn.Linear(16, 24)), (2, 16)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
@torch.no_grad()
def test_layers(layer: nn.Module, shape: tuple[int, ...]) -> None:
    layer = copy.deepcopy(layer).bfloat16().eval()
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    inputs = {nn.Bilinear: (x, x), nn.MultiheadAttention: (x, x, x)}.get(type(layer), (x,))
    expected = layer(*inputs)
    matrices = {name for name, p in layer.named_parameters() if p.dim() > 1}
    assert set(modules.compress_(layer)) == matrices
    assert same(layer(*inputs), expected)
    assert not [w for w in getattr(layer, "_flat_weights", ()) if w.dim() > 1 and not isinstance(w, CompressedTensor)]


@torch.no_grad()
def test_fused_shared_blocks(original: Callable[[str], Any]) -> None:
    cls, directory, (expected, _), _ = original("zamba2")
    model = cls.from_pretrained(directory, quantization_config=hf.DF11Config(mode="fused"))
    assert is_fused(model)
    logits = model(**inputs(model)).logits.float()
    assert (logits - expected.logits.float()).norm() < 0.02 * expected.logits.float().norm()


# Operations.


def load(directory: Path, **options: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(directory, **options)


def load_compressed(directory: Path) -> Any:
    return load(directory, quantization_config=hf.DF11Config())


@pytest.fixture(scope="module", params=["untied", "tied"])
def llama(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("llama") / "original"
    return make(directory, "LlamaForCausalLM", "llama", tie_word_embeddings=request.param == "tied")


@pytest.fixture(params=["in place", "in flight", "from a checkpoint"])
def pair(llama: Path, request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Any]:
    """A model, and the same compressed."""
    if request.param == "in flight":
        model = load_compressed(llama)
    elif request.param == "in place":
        model = load(llama)
        modules.compress_(model)
    else:
        checkpoint.compress(llama, tmp_path / "compressed")
        model = load(tmp_path / "compressed")
    assert modules.is_compressed(model)
    return load(llama), model


def test_numbers(pair: tuple[Any, Any]) -> None:
    original, model = pair
    for options in ({}, {"exclude_embeddings": True}):
        assert model.num_parameters(**options) == original.num_parameters(**options)
    assert model.dtype == original.dtype and model.device == original.device
    arrays: dict[int, int] = {}
    for p in (*model.parameters(), *model.buffers()):
        arrays |= {id(a): a.nbytes for a in (p._stored.arrays.values() if isinstance(p, CompressedTensor) else [p])}
    assert model.get_memory_footprint() == sum(arrays.values()) < original.get_memory_footprint()
    assert model.get_memory_footprint() == sum(modules.stored_bytes(model).values())


@pytest.mark.parametrize("options", [{"new_num_tokens": 333}, {"new_num_tokens": 200}, {"pad_to_multiple_of": 64}], ids=str)
@pytest.mark.parametrize("mean", [True, False])
def test_resize_token_embeddings(pair: tuple[Any, Any], options: dict[str, int], mean: bool) -> None:
    for one in pair:
        torch.manual_seed(1)
        one.resize_token_embeddings(**options, mean_resizing=mean)
    original, model = pair
    assert model.config.vocab_size == original.config.vocab_size != 300
    assert same(model.state_dict(), original.state_dict())
    assert same(model(IDS % 200).logits, original(IDS % 200).logits)
    tied = original.config.tie_word_embeddings
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied


def test_embeddings(pair: tuple[Any, Any]) -> None:
    original, model = pair
    weight = model.get_output_embeddings().weight
    assert isinstance(weight, CompressedTensor) and weight.is_compressed
    assert (weight is model.get_input_embeddings().weight) == original.config.tie_word_embeddings
    expected = original.get_output_embeddings().weight
    assert same(weight, expected)
    assert same(model.get_input_embeddings().weight, original.get_input_embeddings().weight)
    assert same(weight[7:9] @ weight.mT, expected[7:9] @ expected.mT)
    replacement = nn.Embedding(300, 64, dtype=torch.bfloat16)
    for one in pair:
        one.set_input_embeddings(replacement)
    assert same(model(IDS).logits, original(IDS).logits)


def pickled(model: Any, tmp_path: Path) -> Any:
    return pickle.loads(pickle.dumps(model))


def saved_whole(model: Any, tmp_path: Path) -> Any:
    torch.save(model, tmp_path / "model.pt")
    return torch.load(tmp_path / "model.pt", weights_only=False)


def copied(model: Any, tmp_path: Path) -> Any:
    return copy.deepcopy(model)


def saved_state(model: Any, tmp_path: Path) -> Any:
    torch.save(model.state_dict(), tmp_path / "state.pt")
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in {id(p): p for p in other.parameters()}.values():
            p.zero_()
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    return other


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("again", [pickled, saved_whole, copied, saved_state])
def test_copies(pair: tuple[Any, Any], again: Callable[[Any, Path], Any], attached: bool, tmp_path: Path) -> None:
    original, model = pair
    if attached:
        runtime.attach(model, "block", prefetch=True)
    expected = results(original)
    other = again(model, tmp_path)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert type(p) is type(q) and p is not q and same(p, q)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()  # the copy has weights of its own
    assert modules.is_compressed(other)
    assert same(results(other), expected)
    assert not same(results(model), expected)


def test_saved(pair: tuple[Any, Any], tmp_path: Path) -> None:
    original, model = pair
    model.save_pretrained(tmp_path / "saved")
    assert same(results(load(tmp_path / "saved")), results(original))


def test_state_dicts_fit_one_another(pair: tuple[Any, Any]) -> None:
    original, model = pair
    expected = results(original)
    for source, target in ((original, model), (model, original)):
        with torch.no_grad():
            for p in target.parameters():
                p.zero_()
        assert not same(results(target), expected)
        target.load_state_dict(source.state_dict())
        assert same(results(target), expected)
    assert modules.is_compressed(model) and not modules.is_compressed(original)


def test_weights_are_written(pair: tuple[Any, Any]) -> None:
    before = results(pair[0])
    with torch.no_grad():
        for one in pair:
            one.model.layers[0].mlp.up_proj.weight.mul_(2)
            one.model.layers[1].mlp.up_proj.weight.data[3, 4] = 2
            one.model.embed_tokens.weight[3:9].add_(1)
            one.lm_head.weight.data = one.lm_head.weight.data.roll(1)
    original, model = pair
    assert modules.is_compressed(model)
    assert same(results(model), results(original)) and not same(results(original), before)


def test_all_weights_are_trained(pair: tuple[Any, Any]) -> None:
    before = copy.deepcopy(pair[0].state_dict())
    for one in pair:
        one.requires_grad_(True)
        optimizer = torch.optim.AdamW(one.parameters(), lr=0.01)
        for _ in range(2):
            gradients(one)
            nn.utils.clip_grad_norm_(one.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    original, model = pair
    assert modules.is_compressed(model)
    assert same(model.state_dict(), original.state_dict()) and not same(before, original.state_dict())


def _logits(model: Any) -> Any:
    torch.set_num_threads(1)
    with torch.no_grad():
        return modules.is_compressed(model), model(IDS).logits.view(torch.int16).tolist()


@pytest.mark.parametrize("llama", ["untied"], indirect=True)
def test_a_spawned_process_gets_a_model(llama: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(_logits, (load_compressed(llama),)) == (True, _logits(load(llama))[1])


def test_trainer_evaluates(pair: tuple[Any, Any], tmp_path: Path) -> None:
    rows = [{"input_ids": row, "labels": row} for row in IDS]
    arguments = transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], disable_tqdm=True)
    found = []
    for one in pair:
        trainer = transformers.Trainer(one, arguments, eval_dataset=rows)
        found.append((trainer.evaluate()["eval_loss"], trainer.predict(rows).predictions.tolist()))
    assert found[0] == found[1] and found[0][0] > 0


@pytest.mark.parametrize("name", ["untied", "tied", "mixtral", "from a checkpoint"])
def test_dequantize(name: str, tmp_path: Path) -> None:
    if name == "mixtral":
        make(tmp_path / "original", "MixtralForCausalLM", "mixtral", num_local_experts=4, num_experts_per_tok=2)
    else:
        make(tmp_path / "original", "LlamaForCausalLM", "llama", tie_word_embeddings=name == "tied")
    original, model = load(tmp_path / "original"), load_compressed(tmp_path / "original")
    if name == "from a checkpoint":
        checkpoint.compress(tmp_path / "original", tmp_path / "compressed")
        model = load(tmp_path / "compressed")
    assert modules.is_compressed(model)
    model.dequantize()
    for p, q in zip(model.parameters(), original.parameters(), strict=True):
        assert type(p) is nn.Parameter and same(p, q)
    assert same(results(model), results(original))
    model.save_pretrained(tmp_path / "saved")
    found, expected = (load_file(tmp_path / where / "model.safetensors") for where in ("saved", "original"))
    assert found.keys() == expected.keys()
    assert all(same(found[key], expected[key]) for key in expected)
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    assert same(results(load(tmp_path / "saved")), results(original))


@pytest.mark.parametrize("cls", ["OlmoForCausalLM", "NanoChatForCausalLM"])
def test_models_without_any_other_parameter(cls: str, tmp_path: Path) -> None:
    make(tmp_path / "original", cls, cls.removesuffix("ForCausalLM").lower())
    original, model = load(tmp_path / "original"), load_compressed(tmp_path / "original")
    assert all(isinstance(p, CompressedTensor) for p in model.parameters())
    assert (model.device, model.dtype) == (original.device, original.dtype) == (torch.device("cpu"), torch.bfloat16)
    assert same(results(model), results(original))
    model.save_pretrained(tmp_path / "saved")
    assert same(results(load(tmp_path / "saved")), results(original))


@pytest.mark.parametrize("convert", [nn.Module.float, nn.Module.double, nn.Module.half], ids=lambda function: function.__name__)
def test_other_dtypes(pair: tuple[Any, Any], convert: Callable[[Any], Any]) -> None:
    original, model = (getattr(one, convert.__name__)() for one in pair)
    assert {p.dtype for p in model.parameters()} == {p.dtype for p in original.parameters()} != {torch.bfloat16}
    assert same(model(IDS).logits, original(IDS).logits)


# Adapters.

TINY = {
    "llama": ("LlamaForCausalLM", {}),
    "llama tied": ("LlamaForCausalLM", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 16}),
    "gemma2": ("Gemma2ForCausalLM", {"head_dim": 16}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", EXPERTS | {"head_dim": 16, "num_experts": 8}),
}
ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "all linear": ("LoraConfig", {"target_modules": "all-linear"}),
    "attention": ("LoraConfig", {"target_modules": ["q_proj", "v_proj", "o_proj"]}),
    "embeddings": ("LoraConfig", {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "dora": ("LoraConfig", {"target_modules": ["q_proj", "down_proj"], "use_dora": True}),
    "trained whole": ("LoraConfig", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "ia3": ("IA3Config", {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
    "vera": ("VeraConfig", {"target_modules": ["q_proj"]}),
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    @functools.cache
    def find(name: str) -> Path:
        cls, more = TINY[name]
        return make(tmp_path_factory.mktemp("tiny") / "original", cls, name.split()[0], **more)

    return find


def adapted(model: Any, adapter: str, **more: Any) -> Any:
    """With adapters that do something."""
    peft = pytest.importorskip("peft")
    cls, options = ADAPTERS[adapter]
    torch.manual_seed(2)
    lora = {"r": 4} if cls == "LoraConfig" else {}
    wrapped = peft.get_peft_model(model, getattr(peft, cls)(**lora, **options, **more, task_type="CAUSAL_LM"))
    with torch.no_grad():
        for p in wrapped.parameters():
            if p.requires_grad:
                p += torch.randn(p.shape) * 0.1
    return wrapped


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("name", ["llama", "llama tied"])
def test_adapters_are_loaded(name: str, adapter: str, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    directory = tiny(name)
    plain = load(directory)(IDS).logits
    adapted(load(directory), adapter).save_pretrained(tmp_path / "adapter")
    ways = [lambda model: peft.PeftModel.from_pretrained(model, tmp_path / "adapter")]
    if adapter not in ("dora", "vera"):  # which transformers itself cannot load
        ways.append(lambda model: (model.load_adapter(str(tmp_path / "adapter")), model)[1])
    for way in ways:
        original, model = way(load(directory)), way(load_compressed(directory))
        assert modules.is_compressed(model)
        kinds = [{key: p.dtype for key, p in one.named_parameters()} for one in (original, model)]
        assert kinds[0] == kinds[1]
        found, expected = model(input_ids=IDS).logits, original(input_ids=IDS).logits
        assert same(found, expected) and not same(found, plain)
        runtime.attach(model, "block")
        with torch.no_grad():
            assert same(model(input_ids=IDS).logits, expected)
        found, expected = (one.generate(input_ids=IDS, attention_mask=MASK, max_new_tokens=3) for one in (model, original))
        assert torch.equal(found, expected)


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("adapter", ["all linear", "embeddings", "dora", "trained whole", "ia3", "vera"])
@pytest.mark.parametrize("name", ["llama", "llama tied"])
def test_adapters_are_merged(name: str, adapter: str, safe: bool, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    directory = tiny(name)
    before = load(directory).state_dict()
    both = [adapted(make_one(directory), adapter) for make_one in (load, load_compressed)]
    assert modules.is_compressed(both[1])
    for one in both:
        one.merge_adapter(safe_merge=safe)
        one.unmerge_adapter()
    assert same(both[1].state_dict(), both[0].state_dict())
    original, model = (one.merge_and_unload(safe_merge=safe) for one in both)
    assert modules.is_compressed(model)
    assert model.state_dict().keys() == original.state_dict().keys() == before.keys()
    assert same(model.state_dict(), original.state_dict()) and not same(model.state_dict(), before)
    assert same(results(model), results(original))
    model.save_pretrained(tmp_path / "merged")
    assert same(results(load(tmp_path / "merged")), results(original))


def gradients(model: Any) -> dict[str, torch.Tensor]:
    model.train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", TINY)
def test_gradients(name: str, checkpointing: bool, tiny: Callable[[str], Path]) -> None:
    found = []
    for make_one in (load, load_compressed):
        model = adapted(make_one(tiny(name)), "all linear")
        if checkpointing:
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
        found.append(gradients(model))
    assert modules.is_compressed(model)
    assert found[0].keys() == found[1].keys() and any(gradient.any() for gradient in found[0].values())
    assert same(found[1], found[0])


def test_gradients_of_inputs(tiny: Callable[[str], Path]) -> None:
    found = []
    for make_one in (load, load_compressed):
        model = make_one(tiny("llama"))
        given = torch.randn(2, 20, 64, generator=torch.Generator().manual_seed(1)).bfloat16().requires_grad_()
        model(inputs_embeds=given, labels=IDS).loss.backward()
        found.append(given.grad)
    assert same(found[1], found[0]) and found[0].any()


@pytest.mark.parametrize("adapter", ["attention", "embeddings"])
@pytest.mark.parametrize("name", TINY)
def test_backward_keeps_no_decompressed_weights(name: str, adapter: str, tiny: Callable[[str], Path]) -> None:
    model = adapted(load_compressed(tiny(name)), adapter)
    shapes = {tuple(p.shape) for p in model.parameters() if isinstance(p, CompressedTensor)}
    shapes |= {(*shape[:-2], shape[-1], shape[-2]) for shape in shapes}
    kept: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    assert any(isinstance(tensor, CompressedTensor) for tensor in kept)
    assert not [t.shape for t in kept if tuple(t.shape) in shapes and not isinstance(t, CompressedTensor)]


@pytest.mark.parametrize("adapter", ["all linear", "embeddings", "dora", "trained whole"])
def test_training_steps(adapter: str, tiny: Callable[[str], Path]) -> None:
    """Three steps of an optimiser leave the same weights."""
    states = []
    for make_one in (load, load_compressed):
        model = adapted(make_one(tiny("llama")), adapter)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
        for _ in range(3):
            gradients(model)
            optimizer.step()
            optimizer.zero_grad()
        states.append(model.state_dict())
        assert not same(states[-1], before)
    assert modules.is_compressed(model)
    assert same(states[1], states[0])


def test_adapters_of_experts(tiny: Callable[[str], Path]) -> None:
    peft = pytest.importorskip("peft")
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    found = []
    for make_one in (load, load_compressed):
        torch.manual_seed(2)
        config = peft.LoraConfig(r=4, target_modules=[], target_parameters=names, init_lora_weights=False, task_type="CAUSAL_LM")
        model = peft.get_peft_model(make_one(tiny("qwen3_moe")), config)
        logits = model(input_ids=IDS).logits
        gradient = gradients(model)
        assert any(g.any() for g in gradient.values())
        found.append([logits, gradient, model.merge_and_unload().state_dict()])
    assert same(found[1], found[0])
