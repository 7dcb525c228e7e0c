"""Files behind URLs: GDAL's settings for them, and repeated reads."""

from __future__ import annotations

import functools
import os
import re
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any, TypeVar

import rasterio
from rasterio.env import getenv, hasenv

from perf_vit.errors import DamagedDataError, InputError, UnreachableError

__all__ = ["is_remote", "network_limits", "was_decoded_in_vain", "with_remote_settings", "with_retries"]

T = TypeVar("T")

_VSI = ("vsicurl", "vsis3", "vsigs", "vsiaz", "vsiadls", "vsioss", "vsiswift", "vsihdfs", "vsiwebhdfs")
_MARKS = ("http://", "https://", "ftp://", "s3://", "gs://", "az://", *(f"/{name}" for name in _VSI))

_LIMITS = {
    # Without limits, in seconds and bytes a second, GDAL waits for a silent server for ever. Silence is a low speed,
    # which GDAL doesn't try again; a timeout it does.
    "GDAL_HTTP_CONNECTTIMEOUT": "10",
    "GDAL_HTTP_LOW_SPEED_TIME": "10",
    "GDAL_HTTP_LOW_SPEED_LIMIT": "100",
    "GDAL_HTTP_TIMEOUT": "120",
    # Each delay is about twice the one before.
    "GDAL_HTTP_MAX_RETRY": "3",
    "GDAL_HTTP_RETRY_DELAY": "0.5",
    # GDAL's own threads, which read members of a VRT or a tile index, don't see the settings of the thread that asks.
    "VRT_NUM_THREADS": "1",
    "GTI_NUM_THREADS": "1",
}

_OPENING = {
    # Looks for no files beside this one: a listing of a bucket, or a request for each name, at every opening.
    "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR",
    # Most headers come with the first request.
    "GDAL_INGESTED_BYTES_AT_OPEN": "32768",
    "VSI_CACHE": "TRUE",
    "VSI_CACHE_SIZE": "16777216",
    "GDAL_HTTP_MERGE_CONSECUTIVE_RANGES": "YES",
    "GDAL_HTTP_MULTIPLEX": "YES",
}

# GDAL keeps what a failed request brought, a part of a block or "no such file"; files opened with this are asked anew.
# As a rasterio.Env of the main thread it would stay behind in the threads below.
_ANEW = {"CPL_VSIL_CURL_NON_CACHED": ":".join(f"/{name}/" for name in _VSI)}
_anew: ContextVar[Mapping[str, str]] = ContextVar("anew", default=MappingProxyType({}))

# Seconds to wait before a failed read is repeated, once for each.
_WAITS_S = (1.0, 3.0)

# How libtiff names a block that came as a whole and can't be decoded.
_DECODING = re.compile(r"^(\w*Decode\w*|JPEGLib):")


def is_remote(path: str) -> bool:
    """Whether a path, or the text of a VRT, leads to a server."""
    return any(mark in path for mark in _MARKS)


def network_limits() -> dict[str, Any]:
    """GDAL's limits of time and of tries for files behind URLs, but for those that the user set."""
    return _unless_set({**_LIMITS, **_anew.get()})


def was_decoded_in_vain(reason: str) -> bool:
    """Whether GDAL's reason for a failed read says that all bytes came, and are damaged.

    Of anything else, such as a block that is too short, nobody knows whether the server failed or the file is cut.
    """
    return _DECODING.match(reason) is not None


def with_retries(read: Callable[[], T], close: Callable[[], None]) -> T:
    """Call a function that reads, and again after a while if a server doesn't deliver.

    Args:
        read: opens what it reads if that isn't open.
        close: closes what `read` opened; called after every failure.

    Raises:
        DamagedDataError: the pixels came, and are damaged.
        UnreachableError: no try succeeded; the first one's.
    """
    try:
        return _try_again(read, close)
    except InputError:
        # GDAL keeps blocks that it failed to fill, and would give their zeros as data the next time.
        close()
        raise


def _try_again(read: Callable[[], T], close: Callable[[], None]) -> T:
    try:
        return read()
    except UnreachableError as error:
        failure = error
    for wait_s in _WAITS_S:
        time.sleep(wait_s)
        close()
        token = _anew.set(_ANEW)
        try:
            return read()
        except DamagedDataError:
            raise
        except InputError:
            # Opened without an answer, a file is "not recognised": the first failure says more.
            continue
        finally:
            _anew.reset(token)
    raise failure


def with_remote_settings(open_file: Callable[[], T], further: Mapping[str, str]) -> T:
    """Call a function that opens a remote file, with GDAL set for that.

    What the environment variables or the caller's `rasterio.Env` say comes first. GDAL keeps the settings with the
    file that it opens.

    Args:
        open_file: opens it.
        further: settings that hold whatever was said.
    """
    settings = {**(getenv() if hasenv() else {}), **_unless_set({**_LIMITS, **_OPENING, **_anew.get()}), **further}
    # rasterio's settings hold for the whole process when made in its main thread, where they would hide the files
    # beside a local raster that another thread opens meanwhile; in any other thread they are that thread's own.
    return _threads(os.getpid()).submit(_call, open_file, settings).result()


def _unless_set(settings: dict[str, str]) -> dict[str, Any]:
    """Those that neither an environment variable nor the caller's `rasterio.Env` sets."""
    given = {*os.environ, *(getenv() if hasenv() else ())}
    return {name: value for name, value in settings.items() if name not in given}


@functools.lru_cache(maxsize=1)
def _threads(pid: int) -> ThreadPoolExecutor:
    """Threads of this process that last: one that ends holds a lock of PROJ for a moment, which a fork would keep."""
    return ThreadPoolExecutor(16, thread_name_prefix=f"open-url-{pid}")


def _call(open_file: Callable[[], T], settings: dict[str, Any]) -> T:
    with rasterio.Env(**settings):
        return open_file()
