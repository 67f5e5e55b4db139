"""What the commands share: types of arguments, ``--quiet`` and ``--verbose``, how they fail."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
import traceback
from collections.abc import Callable

from .errors import TimmDDError

LAYOUTS = ("full", "centered8", "type-b")
FAILURES = (TimmDDError, OSError)


def options(p: argparse.ArgumentParser, quiet: bool = True) -> None:
    """``--verbose``, and ``--quiet`` unless what a command prints is all that it gives."""
    g = p.add_mutually_exclusive_group()
    if quiet:
        g.add_argument("-q", "--quiet", action="store_true", help="print errors alone")
    g.add_argument("-v", "--verbose", action="store_true", help="print log messages, and the traceback of an error")


def run(name: str, function: Callable[[argparse.Namespace], int | None], args: argparse.Namespace) -> int:
    """Run a command; 0 if it is done, 1 if the work failed, with one line on stderr."""
    if args.verbose:
        logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    try:
        with open(os.devnull, "w") as nowhere, contextlib.ExitStack() as stack:
            if getattr(args, "quiet", False):
                stack.enter_context(contextlib.redirect_stdout(nowhere))
                stack.enter_context(contextlib.redirect_stderr(nowhere))
            status = function(args)
        sys.stdout.flush()
        return status or 0
    except BrokenPipeError:  # whoever reads, `head` for one, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except FAILURES as e:
        if args.verbose:
            traceback.print_exc()
        print(f"timm-dd {name}: {e}", file=sys.stderr)
        return 1


def grid(text: str) -> str | tuple[int, ...]:
    """``2x2`` as (2, 2); a layout's name as it is."""
    if text in LAYOUTS:
        return text
    try:
        return sizes(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(
            f"expected rows x columns, like 2x2, or {', '.join(LAYOUTS)}, got {text!r}"
        ) from None


def sizes(text: str) -> tuple[int, ...]:
    """``192x168`` as (192, 168)."""
    try:
        return tuple(int(n) for n in text.lower().split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers, like 192x168, got {text!r}") from None
