"""First configs of object detection."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from perf_vit.config import build_config
from perf_vit.data import DetectionDataConfig, build_detection_datamodule
from perf_vit.errors import InputError
from perf_vit.labels.objects import ImageRecord, ObjectIndex, read_object_labels
from perf_vit.sources import is_vector_name, open_source
from perf_vit.workflows.first_config.draft import (
    BACKBONE_NOTE,
    Draft,
    Files,
    augmentation_for,
    bands_note,
    data_values,
    image_fact,
    rounded,
    shares_fact,
    tile_size,
)
from perf_vit.workflows.progress import windows_progress, working

__all__ = ["draft_detection"]

# Ratio of the numbers of objects of two classes above which tiles are drawn by class.
_IMBALANCE = 5
_LARGEST_TILE_PX = 640
_IMAGES_LOOKED_AT = 64
_HEADS = {"instances": "mask_rcnn", "dota": "oriented_fcos"}


def draft_detection(files: Files) -> Draft:
    """Draft a config of object detection.

    Raises:
        InputError: Files can't be read or don't fit each other, or the format isn't recognised.
        OptionError: There are no labels.
    """
    labels = files.required_labels("a label file, or a folder with one for each image")
    label_format = files.label_format or _recognised(Path(labels))
    index = _read(files, labels, label_format)
    counts = index.class_counts()
    if not sum(counts.values()):
        raise InputError(f"{labels} has no objects to learn from; check the labels")
    with open_source(index.records[0].path) as source:
        augment = augmentation_for(source)
        names, has_crs = source.band_names, source.crs is not None
        facts = [f"images  {len(index)}, the first {image_fact(source)}"]
    bands, differ = _common_bands([record.path for record in index])
    facts += [differ] if differ else []
    sides = _object_sides(index)
    small, middle, large = (float(value) for value in np.percentile(sides, [10, 50, 90]))
    sizes = f"sides of {small:.0f}, {middle:.0f} and {large:.0f} px (10th, 50th and 90th percentile)"
    facts += [f"labels  {Path(labels).name}: {label_format}, {len(sides):,} objects with {sizes}"]
    facts += shares_fact(list(counts), list(counts.values()), "objects")
    values: dict[str, Any] = {"task": "detection", "out": files.run, "data.train.image": files.image}
    values |= {"data.train.labels": labels, "data.train.label_format": label_format}
    draft = Draft(values=values, facts=facts)
    scored = _set_apart(files, draft, index, label_format)
    values |= {"data.classes": list(index.classes), "data.bands": bands, "data.mean": None, "data.std": None}
    draft.notes |= bands_note(names)
    if files.attribute is not None:
        values["data.attribute"] = files.attribute
    _choose_tiles(draft, index, large)
    _choose_sampler(draft, counts)
    values["data.augment"] = augment
    _choose_model(draft, label_format, small, large)
    _measure(draft)
    draft.evaluate = scored
    draft.predict = ["--input", _first_scored(files, index, draft)]
    draft.predict += ["--output", f"{files.run}/objects.{'gpkg' if has_crs else 'geojson'}"]
    return draft


def _common_bands(paths: Sequence[str]) -> tuple[list[int] | None, str | None]:
    """Return the bands that a sample of the images has, None for those of each image, and a line if they differ.

    Raises:
        InputError: Grey images are among others than those of three bands: their only common band is the first.
    """
    order = np.random.default_rng(0).permutation(len(paths))[:_IMAGES_LOOKED_AT].tolist()
    with windows_progress("looking at the bands", "images") as on_image:
        counts, first = Counter[int](), dict[int, str]()
        for done, place in enumerate(order, 1):
            with open_source(paths[place]) as source:
                counts[source.num_bands] += 1
                first.setdefault(source.num_bands, source.path)
            on_image(done, len(order))
    if len(counts) == 1:
        return list(range(1, min(counts) + 1)), None
    listed = ", ".join(f"{num} in {images}" for num, images in sorted(counts.items()))
    differ = f"bands   their number differs among {len(order)} images looked at ({listed} of them)"
    if set(counts) == {1, 3}:
        return None, f"{differ}; grey images are read as three equal bands"
    if min(counts) == 1:
        listed = ", ".join(f"{num} in {images} (the first {first[num]})" for num, images in sorted(counts.items()))
        raise InputError(
            f"images have different numbers of bands, {listed}, expected one number, or grey images among those of 3 "
            "bands; leave out or convert the others"
        )
    return list(range(1, min(counts) + 1)), f"{differ}; all have the first {min(counts)}"


def _read(files: Files, labels: str, label_format: str) -> ObjectIndex:
    with working("reading the labels"):
        return read_object_labels(
            labels,
            files.image,
            label_format=label_format,
            attribute=files.attribute,
            oriented=label_format == "dota",
        )


def _recognised(labels: Path) -> str:
    """Return the format of labels of objects, by their names and first lines."""
    if labels.suffix.lower() == ".csv":
        return "csv"
    if labels.suffix.lower() == ".json":
        return "coco"
    if is_vector_name(str(labels)):
        return "polygons"
    endings = {path.suffix.lower() for path in labels.rglob("*") if path.is_file()} if labels.is_dir() else set()
    if ".xml" in endings:
        return "polygons" if is_vector_name(str(min(labels.rglob("*.xml")))) else "voc"
    if ".txt" in endings:
        return "dota" if any(map(_is_dota, sorted(labels.rglob("*.txt"))[:20])) else "yolo"
    if endings & {".geojson", ".gpkg", ".shp"}:
        return "polygons"
    if endings & {".png", ".tif", ".tiff"}:
        return "instances"
    raise InputError(f"the format of {labels} isn't recognised; give `label_format`: coco, voc, yolo, dota, csv, ...")


def _is_dota(path: Path) -> bool:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    fields = next((line.split() for line in lines if re.match(r"\s*-?\d", line)), [])
    return len(fields) >= 9 and not re.fullmatch(r"-?[\d.]+", fields[8])


def _object_sides(index: ObjectIndex) -> list[float]:
    """Return the geometric mean of the sides of each object, in pixels."""
    boxes = np.concatenate([record.boxes_xyxy[~record.ignored] for record in index])
    found: list[float] = np.sqrt((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).tolist()
    return found


def _set_apart(files: Files, draft: Draft, index: ObjectIndex, label_format: str) -> list[str]:
    """Set validation images apart; return the arguments that score them."""
    if files.val_image is not None:
        draft.values |= {"data.val.image": files.val_image, "data.val.labels": files.val_labels or files.labels}
        draft.values["data.val.label_format"] = label_format
        return ["--input", files.val_image, "--labels", str(draft.values["data.val.labels"])]
    draft.values |= {
        "data.val.image": files.image,
        "data.val.labels": files.labels,
        "data.val.label_format": label_format,
    }
    scored = ["--input", files.all_images, "--labels", str(files.labels)]
    if len(index) < 2:
        draft.facts.append("There is one image: it is trained on and validated on; give --val-image for honest scores.")
        return scored
    chosen = set(_chosen(index.records))
    for part, is_val in (("train", False), ("val", True)):
        names = [files.name(each.path) for place, each in enumerate(index) if (place in chosen) is is_val]
        draft.files[files.beside(f"_{part}.txt")] = "\n".join(names) + "\n"
    # The keys of a split stand together.
    items = {f"data.{part}.label_format": (f"data.{part}.names", f"_{part}.txt") for part in ("train", "val")}
    values: dict[str, Any] = {}
    for key, value in draft.values.items():
        values[key] = value
        if key in items:
            values[items[key][0]] = files.beside(items[key][1])
    draft.values.clear()
    draft.values.update(values)
    draft.notes["data.val.names"] = f"{len(chosen)} images drawn at random, with all classes if possible."
    return [*scored, "--names", files.beside("_val.txt")]


def _chosen(records: Sequence[ImageRecord]) -> list[int]:
    """Draw a fifth of the images to validate on, with as many classes as possible."""
    num_val = max(1, round(len(records) / 5))
    draws = [np.random.default_rng(seed).permutation(len(records))[:num_val].tolist() for seed in range(20)]
    return max(draws, key=lambda draw: len({label for place in draw for label in records[place].labels.tolist()}))


def _first_scored(files: Files, index: ObjectIndex, draft: Draft) -> str:
    if files.val_image is not None:
        return files.val_image
    names = draft.files.get(files.beside("_val.txt"), "").splitlines()
    return next((each.path for each in index if names and files.name(each.path) == names[0]), index.records[0].path)


def _choose_tiles(draft: Draft, index: ObjectIndex, large: float) -> None:
    sides = [min(record.height, record.width) for record in index]
    wanted = min(_LARGEST_TILE_PX, max(256, -(-4 * int(large) // 32) * 32))
    draft.values |= {"data.tile_px": tile_size([int(np.median(sides))], 32, wanted), "data.batch_size": 4}
    draft.values["data.tiles_per_epoch"] = 200
    draft.notes["data.tile_px"] = "Tile size in pixels, about four times the side of large objects."


def _choose_sampler(draft: Draft, counts: dict[str, int]) -> None:
    present = {name: count for name, count in counts.items() if count}
    rarest, most = min(present, key=present.__getitem__), max(present.values())
    is_rare = most > _IMBALANCE * present[rarest]
    draft.values["data.sampler"] = "balanced" if is_rare else "objects"
    draft.notes["data.sampler"] = (
        f"{rarest} is rare ({present[rarest]:,} of {sum(present.values()):,}): classes are drawn equally often."
        if is_rare
        else "Tiles are cut around objects, all equally often."
    )


def _choose_model(draft: Draft, label_format: str, small: float, large: float) -> None:
    head = _HEADS.get(label_format, "fcos")
    # The finest level sees a small object in three cells or more, the coarsest a large one in eight or fewer.
    first = min(16, max(2, 1 << max(0, int(np.log2(max(1.0, small / 3))))))
    strides = [first * 2**step for step in range(5) if step < 3 or first * 2 ** (step - 1) * 8 < large]
    kwargs: dict[str, Any] = {"hidden": 256, "proposals_per_tile": 300, "detections_per_tile": 400}
    draft.values |= {
        "model.backbone": "resnet18",
        "model.strides": strides,
        "model.channels": 64,
        "model.head": head,
        "model.head_kwargs": kwargs if head == "mask_rcnn" else {"num_convs": 2, "detections_per_tile": 500},
        "optim.lr": 0.001,
        "trainer.max_epochs": 10,
        "trainer.precision": "auto",
    }
    draft.notes["model.backbone"] = BACKBONE_NOTE
    draft.notes["model.strides"] = f"Strides of the levels in pixels; objects have sides from {small:.0f} px."
    draft.notes["trainer.max_epochs"] = "More epochs find more: increase it while val/ap50 in metrics.csv rises."


def _measure(draft: Draft) -> None:
    """Open the data as training does, and write down the statistics of the bands."""
    oriented = draft.values["model.head"] == "oriented_fcos"
    with data_values(draft) as data, working("opening the images"):
        measured = build_detection_datamodule(build_config(DetectionDataConfig, data), 0, oriented=oriented).normalizer
    draft.values |= {"data.mean": rounded(measured.mean), "data.std": rounded(measured.std)}
    draft.notes["data.mean"] = "Measured on the training images; those of the pretraining suit a pretrained backbone."
