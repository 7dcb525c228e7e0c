"""Options of prediction: one dataclass a task, under the names of the command line, which travels whole."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import nn

from perf_vit.distributed import fast_dtype
from perf_vit.errors import OptionError, reason_line
from perf_vit.registry import did_you_mean
from perf_vit.tiling import BLENDS
from perf_vit.writers import category_names_path, is_ome_tiff_name

__all__ = [
    "ClassificationPredictOptions",
    "DetectionPredictOptions",
    "OnError",
    "OutputKind",
    "PolygonSuffix",
    "Precision",
    "PredictOptions",
    "SegmentationPredictOptions",
    "SlideClassificationPredictOptions",
    "TokenStorage",
    "WindowedPredictOptions",
    "checked_options",
    "move_to_device",
    "options_of",
    "own_device",
    "resolve_device",
]

Options = TypeVar("Options")

OnError = Literal["stop", "skip"]

OutputKind = Literal["classes", "probabilities", "probabilities-uint8"]

PolygonSuffix = Literal["gpkg", "geojson", "parquet", "json"]

Precision = Literal["32", "bf16", "16", "auto"]

TokenStorage = Literal["float32", "bfloat16", "float16", "memory"]

_DTYPES = {"32": torch.float32, "bf16": torch.bfloat16, "16": torch.float16}

_INPUT_OPTIONS = ("crs", "resolution", "mpp", "slide_mpp", "slide_mpp_override", "tissue")


@dataclass(frozen=True, kw_only=True)
class PredictOptions:
    """Options of every prediction.

    Attributes:
        batch_size: Windows or images in a forward pass.
        num_readers: Threads that read ahead; one per processor, at most 16, by default.
        device: "auto" for the accelerator that a given model is on, else a GPU if there is one; or "cpu", "cuda",
            "cuda:1", "mps".
        precision: "32", or "bf16" or "16" for autocast. "auto" becomes "bf16" on GPUs and CPUs with instructions for
            it, else "32", when the options are made.
        on_error: "stop" at pixels or inputs that can't be read, or "skip" them.
        resume: Go on with unfinished outputs; else begin again.
        report: Write a page with pictures of the result, .html, next to the output; of several maps or files of objects
            one for all, `report.html`.
        overwrite: Replace outputs that exist. Without it, outputs of the same model, inputs and settings are left as
            they are, and other files are refused.

    Raises:
        OptionError: An unknown value.
    """

    batch_size: int = 1
    num_readers: int | None = None
    device: str = "auto"
    precision: Precision = "32"
    on_error: OnError = "stop"
    resume: bool = True
    report: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        # In Python, 32 and torch.device("cpu") are usual.
        for name in ("device", "precision"):
            object.__setattr__(self, name, str(getattr(self, name)))
        _check_choice(self, "precision", get_args(Precision))
        if self.precision == "auto":
            # Whatever travels or is recorded holds the precision itself, so that another machine doesn't choose anew.
            is_fast = fast_dtype(resolve_device(self.device)) == torch.bfloat16
            object.__setattr__(self, "precision", "bf16" if is_fast else "32")
        _check_choice(self, "on_error", get_args(OnError))
        _check_positive(self, "batch_size")
        if self.num_readers is not None:
            _check_positive(self, "num_readers")

    def to_dict(self) -> dict[str, Any]:
        """Plain values of JSON."""
        return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(self).items()}

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of `precision`."""
        return _DTYPES[self.precision]

    @property
    def input_options(self) -> dict[str, Any]:
        """Options of `perf_vit.open` that come before those of the model."""
        names = {each.name for each in fields(self)}.intersection(_INPUT_OPTIONS)
        return {name: value for name in sorted(names) if (value := getattr(self, name)) is not None}


@dataclass(frozen=True, kw_only=True)
class WindowedPredictOptions(PredictOptions):
    """Options of predictions in overlapping windows.

    Attributes:
        window_size: Side of a window in pixels; the training tile's by default.
        overlap: Pixels that neighbouring windows share; a quarter of the window by default.
        crs: CRS to read rasters in; their own by default.
        resolution: Pixel size to read rasters at, in CRS units; that of the training by default.
        mpp: Micrometres per pixel to read slides at; those of the training by default.
        slide_mpp: Micrometres per pixel of a slide's level 0 where the file states none, or "objective" for 10 divided
            by the magnification of the objective.
        slide_mpp_override: Micrometres per pixel of a slide's level 0, whatever the file states.
        tissue: "auto", "otsu" or a file of outlines in QuPath's coordinates: the part of a slide that is read.
    """

    window_size: int | None = None
    overlap: int | None = None
    crs: str | None = None
    resolution: float | None = None
    mpp: float | None = None
    slide_mpp: float | Literal["objective"] | None = None
    slide_mpp_override: float | None = None
    tissue: str | None = None

    def windows(self, tile_px: int) -> tuple[int, int]:
        """The window size and the overlap for a model of a tile size.

        Raises:
            OptionError: A window without pixels, or an overlap that isn't below the window size.
        """
        size = tile_px if self.window_size is None else self.window_size
        if size < 1:
            raise OptionError(f"window_size must be at least 1, got {size}")
        overlap = size // 4 if self.overlap is None else self.overlap
        if not 0 <= overlap < size:
            raise OptionError(f"overlap must be below the window size {size}, got {overlap}")
        return size, overlap


@dataclass(frozen=True, kw_only=True)
class PolygonOptions(WindowedPredictOptions):
    """Options of predictions with outlines.

    Attributes:
        min_area: Smallest area of a polygon or object, in square metres of rasters with a CRS, square micrometres of
            slides with a known pixel size, else pixels.
        simplify: Largest displacement of an outline in metres, micrometres or pixels; 0 keeps all corners.
        quicklook: Write a picture next to the output, .png.
        style: Write class names and colours for QGIS next to the output.
    """

    min_area: float = 0.0
    simplify: float = 0.0
    quicklook: bool = False
    style: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("min_area", "simplify"):
            if not 0 <= (given := getattr(self, name)) < math.inf:
                raise OptionError(f"{name} must be 0 or more, got {given:g}")

    @property
    def tidying(self) -> dict[str, float]:
        """Arguments of `perf_vit.writers.tidy_polygons`."""
        return {"min_area": float(self.min_area), "simplify": float(self.simplify)}


@dataclass(frozen=True, kw_only=True)
class SegmentationPredictOptions(PolygonOptions):
    """Options of segmentation maps.

    Attributes:
        kind: "classes", one uint8 band of class indices with a colour table and nodata 255; "probabilities", one
            float32 band a class with nodata NaN; or "probabilities-uint8", in steps of 1/254 with nodata 255. Of a
            multi-label model, "classes" is a uint8 band of 0 and 1 a class.
        score_threshold: Probability from which a class of a multi-label model is true; 0.5 by default.
        blend: Weights of overlapping windows: "hann", "gaussian" or a registered one.
        flips: Average the scores of a window and its three mirror images.
        polygons: Write the areas of the classes next to the map, in the format of this suffix.
        whole: Predict the image in one forward pass, in which every token attends to the whole image, instead of in
            windows. The model must be a plain ViT with linear attention; it runs on the CPU.
        store: With `whole`, where tokens are: "float32", "bfloat16" or "float16" for a file of that dtype, or "memory".
        token_folder: With `whole`, folder of the tokens' file on a local disk; next to the output by default.
        keep_tokens: With `whole`, keep finished blocks after Ctrl-C, as after a crash, to go on there.
    """

    kind: OutputKind = "classes"
    score_threshold: float | None = None
    blend: str = "hann"
    flips: bool = False
    polygons: PolygonSuffix | None = None
    whole: bool = False
    store: TokenStorage = "float32"
    token_folder: str | Path | None = None
    keep_tokens: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_whole()
        for name in ("min_area", "simplify"):
            if getattr(self, name) and self.polygons is None:
                raise OptionError(f"{name} is of polygons; choose their format with `polygons`, or leave it out")
        _check_choice(self, "kind", get_args(OutputKind))
        _check_choice(self, "blend", tuple(BLENDS))
        if self.polygons is not None:
            _check_choice(self, "polygons", get_args(PolygonSuffix))
            if self.kind != "classes":
                choices = ", ".join(get_args(PolygonSuffix))
                raise OptionError(f"polygons must be one of {choices}, of kind classes, got kind {self.kind}")
        if self.score_threshold is not None and not 0 < self.score_threshold < 1:
            raise OptionError(f"score_threshold must lie between 0 and 1, got {self.score_threshold:g}")

    @property
    def token_dtype(self) -> torch.dtype:
        """Dtype of stored tokens."""
        dtype: torch.dtype = getattr(torch, "float32" if self.store == "memory" else self.store)
        return dtype

    def files_beside(self, out: Path) -> list[Path]:
        """Return the quicklook, report, polygons, style and names of classes of a map, as far as they are asked for."""
        suffixes = [*([".png"] if self.quicklook else []), *([".html"] if self.report else [])]
        suffixes += [f".{self.polygons}"] if self.polygons else []
        found = [out.with_suffix(suffix) for suffix in suffixes]
        if self.style and self.kind == "classes" and not is_ome_tiff_name(out):
            found += [out.with_suffix(".qml"), category_names_path(out)]
        return found

    def scoring(self, window_size: int, overlap: int) -> dict[str, Any]:
        """Plain values that decide the scores besides the model: those of windows, or of whole images.

        Args:
            window_size: Side of a window in pixels.
            overlap: Pixels that neighbouring windows share.
        """
        if self.whole:
            return {"whole": str(self.token_dtype).removeprefix("torch.")}
        return {"window_size": window_size, "overlap": overlap, "blend": self.blend, "flips": self.flips}

    def _check_whole(self) -> None:
        """Refuse options of windows with `whole`, and options of whole images without it."""
        _check_choice(self, "store", get_args(TokenStorage))
        defaults = {each.name: each.default for each in fields(self)}
        own, others = (
            ("store", "token_folder", "keep_tokens"),
            ("window_size", "overlap", "blend", "flips", "precision", "batch_size"),
        )
        for name in others if self.whole else own:
            if getattr(self, name) != defaults[name]:
                what = "is of windows, and `whole` has none" if self.whole else "is for `whole`"
                raise OptionError(f"{name} {what}; leave {'one of them' if self.whole else 'it'} out")
        if self.whole:
            if self.device not in ("auto", "cpu"):
                raise OptionError(f"device must be cpu with `whole`, got {self.device}; leave it out")
            object.__setattr__(self, "device", "cpu")


@dataclass(frozen=True, kw_only=True)
class DetectionPredictOptions(PolygonOptions):
    """Options of detection.

    Attributes:
        score_threshold: Lowest score of an object; the model's own by default.
        polygons: Format of the files of several inputs, as their suffix; by default "gpkg", or "geojson" for an input
            without CRS.
        coco_images: COCO file of labels; results go by its image ids and category ids.
    """

    score_threshold: float | None = None
    polygons: PolygonSuffix | None = None
    coco_images: str | Path | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.polygons is not None:
            _check_choice(self, "polygons", get_args(PolygonSuffix))
        if self.score_threshold is not None and not 0 <= self.score_threshold <= 1:
            raise OptionError(f"score_threshold must lie between 0 and 1, got {self.score_threshold:g}")
        if self.coco_images is not None and self.polygons not in (None, "json"):
            raise OptionError(f"coco_images is for COCO results, polygons json, got polygons {self.polygons}")

    @property
    def suffix(self) -> str | None:
        """Suffix of the files of several inputs, None where the CRS of an input decides."""
        if self.coco_images is not None:
            return ".json"
        return None if self.polygons is None else f".{self.polygons}"


@dataclass(frozen=True, kw_only=True)
class ClassificationPredictOptions(PredictOptions):
    """Options of image classification and regression."""


@dataclass(frozen=True, kw_only=True)
class SlideClassificationPredictOptions(PredictOptions):
    """Options of slide classification.

    Attributes:
        slide_mpp: Micrometres per pixel of a slide's level 0 where the file states none, or "objective" for 10 divided
            by the magnification of the objective.
        slide_mpp_override: Micrometres per pixel of a slide's level 0, whatever the file states.
        tissue: "auto", "otsu" or a file of outlines in QuPath's coordinates: the part of a slide that is read.
    """

    slide_mpp: float | Literal["objective"] | None = None
    slide_mpp_override: float | None = None
    tissue: str | None = None


def _check_choice(options: PredictOptions, name: str, choices: tuple[str, ...]) -> None:
    if (given := getattr(options, name)) not in choices:
        raise OptionError(f"{name} must be one of {', '.join(choices)}, got {given}")


def _check_positive(options: PredictOptions, name: str) -> None:
    if (given := getattr(options, name)) < 1:
        raise OptionError(f"{name} must be at least 1, got {given}")


def resolve_device(device: str) -> str:
    """A GPU if there is one instead of "auto"; others as they are.

    Raises:
        OptionError: There is no device of this kind.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.device(device)
    except RuntimeError as error:
        raise OptionError(f"device {device}: {reason_line(error)}") from error
    return device


def move_to_device(model: nn.Module, device: str) -> str:
    """Move a model to a device; return the device's name.

    On GPUs, weights of convolutions are laid out channels-last, as tiles are (`perf_vit.inference.prefetch.to_device`).

    Args:
        model: Model to move.
        device: Name, or "auto" for a GPU if there is one.

    Raises:
        OptionError: There is no such device.
    """
    device = resolve_device(device)
    try:
        model.to(device)
        if torch.device(device).type == "cuda":
            model.to(memory_format=torch.channels_last)
    except (RuntimeError, AssertionError) as error:
        raise OptionError(f"device {device}: {reason_line(error)}") from error
    return device


def own_device(model: nn.Module) -> torch.device | None:
    """Return the device of all weights of a model, None if they are on several or there are none."""
    devices = {each.device for values in (model.parameters(), model.buffers()) for each in values}
    return devices.pop() if len(devices) == 1 else None


def options_of(
    kind: type[Options], given: Mapping[str, Any], label: str, others: Iterable[tuple[str, type[Any]]]
) -> Options:
    """Options of the prediction or evaluation of a task.

    Args:
        kind: Their dataclass.
        given: Options by name.
        label: What messages call the task's model, such as "a segmentation model".
        others: Label and dataclass of every task.

    Raises:
        OptionError: The task has no such option, or it takes no such value.
    """
    for name in sorted(given.keys() - _names(kind)):
        having = [other for other, options in others if name in _names(options)]
        if having:
            raise OptionError(f"{name} is not for {label}, but for {' and '.join(having)}; leave it out")
    return checked_options(kind, given)


def checked_options(kind: type[Options], given: Mapping[str, Any]) -> Options:
    """Options as their dataclass.

    Raises:
        OptionError: There is no such option, or it takes no such value.
    """
    known = _names(kind)
    for name in sorted(given.keys() - known):
        otherwise = f"; expected one of {', '.join(sorted(known))}"
        raise OptionError(f"{name} is no option here{did_you_mean(name, known, otherwise)}")
    return kind(**given)


def _names(kind: type[Any]) -> set[str]:
    """Names of the options of a dataclass."""
    return {each.name for each in fields(kind)}
