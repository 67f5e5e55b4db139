"""Tables 3 to 8 of klawonn2023, two levels of decomposition, with the paper's figures beside ours; and what the paper
lacks: mean, majority, sum, all trained as one network (coherent, transfer), and the composed network before and after
its fine-tuning; each with an image's multiply-adds and with its seconds.

    python benchmarks/two_level.py digits                                         # into two_level.csv
    python benchmarks/two_level.py cifar10 --data-dir CIFAR10 --networks dd_vgg3  # 2,000 images, 4 epochs
    python benchmarks/two_level.py flowers --data-dir FLOWERS --whole --seeds 0 1 2   # the paper's setting, on a GPU

A row is a run of `timm_dd.train` with a set, a network, boxes and a seed. Rows that the table has are not measured
again. The paper's local networks have half of the global one's widths (Table 2), ours a K-th, since they are to be
composed. Top-1 in % of the validation images; "seconds" of the parts are of all of them, of the dense network with
computing their probabilities. Digits, which the paper lacks, compare a dense network that learns from all training
images with one that learns from a fifth that the parts leave out.
"""

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

from common import add_row, provenance

from timm_dd.train.run import train
from timm_dd.train.settings import options

WAYS = ("mean", "vote", "sum", "dnn")
TOGETHER = ("coherent", "transfer")
COMMON = (
    "--opt adam --lr 0.001 --sched step --decay-rate 1 --weight-decay 0 --smoothing 0 --warmup-epochs 0 -b 32 -j 0 "
    "--joint-epochs 0"
)
COARSE = "--coarse-widths 128 64 32"
ALL = f"--baseline --together {' '.join(TOGETHER)} --tune-rate 1"
SETS = {
    "digits": (
        "--dataset digits --model resnet10t --model-kwargs channels=[32,64,128,256] output_stride=8 --part-shift 12 "
        "--shift 3 --hflip 0 --lr 0.002 -b 64 --epochs 0 --part-epochs 12"
    ),
    "cifar10": f"--shift 4 --color-jitter 0 {ALL}",
    "flowers": f"--img-size 180 --no-aug {ALL}",
}
PAPER = ("global", "avg", "min", "max", "dnn")  # the paper's columns, of validation


class Row(NamedTuple):
    table: str
    network: str
    boxes: str
    parts: int
    given: str
    paper: tuple[float, ...] = ()


def _cifar(table: str, network: str, whole: float, *others: tuple[float, ...], given: str = "") -> list[Row]:
    rows = zip((0, 2, 4), others)
    return [
        Row(table, network, f"2x2, overlap {d}", 4, f"--grid 2x2 --overlap {d}{given}", (whole, *o)) for d, o in rows
    ]


def _flowers(table: str, network: str, whole: float, *others: tuple[float, ...]) -> list[Row]:
    boxes = (("2x2", 4, "2x2"), ("3x3", 9, "3x3"), ("4x4", 16, "4x4"), ("type B", 13, "type-b"))
    rows = zip(boxes, others)
    return [Row(table, network, name, k, f"--grid {grid}", (whole, *o)) for (name, k, grid), o in rows]


SMALL_BOXES = " --model-kwargs last_pool=False"  # which five poolings would leave nothing of
DIGITS = "--grid 2x2 --overlap 4"
ROWS = {
    "digits": [
        Row("", "resnet10t", "2x2, overlap 4", 4, DIGITS),
        Row("", "resnet10t", "2x2, overlap 4, a fifth left out", 4, f"{DIGITS} --coarse-folds 5"),
    ],
    "cifar10": [
        *_cifar("Table 3", "dd_vgg3", 78.18, (50.91, 48.67, 53.52, 76.69), (56.20, 53.53, 58.62, 78.08),
                (59.83, 57.85, 61.49, 79.73)),
        *_cifar("Table 4", "dd_vgg9", 75.85, (48.62, 42.77, 51.73, 79.99), (55.45, 51.21, 56.77, 80.08),
                (61.21, 57.04, 63.36, 82.26), given=SMALL_BOXES),
        *_cifar("Table 5", "dd_resnet20_16", 86.22, (52.25, 48.97, 53.34, 87.84), (53.03, 49.67, 55.55, 88.29),
                (56.67, 51.21, 58.28, 89.62)),
    ],
    "flowers": [
        *_flowers("Table 6", "dd_vgg3", 64.56, (51.92, 48.88, 53.34, 69.38), (58.92, 52.15, 64.92, 86.21),
                  (55.98, 49.55, 62.62, 84.71), (59.11, 51.78, 65.02, 88.59)),
        *_flowers("Table 7", "dd_vgg9", 78.87, (61.22, 59.74, 68.02, 81.54), (64.45, 58.78, 68.89, 87.38),
                  (63.53, 59.69, 68.78, 85.89), (65.44, 61.02, 68.72, 86.89)),
        *_flowers("Table 8", "dd_resnet20_16", 82.27, (62.02, 58.87, 67.81, 84.75), (58.78, 56.32, 62.02, 82.79),
                  (56.76, 53.03, 58.87, 80.68), (57.73, 54.54, 63.89, 83.75)),
    ],
}  # fmt: skip
OURS = ("global", "avg", "min", "max", *WAYS, *TOGETHER, "composed", "tuned")
TOOK = ("global", "parts", "dnn", "tuned", *TOGETHER)
KEY = ("set", "table", "network", "boxes", "images", "epochs", "seed")


def measured(which: str, row: Row, seed: int, args: argparse.Namespace) -> dict[str, str]:
    """A row of the table: the paper's figures, ours, seconds and multiply-adds."""
    with tempfile.TemporaryDirectory() as output:
        given = words(which, row, seed, args)
        found = train(options.parse([*given, "--output", output, "--experiment", "run"]))
    parts, seconds, macs = found["parts"], found["seconds"], found["multiply_adds"]
    ours = {"avg": sum(parts) / len(parts), "min": min(parts), "max": max(parts), **found["two_level"]}
    if "baseline" in found:
        ours |= {
            "global": found["baseline"],
            "composed": found.get("updated", found["composed"]),
            "tuned": found["tuned"],
        }
    took = {"global": seconds.get("baseline"), "parts": seconds["parts"], "dnn": seconds["two_level"]}
    took |= {
        "tuned": seconds["composed"] if "baseline" in found else None,
        **{how: seconds.get(how) for how in TOGETHER},
    }
    counted = {"global": macs["composed"], "parts": sum(macs["parts"]), "dnn": macs["two_level"]["dnn"]}
    return cells(row.paper, ours, took, counted)


def cells(
    paper: Sequence[float], ours: Mapping[str, float], took: Mapping[str, float | None], counted: Mapping[str, int]
) -> dict[str, str]:
    """Of a row: the paper's figures, ours, seconds, and an image's multiply-adds."""
    return {
        **{f"paper_{name}": f"{v:.2f}" if v else "" for name, v in zip_longest(PAPER, paper)},
        **{name: f"{ours[name]:.2f}" if name in ours else "" for name in OURS},
        **{f"{name}_seconds": "" if took.get(name) is None else f"{took[name]:.1f}" for name in TOOK},
        **{f"{name}_multiply_adds": str(counted[name]) for name in ("global", "parts", "dnn")},
    }


def words(which: str, row: Row, seed: int, args: argparse.Namespace) -> list[str]:
    """The command line of a row."""
    given = (
        f"{COMMON} {SETS[which]} --parts {row.parts} {row.given} --aggregate {' '.join(WAYS)} {COARSE} --seed {seed}"
    )
    if which != "digits":
        given += (
            f" --model {row.network} --part-epochs {args.epochs} --baseline-epochs {args.epochs} --epochs {args.epochs}"
        )
    if which != "digits" and not args.whole:
        given += f" --train-num-samples {args.images} --val-num-samples {args.validation}"
    return [*given.split(), *(["--data-dir", args.data_dir] if args.data_dir else [])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", choices=SETS)
    parser.add_argument("--data-dir", metavar="DIR")
    parser.add_argument("--images", type=int, default=2000, metavar="N", help="to train on")
    parser.add_argument("--validation", type=int, default=1000, metavar="N", help="images")
    parser.add_argument("--epochs", type=int, default=4, metavar="N", help="of the parts, and of each whole network")
    parser.add_argument("--whole", action="store_true", help="all images, 500 epochs")
    parser.add_argument("--networks", nargs="+", metavar="NAME", help="of these alone")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--table", type=Path, default=Path(__file__).with_suffix(".csv"), metavar="CSV")
    args = parser.parse_args()
    args.epochs = 500 if args.whole else args.epochs
    origin, size = provenance(), ("all", "12") if args.set == "digits" else (str(args.images), str(args.epochs))
    size = ("all", "500") if args.whole else size
    for seed in args.seeds:
        for row in ROWS[args.set]:
            if args.networks and row.network not in args.networks:
                continue
            key = dict(zip(KEY, (args.set, row.table, row.network, row.boxes, *size, str(seed))))
            add_row(args.table, key, partial(measured, args.set, row, seed, args), origin)


if __name__ == "__main__":
    main()
