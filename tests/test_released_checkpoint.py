"""Checkpoints of the released package: read as its encoder makes them, written as it reads them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from df11 import cli, hf, modules, released, released_checkpoint
from df11.checkpoint import CheckpointError
from df11.formats import FormatError
from df11.sources import SafetensorsSource

LAYERS = [f"self_attn.{n}_proj" for n in "qkvo"] + [f"mlp.{n}_proj" for n in ("gate", "up", "down")]
PATTERNS = {r"model\.embed_tokens": [], r"model\.layers\.\d+": LAYERS, "lm_head": []}


IDS = torch.arange(3, 33).view(2, 15)


def build(directory: Path, **options: object) -> Path:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 90, "head_dim": 8}
    config = AutoConfig.for_model("llama", **sizes, num_attention_heads=4, num_key_value_heads=2, **options)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("model") / "original")


def shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    return {info.name: info.shape for info in SafetensorsSource(directory).tensors()}


def released_directory(original: Path, target: Path, single_file: bool) -> Path:
    """What the package's `compress_model` leaves, with the streams of its own encoder."""
    target.mkdir()
    state = load_file(original / "model.safetensors")
    files: dict[str, dict[str, torch.Tensor]] = {}
    modules = ["model.embed_tokens", "model.layers.0", "model.layers.1", "lm_head"]
    for module in modules if "lm_head.weight" in state else modules[:-1]:
        names = [f"{module}.{path}.weight" for path in LAYERS] if "layers" in module else [f"{module}.weight"]
        unit, _ = released.encode([state.pop(name) for name in names])
        arrays = {f"{module}.{key}": torch.from_numpy(array) for key, array in unit.arrays.items()}
        arrays[f"{module}.output_positions"] = arrays[f"{module}.output_positions"].view(torch.uint8)
        arrays |= {key: state.pop(key) for key in list(state) if key.startswith(f"{module}.")}  # a block's norms
        files["model" if single_file else module.replace(".", "_")] = files.get("model", {}) | arrays
    files["model"] = files.get("model", {}) | state
    for name, tensors in files.items():
        save_file(tensors, target / f"{name}.safetensors")
    config = json.loads((original / "config.json").read_text())
    config["dfloat11_config"] = {"version": "0.5.0", "threads_per_block": [512], "bytes_per_thread": 8, "pattern_dict": PATTERNS}
    (target / "config.json").write_text(json.dumps(config))
    return target


def everything(directory: Path) -> dict[str, torch.Tensor]:
    source = SafetensorsSource(directory)
    return {info.name: source.read(info.name) for info in source.tensors()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k].view(torch.int16), b[k].view(torch.int16)) for k in a)


@pytest.mark.skipif(not released.is_installed(), reason="needs the released package")
@pytest.mark.parametrize("single_file", [False, True])
def test_released_checkpoints_come_back(original: Path, tmp_path: Path, single_file: bool) -> None:
    theirs = released_directory(original, tmp_path / "theirs", single_file)
    assert released_checkpoint.is_released(theirs) and not released_checkpoint.is_released(original)
    released_checkpoint.restore(theirs, tmp_path / "back", shapes(original))
    assert same(everything(tmp_path / "back"), everything(original))
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == json.loads((original / "config.json").read_text())


@pytest.mark.skipif(not released.is_installed(), reason="needs the released package")
def test_ours_have_the_files_keys_and_dtypes_of_theirs(original: Path, tmp_path: Path) -> None:
    theirs = released_directory(original, tmp_path / "theirs", single_file=False)
    released_checkpoint.write(original, tmp_path / "ours")
    for file in theirs.glob("*.safetensors"):
        a, b = load_file(file), load_file(tmp_path / "ours" / file.name)
        assert {key: tensor.dtype for key, tensor in a.items()} == {key: tensor.dtype for key, tensor in b.items()}
    config = json.loads((tmp_path / "ours" / "config.json").read_text())["dfloat11_config"]
    assert config["threads_per_block"] == [512] and config["bytes_per_thread"] == 8
    released_checkpoint.restore(tmp_path / "ours", tmp_path / "back", shapes(original))
    assert same(everything(tmp_path / "back"), everything(original))


@pytest.mark.parametrize("config", [{}, {"pattern_dict": {"(": []}}, []])
def test_patterns_that_are_none_are_told(tmp_path: Path, config: object) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"dfloat11_config": config}))
    with pytest.raises(CheckpointError, match=r"config\.json has no sound pattern_dict"):
        released_checkpoint.patterns(tmp_path)


def test_what_does_not_fit_is_named(original: Path, tmp_path: Path) -> None:
    released_checkpoint.write(original, tmp_path / "ours")
    wrong = shapes(original) | {"lm_head.weight": (90, 31)}
    with pytest.raises(FormatError, match=r"lm_head in .*lm_head\.safetensors"):
        released_checkpoint.restore(tmp_path / "ours", tmp_path / "back", wrong)
    with pytest.raises(CheckpointError, match="which the model does not have"):
        released_checkpoint.restore(tmp_path / "ours", tmp_path / "back", {})
    file = tmp_path / "ours" / "lm_head.safetensors"
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match="damaged or cut short"):
        released_checkpoint.restore(tmp_path / "ours", tmp_path / "back", shapes(original))
    with pytest.raises(CheckpointError, match="exists already"):
        released_checkpoint.write(original, tmp_path / "ours")
    with pytest.raises(CheckpointError, match="exists already"):
        released_checkpoint.restore(tmp_path / "ours", original, shapes(original))
    for file in (tmp_path / "ours").glob("*.safetensors"):
        file.unlink()
    with pytest.raises(CheckpointError, match="holds no safetensors files: download it again"):
        released_checkpoint.restore(tmp_path / "ours", tmp_path / "back", shapes(original))


def test_units_that_are_not_those_of_config_and_model_are_named(original: Path, tmp_path: Path) -> None:
    released_checkpoint.write(original, tmp_path / "ours")
    q, k = (f"model.layers.0.self_attn.{name}_proj.weight" for name in "qk")  # as many weights, cut at another place
    with pytest.raises(FormatError, match=r"model\.layers\.0 in .*: split_positions .* do not cut shapes"):
        released_checkpoint.restore(tmp_path / "ours", tmp_path / "back", shapes(original) | {q: (16, 32), k: (32, 32)})
    file = tmp_path / "ours" / "lm_head.safetensors"
    whole = load_file(file)
    save_file({name: tensor for name, tensor in whole.items() if name != "lm_head.gaps"}, file)
    with pytest.raises(FormatError, match=r"lm_head in .*lm_head\.safetensors: .*gaps.*; download it again"):
        released_checkpoint.restore(tmp_path / "ours", tmp_path / "back", shapes(original))
    save_file(whole, file)
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    del config["dfloat11_config"]["pattern_dict"]["lm_head"]
    (tmp_path / "ours" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"no pattern of config\.json matches lm_head, which .*lm_head\.safetensors holds"):
        released_checkpoint.restore(tmp_path / "ours", tmp_path / "back", shapes(original))
    assert not (tmp_path / "back").exists()


def test_blocks_that_are_not_alike_have_patterns_of_their_own(tmp_path: Path) -> None:
    """Also: what an interrupted run left is not mixed in, and there is no file for tensors outside of all units."""
    (tmp_path / "original").mkdir()
    names = [f"layers.{i}.{name}.weight" for i, inside in enumerate(("q", "qk", "q", "qkv")) for name in inside]
    tensors = {name: (torch.randn(8, 8 + at) * 0.02).bfloat16() for at, name in enumerate(names)}
    save_file(tensors, tmp_path / "original" / "model.safetensors")
    for target in ("ours", "back"):
        (tmp_path / f".{target}.partial").mkdir()
        save_file({"old": torch.ones(3)}, tmp_path / f".{target}.partial" / "old.safetensors")
    released_checkpoint.write(tmp_path / "original", tmp_path / "ours")
    patterns = released_checkpoint.patterns(tmp_path / "ours")
    assert sorted(map(len, patterns.values())) == [1, 2, 3]  # the first and third share one
    released_checkpoint.restore(tmp_path / "ours", tmp_path / "back", shapes(tmp_path / "original"))
    assert same(everything(tmp_path / "back"), tensors)
    assert not list(tmp_path.glob(".*")) and not list(tmp_path.glob("*/old*"))


def test_what_the_layout_has_no_place_for_stays(tmp_path: Path) -> None:
    """Matrices of three dimensions, and those that are no module's `weight`."""
    (tmp_path / "original").mkdir()
    compressed = {"layers.0.q.weight": (8, 8), "layers.1.q.weight": (8, 8), "lm_head.weight": (9, 8)}
    others = {"layers.0.experts.weight": (2, 8, 8), "layers.1.gate": (8, 8), "table": (4, 4), "layers.2.only": (4, 4)}
    tensors = {name: (torch.randn(shape) * 0.02).bfloat16() for name, shape in (compressed | others).items()}
    save_file(tensors, tmp_path / "original" / "model.safetensors")
    released_checkpoint.write(tmp_path / "original", tmp_path / "ours")
    found = released_checkpoint.units(tmp_path / "ours", shapes(tmp_path / "original"))
    assert sorted(name for unit in found for name in unit.names) == sorted(compressed)
    released_checkpoint.restore(tmp_path / "ours", tmp_path / "back", shapes(tmp_path / "original"))
    assert same(everything(tmp_path / "back"), tensors)


def logits(directory: Path, **options: object) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16, **options)
    with torch.inference_mode():
        return model(IDS).logits.view(torch.int16)  # type: ignore[no-any-return]


@pytest.mark.skipif(not released.is_installed(), reason="needs the released package")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("single_file", [False, True])
def test_they_load_as_compressed_models(original: Path, tmp_path: Path, single_file: bool, tied: bool) -> None:
    if tied:
        original = build(tmp_path / "original", tie_word_embeddings=True)
    theirs = released_directory(original, tmp_path / "theirs", single_file)
    expected = logits(original)
    options = {"quantization_config": hf.DF11Config(granularity="block"), "output_loading_info": True}
    model, info = AutoModelForCausalLM.from_pretrained(theirs, **options)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    held = [m for m in model.modules() if modules.compressed_parameters(m)]
    assert len(held) == 2 + 2 * len(LAYERS) and {p.device.type for p in model.parameters()} == {"cpu"}
    with torch.inference_mode():
        assert torch.equal(model(IDS).logits.view(torch.int16), expected)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(tmp_path / "again"), expected) and not released_checkpoint.is_released(tmp_path / "again")
    with torch.inference_mode():
        assert torch.equal(hf.load(theirs, "cpu")(IDS).logits.view(torch.int16), expected)


def test_offloading_is_refused(original: Path, tmp_path: Path) -> None:
    released_checkpoint.write(original, tmp_path / "ours")
    with pytest.raises(ValueError, match="df11 restore, then df11 compress"):
        logits(tmp_path / "ours", quantization_config=hf.DF11Config(), device_map={"model": "cpu", "lm_head": "disk"})


def test_a_repository_fetched_in_part_is_told(original: Path, tmp_path: Path) -> None:
    released_checkpoint.write(original, tmp_path / "ours")
    (tmp_path / "ours" / "model_layers_1.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks the compressed model\.layers\.1.*snapshot_download"):
        logits(tmp_path / "ours", quantization_config=hf.DF11Config())


def test_the_command_line(original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compress", str(original), str(tmp_path / "theirs"), "--released"]) == 0
    assert cli.main(["restore", str(tmp_path / "theirs"), str(tmp_path / "back")]) == 0
    assert same(everything(tmp_path / "back"), everything(original))
    assert cli.main(["compress", str(original), str(tmp_path / "x"), "--released", "--exclude", "*"]) == 1
    assert "whole blocks" in capsys.readouterr().err
    weights = everything(original)
    weights["lm_head.weight"][3, 5] = float("nan")
    (tmp_path / "nan").mkdir()
    shutil.copy(original / "config.json", tmp_path / "nan")
    save_file(weights, tmp_path / "nan" / "model.safetensors")
    assert cli.main(["compress", str(tmp_path / "nan"), str(tmp_path / "x"), "--released"]) == 1
    assert "1 weights have an exponent of 240 or more" in capsys.readouterr().err and not (tmp_path / "x").exists()
