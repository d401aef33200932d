"""`preflight=true`: what a run would need and whether it is there. Nothing is run."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import pandas as pd

from experiments.harness.api import Need
from experiments.harness.sinks import show


def check(needs: Iterable[Need], folder: Path, device: str) -> bool:
    """Print every need and what the machine has; False where something is lacking."""
    needs = list(needs)
    rows = [
        {
            "needed for": need.what,
            "download GB": need.download / 1e9,
            "disk GB": need.disk / 1e9,
            "memory GB": need.memory / 1e9,
            "GPU memory GB": need.gpu_memory / 1e9,
            "minutes": need.minutes,
            "hub token": "needed" if need.token else "-",
        }
        for need in needs
    ]
    if rows:
        show(pd.DataFrame(rows), "needed")
    memory = _available_memory()
    gpu = _gpu_memory() if device != "cpu" else 0
    wanted_gpu = max((n.gpu_memory for n in needs), default=0)
    wanted_memory = max((n.memory for n in needs), default=0)
    verdicts = [
        *_disks([need for need in needs if need.disk], folder),
        ("memory", wanted_memory, memory, "use a smaller model, or model.sample_blocks=1 with synthetic weights"),
        ("GPU memory", wanted_gpu, gpu, "use a larger GPU or a smaller model"),
    ]
    good = True
    for what, wanted, has, remedy in verdicts:
        lacking = wanted > has
        good &= not lacking
        print(f"{what}: {wanted / 1e9:.1f} GB needed, {has / 1e9:.1f} GB there" + (f" - NOT ENOUGH: {remedy}" if lacking else ""))
    if any(n.token for n in needs) and not _has_token():
        good = False
        print("hub token: missing. The repository is gated: accept its licence on its page, then `hf auth login` or set HF_TOKEN")
    print(f"about {sum(n.minutes for n in needs):.0f} minutes")
    return good


def _disks(needs: Iterable[Need], folder: Path) -> Iterator[tuple[str, int, int, str]]:
    """A verdict for each file system: what is written to it, its needs together, its free bytes, the remedy."""
    groups: dict[int, list[Need]] = {}
    for need in needs:
        groups.setdefault(_existing(need.folder or folder).stat().st_dev, []).append(need)
    for group in groups.values():
        where = group[0].folder or folder
        settings = " or ".join(dict.fromkeys(need.setting for need in group))
        free = shutil.disk_usage(_existing(where)).free
        yield f"disk of {where}", sum(need.disk for need in group), free, f"free some, or set {settings}"


def _existing(path: Path) -> Path:
    """The folder, or the nearest above it that is there."""
    return next(there for there in (path, *path.absolute().parents) if there.exists())


def _available_memory() -> int:
    """Bytes, with what the page cache would give back."""
    found = (
        re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.M) if Path("/proc/meminfo").exists() else None
    )
    return int(found[1]) * 1024 if found else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def _gpu_memory() -> int:
    import torch

    return int(torch.cuda.mem_get_info()[0]) if torch.cuda.is_available() else 0


def _has_token() -> bool:
    if os.environ.get("HF_TOKEN"):
        return True
    try:
        from huggingface_hub import get_token
    except ModuleNotFoundError:
        return False
    return get_token() is not None
