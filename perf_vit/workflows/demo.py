"""The whole road on a scene that it makes itself."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perf_vit.errors import extra

with extra("train", "the demo"):
    from perf_vit.data import make_ship_scene
    from perf_vit.data.synthetic import ShipScene
    from perf_vit.labels import open_labels
    from perf_vit.plotting import colorize, default_colormap
    from perf_vit.reporting import Page, Preview, Row, picture_layer, read_picture
    from perf_vit.reporting.preview import pixel_size
    from perf_vit.reporting.samples import class_legend, imagery
    from perf_vit.sources import RasterSource, open_raster
    from perf_vit.tasks.callbacks import plot_history
    from perf_vit.workflows.evaluate import evaluate
    from perf_vit.workflows.predict import predict
    from perf_vit.workflows.progress import note
    from perf_vit.workflows.run_folder import RUN_FILES, check_run_files
    from perf_vit.workflows.task import Evaluation
    from perf_vit.workflows.train import Run, train
    from perf_vit.writers import check_outputs, existing_error, existing_outputs

__all__ = ["Demo", "run_demo", "write_report"]


@dataclass(frozen=True, kw_only=True)
class Demo:
    """What a demo made.

    Attributes:
        map: Path of the map.
        report: Path of the report, an HTML page.
        scores: Scores of the lower half.
        seconds: Time of all of it.
    """

    map: Path
    report: Path
    scores: Evaluation
    seconds: float

    @property
    def iou(self) -> float:
        """IoU of ships."""
        return next(float(row["iou"]) for row in self.scores.table if row["name"] == "ship")


def run_demo(out: Path, seed: int = 0, *, overwrite: bool = False) -> Demo:
    """Make a scene, train on its upper half, score its lower half, map all of it, write `report.html`.

    Args:
        out: folder for all of that.
        seed: decides the scene and the training.
        overwrite: replace an earlier demo in the folder.

    Raises:
        OutputError: a file exists without `overwrite`, or `run` is a folder of something else; nothing is written then.
    """
    run = out / "run"
    check_outputs(_files(out), [], overwrite=overwrite)
    if not overwrite and (found := existing_outputs(run / name for name in RUN_FILES)):
        raise existing_error(found[0])
    check_run_files(run)
    start = time.perf_counter()
    scene = make_ship_scene(out / "scene", seed=seed)
    note(f"scene: {scene.image} ({scene.num_targets} ships), labels: {scene.labels}")

    half = scene.size_px // 2
    lower = [half, 0, scene.size_px - half, scene.size_px]
    for name in ("last.ckpt", "best.ckpt"):
        (run / "checkpoints" / name).unlink(missing_ok=True)
    regions = {"data.train.region": [0, 0, half, scene.size_px], "data.val.region": lower}
    trained = train("segmentation/demo", {"seed": seed, **_overrides(scene), **regions}, out=run)
    checkpoint = trained.best

    output = out / "map.tif"
    # What a killed demo left is of another scene file.
    predict(checkpoint, scene.image, output, quicklook=True, overwrite=overwrite, resume=False)
    scored = evaluate(checkpoint, scene.image, scene.labels, region=tuple(lower))
    scored.title = "lower half of the scene: not trained on, but it chose the best epoch"
    scored.to_json(out / "scores.json", overwrite=True)
    report = write_report(
        out / "report.html",
        image=scene.image,
        labels=scene.labels,
        prediction=output,
        run=trained,
        scores=scored,
    )
    return Demo(map=output, report=report, scores=scored, seconds=time.perf_counter() - start)


def _overrides(scene: ShipScene) -> dict[str, Any]:
    """Files of training and validation, and how often the model is validated, by key of the config."""
    files = {"image": scene.image, "labels": scene.labels}
    # Each validation takes a second and a half.
    return {
        **{f"data.{part}.{key}": path for part in ("train", "val") for key, path in files.items()},
        "trainer.val_every_epochs": 2,
    }


def _files(out: Path) -> list[Path]:
    """All that a demo writes but its run."""
    scene = [out / "scene" / name for name in ("scene.tif", "ships.geojson")]
    return [*scene, *(out / name for name in ("map.tif", "map.png", "scores.json", "report.html"))]


def write_report(path: Path, *, image: Path, labels: Path, prediction: Path, run: Run, scores: Evaluation) -> Path:
    """Write the page of a demo: scene, labels and map, scores of the lower half, and curves.

    Args:
        path: Output file.
        image: Scene.
        labels: Its labels.
        prediction: Its map.
        run: Training run.
        scores: Scores of the lower half.

    Raises:
        OutputError: The page can't be written.
    """
    source = open_raster(image)
    names = [str(row["name"]) for row in scores.table]
    colors = default_colormap(len(names), background=0)
    clear = {**colors, 0: (0, 0, 0, 0)}
    truth = open_labels(labels, source, classes=names).read(source.extent)
    layers = [
        picture_layer("image", read_picture(source, imagery(source))),
        picture_layer("labels", colorize(truth, clear), shown=False),
        picture_layer("map", colorize(open_raster(prediction).read(source.extent).pixels[0], clear), opacity=0.6),
    ]
    page = Page(title="perf_vit demo", subtitle=_summary(source), numbers=scores.headline)
    page.add(
        "Scene",
        Preview(size=source.size, layers=layers, pixel_size=pixel_size(source)),
        text="Drag to move, scroll to zoom. The upper half was trained on.",
        legend=class_legend(names, colors),
    )
    scores.add_to(page)

    def curves(first: Path) -> list[Path]:
        plot_history(run.metrics, first, format="svg")
        return [first]

    page.add("Training", Row.of_plots(curves, {"": "losses and validation scores by epoch"}))
    return page.write(path)


def _summary(source: RasterSource) -> str:
    return (
        f"A generated scene of {source.height} x {source.width} px, {source.num_bands} bands, {source.crs}: trained "
        "on its upper half, mapped as a whole, scored on its lower half."
    )
