"""Table 2, stricter: BF16 against DF11 of the same model, counted in bits that differ.

Every weight bit; every logits bit of a prefill and of each decoding step; every generated id, greedy and sampled by a seed; every
sample of lm-eval's tasks, where the model has a tokenizer. Weights from files are compressed to a checkpoint and loaded back as a
user would; synthetic ones are compressed where they are. In mode=fused the weights keep every bit and sums have an order of their
own: what differs is counted there too, and is not 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch.nn.attention import sdpa_kernel

from df11 import checkpoint, fused, hf, modules, runtime
from df11.sources import SafetensorsSource, open_source
from experiments import budget, needs
from experiments.config import Config
from experiments.decoding import ATTENTION, CODECS, GRANULARITIES, Decoder, check_modes
from experiments.harness import timing
from experiments.harness.api import Need, Point

AXES = ("phase", "granularity", "batch_size", "task")
FILES = ("fixtures/mmlu.txt", "fixtures/truthfulqa.txt")
NEW_TOKENS = 16
PROMPTS = {1: 33, 4: 21}  # batch size: tokens of each prompt

SCORES = ("acc", "word_perplexity")  # one of them a task

Results = dict[tuple[str, str, int], torch.Tensor]  # launch, phase, batch size


def inputs(cfg: Config) -> object:
    return needs.inputs(cfg.model)


def preflight(cfg: Config) -> Iterable[Need]:
    size = sum(t.nbytes for t in needs.tensors_of(cfg.model))
    disk = 0 if cfg.model.source == "synthetic" else int(0.7 * size)  # the compressed checkpoint
    gpu_memory = 2 * size if cfg.device.name == "cuda" else 0
    twice = Need("the model, twice", disk, cfg.cache, "cache_dir", memory=2 * size, gpu_memory=gpu_memory, minutes=size / 5e9)
    return [needs.compression(cfg), twice]


def run(cfg: Config, done: Mapping[str, list[dict[str, Any]]]) -> Iterator[Point]:
    check_modes(cfg.bench.modes)
    with needs.scratch(cfg) as scratch:
        model, weights, about, compress, tokenizer = load(cfg, Path(scratch))
        original = {"weights": weights, "codec": "bf16", "kernel": "-", "mode": "exact"}
        on_gpu, modes = cfg.device.name == "cuda", [mode for mode in CODECS if mode in cfg.bench.modes]
        tasks = [task for task in cfg.eval.tasks if any(key(task, m) not in done for m in modes)] if tokenizer else []
        if tasks:
            from experiments import evaluation  # needs lm-eval
        asked = {task: evaluation.fixture(task, Path(scratch)) if cfg.eval.fixtures else task for task in tasks}
        names = {name for name, p in model.named_parameters() if p.dim() > 1}
        bits = {name: p.detach().cpu() for name, p in model.named_parameters() if name in names}
        expected = outputs(model, cfg) if any(key("bits", mode) not in done for mode in modes) else {}
        answered = {task: evaluation.evaluate(model, tokenizer, spec, cfg.eval.batch_size) for task, spec in asked.items()}
        model = compress(model)
        if not modules.is_compressed(model):
            raise ValueError(f"nothing of {cfg.model.name} is compressed: equal outputs would prove nothing; `df11 info` says why")
        for mode in modes:  # exact first: fuse_ turns the same model
            if mode == "fused":
                fused.fuse_(model)
                if not fused.is_fused(model):
                    raise ValueError(f"no matrix of {cfg.model.name} is smaller in the tiled layout: bench.modes=[exact]")
            codec, kernel = CODECS[mode]
            identity = {"weights": weights, "codec": codec, "kernel": kernel if on_gpu else "cpu", "mode": mode}
            if key("bits", mode) not in done:
                yield Point(key("bits", mode), [identity | row for row in bit_rows(model, cfg, mode, bits, expected)], about)
            runtime.attach(model, "layer")
            for task, spec in asked.items():
                if key(task, mode) in done:
                    continue
                results = evaluation.evaluate(model, tokenizer, spec, cfg.eval.batch_size)
                axes = {"launch": "eager", "phase": "lm_eval", "granularity": "layer" if mode == "exact" else "-"}
                axes |= {"batch_size": cfg.eval.batch_size, "task": task + (evaluation.SUFFIX if cfg.eval.fixtures else "")}
                different, total = evaluation.sample_mismatches(answered[task], results)
                rows = [identity | axes | {"metric": "sample_mismatches", "value": different, "unit": "samples"}]
                rows.append(identity | axes | {"metric": "compared", "value": total, "unit": "samples"})
                # The original's scores stand once, with the first mode.
                sides = [(original | axes | {"granularity": "-"}, answered[task])] if mode == modes[0] else []
                for who, one in [*sides, (identity | axes, results)]:
                    values = evaluation.scores(one)
                    rows += [who | {"metric": name, "value": values[name], "unit": evaluation.UNITS[name]} for name in values]
                yield Point(key(task, mode), rows, about)


def key(what: str, mode: str) -> str:
    return what if mode == "exact" else f"{what}, {mode}"


def bit_rows(
    model: torch.nn.Module, cfg: Config, mode: str, bits: dict[str, torch.Tensor], expected: Results
) -> Iterator[dict[str, Any]]:
    yield from weight_rows(model, bits)
    for granularity, settings in GRANULARITIES.items() if mode == "exact" else [("-", {"granularity": "layer"})]:
        runtime.attach(model, **settings)
        for (launch, phase, batch_size), got in outputs(model, cfg).items():
            wanted = expected[launch, phase, batch_size]
            metric = "id_mismatches" if wanted.dtype == torch.int64 else "logit_mismatches"
            axes = {"launch": launch, "phase": phase, "granularity": granularity, "batch_size": batch_size}
            for name, value in ((metric, differing(got, wanted)), ("compared", wanted.numel())):
                yield axes | {"metric": name, "value": value, "unit": "elements"}


def load(
    cfg: Config, scratch: Path
) -> tuple[torch.nn.Module, str, dict[str, Any], Callable[[torch.nn.Module], torch.nn.Module], Any]:
    """The uncompressed model, what its weights are and where from, what makes the compressed one of it, and its tokenizer."""
    device = cfg.device.name
    if cfg.model.source == "synthetic":
        if cfg.model.distribution != "normal":
            raise ValueError(f"model.distribution={cfg.model.distribution}: this experiment draws from the normal one only")

        def in_place(model: torch.nn.Module) -> torch.nn.Module:
            modules.compress_(model)
            return model

        return hf.build(cfg.model.geometry, cfg.seed, device), "synthetic-normal", budget.about(cfg), in_place, None
    source = open_source(cfg.model, cfg.seed, cfg.cache)
    assert isinstance(source, SafetensorsSource)

    def by_checkpoint(model: torch.nn.Module) -> torch.nn.Module:
        del model
        checkpoint.compress(source.directory, scratch / "compressed")
        checkpoint.verify(scratch / "compressed", source.directory)
        return hf.load(scratch / "compressed", device)

    tokenizer = hf.tokenizer(source.directory)
    return hf.load(source.directory, device), source.weights, source.provenance, by_checkpoint, tokenizer


@torch.inference_mode()
def weight_rows(model: torch.nn.Module, bits: dict[str, torch.Tensor]) -> Iterator[dict[str, Any]]:
    """Every compressed weight against the original's."""
    mismatches, compared, stored = 0, 0, {}
    for prefix, module in model.named_modules():
        for name, tensor in modules.compressed_parameters(module).items():
            if f"{prefix}.{name}" in bits and tensor.is_compressed:  # tied ones have one name there
                mismatches += differing(tensor.decompress().cpu(), bits[f"{prefix}.{name}"])
                compared += tensor.numel()
                stored[id(tensor._stored)] = tensor._stored
    compressed = sum(sum(array.nbytes for array in one.kept().values()) for one in stored.values())
    if not compared:
        raise ValueError("nothing of this model is compressed: there is nothing to compare")
    values = {"weight_mismatches": mismatches, "compared": compared}
    yield from ({"phase": "weights", "metric": name, "value": value, "unit": "elements"} for name, value in values.items())
    yield {"phase": "weights", "metric": "ratio_percent", "value": 100 * compressed / (2 * compared), "unit": "%"}


@torch.inference_mode()
@sdpa_kernel(ATTENTION)
def outputs(model: torch.nn.Module, cfg: Config) -> Results:
    """Logits (bf16) and ids (int64) of all phases that the class has, on the CPU. Models of images are given text alone, decoders
    behind an encoder the same text."""
    results: Results = {}
    config = model.config.get_text_config()
    for batch_size, length in PROMPTS.items():
        generator = torch.Generator().manual_seed(cfg.seed)
        ids = torch.randint(5, config.vocab_size, (batch_size, length), generator=generator).to(cfg.device.name)
        behind = {"decoder_input_ids": ids} if config.is_encoder_decoder else {}
        results["eager", "prefill", batch_size] = model(ids, **behind).logits.cpu()
        if not model.can_generate():
            continue
        settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
        settings |= {"pad_token_id": 0, "return_dict_in_generate": True, "output_logits": True}
        greedy = model.generate(ids, do_sample=False, **settings)
        results["eager", "greedy", batch_size] = greedy.sequences.cpu()
        results["eager", "decode", batch_size] = torch.stack(greedy.logits).to(torch.bfloat16).cpu()
        torch.manual_seed(cfg.seed)
        results["eager", "sampled", batch_size] = model.generate(ids, do_sample=True, **settings).sequences.cpu()
        if cfg.device.name == "cuda" and not behind:
            results["graph", "prefill", batch_size] = graphed(lambda ids=ids: model(ids, use_cache=False).logits)  # type: ignore[misc]
            decoder = Decoder(model, batch_size, length + NEW_TOKENS, "graph")
            decoder.prefill(ids)
            steps = []
            for _ in range(NEW_TOKENS - 1):
                decoder.step()
                steps.append((decoder.ids.cpu(), decoder.logits.cpu()))
            results["graph", "greedy", batch_size] = torch.cat([ids for ids, _ in steps], 1)
            results["graph", "decode", batch_size] = torch.stack([logits for _, logits in steps])
    return results


def graphed(forward: Callable[[], torch.Tensor]) -> torch.Tensor:
    """The result of a forward replayed from a CUDA graph."""
    replay = timing.graph(forward)
    out = replay()
    out.zero_()
    replay()
    torch.cuda.synchronize()
    return out.cpu()


def differing(a: torch.Tensor, b: torch.Tensor) -> int:
    """Elements that differ in a bit; all of them where shapes do."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return max(a.numel(), b.numel())
    if a.dtype == torch.bfloat16:
        a, b = a.contiguous().view(torch.int16), b.contiguous().view(torch.int16)
    return int((a != b).sum())


def table(rows: pd.DataFrame, cfg: Config) -> pd.DataFrame:
    """What was compared, how much of it differs, and the scores of both."""
    index = ["mode", "launch", "phase", "task", "granularity", "batch_size"]
    compared = rows[rows["metric"] == "compared"].set_index(index)["value"].rename("compared")
    differ = rows[rows["metric"].str.endswith("mismatches")].set_index(index)["value"].rename("differ")
    out = pd.concat([compared, differ], axis=1).reset_index()
    for codec in ("bf16", "dfloat11", "tiled"):
        own = rows[(rows["codec"] == codec) & rows["metric"].isin(SCORES)].set_index("task")["value"]
        out[codec] = out["task"].map(own)
    return out if out["bf16"].notna().any() else out.drop(columns=["task", "bf16", "dfloat11", "tiled"])
