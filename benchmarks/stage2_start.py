"""What the second stage starts from: boxes that stand still against boxes that roam, BatchNorm statistics as merged
against anew, on scikit-learn's digits or on an image folder.

    python benchmarks/stage2_start.py                                       # digits, into stage2_start.csv
    python benchmarks/stage2_start.py --data-dir DATA --seeds 1 -- --model dd_resnet32 --shift 4 …

All runs are `timm_dd.train`'s, of the same options but for --roam and --seed; options after ``--`` go to it.
"""

import argparse
import csv
import tempfile
from pathlib import Path

from common import provenance

from timm_dd.train import options
from timm_dd.train.run import Run

ROAM = (0.0, 0.25, 0.5, 0.75, 1.0)
DIGITS = (
    "--dataset digits --model resnet10t --grid 2x2 --overlap 4 --shift 2 --hflip 0 -b 64 -j 0 --opt adamw --lr 0.002 "
    "--warmup-epochs 0 --smoothing 0 --part-epochs 12 --epochs 4"
).split()
FIGURES = ("together", "composed", "updated", "tuned")


def row(given: list[str], roam: float, seed: int) -> dict[str, str]:
    """Top-1 of the parts (mean), of their sum on their own boxes, and of the composed model step by step."""
    with tempfile.TemporaryDirectory() as folder:
        args = options.parse([*given, "--roam", str(roam), "--seed", str(seed), "--output", folder])
        found = Run(args).go()
    mean = sum(found["parts"]) / len(found["parts"])
    return {"roam": str(roam), "seed": str(seed), "parts": f"{mean:.2f}", **{k: f"{found[k]:.2f}" for k in FIGURES}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", metavar="DIR")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--roam", type=float, nargs="+", default=ROAM, metavar="P")
    parser.add_argument("given", nargs="*", metavar="-- OPTION", help="for timm_dd.train")
    args = parser.parse_args()
    given = [*(DIGITS if args.data_dir is None else ["--data-dir", args.data_dir]), *args.given]
    origin, table = provenance(), []
    for roam in args.roam:
        for seed in range(args.seeds):
            table.append({**row(given, roam, seed), **origin})
    for line in [list(table[0])[:7], *(list(r.values())[:7] for r in table)]:
        print("  ".join(cell.ljust(8) for cell in line))
    if args.data_dir is None and not args.given:
        with Path(__file__).with_suffix(".csv").open("w", newline="") as f:
            writer = csv.DictWriter(f, list(table[0]))
            writer.writeheader()
            writer.writerows(table)


if __name__ == "__main__":
    main()
