"""A sweep over every flag: whatever it cannot be is one line and status 1 or 2, on the command line and in a file, and
leaves nothing behind."""

import argparse
import logging
import random

import pytest
import yaml

from timm_dd.cli import main
from timm_dd.train.run import Run
from timm_dd.train.settings.flags import parser

BASE = {
    "dataset": "digits", "model": "test_resnet", "parts": 2, "part_epochs": 1, "epochs": 1, "warmup_epochs": 0,
    "lr": 0.05, "batch_size": 64, "workers": 0, "train_num_samples": 128, "device": "cpu",
}  # fmt: skip
ACTIONS = parser(add_help=False)._actions
TEXT = ["", "\n", "a\nb", "\ud800", "\x1b[31m", "--"]  # for what takes almost any text
NUMBER = ["", "x", "nan", "inf", "-inf", "1e999", "ü", "😀", "1,5", "1 2", "--", "0x", "None", "%s", "-"]
WHOLE = ["1.5", "1e3", str(2**63), str(-(2**63) - 1)]
NEGATIVE = {"mean", "seed"}  # what may be below 0
NAMES = {"aa", "dataset", "interpolation", "model", "opt", "sched", "torchcompile"}  # of what a library has
FREE = {
    "config", "data_dir", "experiment", "from_parts", "output", "resume", "train_split", "val_split", "wandb_project",
}  # fmt: skip


def is_switch(action):
    return action.nargs == 0 or isinstance(action, argparse.BooleanOptionalAction)


def texts(action):
    """What the flag cannot be, as words."""
    if action.type in (int, float):
        below = [] if action.dest in NEGATIVE else ["-1", "-0.5", str(-(10**30))]
        return NUMBER + below + (WHOLE if action.type is int else [])
    if action.dest in FREE or action.dest in NAMES:
        odd = ["foo", "ü", "a b", "x" * 5000] if action.dest in NAMES | {"config", "resume"} else []
        return [t for t in TEXT if t or action.default != ""] + odd
    empty = [] if "" in (action.choices or ()) else [""]
    return [*empty, "foo", "ü", "-1", "nan", "a\nb", "x" * 300, "--"]


def lines(action):
    """Wrong command lines: a wrong value, too many of them, too few."""
    flag = action.option_strings[-1]
    if is_switch(action):
        return [[f"{flag}=1"], [f"{flag}="], [flag, "true"]]
    found = [[f"{flag}={text}"] if action.nargs in (None, "?") else [flag, text] for text in texts(action)]
    if isinstance(action.nargs, int):
        found = [[flag, *[text] * action.nargs] for text in texts(action)] + [[flag, "1"], [flag, *"1111"]]
    if action.nargs is None:
        found += [[flag], [flag, "1", "1"]]
    return found + ([[flag]] if action.nargs == "+" else [])


def values(action):
    """Wrong values in a file: other kinds, lists for one value and one for several, and the texts."""
    others = [[[1]], [None], {1: 2}, [True], [{"a": 1}]]
    if is_switch(action):
        return [*others, "yes", "false", 1, 0.0, [], [True, False], float("nan")]
    others += [True, False] + ([] if action.dest in ("model_kwargs", "opt_kwargs") else [{}])
    if action.nargs is None and action.dest not in ("grid", "views"):
        others += [[], [1], ["a", "b"]]
    if isinstance(action.nargs, int):
        others += [[1], [1] * 7, 1]
    numbers = [1.5, float("inf"), float("nan"), 2**70] if action.type is int else [float("nan"), -float("inf")]
    return others + (numbers if action.type in (int, float) else []) + texts(action)


def words(base):
    return [word for name, value in base.items() for word in ("--" + name.replace("_", "-"), str(value))]


def cases(sort, of, n):
    """Of every flag `n` cases, always the same."""
    draw = random.Random(0)
    for action in ACTIONS:
        if of is values and action.dest == "config":  # which a run's args.yaml names, and has read
            continue
        for i, case in enumerate(draw.sample(of(action), n)):
            yield pytest.param(action, case, id=f"{sort}-{action.dest}-{i}")


@pytest.fixture
def refused(tmp_path, capfd, monkeypatch):
    """Checks that a command line is refused: with one line, with nothing done and nothing left."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Run, "go", lambda self: pytest.fail("that begins to train"))
    before = set(tmp_path.iterdir())

    def check(arguments):
        kept = before | set(tmp_path.glob("*.yaml"))
        try:
            status = main(["train", *arguments])
        except SystemExit as e:
            status = e.code
        out, error = capfd.readouterr()
        assert status in (1, 2) and out == "", (status, out, error)
        assert error.startswith("timm-dd train: ") and error.endswith("\n") and len(error.splitlines()) == 1, error
        assert set(tmp_path.iterdir()) == kept

    return check


@pytest.mark.parametrize("action, given", [*cases("line", lines, 2)])
def test_a_wrong_command_line_is_one_line(action, given, refused):
    refused([*words(BASE), *given])


@pytest.mark.parametrize("action, value", [*cases("file", values, 2)])
def test_a_wrong_value_in_a_file_is_one_line(action, value, refused, tmp_path):
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({action.dest: value}), encoding="utf-8")
    base = {name: v for name, v in BASE.items() if name != action.dest}
    refused([*words(base), "-c", str(tmp_path / "c.yaml")])


def test_what_libraries_log_is_no_line_of_an_error(refused, monkeypatch):
    """timm warns of means that are not of one channel; without a handler Python prints that."""
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    refused([*words(BASE), "--in-chans", "1", "--opt", "foo"])


@pytest.mark.parametrize("given", ["name='x'", "act_layer='zz'", "seed=1", "pretrained=True", "img_size=32", "parts=3"])
def test_a_wrong_argument_of_the_model_is_one_line(given, refused):
    refused([*words(BASE), "--model-kwargs", given])


@pytest.mark.parametrize("text", TEXT[:5])
@pytest.mark.parametrize("flag", ["--from-parts", "--wandb-tags"])
def test_no_word_of_several_is_empty_or_no_text(flag, text, refused):
    refused([*words(BASE), flag, "a", text])


@pytest.mark.parametrize("given", ["--overlap 4", "--margin 2"])
def test_a_whole_image_has_neither_overlap_nor_margin(given, refused):
    refused([*words(BASE), "--grid", "full", *given.split()])
