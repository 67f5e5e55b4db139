"""The networks of a run, loaded once, and the images that they are shown."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import timm
import torch
from timm.data import create_dataset, create_transform
from torch import nn

from .. import models
from ..algebra.domain import spatial
from ..algebra.view import resample
from ..errors import ReportError, headline
from ..images import MODES, read
from ..storage import files
from ..storage.composed import check_images, read_config
from ..surgery.parts import Parts
from ..text import printable
from ..two_level.aggregate import GIVE_PROBABILITIES, WITHOUT_WEIGHTS
from ..two_level.network import TwoLevel
from .outcome import counted
from .record import Record

BATCH = 64
SHOWN = 160  # pixels of a side of an image on the page, at most
WHOLE = {"composed": "composed", "tuned": "fine-tuned", "baseline": "baseline"}  # as the figures call them


@dataclass(frozen=True)
class Samples:
    """Images as the networks take them.

    Attributes:
        images: (N, C, *size), normalised.
        labels: (N,), None if they are not known.
        names: of the classes, None if they are not known.
        mean, std: by which they were normalised.
        source: where they come from, in words.
    """

    images: torch.Tensor
    labels: torch.Tensor | None
    names: Sequence[str] | None
    mean: Sequence[float]
    std: Sequence[float]
    source: str

    def picture(self, i: int) -> np.ndarray:
        """Image i as (height, width, 3) from 0 to 1."""
        return picture(self.images[i], self.mean, self.std)

    def name(self, c: int) -> str:
        """Of class c."""
        return self.names[c] if self.names is not None and c < len(self.names) else f"class {c}"


def picture(x: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """An image (C, height, width) that was normalised as (height, width, 3) from 0 to 1; of other than three channels
    the first is shown in grey."""
    shape, longest = (-1, 1, 1), max(x.shape[1:])
    x = (x * torch.tensor(std).reshape(shape) + torch.tensor(mean).reshape(shape)).clamp(0, 1)
    if longest > SHOWN:
        x = resample(x[None], [max(1, n * SHOWN // longest) for n in x.shape[1:]])[0]
    return (x if len(x) == 3 else x[:1].expand(3, *x.shape[1:])).permute(1, 2, 0).numpy()


def of_folder(folder: str | Path, record: Record, count: int) -> Samples:
    """Up to `count` images of a folder, those of each subfolder a class, prepared as the run's were.

    Raises:
        ReportError: no images there, one that cannot be read, or nothing says how to prepare them.
    """
    config, names, classes = _config(record)
    try:
        reader = create_dataset("", root=str(folder), search_split=False).reader
    except Exception as e:  # of timm's reader, of file systems
        raise ReportError(f"--images {folder}: {headline(e)}; expected a folder of images") from e
    transform, mode = create_transform(**config, is_training=False), MODES[config["input_size"][0]]

    def image(i: int) -> tuple[torch.Tensor, int]:
        file, label = reader[i]
        try:
            with file:
                return transform(read(file, mode)), label
        except Exception as e:  # Pillow's plugins have many
            path = printable(reader.filename(i, absolute=True))
            raise ReportError(f"--images: {path} is no image ({headline(e)}); mend or remove it") from e

    chosen = torch.randperm(len(reader), generator=torch.Generator().manual_seed(0))[:count].tolist()
    images, labels = zip(*map(image, chosen))
    found = [printable(name) for name in sorted(reader.class_to_idx, key=reader.class_to_idx.get)]
    names = names or (found if len(found) == classes else None)
    known = names is not None and set(found) <= set(names)
    return Samples(
        torch.stack(images),
        torch.tensor([names.index(found[i]) for i in labels]) if known else None,
        names,
        config["mean"],
        config["std"],
        f"{counted(len(images), 'image')} of {printable(str(folder))}",
    )


def _config(record: Record) -> tuple[dict, Sequence[str] | None, int | None]:
    """How images are prepared, the names of their classes in the order of their numbers, and how many they are."""
    config = None if record.plan is None else record.plan.config
    if config is None and "composed" in record.models:
        path = record.models["composed"] / files.CONFIG
        config = read_config(path.parent) if path.is_file() else None
    check_images((config or {}).get("pretrained_cfg", {}), str(record.folder))
    found = timm.data.resolve_data_config(pretrained_cfg=(config or {}).get("pretrained_cfg", {}))
    if config is None or len(found["input_size"]) != 3 or found["input_size"][0] not in MODES:
        raise ReportError(f"--images: {record.folder} does not say how images of its network are prepared")
    return found, config.get("label_names"), config.get("num_classes")


class Networks:
    """The networks of a `record`; each is loaded when it is first asked for."""

    def __init__(self, record: Record):
        self.record = record

    @functools.cached_property
    def parts(self) -> Parts | None:
        """The parts after the stage of their own, those that are there."""
        return self._load(self.record.own)

    @functools.cached_property
    def trained(self) -> Parts | None:
        """The parts that were composed."""
        return self.parts if self.record.trained == self.record.own else self._load(self.record.trained)

    def _load(self, folder: Path | None) -> Parts | None:
        if folder is None or self.record.plan is None or self.record.plan.model is None:
            return None
        parts = Parts.load(folder, missing="drop").float()  # as the images are
        for part in parts:
            part.eval()
        return parts

    @functools.cached_property
    def whole(self) -> dict[str, nn.Module]:
        """The composed, fine-tuned and baseline networks that are there, and of timm."""
        found = {name: self._whole(folder) for name, folder in self.record.models.items()}
        return {name: model.eval() for name, model in found.items() if model is not None}

    def _whole(self, folder: Path) -> nn.Module | None:
        plan = self.record.plan
        if plan is not None:
            if plan.model is None:
                return None
            model = models.create(plan.model, **plan.model_args)
            files.load_composed(folder, model)
            return model.float()
        if not (folder / files.CONFIG).is_file():
            return None
        return models.load(folder)

    @functools.cached_property
    def dnn(self) -> TwoLevel | None:
        """The dense network with its parts."""
        if self.record.two_level is None or self.parts is None or len(self.parts) < self.parts.plan.parts:
            return None
        two = TwoLevel.load(self.record.two_level).float()
        return two.eval() if two.how == "dnn" else None


def missing(record: Record) -> str | None:
    """Why there is no network to show images to; None if there may be one."""
    if record.plan is not None and record.plan.model is None:
        return "The network is not timm's, so a page cannot build it again to show it images."
    if record.own is None and not record.models:
        return "No network has been trained to its end here yet."
    return None


@torch.no_grad()
def scores(networks: Networks, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """What each network says of images, (N, C) each: ``part k``, then how the parts decide together, then the whole
    networks. Logits, but probabilities of ``mean`` and ``vote``; what gives no logits is left out."""
    found: dict[str, torch.Tensor] = {}
    parts = networks.parts
    if parts is not None and parts.plan.output == "logits" and parts.plan.inputs is None:
        own = _batched(parts, x, 1)
        if own.ndim == 3:
            found |= {f"part {k}": z for k, z in zip(parts.members, own)}
            found |= {how: WITHOUT_WEIGHTS[how](own) for how in GIVE_PROBABILITIES}
            if networks.dnn is not None:
                found["dnn"] = _batched(networks.dnn.decide, own, 0, 1)
    for name, model in networks.whole.items():
        z = None if models.gives_features(model) else _batched(model, x, 0)
        if isinstance(z, torch.Tensor) and z.ndim == 2:
            found[name] = z
    return found


def _batched(network: Callable, x: torch.Tensor, out: int, of: int = 0) -> torch.Tensor:
    """`network` on some images at a time, along dim `of` of its input and `out` of its output."""
    outputs = [network(batch) for batch in x.split(BATCH, of)]
    if not isinstance(outputs[0], torch.Tensor):
        return outputs[0]
    return torch.cat([y.float() for y in outputs], out)


def check_size(samples: Samples, record: Record) -> None:
    """Raise ReportError unless the images are of the size that the networks take."""
    if record.plan is not None and spatial(record.plan.input_size) != tuple(samples.images.shape[2:]):
        found = "×".join(map(str, samples.images.shape[2:]))
        size = "×".join(map(str, spatial(record.plan.input_size)))
        raise ReportError(f"the images have {found} pixels, the networks of {record.folder} take {size}")
