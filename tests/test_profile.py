"""Costs against hand formulas, published figures, torch's counter on the CPU, and the parts that split makes."""

import json

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import timm_dd
from timm_dd import Domain, SplitError
from timm_dd.planning.costs import cost
from timm_dd.planning.graphs import skeleton
from timm_dd.planning.rules import has_rule
from timm_dd.planning.trace import trace
from timm_dd.reports.profile import profile


class Tiny(nn.Module):
    def __init__(self, inplace=False):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.Conv2d(8, 16, 3, stride=2)
        self.norm, self.act, self.pool = nn.BatchNorm2d(8), nn.ReLU(inplace), nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(16, 10)

    def forward(self, x):
        x = self.act(self.norm(self.first(x)))
        return self.fc(self.pool(self.second(x)).flatten(1))


def terms(positions, c_in, taps, c_out):
    """Multiply-adds and FLOPs of a convolution, (2.10)."""
    return positions * c_in * taps * c_out, positions * (2 * c_in * taps - 1) * c_out


def added(*layers):
    return tuple(map(sum, zip(*layers)))


def of_module(module, *size):
    """The cost of a network whose operations need no rule."""
    return cost(trace(skeleton(module), has_rule, size), size)


def counted(module, x):
    """Multiply-adds by torch's own counter, with weights, on the CPU."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module.eval()(x)
    return counter.get_total_flops() // 2


def test_a_small_network_by_equation_2_10():
    found = profile(Tiny(), 2, domain=Domain.grid(1, 2), example_input=torch.empty(1, 3, 9, 14))
    assert (found.input_size, found.part_input_size) == ((3, 9, 14), (3, 9, 7))
    whole = added(terms(9 * 14, 3, 9, 8), terms(4 * 6, 8, 9, 16), terms(1, 16, 1, 10))
    part = added(terms(9 * 7, 3, 9, 4), terms(4 * 3, 4, 9, 8), terms(1, 8, 1, 10))
    assert (found.whole.multiply_adds, found.whole.flops) == whole
    assert (found.part.multiply_adds, found.part.flops) == part
    assert (found.whole.parameters, found.whole.statistics) == (216 + 16 + 1152 + 16 + 170, 16)
    assert (found.part.parameters, found.part.statistics) == (108 + 8 + 288 + 8 + 90, 8)


@pytest.mark.parametrize("inplace", [False, True])
def test_activations_are_what_the_operations_make(inplace):
    """The two convolutions, the norm and the mean and deviation that its backward pass reads, the activation unless it
    writes in place, the pooling, the classifier; flatten makes a view."""
    maps = 8 * 9 * 14
    numbers = 2 * maps + 16 + (0 if inplace else maps) + 16 * 4 * 6 + 16 + 10
    assert of_module(Tiny(inplace), 3, 9, 14).activation_bytes == 4 * numbers
    assert of_module(Tiny(inplace).double(), 3, 9, 14).activation_bytes == 8 * numbers


class Reads(nn.Module):
    """A max pooling keeps its indices; slices, sums in place and what is asked of a shape make nothing."""

    def forward(self, x):
        x = F.max_pool2d(x, 2)
        x = x[:, 1:].transpose(2, 3).reshape(x.shape[0], -1)
        return x.add_(1)


def test_indices_are_kept_and_views_are_not():
    found = of_module(nn.Sequential(nn.Conv2d(3, 3, 1, bias=False), Reads()), 3, 8, 8)
    convolved, pooled, flat = 3 * 64, 3 * 16, 2 * 16  # the transposed is copied to be flat
    assert found.activation_bytes == 4 * convolved + (4 + 8) * pooled + 4 * flat


@pytest.mark.parametrize(
    "name, giga_macs, parameters, part_parameters",
    [("resnet50", 4.089, 25.56, 1.99), ("resnet101", 7.80, 44.55, 3.19), ("vgg16", 15.47, 138.36, 4.18)],
)
def test_published_figures(name, giga_macs, parameters, part_parameters):
    """Multiply-adds at 224 as is well known, parameters as in gu2022 Table 2.2 (which cuts off the third decimal)."""
    found = profile(name, 4, img_size=224, domain=Domain.grid(2, 2))
    assert found.whole.multiply_adds / 1e9 == pytest.approx(giga_macs, rel=1e-3)
    assert found.whole.parameters / 1e6 == pytest.approx(parameters, abs=0.01)
    assert found.part.parameters / 1e6 == pytest.approx(part_parameters, abs=0.01)
    assert 50 < found.whole.flops / found.part.flops < 64 and found.whole.uncounted == found.part.uncounted == ()


@pytest.mark.parametrize("depth, whole, part", [(32, 2.24, 0.056), (56, 4.08, 0.103), (110, 8.23, 0.207)])
def test_flops_of_the_cifar_networks(depth, whole, part):
    """gu2022 Table 3.1, boxes of 20×20; benchmarks/paper_tables.py says what it counts beside (2.10)."""
    found = profile(f"dd_resnet{depth}", 4, domain=Domain.grid(2, 2, overlap=4))
    assert 0.98 * whole < found.whole.flops / 1e9 < whole
    assert 0.95 * part < found.part.flops / 1e9 < part


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "efficientnet_b0"])
def test_torch_counts_the_same_on_the_cpu(name):
    found = profile(name, 2, img_size=64, domain=Domain.grid(1, 2))
    parts = timm_dd.split(name, 2, img_size=64, domain=Domain.grid(1, 2))
    model, x = timm.create_model(name), torch.randn(1, 3, 64, 64)
    part = parts[found.k]
    assert found.whole.multiply_adds == counted(model, x)
    assert found.part.multiply_adds == counted(part, parts.crops(x)[found.k])
    for own, net in ((found.whole, model), (found.part, part)):
        assert own.parameters == sum(p.numel() for p in net.parameters())
        assert own.statistics == sum(b.numel() for n, b in net.named_buffers() if "running" in n)
        assert own.uncounted == ()


@pytest.mark.parametrize(
    "layer, size, expected",
    [
        (nn.Conv1d(4, 6, 5), (4, 20), terms(16, 4, 5, 6)),
        (nn.Conv3d(2, 4, 3, stride=2, padding=1), (2, 8, 6, 4), terms(4 * 3 * 2, 2, 27, 4)),
        (nn.Conv2d(4, 8, 3, groups=2, dilation=2), (4, 9, 9), terms(25, 2, 9, 8)),
        # In either group each of 25 inputs of 2 channels meets 9 taps of 3 channels; 11×11 outputs.
        (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), (4, 5, 5), (2_700, 2 * 2_700 - 6 * 11 * 11)),
        # Three of four outputs are sums of nothing.
        (nn.ConvTranspose2d(4, 4, 1, stride=2, groups=4), (4, 5, 5), (100, 100)),
        (nn.Linear(4, 6), (7, 4), terms(7, 4, 1, 6)),
    ],
)
def test_layers_by_formula(layer, size, expected):
    found = of_module(layer, *size)
    assert ((found.multiply_adds, found.flops), found.uncounted) == (expected, ())


class Products(nn.Module):
    def __init__(self):
        super().__init__()
        self.vector = nn.Parameter(torch.randn(5))

    def forward(self, x):
        return torch.einsum("bij,bkj->bik", x, x), x[0] @ self.vector, torch.dot(x[0, 0], self.vector)


def test_all_matrix_products_count():
    found = of_module(Products(), 3, 5)
    assert (found.multiply_adds, found.uncounted) == (9 * 5 + 15 + 5, ())
    assert found.flops == 2 * found.multiply_adds - 9 - 3 - 1


class Sequences(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.recurrent, self.fc = kind(6, 8, batch_first=True), nn.Linear(8, 4)

    def forward(self, x):
        return self.fc(self.recurrent(x)[0][:, -1])


@pytest.mark.parametrize("kind, gates", [(nn.RNN, 1), (nn.GRU, 3), (nn.LSTM, 4)])
def test_recurrent_layers_count(kind, gates):
    """At each of 5 steps each gate multiplies the input and the state by a matrix; a part has half of the features."""
    found = profile(Sequences(kind), 2, domain=Domain.grid(2), example_input=torch.empty(1, 5, 6))
    assert found.whole.multiply_adds == 5 * gates * 8 * (6 + 8) + 8 * 4
    assert found.part.multiply_adds == 5 * gates * 4 * (3 + 4) + 4 * 4
    assert found.whole.uncounted == found.part.uncounted == ()


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x)[0] + F.scaled_dot_product_attention(x, x, x)


def test_attention_counts():
    """On 7 positions of 8 channels: three projections in and one out; twice the scores and what they weigh."""
    found = of_module(Attention(), 7, 8)
    assert (found.multiply_adds, found.uncounted) == (4 * 7 * 8 * 8 + 2 * 2 * 7 * 7 * 8, ())


class Makes(nn.Module):
    """A forward that makes numbers, and drops in training."""

    def forward(self, x):
        x = x + torch.arange(x.shape[-1], device=torch.device("cpu")) + torch.arange(4.0)
        return F.dropout(x, 0.5, self.training)


def test_a_forward_may_make_tensors():
    numbers, sums = 8 * 4, 4 * 3 * 4
    assert of_module(Makes(), 3, 4).activation_bytes == numbers + 2 * sums


class Enlarge(nn.Module):
    def forward(self, x):
        return F.interpolate(x, scale_factor=2, mode="bilinear")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.enlarge, self.fc = nn.Conv2d(3, 8, 3), Enlarge(), nn.Linear(8, 4)

    def forward(self, x):
        return self.fc(self.enlarge(self.conv(x)).mean((2, 3)))


def test_what_cannot_be_counted_is_listed():
    found = profile(Net(), 2, domain=Domain.full(2), example_input=torch.empty(1, 3, 8, 8))
    place = ("enlarge", "interpolate", "aten.upsample_bilinear2d")
    assert found.whole.uncounted == found.part.uncounted == (place,)
    assert found.whole.multiply_adds == added(terms(36, 3, 9, 8), terms(1, 8, 1, 4))[0]
    *_, headline, row = found.text().splitlines()
    assert "not in" in headline and row.split() == ["enlarge", "node", "interpolate", "aten.upsample_bilinear2d"]
    assert found.to_json()["part"]["uncounted"] == [list(place)]


@torch.library.custom_op("timm_dd_test::mix", mutates_args=())
def mix(x: torch.Tensor) -> torch.Tensor:
    return x @ x


@mix.register_fake
def _(x):
    return torch.empty_like(x)


class Unknown(nn.Module):
    def forward(self, x):
        return torch.fft.fft2(x).real + mix(x) + torch.cdist(x, x)


def test_unknown_operations_are_listed():
    found = of_module(Unknown(), 6, 6)
    fft, *others = (op for *_, op in found.uncounted)
    assert fft.startswith("aten._fft") and others == ["timm_dd_test.mix", "aten._cdist_forward"]
    assert found.multiply_adds == 0


class Real(TorchDispatchMode):
    """The most bytes of a tensor made off the meta device."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        real = [t.nbytes for t in tree_leaves(out) if isinstance(t, torch.Tensor) and t.device.type != "meta"]
        self.most = max([self.most, *real])
        return out


def test_no_weights_in_memory():
    with Real() as real:
        found = profile("efficientnet_l2", 4)
    assert found.whole.parameters == 480_309_308
    assert real.most <= 8 * 10_000  # the indices of the channels, at most as many as there are


TABLE = """\
resnet50 in 4 parts; grid 2x2: 3×112×112 of 3×224×224; one image, eval mode

                          global     part 0    ratio
parameters                25.56 M    1.99 M    12.8
statistics                0.0531 M   0.0133 M  4.0
multiply-adds (MACs)      4.09 G     0.0733 G  55.8
FLOPs (2 MACs - outputs)  8.17 G     0.146 G   56.0
activations               87.30 MiB  5.58 MiB  15.7"""


def test_text_and_json():
    found = profile("resnet50", 4, img_size=224, domain=Domain.grid(2, 2))
    assert found.text() == str(found) == TABLE
    plain = json.loads(json.dumps(found.to_json()))
    assert (plain["model"], plain["parts"], plain["k"], plain["batch_size"]) == ("resnet50", 4, 0, 1)
    assert Domain.from_json(plain["domain"]) == Domain.grid(2, 2) and plain["part_input_size"] == [3, 112, 112]
    numbers = {name: n for name, n in plain["global"].items() if name != "uncounted"}
    assert all(type(n) is int for n in numbers.values()) and set(plain["conventions"]) < set(numbers)
    assert numbers["parameters"] == 25_557_032 and plain["part"]["parameters"] == 1_993_976


def test_the_part_with_most_parameters_is_shown():
    """Of five columns the second part sees three, each with its weights in the fully connected layer, (2.13)."""
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Flatten(), nn.Linear(8 * 4 * 5, 4))
    found = profile(net, 2, domain=Domain.grid(1, 2), example_input=torch.empty(1, 3, 4, 5))
    assert (found.k, found.part_input_size) == (1, (3, 4, 3))
    assert found.part.parameters == 3 * 4 + 4 + 4 * 4 * 3 * 4 + 4
    assert found.part.multiply_adds == added(terms(4 * 3, 3, 1, 4), terms(1, 4, 4 * 3, 4))[0]


def test_a_width_divisor():
    found = profile(Net(), 2, width_divisor=4, domain=Domain.full(2), example_input=torch.empty(1, 3, 8, 8))
    assert found.part.multiply_adds == added(terms(36, 3, 9, 2), terms(1, 2, 1, 4))[0]


def test_the_model_stays_as_it_was():
    net = Tiny().train()
    profile(net, 2, example_input=torch.empty(1, 3, 16, 16))
    assert net.training and net.fc.training and not any(t.is_meta for t in net.state_dict().values())


@pytest.mark.parametrize(
    "model, options, message",
    [
        ("resnet5", {}, "did you mean"),
        ("resnet18", {"domain": Domain.full(2)}, "expected 4 boxes"),
        (Net(), {}, "example_input"),
        (Net(), {"example_input": torch.empty(1, 3, 8, 8), "img_size": 8}, "only for a timm name"),
    ],
)
def test_bad_input(model, options, message):
    with pytest.raises(SplitError, match=message):
        profile(model, 4, **options)


def test_it_traces_and_plans_once(counts):
    profile(Tiny(), 2, domain=Domain.grid(1, 2), example_input=torch.empty(1, 3, 9, 14))
    assert counts == {"trace": 1, "plan": 1}
