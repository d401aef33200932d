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
import itertools
import json
import math
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import modeling_utils
from transformers.core_model_loading import ConversionOps, WeightConverter, dot_natural_key

from df11 import checkpoint, memory
from df11.checkpoint import GUARD, CheckpointError
from df11.modules import compressed, decompressed
from df11.ops import ARRAYS
from df11.sources.files import read_header
from df11.sources.model import is_selected
from df11.tensors import CompressedTensor, Units

STORED = ARRAYS[:-1]  # of a unit; what follows the first has its name behind the tensor's
READERS = 4  # threads

Loader = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Place:
    """A compressed tensor in a file: its shape, and where each of its arrays, in the order of STORED, begins and ends."""

    file: Path
    name: str
    shape: tuple[int, ...]
    ranges: tuple[tuple[int, int], ...]

    @property
    def keys(self) -> list[str]:
        """What the arrays are called in the file."""
        return [self.name, *(f"{self.name}_{part}" for part in STORED[1:])]

    def tensor(self, arrays: Sequence[torch.Tensor]) -> CompressedTensor:
        """Of its arrays, as the file has them or as their bytes."""
        stream, sign_mantissa, luts, gaps, positions = arrays
        if sign_mantissa.numel() != math.prod(self.shape):
            raise ValueError(
                f"{self.name} in {self.file} has {sign_mantissa.numel()} weights for {list(self.shape)}: download it again"
            )
        parts = (stream, sign_mantissa, luts.view(-1, 256), gaps, positions.view(torch.int32))
        return CompressedTensor.make(Units(dict(zip(STORED, parts, strict=True)), (stream.numel(),), self.shape), self.shape)


def stored(files: Sequence[str]) -> dict[str, Place]:
    """The compressed tensors of safetensors files by name. Raises CheckpointError where a file does not say what they are."""
    found = {}
    for file in map(Path, files):
        text, header = read_header(file)
        about = (header.pop("__metadata__", None) or {}).get("df11")
        if about is None and any(name.endswith("_luts") for name in header):
            raise CheckpointError(f"{file} does not say what shapes its compressed tensors have: compress the original anew")
        begin = 8 + len(text)
        for name, record in (json.loads(about)["tensors"] if about else {}).items():
            if record["compressed"]:
                place = Place(file, name, tuple(record["shape"]), ())
                if missing := [key for key in place.keys if key not in header]:
                    raise CheckpointError(f"{file}: {name} lacks its {', '.join(missing)}: download it again")
                ranges = ((begin + start, begin + end) for start, end in (header[key]["data_offsets"] for key in place.keys))
                found[name] = dataclasses.replace(place, ranges=tuple(ranges))
    return found


class _Entry:
    """A compressed tensor of a file, in the place of a safetensors slice: it is read when it is indexed."""

    def __init__(self, place: Place, read: Callable[[], CompressedTensor]) -> None:
        self.place, self.read = place, read

    def __getitem__(self, index: Any) -> torch.Tensor:
        tensor = self.read()
        return tensor if index is Ellipsis else tensor[index]

    def get_shape(self) -> list[int]:
        return list(self.place.shape)

    def get_dtype(self) -> str:
        return "BF16"


def _assembled(state_dict: dict[str, Any], places: Mapping[str, Place]) -> dict[str, Any]:
    """What files hold by name, with an `_Entry` in the place of the arrays of each compressed tensor."""
    arrays = {place.name: [state_dict.pop(key) for key in place.keys] for place in places.values()}

    def read(place: Place) -> CompressedTensor:
        return place.tensor([array[...] for array in arrays[place.name]])

    return state_dict | {name: _Entry(place, functools.partial(read, place)) for name, place in places.items()}


@contextlib.contextmanager
def _read_ahead(state_dict: dict[str, Any], places: Mapping[str, Place], device: torch.device) -> Iterator[dict[str, Any]]:
    """As `_assembled`, of a model that comes to one GPU as a whole: tensors are read in batches, the next ones ahead of whoever
    asks for them. What the model does not have is not asked for, and but for a few batches not read."""
    arrays = {key for place in places.values() for key in place.keys}
    rest = {key: value for key, value in state_dict.items() if key not in arrays}
    batches = sorted(_batches(places.values()), key=lambda batch: dot_natural_key(batch[0].name))  # as the loader goes
    where = {place.name: i for i, batch in enumerate(batches) for place in batch}
    futures: list[Future[dict[str, CompressedTensor]] | None] = [None] * len(batches)
    lock = threading.Lock()

    def read(name: str) -> CompressedTensor:
        first = where[name]
        with lock:
            for i in range(first, min(first + READERS, len(batches))):
                futures[i] = futures[i] or pool.submit(_read_batch, batches[i], device)
        return futures[first].result().pop(name)  # type: ignore[union-attr]

    with ThreadPoolExecutor(READERS) as pool:
        try:
            yield rest | {name: _Entry(place, functools.partial(read, name)) for name, place in places.items()}
        finally:
            pool.shutdown(cancel_futures=True)


def _read_batch(batch: list[Place], device: torch.device) -> dict[str, CompressedTensor]:
    arrays = iter(memory.read_to_gpu(batch[0].file, [each for place in batch for each in place.ranges], device))
    return {place.name: place.tensor([next(arrays) for _ in STORED]) for place in batch}


def _batches(places: Iterable[Place]) -> Iterator[list[Place]]:
    """Tensors that follow one another in a file and are all merged with others or all kept: one that is kept keeps the memory of
    all."""

    def kind(place: Place) -> tuple[Path, str]:
        return place.file, re.sub(r"\d+", "#", ".".join(place.name.split(".")[:-2]))

    ordered = sorted(places, key=lambda place: (place.file, place.ranges[0]))
    for _, alike in itertools.groupby(ordered, kind):
        batch: list[Place] = []
        size = 0
        for place in alike:
            own = place.ranges[-1][1] - place.ranges[0][0]
            if batch and size + own > memory.STAGE:
                yield batch
                batch, size = [], 0
            batch.append(place)
            size += own
        yield batch


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
    places: Mapping[str, Place] | None = getattr(quantizer, "places", None)
    if places is None:
        return plain(model, state_dict, load_config, *args, **kwargs)
    if not quantizer.pre_quantized:
        return _checked(plain, model, state_dict, load_config, *args, **kwargs)
    # To the loader it is an ordinary checkpoint: dtypes, ties and mismatches are treated as the original's.
    ordinary = dataclasses.replace(load_config, hf_quantizer=None)
    devices = {torch.device(place) for place in (load_config.device_map or {}).values()}
    (device,) = devices if len(devices) == 1 else (torch.device("cpu"),)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_compressing([one for one in load_config.weight_mapping or [] if isinstance(one, WeightConverter)]))
        if device.type == "cuda" and load_config.device_mesh is None:
            entries = stack.enter_context(_read_ahead(state_dict, places, device))
        else:
            entries = _assembled(state_dict, places)
        return plain(model, entries, ordinary, *args, **kwargs)


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
