"""transformers loads, runs and saves compressed checkpoints; all architectures at tiny size."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import transformers
from omegaconf import OmegaConf
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from df11 import checkpoint, cli, hf, modules, runtime
from df11.sources import ModelSpec, SafetensorsSource, open_source
from experiments import evaluation
from tests.helpers import same_bits

ROOT = Path(__file__).parents[1]
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
    checkpoint.compress(original, directory / "compressed")
    return original, directory / "compressed"


def load(directory: Path, **options: object) -> transformers.PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(directory, **options)  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_and_ids_are_the_same(tmp_path: Path, name: str) -> None:
    original = build(tmp_path / "original", name)
    checkpoint.compress(original, tmp_path / "compressed")
    checkpoint.verify(tmp_path / "compressed", original)
    expected = load(original)
    logits = expected(IDS).logits
    ids = expected.generate(IDS, max_new_tokens=6, do_sample=False, attention_mask=torch.ones_like(IDS))
    model = load(tmp_path / "compressed")
    linear = sum(isinstance(module, torch.nn.Linear) and module.out_features > 4 for module in model.modules())
    assert len([m for m in model.modules() if modules.compressed_parameters(m)]) >= linear  # routers of 4 experts aside
    assert model.num_parameters() == expected.num_parameters() and not any(p.requires_grad for p in model.parameters())
    for granularity in runtime.GRANULARITIES:
        runtime.attach(model, granularity)
        assert same_bits(model(IDS).logits, logits)
        assert torch.equal(model.generate(IDS, max_new_tokens=6, do_sample=False, attention_mask=torch.ones_like(IDS)), ids)
    model.save_pretrained(tmp_path / "again")
    assert same_bits(load(tmp_path / "again")(IDS).logits, logits)


@pytest.mark.parametrize("name", ["llama tied", "mixtral"])
def test_compress_while_loading(tmp_path: Path, name: str) -> None:
    original = build(tmp_path / "original", name)
    logits = load(original)(IDS).logits
    model = load(original, quantization_config=hf.DF11Config(exclude=("*layers.0*",), granularity="block"))
    assert modules.is_compressed(model) and not modules.is_compressed(model.model.layers[0])
    assert same_bits(model(IDS).logits, logits)
    model.save_pretrained(tmp_path / "saved", max_shard_size="50KB")
    assert (tmp_path / "saved" / "model.safetensors.index.json").exists()
    assert same_bits(load(tmp_path / "saved")(IDS).logits, logits)


@pytest.mark.net
@pytest.mark.slow
def test_smollm2_from_end_to_end(tmp_path: Path) -> None:
    spec = ModelSpec(**OmegaConf.to_container(OmegaConf.load(ROOT / "conf" / "model" / "smollm2_135m.yaml")))  # type: ignore[misc]
    source = open_source(spec, 0)
    assert isinstance(source, SafetensorsSource)
    assert cli.main(["compress", str(source.directory), str(tmp_path / "compressed")]) == 0
    stored, original = ((d / "model.safetensors").stat().st_size for d in (tmp_path / "compressed", source.directory))
    assert 0.67 < stored / original < 0.69
    results = []
    for directory in (source.directory, tmp_path / "compressed"):
        settings = {
            "max_new_tokens": 8,
            "return_dict_in_generate": True,
            "output_logits": True,
            "attention_mask": torch.ones_like(IDS),
        }
        results.append(load(directory, dtype=torch.bfloat16).generate(IDS, do_sample=False, **settings))
    assert torch.equal(results[0].sequences, results[1].sequences)
    assert all(torch.equal(a, b) for a, b in zip(results[0].logits, results[1].logits, strict=True))


def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    original = build(tmp_path / "original", "llama tied")
    model = load(original, quantization_config=hf.DF11Config())
    model.save_pretrained(tmp_path / "saved")
    with safe_open(tmp_path / "saved" / "model.safetensors", "pt") as file:
        assert not [key for key in file.keys() if key.startswith("lm_head")]  # noqa: SIM118


def test_pipelines(llama: tuple[Path, Path], tokenizer: Any) -> None:
    """From a directory, and around a model that was compressed while loading."""
    generate = {"max_new_tokens": 12, "return_tensors": True, "tokenizer": tokenizer}
    prompts = ["One thing after another", "And again:"]
    ids = []
    for model in (*map(str, llama), load(llama[0], quantization_config=hf.DF11Config())):
        for sampled in (False, True):
            torch.manual_seed(1)
            made = transformers.pipeline("text-generation", model, device="cpu", **generate)(prompts, do_sample=sampled)
            ids.append([answer["generated_token_ids"] for (answer,) in made])
    assert len(ids[0][0]) > len(prompts[0]) and ids[0] != ids[1]
    assert ids[0] == ids[2] == ids[4] and ids[1] == ids[3] == ids[5]


@pytest.mark.slow
def test_lm_evals_command_line(llama: tuple[Path, Path], tmp_path: Path, tokenizer: Any) -> None:
    """The shipped definition of a task over local data, asked by `python -m df11.lm_eval` of both models."""
    task = evaluation.fixture("mmlu_astronomy", tmp_path)
    samples = []
    for directory in llama:
        tokenizer.save_pretrained(directory)
        command = [sys.executable, "-m", "df11.lm_eval", "--model", "hf", "--model_args", f"pretrained={directory}"]
        command += [
            "--tasks",
            task,
            "--device",
            "cpu",
            "--batch_size",
            "8",
            "--log_samples",
            "--output_path",
            str(tmp_path / directory.name),
        ]
        subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
        (file,) = (tmp_path / directory.name).rglob("samples_*.jsonl")
        samples.append([json.loads(line) for line in file.read_text().splitlines()])
    assert len(samples[0]) == 10
    assert [evaluation.answers(s) for s in samples[0]] == [evaluation.answers(s) for s in samples[1]]


def test_sampling(llama: tuple[Path, Path]) -> None:
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


def test_another_dtype(llama: tuple[Path, Path]) -> None:
    """Loaded as bf16, cast to an ordinary model."""
    with pytest.raises(ValueError, match="bfloat16"):
        load(llama[1], dtype=torch.float16)
    expected = load(llama[0]).float()(IDS).logits
    for model in (load(llama[1]).float(), load(llama[1]).to(torch.float32)):
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert torch.equal(model(IDS).logits, expected)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "toy"}, "`toy`"),
        ({"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": "many"}, "hidden_size"),
        ({"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_attention_heads": 0}, "zero"),
        ({"model_type": "llama", "architectures": ["NoSuchModel"]}, "NoSuchModel"),
        ({"model_type": "llama"}, "names none"),
        ({}, "model_type"),
    ],
)
def test_a_model_that_transformers_does_not_know_is_told(
    tmp_path: Path, config: dict[str, Any], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file({"a.weight": torch.randn(64, 64).bfloat16()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    # The classes of a model type are known without its architecture.
    options = ("--released", "--remote-code")[: 1 if reason in ("NoSuchModel", "names none") else 2]
    for option in options:
        assert cli.main(["compress", str(tmp_path), str(tmp_path / "compressed"), option]) == 1, option
        told = capsys.readouterr().err
        assert str(tmp_path / "config.json") in told and reason in told and not list(tmp_path.glob("compressed*"))
    assert cli.main(["compress", str(tmp_path), str(tmp_path / "compressed")]) == 0  # needs no model
    assert [row["name"] for row in checkpoint.summary(tmp_path / "compressed") if row["compressed"]] == ["a.weight"]


def test_compressed_tensors_that_the_model_does_not_have_are_reported(llama: tuple[Path, Path], tmp_path: Path) -> None:
    original = SafetensorsSource(llama[0])
    tensors = {info.name: original.read(info.name) for info in original.tensors()} | {"extra.weight": torch.ones(64, 64).bfloat16()}
    (tmp_path / "original").mkdir()
    save_file(tensors, tmp_path / "original" / "model.safetensors", {"format": "pt"})
    shutil.copy(llama[0] / "config.json", tmp_path / "original")
    checkpoint.compress(tmp_path / "original", tmp_path / "compressed")
    expected = load(llama[0])(IDS).logits
    for name in ("original", "compressed"):
        model, report = load(tmp_path / name, output_loading_info=True)  # type: ignore[misc]
        assert any(key.startswith("extra.weight") for key in report["unexpected_keys"]) and not report["missing_keys"]
        assert same_bits(model(IDS).logits, expected)


def test_options_that_would_do_nothing(llama: tuple[Path, Path]) -> None:
    assert hf.DF11Config(exclude="lm_head*").exclude == ("lm_head*",)  # not its characters, among them `*`
    with pytest.raises(ValueError, match="granularty: DF11Config takes include"):
        hf.DF11Config(granularty="block")
    with pytest.raises(ValueError, match=r"fussed.*exact, fused"):
        hf.load(llama[0], "cpu", mode="fussed")


def test_a_compressed_model_without_files_is_refused(llama: tuple[Path, Path]) -> None:
    config = transformers.AutoConfig.from_pretrained(llama[1])
    with pytest.raises(ValueError, match="loaded from safetensors files: none were given"):
        transformers.LlamaForCausalLM.from_pretrained(None, config=config, state_dict={})


def test_a_newer_layout_is_refused() -> None:
    with pytest.raises(ValueError, match="update df11"):
        hf.DF11Config(version=99)


def test_without_df11_stock_transformers_refuses(llama: tuple[Path, Path]) -> None:
    """Not a model with random weights, and not one with a warning."""
    code = (
        "import sys, transformers; transformers.{}.from_pretrained(sys.argv[1], ignore_mismatched_sizes={});"
        " assert 'df11' not in sys.modules"
    )
    for auto, ignore in (("AutoModelForCausalLM", False), ("AutoModel", True), ("LlamaForCausalLM", True)):
        command = [sys.executable, "-c", code.format(auto, ignore), str(llama[1])]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode != 0 and "AssertionError" not in done.stderr
        assert "pip install df11, then `import df11`" in done.stderr, done.stderr[-500:]


REMOTE = """
import sys, torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
assert type(model).__module__.startswith("transformers.models.")
torch.save(model(torch.arange(3, 43).view(2, 20)).logits, sys.argv[2])
model.save_pretrained(sys.argv[3])
"""


@pytest.mark.parametrize("name", ["llama tied", "mixtral"])
def test_remote_code_loads_without_the_import(tmp_path: Path, name: str) -> None:
    original = build(tmp_path / "original", name)
    assert cli.main(["compress", str(original), str(tmp_path / "compressed"), "--remote-code"]) == 0
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-c", REMOTE, str(tmp_path / "compressed"), str(tmp_path / "logits"), str(tmp_path / "again")]
    subprocess.run(command, env=environment, capture_output=True, check=True)
    logits = load(original)(IDS).logits
    assert same_bits(torch.load(tmp_path / "logits"), logits)
    for directory in ("compressed", "again"):  # with the import and without the code
        assert same_bits(load(tmp_path / directory)(IDS).logits, logits)
    assert "auto_map" not in json.loads((tmp_path / "again" / "config.json").read_text())
    checkpoint.restore(tmp_path / "compressed", tmp_path / "restored")
    files = {path.name: path.read_bytes() for path in original.iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "restored").iterdir()} == files


def test_remote_code_is_not_added_to_a_models_own(tmp_path: Path) -> None:
    original = build(tmp_path / "original", "llama")
    config = json.loads((original / "config.json").read_text())
    (original / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoConfig": "own.Config"}}))
    with pytest.raises(checkpoint.CheckpointError, match="remote code of its own"):
        checkpoint.compress(original, tmp_path / "compressed", auto_classes=hf.auto_classes)


@pytest.mark.parametrize(
    "order", ["import df11, transformers", "import transformers, df11", "from transformers import Trainer; import df11"]
)
def test_either_import_order_works(llama: tuple[Path, Path], order: str) -> None:
    code = f"{order}\nimport sys, transformers, torch\nm = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
    code += "from df11 import modules; assert modules.is_compressed(m); m(torch.tensor([[3, 4]]))"
    subprocess.run([sys.executable, "-c", code, str(llama[1])], capture_output=True, check=True)


@pytest.mark.parametrize("way", ["disk", "cpu_offload", "disk_offload"])
def test_accelerate_offloads(llama: tuple[Path, Path], tmp_path: Path, way: str) -> None:
    expected = load(llama[0])(IDS).logits
    if way == "disk":
        places = {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu", "model.norm": "cpu"}
        model = load(llama[1], device_map={**places, "lm_head": "disk", "model.rotary_emb": "cpu"})
    else:
        model = load(llama[1])
        assert modules.is_compressed(model)
        accelerate.cpu_offload(model) if way == "cpu_offload" else accelerate.disk_offload(model, tmp_path / "offloaded")
        assert model.lm_head.weight.is_meta
    for _ in range(2):
        assert same_bits(model(IDS).logits, expected)
    if way == "disk":
        model.save_pretrained(tmp_path / "saved")
        assert same_bits(load(tmp_path / "saved")(IDS).logits, expected)
