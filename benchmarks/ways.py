"""Ways to train a network with so many multiply-adds, as options of `timm_dd.train`, and what each of them costs.

The unit is an epoch of the global network: with N of them as the budget a way trains its stages for multiples of N
epochs, so that all their multiply-adds, of all parts, are about N (half of it and twice as much, as their names say).
The parts of K = 8 and 16 train as long as those of 4, as in gu2022's Table 3.3, and cost less.
"""

import argparse
from functools import cache
from typing import NamedTuple

import timm_dd
from timm_dd import Domain, console
from timm_dd.train.settings import options

STAGES = ("part", "joint", "tune")
PLAIN = (
    "--opt adamw --weight-decay 0.02 --smoothing 0 --warmup-epochs 0 --sched cosine --sched-on-updates -b 128 "
    "--crop-pct 1"
)
BOXES = "--preset paper --grid {grid} --overlap {overlap} --roam 0.5 --tune-rate 0.25"
WHOLE = "--parts 1 --grid full --no-update-bn"  # part 0 of 1 is the network


class Set(NamedTuple):
    """Images and their network.

    Attributes:
        narrow: keywords of the network with half of its widths.
        epochs: N, unless one is given.
        images: to train on.
        searched: images to train on and to validate on while learning rates are searched for.
    """

    model: str
    keywords: str
    narrow: str
    size: int
    shift: int
    classes: int
    epochs: int
    images: int
    searched: tuple[int, int]


class Way(NamedTuple):
    """Options, and epochs of each stage in units of N.

    Attributes:
        rate_of: the way whose search gives the learning rate; itself, if it is searched.
    """

    words: str
    part: float
    joint: float
    tune: float
    rate_of: str
    narrow: bool = False


_CIFAR = ("dd_resnet20", "widths=(32,64,128)", "widths=(16,32,64)", 32, 4, 10)
SETS = {
    "cifar10": Set(*_CIFAR, epochs=16, images=50_000, searched=(8000, 4000)),
    "flowers": Set(
        *("resnet10t", "", "channels=(32,64,128,256) stem_width=16", 128, 16, 5),
        **dict(epochs=60, images=3018, searched=(2000, 1000)),
    ),
    "fashion": Set(*_CIFAR, epochs=8, images=60_000, searched=(8000, 4000)),
}
WAYS = {
    "baseline-half": Way(WHOLE, 0.5, 0, 0, "baseline"),
    "baseline": Way(WHOLE, 1, 0, 0, "baseline"),
    "baseline-double": Way(WHOLE, 2, 0, 0, "baseline"),
    "progressive": Way("--parts 1 --grid full --part-scale 0.5", 2, 0, 0.5, "progressive"),
    "narrow": Way(WHOLE, 4, 0, 0, "narrow", narrow=True),
    "boxes": Way(f"--parts 4 {BOXES}", 5, 0, 0.5, "boxes"),
    "recipe": Way("--parts 4", 4, 0.4, 0.5, "recipe"),
    "recipe-half": Way("--parts 4", 2, 0.2, 0.25, "recipe"),
    "recipe-8": Way("--parts 8", 4, 0.4, 0.5, "recipe"),
    "recipe-16": Way("--parts 16", 4, 0.4, 0.5, "recipe"),
    "boxes-8": Way(f"--parts 8 {BOXES}", 5, 0, 0.5, "boxes"),
    "boxes-16": Way(f"--parts 16 {BOXES}", 5, 0, 0.5, "boxes"),
}
GRIDS = {"boxes": "2x2", "boxes-8": "2x4", "boxes-16": "4x4"}
LAST = ("recipe-8", "recipe-16", "boxes-8", "boxes-16")  # after all seeds of the others
SEARCHED = tuple(name for name, way in WAYS.items() if way.rate_of == name)


def epochs(way: str, n: int) -> dict[str, int]:
    """Of each stage; one that a way has lasts at least one."""
    return {stage: max(1, round(getattr(WAYS[way], stage) * n)) if getattr(WAYS[way], stage) else 0 for stage in STAGES}


def words(which: str, way: str, n: int) -> list[str]:
    """Options of `timm_dd.train` for a way, without data, seed and learning rate."""
    s, found = SETS[which], epochs(way, n)
    keywords = s.narrow if WAYS[way].narrow else s.keywords
    return [
        *PLAIN.split(),
        *f"--model {s.model} --img-size {s.size} --shift {s.shift}".split(),
        *(["--model-kwargs", *keywords.split()] if keywords else []),
        *WAYS[way].words.format(grid=GRIDS.get(way), overlap=s.size // 8).split(),
        *f"--part-epochs {found['part']} --joint-epochs {found['joint']} --epochs {found['tune']}".split(),
    ]


def parse(which: str, way: str, n: int, given: list[str]) -> argparse.Namespace:
    return options.parse([*words(which, way, n), "--data-dir", which, *given])


def domain(args: argparse.Namespace) -> Domain:
    """What the parts see."""
    if options.follows_recipe(args):
        return Domain.full(args.parts, scale=options.SCALE)
    return console.domain(args)


def costs(which: str, way: str, n: int, given: list[str]) -> dict[str, float]:
    """Forward multiply-adds of all that a stage trains times its epochs, in those of the global network's epoch."""
    args, plain = (parse(which, name, n, given) for name in (way, "baseline"))
    unit = _multiply_adds(which, plain, Domain.full(1))
    seen = {"part": domain(args), "joint": Domain.full(args.parts), "tune": Domain.full(1)}
    found = epochs(way, n)
    return {stage: found[stage] * _multiply_adds(which, args, seen[stage]) / unit for stage in STAGES}


def _multiply_adds(which: str, args: argparse.Namespace, seen: Domain) -> int:
    keywords = {"img_size": args.img_size, "num_classes": SETS[which].classes, **args.model_kwargs}
    return _of_parts(args.model, seen, tuple(keywords.items()))


@cache
def _of_parts(model: str, seen: Domain, keywords: tuple[tuple[str, object], ...]) -> int:
    """Of all parts."""
    return seen.parts * timm_dd.profile(model, seen.parts, domain=seen, **dict(keywords)).part.multiply_adds
