"""Merging on disk: its time beside that of a copy through safetensors, and its memory, from 10 M to 1 B parameters.

    python benchmarks/merge_speed.py          # into merge_speed.csv; needs 16 GB of disk for a while

Four parts each, with made-up weights. "merge_s" is `timm_dd.merge_files`, "onto_s" the same onto the very model that it
wrote, "copy_s" is `save_file(load_file(x))` of that model; in turn in one process after one round that does not count,
the files in the system's cache and the disk at rest before each, medians. "ratio" is merge_s by copy_s, "onto_ratio"
onto_s by merge_s. "peak_mb" is the peak of a process that merges once over that of one that has imported torch and
waits, "onto_peak_mb" that of one that merges onto a model, "largest_mb" the largest tensor.
"""

import argparse
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from common import provenance, write_table
from safetensors.torch import load_file, save_file

import timm_dd
from timm_dd import Plan
from timm_dd.storage import files

MODELS = ("resnet18", "resnet101", "wide_resnet101_2", "regnety_640", "regnety_1280", "regnety_2560")
PARTS = 4
MEMORY = "import {}\n{}\nprint([line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')][0])"


def make(name: str, folder: Path) -> Plan:
    """Parts of a model with random weights, one after another."""
    plan = timm_dd.plan(name, PARTS)
    generator = torch.Generator().manual_seed(0)
    folder.mkdir()
    for k in range(PARTS):
        state = {key: torch.randn(t.part_shape(k, PARTS), generator=generator) for key, t in plan.tensors.items()}
        files.save_part(folder, plan, k, state, seed=0, epoch=0)
    (folder / files.PLAN).write_text(files.json_text(plan.to_json()))
    return plan


def peak(module: str, statement: str = "") -> float:
    """The largest resident memory of a process, in MB."""
    done = subprocess.run([sys.executable, "-c", MEMORY.format(module, statement)], capture_output=True, check=True)
    return int(done.stdout) / 1024


def timed(function, output: Path) -> float:
    shutil.rmtree(output, ignore_errors=True)
    os.sync()
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def rounds(parts: Path, folder: Path, n: int) -> Iterator[tuple[float, float, float]]:
    """(merge, merge onto a model, copy) in seconds, `n` times after one that does not count."""
    composed, corrected, again = folder / "composed", folder / "corrected", folder / "again"

    def copy():
        again.mkdir()
        save_file(load_file(composed / "model.safetensors"), again / "model.safetensors")

    for i in range(n + 1):
        merged = timed(lambda: timm_dd.merge_files(parts, composed), composed)
        onto = timed(lambda: timm_dd.merge_files(parts, corrected, onto=composed), corrected)
        shutil.rmtree(corrected)
        copied = timed(copy, again)
        shutil.rmtree(again)
        if i > 0:
            yield merged, onto, copied


def measure(name: str, n: int, folder: Path) -> dict:
    plan = make(name, folder / "parts")
    times = list(rounds(folder / "parts", folder, n))
    merged, onto, copied = (statistics.median(column) for column in zip(*times))
    size = (folder / "composed" / "model.safetensors").stat().st_size
    where = f"{str(folder / 'parts')!r}, {str(folder / 'peak')!r}"
    used = peak("timm_dd", f"timm_dd.merge_files({where})")
    used_onto = peak("timm_dd", f"timm_dd.merge_files({where}, onto={str(folder / 'composed')!r})")
    waiting = peak("torch")
    largest = max(math.prod(t.shape) for t in plan.tensors.values()) * 4 / 2**20
    return {
        "model": name,
        "parameters": plan.params(),
        "mb": round(size / 2**20),
        "merge_s": round(merged, 4),
        "onto_s": round(onto, 4),
        "copy_s": round(copied, 4),
        "ratio": round(statistics.median(a / c for a, _, c in times), 2),
        "onto_ratio": round(statistics.median(b / a for a, b, _ in times), 2),
        "mb_per_s": round(size / 2**20 / merged),
        "peak_mb": round(used - waiting, 1),
        "onto_peak_mb": round(used_onto - waiting, 1),
        "largest_mb": round(largest, 1),
    }


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--models", nargs="+", default=MODELS, metavar="NAME")
    p.add_argument("--rounds", type=int, default=9)
    p.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".csv"))
    args = p.parse_args()
    rows = []
    for name in args.models:
        with tempfile.TemporaryDirectory() as folder:
            rows.append({**measure(name, args.rounds, Path(folder)), **provenance()})
        print(*(f"{key} {value}" for key, value in list(rows[-1].items())[:12]), sep=", ", flush=True)
    write_table(args.output, rows, rows[0].keys())


if __name__ == "__main__":
    main()
