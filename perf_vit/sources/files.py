"""Suffixes and names of image files, readers of formats, and fingerprints of files."""

from __future__ import annotations

import hashlib
import os
import re
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TypeVar

from perf_vit.errors import InputError
from perf_vit.registry import Registry

if TYPE_CHECKING:
    from perf_vit.sources.slides.pyramid import PyramidReader


import itertools
from pathlib import PurePosixPath

__all__ = [
    "ATTENTION_ENDING",
    "FOLDER_SUFFIXES",
    "GEOTIFF_SUFFIXES",
    "MASK_SUFFIXES",
    "PARQUET_SUFFIXES",
    "PICTURE_SUFFIXES",
    "RASTER_SUFFIXES",
    "READERS",
    "TILE_INDEX_SUFFIXES",
    "VERSION_TAG",
    "OpenReader",
    "file_stats",
    "fingerprint",
    "image_name",
    "image_names",
    "image_suffixes",
    "is_asap",
    "is_by_product",
    "is_image_name",
    "is_item_list",
    "is_own",
    "is_vector_name",
    "names_of",
    "register_source",
    "split_layer",
    "with_name",
]

PICTURE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})
"""Suffixes of photos, and of previews next to rasters."""

GEOTIFF_SUFFIXES = (".tif", ".tiff")
"""Suffixes of GeoTIFFs, of which maps are."""

TILE_INDEX_SUFFIXES = (".gti", ".gti.gpkg", ".gti.fgb", ".gti.parquet")
"""Suffixes of GDAL's tile indexes."""

RASTER_SUFFIXES = PICTURE_SUFFIXES | {*GEOTIFF_SUFFIXES, ".vrt", ".img", ".jp2", ".j2k", ".bil", ".asc"}
"""Suffixes of GDAL's files that are searched for in folders. Files given by name may have any suffix."""

FOLDER_SUFFIXES = frozenset({".zarr"})
"""Suffixes of folders that are an image each."""

MASK_SUFFIXES = RASTER_SUFFIXES - {".jpg", ".jpeg"}
"""Suffixes of masks, without JPEG, which changes values."""

PARQUET_SUFFIXES = frozenset({".geoparquet", ".parquet"})
"""Suffixes of GeoParquet."""

_VECTOR_SUFFIXES = PARQUET_SUFFIXES | {".fgb", ".geojson", ".geojsonl", ".gml", ".gpkg", ".json", ".kml", ".shp"}

ATTENTION_ENDING = "_attention"
"""Ending of the folders of attention pictures."""

VERSION_TAG = "PERF_VIT_VERSION"
"""Tag of every map that perf_vit writes."""

# A written map has its tags, and a picture its mark, before the pixels.
_MARK = re.compile(VERSION_TAG.encode() + rb"|Software\0perf_vit")

_MARK_BYTES = 8192

# ImageDescription, which has the tags of an OME-TIFF, and GDAL_METADATA.
_MARKED_TAGS = {270, 42112}

_BIG_TIFF = 43

_MOST_TAGS = 4096

_MOST_TEXT_BYTES = 1 << 20

_HEAD_BYTES = 4096

_BY_PRODUCTS = frozenset({"thumbs.db", "desktop.ini", "ehthumbs.db", "__macosx", "@eadir", "$recycle.bin"})

_BY_PRODUCT_ENDINGS = (".aux.xml", ".ovr", ".msk", ".partial", ".part", ".crdownload", "~")

OpenReader = Callable[[str], "PyramidReader"]
R = TypeVar("R", bound=OpenReader)

READERS: Registry[OpenReader] = Registry("suffix of a source", InputError)
"""Functions that open a path as a `PyramidReader`, by suffix."""


def register_source(*suffixes: str) -> Callable[[R], R]:
    """Decorate a class or function (path) -> `PyramidReader` to open all files with these suffixes.

    `perf_vit.open`, folders and globs of images, configs and all commands find the files then, and read them as they
    read slides.

    Args:
        suffixes: Ends of file names in lower case, such as ".svs" or ".ome.tif".

    Raises:
        ValueError: If a suffix is taken, or isn't in lower case with a dot.
    """
    wrong = [suffix for suffix in suffixes if not suffix.startswith(".") or suffix != suffix.lower()]
    if wrong:
        raise ValueError(f"suffix of a source must be in lower case and start with a dot, got {wrong[0]!r}")

    def register(reader: R) -> R:
        for suffix in suffixes:
            READERS.add(suffix, reader)
        return reader

    return register


def is_item_list(path: str) -> bool:
    """Return whether a file may hold STAC items, by its name."""
    return path.lower().endswith(".json") and os.path.isfile(path)


def split_layer(name: str) -> tuple[str, str | None]:
    """Split a name such as `site.gpkg|layername=roofs` (QGIS syntax) into file path and layer.

    Returns:
        Path, and layer name or None.
    """
    path, mark, layer = name.partition("|layername=")
    return (path, layer) if mark and not os.path.exists(name) else (name, None)


def is_asap(path: str) -> bool:
    """Return whether a file is XML of ASAP, by its suffix and first lines."""
    if not path.lower().endswith(".xml") or not os.path.isfile(path):
        return False
    with open(path, "rb") as file:
        return b"<ASAP_Annotations" in file.read(_HEAD_BYTES)


def is_vector_name(path: str) -> bool:
    """Return whether a file has the suffix of a vector format; XML of ASAP is known by its first lines."""
    file = split_layer(path)[0]
    return Path(file).suffix.lower() in _VECTOR_SUFFIXES or is_asap(file)


def is_by_product(name: str) -> bool:
    """Return whether a file or folder is hidden or a by-product of other programs, by its name."""
    name = name.lower()
    return name.startswith(".") or name in _BY_PRODUCTS or name.endswith(_BY_PRODUCT_ENDINGS)


def is_own(path: Path) -> bool:
    """Return whether an image is a picture or map that perf_vit wrote."""
    suffix = path.suffix.lower()
    if suffix in PICTURE_SUFFIXES and path.parent.name.endswith(ATTENTION_ENDING):
        return True
    if suffix not in (".png", *GEOTIFF_SUFFIXES):
        return False
    try:
        with path.open("rb") as file:
            head = file.read(_MARK_BYTES) if suffix == ".png" else _tiff_texts(file)
            return _MARK.search(head) is not None
    except (OSError, ValueError, struct.error):
        return False


def _tiff_texts(file: BinaryIO) -> bytes:
    """Return the texts that describe a TIFF, from its first directory, wherever in the file they are."""
    head = file.read(16)
    order = "<" if head[:2] == b"II" else ">"
    is_big = struct.unpack_from(f"{order}H", head, 2)[0] == _BIG_TIFF
    count, entry, pointer = (f"{order}{form}" for form in (("Q", "HHQ", "Q") if is_big else ("H", "HHI", "I")))
    file.seek(struct.unpack_from(pointer, head, 8 if is_big else 4)[0])
    (num_tags,) = struct.unpack(count, file.read(struct.calcsize(count)))
    entry_bytes, inline = struct.calcsize(entry), struct.calcsize(pointer)
    directory = file.read((entry_bytes + inline) * min(num_tags, _MOST_TAGS))
    texts = []
    for place in range(0, len(directory), entry_bytes + inline):
        number, _, num_bytes = struct.unpack_from(entry, directory, place)
        if number in _MARKED_TAGS and num_bytes > inline:
            file.seek(struct.unpack_from(pointer, directory, place + entry_bytes)[0])
            texts.append(file.read(min(num_bytes, _MOST_TEXT_BYTES)))
    return b"\n".join(texts)


def image_suffixes() -> tuple[str, ...]:
    """Return the suffixes that folders are searched for: of rasters, image folders and registered readers, sorted."""
    return tuple(sorted({*RASTER_SUFFIXES, *FOLDER_SUFFIXES, *READERS}))


def is_image_name(name: str) -> bool:
    """Return whether a file name has a suffix that folders are searched for."""
    return name.lower().endswith(image_suffixes())


_PIECE_BYTES = 4096

_NUM_PIECES = 16

# Maximum number of files per folder to read: a chunked array may have millions.
_NUM_FILES = 64

_DIGITS = 16


def fingerprint(paths: Iterable[str | Path]) -> str:
    """Hash the sizes and evenly spaced pieces of files, including their first and last bytes.

    Copies in other places have the same fingerprint. For folders, the names and sizes of all files count, and pieces of
    64 evenly spaced files; only DICOM files where there are any; for missing files, such as URLs, the name.

    Args:
        paths: Paths, in order.

    Returns:
        16 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for path in paths:
        if os.path.isfile(path):
            _add_file(digest, path)
        elif os.path.isdir(path):
            _add_folder(digest, path)
        else:
            digest.update(f"{os.fspath(path)}\n".encode())
    return digest.hexdigest()[:_DIGITS]


def file_stats(path: str | Path) -> tuple[int, int] | None:
    """Return size in bytes and modification time in nanoseconds; for folders sum and latest time, None if missing."""
    if os.path.isdir(path):
        stats = [os.stat(file) for file in _files_in(path)]
        return sum(each.st_size for each in stats), max((each.st_mtime_ns for each in stats), default=0)
    if not os.path.exists(path):
        return None
    stat = os.stat(path)
    return stat.st_size, stat.st_mtime_ns


def _files_in(folder: str | Path) -> list[str]:
    """Return all files below a folder, sorted; of a DICOM slide those of its levels, as outputs may lie beside them."""
    with os.scandir(folder) as entries:
        levels = sorted(entry.path for entry in entries if entry.name.lower().endswith(".dcm") and entry.is_file())
    if levels:
        return levels
    found = (os.path.join(parent, name) for parent, _, names in os.walk(folder) for name in names)
    return sorted(file for file in found if os.path.isfile(file))


def _add_folder(digest: hashlib._Hash, folder: str | Path) -> None:
    files = _files_in(folder)
    for file in files:
        name = Path(os.path.relpath(file, folder)).as_posix()
        digest.update(os.fsencode(f"{name} {os.path.getsize(file)}\n"))
    for file in files[:: max(1, -(-len(files) // _NUM_FILES))]:
        _add_file(digest, file)


def _add_file(digest: hashlib._Hash, path: str | Path) -> None:
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        digest.update(f"{size}\n".encode())
        last = max(0, size - _PIECE_BYTES)
        for number in range(_NUM_PIECES):
            file.seek(last * number // (_NUM_PIECES - 1))
            digest.update(file.read(_PIECE_BYTES))


_DATASET = re.compile(r'(?:\w+:)?"?([^":]+)\.\w+"?:+([^:]+)')


def image_name(path: str | Path) -> str:
    """Return the name of an image: that of its file or folder without the suffix, `fluo` for `fluo.ome.tif`.

    Of a dataset in a file, `NETCDF:file.nc:variable`, it has both, `file_variable`. Folders of DICOM files keep their
    dots.

    Args:
        path: File, folder, URL or GDAL path.
    """
    given = os.fspath(path)
    name = PurePosixPath(given.partition("?")[0] if "://" in given else with_name(Path(given)).as_posix()).name
    if dataset := _DATASET.fullmatch(name):
        return f"{dataset[1]}_{dataset[2]}"
    lower = name.lower()
    known = max((each for each in image_suffixes() if lower.endswith(each)), key=len, default="")
    if 0 < len(known) < len(name):
        return name[: -len(known)]
    return name if os.path.isdir(given) else PurePosixPath(name).stem


def with_name(path: Path) -> Path:
    """Return a path whose last part is a name: an absolute one for `.` and `..`."""
    return path.resolve() if path.name in ("", "..") else path


def names_of(path: str | Path) -> tuple[str, ...]:
    """Return all names by which labels and tables may call an image, the full one first, without folders."""
    name = Path(path).name
    return tuple(dict.fromkeys([name, image_name(path), PurePosixPath(name).stem]))


def image_names(paths: Iterable[str | Path]) -> dict[str, str]:
    """Return a file name for each image; images of one name get a number, as `a-2`, that no other image has.

    Names that differ in case only count as one, as some file systems keep one of them.
    """
    named = {os.fspath(path): image_name(path) for path in paths}
    own = {name.casefold() for name in named.values()}
    taken: set[str] = set()
    for path, name in named.items():
        numbered = (f"{name}-{number}" for number in itertools.count(2))
        free = (each for each in numbered if each.casefold() not in taken | own)
        named[path] = name if name.casefold() not in taken else next(free)
        taken.add(named[path].casefold())
    return named
