"""mode=fused on the CPU: what becomes of a model, and that it computes what it did."""

import copy
import io
import pickle
import weakref
from functools import partial
from pathlib import Path
from typing import Any, Literal

import peft
import pytest
import torch
import transformers
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.nn import functional
from transformers import AutoModelForCausalLM

from df11 import checkpoint, cli, fused, hf, modules
from df11.fused import fuse_, is_fused
from df11.runtime import GRANULARITIES, attach
from df11.tensors import CompressedTensor, TiledTensor, dense
from df11.tiled_ops import TiledWeight
from tests.helpers import normal, same_bits

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


def tiled(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters(remove_duplicate=False) if isinstance(p, TiledTensor)}


def near(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((found.float() - expected.float()).norm() <= 0.02 * expected.float().norm())


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.inference_mode()
def test_architectures(tmp_path: Path, name: str) -> None:
    directory = build(tmp_path / "original", name)
    original = hf.load(directory, "cpu")
    checkpoint.compress(directory, tmp_path / "compressed")
    model = hf.load(tmp_path / "compressed", "cpu", mode="fused")
    expected = dict(original.named_parameters(remove_duplicate=False))
    assert tiled(model) == {name for name, p in expected.items() if p.dim() == 2}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        assert same_bits(dense(parameter), expected[name]), name
    assert [type(m) for m in model.modules()] == [type(m) for m in original.modules()]
    assert model.num_parameters() == original.num_parameters()
    assert model.get_memory_footprint() < original.get_memory_footprint()
    for ids in (IDS, IDS[:1, :1]):  # by decompression, and one row
        assert same_bits(model.get_input_embeddings()(ids), original.get_input_embeddings()(ids))
        logits = model(ids).logits
        assert near(logits, original(ids).logits) and same_bits(model(ids).logits, logits)
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
    assert model.lm_head.weight is model.model.embed_tokens.weight
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
    checkpoint.restore(tmp_path / "compressed", tmp_path / "restored")
    assert (tmp_path / "restored" / "config.json").read_bytes() == (directory / "config.json").read_bytes()
    model = AutoModelForCausalLM.from_pretrained(directory, quantization_config=hf.DF11Config(mode="fused"))
    assert is_fused(model)
    with pytest.raises(ValueError, match="quick"):
        hf.DF11Config(mode="quick")
    with pytest.raises(ValueError, match="quick"):
        checkpoint.compress(directory, tmp_path / "other", mode="quick")


@torch.inference_mode()
def test_what_save_pretrained_writes(tmp_path: Path) -> None:
    """The published layout: the same files as of mode=exact, but for the mode in config.json, and read in either."""
    directory = build(tmp_path / "original", "llama tied")
    made = {}
    for mode in ("exact", "fused"):
        model = AutoModelForCausalLM.from_pretrained(directory, quantization_config=hf.DF11Config(mode=mode))
        model.save_pretrained(tmp_path / mode)
        made[mode] = {file.name: file.read_bytes() for file in (tmp_path / mode).iterdir() if file.name != "config.json"}
    assert made["exact"] == made["fused"] and made["exact"]
    assert is_fused(AutoModelForCausalLM.from_pretrained(tmp_path / "fused"))
    plain = hf.load(directory, "cpu")
    expected = {name: p.clone() for name, p in plain.named_parameters()}
    fuse_(plain)
    plain.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert modules.is_compressed(again)
    assert all(same_bits(dense(p), expected[name]) for name, p in again.named_parameters())


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
def test_how_a_checkpoint_runs_is_chosen_where_it_is_loaded(tmp_path: Path) -> None:
    directory = build(tmp_path / "original")
    for mode in ("exact", "fused"):
        checkpoint.compress(directory, tmp_path / mode, mode=mode)
        assert is_fused(AutoModelForCausalLM.from_pretrained(tmp_path / mode)) == (mode == "fused")
        for asked in ("exact", "fused"):
            config = hf.DF11Config(mode=asked)
            model = AutoModelForCausalLM.from_pretrained(tmp_path / mode, quantization_config=config)
            assert is_fused(model) == (asked == "fused") and modules.is_compressed(model)
            assert model.config.quantization_config.mode == asked
        config = hf.DF11Config(granularity="block")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / mode, quantization_config=config)
        assert is_fused(model) == (mode == "fused")  # what is not given is the checkpoint's
        assert bool(model.__dict__["_df11_hooks"]) == (mode == "exact")
    model.save_pretrained(tmp_path / "again")
    assert "_given" not in (tmp_path / "again" / "config.json").read_text()
    for wrong in ({"mode": "quick"}, {"granularity": "model"}):
        with pytest.raises(ValueError, match=r"quick|model.*layer, block"):
            hf.DF11Config(**wrong)


@torch.inference_mode()
def test_dequantize(tmp_path: Path) -> None:
    original = hf.load(build(tmp_path / "original"), "cpu")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "original", quantization_config=hf.DF11Config(mode="fused"))
    model.dequantize()
    assert not any(isinstance(p, CompressedTensor) for p in model.parameters())
    assert same_bits(model(IDS).logits, original(IDS).logits)


def test_what_is_chosen(tmp_path: Path) -> None:
    config = hf.DF11Config(mode="fused", exclude=("lm_head.*", "*.v_proj.*"))
    model = AutoModelForCausalLM.from_pretrained(build(tmp_path / "original"), quantization_config=config)
    assert not any("lm_head" in name or "v_proj" in name for name in tiled(model)) and len(tiled(model)) == 13
    assert model.model.layers[0].self_attn.q_proj.weight._stored.merged is None
    assert model.model.layers[0].mlp.up_proj.weight._stored.merged is not None


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(256, 320), nn.Linear(256, 200)

    def forward(self, x: torch.Tensor, other: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        return self.gate_proj(x), self.up_proj(x if other is None else other)


def pairs() -> tuple[Pair, Pair, Pair]:
    """One as it is, one merged, one fused apart."""
    torch.manual_seed(0)
    pair = Pair().bfloat16().eval()
    merged, apart = copy.deepcopy(pair), copy.deepcopy(pair)
    assert fuse_(merged) == fuse_(apart, merge=False) == ["gate_proj.weight", "up_proj.weight"]
    assert merged.up_proj.weight._stored.merged is not None and apart.up_proj.weight._stored.merged is None
    assert merged.up_proj.weight._stored is merged.gate_proj.weight._stored
    return pair, merged, apart


@torch.no_grad()
def test_merged_layers_with_biases(monkeypatch: pytest.MonkeyPatch) -> None:
    pair, merged, apart = pairs()
    products = []
    linear = fused.Merged.linear
    monkeypatch.setattr(
        fused.Merged, "linear", lambda self, x, index, whole: products.append(index) or linear(self, x, index, whole)
    )
    x, other = (torch.randn(1, 1, 256).bfloat16() for _ in range(2))
    for inputs in ((x,), (x, other), (torch.randn(5, 256).bfloat16(),)):
        expected = pair(*inputs)
        for got, wanted in zip((*merged(*inputs), *apart(*inputs)), expected * 2, strict=True):
            assert near(got, wanted)
    assert products == [0, 1] * 3
    assert merged.gate_proj.weight._stored.merged._kept is None  # nothing is kept behind the last
    for layer, plain in ((merged.gate_proj, pair.gate_proj), (merged.up_proj, pair.up_proj)):
        assert same_bits(dense(layer.weight), plain.weight) and layer.weight.dtype == torch.bfloat16


@torch.no_grad()
def test_nothing_depends_on_merging() -> None:
    """Inputs written in between, other orders, weights and biases that are written, replaced or moved: each layer is right."""
    pair, merged, _ = pairs()
    x = torch.randn(1, 256).bfloat16()
    first = merged.gate_proj(x)
    x.add_(1)
    assert near(merged.up_proj(x), pair.up_proj(x)) and near(first, pair.gate_proj(x - 1))
    assert near(merged.up_proj(x), pair.up_proj(x)) and near(merged.gate_proj(x), pair.gate_proj(x))
    for model in (pair, merged):
        model.gate_proj.weight[3:7].mul_(2)
        model.up_proj.weight.neg_()
        model.up_proj.bias.fill_(1)
    assert merged.up_proj.weight._stored.merged is not None and merged.gate_proj.weight.is_compressed
    assert all(near(*both) for both in zip(merged(x), pair(x), strict=True))
    for model in (pair, merged):
        model.gate_proj.bias = nn.Parameter(torch.ones_like(model.gate_proj.bias), requires_grad=False)
        model.up_proj.weight = nn.Parameter(model.up_proj.weight.detach().clone() * 2, requires_grad=False)
    assert all(near(*both) for both in zip(merged(x), pair(x), strict=True))
    pair, merged, _ = pairs()
    other = pairs()[1]
    merged.load_state_dict(other.double().bfloat16().state_dict())
    assert all(near(*both) for both in zip(merged(x), pair(x), strict=True))
    merged.up_proj.bias.data = merged.up_proj.bias.data + 5
    assert near(merged(x)[1], pair(x)[1] + 5)
    merged.load_state_dict({name: p * 3 for name, p in pair.state_dict().items()})
    pair.load_state_dict({name: p * 3 for name, p in pair.state_dict().items()})
    assert all(near(*both) for both in zip(merged(x), pair(x), strict=True))


@torch.no_grad()
def test_what_is_kept_is_given_out_once_and_not_after_writes() -> None:
    pair, _, _ = pairs()
    pair.down_proj = nn.Linear(256, 64).bfloat16().eval()  # a third, as v
    pair.q_proj, pair.k_proj, pair.v_proj = pair.gate_proj, pair.down_proj, pair.up_proj
    del pair.gate_proj, pair.up_proj, pair.down_proj
    merged = copy.deepcopy(pair)
    fuse_(merged)
    assert merged.k_proj.weight._stored.merged is not None
    x = torch.randn(3, 256).bfloat16()
    merged.q_proj(x)
    merged.k_proj(x).zero_()
    assert near(merged.k_proj(x), pair.k_proj(x))
    for write in (lambda k: k.weight.mul_(2), lambda k: k.bias.add_(2)):
        for one in (pair, merged):
            one.q_proj(x)
            write(one.k_proj)
        assert near(merged.k_proj(x), pair.k_proj(x)) and near(merged.v_proj(x), pair.v_proj(x))
    merged.q_proj(x)
    x.data = x.data * 3
    assert near(merged.k_proj(x), pair.k_proj(x))
    merged.v_proj(x)
    assert merged.k_proj.weight._stored.merged._kept is None


@torch.no_grad()
@pytest.mark.parametrize("shared", ["bias", "layer"])
def test_layers_that_share_something_are_not_merged(shared: str) -> None:
    pair, _, _ = pairs()
    pair.up_proj = nn.Linear(256, 320).bfloat16().eval()
    if shared == "bias":
        pair.up_proj.bias = pair.gate_proj.bias
    else:
        pair.up_proj = pair.gate_proj
    model = copy.deepcopy(pair)
    fuse_(model)
    x = torch.randn(3, 256).bfloat16()
    for one in (pair, model):
        one.up_proj.bias.add_(2)
    assert all(near(*both) for both in zip(model(x), pair(x), strict=True))


@torch.no_grad()
def test_compilers_tell_merged_matrices_apart() -> None:
    """Also those that differ in signs only."""
    pair, _, _ = pairs()
    for layer in (pair.gate_proj, pair.up_proj):
        layer.bias = None
    other = copy.deepcopy(pair)
    for parameter in other.parameters():
        parameter.neg_()
    both = nn.ModuleList([pair, other])
    x = torch.randn(3, 256).bfloat16()
    expected = [y for one in both for y in one(x)]
    fuse_(both)
    torch._dynamo.reset()
    found = torch.compile(lambda x: [y for one in both for y in one(x)], backend="aot_eager", fullgraph=True)(x)
    assert all(near(*pair) for pair in zip(found, expected, strict=True))


@torch.no_grad()
def test_nothing_depends_on_merging_in_compiled_code() -> None:
    """One product for both where the input is the same; an input that is written to, and weights that were moved alone."""
    pair, merged, _ = pairs()
    for one in (pair, merged):
        one.gate_proj.bias = one.up_proj.bias = None
    products = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        def count(graph: torch.fx.GraphModule, inputs: Any) -> Any:
            products.append(sum("df11.linear" in str(node.target) for node in graph.graph.nodes))
            return make_boxed_func(graph.forward)

        return aot_autograd(fw_compiler=count)(graph, inputs)

    def written(model: Pair, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = x * 1
        first = model.gate_proj(x)
        x.add_(1)
        return first, model.up_proj(x)

    moved = copy.deepcopy(merged)
    for layer in (moved.gate_proj, moved.up_proj):
        layer.weight = nn.Parameter(layer.weight.detach().to("cpu", copy=True), requires_grad=False)
    x = torch.randn(3, 256).bfloat16()
    for run, model in ((lambda model, x: model(x), merged), (written, merged), (lambda model, x: model(x), moved)):
        torch._dynamo.reset()
        found = torch.compile(partial(run, model), backend=backend, fullgraph=True)(x)
        assert all(near(*both) for both in zip(found, run(pair, x), strict=True))
    assert products == [1, 2, 2]


def test_a_weight_that_is_trained() -> None:
    """It gets its gradient, as any other: it may be set free."""
    pair, merged, _ = pairs()
    x = torch.randn(3, 256).bfloat16()
    for model in (pair, merged):
        model.gate_proj.weight.requires_grad_(True)
        sum(y.float().square().sum() for y in model(x)).backward()  # type: ignore[union-attr]
    assert near(merged.gate_proj.weight.grad, pair.gate_proj.weight.grad)


def test_other_inputs_do_what_they_do_with_bf16() -> None:
    pair, *models = pairs()
    x = torch.randn(3, 256).bfloat16()
    for model in models:
        with pytest.raises(RuntimeError, match="dtype"):
            model(x.float())
        with pytest.raises(RuntimeError, match="shapes"):
            model(x[:, :5])
        assert model(x[:0])[0].shape == (0, 320)
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            assert near(model(x.float())[0], pair(x)[0])
        with torch.autocast("cpu", torch.float16), torch.no_grad():
            assert same_bits(model(x)[1].view(torch.bfloat16), pair(x)[1].view(torch.bfloat16))
        double = torch.func.vmap(lambda x, model=model: model(x)[0])(torch.stack([x, x]))
        assert near(double[1], pair(x)[0])
        assert near(functional.linear(x, model.up_proj.weight), functional.linear(x, pair.up_proj.weight))
        assert same_bits(x @ model.gate_proj.weight.t()[:, 5:9], x @ pair.gate_proj.weight.t()[:, 5:9])
        assert near(x @ model.gate_proj.weight.t(), x @ pair.gate_proj.weight.t())


@pytest.mark.parametrize("rows", [1, 3])
def test_gradients_of_inputs(rows: int) -> None:
    """Forward fused, backward by decompressed weights; nothing dense is kept for it."""
    pair, *models = pairs()
    wanted = normal(rows, 256).requires_grad_()
    sum(y.float().square().sum() for y in pair(wanted)).backward()  # type: ignore[union-attr]
    for model in models:
        x, kept = normal(rows, 256).requires_grad_(), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            y = model.requires_grad_(False)(x)
        assert {t.numel() for t in kept if type(t) is torch.Tensor} <= {x.numel()} and any(isinstance(t, TiledTensor) for t in kept)
        sum(part.float().square().sum() for part in y).backward()
        assert near(x.grad, wanted.grad)


def test_lora_on_a_fused_model(tmp_path: Path) -> None:
    """Adapters see bf16 linear layers, get gradients, and merge into weights."""
    directory = build(tmp_path / "original")
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    results, gradients = [], []
    for mode in (None, "fused"):
        options = {} if mode is None else {"quantization_config": hf.DF11Config(mode=mode)}
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16, **options)
        torch.manual_seed(1)
        model = peft.get_peft_model(model, config)
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        with torch.no_grad():
            results.append(model.eval()(IDS).logits)
            merged = model.merge_and_unload()
            assert near(merged(IDS).logits, results[-1])
    assert near(*results) and gradients[0].keys() == gradients[1].keys() and len(gradients[0]) == 28
    for name, gradient in gradients[0].items():
        assert gradient.dtype == gradients[1][name].dtype and near(gradients[1][name], gradient), name


@torch.inference_mode()
@pytest.mark.parametrize("difference", ["biases", "inputs", "rows"])
def test_layers_that_cannot_be_merged_are_fused_each(difference: str) -> None:
    torch.manual_seed(0)
    pair = Pair().bfloat16().eval()
    if difference == "rows":  # the next would begin within a tile
        pair.gate_proj = nn.Linear(256, 300).bfloat16()
    else:
        pair.up_proj = nn.Linear(256 if difference == "biases" else 272, 200, bias=difference != "biases").bfloat16()
    x, other = (torch.randn(2, layer.in_features).bfloat16() for layer in (pair.gate_proj, pair.up_proj))
    expected = pair(x, other)
    assert len(fuse_(pair)) == 2 and pair.gate_proj.weight._stored.merged is pair.up_proj.weight._stored.merged is None
    for got, wanted in zip(pair(x, other), expected, strict=True):
        assert near(got, wanted)
    stored = pair.gate_proj.weight._stored
    assert fuse_(pair) == [] and pair.gate_proj.weight._stored is stored  # there is nothing left to fuse


class Positions(nn.Embedding):
    """As some models have them: its argument is a mask."""

    def forward(self, mask: torch.Tensor) -> torch.Tensor:
        return super().forward(mask.long().cumsum(1) + 1)


@torch.inference_mode()
def test_embeddings() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Positions(400, 256)).bfloat16().eval()
    expected = [model(torch.ones(1, length)) for length in (1, 7, 90)]
    assert fuse_(model) == ["0.weight"] and isinstance(model[0], Positions)
    for length, wanted in zip((1, 7, 90), expected, strict=True):
        assert same_bits(model(torch.ones(1, length)), wanted)
    plain = nn.Embedding(400, 256, padding_idx=3).bfloat16().eval()
    for ids in (torch.tensor([3, 1]), torch.tensor([[2]], dtype=torch.int32), torch.arange(400), torch.empty(0, dtype=torch.long)):
        wanted, of = plain(ids), copy.deepcopy(plain)
        assert fuse_(nn.Sequential(of)) == ["0.weight"]
        assert same_bits(of(ids), wanted) and same_bits(of(input=ids), wanted)
        assert same_bits(of.weight[ids.long()], plain.weight[ids.long()])
    bags = nn.EmbeddingBag(400, 256, dtype=torch.bfloat16).eval()
    wanted = bags(torch.tensor([[3, 1], [2, 2]]))
    assert fuse_(nn.Sequential(bags)) == ["0.weight"] and same_bits(bags(torch.tensor([[3, 1], [2, 2]])), wanted)


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
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)
    model[0].weight.zero_()
    assert all(same_bits(copied(ids), expected) for copied in copies) and not same_bits(model(ids), expected)


def test_copies_of_merged_layers_stay_merged(tmp_path: Path) -> None:
    _, merged, _ = pairs()
    merged.requires_grad_(False)
    torch.save(merged.state_dict(), tmp_path / "state.pt")
    x = torch.randn(1, 256).bfloat16()
    expected = merged(x)
    for copied in (copy.deepcopy(merged), pickle.loads(pickle.dumps(merged))):
        stored = copied.gate_proj.weight._stored
        assert stored is copied.up_proj.weight._stored and stored.merged not in (None, merged.gate_proj.weight._stored.merged)
        assert all(same_bits(*both) for both in zip(copied(x), expected, strict=True))
        with torch.no_grad():
            copied.up_proj.bias.add_(1)
        assert near(copied(x)[1], expected[1] + 1) and same_bits(merged(x)[1], expected[1])
    other = pairs()[1]
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True), assign=True)
    assert isinstance(other.up_proj.weight, TiledTensor)
    assert all(same_bits(*both) for both in zip(other(x), expected, strict=True))


@torch.no_grad()
def test_all_patterns_and_writes() -> None:
    """Inf and NaN have a place in the tiled layout; what would not get smaller is kept as it is."""
    patterns = torch.arange(1 << 16).to(torch.int16).view(torch.bfloat16).view(256, 256)
    tensor = TiledTensor(patterns)
    assert not tensor.is_compressed and same_bits(dense(tensor), patterns)
    weights = normal(304, 512)
    weights[5, 7], weights[300, 0], weights[9, 9] = torch.inf, torch.nan, -0.0
    tensor = nn.Parameter(TiledTensor(weights), requires_grad=False)
    assert tensor.is_compressed and same_bits(dense(tensor), weights)
    for part in (tensor[5], tensor[16:48], tensor[3:9, 5:70], tensor.t()[9], tensor[:, 3], tensor.view(-1)[7:99]):
        assert isinstance(part, TiledTensor)
        of = weights.as_strided(part.size(), part.stride(), part.storage_offset())
        assert same_bits(dense(part), of) and same_bits(dense(part.clone()), of.clone())
    moved = tensor[16:48].to("cpu", copy=True)
    assert isinstance(moved, TiledTensor) and moved._stored is not tensor._stored and moved.stored_bytes < tensor.stored_bytes / 5
    tensor[3:9] = 1.5
    weights[3:9] = 1.5
    assert tensor.is_compressed and same_bits(dense(tensor), weights) and same_bits(dense(moved), weights[16:48])
    x = normal(2, 512)
    assert near(functional.linear(x, moved), functional.linear(x, weights[16:48]))
    tensor.copy_(torch.randint(-(2**15), 2**15, (304, 512)).to(torch.int16).view(torch.bfloat16))
    assert not tensor.is_compressed
    tensor.copy_(weights)
    assert tensor.is_compressed and same_bits(dense(tensor), weights)


class Offloaded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pair, self.head = Pair(), nn.Linear(520, 300, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.cat(self.pair(x), -1))


@torch.inference_mode()
def test_what_accelerate_offloads_is_fused() -> None:
    """Its hooks bring weights for each forward, in the tiled layout."""
    accelerate = pytest.importorskip("accelerate")
    torch.manual_seed(0)
    model = Offloaded().bfloat16().eval().requires_grad_(False)
    x = torch.randn(2, 256).bfloat16()
    expected = model(x)
    state = model.state_dict()
    accelerate.cpu_offload(model, "cpu", state_dict=state)
    assert all(p.is_meta for p in model.parameters())
    assert sorted(fuse_(model)) == ["head.weight", "pair.gate_proj.weight", "pair.up_proj.weight"]
    assert isinstance(state["head.weight"], TiledTensor) and model.head.weight.is_meta
    assert near(model(x), expected) and model.head.weight.is_meta


@pytest.mark.parametrize("blocks", [1, 2])
@torch.inference_mode()
def test_blocks_in_host_memory(tmp_path: Path, blocks: int) -> None:
    model = hf.load(build(tmp_path / "original", "qwen2"), "cpu", mode="fused")
    expected = [model(ids).logits for ids in (IDS, IDS[:1, :1])]
    names = modules.offload_(model, blocks, "cpu")
    assert len(names) == 7 * blocks
    for prefetch in (False, True):
        attach(model, "block", prefetch=prefetch)
        for ids, wanted in zip((IDS, IDS[:1, :1]), expected, strict=True):
            assert same_bits(model(ids).logits, wanted)
    again = copy.deepcopy(model)
    assert same_bits(again(IDS).logits, expected[0])
    with pytest.raises(ValueError, match="fuse_ the model first"):
        fuse_(model)


def test_memory_that_runs_out_leaves_a_model_that_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = hf.load(build(tmp_path / "original"), "cpu")
    encode, calls = TiledWeight.encode, []

    def full(weights: torch.Tensor) -> TiledWeight | None:
        calls.append(weights)
        if len(calls) > limit:
            raise torch.OutOfMemoryError
        return encode(weights)

    monkeypatch.setattr(TiledWeight, "encode", full)
    with torch.inference_mode():
        expected = model(IDS).logits
        for number in (0, 1, 5):
            limit = number
            calls.clear()
            with pytest.raises(torch.OutOfMemoryError):
                fuse_(model)
            assert near(model(IDS).logits, expected)
        limit = 100
        fuse_(model)
        assert len(tiled(model)) == 16 and near(model(IDS).logits, expected)


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
def test_a_layer_in_two_places_is_one_afterwards_too() -> None:
    torch.manual_seed(0)
    layer, embedding = nn.Linear(256, 256).bfloat16(), nn.Embedding(300, 256).bfloat16()
    model = nn.ModuleDict({"a": layer, "b": layer, "deep": nn.Sequential(embedding, layer), "embedding": embedding}).eval()
    ids = torch.tensor([[3, 1]])
    expected = model["deep"](ids)
    assert fuse_(model) == ["a.weight", "deep.0.weight"]
    assert isinstance(model["a"].weight, TiledTensor) and model["a"] is model["b"] is model["deep"][1]
    assert (model["deep"](ids).float() - expected.float()).norm() < 0.02 * expected.float().norm()
    assert model["deep"](ids).shape == model["a"](model["embedding"](ids)).shape


@torch.inference_mode()
def test_a_model_that_ran_in_mode_exact(tmp_path: Path) -> None:
    directory = build(tmp_path / "original")
    checkpoint.compress(directory, tmp_path / "compressed")
    model = hf.load(tmp_path / "compressed", "cpu")
    expected = model(IDS).logits.float()
    for granularity in GRANULARITIES:
        exact = copy.deepcopy(model)
        attach(exact, granularity)
        assert len(fuse_(exact)) == 16
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
    assert fuse_(model)
    assert (model(IDS).last_hidden_state.float() - expected).norm() < 0.02 * expected.norm()


def test_what_would_not_get_smaller_stays() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(256, 256).bfloat16(), nn.Embedding(5, 4).bfloat16())
    assert fuse_(model) == ["1.weight"] and tiled(model) == {"1.weight"}
