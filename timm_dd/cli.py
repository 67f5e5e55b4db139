"""The command line, ``timm-dd``. Exit status: 0 done, 1 the work failed (one line on stderr), 2 wrong usage."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import shtab

from . import console
from .errors import MergeError, SplitError
from .text import one_line
from .version import __version__


def parser(whole: bool = False) -> argparse.ArgumentParser:
    """Of all commands; with the options of `train`, which parses its arguments itself, if it shall be `whole`."""
    p = argparse.ArgumentParser(
        prog="timm-dd",
        usage="timm-dd [-h] [--version] [--print-completion SHELL] COMMAND ...",
        description="Split a timm model's width into K parts, train each alone, merge them back.",
    )
    p.add_argument("--version", action="version", version=f"timm-dd {__version__}")
    shtab.add_argument_to(p, help="print the completion for a shell")
    commands = p.add_subparsers(dest="command", required=True, metavar="COMMAND", prog=p.prog)
    _add_demo(commands)
    _add_plan(commands)
    _add_profile(commands)
    _add_split(commands)
    _add_train(commands, whole)
    _add_merge(commands)
    _add_verify(commands)
    _add_report(commands)
    _add_push(commands)
    _add_export(commands)
    _add_predict(commands)
    return p


def _add_demo(commands) -> None:
    p = _command(commands, "demo", _demo, "the whole pipeline on scikit-learn's digits", "demo --output runs/")
    p.add_argument("--output", default="runs", metavar="DIR", help="for the run's folder")
    p.add_argument("--seed", type=int, default=42)


def _add_plan(commands) -> None:
    p = _command(commands, "plan", _plan, "what each part of a model would be", "plan resnet50 4 --grid 2x2")
    _split_options(p)
    form = p.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="for machines")
    form.add_argument("--domain-png", metavar="FILE", help="draw the boxes instead, on a chessboard or on --image")
    p.add_argument("--check", action="store_true", help="compare by value what the plan calls exact")
    p.add_argument("--image", metavar="FILE", help="an image for --domain-png")


def _add_profile(commands) -> None:
    what, example = "parameters, FLOPs, activations: global, part", "profile resnet50 4 --overlap 28"
    p = _command(commands, "profile", _profile, what, example)
    _split_options(p)
    p.add_argument("--json", action="store_true", help="for machines")


def _add_split(commands) -> None:
    p = _command(commands, "split", _split, "write the parts of a model", "split resnet18 4 -o parts/ --pretrained")
    _split_options(p)
    p.add_argument("-o", "--output", required=True, metavar="PARTS", help="folder for the parts")
    p.add_argument("--pretrained", action="store_true", help="slice timm's pretrained weights")
    p.add_argument("--seed", type=int, default=42, help="of fresh weights")


def _add_train(commands, whole: bool) -> None:
    parents = []
    if whole:
        from .train.settings import flags

        parents = [flags.parser(add_help=False)]
    commands.add_parser("train", parents=parents, help="train the parts, then the composed model", add_help=False)


def _add_merge(commands) -> None:
    p = _command(commands, "merge", _merge, "compose parts into timm's own form", "merge parts/ -o composed/")
    p.add_argument("parts", metavar="PARTS", help="a folder, or hf-hub:USER/REPO[@REVISION]")
    p.add_argument("-o", "--output", required=True, metavar="COMPOSED", help="folder for the model")
    p.add_argument("--head", choices=["sum", "mean"], default="sum", help="mean for regression")
    p.add_argument(
        "--onto", metavar="MODEL", help="keep this model's weights between the blocks: a folder, or hf-hub:…"
    )


def _add_verify(commands) -> None:
    what, example = "theorems 2.1 and 2.2 in numbers; 1 where one fails", "verify composed/ parts/"
    p = _command(commands, "verify", _verify, what, example)
    p.add_argument("composed", metavar="COMPOSED", help="folder from merge")
    p.add_argument("parts", metavar="PARTS", help="folder of the parts that were merged")
    p.add_argument("--head", choices=["sum", "mean"], default="sum", help="as given to merge")
    p.add_argument("--data-dir", metavar="DIR", help="validation images: losses, accuracies and the bound (2.19)")
    p.add_argument("--dataset", metavar="NAME", help="digits, or a timm dataset, instead of a folder")
    p.add_argument("--val-split", metavar="NAME", help="of these, by default validation")


def _add_report(commands) -> None:
    what, example = "a run as one HTML page with figures", "report runs/x -o report.html"
    p = _command(commands, "report", _report, what, example)
    p.add_argument("folder", metavar="RUN", help="a run's folder, done or not, parts, or a composed model")
    p.add_argument("-o", "--output", default="report.html", metavar="FILE", help="the page; figures go beside it")
    p.add_argument(
        "--images",
        metavar="DIR|N",
        help="images to show to the networks: a folder, or so many of the run's own validation images (300); 0: none",
    )
    p.add_argument("--compare", nargs="+", default=[], metavar="RUN", help="other runs, beside it in the curves")
    p.add_argument("--layers", nargs="+", metavar="PATH", help="of the feature maps, by default some of the plan")


def _add_push(commands) -> None:
    what, example = (
        "a composed model, parts or a two-level network, to the Hugging Face Hub",
        "push composed/ USER/REPO",
    )
    p = _command(commands, "push", _push, what, example)
    p.add_argument("folder", metavar="FOLDER", help="from merge, split or train; of a run, its best model")
    p.add_argument("repo", metavar="USER/REPO", help="made if it is not there")
    p.add_argument("--private", action="store_true", help="make it private")
    p.add_argument("-m", "--message", metavar="TEXT", help="of the commit")
    p.add_argument("--tag", metavar="NAME", help="for the commit, v1.0 for one")
    p.add_argument(
        "--dry-run", nargs="?", const=True, metavar="DIR", help="write what would be pushed, by default to REPO"
    )


def _add_export(commands) -> None:
    what, example = "a trained network as ONNX or torch.export's archive", "export runs/x -o model.onnx"
    p = _command(commands, "export", _export, what, example)
    p.add_argument("folder", metavar="RUN", help="a run's folder, a composed model, or a two-level network")
    p.add_argument("-o", "--output", required=True, metavar="FILE", help="model.onnx or model.pt2")


def _add_predict(commands) -> None:
    what, example = "the classes of images, and how probable they are", "predict runs/x cat.jpg dog.jpg"
    p = _command(commands, "predict", _predict, what, example)
    p.add_argument("model", metavar="MODEL", help="a run, a composed model, a two-level network, or hf-hub:USER/REPO")
    p.add_argument("images", nargs="+", metavar="IMAGE", help="files that Pillow reads")
    p.add_argument("--top", type=console.positive, default=5, metavar="N", help="so many classes of each")
    p.add_argument("--json", action="store_true", help="for machines")


def _command(commands, name: str, run: Callable, help: str, example: str) -> argparse.ArgumentParser:
    p = commands.add_parser(
        name, help=help, description=f"{help[0].upper()}{help[1:]}.", epilog=f"example: timm-dd {example}"
    )
    p.set_defaults(run=run)
    console.options(p, quiet=run not in (_plan, _profile, _verify, _predict))
    return p


def _split_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("model", metavar="MODEL", help="a timm name")
    p.add_argument("parts", type=int, metavar="K", help="the number of parts")
    console.domain_options(p)
    p.add_argument("--width-divisor", type=int, metavar="D", help="divide widths by D instead of K; not to be merged")
    p.add_argument("--img-size", type=console.sizes, metavar="PX", help="pixels, or 192x168")
    p.add_argument("--in-chans", type=console.positive, metavar="N", help="channels, by default the model's")
    p.add_argument("--num-classes", type=int, metavar="N", help="by default the model's")


def _source(args: argparse.Namespace) -> dict:
    """The keyword arguments of `split` and `plan` from the options."""
    size = args.img_size[0] if args.img_size is not None and len(args.img_size) == 1 else args.img_size
    given = {
        "domain": console.domain(args),
        "narrow": args.narrow,
        "width_divisor": args.width_divisor,
        "img_size": size,
    }
    asked = {"in_chans": args.in_chans, "num_classes": args.num_classes}
    return {**given, **{name: value for name, value in asked.items() if value is not None}}


def _plan(args: argparse.Namespace) -> None:
    from .algebra.domain import spatial
    from .surgery.claim import check_claim
    from .surgery.split import plan, split

    if args.image is not None and args.domain_png is None:
        raise SplitError("--image has no effect without --domain-png")
    parts = split(args.model, args.parts, seed=0, **_source(args)) if args.check else None
    error = None if parts is None else check_claim(parts)
    result = plan(args.model, args.parts, **_source(args)) if parts is None else parts.plan
    if args.domain_png is not None:
        from .reports.picture import draw
        from .storage.atomic import replacing

        picture = draw(result.domain, spatial(result.input_size), args.image)
        with replacing(Path(args.domain_png)) as temporary:
            picture.save(temporary, format="png")
        print(f"{args.domain_png}: {result.domain} of {'×'.join(map(str, spatial(result.input_size)))} pixels")
        return
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    print(json.dumps(result.to_json(), indent=1) if args.json else result.text(colour))
    if error is not None and not args.json:
        print(f"checked: random weights, whole images: the sum of the parts is off by {error:.0e}")


def _profile(args: argparse.Namespace) -> None:
    from .reports.profile import profile

    result = profile(args.model, args.parts, **_source(args))
    print(json.dumps(result.to_json(), indent=1) if args.json else result.text())


def _split(args: argparse.Namespace) -> None:
    from .surgery.split import split

    parts = split(args.model, args.parts, pretrained=args.pretrained, seed=args.seed, **_source(args))
    parts.save(args.output)
    in_part, whole = parts.plan.params(0), parts.plan.params()
    print(f"{args.output}: {len(parts)} parts of {args.model}, {in_part:,} of {whole:,} parameters in part 0")


def _merge(args: argparse.Namespace) -> None:
    from .storage.merge_files import merge_files

    merge_files(args.parts, args.output, head=args.head, onto=args.onto)
    timm_form = (Path(args.output) / "config.json").exists()
    use = f"timm.create_model('local-dir:{args.output}', pretrained=True)" if timm_form else "model.safetensors"
    print(f"{args.output}: {use}")


def _verify(args: argparse.Namespace) -> int:
    from . import models
    from .reports.verify import verify
    from .storage import files
    from .surgery.parts import Parts

    parts = Parts.load(args.parts)
    model = models.create(parts.plan.model, **parts.plan.model_args)
    files.load_composed(args.composed, model)
    if files.is_correction(args.composed):
        raise MergeError(
            f"{args.composed} was merged onto a model, whose weights lie between its blocks: it is not the sum of its "
            "parts; verify a merge of them without --onto"
        )
    batches = _labelled_images(args, model, parts.plan.input_size)
    report = verify(model, parts, batches=batches, head=args.head)
    print(report.text())
    return 1 if report.failures else 0


def _labelled_images(args: argparse.Namespace, model, size: Sequence[int]):
    """Validation images as the composed model's config.json describes them; None if no data is given."""
    source = {"--data-dir": args.data_dir, "--dataset": args.dataset, "--val-split": args.val_split}
    if args.data_dir is None and args.dataset is None:
        if args.val_split is not None:
            raise MergeError("--val-split has no effect without --data-dir or --dataset")
        return None
    from .storage.composed import read_config
    from .storage.files import CONFIG
    from .train.images import data
    from .train.ranks.cores import cores
    from .train.settings import options

    words = [f"{flag}={value}" for flag, value in source.items() if value is not None]
    given = options.parse(words, prog="timm-dd verify")
    given.workers = min(4, cores())
    there = (Path(args.composed) / CONFIG).exists()
    written = read_config(Path(args.composed)) if there else {"pretrained_cfg": {}}
    saved, names = written["pretrained_cfg"], written.get("label_names")
    vars(given).update({k: saved[k] for k in ("mean", "std", "interpolation", "crop_pct") if k in saved})
    given.input_size = size
    return data.loader_of(given, data.data_config(given, model), data.validation_set(given, names))


def _report(args: argparse.Namespace) -> None:
    from .train.pages import report

    images = int(args.images) if args.images is not None and args.images.isdecimal() else args.images
    report(args.folder, args.output, images=images, compare=args.compare, layers=args.layers)
    print(f"{args.output}: open it in a browser")


def _push(args: argparse.Namespace) -> None:
    from . import models
    from .hub.push import push, write_repository

    chosen = models.of_run(Path(args.folder))
    if chosen != Path(args.folder):
        print(f"{chosen}: the run's model after its best epoch; give its global/last, composed or parts for another")
    if args.dry_run is None:
        print(push(args.folder, args.repo, private=args.private, message=args.message, tag=args.tag))
        return
    target = args.repo.split("/")[-1] if args.dry_run is True else args.dry_run
    write_repository(args.folder, args.repo, target)
    print(f"{target}: what would be pushed; edit README.md, then timm-dd push {target} {args.repo}")


def _export(args: argparse.Namespace) -> None:
    from .export import export

    print(f"{args.output}: a batch of any size; differs from the network by {export(args.folder, args.output):.0e}")


def _predict(args: argparse.Namespace) -> None:
    from .predict import Classifier

    found = zip(args.images, Classifier.load(args.model).predict(args.images, args.top))
    if args.json:
        rows = [{"image": p, "classes": [{"name": n, "probability": x} for n, x in classes]} for p, classes in found]
        print(json.dumps(rows, indent=1))
        return
    for path, classes in found:
        lines = [f"  {100 * probability:6.2f} %  {one_line(name)}" for name, probability in classes]
        print(path, *lines, sep="\n", flush=True)


def _demo(args: argparse.Namespace) -> None:
    from .train.demo import demo

    with console.without_readers():
        demo(args.output, args.seed)


@console.program
def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] == ["train"]:
        from .train.__main__ import main as train

        return train(argv[1:])
    whole = any(word.startswith("--print-completion") for word in argv)
    p = parser(whole)
    args = p.parse_args(argv)
    for name, value in vars(args).items():
        if "" in (value if isinstance(value, list) else [value]):  # as a path it would be the current folder
            p.error(f"{name} is empty, as a variable that nobody set; give one")
    return console.run(args.command, args.run, args)
