"""Each flag of timm's train.py is taken, with its meaning, or stands in the documentation's table with the reason."""

import copy
import math
import re
from pathlib import Path

import pytest
import timm
import torch
from timm.layers import BatchNormAct2d
from timm.loss import BinaryCrossEntropy
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from timm.scheduler import create_scheduler_v2
from torch import nn

import timm_dd
from timm_dd.errors import TrainError
from timm_dd.train.engines import Engine, Packed
from timm_dd.train.epochs.loop import measure
from timm_dd.train.images import data
from timm_dd.train.run import Run
from timm_dd.train.settings import options
from timm_dd.train.updates import metrics, optimizers, schedule
from timm_dd.train.updates.learner import Learner, criterion

DOC = (Path(__file__).parent.parent / "docs" / "training.md").read_text(encoding="utf-8")
CPU = torch.device("cpu")
# timm 1.0.31's, with a value that is not the default: a folder of photographs, a network that takes all of them.
TAKEN = """
--data-dir DATA --train-split train --val-split val --train-num-samples 96 --val-num-samples 48 --class-map names.txt
--input-key .png --model efficientnet_b0 --pretrained --pretrained-path weights.pth --initial-checkpoint start.pth
--num-classes 3 --gp max --img-size 64 --in-chans 3 --input-size 3 64 64 --crop-pct 0.9 --mean 0.4 0.4 0.4
--std 0.3 0.3 0.3 --interpolation bicubic -b 32 --batch-size 32 -vb 16 --validation-batch-size 16 --channels-last
--grad-accum-steps 2 --grad-checkpointing --model-kwargs se_layer=eca --torchcompile inductor
--torchcompile-mode max-autotune --device cpu --amp --amp-dtype float16 --opt adamw --opt-eps 1e-7
--opt-betas 0.8 0.99 --momentum 0.8 --weight-decay 0.1 --clip-grad 1 --clip-mode agc --layer-decay 0.7
--layer-decay-min-scale 0.1 --opt-kwargs amsgrad=True --sched cosine --sched-on-updates --lr 0.01 --lr-base 0.2
--lr-base-size 128 --lr-base-scale linear --lr-noise 0.4 0.9 --lr-noise-pct 0.5 --lr-noise-std 0.5 --lr-cycle-mul 2
--lr-cycle-decay 0.3 --lr-cycle-limit 2 --lr-k-decay 0.5 --warmup-lr 1e-4 --min-lr 1e-6 --epochs 3
--decay-milestones 1 2 --decay-epochs 2 --warmup-epochs 1 --warmup-prefix --cooldown-epochs 2 --decay-rate 0.2
--dr 0.2 --train-crop-mode rkrc --scale 0.5 1 --ratio 0.8 1.2 --hflip 0.3 --vflip 0.2 --color-jitter 0.3
--color-jitter-prob 0.5 --grayscale-prob 0.1 --gaussian-blur-prob 0.1 --aa rand-m9 --aug-repeats 3 --bce-loss
--loss bce --bce-sum --bce-target-thresh 0.2 --bce-pos-weight 2 --reprob 0.2 --remode const --recount 2 --mixup 0.2
--cutmix 1 --cutmix-minmax 0.2 0.8 --mixup-prob 0.9 --mixup-switch-prob 0.4 --mixup-mode elem --mixup-off-epoch 2
--smoothing 0.2 --train-interpolation bicubic --drop 0.1 --drop-path 0.1 --drop-block 0.1 --bn-momentum 0.2
--bn-eps 1e-4 --model-ema --model-ema-decay 0.99 --model-ema-warmup --seed 7 --log-interval 10 --val-interval 2
--checkpoint-hist 3 -j 0 --workers 0 --pin-mem --output out --experiment name --eval-metric top5 --log-wandb
--wandb-project project --wandb-tags one two --dist-bn broadcast --sync-bn --resume
""".split()
OTHERWISE = [  # beside other options, or instead of them
    "DATA", "--dataset hfds/x --data-dir DATA --dataset-trust-remote-code --target-key label --input-key image",
    "--dataset torch/cifar10 --data-dir DATA --dataset-download", "DATA --no-aug", "DATA -c paper.yaml",
    "DATA --config paper.yaml", "DATA --sched plateau --patience-epochs 4",
    "DATA --sched rsqrt --lr-decay-fn linear --lr-stable-timescale 3", "DATA --loss poly --poly-epsilon 1",
    "DATA --loss asl --asl-gamma-pos 0 --asl-gamma-neg 2", "DATA --resume auto",
]  # fmt: skip
LEFT_OUT = """
--amp-impl --asl-clip --asl-reduction --aug-splits --check-resume --class-weight --db-focal-gamma --db-init-bias
--db-neg-scale --device-modules --distill-loss-weight --drop-connect --epoch-repeats --fast-norm --fuser
--head-init-bias --head-init-scale --input-img-mode --jsd-loss --kd-distill-type --kd-loss-type --kd-model-name
--kd-student-feature-dim --kd-teacher-feature-dim --kd-temperature --kd-token-distill-type --layer-decay-no-opt-scale
--local-rank --local_rank --model-dtype --model-ema-force-cpu --multilabel-threshold --naflex-loader
--naflex-loss-scale --naflex-max-seq-len --naflex-patch-size-probs --naflex-patch-sizes --naflex-train-seq-lens
--no-ddp-bb --no-prefetcher --no-resume-opt --opt-foreach --poly-alpha --poly-gamma --recovery-interval --resplit
--save-epochs --save-images --split-bn --start-epoch --stop-epoch --sweep-attempt --sweep-locks
--synchronize-step --target-format --task --task-loss-weight --torchscript --tta --twoway-tn --twoway-tp
--use-multi-epochs-loader --wandb-resume-id --worker-seeding
""".split()


def left_out():
    """The flags in the documentation's table of those that are left out; with * at the end, all that begin so."""
    table = DOC.partition("### Flags of timm's that are left out")[2].partition("\n#")[0]
    cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    assert cells
    return [flag for cell in cells for flag in re.findall(r"`(--[\w-]+\*?)`", cell)]


def taken(words):
    return {word for word in words if word.startswith("-") and not word[1:2].isdigit()}


def test_a_line_with_all_flags_of_timm_is_taken():
    args = options.parse(TAKEN)
    lines = [options.parse(line.split()) for line in OTHERWISE]
    assert lines[0].data_dir == "DATA"
    defaults = vars(options.parse(["DATA", "--data-dir", "DATA"]))
    used = [*TAKEN, *(word for line in OTHERWISE for word in line.split())]
    names = {flag[2:].replace("-", "_") for flag in taken(used) if flag.startswith("--")} - {"dr", "sched", "data_dir"}
    found = [{k for k, v in vars(a).items() if defaults[k] != v} for a in (args, *lines)]
    same = {"train_split", "in_chans"}  # their values are the defaults
    assert names <= set().union(*found) | same, names - set().union(*found)


def test_what_is_left_out_stands_in_the_table():
    known = {*taken(TAKEN), *(flag for line in OTHERWISE for flag in taken(line.split()))}
    listed = left_out()
    for flag in LEFT_OUT:
        beginnings = [entry for entry in listed if entry == flag or (entry[-1] == "*" and flag.startswith(entry[:-1]))]
        ours = flag in options.parser()._option_string_actions
        assert bool(beginnings) != ours, f"{flag} is in the table: {beginnings}; is taken: {ours}"
    assert not {flag for flag in listed if flag in known}, "what is taken is not left out"


SMALL = [
    "--dataset", "digits", "--model", "test_resnet", "--parts", "2", "-b", "32", "-j", "0", "--device", "cpu",
    "--train-num-samples", "96", "--val-num-samples", "40", "--warmup-epochs", "0", "--lr", "0.05",
    "--part-epochs", "1", "--epochs", "1", "--joint-epochs", "0",
]  # fmt: skip


def parsed(*given):
    return options.parse([*SMALL, *given])


def learner(tmp_path, *given, model=None):
    args = options.parse(["--dataset", "digits", "--model", "test_resnet", "--num-classes", "10", *given])
    model = timm.create_model("test_resnet", num_classes=10) if model is None else model
    return Learner("n", model, None, args, CPU, 3, 32, 0, tmp_path)


@pytest.mark.parametrize(
    "given, expected",
    [("", 0.2), ("--opt adamw", 0.1 * math.sqrt(2)), ("--opt lamb --lr-base-scale linear", 0.2), ("--lr 0.3", 0.3),
     ("--lr-base 1 --lr-base-size 1024 --lr-base-scale sqrt", math.sqrt(0.5)), ("--lr-base-size 512", 0.1)],
)  # fmt: skip
def test_the_rate_grows_with_the_images_of_an_update(given, expected):
    assert optimizers.rate(options.parse(["DATA", *given.split()]), 512) == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize(
    "given, more",
    [("--cooldown-epochs 2", {"cooldown_epochs": 2}),
     ("--warmup-prefix", {"warmup_prefix": True}),
     ("--lr-cycle-limit 2 --lr-cycle-mul 2 --lr-cycle-decay 0.3", dict(cycle_limit=2, cycle_mul=2, cycle_decay=0.3)),
     ("--lr-noise 0.2 0.9 --lr-noise-pct 0.5 --lr-noise-std 2", dict(noise=[0.2, 0.9], noise_pct=0.5, noise_std=2)),
     ("--lr-k-decay 0.5", {"k_decay": 0.5}),
     ("--sched wsd --lr-decay-fn linear", {"sched": "wsd", "decay_fn": "linear"}),
     ("--sched rsqrt --lr-stable-timescale 3", {"sched": "rsqrt", "stable_timescale": 3})],
)  # fmt: skip
def test_schedules_are_timm_s_and_as_long(given, more):
    args = options.parse(["DATA", "--epochs", "6", "--warmup-epochs", "2", *given.split()])
    mine, theirs = (torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5) for _ in range(2))
    schedule_of = schedule.create(args, mine, 4)
    expected, epochs = create_scheduler_v2(theirs, num_epochs=6, warmup_epochs=2, **{"cycle_decay": 0.5, **more})
    assert schedule.epochs(args) == epochs
    for epoch in range(epochs):
        assert mine.param_groups[0]["lr"] == theirs.param_groups[0]["lr"]
        schedule_of.step(epoch + 1)
        expected.step(epoch + 1)


def test_layers_of_a_part_are_those_of_the_whole_model(tmp_path):
    whole = timm.create_model("test_resnet", num_classes=10)
    expected = {}
    for group in param_groups_layer_decay(whole, weight_decay=2e-5, layer_decay=0.5, min_scale=0.1):
        members = {id(p) for p in group["params"]}
        for name, p in whole.named_parameters():
            if id(p) in members:
                expected[name] = group["lr_scale"], group["weight_decay"]
    part = timm_dd.split("test_resnet", 2, num_classes=10)[0]
    given = ["--layer-decay", "0.5", "--layer-decay-min-scale", "0.1"]
    for model in (part, whole):
        optimizer = learner(tmp_path, *given, model=model).optimizer
        found = {}
        for group in optimizer.param_groups:
            assert group["lr"] == pytest.approx(group["lr_scale"] * max(g["lr"] for g in optimizer.param_groups))
            names = {id(p): name for name, p in model.named_parameters()}
            found |= {names[id(p)]: (group["lr_scale"], group["weight_decay"]) for p in group["params"]}
        assert found == expected and len({scale for scale, _ in found.values()}) > 2


def test_keywords_reach_the_optimizer(tmp_path):
    optimizer = learner(tmp_path, "--opt", "adamw", "--opt-kwargs", "amsgrad=True", "eps=1e-3").optimizer
    assert optimizer.defaults["amsgrad"] is True and optimizer.defaults["eps"] == 1e-3
    assert type(optimizer) is type(create_optimizer_v2(nn.Linear(1, 1), opt="adamw"))


@pytest.mark.parametrize("classes", [10, 3])
@pytest.mark.parametrize("form", ["initial", "pretrained"])
def test_a_run_begins_with_the_weights_of_a_file(form, classes, tmp_path, capsys):
    torch.manual_seed(1)
    whole = timm.create_model("test_resnet", num_classes=classes)
    torch.save({"state_dict": whole.state_dict()}, tmp_path / "w.pth")
    flags = {"initial": ["--initial-checkpoint"], "pretrained": ["--pretrained", "--pretrained-path"]}[form]
    args = parsed(*flags, str(tmp_path / "w.pth"), "--output", str(tmp_path / "runs"))
    if (form, classes) == ("initial", 3):
        with pytest.raises(TrainError, match="--initial-checkpoint .*w.pth.*size mismatch.*expected weights"):
            Run(args)
        return
    parts = Run(args).parts
    expected = timm_dd.split(whole, 2, domain=parts.plan.domain, example_input=torch.empty(1, 3, 32, 32))
    for part, other in zip(parts, expected):
        for (name, t), (_, wanted) in zip(part.state_dict().items(), other.state_dict().items()):
            assert torch.equal(t, wanted) or (name.startswith("fc") and form == "pretrained"), name


@pytest.mark.parametrize("flags", ["--initial-checkpoint {}", "--pretrained --pretrained-path {}"])
def test_a_file_of_weights_that_is_none(flags, tmp_path):
    (tmp_path / "w.pth").write_bytes(b"\x80\x02nothing")
    for name in ("w.pth", "nothing.pth", "."):
        args = parsed(*flags.format(tmp_path / name).split(), "--output", str(tmp_path / "runs"))
        with pytest.raises(TrainError, match=flags.split()[-2]) as refused:
            Run(args)
        assert "\n" not in str(refused.value)


LOSSES = [
    ("--bce-loss", {"smoothing": 0.1}), ("--loss bce --bce-sum --smoothing 0", {"smoothing": 0.0, "sum_classes": True}),
    ("--bce-loss --bce-pos-weight 3", {"smoothing": 0.1, "pos_weight": 3.0}),
    ("--bce-loss --mixup 0.2 --bce-target-thresh 0.3", {"smoothing": 0.0, "target_threshold": 0.3}),
]  # fmt: skip


@pytest.mark.parametrize("given, expected", LOSSES, ids=[given for given, _ in LOSSES])
def test_the_loss_of_each_class(given, expected):
    logits, labels = torch.randn(8, 5), torch.randint(5, (8,))
    y = torch.softmax(torch.randn(8, 5), 1) if "mixup" in given else labels
    assert torch.equal(criterion(parsed(*given.split()))(logits, y), BinaryCrossEntropy(**expected)(logits, y))


def test_images_are_mixed_until_an_epoch_of_the_stage():
    args = parsed("--mixup", "0.4", "--cutmix", "1", "--mixup-off-epoch", "2", "--shift", "1", "--smoothing", "0")
    args.num_classes = 10
    train, val, _ = data.datasets(args)
    config = data.data_config(args, timm.create_model("test_resnet", num_classes=10))
    loader, _ = data.loaders(args, config, train, val, CPU, distributed=False)
    pure = []
    for epoch in range(4):
        data.begin_epoch(loader, 42, epoch)
        pure.append(all(bool((y.max(1).values == 1).all()) for _, y in loader))
    assert pure == [False, False, True, True]


def test_cutmix_alone_pastes_boxes_of_the_size_that_is_given():
    """Of an image of ones and one of zeros, the share of ones is the label's."""
    args = parsed("--cutmix-minmax", "0.4", "0.6", "--smoothing", "0")
    args.num_classes = 2
    images = [(torch.full((3, 32, 32), 255 * i, dtype=torch.uint8).numpy(), i) for i in (0, 1)]
    for seed in range(5):
        data.seed_epoch(seed, 0)
        x, y = data._mixup(args)(images)
        share = (x[0] > 0).float().mean()
        assert torch.isclose(share, y[0, 1].float(), atol=1e-6) and 0.1 < share < 0.5


@pytest.mark.parametrize("given, reader", [("--gp max", "max"), ("--gp avgmax", "avgmax")])
def test_pooling_is_that_of_the_parts_and_of_the_composed_model(given, reader, tmp_path):
    run = Run(parsed(*given.split(), "--output", str(tmp_path)))
    run.parts.save(tmp_path / "parts")
    timm_dd.merge_files(tmp_path / "parts", tmp_path / "composed")
    model = timm.create_model(f"local-dir:{tmp_path / 'composed'}", pretrained=True)
    assert model.global_pool.pool_type == reader


def test_a_network_without_an_argument_says_so(tmp_path):
    with pytest.raises(timm_dd.SplitError, match="timm cannot create 'test_resnet'.*bn_eps"):
        Run(parsed("--bn-eps", "1e-3", "--output", str(tmp_path)))


def test_numbers_of_batchnorm_reach_the_composed_model(tmp_path):
    given = ["--model", "test_efficientnet", "--bn-eps", "0.02", "--bn-momentum", "0.3", "--grid", "full"]
    run = Run(parsed(*given, "--output", str(tmp_path)))
    run.parts.save(tmp_path / "parts")
    timm_dd.merge_files(tmp_path / "parts", tmp_path / "composed")
    model = timm.create_model(f"local-dir:{tmp_path / 'composed'}", pretrained=True)
    for network in (model, run.parts[0]):
        norms = [m for m in network.modules() if isinstance(m, (nn.BatchNorm2d, BatchNormAct2d))]
        assert norms and {(m.eps, m.momentum) for m in norms} == {(0.02, 0.3)}


def test_activations_are_computed_again_where_the_network_can(tmp_path):
    def refused(name):
        with pytest.raises(TrainError, match=f"--grad-checkpointing: timm has none for {name}"):
            Run(parsed("--model", name, "--grad-checkpointing", "--output", str(tmp_path)))

    refused("dd_resnet20")
    Run(parsed("--grad-checkpointing", "--output", str(tmp_path)))


def test_figures_of_validation(tmp_path):
    """Against torch's own functions, on all images at once."""
    n = learner(tmp_path, "--shift", "1", "--img-size", "32", "-b", "50", "-j", "0")
    train, val, _ = data.datasets(n.args)
    _, loader = data.loaders(n.args, data.data_config(n.args, n.net), train, val, CPU, distributed=False)
    from timm_dd.train.engines import Engine

    (found,) = measure([n], loader, Engine())
    x, y = (torch.cat(tensors) for tensors in zip(*loader))
    with torch.no_grad():
        logits = n.net.eval()(x).double()
    order = logits.argsort(1, descending=True)
    assert found["top1"] == 100 * int((order[:, 0] == y).sum()) / len(y)
    assert found["top5"] == 100 * int((order[:, :5] == y[:, None]).sum()) / len(y) > found["top1"]
    assert found["loss"] == pytest.approx(float(nn.functional.cross_entropy(logits, y)), rel=1e-5)


@pytest.mark.parametrize("metric, best, rates", [("top1", 1, 2), ("loss", 2, 1), ("top5", 0, 3)])
def test_the_metric_says_which_epoch_is_the_best(metric, best, rates, tmp_path):
    n = learner(tmp_path, "--eval-metric", metric, "--plateau-epochs", "1", "--lr", "1", "--sched", "step",
                "--warmup-epochs", "0")  # fmt: skip
    for top1, top5, loss in ((10.0, 60.0, 2.0), (30.0, 50.0, 1.9), (20.0, 40.0, 1.8), (None, None, None)):
        n.sums.images, n.sums.loss = 1, torch.ones(())
        n.end_epoch(top1, 1.0, **({} if top1 is None else {"top5": top5, "eval_loss": loss}))
    assert metrics.best(n.history, n.args) == best
    assert n.lr == pytest.approx(math.sqrt(10) ** -rates)


@pytest.mark.parametrize("by", [Engine, Packed])
@pytest.mark.parametrize("mode", ["norm", "value", "agc"])
def test_gradients_are_clipped_as_by_timm(mode, by, tmp_path):
    """Which leaves the classifier to itself where the mode is agc."""
    models = timm_dd.split("test_resnet", 2, num_classes=10, img_size=32, domain=timm_dd.Domain.full(2), seed=0)
    given = f"--clip-mode {mode} --opt momentum --momentum 0 --weight-decay 0 --lr 1 --warmup-epochs 0".split()
    some = [learner(tmp_path, "--clip-grad", "0.01", *given, model=copy.deepcopy(m)) for m in models]
    x, y = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.arange(8)
    by().step(some, x, y, isolate_failures=False)
    for model, n in zip(models, some):
        criterion(n.args)(model.train()(x), y).backward()
        timm.utils.dispatch_clip_grad(timm.models.model_parameters(model, exclude_head=mode == "agc"), 0.01, mode)
        for (name, before), after in zip(model.named_parameters(), n.net.parameters()):
            torch.testing.assert_close(before - n.lr * before.grad, after, rtol=1e-4, atol=1e-6, msg=name)
        assert n.lr == 1


def test_checkpoints_are_kept_as_many_as_asked_for(tmp_path):
    from timm_dd.train.epochs import checkpoints

    n = learner(tmp_path, "--checkpoint-hist", "3")
    for n.updates in range(5):
        checkpoints.save(n)
    assert [int(p.stem.split("-")[1]) for p in checkpoints.found(tmp_path)] == [4, 3, 2]
