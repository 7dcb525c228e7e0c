"""Files behind URLs: GDAL's settings for them."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import rasterio
from rasterio.env import getenv, hasenv

__all__ = ["is_remote", "with_remote_settings"]

T = TypeVar("T")

_MARKS = ("http://", "https://", "s3://", "gs://", "az://", "/vsicurl", "/vsis3", "/vsigs", "/vsiaz", "/vsiadls")

_DEFAULTS = {
    # Looks for no files beside this one: a listing of a bucket, or a request for each name, at every opening.
    "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR",
    # Most headers come with the first request.
    "GDAL_INGESTED_BYTES_AT_OPEN": "32768",
    "VSI_CACHE": "TRUE",
    "VSI_CACHE_SIZE": "16777216",
    "GDAL_HTTP_MERGE_CONSECUTIVE_RANGES": "YES",
    "GDAL_HTTP_MULTIPLEX": "YES",
    # Without limits, in seconds and bytes a second, GDAL waits for a silent server for ever. Silence is a low speed,
    # which GDAL doesn't try again; a timeout it does.
    "GDAL_HTTP_CONNECTTIMEOUT": "10",
    "GDAL_HTTP_LOW_SPEED_TIME": "10",
    "GDAL_HTTP_LOW_SPEED_LIMIT": "100",
    "GDAL_HTTP_TIMEOUT": "120",
    "GDAL_HTTP_MAX_RETRY": "2",
    "GDAL_HTTP_RETRY_DELAY": "0.5",
}


def is_remote(path: str) -> bool:
    """Whether a path, or the text of a VRT, leads to a server."""
    return any(mark in path for mark in _MARKS)


def with_remote_settings(open_file: Callable[[], T]) -> T:
    """Call a function that opens a remote file, with GDAL set for that.

    What the environment variables or the caller's `rasterio.Env` say comes first. GDAL keeps the settings with the
    file that it opens.
    """
    settings: dict[str, Any] = {name: value for name, value in _DEFAULTS.items() if name not in os.environ}
    if hasenv():
        settings |= getenv()
    # rasterio's settings hold for the whole process when made in its main thread, where they would hide the files
    # beside a local raster that another thread opens meanwhile; in any other thread they are that thread's own.
    return _threads(os.getpid()).submit(_call, open_file, settings).result()


@functools.lru_cache(maxsize=1)
def _threads(pid: int) -> ThreadPoolExecutor:
    """Threads of this process that last: one that ends holds a lock of PROJ for a moment, which a fork would keep."""
    return ThreadPoolExecutor(16, thread_name_prefix=f"open-url-{pid}")


def _call(open_file: Callable[[], T], settings: dict[str, Any]) -> T:
    with rasterio.Env(**settings):
        return open_file()
