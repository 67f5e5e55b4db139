"""The table that ends a run, how much sooner the pipeline was as good as the baseline, and what to know of both."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..text import number
from ..two_level.aggregate import TOGETHER
from .record import Record

MEGA = 10**6
HEADING = ("", "top-1 %", "top-5 %", "epochs", "seconds", "multiply-adds")


@dataclass(frozen=True)
class Row:
    """A network of a run: its accuracies in %, what its training took, and the multiply-adds of an image.

    Attributes:
        top5: None where it is not known.
        note: to the seconds.
        bound: whether there are operations that the multiply-adds do not count.
    """

    title: str
    top1: float
    top5: float | None
    multiply_adds: int
    epochs: int | None = None
    seconds: float | None = None
    note: str = ""
    bound: bool = False

    def cells(self) -> tuple[str, ...]:
        """As they stand under `HEADING`."""
        time = "" if self.seconds is None else f"{self.seconds:.1f}{self.note}"
        count = f"{'at least ' if self.bound else ''}{number(self.multiply_adds / MEGA)} M"
        five, epochs = ("" if n is None else f"{n:{kind}}" for n, kind in ((self.top5, ".2f"), (self.epochs, "d")))
        return self.title, f"{self.top1:.2f}", five, epochs, time, count


def rows(summary: Mapping[str, Any], epochs: Mapping[str, int]) -> Iterator[Row]:
    """The networks of a run in the order in which they were made; `epochs` are those of each stage."""
    seconds, macs, top5 = summary["seconds"], summary["multiply_adds"], summary.get("top5", {})
    bound = bool(macs["uncounted"])

    def row(*values: Any) -> Row:
        return Row(*values, bound=bound)

    fives = top5.get("parts", [None] * len(macs["parts"]))
    for k, (top1, five, count) in enumerate(zip(summary["parts"], fives, macs["parts"])):
        took = () if k else (seconds["parts"], " for all")
        yield row(f"part {k}, its own box", top1, five, count, epochs.get("part", 0), *took)
    yield row("sum of the parts, own boxes", summary["together"], top5.get("together"), sum(macs["parts"]))
    for how, top1 in summary.get("two_level", {}).items():
        took = (epochs.get(how, 0), seconds["two_level" if how == "dnn" else how]) if how in ("dnn", *TOGETHER) else ()
        yield row(f"two levels, {how}", top1, None, macs["two_level"][how], *took)
    if "joint" in summary:
        took = (epochs.get("joint", 0), seconds["joint"])
        yield row("joint, whole images", summary["joint"], None, macs["joint"], *took)
    whole = macs["composed"]
    yield row("composed, before fine-tuning", summary["composed"], top5.get("composed"), whole, 0)
    if "updated" in summary:
        yield row("composed, BatchNorm re-estimated", summary["updated"], top5.get("updated"), whole, 0)
    took = (epochs.get("composed", 0), seconds["composed"])
    yield row("composed, after fine-tuning", summary["tuned"], top5.get("tuned"), whole, *took)
    if summary.get("best_epoch"):
        yield row("composed, best epoch", summary["best"], top5.get("best"), whole, summary["best_epoch"])
    if "baseline" in summary:
        took = (epochs.get("baseline", 0), seconds["baseline"])
        yield row("baseline, random start", summary["baseline"], top5.get("baseline"), whole, *took)


def sooner(curves: Sequence[Mapping[str, Any]]) -> str:
    """When the fine-tuned model was first as good as the baseline is after its last epoch, and when the baseline was;
    `curves` are the rows of `curves.rows` of one run."""
    named = {stage: [row for row in curves if row["stage"] == stage] for stage in ("composed", "baseline")}
    if not named["baseline"]:
        return "There is no baseline to compare with: train with --baseline."
    if not named["composed"]:
        return "There is no fine-tuned model yet to compare with the baseline."
    goal = named["baseline"][-1]["top1"]
    first = {stage: next((row["seconds"] for row in of if row["top1"] >= goal), None) for stage, of in named.items()}
    ours, theirs = first["composed"], first["baseline"]
    if ours is None:
        best = max(row["top1"] for row in named["composed"] if not math.isnan(row["top1"]))
        return f"The pipeline did not reach the baseline's {goal:.2f} %; its best epoch has {best:.2f} %."
    ratio = f": {theirs / ours:.2f} times as fast" if theirs > ours else f": {ours / theirs:.2f} times as long"
    return (
        f"The pipeline reached the baseline's {goal:.2f} % after {ours:.1f} s, the baseline itself after "
        f"{theirs:.1f} s{ratio}."
    )


def warnings(record: Record) -> list[str]:
    """What a reader has to know besides the figures."""
    found = [f"Part {k} failed: {why}" for k, why in record.failures.items()]
    if record.args and record.summary is None:
        found.append("The run is not done: what follows is what there is so far.")
    if int(record.args.get("cycles") or 1) > 1:
        found.append("The run has several cycles: this is the first; those after it lie in cycle-2 and so on.")
    for curve in record.curves:
        odd = [int(row["epoch"]) for row in curve.rows if not math.isfinite(row["loss"])]
        if odd:
            epochs = counted(len(odd), "epoch")
            found.append(f"The loss of {curve.name} is not finite in {epochs}, the first is {odd[0]}.")
        cut = [row["clipped"] for row in curve.rows if "clipped" in row]
        if any(cut):
            mean, most = sum(cut) / len(cut), max(cut)
            found.append(
                f"{mean:.0f} % of the updates of {curve.name} had clipped gradients, at most {most:.0f} % in an epoch."
            )
    plan = record.plan
    if plan is None:
        return found
    places = Counter(reason for *_, reason in plan.approximations)
    found += [f"Approximate in {counted(n, 'place')}: {reason}." for reason, n in places.most_common()]
    if plan.narrow:
        kept = ", ".join(f"{where} of {n}" for where, n in plan.narrow)
        found.append(f"Too few channels for {plan.divisor} parts, so whole in every part: {kept}.")
    if plan.divisor != plan.parts:
        found.append(f"Parts of a {plan.divisor}-th of the width: {plan.parts} of them are not to be merged.")
    return found


def counted(n: int, what: str) -> str:
    """``1 image``, ``2 images``."""
    return f"{n} {what}{'s' * (n != 1)}"
