"""A server that fails while its raster is mapped."""

import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import rasterio
from command_line import call

from perf_vit.sources import _remote


class _Raster(BaseHTTPRequestHandler):
    """Serves ranges of one file; while it fails, only those near its beginning."""

    protocol_version = "HTTP/1.1"
    content: bytes
    fails = True

    def do_GET(self) -> None:
        asked = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        start = int(asked[1]) if asked else 0
        stop = min(int(asked[2]) + 1 if asked and asked[2] else len(self.content), len(self.content))
        if self.fails and stop > 50_000:
            self.send_error(503)
            return
        self.send_response(206 if asked else 200)
        self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(self.content)}")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(stop - start))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(self.content[start:stop])

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(make_scene, monkeypatch):
    monkeypatch.setitem(_remote._LIMITS, "GDAL_HTTP_MAX_RETRY", "0")
    monkeypatch.setattr(_remote, "_WAITS_S", (0.01,))
    path = make_scene(height=300, width=200, num_bands=4, nodata=None)
    handler = type("Handler", (_Raster,), {"content": path.read_bytes()})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as made:
        threading.Thread(target=made.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{made.server_port}/scene.tif", path, handler
        made.shutdown()


@pytest.mark.parametrize("on_error", ["skip", "stop"])
def test_a_map_waits_for_a_server_instead_of_leaving_nodata(trained, server, on_error, tmp_path, capsys) -> None:
    url, path, handler = server
    checkpoint = ["--checkpoint", trained.checkpoint]
    command = ["predict", *checkpoint, "--input", url, "--output", tmp_path / "map.tif", "--on-error", on_error]
    assert call(command) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1
    assert "can't read rows" in errors[0]
    assert url in errors[0]
    assert not (tmp_path / "map.tif").exists()
    handler.fails = False
    assert call(command) == 0
    assert call(["predict", *checkpoint, "--input", path, "--output", tmp_path / "local.tif"]) == 0
    with rasterio.open(tmp_path / "map.tif") as made, rasterio.open(tmp_path / "local.tif") as local:
        assert (made.read() == local.read()).all()
        assert made.tags()["PERF_VIT_DAMAGED_PIECES"] == "0"
