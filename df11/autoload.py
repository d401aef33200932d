"""Registers df11 with transformers when transformers is imported, before or after df11, and does not import it itself."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType

REGISTRY = "transformers.quantizers"  # whoever reads how a config is quantised needs it
MODELS = "transformers.modeling_utils"  # any model needs it; it imports the registry and cannot be imported meanwhile


class _Loader(importlib.abc.Loader):
    """Runs the module as its own loader would, then df11.hf, which registers."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self.loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        if module.__name__ == MODELS or MODELS not in sys.modules:
            importlib.import_module("df11.hf")


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in (REGISTRY, MODELS):
            return None
        if name == MODELS:
            sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


def install() -> None:
    if MODELS in sys.modules:
        importlib.import_module("df11.hf")
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
