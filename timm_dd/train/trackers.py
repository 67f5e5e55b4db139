"""Where a run's figures are shown besides its files: TensorBoard and Weights & Biases, each if asked for."""

from __future__ import annotations

import argparse
import sys
from importlib import import_module
from pathlib import Path

from tqdm import tqdm

from ..errors import TrainError, headline


class Trackers:
    """The figures of every epoch, under the network's name, to all that `args` asks for, see `check`."""

    def __init__(self, args: argparse.Namespace, folder: Path, rank: int):
        self.board = _tensorboard(folder) if args.log_tensorboard else None
        self.wandb = _wandb(args, folder, rank) if args.log_wandb else None

    def log(self, name: str, epoch: int, row: dict[str, float]) -> None:
        """`row` of a network after so many epochs. Once one fails there are no more."""
        values = {f"{name}/{key}": value for key, value in row.items() if value is not None}
        try:
            if self.board is not None:
                for key, value in values.items():
                    self.board.add_scalar(key, value, epoch)
            if self.wandb is not None:
                self.wandb.log({**values, "epoch": epoch})
        except Exception as e:  # of disks and networks; the training goes on
            tqdm.write(f"no more figures to trackers: {headline(e)}", sys.stdout)
            self.board = self.wandb = None

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, *_) -> None:
        if self.board is not None:
            self.board.close()
        if self.wandb is not None:
            self.wandb.finish()


def check(args: argparse.Namespace) -> None:
    """Raise TrainError if what is asked for is not installed."""
    for name, module in (("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")):
        if getattr(args, f"log_{name}"):
            try:
                import_module(module)
            except ImportError as e:
                raise TrainError(f"--log-{name} needs the package: pip install 'timm_dd[{name}]'") from e


def _tensorboard(folder: Path):
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(folder / "tensorboard")


def _wandb(args: argparse.Namespace, folder: Path, rank: int):
    import wandb

    name = f"{folder.name}-{rank}" if rank else folder.name  # a part's figures come from the rank that trains it
    about = {"project": args.wandb_project, "tags": args.wandb_tags, "group": folder.name, "config": vars(args)}
    return wandb.init(name=name, dir=folder, **about)
