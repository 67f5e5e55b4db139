"""The weights of the whole model that a run begins with: fresh, timm's pretrained ones, or those of a file."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Sequence
from typing import Any

import torch
from timm.models import load_checkpoint
from torch import nn

from ... import models
from ...errors import TrainError


def model(args: argparse.Namespace, size: Sequence[int], model_args: dict[str, Any]) -> nn.Module:
    """The whole model, for images of so many pixels, with the weights that a run begins with.

    Raises:
        SplitError: timm cannot create it.
        TrainError: the file of ``--initial-checkpoint`` or ``--pretrained-path`` cannot be read, or is of another.
    """
    given = models.arguments(args.model, img_size=tuple(size), **model_args)
    if args.pretrained_path:  # as timm's train.py: any head, which is fitted to the number of classes
        given["pretrained_cfg_overlay"] = {"file": args.pretrained_path, "num_classes": -1}
    try:
        made = models.create(args.model, pretrained=args.pretrained, seed=args.seed, **given)
    except Exception as e:
        raise e if not args.pretrained_path else _unread("--pretrained-path", args.pretrained_path, e) from e
    if args.initial_checkpoint:
        try:
            load_checkpoint(made, args.initial_checkpoint)
        except Exception as e:  # pickles, archives and state dicts have their own
            raise _unread("--initial-checkpoint", args.initial_checkpoint, e) from e
    return made


def weights(
    args: argparse.Namespace, size: Sequence[int], model_args: dict[str, Any]
) -> dict[str, torch.Tensor] | None:
    """Those of a file; None where `split` makes them, or timm has them."""
    named = args.pretrained_path or args.initial_checkpoint
    return model(args, size, model_args).state_dict() if named else None


def set_checkpointing(args: argparse.Namespace, whole: nn.Module) -> None:
    """Carry out ``--grad-checkpointing``.

    Raises:
        TrainError: the model has none.
    """
    try:
        if args.grad_checkpointing:
            whole.set_grad_checkpointing(True)
    except (AssertionError, AttributeError) as e:
        raise TrainError(f"--grad-checkpointing: timm has none for {args.model}; leave it out") from e


def _unread(flag: str, path: str, error: Exception) -> TrainError:
    why = textwrap.shorten(str(error) or type(error).__name__, 200, placeholder=" …")
    return TrainError(
        f"{flag} {path}: {why}; expected weights of this model, as timm or torch save them, for as many classes"
    )
