"""Peak memory of this process (Linux)."""

from __future__ import annotations

import re
from pathlib import Path


def reset_peak() -> None:
    """Let `peak` start from what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    """Largest resident set since the last reset, bytes."""
    return _status("VmHWM")


def resident() -> int:
    """Resident set now, bytes."""
    return _status("VmRSS")


def _status(name: str) -> int:
    found = re.search(rf"^{name}:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    if found is None:
        raise RuntimeError(f"/proc/self/status has no {name}: peak memory can be measured on Linux only")
    return int(found[1]) * 1024
