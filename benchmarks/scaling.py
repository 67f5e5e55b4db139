"""What more ranks bring: parts that do not communicate, beside the global network under DistributedDataParallel.

    pip install '.[report]' && python benchmarks/scaling.py          # into scaling.csv and scaling.png

Measured: one and two ranks, each a process on a separate core, dd_resnet32 at 32×32, a batch of 128 over all ranks
for the global network (gloo), K = 4 parts shared out among the ranks. Simulated: K = 1 to 1,024 parts on as many ranks;
only the first part, which is a largest one, is computed, alone on one core, and its step is taken for that of all,
since no part waits for another; widths below K are replicated. "speed" is by how much faster a step is than the global
network's on one core.
"""

import argparse
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from common import provenance, write_table
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import timm_dd
from timm_dd import Box, Domain, models
from timm_dd.reports.draw import axes as axes_of
from timm_dd.reports.draw import figure
from timm_dd.train.settings import options
from timm_dd.train.updates.learner import Learner

MODEL, SIZE, BATCH, PARTS = "dd_resnet32", 32, 128, 4
CPU = torch.device("cpu")


def learner(model: nn.Module, box, folder: str) -> Learner:
    args = options.parse(["--dataset", "digits", "--channels-last", "--lr", "0.01"])
    return Learner("network", model.train(), box, args, CPU, 1000, BATCH, 0, Path(folder))


def batch(images: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(images, 3, SIZE, SIZE, generator=generator).contiguous(memory_format=torch.channels_last)
    return x, torch.randint(10, (images,), generator=generator)


def whole() -> nn.Module:
    return models.create(MODEL, num_classes=10).to(memory_format=torch.channels_last)


def seconds(step: Callable[[], None], rounds: int) -> float:
    """The median of a step, the slowest rank's."""
    times = []
    for _ in range(rounds + 1):
        if dist.is_initialized():
            dist.barrier()
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    slowest = torch.tensor(statistics.median(times[1:]))
    if dist.is_initialized():
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return float(slowest)


def rank_of(rank: int, ranks: int, rounds: int, folder: str) -> None:
    """One of the processes: writes the seconds of a step of the parts and of the global network."""
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[rank]})
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet-{ranks}", rank=rank, world_size=ranks)
    parts = timm_dd.split(MODEL, PARTS, img_size=SIZE, num_classes=10).to(memory_format=torch.channels_last)
    boxes = parts.plan.boxes()
    own = [learner(parts[k], boxes[k], folder) for k in range(PARTS) if k % ranks == rank]
    x, y = batch(BATCH)
    of_parts = seconds(lambda: [n.step(x, y) for n in own], rounds)
    network = learner(DistributedDataParallel(whole()), None, folder)
    x, y = batch(BATCH // ranks)
    of_whole = seconds(lambda: network.step(x, y), rounds)
    if rank == 0:
        Path(folder, f"{ranks}.txt").write_text(f"{of_parts} {of_whole}")
    dist.destroy_process_group()


def measured(rounds: int):
    with tempfile.TemporaryDirectory() as folder:
        found = {}
        for ranks in (1, 2):
            mp.spawn(rank_of, (ranks, rounds, folder), nprocs=ranks)
            found[ranks] = [float(n) for n in Path(folder, f"{ranks}.txt").read_text().split()]
        for ranks, (of_parts, of_whole) in found.items():
            for what, parts, step in (("parts", PARTS, of_parts), ("DistributedDataParallel", 1, of_whole)):
                yield row("measured", what, parts, ranks, step, found[1][1])


def simulated(rounds: int):
    torch.set_num_threads(1)
    (x, y), base = batch(BATCH), None
    with tempfile.TemporaryDirectory() as folder:
        for side in (1, 2, 4, 8, 16, 32):
            K = side * side
            box = Box((0, 0), (SIZE // side, SIZE // side))
            given = {"img_size": SIZE, "num_classes": 10}
            one = timm_dd.split(MODEL, 1, width_divisor=K, domain=Domain.custom([box]), **given)
            part = one[0].to(memory_format=torch.channels_last)
            network = learner(part, box, folder)
            step = seconds(lambda n=network: n.step(x, y), rounds)
            base = base or step
            yield row("simulated", "parts", K, K, step, base)


def row(kind: str, what: str, parts: int, ranks: int, step: float, base: float) -> dict[str, str]:
    return {
        "kind": kind,
        "what": what,
        "parts": str(parts),
        "ranks": str(ranks),
        "step_s": f"{step:.4f}",
        "speed": f"{base / step:.2f}",
    }


def draw(table: list[dict], path: Path) -> None:
    fig = figure(4, 6)
    ((axes,),) = axes_of(fig)
    groups = {(r["kind"], r["what"]): [] for r in table}
    for r in table:
        groups[r["kind"], r["what"]].append((int(r["ranks"]), float(r["speed"])))
    for (kind, what), points in groups.items():
        axes.plot(*zip(*points), marker="o", linestyle="--" if kind == "simulated" else "-", label=f"{what}, {kind}")
    axes.set(xscale="log", yscale="log", xlabel="ranks", ylabel="speed of a step against one rank's global network")
    axes.legend()
    fig.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds, origin, table = parser.parse_args().rounds, provenance(), []
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")  # channels-last under DDP
    for source in (measured, simulated):
        for found in source(rounds):
            table.append({**found, **origin})
            print("  ".join(found.values()), flush=True)
    path = Path(__file__).with_suffix(".csv")
    write_table(path, table, list(table[0]))
    draw(table, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
