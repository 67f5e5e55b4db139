"""Options, from the command line and from YAML: one way to read a value, one line and status 2 for a wrong one."""

import shlex

import pytest
import torch
import yaml
from conftest import RUN

from timm_dd.train.images.data import seed_epoch
from timm_dd.train.settings import options
from timm_dd.train.updates.learner import SeededRandom


@pytest.fixture
def file(tmp_path):
    """A file of options with a text."""

    def write(text):
        (tmp_path / "c.yaml").write_text(text, encoding="utf-8")
        return str(tmp_path / "c.yaml")

    return write


def error(arguments, capsys):
    """The one line on stderr of a command line that is refused with status 2."""
    with pytest.raises(SystemExit) as stopped:
        options.parse([*RUN, *arguments])
    out, err = capsys.readouterr()
    assert (stopped.value.code, out, err.count("\n")) == (2, "", 1), err
    return err


@pytest.mark.parametrize("spelling", ["-c {}", "-c{}", "-qc{}", "--config {}", "--config={}", "--conf {}", "--conf={}"])
def test_every_spelling_of_the_file_of_options_is_read(spelling, file):
    args = options.parse([*RUN, *shlex.split(spelling.format(file("decay_epochs: 7\nepochs: 9")))])
    assert args.decay_epochs == 7 and args.epochs == 1, "what the command line says goes before the file"


@pytest.mark.parametrize("spelling", ["-c{}", "--conf={}", "--conf {}"])
def test_a_file_of_options_that_cannot_be_read(spelling, tmp_path, capsys):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    assert "no config" in error(shlex.split(spelling.format(tmp_path / "nothing.yaml")), capsys)
    assert "no config" in error(shlex.split(spelling.format(tmp_path)), capsys)
    assert "is not YAML" in error(shlex.split(spelling.format(tmp_path / "binary")), capsys)


READ = [
    ("part_lr: [1e-3, 1e-2]", [1e-3, 1e-2]),
    ("part_lr: 0.1", [0.1]),
    ("lr_base: 1e-3", 1e-3),
    ("min_lr: 1", 1.0),
    ("decay_epochs: '7'", 7.0),
    ("mean: [-0.5, 0.5, 0.5]", [-0.5, 0.5, 0.5]),
    ("grid: 1x2", (1, 2)),
    ("grid: [1, 2]", (1, 2)),
    ("model_kwargs: {act: '1', depths: [1, 2], x: -1}", {"act": "1", "depths": [1, 2], "x": -1}),
    ("model_kwargs: {}", {}),
    ("experiment: 2024", "2024"),
    ("experiment: 2024-01-01", "2024-01-01"),
    ("experiment: -x", "-x"),
    ("experiment: ''", ""),
    ("baseline: true", True),
    ("update_bn: false", False),
    ("validation_batch_size: null", None),
    ("hflip: null", 0.5),
]


@pytest.mark.parametrize("text, expected", READ, ids=[text for text, _ in READ])
def test_a_value_is_read_as_on_the_command_line(text, expected, file):
    found = getattr(options.parse(["--dataset", "digits", "--parts", "2", "-c", file(text)]), text.partition(":")[0])
    assert found == expected and type(found) is type(expected)


WRONG = [
    "decay_epochs: soon", "hflip: [0.5, 0.5]", "epochs: 1.5", "workers: 1.0", "calibrate: foo", "engine: foo",
    "preset: foo", "baseline: 'no'", "baseline: 1", "update_bn: 'false'", "lr_base: true", "aa: false", "parts: [4]",
    "scale: 0.5", "scale: [0.1, 0.5, 1]", "mean: []", "mean: [[0.5]]", "mean: [null]", "model: {a: 1}",
    "model_kwargs: x", "model_kwargs: [1]", "model_kwargs: {1: 2}", "grid: two", "views: left", "min_lr: .nan",
    "min_lr: -.inf", "smoothing: 1.5", "experiment: \"a\\0b\"", "colour: red", "1: 2", "[a]", "7", "a: [", "a: b: c",
    "experiment: 2024-13-45", "{" * 2000, "false", "0", "[]", "''", "epochs: 3\nepochs: 4",
    "model_kwargs: {a: 1, a: 2}", "model_kwargs: {'a=b': 1}", "model_kwargs: {'': 1}", "quiet: true\nverbose: true",
]  # fmt: skip


@pytest.mark.parametrize("text", WRONG, ids=[text[:30].replace("\0", "0") for text in WRONG])
def test_a_wrong_value_in_a_file_is_refused(text, file, capsys):
    name = text.partition(":")[0]
    line = error(["-c", file(text)], capsys)
    assert "c.yaml" in line or options.flag_of(name) in line, line


def test_an_error_in_a_file_has_its_line(file, capsys):
    assert "line 2: 'epochs' is there twice;" in error(["-c", file("epochs: 3\nepochs: 4")], capsys)
    assert "line 2: found character '\\t' that cannot start" in error(["-c", file("epochs: 3\n\tlr: 1")], capsys)


def test_a_list_may_have_a_name_but_not_lists_in_lists(file, capsys):
    """A few names in each other are a list without end."""
    args = options.parse([*RUN, "-c", file("decay_milestones: &m [3, 5]\npart_decay_milestones: *m")])
    assert args.part_decay_milestones == [3, 5]
    lists = ", ".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12))
    said = error(["-c", file(f"model_kwargs: {{a0: &a0 [1, 1], {lists}}}")], capsys)
    assert "line 1: an alias of a list of lists; write it out;" in said


OUT_OF_RANGE = [
    "--batch-size 0", "--validation-batch-size 0", "--workers -1", "--smoothing 1.5", "--smoothing 1",
    "--mixup -1", "--crop-pct -1", "--crop-pct nan",
    "--epochs -1", "--part-epochs -1", "--hflip 2", "--model-ema-decay 2", "--train-num-samples -5",
    "--val-num-samples 0", f"--seed {2**64}", "--lr nan", "--joint-lr inf", "--part-lr -1", "--opt-betas 0.9 1.5",
    "--std 0 1 1", "--scale 0 1", "--scale 1 0.5", "--img-size 0", "--device foo", "--device mps",
    "--model-kwargs foo", "--model-kwargs =3", "--decay-milestones -1", "--part-shift -1", "--num-classes 0",
    "--coarse-folds 1", "--distill 1.5",
]  # fmt: skip


@pytest.mark.parametrize("given", OUT_OF_RANGE)
def test_a_number_out_of_its_range_is_refused(given, capsys):
    assert given.split()[0] in error(given.split(), capsys)


WITHOUT_EFFECT = [
    "--no-aug --aa rand-m9", "--no-aug --vflip 0.5", "--color-jitter 0.3", "--scale 0.5 1", "--ratio 1 1",
    "--train-crop-mode rkrc",
    "--data-dir x", "--train-split x", "--dataset-download", "--no-aug --reprob 0.2 --shift 0",
    "--no-aug --hflip 0.2 --shift 0", "--amp-dtype float16", "--clip-mode agc", "--model-ema-decay 0.9",
    "--wandb-project x", "--reassign", "--baseline --color-jitter 0.3", "--together-epochs 3",
    "--coarse-folds 3", "--distill 0.5", "--aggregate mean --coarse-folds 3",
]  # fmt: skip


@pytest.mark.parametrize("given", WITHOUT_EFFECT)
def test_an_option_without_effect_is_refused(given, capsys):
    assert "has no effect" in error(given.split(), capsys)


@pytest.mark.parametrize(
    "given",
    ["--color-jitter 0.3 --shift 0", "--color-jitter 0.3 --part-shift 0", "--color-jitter 0",
     "--color-jitter 0.3 --baseline --baseline-shift 0",
     "--no-aug", "--amp --amp-dtype float16", "--reassign --cycles 2", "--hflip 0"],
)  # fmt: skip
def test_an_option_with_an_effect_in_some_stage_is_not(given):
    options.parse([*RUN, *given.split()])


def test_a_run_s_own_options_are_read_back(file):
    args = options.parse([*RUN, "--grid", "1x2", "--parts", "2", "--mean", "0.5", "--model-kwargs", "a=1", "b=x"])
    text = yaml.safe_dump(vars(args), default_flow_style=None)
    again = options.parse(["-c", file(text)])
    assert {k: v for k, v in vars(again).items() if k != "config"} == {
        k: v for k, v in vars(args).items() if k != "config"
    }
    assert vars(options.parse(shlex.split(options.command(args))[2:])) | {"output": 0, "device": 0, "workers": 0} == (
        vars(args) | {"output": 0, "device": 0, "workers": 0}
    )


@pytest.mark.parametrize("seed", [-(2**63), 2**40, 2**63 - 1])
def test_any_seed_of_64_bits_will_do(seed):
    drawn = []
    for s, epoch in ((seed, 1), (seed, 1), (seed, 2), (seed + (1 if seed < 0 else -1), 1)):
        seed_epoch(s, epoch)
        drawn.append(torch.rand(()).item())
        with SeededRandom(s * 1000, torch.device("cpu"))(3, 1):
            drawn.append(torch.rand(()).item())
    assert drawn[:2] == drawn[2:4] and len(set(drawn[::2])) == 3
