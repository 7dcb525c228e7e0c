"""What the commands say of predictions."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from perf_vit.workflows.progress import print_damage, say, show, two_columns

if TYPE_CHECKING:
    # They bring torch, which an error in the words of a command need not wait for.
    from perf_vit.inference import RunReport
    from perf_vit.inference.jobs import JobResult
    from perf_vit.inference.whole_plan import WholePlan

__all__ = ["say_plan", "say_prediction"]

# Names of files next to an output by their suffix; others are polygons.
_BESIDE = {".html": "report", ".png": "quicklook", ".qml": "QGIS style", ".xml": "class names"}

# Failed inputs that are named; the table has them all.
_NUM_FAILED = 10

_THERE = ", there already with this input, model and settings; --overwrite makes it again"


def say_prediction(task: str, found: JobResult | RunReport, output: Path) -> None:
    """Say what a prediction made.

    Args:
        task: Name of the task.
        found: What `perf_vit.predict` gave.
        output: Path that was asked for.
    """
    from perf_vit.inference import RunReport

    if isinstance(found, RunReport):
        _say_report(found, output)
    elif found.num_rows is not None or task in {"classification", "regression", "slide_classification"}:
        _say_table(task, found, output)
    elif found.num_objects is not None or task == "detection":
        print_damage(found.damaged)
        objects = _objects(found.num_objects or 0, found.score_threshold) if found.made else "objects"
        say(f"{objects}: {found.out}{'' if found.made else _THERE}")
        _say_beside(found)
    else:
        _say_map(found, output)


def say_plan(plan: WholePlan) -> None:
    """Say what the map of a whole image takes, and refuse what doesn't fit.

    Raises:
        OutputError: The disk or the memory is too small.
    """
    minutes, gigabytes = (plan.seconds or 0.0) / 60, [plan.memory_bytes / 1e9, plan.disk_bytes / 1e9]
    (rows, columns), timed = plan.grid, plan.timed or (0, 0)
    duration = f"{60 * minutes:.0f} s" if minutes < 2 else f"{minutes:.0f} min"
    free = ["" if number is None else f", {number / 1e9:.1f} GB free" for number in (plan.free_memory, plan.free_disk)]
    where = "none, tokens are in memory" if plan.folder is None else f"{plan.num_files} files of tokens, {plan.folder}"
    show(
        two_columns(
            [
                ("tokens", f"{plan.num_tokens:,} of {rows:,} x {columns:,}"),
                ("trips", f"{plan.num_trips} over the image"),
                ("time", f"about {duration}, from {timed[0]} x {timed[1]} tokens through two blocks and the head now"),
                ("memory", f"about {gigabytes[0]:.1f} GB{free[0]}"),
                ("disk", f"{gigabytes[1]:.1f} GB{free[1]}: {where}"),
            ]
        )
    )
    plan.check()


def _say_map(found: JobResult, output: Path) -> None:
    print_damage(found.damaged)
    say(f"map: {output}{'' if found.made else _THERE}")
    if found.seam_disagreement is not None:
        say(f"seam_disagreement: {found.seam_disagreement:.4f} of the pixels under several windows")
    _say_beside(found)


def _say_beside(found: JobResult) -> None:
    """Say where the files next to the main output are."""
    for path in found.beside:
        say(f"{_BESIDE.get(path.suffix, 'polygons')}: {path}")


def _say_table(task: str, found: JobResult, output: Path) -> None:
    from perf_vit.inference import attention_folder

    if not found.made:
        say(f"{output}{_THERE}")
        return
    left_out = f", {len(found.failed)} could not be read" if found.failed else ""
    noun = "slides" if task == "slide_classification" else "images"
    say(f"{found.num_rows:,} {noun}{left_out}: {output}")
    _say_failed(dict(found.failed or {}))
    if task == "slide_classification":
        say(f"attention: {attention_folder(output)}")
    if (page := output.with_suffix(".html")) in found.beside:
        say(f"report: {page}")


def _say_failed(failed: dict[str, str]) -> None:
    for path, reason in list(failed.items())[:_NUM_FAILED]:
        said = " ".join(reason.split())
        say(f"failed: {said}" if path in said else f"failed: {path}: {said}")
    if len(failed) > _NUM_FAILED:
        say(f"failed: {len(failed) - _NUM_FAILED} more, see the column error of the table")


def _say_report(found: RunReport, folder: Path) -> None:
    counts = [each.num_objects for each in found.inputs if each.num_objects is not None]
    threshold = found.header["settings"].get("score_threshold")
    say(f"{_objects(sum(counts), threshold)}: {folder}" if counts else f"outputs: {folder}", f"report: {found.path}")


def _objects(number: int, threshold: float | None) -> str:
    return f"{number:,} objects" + ("" if threshold is None else f" with scores from {threshold:.2f}")
