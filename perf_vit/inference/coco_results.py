"""COCO results of several images in one file."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from perf_vit.io import CocoImages, existing_error, existing_outputs, write_text
from perf_vit.text import to_json

__all__ = ["COCO_RESULTS", "check_coco_results", "join_coco_results"]

COCO_RESULTS = "coco_results.json"


def check_coco_results(folder: Path, images: CocoImages) -> None:
    """Refuse a file that isn't the results of an earlier run on the same images.

    Args:
        folder: of the outputs.
        images: those of the results.

    Raises:
        OutputError: names the file.
    """
    for path in existing_outputs([folder / COCO_RESULTS]):
        if not _is_results(path, images.ids):
            raise existing_error(path, reason=", but holds no COCO results of these images")


def join_coco_results(parts: Iterable[Path], folder: Path) -> None:
    """Write the results of all images that have some as one list, line by line.

    Args:
        parts: results of an image each, of which some may be missing.
        folder: of the outputs.

    Raises:
        OutputError: nothing can be written there.
    """
    found = [each for part in parts if part.exists() for each in json.loads(part.read_bytes())]
    if found or folder.exists():
        write_text(folder / COCO_RESULTS, "[" + ",\n".join(to_json(each) for each in found) + "]\n")


def _is_results(path: Path, ids: frozenset[int]) -> bool:
    try:
        content: Any = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(content, list) and all(
        isinstance(each, dict) and each.get("image_id") in ids and "score" in each for each in content
    )
