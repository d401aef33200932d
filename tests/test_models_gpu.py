"""Whole models on a GPU, in mode=exact and fused, and the released package beside them: `make gpu-test`."""

import contextlib
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from df11 import gpu, modules, released, runtime
from tests.helpers import same_bits

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not gpu.is_available(), reason="needs a GPU, pycuda and nvcc")]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A random two-layer Llama, and its compressed checkpoint."""
    from df11 import checkpoint, hf

    directory = tmp_path_factory.mktemp("llama")
    sizes = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 2, "vocab_size": 3000, "head_dim": 64}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4}
    hf.build_random({"model_type": "llama", "architectures": ["LlamaForCausalLM"], **sizes, **heads}, 0, directory / "original")
    checkpoint.compress(directory / "original", directory / "compressed")
    return directory / "original", directory / "compressed"


SETTINGS = [
    {"granularity": "layer"},
    {"granularity": "block"},
    {"granularity": "block", "prefetch": True},
    {"granularity": "block", "kernel": "paper"},
    {"granularity": "layer", "kernel": "released"},
]
CASES = [(s, offloaded) for s in SETTINGS for offloaded in (0, 1, 2) if not offloaded or s["granularity"] == "block"]


@pytest.mark.parametrize("settings, offloaded", CASES, ids=lambda case: str(case).replace(" ", ""))
def test_models_give_the_same_bits(llama: tuple[Path, Path], settings: dict[str, Any], offloaded: int) -> None:
    from df11 import hf
    from experiments.decoding import Decoder

    if settings.get("kernel") == "released" and not released.is_installed():
        pytest.skip("needs the released package")
    ids = torch.arange(3, 103, device="cuda").view(2, 50)
    with torch.inference_mode():
        original = hf.load(llama[0], "cuda")
        expected = original(ids).logits
        model = hf.load(llama[1], "cuda")
        modules.offload_(model, offloaded)
        assert (modules.stored_bytes(model)["host"] > 0) == (offloaded > 0)
        workspace = runtime.attach(model, **settings)
        for _ in range(3):
            assert same_bits(model(ids).logits, expected)
        assert all(view.data_ptr() % 256 == 0 for view in workspace._buffers.values())
        for launch in ("eager", "graph"):
            ours, theirs = Decoder(model, 2, 70, launch), Decoder(original, 2, 70, launch)
            assert torch.equal(ours.tokens(ids, 20), theirs.tokens(ids, 20))
            assert same_bits(ours.logits, theirs.logits)


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("prefetch", [True, False])
def test_bf16_blocks_are_offloaded(llama: tuple[Path, Path], prefetch: bool, blocks: int) -> None:
    from df11 import hf
    from experiments.decoding import Decoder

    ids = torch.arange(3, 103, device="cuda").view(2, 50)
    with torch.inference_mode():
        original = hf.load(llama[0], "cuda")
        expected = original(ids).logits
        model = hf.load(llama[0], "cpu")
        modules.offload_(model, blocks, "cuda")
        assert model.model.layers[1].mlp.up_proj.weight.is_pinned() and model.lm_head.weight.is_cuda
        runtime.attach(model, "block", prefetch=prefetch)
        for _ in range(3):
            assert same_bits(model(ids).logits, expected)
        for launch in ("eager", "graph", "eager"):
            ours, theirs = Decoder(model, 2, 70, launch), Decoder(original, 2, 70, launch)
            assert torch.equal(ours.tokens(ids, 20), theirs.tokens(ids, 20))
            assert same_bits(ours.logits, theirs.logits)


def test_a_compiled_fused_model_gives_the_same_bits(llama: tuple[Path, Path]) -> None:
    """Its products are operators to the compiler. Not by inductor, which rounds what lies between them in its own way."""
    from df11 import hf

    with torch.inference_mode():
        model = hf.load(llama[1], "cuda", mode="fused")
        for ids in (torch.tensor([[3]]), torch.arange(3, 23)[None], torch.arange(3, 103).view(2, 50)):
            expected = model(ids.cuda(), use_cache=False).logits
            compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False)
            assert same_bits(compiled(ids.cuda(), use_cache=False).logits, expected)


@pytest.mark.parametrize("mode", ["exact", "fused"])
@pytest.mark.parametrize("batch", [1, 9])
def test_generate_with_a_static_cache(llama: tuple[Path, Path], batch: int, mode: str) -> None:
    """transformers then compiles a step and captures it in a CUDA graph: where inductor rounds nothing in between, the same ids."""
    import transformers

    from df11 import hf

    config = hf.DF11Config(mode=mode)
    model = transformers.AutoModelForCausalLM.from_pretrained(llama[0], device_map="cuda", quantization_config=config)
    ids = torch.arange(3, 3 + 10 * batch, device="cuda").view(batch, 10)
    asked: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "cache_implementation": "static", "pad_token_id": 0}
    asked |= {"attention_mask": torch.ones_like(ids), "output_logits": True, "return_dict_in_generate": True}
    expected = model.generate(ids, **asked, disable_compile=True)
    eager = transformers.CompileConfig(backend="aot_eager", mode=None)
    assert torch.equal(model.generate(ids, **asked, compile_config=eager).sequences, expected.sequences)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    found = model.generate(ids, **asked)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    # The second token is the first that is compiled; later ones need not follow the same ids.
    first, wanted = found.logits[1].float(), expected.logits[1].float()
    assert found.sequences.shape == expected.sequences.shape and (first - wanted).norm() < 0.05 * wanted.norm()


def test_a_compressed_checkpoint_is_transcoded_on_the_gpu(llama: tuple[Path, Path]) -> None:
    """To what an original becomes, bit for bit. 1, 8, 20 and 100 rows: fused products of each kind, and decompression."""
    from df11 import hf
    from df11.tensors import TiledTensor, dense

    with torch.inference_mode():
        original = hf.load(llama[0], "cuda")
        fused, transcoded = (hf.load(directory, "cuda", mode="fused") for directory in llama)
        turned = {name: p for name, p in transcoded.named_parameters() if isinstance(p, TiledTensor)}
        assert turned.keys() == {name for name, p in original.named_parameters() if p.dim() == 2}
        for name, tensor in turned.items():
            assert same_bits(dense(tensor), original.get_parameter(name))
            arrays, others = (t._stored.arrays.values() for t in (tensor, fused.get_parameter(name)))
            assert all(torch.equal(a, b) for a, b in zip(arrays, others, strict=True))
        for ids in (torch.tensor([[3]]), torch.arange(3, 11)[None], torch.arange(3, 23)[None], torch.arange(3, 103).view(2, 50)):
            expected, logits = original(ids.cuda()).logits.float(), transcoded(ids.cuda()).logits
            assert same_bits(fused(ids.cuda()).logits, logits)
            assert (logits.float() - expected).norm() < 0.02 * expected.norm()


def test_a_budget_of_gpu_memory() -> None:
    from experiments import budget

    with budget.enforce(4096) as limits:
        budget.release()
        torch.cuda.reset_peak_memory_stats()
        assert 0 < limits.context < 2**31 and limits.limit + limits.context < 4096 * budget.MIB
        half = torch.empty(limits.limit // 2, dtype=torch.uint8, device="cuda")
        with pytest.raises(torch.cuda.OutOfMemoryError):
            torch.empty(limits.limit, dtype=torch.uint8, device="cuda")
        peaks = limits.peaks()
        assert half.nbytes <= peaks["peak_allocated_bytes"] <= peaks["peak_reserved_bytes"] < peaks["process_peak_bytes"]
        with pytest.raises(MemoryError, match="are its budget"):
            budget.Budget(limits.context + half.nbytes // 2, limits.context).peaks()
    assert torch.empty(limits.limit, dtype=torch.uint8, device="cuda").nbytes == limits.limit  # half is still there


def test_accelerate_offloads_within_a_budget(llama: tuple[Path, Path]) -> None:
    from df11 import hf
    from experiments import offload

    ids = torch.arange(3, 103, device="cuda").view(2, 50)
    with torch.inference_mode():
        model = hf.load(llama[0], "cuda")
        expected = model(ids).logits
        size = sum(p.nbytes for p in model.parameters())
        device_map = offload.map_devices(model, size // 2, size)
        stored = offload.dispatch(model, device_map)
        assert 0 < stored["gpu"] <= size // 2 and stored["host"] > 0
        assert same_bits(model(ids).logits, expected)


def test_no_memory_is_lost_between_fused_weights() -> None:
    from df11.fused import fuse_

    def unused() -> int:
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved() - torch.cuda.memory_allocated()

    sizes = [(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)]
    with torch.inference_mode():
        before = unused()
        layers = [torch.nn.Linear(columns, rows, bias=False, device="cuda", dtype=torch.bfloat16) for rows, columns in 4 * sizes]
        model = torch.nn.Sequential(*layers).eval()
        del layers
        assert len(fuse_(model)) == 16
        assert unused() - before < 16 * 2**21  # the allocator's pages


def test_a_model_over_cpu_and_gpu(llama: tuple[Path, Path]) -> None:
    from transformers import AutoModelForCausalLM

    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": 0, "model.norm": 0, "lm_head": 0}
    places["model.rotary_emb"] = "cpu"
    ids = torch.arange(3, 103).view(2, 50)
    with torch.inference_mode():
        logits = [AutoModelForCausalLM.from_pretrained(d, device_map=places, dtype=torch.bfloat16)(ids).logits for d in llama]
    assert same_bits(*logits)


@pytest.mark.gpu2
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_model_over_two_gpus(llama: tuple[Path, Path]) -> None:
    from transformers import AutoModelForCausalLM

    from df11.hf import DF11Config

    places = {
        "model.embed_tokens": 0,
        "model.rotary_emb": 0,
        "model.layers.0": 0,
        "model.layers.1": 1,
        "model.norm": 1,
        "lm_head": 0,
    }
    original, compressed = (AutoModelForCausalLM.from_pretrained(d, device_map=places, dtype=torch.bfloat16) for d in llama)
    fused = AutoModelForCausalLM.from_pretrained(llama[0], device_map=places, quantization_config=DF11Config(mode="fused"))
    with torch.inference_mode():
        for ids in (torch.arange(3, 103).view(2, 50), torch.tensor([[3]])):
            expected = original(ids).logits
            assert same_bits(compressed(ids).logits, expected)
            assert (fused(ids).logits.float() - expected.float()).norm() < 0.02 * expected.float().norm()


@pytest.fixture
def package() -> ModuleType:
    """The released package itself. Its imports are of their time: pkg_resources, and no_init_weights of transformers 4."""
    import transformers.modeling_utils

    if importlib.util.find_spec("pkg_resources") is None:
        stub = ModuleType("pkg_resources")
        stub.resource_filename = lambda name, file: str(released._folder() / file)  # type: ignore[attr-defined]
        sys.modules["pkg_resources"] = stub
    if not hasattr(transformers.modeling_utils, "no_init_weights"):
        transformers.modeling_utils.no_init_weights = contextlib.nullcontext
    return importlib.import_module("dfloat11")


PATTERNS = {
    r"model\.embed_tokens": [],
    r"model\.layers\.\d+": [*(f"self_attn.{n}_proj" for n in "qkvo"), *(f"mlp.{n}_proj" for n in ("gate", "up", "down"))],
    "lm_head": [],
}


@pytest.mark.skipif(not released.is_installed(), reason="needs the released package")
def test_the_released_package_loads_our_checkpoint(llama: tuple[Path, Path], tmp_path: Path, package: ModuleType) -> None:
    from df11 import hf, released_checkpoint

    released_checkpoint.write(llama[0], tmp_path / "ours")
    ids = torch.arange(3, 103, device="cuda").view(2, 50)
    with torch.inference_mode():
        original = hf.load(llama[0], "cuda")
        theirs = package.DFloat11Model.from_pretrained(str(tmp_path / "ours"), device="cuda")
        assert same_bits(theirs(ids).logits, original(ids).logits)
        assert same_bits(theirs.lm_head.weight, original.lm_head.weight)


@pytest.mark.skipif(not released.is_installed(), reason="needs the released package")
@pytest.mark.parametrize("single_file", [True, False])
def test_we_load_what_the_released_package_makes(
    llama: tuple[Path, Path], tmp_path: Path, package: ModuleType, single_file: bool
) -> None:
    from df11 import hf, released_checkpoint
    from df11.sources import SafetensorsSource

    source = SafetensorsSource(llama[0])
    package.compress_model(hf.load(llama[0], "cpu"), PATTERNS, str(tmp_path / "theirs"), save_single_file=single_file)
    shapes = {info.name: info.shape for info in source.tensors()}
    released_checkpoint.restore(tmp_path / "theirs", tmp_path / "back", shapes)
    back = SafetensorsSource(tmp_path / "back")
    assert {info.name for info in back.tensors()} == shapes.keys()
    assert all(same_bits(back.read(name), source.read(name)) for name in shapes)
    config = tmp_path / "theirs" / "config.json"  # of a single file it holds nothing of the model
    config.write_text(json.dumps(json.loads((llama[0] / "config.json").read_text()) | json.loads(config.read_text())))
    ids = torch.arange(3, 103, device="cuda").view(2, 50)
    with torch.inference_mode():
        model = hf.load(tmp_path / "theirs", "cuda")
        assert modules.is_compressed(model) and same_bits(model(ids).logits, hf.load(llama[0], "cuda")(ids).logits)
