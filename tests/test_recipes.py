"""What people expect of a timm run: averages of weights, accumulation, mixup, rates, trackers, several nodes; and what
is done to the composed model before it is fine-tuned."""

import json
import shutil
import subprocess
import sys
from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import MODULE, RUN, bytes_of_parts, torchrun
from safetensors.torch import load_file
from timm.utils import ModelEmaV3
from torch import nn

import timm_dd
from timm_dd import Domain
from timm_dd.cli import main
from timm_dd.errors import TrainError
from timm_dd.train.epochs.trackers import Trackers
from timm_dd.train.images import data
from timm_dd.train.settings import flags, options
from timm_dd.train.stages import composed
from timm_dd.train.updates.learner import Learner

CPU = torch.device("cpu")
SHORT = [*RUN, "--parts", "2", "--part-epochs", "1", "--epochs", "1", "--drop-path", "0"]


def learner(net, folder, *given):
    return Learner("net", net, None, options.parse([*RUN, *given]), CPU, 5, 16, 0, folder)


def net():
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10)
    ).double()


def batches(n, size=16):
    generator = torch.Generator().manual_seed(4)
    for _ in range(n):
        yield torch.randn(size, 3, 8, 8, generator=generator).double(), torch.randint(10, (size,), generator=generator)


def run(tmp_path, *given):
    assert main(["train", *SHORT, *given, "--output", str(tmp_path), "--experiment", "run"]) == 0
    return tmp_path / "run"


# ---- recipes


@pytest.mark.parametrize("size", [16, 13])
def test_accumulated_gradients_are_those_of_the_batch(size, tmp_path):
    """Without BatchNorm: micro-batches of unequal sizes too."""
    whole, accumulated = learner(net(), tmp_path), learner(net(), tmp_path, "--grad-accum-steps", "4")
    for x, y in batches(3, size):
        whole.step(x, y)
        accumulated.step(x, y)
    for a, b in zip(whole.net.parameters(), accumulated.net.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert abs(whole.check_finite() - accumulated.check_finite()) < 1e-9


def test_an_update_has_the_images_of_all_its_batches():
    args = options.parse([*RUN, "-b", "32", "--grad-accum-steps", "4"])
    train, val, _ = data.datasets(args)
    config = data.data_config(args, timm_dd.models.create("test_resnet", num_classes=10))
    loader, validation = data.loaders(args, config, train, val, CPU, distributed=False)
    assert len(next(iter(loader))[1]) == 128 and len(next(iter(validation))[1]) == 32


@pytest.mark.slow
def test_accumulation_under_ddp(tmp_path):
    """Two ranks, without BatchNorm: the fine-tuned weights are those of whole batches, to rounding."""
    arguments = (
        "--dataset digits --model dd_vgg3 --drop 0 --parts 2 --part-epochs 0 --epochs 1 --warmup-epochs 0 --lr 0.01 "
        f"-j 0 --train-num-samples 256 --device cpu --output {tmp_path}"
    ).split()
    for name, given in (("whole", ["-b", "64"]), ("accumulated", ["-b", "16", "--grad-accum-steps", "4"])):
        done = torchrun(2, *arguments, *given, "--experiment", name)
        assert done.returncode == 0, done.stderr
    files = (tmp_path / name / "global/last/model.safetensors" for name in ("whole", "accumulated"))
    whole, accumulated = map(load_file, files)
    start = load_file(tmp_path / "whole/composed/model.safetensors")
    for key, t in whole.items():
        assert float((t - accumulated[key]).abs().max()) < 1e-3 * float((t - start[key]).abs().max()), key


def test_the_average_of_the_weights(tmp_path):
    """timm's ModelEmaV3 over a copy that takes the same steps; it is what is evaluated, and what a part gives."""
    averaged, reference = learner(net(), tmp_path, "--model-ema", "--model-ema-decay", "0.6"), learner(net(), tmp_path)
    ema = ModelEmaV3(reference.net, decay=0.6)
    for i, (x, y) in enumerate(batches(4)):
        averaged.step(x, y)
        reference.step(x, y)
        ema.update(reference.net, step=i + 1)
    for a, b in zip(averaged.result.parameters(), ema.module.parameters()):
        assert torch.equal(a, b)
    x = next(batches(1))[0]
    assert torch.equal(averaged.logits(x), ema.module(x).float())
    tensors, numbers = averaged.state()
    again = learner(net(), tmp_path, "--model-ema", "--model-ema-decay", "0.6")
    again.restore({key: t.clone() for key, t in tensors.items()}, json.loads(json.dumps(numbers)))
    for x, y in batches(2):
        averaged.step(x, y)
        again.step(x, y)
    assert all(torch.equal(a, b) for a, b in zip(averaged.result.parameters(), again.result.parameters()))


def test_averages_are_what_a_run_gives(tmp_path):
    folder = run(tmp_path, "--model-ema", "--model-ema-decay", "0.5")
    for network, file in (("parts/0", "parts/0/part-00000-of-00002"), ("global", "global/last/model")):
        checkpoint = load_file(next((folder / network).glob("checkpoint*")))
        given = load_file(folder / f"{file}.safetensors")
        assert all(torch.equal(t, checkpoint[f"ema.{key}"]) for key, t in given.items())
        assert not torch.equal(given["conv1.0.weight"], checkpoint["model.conv1.0.weight"])


def test_averages_begin_with_what_is_prepared(tmp_path):
    """BatchNorm re-estimated and the scale of the logits, before the first update."""
    folder = run(tmp_path, "--epochs", "0", "--calibrate", "mean", "--model-ema")
    before, after = (load_file(folder / f"{name}/model.safetensors") for name in ("composed", "global/last"))
    assert torch.equal(after["fc.bias"], before["fc.bias"] / 2)
    assert not torch.equal(after["conv1.1.running_mean"], before["conv1.1.running_mean"])


def test_mixup_gives_soft_targets(tmp_path):
    """timm's: pairs of images, targets that add up to one, with the label smoothing in them."""
    args = options.parse([*RUN, "--mixup", "0.5", "--num-classes", "10"])
    train, val, _ = data.datasets(args)
    config = data.data_config(args, timm_dd.models.create("test_resnet", num_classes=10))
    loader, _ = data.loaders(args, config, train, val, CPU, distributed=False)
    data.seed_epoch(42, 0)
    images, targets = zip(*loader)
    x, y = torch.cat(images), torch.cat(targets)
    assert y.shape == (256, 10) and torch.allclose(y.sum(1), torch.ones(256))
    assert ((y > 0.02).sum(1) == 2).any() and abs(float(y.min()) - 0.1 / 10) < 1e-6
    found = learner(net(), tmp_path, "--mixup", "0.5")
    found.step(x.double(), y.double())
    assert abs(found.check_finite() - float(F.cross_entropy(net()(x.double()).detach(), y.double()))) < 1e-6


def test_mixup_in_a_run(tmp_path):
    assert "tuned" in json.loads((run(tmp_path, "--mixup", "0.5") / "summary.json").read_text())


def test_a_rate_for_each_part(tmp_path):
    """A rate of zero learns nothing."""
    folder = run(tmp_path, "--part-lr", "0", "0.05", "--epochs", "0", "--seed", "5")
    fresh = timm_dd.split("test_resnet", 2, seed=5, img_size=32, num_classes=10, domain=Domain.grid(1, 2, overlap=4))
    found = timm_dd.Parts.load(folder / "parts")
    assert torch.equal(found[0].conv1[0].weight, fresh[0].conv1[0].weight)
    assert not torch.equal(found[1].conv1[0].weight, fresh[1].conv1[0].weight)


def test_packed_in_a_run(tmp_path):
    """The weights of one after another, to rounding; a run that is done can be gone over again."""
    one = run(tmp_path / "a", "--engine", "sequential", "--epochs", "0", "--lr", "0.01")
    two = run(tmp_path / "b", "--engine", "packed", "--epochs", "0", "--lr", "0.01")
    for k in range(2):
        a, b = (load_file(next((r / "parts" / str(k)).glob("part*.safetensors"))) for r in (one, two))
        assert a.keys() == b.keys()
        assert max(float((a[key].double() - b[key].double()).abs().max()) for key in a) < 1e-3
    arguments = [*SHORT, "--engine", "packed", "--epochs", "0", "--lr", "0.01"]
    assert main(["train", *arguments, "--resume", str(two)]) == 0


def test_a_tracker_that_fails_stops_nothing(tmp_path, capsys):
    class Full:
        def add_scalar(self, *_):
            raise OSError("No space left on device")

    trackers = Trackers(options.parse(RUN), tmp_path, 0)
    trackers.board = Full()
    for epoch in (1, 2):
        trackers.log("part 0", epoch, {"loss": 1.0})
    assert capsys.readouterr().out == "no more figures to trackers: No space left on device\n"


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = run(tmp_path, "--log-tensorboard")
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    summary = json.loads((folder / "summary.json").read_text())
    assert [round(e.value, 3) for e in events.Scalars("part 1/top1")] == [round(summary["parts"][1], 3)]
    assert events.Scalars("composed model/loss")[0].step == 1


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_tracker_that_is_not_installed(name, tmp_path, capsys, monkeypatch):
    for module in (name, f"torch.utils.{name}"):
        monkeypatch.setitem(sys.modules, module, None)
    assert main(["train", *SHORT, f"--log-{name}", "--output", str(tmp_path)]) == 1
    assert f"pip install 'timm_dd[{name}]'" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("places", ["one", "two"])
def test_two_nodes(places, tmp_path, free_port):
    """Two torchruns that meet on loopback, with a folder that both see or with one each: the same as one process."""
    given = ["--joint-epochs", "1"]
    one, port = run(tmp_path / "one", *given), free_port()
    launch = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    launch += ["--master-addr", "127.0.0.1", "--master-port", str(port)]
    outputs = [tmp_path / name for name in ("a", "b" if places == "two" else "a")]
    rest = [*MODULE, *SHORT, *given, "--experiment", "two", "--output"]
    logs = [tmp_path / f"node-{i}.log" for i in range(2)]
    commands = [[*launch, "--node-rank", str(i), *rest, str(output)] for i, output in enumerate(outputs)]
    nodes = [subprocess.Popen(c, stdout=log.open("w"), stderr=subprocess.STDOUT) for c, log in zip(commands, logs)]
    try:
        assert [node.wait(timeout=300) for node in nodes] == [0, 0], [log.read_text() for log in logs]
    finally:
        for node in nodes:
            node.kill()
    for output in outputs:
        assert bytes_of_parts(output / "two", 2) == bytes_of_parts(one, 2)
        composed = "composed/model.safetensors"
        assert (output / "two" / composed).read_bytes() == (one / composed).read_bytes()
    said = "does not see the first rank's" in logs[1].read_text()
    assert said is (places == "two") and "does not see" not in logs[0].read_text()


# ---- the composed model before it is fine-tuned


def parts_of(model="dd_resnet20", **given):
    return timm_dd.split(model, 4, seed=0, img_size=32, num_classes=10, **given)


@pytest.mark.parametrize("batches, taken", ((9, 4), (2, 2)))
def test_statistics_are_taken_from_a_thousand_images(batches, taken):
    loader = [(torch.zeros(300, 3), torch.zeros(300))] * batches
    assert len(list(composed.some(loader))) == taken


def test_the_scale_of_the_smallest_cross_entropy():
    """Logits that are s times too large, against a grid of factors."""
    torch.manual_seed(3)
    logits = 3 * torch.randn(2000, 10, dtype=torch.float64)
    targets = torch.distributions.Categorical(logits=logits).sample()
    for s in (0.25, 1.0, 8.0):
        found = composed.fit_scale(logits * s, targets)
        assert abs(found * s - 1) < 0.1
        losses = {f: float(F.cross_entropy(logits * s * f, targets)) for f in (found * 0.98, found, found * 1.02)}
        assert min(losses, key=losses.get) == found


@pytest.mark.parametrize("how", flags.SCALES)
def test_calibration_is_folded_into_the_head(how):
    parts = parts_of()
    model, x = timm_dd.merge(parts).eval(), torch.randn(64, 3, 32, 32)
    before, y = model(x).detach(), torch.randint(10, (64,))
    factor = composed.calibrate(model, parts.plan, how, [(x, y)], CPU)
    expected = {"sum": 1.0, "mean": 0.25, "temperature": composed.fit_scale(before.double(), y)}[how]
    assert abs(factor - expected) < 1e-6
    torch.testing.assert_close(model(x), before * factor, rtol=1e-4, atol=1e-5)


def test_a_model_without_a_head_is_not_scaled():
    parts = timm_dd.split(nn.Sequential(nn.Conv2d(3, 8, 1), nn.Flatten()), 2, example_input=torch.empty(1, 3, 4, 4))
    with pytest.raises(TrainError, match="use sum"):
        composed.calibrate(timm_dd.merge(parts), parts.plan, "mean", [], CPU)


def between(plan, model):
    """Places that no part owns, by merging parts of ones."""
    ones = timm_dd.merge(fill(parts_of(), 1.0)).state_dict()
    return {name: ones[name] == 0 for name, p in model.named_parameters() if p.ndim == 4 and name != "conv1.weight"}


def fill(parts, value):
    with torch.no_grad():
        for p in parts.parameters():
            p.fill_(value)
    return parts


def test_noise_between_the_blocks_alone():
    parts = parts_of()
    model = timm_dd.merge(parts)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    composed.add_noise(list(composed.between(parts.plan, model)), 0.5, seed=1)
    places = between(parts.plan, model)
    assert len(places) > 10
    for name, p in model.named_parameters():
        if name not in places:
            assert torch.equal(p, before[name]), name
            continue
        outside = places[name]
        assert torch.equal(p[~outside], before[name][~outside])
        assert abs(float(p.detach()[outside].std() / before[name][~outside].std()) - 0.5) < 0.1, name


@pytest.mark.slow
@pytest.mark.parametrize("opt", ["sgd", "adamw"])
@pytest.mark.parametrize("factor", [0.0, 0.3, 2.0])
def test_a_rate_between_the_blocks(opt, factor, tmp_path):
    """One update: inside the blocks as without, between them the factor times as far."""
    parts = parts_of()
    plain, found = (tune(parts, tmp_path, opt, rate, updates=1) for rate in (1.0, factor))
    places = between(parts.plan, timm_dd.merge(parts))
    for name, p in plain.items():
        outside = places.get(name, torch.zeros(p.shape, dtype=torch.bool))
        assert torch.equal(found[name][~outside], p[~outside])
        torch.testing.assert_close(found[name][outside], p[outside] * factor, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("opt", ["lookahead_sgd", "lookahead_adamw"])
def test_zeros_between_the_blocks_stay_with_any_optimizer(opt, tmp_path):
    """Lookahead, which wraps another, does something else every sixth time."""
    parts = parts_of()
    found = tune(parts, tmp_path, opt, 0.0, updates=7)
    for name, outside in between(parts.plan, timm_dd.merge(parts)).items():
        assert bool((found[name][outside] == 0).all()) and bool((found[name][~outside] != 0).any()), name


def tune(parts, folder, opt, factor, updates):
    """The composed model's parameters after some updates."""
    n = learner(timm_dd.merge(parts).double(), folder, "--opt", opt, "--lr", "0.01")
    weights = list(composed.between(parts.plan, n.net))
    if factor != 1:
        n.around_step = partial(composed.rate_between, weights, factor)
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for _ in range(updates):
        n.step(x, torch.arange(4))
    return {name: p.detach() for name, p in n.net.named_parameters()}


def test_a_run_with_all_of_it(tmp_path):
    """Frozen zeros between the blocks are still there after fine-tuning."""
    folder = run(tmp_path, "--calibrate", "temperature", "--off-diagonal-lr", "0")
    before, after = (load_file(folder / p / "model.safetensors") for p in ("composed", "global/last"))
    zeros = {k: (v == 0) & (v.ndim == 4) for k, v in before.items()}
    assert sum(int(z.sum()) for z in zeros.values()) > 1000
    assert all(bool((after[k][z] == 0).all()) for k, z in zeros.items())


# ---- cycles


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dd_resnet20", "densenet121", "ghostnet_100", "resnest14d", "resnetv2_50x1_bit"])
def test_channels_in_another_order_are_the_same_model(name):
    """And every part gets channels of all."""
    parts = timm_dd.split(name, 4, seed=0, img_size=64, num_classes=10, domain=Domain.full(4))
    assert parts.plan.exact
    model, x = timm_dd.merge(parts).double().eval(), torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, dtype=p.dtype) * 0.02)
        before, state = model(x), {key: t.clone() for key, t in model.state_dict().items()}
        new = {n: composed.reordered(parts.plan, n, t) for n, t in state.items()}
        model.load_state_dict(new)
        torch.testing.assert_close(model(x), before, rtol=1e-9, atol=1e-9)
    assert any(not torch.equal(new[key], state[key]) for key in state)
    first = torch.arange(64.0)
    axis = timm_dd.split("resnet18", 4, img_size=64).plan.tensors["bn1.weight"].axes[0]
    assert first[axis.round_robin(4)][:16].tolist() == list(range(0, 64, 4))


@pytest.mark.slow
@pytest.mark.parametrize("given", [[], ["--reassign"]], ids=["as before", "reassigned"])
def test_cycles(given, tmp_path):
    """The second cycle's parts begin as slices of the model that the first one fine-tuned, and end in it."""
    both = [*SHORT, "--cycles", "2", "--part-lr", "0", "--no-aug", *given]
    assert main(["train", *both, "--output", str(tmp_path), "--experiment", "one"]) == 0
    first, second = tmp_path / "one", tmp_path / "one" / "cycle-2"
    assert {p.name for p in second.iterdir()} == {p.name for p in first.iterdir()} - {"cycle-2"} | {"start"}
    tuned, parts = load_file(first / "global/last/model.safetensors"), timm_dd.Parts.load(second / "parts")
    if given:
        tuned = {n: composed.reordered(parts.plan, n, t) for n, t in tuned.items()}
    for name, p in parts[1].named_parameters():
        t = parts.plan.tensors[name]
        if t.reduce == "place":
            assert torch.equal(p.detach(), tuned[name][t.block(1, 2)]), name
    merged = load_file(second / "composed/model.safetensors")
    assert all(torch.equal(t, tuned[name]) for name, t in merged.items() if parts.plan.tensors[name].trained)
    assert all(torch.equal(t, tuned[name]) for name, t in load_file(second / "start/model.safetensors").items())


@pytest.mark.slow
def test_a_cycle_keeps_what_lies_between_the_blocks(tmp_path):
    """Whose parts trained: they are merged onto what was split, resumed or not, with the same bits."""
    given = ["train", *SHORT, "--cycles", "2", "--reassign", "--output", str(tmp_path), "--experiment", "one"]
    assert main(given) == 0
    second = tmp_path / "one" / "cycle-2"
    parts, start = timm_dd.Parts.load(second / "parts"), timm.create_model("test_resnet", num_classes=10)
    start.load_state_dict(load_file(second / "start/model.safetensors"))
    merged, own = load_file(second / "composed/model.safetensors"), start.state_dict()
    expected = timm_dd.merge(parts, onto=start).state_dict()
    assert all(torch.equal(t, expected[name]) for name, t in merged.items())
    name = "layer1.0.conv1.weight"
    t, outside = parts.plan.tensors[name], torch.ones(own[name].shape, dtype=torch.bool)
    for k in range(2):
        outside[t.block(k, 2)] = False
    assert own[name][outside].all() and torch.equal(merged[name][outside], own[name][outside])
    assert not torch.equal(merged[name], own[name])
    weights = [(second / name).read_bytes() for name in ("start/model.safetensors", "composed/model.safetensors")]
    for done in ("summary.json", "composed", "global", "start"):
        path = second / done
        path.unlink() if path.is_file() else shutil.rmtree(path)
    assert main([*given, "--resume"]) == 0
    again = [(second / name).read_bytes() for name in ("start/model.safetensors", "composed/model.safetensors")]
    assert again == weights


@pytest.mark.slow
def test_cycles_go_on_and_are_the_same_on_two_ranks(tmp_path):
    both = [*SHORT, "--output", str(tmp_path), "--resume", "--epochs", "0", "--no-update-bn"]
    assert main(["train", *both, "--experiment", "one"]) == 0
    assert main(["train", *both, "--experiment", "one", "--cycles", "2"]) == 0
    done = torchrun(2, *both, "--experiment", "two", "--cycles", "2")
    assert done.returncode == 0, done.stderr
    assert bytes_of_parts(tmp_path / "two" / "cycle-2", 2) == bytes_of_parts(tmp_path / "one" / "cycle-2", 2)
    for name in ("start", "composed"):
        one, two = (tmp_path / run / "cycle-2" / name / "model.safetensors" for run in ("one", "two"))
        assert one.read_bytes() == two.read_bytes()


def test_channels_with_an_order_are_not_reassigned(tmp_path, capsys):
    given = ["--model", "ecaresnet26t", "--img-size", "64", "--cycles", "2", "--reassign", "--parts", "2"]
    assert main(["train", *RUN, *given, "--output", str(tmp_path)]) == 1
    assert "not the same with its channels in another order" in capsys.readouterr().err


def test_a_cycle_that_is_done_is_not_gone_on_with_by_others(one, capsys, monkeypatch):
    """Neither with other options, nor by the second start of another launch."""
    arguments = ["train", *RUN, "--output", str(one.parent), "--experiment", one.name, "--parts", "4", "--cycles", "2"]
    assert main([*arguments, "--resume", "--part-lr", "0.3"]) == 1
    assert "part 0 is done, with other options" in capsys.readouterr().err
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert main(arguments) == 1
    assert "holds a run already" in capsys.readouterr().err
    assert not (one / "cycle-2").exists()


BAD = [
    (["--parts", "1", "--calibrate", "mean"], "--calibrate is for two parts or more"),
    (["--cycles", "0"], "--cycles is a whole number from 1 up"),
    (["--part-lr", "0.1", "0.2", "0.3"], "one rate for all 2 parts or one for each, got 3"),
    (["--grad-accum-steps", "0"], "--grad-accum-steps is a whole number from 1 up"),
    (["--mixup", "0.2", "-b", "33"], "--batch-size is even, got 33"),
    (["--engine", "streams"], "invalid choice"),
]


@pytest.mark.parametrize("given, message", BAD, ids=[message for _, message in BAD])
def test_bad_options(given, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        options.parse([*SHORT, *given])
    assert message in capsys.readouterr().err
