"""The command line of a training run: timm's flag names and meaning, and what splitting adds."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from typing import NoReturn

from timm.utils import ParseKwargs

from ... import console
from ...two_level.aggregate import AGGREGATIONS, TOGETHER, WIDTHS
from .views import listed

PRESETS = ("paper",)
PREFIXES = ("part", "joint", "together", "baseline")  # of flags for one stage alone
DIST_BN = ("reduce", "broadcast", "")
MAY_BE_EMPTY = ("dist_bn",)  # words that say something though they are empty
SCALES = ("sum", "mean", "temperature")
LOSSES = ("ce", "bce", "poly", "asl")  # timm's of one label an image
METRICS = ("top1", "top5", "loss")
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")  # of inductor
STAGED = {
    "epochs": dict(type=int, metavar="N", help="epochs"),
    "lr": dict(type=float, metavar="LR", help="learning rate, overrides --lr-base"),
    "warmup_epochs": dict(type=int, metavar="N", help="epochs of warm-up"),
    "decay_milestones": dict(type=int, nargs="+", metavar="EPOCH", help="epochs at which multistep decays"),
    "decay_rates": dict(type=float, nargs="+", metavar="RATE", help="one factor for each milestone"),
    "shift": dict(type=int, metavar="PX", help="random shifts by up to PX pixels, as for CIFAR, instead of crops"),
}


class Parser(argparse.ArgumentParser):
    """One whose errors are one line: the usage of so many options is a page."""

    def parse_known_args(self, args: Sequence[str] | None = None, namespace=None):
        words = sys.argv[1:] if args is None else list(args)
        for before, word in zip(["", *words], words):
            if re.fullmatch(r"(--[^=]+=|-\w+)--", word):  # Python before 3.13 takes it for the end of the options
                self.error(f"{word}: expected a value")
            if word == "--" and re.fullmatch(r"--\w[^=]*|-\w", before):
                self.error(f"{before}: expected a value, got --")
        return super().parse_known_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}; --help lists the options\n")


class Keywords(ParseKwargs):
    """timm's, which reads ``KEY=VALUE``; an error for what is not."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        odd = next((v for v in values if "=" not in v or not v.partition("=")[0].isidentifier()), None)
        if odd is not None:
            raise argparse.ArgumentError(self, f"expected KEY=VALUE, got {odd!r}")
        super().__call__(parser, namespace, values, option_string)


def parser(add_help: bool = True) -> argparse.ArgumentParser:
    p = Parser(
        add_help=add_help,
        prog="timm-dd train",
        description="Train K parts of a timm model on K sub-images, compose them, fine-tune the composed model.",
        epilog="example: torchrun --nproc-per-node 4 -m timm_dd.train --model resnet50 --parts 4 --grid 2x2 "
        "--overlap 28 --data-dir DATA --part-epochs 100 --epochs 100 -b 128 --output runs/",
    )
    p.add_argument(
        "--preset", choices=PRESETS, help="defaults for these options; paper: those of gu2022, instead of the recipe"
    )
    p.add_argument(
        "-c", "--config", metavar="YAML", help="defaults for these options: a file, or one that comes with the package"
    )
    _data(p.add_argument_group("data"))
    _augmentation(p.add_argument_group("augmentation"))
    _model(p.add_argument_group("model and parts"))
    _loss(p.add_argument_group("loss"))
    _optimizer(p.add_argument_group("optimizer"))
    _schedule(p.add_argument_group("schedule"))
    _stages(
        p.add_argument_group("stages (--part-X, --joint-X, --together-X and --baseline-X set one for that stage alone)")
    )
    _run(p.add_argument_group("run"))
    _machine(p.add_argument_group("machine"))
    console.options(p)
    return p


def _data(g) -> None:
    g.add_argument(
        "--data-dir", metavar="DIR", help="image folder with train and val, or tars of that name, or one tar with both"
    )
    g.add_argument(
        "--dataset",
        default="",
        metavar="NAME",
        help="digits (comes with scikit-learn), or a timm dataset: torch/cifar10 …",
    )
    g.add_argument("--class-map", metavar="FILE", help="the numbers of the classes: one name a line, in their order")
    g.add_argument("--train-split", default="train", metavar="NAME")
    g.add_argument("--val-split", default="validation", metavar="NAME")
    g.add_argument(
        "--train-num-samples", type=int, metavar="N", help="use the first N training images of a fixed shuffle"
    )
    g.add_argument("--val-num-samples", type=int, metavar="N", help="the same of the validation images")
    g.add_argument(
        "--skip-bad-images",
        nargs="?",
        const="all",
        type=limit,
        metavar="N",
        help="try each image before the run and leave out those that cannot be read, or up to N, instead of stopping "
        "at the first",
    )
    g.add_argument("--dataset-download", action="store_true", help="let timm download the data set")
    g.add_argument("--dataset-trust-remote-code", action="store_true", help="let a data set of the Hub run its code")
    g.add_argument(
        "--input-key", metavar="KEY", help="of the images in a data set of records; of a folder .png;.jpg, its files"
    )
    g.add_argument("--target-key", metavar="KEY", help="of the classes in a data set of records: hfds/, tfds/, wds/")
    g.add_argument("--img-size", type=int, metavar="PX")
    g.add_argument("--in-chans", type=int, metavar="N", help="channels of the images: 1 grey, 3 colours, 4 with alpha")
    g.add_argument("--input-size", type=int, nargs=3, metavar="N", help="channels, height, width")
    g.add_argument("--crop-pct", type=float, metavar="PCT", help="centre crop of validation images")
    g.add_argument("--mean", type=float, nargs="+")
    g.add_argument("--std", type=float, nargs="+")
    g.add_argument("--interpolation", default="", metavar="NAME")
    g.add_argument(
        "-b", "--batch-size", type=int, default=128, metavar="N", help="a part's, and a rank's in the second stage"
    )
    g.add_argument("-vb", "--validation-batch-size", type=int, metavar="N")
    g.add_argument("-j", "--workers", type=int, metavar="N", help="by default 4, or as many as there are cores")
    g.add_argument("--pin-mem", action="store_true")


def _augmentation(g) -> None:
    g.add_argument("--no-aug", action="store_true", help="no augmentation")
    g.add_argument("--train-crop-mode", choices=["rrc", "rkrc", "rkrr"])
    g.add_argument(
        "--train-interpolation", default="random", choices=["random", "bilinear", "bicubic"], help="of training images"
    )
    g.add_argument("--scale", type=float, nargs=2, default=[0.08, 1.0], help="area of a random resized crop")
    g.add_argument("--ratio", type=float, nargs=2, default=[3 / 4, 4 / 3])
    g.add_argument("--hflip", type=float, default=0.5)
    g.add_argument("--vflip", type=float, default=0.0)
    g.add_argument("--color-jitter", type=float, default=0.4)
    g.add_argument("--color-jitter-prob", type=float, metavar="P", help="by default every image is jittered")
    g.add_argument("--grayscale-prob", type=float, default=0.0, metavar="P")
    g.add_argument("--gaussian-blur-prob", type=float, default=0.0, metavar="P")
    g.add_argument("--aa", metavar="NAME", help="AutoAugment policy")
    g.add_argument(
        "--aug-repeats", type=float, default=0.0, metavar="N", help="how often ranks that share the images see each"
    )
    g.add_argument("--reprob", type=float, default=0.0, help="random erasing")
    g.add_argument("--remode", default="pixel", choices=["const", "rand", "pixel"], help="what erases")
    g.add_argument("--recount", type=int, default=1, metavar="N", help="places that are erased")
    g.add_argument("--mixup", type=float, default=0.0, metavar="ALPHA", help="mix pairs of images and their labels")
    g.add_argument("--cutmix", type=float, default=0.0, metavar="ALPHA", help="paste a box of another image")
    g.add_argument(
        "--cutmix-minmax", type=float, nargs=2, metavar="SHARE", help="smallest and largest box, instead of an ALPHA"
    )
    g.add_argument("--mixup-prob", type=float, default=1.0, metavar="P", help="of mixup or cutmix")
    g.add_argument("--mixup-switch-prob", type=float, default=0.5, metavar="P", help="of cutmix, where both are on")
    g.add_argument("--mixup-mode", default="batch", choices=["batch", "pair", "elem"], help="what is mixed alike")
    g.add_argument("--mixup-off-epoch", type=int, default=0, metavar="N", help="no mixing after a stage's N-th epoch")


def limit(text: str) -> int | str:
    """A number, or ``all``."""
    if text != "all" and not (text.isdecimal() and len(text) < 19):
        raise argparse.ArgumentTypeError(f"expected a number from 0 up, or all, got {text!r}")
    return text if text == "all" else int(text)


def _model(g) -> None:
    g.add_argument("--model", default="resnet50", metavar="NAME", help="a timm model")
    g.add_argument("--pretrained", action="store_true")
    g.add_argument("--pretrained-path", metavar="FILE", help="of the pretrained weights, instead of timm's own")
    g.add_argument("--initial-checkpoint", metavar="FILE", help="weights of the whole model, which are split")
    g.add_argument("--num-classes", type=int, metavar="N", help="by default the data set's")
    g.add_argument("--gp", metavar="POOL", help="global pooling: avg, max, avgmax, catavgmax …")
    g.add_argument("--drop", type=float, metavar="P")
    g.add_argument("--drop-path", type=float, metavar="P")
    g.add_argument("--drop-block", type=float, metavar="P")
    g.add_argument("--bn-momentum", type=float, metavar="M", help="for networks that take it, as EfficientNets do")
    g.add_argument("--bn-eps", type=float, metavar="EPS", help="the same")
    g.add_argument(
        "--grad-checkpointing",
        action="store_true",
        help="the whole model computes its activations again in the backward pass, instead of keeping them",
    )
    g.add_argument("--model-kwargs", nargs="*", default={}, action=Keywords, metavar="KEY=VALUE")
    g.add_argument("--parts", type=int, default=4, metavar="K")
    console.domain_options(g)


def _loss(g) -> None:
    g.add_argument("--smoothing", type=float, default=0.1, help="label smoothing")
    g.add_argument("--loss", choices=LOSSES, default="ce", help="cross entropy, of each class, Poly-1, asymmetric")
    g.add_argument("--bce-loss", action="store_true", help="--loss bce")
    g.add_argument("--bce-sum", action="store_true", help="its sum over the classes, not their mean")
    g.add_argument("--bce-target-thresh", type=float, metavar="P", help="mixed labels above P are 1, others 0")
    g.add_argument("--bce-pos-weight", type=float, metavar="W", help="of the classes that an image has")
    g.add_argument("--poly-epsilon", type=float, default=2.0, metavar="EPS", help="of Poly-1; 0: cross entropy")
    g.add_argument("--asl-gamma-pos", type=float, default=1.0, metavar="G", help="focus on an image's class")
    g.add_argument("--asl-gamma-neg", type=float, default=4.0, metavar="G", help="focus on the others")


def _optimizer(g) -> None:
    g.add_argument("--opt", default="sgd", metavar="NAME")
    g.add_argument("--opt-eps", type=float)
    g.add_argument("--opt-betas", type=float, nargs="+")
    g.add_argument("--opt-kwargs", nargs="*", default={}, action=Keywords, metavar="KEY=VALUE")
    g.add_argument("--momentum", type=float, default=0.9)
    g.add_argument("--weight-decay", type=float, default=2e-5)
    g.add_argument("--layer-decay", type=float, metavar="FACTOR", help="of the rate, from each layer to the one before")
    g.add_argument("--layer-decay-min-scale", type=float, default=0.0, metavar="FACTOR", help="no layer has less")
    g.add_argument(
        "--grad-accum-steps", type=int, default=1, metavar="N", help="add up the gradients of N batches for an update"
    )
    g.add_argument("--clip-grad", type=float, metavar="NORM")
    g.add_argument("--clip-mode", default="norm", choices=["norm", "value", "agc"])
    g.add_argument(
        "--model-ema", action="store_true", help="a moving average of the weights is what each training gives"
    )
    g.add_argument("--model-ema-decay", type=float, default=0.9998, metavar="DECAY")
    g.add_argument("--model-ema-warmup", action="store_true", help="the average is shorter at first")
    g.add_argument(
        "--sync-bn", action="store_true", help="BatchNorm over the batches of all ranks, where ranks share a network"
    )
    g.add_argument(
        "--dist-bn",
        default="reduce",
        choices=DIST_BN,
        help="running statistics of ranks that share a network: their mean (reduce), those of the first rank for all "
        "after each epoch (broadcast), or as DistributedDataParallel leaves them (an empty word)",
    )


def _schedule(g) -> None:
    g.add_argument("--lr-base", type=float, default=0.1, metavar="LR", help="for --lr-base-size images, scaled")
    g.add_argument("--lr-base-size", type=int, default=256, metavar="N")
    g.add_argument(
        "--lr-base-scale",
        choices=["linear", "sqrt"],
        help="how the rate grows with the images of an update; by default sqrt for Adam and its kin, else linear",
    )
    g.add_argument("--sched", default="cosine", metavar="NAME")
    g.add_argument("--sched-on-updates", action="store_true", help="the rate changes update by update, not by epoch")
    g.add_argument("--warmup-lr", type=float, default=1e-5, metavar="LR")
    g.add_argument("--warmup-prefix", action="store_true", help="epochs of warm-up come before --epochs")
    g.add_argument("--min-lr", type=float, default=0.0, metavar="LR")
    g.add_argument("--decay-rate", "--dr", type=float, default=0.1)
    g.add_argument("--decay-epochs", type=float, metavar="N", help="by default 90, of wsd and rsqrt a fifth of all")
    g.add_argument("--cooldown-epochs", type=int, default=0, metavar="N", help="at --min-lr, after --epochs")
    g.add_argument("--patience-epochs", type=int, default=10, metavar="N", help="of --sched plateau")
    g.add_argument(
        "--plateau-epochs",
        type=int,
        metavar="N",
        help="divide the rate by √10 after N epochs without a better accuracy",
    )
    g.add_argument("--lr-cycle-limit", type=int, default=1, metavar="N", help="how often cosine, tanh, poly repeat")
    g.add_argument("--lr-cycle-mul", type=float, default=1.0, metavar="FACTOR", help="of a cycle's length, to the next")
    g.add_argument("--lr-cycle-decay", type=float, default=0.5, metavar="FACTOR", help="of its rate, to the next")
    g.add_argument("--lr-k-decay", type=float, default=1.0, metavar="K", help="of cosine and poly")
    g.add_argument("--lr-decay-fn", metavar="NAME", help="of wsd and rsqrt: how they decay")
    g.add_argument("--lr-stable-timescale", type=float, metavar="N", help="of rsqrt, in epochs")
    g.add_argument(
        "--lr-noise", type=float, nargs="+", metavar="SHARE", help="of the epochs after which rates are noisy"
    )
    g.add_argument("--lr-noise-pct", type=float, default=0.67, metavar="SHARE", help="limit of the noise")
    g.add_argument("--lr-noise-std", type=float, default=1.0, metavar="STD")


def _stages(g) -> None:
    defaults = {"epochs": 300, "warmup_epochs": 5, "shift": 0}
    for name, kind in STAGED.items():
        g.add_argument(flag_of(name), default=defaults.get(name), **kind)
    g.add_argument(
        "--roam",
        type=float,
        default=0.0,
        metavar="P",
        help="with probability P a part trains on a box anywhere in the images instead of on its box, update by update",
    )
    g.add_argument(
        "--views",
        type=listed,
        metavar="VIEW,…",
        help="of these a part trains on one, drawn update by update: box (its own), full (the whole image), with @S at "
        "scale S, like full@0.5,box; it is evaluated on its own",
    )
    _composed(g)
    _second_level(g)
    _two_levels_in_training(g)
    g.add_argument(
        "--cycles",
        type=int,
        default=1,
        metavar="N",
        help="split the fine-tuned model again, and merge its parts onto it, N cycles in all, in cycle-2 … of the "
        "run's folder",
    )
    g.add_argument(
        "--reassign", action="store_true", help="in the next cycle each part gets channels of all parts of the last"
    )
    for stage in PREFIXES:
        for name, kind in STAGED.items():
            given = {"help": argparse.SUPPRESS if name != "epochs" else f"{stage}: {kind['help']}"}
            if (stage, name) == ("joint", "epochs"):
                given = {
                    "help": "of the parts after their own, on whole images, against the loss of their sum of logits; "
                    "by default a sixth of theirs",
                }
            if (stage, name) == ("together", "epochs"):
                given = {"help": "of parts and dense network as one; by default as many as the parts'"}
            if (stage, name) == ("part", "lr"):
                given = {"nargs": "+", "help": "parts: learning rate, one for all or one for each"}
            g.add_argument(flag_of(f"{stage}_{name}"), **{**kind, **given})


def _composed(g) -> None:
    """What is done to the composed model before it is fine-tuned."""
    g.add_argument(
        "--update-bn",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="before fine-tuning, re-estimate the composed model's BatchNorm statistics from 1,024 whole images",
    )
    g.add_argument(
        "--calibrate",
        choices=SCALES,
        default="sum",
        help="scale of the composed model's logits: the parts' sum, their mean, or fitted to training images",
    )
    g.add_argument(
        "--off-diagonal-noise",
        type=float,
        default=0.0,
        metavar="STD",
        help="noise between the blocks before fine-tuning, in standard deviations of the weights inside; 0: zeros",
    )
    g.add_argument(
        "--off-diagonal-lr",
        type=float,
        default=1.0,
        metavar="FACTOR",
        help="of the learning rate, for the weights between the blocks while the composed model is fine-tuned",
    )
    g.add_argument(
        "--refit-head",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="before fine-tuning, refit the composed model's classifier on its features, in closed form",
    )
    g.add_argument(
        "--keep-momenta",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="fine-tuning goes on with the optimizer states of the parts",
    )
    g.add_argument(
        "--tune-rate",
        type=float,
        default=0.25,
        metavar="FACTOR",
        help="of the learning rate, for fine-tuning, unless the parts have a rate of their own",
    )


def _second_level(g) -> None:
    """What the parts decide together, without a composed model."""
    g.add_argument(
        "--aggregate",
        nargs="*",
        default=[],
        choices=AGGREGATIONS,
        help="let the parts decide together, each on its view: by the mean of their probabilities, a majority, the sum "
        "of their logits, or a dense network (two-level/ in the run's folder; with --epochs 0 instead of fine-tuning)",
    )
    widths = {"type": int, "nargs": "*", "default": [*WIDTHS], "metavar": "N"}
    g.add_argument("--coarse-widths", **widths, help="hidden layers of the dense network")
    g.add_argument("--coarse-epochs", type=int, default=50, metavar="N", help="of the dense network")
    g.add_argument("--coarse-dropout", type=float, default=0.0, metavar="P", help="after each of its hidden layers")
    g.add_argument(
        "--coarse-views", type=int, default=1, metavar="N", help="how often it sees each image, augmented anew"
    )
    g.add_argument(
        "--coarse-folds",
        type=int,
        metavar="N",
        help="the parts leave out an N-th of the training images, and the dense network learns from these alone: "
        "probabilities on images that parts have trained on are too sure",
    )


def _two_levels_in_training(g) -> None:
    """Both levels as one network, and as a teacher."""
    g.add_argument(
        "--together",
        nargs="*",
        default=[],
        choices=TOGETHER,
        help="also train all parts and a dense network of these widths as one network, all ranks together: from a "
        "random start (coherent), or from the trained parts (transfer)",
    )
    g.add_argument(
        "--distill",
        type=float,
        default=0.0,
        metavar="ALPHA",
        help="share of the fine-tuning's loss that is against the probabilities of --aggregate's network (of dnn, or "
        "of the first that is named), on the same crops",
    )


def _run(g) -> None:
    g.add_argument("--output", default="runs", metavar="DIR")
    g.add_argument(
        "--experiment", default="", metavar="NAME", help="the run's folder in --output, by default model and number"
    )
    g.add_argument(
        "--baseline", action="store_true", help="also train the model from a random start for as many epochs"
    )
    g.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        metavar="DIR",
        help="go on with the run in DIR; auto: with that of --experiment, or the last in --output that is not done",
    )
    g.add_argument(
        "--only-parts",
        type=int,
        nargs="+",
        metavar="K",
        help="train these parts and nothing else, on any machine, at any time; further processes train others",
    )
    g.add_argument(
        "--from-parts",
        nargs="+",
        metavar="FOLDER",
        help="take the trained parts from these folders, of runs or of parts, or from hf-hub:USER/REPO, and go on from "
        "there",
    )
    g.add_argument(
        "--checkpoint-hist", type=int, default=2, metavar="N", help="checkpoints that a network keeps, the last ones"
    )
    g.add_argument("--val-interval", type=int, default=1, metavar="N", help="evaluate every N epochs, and at the end")
    g.add_argument(
        "--eval-metric", default="top1", choices=METRICS, help="by which an epoch is the best, and rates are lowered"
    )
    g.add_argument(
        "--log-interval", type=int, default=50, metavar="N", help="a line every N batches, where there is no terminal"
    )
    g.add_argument(
        "--checkpoint-every", type=float, metavar="SECONDS", help="checkpoints within epochs too, not only after each"
    )
    _tracking(g)


def _tracking(g) -> None:
    """Who is told of a run."""
    g.add_argument("--log-tensorboard", action="store_true", help="every epoch's figures, into the run's folder")
    g.add_argument("--log-wandb", action="store_true", help="every epoch's figures, to Weights & Biases")
    g.add_argument("--wandb-project", metavar="NAME")
    g.add_argument("--wandb-tags", nargs="*", default=[], metavar="TAG")
    g.add_argument(
        "--report", action="store_true", help="at the end a page with figures, report.html in the run's folder"
    )
    g.add_argument(
        "--report-every", type=int, metavar="N", help="the page every N epochs too, without what needs images"
    )


def _machine(g) -> None:
    g.add_argument(
        "--engine",
        choices=["auto", "sequential", "threads", "packed", "graph"],
        default="auto",
        help="how the networks of a process take their steps: one after another, in threads (CPUs), parts as one "
        "network, as CUDA graphs (GPUs); auto: the fastest in a trial, on CPUs of those that give the same bits",
    )
    g.add_argument(
        "--part-threads",
        type=int,
        metavar="N",
        help="threads of an operation in the part stage, on which its last bits depend; by default a K-th of the cores "
        "that OMP_NUM_THREADS and the container allow",
    )
    g.add_argument(
        "--torchcompile", nargs="?", const="inductor", metavar="BACKEND", help="compile the networks with torch.compile"
    )
    g.add_argument("--torchcompile-mode", choices=COMPILE_MODES)
    g.add_argument("--seed", type=int, default=42)
    g.add_argument("--amp", action="store_true", help="mixed precision")
    g.add_argument("--amp-dtype", default="bfloat16", choices=["bfloat16", "float16"])
    g.add_argument("--channels-last", action="store_true")
    g.add_argument(
        "--device",
        metavar="NAME",
        help="cpu, cuda, cuda:1 …; by default each rank's own accelerator, if there is one",
    )


def flag_of(name: str) -> str:
    """``batch_size`` as ``--batch-size``."""
    return "--" + name.replace("_", "-")
