"""Each way to compute K convolutions against torch's of one part after another, and how the fastest is found."""

import json
import math

import pytest
import torch
from test_capture import Again
from test_packed import CPU, batches, learners
from torch import nn

from timm_dd.surgery import convolutions
from timm_dd.surgery.convolutions import Geometry, is_plain, on_streams, ways
from timm_dd.surgery.packed import pack
from timm_dd.train.engines import Engine, Graphed, Packed, engine
from timm_dd.train.updates import timings
from timm_dd.train.updates.timings import Timings

pytestmark = pytest.mark.versions
PARTS, BATCH = 3, 2
CASES = {
    "plain": (nn.Conv2d(4, 6, 3, padding=1), (5, 7)),
    "without bias, strided": (nn.Conv2d(4, 6, 3, 2, 1, bias=False), (5, 8)),
    "1x1": (nn.Conv2d(4, 6, 1), (5, 7)),
    "1x1, strided": (nn.Conv2d(16, 6, 1, (1, 2)), (5, 7)),
    "grouped": (nn.Conv2d(4, 6, (3, 1), groups=2), (5, 7)),
    "depthwise, dilated": (nn.Conv2d(4, 8, 3, dilation=2, padding=2, groups=4), (6, 7)),
    "odd kernel": (nn.Conv2d(4, 6, (2, 3), (2, 1), (1, 0), (1, 2)), (6, 9)),
    "as large as the image": (nn.Conv2d(4, 6, 3, padding="same"), (4, 4)),
    "1d": (nn.Conv1d(4, 6, 3, 2, 1), (9,)),
    "1d, 1": (nn.Conv1d(4, 6, 1, bias=False), (9,)),
    "3d": (nn.Conv3d(4, 6, 3, padding=(1, 0, 1)), (4, 5, 3)),
    "3d, 1x1x1": (nn.Conv3d(4, 6, 1), (4, 5, 3)),
}


def given(module, size):
    """(x, w, b) of all parts, in float64, with gradients."""
    torch.manual_seed(0)
    w, b = (None if t is None else torch.randn(PARTS, *t.shape) for t in (module.weight, module.bias))
    x = torch.randn(PARTS, BATCH, w.shape[2] * module.groups, *size)
    return [None if t is None else t.double().requires_grad_() for t in (x, w, b)]


def made(way, tensors, at):
    """The result and the gradients of what it is made of."""
    y = way(*tensors, at)
    learned = [t for t in tensors if t is not None]
    weights = torch.linspace(0, 1, y.numel(), dtype=y.dtype).view(y.shape)
    return [y.detach(), *torch.autograd.grad((y * weights).sum(), learned)]


def in_turn(module):
    def way(x, w, b, at):
        states = [{"weight": w[k], **({} if b is None else {"bias": b[k]})} for k in range(len(w))]
        return torch.stack([torch.func.functional_call(module, s, (x_k,)) for s, x_k in zip(states, x)])

    return way


@pytest.mark.parametrize("case", CASES)
def test_all_ways_are_torchs_convolutions(case):
    module, size = CASES[case]
    tensors, at = given(module, size), Geometry.of(module)
    expected = made(in_turn(module), tensors, at)
    found = ways(*tensors[:2], at)
    pointwise = case in ("1x1", "1d, 1", "3d, 1x1x1")
    assert is_plain(module) and len(found) == len(set(found)) >= 3
    assert (convolutions.products in found) == pointwise
    others = ("plain", "without bias, strided", "1x1, strided", "odd kernel")
    assert (convolutions.unfolded in found) == (case in others)
    for way in found:
        for mine, theirs in zip(made(way, tensors, at), expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


class Device:
    """In the place of torch.cuda: what the streams of a device are told."""

    def __init__(self):
        self.said = []
        self.Stream = self.current_stream = lambda device=None: Stream(self.said)

    def stream(self, stream):
        return stream


class Stream:
    def __init__(self, said):
        self.said = said

    def wait_stream(self, other):
        self.said.append((self, "waits for", other))

    def __enter__(self):
        self.said.append((self, "works"))

    def __exit__(self, *_):
        pass


def test_streams_wait_for_what_they_work_on(monkeypatch):
    """Each for the stream that gave it, which waits for each."""
    module, size = CASES["plain"]
    tensors, at, device = given(module, size), Geometry.of(module), Device()
    expected = made(in_turn(module), tensors, at)
    monkeypatch.setattr(torch, "get_device_module", lambda _: device)
    with torch.no_grad():
        torch.testing.assert_close(on_streams(*tensors, at), expected[0], rtol=1e-12, atol=1e-12)
    here, said = device.said[0][2], device.said
    each = [line[0] for line in said if line[1] == "works"]
    before = [event for stream in each for event in ((stream, "waits for", here), (stream, "works"))]
    assert len(each) == PARTS and said == before + [(here, "waits for", stream) for stream in each]


class Same(nn.Conv2d):
    def forward(self, x):
        return super().forward(nn.functional.pad(x, (1, 1, 1, 1)))


def test_which_are_plain():
    circular = nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")
    normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3))
    assert not any(map(is_plain, (circular, normed, Same(4, 4, 3), nn.ConvTranspose2d(4, 4, 3), nn.Linear(4, 4))))


def test_one_image():
    parts = [torch.fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 4, 3))) for _ in range(2)]
    x = torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(pack(parts)(x), torch.stack([part(x_k) for part, x_k in zip(parts, x)]))


# ---- the fastest


@pytest.fixture
def seconds(monkeypatch):
    """{way: seconds} in the place of a clock, with what was timed; others fail."""
    told, timed = {}, []

    def clock(run, device):
        run()
        way = run.__defaults__[0].__name__
        timed.append(way)
        if way not in told:
            raise torch.OutOfMemoryError("too large")
        return told[way]

    monkeypatch.setattr(timings, "_seconds", clock)
    return told, timed


def test_the_fastest_is_timed_once(seconds, tmp_path):
    told, timed = seconds
    module, size = CASES["plain"]
    tensors, at, path = given(module, size), Geometry.of(module), tmp_path / "timings.json"
    told.update(grouped=3.0, one_by_one=1.0, unfolded=2.0)
    by = Timings(path)
    assert by.fastest(*tensors, at) is by.fastest(*tensors, at) is convolutions.one_by_one
    assert sorted(timed) == sorted(way.__name__ for way in ways(*tensors[:2], at))
    (row,) = json.loads(path.read_text()).values()
    assert row == {"grouped": 3e6, "one_by_one": 1e6, "unfolded": 2e6}
    told["grouped"] = 0.5
    assert Timings(path).fastest(*tensors, at) is convolutions.one_by_one and len(timed) == 5
    x, w, b = tensors
    last = x.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, (PARTS, -1))
    for some in ((x, w, None), (x[:, :1], w, b), (last, w, b), (x.float(), w.float(), b.float())):
        assert by.fastest(*some, at) is convolutions.grouped
    assert by.fastest(*tensors, at._replace(stride=(2, 2))) is convolutions.grouped
    assert len(json.loads(path.read_text())) == len(by.known) == 6


def test_without_gradients_and_while_a_graph_is_captured_nothing_is_timed(seconds, monkeypatch):
    module, size = CASES["plain"]
    tensors, at, by = given(module, size), Geometry.of(module), Timings()
    with torch.no_grad():
        assert by.fastest(*tensors, at) is convolutions.grouped
    assert by.fastest(*(t.detach() for t in tensors), at) is convolutions.grouped
    monkeypatch.setattr(timings, "capturing", lambda: True)
    assert by.fastest(*tensors, at) is convolutions.grouped and by.known == {} and seconds[1] == []


def test_where_every_way_fails(seconds, capsys):
    module, size = CASES["plain"]
    tensors, at, by = given(module, size), Geometry.of(module), Timings()
    assert by.fastest(*tensors, at) is convolutions.grouped
    assert by.fastest(*tensors, at) is convolutions.grouped and len(seconds[1]) == 5
    assert capsys.readouterr().out == "convolutions are grouped: none could be timed (too large)\n"


@pytest.mark.parametrize("damage", ["", "{", "[1]", '{"x": 1}', '{"x": {"grouped": "fast"}}'])
def test_a_damaged_file_is_written_again(damage, seconds, tmp_path):
    module, size = CASES["plain"]
    path = tmp_path / "timings.json"
    path.write_text(damage)
    seconds[0]["unfolded"] = 1.0
    assert Timings(path).fastest(*given(module, size), Geometry.of(module)) is convolutions.unfolded
    assert [*json.loads(path.read_text()).values()] == [{"unfolded": 1e6}]


def test_two_processes_add_to_one_file(seconds, tmp_path):
    seconds[0]["grouped"] = 1.0
    first, second = (Timings(tmp_path / "timings.json") for _ in range(2))
    for by, case in ((first, "plain"), (second, "1x1")):
        by.fastest(*given(*CASES[case]), Geometry.of(CASES[case][0]))
    assert len(Timings(first.path).known) == len(second.known) == 2


def test_no_place_for_the_file(seconds, tmp_path, monkeypatch):
    seconds[0]["one_by_one"] = 1.0
    module, size = CASES["plain"]
    (tmp_path / "file").touch()
    by = Timings(tmp_path / "file" / "timings.json")
    assert by.fastest(*given(module, size), Geometry.of(module)) is convolutions.one_by_one and len(by.known) == 1
    monkeypatch.setattr(timings, "cached_assets_path", lambda *_: (_ for _ in ()).throw(OSError("read-only")))
    assert Timings.of_this_machine().path is None


def test_ways_are_timed():
    """By the clock: each is run, with its backward pass."""
    module, size = CASES["1x1"]
    tensors, at, by = given(module, size), Geometry.of(module), Timings()
    way = by.fastest(*tensors, at)
    (row,) = by.known.values()
    assert row.keys() == {way.__name__ for way in ways(*tensors[:2], at)} and row[way.__name__] == min(row.values())
    assert all(1 < time < 1e6 and math.isfinite(time) for time in row.values())


def test_engines_time_on_devices_only(tmp_path, monkeypatch):
    monkeypatch.setattr(timings, "cached_assets_path", lambda *_: tmp_path)
    some = learners(tmp_path)
    assert engine("packed", some, CPU, 1).timings is None
    assert engine("packed", some, torch.device("mps"), 1).timings.path == tmp_path / timings.FILE


@pytest.mark.parametrize("fastest", ["grouped_channels_last", "one_by_one", "unfolded"])
def test_training_is_the_same_by_any_way(fastest, seconds, tmp_path):
    """And as a graph bit for bit that of the engine."""
    seconds[0].update({fastest: 1.0, "grouped": 2.0})
    expected, found, graphed = (learners(tmp_path / name) for name in "abc")
    by = Packed(timings=Timings())
    for engine_of, some in ((Engine(), expected), (by, found), (Graphed(Packed(timings=Timings()), Again), graphed)):
        for x, y in batches(8):
            engine_of.step(some, x, y, isolate_failures=False)
    assert fastest in seconds[1]
    for parts in zip(expected, found, graphed, strict=True):
        for theirs, mine, same in zip(*(n.net.state_dict().values() for n in parts), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-8)
            assert torch.equal(mine, same)
