"""What the figures share: colours, panels of images, and how a figure becomes SVG for a page, SVG and PNG for files.

In a page a figure's text takes the page's colours, light or dark, by CSS variables; files are on white paper.
"""

from __future__ import annotations

import functools
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import numpy as np

from ..errors import ReportError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 4.8  # inches of a figure, so that 9 points are readable on a phone
INK, MUTED, LINES, GOOD, BAD = "#1d2129", "#59606c", "#d5dae1", "#1a7f38", "#c0262e"
BADGE = "#fffffd"  # behind words on an image
VARIABLES = {
    INK: "--ink", MUTED: "--muted", LINES: "--lines", GOOD: "--good", BAD: "--bad", BADGE: "--paper",
}  # in a page  # fmt: skip
PAPER = "#fffffe"  # of figures and axes, which a page's is to be seen through
SERIES = {  # readable on white and on black
    "composed": "#2f7de0", "baseline": "#d9660b", "joint": "#0c9577", "coherent": "#a85bd0", "transfer": "#d3477f",
    "two_level": "#8d7a18", "parts": "#7d8796",
}  # fmt: skip
OF_PARTS = ("#7a6fd6", "#3c92b8", "#5a9a45", "#a9862a", "#c96a55", "#b55f96", "#7d8796", "#4b8f87")
COLUMNS = 4  # panels in a row
MOST = 160  # pixels of what is laid over an image
SVG, XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "axes.facecolor": PAPER,
    "text.parse_math": False,  # names of classes and folders have any characters
    "font.size": 9,
    "axes.titlesize": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.titlecolor": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": LINES,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
}


@dataclass(frozen=True)
class Drawing:
    """A figure and the table that it was drawn from.

    Attributes:
        name: of its files.
        caption: what is seen, for the reader.
        alt: the same for who cannot see it.
        hover: by the id of a line, what its points say when the pointer is on them.
    """

    name: str
    caption: str
    alt: str
    table: Sequence[Mapping[str, Any]]
    figure: Figure
    hover: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def png(self) -> bytes:
        """On white."""
        return self._saved("png", dpi=150, metadata={"Software": None})

    @functools.cached_property
    def svg(self) -> bytes:
        """On white, a document of its own."""
        return self._saved("svg", metadata={"Date": None, "Creator": None})

    def inline(self) -> str:
        """For a page: transparent, in its colours, with values to hover over, and with ids that no other figure has."""
        for prefix, space in (("", SVG), ("xlink", XLINK)):
            ElementTree.register_namespace(prefix, space)
        root = ElementTree.fromstring(self.svg)
        for name in ("width", "height"):
            root.attrib.pop(name, None)
        for child in [c for c in root if c.tag == f"{{{SVG}}}metadata" or c.find(f"{{{SVG}}}style") is not None]:
            root.remove(child)  # the page has the rule for its lines' ends
        for image in root.iter(f"{{{SVG}}}image"):
            image.attrib.pop("id", None)  # the same pixels twice have one id
        root.attrib.update({"role": "img", "aria-label": self.alt})
        self._add_titles(root)
        text = ElementTree.tostring(root, encoding="unicode")
        text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{self.name}-", text)
        for colour, variable in VARIABLES.items():
            text = text.replace(colour, f"var({variable})")
        return text.replace(PAPER, "none")

    def _add_titles(self, root: ElementTree.Element) -> None:
        for group in root.iter(f"{{{SVG}}}g"):
            words = self.hover.get(group.get("id", ""), ())
            for mark, title in zip(group.iter(f"{{{SVG}}}use"), words):
                ElementTree.SubElement(mark, f"{{{SVG}}}title").text = title

    def _saved(self, form: str, **options: Any) -> bytes:
        from matplotlib import rc_context
        from matplotlib.text import Text

        for text in self.figure.findobj(lambda artist: isinstance(artist, Text) and artist.get_color() == "black"):
            text.set_color(INK)  # what has no colour of its own
        file = io.BytesIO()
        with rc_context({**STYLE, "svg.hashsalt": self.name}):
            self.figure.savefig(file, format=form, facecolor=PAPER, **options)
        self.figure.set_layout_engine("none")  # laid out once, whatever is written
        return file.getvalue()


def check_matplotlib() -> None:
    """Raise ReportError unless figures can be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as e:
        raise ReportError("a report is drawn by matplotlib, which is not installed: pip install timm_dd[report]") from e


def figure(height: float, width: float = WIDTH) -> Figure:
    """An empty one, of so many inches."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        return Figure(figsize=(width, height), layout="constrained")


def axes(fig: Figure, rows: int = 1, columns: int = 1, **options: Any) -> np.ndarray:
    """Its axes, (rows, columns), in our style."""
    from matplotlib import rc_context

    with rc_context(STYLE):
        return fig.subplots(rows, columns, squeeze=False, **options)


def legend(fig: Figure, columns: int = 3, **options: Any) -> None:
    """Of all axes, below them."""
    count = sum(len(ax.get_legend_handles_labels()[1]) for ax in fig.axes) + len(options.get("handles", ()))
    if count:
        fig.legend(loc="outside lower center", ncols=min(count, columns), fontsize=8, frameon=False, **options)


def colour_of_part(k: int) -> str:
    return OF_PARTS[k % len(OF_PARTS)]


@dataclass(frozen=True)
class Panel:
    """An image with a title: `pixels` are (height, width, 3) from 0 to 1, or (height, width) to be coloured by `map`.

    Attributes:
        over: (height, width) from 0 to 1, laid over the image in colours.
        limits: of what is coloured.
    """

    title: str
    pixels: np.ndarray
    colour: str = INK
    map: str = "viridis"
    limits: tuple[float, float] | None = None
    over: np.ndarray | None = None


def panels(found: Sequence[Panel], columns: int = COLUMNS) -> Figure:
    """Images side by side, in as many rows as it takes."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    columns = min(columns, len(found))
    count, aspect = math.ceil(len(found) / columns), max(p.pixels.shape[0] / p.pixels.shape[1] for p in found)
    above = 0.08 + 0.14 * max(1 + p.title.count("\n") for p in found)  # inches for a title
    side, gap = WIDTH / columns, 0.06
    tall = side * min(aspect, 2.0)
    height = count * (tall + above)
    with rc_context(STYLE):
        fig = Figure(figsize=(WIDTH, height))
        for i, panel in enumerate(found):
            row, column = divmod(i, columns)
            bottom = height - (row + 1) * (tall + above)
            size = ((side - gap) / WIDTH, (tall - gap) / height)
            place = fig.add_axes((column * side / WIDTH, bottom / height, *size))
            place.axis("off")
            _show(place, panel)
    return fig


def _tinted(over: np.ndarray) -> np.ndarray:
    """Colours (height, width, 4) through which an image is seen; the higher a number the more it covers."""
    from matplotlib import colormaps

    colours = colormaps["turbo"](np.nan_to_num(over))
    colours[..., 3] = np.where(np.isnan(over), 0, 0.25 + 0.4 * np.nan_to_num(over))
    return colours


def _show(place: Axes, panel: Panel) -> None:
    low, high = panel.limits or (None, None)
    height, width = panel.pixels.shape[:2]
    whole = {"interpolation": "none", "extent": (-0.5, width - 0.5, height - 0.5, -0.5)}
    place.imshow(panel.pixels, cmap=panel.map, vmin=low, vmax=high, **whole)
    if panel.over is not None:
        step = math.ceil(max(panel.over.shape) / MOST)
        over = panel.over[::step, ::step]
        place.imshow(_tinted(over), **whole)
    place.set_title(panel.title, fontsize=8, color=panel.colour, pad=3)
