"""All parts and the dense network as one network (``--together``): a loss, an optimizer and batches in common, under
DistributedDataParallel; what training the parts alone is measured against.

``coherent`` is from the parts as they were split, ``transfer`` from the trained ones; the dense network is fresh.

Source: Klawonn, Lanser and Weber, "Model parallel training and transfer learning for convolutional neural networks by
domain decomposition" (2024).
"""

from __future__ import annotations

from pathlib import Path

import torch

from ...surgery.parts import Parts
from ...two_level import files
from ...two_level.network import TwoLevel
from ..settings import options
from ..updates import schedule
from .context import Context, fit, global_learner, load_trained, shared_loaders


def train_together(run: Context, how: str, fresh: Parts) -> tuple[float, float]:
    """Train them; returns the accuracy after the last epoch, and seconds.

    Args:
        how: ``coherent`` or ``transfer``.
        fresh: the parts as they were split; they are trained.
    """
    args, folder = options.stage_options(run.args, how), run.folder.together / how
    loaders = shared_loaders(run, args)
    if how == "transfer":
        load_trained(run.folder.parts, fresh)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        settings = {"widths": args.coarse_widths, "dropout": args.coarse_dropout, "class_names": run.class_names}
        network = TwoLevel(fresh, "dnn", **settings)
    learner = global_learner(run, f"together, {how}", network, args, len(loaders[0]), folder)

    def save(name: str, reached: dict[str, str]) -> None:
        two = learner.result
        files.save(folder / name, two.parts, two.description(), two.coarse, origin={**run.about(how), **reached})

    def check(path: Path) -> None:
        files.check(path, network.description())

    return fit(run, learner, loaders, schedule.epochs(args), f"together, {how}", save, check), learner.seconds
