"""The options of a training run, from YAML and the command line, and as each of its stages sees them.

A flag may have a value for the parts alone (``--part-lr``), for their joint stage, for two levels together and for the
baseline.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import json
import shlex
from collections.abc import Sequence
from pathlib import Path

from ...console import domain as domain  # of the boxes, for who trains parts without a run
from ...errors import TrainError, shown
from ...surgery.split import split
from . import checks, config
from .flags import PREFIXES, STAGED, TOGETHER, flag_of, parser

MAY_CHANGE_ON_RESUME = {  # no weight depends on them
    "checkpoint_every", "checkpoint_hist", "config", "cycles", "device", "engine", "experiment", "from_parts",
    "log_interval", "log_tensorboard", "log_wandb", "only_parts", "output", "part_threads", "pin_mem", "quiet",
    "report", "report_every", "resume", "validation_batch_size", "verbose", "wandb_project", "wandb_tags", "workers",
}  # fmt: skip
OF_A_CALL = ("config", "preset", "quiet", "verbose")  # what they said stands in the options themselves
SCALE, JOINT = 0.625, 6  # of the recipe: how the parts see whole images; one joint epoch for so many of theirs
STAGES = ("part", "joint", *TOGETHER, "baseline")
SECOND_LEVEL = ("aggregate", "coarse_dropout", "coarse_epochs", "coarse_folds", "coarse_views", "coarse_widths")
TOGETHER_TOO = ("coarse_dropout", "coarse_widths")
SHARED = ("dist_bn", "sync_bn")  # of networks that ranks share
COMPOSED = (  # nothing to parts and baseline
    "calibrate", "distill", "keep_momenta", "off_diagonal_lr", "off_diagonal_noise", "refit_head",
    "tune_rate", "update_bn",
)  # fmt: skip


def parse(argv: Sequence[str] | None = None, prog: str = "timm-dd train") -> argparse.Namespace:
    """Options from YAML (``-c``), then the command line. Errors exit with status 2, in the name of `prog`."""
    p = parser()
    p.prog = prog
    p.add_argument("data", nargs="?", metavar="DATA", help="as --data-dir")  # no option, and nothing for a file
    given, _ = p.parse_known_args(argv)
    folder = run_of(given.resume)
    begun = {} if folder is None else resumed(p, folder)
    said = begun | ({} if given.config is None else _of_file(p, given.config))
    preset = given.preset or said.get("preset")
    if preset is not None:
        p.set_defaults(**config.read(p, f"{preset}.yaml"))
    p.set_defaults(**said)
    args = p.parse_args(argv)
    args.resume = args.resume if folder is None else str(folder)
    _take_place(p, args, given.data_dir)
    checks.check(p, args)
    _check_together(p, args)
    return args


def _of_file(p: argparse.ArgumentParser, name: str) -> dict:
    """What a file says; with which file, and which run, to begin is not for it to say."""
    said = config.read(p, name)
    for option in ("config", "resume"):
        if said.get(option) is not None:
            p.error(f"{name}: {option} is for the command line; remove it there, and give {flag_of(option)}")
    return said


def run_of(resume: str | None) -> Path | None:
    """The run's folder that ``--resume`` names, by itself or by a file in it, as timm's checkpoints; None if none."""
    if resume in (None, "", "auto") or "\0" in resume:
        return None
    path = Path(resume)
    try:
        folders = (path, *path.parents) if path.is_file() else (path,)
        found = [folder for folder in folders if (folder / "args.yaml").is_file()]
    except OSError:  # a name that is too long
        return None
    return found[-1] if found else None


def resumed(p: argparse.ArgumentParser, folder: Path) -> dict:
    """The options of the run in a folder, for one that goes on with it. Stages have the epochs that they had, whichever
    get more."""
    said = config.read(p, str(folder / "args.yaml"))
    before = p.parse_args([])
    vars(before).update(said)
    return {
        **{name: value for name, value in said.items() if name not in (*OF_A_CALL, "resume")},
        "part_epochs": stage_options(before, "part").epochs,
    }


def _take_place(p: argparse.ArgumentParser, args: argparse.Namespace, data_dir: str | None) -> None:
    """The data's folder by its place on the command line is ``--data-dir``, and ``--bce-loss`` is ``--loss bce``."""
    if args.data is not None and data_dir not in (None, args.data):
        p.error(f"two data folders, {shown(args.data)} and --data-dir {shown(data_dir)}; give one")
    args.data_dir = args.data_dir if args.data is None else args.data
    del args.data
    if args.bce_loss and args.loss not in ("ce", "bce"):
        p.error(f"--bce-loss is --loss bce, not --loss {args.loss}")
    args.loss = "bce" if args.bce_loss else args.loss
    args.bce_loss = args.loss == "bce"


def _check_together(p: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """What depends on several options."""
    if args.quiet and args.verbose:
        p.error("--quiet prints less and --verbose more; give one of them")
    if args.parts == 1 and args.calibrate != "sum":
        p.error("--calibrate is for two parts or more")
    if args.part_lr is not None and len(args.part_lr) not in (1, args.parts):
        p.error(f"--part-lr has one rate for all {args.parts} parts or one for each, got {len(args.part_lr)}")
    if taken := [name for name in args.model_kwargs if name in inspect.signature(split).parameters]:
        p.error(f"--model-kwargs are the model's own arguments, not {taken[0]}, which is the run's")
    for name in ("scale", "ratio", "cutmix_minmax"):
        low, high = getattr(args, name) or (0, 1)
        if low > high:
            p.error(f"{flag_of(name)} goes from the smaller to the larger, got {low} {high}")
    if mixes(args) and args.batch_size % 2:
        p.error(f"--mixup and --cutmix mix pairs: --batch-size is even, got {args.batch_size}")
    if args.layer_decay and args.together:
        p.error("--layer-decay goes by the order of a network's layers, which --together has none of; leave one out")
    if args.torchcompile_mode and args.torchcompile not in (None, "inductor"):
        p.error(f"--torchcompile-mode is inductor's, not {shown(args.torchcompile)}'s")
    if args.input_size and channels(args) != args.input_size[0]:
        p.error(f"--in-chans {args.in_chans} and --input-size {args.input_size[0]} … are of other channels")
    stages = (None, "part", "baseline") if args.baseline else (None, "part")
    checks.check_effects(p, args, all(stage_options(args, stage).shift for stage in stages))
    args.only_parts = None if args.only_parts is None else sorted({*args.only_parts})
    odd = [k for k in args.only_parts or () if k >= args.parts]
    if odd:
        p.error(f"--only-parts: parts of --parts {args.parts} are 0 to {args.parts - 1}, got {odd[0]}")
    if args.only_parts is not None and args.from_parts is not None:
        p.error("--only-parts trains parts, --from-parts takes trained ones; give one of them")
    if not args.dataset and not args.data_dir:
        if args.resume not in (None, "auto"):
            p.error(f"--resume {shown(args.resume)}: no run there; give a run's folder, or auto")
        p.error("nothing to train on: give --data-dir DIR, or --dataset digits")
    for stage in (None, *STAGES):
        s = stage_options(args, stage)
        if s.decay_rates and len(s.decay_rates) != len(s.decay_milestones or ()):
            p.error(f"{len(s.decay_rates)} decay rates for {len(s.decay_milestones or ())} milestones; give as many")


def stage_options(args: argparse.Namespace, name: str | None, part: int = 0) -> argparse.Namespace:
    """The options as a stage sees them: ``part``, of which each may have another learning rate; ``joint``, with that
    rate and otherwise, on whole images as it is, as the composed model; ``coherent`` and ``transfer``, parts and dense
    network as one; ``baseline``; or None for the composed model. By default the parts train as many epochs as the
    composed model, parts and dense network as many as the parts, and the baseline as many as parts and composed
    model."""
    staged = copy.copy(args)
    staged.together = name if name in TOGETHER else None
    for option in _foreign(name, bool(args.distill)):
        setattr(staged, option, None)
    if name in (None, "transfer"):  # they go on with trained parts
        factor = args.tune_rate if args.part_lr is None else 1.0
        staged.lr, staged.lr_base = None if args.lr is None else factor * args.lr, factor * args.lr_base
    if name is None:
        return staged
    if name in ("part", "joint") and args.part_lr is not None:
        staged.lr = args.part_lr[part % len(args.part_lr)]
    if name == "baseline":
        staged.epochs = stage_options(args, "part").epochs + args.epochs
    if name in TOGETHER:
        staged.epochs = stage_options(args, "part").epochs
    for option in STAGED:
        value = getattr(args, f"{'together' if name in TOGETHER else name}_{option}")
        if value is not None and (name, option) != ("part", "lr"):
            setattr(staged, option, value)
    return staged


def _foreign(name: str | None, taught: bool) -> set[str]:
    """The options that are nothing to a stage; the composed model may be taught by the second level."""
    composed = (*COMPOSED, *SHARED, *(SECOND_LEVEL if taught else ()))
    together = dict.fromkeys(TOGETHER, (*TOGETHER_TOO, *SHARED))
    own = {"part": ("coarse_folds",), None: composed, "baseline": SHARED, **together}
    return {*SECOND_LEVEL, *COMPOSED, *SHARED} - {*own.get(name, ())}


def of_a_run(args: argparse.Namespace) -> dict:
    """The options but for those of one start of it, which may be begun or gone on with otherwise."""
    return {k: v for k, v in vars(args).items() if k not in ("config", "resume", "from_parts", "only_parts")}


def training_identity(args: argparse.Namespace) -> dict:
    """The options, as a stage sees them, on which a network's weights depend; as JSON. Where the images lie is no such:
    every machine has its own place for them."""
    of_others = tuple(f"{prefix}_" for prefix in PREFIXES)
    relevant = {
        k: v
        for k, v in vars(args).items()
        if k not in {*MAY_CHANGE_ON_RESUME, "baseline", "data_dir"} and not k.startswith(of_others)
    }
    return json.loads(json.dumps(relevant))


def of_second_level(args: argparse.Namespace) -> dict:
    """The options on which the parts' common decision depends, besides the parts; as JSON."""
    return json.loads(json.dumps({k: getattr(args, k) for k in SECOND_LEVEL}))


def command(args: argparse.Namespace) -> str:
    """The command line that gives the same weights; of the data's folder, which is the reader's affair, the name."""
    words = ["timm-dd", "train"]
    for name, default in vars(parser(add_help=False).parse_args([])).items():
        value = getattr(args, name)
        if value == default or name in MAY_CHANGE_ON_RESUME:
            continue
        words += config.words(name, Path(value).name if name == "data_dir" else value)
    return shlex.join(words)


def check_same(before: dict, now: dict, longer: bool = False) -> None:
    """Raise ValueError unless a network goes on with the options that it began with; if it may train `longer`, with
    more epochs."""
    other = [k for k in {**before, **now} if before.get(k) != now.get(k)]
    if longer and before.get("epochs", 0) < now.get("epochs", 0):
        other.remove("epochs")
    if other:
        raise ValueError(", ".join(f"{flag_of(k)} was {before.get(k)}, not {now.get(k)}" for k in sorted(other)))


def follows_recipe(args: argparse.Namespace) -> bool:
    """Whether no option says what the parts see."""
    return not (args.grid or args.overlap or args.margin or args.part_scale is not None or args.views)


def mixes(args: argparse.Namespace) -> bool:
    """Whether images are mixed while a network trains, and their labels."""
    return bool(args.mixup or args.cutmix or args.cutmix_minmax)


def channels(args: argparse.Namespace) -> int | None:
    """Of the images; None: as many as the model takes by itself."""
    return args.input_size[0] if args.in_chans is None and args.input_size else args.in_chans


def model_arguments(args: argparse.Namespace, classes: int | None) -> dict:
    """Keyword arguments for `timm.create_model`."""
    if args.num_classes and classes and args.num_classes < classes:
        raise TrainError(
            f"--num-classes {args.num_classes}: the data has {classes} classes; give as many, or leave it out"
        )
    classes = args.num_classes or classes
    if classes is None:
        raise TrainError("the number of classes is not known from the data; give --num-classes")
    colours = None if channels(args) == 3 else channels(args)
    given = {
        "num_classes": classes,
        "in_chans": colours,
        "drop_rate": args.drop,
        "drop_path_rate": args.drop_path,
        "drop_block_rate": args.drop_block,
        "bn_momentum": args.bn_momentum,
        "bn_eps": args.bn_eps,
        "global_pool": args.gp,
        **args.model_kwargs,
    }
    return {k: v for k, v in given.items() if v is not None}
