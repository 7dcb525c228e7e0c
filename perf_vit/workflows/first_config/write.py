"""Writing of first configs: `init`."""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from perf_vit.errors import OptionError
from perf_vit.files import write_text
from perf_vit.registry import did_you_mean
from perf_vit.workflows.first_config.draft import Draft, Files
from perf_vit.workflows.first_config.images import draft_images, draft_slides
from perf_vit.workflows.first_config.objects import draft_detection
from perf_vit.workflows.first_config.scene import draft_segmentation
from perf_vit.workflows.progress import progress_shown
from perf_vit.workflows.registry import task_keys
from perf_vit.workflows.train import read_run
from perf_vit.writers import check_outputs

__all__ = ["FirstConfig", "init"]

_DRAFTS: dict[str, Callable[[Files], Draft]] = {
    "segmentation": draft_segmentation,
    "detection": draft_detection,
    "classification": draft_images,
    "regression": draft_images,
    "slide_classification": draft_slides,
}
_WIDTH = 118
_NOTES = {
    "data.train.image": "Images to train on.",
    "data.train.labels": "Their labels.",
    "data.val.image": "Images to validate on.",
    "data.val.labels": "Their labels.",
    "data.augment": "Random changes of training tiles: symmetries, zoom, and factors and shifts of the bands.",
    "model.backbone_kwargs": "Arguments of the timm model.",
}


@dataclass(frozen=True, kw_only=True)
class FirstConfig:
    """A config that `init` wrote.

    Attributes:
        path: Path of the config.
        files: Paths of lists of images next to it.
        facts: What was found in the files, a line each.
        commands: Command lines that train, evaluate and predict with it.
    """

    path: Path
    files: tuple[Path, ...]
    facts: tuple[str, ...]
    commands: tuple[str, ...]


def init(
    task: str,
    image: str | Path | Sequence[str | Path],
    labels: str | Path | None = None,
    *,
    val_image: str | Path | None = None,
    val_labels: str | Path | None = None,
    label_format: str | None = None,
    attribute: str | None = None,
    out: str | Path = "config.yaml",
    run: str | Path | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> FirstConfig:
    """Write a commented config for the user's own images and labels.

    The files are opened as in training: bands, pixel size, classes with their counts and band statistics are those that
    training sees. Without validation images, a part of the images is set apart.

    Args:
        task: Name of the task, such as "segmentation".
        image: Image, slide, or folder of images, as `data.train.image` takes it.
        labels: Labels, as `data.train.labels` takes them; None for images in folders by class.
        val_image: Images to validate on; None for a part of `image`.
        val_labels: Labels of `val_image`.
        label_format: Format of labels of objects; None to recognise it.
        attribute: Column with class names or targets; None to look for one.
        out: Path of the config to write; lists of images are written next to it.
        run: Run folder of the config; None for `runs/` and the name of the config.
        overwrite: Replace a config that exists.
        progress: Show progress bars.

    Raises:
        InputError: Files can't be read or don't fit each other.
        OptionError: The task is unknown, or an option doesn't fit.
        OutputError: The config exists, without `overwrite`.
    """
    if task not in _DRAFTS:
        known = list(_DRAFTS)
        raise OptionError(f"task must be one of {', '.join(known)}, got {task!r}{did_you_mean(task, known)}")
    path = Path(out)
    files = Files(
        task=task,
        image=str(image) if isinstance(image, str | Path) else [str(each) for each in image],
        labels=None if labels is None else str(labels),
        val_image=None if val_image is None else str(val_image),
        val_labels=None if val_labels is None else str(val_labels),
        label_format=label_format,
        attribute=attribute,
        config=path,
        run=Path(run or Path("runs", path.stem)).as_posix(),
    )
    inputs = [each for each in (image, labels, val_image, val_labels) if isinstance(each, str | Path)]
    kept = [each for each in inputs if Path(each).is_file()]
    check_outputs([path], kept, overwrite=overwrite)
    with progress_shown(progress):
        draft = _DRAFTS[task](files)
    draft.values = {key: value for key, value in draft.values.items() if value is not None}
    text = _rendered(draft)
    read_run(yaml.safe_load(text))
    further = [Path(name) for name in draft.files]
    # A list is replaced only if the config that is replaced, too, names it.
    before = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    check_outputs([each for each in further if each.as_posix() not in before], kept)
    check_outputs([path, *further], kept, overwrite=overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    for name, content in {**draft.files, str(path): text}.items():
        write_text(name, content)
    commands = _commands(path, files.run, draft)
    return FirstConfig(path=path, files=tuple(further), facts=tuple(draft.facts), commands=commands)


def _commands(path: Path, run: str, draft: Draft) -> tuple[str, ...]:
    """Command lines that train, evaluate and predict."""
    evaluate = ["evaluate", "--checkpoint", run, *draft.evaluate, "--json", f"{run}/scores.json"]
    predict = ["predict", "--checkpoint", run, *draft.predict]
    return tuple(shlex.join(["perf-vit", *command]) for command in (["train", str(path)], evaluate, predict))


def _rendered(draft: Draft) -> str:
    """YAML with a comment above each key."""
    task = str(draft.values["task"])
    meanings = {key.name: key.meaning for key in task_keys(task)}
    lines = [f"# Config of perf-vit for {task.replace('_', ' ')}, for these files:", "#"]
    lines += [f"# {line}" for line in draft.facts]
    lines += ["#", f"# All keys: perf-vit config {task} --all", ""]
    comments = {
        key: draft.notes.get(key) or _NOTES.get(key) or _first_sentence(meanings.get(key, "")) for key in draft.values
    }
    nested: dict[str, Any] = {}
    for key, value in draft.values.items():
        place = nested
        *path, last = key.split(".")
        for part in path:
            place = place.setdefault(part, {})
        place[last] = value
    return "\n".join([*lines, *_lines(nested, comments, "", 0)]) + "\n"


def _first_sentence(text: str) -> str:
    sentence, dot, _ = text.partition(". ")
    return sentence + dot.strip()


def _lines(values: Mapping[str, Any], comments: Mapping[str, str], prefix: str, depth: int) -> list[str]:
    found: list[str] = []
    indent = "  " * depth
    for name, value in values.items():
        key = f"{prefix}{name}"
        comment = comments.get(key, "")
        found += [f"{indent}# {line}" for line in textwrap.wrap(comment, _WIDTH - len(indent))]
        if isinstance(value, dict) and key not in comments:
            found += [f"{indent}{name}:", *_lines(value, comments, f"{key}.", depth + 1)]
        else:
            found.append(f"{indent}{name}: {_flow(value)}")
    return found


def _flow(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=10**9, allow_unicode=True, sort_keys=False)
    return text.removesuffix("...\n").strip()
