"""Costs where the uncompressed model fits, and what fits where: the experiments and their figures on the tiny model."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from accelerate import infer_auto_device_map
from omegaconf import DictConfig

from df11 import hf
from experiments import capacity_check, first_token, latency_breakdown, load_time, paper, same_gpu
from experiments.config import Config
from experiments.decoding import Decoder
from experiments.figures import capacity as capacity_figure
from experiments.figures import latency_breakdown as latency_figure
from experiments.figures import same_gpu as same_gpu_figure
from experiments.figures import style
from experiments.footprint import Footprint, last_true
from experiments.harness import runner, store
from experiments.projections import merge_projections_
from run import EXPERIMENTS

ROOT = Path(__file__).parents[2]
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 300, "head_dim": 16}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
QWEN = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], **SIZES, **HEADS}  # with biases


@pytest.fixture
def rows(config: Callable[..., DictConfig], tmp_path: Path) -> Callable[..., pd.DataFrame]:
    """Runs and promotes; returns the promoted table."""
    (tmp_path / "results").mkdir()
    shutil.copytree(ROOT / "results" / "paper", tmp_path / "results" / "paper")

    def run(name: str, *overrides: str) -> pd.DataFrame:
        always = [f"experiment={name}", "device=cpu", "promote=true", "promote_anyway=true"]
        outcome = runner.run(config(*always, *overrides), Config, EXPERIMENTS)
        assert outcome.state == "ok", outcome
        return pd.DataFrame(store.read_csv(tmp_path / "results" / f"{name}.csv"))

    return run


def drawn(draw: Callable[[Path], object], folder: Path) -> None:
    style.use()
    style.save(draw(folder / "results"), folder / "figure")
    assert (folder / "figure.png").stat().st_size > 5000


def test_latency_breakdown(rows: Callable[..., pd.DataFrame], tmp_path: Path) -> None:
    table = rows("latency_breakdown", "bench.batch_size=[1,9]", "bench.repeats=2")
    assert len(table) == 3 * 3 * 2 * 2 and (table["value"] > 0).all()
    assert set(table["component"]) == {"embedding", "block", "lm_head"} and set(table["batch_size"]) == {"1", "9"}
    measured = {("bf16", "-", "-", "forward_ms"), ("dfloat11", "-", "cpu", "decompression_ms")}
    measured.add(("tiled", "fused", "cpu", "forward_ms"))
    assert set(table[["codec", "mode", "kernel", "metric"]].itertuples(index=False, name=None)) == measured
    assert {*latency_breakdown.table(table, None)} == {"component", "batch_size", "forward", "forward, fused", "cpu"}
    assert "forward, fused, CPU" in [line.get_label() for line in latency_figure.draw(tmp_path / "results").axes[0].get_lines()]
    drawn(latency_figure.draw, tmp_path)


def test_fused_components_get_what_the_model_gives_them(config: Callable[..., DictConfig]) -> None:
    cfg = runner.typed(config("experiment=latency_breakdown", "device=cpu"), Config)
    model = hf.build(latency_breakdown.one_block(cfg), cfg.seed, "cpu")
    ids = torch.tensor([[7, 3, 900]])
    ours, theirs = (latency_breakdown.forwards(one, ids) for one in (latency_breakdown.fused_like(model, cfg), model))
    assert torch.equal(ours["embedding"](), theirs["embedding"]())
    for component in ("block", "lm_head"):
        assert torch.allclose(ours[component](), theirs[component](), atol=0.05)
    model.lm_head.weight.data[5, 5] += 1
    with pytest.raises(ValueError, match=r"lm_head\.weight, tiled: the weights do not come back"):
        latency_breakdown.fused_like(model, cfg)


SMALL = ("bench.repeats=2", "bench.warmup=0", "bench.prompt_tokens=5", "bench.tokens=4")


def test_same_gpu(rows: Callable[..., pd.DataFrame], tmp_path: Path) -> None:
    table = rows("same_gpu", "bench.batch_size=[1,3]", *SMALL)
    ids = table[table["metric"] == "id_mismatches"]
    assert (ids["value"] == 0).all()
    measured = set(ids[["codec", "variant", "granularity", "batch_size"]].itertuples(index=False, name=None))
    bf16 = {("bf16", variant, "-", size) for variant in ("plain", "merged") for size in ("1", "3")}
    df11 = {("dfloat11", "-", granularity, "1") for granularity in ("layer", "block", "block, prefetched")}
    tiled = {("tiled", "-", "-", size) for size in ("1", "3")}
    assert measured == bf16 | df11 | {("dfloat11", "-", "block", "3")} | tiled
    decode = table[(table["phase"] == "decode") & (table["batch_size"] == "3")]
    speed = decode[decode["repeat"] == "1"].pivot_table(index=["codec", "variant"], columns="metric", values="value")
    assert list(speed["tokens_per_s"]) == pytest.approx(list(3000 / speed["ms_per_step"]))
    assert len(table[table["metric"] == "decompression_ms_per_step"]) == 2
    drawn(same_gpu_figure.draw, tmp_path)


def test_batch_sizes_one_by_one_and_together_have_the_same_keys(
    rows: Callable[..., pd.DataFrame], capsys: pytest.CaptureFixture[str]
) -> None:
    axes = ["bench.granularities=[block]", "bench.variants=[plain]", *SMALL]
    for size in (1, 3):
        table = rows("same_gpu", f"bench.batch_size={size}", *axes)
    assert "decompression_ms_per_step" in capsys.readouterr().out  # measured again, so replaced, and said
    assert set(table["batch_size"]) == {"1", "3", "-"} and table["run_id"].nunique() == 2
    again = rows("same_gpu", "bench.batch_size=[1,3]", *axes)
    key = [column for column in table.columns if column not in ("run_id", "value")]
    assert again["run_id"].nunique() == 1 and table[key].equals(again[key])
    assert "ms_per_step" in capsys.readouterr().out


@pytest.mark.parametrize("geometry", [QWEN, QWEN | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}])
def test_merged_projections_compute_the_same(geometry: dict[str, object]) -> None:
    model = hf.build(geometry, 1, "cpu")
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_()
    ids = torch.arange(3, 13).view(2, 5)
    with torch.inference_mode():
        expected = model(ids).logits
        assert merge_projections_(model) == 2 * 2 and merge_projections_(model) == 0
        assert torch.allclose(model(ids).logits, expected, atol=0.02, rtol=0.02) and expected.std() > 0.05
    Decoder(model, 2, 8).tokens(ids, 3)


def test_a_merged_projection_of_another_input_is_computed_anew() -> None:
    """As in cross-attention; what has inputs of two sizes is not merged."""
    parent = torch.nn.ModuleDict({name: torch.nn.Linear(8, size) for name, size in (("q_proj", 4), ("k_proj", 2), ("v_proj", 2))})
    x, other = torch.randn(2, 3, 8)
    with torch.inference_mode():
        expected = [parent["q_proj"](x), parent["k_proj"](other), parent["v_proj"](x)]
        apart = torch.nn.ModuleDict({"gate_proj": torch.nn.Linear(8, 4), "up_proj": torch.nn.Linear(6, 4)})
        assert merge_projections_(parent) == 1 and merge_projections_(apart) == 0
        got = [parent["q_proj"](x), parent["k_proj"](other), parent["v_proj"](x)]
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(got, expected, strict=True))


def test_what_cannot_be_compiled_leaves_the_other_points(
    config: Callable[..., DictConfig], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*arguments: object, **named: object) -> None:
        raise torch._dynamo.exc.TorchRuntimeError("not this one")

    monkeypatch.setattr(torch, "compile", lambda forward, **options: refuse)
    settings = ["experiment=same_gpu", "device=cpu", "bench.kernels=[]", "bench.variants=[plain,compiled]", "bench.batch_size=1"]
    settings += ["bench.modes=[exact]"]
    cfg = runner.typed(config(*settings, *SMALL), Config)
    assert [point.key for point in same_gpu.run(cfg, {})] == ["bf16, plain, -, -, eager, 1"]
    assert "not this one" in capsys.readouterr().err


def test_both_sides_are_compiled(config: Callable[..., DictConfig]) -> None:
    cfg = runner.typed(config("experiment=same_gpu", "device=cpu", "bench.variants=[compiled]", "bench.kernels=[]"), Config)
    assert {(s.codec, s.variant) for s in same_gpu.plan(cfg)} == {("bf16", "compiled"), ("tiled", "-"), ("tiled", "compiled")}


def test_unknown_settings_are_refused(config: Callable[..., DictConfig]) -> None:
    cfg = runner.typed(config("experiment=same_gpu", "device=cpu", "bench.variants=[plane]"), Config)
    with pytest.raises(ValueError, match="choose from plain, compiled"):
        same_gpu.plan(cfg)


# What fits.


def footprint(**changes: object) -> Footprint:
    """4 blocks of 10, 5 before and 5 behind them; 1 a token and block."""
    fields = {"blocks": 4, "block": 10.0, "first": 5, "last": 5, "buffer": 0, "reserve": 0, "cache": lambda tokens: 4 * tokens}
    return Footprint(**fields | changes)  # type: ignore[arg-type]


def test_the_longest_context_on_one_card_fills_it() -> None:
    model = footprint(buffer=7, reserve=3)
    assert model.weights == 50 and model.needed(5) == 80 and model.longest(80) == 5 and model.longest(83) == 5
    assert model.longest(59) == 0 and not model.fits(0, 59)


def test_cards_hold_whole_blocks() -> None:
    model = footprint()
    assert model.fits(0, 25, cards=2) and not model.fits(0, 24, cards=2)
    assert model.longest(27, cards=2) == 1 and model.needed(1, 2) == 54
    assert not footprint(block=15.0).fits(0, 29, cards=3) and footprint(block=15.0).fits(0, 30, cards=3)
    assert not footprint(first=50).fits(0, 40, cards=8)  # one card must hold the embedding


def test_a_tied_lm_head_stays_on_the_card_of_the_embedding() -> None:
    """So a model on several cards has no second embedding: what Footprint counts."""
    names = {"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"], "tie_word_embeddings": True}
    model = hf.build({**names, **SIZES, **HEADS, "num_hidden_layers": 4}, 1, "cpu")
    half = sum(p.nbytes for p in model.parameters()) * 2 // 3
    devices = infer_auto_device_map(model, {0: half, 1: half}, no_split_module_classes=["Gemma3DecoderLayer"])
    assert devices["lm_head"] == devices["model.embed_tokens"] == 0 and devices["model.norm"] == 1


def test_bisection() -> None:
    asked: list[int] = []
    assert last_true(lambda n: asked.append(n) is None and n <= 777, 0, 1 << 12, 1) == 777 and len(asked) == 12
    assert 767 < last_true(lambda n: n <= 777, 0, 1 << 12, 10) <= 777


def test_cache_bytes_are_those_of_a_static_cache() -> None:
    sliding = QWEN | {"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"], "sliding_window": 8}
    for geometry in (QWEN, sliding | {"layer_types": ["sliding_attention", "full_attention"]}):
        decoder = Decoder(hf.build(geometry, 1, "cpu"), 1, 20)
        decoder.prefill(torch.ones(1, 3, dtype=torch.int64))
        assert hf.cache_bytes(geometry, 20) == sum(2 * layer.keys.nbytes for layer in decoder.cache.layers)


def test_capacity(rows: Callable[..., pd.DataFrame], tmp_path: Path) -> None:
    cards = "bench.cards=[{name: small, mib: 2}, {name: large, mib: 3}, {name: small, mib: 2, count: 2}]"
    table = rows("capacity", cards, "bench.lengths=[8]", "bench.reserve_bytes=50000")
    assert set(table["blocks"]) == {"all"}
    fits = table[table["metric"] == "fits"].set_index(["cards", "card", "codec", "granularity"])["value"]
    assert fits["1", "small", "bf16", "-"] == fits["1", "large", "dfloat11", "layer"] == 1
    sums = table[table["metric"] == "stored_bytes"].groupby("codec")["value"].sum()
    assert set(sums.index) == {"dfloat11", "tiled"} and set(table[table["codec"] == "tiled"]["mode"]) == {"fused"}
    for codec, stored in sums.items():
        weights = table[(table["metric"] == "weights_bytes") & (table["codec"] == codec)]["value"]
        assert set(weights) == {stored + 2 * 5 * 128}
    rows("capacity_check", "bench.lengths=[20]", *SMALL)
    drawn(capacity_figure.draw, tmp_path)
    tried = {"model": "m", "gpu": "g", "codec": "tiled", "granularity": "-"}
    found = [tried | {"metric": "longest_context", "value": 1e5}, tried | {"metric": "predicted_longest_context", "value": 2e5}]
    pd.DataFrame(found).to_csv(tmp_path / "results" / "capacity_check.csv", index=False)
    assert capacity_figure.checks(tmp_path / "results") == ["tried on g: m, tiled, predicted 200k: 100k tokens at most"]


def test_capacity_check_decodes_behind_a_filled_cache(rows: Callable[..., pd.DataFrame]) -> None:
    table = rows("capacity_check", "bench.lengths=[20,30]", *SMALL)
    value = table.groupby(["granularity", "context_tokens", "metric"])["value"].median()
    for granularity in ("block", "layer", "-"):
        assert value[granularity, "30", "cache_bytes"] == 2 * 2 * 2 * 64 * 34
    measured = {("dfloat11", "-", g, tokens) for g in ("block", "layer") for tokens in ("20", "30")}
    measured |= {("tiled", "fused", "-", tokens) for tokens in ("20", "30")}
    speed = table[table["metric"] == "tokens_per_s"]
    assert set(speed[["codec", "mode", "granularity", "context_tokens"]].itertuples(index=False, name=None)) == measured
    assert set(table["kernel"]) == {"cpu"}
    assert value["-", "20", "stored_bytes"] not in (value["layer", "20", "stored_bytes"], value["block", "20", "stored_bytes"])


@pytest.mark.parametrize("module", [capacity_check, latency_breakdown, load_time])
def test_modes_are_chosen(config: Callable[..., DictConfig], monkeypatch: pytest.MonkeyPatch, module: Any) -> None:
    monkeypatch.setattr(load_time, "measure", first_token.measure)
    name = f"experiment={module.__name__.rpartition('.')[2]}"
    small = (name, "device=cpu", "bench.batch_size=1", "bench.lengths=[20]", *SMALL)
    cfg = runner.typed(config(*small, "bench.modes=[fused]"), Config)
    found = [row for point in module.run(cfg, {}) for row in point.rows]
    assert {row["codec"] for row in found if "repeat" in row} - {"bf16"} == {"tiled"}
    with pytest.raises(ValueError, match="choose from exact, fused"):
        next(module.run(runner.typed(config(*small, "bench.modes=[fussed]"), Config), {}))


def test_the_longest_context_is_found_by_trial(config: Callable[..., DictConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU that is played: out of memory from 2,000 tokens on."""
    cfg = runner.typed(config("experiment=capacity_check", "device=cpu", "bench.lengths=[20]"), Config)
    model = hf.build(cfg.model.geometry, 0, "cpu")

    class Played(Decoder):
        def step(self) -> None:
            if self.length > 2000:
                raise torch.OutOfMemoryError("played")

    monkeypatch.setattr(capacity_check, "Decoder", Played)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, 8 << 20))
    workspace = capacity_check.runtime.attach(model)
    value = {row["metric"]: row["value"] for row in capacity_check.longest(model, cfg, workspace)}
    assert 1900 < value["longest_context"] < 2000
    assert value["predicted_longest_context"] == 0  # the reserve alone is larger than this card


def test_make_paper_runs_every_experiment(config: Callable[..., DictConfig]) -> None:
    named = set()
    for command in (*paper.CPU, *paper.GPU):
        arguments = [part for part in command.split() if part != "-m"]
        named.add(runner.typed(config(*(a for a in arguments if not a.startswith("model=") or "," not in a)), Config).experiment)
    assert named == set(EXPERIMENTS)
