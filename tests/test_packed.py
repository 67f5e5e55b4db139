"""Packed parts against the parts themselves: logits, gradients, statistics, optimizer state."""

import copy
import sys
import weakref

import pytest
import torch
import torch.nn.functional as F
from conftest import RUN, images
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import timm_dd
from timm_dd import Domain
from timm_dd.algebra.view import Box
from timm_dd.planning.rules import laws
from timm_dd.planning.rules.op import RULES
from timm_dd.surgery.packed import pack
from timm_dd.train.engines import Auto, Engine, Packed, Threads, engine
from timm_dd.train.settings import options
from timm_dd.train.stages.joint import Joint
from timm_dd.train.updates.learner import Learner
from timm_dd.train.updates.packs import groups

CPU = torch.device("cpu")
QUICK = ["resnet18", "convnext_atto", "mobilenetv3_small_100"]
MODELS = [
    "dd_resnet32", "densenet121", "ghostnet_100", "vgg11_bn", "resnetv2_50",
    "hrnet_w18_small", "resnest14d", "skresnet18", "cspresnet50",
]  # fmt: skip


def still(module):
    """Without dropout, whose masks are others."""
    for m in module.modules():
        if isinstance(m, nn.Dropout):
            m.p = 0.0


@pytest.mark.parametrize("name", QUICK + [pytest.param(name, marks=pytest.mark.slow) for name in MODELS])
def test_packed_is_the_parts(name):
    """Logits, gradients and BatchNorm statistics after a step in training, in float64."""
    parts = timm_dd.split(name, 4, seed=1, img_size=64, num_classes=10, domain=Domain.grid(2, 2, overlap=32))
    parts.double().train()
    still(parts)
    packed = parts.packed()
    assert isinstance(packed, torch.fx.GraphModule) and packed.state_dict().keys() == parts[0].state_dict().keys()
    x = torch.randn(6, 3, 64, 64, dtype=torch.float64)
    crops, weight = torch.stack(parts.crops(x)), torch.randn(4, 6, 10, dtype=torch.float64)
    for mode in (True, False):
        packed.train(mode)
        parts.train(mode)
        packed.zero_grad()
        parts.zero_grad()
        own, all_at_once = parts(x), packed(crops)
        torch.testing.assert_close(all_at_once, own, rtol=1e-7, atol=1e-9)
        (own * weight).sum().backward()
        (all_at_once * weight).sum().backward()
        grads = dict(packed.named_parameters())
        for k, part in enumerate(parts):
            for key, p in part.named_parameters():
                scale = float(p.grad.abs().max()) + 1e-3
                torch.testing.assert_close(grads[key].grad[k], p.grad, rtol=1e-6, atol=1e-8 * scale, msg=key)
    state = packed.state_dict()
    for k, part in enumerate(parts):
        for key, t in part.state_dict().items():
            torch.testing.assert_close(state[key][k], t, rtol=1e-7, atol=1e-9)


def test_load_and_unload():
    parts, others = (timm_dd.split("resnet18", 4, seed=s, img_size=64, num_classes=10).eval() for s in (1, 2))
    packed, x = parts.packed(), torch.randn(2, 3, 64, 64)
    packed.load(others)
    assert torch.allclose(packed(torch.stack(others.crops(x))), others(x), atol=1e-5)
    packed.load(others)
    packed.unload(parts)
    for part, other in zip(parts, others):
        assert all(torch.equal(a, b) for a, b in zip(part.state_dict().values(), other.state_dict().values()))
    with torch.no_grad():
        packed.conv1.weight.zero_()
    assert parts[0].conv1.weight.abs().sum() > 0, "a copy, not a view"
    with pytest.raises(timm_dd.SplitError, match="expected the 4 parts that are packed, got 3"):
        packed.load(list(parts)[:3])


def test_tied_weights_stay_tied():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Conv2d(3, 8, 1)
            self.b, self.c = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
            self.c.weight = self.b.weight

        def forward(self, x):
            return self.c(self.b(self.a(x)).relu()).mean((2, 3))

    parts = timm_dd.split(Tied(), 2, example_input=torch.empty(1, 3, 8, 8))
    packed, x = parts.packed(), torch.randn(2, 3, 8, 8)
    assert packed.b.weight is packed.c.weight
    for own, found in zip(parts(x), packed(torch.stack(parts.crops(x)))):
        assert torch.allclose(own, found, atol=1e-6)


class Around(nn.Module):
    """A network around an operation on feature maps (B, 8, 7, 7)."""

    def __init__(self, operation, *modules):
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 10)
        self.operation, self.inner = operation, nn.ModuleList(modules)

    def forward(self, x):
        return self.fc(self.operation(self.bn(self.conv(x)), *self.inner).mean((2, 3)))


class Circular(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="circular"), weight, bias)


class Twice(nn.Module):
    """A block that has several names and is called by each."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.a = self.b = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.c, self.fc = nn.Sequential(self.a, self.a[0]), nn.Linear(8, 10)

    def forward(self, x):
        return self.fc(self.a[1](self.c(self.b(self.a(self.stem(x))))).mean((2, 3)))


class Recurrent(nn.Module):
    def __init__(self, rnn):
        super().__init__()
        self.conv, self.rnn, self.fc = nn.Conv2d(3, 8, 3), rnn(8, 8, num_layers=2, batch_first=True), nn.Linear(8, 10)

    def forward(self, x):
        return self.fc(self.rnn(self.conv(x).flatten(2).transpose(1, 2))[0].mean(1))


def halves(x, act):
    a = x.flatten(2)
    return act(x) * 2 + a.reshape(x.shape)


def overwritten(x):
    y = x
    y += x.sigmoid()
    return x * F.leaky_relu_(y.mul(-1), 0.2) + y


def made_and_changed(x):
    """Tensors made of nothing, which are then written to."""
    mask, places = torch.ones(x.shape[2:], dtype=x.dtype), torch.arange(x.shape[3])
    mask[0] = 0.0
    mask[:, 1] *= 0.5
    places[0] = 3
    copied = torch.zeros(x.shape, dtype=x.dtype).copy_(x)
    return (copied * mask * torch.full((1,), 0.5, dtype=x.dtype).mul_(3))[..., places]


class Attends(nn.Module):
    """Heads of the map's channels, with a bias that is learned for all heads, for each, or none."""

    def __init__(self, *bias, **given):
        super().__init__()
        self.given, self.bias = given, nn.Parameter(torch.randn(bias)) if bias else None

    def forward(self, x):
        q = x.flatten(2).unflatten(1, (4, 2)).transpose(2, 3)
        y = F.scaled_dot_product_attention(q, q * 2, q + 1, self.bias, **self.given)
        return y.transpose(2, 3).flatten(1, 2).reshape(x.shape)


SAME = {
    "attention": lambda: Around(lambda x, attends: attends(x), Attends()),
    "causal attention": lambda: Around(lambda x, attends: attends(x), Attends(is_causal=True)),
    "attention with a bias": lambda: Around(lambda x, attends: attends(x), Attends(49, 49, scale=0.3)),
    "attention with a bias of each head": lambda: Around(lambda x, attends: attends(x), Attends(4, 49, 49)),
    "attention of one head": lambda: Around(
        lambda x: x * F.scaled_dot_product_attention(*[x.mean(1)] * 3).unsqueeze(1).tanh()
    ),
    "overwritten by a module": lambda: Around(lambda x, act: act(x) + x, nn.ReLU(inplace=True)),
    "the result not used": lambda: Around(lambda x, act: (act(x), x)[1], nn.Hardswish(inplace=True)),
    "a view before": lambda: Around(halves, nn.LeakyReLU(0.3, inplace=True)),
    "a view overwritten": lambda: Around(
        lambda x, act: act(x.flatten(2)).reshape(x.shape) + x, nn.Threshold(0.1, 0.0, inplace=True)
    ),
    "through dropout": lambda: Around(lambda x, no, act: act(no(x)) + x, nn.Dropout(0.0), nn.ReLU(inplace=True)),
    "by functions": lambda: Around(lambda x: x.add_(1.0).mul(2) + torch.relu_(x)),
    "by operators": lambda: Around(overwritten),
    "what is made of nothing": lambda: Around(made_and_changed),
    "one module twice": lambda: Around(lambda x, bn: bn(bn(x).relu()), nn.BatchNorm2d(8)),
    "several names": Twice,
    "momentum None": lambda: Around(lambda x, bn: bn(x), nn.BatchNorm2d(8, momentum=None)),
    "no statistics": lambda: Around(lambda x, bn: bn(x), nn.BatchNorm2d(8, track_running_stats=False)),
    "RReLU": lambda: Around(lambda x, act: act(x), nn.RReLU(0.25, 0.25)),
    "RReLU in place": lambda: Around(lambda x, act: act(x) * x, nn.RReLU(0.25, 0.25, inplace=True)),
    "F.rrelu": lambda: Around(lambda x: F.rrelu(x, 0.25, 0.25, training=True)),
    "a drop path by hand": lambda: Around(lambda x, drop: drop(x), ByHand()),
    "a convolution of its own": lambda: Around(lambda x, conv: conv(x), Circular(8, 8, 3, padding=1)),
    "RNN": lambda: Recurrent(nn.RNN),
    "LSTM": lambda: Recurrent(nn.LSTM),
    "GRU": lambda: Recurrent(nn.GRU),
}


class ByHand(nn.Module):
    """Branches on a value; draws the same for all."""

    def forward(self, x):
        return x * 3 if self.training and torch.ones(1) > 0 else x


@pytest.mark.parametrize("make", SAME.values(), ids=SAME)
def test_packed_is_no_other_network(make):
    """Outputs, gradients and all buffers, over several calls in both modes."""
    parts = timm_dd.split(make().double(), 2, example_input=torch.empty(1, 3, 9, 9), domain=Domain.full(2))
    packed, x = parts.packed(), images(4, 3, 9, 9)
    for mode in (True, True, False, True):
        networks = (parts.train(mode), packed.train(mode))
        for network, given in zip(networks, (x, torch.stack(parts.crops(x)))):
            network.zero_grad()
            network(given).square().sum().backward()
        torch.testing.assert_close(packed(torch.stack(parts.crops(x))), parts(x), rtol=1e-9, atol=1e-11)
        state, grads = packed.state_dict(), {name: p.grad for name, p in packed.named_parameters()}
        for k, part in enumerate(parts):
            for name, t in part.state_dict().items():
                torch.testing.assert_close(state[name][k], t, rtol=1e-9, atol=1e-11, msg=name)
            for name, p in part.named_parameters():
                torch.testing.assert_close(grads[name][k], p.grad, rtol=1e-7, atol=1e-9, msg=name)


@pytest.mark.parametrize("name", ["a view before", "what is made of nothing"])
def test_in_place_stays_one_graph(name):
    """For a compiler; and where nothing is read again, no module works in place."""
    parts = timm_dd.split(SAME[name](), 2, example_input=torch.empty(1, 3, 9, 9), domain=Domain.full(2))
    packed, x = parts.packed(), torch.randn(4, 3, 9, 9)
    compiled = torch.compile(packed, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(torch.stack(parts.crops(x))), parts(x))
    plain = timm_dd.split("resnet10t", 2, img_size=32, domain=Domain.full(2)).packed()
    assert not any(vars(m).get("inplace") for m in plain.modules())


BOXES = Domain.custom([timm_dd.Box((0, 0), (size, 16)) for size in (16, 16, 16, 24)])


@pytest.mark.parametrize(
    "name, given, message",
    [
        ("resnet18", {"parts": 3}, r"is \(22, 3, 7, 7\) in part 0 and \(21, 3, 7, 7\) in part 1"),
        ("dd_vgg3", {"parts": 4, "domain": BOXES}, "part 3"),
    ],
)
def test_parts_that_differ_are_refused(name, given, message):
    with pytest.raises(timm_dd.SplitError, match=message):
        timm_dd.split(name, **given, img_size=32).packed()


class Idioms(nn.Module):
    """Sizes, pieces, constants, methods, several results."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Linear(64, 10)

    def forward(self, x):
        y = self.bn(self.conv(x)).relu()
        a, b = y.chunk(2, 1)
        y = torch.cat([b * torch.arange(y.shape[-1]).div(8), a.mul(2)], dim=1).mean(3)
        return {"logits": self.fc(y.flatten(1)), "maximum": y.max(2)[0].sum(1, keepdim=True)}


class Chooses(nn.Module):
    """A leaf, by its rule below, that reads values of what it gets while it trains."""

    def forward(self, x):
        return x * 2 if self.training and float(x.detach().sum()) > 1e9 else x


class Unstacked(nn.Module):
    """A leaf that writes what is of all parts into what it makes for one."""

    def forward(self, x):
        return x + torch.zeros(x.shape[1:], device=x.device, dtype=x.dtype).add_(x[0])


@pytest.mark.parametrize("leaf", [Chooses, Unstacked])
def test_what_vmap_cannot_take_is_refused(leaf, monkeypatch):
    """When it is packed, in one line that names the place and what to do."""
    monkeypatch.setitem(RULES, leaf, lambda op, x: op.result(x.axes, laws.pointwise, x))
    net = nn.Sequential(nn.Conv2d(3, 8, 1), leaf(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
    parts = timm_dd.split(net, 2, example_input=torch.empty(2, 3, 8, 8))
    assert parts(torch.randn(2, 3, 8, 8)).isfinite().all()
    with pytest.raises(timm_dd.SplitError, match="^1 in .*vmap cannot take this .*one after another") as e:
        parts.packed()
    assert "\n" not in str(e.value)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch's, of attention on CPUs
@pytest.mark.parametrize("need_weights", [True, False])
def test_attention_with_and_without_weights(need_weights):
    """None among the results, and sizes with the methods of theirs."""

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.attention = nn.Conv2d(3, 8, 1), nn.MultiheadAttention(8, 4, batch_first=True)
            self.fc = nn.Linear(8, 2)

        def forward(self, x):
            t = self.stem(x).flatten(2).transpose(1, 2)
            y, _ = self.attention(t, t, t, need_weights=need_weights)
            return self.fc(y.mean(1) / x.shape[2:].numel())

    parts = timm_dd.split(Network(), 2, example_input=torch.empty(2, 3, 8, 8), domain=Domain.full(2))
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(parts.packed()(torch.stack(parts.crops(x))), parts(x))


def test_one_graph_for_a_compiler():
    """fullgraph: what has no single graph is an error; results, gradients and statistics are those of the parts."""
    parts = timm_dd.split(Idioms(), 4, example_input=torch.empty(1, 3, 8, 8), domain=Domain.full(4))
    packed, x = parts.packed(), torch.randn(6, 3, 8, 8)
    compiled = torch.compile(packed, fullgraph=True, backend="eager")
    expected, found = parts(x), compiled(torch.stack(parts.crops(x)))
    for name in ("logits", "maximum"):
        torch.testing.assert_close(found[name], expected[name])
    for result in (expected, found):
        (result["logits"].square().sum() + result["maximum"].sum()).backward()
    for k, part in enumerate(parts):
        for (name, p), q in zip(part.named_parameters(), packed.parameters()):
            torch.testing.assert_close(q.grad[k], p.grad, msg=name)
        torch.testing.assert_close(packed.bn.running_var[k], part.bn.running_var)
        assert packed.bn.num_batches_tracked[k] == 1


def test_a_packed_network_goes_where_it_is_sent():
    """Its own modules share tensors with those they stand for: types, copies and modes stay together."""
    parts = timm_dd.split(Idioms(), 2, example_input=torch.empty(1, 3, 8, 8), domain=Domain.full(2))
    x = torch.randn(2, 3, 8, 8)
    packed = copy.deepcopy(parts.packed().double()).eval()
    parts.double().eval()
    expected = parts(x.double())["logits"]
    torch.testing.assert_close(packed(torch.stack(parts.crops(x.double())))["logits"], expected)
    assert packed.bn.num_batches_tracked.tolist() == [0, 0]


def test_a_deep_copy_has_all_tensors():
    """fx drops what no node uses."""
    part = timm_dd.split("resnet18", 2, img_size=64)[0]
    part.unused = nn.Linear(2, 2)
    again = copy.deepcopy(part)
    assert again.state_dict().keys() == part.state_dict().keys()
    assert again.conv1.weight is not part.conv1.weight and torch.equal(again.conv1.weight, part.conv1.weight)
    again.eval()
    assert part.training and not again.bn1.training


# ---- engines


def learners(tmp_path, *given, parts=4, model="dd_resnet20"):
    args = options.parse([*RUN, "--model", model, *given])
    parts = timm_dd.split(model, parts, seed=3, img_size=32, num_classes=10)
    boxes = parts.plan.boxes()
    return [Learner(f"part {k}", p, boxes[k], args, CPU, 5, 16, k, tmp_path) for k, p in enumerate(parts.double())]


def batches(n):
    generator = torch.Generator().manual_seed(4)
    for _ in range(n):
        yield torch.randn(16, 3, 32, 32, generator=generator).double(), torch.randint(10, (16,), generator=generator)


@pytest.mark.slow
@pytest.mark.parametrize(
    "given",
    [[], ["--opt", "adamw"], ["--clip-grad", "0.1"], ["--grad-accum-steps", "4"], ["--roam", "0.5"], ["--model-ema"]],
    ids=lambda given: " ".join(given),
)
def test_engines_take_the_same_steps(given, tmp_path):
    """Weights, statistics, averages and optimizer state after five updates; packed to rounding, threads bit for bit."""
    found = []
    for by in (Engine(), Threads(2), Packed()):
        some = learners(tmp_path, *given)
        for n in some:
            n.model.train()
        with by:
            for x, y in batches(5):
                by.step(some, x, y, isolate_failures=False)
        found.append([n.state() for n in some])
    expected, threads, packed = found
    for (own, numbers), (bits, same), (close, also) in zip(expected, threads, packed):
        assert own.keys() == bits.keys() == close.keys() and numbers == same == also
        for key, t in own.items():
            assert torch.equal(t, bits[key])
            torch.testing.assert_close(close[key], t, rtol=1e-6, atol=1e-7, msg=key)


def test_a_part_that_diverges_leaves_the_others(tmp_path):
    """Packed: the losses are summed, the gradients are not."""
    some, alone = learners(tmp_path), learners(tmp_path)
    with torch.no_grad():
        some[1].net.conv1.weight.fill_(float("nan"))
    for x, y in batches(2):
        Packed().step(some, x, y, isolate_failures=True)
        Engine().step(alone, x, y, isolate_failures=True)
    for n, other in zip(some, alone):
        ok = n is not some[1]
        assert torch.allclose(n.net.conv1.weight, other.net.conv1.weight) == ok
        n.guard(n.check_finite, isolate_failures=True)
        assert (n.failure is None) == ok


UNEQUAL = {
    "K does not divide the width": (3, Domain.full(3), [[0, 1], [2]]),
    "boxes of several sizes": (4, Domain.custom([Box((0, 0), (e, 32)) for e in (24, 20, 24, 20)]), [[0, 2], [1, 3]]),
    "type B": (5, Domain.type_b(2), [[0, 1, 2], [3, 4]]),
    "both": (6, Domain.custom([Box((0, 0), (e, 32)) for e in (24, 20, 24, 24, 20, 20)]), [[0], [1], [2, 3], [4, 5]]),
}


@pytest.mark.parametrize("model", ["eight channels", "test_efficientnet"])
@pytest.mark.parametrize("parts, domain, expected", UNEQUAL.values(), ids=UNEQUAL)
def test_unequal_parts_are_packed_in_groups(model, parts, domain, expected, tmp_path):
    """Of equal ones: values are those of the parts alone, in training and in evaluation."""
    found = []
    for by in (Engine(), Packed(), Joint(Packed())):
        torch.manual_seed(3)
        if model == "eight channels":
            split = timm_dd.split(
                Around(lambda x: x.relu()), parts, example_input=torch.empty(1, 3, 32, 32), domain=domain
            )
        else:
            split = timm_dd.split(model, parts, seed=3, img_size=32, num_classes=10, domain=domain)
        still(split)
        args, see = options.parse([*RUN, "--opt", "momentum"]), split.plan.boxes()
        see = [None] * parts if isinstance(by, Joint) else see
        some = [Learner(f"{k}", p, see[k], args, CPU, 5, 16, k, tmp_path) for k, p in enumerate(split.double())]
        for x, y in batches(3):
            by.step(some, x, y, isolate_failures=False)
        for n in some:
            n.model.eval()
        found.append((some, by.scores(some, x), [n.logits(x) for n in some]))
    (own, scores, _), (packed, theirs, _), (_, summed, alone) = found
    for n, other, one, two in zip(own, packed, scores, theirs):
        torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-6)
        for key, t in n.state()[0].items():
            torch.testing.assert_close(other.state()[0][key], t, rtol=1e-6, atol=1e-8, msg=key)
    torch.testing.assert_close(summed[0], sum(alone), rtol=1e-5, atol=1e-6)
    if model == "eight channels":
        assert [[int(n.name) for n in group] for group in groups(own)] == expected


def test_auto_takes_the_fastest(tmp_path):
    """After as many updates with each; the first of each does not count."""

    class Slow(Engine):
        def __init__(self, seconds):
            self.seconds, self.steps = list(seconds), 0

        def step(self, *_):
            self.steps += 1
            clock[0] += self.seconds.pop(0)

    clock = [0.0]
    slow, fast = Slow([1, 5, 4, 6]), Slow([99, 3, 3, 3] + [3] * 9)
    auto = Auto([slow, fast], CPU)
    auto._now = lambda: clock[0]
    for _ in range(17):
        auto.step([], None, None, True)
    assert (slow.steps, fast.steps) == (4, 13) and auto.best is fast and auto.engines == [fast]


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_auto_on_a_cpu_takes_engines_of_the_same_bits(tmp_path, one_thread):
    some = learners(tmp_path)
    assert type(engine("auto", some, CPU, 1)) is Engine
    with engine("auto", some, CPU, 2) as auto:
        assert [type(e) for e in auto.engines] == [Engine, Threads]


def test_packed_gives_up_for_another_engine(tmp_path, capsys):
    """In auto's trial: with the updates of the other, from the first batch on."""
    some, alone = learners(tmp_path), learners(tmp_path)
    for n in some:
        n.net.act1 = Branches()
    for n in alone:
        n.net.act1 = nn.ReLU()
    by = Packed(instead=Engine())
    for x, y in batches(2):
        by.step(some, x, y, isolate_failures=True)
        Engine().step(alone, x, y, isolate_failures=True)
    assert all(n.failure is None and n.updates == 2 for n in some)
    assert all(torch.equal(n.net.conv1.weight, other.net.conv1.weight) for n, other in zip(some, alone))
    said = capsys.readouterr().out
    assert said.startswith("not packed: ") and said.count("\n") == 1


def test_who_goes_on_has_the_memory_of_what_failed(tmp_path, capsys):
    """Outside of the failure: with the packed network and the graph of its pass gone."""
    some, left = learners(tmp_path), []

    class Alone(Engine):
        def step(self, *args):
            assert [ref() for ref in left] == [None] * 2 and sys.exc_info() == (None, None, None)
            assert all(p.grad is None for n in some for p in n.net.parameters())
            left.append("gone on")

    by = Packed(instead=Alone())
    first, second = batches(2)
    by.step(some, *first, isolate_failures=True)
    gradients = by.gradients

    def fails(*args):
        gradients(*args)
        graph = torch.ones(2, requires_grad=True) * 2
        left.extend([weakref.ref(by.packs[0].packed), weakref.ref(graph)])
        raise torch.OutOfMemoryError("CUDA out of memory")

    by.gradients = fails
    by.step(some, *second, isolate_failures=True)
    assert left[2:] == ["gone on"] and capsys.readouterr().out == "not packed: CUDA out of memory\n"


@pytest.mark.parametrize("around", [Packed, lambda: Joint(Packed())], ids=["apart", "joint"])
def test_packed_parts_are_evaluated_packed(around, tmp_path, monkeypatch):
    """With the logits of each, on its view; statistics and training are as they were."""
    some, alone, by = learners(tmp_path), learners(tmp_path), around()
    ((x, y),) = batches(1)
    for mine, engine_of in ((some, by), (alone, Packed())):
        for n in mine:
            n.model.train()
        engine_of.step(mine, x, y, isolate_failures=False) if around is Packed else None
    for n in [*some, *alone]:
        n.model.eval()
    expected = [n.logits(x) for n in alone]
    monkeypatch.setattr(Learner, "logits", None)
    found = by.scores(some, x)
    for one, other in zip(found, expected if around is Packed else [sum(expected)] * 4):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    for n, other in zip(some, alone):
        for key, t in n.net.state_dict().items():
            assert torch.equal(t, other.net.state_dict()[key]), key


def test_what_cannot_be_evaluated_packed_is_evaluated_all_the_same(tmp_path, capsys):
    some, by = learners(tmp_path), Packed()
    ((x, _),) = batches(1)
    for n in some:
        n.model.eval()
        n.net.act1 = Branches()
    expected = [n.logits(x) for n in some]
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(by.scores(some, x), expected))
    assert capsys.readouterr().out.count("evaluated one after another: ") == 1
    averaged = learners(tmp_path, "--model-ema")
    assert all(torch.equal(a, n.logits(x)) for a, n in zip(Packed().scores(averaged, x), averaged))


class Branches(nn.Module):
    """On the values of a tensor, of which there are K under vmap."""

    def forward(self, x):
        return x.relu() if float(x.detach().sum()) < 1e9 else x


class Drops(nn.Module):
    def __init__(self):
        super().__init__()
        self.drop, self.fc = nn.Dropout(0.5), nn.Linear(3 * 64, 10, dtype=torch.float64)

    def forward(self, x):
        return self.fc(self.drop(x.flatten(1)))


def test_packed_dropout(tmp_path):
    """Other masks for each part and update; the same again from the same seeds."""

    def weights():
        """Of two parts that are alike, before the first update and after each."""
        torch.manual_seed(7)
        parts = timm_dd.split(Drops(), 2, example_input=torch.empty(1, 3, 8, 8), domain=Domain.full(2))
        args = options.parse([*RUN, "--grad-accum-steps", "2", "--opt", "momentum"])
        some = [Learner(f"part {k}", p, None, args, CPU, 5, 16, k, tmp_path) for k, p in enumerate(parts)]
        some[1].net.load_state_dict(some[0].net.state_dict())
        by, seen = Packed(), [[n.net.fc.weight.detach().clone() for n in some]]
        for _ in range(2):
            by.step(some, torch.ones(16, 3, 8, 8, dtype=torch.float64), torch.arange(16) % 10, isolate_failures=False)
            seen.append([n.net.fc.weight.detach().clone() for n in some])
        return seen

    first, again = weights(), weights()
    assert all(torch.equal(a, b) for x, y in zip(first, again) for a, b in zip(x, y))
    assert torch.equal(first[0][0], first[0][1]) and not torch.equal(first[1][0], first[1][1])
    one, two = (first[i + 1][0] - first[i][0] for i in range(2))
    assert float((one - two).abs().max()) > 0.2 * float(one.abs().max())


class OutOfMemory(nn.Module):
    """Has room for `limit` images."""

    def __init__(self, limit):
        super().__init__()
        self.fc, self.limit, self.seen = nn.Linear(3, 10, dtype=torch.float64), limit, []

    def forward(self, x):
        self.seen.append(len(x))
        if len(x) > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.fc(x.mean((2, 3)))


def test_out_of_memory_halves_the_batch_once(tmp_path, capsys):
    args = options.parse(RUN)
    nets = [OutOfMemory(16), OutOfMemory(8), OutOfMemory(4)]
    for net in nets:
        net.load_state_dict(nets[0].state_dict())
    some = [Learner(f"part {k}", n, None, args, CPU, 5, 16, k, tmp_path) for k, n in enumerate(nets)]
    for x, y in batches(2):
        Engine().step([n for n in some if n.failure is None], x, y, isolate_failures=True)
    assert nets[0].seen == [16, 16] and nets[1].seen == [16, 8, 8, 8, 8]
    torch.testing.assert_close(nets[1].fc.weight, nets[0].fc.weight)
    assert "out of memory with 8 images at a time; use a smaller --batch-size" in some[2].failure
    said = capsys.readouterr().out
    assert "part 1: out of memory; goes on with 8 images at a time, 16 for an update" in said


def test_packed_out_of_memory_halves_the_batch_of_all(tmp_path, capsys):
    some, whole, by, seen = learners(tmp_path), learners(tmp_path), Packed(), []
    gradients = by.gradients

    def limited(learners, x, y):
        seen.append(len(y) // learners[0].micro_batches)
        if seen[-1] > 8:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return gradients(learners, x, y)

    by.gradients = limited
    other = Packed()
    for n in whole:
        n.micro_batches = 2
    for x, y in batches(2):
        by.step(some, x, y, isolate_failures=True)
        other.step(whole, x, y, isolate_failures=True)
    assert seen == [16, 8, 8] and [n.micro_batches for n in some] == [2] * 4
    assert all(torch.equal(n.net.conv1.weight, w.net.conv1.weight) for n, w in zip(some, whole))
    assert "part 0, part 1, part 2, part 3: out of memory; goes on with 8 images" in capsys.readouterr().out


@pytest.mark.slow
def test_compiled_networks_take_the_same_steps(tmp_path):
    """--torchcompile, with the backend that runs the captured graphs as they are; for single parts and packed."""
    for by in (Engine, Packed):
        some, compiled = (
            learners(tmp_path, *given, model="test_resnet") for given in ([], ["--torchcompile", "eager"])
        )
        for x, y in batches(2):
            by().step(some, x, y, isolate_failures=False)
            by().step(compiled, x, y, isolate_failures=False)
        for n, other in zip(some, compiled):
            for key, t in n.net.state_dict().items():
                torch.testing.assert_close(other.net.state_dict()[key], t)


def test_pack_takes_any_like_parts():
    parts = timm_dd.split("resnet18", 4, seed=0, img_size=64, num_classes=10).eval()
    x = torch.randn(2, 3, 32, 32)
    two = pack([parts[1], parts[3]])
    torch.testing.assert_close(two(torch.stack([x, x])), torch.stack([parts[1](x), parts[3](x)]), rtol=1e-4, atol=1e-5)


class Convolves(nn.Module):
    """By a layer, by a function, and transposed."""

    def __init__(self):
        super().__init__()
        self.conv, self.back = nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 8, 2)
        self.weight, self.fc = nn.Parameter(torch.randn(8, 8, 3, 3) / 8), nn.Linear(8, 10)

    def forward(self, x):
        return self.fc(F.conv2d(self.back(self.conv(x).relu()), self.weight).mean((2, 3)))


def test_packed_convolutions_are_as_precise_as_the_parts():
    """Under autocast: the dtypes of all convolutions, and the values."""

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten.convolution.default:
                dtypes.append({t.dtype for t in args[:3] if t is not None})
            return function(*args, **(kwargs or {}))

    parts = timm_dd.split(Convolves(), 2, example_input=torch.empty(1, 3, 16, 16))
    packed, x = parts.packed(), images(2, 3, 16, 16).float()
    with torch.autocast("cpu", torch.bfloat16):
        own, dtypes = parts(x), []
        with Seen():
            found = packed(torch.stack(parts.crops(x)))
    assert dtypes == [{torch.bfloat16}] * 3 and found.dtype == own.dtype
    torch.testing.assert_close(found.float(), own.float(), rtol=2e-2, atol=2e-2)
