"""Views: a box at a scale, by value; what is planned, counted, verified, merged and trained on it."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import RUN, Plain, bytes_of_parts, check_split, images, shake
from safetensors.torch import load_file
from torch import nn

import timm_dd
from timm_dd import Box, Domain, SplitError, TrainError, console
from timm_dd.cli import main
from timm_dd.planning.planner import analyse
from timm_dd.reports.claims import claims
from timm_dd.reports.verify import verify
from timm_dd.train.images import data
from timm_dd.train.settings import options, views
from timm_dd.train.updates.learner import Learner

CPU, HALF = torch.device("cpu"), Domain.full(4, scale=0.5)
RESNET = {"num_classes": 10, "img_size": 32}


# ---- by value


def triangle(n, m):
    """Rows of weights by which m pixels are made of n: a triangle as wide as two of the m, cut at the borders."""
    step = n / m
    distance = np.abs((np.arange(m)[:, None] + 0.5) * step - (np.arange(n) + 0.5)) / step
    weights = np.maximum(0, 1 - distance)
    return torch.from_numpy(weights / weights.sum(1, keepdims=True))


@pytest.mark.parametrize(
    "image, box, scale, size",
    [
        ((31,), Box((3,), (20,)), 0.5, (10,)),
        ((32,), Box((0,), (32,)), 0.03, (1,)),
        ((32, 30), Box((2, 3), (25, 17)), 0.625, (16, 11)),
        ((9, 14, 12), Box((1, 0, 2), (8, 13, 10)), 0.7, (6, 9, 7)),
    ],
    ids=str,
)
def test_a_view_is_its_box_under_a_triangle_filter(image, box, scale, size):
    x, view = images(2, 3, *image), box.view(scale)
    expected = box.crop(x)
    for axis, (n, m) in enumerate(zip(box.extent, size), start=2):
        expected = torch.tensordot(expected, triangle(n, m), ([axis], [1])).movedim(-1, axis)
    assert view.size == size and view.scaled
    torch.testing.assert_close(view.crop(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_in_two_dimensions_it_is_what_torch_interpolates(dtype, layout):
    x = images(2, 3, 32, 32).to(dtype, memory_format=layout)
    wide = x if dtype in (torch.float32, torch.float64) else x.float()
    expected = F.interpolate(wide[:, :, 12:, :20], size=(10, 10), mode="bilinear", antialias=True, align_corners=False)
    found = Box((12, 0), (20, 20)).view(0.5).crop(x)
    assert found.dtype == dtype and torch.equal(found, expected.to(dtype))
    assert found.is_contiguous(memory_format=layout)


def test_a_view_at_scale_one_is_a_view_of_the_batch():
    x = torch.randn(2, 3, 32, 32)
    for view in Domain.grid(2, 2, overlap=4, scale=1).views((32, 32)):
        found = view.crop(x)
        assert not view.scaled and torch.equal(found, view.box.crop(x))
        assert found.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()


def test_parts_see_the_views_of_their_domain():
    parts = timm_dd.split("dd_resnet20_16", 4, domain=Domain.grid(2, 2, overlap=4, scale=0.6), num_classes=10).eval()
    x = torch.randn(2, 3, 32, 32)
    expected = F.interpolate(x[:, :, 12:, :20], size=(12, 12), mode="bilinear", antialias=True)
    assert torch.equal(parts.crops(x)[2], expected)
    assert torch.equal(parts(x)[2], parts[2](expected))
    assert "grid 2x2, overlap 4, scale 0.6: 12×12 of 32×32 pixels" in str(parts.plan)


# ---- files


@pytest.mark.parametrize(
    "make",
    [
        lambda **scale: Domain.full(3, **scale),
        lambda **scale: Domain.grid(2, 3, overlap=1, margin=2, **scale),
        lambda **scale: Domain.centered8(2, 1, **scale),
        lambda **scale: Domain.type_b(2, axes=3, **scale),
        lambda **scale: Domain.custom([Box((1,), (2,))], **scale),
    ],
)
def test_domains_with_a_scale_are_json(make):
    scaled, plain = make(scale=0.3), make()
    written = json.loads(json.dumps(scaled.to_json()))
    assert Domain.from_json(written) == scaled != plain
    assert written.pop("scale") == 0.3 and written == json.loads(json.dumps(plain.to_json()))
    assert Domain.from_json({**written, "scale": 1}) == plain


@pytest.mark.parametrize("scale", [0, -1, 1.01, float("nan"), float("inf"), "0.5", None, True, [1]])
def test_a_scale_is_above_zero_and_up_to_one(scale):
    with pytest.raises(SplitError, match="scale is a number above 0, up to 1"):
        Domain.full(4, scale=scale)
    with pytest.raises(SplitError, match="scale is a number above 0, up to 1"):
        Domain.from_json({"kind": "Full", "parts": 4, "scale": scale})


def test_a_scaled_split_merges_as_any(tmp_path):
    """The merged network is the sum of its parts on whole images, in memory and from files, and splits back."""
    parts = timm_dd.split("dd_resnet20_16", 4, domain=Domain.full(4, scale=0.625), seed=1, **RESNET)
    check_split(parts)
    parts.save(tmp_path / "parts")
    plan = json.loads((tmp_path / "parts/plan.json").read_text())
    assert plan["domain"] == {"kind": "Full", "parts": 4, "scale": 0.625}
    assert timm_dd.Parts.load(tmp_path / "parts").plan == parts.plan
    timm_dd.merge_files(tmp_path / "parts", tmp_path / "composed")
    found, expected = load_file(tmp_path / "composed/model.safetensors"), timm_dd.merge(parts).state_dict()
    assert all(torch.equal(found[name], t) for name, t in expected.items())


def test_the_scale_changes_nothing_but_what_parts_see():
    plain, scaled = (timm_dd.plan("dd_resnet20_16", 4, domain=Domain.full(4, scale=s), **RESNET) for s in (1, 0.625))
    assert "scale" not in plain.to_json()["domain"] and plain.digest() != scaled.digest()
    assert (plain.tensors, plain.edits, plain.exact) == (scaled.tensors, scaled.edits, scaled.exact)


# ---- what is counted and claimed


def test_a_view_costs_what_a_box_of_its_size_does():
    boxes = Domain.custom([Box((0, 0), (20, 20))] * 4)
    of_view, of_box = (
        timm_dd.profile("dd_resnet20_16", 4, domain=d, **RESNET) for d in (Domain.full(4, scale=0.625), boxes)
    )
    assert of_view.part == of_box.part and of_view.part_input_size == (3, 20, 20)


@pytest.mark.parametrize("domain", [Domain.full(4, scale=0.625), Domain.grid(2, 2, overlap=4, scale=0.8)], ids=str)
def test_nothing_is_claimed_of_scaled_views(domain):
    """Whole images are compared as ever; labelled ones without the claims of theorem 2.2."""
    parts = shake(timm_dd.split("dd_resnet20_16", 4, domain=domain, seed=1, **RESNET))
    batches = [(images(8, 3, 32, 32), torch.arange(8))]
    report = verify(timm_dd.merge(parts).double(), parts, batches=batches)
    assert report.exact and report.whole <= 1e-12 and all(row.whole <= 1e-12 for row in report.layers)
    assert report.box is None and all(row.box is None for row in report.layers) and not report.box_exact
    assert report.failures == [] and "(2.15) does not apply to scaled views" in report.text()
    plain = timm_dd.split("dd_resnet20_16", 4, domain=Domain.full(4), seed=1, **RESNET)
    assert "does not apply" not in verify(timm_dd.merge(plain), plain).text()


def test_no_map_of_a_scaled_view_is_said_to_be_the_global_one():
    parts = timm_dd.split(Fixed(nn.AdaptiveAvgPool2d(1), 1), 4, example_input=torch.empty(1, 3, 16, 16), domain=HALF)
    rows, outputs = claims(analyse(parts.graph, 4, HALF, (3, 16, 16)))
    assert rows and outputs and all(c.exact and not c.aligned and set(c.places) == {None} for c in (*rows, *outputs))


def test_a_scaled_split_that_does_not_add_up_is_found():
    parts = timm_dd.split("dd_resnet20_16", 4, domain=Domain.full(4, scale=0.625), seed=1, **RESNET)
    model = timm_dd.merge(parts)
    model.fc.weight.data[0, 0] += 1
    assert "sum of the parts' outputs, whole image" in " ".join(verify(model, parts).failures)


class Fixed(nn.Module):
    """Its fully connected layer sees four positions, whatever the image's size, or all of them."""

    def __init__(self, pool, positions):
        super().__init__()
        self.conv, self.pool, self.fc = nn.Conv2d(3, 8, 3), pool, nn.Linear(8 * positions, 5)

    def forward(self, x):
        return self.fc(torch.flatten(self.pool(self.conv(x)), 1))


def test_a_map_of_a_fixed_size_may_be_read_position_by_position():
    net, x = Fixed(nn.AdaptiveAvgPool2d(2), 4), torch.empty(1, 3, 16, 16)
    check_split(timm_dd.split(net, 4, example_input=x, domain=Domain.full(4, scale=0.5)))


def of_module(net, shape, **options):
    return lambda: timm_dd.split(net, 4, example_input=torch.empty(1, *shape), **options)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: timm_dd.plan("vgg11", 4, domain=HALF, img_size=224),
         "reads the positions of a map, .*global pooling; use scale 1"),
        (of_module(Fixed(nn.Identity(), 196), (3, 16, 16), domain=HALF),
         "^fc.weight reads the positions of a map"),
        (of_module(Plain(8), (3, 16, 16), domain=HALF, reconstruct=True), "reconstruct gives"),
        (of_module(nn.Linear(16, 4), (16,), domain=HALF), "not for the features of an input of 16"),
        (of_module(Fixed(nn.AdaptiveAvgPool2d(1), 1), (3, 16, 16), domain=Domain.full(4, scale=0.1)),
         "does not work on a part's view of 2×2 pixels .* use a larger scale"),
        (of_module(Fixed(nn.AdaptiveAvgPool2d(1), 1), (3, 16, 16), domain=Domain.custom([Box((0, 0), (2, 2))] * 4)),
         "does not work on a part's box of 2×2 pixels .* use larger boxes"),
    ],
)  # fmt: skip
def test_what_scales_are_not_for(make, message):
    with pytest.raises(SplitError, match=message) as e:
        make()
    assert "\n" not in str(e.value)


def test_on_the_command_line(tmp_path, capsys):
    given = ["dd_resnet20_16", "4", "--grid", "full", "--part-scale", "0.625"]
    assert main(["plan", *given]) == 0 and "scale 0.625: 20×20 of 32×32 pixels" in capsys.readouterr().out
    assert main(["profile", *given, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["part_input_size"] == [3, 20, 20]
    assert (
        main(["plan", *given, "--domain-png", str(tmp_path / "boxes.png")]) == 0 and (tmp_path / "boxes.png").exists()
    )
    assert main(["split", *given, "-o", str(tmp_path / "parts")]) == 0
    assert timm_dd.Parts.load(tmp_path / "parts").plan.domain == Domain.full(4, scale=0.625)
    capsys.readouterr()
    for grid in ("2x2", "centered8", "type-b"):
        assert main(["plan", "dd_resnet20_16", "8" if grid == "centered8" else "5" if grid == "type-b" else "4",
                     "--grid", grid, "--part-scale", "0.5"]) == 0  # fmt: skip
        assert ", scale 0.5: 8×8 of" in capsys.readouterr().out
    assert main(["split", *given, "-o", str(tmp_path / "none"), "--part-scale", "1.5"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "scale is a number above 0, up to 1 for all pixels, got 1.5" in line and not (tmp_path / "none").exists()


# ---- training


class Keeps(nn.Linear):
    """A network that keeps what it sees."""

    def __init__(self):
        super().__init__(3, 10)
        self.seen = []

    def forward(self, x):
        self.seen.append(x)
        return super().forward(x.mean((2, 3)))


def part_learner(plan, k, folder, *given):
    args = options.parse([*RUN, *given])
    net = Learner(f"part {k}", Keeps(), plan.views()[k], args, CPU, 300, 2, args.seed * 1000 + k, folder)
    net.sight.draws = views.of_part(args, plan, k)
    return net


def test_each_update_draws_a_view_for_all_parts(tmp_path):
    """From the seed and the update's number alone, each as often; a part is evaluated on its own."""
    plan = timm_dd.plan("dd_resnet20_16", 4, domain=Domain.grid(2, 2, overlap=4, scale=0.8), **RESNET)
    x, y, given = torch.randn(2, 3, 32, 32), torch.tensor([1, 2]), ("--views", "full@0.5,box,box@0.4")
    expected = {}
    for size, crop in ((16, x), (16, x[:, :, 12:, 12:]), (8, x[:, :, 12:, 12:])):
        expected[len(expected)] = F.interpolate(crop, size=(size, size), mode="bilinear", antialias=True)
    first, last = (part_learner(plan, k, tmp_path, *given) for k in (0, 3))
    for _ in range(150):
        first.step(x, y)
        last.step(x, y)
    kinds = [next(i for i, e in expected.items() if torch.equal(e, seen)) for seen in last.net.seen]
    assert all(40 <= kinds.count(i) <= 60 for i in expected), kinds
    for kind, seen in zip(kinds, first.net.seen):
        box = x if kind == 0 else x[:, :, :20, :20]
        assert torch.equal(seen, F.interpolate(box, size=expected[kind].shape[2:], mode="bilinear", antialias=True))
    again = part_learner(plan, 3, tmp_path, *given)
    again.updates = 100  # as a checkpoint says
    again.step(x, y)
    assert torch.equal(again.net.seen[0], last.net.seen[100])
    other = part_learner(plan, 3, tmp_path, *given, "--seed", "1")
    for _ in range(20):
        other.step(x, y)
    assert [s.shape for s in other.net.seen] != [s.shape for s in last.net.seen[:20]]
    last.logits(x)
    assert torch.equal(last.net.seen[-1], expected[1])


def test_a_view_roams(tmp_path):
    """Its box moves, at its scale."""
    plan = timm_dd.plan("dd_resnet20_16", 4, domain=Domain.grid(2, 2, scale=0.5), **RESNET)
    x = torch.arange(32.0).expand(2, 3, 32, 32)
    net = part_learner(plan, 0, tmp_path, "--roam", "1")
    for _ in range(200):
        net.step(x, torch.tensor([1, 2]))
    inner = Box((0, 0), (16, 16)).view(0.5).crop(x)
    offsets = {round(float((seen - inner)[0, 0, 0, 3]), 3) for seen in net.net.seen}
    assert offsets == set(range(17)) and {s.shape[2:] for s in net.net.seen} == {(8, 8)}


@pytest.mark.parametrize(
    "grid, scale, given, expected",
    [
        ("full", "0.5", ["--shift", "0"], (16, 16)),
        ("1x1", "0.5", ["--shift", "0", "--parts", "1"], (16, 16)),
        ("full", "0.5", ["--shift", "2"], None),
        ("full", "0.5", ["--shift", "2", "--part-shift", "0"], (16, 16)),
        ("full", "0.5", ["--shift", "0", "--no-aug"], None),
        ("full", "0.5", ["--shift", "0", "--train-crop-mode", "rkrc"], None),
        ("full", "0.5", ["--shift", "0", "--views", "box"], None),
        ("full", "1", ["--shift", "0"], None),
        ("2x2", "0.5", ["--shift", "0"], None),
    ],
)
def test_random_crops_onto_a_view_are_one_resampling(grid, scale, given, expected):
    """The training loader gives images of the view's size, which the parts take as they are; the other loader, and
    what the parts are evaluated on, is as ever."""
    arguments = ["--overlap", "0", "--grid", grid, "--part-scale", scale, "--model", "dd_resnet20_16", *given]
    args = options.stage_options(options.parse([*RUN, *arguments]), "part")
    plan = timm_dd.plan(args.model, args.parts, domain=console.domain(args), **RESNET)
    size = views.loader_size(args, plan)
    assert size == expected
    assert (views.of_part(args, plan, 0) == (None,)) == (size is not None)
    train, val, _ = data.datasets(args)
    config = data.data_config(args, timm_dd.models.create(args.model, num_classes=10))
    loaders = data.loaders(args, config, train, val, CPU, distributed=False, train_size=size)
    seen, validated = (next(iter(loader))[0].shape[2:] for loader in loaders)
    assert seen == (size or (32, 32)) and validated == (32, 32)


def run(folder, name, *given):
    arguments = [
        *RUN,
        "--parts",
        "2",
        "--epochs",
        "0",
        "--val-num-samples",
        "64",
        "--output",
        str(folder),
        "--experiment",
        name,
        *given,
    ]
    return main(["train", *arguments])


def test_a_run_on_scaled_views(tmp_path, capsys):
    """Whole images at a scale; it is not resumed at another one."""
    given = ["--overlap", "0", "--grid", "full", "--part-scale", "0.75", "--shift", "0", "--part-epochs", "1"]
    assert run(tmp_path, "run", *given) == 0
    folder = tmp_path / "run"
    assert timm_dd.Parts.load(folder / "parts").plan.domain == Domain.full(2, scale=0.75)
    assert "--part-scale 0.75" in json.loads((folder / "summary.json").read_text())["command"]
    capsys.readouterr()
    assert run(tmp_path, "run", *given, "--part-scale", "0.5", "--resume") == 1
    assert "holds a run of another model or split" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_that_draws_views_goes_on_with_the_same_bits(tmp_path, monkeypatch, capsys):
    given = ["--views", "full@0.5,box"]
    assert run(tmp_path, "whole", *given) == 0
    step = Learner.step

    def fail(self, x, y):
        if self.name == "part 1" and self.updates == 3:
            raise RuntimeError("out of luck")
        step(self, x, y)

    monkeypatch.setattr(Learner, "step", fail)
    assert run(tmp_path, "run", *given) == 1
    monkeypatch.setattr(Learner, "step", step)
    capsys.readouterr()
    assert run(tmp_path, "run", "--views", "full,box", "--resume") == 1
    assert "--views was full@0.5,box, not full,box" in capsys.readouterr().err
    assert run(tmp_path, "run", *given, "--resume") == 0
    assert bytes_of_parts(tmp_path / "run", 2) == bytes_of_parts(tmp_path / "whole", 2)
    assert run(tmp_path, "box") == 0
    assert bytes_of_parts(tmp_path / "box", 2) != bytes_of_parts(tmp_path / "whole", 2)
    command = json.loads((tmp_path / "run/summary.json").read_text())["command"]
    assert "--views full@0.5,box" in command and "views: full@0.5,box" in (tmp_path / "run/args.yaml").read_text()


@pytest.mark.slow
def test_packed_parts_draw_the_same_views(tmp_path):
    for engine in ("sequential", "packed"):
        given = ["--views", "full@0.5,box,box@0.8", "--engine", engine, "--lr", "0.01", "--part-epochs", "1"]
        assert run(tmp_path, engine, *given, "--drop-path", "0") == 0
    for k in range(2):
        one, packed = (
            load_file(next((tmp_path / engine / "parts" / str(k)).glob("part*.safetensors")))
            for engine in ("sequential", "packed")
        )
        assert max(float((one[name].double() - packed[name].double()).abs().max()) for name in one) < 1e-3


@pytest.mark.parametrize("views", ["half", "full@0", "full@2", "box@", "full@x", "full,,box", ""])
def test_views_that_are_none(views, tmp_path, capsys):
    with pytest.raises(SystemExit) as e:
        run(tmp_path, "run", "--views", views)
    assert e.value.code == 2 and "expected box or full" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "given, message",
    [
        (["--model", "dd_vgg3", "--grid", "1x2", "--views", "box,full"], "--views full: dd_vgg3 reads positions"),
        (["--model", "dd_vgg3", "--grid", "full", "--views", "box@0.5"],
         "--views box@0.5: head.1.weight reads the positions of a map"),
        (["--part-scale", "0"], "scale is a number above 0"),
    ],
)  # fmt: skip
def test_views_on_which_the_parts_would_be_others(given, message, tmp_path, capsys):
    data_set = ["--dataset", "digits", "--output", str(tmp_path), "--experiment", "run"]
    assert main(["train", *data_set, "--parts", "2", *given]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line and not list(tmp_path.iterdir())


def test_the_same_part_runs_on_every_view_of_a_network_with_global_pooling():
    parts = timm_dd.split("dd_resnet20_16", 4, domain=Domain.grid(2, 2, overlap=4), **RESNET)
    views.check(options.parse([*RUN, "--views", "full,box,full@0.5,box@0.25"]), parts)
    with pytest.raises(TrainError, match="--views full@0.5: "):
        views.check(options.parse([*RUN, "--views", "full@0.5"]), timm_dd.split("dd_vgg3", 4, domain=Domain.full(4)))
