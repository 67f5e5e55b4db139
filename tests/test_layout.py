"""The house: imports run in one direction, importing is lean, no pickle, one version string."""

import ast
import graphlib
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import tomllib

import timm_dd

ROOT = Path(__file__).parent.parent
PACKAGE = Path(timm_dd.__file__).parent
# Each imports only from those before it and from itself; those of one line do not import each other.
LAYERS = [
    {"version"},
    {"errors", "compat", "machine"},
    {"text", "images", "models", "console"},
    {"algebra"},
    {"paper_networks"},
    {"planning"},
    {"storage"},
    {"surgery"},
    {"two_level"},
    {"reports"},
    {"hub", "train", "export", "predict"},
    {"cli", ""},
]
# Inside a room, in the order of its story.
ROOMS = {
    "algebra": ["axes", "journal", "widths", "view", "domain"],
    "planning": (
        "inputs meta graphs costs modes memory outliving functions symbols surroundings training tracer witness trace "
        "shapes rules reader relations plan numbers assemble planner"
    ).split(),
    "storage": ["atomic", "tensorfile", "files", "composed", "merge_files"],
    "surgery": ["emit", "trial", "source", "vectorized", "convolutions", "packed", "parts", "merge", "claim", "split"],
    "two_level": ["aggregate", "files", "network"],
    "reports": (
        "profile claims maps verify picture record outcome draw curves boxes blocks networks features cam decisions "
        "page sections gallery make"
    ).split(),
    "train": "settings images ranks updates engines pages epochs stages rehearsal run demo __main__".split(),
    "train.settings": ["views", "flags", "config", "checks", "options"],
    "train.images": ["workers", "readable", "classes", "data", "decoded", "batched", "resident"],
    "train.ranks": ["world", "meeting", "sharing", "dealing", "cores"],
    "train.updates": (
        "capture timings clipping sums optimizers stacked trial layout metrics schedule learner abreast packs"
    ).split(),
    "train.epochs": ["checkpoints", "trackers", "progress", "loop"],
    "train.stages": (
        "written folder origins arrived initial composed momenta distill context parts joint coarse together tuned "
        "baseline summary"
    ).split(),
}


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        yield name.removesuffix("__init__").removesuffix("."), path


def imported(name, path):
    """The modules of the package that a module imports while it is itself imported."""
    package, known = name if path.name == "__init__.py" else name.rpartition(".")[0], {n for n, _ in modules()}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package.split(".")[: len(package.split(".")) - (node.level - 1)] if package else []
            base = [*filter(None, base), *filter(None, (node.module or "").split("."))]
            for alias in node.names:
                full = ".".join([*base, alias.name])
                yield full if full in known else ".".join(base)


def layer(name):
    (found,) = (i for i, rooms in enumerate(LAYERS) if name.partition(".")[0] in rooms)
    return found


def test_imports_run_in_one_direction():
    for name, path in modules():
        for other in imported(name, path):
            room, from_room = name.partition(".")[0], other.partition(".")[0]
            assert room == from_room or layer(other) < layer(name), f"{name} imports {other}"
            assert_in_order(name, other)


def assert_in_order(name, other):
    """In each room that both are in, what is imported comes first."""
    for room, order in ROOMS.items():
        if name.startswith(f"{room}.") and other.startswith(f"{room}."):
            mine, theirs = (n[len(room) + 1 :].split(".")[0] for n in (name, other))
            assert order.index(theirs) <= order.index(mine), f"{name} imports {other}"


def test_no_module_imports_itself_in_a_circle():
    known = {name: path for name, path in modules()}
    graph = {name: {o for o in imported(name, path) if o in known and o} for name, path in known.items()}
    tuple(graphlib.TopologicalSorter(graph).static_order())


def test_nothing_is_longer_than_a_person_reads():
    for _, path in modules():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
                lines = node.end_lineno - node.lineno + 1
                assert lines <= (200 if isinstance(node, ast.ClassDef) else 50), (
                    f"{path.name}: {node.name}, {lines} lines"
                )


def run(code, *arguments):
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_a_command_imports_what_it_needs(tmp_path):
    """Help needs no torch; merging files needs neither timm nor what timm needs; nothing but training needs that."""
    code = """
import sys
from timm_dd.cli import main
from timm_dd.cli import parser
parser().format_help()
print("torch" in sys.modules)
main(["merge", "-q", *sys.argv[1:]])
print("torch" in sys.modules, "timm" in sys.modules, "torchvision" in sys.modules, "huggingface_hub" in sys.modules)
import timm_dd
timm_dd.split
print("timm" in sys.modules, any("timm_dd.train" in m or "sklearn" in m for m in sys.modules))
"""
    parts, composed = ROOT / "tests" / "format-1" / "windows", tmp_path / "composed"
    found = run(code, str(parts), "-o", str(composed))
    assert found == ["False", "True", "False", "False", "False", "True", "False"]
    assert (composed / "model.safetensors").exists()


@pytest.mark.parametrize("order", ["timm, timm_dd", "timm_dd.storage.files, timm"])
def test_our_networks_are_timm_models(order):
    assert run(f"import {order}; print(timm.is_model('dd_resnet32'))") == ["True"]


def test_public_names_are_ours_whatever_was_imported_before():
    """No room has the name of a function, so that importing one hides nothing."""
    rooms = "algebra planning storage surgery reports hub train".split()
    names = "plan, split, merge, profile, verify, push"
    code = f"import {', '.join(f'timm_dd.{r}' for r in rooms)}; from timm_dd import {names}; "
    assert run(code + f"print(*map(callable, [{names}]))") == ["True"] * 6
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        timm_dd.nothing  # noqa: B018
    assert {"split", "__version__"} <= set(dir(timm_dd))


def test_type_checkers_see_what_python_gives():
    (block,) = (n for n in ast.parse((PACKAGE / "__init__.py").read_text()).body if isinstance(n, ast.If))
    assert {a.name: node.module for node in block.body for a in node.names} == timm_dd._HOMES


def test_the_api_reference_is_whole(tmp_path):
    """pdoc builds it without a warning, and each public name and method in it has words."""
    (code,) = re.findall(r'python -c "(.*?)"', (ROOT / "README.md").read_text())
    build = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(build, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    page = (tmp_path / "api" / "timm_dd.html").read_text()
    for name in timm_dd.__all__:
        value = getattr(timm_dd, name)
        assert f'id="{name}"' in page
        own = vars(value).items() if isinstance(value, type) else ()
        members = [m.__func__ if isinstance(m, (staticmethod, classmethod)) else m for k, m in own if k[0] != "_"]
        for described in [value, *(m for m in members if isinstance(m, (property, types.FunctionType)))]:
            assert isinstance(described, str) or described.__doc__, described


def test_no_pickle():
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert (node.value.id, node.attr) not in {("torch", "save"), ("torch", "load"), ("yaml", "load")}, path
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                assert "pickle" not in ast.dump(node), path


def test_one_version_string():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["dynamic"] == ["version"]
    version = [
        line
        for path in PACKAGE.rglob("*.py")
        for line in path.read_text().splitlines()
        if line.startswith("__version__ =")
    ]
    assert len(version) == 1
