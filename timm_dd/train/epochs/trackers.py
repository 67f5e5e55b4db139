"""Where a run's figures are shown besides its files: TensorBoard, Weights & Biases and a page, each if asked for."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

from tqdm import tqdm

from ...errors import TrainError, headline
from ...reports import draw
from .. import pages


class Trackers:
    """The figures of every epoch, under the network's name, to all that `args` asks for, see `check`."""

    def __init__(self, args: argparse.Namespace, folder: Path, rank: int):
        self.args, self.folder, self.primary = args, folder, rank == 0
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
            tqdm.write(f"no more figures to trackers: {headline(e)}")
            self.board = self.wandb = None

    def end_epoch(self, epoch: int) -> None:
        """Write the page, if it is due after so many epochs of a stage."""
        if self.primary and self.args.report_every and epoch % self.args.report_every == 0:
            self._page(0)

    def end_run(self) -> None:
        """The page with all that there is, and figures of the run's files to TensorBoard."""
        if self.primary and (self.args.report or self.args.report_every):
            self._page(None)
        if self.primary and self.board is not None:
            with _going_on("no figures"):
                for name, figure in pages.figures(self.folder):
                    self.board.add_figure(name, figure, close=False)

    def _page(self, images: int | None) -> None:
        with _going_on("no report"):
            pages.report(self.folder, self.folder / "report.html", images=images)

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, *_) -> None:
        if self.board is not None:
            self.board.close()
        if self.wandb is not None:
            self.wandb.finish()


@contextlib.contextmanager
def _going_on(what: str) -> Iterator[None]:
    """A run is not to fail of what only shows it."""
    try:
        yield
    except Exception as e:  # of disks, of networks that cannot be shown
        tqdm.write(f"{what}: {headline(e)}")


def check(args: argparse.Namespace) -> None:
    """Raise TrainError or ReportError if what is asked for is not installed."""
    if args.report or args.report_every:
        draw.check_matplotlib()
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
