"""Prolongation against its definition, element by element: (2.11)–(2.14), (2.16), (2.22)."""

import copy
import itertools
import math
import warnings

import pytest
import timm
import torch
from conftest import NARROW, Plain, images, shake
from safetensors.torch import load_file, save_file
from timm.layers import StdConv2d
from torch import nn

import timm_dd
from timm_dd import Domain, MergeError
from timm_dd.planning.plan import TensorPlan
from timm_dd.surgery.emit import restrict

IMAGE = torch.empty(1, 3, 16, 16)


def blocks(size, parts):
    """Runs of as even a size as can be, by the definition of numpy.array_split."""
    bounds, start = [], 0
    for k in range(parts):
        stop = start + size // parts + (k < size % parts)
        bounds.append(range(start, stop))
        start = stop
    return bounds


@pytest.mark.parametrize("parts", [2, 3, 4])
def test_weights_stand_where_the_paper_puts_them(parts):
    width = 10
    split = shake(timm_dd.split(Plain(width=width, depth=3), parts, example_input=IMAGE, domain=Domain.full(parts)))
    merged = timm_dd.merge(split)
    own = blocks(width, parts)
    for name, outs, ins in [
        ("convs.0.weight", own, [range(3)] * parts),  # (2.11)
        ("convs.1.weight", own, own),  # (2.12)
        ("convs.2.weight", own, own),
        ("fc.weight", [range(10)] * parts, own),  # (2.14)
    ]:
        expected = torch.zeros_like(merged.state_dict()[name])
        for k in range(parts):
            weight = split[k].state_dict()[name]
            for (i, o), (j, c) in itertools.product(enumerate(outs[k]), enumerate(ins[k])):
                expected[o, c] = weight[i, j]
        assert torch.equal(merged.state_dict()[name], expected), name
    bias = sum(part.state_dict()["fc.bias"] for part in split)
    assert torch.allclose(merged.state_dict()["fc.bias"], bias, rtol=1e-15)


@pytest.mark.parametrize("parts", [2, 3, 4, 7])
def test_a_split_model_comes_back_inside_its_blocks(parts):
    """merge(split(model)) is the model on the blocks, zero elsewhere; its summed bias is the model's, bit for bit."""
    model = Plain(width=16, depth=3)
    nn.init.normal_(model.fc.bias)
    merged = timm_dd.merge(timm_dd.split(model, parts, example_input=IMAGE, domain=Domain.full(parts)))
    for name, tensor in merged.state_dict().items():
        original = model.state_dict()[name]
        inside = tensor != 0
        assert torch.equal(tensor[inside], original[inside]), name
    assert torch.equal(merged.fc.bias, model.fc.bias)
    assert torch.equal(merged.fc.weight, model.fc.weight)
    owned = sum(len(b) ** 2 for b in blocks(16, parts)) * 9
    assert int((merged.convs[1].weight != 0).sum()) == owned


def test_mean_head_is_the_mean_of_the_parts():
    """(2.22): weight and bias of the last layer divided by K."""
    x = images(3, 3, 16, 16)
    parts = shake(timm_dd.split(Plain(width=8), 4, example_input=x, domain=Domain.full(4)))
    merged = timm_dd.merge(parts, head="mean").double().eval()
    assert torch.allclose(merged(x), torch.stack([p(x) for p in parts]).mean(0), rtol=1e-9)
    assert torch.equal(merged.convs[0].weight, timm_dd.merge(parts).convs[0].weight)


def test_running_statistics_are_concatenated():
    parts = shake(timm_dd.split("dd_resnet32", 2, domain=Domain.full(2)))
    for part in parts:
        part.bn1.num_batches_tracked.fill_(7)
    state = timm_dd.merge(parts).state_dict()
    assert torch.equal(state["bn1.running_var"], torch.cat([p.bn1.running_var for p in parts]))
    assert int(state["bn1.num_batches_tracked"]) == 7


def test_a_parameter_without_channels_is_averaged():
    class Scaled(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Conv2d(3, 4, 1), nn.PReLU(1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))

    parts = timm_dd.split(Scaled(), 2, example_input=IMAGE, domain=Domain.full(2))
    with torch.no_grad():
        parts[0].get_parameter("1.weight").fill_(1.0)
        parts[1].get_parameter("1.weight").fill_(2.0)
    assert timm_dd.merge(parts)[1].weight.tolist() == [1.5]


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda parts: parts[1].fc.weight.data.fill_(float("nan")), "part 1: fc.weight is not finite"),
        (lambda parts: parts[1].half(), "convert the parts to one dtype"),
        (lambda parts: setattr(parts[0].fc, "weight", nn.Parameter(torch.zeros(3, 3))), "has shape"),
    ],
)
def test_bad_parts(spoil, message):
    parts = timm_dd.split("dd_plain", 2, width=8)
    spoil(parts)
    with pytest.raises(MergeError, match=message):
        timm_dd.merge(parts)


def test_bad_head():
    with pytest.raises(MergeError, match="'sum'"):
        timm_dd.merge(timm_dd.split("dd_plain", 2, width=8), head="max")


@pytest.mark.parametrize("call", [timm_dd.merge, timm_dd.Parts.load, lambda parts: timm_dd.merge_files(parts, "out")])
def test_parts_in_a_list(call):
    with pytest.raises(MergeError, match="expected the Parts that split .* gave, or their folder, got list"):
        call(list(timm_dd.split("dd_plain", 2, width=8)))


# ---- a correction


class Joined(nn.Module):
    """Concatenation, a tied convolution, standardised weights, a learned scalar, a bias that is summed."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 13, 1)
        self.a, self.b = StdConv2d(13, 7, 3, padding=1, bias=True), nn.Conv2d(13, 13, 1)
        self.c, self.act = self.b, nn.PReLU(1)
        self.norm, self.fc = nn.BatchNorm2d(20), nn.Linear(20, 5)

    def forward(self, x):
        x = self.act(self.stem(x))
        x = self.norm(torch.cat([self.a(x), self.c(torch.relu(self.b(x)))], 1))
        return self.fc(x.mean((2, 3)))


class Positions(nn.Module):
    """A fully connected layer that reads channels, by default fewer than parts, at the positions of a part's box."""

    def __init__(self, width=2):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, width, 1), nn.Linear(width * 8 * 8, 4)

    def forward(self, x):
        return self.fc(torch.relu(self.conv(x)).flatten(1))


def small(name, **kwargs):
    return lambda: timm.create_model(name, num_classes=7, **kwargs)


# (network, K, pixels, dtype)
NETWORKS = {
    "BatchNorm": (small("dd_resnet20_16"), 4, 16, torch.float32),
    "K does not divide": (small("dd_resnet20_16"), 3, 16, torch.float32),
    "bfloat16": (small("dd_resnet20_16"), 3, 16, torch.bfloat16),
    "half": (small("dd_resnet20_16"), 5, 16, torch.float16),
    "scaled standardised": (small("test_nfnet"), 3, 64, torch.float32),
    "gates, depthwise": (small("test_efficientnet"), 3, 64, torch.float32),
    "replicated": (small("tinynet_e"), 4, 32, torch.float32),
    "LayerNorm": (small("test_convnext"), 3, 64, torch.float64),
    "joined": (Joined, 3, 8, torch.float32),
    "joined, bfloat16": (Joined, 6, 8, torch.bfloat16),
    "joined, double": (Joined, 4, 8, torch.float64),
    "positions": (Positions, 4, 8, torch.float32),
}
SLOW = {
    "BiT": (small("resnetv2_50x1_bit"), 4, 64, torch.float32),
    "DenseNet": (small("densenet121"), 4, 64, torch.float32),
    "Inception": (small("inception_v3"), 4, 96, torch.float16),
    "MobileNetV3": (small("mobilenetv3_small_050"), 3, 64, torch.bfloat16),
}


def randomised(module, seed=0):
    """All weights and statistics drawn, so that no two are alike and none is zero but the first of each, -0."""
    generator = torch.Generator().manual_seed(seed)
    for t in module.state_dict().values():
        if t.is_floating_point():
            t.copy_(torch.randn(t.shape, generator=generator, dtype=torch.float64) + 0.01)
            t.view(-1)[0] = -0.0
        else:
            t.fill_(11 + seed)
    return module


def parts_of(module, parts, pixels):
    """On boxes with a margin: there are positions that no part has."""
    dtype = next(module.parameters()).dtype
    x = torch.empty(1, 3, pixels, pixels, dtype=dtype)
    domain = Domain.grid(2, 2, margin=1) if isinstance(module, Positions) else Domain.full(parts)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=NARROW)
        return timm_dd.split(module, parts, example_input=x, domain=domain)


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, t in found.items():
        both = [held.reshape(-1).view(torch.uint8) for held in (t, expected[name])]
        assert t.dtype == expected[name].dtype and t.shape == expected[name].shape and torch.equal(*both), name


@pytest.mark.parametrize("name", [*NETWORKS, *(pytest.param(n, marks=pytest.mark.slow) for n in SLOW)])
def test_correction(name, tmp_path):
    """Onto zeros it is merge, onto the model that was split it is that model, bit for bit, in memory and on disk;
    otherwise it is its definition."""
    make, k, pixels, dtype = {**NETWORKS, **SLOW}[name]
    model = randomised(make().to(dtype))
    parts = parts_of(model, k, pixels)
    before = {key: t.clone() for key, t in model.state_dict().items()}
    again = timm_dd.merge(parts, onto=model)
    assert_same(again.state_dict(), before)
    assert again is not model
    assert_same(model.state_dict(), before)

    zero = copy.deepcopy(model)
    for t in zero.state_dict().values():
        t.zero_()
    for i, part in enumerate(parts):
        randomised(part, seed=i + 1)
    assert_same(timm_dd.merge(parts, onto=zero).state_dict(), timm_dd.merge(parts).state_dict())

    corrected = timm_dd.merge(parts, onto=model).state_dict()
    assert_same(model.state_dict(), before)
    parts.save(tmp_path / "parts")
    save_file(before, tmp_path / "model.safetensors")
    timm_dd.merge_files(tmp_path / "parts", tmp_path / "composed", onto=tmp_path)
    assert_same(load_file(tmp_path / "composed" / "model.safetensors"), corrected)

    own, of_model = ([p.state_dict() for p in ps] for ps in (parts, parts_of(model, k, pixels)))
    for key, t in parts.plan.tensors.items():
        if dtype.itemsize < 4 or not before[key].is_floating_point():
            continue
        wide = [(a[key].double(), b[key].double()) for a, b in zip(own, of_model)]
        expected = before[key].double() + sum(prolonged(t, a - b, j, k) for j, (a, b) in enumerate(wide))
        torch.testing.assert_close(corrected[key].double(), expected, rtol=1e-5, atol=1e-5)


def prolonged(t, block, k, parts):
    """P_k of one tensor, by its definition."""
    owners, out = torch.zeros(t.shape), torch.zeros(t.shape, dtype=torch.float64)
    for j in range(parts):
        owners[t.block(j, parts)] += 1
    if t.outside == "mean":
        rows = torch.arange(t.shape[0]) if t.axes[0] is None else t.axes[0].index(k, parts)
        out[rows] = block.mean(tuple(range(1, block.ndim)), keepdim=True)
    at = t.block(k, parts)
    out[at] = block / owners[at] if t.reduce == "mean" else block
    return out


def test_what_no_part_has_stays():
    model = randomised(Positions())
    parts = parts_of(model, 4, 8)
    for part in parts:
        part.fc.weight.data.zero_()
    weight = timm_dd.merge(parts, onto=model).fc.weight.reshape(4, 2, 8, 8)
    assert parts.plan.tensors["fc.weight"].reduce == "mean" and not weight[:, :, 1:-1, 1:-1].any()
    border = torch.ones(8, 8, dtype=torch.bool)
    border[1:-1, 1:-1] = False
    assert torch.equal(weight[:, :, border], model.fc.weight.reshape(4, 2, 8, 8)[:, :, border])


def test_a_correction_with_a_mean_head():
    """The head is that of merge, and what no part has of it stays, undivided."""
    model = randomised(Plain(width=8))
    parts = timm_dd.split(model, 4, example_input=IMAGE, domain=Domain.full(4))
    corrected, merged = timm_dd.merge(parts, head="mean", onto=model), timm_dd.merge(parts, head="mean")
    assert torch.equal(corrected.fc.weight, merged.fc.weight) and torch.equal(corrected.fc.bias, merged.fc.bias)
    assert torch.equal(corrected.fc.weight, model.fc.weight / 4)
    assert torch.equal(corrected.convs[1].weight, model.convs[1].weight)
    model = randomised(Positions(width=8))
    parts = parts_of(model, 4, 8)
    weight, inside = model.fc.weight, torch.zeros(4, 8 * 8 * 8, dtype=torch.bool)
    for k in range(4):
        inside[parts.plan.tensors["fc.weight"].block(k, 4)] = True
    found = timm_dd.merge(parts, head="mean", onto=model).fc.weight
    assert not inside.all() and torch.equal(found, torch.where(inside, weight / 4, weight))


@pytest.mark.parametrize("parts", [1, 2, 3, 7, 32, 100, 300])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_bias_is_shared_out_without_rounding(dtype, parts):
    """From the largest to the smallest that the dtype has."""
    info = torch.finfo(dtype)
    smallest = info.smallest_normal * info.eps
    special = [info.max, info.min, info.smallest_normal, smallest, -7 * smallest, 0.0, 1 - info.eps / 2]
    drawn = torch.randn(500, dtype=torch.float64) * 2.0 ** torch.randint(-14, 15, (500,))
    b = torch.cat([torch.tensor(special, dtype=torch.float64), drawn.clamp(info.min, info.max)]).to(dtype)
    plan = timm_dd.plan("dd_plain", 1)
    object.__setattr__(plan, "parts", parts)
    object.__setattr__(plan, "divisor", parts)
    t = TensorPlan(tuple(b.shape), (None,), "sum")
    first, last = (restrict(b, t, k, plan) for k in (0, parts - 1))
    assert first.dtype == last.dtype == dtype
    total = sum([first.double()] * (parts - 1)) + last.double()
    assert torch.equal(total.to(dtype), b)
    digit = (b.double().abs() * info.eps).clamp(min=smallest)
    assert ((first.double() - b.double() / parts).abs() <= digit).all()


@pytest.mark.parametrize(
    "onto, message",
    [
        (lambda m: Plain(width=8, depth=4), "onto lacks 'convs.4.weight'; it is of another architecture"),
        (lambda m: Plain(width=8, depth=6), "onto has 'convs.5.weight', which the plan does not know"),
        (lambda m: Plain(width=12), r"onto: 'convs.0.weight' has shape \(12, 3, 3, 3\), expected \(8, 3, 3, 3\)"),
        (lambda m: m.half(), "'convs.0.weight' is torch.float16, in the parts it is torch.float32; convert the model"),
        (lambda m: m.fc.bias.data.fill_(float("inf")) is None or m, "onto: fc.bias is not finite; take weights"),
        (lambda m: "composed/", "onto: expected a torch module, got str; merge_files takes a folder"),
    ],
)
def test_bad_onto(onto, message):
    model = Plain(width=8)
    parts = timm_dd.split(model, 2, example_input=IMAGE, domain=Domain.full(2))
    with pytest.raises(MergeError, match=message) as e:
        timm_dd.merge(parts, onto=onto(copy.deepcopy(model)))
    assert "\n" not in str(e.value)


def test_onto_stands_for_the_module_that_was_split(tmp_path):
    model = randomised(Plain(width=8))
    timm_dd.split(model, 2, example_input=IMAGE).save(tmp_path)
    assert_same(timm_dd.merge(tmp_path, onto=model).state_dict(), model.state_dict())


class Clamped(nn.Module):
    """Numbers between bounds, which do not bind until they are set."""

    def __init__(self):
        super().__init__()
        self.stem, self.fc = nn.Linear(5, 8), nn.Linear(8, 3)
        self.register_buffer("low", torch.tensor(-float("inf")))
        self.register_buffer("high", torch.tensor(float("inf")))

    def forward(self, x):
        return self.fc(torch.clamp(self.stem(x), self.low, self.high))


def test_bounds_may_be_infinite(tmp_path):
    model, x = Clamped(), torch.randn(2, 5)
    parts = timm_dd.split(model, 2, example_input=x)
    parts.save(tmp_path / "parts")
    merged = timm_dd.merge(parts)
    assert (merged.low, merged.high) == (-float("inf"), float("inf"))
    assert torch.allclose(merged(x), parts(x).sum(0), atol=1e-6)
    timm_dd.merge_files(tmp_path / "parts", tmp_path / "composed")
    stored = load_file(tmp_path / "composed" / "model.safetensors")
    assert all(torch.equal(stored[name], t) for name, t in merged.state_dict().items())
    timm_dd.merge_files(tmp_path / "parts", tmp_path / "again", onto=tmp_path / "composed")
    parts[1].stem.weight.data[0, 0] = float("inf")
    with pytest.raises(MergeError, match=r"part 1: stem.weight is not finite"):
        timm_dd.merge(parts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "low, message",
    [
        ((math.nan, math.nan), "low'? is not finite"),
        ((-math.inf, 1.0), "'low': what the parts give together is not finite"),
        ((1.0, -math.inf), "'low': what the parts give together is not finite"),
        ((math.inf, -math.inf), "'low': what the parts give together is not finite"),
    ],
)
def test_bounds_of_which_the_parts_say_different_things(low, message, dtype, tmp_path):
    model = Clamped().to(dtype)
    parts = timm_dd.split(model, 2, example_input=torch.empty(2, 5))
    timm_dd.merge_files(saved(parts, tmp_path / "before"), tmp_path / "onto")
    for part, value in zip(parts, low):
        part.low.fill_(value)
    saved(parts, tmp_path / "parts")
    for merge in (
        lambda: timm_dd.merge(parts),
        lambda: timm_dd.merge(tmp_path / "parts", model=model),
        lambda: timm_dd.merge_files(tmp_path / "parts", tmp_path / "composed"),
        lambda: timm_dd.merge_files(tmp_path / "parts", tmp_path / "composed", onto=tmp_path / "onto"),
    ):
        with pytest.raises(MergeError, match=message):
            merge()
    assert not (tmp_path / "composed").exists()


def test_a_model_to_merge_onto_whose_bounds_are_no_numbers(tmp_path):
    model = Clamped()
    parts = timm_dd.split(model, 2, example_input=torch.empty(2, 5))
    model.low.fill_(math.nan)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(MergeError, match="onto: low is not finite"):
        timm_dd.merge(parts, onto=model)
    with pytest.raises(MergeError, match="'low' is not finite"):
        timm_dd.merge_files(saved(parts, tmp_path / "parts"), tmp_path / "composed", onto=tmp_path)


@pytest.mark.parametrize("dtype, largest", [(torch.float16, 40000.0), (torch.float32, 2e38), (torch.float64, 1e308)])
def test_a_sum_that_its_dtype_does_not_hold(dtype, largest, tmp_path):
    parts = timm_dd.split(Plain(width=8).to(dtype), 2, example_input=IMAGE.to(dtype), domain=Domain.full(2))
    for part in parts:
        part.fc.bias.data.fill_(largest)
    with pytest.raises(MergeError, match=f"'fc.bias': what the parts give together is not finite in {dtype}"):
        timm_dd.merge(parts)
    with pytest.raises(MergeError, match=f"'fc.bias': what the parts give together is not finite in {dtype}"):
        timm_dd.merge_files(saved(parts, tmp_path / "parts"), tmp_path / "composed")
    assert not (tmp_path / "composed").exists()


def saved(parts, folder):
    parts.save(folder)
    return folder
