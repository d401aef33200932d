"""Compressed tensors on a GPU: places, streams, graphs, gradients and memory. `make gpu-test` runs these."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from df11 import gpu, modules, ops, runtime
from df11.tensors import CompressedTensor, dense
from tests.helpers import normal, same_bits

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not gpu.is_available(), reason="needs a GPU, pycuda and nvcc")]


@pytest.mark.parametrize("shape", [(300, 512), (5, 96, 64), (33, 7, 3, 3), (1, 8), (70, 1)])
def test_the_same_arrays_as_on_the_cpu(shape: tuple[int, ...]) -> None:
    weights = normal(*shape, device="cuda")
    tensor, host = CompressedTensor(weights), CompressedTensor(weights.cpu())
    assert len(tensor.units()) == len(host.units()) == (5 if shape[0] == 5 else 1)
    for name in (name for name in ops.ARRAYS if name != "table"):
        assert torch.equal(getattr(tensor, name).cpu(), getattr(host, name)), name
    assert (
        same_bits(dense(tensor), weights)
        and same_bits(dense(host.cuda()), weights)
        and same_bits(dense(tensor.cpu()), weights.cpu())
    )
    for i in range(shape[0]):
        assert same_bits(dense(tensor[i]), weights[i])


def test_all_patterns() -> None:
    weights = torch.arange(1 << 16).to(torch.int16).view(torch.bfloat16).view(256, 256).cuda()
    tensor = CompressedTensor(weights)
    assert not tensor.is_compressed and same_bits(dense(tensor), weights)  # Inf and NaN have no code
    below = (
        weights.view(torch.int16)[((weights.view(torch.int16) >> 7) & 0xFF) < 240].view(torch.bfloat16)[: 240 * 256].view(240, 256)
    )
    tensor = CompressedTensor(below)
    assert tensor.is_compressed and same_bits(dense(tensor), below)
    with torch.no_grad():
        tensor[3, 5] = torch.inf
        assert not tensor.is_compressed and tensor[3, 5].item() == torch.inf
        tensor[3, 5] = below[3, 5]
        assert tensor.is_compressed and same_bits(dense(tensor), below)


def test_places_and_copies() -> None:
    weights = normal(300, 512, device="cuda")
    tensor = nn.Parameter(CompressedTensor(weights), requires_grad=False)
    buffer = io.BytesIO()
    torch.save(tensor, buffer)
    for place in ("cuda", "cpu"):
        buffer.seek(0)
        loaded = torch.load(buffer, map_location=place, weights_only=True)
        assert loaded.device.type == place and same_bits(dense(loaded).cuda(), weights)
    pinned = tensor.cpu().pin_memory()
    assert pinned.is_pinned() and same_bits(dense(pinned.to("cuda", non_blocking=True)), weights)
    for copied in (copy.deepcopy(tensor), pickle.loads(pickle.dumps(tensor)), tensor.clone(), tensor.to("meta", copy=True)):
        assert copied.is_meta or same_bits(dense(copied), weights)
    layer = nn.Linear(512, 300, bias=False)
    layer.weight = tensor
    for place in ("cpu", "cuda"):
        layer.to(place)
        assert layer.weight is tensor and tensor.encoded_exponent.device.type == tensor.device.type == place
        assert same_bits(dense(tensor).cuda(), weights)


def test_a_tensor_used_on_another_stream() -> None:
    """Its memory is not given to others before that stream is done."""
    weights, x = normal(4096, 4096, device="cuda"), normal(16, 4096, seed=1, device="cuda")
    expected, side = functional.linear(x, weights), torch.cuda.Stream()
    for _ in range(5):
        tensor = CompressedTensor(weights)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            torch.cuda._sleep(10_000_000)
            y = functional.linear(x, tensor)
        tensor.record_stream(side)
        del tensor
        junk = [torch.full((1 << 22,), 7, dtype=torch.uint8, device="cuda") for _ in range(20)]
        torch.cuda.current_stream().wait_stream(side)
        assert same_bits(y, expected)
        del junk


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(functional.gelu(self.up(x)))


def blocks(width: int = 1024, depth: int = 6) -> nn.Module:
    torch.manual_seed(0)
    with torch.device("cuda"):
        layers = nn.ModuleList(Block(width) for _ in range(depth))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = layers

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    return Model().bfloat16().eval().requires_grad_(False)


SETTINGS: list[dict[str, Any]] = [{"granularity": "layer"}, {"granularity": "block"}, {"granularity": "block", "prefetch": True}]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_two_streams_on_one_model(settings: dict[str, Any]) -> None:
    original = blocks()
    inputs = [normal(64, 1024, seed=i, device="cuda") for i in range(2)]
    expected = [original(x) for x in inputs]
    modules.compress_(original)
    runtime.attach(original, **settings)
    streams = [torch.cuda.Stream() for _ in inputs]
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
    results = []
    for _ in range(10):
        for stream, x in zip(streams, inputs, strict=True):
            with torch.cuda.stream(stream):
                torch.cuda._sleep(1_000_000)
                results.append(original(x))
    torch.cuda.synchronize()
    assert all(same_bits(result, expected[i % 2]) for i, result in enumerate(results))


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_graph_replays_beside_eager_calls(settings: dict[str, Any]) -> None:
    from experiments.harness import timing

    original = blocks()
    inputs = [normal(64, 1024, seed=i, device="cuda") for i in range(2)]
    expected = [original(x) for x in inputs]
    modules.compress_(original)
    runtime.attach(original, **settings)
    replay, side = timing.graph(lambda: original(inputs[0])), torch.cuda.Stream()
    for _ in range(10):
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            eager = original(inputs[1])
        captured = replay()
        torch.cuda.synchronize()
        assert same_bits(captured, expected[0]) and same_bits(eager, expected[1])


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_weights_kept_across_the_next_block(settings: dict[str, Any]) -> None:
    model = blocks()
    weight = model.layers[0].up.weight.clone()
    modules.compress_(model)
    runtime.attach(model, **settings)
    kept: list[torch.Tensor] = []
    model.layers[0].up.register_forward_pre_hook(lambda m, a: kept.extend((m.weight.t(), m.weight + 0, m.weight.view(torch.int16))))
    model(normal(4, 1024, device="cuda"))
    assert same_bits(kept[0], weight.t()) and same_bits(kept[1], weight) and torch.equal(kept[2], weight.view(torch.int16))


def lora(model: nn.Module) -> list[nn.Parameter]:
    """Low-rank adapters beside each linear layer."""
    torch.manual_seed(1)
    trained = []
    for layer in list(model.modules()):
        if isinstance(layer, nn.Linear):
            a, b = (
                nn.Parameter((torch.randn(shape, device="cuda") * 0.05).bfloat16())
                for shape in ((8, layer.in_features), (layer.out_features, 8))
            )
            layer.register_parameter("a", a)
            layer.register_parameter("b", b)
            layer.register_forward_hook(lambda m, given, out: out + functional.linear(functional.linear(given[0], m.a), m.b))
            trained += [a, b]
    return trained


@pytest.mark.parametrize("how", ["eager", "checkpointed", "compiled"])
def test_gradients_and_what_is_kept_for_them(how: str) -> None:
    """Bit-equal to those on the original, and at the peak no dense weight is there but the one in use."""
    width, depth = 2048, 6
    x = normal(32, width, seed=3, device="cuda")
    gradients, peaks = [], []
    torch.use_deterministic_algorithms(True)
    try:
        for compressed in (False, True):
            model = blocks(width, depth)
            if compressed:
                modules.compress_(model)
            trained = lora(model)
            run: Any = model
            if how == "checkpointed":

                def run(x: torch.Tensor, model: Any = model) -> torch.Tensor:
                    for layer in model.layers:
                        x = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
                    return x

            elif how == "compiled":
                torch._dynamo.reset()
                run = torch.compile(model, backend="aot_eager", fullgraph=True)
            for _ in range(2):
                for parameter in trained:
                    parameter.grad = None
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                out = run(x)
                out.float().pow(2).mean().backward()
                peaks.append(torch.cuda.max_memory_allocated() - before)
                del out
            gradients.append([parameter.grad for parameter in trained])
            del model, run, trained
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(a is not None and b is not None and same_bits(a, b) for a, b in zip(*gradients, strict=True))
    # One weight (16.8 MB) decompressed at a time, and a second while another is made; all of them would be twelve.
    assert peaks[3] - peaks[1] < 3 * 2 * 2 * width * width < depth * 2 * 2 * 2 * width * width


def test_a_compiled_model() -> None:
    model = blocks()
    x = normal(8, 1024, device="cuda")
    expected = model(x)
    modules.compress_(model)
    with torch.no_grad():
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        assert same_bits(compiled(x), expected)
        torch._dynamo.reset()
        captured = torch.compile(model, mode="reduce-overhead", fullgraph=True)  # inductor, in CUDA graphs
        plain = torch.compile(blocks(), mode="reduce-overhead", fullgraph=True)
        for _ in range(4):
            assert same_bits(captured(x).clone(), plain(x).clone())


def test_opcheck() -> None:
    for shape in ((300, 512), (5, 96, 64)):
        tensor = CompressedTensor(normal(*shape, device="cuda"))
        arrays = [getattr(tensor, name) for name in ops.ARRAYS]
        sizes, units = list(tensor._stored.numbers), len(tensor.units())
        torch.library.opcheck(torch.ops.df11.decode.default, (*arrays, sizes, tensor.numel() // units, units - 1, units))


@pytest.mark.gpu2
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_in_one_process() -> None:
    weights = normal(300, 512, device="cuda:0")
    tensor = CompressedTensor(weights)
    moved = tensor.to("cuda:1")
    for current in (0, 1):
        with torch.cuda.device(current):
            x = normal(4, 512, seed=2)
            for own in (tensor, moved, tensor.cpu().to("cuda:1")):
                expected = functional.linear(x.to(own.device), weights.to(own.device))
                assert same_bits(functional.linear(x.to(own.device), own), expected)
            assert same_bits(dense(CompressedTensor(weights.to("cuda:1"))).cpu(), weights.cpu())
