"""A file that others name and that isn't there is an error, never zeros that look like data."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import geopandas
import numpy as np
import pytest
import rasterio
import rasterio.shutil
import shapely
from affine import Affine

from perf_vit.errors import DamagedDataError
from perf_vit.inference.prefetch import SalvagingReader
from perf_vit.sources import open_source
from perf_vit.sources._members import members_of
from perf_vit.types import Window
from perf_vit.writers import input_files

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


@pytest.mark.usefixtures("process")
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


def test_a_missing_member_of_a_vrt_in_a_vrt_is_damage_at_lower_resolution_too(tiles, tmp_path) -> None:
    inner = _vrt(tiles, tmp_path, relative=True).rename(tmp_path / "inner.vrt")
    outer = tmp_path / "outer.vrt"
    whole = f'xSize="{3 * SIDE}" ySize="{SIDE}"'
    source = f"<SourceFilename>{inner}</SourceFilename><SourceBand>1</SourceBand>"
    place = f'<SrcRect xOff="0" yOff="0" {whole}/><DstRect xOff="0" yOff="0" {whole}/>'
    head, _, rest = inner.read_text().partition("<SimpleSource>")
    tail = rest[rest.rindex("</SimpleSource>") :]
    outer.write_text(f"{head}<SimpleSource>{source}{place}{tail}")
    assert open_source(outer).read_reduced(20).pixels.any()
    tiles[0][1].unlink()
    with pytest.raises(DamagedDataError, match=r"its file .*t1\.tif isn't there"):
        open_source(outer).read_reduced(20)


def test_files_of_a_tile_index_lie_where_gdal_looks_for_them(tiles, tmp_path, monkeypatch) -> None:
    (tmp_path / "tables").mkdir()
    _gti(tiles, tmp_path, relative=True).rename(tmp_path / "tables" / "a.gti.gpkg")
    path = tmp_path / "a.gti"
    path.write_text(
        f"<GDALTileIndexDataset><IndexDataset>{tmp_path}/tables/a.gti.gpkg</IndexDataset><IndexLayer>tiles</IndexLayer>"
        "<LocationField>location</LocationField></GDALTileIndexDataset>"
    )
    monkeypatch.chdir(tmp_path)
    for name in (str(path), f"GTI:{tmp_path}/tables/a.gti.gpkg"):
        with rasterio.open(name) as dataset:
            pixels = dataset.read()
            assert [file.rsplit("/", 1)[-1] for file in members_of(dataset, name)] == ["t0.tif", "t1.tif", "t2.tif"]
        table = tmp_path / "tables" / "a.gti.gpkg"
        assert {file.resolve() for _, file in input_files([name])} >= {table, *tiles[0]}
        source = open_source(name)
        assert np.array_equal(source.read(source.extent).pixels, pixels)
    tiles[0][1].unlink()
    for name in (str(path), f"GTI:{tmp_path}/tables/a.gti.gpkg"):
        with pytest.raises(DamagedDataError, match=r"its file .*t1\.tif isn't there"):
            open_source(name).read(Window(0, 0, SIDE, 2 * SIDE))


def test_vrts_that_name_each_other_are_one_line(tiles, tmp_path) -> None:
    text = _vrt(tiles, tmp_path, relative=False).read_text()
    for name, other in (("b.vrt", "c.vrt"), ("c.vrt", "b.vrt")):
        (tmp_path / name).write_text(text.replace(str(tiles[0][0]), str(tmp_path / other)))
    source = open_source(tmp_path / "b.vrt")
    with pytest.raises(DamagedDataError, match=r"b\.vrt"):
        source.read(source.extent)
    with rasterio.open(tmp_path / "b.vrt") as dataset:
        assert len(members_of(dataset, str(tmp_path / "b.vrt"))) == 6


def _damage(path):
    path.write_bytes(b"no raster" * 1000)


@pytest.mark.usefixtures("process")
@pytest.mark.parametrize("lose", [Path.unlink, _damage])
def test_a_lost_member_is_damage_however_often_it_is_read(tiles, tmp_path, lose) -> None:
    inner = _vrt(tiles, tmp_path, relative=True)
    outer = tmp_path / "outer.vrt"
    rasterio.shutil.copy(inner, outer, driver="VRT")
    lose(tiles[0][1])
    for path in (inner, outer):
        source = open_source(path)
        for _ in range(3):
            with pytest.raises(DamagedDataError):
                source.read(source.extent)
            with pytest.raises(DamagedDataError):
                open_source(path).read(Window(0, SIDE, 8, 8))
            assert source.read(Window(0, 0, SIDE, SIDE)).pixels.all()


@pytest.mark.usefixtures("process")
@pytest.mark.parametrize("lose", [Path.unlink, _damage])
def test_a_lost_file_of_a_tile_index_is_damage_however_often_it_is_read(tiles, tmp_path, lose) -> None:
    path = _gti(tiles, tmp_path, relative=True)
    lose(tiles[0][1])
    source = open_source(path)
    for _ in range(3):
        with pytest.raises(DamagedDataError, match=r"t1\.tif"):
            source.read(source.extent)
        with pytest.raises(DamagedDataError, match=r"t1\.tif"):
            open_source(path).read(Window(0, SIDE, 8, 8))
        assert source.read(Window(0, 0, SIDE, SIDE)).pixels.all()


@pytest.mark.usefixtures("process")
@pytest.mark.parametrize("make", [_gti, _vrt])
def test_a_damaged_member_is_damage_at_lower_resolution(tiles, tmp_path, make) -> None:
    source = open_source(make(tiles, tmp_path, relative=True))
    assert source.read_reduced(24).pixels.all()
    source.close()
    _damage(tiles[0][1])
    for _ in range(2):
        with pytest.raises(DamagedDataError, match=r"t1\.tif"):
            source.read_reduced(24)


@pytest.mark.usefixtures("process")
def test_members_of_bands_that_are_not_read_may_be_missing(tiles, tmp_path) -> None:
    source = "<SimpleSource><SourceFilename>{}</SourceFilename><SourceBand>1</SourceBand></SimpleSource>"
    bands = "".join(
        f'<VRTRasterBand dataType="UInt16" band="{band}">{source.format(path)}</VRTRasterBand>'
        for band, path in enumerate(tiles[0][:2], 1)
    )
    path = tmp_path / "bands.vrt"
    path.write_text(f'<VRTDataset rasterXSize="{SIDE}" rasterYSize="{SIDE}">{bands}</VRTDataset>')
    tiles[0][1].unlink()
    first, second = open_source(path, bands=[1]), open_source(path, bands=[2])
    for _ in range(2):
        with pytest.raises(DamagedDataError, match=r"t1\.tif"):
            second.read(second.extent)
        assert first.read(first.extent).pixels.all()


@pytest.mark.usefixtures("process")
@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("lose", [Path.unlink, _damage])
def test_a_lost_mask_is_damage_however_often_it_is_read(tiles, tmp_path, relative, lose) -> None:
    path = _vrt(tiles, tmp_path, relative=True)
    file = tiles[0][1].name if relative else tiles[0][1]
    source = f'<SimpleSource><SourceFilename relativeToVRT="{int(relative)}">{file}</SourceFilename></SimpleSource>'
    mask = f'<MaskBand><VRTRasterBand dataType="Byte">{source}</VRTRasterBand></MaskBand></VRTDataset>'
    text = path.read_text().replace(str(tiles[0][1].name), str(tiles[0][2].name))
    path.write_text(text.replace("</VRTDataset>", mask))
    source = open_source(path)
    assert source.read(source.extent).valid.any()
    source.close()
    lose(tiles[0][1])
    for _ in range(3):
        with pytest.raises(DamagedDataError, match=r"t1\.tif"):
            source.read(source.extent)


@pytest.mark.usefixtures("process")
def test_each_thread_finds_a_missing_member(tiles, tmp_path) -> None:
    source = open_source(_vrt(tiles, tmp_path, relative=True))
    tiles[0][1].unlink()
    lost = []
    reader = SalvagingReader(source, lambda window, _: lost.append(window))
    with ThreadPoolExecutor(4) as pool:
        images = list(pool.map(reader.read, [source.extent] * 40))
    assert sum(window.height * window.width for window in lost) == len(images) * SIDE**2
    assert all(np.array_equal(image.valid[0], np.repeat([True, False, True], SIDE)) for image in images)
