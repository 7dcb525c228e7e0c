"""`perf-vit convert`: from a softmax ViT to a folder with a linear one, and a report of what it kept."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from perf_vit.conversion import choose_layer_options, linearize, load_softmax, save_converted
from perf_vit.conversion.save import MODEL_FILES, check_output_folder, input_bands, staged_folder
from perf_vit.conversion.weights import create_with_weights, read_weights
from perf_vit.data import UnlabelledCrops
from perf_vit.errors import ConfigError, PerfVitError, reason_line
from perf_vit.sources import find_images
from perf_vit.transforms import Normalizer
from perf_vit.workflows.conversion_report import (
    MeasuredConversion,
    measure_conversion,
    print_conversion,
    write_conversion,
)
from perf_vit.workflows.progress import windows_progress, working
from perf_vit.writers import check_outputs

__all__ = ["ConversionRequest", "convert_model", "parse_layers"]

# Of all crops the first choose options and the last are for the report.
_NUM_CROPS, _OPTION_CROPS, _REPORT_CROPS = 12, 2, 4


@dataclass(frozen=True, kw_only=True)
class ConversionRequest:
    """What the command line asks for.

    Attributes:
        source: a timm model, or a folder with a saved one.
        out: folder for the converted model.
        weights: file with the weights of a timm model; timm's own pretrained ones if None.
        num_classes: of the weights; the model's own number if None.
        mixer: mixer, as in `linearize`.
        options: options of the mixer for all layers.
        layers: places of the layers to convert, None for all.
        img_size: side of the images in pixels; the model's own if None.
        images: files and folders with images to choose options by and to measure on.
        budget: times of plain FAVOR+ that the model may take; None leaves options as they are.
        seed: of projections and crops.
        overwrite: replace a model in `out`.
        time_softmax: time softmax however many tokens there are.
    """

    source: str
    out: Path
    weights: Path | None = None
    num_classes: int | None = None
    mixer: str = "clustered"
    options: dict[str, Any] = field(default_factory=dict)
    layers: tuple[int, ...] | None = None
    img_size: int | None = None
    images: tuple[Path, ...] = ()
    budget: float | None = None
    seed: int = 0
    overwrite: bool = False
    time_softmax: bool = False

    def __post_init__(self) -> None:
        if self.budget is not None and not self.images:
            raise ConfigError("--budget learns from images, got none; give --images FOLDER")
        if self.budget is not None and self.mixer != "clustered":
            raise ConfigError(f"--budget chooses options of --mixer clustered, got {self.mixer}; leave it out")


def convert_model(request: ConversionRequest) -> Path:
    """Convert a model, save it with `fidelity.html` beside its weights, print what it keeps and costs.

    Returns:
        The report.

    Raises:
        PerfVitError: an argument, input or output that doesn't fit; nothing is written then.
    """
    _check_files(request)
    check_output_folder(request.out, overwrite=request.overwrite)
    try:
        softmax = _softmax_model(request)
        crops = _crops(request, softmax)
        converted = _convert(request, softmax, crops)
        # A process that is killed while it measures leaves no folder without a report.
        with staged_folder(request.out, overwrite=request.overwrite) as staging:
            save_converted(converted, staging, overwrite=True)
            measured = _measure(request, softmax, converted, crops)
            report = write_conversion(
                measured, staging, home=request.out, title=request.source, images=_describe_images(request)
            )
    except PerfVitError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error
    print_conversion(measured)
    return request.out / report.name


def _measure(
    request: ConversionRequest, softmax: nn.Module, converted: nn.Module, crops: Sequence[Tensor]
) -> MeasuredConversion:
    with working("measuring") as on_step:
        return measure_conversion(
            softmax, converted, crops[-_REPORT_CROPS:], time_softmax=request.time_softmax, on_step=on_step
        )


def parse_layers(text: str | None) -> tuple[int, ...] | None:
    """Places as "0-5,8": 0 to 5 and 8; None for all.

    Raises:
        ConfigError: anything else.
    """
    if text is None:
        return None
    try:
        ranges = [[int(end) for end in part.split("-")] for part in text.split(",")]
        if any(len(ends) > 2 for ends in ranges):
            raise ValueError
    except ValueError as error:
        raise ConfigError(f"--layers must be places such as 0-5,8, got {text}") from error
    return tuple(sorted({index for ends in ranges for index in range(ends[0], ends[-1] + 1)}))


def _check_files(request: ConversionRequest) -> None:
    """Refuse to replace what is read.

    Raises:
        OutputError: a file of the converted model is one that the conversion reads.
    """
    source = Path(request.source)
    model = [path for path in source.iterdir() if path.is_file()] if source.is_dir() else []
    outputs = [request.out / name for name in MODEL_FILES if (request.out / name).exists()]
    check_outputs(outputs, [*model, request.weights, *request.images], overwrite=True)


def _convert(request: ConversionRequest, softmax: nn.Module, crops: Sequence[Tensor]) -> nn.Module:
    options, per_layer = dict(request.options), None
    if request.mixer == "performer":
        options = {"seed": request.seed, **options}
    if request.budget is not None:
        with windows_progress("trying options", unit="measurements") as on_step:
            per_layer = choose_layer_options(
                softmax, crops[:_OPTION_CROPS], request.budget, layers=request.layers, on_step=on_step, **options
            )
    return linearize(softmax, request.mixer, request.layers, per_layer, **options)


def _softmax_model(request: ConversionRequest) -> Any:
    kwargs = {"img_size": request.img_size, "num_classes": request.num_classes}
    kwargs = {name: value for name, value in kwargs.items() if value is not None}
    if Path(request.source).is_dir():
        if request.weights is not None:
            raise ConfigError(f"{request.source} is a folder with weights of its own; leave --weights out")
        return _checked(load_softmax(request.source, **kwargs).eval())
    _check_name(request.source)
    if request.weights is None:
        return _checked(_pretrained(request.source, kwargs))
    # The file's weights have neither the name nor the licence of those that timm would load.
    overlay: dict[str, Any] = {"tag": None, "license": None}
    if request.num_classes is not None:
        overlay["num_classes"] = request.num_classes
    weights = read_weights(request.weights)
    try:
        return _checked(create_with_weights(request.source, weights, request.weights, overlay, **kwargs).eval())
    except (TypeError, RuntimeError, AssertionError) as error:
        raise ConfigError(f"timm can't make {request.source} with {kwargs}: {reason_line(error)}") from error


def _pretrained(name: str, kwargs: dict[str, Any]) -> Any:
    try:
        with working(f"loading {name}"):
            return timm.create_model(name, pretrained=True, **kwargs).eval()
    # Each way of downloading has errors of its own.
    except Exception as error:
        raise ConfigError(
            f"timm can't load pretrained weights of {name}: {reason_line(error)}; give them by --weights FILE"
        ) from error


def _check_name(name: str) -> None:
    architecture = name.partition(".")[0]
    if timm.is_model(architecture):
        return
    if Path(name).suffix in {".safetensors", ".pth", ".pt", ".ckpt", ".bin"}:
        raise ConfigError(
            f"{name} is a weights file: name its model first, as in vit_small_patch14_dinov2 --weights {name}"
        )
    near = difflib.get_close_matches(architecture, timm.list_models(), n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else "see timm.list_models('vit_*')"
    raise ConfigError(f"timm has no model {name}, and there is no such folder; {hint}")


def _checked(model: Any) -> Any:
    """Refuse a model without patches, and a size that they don't divide; it would be cut silently."""
    patch_embed: Any = getattr(model, "patch_embed", None)
    if getattr(patch_embed, "img_size", None) is None:
        raise ConfigError(f"expected a vision transformer of square patches, got {type(model).__name__}")
    (height, _), (patch, _) = patch_embed.img_size, patch_embed.patch_size
    if height % patch:
        nearest = max(1, round(height / patch)) * patch
        raise ConfigError(f"--img-size must be a multiple of the patch size {patch}, got {height}; try {nearest}")
    return model


def _crops(request: ConversionRequest, model: Any) -> list[Tensor]:
    """Standardised crops, [C, S, S]: those to choose options by first, those for the report last."""
    size, cfg = model.patch_embed.img_size[0], model.pretrained_cfg
    if not request.images:
        in_chans = input_bands(model)
        return [_synthetic(in_chans, size, request.seed + place) for place in range(_REPORT_CROPS)]
    # timm's statistics are of values from 0 to 1, images have 0 to 255.
    normalizer = Normalizer(*(tuple(255 * value for value in cfg[name]) for name in ("mean", "std")))
    crops = UnlabelledCrops(
        find_images(request.images),
        normalizer,
        tile_px=size,
        length=_NUM_CROPS,
        seed=request.seed,
        symmetries=False,
    )
    return [crops[index][0] for index in range(len(crops))]


def _synthetic(in_chans: int, size: int, seed: int) -> Tensor:
    """Noise of all scales, [in_chans, size, size], as large in every octave."""
    generator = torch.Generator().manual_seed(seed)
    picture, side = torch.zeros(1, in_chans, size, size), 2
    while side < size:
        noise = torch.randn(1, in_chans, side, side, generator=generator)
        picture += F.interpolate(noise, size=(size, size), mode="bilinear")
        side *= 2
    return (picture / picture.std()).squeeze(0)


def _describe_images(request: ConversionRequest) -> str:
    if not request.images:
        return f"{_REPORT_CROPS} generated pictures, noise of all scales: give --images for figures that mean something"
    apart = "" if request.budget is None else ", others than those the conversion learned from"
    return f"{_REPORT_CROPS} crops of {', '.join(path.name for path in request.images)}{apart}"
