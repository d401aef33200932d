"""Weights of a model, tensor by tensor, from wherever they are: a directory, the hub, a package, or a seeded distribution."""

from __future__ import annotations

import re
from pathlib import Path

from df11.sources.cache import default_cache
from df11.sources.fetch import from_hub, from_package, random_model, require_models_extra
from df11.sources.files import SafetensorsSource
from df11.sources.model import (
    ModelSpec,
    SourceError,
    TensorInfo,
    Unit,
    WeightSource,
    is_matrix,
    is_selected,
    sampled_blocks,
    split_units,
)
from df11.sources.synthetic import SyntheticSource

__all__ = [
    "ModelSpec",
    "SafetensorsSource",
    "SourceError",
    "SyntheticSource",
    "TensorInfo",
    "Unit",
    "WeightSource",
    "is_matrix",
    "is_selected",
    "open_source",
    "require_models_extra",
    "sampled_blocks",
    "split_units",
]


def open_source(spec: ModelSpec, seed: int, cache: Path | None = None) -> WeightSource:
    """Where the weights of `spec` are, fetched or made if need be. `cache` holds what is made here (`cache.default_cache`)."""
    cache = cache or default_cache()
    if spec.source == "package":
        return from_package(spec, cache)
    if spec.source == "random":
        return random_model(spec, seed, cache)
    if spec.source == "synthetic":
        require_models_extra("transformers")
        from df11 import hf

        return SyntheticSource(spec, hf.tensor_shapes(spec.geometry), seed)
    if not spec.path:
        raise SourceError(f"model {spec.name!r} has no path: add model.path=DIRECTORY or model.path=organisation/name")
    local = Path(spec.path).expanduser()
    # An existing directory wins over a repository of the same name.
    is_hub_id = not local.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", spec.path)
    return from_hub(spec) if is_hub_id else SafetensorsSource(local)
