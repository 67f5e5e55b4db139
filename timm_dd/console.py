"""What the commands share: the options of boxes, ``--quiet`` and ``--verbose``, types of arguments, how they fail."""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import itertools
import logging
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from .errors import SplitError, TimmDDError

if TYPE_CHECKING:
    from .algebra.domain import Domain

LAYOUTS = ("full", "centered8", "type-b")
FAILURES = (TimmDDError, OSError)


def options(p: argparse.ArgumentParser, quiet: bool = True) -> None:
    """``--verbose``, and ``--quiet`` unless what a command prints is all that it gives."""
    g = p.add_mutually_exclusive_group()
    if quiet:
        g.add_argument("-q", "--quiet", action="store_true", help="print errors alone")
    g.add_argument("-v", "--verbose", action="store_true", help="print log messages, and the traceback of an error")


def program(main: Callable[[Sequence[str] | None], int]) -> Callable[..., int]:
    """An entry point: Ctrl-C is one line and the status that shells give it, and what stdout has no letter for is
    escaped."""

    @functools.wraps(main)
    def call(argv: Sequence[str] | None = None) -> int:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")
        try:
            return main(argv)
        except KeyboardInterrupt:
            print("timm-dd: stopped by Ctrl-C", file=sys.stderr)
            return 128 + signal.SIGINT

    return call


def run(name: str, function: Callable[[argparse.Namespace], int | None], args: argparse.Namespace) -> int:
    """Run a command; 0 if it is done, 1 if the work failed, with one line on stderr."""
    try:
        with open(os.devnull, "w") as nowhere, contextlib.ExitStack() as stack:
            if args.verbose:
                logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
            else:
                stack.callback(setattr, warnings, "formatwarning", warnings.formatwarning)
                warnings.formatwarning = lambda message, *_, **__: f"timm-dd {name}: warning: {message}\n"
                stack.enter_context(_without_log())
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
        print(f"timm-dd {name}: {' '.join(str(e).splitlines())}", file=sys.stderr)
        return 1


@contextlib.contextmanager
def _without_log() -> Iterator[None]:
    """Where nobody handles log messages, Python prints those that are warnings."""
    root, nowhere = logging.getLogger(), logging.NullHandler()
    root.addHandler(nowhere)
    try:
        yield
    finally:
        root.removeHandler(nowhere)


@contextlib.contextmanager
def without_readers() -> Iterator[None]:
    """A command that does more than print goes on when nobody reads what it prints any more."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(_Unread(sys.stdout)))
        stack.enter_context(contextlib.redirect_stderr(_Unread(sys.stderr)))
        yield


class _Unread:
    """A stream that is silent from when its reader has gone."""

    def __init__(self, stream: Any):
        self.stream = stream

    def write(self, text: str) -> int:
        with self._or_silence():
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._or_silence():
            self.stream.flush()

    @contextlib.contextmanager
    def _or_silence(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def domain_options(p) -> None:
    """What `domain` reads, and ``--narrow``."""
    p.add_argument(
        "--grid",
        type=grid,
        metavar="RxC",
        help="boxes of the parts, by default the most square grid; full: the whole image; centered8; type-b",
    )
    p.add_argument("--overlap", type=int, default=0, metavar="PX", help="by how much a box is longer than its cell")
    p.add_argument("--margin", type=int, default=0, metavar="PX", help="pixels cropped from the borders beforehand")
    p.add_argument(
        "--part-scale",
        type=float,
        metavar="S",
        help="parts see their boxes at S of the pixels along every axis, anti-aliased: 0.5 shows 16x16 of 32x32",
    )
    p.add_argument(
        "--narrow",
        choices=["replicate", "refuse"],
        default="replicate",
        help="layers with fewer channels than K: whole in every part, the default, or an error",
    )


def domain(args: argparse.Namespace) -> Domain:
    """The boxes of ``--grid``, ``--overlap`` and ``--margin``, at ``--part-scale``."""
    from . import models
    from .algebra.domain import Domain, check_parts, default_domain

    check_parts(args.parts)
    extra = {"overlap": args.overlap, "margin": args.margin}
    scale = 1.0 if args.part_scale is None else args.part_scale
    if args.grid in ("full", "type-b") and any(extra.values()):
        raise SplitError(f"--grid {args.grid} takes neither --overlap nor --margin; leave them out")
    if args.grid == "centered8":
        return Domain.centered8(**extra, scale=scale)
    if args.grid == "full":
        return Domain.full(args.parts, scale=scale)
    axes = models.axes(args.model)
    if args.grid == "type-b":
        layouts = (Domain.type_b(p, axes, scale=scale) for p in itertools.count(1))
        return next(d for d in layouts if d.parts >= args.parts)  # split says if they are more
    shape = args.grid or default_domain(args.parts, axes).grid_shape
    return Domain.grid(*shape, **extra, scale=scale)


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


def positive(text: str) -> int:
    """``3`` as 3."""
    if not (text.isascii() and text.isdecimal() and 0 < int(text) < 2**31):
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 up, got {text!r}")
    return int(text)


def sizes(text: str) -> tuple[int, ...]:
    """``192x168`` as (192, 168)."""
    try:
        return tuple(int(n) for n in text.lower().split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers, like 192x168, got {text!r}") from None
