"""Parts and composed models on disk: round trips, and refusals that leave nothing behind."""

import json
import os
import stat

import pytest
import timm
import torch
from conftest import Plain
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import timm_dd
from timm_dd import Domain, MergeError, Parts
from timm_dd.files import part_name

NAME = "resnet10t"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    parts = timm_dd.split(NAME, 2, seed=0, num_classes=3, img_size=64, domain=Domain.grid(1, 2, overlap=6))
    parts.save(folder)
    return folder, parts


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of the saved parts to spoil."""
    for path in saved[0].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def test_what_a_folder_holds(saved):
    folder, parts = saved
    assert sorted(p.name for p in folder.iterdir()) == [
        "part-00000-of-00002.safetensors",
        "part-00001-of-00002.safetensors",
        "plan.json",
    ]
    with safe_open(folder / part_name(1, 2), "pt") as f:
        assert f.metadata()["part"] == "1" and f.metadata()["model"] == NAME
        assert set(f.keys()) == set(parts[1].state_dict())


def test_load_gives_the_parts_back(saved):
    folder, parts = saved
    again = Parts.load(folder)
    assert again.plan == parts.plan
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(again.eval()(x), parts.eval()(x))


def test_the_same_parts_are_the_same_bytes(saved, tmp_path):
    folder, parts = saved
    parts.save(tmp_path / "again")
    for path in folder.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def test_merge_from_disk_is_merge_in_memory(saved, tmp_path):
    folder, parts = saved
    expected = timm_dd.merge(parts).state_dict()
    timm_dd.merge_files(folder, tmp_path / "composed")
    stored = load_file(tmp_path / "composed" / "model.safetensors")
    for state in (timm_dd.merge(folder).state_dict(), stored):
        assert state.keys() == expected.keys()
        assert all(torch.equal(v, expected[k]) for k, v in state.items())


def test_stock_timm_loads_the_composed_model(saved, tmp_path):
    folder, parts = saved
    timm_dd.merge_files(folder, tmp_path, data={"mean": (0.1, 0.2, 0.3)})
    x = torch.randn(2, 3, 64, 64)
    expected = timm_dd.merge(parts).eval()(x)
    overlay = dict(file=str(tmp_path / "model.safetensors"), num_classes=3)
    for model in (
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True),
        timm.create_model(NAME, pretrained=True, num_classes=3, pretrained_cfg_overlay=overlay),
    ):
        assert torch.equal(model.eval()(x), expected)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architecture"] == NAME and config["num_classes"] == 3
    assert config["pretrained_cfg"]["input_size"] == [3, 64, 64] and config["pretrained_cfg"]["mean"] == [0.1, 0.2, 0.3]


def test_parts_that_give_features(tmp_path):
    parts = timm_dd.split("resnet10t", 2, features_only=True, img_size=64)
    parts.save(tmp_path / "parts")
    timm_dd.merge_files(tmp_path / "parts", tmp_path / "composed")
    assert [p.name for p in (tmp_path / "composed").iterdir()] == ["model.safetensors"]
    model = timm.create_model("resnet10t", features_only=True)
    model.load_state_dict(load_file(tmp_path / "composed" / "model.safetensors"))
    x = torch.randn(1, 3, 64, 64)
    for a, b in zip(model.eval()(x), timm_dd.merge(parts).eval()(x)):
        assert torch.equal(a, b)


def test_parts_of_a_module(tmp_path):
    model, x = Plain(width=8).double(), torch.randn(1, 3, 16, 16, dtype=torch.float64)
    parts = timm_dd.split(model, 2, example_input=x)
    parts.save(tmp_path / "parts")
    assert torch.equal(Parts.load(tmp_path / "parts", model=model)(x), parts(x))
    assert torch.equal(timm_dd.merge(tmp_path / "parts", model=model)(x), timm_dd.merge(parts)(x))
    timm_dd.merge_files(tmp_path / "parts", tmp_path / "composed", model=model)
    assert [p.name for p in (tmp_path / "composed").iterdir()] == ["model.safetensors"]
    with pytest.raises(MergeError, match="pass that module"):
        timm_dd.merge(tmp_path / "parts")


def test_filters_outside_the_state_dict_come_back(tmp_path):
    parts = timm_dd.split("resnetblur18", 2, img_size=64, num_classes=2)
    parts.save(tmp_path)
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(Parts.load(tmp_path).eval()(x), parts.eval()(x))


# ---- refusals


def missing(folder):
    (folder / part_name(1, 2)).unlink()


def truncated(folder):
    path = folder / part_name(1, 2)
    path.write_bytes(path.read_bytes()[:-100])


def empty(folder):
    (folder / part_name(1, 2)).write_bytes(b"")


def rewrite(folder, change, k=1):
    path = folder / part_name(k, 2)
    with safe_open(path, "pt") as f:
        metadata = f.metadata()
    tensors = load_file(path)
    change(tensors, metadata)
    save_file(tensors, path, metadata)


def nan(folder):
    rewrite(folder, lambda t, m: t["fc.weight"].fill_(float("nan")))


def half(folder):
    rewrite(folder, lambda t, m: t.update({k: v.half() for k, v in t.items() if v.is_floating_point()}))


def a_tensor_less(folder):
    rewrite(folder, lambda t, m: t.pop("fc.weight"))


def another_shape(folder):
    rewrite(folder, lambda t, m: t.update({"fc.weight": torch.zeros(3, 5)}))


def exchanged(folder):
    a, b = (folder / part_name(k, 2) for k in range(2))
    first = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(first)


def another_model(folder):
    timm_dd.split("resnet14t", 2, num_classes=3, img_size=64).save(folder / "other")
    (folder / part_name(1, 2)).write_bytes((folder / "other" / part_name(1, 2)).read_bytes())


def another_k(folder):
    timm_dd.split(NAME, 3, num_classes=3, img_size=64).save(folder / "other")
    (folder / part_name(1, 2)).write_bytes((folder / "other" / part_name(1, 3)).read_bytes())


def no_plan(folder):
    (folder / "plan.json").unlink()


def broken_plan(folder):
    (folder / "plan.json").write_text("{")


def newer_plan(folder):
    plan = json.loads((folder / "plan.json").read_text())
    (folder / "plan.json").write_text(json.dumps({**plan, "format": 99}))


def poor_plan(folder):
    plan = json.loads((folder / "plan.json").read_text())
    del plan["tensors"]["fc.weight"]["axes"]
    (folder / "plan.json").write_text(json.dumps(plan))


SPOILS = {
    missing: "is missing",
    truncated: "damaged",
    empty: "damaged",
    nan: "not finite",
    half: "one dtype",
    a_tensor_less: "lacks fc.weight",
    another_shape: "has shape",
    exchanged: "another split",
    another_model: "another split",
    another_k: "another split",
    no_plan: "no plan.json",
    broken_plan: "not JSON",
    newer_plan: "format 99",
    poor_plan: "not a whole plan",
}


@pytest.mark.parametrize("spoil", SPOILS, ids=lambda f: f.__name__)
def test_a_spoilt_folder_is_refused_and_nothing_is_left_behind(spoil, folder, tmp_path_factory):
    spoil(folder)
    out = tmp_path_factory.mktemp("out")
    kept = out / "kept"
    kept.mkdir()
    (kept / "model.safetensors").write_text("as it was")
    for output in (out / "composed", kept):
        with pytest.raises(MergeError, match=SPOILS[spoil]) as e:
            timm_dd.merge_files(folder, output)
        assert "\n" not in str(e.value)
    with pytest.raises(MergeError, match=SPOILS[spoil]):
        timm_dd.merge(folder)
    assert [p.name for p in out.iterdir()] == ["kept"]
    assert [p.name for p in kept.iterdir()] == ["model.safetensors"]
    assert (kept / "model.safetensors").read_text() == "as it was"


def test_an_output_below_a_file_is_refused(saved, tmp_path):
    (tmp_path / "file").write_text("")
    for call in (lambda p: timm_dd.merge_files(saved[0], p), saved[1].save):
        with pytest.raises(MergeError, match="cannot write"):
            call(tmp_path / "file" / "out")


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_an_unwritable_folder_is_refused(saved, tmp_path):
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    with pytest.raises(MergeError, match="cannot write"):
        saved[1].save(tmp_path / "parts")


def test_no_folder(tmp_path):
    with pytest.raises(MergeError, match=r"no plan.json in"):
        timm_dd.merge(tmp_path / "nowhere")
