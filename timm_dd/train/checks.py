"""What each option may be, whether it came from the command line or from a file: numbers in their ranges, and no option
without an effect."""

from __future__ import annotations

import argparse
import math
import unicodedata
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ..errors import shown
from .flags import MAY_BE_EMPTY, PREFIXES, STAGED, flag_of, parser

RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "a whole number from 1 up": (
        lambda n: n >= 1,
        "batch_size coarse_views coarse_widths cycles grad_accum_steps img_size in_chans input_size num_classes "
        "parts plateau_epochs train_num_samples val_num_samples validation_batch_size",
    ),
    "a whole number from 2 up": (lambda n: n >= 2, "coarse_folds"),
    "a whole number from 0 up": (
        lambda n: n >= 0,
        "coarse_epochs decay_milestones epochs margin only_parts overlap shift warmup_epochs",
    ),
    "a whole number from 0 to 1024": (lambda n: 0 <= n <= 1024, "workers"),
    "a whole number from 1 to 1024": (lambda n: 1 <= n <= 1024, "part_threads"),
    "a number from 0 up": (
        lambda x: x >= 0,
        "checkpoint_every color_jitter decay_rate decay_rates lr lr_base min_lr mixup momentum off_diagonal_lr "
        "off_diagonal_noise tune_rate warmup_lr weight_decay",
    ),
    "a number above 0": (lambda x: x > 0, "clip_grad decay_epochs opt_eps ratio std"),
    "a number above 0 and up to 1": (lambda x: 0 < x <= 1, "crop_pct scale"),
    "a number from 0 and below 1": (lambda x: 0 <= x < 1, "coarse_dropout opt_betas smoothing"),
    "a number from 0 to 1": (lambda x: 0 <= x <= 1, "distill model_ema_decay"),
    "a probability from 0 to 1": (lambda x: 0 <= x <= 1, "drop drop_path hflip reprob roam vflip"),
    "a number": (lambda x: True, "mean"),
    "a whole number": (lambda n: True, "seed"),
}


CROPS = "color_jitter ratio scale train_crop_mode"  # of timm, and what goes with them


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
        if isinstance(value, str):
            _check_text(p, flag_of(name), value, empty=defaults[name] == "" or name in MAY_BE_EMPTY)
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
    excluded = [
        (args.no_aug, "beside --no-aug", f"{CROPS} aa hflip reprob vflip"),
        (shifted, "beside --shift, which shifts whole images", CROPS),
        (args.dataset == "digits", "beside --dataset digits", "data_dir dataset_download train_split val_split"),
        (not args.dataset, "without --dataset", "dataset_download"),
        (not args.amp, "without --amp", "amp_dtype"),
        (args.clip_grad is None, "without --clip-grad", "clip_mode"),
        (not args.model_ema, "without --model-ema", "model_ema_decay"),
        (not args.log_wandb, "without --log-wandb", "wandb_project"),
        (not args.aggregate, "without --aggregate", "distill"),
        ("dnn" not in args.aggregate, "without --aggregate dnn", "coarse_folds"),
        (not args.together, "without --together", " ".join(f"together_{name}" for name in STAGED)),
        (args.cycles == 1, "without --cycles of two or more", "reassign"),
    ]
    for applies, where, names in excluded:
        for name in names.split() if applies else ():
            if getattr(args, name) and getattr(args, name) != defaults[name]:
                p.error(f"{flag_of(name)} has no effect {where}")
