"""Pushing to a Hub on loopback, and what comes back from it: to stock timm, and to `merge`."""

import functools
import hashlib
import importlib.util
import itertools
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
import yaml
from conftest import RUN
from huggingface_hub import HfApi, ModelCard, lfs
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import timm_dd
from timm_dd import FileError, MergeError, Parts, PushError, ReportError
from timm_dd.cli import main
from timm_dd.hub.push import write_repository
from timm_dd.predict import Classifier
from timm_dd.reports.record import read_summary
from timm_dd.train.run import Run
from timm_dd.train.settings import options

# huggingface_hub gives httpx the file of an LFS upload as data=, which httpx calls deprecated
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

REPO = "user/model"
CARDS = Path(__file__).parent.parent / "hub_cards"
STOCK = """
import sys
sys.modules["timm_dd"] = None  # not to be imported
import timm, torch
torch.set_num_threads({})  # as many as there: bits depend on it
model = timm.create_model("hf-hub:{}", pretrained=True).eval()
torch.save(model(torch.load({!r})), {!r})
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    parts = timm_dd.split("resnet10t", 2, seed=0, num_classes=3, img_size=64)
    parts.epoch = 3
    parts.save(folder / "parts")
    timm_dd.merge_files(folder / "parts", folder / "composed")
    return folder


def card(server, repo=REPO):
    return server.repos[repo].commits[-1].tree["README.md"].content.decode()


def edit(text, repo=REPO):
    HfApi().upload_file(repo_id=repo, path_in_repo="README.md", path_or_fileobj=text.encode())


@pytest.mark.slow
def test_stock_timm_loads_what_was_pushed(hub, folders, tmp_path, capsys):
    """In a process where timm_dd cannot be imported: the same logits, bit for bit."""
    assert main(["push", str(folders / "composed"), REPO, "--tag", "v1", "-m", "The first"]) == 0
    assert capsys.readouterr().out.startswith(f"{hub.url}/{REPO}/commit/")
    commit = hub.repos[REPO].commits[-1]
    assert set(commit.tree) == {".gitattributes", "README.md", "config.json", "model.safetensors"}
    assert not hub.repos[REPO].private and "v1" in hub.repos[REPO].tags
    x = torch.randn(2, 3, 64, 64)
    torch.save(x, tmp_path / "x")
    for name in (REPO, f"{REPO}@v1"):
        code = STOCK.format(torch.get_num_threads(), name, str(tmp_path / "x"), str(tmp_path / "y"))
        subprocess.run([sys.executable, "-c", code], check=True)
        with torch.no_grad():
            assert torch.equal(torch.load(tmp_path / "y"), timm_dd.merge(folders / "parts").eval()(x))


def test_parts_are_merged_straight_from_the_hub(hub, folders, tmp_path):
    assert timm_dd.push(folders / "parts", f"{REPO}-parts", private=True).startswith(hub.url)
    assert hub.repos[f"{REPO}-parts"].private
    assert main(["merge", f"hf-hub:{REPO}-parts", "-o", str(tmp_path / "composed")]) == 0
    expected = (folders / "composed" / "model.safetensors").read_bytes()
    assert (tmp_path / "composed" / "model.safetensors").read_bytes() == expected
    parts = Parts.load(f"hf-hub:{REPO}-parts")
    assert (parts.seed, parts.epoch) == (0, 3)
    text = card(hub, f"{REPO}-parts")
    assert f"timm-dd merge hf-hub:{REPO}-parts -o composed/" in text and "trained for 3 epochs, seed 0" in text
    assert "11,689,512" not in text and f"{parts.plan.params():,} parameters" in text
    timm_dd.split("resnet10t", 3, num_classes=3).save(tmp_path / "three")
    timm_dd.push(tmp_path / "three", f"{REPO}-parts")  # parts of another split do not stay beside the new ones
    names = [name for name in hub.repos[f"{REPO}-parts"].commits[-1].tree if name.startswith("part-")]
    assert len(names) == 3 and all("-of-00003" in name for name in names)


@pytest.fixture(scope="module")
def decided(tmp_path_factory):
    """A run whose parts decide together."""
    given = [
        *RUN,
        "--joint-epochs",
        "0",
        "--part-epochs",
        "1",
        "--epochs",
        "0",
        "--coarse-epochs",
        "2",
        "--coarse-widths",
    ]
    given += ["8", "--aggregate", "vote", "dnn", "--together", "coherent", "--together-epochs", "2"]
    folder = tmp_path_factory.mktemp("decided")
    assert main(["train", *given, "--output", str(folder), "--experiment", "run"]) == 0
    return folder / "run"


def test_a_two_level_network_comes_back_from_the_hub(hub, decided, tmp_path):
    """From a folder that names its parts, and from one that has them; its figures are the run's."""
    summary = json.loads((decided / "summary.json").read_text())
    x = torch.randn(2, 3, 32, 32)
    parts = {f"part-0000{k}-of-00004.safetensors" for k in range(4)}
    for name, key in (("two-level", "dnn"), ("together/coherent/last", "coherent")):
        timm_dd.push(decided / name, REPO)
        tree = set(hub.repos[REPO].commits[-1].tree)
        pictures = {"accuracy-over-seconds.png", "boxes.png"} if importlib.util.find_spec("matplotlib") else set()
        files = {"README.md", "plan.json", "two_level.json", "coarse.safetensors", *parts}
        assert tree == {".gitattributes", *files, *pictures}
        network, local = (timm_dd.TwoLevel.load(place).eval() for place in (f"hf-hub:{REPO}", decided / name))
        assert torch.equal(network(x), local(x)) and network.class_names == tuple("0123456789")
        found = ModelCard(card(hub))
        assert set(re.findall(r"!\[[^\]]+\]\((.*)\)", found.text)) == pictures
        (result,) = found.data.eval_results
        assert result.metric_value == round(summary["two_level"][key], 2)
        assert all(f"| two levels, {how} | {v:.2f} |" in found.text for how, v in summary["two_level"].items())
        assert f'timm_dd.TwoLevel.load("hf-hub:{REPO}")' in found.text and summary["command"] in found.text
        assert ("from a random start, for 2 epochs" in found.text) == (key == "coherent")
    timm_dd.push(decided / "parts", REPO)  # what goes with another network does not stay beside them
    assert set(hub.repos[REPO].commits[-1].tree) == {".gitattributes", "README.md", "plan.json", *parts}


def test_the_use_that_a_card_of_two_levels_shows(hub, decided):
    timm_dd.push(decided / "two-level", REPO)
    (code,) = re.findall(r"```python\n(.*?)```", card(hub), re.S)
    found = {"image": Image.new("RGB", (50, 40), "red")}
    exec(code, found)
    assert found["scores"].shape == (1, 10)


def test_a_damaged_two_level_network_is_not_pushed(decided, tmp_path):
    shutil.copytree(decided, tmp_path / "run")
    for name in ("two-level/coarse.safetensors", "parts/2/part-00002-of-00004.safetensors"):
        path = tmp_path / "run" / name
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        with pytest.raises(MergeError, match=path.name):
            write_repository(tmp_path / "run" / "two-level", REPO, tmp_path / "staged")
        path.write_bytes(data)
    assert not (tmp_path / "staged").exists()
    about = tmp_path / "run" / "two-level" / "two_level.json"
    said = json.loads(about.read_text())
    about.write_text(json.dumps({**said, "top1": "high"}))
    with pytest.raises(MergeError, match="two_level.json is not whole"):
        write_repository(about.parent, REPO, tmp_path / "staged")
    about.write_text(json.dumps({k: v for k, v in said.items() if k != "top1"}))
    assert results(about.parent, tmp_path) == []
    shutil.move(tmp_path / "run" / "together" / "coherent" / "best", tmp_path / "alone")  # no run around it
    assert results(tmp_path / "alone", tmp_path) == []


def test_the_card_of_a_trained_model(hub, one, tmp_path):
    """The figures are those of summary.json, for this very model, in the form that the Hub reads."""
    summary = json.loads((one / "summary.json").read_text())
    for folder, key in (("composed", "composed"), ("global/last", "tuned"), ("global/best", "best")):
        timm_dd.push(one / folder, REPO)
        assert ("POST", "/api/validate-yaml") in hub.requests  # what `ModelCard.validate` asks
        found = ModelCard(card(hub))
        (result,) = found.data.eval_results
        assert (result.dataset_name, result.dataset_split) == ("digits", "validation")
        assert result.metric_value == round(summary[key], 2)
        assert (found.data.library_name, found.data.pipeline_tag) == ("timm", "image-classification")
        assert f"{summary['together']:.2f}" in found.text and f"{summary['baseline']:.2f}" in found.text
        assert f'timm.create_model("hf-hub:{REPO}", pretrained=True)' in found.text
        assert summary["command"] in found.text and "import timm_dd" not in found.text
        assert "hf_test" not in str(found)  # the token


@pytest.mark.parametrize("path", sorted(CARDS.glob("*.md")), ids=lambda p: p.stem)
def test_the_cards_in_the_project_are_as_they_were_rendered(path, hub):
    """The Hub takes them, and nobody has edited them: their last line is the hash of the others."""
    text = path.read_text()
    HfApi().create_repo(REPO)
    edit(text)
    assert card(hub) == text
    body, _, line = text.removesuffix("\n").rpartition("\n")
    assert hashlib.sha256(body.encode()).hexdigest() in line
    assert body.rstrip().splitlines()[-1] == "```"


def results(folder, tmp_path):
    """The figures in the card of the model in `folder`."""
    target = tmp_path / f"staged-{len(list(tmp_path.iterdir()))}"
    write_repository(folder, REPO, target)
    return [r.metric_value for r in ModelCard.load(target / "README.md").data.eval_results or ()]


def test_a_model_knows_the_run_that_made_it(one, tmp_path):
    """Wherever it lies in the run's folder, whatever its folder's name; elsewhere nothing is known of its accuracy."""
    summary = json.loads((one / "summary.json").read_text())
    shutil.copytree(one, tmp_path / "run")
    kept = tmp_path / "run" / "kept" / "for" / "later" / "composed"
    shutil.copytree(one / "global" / "best", kept)
    assert results(kept, tmp_path) == [round(summary["best"], 2)]
    shutil.move(kept, tmp_path / "composed")
    assert results(tmp_path / "composed", tmp_path) == []
    timm_dd.merge_files(one / "parts", tmp_path / "run" / "composed")  # by hand
    assert results(tmp_path / "run" / "composed", tmp_path) == []
    text = (tmp_path / "run" / "summary.json").read_text().replace(summary["run"], "0" * 64)
    (tmp_path / "run" / "summary.json").write_text(text)  # another run of the same plan
    assert results(tmp_path / "run" / "global" / "best", tmp_path) == []


def test_a_card_shows_curves_and_boxes(one, tmp_path, monkeypatch):
    """Of the run; the folder of a dry run is pushed with them. A model that no run made has none."""
    pytest.importorskip("matplotlib")
    shown = {"accuracy-over-seconds.png", "boxes.png"}
    write_repository(one / "global" / "best", REPO, tmp_path / "staged")
    write_repository(tmp_path / "staged", REPO, tmp_path / "again")
    for folder in (tmp_path / "staged", tmp_path / "again"):
        text = (folder / "README.md").read_text()
        assert {p.name for p in folder.glob("*.png")} == shown == set(re.findall(r"!\[[^\]]+\]\((.*)\)", text))
        assert all((folder / name).read_bytes().startswith(b"\x89PNG") for name in shown)
    shutil.copytree(one / "global" / "best", tmp_path / "alone")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for place, target in ((tmp_path / "alone", "a"), (one / "composed", "b")):  # the second without matplotlib
        write_repository(place, REPO, tmp_path / target)
        assert (
            list((tmp_path / target).glob("*.png")) == [] and "![" not in (tmp_path / target / "README.md").read_text()
        )


def test_a_card_says_what_lies_between_the_blocks(one, tmp_path):
    for onto, text in (
        (None, "are zero"),
        (one / "global" / "last", "are those of the model that the parts were merged"),
    ):
        timm_dd.merge_files(one / "parts", tmp_path / "composed", onto=onto)
        write_repository(tmp_path / "composed", REPO, tmp_path / text)
        assert f"The weights between the blocks {text}" in (tmp_path / text / "README.md").read_text()


def test_a_run_is_known_by_what_its_weights_depend_on(one):
    """Not by its name or whether there is a baseline; but by the parts' options, and by the cycle."""

    def digest(*given, cycle=1):
        run = Run(options.parse([*RUN, "--parts", "4", *given]))
        return replace(run.folder, cycle=cycle).digest(run.parts.plan)

    known = json.loads((one / "summary.json").read_text())["run"]
    assert digest() == digest("--baseline-epochs", "3", "--workers", "1", "--experiment", "other") == known
    others = [digest("--part-lr", "0.1"), digest("--seed", "1"), digest("--calibrate", "mean"), digest(cycle=2)]
    assert len({known, *others}) == 5


RESULTS = '"best": 1, "composed": 1, "tuned": 1, "split": ""'


@pytest.mark.parametrize("damage", ['"best": 1', RESULTS, RESULTS + ', "run": "", "dataset": 3', ""])
def test_a_run_with_a_damaged_summary(damage, one, tmp_path):
    shutil.copytree(one, tmp_path / "run")
    (tmp_path / "run" / "summary.json").write_text(f"{{{damage}}}")
    with pytest.raises(MergeError, match="summary.json is damaged"):
        write_repository(tmp_path / "run" / "composed", REPO, tmp_path / "staged")


ODD = [
    {"together": None}, {"parts": ["a", "b", "c", "d"]}, {"parts": 3.0}, {"best": math.nan}, {"top5": {"tuned": "x"}},
    {"best_epoch": "x"}, {"command": 5}, {"baseline": []}, {"two_level": {"dnn": "x"}},
]  # fmt: skip


@pytest.mark.parametrize("odd", ODD, ids=str)
def test_a_damaged_summary_is_that_for_cards_and_pages(odd, one, tmp_path):
    summary = json.loads((one / "summary.json").read_text())
    assert read_summary(one / "summary.json", 4) == summary
    (tmp_path / "summary.json").write_text(json.dumps({**summary, **odd}))
    with pytest.raises(ReportError, match="summary.json is damaged"):
        read_summary(tmp_path / "summary.json", 4)


def test_the_command_of_a_card_gives_the_same_run(one):
    """Every option on which weights depend comes back; what is the reader's affair is not in it."""
    asked = yaml.safe_load((one / "args.yaml").read_text())
    command = json.loads((one / "summary.json").read_text())["command"]
    assert command.startswith("timm-dd train ") and not any(flag in command for flag in ("--output", "--experiment"))
    again = vars(options.parse(shlex.split(command)[2:]))
    assert all(again[name] == asked[name] for name in again.keys() - options.MAY_CHANGE_ON_RESUME)


def test_a_model_of_ours_needs_us(tmp_path):
    timm_dd.split("dd_resnet20_16", 2).save(tmp_path / "parts")
    timm_dd.merge_files(tmp_path / "parts", tmp_path / "composed")
    write_repository(tmp_path / "composed", REPO, tmp_path / "staged")
    assert "import timm_dd  # registers dd_resnet20_16" in (tmp_path / "staged" / "README.md").read_text()


def test_an_approximate_plan_says_so(tmp_path):
    parts = timm_dd.split("convnext_atto", 2, img_size=64)
    parts.save(tmp_path / "parts")
    timm_dd.merge_files(tmp_path / "parts", tmp_path / "composed")
    for folder in ("parts", "composed"):
        write_repository(tmp_path / folder, REPO, tmp_path / f"staged-{folder}")
        text = (tmp_path / f"staged-{folder}" / "README.md").read_text()
        assert "The plan is approximate" in text and parts.plan.approximations[0][2] in text


def test_of_another_network_nothing_stays(hub, folders, tmp_path):
    """Whatever lies in a repository, `predict`, `merge` and `TwoLevel.load` take what was pushed last."""
    parts = Parts.load(folders / "parts")
    timm_dd.TwoLevel(parts, "vote", class_names=("x", "y", "z")).save(tmp_path / "two")
    Image.new("RGB", (64, 64), "red").save(tmp_path / "x.png")
    shared = {"plan.json", "part-00000-of-00002.safetensors", "part-00001-of-00002.safetensors"}
    kinds = {
        folders / "composed": {"model.safetensors", "config.json"},
        tmp_path / "two": {"two_level.json", *shared},
        folders / "parts": shared,
    }
    for before, after in itertools.permutations(kinds, 2):
        timm_dd.push(before, REPO)
        timm_dd.push(after, REPO)
        assert set(hub.repos[REPO].commits[-1].tree) - {".gitattributes", "README.md"} == kinds[after]
        if after != folders / "parts":
            (found,) = Classifier.load(f"hf-hub:{REPO}").predict([tmp_path / "x.png"])
            (expected,) = Classifier.load(str(after)).predict([tmp_path / "x.png"])
            assert found == expected


def test_a_card_is_written_again_unless_somebody_edited_it(hub, folders, caplog):
    timm_dd.push(folders / "composed", REPO)
    first = card(hub)
    timm_dd.push(folders / "parts", REPO)
    assert card(hub) != first  # it was ours to write
    edited = card(hub).replace("## Use", "## My own words")
    edit(edited)
    with caplog.at_level("WARNING"):
        timm_dd.push(folders / "composed", REPO)
    assert card(hub) == edited and "was edited and stays as it is" in caplog.text
    assert "model.safetensors" in hub.repos[REPO].commits[-1].tree


def test_pictures_of_a_card_that_was_edited_stay(hub, one, folders):
    """Those of ours go with it."""
    pytest.importorskip("matplotlib")
    pictures = {"accuracy-over-seconds.png", "boxes.png"}
    for change, left in (("## My own words", pictures), ("## Use", set())):
        timm_dd.push(one / "global" / "best", REPO)
        edit(card(hub).replace("## Use", change))
        timm_dd.push(folders / "composed", REPO)
        assert {name for name in hub.repos[REPO].commits[-1].tree if name.endswith(".png")} == left
        hub.repos.clear()


def test_a_dry_run_writes_the_folder_that_would_be_pushed(hub, folders, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["push", str(folders / "composed"), REPO, "--dry-run"]) == 0
    staged = tmp_path / "model"
    assert sorted(p.name for p in staged.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert not any(p.is_symlink() for p in staged.iterdir()) and hub.requests == []
    assert main(["push", str(folders / "composed"), REPO, "--dry-run"]) == 1
    assert "model is not empty" in capsys.readouterr().err
    (staged / "README.md").write_text((staged / "README.md").read_text().replace("## Use", "## My own words"))
    timm_dd.push(staged, REPO)
    assert "## My own words" in card(hub)
    assert all(hub.repos[REPO].commits[-1].tree[p.name].content == p.read_bytes() for p in staged.iterdir())


def test_a_broken_connection(hub, folders, monkeypatch):
    """Without huggingface_hub's own retries, which wait for seconds: an error, no commit, and the next push goes on."""
    monkeypatch.setattr(lfs, "http_backoff", functools.partial(lfs.http_backoff, max_retries=0))
    hub.fail_uploads = 1
    with pytest.raises(PushError, match="push again") as e:
        timm_dd.push(folders / "parts", REPO)
    assert "\n" not in str(e.value) and "README.md" not in hub.repos[REPO].commits[-1].tree
    arrived = len(hub.lfs)
    timm_dd.push(folders / "parts", REPO)
    assert "plan.json" in hub.repos[REPO].commits[-1].tree
    assert arrived == 1 and len([m for m, _ in hub.requests if m == "PUT"]) == 3  # one broke, two arrived


def test_what_would_be_public_or_fail_is_refused_beforehand(hub, folders, capsys):
    timm_dd.push(folders / "composed", REPO, tag="v1")
    capsys.readouterr()
    before = len(hub.repos[REPO].commits)
    with pytest.raises(PushError, match="is public"):
        timm_dd.push(folders / "parts", REPO, private=True)
    with pytest.raises(PushError, match="has a tag v1"):
        timm_dd.push(folders / "parts", REPO, tag="v1")
    with pytest.raises(PushError, match="not the name of a repository"):
        timm_dd.push(folders / "parts", "model")
    assert len(hub.repos[REPO].commits) == before
    hub.token = "hf_another"
    assert main(["push", str(folders / "composed"), "user/other"]) == 1
    err = capsys.readouterr().err
    assert "hf auth login" in err and err.count("\n") == 1 and "hf_test" not in err
    with pytest.raises(MergeError, match="cannot be downloaded"):
        timm_dd.merge("hf-hub:user/nothing")


def test_no_hub(folders, hub, capsys):
    hub.__exit__(None, None, None)
    assert main(["push", str(folders / "composed"), REPO]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_what_is_not_ours_is_not_pushed(folders, tmp_path):
    with pytest.raises(MergeError, match="has neither model.safetensors nor plan.json"):
        timm_dd.push(tmp_path, REPO)
    timm.models.save_for_hf(timm.create_model("resnet10t"), tmp_path, safe_serialization=True)
    with pytest.raises(MergeError, match="was not composed by timm_dd"):
        timm_dd.push(tmp_path, REPO)
    whole = (folders / "composed" / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole)
    config = json.loads((folders / "composed" / "config.json").read_text())
    odd = [{"architecture": math.nan}, {"label_names": 3}, {"pretrained_cfg": {"input_size": 5}}]
    for damaged in ({}, *({**config, **values} for values in odd)):
        (tmp_path / "config.json").write_text(json.dumps(damaged))
        with pytest.raises(MergeError, match="config.json is damaged"):
            write_repository(tmp_path, REPO, tmp_path / "staged")
    (tmp_path / "config.json").unlink()
    with pytest.raises(MergeError, match="no config.json"):
        timm_dd.push(tmp_path, REPO)
    (tmp_path / "model.safetensors").write_bytes(whole[:-9])
    with pytest.raises(MergeError, match="cannot be read"):
        timm_dd.push(tmp_path, REPO)


def spoil(change):
    """A change of the weights in a folder."""

    def spoilt(folder):
        state = load_file(folder / "model.safetensors")
        change(state)
        with safe_open(folder / "model.safetensors", "pt") as file:
            save_file({k: t.clone() for k, t in state.items()}, folder / "model.safetensors", file.metadata())

    return spoilt


def is_pipe(name):
    def changed(folder):
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return changed


def with_card(text=b"mine", image=None):
    def changed(folder):
        (folder / "README.md").write_bytes(text)
        if image is not None:
            image(folder / "x.png")

    return changed


SPOILT = {
    "NaN": (spoil(lambda s: s["fc.bias"].fill_(math.nan)), "fc.bias.* is not finite"),
    "a statistic": (spoil(lambda s: s["bn1.running_mean"].fill_(math.nan)), "bn1.running_mean.* is not finite"),
    "a tensor is missing": (spoil(lambda s: s.pop("fc.bias")), "is no model of timm .*state_dict"),
    "another shape": (spoil(lambda s: s.update({"fc.bias": torch.zeros(7)})), "is no model of timm .*state_dict"),
    "config is a pipe": (is_pipe("config.json"), "config.json is damaged .it is no file"),
    "a card in Latin-1": (with_card(b"caf\xe9"), "README.md cannot be read"),
    "an image that is a folder": (with_card(image=Path.mkdir), "x.png, beside README.md, is no file"),
    "an image that is a pipe": (with_card(image=os.mkfifo), "x.png, beside README.md, is no file"),
    "an image that is nowhere": (with_card(image=lambda p: p.symlink_to("nowhere")), "x.png, beside README.md, is no"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_a_damaged_model_is_not_pushed(case, folders, tmp_path):
    damage, message = SPOILT[case]
    shutil.copytree(folders / "composed", tmp_path / "composed")
    damage(tmp_path / "composed")
    with pytest.raises(MergeError, match=message):
        write_repository(tmp_path / "composed", REPO, tmp_path / "staged")
    assert not (tmp_path / "staged").exists()


def test_a_dry_run_into_what_is_no_empty_folder(folders, tmp_path):
    (tmp_path / "file").write_text("")
    for target in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / ("x" * 300), "hf-hub:user/model"):
        with pytest.raises(FileError, match="is not empty|cannot write|cannot be read|is on the Hub"):
            write_repository(folders / "composed", REPO, target)


def test_names_of_classes_are_text_in_cards(folders, tmp_path):
    """Neither HTML nor marks, and in one line."""
    shutil.copytree(folders / "composed", tmp_path / "composed")
    config = json.loads((folders / "composed" / "config.json").read_text())
    named = {**config, "label_names": ["<script>", "a\n# b`", "\u202e*c*_d"]}
    (tmp_path / "composed" / "config.json").write_text(json.dumps(named))
    parts = Parts.load(folders / "parts")
    timm_dd.TwoLevel(parts, "mean", class_names=named["label_names"]).save(tmp_path / "two")
    for folder in ("composed", "two"):
        write_repository(tmp_path / folder, REPO, tmp_path / f"{folder}-staged")
        text = (tmp_path / f"{folder}-staged" / "README.md").read_text()
        assert "Classes: " + r"\<script\>, a\\n# b\`, \\u202e\*c\*\_d." + "\n" in text


def test_parts_of_several_seeds_say_so(folders, tmp_path):
    shutil.copytree(folders / "parts", tmp_path / "parts")
    parts = Parts.load(folders / "parts")
    parts.seed, parts.epoch = 1, 0
    parts.save(tmp_path / "others")
    shutil.copy(tmp_path / "others" / "part-00001-of-00002.safetensors", tmp_path / "parts")
    write_repository(tmp_path / "parts", REPO, tmp_path / "staged")
    assert "The parts were trained for 3 or 0 epochs, seed 0 or 1.\n" in (tmp_path / "staged" / "README.md").read_text()


def test_weights_are_those_of_the_folder(hub, folders):
    timm_dd.push(folders / "composed", REPO)
    model = timm.create_model(f"hf-hub:{REPO}", pretrained=True)
    stored = load_file(folders / "composed" / "model.safetensors")
    assert all(torch.equal(v, stored[k]) for k, v in model.state_dict().items())
