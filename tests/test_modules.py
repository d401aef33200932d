"""Compressed weights inside modules, on the CPU."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from df11 import modules, runtime
from df11.memory import aligned
from df11.modules import compress_, compressed_parameters, offload_, stored_bytes
from df11.runtime import CompressedModelError, attach
from tests.helpers import same_bits


class Scaled(nn.Embedding):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids) * 3


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 16, 24))
        self.down = nn.Parameter(torch.randn(3, 24, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return sum((x @ up @ down for up, down in zip(self.up, self.down, strict=True)), x)  # type: ignore[no-any-return]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.experts = nn.Linear(16, 33), nn.Linear(33, 16, bias=False), Experts()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.experts(x + self.second(torch.relu(self.first(x))))  # type: ignore[no-any-return]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = Scaled(50, 16)
        self.layers = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(16, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)  # type: ignore[no-any-return]


IDS = torch.arange(20).view(2, 10)


@pytest.fixture
def original() -> Model:
    torch.manual_seed(0)
    return Model().bfloat16().eval()


@pytest.mark.parametrize("granularity", runtime.GRANULARITIES)
def test_the_same_bits_come_out(original: Model, granularity: str) -> None:
    expected = original(IDS)
    model = copy.deepcopy(original)
    names = compress_(model)
    assert len(names) == 9 and "layers.1.experts.down" in names and "head.weight" not in names
    workspace = attach(model, granularity)
    for _ in range(2):
        assert same_bits(model(IDS), expected)
    whole_block = sum(aligned(2 * p.numel()) for p in original.layers[0].parameters() if p.dim() > 1)
    largest = max(aligned(2 * 50 * 16), 2 * aligned(2 * 3 * 16 * 24))
    assert workspace.nbytes == (whole_block if granularity == "block" else largest)
    attach(model, "layer")
    assert same_bits(model(IDS), expected)


def test_every_decoded_tensor_starts_on_256_bytes(original: Model) -> None:
    compress_(original)
    attach(original, "block")
    starts = []
    original.layers[0].register_forward_pre_hook(
        lambda m, a: starts.extend(getattr(part, name).data_ptr() for part in m.modules() for name in compressed_parameters(part))
    )
    base = []
    original.layers[0].first.register_forward_pre_hook(lambda m, a: base.append(m.weight.data_ptr()))
    original(IDS)
    assert len(starts) == 4 and all((start - base[0]) % 256 == 0 for start in starts)


def test_outside_of_a_forward_nothing_is_decompressed(original: Model) -> None:
    compress_(original)
    attach(original)
    original(IDS)
    assert original.embed.weight.dtype == torch.uint8
    assert all("weight" not in module.__dict__ for module in original.modules())
    assert set(dict(original.named_parameters())) == {"layers.0.first.bias", "layers.1.first.bias"}


def test_an_error_in_a_forward_leaves_the_model_usable(original: Model) -> None:
    expected = original(IDS)
    compress_(original)
    attach(original, "block")
    with pytest.raises(RuntimeError):
        original.layers[0](torch.zeros(1, 5).bfloat16())
    assert same_bits(original(IDS), expected)


def test_state_dicts_load_into_another_model(original: Model) -> None:
    expected = original(IDS)
    model, other = copy.deepcopy(original), copy.deepcopy(original)
    compress_(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    compress_(other)
    state = model.state_dict()
    for name, buffer in other.named_buffers():  # streams of other weights have other lengths
        holder, _, leaf = name.rpartition(".")
        other.get_submodule(holder)._buffers[leaf] = torch.empty_like(state[name])
        assert buffer is not None
    other.load_state_dict(state)
    attach(other)
    assert same_bits(other(IDS), expected)


def test_misuse_is_told(original: Model) -> None:
    compress_(original)
    with pytest.raises(ValueError, match="choose one of layer, block"):
        attach(original, "tensor")
    with pytest.raises(ValueError, match="choose one of fast, paper, released"):
        attach(original, kernel="quick")
    attach(original)
    with pytest.raises(CompressedModelError, match=r"model\.eval\(\)"):
        original.train()(IDS)
    original.eval()
    with pytest.raises(CompressedModelError, match=r"bf16, the input is torch\.float32"):
        original.layers[0].first(torch.zeros(1, 16))
    with pytest.raises(CompressedModelError, match=r"torch\.no_grad"):
        original.layers[0].first(torch.zeros(1, 16).bfloat16().requires_grad_())


def test_weights_without_a_code_stay() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).bfloat16().eval()
    with torch.no_grad():
        model[0].weight[0, 0] = float("inf")
    assert compress_(model) == ["1.weight"]
    assert model[0].weight.dtype == torch.bfloat16


def test_offloaded_weights_are_refused(original: Model) -> None:
    """As accelerate leaves them, on the meta device. Nothing is compressed then; what stays as it is may be there."""
    original.layers[1].second.to("meta")
    with pytest.raises(ValueError, match=r"layers\.1\.second\.weight is offloaded.*df11 compress"):
        compress_(original)
    assert not modules.is_compressed(original)
    names = compress_(original, exclude=("layers.1.second.*",))
    assert len(names) == 8 and "embed.weight" in names and "head.weight" not in names


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("prefetch", [True, False])
@pytest.mark.parametrize("blocks", [0, 1, 2])
def test_offloaded_and_prefetched_blocks_give_the_same_bits(original: Model, compressed: bool, prefetch: bool, blocks: int) -> None:
    expected = original(IDS)
    before = stored_bytes(original)
    model = copy.deepcopy(original)
    if compressed:
        compress_(model)
    names = offload_(model, blocks)
    assert len(names) == 4 * blocks and all(name.startswith(("layers.1", "layers.0")[:blocks]) for name in names)
    workspace = attach(model, "block", prefetch=prefetch)
    for _ in range(2):
        assert same_bits(model(IDS), expected)
    if not compressed:
        assert modules.is_compressed(model) is False and stored_bytes(model) == before
        # One copy of a block's matrices, two where the next one is fetched meanwhile.
        block = sum(aligned(2 * p.numel()) for p in original.layers[0].parameters() if p.dim() > 1)
        assert workspace.nbytes == block * (min(blocks, 1 + prefetch))
    with pytest.raises(ValueError, match="the model has 2 transformer blocks"):
        offload_(model, 3)


def test_prefetching_goes_by_blocks_side_by_side(original: Model) -> None:
    compress_(original)
    with pytest.raises(ValueError, match="granularity='block'"):
        attach(original, "layer", prefetch=True)
    offload_(original, 1)
    with pytest.raises(ValueError, match="granularity='block'"):
        attach(original, "layer")
    nested = nn.Sequential(Experts()).bfloat16().eval()
    nested[0].inner = nn.Linear(16, 16).bfloat16()
    compress_(nested)
    with pytest.raises(ValueError, match="inside of another module"):
        attach(nested, "block", prefetch=True)


def test_the_first_offloaded_block_is_fetched_while_others_run(original: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, seen, fill = original(IDS), [], runtime._Owner.fill
    offload_(original, 1)
    attach(original, "block", prefetch=True)
    monkeypatch.setattr(runtime._Owner, "fill", lambda owner: (seen.append("fetched"), fill(owner)))
    original.embed.register_forward_pre_hook(lambda *arguments: seen.append("runs"))
    for _ in range(2):
        assert same_bits(original(IDS), expected)
    assert seen == ["fetched", "runs"] * 2


@pytest.mark.parametrize("last", ["embed", "layers.0", "layers.1"])
def test_a_forward_that_failed_leaves_nothing_fetched(original: Model, monkeypatch: pytest.MonkeyPatch, last: str) -> None:
    """In a graph capture nothing is copied or decompressed: a forward afterwards must not take it to be."""

    def stop(*arguments: object) -> None:
        raise RuntimeError("stop")

    expected, x = original(IDS), torch.randn(1, 16).bfloat16()
    alone = original.layers[0](x)
    offload_(original, 2)
    workspace = attach(original, "block", prefetch=True)
    assert same_bits(original(IDS), expected)
    for again, wanted in ((lambda: original(IDS), expected), (lambda: original.layers[0](x), alone)):
        handle = original.get_submodule(last).register_forward_pre_hook(stop)
        with monkeypatch.context() as capture, pytest.raises(RuntimeError, match="stop"):
            capture.setattr(runtime._Owner, "fill", lambda owner: None)
            original(IDS)
        handle.remove()
        for buffer in (0, 1):
            workspace.bytes(torch.device("cpu"), buffer, 0, workspace.nbytes // 2).fill_(7)
        assert same_bits(again(), wanted)


def test_prefetching_survives_calls_out_of_order(original: Model) -> None:
    """A block run alone, or twice, does not get the weights that were fetched for another."""
    x = torch.randn(1, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = [layer(x) for layer in original.layers]
    compress_(original)
    attach(original, "block", prefetch=True)
    for i in (0, 0, 1, 1, 0, 1):
        assert same_bits(original.layers[i](x), expected[i])


@torch.inference_mode()
def test_threads_that_share_a_model_wait_for_each_other() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(6))).bfloat16().eval()
    inputs = [torch.randn(1, 64).bfloat16() for _ in range(2)]
    expected = [model(x) for x in inputs]
    compress_(model)
    attach(model)

    def run(which: int) -> int:
        with torch.inference_mode():
            return sum(torch.equal(model(inputs[which]), expected[which]) for _ in range(60))

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(run, range(2))) == [60, 60]
    with pytest.raises(CompressedModelError, match="uint8"):  # as code that casts to `weight.dtype` would
        model(inputs[0].to(torch.uint8))
    assert torch.equal(model(inputs[0]), expected[0])
