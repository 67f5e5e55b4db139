"""A step of all K parts on a GPU against one of the global network, beside what bytes and FLOPs allow.

    python benchmarks/gpu.py --seconds 300        # the rows that gpu.csv lacks, as many as that time allows

A step is views, forward, backward and optimizer on a batch that stands in the device's memory: milliseconds, the median
of three turns, and peak memory. Both networks in TF32, bfloat16, and bfloat16 with channels last; the global one as it
is and as a CUDA graph, the parts one after another, packed, and as CUDA graphs of packed ones, whose convolutions are
grouped or the fastest of several ways, and of one stream for each. "roofline_ms" is the time that the layers take at
the device's rates, each the larger of that of its bytes and that of its FLOPs; "limit" the ratio of the global
network's to the parts'.
"""

import argparse
import csv
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from common import provenance, write_table
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import timm_dd
from timm_dd import Domain, models
from timm_dd.algebra.view import View
from timm_dd.train.engines import Engine, Graphed, Packed, Streams
from timm_dd.train.settings import options
from timm_dd.train.updates.learner import Learner
from timm_dd.train.updates.timings import Timings

GPU = torch.device("cuda", 0)
BYTES, FLOPS = {"NVIDIA H200": 4.8e12}, 790e12  # a second: by the data sheet; bfloat16 products as measured
BYTES_OF_OTHERS = 3.35e12  # of an H100
PRECISIONS = {"tf32": [], "bf16": ["--amp"], "bf16 channels last": ["--amp", "--channels-last"]}
WARM_UP, STEPS, TURNS = 8, 10, 3
ENGINES: dict[str, tuple[bool, Callable[[int], Engine]]] = {  # whether of the parts; by their number
    "global": (False, lambda k: Engine()),
    "global, graph": (False, lambda k: Graphed(Engine())),
    "one after another": (True, lambda k: Engine()),
    "packed": (True, lambda k: Packed()),
    "graph of packed": (True, lambda k: Graphed(Packed())),
    "graph of packed, timed": (True, lambda k: Graphed(Packed(timings=Timings()))),
    "graph of streams": (True, lambda k: Graphed(Streams(k, GPU))),
}


class Setting(NamedTuple):
    model: str
    parts: int
    grid: tuple[int, int]
    overlap: int
    size: int
    batch: int
    widths: tuple[int, ...] | None = None

    def networks(self, parts: bool) -> list[tuple[nn.Module, View | None]]:
        """The global network or its parts, with what they see; of a grid of one box the parts are whole networks."""
        given = {"num_classes": 10, **({"widths": self.widths} if self.widths else {})}
        if not parts:
            return [(models.create(self.model, **given), None)]
        if self.grid == (1, 1):
            return [(timm_dd.split(self.model, 1, img_size=self.size, **given)[0], None) for _ in range(self.parts)]
        domain = Domain.grid(*self.grid, overlap=self.overlap)
        split = timm_dd.split(self.model, self.parts, domain=domain, img_size=self.size, **given)
        return list(zip(split, split.plan.views()))


SETTINGS = {
    f"{name}, {batch}": Setting(*rest, batch, *widths)
    for name, rest, batches, widths in (
        ("resnet32, 4 parts", ("dd_resnet32", 4, (2, 2), 4, 32), (128, 2048), ()),
        ("resnet20 of 32-64-128, 4 parts", ("dd_resnet20", 4, (2, 2), 4, 32), (128, 256), ((32, 64, 128),)),
        ("resnet50, 4 parts", ("resnet50", 4, (2, 2), 0, 224), (128, 512), ()),
        ("resnet32, 8 parts", ("dd_resnet32", 8, (2, 4), 0, 32), (128, 2048), ()),
        ("resnet32, 16 parts", ("dd_resnet32", 16, (4, 4), 0, 32), (128, 2048), ()),
        ("resnet50, 4 parts of 140 pixels", ("resnet50", 4, (2, 2), 28, 224), (128,), ()),
        ("mobilenetv2_100, 3 whole networks", ("mobilenetv2_100", 3, (1, 1), 0, 32), (128,), ()),
    )
    for batch in batches
}


def learners(setting: Setting, parts: bool, precision: str) -> list[Learner]:
    args = options.parse(["--dataset", "digits", "--lr", "0.01", *PRECISIONS[precision]])
    return [
        Learner(f"network {k}", net.train(), view, args, GPU, 1000, setting.batch, k, Path())
        for k, (net, view) in enumerate(setting.networks(parts))
    ]


def measure(setting: Setting, engine: str, precision: str) -> dict[str, str]:
    """Milliseconds a step and MiB, or what went wrong."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    of_parts, make = ENGINES[engine]
    some, by = learners(setting, of_parts, precision), make(setting.parts)
    x = torch.randn(setting.batch, 3, setting.size, setting.size, device=GPU)
    y = torch.randint(10, (setting.batch,), device=GPU)
    turns = []
    try:
        for steps in (WARM_UP, *[STEPS] * TURNS):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(steps):
                by.step(some, x, y, isolate_failures=False)
            torch.cuda.synchronize()
            turns.append((time.perf_counter() - start) / steps)
    except (RuntimeError, timm_dd.TimmDDError) as e:
        return {"ms": type(e).__name__}
    if isinstance(by, Graphed) and by.captured is None:
        return {"ms": "not captured"}
    peak = torch.cuda.max_memory_allocated() >> 20
    return {"ms": f"{1e3 * statistics.median(turns[1:]):.3f}", "peak_mib": str(peak)}


class Roofline(TorchDispatchMode):
    """Adds up the seconds of a training step's layers, from those of a forward pass at two bytes a number."""

    def __init__(self, device: str):
        super().__init__()
        self.seconds, self.bytes = 0.0, BYTES.get(device, BYTES_OF_OTHERS)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if name == "convolution":
            x, w, y = (2 * t.numel() for t in (args[0], args[1], result))
            flops = result.numel() * args[1][0].numel() * 2
            for moved in (x + y + w, x + y + w, x + y + w):  # forward, gradients of data and of weights
                self.seconds += max(moved / self.bytes, flops / FLOPS)
            self.seconds += 4 * w / self.bytes
        elif name in ("native_batch_norm", "_native_batch_norm_legit", "cudnn_batch_norm"):
            x = y = 2 * args[0].numel()
            self.seconds += (2 * x + y + 2 * (x + y) + x) / self.bytes
        elif name in ("relu", "relu_"):
            self.seconds += 4 * 2 * result.numel() / self.bytes
        elif name in ("add", "add_") and isinstance(args[1], torch.Tensor) and result.ndim == 4:
            self.seconds += 3 * 2 * result.numel() / self.bytes
        return result


def roofline(setting: Setting, parts: bool, device: str) -> float:
    """Milliseconds of a step."""
    x = torch.empty(setting.batch, 3, setting.size, setting.size, device="meta")
    networks = setting.networks(parts)
    with Roofline(device) as counted:
        for net, view in networks:
            net.to("meta").train()(x if view is None else view.crop(x))
    return 1e3 * counted.seconds


def rows(names: list[str], done: set[tuple[str, str, str]]) -> Iterator[dict[str, str]]:
    for name in names:
        setting = SETTINGS[name]
        lines = [roofline(setting, parts, torch.cuda.get_device_name()) for parts in (False, True)]
        for precision in PRECISIONS:
            for engine, (of_parts, _) in ENGINES.items():
                key = (name, precision, engine)
                if key not in done:
                    found = measure(setting, engine, precision)
                    line = {"roofline_ms": f"{lines[of_parts]:.3f}", "limit": f"{lines[0] / lines[1]:.2f}"}
                    yield {**dict(zip(("setting", "precision", "engine"), key)), "peak_mib": "", **found, **line}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=540, help="no row begins later")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".csv"))
    parser.add_argument("names", nargs="*", default=list(SETTINGS), metavar="SETTING", help=", ".join(SETTINGS))
    args = parser.parse_args()
    start, table = time.monotonic(), []
    torch.backends.cudnn.benchmark = torch.backends.cuda.matmul.allow_tf32 = True
    if args.out.exists():
        with args.out.open() as f:
            table = list(csv.DictReader(f))
    origin = provenance()
    for row in rows(args.names, {(r["setting"], r["precision"], r["engine"]) for r in table}):
        table.append({**row, **origin})
        write_table(args.out, table, list(table[-1]))
        print("  ".join(row.values()), flush=True)
        if time.monotonic() - start > args.seconds:
            return


if __name__ == "__main__":
    main()
