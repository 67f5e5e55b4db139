"""What the benchmarks share: where a figure comes from, and their tables."""

import csv
import platform
import shutil
import subprocess
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from pathlib import Path

import torch

import timm_dd


def provenance() -> dict[str, str]:
    """Commit, versions and device, for every row of a table."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    return {
        "timm_dd": commit() or timm_dd.__version__,
        "timm": version("timm"),
        "torch": version("torch"),
        "python": platform.python_version(),
        "device": device,
    }


def commit() -> str:
    """Nothing without git, or in a copy that has no history."""
    if shutil.which("git") is None:
        return ""
    words = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(words, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()


def add_row(path: Path, key: dict[str, str], measure: Callable[[], dict], origin: dict[str, str]) -> None:
    """Measure a row and write the table with it, unless it has one of this key."""
    rows = list(csv.DictReader(path.open())) if path.exists() else []
    if any(key.items() <= row.items() for row in rows):
        return
    rows.append({**key, **measure(), **origin})
    print("  ".join(f"{k} {v}" for k, v in rows[-1].items() if v), flush=True)
    write_table(path, rows, list(rows[-1]))


def write_table(path: Path, rows: Iterable[dict], fields: Sequence[str]) -> None:
    unfinished = path.with_suffix(".part")
    with unfinished.open("w", newline="") as f:
        writer = csv.DictWriter(f, fields)
        writer.writeheader()
        writer.writerows(rows)
    unfinished.replace(path)
