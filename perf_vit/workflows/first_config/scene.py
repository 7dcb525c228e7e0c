"""First configs of segmentation."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from perf_vit.config import build_config
from perf_vit.data import SegmentationDataConfig, build_segmentation_datamodule, count_class_pixels
from perf_vit.data.class_pixels import count_labelled_pixels, num_windows
from perf_vit.data.segmentation import open_labelled
from perf_vit.data.segmentation_tiles import LabelledSource
from perf_vit.errors import InputError
from perf_vit.labels import is_labelled_folder
from perf_vit.labels.image_folder import find_label_pairs
from perf_vit.sources import describe_source, is_vector_name, open_raster, open_source
from perf_vit.sources._qupath import is_ignored_class
from perf_vit.sources.slides import SlideSource
from perf_vit.sources.vector_file import read_columns, read_features
from perf_vit.text import number_text
from perf_vit.tiling import grid_windows
from perf_vit.types import Source, Window
from perf_vit.workflows.first_config.draft import (
    BACKBONE_NOTE,
    Draft,
    Files,
    augmentation_for,
    bands_note,
    image_fact,
    nested,
    rounded,
    shares_fact,
    tile_size,
)
from perf_vit.workflows.progress import windows_progress

__all__ = ["draft_segmentation"]

# Names of columns with classes, the likeliest first.
_CLASS_COLUMNS = ("classification", "class", "class_name", "label", "category", "type", "landcover", "land_cover",
                  "landuse", "species", "kind", "code", "class_id")  # fmt: skip
_MOST_CLASSES = 50
_MOST_FILES = 64
_WINDOW_PX = 1024
# Windows of labels in which the pixels of the classes are counted; a folder has one or more for each image.
_MOST_WINDOWS = 4000
_NOT_NOUNS = {"mask", "masks", "label", "labels", "gt", "truth", "annotations", "polygons", "train", "val"}
# Classes below this share of the labelled pixels are drawn as often as the others.
_RARE = 0.05
_BATCH_SIZE = 4
# Metres per pixel from which objects are a few pixels wide, and degrees of about that length.
_COARSE = {"metre": 5.0, "degree": 5e-5}


@dataclass(kw_only=True)
class _Classes:
    """Classes of label files, as keys of the config."""

    keys: dict[str, Any]
    notes: dict[str, str] = field(default_factory=dict)
    fact: str


def draft_segmentation(files: Files) -> Draft:
    """Draft a config of segmentation.

    Raises:
        InputError: Files can't be read or don't fit each other.
        OptionError: There are no labels.
    """
    labels = files.required_labels("a mask raster, a vector file, or a folder of them")
    is_folder = is_labelled_folder(files.image, labels)
    pairs = find_label_pairs(files.image, labels) if is_folder else []
    with open_source(pairs[0][0] if is_folder else files.image) as source:
        facts, slide = [f"image   {image_fact(source)}"], isinstance(source, SlideSource)
        coarse = _is_coarse(source)
        augment = augmentation_for(source)
        bands = list(range(1, source.num_bands + 1)), source.band_names
        mpp = _reading_mpp(source) if isinstance(source, SlideSource) else None
    label_files = [str(file) for _, file in pairs][:_MOST_FILES] or [labels]
    classes = _classes(label_files, files.attribute, is_slide=slide)
    values: dict[str, Any] = {"task": "segmentation", "out": files.run, "data.train.image": files.image}
    values |= {"data.train.labels": labels, "data.val.image": files.val_image or files.image}
    values |= {"data.val.labels": files.val_labels or labels, **classes.keys, "data.bands": bands[0]}
    notes = {**bands_note(bands[1]), **classes.notes}
    if mpp is not None:
        values |= {"data.mpp": mpp, "data.tissue": "auto"}
    draft = Draft(values=values, facts=[*facts, f"labels  {classes.fact}"], notes=notes)
    train, val, counts = _split(files, draft, is_folder=is_folder)
    names = classes.keys["data.classes"]
    if counts is None:
        counts = _counted(draft, train, len(names))
    else:
        draft.facts.append("labelled pixels of the training part:")
    draft.facts += shares_fact(names, counts, "px")
    sides = min(one.region.height for one in train), min(one.region.width for one in train)
    area = sum(one.region.height * one.region.width for one in train)
    _choose_tiles(draft, tile_size(sides, 16, 256 if coarse or area < 4e6 else 512), area)
    _choose_sampler(draft, names, counts)
    draft.values["data.augment"] = augment
    _measure(draft, train, val)
    _choose_model(draft, coarse=coarse)
    _name_outputs(files, draft, is_folder=is_folder, is_slide=slide)
    return draft


def _is_coarse(source: Source) -> bool:
    info = describe_source(source)
    least = _COARSE.get(info.units or "")
    return least is not None and info.resolution_xy is not None and min(info.resolution_xy) >= least


def _reading_mpp(source: SlideSource) -> float:
    if source.mpp is None:
        raise InputError(f"{source.path} doesn't say how large its pixels are; write data.slide_mpp into a config")
    return max(0.5, float(f"{source.mpp:.3g}"))


def _classes(paths: list[str], attribute: str | None, *, is_slide: bool) -> _Classes:
    return _vector_classes(paths, attribute) if is_slide or is_vector_name(paths[0]) else _mask_classes(paths)


def _vector_classes(paths: list[str], attribute: str | None) -> _Classes:
    column = attribute or _class_column(paths[0])
    found: Counter[Any] = Counter()
    for path in paths:
        frame = read_features(path, column)
        values = [None] * len(frame) if column is None or column not in frame else frame[column].tolist()
        if not _are_classes([value for value in values if not _is_absent(value)]):
            raise InputError(
                f"{path}: the column {column} must hold text or whole numbers to name classes; give another `attribute`"
            )
        found.update(None if _is_absent(value) else value for value in values)
    absent = sum(count for value, count in found.items() if _is_absent(value))
    named = [value for value in found if not _is_absent(value) and not is_ignored_class(value)]
    known = sorted(named, key=lambda value: (-found[value], str(value)))
    number, columns = sum(found.values()), [name for name in read_columns(paths[0]) if name != column]
    if not number:
        raise InputError(f"{paths[0]} has no polygons; give labels with polygons")
    more = f"; other columns: {', '.join(columns[:8])}" if columns else ""
    if column is None or not known:
        noun = _noun(paths[0])
        note = "Pixels outside of polygons are the first one, those inside the second; choose your own names."
        one: dict[str, Any] = {"data.classes": ["background", noun], "data.background": "background"}
        return _Classes(
            keys=one,
            notes={"data.classes": note},
            fact=f"{Path(paths[0]).name}: {number:,} polygons of one class{more}",
        )
    listed = ", ".join(f"{value} {found[value]:,}" for value in known[:20])
    fact = f"{Path(paths[0]).name}: {number:,} polygons, column {column}: {listed}{more}"
    keys: dict[str, Any] = {"data.attribute": column, **_named(known)}
    notes = {"data.attribute": f"Column with the classes{more}."}
    if absent:
        keys["data.ignore_values"] = [None]
        notes["data.ignore_values"] = f"{absent:,} polygons have no class; their pixels are left out."
    _choose_background(keys, notes, known)
    return _Classes(keys=keys, notes=notes, fact=fact)


def _choose_background(keys: dict[str, Any], notes: dict[str, str], known: list[Any]) -> None:
    named = next((name for name in keys["data.classes"] if name.lower() in ("background", "other")), None)
    if named is None and len(known) == 1:
        keys["data.classes"] = ["background", *keys["data.classes"]]
        if "data.values" in keys:
            unused = 0 if 0 not in keys["data.values"] else max(keys["data.values"]) + 1
            keys["data.values"] = [unused, *keys["data.values"]]
        named = "background"
    keys["data.background"] = named or "ignore"
    notes["data.background"] = (
        "Class of the pixels outside of all polygons; ignore if they may be of any class."
        if named
        else "Pixels outside of all polygons are unlabelled; name a class instead if they are of that class."
    )


def _is_absent(value: Any) -> bool:
    is_nan = isinstance(value, float) and math.isnan(value)
    return value is None or is_nan or (isinstance(value, str) and not value) or type(value).__name__ == "NaTType"


def _are_classes(values: list[Any]) -> bool:
    """Return whether all values are text, or all are whole numbers."""
    if all(isinstance(value, int | float) for value in values):
        return all(float(value).is_integer() for value in values)
    return all(isinstance(value, str) for value in values)


def _named(known: list[Any]) -> dict[str, Any]:
    """Return class names and, of numbers, the value of each class."""
    if all(isinstance(value, str) for value in known):
        return {"data.classes": known}
    values = sorted(int(value) for value in known)
    return {"data.classes": [f"class_{value}" for value in values], "data.values": values}


def _class_column(path: str) -> str | None:
    """Return the column of polygons that looks most like classes: by its name, or else by repeated texts."""
    columns = read_columns(path)
    lower = {name.lower(): name for name in reversed(columns)}
    candidates = [lower[name] for name in _CLASS_COLUMNS if name in lower]
    for name in [*candidates, *(each for each in columns if each not in candidates)]:
        values = [value for value in read_features(path, name)[name].tolist() if not _is_absent(value)]
        distinct = len(set(map(str, values)))
        repeats = distinct <= max(1, len(values) // 2) or (name in candidates and distinct <= len(values))
        # Lists and mappings are read as text.
        is_flat = not any(str(value).startswith(("[", "{")) for value in values)
        is_likely = is_flat and (name in candidates or all(isinstance(value, str) for value in values))
        if values and distinct <= _MOST_CLASSES and repeats and is_likely and _are_classes(values):
            return name
    return None


def _noun(path: str) -> str:
    words = [word.lower() for word in re.findall("[A-Za-z]+", Path(path.split("|")[0]).stem)]
    named = [word for word in words if word not in _NOT_NOUNS]
    if not named:
        return "foreground"
    return named[-1].removesuffix("s") if len(named[-1]) > 3 else named[-1]


def _mask_classes(paths: list[str]) -> _Classes:
    found: Counter[float] = Counter()
    for path in paths:
        found.update(_mask_values(path))
    values = sorted(found)
    if not values or len(values) > _MOST_CLASSES or any(not float(value).is_integer() for value in values):
        raise InputError(
            f"{paths[0]} has {len(values)} values, expected at most {_MOST_CLASSES} whole numbers, one for each class; "
            "give a mask of classes"
        )
    if len(values) == 1:
        raise InputError(
            f"{paths[0]} has no other value than {number_text(values[0])}, expected two or more; give a mask of classes"
        )
    whole = [int(value) for value in values]
    keys: dict[str, Any] = {}
    notes = {"data.values": "Value of each class in the mask, in the order of the names; choose your own names."}
    if 255 in whole and len(whole) > 2 and whole[-2] < _MOST_CLASSES:
        whole.remove(255)
        keys["data.ignore_values"] = [255]
        notes["data.ignore_values"] = "255 is taken for unlabelled pixels."
    is_binary = len(whole) == 2 and whole[0] == 0
    names = ["background", _noun(paths[0])] if is_binary else [f"class_{value}" for value in whole]
    background = {"data.background": "background"} if is_binary else {}
    counted = ", ".join(f"{number_text(value)}: {found[value]:,}" for value in values[:20])
    fact = f"{Path(paths[0]).name}: mask with the values (pixels read) {counted}"
    return _Classes(keys={"data.classes": names, "data.values": whole, **background, **keys}, notes=notes, fact=fact)


def _mask_values(path: str) -> Counter[float]:
    """Count the values of the valid pixels of a mask, in up to 64 windows."""
    found: Counter[float] = Counter()
    with open_raster(path) as mask:
        if mask.num_bands != 1:
            raise InputError(f"{path} has {mask.num_bands} bands, expected a mask with one; give the labels")
        windows = grid_windows(mask.extent, min(_WINDOW_PX, max(mask.height, mask.width)), 0)
        for index in np.random.default_rng(0).permutation(len(windows))[:64].tolist():
            image = mask.read(windows[index])
            values, counts = np.unique(image.pixels[0][image.valid], return_counts=True)
            found.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))
            if len(found) > 10 * _MOST_CLASSES:
                break
    return found


def _split(
    files: Files, draft: Draft, *, is_folder: bool
) -> tuple[list[LabelledSource], list[LabelledSource], list[int] | None]:
    """Open images and labels once, and set validation data apart; the pixels of each class are known for one scene."""
    config = build_config(SegmentationDataConfig, nested(draft.values, "data"))
    with windows_progress("opening the images", "images") as on_image:
        whole = open_labelled(config, config.train, "data.train", train=False, on_image=on_image)
        if files.val_image is not None:
            return whole, open_labelled(config, config.val, "data.val", train=False, on_image=on_image), None
    if is_folder:
        paths = [str(one.source.path) for one in whole]
        num_val = max(1, len(paths) // 4)
        if num_val == len(paths):
            raise InputError(f"{files.image} has one image, expected two or more; give images to validate on, too")
        draft.values |= {"data.train.image": paths[:-num_val], "data.val.image": paths[-num_val:]}
        draft.notes["data.val.image"] = "The last quarter of the images, by name."
        return whole[:-num_val], whole[-num_val:], None
    train, val, counts = _regions(whole[0], len(config.classes))
    draft.values = _with_regions(draft.values, train, val)
    draft.notes["data.val.region"] = "[row, col, height, width] in pixels: the quarter with most classes."
    return [replace(whole[0], region=train)], [replace(whole[0], region=val)], counts


def _counted(draft: Draft, train: Sequence[LabelledSource], num_classes: int) -> list[int]:
    """Count the pixels of each class, in large data in a part of the windows if it has all classes.

    Raises:
        InputError: Nothing is labelled.
    """
    total, place, counts = num_windows(train), "", [0]
    if total > _MOST_WINDOWS:
        with windows_progress("counting the pixels of the classes") as on_window:
            counts, _ = count_labelled_pixels(train, num_classes, max_windows=_MOST_WINDOWS, on_window=on_window)
        place = f"{_MOST_WINDOWS:,} of {total:,} windows of the training part, drawn at random"
    if not all(counts):
        place = "the training part, estimated" if total > _MOST_WINDOWS else "the training part"
        with windows_progress("looking for the pixels of each class") as on_window:
            counts = count_class_pixels(train, num_classes, max_windows=_MOST_WINDOWS, on_window=on_window)
    if not any(counts):
        raise InputError(
            f"{len(train)} images to train on, the first {train[0].source.path}, have no pixel that is valid and "
            "labelled; check that the labels lie on them"
        )
    draft.facts.append(f"labelled pixels of {place}:")
    return counts


def _with_regions(values: dict[str, Any], train: Window, val: Window) -> dict[str, Any]:
    """Add the regions behind the labels of their split."""
    regions = {"data.train.labels": ("data.train.region", train), "data.val.labels": ("data.val.region", val)}
    with_regions: dict[str, Any] = {}
    for key, value in values.items():
        with_regions[key] = value
        if key in regions:
            name, window = regions[key]
            with_regions[name] = [window.row, window.col, window.height, window.width]
    return with_regions


def _regions(whole: LabelledSource, num_classes: int) -> tuple[Window, Window, list[int]]:
    """Set apart the quarter at one of the four edges with which most classes are in both parts."""
    extent = whole.region
    rows, cols = (np.linspace(0, side, 5).astype(int).tolist() for side in (extent.height, extent.width))
    counts = np.zeros((4, 4, num_classes), np.int64)
    with windows_progress("counting the pixels of the classes", "parts") as on_part:
        for row, col in np.ndindex(4, 4):
            on_part(4 * row + col, 16)
            size = rows[row + 1] - rows[row], cols[col + 1] - cols[col]
            cell = Window(extent.row + rows[row], extent.col + cols[col], *size)
            counts[row, col] = count_class_pixels([replace(whole, region=cell)], num_classes)
    total = counts.sum((0, 1))
    if not total.any():
        raise InputError(
            f"{whole.source.path} has no pixel that is valid and labelled; check that the labels lie on it"
        )

    def balance(val: npt.NDArray[np.int64]) -> tuple[int, int, float]:
        # A class that isn't trained is worse than one that isn't validated.
        in_train, in_val = (part[total > 0] / total[total > 0] for part in (total - val, val))
        share = np.minimum(in_train, in_val)
        return int((in_train > 0).sum()), int((share > 0).sum()), float(np.minimum(share, 0.25).mean())

    height, width = extent.height, extent.width
    edges: list[tuple[npt.NDArray[np.int64], Window, Window]] = [
        (counts[:, 3].sum(0), Window(0, 0, height, cols[3]), Window(0, cols[3], height, width - cols[3])),
        (counts[3].sum(0), Window(0, 0, rows[3], width), Window(rows[3], 0, height - rows[3], width)),
        (counts[:, 0].sum(0), Window(0, cols[1], height, width - cols[1]), Window(0, 0, height, cols[1])),
        (counts[0].sum(0), Window(rows[1], 0, height - rows[1], width), Window(0, 0, rows[1], width)),
    ]
    in_val, train, val = max(edges, key=lambda edge: balance(edge[0]))
    return train, val, (total - in_val).tolist()


def _choose_tiles(draft: Draft, tile_px: int, area: int) -> None:
    tiles = int(np.clip(2 * area / tile_px**2, 64, 200)) // _BATCH_SIZE * _BATCH_SIZE
    draft.values |= {"data.tile_px": tile_px, "data.batch_size": _BATCH_SIZE, "data.tiles_per_epoch": tiles}
    draft.notes["data.tile_px"] = "Tile size in pixels, a multiple of the patches; larger tiles show more context."


def _choose_sampler(draft: Draft, names: Iterable[str], counts: list[int]) -> None:
    total = max(1, sum(counts))
    present = [(count / total, name) for name, count in zip(names, counts, strict=True) if count]
    share, rarest = min(present)
    draft.values["data.sampler"] = "balanced" if share < _RARE else "random"
    draft.notes["data.sampler"] = (
        f"{rarest} has {share:.2%} of the labelled pixels: balanced draws tiles of each class equally often."
        if share < _RARE
        else f"No class is rare ({rarest} has {share:.1%} of the labelled pixels): tiles are drawn anywhere."
    )


def _measure(draft: Draft, train: list[LabelledSource], val: list[LabelledSource]) -> None:
    """Check the data as training does, and write down the statistics of the bands."""
    config = build_config(SegmentationDataConfig, {**nested(draft.values, "data"), "sampler": "random"})
    with windows_progress("looking for labelled pixels") as on_window:
        measured = build_segmentation_datamodule(config, 0, on_window, opened=(train, val)).normalizer
    statistics = {"data.mean": rounded(measured.mean), "data.std": rounded(measured.std)}
    draft.notes["data.mean"] = "Measured on the training part; those of the pretraining suit a pretrained backbone."
    place = list(draft.values).index("data.bands") + 1
    items = list(draft.values.items())
    draft.values = dict([*items[:place], *statistics.items(), *items[place:]])


def _choose_model(draft: Draft, *, coarse: bool) -> None:
    kwargs = {"patch_size": 8, "depth": 6, "drop_path_rate": 0.1} if coarse else {"drop_path_rate": 0.1}
    draft.values |= {
        "model.backbone": "performer_vit_tiny_patch16_224",
        "model.backbone_kwargs": kwargs,
        "optim.lr": 0.001,
        "optim.loss": {"ce": 1.0, "dice": 1.0},
        "trainer.max_epochs": 10,
        "trainer.precision": "auto",
    }
    draft.notes["model.backbone"] = BACKBONE_NOTE
    draft.notes["optim.loss"] = "Cross-entropy and soft Dice, which gives small classes the weight of large ones."
    draft.notes["trainer.max_epochs"] = "More epochs give better maps: increase it while val/iou in metrics.csv rises."


def _name_outputs(files: Files, draft: Draft, *, is_folder: bool, is_slide: bool) -> None:
    region = draft.values.get("data.val.region")
    scored = [files.val_image or files.first_image, "--labels", files.val_labels or str(files.labels)]
    draft.evaluate = ["--input", *scored, *(["--region", *map(str, region)] if region else [])]
    if is_folder and files.val_image is None:
        draft.facts.append(
            "evaluate scores all images of the folder, also those trained on; give --val-image for others"
        )
    mapped = draft.values["data.val.image"] if is_folder else files.first_image
    mapped = mapped[0] if isinstance(mapped, list) else mapped
    draft.predict = ["--input", mapped, "--output", f"{files.run}/map{'.ome.tif' if is_slide else '.tif'}"]
