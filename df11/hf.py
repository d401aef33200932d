"""All that has to do with transformers: geometries, GGUF as bf16, and loading compressed checkpoints. Nothing else imports it."""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
import xxhash
from torch import nn
from transformers.models.auto import modeling_auto
from transformers.quantizers import auto as quantizers
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name
from transformers.utils.quantization_config import QuantizationConfigMixin

from df11 import hf_io, released_checkpoint
from df11.checkpoint import GUARD, QUANT_METHOD, REMOTE, VERSION, CheckpointError
from df11.fused import fuse_, is_fused
from df11.modules import compress_own_, decompress_, inside, is_compressed
from df11.runtime import GRANULARITIES, MODES, attach, detach
from df11.sources.model import SPELLING, SourceError, TensorInfo, check_patterns, is_matrix, is_selected
from df11.tensors import CompressedTensor, Units, dense


def tensor_shapes(geometry: Mapping[str, Any]) -> list[TensorInfo]:
    """Tensors of the geometry's bf16 model, nothing allocated: a tied one once, under the name that save_pretrained keeps."""
    with torch.device("meta"):
        model = _build(geometry)
    return [TensorInfo(name, tuple(p.shape), SPELLING[p.dtype]) for name, p in model.named_parameters()]


def cache_bytes(geometry: Mapping[str, Any], tokens: int) -> int:
    """Bytes of the bf16 keys and values of one sequence of so many tokens; a sliding window keeps its own tokens only."""
    config = transformers.AutoConfig.for_model(**geometry).get_text_config(decoder=True)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    kept = sum(min(tokens, config.sliding_window) if kind == "sliding_attention" else tokens for kind in kinds)
    size: int = 2 * 2 * config.num_key_value_heads * head_dim * kept
    return size


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


def parameter_shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters of the model that config.json describes, tied ones under each of their names."""
    return {name: tuple(p.shape) for name, p in _without_weights(directory).named_parameters(remove_duplicate=False)}


def parameter_names(directory: Path) -> list[set[str]]:
    """The names of each parameter of the model that config.json describes: more than one of tied ones."""
    found: dict[int, set[str]] = {}
    model = _without_weights(directory)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found.setdefault(id(parameter), set()).add(name)
    return list(found.values())


def _without_weights(directory: Path) -> transformers.PreTrainedModel:
    with torch.device("meta"):
        model: transformers.PreTrainedModel = model_class(directory)._from_config(_config(directory), dtype=torch.bfloat16)
    return model


def _config(directory: Path) -> Any:
    try:
        return transformers.AutoConfig.from_pretrained(directory)
    except Exception as unknown:  # whatever transformers makes of a config
        reason = (str(unknown).strip() or type(unknown).__name__).splitlines()[0]
        raise SourceError(
            f"{directory / 'config.json'} is of no model that transformers {transformers.__version__} knows ({reason}): update it"
        ) from unknown


def model_class(directory: Path) -> Any:
    """transformers' class of the model that config.json describes: what it names as its architecture. Raises SourceError."""
    names = _config(directory).architectures or []
    for name in names:
        if hasattr(transformers, name):
            return getattr(transformers, name)
    named = f"names {', '.join(names)}, which transformers {transformers.__version__} does not have" if names else "names none"
    raise SourceError(f"{directory / 'config.json'}: its architectures {named}: update transformers, or add the class's name")


def auto_classes(directory: Path) -> dict[str, str]:
    """The Auto classes of transformers that know the model of config.json, each with the class that it makes."""
    config, found = _config(directory), {}
    for name, auto in vars(modeling_auto).items():
        mapping = getattr(auto, "_model_mapping", None) if name.startswith("AutoModel") else None
        if mapping is not None and type(config) in mapping:
            made = mapping[type(config)]
            each = [one.__name__ for one in (made if isinstance(made, tuple | list) else [made])]
            found[name] = next((one for one in each if one in (config.architectures or [])), each[0])
    return found


@register_quantization_config(QUANT_METHOD)
class DF11Config(QuantizationConfigMixin):
    """`quantization_config` of a compressed checkpoint; given to from_pretrained with an original one, compresses while loading.

    With a checkpoint of the released package (`dfloat11_config` in config.json) it must be given: their config.json asks for none.

    include, exclude: shell patterns of parameter names. mode: `exact` (the default), logits bit-identical to the original's;
    `fused`, matrices are transcoded to the tiled layout, for products that do not decompress (df11/fused.py). granularity: what
    is decompressed at a time in exact mode, `layer` (the default) or `block`. Both, where given, count more than what a
    compressed checkpoint says.
    """

    def __init__(
        self,
        include: tuple[str, ...] = (),
        exclude: tuple[str, ...] = (),
        granularity: str | None = None,
        mode: str | None = None,
        version: int = VERSION,
        **kwargs: Any,
    ) -> None:
        if version != VERSION:
            raise ValueError(f"the checkpoint has version {version} of the df11 layout, this df11 reads {VERSION}: update df11")
        for name, value, known in (("mode", mode, MODES), ("granularity", granularity, GRANULARITIES)):
            if value is not None and value not in known:
                raise ValueError(f"{name}={value!r}: choose one of {', '.join(known)}")
        if unknown := kwargs.keys() - {"quant_method"}:
            raise ValueError(f"{', '.join(sorted(unknown))}: DF11Config takes include, exclude, granularity and mode")
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]
        self.include, self.exclude = ((one,) if isinstance(one, str) else tuple(one) for one in (include, exclude))
        self.granularity, self.mode = granularity or "layer", mode or "exact"
        self.version = version
        self._given = {name: value for name, value in (("granularity", granularity), ("mode", mode)) if value is not None}

    def get_loading_attributes(self) -> dict[str, Any]:
        """What from_pretrained sets in the config of a compressed checkpoint."""
        return self._given

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in super().to_dict().items() if name != "_given"}


quantizers.LOADING_ATTRIBUTES_CONFIG_TYPES = (*quantizers.LOADING_ATTRIBUTES_CONFIG_TYPES, DF11Config)  # type: ignore[assignment]


@register_quantizer(QUANT_METHOD)
class DF11Quantizer(HfQuantizer):
    """Loads compressed checkpoints; the name is transformers': nothing is quantised, every bit stays."""

    quantization_config: DF11Config
    _released: _Released | None = None
    places: Mapping[str, hf_io.Place] = {}  # the compressed tensors of a checkpoint, by their names there
    _ratio = 0.75  # of stored bytes to a matrix's own, for whoever shares out memory; a checkpoint's is in its files

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if kwargs.get("dtype") not in (None, "auto", torch.bfloat16):
            raise ValueError(f"dtype={kwargs['dtype']}: the compressed weights are bfloat16; leave dtype out")
        if kwargs.keys() == {"device_map"}:  # the second call: the map is transformers' own, made of "auto"
            kwargs["device_map"].update(self.update_device_map(kwargs["device_map"]))

    def update_device_map(self, device_map: Any) -> Any:
        """What shall stay on the disk is mapped into memory from its file, as safetensors does for the CPU: accelerate would read
        single arrays of it as weights."""
        if not (self.pre_quantized and isinstance(device_map, dict)):
            return device_map
        return {name: "cpu" if place == "disk" else place for name, place in device_map.items()}

    def update_dtype(self, dtype: torch.dtype | None) -> torch.dtype:
        if dtype not in (None, torch.bfloat16):
            raise ValueError(f"dtype={dtype}: the compressed weights are torch.bfloat16, and so must the model be")
        return torch.bfloat16

    def _process_model_before_weight_loading(
        self,
        model: transformers.PreTrainedModel,
        checkpoint_files: list[str] | None = None,
        device_map: str | dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if checkpoint_files and released_checkpoint.is_released(Path(checkpoint_files[0]).parent):
            places = set(device_map.values()) if isinstance(device_map, dict) else set()
            if len(places) > 1 and places & {"cpu", "disk"}:
                raise ValueError("a checkpoint of the released package cannot be offloaded: df11 restore, then df11 compress it")
            self._released = _Released(model, checkpoint_files)
            return
        if not self.pre_quantized:
            names = (name for name, _ in model.named_parameters(remove_duplicate=False))
            check_patterns(names, self.quantization_config.include, self.quantization_config.exclude)
            return
        if not checkpoint_files:
            raise ValueError("a compressed model is loaded from safetensors files: none were given")
        self.places = hf_io.stored(checkpoint_files)
        if weights := sum(math.prod(place.shape) for place in self.places.values()):
            size = sum(end - begin for place in self.places.values() for begin, end in place.ranges)
            self._ratio = size / (2 * weights)

    def param_needs_quantization(self, model: transformers.PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        """Of a checkpoint that is not compressed: whether a parameter is to be, as soon as it is there."""
        parameter = model.get_parameter_or_buffer(param_name)
        chosen = is_selected(param_name, self.quantization_config.include, self.quantization_config.exclude)
        return isinstance(parameter, nn.Parameter) and is_matrix(parameter.dtype, parameter.shape) and chosen

    def get_quantize_ops(self) -> hf_io.Compress:
        return hf_io.Compress(self.quantization_config.include, self.quantization_config.exclude)

    def param_element_size(self, model: nn.Module, param_name: str, param: torch.Tensor) -> float:
        """Bytes a weight, for whoever shares out memory before anything is loaded."""
        return param.element_size() * (self._ratio if is_matrix(param.dtype, param.shape) else 1)

    def _process_model_after_weight_loading(self, model: transformers.PreTrainedModel, **kwargs: Any) -> None:
        if self._released:
            self._released.fill(self.quantization_config)
        for tensor in inside(model):
            if isinstance(stored := tensor._stored, Units):
                stored.by_matrix()
        # The file that remote code names is not saved with the model.
        codes = (getattr(model.config, "auto_map", None) or {}).values()
        if any(str(code).rpartition("--")[2].startswith(f"{REMOTE}.") for code in codes):
            del model.config.auto_map
        model.requires_grad_(False)
        # Models and Trainer take other branches where weights are rounded, some of them with other results. These are not.
        model.__dict__["is_quantized"] = False
        for module in model.modules():
            if isinstance(module, transformers.PreTrainedModel):
                module.config.__dict__.pop("_is_quantized", None)
        if self.quantization_config.mode == "fused":
            fuse_(model, include=self.quantization_config.include, exclude=self.quantization_config.exclude)
        elif self.quantization_config.granularity != "layer":
            attach(model, self.quantization_config.granularity)

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        detach(model)
        decompress_(model)
        return model.requires_grad_(True)

    @property
    def is_compileable(self) -> bool:
        """Whether `generate` compiles a step when its cache is static, as it does with the original model."""
        return True

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """The tiled layout is not stored: weights are saved in the published one, and turned again on loading."""
        return True

    @property
    def is_trainable(self) -> bool:
        """With adapters; the compressed weights are frozen."""
        return True


_plain_footprint = transformers.PreTrainedModel.get_memory_footprint


@functools.wraps(_plain_footprint)
def _footprint(self: transformers.PreTrainedModel, return_buffers: bool = True) -> int:
    compressed = [p for p in self.parameters() if isinstance(p, CompressedTensor)]
    stored = {id(p._stored): p.stored_bytes for p in compressed}
    size: int = _plain_footprint(self, return_buffers)  # type: ignore[no-untyped-call]
    return size + sum(stored.values()) - sum(p.nbytes for p in compressed)


_plain_save = transformers.PreTrainedModel.save_pretrained


@functools.wraps(_plain_save)
def _save(self: transformers.PreTrainedModel, *args: Any, **kwargs: Any) -> None:
    """What `compress_` compressed has no quantizer yet, and a config that does not say so."""
    if getattr(self, "hf_quantizer", None) is None and is_compressed(self):
        quantizer = self.__dict__["hf_quantizer"] = DF11Quantizer(DF11Config())
        self.config.quantization_config = quantizer.quantization_config
    if not isinstance(getattr(self, "hf_quantizer", None), DF11Quantizer):
        _plain_save(self, *args, **kwargs)
        return
    with hf_io.saving(self):
        _plain_save(self, *args, **kwargs)


_plain_config = transformers.PreTrainedConfig.to_json_file


@functools.wraps(_plain_config)
def _write_config(self: transformers.PreTrainedConfig, json_file_path: Any, *args: Any, **kwargs: Any) -> None:
    """transformers never saves which file the weights are in, and so not what stands there of compressed ones."""
    _plain_config(self, json_file_path, *args, **kwargs)
    if isinstance(getattr(self, "quantization_config", None), DF11Config):
        path = Path(json_file_path)
        config = json.loads(path.read_text(encoding="utf-8")) | {"transformers_weights": GUARD}
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


transformers.PreTrainedConfig.to_json_file = _write_config  # type: ignore[method-assign]
transformers.PreTrainedModel.save_pretrained = _save  # type: ignore[method-assign]
transformers.PreTrainedModel.get_memory_footprint = _footprint  # type: ignore[method-assign]  # it multiplies weights by width


class _Released:
    """A checkpoint of the released package on its way into a model.

    Its units are not what modules store here: each is decoded and its matrices are compressed anew, after transformers has loaded
    all other tensors. Until then an empty buffer in a weight's place lets transformers choose its device.
    """

    def __init__(self, model: transformers.PreTrainedModel, checkpoint_files: list[str]) -> None:
        directory = Path(checkpoint_files[0]).parent
        self.model = model
        self.shapes = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
        self.units = released_checkpoint.units(directory, self.shapes)
        held = {name for unit in self.units for name in unit.names}
        there = {unit.module for unit in self.units} | {name.rpartition(".")[0] for name in model.all_tied_weights_keys}
        for name, _ in model.named_modules():
            if name not in there and any(re.fullmatch(p, name) for p in released_checkpoint.patterns(directory)):
                raise CheckpointError(
                    f"{directory} lacks the compressed {name}: from_pretrained fetches only some files of a hub repository of this"
                    " layout, so download all of it with huggingface_hub.snapshot_download, and load that directory"
                )
        # transformers knows model.safetensors only. What its classes do not know in the files is expected here.
        checkpoint_files[:] = [str(file) for file in released_checkpoint.weight_files(directory)]
        arrays = rf"\.({'|'.join(released_checkpoint.ARRAYS)})$"
        model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), arrays}
        self.tied: dict[str, str] = {}
        self.both: dict[str, str] = {}  # tied by the model's rule, and both in the file: by what it holds
        for target, source in list(model.all_tied_weights_keys.items()):
            if held & {target, source}:
                del model.all_tied_weights_keys[target]
                if held >= {target, source}:
                    self.both[target] = source
                else:
                    self.tied |= {target: source} if source in held else {source: target}
        for name in held | self.tied.keys():
            module, leaf = get_module_from_name(model, name)
            del module._parameters[leaf]
            module.register_buffer(leaf, torch.empty(0, dtype=torch.bfloat16, device="meta"), persistent=False)
            module.__dict__["_is_hf_initialized"] = True
        del model.config.dfloat11_config

    def fill(self, config: DF11Config) -> None:
        """One unit at a time."""
        for unit in self.units:
            for name, weights in unit.decode(self.shapes).items():
                if name not in self.tied:
                    module, leaf = get_module_from_name(self.model, name)
                    device = module._buffers[leaf].device
                    delattr(module, leaf)
                    module.register_parameter(leaf, nn.Parameter(weights.to(device), requires_grad=False))
                    compress_own_(module, name.rpartition(".")[0], config.include, config.exclude)
        for target, source in self.both.items():
            one, other = (dense(self.model.get_parameter(name)) for name in (target, source))
            if torch.equal(one.view(torch.int16), other.view(torch.int16)):
                self.tied[target] = source
                self.model.all_tied_weights_keys[target] = source
        for target, source in self.tied.items():
            (module, leaf), (holder, name) = (get_module_from_name(self.model, one) for one in (target, source))
            delattr(module, leaf)
            module.register_parameter(leaf, holder.get_parameter(name))


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
                module._parameters[leaf] = holder._parameters[source]
    model.train(False)
    return model


def load(directory: Path, device: str, mode: str = "exact") -> transformers.PreTrainedModel:
    """A model from a bf16 or a compressed checkpoint, also of the released package's. mode: `fused` where config.json says so or
    this does."""
    if mode not in MODES:
        raise ValueError(f"mode={mode!r}: choose one of {', '.join(MODES)}")
    options = {"quantization_config": DF11Config()} if released_checkpoint.is_released(directory) else {}
    model: transformers.PreTrainedModel = model_class(directory).from_pretrained(
        directory, dtype=torch.bfloat16, device_map=device, **options
    )
    if mode == "fused" and not is_fused(model):
        fuse_(model)
        if quantizer := getattr(model, "hf_quantizer", None):
            quantizer.quantization_config.mode = mode
    return model


def tokenizer(directory: Path) -> Any:
    """The tokenizer of a model directory, None where it has none."""
    if not (directory / "tokenizer_config.json").exists():
        return None
    return transformers.AutoTokenizer.from_pretrained(directory)
