"""Image sets for benchmarks that train, as folders of class folders: timm lists them much sooner than a tar."""

import gzip
import io
import random
import shutil
import struct
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from PIL import Image

Files = Iterable[tuple[str, bytes]]  # class/name and content
IDX = "{}-images-idx3-ubyte.gz", "{}-labels-idx1-ubyte.gz"  # of Fashion-MNIST, which Debian packages
SPLITS = {"train": "train", "val": "t10k"}


def whole(name: str, folders: Sequence[Path], place: Path) -> Path:
    """`place`, filled with ``train`` and ``val`` of a set.

    Raises:
        FileNotFoundError: no folder has it.
    """
    files = source(name, folders)
    for split in SPLITS:
        fill(place / split, lambda split=split: files(split))
    return place


def cut(name: str, folders: Sequence[Path], place: Path, train: int, val: int) -> Path:
    """`place`, filled with so many of a set's training images to train on, and so many others of them to validate.

    Raises:
        FileNotFoundError: no folder has it.
    """
    files = source(name, folders)
    if not (place / "val").exists():
        drawn = random.Random(0).sample(sorted(files("train")), train + val)
        fill(place / "train", lambda: drawn[:train])
        fill(place / "val", lambda: drawn[train:])
    return place


def source(name: str, folders: Sequence[Path]) -> Callable[[str], Files]:
    """The files of a split: of ``NAME/SPLIT.tar`` in one of the folders; Fashion-MNIST has its own format."""
    for folder in folders:
        if (folder / name / "train.tar").exists():
            return lambda split: of_tar(folder / name / f"{split}.tar")
        found = next(folder.rglob(IDX[0].format("train")), None) if name == "fashion" else None
        if found is not None:
            return lambda split: of_idx(found.parent, SPLITS[split])
    wanted = f"{name}/train.tar" if name != "fashion" else f"{IDX[0].format('train')} (Debian: dataset-fashion-mnist)"
    raise FileNotFoundError(f"no {wanted} in {', '.join(map(str, folders))}")


def of_tar(path: Path) -> Files:
    with tarfile.open(path) as tar:
        for member in tar:
            if member.isfile():
                yield member.name, tar.extractfile(member).read()


def of_idx(folder: Path, split: str) -> Files:
    """PNG files of a pair of idx files, whose format is that of MNIST: http://yann.lecun.com/exdb/mnist."""
    pixels, labels = (gzip.decompress((folder / name.format(split)).read_bytes()) for name in IDX)
    _, count, height, width = struct.unpack(">4I", pixels[:16])
    for i in range(count):
        start, file = 16 + i * height * width, io.BytesIO()
        Image.frombytes("L", (width, height), pixels[start : start + height * width]).save(file, "PNG")
        yield f"{labels[8 + i]}/{i:05}.png", file.getvalue()


def fill(place: Path, files: Callable[[], Files]) -> None:
    """Write files into a folder, unless it is there: it is when all are, whichever process wrote them."""
    if place.exists():
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(dir=place.parent))
    for name, content in files():
        path = unfinished / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    try:
        unfinished.rename(place)
    except OSError:  # another process was sooner
        shutil.rmtree(unfinished)
