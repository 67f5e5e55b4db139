"""Files of a run that are lost or damaged: ``--resume`` writes them again, bit for bit, or says what is to be done."""

import json
import shutil

import pytest
import torch
from conftest import RUN, torchrun
from safetensors import safe_open
from safetensors.torch import load_file

from timm_dd.cli import main
from timm_dd.storage import tensorfile
from timm_dd.storage.files import part_name

pytestmark = pytest.mark.slow
GIVEN = [
    *RUN, "--parts", "2", "--part-epochs", "1", "--epochs", "2", "--grid", "full", "--overlap", "0", "--shift", "0",
    "--joint-epochs", "1", "--baseline", "--baseline-epochs", "1", "--aggregate", "dnn", "--coarse-epochs", "2",
    "--together", "coherent", "--together-epochs", "1", "--train-num-samples", "128", "--val-num-samples", "64",
]  # fmt: skip
MODEL = "model.safetensors"
PART = f"1/{part_name(1, 2)}"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lost")
    assert main(["train", *GIVEN, "--output", str(folder), "--experiment", "run"]) == 0
    return folder / "run"


@pytest.fixture
def run(whole, tmp_path):
    """A copy to spoil."""
    return shutil.copytree(whole, tmp_path / "run")


def models(run):
    """All that a run has made, but for the seconds that it took."""
    kept = (path for path in run.rglob("*") if path.suffix in (".safetensors", ".json") and path.name != "summary.json")
    return {str(path.relative_to(run)): path.read_bytes() for path in kept}


def remove(path):
    path.unlink()


def cut(path):
    path.write_bytes(path.read_bytes()[:-50])


def empty(path):
    path.write_text("{}")


@pytest.mark.parametrize("damage, names", [
    (remove, [f"global/best/{MODEL}", f"baseline/last/{MODEL}", f"parts/{PART}", "two-level/two_level.json",
              "together/coherent/last/two_level.json", f"composed/{MODEL}"]),
    (remove, ["global/best/config.json", f"joint/{PART}", "joint/plan.json", "two-level/coarse.safetensors"]),
    (cut, [f"global/last/{MODEL}", f"baseline/best/{MODEL}", f"parts/{PART}", f"joint/{PART}",
           "together/coherent/best/coarse.safetensors", "two-level/coarse.safetensors"]),
    (cut, ["global/last/config.json", "together/coherent/last/plan.json", "two-level/two_level.json"]),
    (empty, ["two-level/two_level.json", "together/coherent/last/two_level.json", "global/best/config.json"]),
    (empty, ["two-level/summary.json"]),
])  # fmt: skip
def test_what_is_lost_is_written_again(damage, names, whole, run, capsys):
    for name in names:
        damage(run / name)
    capsys.readouterr()
    assert main(["train", "--resume", str(run)]) == 0
    assert (found := models(run)).keys() == (expected := models(whole)).keys()
    assert [name for name in expected if found[name] != expected[name]] == []
    assert json.loads((run / "two-level/summary.json").read_text())["top1"]


def is_best(run, epoch):
    """Let this epoch of the fine-tuning have been the best one, and its model be lost."""
    for path in (run / "global").glob("checkpoint-*"):
        tensors = {name: t.clone() for name, t in load_file(path).items()}
        with safe_open(path, "pt") as f:
            numbers = json.loads(f.metadata()["learner"])
        for i, row in enumerate(numbers["history"]):
            row["top1"] = 100.0 if i == epoch else 0.0
        path.unlink()
        tensorfile.write_state(path, tensors, {"learner": json.dumps(numbers)})
    shutil.rmtree(run / "global" / "best")


def test_the_best_epoch_s_model_comes_from_the_checkpoint_that_has_it(whole, run):
    """The epochs after it are trained again, to the same bits."""
    is_best(run, 0)
    first, _ = sorted((run / "global").glob("checkpoint-*"))
    expected = {n.removeprefix("model."): t.clone() for n, t in load_file(first).items() if n.startswith("model.")}
    assert main(["train", "--resume", str(run)]) == 0
    found = load_file(run / "global" / "best" / MODEL)
    assert found.keys() == expected.keys() and all(torch.equal(t, expected[name]) for name, t in found.items())
    last, before = (load_file(folder / "global" / "last" / MODEL) for folder in (run, whole))
    assert all(torch.equal(t, before[name]) for name, t in last.items())


def test_a_best_model_that_no_checkpoint_has(run, capsys):
    is_best(run, 0)
    sorted((run / "global").glob("checkpoint-*"))[0].unlink()
    capsys.readouterr()
    assert main(["train", "--resume", str(run)]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"timm-dd train: {run / 'global' / 'best'} is lost, and no checkpoint has its weights; "
        f"remove {run / 'global'} to train this network again"
    )
    assert not (run / "global" / "best").exists()


def test_two_ranks_write_again_what_is_lost(tmp_path):
    given = [*RUN, "--parts", "2", "--part-epochs", "1", "--train-num-samples", "64", "-b", "32", "--epochs", "2"]
    given += ["--output", str(tmp_path), "--experiment", "run"]
    assert torchrun(2, *given).returncode == 0
    run, expected = tmp_path / "run", models(tmp_path / "run")
    is_best(run, 0)
    (run / "parts" / PART).unlink()
    assert torchrun(2, *given, "--resume").returncode == 0
    found = models(run)
    assert found.keys() == expected.keys()
    others = [name for name in expected if "best" not in name and "checkpoint" not in name]
    assert [name for name in others if found[name] != expected[name]] == []


def test_a_cycle_whose_model_is_lost_is_not_done(tmp_path, capsys):
    given = [*RUN, "--parts", "2", "--part-epochs", "1", "--train-num-samples", "64", "--val-num-samples", "64"]
    run = tmp_path / "run"
    assert main(["train", *given, "--output", str(tmp_path), "--experiment", "run", "--cycles", "2"]) == 0
    expected = models(run)
    shutil.rmtree(run / "global" / "last")
    shutil.rmtree(run / "cycle-2" / "global" / "last")
    assert main(["train", "--resume", str(run)]) == 0
    assert models(run) == expected
    for cycle in (run, run / "cycle-2"):
        shutil.rmtree(cycle / "global")
    assert main(["train", "--resume", str(run), "--tune-rate", "0.5"]) == 1
    second = run / "cycle-2" / "parts" / "0"
    assert f"{second} was not trained from the present model of the cycle before; remove" in capsys.readouterr().err
