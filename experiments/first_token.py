"""One measurement of experiment=load_time, a process of its own: python -m experiments.first_token DIRECTORY DEVICE MODE

Prints one line of JSON: the seconds of importing (with the device's context), of loading, of the first token, the token, and on a
GPU the most bytes that torch had allocated.
"""

from __future__ import annotations

import json
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

PROMPT = 16  # tokens


def measure(directory: Path, device: str, mode: str) -> dict[str, Any]:
    times = [time.perf_counter()]
    import torch

    from df11 import hf

    torch.zeros(1, device=device)  # makes the context
    times.append(time.perf_counter())
    model = hf.load(directory, device, mode)
    if device == "cuda":
        torch.cuda.synchronize()
    times.append(time.perf_counter())
    with torch.inference_mode():
        logits = model(torch.arange(PROMPT, device=device)[None]).logits
        token = int(logits[0, -1].argmax())
    times.append(time.perf_counter())
    names = ("import_s", "load_s", "first_token_s")
    peak = {"peak_memory_bytes": torch.cuda.max_memory_allocated()} if device == "cuda" else {}
    return {name: after - before for name, (before, after) in zip(names, pairwise(times), strict=True)} | {"token": token} | peak


if __name__ == "__main__":
    print(json.dumps(measure(Path(sys.argv[1]), sys.argv[2], sys.argv[3])))
