"""Every code block of the README runs, in the order in which a reader meets them, in an empty folder; its figures are
those of the benchmarks' tables."""

import csv
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(bash|python)\n(.*?)```", TEXT, re.S)
INSTALL = re.compile(r"^pip install '\.\[(\w+)\]' && ")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("readme")


def run(language, text, folder):
    command = [sys.executable, "-W", "error", "-c", text] if language == "python" else ["bash", "-ec", text]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=600, env={**os.environ, "PATH": path}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_first_block_installs_and_runs_the_demo(folder):
    """What it installs is installed; what it runs shows what Table 3.3 shows."""
    language, text = BLOCKS[0]
    assert INSTALL.match(text).group(1) == "demo"
    out = run(language, INSTALL.sub("", text), folder)
    accuracy = {m[1].strip(): float(m[2]) for m in re.finditer(r"^(\S.*?)  +(\d+\.\d\d)  +\d*", out, re.M)}
    parts = [v for k, v in accuracy.items() if k.startswith("part ")]
    assert len(parts) == 4
    assert accuracy["composed, before fine-tuning"] > max(parts)
    assert accuracy["composed, after fine-tuning"] >= accuracy["baseline, random start"] - 1
    loaded = re.search(r"create_model\('local-dir:.*?: (\d+\.\d\d) %", out)
    assert float(loaded[1]) == accuracy["composed, after fine-tuning"]


def test_the_second_block_installs_and_runs_these_tests():
    language, text = BLOCKS[1]
    assert language == "bash" and INSTALL.match(text).group(1) == "test"
    assert INSTALL.sub("", text).strip() == "python -m pytest"


@pytest.mark.parametrize("block", range(2, len(BLOCKS)))
def test_block(block, folder):
    run(*BLOCKS[block], folder)


def table(name):
    return list(csv.DictReader((ROOT / "benchmarks" / f"{name}.csv").open()))


def test_ratios_are_those_of_the_table():
    rows = table("epoch_ratio")
    starts = {
        "resnet32": "4 | 16×16",
        "resnet32-overlap": "4 | 20×20",
        "resnet32-8": "8 | 16×8",
        "resnet32-16": "16 | 8×8",
    }
    for setting, start in starts.items():
        own = {r["engine"]: r for r in rows if r["setting"] == setting}
        ratios = " | ".join(f"{float(own[e]['ratio']):.1f}×" for e in ("sequential", "threads", "packed"))
        memory = " / ".join(own[e]["parts_mb"] for e in ("sequential", "threads", "packed"))
        limit, whole = float(own["threads"]["limit"]), own["threads"]["global_mb"]
        assert f"| {start} | {ratios} | {limit:.1f}× | {memory} of {whole} |" in TEXT


def test_means_are_those_of_the_table():
    rows = table("stage2_start")
    for variant in dict.fromkeys(r["variant"] for r in rows):
        seeds = [r for r in rows if r["variant"] == variant]
        keys = ("parts", "together", "composed", "updated", "first", "tuned")
        means = (sum(float(r[k]) for r in seeds) / len(seeds) for k in keys)
        assert len(seeds) == 3 and f"| {variant} | {' | '.join(f'{m:.2f}' for m in means)} |" in TEXT


def test_scaling_is_that_of_the_table():
    rows = table("scaling")
    speed = {(r["kind"], r["what"], r["ranks"]): f"{float(r['speed']):.1f}" for r in rows}
    found = [speed["measured", what, n] for what in ("parts", "DistributedDataParallel") for n in "12"]
    assert "{} times with one rank and {} with two, the global network {} and {}".format(*found) in TEXT


def test_time_to_accuracy_is_that_of_the_table():
    ratios = [float(r["ratio"]) for r in table("time_to_accuracy")]
    assert len(ratios) == 3 and f"after {sum(ratios) / 3:.2f}\nof their time, the mean of three seeds" in TEXT


def test_merging_is_that_of_the_table():
    rows = table("merge_speed")
    ratios, sizes = sorted(float(r["ratio"]) for r in rows), sorted(int(r["parameters"]) for r in rows)
    peak = max(float(r["peak_mb"]) for r in rows)
    assert f"of {sizes[0] / 1e6:.0f} M to {sizes[-1] / 1e6:,.0f} M parameters" in TEXT
    assert f"{ratios[0]:.2f} to {ratios[-1]:.2f} times as long" in TEXT
    assert f"at most {math.ceil(peak)} MB more memory" in TEXT


@pytest.mark.parametrize("parts", ["2", "4", "8"])
def test_totals_are_those_of_the_tables(parts):
    names = (ROOT / "benchmarks/zoo/names.txt").read_text().split()
    rows = list(csv.DictReader((ROOT / f"benchmarks/zoo/k{parts}.csv").open()))
    exact = sum(r["verdict"].startswith("exact") for r in rows)
    approximate = sum(r["verdict"].startswith("approximate") for r in rows)
    replicated = sum(r["replicated"] == "yes" for r in rows)
    assert sorted(r["model"] for r in rows) == sorted(names) and exact + approximate == len(names)
    assert f"| {parts} | {exact} | {approximate} | {replicated} | [k{parts}.csv](benchmarks/zoo/k{parts}.csv) |" in TEXT
