"""The command line: what each command prints and leaves, and its exit status."""

import argparse
import errno
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import timm_dd
from timm_dd.cli import main, parser
from timm_dd.train.settings import options


def test_plan(capsys):
    assert main(["plan", "resnet10t", "4", "--overlap", "4", "--img-size", "64"]) == 0
    assert "grid 2x2, overlap 4: 36×36 of 64×64 pixels" in capsys.readouterr().out
    assert main(["plan", "resnet10t", "4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parts"] == 4


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("command", ["plan", "profile"])
def test_what_is_too_narrow_is_replicated_with_one_warning(capsys, command, recwarn):
    assert main([command, "tinynet_e", "4"]) == 0
    (warning,) = recwarn
    assert "blocks.1.0.se.conv_reduce (node blocks_1_0_se_conv_reduce) of 2;" in str(warning.message)
    if command == "plan":
        lines = capsys.readouterr().out.splitlines()
        row = next(r for r in lines if r.startswith("blocks.1.0.se.act1"))
        assert row.split()[1:4] == ["SiLU", "2×1×1", "2×1×1"] and "not linear on a sum" in row
        assert "  Conv2d blocks.1.0.se.conv_reduce (node blocks_1_0_se_conv_reduce): 2" in lines
    assert main([command, "tinynet_e", "4", "--narrow", "refuse"]) == 1
    assert "largest K that works here is 2" in capsys.readouterr().err


def test_a_warning_of_a_command_is_one_line():
    command = [sys.executable, "-m", "timm_dd.cli", "plan", "tinynet_e", "4"]
    code = "import sys; from timm_dd.cli import main; main(sys.argv[1:])"
    done = subprocess.run([sys.executable, "-c", code, *command[3:]], capture_output=True, text=True, check=True)
    (line,) = done.stderr.splitlines()
    assert line.startswith("timm-dd plan: warning: too few channels for 4 parts")


@pytest.mark.parametrize("channels", [1, 5])
def test_images_of_other_channels(channels, tmp_path, capsys):
    given = ["resnet10t", "2", "--in-chans", str(channels), "--img-size", "64"]
    for command in ("plan", "profile"):
        assert main([command, *given, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)
    assert main(["split", *given, "-o", str(tmp_path / "parts")]) == 0
    assert timm_dd.Parts.load(tmp_path / "parts").plan.input_size == (channels, 64, 64)


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


@pytest.mark.slow
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


def test_merge_onto(tmp_path, capsys):
    """In place too; what was merged onto a model is not to be verified."""
    parts, start, composed = (str(tmp_path / name) for name in ("parts", "start", "composed"))
    main(["split", "resnet10t", "2", "-o", parts, "--num-classes", "5"])
    main(["merge", parts, "-o", start])
    path = Path(start) / "model.safetensors"
    save_file({key: t + 1 for key, t in load_file(path).items()}, path)
    expected = timm_dd.merge(parts, onto=timm.create_model(f"local-dir:{start}", pretrained=True)).state_dict()
    for output in (composed, start):
        assert main(["merge", parts, "-o", output, "--onto", start]) == 0
        state = load_file(Path(output) / "model.safetensors")
        assert state.keys() == expected.keys() and all(torch.equal(t, expected[key]) for key, t in state.items())
    capsys.readouterr()
    assert main(["verify", start, parts]) == 1
    assert "is not the sum of its parts; verify a merge of them without --onto" in capsys.readouterr().err


def test_verify(tmp_path, capsys):
    parts, composed = str(tmp_path / "parts"), str(tmp_path / "composed")
    main(["split", "resnet10t", "4", "-o", parts, "--img-size", "64", "--num-classes", "10"])
    main(["merge", parts, "-o", composed])
    capsys.readouterr()
    assert main(["verify", composed, parts, "--dataset", "digits"]) == 0
    out = capsys.readouterr().out
    assert "every claim holds" in out and "360 labelled images" in out and "bound (2.19)" in out
    path = Path(composed) / "model.safetensors"
    state = load_file(path)
    save_file({**state, "fc.weight": state["fc.weight"] + 0.01}, path)
    assert main(["verify", composed, parts]) == 1
    assert "FAILED sum of the parts' outputs, whole image" in capsys.readouterr().out


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda folder: (folder / "model.safetensors").unlink(), "no model.safetensors in"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 99), "cannot be read"),
        (lambda folder: save_file({"a": torch.ones(1)}, folder / "model.safetensors"), "is of another model"),
    ],
)
def test_verify_of_a_spoiled_model(spoil, message, tmp_path, capsys):
    timm_dd.split("resnet10t", 2).save(tmp_path / "parts")
    timm_dd.merge_files(tmp_path / "parts", tmp_path / "composed")
    spoil(tmp_path / "composed")
    assert main(["verify", str(tmp_path / "composed"), str(tmp_path / "parts")]) == 1
    assert message in capsys.readouterr().err


def test_profile(capsys):
    assert main(["profile", "resnet50", "4", "--grid", "2x2"]) == 0
    out = capsys.readouterr().out
    assert "resnet50 in 4 parts; grid 2x2: 3×112×112 of 3×224×224" in out
    assert re.search(r"multiply-adds \(MACs\) +4\.09 G +0\.0733 G +55\.8", out)
    local = "profile dd_vgg3 9 --grid 3x3 --img-size 180 --num-classes 5 --width-divisor 2 --json"
    assert main(local.split()) == 0
    assert json.loads(capsys.readouterr().out)["part"]["parameters"] == 273_173


def test_a_picture_of_the_boxes(tmp_path, capsys):
    """Each panel after the first is bright inside its box alone."""
    path = tmp_path / "boxes.png"
    assert main(["plan", "dd_resnet32", "5", "--grid", "type-b", "--domain-png", str(path)]) == 0
    assert "type B of 2x2 of 32×32 pixels" in capsys.readouterr().out
    picture = np.asarray(Image.open(path).convert("L"))
    assert picture.shape == (200 + 8, 6 * 200 + 8)
    boxes = timm_dd.Domain.type_b(2).boxes((32, 32))
    for k, box in enumerate(boxes, start=1):
        panel = picture[8:200, 8 + 200 * k : 200 + 200 * k]
        bright = np.zeros_like(panel, dtype=bool)
        rows, columns = (slice(6 * s + 30, 6 * (s + e) - 6) for s, e in zip(box.start, box.extent))
        assert panel[rows, columns].min() >= 200
        bright[6 * box.start[0] : 6 * (box.start[0] + box.extent[0]), :] = True
        assert panel[~bright].max() < 64
    again = tmp_path / "again.png"
    assert main(["plan", "resnet18", "4", "--domain-png", str(again), "--image", str(path)]) == 0
    assert Image.open(again).size == (5 * 232 + 8, 232 + 8)


@pytest.mark.parametrize("before", [None, b"as it was"])
def test_a_picture_on_a_full_disk(before, tmp_path, monkeypatch, capsys):
    def fill(self, path, format):
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "boxes.png"
    if before is not None:
        path.write_bytes(before)
    monkeypatch.setattr(Image.Image, "save", fill)
    assert main(["plan", "test_resnet", "4", "--domain-png", str(path)]) == 1
    assert capsys.readouterr().err == (
        f"timm-dd plan: cannot write to {path}: No space left on device; choose another output folder\n"
    )
    assert [p.read_bytes() for p in tmp_path.iterdir()] == ([] if before is None else [before])


@pytest.mark.parametrize(
    "arguments, status, message",
    [
        (["plan", "resnet5", "4"], 1, "did you mean"),
        (["plan", "resnet18.nope", "2"], 1, "timm has no model 'resnet18.nope'; did you mean resnet18"),
        (["plan", "resnet18.nope", "2", "--grid", "full", "--img-size", "64"], 1, "did you mean resnet18"),
        (["plan", "resnet18", "0"], 1, "from 1 up"),
        (["split", "resnet18", "100", "-o", "out", "--narrow", "refuse"], 1, "largest K"),
        (["merge", "nowhere", "-o", "out"], 1, "no plan.json"),
        (["plan", "resnet18", "4", "--grid", "full", "--overlap", "4"], 1, "--grid full takes neither --overlap"),
        (["profile", "resnet18", "4", "--grid", "full", "--margin", "4"], 1, "--grid full takes neither --overlap"),
        (["plan", "resnet18", "5", "--grid", "type-b", "--margin", "4"], 1, "--grid type-b takes neither --overlap"),
        (["plan", "resnet18", str(10**20 + 39)], 1, "number of parts, is 1048576 at most"),  # a prime number
        (["plan", "resnet18", str(10**20), "--grid", "type-b"], 1, "number of parts, is 1048576 at most"),
        (["split", "resnet18", str(10**20), "-o", "out", "--grid", "full"], 1, "number of parts, is 1048576 at most"),
        (["plan", "resnet18", "4", "--image", "a.png"], 1, "--image has no effect without --domain-png"),
        (["plan", "resnet18", "4", "--json", "--domain-png", "a.png"], 2, "not allowed with"),
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


@pytest.mark.parametrize(
    "command, name",
    [
        ("plan '' 4", "model"),
        ("plan resnet18 4 --domain-png=", "domain_png"),
        ("split resnet18 4 -o ''", "output"),
        ("merge '' -o composed", "parts"),
        ("merge parts -o composed --onto ''", "onto"),
        ("verify composed ''", "parts"),
        ("verify composed parts --dataset ''", "dataset"),
        ("report ''", "folder"),
        ("report . -o ''", "output"),
        ("report . --compare a ''", "compare"),
        ("push '' USER/REPO", "folder"),
        ("push . USER/REPO --dry-run ''", "dry_run"),
        ("export '' -o a.onnx", "folder"),
        ("predict '' a.png", "model"),
        ("predict . a.png ''", "images"),
        ("demo --output ''", "output"),
    ],
)
def test_an_empty_word_is_no_folder(command, name, tmp_path, monkeypatch, capsys):
    """As of a variable that nobody set; a path without a word is the current folder."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(shlex.split(command))
    said = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 2 and said.endswith(f"error: {name} is empty, as a variable that nobody set; give one")
    assert list(tmp_path.iterdir()) == []


def test_errors_of_data_are_of_the_command(tmp_path, capsys):
    parts, composed = str(tmp_path / "parts"), str(tmp_path / "composed")
    main(["split", "test_resnet", "2", "-o", parts, "--num-classes", "10", "--img-size", "32"])
    main(["merge", parts, "-o", composed])
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["verify", composed, parts, "--dataset", "digits", "--val-split", "x"])
    assert capsys.readouterr().err.startswith("timm-dd verify: error: --val-split has no effect beside --dataset")
    assert main(["verify", composed, parts, "--val-split", "x"]) == 1
    assert "--val-split has no effect without --data-dir or --dataset" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["demo", "--output", str(tmp_path), "--seed", str(2**64)])
    assert capsys.readouterr().err.startswith("timm-dd demo: error: --seed is a whole number that 64 bits hold")


@pytest.mark.parametrize(
    "command",
    [
        "plan test_resnet 2 --img-size 32",
        "split test_resnet 2 -o out",
        "train --dataset digits --model test_resnet --parts 2 --warmup-epochs 0 --output out --device cpu",
    ],
)
def test_ctrl_c_is_one_line(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: signal.raise_signal(signal.SIGINT))
    assert main(command.split()) == 128 + signal.SIGINT
    assert capsys.readouterr().err == "timm-dd: stopped by Ctrl-C\n" and list(tmp_path.iterdir()) == []


def test_what_a_terminal_has_no_letter_for_is_escaped():
    code = "import sys; from timm_dd.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "plan", "test_resnet", "2", "--img-size", "32"]
    given = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, text=True, env=given)
    assert (done.returncode, done.stderr) == (0, "") and "\\xd7" in done.stdout


def subparsers():
    (action,) = (a for a in parser()._actions if isinstance(a, argparse._SubParsersAction))
    return action.choices


def test_help_fits_a_screen(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 24 and max(map(len, lines)) <= 80
    assert all(any(line.split()[:1] == [name] for line in lines) for name in subparsers())


@pytest.mark.parametrize("command", ["demo", "plan", "profile", "split", "train", "merge", "verify", "push"])
def test_the_example_in_a_commands_help_is_right(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    example = " ".join(re.search(r"^example: (.*)", capsys.readouterr().out, re.M | re.S)[1].split())
    if command == "train":
        options.parse(shlex.split(example.partition("timm_dd.train")[2]))
    else:
        words = shlex.split(example)
        assert words[:2] == ["timm-dd", command] and parser().parse_args(words[1:]).command == command


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion(shell, capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--print-completion", shell])
    script = capsys.readouterr().out
    assert "--dry-run" in script and "--off-diagonal-lr" in script
    if shell == "bash":
        asked = "COMP_WORDS=(timm-dd pu); COMP_CWORD=1; _shtab_timm_dd; echo ${COMPREPLY[@]}"
        done = subprocess.run(["bash", "-c", f"{script}\n{asked}"], capture_output=True, text=True)
        assert done.stdout == "push\n", done.stderr


def test_quiet_and_verbose(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["split", "resnet10t", "2", "-o", "parts", "-q"]) == 0
    assert main(["merge", "parts", "-o", "composed", "--quiet"]) == 0
    run = ["--model", "test_resnet", "--dataset", "digits", "--parts", "2", "--epochs", "0", "--output", "runs"]
    assert main(["train", *run, "--train-num-samples", "128", "-j", "0", "--device", "cpu", "-q"]) == 0
    assert capsys.readouterr() == ("", "")
    assert main(["merge", "nowhere", "-o", "out", "-q"]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert main(["merge", "nowhere", "-o", "out", "-v"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("Traceback") and err.splitlines()[-1].startswith("timm-dd merge: no plan.json in nowhere")


def test_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"timm-dd {timm_dd.__version__}\n"
