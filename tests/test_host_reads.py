"""Nothing in an update or an evaluated batch waits for the device: no operation whose result the host reads."""

from contextlib import nullcontext

import pytest
import torch
from test_capture import Again
from test_stacked import batches, learners
from torch.utils._python_dispatch import TorchDispatchMode

from timm_dd.train.engines import Engine, Graphed, Packed
from timm_dd.train.epochs.loop import measure
from timm_dd.train.stages.joint import Joint

READS = {"_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "_unique2", "unique_dim", "allclose"}
ENGINES = [Engine, Packed, lambda: Graphed(Packed(), Again), lambda: Joint(Packed()), lambda: Graphed(Engine(), Again)]


class Unread(TorchDispatchMode):
    """The operations whose results, or whose results' sizes, the host waits for."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, given = function.overloadpacket.__name__, args
        masks = name.startswith("index") and any(t is not None and t.dtype == torch.bool for t in given[1])
        if name in READS or masks:
            self.found.append(name)
        return function(*args, **(kwargs or {}))


def test_what_is_read_is_seen():
    x = torch.arange(3.0)
    for read in (lambda: x[0].item(), lambda: float(x.sum()), lambda: x[x > 1], lambda: bool((x == 1).any())):
        with Unread() as seen:
            read()
        assert seen.found


GIVEN = [
    "--opt momentum", "--opt adamw --sched-on-updates", "--clip-grad 0.1", "--clip-grad 0.01 --clip-mode agc",
    "--model-ema", "--roam 0.5", "--grad-accum-steps 2",
]  # fmt: skip


@pytest.mark.parametrize("by", ENGINES, ids=["sequential", "packed", "graph of packed", "joint", "graph"])
@pytest.mark.parametrize("given", GIVEN)
def test_an_update_reads_nothing(given, by, tmp_path):
    """Once engines have seen what they work with; images on the device are as they come."""
    some, by = learners(tmp_path, *given.split(), "--amp", "--amp-dtype", "bfloat16", dtype=torch.float32), by()
    with by:
        for i, (x, y) in enumerate(batches(7, torch.float32)):
            with Unread() if i > 4 else nullcontext() as seen:
                by.step(some, x, y, isolate_failures=True)
            assert not seen or seen.found == []


@pytest.mark.parametrize("by", ENGINES[:4], ids=["sequential", "packed", "graph of packed", "joint"])
@pytest.mark.parametrize("together", [False, True])
def test_an_evaluated_batch_reads_nothing(by, together, tmp_path):
    """However many there are; the sums are read once."""
    some, given = learners(tmp_path, dtype=torch.float32), list(batches(3, torch.float32))
    loader = Loader(given)
    with Unread() as seen:
        found = measure(some, loader, by(), together)
    assert seen.found == [] and len(found) == 4 + together
    logits = [[n.net.eval()(x) for x, _ in given] for n in some]
    joint = isinstance(by(), Joint)
    summed = [sum(row) for row in zip(*logits)]
    logits = ([summed] * 4 if joint else logits) + ([[4 * z if joint else z for z in summed]] if together else [])
    for figures, of_batches in zip(found, logits):
        right = sum(int((z.argmax(1) == y).sum()) for z, (_, y) in zip(of_batches, given))
        assert figures["top1"] == 100 * right / len(loader.dataset)


class Loader(list):
    @property
    def dataset(self):
        return range(sum(len(y) for _, y in self))
