"""The second level of a run: its figures, its folder, and what a kill leaves."""

import json
import subprocess
import sys

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import MODULE, RUN, torchrun
from PIL import Image
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

import timm_dd
from timm_dd import Parts, TwoLevel
from timm_dd.cli import main
from timm_dd.train.images import data
from timm_dd.train.run import summary_table
from timm_dd.train.settings import options
from timm_dd.train.stages import coarse

HOWS = ["mean", "vote", "sum", "dnn"]
GIVEN = [
    *RUN, "--grid", "2x2", "--joint-epochs", "0", "--epochs", "0", "--part-epochs", "4", "--opt", "adamw",
    "--lr", "0.01", "--drop-path", "0", "--shift", "4", "--train-num-samples", "768", "-b", "32",
]  # fmt: skip
COARSE = [*GIVEN, "--aggregate", *HOWS, "--coarse-widths", "16", "8", "--coarse-views", "2", "--coarse-epochs", "30"]
FILES = ["two_level.json", "coarse.safetensors"]


def train(folder, *given):
    return main(["train", *(given or COARSE), "--output", str(folder), "--experiment", "run"])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two-level")
    assert train(folder) == 0
    return folder / "run"


def labelled_images(run):
    plan, args = Parts.load(run / "parts").plan, options.parse(RUN)
    return data.loader_of(
        args, {**plan.config["pretrained_cfg"], "input_size": plan.input_size}, data.validation_set(args)
    )


def accuracy(network, run):
    """As whoever loads it counts, on images that are read anew."""
    with torch.no_grad():
        right = [network.eval()(x).argmax(1) == y for x, y in labelled_images(run)]
    return 100 * int(torch.cat(right).sum()) / 360


def test_what_is_loaded_has_the_accuracy_of_the_table(run):
    summary = json.loads((run / "summary.json").read_text())
    found = summary["two_level"]
    assert list(found) == HOWS
    parts = Parts.load(run / "parts")
    for how in HOWS[:3]:
        assert accuracy(TwoLevel(parts, how), run) == found[how]
    two = TwoLevel.load(run / "two-level")
    assert (two.how, two.widths, accuracy(two, run)) == ("dnn", (16, 8), found["dnn"])
    assert found["dnn"] > max(summary["parts"])
    assert sorted(p.name for p in (run / "two-level").iterdir()) == sorted([*FILES, "summary.json"])


def multiply_adds(network):
    """Of one image, by torch's own counter."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network.eval()(torch.zeros(1, 3, 32, 32))
    return counter.get_total_flops() // 2


def test_the_table_says_what_an_image_costs(run):
    summary = json.loads((run / "summary.json").read_text())
    found, parts = summary["multiply_adds"], Parts.load(run / "parts")
    assert sum(found["parts"]) == multiply_adds(parts) and len(found["parts"]) == 4
    for how in HOWS:
        two = TwoLevel.load(run / "two-level") if how == "dnn" else TwoLevel(parts, how)
        assert found["two_level"][how] == multiply_adds(two)
    whole = multiply_adds(timm.create_model("test_resnet", num_classes=10))
    assert found["composed"] == whole and found["uncounted"] == []
    rows = summary_table(summary, options.parse(COARSE)).splitlines()
    cells = {row[:34].strip(): row.split()[-2:] for row in rows}
    assert cells["composed, after fine-tuning"] == [f"{whole / 1e6:.2f}", "M"]
    assert cells["two levels, dnn"] == [f"{found['two_level']['dnn'] / 1e6:.3g}", "M"]
    odd = {**summary, "multiply_adds": {**found, "uncounted": ["aten.odd"]}}
    assert summary_table(odd, options.parse(COARSE)).count("at least") == len(rows) - 1


def test_a_run_without_a_dense_network_keeps_the_first_way(tmp_path):
    assert train(tmp_path, *GIVEN, "--aggregate", "vote", "mean") == 0
    assert TwoLevel.load(tmp_path / "run" / "two-level").how == "vote"
    assert not (tmp_path / "run" / "two-level" / "coarse.safetensors").exists()


def test_resuming_trains_it_again_only_with_other_options(run, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(coarse, "_train", lambda *a, by=coarse._train: calls.append(a) or by(*a))
    before = (run / "two-level" / "coarse.safetensors").read_bytes()
    assert train(run.parent, *COARSE, "--resume") == 0 and not calls
    assert train(run.parent, *COARSE, "--coarse-dropout", "0.2", "--resume") == 0 and len(calls) == 1
    assert TwoLevel.load(run / "two-level").dropout == 0.2
    assert train(run.parent, *COARSE, "--resume") == 0 and len(calls) == 2
    assert (run / "two-level" / "coarse.safetensors").read_bytes() == before


@pytest.mark.slow
def test_a_run_that_was_killed_in_it_ends_with_the_same_bits(tmp_path):
    given = [*COARSE, "--coarse-epochs", "300"]
    assert train(tmp_path / "whole", *given) == 0
    words = [sys.executable, *MODULE, *given, "--output", str(tmp_path), "--experiment", "run"]
    kept = tmp_path / "run" / "two-level" / "probabilities.safetensors"
    with subprocess.Popen(words, stdout=subprocess.DEVNULL) as process:
        while not kept.exists():
            assert process.poll() is None
        process.kill()
    assert not (tmp_path / "run" / "two-level" / "summary.json").exists()
    assert train(tmp_path, *given, "--resume") == 0
    for name in FILES:
        folders = (tmp_path / "whole" / "run", tmp_path / "run")
        assert len({(folder / "two-level" / name).read_bytes() for folder in folders}) == 1
    assert not kept.exists()


@pytest.mark.slow
def test_two_ranks_give_the_same_bits(run, tmp_path):
    done = torchrun(2, *COARSE, "--output", str(tmp_path), "--experiment", "run")
    assert done.returncode == 0, done.stderr
    for name in FILES:
        assert (tmp_path / "run" / "two-level" / name).read_bytes() == (run / "two-level" / name).read_bytes()


def test_kept_probabilities_are_of_the_same_options(run, tmp_path, monkeypatch):
    """A run that ended while the dense network trained, and goes on with other options."""
    with monkeypatch.context() as m:
        m.setattr(coarse, "CoarseNet", lambda *sizes: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(tmp_path, *COARSE, "--coarse-views", "1")
    assert (tmp_path / "run" / "two-level" / "probabilities.safetensors").exists()
    assert train(tmp_path, *COARSE, "--resume") == 0
    for name in FILES:
        assert (tmp_path / "run" / "two-level" / name).read_bytes() == (run / "two-level" / name).read_bytes()


def test_the_dense_network_learns_from_images_that_the_parts_leave_out(tmp_path, monkeypatch):
    """A third of 768: by the images of the loaders, and by the probabilities that it is given."""
    given = [*COARSE, "--coarse-folds", "3", "--coarse-views", "1", "--no-aug", "--shift", "0", "--part-epochs", "1"]
    arguments, loaders = [], data.loaders
    with monkeypatch.context() as m:
        m.setattr(data, "loaders", lambda *given, **more: arguments.append(given) or loaders(*given, **more))
        m.setattr(coarse, "CoarseNet", lambda *sizes: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(tmp_path, *given)
    order = torch.randperm(768, generator=torch.Generator().manual_seed(42)).tolist()
    of_parts, held_out = (given[2] for given in arguments[-2:])
    assert (of_parts.indices, held_out.indices) == (order[:512], order[512:])
    updates = [json.loads(path.read_text())["updates"] for path in tmp_path.glob("run/parts/*/summary.json")]
    assert updates == [512 // 32] * 4

    kept = load_file(tmp_path / "run" / "two-level" / "probabilities.safetensors")
    with torch.no_grad():
        x, y = map(torch.cat, zip(*loaders(*arguments[-1])[0]))
        expected = Parts.load(tmp_path / "run" / "parts").eval()(x).softmax(-1).movedim(0, 1).flatten(1)
    weights = torch.arange(1, 41).double()
    mine, theirs = ((rows.double() @ weights).argsort() for rows in (kept["probabilities"], expected))
    torch.testing.assert_close(kept["probabilities"][mine], expected[theirs])
    assert torch.equal(kept["labels"][mine], y[theirs])


@pytest.mark.parametrize("how", ["vote", "sum", "dnn"])
def test_fine_tuning_learns_from_it(how, tmp_path):
    """The first update, of all images, by hand."""
    plain = "--opt momentum --weight-decay 0 --no-aug --shift 0 --smoothing 0 --lr 0.4 --no-update-bn --no-keep-momenta"
    given = [*COARSE, *plain.split(), "-b", "256", "--train-num-samples", "256", "--part-epochs", "1", "--epochs", "1"]
    given += ["--aggregate", how, "--distill", "0.3"]
    assert train(tmp_path, *given) == 0
    run = tmp_path / "run"
    parts, model = Parts.load(run / "parts"), timm_dd.merge(run / "parts").train()
    config = {**parts.plan.config["pretrained_cfg"], "input_size": (3, 32, 32)}
    args = options.parse(given)
    ((x, y),) = data.loaders(args, config, *data.datasets(args)[:2], torch.device("cpu"), distributed=False)[0]
    with torch.no_grad():
        p, z = parts.eval()(x).softmax(-1), parts(x)
        votes = F.one_hot(p.argmax(-1), 10).sum(0)
        weighed = TwoLevel.load(run / "two-level").coarse if how == "dnn" else None
        taught = {
            "vote": lambda: (5 * votes + p.sum(0)) / 24,
            "sum": lambda: z.sum(0).softmax(-1),
            "dnn": lambda: weighed.eval()(p.transpose(0, 1).reshape(len(y), -1)).softmax(-1),
        }[how]()
    said = model(x).log_softmax(-1)
    (-0.7 * said[range(len(y)), y].mean() - 0.3 * (taught * said).sum(-1).mean()).backward()
    found = load_file(run / "global" / "last" / "model.safetensors")
    for name, before in model.named_parameters():
        torch.testing.assert_close(found[name], before - 0.1 * before.grad, rtol=1e-4, atol=1e-5)


def test_probabilities_beyond_memory(tmp_path, capsys):
    assert train(tmp_path, *COARSE, "--coarse-views", "100000000") == 1
    assert "GB of probabilities" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_the_names_of_the_classes(run, tmp_path):
    """Of the digits, and of an image folder, in the order of their numbers."""
    assert TwoLevel.load(run / "two-level").class_names == tuple("0123456789")
    for split in ("train", "val"):
        for name in ("tulip", "aster"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(8):
                Image.new("RGB", (8, 8)).save(tmp_path / split / name / f"{i}.png")
    for more in ([], ["--train-num-samples", "6"]):
        args = options.parse(["--data-dir", str(tmp_path), "-b", "2", *more])
        images, _, classes = data.datasets(args)
        assert data.class_names(images, classes) == ("aster", "tulip") and images[0][1] in (0, 1)
        assert data.class_names(images, 5) is None


def test_too_few_images_for_the_dense_network(tmp_path, capsys):
    assert train(tmp_path, *COARSE, "--coarse-folds", "30") == 1
    assert "--coarse-folds 30: 25 images for the dense network make no batch of 32" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())
