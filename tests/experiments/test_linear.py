"""Products of one linear layer: the experiment and its figure on small shapes, and what a GPU would be asked to do."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from omegaconf import DictConfig
from torch.nn.functional import linear as product

from df11.tiled_ops import TiledWeight
from experiments import linear, peers
from experiments.config import Config
from experiments.figures import linear as linear_figure
from experiments.figures import style
from experiments.harness import runner, store
from run import EXPERIMENTS

SMALL = ("experiment=linear", "device=cpu", "bench.repeats=2", "bench.warmup=0")


@pytest.fixture
def tiled() -> tuple[torch.Tensor, TiledWeight]:
    """A matrix of 100 x 512, and compressed."""
    weights = (torch.randn(100, 512, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    weight = TiledWeight.encode(weights)
    assert weight is not None
    return weights, weight


def measured(cfg: Config, rows: int, columns: int, *batch_sizes: int) -> pd.DataFrame:
    matrix = linear.Matrix(cfg, rows, columns)
    return pd.DataFrame([row | {"batch_size": size} for size in batch_sizes for row in linear.measure(cfg, matrix, size)])


def test_linear(config: Callable[..., DictConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shapes = "bench.shapes=[[256,256],[100,512],[40,64]]"  # the last one does not get smaller
    cfg = config(*SMALL, shapes, "bench.batch_size=[1,3]", "promote=true", "promote_anyway=true")
    assert runner.run(cfg, Config, EXPERIMENTS).state == "ok"
    assert "us_fused" in capsys.readouterr().out
    table = pd.DataFrame(store.read_csv(tmp_path / "results" / "linear.csv"))
    assert set(table["model"]) == {"-"} and set(table["weights"]) == {"synthetic-normal"} and (table["value"] > 0).all()
    samples = table[table["metric"] == "us"]
    measured = samples[["rows", "batch_size", "codec", "kernel", "mode", "launch"]].value_counts()
    bf16 = {(rows, size, "bf16", "cpu", "-", "eager") for rows in ("256", "100", "40") for size in "13"}
    ways = (("cpu", "-"), ("cpu", "exact"), ("sliced", "exact"), ("cpu", "fused"), ("dispatch", "fused"))
    own = {(rows, size, "tiled", *way, "eager") for rows in ("256", "100") for size in "13" for way in ways}
    assert set(measured.index) == bf16 | own and set(measured) == {2}
    table = table[~table["kernel"].isin(["dispatch", "sliced"])]
    value = table.groupby(["metric", "rows", "batch_size", "codec", "mode"])["value"].median()
    assert value["speedup_vs_cublas", "40", "3", "bf16", "-"] == 1
    middle = value["us", "100", "1"]
    assert value["speedup_vs_cublas", "100", "1", "tiled", "fused"] == pytest.approx(middle["bf16", "-"] / middle["tiled", "fused"])
    assert 11 < value["bits_per_weight", "100", "1", "tiled", "-"] < 16
    assert set(table[table["metric"] == "rms_error_vs_cublas"]["batch_size"]) == {"1", "3"}
    style.use()
    style.save(linear_figure.draw(tmp_path / "results"), tmp_path / "figure")
    assert (tmp_path / "figure.png").stat().st_size > 5000


def test_rows_of_x_in_two_parts(config: Callable[..., DictConfig]) -> None:
    rows = measured(runner.typed(config(*SMALL, "bench.repeats=1"), Config), 64, 512, 70)
    fused = rows[(rows["mode"] == "fused") & (rows["kernel"] == "cpu")]
    assert {"us", "rms_error_vs_cublas"} <= set(fused["metric"])


def test_shares_are_of_the_copy_of_the_same_run(config: Callable[..., DictConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "timed", lambda cfg, works, count: {key: [1e-3, 3e-3, 2e-3] for key in works})
    cfg = runner.typed(config(*SMALL), Config)
    rows = measured(cfg, 256, 512, 1)
    rows = rows[~rows["kernel"].isin(["dispatch", "sliced"])]
    share = rows[rows["metric"] == "share_of_ceiling"].set_index(["codec", "mode"])["value"]
    nbytes, vectors = 2 * 256 * 512, 2 * (256 + 512)  # the copy reads and writes as much in the same time
    assert share["bf16", "-"] == pytest.approx(100 * (nbytes + vectors) / (2 * nbytes))
    stored = rows[rows["metric"] == "bits_per_weight"]["value"].item() * 256 * 512 / 8
    assert share["tiled", "fused"] == share["tiled", "exact"] == pytest.approx(100 * (stored + vectors) / (2 * nbytes))
    assert share["tiled", "-"] == pytest.approx(100 * (stored + nbytes) / (2 * nbytes))


def test_peers_are_measured_where_they_are_installed(
    config: Callable[..., DictConfig], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []

    def right(model: torch.nn.Module) -> torch.nn.Module:
        asked.append("right")
        return model

    def wrong(model: torch.nn.Module) -> torch.nn.Module:
        model[0].weight = torch.nn.Parameter(model[0].weight * 2)  # type: ignore[index]
        return model

    def broken(model: torch.nn.Module) -> torch.nn.Module:
        asked.append("broken")
        raise RuntimeError("not on this machine")

    known = {"right": ("json", right, 9), "single": ("json", lambda model: model, 1), "wrong": ("json", wrong, 9)}
    known |= {"broken": ("json", broken, 9), "absent": ("no_such_package", wrong, 9), "for no row": ("json", broken, 0)}
    monkeypatch.setattr(peers, "PEERS", known)
    sizes = iter(range(0, 1_000_000, 1000))
    monkeypatch.setattr(peers, "_allocated", lambda weights: next(sizes))
    rows = measured(runner.typed(config(*SMALL), Config), 256, 512, 1, 3)
    assert set(rows["codec"]) - {"bf16", "tiled"} == {"right", "single"}
    assert set(rows[rows["codec"] == "single"]["batch_size"]) == {1}
    right_rows = rows[rows["codec"] == "right"]
    assert set(right_rows["metric"]) == {"bits_per_weight", "us", "speedup_vs_cublas", "share_of_ceiling"}
    bits = right_rows[right_rows["metric"] == "bits_per_weight"]
    assert bits["value"].tolist() == [8 * 1000 / (256 * 512)] * 2 and bits["batch_size"].tolist() == [1, 3]
    told = capsys.readouterr().err.splitlines()
    assert [line for line in told if "wrong: no rows of 256 x 512: its product" in line] == told[::2] and len(told) == 3
    assert asked == ["right", "right", "broken"]  # once for each copy, and not again where it fails


def test_the_error_of_fused_products(tiled: tuple[torch.Tensor, TiledWeight], monkeypatch: pytest.MonkeyPatch) -> None:
    weights, weight = tiled
    monkeypatch.setattr(linear, "CHUNK", 7 * 512)  # several parts, the last one smaller
    xs = torch.randn(4, 1, 512, generator=torch.Generator().manual_seed(1)).bfloat16()
    exact = xs.double() @ weights.double().T

    def rms(products: list[torch.Tensor]) -> float:
        return float((torch.stack(products).double() - exact).square().mean().sqrt())

    expected = rms([weight.linear(x) for x in xs]) / rms([product(x, weights) for x in xs])
    assert linear.fused_error(weight.linear, weights, xs, "cpu") == pytest.approx(expected)


def test_wrong_bits_and_products_that_differ_are_errors(
    config: Callable[..., DictConfig], tiled: tuple[torch.Tensor, TiledWeight], monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, weight = tiled
    calls: list[torch.Tensor] = []

    def unsteady(x: torch.Tensor) -> torch.Tensor:
        calls.append(x)
        return product(x, weights) + len(calls)

    with pytest.raises(ValueError, match="two fused products"):
        linear.fused_error(unsteady, weights, torch.ones(1, 1, 512).bfloat16(), "cpu")
    altered = replace(weight, low=weight.low ^ 1)
    monkeypatch.setattr(TiledWeight, "encode", lambda weights: altered)
    with pytest.raises(ValueError, match="bit for bit"):
        measured(runner.typed(config(*SMALL), Config), 100, 512, 1)


# On a GPU that is played.


def test_buffers_pass_the_l2_cache(config: Callable[..., DictConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = runner.typed(config("experiment=linear"), Config)
    assert linear.copies(cfg, 100) == 2  # no GPU, whose cache one could know
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: SimpleNamespace(L2_cache_size=50))
    assert [linear.copies(cfg, nbytes) for nbytes in (300, 100, 99, 10)] == [2, 3, 3, 21]
    (need,) = linear.preflight(cfg)
    assert 6e9 < need.gpu_memory < 9e9 and need.memory == 0


def test_graphs_walk_over_all_buffers(config: Callable[..., DictConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    def events(works: Mapping[str, Callable[[], object]], warmup: int, repeats: int) -> dict[str, list[float]]:
        for work in works.values():
            work()
        return {name: [27e-6] * repeats for name in works}

    monkeypatch.setattr(linear.timing, "graph", lambda work: work)
    monkeypatch.setattr(linear.timing, "cuda_events", events)
    taken: list[int] = []
    cfg = runner.typed(config("experiment=linear", "bench.repeats=2"), Config)
    seconds = linear.timed(cfg, {("tiled", "tiled", "fused"): taken.append}, 9)
    assert taken == [*range(9)] * 3 and seconds == {("tiled", "tiled", "fused"): [pytest.approx(1e-6)] * 2}


def test_a_library_that_cannot_be_forced_has_no_rows(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    forced = []

    def prefer(name: str | None = None) -> str:
        if name == "cublaslt":
            raise RuntimeError("compiled without it")
        forced.extend([name] if name else [])
        return "default"

    monkeypatch.setattr(torch.backends.cuda, "preferred_blas_library", prefer)
    assert linear.libraries() == ["cublas"] and forced == ["cublas", "default"]
    assert "cublaslt: no rows: compiled without it" in capsys.readouterr().err
