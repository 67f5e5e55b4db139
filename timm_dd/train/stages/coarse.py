"""The second level of a run: what the parts decide together, each on its view (``--aggregate``).

Mean, majority and sum need the parts' logits on the validation images alone. The dense network is trained on the parts'
probabilities on the training images, which are computed once for each ``--coarse-views``, augmented as for the parts,
and kept in the run's folder until it is done: it trains in seconds, on the CPU, and gives the same bits again. With
``--coarse-folds`` these are images that the parts did not train on (held-out, as in stacking, Wolpert 1992).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils.data import Dataset, IterableDataset
from tqdm import tqdm

from ...errors import TimmDDError, TrainError
from ...machine import memory
from ...storage.atomic import replace_json, replacing
from ...two_level import files
from ...two_level.aggregate import WITHOUT_WEIGHTS, CoarseNet, check_coarse, side_by_side
from ...two_level.network import TwoLevel
from ..images import data
from ..ranks.cores import share_cores
from ..settings import options
from ..updates.learner import Learner
from . import written
from .context import Context, load_trained, part_learner

VIEWS = 1_000_000  # the first epoch of augmentation of the coarse net: none of the parts'
LR, BATCH = 1e-3, 32  # klawonn2023, section 5.1: Adam
TOLD = "summary.json"
SUMMARY = {
    "top1": lambda value: isinstance(value, dict) and all(map(written.is_number, value.values())),
    "seconds": written.is_number,
}
KEPT = "probabilities.safetensors"
KEEPS = "the parts are kept"


def check(args: argparse.Namespace, train: Dataset) -> None:
    """Raise TimmDDError unless this machine can train the dense network, if one is asked for, on its share of the
    training images."""
    if "dnn" in args.aggregate or args.together:
        check_coarse(args.parts, args.num_classes, args.coarse_widths, args.coarse_dropout)
    if "dnn" not in args.aggregate:
        return
    if args.coarse_folds is not None and isinstance(train, IterableDataset):
        raise TrainError("--coarse-folds: these images come as a stream, of which none can be left out; give a folder")
    images, batch = len(data.folds(args, train)[1]), data.images_of_an_update(args)
    if images < batch:
        raise TrainError(
            f"--coarse-folds {args.coarse_folds}: {images} images for the dense network make no batch of {batch}; use "
            "fewer folds, or a smaller --batch-size"
        )
    needed = 4 * args.coarse_views * images * args.parts * args.num_classes
    if needed > memory() // 4:
        raise TrainError(
            f"--aggregate dnn: {needed / 1e9:,.1f} GB of probabilities, this machine has {memory() / 1e9:,.1f} GB; use "
            "fewer --coarse-views or --train-num-samples, or mean, vote or sum"
        )


def decide_together(run: Context) -> tuple[dict[str, float], float]:
    """(top-1 of each way of ``--aggregate``, seconds of all); writes ``two-level/``. Of the first rank; others wait
    where they meet next."""
    folder, hows, about = run.folder.two_level, run.args.aggregate, _description(run)
    made_by = {**options.of_second_level(run.args), "parts": files.seals(run.folder.parts.path)}
    start = time.perf_counter()
    before = _before(folder, about, made_by) if run.folder.resuming else None
    if before is not None:
        return before["top1"], before["seconds"]
    share_cores(1)
    load_trained(run.folder.parts, run.parts)
    args = options.stage_options(run.args, "part")
    args.mixup = args.cutmix = args.cutmix_minmax = None  # of two images at once no label is right
    train, validation = run.loaders(args, distributed=False, images=data.folds(run.args, run.sets[0])[1])
    learners = [part_learner(run, k, 1) for k in range(len(run.parts))]
    logits, labels = _logits(run, learners, validation)
    coarse = _train(run, learners, train, logits.shape[-1], json.dumps(made_by)) if "dnn" in hows else None
    by = {**WITHOUT_WEIGHTS, "dnn": lambda z: coarse(side_by_side(z))}
    with torch.no_grad():
        found = {how: _accuracy(by[how](logits), labels) for how in hows}
    origin = {**run.about("two_level"), "top1": f"{found[about.how]:.2f}"}
    files.save(folder, run.parts, about, coarse, run.folder.parts.path, origin)
    seconds = time.perf_counter() - start
    replace_json(folder / TOLD, {"top1": found, "seconds": seconds, "options": made_by})
    (folder / KEPT).unlink(missing_ok=True)
    return found, seconds


def _description(run: Context) -> files.Description:
    """Of the network that is kept: the dense one, otherwise the first way."""
    hows, args = run.args.aggregate, run.args
    settings = {"widths": args.coarse_widths, "dropout": args.coarse_dropout, "class_names": run.class_names}
    with torch.random.fork_rng(devices=[]):
        return TwoLevel(run.parts, "dnn" if "dnn" in hows else hows[0], **settings).description()


def _before(folder: Path, about: files.Description, made_by: dict) -> dict | None:
    """What was told of the same network, if all of it is there; what is lost or damaged is made again."""
    try:
        told = written.read(folder / TOLD, checks=SUMMARY)
        files.check(folder, about)
    except TimmDDError:
        return None
    return told if told["options"] == made_by else None


@torch.no_grad()
def _logits(run: Context, learners: Sequence[Learner], loader) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the parts, each on its own view, (K, N, C), and the labels; on the CPU."""
    for learner in learners:
        learner.model.eval()
    logits, labels = [], []
    for x, y in tqdm(loader, desc="two levels", leave=False, disable=None):  # for terminals
        logits.append(torch.stack([n.logits(x) for n in learners]).cpu())
        labels.append(y.cpu())
        run.timer.check(KEEPS)
    return torch.cat(logits, 1), torch.cat(labels)


def _accuracy(scores: torch.Tensor, labels: torch.Tensor) -> float:
    return 100 * int((scores.argmax(-1) == labels).sum()) / len(labels)


def _train(run: Context, learners: Sequence[Learner], loader, classes: int, made_by: str) -> CoarseNet:
    """The dense network, in eval mode."""
    args = run.args
    p, labels = _probabilities(run, learners, loader, made_by)
    torch.set_num_threads(1)  # layers so small are no work for two
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        net = CoarseNet(len(learners), classes, args.coarse_widths, args.coarse_dropout)
        optimizer = torch.optim.Adam(net.parameters(), LR, fused=True)
        for _ in range(args.coarse_epochs):
            for rows in torch.randperm(len(p)).split(BATCH):
                optimizer.zero_grad()
                F.cross_entropy(net(p[rows]), labels[rows]).backward()
                optimizer.step()
            run.timer.check(KEEPS)
    return net.eval()


def _probabilities(run: Context, learners: Sequence[Learner], loader, made_by: str) -> tuple[torch.Tensor, ...]:
    """(views·N, K·C) probabilities of the parts on the training images, and the labels; what is kept, if the same parts
    and options made it."""
    path = run.folder.two_level / KEPT
    if not path.exists() or _made_by(path) != made_by:
        found = []
        for view in range(run.args.coarse_views):
            data.seed_epoch(run.seed, VIEWS + view)
            found.append(_logits(run, learners, loader))
        inputs, labels = ([*column] for column in zip(*((side_by_side(z), y) for z, y in found)))
        held = {"probabilities": torch.cat(inputs), "labels": torch.cat(labels)}
        path.parent.mkdir(exist_ok=True)
        with replacing(path) as temporary:
            save_file(held, temporary, {"made_by": made_by})
    held = load_file(path)
    return held["probabilities"], held["labels"]


def _made_by(path: Path) -> str | None:
    with safe_open(path, "pt") as file:
        return (file.metadata() or {}).get("made_by")
