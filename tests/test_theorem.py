"""Theorem 2.1 on sub-images and section 2.4, each by value: the parts see their boxes, the merged network all of x."""

import pytest
import torch
from conftest import RELATIVE, images, shake
from torch import nn

import timm_dd
from timm_dd import Box, Domain, MergeError, SplitError


def close(a, b):
    return torch.allclose(a, b, rtol=RELATIVE, atol=RELATIVE)


def split(model, domain, x, **options):
    """Shaken parts of a module and the merged network, in float64."""
    parts = shake(timm_dd.split(model, domain.parts, domain=domain, example_input=x, **options))
    return parts, timm_dd.merge(parts).double().eval()


# ---- the first fully connected layer, (2.13), and the sum of the logits, (2.16)


class Valid(nn.Module):
    """Convolutions with valid padding and pooling, 4 pixels from one position to the next, then fully connected."""

    def __init__(self, dims, size):
        super().__init__()
        conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
        norm = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[dims]
        pool = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}[dims]
        self.body = nn.Sequential(conv(2, 18, 3), norm(18), nn.ReLU(), pool(2), conv(18, 17, 2, stride=2), nn.Tanh())
        with torch.no_grad():
            places = self.body(torch.zeros(1, 2, *size)).numel()
        self.fc1, self.fc2 = nn.Linear(places, 19), nn.Linear(19, 5)

    def forward(self, x):
        return self.fc2(torch.tanh(self.fc1(self.body(x).flatten(1))))


ALIGNED = [
    ((24,), Domain.grid(3)),
    ((24,), Domain.grid(2, overlap=4)),
    ((25,), Domain.grid(2, overlap=4)),
    ((32,), Domain.grid(3, margin=4)),
    ((48,), Domain.type_b(2, axes=1)),
    ((16, 24), Domain.grid(2, 2)),
    ((16, 24), Domain.grid(1, 3)),
    ((24, 24), Domain.grid(2, 2, overlap=8)),
    ((32, 32), Domain.centered8()),
    ((32, 32), Domain.type_b(2)),
    ((24, 24), Domain.custom([Box((0, 4), (24, 12)), Box((8, 8), (9, 16)), Box((12, 0), (12, 24))])),
    ((16, 8, 16), Domain.grid(2, 1, 2)),
    ((16, 16, 16), Domain.grid(2, 2, 2)),
    ((16, 16, 16), Domain.centered8(overlap=4)),
    ((16, 16, 12), Domain.grid(1, 2, 1, overlap=8)),
]


@pytest.mark.parametrize("size, domain", ALIGNED, ids=lambda v: str(v))
def test_sub_images_are_exact_with_valid_padding(size, domain):
    """(2.16) for a network that flattens, boxes aligned with its strides: F(x) = Σ F_k(box k of x)."""
    x = images(2, 2, *size)
    parts, merged = split(Valid(len(size), size), domain, x)
    assert close(merged(x), sum(part(crop) for part, crop in zip(parts, parts.crops(x))))


def owners(parts, name):
    """How many parts write each element of a global tensor."""
    plan = parts.plan
    count = torch.zeros(plan.tensors[name].shape, dtype=torch.int)
    for k in range(plan.parts):
        count[plan.tensors[name].block(k, plan.divisor)] += 1
    return count


def test_the_kernel_of_a_box_stands_in_the_global_one():
    """(2.13), element by element: where boxes overlap, positions have two owners, in different input channels."""
    x = images(1, 2, 24, 24)
    parts, merged = split(Valid(2, (24, 24)), Domain.grid(2, 2, overlap=4), x)
    per, side = 17, 5  # channels, and positions along an axis
    kernel, seen = merged.fc1.weight.view(19, per, side, side), torch.zeros(side, side, dtype=torch.int)
    channels, neurons = [(0, 5), (5, 9), (9, 13), (13, 17)], [(0, 5), (5, 10), (10, 15), (15, 19)]
    for (row, column), (c0, c1), (n0, n1), part in zip([(0, 0), (0, 2), (2, 0), (2, 2)], channels, neurons, parts):
        part_kernel = part.fc1.weight.view(n1 - n0, c1 - c0, 3, 3)
        assert torch.equal(kernel[n0:n1, c0:c1, row : row + 3, column : column + 3], part_kernel)
        seen[row : row + 3, column : column + 3] += 1
    assert int(seen.max()) == 4
    assert int((merged.fc1.weight != 0).sum()) == sum(part.fc1.weight.numel() for part in parts)
    assert int(owners(parts, "fc1.weight").max()) == 1


def test_boxes_that_straddle_a_stride_still_fit():
    """Sizes that do not divide, (2.8): each part has as many positions as its box gives, inside the global kernel."""
    x = images(1, 2, 27, 30)
    parts, merged = split(Valid(2, (27, 30)), Domain.grid(2, 2, overlap=3), x)
    assert parts(x).shape == (4, 1, 5) and merged(x).shape == (1, 5)
    assert int(owners(parts, "fc1.weight").max()) == 1


# ---- section 2.4: other kinds of network


def mlp(sizes):
    layers = [m for a, b in zip(sizes, sizes[1:]) for m in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*layers[:-1])


FEATURES = [Domain.grid(4), Domain.grid(3, overlap=2), Domain.centered8(), Domain.full(2), Domain.type_b(3, axes=1)]


@pytest.mark.parametrize("domain", FEATURES, ids=str)
def test_features_are_cut_for_a_fully_connected_network(domain):
    """(2.11) as section 2.4 modifies it, (2.16) for classes and (2.22) for regression."""
    x = images(3, 21)
    parts, merged = split(mlp([21, 24, 17, 5]), domain, x)
    assert parts.plan.exact
    assert close(merged(x), parts(x).sum(0))
    assert close(timm_dd.merge(parts, head="mean").double()(x), parts(x).mean(0))
    box, part = parts.plan.boxes()[-1], parts[-1]
    rows = part.get_submodule("0").weight.shape[0]
    first = merged[0].weight[-rows:]
    start, extent = box.start[0], box.extent[0]
    assert int((first != 0).sum()) == rows * extent and bool((first[:, start : start + extent] != 0).all())


def test_large_strides():
    """Five convolutions of stride 4: 1024 samples from one position to the next."""
    layers = [m for a, b in zip((1, 8, 8, 8, 8), (8, 8, 8, 8, 8)) for m in (nn.Conv1d(a, b, 4, stride=4), nn.Tanh())]
    net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * 160, 3))
    x = images(1, 1, 163_840)
    parts, merged = split(net, Domain.grid(2), x)
    assert close(merged(x), parts(x).sum(0))


def test_the_default_cuts_features():
    assert str(timm_dd.split(mlp([12, 8, 3]), 4, example_input=torch.empty(1, 12)).plan.domain) == "grid 4"


@pytest.mark.parametrize("domain", [Domain.grid(4), Domain.grid(3, overlap=2), Domain.full(2)], ids=str)
def test_an_autoencoder_reconstructs_box_by_box(domain):
    """Section 2.4: the output is the concatenation of the parts' outputs; where boxes overlap, their sum."""
    x = images(3, 13)
    parts, merged = split(mlp([13, 24, 8, 24, 13]), domain, x, reconstruct=True)
    whole = torch.zeros(3, 13, dtype=torch.float64)
    for part, box, crop in zip(parts, parts.plan.boxes(), parts.crops(x)):
        assert part(crop).shape == crop.shape
        box.crop(whole).add_(part(crop))
    assert parts.plan.exact and close(merged(x), whole)
    again = timm_dd.split(merged, domain.parts, domain=domain, example_input=x, reconstruct=True)
    assert close(timm_dd.merge(again).double()(x), whole)
    with pytest.raises(MergeError, match="no weights of their own"):
        timm_dd.merge(parts, head="mean")


class Convolutional(nn.Module):
    """An auto-encoder of images."""

    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Conv2d(3, 8, 2, stride=2), nn.ConvTranspose2d(8, 3, 2, stride=2)

    def forward(self, x):
        return self.up(torch.tanh(self.down(x)))


def test_a_convolutional_autoencoder():
    """Its parts' outputs add up at every position, so that their mean is the reconstruction, (2.22)."""
    x = images(2, 3, 16, 16)
    parts, merged = split(Convolutional(), Domain.full(4), x, reconstruct=True)
    assert close(merged(x), parts(x).sum(0))
    assert close(timm_dd.merge(parts, head="mean").double()(x), parts(x).mean(0))
    with pytest.raises(SplitError, match="of a box of 5 pixels comes an output of 4"):
        timm_dd.split(Convolutional(), 3, example_input=torch.empty(1, 3, 16, 16), reconstruct=True)


def test_reconstructions_of_boxes_of_several_sizes_are_a_list():
    x = images(2, 13)
    parts, _ = split(mlp([13, 8, 13]), Domain.grid(2), x, reconstruct=True)
    assert [y.shape for y in parts(x)] == [(2, 6), (2, 7)]


def test_a_reconstruction_has_the_shape_of_the_input():
    with pytest.raises(SplitError, match=r"expects an output of the input's shape \(13,\), got \(5,\)"):
        timm_dd.split(mlp([13, 8, 5]), 2, example_input=torch.empty(1, 13), reconstruct=True)


class Sequence(nn.Module):
    """A recurrent network with an output in every step, (2.27)–(2.28)."""

    def __init__(self, kind, features, **kwargs):
        super().__init__()
        self.rnn = kind(features, 12, batch_first=True, **kwargs)
        self.out = nn.Linear((2 if self.rnn.bidirectional else 1) * (self.rnn.proj_size or 12), 4)

    def forward(self, x):
        return self.out(self.rnn(x)[0])


@pytest.mark.parametrize("domain", [Domain.grid(4), Domain.grid(2, overlap=3), Domain.full(3)], ids=str)
@pytest.mark.parametrize(
    "kind, kwargs",
    [(nn.RNN, {}), (nn.GRU, {"num_layers": 2}), (nn.LSTM, {"bidirectional": True}), (nn.LSTM, {"proj_size": 6})],
)
def test_features_are_cut_for_a_recurrent_network(kind, kwargs, domain):
    """(2.29): part k reads its features of each step; hidden states are the global network's on its channels."""
    x = images(2, 5, 11)
    parts, merged = split(Sequence(kind, 11, **kwargs), domain, x)
    assert parts.plan.exact
    assert close(merged(x), parts(x).sum(0))
    states, of_parts = merged.rnn(x)[0], [part.rnn(crop)[0] for part, crop in zip(parts, parts.crops(x))]
    directions = 2 if kwargs.get("bidirectional") else 1
    halves = [
        torch.cat([o.unflatten(-1, (directions, -1))[..., d, :] for o in of_parts], -1) for d in range(directions)
    ]
    assert close(states, torch.cat(halves, -1))


class Given(nn.Module):
    """A recurrent network that is given its first state: zeros that it makes, or a parameter."""

    def __init__(self, kind, learned):
        super().__init__()
        self.rnn, self.out = kind(11, 12, batch_first=True), nn.Linear(12, 4)
        self.first = nn.Parameter(torch.rand(1, 1, 12)) if learned else None

    def forward(self, x):
        if self.first is None:
            state = torch.zeros(1, x.size(0), 12, dtype=torch.float64).to(x.device)
        else:
            state = self.first.expand(-1, x.shape[0], -1).contiguous()
        return self.out(self.rnn(x, (state, state) if isinstance(self.rnn, nn.LSTM) else state)[0][:, -1])


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_given_states_are_cut(kind, learned):
    x = images(3, 5, 11)
    parts, merged = split(Given(kind, learned), Domain.grid(4), x)
    assert parts.plan.exact and parts[0].rnn.hidden_size == 3
    assert close(merged(x), parts(x).sum(0))


def test_a_recurrent_part_keeps_its_weights_in_one_place():
    """torch's recurrent layers hold their weights twice; both are the part's."""
    part = timm_dd.split(Sequence(nn.LSTM, 11), 2, example_input=torch.empty(1, 5, 11))[1]
    assert all(a is b for a, b in zip(part.rnn._flat_weights, part.rnn.parameters()))


# ---- local networks of klawonn2023: the width divisor and the number of boxes are two numbers


@pytest.mark.parametrize("shape, size, classes, parameters", [((2, 2), 32, 10, 89_178), ((3, 3), 180, 5, 273_173)])
def test_local_networks_of_klawonn2023(shape, size, classes, parameters):
    """Its Table 2: half the width whatever the number of boxes; VGG3 on CIFAR-10 and on TF-Flowers."""
    domain = Domain.grid(*shape)
    parts = timm_dd.split(
        "dd_vgg3", domain.parts, domain=domain, width_divisor=2, img_size=size, num_classes=classes
    ).eval()
    assert [sum(p.numel() for p in part.parameters()) for part in parts] == [parameters] * domain.parts
    assert parts(torch.randn(1, 3, size, size)).shape == (domain.parts, 1, classes)


def test_a_width_divisor_of_its_own():
    parts = timm_dd.split("resnet10t", 9, domain=Domain.grid(3, 3), width_divisor=2, img_size=96, num_classes=5)
    assert len(parts) == 9 and parts.eval()(torch.randn(1, 3, 96, 96)).shape == (9, 1, 5)
    half = timm_dd.split("resnet10t", 2, img_size=96, num_classes=5)
    assert [p.shape for p in parts[8].parameters()] == [p.shape for p in half[0].parameters()]
    assert not parts.plan.exact and "not to be merged" in str(parts.plan)
    with pytest.raises(MergeError, match="width_divisor=9, the default, can be merged"):
        timm_dd.merge(parts)


def test_parts_with_a_width_divisor_are_loaded_again(tmp_path):
    parts = timm_dd.split("dd_resnet32", 4, width_divisor=2)
    parts.save(tmp_path / "parts")
    again = timm_dd.Parts.load(tmp_path / "parts")
    assert again.plan == parts.plan
    assert all(torch.equal(a, b) for a, b in zip(parts[3].state_dict().values(), again[3].state_dict().values()))
    with pytest.raises(MergeError, match="divided by 2"):
        timm_dd.merge_files(tmp_path / "parts", tmp_path / "composed")
    assert not (tmp_path / "composed").exists()


@pytest.mark.parametrize("divisor", [0, 1.5, "2"])
def test_bad_width_divisors(divisor):
    with pytest.raises(SplitError, match="width_divisor is a whole number"):
        timm_dd.split("resnet18", 4, width_divisor=divisor)
