"""All parts and the dense network as one: an update by hand, a run with it, and one that is killed in it."""

import json
import subprocess

import pytest
import torch
import torch.nn.functional as F
from conftest import MODULE, RUN, TORCHRUN, bytes_of_parts, kill_a_rank
from test_coarse import accuracy

import timm_dd
from timm_dd import Domain, Parts, TwoLevel
from timm_dd.cli import main
from timm_dd.train.images import data
from timm_dd.train.settings import options
from timm_dd.two_level.aggregate import CoarseNet

PLAIN = [*RUN, "--grid", "2x2", "--joint-epochs", "0", "--part-epochs", "1", "--coarse-widths", "16", "8"]
TOGETHER = [*PLAIN, "--together", "coherent", "transfer", "--together-epochs", "2"]
HOWS = ("coherent", "transfer")


def train(folder, *given):
    return main(["train", *given, "--output", str(folder), "--experiment", "run"])


def files_of(run):
    """The bytes of what is trained together, after its last and its best epoch."""
    folders = [run / "together" / how / name for how in HOWS for name in ("last", "best")]
    return {str(path.relative_to(run)): path.read_bytes() for folder in folders for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("together")
    assert train(folder, *TOGETHER) == 0
    return folder / "run"


def test_what_is_loaded_has_the_accuracy_of_the_table(run):
    summary = json.loads((run / "summary.json").read_text())
    assert tuple(summary["two_level"]) == HOWS
    for how in HOWS:
        for name in ("last", "best"):
            curve = (run / "together" / how / "summary.csv").read_text().splitlines()[1:]
            tops = [float(line.split(",")[2]) for line in curve]
            two = TwoLevel.load(run / "together" / how / name)
            assert accuracy(two, run) == {"last": tops[-1], "best": max(tops)}[name] and len(tops) == 2
            assert (two.how, two.widths) == ("dnn", (16, 8))
        assert summary["two_level"][how] == tops[-1] and summary["seconds"][how] > 0
    assert summary["multiply_adds"]["two_level"]["coherent"] > sum(summary["multiply_adds"]["parts"])


def test_the_other_stages_do_not_notice(run, tmp_path):
    """The parts and the composed model are those of a run without it."""
    assert train(tmp_path, *PLAIN) == 0
    assert bytes_of_parts(run, 4) == bytes_of_parts(tmp_path / "run", 4)
    names = ("composed/model.safetensors", "global/last/model.safetensors")
    assert all((run / name).read_bytes() == (tmp_path / "run" / name).read_bytes() for name in names)


@pytest.mark.parametrize("how", HOWS)
def test_an_update_is_that_of_the_whole_network(how, tmp_path):
    """One of all images, by layers that are put together by hand: each part's probabilities, side by side."""
    plain = "--opt momentum --weight-decay 0 --drop-path 0 --no-aug --shift 0 --smoothing 0 --lr 0.5 --tune-rate 0.4"
    given = [*TOGETHER, *plain.split(), "-b", "256", "--together-epochs", "1", "--together", how, "--seed", "3"]
    assert train(tmp_path, *given) == 0
    boxes = Domain.grid(2, 2, overlap=4)
    fresh = timm_dd.split("test_resnet", 4, domain=boxes, img_size=32, num_classes=10, seed=3, drop_path_rate=0.0)
    parts = (fresh if how == "coherent" else Parts.load(tmp_path / "run" / "parts")).train()
    torch.manual_seed(3)
    dense = CoarseNet(4, 10, (16, 8))
    args = options.parse(given)
    train_set, val_set, _ = data.datasets(args)
    saved = Parts.load(tmp_path / "run" / "parts").plan.config["pretrained_cfg"]
    config = {**saved, "input_size": (3, 32, 32)}
    loader, _ = data.loaders(args, config, train_set, val_set, torch.device("cpu"), distributed=False)
    ((x, y),) = loader
    corners = [x[..., a : a + 20, b : b + 20] for a in (0, 12) for b in (0, 12)]
    rows = torch.cat([part(corner).softmax(1) for part, corner in zip(parts, corners)], 1)
    F.cross_entropy(dense(rows), y).backward()
    rate = 0.5 if how == "coherent" else 0.2
    found = TwoLevel.load(tmp_path / "run" / "together" / how / "last")
    pairs = [*zip(found.parts.parameters(), parts.parameters()), *zip(found.coarse.parameters(), dense.parameters())]
    assert len(pairs) == len(list(found.parameters()))
    for trained, before in pairs:
        torch.testing.assert_close(trained, before - rate * before.grad, rtol=1e-4, atol=1e-6)
    assert any(not torch.equal(trained, before) for trained, before in pairs)


def test_what_it_was_trained_with_stays(run, capsys):
    again = [*TOGETHER, "--resume"]
    before = files_of(run)
    for other, message in (
        ("--coarse-widths 8", "--coarse-widths was [16, 8], not [8]"),
        ("--together-lr 1", "--lr was"),
    ):
        assert train(run.parent, *again, *other.split()) == 1
        assert message in capsys.readouterr().err
    assert train(run.parent, *again) == 0 and files_of(run) == before


@pytest.mark.slow
def test_a_run_that_was_killed_in_it_ends_with_the_same_bits(tmp_path):
    """One of two ranks is killed while the first network trains, then the other while the second does."""
    command = [*TORCHRUN, "2", *MODULE, *TOGETHER, "--checkpoint-every", "0.05", "--output", str(tmp_path)]
    assert subprocess.run([*command, "--experiment", "whole"], stdout=subprocess.DEVNULL, timeout=300).returncode == 0
    for rank, title in ((0, "coherent 1/2"), (1, "transfer 1/2")):
        resume = ["--resume"] if (tmp_path / "run").exists() else []
        kill_a_rank([*command, "--experiment", "run", *resume], rank, title)
    last = subprocess.run([*command, "--experiment", "run", "--resume"], stdout=subprocess.DEVNULL, timeout=300)
    assert last.returncode == 0
    assert files_of(tmp_path / "run") == files_of(tmp_path / "whole")
