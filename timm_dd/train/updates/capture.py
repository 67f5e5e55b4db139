"""CUDA graphs: the work of a step as one launch, where its operations are many and short.

A graph replays what a function did on the device when it was captured, on the same memory. So the function takes its
arguments from tensors that stay in place, and leaves its results there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.optim import Optimizer


def has_graphs(device: torch.device) -> bool:
    """Whether it is one for which torch has CUDA graphs."""
    return device.type == "cuda"


def capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


class CudaGraph:
    """A function's work on the GPU, captured and replayed. Before it is captured it has to run a few times, `aside`."""

    def __init__(self) -> None:
        self._graph, self._aside = torch.cuda.CUDAGraph(), torch.cuda.Stream()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """On a stream of its own, as torch asks for."""
        here = torch.cuda.current_stream()
        self._aside.wait_stream(here)
        with torch.cuda.stream(self._aside):
            yield
        here.wait_stream(self._aside)

    def capture(self, function: Callable[[], Any]) -> None:
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):  # loaders have threads, too
            self._result = function()

    def replay(self) -> Any:
        """The results, which the next replay overwrites."""
        self._graph.replay()
        return self._result


class Captured:
    """`function`, captured for arguments of the shapes of `given`; the learning rates of `optimizers`, which it may
    use, are those of each call."""

    def __init__(
        self,
        graph: CudaGraph,
        function: Callable[..., Any],
        given: Sequence[torch.Tensor],
        optimizers: Sequence[Optimizer],
    ):
        self._graph, self._given = graph, [t.clone() for t in given]
        self._groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        self._alike = self._pattern()
        rates = [torch.empty((), device=given[0].device) for _ in self._groups]
        self._rates = [rates[i] for i in self._alike]
        self._held = [group["params"][0] for group in self._groups]
        self._places = [p.data_ptr() for p in self._held]
        with self._rates_in_place():
            graph.capture(lambda: function(*self._given))

    @contextmanager
    def _rates_in_place(self) -> Iterator[None]:
        numbers = [group["lr"] for group in self._groups]
        try:
            for group, rate in zip(self._groups, self._rates):
                group["lr"] = rate
            yield
        finally:
            for group, number in zip(self._groups, numbers):
                group["lr"] = number

    def takes(self, given: Sequence[torch.Tensor]) -> bool:
        return all(a.shape == b.shape and a.dtype == b.dtype for a, b in zip(self._given, given))

    def _pattern(self) -> list[int]:
        """For each learning rate the first that is the same: what is the same has one tensor."""
        rates = [group["lr"] for group in self._groups]
        return [rates.index(rate) for rate in rates]

    @property
    def moved(self) -> bool:
        """Whether the weights have another place in memory, as when somebody packs them, or learning rates that were
        the same are no longer."""
        return self._pattern() != self._alike or any(
            p.data_ptr() != place for p, place in zip(self._held, self._places)
        )

    def __call__(self, *given: torch.Tensor) -> Any:
        for mine, t in zip(self._given, given):
            mine.copy_(t)
        for group, rate in zip(self._groups, self._rates):
            rate.fill_(group["lr"])
        return self._graph.replay()
