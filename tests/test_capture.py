"""CUDA graphs and images on the device, on a CPU: with a stand-in for a graph, which does again what was captured."""

from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from test_packed import CPU, Drops, batches, learners

from timm_dd.errors import TrainError
from timm_dd.train.engines import CAPTURE_AFTER, Engine, Graphed, Packed, engine
from timm_dd.train.settings import options
from timm_dd.train.stages.joint import Joint
from timm_dd.train.updates.learner import Learner


class Again:
    """In the place of `capture.CudaGraph`: the same tensors in the same order."""

    aside = nullcontext
    made = 0

    def __init__(self):
        self.replays = 0

    def capture(self, function):
        Again.made += 1
        self.function = function

    def replay(self):
        self.replays += 1
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("timm_dd.train.updates.learner.capturing", lambda: True)
            return self.function()


def states(by, some, n=CAPTURE_AFTER + 4):
    for learner in some:
        learner.model.train()
    with by:
        for x, y in batches(n):
            by.step(some, x, y, isolate_failures=False)
    return [learner.state() for learner in some]


GIVEN = [[], ["--opt", "adamw", "--sched-on-updates"], ["--clip-grad", "0.1"], ["--roam", "0.5"], ["--model-ema"]]


@pytest.mark.parametrize("by", [Engine, Packed, lambda: Joint(Packed())], ids=["sequential", "packed", "joint"])
@pytest.mark.parametrize("given", GIVEN, ids=lambda given: " ".join(given))
def test_a_graph_takes_the_same_steps(given, by, tmp_path):
    """Bit for bit what its engine does: weights, statistics, averages, optimizer state, loss."""
    graphed = Graphed(by(), Again)
    for (own, numbers), (found, same) in zip(
        states(by(), learners(tmp_path, *given)), states(graphed, learners(tmp_path, *given))
    ):
        assert numbers == same and all(torch.equal(t, found[key]) for key, t in own.items())
    assert graphed.graph.replays == 4


@pytest.mark.parametrize("given", [[], ["--grad-accum-steps", "2"]], ids=["captured", "not captured"])
def test_what_a_learner_sees_of_a_batch_is_made_once(given, tmp_path, monkeypatch):
    made, view = [], Learner.view
    monkeypatch.setattr(Learner, "view", lambda self, x: made.append(self) or view(self, x))
    some = learners(tmp_path, *given)
    states(Graphed(Packed(), Again), some, n=6)
    assert Counter(made) == {n: 6 for n in some}


def test_what_is_captured_follows_the_learners(tmp_path):
    """A part that ends leaves the others a graph of their own; a batch of another size goes without one."""
    some, alone, by = learners(tmp_path), learners(tmp_path), Graphed(Packed(), Again)
    captured = []
    for i, (x, y) in enumerate(batches(14)):
        n, size = (4 if i < 6 else 3), (8 if i == 12 else 16)
        by.step(some[:n], x[:size], y[:size], isolate_failures=False)
        Packed().step(alone[:n], x[:size], y[:size], isolate_failures=False)
        captured.append(by.captured is not None)
    assert captured == [False] * 3 + [True] * 3 + [False] * 3 + [True] * 5 and by.graph.replays == 4
    for n, other in zip(some, alone):
        assert all(torch.equal(a, b) for a, b in zip(n.net.state_dict().values(), other.net.state_dict().values()))


def test_weights_that_move_are_captured_again(tmp_path):
    """As those of parts that another engine packs in a trial."""
    some, by, captures = learners(tmp_path), Graphed(Engine(), Again), Again.made
    for i, (x, y) in enumerate(batches(10)):
        by.step(some, x, y, isolate_failures=False)
        if i == 4:
            Packed().step(some, x, y, isolate_failures=False)
    assert Again.made == captures + 2


def test_dropout_of_a_graph(tmp_path):
    """Masks of an update follow from its number, in a graph too."""
    found = []
    for by in (Engine(), Graphed(Engine(), Again)):
        args = options.parse(["--dataset", "digits", "--lr", "0.1", "--warmup-epochs", "0", "--epochs", "1"])
        torch.manual_seed(1)
        learner = Learner("part", Drops(), None, args, CPU, 9, 16, 5, tmp_path)
        for x, y in batches(7):
            by.step([learner], x[:, :, :8, :8], y, isolate_failures=False)
        found.append(learner.net.fc.weight)
    assert torch.equal(*found)


def test_what_cannot_be_captured_goes_on_without(tmp_path, capsys):
    class Refused(Again):
        def capture(self, function):
            raise RuntimeError("operation not permitted when stream is capturing")

    some, alone = learners(tmp_path), learners(tmp_path)
    for expected, found in zip(states(Packed(), alone), states(Graphed(Packed(), Refused), some)):
        assert all(torch.equal(t, found[0][key]) for key, t in expected[0].items())
    said = capsys.readouterr().out
    assert said == "not as a CUDA graph: operation not permitted when stream is capturing\n"


def test_what_needs_more_than_a_graph_goes_without(tmp_path):
    """Batches in several pieces, and other ranks' logits."""
    for by, given in ((Packed(), ["--grad-accum-steps", "2"]), (Joint(Engine()), [])):
        by.alone = bool(given)
        graphed = Graphed(by, Again)
        states(graphed, learners(tmp_path, *given))
        assert graphed.captured is None
    assert not Joint(Engine(), group="others").alone and Joint(Engine()).alone


def test_graphs_are_for_gpus(tmp_path):
    with pytest.raises(TrainError, match="--engine graph is for GPUs; use auto"):
        engine("graph", learners(tmp_path), CPU, 1)
