"""Parts that are trained anywhere, by processes that share nothing but a copy step, and the stages that follow them."""

import json
import shutil
import subprocess
import sys

import huggingface_hub
import pytest
import torch
from conftest import MODULE, RUN, bytes_of_parts
from safetensors.torch import load_file

import timm_dd
from timm_dd.cli import main
from timm_dd.errors import TrainError
from timm_dd.storage.files import part_name
from timm_dd.train.ranks import dealing

GIVEN = [*RUN, "--parts", "4", "--joint-epochs", "0"]
OWN = [*GIVEN, "--part-epochs", "1"]
WEIGHTS = ("composed/model.safetensors", "global/last/model.safetensors", "global/best/model.safetensors")


def train(folder, name, *given, options=OWN):
    return main(["train", *options, "--output", str(folder), "--experiment", name, *given])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run in one process."""
    folder = tmp_path_factory.mktemp("whole")
    assert train(folder, "run") == 0
    return folder / "run"


@pytest.fixture(scope="module")
def machines(tmp_path_factory):
    """Two that share nothing, with two parts each; their runs' folders."""
    folders = [tmp_path_factory.mktemp(name) for name in ("a", "b")]
    for folder, parts in zip(folders, (["2", "0", "2"], ["1", "3"])):
        assert train(folder, "run", "--only-parts", *parts) == 0
    return [folder / "run" for folder in folders]


def check_same(run, whole):
    assert bytes_of_parts(run, 4) == bytes_of_parts(whole, 4)
    assert all((run / name).read_bytes() == (whole / name).read_bytes() for name in WEIGHTS)


def test_only_some_parts(machines):
    """Nothing but the parts is there, and no number of theirs depends on who trained them."""
    assert {p.name for p in machines[0].iterdir()} == {"args.yaml", "plan.json", "parts"}
    assert {p.name for p in (machines[0] / "parts").iterdir()} == {"plan.json", "0", "2"}
    assert not any(path.name == "lock" for path in machines[0].rglob("*"))


def test_two_machines_give_the_bits_of_one(machines, whole, tmp_path):
    """By one folder into which the parts were copied, or by both as they are."""
    here = tmp_path / "run"
    shutil.copytree(machines[0], here)
    for k in ("1", "3"):
        shutil.copytree(machines[1] / "parts" / k, here / "parts" / k)
    assert train(tmp_path, "run", "--from-parts", str(here)) == 0
    check_same(here, whole)
    assert train(tmp_path, "other", "--from-parts", *map(str, machines)) == 0
    check_same(tmp_path / "other", whole)


@pytest.mark.slow
def test_a_job_array_gives_the_bits_of_one_process(whole, tmp_path):
    """Four processes at once in one folder, each with a part, then one more."""
    command = [sys.executable, *MODULE, *OWN, "--output", str(tmp_path), "--experiment", "run"]
    tasks = [subprocess.Popen([*command, "--only-parts", str(k)], stderr=subprocess.PIPE, text=True) for k in range(4)]
    errors = [task.communicate(timeout=300)[1] for task in tasks]
    assert [task.returncode for task in tasks] == [0] * 4, errors
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"args.yaml", "plan.json", "parts"}
    assert train(tmp_path, "run", "--from-parts", str(tmp_path / "run")) == 0
    check_same(tmp_path / "run", whole)


def test_what_has_not_arrived_is_said(machines, tmp_path, capsys):
    assert train(tmp_path, "run", "--from-parts", str(machines[0])) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "of 4 parts 1, 3 have not arrived in" in error
    assert "0, 2 have; train what is missing with --only-parts 1 3" in error
    assert list(tmp_path.iterdir()) == []


OTHERS = [
    (["--seed", "7"], "was trained with --seed 42, this run has 7"),
    (["--parts", "2"], "has parts of another K, 4, this run has 2"),
    (["--overlap", "6"], "has parts of another domain, grid 2x2, overlap 4"),
    (["--model", "resnet10t"], "has parts of another model, test_resnet"),
    (["--part-lr", "0.3"], "--lr was 0.05, not 0.3"),
    (["--mean", "0.1", "0.1", "0.1"], "of other data"),
]


@pytest.mark.parametrize("given, message", OTHERS, ids=[message for _, message in OTHERS])
def test_parts_of_another_run_are_refused(given, message, machines, tmp_path, capsys):
    """In one line, and nothing is left behind."""
    assert train(tmp_path, "run", "--from-parts", *map(str, machines), *given) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_part_that_is_there_twice(machines, tmp_path, capsys):
    """The same is one; another is refused, a damaged one too."""
    other = tmp_path / "other"
    shutil.copytree(machines[0], other)
    assert train(tmp_path, "run", "--from-parts", *map(str, [*machines, other]), "--epochs", "0") == 0
    path = other / "parts" / "0" / part_name(0, 4)
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    assert train(tmp_path, "next", "--from-parts", *map(str, [*machines, other])) == 1
    assert "part 0 has arrived twice" in capsys.readouterr().err
    assert train(tmp_path, "next", "--from-parts", str(other), str(machines[1])) == 1
    assert "is damaged or was changed" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["saved", "bare"])
def test_parts_of_no_run(form, whole, tmp_path, capsys):
    """As `Parts.save` wrote them, or their files alone: what they reach is found here."""
    folder = tmp_path / "parts"
    if form == "saved":
        timm_dd.Parts.load(whole / "parts").save(folder)
    else:
        folder.mkdir()
        for path in (whole / "parts").rglob("p*.*"):
            shutil.copy(path, folder)
    assert train(tmp_path, "run", "--from-parts", str(folder)) == 0
    assert "parts 0, 1, 2, 3 came without optimizer states" in capsys.readouterr().out
    found, expected = (json.loads((run / "summary.json").read_text())["parts"] for run in (tmp_path / "run", whole))
    assert found == expected
    composed = (load_file(run / "composed" / "model.safetensors") for run in (tmp_path / "run", whole))
    assert all(torch.equal(a, b) for a, b in zip(*(state.values() for state in composed)))


def test_parts_of_no_run_are_judged_by_their_own_weights(machines, tmp_path):
    """Also where averages of weights are kept, which begin with them."""
    bare = tmp_path / "bare"
    bare.mkdir()
    for path in [p for run in machines for p in (run / "parts").rglob("p*.*")]:
        shutil.copy(path, bare)
    trained = [json.loads((machines[k % 2] / "parts" / str(k) / "summary.json").read_text()) for k in range(4)]
    assert train(tmp_path, "run", "--from-parts", str(bare), "--model-ema", "--epochs", "0", "--no-update-bn") == 0
    found = [json.loads((tmp_path / "run" / "parts" / str(k) / "summary.json").read_text()) for k in range(4)]
    assert [f["top1"] for f in found] == [t["top1"] for t in trained] and all("top5" in f for f in found)


def test_parts_from_the_hub(whole, tmp_path, monkeypatch):
    """As they are pushed: files in one folder, and no more than what is asked for."""
    repository, asked = tmp_path / "repository", []
    repository.mkdir()
    for path in (whole / "parts").rglob("p*.*"):
        shutil.copy(path, repository)

    def download(repo, revision, allow_patterns):
        asked.append((repo, revision))
        return str(repository)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert train(tmp_path, "run", "--from-parts", "hf-hub:user/parts@v1", "--epochs", "0") == 0
    composed = (load_file(run / "composed" / "model.safetensors") for run in (tmp_path / "run", whole))
    assert all(torch.equal(a, b) for a, b in zip(*(state.values() for state in composed)))
    assert asked == [("user/parts", "v1")]


def test_a_part_goes_on_where_it_was_stopped(machines, tmp_path, monkeypatch, capsys):
    """With the same command; a part that is done is not trained again."""
    shutil.copytree(machines[0], tmp_path / "run")
    assert train(tmp_path, "run", "--only-parts", "0", "2") == 0
    out = capsys.readouterr().out
    assert "parts 1/1" not in out and "parts 0, 2 of 4 are trained" in out and "parts 1, 3 are not there yet" in out


def test_parts_of_other_options_do_not_come_into_one_folder(machines, tmp_path, capsys):
    shutil.copytree(machines[0], tmp_path / "run")
    assert train(tmp_path, "run", "--only-parts", "1", "--smoothing", "0.3") == 1
    assert "part 0 is done, with other options" in capsys.readouterr().err
    assert not (tmp_path / "run" / "parts" / "1").exists()


def test_a_part_has_one_process_and_the_whole_run_too(machines, tmp_path, capsys, monkeypatch):
    """Others train other parts beside it."""
    seen, begun = [], []

    def within(_):
        if begun:
            raise TrainError("let in")
        begun.append(True)
        for given in (["--only-parts", "1"], ["--only-parts", "0", "3"], ["--resume"]):
            seen.append((train(tmp_path, "run", *given), capsys.readouterr().err))
        raise TrainError("enough")

    monkeypatch.setattr(timm_dd.train.run, "train_parts", within)
    assert train(tmp_path, "run", "--only-parts", "0") == 1
    assert [status for status, _ in seen] == [1, 1, 1]
    assert "let in" in seen[0][1] and all("another process trains here" in error for _, error in seen[1:])


@pytest.mark.parametrize(
    "given, message",
    [
        (["--only-parts", "4"], "--only-parts: parts of --parts 4 are 0 to 3, got 4"),
        (["--only-parts", "0", "--from-parts", "x"], "give one of them"),
    ],
)
def test_options_that_cannot_be(given, message, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        train(tmp_path, "run", *given)
    assert message in capsys.readouterr().err


# ---- which rank has which parts


def test_the_heaviest_first_to_who_has_least():
    assert dealing.deal([5, 1, 1, 1, 1, 1], range(6), 2) == [[0], [1, 2, 3, 4, 5]]
    assert dealing.deal([4, 4, 4, 4], range(4), 2) == [[0, 2], [1, 3]]
    assert dealing.deal([0, 0, 0], range(3), 2) == [[0, 2], [1]], "of unknown cost: by their number"
    assert dealing.deal([3, 1, 2], [2, 1], 3) == [[2], [1], []]
    assert dealing.deal([7, 6, 5, 4, 3, 2], range(6), 3) == [[0, 5], [1, 4], [2, 3]]


def test_parts_are_dealt_by_their_multiply_adds():
    """Of boxes of several sizes: one part sees nine times the pixels of the others."""
    boxes = [timm_dd.Box((0, 0), (48, 48)), *[timm_dd.Box((0, 0), (16, 16))] * 3]
    parts = timm_dd.split("resnet10t", 4, domain=timm_dd.Domain.custom(boxes), img_size=64, num_classes=10)
    counts = [c.multiply_adds for c in dealing.costs(parts)]
    assert counts[0] > sum(counts[1:])
    assert [dealing.parts_of(rank, 2, parts, range(4)) for rank in range(2)] == [[0], [1, 2, 3]]
