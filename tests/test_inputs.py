"""Networks of several inputs: images are cut by the domain, every part has the others whole."""

import copy

import pytest
import torch
from conftest import images, shake
from torch import nn

import timm_dd
from timm_dd import Domain, MergeError, Parts, SplitError
from timm_dd.planning.inputs import Inputs
from timm_dd.planning.plan import Plan

SIZE = (3, 8, 8)
RELATIVE = 1e-9


class Pair(nn.Module):
    """Two images of one size, numbers that gate their features, and a scale."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(1, 8, 3, padding=1)
        self.gate, self.fc = nn.Linear(5, 16), nn.Linear(16, 4)

    def forward(self, x, y, meta=None, *, scale=None):
        z = torch.cat([self.a(x).relu(), self.b(y).relu()], 1).mean((2, 3))
        if meta is not None:
            z = z * self.gate(meta).sigmoid()
        return self.fc(z if scale is None else z * scale)


class Batch(nn.Module):
    """A dict, which is walked as in Python."""

    def __init__(self):
        super().__init__()
        self.pair = Pair()

    def forward(self, batch):
        assert batch.get("flag") and "missing" not in batch
        return self.pair(**{name: value for name, value in batch.items() if name != "flag"})


class Stack(nn.Module):
    """A list of images by keyword, and the steps of an embedding."""

    def __init__(self):
        super().__init__()
        self.stem, self.table, self.fc = nn.Conv2d(3, 8, 3), nn.Embedding(2, 8), nn.Linear(8, 4)

    def forward(self, *, frames, kind, times=2.0):
        return self.fc(sum(self.stem(x).tanh().mean((2, 3)) for x in frames) * times + self.table(kind))


class Starred(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

    def forward(self, *xs, **more):
        return self.fc(torch.stack([self.stem(x).tanh() for x in xs]).mean((0, 3, 4)) * more["weight"])


class Joined(nn.Module):
    """Numbers beside the features: a part's classifier reads all of them."""

    def __init__(self):
        super().__init__()
        self.stem, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8 + 5, 4)

    def forward(self, meta, x):
        return self.fc(torch.cat([self.stem(x).tanh().mean((2, 3)), meta], 1))


def tensors(batch=2):
    return images(batch, *SIZE), images(batch, 1, 8, 8, seed=1), images(batch, 5, seed=2)


X, Y, META = tensors()
NETWORKS = {
    "two images": (Pair, (X, Y)),
    "two images and numbers": (Pair, (X, Y, META)),
    "None": (Pair, (X, Y, None)),
    "by name": (Pair, {"y": Y, "x": X, "scale": META[:, :1]}),
    "a number": (Pair, {"x": X, "y": Y, "meta": META, "scale": 0.5}),
    "without batch": (Pair, {"x": X, "y": Y, "scale": torch.ones((), dtype=torch.float64)}),
    "a dict": (Batch, {"flag": True, "x": X, "y": Y, "meta": META}),
    "a dict in a tuple": (Batch, ({"flag": True, "x": X, "y": Y},)),
    "a list and indices": (Stack, {"frames": [X, X + 1], "kind": torch.tensor([0, 1])}),
    "stars": (lambda: Called(Starred()), {"a": X, "b": X + 1, "weight": META[:, :1]}),
    "numbers first": (Joined, (META, X)),
}


class Called(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, a, b, weight):
        return self.inner(a, b, weight=weight)


def call(network, example):
    """As the example says, which is a dict by name or of one argument."""
    if isinstance(example, tuple):
        return network(*example)
    return network(example) if "flag" in example else network(**example)


def cropped(value, box, size=(8, 8)):
    """What a part sees of an argument: the oracle."""
    if isinstance(value, dict):
        return {name: cropped(v, box) for name, v in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(cropped(v, box) for v in value)
    image = isinstance(value, torch.Tensor) and value.ndim == 4 and value.shape[2:] == size
    return box.crop(value) if image else value


def only_tensors(example):
    """What a part takes: constants are in its graph."""
    if isinstance(example, tuple):
        return tuple(v for v in example if v is not None)
    return example if "flag" in example else {n: v for n, v in example.items() if not isinstance(v, float)}


@torch.no_grad()
@pytest.mark.parametrize("name", NETWORKS)
def test_the_sum_of_the_parts(name):
    """The claim by value; on boxes each part has its crop of images and all of the rest; packed, saved, loaded."""
    make, example = NETWORKS[name]
    module = make().double()
    whole = timm_dd.split(module, 2, example_input=example, domain=Domain.full(2))
    shake(whole)
    merged = timm_dd.merge(whole).eval()
    y, total = call(merged, example), call(whole, example).sum(0)
    error = float((y - total).norm() / y.norm())
    assert whole.plan.exact == (error <= RELATIVE) == (make is not Joined), whole.plan.approximations
    assert timm_dd.verify(merged, whole).failures == timm_dd.verify(merged, whole, example).failures == []
    again = timm_dd.split(merged, 2, example_input=example, domain=Domain.full(2))
    assert all(torch.equal(a, b) for a, b in zip(whole[0].state_dict().values(), again[0].state_dict().values())
               if a.shape != merged.state_dict().get(a, b).shape)  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("name", NETWORKS)
def test_boxes_packed_and_files(name, tmp_path):
    make, example = NETWORKS[name]
    module = make().double()
    parts = timm_dd.split(module, 2, example_input=example, domain=Domain.grid(1, 2, overlap=2)).eval()
    own = [call(part, only_tensors(cropped(example, box))) for part, box in zip(parts, parts.plan.boxes())]
    assert torch.equal(call(parts, example), torch.stack(own))
    if isinstance(example, tuple):
        crops = parts.crops(*example)
        assert torch.equal(parts[1](*crops[1]), own[1])
        packed = parts.packed()(*(stacked(values) for values in zip(*crops)))
    else:
        crops = call(parts.crops, example)
        given = [dict(zip(["batch"], c)) if "flag" in example else c for c in crops]
        assert torch.equal(parts[1](**given[1]), own[1])
        packed = parts.packed()(**{key: stacked([c[key] for c in given]) for key in given[0]})
    assert torch.allclose(packed, torch.stack(own), rtol=1e-9, atol=1e-12)
    parts.save(tmp_path)
    loaded = Parts.load(tmp_path, module)
    assert loaded.plan == parts.plan and torch.equal(call(loaded, example), call(parts, example))
    assert Plan.from_json(parts.plan.to_json()).inputs == parts.plan.inputs
    kept = timm_dd.merge(tmp_path, model=module).state_dict()
    assert all(torch.equal(kept[key], t) for key, t in timm_dd.merge(parts).state_dict().items())


def stacked(values):
    """Each tensor of some alike trees, stacked."""
    first = values[0]
    if isinstance(first, dict):
        return {key: stacked([v[key] for v in values]) for key in first}
    if isinstance(first, (tuple, list)):
        return type(first)(stacked(list(v)) for v in zip(*values))
    return torch.stack(list(values)) if isinstance(first, torch.Tensor) else first


def test_plan_and_profile_take_them_too():
    x, y, meta = tensors()
    plan = timm_dd.plan(Pair(), 2, example_input=(x, y, meta))
    assert plan == timm_dd.split(Pair(), 2, example_input=(x, y, meta)).plan
    both, one = (timm_dd.profile(Pair(), 2, example_input=given).whole for given in ((x, y, meta), (x, y)))
    assert both.multiply_adds - one.multiply_adds == 5 * 16


def test_another_batch_and_crops_that_are_views():
    parts = timm_dd.split(Pair(), 4, example_input=tuple(t[:1].float() for t in (X, Y, META)))
    x, y, meta = (t.float() for t in tensors(5))
    assert parts(x, y, meta).shape == parts(x=x, meta=meta, y=y).shape == (4, 5, 4)
    for crop, box in zip(parts.crops(x, y, meta), parts.plan.boxes()):
        assert crop[0]._is_view() and torch.equal(crop[0], box.crop(x)) and torch.equal(crop[1], box.crop(y))
        assert crop[2] is meta


def test_images_at_a_scale():
    parts = timm_dd.split(Pair(), 2, example_input=(X, Y, META), domain=Domain.full(2, scale=0.5))
    x, y, meta = parts.crops(X, Y, META)[0]
    assert x.shape == (2, 3, 4, 4) and y.shape == (2, 1, 4, 4) and meta is META


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda p: p(X), "missing a required argument: 'y'"),
        (lambda p: p(X, Y), r"meta: expected a tensor \(B, 5\), got NoneType"),
        (lambda p: p(X, Y, META, META), "too many positional"),
        (lambda p: p(X, Y, META, scale=2.0), "scale: expected None, as it was split with; .* got 2.0"),
        (lambda p: p(X, X, META), r"y: expected a tensor \(B, 1, 8, 8\), got a tensor of shape \(2, 3, 8, 8\)"),
        (lambda p: p.crops(X, Y, 3), r"meta: expected a tensor \(B, 5\), got int"),
        (lambda p: timm_dd.verify(timm_dd.merge(p), p, X), "missing a required argument"),
        (lambda p: timm_dd.split(Pair(), 2, example_input=()), "needs example_input"),
        (lambda p: timm_dd.split(Pair(), 2, example_input=(META[0],)), "needs example_input"),
        (lambda p: timm_dd.split(Pair(), 2, example_input=[X, Y]), "expected a tensor .*, got list"),
        (
            lambda p: timm_dd.split(Pair(), 2, example_input=(X,)),
            "example_input is no call of the network.s forward: missing .* 'y'",
        ),
        (lambda p: timm_dd.split(Pair(), 2, example_input=(X, Y, object())), "tensors, numbers and None, got object"),
    ],
)
def test_other_inputs_are_refused(given, message):
    parts = timm_dd.split(Pair().double(), 2, example_input=(X, Y, META))
    with pytest.raises(SplitError, match=message) as e:
        given(parts)
    assert "\n" not in str(e.value)


def test_several_inputs_make_no_decision_together():
    parts = timm_dd.split(Pair(), 2, example_input=(X.float(), Y.float()))
    with pytest.raises(MergeError, match="several inputs"):
        timm_dd.TwoLevel(parts, "mean")


@pytest.mark.parametrize("change", [{"args": []}, {"args": [{"shape": [None, 4], "dtype": "cat"}]}, {"kwargs": 3},
                                    {"args": [{"shape": [None, 3, 8, -8], "dtype": "float32"}]},
                                    {"args": [{"set": []}]}])  # fmt: skip
def test_a_plan_that_lies_about_inputs(change):
    told = timm_dd.plan(Pair(), 2, example_input=(X, Y)).to_json()
    with pytest.raises((ValueError, KeyError, TypeError, AttributeError)):
        Plan.from_json({**told, "inputs": {**told["inputs"], **change}})


def test_one_image_is_as_before():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 2)).double()
    for example in (X, (X,)):
        plan = timm_dd.plan(net, 2, example_input=example)
        assert plan.inputs is None and "inputs" not in plan.to_json()
    assert Inputs.image((3, 8, 8)).is_one_image


def test_copies_of_parts_take_the_same():
    """As deep copies of a network do."""
    make, example = NETWORKS["by name"]
    parts = timm_dd.split(make().double(), 2, example_input=example, domain=Domain.full(2))
    again = copy.deepcopy(parts)
    assert torch.equal(call(again, example), call(parts, example))
    assert copy.deepcopy(parts.graph).inputs == parts.graph.inputs
