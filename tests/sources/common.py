"""What the tests of several sources make."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from df11.sources import TensorInfo
from df11.sources.files import INDEX

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def info(name: str, *shape: int, dtype: str = "BF16") -> TensorInfo:
    return TensorInfo(name, shape, dtype)


def mixed() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "model.layers.0.up.weight": torch.randn(37, 11, generator=generator).bfloat16(),
        "model.layers.0.norm.weight": torch.ones(11),
        "model.layers.0.empty.weight": torch.empty(0, 11, dtype=torch.bfloat16),
        "model.layers.0.row.weight": torch.randn(1, 5000, generator=generator).bfloat16(),
        "scale": torch.tensor(1.5, dtype=torch.float16),
        "ids": torch.arange(6).reshape(2, 3),
    }


def save_shards(directory: Path, shards: list[dict[str, torch.Tensor]]) -> None:
    places = {}
    for i, shard in enumerate(shards):
        save_file(shard, directory / f"model-{i}.safetensors")
        places |= dict.fromkeys(shard, f"model-{i}.safetensors")
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
