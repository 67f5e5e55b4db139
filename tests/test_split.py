"""Parts of timm's families and of your own modules: exactness, counts, variance, options and errors."""

import copy
import dataclasses
import pickle
import warnings

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import NARROW, RELATIVE, Plain, check_split, images, shake, sum_error
from timm.layers import StdConv2d
from torch import fx, nn
from torch.nn.utils import parametrizations as by
from torch.nn.utils import prune, spectral_norm, weight_norm

import timm_dd
from timm_dd import Domain, SplitError, TimmDDError
from timm_dd.algebra import axes
from timm_dd.planning.rules.op import RULES
from timm_dd.reports.verify import verify
from timm_dd.surgery import source
from timm_dd.surgery.trial import check_parts_run

QUICK = ["resnet18", "mobilenetv3_small_050", "dd_resnet32"]
FAMILIES = [
    "resnet26d", "resnext50_32x4d", "seresnet50", "regnetx_004", "regnety_004",
    "mobilenetv2_050", "mobilenetv3_large_100", "efficientnet_b0", "tf_efficientnet_b0",
    "densenet121",
]  # fmt: skip


class Interleaved(nn.Module):
    """Features of all positions meet a concatenation of channels, with the positions outside."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.both = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1), nn.Conv2d(3, 16, 1)
        self.fc, self.head = nn.Linear(16 * 16, 16), nn.Conv2d(16, 5, 1)

    def forward(self, x):
        y = self.both(x)
        z = self.fc(y.permute(0, 2, 3, 1).flatten(1))[:, :, None, None]
        return self.head(z + y + torch.cat([self.a(x), self.b(x)], 1)).mean((2, 3))


def test_an_axis_without_a_normal_form_is_refused():
    model, x = Interleaved(), torch.empty(1, 3, 4, 4)
    assert timm_dd.split(model, 2, example_input=x, domain=Domain.full(2)).plan.exact
    with pytest.raises(SplitError, match=r"cannot be cut on these boxes: .*; use Domain.full\(2\)"):
        timm_dd.split(model, 2, example_input=x, domain=Domain.grid(1, 2))


@pytest.mark.parametrize("parts", [3, 4])
@pytest.mark.parametrize("name", QUICK + [pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES])
def test_merged_families_are_the_sum_of_their_parts(name, parts):
    """Theorem 2.1 (2), on the whole image, and the round trip bit for bit."""
    check_split(timm_dd.split(name, parts, domain=Domain.full(parts), img_size=64, num_classes=7))


@pytest.mark.slow
def test_vgg_on_the_whole_image():
    split = shake(timm_dd.split("vgg11_bn", 4, domain=Domain.full(4), num_classes=7))
    assert split.plan.exact
    assert sum_error(split, timm_dd.merge(split), images(1, 3, 224, 224)) <= RELATIVE


@pytest.mark.parametrize(
    "name, params", [("resnet50", 1_993_976), ("resnet101", 3_190_776), ("vgg16", 4_176_056)]
)  # Table 2.2: 1.99M, 3.19M, 4.17M
def test_parameters_of_a_part_in_table_2_2(name, params):
    plan = timm_dd.plan(name, 4)
    assert [plan.params(k) for k in range(4)] == [params] * 4


def test_parameters_in_table_3_1():
    """Table 3.1 has 7.44M and 0.47M: it counts BatchNorm's running means and variances too."""
    plan = timm_dd.plan("dd_resnet32", 4, domain=Domain.grid(2, 2, overlap=4))
    assert plan.params() == sum(p.numel() for p in timm.create_model("dd_resnet32").parameters()) == 7_427_914
    statistics = [n for n in plan.tensors if n.endswith(("running_mean", "running_var"))]
    assert plan.params() + sum(plan.tensors[n].shape[0] for n in statistics) == 7_437_770
    assert plan.params(0) == 466_906


def test_vgg16_has_the_kernels_of_table_2_1():
    """The first fully connected layer is 3×3×128×1024 in each part, at the corners of the global 7×7."""
    fc1 = timm_dd.plan("vgg16", 4).tensors["pre_logits.fc1.weight"]
    assert fc1.shape == (4096, 512, 7, 7)
    assert [fc1.part_shape(k, 4) for k in range(4)] == [(1024, 128, 3, 3)] * 4
    corners = [tuple(ix[0].item() for ix in fc1.index(k, 4)[2:]) for k in range(4)]
    assert corners == [(0, 0), (0, 4), (4, 0), (4, 4)]


@pytest.mark.parametrize(
    "domain", [None, Domain.grid(2, 2, overlap=12), Domain.grid(1, 4), Domain.grid(4, 1, margin=8)]
)
def test_parts_train_on_their_crops(domain):
    parts = shake(timm_dd.split("resnet18", 4, domain=domain, img_size=96, num_classes=5)).train()
    logits = parts(images(2, 3, 96, 96))
    assert logits.shape == (4, 2, 5)
    logits.square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in parts.parameters())


@pytest.mark.parametrize("name", ["mobilenetv4_hybrid_medium", "lambda_resnet26t"])
def test_views_whose_sizes_the_graph_computes_follow_the_box(name):
    """Attention over positions: 8×8 in the model, 5×5 in a part."""
    parts = timm_dd.split(name, 4, domain=Domain.grid(2, 2, overlap=32), img_size=256, num_classes=7).eval()
    assert parts(torch.randn(1, 3, 256, 256)).shape == (4, 1, 7)


# ---- fresh parts


def variances(model, x):
    """Variance of each layer's output, and of the gradient of the loss with respect to it; the logits come last."""
    outputs = []
    hooks = [
        m.register_forward_hook(lambda _m, _x, y: outputs.append(y))
        for m in model.modules()
        if isinstance(m, (nn.Conv2d, nn.Linear))
    ]
    logits = model(x)
    for y in outputs:
        y.retain_grad()
    nn.functional.cross_entropy(logits, torch.arange(len(x)) % logits.shape[1]).backward()
    for hook in hooks:
        hook.remove()
    return torch.tensor([[float(y.detach().var()), float(y.grad.var())] for y in outputs])


@pytest.mark.parametrize("parts", [2, 4])
def test_fresh_parts_keep_the_variance(parts):
    """Layer by layer within a factor of 2 of the global model, without BatchNorm; averaged over parts and seeds."""
    x = torch.randn(64, 3, 16, 16)
    whole, narrow = [], []
    for seed in range(4):
        torch.manual_seed(seed)
        split = timm_dd.split("dd_plain", parts, domain=Domain.full(parts), seed=seed, width=128)
        whole.append(variances(timm_dd.models.create("dd_plain", seed=seed, width=128), x))
        narrow += [variances(part, x) for part in split]
    ratio = torch.stack(narrow).mean(0) / torch.stack(whole).mean(0)
    assert ratio.min() > 0.5 and ratio.max() < 2, ratio


def test_slices_without_rescaling_lose_it():
    """What the re-scaling is for: without it the variance falls K times a layer."""
    model, x = Plain(width=128), torch.randn(32, 3, 16, 16)
    part = timm_dd.split(model, 4, domain=Domain.full(4), example_input=x)[0]
    ratio = variances(part, x)[:, 0] / variances(model, x)[:, 0]
    assert ratio[-2] < 0.05


# ---- options


def test_a_module_is_sliced_as_it_is_and_left_alone():
    model = Plain(width=8).double().train()
    model.convs[1].weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    parts = timm_dd.split(model, 2, example_input=torch.empty(1, 3, 16, 16))
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert model.training and parts[0].training
    assert all(p.dtype == torch.float64 for p in parts.parameters())
    assert not parts[1].convs.get_submodule("1").weight.requires_grad
    assert torch.equal(parts[1].convs.get_submodule("1").weight, model.convs[1].weight[4:, 4:])
    assert all(isinstance(p, fx.GraphModule) for p in parts)


def test_the_graph_is_kept_beside_the_parts():
    """Without weights, in no state dict, the same in deep copies, whatever becomes of the parts; pickles have it."""
    model = Plain(width=8)
    parts = timm_dd.split(model, 2, example_input=IMAGE)
    assert all(t.is_meta for t in parts.graph.state_dict().values())
    assert parts.graph.state_dict().keys() == model.state_dict().keys()
    assert len(parts) == len(list(parts.children())) == 2 and all(key[0] in "01" for key in parts.state_dict())
    again = copy.deepcopy(parts.double())
    assert again.graph is parts.graph and again.origin is model
    assert {p.dtype for p in parts.graph.parameters()} == {torch.float32}
    stored = pickle.loads(pickle.dumps(parts))
    assert verify(timm_dd.merge(parts), stored).failures == []


def test_seed_decides_the_weights_and_spares_the_global_generator():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    a = timm_dd.split("resnet10t", 2, seed=1)
    assert torch.equal(torch.rand(3), expected)
    b, c = timm_dd.split("resnet10t", 2, seed=1), timm_dd.split("resnet10t", 2, seed=2)
    assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())
    assert not torch.equal(a[0].fc.weight, c[0].fc.weight)


def test_one_part_is_the_model():
    model = timm.create_model("resnet10t", num_classes=3).eval()
    x = torch.randn(1, 3, 64, 64)
    parts = timm_dd.split(model, 1, example_input=x)
    assert parts.plan.exact and torch.equal(parts[0](x), model(x))
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in timm_dd.merge(parts).state_dict().items())


def test_a_part_drops_while_it_trains():
    parts = timm_dd.split("resnet10t", 2, drop_rate=0.5, drop_path_rate=0.2, img_size=64)
    part, x = parts[0], torch.randn(2, 3, 32, 64)
    part.train()
    part.apply(lambda m: m.eval() if isinstance(m, nn.modules.batchnorm._BatchNorm) else None)
    assert not torch.equal(part(x), part(x))
    part.eval()
    assert torch.equal(part(x), part(x))


def test_plan_reads_like_a_table():
    text = str(timm_dd.plan("resnet10t", 4, img_size=128))
    assert "layer1.0.conv1" in text and "64×64×64   16×32×32" in text
    assert "exact" in text.splitlines()[-1]
    assert timm_dd.Plan.from_json(timm_dd.plan("resnet10t", 4).to_json()) == timm_dd.plan("resnet10t", 4)


# ---- bad input


class Unknown(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 1)

    def forward(self, x):
        return torch.cdist(self.conv(x), x[:, :1]).flatten(1)


class OfOneSize(nn.Module):
    """Of 5×5 positions; what it branches on is known of such images alone."""

    def __init__(self):
        super().__init__()
        self.conv, self.positions = nn.Conv2d(3, 8, 3), nn.Parameter(torch.zeros(8, 5, 5))

    def forward(self, x):
        y = self.conv(x) + self.positions
        return y.mean((2, 3)) if y.shape[2] > 3 else y.sum((2, 3))


class Branches(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


IMAGE = torch.empty(1, 3, 16, 16)


def hooked(by):
    """A network with a weight that one of torch's old-style hooks computes."""
    model = copy.deepcopy(VALID)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch prefers its parametrizations
        by(model[0], "weight")
    return model


def of_no_parameter(module, name):
    weight = getattr(module, name).detach()
    delattr(module, name)
    setattr(module, name, weight)


def parametrized(norm):
    model = copy.deepcopy(VALID)
    norm(model[0])
    return model


def scripted():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(VALID)


class Nothing(nn.Module):
    """Gives None and a number beside its logits."""

    def __init__(self):
        super().__init__()
        self.net = copy.deepcopy(VALID)

    def forward(self, x):
        return {"logits": self.net(x), "aux": None, "number": 3}


def test_outputs_that_are_no_tensors():
    parts = timm_dd.split(Nothing(), 2, example_input=IMAGE).eval()
    x = torch.randn(2, *IMAGE.shape[1:])
    given = parts(x)
    assert given["aux"] is None and given["number"] == 3
    assert torch.equal(given["logits"], torch.stack([p(c)["logits"] for p, c in zip(parts, parts.crops(x))]))


def test_what_nobody_has_foreseen_names_its_place(monkeypatch):
    def broken(*args):
        raise KeyError("weight")

    monkeypatch.setitem(RULES, nn.Conv2d, broken)
    with pytest.raises(TimmDDError, match=r"Conv2d 0 \(node _0\): KeyError: 'weight'; that is a bug of timm_dd"):
        timm_dd.split(VALID, 2, example_input=IMAGE)
    monkeypatch.setattr(source, "emit", broken)
    with pytest.raises(TimmDDError, match=r"split: KeyError: 'weight'; that is a bug"):
        timm_dd.split(
            nn.Sequential(nn.Flatten(), nn.Linear(12, 4)),
            2,
            example_input=torch.empty(1, 12, 1, 1),
            domain=Domain.full(2),
        )
    with pytest.raises(TypeError, match="missing a required argument: 'parts'"):
        timm_dd.split("resnet18")


VALID = nn.Sequential(nn.Conv2d(3, 8, 5), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))


def holding(tensor):
    model = nn.Sequential(nn.Conv2d(3, 8, 5), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
    model.register_buffer("scale", tensor)
    return model


@pytest.mark.versions
@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: timm_dd.split("resnet5", 4), "did you mean resnet"),
        (lambda: timm_dd.split("resnet18", 0), "from 1 up, got 0"),
        (lambda: timm_dd.split("resnet18", -1), "from 1 up"),
        (lambda: timm_dd.split("resnet18", 2.0), "from 1 up"),
        (lambda: timm_dd.split("resnet18", 65, narrow="refuse"), "has 64 channels .* fewer than 65 parts; .* is 64"),
        (lambda: timm_dd.split("efficientnet_b0", 9, narrow="refuse"), r"conv_reduce .* 4 channels .* is 4"),
        (lambda: timm_dd.split("resnet18", 4, domain=Domain.grid(3, 1)), "expected 4 boxes"),
        (lambda: timm_dd.split("resnet18", 4, seed="0"), "seed: expected a whole number, got str"),
        (lambda: timm_dd.split("test_resnet", 2, seed=2**64), "seed: expected .* 64 bits hold, got 18446744073709551"),
        (lambda: timm_dd.split("test_resnet", 2, seed=-(2**63) - 1), "seed: expected .* 64 bits hold"),
        (lambda: timm_dd.plan("test_resnet", 2, img_size=10**11), "run on images of 3×10+×10+: .*overflow"),
        (lambda: timm_dd.plan("test_resnet", 2, img_size=-5, domain=Domain.full(2)), "run on images of 3×-5×-5"),
        (lambda: timm_dd.split("test_resnet", 2, act_layer="zz"), "cannot create 'test_resnet': KeyError: 'zz'"),
        (lambda: timm_dd.plan("test_resnet", 2, name="x"), "cannot create 'test_resnet': TypeError: .*'name'"),
        (lambda: timm_dd.split(scripted(), 2, example_input=IMAGE), "no Python code to trace"),
        (lambda: timm_dd.split(hooked(of_no_parameter), 2, example_input=IMAGE), "0 .*weight is neither a parameter"),
        (lambda: timm_dd.split(hooked(prune.identity), 2, example_input=IMAGE), "0 has a hook, .*prune.remove"),
        (lambda: timm_dd.split(hooked(weight_norm), 2, example_input=IMAGE), "0 has a hook, .*remove_weight_norm"),
        (lambda: timm_dd.split(hooked(spectral_norm), 2, example_input=IMAGE), "0 has a hook, .*remove_weight_norm"),
        (lambda: timm_dd.split(parametrized(by.spectral_norm), 2, example_input=IMAGE), "0 is parametrized; remove"),
        (lambda: timm_dd.split(parametrized(by.orthogonal), 2, example_input=IMAGE), "0 is parametrized; remove"),
        (lambda: timm_dd.split(holding(torch.ones(8).cfloat()), 2, example_input=IMAGE), "scale is complex64; parts"),
        (lambda: timm_dd.plan(holding(torch.ones(8).to(torch.uint16)), 2, example_input=IMAGE), "scale is uint16; "),
        (lambda: timm_dd.split(holding(2 * VALID[3].bias), 2, example_input=IMAGE), r"scale is computed .* detach\(\)"),
        (lambda: timm_dd.split("dd_resnet32", 4).crops(None), "expected images of .* got NoneType"),
        (lambda: timm_dd.verify(VALID, None), "expected a merged model .* and NoneType"),
        (lambda: timm_dd.split("resnet18", 4, domain=Domain.grid(2, 2, overlap=500)), "larger than the image"),
        (lambda: timm_dd.split("resnet18", 4, colour="red"), "cannot create"),
        (lambda: timm_dd.split(VALID, 4, domain=Domain.grid(4, 1), example_input=IMAGE), "a part's box of 4×16 pixels"),
        (lambda: timm_dd.split(Plain(), 2), "needs example_input"),
        (lambda: timm_dd.split(Plain(), 2, example_input=IMAGE, num_classes=3), "only for a timm name"),
        (lambda: timm_dd.split(Unknown(), 2, example_input=IMAGE), "has no rule"),
        (
            lambda: timm_dd.split(OfOneSize(), 2, example_input=IMAGE),
            r"OfOneSize does not run on images of 3×.*test_split.py:\d+ \(y = .*\) fails: ",
        ),
        (lambda: timm_dd.split(Branches(), 2, example_input=IMAGE), "cannot trace"),
        (lambda: timm_dd.split("dd_resnet32", 4)(torch.empty(1, 3, 30, 30)), "expected images of"),
    ],
)  # fmt: skip
def test_bad_input(call, message):
    with pytest.raises(SplitError, match=message) as e:
        call()
    assert "\n" not in str(e.value)


THIN = {  # the middle of a network, with three channels for four parts, and why it is approximate
    "Conv2d": (nn.Conv2d(8, 3, 1), "reads a sum"),
    "Conv2d, activation": (nn.Sequential(nn.Conv2d(8, 3, 1), nn.ReLU()), "not linear on a sum"),
    "standardised": (StdConv2d(8, 3, 1), "standardises each filter over the input channels"),
    "BatchNorm": (nn.Sequential(nn.Conv2d(8, 3, 1), nn.BatchNorm2d(3)), "not linear on a sum"),
}


@pytest.mark.parametrize("name", THIN)
def test_what_is_narrower_than_k_stays_whole(name):
    middle, reason = THIN[name]
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Tanh(), middle, nn.Conv2d(3, 8, 1), nn.Flatten(), nn.Linear(32, 5))
    with pytest.warns(UserWarning, match=NARROW) as said:
        parts = timm_dd.split(model, 4, domain=Domain.full(4), example_input=torch.empty(1, 3, 4, 4))
    assert len(said) == 1 and said[0].filename == __file__
    ((where, channels),) = parts.plan.narrow
    assert where in str(said[0].message) and where in str(parts.plan) and channels == 3
    check_split(parts, reason)
    with pytest.raises(SplitError, match="3 channels to cut, fewer than 4 parts"):
        timm_dd.split(model, 4, domain=Domain.full(4), example_input=torch.empty(1, 3, 4, 4), narrow="refuse")


@pytest.mark.parametrize("groups, width, too_many", [(32, 128, 40), (4, 64, 17), (1, 12, 13)])
def test_the_largest_k_of_the_message_works(groups, width, too_many):
    model = nn.Sequential(
        nn.Conv2d(3, width, 1), nn.Conv2d(width, width, 1, groups=groups), nn.Flatten(), nn.Linear(width, 2)
    )
    x = torch.empty(1, 3, 1, 1)
    with pytest.raises(SplitError, match="largest K") as e:
        timm_dd.split(model, too_many, domain=Domain.full(too_many), example_input=x, narrow="refuse")
    largest = int(str(e.value).rsplit(" ", 1)[1])
    assert len(timm_dd.split(model, largest, domain=Domain.full(largest), example_input=x)) == largest
    for k in range(largest + 1, too_many):
        with pytest.raises(SplitError):
            timm_dd.split(model, k, domain=Domain.full(k), example_input=x, narrow="refuse")


# ---- every different part runs once before there is a plan


class Cropped(nn.Module):
    """Fewer channels by a padding below zero, of which a part's layers know nothing."""

    def forward(self, x):
        return F.pad(x, (0, 0, 0, 0, -2, -2))


def test_parts_that_would_not_run_are_refused():
    tail = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    model = nn.Sequential(nn.Conv2d(3, 12, 3), Cropped(), *tail)
    with pytest.raises(SplitError, match=r"part 0 does not run on 3×8×8: 4.*reduction dim"):
        timm_dd.split(model, 2, example_input=torch.empty(1, 3, 8, 8), domain=Domain.full(2))


@pytest.mark.parametrize("name, field", [("skresnet18", "edits"), ("densenet121", "outputs")])
def test_a_plan_that_forgets_something_does_not_pass(name, field):
    """Sizes of reshapes, or the places of features."""
    options = {"num_classes": 0} if field == "outputs" else {}
    network = source.Network.of(name, with_weights=False, img_size=64, **options)
    graph, plan = network.plan(4, Domain.full(4))
    assert getattr(plan, field)
    check_parts_run(graph, plan)
    with pytest.raises(SplitError, match="part 0"):
        check_parts_run(graph, dataclasses.replace(plan, **{field: ()}))


def test_splitting_on_another_default_device_changes_no_other_split():
    """What is kept from one split to the next is on the CPU."""
    axes._index.cache_clear()
    with torch.device("meta"):
        parts = timm_dd.split("dd_resnet20", 3, num_classes=6, img_size=30)
    assert {t.device.type for part in parts for t in part.state_dict().values()} == {"meta"}
    parts = timm_dd.split("dd_resnet20", 3, num_classes=6, img_size=30, seed=1)
    assert {t.device.type for part in parts for t in part.state_dict().values()} == {"cpu"}
