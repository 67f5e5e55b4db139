"""Images on the device, on a CPU: the batches of timm's loader, and each random transform against Pillow's, timm's or
torchvision's of one image after another."""

import math
import random
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from test_packed import CPU
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation as TimmsCrop
from torchvision import transforms as tv
from torchvision.transforms import functional as F

from timm_dd.train.images import data, resident
from timm_dd.train.images.batched import KERNELS, Erase, Flip, Jitter, ResizedCrop, Shift, erasing, steps
from timm_dd.train.images.data import First, seed_epoch
from timm_dd.train.images.decoded import decoded
from timm_dd.train.images.resident import Resident
from timm_dd.train.settings import options

BILINEAR, BICUBIC = KERNELS
MANY = 20_000


class Corners(torch.utils.data.Dataset):
    """Images of 6x6 whose pixels are all different."""

    transform = None

    def __init__(self):
        self.pixels = torch.arange(40 * 6 * 6 * 3).remainder(251).to(torch.uint8).view(40, 6, 6, 3)

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, i):
        return self.transform(Image.fromarray(self.pixels[i].numpy())), i


def of_loader(shift, training=True, images=40):
    """(timm's loader with the transforms of a run, the same with its images on the device)."""
    args = options.parse(["--dataset", "digits", "--shift", str(shift), "-b", "8", "-j", "0"])
    args.hflip, args.vflip = 0.3, 0.6
    config = {"input_size": (3, 6, 6), "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4), "crop_pct": 1.0}
    config["interpolation"] = "bilinear"
    both = data.loaders(args, config, First(Corners(), images, 0), First(Corners(), images, 0), CPU, False)
    loader = both[0 if training else 1]
    held = loader.dataset.dataset.pixels[loader.dataset.indices].movedim(3, 1).contiguous()
    targets = torch.tensor(loader.dataset.indices)
    return loader, Resident(loader, held, targets, steps(loader.dataset.transform, (6, 6)))


def test_images_on_the_device_are_the_loaders():
    """In validation the same batches bit for bit."""
    loader, resident = of_loader(0, training=False)
    assert len(resident) == len(loader) == 5
    for (x, y), (mine, also) in zip(loader, resident, strict=True):
        assert torch.equal(y, also) and torch.equal(x, mine) and x.dtype == mine.dtype


def test_the_order_on_the_device():
    """Follows from the seed and the epoch; all images, but for what makes no batch."""
    _, resident = of_loader(2, images=20)
    orders = []
    for seed, epoch in ((3, 1), (3, 1), (3, 2)):
        seed_epoch(seed, epoch)
        orders.append(torch.cat([y for _, y in resident]).tolist())
    assert orders[0] == orders[1] != orders[2] and len(set(orders[0])) == len(orders[0]) == 16


def alike(expected, found, deviations=4):
    """Whether two counts of as many draws are of one distribution, by chi squared; what is rare counts together."""
    together = expected + found
    cells = Counter()
    for which, n in together.items():
        cells[which if n >= 20 else None] += n
    mine = Counter()
    for which, n in found.items():
        mine[which if together[which] >= 20 else None] += n
    share = found.total() / together.total()
    chi2 = sum((mine[which] - share * n) ** 2 / (share * (1 - share) * n) for which, n in cells.items())
    return chi2 < len(cells) + deviations * math.sqrt(2 * len(cells))


def test_shifts_and_flips_are_the_loaders():
    """Every image that the loader makes of one, the device makes as often: of 3 x 3 shifts and four flips."""
    counts = []
    for source in of_loader(1, images=8):
        seed_epoch(5, 0)
        found = Counter()
        for _ in range(1000):
            for x, y in source:
                found.update((int(i), image.numpy().tobytes()) for i, image in zip(y, x))
        counts.append(found)
    expected, found = counts
    assert expected.keys() == found.keys() and len(found) == 8 * 36
    assert alike(expected, found)


# ---- each transform


def photos(n, height=24, width=20):
    """Smooth, with edges and saturated pixels."""
    x = torch.rand(n, 3, 6, 5, generator=torch.Generator().manual_seed(n))
    x = torch.nn.functional.interpolate(x, (height, width), mode="bilinear")
    x[:, :, 3:9, 4:11] = x[:, :, 3:9, 4:11].round()
    return ((2 * x - 0.5).clamp(0, 1) * 255).to(torch.uint8)


def by_pillow(x, change):
    images = [Image.fromarray(image.movedim(0, 2).numpy()) for image in x]
    made = [np.array(change(i, image)) for i, image in enumerate(images)]
    return torch.from_numpy(np.stack(made)).movedim(3, 1)


@pytest.mark.parametrize("mode", KERNELS, ids=str)
@pytest.mark.parametrize("out", [(20, 24), (9, 7), (32, 32)], ids=str)
def test_a_crop_is_resampled_as_torch_and_pillow_do(mode, out):
    """Larger and smaller, from boxes of one pixel to the whole image."""
    torch.manual_seed(0)
    step = ResizedCrop((24, 20), out, (0.01, 1.0), (0.2, 5.0), (KERNELS[mode],))
    x, boxes = photos(200), step.draw(200)
    boxes[0][:2] = boxes[1][:2] = 0
    boxes[2][:2], boxes[3][:2] = torch.tensor([24, 1]), torch.tensor([20, 1])
    found = step(x, *boxes)
    for image, made, (top, left, h, w) in zip(x, found, zip(*(t.tolist() for t in boxes[:4]))):
        cut = image[None, :, top : top + h, left : left + w].double()
        expected = torch.nn.functional.interpolate(cut, out, mode=mode.value, antialias=True)[0].clamp(0, 255)
        assert (made - expected).abs().max() < 0.5 + 1e-4
    pillow = by_pillow(x, lambda i, image: F.resized_crop(image, *(int(t[i]) for t in boxes[:4]), out, mode))
    assert (found.int() - pillow.int()).abs().float().mean() < 0.25  # it rounds and cuts off between its two passes


def test_each_image_has_its_kernel():
    torch.manual_seed(0)
    both = ResizedCrop((24, 20), (12, 12), (0.2, 1.0), (0.5, 2.0), tuple(KERNELS.values()))
    x, (*boxes, kernel) = photos(50), both.draw(50)
    assert set(kernel.tolist()) == {0, 1}
    for i, given in enumerate(KERNELS.values()):
        of_one = ResizedCrop((24, 20), (12, 12), (0.2, 1.0), (0.5, 2.0), (given,))
        mine = kernel == i
        assert torch.equal(both(x, *boxes, kernel)[mine], of_one(x, *boxes, torch.zeros_like(kernel))[mine])


@pytest.mark.parametrize(
    ("scale", "ratio"),
    [((0.08, 1.0), (3 / 4, 4 / 3)), ((0.9, 1.0), (0.3, 0.4)), ((0.9, 1.0), (2.0, 3.0))],
    ids=["timm's", "mostly too high", "mostly too wide"],
)
def test_boxes_are_drawn_as_timm_draws_them(scale, ratio):
    torch.manual_seed(0)
    random.seed(0)
    image = Image.new("RGB", (6, 7))
    expected = Counter(TimmsCrop.get_params(image, scale, ratio) for _ in range(MANY))
    drawn = ResizedCrop((7, 6), (7, 6), scale, ratio, (KERNELS[BILINEAR],)).draw(MANY)
    found = Counter(zip(*(t.tolist() for t in drawn[:4])))
    assert alike(expected, found)


def test_colours_are_pillows():
    """Bit for bit, in every order."""
    torch.manual_seed(0)
    step = Jitter(((0.2, 1.8), (0.1, 2.5), (0.0, 3.0)))
    x, (factors, order) = photos(120), step.draw(120)
    assert len({tuple(o) for o in order.tolist()}) == 6
    change = [F.adjust_brightness, F.adjust_contrast, F.adjust_saturation]

    def one(i, image):
        for which in order[i].tolist():
            image = change[which](image, float(factors[i, which]))
        return image

    assert torch.equal(step(x, factors, order), by_pillow(x, one))


def test_colours_are_drawn_as_torchvision_draws_them():
    torch.manual_seed(0)
    factors, order = Jitter(((0.6, 1.4), None, (0.5, 0.9)), 0.25).draw(MANY)
    left = (factors == 1).all(1)
    assert abs(left.float().mean() - 0.75) < 0.02 and (factors[:, 1] == 1).all()
    for column, low, high in ((0, 0.6, 1.4), (2, 0.5, 0.9)):
        seen = factors[~left, column].sort().values
        assert (seen - torch.linspace(low, high, len(seen))).abs().max() < 0.05 * (high - low)
    assert all(abs(n - MANY / 6) < 300 for n in Counter(map(tuple, order.tolist())).values())


@pytest.mark.parametrize("mode", ["const", "rand", "pixel"])
@pytest.mark.parametrize("count", [1, 3])
def test_erased_boxes_are_timms(mode, count):
    """As many pixels of an image as often, and filled alike."""
    torch.manual_seed(0)
    random.seed(0)
    by = RandomErasing(0.6, mode=mode, max_count=count, device="cpu")
    (step,) = erasing(by, (6, 8))
    x = torch.full((MANY // 2, 2, 6, 8), 9.0)
    expected, found = by(x.clone()), step(x, *step.draw(len(x)))
    for of in (lambda y: (y != 9).all(1).sum((1, 2)), lambda y: (y != 9).all(1).int().argmax(1).flatten()[::7]):
        assert alike(*(Counter(of(y).tolist()) for y in (expected, found)))
    where = [(y != 9).float().mean((0, 1)) for y in (expected, found)]
    torch.testing.assert_close(*where, rtol=0, atol=0.03)
    for y in (expected, found):
        filled = y[y != 9]
        assert abs(filled.mean()) < 0.03 and abs(filled.std() - float(mode != "const")) < 0.03
        colours = y.flatten(2)[:, 0].sort(1).values.diff().count_nonzero(1)
        assert (colours.max() > 6) == (mode == "pixel")


def test_which_transforms_have_steps():
    crop = TimmsCrop(16, (0.3, 1.0), (0.7, 1.4), "random")
    jitter = tv.ColorJitter(0.4, 0.3, 0)
    found = steps(tv.Compose([crop, tv.RandomVerticalFlip(0.2), tv.RandomApply([jitter], 0.7), None]), (24, 20))
    kernels = tuple(KERNELS.values())
    assert found == [
        ResizedCrop((24, 20), (16, 16), (0.3, 1.0), (0.7, 1.4), kernels),
        Flip(2, 0.2),
        Jitter(((0.6, 1.4), (0.7, 1.3), None), 0.7),
    ]
    whole = [tv.Resize(20), tv.Resize((24, 20)), tv.CenterCrop((24, 20))]
    shifted = tv.RandomCrop((24, 20), padding=3, padding_mode="edge")
    assert steps(tv.Compose([*whole, shifted, tv.RandomHorizontalFlip(), None]), (24, 20)) == [Shift(3), Flip(3, 0.5)]
    others = [
        tv.Resize(24), tv.CenterCrop(20), tv.RandomCrop((24, 20), padding=3),
        tv.RandomCrop((20, 20), padding=3, padding_mode="edge"), TimmsCrop(16, interpolation="nearest"),
        tv.ColorJitter(hue=0.1), tv.RandomGrayscale(0.1), tv.RandomApply([tv.GaussianBlur(3)]),
    ]  # fmt: skip
    assert all(steps(tv.Compose([other, None]), (24, 20)) is None for other in others)


def test_which_images_stay_on_the_device(tmp_path, monkeypatch):
    """Those of one size with transforms that have steps, where they fit; the batches are those of the run."""
    monkeypatch.setattr(resident, "WITHOUT", ())
    memory = [10**9]
    monkeypatch.setattr(torch.cpu, "mem_get_info", lambda device: (memory[0], memory[0]), raising=False)
    config = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic"}

    def kinds(*given, crop_pct=1.0, train_size=None):
        args = options.parse(["--dataset", "digits", "-b", "100", "-j", "0", *given])
        sets = [decoded(s, tmp_path / f"{i}.safetensors", 0) for i, s in enumerate(data.datasets(args)[:2])]
        found = data.loaders(args, {**config, "crop_pct": crop_pct}, *sets, CPU, False, train_size)
        held = [resident.resident(loader, CPU) for loader in found]
        return found, held, [isinstance(loader, Resident) for loader in held]

    (_, val), (_, held), kind = kinds("--shift", "2")
    assert kind == [True, True]
    for (x, y), (mine, also) in zip(val, held, strict=True):
        assert torch.equal(x, mine) and torch.equal(y, also)
    _, (train, _), kind = kinds("--reprob", "0.5", "--recount", "2", train_size=(20, 24))
    assert kind == [True, True] and {x.shape for x, _ in train} == {(100, 3, 20, 24)}
    assert [type(step) for step in (*train.changes, *train.erasing)] == [ResizedCrop, Flip, Jitter, Erase]
    assert train.erasing[0].size == (20, 24)
    for other in (["--aa", "rand-m9"], ["--mixup", "0.2"], ["--grayscale-prob", "0.1"]):
        assert kinds(*other)[2] == [False, True]
    assert kinds("--no-aug", crop_pct=0.9)[2] == [True, False]
    config["input_size"] = (3, 28, 28)
    assert kinds("--shift", "2")[2] == [False, False] and kinds()[2] == [True, False]
    config["input_size"], memory[0] = (3, 32, 32), 5 * 10**6
    assert kinds("--shift", "2")[2] == [False, True]
