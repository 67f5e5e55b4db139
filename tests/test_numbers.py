"""Numbers that a forward takes from shapes, and what it decides by them: the claim by value, or a refusal."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import images, shake, sum_error
from test_rules import fn, net
from torch import nn
from torch.utils.checkpoint import checkpoint

import timm_dd
from timm_dd import Domain, SplitError
from timm_dd.planning.plan import Plan

RELATIVE = 1e-9


def rest(x):
    b, c, *size = x.shape
    return x.flatten(2).view(b, c, *size) * c**-0.5


def unpacked(x):
    b, c = x.shape[:2]
    return x * (b * c) ** -0.5 * b**0.5


def frames(x):
    """Groups of 4 images, of which each has the mean of the group added."""
    b, c, h, w = x.shape
    mean = x.view(b // 4, 4, c, h, w).mean(1, keepdim=True)
    return x + mean.expand(-1, 4, -1, -1, -1).reshape(b, c, h, w)


def frames_checked(x):
    if x.shape[0] % 4:
        raise ValueError("expected groups of 4")
    return frames(x)


SCALES = {
    "the first sizes": unpacked,
    "the last sizes": lambda x: x * x.shape[1:][0] ** -0.5,
    "backwards": lambda x: x / x.shape[::-1][2],
    "by keyword": lambda x: x * x.size(dim=1) ** -0.5,
    "of one image": lambda x: x / x[0].numel(),
    "of a shape": lambda x: x / x.shape[1:].numel(),
    "a product": lambda x: x / math.prod(x.shape[1:]),
    "a sum": lambda x: x / sum(x.shape[1:]),
    "a stride": lambda x: x / x.stride(0),
    "flattened": lambda x: x / x.flatten(1).size(-1),
    "the rest": rest,
    "a list": lambda x: x / [*x.size()][1],
    "a dict": lambda x: x / dict(c=x.shape[1])["c"],
    "a float": lambda x: x * float(x.shape[1]) ** -0.5,
    "a whole number": lambda x: torch.cat([x[:, : int(x.shape[1] * 0.5)].tanh(), x[:, int(x.shape[1] * 0.5) :]], 1),
    "a loop": lambda x: sum(x * i for i in range(x.shape[1])),
    "the number of dims": lambda x: x - x.mean(tuple(range(2, x.ndim)), keepdim=True) * len(x.shape),
    "positions": lambda x: F.interpolate(x, size=(int(x.shape[2] * 1.5), int(x.shape[3] * 1.5))),
    "a branch": lambda x: x * 2 if x.shape[1] > 5 else x,
    "a whole shape": lambda x: x.flatten(2).tanh().view(x.shape) + x,
    "a shape in a call": lambda x: x.flatten(1).reshape(shape=x.size()).tanh() + x,
    "a text": lambda x: x * {"c 12": 2.0}.get(f"c {x.shape[1]}", 3.0),
    "a quotient and a rest": lambda x: x * divmod(x.shape[1], 5)[0] + divmod(100, x.shape[1])[1],
    "rounded": lambda x: x * round(x.shape[1] / 5) * round(x.shape[1] / 7, 2),
    "a list repeated": lambda x: torch.cat([x] * (x.shape[1] // 4), 1)[:, :12] + sum((2 * x.ndim // 8) * [x]),
    "NumPy's product": lambda x: x / np.prod(x.shape[1:]) + x.view(*x.size()[:2], np.prod(x.size()[2:])).view(x.shape),
    "NumPy's root": lambda x: x / np.sqrt(x.shape[1]) * np.power(x.shape[1], 0.25) * np.max(x.size()[2:]),
    "NumPy's numbers": lambda x: (np.float32(0.5) * x).sum(np.int64(2), True) * (np.int64(2) * x.shape[1]) + x,
    "an array": lambda x: x * (np.array(x.shape[1:]) // 2)[0] + (np.asarray(x.shape[2:]) - 1).prod(),
    "a count as a size": lambda x: x.view(x.numel() // 81, 81).view(x.shape).tanh(),
}


@pytest.mark.parametrize("parts", [2, 3])
@pytest.mark.parametrize("name", SCALES)
def test_numbers_of_shapes_are_the_global_networks(name, parts):
    x = images(2, 3, 9, 9)
    split = shake(timm_dd.split(net(fn(SCALES[name])), parts, domain=Domain.full(parts), example_input=x))
    assert split.plan.exact == (sum_error(split, timm_dd.merge(split), x) <= RELATIVE)
    assert split.plan.exact == (name != "a count as a size")


@pytest.mark.parametrize("name", [n for n in SCALES if n not in ("a count as a size", "positions")])
def test_numbers_of_shapes_on_boxes(name):
    """A part on its box is that of a network for images as large as the box."""
    x, domain, model = images(2, 3, 9, 9), Domain.grid(1, 2, overlap=2), net(fn(SCALES[name])).double()
    parts = timm_dd.split(model, 2, domain=domain, example_input=x).eval()
    for k, crop in enumerate(parts.crops(x)):
        alone = timm_dd.split(model, 2, domain=Domain.full(2), example_input=crop).eval()[k]
        assert torch.equal(parts[k](crop), alone(crop))


def test_widths_and_groups_of_numpy_are_numbers(tmp_path):
    a, b, groups = np.array([12, 24, 4])
    layers = [nn.Conv2d(3, a, 3), nn.GroupNorm(groups, a), nn.Conv2d(a, b, 3, np.int64(2), groups=groups)]
    model = nn.Sequential(*layers, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(np.int64(1)), nn.Linear(b, 5))
    x = images(2, 3, 9, 9)
    parts = shake(timm_dd.split(model, 2, domain=Domain.full(2), example_input=x.float()))
    assert parts.plan.exact and parts[0].get_submodule("2").groups == 2
    assert sum_error(parts, timm_dd.merge(parts), x) <= RELATIVE
    assert Plan.from_json(json.loads(json.dumps(parts.plan.to_json()))) == parts.plan
    of_timm = timm_dd.split("resnet10t", 2, num_classes=np.int64(7), drop_rate=np.float32(0.5))
    of_timm.save(tmp_path)
    assert timm_dd.merge(timm_dd.Parts.load(tmp_path)).num_classes == 7


@pytest.mark.parametrize(
    "read", [lambda x: x.numel(), lambda x: x.nelement(), lambda x: x.nbytes], ids=["numel", "nelement", "nbytes"]
)
def test_counts_of_channels_and_images_are_no_values(read):
    with pytest.raises(SplitError, match=r"truediv.*test_numbers.py:\d+ .*: uses \w+ at .*test_numbers.py:\d+ .* as"):
        timm_dd.split(net(fn(lambda x: x / read(x))), 3, example_input=images(1, 3, 9, 9))


ON_THE_BATCH = {
    "more than one": lambda x: x * 2 if x.shape[0] > 1 else x,
    "an odd number": lambda x: x * 2 if x.size(0) % 2 else x,
    "many": lambda x: x * 2 if len(x) > 100 else x,
    "a loop over images": lambda x: torch.stack([image for image in x]),
    "a loop over numbers": lambda x: torch.cat([x[i : i + 1] for i in range(x.shape[0])]),
    "a whole number": lambda x: x * int(x.shape[0]),
    "a text": lambda x: x * {"1": 2.0}.get(f"{x.shape[0]}", 3.0),
}
ON_GRADIENTS = {
    "those of a tensor": lambda x: x * 2 if x.requires_grad else x,
    "a leaf": lambda x: x if x.is_leaf else x * 2,
    "a history": lambda x: x if x.grad_fn is None else x * 2,
    "the mode": lambda x: x * 2 if torch.is_grad_enabled() else x,
}


@pytest.mark.parametrize("name", ON_GRADIENTS)
def test_what_gradients_decide_is_refused(name):
    """A part that trains would do in its evaluation what the merged network does not."""
    with pytest.raises(SplitError, match=r"test_numbers.py:\d+ .* does something else where no gradients are computed"):
        timm_dd.split(net(fn(ON_GRADIENTS[name])), 3, example_input=images(2, 3, 9, 9))


def test_what_gradients_do_not_change():
    """Checkpoints, which also hand tuples on where there were lists."""

    def doubled(c, *xs):
        return c(torch.cat(xs, 1))

    def forward(x, c):
        with torch.no_grad():
            scale = x.mean((2, 3), keepdim=True)
        if torch.is_grad_enabled() and x.requires_grad:
            return checkpoint(doubled, c, x, x, use_reentrant=False) * scale
        return c(torch.cat([x, x], 1)) * scale

    x = images(2, 3, 9, 9)
    split = shake(timm_dd.split(net(fn(forward, nn.Conv2d(24, 12, 1))), 3, domain=Domain.full(3), example_input=x))
    assert split.plan.exact and sum_error(split, timm_dd.merge(split), x) <= RELATIVE


def of_a_method(x):
    try:
        return F.relu(x) if x.shape[1].bit_length() > 2 else x
    except AttributeError:
        return x


# What a forward asks of a tensor or a number besides its value; each is answered so that it computes its ReLU.
ASKED = {
    "is_tensor": lambda x: F.relu(x) if torch.is_tensor(x) else x,
    "isinstance": lambda x: F.relu(x) if isinstance(x, torch.Tensor) else x,
    "a parameter": lambda x: x if isinstance(x, nn.Parameter) else F.relu(x),
    "a buffer": lambda x: x if isinstance(x, nn.Buffer) else F.relu(x),
    "a list": lambda x: x if isinstance(x, (list, tuple)) else F.relu(x),
    "a number": lambda x: F.relu(x) if isinstance(x.shape[1], int) else x,
    "a size": lambda x: F.relu(x) if isinstance(x.shape, torch.Size) and isinstance(x.size(), tuple) else x,
    "a dtype": lambda x: F.relu(x) if isinstance(x.dtype, torch.dtype) else x,
    "a device": lambda x: F.relu(x) if isinstance(x.device, torch.device) else x,
    "its class": lambda x: F.relu(x) if x.__class__ is torch.Tensor else x,
    "its type": lambda x: F.relu(x) if type(x) is torch.Tensor else x,
    "the type of a number": lambda x: F.relu(x) if type(x.size(1)) in (int, float) else x,
    "a type": lambda x: F.relu(x) if isinstance(x.__class__, type) and issubclass(type(type(x)), type) else x,
    "an attribute": lambda x: x if hasattr(x, "tensors") or getattr(x, "mask", None) is not None else F.relu(x),
    "an attribute that it has": lambda x: F.relu(x) if hasattr(x, "shape") and hasattr(x.max(3), "values") else x,
    "a call": lambda x: x if callable(x) else F.relu(x),
    "a method": of_a_method,
}


@pytest.mark.parametrize("name", ASKED)
def test_what_a_tensor_is_is_what_its_value_is(name):
    x, ask = images(2, 3, 9, 9), ASKED[name]
    model = net(fn(lambda x: ask(x) - 0.5 * x.abs()))
    split = shake(timm_dd.split(model, 3, domain=Domain.full(3), example_input=x))
    assert split.plan.exact and sum_error(split, timm_dd.merge(split), x) <= RELATIVE
    assert "relu" in {getattr(node.target, "__name__", "") for node in split[0].graph.nodes}
    assert type(x) is torch.Tensor and not {"type", "callable"} & set(globals())


def test_an_index_that_is_a_list_is_no_tuple():
    with pytest.raises(SplitError, match="does something else where no gradients are computed"):
        timm_dd.split(
            net(fn(lambda x: x[[0, 1]] if x.requires_grad else x[(0, 1)])), 3, example_input=images(2, 3, 9, 9)
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_limits_are_those_of_the_dtype_that_comes(dtype):
    """A mask of the smallest number, in the dtype of a part that was converted after its split."""

    def masked(x):
        scores = x.flatten(2)
        return scores.masked_fill(scores < 0, torch.finfo(scores.dtype).min).softmax(-1).view(x.shape)

    x = images(2, 3, 9, 9)
    split = timm_dd.split(net(fn(masked)).float(), 3, domain=Domain.full(3), example_input=x.float())
    (limit,) = (node for node in split[0].graph.nodes if node.target is torch.finfo)
    assert split.plan.exact and split[0].to(dtype)(x.to(dtype)).isfinite().all() and len(limit.users) == 1


@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("name", ON_THE_BATCH)
def test_what_the_batch_decides_is_refused(name, batch):
    with pytest.raises(SplitError, match=r"test_numbers.py:\d+ .* does something else on a batch of"):
        timm_dd.split(net(fn(ON_THE_BATCH[name])), 2, example_input=images(batch, 3, 9, 9))


def refuses_many(x):
    if x.shape[0] > 100:
        raise ValueError("too many")
    return x


@pytest.mark.parametrize("forward, batch", [(refuses_many, 2), (frames, 4), (frames, 8), (frames_checked, 4)])
def test_batches_that_do_not_run_decide_nothing(forward, batch, tmp_path):
    """The example's own batch runs, and is known from files."""
    x, model = images(batch, 3, 9, 9), net(fn(forward)).double()
    parts = shake(timm_dd.split(model, 3, domain=Domain.full(3), example_input=x))
    assert parts.plan.exact and sum_error(parts, timm_dd.merge(parts), x) <= RELATIVE
    parts.save(tmp_path)
    assert torch.equal(timm_dd.Parts.load(tmp_path, model).eval()(x), parts(x))


class Experts(torch.nn.Module):
    """A filter for each image, mixed of some: all images of a batch are the groups of one convolution."""

    def __init__(self):
        super().__init__()
        self.stem, self.route = torch.nn.Conv2d(3, 12, 1), torch.nn.Linear(12, 4)
        self.experts, self.fc = torch.nn.Parameter(torch.randn(4, 12, 12, 3, 3)), torch.nn.Linear(12, 5)

    def forward(self, x):
        x = self.stem(x).relu()
        b, c, h, w = x.shape
        filters = torch.einsum("be,eoikl->boikl", self.route(x.mean((2, 3))).softmax(1), self.experts)
        y = F.conv2d(x.reshape(1, b * c, h, w), filters.reshape(b * 12, c, 3, 3), padding=1, groups=b)
        return self.fc(y.view(b, 12, h, w).mean((2, 3)))


def test_a_number_of_images_is_that_of_any_batch():
    parts = timm_dd.split(Experts().double(), 3, domain=Domain.full(3), example_input=images(2, 3, 9, 9))
    x = images(5, 3, 9, 9)
    for part in parts:
        one_by_one = torch.cat([part(image[None]) for image in x])
        assert torch.allclose(part(x), one_by_one, rtol=0, atol=1e-12)


class FoldedHeads(torch.nn.Module):
    """Attention with the heads of all images in one dim, as for products of three dims."""

    def __init__(self, by_shape):
        super().__init__()
        self.by_shape, self.stem, self.qkv = by_shape, torch.nn.Conv2d(3, 12, 1), torch.nn.Linear(12, 36)
        self.fc = torch.nn.Linear(12, 5)

    def forward(self, x):
        x = self.stem(x).flatten(2).transpose(1, 2)
        b, n, c = x.shape
        heads = c // 2 if self.by_shape else 6
        qkv = self.qkv(x).view(b, n, 3, heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.reshape(3, b * heads, n, -1).unbind(0)
        y = (q @ k.transpose(1, 2)).softmax(-1) @ v
        return self.fc(y.view(b, heads, n, -1).transpose(1, 2).reshape(b, n, -1).mean(1))


@pytest.mark.parametrize("by_shape", [False, True])
def test_a_number_of_images_times_heads_is_that_of_any_batch(by_shape):
    parts = shake(timm_dd.split(FoldedHeads(by_shape), 3, domain=Domain.full(3), example_input=images(2, 3, 9, 9)))
    assert parts.plan.exact
    loaded = Plan.from_json(json.loads(json.dumps(parts.plan.to_json())))
    assert loaded == parts.plan
    for batch in (1, 2, 5):
        x = images(batch, 3, 9, 9)
        assert sum_error(parts, timm_dd.merge(parts), x) <= RELATIVE
