"""What each option may be, whether it came from the command line or from a file: numbers in their ranges, and no option
without an effect."""

from __future__ import annotations

import argparse
import math
import unicodedata
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ...errors import shown
from .flags import MAY_BE_EMPTY, PREFIXES, STAGED, flag_of, parser

RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "a whole number from 1 up": (
        lambda n: n >= 1,
        "batch_size checkpoint_hist coarse_views coarse_widths cycles grad_accum_steps img_size in_chans input_size "
        "log_interval lr_base_size lr_cycle_limit num_classes parts patience_epochs plateau_epochs recount "
        "report_every train_num_samples val_interval val_num_samples validation_batch_size",
    ),
    "a whole number from 2 up": (lambda n: n >= 2, "coarse_folds"),
    "a whole number from 0 up": (
        lambda n: n >= 0,
        "coarse_epochs cooldown_epochs decay_milestones epochs margin mixup_off_epoch only_parts overlap shift "
        "warmup_epochs",
    ),
    "a whole number from 0 to 1024": (lambda n: 0 <= n <= 1024, "workers"),
    "a whole number from 1 to 1024": (lambda n: 1 <= n <= 1024, "part_threads"),
    "a number from 0 up": (
        lambda x: x >= 0,
        "asl_gamma_neg asl_gamma_pos aug_repeats checkpoint_every color_jitter cutmix decay_rate decay_rates lr "
        "lr_base lr_noise_std min_lr mixup momentum off_diagonal_lr off_diagonal_noise poly_epsilon tune_rate "
        "warmup_lr weight_decay",
    ),
    "a number above 0": (
        lambda x: x > 0,
        "bce_pos_weight bn_eps clip_grad decay_epochs lr_cycle_mul lr_k_decay lr_stable_timescale opt_eps ratio std",
    ),
    "a number above 0 and up to 1": (lambda x: 0 < x <= 1, "crop_pct layer_decay lr_cycle_decay scale"),
    "a number from 0 and below 1": (lambda x: 0 <= x < 1, "coarse_dropout opt_betas smoothing"),
    "a number from 0 to 1": (
        lambda x: 0 <= x <= 1,
        "bce_target_thresh bn_momentum cutmix_minmax distill layer_decay_min_scale lr_noise lr_noise_pct "
        "model_ema_decay",
    ),
    "a probability from 0 to 1": (
        lambda x: 0 <= x <= 1,
        "color_jitter_prob drop drop_block drop_path gaussian_blur_prob grayscale_prob hflip mixup_prob "
        "mixup_switch_prob reprob roam vflip",
    ),
    "a number": (lambda x: True, "mean"),
    "a whole number": (lambda n: True, "seed"),
}


CROPS = "color_jitter color_jitter_prob ratio scale train_crop_mode"  # of timm, and what goes with them
RECORDS = ("hfds/", "hfids/", "tfds/", "wds/")  # data sets whose images have keys
CYCLIC = ("cosine", "tanh", "poly")  # schedules that repeat


def check(p: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Exit with status 2 and one line unless `args` are what their flags may be."""
    for expected, (holds, names) in RANGES.items():
        for flag, value in _given(args, names.split()):
            if isinstance(value, int) and not -(2**63) <= value < 2**63:
                p.error(f"{flag} is {expected} that 64 bits hold, got {shown(value)}")
            if not (math.isfinite(value) and holds(value)):
                p.error(f"{flag} is {expected}, got {value}")
    defaults = vars(parser(add_help=False).parse_args([]))
    for name, value in vars(args).items():
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str):
                _check_text(p, flag_of(name), text, empty=defaults[name] == "" or name in MAY_BE_EMPTY)
    if args.device is not None and not _is_device(args.device):
        p.error(f"--device is cpu, cuda, cuda:1 or the like of this machine's accelerators, got {shown(args.device)}")


def _check_text(p: argparse.ArgumentParser, flag: str, text: str, empty: bool) -> None:
    """Exit with status 2 if it is empty where it may not be, as a variable that nobody set, or not to be printed."""
    if not text and not empty:
        p.error(f"{flag} is empty")
    if any(unicodedata.category(c) in ("Cc", "Cs") for c in text):  # controls, and bytes that are not UTF-8
        p.error(f"{flag} has characters that are not text: {shown(text)}")


def _given(args: argparse.Namespace, names: list[str]) -> Iterator[tuple[str, float]]:
    """The flags of these names, those of single stages too, with each of their numbers."""
    for name in names:
        for full in (name, *(f"{stage}_{name}" for stage in PREFIXES if name in STAGED)):
            value = getattr(args, full)
            for number in value if isinstance(value, (list, tuple)) else () if value is None else (value,):
                yield flag_of(full), number


def _is_device(name: str) -> bool:
    try:
        here = torch.accelerator.current_accelerator()
        return torch.device(name).type in ("cpu", "cuda", here and here.type)
    except RuntimeError:
        return False


def check_effects(p: argparse.ArgumentParser, args: argparse.Namespace, shifted: bool) -> None:
    """Exit with status 2 if an option asks for what another leaves out.

    Args:
        shifted: whether shifts take the place of crops in all stages.
    """
    defaults = vars(parser(add_help=False).parse_args([]))
    for applies, where, names in (*_of_images(args, shifted), *_of_training(args), *_of_a_run(args)):
        for name in names.split() if applies else ():
            if getattr(args, name) and getattr(args, name) != defaults[name]:
                p.error(f"{flag_of(name)} has no effect {where}")


Excluded = Iterator[tuple[bool, str, str]]  # (whether it holds, beside or without what, the options that it leaves out)


def _of_images(args: argparse.Namespace, shifted: bool) -> Excluded:
    mixed = args.mixup or args.cutmix or args.cutmix_minmax
    yield args.no_aug, "beside --no-aug", f"{CROPS} aa gaussian_blur_prob grayscale_prob hflip reprob vflip"
    yield shifted, "beside --shift, which shifts whole images", CROPS
    yield args.color_jitter == 0, "beside --color-jitter 0", "color_jitter_prob"
    yield not args.reprob, "without --reprob", "recount remode"
    yield not mixed, "without --mixup or --cutmix", "mixup_mode mixup_off_epoch mixup_prob mixup_switch_prob"
    own = "class_map data_dir dataset_download dataset_trust_remote_code input_key target_key train_split val_split"
    yield args.dataset == "digits", "beside --dataset digits", own
    yield not args.dataset, "without --dataset", "dataset_download"
    yield args.dataset.startswith("torch/"), "beside a data set of torchvision's", "class_map input_key"
    yield not args.dataset.startswith("hf"), "without --dataset hfds/…", "dataset_trust_remote_code"
    yield not args.dataset.startswith(RECORDS), "without --dataset hfds/…, tfds/… or wds/…", "target_key"


def _of_training(args: argparse.Namespace) -> Excluded:
    yield not args.pretrained, "without --pretrained", "pretrained_path"
    yield args.loss != "bce", "without --loss bce", "bce_pos_weight bce_sum bce_target_thresh"
    yield args.loss != "poly", "without --loss poly", "poly_epsilon"
    yield args.loss != "asl", "without --loss asl", "asl_gamma_neg asl_gamma_pos"
    yield not args.layer_decay, "without --layer-decay", "layer_decay_min_scale"
    yield args.clip_grad is None, "without --clip-grad", "clip_mode"
    yield not args.model_ema, "without --model-ema", "model_ema_decay model_ema_warmup"
    yield not args.lr_noise, "without --lr-noise", "lr_noise_pct lr_noise_std"
    yield args.sched not in CYCLIC, f"beside --sched {args.sched}", "lr_cycle_limit"
    yield args.sched not in (*CYCLIC, "wsd"), f"beside --sched {args.sched}", "cooldown_epochs"
    yield args.sched not in ("cosine", "poly"), f"beside --sched {args.sched}", "lr_k_decay"
    yield args.sched not in ("wsd", "rsqrt"), f"beside --sched {args.sched}", "lr_decay_fn"
    yield args.sched != "rsqrt", "without --sched rsqrt", "lr_stable_timescale"
    yield args.sched != "plateau", "without --sched plateau; see --plateau-epochs", "patience_epochs"
    yield args.lr_cycle_limit == 1, "without --lr-cycle-limit of two or more", "lr_cycle_decay lr_cycle_mul"
    yield not args.amp, "without --amp", "amp_dtype"
    yield not args.torchcompile, "without --torchcompile", "torchcompile_mode"


def _of_a_run(args: argparse.Namespace) -> Excluded:
    yield not args.log_wandb, "without --log-wandb", "wandb_project wandb_tags"
    yield not args.aggregate, "without --aggregate", "distill"
    yield "dnn" not in args.aggregate, "without --aggregate dnn", "coarse_folds"
    yield not args.together, "without --together", " ".join(f"together_{name}" for name in STAGED)
    yield args.cycles == 1, "without --cycles of two or more", "reassign"
