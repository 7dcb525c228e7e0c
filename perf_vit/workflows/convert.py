"""Conversion: from a softmax ViT to a folder with a linear one, and a report of what it kept."""

from __future__ import annotations

import copy
import difflib
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from perf_vit.errors import ConfigError, InputError, OptionError, PerfVitError, extra, reason_line

with extra("geo", "convert"):
    from perf_vit.conversion import choose_layer_options, linearize, load_softmax, measure_crossover, save_converted
    from perf_vit.conversion.save import MODEL_FILES, check_output_folder, input_bands, staged_folder
    from perf_vit.conversion.weights import create_with_weights, is_model, read_weights
    from perf_vit.inference.options import checked_options
    from perf_vit.models import UnlabelledCrops
    from perf_vit.sources import find_images
    from perf_vit.transforms import Normalizer
    from perf_vit.workflows.conversion_report import (
        ConversionReport,
        MeasuredConversion,
        measure_conversion,
        write_conversion,
    )
    from perf_vit.workflows.progress import progress_shown, windows_progress, working
    from perf_vit.writers import check_outputs

__all__ = ["ConvertOptions", "convert"]

# Of all crops the first choose options and the last are for the report.
_NUM_CROPS, _OPTION_CROPS, _REPORT_CROPS = 12, 2, 4


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """Options of `convert`.

    Attributes:
        weights: File with the weights of a timm model; timm's own pretrained ones by default.
        num_classes: Classes of the weights, 0 for none; the model's own number by default.
        mixer: Mixer, as in `perf_vit.linearize`.
        window_size: Largest side of a window in patches (clustered).
        num_sinks: Keys that all queries see exactly (clustered).
        num_clusters: Clusters of all other keys (clustered).
        max_exact_tokens: Largest number of patches of an image with softmax attention, 0 for none, "auto" for the
            number up to which it is not slower here (clustered).
        num_features: Random features (performer).
        layers: Indices of the layers to convert, or one of them, or text such as "0-5,8"; all by default. With
            `native_size`, layers that see the whole image; none by default.
        native_size: Rows and columns of patches of the pretraining, for larger images: other layers see windows of this
            size, and positions repeat.
        img_size: Side of the images in pixels; the model's own by default.
        images: Files and folders with images to choose options by and to measure on, or one of them.
        budget: Times of plain FAVOR+ that the model may take; options of each layer are chosen then.
        seed: Seed of projections and crops.
        overwrite: Replace a model in the folder.
        time_softmax: Time softmax however many tokens there are.
    """

    weights: str | Path | None = None
    num_classes: int | None = None
    mixer: str = "clustered"
    window_size: int | None = None
    num_sinks: int | None = None
    num_clusters: int | None = None
    max_exact_tokens: int | str | None = None
    num_features: int | None = None
    layers: str | int | Iterable[int] | None = None
    native_size: int | None = None
    img_size: int | None = None
    images: str | Path | Iterable[str | Path] = ()
    budget: float | None = None
    seed: int = 0
    overwrite: bool = False
    time_softmax: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "images", _as_paths(self.images))
        object.__setattr__(self, "layers", _parse_layers(self.layers))
        if self.layers == () and self.native_size is None:
            raise OptionError("layers names none, so nothing would be converted; name some, or give `native_size`")
        if self.budget is not None and not self.images:
            raise OptionError("budget learns from images, got none; give `images`")
        if self.budget is not None and self.mixer != "clustered":
            raise OptionError(f"budget chooses options of `mixer=clustered`, got {self.mixer}; leave it out")
        if self.budget is not None and self.native_size is not None:
            raise OptionError("budget chooses options of all layers, native_size those of most; leave one of them out")
        _parse_limit(self.max_exact_tokens)

    @property
    def image_paths(self) -> tuple[Path, ...]:
        """Files and folders with images."""
        return _as_paths(self.images)

    @property
    def layer_indices(self) -> tuple[int, ...] | None:
        """Indices of the layers to convert, None for all."""
        return _parse_layers(self.layers)

    @property
    def mixer_options(self) -> dict[str, Any]:
        """Options of the mixer for all layers."""
        names = ("window_size", "num_sinks", "num_clusters", "num_features")
        values = {name: getattr(self, name) for name in names}
        values["max_exact_tokens"] = _parse_limit(self.max_exact_tokens)
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class _Request:
    """A conversion that was asked for: what of, where to, and how."""

    source: str | nn.Module
    out: Path
    options: ConvertOptions

    @property
    def title(self) -> str:
        return type(self.source).__name__ if isinstance(self.source, nn.Module) else self.source


def convert(
    model: str | Path | nn.Module, out: str | Path, *, progress: bool = True, **options: Any
) -> ConversionReport:
    """Make the attention of a pretrained ViT linear, save it, and measure what it keeps and costs.

    Args:
        model: timm name, a folder with a saved model, or a timm model itself.
        out: Folder for `model.safetensors`, `config.json` and `fidelity.html`.
        progress: Show progress bars.
        **options: Fields of `ConvertOptions`.

    Returns:
        What was measured.

    Raises:
        PerfVitError: An argument, input or output doesn't fit; nothing is written then.
    """
    source = model if isinstance(model, nn.Module) else str(model)
    request = _Request(source=source, out=Path(out), options=checked_options(ConvertOptions, options))
    with progress_shown(progress):
        return _convert_and_measure(request)


def _convert_and_measure(request: _Request) -> ConversionReport:
    options = request.options
    _check_files(request)
    check_output_folder(request.out, overwrite=options.overwrite)
    try:
        softmax = _softmax_model(request)
        crops = _crops(request, softmax, softmax.patch_embed.img_size[0])
        converted = _convert(request, softmax, crops)
        # A process that is killed while it measures leaves no folder without a report.
        with staged_folder(request.out, overwrite=options.overwrite) as staging:
            save_converted(converted, staging, overwrite=True)
            measured = _measure(request, softmax, converted)
            report = write_conversion(
                measured, staging, home=request.out, title=request.title, images=_describe_images(request)
            )
    except PerfVitError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return ConversionReport(folder=request.out, path=request.out / report.name, measured=measured)


def _measure(request: _Request, softmax: nn.Module, converted: nn.Module) -> MeasuredConversion:
    with working("measuring") as on_step:
        return measure_conversion(
            softmax,
            converted,
            lambda size: _report_crops(request, softmax, size),
            time_softmax=request.options.time_softmax,
            on_step=on_step,
        )


def _as_paths(images: Any) -> tuple[Path, ...]:
    """Paths, given as one or several.

    Raises:
        OptionError: Anything else.
    """
    try:
        return (Path(images),) if isinstance(images, str | Path) else tuple(map(Path, images))
    except TypeError as error:
        raise OptionError(f"images must be paths of files and folders, got {images!r}") from error


def _parse_layers(layers: Any) -> tuple[int, ...] | None:
    """Indices of layers, given as such, as one or as "0-5,8": 0 to 5 and 8; "none" for none, None for the default.

    Raises:
        OptionError: Anything else.
    """
    if layers is None or layers == "none":
        return None if layers is None else ()
    try:
        if not isinstance(layers, str):
            several = layers if isinstance(layers, Iterable) else (layers,)
            return tuple(sorted({operator.index(each) for each in several}))
        ranges = [[int(end) for end in part.split("-")] for part in layers.split(",")]
        if any(len(ends) > 2 for ends in ranges):
            raise ValueError
    except (TypeError, ValueError) as error:
        raise OptionError(f"layers must be indices such as 0-5,8, got {layers}") from error
    return tuple(sorted({index for ends in ranges for index in range(ends[0], ends[-1] + 1)}))


def _parse_limit(limit: int | str | None) -> int | str | None:
    """Return a number of tokens, given as such or as text, or "auto".

    Raises:
        OptionError: Anything else.
    """
    if limit is None or limit == "auto":
        return limit
    try:
        return int(limit) if isinstance(limit, str) else operator.index(limit)
    except (TypeError, ValueError) as error:
        raise OptionError(f"max_exact_tokens must be a whole number of tokens or auto, got {limit}") from error


def _check_files(request: _Request) -> None:
    """Refuse to replace what is read.

    Raises:
        OutputError: a file of the converted model is one that the conversion reads.
    """
    source = None if isinstance(request.source, nn.Module) else Path(request.source)
    model = [path for path in source.iterdir() if path.is_file()] if source is not None and source.is_dir() else []
    outputs = [request.out / name for name in MODEL_FILES if (request.out / name).exists()]
    check_outputs(outputs, [*model, request.options.weights, *request.options.image_paths], overwrite=True)


def _convert(request: _Request, softmax: nn.Module, crops: Sequence[Tensor]) -> nn.Module:
    options, per_layer = request.options.mixer_options, None
    if request.options.mixer == "performer":
        options = {"seed": request.options.seed, **options}
    if request.options.mixer == "clustered" and options.get("max_exact_tokens") == "auto":
        del options["max_exact_tokens"]
        with working("timing attention"):
            options["max_exact_tokens"] = measure_crossover(softmax, **options)
    if request.options.budget is not None:
        with windows_progress("trying options", unit="measurements") as on_step:
            per_layer = choose_layer_options(
                softmax,
                crops[:_OPTION_CROPS],
                request.options.budget,
                layers=request.options.layer_indices,
                on_step=on_step,
                **options,
            )
    layers, native_size = request.options.layer_indices, request.options.native_size
    return linearize(softmax, request.options.mixer, layers, per_layer, native_size, **options)


def _softmax_model(request: _Request) -> Any:
    kwargs = {"img_size": request.options.img_size, "num_classes": request.options.num_classes}
    kwargs = {name: value for name, value in kwargs.items() if value is not None}
    if isinstance(request.source, nn.Module):
        if kwargs or request.options.weights is not None:
            given = next(iter(kwargs), "weights")
            raise OptionError(f"{given} is for a timm name; {request.title} is a model with weights; leave it out")
        return _checked(copy.deepcopy(request.source).eval())
    if Path(request.source).is_dir():
        if request.options.weights is not None:
            raise OptionError(
                f"weights is for a timm name, and {request.source} is a folder with weights of its own; leave it out"
            )
        return _checked(load_softmax(request.source, **kwargs).eval())
    _check_name(request.source)
    if request.options.weights is None:
        return _checked(_pretrained(request.source, kwargs))
    # The file's weights have neither the name nor the licence of those that timm would load.
    overlay: dict[str, Any] = {"tag": None, "license": None}
    if request.options.num_classes is not None:
        overlay["num_classes"] = request.options.num_classes
    weights = read_weights(request.options.weights)
    try:
        return _checked(create_with_weights(request.source, weights, request.options.weights, overlay, **kwargs).eval())
    except (TypeError, RuntimeError, AssertionError) as error:
        raise ConfigError(f"timm can't make {request.source} with {kwargs}: {reason_line(error)}") from error


def _pretrained(name: str, kwargs: dict[str, Any]) -> Any:
    try:
        with working(f"loading {name}"):
            return timm.create_model(name, pretrained=True, **kwargs).eval()
    # Each way of downloading has errors of its own.
    except Exception as error:
        raise ConfigError(
            f"timm can't load pretrained weights of {name}: {reason_line(error)}; give a file of them as `weights`"
        ) from error


def _check_name(name: str) -> None:
    architecture = name.partition(".")[0]
    if is_model(architecture):
        return
    if Path(name).suffix in {".safetensors", ".pth", ".pt", ".ckpt", ".bin"}:
        raise ConfigError(
            f"{name} is a weights file: name its model, as vit_small_patch14_dinov2, and give the file as `weights`"
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
        raise OptionError(f"img_size must be a multiple of the patch size {patch}, got {height}; try {nearest}")
    return model


def _report_crops(request: _Request, model: Any, size: int) -> list[Tensor]:
    """Return crops for the report, [C, S, S]; none if an image is smaller."""
    try:
        return _crops(request, model, size)[-_REPORT_CROPS:]
    except InputError:
        return []


def _crops(request: _Request, model: Any, size: int) -> list[Tensor]:
    """Standardised crops, [C, S, S]: those to choose options by first, those for the report last."""
    cfg = model.pretrained_cfg
    if not request.options.images:
        in_chans = input_bands(model)
        return [_synthetic(in_chans, size, request.options.seed + place) for place in range(_REPORT_CROPS)]
    # timm's statistics are of values from 0 to 1, images have 0 to 255.
    normalizer = Normalizer(*(tuple(255 * value for value in cfg[name]) for name in ("mean", "std")))
    crops = UnlabelledCrops(
        find_images(request.options.image_paths),
        normalizer,
        tile_px=size,
        length=_NUM_CROPS,
        seed=request.options.seed,
        symmetries=False,
    )
    crops.check_bytes("give `images` of 8 bits")
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


def _describe_images(request: _Request) -> str:
    if not request.options.images:
        return f"{_REPORT_CROPS} generated pictures, noise of all scales: give images for figures that mean something"
    apart = "" if request.options.budget is None else ", others than those the conversion learned from"
    return f"{_REPORT_CROPS} crops of {', '.join(each.name for each in request.options.image_paths)}{apart}"
