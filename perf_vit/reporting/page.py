"""An HTML page of pictures, tables and settings that needs no other file and no network."""

from __future__ import annotations

import base64
import io
import math
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar

import jinja2
import matplotlib
import numpy as np
from PIL import Image

from perf_vit._version import __version__
from perf_vit.files import write_text
from perf_vit.plotting.pictures import Picture
from perf_vit.text import printable, to_json, without_nan

__all__ = ["Figure", "Page", "Row", "Section", "Settings", "TextTable", "figure_of", "hex_color", "picture_uri"]

_QUALITY = 82

# Small pictures are enlarged by the browser, pixel by pixel.
_PIXELATED_PX = 200


def hex_color(color: Sequence[int]) -> str:
    """Return a colour as CSS writes it, such as "#e69f00"."""
    return "#{:02x}{:02x}{:02x}".format(*color[:3])


def picture_uri(picture: Picture, *, lossy: bool = True) -> str:
    """Return a picture as a data URI: WebP of imagery, PNG of drawings and of pictures with transparent pixels."""
    buffer = io.BytesIO()
    image = Image.fromarray(picture)
    if lossy and picture.shape[-1] == 3:
        image.save(buffer, "WEBP", quality=_QUALITY, method=4)
        return _data_uri("image/webp", buffer.getvalue())
    indexed, alpha = _indexed(picture)
    if indexed is None:
        image.save(buffer, "PNG")
    else:
        indexed.save(buffer, "PNG", optimize=True, transparency=alpha)
    return _data_uri("image/png", buffer.getvalue())


def _indexed(picture: Picture) -> tuple[Image.Image | None, bytes]:
    """A drawing of at most 256 colours as an image with a palette, a tenth of the size, and the palette's alpha."""
    opaque = np.full((*picture.shape[:2], 4), 255, np.uint8)
    opaque[..., : picture.shape[-1]] = picture
    packed = opaque.view(np.uint32)[..., 0]
    colors, index = np.unique(packed, return_inverse=True)
    if len(colors) > 256:
        return None, b""
    image = Image.fromarray(index.reshape(packed.shape).astype(np.uint8), "P")
    palette = colors[:, None].view(np.uint8)
    image.putpalette(palette[:, :3].tobytes())
    return image, palette[:, 3].tobytes()


def _data_uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A picture with its caption.

    Attributes:
        uri: Data URI.
        width: Width in pixels.
        height: Height in pixels.
        caption: Caption.
        note: Second line of the caption.
        scale: Length of a scale bar in percent of the width, and its text; None for no bar.
        pixelated: Whether enlarged pixels stay sharp.
    """

    uri: str
    width: int
    height: int
    caption: str
    note: str = ""
    scale: tuple[float, str] | None = None
    pixelated: bool = False


def figure_of(
    picture: Picture, caption: str, *, note: str = "", lossy: bool = True, pixel_size: tuple[float, str] | None = None
) -> Figure:
    """Return a picture with its caption.

    Args:
        picture: Picture, [H, W, 3] or [H, W, 4].
        caption: Caption.
        note: Second line of the caption.
        lossy: Whether the picture is imagery.
        pixel_size: Size of a pixel and its unit, such as (0.3, "m"), for a scale bar.
    """
    height, width = picture.shape[:2]
    return Figure(
        uri=picture_uri(picture, lossy=lossy),
        width=width,
        height=height,
        caption=printable(caption),
        note=printable(note),
        scale=None if pixel_size is None else _scale_bar(width, *pixel_size),
        pixelated=not lossy or max(width, height) < _PIXELATED_PX,
    )


def _scale_bar(width: int, pixel_size: float, unit: str) -> tuple[float, str] | None:
    """A round length of about a quarter of a picture, in percent and in words."""
    whole = width * pixel_size
    if not 0 < whole < math.inf:
        return None
    power = 10 ** math.floor(math.log10(whole / 4))
    length = max(step * power for step in (1, 2, 5) if step * power <= whole / 4)
    value, name = length, unit
    for large, factor, larger in (("m", 1000, "km"), ("µm", 1000, "mm")):
        if unit == large and length >= factor:
            value, name = length / factor, larger
    return 100 * length / whole, f"{value:g} {name}"


@dataclass(frozen=True, kw_only=True)
class Row:
    """Pictures side by side.

    Attributes:
        figures: Pictures.
        title: Title.
        plots: Whether the pictures are plots, which are as wide as there is room.
        num_columns: Number of columns of a wide page; by default one for each picture.
    """

    kind: ClassVar[str] = "row"
    figures: Sequence[Figure]
    title: str = ""
    plots: bool = False
    num_columns: int | None = None

    @property
    def columns(self) -> int:
        """Number of columns of a wide page."""
        return self.num_columns or max(1, min(len(self.figures), 6))

    @classmethod
    def of_plots(cls, plot: Callable[[Path], Sequence[Path]], captions: Mapping[str, str]) -> Row:
        """Make a row of the plots of a function that writes them.

        Args:
            plot: Called with the path of the first plot, .svg; gives the paths of all.
            captions: Caption of each by what its name adds to that of the first.
        """
        # Text stays text, and the same plot gives the same bytes.
        with tempfile.TemporaryDirectory() as folder, matplotlib.rc_context(_SVG_OPTIONS):
            first = Path(folder, "plot.svg")
            plots = {path.stem.removeprefix(first.stem): path.read_bytes() for path in plot(first)}
        figures = [_plot_figure(content, captions.get(ending, ending.strip("_"))) for ending, content in plots.items()]
        return cls(figures=figures, plots=True)


_SVG_OPTIONS: Any = {"svg.fonttype": "none", "svg.hashsalt": "perf_vit"}


def _plot_figure(content: bytes, caption: str) -> Figure:
    # It has the time.
    content = re.sub(rb"<metadata>.*?</metadata>", b"", content, flags=re.DOTALL)
    size = re.search(rb'viewBox="0 0 ([\d.]+) ([\d.]+)"', content)
    width, height = (400.0, 300.0) if size is None else (float(size[1]), float(size[2]))
    uri = _data_uri("image/svg+xml", content)
    return Figure(uri=uri, width=round(width), height=round(height), caption=caption)


@dataclass(frozen=True, kw_only=True)
class TextTable:
    """A table whose first column has names.

    Attributes:
        columns: Names of the columns.
        rows: Texts.
        title: Title.
        colors: Colour of names of the first column, in CSS.
    """

    kind: ClassVar[str] = "table"
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    colors: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of_rich(cls, table: Any, colors: Mapping[str, str] | None = None) -> TextTable:
        """Return a table of rich, as it is printed."""
        columns = [[printable(str(cell)) for cell in column.cells] for column in table.columns]
        return cls(
            columns=[printable(str(column.header)) for column in table.columns],
            rows=list(zip(*columns, strict=True)),
            title=printable(str(table.title or "")),
            colors=colors or {},
        )


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings as text, behind their title."""

    kind: ClassVar[str] = "settings"
    title: str
    text: str
    open: bool = False

    @classmethod
    def of_values(cls, title: str, values: Mapping[str, Any]) -> Settings:
        """Return plain values, one a line; those of a mapping are indented."""
        lines = []
        for name, value in without_nan(dict(values)).items():
            inner = value if isinstance(value, dict) else {}
            lines.append(f"{name}:" if inner else f"{name}: {to_json(value)}")
            lines += [f"    {key}: {to_json(each)}" for key, each in inner.items()]
        return cls(title=title, text=printable_lines("\n".join(lines)))


def printable_lines(text: str) -> str:
    """Return a text of several lines without what can't be shown."""
    return "\n".join(map(printable, text.splitlines()))


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of a page.

    Attributes:
        title: Title.
        blocks: Rows of pictures, tables, settings and previews.
        text: What is to be seen.
        legend: Names and colours.
    """

    title: str
    blocks: Sequence[Any]
    text: str = ""
    legend: Sequence[tuple[str, str]] = ()

    @property
    def key(self) -> str:
        """Part of the ids of the section."""
        return re.sub(r"\W+", "_", self.title)


@dataclass(kw_only=True)
class Page:
    """A report.

    Attributes:
        title: Title.
        subtitle: What was done with what.
        numbers: Main results by name, as texts.
        sections: Parts; empty ones are left out.
        kind: What it is a page of, such as "predictions"; by it, a new page replaces only its own kind.
    """

    title: str
    subtitle: str = ""
    numbers: dict[str, str] = field(default_factory=dict)
    sections: list[Section] = field(default_factory=list)
    kind: str = "results"

    @property
    def footer(self) -> str:
        """Version; the time would make other bytes of the same results."""
        return f"perf_vit {__version__}"

    def add(self, title: str, *blocks: Any, text: str = "", legend: Sequence[tuple[str, str]] = ()) -> None:
        """Add a section of blocks; None stands for no block, and a section without blocks is left out."""
        found = [block for block in blocks if block is not None]
        if found:
            shown = [(printable(name), color) for name, color in legend]
            self.sections.append(Section(title=printable(title), blocks=found, text=printable(text), legend=shown))

    def html(self) -> str:
        """The page as text."""
        has_preview = any(block.kind == "preview" for section in self.sections for block in section.blocks)
        assets = {"style": _asset("page.css"), "viewer": _asset("viewer.js")}
        return _template().render(page=self, has_preview=has_preview, **assets)

    def write(self, path: str | Path) -> Path:
        """Write the page.

        Raises:
            OutputError: The path isn't writable.
        """
        # Bytes of file names that are no UTF-8 are surrogates.
        write_text(path, self.html().encode("utf-8", errors="backslashreplace").decode("utf-8"))
        return Path(path)


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["share"] = _share
    return environment.from_string(_asset("page.html"))


def _asset(name: str) -> str:
    return files("perf_vit.reporting").joinpath("templates", name).read_text(encoding="utf-8")


def _share(cell: str) -> float | None:
    """A score between 0 and 1 in percent, for its bar; None for other texts."""
    return round(100 * float(cell), 1) if re.fullmatch(r"[01]\.\d{3}", cell) and float(cell) <= 1 else None
