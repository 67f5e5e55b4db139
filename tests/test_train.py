"""Training: one process and several, data, schedules, bad input; with scikit-learn's digits."""

import argparse
import csv
import json
import math
import multiprocessing
import shutil
import signal
import subprocess
import sys
import tarfile
from collections import Counter

import numpy as np
import pytest
import timm
import torch
import yaml
from conftest import RUN, bytes_of_parts, torchrun
from PIL import Image
from safetensors.torch import load_file

import timm_dd
from timm_dd.cli import main
from timm_dd.errors import TrainError
from timm_dd.planning.trace import trace
from timm_dd.storage.files import part_name
from timm_dd.storage.merge_files import write_merged
from timm_dd.surgery.merge import merge
from timm_dd.train.images import data
from timm_dd.train.run import Run
from timm_dd.train.settings import options
from timm_dd.train.stages import composed, tuned
from timm_dd.train.updates import schedule
from timm_dd.train.updates.learner import Learner


def test_a_run_leaves_what_the_documentation_says(one):
    assert {p.name for p in one.iterdir()} == {
        "args.yaml",
        "plan.json",
        "parts",
        "composed",
        "global",
        "baseline",
        "summary.json",
    }
    assert yaml.safe_load((one / "args.yaml").read_text())["overlap"] == 4
    summary = json.loads((one / "summary.json").read_text())
    assert len(summary["parts"]) == 4 and {"together", "composed", "tuned", "baseline"} < summary.keys()
    for folder, epochs in (("parts/0", 2), ("parts/3", 2), ("global", 1), ("baseline", 3)):
        with open(one / folder / "summary.csv") as f:
            rows = list(csv.DictReader(f))
        assert [int(r["epoch"]) for r in rows] == list(range(epochs))
    assert [p for p in one.rglob("*") if p.suffix in (".pth", ".pt", ".bin", ".pkl")] == []


def test_composed_is_the_merge_of_the_parts(one):
    expected = timm_dd.merge(one / "parts").state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in load_file(one / "composed" / "model.safetensors").items())


def test_the_tuned_model_loads_and_has_the_accuracy_of_the_table(one):
    summary = json.loads((one / "summary.json").read_text())
    args = options.parse([*RUN, "-c", str(one / "args.yaml")])
    for folder, key in (("composed", "composed"), ("global/last", "tuned"), ("baseline/last", "baseline")):
        model = timm.create_model(f"local-dir:{one / folder}", pretrained=True).eval()
        train, val, _ = data.datasets(args)
        _, loader = data.loaders(
            args, data.data_config(args, model), train, val, torch.device("cpu"), distributed=False
        )
        with torch.no_grad():
            right = sum(int((model(x).argmax(1) == y).sum()) for x, y in loader)
        assert 100 * right / len(val) == summary[key]


@pytest.mark.slow
def test_parts_do_not_depend_on_the_number_of_ranks(one, tmp_path):
    """Two ranks and one process: the same bytes, dropout and augmentation included; and stage 2 runs under DDP."""
    done = torchrun(2, *RUN, "--parts", "4", "--output", str(tmp_path), "--experiment", "two")
    assert done.returncode == 0, done.stderr
    assert bytes_of_parts(tmp_path / "two", 4) == bytes_of_parts(one, 4)
    assert (tmp_path / "two" / "composed" / "model.safetensors").read_bytes() == (
        one / "composed" / "model.safetensors"
    ).read_bytes()
    assert "composed, after fine-tuning" in done.stdout


@pytest.mark.slow
def test_more_ranks_than_parts(tmp_path):
    done = torchrun(3, *RUN, "--parts", "2", "--output", str(tmp_path), "--experiment", "three")
    assert done.returncode == 0, done.stderr
    assert len(json.loads((tmp_path / "three" / "summary.json").read_text())["parts"]) == 2


def test_a_box_roams_while_its_part_trains(tmp_path):
    """With the probability of --roam, to any place of the image, and never when it is evaluated."""
    seen = []

    class Looks(torch.nn.Linear):
        def forward(self, x):
            seen.append((int(x[0, 0, 0, 0]), int(x[0, 0, 0, -1]), self.training))
            return super().forward(x[:, 0, 0])

    x = torch.arange(32 * 32.0).reshape(1, 1, 32, 32).expand(2, 3, -1, -1)
    for roam in (0.0, 0.5, 1.0):
        seen.clear()
        args = options.parse([*RUN, "--roam", str(roam)])
        box = timm_dd.Box((16, 0), (16, 16))
        looks = Learner("part 2", Looks(16, 10), box, args, torch.device("cpu"), 300, 2, 7, tmp_path)
        for _ in range(300):
            looks.step(x, torch.tensor([1, 2]))
        moved = [first for first, last, _ in seen if first != 16 * 32]
        assert abs(len(moved) / 300 - roam) < 0.1
        assert all(last - first == 15 for first, last, _ in seen)
        if roam:
            assert {first // 32 for first in moved} == {first % 32 for first in moved} == set(range(17))
        looks.model.eval()
        looks.logits(x)
        assert seen[-1] == (16 * 32, 16 * 32 + 15, False)


def test_statistics_are_re_estimated(one, tmp_path):
    """Before fine-tuning: those of torch's update_bn on 1,024 whole images; the composed files stay as merged."""
    arguments = [*RUN, "--parts", "4", "--epochs", "0", "--no-aug", "--shift", "0", "--drop-path", "0"]
    assert main(["train", *arguments, "--output", str(tmp_path), "--experiment", "run"]) == 0
    run = tmp_path / "run"
    args = options.parse(arguments)
    train, val, _ = data.datasets(args)
    model = timm_dd.merge(run / "parts")
    loader, _ = data.loaders(args, data.data_config(args, model), train, val, torch.device("cpu"), distributed=False)
    data.seed_epoch(42, 0)
    torch.optim.swa_utils.update_bn(list(loader)[: 1024 // args.batch_size], model)
    found = load_file(run / "global" / "last" / "model.safetensors")
    assert all(torch.allclose(v, found[k]) for k, v in model.state_dict().items())
    assert not torch.equal(
        found["bn1.running_mean"], load_file(run / "composed" / "model.safetensors")["bn1.running_mean"]
    )
    assert "updated" in json.loads((run / "summary.json").read_text())


def count_calls(monkeypatch, *functions):
    """How often each function is called from now on, by whatever name a module of the package has it."""
    calls = Counter()
    for function in functions:

        def counting(*args, _function=function, **kwargs):
            calls[_function.__name__] += 1
            return _function(*args, **kwargs)

        for module in [m for name, m in sys.modules.items() if name.partition(".")[0] in ("timm_dd", "timm")]:
            for name in [name for name, value in vars(module).items() if value is function]:
                monkeypatch.setattr(module, name, counting)
    return calls


def test_a_run_makes_each_thing_once(tmp_path, monkeypatch):
    """One trace, and one merge on disk; timm's models are the one whose data are asked for, the one that is split, the
    one that is fine-tuned, and that of the claim by value, which merges the parts and what it makes of them."""
    calls = count_calls(monkeypatch, timm.create_model, trace, merge, write_merged)
    arguments = [*RUN, "--parts", "2", "--part-epochs", "1", "--output", str(tmp_path), "--experiment", "run"]
    assert main(["train", *arguments]) == 0
    assert calls == {"create_model": 4, "trace": 1, "merge": 2, "write_merged": 1}


def test_the_second_stage_takes_every_part_as_it_was_trained(one, tmp_path, monkeypatch):
    """Also those that other ranks, or an earlier process, have trained: here all of them."""
    seen = {}

    def look(run, learner, *_):
        seen.update({k: part.state_dict() for k, part in enumerate(run.parts)}, composed=learner.net.state_dict())
        raise TrainError("enough")

    shutil.copytree(one, tmp_path / "one")
    monkeypatch.setattr(tuned, "_prepare", look)
    assert main(["train", *RUN, "--parts", "4", "--resume", str(tmp_path / "one")]) == 1
    for k in range(4):
        trained = load_file(one / "parts" / str(k) / part_name(k, 4))
        assert trained.keys() == seen[k].keys() and all(torch.equal(t, seen[k][name]) for name, t in trained.items())
    merged = timm_dd.merge(one / "parts").state_dict()
    assert all(torch.equal(t, merged[name]) for name, t in seen["composed"].items())


@pytest.mark.slow
def test_ranks_count_every_image_once(one, tmp_path):
    """360 images on 2 ranks in batches of 64: the sampler's padding is not counted."""
    arguments = [*RUN, "--parts", "4", "--epochs", "0", "--output", str(tmp_path), "--experiment", "two"]
    assert torchrun(2, *arguments).returncode == 0
    expected, found = (json.loads((run / "summary.json").read_text()) for run in (one, tmp_path / "two"))
    assert found["composed"] == expected["composed"] and found["together"] == expected["together"]


# ---- data


def picture(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((32, 32, 3), value, np.uint8)).save(path)


@pytest.fixture
def folder(tmp_path):
    """Twelve images of two classes in train and in val."""
    for split in ("train", "val"):
        for i in range(12):
            picture(tmp_path / "data" / split / "ab"[i % 2] / f"{i}.png", 20 * i)
    return tmp_path / "data"


def as_tars(folder):
    for split in ("train", "val"):
        with tarfile.open(folder.parent / f"{split}.tar", "w") as tar:
            for child in sorted((folder / split).iterdir()):
                tar.add(child, child.name)
    return folder.parent


def as_one_tar(folder):
    with tarfile.open(folder.parent / "all.tar", "w") as tar:
        tar.add(folder, "all")
    return folder.parent / "all.tar"


@pytest.mark.parametrize("form", [lambda f: f, as_tars, as_one_tar], ids=["folder", "tars", "one tar"])
def test_data_dir(form, folder):
    args = options.parse(["--data-dir", str(form(folder)), "--model", "test_resnet", "-b", "4"])
    train, val, classes = data.datasets(args)
    assert (len(train), len(val), classes) == (12, 12, 2)
    assert sorted(int(val[i][1]) for i in range(12)) == [0] * 6 + [1] * 6


@pytest.mark.parametrize("form", [lambda f: f, as_tars, as_one_tar], ids=["folder", "tars", "one tar"])
@pytest.mark.parametrize("lacking, number", [("a", 1), ("b", 0)])
def test_validation_may_lack_classes(form, lacking, number, folder):
    """Those that it has are numbered as in the training images."""
    shutil.rmtree(folder / "val" / lacking)
    args = options.parse(["--data-dir", str(form(folder)), "--model", "test_resnet", "-b", "4"])
    train, val, classes = data.datasets(args)
    assert (len(train), len(val), classes, data.class_names(val, 2)) == (12, 6, 2, ("a", "b"))
    assert [val[i][1] for i in range(6)] == [number] * 6


@pytest.mark.parametrize("form", [lambda f: f, as_tars, as_one_tar], ids=["folder", "tars", "one tar"])
def test_images_alone_are_numbered_as_the_run_did(form, folder):
    """For the report and `verify`, who see no training images."""
    shutil.rmtree(folder / "val" / "a")
    args = options.parse(["--data-dir", str(form(folder)), "--model", "test_resnet", "-b", "4"])
    assert [y for _, y in data.validation_set(args, ("a", "b"))] == [1] * 6
    with pytest.raises(TrainError, match="no training image is of 'b'"):
        data.validation_set(args, ("a", "c"))


@pytest.mark.parametrize("form", [lambda f: f, as_tars, as_one_tar], ids=["folder", "tars", "one tar"])
@pytest.mark.parametrize("given", ["--train-split tset", "--val-split tset"])
def test_a_split_that_is_not_there(form, given, folder):
    """A name of the user's own stands for nothing else; a usual one for the others, of which one is taken."""
    shutil.copytree(folder / "val", folder / "training")
    root = str(form(folder))
    with pytest.raises(TrainError, match="expected tset|no folder tset"):
        data.datasets(options.parse(["--data-dir", root, "--model", "test_resnet", "-b", "4", *given.split()]))
    args = options.parse(["--data-dir", root, "--model", "test_resnet", "-b", "4", "--val-split", "eval"])
    assert [len(s) for s in data.datasets(args)[:2]] == [12, 12]


@pytest.mark.parametrize("form", [lambda f: f, as_tars, as_one_tar], ids=["folder", "tars", "one tar"])
@pytest.mark.parametrize(
    "text, said",
    [("\ufeffa\nb\n", None), ("b\r\na\r\nc", None), ("A\nb", "no line is of 'a' (.*a/0.png"),
     ("b", "no line is of 'a'"),
     ("", "is empty"), ("a\na\nb", "has 'a' 2 times"), ("a\nb\n\n", "has an empty line"), (None, "No such file")],
)  # fmt: skip
def test_no_class_is_left_out(form, text, said, folder, tmp_path):
    """timm's readers leave out a folder of which the file has no line."""
    if text is not None:
        (tmp_path / "map.txt").write_text(text)
    root = str(form(folder))
    args = options.parse([root, "--model", "test_resnet", "-b", "4", "--class-map", str(tmp_path / "map.txt")])
    if said is not None:
        with pytest.raises(TrainError, match=said.replace("(", r"\(")):
            data.datasets(args)
        return
    train, val, classes = data.datasets(args)
    assert (len(train), len(val), classes) == (12, 12, len(text.split()))
    numbers = {name: i for i, name in enumerate(text.strip("\ufeff").split())}
    assert train.class_map == val.class_map == numbers
    assert sorted(train[i][1] for i in range(12)) == sorted([numbers["a"], numbers["b"]] * 6)


def test_a_file_numbers_the_classes(folder):
    (folder / "order.txt").write_text("b\na\n")
    for name in (str(folder / "order.txt"), "order.txt"):
        args = options.parse([str(folder), "--model", "test_resnet", "-b", "4", "--class-map", name])
        if name == "order.txt":
            with pytest.raises(TrainError, match="No such file"):
                data.datasets(args)
            continue
        train, val, classes = data.datasets(args)
        assert classes == 2 and data.class_names(train, 2) == ("b", "a")
        for images in (train, val):
            assert all(target == "ba".index(images.path(i).split("/")[-2]) for i, (_, target) in enumerate(images))


def test_digits_are_all_there_once():
    train, val = data.Digits(True), data.Digits(False)
    assert (len(train), len(val)) == (1437, 360)
    assert train[0][0].size == (32, 32) and train[0][0].mode == "RGB"
    assert np.bincount(val.targets).min() > 25


def test_the_order_of_images_follows_from_seed_and_epoch():
    args = options.parse([*RUN, "--parts", "2"])
    train, val, _ = data.datasets(args)
    config = data.data_config(args, timm.create_model("test_resnet", num_classes=10))
    loader, _ = data.loaders(args, config, train, val, torch.device("cpu"), distributed=False)

    def epoch(seed, number):
        data.seed_epoch(seed, number)
        return next(iter(loader))[0]

    assert torch.equal(epoch(1, 0), epoch(1, 0))
    assert not torch.equal(epoch(1, 0), epoch(1, 1))
    assert not torch.equal(epoch(1, 0), epoch(2, 0))


def test_workers_go_on_when_they_are_asked_to_stop():
    """Whoever asks a whole process group asks them too: every image comes all the same, in the loaders' order."""
    args = options.parse([*RUN, "--parts", "2", "-j", "2", "-b", "16"])
    train, val, _ = data.datasets(args)
    config = data.data_config(args, timm.create_model("test_resnet", num_classes=10))
    loaders = data.loaders(args, config, train, val, torch.device("cpu"), distributed=False)

    def epoch(loader, *signals):
        data.seed_epoch(1, 0)
        batches = iter(loader)
        images = [next(batches)[0]]
        for number in signals:
            workers = [str(worker.pid) for worker in multiprocessing.active_children()]
            subprocess.run(["kill", f"-{int(number)}", *workers], check=True)  # whoever it is, but the first process
        return torch.cat([*images, *(x for x, _ in batches)])

    for loader in loaders:
        assert torch.equal(epoch(loader), epoch(loader, signal.SIGTERM, signal.SIGINT))


def test_shifts_go_with_flips_and_policies():
    """A flip of every image along both axes turns it by half a circle; a policy that inverts colours does so."""
    config = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic"}

    def image(*given):
        args = options.parse([*RUN, "--shift", "1", *given])
        sets = data.datasets(args)[:2]
        data.loaders(args, {**config, "crop_pct": 1.0}, *sets, torch.device("cpu"), distributed=False)
        data.seed_epoch(0, 0)
        return torch.as_tensor(np.asarray(sets[0][0][0]))

    plain = image("--hflip", "0")
    assert torch.equal(image("--hflip", "1", "--vflip", "1"), plain.flip(1, 2))
    assert not torch.equal(image("--hflip", "0", "--aa", "rand-m9-n3-p1.0"), plain)


# ---- the schedule of section 3.1.1


def test_the_papers_schedule():
    args = options.parse(["-c", "cifar10-resnet32.yaml", "--data-dir", "none"])
    expected = {
        "part": {0: 1e-3, 59: 1e-3, 60: 1e-4, 80: 1e-5, 100: 1e-6, 119: 1e-6},
        None: {0: 1e-4, 20: 1e-5, 40: 1e-6, 60: 5e-7, 79: 5e-7},
        "baseline": {0: 1e-3, 80: 1e-4, 140: 1e-5, 160: 1e-6, 180: 5e-7, 199: 5e-7},
    }
    for stage, rates in expected.items():
        staged = options.stage_options(args, stage)
        assert staged.epochs == max(rates) + 1
        optimizer = torch.optim.Adam([torch.zeros(1, requires_grad=True)], lr=staged.lr)
        steps = schedule.create(staged, optimizer, 100)
        for epoch in range(staged.epochs):
            if epoch in rates:
                assert math.isclose(optimizer.param_groups[0]["lr"], rates[epoch], rel_tol=1e-9), (stage, epoch)
            steps.step(epoch + 1, epoch)  # the accuracy rises all the time


def test_the_plateau_divides_by_the_root_of_ten():
    args = argparse.Namespace(
        **{**vars(options.parse(["-c", "cifar10-resnet32.yaml", "--data-dir", "none"])), "decay_milestones": [99]}
    )
    args.decay_rates = [0.1]
    optimizer = torch.optim.Adam([torch.zeros(1, requires_grad=True)], lr=1.0)
    steps, rates = schedule.create(args, optimizer, 100), []
    for epoch in range(12):
        steps.step(epoch + 1, 50.0)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[:5] == [1.0] * 5
    assert np.allclose(rates[5:10], 10**-0.5) and np.allclose(rates[10:], 0.1)


# ---- bad input: one line on stderr, status 1 or 2, nothing left behind


def no_images(tmp_path, _):
    (tmp_path / "none" / "train" / "a").mkdir(parents=True)
    (tmp_path / "none" / "val" / "a").mkdir(parents=True)
    return ["--data-dir", str(tmp_path / "none"), "--model", "test_resnet"]


def no_val(tmp_path, folder):
    (folder / "val").rename(folder / "elsewhere")
    return ["--data-dir", str(folder), "--model", "test_resnet"]


def other_classes(tmp_path, folder):
    (folder / "val" / "a").rename(folder / "val" / "c")
    return ["--data-dir", str(folder), "--model", "test_resnet"]


def flat(tmp_path, folder):
    for path in sorted((folder / "train").glob("*/*")):
        path.rename(folder / "train" / f"{path.parent.name}{path.name}")
    return ["--data-dir", str(folder), "--model", "test_resnet"]


def unsorted_images(tmp_path, folder):
    return ["--data-dir", str(folder / "train"), "--model", "test_resnet"]


def broken_tar(tmp_path, folder):
    (tmp_path / "broken.tar").write_bytes(b"not a tar" * 100)
    return ["--data-dir", str(tmp_path / "broken.tar"), "--model", "test_resnet"]


BAD = [
    (lambda t, f: ["--data-dir", str(t / "nowhere"), "--model", "test_resnet"], 1, "no data folder"),
    (no_images, 1, "no train images"),
    (no_val, 1, "has no validation images"),
    (other_classes, 1, "different classes"),
    (flat, 1, "train/a0.png lies in no folder of a class; expected"),
    (unsorted_images, 1, "train/train/CLASS/IMAGE); it has a, b"),
    (broken_tar, 1, "no train images"),
    (lambda t, f: [*RUN, "--model", "resnet5"], 1, "did you mean"),
    (lambda t, f: [*RUN, "--parts", "100", "--grid", "full", "--overlap", "0", "--narrow", "refuse"], 1, "largest K"),
    (lambda t, f: [*RUN, "--parts", "4", "--grid", "3x1"], 1, "expected 4 boxes"),
    (lambda t, f: [*RUN, "--overlap", "40"], 1, "larger than the image"),
    (lambda t, f: [*RUN, "-b", "5000"], 1, "make no batch"),
    (lambda t, f: [*RUN, "--lr", "1e30", "--opt", "sgd", "--part-epochs", "1"], 1, "the loss is nan"),
    (lambda t, f: [*RUN, "--output", str(f / "train" / "a" / "0.png")], 1, "cannot write"),
    (lambda t, f: ["--model", "test_resnet"], 2, "nothing to train on"),
    (lambda t, f: [*RUN, "--parts", "0"], 2, "from 1 up"),
    (lambda t, f: [*RUN, "--roam", "1.5"], 2, "a probability from 0 to 1"),
    (lambda t, f: [*RUN, "--grid", "two"], 2, "expected rows x columns"),
    (lambda t, f: [*RUN, "-c", "nothing.yaml"], 2, "no config"),
    (lambda t, f: [*RUN, "--decay-milestones", "1", "2", "--decay-rates", "0.1"], 2, "give as many"),
]


@pytest.mark.parametrize("make, status, message", BAD, ids=[message for *_, message in BAD])
def test_bad_input(make, status, message, tmp_path, folder, capsys):
    output = tmp_path / "runs"
    arguments = make(tmp_path, folder)
    try:
        found = main(["train", "--output", str(output), *arguments])
    except SystemExit as e:
        found = e.code
    errors = capsys.readouterr().err
    assert found == status and message in errors, errors
    if status == 1:
        assert errors.count("\n") == 1
    if "loss" not in message:  # a run that had begun keeps what it has
        assert not output.exists()


@pytest.mark.parametrize(
    "given, channels", [("--input-size 1 32 32", 1), ("--in-chans 1", 1), ("--in-chans 4", 4), ("--in-chans 3", 3)]
)
def test_images_of_other_channels(given, channels, tmp_path, folder):
    """Grey ones and those with alpha: the model, its data and its card are of as many channels."""
    data_given = ["--data-dir", str(folder), "--model", "test_resnet", "--img-size", "32", "-b", "4", "-j", "0"]
    run = ["--part-epochs", "1", "--epochs", "1", "--warmup-epochs", "0", "--parts", "2", "--device", "cpu"]
    run += ["--output", str(tmp_path), "--experiment", "run", "--color-jitter", "0", *given.split()]
    assert main(["train", *data_given, *run]) == 0
    config = json.loads((tmp_path / "run/global/last/config.json").read_text())["pretrained_cfg"]
    assert config["input_size"] == [channels, 32, 32] and len(config["mean"]) == len(config["std"]) == channels
    model = timm.create_model(f"local-dir:{tmp_path / 'run/global/last'}", pretrained=True).eval()
    assert model(torch.zeros(1, channels, 32, 32)).shape == (1, 2)
    assert main(["verify", str(tmp_path / "run/composed"), str(tmp_path / "run/parts"), "--data-dir", str(folder)]) == 0


IMPOSSIBLE = [
    "--opt foo", "--sched foo", "--aa foo --shift 0", "--interpolation foo", "--mean 0.5 0.5", "--input-size 32 32 3",
    "--device cuda", "--num-classes 9",
]  # fmt: skip


@pytest.mark.parametrize("given", IMPOSSIBLE)
def test_what_cannot_be_made_is_known_before_there_is_a_folder(given, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    arguments = [*RUN, "--output", str(tmp_path / "runs"), "--experiment", "run", *given.split()]
    assert main(["train", *arguments]) == 1
    assert (error := capsys.readouterr().err).count("\n") == 1 and len(error) < 400
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("package, module", [("wandb", "wandb"), ("tensorboard", "torch.utils.tensorboard")])
def test_a_tracker_that_is_not_installed(package, module, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    assert main(["train", *RUN, "--output", str(tmp_path / "runs"), f"--log-{package}"]) == 1
    assert f"timm_dd[{package}]" in capsys.readouterr().err and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("ranks, batch, enough", [(1, 36, True), (2, 24, False), (2, 18, True), (3, 13, False)])
def test_every_rank_has_a_batch(ranks, batch, enough, tmp_path, monkeypatch, capsys):
    """Of 36 images; a rank's share in the second stage is what counts, and nothing begins before."""
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    monkeypatch.setattr(Run, "go", lambda self: {})
    given = [*RUN, "--train-num-samples", "36", "-b", str(batch), "--output", str(tmp_path), "--experiment", "run"]
    assert main(["train", *given]) == (0 if enough else 1)
    if not enough:
        assert f"make no batch of {batch} on each of {ranks} ranks" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_statistics_are_of_some_images():
    """Those of none would wipe the network's."""
    with pytest.raises(TrainError, match="no batch to take statistics from"):
        list(composed.some([]))


def test_a_run_does_not_overwrite_another(one, capsys):
    assert main(["train", *RUN, "--output", str(one.parent), "--experiment", "one"]) == 1
    assert "holds a run already" in capsys.readouterr().err


def test_strings_in_a_config_are_read_as_on_the_command_line(tmp_path, capsys):
    def parse(text):
        (tmp_path / "c.yaml").write_text(text)
        return options.parse([*RUN, "-c", str(tmp_path / "c.yaml")])

    given = parse("grid: 1x2\npart_lr: '0.1'\nmin_lr: 1e-3\naa: rand-m9\n")  # a string, for YAML, is 1e-3
    assert (given.grid, given.part_lr, given.min_lr, given.aa) == ((1, 2), [0.1], 0.001, "rand-m9")
    with pytest.raises(SystemExit, match="2"):
        parse("grid: two\n")
    assert "argument --grid: expected rows x columns" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["resume: runs/one\n", "config: other.yaml\n"])
def test_what_is_of_a_start_is_for_the_command_line(text, one, tmp_path, capsys):
    """And not in a run's options, with which others begin."""
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(SystemExit, match="2"):
        main(["train", *RUN, "-c", str(tmp_path / "c.yaml")])
    assert f"{text.split(':')[0]} is for the command line" in capsys.readouterr().err
    assert not {"resume", "config"} & yaml.safe_load((one / "args.yaml").read_text()).keys()


def test_unknown_options_in_a_config(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("colour: red\n")
    with pytest.raises(SystemExit, match="2"):
        main(["train", "-c", str(tmp_path / "c.yaml")])
    assert "colour" in capsys.readouterr().err
