"""What parts see: boxes at a scale, resampled with anti-aliasing, in 1D, 2D and 3D; one of several views an update."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import RELATIVE, RUN, images, shake, sum_error
from torch import nn

import timm_dd
from timm_dd import Box, Domain, SplitError, View
from timm_dd.cli import main
from timm_dd.storage.files import part_name
from timm_dd.train import options
from timm_dd.train.engines import Engine, Packed
from timm_dd.train.learner import Learner
from timm_dd.train.run import Run


def triangle(n, m):
    """The matrix (m, n) of a triangle filter as wide as a coarse pixel, for n pixels on m."""
    scale = n / m
    centres = (np.arange(m) + 0.5) * scale
    weights = np.maximum(0, 1 - abs(np.arange(n) + 0.5 - centres[:, None]) / scale)
    return torch.from_numpy(weights / weights.sum(1, keepdims=True))


@pytest.mark.parametrize(
    "start, extent, size", [((3,), (20,), (7,)), ((0, 4), (13, 16), (9, 4)), ((1, 0, 2), (6, 8, 5), (4, 3, 5))]
)
def test_views_by_value(start, extent, size):
    x = images(2, 3, *(s + e + 2 for s, e in zip(start, extent)))
    expected = Box(start, extent).crop(x)
    for axis, (n, m) in enumerate(zip(extent, size), start=2):
        expected = torch.tensordot(triangle(n, m), expected, ([1], [axis])).movedim(0, axis)
    found = View(Box(start, extent), size).crop(x)
    assert found.shape == (2, 3, *size)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_view_of_an_image_is_torchs_anti_aliased_resize(dtype):
    x = images(2, 3, 32, 32).to(dtype).contiguous(memory_format=torch.channels_last)
    (view,) = set(Domain.full(4, scale=0.625).views((32, 32)))
    exact = F.interpolate(x.float() if dtype is torch.bfloat16 else x, (20, 20), mode="bilinear", antialias=True)
    assert view.crop(x).dtype == dtype
    torch.testing.assert_close(view.crop(x), exact.to(dtype))


def test_a_view_at_scale_1_is_no_copy():
    x = images(1, 3, 32, 32)
    for view, box in zip(Domain.grid(2, 2).views((32, 32)), Domain.grid(2, 2).boxes((32, 32))):
        assert view.crop(x).data_ptr() == box.crop(x).data_ptr() and torch.equal(view.crop(x), box.crop(x))


SCALED = [
    (Domain.full(4, scale=0.625), (32, 24), [(20, 15)] * 4),
    (Domain.grid(2, 2, overlap=4, scale=0.5), (32, 32), [(10, 10)] * 4),
    (Domain.centered8(scale=0.3), (20,), [(3,)] * 8),
    (Domain.type_b(2, 3, scale=0.01), (4, 4, 4), [(1, 1, 1)] * 9),
    (Domain.custom([Box((0,), (5,)), Box((1,), (6,))], scale=0.5), (8,), [(3,), (3,)]),
]


@pytest.mark.parametrize("domain, size, expected", SCALED, ids=[str(d) for d, *_ in SCALED])
def test_sizes_of_views(domain, size, expected):
    """Halves are rounded up, and no view is without pixels; JSON and back."""
    assert [v.size for v in domain.views(size)] == expected
    assert Domain.from_json(json.loads(json.dumps(domain.to_json()))) == domain
    assert f"scale {domain.scale:g}" in str(domain)


def test_a_plan_says_its_scale_only_where_it_has_one():
    for domain, said in ((Domain.full(4), False), (Domain.full(4, scale=0.5), True)):
        plan = timm_dd.plan("resnet18", 4, domain=domain, img_size=64)
        assert ("scale" in plan.to_json()["domain"]) == said
        assert timm_dd.Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    assert "full image, 4 parts, scale 0.5: 32×32 of 64×64 pixels" in plan.text()


@pytest.mark.parametrize("scale", [0, -0.5, 1.01, float("nan"), float("inf"), "half", True, None])
def test_no_other_scale(scale):
    for make in (
        lambda: Domain.full(2, scale=scale),
        lambda: Domain.from_json({"kind": "Full", "parts": 2, "scale": scale}),
    ):
        with pytest.raises(SplitError, match="a number above 0 and at most 1"):
            make()


def convolutions(axes):
    conv, norm, pool = (
        (nn.Conv1d, nn.BatchNorm1d, nn.AdaptiveAvgPool1d),
        (nn.Conv2d, nn.BatchNorm2d, nn.AdaptiveAvgPool2d),
        (nn.Conv3d, nn.BatchNorm3d, nn.AdaptiveAvgPool3d),
    )[axes - 1]
    return nn.Sequential(
        conv(2, 8, 3, padding=1), norm(8), nn.ReLU(), conv(8, 8, 3, stride=2), pool(1), nn.Flatten(), nn.Linear(8, 5)
    )


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_scaled_parts_are_those_of_whole_images(axes):
    """Theorem 2.1 (2) on whole images, whatever the parts have seen; `verify` holds them to that alone."""
    size = (12, 16, 10)[:axes]
    parts = timm_dd.split(
        convolutions(axes), 4, domain=Domain.full(4, scale=0.5), example_input=torch.empty(1, 2, *size)
    )
    assert parts.plan.exact and parts(torch.randn(2, 2, *size)).shape == (4, 2, 5)
    shake(parts)
    model = timm_dd.merge(parts)
    assert sum_error(parts, model, images(2, 2, *size)) < RELATIVE
    report = timm_dd.verify(model, parts)
    assert report.failures == [] and report.whole < 1e-9 and report.box is None
    assert "(2.15) says nothing of views at another scale" in report.text()
    with torch.no_grad():
        next(model.parameters()).mul_(1.01)
    assert timm_dd.verify(model, parts).failures


def test_a_scaled_view_is_what_profile_counts():
    whole, half = (timm_dd.profile("resnet18", 4, domain=Domain.full(4, scale=s), img_size=64) for s in (1.0, 0.5))
    assert half.part_input_size == (3, 32, 32) and half.whole == whole.whole
    assert (
        half.part.multiply_adds
        == timm_dd.profile("resnet18", 4, domain=Domain.grid(2, 2), img_size=64).part.multiply_adds
    )


POSITIONS = "weights for the positions of a part's map"
BAD = [
    (lambda: timm_dd.split("dd_vgg3", 4, domain=Domain.full(4, scale=0.5)), POSITIONS),
    (lambda: timm_dd.split("dd_vgg3", 4, domain=Domain.grid(2, 2, overlap=16, scale=0.5)), POSITIONS),
    (
        lambda: timm_dd.split(nn.Linear(9, 4), 1, domain=Domain.full(1, scale=0.5), example_input=torch.empty(1, 9)),
        "use scale 1|a larger scale",
    ),
    (lambda: timm_dd.split("vgg11", 4, domain=Domain.full(4, scale=0.1), img_size=224), "a larger scale"),
    (
        lambda: timm_dd.split(
            nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 3, 3, padding=1)), 2,
            domain=Domain.full(2, scale=0.5), example_input=torch.empty(1, 3, 8, 8), reconstruct=True,
        ),
        "reconstruct is for boxes at scale 1",
    ),
]  # fmt: skip


@pytest.mark.parametrize("make, message", BAD, ids=["fc", "fc of boxes", "features", "too small", "reconstruct"])
def test_bad_scales(make, message):
    with pytest.raises(SplitError, match=message) as e:
        make()
    assert "\n" not in str(e.value)


def test_positions_that_all_sizes_share_may_be_read():
    """A map that is pooled to a fixed size is the same in the part."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 4))
    parts = timm_dd.split(net, 2, domain=Domain.full(2, scale=0.5), example_input=torch.empty(1, 3, 16, 16))
    assert parts.plan.exact
    shake(parts)
    assert sum_error(parts, timm_dd.merge(parts), images(2, 3, 16, 16)) < RELATIVE


# ---- training


def learners(folder, *given):
    args = options.parse([*RUN, "--parts", "2", *given])
    parts = timm_dd.split("test_resnet", 2, domain=options.domain(args), seed=0, img_size=32, num_classes=10)
    views = [d.views((32, 32)) for d in options.views(args)]
    made = []
    for k, part in enumerate(parts):
        made.append(Learner(str(k), part, parts.plan.views()[k], args, torch.device("cpu"), 4, 8, k, folder))
        made[-1].sight.draws = [v[k] for v in views] or made[-1].sight.draws
    return made


def test_parts_draw_the_same_views(tmp_path):
    """One of the list each update, all parts the same of it; evaluated on their own."""
    some, x = learners(tmp_path, "--views", "full@0.5,box,full@0.625", "--grid", "1x2"), torch.randn(2, 3, 32, 32)
    seen = []
    for update in range(60):
        for n in some:
            n.updates = update
        shapes = {tuple(n.view(x).shape[2:]) for n in some}
        assert len(shapes) == 1
        seen += shapes
    counts = [seen.count(s) for s in ((16, 16), (32, 20), (20, 20))]
    assert sum(counts) == 60 and min(counts) > 10
    assert not torch.equal(some[0].sight.own.crop(x), some[1].sight.own.crop(x))
    for engine in (Engine(), Packed()):
        engine.step(some, torch.randn(8, 3, 32, 32), torch.arange(8), isolate_failures=False)


@pytest.mark.parametrize("text", ["full@0", "full@2", "half", "box@", "full@x", "full,,box"])
def test_no_other_views(text, tmp_path, capsys):
    assert main(["train", *RUN, "--parts", "2", "--views", text, "--output", str(tmp_path)]) == 1
    assert "expected box or full, or either at a scale, like full@0.5" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_no_views_of_networks_that_read_positions(tmp_path, capsys):
    given = [a for a in RUN if a not in ("--drop-path", "0.2")]
    assert main(["train", *given, "--model", "dd_vgg3", "--views", "full,box", "--output", str(tmp_path)]) == 1
    assert "dd_vgg3 reads positions" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "given", [["--grid", "full", "--overlap", "0", "--part-scale", "0.5"], ["--views", "full@0.5,box"]]
)
def test_runs_with_views(given, tmp_path, capsys):
    """Repeated they give the same bytes; with other views they are another run."""
    arguments = ["train", *RUN, "--parts", "2", "--part-epochs", "1", *given, "--output", str(tmp_path)]
    for name in ("a", "b"):
        assert main([*arguments, "--experiment", name]) == 0
    a, b = (tmp_path / name / "parts" / "1" / part_name(1, 2) for name in ("a", "b"))
    assert a.read_bytes() == b.read_bytes()
    assert (" ".join(given[:2])) in json.loads((tmp_path / "a" / "summary.json").read_text())["command"]
    other = ["--part-scale", "0.7"] if "--part-scale" in given else ["--views", "box"]
    assert main([*arguments, *other, "--experiment", "a", "--resume"]) == 1
    assert "another model or split" in (said := capsys.readouterr().err) or "with other options" in said


@pytest.mark.parametrize("shift, size", [("0", 16), ("2", 32)])
def test_random_resized_crops_are_resampled_once(shift, size, tmp_path, monkeypatch):
    """Images of which timm takes a random resized crop are made at the size of the view, those that are shifted not."""
    given = ["--parts", "2", "--grid", "full", "--overlap", "0", "--part-scale", "0.5", "--shift", shift]
    shapes, seen, step, logits = set(), set(), Learner.step, Learner.logits

    def noted(learner, x, y):
        shapes.add((learner.name, x.shape[-1], learner.view(x).shape[-1]))
        step(learner, x, y)

    def noted_logits(learner, x):
        seen.add((learner.name, x.shape[-1]))
        return logits(learner, x)

    monkeypatch.setattr(Learner, "step", noted)
    monkeypatch.setattr(Learner, "logits", noted_logits)
    args = options.parse([*RUN, *given, "--part-epochs", "1", "--engine", "sequential", "--output", str(tmp_path)])
    Run(args).go()
    assert shapes == {("part 0", size, 16), ("part 1", size, 16), ("composed model", 32, 32)}
    assert {width for _, width in seen} == {32}
