"""The tables that a report's figures are drawn from, against the run's files and definitions computed by hand."""

import csv
import dataclasses
import html
import io
import json
import math
import re
import shutil
import sys
import types

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from safetensors.torch import load_file
from torch import nn

import timm_dd
from timm_dd.algebra.view import Box
from timm_dd.cli import main
from timm_dd.reports import blocks, boxes, cam, curves, decisions, draw, features, networks, outcome, sections
from timm_dd.reports.networks import Samples
from timm_dd.reports.record import read
from timm_dd.train import pages
from timm_dd.train.epochs import trackers
from timm_dd.train.settings import options

pytest.importorskip("matplotlib")


def summary_csv(path):
    with open(path / "summary.csv") as f:
        return list(csv.DictReader(f))


def json_of(path):
    return json.loads(path.read_text())


def drawn(drawing):
    """The figure can be drawn."""
    assert drawing.png().startswith(b"\x89PNG") and b"<svg" in drawing.svg and drawing.alt
    return drawing.inline()


# ---- curves and times


def test_curves_are_those_of_the_csv(one):
    table = curves.rows(read(one))
    own = [summary_csv(one / "parts" / str(k)) for k in range(4)]
    ends = max(float(rows[-1]["seconds"]) for rows in own)
    for name, rows, epochs, seconds in (
        ("part 2", own[2], 0, 0),
        ("composed", summary_csv(one / "global"), 2, ends),
        ("baseline", summary_csv(one / "baseline"), 0, 0),
    ):
        found = [row for row in table if row["name"] == name]
        assert [row["epoch"] for row in found] == [int(row["epoch"]) + 1 + epochs for row in rows]
        assert [row["top1"] for row in found] == [float(row["eval_top1"]) for row in rows]
        assert [row["loss"] for row in found] == [float(row["train_loss"]) for row in rows]
        assert [row["seconds"] for row in found] == pytest.approx([float(row["seconds"]) + seconds for row in rows])
    (before,) = (row for row in table if row["stage"] == "before")
    assert (before["epoch"], before["top1"]) == (2, json_of(one / "summary.json")["composed"])
    text = drawn(curves.curve(table, "accuracy", "seconds"))
    for row in table:  # each point says its values
        assert f"{row['name']}, epoch {row['epoch']}, {row['seconds']:.1f} s: {row['top1']:.4g}</title>" in text


def test_gradients_that_were_clipped_are_said(one, tmp_path):
    run = shutil.copytree(one, tmp_path / "run")
    path = run / "baseline" / "summary.csv"
    head, *rows = path.read_text().splitlines()
    shares = [20.0 * (1 + i) for i in range(len(rows))]
    path.write_text("\n".join([f"{head},clipped", *(f"{row},{share}" for row, share in zip(rows, shares))]) + "\n")
    said = [text for text in outcome.warnings(read(run)) if "clipped" in text]
    mean, most = f"{sum(shares) / len(shares):.0f}", f"{max(shares):.0f}"
    assert said == [f"{mean} % of the updates of baseline had clipped gradients, at most {most} % in an epoch."]


def test_a_loss_that_is_not_finite_is_said_and_moves_no_title(one, tmp_path):
    run = shutil.copytree(one, tmp_path / "run")
    path = run / "baseline" / "summary.csv"
    rows = summary_csv(run / "baseline")
    path.write_text(path.read_text().replace(rows[1]["train_loss"], "inf"))
    record = read(run)
    assert "The loss of baseline is not finite in 1 epoch, the first is 2." in outcome.warnings(record)
    text = drawn(curves.curve(curves.rows(record), "loss", "epochs"))
    assert re.findall(r"baseline, epoch (\d)", text.partition("</svg>")[0].split("aria-label")[-1])[-2:] == ["1", "3"]


def point(stage, seconds, top1):
    return {"stage": stage, "seconds": seconds, "top1": top1}


def test_how_much_sooner():
    baseline = [point("baseline", 10, 50.0), point("baseline", 20, 90.5), point("baseline", 30, 90.0)]
    assert "after 8.0 s, the baseline itself after 20.0 s: 2.50 times as fast" in outcome.sooner(
        [*baseline, point("composed", 4, 89.0), point("composed", 8, 90.0)]
    )
    assert "2.00 times as long" in outcome.sooner([*baseline, point("composed", 40, 90.0)])
    assert "did not reach the baseline's 90.00 %; its best epoch has 89.00" in outcome.sooner(
        [*baseline, point("composed", 4, 89.0)]
    )
    assert "no baseline" in outcome.sooner([point("composed", 4, 89.0)])
    assert "no fine-tuned model" in outcome.sooner(baseline)


def test_times_add_up_to_those_of_the_run(one):
    record, summary = read(one), json_of(one / "summary.json")
    table, bars = curves.times(record), {}
    for row in table:
        bars[row["bar"]] = bars.get(row["bar"], 0) + row["seconds"]
    assert bars["parts, the slowest"] == pytest.approx(summary["seconds"]["parts"])
    assert bars["baseline"] == pytest.approx(summary["seconds"]["baseline"])
    tuned, macs = float(summary_csv(one / "global")[0]["seconds"]), summary["multiply_adds"]
    (limit,) = {row["limit"] for row in table if row["bar"] == "parts, the slowest"}
    assert limit == pytest.approx(2 * tuned * sum(macs["parts"]) / macs["composed"])
    drawn(curves.time_bars(table))


def test_seconds_that_were_no_training(one):
    """Of each epoch in times.csv; of the statistics in the summary."""
    seconds, table = json_of(one / "summary.json")["seconds"], curves.times(read(one))
    found = {(row["bar"], row["kind"]): row["seconds"] for row in table}
    with open(one / "global" / "times.csv") as f:
        (spent,) = csv.DictReader(f)
    assert spent["epoch"] == "0" and found["compose", "training"] == seconds["compose"] > 0
    assert found["fine-tuning", "statistics"] == seconds["statistics"] > 0
    for kind in ("waiting", "evaluation"):
        assert found["fine-tuning", kind] == float(spent[kind]) > 0
    of_all = sum(s for (bar, _), s in found.items() if bar == "fine-tuning")
    assert of_all == pytest.approx(seconds["composed"])


def test_parts_on_several_ranks_have_two_bars(one, tmp_path):
    """Parts 2 and 3 on a second rank, twice as slow."""
    run = shutil.copytree(one, tmp_path / "run")
    for k in (2, 3):
        rows = summary_csv(run / "parts" / str(k))
        with open(run / "parts" / str(k) / "summary.csv", "w", newline="") as f:
            writer = csv.DictWriter(f, rows[0])
            writer.writeheader()
            writer.writerows({**row, "seconds": 2 * float(row["seconds"])} for row in rows)
    first, macs = float(summary_csv(one / "parts" / "0")[-1]["seconds"]), json_of(run / "summary.json")["multiply_adds"]
    table = curves.times(read(run))
    seconds = {b: sum(row["seconds"] for row in table if row["bar"] == b) for b in (curves.SLOWEST, curves.ALL)}
    assert seconds == pytest.approx({curves.SLOWEST: 2 * first, curves.ALL: 3 * first})
    limits = {row["bar"]: row["limit"] for row in table}
    share = sum(macs["parts"][2:]) / sum(macs["parts"])
    assert limits[curves.SLOWEST] == pytest.approx(share * limits[curves.ALL])


def test_bands_are_the_range_over_seeds():
    rows = [
        {"group": "a", "run": run, "stage": "composed", "epoch": epoch, "seconds": s, "top1": top1, "loss": 1.0}
        for run, epoch, s, top1 in (("x", 1, 10, 50), ("y", 1, 20, 60), ("z", 1, 30, 10), ("x", 2, 40, 70))
    ]
    (found,) = curves.banded(rows, "top1")  # one run alone has a second epoch
    assert found == {
        "group": "a", "stage": "composed", "epoch": 1, "runs": 3, "seconds": 20, "mean": 40, "low": 10, "high": 60,
    }  # fmt: skip
    drawn(curves.bands(rows, "accuracy", "seconds"))


def test_runs_that_differ_in_their_seed_alone_are_one_group(one, tmp_path):
    copies = [shutil.copytree(one, tmp_path / name) for name in ("b", "c")]
    for path, change in zip(copies, ({"seed": 7, "experiment": "b"}, {"lr": 0.1})):
        args = yaml.safe_load((path / "args.yaml").read_text())
        (path / "args.yaml").write_text(yaml.safe_dump({**args, **change}))
    groups = sections.grouped([read(p) for p in (one, *copies)])
    assert [(name, record.name) for name, record in groups] == [("one", "one"), ("one", "b"), ("c", "c")]


# ---- boxes


def test_boxes_overlap_and_margin():
    domain = timm_dd.Domain.grid(2, 2, overlap=4, margin=2)
    plan = timm_dd.plan("test_resnet", 4, domain=domain, img_size=24, num_classes=10)
    table = boxes.rows(plan)
    assert [(row["start"], row["stop"]) for row in table] == [
        (b.start, tuple(s + e for s, e in zip(b.start, b.extent))) for b in plan.boxes()
    ]
    count = boxes.cover(table, (24, 24))
    expected = np.zeros((24, 24), int)
    for box in plan.boxes():
        for i in range(box.start[0], box.start[0] + box.extent[0]):
            for j in range(box.start[1], box.start[1] + box.extent[1]):
                expected[i, j] += 1
    assert (count == expected).all() and (count[:2] == 0).all() and count.max() == 4
    assert "margin" in drawn(boxes.boxes(plan, np.zeros((24, 24, 3))))


# ---- weights


def test_block_norms_by_hand(one):
    before, after = (load_file(one / name / "model.safetensors") for name in ("composed", "global/last"))
    plan = read(one).plan
    table = {row["layer"]: row for row in blocks.rows(plan, before, after)}
    name = "layer2.0.conv1"
    w = after[f"{name}.weight"].double()
    assert w.shape[0] % 4 == w.shape[1] % 4 == 0 and table.keys() >= {name}
    m, n = w.shape[0] // 4, w.shape[1] // 4
    by_hand = [
        [w[i * m : i * m + m, j * n : j * n + n].square().sum().sqrt().item() for j in range(4)] for i in range(4)
    ]
    assert table[name]["after"] == pytest.approx(np.array(by_hand))
    off = sum(by_hand[i][j] ** 2 for i in range(4) for j in range(4) if i != j)
    assert table[name]["between_after"] == pytest.approx(off / w.square().sum().item())
    assert table[name]["between_before"] == 0 and np.count_nonzero(table[name]["before"]) == 4
    old = before[f"{name}.weight"].double()
    assert table[name]["moved"] == pytest.approx(((w - old).norm() / old.norm()).item())
    drawn(blocks.maps(list(table.values())))
    drawn(blocks.moved(list(table.values())))


def test_layers_are_chosen_evenly():
    assert blocks.evenly(range(11), 3) == [0, 5, 10] and blocks.evenly("ab", 3) == ["a", "b"]


# ---- where they look


class Pooled(nn.Module):
    """Convolution, global pooling, one linear layer; or two of them."""

    def __init__(self, axes=2, hidden=False):
        super().__init__()
        conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[axes]
        self.conv, self.fc = conv(3, 6, 3, padding=1), nn.Linear(6, 4)
        self.hidden = nn.Sequential(nn.Linear(6, 6), nn.Tanh()) if hidden else nn.Identity()

    def features(self, x):
        return torch.relu(self.conv(x))

    def head(self, maps):
        return self.fc(self.hidden(maps.flatten(2).mean(2)))

    def forward(self, x):
        return self.head(self.features(x))


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_cam_is_its_definition(axes):
    """M = Σ_n w_n X_n."""
    net, x, classes = Pooled(axes).eval(), torch.randn(3, 3, *[7] * axes), torch.tensor([2, 0, 2])
    found = cam.maps(net, x, classes)
    with torch.no_grad():
        maps = net.features(x)
        expected = torch.stack([sum(net.fc.weight[c, n] * y[n] for n in range(6)) for c, y in zip(classes, maps)])
    assert found.exact and torch.allclose(found.values, expected, atol=1e-6)


def test_cam_of_a_timm_network(one):
    model = timm_dd.merge(one / "parts").eval()
    x, classes = torch.randn(2, 3, 96, 96), torch.tensor([3, 5])
    found = cam.maps(model, x, classes)
    with torch.no_grad():
        maps = model.forward_features(x)
        expected = torch.einsum("bn,bnhw->bhw", model.get_classifier().weight[classes], maps)
    assert found.exact and torch.allclose(found.values, expected, atol=1e-5)


def test_what_is_not_linear_has_grad_cam():
    """ReLU(Σ_n a_n X_n), a_n the mean over positions of the score's derivative by X_n."""
    net, x, classes = Pooled(hidden=True).eval(), torch.randn(2, 3, 7, 5), torch.tensor([1, 3])
    found = cam.maps(net, x, classes)
    maps = net.features(x).detach().requires_grad_()
    scores = net.head(maps)
    for i, c in enumerate(classes):
        (slope,) = torch.autograd.grad(scores[i, c], maps, retain_graph=True)
        expected = F.relu(sum(slope[i, n].mean() * maps[i, n] for n in range(6)))
        assert torch.allclose(found.values[i], expected.detach(), atol=1e-6)
    assert not found.exact


def test_a_hidden_layer_is_not_linear_though_its_slopes_may_be():
    """Of one image, whose score is linear as far as its hidden units are on."""
    net, x = Pooled(hidden=True).eval(), torch.randn(1, 3, 7, 7)
    net.hidden[1] = nn.ReLU()
    assert not cam.maps(net, x, torch.tensor([1])).exact


def test_without_maps_there_is_no_cam():
    with pytest.raises(timm_dd.ReportError, match="no class activation maps"):
        cam.maps(nn.Sequential(nn.Flatten(), nn.Linear(12, 4)), torch.randn(2, 3, 2, 2), torch.tensor([0, 1]))


def test_a_map_lies_on_the_box_that_was_seen():
    found = cam.Maps(torch.arange(4.0).reshape(1, 2, 2), True)
    row = cam.row("part 1", found, 0, (8, 8), Box((4, 2), (4, 4)))
    seen = row["over"][4:, 2:6]
    assert seen.min() == 0 and seen.max() == 1 and seen[0, 0] == 0 and seen[-1, -1] == 1
    assert np.isnan(row["over"]).sum() == 64 - 16 and (row["map"] == [[0, 1], [2, 3]]).all()
    drawn(cam.look([row], np.zeros((8, 8, 3)), "cat", 0))


# ---- feature maps


def test_feature_maps_are_the_rows_of_verify(one):
    parts = timm_dd.Parts.load(one / "parts")
    model = timm_dd.merge(parts)
    x = torch.randn(1, 3, 32, 32)
    table = features.rows(model, parts, x, 1, ["layer1.0.conv1", "conv1.0"])
    assert [row["layer"] for row in table] == ["layer1.0.conv1", "conv1.0"]
    with torch.no_grad():
        crop = parts.crops(x)[1].double()
        part = parts[1].double().get_submodule("conv1")[0](crop)[0]
        whole = model.double().get_submodule("conv1")[0](x.double())[0]
    row, width = table[1], part.shape[0]
    for c, ours, theirs in zip(row["channels"], row["part"], row["composed"]):
        assert width <= c < 2 * width
        assert np.allclose(ours, part[c - width]) and np.allclose(
            theirs, whole[c][:, -part.shape[2] :][: part.shape[1]]
        )
    assert row["error"] < 1e-12 and 0 < row["field"].mean() < 1
    assert np.allclose(row["part"][row["field"]], row["composed"][row["field"]])
    drawn(features.maps(row, 0))
    with pytest.raises(timm_dd.ReportError, match="no maps of 'nowhere'.*conv1.0"):
        features.rows(model, parts, x, 0, ["nowhere"])


# ---- who is right


def samples(labels, classes=3):
    images = torch.zeros(len(labels), 3, 8, 8)
    return Samples(images, torch.tensor(labels), [f"c{i}" for i in range(classes)], (0.5,) * 3, (0.5,) * 3, "images")


def test_decisions_on_an_image():
    z = {
        "part 0": torch.tensor([[2.0, 0.0, 0.0]]),
        "mean": torch.tensor([[0.2, 0.5, 0.3]]),
        "one": torch.tensor([[3.0]]),
    }
    table = decisions.rows(z, torch.tensor([1]), 0)
    assert [row["class"] for row in table] == [0, 1, 1] and [row["right"] for row in table] == [False, True, True]
    expected = [math.exp(2) / (math.exp(2) + 2), 0.5, 1 / (1 + math.exp(-3))]
    assert [row["probability"] for row in table] == pytest.approx(expected)
    text = drawn(decisions.on_image(table, samples([1]), 0, {}, 0))
    assert "✗ c0 79 %" in text and "✓ c1 50 %" in text and "var(--good)" in text and "var(--bad)" in text


def test_names_of_classes_are_no_formulas():
    odd = dataclasses.replace(samples([1, 0], 2), names=[r"$\frac{x$", "a_$b$"])
    z = {"part 0": torch.tensor([[2.0, 0.0], [2.0, 0.0]])}
    texts = [drawn(decisions.on_image(decisions.rows(z, odd.labels, 0), odd, 0, {}, 0))]
    texts.append(drawn(decisions.class_bars(decisions.by_class({"composed": torch.tensor([0, 0])}, odd, 2))))
    assert all(r"$\frac{x$" in text for text in texts) and "a_$b$" in texts[1]


def test_confusion_accuracy_and_agreement_by_hand():
    labels = [0, 0, 1, 2, 2]
    a, b = torch.tensor([0, 1, 1, 2, 0]), torch.tensor([0, 1, 0, 2, 1])
    given = samples(labels)
    assert decisions.confusion(a, given.labels, 3).tolist() == [[1, 1, 0], [0, 1, 0], [1, 0, 1]]
    table = decisions.by_class({"a": a, "b": b}, given, 3)
    assert [(r["network"], r["class"], r["images"], r["top1"]) for r in table] == [
        ("a", 0, 2, 50.0), ("a", 1, 1, 100.0), ("a", 2, 2, 50.0), ("b", 0, 2, 50.0), ("b", 1, 1, 0.0), ("b", 2, 2, 50.0)
    ]  # fmt: skip
    assert decisions.agreement({"a": a, "b": b}).tolist() == [[1.0, pytest.approx(0.6)], [pytest.approx(0.6), 1.0]]
    chosen = {"composed": a, "mean": b}
    drawn(decisions.confusions(chosen, given, 3))
    drawn(decisions.class_bars(decisions.by_class(chosen, given, 3)))
    drawn(decisions.agreements(chosen))


def test_calibration_by_hand():
    p = torch.tensor([[0.95, 0.05], [0.92, 0.08], [0.45, 0.55], [0.0, 1.0]])
    table = decisions.calibration(p, torch.tensor([0, 1, 1, 1]))
    assert [(row["bin"], row["images"]) for row in table] == [(5, 1), (9, 3)]
    assert [row["accuracy"] for row in table] == pytest.approx([1, 2 / 3])
    assert [row["confidence"] for row in table] == pytest.approx([0.55, (0.95 + 0.92 + 1.0) / 3])
    error = (abs(1 - 0.55) + 3 * abs(2 / 3 - (0.95 + 0.92 + 1.0) / 3)) / 4
    assert decisions.calibration_error(table) == pytest.approx(error)


def test_the_temperature_has_the_smallest_cross_entropy():
    """Of logits that are three times too sure it is three."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(4000, 5, generator=generator)
    y = torch.multinomial(z.softmax(1), 1, generator=generator)[:, 0]
    t = decisions.temperature(3 * z, y)
    losses = {s: F.cross_entropy(3 * z.double() / s, y) for s in (0.98 * t, t, 1.02 * t)}
    assert min(losses, key=losses.get) == t and t == pytest.approx(3, rel=0.1)
    table = decisions.calibrated("tuned", 3 * z, y)
    errors = {w: decisions.calibration_error([r for r in table if r["when"] == w]) for w in ("before", "after")}
    assert errors["after"] < 0.05 < 0.1 < errors["before"]
    drawn(decisions.calibrations(table))


# ---- the page


@pytest.fixture
def undrawn(monkeypatch):
    """Figures are made, which tests what they are made of, and not drawn, which takes most of the time."""
    for name, stub in {"svg": b"", "png": lambda _: b"", "inline": lambda _: ""}.items():
        monkeypatch.setattr(draw.Drawing, name, stub)


SECTIONS = ["happened", "curves", "times", "boxes", "weights", "maps", "look", "right", "again"]


def report(*words, status=0):
    assert main(["report", *map(str, words)]) == status


@pytest.fixture(scope="module")
def page(one, tmp_path_factory):
    output = tmp_path_factory.mktemp("pages") / "new" / "one.html"
    report(one, "-o", output, "--images", 40, "--layers", "conv1.0", "layer1.0.conv1")
    return output


@pytest.mark.slow
def test_the_page_is_whole(page, one):
    text = page.read_text()
    assert re.findall(r'<section id="(\w+)">', text) == SECTIONS
    assert 50_000 < len(text) < 10_000_000
    used = re.findall(r'(?:src|href)="([^"]*)"|url\(([^)]*)\)', text)
    assert all(("".join(u)).startswith(("#", "data:")) for u in used) and "<script" not in text
    figures = re.findall(r'<figure id="figure-([\w-]+)">', text)
    assert len(figures) == len(set(figures)) >= 20 and {"maps-0", "maps-1", "cam-3", "calibration"} <= set(figures)
    beside = {p.name for p in (page.parent / "one-figures").iterdir()}
    assert beside == {f"{name}.{form}" for name in figures for form in ("svg", "png")}
    ids = re.findall(r'\bid="([^"]*)"', text)
    assert len(ids) == len(set(ids))
    summary = json_of(one / "summary.json")
    for top1 in (*summary["parts"], summary["tuned"], summary["baseline"]):
        assert f"<td>{top1:.2f}</td>" in text
    assert html.escape(summary["command"]) in text and "test_resnet in 4 parts" in text


@pytest.mark.slow
def test_decisions_are_those_of_the_networks(page, one):
    """Counted again by timm's model on the same images."""
    shown = re.findall(r"fine-tuned: ([\d.]+) %", page.read_text())
    record = read(one)
    given = pages._of_run(record, record.plan, 40)
    model = timm.create_model(f"local-dir:{one / 'global/last'}", pretrained=True).eval()
    with torch.no_grad():
        right = 100 * float((model(given.images).argmax(1) == given.labels).double().mean())
    assert f"{right:.1f}" in shown and len(given.images) == 40


def test_as_a_function_with_images_of_a_folder(one, tmp_path, undrawn):
    """Classes are subfolders of the run's names; without any nobody is right."""
    classes, flat = tmp_path / "classes", tmp_path / "flat"
    for i, folder in enumerate([classes / "3", classes / "7", flat]):
        folder.mkdir(parents=True)
        for k in range(6):
            Image.new("RGB", (40, 32), (20 * i, 40 * k, 99)).save(folder / f"{k}.png")
    timm_dd.report(one, tmp_path / "a.html", images=classes)
    timm_dd.report(one, tmp_path / "b.html", images=flat)
    a, b = ((tmp_path / name).read_text() for name in ("a.html", "b.html"))
    assert "figure-confusion" in a and "nothing says who is right" not in a
    assert "figure-confusion" not in b and "nothing says who is right" in b and "figure-cam-0" in b
    given = networks.of_folder(classes, read(one), 100)
    assert given.names == list("0123456789") and sorted(given.labels.tolist()) == [3] * 6 + [7] * 6
    (classes / "3" / "9.png").write_bytes(b"none")
    with pytest.raises(timm_dd.ReportError, match="3/9.png is no image .*; mend or remove it"):
        networks.of_folder(classes, read(one), 100)
    (classes / "3" / "9.png").unlink()
    (classes / "7").rename(classes / "ten")
    given = networks.of_folder(classes, read(one), 100)
    assert given.names == list("0123456789") and given.labels is None
    odd = classes.rename(tmp_path / "\udcff")
    given = networks.of_folder(odd, read(one), 100)
    assert given.source == f"12 images of {tmp_path}/\\udcff"


def test_runs_side_by_side(one, tmp_path, undrawn):
    other = shutil.copytree(one, tmp_path / "other")
    args = yaml.safe_load((other / "args.yaml").read_text())
    (other / "args.yaml").write_text(yaml.safe_dump({**args, "seed": 7}))
    report(one, "-o", tmp_path / "r.html", "--images", 0, "--compare", other)
    text = (tmp_path / "r.html").read_text()
    assert 'id="compared"' in text and "No image was asked for" in text
    timm_dd.report(one, tmp_path / "s.html", images=0, compare=other)
    assert 'id="compared"' in (tmp_path / "s.html").read_text()


# ---- what there is not


def without(text, *figures):
    assert all(f'id="figure-{name}' not in text for name in figures)
    assert re.findall(r'<section id="(\w+)">', text) == SECTIONS
    return text


def page_of(run, tmp_path, *words):
    report(run, "-o", tmp_path / "r.html", *words)
    return (tmp_path / "r.html").read_text()


def test_a_run_without_baseline_that_is_not_done(one, tmp_path, undrawn):
    run = shutil.copytree(one, tmp_path / "run")
    shutil.rmtree(run / "baseline")
    shutil.rmtree(run / "global")
    (run / "summary.json").unlink()
    text = without(page_of(run, tmp_path, "--images", 20), "moved")
    assert "The run is not done" in text and "no baseline" in text and "figure-blocks" in text
    shutil.rmtree(run / "composed")
    for k in range(4):
        next((run / "parts" / str(k)).glob("part-*.safetensors")).unlink()
    text = without(page_of(run, tmp_path, "--images", 20), "blocks", "cam", "decisions")
    assert "No network has been trained to its end" in text and "figure-accuracy-over-epochs" in text


def test_a_part_that_failed(one, tmp_path, undrawn):
    run = shutil.copytree(one, tmp_path / "run")
    for name in ("baseline", "global", "composed"):
        shutil.rmtree(run / name)
    (run / "summary.json").unlink()
    next((run / "parts" / "2").glob("part-*.safetensors")).unlink()
    (run / "parts" / "2" / "failure.json").write_text('"part 2: the loss is nan"')
    text = without(page_of(run, tmp_path, "--images", 20), "maps", "blocks")
    assert "Part 2 failed: part 2: the loss is nan" in text and "figure-decisions-0" in text


def test_a_composed_folder_alone(one, tmp_path, undrawn):
    composed = shutil.copytree(one / "composed", tmp_path / "composed")
    text = without(page_of(composed, tmp_path), "accuracy", "boxes", "maps")
    assert (
        "No training run" in text and "composed of 4 parts, grid 2x2, overlap 4" in text and "There is no plan" in text
    )


def test_sixteen_parts(tmp_path, undrawn):
    timm_dd.split("dd_plain", 16, img_size=16).save(tmp_path / "parts")
    timm_dd.merge_files(tmp_path / "parts", tmp_path / "composed")
    images = tmp_path / "images"
    images.mkdir()
    for k in range(3):
        Image.new("RGB", (16, 16), (80 * k, 9, 99)).save(images / f"{k}.png")
    text = without(page_of(tmp_path, tmp_path, "--images", images), "accuracy", "times")
    assert "grid 4x4" in text and "figure-cam-2" in text and "figure-decisions-0" in text


class Small(nn.Module):
    """A network of one to three axes; of features, logits or one value."""

    def __init__(self, axes, out):
        super().__init__()
        conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[axes]
        self.axes, self.convs = axes, nn.Sequential(conv(1, 8, 3, padding=1), nn.ReLU(), conv(8, 8, 3, padding=1))
        self.fc = nn.Linear(8, out) if out else None

    def forward(self, x):
        x = self.convs(x)
        return x if self.fc is None else self.fc(x.mean(tuple(range(2, 2 + self.axes))))


@pytest.mark.parametrize("axes, out", [(1, 3), (3, 3), (2, 1), (2, 0)], ids=["1D", "3D", "regression", "features"])
def test_other_networks(axes, out, tmp_path, undrawn):
    parts = timm_dd.split(Small(axes, out), 2, example_input=torch.zeros(1, 1, *[8] * axes))
    parts.save(tmp_path / "parts")
    timm_dd.merge_files(tmp_path / "parts", tmp_path / "composed", head="mean" if out == 1 else "sum")
    text = without(page_of(tmp_path, tmp_path), "accuracy", "cam", "maps")
    assert "figure-boxes" in text and "cannot build it again" in text
    assert ("figure-blocks" in text) == (out > 0) != ("there are no blocks" in text)


def test_features_of_a_timm_network(tmp_path, undrawn):
    timm_dd.split("test_resnet", 2, num_classes=0, img_size=32).save(tmp_path / "parts")
    timm_dd.merge_files(tmp_path / "parts", tmp_path / "composed")
    (tmp_path / "images").mkdir()
    Image.new("RGB", (32, 32), (80, 9, 99)).save(tmp_path / "images" / "a.png")
    text = without(page_of(tmp_path, tmp_path, "--images", tmp_path / "images"), "decisions", "accuracy")
    assert "figure-maps-0" in text and "no scores of classes" in text


def test_data_that_is_elsewhere(one, tmp_path, undrawn):
    run = shutil.copytree(one, tmp_path / "run")
    args = yaml.safe_load((run / "args.yaml").read_text())
    (run / "args.yaml").write_text(yaml.safe_dump({**args, "dataset": "", "data_dir": "nowhere"}))
    assert "images are not to be had: no data folder nowhere" in without(page_of(run, tmp_path), "cam")


# ---- while it trains

TINY = [
    "--dataset", "digits", "--model", "test_resnet", "--parts", "2", "--part-epochs", "2", "--epochs", "1", "-b", "8",
    "--train-num-samples", "16", "--val-num-samples", "8", "-j", "0", "--warmup-epochs", "0", "--joint-epochs", "0",
    "--engine", "sequential", "--device", "cpu", "--experiment", "run",
]  # fmt: skip


def test_training_writes_the_page(tmp_path, undrawn, monkeypatch):
    """Every second epoch of a stage what the files say, at the end with images."""
    seen = []

    def noted(run, output, images=None, **others):
        timm_dd.train.pages.report.__wrapped__(run, output, images=images, **others)
        seen.append((images, [len(c.rows) for c in read(run).curves], (run / "summary.json").exists()))

    monkeypatch.setattr(trackers, "pages", types.SimpleNamespace(report=noted))
    assert main(["train", *TINY, "--report-every", "2", "--output", str(tmp_path)]) == 0
    assert seen == [(0, [2, 2], False), (None, [2, 2, 1], True)]
    assert "figure-decisions-0" in (tmp_path / "run" / "report.html").read_text()


def test_a_page_that_fails_does_not_end_the_run(tmp_path, undrawn, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "report-figures").write_text("a file where the folder should be")
    assert main(["train", *TINY, "--report", "--output", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "no report: cannot write to" in said and (tmp_path / "run" / "summary.json").exists()


def test_training_without_matplotlib_says_so_first(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["train", *TINY, "--report", "--output", str(tmp_path)]) == 1
    assert "pip install timm_dd[report]" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_a_terminal_shows_one_bar_for_all_parts(tmp_path, monkeypatch):
    """Over all epochs, with images/s, the time that is left, and each part's last accuracy."""
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    assert main(["train", *TINY, "--output", str(tmp_path)]) == 0
    first, second = (float(summary_csv(tmp_path / "run" / "parts" / k)[0]["eval_top1"]) for k in "01")
    shown = [line for line in terminal.getvalue().split("\r") if line.startswith("parts 2/2")]
    assert f"top-1 {first:.1f} {second:.1f} %" in shown[-1] and "images/s" in shown[-1] and "| 16/32 [" in shown[0]


def test_tensorboard_gets_the_figures(one):
    board = types.SimpleNamespace(found=[], add_figure=lambda name, figure, close: board.found.append(name))
    tracked = trackers.Trackers(options.parse(TINY), one, 0)
    tracked.board = board
    tracked.end_run()
    assert {"curves/accuracy-over-epochs", "times/times", "boxes/boxes", "weights/blocks"} <= set(board.found)


# ---- what is wrong


def damage(path, change):
    path.write_text(change(path.read_text()))


BROKEN = {
    "summary cut": lambda run: damage(run / "summary.json", lambda t: t[: len(t) // 2]),
    "summary without seconds": lambda run: damage(run / "summary.json", lambda t: t.replace('"seconds"', '"second"')),
    "summary of text": lambda run: damage(run / "summary.json", lambda t: json.dumps({**json.loads(t), "tuned": "x"})),
    "summary of a list": lambda run: damage(run / "summary.json", lambda t: "[]"),
    "summary of fewer parts": lambda run: damage(
        run / "summary.json", lambda t: json.dumps({**json.loads(t), "parts": [1.0]})
    ),
    "options": lambda run: damage(run / "args.yaml", lambda t: "a: [1"),
    "options of text": lambda run: damage(
        run / "args.yaml", lambda t: t.replace("coarse_epochs: 50", "coarse_epochs: x")
    ),
    "options of a list": lambda run: damage(run / "args.yaml", lambda t: "[1]"),
    "plan": lambda run: damage(run / "plan.json", lambda t: t[:-99]),
    "curve without loss": lambda run: damage(run / "global" / "summary.csv", lambda t: t.replace("train_loss", "x")),
    "curve without epochs": lambda run: damage(run / "global" / "summary.csv", lambda t: t + ",,\n"),
    "curve of text": lambda run: damage(run / "parts" / "1" / "summary.csv", lambda t: t[:-9] + "?\n"),
    "composed": lambda run: (run / "composed" / "model.safetensors").write_bytes(b"123456789"),
    "tuned": lambda run: (run / "global" / "last" / "model.safetensors").write_bytes(b"123456789"),
    "part": lambda run: next((run / "parts" / "1").glob("part-*.safetensors")).write_bytes(b"123456789"),
    "nothing": lambda run: [shutil.rmtree(run), run.mkdir()],
    "not there": shutil.rmtree,
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_folder_is_one_line_and_no_page(broken, one, tmp_path, undrawn, capsys):
    run = shutil.copytree(one, tmp_path / "run")
    BROKEN[broken](run)
    report(run, "-o", tmp_path / "out" / "r.html", "--images", 4, status=1)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and str(run) in said and "bug" not in said
    assert not (tmp_path / "out").exists()


def test_wrong_images_and_layers(one, tmp_path, undrawn, capsys):
    (tmp_path / "empty").mkdir()
    for words in (["--images", tmp_path / "empty"], ["--images", "nowhere"], ["--images", 4, "--layers", "nowhere"]):
        report(one, "-o", tmp_path / "r.html", *words, status=1)
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and "expected" in said and "bug" not in said
    assert not (tmp_path / "r.html").exists()


def test_a_page_that_is_a_folder(one, tmp_path, undrawn, capsys):
    for folder in (tmp_path / "out", tmp_path / "out/"):
        folder.mkdir(exist_ok=True)
        report(one, "-o", folder, "--images", 0, status=1)
        said = capsys.readouterr().err
        assert f"{tmp_path}/out is a folder; expected a file name, like {tmp_path}/out/report.html" in said
    assert list(folder.iterdir()) == []


def test_without_matplotlib(one, tmp_path, undrawn, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    report(one, "-o", tmp_path / "r.html", status=1)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "pip install timm_dd[report]" in said and not (tmp_path / "r.html").exists()
