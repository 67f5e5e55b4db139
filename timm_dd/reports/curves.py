"""Accuracy and loss over epochs and seconds, and the seconds of the stages."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from . import draw
from .draw import MUTED, SERIES, Drawing, colour_of_part
from .record import Curve, Record

AXES = {"epochs": "epoch", "seconds": "seconds"}
VALUES = {"accuracy": ("top1", "top-1 accuracy, %"), "loss": ("loss", "training loss")}
TITLES = {
    "composed": "composed, fine-tuned", "baseline": "baseline", "joint": "joint, whole images",
    "coherent": "two levels, coherent", "transfer": "two levels, transfer", "two_level": "two levels, dnn",
}  # fmt: skip
MANY = 8  # parts from which on they have one colour
LATER = {"joint": ("part",), "transfer": ("part",), "composed": ("part", "joint")}  # go on with these stages
LABELS = {"waiting": "waiting for data"}
SLOWEST, ALL = "parts, the slowest", "parts, all processes"
KINDS = {  # of seconds, and how they are drawn
    "training": "#2f7de0", "statistics": "#0c9577", "evaluation": "#8fb9ee", "waiting": "#a3a9b3",
}  # fmt: skip


def rows(record: Record) -> list[dict[str, Any]]:
    """Each epoch of each network on the pipeline's clock: what goes on with trained parts begins when they are done.

    A row is run, seed, name, stage, epoch (how many have passed), seconds (since the pipeline or the baseline began),
    top1 in %, and loss; the composed model before its first epoch, and the dense network, have no loss.
    """
    found: list[dict[str, Any]] = []
    about = {"run": record.name, "seed": record.args.get("seed")}
    for curve in record.curves:
        epochs, seconds = begun(record, curve.stage)
        for row in curve.rows:
            at = {"epoch": int(row["epoch"]) + epochs, "seconds": row["seconds"] + seconds}
            of_it = {"name": curve.name, "stage": curve.stage}
            found.append({**about, **of_it, **at, "top1": row["top1"], "loss": row["loss"]})
    return found + [{**about, **point} for point in _points(record)]


def begun(record: Record, stage: str) -> tuple[int, float]:
    """(epochs, seconds) of the pipeline before a stage."""
    before = [[c for c in record.curves if c.stage == earlier] for earlier in LATER.get(stage, ())]
    epochs = sum(max((len(c.rows) for c in curves), default=0) for curves in before)
    return epochs, sum(max((c.seconds for c in curves), default=0.0) for curves in before)


def _points(record: Record) -> list[dict[str, Any]]:
    if record.summary is None:
        return []
    epochs, seconds = begun(record, "composed")
    at = {"name": "composed, before fine-tuning", "stage": "before", "epoch": epochs, "seconds": seconds}
    found = [{**at, "top1": record.summary["composed"], "loss": None}]
    if "dnn" in record.summary.get("two_level", {}):
        epochs, seconds = begun(record, "transfer")
        took = record.summary["seconds"].get("two_level", 0.0)
        at = {"name": "two levels, dnn", "stage": "two_level", "epoch": epochs, "seconds": seconds + took}
        found.append({**at, "top1": record.summary["two_level"]["dnn"], "loss": None})
    return found


def curve(table: Sequence[Mapping[str, Any]], value: str, over: str) -> Drawing:
    """A line for each network of one run; `value` is ``accuracy`` or ``loss``, `over` is ``epochs`` or ``seconds``."""
    key, label = VALUES[value]
    x = AXES[over]
    table = [row for row in table if row[key] is not None]
    fig = draw.figure(3.3)
    ((ax,),) = draw.axes(fig)
    names = list(dict.fromkeys(row["name"] for row in table))
    parts, hover = sum(row.startswith("part ") for row in names), {}
    for i, name in enumerate(names):
        of = [row for row in table if row["name"] == name]
        look = _look(name, of[0]["stage"], parts)
        points = [row[x] for row in of], [row[key] for row in of]
        (line,) = ax.plot(*points, markersize=3.5 if len(of) < 40 else 2, gid=f"line{i}", **look)
        line.set_clip_on(False)
        seen = [row for row in of if math.isfinite(row[key])]  # others have no mark
        hover[f"line{i}"] = [f"{name}, epoch {row['epoch']}, {row['seconds']:.1f} s: {row[key]:.4g}" for row in seen]
    ax.set(xlabel=x, ylabel=label)
    ax.margins(x=0.02)
    ax.xaxis.get_major_locator().set_params(integer=True)
    draw.legend(fig)
    what = {"accuracy": "Top-1 accuracy on the validation images", "loss": "Loss on the training images"}[value]
    caption = f"{what} over {over}. What goes on with trained parts begins when they are done."
    return Drawing(f"{value}-over-{over}", caption, f"{caption} {_ends(table, key)}", table, fig, hover)


def _ends(table: Sequence[Mapping[str, Any]], key: str) -> str:
    last = {row["name"]: row[key] for row in table}
    return "At the end: " + ", ".join(f"{name} {value:.4g}" for name, value in last.items()) + "."


def _look(name: str, stage: str, parts: int) -> dict[str, Any]:
    if stage == "before":
        return {"color": SERIES["composed"], "marker": "D", "linestyle": "none", "label": name}
    if stage != "part":
        return {"color": SERIES[stage], "marker": "o", "linewidth": 2, "label": TITLES[stage]}
    k = int(name.split()[1])
    if parts > MANY:
        label = f"{parts} parts" if k == 0 else None
        return {"color": SERIES["parts"], "marker": "o", "linewidth": 0.8, "label": label}
    return {"color": colour_of_part(k), "marker": "o", "linewidth": 1.1, "label": name}


# ---- runs side by side


def bands(table: Sequence[Mapping[str, Any]], value: str, over: str) -> Drawing:
    """The fine-tuned models and the baselines of several groups of runs, the mean and the range over their seeds; a row
    is as of `rows`, with its ``group``."""
    found = list(banded(table, VALUES[value][0]))
    x = AXES[over]
    fig = draw.figure(3.5)
    ((ax,),) = draw.axes(fig)
    hover, groups = {}, list(dict.fromkeys(row["group"] for row in found))
    for i, (group, stage) in enumerate(dict.fromkeys((row["group"], row["stage"]) for row in found)):
        of = [row for row in found if (row["group"], row["stage"]) == (group, stage)]
        dash = "-" if stage == "composed" else "--"
        at, colour = [row[x] for row in of], colour_of_part(groups.index(group))
        label = f"{group}, {TITLES[stage]}" + (f", {of[0]['runs']} runs" if of[0]["runs"] > 1 else "")
        ax.plot(
            at, [row["mean"] for row in of], dash, color=colour, marker="o", markersize=3, gid=f"line{i}", label=label
        )
        ax.fill_between(at, [row["low"] for row in of], [row["high"] for row in of], color=colour, alpha=0.2, lw=0)
        words = (
            "{group}, epoch {epoch}, {seconds:.1f} s: {mean:.4g}, {low:.4g} to {high:.4g}".format(**row) for row in of
        )
        hover[f"line{i}"] = list(words)
    ax.set(xlabel=x, ylabel=VALUES[value][1])
    ax.xaxis.get_major_locator().set_params(integer=True)
    draw.legend(fig, 1)
    caption = f"{VALUES[value][1].capitalize()} over {over}: the mean over seeds; the band is their range."
    return Drawing(f"compared-{value}-over-{over}", caption, f"{caption} {', '.join(groups)}.", found, fig, hover)


def banded(table: Sequence[Mapping[str, Any]], key: str):
    """Rows of group, stage, epoch, runs (how many), and over these the mean seconds and the mean, lowest and highest
    value of `key`, of the epochs that all runs of a group have."""
    chosen = [row for row in table if row["stage"] in ("composed", "baseline") and row[key] is not None]
    for group, stage in dict.fromkeys((row["group"], row["stage"]) for row in chosen):
        of = [row for row in chosen if (row["group"], row["stage"]) == (group, stage)]
        runs = len({row["run"] for row in of})
        for epoch in dict.fromkeys(row["epoch"] for row in of):
            here = [row for row in of if row["epoch"] == epoch]
            if len(here) == runs:
                values, seconds = [row[key] for row in here], statistics.mean(row["seconds"] for row in here)
                spread = {"mean": statistics.mean(values), "low": min(values), "high": max(values)}
                yield {"group": group, "stage": stage, "epoch": epoch, "runs": runs, "seconds": seconds, **spread}


# ---- times


def times(record: Record) -> list[dict[str, Any]]:
    """Seconds by bar and kind: of the parts that of the slowest and that of all processes together, then the later
    stages; ``limit`` of a bar is what the multiply-adds allow at the speed of the composed network, None where that is
    not known."""
    found: list[dict[str, Any]] = []
    processes = _processes(record)
    if processes:
        found += _kinds(SLOWEST, [max((of[0] for of in processes), key=lambda c: c.seconds)])
        found += _kinds(ALL, [of[0] for of in processes]) if len(processes) > 1 else []
    for stage in ("joint", "coherent", "transfer"):
        found += _kinds(TITLES[stage], [c for c in record.curves if c.stage == stage])
    seconds = {} if record.summary is None else record.summary["seconds"]
    if "two_level" in seconds:
        found.append({"bar": "two levels, dnn", "kind": "training", "seconds": seconds["two_level"]})
    if "compose" in seconds:
        found.append({"bar": "compose", "kind": "training", "seconds": seconds["compose"]})
    found += _kinds("fine-tuning", _stage(record, "composed"), seconds.get("statistics", 0.0))
    found += _kinds("baseline", _stage(record, "baseline"))
    limits = _limits(record)
    return [{**row, "limit": limits.get(row["bar"])} for row in found]


def _stage(record: Record, stage: str) -> list[Curve]:
    return [c for c in record.curves if c.stage == stage]


def _processes(record: Record) -> list[list[Curve]]:
    """The parts that trained side by side: those of one process share their epochs, and have equal seconds."""
    parts = _stage(record, "part")
    return [[c for c in parts if c.seconds == seconds] for seconds in dict.fromkeys(c.seconds for c in parts)]


def _kinds(bar: str, curves: Sequence[Curve], statistics: float = 0.0) -> list[dict[str, Any]]:
    if not curves:
        return []
    spent = {kind: sum(row.get(kind, 0.0) for c in curves for row in c.rows) for kind in ("waiting", "evaluation")}
    spent |= {"statistics": statistics}
    spent = {"training": sum(c.seconds for c in curves) - sum(spent.values()), **spent}
    return [{"bar": bar, "kind": kind, "seconds": s} for kind, s in spent.items() if s > 0]


def _limits(record: Record) -> dict[str, float]:
    """At the composed network's seconds for a multiply-add, by its fine-tuning or else by the baseline."""
    whole = _stage(record, "composed") or _stage(record, "baseline")
    if record.summary is None or not whole:
        return {}
    macs = record.summary["multiply_adds"]
    speed = whole[0].seconds / len(whole[0].rows) / macs["composed"]  # seconds of an epoch for each multiply-add
    epochs = record.epochs()
    each = {of[0].seconds: sum(macs["parts"][int(c.name.split()[1])] for c in of) for of in _processes(record)}
    counts = {SLOWEST: each[max(each)], ALL: sum(each.values())} if each else {}
    found = {bar: speed * count * epochs["part"] for bar, count in counts.items()}
    if "joint" in macs:
        found[TITLES["joint"]] = speed * macs["joint"] * epochs.get("joint", 0)
    return found


def time_bars(table: Sequence[Mapping[str, Any]]) -> Drawing:
    """A bar for each stage, stacked of the kinds of its seconds, with the limit of the multiply-adds."""
    bars = list(dict.fromkeys(row["bar"] for row in table))
    fig = draw.figure(0.9 + 0.36 * len(bars))
    ((ax,),) = draw.axes(fig)
    for kind, colour in KINDS.items():
        of = {row["bar"]: row["seconds"] for row in table if row["kind"] == kind}
        if of:
            left = [sum(r["seconds"] for r in table if r["bar"] == b and _before(r["kind"], kind)) for b in bars]
            widths = [of.get(bar, 0.0) for bar in bars]
            ax.barh(bars, widths, left=left, color=colour, label=LABELS.get(kind, kind), height=0.62)
    limits = {row["bar"]: row["limit"] for row in table if row["limit"] is not None}
    for i, (bar, limit) in enumerate(limits.items()):
        at, label = bars.index(bar), "limit of the multiply-adds" if i == 0 else None
        ax.plot([limit, limit], [at - 0.42, at + 0.42], color=SERIES["baseline"], linewidth=2.5, label=label)
    for at, bar in enumerate(bars):
        total = sum(row["seconds"] for row in table if row["bar"] == bar)
        beside = {"xytext": (4, 0), "textcoords": "offset points", "va": "center"}
        ax.annotate(f"{total:.1f} s", (total, at), **beside, fontsize=8, color=MUTED)
    ax.invert_yaxis()
    ax.margins(x=0.18)
    ax.set(xlabel="seconds")
    ax.set_xlim(left=0)
    draw.legend(fig)
    ends = {bar: sum(row["seconds"] for row in table if row["bar"] == bar) for bar in bars}
    said = ", ".join(f"{bar} {seconds:.1f} s" for bar, seconds in ends.items())
    caption = "Seconds of each stage; the limit is what the multiply-adds allow at the composed network's speed."
    return Drawing("times", caption, f"{caption} {said}.", table, fig)


def _before(kind: str, other: str) -> bool:
    order = list(KINDS)
    return order.index(kind) < order.index(other)
