"""The main numbers of README.md, results/README.md and docs/scaling.md are what the committed rows give."""

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from df11.formats.tiled import tile_fragments
from experiments.footprint import Footprint

ROOT = Path(__file__).parents[1]
MODEL = "llama3_1_405b_synthetic"
CARDS: dict[str, Any] = {"model": MODEL, "card": "H100 80 GB", "cards": 8}
MEMORY, RESERVE = 81559 << 20, 2_000_000_000
TILED_BITS = 10.94
H200, H100 = "NVIDIA H200", "NVIDIA H100 80GB HBM3"
SMOLLM2, LLAMA = "smollm2_135m", "llama3_1_8b_synthetic"
OTHERS = "qwen3_14b_synthetic", "mistral_small_24b_synthetic"
QWQ = "qwq_32b_synthetic"


def text(file: str) -> str:
    return " ".join((ROOT / file).read_text().split())


TEXT = text("docs/scaling.md")
LIBRARIES = "cublas", "cublaslt"
BARS = text("docs/kernel-log.md").partition("### Bars")[2].partition("## Measuring")[0]


@cache
def table(name: str) -> pd.DataFrame:
    return pd.read_csv(ROOT / "results" / f"{name}.csv", dtype=str).astype({"value": float})


def rows(name: str, **identity: Any) -> pd.DataFrame:
    found = table(name)
    for column, wanted in identity.items():
        found = found[found[column] == str(wanted)]
    return found


def value(name: str, **identity: Any) -> float:
    """The median of the repeats of what has this identity; of several numbers only where they are equal."""
    found = rows(name, **identity)
    assert len(found.drop(columns=["value", "repeat"]).drop_duplicates()) == 1 or found["value"].nunique() == 1, (name, identity)
    return float(found["value"].median())


def values(name: str, axes: list[str], **identity: Any) -> pd.Series:
    """The same along axes."""
    found = rows(name, **identity)
    assert not found.duplicated([*axes, "repeat"]).any(), (name, axes, identity)
    return found.groupby(axes)["value"].median()


def paper(name: str) -> pd.DataFrame:
    return pd.read_csv(ROOT / "results" / "paper" / f"{name}.csv").set_index("model")


def span(series: pd.Series, digits: int = 2) -> str:
    return f"{series.min():.{digits}f} to {series.max():.{digits}f}"


def step(codec: str, batch_size: int = 1, launch: str = "graph", tokens: int = 16, gpu: str = H200, **which: str) -> float:
    """ms, of Llama 3.1 8B. tokens: 16 where mode=exact was measured, 32 where mode=fused was."""
    identity = {"gpu": gpu, "codec": codec, "batch_size": batch_size, "launch": launch, "new_tokens": tokens}
    return value("same_gpu", **identity, phase="decode", metric="ms_per_step", **which)


def fused(batch_size: int, gpu: str, variant: str = "-", merged: str = "merged") -> tuple[float, float]:
    """The same fused, and in BF16 with merged projections."""
    own, theirs = (step(c, batch_size, tokens=32, gpu=gpu, variant=v) for c, v in {"tiled": variant, "bf16": merged}.items())
    return own, theirs


def speedup(batch_size: int, gpu: str = H100) -> pd.Series:
    """Of products with compressed weights, the way that is chosen, by shape."""
    which = {"kernel": "dispatch", "metric": "speedup_vs_cublas"}
    return values("linear", ["rows", "columns"], gpu=gpu, batch_size=batch_size, **which)


def large(batch_size: int, gpu: str = H100) -> pd.Series:
    """The same of matrices of 100 million weights and more."""
    return speedup(batch_size, gpu).loc[lambda found: [int(rows) * int(columns) >= 1e8 for rows, columns in found.index]]


def bits_of_shapes() -> pd.Series:
    return rows("linear", codec="tiled", metric="bits_per_weight").groupby(["rows", "columns"])["value"].median()


def offload_ratios(placement: str, **protocol: Any) -> pd.Series:
    """Of DF11 wholly on the GPU to BF16 placed so."""
    axes = ["placement", "codec", "warmup_tokens", "model", "batch_size"]
    tokens = values("offload", axes, metric="tokens_per_s", **protocol)
    return (tokens["resident", "dfloat11"] / tokens[placement, "bf16"]).dropna()


def offload_ratio(placement: str) -> str:
    return span(offload_ratios(placement), 1)


def load_ratios(model: str) -> str:
    """Cold and warm, of BF16's time to the first token."""
    seconds = values("load_time", ["codec", "cache"], gpu=H200, model=model, metric="total_s")
    ratios = seconds["dfloat11"] / seconds["bf16"]
    return f"{ratios['cold']:.2f} and {ratios['warm']:.2f}"


def nemo() -> tuple[int, int]:
    """Tokens until the memory is full: DF11, BF16."""
    which = {"gpu": H200, "model": "mistral_nemo_synthetic", "memory_mib": 24564, "metric": "max_tokens"}
    tokens = values("generation_length", ["codec"], **which)
    return int(tokens["dfloat11"]), int(tokens["bf16"])


def times_as_many() -> pd.Series:
    """Tokens of DF11 for one of BF16, by model."""
    tokens = values("generation_length", ["codec", "model"], gpu=H200, mode="exact", metric="max_tokens")
    return tokens["dfloat11"] / tokens["bf16"]


def test_bars_of_offload_and_generation_length() -> None:
    assert offload_ratios("accelerate").min() > 1 and times_as_many()["mistral_nemo_synthetic"] >= 8
    counts: dict[str, Any] = {"name": "generation_length", "axes": ["model", "codec"], "gpu": H200}
    assert (values(**counts, metric="max_tokens") / values(**counts, metric="predicted_tokens") - 1).abs().max() < 0.05
    axes = ["gpu", "model", "batch_size", "warmup_tokens"]
    which: dict[str, Any] = {"codec": "dfloat11", "placement": "resident"}
    resident, stored, buffer = (values("offload", axes, **which, metric=f"{m}_bytes") for m in ("resident", "manifest", "buffer"))
    assert (resident / (stored + buffer) - 1).abs().max() < 0.02


def test_bars_of_fused_products() -> None:
    """Those that are missed are said in docs/kernel-log.md."""
    of_large, of_small = {1: 1.25, 8: 1.1, 16: 1.0, 32: 0.95, 64: 0.95}, {1: 1.1, 8: 1.0}
    first, second, third = ("28672", "4096"), ("4096", "14336"), ("128256", "4096")
    bars = dict.fromkeys((first, second, third), of_large) | dict.fromkeys((("6144", "4096"), ("4096", "4096")), of_small)
    for gpu, expected in {
        H200: {(first, 1), *((shape, batch) for shape in (first, second) for batch in (16, 32, 64))},  # 16 and more: older kernels
        H100: {(second, 64)},
    }.items():
        missed = {(s, batch) for s, least in bars.items() for batch, bar in least.items() if speedup(batch, gpu)[s] < bar}
        assert missed == expected
        assert all(f"{speedup(batch, gpu)[shape]:.3f}" in BARS for shape, batch in missed)
    us = {k: value("linear", gpu=H200, rows=first[0], columns=first[1], batch_size=1, kernel=k, metric="us") for k in LIBRARIES}
    own = value("linear", gpu=H200, rows=first[0], columns=first[1], batch_size=1, kernel="dispatch", metric="us")
    assert f"({own:.1f} us, {min(us.values()) / 1.25:.1f} would do)" in BARS
    assert bits_of_shapes().max() <= 11.05
    released = step("dfloat11", granularity="block", kernel="released")
    for batch, bar in {1: 1.08, 8: 1.0}.items():
        for gpu in (H200, H100):
            own, bf16 = fused(batch, gpu)
            assert bf16 / own >= bar
    assert released / fused(1, H200)[0] >= 4


def test_bars_of_decompression_and_of_many_rows() -> None:
    for gpu, over, most in (
        (H200, "7 of 51 points, by at most 3.5 %", 1.035),
        (H100, "5 of 51 points, all of 2048 rows, by at most 5.7 %", 1.057),
    ):
        us = values(
            "linear", ["rows", "columns", "batch_size", "kernel", "mode"], gpu=gpu, metric="us", launch="graph", codec="tiled"
        )
        dense = rows("linear", gpu=gpu, metric="us", codec="bf16")
        dense = dense[dense["kernel"] != "copy"].groupby(["rows", "columns", "batch_size", "kernel"])["value"].median()
        dense = dense.groupby(["rows", "columns", "batch_size"]).min()
        chosen, alone = us.xs("dispatch", level="kernel").droplevel("mode"), us.xs("-", level="mode").droplevel("kernel")
        alone = alone.groupby(["rows", "columns"]).min()
        ratio = {at: chosen[at] / (dense[at] + 1.1 * alone[at[:2]]) for at in chosen.index if int(at[2]) > 64}
        missed = [at for at, found in ratio.items() if found > 1]
        assert f"{len(missed)} of {len(ratio)} points" in over and over in BARS and round(max(ratio.values()), 3) == most
        ways = us.drop("dispatch", level="kernel").drop("-", level="mode").groupby(["rows", "columns", "batch_size"]).min()
        late = [at for at in ways.index if chosen[at] > 1.03 * ways[at]]
        assert len(late) == (gpu == H200) and len(ways) == 170
    speed = values("linear", ["rows", "columns"], gpu=H200, codec="tiled", mode="-", batch_size=1, metric="gb_per_s_bf16_output")
    assert f"30720x3840 {speed['30720', '3840'] / 1000:.2f}, 4096x14336 {speed['4096', '14336'] / 1000:.2f}" in BARS
    below = [shape for shape, found in speed.items() if found < 1900 and int(shape[0]) * int(shape[1]) >= 1e8]
    assert below == [("30720", "3840")]
    alone = values("decompression", ["rows", "columns"], codec="tiled", gpu=H200, metric="gb_per_s_bf16_output")
    assert list(alone.index[alone >= 1900]) == [("128256", "4096")] and "reaches 1.9 on 128256x4096 only" in BARS
    slow = (
        rows("linear", gpu=H100, codec="tiled", mode="-", metric="gb_per_s_bf16_output")
        .groupby(["rows", "columns"])["value"]
        .median()
    )
    assert f"all: {span(slow / 1000)}, its memory is slower" in BARS


def claims_of_the_readme() -> Iterator[str]:
    ratio = {"name": "compression_ratio", "module": "all"}
    percent = value(**ratio, model=SMOLLM2, scope="compressed", metric="ratio_percent")
    bits = value(**ratio, model=SMOLLM2, scope="model", metric="bits_per_weight")
    yield f"dequantised from 4 bits | {percent:.2f} % of its BF16 size over all matrices, {bits:.2f} bits a weight with"
    synthetic: dict[str, Any] = ratio | {"axes": ["model"], "weights": "synthetic-normal", "scope": "compressed"}
    percents, bits, bound = (values(**synthetic, metric=m) for m in ("ratio_percent", "bits_per_weight", "entropy_bound_bits"))
    yield f"| {len(percents)} published geometries, 4B to 405B, synthetic normal weights | {span(percents)} %,"
    yield f"| {span(percents)} %, {bits.median():.2f} bits a weight (entropy bound {bound.median():.2f}) |"
    published = paper("compression")["ratio_percent"].filter(regex="^(?!FLUX|Stable Diffusion)")
    yield f"| published for the trained models of {['nine', 'ten'][len(published) - 9]} of them | {span(published)} % |"
    peak, largest = (value(**ratio, model=MODEL, scope="model", metric=f"{m}_bytes") / 1e9 for m in ("peak_memory", "largest_unit"))
    yield f"| peak memory while compressing the 405B geometry | {peak:.1f} GB; its largest unit is {largest:.1f} GB |"

    lm_head: dict[str, Any] = {"name": "decompression", "gpu": H200, "rows": 128256, "columns": 4096}
    speed = values(**lm_head, axes=["codec", "kernel"], metric="gb_per_s_bf16_output")
    share = value(**lm_head, codec="dfloat11", kernel="fast", metric="share_of_ceiling")
    yield f"128256 x 4096 | {speed['dfloat11', 'fast']:.0f} GB/s of bf16 ({share:.0f} % of what traffic allows);"
    size = value(**lm_head, codec="nvcomp_ans", metric="ratio_percent")
    halves, whole = speed["nvcomp_ans", "nvcomp"], speed["nvcomp_ans_bytes", "nvcomp"]
    yield f"; the released kernel {speed['dfloat11', 'released']:.0f} on the same bytes,"
    yield f", nvCOMP ANS {halves:.0f} ({size:.1f} % of size; {whole:.0f} in its byte mode), pinned transfer"
    yield f", pinned transfer from the CPU {speed['bf16', 'cpu_to_gpu_pinned']:.0f} |"
    encode = values("compression_time", ["kernel", "model", "threads"], metric="mb_per_s_bf16")
    cpu, released = encode["cpu"], encode["released", LLAMA, "1"]
    yield f"one thread, two | {cpu[LLAMA, '1']:.0f} MB/s, {cpu[LLAMA, '2']:.0f} MB/s; the released encoder {released:.1f} MB/s ("
    yield f"(of the much smaller blocks of SmolLM2 {cpu[SMOLLM2, '1']:.0f} and {cpu[SMOLLM2, '2']:.0f}:"
    yield f"| encoding the same block on an H200 | {encode['gpu', LLAMA, '-'] / 1000:.0f} GB/s,"

    budget = rows("offload").groupby("model")["memory_mib"].unique().explode().astype(int).div(1024).round().astype(int)
    sizes = [budget[model] for model in (LLAMA, *OTHERS, QWQ)]
    yield "Llama 3.1 8B in {} GiB, Qwen3 14B in {}, Mistral Small 24B in {}, QwQ 32B in {} | ".format(*sizes)
    claims = pd.read_csv(ROOT / "results" / "paper" / "headlines.csv", index_col="claim")["v3"]
    published_range = claims["throughput against BF16 with CPU offload"].removesuffix("x").replace("-", " to ")
    yield f"| {offload_ratio('accelerate')} times the tokens/s (published, on other GPUs: {published_range});"
    yield f"; {offload_ratio('offload')} times those of a fair offload"
    whole = offload_ratios("accelerate", warmup_tokens=100)
    assert len(whole) == 3
    first_three = ", ".join(f"{whole[:, m].item():.1f}" for m in (LLAMA, *OTHERS))
    yield f"by the paper's protocol, at batch 1, the first three {first_three} times"
    many, few = nemo()
    yield f"24,564 MiB are full, Mistral Nemo | {many:,} against BF16's {few:,}: {many / few:.1f} times"
    yield f"{many / few:.1f} times (published: {paper('generation_length').loc['Mistral Nemo Instruct 12B', 'ratio']:.1f}) |"

    block = {"codec": "dfloat11", "granularity": "block"}
    own, theirs = (step(**block, kernel=kernel) for kernel in ("fast", "released"))
    ahead = step("dfloat11", granularity="block, prefetched", kernel="fast")
    plain, merged = (step("bf16", variant=variant) for variant in ("plain", "merged"))
    yield f"batch 1, H200 | {own:.1f} ms, {ahead:.1f} with the next block ahead; BF16 {plain:.1f}, {merged:.1f} with merged"
    yield f", {merged:.1f} with merged projections; with the released kernel {theirs:.1f} |"
    for gpu, some in {H100: (1, 8, 16, 32, 64, 128, 512), H200: (1, 8, 16, 32, 64, 512)}.items():
        (first, bf16), *others = (fused(batch, gpu) for batch in some)
        more = ", ".join(f"{own:.1f} against {theirs:.1f}" for own, theirs in others)
        listed = ", ".join(map(str, some[1:]))
        which = {H100: "H100", H200: "H200, other runs, from batch 16 on older kernels"}[gpu]
        yield f"mode=fused, {which} | {first:.1f} ms against {bf16:.1f} of BF16 with merged projections"
        yield f"; at batch {listed} {more} |"
    compiled = [fused(batch, H200, "compiled", "merged_compiled") for batch in (1, 64)]
    more = ", ".join(f"{own:.1f} against {theirs:.1f}" for own, theirs in compiled)
    yield f"mode=fused and merged BF16, both by torch.compile, batch 1, 64, H200, older kernels | {more} ms |"
    ratios = {batch: own / bf16 for batch in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512) for own, bf16 in [fused(batch, H100)]}
    assert max(list(ratios.values())[:7]) < 0.98 and min(list(ratios.values())[7:]) > 1.02
    yield "In a CUDA graph faster than BF16 up to batch 64, slower from 128 on, both uncompiled"
    own, theirs = (
        [step(codec, batch, "eager", 32, variant=v) for batch in (1, 8, 64)] for codec, v in (("tiled", "-"), ("bf16", "plain"))
    )
    said = "takes {:.1f} ms at batch 1 (BF16 {:.1f}), {:.1f} at batch 8 ({:.1f}), {:.1f} at 64 ({:.1f})."
    yield said.format(*(ms for both in zip(own, theirs, strict=True) for ms in both))
    axes = ["model", "batch_size", "warmup_tokens", "codec"]
    seconds = values("offload", axes, placement="resident", metric="s_per_step").unstack()
    slower = seconds["tiled"] > seconds["dfloat11"]
    short = {(OTHERS[0], "16", "10"), (OTHERS[0], "64", "10"), (OTHERS[1], "64", "10")}
    assert set(slower.index[slower]) == short | {(OTHERS[0], "1", "100")}
    yield f"slower than mode=exact in {slower.sum()} of {len(seconds)} points of `offload`"
    prompt = {"gpu": H200, "phase": "prefill", "launch": "eager", "prompt_tokens": 64, "new_tokens": 32, "metric": "tokens_per_s"}
    longer = {}
    for batch in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512):
        bf16, own = (values("same_gpu", ["variant"], **prompt, codec=codec, batch_size=batch) for codec in ("bf16", "tiled"))
        longer[batch] = bf16[["plain", "merged"]].max() / own["-"]
    few, many = (span(pd.Series([longer[batch] for batch in some])) for some in ((2, 4, 16), (32, 64, 128, 256, 512)))
    yield f"A prompt of 64 tokens takes {longer[1]:.2f} times as long as BF16's, 8 such at once {longer[8]:.2f} times;"
    yield f"; 2 to 16 at once took {few} times by older launches, 32 to 512 {many} times."
    stored_bytes = values("same_gpu", ["codec", "variant", "launch", "batch_size"], gpu=H100, metric="stored_bytes")
    stored = [stored_bytes[codec].max() for codec in ("tiled", "bf16")]
    small = value("losslessness", model=SMOLLM2, codec="tiled", metric="ratio_percent")
    yield f"in mode=fused | {100 * stored[0] / stored[1]:.2f} % of BF16's bytes; of SmolLM2"
    yield f"; of SmolLM2-135M, whose matrices are small, {small:.2f} % |"

    yield f"at {bits_of_shapes().median():.1f} bits a weight, products with"
    slowest = {gpu: pd.concat([speedup(1, gpu), speedup(8, gpu)], axis=1).min(axis=1) for gpu in (H100, H200)}
    count, less = len(slowest[H100]), (slowest[H200] > 1).sum()
    assert slowest[H100].min() > 1 and set(slowest[H200].index[slowest[H200] < 1]) == {("5120", "5120"), ("8192", "3840")}
    yield f"at batch 1 and 8 in all {count} shapes measured on an H100 and in {less} of them on an H200, and a whole 8B model"
    assert all(large(4, gpu).min() > 1 and large(16, gpu).median() > 1 for gpu in (H100, H200))
    older = {batch: own / bf16 for batch in (1, 2, 4, 8, 16, 32, 64) for own, bf16 in [fused(batch, H200)]}
    assert max(older[batch] for batch in (1, 2, 4, 8, 16)) < 0.98 < older[32] < 1 < older[64]
    yield "and a whole 8B model, uncompiled in a CUDA graph, up to batch 64 on an H100 and 16 on an H200"
    for gpu in (H100, H200):
        of_card = f"fused products on an {gpu.split()[1]}, {count} shapes of four models, batch 1, 8"
        yield f"{of_card} | {span(speedup(1, gpu))}, {span(speedup(8, gpu))} times as fast as cuBLAS"
    yield f"times as fast as cuBLAS, {span(bits_of_shapes())} bits a weight |"
    more = ", ".join(span(speedup(batch, H200)) for batch in (16, 32, 64))
    yield f"the same, H200, older kernels, batch 16, 32, 64 | {more} times |"
    single: dict[str, Any] = {"name": "linear", "axes": ["rows", "columns"], "codec": "nwc"}
    bits, speed = (values(**single, gpu=H100, metric=metric) for metric in ("bits_per_weight", "speedup_vs_cublas"))
    yield f"neural-weight-compression 0.10.1 ({span(bits)} bits), which multiplies single rows only, H100 | {span(speed)} times"
    yield f" times (H200: {span(values(**single, gpu=H200, metric='speedup_vs_cublas'))}) |"
    ways = {
        "the same, H100": speedup,
        f"of these, the {['five', 'six'][len(large(8)) - 5]} shapes of 100 million weights and more": large,
    }
    for which, of in ways.items():
        yield f"{which}, batch 16, 32, 64, 128 | {', '.join(span(of(batch)) for batch in (16, 32, 64, 128))} times |"
    peer = values("linear", ["rows", "columns", "batch_size"], gpu=H100, codec="glyd_mma12", metric="speedup_vs_cublas")
    others = ", ".join(span(peer[:, :, batch]) for batch in ("1", "8", "64", "512"))
    yield f"glyd 0.26.0 (12 bits), the same shapes in the same processes, H100, batch 1, 8, 64, 512 | {others} times |"
    most_rows = ", ".join(span(speedup(batch)) for batch in (512, 2048))
    yield f"batch 512, 2048, all {count}, the fastest way, H100 | {most_rows} times |"
    faster = ", ".join(str((speedup(batch) > 1).sum()) for batch in (16, 32, 64, 128))
    yield f"at 16, 32, 64, 128 rows {faster} of {count} shapes are faster than cuBLAS on an H100"
    which = {"codec": "tiled", "mode": "-", "batch_size": 1, "metric": "gb_per_s_bf16_output"}
    most = values("linear", ["rows", "columns"], gpu=H200, **which)
    most = most.loc[list(large(1).index)]
    alone = values("decompression", ["rows", "columns"], codec="tiled", gpu=H200, metric="gb_per_s_bf16_output")
    alone = alone[[int(rows) * int(columns) >= 10**8 for rows, columns in alone.index]]
    yield f"of 100 million weights and more | {span(most, 0)} GB/s of bf16 in a CUDA graph, {span(alone, 0)} launched alone |"

    exact = {"codec": "dfloat11", "launch": "graph", "gpu": H200}
    (decoded,) = values("capacity_check", ["context_tokens"], **exact, metric="tokens_per_s").items()
    longest = values("capacity_check", ["codec"], gpu=H200, metric="longest_context").astype(int)
    yield f"decodes at {int(decoded[0]):,} tokens of context ({decoded[1]:.1f} tokens/s)"
    yield f" and up to {longest['dfloat11']:,}; BF16 leaves room for {longest['bf16']:,} |"
    others = GEMMA, QWEN = "gemma3_12b_conditional_synthetic", "qwen3_30b_a3b_half_synthetic"
    times = f"{load_ratios(LLAMA)} (Llama 3.1 8B), {load_ratios(GEMMA)} (Gemma 3 12B with vision), {load_ratios(QWEN)} (24 layers"
    yield f"each measured once | of BF16's time {times} of Qwen3 30B-A3B)"
    sizes = values("load_time", ["model", "codec"], metric="file_bytes").unstack()
    shares = [f"{100 * sizes['dfloat11'][model] / sizes['bf16'][model]:.2f} %" for model in others]
    yield f"{', '.join(shares)} of BF16's bytes; no bit of weights or logits differs"
    differ = [rows("losslessness", model=model, metric="logit_mismatches", mode="exact")["value"] for model in others]
    assert all(len(found) and not found.any() for found in differ)


def claims_of_the_results() -> Iterator[str]:
    which = {"name": "losslessness", "mode": "fused"}
    ids, samples = (rows(**which, metric=f"{m}_mismatches").groupby(["model", "gpu"])["value"].sum() for m in ("id", "sample"))
    compared = rows(**which, metric="compared", phase="lm_eval", gpu=H100)["value"].sum()
    assert ids["gemma3_12b_synthetic", H200] == 0
    yield f"none for Gemma, {ids[SMOLLM2, H100]:.0f} for SmolLM2, {ids['qwen2_5_14b_synthetic', H100]:.0f} for Qwen 2.5"
    yield f"{samples[SMOLLM2, H100]:.0f} of {compared:.0f} lm-eval samples have other likelihoods, all scores are equal"
    scores = rows("losslessness", phase="lm_eval", gpu=H100)
    scores = scores[scores["metric"].isin(["acc", "bits_per_byte", "byte_perplexity", "word_perplexity"])]
    assert (scores.groupby(["task", "metric"])["value"].nunique() == 1).all() and set(scores["codec"]) == {"bf16", "tiled"}
    batches = sorted({int(batch) for _, _, batch in offload_ratios("accelerate").index})
    some = f"{', '.join(map(str, batches[:-1]))} and {batches[-1]}"
    ((_, _, batch), most), *more = offload_ratios("accelerate").xs(QWQ, level="model", drop_level=False).items()
    assert batch == "1" and not more and most == offload_ratios("accelerate").max()
    times = f"{offload_ratio('accelerate')} times accelerate's CPU offload at batch {some}"
    yield f"{times} (QwQ 32B, the {most:.1f}: 1 only, and not by the paper's protocol) with"
    theirs = pd.read_csv(ROOT / "results" / "paper" / "offload.csv").query("batch_size == 1").set_index("model")
    theirs = theirs["df11_tokens_per_s"] / theirs["bf16_offload_tokens_per_s"]
    whole = offload_ratios("accelerate", warmup_tokens=100).droplevel(["warmup_tokens", "batch_size"])
    yield f"Qwen3 14B {whole[OTHERS[0]]:.1f} times (published, on an RTX A5000: {theirs['Qwen3 14B']:.1f})"
    yield f"Mistral Small {whole[OTHERS[1]]:.1f} (on an A100: {theirs['Mistral Small 3']:.1f})"
    published_length, longer = paper("generation_length")["ratio"], times_as_many()
    yield f"{longer['mistral_nemo_synthetic']:.1f} times as many tokens for Mistral Nemo at 24,564 MiB"
    yield f"(published {published_length['Mistral Nemo Instruct 12B']:.1f}), {longer[OTHERS[1]]:.1f} for Mistral Small at 49,128"
    small = published_length.filter(like="Mistral Small").item()
    yield f"at 49,128 (published {small:.1f}), {longer[LLAMA]:.1f} for Llama 3.1 8B at 20,480"
    counts: dict[str, Any] = {"name": "generation_length", "axes": ["model", "codec"], "gpu": H200}
    off = 100 * (values(**counts, metric="max_tokens") / values(**counts, metric="predicted_tokens") - 1).abs().unstack().max()
    yield f"within {max(off['bf16'], off['dfloat11']):.1f} % of what sizes predict, in mode=fused within {off['tiled']:.1f} %"
    ratios = [f"{own / bf16:.2f}" for own, bf16 in (fused(batch, H100) for batch in (1, 8, 32, 64, 128))]
    yield "takes {} of BF16's time at batch 1, {} at batch 8, {} at batch 32, {} at batch 64, {} at batch 128 on an H100".format(
        *ratios
    )
    ratios = [f"{own / bf16:.2f}" for own, bf16 in (fused(batch, H200) for batch in (1, 8))]
    yield f"on an H200 {ratios[0]} and {ratios[1]} at batch 1 and 8"
    check = {"name": "capacity_check", "gpu": H200, "axes": ["codec"]}
    most, sizes = (values(**check, metric=f"{m}longest_context") for m in ("", "predicted_"))
    fewer = {codec: f"{100 - 100 * most[codec] / sizes[codec]:.0f}" for codec in ("dfloat11", "tiled")}
    yield f"up to {most['dfloat11']:,.0f}, in mode=fused {most['tiled']:,.0f}, {' and '.join(fewer.values())} % fewer than sizes"
    speed = values(**check, launch="graph", metric="tokens_per_s")
    yield f"At 40,960 tokens {speed['dfloat11']:.1f} tokens/s, in mode=fused {speed['tiled']:.1f},"
    of = {"metric": "blocks_offloaded", "model": LLAMA, "warmup_tokens": 100}
    blocks = values("offload", ["codec"], **of)
    yield f"{blocks['dfloat11']:.0f} blocks in host memory for DF11 and {blocks['bf16']:.0f} for BF16)"
    own, bf16 = fused(1, H200, "compiled", "merged_compiled")
    yield f"and {own / bf16:.2f} at batch 1 with torch.compile on both sides"
    for gpu in (H100, H200):
        yield f"{gpu.split()[1]} {span(speedup(1, gpu))} times as fast as cuBLAS's at batch 1, {span(speedup(8, gpu))} at batch 8"
    yield f"of 100 million weights and more {span(large(64))} at batch 64"
    yield f"at {span(bits_of_shapes())} bits a weight"
    ms = values("latency_breakdown", ["batch_size", "component"], gpu=H200, kernel="fast", metric="decompression_ms")
    yield f"takes up to {100 * (ms['16384'] / ms['1']).max() - 100:.0f} % longer"
    entropy = value("exponent_entropy", model=SMOLLM2, scope="block", field="exponent", metric="entropy_bits")
    yield f"exponents carry {entropy:.1f} of their 8 bits"


@pytest.mark.parametrize(("file", "claims"), [("README.md", claims_of_the_readme), ("results/README.md", claims_of_the_results)])
def test_numbers_are_those_of_the_rows(file: str, claims: Callable[[], Iterator[str]]) -> None:
    said = text(file)
    assert [claim for claim in claims() if claim not in said] == []


def tiled(buffer: int) -> Footprint:
    stored: dict[str, Any] = {"name": "capacity", "model": MODEL, "codec": "tiled", "metric": "stored_bytes"}
    block, first, last = (int(value(**stored, module=unit)) for unit in ("model.layers.0", "model.embed_tokens", "lm_head"))
    rest = int(value("compression_ratio", model=MODEL, scope="model", metric="uncompressed_bytes"))
    token = value("capacity", **CARDS, granularity="block", context_tokens=4096, metric="cache_bytes") / 4096
    return Footprint(126, block, first, last + rest, buffer, RESERVE, lambda tokens: int(token * tokens))


def test_sizes_of_405b() -> None:
    published = value("capacity", **CARDS, granularity="block", metric="weights_bytes")
    buffers = value("capacity", **CARDS, granularity="block", metric="decode_buffer_bytes")
    original = value("capacity", **CARDS, codec="bf16", metric="weights_bytes")
    room = 8 * (MEMORY - RESERVE)
    assert f"| BF16 | {original / 1e9:.1f} |" in TEXT
    assert f"| published layout | {published / 1e9:.1f} |" in TEXT
    fused = value("capacity", **CARDS, codec="tiled", metric="weights_bytes")
    assert fused == tiled(0).weights and f"| tiled layout | {fused / 1e9:.1f} | the same, " in TEXT
    exact = int(value("capacity", **CARDS, granularity="block", metric="longest_context"))
    left = (room - published - buffers) / 1e9
    assert f"by block | {buffers / 1e9:.1f} (`capacity`) | {left:.1f} *est.* | {exact:,} (`capacity`) |" in TEXT


def test_bits_of_the_tiled_layout() -> None:
    rows = pd.read_csv(ROOT / "results" / "linear.csv", dtype=str)
    rows = rows[(rows["metric"] == "bits_per_weight") & (rows["codec"] == "tiled") & (rows["columns"].astype(int) >= 5120)]
    rows = rows[[tile_fragments(int(columns)) == tile_fragments(16384) for columns in rows["columns"]]]
    bits = rows["value"].astype(float)
    coded = value("compression_ratio", model=MODEL, scope="unit", module="lm_head", metric="coded_weights")
    own = 8 * value("capacity", model=MODEL, codec="tiled", module="lm_head", metric="stored_bytes") / coded
    assert (
        f"lm_head has {own:.3f} bits a weight; `linear` {bits.min():.3f} to {bits.max():.3f} in every shape of 5,120 columns"
        in TEXT
    )
    assert {round(b, 2) for b in bits} == {TILED_BITS}


@pytest.mark.parametrize(("buffer", "source"), [(0, "*est.*"), (2 * 128256 * 16384, "(`capacity`)")])
def test_contexts_of_mode_fused(buffer: int, source: str) -> None:
    model = tiled(buffer)
    left, longest = (8 * (MEMORY - RESERVE - buffer) - model.weights) / 1e9, model.longest(MEMORY, 8)
    assert f"{left:.1f} *est.* | {longest:,} {source} |" in TEXT
    assert not buffer or longest == value("capacity", **CARDS, codec="tiled", metric="longest_context")


def test_loading_and_verifying() -> None:
    size = {codec: value("load_time", model=LLAMA, codec=codec, metric="file_bytes") for codec in ("bf16", "dfloat11")}
    files = value("capacity", **CARDS, granularity="block", metric="weights_bytes")
    original = value("capacity", **CARDS, codec="bf16", metric="weights_bytes")
    read = value("load_time", model=LLAMA, codec="dfloat11", metric="read_s") / size["dfloat11"]
    load = {c: value("load_time", model=LLAMA, codec="dfloat11", metric="load_s", cache=c) for c in ("cold", "warm")}
    cold, warm = (load[c] / size["dfloat11"] for c in ("cold", "warm"))
    assert f"read in {files * read:.0f} s and loaded in {files * cold:.0f} s cold, {files * warm:.0f} s warm" in TEXT
    verify = value("load_time", model=LLAMA, metric="verify_s") / size["bf16"]
    assert f"405B {original * verify / 60:.0f} minutes" in TEXT
