"""A training step, evaluation, loading and checkpoints on a pretended device, under every engine: no operation meets
tensors of two devices, the host waits for none, and all values are those of a CPU."""

import pytest
import torch
from conftest import RUN
from pretended import DEVICE, Mixed, Pretended
from test_capture import Again
from test_host_reads import Loader
from test_stacked import CPU, Small, batches
from timm.data.loader import PrefetchLoader
from torch.utils.data import DataLoader

import timm_dd
from timm_dd import Domain
from timm_dd.algebra.view import Box
from timm_dd.surgery.packed import pack
from timm_dd.train.engines import Engine, Graphed, Packed
from timm_dd.train.epochs import checkpoints
from timm_dd.train.epochs.loop import measure
from timm_dd.train.images.batched import KERNELS, Erase, Flip, Jitter, ResizedCrop, Shift
from timm_dd.train.images.resident import Resident
from timm_dd.train.settings import options
from timm_dd.train.stages.joint import Joint
from timm_dd.train.updates import timings
from timm_dd.train.updates.learner import Learner
from timm_dd.train.updates.optimizers import has_graphs
from timm_dd.train.updates.timings import Timings

BOXES = [Box((0, i), (8, 5)) for i in range(4)]
ENGINES = {
    "sequential": Engine,
    "packed": Packed,
    "graph": lambda: Graphed(Engine(), Again),
    "graph of packed": lambda: Graphed(Packed(), Again),
    "joint": lambda: Joint(Packed()),
}
GIVEN = [
    "--opt momentum --clip-grad 1", "--opt adamw --model-ema", "--opt lamb --roam 0.5",
    "--clip-grad 0.01 --clip-mode agc",
]  # fmt: skip


@pytest.fixture
def pretended(monkeypatch):
    return Pretended(monkeypatch)


def learners(device, folder, *given):
    torch.manual_seed(3)
    split = timm_dd.split(Small(), 4, example_input=torch.empty(1, 3, 8, 8), domain=Domain.custom(BOXES))
    args, folders = options.parse([*RUN, *given]), [folder / device.type / str(k) for k in range(4)]
    for path in folders:
        path.mkdir(parents=True, exist_ok=True)
    return [Learner(f"{k}", p, BOXES[k], args, device, 5, 16, k, folders[k]) for k, p in enumerate(split)]


def trained(by, some, n=6, reads=()):
    """The figures of an evaluation after some updates; the last of them, and it but for its end, read nothing."""
    device, given = some[0].device, list(batches(9, torch.float32))[some[0].updates :][:n]
    loader = Loader((x.to(device), y.to(device)) for x, y in given)
    for learner in some:
        learner.model.train()
    with by:
        for i, (x, y) in enumerate(loader):
            before = len(reads)
            by.step(some, x, y, isolate_failures=False)
            assert i < 2 or len(reads) == before
        before = len(reads)
        found = measure(some, loader, by)
    assert list(reads[before:]) == ["tolist"][: len(reads)]
    return found


def test_devices_do_not_meet(pretended):
    with pretended:
        x, y = torch.ones(3, device=DEVICE), torch.ones(3)
        assert x.device == (x + torch.tensor(2.0)).device == y.to(x).device == y.to(DEVICE).device == DEVICE
        assert y.device == CPU and pretended.reads == []
        assert x.cpu().device == CPU and float(x.sum()) == 3 and pretended.reads == ["cpu", "_local_scalar_dense"]
        for mix in (lambda: x + y, lambda: y.mul_(x), lambda: torch.stack([x, y]), lambda: y + x.sum()):
            with pytest.raises(Mixed):
                mix()


@pytest.mark.parametrize("make", ENGINES.values(), ids=ENGINES)
@pytest.mark.parametrize("given", GIVEN)
def test_a_step_an_evaluation_and_a_checkpoint(given, make, pretended, tmp_path):
    with pretended:
        some, again = (learners(DEVICE, tmp_path, *given.split()) for _ in range(2))
        assert has_graphs(next(some[0].net.parameters()).device)
        figures = trained(make(), some, reads=pretended.reads)
        for n in some:
            checkpoints.save(n)
        assert all(checkpoints.restore(n) for n in again)
        for those in (some, again):
            trained(make(), those, 3)
        found = [{name: t.cpu() for name, t in n.state()[0].items()} for n in (*some, *again)]
    for one, other in zip(found[:4], found[4:]):
        assert all(torch.equal(t, other[name]) for name, t in one.items())
    for here, there in zip(trained(make(), learners(CPU, tmp_path, *given.split())), figures):
        assert there == pytest.approx(here, rel=1e-4)


def test_convolutions_are_timed(pretended, monkeypatch, tmp_path):
    """On the device's tensors; without graphs, which only a GPU has."""
    monkeypatch.setattr(timings, "has_graphs", lambda device: False)
    with pretended:
        by = Timings()
        figures = trained(Packed(timings=by), learners(DEVICE, tmp_path))
    assert by.known and all(name.startswith(f"on {DEVICE.type}") for name in by.known)
    assert all(row.keys() >= {"grouped", "grouped_channels_last", "one_by_one"} for row in by.known.values())
    for here, there in zip(trained(Packed(), learners(CPU, tmp_path)), figures):
        assert there == pytest.approx(here, rel=1e-4)


def test_packed_networks_are_loaded_and_unloaded(pretended, tmp_path):
    with pretended:
        parts = [n.net for n in learners(DEVICE, tmp_path)]
        packed = pack(parts[:2])
        packed.load(parts[2:])
        packed.unload(parts[:2])
        assert {t.device for m in (packed, *parts) for t in m.state_dict().values()} == {DEVICE}
        assert torch.equal(parts[0].conv.weight, parts[2].conv.weight)


def test_images_on_the_device(pretended):
    """Every random transform is where they are, and reads nothing."""
    drawn = Jitter(((0.5, 1.5),) * 3, 0.8), ResizedCrop((9, 8), (7, 9), (0.2, 1.0), (0.5, 2.0), tuple(KERNELS.values()))
    changes = [Shift(2), Flip(2, 0.5), *drawn]
    erasing = [Erase((7, 9), 0.9, (0.1, 0.4), (-1.0, 1.0), (1, 2), mode) for mode in ("const", "rand", "pixel")]
    images, targets = torch.randint(256, (20, 3, 9, 8), dtype=torch.uint8), torch.arange(20)

    def batches_on(device):
        loader = PrefetchLoader(DataLoader(range(20), batch_size=8), device=device)
        torch.manual_seed(0)
        return list(Resident(loader, images.to(device), targets.to(device), changes, erasing))

    with pretended:
        there = batches_on(DEVICE)
        assert not pretended.reads and all(t.device == DEVICE for batch in there for t in batch)
        there = [[t.cpu() for t in batch] for batch in there]
    for batch, expected in zip(there, batches_on(CPU), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(batch, expected, strict=True))
