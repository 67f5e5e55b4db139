"""Seconds of ``split(name, 4)``, all four parts, against torch-pruning: its dependency graph and one copy pruned to a
quarter of the width. Both start from timm's name, side by side, the better of two.

    pip install torch-pruning && python benchmarks/split_speed.py [names …]

writes split_speed.csv. A model that torch-pruning cannot prune has no time there, and no ratio.
"""

import csv
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from common import provenance

import timm_dd
from timm_dd import Domain
from timm_dd.errors import headline

NAMED = (
    "resnet50 densenet121 densenet201 efficientnet_b0 hrnet_w18_small convnext_tiny ghostnet_100 regnety_040".split()
)
PARTS, REPEATS, MAX_PARAMS = 4, 2, 150e6


def largest_of_each_file() -> list[str]:
    """The model with most parameters in each of timm's files, among those that fit in memory."""
    best: dict[str, tuple[int, str]] = {}
    for row in csv.DictReader((Path(__file__).parent / "zoo" / "k4.csv").open()):
        file, params = timm.model_entrypoint(row["model"]).__module__, int(row["params"])
        if params <= MAX_PARAMS:
            best[file] = max(best.get(file, (0, "")), (params, row["model"]))
    return [name for _, name in best.values()]


def ours(name: str) -> Callable:
    parts = timm_dd.split(name, PARTS, domain=Domain.full(PARTS))
    return lambda: parts


def torch_pruning(name: str) -> Callable:
    import torch_pruning as tp

    model = timm.create_model(name).eval()
    x = torch.randn(1, *timm.data.resolve_model_data_config(model)["input_size"])
    classifier = model.get_classifier()
    pruner = tp.pruner.BasePruner(
        model,
        x,
        importance=tp.importance.RandomImportance(),
        pruning_ratio=1 - 1 / PARTS,
        ignored_layers=[m for m in (classifier if isinstance(classifier, tuple) else [classifier])],
    )
    pruner.step()
    return lambda: model(x)


def seconds(work: Callable[[str], Callable], name: str) -> float | None:
    """Wall time of `work`, without that of the check that it returns."""
    try:
        start = time.perf_counter()
        check = work(name)
        elapsed = time.perf_counter() - start
        check()
        return elapsed
    except Exception as e:  # torch-pruning fails in many ways
        print(f"{name}: {work.__name__}: {type(e).__name__}: {headline(e)[:100]}", file=sys.stderr)
        return None


def main() -> None:
    warnings.filterwarnings("ignore")
    names = sys.argv[1:] or list(dict.fromkeys(NAMED + largest_of_each_file()))
    origin, rows, ratios = provenance(), [], []
    ours("resnet18")  # imports, caches
    for name in names:
        runs = [(seconds(ours, name), seconds(torch_pruning, name)) for _ in range(REPEATS)]
        best = [min(r) if None not in r else None for r in zip(*runs)]
        ratio = best[1] / best[0] if None not in best else None
        ratios += [ratio] if ratio else []
        rows.append([name, *(f"{s:.2f}" if s else "" for s in best), f"{ratio:.2f}" if ratio else ""])
        print("  ".join(rows[-1]), flush=True)
        if not sys.argv[1:]:
            with Path(__file__).with_suffix(".csv").open("w", newline="") as f:
                writer = csv.writer(f)
                writer.writerow(["model", "split_s", "torch_pruning_s", "ratio", *origin])
                writer.writerows([*row, *origin.values()] for row in rows)
    if ratios:
        print(f"{len(ratios)} of {len(names)} compared: {min(ratios):.1f} to {max(ratios):.1f} times, "
              f"median {statistics.median(ratios):.1f}")  # fmt: skip


if __name__ == "__main__":
    main()
