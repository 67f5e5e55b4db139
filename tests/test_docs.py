"""docs/architecture.md against the code: the rooms' modules are named, and the two walks are those that calls take."""

import functools
import importlib
import inspect
import pkgutil
import re
import runpy
import shlex
import sys
import warnings
from pathlib import Path

import pytest
from PIL import Image
from test_rules import ROWS

import timm_dd
from timm_dd.train.run import train
from timm_dd.train.settings import options

PACKAGE = Path(timm_dd.__file__).parent
PAGE = (Path(__file__).parent.parent / "docs" / "architecture.md").read_text()
ORDER = [
    "algebra",
    "planning",
    "storage",
    "surgery",
    "reports",
    "train",
]  # of imports; the other rooms are on neither walk
HANDED_DOWN = {"rows"}  # given to the merge, which asks for rows of the parts' tensors
TRAIN = (
    "--dataset digits --model resnet10t --parts 2 --train-num-samples 8 --val-num-samples 8 -j 0 -b 4 --part-epochs 1 "
    "--epochs 1 --warmup-epochs 0 --engine sequential --device cpu --output"
)


def walk_table(title):
    """The walk's rooms in the page's order, with the functions on the way."""
    rows = PAGE.partition(f"{title}\n\n")[2].partition("\n\n")[0].splitlines()[2:]
    found = [(room, re.findall(r"`([\w.]+)`", way)) for room, way in (row.split(" | ")[:2] for row in rows)]
    return [(re.findall(r"`(\w+)`", room)[0], functions) for room, functions in found]


class Walk:
    """What calls enter, in order: ``rooms``, ``functions`` as in the page's tables, and ``upwards``, calls from a room
    to a later one that were not handed down."""

    def __init__(self):
        self.rooms, self.functions, self.upwards = {}, set(), set()

    def __call__(self, frame, event, _):
        here = place(frame.f_code.co_filename) if event == "call" else None
        if here is None or not frame.f_code.co_flags & inspect.CO_OPTIMIZED:  # a class body
            return
        room, module = here
        name, owner = frame.f_code.co_name, type(frame.f_locals.get("self")).__name__
        self.rooms.setdefault(room)
        self.functions |= {f"{module}.{name}", f"{module}.{owner}", f"{module}.{owner}.{name}"}
        caller = frame.f_back
        while caller is not None and place(caller.f_code.co_filename) is None:
            caller = caller.f_back
        if caller is None or name in HANDED_DOWN:
            return
        from_room, from_module = place(caller.f_code.co_filename)
        if ORDER.index(from_room) < ORDER.index(room):
            self.upwards.add((from_room, from_module, caller.f_code.co_name, room, module, name))


@functools.cache
def place(filename):
    """(room, module) of a file, None outside the rooms."""
    if not filename.startswith(str(PACKAGE)):
        return None
    room, *rest = Path(filename).relative_to(PACKAGE).with_suffix("").parts
    return (room, rest[-1]) if rest else None


def walk(function, *args):
    for module in pkgutil.walk_packages([str(PACKAGE)], "timm_dd."):
        importlib.import_module(module.name)  # so that what runs while a module is imported is no part of the walk
    found = Walk()
    before = sys.getprofile()
    sys.setprofile(found)
    try:
        function(*args)
    finally:
        sys.setprofile(before)
    return found


def check(found, title):
    rows = walk_table(title)
    rooms = list(dict.fromkeys(room for room, _ in rows))
    assert list(found.rooms) == rooms
    functions = {function for _, way in rows for function in way}
    assert functions and functions - found.functions == set()
    assert found.upwards == set()


def test_the_walk_of_split():
    check(walk(timm_dd.split, "resnet10t", 2), '`timm_dd.split("resnet50", 4)`:')


@pytest.mark.slow
def test_the_walk_of_training(tmp_path):
    argv = [*shlex.split(TRAIN), str(tmp_path)]
    check(walk(lambda: train(options.parse(argv))), "`python -m timm_dd.train --model resnet50 --parts 4 …`:")


def test_every_module_is_named():
    """In the row of its room, or beside the rooms."""
    house = PAGE.partition("## The house")[2].partition("\n## ")[0]
    rows = dict(re.findall(r"^\| `([\w/]+)` \| [^|]* \| ([^|]*) \|$", house, re.M))
    beside = house.partition("Beside the rooms:")[2].partition("\n\n")[0]
    for path in PACKAGE.rglob("*.py"):
        name = path.relative_to(PACKAGE).with_suffix("").as_posix()
        if path.name.startswith("__"):
            continue
        room = max((r for r in rows if name.startswith(f"{r}/")), key=len, default=None)
        module = name.removeprefix(f"{room}/").split("/")[0]
        assert f"`{module}`" in (rows[room] if room else beside), path
    rooms = {p.parent.name for p in PACKAGE.glob("*/__init__.py")}
    assert set(rows) == rooms | {f"train/{p.parent.name}" for p in PACKAGE.glob("train/*/__init__.py")}


@pytest.mark.slow
def test_the_table_of_what_is_exact_is_that_of_the_rows():
    """`python docs/exactness.py` writes it."""
    folder = Path(__file__).parent.parent / "docs"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore")
        assert runpy.run_path(str(folder / "exactness.py"))["table"](ROWS) == (folder / "exactness.md").read_text()


def test_the_picture_is_drawn(tmp_path):
    """By its script; the one in the README is small enough for a page."""
    pytest.importorskip("matplotlib")
    folder = Path(__file__).parent.parent / "docs"
    runpy.run_path(str(folder / "picture.py"))["main"](tmp_path / "method.svg")
    drawn, shown = (tmp_path / "method.svg").read_text(), (folder / "method.svg").read_text()
    assert drawn.count('id="patch_') == shown.count('id="patch_') > 100 and len(shown) < 150_000


@pytest.mark.slow
def test_the_picture_of_a_report_is_drawn(one, tmp_path):
    """By its script, of any run; the demo's in the README is small enough for a page."""
    pytest.importorskip("matplotlib")
    folder = Path(__file__).parent.parent / "docs"
    runpy.run_path(str(folder / "report.py"))["draw"](one, tmp_path / "report.png")
    drawn, shown = (Image.open(path / "report.png").convert("RGB") for path in (tmp_path, folder))
    assert drawn.width == shown.width and len(drawn.getcolors(1 << 24)) > 1000
    assert (folder / "report.png").stat().st_size < 300_000
