"""Description of a file, and the work that a model would have with it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from rich.table import Table

from perf_vit.sources import SourceInfo, describe_source, open_source
from perf_vit.text import number_text
from perf_vit.workflows.info.files import FileDescription, describe_file
from perf_vit.workflows.info.workload import Workload, estimate_workload
from perf_vit.workflows.progress import two_columns

__all__ = ["Description", "describe"]


@dataclass(frozen=True, kw_only=True)
class Description:
    """Description of a raster or slide, and of the work that a model would have with it.

    Attributes:
        source: Size, bands, place and format.
        workload: Windows and time of a model, None without one.
    """

    source: SourceInfo
    workload: Workload | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values of JSON."""
        return {**asdict(self.source), "workload": None if self.workload is None else asdict(self.workload)}

    def table(self) -> Table:
        """All facts for people."""
        return two_columns(_facts(self.source) + ([] if self.workload is None else _work(self.workload)))


def describe(
    path: str,
    *,
    model: str | None = None,
    window_size: int | None = None,
    mpp: float | None = None,
    slide_mpp: float | Literal["objective"] | None = None,
    slide_mpp_override: float | None = None,
) -> Description | FileDescription:
    """Describe a raster or slide and, if a model is given, the time that it would take; or see `describe_file`.

    Args:
        path: Path or URL.
        model: Run folder or checkpoint of a segmentation model, or a timm name; see `estimate_workload`.
        window_size: Size of the model's windows in pixels.
        mpp: Micrometres per pixel to read a slide at.
        slide_mpp: Micrometres per pixel of a slide's level 0 where the file states none, or "objective".
        slide_mpp_override: Micrometres per pixel of a slide's level 0, whatever the file states.

    Raises:
        InputError: The file can't be opened.
        PerfVitError: The model can't be loaded or doesn't fit.
    """
    given = (model, window_size, mpp, slide_mpp, slide_mpp_override)
    if all(each is None for each in given) and (file := describe_file(path)) is not None:
        return file
    with open_source(path, mpp=mpp, slide_mpp=slide_mpp, slide_mpp_override=slide_mpp_override) as source:
        work = None if model is None else estimate_workload(source, model, window_size)
        return Description(source=describe_source(source), workload=work)


def _facts(info: SourceInfo) -> list[tuple[str, str]]:
    names = ", ".join(info.band_names[:12]) + (", ..." if len(info.band_names) > 12 else "")
    resolution = None if info.resolution_xy is None else "{:.8g} x {:.8g}".format(*info.resolution_xy)
    facts: list[tuple[str, str | None]] = [
        ("format", " ".join(filter(None, (info.kind, info.format and f"({info.format})")))),
        ("size", f"{info.height:,} rows x {info.width:,} columns"),
        ("EXIF", f"orientation {info.orientation}, applied" if info.orientation > 1 else None),
        ("bands", f"{len(info.band_names)} x {info.dtype}: {names}"),
        ("palette", f"{info.num_colors} colours" if info.num_colors else None),
        ("nodata", "none" if info.nodata is None else number_text(info.nodata)),
        ("mask", info.mask),
        ("CRS", info.crs or ("none" if info.kind == "raster" else None)),
        ("resolution", resolution and f"{resolution} {info.units or ''}"),
        ("bounds", info.bounds_crs and "x {0:.8g} to {2:.8g}, y {1:.8g} to {3:.8g}".format(*info.bounds_crs)),
        (
            "bounds",
            info.bounds_level0_px
            and "x {0:,} to {2:,}, y {1:,} to {3:,} of level 0, which QuPath shows".format(*info.bounds_level0_px),
        ),
        ("mpp", f"{info.mpp:.4g} um" if info.mpp else ("unknown: give slide_mpp" if info.kind == "slide" else None)),
        ("levels", ", ".join(f"{height:,} x {width:,}" for height, width in info.levels)),
        ("blocks", info.block_px and f"{info.block_px[0]} x {info.block_px[1]}, {info.compression or 'uncompressed'}"),
        ("file", None if info.file_bytes is None else f"{info.file_bytes / 2**20:,.1f} MiB"),
        (
            "seam_disagreement",
            None
            if info.seam_disagreement is None
            else f"{info.seam_disagreement:.4f} of the pixels under several windows",
        ),
    ]
    return [(name, value) for name, value in facts if value]


def _work(work: Workload) -> list[tuple[str, str]]:
    return [
        ("model", work.model),
        ("tokens", f"{work.num_tokens:,} patches of {work.patch_px} px"),
        *([] if work.max_exact_px is None else [("attention", _attention(work))]),
        ("windows", f"{work.num_windows:,} of {work.window_size} px, overlapping by {work.overlap} px"),
        ("time", f"{_duration(work.seconds)}, {work.seconds_per_window:.3g} s a window, measured on {work.device}"),
    ]


def _attention(work: Workload) -> str:
    exact = work.max_exact_px
    if work.native_px is not None:
        return f"exact in windows of up to {exact:,} px; in larger ones most or all layers see {work.native_px:,} px"
    left = f" except in {work.num_softmax_layers} layers of softmax attention" if work.num_softmax_layers else ""
    return (
        f"exact in windows of up to {exact:,} px, linear in larger ones{left}"
        if exact
        else f"linear at every size{left}"
    )


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
