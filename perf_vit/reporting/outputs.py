"""Reports of predictions: maps, objects, tables, and runs of many inputs."""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import shapely
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Plot
from PIL import Image

from perf_vit.errors import InputError
from perf_vit.geometry import Objects
from perf_vit.plotting import colorize, default_colormap, save_figure
from perf_vit.plotting.colors import shown_classes, shown_index, true_classes
from perf_vit.plotting.pictures import Picture, figure_name, has_tissue, tissue_picture
from perf_vit.reporting.page import Page, Row, Settings, TextTable, figure_of, hex_color
from perf_vit.reporting.preview import Preview, picture_layer, pixel_size, read_picture, shape_layer
from perf_vit.reporting.samples import Sample, class_legend, imagery, sample_rows
from perf_vit.sources import open_map
from perf_vit.sources.base import has_place
from perf_vit.sources.pixel_size import pixel_area_grid, pixel_areas, polygon_areas
from perf_vit.types import IGNORE_INDEX, GeoImage, LabelArray, Source

__all__ = [
    "NAMES_SEPARATOR",
    "is_map_report",
    "is_run_report",
    "run_page",
    "thumbnail_of",
    "write_map_report",
    "write_object_report",
    "write_run_report",
    "write_table_report",
]

NAMES_SEPARATOR = ";"
"""Between the classes of an image in the column `predictions` of a table."""

# More lines would take a browser seconds.
_MAX_SHAPES = 20_000

_MAX_THUMBNAILS = 24

_MAX_NAMES = 8

_TISSUE_PX = 960

_UNITS = {"m2": "m²", "um2": "µm²", "px": "px"}


_RUN = "predictions"
"""Kind of the page of a run of many inputs."""

_MAP = "map"
"""Kind of the page of a map."""


def run_page(folder: Path) -> Path:
    """Return the path of the page of a run: `report.html`, or `predictions.html` next to a page of training."""
    path = folder / "report.html"
    return folder / "predictions.html" if _kind_of(path) not in (None, _RUN) else path


def is_run_report(path: Path) -> bool:
    """Return whether a file is the page of a run, which that of a new run may replace."""
    return _kind_of(path) == _RUN


def is_map_report(path: Path) -> bool:
    """Return whether a file is the page of a map."""
    return _kind_of(path) == _MAP


def _kind_of(path: Path) -> str | None:
    """Kind of a page of perf_vit, None of any other file."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            found = re.search('<meta name="perf_vit-page" content="([^"]*)">', file.read(1024))
    except OSError:
        return None
    return None if found is None else found[1]


def write_map_report(
    path: Path,
    source: Source,
    map_path: Path,
    classes: Sequence[str],
    *,
    background: int | None = None,
    multilabel: bool = False,
    scale: float = 1.0,
    seam_disagreement: float | None = None,
    settings: Mapping[str, Any],
) -> None:
    """Write a page with a zoomable map over its scene, the area of each class, and the tissue of a slide.

    Args:
        path: Output file.
        source: Scene of the map.
        map_path: Map with one band of class indices, or one band per class.
        classes: Class names.
        background: Index of the background class, which is transparent over the scene; None for none.
        multilabel: Whether the map has a band per class that may be true or not.
        scale: Factor from pixels of such a map to probabilities.
        seam_disagreement: Share of the pixels under several windows on which these disagree; None for no overlap.
        settings: Plain values to show.

    Raises:
        InputError: The scene or the map can't be read.
        OutputError: The page can't be written.
    """
    names = ["none", *classes] if multilabel else list(classes)
    clear = 0 if multilabel else background
    colors = default_colormap(len(names), clear)
    blocks: list[npt.NDArray[np.float64]] = []
    with open_map(map_path) as result:
        is_placed = has_place(result)

        def draw(image: GeoImage) -> Picture:
            shown = shown_classes(image, multilabel=multilabel, scale=scale)
            placed = image if is_placed else replace(image, crs=None)
            blocks.append(_class_areas(placed, shown, len(names), scale if multilabel else None))
            return shown[..., None].repeat(3, axis=-1)

        labels = read_picture(result, draw)[..., 0]
    over = {**colors, **({} if clear is None else {clear: (0, 0, 0, 0)})}
    in_legend = {index: colors[int(shown_index(index))] for index in range(len(names))}
    page = Page(title=Path(source.path).name, subtitle=f"Map of {_listed(classes)}: {map_path}", kind=_MAP)
    seen = _seen(source)
    layers = [] if seen is None else [picture_layer("image", seen)]
    layers.append(picture_layer("map", colorize(labels, over if layers else colors), opacity=0.6 if layers else 1.0))
    page.numbers = {"size": f"{source.width:,} x {source.height:,} px", "pixel": _length(source)}
    if seam_disagreement is not None:
        page.numbers["seam_disagreement"] = f"{seam_disagreement:.4f}"
    page.add(
        "Map",
        Preview(size=source.size, layers=layers, pixel_size=pixel_size(source)),
        text="Drag to move, scroll to zoom.",
        legend=class_legend(names, in_legend),
    )
    of_names = {name: hex_color(in_legend[index]) for index, name in enumerate(names)}
    page.add("Classes", _areas(sum(blocks), names, source, of_names, is_placed=is_placed))
    _add_tissue(page, source)
    page.add("Settings", Settings.of_values("Model and options", settings))
    page.write(path)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
    return ", ".join(names[:_MAX_NAMES]) + more


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _seen(source: Source) -> Picture | None:
    """The scene, None where pixels are damaged."""
    try:
        return read_picture(source, imagery(source))
    except InputError:
        return None


def _add_tissue(page: Page, source: Source) -> None:
    """Show the tissue of a slide that is read with it, unless pixels are damaged."""
    if has_tissue(source):
        with suppress(InputError):
            page.add("Tissue", Row(figures=[figure_of(tissue_picture(source, _TISSUE_PX), "outline of the tissue")]))


def _length(source: Source) -> str:
    size, unit = pixel_size(source)
    return f"{size:.4g} {unit}"


def _class_areas(image: GeoImage, shown: LabelArray, num: int, scale: float | None) -> npt.NDArray[np.float64]:
    """Area of each class, of valid pixels and of all; with the scale of a multi-label map, classes overlap."""
    each, _ = pixel_area_grid(image)
    if scale is None and num > IGNORE_INDEX:
        # Classes share colours.
        shown = np.where(image.valid, np.nan_to_num(image.pixels, nan=-1).argmax(0), num)
    areas = np.bincount(shown.ravel(), each.ravel(), minlength=max(256, num))[:num]
    if scale is not None:
        areas[1:] = (true_classes(image, scale) * each).sum((1, 2))
    return np.array([*areas, each[image.valid].sum(), each.sum()])


def _areas(
    found: Any, names: Sequence[str], source: Source, colors: Mapping[str, str], *, is_placed: bool
) -> TextTable:
    """Share and area of each class, by `_class_areas` of the reduced map, in square metres if the map has a place."""
    *areas, valid, every = found.tolist()
    middle, unit = pixel_areas(source, np.array([[source.width / 2, source.height / 2]]))
    # Pixels of photos and slides are all alike; those of the reduced map may have no size.
    scale = 1.0 if unit == "m2" and is_placed else float(middle[0]) * source.width * source.height / every
    order = sorted(range(len(names)), key=lambda i: -areas[i])
    rows = [[names[i], f"{areas[i] / valid if valid else 0:.3f}", _number(areas[i] * scale)] for i in order]
    return TextTable(columns=["class", "share", f"area, {_UNITS[unit]}"], rows=rows, colors=colors)


def write_object_report(
    path: Path, source: Source, objects: Objects, classes: Sequence[str], *, settings: Mapping[str, Any]
) -> None:
    """Write a page with the objects over their zoomable scene, and numbers, scores and areas of each class.

    Args:
        path: Output file.
        source: Scene of the objects.
        objects: Objects in pixels of the source.
        classes: Class names.
        settings: Plain values to show.

    Raises:
        OutputError: The page can't be written.
    """
    colors = default_colormap(len(classes))
    polygons, labels = objects.polygons(), objects.labels.tolist()
    drawn = list(zip(polygons, labels, strict=True))[:_MAX_SHAPES]
    shapes = [
        (hex_color(colors[label]), shapely.get_coordinates(ring).ravel().tolist())
        for polygon, label in reversed(drawn)
        for ring in shapely.get_rings(polygon)
    ]
    seen = _seen(source)
    layers = [*([] if seen is None else [picture_layer("image", seen)]), shape_layer("objects", shapes)]
    left_out = len(objects) - len(drawn)
    page = Page(title=Path(source.path).name, subtitle=f"Objects of {_listed(classes)}")
    page.numbers = {"objects": f"{len(objects):,}", "size": f"{source.width:,} x {source.height:,} px"}
    page.add(
        "Objects",
        Preview(size=source.size, layers=layers, pixel_size=pixel_size(source)),
        text="Drag to move, scroll to zoom."
        + (f" The {left_out:,} objects of lowest score are left out." if left_out else ""),
        legend=class_legend(classes, colors),
    )
    table = _object_table(objects, polygons, classes, source, {n: hex_color(colors[i]) for i, n in enumerate(classes)})
    plots = (
        Row.of_plots(lambda first: _score_plot(objects, classes, first), {"": "objects by score"}) if labels else None
    )
    page.add("Classes", table, plots)
    _add_tissue(page, source)
    page.add("Settings", Settings.of_values("Model and options", settings))
    page.write(path)


def _object_table(
    objects: Objects, polygons: Any, classes: Sequence[str], source: Source, colors: Mapping[str, str]
) -> TextTable:
    areas, unit = polygon_areas(source, polygons)
    rows = []
    for index, name in enumerate(classes):
        own = objects.labels == index
        if own.any():
            middle = [f"{objects.scores[own].mean():.3f}", _number(np.median(areas[own])), _number(areas[own].sum())]
        else:
            middle = ["-", "-", "-"]
        rows.append([name, f"{int(own.sum()):,}", *middle])
    columns = ["class", "objects", "mean score", f"median area, {_UNITS[unit]}", f"sum of areas, {_UNITS[unit]}"]
    return TextTable(columns=columns, rows=rows, colors=colors)


def _score_plot(objects: Objects, classes: Sequence[str], path: Path) -> list[Path]:
    figure = Plot(figsize=(5, 3), layout="constrained")
    FigureCanvasAgg(figure)
    axes, colors = figure.subplots(), default_colormap(len(classes))
    present = [index for index in range(len(classes)) if (objects.labels == index).any()]
    axes.hist(
        [objects.scores[objects.labels == index] for index in present],
        bins=20,
        range=(0, 1),
        stacked=True,
        color=[hex_color(colors[index]) for index in present],
        label=[figure_name(classes[index]) for index in present],
    )
    axes.set(xlabel="score", ylabel="objects")
    save_figure(path, figure)
    return [path]


def write_table_report(
    path: Path,
    table: Path,
    pictures: Callable[[str], Callable[[], dict[str, Picture]]],
    *,
    columns: Sequence[str],
    column: str | None,
    settings: Mapping[str, Any],
) -> None:
    """Write a page with some inputs of a table as pictures, and how often each class was predicted.

    Args:
        path: Output file.
        table: Table of a prediction, .csv, with the path of each input in the first column.
        pictures: Gives the function that draws the picture of an input.
        columns: Columns of every table of the model; a further one has the errors.
        column: Column with the predicted class; None for numbers.
        settings: Plain values to show.

    Raises:
        OutputError: The page can't be written.
    """
    with table.open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))[1:]
    # By places, not by names: a class may be called as any column is.
    fine = [row for row in rows if any(row[1:]) and not any(row[len(columns) :])]
    place = None if column is None else columns.index(column)
    page = Page(title=table.stem, subtitle=f"{len(fine):,} of {len(rows):,} inputs: {table.name}")
    if place is not None:
        counts = Counter(name for row in fine for name in _names(row[place], column))
        lines = [[name, f"{num:,}", f"{num / max(1, len(fine)):.3f}"] for name, num in counts.most_common()]
        page.add("Predictions", TextTable(columns=["class", "inputs", "share"], rows=lines))
    chosen = _spread(fine, _MAX_THUMBNAILS)
    samples = [Sample(title=_row_title(row, columns, place), draw=pictures(row[0])) for row in chosen]
    text = f"{len(samples)} of {len(fine):,}, evenly spaced."
    page.add("Inputs", *sample_rows(samples), text=text)
    page.add("Settings", Settings.of_values("Model and options", settings))
    page.write(path)


def _spread(items: Sequence[Any], num: int) -> list[Any]:
    """At most `num` items, evenly spaced."""
    return [items[i] for i in np.unique(np.linspace(0, len(items) - 1, num).round().astype(int))] if items else []


def _names(text: str, column: str | None) -> list[str]:
    """Names of the predicted classes of an input: one, or any number in the column `predictions`."""
    if not text:
        return ["none"]
    return text.split(NAMES_SEPARATOR) if column == "predictions" else [text]


def _row_title(row: Sequence[str], columns: Sequence[str], place: int | None) -> str:
    name, values = Path(row[0]).name, list(zip(columns, row, strict=False))
    if place is None:
        return f"{name}: " + ", ".join(f"{key} {value}" for key, value in values[1:])
    # Of equal names the first one, which is the class.
    names, scores = _names(row[place], columns[place]), dict(reversed(values[place + 1 :]))
    found = ", ".join(names)
    return f"{name}: {found}" + (f", {float(scores[found]):.2f}" if scores.get(found) else "")


def write_run_report(path: Path, report: Mapping[str, Any], pictures: Sequence[tuple[str, Path]]) -> None:
    """Write a page of a run of many inputs: what became of each, and some outputs as pictures.

    Args:
        path: Output file.
        report: Plain values of `RunReport.to_dict`.
        pictures: Caption and path of pictures to choose from.

    Raises:
        OutputError: The page can't be written.
    """
    totals = report["totals"]
    page = Page(title=f"{totals['inputs']:,} inputs", subtitle=str(path.parent), kind=_RUN)
    page.numbers = {name: f"{totals[name]:,}" for name in ("done", "skipped-existing", "failed", "busy")}
    page.numbers["seconds"] = f"{totals['seconds']:,.1f}"
    there = [(caption, file) for caption, file in pictures if file.is_file()]
    chosen = _spread(there, 12)
    figures = [figure_of(thumbnail_of(file), caption) for caption, file in chosen]
    text = f"{len(figures)} of {len(there):,}, evenly spaced."
    page.add("Outputs", Row(figures=figures, num_columns=2) if figures else None, text=text)
    names = {"input": "input", "status": "status", "seconds": "seconds", "num_windows": "windows"}
    if any("seam_disagreement" in each for each in report["inputs"]):
        names["seam_disagreement"] = "seam_disagreement"
    names["error"] = "error"
    listed = [[_cell(each.get(name)) for name in names] for each in report["inputs"][:1000]]
    page.add("Inputs", TextTable(columns=list(names.values()), rows=listed))
    values = {name: value for name, value in report.items() if name not in ("totals", "inputs")}
    page.add("Settings", Settings.of_values("Model and options", values))
    page.write(path)


def _cell(value: Any) -> str:
    return "" if value is None else str(value)


def thumbnail_of(path: Path) -> Picture:
    """Return a picture on disk, at most 960 px wide and high."""
    with Image.open(path) as image:
        image.thumbnail((960, 960))
        return np.asarray(image.convert("RGB"))
