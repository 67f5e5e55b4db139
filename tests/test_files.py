"""Parts and composed models on disk: round trips, and refusals that leave nothing behind."""

import hashlib
import json
import os
import random
import resource
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import timm
import torch
from conftest import Plain
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn.utils import prune

import timm_dd
from timm_dd import Domain, FileError, MergeError, Parts, TwoLevel, errors, models
from timm_dd.storage import merge_files as streaming
from timm_dd.storage import tensorfile
from timm_dd.storage.atomic import output_folder, replacing
from timm_dd.storage.files import part_name

NAME = "resnet10t"
TIMM_DD = str(Path(sys.executable).parent / "timm-dd")


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
        metadata = f.metadata()
        assert set(f.keys()) == set(parts[1].state_dict())
    expected = {"timm_dd.format": "1", "model": NAME, "part": "1", "parts": "2", "seed": "0", "epoch": "null"}
    assert expected.items() <= metadata.items()
    assert json.loads(metadata["model_args"]) == {"num_classes": 3}
    assert json.loads(metadata["domain"]) == {"kind": "Grid", "grid_shape": [1, 2], "overlap": 6, "margin": 0}
    assert (metadata["timm_dd"], metadata["timm"]) == (timm_dd.__version__, timm.__version__)
    assert metadata["plan"] == hashlib.sha256((folder / "plan.json").read_bytes()).hexdigest()


def test_seed_and_epoch_come_back(saved, tmp_path):
    parts = Parts.load(saved[0])
    assert (parts.seed, parts.epoch) == (0, None)
    parts.epoch = 7
    parts.save(tmp_path)
    assert (Parts.load(tmp_path).seed, Parts.load(tmp_path).epoch) == (0, 7)


def test_load_gives_the_parts_back(saved):
    folder, parts = saved
    again = Parts.load(folder)
    assert again.plan == parts.plan
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(again.eval()(x), parts.eval()(x))


def test_what_is_loaded_no_longer_needs_its_files(folder):
    """A copy over a part, as by cp, changes no weights in memory; a file that shrank would end the process."""
    parts, expected = Parts.load(folder), [load_file(folder / part_name(k, 2)) for k in range(2)]
    expected = [{name: t.clone() for name, t in state.items()} for state in expected]
    for k in range(2):
        with open(folder / part_name(k, 2), "r+b") as f:
            f.write(bytes((folder / part_name(k, 2)).stat().st_size))
    for part, state in zip(parts, expected):
        assert all(torch.equal(t, state[name]) for name, t in part.state_dict().items())


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
    timm_dd.merge_files(folder, tmp_path)
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
    assert config["pretrained_cfg"]["input_size"] == [3, 64, 64]


@pytest.mark.parametrize("how", ["checkpoint", "overlay", "config"])
def test_arguments_that_say_where_weights_are_are_not_of_the_plan(how, tmp_path):
    file = str(tmp_path / "model.safetensors")
    model = timm.create_model(NAME, num_classes=5, in_chans=1)
    save_file(model.state_dict(), file)
    given = {
        "checkpoint": dict(checkpoint_path=file, num_classes=5, in_chans=1, cache_dir=str(tmp_path)),
        "overlay": dict(pretrained=True, pretrained_cfg_overlay=dict(file=file, num_classes=5, input_size=(1, 64, 64))),
        "config": dict(pretrained=True, pretrained_cfg=dict(file=file, num_classes=5, input_size=(1, 64, 64))),
    }[how]
    parts = timm_dd.split(NAME, 2, **given)
    plan = timm_dd.plan(NAME, 2, **given)
    assert plan.model_args == parts.plan.model_args == {"num_classes": 5, "in_chans": 1}
    parts.save(tmp_path / "parts")
    merged = timm_dd.merge(tmp_path / "parts").state_dict()
    block, name = slice(0, 32), "layer1.0.conv1.weight"
    assert torch.equal(merged[name][block, block], model.state_dict()[name][block, block])  # not re-scaled


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
    timm_dd.merge_files(tmp_path / "parts", tmp_path / "composed")
    assert [p.name for p in (tmp_path / "composed").iterdir()] == ["model.safetensors"]
    with pytest.raises(MergeError, match="pass that module"):
        timm_dd.merge(tmp_path / "parts")


def test_filters_outside_the_state_dict_come_back(tmp_path):
    parts = timm_dd.split("resnetblur18", 2, img_size=64, num_classes=2)
    parts.save(tmp_path)
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(Parts.load(tmp_path).eval()(x), parts.eval()(x))


def test_a_config_of_another_network_does_not_stay(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    timm_dd.merge_files(folder, out)
    lie(lambda p: p.update(config=None))(folder)
    timm_dd.merge_files(folder, out)
    assert [p.name for p in out.iterdir()] == ["model.safetensors"]


def test_a_model_from_a_folder_is_split_by_its_own_name(tmp_path):
    """Whoever merges the parts need not have that folder."""
    timm_dd.merge_files(_parts(tmp_path / "first", num_classes=3), tmp_path / "composed")
    parts = timm_dd.split(f"local-dir:{tmp_path / 'composed'}", 2, pretrained=True)
    assert parts.plan.model == NAME and parts.plan.model_args["num_classes"] == 3
    expected = timm.create_model(f"local-dir:{tmp_path / 'composed'}", pretrained=True).state_dict()
    merged = timm_dd.merge(parts).state_dict()  # already block-diagonal
    assert all(torch.equal(v, merged[k]) for k, v in expected.items())


def _parts(folder, **kwargs):
    timm_dd.split(NAME, 2, seed=0, **kwargs).save(folder)
    return folder


# ---- refusals


def missing(folder):
    (folder / part_name(1, 2)).unlink()


def twice(folder):
    (folder / "1").mkdir()
    (folder / "1" / part_name(1, 2)).write_bytes((folder / part_name(1, 2)).read_bytes())


def truncated(folder):
    path = folder / part_name(1, 2)
    path.write_bytes(path.read_bytes()[:-100])


def empty(folder):
    (folder / part_name(1, 2)).write_bytes(b"")


def longer(folder):
    path = folder / part_name(1, 2)
    path.write_bytes(path.read_bytes() + b"more")


def rewrite(folder, change, k=1, sealed=True):
    """Part k as a careful liar would write it: with `change`, and sealed again."""
    path = folder / part_name(k, 2)
    with safe_open(path, "pt") as f:
        metadata = f.metadata()
    tensors = load_file(path)
    metadata.pop("xxh3_128")
    change(tensors, metadata)
    with replacing(path) as temporary:  # the tensors are a map of the file
        tensorfile.write_state(temporary, tensors, metadata, sealed)


def nan(folder):
    rewrite(folder, lambda t, m: t["fc.weight"].view(-1)[-1].fill_(float("nan")))


def infinite(folder):
    rewrite(folder, lambda t, m: t["conv1.0.weight"].view(-1)[0].fill_(-float("inf")))


def half(folder):
    rewrite(folder, lambda t, m: t.update({k: v.half() for k, v in t.items() if v.is_floating_point()}))


def unsealed(folder):
    rewrite(folder, lambda t, m: None, sealed=False)


def foreign(folder):
    with replacing(folder / part_name(1, 2)) as temporary:
        save_file(load_file(folder / part_name(1, 2)), temporary)


def newer_part(folder):
    rewrite(folder, lambda t, m: m.update({"timm_dd.format": "2"}))


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


def deep_plan(folder):
    (folder / "plan.json").write_text("[" * 100_000 + "]" * 100_000)


def lie(change):
    """A plan with `change`, and parts that swear by it."""

    def spoil(folder):
        plan = json.loads((folder / "plan.json").read_text())
        change(plan)
        (folder / "plan.json").write_text(json.dumps(plan))
        digest = hashlib.sha256((folder / "plan.json").read_bytes()).hexdigest()
        for k in range(2):
            rewrite(folder, lambda t, m: m.update(plan=digest, model=plan.get("model") or ""), k)

    return spoil


def other_plan(folder):
    plan = json.loads((folder / "plan.json").read_text())
    (folder / "plan.json").write_text(json.dumps({**plan, "layers": []}))


HUGE = 10**12
SPOILS = {
    "missing": (missing, "is missing"),
    "twice": (twice, "has part 1 twice"),
    "truncated": (truncated, "damaged"),
    "empty": (empty, "damaged"),
    "longer": (longer, "damaged"),
    "nan": (nan, "'fc.weight' is not finite"),
    "infinite": (infinite, "'conv1.0.weight' is not finite"),
    "half": (half, "one dtype"),
    "unsealed": (unsealed, "was changed"),
    "foreign": (foreign, "not written by timm_dd"),
    "newer part": (newer_part, "has format '2', timm_dd .* reads format 1"),
    "a tensor less": (a_tensor_less, "lacks 'fc.weight'"),
    "another shape": (another_shape, "has shape"),
    "exchanged": (exchanged, "its part is '1', expected '0'"),
    "another model": (another_model, "its model is 'resnet14t'"),
    "another K": (another_k, "its parts is '3', expected '2'"),
    "no plan": (no_plan, "no plan.json"),
    "broken plan": (broken_plan, "not JSON"),
    "deep plan": (deep_plan, "not JSON"),
    "changed plan": (other_plan, "its plan is"),
    "newer plan": (lie(lambda p: p.update(format=99)), "format 99"),
    "poor plan": (lie(lambda p: p["tensors"]["fc.weight"].pop("axes")), "not a whole plan"),
    "K of the plan": (lie(lambda p: p.update(parts=HUGE)), "not a whole plan"),
    "absurd K": (lie(lambda p: p.update(parts=HUGE, domain={"kind": "Full", "parts": HUGE})), "not a whole plan"),
    "absurd shape": (lie(lambda p: p["tensors"]["fc.weight"].update(shape=[HUGE, 512])), "has shape"),
    "shape": (lie(lambda p: p["tensors"]["fc.bias"].update(shape=[4])), "has shape"),
    "axis": (lie(lambda p: p["tensors"]["fc.weight"].update(axes=[None, [[256], [256]]])), "blocks that overlap"),
    "negative width": (lie(lambda p: p["tensors"]["bn1.bias"].update(axes=[[[{"width": -32}]]])), "not a whole plan"),
    "a model by path": (
        lie(lambda p: p.update(model="local-dir:/etc", config=None)),
        "unexpected model 'local-dir:/etc'",
    ),
    "another architecture": (lie(lambda p: p["config"].update(architecture="resnet50")), "a config of 'resnet50'"),
    "exact without being so": (lie(lambda p: p.update(approximations=[["n", "p", "why"]])), "exact is True, which"),
    "not exact, without a reason": (lie(lambda p: p.update(exact=False)), "exact is False, which"),
    "boxes of another image": (lie(lambda p: p["domain"].update(margin=60)), "1 boxes do not fit into 0 of the 64"),
    "axes of another image": (lie(lambda p: p.update(input_size=[3])), "has 2 axes, but the image of 3 has 1"),
    "another image": (lie(lambda p: p.update(input_size=[2, 64, 64])), "a config of images of .3, 64, 64., not of .2,"),
    "another output": (lie(lambda p: p.update(output="x")), "unexpected output 'x'"),
    "scales": (lie(lambda p: p["tensors"]["fc.weight"].update(scale=["a", "b"])), "unexpected scale"),
    "no scales": (lie(lambda p: p["tensors"]["fc.weight"].update(scale=[1, float("nan")])), "unexpected scale"),
    "trained": (lie(lambda p: p["tensors"]["fc.weight"].update(trained="no")), "unexpected trained 'no'"),
    "other classes": (lie(lambda p: p["config"].update(num_classes=7)), "a config of 7 classes for 3"),
    "layers": (lie(lambda p: p["layers"][0].__setitem__(3, [])), "unexpected layer 'conv1.0'"),
    "names of layers": (lie(lambda p: p["layers"][0].__setitem__(0, 3)), "unexpected layer 3"),
    "outputs": (lie(lambda p: p.update(outputs=[["fc", 1, [[{"width": -3}]]]])), "not a whole plan"),
    "a number as tensors": (lie(lambda p: p.update(tensors=3)), "not a whole plan"),
}


@pytest.mark.parametrize("case", SPOILS)
def test_a_spoilt_folder_is_refused_and_nothing_is_left_behind(case, folder, tmp_path_factory):
    spoil, message = SPOILS[case]
    spoil(folder)
    out = tmp_path_factory.mktemp("out")
    kept = out / "kept"
    kept.mkdir()
    (kept / "model.safetensors").write_text("as it was")
    for output in (out / "above" / "composed", kept):
        with pytest.raises(MergeError, match=message) as e:
            timm_dd.merge_files(folder, output)
        assert "\n" not in str(e.value)
    for read in (timm_dd.merge, Parts.load):
        if case != "half" or read is timm_dd.merge:
            with pytest.raises(MergeError, match=message):
                read(folder)
    assert [p.name for p in out.iterdir()] == ["kept"]
    assert [p.name for p in kept.iterdir()] == ["model.safetensors"]
    assert (kept / "model.safetensors").read_text() == "as it was"


def another_onto(change):
    def spoil(path):
        tensors = load_file(path)
        change(tensors)
        with replacing(path) as temporary:
            save_file(tensors, temporary)

    return spoil


ONTO = {
    "no file": (lambda path: path.unlink(), "no model.safetensors in"),
    "truncated": (
        lambda path: os.truncate(path, path.stat().st_size - 100),
        "truncated or damaged, copy or write this",
    ),
    "damaged": (lambda path: path.write_bytes(b"x" * 99), "truncated or damaged"),
    "not finite": (another_onto(lambda t: t["fc.bias"].fill_(float("nan"))), "'fc.bias' is not finite; take weights"),
    "a tensor less": (another_onto(lambda t: t.pop("bn1.bias")), "lacks 'bn1.bias'; it is of another architecture"),
    "a tensor more": (another_onto(lambda t: t.update(more=torch.ones(1))), "has 'more', which the plan does not know"),
    "shape": (
        another_onto(lambda t: t.update({"fc.bias": torch.ones(4)})),
        r"'fc.bias' has shape \(4,\), expected \(3,\)",
    ),
    "dtype": (
        another_onto(lambda t: t.update({"fc.bias": t["fc.bias"].half()})),
        "'fc.bias' is torch.float16, in the parts it is torch.float32; convert the model or the parts",
    ),
}


@pytest.mark.parametrize("case", ONTO)
def test_onto_what_does_not_fit(case, saved, tmp_path):
    """Neither another folder nor the model's own is changed."""
    spoil, message = ONTO[case]
    timm_dd.merge_files(saved[0], tmp_path / "onto")
    spoil(tmp_path / "onto" / "model.safetensors")
    before = {p: p.read_bytes() for p in (tmp_path / "onto").iterdir()}
    for output in (tmp_path / "new" / "composed", tmp_path / "onto"):
        with pytest.raises(MergeError, match=message) as e:
            timm_dd.merge_files(saved[0], output, onto=tmp_path / "onto")
        assert "\n" not in str(e.value)
    assert {p: p.read_bytes() for p in (tmp_path / "onto").iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["onto"]


def test_onto_a_file_that_shrinks_while_it_is_read(saved, tmp_path, monkeypatch):
    timm_dd.merge_files(saved[0], tmp_path)
    check = streaming.ModelFile.check

    def shrink(*args):
        check(*args)
        os.truncate(tmp_path / "model.safetensors", 100_000)

    monkeypatch.setattr(streaming.ModelFile, "check", shrink)
    with pytest.raises(MergeError, match="it ends at byte"):
        timm_dd.merge_files(saved[0], tmp_path / "composed", onto=tmp_path)
    assert not (tmp_path / "composed").exists()


def test_metadata_say_that_it_is_a_correction(saved, tmp_path):
    timm_dd.merge_files(saved[0], tmp_path / "zeros")
    timm_dd.merge_files(saved[0], tmp_path / "onto", onto=tmp_path / "zeros")
    found = []
    for name in ("zeros", "onto"):
        with safe_open(tmp_path / name / "model.safetensors", "pt") as f:
            found.append(f.metadata())
    assert found[1] == {**found[0], "merge": "correction"} and "merge" not in found[0]


def test_every_flipped_bit_is_noticed(folder, tmp_path_factory):
    out, path, generator = tmp_path_factory.mktemp("out"), folder / part_name(0, 2), random.Random(0)
    whole = path.read_bytes()
    header = int.from_bytes(whole[:8], "little")
    for at in [*range(0, 8 * 8, 5), *(generator.randrange(8 * (8 + header)) for _ in range(40))] + [
        generator.randrange(8 * len(whole)) for _ in range(40)
    ]:
        spoilt = bytearray(whole)
        spoilt[at // 8] ^= 1 << at % 8
        path.write_bytes(spoilt)
        with pytest.raises(MergeError):
            timm_dd.merge_files(folder, out / "composed")
    assert list(out.iterdir()) == []


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model": "os.system", "config": None}, "no model 'os.system'"),
        ({"model_args": {"checkpoint_path": "/tmp/a.pth"}}, "no argument 'checkpoint_path'"),
        ({"model_args": {"pretrained_cfg_overlay": {"url": "http://a"}}}, "no argument 'pretrained_cfg_overlay'"),
    ],
)
def test_a_plan_that_would_have_something_else_loaded(change, message, folder):
    lie(lambda p: p.update(change))(folder)
    for read in (timm_dd.merge, Parts.load):
        with pytest.raises(MergeError, match=message):
            read(folder)


@pytest.mark.parametrize("args", [{"num_classes": 4}, {"nothing": 1}])
def test_a_plan_of_another_model_is_refused(args, folder):
    """What merging from disk to disk does not need, a model in memory does."""
    lie(lambda p: p.update(model_args=args))(folder)
    with pytest.raises(MergeError, match="the plan does not fit its model|a config of 3 classes for 4"):
        timm_dd.merge(folder)


@pytest.mark.parametrize(
    "edit",
    [
        ["nothing", None, ["args", 0], [1, 2]],
        ["layer1_0_conv1", "layer1.0.conv1", ["forward"], ["x", "x"]],
        ["layer1_0_conv1", "layer1.0.conv1", ["groups"], [5, 5]],
        ["layer1_0_conv1", None, ["args", 0, "/"], ["abc", "abc"]],
    ],
)
def test_a_plan_of_other_edits_is_refused(edit, folder):
    """Merging from disk to disk does not need them; loading does."""
    lie(lambda p: p["edits"].append(edit))(folder)
    with pytest.raises(MergeError, match="does not fit its model"):
        Parts.load(folder)


def test_two_at_once_into_one_folder(saved, tmp_path):
    with output_folder(tmp_path / "composed") as aside:
        aside("model.safetensors").write_text("the first one's")
        refused = []

        def second():
            with pytest.raises(FileError, match="another process is writing into"):
                timm_dd.merge_files(saved[0], tmp_path / "composed")
            refused.append(True)

        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    assert refused == [True]
    assert (tmp_path / "composed" / "model.safetensors").read_text() == "the first one's"
    timm_dd.merge_files(saved[0], tmp_path / "composed")


@pytest.mark.slow
def test_a_full_disk(saved, tmp_path):
    """A limit on the size of files stands for the disk's; the process that has it is another one."""
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "config.json").write_text("as it was")

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))

    for output in (kept, tmp_path / "new" / "composed"):
        command = [TIMM_DD, "merge", str(saved[0]), "-o", str(output)]
        done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit)
        assert done.returncode == 1 and done.stderr.count("\n") == 1
        assert f"cannot write to {output}: File too large" in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["kept"]
    assert [p.name for p in kept.iterdir()] == ["config.json"] and (kept / "config.json").read_text() == "as it was"


def test_merging_takes_little_memory_whatever_the_model_takes(tmp_path):
    """48 MB of parts become 192 MB, the largest tensor of them 64 MB; then onto what they became."""
    model = torch.nn.Sequential(*(torch.nn.Linear(4096, 4096, bias=False) for _ in range(3)))
    timm_dd.split(model, 4, example_input=torch.empty(1, 4096)).save(tmp_path / "parts")
    del model
    for onto in (None, tmp_path / "composed"):
        with open("/proc/self/clear_refs", "w") as f:
            f.write("5")  # the peak is what is used now
        before = _status("VmRSS")
        timm_dd.merge_files(tmp_path / "parts", tmp_path / "composed", onto=onto)
        assert (tmp_path / "composed" / "model.safetensors").stat().st_size > 3 * 64 * 2**20
        assert _status("VmHWM") - before < 24 * 1024


def _status(key):
    """In kB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(key)))


def test_what_a_killed_merge_left_is_removed_by_the_next(saved, tmp_path):
    """And nothing that somebody else keeps beside them."""
    theirs = [".config.json.bak", ".model.safetensors.sha256"]
    for name in (".model.safetensors.0123abcd", *theirs):
        (tmp_path / name).write_bytes(b"half")
    timm_dd.merge_files(saved[0], tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [*theirs, "config.json", "model.safetensors"]


def test_a_part_that_shrinks_while_it_is_read(folder, monkeypatch):
    """Between the look at its header and the reading of its tensors."""
    common = streaming.common_dtypes

    def shrink(dtypes):
        os.truncate(folder / part_name(1, 2), 100_000)
        return common(dtypes)

    monkeypatch.setattr(streaming, "common_dtypes", shrink)
    with pytest.raises(MergeError, match="it ends at byte"):
        timm_dd.merge_files(folder, folder / "composed")


def test_a_dtype_that_has_no_name(tmp_path):
    parts = timm_dd.split(torch.nn.Linear(4, 4), 2, example_input=torch.empty(1, 4))
    with pytest.raises(FileError, match="weight is torch.float8_e4m3fn, expected one of"):
        parts.to(torch.float8_e4m3fn).save(tmp_path / "parts")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["plan.json", part_name(0, 2), part_name(1, 2), "config.json", "model.safetensors"])
def test_a_folder_in_the_place_of_a_file(name, saved, tmp_path):
    """No file takes its place if one cannot."""
    writes = timm_dd.merge_files if name in ("config.json", "model.safetensors") else lambda _, out: saved[1].save(out)
    (tmp_path / name).mkdir()
    files = {other: "as it was" for other in ("model.safetensors", "config.json", part_name(0, 2)) if other != name}
    for other, text in files.items():
        (tmp_path / other).write_text(text)
    with pytest.raises(FileError, match=f"cannot write to {tmp_path / name}: it is a folder; choose another"):
        writes(saved[0], tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {name, *files}
    assert {other: (tmp_path / other).read_text() for other in files} == files


def test_parts_where_a_run_has_left_them(folder):
    """Two of each would be a folder that nothing reads."""
    (folder / "1").mkdir()
    (folder / part_name(1, 2)).rename(folder / "1" / part_name(1, 2))
    before = {p: p.read_bytes() for p in folder.rglob("*.*")}
    parts = Parts.load(folder)
    with pytest.raises(FileError, match=f"{folder}/1/{part_name(1, 2)} is part 1 already; choose another folder"):
        parts.save(folder)
    assert {p: p.read_bytes() for p in folder.rglob("*.*")} == before


def compiled(parts):
    parts[1] = torch.compile(parts[1])


def data_parallel(parts):
    parts[1] = torch.nn.DataParallel(parts[1])


def pruned(parts):
    prune.random_unstructured(parts[1].fc, "weight", 0.5)


def another_head(parts):
    parts[1].fc = torch.nn.Linear(parts[1].fc.in_features, 7)


@pytest.mark.parametrize("change", [compiled, data_parallel, pruned, another_head])
def test_parts_that_could_not_be_read_again(change, saved, tmp_path):
    parts = Parts.load(saved[0])
    two = TwoLevel(parts, "mean")
    change(parts)
    for save in (parts.save, two.save):
        with pytest.raises(MergeError, match=r"part 1:? .*; wrap parts \(torch.compile, DataParallel\) outside"):
            save(tmp_path / "again")
    assert list(tmp_path.iterdir()) == []


def test_parts_without_values(saved, tmp_path):
    with pytest.raises(FileError, match="is on the meta device, without values"):
        Parts.load(saved[0]).to("meta").save(tmp_path / "again")
    assert list(tmp_path.iterdir()) == []


def test_a_header_with_more_than_the_library_reads(folder, tmp_path_factory):
    """What safetensors passes over is passed over."""
    path = folder / part_name(1, 2)
    size = int.from_bytes(path.read_bytes()[:8], "little")
    header, data = json.loads(path.read_bytes()[8 : 8 + size]), path.read_bytes()[8 + size :]
    header["fc.bias"]["more"] = 1
    header["__metadata__"]["xxh3_128"] = tensorfile.UNSEALED
    text = json.dumps(header).encode()
    whole = len(text).to_bytes(8, "little") + text + data
    digest = tensorfile.xxhash.xxh3_128(whole).hexdigest().encode()
    path.write_bytes(whole.replace(tensorfile.UNSEALED.encode(), digest, 1))
    assert load_file(path)["fc.bias"].shape == (3,)
    timm_dd.merge_files(folder, tmp_path_factory.mktemp("out"))


NO_PATHS = [3, None, b"x", "a\0b", "\ud800"]


@pytest.mark.parametrize("path", NO_PATHS, ids=ascii)
def test_what_is_no_path(path, saved, tmp_path):
    folder, parts = saved
    for write in (parts.save, TwoLevel(parts, "mean").save, lambda p: timm_dd.merge_files(folder, p)):
        with pytest.raises(FileError, match="expected the path of a folder, got"):
            write(path)
    for read in (timm_dd.merge, Parts.load, TwoLevel.load, lambda p: timm_dd.merge_files(p, tmp_path / "out")):
        with pytest.raises(MergeError, match="expected the"):
            read(path)
    if path is not None:
        with pytest.raises(MergeError, match="expected the path of a folder, got"):
            timm_dd.merge_files(folder, tmp_path / "out", onto=path)
    assert list(tmp_path.iterdir()) == []


def test_an_output_on_the_hub(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for write in (saved[1].save, lambda p: timm_dd.merge_files(saved[0], p)):
        with pytest.raises(FileError, match="user/out is on the Hub; write into a folder on this machine"):
            write("hf-hub:user/out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
@pytest.mark.parametrize("name", [part_name(1, 2), "plan.json", "."])
def test_what_may_not_be_read(name, folder):
    """Is not damaged, and not missing."""
    mode = (folder / name).stat().st_mode
    (folder / name).chmod(0)
    try:
        for read in (timm_dd.merge, Parts.load, lambda p: Parts.load(p, missing="drop")):
            with pytest.raises(MergeError, match=r"cannot be read \(Permission denied\); make it readable"):
                read(folder)
        if name == ".":
            for read in (TwoLevel.load, lambda p: models.of_run(Path(p))):
                with pytest.raises(MergeError, match=r"cannot be read \(Permission denied\); make it readable"):
                    read(folder)
    finally:
        (folder / name).chmod(mode)


def test_a_name_that_is_too_long(saved, tmp_path):
    long = "x" * 5000
    for read in (timm_dd.merge, TwoLevel.load, lambda p: timm_dd.merge_files(saved[0], tmp_path / "out", onto=p)):
        with pytest.raises(MergeError, match=r"cannot be read \(File name too long\)"):
            read(long)


def test_another_word_for_missing(saved):
    with pytest.raises(MergeError, match="missing: expected refuse or drop, got 'nonsense'"):
        Parts.load(saved[0], missing="nonsense")


def test_a_link_to_a_folder_in_the_place_of_a_file(tmp_path):
    """Is replaced: what it stands for stays."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder")
    with replacing(tmp_path / "link") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "link").read_text() == "new" and (tmp_path / "folder").is_dir()


def test_an_output_below_a_file_is_refused(saved, tmp_path):
    (tmp_path / "file").write_text("")
    for call in (lambda p: timm_dd.merge_files(saved[0], p), saved[1].save):
        with pytest.raises(FileError, match="cannot write"):
            call(tmp_path / "file" / "out")


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_an_unwritable_folder_is_refused(saved, tmp_path):
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    with pytest.raises(FileError, match="cannot write"):
        saved[1].save(tmp_path / "parts")


def test_a_folder_that_nobody_can_make(saved):
    with pytest.raises(FileError, match="cannot write to /proc/composed"):
        timm_dd.merge_files(saved[0], "/proc/composed")


def test_a_file_that_nobody_can_write():
    with pytest.raises(FileError, match="cannot write to /proc/nowhere/plan.json: No such file or directory"):
        with replacing(Path("/proc/nowhere/plan.json")) as temporary:
            temporary.write_text("{}")


def test_arguments_that_json_has_no_form_for(tmp_path):
    parts = timm_dd.split(NAME, 2, act_layer=torch.nn.ReLU, img_size=64)
    with pytest.raises(FileError, match="only numbers, texts and lists can be written"):
        parts.save(tmp_path / "parts")
    assert list(tmp_path.iterdir()) == []


def test_all_that_is_raised_has_one_base():
    ours = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)}
    assert {name for name in ours if not issubclass(getattr(errors, name), timm_dd.TimmDDError)} == {"WidthError"}
    assert ours - {"WidthError"} <= set(timm_dd.__all__) and issubclass(timm_dd.TimmDDError, ValueError)
    assert not issubclass(MergeError, FileError) and not issubclass(FileError, MergeError)


def test_a_folder_of_two_levels_takes_no_model(saved, tmp_path):
    """What reads it would not see the model."""
    timm_dd.TwoLevel(saved[1], "mean").save(tmp_path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(FileError, match="holds a two-level network"):
        timm_dd.merge_files(saved[0], tmp_path)
    assert sorted(tmp_path.iterdir()) == before


def test_an_output_on_the_hub_is_no_folder(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileError, match="hf-hub:user/out is on the Hub"):
        timm_dd.merge_files(saved[0], "hf-hub:user/out")
    assert list(tmp_path.iterdir()) == []


def test_no_folder(tmp_path):
    with pytest.raises(MergeError, match=r"no plan.json in"):
        timm_dd.merge(tmp_path / "nowhere")
