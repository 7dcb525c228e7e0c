"""The names that users rely on; a change here is a change of the contract."""

import importlib
import subprocess
import sys

import pytest

import perf_vit

CONTRACT = {
    "perf_vit": [
        "InputSpec",
        "__version__",
        "convert",
        "distill",
        "evaluate",
        "init",
        "linearize",
        "load",
        "open",
        "ops",
        "predict",
        "save_converted",
        "stream",
        "train",
        "wait_passively",
    ],
    "perf_vit.ops": ["KVState", "draw_projection", "clustered_attention", "favor_attention"],
    "perf_vit.tiling": ["BLENDS", "grid_windows", "random_window", "register_blend"],
    "perf_vit.layers": ["MIXERS", "LinearizedAttention", "register_mixer"],
    "perf_vit.transforms": ["Augmentation", "Normalizer"],
    "perf_vit.data": ["DetectionDataConfig", "build_detection_datamodule", "collate_objects"],
    "perf_vit.types": ["Detections"],
    "perf_vit.geometry": ["Objects"],
    "perf_vit.labels.objects": ["RawImage", "RawLabels", "RawObject", "read_object_labels", "register_label_format"],
    "perf_vit.metrics": ["register_metric"],
    "perf_vit.models.heads": ["DetectionHead", "register_detection_head", "register_segmentation_head"],
    "perf_vit.reporting": ["Page", "Preview", "picture_layer", "read_picture"],
    "perf_vit.sources": ["Level", "PyramidReader", "register_source"],
    "perf_vit.workflows.registry": ["TASKS", "register_task"],
    "perf_vit.writers": ["polygonize_classes", "tidy_polygons", "write_objects"],
    "perf_vit.inference": [
        "ClassificationPredictor",
        "DetectionPredictor",
        "ObjectModel",
        "ObjectStitcher",
        "SegmentationPredictOptions",
        "SegmentationPredictor",
        "SlideClassificationPredictor",
        "Strip",
        "StripMaker",
        "TileModel",
        "class_map",
        "class_probabilities",
        "predict_objects",
        "predict_strips",
    ],
}


@pytest.mark.parametrize("module", CONTRACT)
def test_promised_names_exist_and_are_listed(module: str) -> None:
    package = importlib.import_module(module)
    assert set(CONTRACT[module]) <= set(package.__all__)
    assert all(getattr(package, name) is not None for name in package.__all__)


def test_top_level_names_are_exactly_the_contract() -> None:
    assert sorted(perf_vit.__all__) == sorted(CONTRACT["perf_vit"])


def test_importing_the_package_registers_backbones_and_loads_no_package_but_timm_and_torch() -> None:
    script = (
        "import sys, timm\n"
        "before = set(sys.modules)\n"
        "import perf_vit\n"
        "assert 'performer_vit_tiny_patch16_224' in timm.list_models('performer*')\n"
        "own = {name.partition('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)\n"
        "print(*sorted(own), sum(name.startswith('perf_vit') for name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    package, num_modules = done.stdout.split()
    assert package == "perf_vit"
    # A quarter of the package: attention and backbones.
    assert int(num_modules) < 60


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        perf_vit.nothing  # noqa: B018
