"""Each experiment on the tiny model, from config to table and figure."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import pandas as pd
import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_file, save_file

from df11 import checkpoint
from df11.sources import SafetensorsSource, split_units
from experiments import evaluation, first_token, load_time, losslessness, needs
from experiments.config import Config
from experiments.figures import __main__ as figures
from experiments.figures import index, style
from experiments.harness import runner, store
from run import EXPERIMENTS
from tests.test_published import EXPERTS, gemma3
from tests.test_published import make as make_one

ROOT = Path(__file__).parents[2]


@pytest.fixture
def rows(config: Callable[..., DictConfig]) -> Callable[..., pd.DataFrame]:
    def run(*overrides: str) -> pd.DataFrame:
        outcome = runner.run(config(*overrides), Config, EXPERIMENTS)
        assert outcome.state == "ok", outcome
        return pd.DataFrame(store.read_csv(Path(outcome.folder) / "rows.csv"))

    return run


def values(rows: pd.DataFrame, **where: str) -> pd.Series:
    for column, value in where.items():
        rows = rows[rows[column] == value]
    return rows.set_index("metric")["value"]


def test_compression_ratio_counts_every_byte(rows: Callable[..., pd.DataFrame]) -> None:
    table = rows("experiment=compression_ratio")
    model, compressed = values(table, scope="model"), values(table, scope="compressed")
    units = table[table["scope"] == "unit"]
    assert set(units["module"]) == {"model.embed_tokens", "model.layers.0", "model.layers.1", "lm_head"}
    assert set(table["weights"]) == {"random"} and set(table["blocks"]) == {"all"}
    assert model["weight_mismatches"] == 0
    for metric in ("original_bytes", "compressed_bytes", "gaps_bytes", "weights"):
        assert compressed[metric] == units[units["metric"] == metric]["value"].sum()
    norms = 2 * 5 * 128
    assert model["uncompressed_bytes"] == norms == model["original_bytes"] - compressed["original_bytes"]
    parts = [
        m for m in model.index if m.endswith("_bytes") and m.split("_")[0] not in ("original", "compressed", "peak", "largest")
    ]
    assert sum(model[parts]) == model["compressed_bytes"]
    assert model["bits_per_weight"] == pytest.approx(model["entropy_bound_bits"] + model["overhead_bits"])
    assert 10.4 < compressed["entropy_bound_bits"] < compressed["bits_per_weight"] < 11.2


def test_compression_ratio_of_bf16_is_100_percent(rows: Callable[..., pd.DataFrame]) -> None:
    assert values(rows("experiment=compression_ratio", "codec=bf16"), scope="model")["ratio_percent"] == 100


def test_compression_ratio_of_the_tiled_layout(rows: Callable[..., pd.DataFrame]) -> None:
    model = values(rows("experiment=compression_ratio", "codec=tiled"), scope="model")
    assert model["weight_mismatches"] == 0 and 11 < model["bits_per_weight"] < 13  # small matrices: the table weighs


def test_a_sample_of_blocks_stands_for_all(rows: Callable[..., pd.DataFrame]) -> None:
    geometry = ["model=llama3_1_8b_synthetic", "model.geometry.hidden_size=64", "model.geometry.intermediate_size=128"]
    geometry += ["model.geometry.num_attention_heads=2", "model.geometry.num_key_value_heads=1", "model.geometry.head_dim=32"]
    table = rows("experiment=compression_ratio", *geometry, "model.geometry.vocab_size=256")
    assert set(table["blocks"]) == {"1 of 32"} and set(table["weights"]) == {"synthetic-normal"}
    block = values(table, module="model.layers.0")
    assert block["repeats"] == 32
    ends = sum(values(table, module=m)["compressed_bytes"] for m in ("model.embed_tokens", "lm_head"))
    assert values(table, scope="compressed")["compressed_bytes"] == 32 * block["compressed_bytes"] + ends


def test_compression_ratio_resumes_to_the_same_table(config: Callable[..., DictConfig]) -> None:
    cfg = runner.typed(config("experiment=compression_ratio"), Config)
    module = runner.find(cfg.experiment, EXPERIMENTS)
    whole = {p.key: p.rows for p in module.run(cfg, {})}
    begun = {key: whole[key] for key in list(whole)[:2]}
    resumed = begun | {p.key: p.rows for p in module.run(cfg, begun)}
    assert list(resumed) == list(whole)

    def deterministic(points: dict[str, list[dict]]) -> list[tuple]:
        return [(r["module"], r["metric"], r["value"]) for rows in points.values() for r in rows if "memory" not in r["metric"]]

    for ours, theirs in zip(deterministic(resumed), deterministic(whole), strict=True):
        assert ours[:2] == theirs[:2] and ours[2] == pytest.approx(theirs[2], rel=1e-12)


def test_exponent_entropy(rows: Callable[..., pd.DataFrame]) -> None:
    table = rows("experiment=exponent_entropy")
    blocks = table[table["scope"] == "block"]
    entropy = blocks[blocks["metric"] == "entropy_bits"].set_index("field")["value"]
    assert entropy["sign"] == pytest.approx(1, abs=0.01) and entropy["mantissa"] == pytest.approx(6.97, abs=0.02)
    assert 2.4 < entropy["exponent"] < 2.7
    frequency = blocks[blocks["metric"] == "relative_frequency"]
    assert frequency["value"].sum() == pytest.approx(1) and frequency["value"].is_monotonic_decreasing


def test_compression_time(rows: Callable[..., pd.DataFrame]) -> None:
    table = rows("experiment=compression_time", "bench.repeats=2")
    speed = table[table["metric"] == "mb_per_s_bf16"]
    assert list(speed[speed["kernel"] == "cpu"]["threads"]) == ["1", "1", "2", "2"]
    assert len(speed[speed["kernel"] == "released"]) == 1 and (speed["value"] > 0).all()


# Figures.


def test_every_figure_draws_from_the_committed_results(tmp_path: Path) -> None:
    style.use()
    for name, draw in figures.FIGURES.items():
        style.save(draw(ROOT / "results"), tmp_path / name)
        assert (tmp_path / f"{name}.pdf").stat().st_size > 5000 and (tmp_path / f"{name}.png").stat().st_size > 5000


def test_the_index_has_every_table_and_where_it_is_from(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "results" / "provenance", tmp_path / "provenance")
    page = (ROOT / "results" / "README.md").read_text()
    (tmp_path / "README.md").write_text(re.sub(r"[^|]*\|$", " - |", page, flags=re.M))
    index.stamp(tmp_path)
    lines = {found[1]: line for line in (tmp_path / "README.md").read_text().splitlines() if (found := index.LINE.match(line))}
    assert lines.keys() == {path.stem for path in (ROOT / "results").glob("*.csv")} >= figures.FIGURES.keys()
    assert all(re.search(r" \| (\w.*: [0-9a-f]{7}[^|]*)+ \|$", line) for line in lines.values())
    assert all(line in page.splitlines() for line in lines.values())


def test_figures_refuse_missing_and_ambiguous_rows(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="promote=true"):
        style.load(tmp_path, "compression_ratio")
    frame = pd.DataFrame([{"model": "m", "run_id": "a", "metric": "x", "value": 1}] * 2)
    with pytest.raises(ValueError, match="ambiguous"):
        style.one(frame, model="m")
    with pytest.raises(ValueError, match="no rows"):
        style.one(frame, model="n")


def test_decompression(rows: Callable[..., pd.DataFrame]) -> None:
    table = rows("experiment=decompression", "device=cpu", "bench.shapes=[[40,64]]", "bench.repeats=2", "bench.warmup=0")
    assert set(zip(table["unit_kind"], table["rows"], table["columns"], strict=True)) == {
        ("matrix", "40", "64"),
        ("block", "1536", "128"),
    }
    speed = table[table["metric"] == "gb_per_s_bf16_output"]
    assert set(speed["kernel"]) == {"copy", "cpu"} and (speed["value"] > 0).all()


def test_losslessness(rows: Callable[..., pd.DataFrame]) -> None:
    geometry = "model.geometry.vocab_size=256"
    for overrides in ((), ("model=llama3_1_8b_synthetic", "model.sample_blocks=0", geometry, "model.geometry.num_hidden_layers=1")):
        small = [f"model.geometry.{k}=256" for k in ("hidden_size", "intermediate_size")] if overrides else []
        heads = [f"model.geometry.{k}=4" for k in ("num_attention_heads", "num_key_value_heads")] if overrides else []
        sizes = ["model.geometry.head_dim=16"] if overrides else []
        table = rows("experiment=losslessness", *overrides, *small, *heads, *sizes)
        different = table[table["metric"].str.endswith("mismatches")]
        assert len(different) == 1 + 3 * 2 * 4 + 1 + 2 * 4 and set(different["mode"]) == {"exact", "fused"}
        assert (different[different["mode"] == "exact"]["value"] == 0).all()
        assert (table[table["metric"] == "compared"]["value"] > 0).all()


@pytest.mark.parametrize("fresh", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_load_time(rows: Callable[..., pd.DataFrame], monkeypatch: pytest.MonkeyPatch, fresh: bool) -> None:
    if not fresh:
        monkeypatch.setattr(load_time, "measure", first_token.measure)  # in this process
    table = rows("experiment=load_time", "bench.repeats=2")
    timed = table[table["metric"] == "total_s"]
    assert sorted(zip(timed["codec"], timed["mode"], timed["cache"], timed["repeat"], strict=True)) == [
        (codec, mode, cache, repeat)
        for codec, mode in (("bf16", "exact"), ("dfloat11", "exact"), ("tiled", "fused"))
        for cache in ("cold", "warm")
        for repeat in ("0", "1")
    ]
    assert (timed["value"] > 0).all()
    sizes = table[table["metric"] == "file_bytes"].set_index("codec")["value"]
    assert 0.6 < sizes["dfloat11"] / sizes["bf16"] < 0.75 and sizes["tiled"] == sizes["dfloat11"]
    assert set(table["metric"]) > {"import_s", "load_s", "first_token_s", "read_s", "compress_s", "compress_gb_per_s", "verify_s"}


def test_load_time_wants_one_first_token_of_what_is_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def measure(directory: Path, device: str, mode: str) -> dict[str, Any]:
        asked.append(mode)
        return dict.fromkeys(load_time.TIMES, 1.0) | {"token": tokens[mode], "peak_memory_bytes": 7}

    monkeypatch.setattr(load_time, "measure", measure)
    loaded = [(tmp_path, "exact"), (tmp_path, "fused")]
    tokens = {"exact": 1, "fused": 2}
    found = load_time.turn(loaded, "cpu")
    assert {one for one, _ in found} == {*loaded} and asked == ["exact"] * 2 + ["fused"] * 2
    assert [row["value"] for _, row in found if row["metric"] == "peak_memory_bytes"] == [7] * 4
    monkeypatch.setattr(load_time, "measure", lambda *which: measure(*which) | {"token": len(asked)})
    with pytest.raises(ValueError, match="the first token is not the same"):
        load_time.turn(loaded, "cpu")


def test_load_time_makes_synthetic_checkpoints(config: Callable[..., DictConfig], tmp_path: Path) -> None:
    geometry = ["model.geometry.hidden_size=64", "model.geometry.intermediate_size=64", "model.geometry.vocab_size=256"]
    geometry += ["model.geometry.num_attention_heads=4", "model.geometry.num_key_value_heads=4", "model.geometry.head_dim=16"]
    cfg = runner.typed(config("experiment=load_time", "model=llama3_1_8b_synthetic", "model.sample_blocks=0", *geometry), Config)
    directory, weights, _ = load_time.bf16(cfg, tmp_path / "bf16")
    assert weights == "synthetic-normal" and len(list(load_time.compress(directory, tmp_path / "dfloat11"))) == 3


@pytest.mark.parametrize(("name", "share"), [("compression_ratio", 1), ("load_time", 1.7), ("losslessness", 1.7)])
def test_checkpoints_are_counted_and_made_below_the_cache(
    config: Callable[..., DictConfig], tmp_path: Path, name: str, share: float
) -> None:
    cfg = runner.typed(config(f"experiment={name}", f"cache_dir={tmp_path}/cache"), Config)
    asked = [need for need in runner.find(name, EXPERIMENTS).preflight(cfg) if need.disk]
    assert {(need.folder, need.setting) for need in asked} == {(tmp_path / "cache", "cache_dir")}
    size = sum(tensor.nbytes for tensor in needs.tensors_of(cfg.model))
    assert sum(need.disk for need in asked) == pytest.approx(share * size)
    with needs.scratch(cfg) as folder:
        assert Path(folder).parent == tmp_path / "cache"
    hub = runner.typed(config(f"experiment={name}", "model=llama3_1_8b"), Config)
    assert next(need.setting for need in runner.find(name, EXPERIMENTS).preflight(hub) if need.disk) == "HF_HOME"


@pytest.mark.parametrize(("name", "files"), [("load_time", {"first_token.py"}), ("losslessness", {"mmlu.txt", "truthfulqa.txt"})])
def test_the_run_id_follows_files_that_no_import_tells(
    config: Callable[..., DictConfig], monkeypatch: pytest.MonkeyPatch, name: str, files: set[str]
) -> None:
    hashed: list[Path] = []
    monkeypatch.setattr(runner.provenance, "hash_files", hashed.extend)
    runner.run_id(runner.typed(config(f"experiment={name}"), Config), runner.find(name, EXPERIMENTS), "-")
    assert {path.name for path in hashed if path.exists()} >= files | {"timing.py", "tiled.cu", "fused.py", "needs.py"}


@pytest.fixture
def published(tmp_path: Path) -> Callable[[str], Path]:
    def make(name: str) -> Path:
        if name == "gemma3":
            return gemma3(tmp_path / name)
        if name == "t5":
            sizes = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
            return make_one(tmp_path / name, "T5ForConditionalGeneration", "t5", **sizes)
        if name == "bert":
            return make_one(tmp_path / name, "BertForMaskedLM", "bert")
        return make_one(tmp_path / name, "Qwen3MoeForCausalLM", "qwen3_moe", **EXPERTS)

    return make


@pytest.mark.parametrize("name", ["gemma3", "qwen3_moe", "t5", "bert"])
def test_losslessness_of_any_class(rows: Callable[..., pd.DataFrame], published: Callable[[str], Path], name: str) -> None:
    path = ["model=path", f"model.path={published(name)}", "eval=none", "bench.modes=[exact]"]
    table = rows("experiment=losslessness", *path)
    different = table[table["metric"].str.endswith("mismatches")]
    assert (different["value"] == 0).all() and len(different) == (1 + 3 * 2 * (1 if name == "bert" else 4))
    assert (table[table["metric"] == "compared"]["value"] > 0).all()


def test_where_nothing_is_compressed_nothing_is_proved(config: Callable[..., DictConfig], published: Callable[[str], Path]) -> None:
    """Weights that are not bf16."""
    file = published("qwen3_moe") / "model.safetensors"
    save_file({name: tensor.float() for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    reasons = {"losslessness": "equal outputs would prove nothing", "load_time": "no measure of compressed weights"}
    for experiment, told in reasons.items():
        given = config(f"experiment={experiment}", "model=path", f"model.path={file.parent}", "eval=none", "bench.modes=[exact]")
        outcome = runner.run(given, Config, EXPERIMENTS)
        assert outcome.state == "failed" and told in (Path(outcome.folder) / "ERROR.txt").read_text()


@pytest.mark.parametrize("name", ["gemma3", "qwen3_moe"])
def test_what_is_compressed_is_what_compression_ratio_counts(published: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    directory = published(name)
    units, _ = split_units(SafetensorsSource(directory).tensors())
    checkpoint.compress(directory, tmp_path / "compressed")
    done = {row["name"] for row in checkpoint.summary(tmp_path / "compressed") if row["compressed"] or row["why"] == "no gain"}
    assert done == {tensor.name for unit in units for tensor in unit.tensors}


def test_losslessness_counts_what_differs() -> None:
    a = torch.tensor([1.0, -0.0, float("nan")]).bfloat16()
    assert losslessness.differing(a, a.clone()) == 0
    assert losslessness.differing(a, torch.tensor([1.0, 0.0, float("nan")]).bfloat16()) == 1
    assert losslessness.differing(torch.ones(2, dtype=torch.int64), torch.ones(3, dtype=torch.int64)) == 3


def test_fixtures_have_the_hub_repositories_shape(tmp_path: Path) -> None:
    tasks = OmegaConf.load(ROOT / "conf" / "eval" / "fixtures.yaml").tasks
    for task in tasks:
        config = json.loads(Path(evaluation.fixture(task, tmp_path)).read_text())
        assert Path(config["include"]).exists() and config["task"].endswith("_fixture")
        files = config["dataset_kwargs"]["data_files"]
        counts = {split: len(Path(file).read_text().splitlines()) for split, file in files.items()}
        if task.startswith("mmlu"):
            assert counts == {"dev": 5, "test": 10}
            rows = [json.loads(line) for line in Path(files["test"]).read_text().splitlines()]
            assert len({row["answer"] for row in rows}) > 1 and all(len(set(row["choices"])) == 4 for row in rows)
        if task.startswith("truthfulqa"):
            assert counts == {"validation": 10}
    with pytest.raises(ValueError, match="eval=hub"):
        evaluation.fixture("mmlu_anatomy", tmp_path)


def test_all_shipped_mmlu_subjects_resolve() -> None:
    from lm_eval.tasks import TaskManager

    tasks = TaskManager()
    subjects = {Path(file).stem for file in (Path(lm_eval.__path__[0]) / "tasks" / "mmlu" / "default").glob("mmlu_*.yaml")}
    assert len(subjects) == 57 and subjects <= set(tasks.all_tasks)
    assert set(OmegaConf.load(ROOT / "conf" / "eval" / "hub.yaml").tasks) <= set(tasks.all_tasks)


def test_samples_that_differ_are_counted() -> None:
    def results(*answers: float) -> dict[str, object]:
        asked = {"doc_hash": "a", "prompt_hash": "b", "target_hash": "c"}
        return {"samples": {"t": [asked | {"resps": [[(a, False)]], "acc": 0.0} for a in answers]}}

    assert evaluation.sample_mismatches(results(1.0, 2.0), results(1.0, 2.0)) == (0, 2)
    assert evaluation.sample_mismatches(results(1.0, 2.0), results(1.0, 2.5)) == (1, 2)


@pytest.mark.slow
def test_the_shipped_mmlu_asks_all_subjects(
    rows: Callable[..., pd.DataFrame], monkeypatch: pytest.MonkeyPatch, tokenizer: Any
) -> None:
    """What `eval=hub` runs, its 57 datasets replaced by a question each where they would be fetched."""
    fetched = []

    def fetch(path: str, name: str, **options: object) -> datasets.DatasetDict:
        fetched.append((path, name))
        question = {"question": f"What is {name}?", "subject": name, "choices": ["this", "that", "both", "none"], "answer": 1}
        return datasets.DatasetDict({split: datasets.Dataset.from_list([question]) for split in ("dev", "test", "validation")})

    monkeypatch.setattr(datasets, "load_dataset", fetch)
    monkeypatch.setattr(losslessness.hf, "tokenizer", lambda directory: tokenizer)
    table = rows("experiment=losslessness", "eval=hub", "eval.tasks=[mmlu]", "eval.batch_size=32")
    subjects = {file.stem for file in (Path(lm_eval.__path__[0]) / "tasks" / "mmlu" / "default").glob("mmlu_*.yaml")}
    assert set(fetched) == {("cais/mmlu", name.removeprefix("mmlu_")) for name in subjects} and len(subjects) == 57
    asked = table[table["phase"] == "lm_eval"].set_index(["codec", "metric"])["value"]
    assert asked["dfloat11", "compared"] == 57 and asked["dfloat11", "sample_mismatches"] == 0
    assert asked["bf16", "acc"] == asked["dfloat11", "acc"]


@pytest.mark.slow
def test_losslessness_with_lm_eval(rows: Callable[..., pd.DataFrame], monkeypatch: pytest.MonkeyPatch, tokenizer: Any) -> None:
    """The tiny model with a tokenizer of bytes."""
    monkeypatch.setattr(losslessness.hf, "tokenizer", lambda directory: tokenizer)
    tasks = "[mmlu_astronomy,truthfulqa_mc2,c4]"
    table = rows("experiment=losslessness", "eval=fixtures", f"eval.tasks={tasks}", "eval.batch_size=16")
    asked = table[table["phase"] == "lm_eval"]
    assert set(asked["task"]) == {"mmlu_astronomy_fixture", "truthfulqa_mc2_fixture", "c4_fixture"}
    different = asked[asked["metric"] == "sample_mismatches"]
    assert set(different["mode"]) == {"exact", "fused"} and len(different) == 6
    assert (different[different["mode"] == "exact"]["value"] == 0).all()
    scores = asked[asked["metric"].isin(losslessness.SCORES)].pivot(index="task", columns="codec", values="value")
    assert len(scores) == 3 and (scores["bf16"] == scores["dfloat11"]).all()
