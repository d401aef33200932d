"""mode=fused on a GPU: threads, streams, graphs, offloading, gradients, and memory that runs out. `make gpu-test` runs these."""

import copy
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from df11 import dispatch, fused, gpu, modules, runtime
from df11.tensors import CompressedTensor, TiledTensor, dense
from tests.helpers import normal, same_bits

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not gpu.is_available(), reason="needs a GPU, pycuda and nvcc")]

GEOMETRY: dict[str, Any] = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_size": 1024, "vocab_size": 3000}
GEOMETRY |= {"intermediate_size": 2816, "num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 2}
BATCHES = ((1, 1), (2, 4), (1, 40), (3, 90))  # fused with one launch and with three, and decompressed


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen 2 whose biases are not zero."""
    from df11 import checkpoint, hf

    made = tmp_path_factory.mktemp("qwen2")
    model = hf.build(
        GEOMETRY, 0, "cuda", lambda module: [nn.init.normal_(p, 0, 0.1) for p in module.parameters(False) if p.dim() == 1]
    )
    model.save_pretrained(made / "original")
    checkpoint.compress(made / "original", made / "compressed")
    return made


def ids_of(shape: tuple[int, int], seed: int = 0) -> torch.Tensor:
    return torch.randint(5, 3000, shape, generator=torch.Generator().manual_seed(seed)).cuda()


def near(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((found.float() - expected.float()).norm() <= 0.02 * expected.float().norm())


def test_two_models_two_threads_two_streams(directory: Path) -> None:
    """At once, each thread both models in turns, also from within mode=exact by block and prefetched."""
    from df11 import hf

    exact, prefetched = (hf.load(directory / "compressed", "cuda") for _ in range(2))
    runtime.attach(exact, "block")
    runtime.attach(prefetched, "block", prefetch=True)
    models = [exact, prefetched, *(hf.load(directory / "compressed", "cuda", mode="fused") for _ in range(2))]
    asked = [(model, ids_of(shape, seed)) for seed, shape in enumerate(BATCHES) for model in models]
    with torch.inference_mode():
        expected = [model(ids).logits for model, ids in asked]
    torch.cuda.synchronize()
    wrong: list[object] = []

    def work(number: int) -> None:
        try:
            with torch.inference_mode(), torch.cuda.stream(torch.cuda.Stream()):
                for turn in range(6):
                    for index in torch.randperm(len(asked), generator=torch.Generator().manual_seed(number + 9 * turn)).tolist():
                        model, ids = asked[index]
                        if not same_bits(model(ids).logits, expected[index]):
                            wrong.append((number, turn, index))
        except Exception as error:  # would end the thread in silence
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_product_in_a_new_thread() -> None:
    """Which has no CUDA context yet."""
    weights, found = normal(512, 1024, device="cuda"), []
    tensor, x = TiledTensor(weights), normal(3, 1024, device="cuda")
    thread = threading.Thread(target=lambda: found.append(functional.linear(x, tensor)))
    thread.start()
    thread.join()
    assert near(found[0], functional.linear(x, weights))


def test_streams_have_buffers_of_their_own() -> None:
    """Products of more than 8 rows need memory beside x and y."""
    weights = normal(4096, 4096, device="cuda")
    tensor = TiledTensor(weights)
    inputs = [normal(40, 4096, seed=i, device="cuda") for i in range(4)]
    expected = [functional.linear(x, tensor) for x in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    results = []
    for _ in range(50):
        for x, stream, wanted in zip(inputs, streams, expected, strict=True):
            with torch.cuda.stream(stream):
                results.append((functional.linear(x, tensor), wanted))
    torch.cuda.synchronize()
    assert all(same_bits(*both) for both in results)


def test_a_graph_beside_eager_products() -> None:
    weights = normal(4096, 4096, device="cuda")
    tensor, static = TiledTensor(weights), normal(40, 4096, device="cuda")
    other = normal(64, 4096, seed=1, device="cuda")
    expected, expected_other = functional.linear(static, tensor), functional.linear(other, tensor)
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.graph(graph):
        y = functional.linear(static, tensor)
    for _ in range(30):
        with torch.cuda.stream(side):
            graph.replay()
        found = functional.linear(other, tensor)
        torch.cuda.synchronize()
        assert same_bits(found, expected_other) and same_bits(y, expected)


@pytest.mark.parametrize("mode", ["exact", "fused"])
@pytest.mark.parametrize("prefetch", [False, True])
@pytest.mark.parametrize("blocks", [1, 3])
def test_blocks_in_host_memory(directory: Path, mode: str, prefetch: bool, blocks: int) -> None:
    from df11 import hf
    from experiments.decoding import Decoder

    model = hf.load(directory / "compressed", "cuda", mode=mode)
    with torch.inference_mode():
        expected = [model(ids_of(shape)).logits for shape in BATCHES]
        before = modules.stored_bytes(model)
        tokens = Decoder(model, 2, 70, "eager").tokens(ids_of((2, 50)), 8)
        assert len(modules.offload_(model, blocks)) == 7 * blocks
        stored = modules.stored_bytes(model)
        assert stored["host"] > 0 and stored["gpu"] < before["gpu"]
        runtime.attach(model, "block", prefetch=prefetch)
        for _ in range(2):
            for shape, wanted in zip(BATCHES, expected, strict=True):
                assert same_bits(model(ids_of(shape)).logits, wanted)
        for launch in ("eager", "graph"):
            assert torch.equal(Decoder(model, 2, 70, launch).tokens(ids_of((2, 50)), 8), tokens)


@pytest.mark.parametrize("elsewhere", ["cpu", "disk"])
@pytest.mark.parametrize("mode", ["exact", "fused"])
def test_a_device_map_beside_a_gpu(directory: Path, tmp_path: Path, elsewhere: str, mode: str) -> None:
    from transformers import AutoModelForCausalLM

    from df11 import hf

    whole = hf.load(directory / "compressed", "cuda", mode=mode)
    places = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.layers.0": 0, "model.layers.1": elsewhere}
    places |= {"model.layers.2": elsewhere, "model.norm": 0, "lm_head": elsewhere}
    options = {"device_map": places, "dtype": torch.bfloat16, "offload_folder": tmp_path}
    model = AutoModelForCausalLM.from_pretrained(directory / "compressed", **options)
    if mode == "fused":
        fused.fuse_(model)
    held = modules.stored_bytes(model)["gpu"]
    assert 0 < held < modules.stored_bytes(whole)["gpu"]
    with torch.inference_mode():
        for shape in BATCHES:
            expected = whole(ids_of(shape)).logits
            found = model(ids_of(shape)).logits
            assert same_bits(found, expected) if mode == "exact" else near(found, expected)
    assert model.lm_head.weight.is_meta
    kind = TiledTensor if mode == "fused" else CompressedTensor
    assert type(model.lm_head._hf_hook.weights_map["weight"]) is kind


def test_moves(directory: Path) -> None:
    from df11 import hf

    model = hf.load(directory / "compressed", "cuda", mode="fused")
    with torch.inference_mode():
        expected = [model(ids_of(shape)).logits for shape in BATCHES]
        copied = copy.deepcopy(model)
        for place in ("cpu", "cuda"):
            model.to(place)
            assert {p.device.type for p in model.parameters()} == {place} and fused.is_fused(model)
        for one in (model, copied):
            for shape, wanted in zip(BATCHES, expected, strict=True):
                assert near(one(ids_of(shape)).logits, wanted)
    first = [p for p in model.parameters() if isinstance(p, TiledTensor)]
    assert all(same_bits(dense(p), dense(q)) for p, q in zip(first, (p for p in copied.parameters() if p.dim() == 2), strict=True))


def test_gradients_through_fused_layers(directory: Path) -> None:
    """LoRA: forward fused, backward by decompressed weights, whose memory is not kept."""
    import peft

    from df11 import hf

    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    ids, gradients, peaks = ids_of((2, 64)), [], []
    for mode in (None, "fused"):
        model = hf.load(directory / ("original" if mode is None else "compressed"), "cuda", mode=mode or "exact")
        torch.manual_seed(1)
        model = peft.get_peft_model(model, config)
        model(ids, labels=ids).loss.backward()
        model.zero_grad()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        model(ids, labels=ids).loss.backward()
        peaks.append(torch.cuda.max_memory_allocated() - before)
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        del model
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) == 42
    for name, gradient in gradients[0].items():
        assert (gradients[1][name].float() - gradient.float()).norm() < 0.1 * gradient.float().norm(), name
    largest = 2 * 2816 * 1024 * 2
    assert peaks[1] < peaks[0] + 3 * largest


@pytest.mark.parametrize("while_", ["fusing", "measuring"])
def test_memory_that_runs_out(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, while_: str) -> None:
    """Leaves a model that runs."""
    from df11 import hf

    monkeypatch.setenv("DF11_DISPATCH", str(tmp_path / "table.json"))
    monkeypatch.setattr(dispatch, "_chosen", {})
    monkeypatch.setattr(dispatch, "_fused", {})
    dispatch._table.cache_clear()
    model = hf.load(directory / "compressed", "cuda", mode="exact" if while_ == "fusing" else "fused")
    with torch.inference_mode():
        expected = hf.load(directory / "original", "cuda")(ids_of((1, 20))).logits
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        reserve = (torch.cuda.memory_reserved() + (24 << 20)) / total
        torch.cuda.set_per_process_memory_fraction(reserve)
        try:
            if while_ == "fusing":
                with pytest.raises(torch.OutOfMemoryError):
                    fused.fuse_(model)
            else:
                assert near(model(ids_of((1, 20))).logits, expected)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        assert near(model(ids_of((1, 20))).logits, expected)
        fused.fuse_(model)
        assert near(model(ids_of((1, 20))).logits, expected)
    dispatch._table.cache_clear()


def test_reduce_overhead(directory: Path) -> None:
    """torch.compile with CUDA graphs."""
    from df11 import hf

    for mode in ("exact", "fused"):
        model = hf.load(directory / "compressed", "cuda", mode=mode)
        with torch.inference_mode():
            expected = model(ids_of((1, 1)), use_cache=False).logits
            torch._dynamo.reset()
            step = torch.compile(model, mode="reduce-overhead", fullgraph=True)
            for _ in range(4):
                found = step(ids_of((1, 1)), use_cache=False).logits.clone()
            assert near(found, expected)
