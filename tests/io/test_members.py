"""A file that others name and that isn't there is an error, never zeros that look like data."""

import geopandas
import numpy as np
import pytest
import rasterio
import shapely
from affine import Affine

from perf_vit.errors import DamagedDataError
from perf_vit.inference.reader import SalvagingReader
from perf_vit.io import open_source
from perf_vit.io._members import members_of
from perf_vit.types import Window

SIDE = 64


@pytest.fixture
def tiles(make_scene, tmp_path):
    """Three tiles in a row, and where each lies."""
    boxes, paths = [], []
    for index in range(3):
        transform = Affine(2, 0, 400_000 + 2 * SIDE * index, 0, -2, 4_500_000)
        path = make_scene(height=SIDE, width=SIDE, num_bands=1, nodata=None, seed=index, transform=transform)
        paths.append(path.rename(tmp_path / f"t{index}.tif"))
        with rasterio.open(paths[-1]) as dataset:
            boxes.append(shapely.box(*dataset.bounds))
    return paths, boxes


def _gti(tiles, folder, *, relative, xml=False):
    paths, boxes = tiles
    names = [path.name if relative else str(path) for path in paths]
    index = geopandas.GeoDataFrame({"location": names}, geometry=boxes, crs="EPSG:32637")
    index.to_file(folder / "a.gti.gpkg", layer="tiles")
    if not xml:
        return folder / "a.gti.gpkg"
    (folder / "a.gti").write_text(
        f"<GDALTileIndexDataset><IndexDataset>{folder}/a.gti.gpkg</IndexDataset><IndexLayer>tiles</IndexLayer>"
        "<LocationField>location</LocationField></GDALTileIndexDataset>"
    )
    return folder / "a.gti"


def _vrt(tiles, folder, *, relative, xml=False):
    sources = "".join(
        f'<SimpleSource><SourceFilename relativeToVRT="{int(relative)}">{path.name if relative else path}'
        f'</SourceFilename><SourceBand>1</SourceBand><SrcRect xOff="0" yOff="0" xSize="{SIDE}" ySize="{SIDE}"/>'
        f'<DstRect xOff="{SIDE * index}" yOff="0" xSize="{SIDE}" ySize="{SIDE}"/></SimpleSource>'
        for index, path in enumerate(tiles[0])
    )
    (folder / "a.vrt").write_text(
        f'<VRTDataset rasterXSize="{3 * SIDE}" rasterYSize="{SIDE}"><SRS>EPSG:32637</SRS><GeoTransform>400000,2,0,'
        f'4500000,0,-2</GeoTransform><VRTRasterBand dataType="UInt16" band="1">{sources}</VRTRasterBand></VRTDataset>'
    )
    return folder / "a.vrt"


@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize(("make", "xml"), [(_gti, False), (_gti, True), (_vrt, False)])
@pytest.mark.parametrize("options", [{}, {"resolution": 4}, {"crs": "EPSG:32636"}])
def test_a_missing_member_is_damage_where_it_lies(tiles, tmp_path, make, xml, relative, options) -> None:
    path = make(tiles, tmp_path, relative=relative, xml=xml)
    whole = open_source(path, **options)
    expected = whole.read(whole.extent)
    whole.close()
    tiles[0][1].unlink()
    lost = []
    source = open_source(path, **options)
    with pytest.raises(DamagedDataError, match=r"t1\.tif"):
        source.read(source.extent)
    with pytest.raises(DamagedDataError):
        source.read_reduced(20)
    image = SalvagingReader(source, lambda window, _: lost.append(window)).read(source.extent)
    assert lost
    assert not image.valid.all()
    assert np.array_equal(image.pixels[:, image.valid], expected.pixels[:, image.valid])
    if not options:
        # GDAL warps a VRT in pieces of 512 px, which are lost as a whole.
        assert np.array_equal(image.valid, np.repeat([True, False, True], SIDE)[None].repeat(SIDE, 0))


@pytest.mark.parametrize("make", [_gti, _vrt])
def test_the_members_of_a_file_are_known(tiles, tmp_path, make) -> None:
    path = str(make(tiles, tmp_path, relative=True))
    with rasterio.open(path) as dataset:
        assert members_of(dataset, path) == [str(tile) for tile in tiles[0]]
    with rasterio.open(tiles[0][0]) as dataset:
        assert members_of(dataset, str(tiles[0][0])) == []


def test_a_window_beside_a_missing_member_is_read(tiles, tmp_path) -> None:
    path = _gti(tiles, tmp_path, relative=True)
    tiles[0][1].unlink()
    source = open_source(path)
    assert source.read(Window(0, 0, SIDE, SIDE)).pixels.any()
    with pytest.raises(DamagedDataError, match=r"its file .*t1\.tif isn't there"):
        source.read(Window(0, SIDE - 1, 1, 2))
