import json
import re
import socket
import struct
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import geopandas
import numpy as np
import pytest
import rasterio
import shapely

from perf_vit.errors import DamagedDataError, InputError, UnreachableError
from perf_vit.inference.prefetch import SalvagingReader
from perf_vit.labels import open_labels
from perf_vit.sources import _remote, open_source
from perf_vit.types import Window


class _Files(BaseHTTPRequestHandler):
    """Serves ranges of files, and counts the requests that begin at a file's first byte."""

    protocol_version = "HTTP/1.1"
    files: dict[str, bytes]
    counts: Counter
    # What it does instead of answering, and how many times more.
    failure: Callable[["_Files"], None]
    num_failures = 0

    def do_GET(self) -> None:
        if type(self).num_failures > 0:
            type(self).num_failures -= 1
            self.failure()
            return
        content = self.files.get(self.path)
        if content is None:
            self.send_error(404)
            return
        asked = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        start = int(asked[1]) if asked else 0
        stop = min(int(asked[2]) + 1 if asked and asked[2] else len(content), len(content))
        if self.command == "GET":
            self.counts[self.path, start == 0] += 1
        self.send_response(206 if asked else 200)
        self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(content)}")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(stop - start))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[start:stop])

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass


def _status(code: int) -> Callable[[_Files], None]:
    return lambda handler: handler.send_error(code)


def _hang_up(handler: _Files) -> None:
    handler.connection.shutdown(socket.SHUT_RDWR)
    handler.close_connection = True


def _reset(handler: _Files) -> None:
    # Closing without lingering sends a reset.
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.close_connection = True
    handler.connection.close()


def _break_off(handler: _Files) -> None:
    handler.send_response(206)
    handler.send_header("Content-Range", "bytes 0-99999/999999")
    handler.send_header("Content-Length", "100000")
    handler.end_headers()
    handler.wfile.write(b"half")
    _hang_up(handler)


def _fall_silent(handler: _Files) -> None:
    time.sleep(0.6)
    _hang_up(handler)


_FAILURES = {
    "500": _status(500),
    "503": _status(503),
    "403": _status(403),
    "404": _status(404),
    "429": _status(429),
    "hang up": _hang_up,
    "reset": _reset,
    "break off": _break_off,
    "silence": _fall_silent,
}


@pytest.fixture
def serve():
    """Serve files by name: the base URL, and the requests so far by (path, whether it asked for the header)."""
    servers = []

    def _serve(files: dict[str, bytes]):
        handler = type("Handler", (_Files,), {"files": files, "counts": Counter()})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server.handle_error = lambda *_: None
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}", handler.counts

    _serve.servers = servers

    yield _serve
    for server in servers:
        server.shutdown()
        server.server_close()


def _noise(make_scene, **options):
    return make_scene(height=600, width=600, tiled=True, blockxsize=128, blockysize=128, **options)


def test_windows_by_url_equal_those_of_the_file(make_scene, serve) -> None:
    path = _noise(make_scene)
    url, _ = serve({"/a.tif": path.read_bytes()})
    remote, local = open_source(f"{url}/a.tif"), open_source(path)
    for window in (Window(0, 0, 50, 60), Window(400, 300, 250, 350)):
        assert np.array_equal(remote.read(window).pixels, local.read(window).pixels)


def test_a_header_is_fetched_once_whoever_opens_the_file(make_scene, serve) -> None:
    url, counts = serve({"/b.tif": _noise(make_scene).read_bytes()})
    source = open_source(f"{url}/b.tif")
    assert counts["/b.tif", True] == 1
    windows = [Window(r, c, 100, 100) for r in range(0, 600, 150) for c in range(0, 600, 150)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(source.read, windows))
    open_source(f"{url}/b.tif", crs="EPSG:32636").read(Window(0, 0, 20, 20))
    assert counts["/b.tif", True] == 1
    assert {path for path, _ in counts} == {"/b.tif"}


def test_a_missing_url_is_one_line(serve) -> None:
    url, _ = serve({})
    with pytest.raises(InputError, match=r"can't open http://.*/none.tif as a raster: .*404") as caught:
        open_source(f"{url}/none.tif")
    assert "\n" not in str(caught.value)


def test_a_silent_server_is_given_up(monkeypatch) -> None:
    for name, value in {"GDAL_HTTP_TIMEOUT": "1", "GDAL_HTTP_MAX_RETRY": "0"}.items():
        monkeypatch.setenv(name, value)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        start = time.monotonic()
        with pytest.raises(InputError, match="can't open"):
            open_source(f"http://127.0.0.1:{silent.getsockname()[1]}/a.tif")
        assert time.monotonic() - start < 10


def test_a_server_that_falls_silent_while_reading_is_given_up(make_scene, serve, monkeypatch) -> None:
    for name, value in {"GDAL_HTTP_TIMEOUT": "1", "GDAL_HTTP_MAX_RETRY": "0"}.items():
        monkeypatch.setitem(_remote._LIMITS, name, value)
    monkeypatch.setattr(_remote, "_WAITS_S", (0.0,))
    url, _ = serve({"/d.tif": _noise(make_scene).read_bytes()})
    source = open_source(f"{url}/d.tif")
    asleep = threading.Event()
    monkeypatch.setattr(_Files, "do_GET", lambda _: asleep.wait(20))
    start = time.monotonic()
    with pytest.raises(InputError, match="can't read rows 300 to 500"):
        source.read(Window(300, 0, 200, 600))
    assert time.monotonic() - start < 10
    asleep.set()


def test_settings_for_urls_hide_nothing_beside_local_files(make_scene, serve) -> None:
    path = make_scene(dtype="uint8", nodata=None)
    mask = np.full((70, 90), 255, np.uint8)
    mask[10:20] = 0
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=False), rasterio.open(path, "r+") as dataset:
        dataset.write_mask(mask)
    url, _ = serve({"/c.tif": _noise(make_scene).read_bytes()})
    with ThreadPoolExecutor(1) as pool:
        opened = pool.map(open_source, [f"{url}/c.tif"] * 5)
        for _ in range(20):
            assert not open_source(path).read(Window(10, 0, 10, 90)).valid.any()
        assert len(list(opened)) == 5


_VRT = """<VRTDataset rasterXSize="600" rasterYSize="600"><SRS>EPSG:32637</SRS>
<GeoTransform>401000.125,2.5,0,4510000.5,0,-3.25</GeoTransform><VRTRasterBand dataType="UInt16" band="1"><SimpleSource>
<SourceFilename>{path}</SourceFilename><SourceBand>1</SourceBand>
<SrcRect xOff="0" yOff="0" xSize="600" ySize="600"/><DstRect xOff="0" yOff="0" xSize="600" ySize="600"/>
</SimpleSource></VRTRasterBand></VRTDataset>"""


def _by_url(url, tmp_path):
    return url


def _by_vrt(url, tmp_path):
    path = tmp_path / "a.vrt"
    path.write_text(_VRT.format(path=f"/vsicurl/{url}"))
    return path


def _by_vrt_of_vrt(url, tmp_path):
    outer = tmp_path / "outer.vrt"
    outer.write_text(_VRT.format(path=_by_vrt(url, tmp_path)))
    return outer


def _by_tile_index(url, tmp_path):
    path = tmp_path / "a.gti.gpkg"
    box = shapely.box(401_000.125, 4_510_000.5 - 3.25 * 600, 401_000.125 + 2.5 * 600, 4_510_000.5)
    index = geopandas.GeoDataFrame({"location": [f"/vsicurl/{url}"]}, geometry=[box], crs="EPSG:32637")
    index.to_file(path, layer="tiles")
    return path


def _by_list(url, tmp_path):
    return [url]


def _by_stac(url, tmp_path):
    path = tmp_path / "items.json"
    path.write_text(json.dumps([{"id": "a", "assets": {"data": {"href": url, "roles": ["data"]}}}]))
    return path


_WAYS = [_by_url, _by_vrt, _by_vrt_of_vrt, _by_tile_index, _by_list, _by_stac]


@pytest.fixture
def impatient(monkeypatch):
    """Short waits, so that failures take no time."""
    limits = {"GDAL_HTTP_TIMEOUT": "0.3", "GDAL_HTTP_MAX_RETRY": "1", "GDAL_HTTP_RETRY_DELAY": "0.01"}
    for name, value in limits.items():
        monkeypatch.setitem(_remote._LIMITS, name, value)
    monkeypatch.setattr(_remote, "_WAITS_S", (0.01, 0.01))


def _put(serve, content: bytes) -> str:
    """The URL of a file, none of whose bytes GDAL remembers from another server at the same port."""
    name = f"/{uuid.uuid4().hex}.tif"
    return serve({name: content})[0] + name


def _fail(serve, failure: str, times: int) -> None:
    handler = serve.servers[-1].RequestHandlerClass
    handler.failure, handler.num_failures = _FAILURES[failure], times


@pytest.mark.usefixtures("process")
@pytest.mark.parametrize("way", _WAYS)
@pytest.mark.parametrize(
    "failure", ["503", "404", "hang up", "break off", pytest.param("silence", marks=pytest.mark.slow)]
)
def test_an_outage_is_no_damage(make_scene, serve, impatient, tmp_path, way, failure) -> None:
    url = _put(serve, _noise(make_scene, num_bands=1, nodata=None, compress="deflate").read_bytes())
    source = open_source(way(url, tmp_path))
    lost = []
    _fail(serve, failure, 10_000)
    start = time.monotonic()
    with pytest.raises(UnreachableError, match=r"can't (read rows|open)"):
        SalvagingReader(source, lambda window, _: lost.append(window)).read(Window(300, 0, 300, 600))
    assert lost == []
    assert time.monotonic() - start < 20


@pytest.mark.parametrize("failure", _FAILURES)
def test_a_server_that_comes_back_costs_no_pixel(make_scene, serve, impatient, failure, monkeypatch) -> None:
    if failure != "silence":
        # A busy machine answers late.
        monkeypatch.setitem(_remote._LIMITS, "GDAL_HTTP_TIMEOUT", "5")
    path = _noise(make_scene, num_bands=1, nodata=None, compress="deflate")
    source = open_source(_put(serve, path.read_bytes()))
    # Each is one of our two retries where GDAL has none of its own, as of a broken connection.
    _fail(serve, failure, 2)
    window = Window(300, 0, 300, 600)
    assert np.array_equal(source.read(window).pixels, open_source(path).read(window).pixels)


@pytest.mark.parametrize("kind", ["mask", "mask on another grid", "bands"])
def test_a_server_that_comes_back_costs_no_label(make_scene, serve, impatient, kind) -> None:
    path = _noise(make_scene, num_bands=1, nodata=None, compress="deflate")
    source = open_source(path, resolution=5.0) if kind == "mask on another grid" else open_source(path)
    with rasterio.open(path) as dataset:
        values = dataset.read() % 2
        profile = dataset.profile | {"dtype": "uint8", "compress": None}
    with rasterio.open(path.with_name("labels.tif"), "w", **profile) as dataset:
        dataset.write(values.astype(np.uint8))
    names = {"classes": ["a"], "multilabel": True} if kind == "bands" else {"classes": ["a", "b"]}
    url = _put(serve, path.with_name("labels.tif").read_bytes())
    labels, known = (open_labels(each, source, spot_check=False, **names) for each in (url, dataset.name))
    _fail(serve, "404", 3)
    window = Window(150, 0, 100, 100)
    assert np.array_equal(labels.read(window), known.read(window))


def test_damage_behind_a_url_is_damage(make_scene, serve, impatient) -> None:
    content = bytearray(_noise(make_scene, num_bands=1, nodata=None, compress="deflate").read_bytes())
    content[len(content) // 2 : len(content) // 2 + 40_000] = b"\xff" * 40_000
    url = _put(serve, bytes(content))
    lost = []
    image = SalvagingReader(open_source(url), lambda window, _: lost.append(window)).read(Window(0, 0, 600, 600))
    assert lost
    assert 0.8 < image.valid.mean() < 1
    with pytest.raises(DamagedDataError, match="may be truncated or damaged"):
        open_source(url).read(Window(0, 0, 600, 600))


@pytest.mark.usefixtures("process")
def test_members_behind_urls_are_given_up_in_threads_as_well(make_scene, serve, impatient, tmp_path) -> None:
    content = _noise(make_scene, num_bands=1, nodata=None).read_bytes()
    url = _put(serve, content)
    path = tmp_path / "many.vrt"
    member = re.search("<SimpleSource>.*</SimpleSource>", _VRT, re.DOTALL)[0]
    # GDAL reads more than a million pixels of several members in threads of its own.
    members = "".join(
        member.format(path=f"/vsicurl/{url}").replace('DstRect xOff="0"', f'DstRect xOff="{x}"')
        for x in range(0, 3000, 600)
    )
    path.write_text(f'<VRTDataset rasterXSize="3000" rasterYSize="600"><VRTRasterBand dataType="UInt16" band="1">'
                    f"{members}</VRTRasterBand></VRTDataset>")  # fmt: skip
    source = open_source(path)
    _fail(serve, "silence", 10_000)
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(source.read, source.extent)
        with pytest.raises(UnreachableError):
            reading.result(timeout=30)


@pytest.mark.slow
@pytest.mark.usefixtures("process")
@pytest.mark.parametrize("failure", ["503", "404", "hang up"])
def test_a_file_of_a_tile_index_that_was_never_opened_is_unreachable(make_scene, serve, impatient, tmp_path, failure):
    paths = [_noise(make_scene, num_bands=1, nodata=None, seed=seed) for seed in range(2)]
    # The second lies beside the first.
    with rasterio.open(paths[1], "r+") as dataset:
        dataset.transform @= rasterio.Affine.translation(600, 0)
    urls = [_put(serve, path.read_bytes()) for path in paths]
    boxes = [shapely.box(*open_source(path).bounds) for path in paths]
    index = geopandas.GeoDataFrame({"location": [f"/vsicurl/{url}" for url in urls]}, geometry=boxes, crs="EPSG:32637")
    index.to_file(tmp_path / "a.gti.gpkg", layer="tiles")
    source = open_source(tmp_path / "a.gti.gpkg")
    assert source.size == (600, 1200)
    _fail(serve, failure, 10_000)
    for _ in range(2):
        with pytest.raises(UnreachableError):
            source.read(Window(0, 700, 100, 100))
    _fail(serve, failure, 3)
    assert np.array_equal(
        source.read(Window(0, 600, 600, 600)).pixels, open_source(paths[1]).read(Window(0, 0, 600, 600)).pixels
    )
