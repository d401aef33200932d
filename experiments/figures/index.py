"""The commits and machines of the index in results/README.md, from the provenance of the tables."""

from __future__ import annotations

import json
import re
from pathlib import Path

LINE = re.compile(r"^\| \[(\w+)\]\(.*\) \| ", re.M)


def measured_on(results: Path, experiment: str) -> str:
    """`machine: commits` that rows of the table are from, the latest last."""
    runs: dict[str, dict[str, None]] = {}
    records = [json.loads(path.read_text()) for path in sorted((results / "provenance").glob(f"{experiment}-*.json"))]
    for record in sorted((r for r in records if r["config"]["experiment"] == experiment), key=lambda r: r["start"]):
        machine = record["gpu"].removeprefix("NVIDIA ") if record["gpu"] != "-" else "CPU"
        runs.setdefault(machine, {})[record["source"]["sha"][:7]] = None
    return "; ".join(f"{machine}: {', '.join(commits)}" for machine, commits in runs.items())


def stamp(results: Path) -> None:
    """Write the last cell of each line of the index anew. A folder without an index is left so."""
    page = results / "README.md"
    if not page.exists():
        return
    lines = page.read_text().splitlines()
    for number, line in enumerate(lines):
        if found := LINE.match(line):
            lines[number] = f"{line.rsplit(' | ', 1)[0]} | {measured_on(results, found[1])} |"
    page.write_text("\n".join(lines) + "\n")
