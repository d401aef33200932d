"""How transformers reads and writes files of compressed checkpoints.

Its own loader renames, merges, stacks, splits and transposes what is in a file (`transformers.core_model_loading`). So on loading,
the stored arrays of a tensor become a `CompressedTensor` before its mapping runs, under the name that the original has in the file;
what only gets another name goes straight in, what a conversion makes of others is compressed where it belongs. On saving, tensors
become stored arrays after its mapping has run backwards. Four functions that `transformers.modeling_utils` calls are wrapped for
this; from 5.17 on they take the same arguments.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import modeling_utils
from transformers.core_model_loading import ConversionOps, WeightConverter

from df11 import checkpoint
from df11.checkpoint import GUARD, CheckpointError
from df11.modules import compressed, decompressed
from df11.ops import ARRAYS
from df11.sources.files import read_header
from df11.sources.model import is_selected
from df11.tensors import CompressedTensor, Units

STORED = ARRAYS[:-1]  # of a unit; what follows the first has its name behind the tensor's

Shapes = Mapping[str, tuple[int, ...]]
Loader = Callable[..., Any]


def stored(files: Sequence[str]) -> tuple[dict[str, tuple[int, ...]], int]:
    """Shapes of the compressed tensors of safetensors files by name, and the bytes that they take. Raises CheckpointError where a
    file does not say them."""
    shapes: dict[str, tuple[int, ...]] = {}
    size = 0
    for file in files:
        header = read_header(Path(file))[1]
        about = (header.pop("__metadata__", None) or {}).get("df11")
        if about is None and any(name.endswith("_luts") for name in header):
            raise CheckpointError(f"{file} does not say what shapes its compressed tensors have: compress the original anew")
        records = json.loads(about)["tensors"] if about else {}
        for name, record in records.items():
            if record["compressed"]:
                shapes[name] = tuple(record["shape"])
                places = (header[key]["data_offsets"] for key in _keys(name) if key in header)
                size += sum(end - start for start, end in places)
    return shapes, size


def _keys(name: str) -> list[str]:
    """What the arrays of a tensor are called in a file, in the order of STORED."""
    return [name, *(f"{name}_{part}" for part in STORED[1:])]


class _Entry:
    """A compressed tensor in a file, in the place of a safetensors slice: it is read when it is indexed."""

    def __init__(self, name: str, shape: tuple[int, ...], arrays: dict[str, Any]) -> None:
        self.name, self.shape, self.arrays = name, shape, arrays

    def __getitem__(self, index: Any) -> torch.Tensor:
        arrays = {name: array[...] for name, array in self.arrays.items()}
        arrays["output_positions"] = arrays["output_positions"].view(torch.int32)
        if arrays["sign_mantissa"].numel() != math.prod(self.shape):
            raise ValueError(f"{self.name} has {arrays['sign_mantissa'].numel()} weights for {list(self.shape)}: download it again")
        tensor = CompressedTensor.make(Units(arrays, (arrays["encoded_exponent"].numel(),), self.shape), self.shape)
        return tensor if index is Ellipsis else tensor[index]

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def get_dtype(self) -> str:
        return "BF16"


def _assembled(state_dict: dict[str, Any], shapes: Shapes) -> dict[str, Any]:
    """What a file holds by name, with an `_Entry` in the place of the arrays of each compressed tensor."""
    keys = {name: _keys(name) for name in shapes}
    for name, parts in keys.items():
        if missing := [part for part in parts if part not in state_dict]:
            raise ValueError(f"{name} lacks its {', '.join(missing)}: download the checkpoint again")
    arrays = {key for parts in keys.values() for key in parts}
    entries = {
        name: _Entry(name, shapes[name], {stored: state_dict[key] for stored, key in zip(STORED, parts, strict=True)})
        for name, parts in keys.items()
    }
    return {key: value for key, value in state_dict.items() if key not in arrays} | entries


class Compress(ConversionOps):  # type: ignore[misc]
    """Compresses what it is given where it is: every bf16 matrix that the patterns choose, or all."""

    def __init__(self, include: tuple[str, ...] = (), exclude: tuple[str, ...] = ()) -> None:
        self.include, self.exclude = include, exclude

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        made = {}
        for name in list(input_dict):
            tensor = input_dict.pop(name)  # what was merged is large: it shall not outlive its compressed copy
            tensor = tensor[0] if isinstance(tensor, list) else tensor
            made[name] = compressed(tensor) if is_selected(name, self.include, self.exclude) else tensor
        return made


class _Watch(ConversionOps):  # type: ignore[misc]
    """Before a converter's operations: sees whether they are given compressed tensors, and decompresses many by one launch."""

    found = False

    def __deepcopy__(self, memo: dict[int, Any]) -> _Watch:
        """The loader copies a converter for each tensor."""
        made: _Watch = memo.setdefault(id(self), _Watch())
        return made

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        lists = {name: value if isinstance(value, list) else [value] for name, value in input_dict.items()}
        self.found = any(isinstance(tensor, CompressedTensor) for tensors in lists.values() for tensor in tensors)
        for name, tensors in lists.items():
            if len(tensors) > 1 and all(isinstance(tensor, CompressedTensor) for tensor in tensors):
                input_dict[name] = decompressed(tensors)
        return input_dict


class _CompressAgain(Compress):
    """After them: what they have made of compressed tensors is compressed too."""

    def __init__(self, watch: _Watch) -> None:
        super().__init__()
        self.watch = watch

    def __deepcopy__(self, memo: dict[int, Any]) -> _CompressAgain:
        return _CompressAgain(copy.deepcopy(self.watch, memo))

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        return super().convert(input_dict) if self.watch.found else input_dict


@contextlib.contextmanager
def _compressing(converters: list[WeightConverter]) -> Iterator[None]:
    """Compress what the converters make of compressed tensors. They have their own operations again after it."""
    operations = [converter.operations for converter in converters]
    try:
        for converter in converters:
            watch = _Watch()
            converter.operations = [watch, *converter.operations, _CompressAgain(watch)]
        yield
    finally:
        for converter, own in zip(converters, operations, strict=True):
            converter.operations = own


def _wrapped(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Puts a function, given the plain one first, in the place of one of modeling_utils."""
    plain = getattr(modeling_utils, name)

    def put(function: Callable[..., Any]) -> Callable[..., Any]:
        wrapper = functools.wraps(plain)(functools.partial(function, plain))
        setattr(modeling_utils, name, wrapper)
        return function

    return put


@_wrapped("convert_and_load_state_dict_in_model")
def _load(plain: Loader, model: nn.Module, state_dict: dict[str, Any], load_config: Any, *args: Any, **kwargs: Any) -> Any:
    quantizer = load_config.hf_quantizer
    shapes: Shapes | None = getattr(quantizer, "shapes", None)
    if shapes is None:
        return plain(model, state_dict, load_config, *args, **kwargs)
    if not quantizer.pre_quantized:
        return _checked(plain, model, state_dict, load_config, *args, **kwargs)
    # To the loader it is an ordinary checkpoint: dtypes, ties and mismatches are treated as the original's.
    ordinary = dataclasses.replace(load_config, hf_quantizer=None)
    with _compressing([one for one in load_config.weight_mapping or [] if isinstance(one, WeightConverter)]):
        return plain(model, _assembled(state_dict, shapes), ordinary, *args, **kwargs)


def _checked(plain: Loader, model: nn.Module, state_dict: dict[str, Any], load_config: Any, *args: Any, **kwargs: Any) -> Any:
    """With a quantizer, transformers 5.17 does not compare shapes."""
    before = dict(model.named_parameters(remove_duplicate=False))
    info, offloaded = plain(model, state_dict, load_config, *args, **kwargs)
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if name in before and parameter.shape != before[name].shape:
            path, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(path), leaf, before[name])
            info.mismatched_keys.add((name, parameter.shape, before[name].shape))
    return info, offloaded


@_wrapped("_get_resolved_checkpoint_files")
def _resolve(plain: Callable[..., Any], *args: Any, transformers_explicit_filename: str | None = None, **kwargs: Any) -> Any:
    explicit = None if transformers_explicit_filename == GUARD else transformers_explicit_filename
    return plain(*args, transformers_explicit_filename=explicit, **kwargs)


@_wrapped("remove_tied_weights_from_state_dict")
def _untie(plain: Callable[..., Any], state_dict: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """Of compressed tensors that are one, the one of the name that is no other's by the model's rule."""
    targets = getattr(model, "all_tied_weights_keys", None) or {}
    same: dict[Any, list[str]] = {}
    for name, tensor in state_dict.items():
        if isinstance(tensor, CompressedTensor):
            place = (tensor.data_ptr(), tensor.size(), tensor.stride())  # type: ignore[no-untyped-call]
            same.setdefault(place, []).append(name)
    kept = {min(names, key=lambda name: name in targets) for names in same.values()}
    rest = plain({name: t for name, t in state_dict.items() if not isinstance(t, CompressedTensor)}, model)
    return {name: tensor for name, tensor in state_dict.items() if name in kept or name in rest}


_saving: ContextVar[set[int] | None] = ContextVar("saving", default=None)  # addresses of what is not to be compressed


@contextlib.contextmanager
def saving(model: nn.Module) -> Iterator[None]:
    """Within, files are written with compressed tensors as they are stored, and what conversions made of such compressed."""
    state = (t for t in model.state_dict().values() if isinstance(t, torch.Tensor) and not isinstance(t, CompressedTensor))
    dense = {tensor.untyped_storage().data_ptr() for tensor in state}
    token = _saving.set(dense)
    try:
        yield
    finally:
        _saving.reset(token)


@_wrapped("safe_save_file")
def _write(plain: Callable[..., Any], tensors: dict[str, torch.Tensor], filename: Any, *args: Any, **kwargs: Any) -> None:
    own = _saving.get()
    if own is None:
        plain(tensors, filename, *args, **kwargs)
    else:
        checkpoint.save(tensors, Path(filename), lambda name: tensors[name].untyped_storage().data_ptr() not in own)
