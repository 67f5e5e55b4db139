"""Draw the picture of the demo's report in the README: ``python docs/report.py``, which runs the demo first, or
``python docs/report.py RUN`` with the folder of one. The page is opened in chromium and photographed."""

import io
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

import timm_dd
from timm_dd.train.demo import demo

SIZE = (1280, 3400)  # pixels of the window
CUTS = ((60, 1130), (1190, 1700), (2450, 3230))  # rows of it that are shown, if they are there
COLOURS = 96


def photograph(page: Path, target: Path) -> Image.Image:
    words = ["chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    words += [f"--window-size={SIZE[0]},{SIZE[1]}", f"--screenshot={target}", page.as_uri()]
    subprocess.run(words, check=True, capture_output=True, timeout=300)
    return Image.open(target).convert("RGB")


def main(run: str | None, target: Path) -> None:
    if shutil.which("chromium") is None:
        raise SystemExit("no chromium here: apt-get install chromium")
    with tempfile.TemporaryDirectory() as folder:
        if run is None:
            demo(folder, 42)
            (run,) = Path(folder).iterdir()
        page = Path(folder) / "report.html"
        timm_dd.report(run, page)
        image = photograph(page, Path(folder) / "page.png")
    small = image.resize((image.width * 3 // 4, image.height * 3 // 4), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    small.quantize(COLOURS).save(file, "png", optimize=True)
    target.write_bytes(file.getvalue())
    print(f"{target}: {target.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main(sys.argv[1] if sys.argv[1:] else None, Path(__file__).parent / "report.png")
