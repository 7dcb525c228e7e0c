"""`perf-vit demo`: the whole road on a scene that it makes itself."""

from __future__ import annotations

import time
from pathlib import Path

from perf_vit.cli.console import say, score_table, show, windows_progress
from perf_vit.cli.mapping import evaluate_segmenter, write_scores
from perf_vit.cli.report import write_report
from perf_vit.cli.run_files import RUN_FILES, check_run_files
from perf_vit.cli.schemas import SegmentationRun
from perf_vit.cli.training import train_segmenter
from perf_vit.config import load_config
from perf_vit.data import make_ship_scene
from perf_vit.inference import SegmentationPredictOptions, SegmentationPredictor
from perf_vit.io import check_outputs, existing_error, existing_outputs

__all__ = ["run_demo"]


def run_demo(out: Path, seed: int, *, overwrite: bool = False) -> None:
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
    say(f"scene: {scene.image} ({scene.num_targets} ships), labels: {scene.labels}")

    half = scene.size_px // 2
    upper, lower = [0, 0, half, scene.size_px], [half, 0, scene.size_px - half, scene.size_px]
    config = load_config(
        "configs/segmentation/demo.yaml",
        SegmentationRun,
        [
            f"out={run}",
            f"seed={seed}",
            *(f"data.{part}.image={scene.image}" for part in ("train", "val")),
            *(f"data.{part}.labels={scene.labels}" for part in ("train", "val")),
            f"data.train.region={upper}",
            f"data.val.region={lower}",
        ],
    )
    for name in ("last.ckpt", "best.ckpt"):
        (run / "checkpoints" / name).unlink(missing_ok=True)
    checkpoint = train_segmenter(config)

    output = out / "map.tif"
    # What a killed demo left is of another scene file.
    options = SegmentationPredictOptions(quicklook=True, overwrite=overwrite, resume=False)
    with windows_progress(f"predicting {scene.image.name}") as on_progress:
        SegmentationPredictor(checkpoint, options).run(scene.image, output, on_progress=on_progress)
    scores, _ = evaluate_segmenter(checkpoint, scene.image, scene.labels, region=lower)
    write_scores(scores, out / "scores.json")
    show(score_table(scores, title="lower half of the scene: not trained on, but it chose the best epoch"))
    report = write_report(
        out / "report.html",
        image=scene.image,
        labels=scene.labels,
        prediction=output,
        loss_curve=run / "loss_curve.png",
        scores=scores,
        seconds=time.perf_counter() - start,
    )
    ship = next(score for score in scores if score.name == "ship")
    say(f"IoU of ships: {ship.iou:.3f}  ({time.perf_counter() - start:.0f} s in all)")
    say(f"map: {output}", f"quicklook: {output.with_suffix('.png')}", f"report: {report}")


def _files(out: Path) -> list[Path]:
    """All that a demo writes but its run."""
    scene = [out / "scene" / name for name in ("scene.tif", "ships.geojson")]
    return [*scene, *(out / name for name in ("map.tif", "map.png", "scores.json", "report.html"))]
