"""TwoLevel: how K decisions become one, by value, and its files."""

import copy
import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import timm_dd
from timm_dd import Domain, MergeError, Parts, TimmDDError, TwoLevel
from timm_dd.two_level.aggregate import CoarseNet, mean, total, vote
from timm_dd.two_level.files import gather

BOXES = Domain.grid(2, 2, overlap=4)  # 12×12 pixels each, of 16×16


def classifier(classes=5, channels=16, dims=2):
    conv, norm = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1], (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1]
    pool = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)[dims - 1]
    torch.manual_seed(0)
    first = [conv(3, channels, 3), norm(channels), nn.ReLU(), conv(channels, channels, 3), nn.ReLU()]
    return nn.Sequential(*first, pool(1), nn.Flatten(), nn.Linear(channels, classes)).eval()


def split(parts=4, size=(16, 16), domain=None, classes=5, **options):
    example = torch.empty(2, 3, *size)
    model = classifier(classes, dims=len(size))
    return timm_dd.split(model, parts, example_input=example, domain=domain or Domain.full(parts), **options).eval()


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def images(parts, n=6, seed=1):
    return torch.randn(n, *parts.plan.input_size, generator=torch.Generator().manual_seed(seed))


# ---- aggregations, against numpy


@pytest.mark.parametrize("classes", [1, 2, 7])
@pytest.mark.parametrize("parts", [1, 3, 4])
def test_mean_and_vote(parts, classes):
    """The most votes win; among classes with as many, the largest sum of probabilities."""
    logits = torch.randn(parts, 400, classes, dtype=torch.float64, generator=torch.Generator().manual_seed(parts))
    x = logits.numpy()
    p = 1 / (1 + np.exp(-x)) if classes == 1 else softmax(x)
    np.testing.assert_allclose(mean(logits).numpy(), p.mean(0), rtol=1e-12)
    p = np.concatenate([1 - p, p], -1) if classes == 1 else p
    votes = np.eye(p.shape[-1])[p.argmax(-1)].sum(0)
    ties = (votes == votes.max(-1, keepdims=True)).sum(-1) > 1
    assert ties.any() == (parts == 4 or (parts, classes) == (3, 7))
    expected = [max(range(len(v)), key=lambda c: (v[c], s[c])) for v, s in zip(votes, p.sum(0))]
    found = vote(logits)
    decided = (found[:, 0] > 0.5) if classes == 1 else found.argmax(-1)
    np.testing.assert_array_equal(decided.numpy(), expected)
    sums = torch.ones(400, dtype=torch.float64)
    torch.testing.assert_close((found if classes > 1 else torch.cat([1 - found, found], -1)).sum(-1), sums)


def test_half_precision_logits_are_decided_in_float32():
    logits = torch.randn(4, 50, 9, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert mean(logits).dtype == vote(logits).dtype == torch.float32
    torch.testing.assert_close(mean(logits), mean(logits.float()))


def test_total_is_the_sum():
    logits = torch.randn(3, 5, 2)
    assert torch.equal(total(logits), logits[0] + logits[1] + logits[2])


def test_the_coarse_net_by_hand():
    """klawonn2023's: Linear, ReLU and dropout for each width, then the classes."""
    net = CoarseNet(4, 5, (8, 6), dropout=0.5).eval()
    (a, b, c) = (m for m in net if isinstance(m, nn.Linear))
    p = torch.rand(7, 20)
    by_hand = (((p @ a.weight.T + a.bias).relu() @ b.weight.T + b.bias).relu()) @ c.weight.T + c.bias
    torch.testing.assert_close(net(p), by_hand)
    assert sum(isinstance(m, nn.Dropout) for m in net) == 2 and isinstance(net[-1], nn.Linear)


# ---- the network


def test_sum_is_the_merged_network():
    parts = split().double()
    assert parts.plan.exact
    two, merged = TwoLevel(parts, "sum").eval(), timm_dd.merge(parts).eval()
    x = images(parts).double()
    torch.testing.assert_close(two(x), merged(x), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("how", ["mean", "vote", "dnn"])
def test_each_part_sees_its_box(how):
    """Against the parts one by one on crops by hand."""
    parts = split(domain=BOXES)
    two, x = TwoLevel(parts, how, widths=(6,)).eval(), images(parts)
    rows = [slice(0, 12), slice(4, 16)]
    logits = torch.stack([parts[2 * i + j](x[:, :, rows[i], rows[j]]) for i in (0, 1) for j in (0, 1)])
    p = logits.softmax(-1)
    if how == "mean":
        expected = p.mean(0)
    elif how == "vote":
        expected = vote(logits)
    else:
        flat = torch.cat(list(p), 1)
        expected = two.coarse[3](two.coarse[0](flat).relu())
    torch.testing.assert_close(two(x), expected)


@pytest.mark.parametrize(
    "size, domain",
    [((24,), Domain.grid(3)), ((12, 6, 12), Domain.grid(2, 1, 2)), ((16, 16), Domain.full(4, scale=0.75))],
    ids=["1D", "3D", "scaled"],
)
def test_any_domain(size, domain):
    parts = split(domain.parts, size, domain, width_divisor=2)
    x = images(parts, 3)
    expected = torch.stack([part(crop) for part, crop in zip(parts, parts.crops(x))]).softmax(-1).mean(0)
    torch.testing.assert_close(TwoLevel(parts, "mean")(x), expected)


def test_unequal_parts():
    parts = timm_dd.split("resnet10t", 3, domain=Domain.grid(1, 3), num_classes=4, img_size=60, seed=0).eval()
    x = images(parts, 2)
    expected = torch.stack([part(crop) for part, crop in zip(parts, parts.crops(x))]).sum(0)
    torch.testing.assert_close(TwoLevel(parts, "sum")(x), expected)


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.a, self.b = classifier(8)[:7], nn.Linear(16, 2), nn.Linear(16, 1)

    def forward(self, x):
        y = self.body(x)
        return {"angle": self.a(y), "speed": self.b(y)}


def test_the_mean_of_several_heads_of_a_regression():
    parts = timm_dd.split(Heads().eval(), 4, example_input=torch.empty(2, 3, 16, 16), domain=Domain.full(4))
    two, x = TwoLevel(parts, "mean", regression=True), images(parts)
    found, merged = two(x), timm_dd.merge(parts, head="mean")(x)
    for name in ("angle", "speed"):
        torch.testing.assert_close(found[name], merged[name])


@pytest.mark.parametrize("train", [False, True])
def test_packed_parts_give_the_same(train):
    """Outputs, gradients and running statistics; on a CPU, where nothing is packed by itself."""
    one, other = (TwoLevel(split(domain=BOXES), "sum").double().train(train) for _ in range(2))
    x = images(one.parts).double()
    assert other._can_be_packed()
    by_one, packed = one.parts(x), other._of_packed(x)
    torch.testing.assert_close(packed, by_one)
    by_one.square().sum().backward(), packed.square().sum().backward()
    for (name, a), (_, b) in zip(one.named_parameters(), other.named_parameters()):
        torch.testing.assert_close(b.grad, a.grad, msg=name)
    for (name, a), (_, b) in zip(one.named_buffers(), other.named_buffers()):
        torch.testing.assert_close(b, a, msg=name)


def test_its_parameters_are_those_of_the_parts():
    parts = split()
    two = TwoLevel(parts, "dnn", widths=(6,))
    own = {id(p) for p in parts.parameters()}
    assert own < {id(p) for p in two.parameters()} and len(own) + 4 == len(list(two.parameters()))
    assert (two.widths, two.dropout, two.classes) == ((6,), 0.0, 5)
    assert copy.deepcopy(two)(images(parts)).shape == (6, 5)


# ---- files


@pytest.mark.parametrize("how", ["mean", "vote", "sum", "dnn"])
def test_what_is_saved_is_loaded(how, tmp_path):
    model = classifier()
    parts = split(domain=BOXES)
    two = TwoLevel(parts, how, widths=(9, 4), dropout=0.25, class_names="abcde").eval()
    two.save(tmp_path / "two")
    loaded = TwoLevel.load(tmp_path / "two", model).eval()
    assert torch.equal(loaded(images(parts)), two(images(parts)))
    assert (loaded.how, loaded.widths, loaded.dropout) == (two.how, two.widths, two.dropout)
    assert loaded.class_names == tuple("abcde")
    about = json.loads((tmp_path / "two" / "two_level.json").read_text())
    assert about["format"] == 1 and len(about["checksums"]) == 4 + (how == "dnn")
    assert torch.equal(Parts.load(tmp_path / "two", model).eval()(images(parts)), parts(images(parts)))


def test_parts_that_are_missing(tmp_path):
    parts = split(domain=BOXES)
    for how in ("mean", "dnn"):
        TwoLevel(parts, how).save(tmp_path / how)
        (tmp_path / how / "part-00001-of-00004.safetensors").unlink()
        with pytest.raises(MergeError, match="part-00001-of-00004.safetensors is missing"):
            TwoLevel.load(tmp_path / how, classifier())
    with pytest.raises(MergeError, match="weighs 4 parts and 3 are here"):
        TwoLevel.load(tmp_path / "dnn", classifier(), missing="drop")
    two = TwoLevel.load(tmp_path / "mean", classifier(), missing="drop").eval()
    x = images(parts)
    torch.testing.assert_close(two(x), parts(x)[[0, 2, 3]].softmax(-1).mean(0))
    assert "3 of 4 parts" in repr(two)
    for refused in (lambda: two.save(tmp_path / "again"), lambda: timm_dd.merge(two.parts)):
        with pytest.raises(MergeError, match="3 of 4 parts"):
            refused()
    assert not (tmp_path / "again").exists()


def cut(path):
    path.write_bytes(path.read_bytes()[:-9])


def flip(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 8
    path.write_bytes(data)


def pipe(path):
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    "name", ["coarse.safetensors", "part-00002-of-00004.safetensors", "plan.json", "two_level.json"]
)
@pytest.mark.parametrize("damage", [cut, flip, Path.unlink, pipe], ids=["cut", "flip", "gone", "pipe"])
def test_damaged_files(name, damage, tmp_path):
    TwoLevel(split(domain=BOXES), "dnn", widths=(6,)).save(tmp_path)
    damage(tmp_path / name)
    with pytest.raises(MergeError, match=name.partition("-of")[0]):
        TwoLevel.load(tmp_path, classifier())


@pytest.mark.parametrize(
    "key, value",
    [
        ("how", "best"), ("how", 3), ("how", "a" * 9999), ("classes", 6), ("widths", [7]), ("widths", [10**12]),
        ("widths", "ab"), ("widths", [[[[1] * 500] * 50]]), ("dropout", 2), ("dropout", "a"), ("dropout", math.nan),
        ("parts", 7), ("parts", "elsewhere"), ("checksums", {}), ("checksums", 3), ("class_names", ["a"]),
        ("class_names", 4), ("format", 2), ("regression", "no"), ("regression", True), ("classes", "x"),
        ("widths", [{}]), ("widths", [-1]), ("top1", "nan"), ("stage", "x"), ("epoch", "x"),
    ],
)  # fmt: skip
def test_a_two_level_json_that_says_something_else(key, value, tmp_path):
    TwoLevel(split(domain=BOXES), "dnn", widths=(6,)).save(tmp_path)
    path = tmp_path / "two_level.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    for read in (lambda: TwoLevel.load(tmp_path, classifier()), lambda: gather(tmp_path)):
        with pytest.raises(MergeError) as refused:
            read()
        assert len(str(refused.value)) < 1000


def test_parts_of_another_training(tmp_path):
    """The same plan, other weights: the coarse net does not know them."""
    TwoLevel(split(domain=BOXES), "dnn").save(tmp_path / "a")
    others = split(domain=BOXES)
    with torch.no_grad():
        next(others[0].parameters()).add_(1)
    TwoLevel(others, "dnn").save(tmp_path / "b")
    shutil.copy(tmp_path / "b" / "part-00000-of-00004.safetensors", tmp_path / "a")
    with pytest.raises(MergeError, match="not the part that .*two_level.json was made of"):
        TwoLevel.load(tmp_path / "a", classifier())


# ---- bad input


@pytest.mark.parametrize(
    "how, options, message",
    [
        ("max", {}, "how: expected mean, vote, sum, dnn"),
        ("vote", {"regression": True}, "how: expected mean for a regression"),
        ("dnn", {"widths": (0,)}, "widths: expected whole numbers"),
        ("dnn", {"widths": (2.5,)}, "widths: expected whole numbers"),
        ("dnn", {"dropout": 1}, "dropout: expected a number"),
        ("dnn", {"widths": (10**11,)}, "GB to train"),
        ("mean", {"class_names": ["a"]}, "expected 5 names, got 1"),
    ],
)
def test_settings_that_are_refused(how, options, message):
    with pytest.raises(MergeError, match=message):
        TwoLevel(split(), how, **options)


def test_what_makes_no_decision_is_refused():
    features = timm_dd.split("resnet10t", 4, num_classes=0, img_size=64, seed=0)
    heads = timm_dd.split(Heads(), 4, example_input=torch.empty(2, 3, 16, 16))
    for parts, message in ((features, "logits"), (heads, "regression=True"), (list(split()), "expected timm_dd.Parts")):
        with pytest.raises(TimmDDError, match=message):
            TwoLevel(parts, "mean")
