"""Names of the files that `perf-vit evaluate` writes."""

from __future__ import annotations

from pathlib import Path

__all__ = ["score_files"]

_PICTURES = {
    "segmentation": ("", "_confusion"),
    "detection": ("", "_confusion"),
    "classification": ("", "_precision_recall"),
    "slide_classification": ("", "_precision_recall"),
    "regression": (),
}
"""What the names of pictures end in, by the task of the checkpoint's network."""


def score_files(path: Path, task: str) -> list[Path]:
    """The JSON file of scores, and the pictures beside it, some of which a model may have no scores for.

    Args:
        path: of the JSON file.
        task: of the checkpoint's network.
    """
    return [path, *(path.with_name(f"{path.stem}{ending}.png") for ending in _PICTURES[task])]
