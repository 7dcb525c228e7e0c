"""Turn xView's GeoJSON of boxes into COCO's JSON: python datasets/xview/prepare.py xView OUT."""

import json
from collections import Counter
from pathlib import Path

import typer

from perf_vit.errors import InputError, PerfVitError
from perf_vit.labels.objects import validate_labels
from perf_vit.labels.objects.records import RawImage, RawObject
from perf_vit.writers import write_coco_labels

# From xview_class_labels.txt of the publisher's repository DIUx-xView/xView1_baseline.
CLASSES = {
    11: "Fixed-wing Aircraft",
    12: "Small Aircraft",
    13: "Passenger/Cargo Plane",
    15: "Helicopter",
    17: "Passenger Vehicle",
    18: "Small Car",
    19: "Bus",
    20: "Pickup Truck",
    21: "Utility Truck",
    23: "Truck",
    24: "Cargo Truck",
    25: "Truck Tractor w/ Box Trailer",
    26: "Truck Tractor",
    27: "Trailer",
    28: "Truck Tractor w/ Flatbed Trailer",
    29: "Truck Tractor w/ Liquid Tank",
    32: "Crane Truck",
    33: "Railway Vehicle",
    34: "Passenger Car",
    35: "Cargo/Container Car",
    36: "Flat Car",
    37: "Tank car",
    38: "Locomotive",
    40: "Maritime Vessel",
    41: "Motorboat",
    42: "Sailboat",
    44: "Tugboat",
    45: "Barge",
    47: "Fishing Vessel",
    49: "Ferry",
    50: "Yacht",
    51: "Container Ship",
    52: "Oil Tanker",
    53: "Engineering Vehicle",
    54: "Tower crane",
    55: "Container Crane",
    56: "Reach Stacker",
    57: "Straddle Carrier",
    59: "Mobile Crane",
    60: "Dump Truck",
    61: "Haul Truck",
    62: "Scraper/Tractor",
    63: "Front loader/Bulldozer",
    64: "Excavator",
    65: "Cement Mixer",
    66: "Ground Grader",
    71: "Hut/Tent",
    72: "Shed",
    73: "Building",
    74: "Aircraft Hangar",
    76: "Damaged Building",
    77: "Facility",
    79: "Construction Site",
    83: "Vehicle Lot",
    84: "Helipad",
    86: "Storage Tank",
    89: "Shipping container lot",
    91: "Shipping Container",
    93: "Pylon",
    94: "Tower",
}


def prepare(source: Path, out: Path) -> None:
    """Read SOURCE/xView_train.geojson and SOURCE/train_images, and write OUT/train.json."""
    labels, images = source / "xView_train.geojson", source / "train_images"
    found, left_out = read_features(labels, images)
    index = validate_labels(found, classes=list(CLASSES.values()))
    out.mkdir(parents=True, exist_ok=True)
    write_coco_labels(out / "train.json", index, images)
    print(f"{len(index)} images, {index.counts['objects']} objects; left out: {dict(left_out) or 'none'}")


def read_features(labels: Path, images: Path) -> tuple[list[RawImage], Counter[str]]:
    """The objects of each image of the folder (but `._*.tif`, which a Mac leaves), and what was left out, by reason."""
    raw = {p.name: RawImage(path=str(p), labels=str(labels), objects=[]) for p in sorted(images.glob("[!.]*.tif"))}
    left_out: Counter[str] = Counter()
    try:
        for feature in json.loads(labels.read_bytes())["features"]:
            values = feature["properties"]
            name, box = CLASSES.get(int(values["type_id"])), [float(v) for v in values["bounds_imcoords"].split(",")]
            if values["image_id"] not in raw:
                left_out[f"of the missing image {values['image_id']}"] += 1
            elif name is None:
                left_out[f"of type_id {values['type_id']}, which has no name"] += 1
            else:
                raw[values["image_id"]].objects.append(RawObject(name=name, box=box))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"can't read {labels} as xView's labels: {type(error).__name__} {error}") from error
    return list(raw.values()), left_out


if __name__ == "__main__":
    try:
        typer.run(prepare)
    except PerfVitError as error:
        raise SystemExit(f"error: {error}") from None
