"""Data: timm's datasets and loaders, scikit-learn's digits, and the order of images, the same on every rank.

In the part stage every rank reads all images in one order, given by the seed and the epoch alone, so that a part
does not depend on how many ranks there are.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import FastCollateMixup, create_dataset, create_loader, resolve_data_config
from timm.data.readers.reader_image_folder import ReaderImageFolder
from torch.utils.data import Dataset, IterableDataset, Subset
from torchvision import transforms

from ..errors import TrainError, headline
from . import options, workers
from .images import Chosen, Images, Readable, check_folders

MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}  # of Pillow, by channels
SPLITS = {"train": ("train", "training"), "validation": ("val", "validation", "valid", "eval", "test")}


class Digits(Dataset):
    """scikit-learn's digits (UCI Optical Recognition, 1,797 handwritten scans of 8×8, 10 classes), shown at 32×32 RGB.

    Every fifth scan is for validation.
    """

    classes = tuple("0123456789")

    def __init__(self, train: bool, mode: str = "RGB"):
        from sklearn.datasets import load_digits

        digits = load_digits()
        chosen = [i for i in range(len(digits.target)) if (i % 5 != 0) == train]
        self.images = (digits.images[chosen] * (255 / 16)).astype(np.uint8)
        self.targets = digits.target[chosen]
        self.transform, self.mode = None, mode

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, i: int):
        image = Image.fromarray(self.images[i]).resize((32, 32), Image.Resampling.BICUBIC).convert(self.mode)
        return (self.transform(image) if self.transform else image), int(self.targets[i])


class First(Chosen):
    """The first n images of a fixed shuffle, or the rest of them."""

    def __init__(self, dataset: Dataset, n: int, seed: int, rest: bool = False):
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))
        super().__init__(dataset, (order[n:] if rest else order[:n]).tolist())


def datasets(args: argparse.Namespace, world: int = 1) -> tuple[Dataset, Dataset, int | None]:
    """(train, validation, number of classes or None).

    Args:
        world: ranks that share the images in the second stage.

    Raises:
        TrainError: no such folder, no images in it, or too few for a batch on every rank.
    """
    if args.dataset == "digits":
        sets = _digits(True, image_mode(args)), _digits(False, image_mode(args))
        classes: int | None = len(Digits.classes)
    else:
        sets = tuple(_dataset(args, which) for which in ("train", "validation"))
        classes = _classes(*sets)
    train, val = sets
    if args.train_num_samples:
        train = First(train, args.train_num_samples, args.seed)
    if args.val_num_samples:
        val = First(val, args.val_num_samples, args.seed)
    if args.skip_bad_images is not None:
        train, val = (_readable(args, s) for s in (train, val))
    _check_enough(args, len(train), len(val), world)
    return train, val, classes


def _readable(args: argparse.Namespace, dataset: Dataset) -> Dataset:
    """Without the images that cannot be read; a stream's reader goes its own way."""
    if isinstance(dataset, IterableDataset):
        return dataset
    return Readable(dataset, args.skip_bad_images, args.workers)


def _check_enough(args: argparse.Namespace, train: int, val: int, world: int) -> None:
    """Raise TrainError unless every rank has a batch in the second stage: the rest of less than a batch is left out."""
    batch, share = images_of_an_update(args), -(-train // world)  # the sampler fills up the last rank's
    if share < batch:
        of_each = f" on each of {world} ranks, which share them" if world > 1 else ""
        fewer = f", or {train // batch} ranks" if 1 < train // batch < world else ""
        raise TrainError(
            f"{train} training images make no batch of {batch}{of_each}; use a smaller --batch-size{fewer}"
        )
    if not val:
        raise TrainError("no validation images, and no accuracy without them")


def folds(args: argparse.Namespace, train: Dataset) -> tuple[Dataset, Dataset]:
    """The training images of the parts and those of the dense network: all for both, or with --coarse-folds N for the
    dense network an N-th that the parts leave out."""
    if args.coarse_folds is None:
        return train, train
    n = len(train) - len(train) // args.coarse_folds
    return First(train, n, args.seed), First(train, n, args.seed, rest=True)


def images_of_an_update(args: argparse.Namespace) -> int:
    """On one rank."""
    return args.batch_size * args.grad_accum_steps


def pace(args: argparse.Namespace, train: Dataset, ranks: int) -> dict[str, int]:
    """Updates of an epoch and images of an update, of ranks that share the images; nothing of a stream, whose loader
    counts as it goes."""
    if isinstance(train, IterableDataset):
        return {}
    batch = images_of_an_update(args)
    return {"updates_per_epoch": -(-len(train) // ranks) // batch, "images": batch * ranks}


def image_mode(args: argparse.Namespace) -> str:
    """Pillow's name for images of so many channels.

    Raises:
        TrainError: it has none.
    """
    channels = options.channels(args) or 3
    if channels not in MODES:
        raise TrainError(f"images have 1 to 4 channels, not {channels}; see --in-chans and --input-size")
    return MODES[channels]


def _digits(train: bool, mode: str) -> Digits:
    try:
        return Digits(train, mode)
    except ImportError as e:
        raise TrainError("--dataset digits comes with scikit-learn: pip install 'timm_dd[demo]'") from e


def _dataset(args: argparse.Namespace, which: str) -> Dataset:
    mode, split = image_mode(args), args.train_split if which == "train" else args.val_split
    try:
        if args.dataset:
            found = create_dataset(
                args.dataset, root=args.data_dir, split=split, download=args.dataset_download, input_img_mode=mode
            )
        else:
            found = _images(Path(args.data_dir), split, which, mode)
        return found if isinstance(found, IterableDataset) else Images(found, mode, f"{split} of {args.dataset}")
    except TrainError:
        raise
    except Exception as e:  # each of timm's readers has its own
        where = args.data_dir if not args.dataset else f"--dataset {args.dataset}"
        if args.dataset:
            where += f" in {args.data_dir}" if args.data_dir else " without --data-dir"
        raise TrainError(f"no {split} images in {where}: {headline(e)}") from e


def _images(root: Path, split: str, which: str, mode: str) -> Dataset:
    """A folder with folders or tars for each split, or one tar with folders for each."""
    names = (split, *SPLITS[which])
    if not root.exists():
        raise TrainError(f"no data folder {root}; expected a folder or a tar with train and val")
    if root.is_file():
        return _inside_tar(root, names, mode)
    for name in names:
        for path in (root / name, root / f"{name}.tar"):
            if path.exists():
                return _split(path, which, mode)
    expected = ", ".join(dict.fromkeys(names))
    raise TrainError(f"{root} has no {which} images: expected one of {expected}, as a folder or a tar of class folders")


def _split(path: Path, which: str, mode: str) -> Dataset:
    """A folder, or a tar, of class folders."""
    try:
        found = create_dataset("", root=str(path), search_split=False, input_img_mode=mode)
    except Exception as e:  # of tars and file systems
        raise TrainError(f"no {which} images in {path}: {headline(e)}") from e
    if isinstance(found.reader, ReaderImageFolder):
        check_folders(found.reader.samples)
    return found


def _inside_tar(path: Path, names: Sequence[str], mode: str) -> Dataset:
    dataset = create_dataset("", root=str(path), input_img_mode=mode)
    reader = dataset.reader
    folders = [Path(s[0].path).parts for s in reader.samples]
    keep = [i for i, p in enumerate(folders) if any(n in p[:-2] for n in names)]
    if not keep:
        raise TrainError(f"{path} has no folder {names[0]}; expected {names[0]}/class/image")
    reader.samples, reader.targets = reader.samples[keep], reader.targets[keep]
    return dataset


def _classes(train: Dataset, val: Dataset) -> int | None:
    """The number of classes, the same in both sets; None where the data set does not tell."""
    maps = [d.class_map if isinstance(d, Images) else {} for d in (train, val)]
    if all(maps) and maps[0] != maps[1]:
        odd = next(iter(sorted(set(maps[0]) ^ set(maps[1]))), "")
        example = train.example(odd) or val.example(odd)
        raise TrainError(
            f"train and validation have different classes, such as {odd!r} ({example}); both need the same class "
            "folders"
        )
    return len(maps[0]) or len(getattr(train, "classes", ())) or None


def class_names(dataset: Dataset, classes: int) -> tuple[str, ...] | None:
    """In the order of their numbers, if the data set tells them."""
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    by_number = getattr(dataset, "class_map", {})
    names = sorted(by_number, key=by_number.get) or getattr(dataset, "classes", ())
    return tuple(map(str, names)) if isinstance(names, Sequence) and len(names) == classes else None


def data_config(args: argparse.Namespace, model: torch.nn.Module) -> dict[str, Any]:
    """Input size, mean, std, interpolation and crop: the options', else the model's."""
    given = vars(args).copy()
    if args.dataset == "digits" and args.img_size is None and args.input_size is None:
        given["img_size"] = 32
    try:
        config = resolve_data_config(given, model=model, verbose=False)
    except AssertionError as e:
        raise TrainError("--mean and --std have one number, or one for each of the image's channels") from e
    channels = config["input_size"][0]
    for name in ("mean", "std"):
        if len(config[name]) != channels:  # the model's, of colours
            config[name] = (sum(config[name]) / len(config[name]),) * channels
    if config["input_size"][1] <= 64:
        config["crop_pct"] = args.crop_pct or 1.0  # a small image is not worth cutting
    return config


def loaders(
    args: argparse.Namespace,
    config: dict,
    train: Dataset,
    val: Dataset,
    device: torch.device,
    distributed: bool,
    train_size: Sequence[int] | None = None,
):
    """timm's loaders for training and validation; with `train_size` random resized crops are resampled to that."""
    common = _common(args, config, device, distributed)
    smaller = {} if train_size is None else {"input_size": (config["input_size"][0], *train_size)}
    train_loader = create_loader(
        train,
        batch_size=images_of_an_update(args),
        collate_fn=_mixup(args) if args.mixup else None,
        is_training=True,
        no_aug=args.no_aug,
        train_crop_mode=args.train_crop_mode,
        scale=args.scale,
        ratio=args.ratio,
        hflip=args.hflip,
        vflip=args.vflip,
        color_jitter=args.color_jitter,
        auto_augment=args.aa,
        re_prob=args.reprob,
        interpolation="random",
        **{**common, **smaller},
    )
    workers.shield(train_loader.loader)
    if args.no_aug or args.shift:
        train.transform = _plain(args, config, train.transform)
    return train_loader, _validation_loader(args, config, val, common)


def _mixup(args: argparse.Namespace) -> FastCollateMixup:
    return FastCollateMixup(args.mixup, label_smoothing=args.smoothing, num_classes=args.num_classes)


def _validation_loader(args: argparse.Namespace, config: dict, val: Dataset, common: dict):
    loader = create_loader(
        val,
        batch_size=args.validation_batch_size or args.batch_size,
        interpolation=config["interpolation"],
        crop_pct=config["crop_pct"],
        **common,
    )
    workers.shield(loader.loader)
    return loader


def validation(args: argparse.Namespace, config: dict):
    """timm's loader for the validation images alone, on the CPU."""
    return loader_of(args, config, validation_set(args))


def validation_set(args: argparse.Namespace) -> Dataset:
    """All images to validate; errors as of `datasets`."""
    return _digits(False, image_mode(args)) if args.dataset == "digits" else _dataset(args, "validation")


def loader_of(args: argparse.Namespace, config: dict, val: Dataset):
    """timm's loader for some validation images, on the CPU."""
    return _validation_loader(args, config, val, _common(args, config, torch.device("cpu"), distributed=False))


def _common(args: argparse.Namespace, config: dict, device: torch.device, distributed: bool) -> dict:
    return dict(
        input_size=config["input_size"],
        mean=config["mean"],
        std=config["std"],
        num_workers=args.workers,
        distributed=distributed,
        pin_memory=args.pin_mem,
        device=device,
        persistent_workers=False,  # new workers are seeded every epoch, see seed_epoch
        worker_seeding=workers.begin,
    )


def _plain(args: argparse.Namespace, config: dict, transform):
    """Shifts instead of timm's crops and jitter of colours, as the CIFAR networks are trained; with its flips and its
    AutoAugment."""
    _, height, width = config["input_size"]
    steps = [transforms.Resize((height, width))]
    if args.shift:
        steps.append(transforms.RandomCrop((height, width), padding=args.shift, padding_mode="edge"))
    if not args.no_aug:
        steps += [step for step in transform.transforms[1:-1] if not isinstance(step, transforms.ColorJitter)]
    return transforms.Compose([*steps, transform.transforms[-1]])


def seed_epoch(seed: int, epoch: int) -> None:
    """The order and augmentation of an epoch's images follow from these two numbers alone."""
    value = seed * 1_000_003 + epoch
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.manual_seed(value % 2**64)
