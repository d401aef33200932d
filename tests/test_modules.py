"""Compressed weights inside modules, on the CPU."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from df11 import modules, runtime
from df11.memory import aligned
from df11.modules import compress_, compressed_parameters, offload_, stored_bytes
from df11.runtime import attach
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
    return Model().bfloat16().eval().requires_grad_(False)


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
    largest = max(aligned(2 * p.numel()) for p in original.parameters() if p.dim() > 1)
    assert workspace.nbytes == (whole_block if granularity == "block" else largest)
    attach(model, "layer")
    assert same_bits(model(IDS), expected)


def test_every_decoded_tensor_starts_on_256_bytes(original: Model) -> None:
    compress_(original)
    workspace = attach(original, "block")
    lent = []
    original.layers[0].register_forward_pre_hook(
        lambda m, a: lent.extend(p._stored.held.weights for part in m.modules() for p in compressed_parameters(part).values())
    )
    original(IDS)
    base = workspace.bytes(torch.device("cpu"), 0, 0, workspace.nbytes)
    starts = [weights.data_ptr() - base.data_ptr() for weights in lent]
    assert len(starts) == 4 and all(start % 256 == 0 and 0 <= start < workspace.nbytes for start in starts)


@pytest.mark.parametrize("granularity", runtime.GRANULARITIES)
def test_outside_of_a_forward_nothing_is_decompressed(original: Model, granularity: str) -> None:
    shapes = {name: p.shape for name, p in original.named_parameters()}
    compress_(original)
    attach(original, granularity)
    original(IDS)
    assert original.head.weight is original.embed.weight and original.embed.weight.dtype == torch.bfloat16
    assert {name: p.shape for name, p in original.named_parameters()} == shapes
    assert all(p._stored.held is None for module in original.modules() for p in compressed_parameters(module).values())


def test_what_is_kept_of_a_block_stays_right(original: Model) -> None:
    """Views, and what operators return, while the next block's weights go into the same memory."""
    weight = original.layers[0].second.weight.clone()
    compress_(original)
    attach(original, "block")
    kept: list[torch.Tensor] = []

    def keep(module: nn.Linear, arguments: object) -> None:
        own = module.weight
        kept.extend((own.t(), own.view(torch.int16), own[3:5], own + 0, own.contiguous(), own.data, own.float(), own.reshape(-1)))

    original.layers[0].second.register_forward_pre_hook(keep)
    original(IDS)
    bits = weight.view(torch.int16)
    expected = (weight.t(), bits, weight[3:5], weight + 0, weight, weight, weight.float(), weight.reshape(-1))
    assert all(torch.equal(a, b) for a, b in zip(kept, expected, strict=True))


@pytest.mark.parametrize("granularity", runtime.GRANULARITIES)
def test_gradients_of_activations(original: Model, granularity: str) -> None:
    """A block that needs them gets no borrowed weights."""
    x = torch.randn(1, 16).bfloat16()
    found = []
    for model in (original, copy.deepcopy(original)):
        if model is not original:
            compress_(model)
            attach(model, granularity)
        given = x.clone().requires_grad_()
        out = model.layers[1](model.layers[0](given))
        out.sum().backward()
        found += [out.detach(), given.grad]
    assert same_bits(found[0], found[2]) and same_bits(found[1], found[3])


def test_an_error_in_a_forward_leaves_the_model_usable(original: Model) -> None:
    expected = original(IDS)
    compress_(original)
    attach(original, "block")
    with pytest.raises(RuntimeError):
        original.layers[0](torch.zeros(1, 5).bfloat16())
    assert same_bits(original(IDS), expected)


@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize("source", ["compressed", "plain"])
@pytest.mark.parametrize("target", ["compressed", "plain"])
def test_state_dicts_load_into_another_model(original: Model, assign: bool, source: str, target: str) -> None:
    expected = original(IDS)
    other = copy.deepcopy(original)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    if source == "compressed":
        compress_(original)
    if target == "compressed":
        compress_(other)
    other.load_state_dict(original.state_dict(), assign=assign)
    assert same_bits(other(IDS), expected)


@pytest.mark.parametrize("granularity", runtime.GRANULARITIES)
def test_copies_and_pickles_run_by_themselves(original: Model, granularity: str) -> None:
    expected = original(IDS)
    compress_(original)
    attach(original, granularity)
    for copied in (copy.deepcopy(original), pickle.loads(pickle.dumps(original))):
        assert copied.head.weight is copied.embed.weight and modules.is_compressed(copied)
        with torch.no_grad():
            original.embed.weight.zero_()
        assert same_bits(copied(IDS), expected)
        attach(copied, "block")
        assert same_bits(copied(IDS), expected)
        original.load_state_dict(copied.state_dict())
        assert same_bits(original(IDS), expected)


def test_misuse_is_told(original: Model) -> None:
    compress_(original)
    with pytest.raises(ValueError, match="choose one of layer, block"):
        attach(original, "tensor")
    with pytest.raises(ValueError, match="choose one of fast, paper, released"):
        attach(original, kernel="quick")


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


class Outer(Experts):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(super().forward(x))  # type: ignore[no-any-return]


@pytest.mark.parametrize("prefetch", [True, False])
def test_modules_with_weights_inside_of_others(prefetch: bool) -> None:
    torch.manual_seed(0)
    nested, x = nn.Sequential(Outer(), Outer()).bfloat16().eval().requires_grad_(False), torch.randn(2, 16).bfloat16()
    expected = nested(x)
    compress_(nested)
    attach(nested, "block", prefetch=prefetch)
    for _ in range(2):
        assert same_bits(nested(x), expected)


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
@pytest.mark.parametrize("granularity", runtime.GRANULARITIES)
def test_threads_that_share_a_model_wait_for_each_other(granularity: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(6))).bfloat16().eval()
    inputs = [torch.randn(1, 64).bfloat16() for _ in range(2)]
    expected = [model(x) for x in inputs]
    compress_(model)
    attach(model, granularity)

    def run(which: int) -> int:
        with torch.inference_mode():
            return sum(torch.equal(model(inputs[which]), expected[which]) for _ in range(60))

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(run, range(2))) == [60, 60]
    assert torch.equal(model(inputs[0]), expected[0])


@pytest.mark.parametrize("prefetch", [True, False])
@pytest.mark.parametrize("offloaded", [True, False])
@torch.no_grad()
def test_writes_to_an_attached_model(original: Model, prefetch: bool, offloaded: bool) -> None:
    """Also to weights that were decompressed ahead, and that wait in host memory; Inf changes how they are stored."""
    model, x = copy.deepcopy(original), torch.randn(1, 16).bfloat16()
    compress_(model)
    if offloaded:
        offload_(model, 2)
    attach(model, "block", prefetch=prefetch)
    for value in (2.0, torch.inf, 0.5):
        assert same_bits(model.layers[0](x), original.layers[0](x))  # fetches the next block
        for each in (model, original):
            each.layers[1].first.weight[3] = value
            each.layers[1].second.weight.mul_(2)
        assert same_bits(model.layers[1](x), original.layers[1](x)) and same_bits(model(IDS), original(IDS))


@pytest.mark.parametrize("prefetch", [True, False])
@torch.no_grad()
def test_a_block_that_calls_another(original: Model, prefetch: bool) -> None:
    class Calls(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own = nn.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.own(x) + original.layers[1](x) + self.own(x)

    torch.manual_seed(1)
    original.layers[0] = Calls().bfloat16()
    expected = original(IDS)
    compress_(original)
    attach(original, "block", prefetch=prefetch)
    for _ in range(2):
        assert same_bits(original(IDS), expected)
