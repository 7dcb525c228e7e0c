"""Outputs that would destroy a file of the user are refused, whatever way the file is named."""

import json
import os
from pathlib import Path

import geopandas as gpd
import pytest
import rasterio
import shapely

from perf_vit.errors import OutputError
from perf_vit.writers import check_outputs

VRT = """<VRTDataset rasterXSize="8" rasterYSize="8"><VRTRasterBand dataType="Byte" band="1"><SimpleSource>
<SourceFilename relativeToVRT="1">{}</SourceFilename><SourceBand>1</SourceBand>
</SimpleSource></VRTRasterBand></VRTDataset>"""


@pytest.fixture
def tile(make_scene) -> Path:
    """The file that must not be replaced."""
    return make_scene(height=8, width=8, num_bands=1, dtype="uint8", nodata=None)


def _linked(tile: Path, kind: str) -> Path:
    """Another name of a file."""
    other = tile.with_name(f"{kind}.tif")
    if kind == "hard link":
        os.link(tile, other)
    elif kind == "symbolic link":
        other.symlink_to(tile)
    elif kind == "linked folder":
        (tile.parent / "folder").symlink_to(tile.parent)
        other = tile.parent / "folder" / tile.name
    elif kind == "dotted":
        other = tile.parent / "x" / ".." / tile.name
        (tile.parent / "x").mkdir()
    else:
        return tile
    return other


def _input_with(tile: Path, kind: str) -> str:
    """An input that a file is part of."""
    folder = tile.parent / "virtual"
    folder.mkdir()
    path = folder / kind
    if kind == "folder":
        return str(tile.parent)
    if kind == "pattern":
        return f"{tile.parent}/*.tif"
    if kind in {"all.vrt", "nested.vrt", "vrt named otherwise.tif"}:
        inner = folder / "inner.vrt" if kind == "nested.vrt" else path
        inner.write_text(VRT.format(f"../{tile.name}"))
        if kind == "nested.vrt":
            path.write_text(VRT.format("inner.vrt"))
    elif kind.endswith(".gti.gpkg"):
        frame = gpd.GeoDataFrame({"location": [str(tile)]}, geometry=[shapely.box(0, 0, 1, 1)], crs=32637)
        frame.to_file(folder / "tiles.gti.gpkg")
        return kind.replace("tiles", f"{folder}/tiles")
    else:
        items = [{"assets": {"visual": {"href": f"../{tile.name}"}, "thumbnail": {"href": "https://host/x.png"}}}]
        path.write_text(json.dumps({"one.json": items[0], "list.json": items}.get(kind, {"features": items})))
    return str(path)


@pytest.mark.parametrize("link", ["same name", "hard link", "symbolic link", "linked folder", "dotted"])
def test_an_input_is_never_replaced_by_whatever_name(tile, link: str) -> None:
    output = _linked(tile, link)
    with pytest.raises(OutputError, match=f"would replace the input .*{tile.name}; choose another output"):
        check_outputs([tile.with_name("new.json"), output], [None, "https://host/x.tif", tile], overwrite=True)


@pytest.mark.parametrize("link", ["same name", "symbolic link"])
@pytest.mark.parametrize(
    "kind",
    [
        "folder", "pattern", "all.vrt", "nested.vrt", "vrt named otherwise.tif", "tiles.gti.gpkg", "GTI:tiles.gti.gpkg",
        "one.json", "list.json", "collection.json",
    ],
)  # fmt: skip
def test_members_of_an_input_are_never_replaced(tile, kind: str, link: str) -> None:
    given = _input_with(tile, kind)
    with pytest.raises(OutputError, match="would replace a part of the input"):
        check_outputs([_linked(tile, link)], [given], overwrite=True)


def test_files_that_gdal_reads_beside_a_raster_are_never_replaced(tile) -> None:
    beside = Path(f"{tile}.aux.xml")
    beside.write_text("<PAMDataset></PAMDataset>")
    with pytest.raises(OutputError, match="would replace a part of the input"):
        check_outputs([beside], [tile], overwrite=True)


@pytest.mark.parametrize("kind", ["file", "link to nothing", "folder"])
def test_what_exists_is_replaced_only_on_demand(tmp_path, kind: str) -> None:
    path = tmp_path / "scores.json"
    if kind == "file":
        path.write_text("mine")
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("nowhere")
    with pytest.raises(OutputError, match="it is a folder" if kind == "folder" else "overwrite=True"):
        check_outputs([path], [])
    if kind != "folder":
        check_outputs([path], [tmp_path / "other.tif"], overwrite=True)


def test_new_outputs_beside_and_below_inputs_are_fine(tile) -> None:
    check_outputs([tile.with_name("map.tif"), tile.parent / "a" / "b" / "map.tif"], [tile, tile.parent])


def test_one_name_for_two_outputs_is_refused(tmp_path) -> None:
    with pytest.raises(OutputError, match="would be written twice"):
        check_outputs([tmp_path / "a.png", tmp_path / "x" / ".." / "a.png"], [], overwrite=True)


def test_a_place_where_nothing_can_be_written_is_refused_before_all_work(tmp_path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="a parent is not a folder"):
        check_outputs([tmp_path / "file" / "a" / "b.json"], [])


def test_inputs_that_cannot_be_read_are_left_to_their_reader(tmp_path) -> None:
    for name in ("broken.vrt", "broken.json", "broken.gti.gpkg", "broken.tif"):
        (tmp_path / name).write_text("{")
    (tmp_path / "out.tif").touch()
    check_outputs([tmp_path / "out.tif"], [*tmp_path.glob("broken*"), "nowhere.tif", "NETCDF:no.nc:x"], overwrite=True)


def test_inputs_are_not_opened_where_no_output_exists(tile, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(rasterio, "open", None)
    check_outputs([tmp_path / "new.tif"], [tile])
