"""The command line: what each command prints and leaves, and its exit status."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm

import timm_dd
from timm_dd.cli import main


def test_plan(capsys):
    assert main(["plan", "resnet10t", "4", "--overlap", "4", "--img-size", "64"]) == 0
    assert "grid 2x2, overlap 4: 36×36 of 64×64 pixels" in capsys.readouterr().out
    assert main(["plan", "resnet10t", "4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parts"] == 4


def test_plan_of_a_narrow_model_says_what_is_replicated(capsys):
    assert main(["plan", "tinynet_e", "4", "--narrow", "replicate"]) == 0
    row = next(r for r in capsys.readouterr().out.splitlines() if r.startswith("blocks.1.0.se.act1"))
    assert row.split()[1:4] == ["SiLU", "2×1×1", "2×1×1"] and "not linear on a sum" in row


def test_colours_are_for_terminals(capsys, monkeypatch):
    arguments = ["plan", "convnext_atto", "2", "--img-size", "64"]
    monkeypatch.delenv("NO_COLOR", raising=False)
    main(arguments)
    plain = capsys.readouterr().out
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    main(arguments)
    colours = capsys.readouterr().out
    assert "\033" not in plain and colours.count("\033[32m") == plain.count("  exact\n")
    assert re.sub("\033\\[\\d+m", "", colours) == plain
    monkeypatch.setenv("NO_COLOR", "1")
    main(arguments)
    assert capsys.readouterr().out == plain


def test_a_reader_may_stop_early():
    command = f"set -o pipefail; {Path(sys.executable).parent / 'timm-dd'} plan resnet50 4 --json | head -c 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "{", "")


def test_split_and_merge(tmp_path, capsys):
    parts, composed = str(tmp_path / "parts"), str(tmp_path / "composed")
    assert main(["split", "resnet10t", "2", "-o", parts, "--num-classes", "5", "--seed", "3"]) == 0
    assert main(["merge", parts, "-o", composed]) == 0
    model = timm.create_model(f"local-dir:{composed}", pretrained=True)
    expected = timm_dd.merge(timm_dd.split("resnet10t", 2, num_classes=5, seed=3))
    assert model.num_classes == 5
    assert all((v == expected.state_dict()[k]).all() for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    "arguments, status, message",
    [
        (["plan", "resnet5", "4"], 1, "did you mean"),
        (["plan", "resnet18", "0"], 1, "from 1 up"),
        (["split", "resnet18", "100", "-o", "out"], 1, "largest K"),
        (["merge", "nowhere", "-o", "out"], 1, "no plan.json"),
        (["plan", "resnet18"], 2, "required"),
        (["dance"], 2, "invalid choice"),
        ([], 2, "required"),
    ],
)
def test_bad_input(arguments, status, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    try:
        found = main(arguments)
    except SystemExit as e:
        found = e.code
    errors = capsys.readouterr().err
    assert found == status and message in errors
    if status == 1:
        assert errors.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"timm-dd {timm_dd.__version__}\n"
