"""Engines: how several learners that share a device take their updates.

On a CPU `sequential` and `threads` give the same bits, whatever the number of ranks; `packed` gives the same to
rounding, and draws dropout's masks for all its learners together, so that they depend on who they are.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

from ..errors import TrainError, headline
from .updates.capture import Captured, CudaGraph, has_graphs
from .updates.learner import Learner, average_weights, within_memory
from .updates.packs import Pack, groups
from .updates.timings import Timings

TRIALS = 3  # updates of each engine, to choose by
CAPTURE_AFTER = 3  # updates, in which convolutions choose their algorithms and optimizers make their states


class Engine:
    """One after another. A context, which ends what the engine began.

    Attributes:
        warm_up: updates that are slower than those after them.
        alone: whether an update needs no other process.
    """

    warm_up, alone = 1, True

    def run(self, works: Sequence[Callable[[], Any]]) -> list:
        """The results of all `works`, in their order."""
        return [work() for work in works]

    def scores(self, learners: Sequence[Learner], x: torch.Tensor) -> Sequence[torch.Tensor]:
        """The logits of what each learner gives, on what it sees of a batch when it does not train."""
        return self.run([partial(n.logits, x) for n in learners])

    def step(self, learners: Sequence[Learner], x: torch.Tensor, y: torch.Tensor, isolate_failures: bool) -> None:
        """One update of each learner on a batch; with `isolate_failures` one that fails leaves the others to go on."""
        self.run([partial(n.guard, partial(n.step, x, y), isolate_failures) for n in learners])

    def gradients(
        self, learners: Sequence[Learner], seen: Sequence[torch.Tensor], y: torch.Tensor
    ) -> Sequence[torch.Tensor]:
        """The learners' losses of a batch, of which each has `seen` its view; their gradients are what follows."""
        return self.run([partial(n.gradients, x, y) for n, x in zip(learners, seen)])

    def logits(
        self, learners: Sequence[Learner], seen: Sequence[torch.Tensor], micro_batch: int
    ) -> Sequence[torch.Tensor]:
        """The learners' on what each has seen of a micro-batch, with the graph that `backward` goes back through."""
        return self.run([partial(n.training_logits, x, micro_batch) for n, x in zip(learners, seen)])

    def backward(self, learners: Sequence[Learner], logits: Sequence[torch.Tensor], gradient: torch.Tensor) -> None:
        """Add to the learners' gradients what follows from the loss's `gradient` with respect to their logits, which is
        the same for all."""
        self.run([partial(z.backward, n.scaler.scale(gradient.to(z.dtype))) for n, z in zip(learners, logits)])

    def update(
        self, learners: Sequence[Learner], losses: Sequence[torch.Tensor], images: int, isolate_failures: bool = False
    ) -> None:
        """Take a step along the gradients of a batch, whose mean losses were `losses`."""
        self.apply_gradients(learners, isolate_failures)
        went_on = [(n, loss) for n, loss in zip(learners, losses) if n.failure is None]
        self.note([n for n, _ in went_on], [loss for _, loss in went_on], images, isolate_failures)

    def apply_gradients(self, learners: Sequence[Learner], isolate_failures: bool = False) -> None:
        self.run([partial(n.guard, n.apply_gradients, isolate_failures) for n in learners])

    def note(
        self, learners: Sequence[Learner], losses: Sequence[torch.Tensor], images: int, isolate_failures: bool = False
    ) -> None:
        """An update has been taken."""
        for n, loss in zip(learners, losses):
            n.guard(partial(n.note, loss, images), isolate_failures)
        self.average(learners)

    def average(self, learners: Sequence[Learner]) -> None:
        self.run([partial(average_weights, n) for n in learners])

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_) -> None:
        pass


class Threads(Engine):
    """Side by side on a CPU, in threads of as many cores as each learner would have otherwise, which gives the same
    bits."""

    def __init__(self, workers: int):
        start = partial(torch.set_num_threads, torch.get_num_threads())
        self.pool = ThreadPoolExecutor(workers, initializer=start)

    def run(self, works: Sequence[Callable[[], Any]]) -> list:
        return list(self.pool.map(lambda work: work(), works))

    def __exit__(self, *_) -> None:
        self.pool.shutdown()


class Packed(Engine):
    """One forward and one backward pass for all that are alike, see `updates.packs`; groups of such take turns.

    Args:
        instead: who goes on if that fails; without it the learners fail.
        timings: by which convolutions are computed; None: as grouped ones.
    """

    def __init__(self, instead: Engine | None = None, timings: Timings | None = None):
        self.instead, self.timings, self.works, self.evaluates = instead, timings, True, True
        self.learners: list[Learner] = []
        self.packs: list[Pack] = []

    def step(self, learners: Sequence[Learner], x: torch.Tensor, y: torch.Tensor, isolate_failures: bool) -> None:
        if not self.works:
            return self.instead.step(learners, x, y, isolate_failures)
        gradients = partial(self.gradients, learners, [n.view(x) for n in learners], y)
        try:
            losses = gradients() if self.instead else within_memory(learners, gradients, len(y))
        except Exception as e:
            failure = e
        else:
            return self.update(learners, losses, len(y), isolate_failures)
        if self.instead is None:
            for n in learners:
                n.fail(failure, isolate_failures)
            return
        said = headline(failure)
        del failure, gradients  # with what its frames hold of the pass that failed, which the others need the memory of
        self._give_up(said)
        self.instead.step(learners, x, y, isolate_failures)

    def _give_up(self, why: str) -> None:
        """Go on with the other engine, and leave it the memory."""
        tqdm.write(f"not packed: {why}")
        for n in self.learners:
            n.optimizer.zero_grad()
        self.works, self.learners, self.packs = False, [], []
        gc.collect()  # graphs of torch.fx know their modules, and these them

    @torch.no_grad()
    def scores(self, learners: Sequence[Learner], x: torch.Tensor) -> Sequence[torch.Tensor]:
        """Packed too, but for averages of the weights, which are not."""
        if not self.works:
            return self.instead.scores(learners, x)
        if any(n.ema is not None for n in learners) or not self.evaluates:
            return super().scores(learners, x)
        try:
            return self._in_turn(learners, [n.sight.evaluating(x) for n in learners], Pack.scores)
        except Exception as e:
            why = headline(e)
        tqdm.write(f"evaluated one after another: {why}")
        self.evaluates = False
        return super().scores(learners, x)

    def _in_turn(
        self, learners: Sequence[Learner], given: Sequence[Any], work: Callable[[Pack, list], Sequence[Any]]
    ) -> list:
        """`work` of each pack, on what is `given` to its learners; in the order of the learners."""
        learners = list(learners)
        if learners != self.learners:
            self.packs = []
            self.learners, self.packs = learners, [Pack(alike, self.timings) for alike in groups(learners)]
        place, results = {id(n): i for i, n in enumerate(learners)}, [None] * len(learners)
        for pack in self.packs:
            at = [place[id(n)] for n in pack.learners]
            for i, result in zip(at, work(pack, [given[i] for i in at])):
                results[i] = result
        return results

    def gradients(
        self, learners: Sequence[Learner], seen: Sequence[torch.Tensor], y: torch.Tensor
    ) -> Sequence[torch.Tensor]:
        if not self.works:
            return self.instead.gradients(learners, seen, y)
        return self._in_turn(learners, seen, lambda pack, own: pack.gradients(own, y))

    def logits(
        self, learners: Sequence[Learner], seen: Sequence[torch.Tensor], micro_batch: int
    ) -> Sequence[torch.Tensor]:
        return self._in_turn(learners, seen, lambda pack, own: pack.logits(own, micro_batch))

    def backward(self, learners: Sequence[Learner], logits: Sequence[torch.Tensor], gradient: torch.Tensor) -> None:
        torch.autograd.backward(logits, [n.scaler.scale(gradient.to(z.dtype)) for n, z in zip(learners, logits)])
        for pack in self.packs:
            pack.scatter_gradients()

    def apply_gradients(self, learners: Sequence[Learner], isolate_failures: bool = False) -> None:
        if not self.works:
            return self.instead.apply_gradients(learners, isolate_failures)
        for pack in self.packs:
            pack.abreast.apply_gradients(isolate_failures)

    def average(self, learners: Sequence[Learner]) -> None:
        if not self.works or list(learners) != self.learners:  # some have failed
            return super().average(learners)
        for pack in self.packs:
            pack.abreast.average()


class Streams(Engine):
    """Side by side on a GPU, each learner on a stream of its own."""

    def __init__(self, learners: int, device: torch.device):
        self.of = torch.get_device_module(device)
        self.streams = [self.of.Stream(device) for _ in range(learners)]

    def run(self, works: Sequence[Callable[[], Any]]) -> list:
        here, results = self.of.current_stream(), []
        for stream, work in zip(self.streams, works):
            stream.wait_stream(here)
            with self.of.stream(stream):
                results.append(work())
        for stream in self.streams:
            here.wait_stream(stream)
        return results


class Graphed(Engine):
    """The updates of another engine, each as one CUDA graph: forward, backward, and where the optimizer is fused its
    step. What cannot be captured goes on without.

    Args:
        graph: what captures; for tests one that needs no GPU.
    """

    warm_up = CAPTURE_AFTER + 1

    def __init__(self, by: Engine, graph: Callable[[], CudaGraph] = CudaGraph):
        self.by, self.new_graph = by, graph
        self.learners: list[Learner] = []
        self.captured: Captured | None = None

    def run(self, works: Sequence[Callable[[], Any]]) -> list:
        return self.by.run(works)

    def scores(self, learners: Sequence[Learner], x: torch.Tensor) -> Sequence[torch.Tensor]:
        return self.by.scores(learners, x)

    def step(self, learners: Sequence[Learner], x: torch.Tensor, y: torch.Tensor, isolate_failures: bool) -> None:
        learners = list(learners)
        if learners != self.learners or (self.captured is not None and self.captured.moved):
            self.learners, self.steps, self.captured, self.graph = learners, 0, None, self.new_graph()
        if not self._may_capture():
            return self.by.step(learners, x, y, isolate_failures)
        if self.captured is not None or self.steps == CAPTURE_AFTER:
            given = [y, *(n.view(x) for n in learners)]
            if self.captured is None:
                self._capture(given)
            if self.captured is not None and self.captured.takes(given):
                return self._replay(given)
        self.steps += 1
        with self.graph.aside():
            self.by.step(learners, x, y, isolate_failures)

    def _replay(self, given: Sequence[torch.Tensor]) -> None:
        first = self.learners[0]
        with first.random(first.updates, 0):
            losses = self.captured(*given)
        if not self._steps_inside:
            self.by.apply_gradients(self.learners)
        self.note(self.learners, losses, len(given[0]))

    def average(self, learners: Sequence[Learner]) -> None:
        self.by.average(learners)

    def _capture(self, given: Sequence[torch.Tensor]) -> None:
        try:
            self.captured = Captured(self.graph, self._learn, given, [n.optimizer for n in self.learners])
        except Exception as e:  # each library has its own for what a graph cannot hold
            tqdm.write(f"not as a CUDA graph: {headline(e)}")

    def _learn(self, y: torch.Tensor, *seen: torch.Tensor) -> Sequence[torch.Tensor]:
        losses = self.by.gradients(self.learners, seen, y)
        if self._steps_inside:
            self.by.apply_gradients(self.learners)
        return losses

    @property
    def _steps_inside(self) -> bool:
        return all(n.optimizer.defaults.get("fused") for n in self.learners)

    def _may_capture(self) -> bool:
        """A batch in one piece, of one process."""
        return self.by.alone and all(n.micro_batches == 1 and not n.distributed for n in self.learners)

    def __exit__(self, *error: object) -> None:
        self.by.__exit__(*error)


class Auto(Engine):
    """The fastest of several, by the time of a few updates with each."""

    def __init__(self, engines: Sequence[Engine], device: torch.device):
        self.engines, self.device = list(engines), device
        self.seconds: list[list[float]] = [[] for _ in engines]

    @property
    def best(self) -> Engine | None:
        """None while the trial goes on; warming up does not count."""
        timed = [s[engine.warm_up :] for engine, s in zip(self.engines, self.seconds)]
        if len(self.engines) > 1 and any(len(s) < TRIALS for s in timed):
            return None
        return self.engines[min(range(len(self.engines)), key=lambda i: min(timed[i], default=0.0))]

    def run(self, works: Sequence[Callable[[], Any]]) -> list:
        return (self.best or self.engines[0]).run(works)

    def scores(self, learners: Sequence[Learner], x: torch.Tensor) -> Sequence[torch.Tensor]:
        return (self.best or self.engines[0]).scores(learners, x)

    def step(self, learners: Sequence[Learner], x: torch.Tensor, y: torch.Tensor, isolate_failures: bool) -> None:
        best = self.best
        if best is not None:
            self._settle_for(best)
            return best.step(learners, x, y, isolate_failures)
        left = [TRIALS + engine.warm_up - len(s) for engine, s in zip(self.engines, self.seconds)]
        i = left.index(max(left))
        start = self._now()
        self.engines[i].step(learners, x, y, isolate_failures)
        self.seconds[i].append(self._now() - start)

    def _settle_for(self, best: Engine) -> None:
        """End the others, whose graphs take memory."""
        for engine in self.engines:
            if engine is not best:
                engine.__exit__()
        self.engines, self.seconds = [best], [[]]

    def _now(self) -> float:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return time.perf_counter()

    def __exit__(self, *_) -> None:
        for engine in self.engines:
            engine.__exit__()


def engine(
    name: str,
    learners: Sequence[Learner],
    device: torch.device,
    cores: int,
    around: Callable[[Engine], Engine] = lambda by: by,
) -> Engine:
    """``sequential``, ``threads``, ``packed``, ``graph``, or ``auto``: on a CPU the faster of those that give the same
    bits, on a GPU the fastest of one after another and graphs of them, packed or on a stream for each.

    Args:
        cores: of this process.
        around: what each is made part of.

    Raises:
        TrainError: not on this device.
    """
    threads, on_cpu = torch.get_num_threads(), device.type == "cpu"
    if name == "threads" and not on_cpu or name == "graph" and not has_graphs(device):
        raise TrainError(f"--engine {name} is for {'CPUs' if name == 'threads' else 'GPUs'}; use auto")
    if name == "packed":
        return around(Packed(timings=_timings(device)))
    if name == "sequential":
        return around(Engine())
    candidates = [around(Engine())] if name == "auto" else []
    workers = max(1, min(len(learners), cores // threads))
    if has_graphs(device):
        candidates += _graphs(learners, device, around)
    elif on_cpu and (workers > 1 or name == "threads"):
        candidates.append(around(Threads(workers)))
    return Auto(candidates, device) if len(candidates) > 1 else candidates[0]


def engine_of_one(name: str, device: torch.device) -> Engine:
    """Of a network that is trained alone, by the parts' engine."""
    return Graphed(Engine()) if has_graphs(device) and name in ("auto", "graph") else Engine()


def _graphs(learners: Sequence[Learner], device: torch.device, around: Callable[[Engine], Engine]) -> list[Engine]:
    apart = around(Streams(len(learners), device)) if len(learners) > 1 else around(Engine())
    some_are_alike = len(groups(learners)) < len(learners)
    if not some_are_alike:
        return [Graphed(apart)]
    return [Graphed(apart), Graphed(around(Packed(apart, _timings(device))))]


def _timings(device: torch.device) -> Timings | None:
    """On CPUs packed convolutions are grouped, so that a run's bits do not depend on how fast they are."""
    return None if device.type == "cpu" else Timings.of_this_machine()
