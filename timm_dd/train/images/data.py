"""Data: timm's datasets and loaders, scikit-learn's digits, and the order of images, the same on every rank.

In the part stage every rank reads all images in one order, given by the seed and the epoch alone, so that a part
does not depend on how many ranks there are.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import FastCollateMixup, create_dataset, create_loader, resolve_data_config
from timm.data.distributed_sampler import RepeatAugSampler
from timm.data.readers.reader_image_folder import ReaderImageFolder
from torch.utils.data import Dataset, IterableDataset, Subset
from torchvision import transforms

from ...errors import TrainError, headline
from ...images import MODES
from ...text import printable
from ..settings import options
from . import workers
from .classes import of_file
from .readable import Chosen, Images, Readable, check_folders, left_out

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
        sets = _of_the_same_classes(args)
        classes = _classes(sets[0])
    train, val = sets
    if args.aug_repeats and world == 1:
        raise TrainError(
            "--aug-repeats: ranks that share the images see each several times; there is one, leave it out"
        )
    if args.train_num_samples:
        train = First(train, args.train_num_samples, args.seed)
    if args.val_num_samples:
        val = First(val, args.val_num_samples, args.seed)
    if args.skip_bad_images is not None:
        train, val = _readable(args, train, val)
    _check_enough(args, len(train), len(val), world)
    return train, val, classes


def _readable(args: argparse.Namespace, *sets: Dataset) -> list[Dataset]:
    """Without the images that cannot be read; a stream's reader goes its own way.

    Raises:
        TrainError: there are more of them than --skip-bad-images allows.
    """
    found = [s if isinstance(s, IterableDataset) else Readable(s, args.workers) for s in sets]
    bad, limit = left_out(*found), args.skip_bad_images
    if limit != "all" and len(bad) > limit:
        raise TrainError(f"{len(bad)} images cannot be read, more than --skip-bad-images {limit}; the first: {bad[0]}")
    return found


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
    batch, share = images_of_an_update(args), -(-len(train) // ranks)
    if args.aug_repeats and ranks > 1:
        share = len(RepeatAugSampler(train, ranks, 0, num_repeats=args.aug_repeats))
    return {"updates_per_epoch": share // batch, "images": batch * ranks}


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


def _of_the_same_classes(args: argparse.Namespace) -> tuple[Dataset, Dataset]:
    """(train, validation); classes have the numbers of the training images, of which validation may lack some.

    Raises:
        TrainError: a class that no training image has, or no line of --class-map; or images outside the folders of
            classes.
    """
    train = _numbered(args, "train", _given_classes(args))
    return train, _numbered(args, "validation", train.class_map if isinstance(train, Images) else {})


def _given_classes(args: argparse.Namespace) -> Mapping[str, int]:
    """The numbers of ``--class-map`` for folders and tars; timm's other readers know what the names in theirs are."""
    return {} if args.class_map is None or args.dataset else of_file(args.class_map)


def _numbered(args: argparse.Namespace, which: str, known: Mapping[str, int]) -> Dataset:
    """The images, of classes whose numbers are `known`, if any are; errors as of `_of_the_same_classes`."""
    images = _dataset(args, which)
    _check_sorted(images)
    found = images.class_map if isinstance(images, Images) else {}
    if not (known and found) or known == found:
        return images
    if odd := sorted(set(found) - set(known)):
        which_lack, them = "train and validation have different classes: no training image", "the training images"
        if args.class_map is not None:
            which_lack, them = f"--class-map {args.class_map}: no line", "that file"
        raise TrainError(
            f"{which_lack} is of {odd[0]!r} ({images.example(odd[0])}); rename or remove that folder, or add it to "
            f"{them}"
        )
    return _dataset(args, which, known)


def _check_sorted(images: Dataset) -> None:
    """Raise TrainError if some lie in no folder of a class: timm calls that class by no name."""
    for name in ("", ".") if isinstance(images, Images) else ():
        if name in images.class_map and (example := images.example(name)):
            at = Path(example)
            raise TrainError(
                f"{at} lies in no folder of a class; expected {at.parent}/CLASS/{at.name}, a folder for each class"
            )


def _dataset(args: argparse.Namespace, which: str, classes: Mapping[str, int] | None = None) -> Dataset:
    """
    Args:
        classes: their numbers, unless the data set gives them.
    """
    mode, split = image_mode(args), args.train_split if which == "train" else args.val_split
    try:
        if args.dataset:
            found = create_dataset(
                args.dataset, root=args.data_dir, split=split, download=args.dataset_download, **_reading(args, mode)
            )
        else:
            found = _images(Path(args.data_dir), split, which, _reading(args, mode, classes))
        return found if isinstance(found, IterableDataset) else Images(found, mode, f"{split} of {args.dataset}")
    except TrainError:
        raise
    except Exception as e:  # each of timm's readers has its own
        where = args.data_dir if not args.dataset else f"--dataset {args.dataset}"
        if args.dataset:
            where += f" in {args.data_dir}" if args.data_dir else " without --data-dir"
        raise TrainError(f"no {split} images in {where}: {headline(e)}") from e


def _reading(args: argparse.Namespace, mode: str, classes: Mapping[str, int] | None = None) -> dict[str, Any]:
    """What timm's readers are told, of those that are given: some readers take no others."""
    given = {
        "class_map": classes or (args.class_map if args.dataset else None),
        "input_key": args.input_key,
        "target_key": args.target_key,
        "trust_remote_code": args.dataset_trust_remote_code,
    }
    return {"input_img_mode": mode, **{name: value for name, value in given.items() if value}}


def _images(root: Path, split: str, which: str, reading: dict[str, Any]) -> Dataset:
    """A folder with folders or tars for each split, or one tar with folders for each. Another name for a split stands
    for it only where the split that is asked for is no name of the user's own."""
    names = tuple(dict.fromkeys((split, *SPLITS[which]))) if split in SPLITS[which] else (split,)
    if not root.exists():
        raise TrainError(f"no data folder {root}; expected a folder or a tar with train and val")
    if root.is_file():
        return _inside_tar(root, names, reading)
    for name in names:
        for path in (root / name, root / f"{name}.tar"):
            if path.exists():
                return _split(path, which, reading)
    expected = " or ".join(names)
    known = sorted(path for path in root.iterdir() if not path.name.startswith("."))
    has = f"; it has {', '.join(path.name for path in known[:3])}{', …' if len(known) > 3 else ''}" if known else ""
    raise TrainError(
        f"{root} has no {which} images: expected {expected}, as a folder or a tar of class folders "
        f"({root}/{names[0]}/CLASS/IMAGE){has}"
    )


def _split(path: Path, which: str, reading: dict[str, Any]) -> Dataset:
    """A folder, or a tar, of class folders."""
    try:
        found = create_dataset("", root=str(path), search_split=False, **reading)
    except Exception as e:  # of tars and file systems
        raise TrainError(f"no {which} images in {path}: {headline(e)}") from e
    if isinstance(found.reader, ReaderImageFolder):
        check_folders(found.reader.samples)
    return found


def _inside_tar(path: Path, names: Sequence[str], reading: dict[str, Any]) -> Dataset:
    dataset = create_dataset("", root=str(path), **reading)
    reader = dataset.reader
    folders = [Path(s[0].path).parts for s in reader.samples]
    of_names = ([i for i, p in enumerate(folders) if name in p[:-2]] for name in names)
    keep = next(filter(None, of_names), None)
    if keep is None:
        raise TrainError(f"{path} has no folder {' or '.join(names)}; expected {names[0]}/CLASS/IMAGE")
    reader.samples, reader.targets = reader.samples[keep], reader.targets[keep]
    return dataset


def _classes(train: Dataset) -> int | None:
    """The number of classes; None where the data set does not tell."""
    numbers = train.class_map.values() if isinstance(train, Images) else ()
    return max(numbers, default=-1) + 1 or len(getattr(train, "classes", ())) or None


def class_names(dataset: Dataset, classes: int) -> tuple[str, ...] | None:
    """In the order of their numbers, if the data set tells them.

    Raises:
        TrainError: one is not text, as a folder's name may be.
    """
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    by_number = getattr(dataset, "class_map", {})
    names = sorted(by_number, key=by_number.get) or getattr(dataset, "classes", ())
    if not isinstance(names, Sequence) or len(names) != classes:
        return None
    names = tuple(map(str, names))
    if odd := [name for name in names if name != printable(name)]:
        raise TrainError(f"the class {odd[0]!r} has a name that is not UTF-8; rename its folder")
    return names


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
        collate_fn=_mixup(args) if options.mixes(args) else None,
        is_training=True,
        no_aug=args.no_aug,
        train_crop_mode=args.train_crop_mode,
        scale=args.scale,
        ratio=args.ratio,
        hflip=args.hflip,
        vflip=args.vflip,
        color_jitter=None if args.shift else args.color_jitter,
        color_jitter_prob=args.color_jitter_prob,
        grayscale_prob=args.grayscale_prob,
        gaussian_blur_prob=args.gaussian_blur_prob,
        auto_augment=args.aa,
        re_prob=args.reprob,
        re_mode=args.remode,
        re_count=args.recount,
        num_aug_repeats=args.aug_repeats if distributed else 0,
        interpolation=args.train_interpolation,
        **{**common, **smaller},
    )
    workers.shield(train_loader.loader)
    if args.no_aug or args.shift:
        train.transform = _plain(args, config, train.transform)
    return train_loader, _validation_loader(args, config, val, common)


class Mixing(FastCollateMixup):
    """timm's, until a stage's epoch `off`; 0: to its end."""

    off = 0

    def begin_epoch(self, epoch: int) -> None:
        self.mixup_enabled = not self.off or epoch < self.off


def _mixup(args: argparse.Namespace) -> Mixing:
    mixing = Mixing(
        args.mixup,
        args.cutmix,
        args.cutmix_minmax,
        args.mixup_prob,
        args.mixup_switch_prob,
        args.mixup_mode,
        label_smoothing=args.smoothing,
        num_classes=args.num_classes,
    )
    mixing.off = args.mixup_off_epoch
    return mixing


def begin_epoch(loader, seed: int, epoch: int) -> None:
    """What an epoch's batches are follows from these numbers alone."""
    seed_epoch(seed, epoch)
    sampler, mixing = getattr(loader, "sampler", None), getattr(getattr(loader, "loader", None), "collate_fn", None)
    if hasattr(sampler, "set_epoch"):
        sampler.set_epoch(epoch)
    if isinstance(mixing, Mixing):
        mixing.begin_epoch(epoch)


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


def validation_set(args: argparse.Namespace, names: Sequence[str] | None = None) -> Dataset:
    """All images to validate; errors as of `datasets`.

    Args:
        names: of the classes, in the order of the numbers that they had in training, of which these images may lack
            some.
    """
    if args.dataset == "digits":
        return _digits(False, image_mode(args))
    by_name = {name: number for number, name in enumerate(names or ())}
    return _numbered(args, "validation", by_name or _given_classes(args))


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
    by = "bilinear" if args.train_interpolation == "random" else args.train_interpolation
    steps = [transforms.Resize((height, width), transforms.InterpolationMode(by))]
    if args.shift:
        steps.append(transforms.RandomCrop((height, width), padding=args.shift, padding_mode="edge"))
    if not args.no_aug:
        steps += transform.transforms[1:-1]
    return transforms.Compose([*steps, transform.transforms[-1]])


def seed_epoch(seed: int, epoch: int) -> None:
    """The order and augmentation of an epoch's images follow from these two numbers alone."""
    value = seed * 1_000_003 + epoch
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.manual_seed(value % 2**64)
