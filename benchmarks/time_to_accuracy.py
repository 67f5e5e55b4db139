"""How long the whole pipeline takes to reach the accuracy that the model from a random start has in the end.

    python benchmarks/time_to_accuracy.py --data-dir ../shared/data/cifar10   # 3 seeds, into its .csv and .png

One `timm_dd.train` run for each seed: the parts, the composed model, then the baseline (GNet-R), one after another on
the same machine. The goal is the baseline's accuracy after its last epoch; "pipeline_s" is all of the parts' time,
validation included, and the composed model's up to the end of the first epoch that is as good. Options after ``--`` go
to `timm_dd.train`.
"""

import argparse
import csv
import statistics
import tempfile
from pathlib import Path

from common import provenance, write_table

from timm_dd.train import options
from timm_dd.train.run import Run

GIVEN = (
    "--model dd_resnet20 --parts 4 --grid 2x2 --train-num-samples 2000 --val-num-samples 1000 -b 128 -j 1 "
    "--channels-last --shift 4 --opt adamw --weight-decay 0.02 --smoothing 0 --warmup-epochs 0 --part-epochs 16 "
    "--part-lr 0.004 --roam 0.5 --epochs 4 --lr 0.0005 --calibrate temperature --off-diagonal-lr 0.3 "
    "--baseline --baseline-epochs 8 --baseline-lr 0.002"
).split()


def epochs(folder: Path) -> list[dict[str, float]]:
    with (folder / "summary.csv").open() as f:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(f)]


def curve(name: str, rows: list[dict[str, float]], begun: float) -> dict[str, str]:
    """Accuracies after each epoch, and seconds."""
    return {
        f"{name}_top1": " ".join(f"{r['eval_top1']:.2f}" for r in rows),
        f"{name}_at_s": " ".join(f"{begun + r['seconds']:.0f}" for r in rows),
    }


def row(given: list[str], seed: int) -> dict[str, str]:
    with tempfile.TemporaryDirectory() as folder:
        run = Run(options.parse([*given, "--seed", str(seed), "--output", folder]))
        summary = run.go()
        tuned, baseline = epochs(run.folder / "global"), epochs(run.folder / "baseline")
    goal, parts = summary["baseline"], summary["seconds"]["parts"]
    reached = [r for r in tuned if r["eval_top1"] >= goal]
    seconds = parts + reached[0]["seconds"] if reached else None
    return {
        "seed": str(seed),
        "goal": f"{goal:.2f}",
        "baseline_s": f"{baseline[-1]['seconds']:.0f}",
        "parts_s": f"{parts:.0f}",
        "updated": f"{summary['updated']:.2f}",
        **curve("tuned", tuned, parts),
        **curve("baseline", baseline, 0.0),
        "pipeline_s": f"{seconds:.0f}" if seconds else "not reached",
        "ratio": f"{seconds / baseline[-1]['seconds']:.2f}" if seconds else "",
    }


def draw(table: list[dict[str, str]], path: Path) -> None:
    """Accuracy over time: the composed model's begins where the parts end."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(table), 3.5), layout="constrained")
    axes = figure.subplots(1, len(table), sharey=True, squeeze=False)[0]
    for place, r in zip(axes, table):
        place.axhline(float(r["goal"]), color="black", linewidth=0.8, label="goal")
        place.axvspan(0, float(r["parts_s"]), color="0.9", label="parts")
        for name in ("tuned", "baseline"):
            x, y = ([float(v) for v in r[f"{name}_{of}"].split()] for of in ("at_s", "top1"))
            place.plot(x, y, marker="o", label=name)
        place.set_title(f"seed {r['seed']}")
        place.set_xlabel("seconds")
    axes[0].set_ylabel("top-1 %")
    axes[0].legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True, metavar="DIR")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("given", nargs="*", metavar="-- OPTION", help="for timm_dd.train")
    args = parser.parse_args()
    origin, table = provenance(), []
    for seed in range(args.seeds):
        table.append({**row([*GIVEN, "--data-dir", args.data_dir, *args.given], seed), **origin})
        print("  ".join(f"{name} {value}" for name, value in table[-1].items()), flush=True)
    ratios = [float(r["ratio"]) for r in table if r["ratio"]]
    if len(ratios) > 1:
        print(
            f"ratio {statistics.mean(ratios):.2f} ± {statistics.stdev(ratios):.2f}, {len(ratios)} of {len(table)} seeds"
        )
    if not args.given:
        write_table(Path(__file__).with_suffix(".csv"), table, list(table[0]))
        draw(table, Path(__file__).with_suffix(".png"))


if __name__ == "__main__":
    main()
