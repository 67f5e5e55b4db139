"""The rows of `time_to_accuracy`: means over seeds, what share of the baseline's budget each way needs, and a plot."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ways import STAGES, WAYS

from timm_dd.reports.draw import axes as axes_of
from timm_dd.reports.draw import figure
from timm_dd.text import table

LENGTHS = ("-half", "-double")
PAPER = ["gu2022, ResNet32, overlap", "4", "80.11", "88.33", "", "94.40", "93.26"]  # Table 3.3, its parts' mean
FIGURES = ("parts", "together", "joint", "composed", "final")


class Group(NamedTuple):
    """The rows of all seeds of a way."""

    way: str
    rows: list[dict[str, str]]

    def values(self, name: str) -> list[float]:
        return [float(row[name]) for row in self.rows if row[name]]

    def mean(self, name: str) -> float | None:
        values = self.values(name)
        return statistics.mean(values) if values else None

    def text(self, name: str) -> str:
        values = self.values(name)
        if not values:
            return ""
        spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.2f}{spread}"

    @property
    def family(self) -> str:
        return family(self.way)


def family(way: str) -> str:
    """A way without its length."""
    return next((way.removesuffix(end) for end in LENGTHS if way.endswith(end)), way)


def grouped(rows: list[dict[str, str]]) -> dict[tuple[str, ...], list[Group]]:
    """The ways of each set, budget, options and device, which can be compared."""
    found: dict[tuple[str, ...], dict[str, list[dict[str, str]]]] = {}
    for row in rows:
        key = (row["set"], row["n"], row["options"], row["device_type"])
        found.setdefault(key, {}).setdefault(row["way"], []).append(row)
    return {key: [Group(way, of[way]) for way in WAYS if way in of] for key, of in found.items()}


def with_speeds(rows: list[dict[str, str]], speeds: list[dict[str, str]]) -> dict[str, str]:
    """Give each row the seconds that its updates take by themselves, on each device whose speeds are known; returns
    what can be compared, by the column's name."""
    known = {(s["device"], s["set"], s["way"], s["stage"]): float(s["seconds"]) for s in speeds}
    measures = {"cost": "multiply-adds"}
    for device in dict.fromkeys(s["device"] for s in speeds):
        measures[device] = f"seconds of updates, {device}"
        for row in rows:
            updates = {stage: int(row[f"{stage}_updates"]) for stage in STAGES if int(row[f"{stage}_updates"])}
            each = [known.get((device, row["set"], family(row["way"]), stage)) for stage in updates]
            row[device] = "" if None in each else f"{sum(n * s for n, s in zip(updates.values(), each)):.1f}"
    return measures


def points(groups: Sequence[Group], measure: str) -> list[tuple[float, float]]:
    """(budget, accuracy), by budget."""
    return sorted((g.mean(measure), g.mean("final")) for g in groups if g.mean(measure) is not None)


def budget_for(curve: Sequence[tuple[float, float]], accuracy: float) -> float | None:
    """At which a curve first has an accuracy, between its points on a line over the budget's logarithm; None if it
    never has, or has it from the start, so that where it begins to is not known."""
    for (left, low), (right, high) in zip(curve, curve[1:]):
        if low < accuracy <= high:
            share = (accuracy - low) / (high - low)
            return math.exp(math.log(left) + share * (math.log(right) - math.log(left)))
        if accuracy <= low:
            break
    return None


def against(curve: Sequence[tuple[float, float]], budget: float, accuracy: float) -> str:
    """A way's budget over what the baseline needs for the same accuracy."""
    if not curve:
        return ""
    best = max(curve, key=lambda point: point[1])
    if accuracy > best[1]:
        return f"< {budget / best[0]:.2f}"
    if accuracy <= curve[0][1]:
        return f"> {budget / curve[0][0]:.2f}" if accuracy < curve[0][1] else f"{budget / curve[0][0]:.2f}"
    needed = budget_for(curve, accuracy)
    return f"{budget / needed:.2f}"


def as_good_as_the_best(groups: list[Group], measure: str, name: str) -> list[str]:
    """A line for each family of ways but the baseline: after what share of its budget it has the accuracy of the best
    baseline."""
    baselines = points([g for g in groups if g.family == "baseline"], measure)
    if not baselines:
        return []
    spent, goal = max(baselines, key=lambda point: point[1])
    lines = []
    for family in dict.fromkeys(g.family for g in groups if g.family != "baseline"):
        curve = points([g for g in groups if g.family == family], measure)
        if not curve:
            continue
        at = budget_for(curve, goal)
        if at is not None:
            said = f"after {at / spent:.2f} of its {name}"
        elif curve[0][1] >= goal:
            said = f"after {curve[0][0] / spent:.2f} of its {name} or less"
        else:
            said = f"not in {curve[-1][0] / spent:.2f} of its {name}, {goal - curve[-1][1]:.2f} short"
        lines.append(f"{family}: as good as the best baseline ({goal:.2f} %) {said}")
    return lines


def shape(groups: list[Group]) -> list[list[str]]:
    """As Table 3.3 of gu2022: parts, composed, tuned, random start; ours have re-estimated BatchNorm statistics too."""
    lines = [["", "K", "parts", "composed", "re-estimated", "tuned", "random start"]]
    random = next((g.text("final") for g in groups if g.way == "baseline"), "")
    for g in groups:
        k = g.rows[0]["k"]
        if g.way.removesuffix(f"-{k}") in ("boxes", "recipe"):
            lines.append([g.way, k, *(g.text(name) for name in ("parts", "composed", "updated", "final")), random])
    return [*lines, PAPER]


def show(rows: list[dict[str, str]], speeds: list[dict[str, str]], picture: Path) -> None:
    measures = with_speeds(rows, speeds)
    for key, groups in grouped(rows).items():
        print(f"{title(key)}\n\n{table(budgets(groups, measures))}\n")
        print("\n".join(line for m in measures.items() for line in as_good_as_the_best(groups, *m)), end="\n\n")
        print(table(shape(groups)), end="\n\n")
    if rows:
        draw(grouped(rows), measures, picture)


def budgets(groups: list[Group], measures: dict[str, str]) -> list[list[str]]:
    """A line for each way: its accuracies, its budgets, and these over what the baseline needs for that accuracy."""
    curves = {measure: points([g for g in groups if g.family == "baseline"], measure) for measure in measures}
    lines = [["", "seeds", *FIGURES, *(word for name in measures.values() for word in (name, "of baseline's"))]]
    for g in groups:
        shares = []
        for measure, curve in curves.items():
            budget = g.mean(measure)
            shares += [g.text(measure), "" if budget is None else against(curve, budget, g.mean("final"))]
        lines.append([g.way, str(len(g.rows)), *(g.text(name) for name in FIGURES), *shares])
    return lines


def title(key: tuple[str, ...]) -> str:
    which, n, given, device = key
    return f"{which}, N = {n} epochs, {device} {given}".strip()


def draw(sets: dict[tuple[str, ...], list[Group]], measures: dict[str, str], path: Path) -> None:
    """Accuracy over each measure: the baseline's lengths are the curve to beat."""
    fig = figure(4 * len(sets), 5 * len(measures))
    for places, (key, groups) in zip(axes_of(fig, len(sets), len(measures)), sets.items()):
        for place, (measure, name) in zip(places, measures.items()):
            known = sorted((g for g in groups if g.mean(measure) is not None), key=lambda g: g.mean(measure))
            for family in dict.fromkeys(g.family for g in groups):
                own = [g for g in known if g.family == family]
                bars = [statistics.stdev(v) if len(v := g.values("final")) > 1 else 0.0 for g in own]
                x, y = ([g.mean(of) for g in own] for of in (measure, "final"))
                style = {"color": "black", "linewidth": 1.5} if family == "baseline" else {"linewidth": 0.8}
                place.errorbar(x, y, bars, marker="o", capsize=3, label=family, **style)
            place.set_xlabel(name)
            place.set_title(title(key), fontsize="small")
        places[0].set_ylabel("top-1 %")
        places[0].legend(fontsize="small")
    fig.savefig(path, dpi=150)
