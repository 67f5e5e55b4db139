"""The page: one HTML file without a network or scripts, its figures beside it as PNG and SVG."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

import jinja2
from markupsafe import Markup

from ..errors import FileError, looking_into
from ..storage.atomic import output_folder
from .draw import Drawing


@dataclass
class Section:
    """A part of the page: what there is, and a sentence for what there is not.

    Attributes:
        texts: paragraphs. `warnings` and `missing` are set apart; `pre` is as it is on a terminal.
        table: of texts, the first row its heading.
    """

    name: str
    title: str
    drawings: list[Drawing] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    tables: list[Sequence[Sequence[str]]] = field(default_factory=list)
    pre: list[tuple[str, str]] = field(default_factory=list)


def render(title: str, sections: Sequence[Section]) -> str:
    """The page's HTML."""
    source = resources.files(__package__).joinpath("page.html.jinja").read_text(encoding="utf-8")
    strict = {"autoescape": True, "undefined": jinja2.StrictUndefined}
    environment = jinja2.Environment(**strict, trim_blocks=True, lstrip_blocks=True)
    inline = {d.name: Markup(d.inline()) for d in _drawings(sections)}
    return environment.from_string(source).render(title=title, sections=sections, inline=inline)


def write(output: Path, title: str, sections: Sequence[Section]) -> None:
    """Write the page, and beside it its figures, for ``report.html`` into ``report-figures/``; what was there before
    stays if that fails."""
    html = render(title, sections)
    files = {
        f"{d.name}.{form}": content for d in _drawings(sections) for form, content in (("svg", d.svg), ("png", d.png()))
    }
    with output_folder(output.parent, sync=False) as page, output_folder(figures_of(output), sync=False) as aside:
        page(output.name).write_text(html, encoding="utf-8")
        for name, content in files.items():
            aside(name).write_bytes(content)


def check_output(output: Path) -> None:
    """Raise FileError unless a page can have this name."""
    with looking_into(output, FileError):
        folder = not output.name or output.is_dir()
    if folder:
        raise FileError(f"{output} is a folder; expected a file name, like {output / 'report.html'}")


def figures_of(output: Path) -> Path:
    """The folder of a page's figures."""
    return output.with_name(f"{output.stem}-figures")


def _drawings(sections: Sequence[Section]) -> Iterable[Drawing]:
    return (drawing for section in sections for drawing in section.drawings)
