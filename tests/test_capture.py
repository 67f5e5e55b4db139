"""CUDA graphs and images on the device, on a CPU: with a stand-in for a graph, which does again what was captured."""

from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from PIL import Image
from test_packed import CPU, Drops, batches, learners

from timm_dd.errors import TrainError
from timm_dd.train.engines import CAPTURE_AFTER, Engine, Graphed, Packed, engine
from timm_dd.train.images import data, resident
from timm_dd.train.images.data import First, seed_epoch
from timm_dd.train.images.decoded import decoded
from timm_dd.train.images.resident import Resident
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
    assert graphed.place.replays == 4


def test_what_is_captured_follows_the_learners(tmp_path):
    """A part that ends leaves the others a graph of their own; a batch of another size goes without one."""
    some, alone, by = learners(tmp_path), learners(tmp_path), Graphed(Packed(), Again)
    captured = []
    for i, (x, y) in enumerate(batches(14)):
        n, size = (4 if i < 6 else 3), (8 if i == 12 else 16)
        by.step(some[:n], x[:size], y[:size], isolate_failures=False)
        Packed().step(alone[:n], x[:size], y[:size], isolate_failures=False)
        captured.append(by.captured is not None)
    assert captured == [False] * 3 + [True] * 3 + [False] * 3 + [True] * 5 and by.place.replays == 4
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


# ---- images on the device


class Corners(torch.utils.data.Dataset):
    """Images of 6x6 whose pixels are all different."""

    transform = None

    def __init__(self):
        self.pixels = torch.arange(40 * 6 * 6 * 3).remainder(251).to(torch.uint8).view(40, 6, 6, 3)

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, i):
        return self.transform(Image.fromarray(self.pixels[i].numpy())), i


def of_loader(shift, training=True, flips=(0.3, 0.6), images=40):
    """(timm's loader with the transforms of a run, the same with its images on the device)."""
    args = options.parse(["--dataset", "digits", "--shift", str(shift), "-b", "8", "-j", "0"])
    args.hflip, args.vflip = flips
    config = {"input_size": (3, 6, 6), "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4), "crop_pct": 1.0}
    config["interpolation"] = "bilinear"
    both = data.loaders(args, config, First(Corners(), images, 0), First(Corners(), images, 0), CPU, False)
    loader = both[0 if training else 1]
    held = loader.dataset.dataset.pixels[loader.dataset.indices].movedim(3, 1).contiguous()
    targets = torch.tensor(loader.dataset.indices)
    return loader, Resident(loader, held, targets, *((shift, flips) if training else ()))


def test_images_on_the_device_are_the_loaders():
    """In validation the same batches bit for bit."""
    loader, resident = of_loader(0, training=False)
    assert len(resident) == len(loader) == 5
    for (x, y), (mine, also) in zip(loader, resident, strict=True):
        assert torch.equal(y, also) and torch.equal(x, mine) and x.dtype == mine.dtype


def test_the_order_on_the_device():
    """Follows from the seed and the epoch; all images, but for what makes no batch."""
    _, resident = of_loader(2, images=20)
    orders = []
    for seed, epoch in ((3, 1), (3, 1), (3, 2)):
        seed_epoch(seed, epoch)
        orders.append(torch.cat([y for _, y in resident]).tolist())
    assert orders[0] == orders[1] != orders[2] and len(set(orders[0])) == len(orders[0]) == 16


def test_shifts_and_flips_are_the_loaders():
    """Every image that the loader makes of one, the device makes as often: of 3 x 3 shifts and four flips."""
    loader, resident = of_loader(1, images=8)
    counts = []
    for source in (loader, resident):
        seed_epoch(5, 0)
        found = Counter()
        for _ in range(1000):
            for x, y in source:
                found.update((int(i), image.numpy().tobytes()) for i, image in zip(y, x))
        counts.append(found)
    expected, found = counts
    assert expected.keys() == found.keys() and len(found) == 8 * 36
    together = {key: expected[key] + found[key] for key in found}
    chi2 = sum((found[key] - expected[key]) ** 2 / n for key, n in together.items())
    assert chi2 < 288 + 4 * (2 * 288) ** 0.5  # four standard deviations of as many degrees of freedom


def test_which_images_stay_on_the_device(tmp_path, monkeypatch):
    """Those of one size that are only shifted and flipped, where they fit; the batches are those of the run."""
    monkeypatch.setattr(resident, "WITHOUT", ())
    memory = [10**9]
    monkeypatch.setattr(torch.cpu, "mem_get_info", lambda device: (memory[0], memory[0]), raising=False)
    config = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic"}

    def kinds(*given, crop_pct=1.0):
        args = options.parse(["--dataset", "digits", "-b", "100", "-j", "0", *given])
        sets = [decoded(s, tmp_path / f"{i}.safetensors", 0) for i, s in enumerate(data.datasets(args)[:2])]
        of = {**config, "crop_pct": crop_pct}
        found = data.loaders(args, of, *sets, CPU, False)
        held = resident.training(found[0], args, of, CPU), resident.validation(found[1], of, CPU)
        return found, held, [isinstance(loader, Resident) for loader in held]

    (_, val), (_, held), kind = kinds("--shift", "2")
    assert kind == [True, True]
    for (x, y), (mine, also) in zip(val, held, strict=True):
        assert torch.equal(x, mine) and torch.equal(y, also)
    assert kinds("--shift", "2", "--aa", "rand-m9")[2] == kinds()[2] == [False, True]
    assert kinds("--no-aug", crop_pct=0.9)[2] == [True, False]
    config["input_size"] = (3, 28, 28)
    assert kinds("--shift", "2")[2] == [False, False]
    config["input_size"], memory[0] = (3, 32, 32), 5 * 10**6
    assert kinds("--shift", "2")[2] == [False, True]
