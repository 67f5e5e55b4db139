"""What fine-tuning starts from: the parts' optimizer states, a classifier in closed form, the recipe and the preset."""

import json

import numpy as np
import pytest
import torch
from conftest import RUN, images, shake
from sklearn.linear_model import Ridge
from torch import nn

import timm_dd
from timm_dd import Domain, TrainError
from timm_dd.cli import main
from timm_dd.train.engines import Engine
from timm_dd.train.epochs import checkpoints
from timm_dd.train.run import Run
from timm_dd.train.settings import options
from timm_dd.train.stages import composed, momenta
from timm_dd.train.stages.folder import PartsStage
from timm_dd.train.stages.joint import Joint
from timm_dd.train.updates.learner import Learner

CPU = torch.device("cpu")


def network(parts=4):
    split = timm_dd.split("resnet10t", parts, domain=Domain.full(parts), seed=0, img_size=32, num_classes=10)
    return shake(split).train()


def learner(model, folder, k, *given):
    folder.mkdir(parents=True, exist_ok=True)
    return Learner(f"{k}", model, None, options.parse([*RUN, "--parts", "4", *given]), CPU, 5, 8, k, folder)


OPTIMIZERS = [["--opt", "momentum"], ["--opt", "adamw", "--opt-eps", "1e-3"], ["--opt", "lookahead_adam"]]


@pytest.mark.parametrize("given", OPTIMIZERS, ids=[g[1] for g in OPTIMIZERS])
def test_momenta_are_the_composed_networks_inside_the_blocks(given, tmp_path):
    """After a joint update, whose gradients are the composed network's: its optimizer would have the same states."""
    parts, x, y = network(), images(8, 3, 32, 32), torch.arange(8) % 10
    whole = learner(timm_dd.merge(parts).double().train(), tmp_path / "whole", 9, *given)
    some = [learner(part, tmp_path / "parts" / str(k), k, *given) for k, part in enumerate(parts)]
    tuned = learner(timm_dd.merge(parts).double().train(), tmp_path / "tuned", 9, *given)
    Joint(Engine()).step(some, x, y, isolate_failures=False)
    whole.step(x, y)
    for n in some:
        checkpoints.save(n)
    momenta.carry(tuned, parts.plan, PartsStage(tmp_path / "parts", "part", tuned.args), parts[0], {})
    compared = 0
    for name, p in tuned.net.named_parameters():
        t, q = parts.plan.tensors[name], whole.net.get_parameter(name)
        states, expected = tuned.optimizer.state_dict()["state"], whole.optimizer.state_dict()["state"]
        i = [id(v) for g in tuned.optimizer.param_groups for v in g["params"]].index(id(p))
        j = [id(v) for g in whole.optimizer.param_groups for v in g["params"]].index(id(q))
        assert states[i].keys() == expected[j].keys()
        for kind, state in states[i].items():
            for k in range(4) if isinstance(state, torch.Tensor) and state.ndim else ():
                if kind == "lookahead_slow_buff":
                    continue  # of the weights, as they were before the step
                at = t.block(k, 4)
                torch.testing.assert_close(state[at], expected[j][kind][at], rtol=1e-9, atol=1e-15)
                compared += 1
    assert compared > 100


def test_between_the_blocks_there_is_no_momentum_and_the_mean_second_moment():
    t = network(2).plan.tensors["layer1.0.conv1.weight"]
    shape = t.part_shape(0, 2)
    first, second = (torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)) for _ in range(2))
    outside = torch.ones(t.shape, dtype=torch.bool)
    for k in range(2):
        outside[t.block(k, 2)] = False
    assert 0 < outside.sum() < outside.numel()
    m, v = momenta.merge_state(t, list(first)), momenta.merge_state(t, list(second.square()))
    assert (m[outside] == 0).all()
    torch.testing.assert_close(v[outside], second.square().mean().expand(int(outside.sum())))
    for k in range(2):
        assert torch.equal(m[t.block(k, 2)], first[k]) and torch.equal(v[t.block(k, 2)], second[k].square())


@pytest.mark.parametrize("given", OPTIMIZERS, ids=[g[1] for g in OPTIMIZERS])
def test_momenta_go_to_the_parts_and_back(given, tmp_path):
    """The parts of a fine-tuned model begin with its optimizer's states of their weights; where these do not change,
    the merged ones are those that were split, between the blocks too."""
    parts, x, y = network(), images(8, 3, 32, 32), torch.arange(8) % 10
    whole = learner(timm_dd.merge(parts).double().train(), tmp_path / "whole", 9, *given)
    whole.step(x, y)
    checkpoints.save(whole)
    states = momenta.of_tuned(tmp_path / "whole", whole.args, parts.plan)
    for k, part in enumerate(parts):
        some = learner(part, tmp_path / "parts" / str(k), k, *given)
        momenta.hand_down(some, parts.plan, k, states)
        for name, values in by_name(some).items():
            for kind, state in values.items():
                expected = by_name(whole)[name][kind]
                placed = isinstance(state, torch.Tensor) and state.ndim
                at = parts.plan.tensors[name].block(k, 4) if placed else ...
                assert torch.equal(*(torch.as_tensor(v) for v in (state, torch.as_tensor(expected)[at])))
        checkpoints.save(some)
    tuned = learner(timm_dd.merge(parts).double().train(), tmp_path / "tuned", 9, *given)
    momenta.carry(tuned, parts.plan, PartsStage(tmp_path / "parts", "part", tuned.args), parts[0], states)
    back, before = by_name(tuned), by_name(whole)
    assert back.keys() == before.keys() and len(back) > 20
    for name, values in before.items():
        for kind, state in values.items():
            torch.testing.assert_close(torch.as_tensor(back[name][kind]), torch.as_tensor(state), rtol=1e-15, atol=0)


def by_name(learner):
    """Its optimizer's states, by the parameter's name."""
    states = learner.optimizer.state_dict()["state"]
    parameters = [p for group in learner.optimizer.param_groups for p in group["params"]]
    named = {id(p): name for name, p in learner.net.named_parameters()}
    return {named[id(parameters[i])]: values for i, values in states.items()}


def test_no_momenta_where_there_are_none(tmp_path):
    """No checkpoints, or states of rows and columns."""
    parts, x, y = network(), images(8, 3, 32, 32), torch.arange(8) % 10
    for given in (["--opt", "adamw"], ["--opt", "adafactor"]):
        folder = tmp_path / given[1]
        tuned = learner(timm_dd.merge(parts).double(), folder / "tuned", 9, *given)
        if given[1] == "adafactor":
            for k, part in enumerate(parts):
                n = learner(part, folder / str(k), k, *given)
                n.step(x, y)
                checkpoints.save(n)
        momenta.carry(tuned, parts.plan, PartsStage(folder, "part", tuned.args), parts[0], {})
        assert not tuned.optimizer.state_dict()["state"]


# ---- the classifier


class Features(nn.Module):
    """Some features of a vector, and a classifier."""

    def __init__(self, bias):
        super().__init__()
        self.body, self.fc = nn.Sequential(nn.Linear(12, 16), nn.ReLU()), nn.Linear(16, 3, bias=bias)

    def forward(self, x):
        return self.fc(self.body(x))


def loader(n=600):
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randn(n, 12, generator=generator), torch.randint(3, (n,), generator=generator)
    return [(a, b) for a, b in zip((x + 0.7 * y[:, None]).split(50), y.split(50))]


@pytest.mark.parametrize("bias", [True, False])
def test_the_refitted_head_is_a_ridge_regression(bias):
    """Against scikit-learn's, whose weights are ours but for the scale."""
    torch.manual_seed(0)
    model = Features(bias)
    parts = timm_dd.split(model, 2, domain=Domain.full(2), example_input=torch.empty(1, 12))
    with torch.no_grad():
        features = torch.cat([model.body(x) for x, _ in loader()]).double().numpy()
    targets = np.eye(3)[torch.cat([y for _, y in loader()]).numpy()]
    centred = features - features.mean(0)
    ridge = composed.RIDGE * np.mean((centred**2).sum(0))
    expected = Ridge(alpha=ridge).fit(features, targets)
    composed.refit_head(model, parts.plan, loader(), CPU)
    weight = model.fc.weight.detach().double().numpy()
    factor = (weight * expected.coef_).sum() / (expected.coef_**2).sum()
    np.testing.assert_allclose(weight, factor * expected.coef_, atol=1e-5)
    if bias:
        np.testing.assert_allclose(model.fc.bias.detach(), factor * expected.intercept_, atol=1e-5)
    logits = torch.cat([model(x) for x, _ in loader()]).detach().double()
    assert composed.fit_scale(logits, torch.cat([y for _, y in loader()])) == pytest.approx(1, abs=1e-3)


def test_no_head_to_refit():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    parts = timm_dd.split(net, 2, domain=Domain.full(2), example_input=torch.empty(1, 3, 8, 8))
    with pytest.raises(TrainError, match="no fully connected layer; use --no-refit-head"):
        composed.refit_head(net, parts.plan, [], CPU)


# ---- the recipe and the preset


def parsed(*given):
    return options.parse(["--dataset", "digits", *given])


def test_the_rate_of_fine_tuning():
    """A quarter of the others', unless the parts have a rate of their own; the preset's is the same."""
    for given, rates in (
        (["--lr", "0.4"], (0.1, 0.4, 0.4, 0.4)),
        (["--lr", "0.4", "--tune-rate", "1"], (0.4, 0.4, 0.4, 0.4)),
        (["--lr", "0.4", "--part-lr", "0.8"], (0.4, 0.8, 0.8, 0.4)),
        (["--lr", "0.4", "--preset", "paper"], (0.4, 0.4, 0.4, 0.4)),
        (["--lr", "0.4", "--joint-lr", "0.2"], (0.1, 0.4, 0.2, 0.4)),
    ):
        args = parsed(*given)
        assert tuple(options.stage_options(args, s).lr for s in (None, "part", "joint", "baseline")) == rates
    assert options.stage_options(parsed(), None).lr_base == 0.025


@pytest.fixture
def run(tmp_path):
    def made(*given):
        return Run(parsed("--output", str(tmp_path), "--part-epochs", "13", "--epochs", "1", *given))

    return made


def test_what_the_recipe_sees(run):
    """Whole images at 0.625 and a joint stage; boxes at scale 1 where the options say boxes, or the network reads
    positions, which has no joint stage either; whole images at scale 1 where it takes one size alone."""
    recipe = run("--model", "test_resnet")
    assert recipe.parts.plan.domain == Domain.full(4, scale=0.625) and recipe.args.joint_epochs == 2
    boxes = run("--model", "test_resnet", "--overlap", "4")
    assert boxes.parts.plan.domain == Domain.grid(2, 2, overlap=4) and boxes.args.joint_epochs == 2
    positions = run("--model", "dd_vgg3")
    assert positions.parts.plan.domain == Domain.grid(2, 2) and positions.args.joint_epochs == 0
    one_size = run("--model", "test_vit")
    assert one_size.parts.plan.domain == Domain.full(4) and one_size.args.joint_epochs == 2
    paper = run("--model", "test_resnet", "--preset", "paper")
    assert paper.parts.plan.domain == Domain.grid(2, 2) and paper.args.joint_epochs == 0 and not paper.args.keep_momenta
    assert run("--model", "test_resnet", "--preset", "paper", "--joint-epochs", "3").args.joint_epochs == 3


def test_a_preset_in_a_file(tmp_path, capsys):
    """What the file says goes before the preset that it names, what the command line says before both."""
    (tmp_path / "own.yaml").write_text("preset: paper\ntune_rate: 0.5\nlr: 0.1\n")
    args = parsed("-c", str(tmp_path / "own.yaml"), "--joint-epochs", "7")
    assert (args.tune_rate, args.joint_epochs, args.part_scale, args.lr) == (0.5, 7, 1.0, 0.1)
    with pytest.raises(SystemExit, match="2"):
        parsed("--preset", "best")
    assert "invalid choice: 'best'" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_of_the_recipe_and_its_command(tmp_path):
    """The command in its summary gives the same weights."""
    given = [
        "--dataset",
        "digits",
        "--model",
        "test_resnet",
        "--part-epochs",
        "6",
        "--epochs",
        "1",
        "--lr",
        "0.05",
        "-j",
        "0",
    ]
    given += ["-j", "0", "--warmup-epochs", "0", "--train-num-samples", "256", "-b", "64", "--refit-head"]
    assert main(["train", *given, "--output", str(tmp_path), "--experiment", "one"]) == 0
    summary = json.loads((tmp_path / "one" / "summary.json").read_text())
    assert {"joint", "composed", "updated", "tuned"} <= summary.keys()
    again = summary["command"].split()[2:]
    assert main(["train", *again, "-j", "0", "--output", str(tmp_path), "--experiment", "two"]) == 0
    a, b = ((tmp_path / name / "global" / "last" / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert a == b
