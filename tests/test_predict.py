"""Images are named by a run, a composed model and a two-level network, with the probabilities of the network itself."""

import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits

import timm_dd
from timm_dd.cli import main
from timm_dd.errors import FileError, MergeError
from timm_dd.export import export
from timm_dd.predict import Classifier
from timm_dd.storage.composed import read_config

NAMES = ["apple", "pear", "fig"]


@pytest.fixture
def image(tmp_path):
    """A scanned digit, at an odd size."""
    path = tmp_path / "digit.png"
    Image.fromarray((load_digits().images[3] * 15).astype("uint8")).resize((41, 37)).save(path)
    return path


def composed(folder, names=None):
    """A composed model of three classes."""
    parts = timm_dd.split("test_resnet", 2, num_classes=3, img_size=32, seed=0)
    parts.save(folder / "parts")
    timm_dd.merge_files(folder / "parts", folder / "composed")
    path = folder / "composed" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config if names is None else {**config, "label_names": names}))
    return parts, folder / "composed"


def prepared(path):
    """An image of the size and statistics of the networks here, by stock timm."""
    data = timm.data.resolve_data_config(pretrained_cfg={**timm.get_pretrained_cfg("test_resnet").to_dict()})
    transform = timm.data.create_transform(**{**data, "input_size": (3, 32, 32)})
    return transform(Image.open(path).convert("RGB"))[None]


def as_timm(folder, path):
    """Probabilities of the classes, by stock timm alone."""
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    with torch.no_grad():
        return model(transform(Image.open(path).convert("RGB"))[None]).softmax(1)[0].tolist()


@pytest.mark.parametrize("names", [NAMES, {"0": "apple", "1": "pear", "2": "fig"}, None])
def test_a_composed_model(names, image, tmp_path, capsys):
    _, folder = composed(tmp_path, names)
    expected = dict(zip(NAMES if names else "012", as_timm(folder, image)))
    capsys.readouterr()
    assert main(["predict", str(folder), str(image), str(image), "--json", "--top", "2"]) == 0
    first, second = json.loads(capsys.readouterr().out)
    assert first == second and first["image"] == str(image)
    best = sorted(expected, key=expected.get, reverse=True)[:2]
    assert [c["name"] for c in first["classes"]] == best
    assert [c["probability"] for c in first["classes"]] == pytest.approx([expected[n] for n in best], abs=1e-6)
    assert main(["predict", str(folder), str(image)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(image) and len(lines) == 4
    assert lines[1].split() == [f"{100 * expected[best[0]]:.2f}", "%", best[0]]


@pytest.mark.parametrize("how", ["mean", "vote", "sum"])
def test_a_two_level_network(how, image, tmp_path):
    parts, _ = composed(tmp_path)
    timm_dd.TwoLevel(parts, how, class_names=NAMES).save(tmp_path / "two")
    two = timm_dd.TwoLevel.load(tmp_path / "two").eval()
    with torch.no_grad():
        scores = two(prepared(image))[0]
    expected = scores.softmax(0) if how == "sum" else scores
    (found,) = Classifier.load(str(tmp_path / "two")).predict([image])
    assert sum(p for _, p in found) == pytest.approx(1) and len(found) == 3
    if how == "sum":  # of the others, which are far apart or not, the order is that of the scores
        assert dict(found) == pytest.approx(dict(zip(NAMES, expected.tolist())), abs=1e-5)
    assert found[0][0] == NAMES[int(expected.argmax())]


def test_a_run_names_its_classes(one, image, tmp_path, capsys):
    """The model after the best epoch, as it is named, pushed and known."""
    config = json.loads((one / "global" / "best" / "config.json").read_text())
    assert config["label_names"] == list("0123456789") == json.loads((one / "summary.json").read_text())["class_names"]
    assert json.loads((one / "composed" / "config.json").read_text())["label_names"] == list("0123456789")
    capsys.readouterr()
    assert main(["predict", str(one), str(image), "--json", "--top", "10"]) == 0
    found = {c["name"]: c["probability"] for c in json.loads(capsys.readouterr().out)[0]["classes"]}
    expected = as_timm(one / "global" / "best", image)
    assert [found[str(i)] for i in range(10)] == pytest.approx(expected, abs=1e-6)
    assert main(["push", str(one), "user/digits", "--dry-run", str(tmp_path / "dry")]) == 0
    assert f"{one / 'global' / 'best'}: the run's model after its best epoch" in capsys.readouterr().out
    pushed, kept = (folder / "model.safetensors" for folder in (tmp_path / "dry", one / "global" / "best"))
    assert pushed.read_bytes() == kept.read_bytes()
    assert "Classes: 0, 1, 2, 3" in (tmp_path / "dry" / "README.md").read_text()


@pytest.mark.parametrize("how", ["mean", "vote", "sum", "composed"])
def test_one_class_is_told_by_its_sigmoid(how, image, tmp_path):
    parts = timm_dd.split("test_resnet", 2, num_classes=1, img_size=32, seed=0)
    (timm_dd.merge(parts) if how == "composed" else timm_dd.TwoLevel(parts, how)).eval()
    if how == "composed":
        parts.save(tmp_path / "parts")
        timm_dd.merge_files(tmp_path / "parts", tmp_path / "two")
    else:
        timm_dd.TwoLevel(parts, how).save(tmp_path / "two")
    ((found,),) = Classifier.load(str(tmp_path / "two")).predict([image])
    x = prepared(image)
    with torch.no_grad():
        whole, own = timm_dd.merge(parts).eval()(x), [part.eval()(crop) for part, crop in zip(parts, parts.crops(x))]
    p = torch.cat(own).sigmoid()
    votes = ((p > 0.5).sum() + p.sum() / 3) * 3 / 8  # of two parts, and of what they sum to a third
    expected = {"mean": p.mean(), "vote": votes, "sum": sum(own).sigmoid(), "composed": whole.sigmoid()}[how]
    assert found == ("0", pytest.approx(float(expected), abs=1e-5))


def test_what_tells_no_classes_is_said(image, tmp_path):
    for name, given in (("features", {"num_classes": 0}), ("regression", {"num_classes": 3})):
        parts = timm_dd.split("test_resnet", 2, img_size=32, **given)
        if name == "regression":
            timm_dd.TwoLevel(parts, "mean", regression=True).save(tmp_path / name)
        else:
            parts.save(tmp_path / "parts")
            timm_dd.merge_files(tmp_path / "parts", tmp_path / name)
        with pytest.raises(MergeError, match=f"{name} gives numbers, .*; expected a network that tells classes"):
            Classifier.load(str(tmp_path / name))
    _, folder = composed(tmp_path / "other", NAMES[:2])
    with pytest.raises(MergeError, match="has 2 label_names for 3 classes; mend its config.json"):
        Classifier.load(str(folder))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_parts_in_another_dtype_are_shown_float32(dtype, image, tmp_path):
    parts, _ = composed(tmp_path)
    timm_dd.TwoLevel(parts.to(dtype), "sum").save(tmp_path / "two")
    (found,) = Classifier.load(str(tmp_path / "two")).predict([image])
    x = prepared(image)
    with torch.no_grad():
        own = [part.float().eval()(crop) for part, crop in zip(parts, parts.crops(x))]
    assert dict(found) == pytest.approx(dict(zip("012", sum(own)[0].softmax(0).tolist())), abs=1e-6)


ODD = [
    ("label_names", 5), ("label_names", "abc"), ("label_names", [["a"], None, 3]), ("mean", "x"), ("mean", [0.5]),
    ("std", [0, 0, 0]), ("crop_pct", -1), ("crop_pct", 1e-300), ("interpolation", "x"), ("input_size", [3, 0, 0]),
    ("input_size", [3]), ("input_size", [3, 10**6, 10**6]),
]  # fmt: skip


@pytest.mark.parametrize("key, value", ODD, ids=str)
def test_a_damaged_config_is_one_error_for_all(key, value, image, tmp_path):
    _, folder = composed(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (config if key == "label_names" else config["pretrained_cfg"])[key] = value
    (folder / "config.json").write_text(json.dumps(config))
    for read in (Classifier.load, lambda place: export(place, tmp_path / "x.pt2"), lambda place: read_config(folder)):
        with pytest.raises(MergeError, match=f"is damaged .*{key}|no model of timm|no network in"):
            read(str(folder))


def test_what_is_not_finite_is_said(image, tmp_path):
    _, folder = composed(tmp_path)
    state = load_file(folder / "model.safetensors")
    state["fc.bias"][0] = float("nan")
    save_file({name: t.clone() for name, t in state.items()}, folder / "model.safetensors")
    with pytest.raises(MergeError, match="scores of .*digit.png are not finite"):
        list(Classifier.load(str(folder)).predict([image]))


def test_a_name_is_one_line(image, tmp_path, capsys):
    _, folder = composed(tmp_path, ["a\nb", "\u202ec", "Größe"])
    capsys.readouterr()
    assert main(["predict", str(folder), str(image)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[-1] for line in lines[1:]} == {r"a\nb", r"\u202ec", "Größe"} and len(lines) == 4


def test_what_would_be_cut_off_is_an_error(tmp_path):
    """As in training."""
    _, folder = composed(tmp_path)
    Image.fromarray(np.full((32, 32), 300, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(FileError, match="deep.png is not an image .*cuts off at 255"):
        list(Classifier.load(str(folder)).predict([tmp_path / "deep.png"]))


def test_what_is_no_image_is_named(tmp_path, capsys):
    _, folder = composed(tmp_path)
    (tmp_path / "x.png").write_bytes(b"nothing")
    for name in ("x.png", "nothing.png", "."):
        with pytest.raises(FileError, match=f"{tmp_path / name}.* is not an image"):
            list(Classifier.load(str(folder)).predict([tmp_path / name]))
    capsys.readouterr()
    assert main(["predict", str(folder), str(tmp_path / "x.png")]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_what_is_no_network_is_said(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "args.yaml").write_text("")
    for name, why in (
        ("nothing", "no network in"),
        (".", "no network in"),
        ("run", "has no model yet"),
        ("x" * 300, "cannot be read"),
    ):
        with pytest.raises(MergeError, match=why):
            Classifier.load(str(tmp_path / name))
    for top in ("0", "-1", "x"):
        with pytest.raises(SystemExit):
            main(["predict", "x", "y", "--top", top])
        assert "from 1 up" in capsys.readouterr().err
