"""What the benchmarks share: where a figure comes from, and their tables."""

import csv
import platform
import subprocess
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path

import torch


def provenance() -> dict[str, str]:
    """Commit, versions and device, for every row of a table."""
    folder = Path(__file__).parent
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=folder, capture_output=True, text=True)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    return {
        "timm_dd": git.stdout.strip() or version("timm_dd"),
        "timm": version("timm"),
        "torch": version("torch"),
        "python": platform.python_version(),
        "device": device,
    }


def write_table(path: Path, rows: Iterable[dict], fields: Sequence[str]) -> None:
    with path.open("w", newline="") as f:
        writer = csv.DictWriter(f, fields)
        writer.writeheader()
        writer.writerows(rows)
