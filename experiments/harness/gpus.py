"""One GPU for each process of a machine."""

from __future__ import annotations

import fcntl
import os
import subprocess
import tempfile
from pathlib import Path
from typing import IO

_held: list[IO[str]] = []  # locks go with the process, however it ends


class NoGpuFree(Exception):
    """Every GPU is another process's."""


def claim(folder: Path | None = None) -> str:
    """Take a GPU that no other process has claimed: it alone is left in CUDA_VISIBLE_DEVICES. To be called before CUDA starts.

    A worker that runs one job after another keeps its GPU, because CUDA does not read the variable twice: so GPUs are claimed by
    processes and not counted off by job numbers. `folder`: where the locks are, by default a temporary one of the user. Raises
    NoGpuFree. Returns the GPU's number.
    """
    if _held:
        return os.environ["CUDA_VISIBLE_DEVICES"]
    folder = folder or Path(tempfile.gettempdir()) / f"df11-gpus-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    numbers = _visible()
    for number in numbers:
        file = (folder / f"{number}.lock").open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            continue
        _held.append(file)
        os.environ["CUDA_VISIBLE_DEVICES"] = number
        return number
    raise NoGpuFree(f"one_gpu=true: {len(numbers)} GPUs are in sight and all are taken: start no more jobs at once than that")


def _visible() -> list[str]:
    if (chosen := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [number for number in chosen.split(",") if number]
    try:
        listed = subprocess.check_output(["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"], text=True)
    except (OSError, subprocess.CalledProcessError):
        listed = ""
    return listed.split()
