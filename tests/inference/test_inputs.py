"""Files, folders, globs and lists become inputs and the names of their maps."""

import csv
import os
from pathlib import Path

import geopandas as gpd
import pandas as pd
import pytest
from shapely import Point

from perf_vit.errors import DataWarning, InputError, OutputError
from perf_vit.inference import find_inputs, find_paths, is_one_file, resolve_one


@pytest.fixture
def scenes(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    images = ["b.tif", "a.jp2", "north/1.TIF", "north/deep/1.tif", "south/1.tif", "stack.zarr/0/c.tif"]
    others = ["notes.txt", "a.jp2.aux.xml", "._b.tif", "b.tif.partial/rows_1.tif", ".cache/x.tif"]
    for name in [*images, *others]:
        path = Path("scenes", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return Path("scenes")


def _pairs(given: list, folder: str = "maps", **options) -> list[tuple[str, str]]:
    return [(item.path, item.output.as_posix()) for item in find_inputs(given, folder, **options)]


def test_a_folder_is_searched_and_maps_keep_its_structure(scenes) -> None:
    assert _pairs([scenes]) == [
        ("scenes/a.jp2", "maps/a.tif"),
        ("scenes/b.tif", "maps/b.tif"),
        ("scenes/north/1.TIF", "maps/north/1.tif"),
        ("scenes/north/deep/1.tif", "maps/north/deep/1.tif"),
        ("scenes/south/1.tif", "maps/south/1.tif"),
        ("scenes/stack.zarr", "maps/stack.tif"),
    ]


def test_a_glob_keeps_the_structure_below_its_wildcards(scenes) -> None:
    assert _pairs(["scenes/*/1.tif"]) == [("scenes/south/1.tif", "maps/south/1.tif")]
    assert _pairs(["scenes/north/**/*.tif"]) == [("scenes/north/deep/1.tif", "maps/deep/1.tif")]


def test_a_file_whose_name_looks_like_a_glob_is_a_file(scenes) -> None:
    Path("scene[1].tif").touch()
    assert is_one_file(["scene[1].tif"])
    assert _pairs(["scene[1].tif"]) == [("scene[1].tif", "maps/scene[1].tif")]


def test_maps_inside_the_searched_folder_are_no_inputs(scenes) -> None:
    for name in ("b.tif", "north/1.tif"):
        Path("scenes/maps", name).parent.mkdir(parents=True, exist_ok=True)
        Path("scenes/maps", name).touch()
    assert len(_pairs([scenes], "scenes/maps")) == 6
    assert _pairs(["scenes/**/b.tif"], "scenes/maps") == [("scenes/b.tif", "scenes/maps/b.tif")]


def test_an_input_given_twice_is_mapped_once(scenes) -> None:
    assert len(_pairs(["scenes/b.tif", "scenes/b.tif", "scenes/a.jp2"])) == 2


def test_urls_and_gdal_paths_are_taken_as_they_are() -> None:
    given = ["https://host/x/one.tif?token=a*b", "/vsis3/bucket/two.tif", "s3://bucket/three.jp2"]
    assert [output for _, output in _pairs(given)] == ["maps/one.tif", "maps/two.tif", "maps/three.tif"]


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".geoparquet"])
def test_a_list_names_inputs_relative_to_itself_and_maps(tmp_path, suffix: str) -> None:
    table = pd.DataFrame(
        {"path": ["x/1.tif", "/abs/2.tif", "s3://b/3.tif"], "output": ["first", None, "sub/third.tif"], "cloud": 0.5}
    )
    path = tmp_path / f"list{suffix}"
    if suffix == ".csv":
        table.to_csv(path, index=False, encoding="utf-8-sig")
    elif suffix == ".parquet":
        table.to_parquet(path)
    else:
        gpd.GeoDataFrame(table, geometry=[Point(i, i) for i in range(3)], crs="EPSG:4326").to_parquet(path)
    assert _pairs([path]) == [
        (str(tmp_path / "x/1.tif"), "maps/first.tif"),
        ("/abs/2.tif", "maps/2.tif"),
        ("s3://b/3.tif", "maps/sub/third.tif"),
    ]


def test_a_list_may_have_another_column(tmp_path) -> None:
    path = tmp_path / "list.csv"
    path.write_text("id,href\n1,a.tif\n2,b.tif\n")
    assert len(find_inputs([path], "maps", path_column="href")) == 2
    with pytest.raises(InputError, match=r"has no column path, but id, href; .*path_column"):
        find_inputs([path], "maps")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no column path"),
        ("path\n", "got no row"),
        ("path,output\n,x\n", "row 1 has no path"),
        ("path\na,b.tif\n", r"line 2 of .* has more cells than there are columns; quote cells with commas"),
        (None, "no such list"),
    ],
)
def test_a_list_without_paths_is_refused(tmp_path, content: str | None, message: str) -> None:
    path = tmp_path / "list.csv"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=message):
        find_inputs([path], "maps")


def test_a_parquet_file_that_is_none_is_refused(tmp_path) -> None:
    (tmp_path / "list.parquet").write_text("no parquet")
    with pytest.raises(InputError, match="can't read the list"):
        find_inputs([tmp_path / "list.parquet"], "maps")


def test_nothing_found_is_an_error(tmp_path) -> None:
    for given in (tmp_path, tmp_path / "*.tif"):
        with pytest.raises(InputError, match=r"no images? (in|matches)"):
            find_inputs([given], "maps")


def test_two_maps_of_one_name_are_refused(scenes) -> None:
    Path("scenes/b.vrt").touch()
    with pytest.raises(OutputError, match=r"scenes/b.tif and scenes/b.vrt would both become maps/b.tif"):
        find_inputs(["scenes"], "maps")
    with pytest.raises(OutputError, match=r"would both become maps/1.tif"):
        find_inputs(["scenes/north/1.TIF", "scenes/south/1.tif"], "maps")


def test_a_map_or_its_quicklook_never_replaces_an_input(scenes) -> None:
    with pytest.raises(OutputError, match=r"would replace the input scenes/b.tif"):
        find_inputs(["scenes"], "scenes")
    os.rename("scenes/b.tif", "scenes/b.png")
    with pytest.raises(OutputError, match=r"would replace the input scenes/b.png"):
        find_inputs(["scenes/b.png"], "scenes")


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@pytest.mark.parametrize("output", ["../x.tif", "sub/../../../x", "/elsewhere/x.tif", "link/x.tif", "link/../x.tif"])
def test_a_list_names_no_output_outside_the_folder(tmp_path, monkeypatch, suffix: str, output: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("maps").mkdir()
    Path("maps/link").symlink_to(tmp_path)
    table = pd.DataFrame({"path": ["a.tif", "b.tif"], "output": ["fine/a.tif", output]})
    path = Path(f"list{suffix}")
    table.to_csv(path, index=False) if suffix == ".csv" else table.to_parquet(path)
    with pytest.raises(OutputError, match=f"{path}: output of row 2, {output}, would lie outside .* maps"):
        find_inputs([path], "maps")
    # Where no maps are made, the column means nothing.
    assert find_paths([path]) == ["a.tif", "b.tif"]


def test_a_list_may_name_outputs_by_ways_that_stay_inside(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("list.csv").write_text(f"path,output\na.tif,sub/../a\nb.tif,{tmp_path}/maps/b.tif\n")
    Path("real").mkdir()
    Path("maps").symlink_to("real")
    assert [output for _, output in _pairs(["list.csv"])] == ["maps/sub/../a.tif", f"{tmp_path}/maps/b.tif"]


def test_a_glob_with_dots_makes_no_map_outside_the_folder(scenes) -> None:
    Path("b.tif").touch()
    with pytest.raises(OutputError, match="would lie outside the output folder maps"):
        find_inputs(["scenes/*/../../b.tif"], "maps")


@pytest.mark.parametrize("row", ["a\0b.tif,", "a.tif,a\0b.tif"])
def test_null_bytes_in_a_list_are_refused(tmp_path, row: str) -> None:
    (tmp_path / "list.csv").write_text(f"path,output\n{row}\n")
    with pytest.raises(InputError, match="row 1 has a null byte"):
        find_inputs([tmp_path / "list.csv"], tmp_path / "maps")


def test_outputs_of_two_names_with_one_quicklook_are_refused(tmp_path) -> None:
    (tmp_path / "list.csv").write_text("path,output\na.tif,x.tif\nb.tif,x.tiff\n")
    with pytest.raises(OutputError, match=r"x\.png would be written twice"):
        find_inputs([tmp_path / "list.csv"], "maps")


def test_an_output_that_is_no_geotiff_is_refused(tmp_path) -> None:
    (tmp_path / "list.csv").write_text("path,output\na.tif,a.jpg\n")
    with pytest.raises(OutputError, match=r"must end in .tif, got maps/a.jpg"):
        find_inputs([tmp_path / "list.csv"], "maps")


@pytest.mark.parametrize(
    ("given", "expected"),
    [(["a.tif"], True), (["a.tif", "b.tif"], False), (["*.tif"], False), (["a.csv"], False), (["s3://x/*.tif"], True)],
)
def test_one_file_is_told_from_many(given: list[str], expected: bool) -> None:
    assert is_one_file(given) == expected


@pytest.mark.parametrize("preview", ["b.png", "B.JPG", "b.jpeg", "b.webp"])
def test_a_preview_beside_its_raster_is_left_out_with_a_warning(scenes, preview) -> None:
    name = preview.replace("B.", "b.")
    Path("scenes", name).touch()
    for given in ("scenes", "scenes/*.*"):
        with pytest.warns(DataWarning, match=rf"1 of \d images are taken as previews .* the first scenes/{name}"):
            found = find_inputs([given], "maps")
        assert [item.path for item in found if Path(item.path).stem == "b"] == ["scenes/b.tif"]
    assert find_inputs([f"scenes/{name}"], "maps")[0].path == f"scenes/{name}"
    assert f"scenes/{name}" in find_paths(["scenes"])


def test_a_link_to_a_folder_above_gives_no_file_a_second_name(scenes) -> None:
    Path("scenes/north/up").symlink_to(Path("scenes").resolve(), target_is_directory=True)
    Path("scenes/twice").symlink_to(Path("scenes/south").resolve(), target_is_directory=True)
    assert len(_pairs(["scenes"])) == 6
    assert _pairs(["scenes/**/1.tif"]) == [
        ("scenes/north/deep/1.tif", "maps/north/deep/1.tif"), ("scenes/south/1.tif", "maps/south/1.tif")
    ]  # fmt: skip


def test_a_glob_passes_over_what_other_programs_leave(scenes) -> None:
    for name in ("b.tif.aux.xml", "b.tif.ovr", "b.tif.msk", "Thumbs.db"):
        Path("scenes", name).touch()
    assert _pairs(["scenes/[bT]*"]) == [("scenes/b.tif", "maps/b.tif")]


@pytest.mark.parametrize(("pattern", "output", "expected"), [
    ("scenes/b.*", "map.tif", ["scenes/b.tif"]), ("scenes/b.*", "maps", ["scenes/b.*"]),
    ("scenes/*.*", "map.tif", ["scenes/*.*"]), ("scenes/b.tif", "map.tif", ["scenes/b.tif"]),
    ("scenes/none*", "map.tif", ["scenes/none*"]),
])  # fmt: skip
def test_a_glob_of_one_file_is_that_file(scenes, pattern, output, expected) -> None:
    assert resolve_one([pattern], Path(output)) == expected
    assert is_one_file(resolve_one([pattern], Path(output))) == (expected == ["scenes/b.tif"])


@pytest.mark.parametrize(("name", "path", "output"), [
    ("NETCDF:b.nc:temp", "NETCDF:lists/b.nc:temp", "maps/b_temp.tif"),
    ('NETCDF:"b.nc":temp', 'NETCDF:"lists/b.nc":temp', "maps/b_temp.tif"),
    ('HDF5:"b.nc"://temp', 'HDF5:"lists/b.nc"://temp', "maps/temp.tif"),
    ("GTI:b.nc", "GTI:lists/b.nc", "maps/GTI:lists/b.tif"),
    ("a:b.tif", "lists/a:b.tif", "maps/a:b.tif"),
    ('NETCDF:"/data/b.nc":temp', 'NETCDF:"/data/b.nc":temp', "maps/b_temp.tif"),
    ("s3://bucket/b.nc", "s3://bucket/b.nc", "maps/b.tif"),
])  # fmt: skip
def test_datasets_inside_files_are_relative_to_the_list(tmp_path, monkeypatch, name, path, output) -> None:
    monkeypatch.chdir(tmp_path)
    Path("lists").mkdir()
    for file in ("b.nc", "a:b.tif"):
        Path("lists", file).touch()
    with open("lists/list.csv", "w", newline="") as file:
        csv.writer(file).writerows([["path"], [name]])
    found = find_inputs(["lists/list.csv"], "maps")
    assert found[0].path == path
    assert found[0].output.name == Path(output).name
