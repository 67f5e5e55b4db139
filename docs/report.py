"""Draw the picture of the demo's report in the README: ``python docs/report.py``, which runs the demo first, or
``python docs/report.py RUN`` with the folder of one. It has some of the report's figures side by side."""

import sys
import tempfile
from pathlib import Path

from PIL import Image

import timm_dd
from timm_dd.train.demo import demo

SHOWN = (("accuracy-over-epochs", "boxes", "blocks"), ("maps-0", "cam-1", "decisions-1"))  # rows of figures
WIDTH, GAP = 400, 18  # pixels of a figure, and around it


def row(figures: list[Image.Image]) -> Image.Image:
    scaled = [f.resize((WIDTH, round(f.height * WIDTH / f.width)), Image.Resampling.LANCZOS) for f in figures]
    height = max(f.height for f in scaled)
    found = Image.new("RGB", (len(scaled) * (WIDTH + GAP) - GAP, height), "white")
    for i, figure in enumerate(scaled):
        found.paste(figure, (i * (WIDTH + GAP), (height - figure.height) // 2))
    return found


def draw(run: str | Path, target: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        timm_dd.report(run, Path(folder) / "report.html")
        figures = Path(folder) / "report-figures"
        rows = [row([Image.open(figures / f"{name}.png").convert("RGB") for name in names]) for names in SHOWN]
    size = (rows[0].width + 2 * GAP, sum(r.height + GAP for r in rows) + GAP)
    picture, top = Image.new("RGB", size, "white"), GAP
    for found in rows:
        picture.paste(found, (GAP, top))
        top += found.height + GAP
    picture.save(target, "png", optimize=True)


def main(run: str | None, target: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        if run is None:
            demo(folder, 42)
            (run,) = Path(folder).iterdir()
        draw(run, target)


if __name__ == "__main__":
    main(sys.argv[1] if sys.argv[1:] else None, Path(__file__).parent / "report.png")
