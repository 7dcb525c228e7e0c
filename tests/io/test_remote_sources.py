import re
import socket
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import rasterio

from perf_vit.errors import InputError
from perf_vit.io import _remote, open_source
from perf_vit.types import Window


class _Files(BaseHTTPRequestHandler):
    """Serves ranges of files, and counts the requests that begin at a file's first byte."""

    protocol_version = "HTTP/1.1"
    files: dict[str, bytes]
    counts: Counter

    def do_GET(self) -> None:
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


@pytest.fixture
def serve():
    """Serve files by name: the base URL, and the requests so far by (path, whether it asked for the header)."""
    servers = []

    def _serve(files: dict[str, bytes]):
        handler = type("Handler", (_Files,), {"files": files, "counts": Counter()})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}", handler.counts

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
        monkeypatch.setitem(_remote._DEFAULTS, name, value)
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
