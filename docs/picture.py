"""The picture of the method in the README.

    pip install '.[demo,report]' && python docs/picture.py

writes method.svg beside this file: a digit of scikit-learn's, cut into four boxes, and a network of four layers.
"""

from pathlib import Path

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from sklearn.datasets import load_digits

COLOURS = ("#3b6fb6", "#d9822b", "#3f9b5b", "#a3508f")
INK, PALE, EDGE = "#24292f", "#eceff2", "#b8c0c8"
LAYERS = (0.8, 1.2, 1.6, 2.0)  # widths of the network, in units of the picture
SIDE, OVERLAP = 8, 1  # pixels of the digit, and by how many a box reaches over the middle


def box(k: int) -> tuple[slice, slice]:
    half = SIDE // 2
    starts = [(0, half + OVERLAP), (half - OVERLAP, SIDE)]
    return slice(*starts[k // 2]), slice(*starts[k % 2])


def image(ax, pixels, x: float, y: float, side: float, colour: str | None = None) -> None:
    """`pixels` in a square whose lower left corner is (x, y)."""
    ax.imshow(pixels, cmap="gray_r", vmin=0, vmax=16, extent=(x, x + side, y, y + side), zorder=2)
    ax.add_patch(Rectangle((x, y), side, side, fill=False, ec=colour or INK, lw=2.2 if colour else 1, zorder=3))


def arrow(ax, start: tuple[float, float], end: tuple[float, float], width: float = 1.2) -> None:
    ax.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=9 * width, lw=width, color=INK))


def rectangle(ax, x: float, y: float, width: float, height: float, colour: str, alpha: float = 1.0) -> None:
    ax.add_patch(Rectangle((x, y), width, height, fc=colour, ec="white", lw=0.8, alpha=alpha, zorder=2))


def text(ax, x: float, y: float, words: str, size: float = 9, **more) -> None:
    ax.text(x, y, words, size=size, color=INK, ha="center", va="center", **more)


def panel(ax, left: float, right: float, title: str, words: str) -> None:
    style = "round,pad=0,rounding_size=0.12"
    ax.add_patch(FancyBboxPatch((left, 0.08), right - left, 4.04, boxstyle=style, fc="#f7f8fa", ec=EDGE, lw=0.8))
    text(ax, (left + right) / 2, 3.82, title, 11, weight="bold")
    text(ax, (left + right) / 2, 0.4, words, 8.5, linespacing=1.35)


def split(ax, digit) -> None:
    """The image with its four boxes, and the network with its layers in four colours."""
    panel(ax, 0.1, 3.9, "1  Split", "the width into K parts,\nthe image into K boxes")
    side, pixel = 1.44, 1.44 / SIDE
    image(ax, digit, 0.28, 1.4, side)
    for k, colour in enumerate(COLOURS):
        rows, columns = box(k)
        x, y = 0.28 + columns.start * pixel, 1.4 + side - rows.stop * pixel
        size = (columns.stop - columns.start) * pixel
        ax.add_patch(Rectangle((x, y), size, size, fill=False, ec=colour, lw=2, zorder=4))
    arrow(ax, (1.76, 2.12), (2.04, 2.12))
    for i, width in enumerate(LAYERS):
        for k, colour in enumerate(COLOURS):
            rectangle(ax, 2.14 + 0.42 * i, 2.12 + width / 2 - (k + 1) * width / 4, 0.26, width / 4, colour)
    text(ax, 1.0, 3.25, "image", 8)
    text(ax, 2.9, 3.25, "network, layer by layer", 8)


def train(ax, digit) -> None:
    """Each box and its narrow network, in a row."""
    panel(ax, 4.3, 7.4, "2  Train the parts", "K narrow networks, K devices,\nno communication")
    for k, colour in enumerate(COLOURS):
        y = 3.3 - 0.74 * k
        image(ax, digit[box(k)], 4.55, y - 0.28, 0.56, colour)
        arrow(ax, (5.15, y), (5.41, y))
        for i, width in enumerate(LAYERS):
            rectangle(ax, 5.48 + 0.35 * i, y - width / 8, 0.24, width / 4, colour)
        text(ax, 7.06, y, f"part {k}", 8)


def matrix(ax, x: float, y: float, size: float, filled: bool, rows: int = 4, columns: int = 4) -> None:
    """A weight whose `rows` and `columns` are cut: its blocks on the diagonal, and what is between them."""
    cell = size / 4
    for r in range(rows):
        for c in range(columns):
            block = rows != columns or r == c
            colour = COLOURS[max(r, c) if rows != columns else r]
            x0, y0 = x + c * cell, y - (r + 1) * cell
            rectangle(ax, x0, y0, cell, cell, colour if block else "#c9ced6" if filled else PALE)
    ax.add_patch(Rectangle((x, y - rows * cell), columns * cell, rows * cell, fill=False, ec=EDGE, lw=0.8, zorder=3))


def weights(ax, x: float, filled: bool) -> None:
    """First layer (2.11), two layers in the middle (2.12), classifier (2.14)."""
    size = 1.16
    matrix(ax, x, 3.46, size, filled, 4, 1)
    matrix(ax, x + 0.6, 3.46, size, filled)
    matrix(ax, x + 0.6, 2.12, size, filled)
    matrix(ax, x + 1.96, 2.12, size, filled, 1, 4)
    text(ax, x + 0.15, 2.02, "first\nlayer", 8)
    text(ax, x + 2.5, 3.0, "between\nthe blocks:\n" + ("trained" if filled else "zero"), 8)
    text(ax, x + 2.54, 1.62, "classifier", 8)


def compose(ax) -> None:
    panel(ax, 7.8, 11.2, "3  Compose", "block-diagonal weights in the\noriginal timm model")
    weights(ax, 7.95, filled=False)


def tune(ax) -> None:
    panel(ax, 11.6, 15.1, "4  Fine-tune", "all weights, whole images:\nan ordinary timm checkpoint")
    weights(ax, 11.82, filled=True)


def draw() -> Figure:
    digit = load_digits().images[3]
    figure = Figure(figsize=(12.2, 3.45), facecolor="white")
    ax = figure.add_axes((0, 0, 1, 1))
    split(ax, digit)
    train(ax, digit)
    compose(ax)
    tune(ax)
    for left in (3.9, 7.4, 11.2):
        arrow(ax, (left + 0.05, 2.1), (left + 0.37, 2.1), 1.8)
    ax.set(xlim=(0, 15.2), ylim=(0, 4.2), aspect="equal")
    ax.axis("off")
    return figure


def main(target: Path) -> None:
    """Write `target`; the same bytes again and again with one matplotlib."""
    with matplotlib.rc_context({"svg.hashsalt": "timm_dd", "svg.fonttype": "path", "font.family": "DejaVu Sans"}):
        FigureCanvasSVG(draw()).print_svg(target, metadata={"Date": None, "Creator": None})


if __name__ == "__main__":
    main(Path(__file__).parent / "method.svg")
