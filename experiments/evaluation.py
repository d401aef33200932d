"""lm-eval's tasks for the losslessness experiment: as shipped from the hub, or the same definitions over small local fixtures."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import pydoc_data.topics
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lm_eval
import torch
from torch.nn.attention import sdpa_kernel

from experiments.decoding import ATTENTION

FIXTURES = Path(__file__).parent / "fixtures"
SUFFIX = "_fixture"
UNITS = {"acc": "fraction", "word_perplexity": "perplexity", "byte_perplexity": "perplexity", "bits_per_byte": "bits"}


def mmlu_rows(subject: str) -> list[dict[str, Any]]:
    """Question, choices in a shuffled order that the question decides, and the index of the right one."""
    rows, current = [], ""
    for line in (FIXTURES / "mmlu.txt").read_text().splitlines():
        if line.startswith("["):
            current = line.strip("[]")
        elif current == subject and line:
            question, right, *wrong = (part.strip() for part in line.split(" | "))
            choices = [right, *wrong]
            random.Random(question).shuffle(choices)
            rows.append({"question": question, "subject": subject, "choices": choices, "answer": choices.index(right)})
    return rows


def truthfulqa_rows() -> list[dict[str, Any]]:
    rows = []
    for line in (FIXTURES / "truthfulqa.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            question, best, true, false = (part.strip() for part in line.split(" | "))
            more, wrong = true.split(" ; "), false.split(" ; ")
            mc1 = {"choices": [best, *wrong], "labels": [1] + [0] * len(wrong)}
            mc2 = {"choices": [best, *more, *wrong], "labels": [1] * (1 + len(more)) + [0] * len(wrong)}
            rows.append({"question": question, "mc1_targets": mc1, "mc2_targets": mc2})
    return rows


def documents(first: int, count: int) -> list[str]:
    """Texts from the installed Python's own documentation, their first 1000 characters."""
    topics = pydoc_data.topics.topics
    return [topics[name][:1000] for name in sorted(topics)[first : first + count]]


def fixture(task: str, folder: Path) -> str:
    """A task file that includes the shipped definition and replaces its dataset by local files in the hub repository's shape."""
    splits: dict[str, list[dict[str, Any]]]
    if task.startswith("mmlu_"):
        rows = mmlu_rows(task.removeprefix("mmlu_"))
        if not rows:
            raise ValueError(f"there is no fixture of {task}: use eval=hub for the shipped dataset")
        splits = {"dev": rows[:5], "test": rows[5:]}
    elif task.startswith("truthfulqa_mc"):
        splits = {"validation": truthfulqa_rows()}
    elif task == "wikitext":
        splits = {split: [{"page": text} for text in documents(0, 6)] for split in ("train", "validation", "test")}
    elif task == "c4":
        splits = {split: [{"text": text} for text in documents(20, 6)] for split in ("train", "validation")}
    else:
        raise ValueError(f"there is no fixture of {task}: use eval=hub for the shipped dataset")
    files = {}
    for split, rows in splits.items():
        path = folder / f"{task}_{split}.json"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        files[split] = str(path)
    home = "mmlu/default" if task.startswith("mmlu_") else task.split("_")[0]
    shipped = Path(lm_eval.__path__[0]) / "tasks" / home / f"{task}.yaml"
    config = {"include": str(shipped), "task": task + SUFFIX, "dataset_path": "json", "dataset_name": None}
    path = folder / f"{task}{SUFFIX}.yaml"
    path.write_text(json.dumps(config | {"dataset_kwargs": {"data_files": files}}))  # JSON is YAML
    return str(path)


@sdpa_kernel(ATTENTION)
def evaluate(model: torch.nn.Module, tokenizer: Any, task: str, batch_size: int) -> dict[str, Any]:
    """lm-eval's results of one task or group, with samples."""
    from lm_eval.models.huggingface import HFLM

    # It warns at each call that a model in memory was passed, and that metrics of its own tasks have no aggregation.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()):
        harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        results = lm_eval.simple_evaluate(model=harness, tasks=[task], log_samples=True, bootstrap_iters=0)
    assert results is not None
    return dict(results)


def scores(results: dict[str, Any]) -> dict[str, float]:
    """Metrics of the task: acc, word_perplexity ..."""
    (found, *_) = results["results"].values()
    numbers = {name.split(",")[0]: value for name, value in found.items() if isinstance(value, float | int)}
    return {name: float(value) for name, value in numbers.items() if name in UNITS}


def sample_mismatches(a: dict[str, Any], b: dict[str, Any]) -> tuple[int, int]:
    """Samples whose answers or scores differ in anything, and how many there are. Both sides must have asked the same."""
    different = total = 0
    for task in a["samples"]:
        one, other = a["samples"][task], b["samples"][task]
        asked = ("doc_hash", "prompt_hash", "target_hash")
        if [[s[k] for k in asked] for s in one] != [[s[k] for k in asked] for s in other]:
            raise ValueError(f"{task}: the two models were not asked the same samples")
        different += sum(answers(x) != answers(y) for x, y in zip(one, other, strict=True))
        total += len(one)
    return different, total


def answers(sample: dict[str, Any]) -> Sequence[Any]:
    return [repr(sample[key]) for key in sorted(sample) if key not in ("doc", "arguments")]
