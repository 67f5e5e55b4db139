"""The command line, ``timm-dd``. Exit status: 0 done, 1 the work failed (one line on stderr), 2 wrong usage."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from .errors import MergeError, SplitError, TrainError


def parser() -> argparse.ArgumentParser:
    from . import __version__

    p = argparse.ArgumentParser(
        prog="timm-dd", description="Split a timm model's width into K parts, train them apart, merge them back."
    )
    p.add_argument("--version", action="version", version=f"timm-dd {__version__}")
    commands = p.add_subparsers(dest="command", required=True, metavar="command")

    demo = commands.add_parser("demo", help="the whole pipeline on scikit-learn's scanned digits, minutes on two cores")
    demo.add_argument("--output", default="runs", metavar="DIR")
    demo.add_argument("--seed", type=int, default=42)
    demo.set_defaults(run=_demo)

    plan = commands.add_parser("plan", help="what each part of a model would be")
    _split_options(plan)
    plan.add_argument("--json", action="store_true", help="for machines")
    plan.set_defaults(run=_plan)

    split = commands.add_parser("split", help="write the parts of a model")
    _split_options(split)
    split.add_argument("-o", "--output", required=True, metavar="PARTS")
    split.add_argument("--pretrained", action="store_true")
    split.add_argument("--seed", type=int, default=42)
    split.set_defaults(run=_split)

    merge = commands.add_parser("merge", help="compose the parts in a folder into timm's own form")
    merge.add_argument("parts", metavar="PARTS")
    merge.add_argument("-o", "--output", required=True, metavar="COMPOSED")
    merge.add_argument("--head", choices=["sum", "mean"], default="sum", help="mean for regression")
    merge.set_defaults(run=_merge)

    commands.add_parser(
        "train", help="train the parts and the composed model (see timm-dd train --help)", add_help=False
    )
    return p


def _split_options(p: argparse.ArgumentParser) -> None:
    from .train.options import grid

    p.add_argument("model", metavar="MODEL")
    p.add_argument("parts", type=int, metavar="K")
    p.add_argument(
        "--grid", type=grid, metavar="RxC", help="boxes, by default the most square grid; full: the whole image"
    )
    p.add_argument("--overlap", type=int, default=0, metavar="PX")
    p.add_argument("--margin", type=int, default=0, metavar="PX")
    p.add_argument("--narrow", choices=["replicate"], help="keep what is narrower than K whole in every part")
    p.add_argument("--img-size", type=int, metavar="PX")
    p.add_argument("--num-classes", type=int, metavar="N")


def _source(args: argparse.Namespace) -> dict:
    """The keyword arguments of `split` and `plan` from the options."""
    from .train.options import domain

    given = {"domain": domain(args), "narrow": args.narrow, "img_size": args.img_size}
    return given if args.num_classes is None else {**given, "num_classes": args.num_classes}


def _plan(args: argparse.Namespace) -> None:
    from .split import plan

    result = plan(args.model, args.parts, **_source(args))
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    print(json.dumps(result.to_json(), indent=1) if args.json else result.text(colour))


def _split(args: argparse.Namespace) -> None:
    from .split import split

    parts = split(args.model, args.parts, pretrained=args.pretrained, seed=args.seed, **_source(args))
    parts.save(args.output)
    own, whole = parts.plan.params(0), parts.plan.params()
    print(f"{args.output}: {len(parts)} parts of {args.model}, {own:,} of {whole:,} parameters in part 0")


def _merge(args: argparse.Namespace) -> None:
    from .merge import merge_files

    merge_files(args.parts, args.output, head=args.head)
    timm_form = (Path(args.output) / "config.json").exists()
    use = f"timm.create_model('local-dir:{args.output}', pretrained=True)" if timm_form else "model.safetensors"
    print(f"{args.output}: {use}")


def _demo(args: argparse.Namespace) -> None:
    from .train.demo import demo

    demo(args.output, args.seed)


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] == ["train"]:
        from .train.__main__ import main as train

        return train(argv[1:])
    args = parser().parse_args(argv)
    try:
        args.run(args)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads, `head` for one, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (SplitError, MergeError, TrainError, OSError) as e:
        print(f"timm-dd {args.command}: {e}", file=sys.stderr)
        return 1
    return 0
