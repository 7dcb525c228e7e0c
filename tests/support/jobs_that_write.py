"""Every command that writes files, on small inputs with untrained models."""

import csv
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import timm
from affine import Affine
from safetensors.torch import save_file
from small_models import save_classifier, save_segmenter, save_slide_classifier, save_small_detector
from synthetic_slide import make_slide

CPU = ["--device", "cpu"]
VRT = """<VRTDataset rasterXSize="64" rasterYSize="64"><SRS>EPSG:32636</SRS>
<GeoTransform>500000, 1, 0, 4000000, 0, -1</GeoTransform>{}</VRTDataset>"""
VRT_BAND = """<VRTRasterBand dataType="Byte" band="{0}"><SimpleSource>
<SourceFilename relativeToVRT="1">{1}</SourceFilename><SourceBand>{0}</SourceBand></SimpleSource></VRTRasterBand>"""


@dataclass(frozen=True)
class Job:
    """A command line in a folder.

    Attributes:
        args: of the command, without `--overwrite`.
        inputs: files that it reads.
        outputs: files that it writes.
        overwrite: whether it has the option.
        is_slow: too slow to be run to the end here.
    """

    args: list[Any]
    inputs: list[Path]
    outputs: list[Path]
    overwrite: bool = True
    is_slow: bool = False


def write_scene(path: Path, seed: int = 0, col: int = 0) -> Path:
    """A raster of 64 x 64 px and three bands of bytes."""
    pixels = np.random.default_rng(seed).integers(1, 255, (3, 64, 64)).astype(np.uint8)
    return _write(path, pixels, col)


def write_mask(path: Path) -> Path:
    """A raster of two classes."""
    return _write(path, np.tri(64, dtype=np.uint8)[None], 0)


def _write(path: Path, pixels: np.ndarray, col: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    profile = {"driver": "GTiff", "height": 64, "width": 64, "dtype": "uint8", "crs": "EPSG:32636"}
    transform = Affine(1, 0, 5e5 + col, 0, -1, 4e6)
    with rasterio.open(path, "w", count=len(pixels), transform=transform, **profile) as file:
        file.write(pixels)
    return path


def record_of(output: Path) -> Path:
    """The hidden file that keeps what an output was made of."""
    return output.with_name(f".{output.name}.perf_vit.json")


def _predict(checkpoint: Path, given: Path | str, output: Path, *extra: str) -> list[Any]:
    return ["predict", "--checkpoint", checkpoint, "--input", given, "--output", output, *CPU, *extra]


def predict_map(root: Path) -> Job:
    """One raster, with quicklook and polygons."""
    checkpoint, scene = save_segmenter(root / "model.ckpt"), write_scene(root / "in" / "scene.tif")
    outputs = [root / "out" / f"map.{suffix}" for suffix in ("tif", "png", "geojson", "qml", "tif.aux.xml", "html")]
    args = _predict(checkpoint, scene, outputs[0], "--polygons", "geojson")
    return Job(args, [checkpoint, scene], [*outputs, record_of(outputs[2])])


def predict_map_of_vrt(root: Path) -> Job:
    """A virtual raster of a virtual raster."""
    checkpoint, scene = save_segmenter(root / "model.ckpt"), write_scene(root / "in" / "tiles" / "scene.tif")
    inner, outer = root / "in" / "inner.vrt", root / "in" / "outer.vrt"
    for path, member in ((inner, "tiles/scene.tif"), (outer, "inner.vrt")):
        path.write_text(VRT.format("".join(VRT_BAND.format(band, member) for band in (1, 2, 3))))
    outputs = [root / "out" / f"map.{suffix}" for suffix in ("tif", "png", "html", "qml", "tif.aux.xml")]
    return Job(_predict(checkpoint, outer, outputs[0]), [checkpoint, outer, inner, scene], outputs)


def _mosaic(root: Path, given: str) -> Job:
    checkpoint = save_segmenter(root / "model.ckpt")
    tiles = [write_scene(root / "in" / f"{number}.tif", number, 64 * number) for number in range(2)]
    items = [{"assets": {"data": {"href": tile.name, "roles": ["data"]}}} for tile in tiles]
    (root / "in" / "items.json").write_text(json.dumps(items))
    outputs = [root / "out" / f"map.{suffix}" for suffix in ("tif", "png", "html", "qml", "tif.aux.xml")]
    listed = [root / "in" / given] if given.endswith(".json") else []
    args = _predict(checkpoint, f"{root}/in/{given}", outputs[0], "--mosaic")
    return Job(args, [checkpoint, *tiles, *listed], outputs)


def predict_map_of_folder(root: Path) -> Job:
    """A folder read as one scene."""
    return _mosaic(root, "")


def predict_map_of_pattern(root: Path) -> Job:
    """A pattern read as one scene."""
    return _mosaic(root, "*.tif")


def predict_map_of_items(root: Path) -> Job:
    """A list of STAC items read as one scene."""
    return _mosaic(root, "items.json")


def predict_maps(root: Path) -> Job:
    """A list of rasters, one of them virtual."""
    checkpoint, scene = save_segmenter(root / "model.ckpt"), write_scene(root / "in" / "scene.tif")
    virtual, listed = root / "in" / "virtual.vrt", root / "in" / "list.csv"
    member = write_scene(root / "in" / "member.tif", 1)
    virtual.write_text(VRT.format("".join(VRT_BAND.format(band, "member.tif") for band in (1, 2, 3))))
    listed.write_text("path\nscene.tif\nvirtual.vrt\n")
    folder = root / "out" / "maps"
    endings = ("tif", "png", "gpkg", "qml", "tif.aux.xml")
    outputs = [folder / f"{name}.{ending}" for name in ("scene", "virtual") for ending in endings]
    outputs += [record_of(folder / f"{name}.gpkg") for name in ("scene", "virtual")]
    args = _predict(checkpoint, listed, folder, "--polygons", "gpkg")
    outputs += [folder / "report.json", folder / "report.html"]
    return Job(args, [checkpoint, scene, virtual, member, listed], outputs)


def predict_objects(root: Path, suffix: str = "gpkg") -> Job:
    """The objects of one raster."""
    checkpoint, scene = save_small_detector(root / "model.ckpt"), write_scene(root / "in" / "scene.tif")
    output = root / "out" / f"found.{suffix}"
    beside = [output.with_suffix(ending) for ending in (".png", ".html", *([] if suffix == "json" else [".qml"]))]
    return Job(_predict(checkpoint, scene, output), [checkpoint, scene], [output, *beside, record_of(output)])


def predict_objects_of_many(root: Path) -> Job:
    """The objects of a folder of rasters."""
    checkpoint = save_small_detector(root / "model.ckpt")
    scenes = [write_scene(root / "in" / f"{number}.tif", number) for number in range(2)]
    folder = root / "out" / "found"
    outputs = [folder / "0.json", folder / "1.json"]
    args = _predict(checkpoint, root / "in", folder, "--polygons", "json")
    records = [*(record_of(output) for output in outputs), *(output.with_suffix(".png") for output in outputs)]
    return Job(args, [checkpoint, *scenes], [*outputs, *records, folder / "report.json", folder / "report.html"])


def predict_results_of_many(root: Path) -> Job:
    """COCO results of the images of a COCO file, each in a file and all in one."""
    checkpoint = save_small_detector(root / "model.ckpt")
    scenes = [write_scene(root / "in" / "images" / f"{number}.tif", number) for number in range(2)]
    listed = [{"id": 7 + number, "file_name": f"{number}.tif", "height": 64, "width": 64} for number in range(2)]
    labels = root / "in" / "labels.json"
    labels.write_text(json.dumps({"images": listed, "annotations": [], "categories": [{"id": 3, "name": "car"}]}))
    folder = root / "out" / "found"
    names = ("0.json", "1.json", "0.png", "1.png", "coco_results.json", "report.json", "report.html")
    args = _predict(checkpoint, scenes[0].parent, folder, "--coco-images", labels)
    outputs = [*(folder / name for name in names), *(record_of(folder / name) for name in names[:2])]
    return Job(args, [checkpoint, labels, *scenes], outputs)


def _predict_images(root: Path, kind: str) -> Job:
    checkpoint, scene = save_classifier(root / "model.ckpt", kind), write_scene(root / "in" / "scene.tif")
    listed, output = root / "in" / "list.csv", root / "out" / "found.csv"
    listed.write_text("path,label\nscene.tif,a\n")
    outputs = [output, output.with_suffix(".html"), record_of(output)]
    return Job(_predict(checkpoint, listed, output), [checkpoint, scene, listed], outputs)


def predict_classes(root: Path) -> Job:
    """Classes of images in a list."""
    return _predict_images(root, "single_label")


def predict_numbers(root: Path) -> Job:
    """Numbers of images in a list."""
    return _predict_images(root, "regression")


def _slide(root: Path) -> tuple[Path, Path]:
    slide = root / "in" / "a.svs"
    slide.parent.mkdir()
    make_slide(slide, 640, 600, mpp=0.5, tile_px=64, tissue_share=0.5)
    return save_slide_classifier(root / "run" / "checkpoints" / "model.ckpt"), slide


def predict_slide_classes(root: Path) -> Job:
    """A slide's class, and where the classifier looked."""
    checkpoint, slide = _slide(root)
    output = root / "out" / "found.csv"
    attention = [root / "out" / "found_attention" / name for name in ("a.png", "a.geojson", "tissue/a.png")]
    outputs = [output, output.with_suffix(".html"), record_of(output), *attention]
    return Job(_predict(checkpoint, slide, output), [checkpoint, slide], outputs)


def _evaluate(root: Path, checkpoint: Path, given: Path, labels: Path, inputs: list[Path], *endings: str) -> Job:
    report = root / "out" / "scores.json"
    args = ["evaluate", "--checkpoint", checkpoint, "--input", given, "--labels", labels, "--json", report, *CPU]
    outputs = [report, report.with_suffix(".html"), *(report.with_name(f"scores{ending}.png") for ending in endings)]
    return Job(args, [checkpoint, *inputs], outputs)


def evaluate_maps(root: Path) -> Job:
    """A raster and its mask."""
    checkpoint, scene = save_segmenter(root / "model.ckpt"), write_scene(root / "in" / "scene.tif")
    mask = write_mask(root / "in" / "mask.tif")
    return _evaluate(root, checkpoint, scene, mask, [scene, mask], "", "_confusion")


def evaluate_maps_of_folder(root: Path) -> Job:
    """A folder of rasters and a folder of masks."""
    checkpoint, scene = save_segmenter(root / "model.ckpt"), write_scene(root / "in" / "images" / "a.tif")
    mask = write_mask(root / "in" / "masks" / "a.tif")
    return _evaluate(root, checkpoint, scene.parent, mask.parent, [scene, mask], "", "_confusion")


def evaluate_objects(root: Path) -> Job:
    """A raster and a table of boxes."""
    checkpoint, scene = save_small_detector(root / "model.ckpt"), write_scene(root / "in" / "images" / "a.tif")
    labels = root / "in" / "labels.csv"
    labels.write_text("image,xmin,ymin,xmax,ymax,label\na.tif,5,5,20,20,car\n")
    return _evaluate(root, checkpoint, scene.parent, labels, [scene, labels], "", "_confusion")


def _labelled(root: Path, column: str, values: list[Any]) -> tuple[list[Path], Path]:
    images = [write_scene(root / "in" / "images" / f"{number}.tif", number) for number in range(len(values))]
    table = root / "in" / "labels.csv"
    with table.open("w", newline="") as file:
        csv.writer(file).writerows([["image", column], *zip((image.name for image in images), values, strict=True)])
    return images, table


def evaluate_classes(root: Path) -> Job:
    """Images and a table of their classes."""
    images, table = _labelled(root, "label", ["a", "b"])
    checkpoint = save_classifier(root / "model.ckpt", "single_label")
    endings = ("", "_precision_recall")
    return _evaluate(root, checkpoint, images[0].parent, table, [*images, table], *endings)


def evaluate_numbers(root: Path) -> Job:
    """Images and a table of numbers."""
    images, table = _labelled(root, "height", [1.5, 2.5])
    checkpoint = save_classifier(root / "model.ckpt", "regression")
    return _evaluate(root, checkpoint, images[0].parent, table, [*images, table])


def evaluate_slide_classifier(root: Path) -> Job:
    """A slide and a table of classes."""
    checkpoint, slide = _slide(root)
    table = root / "labels.csv"
    table.write_text("slide,label\na.svs,small\n")
    return _evaluate(root, checkpoint, slide.parent, table, [slide, table], "", "_precision_recall")


RUN = ["config.yaml", "metrics.csv", "loss_curve.png", "report.html", "checkpoints/best.ckpt", "checkpoints/last.ckpt"]


def _train(root: Path, config: str, overrides: list[str], inputs: list[Path], *more: str) -> Job:
    path, run = root / "in" / "run.yaml", root / "out" / "run"
    path.parent.mkdir(exist_ok=True)
    path.write_text(config)
    command = "distill" if "model: {backbone" in config else "train"
    outputs = [run / name for name in (*RUN, *more)]
    return Job([command, path, f"out={run}", *overrides], [path, *inputs], outputs, overwrite=False, is_slow=True)


def train_maps(root: Path) -> Job:
    """Segmentation."""
    scene = write_scene(root / "in" / "scene.tif")
    mask = write_mask(root / "in" / "mask.tif")
    files = [
        f"data.{part}.{key}={file}" for part in ("train", "val") for key, file in (("image", scene), ("labels", mask))
    ]
    return _train(
        root,
        "extends: configs/segmentation/demo.yaml\n",
        files,
        [scene, mask],
        "pictures/epoch_0001.png",
        "tensorboard/x",
    )


def train_objects(root: Path) -> Job:
    """Detection."""
    job = evaluate_objects(root)
    scene, labels = job.inputs[1:]
    files = [f"data.{part}.{key}" for part in ("train", "val") for key in (f"image={scene.parent}", f"labels={labels}")]
    return _train(
        root, "task: detection\nextends: configs/detection/cars_aerial.yaml\n", files, [scene, labels], "pictures/x.png"
    )


def train_classes(root: Path) -> Job:
    """Classification."""
    images, table = _labelled(root, "label", ["a", "b"])
    config = "task: classification\nextends: configs/classification/scenes.yaml\n"
    files = [f"data.train.image={images[0].parent}", f"data.train.labels={table}"]
    return _train(root, config, files, [*images, table], "wandb/x")


def train_slide_classifier(root: Path) -> Job:
    """Slides; features that exist are used, so no name of theirs is among the outputs."""
    _, slide = _slide(root)
    table = root / "in" / "labels.csv"
    table.write_text("slide,label\na.svs,small\n")
    config = "task: slide_classification\nextends: configs/slide_classification/tumour.yaml\n"
    files = [f"data.train.labels={table}", f"data.train.image={slide.parent}"]
    return _train(root, config, files, [slide, table])


def distill(root: Path) -> Job:
    """A student."""
    scene = write_scene(root / "in" / "scene.tif")
    config = "model: {backbone: vit_tiny_patch16_224}\n"
    files = [f"data.train.image=[{scene}]", f"data.val.image=[{scene}]"]
    return _train(root, config, files, [scene], "student/config.json", "student/model.safetensors")


def convert(root: Path) -> Job:
    """A softmax ViT with weights of a file."""
    weights = root / "in" / "weights.safetensors"
    weights.parent.mkdir(parents=True)
    kwargs = {"num_classes": 0, "img_size": 32}
    save_file(timm.create_model("test_vit", **kwargs).state_dict(), weights)
    scene = write_scene(root / "in" / "scene.tif")
    outputs = [root / "out" / "linear" / name for name in ("model.safetensors", "config.json", "fidelity.html")]
    sizes = ["--img-size", "32", "--window-size", "2", "--num-clusters", "4", "--max-exact-tokens", "0"]
    args = ["convert", "test_vit", "--out", outputs[0].parent, "--weights", weights, *sizes]
    args += ["--num-classes", "0", "--images", scene]
    return Job(args, [weights, scene], outputs)


def demo(root: Path) -> Job:
    """The demo."""
    folder = root / "out"
    names = ["scene/scene.tif", "scene/ships.geojson", "map.tif", "map.png", "scores.json", "report.html"]
    outputs = [folder / name for name in (*names, *(f"run/{name}" for name in RUN))]
    return Job(["demo", "--out", folder], [], outputs, is_slow=True)


JOBS: list[Callable[[Path], Job]] = [
    predict_map,
    predict_map_of_vrt,
    predict_map_of_folder,
    predict_map_of_pattern,
    predict_map_of_items,
    predict_maps,
    predict_objects,
    predict_objects_of_many,
    predict_results_of_many,
    predict_classes,
    predict_numbers,
    predict_slide_classes,
    evaluate_maps,
    evaluate_maps_of_folder,
    evaluate_objects,
    evaluate_classes,
    evaluate_numbers,
    evaluate_slide_classifier,
    train_maps,
    train_objects,
    train_classes,
    train_slide_classifier,
    distill,
    convert,
    demo,
]
