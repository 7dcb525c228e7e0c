"""Evaluation of all tasks."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from perf_vit.errors import InputError, extra

with extra("train", "evaluation"):
    from perf_vit.inference.options import options_of
    from perf_vit.workflows.load import evaluating, find_model, has_task
    from perf_vit.workflows.progress import progress_shown
    from perf_vit.workflows.registry import TASKS, task_of
    from perf_vit.workflows.task import EvaluateOptions, Evaluation, Task
    from perf_vit.writers import check_outputs, existing_error, existing_outputs

__all__ = ["evaluate"]


def evaluate(
    model: nn.Module | str | Path,
    input: str | Path,  # noqa: A002  (as on the command line)
    labels: str | Path | None = None,
    *,
    progress: bool = True,
    **options: Any,
) -> Evaluation:
    """Score a model on a labelled raster, or on labelled images or slides.

    Args:
        model: Model of `load`, or what `load` takes.
        input: Local path of a raster, or of a folder of images or slides; of detectors, of an image or a folder.
        labels: Masks or vector files as in training, labels of objects, or a CSV file of images or slides; None for
            images in folders by class.
        progress: Show a progress bar.
        **options: Fields of the task's options, such as `SegmentationEvaluateOptions`.

    Returns:
        Scores with `table`, `to_json` and `plot`.

    Raises:
        InputError: Labels or inputs can't be read, or don't fit each other or the model.
        OptionError: The task has no such option, or it takes no such value.
        OutputError: Scores that exist, without `overwrite`.
    """
    given = model if isinstance(model, nn.Module) else find_model(model)
    if isinstance(given, nn.Module) and not has_task(given):
        raise InputError("expected a model that `perf_vit.train` made, got another network; predict with it instead")
    if not isinstance(input, str | Path) or "://" in str(input):
        raise InputError(f"evaluations read local files, got {input}; give the path of a raster, image or folder")
    task = task_of(given)
    kinds = ((each.label, each.evaluate_options) for each in TASKS.values())
    parsed: EvaluateOptions = options_of(task.evaluate_options, options, task.label, kinds)
    if labels is None and task.needs_labels:
        raise InputError(
            f"{task.label} needs `labels` to be scored: a mask raster or a vector file, labels of objects, or a "
            "CSV file"
        )
    image, truth = Path(input), None if labels is None else Path(labels)
    if parsed.page is not None:
        _check_outputs(task, parsed, [None if isinstance(given, nn.Module) else given, image, truth])
    with progress_shown(progress), evaluating(given):
        found = task.evaluate(given, image, truth, parsed)
    found.settings = {"model": str(model) if isinstance(model, str | Path) else type(model).__name__, **_plain(parsed)}
    # What exists was checked before.
    if parsed.json is not None:
        found.to_json(parsed.json, overwrite=True)
        found.draw(parsed.json)
    if parsed.page is not None:
        found.report(parsed.page, overwrite=True)
    return found


def _plain(options: EvaluateOptions) -> dict[str, Any]:
    return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(options).items()}


def _check_outputs(task: Task, options: EvaluateOptions, inputs: list[Path | None]) -> None:
    """Refuse scores, pictures and a report that would replace an input or, without `overwrite`, another file."""
    further = [getattr(options, name, None) for name in ("names", "tissue")]
    outputs = [] if options.json is None else [Path(options.json), *task.evaluation.picture_paths(options.json)]
    outputs += [] if options.page is None else [options.page]
    check_outputs(outputs, [*inputs, *further], overwrite=True)
    existing = [] if options.overwrite else existing_outputs(outputs)
    if existing:
        raise existing_error(existing[0], _name_taken(existing[0], options))


def _name_taken(path: Path, options: EvaluateOptions) -> str:
    """Say why a file that wasn't named is an output, such as the quicklook of a map with the name of the scores."""
    if options.json is None or path in (Path(options.json), options.report and Path(options.report)):
        return ""
    json = Path(options.json)
    return f", and pictures and report of {json.name} take its name; try {json.stem}_scores{json.suffix}"
