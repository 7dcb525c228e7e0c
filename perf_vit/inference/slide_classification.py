"""Prediction of slide classification: features of windows, classes and attention."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from perf_vit.finite import check_finite
from perf_vit.inference.jobs.table_job import TableJob
from perf_vit.inference.options import SlideClassificationPredictOptions, move_to_device
from perf_vit.inference.predictor import OnProgress, ignore_progress, register_predictor
from perf_vit.inference.prefetch import takes_valid
from perf_vit.inference.table_predictor import Rows, TablePredictor
from perf_vit.models import InputCheck, SlideClassifier, SlideFeatures, load_slide_classifier, tissue_windows
from perf_vit.models.read_ahead import Reads, to_device, window_batches
from perf_vit.plotting import rgb_from, save_png, tissue_picture
from perf_vit.plotting.panels import with_color_bar
from perf_vit.plotting.pictures import Picture
from perf_vit.reporting.outputs import thumbnail_of
from perf_vit.sources import image_name, image_names
from perf_vit.sources.files import ATTENTION_ENDING
from perf_vit.types import TISSUE_METHODS, GeoImage, Source, Window
from perf_vit.writers import write_objects

__all__ = ["SlideClassificationPredictor", "TissueWindows", "attention_folder", "attention_picture", "embed_windows"]

FloatArray = npt.NDArray[np.float32]


def embed_windows(
    encode: Callable[..., Tensor],
    source: Reads,
    normalize: Callable[[GeoImage], FloatArray],
    windows: Sequence[Window],
    *,
    batch_size: int = 16,
    num_readers: int | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> FloatArray:
    """Features of windows, in their order; threads read ahead.

    Args:
        encode: windows [B, C, h, w] to features [B, D]; put an `nn.Module` into evaluation mode and onto the device
            yourself. One that has an argument `valid` is given the valid pixels, bool [B, h, w], or None where all are.
        source: where pixels come from; several threads read it.
        normalize: a window's pixels to the encoder's input, [C, h, w].
        windows: at least one, all of one size. Those without a valid pixel, of which tiles are missing at the level
            that is read, have the features of a window of mean colours.
        batch_size: windows a forward pass.
        num_readers: threads that read; one per processor by default.
        device: where the windows go.
        dtype: torch.float32, or torch.bfloat16 / torch.float16 for autocast.
        on_progress: called with (windows done, windows in all), for a progress bar.

    Returns:
        [N, D].

    Raises:
        InputError: a window can't be read.
        NotFiniteError: Features are infinite or not a number.
    """
    device = torch.device(device)
    autocast = torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)
    with_valid = takes_valid(encode)
    found: list[FloatArray] = []
    done = 0
    with closing(window_batches(source, normalize, windows, batch_size, num_readers=num_readers)) as batches:
        for pixels, valid in batches:
            with torch.inference_mode(), autocast:
                given = {} if valid is None or not with_valid else {"valid": valid.to(device)}
                features = encode(to_device(pixels, device), **given).float().cpu().numpy()
            batch_windows = windows[done : done + len(pixels)]
            check_finite(features, "features", partial(_place, source, batch_windows))
            found.append(features)
            done += len(pixels)
            on_progress(done, len(windows))
    return np.concatenate(found)


def _place(source: Reads, windows: Sequence[Window], index: int) -> str:
    return f"{getattr(source, 'path', 'the source')}, window {windows[index]},"


_SIZE_PX = 2048

_OPACITY = 0.55

_COLORMAP = "turbo"


def attention_picture(
    source: Source, windows: Sequence[Window], weights: npt.NDArray[np.floating], max_size_px: int = _SIZE_PX
) -> npt.NDArray[np.uint8]:
    """A slide at low resolution under the colours of its windows' attention, blue for none and red for the most.

    Args:
        source: the slide.
        windows: that were looked at.
        weights: 0 to 1, [N]; where windows overlap, the larger one shows.
        max_size_px: longest side of the picture.

    Returns:
        [H, W, 3].

    Raises:
        InputError: the slide can't be read.
    """
    picture = rgb_from(source.read_reduced(max_size_px))
    height, width = picture.shape[:2]
    heat = np.full((height, width), np.nan)
    for index in np.argsort(weights, kind="stable"):
        window = windows[index]
        rows = slice(*_pixels(window.row, window.row_stop, height / source.height))
        cols = slice(*_pixels(window.col, window.col_stop, width / source.width))
        heat[rows, cols] = weights[index]
    seen = ~np.isnan(heat)
    colors = matplotlib.colormaps[_COLORMAP](np.nan_to_num(heat))[..., :3] * 255
    mixed = np.where(seen[..., None], (1 - _OPACITY) * picture + _OPACITY * colors, picture)
    return np.rint(mixed).astype(np.uint8)


def _pixels(start: int, stop: int, scale: float) -> tuple[int, int]:
    """A span in pixels of the picture, one at least."""
    low = round(start * scale)
    return low, max(low + 1, round(stop * scale))


_ATTENTION = "items_attention"
"""Folder of attention files until the table is finished."""

_TISSUE = "tissue"
"""Folder of pictures of the tissue, in that of attention files."""


@dataclass(frozen=True, slots=True)
class TissueWindows:
    """Windows of a slide that are embedded.

    Attributes:
        windows: Windows, at least one.
        picture: Slide with the outline of its tissue, [H, W, 3]; None without `tissue`.
    """

    windows: tuple[Window, ...]
    picture: Picture | None = None


class SlideClassificationPredictor(TablePredictor[SlideClassifier, SlideClassificationPredictOptions]):
    """Writes a CSV file with a row a slide, and the attention of each slide.

    Attention goes into the folder `OUT_attention`: for each slide a picture, .png, and its windows as QuPath's GeoJSON,
    with the attention as the measurement "score", 1 where it is highest. Of slides that are read with tissue,
    `OUT_attention/tissue` shows the outline.

    Attributes:
        on_window: Called with (windows done, windows in all) of the current slide; not pickled.
    """

    def load(self, checkpoint: Path) -> SlideClassifier:
        """The model of a checkpoint."""
        return load_slide_classifier(checkpoint)

    noun = "slides"
    on_window: OnProgress = staticmethod(ignore_progress)

    def job(self, paths: Sequence[str], out: str | Path) -> TableJob:
        """What is to be made of some slides; see `TablePredictor.job`."""
        out, tissue = Path(out), self.options.tissue
        names = image_names(paths)
        return TableJob(
            paths=paths,
            out=out,
            # Outlines count by their content.
            settings={
                **self.model_settings,
                "slide_mpp": self.options.slide_mpp,
                "slide_mpp_override": self.options.slide_mpp_override,
                "tissue": tissue if tissue in (None, *TISSUE_METHODS) else "file",
            },
            options=self.options,
            device=self.device,
            beside=[
                *(file for name in names.values() for file in self._files(attention_folder(out), name)),
                *([out.with_suffix(".html")] if self.options.report else []),
            ],
            further_inputs=[] if tissue in (None, *TISSUE_METHODS) else [str(tissue)],
        )

    @property
    def draws_tissue(self) -> bool:
        """Whether slides are read with tissue, of which a picture shows the outline."""
        return self.options.tissue is not None or self.model.spec.tissue is not None

    def read_input(self, path: str) -> TissueWindows:
        """Find the windows of tissue of a slide; see `TablePredictor.read_input`."""
        spec = self.model.spec
        with closing(spec.open(path, check=self.check_input, **self.options.input_options)) as source:
            windows = tuple(tissue_windows(source, spec.tile_px, spec.min_tissue))
            return TissueWindows(windows, tissue_picture(source) if self.draws_tissue else None)

    def rows(self, folder: Path, inputs: Mapping[str, TissueWindows]) -> Rows:
        """Compute the rows of some slides; their attention goes into the folder. See `TablePredictor.rows`."""
        return {path: self._row(path, tissue, folder / _ATTENTION) for path, tissue in inputs.items()}

    def embed(
        self, path: str, on_window: OnProgress = ignore_progress, tissue: TissueWindows | None = None
    ) -> SlideFeatures:
        """Windows of tissue and their features.

        Args:
            path: Slide.
            on_window: Called with (windows done, windows in all).
            tissue: Result of `read_input`; None to find the windows now.

        Raises:
            InputError: The slide can't be read, has no tissue, or other channels than those of training.
        """
        tissue = self.read_input(path) if tissue is None else tissue
        with closing(self.open_with_glass(path)) as source:
            features = embed_windows(
                self.model.embed,
                source,
                self.model.spec.normalizer,
                tissue.windows,
                batch_size=self.options.batch_size,
                num_readers=self.options.num_readers,
                # The encoder is always in evaluation mode; the rest keeps its mode, as training embeds slides too.
                device=move_to_device(self.model, self._wanted_device),
                dtype=self.options.dtype,
                on_progress=on_window,
            )
        return SlideFeatures(features, tissue.windows, tissue.picture)

    def classify(self, found: SlideFeatures) -> tuple[FloatArray, FloatArray]:
        """Probabilities [K] of a slide and the attention [N] of its windows.

        Raises:
            NotFiniteError: They are infinite or not a number.
        """
        device = torch.device(self.ready())
        bag = torch.from_numpy(found.features)[None].to(device)
        with torch.inference_mode():
            logits, attention = self.model(bag, torch.ones(bag.shape[:2], dtype=torch.bool, device=device))
        probabilities = logits.float().softmax(1).cpu().numpy()
        check_finite(probabilities, "probabilities", lambda _: "the slide")
        return probabilities[0], attention[0].float().cpu().numpy()

    @property
    def columns(self) -> list[str]:
        """Names of the columns."""
        return ["slide", "prediction", *self.model.spec.classes, "windows"]

    @property
    def rows_at_once(self) -> int:
        """Number of slides in a batch."""
        return 1

    @property
    def num_readers(self) -> int:
        """Number of slides whose tissue is looked for at the same time; more threads read the windows."""
        return 1

    def files_of(self, out: Path, done: Sequence[str], paths: Sequence[str], folder: Path) -> dict[Path, Path]:
        """Attention files of the slides that are done: under their final names, those in the folder."""
        names = image_names(paths)
        final = (file for path in done for file in self._files(attention_folder(out), names[path]))
        made = (file for path in done for file in self._unfinished(folder / _ATTENTION, path))
        return dict(zip(final, made, strict=True))

    def picture_of(self, folder: Path, path: str) -> Callable[[], dict[str, Picture]]:
        """Draw the tissue and the attention of a slide for the report; see `TablePredictor.picture_of`."""
        _, attention, *tissue = self._unfinished(folder / _ATTENTION, path)
        captions = ("tissue", "attention") if tissue else ("attention",)
        return lambda: {name: thumbnail_of(file) for name, file in zip(captions, (*tissue, attention), strict=True)}

    def open_with_glass(self, path: str) -> Source:
        """A slide with all of its pixels: the glass in a window of tissue is part of what the encoder knows."""
        options = {name: value for name, value in self.options.input_options.items() if name != "tissue"}
        return replace(self.model.spec, tissue=None).open(path, check=InputCheck(None), **options)

    def _row(self, path: str, tissue: TissueWindows, folder: Path) -> list[str]:
        found = self.embed(path, self.on_window, tissue)
        probabilities, attention = self.classify(found)
        predicted = int(probabilities.argmax())
        title = f"{self.model.spec.classes[predicted]}, probability {probabilities[predicted]:.2f}: {Path(path).name}"
        self._write_attention(path, found, attention, predicted, title, folder)
        scores = [f"{value:.6g}" for value in probabilities]
        return [self.model.spec.classes[predicted], *scores, str(len(attention))]

    @staticmethod
    def attention_figure(
        source: Source, windows: Sequence[Window], attention: FloatArray, title: str
    ) -> npt.NDArray[np.uint8]:
        """A slide under the colours of its attention, with a title and a colour bar, [H, W, 3].

        Raises:
            InputError: The slide can't be read.
        """
        painted = attention_picture(source, windows, attention / attention.max())
        return with_color_bar(painted, title, _COLORMAP, ("no attention", "most attention"))

    def _write_attention(
        self, path: str, found: SlideFeatures, attention: FloatArray, predicted: int, title: str, folder: Path
    ) -> None:
        weights = attention / attention.max()
        boxes = np.array([[w.col, w.row, w.col_stop, w.row_stop] for w in found.windows], np.float32)
        labels = np.full(len(boxes), predicted)
        objects, picture, *outlines = self._unfinished(folder, path)
        for file in outlines:
            assert found.picture is not None
            save_png(file, found.picture)
        with closing(self.open_with_glass(path)) as source:
            write_objects(objects, boxes, weights, labels, self.model.spec.classes, source=source)
            save_png(picture, self.attention_figure(source, found.windows, attention, title))

    def _files(self, folder: Path, name: str) -> tuple[Path, ...]:
        """Windows with their attention, the picture of it, and of slides with tissue that of the outline."""
        # Slides' names may hold dots, so no suffix is replaced.
        attention = folder / f"{name}.geojson", folder / f"{name}.png"
        return (*attention, folder / _TISSUE / f"{name}.png") if self.draws_tissue else attention

    def _unfinished(self, folder: Path, path: str) -> tuple[Path, ...]:
        """Files of a slide until the table is finished."""
        # Ray's workers know a slide by its absolute path.
        place = os.path.abspath(path) if os.path.exists(path) else path
        return self._files(folder / hashlib.sha256(os.fsencode(place)).hexdigest()[:16], image_name(path))


register_predictor("slide_classification", SlideClassificationPredictor, SlideClassificationPredictOptions)


def attention_folder(out: Path) -> Path:
    """Folder of the attention files of a table."""
    return out.with_name(f"{out.stem}{ATTENTION_ENDING}")
