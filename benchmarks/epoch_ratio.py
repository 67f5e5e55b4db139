"""How much faster all K parts take a step than the global network, engine by engine, beside what the FLOPs allow.

    pip install '.[report]' && python benchmarks/epoch_ratio.py          # into epoch_ratio.csv and epoch_ratio.png

Global network and parts take turns of four steps, in one process, on a batch that stands in memory: forward, backward
and optimizer, without a loader. Four, since the steps of an epoch follow each other too: the first step after another
network's finds the caches cold. A ratio is the global network's median turn over the parts'; "limit" is that of
their multiply-adds, all K parts together. --rounds sets how often; names of settings measure these alone again.
Peak memory is that of three steps in a separate process, above what it held before it built the networks; "tensors"
is the same with MALLOC_MMAP_THRESHOLD_ set, so that glibc's malloc gives back at once what is freed.
"""

import argparse
import csv
import gc
import multiprocessing
import os
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from common import provenance, write_table

import timm_dd
from timm_dd import Domain, models
from timm_dd.algebra.view import View
from timm_dd.reports.draw import axes as axes_of
from timm_dd.reports.draw import figure
from timm_dd.train.engines import engine
from timm_dd.train.ranks.cores import cores_of_rank, part_threads, share_cores
from timm_dd.train.settings import options
from timm_dd.train.updates.learner import Learner

CPU = torch.device("cpu")
ENGINES = ("sequential", "threads", "packed")
TURN = 4


class Setting(NamedTuple):
    model: str
    parts: int
    domain: Domain
    size: int
    batch: int

    @property
    def given(self) -> dict:
        return {"domain": self.domain, "img_size": self.size, "num_classes": 10}


SETTINGS = {
    "resnet32": Setting("dd_resnet32", 4, Domain.grid(2, 2), 32, 128),
    "resnet32-overlap": Setting("dd_resnet32", 4, Domain.grid(2, 2, overlap=4), 32, 128),
    "resnet32-8": Setting("dd_resnet32", 8, Domain.grid(2, 4), 32, 128),
    "resnet32-16": Setting("dd_resnet32", 16, Domain.grid(4, 4), 32, 128),
    "resnet32-scaled": Setting("dd_resnet32", 4, Domain.full(4, scale=0.625), 32, 128),
    "resnet32-half": Setting("dd_resnet32", 4, Domain.full(4, scale=0.5), 32, 128),
    "resnet32-whole": Setting("dd_resnet32", 4, Domain.full(4), 32, 128),
    "resnet50": Setting("resnet50", 4, Domain.grid(2, 2), 224, 16),
}


def learner(name: str, model: torch.nn.Module, view: View | None, batch: int, folder: str) -> Learner:
    args = options.parse(["--dataset", "digits", "--channels-last", "--lr", "0.01"])
    model = model.to(memory_format=torch.channels_last).train()
    return Learner(name, model, view, args, CPU, 1000, batch, 0, Path(folder))


def seconds(step: Callable[[], None]) -> float:
    """Of a step, in a turn of some."""
    start = time.perf_counter()
    for _ in range(TURN):
        step()
    return (time.perf_counter() - start) / TURN


def step_of(setting: Setting, name: str, folder: str) -> Callable[[], None]:
    """A step of the global network, or of all parts with the engine `name`."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(setting.batch, 3, setting.size, setting.size, generator=generator)
    y = torch.randint(10, (setting.batch,), generator=generator)
    if name == "global":
        whole = learner(name, models.create(setting.model, num_classes=10), None, setting.batch, folder)

        def step() -> None:
            share_cores(1)
            whole.step(x, y)

        return step
    split = timm_dd.split(setting.model, setting.parts, **setting.given)
    views = split.plan.views()
    parts = [learner(f"part {k}", p, view, setting.batch, folder) for k, (p, view) in enumerate(zip(split, views))]
    torch.set_num_threads(part_threads(name, setting.parts, 1))
    by = engine(name, parts, CPU, cores_of_rank(1))

    def steps() -> None:
        torch.set_num_threads(part_threads(name, setting.parts, 1))
        by.step(parts, x, y, isolate_failures=False)

    return steps


def measure(setting: Setting, rounds: int, folder: str) -> dict[str, float]:
    """Median seconds of a step of the global network, and of all parts with each engine."""
    steps = {name: step_of(setting, name, folder) for name in ("global", *ENGINES)}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds + 1):
        for name, step in steps.items():
            times[name].append(seconds(step))
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def peaks(setting: Setting, folder: str, own_pages: bool) -> dict[str, float]:
    """Peak MB of a step of each.

    Args:
        own_pages: what is larger than 1 MB has pages of its own.
    """
    if own_pages:
        os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**20)
    try:
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            return {name: pool.apply(peak, (setting, name, folder)) for name in ("global", *ENGINES)}
    finally:
        os.environ.pop("MALLOC_MMAP_THRESHOLD_", None)


def peak(setting: Setting, name: str, folder: str) -> float:
    """Of three steps and their networks; what torch loads for its first step does not count."""
    step_of(Setting("dd_resnet20", 4, Domain.grid(2, 2), 32, 2), name, folder)()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = memory("VmRSS")
    step = step_of(setting, name, folder)
    for _ in range(3):
        step()
    return memory("VmHWM") - before


def memory(kind: str) -> float:
    """Of this process, in MB: VmRSS now, VmHWM at most."""
    return int(re.search(rf"{kind}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


def rows(names: list[str], rounds: int):
    for name in names:
        setting = SETTINGS[name]
        cost = timm_dd.profile(
            setting.model,
            setting.parts,
            domain=setting.domain,
            img_size=setting.size,
            num_classes=10,
        )
        with tempfile.TemporaryDirectory() as folder:
            found = measure(setting, rounds, folder)
            held, tensors = (peaks(setting, folder, own_pages) for own_pages in (False, True))
        limit = cost.whole.multiply_adds / cost.part.multiply_adds / setting.parts
        for by in ENGINES:
            yield {
                "setting": name,
                "model": setting.model,
                "parts": setting.parts,
                "domain": str(setting.domain),
                "batch": setting.batch,
                "engine": by,
                "global_s": f"{found['global']:.4f}",
                "parts_s": f"{found[by]:.4f}",
                "ratio": f"{found['global'] / found[by]:.2f}",
                "limit": f"{limit:.2f}",
                "global_mb": f"{held['global']:.0f}",
                "parts_mb": f"{held[by]:.0f}",
                "global_tensors_mb": f"{tensors['global']:.0f}",
                "parts_tensors_mb": f"{tensors[by]:.0f}",
            }


def draw(table: list[dict], path: Path) -> None:
    """Bars of the ratios, with the limit as a line over each setting."""
    names, width = list(dict.fromkeys(row["setting"] for row in table)), 0.8 / len(ENGINES)
    fig = figure(4, 12)
    ((axes,),) = axes_of(fig)
    for i, by in enumerate(ENGINES):
        ratios = [float(row["ratio"]) for row in table if row["engine"] == by]
        places = [n + (i - (len(ENGINES) - 1) / 2) * width for n in range(len(names))]
        axes.bar_label(axes.bar(places, ratios, width, label=by), fmt="%.1f")
    limits = [next(float(row["limit"]) for row in table if row["setting"] == name) for name in names]
    axes.hlines(
        limits, [n - 0.4 for n in range(len(names))], [n + 0.4 for n in range(len(names))], "black", label="FLOPs"
    )
    axes.set_xticks(range(len(names)), names)
    axes.set_yscale("log")
    axes.set_ylim(bottom=1)
    axes.set_ylabel("seconds of the global network over all parts'")
    axes.legend()
    fig.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", metavar="SETTING", help=", ".join(SETTINGS))
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    origin, path, names = provenance(), Path(__file__).with_suffix(".csv"), args.settings or list(SETTINGS)
    table = [row for row in csv.DictReader(path.open()) if row["setting"] not in names]
    for row in rows(names, args.rounds):
        table.append({**row, **origin})
        print("  ".join(map(str, row.values())), flush=True)
    table.sort(key=lambda row: list(SETTINGS).index(row["setting"]))
    write_table(path, table, list(table[0]))
    draw(table, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
