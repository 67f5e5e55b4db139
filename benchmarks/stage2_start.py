"""What stage 2 starts from, and what that is worth: what parts see, the joint stage, and what is done to the composed
network before or while it is fine-tuned; on scikit-learn's digits and on 5,000 images of CIFAR-10, three seeds each.

    python benchmarks/stage2_start.py digits                                     # into stage2_start.csv
    python benchmarks/stage2_start.py cifar10 --data-dir ../shared/data/cifar10

A row is a run of `timm_dd.train` with the set's options, the variant's and --seed; runs that differ in their second
stage alone share their parts. Rows that the table has are not measured again. "cost" is that of the multiply-adds, in
epochs of the global network, all K parts together. The table's variants that are not in the list here are of options
that won nowhere and are gone; the commits in their rows have them.
"""

import argparse
import tempfile
from functools import partial
from pathlib import Path

from common import add_row, provenance
from shared_parts import trained

import timm_dd
from timm_dd import console
from timm_dd.train.settings import options

PLAIN = "--joint-epochs 0 --no-keep-momenta --warmup-epochs 0 --smoothing 0 --opt adamw --lr 0.002"
SETS = {
    "digits": (  # on boxes, unless a variant says otherwise
        f"{PLAIN} --dataset digits --model resnet10t --grid 2x2 --overlap 4 --shift 2 --hflip 0 -b 64 -j 0 "
        "--part-lr 0.002 --part-epochs 12 --epochs 4"
    ),
    "cifar10": (  # on whole images of 20x20 pixels, unless a variant says otherwise
        f"{PLAIN} --model dd_resnet20 --model-kwargs widths=(16,32,64) --grid full --part-scale 0.625 --shift 4 -b 128 "
        "-j 0 --train-num-samples 5000 --val-num-samples 2000 --channels-last --engine packed --weight-decay 0.02 "
        "--part-lr 0.004 --part-epochs 24 --epochs 3"
    ),
}
BOXES, SCALED = "--grid 2x2 --overlap 4 --part-scale 1", "--grid full --overlap 0 --part-scale 0.625"
VARIANTS = {
    "nothing": "",
    "boxes, roam 0.5": f"{BOXES} --roam 0.5",
    "scaled": SCALED,
    "scaled, joint 4": f"{SCALED} --joint-epochs 4",
    "mean": "--calibrate mean",
    "temperature": "--calibrate temperature",
    "noise 0.1": "--off-diagonal-noise 0.1",
    "rate 0.3 between blocks": "--off-diagonal-lr 0.3",
    "head refitted": "--refit-head",
    "momenta kept": "--keep-momenta",
    "a quarter of the rate": "--lr 0.0005",
    "a quarter of the rate, momenta kept": "--lr 0.0005 --keep-momenta",
    "head refitted, a quarter of the rate": "--refit-head --lr 0.0005",
    "head refitted, a quarter of the rate, momenta kept": "--refit-head --lr 0.0005 --keep-momenta",
    "joint 1, a quarter of the rate, momenta kept": "--joint-epochs 1 --lr 0.0005 --keep-momenta",
    "joint 2": "--joint-epochs 2",
    "joint 4": "--joint-epochs 4",
    "joint 4, rate 0.3 between blocks": "--joint-epochs 4 --off-diagonal-lr 0.3",
    "joint 4, temperature": "--joint-epochs 4 --calibrate temperature",
    "joint 4, momenta kept": "--joint-epochs 4 --keep-momenta",
    "joint 4, warm-up": "--joint-epochs 4 --sched-on-updates --warmup-epochs 1",
    "joint 4, a quarter of the rate": "--joint-epochs 4 --lr 0.0005",
    "joint 4, half the rate, momenta kept": "--joint-epochs 4 --lr 0.001 --keep-momenta",
    "joint 4, a quarter of the rate, momenta kept": "--joint-epochs 4 --lr 0.0005 --keep-momenta",
    "joint 4, head refitted": "--joint-epochs 4 --refit-head",
    "distilled 0.5 from dnn": "--aggregate dnn --distill 0.5",
    "2 cycles": "--cycles 2",
    "2 cycles, reassigned": "--cycles 2 --reassign",
    "2 cycles, momenta kept": "--cycles 2 --keep-momenta",
    "2 cycles, reassigned, momenta kept": "--cycles 2 --reassign --keep-momenta",
    "4 cycles, reassigned, momenta kept": "--cycles 4 --reassign --keep-momenta",
}
FIGURES = ("together", "joint", "composed", "updated", "first", "tuned")


def given(which: str, variant: str, seed: int, data_dir: str | None, output: str) -> argparse.Namespace:
    words = [*SETS[which].split(), *VARIANTS[variant].split(), "--seed", str(seed), "--output", output]
    data = ["--data-dir", data_dir] if data_dir else []
    args = options.parse([*words, *data, "--experiment", "run", "--resume", f"{output}/run"])
    args.epochs, args.part_epochs = (n // args.cycles for n in (args.epochs, args.part_epochs))
    return args


def row(which: str, variant: str, seed: int, data_dir: str | None, kept: Path) -> dict[str, str]:
    """Top-1 of the parts (mean), of their sum on their views, of the joint stage, and of the composed model step by
    step."""
    with tempfile.TemporaryDirectory() as output:
        args = given(which, variant, seed, data_dir, output)
        found = trained(args, Path(output) / "run", kept)
    mean = sum(found["parts"]) / len(found["parts"])
    figures = {"parts": mean, **{k: found.get(k) for k in FIGURES}}
    said = {k: f"{v:.2f}" if v is not None else "" for k, v in figures.items()}
    return {**said, "cost": f"{cost(args):.2f}"}


def cost(args: argparse.Namespace) -> float:
    """Of all stages and cycles, in epochs of the global network."""
    size = {"img_size": 32, "num_classes": 10, **args.model_kwargs}
    ratios = [
        p.parts * p.part.multiply_adds / p.whole.multiply_adds
        for p in (
            timm_dd.profile(args.model, args.parts, domain=d, **size)
            for d in (console.domain(args), timm_dd.Domain.full(args.parts))
        )
    ]
    epochs = (args.part_epochs, args.joint_epochs)
    return args.cycles * (sum(n * r for n, r in zip(epochs, ratios)) + args.epochs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", choices=SETS)
    parser.add_argument("--data-dir", metavar="DIR")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS, metavar="NAME")
    parser.add_argument("--kept", type=Path, default=Path(tempfile.gettempdir()) / "stage2_start", metavar="DIR")
    parser.add_argument("--table", type=Path, default=Path(__file__).with_suffix(".csv"), metavar="CSV")
    args = parser.parse_args()
    origin = provenance()
    for seed in args.seeds:
        for variant in args.variants:
            key = {"set": args.set, "variant": variant, "seed": str(seed)}
            add_row(args.table, key, partial(row, args.set, variant, seed, args.data_dir, args.kept), origin)


if __name__ == "__main__":
    main()
