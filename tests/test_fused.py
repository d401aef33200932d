"""mode=fused on the CPU: what becomes of a model, and that it computes what it did."""

import copy
import pickle
import weakref
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM

from df11 import checkpoint, cli, hf, modules, tiled_gpu
from df11.fused import FollowingLinear, FusedLinear, fuse_, is_fused, weights_of
from df11.runtime import GRANULARITIES, CompressedModelError, attach
from df11.tiled_ops import ARRAYS, TiledWeight
from tests.helpers import same_bits

SIZES = {
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 1000,
    "pad_token_id": 999,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ARCHITECTURES = {"llama": {}, "llama tied": {"tie_word_embeddings": True}, "qwen2": {}, "qwen3": {}, "gemma3_text": {}}
IDS = torch.arange(3, 43).view(2, 20)


def build(directory: Path, name: str = "llama") -> Path:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(name.split()[0], **SIZES, **ARCHITECTURES[name])
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(directory)
    return directory


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.inference_mode()
def test_architectures(tmp_path: Path, name: str) -> None:
    directory = build(tmp_path / "original", name)
    original = hf.load(directory, "cpu")
    checkpoint.compress(directory, tmp_path / "compressed", loadable=hf.parameter_names)
    model = hf.load(tmp_path / "compressed", "cpu", mode="fused")
    linear = {prefix for prefix, m in original.named_modules() if type(m) is nn.Linear and m.out_features > 4}
    fused = {prefix for prefix, m in model.named_modules() if isinstance(m, FusedLinear | FollowingLinear)}
    assert fused == linear
    assert not modules.is_compressed(model)
    for prefix, module in original.named_modules():
        if prefix in linear or isinstance(module, nn.Embedding):
            weights = weights_of(model.get_submodule(prefix))
            assert weights is not None and same_bits(weights, module.weight)
    for ids in (IDS, IDS[:1, :1]):  # by decompression, and one row
        assert same_bits(model.get_input_embeddings()(ids), original.get_input_embeddings()(ids))
        logits, expected = model(ids).logits.float(), original(ids).logits.float()
        assert (logits - expected).norm() < 0.02 * expected.norm()
        assert same_bits(model(ids).logits, model(ids).logits)
    generated = model.generate(IDS, max_new_tokens=4, do_sample=False, attention_mask=torch.ones_like(IDS))
    assert generated.shape == (2, 24)


@torch.inference_mode()
def test_experts_stay_in_the_published_layout() -> None:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model("mixtral", **SIZES, num_local_experts=4, num_experts_per_tok=2)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    expected = model(IDS).logits.float()
    modules.compress_(model)
    fuse_(model)
    assert is_fused(model) and modules.is_compressed(model)  # attach has been called for the experts
    assert (model(IDS).logits.float() - expected).norm() < 0.02 * expected.norm()


@torch.inference_mode()
def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    model = hf.load(build(tmp_path / "original", "llama tied"), "cpu")
    fuse_(model)
    assert model.lm_head.stored is model.model.embed_tokens.stored
    logits = model(IDS).logits
    model.tie_weights()  # as lm-eval does
    assert same_bits(model(IDS).logits, logits)
    assert modules.stored_bytes(model)["host"] < 0.8 * sum(p.nbytes for p in hf.load(tmp_path / "original", "cpu").parameters())


def test_mode_of_a_checkpoint(tmp_path: Path) -> None:
    directory = build(tmp_path / "original")
    assert cli.main(["compress", str(directory), str(tmp_path / "compressed"), "--mode", "fused"]) == 0
    checkpoint.verify(tmp_path / "compressed", directory)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "compressed")
    assert is_fused(model)
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(tmp_path / "again")
    checkpoint.restore(tmp_path / "compressed", tmp_path / "restored")
    assert (tmp_path / "restored" / "config.json").read_bytes() == (directory / "config.json").read_bytes()
    model = AutoModelForCausalLM.from_pretrained(directory, quantization_config=hf.DF11Config(mode="fused"))
    assert is_fused(model)
    plain = hf.load(directory, "cpu")
    fuse_(plain)
    with pytest.raises(CompressedModelError, match="not stored"):
        plain.save_pretrained(tmp_path / "again")
    with pytest.raises(ValueError, match="quick"):
        hf.DF11Config(mode="quick")
    with pytest.raises(ValueError, match="quick"):
        checkpoint.compress(directory, tmp_path / "other", mode="quick")


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(256, 300), nn.Linear(256, 200)

    def forward(self, x: torch.Tensor, other: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        return self.gate_proj(x), self.up_proj(x if other is None else other)


@torch.inference_mode()
def test_merged_layers_with_biases_and_misuse() -> None:
    torch.manual_seed(0)
    pair = Pair().bfloat16().eval()
    x = torch.randn(1, 1, 256).bfloat16()
    expected = pair(x)
    apart = Pair().bfloat16().eval()
    apart.load_state_dict(pair.state_dict())
    assert fuse_(pair) == fuse_(apart, merge=False) == 2
    assert isinstance(pair.up_proj, FollowingLinear) and isinstance(apart.up_proj, FusedLinear)
    for got, wanted in zip((*pair(x), *apart(x)), expected * 2, strict=True):
        assert (got.float() - wanted.float()).abs().max() < 0.02
    other = torch.randn(1, 1, 256).bfloat16()
    for got, wanted in zip(pair(x, other), apart(x, other), strict=True):
        assert (got.float() - wanted.float()).abs().max() < 0.02
    for layer, expected in ((pair.gate_proj, 300), (pair.up_proj, 200)):
        assert layer.weight.shape == (expected, 256) and layer.weight.dtype == torch.bfloat16
    for wrong in (x.float(), x.long()):
        with pytest.raises(CompressedModelError, match=str(wrong.dtype)):
            pair(wrong)
    with torch.autocast("cpu", torch.bfloat16):
        assert same_bits(pair(x.float())[0], pair(x)[0])
    with torch.inference_mode(False), pytest.raises(CompressedModelError, match="gradients"):
        pair(torch.randn(1, 1, 256).bfloat16().requires_grad_())
    with pytest.raises(CompressedModelError, match="inference"):
        pair.train()(x)


@torch.inference_mode()
@pytest.mark.parametrize("difference", ["biases", "inputs"])
def test_layers_that_cannot_be_merged_are_fused_each(difference: str) -> None:
    torch.manual_seed(0)
    pair = Pair().bfloat16().eval()
    pair.up_proj = nn.Linear(256 if difference == "biases" else 272, 200, bias=difference != "biases").bfloat16()
    x, other = (torch.randn(2, layer.in_features).bfloat16() for layer in (pair.gate_proj, pair.up_proj))
    expected = pair(x, other)
    assert fuse_(pair) == 2 and isinstance(pair.gate_proj, FusedLinear) and isinstance(pair.up_proj, FusedLinear)
    for got, wanted in zip(pair(x, other), expected, strict=True):
        assert (got.float() - wanted.float()).abs().max() < 0.02
    stored = pair.gate_proj.stored
    assert fuse_(pair) == 0 and pair.gate_proj.stored is stored  # there is nothing left to fuse


class Positions(nn.Embedding):
    """As some models have them: its argument is a mask."""

    def forward(self, mask: torch.Tensor) -> torch.Tensor:
        return super().forward(mask.long().cumsum(1) + 1)


@torch.inference_mode()
def test_embeddings_that_look_up_something_else() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Positions(400, 256)).bfloat16().eval()
    expected = [model(torch.ones(1, length)) for length in (1, 7, 90)]
    assert fuse_(model) == 1 and isinstance(model[0], Positions)
    for length, wanted in zip((1, 7, 90), expected, strict=True):
        assert same_bits(model(torch.ones(1, length)), wanted)
    plain = nn.Embedding(400, 256).bfloat16().eval()
    ids = torch.tensor([3, 1])
    wanted = plain(ids)
    assert fuse_(nn.Sequential(plain)) == 1
    assert same_bits(plain(ids), wanted) and same_bits(plain(input=ids), wanted)


def test_offloaded_weights_are_refused() -> None:
    model = nn.Sequential(nn.Linear(256, 256, device="meta", dtype=torch.bfloat16))
    with pytest.raises(CompressedModelError, match=r"0\.weight is offloaded.*device_map"):
        fuse_(model)


@torch.inference_mode()
def test_copies_have_weights_of_their_own_and_nothing_is_kept_twice() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(400, 256), nn.Linear(256, 300)).bfloat16().eval()
    modules.compress_(model)
    streams = [weakref.ref(parameter.encoded_exponent) for parameter in model.parameters() if parameter.dim() == 2]
    assert len(streams) == 2
    fuse_(model)
    assert not any(stream() is not None for stream in streams)
    ids = torch.tensor([[3, 1]])
    expected = model(ids)
    copied = copy.deepcopy(model)
    model[0].stored.low.zero_()
    assert same_bits(copied(ids), expected) and not same_bits(model(ids), expected)


@torch.inference_mode()
def test_a_layer_that_moves_leaves_nothing_behind() -> None:
    model = nn.Sequential(nn.Linear(512, 64, bias=False)).bfloat16().eval()
    fuse_(model)
    x = torch.randn(1, 512).bfloat16()
    stored = model[0].stored
    assert stored.get() is stored.get()
    before, kept = model(x), weakref.ref(stored.low)
    model.double()  # the arrays are of integers, which this leaves as they are
    assert stored.get().low is stored.low
    stored.low = stored.low.clone()  # as accelerate does
    assert stored.get().low is stored.low and kept() is None and same_bits(model(x), before)
    kept = weakref.ref(stored.low)
    model.to("meta")
    assert kept() is None and stored.get().low.is_meta


@torch.inference_mode()
def test_arrays_in_one_allocation() -> None:
    weight = TiledWeight.encode(torch.randn(64, 520).bfloat16())
    assert weight is not None
    joined = weight.joined()
    (storage,) = {array.untyped_storage().data_ptr(): array.untyped_storage() for array in joined.arrays}.values()
    assert weight.nbytes <= storage.nbytes() < weight.nbytes + 6 * 256
    assert all(torch.equal(a, b) for a, b in zip(joined.arrays, weight.arrays, strict=True))
    assert same_bits(joined.decompress(), weight.decompress())
    assert len(pickle.dumps(joined)) < weight.nbytes + 4096
    for copied in (copy.deepcopy(joined), pickle.loads(pickle.dumps(joined))):
        assert copied.packed.matrix[:8] != joined.packed.matrix[:8]  # of its own arrays


@torch.inference_mode()
def test_addresses_are_those_of_the_arrays(tmp_path: Path) -> None:
    """Whatever moves or replaces them: `.data`, a buffer, copies of the model, files."""
    model = nn.Sequential(nn.Linear(520, 64)).bfloat16().eval()
    fuse_(model)
    x, stored = torch.randn(2, 520).bfloat16(), model[0].stored
    model[0].stored.__init__(stored.get().joined())  # type: ignore[misc]  # as on a GPU
    before = model(x)
    torch.save(model, tmp_path / "model.pt")
    for copied in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
        assert copied[0].stored.get().packed.matrix[:8] != stored.get().packed.matrix[:8] and same_bits(copied(x), before)
    for name in ARRAYS:
        stored.get_buffer(name).data = stored.get_buffer(name).data.clone()
        assert stored.get().packed == tiled_gpu.pack(-1, stored.get().arrays, stored.uppers, *stored.shape)
        setattr(stored, name, stored.get_buffer(name).clone())
        assert getattr(stored.get(), name) is stored.get_buffer(name)
    assert same_bits(model(x), before)


@torch.inference_mode()
def test_a_layer_in_two_places_is_one_afterwards_too() -> None:
    torch.manual_seed(0)
    layer, embedding = nn.Linear(256, 256).bfloat16(), nn.Embedding(300, 256).bfloat16()
    model = nn.ModuleDict({"a": layer, "b": layer, "deep": nn.Sequential(embedding, layer), "embedding": embedding}).eval()
    ids = torch.tensor([[3, 1]])
    expected = model["deep"](ids)
    assert fuse_(model) == 2
    assert isinstance(model["a"], FusedLinear) and model["a"] is model["b"] is model["deep"][1]
    assert (model["deep"](ids).float() - expected.float()).norm() < 0.02 * expected.float().norm()
    assert model["deep"](ids).shape == model["a"](model["embedding"](ids)).shape


@torch.inference_mode()
def test_a_model_that_ran_in_mode_exact(tmp_path: Path) -> None:
    directory = build(tmp_path / "original")
    checkpoint.compress(directory, tmp_path / "compressed", loadable=hf.parameter_names)
    model = hf.load(tmp_path / "compressed", "cpu")
    expected = model(IDS).logits.float()
    for granularity in GRANULARITIES:
        exact = copy.deepcopy(model)
        attach(exact, granularity)
        assert fuse_(exact) > 0
        assert (exact(IDS).logits.float() - expected).norm() < 0.02 * expected.norm()


@torch.no_grad()
def test_a_step_is_compiled_whole(tmp_path: Path) -> None:
    model = hf.load(build(tmp_path / "original"), "cpu", mode="fused")
    expected = model(IDS[:, :1], use_cache=False).logits
    step = torch.compile(lambda ids: model(ids, use_cache=False).logits, backend="aot_eager", fullgraph=True)
    assert same_bits(step(IDS[:, :1]), expected)
    assert same_bits(model(IDS[:, :1], use_cache=False).logits, expected)


@torch.inference_mode()
@pytest.mark.parametrize("mode", ["exact", "fused"])
def test_generate_compiles_a_step(tmp_path: Path, mode: Literal["exact", "fused"]) -> None:
    """As it would of the original model: with a static cache, by itself on a GPU."""
    config = hf.DF11Config(mode=mode)
    model = AutoModelForCausalLM.from_pretrained(build(tmp_path / "original"), dtype=torch.bfloat16, quantization_config=config)
    asked: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": "static", "pad_token_id": 0}
    expected = model.generate(IDS, **asked, disable_compile=True)
    how = transformers.CompileConfig(backend="aot_eager", mode=None, fullgraph=True)
    how._compile_all_devices = True
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    assert torch.equal(model.generate(IDS, **asked, compile_config=how), expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


@torch.inference_mode()
def test_layers_that_are_asked_for_their_weights() -> None:
    torch.manual_seed(0)
    sizes = {"d_model": 256, "d_ff": 384, "d_kv": 64, "num_layers": 1, "num_heads": 4, "vocab_size": 1000}
    model = transformers.T5EncoderModel(transformers.T5Config(**sizes)).bfloat16().eval()
    expected = model(IDS).last_hidden_state.float()
    assert fuse_(model) > 0
    assert (model(IDS).last_hidden_state.float() - expected).norm() < 0.02 * expected.norm()


def test_what_would_not_get_smaller_stays() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(256, 256).bfloat16(), nn.Embedding(5, 4).bfloat16())
    assert fuse_(model) == 1
    assert [type(m) for m in model] == [nn.Linear, FusedLinear, nn.Embedding]
    assert weights_of(model[0]) is weights_of(model[2]) is None
