"""The table of the papers' figures: what it claims, whether its script still gives it, what the script refuses."""

import csv
import importlib
import sys
from pathlib import Path

import pytest

from timm_dd import Domain

FOLDER = Path(__file__).parent.parent / "benchmarks"
ROWS = list(csv.DictReader((FOLDER / "paper_tables.csv").open(encoding="utf-8")))
GU2022 = [f"Table {n} of gu2022" for n in ("2.1", "2.2", "3.1", "3.4")]


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    yield importlib.import_module("paper_tables")
    for name in ("paper_tables", "common"):
        sys.modules.pop(name, None)


def test_all_rows_of_the_committed_table_are_within_the_bar_or_explained():
    assert set(row["table"] for row in ROWS) == {*GU2022, "Table 1 of gu2021", "Table 2 of klawonn2023"}
    assert {row["verdict"] for row in ROWS} == {"within", "explained"}
    assert all(row["why"] for row in ROWS if row["verdict"] == "explained")


def test_figures_are_within_the_bar():
    figures = [row for row in ROWS if row["verdict"] == "within" and row["unit"]]
    for row in figures:
        if row["what"] == "FLOPs":
            assert abs(float(row["our_ratio"]) / float(row["ratio"]) - 1) < 0.0501
        for name in ("global", "part") if row["what"] == "parameters" else ():
            ours, paper = float(row[f"our_{name}"]), row[name]
            assert abs(ours / float(paper) - 1) < 0.01 or f"{ours:.{len(paper.partition('.')[2])}f}" == paper
    assert len(figures) > 40


def test_layers_are_those_of_the_paper():
    sizes = [row for row in ROWS if row["table"] == "Table 2.1 of gu2022"]
    assert len(sizes) == 25
    assert all(row["global"] == row["our_global"] and row["part"] == row["our_part"] for row in sizes)


@pytest.mark.parametrize("name", ["layers_of_vgg16", "flower_network", "local_networks"])
def test_the_script_gives_the_committed_rows(script, name):
    rows = [{key: str(value) for key, value in row.items()} for row in getattr(script, name)()]
    committed = [row for row in ROWS if row["table"] == rows[0]["table"]]
    assert rows == [{key: row[key] for key in rows[0]} for row in committed]


def test_the_boxes_of_figure_3_4(script):
    """19.69 MFLOPs for one of eight parts in Table 1 of gu2021; they grow with the box, here of 88 to 112 pixels."""
    fits = []
    for overlap in (0, 6, 7, 8, 9, 24):
        domain = Domain.centered8(overlap=overlap, margin=24)
        part = script.costs(script.blank(script.resnet_2333, num_classes=5), 8, domain)[1]
        if script.TWO_AND_TWO(part) / 1e6 == pytest.approx(19.69, rel=1e-3):
            fits.append(domain.boxes((224, 224))[0].extent)
    assert fits == [(95, 95), (96, 96)]


def test_a_wrong_network_is_outside_unless_its_recount_fits(script):
    where = script.Where("Table 1", "net", "ours", Domain.grid(2, 2), 4)

    def verdict(what, ours, recount, *whys):
        return script.row(where, what, 1, ("100.0", "10.0"), ours, recount, *whys)["verdict"]

    assert verdict("parameters", (100.9, 9.91), (100.9, 9.91)) == "within"
    assert verdict("parameters", (102, 10), (102, 10), "a reason") == "OUTSIDE"
    assert verdict("parameters", (100, 9.8), (100, 10), "a reason") == "explained"
    assert verdict("parameters", (100, 9.8), (100, 10)) == "OUTSIDE"
    assert verdict("FLOPs", (104, 10), (104, 10)) == verdict("FLOPs", (200, 20), (200, 20)) == "within"
    assert verdict("FLOPs", (106, 10), (100, None), "a reason") == "OUTSIDE"
    assert verdict("FLOPs", (106, 10), (101, 10), "a reason") == "explained"


def test_exit_status(script, monkeypatch, tmp_path, capsys):
    where = script.Where("Table 1", "net", "ours", Domain.grid(2, 2), 4)
    good, bad = (script.row(where, "FLOPs", 1, ("9", "3"), (n, 3), (n, 3)) for n in (9, 10))
    monkeypatch.setattr(script, "CSV", tmp_path / "table.csv")
    for rows, status in (([good], 0), ([good, bad], 1)):
        monkeypatch.setattr(script, "TABLES", [lambda rows=rows: iter(rows)])
        assert script.main() == status
    assert "1 within, 1 OUTSIDE" in capsys.readouterr().out
    assert len((tmp_path / "table.csv").read_text().splitlines()) == 3
