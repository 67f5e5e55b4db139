"""What the benchmarks share: where a figure comes from."""

import platform
import subprocess
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
