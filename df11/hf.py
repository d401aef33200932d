"""What is asked of transformers: the tensors of a geometry, a random model, and GGUF as bf16. Nothing else imports it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

from df11.sources.model import TensorInfo

_SPELLING = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


def tensor_shapes(geometry: Mapping[str, Any]) -> list[TensorInfo]:
    """Tensors of the geometry's bf16 model, nothing allocated: a tied one once, under the name that save_pretrained keeps."""
    with torch.device("meta"):
        model = _build(geometry)
    return [TensorInfo(name, tuple(p.shape), _SPELLING[p.dtype]) for name, p in model.named_parameters()]


def build_random(geometry: Mapping[str, Any], seed: int, directory: Path) -> None:
    """A bf16 model with transformers' own initialisation, saved as safetensors and config."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _build(geometry).save_pretrained(directory)


def convert_gguf(file: Path, directory: Path) -> None:
    """A GGUF file dequantised to bf16, saved as safetensors, config and tokenizer."""
    dense = transformers.GgufConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.bfloat16, quantization_config=dense
    )
    model.save_pretrained(directory)
    transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(directory)


def _build(geometry: Mapping[str, Any]) -> transformers.PreTrainedModel:
    config = transformers.AutoConfig.for_model(**geometry)
    (architecture,) = geometry["architectures"]
    model: transformers.PreTrainedModel = getattr(transformers, architecture)._from_config(config, dtype=torch.bfloat16)
    return model
