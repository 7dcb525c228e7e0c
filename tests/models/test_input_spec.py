"""What a model expects of its input: saved as plain values, and the one way to open an input."""

import json
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from synthetic_slide import make_slide

from perf_vit.errors import DataWarning, InputError
from perf_vit.models import (
    ClassificationSpec,
    DetectionSpec,
    InputBands,
    InputCheck,
    InputSpec,
    SegmentationSpec,
    SlideClassificationSpec,
)
from perf_vit.sources import RasterSource, open_source
from perf_vit.transforms import Normalizer
from perf_vit.types import GeoImage, Window

THREE = Normalizer((1.0, 2.0, 3.0), (4.0, 5.0, 6.0))
DARK = InputBands(names=("a", "b", "c"), dtype="uint16", low=(1.0,) * 3, high=(9.0,) * 3)
OPENED = {"bands": (3, 1, 2), "nodata": 7.0, "resolution": 5.0, "resolution_unit": ("metre", 1.0), "mpp": 1.0}
SHARED = {
    **OPENED,
    "slide_mpp": 0.5,
    "tissue": "otsu",
    "classes": ("x", "y"),
    "normalizer": THREE,
    "tile_px": 32,
    "trained_on": DARK,
    "label_options": {"values": [4, 5], "attribute": None},
}
SPECS = [
    InputSpec(),
    InputSpec(**SHARED),
    SegmentationSpec(**SHARED, background="x", multilabel=True),
    DetectionSpec(**SHARED, score_threshold=0.3, kind="masks", category_ids=(7, 9)),
    ClassificationSpec(**SHARED, kind="regression", resize=True, target_mean=(1.0, 2.0), target_std=(3.0, 4.0)),
    ClassificationSpec(classes=("x",), normalizer=THREE, tile_px=32, kind="single_label"),
    SlideClassificationSpec(**SHARED, min_tissue=0.1),
]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: type(spec).__name__)
def test_specs_are_the_same_after_saving(spec: InputSpec) -> None:
    assert type(spec).from_dict(spec.to_dict()) == spec
    assert type(spec).from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_a_spec_without_wishes_opens_any_input_as_it_is(make_scene) -> None:
    path = make_scene(num_bands=5)
    source = InputSpec().open(path)
    assert source.num_bands == 5
    assert np.array_equal(source.read(source.extent).pixels, open_source(path).read(source.extent).pixels)


def test_options_of_the_model_are_those_of_the_source(make_scene) -> None:
    spec = InputSpec(bands=(3, 1), nodata=7.0, resolution=5.0, resolution_unit=("metre", 1.0))
    source = spec.open(make_scene())
    assert (source.bands, source.nodata) == ((3, 1), 7.0)
    assert (source.transform.a, source.transform.e) == (5.0, -5.0)


def test_options_that_are_given_come_first_and_none_counts_as_not_given(make_scene) -> None:
    spec = InputSpec(bands=(3, 1), resolution=5.0)
    source = spec.open(make_scene(), resolution=10.0, crs=None, bands=None)
    assert (source.bands, source.transform.a) == ((3, 1), 10.0)


def test_none_counts_as_not_given_for_an_open_source_too(make_scene) -> None:
    source = open_source(make_scene(), bands=(2, 1))
    assert InputSpec(bands=(3, 1)).open(source, bands=None) is source


def test_an_open_source_is_opened_again_with_the_options_that_it_lacks(make_scene) -> None:
    spec, path = InputSpec(bands=(3, 1), resolution=5.0), make_scene()
    assert spec.open(open_source(path)).options == {"bands": (3, 1), "resolution": 5.0}
    given = spec.open(open_source(path, bands=[2, 3], bounds=(401_010, 4_509_800, 401_210, 4_510_000)))
    assert (given.bands, given.transform.a, given.size) == ((2, 3), 5.0, (40, 40))
    assert spec.open(open_source([path]), resolution=10.0).transform.a == 10.0


def test_a_source_that_is_open_as_in_training_is_taken_as_it_is(make_scene) -> None:
    source = open_source(make_scene(), resolution=5.0)
    assert InputSpec(resolution=5.0).open(source) is source


def test_a_source_of_another_class_is_taken_as_it_is() -> None:
    class Ramp:
        path, num_bands, size = "ramp", 3, (40, 50)
        band_names = ("a", "b", "c")
        extent = Window(0, 0, 40, 50)

        def read(self, window: Window) -> GeoImage:
            return GeoImage(np.full((3, *window.shape), 5, np.uint16), np.ones(window.shape, bool))

        def read_reduced(self, max_size_px: int, window: Window | None = None) -> GeoImage:
            return self.read(self.extent)

        def close(self) -> None:
            pass

    source = Ramp()
    assert InputSpec(**SHARED).open(source) is source
    with pytest.raises(InputError, match="trained on 1 bands, ramp has 3"):
        InputSpec(normalizer=Normalizer((1.0,), (1.0,))).open(source)


def test_a_level_that_is_given_replaces_the_mpp_of_the_model(tmp_path: Path) -> None:
    slide = make_slide(tmp_path / "a.svs", 320, 400, mpp=0.5, tile_px=64, tissue_share=1.0)
    spec = InputSpec(mpp=2.0)
    assert spec.open(slide).size == (80, 100)
    assert spec.open(open_source(slide, level=1)).size == (160, 200)


@pytest.mark.parametrize("num_bands", [1, 2, 4])
@pytest.mark.parametrize("kind", [SegmentationSpec, DetectionSpec, ClassificationSpec, SlideClassificationSpec])
def test_another_number_of_bands_is_refused_with_one_message(make_scene, kind, num_bands: int) -> None:
    more = {"kind": "single_label"} if kind is ClassificationSpec else {}
    spec, path = kind(classes=("a", "b"), normalizer=THREE, tile_px=32, **more), make_scene(num_bands=num_bands)
    if num_bands == 1 and kind in (DetectionSpec, ClassificationSpec):
        # Grey images are read as three equal bands.
        assert spec.open(path).num_bands == 1
        return
    with pytest.raises(InputError, match=f"was trained on 3 bands, .*{path.name} has {num_bands}; give an input with"):
        spec.open(path)


def told(spec: InputSpec, *paths: Path, check: InputCheck | None = None) -> int:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for path in paths:
            spec.open(path, check=check)
    return sum(each.category is DataWarning for each in caught)


def test_an_input_unlike_the_training_images_is_told_and_once_where_inputs_share_a_check(make_scene) -> None:
    spec, paths = replace(InputSpec(**SHARED), mpp=None, slide_mpp=None, tissue=None), [make_scene(), make_scene()]
    assert told(spec, *paths) == 2
    assert told(spec, *paths, check=InputCheck(spec.trained_on)) == 1
    assert told(spec, *paths, check=InputCheck(None)) == 0


def test_sources_that_open_source_did_not_open_are_taken_as_they_are(make_scene) -> None:
    source = RasterSource(make_scene())
    assert InputSpec(bands=(3, 1), nodata=7.0).open(source) is source


def test_options_for_a_source_that_cant_be_opened_again_are_refused(make_scene) -> None:
    source = RasterSource(str(make_scene()))
    with pytest.raises(InputError, match=r"^resolution can't be chosen for an open source"):
        InputSpec().open(source, resolution=2.0)
    assert InputSpec().open(source, resolution=None) is source
