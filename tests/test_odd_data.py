"""Folders and tars as people have them: each is trained on, or the file that is in the way is named by its path."""

import io
import resource
import shutil
import struct
import tarfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from timm_dd.cli import main
from timm_dd.train.images import data
from timm_dd.train.settings import options

RUN = [
    "--model", "test_resnet", "--parts", "2", "--img-size", "32", "-b", "4", "-j", "0", "--part-epochs", "1",
    "--epochs", "1", "--warmup-epochs", "0", "--lr", "0.01", "--no-update-bn", "--device", "cpu",
]  # fmt: skip


def picture(i, size=(12, 10), mode="RGB"):
    pixels = np.random.default_rng(i).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def encoded(i, form="PNG", size=(12, 10), mode="RGB", **given):
    file = io.BytesIO()
    picture(i, size, mode).save(file, form, **given)
    return file.getvalue()


def huge():
    """A PNG that says it has 192 million pixels."""
    header = struct.pack(">IIBBBBB", 16000, 12000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    body = [struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def saved(image, form, **given):
    file = io.BytesIO()
    image.save(file, form, **given)
    return file.getvalue()


GIF = saved(picture(1), "GIF", save_all=True, append_images=[picture(2), picture(3)])
DEEP = np.array([[0, 255, 256], [40000, 65535, 1]], np.uint16)  # 16 bits
EXIF = Image.Exif()
EXIF[0x0112] = 6  # turned by 90°
CLEAR = picture(3).convert("P")
CLEAR.info["transparency"] = bytes(range(256))
MAC = b"\0\5\26\7\0\2\0\0Mac OS X        " + bytes(60)  # AppleDouble
LONG = "ü" * 120 + ".png"

# What is added to a folder of eight images to train on and four to validate, in two classes: files by their paths. Then
# what comes: the number of images of both, or the path that is named.
ADDED = {
    "nothing": ({}, (8, 4)),
    "a truncated JPEG": ({"train/a/x.jpg": encoded(9, "JPEG")[:-200]}, "train/a/x.jpg"),
    "a truncated PNG": ({"train/a/x.png": encoded(9)[:-100]}, "train/a/x.png"),
    "a truncated image to validate on": ({"val/b/x.jpg": encoded(9, "JPEG")[:-200]}, "val/b/x.jpg"),
    "192 million pixels": ({"train/b/big.png": huge()}, "train/b/big.png"),
    "ten in a row": ({f"train/a/x{i}.png": b"no" for i in range(10)}, "train/a/x"),
    "eleven to validate on": ({f"val/a/x{i}.png": b"no" for i in range(11)}, "val/a/x"),
    "macOS's second files": ({"train/a/._0.png": MAC}, "train/a/._0.png"),
    "empty class folders": ({"train/c/": b"", "val/c/": b""}, (8, 4)),
    "an empty class folder": ({"train/c/": b""}, (8, 4)),
    "a class to train on alone": ({"train/c/0.png": encoded(9)}, (9, 4)),
    "a class to validate on alone": ({"val/c/0.png": encoded(9)}, "val/c/0.png"),
    "other files": ({"train/a/notes.txt": b"x", "train/.DS_Store": b"x", "Thumbs.db": b"x", "train/a/x": b"x"}, (8, 4)),
    "a text called an image": ({"train/a/x.png": b"hello"}, "train/a/x.png"),
    "one pixel": ({"train/a/x.png": encoded(9, size=(1, 1))}, (9, 4)),
    "a line": ({"train/a/x.png": encoded(9, size=(900, 1)), "val/a/x.png": encoded(9, size=(1, 700))}, (9, 5)),
    "CMYK": ({"train/a/x.jpg": encoded(9, "JPEG", mode="CMYK")}, (9, 4)),
    "a palette": ({"train/a/x.png": encoded(9, mode="P"), "val/a/x.png": saved(CLEAR, "PNG")}, (9, 5)),
    "grey and alpha": ({"train/a/x.png": encoded(9, mode="LA"), "val/a/x.png": encoded(9, mode="RGBA")}, (9, 5)),
    "black and white": ({"train/a/x.png": encoded(9, mode="1"), "train/b/x.png": encoded(9, mode="L")}, (10, 4)),
    "16 bits": ({"train/a/x.png": saved(Image.fromarray(DEEP), "PNG")}, "train/a/x.png"),
    "16 bits of which 8 are used": ({"train/a/x.png": saved(Image.fromarray(DEEP % 256), "PNG")}, (9, 4)),
    "numbers between 0 and 1": (
        {"train/a/x.png": saved(Image.fromarray(np.float32([[0.5]])), "TIFF")},
        "train/a/x.png",
    ),
    "an animation": ({"train/a/x.gif": GIF, "val/b/x.webp": encoded(9, "WEBP")}, (8, 4)),  # not timm's endings
    "an animation called a PNG": ({"train/a/x.png": GIF}, (9, 4)),
    "a rotated photograph": ({"train/a/x.jpg": encoded(9, "JPEG", exif=EXIF)}, (9, 4)),
    "unicode": ({"train/a/ünï 😀\n.png": encoded(9), f"val/a/{LONG}": encoded(9)}, (9, 5)),
    "unicode that cannot be read": ({"train/a/ünï 😀.png": b"x", f"val/a/{LONG}": encoded(9)}, "train/a/ünï 😀.png"),
    "a name that is no text": ({"train/a/\udcff.png": b"x"}, "train/a/\\udcff.png"),
    "nested folders": ({"train/x/y/a/0.png": encoded(9), "val/x/y/a/0.png": encoded(9)}, (9, 5)),
    "images beside the classes": ({"train/0.png": encoded(9)}, "train/0.png"),
    "no bytes": ({"train/b/x.png": b""}, "train/b/x.png"),
    "no bytes to validate on": ({"val/b/x.jpg": b""}, "val/b/x.jpg"),
    "upper case": ({"train/a/X.JPG": encoded(9, "JPEG"), "train/b/x.JPEG": encoded(9, "JPEG")}, (10, 4)),
}


def make(root, added):
    files = {f"train/{'ab'[i % 2]}/{i}.png": encoded(i) for i in range(8)}
    files |= {f"val/{'ab'[i % 2]}/{i}.png": encoded(20 + i) for i in range(4)}
    for name, content in {**files, **added}.items():
        path = root / name
        (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
        if not name.endswith("/"):
            path.write_bytes(content)
    return root


def as_tars(root, prefix=""):
    """A tar for each split in place of its folder."""
    for split in ("train", "val"):
        with tarfile.open(root / f"{split}.tar", "w") as tar:
            for path in sorted((root / split).rglob("*")):
                if path.is_file():
                    info = tar.gettarinfo(path, "x")
                    info.name = prefix + str(path.relative_to(root / split))
                    tar.addfile(info, io.BytesIO(path.read_bytes()))
        shutil.rmtree(root / split)
    return root


@pytest.fixture
def train(tmp_path, capfd):
    """Train on a folder: the status, the lines on stdout and stderr. What did not begin has left nothing."""

    def run(root, *given):
        output = tmp_path / "runs"
        status = main(["train", *RUN, "--data-dir", str(root), "--output", str(output), "--experiment", "r", *given])
        out, error = capfd.readouterr()
        if status:
            assert status == 1 and len(error.splitlines()) == 1 and not output.exists(), error
        else:
            assert error == "" and (output / "r" / "summary.json").exists() and not (output / "r" / "decoded").exists()
        return status, out, error

    return run


def check(found, expected, root):
    status, out, error = found
    if isinstance(expected, str):
        assert status == 1 and f"{root}/{expected}" in error, error
    else:
        assert status == 0, error
        assert f"{expected[0]} images to train on, {expected[1]} to validate;" in out


@pytest.mark.parametrize("case", ADDED)
def test_a_folder(case, train, tmp_path):
    added, expected = ADDED[case]
    root = make(tmp_path / "data", added)
    check(train(root), expected, root)


@pytest.mark.parametrize("form", [lambda root: root, as_tars])
def test_a_class_whose_name_is_no_text(form, train, tmp_path):
    """A byte that is not UTF-8 would stand in the model's config.json, and in no page."""
    root = form(make(tmp_path / "data", {"train/\udcff/x.png": encoded(9), "val/\udcff/x.png": encoded(8)}))
    status, _, error = train(root)
    assert status == 1 and "the class '\\udcff' has a name that is not UTF-8; rename its folder" in error


IN_TARS = [
    "nothing", "macOS's second files", "a truncated image to validate on", "192 million pixels", "unicode", "no bytes",
    "a class to train on alone",
]  # fmt: skip


def in_tar(expected):
    return expected.replace("/", ".tar: ", 1) if isinstance(expected, str) else expected


@pytest.mark.parametrize("case", IN_TARS)
def test_tars(case, train, tmp_path):
    added, expected = ADDED[case]
    root = as_tars(make(tmp_path / "data", added))
    check(train(root), in_tar(expected), root)


@pytest.mark.parametrize("prefix", ["/", "/somewhere/", "./", "x/y/", "../"])
def test_paths_in_tars(prefix, train, tmp_path):
    root = as_tars(make(tmp_path / "data", {}), prefix)
    check(train(root), (8, 4), root)


def test_a_name_that_a_tar_has_twice(train, tmp_path):
    root = as_tars(make(tmp_path / "data", {}))
    with tarfile.open(root / "train.tar", "a") as tar:
        for content in (encoded(9), b"x"):
            info = tarfile.TarInfo("a/0.png")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    check(train(root), "train.tar: a/0.png", root)


@pytest.mark.parametrize("size", [0, 10, 1500, 5000])
def test_a_tar_that_ends_too_early(size, train, tmp_path):
    root = as_tars(make(tmp_path / "data", {}))
    (root / "train.tar").write_bytes((root / "train.tar").read_bytes()[:size])
    check(train(root), "train.tar", root)


def test_a_tar_in_a_tar(train, tmp_path):
    root = make(tmp_path / "data", {})
    for split in ("train", "val"):
        with tarfile.open(root / "inner.tar", "w") as tar:
            tar.add(root / split / "b", "b")
        with tarfile.open(root / f"{split}.tar", "w") as tar:
            tar.add(root / split / "a", "a")
            tar.add(root / "inner.tar", "inner.tar")
        shutil.rmtree(root / split)
    check(train(root), (8, 4), root)


def test_links(train, tmp_path):
    """To images and to folders; not to one that is not there, nor in circles."""
    root = make(tmp_path / "data", {})
    (root / "train" / "b").rename(tmp_path / "elsewhere")
    (root / "train" / "b").symlink_to(tmp_path / "elsewhere")
    (root / "train" / "a" / "link.png").symlink_to(root / "train" / "a" / "0.png")
    check(train(root), (9, 4), root)
    shutil.rmtree(tmp_path / "runs")
    (root / "train" / "a" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    check(train(root), "train/a/gone.png", root)
    (root / "train" / "a" / "gone.png").unlink()
    (root / "val" / "b" / "up").symlink_to(root / "val")
    check(train(root), "val/b/up", root)


# ---- an image that cannot be read is never counted as another


BAD = {"train/a/x.png": b"x", "train/b/x.png": huge(), "val/a/x.jpg": encoded(9, "JPEG")[:-200]}


@pytest.mark.parametrize("given, tars", [([], False), (["3"], True)])
def test_bad_images_are_left_out_if_the_user_says_so(given, tars, train, tmp_path):
    """And named; the run is that without them."""
    bad, good = make(tmp_path / "bad", BAD), make(tmp_path / "good", {})
    if tars:
        bad, good = as_tars(bad), as_tars(good)
    status, out, error = train(bad, "--skip-bad-images", *given)
    assert status == 0 and "8 images to train on, 4 to validate;" in out
    for name in BAD:
        name = in_tar(name) if tars else name
        assert f"left out: {bad}/{name} is not an image to train with (" in out
    tuned = (tmp_path / "runs/r/global/last/model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "runs")
    assert train(good)[0] == 0
    header, found = (
        8 + int.from_bytes(tuned[:8], "little"),
        (tmp_path / "runs/r/global/last/model.safetensors").read_bytes(),
    )
    assert found[8 + int.from_bytes(found[:8], "little") :] == tuned[header:]


def test_no_more_are_left_out_than_the_user_allows(train, tmp_path):
    root = make(tmp_path / "data", BAD)
    for n in (0, 2):
        status, _, error = train(root, "--skip-bad-images", str(n))
        assert status == 1 and f"3 images cannot be read, more than --skip-bad-images {n}" in error
        assert f"{root}/train/a/x.png" in error


@pytest.mark.parametrize(
    "fits, name, workers",
    [
        (True, "train/a/2.png", "2"),
        (True, "val/a/2.png", "0"),
        (False, "train/a/2.png", "0"),
        (False, "val/a/2.png", "2"),
    ],
)
def test_a_bad_image_is_named_wherever_it_is_read(fits, name, workers, tmp_path, monkeypatch, capfd):
    """By this process or a worker, as the set is decoded or as it is trained on."""
    root = make(tmp_path / "data", {})
    (root / name).write_bytes(b"x")
    monkeypatch.setattr("timm_dd.train.rehearsal._batches", lambda *_: None)
    if not fits:
        monkeypatch.setattr("timm_dd.train.run.decoded", lambda dataset, *_: dataset)
    given = ["--data-dir", str(root), "--output", str(tmp_path / "runs"), "-j", workers]
    assert main(["train", *RUN, *given]) == 1
    error = capfd.readouterr().err
    assert f"{root}/{name} is not an image to train with (UnidentifiedImageError: " in error
    assert len(error.splitlines()) == 1 and error.endswith("; mend or remove it, or give --skip-bad-images\n")
    assert (tmp_path / "runs").exists() == (not fits)


def test_workers_do_not_share_a_place_in_a_tar(tmp_path):
    """After this process has read of it: each image is the one that the folder has."""
    root = make(tmp_path / "data", {f"val/b/{i}.png": encoded(i, size=(150, 150)) for i in range(4, 120)})
    pixels = []
    for form in (root, as_tars(root)):
        args = options.parse([*RUN, "--data-dir", str(form), "-j", "2", "-b", "1"])
        train, val, _ = data.datasets(args)
        config = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic"}
        config["crop_pct"] = 1.0
        loader = data.loaders(args, config, train, val, torch.device("cpu"), distributed=False)[1]
        loader.dataset[0]
        pixels.append(torch.cat([x for x, _ in loader]))
    assert len(pixels[0]) > 100 and torch.equal(*pixels)


def test_all_parts_fail_for_the_reason_that_is_said(tmp_path, capfd):
    """Of one image in a batch, whose maps are one pixel."""
    root = make(tmp_path / "data", {"train/c/0.png": encoded(8), "val/c/0.png": encoded(9)})
    given = ["-b", "1", "--img-size", "16", "--data-dir", str(root), "--output", str(tmp_path / "runs")]
    assert main(["train", *RUN, *given]) == 1
    error = capfd.readouterr().err
    assert len(error.splitlines()) == 1 and error.count("more than 1 value per channel") == 2, error


def test_a_full_disk_is_named_and_leaves_no_half_file(tmp_path, monkeypatch, capfd):
    root = make(tmp_path / "data", {})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))
    try:
        given = ["--data-dir", str(root), "--output", str(tmp_path / "runs"), "--experiment", "r"]
        assert main(["train", *RUN, *given]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    error = capfd.readouterr().err
    assert len(error.splitlines()) == 1 and f"{tmp_path}/runs/r/parts/" in error, error
    assert not [path for path in (tmp_path / "runs").rglob("*") if path.name.startswith(".")]
