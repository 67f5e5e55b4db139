"""Table 10 of klawonn2023, a 3D network on two levels, with the paper's figures beside ours; on volumes that a
generator draws, since the paper's chest CT scans are not to be had.

    python benchmarks/volumes.py          # into two_level.csv, whose columns and words it has

A volume of 64×64×32 voxels, half of the paper's each way, has eight solid shapes, ellipsoids and boxes, in noise. What
is to be found: in every second volume some of them are hollow. So one box of a volume may show nothing of what the
whole shows. Local networks, dense network and the composed one train by plain loops over the package's functions.
"""

import argparse
import copy
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from common import add_row, provenance
from torch import nn
from two_level import KEY, cells

import timm_dd
from timm_dd import Domain, TwoLevel
from timm_dd.planning.costs import cost
from timm_dd.train.ranks.dealing import costs
from timm_dd.two_level.aggregate import GIVE_PROBABILITIES, side_by_side

NETWORK, SIZE, SHAPES = "dd_vgg3d", (64, 64, 32), 8
OPTIONS = {"widths": (32, 32, 64, 128), "img_size": SIZE}  # half of the paper's widths
BATCH = 8
COARSE = {"widths": (64, 32, 16), "dropout": 0.4}  # section 5.4; it trains for more epochs, in seconds
COARSE_EPOCHS = 100
GRIDS = {  # boxes, overlap, and what Table 10 has of validation, in %
    "2x2x1": ((2, 2, 1), 0, (76.67, 68.75, 66.67, 70.00, 91.43)),
    "3x3x1": ((3, 3, 1), 0, (76.67, 64.92, 58.33, 73.33, 89.86)),
    "4x4x1": ((4, 4, 1), 0, (76.67, 63.66, 53.33, 76.67, 85.71)),
    "4x4x1, overlap 2": ((4, 4, 1), 2, (76.67, 64.79, 55.85, 78.47, 86.33)),  # 4 of twice the voxels
    "4x4x2": ((4, 4, 2), 0, (76.67, 63.49, 57.02, 74.80, 89.88)),
}
Images = tuple[torch.Tensor, torch.Tensor]  # (N, 1, *SIZE) volumes, and (N,) labels, 0 or 1


def draw(count: int, seed: int) -> Images:
    """Volumes, every second with one to three hollow shapes."""
    rng = np.random.default_rng(seed)
    volumes = rng.normal(0, 0.25, (count, 1, *SIZE)).astype(np.float32)
    labels = np.arange(count) % 2
    for volume, found in zip(volumes[:, 0], labels):
        hollow = rng.integers(1, 4) if found else 0
        for i in range(SHAPES):
            _place(volume, rng, i < hollow)
    return torch.from_numpy(volumes), torch.from_numpy(labels).float()


def _place(volume: np.ndarray, rng: np.random.Generator, hollow: bool) -> None:
    radii = rng.uniform(4, 8, 3)
    center = [rng.uniform(r, n - r) for r, n in zip(radii, SIZE)]
    away = [np.abs(np.arange(n) - c) / r for n, c, r in zip(SIZE, center, radii)]
    grids = np.meshgrid(*away, indexing="ij", sparse=True)
    distance = np.maximum.reduce(np.broadcast_arrays(*grids)) if rng.random() < 0.5 else sum(g**2 for g in grids) ** 0.5
    inside = (distance <= 1) & ~(hollow & (distance < 0.6))
    volume[inside] += rng.uniform(0.7, 1.3)


def fit(network: nn.Module, x: torch.Tensor, y: torch.Tensor, seed: int, epochs: int, lr: float = 5e-4) -> float:
    """Train a network of one logit; seconds."""
    torch.manual_seed(seed)
    network.train().to(memory_format=torch.channels_last_3d)
    optimizer, start = torch.optim.Adam(network.parameters(), lr), time.perf_counter()
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(BATCH):
            optimizer.zero_grad()
            F.binary_cross_entropy_with_logits(network(x[rows])[:, 0], y[rows]).backward()
            optimizer.step()
    network.eval()
    return time.perf_counter() - start


@torch.no_grad()
def outputs(network: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, dim: int = 0) -> torch.Tensor:
    return torch.cat([network(batch) for batch in x.split(16)], dim)


def accuracy(scores: torch.Tensor, y: torch.Tensor, how: str = "sum") -> float:
    """In %; of logits, or of probabilities."""
    said = scores[..., 0] >= (0.5 if how in GIVE_PROBABILITIES else 0)
    return 100 * float((said == y.bool()).float().mean())


def whole(train: Images, validation: Images, args: argparse.Namespace) -> tuple[float, float]:
    """(accuracy, seconds) of the network from a random start."""
    torch.manual_seed(args.seed)
    network = timm.create_model(NETWORK, widths=OPTIONS["widths"])
    seconds = fit(network, *train, args.seed, args.epochs)
    return accuracy(outputs(network, validation[0]), validation[1]), seconds


def two_levels(
    domain: Domain, train: Images, validation: Images, args: argparse.Namespace
) -> Iterator[tuple[str, float, float]]:
    """(name, accuracy, seconds) of all that is made of the parts on their boxes; of these one after another."""

    def split(seed: int) -> timm_dd.Parts:
        return timm_dd.split(NETWORK, domain.parts, domain=domain, seed=seed, **OPTIONS)

    def tried(name: str, network: nn.Module, x: torch.Tensor, seen: torch.Tensor, *more: float):
        seconds = fit(network, x, y, args.seed, *(more or (args.epochs,)))
        return name, accuracy(outputs(network, seen), labels), seconds

    parts, (x, y), (seen, labels) = split(args.seed), train, validation
    for part, box, view in zip(parts, parts.crops(x), parts.crops(seen)):
        yield tried("part", part, box, view)
    two = TwoLevel(parts, "dnn", **COARSE)
    given, logits = (outputs(two.outputs, images, 1) for images in (x, seen))
    for how in ("mean", "vote", "sum"):
        yield how, accuracy(TwoLevel(parts, how).decide(logits), labels, how), 0
    yield tried("dnn", two.coarse, side_by_side(given), side_by_side(logits), COARSE_EPOCHS, 1e-3)
    yield tried("coherent", TwoLevel(split(args.seed + 1), "dnn", **COARSE), x, seen)
    yield tried("transfer", copy.deepcopy(two), x, seen)
    composed = timm_dd.merge(parts).eval()
    yield "composed", accuracy(outputs(composed, seen), labels), 0
    yield tried("tuned", composed, x, seen)


def measured(boxes: str, args: argparse.Namespace, sets: tuple[Images, Images], alone: Callable) -> dict:
    """A row of the table; `alone` trains the whole network."""
    grid, overlap, paper = GRIDS[boxes]
    domain = Domain.grid(*grid, overlap=overlap)
    found = [*two_levels(domain, *sets, args)]
    of_parts = [top1 for name, top1, _ in found if name == "part"]
    ours = {name: top1 for name, top1, _ in found} | {
        "global": alone()[0], "avg": sum(of_parts) / len(of_parts), "min": min(of_parts), "max": max(of_parts)
    }  # fmt: skip
    took = {name: seconds for name, _, seconds in found} | {
        "global": alone()[1], "parts": sum(seconds for name, _, seconds in found if name == "part")
    }  # fmt: skip
    parts = timm_dd.split(NETWORK, domain.parts, domain=domain, **OPTIONS)
    sizes = (domain.parts, *COARSE["widths"], 1)
    macs = {"global": cost(parts.graph, (1, *SIZE)).multiply_adds, "parts": sum(c.multiply_adds for c in costs(parts))}
    macs["dnn"] = macs["parts"] + sum(a * b for a, b in zip(sizes, sizes[1:]))
    return cells(paper, ours, took, macs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=300, metavar="N", help="volumes to train on")
    parser.add_argument("--validation", type=int, default=200, metavar="N", help="volumes")
    parser.add_argument("--epochs", type=int, default=12, metavar="N", help="of each network")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--boxes", nargs="+", default=list(GRIDS), choices=GRIDS)
    parser.add_argument("--table", type=Path, default=Path(__file__).with_name("two_level.csv"), metavar="CSV")
    args = parser.parse_args()
    origin = provenance()
    sets = draw(args.images, args.seed), draw(args.validation, args.seed + 1000)
    alone = cache(partial(whole, *sets, args))
    for boxes in args.boxes:
        size = (str(args.images), str(args.epochs), str(args.seed))
        key = dict(zip(KEY, ("volumes", "Table 10", NETWORK, boxes, *size)))
        add_row(args.table, key, partial(measured, boxes, args, sets, alone), origin)


if __name__ == "__main__":
    main()
