"""One optimizer for packed learners against one for each: weights, averages, states, checkpoints, operations."""

from collections import Counter

import pytest
import torch
from conftest import RUN
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import timm_dd
from timm_dd import Domain
from timm_dd.train.engines import Engine, Packed
from timm_dd.train.settings import options
from timm_dd.train.updates import optimizers
from timm_dd.train.updates.learner import Learner
from timm_dd.train.updates.trial import find_way

CPU = torch.device("cpu")


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16)
        self.next, self.fc = nn.Conv2d(16, 32, 3, bias=False), nn.Linear(32, 10)

    def forward(self, x):
        return self.fc(self.next(self.bn(self.conv(x)).relu()).mean((2, 3)))


def learners(folder, *given, parts=4, dtype=torch.float64):
    torch.manual_seed(3)
    split = timm_dd.split(Small(), parts, example_input=torch.empty(1, 3, 8, 8), domain=Domain.full(parts))
    args = options.parse([*RUN, "--weight-decay", "0.05", *given])
    staged = [options.stage_options(args, "part", k) for k in range(parts)]
    some = [Learner(f"part {k}", p.to(dtype), None, staged[k], CPU, 5, 16, k, folder) for k, p in enumerate(split)]
    for n in some:
        n.model.train()
    return some


def batches(n, dtype=torch.float64):
    generator = torch.Generator().manual_seed(4)
    for _ in range(n):
        yield torch.randn(16, 3, 8, 8, generator=generator).to(dtype), torch.randint(10, (16,), generator=generator)


def train(by, some, n=5, dtype=torch.float64):
    for x, y in list(batches(9, dtype))[some[0].updates :][:n]:
        by.step(some, x, y, isolate_failures=False)
    return some


def assert_same(expected, found, close=True):
    """All that checkpoints hold."""
    for one, other in zip(expected, found):
        (tensors, numbers), (theirs, also) = one.state(), other.state()
        assert numbers == also and tensors.keys() == theirs.keys()
        for name, t in tensors.items():
            if close:
                torch.testing.assert_close(theirs[name], t, rtol=1e-6, atol=1e-8, msg=name)
            else:
                assert torch.equal(theirs[name], t), name


AS_ONE = [
    "--opt sgd", "--opt momentum", "--opt adamw", "--opt cadamw", "--opt lamb", "--opt larc",
    "--opt adafactor", "--opt lion", "--opt adafactorbv --opt-kwargs min_dim_size_to_factor=2",
    "--clip-grad 0.1", "--clip-grad 0.01 --clip-mode value", "--clip-grad 0.01 --clip-mode agc", "--model-ema",
    "--model-ema --model-ema-warmup --opt adamw", "--opt lamb --part-lr 0.1 0.2 0.3 0.4",
]  # fmt: skip


@pytest.mark.parametrize("given", AS_ONE)
def test_one_optimizer_is_those_of_the_parts(given, tmp_path):
    by = Packed()
    expected, found = (learners(tmp_path, *given.split(), "--lr", "0.1") for _ in range(2))
    assert_same(train(Engine(), expected), train(by, found))
    stacked = by.packs[0].abreast.stacked
    assert stacked is not None and stacked.holds and stacked.takes_rates


@pytest.mark.parametrize("by", [Engine, Packed])
def test_updates_whose_gradients_were_clipped_are_counted(by, tmp_path):
    """By the norms of the parts' gradients; an epoch's share is in its row, and the count begins anew."""
    for bound, share in ((1e-6, 100.0), (1e6, 0.0)):
        some = learners(tmp_path, "--clip-grad", str(bound))
        train(by(), some, 3)
        assert [float(n.sums.clipped) for n in some] == [3 * share / 100] * len(some)
        for n in some:
            n.end_epoch(None, 1.0)
            assert n.history[-1]["clipped"] == 3 * share / n.options["updates_per_epoch"]
            assert n.sums.clipped == 0
    unbounded = learners(tmp_path, "--clip-grad", "0.01", "--clip-mode", "agc")
    train(by(), unbounded, 1)
    unbounded[0].end_epoch(None, 1.0)
    assert "clipped" not in unbounded[0].history[-1]


@pytest.mark.parametrize("given", ["--opt muon", "--opt adamp", "--opt adamw --part-lr 0.1 0.2 0.3 0.4"])
def test_what_one_optimizer_cannot_do_each_does_for_itself(given, tmp_path):
    by = Packed()
    expected, found = (learners(tmp_path, *given.split()) for _ in range(2))
    assert_same(train(Engine(), expected), train(by, found))
    assert by.packs[0].abreast.stacked is None or not by.packs[0].abreast.stacked.takes_rates


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("opt", ["momentum", "adamw", "lamb"])
def test_a_part_that_overflows_skips_its_step_alone(opt, first, tmp_path, monkeypatch):
    """Until its scale is small enough; each part has its own. In the first update, or later."""
    found = []
    monkeypatch.setattr(optimizers, "scales", lambda args: True)
    for by in (Engine(), Packed()):
        some = learners(tmp_path, "--opt", opt, "--clip-grad", "1", dtype=torch.float32)
        for k, n in enumerate(some):
            n.criterion = lambda z, y, of=n.criterion: 8 * of(z, y)
            n.scaler = torch.amp.GradScaler("cpu", init_scale=2.0 ** (127 if k == 1 and first else 8))
        if not first:
            train(by, some, 3, torch.float32)
            some[1].scaler.update(2.0**127)
        before = [p.clone() for n in some for p in n.net.parameters()]
        train(by, some, 1, torch.float32)
        same = [torch.equal(p, q) for p, q in zip(before, (p for n in some for p in n.net.parameters()))]
        assert same == [k == 1 for k, n in enumerate(some) for _ in n.net.parameters()]
        found.append(train(by, some, 4, torch.float32))
    for one, other in zip(*found):
        assert one.scaler.state_dict() == other.scaler.state_dict()
        for p, q in zip(one.net.parameters(), other.net.parameters()):
            torch.testing.assert_close(q, p, rtol=1e-3, atol=1e-5)
    assert found[0][1].scaler.get_scale() < 2.0**127
    assert (by.packs[0].abreast.stacked is not None) == (opt == "momentum")  # the others have counts of updates


@pytest.mark.parametrize("given", ["--opt momentum --model-ema", "--opt adamw", "--opt lamb --clip-grad 0.1"])
def test_checkpoints_are_those_of_parts(given, tmp_path):
    """Packed to others and back; and the bits of a run that went on without a break."""

    def again(some):
        fresh = learners(tmp_path, *given.split())
        for n, other in zip(fresh, some):
            tensors, numbers = other.state()
            n.restore({name: t.clone() for name, t in tensors.items()}, numbers)
        return fresh

    whole, half = train(Packed(), learners(tmp_path, *given.split()), 6), learners(tmp_path, *given.split())
    assert_same(whole, train(Packed(), again(train(Packed(), half, 3)), 3), close=False)
    alone = train(Engine(), again(train(Packed(), learners(tmp_path, *given.split()), 3)), 3)
    assert_same(whole, alone)
    assert_same(whole, train(Packed(), again(train(Engine(), learners(tmp_path, *given.split()), 3)), 3))


@pytest.mark.parametrize("opt", ["momentum", "adamw", "lamb", "adafactor"])
def test_engines_take_turns(opt, tmp_path):
    """As in the trial of auto: what each has of the parts' numbers, the others go on with."""
    expected, found, by = learners(tmp_path, "--opt", opt), learners(tmp_path, "--opt", opt), Packed()
    for engine in (by, by, Engine(), by, Engine(), Engine(), by):
        train(engine, found, 1)
    assert_same(train(Engine(), expected, 7), found)


def test_a_part_less(tmp_path):
    """Those that are left have another optimizer, with their states."""
    expected, found, by = learners(tmp_path, "--opt", "adamw"), learners(tmp_path, "--opt", "adamw"), Packed()
    for some, engine in ((expected, Engine()), (found, by)):
        train(engine, some, 3)
        train(engine, [some[0], *some[2:]], 3)
    assert_same(expected, found)
    assert len(by.packs[0].abreast.stacked.own) == 3


class Operations(TorchDispatchMode):
    """Counts those that are no views."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.found[str(function)] += not function.is_view
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("given", [given for given in AS_ONE if "adafactorbv" not in given])  # by its shapes
def test_the_operations_are_those_of_one(given, tmp_path):
    """Those of an update do not grow with the number of parts, but for K products where norms are clipped."""
    counts = []
    for parts in (2, 4):
        by, some = Packed(), learners(tmp_path, *given.split(), "--part-lr", "0.1", parts=parts)
        train(by, some, 3)
        with Operations() as seen:
            by.apply_gradients(some)
            by.packs[0].abreast.average()
        counts.append(seen.found.total())
    assert counts[1] - counts[0] in ((2, 4) if "clip-grad 0.1" in given else (0,))


def test_optimizers_that_keep_more_than_their_state():
    """As timm's Lookahead, which has another inside."""
    net = Small()
    assert find_way(optimizers.create(net, options.parse([*RUN, "--opt", "adamw"]), 0.1), 4)
    inside = options.parse([*RUN, "--opt", "lookahead_adamw"])
    assert find_way(optimizers.create(net, inside, 0.1), 4) is None
