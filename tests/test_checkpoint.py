"""Compressed checkpoint directories and the command line."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from df11 import checkpoint, checkpoint_files, cli, released_checkpoint
from df11.checkpoint import CheckpointError
from df11.formats import FormatError
from df11.formats.dfloat11 import DFloat11
from df11.sources import SourceError


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * 0.02).bfloat16()

    return {
        "embed.weight": normal(100, 32),
        "layers.0.linear.weight": normal(64, 32),
        "layers.0.linear.bias": normal(64),
        "layers.0.experts": normal(3, 32, 32),
        "layers.0.nan.weight": torch.full((4, 4), float("nan")).bfloat16(),
        "layers.0.single.weight": normal(64, 32).float(),
        "layers.0.empty.weight": normal(0, 7),
        "counter": torch.tensor(3),
    }


@pytest.fixture
def original(tmp_path: Path) -> Path:
    """Two shards, an index, a config and another file."""
    directory = tmp_path / "original"
    directory.mkdir()
    everything = tensors()
    names = list(everything)
    shards = {"model-00001-of-00002.safetensors": names[:3], "model-00002-of-00002.safetensors": names[3:]}
    for file, held in shards.items():
        save_file({name: everything[name] for name in held}, directory / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, held in shards.items() for name in held}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text('{"model_type":   "toy"}')
    (directory / "tokenizer.json").write_text("{}")
    return directory


@pytest.fixture
def compressed(original: Path, tmp_path: Path) -> Path:
    checkpoint.compress(original, tmp_path / "compressed", threads=1)
    return tmp_path / "compressed"


def test_verify_and_restore(original: Path, compressed: Path, tmp_path: Path) -> None:
    assert checkpoint.verify(compressed) == checkpoint.verify(compressed, original) == len(tensors())
    checkpoint.restore(compressed, tmp_path / "restored")
    files = {path.name: path.read_bytes() for path in original.iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "restored").iterdir()} == files


def test_what_is_compressed_and_how_it_is_stored(compressed: Path) -> None:
    rows = {row["name"]: row for row in checkpoint.summary(compressed)}
    wanted = {"embed.weight", "layers.0.linear.weight", "layers.0.experts"}
    assert {name for name, row in rows.items() if row["compressed"]} == wanted
    stored = load_file(compressed / "model-00001-of-00002.safetensors")
    assert stored["embed.weight"].dtype == torch.uint8 and stored["embed.weight"].dim() == 1
    assert torch.equal(stored["layers.0.linear.bias"], tensors()["layers.0.linear.bias"])
    assert json.loads((compressed / "config.json").read_text())["quantization_config"]["quant_method"] == "df11"
    index = json.loads((compressed / "model.safetensors.index.json").read_text())["weight_map"]
    assert index["embed.weight_luts"] == "model-00001-of-00002.safetensors"
    information, coded = checkpoint.exponent_bits(compressed)
    assert 2 < information <= coded < 3.2


def test_patterns(original: Path, tmp_path: Path) -> None:
    checkpoint.compress(original, tmp_path / "a", include=("layers.*",), exclude=("*experts",))
    rows = {row["name"]: row for row in checkpoint.summary(tmp_path / "a")}
    assert [name for name, row in rows.items() if row["compressed"]] == ["layers.0.linear.weight"]
    assert {row["why"] for row in rows.values()} == {"", "excluded", "no code"}
    assert checkpoint.verify(tmp_path / "a", original) == len(tensors())


@pytest.mark.parametrize("options", [("--include", "layers.*.nothing"), ("--include", "linear"), ("--exclude", "embed")])
def test_a_pattern_that_matches_nothing_is_an_error(
    original: Path, tmp_path: Path, options: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["compress", str(original), str(tmp_path / "x"), *options]) == 1
    told = capsys.readouterr().err
    assert f"the pattern {options[1]!r} matches no name" in told and "there is for example" in told
    assert not list(tmp_path.glob("*x*"))


def test_little_compressed_is_a_warning_with_the_reason(original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compress", str(original), str(tmp_path / "most")]) == 0
    assert "warning" not in capsys.readouterr().err
    assert cli.main(["compress", str(original), str(tmp_path / "few"), "--exclude", "*e*"]) == 0
    assert re.search(r"warning: only 0 % .* 100 % left out by --include or --exclude", capsys.readouterr().err)
    for path in original.glob("*.safetensors"):
        save_file({name: t.float() for name, t in load_file(path).items()}, path, {"format": "pt"})
    assert cli.main(["compress", str(original), str(tmp_path / "none")]) == 0
    assert "warning: nothing is compressed: the checkpoint holds no bf16 matrix; most of it is F32" in capsys.readouterr().err


def test_what_does_not_get_smaller_stays(tmp_path: Path) -> None:
    (tmp_path / "original").mkdir()
    bits = torch.randint(-(1 << 15), 1 << 15, (256, 256), dtype=torch.int16) & ~0x7F80  # sign and mantissa
    noise = bits | torch.randint(0, 240, (256, 256), dtype=torch.int16) << 7
    weights = {"noise": noise.view(torch.bfloat16), "tiny": torch.randn(4, 4).bfloat16(), "fits": torch.randn(64, 64).bfloat16()}
    save_file(weights, tmp_path / "original" / "model.safetensors")
    checkpoint.compress(tmp_path / "original", tmp_path / "compressed")
    whys = {row["name"]: row["why"] for row in checkpoint.summary(tmp_path / "compressed")}
    assert whys == {"noise": "no gain", "tiny": "no gain", "fits": ""}
    assert checkpoint.verify(tmp_path / "compressed", tmp_path / "original") == 3


def test_every_flipped_byte_is_reported(compressed: Path) -> None:
    """A bit at every 13th byte of every file, the manifest included; within a tensor's data the error names it."""
    for path in sorted(compressed.iterdir()):
        data = path.read_bytes()
        begin, places = len(data), {}
        if path.suffix == ".safetensors":
            begin = 8 + int.from_bytes(data[:8], "little")
            places = {k: v["data_offsets"] for k, v in json.loads(data[8:begin]).items() if k != "__metadata__"}
        header = range(0, min(begin, len(data)), 997 if path.suffix == ".safetensors" else 13)
        for at in [*header, *range(begin, len(data), 13)]:
            altered = bytearray(data)
            altered[at] ^= 1 << (at % 8)
            path.write_bytes(altered)
            with pytest.raises((CheckpointError, FormatError)) as error:
                checkpoint.verify(compressed)
            owner = [name for name, (start, end) in places.items() if start <= at - begin < end]
            assert not owner or owner[0] in str(error.value), (path.name, at)
        path.write_bytes(data)
    assert checkpoint.verify(compressed) == len(tensors())


def test_truncated_and_missing_files_are_named(compressed: Path) -> None:
    file = compressed / "model-00002-of-00002.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-1])
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors is .* bytes long"):
        checkpoint.verify(compressed)
    file.unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        checkpoint.verify(compressed)


def test_another_original_is_told(original: Path, compressed: Path) -> None:
    file = original / "model-00001-of-00002.safetensors"
    changed = load_file(file)
    changed["embed.weight"].view(torch.int16)[5, 5] ^= 1
    save_file(changed, file)
    with pytest.raises(FormatError, match=r"embed\.weight"):
        checkpoint.verify(compressed, original)


def test_another_original_is_told_by_its_tensors(compressed: Path, tmp_path: Path) -> None:
    held = tensors()
    embed = held["embed.weight"]

    def verified(other: dict[str, torch.Tensor]) -> int:
        save_file(other, tmp_path / "other.safetensors")
        return checkpoint.verify(compressed, tmp_path / "other.safetensors")

    assert verified(held) == len(held)  # in whichever file they are
    for other, told in (
        (held | {"extra": torch.ones(3)}, r"extra in .*other\.safetensors is not in the compressed checkpoint"),
        (held | {"embed.weight": embed.reshape(32, 100)}, r"embed\.weight in .* was BF16 \[100, 32\], .* BF16 \[32, 100\]"),
        (held | {"embed.weight": embed.view(torch.int16)}, r"embed\.weight in .* was BF16 .* holds I16 \[100, 32\]"),
        ({name: held[name] for name in held if name != "counter"}, r"counter in .*model-00002-of-00002.* is not in .*other"),
    ):
        with pytest.raises(CheckpointError, match=told):
            verified(other)


def test_tensors_that_the_index_does_not_name_are_verified_too(original: Path, tmp_path: Path) -> None:
    file = original / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    del index["weight_map"]["counter"]
    file.write_text(json.dumps(index))
    checkpoint.compress(original, tmp_path / "compressed")
    assert checkpoint.verify(tmp_path / "compressed", original) == len(tensors())


def test_every_dtype_and_shape_comes_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Through the command line: matrices of one symbol, of one row, column or weight, and dtypes that are stored as they are."""
    zero, row = torch.zeros(64, 48).bfloat16(), tensors()["layers.0.linear.weight"].view(-1)
    matrices = {
        "zero": zero,
        "minus zero": -zero,
        "row": row[None],
        "column": row[:, None],
        "four": zero.view(2, 4, 8, 48),
    }
    others = {"one": row[:1, None], "inf": zero - torch.inf, "2^113": zero + 2.0**113, "none": zero[:0], "scalar": row[0]}
    others |= {str(dtype)[6:]: torch.arange(6).view(2, 3).to(dtype) for dtype in (torch.float16, torch.float64, torch.complex64)}
    others |= {str(dtype)[6:]: torch.ones(2, 3).to(dtype) for dtype in (torch.bool, torch.uint16, torch.int8, torch.float8_e4m3fn)}
    (tmp_path / "original").mkdir()
    stored = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in (matrices | others).items()}
    save_file(stored, tmp_path / "original" / "a.safetensors")
    names = [str(tmp_path / name) for name in ("original", "compressed", "restored")]
    assert cli.main(["compress", *names[:2]]) == cli.main(["restore", *names[1:]]) == 0
    assert checkpoint.verify(tmp_path / "compressed", tmp_path / "original") == len(stored)
    assert {row["name"] for row in checkpoint.summary(tmp_path / "compressed") if row["compressed"]} == set(matrices)
    assert (tmp_path / "restored" / "a.safetensors").read_bytes() == (tmp_path / "original" / "a.safetensors").read_bytes()
    assert cli.main(["compress", names[2], str(tmp_path / "as it was"), "--exclude", "*"]) == 0
    assert cli.main(["info", str(tmp_path / "as it was"), "--entropy", "--all"]) == 0
    assert "0.000 bits of entropy" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["embed.weight", "counter"])
def test_what_decodes_to_other_bits_is_told(compressed: Path, name: str) -> None:
    """All stored bytes as they were written, and yet not the original's: the last thing that can be wrong."""
    (file,) = (file for file in checkpoint_files.open_files(compressed) if name in file.about["tensors"])
    file.about["tensors"][name]["xxh3"] = file.about["tensors"][name]["xxh3"][::-1]
    with pytest.raises(FormatError, match=f"{name} in {file.path} does not decode to the original bits: restore it"):
        list(file.original(name, DFloat11()))


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_damaged_config_is_named(
    original: Path, compressed: Path, tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    target = str(tmp_path / "x")
    for directory, command in (
        (original, ["compress", str(original), target]),
        (original, ["compress", str(original), target, "--released"]),
        (compressed, ["restore", str(compressed), target]),
    ):
        (directory / "config.json").write_text(text)
        assert cli.main(command) == 1
        assert f"{directory / 'config.json'} is damaged" in capsys.readouterr().err
    assert not list(tmp_path.glob("*x*"))  # nothing was begun


def test_errors_of_use(original: Path, compressed: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="exists already"):
        checkpoint.compress(original, compressed)
    with pytest.raises(CheckpointError, match="compressed already"):
        checkpoint.compress(compressed, tmp_path / "twice")
    with pytest.raises(CheckpointError, match="not a compressed checkpoint"):
        checkpoint.verify(original)
    with pytest.raises(CheckpointError, match="exists already"):
        checkpoint.restore(compressed, original)
    with pytest.raises(SourceError, match="not a directory"):
        checkpoint.compress(tmp_path / "nothing", tmp_path / "x")
    with pytest.raises(SourceError, match="nowhere does not exist"):
        checkpoint.verify(compressed, tmp_path / "nowhere")
    manifest = json.loads((compressed / checkpoint.MANIFEST).read_text())
    (compressed / checkpoint.MANIFEST).write_text(json.dumps(manifest | {"version": 2, "more": "of a later version"}))
    for refused in (checkpoint.verify, checkpoint.summary, lambda directory: checkpoint.restore(directory, tmp_path / "x")):
        with pytest.raises(CheckpointError, match=r"df11\.json has version 2, this df11 reads 1: update df11"):
            refused(compressed)


KILLED = """
import os, signal, sys
from pathlib import Path
from df11 import checkpoint
count = 0
def progress(name, size):
    global count
    count += 1
    if count == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
checkpoint.compress(Path(sys.argv[1]), Path(sys.argv[2]), threads=1, progress=progress)
"""


@pytest.mark.parametrize("after", [2, 5])
def test_a_killed_run_is_resumed_to_the_same_bytes(original: Path, compressed: Path, tmp_path: Path, after: int) -> None:
    target = tmp_path / "killed"
    done = subprocess.run([sys.executable, "-c", KILLED, str(original), str(target), str(after)])
    assert done.returncode == -signal.SIGKILL and not target.exists()
    finished = tmp_path / ".killed.partial" / "model-00001-of-00002.safetensors"
    assert finished.exists() == (after == 5)
    stamp = finished.stat().st_mtime_ns if finished.exists() else 0
    with pytest.raises(CheckpointError, match="other options"):
        checkpoint.compress(original, target, exclude=("embed*",))
    checkpoint.compress(original, target, threads=2)
    assert not stamp or (target / finished.name).stat().st_mtime_ns == stamp
    same = {path.name: path.read_bytes() for path in compressed.iterdir()}
    assert {path.name: path.read_bytes() for path in target.iterdir()} == same


def test_a_run_that_found_no_room_goes_on(original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As on a full disk: no file may get so large as the third would be. It does not go on with another source."""
    (original / "config.json").unlink()
    target, limits = tmp_path / "x", resource.getrlimit(resource.RLIMIT_FSIZE)
    save_file({"large": (torch.randn(300, 300) * 0.02).bfloat16()}, original / "model-00003-of-00003.safetensors")
    index = json.loads((original / "model.safetensors.index.json").read_text())
    index["weight_map"]["large"] = "model-00003-of-00003.safetensors"
    (original / "model.safetensors.index.json").write_text(json.dumps(index))
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, limits[1]))
    try:
        assert cli.main(["compress", str(original), str(target)]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "df11 compress: " in (told := capsys.readouterr().err) and "Traceback" not in told
    finished = {path.name: path.stat().st_mtime_ns for path in (tmp_path / ".x.partial").glob("*.safetensors")}
    assert len(finished) == 2 and not target.exists()
    os.utime(original / "model-00001-of-00002.safetensors", ns=(0, 0))
    assert cli.main(["compress", str(original), str(target)]) == 1
    assert "another source: remove it and run again" in capsys.readouterr().err
    begun = json.loads((tmp_path / ".x.partial" / checkpoint.BEGUN).read_text())
    stamp = begun["source"]["model-00001-of-00002.safetensors"][1]
    os.utime(original / "model-00001-of-00002.safetensors", ns=(stamp, stamp))
    assert cli.main(["compress", str(original), str(target)]) == 0
    assert {name: (target / name).stat().st_mtime_ns for name in finished} == finished
    assert checkpoint.verify(target, original) == len(tensors()) + 1


@pytest.mark.parametrize("released", [True, False])
@pytest.mark.parametrize("config", [{"dfloat11_config": {}}, {"quantization_config": {"quant_method": "fp8"}}])
def test_what_is_not_the_models_own_bf16_is_refused(
    original: Path, tmp_path: Path, config: dict[str, Any], released: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    (original / "config.json").write_text(json.dumps(config))
    assert cli.main(["compress", str(original), str(tmp_path / "x"), *["--released"] * released]) == 1
    assert re.search("`df11 restore` it first|before quantisation", capsys.readouterr().err) and not (tmp_path / "x").exists()
    (original / "config.json").write_text('{"quantization_config": null}')
    checkpoint.compress(original, tmp_path / "x")


def test_names_that_collide_are_refused(original: Path, tmp_path: Path) -> None:
    directory = tmp_path / "collides"
    directory.mkdir()
    save_file({"a": torch.randn(64, 64).bfloat16(), "a_gaps": torch.ones(3)}, directory / "model.safetensors")
    with pytest.raises(CheckpointError, match="a tensor a_gaps, a name that a needs: --exclude 'a'"):
        checkpoint.compress(directory, tmp_path / "x")
    checkpoint.compress(directory, tmp_path / "y", exclude=("a",))
    assert checkpoint.verify(tmp_path / "y", directory) == 2
    for name, at in (("a", "x"), ("b", "y")):
        (original / at).mkdir()
        save_file({name: torch.ones(2)}, original / at / "m.safetensors")
    index = {"weight_map": {"a": "x/m.safetensors", "b": "y/m.safetensors"}}
    (original / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(SourceError, match="files of the same name in several folders"):
        checkpoint.compress(original, tmp_path / "z")


def test_texts_come_back_to_the_byte_and_long_names_have_room(tmp_path: Path) -> None:
    (tmp_path / "original").mkdir()
    tensors = {"é" * 300: torch.randn(64, 64).bfloat16()}
    save_file(tensors, tmp_path / "original" / "model.safetensors", {"x": '"' * 20_000})
    (tmp_path / "original" / "config.json").write_bytes(b'{\r\n "model_type": "x"\r\n}')
    checkpoint.compress(tmp_path / "original", tmp_path / "compressed")
    checkpoint.restore(tmp_path / "compressed", tmp_path / "restored")
    for path in (tmp_path / "original").iterdir():
        assert (tmp_path / "restored" / path.name).read_bytes() == path.read_bytes()


def test_a_run_that_was_killed_at_its_very_end_is_resumed(
    original: Path, compressed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = checkpoint.write

    def killed(path: Path, data: bytes) -> None:
        write(path, data)
        if path.name == checkpoint.MANIFEST:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.compress(original, tmp_path / "x", threads=1)
    monkeypatch.undo()
    checkpoint.compress(original, tmp_path / "x", threads=1)
    assert checkpoint.verify(tmp_path / "x", original) == len(tensors())
    assert {p.name: p.read_bytes() for p in (tmp_path / "x").iterdir()} == {p.name: p.read_bytes() for p in compressed.iterdir()}


def test_what_an_interrupted_restore_left_is_not_mixed_in(original: Path, compressed: Path, tmp_path: Path) -> None:
    def interrupt(name: str, size: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpoint.restore(compressed, tmp_path / "restored", interrupt)
    (partial,) = tmp_path.glob(".restored*")
    (partial / "of-another-checkpoint.json").write_text("{}")
    assert not (tmp_path / "restored").exists()
    checkpoint.restore(compressed, tmp_path / "restored")
    assert sorted(path.name for path in (tmp_path / "restored").iterdir()) == sorted(path.name for path in original.iterdir())
    assert not partial.exists()


def test_the_command_line(original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (original / "config.json").unlink()
    target, back = str(tmp_path / "c"), str(tmp_path / "back")
    assert cli.main(["compress", str(original), target, "--threads", "1"]) == 0
    assert cli.main(["info", target, "--all", "--entropy"]) == 0
    assert cli.main(["verify", target, "--original", str(original)]) == 0
    assert cli.main(["restore", target, back]) == 0
    printed = capsys.readouterr().out
    assert "8 tensors are bit for bit" in printed and "embed.weight" in printed and "bits of entropy" in printed
    assert cli.main(["verify", str(original)]) == 1
    assert "not a compressed checkpoint" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    assert capsys.readouterr().out.count("\n  df11 ") == 3


@pytest.mark.parametrize("threads", ["-1", "0", "many"])
def test_threads_are_a_positive_number(threads: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["compress", "a", "b", "--threads", threads])
    assert f"'{threads}' is not a positive number" in capsys.readouterr().err


def test_an_interrupted_command_says_how_it_goes_on(
    original: Path, compressed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    for module, name in ((checkpoint, "compress"), (checkpoint, "verify"), (released_checkpoint, "write")):
        monkeypatch.setattr(module, name, interrupt)
    target = str(tmp_path / "x")
    for command, told in (
        (["compress", str(original), target], "df11 compress: interrupted; run again, it goes on where it was"),
        (["compress", str(original), target, "--released"], "df11 compress: interrupted; run again, it begins anew"),
        (["verify", str(compressed)], "df11 verify: interrupted; run again, it begins anew"),
    ):
        assert cli.main(command) == 130
        assert told in capsys.readouterr().err


def test_peak_memory_is_a_few_tensors(tmp_path: Path) -> None:
    """Ten matrices of 8 MB, of which not all may be in memory at once."""
    (tmp_path / "big").mkdir()
    weights = {f"layers.{i}.weight": (torch.randn(2000, 2000) * 0.02).bfloat16() for i in range(10)}
    save_file(weights, tmp_path / "big" / "model.safetensors")
    code = (
        "import sys, resource; from pathlib import Path; from df11 import checkpoint; a = sys.argv\n"
        "checkpoint.compress(Path(a[1]) / a[2], Path(a[1]) / (a[2] + '-c'), threads=1)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )

    def peak(name: str) -> int:
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path), name], capture_output=True, text=True, check=True)
        return int(done.stdout)

    (tmp_path / "small").mkdir()
    save_file({"layers.0.weight": weights["layers.0.weight"]}, tmp_path / "small" / "model.safetensors")
    assert peak("big") - peak("small") < 4 * 8_000  # kB


@pytest.mark.parametrize("name", ["../evil.txt", "/evil.txt", "a/b"])
def test_names_that_lead_out_of_the_directory_are_refused(compressed: Path, tmp_path: Path, name: str) -> None:
    path = compressed / checkpoint.MANIFEST
    manifest = json.loads(path.read_text())
    manifest["originals"][name] = "x"
    manifest["checksum"] = checkpoint_files.checksum_of(manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="do not trust"):
        checkpoint.restore(compressed, tmp_path / "restored")
