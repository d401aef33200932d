"""What other packages do with a compressed model, as docs/interop.md says."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import torch.distributed as dist
import torch.distributed.checkpoint
import torch.multiprocessing as mp
import transformers

from df11 import fused, modules
from df11.tensors import CompressedTensor
from tests.helpers import same_bits

SIZES = {"hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 1, "num_attention_heads": 4, "head_dim": 64}
SIZES |= {"num_key_value_heads": 2, "vocab_size": 1000, "pad_token_id": 999}
IDS = torch.arange(3, 43).view(2, 20)
MODES = ("exact", "fused")


def build(mode: str = "") -> Any:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model("llama", **SIZES)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval().requires_grad_(False)
    if mode == "exact":
        modules.compress_(model)
    elif mode == "fused":
        fused.fuse_(model)
    assert sum(isinstance(p, CompressedTensor) for p in model.parameters()) == (9 if mode else 0)
    return model


@pytest.fixture(params=MODES)
def model(request: pytest.FixtureRequest) -> Any:
    return build(request.param)


@torch.no_grad()
def test_export(model: Any, tmp_path: Path) -> None:
    expected = model(IDS, use_cache=False).logits
    program = torch.export.export(model, (IDS,), {"use_cache": False}, strict=False)
    torch.export.save(program, tmp_path / "model.pt2")
    for one in (program, torch.export.load(tmp_path / "model.pt2")):
        assert same_bits(one.module()(IDS, use_cache=False).logits, expected)


class Logits(torch.nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(ids, use_cache=False).logits
        return logits


@torch.no_grad()
def test_jit_trace(model: Any) -> None:
    traced = torch.jit.trace(Logits(model), (IDS,), check_trace=False)
    assert same_bits(traced(IDS + 7), model(IDS + 7).logits)


@torch.no_grad()
def test_pipeline(model: Any) -> None:
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(1000)}, unk_token="w0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w999", eos_token="w2")
    texts = [
        transformers.pipeline("text-generation", model=one, tokenizer=tokenizer)("w5 w6 w7", max_new_tokens=5, do_sample=False)
        for one in (model, build())
    ]
    assert texts[0] == texts[1] and len(texts[0][0]["generated_text"]) > 12


@torch.no_grad()
def test_assisted_generation(model: Any) -> None:
    asked: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    expected = build().generate(IDS[:1], **asked)
    assert torch.equal(model.generate(IDS[:1], assistant_model=build(), **asked), expected)
    assert torch.equal(build().generate(IDS[:1], assistant_model=model, **asked), expected)


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of one."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_distributed_checkpoint(model: Any, tmp_path: Path) -> None:
    dist.checkpoint.save(model.state_dict(), checkpoint_id=tmp_path / "saved")
    plain = build()
    expected = {name: p.clone() for name, p in plain.state_dict().items()}
    state = {name: torch.zeros_like(p) for name, p in expected.items()}
    dist.checkpoint.load(state, checkpoint_id=tmp_path / "saved")
    assert all(same_bits(state[name], p) for name, p in expected.items())


@pytest.mark.usefixtures("alone")
def test_memory_that_is_not_there_is_not_read() -> None:
    weight = build("exact").model.layers[0].mlp.up_proj.weight
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    for read in (
        lambda: dist.tensor.distribute_tensor(weight, mesh, [dist.tensor.Shard(0)]),
        lambda: weight.apply_(lambda value: value),
        lambda: weight.untyped_storage().tolist(),
    ):
        with pytest.raises(RuntimeError, match="data"):
            read()
    assert same_bits(torch.from_dlpack(weight), weight.decompress())


def _train(rank: int, group: str, mode: str, directory: str) -> None:
    import peft

    dist.init_process_group("gloo", init_method=f"file://{group}", rank=rank, world_size=2)
    adapted = peft.get_peft_model(build(mode), peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    ddp = torch.nn.parallel.DistributedDataParallel(adapted)
    ids = IDS[rank : rank + 1]
    ddp(ids, labels=ids).loss.backward()
    compressed = sum(isinstance(p, CompressedTensor) for p in ddp.parameters())
    torch.save([compressed, *(p.grad for p in ddp.parameters() if p.grad is not None)], f"{directory}/{mode}{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_distributed_data_parallel(tmp_path: Path) -> None:
    """LoRA in two processes: gradients are those of the uncompressed model, and the weights stay compressed."""
    found = {}
    os.environ["OMP_NUM_THREADS"] = "1"
    for mode in ("", "exact"):
        mp.spawn(_train, args=(str(tmp_path / f"group{mode}"), mode, str(tmp_path)), nprocs=2)
        found[mode] = [torch.load(tmp_path / f"{mode}{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert found["exact"][0][0] == 9
    for plain, ours, others in zip(found[""][0][1:], found["exact"][0][1:], found["exact"][1][1:], strict=True):
        assert torch.equal(plain, ours) and torch.equal(ours, others)
