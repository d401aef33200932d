"""Compressed tensors are tensors: the bits of the ordinary one from every operator, in every place, after every write."""

import copy
import io
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.multiprocessing
from torch import nn
from torch.nn import functional

from df11 import ops
from df11.tensors import CompressedTensor, Held, dense
from tests.helpers import normal, same_bits

WEIGHTS = {
    "matrix": normal(40, 64),
    "transposed": normal(64, 40).t(),
    "stack": normal(5, 32, 64),
    "convolution": normal(12, 8, 3, 3),
    "channels last": normal(12, 8, 3, 3).to(memory_format=torch.channels_last),
    "one row": normal(1, 64),
    "empty": normal(0, 64),
    "all patterns": torch.arange(1 << 16).to(torch.int16).view(torch.bfloat16).view(256, 256),
    "those with a code": torch.arange(1 << 15).to(torch.int16).view(torch.bfloat16)[: 240 << 7].view(240, 128),
}


def same(found: Any, expected: Any) -> bool:
    if isinstance(expected, tuple | list):
        return len(found) == len(expected) and all(map(same, found, expected))
    if not isinstance(expected, torch.Tensor):
        return bool(found == expected)
    if (found.shape, found.dtype, found.stride()) != (expected.shape, expected.dtype, expected.stride()):
        return False
    found, expected = (torch.empty(t.numel(), dtype=t.dtype).copy_(t.detach().reshape(-1)) for t in (found, expected))
    return torch.equal(found.view(torch.uint8), expected.view(torch.uint8)) if found.numel() else True


VIEWS: dict[str, Callable[[torch.Tensor], Any]] = {
    "t": lambda w: w.mT,
    "select": lambda w: w.select(0, w.shape[0] // 2),
    "slice": lambda w: w[1:, ::2],
    "split": lambda w: w.split(7),
    "unbind": lambda w: w.unbind(1),
    "permute": lambda w: w.permute(*reversed(range(w.dim()))),
    "unsqueeze": lambda w: w.unsqueeze(1),
    "expand": lambda w: w.expand(2, *w.shape),
    "diagonal": lambda w: w.diagonal(),
    "bits": lambda w: w.view(torch.int16),
    "bytes": lambda w: w.contiguous().view(torch.uint8)[..., 3:9],
    "detach": lambda w: w.detach(),
    "data": lambda w: w.data,
    "strided": lambda w: w.as_strided((w.shape[0] // 2, 3), (1, 2), w.storage_offset()),
}
OTHERS: dict[str, Callable[[torch.Tensor], Any]] = {
    "float": lambda w: w.float(),
    "half": lambda w: w.half(),
    "to": lambda w: w.to(torch.float64),
    "add": lambda w: w + w,
    "cat": lambda w: torch.cat([w, w.detach()]),
    "index": lambda w: w[torch.arange(w.shape[0]) % 2 == 0],
    "where": lambda w: torch.where(w > 0, w, 0),
    "zeros_like": lambda w: torch.zeros_like(w),
    "sum": lambda w: w.sum(-1),
    "contiguous": lambda w: w.mT.contiguous(),
    "clone": lambda w: w.clone(),
    "flatten": lambda w: w.permute(*reversed(range(w.dim()))).flatten(),
    "numbers": lambda w: (w.dim(), w.numel(), w.element_size(), w.is_contiguous(), w.storage_offset(), w.dtype, w.device, w.nbytes),
    "dropout": lambda w: functional.dropout(w, training=False),
    "list": lambda w: torch.nan_to_num(w).tolist(),
}


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("of", WEIGHTS)
def test_operators_give_the_same_bits(of: str, inference: bool) -> None:
    weights = WEIGHTS[of]
    with torch.inference_mode(inference):
        tensor = CompressedTensor(weights)
        assert same(tensor, weights) and tensor.is_compressed == (of not in ("empty", "all patterns"))
        assert len(tensor.units()) == (5 if of == "stack" else 1)
        for name, work in (VIEWS | OTHERS).items():
            if of == "empty" and name in ("select", "slice", "strided"):
                continue
            found = work(tensor)
            assert same(found, work(weights)), name
            if name in VIEWS and name != "bytes":
                views = [found] if isinstance(found, torch.Tensor) else found
                assert all(view._stored is tensor._stored for view in views), name


@pytest.mark.parametrize("inference", [False, True])
def test_products(inference: bool) -> None:
    with torch.inference_mode(inference):
        matrix, stack, kernel = (WEIGHTS[of] for of in ("matrix", "stack", "convolution"))
        x, image = normal(3, 64, std=1), normal(2, 8, 9, 9, std=1)
        ids, bias = torch.tensor([[3, 1], [39, 0]]), normal(40, std=1)
        for of, work in (
            (matrix, lambda w: functional.linear(x, w, bias)),
            (matrix, lambda w: functional.linear(input=x, weight=w)),
            (matrix, lambda w: functional.embedding(ids, w, padding_idx=1)),
            (matrix, lambda w: x @ w.T),
            (matrix, lambda w: torch.einsum("bi,oi->bo", x, w)),
            (matrix, lambda w: functional.embedding_bag(ids, w)),
            (stack, lambda w: torch.bmm(w, w.mT)),
            (stack, lambda w: sum(x @ expert.t() for expert in w)),
            (kernel, lambda w: functional.conv2d(image, w, padding=1)),
        ):
            assert same(work(CompressedTensor(of)), work(of))


def test_one_matrix_of_a_stack_is_decompressed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    stack = normal(6, 32, 64)
    tensor, decoded, decompress = CompressedTensor(stack), [], ops.decompress
    count = lambda units, out, kernel="fast": (decoded.append(sum(unit.numel for unit in units)), decompress(units, out, kernel))  # noqa: E731
    monkeypatch.setattr(ops, "decompress", count)
    for touch, matrices in (
        (lambda w: w[2] + 0, 1),
        (lambda w: w.select(0, 5).t().float(), 1),
        (lambda w: w[1:4].sum(), 3),
        (lambda w: [part * 2 for part in w.split(2)], 6),
        (lambda w: [functional.linear(normal(1, 64), expert) for expert in w], 6),
        (lambda w: w[3, 5:7, 1].tolist(), 1),
    ):
        decoded.clear()
        assert same(touch(tensor), touch(stack))
        assert sum(decoded) == matrices * 32 * 64 and max(decoded) <= max(1, min(matrices, 3)) * 32 * 64


WRITES: dict[str, Callable[[torch.Tensor], Any]] = {
    "zero_": lambda w: w.zero_(),
    "add_": lambda w: w.add_(1),
    "copy_": lambda w: w.copy_(torch.ones(w.shape)),
    "copy_ of another": lambda w: w.copy_(CompressedTensor(torch.full_like(dense(w), 3))),
    "fill_ of a part": lambda w: w[3:5].fill_(2),
    "through t": lambda w: w.t()[1].mul_(3),
    "through bits": lambda w: w.view(torch.int16).bitwise_xor_(0x7F),
    "through data": lambda w: w.data.mul_(-1),
    "through unbind": lambda w: [row.sub_(1) for row in w.unbind()[:2]],
    "item": lambda w: w.__setitem__((slice(None), 2), 5.0),
    "mask": lambda w: w.masked_fill_(torch.arange(w.shape[1]) % 3 == 0, 7),
    "index_put": lambda w: w.__setitem__(torch.tensor([0, 2]), 4.0),
    "Inf, which has no code": lambda w: w.fill_(torch.inf),
    "normal_": lambda w: (torch.manual_seed(1), nn.init.normal_(w))[1],
    "kaiming_uniform_": lambda w: (torch.manual_seed(1), nn.init.kaiming_uniform_(w))[1],
    "foreach": lambda w: torch._foreach_add_([w, torch.ones(3)], [torch.ones(w.shape).bfloat16(), torch.ones(3)]),
    "out": lambda w: torch.add(torch.ones(w.shape).bfloat16(), 1, out=w),
    "data = ": lambda w: setattr(w, "data", torch.full(w.shape, 2.0).bfloat16()),
    "data = of another shape": lambda w: setattr(w, "data", torch.full((3, 5), 2.0)),
}


@pytest.mark.parametrize("of", ["matrix", "transposed"])
@pytest.mark.parametrize("name", WRITES)
@torch.no_grad()
def test_writes(name: str, of: str) -> None:
    weights = WEIGHTS[of].clone()
    tensor = CompressedTensor(weights)
    alias = tensor.detach()
    if name.startswith("data ="):
        del alias
    found, expected = WRITES[name](tensor), WRITES[name](weights)
    assert same(tensor, weights)
    if not name.startswith("data ="):
        assert same(alias, weights) and (found is tensor) == (expected is weights)


def test_a_stack_that_is_written_stays_one() -> None:
    stack = normal(5, 32, 64)
    tensor = CompressedTensor(stack)
    with torch.no_grad():
        tensor[3].zero_()
        stack[3].zero_()
    assert same(tensor, stack) and len(tensor.units()) == 5


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_an_optimizer_trains_what_shall_be_trained(optimizer: Any, foreach: bool) -> None:
    found = []
    for wrap in (torch.Tensor.clone, CompressedTensor):
        layer, x = nn.Linear(64, 40, bias=False), normal(3, 64, std=1)
        layer.weight = nn.Parameter(wrap(WEIGHTS["matrix"]))
        steps = optimizer(layer.parameters(), lr=0.1, foreach=foreach)
        for _ in range(2):
            steps.zero_grad()
            layer(x).float().pow(2).sum().backward()
            steps.step()
        found.append(layer.weight)
    assert isinstance(found[1], CompressedTensor) and same(*found) and not same(found[0], WEIGHTS["matrix"])


@pytest.mark.parametrize("of", ["matrix", "transposed", "stack", "all patterns"])
def test_copies_pickles_and_files(of: str) -> None:
    weights = WEIGHTS[of]
    parameter = nn.Parameter(CompressedTensor(weights), requires_grad=False)
    parameter.note = "kept"  # type: ignore[attr-defined]
    part, file = parameter[1:3], io.BytesIO()
    torch.save({"a": parameter, "b": parameter, "part": part}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert loaded["a"] is loaded["b"] and loaded["part"]._stored is loaded["a"]._stored
    assert same(loaded["part"], weights[1:3])
    for copied in (loaded["a"], copy.deepcopy(parameter), pickle.loads(pickle.dumps(parameter))):
        assert same(copied, weights) and copied._stored is not parameter._stored
        assert isinstance(copied, nn.Parameter) and isinstance(copied, CompressedTensor)
        assert not copied.requires_grad and copied.note == "kept"
    both = copy.deepcopy([parameter, part])
    assert both[0]._stored is both[1]._stored is not parameter._stored
    assert parameter.to("meta").is_meta and parameter.to("meta").shape == weights.shape


def _in_another_process(tensor: torch.Tensor, queue: Any) -> None:
    with torch.no_grad():
        queue.put(tensor.sum().item())


def test_spawned_processes() -> None:
    tensor = CompressedTensor(WEIGHTS["matrix"]).share_memory_()
    assert tensor.is_shared()
    context = torch.multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    process = context.Process(target=_in_another_process, args=(tensor, queue))
    process.start()
    assert queue.get() == WEIGHTS["matrix"].sum().item()
    process.join()


def test_what_is_lent_is_for_one_thread() -> None:
    tensor = CompressedTensor(WEIGHTS["matrix"])
    tensor._stored.held = Held(torch.zeros(tensor.shape, dtype=torch.bfloat16), tensor.device)
    assert not (tensor + 0).any() and same(dense(tensor), WEIGHTS["matrix"])
    with ThreadPoolExecutor(1) as pool:
        assert same(pool.submit(lambda: dense(tensor + 0)).result(), WEIGHTS["matrix"])
    tensor._stored.held = None
    with torch.no_grad():
        tensor.add_(1)
    assert same(tensor, WEIGHTS["matrix"] + 1)


class Model(nn.Module):
    """An embedding, linear layers, a stack of experts, and two small layers beside them that are trained."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.up, self.down = nn.Embedding(50, 64), nn.Linear(64, 96), nn.Linear(96, 64, bias=False)
        self.experts = nn.Parameter(torch.randn(3, 64, 32) * 0.05)
        self.first, self.second = nn.Linear(64, 8, bias=False), nn.Linear(8, 96, bias=False)
        self.bfloat16().requires_grad_(False)
        for layer in (self.first, self.second):
            layer.requires_grad_(True)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        x = self.down(functional.gelu(self.up(x) + self.second(self.first(x))))
        return sum(x @ expert for expert in self.experts) + x @ self.experts[1]  # type: ignore[no-any-return]

    def compressed(self) -> nn.Module:
        for module, name in ((self.embed, "weight"), (self.up, "weight"), (self.down, "weight"), (self, "experts")):
            setattr(module, name, nn.Parameter(CompressedTensor(getattr(module, name)), requires_grad=False))
        return self


IDS = torch.arange(20).view(2, 10)


@torch.no_grad()
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_inference(backend: str) -> None:
    torch._dynamo.reset()
    found, expected = (torch.compile(m, backend=backend, fullgraph=True)(IDS) for m in (Model().compressed(), Model()))
    assert same_bits(found, expected)


@pytest.mark.parametrize("how", ["eager", "checkpointed", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_gradients_and_what_is_kept_for_them(how: str) -> None:
    """Bit-equal to those on ordinary weights, and no ordinary tensor of a weight's shape is kept."""
    shapes = {(50, 64), (64, 96), (96, 64), (3, 64, 32), (64, 32), (32, 64)}
    results = []
    for model in (Model(), Model().compressed()):
        torch._dynamo.reset()
        kept = []
        run: Any = model if how in ("eager", "checkpointed") else torch.compile(model, backend=how, fullgraph=True)
        given = (
            (lambda ids, run=run: torch.utils.checkpoint.checkpoint(run, ids, use_reentrant=False))
            if how == "checkpointed"
            else run
        )
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: (kept.append(t), t)[1], lambda t: t):
            out = given(IDS)
        out.float().pow(2).sum().backward()
        results.append([out, model.first.weight.grad, model.second.weight.grad])
        if isinstance(model.experts, CompressedTensor):
            assert kept and not [t.shape for t in kept if not isinstance(t, CompressedTensor) and tuple(t.shape) in shapes]
    assert all(map(same_bits, *results))


def test_compiled_code_does_not_write() -> None:
    tensor = CompressedTensor(WEIGHTS["matrix"])
    with torch.no_grad(), pytest.raises(Exception, match="cannot be written inside of torch"):
        torch.compile(lambda w: w.add_(1), backend="aot_eager")(tensor)
    assert same(tensor, WEIGHTS["matrix"])


@pytest.mark.parametrize("of", ["matrix", "stack"])
def test_opcheck(of: str) -> None:
    tensor = CompressedTensor(WEIGHTS[of])
    arrays, units = [getattr(tensor, name) for name in ops.ARRAYS], len(tensor.units())
    sizes = list(tensor._stored.numbers)
    torch.library.opcheck(torch.ops.df11.decode.default, (*arrays, sizes, tensor.numel() // units, units - 1, units))
    found = torch.ops.df11.decode(*arrays, sizes, tensor.numel() // units, 0, units)
    assert same_bits(found.view(tensor.shape), WEIGHTS[of])
    assert not torch.ops.df11.decode(*arrays, sizes, tensor.numel() // units, 0, 0).numel()


def test_modules_move_and_cast() -> None:
    layer = nn.Linear(64, 40, bias=False).bfloat16()
    layer.weight = parameter = nn.Parameter(CompressedTensor(WEIGHTS["matrix"]), requires_grad=False)
    state = layer.state_dict()
    assert layer.to("cpu").weight is parameter and layer.bfloat16().weight is parameter
    assert type(copy.deepcopy(layer).float().weight) is nn.Parameter
    assert same(copy.deepcopy(layer).half().weight, WEIGHTS["matrix"].half())
    other = copy.deepcopy(layer).to("meta")
    assert other.weight.is_meta and other.weight.shape == (40, 64)
    other.load_state_dict(state, assign=True)
    assert isinstance(other.weight, CompressedTensor) and same(other.weight, WEIGHTS["matrix"])


def test_what_accelerate_asks_of_a_parameters_class() -> None:
    tensor = CompressedTensor(WEIGHTS["matrix"])
    again = type(tensor)(tensor, requires_grad=False)
    assert isinstance(again, nn.Parameter) and again._stored is tensor._stored
    for other in (WEIGHTS["matrix"].to("meta"), WEIGHTS["matrix"].float()):
        assert type(CompressedTensor(other, requires_grad=False)) is nn.Parameter
    assert tensor.data_ptr() < 0 and tensor.data_ptr() == again.data_ptr() != CompressedTensor(WEIGHTS["matrix"]).data_ptr()


def test_refusals_are_one_sentence() -> None:
    tensor = CompressedTensor(WEIGHTS["matrix"])
    with torch.no_grad(), pytest.raises(RuntimeError, match="would change the shape of a compressed weight"):
        tensor.resize_(3, 4)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        tensor.nothing  # noqa: B018
    assert "40, 64" in repr(tensor) and "bytes stored" in repr(tensor)


@torch.inference_mode()
def test_nothing_that_is_lent_gets_away() -> None:
    """Also by operators that may return their argument as it is."""
    weights = WEIGHTS["matrix"].clone()
    tensor = CompressedTensor(weights)
    lent = weights.clone()
    tensor._stored.held = Held(lent, tensor.device)
    kept = [work(tensor) for work in (VIEWS | OTHERS).values()]
    tensor._stored.held = None
    lent.zero_()
    assert all(same(found, work(weights)) for found, work in zip(kept, (VIEWS | OTHERS).values(), strict=True))
