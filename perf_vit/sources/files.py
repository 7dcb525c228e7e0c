"""Search for image files, and fingerprints of files."""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from perf_vit.errors import InputError
from perf_vit.registry import Registry

if TYPE_CHECKING:
    from perf_vit.sources.slides.pyramid import PyramidReader

__all__ = [
    "FOLDER_SUFFIXES",
    "GEOTIFF_SUFFIXES",
    "MASK_SUFFIXES",
    "PARQUET_SUFFIXES",
    "PICTURE_SUFFIXES",
    "RASTER_SUFFIXES",
    "READERS",
    "TILE_INDEX_SUFFIXES",
    "file_stats",
    "files_below",
    "find_images",
    "find_reader",
    "fingerprint",
    "image_root",
    "image_suffixes",
    "is_by_product",
    "is_glob",
    "is_image_name",
    "is_item_list",
    "is_vector_name",
    "previews_among",
    "register_source",
    "split_layer",
    "without_repeats",
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


def find_reader(path: str) -> OpenReader | None:
    """Return the reader with the longest suffix that a path ends in, None if there is none."""
    name = path.lower().rstrip("/")
    suffixes = [suffix for suffix in READERS if name.endswith(suffix)]
    return READERS[max(suffixes, key=len)] if suffixes else None


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


def is_vector_name(path: str) -> bool:
    """Return whether a file has the suffix of a vector format."""
    return Path(split_layer(path)[0]).suffix.lower() in _VECTOR_SUFFIXES


def is_by_product(name: str) -> bool:
    """Return whether a file or folder is hidden or a by-product of other programs, by its name."""
    name = name.lower()
    return name.startswith(".") or name in _BY_PRODUCTS or name.endswith(_BY_PRODUCT_ENDINGS)


def image_suffixes() -> tuple[str, ...]:
    """Return the suffixes that folders are searched for: of rasters, image folders and registered readers, sorted."""
    return tuple(sorted({*RASTER_SUFFIXES, *FOLDER_SUFFIXES, *READERS}))


def is_image_name(name: str) -> bool:
    """Return whether a file name has a suffix that folders are searched for."""
    return name.lower().endswith(image_suffixes())


def files_below(root: Path, wanted: Callable[[str], bool]) -> list[Path]:
    """Find files and image folders below a folder, sorted, without hidden files and by-products of other programs.

    Links to folders are followed once per folder, so that cyclic links end.

    Args:
        root: Folder.
        wanted: Function that tells whether a file name is searched for.
    """
    return sorted(path for path in _walk(root) if wanted(path.name))


def without_repeats(paths: Iterable[Path]) -> list[Path]:
    """Remove paths of the same file through links to folders, keeping the shortest ones."""
    found: dict[tuple[str, str], Path] = {}
    for path in sorted(paths, key=lambda path: (len(path.parts), path)):
        found.setdefault((os.path.realpath(path.parent), path.name), path)
    return sorted(found.values())


def previews_among(paths: Iterable[Path]) -> set[Path]:
    """Return the previews, i.e. photos next to a raster or slide of the same name: `a.png` next to `a.tif`."""
    found = list(paths)
    images = {path.with_suffix("") for path in found if path.suffix.lower() not in PICTURE_SUFFIXES}
    pictures = (path for path in found if path.suffix.lower() in PICTURE_SUFFIXES)
    return {path for path in pictures if path.with_suffix("") in images}


def _walk(root: Path) -> Iterator[Path]:
    seen = set()
    for parent, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not is_by_product(name))
        images = [name for name in folders if os.path.splitext(name)[1].lower() in FOLDER_SUFFIXES]
        folders[:] = [name for name in folders if name not in images]
        regular = [name for name in files if not is_by_product(name) and os.path.isfile(os.path.join(parent, name))]
        yield from (Path(parent, name) for name in [*images, *regular])


def find_images(paths: Sequence[str | Path]) -> list[Path]:
    """Find the images of files, folders and globs.

    Files are taken as they are. Folders are searched recursively for the suffixes of rasters, slides and photos,
    without hidden files and by-products of other programs; so are globs, in which `**` matches any folders. Masks among
    the images are found, too, so keep them elsewhere or list the images.

    Args:
        paths: Files, folders and globs.

    Returns:
        Unique images in the order of the paths, sorted by name within a folder or glob.

    Raises:
        InputError: There are no paths, a path doesn't exist, or a folder or glob has no images.
    """
    if not paths:
        raise InputError("expected files, folders or globs of images, got none")
    found = [image for path in map(Path, paths) for image in _images_at(path)]
    return list(dict.fromkeys(found))


def is_glob(path: str | Path) -> bool:
    """Return whether a path has wildcards and isn't an existing file or folder."""
    return glob.has_magic(str(path)) and not Path(path).exists()


def image_root(path: str | Path) -> Path:
    """Return the folder that image names are relative to: a folder, a file's parent, or the folder of a glob."""
    path = Path(path)
    if path.is_dir():
        return path
    return next(parent for parent in path.parents if not is_glob(parent))


def _images_at(path: Path) -> list[Path]:
    if is_glob(path):
        matches = without_repeats(map(Path, glob.glob(str(path), recursive=True)))
        found = [each for each in matches if is_image_name(each.name) and not is_by_product(each.name)]
        if not found:
            raise InputError(f"no image matches {path}; expected files that end in {', '.join(image_suffixes())}")
        return found
    if path.is_file() or (path.is_dir() and path.suffix.lower() in FOLDER_SUFFIXES):
        return [path]
    if not path.is_dir():
        raise InputError(f"no image file or folder {path}; check the path")
    found = files_below(path, is_image_name)
    if not found:
        raise InputError(f"no images in {path}; expected files that end in {', '.join(image_suffixes())}")
    return found


_PIECE_BYTES = 4096

_NUM_PIECES = 16

# Maximum number of files per folder to read: a chunked array may have millions.
_NUM_FILES = 64

_DIGITS = 16


def fingerprint(paths: Iterable[str | Path]) -> str:
    """Hash the sizes and evenly spaced pieces of files, including their first and last bytes.

    Copies in other places have the same fingerprint. For folders, the names and sizes of all files count, and pieces of
    64 evenly spaced files; for missing files, such as URLs, the name.

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
    """Return all files below a folder, sorted."""
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
