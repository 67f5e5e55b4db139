"""The ways of benchmarks/time_to_accuracy.py: what they cost and what they train, and how their rows are compared."""

import csv
import importlib
import math
import sys
from pathlib import Path

import pytest
from PIL import Image

from timm_dd.train.run import Run
from timm_dd.train.settings import options

FOLDER = Path(__file__).parent.parent / "benchmarks"
SCRIPTS = ("time_to_accuracy", "time_to_accuracy_table", "way_speeds", "ways", "image_sets", "common")


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    yield {name: importlib.import_module(name) for name in SCRIPTS}
    for name in SCRIPTS:
        sys.modules.pop(name, None)


def convolutions(widths, size, scale, classes):
    """Multiply-adds of ResNet20 by hand: 3×3 convolutions, 1×1 shortcuts where the width changes, the classifier."""
    n, total, width = round(size * scale), 0, widths[0]
    total += 9 * 3 * width * n * n
    for stage, out in enumerate(widths):
        n = math.ceil(n / 2) if stage else n
        for _ in range(3):
            total += 9 * (width * out + out * out) * n * n + (width * out * n * n if width != out else 0)
            width = out
    return total + width * classes


def test_costs_are_those_of_the_networks_by_hand(scripts):
    unit, ways = convolutions((32, 64, 128), 32, 1, 10), scripts["ways"]
    part = 4 * convolutions((8, 16, 32), 32, 0.625, 10) / unit
    joint = 4 * convolutions((8, 16, 32), 32, 1, 10) / unit
    assert ways.costs("cifar10", "recipe", 10, []) == pytest.approx({"part": 40 * part, "joint": 4 * joint, "tune": 5})
    narrow = convolutions((16, 32, 64), 32, 1, 10) / unit
    assert ways.costs("cifar10", "narrow", 10, []) == pytest.approx({"part": 40 * narrow, "joint": 0, "tune": 0})
    small = convolutions((32, 64, 128), 32, 0.5, 10) / unit
    assert ways.costs("cifar10", "progressive", 10, []) == pytest.approx({"part": 20 * small, "joint": 0, "tune": 5})


@pytest.mark.parametrize("which", ["cifar10", "flowers"])
def test_ways_have_one_budget(scripts, which):
    ways, n = scripts["ways"], 20
    for way in set(ways.WAYS) - set(ways.LAST):
        length = {"half": 0.5, "double": 2}.get(way.rpartition("-")[2], 1)
        assert sum(ways.costs(which, way, n, []).values()) == pytest.approx(length * n, rel=0.05), way


def test_the_baseline_is_the_network_from_a_random_start(scripts, tmp_path):
    """Part 0 of 1, against what --baseline trains."""
    tiny = "--dataset digits --train-num-samples 64 --val-num-samples 32 -b 32 -j 0 --model-kwargs widths=(4,4,8)"
    words = [*scripts["ways"].words("cifar10", "baseline", 2), *tiny.split(), "--output", str(tmp_path), "--lr", "0.01"]
    run = Run(options.parse([*words, "--baseline", "--baseline-epochs", "2"]))
    run.go()
    one, other = ((run.folder.path / name / "summary.csv").read_text() for name in ("parts/0", "baseline"))
    without_seconds = [[row.rpartition(",")[0] for row in text.splitlines()] for text in (one, other)]
    assert without_seconds[0] == without_seconds[1] and len(without_seconds[0]) == 3


def test_rows_are_measured_once(scripts, tmp_path, monkeypatch):
    for split, images in (("train", 16), ("val", 4)):
        for i in range(images):
            path = tmp_path / "made" / split / f"{i % 2}" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (32, 32), (10 * i, 0, 255 - i)).save(path)
    main, out = scripts["time_to_accuracy"], tmp_path / "rows.csv"
    monkeypatch.setattr(main.image_sets, "whole", lambda *_: tmp_path / "made")
    words = (
        f"x --sets cifar10 --seeds 0 --epochs 1 --ways recipe baseline --workers 0 --out {out} --kept {tmp_path}/kept"
    )
    monkeypatch.setattr(sys, "argv", [*words.split(), "--", "-b", "8", "--model-kwargs", "widths=(4,4,8)"])
    main.main()
    rows = list(csv.DictReader(out.open()))
    assert [row["way"] for row in rows] == ["recipe", "baseline"]
    recipe, baseline = rows
    assert [len(recipe[f"{stage}_top1"].split()) for stage in ("part", "joint", "tune")] == [4, 1, 1]
    assert recipe["tune_top1"] == recipe["final"] and baseline["part_top1"] == baseline["final"]
    assert (recipe["part_updates"], baseline["cost"]) == ("8", "1.000")
    times = [float(s) for stage in ("part", "joint", "tune") for s in recipe[f"{stage}_at_s"].split()]
    assert times == sorted(times) and times[-1] == pytest.approx(float(recipe["seconds"]), abs=0.11)
    monkeypatch.setattr(main, "Run", None)
    main.main()
    assert list(csv.DictReader(out.open())) == rows


def test_budgets_are_read_off_the_baselines_curve(scripts):
    table = scripts["time_to_accuracy_table"]
    curve = [(8.0, 80.0), (16.0, 84.0), (32.0, 86.0)]
    assert table.budget_for(curve, 82.0) == pytest.approx(8 * 2**0.5)
    assert table.budget_for(curve, 86.0) == pytest.approx(32.0)
    assert table.budget_for(curve, 87.0) is None
    assert table.against(curve, 12.0, 84.0) == "0.75"
    assert table.against(curve, 16.0, 87.0) == "< 0.50"
    assert table.against(curve, 16.0, 79.0) == "> 2.00"


def test_the_best_rate_is_that_of_the_longest_search(scripts):
    main = scripts["time_to_accuracy"]
    rows = [
        dict(set="cifar10", way="recipe", n=n, lr=lr, final=final)
        for n, lr, final in (("2", "0.001", "50"), ("8", "0.002", "40"), ("8", "0.004", "42"), ("8", "0.001", "41"))
    ]
    assert main.best_rate(rows, "cifar10", "recipe-half") == 0.004
    assert main.best_rate(rows, "cifar10", "narrow") == main.RATE


def test_the_pages_say_what_the_tables_say(scripts):
    """Means of the seeds; multiply-adds and seconds of updates over what the baseline needs for the same accuracy."""
    main, table = scripts["time_to_accuracy"], scripts["time_to_accuracy_table"]
    readme, results = (" ".join((FOLDER.parent / p).read_text().split()) for p in ("README.md", "docs/results.md"))
    rows = main.read(FOLDER / "time_to_accuracy.csv")
    measures = table.with_speeds(rows, main.read(FOLDER / main.SPEEDS))
    (groups,) = table.grouped(rows).values()
    shares: dict[str, dict[str, str]] = {}
    curves = {m: table.points([g for g in groups if g.family == "baseline"], m) for m in measures}
    for g in groups:
        shares[g.way] = {m: table.against(curve, g.mean(m), g.mean("final")) for m, curve in curves.items()}
        own = g.family != "baseline"
        cells = [f"{g.mean(name):.2f}" if own and g.mean(name) else "–" for name in table.FIGURES[:-1]]
        budgets = [f"{g.mean(m):.{1 if m == 'cost' else 0}f} | {shares[g.way][m] if own else 1}" for m in measures]
        assert f"| {g.way} | {' | '.join([*cells, g.text('final'), *budgets])} |" in results
    recipe = [shares[way]["cost"] for way in ("recipe-half", "recipe")]
    said = "needs {} to {} of".format(*recipe)
    assert said in readme and said in results
    assert f"progressive resizing {shares['progressive']['cost']}" in readme
    for device in list(measures)[1:]:
        said = "{} and {} times as long".format(*(shares[way][device] for way in ("recipe-half", "recipe")))
        assert said in results, device
    best = {}
    for row in main.read(FOLDER / main.SEARCH):
        best[row["way"]] = max(best.get(row["way"], 0.0), float(row["final"]))
    (threads,) = (
        r
        for r in main.read(FOLDER / "epoch_ratio.csv")
        if (r["setting"], r["engine"]) == ("resnet32-scaled", "threads")
    )
    assert f"takes 1/{float(threads['ratio']):.1f} of the global network's" in results
    assert f"allow 1/{float(threads['limit']):.1f}" in results
    assert f"({best['narrow']:.2f} % against {best['recipe']:.2f} %)" in results
