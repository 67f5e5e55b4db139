"""Images that are read or named: timm takes the next image in the place of one that it cannot read, a validation image
too."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from timm.data import ImageDataset
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from torch.utils.data import Dataset, Subset
from tqdm import tqdm

from ...errors import TrainError, headline
from ...images import read
from ...text import printable
from .workers import each

BATCH = 64


class ImageError(TrainError):
    """An image that cannot be read. Of what comes from a loader's worker, in whose traceback torch wraps the message,
    the message alone.

    Attributes:
        why: the message without what to do.
    """

    def __init__(self, why: str, remedy: str = ""):
        self.why = why.rpartition(f"\n{__name__}.ImageError: ")[2].strip()
        super().__init__(self.why + remedy)


class Images(Dataset):
    """The images of a data set of timm's or torchvision's; one that cannot be read is an error with its path. timm sets
    `transform` on it.

    Args:
        mode: Pillow's, of what is read.
        name: of the data set.
    """

    def __init__(self, dataset: Dataset, mode: str, name: str):
        self.dataset, self.mode, self.name, self.transform = dataset, mode, name, None
        self.reader = dataset.reader if isinstance(dataset, ImageDataset) else None
        self.classes = getattr(dataset, "classes", ())
        if isinstance(self.reader, ReaderImageInTar):
            self.reader.cache_tarfiles = False  # workers would share the place in a file that is open when they start

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int) -> tuple[Any, int]:
        try:
            image, target = self.dataset[i] if self.reader is None else self._read(*self.reader[i])
            return (image if self.transform is None else self.transform(image)), target
        except Exception as e:  # Pillow's plugins and tars have many
            why = f"{type(e).__name__}: {headline(e)}"
            remedy = "; mend or remove it, or give --skip-bad-images"
            raise ImageError(f"{self.path(i)} is not an image to train with ({why})", remedy) from e

    def _read(self, file: Any, target: int | None) -> tuple[Image.Image, int]:
        with file:
            return read(file, self.mode), -1 if target is None else target

    @property
    def class_map(self) -> dict[str, int]:
        """Numbers of the classes by their names, if they have any; timm's folder reader and its tar reader name it
        differently."""
        return getattr(self.reader, "class_to_idx", None) or getattr(self.reader, "class_name_to_idx", None) or {}

    def files(self) -> list[str]:
        """That its reader opens, each once; none of a data set that has no such reader."""
        if isinstance(self.reader, ReaderImageInTar):
            found = [os.path.join(self.reader.root, tar or "").rstrip("/") for _, tar, _ in self.reader.samples]
        else:
            found = [path for path, _ in getattr(self.reader, "samples", ())]
        return list(dict.fromkeys(found))

    def example(self, name: str) -> str | None:
        """The path of an image of a class; None if there is none, or no list of them."""
        targets = getattr(self.reader, "targets", None)
        if targets is None:
            targets = [target for _, target in getattr(self.reader, "samples", ())]
        return next((self.path(i) for i, target in enumerate(targets) if target == self.class_map.get(name)), None)

    def path(self, i: int) -> str:
        """Of an image, in a tar after the tar's; its number, if it has none."""
        if isinstance(self.reader, ReaderImageInTar):
            member, tar, inner = self.reader.samples[i]
            found = [
                os.path.join(self.reader.root, *filter(None, [tar])),
                *([inner.name] if inner else []),
                member.name,
            ]
        elif self.reader is None:
            samples = getattr(self.dataset, "samples", None)
            found = [str(samples[i][0])] if samples else []
        else:
            found = [self.reader.filename(i, absolute=True) or f"image {i} of {self.name}"]
        path = ": ".join(found or [f"image {i} of {self.name}"])
        return printable(path)


class Chosen(Subset):
    """Some images of a data set; timm sets `transform` on it."""

    @property
    def transform(self):
        return self.dataset.transform

    @transform.setter
    def transform(self, value):
        self.dataset.transform = value


class Readable(Chosen):
    """The images of a data set but for those that cannot be read, after each was tried.

    Args:
        workers: processes that read; 0: this one.

    Attributes:
        left_out: why, of each that is.
    """

    def __init__(self, dataset: Dataset, workers: int):
        loader = each(_Tried(dataset), BATCH, list, workers)
        said = [why for batch in tqdm(loader, desc="reading", leave=False, disable=None) for why in batch]
        super().__init__(dataset, [i for i, why in enumerate(said) if why is None])
        self.left_out = [why for why in said if why is not None]


def left_out(*sets: Dataset) -> list[str]:
    """Why, of each image that is not in its set because it cannot be read."""
    return [why for dataset in sets for why in getattr(dataset, "left_out", ())]


class _Tried(Dataset):
    """Of each image None, or why it cannot be read."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int) -> str | None:
        try:
            self.dataset[i]
        except ImageError as e:
            return e.why
        return None


def check_folders(samples: Sequence[tuple[str, int]]) -> None:
    """Raise TrainError if a link leads to a folder whose images are there already: timm follows it, in circles too."""
    known: dict[str, str] = {}
    for folder in dict.fromkeys(os.path.dirname(path) for path, _ in samples):
        before = known.setdefault(os.path.realpath(folder), folder)
        if before != folder:
            raise TrainError(f"{Path(folder)} and {Path(before)} are the same folder; remove the link")
