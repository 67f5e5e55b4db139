"""The table of two levels: the paper's figures in it, and what its script asks a run for."""

import argparse
import csv
import importlib
import sys
from pathlib import Path

import pytest

from timm_dd import console
from timm_dd.train.settings import options

FOLDER = Path(__file__).parent.parent / "benchmarks"
ROWS = list(csv.DictReader((FOLDER / "two_level.csv").open(encoding="utf-8")))


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    yield importlib.import_module("two_level")
    for name in ("two_level", "common"):
        sys.modules.pop(name, None)


def asked(script, which, row, **given):
    told = {"images": 2000, "validation": 1000, "epochs": 4, "whole": False, "data_dir": "data", **given}
    args = argparse.Namespace(**{**told, "data_dir": None} if which == "digits" else told)
    return options.parse(script.words(which, row, 1, args))


def test_what_a_row_asks_for(script):
    """Boxes of as many parts, the parts alone before all together, one number of epochs for all networks."""
    for which, rows in script.ROWS.items():
        for row in rows:
            args = asked(script, which, row)
            assert console.domain(args).parts == args.parts == row.parts
            assert (args.joint_epochs, args.coarse_widths, args.seed) == (0, [128, 64, 32], 1)
            assert args.aggregate == ["mean", "vote", "sum", "dnn"]
            stages = () if which == "digits" else ("part", "baseline", "coherent", "transfer", None)
            assert {options.stage_options(args, s).epochs for s in stages} <= {4}
    whole = asked(script, "cifar10", script.ROWS["cifar10"][0], whole=True, epochs=500)
    assert (whole.train_num_samples, whole.epochs) == (None, 500)


def test_the_papers_figures(script):
    """Tables 3 to 8: the local networks' mean lies between their extremes; CNN-DNN is above the best of them."""
    rows = [row for rows in script.ROWS.values() for row in rows if row.paper]
    assert [sum(row.table == f"Table {n}" for row in rows) for n in range(3, 9)] == [3, 3, 3, 4, 4, 4]
    for row in rows:
        _, mean, low, high, dnn = row.paper
        assert low < mean < high < dnn < 100


def test_the_committed_rows(script):
    by = {(which, r.table, r.network, r.boxes): r for which, rows in script.ROWS.items() for r in rows}
    for found in ROWS:
        row = by[tuple(found[name] for name in ("set", "table", "network", "boxes"))]
        said = [found[f"paper_{name}"] for name in script.PAPER]
        assert said == ([f"{v:.2f}" for v in row.paper] or [""] * 5)
        assert float(found["min"]) <= float(found["avg"]) <= float(found["max"])
        assert int(found["parts_multiply_adds"]) < int(found["dnn_multiply_adds"]) < int(found["global_multiply_adds"])
