"""Decoded sets against the sets themselves."""

import pickle
import resource
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import RUN
from PIL import Image
from timm.data import create_dataset

from timm_dd.train.images import data, decoded
from timm_dd.train.images.readable import Images
from timm_dd.train.settings import options


@pytest.fixture
def photographs(tmp_path):
    """A folder of JPEGs of many sizes, in two classes."""
    random = np.random.default_rng(0)
    for i in range(70):
        folder = tmp_path / "images" / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 256, (5 + i % 7, 4 + i % 5, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.jpg")
    return create_dataset("", root=str(tmp_path / "images"))


def same(a, b) -> bool:
    return all(np.array_equal(np.asarray(x), np.asarray(u)) and y == v for (x, y), (u, v) in zip(a, b))


@pytest.mark.parametrize("workers", (0, 2))
def test_pixels_and_classes_are_the_sets(photographs, workers, tmp_path):
    found = decoded.decoded(photographs, tmp_path / "d" / "train.safetensors", workers)
    assert isinstance(found, decoded.Decoded) and len(found) == 70 and same(found, photographs)
    assert same(pickle.loads(pickle.dumps(found)), photographs)
    assert [p.name for p in (tmp_path / "d").iterdir()] == ["train.safetensors"]


def test_workers_do_not_share_a_tar(photographs, tmp_path):
    """Which the first process has read of, so that it is open when they begin."""
    folder = tmp_path / "images"
    for i in range(70, 400):
        shutil.copy(folder / "ab"[i % 2] / f"{i % 70}.jpg", folder / "ab"[i % 2] / f"{i}.jpg")
    with tarfile.open(tmp_path / "images.tar", "w") as tar:
        tar.add(folder, ".")
    tarred = Images(create_dataset("", root=str(tmp_path / "images.tar")), "RGB", "")
    expected = [(np.asarray(x), y) for x, y in tarred]
    assert len(expected) == 400 and same(decoded.decoded(tarred, tmp_path / "held.safetensors", 2), expected)


STUCK = """
import multiprocessing, sys, threading
from torch.utils.data import DataLoader
from timm_dd.train.images.workers import _begin

class Stuck(list):
    def __getitem__(self, i):
        return i if i < 2 else threading.Event().wait()

batches = iter(DataLoader(Stuck(range(8)), 1, num_workers=2, worker_init_fn=_begin))
next(batches)
print(*(worker.pid for worker in multiprocessing.active_children()), flush=True)
sys.stdin.readline()
raise OSError("a bad image")
"""


@pytest.mark.parametrize("killed", [False, True], ids=["fails", "is killed"])
def test_workers_end_with_the_first_process(killed):
    """Even those that wait for something that does not come."""
    process = subprocess.Popen(
        [sys.executable, "-c", STUCK], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    workers = process.stdout.readline().split()
    if killed:
        process.kill()
    _, errors = process.communicate("go on\n" if not killed else None, timeout=60)
    assert len(workers) == 2 and (killed or "OSError: a bad image" in errors)
    for pid in workers:
        end = time.monotonic() + 10
        while _runs(pid):
            assert time.monotonic() < end, f"worker {pid} goes on"


def _runs(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_batches_are_the_same(tmp_path):
    """The loader gives the same augmented images, to the bit."""
    args = options.parse([*RUN, "--parts", "4", "--train-num-samples", "300", "-b", "32"])
    config = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic"}
    config["crop_pct"] = 1.0
    batches = []
    for from_file in (False, True):
        sets = data.datasets(args)[:2]
        if from_file:
            sets = [decoded.decoded(s, tmp_path / f"{i}.safetensors", 0) for i, s in enumerate(sets)]
        loaders = data.loaders(args, config, *sets, torch.device("cpu"), distributed=False)
        data.seed_epoch(1, 2)
        batches.append([batch for loader in loaders for batch in loader])
    assert len(batches[0]) == len(batches[1]) > 9
    for (x, y), (u, v) in zip(*batches):
        assert torch.equal(x, u) and torch.equal(y, v)


def test_who_comes_second_reads_what_the_first_wrote(photographs, tmp_path):
    class Set(torch.utils.data.Dataset):
        transform, is_there = None, False

        def __len__(self):
            return 70

        def __getitem__(self, i):
            if i > 65 and not self.is_there:
                raise OSError("gone")
            return photographs[i]

    path, images = tmp_path / "d" / "train.safetensors", Set()
    with pytest.raises(OSError, match="gone"):
        decoded.decoded(images, path, 0)
    assert not list(path.parent.iterdir()), "half a set"
    images.is_there = True
    decoded.decoded(images, path, 0)
    assert same(decoded.decoded(Set(), path, 0), photographs)


@pytest.mark.parametrize("tarred", [False, True], ids=["folder", "tar"])
def test_a_file_of_other_images_is_made_again(tarred, photographs, tmp_path):
    """Whose run was killed: other files, other pixels in the same files, other images of them, half a file."""
    root, path = tmp_path / "images", tmp_path / "d" / "train.safetensors"

    def found():
        if tarred:
            with tarfile.open(tmp_path / "images.tar", "w") as tar:
                tar.add(root, ".")
        images = Images(create_dataset("", root=str(tmp_path / "images.tar" if tarred else root)), "RGB", "train")
        expected = [(np.asarray(x), y) for x, y in images]
        for chosen in (images, data.First(images, 9, 3), data.First(images, 9, 4)):
            again = decoded.decoded(chosen, path, 0)
            indices = getattr(chosen, "indices", range(len(images)))
            assert isinstance(again, decoded.Decoded) and same(again, [expected[i] for i in indices])
            assert len(again) == len(chosen)
        return expected

    before = found()
    Image.new("RGB", (9, 9), (1, 2, 3)).save(root / "a" / "0.jpg")
    assert not same(found(), before)
    (root / "b" / "69.jpg").unlink()
    assert len(found()) == 69
    path.write_bytes(path.read_bytes()[:1000])
    found()


def test_what_does_not_fit_stays_as_it_is(photographs, tmp_path, monkeypatch):
    memory = 70 * 3 * 5 * 5 * 20  # more than the first images take, less than all of a set of 7,000
    monkeypatch.setattr(decoded, "memory", lambda: memory)
    asked = []

    class Large(torch.utils.data.Dataset):
        transform = None

        def __len__(self):
            return 7000

        def __getitem__(self, i):
            asked.append(i)
            return photographs[i % 70]

    large = Large()
    assert decoded.decoded(large, tmp_path / "d" / "train.safetensors", 0) is large
    assert len(asked) == decoded.BATCH and not list((tmp_path / "d").iterdir())


def test_without_room_on_the_disk_it_stays_as_it_is(photographs, tmp_path, capsys):
    path, limits = tmp_path / "d" / "train.safetensors", resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        assert decoded.decoded(photographs, path, 0) is photographs
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "images are decoded every epoch" in capsys.readouterr().out and not list(path.parent.iterdir())


@pytest.mark.parametrize(
    "item", ((Image.new("L", (4, 4)), 1), (torch.zeros(3, 4, 4), 1), (Image.new("RGB", (4, 4)), 0.5))
)
def test_what_is_no_class_of_rgb_images_stays_as_it_is(item, tmp_path):
    class Other(list):
        transform = None

    other = Other([item] * 3)
    assert decoded.decoded(other, tmp_path / "train.safetensors", 0) is other
    assert not list(tmp_path.iterdir())


def test_a_stream_stays_as_it_is(tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            raise AssertionError("nobody asks")

    stream = Stream()
    assert decoded.decoded(stream, tmp_path / "train.safetensors", 0) is stream and not list(tmp_path.iterdir())
