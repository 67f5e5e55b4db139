"""Every code block of the README and of docs/ runs, in the order in which a reader meets them, in an empty folder; the
figures there are those of the benchmarks' tables."""

import csv
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import timm_dd

ROOT = Path(__file__).parent.parent
README, RESULTS = (ROOT / "README.md").read_text(), (ROOT / "docs" / "results.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TRAINING = {"README", "training"}  # pages with runs of both stages
BLOCK = re.compile(r"```(\w*)\n(.*?)```", re.S)
INSTALL = re.compile(r"^pip install '\.\[(\w+)\]' && ")
# The blocks of a page, [language, text]: Python in one namespace, bash by itself.
RUN = """
import json, subprocess, sys
namespace = {"__name__": "page"}
for language, text in json.load(sys.stdin):
    if language == "python":
        exec(compile(text, "<a block of the page>", "exec"), namespace)
    else:
        subprocess.run(["bash", "-ec", text], check=True)
"""


def blocks(page):
    return BLOCK.findall(page.read_text())


def run(commands, folder):
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", RUN],
        **dict(input=json.dumps(commands), capture_output=True, text=True, timeout=1200),
        **dict(cwd=folder, env={**os.environ, "PATH": path}),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_first_block_installs_and_runs_the_demo(tmp_path):
    """What it installs is installed; what it runs shows what Table 3.3 shows."""
    language, text = blocks(ROOT / "README.md")[0]
    assert INSTALL.match(text).group(1) == "demo"
    out = run([(language, INSTALL.sub("", text))], tmp_path)
    accuracy = {m[1].strip(): float(m[2]) for m in re.finditer(r"^(\S.*?)  +(\d+\.\d\d)  +\d*", out, re.M)}
    parts = [v for k, v in accuracy.items() if k.startswith("part ")]
    assert len(parts) == 4
    assert accuracy["composed, before fine-tuning"] > max(parts)
    assert accuracy["composed, after fine-tuning"] >= accuracy["baseline, random start"] - 1
    loaded = re.search(r"create_model\('local-dir:.*?: (\d+\.\d\d) %", out)
    assert float(loaded[1]) == accuracy["composed, after fine-tuning"]


def test_the_second_block_installs_and_runs_these_tests():
    language, text = blocks(ROOT / "README.md")[1]
    assert language == "bash" and INSTALL.match(text).group(1) == "test"
    assert INSTALL.sub("", text).strip() == "python -m pytest -n 2"


@pytest.mark.parametrize(
    "page", [pytest.param(p, id=p.stem, marks=[pytest.mark.slow] if p.stem in TRAINING else []) for p in PAGES]
)
def test_the_blocks_of_a_page_run(page, tmp_path):
    """All but installing, which the README's first two begin with, and ```text, which is not for this machine."""
    languages = {language for language, _ in blocks(page)}
    assert languages <= {"bash", "python", "text"}
    commands = [b for b in blocks(page) if b[0] != "text" and not INSTALL.match(b[1])]
    if commands:
        run(commands, tmp_path)


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"https?:", target):
            continue
        name, _, section = target.partition("#")
        other = (page.parent / name).resolve() if name else page
        assert other.exists(), target
        if section:
            titles = re.findall(r"^#+ (.*)$", other.read_text(), re.M)
            assert section in {re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in titles}, target


def test_the_software_can_be_cited():
    """https://github.com/citation-file-format, version 1.2.0: what it requires, and our version."""
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited.keys() >= {"cff-version", "message", "title", "authors", "version", "license", "references"}
    assert (cited["cff-version"], cited["type"], cited["license"]) == ("1.2.0", "software", "Apache-2.0")
    assert cited["version"] == timm_dd.__version__
    for entry in [cited, *cited["references"]]:
        assert entry["title"] and all(a.get("name") or a.get("family-names") for a in entry["authors"])
    volumes = {(r["type"], r["authors"][0]["family-names"], r.get("volume"), r["year"]) for r in cited["references"]}
    assert volumes == {("article", "Gu", 56, 2022), ("article", "Klawonn", 46, 2024)}


# ---- figures


def table(name):
    return list(csv.DictReader((ROOT / "benchmarks" / f"{name}.csv").open()))


def flat(text):
    return " ".join(text.split())


def test_figures_say_where_they_come_from():
    """Command, table, commit and device, as the tables say."""
    command, link = r"`python benchmarks/(\w+)\.py[^|]*`", r"\[[\w.]+\]\(\.\./(.*?)\)"
    rows = re.findall(rf"^\| [^|]* \| {command} \| {link} \| (.*?) \| (.*?) \|$", RESULTS, re.M)
    assert len(rows) == 13
    for script, path, commits, device in rows:
        assert (ROOT / "benchmarks" / f"{script}.py").exists()
        found = list(csv.DictReader((ROOT / path).open()))
        assert {r["timm_dd"] for r in found} == set(commits.split("; "))
        torch = {"2.11.0"} if device.startswith("NVIDIA") else {"2.14.1", "2.15.0"}
        assert {(r["device"], r["timm"]) for r in found} == {(device, "1.0.31")}
        assert {r["torch"] for r in found} <= torch


def test_the_figures_of_the_readme_are_those_of_the_tables():
    (threads,) = (r for r in table("epoch_ratio") if (r["setting"], r["engine"]) == ("resnet32", "threads"))
    assert f"takes 1/{float(threads['ratio']):.1f} of a step" in README
    rows = table("zoo/k4")
    exact = sum(r["verdict"].startswith("exact") for r in rows)
    assert f"{exact} of timm's {len(rows)} CNNs" in README


def test_ratios_are_those_of_the_table():
    rows = table("epoch_ratio")
    starts = {
        "resnet32": "4 | 16×16",
        "resnet32-overlap": "4 | 20×20",
        "resnet32-scaled": "4 | whole images at 20×20",
        "resnet32-8": "8 | 16×8",
        "resnet32-16": "16 | 8×8",
    }
    for setting, start in starts.items():
        engines = {r["engine"]: r for r in rows if r["setting"] == setting}
        ratios = " | ".join(f"{float(engines[e]['ratio']):.1f}×" for e in ("sequential", "threads", "packed"))
        memory = " / ".join(engines[e]["parts_mb"] for e in ("sequential", "threads", "packed"))
        limit, whole = float(engines["threads"]["limit"]), engines["threads"]["global_mb"]
        assert f"| {start} | {ratios} | {limit:.1f}× | {memory} of {whole} |" in RESULTS


def test_steps_on_a_gpu_are_those_of_the_table():
    """Milliseconds, by precision, and what the bytes allow."""
    name = "resnet20 of 32-64-128, 4 parts, 256"
    rows = [r for r in table("gpu") if r["setting"] == name]
    labels = {
        "global": "global network",
        "global, graph": "global network, CUDA graph",
        "one after another": "parts, one after another",
        "packed": "parts, packed",
        "graph of packed": "parts, CUDA graph of packed",
        "graph of streams": "parts, CUDA graph of a stream for each",
    }
    for engine, label in labels.items():
        ms = " | ".join(f"{float(r['ms']):.1f}" for r in rows if r["engine"] == engine)
        assert f"| {label} | {ms} |" in RESULTS
    allowed = [next(r["roofline_ms"] for r in rows if r["engine"] == e) for e in ("global", "packed")]
    assert "{:.2f} for the global network and {:.2f} for all parts".format(*map(float, allowed)) in flat(RESULTS)
    best = [min(float(r["ms"]) for r in rows if r["engine"].startswith("global") == whole) for whole in (True, False)]
    assert f"{best[0] / best[1]:.1f}× of {rows[0]['limit']}×" in flat(RESULTS)


def test_means_are_those_of_the_table():
    rows, sections = table("stage2_start"), RESULTS.partition("### Digits")[2].split("### CIFAR-10", 1)
    for which, section in zip(("digits", "cifar10"), sections):
        for variant in dict.fromkeys(r["variant"] for r in rows if r["set"] == which):
            seeds = [r for r in rows if (r["set"], r["variant"]) == (which, variant)]
            keys = ("parts", "together", "joint", "composed", "updated", "first", "tuned", "cost")
            values = ([float(r[k]) for r in seeds if r[k]] for k in keys)
            means = " | ".join(f"{sum(v) / len(v):.2f}" if v else "–" for v in values)
            assert f"| {variant} | {len(seeds)} | {means} |" in section


def test_two_levels_are_those_of_the_table():
    """Means of the seeds: top-1, the paper's, then millions of multiply-adds and seconds."""
    ours = ("global", "avg", "min", "max", "mean", "vote", "sum", "dnn", "coherent", "transfer", "composed", "tuned")
    took = [f"{name}_seconds" for name in ("global", "parts", "dnn", "coherent", "transfer", "tuned")]
    rows = table("two_level")

    def cells(seeds, names, unit=1):
        values = ([float(r[name]) / unit for r in seeds if r[name]] for name in names)
        return " | ".join(f"{sum(v) / len(v):.2f}" if v else "–" for v in values)

    for key in dict.fromkeys((r["table"], f"{r['network']}, {r['boxes']}") for r in rows):
        seeds = [r for r in rows if (r["table"], f"{r['network']}, {r['boxes']}") == key]
        assert f"| {key[1]} | {len(seeds)} | {cells(seeds, ours)} |" in RESULTS
        counted = cells(seeds, [f"{name}_multiply_adds" for name in ("global", "parts", "dnn")], 1e6)
        assert f"| {key[1]} | {counted} | {cells(seeds, took)} |" in RESULTS
        if key[0]:
            said = cells(seeds, [f"paper_{name}" for name in ("global", "avg", "min", "max", "dnn")])
            assert f"| {key[0]}: {key[1]} | {said} |" in RESULTS


def test_scaling_is_that_of_the_table():
    rows = table("scaling")
    speed = {(r["kind"], r["what"], r["ranks"]): f"{float(r['speed']):.1f}" for r in rows}
    found = [speed["measured", what, n] for what in ("parts", "DistributedDataParallel") for n in "12"]
    assert "{} times with one rank and {} with two, the global network {} and {}".format(*found) in flat(RESULTS)


def test_merging_is_that_of_the_table():
    rows = table("merge_speed")
    ratios, sizes = sorted(float(r["ratio"]) for r in rows), sorted(int(r["parameters"]) for r in rows)
    peak = max(float(r["peak_mb"]) for r in rows)
    assert f"of {sizes[0] / 1e6:.0f} M to {sizes[-1] / 1e6:,.0f} M parameters" in flat(RESULTS)
    assert f"{ratios[0]:.2f} to {ratios[-1]:.2f} times as long" in flat(RESULTS)
    assert f"at most {math.ceil(peak)} MB more memory" in flat(RESULTS)


def test_splitting_and_the_papers_tables_are_those_of_the_tables():
    rows = table("split_speed")
    ratios = [float(r["ratio"]) for r in rows if r["ratio"]]
    longer = sum(r > 1 for r in ratios)
    assert f"{len(ratios)} of the {len(rows)} networks of the table, and takes longer for {longer} of" in flat(RESULTS)
    verdicts = [r["verdict"] for r in table("paper_tables")]
    within, explained = verdicts.count("within"), verdicts.count("explained")
    assert f"{len(verdicts)} rows of parameters, FLOPs and layers, ours agree in {within} " in flat(RESULTS)
    assert within + explained == len(verdicts) and f"The other {explained} are explained" in flat(RESULTS)


@pytest.mark.parametrize("parts", ["2", "4", "8"])
def test_totals_are_those_of_the_tables(parts):
    names = (ROOT / "benchmarks/zoo/names.txt").read_text().split()
    rows = table(f"zoo/k{parts}")
    exact = sum(r["verdict"].startswith("exact") for r in rows)
    approximate = sum(r["verdict"].startswith("approximate") for r in rows)
    replicated = sum(r["replicated"] == "yes" for r in rows)
    assert sorted(r["model"] for r in rows) == sorted(names) and exact + approximate == len(names)
    row = f"| {parts} | {exact} | {approximate} | {replicated} | [k{parts}.csv](../benchmarks/zoo/k{parts}.csv) |"
    assert row in RESULTS


def test_attention_networks_are_those_of_the_table():
    columns = ("parts", "together", "composed", "first", "tuned", "baseline", "cost")
    rows = [r for r in table("attention") if (r["variant"], r["seed"]) == ("plain", "0")]
    assert len(rows) == 4
    for r in rows:
        assert " | ".join([r["network"], *(r[c] for c in columns)]) in RESULTS
    for r in (r for r in table("attention") if r["seed"] == "0"):
        remedy = "none" if r["variant"] == "plain" else r["variant"]
        figures = [r["composed"], r["updated"] or "–", r["first"], r["tuned"]]
        assert f"| {' | '.join([r['network'], remedy, *figures])} |" in RESULTS


def test_every_model_of_timm_is_in_the_table():
    """Those that are no CNNs, of which k4.csv has all, are planned."""
    names, cnns = ((ROOT / "benchmarks/zoo" / f).read_text().split() for f in ("all_names.txt", "names.txt"))
    others, rows = {*names} - {*cnns}, {r["model"]: r for r in table("zoo/all_k4")}
    verdicts = [rows[name]["verdict"] for name in others]
    exact, approximate, refused = map(verdicts.count, ("exact", "approximate", "refused"))
    assert exact + approximate + refused == len(others) and len(names) == len({*names}) == len(others) + len(cnns)
    split = len(cnns) + exact + approximate
    assert f"{split:,} of timm's {len(names):,} models are split for K = 4" in flat(README)
    assert f"of the other {len(others)} {exact} are exact, {approximate} approximate" in flat(README)
