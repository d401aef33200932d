"""All that has to do with transformers: geometries, GGUF as bf16, and loading compressed checkpoints. Nothing else imports it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
import xxhash
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name
from transformers.utils.quantization_config import QuantizationConfigMixin

from df11.checkpoint import QUANT_METHOD, VERSION
from df11.modules import PARTS, compress_, compressed_parameters, prepare, share, tie
from df11.runtime import attach
from df11.sources.files import SafetensorsSource
from df11.sources.model import SourceError, TensorInfo

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


def parameter_names(directory: Path) -> set[str]:
    """Names that a checkpoint's model has as parameters. The checkpoint may hold others, which transformers merges on loading."""
    return set(parameter_shapes(directory))


def parameter_shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters of the model that config.json describes, tied ones under each of their names."""
    try:
        config = transformers.AutoConfig.from_pretrained(directory)
        (architecture,) = config.architectures
        with torch.device("meta"):
            model = getattr(transformers, architecture)._from_config(config, dtype=torch.bfloat16)
    except (ValueError, TypeError, AttributeError, OSError) as unknown:
        raise SourceError(
            f"{directory / 'config.json'} is of no model that transformers {transformers.__version__} knows ({unknown}):"
            " update it, or take config.json away to compress every matrix by its shape"
        ) from unknown
    return {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}


@register_quantization_config(QUANT_METHOD)
class DF11Config(QuantizationConfigMixin):
    """`quantization_config` of a compressed checkpoint; given to from_pretrained with an original one, compresses while loading.

    include, exclude: shell patterns of parameter names. granularity: what is decompressed at a time, `layer` or `block`.
    """

    def __init__(
        self,
        include: tuple[str, ...] = (),
        exclude: tuple[str, ...] = (),
        granularity: str = "layer",
        version: int = VERSION,
        **kwargs: Any,
    ) -> None:
        if version != VERSION:
            raise ValueError(f"the checkpoint has version {version} of the df11 layout, this df11 reads {VERSION}: update df11")
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]
        self.include, self.exclude = tuple(include), tuple(exclude)
        self.granularity, self.version = granularity, version


@register_quantizer(QUANT_METHOD)
class DF11Quantizer(HfQuantizer):
    """Loads compressed checkpoints; the name is transformers': nothing is quantised, every bit stays."""

    quantization_config: DF11Config

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if kwargs.get("dtype") not in (None, "auto", torch.bfloat16):
            raise ValueError(f"dtype={kwargs['dtype']}: the compressed weights are bfloat16; leave dtype out")

    def update_dtype(self, dtype: torch.dtype | None) -> torch.dtype:
        if dtype not in (None, torch.bfloat16):
            raise ValueError(f"dtype={dtype}: the compressed weights are torch.bfloat16, and so must the model be")
        return torch.bfloat16

    def _process_model_before_weight_loading(
        self, model: transformers.PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if not self.pre_quantized:
            return
        if not checkpoint_files:
            raise ValueError("a compressed model is loaded from safetensors files: none were given")
        shapes: dict[str, tuple[int, ...]] = {}
        for file in checkpoint_files:
            shapes |= {info.name: info.shape for info in SafetensorsSource(Path(file)).tensors()}
        for name in [name.removesuffix("_luts") for name in shapes if name.endswith("_luts")]:
            try:
                module, leaf = get_module_from_name(model, name)
                module.get_parameter(leaf)
            except AttributeError as missing:
                raise ValueError(
                    f"{name} is compressed, but {type(model).__name__} has no such parameter: compress with --exclude '{name}'"
                ) from missing
            prepare(module, leaf, {"encoded_exponent": shapes[name]} | {part: shapes[f"{name}_{part}"] for part in PARTS})
        # Tied here and not by transformers, which ties parameters only.
        for target, source in list(model.all_tied_weights_keys.items()):
            for one, other in ((target, source), (source, target)):  # a checkpoint may hold either
                holder, leaf = get_module_from_name(model, other)
                if one not in shapes and leaf in compressed_parameters(holder):
                    module, name = get_module_from_name(model, one)
                    tie(module, name, compressed_parameters(holder)[leaf])
                    module.__dict__["_is_hf_initialized"] = True  # has nothing that transformers could initialise
                    del model.all_tied_weights_keys[target]
                    break

    def _process_model_after_weight_loading(self, model: transformers.PreTrainedModel, **kwargs: Any) -> None:
        if not self.pre_quantized:
            compress_(model, self.quantization_config.include, self.quantization_config.exclude)
        # Saved under the names that the model has: what transformers merged or renamed on loading cannot be undone on streams.
        model.__dict__["_weight_conversions"] = []
        attach(model, self.quantization_config.granularity)

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def build(
    geometry: Mapping[str, Any], seed: int, device: str, finish: Callable[[nn.Module], object] = lambda module: None
) -> transformers.PreTrainedModel:
    """A bf16 model with transformers' own random initialisation, made on the device module by module.

    A module's weights depend on the seed and its name alone. `finish` gets each module as soon as its own weights are there, and
    may compress them or move them away: so a model may be larger than the device's memory. Tied weights are made once.
    """
    with torch.device("meta"):
        model = _build(geometry)
    initialise: Callable[[nn.Module], None] = model._init_weights
    made: dict[int, tuple[nn.Module, str]] = {}
    with torch.random.fork_rng(devices=None if device == "cuda" else []):
        for name, module in model.named_modules():
            shared = {leaf: made[id(p)] for leaf, p in module._parameters.items() if id(p) in made}
            for leaf in shared:
                del module._parameters[leaf]
            made |= {id(p): (module, leaf) for leaf, p in module._parameters.items() if p is not None}
            module.to_empty(device=device, recurse=False)
            torch.manual_seed(xxhash.xxh3_64_intdigest(f"{seed} {name}".encode()) >> 1)
            initialise(module)
            finish(module)
            for leaf, (holder, source) in shared.items():
                share(module, leaf, holder, source)
    model.train(False)
    return model


def load(directory: Path, device: str) -> transformers.PreTrainedModel:
    """A bf16 or compressed model."""
    model: transformers.PreTrainedModel = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.bfloat16, device_map=device
    )
    return model


def tokenizer(directory: Path) -> Any:
    """The tokenizer of a model directory, None where it has none."""
    if not (directory / "tokenizer_config.json").exists():
        return None
    return transformers.AutoTokenizer.from_pretrained(directory)
