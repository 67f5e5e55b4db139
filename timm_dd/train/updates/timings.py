"""Which way to compute a packed convolution is the fastest: each is timed once for each shape, on a device's own batch,
and remembered in a file."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from huggingface_hub import cached_assets_path
from tqdm import tqdm

from ...errors import FileError, headline
from ...storage.atomic import locked, replace_json
from ...surgery.convolutions import Geometry, Way, grouped, ways
from .capture import CudaGraph, capturing, has_graphs

MEASURED = 0.02  # seconds of each way
WARM_UP = 3  # runs, in which libraries choose their algorithms
FILE = "convolutions.json"


class Timings:
    """Of the ways of packed convolutions, in microseconds: {convolution: {way: forward and backward pass}}.

    Args:
        path: of the file, whose device and versions the names of its convolutions say; None: it is not kept.
    """

    def __init__(self, path: Path | None = None):
        self.path, self.known = path, _read(path)
        self._ways: dict[tuple, Way] = {}  # by what is quick to ask in every update

    @classmethod
    def of_this_machine(cls) -> Timings:
        """Beside what huggingface_hub keeps, where no home is read-only."""
        with contextlib.suppress(OSError, ValueError):
            return cls(cached_assets_path("timm_dd", "timings") / FILE)
        return cls()

    def fastest(self, x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None, at: Geometry) -> Way:
        """Grouped where nothing is learned; see `surgery.convolutions` for the shapes."""
        if not torch.is_grad_enabled() or not (x.requires_grad or w.requires_grad):
            return grouped
        key = (x.device, x.shape, x.stride(), x.dtype, x.requires_grad, w.shape, w.stride(), b is None, at)
        if key not in self._ways:
            name, able = _name(x, w, b, at), ways(x, w, at)
            if name not in self.known:
                if capturing():  # nothing can be timed now
                    return grouped
                self._keep(name, _measured(able, x, w, b, at))
            measured = self.known[name]
            self._ways[key] = min(able, key=lambda way: measured.get(way.__name__, math.inf))
        return self._ways[key]

    def _keep(self, name: str, measured: dict[str, float]) -> None:
        """Another process may have added some."""
        self.known[name] = measured
        if self.path is not None:
            with contextlib.suppress(OSError, FileError), locked(self.path.parent):
                self.known = {**_read(self.path), **self.known}
                replace_json(self.path, self.known)


def _read(path: Path | None) -> dict[str, dict[str, float]]:
    """Nothing from a file that is not there, or is not ours."""
    try:
        known = json.loads(path.read_text(encoding="utf-8")) if path is not None else {}
    except (OSError, ValueError):
        return {}
    tables = known.items() if isinstance(known, dict) else ()
    return {
        name: row for name, row in tables if isinstance(row, dict) and all(isinstance(v, float) for v in row.values())
    }


def _name(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None, at: Geometry) -> str:
    """What a timing depends on."""
    tells = getattr(torch.get_device_module(x.device), "get_device_name", None)
    given = {
        "on": tells(x.device) if tells is not None else x.device.type,
        "torch": torch.__version__,
        "x": (*x.shape, x.stride(), str(x.dtype), x.requires_grad),
        "w": (*w.shape, w.stride()),
        "b": b is not None,
        **at._asdict(),
    }
    return ", ".join(f"{key} {value}" for key, value in given.items())


def _measured(
    able: Sequence[Way], x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None, at: Geometry
) -> dict[str, float]:
    """Microseconds of a forward and a backward pass, of each way that does not fail."""
    given = [None if t is None else t.detach().requires_grad_(t.requires_grad) for t in (x, w, b)]
    learned = [t for t in given if t is not None and t.requires_grad]
    found: dict[str, float] = {}
    for way in able:

        def run(way: Way = way) -> None:
            y = way(*given, at)
            torch.autograd.grad(y, learned, torch.ones_like(y))

        try:
            found[way.__name__] = 1e6 * _seconds(run, x.device)
        except RuntimeError as e:  # no memory, or a shape that a library lacks
            why = headline(e)
    if not found:
        tqdm.write(f"convolutions are grouped: none could be timed ({why})")
    return found


def _seconds(run: Callable[[], None], device: torch.device) -> float:
    """As it will be, without launches where they are captured."""
    from torch.utils.benchmark import Timer  # which looks for compilers, and warns where it finds no GPU

    work = run
    if has_graphs(device):
        graph = CudaGraph()
        with graph.aside():
            for _ in range(WARM_UP):
                run()
        graph.capture(run)
        work = graph.replay
    work()
    timer = Timer("work()", globals={"work": work}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=MEASURED).median
