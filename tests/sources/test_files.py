"""Weights in safetensors files."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from df11 import hf
from df11.sources import ModelSpec, SafetensorsSource, SourceError, open_source, split_units
from df11.sources.files import INDEX, described, read_header
from tests.helpers import same_bits
from tests.sources.common import LLAMA, info, mixed, save_shards


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
    for text in ("{}", "[", '{"weight_map": ["a"]}', '{"weight_map": {"a": 1}}'):
        (tmp_path / INDEX).write_text(text)
        with pytest.raises(SourceError, match=r"index\.json is not an index of shards .*: download it again"):
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
