"""What a task is: everything that training, evaluation and prediction need to know of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Literal, Protocol, TypeAlias, TypeVar

from rich.table import Table
from torch import nn

from perf_vit.files import write_json
from perf_vit.inference import PredictOptions, Predictor
from perf_vit.metrics import RegisteredMetrics
from perf_vit.models import Network
from perf_vit.reporting import Page, Preview, Row, Sample, Settings, TextTable, sample_rows
from perf_vit.tasks import TrainingSteps
from perf_vit.tasks.callbacks import Curves
from perf_vit.tasks.pictures import Draw
from perf_vit.text import without_nan
from perf_vit.workflows.progress import as_text, new_table
from perf_vit.writers import check_outputs

__all__ = ["EvaluateOptions", "Evaluation", "Samples", "Task", "TileScores", "TrainedModel", "WindowedEvaluateOptions"]

Options = TypeVar("Options", bound=PredictOptions)

TrainedModel: TypeAlias = nn.Module | str | Path
"""A model of a task, or the path of its checkpoint."""


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """Options of every evaluation.

    Attributes:
        batch_size: Windows or images in a forward pass.
        device: "auto" for a GPU if there is one, "cpu", "cuda", "cuda:1", "mps".
        precision: "32", or "bf16" or "16" for autocast; "auto" for "bf16" where the device is fast in it, else "32".
        json: File to write the scores to, with curves and confusion matrix next to it as .png, and the report as .html.
        report: File to write the report to, .html.
        overwrite: Replace scores, pictures and a report that exist.
    """

    batch_size: int = 1
    device: str = "auto"
    precision: str = "32"
    json: str | Path | None = None
    report: str | Path | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        # In Python, 32 and torch.device("cpu") are usual.
        for name in ("device", "precision"):
            object.__setattr__(self, name, str(getattr(self, name)))

    @property
    def page(self) -> Path | None:
        """Path of the report, None for none."""
        if self.report is None:
            return None if self.json is None else Path(self.json).with_suffix(".html")
        return Path(self.report)

    def for_prediction(self, options: type[Options], more: Mapping[str, Any] | None = None) -> Options:
        """Options of the prediction that is scored.

        Args:
            options: Their class.
            more: Further ones.

        Raises:
            OptionError: An unknown value.
        """
        shared = {each.name for each in fields(self)} & {each.name for each in fields(options)}
        shared -= {"overwrite", "report"}
        return options(**{name: getattr(self, name) for name in shared}, **(more or {}))


@dataclass(frozen=True, kw_only=True)
class WindowedEvaluateOptions(EvaluateOptions):
    """Options of evaluations in overlapping windows.

    Attributes:
        window_size: Side of a window in pixels; the training tile's by default.
        overlap: Pixels that neighbouring windows share; a quarter of the window by default.
        slide_mpp: Micrometres per pixel of a slide's level 0 where the file states none, or "objective" for 10 divided
            by the magnification of the objective.
        slide_mpp_override: Micrometres per pixel of a slide's level 0, whatever the file states.
    """

    window_size: int | None = None
    overlap: int | None = None
    slide_mpp: float | Literal["objective"] | None = None
    slide_mpp_override: float | None = None


class Samples(Protocol):
    """Worst and best samples of an evaluation, and their legend."""

    @property
    def legend(self) -> Sequence[tuple[str, str]]:
        """Names and colours, in CSS."""

    @property
    def worst(self) -> Sequence[Sample]:
        """Samples of lowest score."""

    @property
    def best(self) -> Sequence[Sample]:
        """Samples of highest score."""

    def preview(self) -> Preview | None:
        """A zoomable picture of the only input, None where there is none."""


class Evaluation(ABC):
    """Scores of a model on labelled inputs.

    Args:
        title: What was scored against what.
        registered: Registered metrics of the task, None for none.

    Attributes:
        pictures: Endings of the names of pictures next to the scores, some of which a model may have no scores for.
        captions: What these show, by their endings.
        samples: Worst and best samples, None for none.
        settings: Plain values that decided the scores.
    """

    pictures: ClassVar[tuple[str, ...]] = ()
    captions: ClassVar[Mapping[str, str]] = MappingProxyType({})
    samples: Samples | None = None
    settings: Mapping[str, Any] = MappingProxyType({})

    def __init__(self, title: str = "scores", registered: RegisteredMetrics | None = None) -> None:
        self.title = title
        self.registered = registered

    @property
    @abstractmethod
    def table(self) -> list[dict[str, Any]]:
        """A row a class or target, as plain values; `pandas.DataFrame` takes it."""

    @abstractmethod
    def builtin_tables(self) -> list[Table]:
        """All built-in scores for people."""

    @abstractmethod
    def builtin_scores(self) -> dict[str, Any]:
        """All built-in scores as plain values of JSON, NaN as None."""

    @property
    def metrics(self) -> dict[str, float]:
        """Values of the registered metrics, by name."""
        return {} if self.registered is None else self.registered.compute()

    def tables(self) -> list[Table]:
        """All scores for people."""
        metrics = self.metrics
        if not metrics:
            return self.builtin_tables()
        table = new_table("registered metrics", ("metric", "value"))
        for name, value in metrics.items():
            table.add_row(name, f"{value:.4g}")
        return [*self.builtin_tables(), table]

    def to_dict(self) -> dict[str, Any]:
        """All scores as plain values of JSON, NaN as None; registered metrics under "metrics", where there are any."""
        metrics = self.metrics
        return {**self.builtin_scores(), **({"metrics": without_nan(metrics)} if metrics else {})}

    @abstractmethod
    def draw(self, path: str | Path) -> list[Path]:
        """Write curves and the confusion matrix as pictures, as far as the task has them, over files that exist.

        Args:
            path: Path of the first picture, .png or .svg; the names of others begin with its name.

        Returns:
            Paths of the pictures.

        Raises:
            OutputError: They can't be written there.
        """

    def plot(self, path: str | Path, *, overwrite: bool = False) -> list[Path]:
        """Write curves and the confusion matrix as pictures, as far as the task has them.

        Args:
            path: Path of the first picture, .png or .svg; the names of others begin with its name.
            overwrite: Replace files that exist.

        Returns:
            Paths of the pictures.

        Raises:
            OutputError: They can't be written there, or exist without `overwrite`.
        """
        check_outputs(self.picture_paths(path), [], overwrite=overwrite)
        return self.draw(path)

    @property
    def headline(self) -> dict[str, str]:
        """Main scores by name, as texts."""
        return {}

    def report(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write scores, curves, confusion matrix, worst and best samples and settings as one HTML page.

        Args:
            path: Output file.
            overwrite: Replace a file that exists.

        Raises:
            OutputError: Nothing can be written there, or a file exists without `overwrite`.
        """
        check_outputs([path], [], overwrite=overwrite)
        page = Page(title=self.title, numbers=self.headline)
        self.add_to(page)
        page.add("Settings", Settings.of_values("Model and options", self.settings))
        return page.write(path)

    def add_to(self, page: Page) -> None:
        """Add scores, plots and samples to a page."""
        samples = self.samples
        legend = [] if samples is None else samples.legend
        if samples is not None and (preview := samples.preview()) is not None:
            text = "Drag to move, scroll to zoom. Errors are pixels whose class differs from their label."
            page.add("Map", preview, text=text, legend=legend)
        tables = [TextTable.of_rich(table, dict(legend)) for table in self.tables()]
        page.add("Scores", *tables)
        plots = Row.of_plots(self.draw, self.captions)
        page.add("Curves and confusion", plots if plots.figures else None)
        if samples is not None:
            page.add("Worst", *sample_rows(samples.worst), legend=legend)
            page.add("Best", *sample_rows(samples.best), legend=legend)

    def to_json(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write all scores as JSON.

        Args:
            path: Output file.
            overwrite: Replace a file that exists.

        Raises:
            OutputError: Nothing can be written there, or a file exists without `overwrite`.
        """
        check_outputs([path], [], overwrite=overwrite)
        write_json(Path(path), self.to_dict())
        return Path(path)

    @classmethod
    def picture_paths(cls, path: str | Path) -> list[Path]:
        """Paths of the pictures next to scores: .svg next to .svg, else .png."""
        suffix = ".svg" if Path(path).suffix == ".svg" else ".png"
        return [Path(path).with_name(f"{Path(path).stem}{ending}{suffix}") for ending in cls.pictures]

    def __str__(self) -> str:
        return as_text(*self.tables())

    __repr__ = __str__


class TileScores(Protocol):
    """Scores of a network on validation tiles."""

    @property
    def legend(self) -> Sequence[tuple[str, str]]:
        """Names and colours of the pictures, in CSS."""

    def update(self, found: Any, labels: Any, /) -> tuple[float, str]:
        """Add a tile; return its score and the score in words."""

    def finish(self) -> Evaluation:
        """The scores of all tiles."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task, as `register_task` takes it.

    Attributes:
        name: Value of the key `task` of its configs, and of the attribute `task` of its models.
        network: Class of its model's config and spec, what builds the model, and what messages call it.
        run_config: Class of its configs, a `TaskRunConfig`.
        build_data: Makes the data module of a config.
        build_module: Makes the Lightning module of a config and the data module.
        prepare_data: Called with a config, the data module, the Lightning module and the run folder before training
            begins, gives the data module to train on; None where that is the data module itself.
        monitor: Score that `best.ckpt` is chosen by, the higher the better.
        curves: Scores that are drawn while it trains.
        draw: Draws a validation tile with truth and prediction, None for no pictures.
        training_steps: Gives what `perf-vit fit-tile` measures for a config, None where tiles can't be fitted.
        tile_scores: Makes the scores of a network on validation tiles, for the report of a run; None for no pictures.
        predictor: Class of its predictor.
        predict_options: Class of the options of its predictor.
        evaluate: Called with model, input, labels and options, gives an `Evaluation`.
        evaluate_options: Class of these options.
        evaluation: Class of these evaluations.
        needs_labels: Whether an evaluation takes labels; else they may be the folders of the images.
    """

    name: str
    network: Network
    run_config: type[Any]
    build_data: Callable[[Any], Any]
    build_module: Callable[[Any, Any], Any]
    monitor: str
    curves: Curves
    predictor: type[Predictor[Any, Any]]
    predict_options: type[PredictOptions]
    evaluate: Callable[[Any, Any, Any, Any], Evaluation]
    evaluate_options: type[EvaluateOptions]
    evaluation: type[Evaluation]
    needs_labels: bool = True
    prepare_data: Callable[[Any, Any, Any, Path], Any] | None = None
    draw: Draw | None = None
    training_steps: Callable[[Any], TrainingSteps] | None = None
    tile_scores: Callable[[Any], TileScores] | None = None

    @property
    def label(self) -> str:
        """What messages call its model, such as "a segmentation model"."""
        return self.network.label
