"""transformers loads, runs and saves compressed checkpoints; all architectures at tiny size."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from df11 import checkpoint, hf, modules, runtime

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 300,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ARCHITECTURES = {
    "llama": {},
    "llama tied": {"tie_word_embeddings": True},
    "mistral": {},
    "qwen2": {},
    "qwen3": {},
    "gemma2": {},
    "gemma3_text": {},
    "phi": {"head_dim": None},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
}
IDS = torch.arange(3, 43).view(2, 20)


def build(directory: Path, name: str) -> Path:
    torch.manual_seed(0)
    given = {key: value for key, value in (SMALL | ARCHITECTURES[name]).items() if value is not None}
    config = transformers.AutoConfig.for_model(name.split()[0], **given)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(directory, max_shard_size="100KB")
    return directory


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    directory = tmp_path_factory.mktemp("llama")
    original = build(directory / "original", "llama")
    checkpoint.compress(original, directory / "compressed", loadable=hf.parameter_names)
    return original, directory / "compressed"


def load(directory: Path, **options: object) -> transformers.PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(directory, **options)  # type: ignore[no-any-return]


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype == torch.bfloat16 and torch.equal(a.view(torch.int16), b.view(torch.int16))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_and_ids_are_the_same(tmp_path: Path, name: str) -> None:
    original = build(tmp_path / "original", name)
    checkpoint.compress(original, tmp_path / "compressed", loadable=hf.parameter_names)
    checkpoint.verify(tmp_path / "compressed", original)
    expected = load(original)
    logits = expected(IDS).logits
    ids = expected.generate(IDS, max_new_tokens=6, do_sample=False, attention_mask=torch.ones_like(IDS))
    model = load(tmp_path / "compressed")
    linear = sum(isinstance(module, torch.nn.Linear) and module.out_features > 4 for module in model.modules())
    assert len([m for m in model.modules() if modules.compressed_parameters(m)]) >= linear  # routers of 4 experts aside
    for granularity in runtime.GRANULARITIES:
        runtime.attach(model, granularity)
        assert same(model(IDS).logits, logits)
        assert torch.equal(model.generate(IDS, max_new_tokens=6, do_sample=False, attention_mask=torch.ones_like(IDS)), ids)
    model.save_pretrained(tmp_path / "again")
    assert same(load(tmp_path / "again")(IDS).logits, logits)


@pytest.mark.parametrize("name", ["llama tied", "mixtral"])
def test_compress_while_loading(tmp_path: Path, name: str) -> None:
    original = build(tmp_path / "original", name)
    logits = load(original)(IDS).logits
    model = load(original, quantization_config=hf.DF11Config(exclude=("*layers.0*",), granularity="block"))
    assert modules.is_compressed(model) and not modules.is_compressed(model.model.layers[0])
    assert same(model(IDS).logits, logits)
    model.save_pretrained(tmp_path / "saved", max_shard_size="50KB")
    assert (tmp_path / "saved" / "model.safetensors.index.json").exists()
    assert same(load(tmp_path / "saved")(IDS).logits, logits)


def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    original = build(tmp_path / "original", "llama tied")
    model = load(original, quantization_config=hf.DF11Config())
    model.save_pretrained(tmp_path / "saved")
    with safe_open(tmp_path / "saved" / "model.safetensors", "pt") as file:
        assert not [key for key in file.keys() if key.startswith("lm_head")]  # noqa: SIM118


def test_pipelines_and_sampling(llama: tuple[Path, Path]) -> None:
    drawn = []
    for directory in llama:
        model = load(directory)
        torch.manual_seed(1)
        drawn.append(model.generate(IDS, max_new_tokens=9, do_sample=True, attention_mask=torch.ones_like(IDS)))
    assert torch.equal(*drawn)


def test_a_static_cache_and_inference_mode(llama: tuple[Path, Path]) -> None:
    with torch.inference_mode():
        results = [
            load(d).generate(
                IDS, max_new_tokens=9, do_sample=False, cache_implementation="static", attention_mask=torch.ones_like(IDS)
            )
            for d in llama
        ]
    assert torch.equal(*results)


def test_another_dtype_is_refused(llama: tuple[Path, Path]) -> None:
    with pytest.raises(ValueError, match="bfloat16"):
        load(llama[1], dtype=torch.float16)
    with pytest.raises(ValueError, match="not supported"):
        load(llama[1]).float()
    with pytest.raises(runtime.CompressedModelError, match="keep the model in torch"):
        load(llama[1]).to(torch.float32)(IDS)


def test_a_newer_layout_is_refused() -> None:
    with pytest.raises(ValueError, match="update df11"):
        hf.DF11Config(version=99)


def test_without_df11_stock_transformers_refuses(llama: tuple[Path, Path]) -> None:
    """Not a model with random weights, and not one with a warning."""
    code = (
        "import sys, transformers; transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1]); assert 'df11' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code, str(llama[1])], capture_output=True, text=True)
    assert done.returncode != 0 and "AssertionError" not in done.stderr
    assert "mismatch" in done.stderr.lower() or "size" in done.stderr.lower(), done.stderr[-500:]


@pytest.mark.parametrize(
    "order", ["import df11, transformers", "import transformers, df11", "from transformers import Trainer; import df11"]
)
def test_either_import_order_works(llama: tuple[Path, Path], order: str) -> None:
    code = f"{order}\nimport sys, transformers, torch\nm = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
    code += "from df11 import modules; assert modules.is_compressed(m); m(torch.tensor([[3, 4]]))"
    subprocess.run([sys.executable, "-c", code, str(llama[1])], capture_output=True, check=True)
