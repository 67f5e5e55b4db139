"""What stage 2 starts from, and what that is worth: boxes that roam, re-estimated BatchNorm statistics, the scale of
the logits, and the weights between the blocks; on scikit-learn's digits or on an image folder.

    python benchmarks/stage2_start.py                                       # digits, into stage2_start.csv
    python benchmarks/stage2_start.py --data-dir DATA --seeds 1 -- --model dd_resnet32 --shift 4 …

Each run is one of `timm_dd.train`, with the same options but for those of the variant and --seed; options after ``--``
go to it. Variants with two cycles have half the epochs in each.
"""

import argparse
import csv
import tempfile
from pathlib import Path

from common import provenance, write_table

from timm_dd.train import options
from timm_dd.train.run import train

VARIANTS = {
    "as in the paper": "",
    "roam 0.5": "--roam 0.5",
    "roam 0.75": "--roam 0.75",
    "mean": "--calibrate mean",
    "temperature": "--calibrate temperature",
    "noise 0.1": "--off-diagonal-noise 0.1",
    "rate 0.3 between blocks": "--off-diagonal-lr 0.3",
    "2 cycles": "--cycles 2",
    "2 cycles, reassigned": "--cycles 2 --reassign",
}
DIGITS = (
    "--dataset digits --model resnet10t --grid 2x2 --overlap 4 --shift 2 --hflip 0 -b 64 -j 0 --opt adamw --lr 0.002 "
    "--warmup-epochs 0 --smoothing 0 --part-epochs 12 --epochs 4"
).split()
FIGURES = ("together", "composed", "updated", "first", "tuned")


def row(given: list[str], variant: str, seed: int) -> dict[str, str]:
    """Top-1 of the parts (mean), of their sum on their own boxes, and of the composed model step by step."""
    with tempfile.TemporaryDirectory() as folder:
        args = options.parse([*given, *VARIANTS[variant].split(), "--seed", str(seed), "--output", folder])
        args.epochs, args.part_epochs = (n // args.cycles for n in (args.epochs, args.part_epochs or args.epochs))
        found = train(args)
        with max(Path(folder).rglob("global/summary.csv"), key=lambda p: p.stat().st_mtime).open() as f:
            found["first"] = float(next(csv.DictReader(f))["eval_top1"])
    mean = sum(found["parts"]) / len(found["parts"])
    figures = {"parts": mean, **{k: found[k] for k in FIGURES}}
    return {"variant": variant, "seed": str(seed), **{k: f"{v:.2f}" for k, v in figures.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", metavar="DIR")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS, metavar="NAME")
    parser.add_argument("given", nargs="*", metavar="-- OPTION", help="for timm_dd.train")
    args = parser.parse_args()
    given = [*(DIGITS if args.data_dir is None else ["--data-dir", args.data_dir]), *args.given]
    origin, table = provenance(), []
    for variant in args.variants:
        for seed in range(args.seeds):
            table.append({**row(given, variant, seed), **origin})
    shown = ["variant", "seed", "parts", *FIGURES]
    for line in [shown, *([r[k] for k in shown] for r in table)]:
        print("  ".join(cell.ljust(8) for cell in line))
    if args.data_dir is None and not args.given:
        write_table(Path(__file__).with_suffix(".csv"), table, list(table[0]))


if __name__ == "__main__":
    main()
