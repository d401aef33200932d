"""Every class of transformers' causal, image-text, sequence-to-sequence and masked language models, made tiny, through all of df11.

`python -m tests.test_zoo` tries them all and writes docs/architectures.md; names after it try only those.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest
import torch
import transformers

from df11 import checkpoint, fused, hf, modules, runtime
from df11.tensors import dense
from df11.tiled_ops import TiledWeight
from tests import zoo

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "docs" / "architectures.md"
LARGE = 4096  # weights of a matrix from which on compression gains, whatever its bits
SECONDS = 180  # for one class
FAST = """
    BartForConditionalGeneration BertForMaskedLM BloomForCausalLM DbrxForCausalLM DeepseekV3ForCausalLM FalconForCausalLM
    Gemma2ForCausalLM Gemma3ForConditionalGeneration GPT2LMHeadModel GptOssForCausalLM InternVLForConditionalGeneration
    JambaForCausalLM Llama4ForCausalLM LlamaForCausalLM LlavaForConditionalGeneration MambaForCausalLM
    Mistral3ForConditionalGeneration MixtralForCausalLM OlmoForCausalLM PaliGemmaForConditionalGeneration Phi3ForCausalLM
    Qwen2_5_VLForConditionalGeneration Qwen3MoeForCausalLM Qwen3VLForConditionalGeneration T5ForConditionalGeneration
""".split()  # noqa: SIM905


@dataclass
class Result:
    """What came of one class. reason: "" where all went well; `transformers: ...` where the original itself does not go the way."""

    name: str
    reason: str = ""
    matrices: int = 0  # bytes of large ones
    compressed: int = 0
    tensors: int = 0
    unreached: int = 0  # large matrices on which no output of the inputs depends
    generates: bool = False

    @property
    def share(self) -> float:
        return self.compressed / self.matrices if self.matrices else 0.0


def attempt(name: str) -> Result:
    """One class through compress, verify, loading in both modes, outputs, generation, saving and restoring."""
    torch.set_num_threads(1)
    result = Result(name)
    stage = "transformers: build"
    try:
        with tempfile.TemporaryDirectory() as made:
            for stage in _stages(result, getattr(transformers, name), Path(made)):  # noqa: B007  the last one is told
                pass
    except (Exception, AssertionError) as error:
        told = (str(error).strip() or type(error).__name__).splitlines()[0]
        result.reason = f"{stage}: {type(error).__name__}: {told[:160]}"
    return result


def _stages(result: Result, cls: type, folder: Path):  # type: ignore[no-untyped-def]
    """Yields the name of what is done next."""
    yield "transformers: build"
    model = zoo.build(cls)
    inputs = zoo.inputs(model)
    yield "transformers: save and load"
    model.save_pretrained(folder / "original")
    model = cls.from_pretrained(folder / "original")
    bits = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}  # some forwards cast their own
    expected = zoo.outputs(model, inputs)
    assert all(same_bits(a, b) for a, b in zip(expected, zoo.outputs(model, inputs), strict=True)), "not the same twice"
    yield "transformers: generate"
    ids = zoo.generated(model, inputs)
    result.generates = ids is not None
    yield "transformers: gradients"
    missed = set(zoo.unreached(model, inputs))
    result.unreached = sum(1 for n in missed if bits[n].numel() >= LARGE)
    yield "compress"
    checkpoint.compress(folder / "original", folder / "compressed")
    rows = checkpoint.summary(folder / "compressed")
    large = [row for row in rows if row["dtype"] == "BF16" and len(row["shape"]) > 1 and row["original"] >= 2 * LARGE]
    result.matrices = sum(row["original"] for row in large)
    result.compressed = sum(row["original"] for row in large if row["compressed"])
    yield "verify"
    result.tensors = checkpoint.verify(folder / "compressed", folder / "original")
    yield "load"
    loaded = cls.from_pretrained(folder / "compressed")
    _check(loaded, bits)
    assert modules.is_compressed(loaded), "nothing is compressed"
    yield "outputs"
    for _ in range(2):
        assert all(same_bits(a, b) for a, b in zip(expected, zoo.outputs(loaded, inputs), strict=True)), "bits differ"
    yield "by block"
    runtime.attach(loaded, "block")
    assert all(same_bits(a, b) for a, b in zip(expected, zoo.outputs(loaded, inputs), strict=True)), "bits differ"
    runtime.detach(loaded)
    yield "generate"
    if ids is not None:
        assert torch.equal(ids, zoo.generated(loaded, inputs)), "ids differ"
    yield "save"
    loaded.save_pretrained(folder / "again")
    again = cls.from_pretrained(folder / "again")
    _check(again, bits)
    assert modules.is_compressed(again), "nothing is compressed"
    assert all(same_bits(a, b) for a, b in zip(expected, zoo.outputs(again, inputs), strict=True)), "bits differ"
    yield "in flight"
    turned = cls.from_pretrained(folder / "original", quantization_config=hf.DF11Config())
    _check(turned, bits)
    assert modules.is_compressed(turned), "nothing is compressed"
    assert all(same_bits(a, b) for a, b in zip(expected, zoo.outputs(turned, inputs), strict=True)), "bits differ"
    yield "fused"
    # Matrices that are too small to gain, too.
    with mock.patch.object(TiledWeight, "nbytes", 0), mock.patch("df11.formats.tiled_encoder.fixed_bytes", return_value=0):
        turned = cls.from_pretrained(folder / "compressed", quantization_config=hf.DF11Config(mode="fused"))
    assert fused.is_fused(turned), "no tensor is in the tiled layout"
    _check(turned, bits)
    for one, other in zip(expected, zoo.outputs(turned, inputs), strict=True):
        assert one.shape == other.shape and other.isfinite().equal(one.isfinite()), "outputs differ"
    yield "restore"
    checkpoint.restore(folder / "compressed", folder / "restored")
    files = {path.name: path.read_bytes() for path in (folder / "original").iterdir()}
    assert {path.name: path.read_bytes() for path in (folder / "restored").iterdir()} == files, "files differ"


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Of any dtype."""
    same = a.dtype == b.dtype and a.shape == b.shape
    return same and torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))


def _check(model: torch.nn.Module, bits: dict[str, torch.Tensor]) -> None:
    own = dict(model.named_parameters())
    assert own.keys() == bits.keys(), f"other parameters: {sorted(own.keys() ^ bits.keys())[:3]}"
    different = [name for name, weights in bits.items() if not same_bits(dense(own[name].detach()), weights)]
    assert not different, f"weights differ: {different[:3]}"


@pytest.mark.parametrize("name", FAST)
def test_one(name: str) -> None:
    result = attempt(name)
    assert not result.reason, result
    assert result.share >= 0.95, result


@pytest.mark.slow
def test_all_classes() -> None:
    """At least 150 go all the way; what does not is transformers' own, and listed in docs/architectures.md."""
    results = everything([cls.__name__ for cls in zoo.classes()])
    good = [r for r in results if not r.reason]
    own = [r for r in results if r.reason.startswith("transformers: ")]
    bad = [r for r in results if r not in good and r not in own]
    assert len(good) >= 150
    assert not bad, bad
    assert not [r for r in good if r.share < 0.95]
    if transformers.__version__ in TABLE.read_text():
        assert TABLE.read_text() == table(results), "run `python -m tests.test_zoo`"


def everything(names: list[str]) -> list[Result]:
    """Each class in a process of its own, as one may hang or fall; as many at a time as there are cores."""

    def separate(name: str) -> Result:
        ours, theirs = multiprocessing.Pipe(duplex=False)
        process = context.Process(target=lambda: theirs.send(attempt(name)), daemon=True)
        process.start()
        theirs.close()
        try:
            return ours.recv() if ours.poll(SECONDS) else Result(name, f"transformers: longer than {SECONDS} s")
        except EOFError:
            process.join()
            return Result(name, f"its process ended with {process.exitcode}")
        finally:
            process.kill()

    context = multiprocessing.get_context("fork")  # all is imported already, and no thread of torch's runs yet
    results = []
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for result in pool.map(separate, names):
            print(result, flush=True)
            results.append(result)
    return results


def table(results: list[Result]) -> str:
    """docs/architectures.md."""
    good = [r for r in results if not r.reason]
    text = f"""# Architectures

Made by `python -m tests.test_zoo`; do not edit.

Each class that transformers {transformers.__version__} registers for causal, image-text, sequence-to-sequence and masked language
models is made tiny with random weights and saved by transformers. The files are compressed, verified and restored, byte for byte.
The compressed ones are loaded in both modes, run, and saved again; the original is compressed in flight. In mode exact every bit of
the outputs, by layer and by block, and every generated token is the original's.
In mode fused every bit of the weights is; of its outputs only shapes are compared, and where they are finite.

{len(good)} of {len(results)} classes go all the way.

- *compressed*: share of the bytes of bf16 matrices of {LARGE} weights and more.
- *not reached*: such matrices on which no output depends with the inputs tried here. Their bits are compared all the same.

| class | tensors | compressed | not reached | generates |
|---|---:|---:|---:|---|
"""
    for r in good:
        text += f"| {r.name} | {r.tensors} | {100 * r.share:.0f} % | {r.unreached or ''} | {'yes' if r.generates else ''} |\n"
    text += """
## Not tried to the end

Here transformers itself, without df11, gets no further with a tiny model.

| class | where it stops |
|---|---|
"""
    return text + "".join(f"| {r.name} | {r.reason.replace('|', '/')} |\n" for r in results if r.reason)


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if sys.argv[1:]:
        everything(sys.argv[1:])
    else:
        TABLE.write_text(table(everything([cls.__name__ for cls in zoo.classes()])))
