"""Devices, whatever torch calls them, and what ranks that share a network do with BatchNorm; with pretended devices."""

import json
from types import SimpleNamespace

import pytest
import timm
import torch
import torch.distributed as dist
from conftest import RUN
from timm.layers import SyncBatchNormAct, convert_sync_batchnorm
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from timm_dd.cli import main
from timm_dd.errors import TrainError
from timm_dd.train import engines
from timm_dd.train.images import resident
from timm_dd.train.ranks import world
from timm_dd.train.ranks.world import Ranks
from timm_dd.train.settings import options
from timm_dd.train.updates.learner import Learner, SeededRandom


@pytest.fixture
def accelerators(monkeypatch):
    """Two of a kind; which of them is chosen."""
    chosen = []
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("xpu"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch.accelerator, "set_device_index", chosen.append)
    for name in ("cudnn", "cuda"):
        monkeypatch.setattr(torch.backends, name, SimpleNamespace(matmul=SimpleNamespace()))
    return chosen


@pytest.mark.parametrize(
    "name, local_rank, local_world, expected",
    [(None, 0, 1, "xpu:0"), (None, 1, 2, "xpu:1"), ("xpu", 1, 2, "xpu:1"), ("xpu:1", 0, 1, "xpu:1")],
)
def test_each_rank_has_its_own_device(name, local_rank, local_world, expected, accelerators):
    assert Ranks(local_rank, local_rank, local_world, local_world).device(name) == torch.device(expected)
    assert accelerators == [int(expected[-1])]
    assert Ranks(0, 0, 1, 1).device("cpu") == torch.device("cpu") and len(accelerators) == 1


@pytest.mark.parametrize(
    "name, local_world, message",
    [
        (None, 3, "3 ranks on this machine and 2 xpu device"),
        ("xpu:1", 2, "--device xpu:1 is one for 2 ranks"),
        ("xpu:2", 1, "--device xpu:2: torch finds 2 here"),
        ("cuda", 1, "--device cuda: torch finds none here; use --device xpu"),
    ],
)
def test_a_device_that_a_rank_cannot_have(name, local_world, message, accelerators):
    """Said before anything else is done."""
    with pytest.raises(TrainError, match=message) as e:
        Ranks(0, 0, local_world, local_world).device(name)
    assert "\n" not in str(e.value) and accelerators == []


def test_two_ranks_on_one_device(monkeypatch, tmp_path):
    """As of two torchruns on one machine; another run may share it."""
    told = SimpleNamespace(get_device_properties=lambda device: SimpleNamespace(uuid=f"GPU-{device.index}"))
    monkeypatch.setattr(torch, "get_device_module", lambda device: told)
    monkeypatch.setattr(world.tempfile, "gettempdir", lambda: str(tmp_path))
    one, other = torch.device("xpu", 0), torch.device("xpu", 1)
    with world.alone(one, "run"), world.alone(other, "run"), world.alone(one, "another"):
        with pytest.raises(TrainError, match="another rank of this run trains on xpu:0"):
            with world.alone(one, "run"):
                pass
    with world.alone(one, "run"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_dropout_is_seeded_on_the_device_that_draws(monkeypatch):
    drawn = torch.Generator()
    fake = SimpleNamespace(
        get_rng_state=drawn.get_state, set_rng_state=drawn.set_state, manual_seed=lambda seed: drawn.manual_seed(seed)
    )
    asked = []
    monkeypatch.setattr(torch, "get_device_module", lambda device: asked.append(device) or fake)
    seeded = SeededRandom(7, torch.device("xpu", 1))
    found = []
    for update in (3, 4, 3):
        with seeded(update, 0):
            found.append(torch.rand(4, generator=drawn))
        torch.rand(1, generator=drawn)  # of somebody else
    assert torch.equal(found[0], found[2]) and not torch.equal(found[0], found[1])
    assert asked == [torch.device("xpu", 1)]


def test_engines_of_a_device_without_graphs(tmp_path):
    args = options.parse(RUN)
    some = [Learner(f"part {k}", nn.Linear(2, 2), None, args, torch.device("cpu"), 1, 1, k, tmp_path) for k in range(2)]
    device = torch.device("xpu", 0)
    assert type(engines.engine("auto", some, device, 8)) is engines.Engine
    assert type(engines.engine_of_one("auto", device)) is engines.Engine
    with pytest.raises(TrainError, match="--engine graph is for GPUs"):
        engines.engine("graph", some, device, 8)


def test_images_do_not_move_to_where_nobody_knows_the_memory(monkeypatch):
    monkeypatch.setattr(torch, "get_device_module", lambda device: SimpleNamespace())
    assert resident._free(torch.device("mps")) == 0


@pytest.mark.parametrize("name", ["meta", "foo", "cuda:x", "cpu:-1"])
def test_what_is_no_device(name, capsys):
    with pytest.raises(SystemExit, match="2"):
        options.parse([*RUN, "--device", name])
    assert "--device is cpu, cuda" in capsys.readouterr().err


# ---- BatchNorm of ranks that share a network


class Normed(nn.Module):
    """Its statistics are those of the images alone."""

    def __init__(self):
        super().__init__()
        self.bn, self.fc = nn.BatchNorm2d(3), nn.Linear(3, 10)

    def forward(self, x):
        return self.fc(self.bn(x).mean((2, 3)))


def batches(rank):
    generator = torch.Generator().manual_seed(rank)
    for _ in range(5):
        yield (1 + rank) * torch.randn(8, 3, 4, 4, generator=generator) + rank, torch.arange(8)


def statistics_of_a_rank(rank, folder, how):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = DistributedDataParallel(Normed(), broadcast_buffers=how != "reduce")
    args = options.parse([*RUN, f"--dist-bn={how}", "--model-ema"])
    learner = Learner("model", model, None, args, torch.device("cpu"), 5, 16, 0, folder)
    for x, y in batches(rank):
        learner.step(x, y)
    held = [learner.net.bn.running_mean.tolist(), learner.net.bn.running_var.tolist()]
    (folder / f"{rank}.json").write_text(json.dumps(held))
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["reduce", "broadcast", ""])
def test_statistics_of_ranks(how, tmp_path):
    """Their mean over all images of all ranks, or those of the first rank's share."""
    torch.multiprocessing.spawn(statistics_of_a_rank, (tmp_path, how), nprocs=2)
    own = []
    for rank in range(2):
        bn = Normed().bn.train()
        for x, _ in batches(rank):
            bn(x)
        own.append(torch.stack([bn.running_mean, bn.running_var]))
    found = [torch.tensor(json.loads((tmp_path / f"{rank}.json").read_text())) for rank in range(2)]
    expected = (own[0] + own[1]) / 2 if how == "reduce" else own[0]
    torch.testing.assert_close(found[0], expected)
    assert torch.equal(found[0], found[1]) is (how == "reduce")


def test_sync_bn_is_for_gpus(tmp_path, capsys):
    assert main(["train", *RUN, "--sync-bn", "--output", str(tmp_path / "runs")]) == 1
    error = capsys.readouterr().err
    assert "--sync-bn: torch's SyncBatchNorm runs on GPUs alone" in error and error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_synchronised_norms_keep_their_names():
    """So that checkpoints and files are those of the model, timm's norms with activations too."""
    model = timm.create_model("mobilenetv3_small_050", num_classes=10)
    before = list(model.state_dict())
    norms = sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    model = convert_sync_batchnorm(model)
    assert list(model.state_dict()) == before
    kinds = [m for m in model.modules() if isinstance(m, nn.SyncBatchNorm)]
    assert len(kinds) == norms and any(isinstance(m, SyncBatchNormAct) for m in kinds)


def test_how_ranks_share_norms_is_nothing_to_a_part():
    """Its weights do not depend on it, and neither does who may take it; those of the composed model do."""
    one, other = (options.parse([*RUN, *given]) for given in ([], ["--dist-bn", "broadcast"]))
    for stage in ("part", "joint"):
        assert len({str(options.training_identity(options.stage_options(a, stage))) for a in (one, other)}) == 1
    for stage in (None, "baseline", "coherent"):
        assert len({str(options.training_identity(options.stage_options(a, stage))) for a in (one, other)}) == 2
