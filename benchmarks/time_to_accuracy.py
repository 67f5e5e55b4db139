"""Accuracy over time and multiply-adds: a network trained whole for several lengths, and by all `ways` of as much work.

    python benchmarks/time_to_accuracy.py --data DATA --search    # learning rates, into time_to_accuracy_search.csv
    python benchmarks/time_to_accuracy.py --data DATA             # the rows, into time_to_accuracy.csv
    python benchmarks/time_to_accuracy.py --data DATA --speeds    # an update of each stage, time_to_accuracy_speeds.csv
    python benchmarks/time_to_accuracy.py --table                 # means of the rows, and a plot of them

A row is one `timm_dd.train` run; the ways of one seed follow each other. Rows that a table has are not measured again,
and a run that was cut off goes on from its checkpoints in --kept. The budget is N epochs of the global network, see
`ways`. The search tries each rate for each way on a seed of its own, on images cut from the training set, so that no
image that a row is validated on has a say. "cost" is that of the forward multiply-adds, in epochs of the global
network; seconds are those of the stages, validation included, "wall_s" those of the process. Options after ``--`` go to
`timm_dd.train`, and into the column "options".
"""

import argparse
import contextlib
import csv
import shutil
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import image_sets
import time_to_accuracy_table
import way_speeds
import ways
from common import provenance, write_table
from ways import SETS, STAGES, WAYS

from timm_dd.errors import TrainError
from timm_dd.train.run import Run
from timm_dd.train.settings import options

SEED, RATES, RATE = 1000, (0.001, 0.002, 0.004), 0.002  # of the search; RATE is that of a way without one
SEARCH, SPEEDS = "time_to_accuracy_search.csv", "time_to_accuracy_speeds.csv"  # beside --out


class Job(NamedTuple):
    """A run, and what its row is known by."""

    set: str
    way: str
    seed: int
    n: int
    lr: float
    given: list[str]
    searches: bool

    def is_that_of(self, row: dict[str, str]) -> bool:
        mine = (self.set, self.way, self.seed, self.n, " ".join(self.given))
        same = mine == (row["set"], row["way"], int(row["seed"]), int(row["n"]), row["options"])
        return same and (not self.searches or self.lr == float(row["lr"]))

    @property
    def updates(self) -> int:
        images = SETS[self.set].searched[0] if self.searches else SETS[self.set].images
        args = ways.parse(self.set, self.way, self.n, self.given)
        return (args.train_num_samples or images) // args.batch_size * sum(ways.epochs(self.way, self.n).values())


def read(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as f:
        return list(csv.DictReader(f))


# ---- what is to be run


def jobs(args: argparse.Namespace, search: list[dict[str, str]]) -> Iterator[Job]:
    """In their order: the ways of a seed one after another, those of more parts when all seeds are through."""
    for which in args.sets:
        n = args.epochs or SETS[which].epochs
        if args.search:
            searched = [way for way in ways.SEARCHED if way in args.ways]
            yield from (Job(which, way, SEED, n, lr, args.given, True) for lr in args.rates for way in searched)
            continue
        for late in (False, True):
            due = [way for way in args.ways if (way in ways.LAST) == late]
            for seed in args.seeds:
                yield from (Job(which, w, seed, n, best_rate(search, which, w), args.given, False) for w in due)


def best_rate(search: list[dict[str, str]], which: str, way: str) -> float:
    """That of the way's best run among the longest of the search."""
    rows = [row for row in search if (row["set"], row["way"]) == (which, WAYS[way].rate_of)]
    longest = max((int(row["n"]) for row in rows), default=0)
    best = max((row for row in rows if int(row["n"]) == longest), key=lambda row: float(row["final"]), default=None)
    return RATE if best is None else float(best["lr"])


def expected(job: Job, own: list[dict[str, str]], others: list[dict[str, str]]) -> float:
    """Seconds, at most, judging from earlier runs of the way, else of the set; 0 if there are none."""
    rows = [row for row in own if row["set"] == job.set]
    alike = [row for row in rows if row["way"] == job.way]
    alike = alike or [row for row in others if (row["set"], row["way"]) == (job.set, job.way)] or rows
    found = []
    for row in alike:
        updates, spent = sum(int(row[f"{stage}_updates"]) for stage in STAGES), float(row["seconds"])
        found.append(max(0.0, float(row["wall_s"]) - spent) + job.updates * spent / updates)
    return max(found, default=0.0)


# ---- a run and its row


def carry_out(job: Job, folder: Path, args: argparse.Namespace) -> dict[str, str]:
    """The row of a run, whose folder is in --kept until it is done."""
    words = [*ways.words(job.set, job.way, job.n), "--lr", str(job.lr), "--seed", str(job.seed), *job.given]
    name = sha256(" ".join([*words, str(folder), args.device or ""]).encode()).hexdigest()[:16]
    place = args.kept / "runs" / name
    resume = ["--resume", str(place)] if (place / "args.yaml").exists() else []
    how = ["--engine", args.engine, "--workers", str(args.workers)]
    how += ["--device", args.device] if args.device else []
    given = options.parse(
        [*words, *how, *resume, "--data-dir", str(folder), "--output", str(place.parent), "--experiment", name]
    )
    _share_decoded(place, folder, args, words)
    start = time.perf_counter()
    with (args.kept / "log.txt").open("a") as log, contextlib.redirect_stdout(log):
        run = Run(given)
        try:
            summary = run.go()
        except TrainError as e:
            if run.timer.signal is None:
                raise
            raise SystemExit(str(e)) from e  # no other is to begin
    wall = time.perf_counter() - start
    row = figures(job, run, summary, wall)
    shutil.rmtree(place)
    return row


def _share_decoded(place: Path, folder: Path, args: argparse.Namespace, words: list[str]) -> None:
    """Runs on the same images decode them once."""
    if any("num-samples" in word for word in words):  # of which each seed has others
        return
    held = args.kept / "decoded" / sha256(str(folder).encode()).hexdigest()[:16]
    for path in (held, place):
        path.mkdir(parents=True, exist_ok=True)
    if not (place / "decoded").exists():
        (place / "decoded").symlink_to(held.resolve())


def figures(job: Job, run: Run, summary: dict, wall: float) -> dict[str, str]:
    costs = ways.costs(job.set, job.way, job.n, job.given)
    seconds = {of: summary["seconds"].get(name, 0.0) for of, name in zip(STAGES, ("parts", "joint", "composed"))}
    lengths = ways.epochs(job.way, job.n)
    seconds = {stage: spent if lengths[stage] else 0.0 for stage, spent in seconds.items()}
    updates = len(run.train_set) // run.args.batch_size
    curves = {
        "part": [read(run.folder.path / "parts" / str(k) / "summary.csv") for k in range(run.args.parts)],
        "joint": [read(run.folder.path / "joint" / "0" / "summary.csv")],
        "tune": [read(run.folder.path / "global" / "summary.csv")],
    }
    last = curves["tune" if lengths["tune"] else "part"][0]
    reached = {
        "parts": statistics.mean(summary["parts"]),
        **{name: summary.get(name) for name in ("together", "joint", "composed", "updated")},
        "final": summary["tuned"],
        "best": max(float(row["eval_top1"]) for row in last),
    }
    tune_rate = options.stage_options(run.args, None).lr
    return {
        **{"set": job.set, "way": job.way, "model": run.args.model, "k": str(run.args.parts)},
        **{"seed": str(job.seed), "n": str(job.n), "lr": str(job.lr)},
        **{"tune_lr": f"{tune_rate:g}" if lengths["tune"] else "", "options": " ".join(job.given)},
        **{"engine": run.args.engine, "images": str(len(run.train_set)), "device_type": run.device.type},
        **{f"{stage}_epochs": str(length) for stage, length in lengths.items()},
        **{f"{stage}_updates": str(length * updates) for stage, length in lengths.items()},
        **{f"{stage}_cost": f"{cost:.3f}" for stage, cost in costs.items()},
        **{"cost": f"{sum(costs.values()):.3f}"},
        **{f"{stage}_s": f"{spent:.1f}" for stage, spent in seconds.items()},
        **{"seconds": f"{sum(seconds.values()):.1f}", "wall_s": f"{wall:.1f}"},
        **{name: "" if value is None else f"{value:.2f}" for name, value in reached.items()},
        **_curves(curves, seconds),
    }


def _curves(curves: dict[str, list[list[dict[str, str]]]], seconds: dict[str, float]) -> dict[str, str]:
    """Accuracies after each epoch of a stage, the mean of its parts', and seconds since the first stage began."""
    found, begun = {}, 0.0
    for stage, of_parts in curves.items():
        epochs = list(zip(*of_parts))
        means = (statistics.mean(float(row["eval_top1"]) for row in rows) for rows in epochs)
        ends = (begun + max(float(row["seconds"]) for row in rows) for rows in epochs)
        found[f"{stage}_top1"] = " ".join(f"{mean:.2f}" for mean in means)
        found[f"{stage}_at_s"] = " ".join(f"{end:.1f}" for end in ends)
        begun += seconds[stage]
    return found


# ---- all of them


def images_of(job: Job, args: argparse.Namespace) -> Path:
    place = args.kept / "images" / (f"{job.set}-search" if job.searches else job.set)
    if job.searches:
        return image_sets.cut(job.set, args.data, place, *SETS[job.set].searched)
    return image_sets.whole(job.set, args.data, place)


def measure(args: argparse.Namespace) -> None:
    begun, origin = time.perf_counter(), provenance()
    search_path = args.out.parent / SEARCH
    path = search_path if args.search else args.out
    rows, search = read(path), read(search_path)
    absent: set[str] = set()
    for job in jobs(args, search):
        if job.set in absent:
            continue
        said = f"{job.set} {job.way} seed {job.seed} lr {job.lr:g}"
        if any(job.is_that_of(row) for row in rows):
            continue
        left = args.seconds - (time.perf_counter() - begun)
        needed = expected(job, rows, search)
        if left <= needed:
            print(f"{said}: left out, {needed:.0f} s needed of {left:.0f}", flush=True)
            continue
        try:
            folder = images_of(job, args)
        except FileNotFoundError as e:
            print(f"{job.set}: left out, {e}", flush=True)
            absent.add(job.set)
            continue
        try:
            row = carry_out(job, folder, args)
        except Exception as e:  # whatever ends one run leaves the others
            print(f"{said}: not done: {type(e).__name__}: {e}", flush=True)
            with (args.kept / "log.txt").open("a") as log:
                traceback.print_exc(file=log)
            continue
        rows.append({**row, **origin})
        write_table(path, rows, list(rows[-1]))
        print(f"{said}: {row['final']} %, cost {row['cost']}, {row['seconds']} of {row['wall_s']} s", flush=True)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--search", action="store_true", help="try the learning rates")
    what.add_argument("--speeds", action="store_true", help="seconds an update of every stage")
    what.add_argument("--table", action="store_true", help="print the means, and draw them")
    parser.add_argument("--data", type=Path, nargs="+", default=[Path()], metavar="DIR", help="folders with the sets")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY", help=", ".join(WAYS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rates", type=float, nargs="+", default=list(RATES), help="of --search")
    parser.add_argument("--epochs", type=int, metavar="N", help="the budget; by default the set's own")
    parser.add_argument("--device", choices=["cpu", "cuda"])
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--amp", action="store_true")
    parser.add_argument("--workers", type=int, default=1, help="of a loader")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="no run begins that would end later")
    parser.add_argument("--rounds", type=int, default=5, help="of --speeds")
    kept = Path(tempfile.gettempdir()) / "time_to_accuracy"
    parser.add_argument("--kept", type=Path, default=kept, metavar="DIR", help="runs that are not done, decoded images")
    out = Path(__file__).with_name("time_to_accuracy.csv")
    parser.add_argument("--out", type=Path, default=out, metavar="CSV")
    parser.add_argument("given", nargs="*", metavar="-- OPTION", help="for timm_dd.train")
    args = parser.parse_args()
    args.given += ["--amp"] if args.amp else []
    args.kept.mkdir(parents=True, exist_ok=True)
    return args


def main() -> None:
    args = parsed()
    if args.table:
        speeds = read(args.out.parent / SPEEDS)
        time_to_accuracy_table.show(read(args.out), speeds, args.out.with_suffix(".png"))
    elif args.speeds:
        way_speeds.measure(args, args.out.parent / SPEEDS)
    else:
        measure(args)


if __name__ == "__main__":
    sys.exit(main())
