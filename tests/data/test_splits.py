"""What is held out for validation: groups such as patients are never divided, folds hold out each item once."""

import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import rasterio
import shapely
from affine import Affine
from hypothesis import given, settings
from hypothesis import strategies as st

from perf_vit.data import (
    ClassificationDataConfig,
    ClassificationSplitConfig,
    DetectionDataConfig,
    DetectionSplitConfig,
    SlideClassificationDataConfig,
    SlideClassificationSplitConfig,
    build_classification_datamodule,
    build_detection_datamodule,
    splits,
)
from perf_vit.data.bags import read_slide_table
from perf_vit.data.slide_classification import read_slides
from perf_vit.data.splits import HoldOutConfig, split_groups, split_items, warn_of_shared_places
from perf_vit.errors import ConfigError, DataWarning, InputError
from perf_vit.types import Window

ITEMS = st.lists(st.tuples(st.integers(0, 7), st.integers(0, 2)), min_size=2, max_size=60)


@given(ITEMS, st.floats(0.05, 0.6), st.integers(0, 99))
@settings(max_examples=300, deadline=None)
def test_no_group_is_divided_and_each_class_is_still_trained_on(items, share: float, seed: int) -> None:
    groups, labels = [f"P{group}" for group, _ in items], np.array([label for _, label in items])
    try:
        train, val = split_groups(groups, labels, share, seed, "patient")
    except ConfigError:
        # Each group has all items of some class.
        assert all(
            any(set(np.flatnonzero(labels == k)) <= {i for i, g in enumerate(groups) if g == group} for k in labels)
            for group in groups
        )
        return
    assert sorted(train + val) == list(range(len(items)))
    assert val
    assert not {groups[index] for index in train} & {groups[index] for index in val}
    assert set(labels[train]) == set(labels)
    assert (train, val) == split_groups(groups, labels, share, seed, "patient")


def test_the_share_of_each_class_is_held_out_where_groups_are_small() -> None:
    labels = np.repeat([0, 1], [60, 20])
    groups = [f"P{index // 2}" for index in range(80)]
    for seed in range(20):
        _, val = split_groups(groups, labels, 0.25, seed, "patient")
        assert np.bincount(labels[val]).tolist() == pytest.approx([15, 5], abs=1)


def test_one_group_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"data.group_column patient has 1 groups, none of which can be held out"):
        split_groups(["P1"] * 4, np.array([0, 1, 0, 1]), 0.2, 0, "data.group_column patient")


def write_table(path: Path, rows: list[str], header: str = "slide,label,patient") -> str:
    for row in rows:
        path.with_name(f"{row.split(',')[0]}.svs").touch()
    path.write_text("\n".join([header, *rows]) + "\n")
    return str(path)


def config_of(root: Path, train: list[str], val: list[str] | None = None, **options) -> SlideClassificationDataConfig:
    given = {"group_column": "patient", "val_share": 0.3, **options}
    tables = [None if rows is None else write_table(root / f"{k}.csv", rows) for k, rows in enumerate((train, val))]
    parts = [t and SlideClassificationSplitConfig(labels=t, image=str(root)) for t in tables]
    return SlideClassificationDataConfig(train=parts[0], val=parts[1], **given)


@pytest.mark.parametrize("seed", range(10))
def test_slides_of_a_patient_are_on_one_side(tmp_path: Path, seed: int) -> None:
    rows = [f"s{i},{'ab'[i // 3 % 2]},P{i // 3}" for i in range(24)]
    train, val = read_slides(config_of(tmp_path, rows), seed)
    patients = [{int(Path(path).stem[1:]) // 3 for path in part.paths} for part in (train, val)]
    assert not patients[0] & patients[1]
    assert len(train) + len(val) == 24
    assert 3 <= len(val) <= 12


def test_a_patient_in_both_tables_is_refused_in_one_line(tmp_path: Path) -> None:
    train, val = ["a,x,P1", "b,y,P2"], ["c,x,P3", "d,y,P2"]
    with pytest.raises(ConfigError, match=r"^patient P2 is in both data.train and data.val, .* keep each"):
        read_slides(config_of(tmp_path, train, val), 0)
    assert len(read_slides(config_of(tmp_path, train, val, group_column=None), 0)[1]) == 2


def test_a_slide_is_the_same_however_its_path_is_spelled(tmp_path: Path) -> None:
    config = config_of(tmp_path, ["a,x,P1", "b,y,P2"], ["c,x,P3", "b,y,P4"], group_column=None)
    (tmp_path / "linked").symlink_to(tmp_path)
    for folder in (tmp_path / ".." / tmp_path.name, tmp_path / "linked"):
        config.val.image = str(folder)
        with pytest.raises(ConfigError, match=r"b\.svs is in both data\.train and data\.val"):
            read_slides(config, 0)
    Path(config.train.labels).write_text("slide,label\na,x\nb,y\nlinked/a,x\n")
    with pytest.raises(InputError, match=r"line 4 of .* names .*linked/a\.svs, as does line 2 of"):
        read_slides(config, 0)
    Path(config.train.labels).write_text("slide,label\ns3://bucket/a.svs,x\ns3://bucket/../a.svs,y\n")
    config.val = None
    assert len(read_slide_table(config.train.labels, tmp_path)) == 2


def test_a_table_without_the_column_or_a_value_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no column patient"):
        config = config_of(tmp_path, ["a,x,P1", "b,y,P2"])
        write_table(tmp_path / "0.csv", ["a,x", "b,y"], header="slide,label")
        read_slides(config, 0)
    with pytest.raises(InputError, match=r"line 3 of .* has no patient"):
        read_slides(config_of(tmp_path, ["a,x,P1", "b,y,"]), 0)


@given(
    ITEMS.filter(lambda items: len({group for group, _ in items}) > 2),
    st.integers(2, 3),
    st.booleans(),
    st.integers(0, 9),
)
@settings(max_examples=100, deadline=None)
def test_folds_hold_out_each_item_once_and_no_group_twice(items, num_folds: int, with_labels: bool, seed: int) -> None:
    groups, labels = [f"P{group}" for group, _ in items], np.array([label for _, label in items])
    held: list[int] = []
    for fold in range(num_folds):
        config = HoldOutConfig(num_folds=num_folds, fold=fold)
        given_labels = labels if with_labels else None
        train, val = split_items(len(items), config, seed, "slides", labels=given_labels, groups=groups)
        assert val
        assert sorted(train + val) == list(range(len(items)))
        assert not {groups[index] for index in train} & {groups[index] for index in val}
        held += val
    assert sorted(held) == list(range(len(items)))


def test_folds_have_equal_shares_of_each_class() -> None:
    labels = np.repeat([0, 1, 2], [60, 20, 5])
    for seed in range(5):
        for fold in range(5):
            _, val = split_items(85, HoldOutConfig(num_folds=5, fold=fold), seed, "images", labels=labels)
            assert np.bincount(labels[val]).tolist() == [12, 4, 1]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"num_folds": 1}, r"data\.num_folds must be at least 2 .* got 1 and 0"),
        ({"num_folds": 3, "fold": 3}, r"data\.fold from 0 to data\.num_folds - 1, got 3 and 3"),
        ({"fold": 1}, r"data\.fold 1 is one of data\.num_folds, which is left out"),
        ({"val_share": 1.5}, r"data\.val_share must lie between 0 and 1, got 1\.5"),
    ],
)
def test_keys_of_folds_out_of_range_are_refused(keys, message) -> None:
    with pytest.raises(ConfigError, match=message):
        HoldOutConfig(**keys).check_hold_out(None)


def test_more_folds_than_groups_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"num_folds 3 needs at least as many groups of data.group_column site, got 2"
    ):
        split_items(
            4, HoldOutConfig(num_folds=3), 0, "slides", groups=["a", "a", "b", "b"], key="data.group_column site"
        )


class Placed:
    """What tells the place of an image."""

    mpp = None

    def __init__(
        self, path: str, *, crs: str | None = "EPSG:32622", left: float = 0.0, pixel: float = 1.0, turn: float = 0.0
    ) -> None:
        self.path, self.crs = path, crs
        self.height = self.width = 100
        self.transform = Affine.rotation(turn) @ Affine(pixel, 0, left, 0, -pixel, 0)

    def without_transform(self) -> "Placed":
        self.transform = Affine.identity()
        return self


@pytest.mark.parametrize(
    ("train", "val", "share"),
    [
        ((Placed("a.tif"), Window(0, 0, 100, 50)), (Placed("a.tif"), Window(0, 50, 100, 50)), None),
        ((Placed("a.tif"), Window(0, 0, 100, 75)), (Placed("a.tif"), Window(0, 50, 100, 50)), 50),
        # The same ground in another file, with other pixels.
        ((Placed("a.tif"), Window(0, 0, 100, 100)), (Placed("b.tif", left=50, pixel=0.5), Window(0, 0, 100, 100)), 100),
        ((Placed("a.tif"), Window(0, 0, 100, 100)), (Placed("b.tif", left=100), Window(0, 0, 100, 100)), None),
        ((Placed("a.tif"), Window(0, 0, 100, 100)), (Placed("b.tif", crs="EPSG:4326"), Window(0, 0, 100, 100)), None),
        # The upright boxes around the halves of a rotated raster overlap.
        ((Placed("a.tif", turn=30), Window(0, 0, 100, 50)), (Placed("a.tif", turn=30), Window(0, 50, 100, 50)), None),
        ((Placed("a.tif", turn=30), Window(0, 0, 100, 75)), (Placed("b.tif", turn=30), Window(0, 50, 100, 50)), 50),
        # Images without a place are the same only as files.
        (
            (Placed("a.png", crs=None), Window(0, 0, 100, 100)),
            (Placed("b.png", crs=None), Window(0, 0, 100, 100)),
            None,
        ),
        ((Placed("a.png", crs=None), Window(0, 0, 100, 100)), (Placed("./a.png", crs=None), Window(0, 0, 9, 9)), 100),
        # A CRS without a transform places no pixel.
        (
            (Placed("a.tif").without_transform(), Window(0, 0, 100, 100)),
            (Placed("b.tif").without_transform(), Window(0, 0, 100, 100)),
            None,
        ),
        (
            (Placed("a.tif").without_transform(), Window(0, 0, 100, 75)),
            (Placed("a.tif").without_transform(), Window(0, 50, 100, 50)),
            50,
        ),
    ],
)
def test_places_that_are_trained_and_validated_on_are_told(train, val, share) -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        warn_of_shared_places([train], [val])
    expected = [] if share is None else [f"{share} % of data.val is also in data.train, the first {val[0].path}"]
    assert [str(one.message).split(", so")[0] for one in told] == expected


def test_folds_beside_images_to_validate_on_are_refused(tmp_path: Path) -> None:
    config = config_of(tmp_path, ["a,x,P1", "b,y,P2"], ["c,x,P3", "d,y,P4"], num_folds=2)
    with pytest.raises(ConfigError, match=r"data\.num_folds holds out a part of data\.train, and data\.val is given"):
        read_slides(config, 0)


def test_a_fold_with_all_images_of_a_class_is_told() -> None:
    labels, groups = np.array([0, 0, 0, 1]), ["a", "b", "c", "d"]
    told = []
    for fold in range(2):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            split_items(4, HoldOutConfig(num_folds=2, fold=fold), 0, "images", labels=labels, groups=groups)
        told += [str(one.message) for one in caught]
    assert len(told) == 1
    assert "holds all images of 1 of 2 classes" in told[0]


def write_images(folder: Path, step: float) -> Path:
    """Four rasters of 40 x 40 m, `step` m apart, a table with a class and a box each."""
    folder.mkdir(exist_ok=True)
    rows = ["image,label,group,xmin,ymin,xmax,ymax"]
    profile = {"driver": "GTiff", "height": 40, "width": 40, "count": 3, "dtype": "uint8", "crs": "EPSG:32636"}
    for number in range(4):
        place = Affine(1, 0, 5e5 + step * number, 0, -1, 4e6)
        with rasterio.open(folder / f"{number}.tif", "w", transform=place, **profile) as file:
            file.write(np.random.default_rng(number).integers(1, 255, (3, 40, 40)).astype(np.uint8))
        rows.append(f"{number}.tif,{'ab'[number % 2]},g{number // 2},5,6,20,22")
    (folder / "table.csv").write_text("\n".join(rows) + "\n")
    return folder


def build(task: str, folder: Path) -> object:
    part = {"image": str(folder), "labels": str(folder / "table.csv")}
    given = {"tile_px": 32, "batch_size": 1, "val_share": 0.5, "mean": [0.0] * 3, "std": [1.0] * 3}
    if task == "detection":
        train = DetectionSplitConfig(label_format="csv", **part)
        return build_detection_datamodule(DetectionDataConfig(train=train, classes=["a", "b"], **given), 0)
    train = ClassificationSplitConfig(**part)
    return build_classification_datamodule(ClassificationDataConfig(train=train, **given), 0)


@pytest.mark.parametrize(("task", "key"), [("classification", "group_column"), ("detection", "groups")])
def test_held_out_images_of_places_that_are_trained_on_are_told(tmp_path: Path, task: str, key: str) -> None:
    with pytest.warns(DataWarning, match=rf"\d+ % of data\.val is also in data\.train, .* by data\.{key}"):
        build(task, write_images(tmp_path, step=20))
    with warnings.catch_warnings():
        warnings.simplefilter("error", DataWarning)
        build(task, write_images(tmp_path, step=50))


def test_groups_without_a_table_name_the_part_that_lacks_it(tmp_path: Path) -> None:
    train = ClassificationSplitConfig(image=str(write_images(tmp_path, 50)), labels=str(tmp_path / "table.csv"))
    config = ClassificationDataConfig(train=train, val=replace(train, labels=None), group_column="group")
    with pytest.raises(ConfigError, match=r"group is a column of a CSV file of labels; give data\.val\.labels"):
        build_classification_datamodule(config, 0)


def test_the_one_place_of_many_that_is_shared_is_found() -> None:
    places = [(Placed(f"{n}.tif", left=200.0 * n), Window(0, 0, 100, 100)) for n in range(3000)]
    again = (Placed("again.tif", left=200.0 * 1000), Window(0, 0, 100, 100))
    for val, expected in ((places[1::2], []), ([*places[1::2], again], ["1 % of data.val is also in data.train"])):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            warn_of_shared_places(places[::2], val)
        assert [str(one.message).split(", ")[0] for one in told] == expected


def test_shares_of_windows_are_those_of_each_pair_whether_upright_or_not() -> None:
    rng = np.random.default_rng(0)
    windows, others = (
        np.array(
            [
                splits._place(Placed("a", left=200 * rng.random(), turn=turn), Window(0, 0, *rng.integers(9, 50, 2)))[1]
                for turn in (0, 0, 90, 30) * 20
            ]
        )
        for _ in range(2)
    )
    pairs = shapely.area(shapely.intersection(windows[:, None], others[None]))
    expected = np.minimum(1, pairs.sum(axis=1) / shapely.area(windows))
    assert 0 < (expected < 1).sum() < len(expected)
    assert splits._common_shares(windows, others) == pytest.approx(expected, rel=1e-9)


def test_many_images_of_one_place_are_compared_once(monkeypatch) -> None:
    pairs: list[int] = []
    measure = splits._common_areas
    monkeypatch.setattr(splits, "_common_areas", lambda ours, theirs: pairs.append(len(ours)) or measure(ours, theirs))
    places = [(Placed(f"{n}.tif", left=50.0 * (n % 2)), Window(0, 0, 100, 100)) for n in range(2000)]
    with pytest.warns(DataWarning, match=r"100 % of data\.val is also in data\.train, the first 1000\.tif"):
        warn_of_shared_places(places[:1000], places[1000:])
    assert pairs == [4]
