"""Decoding under a memory budget: on the CPU, and with a GPU's answers put in its place."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import transformers
from omegaconf import DictConfig

from df11 import hf, modules
from experiments import budget, generation_length, offload
from experiments.budget import MIB, Budget, Sizes
from experiments.config import Config
from experiments.decoding import Decoder
from experiments.figures import generation_length as generation_length_figure
from experiments.figures import offload as offload_figure
from experiments.figures import style
from experiments.harness import runner, store
from run import EXPERIMENTS

ROOT = Path(__file__).parents[2]
ON_CPU = ["bf16_resident", "dfloat11_resident", "dfloat11_resident_layer", "bf16_offload", "dfloat11_offload"]
SHORT = ["bench.warmup=1", "bench.tokens=1", "bench.repeats=2"]
OFFLOAD = ["experiment=offload", *SHORT, "bench.batch_size=[1,3]"]
LENGTHS = ["experiment=generation_length", "bench.lengths=[16,64,200]"]

Configure = Callable[..., DictConfig]


def typed(config: Configure, *overrides: str) -> Any:
    return runner.typed(config(*overrides), Config)


def rows(config: Configure, *overrides: str) -> pd.DataFrame:
    outcome = runner.run(config(*overrides), Config, EXPERIMENTS)
    assert outcome.state == "ok", outcome
    return pd.DataFrame(store.read_csv(Path(outcome.folder) / "rows.csv"))


class Card(Budget):
    """A GPU's answers: what it had at most is what it is told."""

    peak = 0

    def peaks(self) -> dict[str, int]:
        names = ("peak_allocated_bytes", "peak_reserved_bytes", "process_peak_bytes", "context_bytes", "limit_bytes")
        return dict.fromkeys(names, Card.peak) | {"context_bytes": self.context}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU's part of both experiments, on the CPU."""
    build = budget.build

    def on_cpu(cfg: Config, codec: str, **settings: bool) -> transformers.PreTrainedModel:
        cfg.device.name = "cpu"
        try:
            return build(cfg, codec)
        finally:
            cfg.device.name = "cuda"

    @contextmanager
    def enforce(memory_mib: int) -> Iterator[Budget]:
        yield Card(memory_mib * MIB, 0)

    monkeypatch.setattr(budget, "build", on_cpu)
    monkeypatch.setattr(budget, "enforce", enforce)
    monkeypatch.setattr(budget, "release", lambda: None)
    monkeypatch.setattr(offload, "transfer", lambda pinned: [7.0, 8.0])
    monkeypatch.setattr(offload, "map_devices", lambda model, gpu, host: {"": "cpu"})
    monkeypatch.setattr(offload, "activations", lambda cfg: 40 * MIB - 1_500_000)  # that many are left for 2.1 million
    for name in ("synchronize", "reset_peak_memory_stats", "memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda: 1)


def points(module: Any, cfg: Any) -> dict[str, list[dict[str, Any]]]:
    return {point.key: point.rows for point in module.run(cfg, {})}


def results(tmp_path: Path, module: Any, cfg: Any) -> Path:
    """results/ with the experiment's rows as if promoted, and the published tables."""
    fixed = {"experiment": cfg.experiment, "run_id": "test", "model": cfg.model.name, "gpu": "test", "gpus": 1}
    found = [store.complete(row, fixed, module.AXES) for rows in points(module, cfg).values() for row in rows]
    folder = tmp_path / "figures"
    shutil.copytree(ROOT / "results" / "paper", folder / "paper")
    (folder / f"{cfg.experiment}.csv").write_text(store.to_csv(found, list(found[0])))
    return folder


def drawn(draw: Callable[[Path], Any], results: Path, path: Path) -> None:
    style.use()
    style.save(draw(results), path)
    assert path.with_suffix(".png").stat().st_size > 5000


# offload


def test_offload_decodes_the_same_wherever_the_weights_are(config: Configure) -> None:
    table = rows(config, *OFFLOAD, "device=cpu", f"bench.variants=[{','.join(ON_CPU)}]")
    for metric in ("ids_crc32", "logits_crc32"):
        own = table[table["metric"] == metric]
        assert len(own) == len(ON_CPU) * 2 * 2
        assert (own.groupby(["batch_size", "repeat"])["value"].nunique() == 1).all()
    assert set(table["memory_mib"]) == {"-"} and set(table["weights"]) == {"random"}
    seconds = table[table["metric"] == "s_per_step"]
    assert len(seconds) == len(ON_CPU) * 2 * 2 and (seconds["value"] > 0).all()
    moved = table[table["metric"] == "blocks_offloaded"]
    assert set(moved["placement"]) == {"offload"} and set(moved["host_memory"]) == {"pinned"} and (moved["value"] == 1).all()


def test_offload_goes_on_after_the_points_it_has(config: Configure) -> None:
    cfg = typed(config, *OFFLOAD, "device=cpu", "bench.variants=[bf16_resident,dfloat11_resident]")
    whole = points(offload, cfg)
    begun = {key: whole[key] for key in list(whole)[:3]}
    (last,) = offload.run(cfg, begun)
    assert last.key == "dfloat11_resident, batch 3" == list(whole)[-1]
    for row in begun["bf16_resident, batch 3"]:
        row["value"] += row["metric"] == "logits_crc32" and row["repeat"] == 1
    with pytest.raises(ValueError, match=r"dfloat11_resident, batch 3: the logits of repeat 1 are not"):
        list(offload.run(cfg, begun))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["bench.variants=[bf16_acelerate]"], "did you mean 'bf16_accelerate'"),
        (["bench.variants=[bf16_accelerate]"], "needs device=cuda"),
        (["bench.variants=[bf16_resident]", "bench.tokens=0"], "1 at least"),
        (["bench.variants=[bf16_resident]", "device=cuda", "bench.memory_mib=0"], "the budget"),
        (["model=llama3_1_8b"], "take llama3_1_8b_synthetic"),
    ],
)
def test_offload_refuses_what_it_cannot_measure(config: Configure, overrides: list[str], message: str) -> None:
    cfg = typed(config, *OFFLOAD, *([] if "device=cuda" in overrides else ["device=cpu"]), *overrides)
    with pytest.raises(ValueError, match=message):
        next(offload.run(cfg, {}))


def test_as_few_blocks_as_possible_are_offloaded() -> None:
    sizes = Sizes(model=1000, block=100, blocks=8, kv_per_token=1)
    assert offload.blocks_to_offload(sizes, 999) == 3  # one byte is lacking, and two buffers are needed
    assert offload.blocks_to_offload(sizes, 400) == 8
    with pytest.raises(ValueError, match="nothing would be offloaded"):
        offload.blocks_to_offload(sizes, 1000)
    with pytest.raises(ValueError, match="all 8 blocks"):
        offload.blocks_to_offload(sizes, 399)


def test_sizes_and_activations(config: Configure) -> None:
    cfg = typed(config, *OFFLOAD, "device=cpu")
    sizes = Sizes.of(cfg.model)
    model = budget.build(cfg, "bf16")
    assert sizes.model == sum(p.nbytes for p in model.parameters())
    assert sizes.block == sum(p.nbytes for p in model.model.layers[0].parameters() if p.dim() > 1) and sizes.blocks == 2
    assert sizes.kv_per_token == 2 * 2 * 2 * 32 * 2  # layers, keys and values, heads, size of a head, bytes
    assert offload.length(cfg) == 1 + 1 + 2 * 1
    assert offload.activations(cfg) == 3 * (4 * (512 + 256 * 2) + 8 * 1024) + offload.RESERVE


def test_accelerate_offloads_what_does_not_fit(config: Configure) -> None:
    cfg = typed(config, *OFFLOAD, "device=cpu")
    model = budget.build(cfg, "bf16")
    size = Sizes.of(cfg.model).model
    device_map = offload.map_devices(model, 1_100_000, size)
    assert device_map["model.embed_tokens"] == 0 and device_map["model.layers.1"] == "cpu" == device_map["lm_head"]
    with pytest.raises(ValueError, match="change bench"):
        offload.map_devices(model, 2 * size, size)


def test_offload_with_a_budget(config: Configure, gpu: None, tmp_path: Path) -> None:
    """Accelerate's hooks apart, which need a GPU."""
    cfg = typed(
        config,
        *OFFLOAD,
        "device=cuda",
        "model.geometry.num_hidden_layers=4",
        "bench.memory_mib=872",
        "bench.variants=[bf16_accelerate,dfloat11_resident,bf16_offload,dfloat11_offload]",
    )
    folder = results(tmp_path, offload, cfg)
    table = pd.DataFrame(store.read_csv(folder / "offload.csv"))
    point = table[(table["placement"] == "accelerate") & (table["batch_size"] == "3")]
    assert set(point["host_memory"]) == {"pageable"} and set(point["memory_mib"]) == {"872"}
    wanted = {"fraction_offloaded", "host_to_device_gb_per_s", "peak_allocated_bytes", "peak_reserved_bytes", "process_peak_bytes"}
    assert wanted | {"resident_bytes", "manifest_bytes", "buffer_bytes", "gpu_bytes", "host_bytes"} <= set(point["metric"])
    assert len(point[point["metric"] == "tokens_per_s"]) == 2
    blocks = table[table["metric"] == "blocks_offloaded"]
    assert set(blocks["codec"]) == {"bf16", "dfloat11"} and blocks["value"].nunique() == 1
    short = offload.table(table, cfg)
    assert (short[short["placement"] == "accelerate"]["times_accelerate"] == 1).all() and len(short) == 8
    drawn(offload_figure.draw, folder, tmp_path / "offload")


# generation_length


def test_generation_length_decodes_the_same(config: Configure) -> None:
    table = rows(config, *LENGTHS, "device=cpu")
    digests = table[table["metric"].str.endswith("crc32")]
    assert len(digests) == 3 * 3 * 2
    exact = digests[digests["mode"] == "exact"]
    assert set(exact["codec"]) == {"bf16", "dfloat11"} and (exact.groupby(["metric", "tokens"])["value"].nunique() == 1).all()
    tiled = table[table["codec"] == "tiled"]
    assert set(tiled[["mode", "kernel", "granularity"]].itertuples(index=False, name=None)) == {("fused", "cpu", "-")}
    stored = table[table["metric"] == "weight_bytes"].set_index("codec")["value"]
    assert stored["dfloat11"] != stored["tiled"] < 0.8 * stored["bf16"]
    assert set(table[table["tokens"] != "-"]["cache"]) == {"filled"} and "max_tokens" not in set(table["metric"])


def test_generation_length_compares_what_is_exact(config: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = typed(config, *LENGTHS, "device=cpu")
    begun = points(generation_length, cfg)
    for changed in ("tiled", "dfloat11"):
        (row,) = (row for row in begun[changed] if (row["metric"], row.get("tokens")) == ("logits_crc32", 64))
        row["value"] += 1
        if changed == "tiled":
            assert not list(generation_length.run(cfg, begun))
    with pytest.raises(ValueError, match="logits differ between codecs after 64 tokens"):
        list(generation_length.run(cfg, begun))
    cfg.bench.modes = ["fused"]
    assert list(points(generation_length, cfg)) == ["bf16", "tiled"]


def test_a_filled_cache_decodes_as_transformers_own(config: Configure) -> None:
    cfg = typed(config, *LENGTHS, "device=cpu")
    model = budget.build(cfg, "bf16")
    tokens, steps = 20, generation_length.STEPS
    ours, theirs = Decoder(model, 1, tokens), Decoder(model, 1, tokens)
    ours.cache, theirs.cache = generation_length.filled(cfg, ours.device, tokens), transformers.DynamicCache()
    for index, layer in enumerate(ours.cache.layers):
        keys, values = layer.memory[:, :, :, : tokens - steps]
        theirs.cache.update(keys.clone(), values.clone(), index)
    assert ours.cache.get_seq_length() == theirs.cache.get_seq_length() == tokens - steps
    for _ in range(steps):
        ours.step()
        theirs.step()
        assert torch.equal(ours.logits, theirs.logits) and torch.equal(ours.ids, theirs.ids)
    assert ours.cache.get_seq_length() == tokens


@pytest.mark.parametrize("limit", [64, 65, 127, 128, 300, 511])
def test_the_last_that_fits(limit: int) -> None:
    tried: list[int] = []

    def fits(tokens: int) -> bool:
        tried.append(tokens)
        return tokens <= limit

    assert generation_length.last_that_fits(fits, 0, 512, 64) == limit // 64 * 64
    assert len(tried) == len(set(tried)) <= 3 and all(0 < tokens < 512 for tokens in tried)


def test_generation_length_finds_where_memory_ends(
    config: Configure, gpu: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The card takes weights, buffers, 1 MB and the cache."""
    cfg = typed(config, *LENGTHS, "bench.lengths=[16,64,192,512]", "device=cuda", "bench.memory_mib=34")
    decode, kv = generation_length.decode, Sizes.of(cfg.model).kv_per_token
    most = {"bf16": 320, "dfloat11": 384, "tiled": 448}

    def decode_or_fail(model: torch.nn.Module, cfg: Config, tokens: int, limits: Budget | None = None) -> Any:
        own = most["tiled" if hf.is_fused(model) else "dfloat11" if modules.is_compressed(model) else "bf16"]
        if tokens > own:
            raise torch.cuda.OutOfMemoryError("full")
        Card.peak = Budget(34 * MIB, 0).limit - (own - tokens) * kv
        return decode(model, cfg, tokens, limits)

    monkeypatch.setattr(generation_length, "decode", decode_or_fail)
    folder = results(tmp_path, generation_length, cfg)
    table = pd.DataFrame(store.read_csv(folder / "generation_length.csv"))
    for codec, expected in most.items():
        own = table[(table["codec"] == codec) & (table["tokens"] == "-")].set_index("metric")["value"]
        assert own["max_tokens"] == own["predicted_tokens"] == expected
    assert set(table["tokens"]) == {"-", "16", "64", "192", "320", "384", "448"}
    assert dict(generation_length.table(table, cfg).set_index("codec")["times_bf16"]) == {"bf16": 1, "dfloat11": 1.2, "tiled": 1.4}
    labels = [line.get_label() for line in generation_length_figure.draw(folder).axes[0].get_lines()]
    assert "tiled, fused: 448 tokens" in labels
    drawn(generation_length_figure.draw, folder, tmp_path / "generation_length")
    alone = table[table["codec"] != "dfloat11"]  # as with bench.modes=[fused]
    (folder / "generation_length.csv").write_text(store.to_csv(alone.to_dict("records"), list(alone)))
    drawn(generation_length_figure.draw, folder, tmp_path / "alone")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["bench.lengths=[64,16]"], "ascending"),
        (["bench.batch_size=[1,2]"], "one sequence"),
        (["bench.modes=[fussed]"], "choose from exact, fused"),
        (["model=gemma3_4b_synthetic"], "sliding window"),
        (["device=cuda", "bench.memory_mib=0"], "the budget"),
    ],
)
def test_generation_length_refuses_what_it_cannot_measure(config: Configure, overrides: list[str], message: str) -> None:
    cfg = typed(config, *LENGTHS, *([] if "device=cuda" in overrides else ["device=cpu"]), *overrides)
    with pytest.raises(ValueError, match=message):
        next(generation_length.run(cfg, {}))
